#!/usr/bin/env python3
"""How fast does it train? Step time, tokens/s, MFU and memory of one or several command lines of train_gpt2_mod.py.

    python tools/bench.py --model d12 --batch_size 64 --total_batch_size 131072
    python tools/bench.py "--model d12" "--model d12_mlp3x" -- --batch_size 64 --total_batch_size 131072
    python tools/bench.py "--model d12" "--script ../old/train_gpt2_mod.py --model d12" -- --batch_size 64

Flags that are not listed here go to the script. Several command lines stand in quotes, and after -- what all of them
share. Each gets a process of its own, which puts its run together as training does and warms up; the first step is
timed by itself, since it compiles (or loads what torch compiled before) and allocates. Then they take turns, a window
of steps each, A B A B: only one computes at a time, and what drifts on the machine meets all alike. After its window a
process gives the GPU back what memory it can, and a step that is not timed takes it again: only weights and optimizer
must fit side by side. Peak MiB is of all its steps, the warm-up included.

Data are random tokens of the network's vocabulary, in shards that go when the program ends, unless --input_bin names
others. Nothing is saved or sent: the flags of checkpoints, logs and W&B do not count here.

Exit codes: 0, measured; 2, one line on stderr says what to mend; 130, interrupted; 141, nobody read what was
printed.
"""
import argparse
import contextlib
import datetime
import importlib.util
import inspect
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
from shards import DataError, Parser, ShardWriter, ended_as_by_ctrl_c, exit_code, require, sha256_of  # noqa: E402

MODULE = "train_gpt2_mod"  # the name under which a worker imports the script, wherever it lies
WORK = "--worker"  # makes this file a worker
MOST_TOKENS = 2**26  # random ones in a file, 128 MiB; a longer measurement sees them again
VALIDATIONS = 3  # timed, after one that is not


# ----------------------------------------------------------------------------------------------------------------------
# The worker: one command line's run, which computes when it is asked. Only here is torch imported: Linux counts the
# memory of the process that starts another to the peak of that one.


def load_script(path):
    spec = importlib.util.spec_from_file_location(MODULE, path)
    sys.modules[MODULE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit_memory(gib, device):
    import torch

    require(device.type == "cuda", f"memory_gib={gib:g} can be held only on a CUDA device, and this run is on "
            f"{device.type}; drop it")
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    require(gib <= total, f"memory_gib={gib:g} must be at most what the device has, {total:.1f}; lower it")
    torch.cuda.set_per_process_memory_fraction(gib / total)


class Run:
    """Put together as training does it. The parent asks for the methods build, window, resident and validation by name,
    and gets what they return."""

    def __init__(self, order, stack):
        self.order, self.stack, self.script = order, stack, load_script(order.script)
        self.typed = self.script.parse_flags(order.flags)
        refused = [f"--{name}" for name in ("resume", "init_from", "dry_run", "profile") if self.typed.get(name)]
        require(not refused, f"{', '.join(refused)} would be ignored: what is measured begins anew, and no trace is "
                "written; drop it")
        self.world = self.script.World(self.typed.get("device", self.script.TrainConfig.device))
        require(self.world.size == 1, "each command line is measured in one process; start bench.py without torchrun")
        stack.enter_context(self.world)
        if order.memory_gib is not None:
            limit_memory(order.memory_gib, self.world.device)
        self.write_shards()

    def write_shards(self):
        """Shards of random tokens for those that the flags do not name."""
        typed, script, order = self.typed, self.script, self.order
        vocab_size = script.TokenShards(typed["input_bin"]).vocab_size if "input_bin" in typed else 0
        config, run, _ = script.resolve(typed, self.world.machine(vocab_size))
        steps = order.warmup + order.windows * (1 + order.steps)
        counts = dict(
            input_bin=config.lookahead + max(run.tokens_per_step, min(steps * run.tokens_per_step, MOST_TOKENS)),
            input_val_bin=1 + min(run.val_tokens, MOST_TOKENS),
        )
        self.notes = [f"{name}: random tokens" for name in counts if name not in typed]
        for name in counts.keys() - typed.keys():
            typed[name] = os.path.join(order.folder, f"{name}.bin")
            writer = ShardWriter(typed[name], config.vocab_size)
            writer.write(np.random.default_rng(1337).integers(config.vocab_size, size=counts[name], dtype=np.uint16))
            writer.close()

    def machine(self):
        import torch

        device = self.world.device.type
        name = torch.cuda.get_device_name() if device == "cuda" else f"{device.upper()} ({platform.machine()})"
        return dict(gpu=name, torch=torch.__version__)

    def build(self):
        """Build, compile, warm up."""
        script, world = self.script, self.world
        deterministic = self.typed.get("deterministic", script.TrainConfig.deterministic)
        self.stack.enter_context(script.deterministic_algorithms(deterministic))
        found = script.start_run(self.typed, world, script.Origin())
        self.state, self.config, self.run, self.val_shards, kernel, notes = found
        self.stack.enter_context(kernel())
        self.notes += notes
        log = types.SimpleNamespace(text=self.notes.append)
        takes_optimizer = "optimizer" in inspect.signature(script.parallelize).parameters  # earlier versions do not
        optimizer = [self.state.optimizer] * takes_optimizer
        self.model = script.parallelize(self.state.model, self.run, world, log, *optimizer)
        self.infinite = 0
        first = self.train(1)
        self.train(self.order.warmup - 1)
        if self.order.data_share:
            batch = self.state.loader.next_batch()
            self.resident_loader = types.SimpleNamespace(next_batch=lambda: batch)
        world.empty_cache()
        model, run = self.state.model, self.run
        return dict(
            notes=self.notes, model=run.model, precision=self.config.precision, batch_size=run.batch_size,
            parameters=model.parameter_count(), flops_per_token=model.flops_per_token(run.sequence_length),
            tokens_per_step=run.tokens_per_step, first_step_s=first, peak_flops=world.peak_flops(),
        )

    def train(self, steps):
        """The seconds that so many steps take. Nothing is read from the device in between."""
        state, run = self.state, self.run
        self.world.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            step = min(state.step, run.num_iterations - 1)  # the end is no end here
            scheduled = self.script.plan(step, self.config, run)
            figures = self.script.train_step(self.model, state, scheduled, run, self.world, (False, False, False))
            self.numbers, norm = figures[:2]
            self.infinite = self.infinite + (~norm.isfinite()).int()  # counted where they are: nobody waits
            state.step += 1
            if run.empty_cache_every and state.step % run.empty_cache_every == 0:
                self.world.empty_cache()
        self.world.synchronize()
        return time.perf_counter() - began

    def window(self):
        self.train(1)  # takes the memory again that the last window gave back
        step_ms = 1000 * self.train(self.order.steps) / self.order.steps
        loss, peak = float(self.numbers[0]), self.world.peak_memory_mb()
        self.world.empty_cache()
        return dict(ms=step_ms, loss=loss, peak=peak, infinite=int(self.infinite))

    def resident(self):
        """A window with one batch that stays on the device."""
        loader, self.state.loader = self.state.loader, self.resident_loader
        reply = self.window()
        self.state.loader = loader
        return reply

    def validation(self):
        require(self.val_shards, "input_val_bin is empty, and --validation needs it; drop one of the two")
        speeds = []
        for _ in range(1 + VALIDATIONS):
            began = time.perf_counter()
            losses = self.script.evaluate(self.state.model, self.val_shards, self.config, self.run, self.world,
                                          self.state.numerics)
            speeds.append(losses["val_targets"] / (time.perf_counter() - began))
        self.world.empty_cache()
        return dict(tokens_per_second=statistics.median(speeds[1:]))


def complaint(error):
    """What a worker says of an error: the project's own texts as they are, others by name."""
    if type(error).__module__ in (MODULE, "shards"):
        return str(error)
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    return first + "; lower --batch_size, or add --gradient_checkpointing" * ("memory" in first)


def work():
    """Take the order, the first line on stdin, then do what each further line names; a line each on what was stdout.
    The end of stdin is the end."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(**content):
        print(json.dumps(content), file=replies, flush=True)

    try:
        with contextlib.ExitStack() as stack:
            run = Run(types.SimpleNamespace(**json.loads(sys.stdin.readline())), stack)
            reply(**run.machine())
            for line in sys.stdin:
                reply(**getattr(run, line.strip())())
    except Exception as e:
        reply(error=complaint(e))


# ----------------------------------------------------------------------------------------------------------------------
# The parent: asks the workers in turn


class Worker:
    """The process of one command line, and what it said so far. A context manager: the process lives inside it."""

    def __init__(self, text, **order):
        self.text, self.order, self.folder = text, order, Path(order["folder"])
        self.facts, self.windows, self.residents = {}, [], []

    def __enter__(self):
        self.folder.mkdir()
        with open(self.folder / "stderr", "w") as stderr:
            self.process = subprocess.Popen([sys.executable, "-B", Path(__file__).resolve(), WORK], text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
        self.send(json.dumps(self.order))
        return self

    def __exit__(self, kind, *error):
        if kind is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # on which the worker ends
        self.process.wait()
        self.process.stdout.close()

    def send(self, line):
        with contextlib.suppress(BrokenPipeError):  # the reply, which does not come, tells
            print(line, file=self.process.stdin, flush=True)

    def reply(self):
        """The worker's next line. Raises DataError for an error, and for a worker that is gone."""
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            words = (self.folder / "stderr").read_text(errors="replace").strip().rpartition("\n")[2]
            raise DataError(f'"{self.text}": its process is gone ({how}{words and ": "}{words}); a system without free '
                            "memory ends processes, and a smaller --batch_size helps")
        content = json.loads(line)
        require("error" not in content, f'"{self.text}": {content.get("error")}')
        return content

    def ask(self, what):
        self.send(what)
        return self.reply()


def measure(workers, args):
    """Ask the workers for all that is wanted; print what is being measured as it becomes known."""
    for worker in workers:
        worker.facts.update(worker.reply())
    machines = dict.fromkeys(f"{worker.facts['gpu']}, torch {worker.facts['torch']}" for worker in workers)
    print(f"{'; '.join(machines)}: {args.windows} windows of {args.steps} steps in turn, after {args.warmup} steps")
    for worker in workers[: args.builds]:
        worker.send("build")
    for i, worker in enumerate(workers):
        worker.facts.update(worker.reply())
        if args.builds > 1:
            worker.facts["first_step_s"] = None  # others compiled beside it
        if i + args.builds < len(workers):
            workers[i + args.builds].send("build")
        print(f"{i + 1}: {worker.text}", *worker.facts["notes"], sep="\n   ", flush=True)
    for _ in range(args.windows):
        for worker in workers:
            worker.windows.append(worker.ask("window"))
        for worker in workers if args.data_share else []:
            worker.residents.append(worker.ask("resident")["ms"])
    for worker in workers if args.validation else []:
        worker.facts["val_tokens_per_second"] = worker.ask("validation")["tokens_per_second"]


def commit_of(*paths):
    """The commit that is checked out where files of a folder lie, None where one that is there is not as it is then."""
    def git(*words):
        return subprocess.run(["git", "-C", paths[0].parent, *words], capture_output=True, text=True, check=True).stdout

    names = [path.name for path in paths if path.exists()]
    try:
        commit, *committed = git("rev-parse", "HEAD", *(f"HEAD:./{name}" for name in names)).split()
        return commit if git("hash-object", *names).split() == committed else None
    except (OSError, subprocess.CalledProcessError):
        return None


def figures(worker, first):
    """The record of a command line, with its ratio to the first one's."""
    facts, ms, last = dict(worker.facts), [window["ms"] for window in worker.windows], worker.windows[-1]
    step_ms, tokens, peak_flops = statistics.median(ms), facts["tokens_per_step"], facts.pop("peak_flops")
    rate, resident_ms = 1000 * tokens / step_ms, statistics.median(worker.residents) if worker.residents else None
    record = dict(
        flags=shlex.join(worker.order["flags"]), script_sha256=worker.order["sha256"], commit=worker.order["commit"],
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **{name: worker.order[name] for name in ("warmup", "steps", "memory_gib")}, **facts,
        windows_ms=ms, step_ms=step_ms, tokens_per_second=rate,
        mfu=rate * facts["flops_per_token"] / peak_flops if peak_flops else None, peak_mem_MB=last["peak"],
        loss=last["loss"] if math.isfinite(last["loss"]) else None, infinite_gradients=last["infinite"],
        resident_ms=resident_ms,
        data_share=1 - resident_ms / step_ms if resident_ms else None,
    )
    record.setdefault("val_tokens_per_second", None)
    first = first or record
    size = tokens / first["tokens_per_step"]
    ratios = [size * before / now for before, now in zip(first["windows_ms"], ms)]
    return dict(record, ratio=rate / first["tokens_per_second"], ratio_range=[min(ratios), max(ratios)])


def table(records):
    """The figures for the eye, a column for each that there is."""
    rows = []
    for i, r in enumerate(records, 1):
        ms, (smallest, largest), resident = r["windows_ms"], r["ratio_range"], r["resident_ms"]
        cells = {
            "": str(i), "step ms": f"{r['step_ms']:,.2f} ({min(ms):,.2f} - {max(ms):,.2f})",
            "tokens/s": f"{r['tokens_per_second']:,.0f}", "MFU": f"{r['mfu']:.1%}" if r["mfu"] else "n/a",
            "peak MiB": f"{r['peak_mem_MB']:,}",
            "first step s": f"{r['first_step_s']:.1f}" if r["first_step_s"] else "n/a",
            "last loss": "not finite" if r["loss"] is None else f"{r['loss']:.4f}",
        }
        if any(record["infinite_gradients"] for record in records):
            cells["steps whose gradient is not finite"] = str(r["infinite_gradients"])
        if r["val_tokens_per_second"]:
            cells["validation tokens/s"] = f"{r['val_tokens_per_second']:,.0f}"
        if resident:
            cells["data share (ms with and without)"] = f"{r['data_share']:.1%} ({r['step_ms']:,.2f}, {resident:,.2f})"
        if len(records) > 1:
            cells["ratio to 1"] = f"{r['ratio']:.3f} ({smallest:.3f} - {largest:.3f})"
        rows.append(cells)
    lines = [list(rows[0]), *(list(cells.values()) for cells in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)


def make_parser():
    parser = Parser("bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage='bench.py [FLAGS] | "FLAGS" "FLAGS" ... -- [FLAGS of all]', allow_abbrev=False)
    parser.add_argument("--warmup", type=int, default=10, metavar="N", help="steps before the first window [10]")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps in a window [10]")
    parser.add_argument("--windows", type=int, default=5, metavar="N", help="windows of a command line [5]")
    parser.add_argument("--builds", type=int, default=1, metavar="N", help="command lines that compile and warm up at "
                        "once, in which case the first step is not timed [1]")
    parser.add_argument("--validation", action="store_true", help="time the validation of --val_tokens targets too")
    parser.add_argument("--data_share", action="store_true", help="the data loader's share of a step, by further "
                        "windows with one batch that stays on the device")
    parser.add_argument("--memory_gib", type=float, metavar="X", help="GiB of the GPU that a command line may take")
    parser.add_argument("--json", metavar="FILE", help="append a record of each command line to FILE")
    parser.add_argument("--script", default=str(ROOT / "train_gpt2_mod.py"), metavar="FILE",
                        help="another version of train_gpt2_mod.py; also in quotes, for one command line")
    return parser


def read_arguments(argv):
    """(the tool's settings, [(text, script, flags for that) of each command line])."""
    parser, cut = make_parser(), argv.index("--") if "--" in argv else len(argv)
    args, before = parser.parse_known_args(argv[:cut])
    args, common = parser.parse_known_args(argv[cut + 1:], args)
    for name in ("warmup", "steps", "windows", "builds"):
        require(getattr(args, name) >= 1, f"{name}={getattr(args, name)} must be at least 1")
    require(args.memory_gib is None or 0 < args.memory_gib < math.inf, f"memory_gib={args.memory_gib} must be above 0")
    if args.json is not None:
        path = Path(args.json).absolute()
        require(args.json and path.parent.is_dir() and not path.is_dir(), f"json={args.json} is no file in a folder "
                "that is there; name one")
    lines = []
    for words in map(shlex.split, before or [""]) if cut < len(argv) else [before]:
        text = shlex.join(words + common) or "no flags"
        quoted = cut == len(argv) or text.startswith("-") or not words
        require(quoted, f'{text} is no command line; before -- put each in quotes, as in "--model d12" --')
        own, flags = parser.parse_known_args(words, argparse.Namespace(**vars(args)))
        script = Path(own.script).expanduser()
        require(dict(vars(own), script="") == dict(vars(args), script=""), f'"{text}": of the flags of bench.py only '
                "--script stands in quotes; type the others before them")
        require(script.is_file() and script.suffix == ".py", f"script={script} is no such file; name a version of "
                "train_gpt2_mod.py")
        lines.append((text, script.resolve(), common + flags))
    return args, lines


def bench(argv):
    args, lines = read_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, contextlib.ExitStack() as stack:
        workers = []
        for i, (text, script, flags) in enumerate(lines):
            order = dict(vars(args), script=str(script), flags=flags, folder=os.path.join(folder, str(i)))
            order.update(sha256=sha256_of(script), commit=commit_of(script, script.with_name("fused_softmax.py")))
            workers.append(stack.enter_context(Worker(text, **order)))
        measure(workers, args)
    records = []
    for worker in workers:
        records.append(figures(worker, records[0] if records else None))
    print(table(records))
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def main(argv=None):
    return exit_code(lambda: bench(sys.argv[1:] if argv is None else argv), known=ValueError)


if __name__ == "__main__":
    if sys.argv[1:] != [WORK]:
        sys.exit(main())
    with ended_as_by_ctrl_c():
        work()
