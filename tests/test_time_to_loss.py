"""docs/04-time-to-loss: its commands and their tokens, the ladder against the preset, its statistics by another way,
and what is run, with a stand-in for the script."""
import dataclasses
import importlib.util
import json
import math
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import train_gpt2_mod as script

ROOT = Path(script.__file__).resolve().parent
FOLDER = ROOT / "docs" / "04-time-to-loss"
spec = importlib.util.spec_from_file_location("measure_04", FOLDER / "measure.py")
fast = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fast)
expected_seconds = fast.measuring.expected_seconds

NAMES = [*fast.SWEEPS, *fast.FULL, *fast.LADDER, *fast.TRIED, "first", "speed"]
EVERY = fast.runs(NAMES, 1)
TOKENS = dict(d12=100_007_936, d12_fast=131_072_000, d12_fast_33M=32_768_000, d12_fast_20M=19_660_800,
              d12_fast_in_order=144_179_200, untied_2000=131_072_000, untied_33M=32_768_000,
              shorter_2000=131_072_000, shorter_33M=32_768_000)
TOKENS |= {name: 78_643_200 for name in fast.TRIED if name.startswith("long")}


def resolved(flags):
    return script.resolve(script.parse_flags(flags.split()), script.ANY_MACHINE)[:2]


def without(config, *names):
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in names}


def root(name):
    """What a run that was tried goes back to."""
    return root(fast.TRIED[name][1]) if name in fast.TRIED else name


# ----------------------------------------------------------------------------------------------------------------------
# The runs


@pytest.mark.parametrize("run", [run for run, _ in EVERY], ids=lambda run: f"{run.kind}-{run.name}")
def test_the_commands_resolve(run):
    _, settings = resolved(run.flags)
    batch = 131072 if "131072" in run.name else 32768 if "32768" in run.name else 65536
    assert (settings.tokens_per_step, settings.batch_size) == (batch, min(64, batch // 1024))
    assert settings.sequence_length == 1024 and settings.shuffle != ("in_order" in run.name)
    assert settings.num_iterations == run.steps and not settings.save_checkpoints
    tokens = 60 * 65536 if run.kind == "speed" else TOKENS.get(run.name, 29_753_344)
    assert run.steps * settings.tokens_per_step == run.tokens == tokens
    share = 1 if run.name.endswith("warmdown_1") else 0.6
    assert settings.warmdown_iters == min(round(share * run.steps), run.steps - settings.warmup_iters)  # to its end
    assert settings.min_lr_fraction == (0 if run.name.endswith("floor_0") else 0.1)
    often = run.kind in ("full", "ladder") or root(run.name) in fast.LADDER
    every = 100 if run.name in ("d12", "d12_fast") else 200 if run.name.startswith("long") else 50 if often else 0
    assert settings.val_loss_every == every


def test_each_rung_is_one_change_and_the_last_of_the_preset_is_the_preset():
    rungs = {rung: (before, resolved(run.flags)) for rung, (before, run) in fast.ladder().items()}
    timed = {rung: resolved(run.flags) for rung, run in fast.speeds().items()}
    assert timed.keys() == rungs.keys() == fast.CODE.keys()
    length = ("num_iterations", "warmdown_iters", "val_loss_every")
    for rung, (network, run) in timed.items():
        assert network == rungs[rung][1][0] and without(run, *length) == without(rungs[rung][1][1], *length)
    for rung, (before, found) in rungs.items():
        assert before is None or found != rungs[before][1], rung
    network, run = rungs[list(rungs)[-1]][1]
    preset = resolved(f"--model d12_fast {fast.SHORT} {fast.SHAPE} {fast.RUNG}")
    assert network == preset[0] and without(run, "model") == without(preset[1], "model")
    length = ("num_iterations", "warmdown_iters", "val_loss_every")
    for name in ("untied_2000", "untied_33M"):  # two rungs before the last, longer
        network, run = resolved(fast.FULL[name])
        assert network == rungs["fp8_head"][1][0]
        assert without(run, "model", *length) == without(rungs["fp8_head"][1][1], "model", *length)


def test_what_is_taken_out_is_taken_out():
    """Of each that goes back to the last rungs one field is another, but where two go together; and nothing is tried
    under a rung's name."""
    preset = {name: resolved(run.flags) for name, run in fast.variants().items()}
    pairs = {name: tuple(preset[name][i] for i in (0, 1)) for name in preset}
    changed = {}
    for name, (_, against, _) in fast.TRIED.items():
        assert name not in fast.LADDER and against in pairs
        if against in ("fp8_head", "higher_rates", "simpler", "tied") and not name.startswith("long"):
            changed[name] = {field for mine, other in zip(pairs[name], pairs[against])
                             for field, value in dataclasses.asdict(mine).items() if value != getattr(other, field)}
    assert changed.pop("no_qk_norm") == {"qk_norm", "softmax_scale"}
    assert changed.pop("twice_the_heads_rate") == {"learning_rate"}
    assert changed.pop("twice_the_embeddings_rate") == {"embedding_lr"}
    assert changed.pop("gate_768") == changed.pop("simpler_gate") == {"attention_gate"}
    assert changed.pop("simpler") == {"softmax_scale", "cautious_weight_decay"}
    assert changed.pop("higher_rates") == {"muon_lr", "embedding_lr", "muon_momentum"}
    assert changed.pop("tied_higher_rates") == {"muon_lr", "value_lr", "muon_momentum"}
    assert changed.pop("tied_0.002") == changed.pop("tied_0.008") == {"learning_rate"}
    fields = {"no_relu2": "mlp", "no_softcap": "logit_softcap", "no_momentum_warmup": "momentum_warmup_steps"}
    assert changed == {name: {fields.get(name, name.removeprefix("no_"))} for name in changed} and len(changed) == 10


def test_the_shape_and_the_rates_are_the_presets_own():
    schedule = re.sub(r"--(warmdown_fraction|min_lr_fraction|total_batch_size) \S+", "", fast.SHAPE)
    whole = resolved(f"--model d12_fast {fast.SHAPE}")
    assert schedule != fast.SHAPE and resolved(f"--model d12_fast {schedule}") == whole
    assert resolved(f"--model d12_fast {fast.SHAPE} {fast.NOW}") == whole
    assert resolved(fast.FULL["d12_fast"].replace("--val_loss_every 100", "")) == whole


def test_a_sweep_changes_one_rate():
    for name, (flags, rate, values, _) in fast.SWEEPS.items():
        assert fast.START[flags][rate] in values and len(set(values)) == len(values)
        found = [resolved(run.flags)[1] for _, run in fast.swept(name)]
        assert [getattr(run, rate) for run in found] == [float(value) for value in values] == sorted(map(float, values))
        assert all(without(run, rate) == without(found[0], rate) for run in found)


def test_a_dropped_rung_is_not_in_those_after_it(monkeypatch):
    with_all = {rung: run for rung, (_, run) in fast.ladder().items()}
    monkeypatch.setattr(fast, "DROPPED", ("zero_init", "relu2"))
    rungs = fast.ladder()
    assert [rungs[rung][0] for rung in ("zero_init", "no_attention_scale", "relu2", "x0_lambdas")] == [
        "qk_norm", "qk_norm", "no_attention_scale", "no_attention_scale"]
    assert rungs["qk_norm"][1] == with_all["qk_norm"] and rungs["zero_init"][1] == with_all["zero_init"]
    assert "--zero_init" not in rungs["relu2"][1].flags and "--mlp relu2" in rungs["relu2"][1].flags
    assert resolved(rungs["tied"][1].flags)[0].mlp == "gelu"


def test_the_order_of_the_runs():
    runs = fast.runs(None, 3)
    assert len(runs) == len({(run.flags, seed) for run, seed in runs}) == 166
    assert [run.kind for run, _ in runs[:10]] == ["sweep"] * 10 and {seed for _, seed in runs[:10]} == {1}
    assert {seed for run, seed in runs if run.kind == "tried"} == {1}
    assert [run.kind for run, _ in runs[-19:]] == ["speed"] * 19 and {seed for _, seed in runs[-19:]} == {1}
    assert [seed for _, seed in runs[:-19]] == sorted(seed for _, seed in runs[:-19])
    assert not [run.name for run, _ in runs if "in_order" in run.name]
    assert [(run.name, seed) for run, seed in fast.runs(["adamw", "d12"], 2)] == [
        ("adamw", 1), ("adamw", 2), ("d12", 1), ("d12", 2)]  # as typed
    assert len(fast.runs(["sweep_head"], 3)) == 3 and len(fast.runs(["in_order", "in_order_muon"], 2)) == 3


def test_flags_in_another_order_are_the_same_run():
    assert fast.last_of("--a 1 --no_b --c x --a 2") == dict(a="2", b="no", c="x") == fast.last_of("--c x --a 2 --no_b")
    assert fast.last_of("--b --c 1") == dict(b="", c="1")
    run = fast.Run("full", "any", "--model d12 --seed 3 --shuffle")
    assert run.is_of(dict(flags="--shuffle --model d12 --seed 4 --seed 3"))
    assert not run.is_of(dict(flags="--no_shuffle --model d12 --seed 3")) and not run.is_of(dict(flags="--model d12"))


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


Blocks = fast.measuring.Blocks


def test_two_runs_are_compared_as_pairs():
    draw = np.random.default_rng(1)
    for size in (2, 3, 5, 20):
        a, b = draw.normal(0, 1, (2, size)) + draw.normal(0, 30, size)  # seeds differ by far more than the runs
        expected = scipy.stats.ttest_rel(a, b)
        cells = {(run, seed): loss for run, values in (("a", a), ("b", b)) for seed, loss in enumerate(values)}
        difference, p = Blocks(cells).apart("a", "b")
        assert difference == pytest.approx((a - b).mean(), abs=1e-9) and p == pytest.approx(expected.pvalue, rel=1e-6)
        assert Blocks(cells).apart("b", "a") == (pytest.approx(-difference), pytest.approx(p))


def test_complete_blocks_are_the_textbooks_analysis_of_variance():
    """Mean square of what is left after the means of rows and columns, with (r - 1)(s - 1) degrees of freedom."""
    draw = np.random.default_rng(2)
    for r, s in ((3, 2), (4, 3), (10, 5)):
        y = draw.normal(0, 1, (r, s)) + draw.normal(0, 9, (r, 1)) + draw.normal(0, 9, s)
        left = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
        error = math.sqrt(2 * (left**2).sum() / ((r - 1) * (s - 1)) / s)
        found = Blocks({(i, j): y[i, j] for i in range(r) for j in range(s)})
        for i, j in ((0, 1), (r - 1, 0)):
            difference = y[i].mean() - y[j].mean()
            p = 2 * scipy.stats.t.sf(abs(difference) / error, (r - 1) * (s - 1))
            assert found.apart(i, j) == (pytest.approx(difference), pytest.approx(p))


def test_a_missing_cell_is_made_up_for_by_what_the_seed_does_to_others():
    cells = {("a", 1): 4.0, ("a", 2): 4.5, ("b", 1): 3.0, ("b", 2): 3.5, ("c", 2): 2.5}
    difference, p = Blocks(cells).apart("c", "a")
    assert difference == pytest.approx(-2.0) and p == pytest.approx(0, abs=1e-6)
    assert Blocks(dict(list(cells.items())[1:3])).apart("a", "b") is None  # nothing joins seed 2 and seed 1
    assert Blocks({("a", 1): 4.0, ("b", 1): 3.0}).apart("a", "b") == (pytest.approx(1.0), None)  # no noise is known
    assert Blocks({("a", 1): 4.0, ("b", 1): 3.0, ("a", 2): 4.0, ("b", 2): 3.0}).apart("a", "b")[1] == pytest.approx(0)
    assert Blocks(cells).apart("a", "d") is None


def test_of_runs_that_are_alike_five_in_a_hundred_are_told_apart():
    draw, found = np.random.default_rng(3), []
    for _ in range(1000):
        seeds = draw.normal(0, 5, 3)
        cells = {(run, seed): draw.normal(0, 1) + seeds[seed] + run
                 for run in range(8) for seed in range(3 if run < 3 else 1 + run % 2)}
        found.append(Blocks({(run, seed): loss - run for (run, seed), loss in cells.items()}).apart(2, 5)[1])
    assert 0.03 < np.mean(np.array(found) < 0.05) < 0.07 and 0.45 < np.mean(np.array(found) < 0.5) < 0.55


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ValueError, match="pip install -r requirements-tools.txt"):
        fast.measuring.student()


def test_a_loss_is_reached_between_two_validations():
    curve = [(10.0, 100, 6.0), (20.0, 200, 5.0), (30.0, 300, 5.5), (40.0, 400, 4.0)]
    assert fast.reached(curve, 5.25) == pytest.approx((17.5, 175))
    assert fast.reached(curve, 5.0) == (20.0, 200)  # the first time
    assert fast.reached(curve, 4.75) == pytest.approx((35.0, 350)) and fast.reached(curve, 4.0) == (40.0, 400)
    assert fast.reached(curve, 3.9) is None and fast.reached(curve, 6.5) is None and fast.reached([], 5.0) is None


def test_compilation_is_not_in_the_seconds():
    row = dict(first_step_s=30.5, step_avg_ms=500.0, curve=[(2, 20, 31.0, 9.0), (10, 100, 35.0, 6.0)])
    assert fast.learning_curve(row) == [(1.0, 20, 9.0), (5.0, 100, 6.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Running, with a stand-in that writes what the script would

STAND_IN = '''
import json, os, sys, pathlib
typed = dict(zip(sys.argv, sys.argv[1:]))
open(CALLS, "a").write(json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\\n")
if "--mlp" in typed and os.path.exists(BROKEN):
    print("a warning", file=sys.stderr)
    print("error: out of luck", file=sys.stderr)
    sys.exit(int(open(BROKEN).read()))
steps, seed = int(typed["--num_iterations"]), int(typed["--seed"])
folder = pathlib.Path(typed["--output_dir"]) / "run"
folder.mkdir(parents=True)
records = []
for step in range(1, steps + 1):
    common = dict(step=step, tokens=int(typed["--total_batch_size"]) * step, time=20000 + 250.0 * (step - 1))
    records.append(dict(common, train_loss=5.0, tokens_per_second=524288.0, step_avg_ms=250.0, peak_mem_MB=20000 + seed,
                        step_ms=20000.0 if step == 1 else 250.0))
    if step == steps or (typed["--val_loss_every"] != "0" and step % int(typed["--val_loss_every"]) == 0):
        records.append(dict(common, val_loss=8 - 4 * step / steps + 0.001 * seed))
(folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records))
print("first step done after 20.0 s, with what compiles and allocates")
print("data: 29,800,000 training tokens in 1 shards, vocabulary 50257")
'''


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The program on a GPU that is not there, with the stand-in; `calls()` are the stand-in's, [flags, its GPU]."""
    broken, calls = tmp_path / "broken", tmp_path / "calls.jsonl"
    stand_in = STAND_IN.replace("CALLS", repr(str(calls))).replace("BROKEN", repr(str(broken)))
    (tmp_path / "script.py").write_text(stand_in)
    monkeypatch.setattr(fast.measuring, "SCRIPT", tmp_path / "script.py")
    for name, path in (("RESULTS", "results.jsonl"), ("CURVE", "curve.png")):
        monkeypatch.setattr(fast, name, tmp_path / path)
    monkeypatch.setattr(fast.measuring, "gpu_name", lambda: "A GPU")
    monkeypatch.setattr(fast.measuring, "check_shards", lambda args: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def said():
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return types.SimpleNamespace(broken=broken, calls=said, folder=tmp_path)


def test_a_run_and_its_record(bench, capsys):
    assert fast.main("--only d12 --seeds 1 --input_bin x*.bin --input_val_bin v*.bin".split()) == 0
    (words, device), = bench.calls()
    assert device is None and " ".join(words).startswith(f"{fast.FULL['d12']} --seed 1 --input_bin x*.bin "
                                                         "--input_val_bin v*.bin --output_dir ")
    row, = fast.results()
    assert (row["kind"], row["name"], row["flags"], row["seed"]) == ("full", "d12", fast.FULL["d12"], 1)
    assert row["curve"][0] == [100, 6_553_600, 44.75, pytest.approx(8.001 - 400 / 1526)] and len(row["curve"]) == 16
    assert row["val_loss"] == row["curve"][-1][-1] == pytest.approx(4.001)
    assert (row["gpu"], row["torch"], row["first_step_s"]) == ("A GPU", torch.__version__, 20.0)
    assert (row["tokens_per_second"], row["step_avg_ms"], row["peak_mem_MB"]) == (524288.0, 250.0, 20001)
    assert re.fullmatch("[0-9a-f]{64}", row["script_sha256"]) and row["script_sha256"] == fast.measuring.source()
    assert row["data"] == "29,800,000 training tokens in 1 shards, vocabulary 50257" and 0 < row["wall_s"] < 60
    out = capsys.readouterr().out
    assert "full d12, seed 1: loss 4.0010, 524,288 tokens/s" in out
    assert str(bench.folder) not in fast.RESULTS.read_text() and "x*.bin" not in fast.RESULTS.read_text()
    seconds = 381.5 * (8.001 - 4.914) / 4  # 1526 steps of 0.25 s, straight from 8 to 4
    assert f"| {seconds:.1f} s, {seconds / 0.25 * 65536 / 1e6:.1f} M |" in out
    assert "| `d12` | 1 | 524,288 | 20,001 | 20.0 |" in out


def test_the_figures_of_a_run_of_the_script(trainer):
    """The stand-in writes what the script writes."""
    run = trainer.run("--no_save_checkpoints")
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found, last = fast.measuring.figures(records), [r for r in records if "train_loss" in r][-1]
    assert [point[:2] for point in found["curve"]] == [(3, 192), (6, 384)]
    assert found["val_loss"] == found["curve"][-1][-1] == records[-1]["val_loss"]
    assert found["curve"][-1][2] == pytest.approx(last["time"] / 1000) and last["time"] / 1000 > found["first_step_s"]
    assert re.search(rf"first step done after {found['first_step_s']:.1f} s", run.out)
    assert re.search(r"^data: .*training tokens", run.out, re.M)
    assert (found["step_avg_ms"], found["peak_mem_MB"]) == (last["step_avg_ms"], last["peak_mem_MB"])


def test_nothing_is_run_twice(bench, monkeypatch):
    only = ["--only", "adamw", "muon", "--seeds", "2"]
    assert fast.main(only) == 0 and len(bench.calls()) == 4
    monkeypatch.setattr(fast.measuring, "source", lambda: "another")
    assert fast.main(only) == 0 and len(bench.calls()) == 4  # another version, and its records say which they are of
    assert fast.main(["--only", "adamw", "--seeds", "3"]) == 0 and len(bench.calls()) == 5
    assert [row["script_sha256"] == "another" for row in fast.results()] == [False] * 4 + [True]
    monkeypatch.setattr(fast.measuring, "gpu_name", lambda: "Another GPU")
    assert fast.main(["--only", "adamw", "--seeds", "1"]) == 0 and len(bench.calls()) == 6


def test_a_failed_run_is_said_and_the_next_goes_on(bench, capsys):
    bench.broken.write_text("2")
    assert fast.main("--only qk_norm relu2 x0_lambdas untied --seeds 1".split()) == 1
    assert [row["name"] for row in fast.results()] == ["qk_norm", "untied"]
    out = capsys.readouterr().out
    assert "failed: ladder relu2, seed 1: exit code 2: error: out of luck\n" in out and len(bench.calls()) == 4
    assert "failed: ladder x0_lambdas" in out and "Traceback" not in out
    bench.broken.unlink()
    assert fast.main("--only qk_norm relu2 x0_lambdas untied --seeds 1".split()) == 0
    assert len(fast.results()) == 4 and len(bench.calls()) == 6


def test_after_a_signal_nothing_else_begins(bench):
    bench.broken.write_text(str(fast.measuring.STOPPED))
    assert fast.measuring.STOPPED == script.Stopped.exit_code
    assert fast.main("--only qk_norm relu2 x0_lambdas --seeds 1".split()) == 1
    assert len(bench.calls()) == 2 and [row["name"] for row in fast.results()] == ["qk_norm"]


def test_an_interruption_loses_no_record(bench, monkeypatch):
    measure = fast.measuring.measure

    def interrupted(run, *rest):
        if run.name == "untied":
            raise KeyboardInterrupt
        return measure(run, *rest)

    monkeypatch.setattr(fast.measuring, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast.main("--only adamw muon untied --seeds 1".split())
    assert [row["name"] for row in fast.results()] == ["adamw", "muon"]


def made_up(run, seed, **figures):
    loss = figures.pop("val_loss", 4.0)
    curve = figures.pop("curve", [(run.steps, run.tokens, 20 + 0.25 * run.steps, loss)])
    return dict(dict(**run._asdict(), seed=seed, val_loss=loss, curve=curve, tokens_per_second=524288.0,
                     step_avg_ms=250.0, peak_mem_MB=20000, first_step_s=20.25, wall_s=100.0, gpu="A GPU",
                     torch="2.11.0", script_sha256="abcdef0123", beside=0, sharing=0, data=None), **figures)


def test_what_a_run_is_expected_to_take():
    short, full = fast.ladder()["muon"][1], fast.Run("full", "d12", fast.FULL["d12"])
    rows = [made_up(short, 1, wall_s=100.0), made_up(short, 2, wall_s=90.0, step_avg_ms=200.0)]
    beyond = max(100 - 454 * 0.25, 90 - 454 * 0.2)
    assert expected_seconds(full, []) == 0
    assert expected_seconds(full, rows) == pytest.approx(1.1 * (beyond + 1526 * 0.25))
    slow = made_up(full, 1, wall_s=500.0, step_avg_ms=300.0)
    assert expected_seconds(short, [*rows, slow]) == pytest.approx(1.1 * (beyond + 454 * 0.25))  # its own
    assert expected_seconds(full, [*rows, slow]) == pytest.approx(1.1 * 500)
    shared = made_up(short, 1, wall_s=300.0, sharing=2)
    assert expected_seconds(short, [*rows, shared], 2) == pytest.approx(1.1 * 300)  # its like, though slower
    assert expected_seconds(short, [*rows, shared], 1) > expected_seconds(short, rows)  # none is: the slowest


def test_the_budget_stops_before_a_run_that_would_not_end_in_it(bench, monkeypatch, capsys):
    assert fast.main("--only adamw --seeds 1 --budget_s 1000".split()) == 0  # nothing to go by: it begins
    took = fast.results()[0]["wall_s"]
    rows = [dict(row, wall_s=100.0) for row in fast.results()]
    fast.RESULTS.write_text(json.dumps(rows[0]) + "\n")
    assert took < 60
    assert fast.main("--only adamw muon untied --seeds 1 --budget_s 109".split()) == 0 and len(bench.calls()) == 1
    assert "no time left for muon: 2 runs are still to do\n" in capsys.readouterr().out
    assert fast.main("--only adamw muon untied --seeds 1 --budget_s 200".split()) == 0 and len(bench.calls()) == 3


@pytest.mark.parametrize("visible, devices", [(None, {"0", "1"}), ("5,GPU-7", {"5", "GPU-7"})])
def test_each_gpu_has_a_run_of_its_own(bench, monkeypatch, visible, devices):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    busy, most = set(), []
    measure = fast.measuring.measure

    def watched(run, seed, data, device, beside, sharing):
        assert device not in busy and (beside, sharing) == (1, 0)
        busy.add(device)
        most.append(len(busy))
        try:
            return measure(run, seed, data, device, beside, sharing)
        finally:
            busy.remove(device)

    monkeypatch.setattr(fast.measuring, "measure", watched)
    assert fast.main("--only adamw muon untied --seeds 2 --parallel".split()) == 0
    assert max(most) == 2 and {device for _, device in bench.calls()} == devices
    done = [(row["flags"], row["seed"]) for row in fast.results()]
    assert len(done) == len(set(done)) == 6 and all(row["beside"] == 1 for row in fast.results())


def test_without_a_gpu_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(fast, "RESULTS", tmp_path / "none.jsonl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        fast.main([])
    with pytest.raises(ValueError, match="invalid choice: 'no_such_rung'"):
        fast.main(["--only", "no_such_rung"])
    assert not fast.RESULTS.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_the_ladder_of_made_up_records():
    rungs = {rung: run for rung, (_, run) in fast.ladder().items()}
    muon, untied, qk_norm = [4.500, 4.502, 4.504], [4.400, 4.403, 4.403], [4.401, 4.402, 4.405]
    curve = [(50, 3_276_800, 32.5, 5.01), (454, 29_753_344, 130.0, 3.01)]  # half way to 4.01
    rows = [made_up(rungs[rung], seed, val_loss=loss, sharing=2, **dict(curve=curve) if rung == "untied" else {})
            for rung, each in (("muon", muon), ("untied", untied), ("qk_norm", qk_norm), ("zero_init", [4.3]),
                               ("no_attention_scale", [4.6]))
            for seed, loss in enumerate(each, 1)]
    rows.insert(0, dict(rows[0], val_loss=9.0))  # the same run: the newer record counts
    rows.append(dict(rows[1], flags=f"{rows[1]['flags']} --n_layer 3", val_loss=1.0))  # no longer a rung
    for rung, rate in (("muon", 5e5), ("untied", 6e5)):
        rows.append(made_up(fast.speeds()[rung], 1, tokens_per_second=rate))
    rows.append(made_up(fast.speeds()["qk_norm"], 1, sharing=2))  # whose speed is half a GPU's
    found, = fast.tables(rows)
    lines = found.splitlines()[2:]
    label = {rung: f"| `{rung}` | {note} | {fast.code_lines(fast.CODE[rung])} |"
             for rung, (_, note) in fast.LADDER.items()}
    y = np.array([muon, untied, qk_norm])
    left = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    error = math.sqrt(2 * (left**2).sum() / 4 / 3)

    def p(apart):
        return f"{2 * scipy.stats.t.sf(apart / error, 4):.1g}"

    assert lines[0] == f"{label['muon']} 3 | 500,000 | 20,000 | 4.5020 | 0.0020 | - | - | - | - |"
    seconds = (3_276_800 + 29_753_344) / 2 / 6e5
    assert lines[1] == (f"{label['untied']} 3 | 600,000 | 20,000 | 4.4020 | 0.0017 | -0.1000 | {p(0.1)} | better | "
                        f"{seconds:.1f} |")
    assert lines[2].endswith(f"3 | - | 20,000 | 4.4027 | 0.0021 | +0.0007 | {p(0.002 / 3)} | not told apart | - |")
    apart = 4.3 - y[2].mean() - (y[:, 0].mean() - y.mean())  # seed 1 is as far from the other seeds as it is elsewhere
    assert lines[3].split(" | ")[5:9] == ["20,000", "4.3000", "-", f"{apart:+.4f}"] and "| better | - |" in lines[3]
    assert "| 1 | - | 20,000 | 4.6000 | - | +0.3000 |" in lines[4] and "| worse | - |" in lines[4] and len(lines) == 5
    assert fast.verdict(0.1, 0.01) == "worse"


@pytest.mark.slow
def test_the_lines_of_a_rung(monkeypatch, tmp_path):
    monkeypatch.setattr(fast.measuring, "SCRIPT", tmp_path / "script.py")
    fast.measuring.SCRIPT.write_text("a = 1\n\n\nclass B:\n    def c(self):\n        return a\n\n\nb = ab = B()\n")
    found = {words: fast.code_lines(words) for words in ((), ("a",), ("B",), ("c", "b"), ("B", "c", "ab"))}
    assert list(found.values()) == [0, 2, 4, 3, 4]
    monkeypatch.undo()
    assert all(fast.code_lines((word,)) for words in fast.CODE.values() for word in words)  # the script has each


def test_the_full_runs_of_made_up_records():
    run = fast.Run("full", "d12_fast", fast.FULL["d12_fast"])
    curve = [(50, 6_553_600, 32.5, 5.414), (100, 13_107_200, 45.0, 4.414), (1100, 144_179_200, 295.0, 3.414)]
    found, = fast.tables([made_up(run, seed, val_loss=3.414, curve=curve) for seed in (2, 1)])
    heads, _, first, second = found.splitlines()
    assert heads == ("| run | seed | tokens/s | MiB | first step s | to 4.914 | to 4.010 | to 3.800 | to 3.416 | "
                     "last loss |")
    assert first.startswith("| `d12_fast` | 1 |") and second.startswith("| `d12_fast` | 2 |")
    assert first.endswith("| 20.2 | 18.8 s, 9.8 M | 126.0 s, 66.1 M | 178.5 s, 93.6 M | 274.5 s, 143.9 M | "
                          "3.4140 at 275.0 s, 144.2 M |")
    found, = fast.tables([made_up(run, 1, val_loss=5.414, curve=curve[:1])])
    assert found.endswith("| - | - | - | - | 5.4140 at 12.5 s, 6.6 M |")


def test_the_sweeps_of_made_up_records():
    losses = {"6e-4": 4.9, "1e-3": 4.85, "1.5e-3": 4.8, "2e-3": 4.81}
    rows = [made_up(run, 1, val_loss=losses[value]) for value, run in fast.swept("sweep_d12")]
    rows += [made_up(run, 1, val_loss=4.0 - float(value)) for value, run in fast.swept("sweep_muon")]
    found, = fast.tables(rows)
    taken = fast.RATES[fast.D12]["learning_rate"]
    each = "6e-4: 4.9000, 1e-3: 4.8500, 1.5e-3: 4.8000, 2e-3: 4.8100"
    assert f"| `sweep_d12` | `d12`, learning_rate | {each} | 1.5e-3 | {taken} |" in found
    assert "| 0.0125: 3.9875, 0.025: 3.9750, 0.05: 3.9500 | 0.05 (the end of the row) | 0.02 |" in found
    assert "| `sweep_embedding` | `d12_fast`, embedding_lr | 0.15: 3.9750 | not all measured | 0.3 |" in found


def test_what_was_tried_of_made_up_records():
    runs = fast.tried()
    rows = [made_up(runs[name], seed, val_loss=loss + seed / 1000, sharing=sharing) for name, loss, sharing in (
        ("first", 4.0, 1), ("batch_32768", 3.9, 0), ("in_order", 4.2, 0), ("in_order_131072", 4.1, 0))
            for seed in (1, 2)]
    table = next(found for found in fast.tables(rows) if found.startswith("| tried"))
    first, batch, in_order, larger = table.splitlines()[2:]
    assert first.startswith("| `first` |") and first.endswith("| 2 | - | 20,000 | 4.0015 | 0.0007 | - | - | - |")
    assert batch.startswith("| `batch_32768` | to `first`: ")
    assert "| 2 | 524,288 | 20,000 | 3.9015 | 0.0007 | -0.1000 |" in batch and batch.endswith(" | better |")
    assert "| +0.2000 |" in in_order and in_order.endswith("| worse |")
    assert "to `in_order`: " in larger and "| -0.1000 |" in larger


def test_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fast, "RESULTS", tmp_path / "results.jsonl")
    assert fast.main(["--table"]) == 0
    assert capsys.readouterr().out == "results.jsonl holds nothing: not measured yet\n"
    run = fast.ladder()["muon"][1]
    fast.measuring.append(fast.RESULTS, made_up(run, 1), made_up(run, 2, script_sha256="123456789"),
                          made_up(run, 1, gpu="B GPU"))
    assert fast.main(["--table"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A GPU, torch 2.11.0, script abcdef01, 12345678\n\n| rung |")
    assert "\nB GPU, torch 2.11.0, script abcdef01\n\n| rung |" in out


def test_the_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fast, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(fast, "CURVE", tmp_path / "curve.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    assert fast.main(["--plot"]) == 2
    missing = "error: --plot needs the package matplotlib; pip install -r requirements-tools.txt\n"
    assert capsys.readouterr().err == missing
    lines, saved = [], []
    axes = types.SimpleNamespace(plot=lambda x, y, label, **_: lines.append((x, y, label)),
                                 axhline=lambda *a, **k: None, set=lambda **k: None, set_ylabel=lambda text: None,
                                 legend=lambda **k: None)
    figure = types.SimpleNamespace(savefig=lambda path, dpi: saved.append(path))
    pyplot = types.SimpleNamespace(subplots=lambda figsize: (figure, axes))
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(use=lambda name: None, pyplot=pyplot))
    assert fast.main(["--plot"]) == 2 and "holds no full run" in capsys.readouterr().err
    run = fast.Run("full", "d12", fast.FULL["d12"])
    curve = [(50, 6_553_600, 32.5, 5.0), (100, 13_107_200, 45.0, 4.0)]
    fast.measuring.append(fast.RESULTS, made_up(run, 1, curve=curve))
    assert fast.main(["--plot"]) == 0 and saved == [fast.CURVE]
    assert lines[0] == ((12.5, 25.0), (5.0, 4.0), "d12, seed 1, A GPU")
    assert [label for *_, label in lines[1:]] == list(fast.ANCHORS)
    public = (FOLDER / "README.md").read_text().split("**What to compare with.**")[1].split("## Results")[0]
    table = re.findall(r"^\|.*\| (?:4.914 )?.*?(\d\.\d+)[^|]* \| ([\d.]+) \|$", public, re.M)
    points = [(float(seconds), float(loss)) for loss, seconds in table]
    assert points and set(points) == {point for each in fast.ANCHORS.values() for point in each}


def test_the_memory_plan_is_near_what_the_runs_took():
    found = {(row["flags"], row["peak_mem_MB"]) for row in fast.results()}
    assert len(found) > 20
    for flags, peak in found:
        config, run = resolved(flags)
        with torch.device("meta"):
            model = script.GPT(config)
        assert sum(script.memory_plan(config, run, model).values()) / 2**20 == pytest.approx(peak, rel=0.05), flags


# ----------------------------------------------------------------------------------------------------------------------
# README.md


def test_the_readmes_tables_are_the_results():
    text = (FOLDER / "README.md").read_text()
    for gpu in {row["gpu"] for row in fast.results()}:
        assert all(table in text for table in fast.tables([r for r in fast.results() if r["gpu"] == gpu]))
    assert ("Not measured yet" in text) == (not fast.results())


def test_the_readme_has_the_ladder_and_the_commands():
    text = (FOLDER / "README.md").read_text()
    rows = [line.split(" | ")[:2] for line in text.splitlines() if re.match(r"\| `\w+` \| `--", line)]
    assert [(rung.strip("| `"), adds.strip("`")) for rung, adds in rows] == [
        (rung, adds) for rung, (adds, _) in fast.LADDER.items()]
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).splitlines()
    trained = [line.removeprefix("python train_gpt2_mod.py ") for line in blocks if "train_gpt2_mod.py" in line]
    assert set(trained) <= {run.flags for run, _ in EVERY} and set(fast.FULL.values()) < set(trained)
    measured = [shlex.split(line, comments=True)[2:] for line in blocks if "measure.py" in line]
    assert len(measured) == 5
    for words in measured:
        fast.make_parser().parse_args(words)
    assert f"{len(fast.runs(None, 3))} runs in all" in text
    for _, rate, values, _ in fast.SWEEPS.values():
        assert ", ".join(values) in " ".join(text.split()), rate


def test_no_line_is_too_long():
    for path in (FOLDER / "measure.py", Path(__file__)):
        assert not [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120], path.name
