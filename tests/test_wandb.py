"""Weights & Biases without its network: the file that an offline run leaves is read back."""
import base64
import hashlib
import itertools
import json
import struct
import sys
import threading
import types

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

import train_gpt2_mod as script
from launch import checkpoints, column, records, snapshot, steps, validations

BLOCK, FIRST_HEADER, HEADER = 2**15, 7, 7  # bytes: of a block, of the file's own header, of a record's


@pytest.fixture
def trainer(trainer, tmp_path, monkeypatch):
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb's own"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return trainer


def read_wandb(path):
    """The records of a .wandb file. Its layout is LevelDB's log (github.com/google/leveldb, doc/log_format.md) behind
    a header: in blocks, pieces of checksum, length, kind (1 whole, 2 first, 3 middle, 4 last) and data."""
    data, position, joined, found = path.read_bytes(), FIRST_HEADER, b"", []
    assert data.startswith(b":W&B")
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # no room for a header: zeros up to the next block
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        joined += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(joined))
            joined = b""
    return found


def history(found):
    """W&B's step -> the values logged for it."""
    rows = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.setdefault(values["_step"], {}).update(values)
    return rows


def test_what_a_run_logs(trainer):
    folder = trainer.run("--log_wandb", "--mtp_enabled", "--wandb_project", "some-project").folder
    path, = folder.rglob("*.wandb")
    found = read_wandb(path)
    rows = history(found)
    assert list(rows) == [64, 128, 192, 256, 320, 384]  # cumulative tokens
    for record in steps(folder):
        row = rows[record["tokens"]]
        for name in ("train_loss", "lr", "grad_norm", "mtp_weight", "time", "peak_mem_MB", "tokens_per_second"):
            assert row[name] == pytest.approx(record[name]), name
        assert record["mfu"] is None and "mfu" not in row  # what is not known is not there
    assert len(validations(folder)) == 2
    for record in validations(folder):
        row = rows[record["tokens"]]
        for name in ("val_loss", "val_ntp_loss", "val_mtp_loss", "mtp_weight", "time"):
            assert row[name] == pytest.approx(record[name]), name
    last = rows[384]
    assert last["precision"] == "fp32" and last["peak_memory_mb"] >= steps(folder)[-1]["peak_mem_MB"]
    assert last["kv_sharing_ratio"] == 1 and last["embd_scale_factor"] == 0.25

    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_id, run.display_name) == ("some-project", folder.name, folder.name)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["n_embd"] == 32 and config["mtp_enabled"] is True and config["num_iterations"] == 6
    exits = [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]
    assert exits == [0]


def run_record(folder):
    """What the first of a folder's runs says of itself."""
    path = min(folder.rglob("*.wandb"))
    return next(record.run for record in read_wandb(path) if record.WhichOneof("record_type") == "run")


def test_seeds_share_a_group_and_nothing_else_does(trainer):
    runs = [run_record(trainer.run("--log_wandb", *flags).folder) for flags in (
        ("--seed", 1), ("--seed", 2, "--wandb_name", "second"), ("--seed", 1, "--learning_rate", 1e-3),
        ("--wandb_group", "mine"))]
    first, second, other, named = [run.run_group for run in runs]
    assert first == second != other and first.startswith("tiny-") and named == "mine"
    assert runs[1].display_name == "second" and runs[0].display_name == runs[0].run_id != runs[1].run_id


def test_the_last_checkpoint_is_handed_over_on_request(trainer):
    folder = trainer.run("--log_wandb", "--wandb_checkpoint").folder
    path, = folder.rglob("*.wandb")
    artifact, = [record.request.log_artifact.artifact if record.WhichOneof("record_type") == "request" else
                 record.artifact for record in read_wandb(path) if record.WhichOneof("record_type") == "artifact" or
                 (record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"))]
    assert (artifact.name, artifact.type, {*artifact.aliases}) == (folder.name, "model", {"latest", "step000006"})
    entry, = artifact.manifest.contents
    assert entry.path == "step000006.pt" and entry.size == (folder / "step000006.pt").stat().st_size
    assert entry.digest == base64.b64encode(hashlib.md5((folder / "step000006.pt").read_bytes()).digest()).decode()
    plain = trainer.run("--log_wandb").folder
    assert not [record for record in read_wandb(min(plain.rglob("*.wandb")))
                if record.WhichOneof("record_type") == "artifact"]


def test_a_resumed_run_goes_on_in_the_same(trainer):
    first = trainer.run("--log_wandb", "--num_iterations", 6, "--save_every", 3)
    (first.folder / "step000006.pt").unlink()
    again = trainer.main(*trainer.flags("--log_wandb", "--resume", first.folder / "step000003.pt"))
    assert again.code == 0 and again.folder is None
    before, after = sorted(first.folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    one, other = (next(r.run for r in read_wandb(path) if r.WhichOneof("record_type") == "run")
                  for path in (before, after))
    assert one.run_id == other.run_id == first.folder.name and one.run_group == other.run_group
    rows = history(read_wandb(after))  # the validation of the step that was saved, and the steps that were done again
    assert [*rows] == [192, 256, 320, 384] and "val_loss" in rows[192] and "train_loss" not in rows[192]
    assert rows[384]["train_loss"] == history(read_wandb(before))[384]["train_loss"]


def test_what_a_rollback_does_again_is_there_too(trainer, monkeypatch):
    """W&B takes no step below its last one, so its steps rise and the charts are against tokens."""
    plain, calls = script.GPT.loss, itertools.count(1)

    def loss(self, *values):
        found = plain(self, *values)
        return found * float("nan") if self.training and next(calls) in (5, 6) else found

    monkeypatch.setattr(script.GPT, "loss", loss)
    folder = trainer.run("--log_wandb", "--num_iterations", 8, "--nan_policy", "rollback", "--nan_limit", 2,
                         "--save_every", 4).folder
    found = read_wandb(next(folder.rglob("*.wandb")))
    rows = history(found)
    assert [*rows] == [64, 128, 192, 256, 320, 384, 385, 386, 448, 512]
    assert [row["tokens"] for row in rows.values()] == [64, 128, 192, 256, 320, 384, 320, 384, 448, 512]
    last = {row["tokens"]: row for row in rows.values()}
    assert column(steps(folder), "step") == list(range(1, 9)) and column(validations(folder), "step") == [3, 6, 8]
    for record in records(folder):
        values = {name: value for name, value in record.items() if value is not None}
        assert values.items() <= last[record["tokens"]].items() | dict(step=record["step"], time=record["time"]).items()
    metric, = [record.metric for record in found if record.WhichOneof("record_type") == "metric" and
               record.metric.glob_name]
    assert (metric.glob_name, metric.step_metric) == ("*", "tokens")


def test_a_resume_online_goes_on_behind_the_last_step(tmp_path):
    """From a checkpoint before what was logged: W&B says where its steps go on."""
    asked = []
    online = types.SimpleNamespace(starting_step=513, log=lambda values, step: asked.append((values["tokens"], step)))
    log = script.RunLog(tmp_path, None, 10, online)
    for step in (4, 5, 5, 9):
        log.record(dict(step=step, tokens=64 * step, skipped=True), 9)
    assert asked == [(256, 514), (320, 515), (320, 515), (576, 576)]


@pytest.mark.parametrize("flags, said", [
    (("--wandb_name", "a"), "wandb_name=a would be ignored; add --log_wandb"),
    (("--wandb_group", "a"), "wandb_group=a would be ignored; add --log_wandb"),
    (("--wandb_checkpoint",), "wandb_checkpoint=True would be ignored; add --log_wandb"),
    (("--log_wandb", "--wandb_checkpoint", "--no_save_checkpoints"),
     "wandb_checkpoint has nothing to hand over; drop --no_save_checkpoints"),
])
def test_what_would_be_ignored_is_refused(trainer, flags, said):
    result = trainer.main(*trainer.flags(*flags))
    assert (result.code, result.err) == (2, f"error: {said}\n")


def test_nothing_without_the_flag(trainer):
    folder = trainer.run().folder
    assert not list(folder.parent.parent.rglob("*.wandb"))


def test_without_the_package(trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = snapshot(trainer.output.parent)
    result = trainer.main(*trainer.flags("--log_wandb"))
    assert result.code == 2
    assert result.err == "error: log_wandb needs the package wandb; pip install wandb, or drop --log_wandb\n"
    assert snapshot(trainer.output.parent) == before


def fail_online(monkeypatch, error):
    """Have W&B start offline only; gives the modes that were tried."""
    init, modes = wandb.init, []

    def start(mode=None, **settings):
        modes.append(mode)
        if mode != "offline":
            raise error
        return init(mode=mode, **settings)

    monkeypatch.setattr(wandb, "init", start)
    return modes


@pytest.mark.parametrize("error, said", [
    (wandb.errors.CommError("Run initialization has timed out\nafter 60 s"), "Run initialization has timed out"),
    (ConnectionRefusedError(111, "Connection refused"), "[Errno 111] Connection refused"),
    (TimeoutError(), "TimeoutError"),
])
def test_without_its_network_records_stay_on_the_disk(trainer, monkeypatch, error, said):
    modes = fail_online(monkeypatch, error)
    result = trainer.run("--log_wandb")
    assert modes == [None, "offline"]
    note = f"W&B cannot be reached ({said}): its records stay in {result.folder}/wandb; `wandb sync` sends them\n"
    assert result.out.count(note) == 1 and note in (result.folder / f"{result.folder.name}.log").read_text()
    path, = (result.folder / "wandb").rglob("*.wandb")
    rows = history(read_wandb(path))
    assert [rows[64 * step]["train_loss"] for step in range(1, 7)] == column(steps(result.folder), "train_loss")


@pytest.mark.parametrize("error", [
    wandb.Error("api_key not configured\nmore"), wandb.errors.AuthenticationError("api_key not configured"),
    wandb.errors.UsageError("api_key not configured"), ValueError("api_key not configured"),
])
def test_a_wandb_that_does_not_start_is_one_line(trainer, monkeypatch, error):
    modes = fail_online(monkeypatch, error)
    result = trainer.main(*trainer.flags("--log_wandb"))
    assert result.code == 2 and len(result.err.splitlines()) == 1 and modes == [None]
    assert result.err.startswith("error: log_wandb: W&B does not start (api_key not configured); set WANDB_MODE=off")
    assert not list(result.folder.glob("metrics.jsonl"))


@pytest.mark.parametrize("message", ["the pipe is broken\nin a second line", ""])
def test_a_wandb_that_fails_on_the_way_ends_nothing_and_is_said_once(trainer, monkeypatch, message):
    plain, calls = trainer.run().folder, []

    def log(self, values, step=None):
        calls.append(step)
        if len(calls) >= 3:
            raise BrokenPipeError(message)

    monkeypatch.setattr(wandb.Run, "log", log)
    result = trainer.run("--log_wandb")
    assert calls == [64, 128, 192]
    said, = [line for line in result.out.splitlines() if line.startswith("W&B failed (")]
    assert f"({message.splitlines()[0] if message else 'BrokenPipeError'}): training goes on without" in said
    assert column(records(result.folder), "step") == column(records(plain), "step")
    assert column(steps(result.folder), "train_loss") == column(steps(plain), "train_loss")
    assert checkpoints(result.folder) == checkpoints(plain)


def test_a_wandb_that_does_not_end_is_left_alone(trainer, monkeypatch):
    monkeypatch.setattr(script, "WANDB_PATIENCE", 0.1)
    finish, allowed, done = wandb.Run.finish, threading.Event(), threading.Event()

    def late(self, *args, **kwargs):
        allowed.wait(60)
        finish(self, *args, **kwargs)
        done.set()

    monkeypatch.setattr(wandb.Run, "finish", late)
    result = trainer.run("--log_wandb")
    allowed.set()
    line = f"W&B has not taken everything in 0.1 s; `wandb sync {result.folder}/wandb/run-*` sends the rest"
    assert line in result.out.splitlines()
    assert done.wait(60)
