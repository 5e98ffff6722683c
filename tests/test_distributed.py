"""Two processes under torchrun, with gloo, train what one process trains."""
import pytest
import torch

from launch import (ROOT, SCRIPT, assert_same, checkpoints, column, content_of, error_lines, records, runs_in,
                    snapshot, steps, torchrun, validations, write_shard)

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
        assert column(steps(a), name) == pytest.approx(column(steps(b), name), abs=tolerance, rel=0), name
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
