"""Two hosts that are network namespaces of this machine, a cable between them, each with its torchrun; and what
docs/07-multi-node says.

A namespace has its own addresses, routes and ports; memory, disk and clock are shared, as a cluster's file system is.
They live in a user namespace of their own, so that root's rights are not needed where the kernel grants these.
"""
import contextlib
import ctypes
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt2_mod as script
from helpers import machine
from launch import (ROOT, SCRIPT, SMALL, checkpoints, column, content_of, data_flags, error_lines, steps, validations,
                    write_data)
from test_faults import (ENVIRONMENT, FAULTS, Runs, assert_same_runs, code_of, kill, prepare,
                         runs, wait_for, with_faults, workers)  # noqa: F401  (runs is a fixture)

ADDRESSES = "10.77.0.1", "10.77.0.2"
CABLE = "cable0"  # the network device at either end
PORT = 29400
LAUNCHES = int(os.environ.get("LAUNCHES", 20))
FOLDER = ROOT / "docs" / "07-multi-node"


def limit_waiting(seconds):
    """Have a process wait so many seconds for another, and no more."""
    script.PATIENCE = datetime.timedelta(seconds=float(seconds))


FAULTS["waiting"] = limit_waiting


def program(name):
    """A program of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_07", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


estimate, measure = program("estimate"), program("measure")


# ----------------------------------------------------------------------------------------------------------------------
# Hosts


def enter(pid, function, *args):
    """Call a function in the namespaces of another process, the user's and the network's."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "net"):
        with open(f"/proc/{pid}/ns/{kind}") as file:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}: {os.strerror(ctypes.get_errno())}")
    return function(*args)


def torchrun_on(host, options, flags, faults):
    from torch.distributed.run import main

    os.environ["FAULTS"] = faults
    main(["--nnodes=2", f"--local_addr={ADDRESSES[host]}", f"--rdzv_conf=is_host={int(host == 0)}", *options, __file__,
          *flags])


class Hosts(Runs):
    """Starts runs on two hosts, whose folders are on a disk that both see."""

    def __init__(self, folder, holders):
        super().__init__(folder)
        self.holders = holders
        self.network(0, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(holders[1].pid))
        for host, address in enumerate(ADDRESSES):
            self.network(host, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                self.network(host, "link", "set", device, "up")

    def network(self, host, *words):
        """iproute2's ip on a host."""
        place = ["nsenter", "--target", str(self.holders[host].pid), "--user", "--net", "--preserve-credentials"]
        subprocess.run([*place, "ip", *words], check=True, capture_output=True, text=True)

    def launch(self, *flags, faults="", restarts=0, per_host=1):
        """A torchrun on each host, with the options and the environment that README.md tells of."""
        options = [f"--nproc_per_node={per_host}", "--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}",
                   "--rdzv_id=7", f"--max_restarts={restarts}"]
        environment = dict(GLOO_SOCKET_IFNAME=CABLE, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        return [self.fork(host, environment, enter, self.holders[host].pid, torchrun_on, host, options,
                          self.flags(*flags), faults) for host in range(2)]

    def trainer(self, process):
        """The id of the one trainer of a torchrun."""
        wait_for(lambda: workers(process))
        pid, = workers(process)
        return pid


def runs_still(pid):
    """Whether a process is there, and not only its exit code for a parent that does not look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def namespaces():
    """Two processes that do nothing but hold a network namespace each, in one user namespace."""
    wait = ["sh", "-c", "echo there; exec cat"]  # until stdin is closed, at the latest as the tests end
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        made = []
        for command in (["unshare", "--user", "--map-root-user", "--net"], ["nsenter", "--user", "unshare", "--net"]):
            if made:
                command[1:1] = ["--target", str(made[0].pid), "--preserve-credentials"]
            made.append(stack.enter_context(subprocess.Popen([*command, *wait], **pipes)))
            if made[-1].stdout.readline() != "there\n":
                raise PermissionError(made[-1].stderr.read().strip())
        yield made


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    prepare(monkeypatch)
    if missing := [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name)]:
        pytest.skip(f"no hosts without {', '.join(missing)} (Linux; packages util-linux and iproute2)")
    with contextlib.ExitStack() as stack:
        try:
            made = Hosts(tmp_path, stack.enter_context(namespaces()))
        except (PermissionError, subprocess.CalledProcessError) as e:
            why = getattr(e, "stderr", "") or str(e)
            pytest.skip(f"no hosts: network namespaces are not permitted here ({why.strip()})")
        yield made
        for process in made.started:
            kill(process)


def test_two_hosts_train_what_two_processes_train(hosts):
    """Bit for bit, and one process to rounding, to which test_distributed.py compares two."""
    codes = [code_of(process) for process in hosts.launch()]
    assert codes == [0, 0], (hosts.said(0), hosts.said(1))
    assert_same_runs(hosts.whole(size=2), hosts.folder())
    assert error_lines(hosts.said(0) + hosts.said(1)) == []


@pytest.mark.slow
def test_a_link_that_drops_ends_both_sides_with_a_checkpoint(hosts):
    """The torchrun that is cut off from the store is stuck in torch's own waiting; the trainers are not."""
    processes = hosts.launch(faults="slow_steps=0.5 waiting=10")
    hosts.wait_for_records(3)
    trainers = [hosts.trainer(process) for process in processes]
    hosts.network(1, "link", "set", CABLE, "down")
    begun = time.monotonic()
    assert code_of(processes[0], 60) == 1
    wait_for(lambda: not any(map(runs_still, trainers)), 60)
    assert 5 < time.monotonic() - begun < 60
    for host in range(2):
        line, = error_lines(hosts.said(host))
        assert re.match(r"error: after step \d another process of the run did not answer \(.*imed out", line)
        assert "--resume auto goes on" in line
    hosts.assert_whole()
    assert 1 <= len(checkpoints(hosts.folder())) and len(steps(hosts.folder())) < 8
    kill(processes[1])
    hosts.network(1, "link", "set", CABLE, "up")
    assert [code_of(process) for process in hosts.launch()] == [0, 0], (hosts.said(0), hosts.said(1))
    assert_same_runs(hosts.whole(size=2), hosts.folder())


@pytest.mark.slow
def test_a_host_that_stands_still_for_a_while_only_slows(hosts):
    processes = hosts.launch(faults="slow_steps=0.2")
    hosts.wait_for_records(2)
    stopped = hosts.trainer(processes[1])
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(1)
    before = len(steps(hosts.folder()))
    time.sleep(4)
    assert len(steps(hosts.folder())) - before <= 1 and processes[0].is_alive()
    os.kill(stopped, signal.SIGCONT)
    assert [code_of(process) for process in processes] == [0, 0], (hosts.said(0), hosts.said(1))
    assert_same_runs(hosts.whole(size=2), hosts.folder())


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_trainer_that_dies_ends_both_hosts_or_is_started_again(hosts, lost):
    for restarts, count in ((0, 3), (1, 6)):  # the second goes on with the first's run
        processes = hosts.launch(faults="slow_steps=0.3", restarts=restarts)
        hosts.wait_for_records(count)
        os.kill(hosts.trainer(processes[lost]), signal.SIGKILL)
        codes = [code_of(process, 60) for process in processes]
        assert codes == ([0, 0] if restarts else [1, 1]), (hosts.said(0), hosts.said(1))
        hosts.assert_whole()
    assert_same_runs(hosts.whole(size=2), hosts.folder())


@pytest.mark.slow
def test_four_processes_then_two_then_one(hosts):
    """Two on each host, one on each, one; the rows go on where they were, and the losses are equal to rounding."""
    flags = ["--dropout", 0, "--grad_accumulation_steps", 4]
    for per_host, death in ((2, "training=4"), (1, "training=6")):
        processes = hosts.launch(*flags, per_host=per_host, faults=f"slow=0.2 {death}")
        assert 0 not in [code_of(process) for process in processes]
        assert checkpoints(hosts.folder())
    whole, folder = hosts.whole(*flags), hosts.finish(*flags)
    for name in ("step", "tokens", "lr", "mtp_weight"):
        assert column(steps(folder), name) == column(steps(whole), name)
    assert column(steps(folder), "train_loss") == pytest.approx(column(steps(whole), "train_loss"), abs=1e-5)
    assert column(validations(folder), "val_loss") == pytest.approx(column(validations(whole), "val_loss"), abs=1e-5)
    assert content_of(folder, 8)["loader"] == content_of(whole, 8)["loader"]


@pytest.mark.slow
@pytest.mark.timeout(60 + 30 * LAUNCHES)
def test_gloo_is_torn_down_cleanly_in_every_one_of_many_launches(runs):
    """Processes of their own, which end as Python does: what aborts, aborts there."""
    flags = runs.flags("--num_iterations", 4, "--save_every", 0, "--no_save_checkpoints", "--keep_last", 0)
    for number in range(LAUNCHES):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        pair = [subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True, env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank})
                for rank in "01"]
        said = [process.communicate(timeout=60)[1] for process in pair]
        assert ([process.returncode for process in pair], said) == ([0, 0], ["", ""]), f"launch {number}"


SRUN = """#!/bin/bash
# Slurm's, for two machines that are this one: a signal goes to the whole process group of each part.
set -m
"$@" & one=$!
"$@" & two=$!
trap 'kill -USR1 -- -$one -$two' USR1
wait $one; wait $two
while kill -0 $one 2>/dev/null || kill -0 $two 2>/dev/null; do wait; done
"""


@pytest.mark.slow
def test_a_slurm_job_of_two_machines_saves_and_queues_itself_again(tmp_path):
    """With stand-ins for srun and scontrol; on one machine see test_docs.py."""
    for name, text in dict(srun=SRUN, scontrol=f'#!/bin/sh\n[ "$1" = show ] && echo localhost && exit\n'
                           f'echo "$@" >>{tmp_path}/asked\n').items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    path, job_id = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", os.getpid()
    settings = dict(os.environ, PATH=path, SLURM_JOB_NAME="job", SLURM_JOB_ID=str(job_id), SLURM_NNODES="2",
                    SLURM_JOB_NODELIST="localhost", NPROC="1", **ENVIRONMENT)
    command = ["bash", "docs/00-checkpoint-resumption/slurm.sh", *SMALL, *data_flags(write_data(tmp_path / "data")),
               "--val_loss_every", "0", "--warmdown_iters", "0"]
    with open(tmp_path / "out", "w") as out:
        job = subprocess.Popen([*command, "--num_iterations", "100000"], cwd=tmp_path, env=settings, stdout=out,
                               stderr=out)
        wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("logs/job/*/metrics.jsonl"))
                 or job.poll() is not None)
        assert job.poll() is None, (tmp_path / "out").read_text()
        job.send_signal(signal.SIGUSR1)
        job.wait(60)
    folder, = tmp_path.glob("logs/job/*")
    saved, = folder.glob("step*.pt")
    assert (tmp_path / "asked").read_text() == f"requeue {job_id}\n", (tmp_path / "out").read_text()
    last = script.step_of(saved) + 3
    done = subprocess.run([*command, "--num_iterations", str(last)], cwd=tmp_path, env=settings, capture_output=True,
                          text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(steps(folder)) == last and (tmp_path / "asked").read_text() == f"requeue {job_id}\n"


# ----------------------------------------------------------------------------------------------------------------------
# On paper: formulas against counting what is sent


def ring(size, parts):
    """Elements that each of so many processes sends to sum vectors of some length, by doing it; checked."""
    vectors = [[float(rank * size + i) for i in range(size)] for rank in range(parts)]
    total, share, sent = [sum(column) for column in zip(*vectors)], size // parts, [0] * parts
    for add, begin in ((True, 0), (False, 1)):  # each part goes round and is added up, then as the sum
        for step in range(parts - 1):
            moved = []
            for rank in range(parts):
                part = (rank + begin - step) % parts
                moved.append(((rank + 1) % parts, part, vectors[rank][part * share : (part + 1) * share]))
                sent[rank] += share
            for target, part, values in moved:
                for i, value in enumerate(values, part * share):
                    vectors[target][i] = vectors[target][i] + value if add else value
    assert all(vector == total for vector in vectors)
    return sent


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_what_a_sum_sends_is_what_a_ring_sends(gpus):
    assert set(ring(24 * gpus, gpus)) == {estimate.all_reduced(24 * gpus, gpus)}
    assert estimate.gathered(24 * gpus, gpus) == 24 * (gpus - 1)  # the share of each of the others


NETWORK = estimate.Network("made up", parameters=1000, outside=400, muons=500, last=300, tokens_per_second=1e6,
                           unshared=0.1, measured=True)


def test_what_a_step_sends_and_keeps():
    assert estimate.ddp(NETWORK, 4, 2) == 2 * 3 / 4 * 2000
    assert (estimate.by_muon(NETWORK, 4), estimate.by_muon(NETWORK, 4, fsdp=True)) == (750, 1500)
    # In bf16 600 of the blocks twice a micro-batch, in fp32 400 once; and the sums of 1000 once a step.
    assert estimate.fsdp(NETWORK, 4, 4, micro_batches=3) == 3 / 4 * (3 * (2 * 2 * 600 + 4 * 400) + 4000)
    assert estimate.kept(NETWORK) == 4 * 1000 + 4 * 1000 + 8 * 500 + 4 * 500 and estimate.kept(NETWORK, 8) == 1750


def test_when_the_sum_is_hidden():
    """The links take 1 ms a 1000 bytes in a host, 4 ms between hosts; a token's backward 2/3 of what it takes."""
    links, token = estimate.Links(1e6, 0.25e6, per_host=4), 1e-6 - 0.1 / 131072
    assert (links.seconds(1000, 4), links.seconds(1000, 5)) == (0.001, 0.004)
    tokens = estimate.hidden_from(NETWORK, 4, 4, links)
    assert tokens * token * 2 / 3 == pytest.approx(2 * 3 / 4 * 4000 * 1e-6)
    muons = 3 / 4 * 1000 * 1e-6
    last = 2 * 3 / 4 * 1200 * 1e-6
    for share, waiting in ((0.5, 0.003), (0.9, last), (5, last)):
        assert estimate.exposed(NETWORK, share * tokens, 4, 4, links) == pytest.approx(waiting + muons)
    one = estimate.step_seconds(NETWORK, 8 * tokens, 2 * tokens, 1, 4, links)
    assert one == pytest.approx(8 * tokens * token + 0.1)
    four = 2 * tokens * token + 0.1 + last + muons
    assert estimate.efficiency(NETWORK, 8 * tokens, 2 * tokens, 4, 4, links) == pytest.approx(one / (4 * four))
    forward, backward = 3 / 4 * 1200 * 1e-6, 3 / 4 * (1200 + 4000) * 1e-6
    assert estimate.fsdp_hidden_from(NETWORK, 4, 4, links) * token == pytest.approx(max(3 * forward, 1.5 * backward))


def test_the_networks_are_the_presets():
    every = estimate.networks()
    for name, n in every.items():
        config, run, _ = script.resolve(dict(model=name, batch_size=8, sequence_length=1024), machine())
        with torch.device("meta"):
            model = script.GPT(config)
        plan = script.memory_plan(config, run, model)
        assert plan["optimizer"] + 8 * n.parameters == estimate.kept(n)
        blocks = sum(p.numel() for key, p in model.named_parameters() if key.startswith("transformer.h."))
        assert n.parameters - n.outside == blocks and n.last == config.vocab_size * config.n_embd
        assert (n.muons > 0) == (name == "d12_fast") and n.measured == (name != "gpt2-xl")
    assert every["d12"].tokens_per_second == pytest.approx(540_000, rel=0.01)  # as docs/01 has it
    assert every["d24"].tokens_per_second == pytest.approx(131072 / 0.660, rel=0.01)


def test_the_tables_on_paper_are_the_readmes(capsys):
    assert estimate.main(["--table"]) == 0
    printed, text = capsys.readouterr().out, (FOLDER / "README.md").read_text()
    for block in printed.strip().split("\n\n"):
        assert block in text
    assert estimate.main("--table --links 64 3.125 --per_host 4".split()) == 0
    assert "| as given | 64 |" in capsys.readouterr().out
    for words in ("--table --links 64 0", "--table --reached x", ""):
        assert estimate.main(words.split()) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is to be measured


def resolved(run, processes):
    here = script.ANY_MACHINE._replace(world_size=processes)
    return script.resolve(script.parse_flags(run.flags.split()), here)[:2]


@pytest.mark.parametrize("name", measure.SCALED)
def test_one_gpu_and_two_have_equal_steps(name):
    (config, one), (same, two) = (resolved(measure.scaled(name, n), n) for n in (1, 2))
    assert config == same and one.tokens_per_step == two.tokens_per_step == measure.SCALED[name][0]
    assert one.num_iterations == two.num_iterations and one.val_loss_every == two.val_loss_every > 0
    assert (two.parallel, two.gradient_dtype) == ("ddp", "fp32") and two.batch_size <= one.batch_size
    assert not measure.scaled(name, 2).is_of(measure.scaled(name, 1)._asdict())


def test_the_other_runs():
    assert resolved(measure.scaled("d12", 2, "bf16"), 2)[1].gradient_dtype == "bf16"
    (config, ddp), (same, fsdp) = (resolved(measure.large(parallel), 2) for parallel in ("ddp", "fsdp"))
    assert config == same and config.n_layer == 48 and (ddp.parallel, fsdp.parallel) == ("ddp", "fsdp")
    run = resolved(measure.profiled(), 2)[1]
    assert run.profile and run.num_iterations > script.TIMING_WARMUP_STEPS + script.PROFILED_STEPS
    assert not measure.profiled().is_of(measure.scaled("d12", 2)._asdict())
    counts = [len(measure.runs(measure.KINDS, n)) for n in (1, 2)]
    assert counts == [3, 6] and all(40 < measure.expected_seconds(run, [], processes=2) < 300
                                    for run, _ in measure.runs(measure.KINDS, 2))


def made_up(run, speed, loss=4.0, **figures):
    return dict(**run._asdict(), seed=1, val_loss=loss, curve=[[50, 1, 1.0, 5.0], [100, 2, 2.0, loss]], sharing=0,
                tokens_per_second=speed, gpu="A GPU", torch="2.11.0", script_sha256="abcdef0123", **figures)


def test_the_tables_of_made_up_records():
    rows = [made_up(measure.scaled("d12", 1), 5e5), made_up(measure.scaled("d12", 2), 9.6e5, 4.001),
            made_up(measure.scaled("d12", 2, "bf16"), 9.4e5, 4.01), made_up(measure.scaled("d24", 2), 4e5),
            made_up(measure.large("fsdp"), 8e4, peak_mem_MB=40_000),
            dict(measure.profiled()._asdict(), ranks=[(10.0, 0.5), (11.0, 0.25)], gpu="A GPU")]
    scaling, fsdp, profile = measure.tables(rows)
    assert [line.split(" | ")[3:6] + line.split(" | ")[7:] for line in scaling.splitlines()[2:]] == [
        ["500,000", "960,000", "1.920", "yes", "4.0000", "4.0010", "0.0010 |"],
        ["500,000", "940,000", "1.880", "no", "4.0000", "4.0100", "0.0100 |"]]
    assert all(1.9 < float(line.split(" | ")[6]) < 2 for line in scaling.splitlines()[2:])
    assert fsdp.splitlines()[2:] == ["| `gpt2-xl`, fsdp | 40,000 | 80,000 | 4.0000 |"]
    assert profile.splitlines()[2:] == ["| 0 | 10.0 | 0.5 |", "| 1 | 11.0 | 0.2 |"]
    assert measure.tables([]) == []


def test_what_of_the_communication_is_hidden():
    """Milliseconds 0 to 4 and 6 to 9 of a sum, beside kernels in 1 to 3, 2 to 7 and 20 to 21."""
    def kernel(name, begin, end):
        return dict(cat="kernel", name=name, ts=1000 * begin, dur=1000 * (end - begin))

    events = [kernel("ncclDevKernel_AllReduce", 0, 4), kernel("ncclDevKernel_AllGather", 6, 9), kernel("gemm", 1, 3),
              kernel("triton_", 2, 7), kernel("gemm", 20, 21), dict(cat="cpu_op", name="nccl:all_reduce", ts=0, dur=9)]
    assert measure.communication(events) == pytest.approx((7.0, 1.0 + 2.0))
    assert measure.communication([]) == (0, 0)


STAND_IN = '''
import gzip, json, os, pathlib, sys
typed = dict(zip(sys.argv, sys.argv[1:]))
folder = pathlib.Path(typed["--output_dir"]) / "run"
folder.mkdir(parents=True, exist_ok=True)
step = dict(step=1, tokens=1, time=1000.0, tokens_per_second=2.0 if "--parallel" in sys.argv else 1.0, step_avg_ms=1.0,
            peak_mem_MB=1, step_ms=1.0)
(folder / "metrics.jsonl").write_text(json.dumps(step) + "\\n" + json.dumps(dict(step, val_loss=4.0)) + "\\n")
for rank in (0, 1) if "--profile" in sys.argv else ():
    event = dict(cat="kernel", name="nccl", ts=0, dur=2000)
    with gzip.open(folder / f"rank{rank}.pt.trace.json.gz", "wt") as file:
        json.dump(dict(traceEvents=[event]), file)
'''


def test_what_is_missing_is_measured_once(monkeypatch, tmp_path, capsys):
    (tmp_path / "script.py").write_text(STAND_IN)
    monkeypatch.setattr(measure.measuring, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(measure.measuring, "gpu_name", lambda: "A GPU")
    monkeypatch.setattr(measure.measuring, "check_shards", lambda args: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert measure.main(["--input_bin", "x*.bin"]) == 2 and "1 GPU, and these" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = []
    monkeypatch.setattr(measure.measuring, "torchrun", lambda processes: asked.append(processes) or [sys.executable])
    assert measure.main(["--budget_s", "10"]) == 0 and not asked
    assert measure.main(["--input_bin", "x*.bin"]) == 0
    assert asked == [2, 2, 2, 1, 1, 1, 2, 2, 2, 2]
    rows = measure.measuring.read(measure.RESULTS)
    assert [row.get("processes", 1) for row in rows] == asked
    assert "| 2.000 |" in capsys.readouterr().out and rows[-1]["ranks"] == [[2.0, 2.0]] * 2
    assert measure.main([]) == 0 and len(asked) == 10


def test_the_readme():
    text, results = (FOLDER / "README.md").read_text(), measure.measuring.read(measure.RESULTS)
    for gpu in {row["gpu"] for row in results}:
        assert all(table in text for table in measure.tables([row for row in results if row["gpu"] == gpu]))
    assert ("not measured yet" in text) == (not results)
    lines = "".join(re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S)).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    for name, module in (("measure", measure), ("estimate", estimate)):
        found = [words[2:] for words in commands if f"docs/07-multi-node/{name}.py" in words]
        assert found
        for words in found:
            module.make_parser().parse_args(words)
    launched = [words for words in commands if words[:1] == ["torchrun"]]
    assert len(launched) == 3
    for words in launched:
        typed = dict(word.lstrip("-").split("=") for word in words[1:] if "=" in word)
        processes = int(typed.get("nnodes", 1)) * int(typed["nproc_per_node"])
        flags = script.parse_flags(words[words.index("train_gpt2_mod.py") + 1 :])
        run = script.resolve(flags, machine(world_size=processes))[1]
        assert run.tokens_per_step == flags["total_batch_size"] and flags["resume"] == "auto"
    job = next(words for words in commands if "sbatch" in words)
    assert (ROOT / job[job.index("sbatch") + 3]).exists()


def test_no_line_is_too_long():
    for path in (*FOLDER.glob("*.py"), Path(__file__)):
        assert not [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120], path.name


if __name__ == "__main__":
    sys.exit(with_faults(sys.argv[1:], os.environ["FAULTS"]))
