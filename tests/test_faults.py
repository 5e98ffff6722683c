"""A run that is killed, stopped or starved at any moment goes on as if nothing had happened: the same bits, each once.

Most runs are forked from a server that has imported torch, which saves seconds each; under torchrun this file is the
program. Either way a run may be given faults by name: places where it is slow, hangs or kills itself.
"""
import contextlib
import errno
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import train_gpt2_mod as script
from launch import (ROOT, SMALL, assert_same, checkpoints, column, content_of, data_flags, error_lines, records,
                    runs_in, steps, validations, write_data)

FORKS = multiprocessing.get_context("forkserver")
ENVIRONMENT = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
# Two micro-batches for one process or two; what comes next depends on the step, the order of the data and on chance.
FLAGS = [*SMALL, *("--num_iterations 8 --val_loss_every 4 --save_every 2 --keep_last 2 --grad_accumulation_steps 2 "
                   "--shuffle --dropout 0.1 --mtp_enabled --mtp_rampup_steps 6 --log_every 1 --resume auto").split()]
LONG = "--n_layer 4 --n_embd 96 --num_iterations 72 --save_every 3".split()  # checkpoints of 6 MB
TIMES = "time step_ms step_avg_ms tokens_per_second seconds_left mfu peak_mem_MB seconds run run_id made_by".split()


# ----------------------------------------------------------------------------------------------------------------------
# Faults: what happens in a run, given as "name=value name=value"


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def around(owner, name, before=None, after=None):
    """Have a function called, with the arguments of owner.name, each time before or after it."""
    wrapped = getattr(owner, name)

    def wrapper(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        result = wrapped(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapper)


def in_steps(happen):
    around(script, "train_step", before=lambda model, state, *_: happen(state.step + 1))


def in_saves(happen):
    around(script.Hashing, "__init__", before=lambda *_: happen())


def in_validations(happen):
    around(script.GPT, "forward", before=lambda *_, return_loss_components=False, **__:
           return_loss_components and happen())


def slow(seconds, *places):
    for place in places:
        place(lambda *_: time.sleep(float(seconds)))


FAULTS = dict(
    slow=lambda seconds: slow(seconds, in_steps, in_saves, in_validations),
    slow_steps=lambda seconds: slow(seconds, in_steps),
    slow_saves=lambda seconds: slow(seconds, in_saves),
    slow_validations=lambda seconds: slow(seconds, in_validations),
    hanging=lambda step: in_steps(lambda now: now == int(step) and time.sleep(600)),
    # The others are deaths: of this process as it starts, in a step, before its record, in the midst of that, ...
    starting=lambda rank: around(script, "start_run", lambda *_: os.environ.get("RANK") == rank and die()),
    training=lambda step: in_steps(lambda now: now == int(step) and die()),
    recording=lambda step: around(script.RunLog, "record", lambda self, row, _: row["step"] == int(step) and die()),
    half_recorded=lambda step: around(script.GrowingFile, "write", lambda self, text: f'"step": {step},' in text and (
        os.write(self.file.fileno(), text.encode()[:30]), die())),
    # in the first validation, with a third of a checkpoint written, a file written but not in its place, or just there.
    validating=lambda _: in_validations(die),
    half_written=lambda name: around(script.Hashing, "write", lambda self, _: name in self.file.name and (
        self.file.tell() > 150_000 and die())),
    replacing=lambda name: around(os, "replace", before=lambda _, target: Path(target).name == name and die()),
    replaced=lambda name: around(os, "replace", after=lambda _, target: Path(target).name == name and die()),
)


def with_faults(flags, faults):
    torch.set_num_threads(1)
    for name, value in (fault.split("=") for fault in faults.split()):
        FAULTS[name](value)
    return script.main(flags)


def under_torchrun(flags, faults, options):
    from torch.distributed.run import main

    os.environ["FAULTS"] = faults
    main(["--standalone", "--nproc_per_node=2", *options, __file__, *flags])


def in_a_fork(console, environment, function, *args):
    """What a forked process does; what it prints goes to files."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{console}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.exit(function(*args))


# ----------------------------------------------------------------------------------------------------------------------
# Runs in processes of their own


class Runs:
    """Starts runs on data of its own, their folders in .output, and leaves none behind."""

    undisturbed = {}  # folders of runs that nothing happened to, by flags and number of processes

    def __init__(self, folder):
        self.data, self.output, self.console = write_data(folder / "data"), folder / "logs", folder / "console"
        self.started = []

    def flags(self, *flags):
        return [*FLAGS, *data_flags(self.data), "--output_dir", str(self.output), *map(str, flags)]

    def fork(self, rank, environment, *task):
        process = FORKS.Process(target=in_a_fork, args=(f"{self.console}{rank}", environment, *task))
        process.start()
        self.started.append(process)
        return process

    def start(self, *flags, faults="", size=1):
        """One process, or the processes that torchrun would start."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        return [self.fork(rank, dict(place, RANK=str(rank), LOCAL_RANK=str(rank)) if size > 1 else {}, with_faults,
                          self.flags(*flags), faults) for rank in range(size)]

    def torchrun(self, *flags, faults="", options=()):
        return self.fork(0, {}, under_torchrun, self.flags(*flags), faults, options)

    def finish(self, *flags, size=1):
        """A run, or the rest of one, to its end; gives its folder."""
        codes = [code_of(process) for process in self.start(*flags, size=size)]
        assert codes == [0] * size and self.said() == "", (codes, self.said())
        return self.folder()

    def whole(self, *flags, size=1):
        if (flags, size) not in self.undisturbed:
            self.undisturbed[flags, size] = Runs(self.output.parent / "whole").finish(*flags, size=size)
        return self.undisturbed[flags, size]

    def assert_goes_on(self, *flags, size=1):
        """To an end that is that of an undisturbed run."""
        assert_same_runs(self.whole(*flags, size=size), self.finish(*flags, size=size))

    def folder(self):
        """The run's: the newest that has come to a checkpoint, else the newest."""
        found = runs_in(self.output)
        return ([folder for folder in found if checkpoints(folder)] or found)[-1]

    def saved_step(self):
        """The last step recorded, which the newest checkpoint is of."""
        last = steps(self.folder())[-1]["step"]
        assert checkpoints(self.folder())[-1:] == [f"step{last:06d}.pt"]
        return last

    def assert_whole(self):
        """What has the name of a checkpoint is one."""
        for path in self.output.glob("*/step*.pt"):
            script.verify_checksum(path)

    def wait_for_records(self, count):
        wait_for(lambda: any(path.read_text().count("\n") >= count for path in self.output.glob("*/metrics.jsonl")))

    def said(self, rank=0):
        return Path(f"{self.console}{rank}.err").read_text()

    def assert_good_order(self, name, *codes):
        """The processes ended with exit code 75, the first one said it in one line, and the last step is saved."""
        last, lines = self.saved_step(), self.said().splitlines()
        assert set(codes) == {75} and len(lines) == 1, (codes, lines)
        assert lines[0].startswith(f"{name}: training ended after step {last}, saved as ")
        return last


def prepare(monkeypatch):
    """The environment of processes to come, and what they load ahead."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    FORKS.set_forkserver_preload(["torch._dynamo", "test_faults"])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    prepare(monkeypatch)
    made = Runs(tmp_path)
    yield made
    for process in made.started:
        kill(process)


def workers(process):
    """The ids of the processes that torchrun has started."""
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    return {int(pid) for path in lists for pid in path.read_text().split()}


def kill(process):
    """SIGKILL to a process and, if it is torchrun, to its workers, which lead sessions of their own: it stands still
    while they are counted."""
    with contextlib.suppress(ProcessLookupError):
        if process.is_alive():
            os.kill(process.pid, signal.SIGSTOP)
            for pid in [*workers(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
    process.join()


def code_of(process, seconds=120):
    """The exit code of a process that ends in time."""
    process.join(seconds)
    assert process.exitcode is not None, f"it is still there after {seconds} s"
    return process.exitcode


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for nothing"
        time.sleep(0.01)


def without_times(items):
    return {name: value for name, value in items.items() if name not in TIMES}


def assert_same_runs(whole, folder):
    """All that two runs leave is the same, bit for bit and each step once, but for times and memory."""
    assert list(map(without_times, records(whole))) == list(map(without_times, records(folder)))
    assert checkpoints(folder)[-2:] == checkpoints(whole)[-2:] and not list(folder.glob(".*.tmp"))
    last = script.step_of(script.newest_checkpoint(whole))
    assert column(steps(folder), "step") == list(range(1, last + 1))
    assert_same(without_times(content_of(whole, last)), without_times(content_of(folder, last)))


# ----------------------------------------------------------------------------------------------------------------------
# Killed

PLACES = "start-up", "step", "save", "validation"


def places(output, seen):
    """Which of PLACES a run is in, by what its folder holds and the lines of its log that are new: it had seen[path]
    bytes. A save is in the background, so that it may be in two."""
    for path in output.glob("*/*.log"):
        new = path.read_bytes()[seen.get(path, 0) :].decode()
        if lines := re.findall(r"^step:(\d+)/\d+ \| (loss|val_loss) ", new, re.M):
            step, kind = lines[-1]
            found = {"save"} if list(path.parent.glob(".step*.pt.tmp")) else set()
            found |= {"validation"} if kind == "loss" and int(step) % 4 == 0 else set()
            return found or {"step"}
    return {"start-up"}


def kill_at_random(runs, start, rounds, startup, seed):
    """Kill the run once in each of four places a round, in any order, and go on each time; gives a count of where the
    kills found it. It waits for the place, and then for a random time more."""
    chance, landed = random.Random(seed), Counter()
    for place in [place for _ in range(rounds) for place in chance.sample(PLACES, len(PLACES))]:
        seen = {path: path.stat().st_size for path in runs.output.glob("*/*.log")}
        process = start()
        wait_for(lambda: place in places(runs.output, seen) or not process.is_alive())
        time.sleep(chance.uniform(0, startup if place == "start-up" else 0.08))
        kill(process)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, runs.said()
        landed.update(places(runs.output, seen) | {"kills"})
        runs.assert_whole()
    print(f"\n{seed}: {dict(landed)}")
    return landed


def test_killed_three_times(runs):
    landed = kill_at_random(runs, lambda: runs.start(faults="slow=0.02")[0], rounds=1, startup=0.3, seed="short")
    assert landed["kills"] >= 3
    runs.assert_goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", script.OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_at_random_moments(runs, precision, size, optimizer):
    flags = [*LONG, "--precision", precision, "--optimizer", optimizer]
    start, rounds, startup = (lambda **how: runs.start(*flags, **how)[0], 3, 0.2)
    if size == 2:
        start, rounds, startup = (lambda **how: runs.torchrun(*flags, **how), 2, 6)
    landed = kill_at_random(runs, lambda: start(faults="slow=0.04"), rounds, startup, f"{precision} {size} {optimizer}")
    assert landed["kills"] >= 7 and min(landed[place] for place in PLACES) >= 1
    runs.assert_goes_on(*flags, size=size)


@pytest.mark.parametrize("deaths", [
    "half_written=step000004.pt",
    "replacing=step000004.pt",
    "slow_saves=0.2 replaced=step000006.pt",  # nothing is pruned yet, and training has gone on
    "replaced=step000008.pt",  # the last validation is to come
    "half_recorded=5",
    "training=5",
    "validating=first",
    "replaced=config.json",
    "recording=1",
    "training=6, replacing=config.json, replacing=metrics.jsonl, replaced=metrics.jsonl, recording=5",
])
def test_killed_at_a_point(runs, deaths):
    """The last has four more, in resumes that have not trained yet."""
    for death in deaths.split(","):
        assert code_of(*runs.start(faults=death)) == -signal.SIGKILL, runs.said()
        runs.assert_whole()
    runs.assert_goes_on()


# ----------------------------------------------------------------------------------------------------------------------
# Asked to stop


@pytest.mark.parametrize("number", script.StopSignals.HANDLED, ids=lambda number: number.name)
def test_a_signal_ends_training_in_good_order(runs, number):
    process, = runs.start(faults="slow=0.3")
    runs.wait_for_records(1)
    os.kill(process.pid, number)
    assert runs.assert_good_order(number.name, code_of(process)) < 8
    runs.assert_goes_on()


def test_a_signal_cuts_a_validation_short(runs):
    process, = runs.start("--val_batch_size", 1, faults="slow_validations=0.5")
    runs.wait_for_records(4)
    os.kill(process.pid, signal.SIGTERM)
    assert runs.assert_good_order("SIGTERM", code_of(process)) == 4 and validations(runs.folder()) == []
    runs.assert_goes_on("--val_batch_size", 1)


@pytest.mark.parametrize("hang, count", [("hanging=3", 2), ("slow_saves=600", 2), ("slow_validations=600", 4)])
def test_a_second_signal_ends_a_run_that_hangs(runs, hang, count):
    process, = runs.start(faults=hang)
    runs.wait_for_records(count)
    time.sleep(1)  # until it hangs: the record comes before
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(script.StopSignals.REPEATED + 0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert code_of(process, 5) == 128 + signal.SIGINT
    runs.assert_goes_on()


def test_a_second_signal_ends_a_process_that_waits_for_another(runs):
    """In torch's own code, where Python handles no signal."""
    process, other = runs.start(faults="slow=0.3", size=2)
    runs.wait_for_records(3)
    os.kill(other.pid, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(script.StopSignals.REPEATED + 0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert code_of(process, 5) == 128 + signal.SIGTERM


def test_two_signals_within_a_second_are_one(runs):
    """Here of a run that saves nothing, and says so."""
    process, = runs.start("--no_save_checkpoints", "--save_every", 0, "--keep_last", 0, faults="slow_steps=0.5")
    runs.wait_for_records(1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert code_of(process) == 75 and checkpoints(runs.folder()) == []
    line, = runs.said().splitlines()
    assert line.startswith("SIGTERM: training ended after step ") and "not saved (--no_save_checkpoints)" in line


def test_a_signal_where_nobody_listens_any_more(runs):
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, __file__, *runs.flags()], stdout=write, stderr=write,
                          env={**os.environ, "FAULTS": "slow=0.3"}) as process:
        os.close(read)
        os.close(write)
        runs.wait_for_records(3)
        process.terminate()
    assert process.returncode == 75 and runs.saved_step() < 8


def test_one_of_two_processes_is_asked(runs):
    processes = runs.start(faults="slow=0.3", size=2)
    runs.wait_for_records(1)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert runs.assert_good_order("a signal", *map(code_of, processes)) < 8 and runs.said(1) == ""
    runs.assert_goes_on(size=2)


def test_no_process_leaves_before_the_last_checkpoint_is_written(runs):
    """For torchrun asks the others to end as soon as one has, and they may take that for a second signal."""
    processes = runs.start(faults="slow_steps=0.2 slow_saves=2", size=2)
    runs.wait_for_records(2)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: not all(process.is_alive() for process in processes))
    assert runs.saved_step() < 8
    runs.assert_good_order("SIGTERM", *map(code_of, processes))


# ----------------------------------------------------------------------------------------------------------------------
# One process of two dies


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_other_in_a_minute(runs, lost):
    processes = runs.start(faults="slow=0.3", size=2)
    runs.wait_for_records(3)
    kill(processes[lost])
    assert code_of(processes[1 - lost], 60) == 1
    line, = runs.said(1 - lost).splitlines()
    assert line.startswith("error: after step ") and "another process of the run did not answer" in line


def test_a_process_that_dies_as_it_starts_is_one_line_of_the_other(runs):
    assert [code_of(process, 60) for process in runs.start(faults="starting=1", size=2)] == [1, -signal.SIGKILL]
    assert len(error_lines(runs.said())) == len(runs.said().splitlines()) == 1, runs.said()


@pytest.mark.slow
def test_torchrun_is_asked_and_then_restarts_a_run_of_which_processes_die(runs):
    process = runs.torchrun(faults="slow=0.3")
    runs.wait_for_records(2)
    os.kill(process.pid, signal.SIGTERM)
    assert code_of(process) != 0 and f"SIGTERM: training ended after step {runs.saved_step()}" in runs.said()

    process, before = runs.torchrun(faults="slow=0.3", options=["--max-restarts", "3"]), set()
    for lost, count in enumerate((6, 8)):  # records, with that of the validation after step 4
        wait_for(lambda: len(workers(process) - before) == 2)
        runs.wait_for_records(count)
        now = sorted(workers(process) - before)
        os.kill(now[lost], signal.SIGKILL)
        before.update(now)
    assert code_of(process) == 0 and "Traceback" not in runs.said()
    assert_same_runs(runs.whole(size=2), runs.folder())


def test_one_process_then_two_then_one(runs):
    """Each is killed; the rows go on where they were, and the losses are equal to rounding."""
    for size, death in ((1, "training=4"), (2, "training=3")):
        assert -signal.SIGKILL in [code_of(each) for each in runs.start("--dropout", 0, faults=death, size=size)]
    whole, folder = runs.whole("--dropout", 0), runs.finish("--dropout", 0)
    for name in ("step", "tokens", "lr", "mtp_weight"):
        assert column(steps(folder), name) == column(steps(whole), name)
    assert column(steps(folder), "train_loss") == pytest.approx(column(steps(whole), "train_loss"), abs=1e-5)
    assert column(validations(folder), "val_loss") == pytest.approx(column(validations(whole), "val_loss"), abs=1e-5)
    assert_same(content_of(folder, 8)["loader"], content_of(whole, 8)["loader"])


# ----------------------------------------------------------------------------------------------------------------------
# Full disks, and kernels


@pytest.mark.parametrize("when_full, kept", [(range(2, 5), 6), (range(5, 7), 4)])
def test_a_full_disk_loses_no_record(trainer, monkeypatch, when_full, kept):
    """What it does not take waits in memory: until there is room, or to the end. The console says so once."""
    whole, full = trainer.run().folder, []
    step, write = script.train_step, script.GrowingFile.write

    def write_there(self, text):
        with open("/dev/full", "ab", buffering=0) as nowhere, monkeypatch.context() as patch:
            if full:
                patch.setattr(self, "file", nowhere)
            write(self, text)

    def step_there(model, state, *others):
        full[:] = [True] * (state.step + 1 in when_full)
        return step(model, state, *others)

    monkeypatch.setattr(script, "train_step", step_there)
    monkeypatch.setattr(script.GrowingFile, "write", write_there)
    result = trainer.run()
    assert result.out.count(f"cannot be written ({os.strerror(errno.ENOSPC)}): training goes on") == 1
    assert ("lacks its last lines" in result.out) == (kept < 6)
    log = (result.folder / f"{result.folder.name}.log").read_text()
    assert re.findall(r"^step:(\d)/6 \| loss", log, re.M) == [str(step) for step in range(1, kept + 1)]
    kept = list(map(without_times, records(whole)))[: kept + kept // 3]
    assert list(map(without_times, records(result.folder))) == kept


def test_deterministic_kernels_change_no_loss_of_a_cpu(trainer):
    assert_same_runs(trainer.run().folder, trainer.run("--deterministic").folder)


@pytest.mark.slow
def test_a_compiled_run_with_deterministic_kernels_is_resumed_bitwise(trainer):
    if reason := script.why_no_compile(torch.device("cpu")):
        pytest.skip(f"torch.compile does not work here: {reason}")
    whole = trainer.run("--compile", "--deterministic", "--save_every", 3).folder
    part = trainer.copy_of(whole, "interrupted")
    (part / "step000006.pt").unlink()
    torch._dynamo.reset()
    assert trainer.main("--resume", part / "step000003.pt").code == 0
    torch._dynamo.reset()
    assert_same_runs(whole, part)


if __name__ == "__main__":
    sys.exit(with_faults(sys.argv[1:], os.environ["FAULTS"]))
