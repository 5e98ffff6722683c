"""With --parallel fsdp two and four processes, with gloo, train what one process trains.

Under torchrun this file is the program. It does several runs one after the other, in float64: starting the processes
takes longer than any of them.
"""
import contextlib
import json
import math
import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt2_mod as script
from helpers import machine
from launch import (content_of, data_flags, error_lines, records, runs_in, some_tokens, steps,
                    torchrun, write_shard)

FSDP = ["--parallel", "fsdp"]
FOUR = ["--grad_accumulation_steps", "4", "--save_every", "2"]  # micro-batches: two or one of each process
MUON = ["--optimizer", "muon", "--muon_lr", "0.03", "--n_layer", "3", "--mlp", "swiglu", "--n_kv_head", "1",
        "--mlp_expansion_factor", "2", "--cautious_weight_decay", "--no_tie_embeddings"]
FEATURES = ["--model", "d4_fast", "--n_layer", "4", "--value_embeddings", "1", "--no_shuffle", "--mtp_enabled",
            "--mtp_heads", "separate", "--document_mask", "--total_batch_size", "256"]
GPT2 = ["--model", "gpt2", "--dropout", "0", "--n_positions", "32", "--n_layer", "2", "--n_embd", "32", "--n_head", "2"]
NO_NUMBER = 255  # a target whose loss is NaN
TIMES = {"tokens_per_second", "step_ms", "step_avg_ms", "time", "seconds_left", "peak_mem_MB", "mfu"}


# ----------------------------------------------------------------------------------------------------------------------
# What the runs do beside training, in one process and in several


@contextlib.contextmanager
def watched(path, changes):
    """Write the gradients of the first two updates, whole, to a file; and make the changes that are named."""
    step, loss, optimizer, numerics = (script.Numerics.step, script.GPT.loss, script.make_optimizer,
                                       script.Numerics.__init__)
    found = []

    def watching(self, optimizer, parameters, *others):
        if len(found) < 2:
            found.append([script.whole(p.grad).clone() for p in parameters if p.grad is not None])
        return step(self, optimizer, parameters, *others)

    def poisoned(self, x, targets, shares):
        return loss(self, x, targets, shares) * (math.nan if (targets[0] == NO_NUMBER).any() else 1.0)

    def scaled(self, precision, device):
        numerics(self, precision, device)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(script.Numerics, "step", watching))
        if "poisoned" in changes:
            patches.enter_context(mock.patch.object(script.GPT, "loss", poisoned))
        if "fused" in changes:  # as on a GPU, where the update takes the verdict as a tensor
            as_on_cuda = lambda model, run, device: optimizer(model, run, types.SimpleNamespace(type="cuda"))  # noqa: E731
            patches.enter_context(mock.patch.object(script, "make_optimizer", as_on_cuda))
        if "float8" in changes:  # as if this CPU had it
            machine_of = script.World.machine
            patches.enter_context(mock.patch.object(
                script.World, "machine", lambda *some: machine_of(*some)._replace(has_fp8=True)))
        if "scaled" in changes:  # as with fp16
            patches.enter_context(mock.patch.object(script.Numerics, "__init__", scaled))
        yield
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, path)


def checkpoint_in(folder, step):
    run, = runs_in(folder)
    return run / f"step{step:06d}.pt"


def do(jobs, output):
    """The runs' exit codes. A job is (its name, changes, flags); `--resume NAME:STEP` goes on from an earlier one."""
    codes = []
    for number, (name, changes, flags) in enumerate(jobs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # keys of its own in torchrun's store
        if "--resume" in flags:
            place = flags.index("--resume") + 1
            earlier, step = flags[place].split(":")
            flags = [*flags[:place], str(checkpoint_in(output / earlier, int(step))), *flags[place + 1 :]]
        with watched(output / f"{name}.gradients", changes):
            codes.append(script.main([*flags, "--output_dir", str(output / name)]))
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    results = do(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
    print("exit codes:", results)
    sys.exit(max(results))


# ----------------------------------------------------------------------------------------------------------------------
# The runs


def launch(folder, jobs, processes, seconds=120):
    """Do the jobs in several processes."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = torchrun(Path(__file__), folder / "jobs.json", processes=processes, cwd=folder, seconds=seconds)
    for text in ("terminate called", "Abort", "SIGABRT", "Traceback"):
        assert text not in result.stderr, result.stderr
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"{processes} processes on cpu") == len(jobs)
    return folder


def same(one, several, same_batches=False, tolerance=1e-10):
    """Whether two runs, in their folders, have the same records and state; the second may begin later. An activation's
    RMS is that of the first process's last sequences: these are others where there are more processes."""
    (first,), (second,) = runs_in(one), runs_in(several)
    a, b = records(first), records(second)
    assert len(b) == len(a) or 1 < len(b) and "resumed " in (second / f"{second.name}.log").read_text()
    a = a[-len(b) :]
    assert [record.keys() for record in a] == [record.keys() for record in b]
    for ours, theirs in zip(a, b):
        for key in ours.keys() - TIMES:
            if same_batches or not key.startswith("activation_rms/"):
                number = isinstance(ours[key], float)
                close = pytest.approx(ours[key], abs=tolerance, rel=tolerance) if number else ours[key]
                assert theirs[key] == close, (several, ours["step"], key)
    last = steps(first)[-1]["step"]
    first, second = content_of(first, last), content_of(second, last)
    assert second["model"].keys() == first["model"].keys() and len(first["optimizer"]["state"]) > 5
    close = dict(rtol=0, atol=100 * tolerance)
    for key, weight in first["model"].items():
        assert type(second["model"][key]) is torch.Tensor
        torch.testing.assert_close(second["model"][key], weight, **close)
    for number, state in first["optimizer"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(second["optimizer"]["state"][number][key], value, **close)
    assert second["loader"] == first["loader"] and second["skipped"] == first["skipped"]
    assert second["scaler"] == first["scaler"] and first["scaler"].get("scale", 0) < 1024  # it fell


def same_gradients(one, several):
    ours, theirs = (torch.load(folder.with_suffix(".gradients")) for folder in (one, several))
    assert len(ours) == len(theirs) == 2
    for step in (0, 1):
        assert len(ours[step]) == len(theirs[step])
        for a, b in zip(ours[step], theirs[step]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def jobs_of(trainer, tmp_path):
    """The runs that are compared. Of the poisoned ones step 3 is skipped, and the first goes back from step 6."""
    tokens = some_tokens(10 * 256 + 1, 0, vocab_size=NO_NUMBER)
    for step in (3, 5, 6):
        tokens[256 * step - 20] = NO_NUMBER
    write_shard(tmp_path / "poisoned" / "train_000.bin", tokens)
    write_shard(tmp_path / "poisoned" / "val_000.bin", some_tokens(200, 1, vocab_size=NO_NUMBER))
    poisoned = [*trainer.flags(*FOUR), *data_flags(tmp_path / "poisoned"), *MUON]
    return dict(
        adamw=([], trainer.flags(*FOUR, "--mtp_enabled", "--mtp_rampup_steps", 4, "--gradient_checkpointing",
                                 "--log_stats", 3)),
        muon=([], trainer.flags(*FOUR, *MUON, "--muon_beta2", 0.9, "--log_stats", 3)),
        skipped=(["poisoned", "fused"], [*poisoned, "--nan_policy", "rollback", "--nan_limit", "2"]),
        scaled=(["poisoned", "scaled"], poisoned),
        features=([], trainer.flags("--save_every", 2, *FEATURES)),
        gpt2=([], trainer.flags(*FOUR, *GPT2)),
    )


def in_one(jobs, output):
    """The jobs in this process."""
    output.mkdir(exist_ok=True)
    torch.set_default_dtype(torch.float64)
    try:
        assert do(jobs, output) == [0] * len(jobs)
    finally:
        torch.set_default_dtype(torch.float32)
    return output


def with_flags(jobs, *flags):
    return [(name, changes, [*others, *flags]) for name, changes, others in jobs]


@pytest.fixture
def jobs(trainer, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # which do() changes
    return jobs_of(trainer, tmp_path)


def test_two_processes_are_one(jobs, trainer, tmp_path):
    """The sums of gradients, the losses, weights and optimizer to rounding; and so for what goes on from ddp as fsdp,
    and from there in one process."""
    chosen = [(name, *jobs[name]) for name in ("adamw", "muon", "skipped")]
    one = in_one(chosen, tmp_path / "one")
    _, flags = jobs["muon"]
    bf16 = [*flags, "--gradient_dtype", "bf16", "--num_iterations", "4"]
    ddp = [("ddp adamw", *jobs["adamw"]), ("ddp muon", *jobs["muon"]), ("on", [], ["--resume", "ddp muon:2", *FSDP]),
           ("bf16", [], [*bf16, *FSDP]), ("ddp bf16", [], bf16)]
    several = launch(tmp_path / "several", [*with_flags(chosen, *FSDP), *ddp], 2)
    for name, *_ in chosen:
        same(one / name, several / name)
        same_gradients(one / name, several / name)
    for name in ("adamw", "muon"):
        same(several / f"ddp {name}", several / name, same_batches=True)
        same_gradients(one / name, several / f"ddp {name}")
    same(one / "muon", several / "on")
    in_one([("back", [], ["--resume", "on:4"])], several)
    same(one / "muon", several / "back")
    for name in ("bf16", "ddp bf16"):
        nearly(one / "muon", several / name)


def nearly(exact, rounded):
    """The first gradients are those of the other run, but rounded to bf16 when they were added up: with ddp once, with
    fsdp in each of two micro-batches."""
    ours, theirs = (torch.load(folder.with_suffix(".gradients"))[0] for folder in (exact, rounded))
    for a, b in zip(ours, theirs):
        assert 1e-4 * a.norm() < (a - b).norm() < 2**-7 * a.norm()
    are_bf16 = [torch.equal(b, b.bfloat16().to(b.dtype)) for b in theirs]
    assert all(are_bf16) if rounded.name.startswith("ddp") else not any(are_bf16)


@pytest.mark.slow
def test_four_processes_are_one(jobs, trainer, tmp_path):
    """Some of which have no row of the smallest parameters. In float8, where a scale is that of a micro-batch, they are
    the four of ddp."""
    every = [(name, *job) for name, job in jobs.items()]
    one = in_one(every, tmp_path / "one")
    float8 = [("ddp8", ["float8"], trainer.flags(*FOUR, "--precision", "fp8"))]
    float8 += with_flags([("fsdp8", *float8[0][1:])], *FSDP)
    several = launch(tmp_path / "several", [*with_flags(every, *FSDP), *float8], 4)
    for name in jobs:
        same(one / name, several / name)
        same_gradients(one / name, several / name)
    same(several / "ddp8", several / "fsdp8", same_batches=True, tolerance=1e-6)


@pytest.mark.slow
def test_compiled_block_by_block_it_is_the_same(jobs, trainer, tmp_path):
    """Also where blocks differ: guards on sharded modules, which torch leaves out, must not be missed."""
    every = [(name, *jobs[name]) for name in ("adamw", "features")]
    one = in_one(every, tmp_path / "one")
    compiled = [(name, changes, [flag for flag in flags if flag != "--no_compile"]) for name, changes, flags in every]
    several = launch(tmp_path / "several", with_flags(compiled, *FSDP, "--compile"), 2, seconds=280)
    for name, *_ in every:
        same(one / name, several / name, tolerance=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# What needs no processes


@pytest.mark.parametrize("flags, place, message", [
    ("--parallel fsdp", {}, "parallel=fsdp is for several processes, and this run is one; launch it with torchrun, or "
     "drop it"),
    ("--gradient_dtype bf16", {}, "gradient_dtype=bf16 is for several processes, and this run is one; launch it with "
     "torchrun, or drop it"),
    ("--parallel fsdp", dict(world_size=2, device_type="mps"), "device=mps with parallel=fsdp: torch has no such "
     "processes on an Apple GPU; drop one of the two"),
    ("--parallel fsdp --compile_mode reduce-overhead", dict(world_size=2), "compile_mode=reduce-overhead with "
     "parallel=fsdp: CUDA graphs want weights that stay where they are; drop one of the two"),
    ("--parallel fdsp", dict(world_size=2), "parallel=fdsp is not known; did you mean fsdp?"),
])
def test_what_does_not_combine_is_refused_by_name(flags, place, message):
    with pytest.raises(script.ConfigError) as error:
        script.resolve(script.parse_flags(flags.split()), machine(**place))
    assert str(error.value) == message


def test_one_process_that_goes_on_for_several_has_nothing_to_share(trainer):
    config, run, _ = script.resolve(dict(model="tiny", parallel="fsdp", gradient_dtype="bf16"), machine(world_size=4))
    assert (run.parallel, run.gradient_dtype) == ("fsdp", "bf16")
    base = script.checkpoint_fields(dict(network=vars(config), run=vars(run)))
    assert script.resolve({}, machine(world_size=2), base)[1].parallel == "fsdp"
    alone = script.resolve({}, machine(), base)[1]
    assert (alone.parallel, alone.gradient_dtype) == ("ddp", "fp32")
    result = trainer.main(*trainer.flags("--parallel", "fsdp"))
    assert (result.code, result.out, result.folder) == (2, "", None)
    assert error_lines(result.err) == [result.err.strip()] and "parallel=fsdp is for several" in result.err


def test_the_memory_plan_shares_out_what_is_sharded():
    """What a GPU keeps between steps, against a count by hand of d12's 123,532,032 parameters, its 12 blocks of 12 C^2
    and the head's V C; and more processes never take more of each."""
    def plan(world, **changes):
        typed = dict(model="d12", parallel="fsdp", precision="bf16", **changes)
        config, run, _ = script.resolve(typed, machine(world_size=world))
        with torch.device("meta"):
            return script.memory_plan(config, run, script.GPT(config), world)

    block, head = 12 * 768**2, 50257 * 768
    parameters = 12 * block + head
    assert plan(4)["weights"] == 4 * parameters // 4 + 4 * head + 2 * 2 * block
    assert plan(4)["optimizer"] == 8 * parameters // 4
    assert plan(4, optimizer="muon")["optimizer"] == (8 * parameters - 4 * 12 * block) // 4
    assert plan(4, grad_accumulation_steps=8)["gradients"] == 4 * parameters
    several = [plan(world, batch_size=1, sequence_length=64) for world in (2, 4, 8)]
    for few, more in zip(several, several[1:]):
        assert all(more[part] <= few[part] for part in few) and sum(more.values()) < sum(few.values())
