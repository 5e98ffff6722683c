#!/usr/bin/env python3
"""Is my idea better? Runs side by side, or pairs of runs over several seeds with a verdict.

    python tools/compare.py logs/20260101-120000-d12-ab12 logs/20260101-130000-d12_mlp3x-cd34
    python tools/compare.py --base "--model d12" --variant "--model d12_mlp3x" --seeds 3 -- --num_iterations 2000

The first form takes runs that are there, the first of them as the base. The second makes them; after -- stand the flags
of both, and an arm's own overrule them. For each seed the base trains and then the variant, on the same data in the
same order. Finished runs are not made again and one that was stopped goes on from its newest checkpoint, so the same
command goes on where it was interrupted, and with more --seeds adds to what is there. compare.md, .png and .json are
written beside the runs.

The verdict is on the final validation loss, by a paired t interval of variant - base over the seeds: how certain their
mean is on these shards. Settle the number of seeds before you look; adding until one likes the verdict finds
differences that are not there. A variant that diverged is worse; a base that diverged gives no verdict. The losses at
equal seconds show whether an idea pays for its time. There the run that takes longer is cut where the other ended,
before its learning rate has come down: planned for that time it would do better.

Seconds are those of training, without validation; the first step of each process, which compiles, is counted as an
average one. tokens/s and ms/step are the log's, of a resumed run those since. Between validations the loss is
interpolated.

Exit codes: 0, compared; 2, one line on stderr says what to mend; 130, interrupted: the same command goes on;
141, nobody read what was printed.
"""
import argparse
import bisect
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "docs"), str(ROOT / "tools")]
from measuring import SCRIPT, reached, torchrun  # noqa: E402
from report import log_of, newest_run  # noqa: E402
from shards import DataError, Parser, exit_code, require  # noqa: E402

POWER, MOST_SEEDS = 0.8, 10_000  # of the numbers of seeds that are recommended
VALIDATED = "had validated both before the shorter run ended (a lower --val_loss_every helps)"
POINTS = 300  # of a curve of training losses in the plot, each the mean of its share of the steps
REFUSED = ("seed", "output_dir", "resume", "dry_run", "target_val_loss")
STEP = {"step", "tokens", "time", "step_ms", "step_avg_ms", "tokens_per_second", "peak_mem_MB"}
VALIDATION = {"step", "val_loss", "tokens", "time"}  # what is read of each record of metrics.jsonl
SAME_TARGETS = ("input_val_bin", "validation_text", "val_tokens", "vocab_size")  # or the losses are of different things


# ----------------------------------------------------------------------------------------------------------------------
# A run, from its folder


class Run(NamedTuple):
    """What a run's files say. A curve is [(training seconds, tokens, loss)]."""

    folder: str
    settings: dict  # all flags, and where and by which script it was made
    commands: list
    ending: str  # finished, diverged, unfinished or without a log
    peak: float  # MiB
    tokens_per_second: float
    step_ms: float
    seconds: float
    tokens: int
    curve: list  # of validations
    training: list

    @property
    def loss(self):
        return self.curve[-1][-1] if self.curve and self.ending != "diverged" else None

    def reached(self, target):
        """(seconds, tokens) to a loss, those of the first validation at most; (None, None) if it never is."""
        first = self.curve and self.curve[0][-1] <= target
        return self.curve[0][:2] if first else reached(self.curve, target) or (None, None)

    def loss_at(self, seconds):
        """None before the first validation."""
        import numpy as np

        times, _, losses = zip(*self.curve)
        return float(np.interp(seconds, times, losses)) if times[0] <= seconds else None


def read_log(folder):
    """(the source at its head, what was said each time the run was begun or resumed, how it ended)"""
    path = log_of(folder)
    head, *sessions = path.read_text(errors="replace").split(f"\nrun {path.stem}: ") if path else [""]
    last = sessions[-1] if sessions else ""
    diverged = "diverged" if "lower --learning_rate" in last else "unfinished"  # the words of each DivergedError
    return head, sessions, "finished" if "\ntraining took " in last else diverged if path else "without a log"


def read_records(path):
    """(the steps, the validations) of a metrics.jsonl. A line that is neither, as a crash leaves one, is skipped."""
    steps, validations = [], []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            for needed, found in ((STEP, steps), (VALIDATION, validations)):
                if isinstance(record, dict) and needed <= {name for name, value in record.items() if is_number(value)}:
                    found.append(record)
    return steps, validations


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def read_run(folder):
    """The Run of a folder that has metrics.jsonl."""
    head, sessions, ending = read_log(folder)
    said = [session.split("\n") for session in sessions]
    steps, validations = read_records(folder / "metrics.jsonl")
    require(steps, f"{folder} has no finished step; let it train")
    try:
        config = json.loads((folder / "config.json").read_text())
        settings = dict(**config["network"], **config["run"], machine="".join(sum(said[:1], [])[1:2]) or None,
                        script=hashlib.sha256(head.encode()).hexdigest()[:8] if head else None)
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise DataError(f"{folder}/config.json cannot be read ({e}); name another run") from e
    resumed = [re.search(r"^resumed .* at step (\d+)$", session, re.M) for session in sessions]
    first, last = {steps[0]["step"], *(int(match[1]) + 1 for match in resumed if match)}, steps[-1]
    compiling = [(r["step"], r["step_ms"] - last["step_avg_ms"]) for r in steps if r["step"] in first]

    def point(record, loss):
        beyond = sum(ms for step, ms in compiling if step <= record["step"])
        return (record["time"] - beyond) / 1000, record["tokens"], record[loss]

    return Run(
        str(folder), settings, [lines[0] for lines in said], ending, max(r["peak_mem_MB"] for r in steps),
        last["tokens_per_second"], last["step_avg_ms"], point(last, "step")[0], last["tokens"],
        [point(r, "val_loss") for r in validations],
        [point(r, "train_loss") for r in steps if is_number(r.get("train_loss"))],
    )


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def power(effect, seeds, confidence):
    """That of the two-sided paired t-test for a difference of so many of its standard deviations. The square of a
    noncentral t is a noncentral F, and scipy's has a value where its noncentral t has none."""
    from scipy import stats

    critical = stats.t.ppf((1 + confidence) / 2, seeds - 1)
    effect = min(max(effect, 1e-6), 1e5)  # beyond which it has no value, and the power is that of chance or 1
    return float(stats.ncf.sf(critical**2, 1, seeds - 1, effect**2 * seeds))


def seeds_needed(effect, confidence):
    """The fewest that have POWER; None where MOST_SEEDS have not."""
    counts = range(2, MOST_SEEDS + 1)
    place = bisect.bisect_left(counts, True, key=lambda seeds: power(effect, seeds, confidence) >= POWER)
    return counts[place] if place < len(counts) else None


def judge(differences, confidence, had="gave both a loss"):
    """What differences of loss, variant - base with one seed each, say of their mean; of seeds without one it is said
    what the others had."""
    n = len(differences)
    found = dict(seeds=n, mean=statistics.fmean(differences) if n else None, sd=None, interval=None, seeds_needed=None,
                 smallest_difference=None)
    if n < 2:
        return dict(found, verdict=f"no verdict: an interval takes two seeds or more, and {n} {had}")
    found["sd"] = sd = statistics.stdev(differences)
    if sd == 0:
        alike = "no verdict: each seed gave the same difference, so they changed nothing and tell nothing of chance"
        return dict(found, verdict=alike if found["mean"] else "not distinguishable: the losses are the same")
    from scipy import optimize, stats

    quantile = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    half = quantile * sd / math.sqrt(n)
    low, high = found["interval"] = [found["mean"] - half, found["mean"] + half]
    verdict = "better" if high < 0 else "worse" if low > 0 else "not distinguishable at this number of seeds"
    smallest = optimize.brentq(lambda effect: power(effect, n, confidence) - POWER, 0, 10 * quantile + 10)
    return dict(found, verdict=verdict, seeds_needed=seeds_needed(abs(found["mean"]) / sd, confidence),
                smallest_difference=smallest * sd)


def judge_runs(pairs, confidence):
    """judge() of the final losses of {seed: (base, variant)}, unless one of them diverged."""
    found = judge([v.loss - b.loss for b, v in pairs.values() if None not in (b.loss, v.loss)], confidence)
    base, variant = ([str(s) for s, pair in pairs.items() if pair[i].ending == "diverged"] for i in (0, 1))
    if base:
        return dict(found, verdict=f"no verdict: the base diverged with seed {', '.join(base)}; mend what both share")
    return dict(found, verdict=f"worse: it diverged with seed {', '.join(variant)}") if variant else found


def in_words(what, found, confidence):
    if found["interval"] is None:
        value = "" if found["mean"] is None else f"variant - base = {found['mean']:+.4f} nats; "
        return [f"- {what}: {value}{found['verdict']}"]
    low, high = found["interval"]
    fewest = f"{found['seeds_needed'] or f'more than {MOST_SEEDS}'} seeds"
    return [f"- {what}: variant - base = {found['mean']:+.4f} nats, {100 * confidence:g}% interval {low:+.4f} to "
            f"{high:+.4f} (paired t, {found['seeds']} seeds): {found['verdict']}",
            f"  - with power {POWER}, as these seeds spread: a difference as large as this one takes {fewest}, and "
            f"{found['seeds']} seeds tell {found['smallest_difference']:.4f} or more"]


# ----------------------------------------------------------------------------------------------------------------------
# Tables. An arm is the runs of one name, one a seed; those of all arms stand in the same order.

ROWS = dict(peak="peak memory, MiB", tokens_per_second="tokens/s", step_ms="ms/step", loss="final validation loss",
            seconds="training seconds", tokens="tokens", target_tokens="tokens to loss {:.4f}",
            target_seconds="seconds to loss {:.4f}", equal_seconds_loss="validation loss at equal seconds")
FORMATS = dict(step_ms=",.2f", loss=".4f", seconds=",.1f", target_seconds=",.1f", equal_seconds_loss=".4f")


def at_equal_seconds(runs):
    """The losses when the shortest of the runs ends."""
    if any(run.loss is None for run in runs):
        return [None] * len(runs)
    end = min(run.curve[-1][0] for run in runs)
    return [run.loss_at(end) for run in runs]


def figures(arms, target):
    """{arm: {key of ROWS: its mean over the runs, None where one has none}}"""
    equal, found = list(zip(*map(at_equal_seconds, zip(*arms.values())))), {}
    for i, (name, runs) in enumerate(arms.items()):
        seconds, tokens = zip(*(run.reached(target) if target else (None, None) for run in runs))
        values = {key: [getattr(run, key) for run in runs] for key in ROWS if hasattr(Run, key)}
        values.update(target_tokens=tokens, target_seconds=seconds, equal_seconds_loss=equal[i])
        found[name] = {key: None if None in its else statistics.fmean(its) for key, its in values.items()}
    return found


def aligned(heads, rows):
    """A Markdown table that is one for the eye too."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    rows = [heads, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows] + [""]


def before_and_after(found, target):
    (base, before), *others = found.items()

    def cells(key, value):
        shown = "-" if value is None else f"{value:{FORMATS.get(key, ',.0f')}}"
        return shown, "-" if value is None or not before[key] else f"{100 * (value / before[key] - 1):+.1f}%"

    rows = [[label.format(target or math.nan), cells(key, before[key])[0],
             *(cell for _, its in others for cell in cells(key, its[key]))] for key, label in ROWS.items()]
    return aligned(["", base, *(head for name, _ in others for head in (name, "change"))], rows)


def differences(settings):
    """A table of {arm: its settings} where they are not the same."""
    names = [name for name in dict.fromkeys(sum(map(list, settings.values()), [])) if name != "output_dir"]
    rows = [[name, *(str(its.get(name, "-")).replace("|", "\\|") for its in settings.values())] for name in names]
    return aligned(["differs in", *settings], [row for row in rows if len(set(row[1:])) > 1])


def notes(arms, target):
    """What to know before the figures are believed."""
    runs, lines = sum(arms.values(), []), []
    for run in runs:
        lines += [f"{run.folder}: {run.ending}"] * (run.ending != "finished")
        early = target and run.curve and run.curve[0][-1] <= target
        lines += [f"{run.folder} came to {target:.4f} before its first validation"] if early else []

    def differ(name):
        return len({str(run.settings.get(name)) for run in runs} - {"None"}) > 1

    unlike = [name for name in (*SAME_TARGETS, "sequence_length") if differ(name)]
    lines += [f"{', '.join(unlike)} differ: the losses are of other targets or contexts"] * bool(unlike)
    other_lengths = len({run.tokens for run in runs}) > 1
    lines += ["the runs are of different lengths: each final loss is after its own tokens"] * other_lengths
    lines += ["not all runs were made on one machine"] * differ("machine")
    lines += ["not all runs are of one version of the script"] * differ("script")
    return [f"- {line}" for line in lines] + [""] * bool(lines)


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def needed(*packages):
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    require(not missing, f"compare.py needs {' and '.join(missing)} for this; pip install {' '.join(missing)}")


def draw(arms, target, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    shown = [target] if target else []
    for name, run in ((name, run) for name, runs in arms.items() for run in runs):
        size, color = math.ceil(len(run.training) / POINTS) or 1, f"C{list(arms).index(name) % 10}"
        training = [tuple(map(statistics.fmean, zip(*run.training[i:i + size])))
                    for i in range(0, len(run.training), size)]
        shown += [loss for *_, loss in (*training[len(training) // 10:], *run.curve)]
        label = name if run is arms[name][0] else None
        for axis, unit in zip(axes, (1, 0)):
            for curve, how in (training, dict(alpha=0.25, lw=0.8)), (run.curve, dict(marker="o", ms=3.5, label=label)):
                axis.plot([point[unit] for point in curve], [point[2] for point in curve], color=color, **how)
    for axis, label in zip(axes, ("tokens", "training seconds, the first step as an average one")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        if target:
            axis.axhline(target, color="0.4", lw=0.8, ls="--", label=f"loss {target:.4f}")
    axes[0].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes[0].set_ylabel("loss, nats (points: validation; faint: training)")
    if shown:
        margin = 0.04 * (max(shown) - min(shown)) or 0.1
        axes[0].set_ylim(min(shown) - margin, max(shown) + margin)
    axes[1].legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(folder, command, arms, target, lines, **content):
    """compare.md, compare.png and compare.json."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(arms, target, folder / "compare.png")
    every = [(name, run) for name, runs in arms.items() for run in runs]
    commands = [f"    {run.folder}: {line}" for _, run in every for line in run.commands]
    (folder / "compare.md").write_text("\n".join([
        f"# {' against '.join(reversed(arms))}", "", f"    {command}", "", *lines, "![](compare.png)", "",
        __doc__.split("\n\n")[-2], "", "The runs:", "", *commands, ""]))
    runs = [dict(arm=name, **run._replace(training=None)._asdict(), loss=run.loss) for name, run in every]
    content = dict(command=command, target=target, **content, runs=runs)
    (folder / "compare.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {folder}/compare.md, compare.png, compare.json")


def default_target(arms):
    """The best validation loss of the worst run, to which all come; None where none has a loss."""
    return max((min(loss for *_, loss in run.curve) for runs in arms.values() for run in runs
                if run.loss is not None), default=None)


def compare_folders(args, command):
    needed(*["matplotlib"] * bool(args.output))
    arms = {}
    for name in args.runs:
        folder = newest_run(Path(name))
        require(folder, f"{name} has no run; name a run's folder, or a folder of runs")
        arms[name] = [run] = [read_run(folder)]
        require(run.curve or run.ending == "diverged", f"{folder} has no validation, and it is its loss that is "
                "compared; train with validation shards, or longer")
    places = {os.path.realpath(run.folder) for run, in arms.values()}
    require(len(places) == len(args.runs) > 1, "name at least two runs, each once")
    target = args.target or default_target(arms)
    found = figures(arms, target)
    lines = [*before_and_after(found, target), "One run each: what of this is chance, only pairs over seeds can tell.",
             "", *notes(arms, target), *differences({name: run.settings for name, [run] in arms.items()})]
    print("\n".join(lines))
    if args.output:
        folder = Path(args.output)
        require(folder.is_dir() or not folder.exists(), f"{folder} is a file; name a folder")
        require(not (folder / "settings.json").exists(), f"{folder} holds a comparison of pairs; name another --output")
        write(folder, command, arms, target, lines, figures=found)


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of runs


def resolved(arm, words, processes):
    """All settings that a command line comes to, before anything runs. The GPU is not touched, which would take some
    of its memory; a --batch_size auto is found by the run."""
    import torch

    import train_gpt2_mod as script

    try:
        require(not {"-h", "--help"} & {*words}, "--help of the script is python train_gpt2_mod.py --help; drop it")
        typed = script.parse_flags(words)
        refused = [f"--{name}" for name in REFUSED if name in typed]
        require(not refused, f"{', '.join(refused)} cannot be typed here: seeds, folders and resuming are "
                "compare.py's, and all runs go to their end; drop it")
        device = typed.get("device", "auto")
        cuda = device == "cuda" or device == "auto" and torch.cuda.is_available()
        training = script.TokenShards(typed.get("input_bin", script.TrainConfig.input_bin))
        vocab_size = training.vocab_size
        machine = script.Machine(processes, "cuda" if cuda else "cpu", cuda, cuda, vocab_size, 2**50)
        network, run, _ = script.resolve(typed, machine)
        require(run.input_val_bin, "input_val_bin is empty, and validation losses are compared; name shards")
        validation = script.TokenShards(run.input_val_bin)
    except ValueError as e:
        raise DataError(f"{arm}: {e}") from e
    shorthands = {name: typed.get(name) for name in ("init_from", "memory_gib")}
    texts = dict(training_text=fingerprint(training.files), validation_text=fingerprint(validation.files))
    return dict(**dataclasses.asdict(network), **dataclasses.asdict(run), **shorthands, **texts)


def fingerprint(files):
    """By which other shards under the same names are known: the sizes and the ends of all, hashed."""
    found = hashlib.sha256()
    for path in map(Path, files):
        with open(path, "rb") as file:
            found.update(str(path.stat().st_size).encode() + file.read(2**16))
            file.seek(-min(2**16, path.stat().st_size), os.SEEK_END)
            found.update(file.read())
    return found.hexdigest()[:8]


def check(args):
    """{arm: its settings}, once it is clear that these can be compared."""
    needed("scipy", "matplotlib")
    require("RANK" not in os.environ, "start compare.py without torchrun, and name the --processes of each run")
    settings = {arm: resolved(arm, words, args.processes) for arm, words in args.arms.items()}
    base, variant = settings.values()
    differing = [name for name in base if base[name] != variant[name]]
    require(differing not in ([], ["model"]), "base and variant are the same configuration; type what the idea changes")
    unlike = [name for name in SAME_TARGETS if name in differing]
    require(not unlike, f"base and variant differ in {', '.join(unlike)}: losses of other targets cannot be compared")
    fixed = any(s["init_from"] and not s["shuffle"] and not s["dropout"] for s in settings.values())
    require(args.seeds == 1 or not fixed, "the seeds change nothing with --init_from alone; add --shuffle")
    return settings


@contextlib.contextmanager
def claimed(args, settings):
    """(The folder of this comparison and of no other, a file that keeps other processes from it while it is open)."""
    import fcntl

    key = json.dumps(dict(processes=args.processes, **settings), indent=1, sort_keys=True)
    folder = Path(args.output or f"logs/compare-{hashlib.sha256(key.encode()).hexdigest()[:8]}")
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file; name a folder")
    path = folder / "settings.json"
    require(path.exists() or not any(folder.glob("*")), f"{folder} holds other things; name another --output")
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DataError(f"{folder} is in use by another compare.py, or by a run that one left behind; wait for it, "
                            "or stop it") from e
        file.seek(0)
        there = file.read()
        require(there in ("", key), f"{folder} holds runs of other flags or shards, as {path} says; name another "
                "--output")
        file.write("" if there else key)
        file.flush()
        yield folder, file


def launch(command, console, lock):
    """Run a command to its end; its exit code. An interruption is handed on, so that the run saves, and raised when it
    has."""
    interruption = None
    with open(console, "wb") as out, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()],
        start_new_session=True,  # a Ctrl-C comes to it through this process alone
    ) as child:
        while child.returncode is None:
            try:
                child.wait()
            except KeyboardInterrupt as e:
                interruption = e
                child.terminate()
    if interruption:
        raise interruption
    return child.returncode


def train(args, arm, seed, folder, lock):
    """The Run of an arm with a seed, made or brought to its end if that is still to do."""
    place = folder / f"{arm}_seed{seed}"

    def ended():
        run = newest_run(place)
        return run if run and read_log(run)[-1] != "unfinished" else None

    if not ended():
        place.mkdir(exist_ok=True)
        print(f"{arm}, seed {seed}: training; {place}/console.txt says how far it is", flush=True)
        own = ["--seed", str(seed), "--output_dir", str(place), "--resume", "auto"]
        code = launch([*torchrun(args.processes), SCRIPT, *args.arms[arm], *own], place / "console.txt", lock)
        if not ended():
            said = (place / "console.txt").read_text(errors="replace").split("\n")
            why = [line for line in said if line.startswith("error: ")] or [line for line in said if line] or [""]
            raise DataError(f"{arm}, seed {seed}: exit code {code}, {why[-1].removeprefix('error: ')}; once that is "
                            "mended the same command goes on")
    return read_run(ended())


def compare_pairs(args, command):
    settings, pairs, begun = check(args), {}, time.monotonic()
    first = settings["base"]["seed"]  # the script's
    with claimed(args, settings) as (folder, lock):
        print("\n".join([f"{folder}: {args.seeds} seeds from {first}", *differences(settings)]))
        for seed in range(first, first + args.seeds):
            pairs[seed] = [train(args, arm, seed, folder, lock) for arm in args.arms]
            arms = {name: [pair[i] for pair in pairs.values()] for i, name in enumerate(args.arms)}
            trained = [pair for pair in pairs.values() if None not in (pair[0].loss, pair[1].loss)]
            target = args.target or default_target(arms)
            found = figures(dict(zip(arms, map(list, zip(*trained)))) if trained else arms, target)
            equal = [v - b for b, v in map(at_equal_seconds, trained) if None not in (b, v)]
            final = judge_runs(pairs, args.confidence)
            at_seconds = final if final["mean"] == final["sd"] == 0 else judge(equal, args.confidence, VALIDATED)
            losses = [[str(seed), *("diverged" if run.loss is None else f"{run.loss:.4f}" for run in pair),
                       f"{pair[1].loss - pair[0].loss:+.4f}" if pair in trained else "-"]
                      for seed, pair in pairs.items()]
            lines = [*before_and_after(found, target), *aligned(["seed", *arms, "variant - base"], losses),
                     *in_words("final validation loss", final, args.confidence),
                     *in_words("at equal seconds", at_seconds, args.confidence), "", *notes(arms, target)]
            left = (time.monotonic() - begun) / len(pairs) * (args.seeds - len(pairs)) / 60
            print("\n".join(["", *lines]) + f"{len(pairs)} of {args.seeds} seeds"
                  + f", about {left:.0f} minutes to go" * (len(pairs) < args.seeds), flush=True)
        lines += differences({name: runs[0].settings for name, runs in arms.items()})
        write(folder, command, arms, target, lines, confidence=args.confidence, seeds=list(pairs), figures=found,
              final_loss=final, equal_seconds=at_seconds)


def read_arguments(argv):
    """The settings of this program, with .arms {name: its words} where it is to make the runs."""
    parser = Parser("compare.py", usage='compare.py RUN RUN ... | --base "FLAGS" --variant "FLAGS" -- [FLAGS of both]',
                    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="a run's folder, or a folder of runs: its newest")
    parser.add_argument("--base", metavar="FLAGS", help="flags of train_gpt2_mod.py that only the base has")
    parser.add_argument("--variant", metavar="FLAGS", help="those that only the variant has")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="pairs of runs [3]")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="X", help="of the interval [0.95]")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run, by torchrun [1]")
    parser.add_argument("--target", type=float, metavar="LOSS", help="to which tokens and seconds are given [the best "
                        "validation loss of the worst run]")
    parser.add_argument("--output", metavar="DIR", help="folder for compare.md, .png and .json [of runs that are "
                        "there: nothing is written; else logs/compare-..., named by the flags]")
    cut = argv.index("--") if "--" in argv else len(argv)
    words, given, common = [], iter(argv[:cut]), argv[cut + 1:]
    for word in given:  # argparse takes the "--shuffle" after --variant for a flag, unless it is joined to it
        if word in ("--base", "--variant"):
            value = next(given, None)
            require(value is not None, f'{word} needs a value: flags in quotes, or "" for none')
            word += f"={value}"
        words.append(word)
    args, unknown = parser.parse_known_args(words)
    require(not unknown, f"{' '.join(unknown)} is no flag of compare.py; those of both runs stand after --")
    require(0 < args.confidence < 1, f"confidence={args.confidence} must be between 0 and 1; 0.95 is usual")
    require(args.target is None or 0 < args.target < math.inf, f"target={args.target} must be above 0")
    require(min(args.seeds, args.processes) >= 1, "seeds and processes must be at least 1")
    both = dict(base=args.base, variant=args.variant)
    if args.runs:
        require(not common and set(both.values()) == {None}, "name runs, or the flags of runs to make, not both")
        for name in ("seeds", "confidence", "processes"):
            value = getattr(args, name)
            require(value == parser.get_default(name), f"{name}={value} would be ignored: these runs are there")
        return argparse.Namespace(**vars(args), arms=None)
    require(None not in both.values(), "name two runs, or type --base and --variant; --help says more")
    try:
        return argparse.Namespace(**vars(args), arms={arm: common + shlex.split(text) for arm, text in both.items()})
    except ValueError as e:
        raise DataError(f"--base or --variant: {e}; close the quotes") from e


def compare(argv):
    args = read_arguments(argv)
    command = shlex.join(["python", "tools/compare.py", *argv])
    (compare_pairs if args.arms else compare_folders)(args, command)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code(lambda: compare(argv), "interrupted; the same command goes on where it stopped", ValueError)


if __name__ == "__main__":
    sys.exit(main())
