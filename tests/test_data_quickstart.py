"""data/quickstart.py on a small tree of source files, and on the Python that runs the tests."""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "data"), str(Path(__file__).resolve().parent)]

import quickstart  # noqa: E402
from test_data_prepare import assert_one_line_error, read_bytes_documents, run_script, snapshot  # noqa: E402

LONG = "A sentence that is long enough to count as prose, since it has well over eighty characters in all."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The quickstart folder as the command makes it."""
    out = tmp_path_factory.mktemp("data") / "quickstart"
    result = run_script("quickstart.py", "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    return out, result.stdout


def test_shards_hold_the_text(made):
    out, stdout = made
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "python_docs.txt", "train_000.bin", "val_000.bin"]
    documents = (out / "python_docs.txt").read_text(encoding="utf-8").split("\0")
    train, val = (read_bytes_documents(out, split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(documents)
    assert 0.01 < len(val) / len(documents) < 0.12
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["eot"]) == ("bytes", 257, 256)
    assert manifest["documents"] == len(documents)
    size = (out / "python_docs.txt").stat().st_size
    assert size > 1_000_000
    assert manifest["tokens"] == size + 1  # every NUL between documents is an end-of-text token, and one stands first
    assert " MB" in stdout and f"{manifest['tokens']:,} tokens" in stdout


def test_text_is_english_from_python(made):
    text = (made[0] / "python_docs.txt").read_text(encoding="utf-8")
    assert "JSON (JavaScript Object Notation)" in text  # the docstring of json
    pytest.importorskip("pydoc_data.topics", reason="this Python comes without pydoc_data")
    assert "The standard type hierarchy" in text  # a topic


def test_second_call_does_nothing(made):
    out = made[0]
    before, times = snapshot(out), [p.stat().st_mtime_ns for p in sorted(out.iterdir())]
    result = run_script("quickstart.py", "--out", out)
    assert result.returncode == 0 and "nothing to do" in result.stdout
    assert snapshot(out) == before and [p.stat().st_mtime_ns for p in sorted(out.iterdir())] == times


def test_a_damaged_folder_is_made_again_the_same(made):
    out = made[0]
    before = snapshot(out)
    data = bytearray((out / "train_000.bin").read_bytes())
    data[5000] ^= 1
    (out / "train_000.bin").write_bytes(data)
    (out / "val_000.bin").unlink()
    # Another hash seed: nothing may follow the order of a set.
    assert run_script("quickstart.py", "--out", out, PYTHONHASHSEED="7").returncode == 0
    assert snapshot(out) == before


def test_other_shards_are_kept(tmp_path):
    (tmp_path / "a.txt").write_text("some\0text")
    out = tmp_path / "out"
    assert run_script("prepare.py", tmp_path / "a.txt", "--out", out, "--tokenizer", "bytes").returncode == 0
    before = snapshot(tmp_path)
    assert_one_line_error(run_script("quickstart.py", "--out", out), out, "already holds")
    assert snapshot(tmp_path) == before


def test_bad_flag():
    assert_one_line_error(run_script("quickstart.py", "--size", "3"), "--size", "--help")


def test_no_import_and_no_text(tmp_path, monkeypatch):
    """Neither topics nor source files, as in a stripped Python: one line, and nothing is written."""
    monkeypatch.setattr(quickstart.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(quickstart.DataError, match="data/prepare.py"):
        quickstart.main(["--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_without_topics(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert quickstart.topics() == []
    assert capsys.readouterr().out.count("\n") == 1


def write_module(root, name, source):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(textwrap.dedent(source), encoding="utf-8")


def test_module_documents(tmp_path):
    write_module(tmp_path, "b.py", f'''
        """{LONG} B"""
        raise SystemExit("never imported")
        class C:
            """{LONG}

                indented
            not
            """
            async def f(self):
                r"""{LONG} \\d"""
            def short(self):
                """Too short."""
        def g():
            """{LONG} B"""
    ''')
    write_module(tmp_path, "a/__init__.py", f'def f():\n    """{LONG} A"""\n')
    write_module(tmp_path, "a/twice.py", f'"""{LONG} A"""\n')
    write_module(tmp_path, "z.py", f'# coding: latin-1\n"""{LONG} Z"""\n')
    for name in ["test/t.py", "site-packages/s.py", "a/tests/t.py", "idlelib/i.py", ".venv/v.py", "__pycache__/c.py"]:
        write_module(tmp_path, name, f'"""{LONG} {name}"""\n')
    write_module(tmp_path, "broken.py", f'"""{LONG} broken"""\nprint "2"\n')
    write_module(tmp_path, "notes.txt", LONG)
    b = "\n\n".join([f"{LONG} B", f"{LONG}\n\n    indented\nnot", f"{LONG} \\d"])
    # os.walk takes a folder's files before its folders.
    assert quickstart.module_documents(tmp_path) == [b, f"{LONG} Z", f"{LONG} A"]


@pytest.mark.parametrize("text, prose", [
    (LONG, True),
    ("Too short.", False),
    (f">>> f()\n{LONG}\n{LONG}", False),
    (f"    >>> f()\n    {LONG}\n\n>>> g()\n{LONG}", False),
    (f">>> f()\n1\n\n{LONG}", True),
])
def test_is_prose(text, prose):
    assert quickstart.is_prose(text) is prose


def test_default_folder_is_beside_the_script():
    result = subprocess.run([sys.executable, Path(quickstart.__file__), "--help"], capture_output=True, text=True,
                            env=os.environ | {"COLUMNS": "200"})
    assert result.returncode == 0 and "default: quickstart, beside this script" in result.stdout
