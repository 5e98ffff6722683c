"""Odd but real ways to start, resume and end a run: nothing is lost, and nobody else's files are touched."""
import os
import signal
import subprocess
import sys
import time
import types

import pytest

import train_gpt2_mod as script
from helpers import FakeWorld
from launch import SCRIPT, assert_same, checkpoints, column, content_of, steps


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_resume_from_a_copy_leaves_the_run_alone(trainer):
    folder = trainer.run("--save_every", 2).folder
    best = trainer.output / "best"
    best.mkdir()
    (best / "step000002.pt").write_bytes((folder / "step000002.pt").read_bytes())
    before = files_of(folder), files_of(best)
    result = trainer.main("--resume", best / "step000002.pt", "--num_iterations", 4)
    assert result.code == 0 and (files_of(folder), files_of(best)) == before
    assert result.folder not in (None, folder, best)
    assert column(steps(result.folder), "train_loss") == column(steps(folder), "train_loss")[2:4]


def test_a_resume_sets_later_checkpoints_aside(trainer):
    folder = trainer.run("--save_every", 2).folder
    old = (folder / "step000006.pt").read_bytes()
    result = trainer.main("--resume", folder / "step000002.pt", "--num_iterations", 4, "--save_every", 0)
    assert result.code == 0 and checkpoints(folder) == ["step000003.pt", "step000004.pt"]
    assert (folder / "step000006.pt.aside").read_bytes() == old and "step000006.pt.aside" in result.out
    again = trainer.main("--resume", "auto", "--output_dir", trainer.output, "--num_iterations", 5)
    assert again.code == 0 and column(steps(folder), "step") == [1, 2, 3, 4, 5]


def test_a_resume_of_a_run_folder_takes_its_newest(trainer, tmp_path):
    folder = trainer.run("--save_every", 2).folder
    result = trainer.main("--resume", folder, "--num_iterations", 7)
    assert result.code == 0 and "step000006.pt at step 6" in result.out
    empty = tmp_path / "empty"
    empty.mkdir()
    result = trainer.main("--resume", empty)
    assert result.code == 2 and "folder without checkpoints" in result.err
    assert trainer.main("--resume", "").code == 2


def test_auto_needs_no_flags_of_the_run(trainer):
    folder = trainer.run().folder
    small = ["--model", "tiny", "--n_layer", 2, "--n_head", 2, "--n_embd", 32]
    flags = ["--resume", "auto", "--total_batch_size", 128, "--num_iterations", 8, "--output_dir", trainer.output]
    result = trainer.main(*flags, *small)
    assert result.code == 0 and column(steps(folder), "step") == list(range(1, 9)), result


def test_a_finished_run_says_so_and_another_network_is_not_resumed(trainer):
    folder = trainer.run().folder
    result = trainer.main("--resume", folder)
    assert result.code == 0 and "nothing is left to train: 6 of 6 steps are done" in result.out
    result = trainer.run("--resume", "auto", "--n_layer", 1)
    assert "no checkpoint of such a network" in result.out and result.folder != folder


@pytest.mark.parametrize("flags, words", [
    (["--num_iterations", 10**19], "num_iterations="), (["--seed", 10**22], "seed="),
    (["--learning_rate", 1e300], "learning_rate="),
])
def test_absurd_numbers_are_refused(trainer, flags, words):
    result = trainer.main(*trainer.flags(*flags))
    assert result.code == 2 and result.err.startswith(f"error: {words}") and "must be at most " in result.err


@pytest.mark.parametrize("rank, size", [("1", "1"), ("0", "0"), ("-1", "2")])
def test_ranks_that_cannot_be(trainer, monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(script.ConfigError, match=f"RANK={rank} must be below WORLD_SIZE={size}"):
        script.World("cpu")


def test_a_path_with_the_characters_of_patterns(trainer):
    odd = trainer.data.parent / "a [b]"
    odd.mkdir()
    path = odd / "train.bin"
    path.write_bytes((trainer.data / "train_001.bin").read_bytes())
    assert script.TokenShards(str(path)).total == 160


def test_a_shard_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(script.DataError, match="not a file"):
        script.TokenShards(str(tmp_path / "*.bin"))


def started(trainer, *flags, **settings):
    command = [sys.executable, SCRIPT, *trainer.flags(*flags)]
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, **settings)


def test_a_console_that_goes_away_ends_no_run(trainer):
    read, write = os.pipe()
    process = started(trainer, "--log_every", 1, stdout=write)
    os.close(write)
    os.close(read)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    (folder,) = trainer.output.iterdir()
    assert column(steps(folder), "step") == [1, 2, 3, 4, 5, 6]
    assert checkpoints(folder) == ["step000003.pt", "step000006.pt"]


def test_a_console_without_unicode_shows_what_it_can(trainer, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = started(trainer, "--output_dir", tmp_path / "ü", stdout=subprocess.PIPE, env=environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "" and "\\xfc" in out


def test_an_interruption_is_one_line(trainer):
    process = started(trainer, "--num_iterations", 100000, "--save_every", 2, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(trainer.output.glob("*/step*.pt")) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    (folder,) = trainer.output.iterdir()
    last = steps(folder)[-1]["step"]
    saved = folder / f"step{last:06d}.pt"
    assert process.returncode == 75 and checkpoints(folder)[-1] == saved.name
    assert err == f"SIGINT: training ended after step {last}, saved as {saved}; --resume auto goes on\n"
    for name in checkpoints(folder):
        assert script.load_checkpoint(folder / name)["step"] == script.step_of(folder / name)


@pytest.mark.parametrize("number", script.StopSignals.HANDLED, ids=lambda number: number.name)
def test_a_signal_ends_training_after_the_step_and_a_resume_goes_on(trainer, monkeypatch, number):
    """Nothing is left of the signals' handling, nor of the run's end."""
    whole = trainer.run("--val_loss_every", 0).folder
    handlers = [signal.getsignal(other) for other in script.StopSignals.HANDLED]
    plain, entered = script.train_step, []

    def train_step(model, state, *others):
        if state.step == 2:
            signal.raise_signal(number)
            while entered[0].asked is None:
                time.sleep(0.001)
        return plain(model, state, *others)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", train_step)
        patch.setattr(script.StopSignals, "__enter__", lambda self, enter=script.StopSignals.__enter__:
                      entered.append(enter(self)) or self)
        result = trainer.main(*trainer.flags("--val_loss_every", 0))
    saved = result.folder / "step000004.pt"  # the fourth step is the first that knows
    assert result.code == 75 and result.err == (f"{number.name}: training ended after step 4, saved as {saved}; "
                                                "--resume auto goes on\n")
    assert checkpoints(result.folder) == [saved.name]
    assert result.err in (result.folder / f"{result.folder.name}.log").read_text()
    assert [signal.getsignal(other) for other in script.StopSignals.HANDLED] == handlers
    assert trainer.main("--resume", result.folder).code == 0
    assert column(steps(result.folder), "train_loss") == column(steps(whole), "train_loss")
    assert_same(content_of(result.folder, 6)["model"], content_of(whole, 6)["model"])


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_breaks_off_says_whether_there_is_something_to_go_on_from(trainer, monkeypatch, saved):
    helps = "--resume auto goes on" if saved else "begin again, for there is no checkpoint yet"
    plain = script.train_step

    def train_step(model, state, *others):
        if state.step == 2:
            raise MemoryError("all is taken")
        return plain(model, state, *others)

    monkeypatch.setattr(script, "train_step", train_step)
    result = trainer.main(*trainer.flags("--save_every", int(saved), "--val_loss_every", 0))
    assert result.code == 2 and "out of memory in step 3" in result.err and result.err.endswith(f"; {helps}\n")
    with pytest.raises(script.LostError, match=f"^after step 2 .*; {helps}$"):
        with script.own_words_for_failures(FakeWorld(size=2), types.SimpleNamespace(step=2), folder=result.folder):
            raise RuntimeError("gloo: connection closed by peer")


def test_a_process_lost_before_training_leaves_nothing_to_resume():
    with pytest.raises(script.LostError, match="^before training .*; run the same command again$"):
        with script.own_words_for_failures(FakeWorld(size=2)):
            raise RuntimeError("NCCL error")


def test_a_signal_to_a_run_that_saves_nothing_names_no_resume(trainer, monkeypatch):
    plain = script.train_step

    def train_step(*args):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)  # for the thread that reads it
        return plain(*args)

    monkeypatch.setattr(script, "train_step", train_step)
    monkeypatch.setattr(script.StopSignals, "REPEATED", 600.0)
    result = trainer.main(*trainer.flags("--no_save_checkpoints", "--val_loss_every", 0))
    assert result.code == 75 and result.err.endswith(" (--no_save_checkpoints); begin again, for there is no "
                                                     "checkpoint yet\n")


def test_a_path_that_nobody_looked_at_is_one_line_and_the_users_to_mend(trainer, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr(script, "TokenShards", denied)
    result = trainer.main(*trainer.flags())
    assert result.code == 2 and result.folder is None
    assert result.err == "error: /some/where cannot be used (Permission denied); name another\n"


def test_an_interruption_before_training_is_one_line(trainer, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "TokenShards", interrupted)
    result = trainer.main(*trainer.flags())
    assert result.code == 130 and result.folder is None
    assert result.err.startswith("interrupted: ") and result.err.count("\n") == 1
