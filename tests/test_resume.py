"""Runs as a user makes them: what they leave behind, that they can be repeated and resumed, and text from them."""
import importlib.util
import json
import math
import platform
import random
import re
import shlex
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import LateMeter

import train_gpt2_mod as script
from launch import (ROOT, SCRIPT, assert_same, checkpoints, column, content_of, records, snapshot, some_tokens, steps,
                    validations, write_data, write_shard)

spec = importlib.util.spec_from_file_location("sample", ROOT / "tools" / "sample.py")
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)

REPEATABLE = ("step", "train_loss", "lr", "grad_norm", "mtp_weight", "tokens")  # the rest is time and memory
CASES = {
    "plain": "",
    "mtp": "--mtp_enabled --mtp_max_steps 3 --mtp_rampup_steps 4",
    "shuffled": "--shuffle --num_iterations 10",  # of four steps an epoch
    "accumulated": "--grad_accumulation_steps 2",
    "bf16": "--precision bf16",
}


@pytest.fixture
def trainer(trainer, monkeypatch):
    """Run ids count up, for a second has room for more than one run."""
    ids = iter(range(1000))
    monkeypatch.setattr(script, "new_run_id", lambda model: f"20260101-{next(ids):06d}-{model}-abcd")
    return trainer


def repeatable(folder):
    return [[record.get(key) for key in REPEATABLE] for record in steps(folder)]


def losses_of_validation(folder):
    return [[record[key] for key in ("step", "val_loss", "val_ntp_loss", "val_mtp_loss", "mtp_weight")]
            for record in validations(folder)]


def assert_same_runs(a, b, last):
    """Two run folders hold the same, bit for bit, but for times, memory and the flags that name output and length."""
    assert repeatable(a) == repeatable(b)
    assert losses_of_validation(a) == losses_of_validation(b)
    contents = content_of(a, last), content_of(b, last)
    for part in ("model", "optimizer", "loader", "rng", "scaler", "step", "network"):
        assert_same(contents[0][part], contents[1][part], part)


# ----------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("case", CASES)
def test_n_and_n_steps_are_2n(trainer, case):
    """The run went on for two steps past the checkpoint, and was cut off while it wrote a record."""
    whole = trainer.run("--save_every", 3, *CASES[case].split()).folder
    last = steps(whole)[-1]["step"]
    part = trainer.copy_of(whole, "interrupted")
    for name in checkpoints(part)[1:]:
        (part / name).unlink()
    lines = (part / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (part / "metrics.jsonl").write_text("".join(kept) + lines[-1][:20])
    result = trainer.main("--resume", part / "step000003.pt")
    assert (result.code, result.err) == (0, "")
    assert column(steps(part), "step") == list(range(1, last + 1))
    assert column(records(part), "step") == column(records(whole), "step")
    assert_same_runs(whole, part, last)
    assert len(set(column(steps(whole), "train_loss"))) == last  # the steps differ, so equality says something


def test_a_longer_run(trainer):
    """N steps, then --num_iterations 2N, where no warm-down shapes the first half."""
    flags = ["--warmdown_iters", 0, "--val_loss_every", 2]
    whole = trainer.run(*flags, "--num_iterations", 8).folder
    half = trainer.run(*flags, "--num_iterations", 4).folder
    result = trainer.run("--resume", half / "step000004.pt", *flags, "--num_iterations", 8)
    assert result.folder is None  # it went on in its own
    assert "num_iterations=8, was 4" in result.out and "at step 4" in result.out
    assert "num_iterations=8, was 4" in (half / f"{half.name}.log").read_text()
    assert_same_runs(whole, half, 8)
    assert json.loads((half / "config.json").read_text())["run"]["num_iterations"] == 8
    assert steps(half)[4]["time"] > steps(half)[3]["time"]  # seconds count over both sittings


@pytest.mark.parametrize("changes, flags", [
    (dict(scaler=torch.amp.GradScaler("cpu").state_dict()), []),
    (dict(tokens=3 * 10**12), []),
    ({}, ["--no_save_checkpoints"]),
    ({}, ["--nan_policy", "stop"]),
], ids=["of fp16", "of trillions of tokens", "saving no more", "skipping no more"])
def test_what_may_differ_is_no_reason_to_refuse(trainer, changes, flags):
    folder = trainer.run("--save_every", 2, "--nan_limit", 3).folder
    path = folder / "step000004.pt"
    script.write_checkpoint(path, {**content_of(folder, 4), **changes})
    result = trainer.main("--resume", path, *flags)
    assert (result.code, result.err) == (0, "") and len(steps(folder)) == 6


def test_flags_of_the_optimizer_count_in_a_resume(trainer):
    """Not what the checkpoint's optimizer had."""
    half = trainer.run("--num_iterations", 4, "--save_every", 2, "--warmdown_iters", 0).folder
    ends = []
    for i, flags in enumerate(([], ["--weight_decay", 5], ["--beta1", 0.5])):
        part = trainer.copy_of(half, f"part{i}")
        assert trainer.main("--resume", part / "step000002.pt", *flags).code == 0
        ends.append(content_of(part, 4)["model"]["lm_head.weight"])
    assert torch.equal(ends[0], content_of(half, 4)["model"]["lm_head.weight"])
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_resume_needs_no_other_flag(trainer, monkeypatch):
    """Not even the folder: that is where the checkpoint lies, though the run began elsewhere."""
    first = trainer.run("--save_every", 2, "--mtp_enabled").folder
    moved = trainer.copy_of(first, "moved")
    before = snapshot(first)
    for name in checkpoints(moved)[1:]:
        (moved / name).unlink()
    monkeypatch.chdir(moved)
    assert trainer.main("--resume", "step000002.pt").code == 0
    assert checkpoints(moved) == checkpoints(first)
    assert_same(content_of(moved, 6)["model"], content_of(first, 6)["model"])
    assert snapshot(first) == before


def test_resume_auto(trainer):
    """The newest run of the same network, though another network's is newer; the newest of all without any flag."""
    old = trainer.run().folder
    same = trainer.run("--seed", 2, "--num_iterations", 4, "--save_every", 2).folder
    other = trainer.run("--n_layer", 1).folder
    (same / ".step000009.pt.tmp").write_bytes(b"cut off")
    (trainer.output / "20990101-000000-tiny-none").mkdir()  # a run that came to nothing
    before = snapshot(old), snapshot(other)
    result = trainer.run("--resume", "auto")
    assert f"resumed {same / 'step000004.pt'} at step 4" in result.out and result.folder is None
    assert checkpoints(same)[-1] == "step000006.pt" and column(steps(same), "step") == [1, 2, 3, 4, 5, 6]
    assert not list(same.glob(".*"))  # what was cut off
    assert (snapshot(old), snapshot(other)) == before
    result = trainer.main("--resume", "auto", "--output_dir", trainer.output)
    assert result.code == 0 and f"resumed {other / 'step000006.pt'} at step 6" in result.out


def test_resume_auto_finds_nothing(trainer):
    other = trainer.run("--n_layer", 1).folder
    before = snapshot(other)
    result = trainer.run("--resume", "auto")
    assert "fresh start" in result.out
    assert result.folder not in (None, other) and len(steps(result.folder)) == 6 and snapshot(other) == before


def test_resume_of_a_finished_run_changes_no_record(trainer):
    folder = trainer.run().folder
    before, weights = records(folder), content_of(folder, 6)["model"]
    assert trainer.main("--resume", folder / "step000006.pt").code == 0
    assert records(folder) == before
    assert_same(content_of(folder, 6)["model"], weights)


@pytest.mark.parametrize("shuffle", [[], ["--shuffle"]])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_another_batch_size_trains_on_the_same_tokens(trainer, batch_size, shuffle):
    whole = trainer.run("--grad_accumulation_steps", 2, "--save_every", 2, *shuffle).folder
    copy = trainer.copy_of(whole, "copy")
    result = trainer.main("--resume", copy / "step000002.pt", "--batch_size", batch_size)
    assert result.code == 0 and f"batch_size={batch_size}, was 2" in result.out
    assert column(steps(copy), "tokens") == column(steps(whole), "tokens")
    assert column(steps(copy), "train_loss") == pytest.approx(column(steps(whole), "train_loss"), abs=1e-5)
    assert column(steps(copy), "grad_norm") == pytest.approx(column(steps(whole), "grad_norm"), abs=1e-4)
    assert column(validations(copy), "val_loss") == pytest.approx(column(validations(whole), "val_loss"), abs=1e-5)


def test_tokens_go_on_where_the_step_grows(trainer):
    first = trainer.run("--num_iterations", 4, "--warmup_iters", 0, "--warmdown_iters", 0)
    trainer.run("--resume", first.folder / "step000004.pt", "--num_iterations", 6, "--warmup_iters", 0,
                "--warmdown_iters", 0, "--total_batch_size", 128)
    assert column(steps(first.folder), "tokens") == [64, 128, 192, 256, 384, 512]


def test_flags_that_only_colour_a_run_may_change(trainer):
    folder = trainer.run("--mtp_enabled", "--save_every", 3).folder
    result = trainer.main("--resume", folder / "step000003.pt", "--mtp_weight", 0.3, "--precision", "bf16",
                          "--learning_rate", 1e-3)
    assert result.code == 0
    for text in ("mtp_weight=0.3, was 0.1", "precision=bf16, was fp32", "learning_rate=0.001, was 0.003"):
        assert f"differs from the checkpoint: {text}" in result.out
    assert column(steps(folder), "lr")[2:4] == pytest.approx([3e-3, 1e-3])


@pytest.mark.parametrize("last", [3, 4, 6])
def test_a_validation_at_the_checkpoint_is_done_again(trainer, last):
    """Its state was saved before it; the run ended before its record, the fourth, or after it, or two steps later."""
    whole = trainer.run().folder
    part = trainer.copy_of(whole, "interrupted")
    (part / "step000006.pt").unlink()
    kept = records(whole)[:last]
    if last > 3:
        kept[3]["val_loss"] = 99.0
    (part / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert trainer.main("--resume", part / "step000003.pt").code == 0
    assert column(records(part), "step") == [1, 2, 3, 3, 4, 5, 6, 6]
    assert losses_of_validation(part) == losses_of_validation(whole) and repeatable(part) == repeatable(whole)


@pytest.mark.parametrize("flags", ["--val_loss_every 4", "--input_val_bin="])
def test_a_validation_that_is_not_due_any_more_keeps_its_record(trainer, flags):
    folder = trainer.run().folder
    before = validations(folder)[0]
    assert trainer.main("--resume", folder / "step000003.pt", *flags.split()).code == 0
    assert validations(folder)[0] == before and column(validations(folder), "step")[1:] == [4, 6] * ("4" in flags)


def damage(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("means", ["auto", "folder"])
def test_a_damaged_checkpoint_is_passed_over_and_named(trainer, means):
    whole = trainer.run("--save_every", 2).folder
    part = trainer.copy_of(whole, "damaged")
    flags = ["--resume", part if means == "folder" else "auto", "--output_dir", part.parent]
    damage(part / "step000006.pt")
    result = trainer.main(*flags)
    assert result.code == 0 and f"resumed {part / 'step000004.pt'} at step 4" in result.out
    said, = [line for line in result.out.splitlines() if line.startswith("passed over: ")]
    assert said == f"passed over: {part / 'step000006.pt'} is damaged: its SHA-256 is another"
    assert_same_runs(whole, part, 6)
    for name in checkpoints(part):
        damage(part / name)
    before = snapshot(part)
    result = trainer.main(*flags)
    assert result.code == 2 and result.err.startswith("error: there is nothing whole to resume (passed over: ")
    assert result.err.count("\n") == 1 and all(str(part / name) in result.err for name in checkpoints(part))
    assert snapshot(part) == before and result.folder is None
    result = trainer.main("--resume", part / "step000002.pt")
    assert result.code == 2 and result.err == (f"error: {part / 'step000002.pt'} is damaged: its SHA-256 is another; "
                                               "name another\n")


def test_auto_takes_the_run_before_where_the_newest_has_nothing_whole(trainer):
    old = trainer.run("--num_iterations", 4).folder
    new = trainer.run().folder
    for name in checkpoints(new):
        damage(new / name)
    result = trainer.main("--resume", "auto", "--output_dir", trainer.output)
    assert result.code == 0 and f"resumed {old / 'step000004.pt'} at step 4" in result.out
    assert result.out.count("passed over: ") == 2


def test_a_checksum_sees_every_changed_byte(trainer):
    path = trainer.run("--n_layer", 1, "--n_embd", 16, "--n_head", 1, "--val_loss_every", 0).folder / "step000006.pt"
    script.verify_checksum(path)
    content, chance = path.read_bytes(), random.Random(0)
    places = {*range(64), *range(len(content) - script.CHECKSUM_BYTES - 64, len(content))}
    places |= {chance.randrange(len(content)) for _ in range(200)}
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(script.DataError, match="is damaged|is cut short"):
            script.verify_checksum(path)
    for changed in (b"", content[:1], content[: script.CHECKSUM_BYTES], content[: len(content) // 2], content[:-1],
                    content + b"\0", b"\0" + content, content[1:], content * 2):
        path.write_bytes(changed)
        with pytest.raises(script.DataError, match="is damaged|is cut short"):
            script.load_checkpoint(path)
    path.write_bytes(content)
    script.load_checkpoint(path)


def test_what_made_a_checkpoint_is_said_where_it_differs(trainer):
    folder = trainer.run("--save_every", 3).folder
    path, content = folder / "step000003.pt", content_of(folder, 3)
    rounding, source = "losses go on equal to rounding, not bitwise: ", "differs from the checkpoint: the script or its kernel; "
    result = trainer.main("--resume", path)
    assert result.code == 0 and rounding not in result.out and source not in result.out
    for change, said in ((dict(torch="1.0"), f"torch={torch.__version__}, was 1.0"),
                         (dict(device="abacus"), f"device={platform.machine()}, was abacus"),
                         (dict(processes=7), "processes=1, was 7"),
                         (dict(threads=99), f"threads={torch.get_num_threads()}, was 99"), (dict(source="0"), source)):
        script.write_checkpoint(path, dict(content, made_by={**content["made_by"], **change}))
        result = trainer.main("--resume", path)
        assert result.code == 0 and (said if "source" in change else rounding + said) in result.out
        assert result.out.count(rounding) + result.out.count(source) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are no numbers

POISON = 255


@pytest.fixture
def poisoned(trainer, monkeypatch):
    """A function that gives the training shards 24 steps an epoch, of which the data of these numbers, counted from 1,
    makes the loss NaN."""
    plain = script.GPT.loss

    def loss(self, x, targets, shares):
        return plain(self, x, targets, shares) * (math.nan if (targets[0] == POISON).any() else 1.0)

    def poison(*numbers, without=()):
        tokens = some_tokens(24 * 64 + 1, 0, vocab_size=POISON)
        tokens[::64] = 1  # so that a step's data can go without a trace
        for number in numbers:
            tokens[64 * number - 20] = POISON
        for number in sorted(without, reverse=True):
            tokens = np.delete(tokens, slice(64 * number - 64, 64 * number))
        (trainer.data / "train_001.bin").unlink(missing_ok=True)
        write_shard(trainer.data / "train_000.bin", tokens)
        return tokens

    monkeypatch.setattr(script.GPT, "loss", loss)
    return poison


def test_skipped_updates_change_nothing_and_training_goes_on(trainer, poisoned):
    tokens = poisoned(3, 5, 6)
    folder = trainer.run("--save_every", 1).folder
    assert column(steps(folder), "step") == [1, 2, 3, 4, 5, 6]
    assert [record.get("skipped") for record in steps(folder)] == [None, None, True, None, True, True]
    assert [record["train_loss"] is None for record in steps(folder)] == [False, False, True, False, True, True]
    contents = {step: content_of(folder, step) for step in range(1, 7)}
    assert [content["skipped"] for content in contents.values()] == [0, 0, 1, 0, 1, 2]
    for step in (3, 5, 6):
        assert_same(contents[step]["model"], contents[step - 1]["model"])
        assert_same(contents[step]["optimizer"]["state"], contents[step - 1]["optimizer"]["state"])
        with np.load(folder / f"skipped{step:06d}.npz") as saved:
            assert saved["tokens"].ravel().tolist() == [t for row in (0, 32) for t in
                                                        tokens[64 * step - 64 + row :][:33]]
    assert not torch.equal(contents[4]["model"]["lm_head.weight"], contents[3]["model"]["lm_head.weight"])
    assert len(list(folder.glob("skipped*.npz"))) == 3
    assert [content["tokens"] for content in contents.values()] == [64 * step for step in contents]
    part = trainer.copy_of(folder, "interrupted")
    assert trainer.main("--resume", part / "step000003.pt").code == 0
    assert_same_runs(folder, part, 6)


def test_too_many_skipped_updates_in_a_row_end_the_run(trainer, poisoned):
    """Also when it was interrupted among them."""
    poisoned(2, 4, 5, 6)
    flags = ["--num_iterations", 8, "--nan_limit", 3, "--save_every", 1]
    result = trainer.main(*trainer.flags(*flags))
    assert result.code == 1 and result.err.startswith("error: step 6: the loss is nan") and result.err.count("\n") == 1
    assert "3 updates in a row" in result.err and str(result.folder / "skipped000006.npz") in result.err
    assert column(steps(result.folder), "step") == [1, 2, 3, 4, 5, 6]
    assert "step000005.pt" in checkpoints(result.folder)
    again = trainer.main("--resume", result.folder)
    assert again.code == 1 and "at step 5" in again.out and "error: step 6: the loss is nan" in again.err
    assert trainer.main("--resume", result.folder / "step000005.pt", "--nan_limit", 4).code == 0
    assert column(steps(result.folder), "step") == list(range(1, 9))


def test_the_first_loss_that_is_none_ends_the_run_where_that_is_the_policy(trainer, poisoned):
    poisoned(3)
    result = trainer.main(*trainer.flags("--nan_policy", "stop", "--save_every", 2))
    assert result.code == 1 and result.err.startswith("error: step 3: the loss is nan") and "1 update in" in result.err
    assert column(steps(result.folder), "step") == [1, 2, 3] and steps(result.folder)[-1]["train_loss"] is None
    assert checkpoints(result.folder) == ["step000002.pt"] and (result.folder / "skipped000003.npz").is_file()


ROLLBACK = ["--num_iterations", 8, "--nan_policy", "rollback", "--nan_limit", 2, "--save_every", 4, "--keep_last", 9]


def test_a_rollback_passes_over_the_data_that_led_there(trainer, poisoned):
    """What comes out is a run on data without those steps, bit for bit; also when it is interrupted and resumed from
    before the rollback, from where it went back to, or from after it."""
    poisoned(5, 6)
    result = trainer.run(*ROLLBACK)
    rolled = result.folder
    said, = [line for line in result.out.splitlines() if line.startswith("rolled back ")]
    assert said.startswith(f"rolled back from step 6 to {rolled / 'step000004.pt'}; ")
    assert column(steps(rolled), "step") == list(range(1, 9))
    assert not any(record.get("skipped") for record in steps(rolled))
    assert column(validations(rolled), "step") == [3, 6, 8]
    assert content_of(rolled, 8)["loader"] == dict(epoch=0, tokens=10 * 64)
    poisoned(without=(5, 6))
    cut = trainer.run(*ROLLBACK).folder
    assert repeatable(rolled) == repeatable(cut) and losses_of_validation(rolled) == losses_of_validation(cut)
    for part in ("model", "optimizer", "rng"):
        assert_same(content_of(rolled, 8)[part], content_of(cut, 8)[part], part)
    poisoned(5, 6)
    for step in (3, 4, 6):
        part = trainer.copy_of(rolled, f"interrupted at {step}")
        for name in checkpoints(part):
            if name > f"step{step:06d}.pt":
                (part / name).unlink()
        result = trainer.main("--resume", "auto", "--output_dir", part.parent)
        assert result.code == 0 and f"at step {step}" in result.out
        assert result.out.count("rolled back ") == (step < 5)
        assert_same_runs(rolled, part, 8)


def test_a_rollback_where_numbers_come_late(trainer, poisoned, monkeypatch):
    """Step 7 is done when those of step 6 are known, and its data is passed over with theirs; so is its validation."""
    monkeypatch.setattr(script, "Meter", LateMeter)
    poisoned(3, 5, 6)
    result = trainer.run(*ROLLBACK, "--val_loss_every", 4)
    assert re.findall(r"rolled back from step (\d+)", result.out) == ["7"]
    assert column(records(result.folder), "step") == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [record["step"] for record in steps(result.folder) if record.get("skipped")] == [3]
    assert content_of(result.folder, 8)["loader"] == dict(epoch=0, tokens=11 * 64)
    poisoned(3, without=(5, 6, 7))
    assert repeatable(trainer.run(*ROLLBACK, "--val_loss_every", 4).folder) == repeatable(result.folder)


def test_three_rollbacks_to_one_checkpoint_are_enough(trainer, poisoned):
    poisoned(*range(5, 25))
    result = trainer.main(*trainer.flags(*ROLLBACK))
    assert result.code == 1 and result.out.count("rolled back from step 6 to ") == 3
    assert "2 updates in a row" in result.err and f"3 times {result.folder / 'step000004.pt'} led there" in result.err
    assert column(steps(result.folder), "step") == [1, 2, 3, 4, 5, 6]
    assert [content_of(result.folder, step)["skipped"] for step in (3, 4)] == [0, 0]
    batches = [np.load(path)["tokens"].tolist() for path in sorted(result.folder.glob("skipped00000[56]*.npz"))]
    assert len(batches) == 8 and all(batches.count(batch) == 1 for batch in batches)  # of four attempts


def test_rollbacks_to_several_checkpoints_are_counted_for_each(trainer, poisoned):
    """Three to step 4 and two to step 8, and so a run of twelve steps of the data of twenty-two."""
    poisoned(*range(5, 11), *range(15, 19))
    result = trainer.run(*ROLLBACK, "--num_iterations", 12, "--val_loss_every", 4)
    assert re.findall(r"rolled back from step (\d+)", result.out) == ["6"] * 3 + ["10"] * 2
    assert column(steps(result.folder), "step") == list(range(1, 13))
    assert content_of(result.folder, 12)["loader"] == dict(epoch=0, tokens=22 * 64)


def test_a_rollback_to_the_midst_of_skipped_updates_counts_anew(trainer, poisoned):
    """Step 4, which was skipped, is saved; after the rollback one more is not the second in a row."""
    poisoned(4, 5, 6)
    result = trainer.run(*ROLLBACK)
    assert re.findall(r"rolled back from step (\d+)", result.out) == ["5"]
    assert [record["step"] for record in steps(result.folder) if record.get("skipped")] == [4, 5]


def test_a_rollback_takes_back_no_seconds(trainer, poisoned, monkeypatch):
    """Eight steps and the two that came to nothing, of a second each by this clock."""
    now, step = [0.0], script.train_step

    def slow_step(*args):
        now[0] += 1
        return step(*args)

    monkeypatch.setattr(script, "train_step", slow_step)
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: now[0]))
    poisoned(5, 6)
    folder = trainer.run(*ROLLBACK).folder
    assert column(steps(folder), "time") == pytest.approx([1000, 2000, 3000, 4000, 7000, 8000, 9000, 10000])
    assert content_of(folder, 8)["seconds"] == pytest.approx(10)


def test_a_rollback_past_a_write_that_failed_saves_what_is_done_again_and_no_more(trainer, poisoned, monkeypatch):
    """The third write, of step 6, fails, so the way back from step 8 is to step 4, whose file stays as it was."""
    Disk(monkeypatch, 3)
    poisoned(7, 8)
    result = trainer.run(*ROLLBACK)
    assert re.findall(r"rolled back from step (\d+) to \S+/(step\d+\.pt)", result.out) == [("8", "step000004.pt")]
    assert checkpoints(result.folder) == [f"step{step:06d}.pt" for step in (3, 4, 6, 8)]
    cursors = [content_of(result.folder, step)["loader"]["tokens"] for step in (4, 6, 8)]
    assert cursors == [4 * 64, 10 * 64, 12 * 64]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(trainer, poisoned):
    poisoned(1, 2)
    result = trainer.main(*trainer.flags(*ROLLBACK))
    assert result.code == 1 and "there is no checkpoint to go back to" in result.err and result.err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Repetition, and other people's folders


def test_a_seed_decides_the_run(trainer):
    first, again, other = (trainer.run("--seed", seed).folder for seed in (5, 5, 6))
    assert_same_runs(first, again, 6)
    assert repeatable(first)[0][1] != repeatable(other)[0][1]
    weights = [content_of(folder, 6)["model"]["lm_head.weight"] for folder in (first, other)]
    assert not torch.equal(*weights)


def test_a_seed_shuffles_in_its_own_way(trainer):
    orders = [column(steps(trainer.run("--shuffle", "--seed", seed, "--learning_rate", 0).folder), "tokens")
              for seed in (5, 6)]
    assert orders[0] == orders[1]  # as many tokens
    plain, shuffled = (trainer.run(*flags, "--learning_rate", 0, "--num_iterations", 8).folder
                       for flags in ([], ["--shuffle"]))
    # Weights that never change: an epoch's losses are those of the same rows, in another order.
    plain, shuffled = (column(steps(folder), "train_loss") for folder in (plain, shuffled))
    assert plain[:4] == plain[4:]
    assert shuffled[:4] != shuffled[4:] and shuffled[:4] != plain[:4]
    assert sum(shuffled[:4]) == pytest.approx(sum(plain[:4]), abs=1e-4)


def test_a_fresh_start_writes_to_no_other_folder(trainer):
    first = trainer.run().folder
    before = snapshot(trainer.output)
    second = trainer.run().folder
    assert second != first
    assert {name: data for name, data in snapshot(trainer.output).items() if name in before} == before


def test_a_run_that_is_being_trained_is_left_alone(trainer):
    folder = trainer.run("--save_every", 3).folder
    lock = script.make_run_folder(folder.parent, folder.name, fresh=False)[1]  # as another process has it
    before = snapshot(folder)
    result = trainer.main("--resume", folder / "step000003.pt")
    assert result.code == 2 and result.err.startswith(f"error: {folder} is being trained by another process; ")
    assert result.err.count("\n") == 1 and snapshot(folder) == before
    lock.close()
    assert trainer.main("--resume", folder / "step000003.pt").code == 0


def test_run_ids_of_one_second_differ(monkeypatch):
    assert len({script.new_run_id("d12") for _ in range(20)}) > 15
    assert all("-d12-" in script.new_run_id("d12") for _ in range(3))


def test_write_atomically(tmp_path):
    path = tmp_path / "step000001.pt"
    script.write_atomically(path, lambda f: f.write(b"old and whole"))

    def half(f):
        f.write(b"half of the n")
        f.flush()
        assert path.read_bytes() == b"old and whole"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        script.write_atomically(path, half)
    assert path.read_bytes() == b"old and whole"
    assert list(tmp_path.glob("step*.pt")) == list(tmp_path.glob("*.pt")) == [path]
    script.write_atomically(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new"


def test_what_write_atomically_renames_is_on_the_disk(tmp_path, monkeypatch):
    """First the content, then the name, then the folder's entry: wherever the power fails, old or new is whole."""
    done, fsync, replace = [], script.os.fsync, script.os.replace

    def synced(number):
        found = script.os.fstat(number)
        done.append(("synced", found.st_ino, found.st_size if found.st_ino != tmp_path.stat().st_ino else None))
        fsync(number)

    def replaced(old, new):
        done.append(("replaced", script.os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(script.os, "fsync", synced)
    monkeypatch.setattr(script.os, "replace", replaced)
    path = tmp_path / "config.json"
    script.write_atomically(path, lambda f: f.write(b"new"))
    file = path.stat().st_ino
    assert done == [("synced", file, 3), ("replaced", file), ("synced", tmp_path.stat().st_ino, None)]


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_the_folder_of_a_run(trainer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpt2_mod.py", "--model", "a b"])
    result = trainer.run("--mtp_enabled", "--gqa_enabled", "--n_head", 4, "--log_every", 4)
    folder = result.folder
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"{folder.name}.log", "config.json", "metrics.jsonl", "step000003.pt", "step000006.pt"])
    log = (folder / f"{folder.name}.log").read_text()
    kernel = SCRIPT.with_name("fused_softmax.py").read_text()
    assert log.startswith(SCRIPT.read_text() + "\n-") and log.count(" fused_softmax.py ---") == log.count(kernel) == 1
    after = log[log.index(kernel) + len(kernel):].splitlines()
    assert shlex.join(sys.argv) in "".join(after[:4])
    assert f"python {platform.python_version()}, torch {torch.__version__}" in "".join(after[:4])
    assert [sum(line.startswith(f"step:{step}/6 | loss ") for line in after) for step in range(1, 7)] == [1] * 6
    on_console = [line.split("/")[0] for line in result.out.splitlines() if re.match("step:.*[|] loss ", line)]
    assert on_console == ["step:1", "step:4", "step:6"]
    assert "n_embd=32: 32 x 1.12 in 4 heads of size 8" in result.out and "n_kv_head=1: 0.25 of n_head=4" in result.out
    assert set(result.out.splitlines()) <= set(after)

    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["n_kv_head"] == 1 and config["network"]["vocab_size"] == 257
    assert config["run"]["batch_size"] == 2 and config["run"]["grad_accumulation_steps"] == 1
    content = content_of(folder, 6)
    assert config == dict(network=content["network"], run=content["run"])


def test_records(trainer):
    folder = trainer.run("--mtp_enabled", "--mtp_weight", 0.5, "--mtp_rampup_steps", 4).folder
    for record in steps(folder):
        assert {"step", "train_loss", "lr", "grad_norm", "mtp_weight", "tokens", "tokens_per_second", "peak_mem_MB",
                "step_avg_ms", "time", "seconds_left"} <= set(record)
        assert record["tokens"] == 64 * record["step"] and record["peak_mem_MB"] > 50 and record["time"] > 0
        assert record["mfu"] is None  # nobody's table knows the peak of a CPU
    assert column(steps(folder), "lr") == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3, 3e-3, 1.5e-3])
    assert column(steps(folder), "mtp_weight") == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5])
    times = column(steps(folder), "time")
    assert times == sorted(times)
    assert column(validations(folder), "step") == [3, 6]
    for record in validations(folder):
        assert {"val_loss", "val_ntp_loss", "val_mtp_loss", "mtp_weight", "tokens", "time"} <= set(record)
        assert record["val_targets"] == 150
        assert record["val_loss"] == record["val_ntp_loss"] < record["val_mtp_loss"]
        assert record["mtp_weight"] == steps(folder)[record["step"] - 1]["mtp_weight"]
    assert validations(folder)[1]["val_loss"] < validations(folder)[0]["val_loss"] < math.log(257) + 1


def test_last_lines(trainer):
    result = trainer.run("--n_head", 4, "--n_kv_head", 2, "--precision", "bf16")
    time, peak, details = result.out.splitlines()[-3:]
    assert time.startswith("training took ") and "6 steps" in time and "384 tokens" in time
    assert peak.startswith("Peak memory consumption: ") and peak.endswith(" MiB with precision=bf16")
    assert details.startswith("mem_details: ")
    details = json.loads(details.removeprefix("mem_details: "))
    megabytes = details.pop("peak_memory_mb")
    assert peak.split()[3] == str(megabytes) and megabytes > 50
    assert details == dict(n_head=4, n_kv_head=2, n_embd=32, n_layer=2, kv_sharing_ratio=2.0, embd_scale_factor=0.25)


@pytest.mark.parametrize("flags, saved, kept, validated", [
    ("--val_loss_every 2 --save_every 4", [2, 4, 6], [4, 6], [2, 4, 6]),
    ("--val_loss_every 4 --save_every 2", [2, 4, 6], [2, 4, 6], [4, 6]),
    ("--val_loss_every 0 --save_every 0", [6], [6], [6]),
    ("--val_loss_every 1 --save_every 100", [1, 2, 3, 4, 5, 6], [5, 6], [1, 2, 3, 4, 5, 6]),
    ("--val_loss_every 1 --save_every 3", [1, 2, 3, 4, 5, 6], [3, 5, 6], [1, 2, 3, 4, 5, 6]),
    ("--val_loss_every 4 --save_every 1 --keep_last 3", [1, 2, 3, 4, 5, 6], [4, 5, 6], [4, 6]),
    ("--val_loss_every 2 --save_every 3 --keep_last 1", [2, 3, 4, 6], [6], [2, 4, 6]),
    ("--save_every 2 --keep_last 100", [2, 3, 4, 6], [2, 3, 4, 6], [3, 6]),
    ("--input_val_bin= --save_every 4 --keep_last 1", [4, 6], [6], []),
    ("--no_save_checkpoints", [], [], [3, 6]),
    ("--no-save-checkpoints --val-loss-every=5", [], [], [5, 6]),
])
def test_cadence(trainer, flags, saved, kept, validated):
    """Saved before each validation, by --save_every and at the end; kept are the newest two and --save_every's, or
    --keep_last."""
    result = trainer.run(*flags.split())
    assert checkpoints(result.folder) == [f"step{step:06d}.pt" for step in kept]
    said = re.findall(r"^saved (.*): training waited [\d.]+ s, the file took [\d.]+ s$", result.out, re.M)
    assert said == [str(result.folder / f"step{step:06d}.pt") for step in saved]
    assert column(validations(result.folder), "step") == validated


class Clock:
    """The script's time module; a step takes ten seconds by it."""

    def __init__(self, monkeypatch):
        self.now, step = 1000.0, script.train_step

        def slow_step(*args):
            self.now += 10
            return step(*args)

        monkeypatch.setattr(script, "train_step", slow_step)
        monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: self.now, perf_counter=time.perf_counter))


@pytest.mark.parametrize("flags, saved", [
    # At the start of the fourth step half a minute is over, so it is the last before the save; then it counts anew.
    ("--save_every_minutes 0.5", [4, 8, 12]), ("--save_every_minutes 0.16", [2, 4, 6, 8, 10, 12]),
    ("--save_every_minutes 0.5 --save_every 3", [3, 6, 9, 12]), ("--save_every_minutes 1000", [12]),
    ("--save_every_minutes 0.5 --save_every 5", [4, 5, 9, 10, 12]), ("--save_every_minutes 0", [12]),
    ("--save_every_minutes 0.49", [4, 8, 12]), ("--save_every_minutes 0.51", [5, 10, 12]),
])
def test_checkpoints_by_the_clock(trainer, monkeypatch, flags, saved):
    Clock(monkeypatch)
    flags = ["--input_val_bin", "", "--num_iterations", 12, "--keep_last", 20, *flags.split()]
    assert checkpoints(trainer.run(*flags).folder) == [f"step{step:06d}.pt" for step in saved]


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(trainer, monkeypatch):
    whole = trainer.run("--save_every", 4, "--num_iterations", 12, "--val_loss_every", 0).folder
    write, trained = script.write_checkpoint, []

    def late(path, content):
        time.sleep(0.3)
        trained.append((path.name, len(steps(path.parent))))
        write(path, content)

    monkeypatch.setattr(script, "write_checkpoint", late)
    folder = trainer.run("--save_every", 4, "--num_iterations", 12, "--val_loss_every", 0).folder
    assert trained[0][0] == "step000004.pt" and trained[0][1] > 4  # training has not waited
    for step in (4, 8, 12):
        a, b = (content_of(run, step) for run in (folder, whole))
        for part in ("model", "optimizer", "loader", "rng", "step", "tokens", "skipped"):
            assert_same(a[part], b[part], part)


class Disk:
    """A disk that is full when the checkpoints of these numbers are to be written, counted from 1; 0 is the start."""

    def __init__(self, monkeypatch, *full):
        self.full, self.looks = full, iter(range(1000))
        monkeypatch.setattr(script.shutil, "disk_usage", self.usage)

    def usage(self, folder):
        return SimpleNamespace(free=1000 if next(self.looks) in self.full else 10**12)


def test_a_disk_that_is_full_for_a_while_ends_nothing(trainer, monkeypatch):
    whole = trainer.run("--save_every", 2, "--val_loss_every", 0).folder
    assert "free some space" not in trainer.run().out
    Disk(monkeypatch, 0, 1, 2)
    result = trainer.run("--save_every", 2, "--val_loss_every", 0)
    assert f"\n{result.folder} has 0 MiB free, and a checkpoint takes 1: free some space before" in result.out
    for step in (2, 4):
        assert re.search(rf"^{result.folder / f'step00000{step}.pt'} was not saved \(\d+ MiB are needed and 0 free\): "
                         "training goes on, there is none yet$", result.out, re.M)
    assert checkpoints(result.folder) == ["step000006.pt"] and not list(result.folder.glob(".*"))
    assert_same_runs(whole, result.folder, 6)


def test_a_write_that_fails_late_is_said_of_its_own_step(trainer, monkeypatch):
    """When the next one is due, which waits for it."""
    write = script.write_checkpoint

    def late(path, content):
        if path.name == "step000002.pt":
            time.sleep(0.3)
            raise RuntimeError("unexpected pos 64 vs 0\nin a second line")  # torch.save's word for a full disk
        write(path, content)

    monkeypatch.setattr(script, "write_checkpoint", late)
    result = trainer.run("--save_every", 2, "--val_loss_every", 0)
    failed, saved = result.folder / "step000002.pt", result.folder / "step000004.pt"
    line = f"\n{failed} was not saved (unexpected pos 64 vs 0): training goes on, there is none yet\n"
    assert line in result.out and result.out.index(line) < result.out.index(f"\nsaved {saved}: ")
    assert checkpoints(result.folder) == ["step000004.pt", "step000006.pt"]


def test_a_disk_that_is_full_from_the_first_leaves_nothing_to_go_on_from(trainer, monkeypatch):
    Disk(monkeypatch, 0, 1)
    result = trainer.main(*trainer.flags("--val_loss_every", 0))
    assert result.code == 2 and result.err.count("\n") == 1 and not checkpoints(result.folder)
    assert result.err.endswith("); free some space, then begin again, for there is no checkpoint yet\n")


def test_a_disk_that_is_full_at_the_end_is_an_error(trainer, monkeypatch):
    whole = trainer.run("--save_every", 2, "--val_loss_every", 0).folder
    with monkeypatch.context() as patch:
        Disk(patch, 3)
        result = trainer.main(*trainer.flags("--save_every", 2, "--val_loss_every", 0))
    assert result.code == 2 and result.err.startswith("error: the last checkpoint was not saved (")
    assert f"{result.folder / 'step000004.pt'} is whole: " in result.err and result.err.count("\n") == 1
    assert column(steps(result.folder), "step") == [1, 2, 3, 4, 5, 6]
    assert trainer.main("--resume", "auto", "--output_dir", trainer.output).code == 0
    assert_same_runs(whole, result.folder, 6)


def test_validation_and_saving_change_no_step(trainer):
    often = trainer.run("--val_loss_every", 1, "--save_every", 1).folder
    never = trainer.run("--input_val_bin", "", "--no_save_checkpoints").folder
    assert repeatable(often) == repeatable(never)


def test_no_validation(trainer):
    result = trainer.run("--input_val_bin", "")
    assert validations(result.folder) == [] and len(steps(result.folder)) == 6 and "val_loss" not in result.out


def test_target(trainer):
    result = trainer.run("--target_val_loss", 9, "--val_loss_every", 2)
    folder = result.folder
    assert column(steps(folder), "step") == [1, 2] and column(validations(folder), "step") == [2]
    assert checkpoints(folder) == ["step000002.pt"]
    line = next(line for line in result.out.splitlines() if line.startswith("target validation loss"))
    seconds = float(line.split("after ")[1].split(" s")[0])
    assert "9" in line and "step 2" in line and "128 tokens" in line
    assert seconds == pytest.approx(steps(folder)[-1]["time"] / 1000, abs=0.06)
    assert "training took" in result.out and "for 2 steps" in result.out
    assert column(steps(trainer.run("--target_val_loss", 0.01).folder), "step") == [1, 2, 3, 4, 5, 6]


def test_target_without_checkpoints(trainer):
    folder = trainer.run("--target_val_loss", 9, "--no_save_checkpoints").folder
    assert len(steps(folder)) == 3 and checkpoints(folder) == []


def test_fewer_validation_tokens_than_wished_are_said_once(trainer):
    result = trainer.run("--val_tokens", 1000)
    assert column(validations(result.folder), "val_targets") == [199, 199]
    assert result.out.count("199 targets of its shards") == 1
    assert "of its shards" not in trainer.run().out


def test_validation_is_the_same_for_any_batch(trainer):
    losses = [column(validations(trainer.run("--val_batch_size", size).folder), "val_loss") for size in (0, 1, 3, 50)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Text from a checkpoint


def draw(trainer, *flags):
    trainer.capsys.readouterr()
    code = sample.main([str(flag) for flag in flags])
    out, err = trainer.capsys.readouterr()
    assert code == 0 and re.fullmatch(r"(note: .*\n)?\d+ tokens in .* tokens/s on \w+\n", err), err
    return out


def test_sample(trainer):
    folder = trainer.run("--save_every", 3).folder
    short = ["--max_new_tokens", 40, "--prompt", "The "]
    texts = {seed: draw(trainer, folder, "--seed", seed, *short) for seed in (1, 2)}
    head, text = texts[1].split("\n", 1)
    assert str(folder / "step000006.pt") in head and "step 6" in head and "seed 1" in head
    assert text.startswith("-" * 80 + "\nThe ") and len(text) > 81 + 20
    assert draw(trainer, folder, "--seed", 1, *short) == texts[1]
    assert texts[2].split("\n", 1)[1] != text
    assert draw(trainer, trainer.output, "--seed", 1, *short) == texts[1]
    assert draw(trainer, folder / "step000006.pt", "--seed", 1, *short) == texts[1]
    assert "step 3" in draw(trainer, folder / "step000003.pt", "--seed", 1, *short)
    assert draw(trainer, folder, "--num_samples", 3, *short).count("-" * 80 + "\nThe ") == 3
    likeliest = [draw(trainer, folder, "--temperature", 0, "--seed", seed, *short).split("\n", 1)[1] for seed in (1, 2)]
    assert likeliest[0] == likeliest[1]
    top = draw(trainer, folder, "--top_k", 1, *short).split("\n", 1)[1]
    assert top == likeliest[0]  # of one token, the likeliest


def test_sample_is_what_the_model_says(trainer):
    """Greedy tokens are those of a plain loop over the whole context, also past its length."""
    content = content_of(trainer.run().folder, 6)
    model = script.GPT(script.GPTConfig(**content["network"]))
    model.load_state_dict(content["model"])
    ids = [256, 5, 7]
    new = list(sample.sample(model, ids, 40, 32, 0, 0, 1.0, torch.Generator()))
    assert ids == [256, 5, 7] and len(new) == 40
    for i, token in enumerate(new):
        context = (ids + new)[: 3 + i][-32:]
        assert token == int(model(torch.tensor([context]))[0][0, -1].argmax())


def test_sample_goes_to_the_newest_run(trainer):
    trainer.run()
    newest = trainer.run("--seed", 3).folder
    (trainer.output / "20990101-000000-tiny-none").mkdir()
    assert str(newest / "step000006.pt") in draw(trainer, trainer.output, "--max_new_tokens", 1)


def test_sample_says_what_is_wrong(trainer):
    def refuse(*flags):
        trainer.capsys.readouterr()
        code = sample.main([str(flag) for flag in flags])
        out, err = trainer.capsys.readouterr()
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    assert "holds no checkpoint" in refuse(trainer.data) and str(trainer.data) in refuse(trainer.data)
    assert "none" in refuse(trainer.output / "none")
    damaged = trainer.data / "damaged.pt"
    damaged.write_bytes(b"no checkpoint")
    assert str(damaged) in refuse(damaged)
    folder = trainer.run().folder
    assert "temperature=-1" in refuse(folder, "--temperature", "-1")
    assert "temperature=nan" in refuse(folder, "--temperature", "nan")
    write_data(trainer.data, vocab_size=300)
    strange = trainer.run().folder
    assert "300" in refuse(strange) and "257 (bytes)" in refuse(strange)
