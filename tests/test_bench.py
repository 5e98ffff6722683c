"""tools/bench.py: real runs of tiny networks. The figures follow from one another and from what ran, however fast."""
import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch

import train_gpt2_mod as script
from launch import ROOT, SCRIPT, one_process, some_tokens, steps, write_data, write_shard

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import bench  # noqa: E402
from shards import DataError, sha256_of  # noqa: E402

TINY = ("--n_layer 1 --n_head 2 --n_embd 16 --batch_size 2 --sequence_length 16 --num_iterations 3 --val_tokens 70 "
        "--device cpu --no_compile").split()
VOCABULARY = ["--vocab_size", "300"]
ONCE = ["--warmup", "1", "--steps", "1", "--windows", "1"]
WARMUP, STEPS, WINDOWS = 3, 2, 4

# Appended to a copy of the script: each step and validation leaves a line in NAME.log beside it. WAY is how it ends.
DIARY = """
import time as _time, pathlib as _pathlib, os as _os
_step, _evaluate, _file = train_step, evaluate, _pathlib.Path(__file__)

def _note(kind, begin, **more):
    with open(_file.with_suffix(".log"), "a") as file:
        print(json.dumps(dict(who=_file.stem, kind=kind, begin=begin, end=_time.monotonic(), pid=_os.getpid(), **more)),
              file=file)

def train_step(model, state, scheduled, *rest):
    begin = _time.monotonic()
    WAY
    result = _step(model, state, scheduled, *rest)
    _note("step", begin, loss=float(result[0][0]), loader=type(state.loader).__name__, lr=scheduled.lr,
          shards=getattr(state.loader, "shards", None) and state.loader.shards.files)
    return result

def evaluate(model, shards, *rest):
    begin = _time.monotonic()
    result = _evaluate(model, shards, *rest)
    _note("validation", begin, targets=result["val_targets"], shards=shards.files)
    return result

World.peak_flops = lambda self: 1e9
print("a library talks on stdout")
"""


def write_copy(folder, name, way="pass"):
    """A copy of the script that keeps a diary."""
    folder.mkdir(exist_ok=True)
    text = SCRIPT.read_text().split('\nif __name__ == "__main__"')[0]
    path = folder / f"{name}.py"
    path.write_text(text + DIARY.replace("WAY", way))
    return path


def diary(*copies):
    """What was noted in all the copies' diaries, in order of time."""
    lines = [line for path in copies for line in path.with_suffix(".log").read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda entry: entry["begin"])


def kinds_of(entries):
    """The loaders of steps, and "validation"."""
    return [entry.get("loader", entry["kind"]).replace("DistributedDataLoader", "real") for entry in entries]


def runs_of(items):
    """[(item, how many in a row)]"""
    found = []
    for item in items:
        found[-1:] = [(item, found[-1][1] + 1)] if found and found[-1][0] == item else [*found[-1:], (item, 1)]
    return found


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(autouse=True)
def one_process_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty temporary folder and an empty working folder, in which nothing may be left."""
    found = [tmp_path / "temporary", tmp_path / "working"]
    for folder in found:
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found[0]))
    monkeypatch.setenv("TMPDIR", str(found[0]))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # which importing torch's compiler makes
    monkeypatch.chdir(found[1])
    yield found
    assert [list(folder.rglob("*")) for folder in found] == [[], []]


@pytest.fixture
def call(places, capsys):
    """call(words) is (exit code, stdout, stderr)."""
    def main(*words):
        code = bench.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return main


def refused(outcome, *parts):
    code, _, err = outcome
    return code == 2 and err.startswith("error: ") and err.count("\n") == 1 and all(part in err for part in parts)


# ----------------------------------------------------------------------------------------------------------------------
# Measurements


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two command lines with everything that can be asked for: stdout, records, both diaries' entries, the copies."""
    folder = tmp_path_factory.mktemp("pair") / "scripts"
    copies = [write_copy(folder, name) for name in "AB"]
    lines = [f"--script {copies[0]}", f"--script {copies[1]} --model d12_mqa --grad_accum_steps 2"]
    settings = ["--warmup", WARMUP, "--steps", STEPS, "--windows", WINDOWS, "--data_share", "--validation"]
    done = one_process(sys.executable, ROOT / "tools" / "bench.py", *lines, "--json", folder / "found.jsonl", "--",
                       *settings, *TINY, *VOCABULARY, cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done
    assert {path.name for path in folder.iterdir()} == {"A.py", "A.log", "B.py", "B.log", "found.jsonl"}
    records = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
    return types.SimpleNamespace(out=done.stdout, records=records, diary=diary(*copies), copies=copies, lines=lines)


def test_workers_take_turns_and_one_computes_at_a_time(pair):
    order = runs_of([(entry["who"], kind) for entry, kind in zip(pair.diary, kinds_of(pair.diary))])
    turn = [((who, kind), STEPS + 1) for kind in ("real", "SimpleNamespace") for who in "AB"]
    validated = [((who, "validation"), 1 + bench.VALIDATIONS) for who in "AB"]
    assert order == [(("A", "real"), WARMUP), (("B", "real"), WARMUP), *WINDOWS * turn, *validated]
    assert all(before["end"] <= after["begin"] for before, after in zip(pair.diary, pair.diary[1:]))
    assert len({entry["pid"] for entry in pair.diary}) == 2


def test_figures_follow_from_the_windows(pair):
    first, second = pair.records
    for record, tokens in ((first, 32), (second, 64)):
        ms = record["windows_ms"]
        assert len(ms) == WINDOWS and min(ms) > 0 and record["step_ms"] == statistics.median(ms)
        assert record["tokens_per_step"] == tokens
        assert record["tokens_per_second"] == pytest.approx(tokens / record["step_ms"] * 1000)
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * record["flops_per_token"] / 1e9)
        assert record["data_share"] == pytest.approx(1 - record["resident_ms"] / record["step_ms"])
        assert record["peak_mem_MB"] > 100 and record["first_step_s"] > 0 and record["val_tokens_per_second"] > 0
    assert first["ratio"] == 1 and first["ratio_range"] == [1, 1]
    pairs = [2 * before / after for before, after in zip(first["windows_ms"], second["windows_ms"])]
    assert second["ratio"] == pytest.approx(second["tokens_per_second"] / first["tokens_per_second"])
    assert second["ratio_range"] == pytest.approx([min(pairs), max(pairs)])


def test_a_windows_time_is_that_of_its_steps(pair):
    """By the diary, on the same clock: from when the untimed step is done, at the earliest, to what is done next."""
    for who, record in zip("AB", pair.records):
        real = [i for i, e in enumerate(pair.diary) if (e["who"], e.get("loader")) == (who, "DistributedDataLoader")]
        assert record["first_step_s"] >= pair.diary[real[0]]["end"] - pair.diary[real[0]]["begin"]
        for i, ms in enumerate(record["windows_ms"]):
            untimed, *timed = real[WARMUP + i * (STEPS + 1) :][: STEPS + 1]
            seconds = ms * STEPS / 1000
            assert seconds >= pair.diary[timed[-1]]["end"] - pair.diary[timed[0]]["begin"]
            assert seconds <= pair.diary[timed[-1] + 1]["begin"] - pair.diary[untimed]["end"]


def test_the_last_loss_is_that_of_the_last_step_on_real_batches(pair):
    for who, record in zip("AB", pair.records):
        real = [e for e in pair.diary if e["who"] == who and e.get("loader") == "DistributedDataLoader"]
        assert record["loss"] == real[-1]["loss"] and 4 < record["loss"] < 7


def test_steps_past_the_runs_end_go_on_with_its_last(pair):
    """--num_iterations is 3 here, and more steps are taken."""
    assert len([e for e in pair.diary if e["who"] == "A" and e["kind"] == "step"]) > 3
    assert all(e["lr"] > 0 for e in pair.diary if e["kind"] == "step")


def test_a_record_says_what_was_measured(pair):
    assert {"flags", "script_sha256", "commit", "gpu", "torch", "date", "tokens_per_step", "windows_ms", "step_ms",
            "tokens_per_second", "mfu", "peak_mem_MB", "first_step_s", "val_tokens_per_second", "data_share", "loss",
            "ratio"} <= pair.records[0].keys() == pair.records[1].keys()
    for record, copy, own, model in zip(pair.records, pair.copies, ([], ["--model", "d12_mqa"]), ("d12", "d12_mqa")):
        assert record["script_sha256"] == sha256_of(copy) and record["commit"] is None
        typed = shlex.split(record["flags"])
        assert typed[: len(TINY + VOCABULARY + own)] == TINY + VOCABULARY + own
        config, run, _ = script.resolve(script.parse_flags(typed), script.ANY_MACHINE)
        with torch.device("meta"):
            network = script.GPT(config)
        assert (record["model"], record["parameters"]) == (model, network.parameter_count())
        assert record["tokens_per_step"] == run.tokens_per_step and record["batch_size"] == 2
        assert record["flops_per_token"] == network.flops_per_token(16) and record["precision"] == "fp32"
        assert (record["warmup"], record["steps"], record["memory_gib"]) == (WARMUP, STEPS, None)
        assert record["torch"] == torch.__version__ and record["gpu"].startswith("CPU")
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
        assert any(note.startswith("attention kernel: ") for note in record["notes"])


def test_the_table_is_aligned_and_says_what_the_records_say(pair):
    lines = pair.out.splitlines()
    assert lines[0].startswith("CPU") and f"torch {torch.__version__}" in lines[0]
    for i, line in enumerate(pair.lines, 1):
        assert f"{i}: {line} {shlex.join(TINY + VOCABULARY)}" in lines
    head, *rows = lines[-3:]
    assert len({len(line) for line in (head, *rows)}) == 1
    titles = ["step ms", "tokens/s", "MFU", "peak MiB", "first step s", "last loss", "validation tokens/s",
              "data share (ms with and without)", "ratio to 1"]
    assert re.split(r"  +", head.strip()) == titles
    for i, (row, r) in enumerate(zip(rows, pair.records), 1):
        ms, (low, high) = r["windows_ms"], r["ratio_range"]
        assert re.split(r"  +", row.strip()) == [
            str(i), f"{r['step_ms']:,.2f} ({min(ms):,.2f} - {max(ms):,.2f})", f"{r['tokens_per_second']:,.0f}",
            f"{100 * r['mfu']:.1f}%", f"{r['peak_mem_MB']:,}", f"{r['first_step_s']:.1f}", f"{r['loss']:.4f}",
            f"{r['val_tokens_per_second']:,.0f}",
            f"{100 * r['data_share']:.1f}% ({r['step_ms']:,.2f}, {r['resident_ms']:,.2f})",
            f"{r['ratio']:.3f} ({low:.3f} - {high:.3f})"]


def test_data_are_random_tokens_in_a_folder_that_goes(pair):
    files = {path for entry in pair.diary for path in entry["shards"] or []}
    assert sorted(Path(path).name for path in files) == 2 * ["input_bin.bin"] + 2 * ["input_val_bin.bin"]
    assert not [path for path in files if Path(path).parent.parent.exists()]
    assert {entry["targets"] for entry in pair.diary if entry["kind"] == "validation"} == {70}


def test_command_lines_that_compile_at_once(call, tmp_path):
    """The first two of three begin together, the third when the first is done; of none is the first step timed."""
    file = tmp_path / "found.jsonl"
    models = ["d12", "d12_gqa", "d12_mqa"]
    code, out, err = call(*(f"--model {model}" for model in models), "--builds", 2, "--json", file, "--", *TINY,
                          *VOCABULARY, *ONCE)
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["model"] for record in records] == models
    assert [record["first_step_s"] for record in records] == [None] * 3 and min(r["step_ms"] for r in records) > 0
    assert all(" n/a " in line for line in out.splitlines()[-3:])


def test_one_command_line(call, tmp_path):
    """Of the script that lies here; its record is appended to the file."""
    file = tmp_path / "found.jsonl"
    file.write_text("{}\n")
    code, out, err = call(*TINY, "--model", "d12_gqa", "--n_kv_head=1", *VOCABULARY, *ONCE, "--json", file)
    assert (code, err) == (0, "")
    assert re.split(r"  +", out.splitlines()[-2].strip()) == ["step ms", "tokens/s", "MFU", "peak MiB", "first step s",
                                                              "last loss"]
    before, record = map(json.loads, file.read_text().splitlines())
    assert before == {} and record["model"] == "d12_gqa" and record["script_sha256"] == sha256_of(SCRIPT)
    assert {record[name] for name in ("val_tokens_per_second", "data_share", "resident_ms", "mfu")} == {None}
    assert record["ratio"] == 1
    assert " n/a " in out.splitlines()[-1]
    assert script.parse_flags(shlex.split(record["flags"])) == script.parse_flags(
        [*TINY, "--model", "d12_gqa", "--n_kv_head=1", *VOCABULARY])


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(flags) is a worker's Run in this process; settings change its order."""
    monkeypatch.setitem(sys.modules, bench.MODULE, script)  # to be put back
    with contextlib.ExitStack() as stack:
        def make(*flags, **settings):
            order = dict(script=str(SCRIPT), flags=[*TINY, *map(str, flags)], warmup=1, steps=1, windows=1,
                         data_share=False, memory_gib=None, folder=str(tmp_path))
            return bench.Run(types.SimpleNamespace(**{**order, **settings}), stack)

        yield make


def test_shards_that_are_named(run_of, tmp_path):
    """Training and validation take them, and their vocabulary is the network's; one of the two is made if it must."""
    data = write_data(tmp_path / "data")
    names = ["--input_bin", data / "train_*.bin", "--input_val_bin", data / "val_*.bin"]
    run = run_of(*names)
    facts = run.build()
    assert [Path(path).name for path in run.state.loader.shards.files] == ["train_000.bin", "train_001.bin"]
    assert run.val_shards.files == [str(data / "val_000.bin")] and run.config.vocab_size == 257
    assert not [note for note in facts["notes"] if "random" in note] and not list(tmp_path.glob("*.bin"))
    run = run_of(*names[:2])
    facts = run.build()
    assert "input_val_bin: random tokens" in facts["notes"] and "input_bin: random tokens" not in facts["notes"]
    assert run.val_shards.files == [str(tmp_path / "input_val_bin.bin")] and run.val_shards.vocab_size == 257


def test_random_tokens_are_of_the_vocabulary_and_as_many_as_needed(run_of, monkeypatch):
    for most, tokens in ((2**26, (2 + 4 * 4) * 32), (40, 40), (5, 32)):
        monkeypatch.setattr(bench, "MOST_TOKENS", most)
        run = run_of(*VOCABULARY, "--mtp_enabled", warmup=2, steps=3, windows=4)
        shards, val_shards = (script.TokenShards(run.typed[name]) for name in ("input_bin", "input_val_bin"))
        lookahead = script.resolve(run.typed, script.ANY_MACHINE)[0].lookahead
        assert shards.vocab_size == val_shards.vocab_size == 300 and lookahead > 1
        assert shards.total == tokens + lookahead and val_shards.total == 1 + min(70, most)
        assert shards.read(0, shards.total).max() < 300 and len(set(shards.read(0, shards.total))) > 20


def test_the_run_is_the_one_that_is_trained(run_of, tmp_path, capsys):
    """Its losses are those of the script itself on the same shards: through the warm-up, and the untimed step."""
    run = run_of(*VOCABULARY, "--learning_rate", "0.01", warmup=2, steps=3)
    run.build()
    losses = [float(run.numbers[0]), run.window()["loss"]]
    shards = [word for name in ("input_bin", "input_val_bin") for word in (f"--{name}", run.typed[name])]
    flags = [*TINY, *shards, "--learning_rate", "0.01", "--num_iterations", "6", "--output_dir", str(tmp_path / "logs")]
    assert script.main([*flags, "--no_save_checkpoints"]) == 0
    folder, = (tmp_path / "logs").iterdir()
    assert losses == [record["train_loss"] for record in steps(folder)][1::4]


@pytest.mark.parametrize("flags, part", [
    (["--resume", "auto"], "--resume would be ignored"), (["--dry_run"], "--dry_run would be ignored"),
    (["--init_from", "x.pt"], "--init_from would be ignored"), (["--n_layer", "0"], "n_layer=0 must be at least 1"),
    (["--input_bin", "no_such_*.bin"], "no file matches 'no_such_*.bin'"),
    (["--vocab_size", "70000"], "vocab_size=70000 must be at most 65536"),
])
def test_what_is_refused_before_anything_runs(run_of, flags, part):
    with pytest.raises(ValueError) as refusal:
        run_of(*flags)
    assert part in bench.complaint(refusal.value) and "Error" not in bench.complaint(refusal.value)


def test_torchrun_is_refused(run_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="measured in one process; start bench.py without torchrun"):
        run_of(*VOCABULARY)


def test_a_validation_without_shards_is_refused(run_of):
    run = run_of(*VOCABULARY, "--input_val_bin", "")
    run.build()
    with pytest.raises(DataError, match="input_val_bin is empty, and --validation needs it"):
        run.validation()


def test_other_errors_are_told_by_name():
    assert bench.complaint(KeyError("a bug")) == "KeyError: 'a bug'"
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")
    assert bench.complaint(full).startswith("OutOfMemoryError: CUDA out of memory. Tried to; lower --batch_size")


def test_memory_is_limited_on_a_gpu(monkeypatch):
    said = []
    properties = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", said.append)
    bench.limit_memory(16, torch.device("cuda", 0))
    assert said == [0.2]
    with pytest.raises(DataError, match="memory_gib=81 must be at most what the device has, 80.0"):
        bench.limit_memory(81, torch.device("cuda", 0))
    assert said == [0.2]


def test_a_loss_that_is_no_number_shows():
    order = dict(flags=[], sha256="", commit=None, warmup=1, steps=1, memory_gib=None, folder="")
    worker = bench.Worker("", **order)
    worker.facts = dict(tokens_per_step=8, peak_flops=None, flops_per_token=1, first_step_s=1.0)
    worker.windows = [dict(ms=2.0, loss=float("nan"), peak=3, infinite=2)]
    record = bench.figures(worker, None)
    assert record["loss"] is None and record["infinite_gradients"] == 2
    assert bench.table([record]).split()[-2:] == ["finite", "2"]


def test_the_commit_is_told_only_of_a_file_that_is_as_committed(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    path = tmp_path / "a.py"
    path.write_text("1\n")
    assert bench.commit_of(path) is None
    git("init", "--quiet")
    assert bench.commit_of(path) is None
    git("add", "a.py")
    git("commit", "--quiet", "-m", "one")
    assert bench.commit_of(path) == git("rev-parse", "HEAD").strip()
    beside = path.with_name("beside.py")
    assert bench.commit_of(path, beside) == bench.commit_of(path)
    beside.write_text("x")
    assert bench.commit_of(path, beside) is None
    path.write_text("2\n")
    assert bench.commit_of(path) is None


# ----------------------------------------------------------------------------------------------------------------------
# Command lines


def read(*words):
    args, lines = bench.read_arguments(words)
    return args, [(path.name, shlex.join(flags)) for _, path, flags in lines]


def test_command_lines_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old script.py").touch()
    args, lines = read("--steps", "3", "--model", "d12", "--window", "8")
    assert (args.steps, lines) == (3, [("train_gpt2_mod.py", "--model d12 --window 8")])
    args, lines = read("--model d12", "--steps=3", "", "--script 'old script.py' --qk_norm",
                       "--", "--json", "x", "--seed", "1")
    assert (args.steps, args.json) == (3, "x")
    assert lines == [("train_gpt2_mod.py", "--seed 1 --model d12"), ("train_gpt2_mod.py", "--seed 1"),
                     ("old script.py", "--seed 1 --qk_norm")]
    assert read("--windows", "2", "--", "--model", "d12")[1] == [("train_gpt2_mod.py", "--model d12")]
    assert read()[1] == [("train_gpt2_mod.py", "")]


def test_no_flag_is_both_the_tools_and_the_scripts():
    mine, theirs = (set(parser._option_string_actions) for parser in (bench.make_parser(), script.make_parser()))
    assert mine & theirs == {"-h", "--help", "--memory_gib"} and "--windows" in mine  # which mean the same


@pytest.mark.parametrize("words, parts", [
    (["--steps", "0"], ["steps=0 must be at least 1"]), (["--warmup", "0"], ["warmup=0"]),
    (["--", "--windows", "-1"], ["windows=-1"]), (["--windows", "x"], ["--windows", "--help"]),
    (["--builds", "0"], ["builds=0 must be at least 1"]),
    (["--memory_gib", "0"], ["memory_gib=0.0 must be above 0"]), (["--memory_gib", "nan"], ["memory_gib=nan"]),
    (["--script", "no/such.py"], ["script=no/such.py is no such file"]),
    (["--json", "no/such/file"], ["json=no/such/file", "name one"]), (["--json", "/"], ["json=/", "name one"]),
    (["--profile"], ["--profile would be ignored", "drop it"]),
    (["--qk_norm --steps 4", "--"], ['"--qk_norm --steps 4"', "only --script stands in quotes"]),
    (['--model "d12', "--"], ["quotation"]),
    (["--model", "d12", "--"], ["d12 is no command line", "in quotes"]),
])
def test_the_tools_own_flags_are_refused_in_one_line(call, words, parts):
    outcome = call(*words)
    assert refused(outcome, *parts) and outcome[1] == ""


@pytest.mark.parametrize("words, parts", [
    (["--n_layr 2", "--", *TINY], [f'"--n_layr 2 {shlex.join(TINY)}": --n_layr is not a flag; did you mean --n_layer']),
    (["--memory_gib", "4", *TINY], ["memory_gib=4 can be held only on a CUDA device", "cpu"]),
])
def test_what_a_worker_refuses_at_once_is_all_that_is_said(call, words, parts):
    outcome = call(*words)
    assert refused(outcome, *parts) and outcome[1] == ""


def test_a_script_that_ends_the_process_is_named(call, tmp_path):
    path = tmp_path / "other.py"
    path.write_text("import os\nos.write(2, b'first\\nlast words\\n')\nos._exit(7)\n")
    assert refused(call("--script", path, *TINY), "its process is gone (exit code 7: last words)", shlex.join(TINY))


def test_what_a_worker_refuses_later_is_passed_on_with_its_command_line(call, tmp_path):
    shard = write_shard(tmp_path / "few.bin", some_tokens(20, 1))
    outcome = call(f"--input_bin {shard}", "--", *TINY, *ONCE)
    assert refused(outcome, f'"--input_bin {shard} {shlex.join(TINY)}": a step of 32 tokens', "lower --batch_size")


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_measurement(call, tmp_path):
    """In its second window, when both have run."""
    folder = tmp_path / "scripts"
    copies = [write_copy(folder, "A"), write_copy(folder, "B", "if state.step == 3: _os.kill(_os.getpid(), 9)")]
    outcome = call(*(f"--script {copy}" for copy in copies), "--", *TINY, *VOCABULARY, *ONCE, "--windows", "2")
    assert refused(outcome, f'"--script {copies[1]} --n_layer', "its process is gone (SIGKILL")
    entries = diary(*copies)
    assert [entry["who"] for entry in entries] == list("ABAABBAA")
    assert not any(exists(entry["pid"]) for entry in entries)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interruption_ends_all_at_once_and_quietly(places, tmp_path, number):
    copies = [write_copy(tmp_path / "scripts", name, "_time.sleep(0.05)") for name in "AB"]
    words = [*(f"--script {copy}" for copy in copies), "--", *TINY, *VOCABULARY, "--warmup", "1", "--steps", "1000"]
    process = subprocess.Popen([sys.executable, ROOT / "tools" / "bench.py", *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("2: "):
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")
    pids = {entry["pid"] for entry in diary(*copies)}
    assert len(pids) == 2 and not any(map(exists, pids))
