"""tools/plan.py: the variant that it gives has the size of the baseline, and its flags give that variant."""
import dataclasses
import re
import subprocess
import sys

import pytest
import torch

import train_gpt2_mod as script
from launch import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import plan  # noqa: E402


def size(flags, how, vocab_size):
    config, run, _ = script.resolve(script.parse_flags(flags), script.ANY_MACHINE._replace(vocab_size=vocab_size))
    with torch.device("meta"):
        model = script.GPT(config)
    return (model.parameter_count() if how == "params" else model.flops_per_token(run.sequence_length)), config


@pytest.mark.parametrize("how", ["params", "flops"])
@pytest.mark.parametrize("baseline, flags, within", [
    ("d12", "--model d12", 0.0), ("d12", "--model d12_gqa", 0.05), ("d12", "--model d12_mqa --n_layer 6", 0.05),
    ("gpt2", "--model d12_swiglu --qk_norm --n_layer 24", 0.05), ("d12_gqa", "--model sized_small", 0.06),
    ("mini", "--model tiny --no_tie_embeddings --sequence_length 256", 0.05), ("d12", "--model d12_mla", 0.05),
    ("sized_medium", "--model sized --n_layer 24", 0.06),
])
def test_the_flags_give_a_network_of_the_baselines_size(how, baseline, flags, within):
    lines = plan.plan(how, baseline, flags.split())
    vocab_size = script.GPTConfig(**script.base_configs[baseline]).vocab_size
    typed = script.parse_flags(flags.split())
    target, _ = size(["--model", baseline, "--sequence_length", str(typed.get("sequence_length", 1024))], how, vocab_size)
    before, was = size(flags.split(), how, vocab_size)
    found, config = size(lines[-1].removeprefix("flags: ").split(), how, vocab_size)
    assert abs(found / target - 1) <= within and abs(found - target) <= abs(before - target)
    assert config.n_head / config.n_kv_head == was.n_head / was.n_kv_head or was.n_kv_head == config.n_kv_head == 1
    changed = {name for name, value in config.network().items() if value != getattr(was, name)}
    assert changed <= {"n_embd", "n_head", "n_kv_head", "ffn_hidden", "mlp_expansion_factor", "vocab_size"}
    assert config.mlp_expansion_factor == pytest.approx(was.mlp_expansion_factor, rel=2e-3)
    counts = [int(text.replace(",", "")) for text in re.findall(r"([\d,]+) parameters", "\n".join(lines))]
    assert counts[0] == size(["--model", baseline], "params", vocab_size)[0] or typed
    assert counts[-1] == size(lines[-1].removeprefix("flags: ").split(), "params", vocab_size)[0]


def test_nothing_nearer_is_to_be_had():
    """Every width with heads of the sizes it may take, one by one."""
    flags, target = dict(model="d12_gqa", n_layer=2), 50_000_000

    def count(changes):
        return plan.build({**flags, **changes}, 50257)[2].parameter_count()

    config = plan.build(flags, 50257)[0]
    found = plan.match(flags, config, target, count)
    best = min((abs(count(dict(n_embd=h * d, n_head=h, n_kv_head=h // 3)) - target)
                for h in range(3, 61, 3) for d in range(32, 129, 8)))
    assert abs(count(found) - target) == best


def test_widths_that_the_network_refuses_are_passed_over(monkeypatch):
    """As the programs of docs/extending.py have them."""
    @dataclasses.dataclass(frozen=True)
    class Strict(script.GPTConfig):
        def __post_init__(self):
            super().__post_init__()
            script.require(self.n_embd % 192 == 0, "n_embd must be a multiple of 192")

    monkeypatch.setattr(script, "GPTConfig", Strict)
    flags, sizes = dict(model="d12", n_layer=2), {}
    config = plan.build(flags, 50257)[0]
    for width in range(192, 1000, 192):
        sizes[width] = plan.build({**flags, "n_embd": width, "n_head": width // 64}, 50257)[2].parameter_count()
    for target in (1, sizes[576], sizes[768] + 1, 30_000_000):
        found = plan.match(flags, config, target, lambda some: plan.build({**flags, **some}, 50257)[2].parameter_count())
        assert abs(sizes[found["n_embd"]] - target) == min(abs(size - target) for size in sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("program, flags", [
    ("24-mamba-2/mamba.py", "d12_mamba2"), ("28-linear-recurrences/recurrences.py", "d12_delta_hybrid"),
    ("23-mixture-of-experts/moe.py", "d12_moe"),
])
def test_a_network_of_a_program_that_extends_the_script(program, flags):
    words = [ROOT / "docs" / program, "tools/plan.py", "--match", "flops", "d12", "--", "--model", flags]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert abs(float(re.search(r"([+-][\d.]+)% in flops", done.stdout)[1])) < 5


@pytest.mark.parametrize("words, part", [
    (["--match", "params", "nothing", "--", "--model", "d12"], "baseline=nothing is not known"),
    (["--match", "params", "d12", "--", "--n_layer", "x"], "--n_layer"),
    (["--match", "size", "d12", "--"], "--match"), (["d12"], "--match"),
    (["--match", "flops", "d12", "--", "--gqa_enabled"], "gqa_enabled"),
])
def test_what_is_refused_is_refused_in_one_line(words, part):
    done = subprocess.run([sys.executable, ROOT / "tools" / "plan.py", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and part in done.stderr


def test_a_preset_made_by_formula_is_a_baseline_too():
    lines = "\n".join(plan.plan("params", "d6_fast", ["--model", "d6_fast"]))
    with torch.device("meta"):
        count = script.GPT(script.GPTConfig(**script.preset("d6_fast")[0])).parameter_count()
    assert f"{count:,} parameters" in lines
