"""How long a run is: --tokens, --minutes by a simulated clock, a resume before and after the fit; presets of any depth."""
import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import machine
from launch import SMALL, checkpoints, data_flags, steps

import train_gpt2_mod as script

DEPTHS = range(4, 49)


def resolved(flags, base=None):
    return script.resolve(script.parse_flags(flags.split()), machine(), base)


def refused(flags):
    with pytest.raises(script.ConfigError) as error:
        resolved(flags)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Presets of any depth


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_shapes_of_every_depth(depth):
    config, run, _ = resolved(f"--model d{depth}_fast")
    assert config.n_layer == depth and run.model == f"d{depth}_fast"
    assert config.n_embd % 128 == 0 and config.head_dim == 128 and 64 * depth <= config.n_embd < 64 * depth + 128
    assert 2 <= config.value_embeddings <= 3 and 2 * config.value_embeddings <= depth
    assert math.log2(run.tokens_per_step).is_integer() and run.tokens_per_step >= run.batch_size * 1024
    assert run.warmdown_iters == round(0.6 * run.num_iterations) and run.optimizer == "muon" and run.shuffle
    recipe = script.preset(run.model)[1]
    with torch.device("meta"):
        model = script.GPT(config) if depth <= 24 else None
    if model:
        counted = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and (".h." in name or
                                                                                             "wte" in name))
        ratio = run.num_iterations * run.tokens_per_step / counted
        assert ratio == pytest.approx(script.FAST_TOKENS_PER_PARAMETER, rel=2e-3)
    assert recipe["muon_lr"] == 0.02 and recipe["weight_decay"] == pytest.approx(0.1 * 12 / depth)
    for rate, at_12 in (("learning_rate", 0.004), ("value_lr", 0.3)):
        expected = at_12 * math.sqrt(768 / config.n_embd)
        assert recipe[rate] == pytest.approx(expected)


def test_the_depth_of_12_is_the_values_that_were_found():
    network, recipe = script.preset("d12_fast")
    assert network.items() >= {**script.FAST, "n_layer": 12, "n_embd": 768, "n_head": 6}.items()
    assert recipe.items() >= dict(muon_lr=0.02, muon_beta2=0.95, learning_rate=0.004, value_lr=0.3, weight_decay=0.1,
                                  tokens_per_step=65536).items()


def test_deeper_is_never_a_smaller_batch_or_fewer_tokens():
    batches = [script.preset(f"d{depth}_fast")[1]["tokens_per_step"] for depth in DEPTHS]
    counts = [script.preset(f"d{depth}_fast")[1]["num_iterations"] for depth in DEPTHS]
    assert batches == sorted(batches) and (batches[0], batches[-1]) == (2**15, 2**18)
    tokens = [batch * count for batch, count in zip(batches, counts)]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("name", ["d3_fast", "d49_fast", "d012_fast", "d12_fas", "dN_fast"])
def test_other_depths_are_not_known(name):
    assert f"model={name} is not known; did you mean d" in refused(f"--model {name}")


def test_the_help_names_the_family_not_each():
    shown = script.make_parser().format_help()
    assert "d4_fast to d48_fast" in " ".join(shown.split()) and "d17_fast" not in shown


# ----------------------------------------------------------------------------------------------------------------------
# --tokens


@pytest.mark.parametrize("tokens, count", [(8192, 1), (1, 1), (12287, 1), (12289, 2), (1_000_000, 122)])
def test_tokens_are_steps(tokens, count):
    _, run, notes = resolved(f"--tokens {tokens} --warmdown_fraction 0.5")
    assert run.num_iterations == count and run.warmdown_iters == round(0.5 * count)
    assert f"num_iterations={count}: {8192 * count:,} tokens" in notes


def test_tokens_with_a_preset_and_with_accumulation():
    _, run, _ = resolved("--model d12_fast --batch_size 16 --tokens 60_000_000".replace("_000", "000"))
    assert run.num_iterations == 916 and run.warmdown_iters == 550 and run.grad_accumulation_steps == 4


@pytest.mark.parametrize("flags, words", [
    ("--tokens 5 --num_iterations 5", "num_iterations and tokens each say"),
    ("--tokens 5 --minutes 5", "tokens and minutes each say"),
    ("--minutes 5 --num_iterations 5", "num_iterations and minutes each say"),
    ("--minutes 5 --num_iterations 5 --tokens 5", "num_iterations and tokens and minutes each say"),
    ("--minutes 5 --warmdown_iters 5", "type --warmdown_fraction"), ("--minutes -1", "at least 0"),
    ("--tokens -1", "tokens=-1 must be at least 1"), ("--tokens 0", "at least 1"), ("--minutes nan", "finite"),
])
def test_lengths_that_contradict(flags, words):
    assert words in refused(flags)


# ----------------------------------------------------------------------------------------------------------------------
# --minutes


@pytest.mark.parametrize("seconds, done, count, down", [
    (0.5, 20, 120, 60), (3.0, 2, 20, 10), (100.0, 2, 2, 1), (59.0, 2, 2, 1), (0.5, 150, 150, 75)])
def test_the_fit(seconds, done, count, down):
    run = resolved("--minutes 1 --warmdown_fraction 0.5")[1]
    assert run.unfitted and run.num_iterations == script.UNKNOWN_STEPS
    found = script.fitted(run, seconds, done)
    assert (found.num_iterations, found.warmdown_iters) == (count, down) and not found.unfitted
    others = dataclasses.asdict(run) | dict(num_iterations=count, warmdown_iters=down)
    assert dataclasses.asdict(found) == others
    lrs = [script.plan(step, script.GPTConfig(), found).lr for step in range(count)]
    assert lrs[: count - down] == [found.learning_rate] * (count - down)
    if down > 1:
        assert lrs[-1] == pytest.approx(found.learning_rate / down)


def test_a_warm_up_longer_than_the_time_is_kept():
    run = resolved("--minutes 1 --warmup_iters 50 --warmdown_fraction 0.5")[1]
    found = script.fitted(run, 2.0, 20)
    assert (found.num_iterations, found.warmup_iters, found.warmdown_iters) == (50, 50, 0)


def test_before_the_fit_the_rate_does_not_fall():
    for flags in ("", "--warmdown_fraction 0.5", "--schedule cosine", "--model d12_fast"):
        run = resolved(f"--minutes 5 --learning_rate 0.01 {flags}")[1]
        assert all(script.plan(step, script.GPTConfig(), run).lr == pytest.approx(0.01) for step in (0, 1, 20))


@pytest.fixture
def timed(trainer, monkeypatch):
    """Runs on a clock that the steps alone move: the first takes 30 seconds, each other one `timed.seconds`."""
    clock, found = [0.0], SimpleNamespace(seconds=0.5, steps=0)
    names = {name: getattr(time, name) for name in ("monotonic", "sleep", "time", "strftime", "gmtime")}
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock[0], **names))
    step = script.train_step

    def train_step(*args):
        clock[0] += 30.0 if found.steps == 0 else found.seconds
        found.steps += 1
        return step(*args)

    def run(*flags, code=0):
        found.steps = 0
        typed = [word for word in SMALL if word not in ("--num_iterations", "6", "--warmdown_iters")]
        typed.pop(typed.index("--warmup_iters") + 2)  # warmdown_iters' number
        result = trainer.main(*typed, "--warmdown_fraction", "0.5", "--val_loss_every", "0", *data_flags(trainer.data),
                              "--output_dir", trainer.output, *flags)
        assert result.code == code, result
        return result

    monkeypatch.setattr(script, "train_step", train_step)
    found.run = run
    return found


@pytest.mark.parametrize("seconds, minutes, count, after", [
    (0.5, 0.5, 60, 10), (0.5, 1, 120, 20), (2.0, 0.5, 15, 2), (3.0, 0.2, 4, 2), (0.5, 0.15, 18, 2)])
def test_a_run_ends_when_its_minutes_are_over(timed, seconds, minutes, count, after):
    timed.seconds = seconds
    result = timed.run("--minutes", minutes)
    rows = steps(result.folder)
    assert len(rows) == count
    assert f"num_iterations={count}, warmdown_iters={round(count / 2)}: what {minutes:g} minutes" in result.out
    assert rows[-1]["time"] / 1000 == pytest.approx(30 + (count - 1) * seconds)
    lines = result.out.splitlines()
    assert any(line.startswith("step:1/? |") for line in lines) and f"step:{count}/{count} | loss" in result.out
    said = next(i for i, line in enumerate(lines) if line.startswith("num_iterations="))
    assert all(f"step:{after + 1}/" not in line for line in lines[:said])
    assert rows[-1]["lr"] == pytest.approx(3e-3 / round(count / 2)) and rows[after - 1]["lr"] == pytest.approx(3e-3)
    saved = torch.load(result.folder / checkpoints(result.folder)[-1], weights_only=False)
    assert saved["run"]["num_iterations"] == count and saved["run"]["minutes"] == minutes


def test_a_run_stopped_before_the_fit_or_after_it_resumes_bitwise(timed, monkeypatch):
    whole = timed.run("--minutes", 0.5, "--save_every", 5)
    losses = [row["train_loss"] for row in steps(whole.folder)]
    assert len(losses) == 60
    for step in (5, 30):
        timed.run("--resume", whole.folder / f"step{step:06d}.pt", "--output_dir", whole.folder.parent.parent / f"again{step}")
        folder = next((whole.folder.parent.parent / f"again{step}").iterdir())
        again = [row["train_loss"] for row in steps(folder)]
        assert again == losses[step:], step


def test_a_later_end_in_minutes(timed):
    first = timed.run("--minutes", 0.5)
    result = timed.run("--resume", first.folder, "--minutes", 1)
    assert "num_iterations=120, warmdown_iters=60: what 1 minutes hold of steps of 500.00 ms" in result.out
    assert steps(first.folder)[-1]["step"] == 120


def test_steps_typed_end_the_fit(timed):
    first = timed.run("--minutes", 0.5)
    timed.run("--resume", first.folder, "--num_iterations", 64)
    assert steps(first.folder)[-1]["step"] == 64


@pytest.mark.parametrize("size", [1, 4])
def test_a_dry_run_for_minutes(trainer, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    result = trainer.main("--model", "d12", "--minutes", 5, "--dry_run", "--device", "cuda")
    assert result.code == 0 and f"{8192 * size:,} tokens a step, for 5 minutes\n" in result.out
    line = next(line for line in result.out.splitlines() if "H100" in line)
    speed = float(line.split(" at ")[1].split(" tokens/s")[0].replace(",", ""))
    assert f"on {size} x NVIDIA H100" in line and f": {300 * speed * size / 1e6:,.0f} M tokens at" in line
