"""From flags to a configuration: the rules, what they refuse, and how they say so."""
import dataclasses
import re
import types

import pytest
import torch
from helpers import all_fields, machine
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt2_mod as script


def resolved(*argv, base=None, **place):
    config, run, _ = script.resolve(script.parse_flags(" ".join(argv).split()), machine(**place), base)
    return config, run


def heads(config):
    return config.n_embd, config.n_head, config.n_kv_head


def test_gqa_enabled_keeps_a_quarter_of_the_heads_and_widens():
    config, _ = resolved("--gqa_enabled")
    assert heads(config) == (864, 12, 3) and config.head_dim == 72 and config.gqa_enabled


@pytest.mark.parametrize("flags, expected", [
    ("--gqa_enabled --embd_scale 1", (768, 12, 3)),
    ("--gqa_enabled --n_kv_head 4", (864, 12, 4)),
    ("--gqa_enabled --n_kv_head 4 --embd_scale 1.0", (768, 12, 4)),
    ("--gqa_enabled --kv_head_ratio 0.5", (864, 12, 6)),
    ("--gqa_enabled --model d12_gqa", (864, 12, 4)),  # the preset's own number stays
    ("--gqa_enabled --model d12_gqa --kv_head_ratio 0.25", (864, 12, 3)),
    ("--gqa_enabled --n_embd 1024", (1152, 16, 4)),
    ("--n_kv_head 6", (768, 12, 6)),
    ("--n_kv_head 0", (768, 12, 12)),
    ("--model d12_gqa --n_kv_head 0", (768, 12, 12)),
    ("--model d12_gqa", (768, 12, 4)),
    ("--kv_head_ratio 0.5", (768, 12, 6)),
    ("--kv_head_ratio 1", (768, 12, 12)),
    ("--model d12_mqa --kv_head_ratio 1", (768, 12, 12)),
    ("--kv_head_ratio 0.45", (768, 12, 4)),  # 5.4 heads; 5 is no divisor
    ("--kv_head_ratio 0.9", (768, 12, 6)),
    ("--kv_head_ratio 0.01", (768, 12, 1)),
    ("--model d12_mlp3x --kv_head_ratio 0.5", (832, 13, 1)),
])
def test_key_value_heads(flags, expected):
    assert heads(resolved(flags)[0]) == expected


@pytest.mark.parametrize("n_head", [1, 2, 5, 6, 12, 13, 16, 25])
@pytest.mark.parametrize("ratio", [0.03, 0.2, 0.25, 1 / 3, 0.5, 0.75, 1.0])
def test_a_ratio_is_rounded_down_to_a_divisor_of_at_least_one(n_head, ratio):
    config, _ = resolved(f"--n_head {n_head} --n_embd {8 * n_head} --kv_head_ratio {ratio}")
    divisors = [k for k in range(1, n_head + 1) if n_head % k == 0]
    assert config.n_kv_head == max([k for k in divisors if k <= n_head * ratio], default=1)


def test_a_scaled_width_has_heads_of_a_multiple_of_eight():
    for n_head in (1, 3, 12, 13, 25):
        for head_dim in (8, 20, 64, 72):
            for scale in (0.3, 0.9, 1.05, 1.12, 1.5, 2.0):
                width = n_head * head_dim
                config, _ = resolved(f"--n_head {n_head} --n_embd {width} --embd_scale {scale}")
                assert config.n_head == n_head and config.n_embd == n_head * config.head_dim
                assert config.head_dim % 8 == 0
                assert abs(config.head_dim - head_dim * scale) <= 4 + 1e-9 or config.head_dim == 8
    assert resolved("--n_head 3 --n_embd 60 --embd_scale 1")[0].head_dim == 20  # nothing to round where nothing scales


@pytest.mark.parametrize("preset", ["d12", "d12_mlp3x", "d48", "tiny"])
def test_a_width_alone_takes_heads_of_64(preset):
    config, _ = resolved(f"--model {preset} --n_embd 640")
    assert (config.n_embd, config.n_head, config.head_dim) == (640, 10, 64)
    assert config.n_layer == script.GPTConfig(**script.base_configs[preset]).n_layer
    config, _ = resolved(f"--model {preset} --n_embd 640 --n_head 5")
    assert config.head_dim == 128


def test_what_is_typed_beats_the_preset_which_beats_the_default():
    config, run = resolved("--model d12_window --window 9 --no_qk_norm --n_layer 3")
    assert (config.window, config.qk_norm, config.post_norm, config.n_layer) == (9, False, True, 3)
    assert config.n_embd == 768 and run.model == "d12_window" and run.batch_size == script.TrainConfig.batch_size


def test_fractions_are_numbers():
    config, _ = resolved("--mlp swiglu --mlp_expansion_factor 8/3")
    assert config == script.GPTConfig(**script.base_configs["d12_swiglu"])
    assert config.ffn_hidden == 2048 and config.mlp_expansion_factor == 8 / 3
    assert resolved("--embd_scale 9/8")[0].n_embd == 864
    assert script.number("3") == 3.0 and script.number("2.5") == 2.5


def test_a_micro_batch_for_each_process_is_the_default():
    for size in (1, 2, 8):
        _, run = resolved("--batch_size 4 --sequence_length 128", world_size=size)
        assert run.grad_accumulation_steps == size and run.tokens_per_step == 4 * 128 * size
        assert run.grad_accumulation_steps * run.batch_size == 4 * size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tokens_or_micro_batches_a_step(size):
    for flags in ("--total_batch_size 65536", "--grad_accumulation_steps 8",
                  "--total_batch_size 65536 --grad_accumulation_steps 8"):
        _, run = resolved("--batch_size 8 --sequence_length 1024", flags, world_size=size)
        assert run.grad_accumulation_steps == 8 and run.tokens_per_step == 65536


def checkpoint(*argv, **place):
    """What resolve() takes as its base on resume."""
    config, run = resolved(*argv, **place)
    return script.checkpoint_fields(dict(network=dataclasses.asdict(config), run=dataclasses.asdict(run)))


def test_a_resume_keeps_the_tokens_of_a_step():
    base = checkpoint("--batch_size 8 --sequence_length 128 --grad_accumulation_steps 12")
    for flags, size, steps in [("", 1, 12), ("", 4, 12), ("--batch_size 4", 1, 24), ("--batch_size 16", 2, 6),
                               ("--sequence_length 256", 3, 6), ("--sequence_length 64 --batch_size 2", 8, 96)]:
        _, run = resolved(flags, base=base, world_size=size)
        assert run.grad_accumulation_steps == steps and run.tokens_per_step == 8 * 128 * 12
    assert resolved("--grad_accumulation_steps 24", base=base)[1].tokens_per_step == 8 * 128 * 24
    assert resolved("--total_batch_size 2048", base=base)[1].grad_accumulation_steps == 2
    with pytest.raises(script.ConfigError, match="=12288 must be a multiple of .* = 8 x 128 x 5 = 5120"):
        resolved(base=base, world_size=5)


def test_a_resume_keeps_the_network_and_the_precision():
    base = checkpoint("--model d12_gqa --n_layer 5 --window 9 --mtp_enabled --mtp_weight 0.3 --n_embd 256 --n_head 4"
                      " --n_kv_head 2 --learning_rate 0.01", vocab_size=257)
    config, run = resolved(base=base, vocab_size=257, device_type="cpu", has_bf16=False)
    assert base.pop("tokens_per_step") == run.tokens_per_step
    assert {**dataclasses.asdict(config), **dataclasses.asdict(run)}.items() >= base.items()
    assert config.precision == "bf16"
    config, run = resolved("--mtp_weight 0.5 --num_iterations 2000", base=base, vocab_size=257)
    assert (config.mtp_weight, run.num_iterations, run.learning_rate, config.n_layer) == (0.5, 2000, 0.01, 5)
    config, run = resolved("--model tiny", base=base, vocab_size=257)
    assert config == script.GPTConfig(vocab_size=257, **script.base_configs["tiny"]) and run.learning_rate == 0.01


def test_precision_unless_typed_is_what_the_machine_does_well():
    assert resolved()[0].precision == "bf16"
    assert resolved(has_bf16=False)[0].precision == "fp32"
    assert resolved(device_type="cpu", has_bf16=False)[0].precision == "fp32"
    assert resolved("--precision bf16", device_type="cpu", has_bf16=False)[0].precision == "bf16"
    assert resolved("--precision fp16")[0].precision == "fp16"
    assert resolved("--precision fp32")[0].precision == "fp32"


def test_the_vocabulary_is_the_shards():
    assert resolved()[0].vocab_size == 50257
    assert resolved(vocab_size=257)[0].vocab_size == resolved("--vocab_size 257", vocab_size=257)[0].vocab_size == 257


def test_lookahead_is_what_the_loss_needs():
    assert resolved()[0].lookahead == 1
    assert resolved("--mtp_enabled --mtp_max_steps 5")[0].lookahead == 5


# What is refused: the flags, the start of the line (the value and what is wrong) and its end (what to do).
REFUSED = [
    ("--model d12_swigul", "model=d12_swigul is not known", r"did you mean d12_swiglu\?"),
    ("--model zzzzzz", "model=zzzzzz is not known", "--help lists them"),
    ("--mlp xyz", "mlp=xyz is not known", "choose one of gelu, gelu_tanh, relu2, swiglu"),
    ("--precision bf17", "precision=bf17 is not known", r"did you mean bf16\?"),
    ("--device tpu", "device=tpu is not known", "did you mean|choose one of"),
    ("--n_layer 0", "n_layer=0", "must be at least 1"),
    ("--n_head 0", "n_head=0", "must be at least 1"),
    ("--n_head 0 --embd_scale 1.5", "n_head=0", "must be at least 1"),
    ("--n_head -3 --n_embd 63", "n_head=-3", "at least"),
    ("--n_head 5", "n_embd=768 must be a multiple of n_head=5", "try n_embd 765 or 770"),
    ("--n_head 12 --n_embd 3", "n_embd=3 must be a multiple of n_head=12", "try n_embd 12"),
    ("--n_head 3 --n_embd 9", "n_embd=9 with n_head=3 gives head size 3", "even"),
    ("--n_kv_head 5", "n_head=12 must be a multiple of n_kv_head=5", "try one of 1, 2, 3, 4, 6, 12"),
    ("--n_kv_head 24", "n_head=12 must be a multiple of n_kv_head=24", "try one of 1, 2, 3, 4, 6, 12"),
    ("--n_kv_head -1", "n_kv_head=-1", "at least 0"),
    ("--n_embd 700", "n_embd=700 must be a multiple of 64", "try n_embd 640 or 704"),
    ("--n_embd 32", "n_embd=32 must be a multiple of 64", "try n_embd 64"),
    ("--n_embd -64", "n_embd=-64 must be a multiple of 64", "try n_embd 64"),
    ("--mlp_expansion_factor 0.0001", "mlp_expansion_factor=0.0001", "hidden unit"),
    ("--mlp_expansion_factor nan", "mlp_expansion_factor=nan", "finite number of at least 0"),
    ("--mlp_expansion_factor 8/0", "argument --mlp_expansion_factor: .*'8/0'", "--help"),
    ("--mlp_expansion_factor 1e307", "mlp_expansion_factor=1e", ""),
    ("--rope_base 0.5", "rope_base=0.5 must be above 1", "10000 is usual"),
    ("--window -1", "window=-1", "finite number of at least 0"),
    ("--gqa_enabled --n_kv_head 12", "gqa_enabled .* n_head=12, not n_kv_head=12", "drop one"),
    ("--gqa_enabled --n_kv_head 0", "gqa_enabled .* n_head=12, not n_kv_head=12", "drop one"),
    ("--gqa_enabled --kv_head_ratio 1", "kv_head_ratio=1.0 leaves all 12", "lower the ratio"),
    ("--kv_head_ratio 0.5 --n_kv_head 4", "n_kv_head and kv_head_ratio both", "drop one"),
    ("--kv_head_ratio 1.5", "kv_head_ratio=1.5", "above 0 and at most 1"),
    ("--kv_head_ratio nan", "kv_head_ratio=nan", "above 0 and at most 1"),
    ("--embd_scale 0", "embd_scale=0.0", "above 0"),
    ("--embd_scale nan", "embd_scale=nan", "above 0"),
    ("--embd_scale inf", "embd_scale=inf", ""),
    ("--mtp_weight 0.5", "mtp_weight without mtp_enabled would be ignored", "add --mtp_enabled"),
    ("--mtp_max_steps 3 --mtp_rampup_steps 4", "mtp_max_steps, mtp_rampup_steps without mtp_enabled", "add --mtp_en"),
    ("--mtp_weight 0.5 --no_mtp_enabled", "mtp_weight without mtp_enabled", "add --mtp_enabled"),
    ("--mtp_enabled --mtp_max_steps 0", "mtp_max_steps=0", "at least 1"),
    ("--vocab_size 50304", "vocab_size=50304 differs from the shards' vocabulary of 50257", "drop --vocab_size"),
    ("--total_batch_size 10000", "total_batch_size=10000 .* 8 x 1024 x 1 = 8192", "try 8192 or 16384"),
    ("--total_batch_size 100", "total_batch_size=100 .* = 8192", "try 8192"),
    ("--total_batch_size 0", "total_batch_size=0", "try 8192"),
    ("--total_batch_size -5", "total_batch_size=-5", "try 8192"),
    ("--total_batch_size 16384 --grad_accumulation_steps 3",
     "total_batch_size=16384 takes 2 micro-batches, not grad_accumulation_steps=3", "drop one of the two"),
    ("--grad_accumulation_steps 0", "grad_accumulation_steps=0", "try 1"),
    ("--grad_accumulation_steps -2", "grad_accumulation_steps=-2", "try 1"),
    ("--batch_size 0", "batch_size=0", "at least 1"),
    ("--batch_size -1 --sequence_length -8", "batch_size=-1", "at least 1"),
    ("--learning_rate -1", "learning_rate=-1.0", "at least 0"),
    ("--learning_rate inf", "learning_rate=inf", "finite number"),
    ("--beta2 1", "beta2=1.0 must be below 1", "usual"),
    ("--warmup_iters 600 --warmdown_iters 500",
     r"warmup_iters=600 \+ warmdown_iters=500 must not exceed num_iterations=1000", "shorten them or train longer"),
    ("--num_iterations 0", "num_iterations=0", "at least 1"),
    ("--nan_policy explode", "nan_policy=explode is not known", "choose one of stop, skip, rollback"),
    ("--nan_limit 0", "nan_limit=0", "at least 1"),
    ("--nan_policy stop --nan_limit 3", "nan_limit=3 would be ignored: nan_policy=stop", "drop one of the two"),
    ("--nan_policy rollback --no_save_checkpoints", "nan_policy=rollback goes back", "drop --no_save_checkpoints"),
    ("--no_save_checkpoints --save_every 2", "save_every=2 would be ignored", "drop it or --no_save_checkpoints"),
    ("--no_save_checkpoints --save_every_minutes 2", "save_every_minutes=2.0 would be ignored", "drop it or --no_"),
    ("--no_save_checkpoints --keep_last 2", "keep_last=2 would be ignored", "drop it or --no_save_checkpoints"),
    ("--keep_last -1", "keep_last=-1", "at least 0"),
    ("--save_every_minutes nan", "save_every_minutes=nan", "finite number of at least 0"),
    ("--batch_size auto", "batch_size=auto keeps the tokens a step", "say how many with --total_batch_size"),
    ("--batch_size auto --grad_accumulation_steps 2", "batch_size=auto keeps the tokens", "--total_batch_size"),
    ("--batch_size auto --total_batch_size 2500", "total_batch_size=2500 .* 1024 x 1", "try 2048 or 3072"),
    ("--batch_size auto --total_batch_size -5", "total_batch_size=-5", "try 1024"),
    ("--batch_size auto --total_batch_size 4096 --sequence_length 0", "sequence_length=0", "at least 1"),
    ("--batch_size auto --total_batch_size 8192", "batch_size=auto needs a device that says how much memory is free",
     "type a number"),
    ("--batch_size many", "argument --batch_size: .*'many'", "--help"),
    ("--seed -1", "seed=-1", "at least 0"),
    ("--n_headd 4", "--n_headd is not a flag", r"did you mean --n_head\?"),
    ("--qqqqqq 4", "--qqqqqq is not a flag", "--help"),
    ("--no-gqa-enabled", "--no_gqa_enabled is not a flag", "did you mean|--help"),
    ("n_head=4", "n_head is not a flag", r"did you mean --n_head\?"),
    ("--n_head four", "argument --n_head.*'four'", "--help"),
    ("--n_head", "argument --n_head.*expected one argument", "--help"),
]


# A batch size that is found

KINDS = ["", "--sequence_length 96", "--gradient_checkpointing", "--precision fp8", "--model gpt2 --n_layer 2",
         "--optimizer muon"]


def built(config):
    with torch.device("meta"):
        return script.GPT(config)


def plan_of(model, tokens, size, T, world, training=True, optimizer="adamw"):
    """Bytes of a step of so many tokens in micro-batches of a size, by the memory plan."""
    run = script.TrainConfig(batch_size=size, sequence_length=T, grad_accumulation_steps=tokens // (size * T) or 1,
                             optimizer=optimizer)
    return sum(script.memory_plan(model.config, run, model, world, training).values())


@pytest.mark.parametrize("flags", KINDS)
@pytest.mark.parametrize("rows, world", [(1, 1), (30, 1), (32, 4), (7, 1), (36, 3)])
def test_the_batch_size_that_is_found_is_the_largest_divisor_that_fits(flags, rows, world):
    """Against trying each. Where a whole step is one micro-batch its gradients take the place of activations, so it may
    fit where a smaller one does not."""
    here, flags = dict(vocab_size=0, world_size=world), f"--model tiny {flags}"
    config, run = resolved(flags, **here)
    model, T, found = built(config), run.sequence_length, set()
    tokens = T * rows
    plans = {size: plan_of(model, tokens, size, T, world, optimizer=run.optimizer)
             for size in range(1, rows + 1) if rows % (size * world) == 0}
    for room in sorted({plan * factor for plan in plans.values() for factor in (0.999, 1.001)}):
        expected = max((size for size, plan in plans.items() if plan <= room), default=None)
        argv = flags, "--batch_size auto --total_batch_size", str(tokens)
        if expected is None:
            with pytest.raises(script.ConfigError, match=f"batch_size=auto: one sequence of {T} takes .* MiB by the "
                               "memory plan, .*; add --gradient_checkpointing or lower --sequence_length"):
                resolved(*argv, memory=int(room / 0.9), **here)
            continue
        _, run = resolved(*argv, memory=round(room / 0.9), **here)
        assert run.batch_size == expected and run.tokens_per_step == tokens
        found.add(expected)
    assert max(plans) in found


@pytest.mark.parametrize("world, val_tokens", [(1, 2**20), (2, 2**20), (1, 5000), (1, 100)])
def test_a_validation_batch_that_is_found_is_the_largest_that_fits(world, val_tokens):
    """Of batch_size doubled, and no more than the validation has."""
    flags = f"--model tiny --batch_size auto --total_batch_size {2**16 * 3} --val_tokens {val_tokens}"
    for memory in (2**27, 2**28, 5 * 2**27, 2**30, 2**33, 2**40):
        config, run = resolved(flags, memory=memory, world_size=world, vocab_size=257)
        model, size = built(config), run.batch_size
        while (2 * size * 1024 * world <= val_tokens
               and plan_of(model, 2**16 * 3, 2 * size, 1024, world, training=False) <= 0.9 * memory):
            size *= 2
        assert run.val_batch_size == size >= run.batch_size
        typed = resolved(flags, "--val_batch_size 3", memory=memory, world_size=world, vocab_size=257)[1]
        assert typed.val_batch_size == 3
    assert resolved("--model tiny --batch_size 4", memory=2**40)[1].val_batch_size == 0


def test_a_batch_size_that_was_found_stays_on_another_machine():
    base = checkpoint(f"--model tiny --batch_size auto --total_batch_size {2**16}", memory=2**31)
    assert isinstance(base["batch_size"], int) and base["batch_size"] < 64
    for memory in (0, 2**20, 2**40):
        _, run = resolved(base=base, memory=memory)
        assert (run.batch_size, run.val_batch_size) == (base["batch_size"], base["val_batch_size"])
        assert run.tokens_per_step == 2**16
    _, run = resolved("--batch_size auto", base=base, memory=2**50)  # asked for anew: of as many tokens a step
    assert run.batch_size == 64 and run.tokens_per_step == 2**16
    _, run = resolved("--batch_size auto", base=base, memory=2**50, world_size=4)
    assert run.batch_size == 16 and run.tokens_per_step == 2**16


def test_the_memory_of_a_run_is_that_of_its_process_with_least(monkeypatch):
    world = script.World("cpu")
    assert 2**20 < world.machine().memory < 2**50
    free = world.free_memory()
    world.size = 2
    assert world.free_memory() == pytest.approx(free / 2, rel=0.5)  # shared by the processes of a machine
    monkeypatch.setattr(world, "gather", lambda item: [7000, item, 5000])
    assert world.machine().memory == 5000


@pytest.mark.parametrize("flags, problem, remedy", REFUSED, ids=[flags for flags, _, _ in REFUSED])
def test_what_is_refused_says_why_in_one_line(flags, problem, remedy):
    with pytest.raises(script.ConfigError) as error:
        resolved(flags)
    line = str(error.value)
    assert re.search(rf"^{problem}.*({remedy})", line), line
    assert "\n" not in line and len(line) < 250 and line[-1] not in ". "
    assert not re.search(r"try[^;]* (0|-\d+)\b", line), line  # a proposal that would be refused too


def test_more_than_one_process_must_share_the_micro_batches():
    message = r"grad_accumulation_steps=3 .* multiple of their number, 2; try 2 or 4"
    with pytest.raises(script.ConfigError, match=message):
        resolved("--grad_accumulation_steps 3", world_size=2)
    with pytest.raises(script.ConfigError, match=r"total_batch_size=8192 .* = 8 x 1024 x 2 = 16384; try 16384"):
        resolved("--total_batch_size 8192", world_size=2)


@pytest.mark.parametrize("flags", ["--attention flsh", "--precision fp88"])
def test_a_slip_is_called_a_slip_also_where_there_is_no_cuda(flags):
    name, value = flags[2:].split()
    with pytest.raises(script.ConfigError, match=rf"^{name}={value} is not known; did you mean (flash|fp8)\?"):
        resolved(flags, device_type="cpu", has_bf16=False, has_fp8=False)


def test_fp16_needs_cuda():
    with pytest.raises(script.ConfigError, match="precision=fp16 needs CUDA, and this run is on cpu; use bf16 or fp32"):
        resolved("--precision fp16", device_type="cpu", has_bf16=False)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    with pytest.raises(script.ConfigError, match=r"device=cuda is not available to torch \S+; use one of .*cpu"):
        script.World("cuda")
    with pytest.raises(script.ConfigError, match="device=tpu is not known; "):
        script.World("tpu")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(script.ConfigError, match="RANK.*'first'.*launch with torchrun"):
        script.World("cpu")


def test_a_card_can_be_made_smaller(monkeypatch):
    with pytest.raises(script.ConfigError, match="memory_gib=22 can be held only on a CUDA device.* on cpu; drop it"):
        script.World("cpu", 22)
    said, cuda = [], script.torch.cuda
    monkeypatch.setattr(script.World, "find_device", lambda world, wanted: script.torch.device(wanted))
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", said.append)
    script.World("cuda")
    assert said == []  # all of it
    script.World("cuda", 20)
    assert said == [0.25]
    with pytest.raises(script.ConfigError, match="memory_gib=81 must be at most what the device has, 80.0; lower it"):
        script.World("cuda", 81)
    assert said == [0.25]
    for wrong in ("-1", "nan", "inf"):
        with pytest.raises(script.ConfigError, match=f"memory_gib={float(wrong)} must be at least 0, and finite"):
            script.run_training(script.parse_flags(["--memory_gib", wrong]))


NUMBERS = ["0", "1", "-1", "2", "3", "12", "64", "100", "768", "1024", "", "x", "1.5"]
FLOATS = [*NUMBERS, "0.25", "1.12", "8/3", "8/0", "1/", "-0.5", "nan", "inf", "1e300", "1e-300"]


def any_flag(f):
    choices = f.metadata["choices"]
    choices = choices() if callable(choices) else choices
    values = {int: NUMBERS, float: FLOATS, str: [*(choices or ()), "", "x"], bool: [None]}[f.type]
    values = [*values, "auto"] if f.name == "batch_size" else values
    return st.sampled_from([[f"--{f.name}"] + ([] if value is None else [value]) for value in values])


@settings(max_examples=600)
@given(st.lists(st.sampled_from([f for _, f in all_fields()]).flatmap(any_flag), max_size=5), st.sampled_from([1, 3]))
def test_any_flags_resolve_or_are_refused_in_one_line(flags, size):
    here = machine(world_size=size, memory=2**36)
    try:
        typed = script.parse_flags([part for flag in flags for part in flag])
        config, run, notes = script.resolve(typed, here)
    except script.ConfigError as e:
        assert "\n" not in str(e) and str(e)
        return
    for name, value in typed.items():
        if hasattr(config, name) and name not in ("n_kv_head", "n_embd", "ffn_hidden", "gqa_enabled"):
            assert getattr(config, name) == value
        if hasattr(run, name) and value != "auto":
            assert getattr(run, name) == value
    if "n_kv_head" in typed:
        assert config.n_kv_head == (typed["n_kv_head"] or config.n_head)
    assert config.gqa_enabled or not typed.get("gqa_enabled")
    assert run.tokens_per_step == typed.get("total_batch_size", run.tokens_per_step)
    assert run.grad_accumulation_steps % size == 0 and all("\n" not in note for note in notes)
