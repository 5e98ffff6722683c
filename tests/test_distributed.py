"""Two processes under torchrun, with gloo, train what one process trains."""
import json
import math
import os
import platform
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import torch

import train_gpt2_mod as script
from launch import (ROOT, SCRIPT, assert_same, checkpoints, column, content_of, error_lines, one_process, records,
                    runs_in, snapshot, some_tokens, steps, torchrun, validations, write_shard)

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


@pytest.mark.slow
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


@pytest.mark.slow
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


UNLIKE = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train_gpt2_mod as script

second, codes = os.environ["RANK"] == "1", []
version, source = torch.__version__, script.source
for number, (what, flags) in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # keys of its own in torchrun's store
    torch.__version__ = version + "1" if second and what == "torch" else version
    script.source = (lambda: source() + "#") if second and what == "script" else source
    codes.append(script.main(sys.argv[2:] + flags * second))
print("exit codes:", codes)
"""


def test_a_process_unlike_the_first_is_named_before_anything_is_trained(trainer, tmp_path):
    """One with another torch, script, flag, or shard: of other tokens in the header, size, or name. Not one whose same
    shards lie elsewhere, which trains."""
    other, same = tmp_path / "other", tmp_path / "same"
    shutil.copytree(trainer.data, same)
    shutil.copytree(trainer.data, other)
    write_shard(other / "val_000.bin", [0] * 200)
    write_shard(other / "train_001.bin", [0] * 161)
    (other / "train_000.bin").rename(other / "train_00.bin")
    pattern = str(other / "val_*.bin").replace("val", "train")
    jobs = [("torch", []), ("script", []), ("", ["--seed", "2"]), ("", ["--input_bin", pattern]),
            ("", ["--input_bin", str(other / "train_00.bin")]), ("", ["--input_bin", str(same / "train_*.bin")])]
    before, program = snapshot(tmp_path), tmp_path / "unlike.py"
    program.write_text(UNLIKE)
    result = torchrun(program, json.dumps(jobs), *trainer.flags(), cwd=tmp_path)
    assert result.stdout.count("exit codes: [2, 2, 2, 2, 2, 0]") == 2, result.stderr
    lines, host, size = error_lines(result.stderr), re.escape(platform.node()), 2 * 1024 + 2 * 260
    version, files = re.escape(torch.__version__), r"files of [\d,]+ bytes \(\w{8}\)"
    found = (rf"torch is {version}1, not {version}", r"script is \w{8}, not \w{8}", r"--seed is 2, not there",
             rf"--input_bin is 2 {files}, not 2 files of {size:,} .*", rf"--input_bin is 1 {files}, not 2 {files}")
    assert len(lines) == len(found)
    for line, what in zip(lines, found):
        assert re.fullmatch(rf"error: process 1 on {host} is not like process 0 on {host}: {what}; give all of them "
                            "the same script, torch, shards and flags", line)
    assert len(runs_in(trainer.output)) == 1  # of the last
    assert {k: v for k, v in snapshot(tmp_path).items() if "logs" not in str(k) and k in before} == before


def test_shards_are_told_apart_by_names_sizes_and_headers_alone(tmp_path):
    def described(name, tokens, **header):
        path = write_shard(tmp_path / name / "a_0.bin", tokens, **header)
        return script.description(str(path.parent / "a_*.bin"))

    first = described("first", [1, 2, 3])
    assert first.startswith("1 files of 1,030 bytes (")
    assert first == described("other tokens", [3, 2, 1])  # which nobody reads here
    assert len({first, described("longer", [1, 2, 3, 4]), described("vocabulary", [1, 2, 3], vocab_size=256)}) == 3
    (tmp_path / "first" / "a_0.bin").rename(tmp_path / "first" / "a_1.bin")
    assert script.description(str(tmp_path / "first" / "a_*.bin")) not in ("", first)
    assert script.description(str(tmp_path / "none")).startswith("0 files of 0 bytes")


def test_processes_that_came_together_have_longer_to_answer():
    """Ten minutes and no more five: the one that is waited for may be writing a checkpoint."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1,
                                         timeout=script.JOINING)
    try:
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout.total_seconds() == 5 * 60
        script.World("cpu").wait_longer()
        assert group.options._timeout.total_seconds() == 10 * 60
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_do_not_come_together_are_told_why(trainer, tmp_path):
    """The second one never comes."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    program = tmp_path / "alone.py"
    program.write_text(f"""
import datetime, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2_mod as script
script.JOINING = datetime.timedelta(seconds=2)
sys.exit(script.main(sys.argv[1:]))
""")
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    result = one_process(sys.executable, program, *trainer.flags(), cwd=tmp_path, **environment)
    line, = error_lines(result.stderr)
    assert result.returncode == 1 and line.startswith("error: the 2 processes did not all come together (")
    assert "torchrun's --nnodes and --rdzv_endpoint" in line and "GLOO_SOCKET_IFNAME" in line
