"""docs/05-depth-rules: its commands, and its tables of made-up records; what is run, with a stand-in for the script."""
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2_mod as script

FOLDER = Path(script.__file__).resolve().parent / "docs" / "05-depth-rules"
spec = importlib.util.spec_from_file_location("measure_05", FOLDER / "measure.py")
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)

EVERY = [run for run, _ in rules.runs(rules.KINDS, 1)]


def resolved(flags):
    return script.resolve(script.parse_flags(flags.split()), script.ANY_MACHINE._replace(memory=22 * 2**30))[:2]


def of(kind):
    return [run for run in EVERY if run.kind == kind]


@pytest.mark.parametrize("run", EVERY, ids=lambda run: f"{run.kind}-{run.name}")
def test_the_commands_resolve(run):
    config, settings = resolved(run.flags)
    assert settings.sequence_length == 1024 and settings.shuffle and not settings.save_checkpoints
    if run.kind != "card":
        depth = int(re.match(r"d(\d+)", run.name)[1])
        network, recipe = script.preset(f"d{depth}_fast")
        assert (config.n_layer, config.n_embd) == (depth, network["n_embd"])
        assert settings.tokens_per_step == recipe["tokens_per_step"] and settings.min_lr_fraction == 0.1


def test_the_rates_are_those_of_the_formula_by_each_factor():
    for depth in rules.DEPTHS:
        recipe = script.preset(f"d{depth}_fast")[1]
        for factor in rules.FACTORS:
            run = resolved(rules.rates(depth, factor).flags)[1]
            assert run.num_iterations * run.tokens_per_step == rules.SHORT
            for name in rules.RATES:
                assert getattr(run, name) == pytest.approx(factor * recipe[name], rel=1e-5)
            assert run.weight_decay == pytest.approx(recipe["weight_decay"], rel=1e-5)


def test_rates_by_the_root_of_the_batch():
    own, root = (resolved(rules.rates(6, 2, by_batch).flags)[1] for by_batch in (False, True))
    assert own.tokens_per_step == 32768 and root.scalar_lr == own.scalar_lr
    for name in ("muon_lr", "value_lr", "learning_rate"):
        assert getattr(root, name) == pytest.approx(getattr(own, name) * 0.5**0.5, rel=1e-5)
    assert root.weight_decay == pytest.approx(0.2 * 0.5**0.5, rel=1e-5)
    once, minutes = resolved(rules.rates(6, 1, True).flags)[1], resolved(rules.in_minutes(6, True).flags)[1]
    assert all(getattr(once, name) == getattr(minutes, name) for name in (*rules.RATES, "weight_decay"))


def test_depths_alone():
    some = {run for run, _ in rules.runs(rules.KINDS, 1, [6, 8])}
    assert some == {run for run in EVERY if run.kind == "card" or run.name in ("d6", "d6_fast", "d8_fast")}
    assert {run.kind for run in some} == {*rules.KINDS} and {run.name for run in some} >= {"d6", "d8_fast"}


def test_a_preset_and_its_plain_network_have_equal_minutes():
    for depth in rules.DEPTHS:
        names = (f"d{depth}", f"d{depth}_fast")
        minutes = [resolved(run.flags)[1].minutes for run in of("minutes") if run.name in names]
        assert minutes == [rules.MINUTES[depth]] * (1 + len(rules.PLAIN_RATES[depth]))
        for rate in rules.PLAIN_RATES[depth]:
            config, run = resolved(rules.plain(depth, rate).flags)
            assert (config.qk_norm, config.mlp, config.tie_embeddings, run.optimizer) == (False, "gelu", True, "adamw")
            assert run.learning_rate == float(rate) and config.head_dim == 64


def test_the_card_changes_the_micro_batch_alone():
    for name in rules.CARDS:
        whole, capped = (resolved(rules.card(name, place).flags) for place in (rules.WHOLE, rules.CAPPED))
        assert whole[0] == capped[0] and whole[1].tokens_per_step == capped[1].tokens_per_step
        assert whole[1].batch_size == 64 > capped[1].batch_size
        assert whole[1].num_iterations == capped[1].num_iterations


def test_what_a_run_is_expected_to_take():
    assert rules.expected_seconds(rules.in_minutes(12), []) == 90 + 60
    flops = 6.0 * 577e6  # more than d18_fast's a token, which has no product for its tables
    seconds = rules.expected_seconds(rules.scale(18), [])
    assert 90 < seconds < 90 + 365_559_808 * flops / 3.5e14
    assert rules.expected_seconds(rules.scale(18), [], 1) - 90 == pytest.approx(2 * (seconds - 90))
    assert rules.expected_seconds(rules.scale(18), [], processes=2) - 90 == pytest.approx((seconds - 90) / 2)
    assert rules.expected_seconds(rules.card("nocap", rules.WHOLE), []) > 90


def made_up(run, seed=1, **figures):
    return dict(dict(**run._asdict(), seed=seed, val_loss=4.0, curve=[[10, 30_000_000, 60.0, 4.0]], peak_mem_MB=20000,
                     tokens_per_second=5e5, gpu="A GPU", torch="2.11.0", script_sha256="abcdef0123", sharing=0),
                **figures)


def test_the_tables_of_made_up_records():
    rows = [made_up(rules.rates(6, factor), seed, val_loss=4 + factor + seed / 100)
            for factor in rules.FACTORS for seed in (1, 2)]
    rows += [made_up(rules.in_minutes(12)), made_up(rules.plain(12, "1.5e-3"), val_loss=4.5),
             made_up(rules.plain(12, "2e-3"), val_loss=4.4, sharing=1)]  # whose minute was not its own
    a, b = 50.0, 0.07
    length = ("tokens_per_step", "num_iterations")
    flops = {depth: math.prod(script.preset(f"d{depth}_fast")[1][name] for name in length) * rules.size_of(depth)[1]
             for depth in (4, 6, 8)}
    rows += [made_up(rules.scale(depth), val_loss=a * flops[depth] ** -b) for depth in flops]
    rows += [made_up(rules.card("d12_fast", place), peak_mem_MB=peak)
             for place, peak in ((rules.WHOLE, 33000), (rules.CAPPED, 12000))]
    rates, minutes, scale, card = rules.tables(rows)
    assert rates.splitlines()[2:] == ["| `d6_fast` | 2 | 4.5150 | 5.0150 | 6.0150 |"]
    assert minutes.splitlines()[2:] == ["| `d12_fast` | the formula's | 1 | 30.0 | 500,000 | 4.0000 |",
                                        "| `d12` | 1.5e-3 | 1 | 30.0 | 500,000 | 4.5000 |"]
    assert scale.splitlines()[2].startswith("| `d4_fast` | 41.7 | 17.0 | 1.84 | ")
    assert scale.splitlines()[-1] == f"| the line |  |  | {a:.2f} FLOP^-{b:.4f} |  |" and len(scale.splitlines()) == 6
    assert card.splitlines()[2:] == ["| `d12_fast` | the whole GPU | 33,000 | 500,000 | 4.0000 |",
                                     "| `d12_fast` | 22 GiB of it | 12,000 | 500,000 | 4.0000 |"]


def test_the_line_is_that_of_least_squares():
    points = [(1e15, 4.3), (1e16, 3.9), (4e16, 3.6), (1e18, 3.0)]
    slope, height = np.polyfit(*np.log(np.array(points)).T, 1)
    assert rules.power_law(points) == pytest.approx((math.exp(height), -slope))


STAND_IN = '''
import json, pathlib, sys
typed = dict(zip(sys.argv, sys.argv[1:]))
folder = pathlib.Path(typed["--output_dir"]) / "run"
folder.mkdir(parents=True, exist_ok=True)
(folder / "words.json").write_text(json.dumps(sys.argv[1:]))
step = dict(step=1, tokens=1, time=1000.0, tokens_per_second=1.0, step_avg_ms=1.0, peak_mem_MB=1, step_ms=1.0)
(folder / "metrics.jsonl").write_text(json.dumps(step) + "\\n" + json.dumps(dict(step, val_loss=4.0)) + "\\n")
'''


@pytest.fixture
def bench(monkeypatch, tmp_path):
    (tmp_path / "script.py").write_text(STAND_IN)
    monkeypatch.setattr(rules.measuring, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(rules, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(rules.measuring, "gpu_name", lambda: "A GPU")
    monkeypatch.setattr(rules.measuring, "check_shards", lambda args: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_what_is_kept_goes_on(bench, tmp_path):
    assert rules.main(["--only", "scale", "--keep", str(tmp_path / "kept"), "--input_bin", "x*.bin"]) == 0
    assert len(rules.measuring.read(rules.RESULTS)) == len(rules.SCALED)
    words = [json.loads(path.read_text()) for path in (tmp_path / "kept").glob("*/run/words.json")]
    assert len(words) == len(rules.SCALED)
    for each in words:
        run = resolved(" ".join(each[: each.index("--resume")]))[1]
        assert run.save_checkpoints and run.save_every_minutes == 3 and each[each.index("--resume") + 1] == "auto"
    assert rules.main(["--only", "scale"]) == 0 and len(rules.measuring.read(rules.RESULTS)) == len(rules.SCALED)


def test_what_is_timed_shares_no_gpu(bench, capsys):
    for words in (["--parallel", "3"], ["--only", "card", "--parallel", "2"], ["--processes", "2"]):
        assert rules.main(words) == 2 and "minutes and card are timed" in capsys.readouterr().err
    assert rules.main(["--only", "scale", "--processes", "2", "--parallel"]) == 2
    assert not rules.RESULTS.exists()
    assert rules.measuring.torchrun(2)[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert rules.measuring.torchrun(1) == [sys.executable]


def test_the_readme():
    text = (FOLDER / "README.md").read_text()
    results = rules.measuring.read(rules.RESULTS)
    for gpu in {row["gpu"] for row in results}:
        assert all(table in text for table in rules.tables([r for r in results if r["gpu"] == gpu]))
    assert ("Not measured yet" in text) == (not results)
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).splitlines()
    measured = [shlex.split(line, comments=True)[2:] for line in blocks if "measure.py" in line]
    assert len(measured) == 6
    for words in measured:
        rules.make_parser().parse_args(words)


def test_no_line_is_too_long():
    for path in (FOLDER / "measure.py", FOLDER.parent / "measuring.py", Path(__file__)):
        assert not [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120], path.name
