"""Two processes under torchrun, with gloo, train what one process trains."""
import math
import os
import re

import numpy as np
import pytest
import torch

import train_gpt2_mod as script
from launch import (ROOT, SCRIPT, assert_same, checkpoints, column, content_of, error_lines, records, runs_in,
                    snapshot, some_tokens, steps, torchrun, validations, write_shard)

# Half of four micro-batches each; a last validation batch that only one process has, and it in part.
FOUR = ["--grad_accumulation_steps", "4", "--mtp_enabled", "--mtp_rampup_steps", "4", "--save_every", "3"]
IN_FLOAT64 = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_default_dtype(torch.float64)
import train_gpt2_mod
sys.exit(train_gpt2_mod.main(sys.argv[1:]))
"""


def assert_clean(result):
    assert result.returncode == 0, result.stderr
    for text in ("terminate called", "Abort", "SIGABRT", "Traceback", "error: ", "FutureWarning"):
        assert text not in result.stderr


def assert_close(a, b, tolerance):
    assert column(records(a), "step") == column(records(b), "step")
    for name in ("train_loss", "grad_norm", "lr", "tokens", "mtp_weight"):
        values = [[math.nan if x is None else x for x in column(steps(folder), name)] for folder in (a, b)]
        assert values[0] == pytest.approx(values[1], abs=tolerance, rel=0, nan_ok=True), name
    for name in ("val_loss", "val_mtp_loss", "val_targets"):
        assert column(validations(a), name) == pytest.approx(column(validations(b), name), abs=tolerance, rel=0), name


def test_two_processes_are_one(trainer, tmp_path):
    """In fp32; then the one goes on from the two's checkpoint."""
    one = trainer.run(*FOUR).folder
    trainer.output = tmp_path / "two"
    result = torchrun(SCRIPT, *trainer.flags(*FOUR), cwd=tmp_path)
    assert_clean(result)
    two, = runs_in(trainer.output)
    assert_close(one, two, 1e-5)
    assert [record["val_targets"] for record in validations(two)] == [150, 150]
    weights = content_of(one, 6)["model"], content_of(two, 6)["model"]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=0)

    # Only the first process writes.
    assert sorted(p.name for p in two.iterdir()) == sorted(
        [f"{two.name}.log", "config.json", "metrics.jsonl", "step000003.pt", "step000006.pt"])
    assert result.stdout.count("step:6/6 | loss") == result.stdout.count("Peak memory consumption") == 1
    assert "2 processes on cpu" in result.stdout
    assert "256 = 4 x 2 x 32" in result.stdout

    resumed = trainer.copy_of(two, "resumed")
    assert trainer.main("--resume", resumed / "step000003.pt").code == 0
    assert_close(two, resumed, 1e-5)
    assert_same(content_of(resumed, 6)["loader"], content_of(two, 6)["loader"])


def test_two_processes_are_one_in_float64(trainer, tmp_path):
    program = tmp_path / "in_float64.py"
    program.write_text(IN_FLOAT64)
    try:
        torch.set_default_dtype(torch.float64)
        one = trainer.run(*FOUR, "--shuffle").folder
    finally:
        torch.set_default_dtype(torch.float32)
    assert content_of(one, 6)["model"]["lm_head.weight"].dtype == torch.float64
    trainer.output = tmp_path / "two"
    assert_clean(torchrun(program, *trainer.flags(*FOUR, "--shuffle"), cwd=tmp_path))
    assert_close(one, runs_in(trainer.output)[0], 1e-10)


def test_two_processes_go_on_for_one(trainer, tmp_path):
    one = trainer.run(*FOUR).folder
    resumed = trainer.copy_of(one, "resumed")
    (resumed / checkpoints(resumed)[1]).unlink()
    result = torchrun(SCRIPT, "--resume", "auto", "--output_dir", resumed.parent, cwd=tmp_path)
    assert_clean(result)
    assert f"resumed {resumed / 'step000003.pt'} at step 3" in result.stdout
    assert_close(one, resumed, 1e-5)
    assert len(content_of(resumed, 6)["rng"]) == 2  # a stream for each process


def test_an_error_is_said_once(trainer, tmp_path):
    before = snapshot(tmp_path)
    result = torchrun(SCRIPT, *trainer.flags("--grad_accumulation_steps", 3), cwd=tmp_path)
    assert result.returncode != 0
    line, = error_lines(result.stderr)
    assert "grad_accumulation_steps=3" in line and "try 2 or 4" in line
    assert "step:" not in result.stdout and "terminate called" not in result.stderr
    assert snapshot(tmp_path) == before


def test_a_bad_token_in_the_second_share_is_said_once(trainer, tmp_path):
    """Each process checks its share of the shards; what one finds ends them all."""
    shard = trainer.data / "train_001.bin"
    write_shard(shard, [0] * 150 + [257] + [0] * 9)
    before = snapshot(tmp_path)
    result = torchrun(SCRIPT, *trainer.flags(), cwd=tmp_path)
    line, = error_lines(result.stderr)
    assert result.returncode != 0 and f"{shard}: token 150 is 257" in line
    assert "terminate called" not in result.stderr and "train_gpt2_mod.py\", line" not in result.stderr
    assert snapshot(tmp_path) == before


NO_NUMBER, INFINITE = 255, 254  # tokens with which a loss is: NaN, its gradient too; infinite, its gradient as it was
DISTURBED = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import train_gpt2_mod as script
from test_distributed import poison, watched

poison(setattr)
script.train_step = watched(script.train_step)
sys.exit(script.main(sys.argv[1:]))
"""


def poison(patch):
    """Make losses of targets with those tokens what they say."""
    plain = script.GPT.loss

    def poisoned(self, x, targets, shares):
        loss = plain(self, x, targets, shares)
        loss = loss * float("nan") if (targets[0] == NO_NUMBER).any() else loss
        return loss + float("inf") if (targets[0] == INFINITE).any() else loss

    patch(script.GPT, "loss", poisoned)


def watched(train_step):
    """Write of each step of this process into its file whether weights and AdamW's state are bitwise as they were."""

    def contents(state):
        return [tensor.clone() for tensor in [*state.model.state_dict().values(), *(
            value for values in state.optimizer.state_dict()["state"].values() for value in values.values())]]

    def step(model, state, *others):
        before = contents(state)
        result = train_step(model, state, *others)
        after = contents(state)
        with open(f"rank {os.environ['RANK']}", "a") as file:
            print(len(before) == len(after) and all(map(torch.equal, before, after)), file=file)
        return result

    return step


def test_a_loss_that_one_process_meets_changes_nothing_in_either(trainer, monkeypatch, tmp_path):
    """A step's second half is the second process's. Its loss is infinite in step 2 and NaN in steps 5 and 6, which are
    rolled back; as in one process."""
    tokens = some_tokens(12 * 128 + 1, 0, vocab_size=INFINITE)
    for number, token in ((2, INFINITE), (5, NO_NUMBER), (6, NO_NUMBER)):
        tokens[128 * number - 20] = token
    (trainer.data / "train_001.bin").unlink()
    write_shard(trainer.data / "train_000.bin", tokens)
    flags = ["--grad_accumulation_steps", 2, "--nan_policy", "rollback", "--nan_limit", 2, "--save_every", 4]
    with monkeypatch.context() as patch:
        poison(patch.setattr)
        one = trainer.run(*flags).folder
    assert [record.get("skipped", False) for record in steps(one)] == [False, True, False, False, False, False]
    trainer.output, program = tmp_path / "two", tmp_path / "disturbed.py"
    program.write_text(DISTURBED)
    result = torchrun(program, *trainer.flags(*flags), cwd=tmp_path)
    assert_clean(result)
    two, = runs_in(trainer.output)
    assert_close(one, two, 1e-5)
    assert column(steps(two), "step") == [1, 2, 3, 4, 5, 6] and "rolled back from step 6 to " in result.stdout
    assert content_of(two, 6)["loader"] == content_of(one, 6)["loader"] == dict(epoch=0, tokens=8 * 128)
    for rank in (0, 1):  # steps 5 and 6 are done twice
        unchanged = (tmp_path / f"rank {rank}").read_text().split()
        assert unchanged == ["False", "True", "False", "False", "True", "True", "False", "False"]
    for step in (2, 5, 6):
        with np.load(one / f"skipped{step:06d}.npz") as a, np.load(two / f"skipped{step:06d}.npz") as b:
            assert all(np.array_equal(a[name], b[name]) for name in ("tokens", "rows", "epoch", "step"))
            assert a["tokens"].ravel().tolist() == [t for row in range(4) for t in
                                                    tokens[128 * step - 128 + 32 * row :][:33]]


UNREADABLE = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2_mod as script

plain = script.train_step

def train_step(model, state, *others):
    if state.step == 2 and os.environ["RANK"] == "1":
        state.loader.shards.files[:] = [name + " is elsewhere" for name in state.loader.shards.files]
    return plain(model, state, *others)

script.train_step = train_step
sys.exit(script.main(sys.argv[1:]))
"""


def test_shards_that_one_process_cannot_read_any_more_end_both_saved(trainer, tmp_path):
    program = tmp_path / "unreadable.py"
    program.write_text(UNREADABLE)
    flags = ["--grad_accumulation_steps", 2, "--num_iterations", 10, "--val_loss_every", 0]
    result = torchrun(program, *trainer.flags(*flags), cwd=tmp_path)
    folder, = runs_in(trainer.output)
    last = steps(folder)[-1]["step"]
    line, = error_lines(result.stderr)
    assert result.returncode != 0 and "terminate called" not in result.stderr
    assert re.fullmatch(rf"error: \S+ is elsewhere cannot be read any more \(No such file.*\); bring it back: training "
                        rf"ended after step {last}, saved as .*/step00000{last}\.pt", line)
    assert checkpoints(folder) == [f"step00000{last}.pt"] and 4 <= last <= 5
    assert trainer.main("--resume", folder).code == 0
    assert column(steps(folder), "step") == list(range(1, 11))
