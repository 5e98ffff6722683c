"""Inputs at random: files, manifests, checkpoints, flags and environments that nobody wrote on purpose. Whatever comes,
the script ends with a code that it documents and at most one line on stderr, runs no code of a file, and loses none."""
import collections
import contextlib
import copy
import hashlib
import io
import itertools
import json
import os
import pathlib
import pickle
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import timeit
import types
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

import train_gpt2_mod as script
from helpers import all_fields
from launch import ROOT, data_flags, runs_in, some_tokens, write_shard

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import doctor  # noqa: E402
import fineweb  # noqa: E402
import quickstart  # noqa: E402
import shards as shard_tools  # noqa: E402

LEAST = dict(shards=410, manifests=210, damaged=260, sealed=140, passed_over=80, content=260, folders=70, code=120,
             flags=820, runs=40, environment=60)  # kind -> inputs, each of them a call of the script
TRIED = collections.Counter()
VOCABULARY = 61
# A network of 4 thousand parameters, 16 tokens a step, nothing compiled, no service called.
TINY = ("--model tiny --n_layer 1 --n_head 1 --n_embd 16 --batch_size 2 --sequence_length 8 --val_tokens 20 "
        "--precision fp32 --device cpu --no_compile").split()
STEPS = 3  # of the run whose checkpoints are damaged
ONE_STEP = ["--num_iterations", "1", "--no_save_checkpoints"]
# Typed over what a damaged checkpoint says, so that it trains for one step, here.
QUICKLY = ("--num_iterations 4 --device cpu --no_compile --no_log_wandb --no_save_checkpoints --save_every 0 "
           "--save_every_minutes 0 --keep_last 0 --input_val_bin").split() + [""]
QUIET_BY_DEFAULT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
LONG = "long" * 100  # longer than a file's name may be


# What every input must meet


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def fuzz(kind, **strategies):
    """A test of LEAST[kind] inputs, called without arguments. They are short, and looking for shorter ones would take
    longer than a test may."""
    def decorate(test):
        tried = settings(max_examples=LEAST[kind], suppress_health_check=list(HealthCheck),
                         phases=(Phase.explicit, Phase.generate))(given(**strategies)(test))

        def run():
            tried()
            assert TRIED[kind] >= LEAST[kind]

        return run

    return decorate


def call(main, *argv):
    """What main(argv) comes to, its streams as on a terminal of UTF-8."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        code = main([str(word) for word in argv])
    for stream in (out, err):
        stream.flush()
    printed = [str(w.message) for w in seen if not issubclass(w.category, QUIET_BY_DEFAULT)]
    assert not printed  # they would be lines on stderr
    return Outcome(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def orderly(outcome):
    """Whether an outcome is one of the documented: 0 in silence, or a line on stderr."""
    code, _, err = outcome
    one_line = err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return code in (0, 1, 2) and (one_line if code else not err)


def tree(folder):
    """Path -> bytes of a file, or what else it is, for all that is in a folder."""
    found = {}
    for path in folder.rglob("*"):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "other"
        plain = kind == "other" and path.is_file() and os.access(path, os.R_OK)
        found[path] = path.read_bytes() if plain else kind
    return found


def run_script(kind, folder, *argv, resumed=None):
    """One input to the script, whose files are all in the folder. Those of a run that is resumed may grow, and later
    checkpoints may be set aside; nothing else changes, and nothing is new where the input was refused."""
    TRIED[kind] += 1
    before = tree(folder)
    outcome = call(script.main, *argv)
    after = tree(folder)
    assert orderly(outcome), outcome
    new = after.keys() - before.keys()
    assert not (outcome.code == 2 and new), (new, outcome)
    deep = {len(path.relative_to(folder).parts) for path in new if path.is_file()}
    assert deep <= {3}, new  # <output_dir>/<run_id>/<file>
    for path, content in before.items():
        grows = resumed == path.parent and path.suffix in (".json", ".jsonl", ".log")
        kept = after.get(path, after.get(path.with_name(f"{path.name}.aside") if resumed == path.parent else path))
        assert kept == content or (grows and path in after), (path, outcome)
    return outcome


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without waiting for the disk, and without the collection of garbage at each run's end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        nothing = {name: lambda: None for name in ("collect", "freeze", "unfreeze")}
        patch.setattr(script, "gc", types.SimpleNamespace(**nothing))
        yield


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """One process without a GPU, in an empty folder."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def scratch():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder).resolve()


def write_data(folder):
    for i, (name, count) in enumerate(dict(train_000=40, train_001=60, val_000=30).items()):
        write_shard(folder / f"{name}.bin", some_tokens(count, i, VOCABULARY), VOCABULARY)
    return folder


class Run(NamedTuple):
    """A sound run with checkpoints of steps 1 to STEPS."""

    data: Path
    folder: Path
    newest: bytes
    content: dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = tmp_path_factory.mktemp("sound")
    with contextlib.redirect_stdout(io.StringIO()):
        code = script.main([*TINY, *data_flags(write_data(base / "data")), "--input_val_bin", "", "--save_every", "1",
                            "--num_iterations", str(STEPS), "--output_dir", str(base / "logs")])
    folder, = runs_in(base / "logs")
    newest = folder / f"step{STEPS:06d}.pt"
    assert code == 0
    return Run(base / "data", folder, newest.read_bytes(), torch.load(newest, weights_only=True))


# Values that nobody expects

INTEGERS = [-1, 0, 1, 2, 3, 7, 16, 2**31, 2**63 - 1, 2**64, script.LARGEST + 1, 10**30, -10**30, 10**400]
FLOATS = [-1.5, -0.0, 0.5, 8 / 3, 1e-320, 1e30, 1e300, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", " ", "auto", "5", "nan", "8/0", "a\nb", "a\rb", "a\tb", "a\0b", "é漢🙂", "\ud800", "\udcff", "..", "../..",
         "/", "/dev/null", "~nobody/x", "*", "[", "%s{}", "\x1b[2J", "x" * 300]
PLAIN = st.one_of(st.sampled_from(INTEGERS), st.sampled_from(FLOATS), st.sampled_from(TEXTS), st.none(), st.booleans(),
                  st.text(max_size=8))
JUNK = st.recursive(PLAIN, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3)),
    max_leaves=4)


def paths_in(content, above=()):
    """Every place in nested dicts and lists, as a tuple of keys."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from paths_in(value, (*above, key))


def at(content, path):
    for key in path:
        content = content[key]
    return content


def replace(content, path, value):
    at(content, path[:-1])[path[-1]] = value


def remove(content, path):
    del at(content, path[:-1])[path[-1]]


def rename(content, path, key):
    """What stood under one key stands under another, which may be any value that has a hash."""
    holder = at(content, path[:-1])
    value = holder.pop(path[-1])
    if isinstance(holder, dict):
        holder[key if not isinstance(key, (dict, list)) else str(key)] = value


def swap(content, path, other):
    """Two places of which neither is in the other exchange what they hold."""
    if path[: len(other)] == other or other[: len(path)] == path:
        return
    values = copy.deepcopy([at(content, other), at(content, path)])  # so that nothing comes to hold itself
    for place, value in zip((path, other), values):
        replace(content, place, value)


def changes_of(content, junk=JUNK):
    """A strategy for one to three changes of a content."""
    paths = st.sampled_from(sorted(paths_in(content), key=lambda path: (len(path), repr(path))))
    one = st.one_of(st.tuples(st.just(replace), paths, junk), st.tuples(st.just(remove), paths),
                    st.tuples(st.just(rename), paths, PLAIN), st.tuples(st.just(swap), paths, paths))
    return st.lists(one, min_size=1, max_size=3)


def changed(content, changes):
    content = copy.deepcopy(content)
    for change, *values in changes:
        with contextlib.suppress(LookupError, TypeError, AttributeError):  # a change before it took the place away
            change(content, *values)
    return content


# Shards


def set_word(path, index, value):
    data = bytearray(path.read_bytes())
    data[4 * index : 4 * index + 4] = (value % 2**32).to_bytes(4, "little")
    path.write_bytes(data)


def set_token(path, index, value):
    data = bytearray(path.read_bytes())
    data[1024 + 2 * index : 1026 + 2 * index] = value.to_bytes(2, "little")
    path.write_bytes(data)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def cut_head(path, size):
    path.write_bytes(path.read_bytes()[size:])


def extend(path, data):
    path.write_bytes(path.read_bytes() + data)


def overwrite(path, data):
    path.write_bytes(data)


def take_place(path, other):
    shutil.copyfile(path.with_name(other), path.with_name("between"))
    path.replace(path.with_name(other))
    path.with_name("between").replace(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_link(path, target):
    path.unlink()
    path.symlink_to(target)


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def hide(path):
    path.chmod(0)


NAMES = st.sampled_from(["train_000.bin", "train_001.bin", "val_000.bin"])
WORDS = st.one_of(st.integers(-2**31, 2**31 - 1), st.sampled_from(
    [0, 1, 2, -1, 40, 60, 61, 62, 20240520, 20240521, 2**16, 2**16 + 1, 2**31 - 1, -2**31]))
SHARD_CHANGES = [
    (set_word, st.sampled_from([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 255]), WORDS),
    (set_token, st.integers(0, 29), st.integers(0, 2**16 - 1)), (cut, st.integers(0, 1150)),
    (cut_head, st.integers(1, 1150)), (extend, st.binary(min_size=1, max_size=9)), (overwrite, st.binary(max_size=40)),
    (take_place, NAMES), (make_folder,), (make_link, st.sampled_from(["none", "train_000.bin", "..", "val_000.bin"])),
    (make_pipe,), (Path.unlink,), (hide,),
]


def shard_in_words(path):
    """(tokens, vocabulary size) of a shard, None for what is none, by the words of its format."""
    data = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else b""
    if len(data) < 1024 or len(data) % 2:
        return None
    magic, version, count, size = struct.unpack("<4i", data[:16])
    tokens, size = struct.unpack(f"<{len(data) // 2 - 512}H", data[1024:]), size or 50257
    right = (magic, version, count) == (20240520, 1, len(tokens)) and tokens and size <= 65536 and max(tokens) < size
    return (tokens, size) if right else None


def can_train(data):
    """Whether TINY has all that it needs in a folder."""
    shards = [[shard_in_words(path) for path in data.glob(f"{split}_*.bin")] for split in ("train", "val")]
    if not all(shards) or None in shards[0] + shards[1] or len({size for _, size in shards[0] + shards[1]}) > 1:
        return False
    train, val = (sum(len(tokens) for tokens, _ in split) for split in shards)
    return train > 16 and val > 1  # a step's tokens, and one that is only a target


def test_shards(tmp_path):
    one_change = st.one_of(*(st.tuples(st.just(change), NAMES, *values) for change, *values in SHARD_CHANGES))

    @fuzz("shards", changes=st.lists(one_change, min_size=1, max_size=3))
    def one(changes):
        with scratch() as folder:
            data = write_data(folder / "data")
            for change, name, *values in changes:
                with contextlib.suppress(OSError):
                    if (data / name).is_file():  # no change before took it away
                        change(data / name, *values)
            outcome = run_script("shards", folder, *TINY, *data_flags(data), "--output_dir", folder / "logs", *ONE_STEP)
            assert outcome.code == (0 if can_train(data) else 2), outcome

    one()


# Manifests


MANIFEST_NAMES = ["../x", "..", ".", "", "/etc/passwd", "C:\\x", "C:x", "..\\x", "a\0b", "\ud800", "a\nb", "sub/x.bin",
                  "val_000.bin", "x" * 300, "\x1b[2J"]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.sampled_from(INTEGERS), st.sampled_from(FLOATS), st.text(max_size=8),
              st.sampled_from(MANIFEST_NAMES)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(
        st.sampled_from(["shards", "options", "tokens", "bytes", "sha256", "inputs", *MANIFEST_NAMES]),
        st.text(max_size=3)), inner, max_size=4)), max_leaves=8)


def run_reader(main):
    """A script of data/ as its own command would run it: its code."""
    def read(argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["script", *argv])
            patch.setattr(shard_tools.signal, "signal", lambda *_: None)
            try:
                shard_tools.run(main)
            except SystemExit as stop:
                return stop.code
        return 0

    return read


def test_manifests(tmp_path, monkeypatch):
    def no_hub():
        raise shard_tools.DataError("no network in this test")

    monkeypatch.setattr(fineweb, "import_hub", no_hub)
    for name in ("topics", "module_documents"):  # so that quickstart.py refuses where it would write
        monkeypatch.setattr(quickstart, name, lambda *_: [])
    data = write_data(tmp_path / "data")
    records = {name: {**shard_tools.shard_record(data / name), "mtime_ns": (data / name).stat().st_mtime_ns}
               for name in ("train_000.bin", "train_001.bin", "val_000.bin")}
    fetched = {"fineweb_val_000000.bin": "val_000.bin", "fineweb_train_000001.bin": "train_000.bin"}
    for new, old in fetched.items():
        records[new] = records[old]
        shutil.copy2(data / old, data / new)
    options = {"inputs": [quickstart.TEXT], "repo": fineweb.REPO, "revision": "main"}
    sound = shard_tools.write_manifest(data, "bytes", VOCABULARY, options, records)
    assert all(call(run_reader(main), "--out", data, *words).code == 0
               for main, *words in ((quickstart.main,), (fineweb.main, 1)))

    @fuzz("manifests", text=st.one_of(
        JSON.map(json.dumps), changes_of(sound, JSON).map(lambda changes: json.dumps(changed(sound, changes))),
        st.text(max_size=20), st.tuples(JSON.map(json.dumps), st.integers(0, 40)).map(lambda pair: pair[0][: pair[1]])))
    @example(text="[" * 100_000)
    @example(text='{"shards": {}, "options": {}, "tokens": ' + "9" * 5000 + "}")
    @example(text=json.dumps(dict(sound, shards={"val_000.bin": {}})))
    @example(text=json.dumps(dict(sound, shards={"val_000.bin": {"bytes": 1084}})))
    @example(text=json.dumps(dict(sound, shards=dict.fromkeys(fetched, 5), options=dict(options, inputs=[]))))
    @example(text=json.dumps(dict(sound, shards=dict.fromkeys(fetched, {}), options=dict(options, inputs=[]))))
    @example(text=json.dumps({name: sound[name] for name in ("options", "shards")}))
    def one(text):
        (data / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        TRIED["manifests"] += 1
        before = tree(tmp_path)
        code, out, err = outcome = call(doctor.main, "--data", data)
        assert orderly(outcome) or (code == 1 and not err and "FAIL" in out), outcome
        for main, *words in (quickstart.main,), (fineweb.main, 1):
            outcome = call(run_reader(main), "--out", data, *words)
            assert orderly(outcome), outcome
        assert tree(tmp_path) == before

    one()


# Checkpoints: bytes

PLACES = st.integers(0, 2**20 - 1)  # in a file, as a share of its size


def damage(data, changes):
    """The bytes of a file after changes (what, place, place, bytes)."""
    for what, a, b, new in changes:
        a, b = sorted((a * len(data) >> 20, b * len(data) >> 20))
        data = dict(
            flip=lambda: data[:a] + bytes([data[a] ^ (new[0] or 1)]) + data[a + 1 :] if data else data,
            write=lambda: data[:a] + new + data[a + len(new) :],
            zero=lambda: data[:a] + bytes(b - a) + data[b:],
            cut=lambda: data[:a] + data[b:],
            truncate=lambda: data[:a],
            truncate_a_little=lambda: data[: -len(new)],
            repeat=lambda: data[:b] + data[a:],
            turn=lambda: data[:a] + data[b:] + data[a:b],
            append=lambda: data + new,
            prepend=lambda: new + data,
        )[what]()
    return data


DAMAGE = st.lists(st.tuples(
    st.sampled_from("flip write zero cut truncate truncate_a_little repeat turn append prepend".split()),
    PLACES, PLACES, st.binary(min_size=1, max_size=8)), min_size=1, max_size=3)


def seal(data):
    """The bytes of a zip file without a comment, or of anything else, with a right checksum at their end."""
    comment = b"sha256:" + hashlib.sha256(data + bytes(2)).hexdigest().encode()
    return data + len(comment).to_bytes(2, "little") + comment


def sealed(content, **how):
    """What torch.save makes of a content, sealed."""
    file = io.BytesIO()
    torch.save(content, file, **how)
    data = file.getvalue()
    return seal(data.removesuffix(bytes(2)) if zipfile.is_zipfile(file) else data)


def test_seal(run):
    """The checkpoints made here differ from those of the script by their damage alone."""
    assert seal(run.newest[: -script.CHECKSUM_BYTES]) == run.newest
    with scratch() as folder:
        path = folder / "whole.pt"
        path.write_bytes(sealed(run.content))
        script.load_checkpoint(path)


WAYS = {  # how a file is named -> the flags that name it
    "resume": lambda path: ["--resume", path],
    "dry resume": lambda path: ["--resume", path, "--dry_run"],
    "folder": lambda path: ["--resume", path.parent],
    "auto": lambda path: ["--resume", "auto"],
    "weights": lambda path: ["--init_from", path],
    "dry weights": lambda path: ["--init_from", path, "--dry_run"],
}


def start_with(kind, folder, run, data, way):
    """The script with a file of these bytes in the place of a run's only checkpoint."""
    path = folder / "logs" / run.folder.name / f"step{STEPS:06d}.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    flags, in_place = WAYS[way](path), way in ("auto", "folder")
    if "dry" not in way:
        flags += [*QUICKLY, "--output_dir", folder / ("logs" if in_place else "other")]
    if "weights" in way:
        flags += [*TINY, *data_flags(run.data), "--input_val_bin", ""]
    return run_script(kind, folder, *flags, resumed=path.parent if in_place else None)


def test_damaged_checkpoints(run):
    @fuzz("damaged", changes=DAMAGE, way=st.sampled_from(list(WAYS)))
    def one(changes, way):
        data = damage(run.newest, changes)
        with scratch() as folder:
            outcome = start_with("damaged", folder, run, data, way)
            assert data == run.newest or (outcome.code == 2 and f"step{STEPS:06d}.pt" in outcome.err)

    one()


def test_damage_that_the_checksum_does_not_see(run):
    """It reaches torch.load, and what is loaded may train."""
    @fuzz("sealed", changes=DAMAGE, way=st.sampled_from(list(WAYS)))
    def one(changes, way):
        with scratch() as folder:
            start_with("sealed", folder, run, seal(damage(run.newest[: -script.CHECKSUM_BYTES], changes)), way)

    one()


def test_a_sound_checkpoint_beside_a_damaged_one(run):
    """Neither stops the other from being found: the older one is taken, and the damaged one is named and kept."""
    @fuzz("passed_over", changes=DAMAGE, auto=st.booleans(), resealed=st.booleans())
    def one(changes, auto, resealed):
        data = damage(run.newest, changes)
        assume(data != run.newest)
        if resealed:  # a checkpoint of another kind, as far as the checksum goes
            data = sealed(dict(run.content, format=1, junk=data[:99]))
        with scratch() as folder:
            place = folder / "logs" / run.folder.name
            shutil.copytree(run.folder, place)
            newest, older = place / f"step{STEPS:06d}.pt", place / f"step{STEPS - 1:06d}.pt"
            newest.write_bytes(data)
            named = ["auto", "--output_dir", folder / "logs"] if auto else [place]
            flags = ["--resume", *named, "--num_iterations", STEPS - 1]
            outcome = run_script("passed_over", folder, *flags, resumed=place)
            assert outcome.code == 0 and f"passed over: {newest} " in outcome.out, outcome
            assert f"resumed {older} at step {STEPS - 1}" in outcome.out
            assert newest.with_suffix(".pt.aside").read_bytes() == data

    one()


# Checkpoints: content

TENSORS = dict(
    double=torch.Tensor.double, half=torch.Tensor.half, complex=lambda t: t.to(torch.complex64), long=torch.Tensor.long,
    bool=torch.Tensor.bool, nan=lambda t: torch.full_like(t.float(), torch.nan), huge=lambda t: t.float() + 1e38,
    less=lambda t: t.flatten()[:-1].clone(), more=lambda t: t[None], flat=torch.Tensor.flatten,
    nothing=lambda t: t.new(0),
    turned=lambda t: t.T.contiguous() if t.dim() == 2 else t.flip(0) if t.dim() else t, sparse=torch.Tensor.to_sparse,
    meta=lambda t: t.to("meta"), one=lambda t: t.new_zeros(()), repeated=lambda t: t.new_zeros(()).expand(t.shape),
    parameter=lambda t: torch.nn.Parameter(t.float()), number=lambda t: float(t.sum()), numbers=torch.Tensor.tolist,
    negative=lambda t: -t.float(),
)


def convert(content, path, kind):
    replace(content, path, TENSORS[kind](at(content, path)))


def within_memory(change):
    """Whether a change of a configuration makes no network or batch so large that it is slow and not absurd."""
    _, path, *values = change
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return path[0] not in ("network", "run") or not any(64 < v <= script.LARGEST for v in numbers)


def test_content(run):
    places = sorted(paths_in(run.content), key=lambda path: (len(path), repr(path)))
    tensors = st.sampled_from([path for path in places if isinstance(at(run.content, path), torch.Tensor)])
    state = st.sampled_from([path for path in places if path[0] not in ("model", "network", "run")])
    change = st.one_of(
        changes_of(run.content).map(lambda changes: changes[0]), st.tuples(st.just(replace), state, JUNK),
        st.tuples(st.just(convert), tensors, st.sampled_from(list(TENSORS))),
        st.tuples(st.just(replace), st.tuples(st.sampled_from(["network", "run"]), st.text(max_size=5)), JUNK),
    ).filter(within_memory)

    @fuzz("content", changes=st.lists(change, min_size=1, max_size=2), way=st.sampled_from(list(WAYS)))
    @example(changes=[(replace, ("optimizer", "state", 0, "exp_avg"), 1)], way="resume")
    @example(changes=[(remove, ("optimizer", "state", 0, "exp_avg"))], way="resume")
    @example(changes=[(convert, ("optimizer", "state", 0, "exp_avg"), "less")], way="resume")
    @example(changes=[(convert, ("optimizer", "state", 0, "exp_avg_sq"), "sparse")], way="resume")
    @example(changes=[(convert, ("optimizer", "state", 0, "exp_avg_sq"), "repeated")], way="resume")
    @example(changes=[(replace, ("optimizer", "state", 0, "step"), -1)], way="resume")
    @example(changes=[(replace, ("optimizer", "param_groups", 0, "betas"), {})], way="resume")
    @example(changes=[(remove, ("optimizer", "param_groups", 0, "weight_decay"))], way="resume")
    @example(changes=[(replace, ("optimizer", "param_groups", 0, "capturable"), True)], way="resume")
    @example(changes=[(convert, ("model", "transformer.wte.weight"), "complex")], way="resume")
    @example(changes=[(replace, ("loader", "epoch"), "x"), (replace, ("loader", "tokens"), 10**6)], way="resume")
    @example(changes=[(replace, ("loader", "tokens"), [])], way="resume")
    @example(changes=[(replace, ("loader", "tokens"), -1)], way="resume")
    @example(changes=[(replace, ("loader", "tokens"), 0.5)], way="resume")
    @example(changes=[(replace, ("tokens",), [])], way="resume")
    @example(changes=[(replace, ("seconds",), "x")], way="resume")
    @example(changes=[(replace, ("seconds",), 10**400)], way="resume")
    @example(changes=[(replace, ("step",), -1)], way="resume")
    @example(changes=[(replace, ("step",), 10**400)], way="dry resume")
    @example(changes=[(replace, ("network", "n_head"), True)], way="resume")
    @example(changes=[(replace, ("network", "n_layer"), 1.0)], way="resume")
    @example(changes=[(replace, ("network", "mtp_weight"), [[]])], way="resume")
    @example(changes=[(replace, ("network", "window"), torch.zeros(2))], way="weights")
    @example(changes=[(replace, ("network", "norm"), "a\nb")], way="weights")
    @example(changes=[(replace, ("run", "grad_clip"), {})], way="resume")
    @example(changes=[(replace, ("run", "seed"), "x")], way="resume")
    @example(changes=[(replace, ("run", "input_bin"), 5)], way="resume")
    @example(changes=[(replace, ("run", "input_bin"), "a\0*/b")], way="dry resume")
    @example(changes=[(replace, ("run", "model"), [])], way="weights")
    @example(changes=[(replace, ("run", "output_dir"), 5)], way="dry resume")
    def one(changes, way):
        with scratch() as folder:
            start_with("content", folder, run, sealed(changed(run.content, changes)), way)

    one()


def test_numbers_too_long_to_print(run):
    for name, way in itertools.product(["step", "tokens", "seconds", "skipped", "run_id"], WAYS):
        with scratch() as folder:
            start_with("content", folder, run, sealed(dict(run.content, **{name: 10**5000})), way)


@pytest.mark.parametrize("output_dir, run_id", [
    ("logs", ".."), ("logs", "/"), ("logs", "a/b"), ("logs", "a\0b"), ("logs", "\ud800"), ("logs", LONG), ("logs", ""),
    ("logs/other", "../{run_id}"), ("logs/{run_id}", "."), ("logs/{run_id}", ""), ("logs", "{folder}/logs/{run_id}"),
    ("logs", "{run_id}/../{run_id}"), ("logs", "../logs/{run_id}"),
])
def test_run_ids_that_lead_elsewhere(run, output_dir, run_id):
    with scratch() as folder:
        output_dir, run_id = (text.format(run_id=run.folder.name, folder=folder) for text in (output_dir, run_id))
        path = folder / "logs" / run.folder.name / f"step{STEPS:06d}.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(sealed(dict(run.content, run_id=run_id)))
        run_script("content", folder, *QUICKLY, "--resume", path, "--output_dir", folder / output_dir,
                   resumed=path.parent)


def test_content_that_is_no_dict(run):
    for content, way in itertools.product([[], {}, None, 5, "x", torch.zeros(3), {"format": 2}, [run.content]], WAYS):
        with scratch() as folder:
            assert start_with("content", folder, run, sealed(content), way).code == 2


# Folders of runs


def test_folders_of_runs(run):
    network = json.loads((run.folder / "config.json").read_text())
    settings_text = st.one_of(
        JSON.map(json.dumps), st.text(max_size=9), st.just("[" * 100_000),
        changes_of(network).filter(lambda changes: all(v[0] is not rename for v in changes)).map(
            lambda changes: json.dumps(changed(network, changes), default=str)))
    names = st.sampled_from(["step000002.pt", "step.pt", "step-1.pt", "step٣.pt", "step1e3.pt", "step5.pt", "stepx.pt",
                             ".step000009.pt.tmp", "step000007.pt.aside", "metrics.jsonl", "step²2.pt"])
    kinds = st.sampled_from(["folder", "nothing", "sound", "empty", "link", "loop", "hidden"])

    @fuzz("folders", text=settings_text, files=st.dictionaries(names, kinds, max_size=4), auto=st.booleans(),
          run_name=st.sampled_from(["a", "20250101-000000-tiny-0000", "x y", "é", "a\nb", "\udcff"]), dry=st.booleans())
    def one(text, files, auto, dry, run_name):
        with scratch() as folder:
            place = folder / "logs" / run_name
            place.mkdir(parents=True)
            (place / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
            for name, kind in files.items():
                path = place / name
                dict(folder=path.mkdir, nothing=lambda: None, sound=lambda: path.write_bytes(run.newest),
                     empty=path.touch, link=lambda: path.symlink_to("none"), loop=lambda: path.symlink_to(path),
                     hidden=lambda: path.touch(0))[kind]()
            (folder / "logs" / "stray").write_text("a file among the runs")
            flags = ["--resume", "auto"] if auto else ["--resume", place]
            run_script("folders", folder, *QUICKLY, *TINY, *data_flags(run.data), "--input_val_bin", "", *flags,
                       "--output_dir", folder / "logs", *["--dry_run"] * dry)

    one()


# Files with code in them

CODE = {  # (proof, a file with Python in it) -> a callable and its arguments, that make the proof
    "mkdir": lambda proof, source: (os.mkdir, (proof,)),
    "system": lambda proof, source: (os.system, (f"mkdir '{proof}'",)),
    "exec": lambda proof, source: (exec, (f"import os; os.mkdir({proof!r})",)),
    "eval": lambda proof, source: (eval, (f"__import__('os').mkdir({proof!r})",)),
    "subprocess": lambda proof, source: (subprocess.call, (["mkdir", proof],)),
    "open": lambda proof, source: (open, (proof, "w")),
    "copy": lambda proof, source: (shutil.copyfile, (source, proof)),
    "touch": lambda proof, source: (pathlib.Path.touch, (pathlib.Path(proof),)),
    "run_path": lambda proof, source: (runpy.run_path, (source,)),
    "timeit": lambda proof, source: (timeit.timeit, (f"import os; os.mkdir({proof!r})", "", timeit.default_timer, 1)),
    "torch.save": lambda proof, source: (torch.save, ({}, proof)),
    "getattr": lambda proof, source: (map(os.mkdir, [proof]).__next__, ()),
}


class Exploit:
    """Unpickled, it calls something."""

    def __init__(self, act):
        self.act = act

    def __reduce__(self):
        return self.act


def nested(value):
    for _ in range(20):
        value = [value]
    return value


HIDING_PLACES = {
    "whole": lambda content, exploit: exploit,
    "format": lambda content, exploit: dict(content, format=exploit),
    "extra": lambda content, exploit: dict(content, extra=exploit),
    "key": lambda content, exploit: {**content, exploit: 1},
    "nested": lambda content, exploit: dict(content, extra=nested(exploit)),
    "weight": lambda content, exploit: dict(content, model={**content["model"], "x": exploit}),
    "network": lambda content, exploit: dict(content, network={**content["network"], "n_layer": exploit}),
    "run": lambda content, exploit: dict(content, run={**content["run"], "seed": exploit}),
    "optimizer": lambda content, exploit: dict(content, optimizer=dict(content["optimizer"], state={0: exploit})),
    "rng": lambda content, exploit: dict(content, rng=[[exploit]]),
    "run_id": lambda content, exploit: dict(content, run_id=exploit),
}


def zip_of(pickled, compression=zipfile.ZIP_STORED, **others):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as z:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **others}.items():
            z.writestr(f"archive/{name}", data)
    return seal(file.getvalue().removesuffix(bytes(2)))


def tar_of(pickled):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as t:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            t.addfile(member, io.BytesIO(pickled))
    return seal(file.getvalue())


FORMATS = {
    "torch": sealed,
    "torch, protocol 4": lambda value: sealed(value, pickle_protocol=4),
    "torch, before zip": lambda value: sealed(value, _use_new_zipfile_serialization=False),
    "zip": lambda value: zip_of(pickle.dumps(value, 2)),
    "zip, compressed": lambda value: zip_of(pickle.dumps(value, 2), zipfile.ZIP_DEFLATED),
    "TorchScript": lambda value: zip_of(pickle.dumps(value, 2), **{"constants.pkl": pickle.dumps(value, 2)}),
    "tar": lambda value: tar_of(pickle.dumps(value, 2)),
    "pickle 0": lambda value: seal(pickle.dumps(value, 0)),
    "pickle 2": lambda value: seal(pickle.dumps(value, 2)),
    "pickle 5": lambda value: seal(pickle.dumps(value, 5)),
    "pickle without a checksum": lambda value: pickle.dumps(value, 2),
}


def test_no_code_of_a_file_runs(run):
    formats, ways = itertools.cycle(FORMATS.values()), itertools.cycle(WAYS)
    small = dict(run.content, model={}, optimizer=dict(state={}, param_groups=[]), rng=[])
    for (name, code), (place, hidden) in itertools.product(CODE.items(), HIDING_PLACES.items()):
        with scratch() as folder:
            proof, source = str(folder / "the code ran"), folder / "code.py"
            source.write_text(f"import os; os.mkdir({proof!r})")
            content = hidden(small, Exploit(code(proof, str(source))))
            outcome = start_with("code", folder, run, next(formats)(content), next(ways))
            assert outcome.code == 2 and not os.path.lexists(proof), (name, place, outcome)
            if place == "nested":
                with contextlib.suppress(StopIteration):
                    pickle.loads(pickle.dumps(content))
                assert os.path.lexists(proof)  # so the file was dangerous


# Flags

WORDS_TYPED = ["", " ", "-", "--", "---", "=", "auto", "none", "True", "1.5", "+3", " 7 ", "١٢", LONG, "x" * 100_000,
               "a\nb", "a\r\nb", "é漢🙂", "\udcff", "*", "[", "**", "~", "~nobody/x", "/", ".", "..", "/dev/null",
               "%s{}", "\x1b[2J", "=5", "-5", "--n_layer"]
ODD_NUMBERS = ["nan", "inf", "-inf", "8/0", "8/3", "0/0", "1/nan", "1e999", "-1e-320", "9" * 5000, "1_0", "0x10", "1e3"]
NUMBERS = [str(n) for n in (-1, 0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 32, 60, 64, 2**63, 10**30, 0.5, 0.1, 1e-5)]
TYPED = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)  # argv holds no others


def names_of(field):
    """Every way to write a field's flag, those that are wrong by a little included."""
    names = [field.name, *field.metadata["aliases"], *field.metadata["switches"]]
    names += [f"no_{name}" for name in names if field.type is bool]
    mixed = [name.replace("_", "-", 1) for name in names] + [name.replace("_", "-") for name in names]
    return [f"--{name}" for name in dict.fromkeys(names + mixed)] + [f"-{field.name}", f"--{field.name[:-1]}"]


def values_of(field):
    """Values of a flag: for each type what is usual, at its limits, or absurd."""
    choices = field.metadata["choices"]
    choices = list(choices() if callable(choices) else choices or [])
    usual = st.sampled_from([*choices, *NUMBERS, str(script.LARGEST), str(script.LARGEST + 1)])
    if field.name in ("n_layer", "mtp_max_steps", "n_head"):  # counts that take their time
        usual = st.sampled_from([*NUMBERS, str(script.LARGEST + 1)])
    return st.one_of(usual, usual, st.sampled_from(ODD_NUMBERS), st.sampled_from(WORDS_TYPED), TYPED)


def flag_of(field):
    """One flag as words: alone, with its value behind it, or behind an equals sign."""
    name, value = st.sampled_from(names_of(field)), values_of(field)
    pair, joined = st.tuples(name, value).map(list), st.tuples(name, value).map(lambda pair: ["=".join(pair)])
    return st.one_of(name.map(lambda flag: [flag]), *([] if field.type is bool else [pair, pair]), joined)


FLAGS = st.lists(st.one_of(*(flag_of(f) for _, f in all_fields()), st.sampled_from(WORDS_TYPED).map(lambda w: [w]),
                           TYPED.map(lambda text: [f"--{text}"])), max_size=6)


def asks_for_help(flags):
    return any(word.startswith("-h") or word == "--help" for flag in flags for word in flag)


def test_flags(run, tmp_path):
    Path("stray").write_text("a file of the user")
    data = data_flags(run.data)

    @fuzz("flags", small=st.booleans(), flags=st.one_of(FLAGS, FLAGS.map(lambda flags: flags + flags[:1])).filter(
        lambda flags: not asks_for_help(flags)))
    @example(flags=[["--model", "a\nb"]], small=False)
    @example(flags=[["--resume", LONG]], small=True)
    @example(flags=[["--init_from", LONG]], small=True)
    @example(flags=[["--resume", "auto"], ["--output_dir", LONG]], small=True)
    @example(flags=[["--val-tokens=--"]], small=True)
    @example(flags=[["--embd_scale", "8/0"]], small=True)
    @example(flags=[["--input_bin=--"]], small=False)
    @example(flags=[["--sequence_length", "1000000000000"]], small=False)
    def one(flags, small):
        run_script("flags", tmp_path, "--dry_run", *([*TINY, *data] if small else []), *itertools.chain(*flags))

    one()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("flags", [
    "--n_head 500000000 --n_embd 500000000", "--n_head 999999999989 --gqa_enabled",
    "--mtp_enabled --mtp_heads separate --mtp_max_steps 1000000000",
])
def test_counts_that_would_take_hours(tmp_path, flags):
    run_script("flags", tmp_path, "--dry_run", *flags.split())


@pytest.mark.timeout(30)
@pytest.mark.parametrize("flags", [
    "--batch_size auto --total_batch_size 1000000000000", "--n_embd 64 --ffn_hidden 1000000000000",
    "--n_embd 64 --position learned --n_positions 1000000000000",
])
def test_sizes_that_no_machine_has(run, tmp_path, flags):
    """More than 128 TiB, which no process can even reserve."""
    run_script("flags", tmp_path, *TINY, *data_flags(run.data), *ONE_STEP, "--output_dir", tmp_path / "logs",
               *flags.split())


def test_more_weights_than_can_be_counted(tmp_path):
    run_script("flags", tmp_path, "--dry_run", "--vocab_size", 10**12, "--n_embd", 64 * 10**5)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("flag", ["--resume", "--init_from"])
def test_a_pipe_to_start_from(run, tmp_path, flag):
    os.mkfifo(tmp_path / "pipe")
    run_script("flags", tmp_path, *TINY, *data_flags(run.data), flag, tmp_path / "pipe")


@pytest.mark.parametrize("flags", [["--dry_run"], QUICKLY])
@pytest.mark.parametrize("flag", ["--resume", "--init_from"])
def test_a_link_that_leads_to_itself(run, tmp_path, flag, flags):
    loop, whole = tmp_path / "loop", run.folder / f"step{STEPS:06d}.pt"
    loop.symlink_to(loop)
    known = TINY if flag == "--init_from" else []
    for path, output_dir in (whole, loop), (whole, loop / "below"), (loop, tmp_path / "logs"), ("auto", loop):
        if path != "auto" or flag == "--resume":
            run_script("flags", tmp_path, *known, *data_flags(run.data), *flags, flag, path, "--output_dir", output_dir)


def test_runs(run):
    """Values in the usual range, in any combination, for a step or two."""
    small = {int: ["0", "1", "2", "3", "4", "8"], float: ["0", "0.5", "0.9", "1", "2"],
             str: ["none", "embedding+mlp", "attention", "head"]}  # of --smear, the only one
    fixed = {"compile", "compile_mode", "device", "model", "input_bin", "input_val_bin", "output_dir", "log_wandb",
             "wandb_project", "resume", "init_from", "dry_run", "num_iterations", "vocab_size", "memory_gib"}

    def flag(field):
        choices = field.metadata["choices"]
        choices = choices() if callable(choices) else choices
        if field.type is bool:
            return st.sampled_from([[f"--{field.name}"], [f"--no_{field.name}"]])
        return st.tuples(st.just(f"--{field.name}"), st.sampled_from(choices or small[field.type]))

    @fuzz("runs", flags=st.lists(st.one_of(*(flag(f) for _, f in all_fields() if f.name not in fixed)), max_size=4))
    def one(flags):
        with scratch() as folder:
            run_script("runs", folder, *TINY, *data_flags(run.data), "--num_iterations", 2, "--output_dir",
                       folder / "logs", *itertools.chain(*flags))

    one()


# Environment

ODD = st.one_of(st.none(), st.sampled_from(["", " ", "0", "1", "2", "-1", "00", " 1", "1_0", "1.5", "1e3", "0x1", "abc",
                                            "٣", "²", "１", "9" * 20, "9" * 5000, "nan", "a\nb", "\udcff"]), TYPED)


def test_environment(run, monkeypatch):
    """None of these starts a process group: an address comes without a port that there is."""
    start = script.dist.init_process_group

    def refuse(*args, **settings):
        assert os.environ.get("MASTER_PORT") in (None, "", "abc", "99999")
        return start(*args, **settings)

    monkeypatch.setattr(script.dist, "init_process_group", refuse)

    @fuzz("environment", rank=ODD, local_rank=ODD, size=ODD, address=st.one_of(st.none(), st.none(), ODD),
          port=st.sampled_from([None, "", "abc", "99999"]), dry=st.booleans())
    @example(rank="0", local_rank="0", size="2", address="localhost", port=None, dry=False)
    @example(rank="1", local_rank=None, size=None, address=None, port=None, dry=False)
    @example(rank="²", local_rank=None, size=None, address=None, port=None, dry=False)
    def one(rank, local_rank, size, address, port, dry):
        given_values = dict(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=size, MASTER_ADDR=address, MASTER_PORT=port)
        with pytest.MonkeyPatch.context() as patch, scratch() as folder:
            for name, value in given_values.items():
                if value is not None:
                    patch.setenv(name, value)
            try:
                valid_rank = script.torchrun_place()[0]
            except script.ConfigError:
                valid_rank = 0
            TRIED["environment"] += 1
            outcome = call(script.main, *TINY, *data_flags(run.data), "--output_dir", folder / "logs",
                           *ONE_STEP, *["--dry_run"] * dry)
            spoken_by_rank_0 = valid_rank > 0 and outcome.code == 2 and not outcome.err
            assert spoken_by_rank_0 or orderly(outcome), outcome

    one()


def test_enough_inputs():
    """The counts are those of the tests that this process ran."""
    assert sum(LEAST.values()) >= 2000
    print(f"\n{sum(TRIED.values())} inputs tried:", dict(TRIED))
