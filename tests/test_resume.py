"""Runs as a user makes them: what they leave behind, that they can be repeated and resumed, and text from them."""
import importlib.util
import json
import math
import platform
import re
import shlex
import sys

import pytest
import torch

import train_gpt2_mod as script
from launch import (ROOT, SCRIPT, assert_same, checkpoints, column, content_of, records, snapshot, steps,
                    validations, write_data)

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


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_the_folder_of_a_run(trainer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpt2_mod.py", "--model", "a b"])
    result = trainer.run("--mtp_enabled", "--gqa_enabled", "--n_head", 4, "--log_every", 4)
    folder = result.folder
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"{folder.name}.log", "config.json", "metrics.jsonl", "step000006.pt"])
    log = (folder / f"{folder.name}.log").read_text()
    assert log.startswith(SCRIPT.read_text())
    after = log[len(SCRIPT.read_text()):].splitlines()
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


@pytest.mark.parametrize("flags, saved, validated", [
    ("--val_loss_every 2 --save_every 4", [4, 6], [2, 4, 6]),
    ("--val_loss_every 4 --save_every 2", [2, 4, 6], [4, 6]),
    ("--val_loss_every 0 --save_every 0", [6], [6]),
    ("--val_loss_every 1 --save_every 100", [6], [1, 2, 3, 4, 5, 6]),
    ("--no_save_checkpoints --save_every 2", [], [3, 6]),
    ("--no-save-checkpoints --val-loss-every=5", [], [5, 6]),
])
def test_cadence(trainer, flags, saved, validated):
    result = trainer.run(*flags.split())
    assert checkpoints(result.folder) == [f"step{step:06d}.pt" for step in saved]
    assert result.out.count("\nsaved ") == len(saved)
    assert column(validations(result.folder), "step") == validated


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
    assert (code, err) == (0, "")
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
    new = sample.sample(model, ids, 40, 32, 0, 0, torch.Generator())
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
