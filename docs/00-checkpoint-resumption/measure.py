#!/usr/bin/env python3
"""Measure on a GPU what checkpoints promise and cost: bitwise resume, background saves, the finite check.

    python docs/00-checkpoint-resumption/measure.py --input_bin 'fineweb/train_*.bin'
    python docs/00-checkpoint-resumption/measure.py --table

The first runs what results.jsonl does not hold yet for this GPU, one to two minutes an experiment on an H100, and
appends a record each. The second only prints.
"""
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.jsonl"
sys.path[:0] = [str(ROOT), str(HERE.parent)]
import measuring  # noqa: E402
from measuring import table  # noqa: E402

D12 = "--model d12 --precision bf16 --batch_size 64 --total_batch_size 131072 --input_val_bin  --log_every 20"
SMALL_D12 = D12.replace("--batch_size 64", "--batch_size 16")
HOW = {  # a record -> what its run went through
    "resume": "{half} + {half}", "stop": "ended with code {exit_code} after step {reached}, resumed at {resumed_at}",
    "ranks": "the other was gone {survivor_s:.1f} s later, torchrun's restart ended with code {exit_code}",
}
BLOCK = 10  # steps with the finite check, then as many without
# Experiment -> (function, flags, settings); the headline first.
EXPERIMENTS = {
    "d12": ("resume", f"{D12} --deterministic", dict(steps=20)),
    "d12, SIGTERM": ("stop", f"{D12} --deterministic", dict(steps=60, number=signal.SIGTERM)),
    "d12, SIGKILL": ("stop", f"{D12} --deterministic --save_every 10", dict(steps=60, number=signal.SIGKILL)),
    "background save": ("saves", f"{D12} --num_iterations 100 --save_every 25", {}),
    "finite check": ("finite", f"{D12} --num_iterations 140 --no_save_checkpoints", {}),
    "automatic batch": ("saves", SMALL_D12.replace("--batch_size 16", "--batch_size auto")
                        .replace("131072", "524288") + " --num_iterations 15 --save_every 15", {}),
    "d12 without --deterministic": ("resume", D12, dict(steps=20)),
    "d12, one of two processes killed": ("ranks", f"{D12} --deterministic --save_every 10", dict(steps=40)),
    "gpt2 with dropout": ("resume", SMALL_D12.replace("d12", "gpt2") + " --deterministic", dict(steps=10)),
    "d12_mlp3x, MTP": ("resume", SMALL_D12.replace("d12", "d12_mlp3x") + " --mtp_enabled --deterministic",
                       dict(steps=10)),
    "d12, fp8": ("resume", SMALL_D12.replace("bf16", "fp8") + " --deterministic", dict(steps=10)),
}


def doctor():
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "tools" / "doctor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results():
    return measuring.read(RESULTS)


def words(flags):
    """A line of flags as arguments; two spaces in a row hold an empty one."""
    return flags.split(" ")


def trainer(flags, data):
    return [sys.executable, str(ROOT / "train_gpt2_mod.py"), *words(flags), "--input_bin", data]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def speed(folder):
    row = records(folder)[-1]
    return dict(tokens_per_second=row["tokens_per_second"], peak_mem_MB=row["peak_mem_MB"])


def resume(flags, data, steps):
    """tools/doctor.py's N + N = 2N."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--resume", "--steps", str(steps), "--keep",
                   f"{place}/runs", "--", *words(flags), "--input_bin", data]
        done = subprocess.run(command, capture_output=True, text=True)
        said = [line for line in done.stdout.splitlines() if line.startswith(("ok:", "FAIL:", "differences:"))]
        if not said:
            raise RuntimeError(f"{done.stdout}\n{done.stderr}")
        whole, = Path(place, "runs", "whole").iterdir()
        return dict(bitwise=done.returncode == 0, said=" ".join(said), steps=2 * steps, **speed(whole))


def stop(flags, data, steps, number):
    """A run ended by a signal in its midst and resumed, against one that was left alone."""
    with tempfile.TemporaryDirectory() as place:
        common = [*trainer(flags, data), "--num_iterations", str(steps), "--output_dir"]
        subprocess.run([*common, f"{place}/whole"], check=True)
        killed = subprocess.Popen([*common, f"{place}/stopped"])
        while not list(Path(place, "stopped").glob("*/step*.pt")) and killed.poll() is None:
            time.sleep(0.05)
            lines = [len(path.read_text().splitlines()) for path in Path(place, "stopped").glob("*/metrics.jsonl")]
            if lines and lines[0] >= steps // 3:
                break
        time.sleep(1.4 * (number == signal.SIGKILL))  # in the midst of a write, perhaps
        killed.send_signal(number)
        code = killed.wait()
        folder, = Path(place, "stopped").iterdir()
        reached = len(records(folder))
        again = subprocess.run([*common, f"{place}/stopped", "--resume", "auto"], capture_output=True, text=True)
        if again.returncode:
            raise RuntimeError(f"{again.stdout}\n{again.stderr}")
        whole, = Path(place, "whole").iterdir()
        found, ratio = doctor().compare(whole, folder, steps)
        resumed = int(re.search(r"at step (\d+)", again.stdout)[1])
        said = f"at step {found[0][0]}: {found[0][1]}, by up to {ratio:.1e}" if found else ""
        return dict(bitwise=not found, said=said, steps=steps, exit_code=code, reached=reached,
                    resumed_at=resumed, **speed(folder))


def ranks(flags, data, steps):
    """Two GPUs: one process is killed in the midst, and torchrun starts both again; against a run left alone."""
    with tempfile.TemporaryDirectory() as place:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        common = [*trainer(flags, data)[1:], "--num_iterations", str(steps), "--output_dir"]
        subprocess.run([*launch, *common, f"{place}/whole"], check=True)
        restarted = subprocess.Popen([*launch, "--max-restarts", "1", *common, f"{place}/killed", "--resume", "auto"])
        while max(map(len, map(records_so_far, Path(place, "killed").glob("*"))), default=0) < steps // 2:
            time.sleep(0.05)
        listed = subprocess.run(["pgrep", "-P", str(restarted.pid), "-f", "killed"], capture_output=True, text=True)
        survivor, victim = map(int, listed.stdout.split())
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        while Path("/proc", str(survivor)).exists():
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        code = restarted.wait()
        (whole,), (folder,) = Path(place, "whole").iterdir(), Path(place, "killed").iterdir()
        found, ratio = doctor().compare(whole, folder, steps)
        said = f"at step {found[0][0]}: {found[0][1]}, by up to {ratio:.1e}" if found else ""
        return dict(bitwise=not found, said=said, steps=steps, exit_code=code, survivor_s=seconds, **speed(folder))


def records_so_far(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def saves(flags, data):
    """Seconds that training waited for each save, and the steps beside a write against the others."""
    with tempfile.TemporaryDirectory() as logs:
        subprocess.run([*trainer(flags, data), "--output_dir", logs], check=True)
        folder, = Path(logs).iterdir()
        log = (folder / f"{folder.name}.log").read_text()
        every = json.loads((folder / "config.json").read_text())["run"]
        waits = [float(s) for s in re.findall(r"training waited ([\d.]+) s", log)]
        files = [float(s) for s in re.findall(r"the file took ([\d.]+) s", log)]
        ended = {int(a): int(b) for a, b in re.findall(r"step:(\d+)/[^\n]*\nsaved [^\n]*step0*(\d+)\.pt", log)}
        beside = {step for last, saved in ended.items() for step in range(saved + 1, last + 1)}
        times = {r["step"]: r["step_ms"] for r in records(folder) if r["step"] > script_warmup()}
        groups = [[ms for step, ms in times.items() if (step in beside) == wanted] for wanted in (True, False)]
        size = max(path.stat().st_size for path in folder.glob("step*.pt"))
        return dict(waited_s=waits, file_s=files, MiB=size / 2**20, steps_beside=len(groups[0]),
                    batch_size=every["batch_size"], micro_batches=every["grad_accumulation_steps"],
                    beside_ms=statistics.median(groups[0]) if groups[0] else None,
                    other_ms=statistics.median(groups[1]) if groups[1] else None, **speed(folder))


def script_warmup():
    import train_gpt2_mod as script

    return script.TIMING_WARMUP_STEPS


def finite(flags, data):
    """One run whose updates are checked and not checked in turn, BLOCK steps each: milliseconds of either."""
    with tempfile.TemporaryDirectory() as logs:
        subprocess.run([sys.executable, __file__, "--alternate", *trainer(flags, data)[2:], "--output_dir", logs],
                       check=True)
        folder, = Path(logs).iterdir()
        groups = {True: [], False: []}
        for r in records(folder):
            step = r["step"] - 1
            if step >= 2 * BLOCK and step % BLOCK > 1:  # the first two of a block are told beside its neighbour's
                groups[checked(step)].append(r["step_ms"])
        low, _, high = statistics.quantiles(groups[False], n=4)
        return dict(checked_ms=statistics.median(groups[True]), unchecked_ms=statistics.median(groups[False]),
                    quartiles_ms=[low, high], steps=len(groups[True]), **speed(folder))


def checked(step):
    return step // BLOCK % 2 == 0


def alternate(flags):
    """Train with the verdict of Numerics.step left out in every other block of steps."""
    import torch
    from torch import nn

    import train_gpt2_mod as script

    with_check, calls = script.Numerics.step, iter(range(10**9))

    def step(self, optimizer, parameters, grad_clip, loss):
        if checked(next(calls)):
            return with_check(self, optimizer, parameters, grad_clip, loss)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if grad_clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return grad_norm

    assert torch.cuda.is_available()
    script.Numerics.step = step
    return script.main(flags)


def tables(rows):
    """The Markdown tables: resumes, saves, the finite check."""
    by = {row["experiment"]: row for row in rows}
    resumes, costs, checks = [], [], []
    for name, (kind, flags, _) in EXPERIMENTS.items():
        row = by.get(name)
        if row is None:
            continue
        if kind in ("resume", "stop", "ranks"):
            how = HOW[kind].format(half=row["steps"] // 2, **row)
            first = re.search(r"at (step \d+)", row["said"])
            ratio = re.search(r"by up to (\S+)", row["said"])
            verdict = "yes" if row["bitwise"] else f"no: from {first[1]} on, losses by up to {ratio[1]}"
            resumes.append([name, how, verdict, f"{row['tokens_per_second']:,.0f}", f"{row['peak_mem_MB']:,}"])
        elif kind == "saves":
            beside = [f"{row[key]:.1f}" if row[key] else "-" for key in ("beside_ms", "other_ms")]
            costs.append([name, f"{row['batch_size']} x {row['micro_batches']}", f"{row['MiB']:,.0f}",
                          ", ".join(f"{s:.3f}" for s in row["waited_s"]), ", ".join(f"{s:.2f}" for s in row["file_s"]),
                          *beside, f"{row['peak_mem_MB']:,}"])
        else:
            quartiles = "{:.2f} to {:.2f}".format(*row["quartiles_ms"])
            checks.append([f"{row['checked_ms']:.2f}", f"{row['unchecked_ms']:.2f}", quartiles, str(row["steps"])])
    found = (
        (["run", "steps", "bitwise", "tokens/s", "MiB"], resumes),
        (["run", "batch x micro-batches", "file, MiB", "training waited, s", "file took, s",
          "step beside a write, ms", "other steps, ms", "GPU memory, MiB"], costs),
        (["with the check, median ms", "without, median ms", "quartiles without, ms", "steps each"], checks),
    )
    return "\n\n".join(table(heads, cells) for heads, cells in found if cells)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--alternate"]:
        return alternate(argv[1:])
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the tables of results.jsonl and stop")
    parser.add_argument("--input_bin", help="training shards of GPT-2's vocabulary")
    parser.add_argument("--only", choices=EXPERIMENTS, metavar="NAME", help="this experiment and no other")
    args = parser.parse_args(argv)
    if not args.table:
        import torch

        gpu = measuring.gpu_name()
        if not args.input_bin:
            parser.error("--input_bin names the shards")
        done = {row["experiment"] for row in results() if row["gpu"] == gpu}
        for name, (kind, flags, settings) in EXPERIMENTS.items():
            if name not in done and args.only in (None, name) and (kind != "ranks" or torch.cuda.device_count() > 1):
                try:
                    row = globals()[kind](flags, args.input_bin, **settings)
                except (subprocess.CalledProcessError, RuntimeError) as e:
                    print(f"{name}: {e}", file=sys.stderr)  # the others can be measured all the same
                    continue
                row = dict(experiment=name, flags=flags, **row, gpu=gpu, torch=torch.__version__)
                measuring.append(RESULTS, row)
    for gpu, rows in measuring.by_gpu(results()):
        print(f"{gpu}\n\n{tables(rows)}\n")
    return 0


if __name__ == "__main__":
    measuring.run(main, RESULTS)
