"""What the measure.py of the experiments share: a file of results, the GPU that they are of, runs of the script one
after the other or side by side, what can be said of their losses, Markdown tables."""
import collections
import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "data")]
from shards import DataError, Parser, exit_code, require  # noqa: E402, F401

SCRIPT = ROOT / "train_gpt2_mod.py"
MARGIN = 1.1  # on the seconds that a run is expected to take
KEPT = "--save_checkpoints --save_every_minutes 3 --keep_last 1 --resume auto".split()  # of a folder that is kept
STOPPED = 75  # the script's exit code when a signal ended it
under_way = set()  # the processes that ended() waits for, in whatever thread


def read(path):
    """The records of a file of results, none where there is no file. Raises DataError for a line that is none, as the
    last one is after a kill in the midst of it."""
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        require(isinstance(record, dict), f"{path} has no whole record in line {number}; delete that line, and the "
                "same command measures it again")
        records.append(record)
    return records


def append(path, *records):
    """At once, and behind a whole line, whatever the file ends with."""
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        end = b"\n" if file.read() not in (b"", b"\n") else b""
        file.write(end + "".join(json.dumps(record) + "\n" for record in records).encode())


def write(path, text):
    """A document, so that a kill leaves the old one or the new one."""
    import train_gpt2_mod as script

    script.write_atomically(path, lambda file: file.write(text.encode()))


def check_place(what, path, folder=False, remedy="name another"):
    """Raise DataError unless a file, or a folder, can be written, or made where it is not there yet. It is tried:
    permissions do not say it, for the superuser has those of /proc too."""
    place = path = Path(path).absolute()
    try:
        place = next(there for there in (path, *path.parents) if there.exists())
        (open(path, "ab") if place == path and not folder else tempfile.TemporaryFile(dir=place)).close()
    except OSError as e:
        raise DataError(f"{what} cannot be written ({place} is not writable here); {remedy}") from e


def gpu_name():
    """That of the GPU at hand. Raises DataError without one."""
    import torch

    require(torch.cuda.is_available(), "no CUDA device, and these figures are a GPU's; --table prints those that are "
            "there")
    return torch.cuda.get_device_name()


def by_gpu(records):
    """[(GPU, its records)], by name."""
    return [(gpu, [r for r in records if r["gpu"] == gpu]) for gpu in sorted({r["gpu"] for r in records})]


def table(heads, rows):
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"] + [f"| {' | '.join(r)} |" for r in rows])


# ----------------------------------------------------------------------------------------------------------------------
# Runs of the script


class Run(NamedTuple):
    """A command line of the script."""

    kind: str
    name: str
    flags: str

    @property
    def steps(self):
        return int(last_of(self.flags)["num_iterations"])

    @property
    def tokens(self):
        return self.steps * int(last_of(self.flags)["total_batch_size"])

    def is_of(self, record):
        """Whether a record is of this run: of the same flags, in any order."""
        return last_of(self.flags) == last_of(record["flags"])


def last_of(flags):
    """{flag: its value}, of a switch "" or "no"; of a flag that stands twice the last counts."""
    typed = re.findall(r"--(no_)?(\S+) ?((?!--)\S*)", flags)
    return {flag: "no" if no else value for no, flag, value in typed}


def extended_by(flags):
    """The files that, with the script's, are the network of a run with these flags."""
    program = last_of(flags).get("script")
    return [program, "docs/extending.py"] if program else []


def source(*files):
    """The SHA-256 of the script and its kernel, and of files that extend it."""
    files = ("train_gpt2_mod.py", "fused_softmax.py", *files)
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in files)).hexdigest()


def torchrun(processes):
    """What stands before the script's name for so many processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


@contextlib.contextmanager
def folder_of(run, seed, keep):
    """(A folder for the logs, the flags of checkpoints). A folder that is kept has them, so that a run that was stopped
    goes on."""
    if keep is None:
        with tempfile.TemporaryDirectory() as logs:
            yield logs, []
    else:
        name = hashlib.sha256(f"{run.flags} {seed}".encode()).hexdigest()[:8]
        yield str(Path(keep) / f"{run.kind}_{run.name}_{name}"), KEPT


def newest(logs):
    return max(logs.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)


def measure(run, seed, data, device, beside, sharing, processes=1, keep=None, program=None):
    """Run the script once, or another program that takes its flags, on one GPU by its number (None: the first) or in
    several processes, beside so many others, of which so many share that GPU; its record without the GPU's name."""
    environment = {**os.environ, **({} if device is None else dict(CUDA_VISIBLE_DEVICES=device))}
    own = [] if program in (None, SCRIPT) else [program]
    before, begin = source(*(extended_by(run.flags) or own)), time.perf_counter()
    with folder_of(run, seed, keep) as (logs, kept):
        command = [*torchrun(processes), program or SCRIPT, *run.flags.split(), "--seed", str(seed), *data,
                   "--output_dir", logs, *kept]
        code, out, err = ended(command, env=environment)
        if code:
            raise subprocess.CalledProcessError(code, command, stderr=err)
        records = [json.loads(line) for line in newest(Path(logs)).read_text().splitlines()]
    found = dict(**run._asdict(), seed=seed, **figures(records), wall_s=time.perf_counter() - begin, beside=beside,
                 sharing=sharing)
    said = re.search(r"^data: (.*)$", out, re.M)
    found |= dict(data=said and said[1], script_sha256=before)
    return found | dict(processes=processes) if processes > 1 else found


def ended(command, **how):
    """(exit code, stdout, stderr) of a program, which an interruption of this one lets end in good order."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        under_way.add(process)
        try:
            out, err = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate()
            raise
        finally:
            under_way.discard(process)
    return process.returncode, out, err


def figures(records):
    """What metrics.jsonl says of a run. Seconds are those of training, without validation."""
    steps = [r for r in records if "step_ms" in r]
    curve = [(r["step"], r["tokens"], r["time"] / 1000, r["val_loss"]) for r in records if "val_loss" in r]
    last = steps[-1]
    return dict(
        val_loss=curve[-1][-1], curve=curve, tokens_per_second=last["tokens_per_second"],
        step_avg_ms=last["step_avg_ms"], peak_mem_MB=last["peak_mem_MB"], first_step_s=steps[0]["step_ms"] / 1000,
    )


def expected_seconds(run, rows, sharing=0):
    """What a run will take by those so far, if there are any of the same flags, else by those that had as many beside
    them on their GPU: its tokens, and what such a run took beyond them. 0 where there is none."""
    alike = [r for r in rows if r["sharing"] == sharing]
    like = [r for r in alike if run.is_of(r)] or alike or rows
    if not like:
        return 0.0
    beyond = max(r["wall_s"] - r["curve"][-1][0] * r["step_avg_ms"] / 1000 for r in like)
    a_token = max(r["step_avg_ms"] * r["curve"][-1][0] / r["curve"][-1][1] for r in like)
    return MARGIN * (beyond + run.tokens * a_token / 1000)


def why(error):
    """A run's failure in a line."""
    if isinstance(error, subprocess.CalledProcessError):
        last = ((error.stderr or "").strip().splitlines() or ["it said nothing"])[-1]
        return f"exit code {error.returncode}: {last}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run_all(tasks, path, devices, end, data, expected=expected_seconds, **how):
    """Run the tasks [(Run, seed)], each device one at a time, and append their records to the file of results; how many
    failed. None begins that by what is expected would not be done by `end`, of time.monotonic(); `how` is measure()'s.
    """
    import torch

    waiting, lock, failures = collections.deque(tasks), threading.Lock(), []
    here = dict(gpu=gpu_name(), torch=torch.__version__)

    def take(sharing):
        with lock:
            mine = [r for r in read(path) if r["gpu"] == here["gpu"]]
            if waiting and time.monotonic() + expected(waiting[0][0], mine, sharing) > end:
                print(f"no time left for {waiting[0][0].name}: {len(waiting)} runs are still to do", flush=True)
                waiting.clear()
            return waiting.popleft() if waiting else None

    def work(device):
        sharing = devices.count(device) - 1
        while task := take(sharing):
            run, seed = task
            try:
                row = measure(run, seed, data, device, len(devices) - 1, sharing, **how)
            except Exception as error:  # whatever it is, the next run may do
                with lock:
                    failures.append(task)
                    print(f"failed: {run.kind} {run.name}, seed {seed}: {why(error)}", flush=True)
                    if getattr(error, "returncode", 0) == STOPPED:
                        waiting.clear()
                continue
            with lock:
                append(path, row | here)
                print(f"{run.kind} {run.name}, seed {seed}: loss {row['val_loss']:.4f}, "
                      f"{row['tokens_per_second']:,.0f} tokens/s, {row['wall_s']:.0f} s in all", flush=True)

    if len(devices) == 1:
        work(devices[0])
        return len(failures)
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            list(pool.map(work, devices))
        except BaseException:  # Ctrl-C comes to this thread alone: the runs under way end, and no other begins
            waiting.clear()
            for process in list(under_way):
                process.terminate()
            raise
    return len(failures)


def run(main, results):
    """Run a measuring program's main() to its exit code."""
    sys.exit(exit_code(main, f"interrupted: {results.name} holds what was measured before"))


def add_flags(parser, plotted, seeds_of, seeds):
    """The flags of a program that runs, shows and draws; --only is its own."""
    parser.add_argument("--table", action="store_true", help="print the tables of results.jsonl and stop")
    parser.add_argument("--plot", action="store_true", help=f"write curve.png from its {plotted} and stop")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"of {seeds_of} [{seeds}]")
    parser.add_argument("--budget_s", type=float, default=math.inf, help="begin no run that would end later than this")
    parser.add_argument("--parallel", type=int, nargs="?", const=1, metavar="N", help="N runs on each GPU [1]")
    parser.add_argument("--input_bin", help="training shards, as train_gpt2_mod.py takes them")
    parser.add_argument("--input_val_bin", help="validation shards")


def check_flags(args):
    """Raise DataError where numbers leave nothing to do."""
    for name in ("seeds", "parallel"):
        value = getattr(args, name, None)
        require(value is None or value >= 1, f"{name}={value} must be at least 1")
    require(args.budget_s >= 0, f"budget_s={args.budget_s:g} must be at least 0")


def check_shards(args):
    """Raise DataError for shards that the script will not take."""
    import train_gpt2_mod as script

    for name in ("input_bin", "input_val_bin"):
        try:
            script.TokenShards(getattr(args, name) or getattr(script.TrainConfig, name))
        except script.DataError as e:
            raise DataError(f"--{name}: {e}") from e


def run_what_is_missing(tasks, path, args, begun, retimed=(), expected=expected_seconds, **how):
    """Run those tasks of which this GPU has no record; of the kinds `retimed` one of a shared GPU is none. How many
    failed."""
    check_flags(args)
    check_place(path, path, remedy="see to its permissions")
    gpu = gpu_name()
    data = [word for name in ("input_bin", "input_val_bin") if getattr(args, name)
            for word in (f"--{name}", getattr(args, name))]
    done = [r for r in read(path) if r["gpu"] == gpu and not (r["kind"] in retimed and r["sharing"])]
    missing = [(run, seed) for run, seed in tasks if not any(run.is_of(r) and r["seed"] == seed for r in done)]
    if missing:
        check_shards(args)
    return run_all(missing, path, devices_of(args.parallel), begun + args.budget_s, data, expected, **how)


def print_tables(path, tables):
    """Of each GPU what tables(its records) gives."""
    rows = read(path)
    if not rows:
        print("results.jsonl holds nothing: not measured yet")
    for gpu, its in by_gpu(rows):
        versions = ", ".join(dict.fromkeys(r["script_sha256"][:8] for r in its))
        print("\n\n".join([f"{gpu}, torch {its[-1]['torch']}, script {versions}", *tables(its)]) + "\n")


def pyplot():
    """matplotlib's, for files; None, and a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("error: --plot needs the package matplotlib; pip install -r requirements-tools.txt", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def devices_of(parallel):
    """The number of a GPU as CUDA_VISIBLE_DEVICES takes it for each of the runs at a time, `parallel` of them on each;
    for None one run on the first GPU, whatever it is."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [None] if parallel is None else every * parallel


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


class Blocks:
    """What losses {(run, seed): loss} say of the runs, by the model loss = the run's + the seed's + noise, fitted by
    least squares: a seed is the same text and the same initial weights for all, a block of a randomised block design
    (Fisher 1935), of which cells may be missing. One noise for all runs: what two of them differ by is judged by what
    all scatter."""

    def __init__(self, losses):
        self.runs, seeds = (list(dict.fromkeys(column)) for column in zip(*losses))
        rows = [[own == run for own in self.runs] + [own == seed for own in seeds[1:]] for run, seed in losses]
        design, values = np.array(rows, float), np.array(list(losses.values()))
        self.square = design.T @ design
        self.inverse = np.linalg.pinv(self.square, hermitian=True)
        self.effects = self.inverse @ design.T @ values
        self.freedom = len(values) - np.linalg.matrix_rank(design)
        self.scatter = math.sqrt(((values - design @ self.effects) ** 2).sum() / self.freedom) if self.freedom else None

    def apart(self, run, other):
        """(By how much the run's loss is above the other's, the seeds' part taken out; the two-sided p of no
        difference, by Student's t, None where nothing says what the noise is). None where no chain of seeds joins
        them."""
        contrast = np.array([(own == run) - (own == other) for own in self.runs] +
                            [0] * (len(self.effects) - len(self.runs)), float)
        if {run, other} - {*self.runs} or not np.allclose(contrast @ self.inverse @ self.square, contrast):
            return None
        difference = float(contrast @ self.effects)
        if not self.freedom:
            return difference, None
        error = self.scatter * math.sqrt(contrast @ self.inverse @ contrast)
        far = abs(difference) / error if error else math.inf if difference else 0.0
        return difference, float(2 * student().sf(far, self.freedom))


def student():
    """scipy's t distribution. Raises DataError without scipy."""
    try:
        from scipy.stats import t
    except ImportError as e:
        raise DataError("the tables need the package scipy; pip install -r requirements-tools.txt") from e
    return t


def learning_curve(row):
    """[(seconds, tokens, loss)], the first step counted as an average one: compilation is left out, as in the
    published curves."""
    compiling = row["first_step_s"] - row["step_avg_ms"] / 1000
    return [(seconds - compiling, tokens, loss) for _, tokens, seconds, loss in row["curve"]]


def reached(curve, target):
    """(seconds, tokens) at which a curve first is at most the target, linearly between its points; None if it never is,
    or is from its first point on."""
    for (t0, n0, above), (t1, n1, below) in zip(curve, curve[1:]):
        if above > target >= below:
            share = (above - target) / (above - below)
            return t0 + share * (t1 - t0), n0 + share * (n1 - n0)
    return None


def losses(rows, run):
    """{seed: validation loss} of a run."""
    return {r["seed"]: r["val_loss"] for r in rows if run.is_of(r)}


def mean(values):
    return statistics.fmean(values) if values else None


def wilson(hits, count, z=1.959964):
    """The 95% interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22)."""
    p, spread = hits / count, z * z / count
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / count + spread / count / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def verdict(intervals, better="less"):
    """What is said of a difference by its intervals [(low, high)], of one or several seeds, where less or "more" is
    better: a side, if none of them reaches 0."""
    for word, wins in (("better", better), ("worse", "more" if better == "less" else "less")):
        if all(high < 0 if wins == "less" else low > 0 for low, high in intervals):
            return word
    return "not distinguishable"
