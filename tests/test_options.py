"""Flags of network and run: the schedules, what is refused and why, spellings, and whole runs of other networks."""
import copy
import json
import math
import re

import pytest
import torch
from helpers import machine, small_config, small_run
from launch import (SCRIPT, assert_same, checkpoints, column, content_of, data_flags, records, runs_in, snapshot, steps,
                    torchrun, validations)
from torch.optim.lr_scheduler import CosineAnnealingLR

import train_gpt2_mod as script

NO_SHARDS = machine(vocab_size=0)
CPU = NO_SHARDS._replace(device_type="cpu", has_bf16=False, has_fp8=False)
OLD_GPU = NO_SHARDS._replace(has_bf16=False, has_fp8=False)


def resolved(flags, place=NO_SHARDS):
    return script.resolve(script.parse_flags(flags.split()), place)


# Schedules


def learning_rates(**changes):
    run = small_run(**changes)
    return [script.plan(step, small_config(), run).lr for step in range(run.num_iterations + 1)]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_the_cosine_is_torchs(steps, fraction):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs, rates = CosineAnnealingLR(optimizer, T_max=steps, eta_min=0.3 * fraction), []
    for _ in range(steps + 1):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = learning_rates(schedule="cosine", num_iterations=steps, learning_rate=0.3, min_lr_fraction=fraction)
    assert ours == pytest.approx(rates, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("warmup, steps", [(0, 20), (1, 20), (7, 20), (19, 20), (20, 20)])
def test_the_cosine_after_its_warmup_is_that_of_transformers(warmup, steps):
    """Theirs starts from 0 and reaches the peak in the step after the warm-up, ours in its last."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    factor = get_cosine_schedule_with_warmup(optimizer, warmup, steps).lr_lambdas[0]
    for fraction in (0.0, 0.2):
        ours = learning_rates(schedule="cosine", num_iterations=steps, warmup_iters=warmup, learning_rate=0.3,
                              min_lr_fraction=fraction)
        rising = [0.3 * (step + 1) / warmup for step in range(warmup)]
        falling = [0.3 * (fraction + (1 - fraction) * factor(step)) for step in range(warmup, steps + 1)]
        expected = [min(rate, 0.3) for rate in rising] + falling
        assert ours[:steps] == pytest.approx(expected[:steps], rel=1e-9)
        assert max(ours) == pytest.approx(0.3) and min(ours[:-1]) > 0
        if warmup < steps:
            assert ours[steps] == pytest.approx(0.3 * fraction, abs=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_the_linear_schedule_ends_at_its_share(fraction):
    rates = learning_rates(num_iterations=20, warmup_iters=4, warmdown_iters=8, learning_rate=0.4,
                           min_lr_fraction=fraction)
    falling = [0.4 * (1 - (1 - fraction) * done / 8) for done in range(9)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.4] * 8 + falling, rel=1e-9)


# What is refused: flags, where, the start of the line, its end

COMPILED_LATER = "nothing is compiled unless you add --compile"
REFUSED = [
    ("--n_positions 64", NO_SHARDS, "n_positions=64 would be ignored", "add --position learned"),
    ("--model gpt2 --rope_base 500", NO_SHARDS, "rope_base=500.0 would be ignored", "add --position rope"),
    ("--model gpt2 --use_rope --n_positions 64", NO_SHARDS, "n_positions=64 would be ignored", "position learned"),
    ("--kv_rank 8", NO_SHARDS, "kv_rank=8 would be ignored", "add --mixer latent"),
    ("--model sized --rope_head_dim 8", NO_SHARDS, "rope_head_dim=8 would be ignored", "add --mixer latent"),
    ("--model gpt2 --sequence_length 2048", NO_SHARDS, "sequence_length=2048 is longer than the n_positions=1024",
     "lower it, or start a network with --position rope"),
    ("--model gpt2 --n_positions 64 --sequence_length 65", NO_SHARDS, "sequence_length=65 is longer than the n_pos",
     "--position rope"),
    ("--model gpt2 --n_positions 0 --sequence_length 8", NO_SHARDS, "sequence_length=8 is longer|n_positions=0",
     "rope|at least 1"),
    ("--position absolute", NO_SHARDS, "position=absolute is not known", "choose one of rope, learned"),
    ("--norm batchnorm", NO_SHARDS, "norm=batchnorm is not known", "choose one of|did you mean"),
    ("--norm_eps 0", NO_SHARDS, "norm_eps=0.0 must be above 0", "1e-6 is usual"),
    ("--norm_eps 1", NO_SHARDS, "norm_eps=1.0 must be .* below 1", "1e-6 is usual"),
    ("--dropout 1", NO_SHARDS, "dropout=1.0 must be below 1", "0.1 is usual"),
    ("--dropout -0.1", NO_SHARDS, "dropout=-0.1", "at least 0"),
    ("--dropout 0.1 --window 8", NO_SHARDS, "dropout=0.1 with window=8", "drop one of the two"),
    ("--model d12_window --dropout 0.1", NO_SHARDS, "dropout=0.1 with window=256", "drop one of the two"),
    ("--mixer mamba", NO_SHARDS, "mixer=mamba is not known", "choose one of attention, latent"),
    ("--mixer latent --n_kv_head 4", NO_SHARDS, "mixer=latent with n_kv_head=4", "drop one of the two"),
    ("--mixer latent --gqa_enabled", NO_SHARDS, "mixer=latent with n_kv_head=3", "drop one of the two"),
    ("--model sized --mixer latent", NO_SHARDS, "mixer=latent with n_kv_head=4", "drop one of the two"),
    ("--mixer latent --position learned", NO_SHARDS, "mixer=latent with position=learned", "drop one of the two"),
    ("--model gpt2 --mixer latent", NO_SHARDS, "mixer=latent with position=learned", "drop one of the two"),
    ("--model d12_mla --rope_head_dim 3", NO_SHARDS, "rope_head_dim=3 must be even", "32 is usual"),
    ("--model d12_mla --rope_head_dim 0", NO_SHARDS, "rope_head_dim=0 must be .*at least 2", "32 is usual"),
    ("--model d12_mla --kv_rank 0", NO_SHARDS, "kv_rank=0", "at least 1"),
    ("--init_std 1", NO_SHARDS, "init_std=1.0 must be below 1", "0.02 is usual"),
    ("--init_std -1", NO_SHARDS, "init_std=-1.0", "at least 0"),
    ("--loss_clamp 10", NO_SHARDS, r"loss_clamp=10.0 is not above .* ln\(vocab_size\) = 10.82", "type more, or 0"),
    ("--model sized --loss_clamp 10.39", NO_SHARDS, r"loss_clamp=10.39 is not above .* = 10.40", "type more, or 0"),
    ("--loss_clamp 5", machine(vocab_size=257), r"loss_clamp=5.0 is not above .* = 5.55", "type more, or 0"),
    ("--ffn_hidden 1000 --mlp_expansion_factor 4", NO_SHARDS, "ffn_hidden=1000 is not mlp_expansion_factor=4 times "
     "n_embd=768", "drop one of the two"),
    ("--model sized_small --ffn_hidden 2559 --mlp_expansion_factor 3", NO_SHARDS, "ffn_hidden=2559 is not", "drop one"),
    ("--ffn_hidden -1", NO_SHARDS, "ffn_hidden=-1", "at least 0"),
    ("--mlp geglu", NO_SHARDS, "mlp=geglu is not known", "did you mean|choose one of"),
    ("--mtp_heads separate", NO_SHARDS, "mtp_heads without mtp_enabled would be ignored", "add --mtp_enabled"),
    ("--mtp_enabled --mtp_heads many", NO_SHARDS, "mtp_heads=many is not known", "choose one of shared, separate"),
    ("--schedule step", NO_SHARDS, "schedule=step is not known", "choose one of linear, cosine"),
    ("--schedule cosine --warmdown_iters 5", NO_SHARDS, "warmdown_iters=5 would be ignored: schedule=cosine",
     "drop one of the two"),
    ("--schedule cosine --warmup_iters 1001", NO_SHARDS, "warmup_iters=1001 .*num_iterations=1000", "train longer"),
    ("--min_lr_fraction 0.1", NO_SHARDS, "min_lr_fraction=0.1 would be ignored", "add --warmdown_iters or --schedule"),
    ("--min_lr_fraction 1.5 --schedule cosine", NO_SHARDS, "min_lr_fraction=1.5 must be at most 1", "0.1 is usual"),
    ("--no_compile --compile_mode max-autotune", NO_SHARDS, "compile_mode=max-autotune would be ignored",
     "drop it or --no_compile"),
    ("--compile_mode reduce-overhead", CPU, "compile_mode=reduce-overhead would be ignored", COMPILED_LATER),
    ("--compile_mode fast", NO_SHARDS, "compile_mode=fast is not known", "choose one of default"),
    ("--attention triton", NO_SHARDS, "attention=triton is not known", "choose one of auto, flash, cudnn, math"),
    ("--attention flash", CPU, "attention=flash needs CUDA, and this run is on cpu", "drop it"),
    ("--attention cudnn", CPU._replace(device_type="mps"), "attention=cudnn needs CUDA, .* on mps", "drop it"),
    ("--attention flash --window 8", NO_SHARDS, "attention=flash would be ignored: window=8", "drop one of the two"),
    ("--attention math --model d12_window", CPU, "attention=math would be ignored: window=256", "drop one of the two"),
    ("--empty_cache_every 5", CPU, "empty_cache_every would be ignored", "drop it"),
    ("--precision fp8", CPU, "precision=fp8 needs a GPU with float8", "use bf16"),
    ("--use_fp8", OLD_GPU, "precision=fp8 needs a GPU with float8", "use bf16"),
    ("--precision fp16", CPU, "precision=fp16 needs CUDA", "use bf16 or fp32"),
    ("--precision int8", NO_SHARDS, "precision=int8 is not known", "choose one of|did you mean"),
    ("--precision fast", NO_SHARDS, "precision=fast is not known", "choose one of|did you mean"),
    ("--vocab_size 999 --model sized", machine(vocab_size=257), "vocab_size=999 differs from the shards' vocabulary "
     "of 257", "drop --vocab_size or name other shards"),
    ("--no_use_fp8", NO_SHARDS, "--no_use_fp8 is not a flag", "did you mean|--help"),
    ("--model sized --n_embd 700", NO_SHARDS, "n_embd=700 must be a multiple of 64", "try n_embd 640 or 704"),
]


@pytest.mark.parametrize("flags, place, problem, remedy", REFUSED, ids=[f"{r[0]} {r[1].device_type}" for r in REFUSED])
def test_what_is_refused_says_why_in_one_line(flags, place, problem, remedy):
    with pytest.raises(script.ConfigError) as error:
        resolved(flags, place)
    line = str(error.value)
    assert re.search(rf"^({problem}).*({remedy})", line), line
    assert "\n" not in line and len(line) < 250 and line[-1] not in ". "


@pytest.mark.parametrize("flags, place, field, value", [
    ("--n_positions 1024 --kv_rank 256 --rope_head_dim 32", NO_SHARDS, "position", "rope"),  # redundant, not ignored
    ("--model gpt2 --n_positions 64 --sequence_length 64", NO_SHARDS, "n_positions", 64),
    ("--model gpt2 --use_rope --sequence_length 2048", NO_SHARDS, "position", "rope"),
    ("--dropout 0.1 --window 0", NO_SHARDS, "dropout", 0.1),
    ("--mixer latent --n_kv_head 12", NO_SHARDS, "mixer", "latent"),
    ("--model sized --mixer latent --n_kv_head 0", NO_SHARDS, "kv_rank", 256),
    ("--model d12_mla --window 64", NO_SHARDS, "window", 64),
    ("--n_head 256 --mixer latent", NO_SHARDS, "head_dim", 3),  # only the rotary part need be even
    ("--n_head 256 --position learned", NO_SHARDS, "head_dim", 3),
    ("--loss_clamp 10.83", NO_SHARDS, "loss_clamp", 10.83),
    ("--loss_clamp 5.6", machine(vocab_size=257), "loss_clamp", 5.6),
    ("--ffn_hidden 2048 --mlp_expansion_factor 8/3", NO_SHARDS, "ffn_hidden", 2048),
    ("--ffn_hidden 1000", NO_SHARDS, "mlp_expansion_factor", 1000 / 768),
    ("--model sized_small --mlp_expansion_factor 3", NO_SHARDS, "ffn_hidden", 2304),
    ("--compile_mode default", CPU, "precision", "fp32"),
    ("--compile --compile_mode reduce-overhead", CPU, "precision", "fp32"),
    ("--attention math", CPU, "precision", "fp32"),
    ("--attention flash", NO_SHARDS, "precision", "bf16"),
    ("--empty_cache_every 0", CPU, "precision", "fp32"),
    ("--empty_cache_every 5", CPU._replace(device_type="mps"), "precision", "fp32"),
    ("--schedule cosine --warmup_iters 1000 --min_lr_fraction 1", NO_SHARDS, "precision", "bf16"),
])
def test_what_is_not_refused(flags, place, field, value):
    config, _, _ = resolved(flags, place)
    assert getattr(config, field) == value


# Spellings, heads, vocabulary


@pytest.mark.parametrize("flag, place, field, value", [
    ("--use_fp8", NO_SHARDS, "precision", "fp8"), ("--use-fp8", NO_SHARDS, "precision", "fp8"),
    ("--use-amp", NO_SHARDS, "precision", "bf16"), ("--use_amp", OLD_GPU, "precision", "fp16"),
    ("--use-amp", CPU, "precision", "bf16"),
    ("--model gpt2 --use-rope", NO_SHARDS, "position", "rope"), ("--use_rope", NO_SHARDS, "position", "rope"),
    ("--model gpt2 --use-rmsnorm", NO_SHARDS, "norm", "rmsnorm"), ("--use_rmsnorm", NO_SHARDS, "norm", "rmsnorm"),
    ("--use-gradient-checkpointing", NO_SHARDS, "gradient_checkpointing", True),
    ("--gradient-checkpointing", NO_SHARDS, "gradient_checkpointing", True),
    ("--d_model 640 --n_layers 3", NO_SHARDS, "n_layer", 3), ("--d-model=640", NO_SHARDS, "n_embd", 640),
    ("--n_heads 6 --n-kv-heads 2", NO_SHARDS, "n_kv_head", 2),
    ("--no_tie_embeddings", NO_SHARDS, "tie_embeddings", False),
    ("--no-scale-attention", NO_SHARDS, "scale_attention", False),
])
def test_switches_and_aliases(flag, place, field, value):
    assert getattr(resolved(flag, place)[0], field) == value


@pytest.mark.parametrize("flag", [
    f"--{name.replace('_', dash)}{between}12" for name in
    ("grad_accumulation_steps", "grad_accum_steps", "gradient_accumulation_steps") for dash in "_-" for between in "= "
])
def test_all_spellings_of_accumulation(flag):
    for size in (1, 2, 4):
        _, run, notes = resolved(f"{flag} --batch_size 8", NO_SHARDS._replace(world_size=size))
        assert run.grad_accumulation_steps == 12 and run.tokens_per_step == 12 * 8 * 1024
        assert "tokens per step: 98,304 = 12 x 8 x 1024 (micro-batches x sequences x tokens)" in notes


@pytest.mark.parametrize("flags, heads, kv_heads", [
    ("--model sized", 12, 4), ("--model sized --d_model 640", 10, 2), ("--model sized --d_model 896", 14, 2),
    ("--model sized --d_model 1024", 16, 4), ("--model sized --d_model 1280", 20, 4),
    ("--model sized --d_model 64", 1, 1), ("--model sized --n_heads 6", 6, 3),
    ("--model sized --d_model 640 --n_kv_heads 5", 10, 5), ("--model gpt2-medium --n_embd 640", 10, 10),
])
def test_heads_of_a_typed_width_and_what_the_notes_say(flags, heads, kv_heads):
    config, _, notes = resolved(flags)
    assert (config.n_head, config.n_kv_head) == (heads, kv_heads)
    said = " | ".join(notes)
    assert (f"n_head={heads}: heads of size 64 for n_embd={config.n_embd}" in said) == (
        "d_model" in flags or "n_embd" in flags)
    changed = "sized" in flags and "kv_heads" not in flags and kv_heads != 4
    assert (f"n_kv_head={kv_heads}: the largest divisor of n_head={heads} up to 4" in said) == changed


@pytest.mark.parametrize("flags, shards, size, said", [
    ("--model sized", 0, 32768, None), ("--model sized", 32768, 32768, None),
    ("--model sized", 257, 257, "vocab_size=257: the shards', not 32768"),
    ("--model sized --vocab_size 257", 257, 257, None), ("--model sized --vocab_size 99", 0, 99, None),
    ("--model d12", 0, 50257, None), ("--model d12", 257, 257, None), ("--model gpt2", 50257, 50257, None),
])
def test_the_vocabulary_of_shards_preset_and_flag(flags, shards, size, said):
    config, _, notes = resolved(flags, machine(vocab_size=shards))
    assert config.vocab_size == size
    assert [note for note in notes if "vocab_size" in note and "vocab" not in flags] == ([said] if said else [])


# Whole runs

NETWORKS = {
    "gpt2": "--model gpt2 --n_positions 32 --schedule cosine --min_lr_fraction 0.1 --warmdown_iters 0",
    "sized": "--model sized --n_head 4 --n_kv_head 2 --gradient_checkpointing",
    "mla": "--model d12_mla --kv_rank 8 --rope_head_dim 4 --mtp_enabled --mtp_heads separate --mtp_rampup_steps 4",
    "separate": "--mtp_enabled --mtp_heads separate --mtp_max_steps 3 --dropout 0.2 --no_tie_embeddings --bias",
    "clamped": "--norm layernorm --norm_weights --bias --mlp relu2 --init_std 0.02 --loss_clamp 5.6 --ffn_hidden 85",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_learn_and_resume_bitwise(trainer, name):
    long = "--num_iterations 16 --learning_rate 1e-2 --save_every 8 --val_loss_every 8"
    whole = trainer.run(*long.split(), *NETWORKS[name].split()).folder
    losses = column(steps(whole), "train_loss")
    assert losses[0] == pytest.approx(math.log(257), rel=0.1) and sum(losses[-4:]) / 4 < losses[0] - 0.3
    part = trainer.copy_of(whole, "interrupted")
    (part / "step000016.pt").unlink()
    result = trainer.main("--resume", part / "step000008.pt")
    assert (result.code, result.err) == (0, "") and checkpoints(part) == checkpoints(whole)
    for rows, key in ((steps, "train_loss"), (steps, "grad_norm"), (steps, "lr"), (validations, "val_loss"),
                      (validations, "val_mtp_loss")):
        assert column(rows(part), key) == column(rows(whole), key), key
    a, b = content_of(whole, 16), content_of(part, 16)
    for key in ("model", "optimizer", "loader", "rng", "scaler", "network"):
        assert_same(a[key], b[key], key)
    blocks = {key.split(".")[1] for key in a["model"] if key.startswith("mtp_blocks.")}
    assert blocks == {"mla": {"2"}, "separate": {"2", "3"}}.get(name, set())
    moved = [key for key, w in content_of(whole, 8)["model"].items() if torch.equal(w, a["model"][key])]
    assert not moved  # every weight learns


def test_what_stays_in_fp32_is_multiplied_in_it_where_that_is_the_precision(trainer):
    """TensorFloat-32, of CUDA alone, has 10 bits of fp32's 23."""
    for precision, allowed in (("fp32", "highest"), ("bf16", "high"), ("fp32", "highest")):
        trainer.run("--precision", precision, "--num_iterations", 4, "--input_val_bin", "", "--no_save_checkpoints")
        assert torch.get_float32_matmul_precision() == allowed


def test_gradient_checkpointing_changes_no_run(trainer):
    flags = NETWORKS["separate"].split()
    plain, again = (trainer.run(*flags, *more).folder for more in ((), ("--use-gradient-checkpointing",)))
    assert column(steps(plain), "train_loss") == column(steps(again), "train_loss")
    assert_same(content_of(plain, 6)["model"], content_of(again, 6)["model"])


@pytest.mark.parametrize("network", ["", "--model sized --n_head 4 --n_kv_head 2", NETWORKS["mla"]])
def test_the_plain_attention_kernel_has_the_losses_of_the_others(trainer, network):
    auto, math_, other = (trainer.run(*network.split(), *flags) for flags in ((), ("--attention", "math"), ()))
    for rows, key in ((steps, "train_loss"), (steps, "grad_norm"), (validations, "val_loss")):
        found = column(rows(math_.folder), key)
        assert found == pytest.approx(column(rows(auto.folder), key), rel=1e-5), key
    assert column(steps(auto.folder), "train_loss") == column(steps(other.folder), "train_loss")
    lines = [line for line in math_.out.splitlines() if line.startswith("attention kernel")]
    assert lines == ["attention kernel: math"]
    assert math_.out.index(lines[0]) < math_.out.index("step:1/")
    assert re.search(r"^attention kernel: \w+$", auto.out, re.M)
    assert lines[0] in next(math_.folder.glob("*.log")).read_text().splitlines()


def test_a_window_has_its_own_kernel_and_the_log_says_why(trainer):
    line = "attention kernel for a window of 8 tokens: torch's for a dense mask, which skips nothing"
    assert line in trainer.run("--window", 8).out.splitlines()
    assert "attention kernel: " in trainer.run("--window", 32).out  # over the whole sequence it is full attention


def test_the_cap_is_in_the_training_loss_alone(trainer):
    """A cap just above the loss at the start, of the shards' vocabulary; validation does without."""
    capped, free = (trainer.run("--val_loss_every", 1, *flags).folder for flags in (("--loss_clamp", 5.56), ()))
    first = [column(steps(folder), "train_loss")[0] for folder in (capped, free)]
    assert first[0] < first[1] and all(loss <= 5.56 for loss in column(steps(capped), "train_loss"))
    last = max(column(validations(capped), "val_loss"))
    assert column(validations(capped), "val_loss") != column(validations(free), "val_loss") and last > 5.56


BIASED = ("--model gpt2 --n_positions 32 --dropout 0 --mtp_enabled --mtp_heads separate --mtp_rampup_steps 3 "
          "--gradient_checkpointing --grad_accumulation_steps 4 --no_tie_embeddings")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [BIASED, "--mtp_enabled --mtp_heads separate --mtp_weight 0 --grad_accum_steps 2"])
def test_two_processes_are_one(trainer, tmp_path, flags):
    """Biases, learned positions, LayerNorms and separate heads, these also where their losses do not count."""
    one = trainer.run(*flags.split()).folder
    trainer.output = tmp_path / "two"
    result = torchrun(SCRIPT, *trainer.flags(*flags.split()), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    two, = runs_in(trainer.output)
    assert column(records(one), "step") == column(records(two), "step")
    for rows, key in ((steps, "train_loss"), (steps, "grad_norm"), (validations, "val_loss"),
                      (validations, "val_mtp_loss")):
        assert column(rows(two), key) == pytest.approx(column(rows(one), key), abs=1e-5), key
    a, b = content_of(one, 6)["model"], content_of(two, 6)["model"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


# Fields that came later than the first checkpoints
LATER = {
    "network": ("tie_embeddings", "bias", "dropout", "norm", "norm_weights", "norm_eps", "position", "n_positions",
                "mixer", "kv_rank", "rope_head_dim", "scale_attention", "ffn_hidden", "init_std", "mtp_heads",
                "loss_clamp", "gradient_checkpointing", "logit_softcap", "softmax_scale", "document_mask",
                "value_embeddings", "x0_lambdas", "embd_norm", "embd_init_std", "zero_init"),
    "run": ("schedule", "min_lr_fraction", "compile_mode", "attention", "empty_cache_every", "save_every_minutes",
            "keep_last", "nan_policy", "nan_limit", "deterministic", "optimizer", "embedding_lr", "head_lr", "scalar_lr",
            "muon_lr", "muon_momentum", "momentum_warmup_steps", "cautious_weight_decay", "adam_eps", "parallel",
            "gradient_dtype"),
}


@pytest.mark.parametrize("flags", ["", "--mlp swiglu --mlp_expansion_factor 8/3 --mtp_enabled --qk_norm --n_kv_head 1"])
def test_a_checkpoint_without_the_later_fields_resumes_the_same(trainer, flags):
    whole = trainer.run("--save_every", 3, *flags.split()).folder
    old = trainer.copy_of(whole, "old")
    (old / "step000006.pt").unlink()
    content, saved = content_of(old, 3), json.loads((old / "config.json").read_text())
    for part, names in LATER.items():
        for name in names:
            del content[part][name], saved[part][name]
    script.write_checkpoint(old / "step000003.pt", content)
    (old / "config.json").write_text(json.dumps(saved))
    wanted = dict(n_layer=2, n_embd=32, norm="rmsnorm", ffn_hidden=85 if flags else 128)
    found = script.checkpoints_of_runs(old.parent, wanted)
    assert list(found) == [old / "step000003.pt"]
    assert not list(script.checkpoints_of_runs(old.parent, dict(n_layer=3)))
    result = trainer.main("--resume", "auto", "--output_dir", old.parent)
    assert (result.code, result.err) == (0, "")
    assert re.findall(r"differs from the checkpoint: (\w+)", result.out) == ["output_dir"]  # the copy's
    moved = dict(output_dir="")
    for key in ("model", "optimizer", "loader", "rng", "network", "run"):
        a, b = content_of(whole, 6)[key], content_of(old, 6)[key]
        assert_same(a | moved, b | moved, key) if key == "run" else assert_same(a, b, key)


def test_a_batch_size_that_is_found_is_kept_in_a_resume(trainer, monkeypatch):
    """With the steps of one that is typed, bit for bit; on a machine with other memory too."""
    free = [100]
    monkeypatch.setattr(script.World, "free_memory", lambda self: free[-1])
    flags = ["--total_batch_size", 128, "--save_every", 3]
    typed = trainer.run("--batch_size", 2, *flags).folder
    config, run = (cls(**content_of(typed, 6)[part]) for cls, part in ((script.GPTConfig, "network"),
                                                                       (script.TrainConfig, "run")))
    free.append(1.001 / 0.9 * sum(script.memory_plan(config, run, script.GPT(config)).values()))
    result = trainer.run("--batch_size", "auto", *flags)
    assert re.search(r"^batch_size=2: a plan of", result.out, re.M)
    found = json.loads((result.folder / "config.json").read_text())["run"]
    assert (found["batch_size"], found["grad_accumulation_steps"]) == (2, 2)
    free.append(100)
    part = trainer.copy_of(result.folder, "elsewhere")
    assert trainer.main("--resume", part / "step000003.pt").code == 0
    for folder in (result.folder, part):
        assert column(steps(folder), "train_loss") == column(steps(typed), "train_loss")
        assert content_of(folder, 6)["run"]["batch_size"] == 2
    refused = trainer.main("--resume", part / "step000003.pt", "--batch_size", "auto")
    assert refused.code == 2 and "one sequence of 32 takes" in refused.err and refused.err.count("\n") == 1


@pytest.mark.slow
def test_a_resume_may_change_what_only_colours_a_run(trainer):
    folder = trainer.run("--save_every", 3).folder
    flags = "--dropout 0.1 --gradient_checkpointing --loss_clamp 11 --schedule cosine --warmdown_iters 0".split()
    copy = trainer.copy_of(folder, "coloured")
    result = trainer.main("--resume", copy / "step000003.pt", *flags, "--attention", "math")
    assert (result.code, result.err) == (0, "")
    for line in ("dropout=0.1, was 0.0", "gradient_checkpointing=True, was False", "loss_clamp=11.0, was 0.0",
                 "schedule=cosine, was linear", "attention=math, was auto"):
        assert f"differs from the checkpoint: {line}" in result.out
    before = snapshot(trainer.output)
    for flag in ("--norm layernorm", "--bias", "--no_tie_embeddings", "--ffn_hidden 64", "--norm_eps 1e-5",
                 "--position learned", "--no_scale_attention", "--mlp relu2"):
        result = trainer.main("--resume", folder / "step000003.pt", *flag.split())
        assert result.code == 2 and "holds another network" in result.err, flag
        assert "start without --resume" in result.err and result.err.count("\n") == 1
    assert snapshot(trainer.output) == before


def test_weights_that_are_not_their_networks_are_refused(trainer):
    """A file whose weights have another shape than it says, and one without what --init_from needs."""
    path = trainer.run().folder / "step000006.pt"
    content = torch.load(path, weights_only=True)
    other = path.with_name("other.pt")
    for change in (lambda c: c["network"].update(n_layer=3), lambda c: c["run"].pop("model"), lambda c: c.pop("model")):
        changed = copy.deepcopy(content)
        change(changed)
        script.write_checkpoint(other, changed)
        result = trainer.main("--init_from", other, *data_flags(trainer.data), "--output_dir", trainer.output,
                              *"--batch_size 2 --sequence_length 32 --num_iterations 2 --device cpu".split())
        assert result.code == 2 and result.err.count("\n") == 1 and result.err.startswith(f"error: {other} "), result
        assert result.folder is None


def test_another_factor_for_the_same_hidden_width_is_the_same_network(trainer):
    whole = trainer.run("--mlp_expansion_factor", 2.67)
    again = trainer.run("--mlp_expansion_factor", "8/3", "--init_from", whole.folder / "step000006.pt")
    assert script.hidden_width(2.67, 32) == script.hidden_width(8 / 3, 32) == 85
    assert steps(again.folder)[0]["train_loss"] < steps(whole.folder)[0]["train_loss"]
    refused = trainer.main(*trainer.flags("--ffn_hidden", 84, "--init_from", whole.folder / "step000006.pt"))
    assert refused.code == 2 and "ffn_hidden 85, not 84" in refused.err


def test_weights_beside_resume(trainer):
    """--resume auto goes on with the run that began with the weights, and with no other; a path says the same twice."""
    other = trainer.run("--n_layer", 1)
    start = trainer.copy_of(trainer.run().folder, "elsewhere") / "step000006.pt"
    for path in trainer.output.glob("*/step*.pt"):
        path.unlink() if path.parent != other.folder else None
    flags = ["--init_from", start, "--resume", "auto", *data_flags(trainer.data), "--output_dir", trainer.output,
             *"--batch_size 2 --sequence_length 32 --num_iterations 2 --device cpu".split()]
    first = trainer.main(*flags)
    assert first.code == 0 and "fresh start" in first.out and f"weights from {start}" in first.out
    again = trainer.main(*flags, "--num_iterations", 4)
    assert again.code == 0 and again.folder is None and column(steps(first.folder), "step") == [1, 2, 3, 4]
    both = trainer.main(*trainer.flags("--init_from", start, "--resume", start))
    assert both.code == 2 and "resume and init_from both" in both.err
    nothing = trainer.main(*trainer.flags("--init_from", trainer.data))
    assert nothing.code == 2 and "tools/hf.py import" in nothing.err
    same = trainer.main(*flags[:2], *flags[4:], "--n_embd", 32)  # which asks for no heads of size 64
    assert same.code == 0
