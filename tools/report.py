#!/usr/bin/env python3
"""One HTML page of a run, or of several in the same plots: curves, where the time went, environment, configuration.

    python tools/report.py                                       the newest run in logs/, to report.html
    python tools/report.py logs/20260101-120000-d12-ab12 logs/20260102-080000-d12_gqa-3f07 --output gqa.html
    python tools/sample.py > sample.txt && python tools/report.py --sample_file sample.txt

The page is one file without scripts that loads nothing; it follows the reader's light or dark theme, and the same runs
give the same bytes. What it shows is in each run's metrics.jsonl, config.json and log.

A curve of many records is thinned: of each of BUCKETS equal shares of its records the first, the last, the least and
the greatest number are drawn, so that every spike is seen. Where there is no number (the loss of a skipped update) the
curve has a gap, unless its share has other numbers.
"""
import json
import math
import os
import re
import sys
from collections import Counter
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
from shards import DataError, Parser, exit_code, require  # noqa: E402

METRICS = "metrics.jsonl"
GENERATOR = '<meta name="generator" content="train_gpt2_mod, tools/report.py">'  # by which a report is known
BUCKETS, MARKED_BUCKETS = 300, 60  # of a curve; of one whose points are marked
WIDTH, HEIGHT = 4000, 2000  # of a plot, in units that the browser stretches
COLORS, DASHES = 8, 3  # in the style
MOST_LINES = 200  # of a log, half of them from its start
LOSSES = [("train_loss", "training", False), ("val_loss", "validation", True)]  # key, name, whether it is marked
PLOTS = [("lr", 1, "Learning rate"), ("grad_norm", 1, "Gradient norm, before clipping"),
         ("tokens_per_second", 1, "Tokens/s, mean of a launch so far"), ("peak_mem_MB", 1024, "Peak memory, GiB")]
LAYERED = {"activation_rms": "Activation RMS behind the block", "grad_norm": "Gradient norm",
           "weight_norm": "Weight norm", "update_ratio": "Update norm / weight norm"}  # what --log_stats logs
TIME = r"time: \S+ s = (.+); of the steps the host spent (\d+\.\d+) s on data"
STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f5f7f9; --text: #1c2128; --faint: #59636e; --grid: #d8dde3;
  --c0: #0b66c3; --c1: #c4500b; --c2: #11805a; --c3: #a8327d; --c4: #6a4bd6; --c5: #86600b; --c6: #0c7c92;
  --c7: #c0303a }
@media (prefers-color-scheme: dark) { :root { --back: #12161b; --card: #1b2128; --text: #e4e8ed; --faint: #9aa5b1;
  --grid: #39424c; --c0: #62aef7; --c1: #f6954f; --c2: #4fcf9c; --c3: #ee85c6; --c4: #ac98ff; --c5: #e0b651;
  --c6: #56c8de; --c7: #ff8484 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
h3 { font-size: 1rem; margin: .8rem 0 0 }
p { margin: .5rem 0 } pre { margin: .5rem 0; font-size: .8rem; white-space: pre-wrap } summary { cursor: pointer }
figure { margin: 0; min-width: 0; background: var(--card); border-radius: .5rem; padding: .75rem }
figure h3 { margin: 0 } .small { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
.plot { position: relative; height: 13rem; margin: 1rem 1rem 2.8rem 3.5rem; font-size: .8rem; line-height: 1;
  white-space: nowrap; color: var(--faint) }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible } .plot span { position: absolute }
.y { right: 100%; margin-right: .6rem; transform: translateY(50%) }
.x { top: 100%; margin-top: .6rem; transform: translateX(-50%) }
.unit { top: 100%; margin-top: 1.8rem; width: 100%; text-align: center }
path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; stroke-width: 1.5 }
.grid { stroke: var(--grid); stroke-width: 1 } path.neutral { stroke: var(--faint) } .bold { stroke-width: 2.2 }
.d1 { stroke-dasharray: 7 4 } .d2 { stroke-dasharray: 1 5 } .dot { stroke-width: 7; stroke-dasharray: none }
.large .plain { opacity: .6 } .large .plot { height: 20rem; display: none }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem }
.legend svg { width: 1.8rem; height: .6rem; margin-right: .4rem; overflow: visible }
.pick { position: absolute; opacity: 0 } .pick:focus-visible + label { outline: 2px solid }
.pick + label { font-size: .85rem; padding: .2rem .6rem; cursor: pointer; border-radius: 1rem; color: var(--faint) }
.pick:checked + label { background: var(--grid); color: var(--text) }
#over-step:checked ~ .over-step, #over-tokens:checked ~ .over-tokens, #over-time:checked ~ .over-time { display: block }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--grid);
  min-width: 8rem } tbody th { font-weight: 400; color: var(--faint); width: 22%; min-width: 6rem }
.command { font: .8rem/1.5 monospace } .command span { display: inline-block }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .75rem; align-items: center;
  font-size: .9rem } .bars i { display: block; height: .8rem; border-radius: 2px; min-width: 1px }
.bars div + span { text-align: right }
""" + "".join(f".c{i} {{ stroke: var(--c{i}); background: var(--c{i}) }}\n" for i in range(COLORS))


# ----------------------------------------------------------------------------------------------------------------------
# What a run left


class Run(NamedTuple):
    name: str
    records: list  # of steps and validations
    unreadable: int  # lines of metrics.jsonl that are no record, as a crash leaves one
    config: dict  # the fields of "network" and of "run"
    launches: list  # the log's lines of each start of the script: its command, its versions and machine, and what came

    def having(self, key):
        return [record for record in self.records if key in record]


def newest_run(path):
    """The folder itself if it is a run's, else the newest run in it that has trained, or None."""
    if (path / METRICS).is_file():
        return path
    found = [file.parent for file in path.glob(f"*/{METRICS}") if file.stat().st_size]
    return max(found, key=lambda folder: folder.name, default=None)


def find(path):
    """The run that a path means."""
    require(path.is_dir(), f"{path} is no folder; name a run's, or a folder of runs")
    found = newest_run(path)
    require(found, f"{path} holds no run that has trained (a folder with {METRICS}); name another")
    return found


def log_of(folder):
    """A run's log, of several the one with the folder's name, or None."""
    return min(folder.glob("*.log"), key=lambda path: (path.stem != folder.name, path.name), default=None)


def read_text(path):
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def read_object(text):
    """What JSON says, if it is an object, else {}."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_launches(folder):
    """The launches in a run's log; none where it has no log."""
    log = log_of(folder)
    lines = read_text(log).split("\n") if log else []
    starts = [i for i, line in enumerate(lines) if line.startswith(f"run {log.stem}: ")]  # after the script's source
    return [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)])]


def read_run(folder, name):
    lines = read_text(folder / METRICS).splitlines()
    objects = [found for found in map(read_object, lines) if found]
    records = [record for record in objects if "train_loss" in record or "val_loss" in record]
    require(records, f"{folder / METRICS} has no record of a step; name another run, or wait for its first step")
    settings = read_object(read_text(folder / "config.json"))
    config = {part: settings[part] if isinstance(settings.get(part), dict) else {} for part in ("network", "run")}
    return Run(name, records, len(lines) - len(objects), config, read_launches(folder))


def column(records, key, scale=1):
    """A key's numbers, None where a record has none that is finite."""
    values = [record.get(key) for record in records]
    return [value / scale if isinstance(value, (int, float)) and abs(value) < 1e300 else None for value in values]


# ----------------------------------------------------------------------------------------------------------------------
# Plots


def thin(values, buckets):
    """The indices to draw, ascending: all, or of each bucket those of its first, last, least and greatest number."""
    if len(values) <= 4 * buckets:
        return range(len(values))
    kept = set()
    for i in range(buckets):
        bucket = range(i * len(values) // buckets, (i + 1) * len(values) // buckets)
        numbers = [j for j in bucket if values[j] is not None] or bucket[:1]
        kept |= {numbers[0], numbers[-1], min(numbers, key=values.__getitem__), max(numbers, key=values.__getitem__)}
    return sorted(kept)


class Axis:
    """Places the numbers from low to high on [0, 1]; ticks are [(number, label)]."""

    def __init__(self, low, high, most, whole=False, logarithmic=False):
        """The ticks are at most so many and one, at whole numbers alone or at powers of ten."""
        largest = max(abs(low), abs(high))
        if high - low <= max(1e-4 * largest, 1e-300):  # one number, or so near that labels would be long
            margin = max(0.5, 1e-9 * largest) if whole else 0.05 * largest if largest > 1e-290 else 1.0
            low, high = low - margin, high + margin
        self.scale = math.log10 if logarithmic else float
        self.low, self.span = self.scale(low), self.scale(high) - self.scale(low)
        if logarithmic:
            first, last = math.ceil(self.low), math.floor(self.low + self.span)
            self.ticks = [(10.0**i, f"{10.0**i:g}") for i in range(first, last + 1, 1 + (last - first) // most)]
        else:
            power = 10.0 ** math.floor(math.log10(self.span / most))
            step = next((times * power for times in (1, 2, 5) if times * power >= self.span / most), 10 * power)
            self.ticks = multiples(max(1, step) if whole else step, low, high)

    def place(self, number):
        return (self.scale(number) - self.low) / self.span


def multiples(step, low, high):
    """The ticks at the multiples of a step, with as many digits as tell them apart."""
    margin = 1e-9 * (high - low)
    numbers = [i * step for i in range(math.ceil((low - margin) / step), math.floor((high + margin) / step) + 1)]
    power, unit = math.floor(math.log10(max(map(abs, numbers), default=0) or 1)), ""
    if 4 <= power < 15:
        power -= power % 3
        unit = {3: "k", 6: "M", 9: "B", 12: "T"}[power]
    elif -3 < power < 4:
        power = 0
    else:
        unit = f"e{power}"
    digits = max(0, power - math.floor(math.log10(step) + 1e-9))
    return [(number, f"{number / 10.0**power:,.{digits}f}{unit}" if number else "0") for number in numbers]


def style(run, marked=False):
    """The classes of a line of the run with this number on the page."""
    return f"{'bold' if marked else 'plain'} c{run % COLORS} d{run // COLORS % DASHES}"


class Curve:
    """One number of records over another. Where its points are marked, each says its numbers."""

    def __init__(self, name, classes, records, x, y, marked=False):
        """x and y are (key, scale)."""
        self.name, self.classes, self.marked = name, classes, marked
        xs, ys = column(records, *x), column(records, *y)
        kept = thin(ys, MARKED_BUCKETS if marked else BUCKETS)
        self.points = [None if xs[i] is None or ys[i] is None else (xs[i], ys[i]) for i in kept]  # None: a gap
        self.numbers = [point for point in self.points if point]

    def drawn(self, across, up):
        line, marks, begun = "", "", False
        for point in self.points:
            if point:
                place = f"{WIDTH * across.place(point[0]):.0f} {HEIGHT * (1 - up.place(point[1])):.0f}"
                line += f" {place}" if begun else f"M{place} {place}"  # to itself: a dot, where nothing follows
                said = f"<title>{escape(self.name)}: {point[1]:.5g} at {point[0]:,.6g}</title>"
                marks += f'<path class="dot {self.classes}" d="M{place} {place}">{said}</path>' * self.marked
            begun = point is not None
        return f'<path class="{self.classes}" d="{line}"/>{marks}'


def plot(title, over, unit, curves, zero, logarithmic):
    """A plot, or "" of curves without a number. Its vertical axis has zero or not; where it may be logarithmic it is if
    all numbers are above 0 and the greatest is more than 100 times the least."""
    curves = [curve for curve in curves if curve.numbers]
    if not curves:
        return ""
    xs, ys = zip(*(point for curve in curves for point in curve.numbers))
    low, high, logarithmic = min(ys), max(ys), logarithmic and 0 < 100 * min(ys) < max(ys)
    if not logarithmic:
        low = min(0, low) if zero else low - 0.05 * (high - low)
        high += 0.05 * (high - low)
    across, up = Axis(min(xs), max(xs), 5, whole=over != "time"), Axis(low, high, 7, logarithmic=logarithmic)
    labels = [f'<span class="x" style="left:{100 * across.place(x):.2f}%">{label}</span>' for x, label in across.ticks]
    labels += [f'<span class="y" style="bottom:{100 * up.place(y):.2f}%">{label}</span>' for y, label in up.ticks]
    unit += ", vertical axis logarithmic" * logarithmic
    grid = "".join(f"M0 {HEIGHT * (1 - up.place(y)):.0f}h{WIDTH}" for y, _ in up.ticks)
    said = "; ".join(f"{curve.name} from {curve.numbers[0][1]:.5g} to {curve.numbers[-1][1]:.5g}" for curve in curves)
    return (f'<div class="plot over-{over}"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(f"{title} over {unit}: {said}")}"><path class="grid" d="{grid}"/>'
            + "".join(curve.drawn(across, up) for curve in curves)
            + f'</svg>{"".join(labels)}<span class="unit">{unit}</span></div>\n')


def legend(runs, kinds=()):
    """The colors of several runs, and kinds of curves: [(name, whether marked)]."""
    entries = [(run.name, style(i, True), False) for i, run in enumerate(runs)] if len(runs) > 1 else []
    entries += [(name, style(0, marked) + " neutral" * (len(runs) > 1), marked) for name, marked in kinds]
    items = "".join(f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="{line}" d="M0 4h24"/>'
                    + f'<path class="dot {line}" d="M12 4h0"/>' * marked + f"</svg>{escape(name)}</li>"
                    for name, line, marked in entries)
    return f'<ul class="legend">{items}</ul>\n' * bool(items)


def loss_figure(runs):
    """The losses over steps, tokens and time, of which the reader picks one."""
    longest = max((time for run in runs for time in column(run.records, "time", 1000) if time), default=0)
    unit, seconds = ("hours", 3600) if longest > 36_000 else ("minutes", 60) if longest > 600 else ("seconds", 1)
    views = dict(step=("steps", 1), tokens=("tokens", 1), time=(f"{unit} of training", 1000 * seconds))
    picks, plots, prefixes = "", "", [f"{run.name}, " * (len(runs) > 1) for run in runs]
    for over, (unit, scale) in views.items():
        curves = [Curve(prefixes[i] + name, style(i, marked), run.having(key), (over, scale), (key, 1), marked)
                  for key, name, marked in LOSSES for i, run in enumerate(runs)]
        if made := plot("Loss", over, unit, curves, zero=False, logarithmic=True):
            picks += (f'<input class="pick" type="radio" name="over" id="over-{over}"{" checked" * (not picks)}>'
                      f'<label for="over-{over}">{unit}</label>')
            plots += made
    kinds = [(name, marked) for key, name, marked in LOSSES if any(run.having(key) for run in runs)]
    plots = plots or "<p>None of them is finite.</p>\n"
    return f'<figure class="large">{picks}\n{plots}{legend(runs, kinds)}</figure>\n'


def small_figures(runs):
    figures = ""
    for key, scale, title in PLOTS:
        curves = [Curve(run.name, style(i), run.having(key), ("step", 1), (key, scale)) for i, run in enumerate(runs)]
        if made := plot(title, "step", "steps", curves, zero=True, logarithmic=key == "grad_norm"):
            figures += f"<figure><h3>{title}</h3>{made}{legend(runs)}</figure>\n"
    return f'<div class="small">{figures}</div>\n'


def layer_figures(run):
    """What --log_stats logged, a line a layer, each of one color in all plots; "" without."""
    names = {key.partition("/")[2] for record in run.records for key in record if key.partition("/")[0] in LAYERED}
    layers, figures = [run._replace(name=layer) for layer in sorted(names - {""}, key=in_order)], ""
    for figure, title in LAYERED.items():
        keys = [f"{figure}/{layer.name}" for layer in layers]
        curves = [Curve(layer.name, style(i), run.having(key), ("step", 1), (key, 1))
                  for i, (layer, key) in enumerate(zip(layers, keys))]
        if made := plot(title, "step", "steps", curves, zero=False, logarithmic=True):
            figures += f"<figure><h3>{title}</h3>{made}</figure>\n"
    return f'{legend(layers)}<div class="small">{figures}</div>\n' * bool(figures)


def in_order(layer):
    """h.2 before h.10."""
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", layer)]


def time_figure(runs):
    """Where the seconds of each run went, as its launches say when they end; all bars have one scale."""
    said = [[match for lines in run.launches for line in lines if (match := re.fullmatch(TIME, line))] for run in runs]
    parts = [Counter() for _ in runs]
    for matches, seconds in zip(said, parts):
        for what, number in re.findall(r"([a-z ]+) (-?\d+\.\d)\b", " + ".join(match[1] for match in matches)):
            seconds[what.strip()] += max(0.0, float(number))  # the rest may be -0.0
    longest, html = max([1e-9, *(number for seconds in parts for number in seconds.values())]), ""
    for i, (run, matches, seconds) in enumerate(zip(runs, said, parts)):
        bars = "".join(f'<span>{what}</span><div><i class="{style(i)}" style="width:{100 * number / longest:.2f}%"></i>'
                       f"</div><span>{number:,.1f} s</span>\n" for what, number in seconds.items())
        data, silent = sum(float(match[2]) for match in matches), len(run.launches) - len(matches)
        note = f"Of the steps the host spent {data:,.2f} s on data. " * bool(matches)
        note += f"Of {len(run.launches)} launches {silent} did not say: killed, or not at the end yet." * (silent > 0)
        html += f"<h3>{escape(run.name)}</h3>\n" * (len(runs) > 1)
        html += f'<div class="bars">{bars}</div>\n<p>{note or "There is no log."}</p>\n'
    return html


# ----------------------------------------------------------------------------------------------------------------------
# Text


def table(runs, facts, differing=False):
    """facts: {what: text} of each run. Of several runs perhaps only what differs."""
    names = dict.fromkeys(name for some in facts for name in some)
    rows = {name: [some.get(name) or "-" for some in facts] for name in names if any(some.get(name) for some in facts)}
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = "".join(f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>\n"
                   for name, texts in rows.items() if not differing or len(set(texts)) > 1)
    head = f"<thead><tr><th></th>{head}</tr></thead>\n" * (len(runs) > 1)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>\n'


def ending(lines):
    """How a launch ended: what its log says after the line of its time."""
    times = [i for i, line in enumerate(lines) if line.startswith("time: ")]
    after = [line for line in lines[times[-1] + 1 :] if line] if times else []
    return after[0] if after else "the log has no end: the run goes on, or was killed"


def result(run):
    """What a run was and what came of it, {what: text}."""
    lines = sum(run.launches, [])

    def said(start):
        return next((line.removeprefix(start) for line in reversed(lines) if line.startswith(start)), "")

    def shown(key, form, choose=lambda values: values[-1], scale=1):
        values = [value for value in column(run.records, key, scale) if value is not None]
        return f"{choose(values):{form}}" if values else ""

    planned = re.match(r"\d+/(\d+) ", said("step:"))
    counts = {"updates skipped": len(run.having("skipped")), "unreadable records": run.unreadable,
              "times rolled back": sum(line.startswith("rolled back ") for line in lines)}
    return {
        "network": said("model "), "data": said("data: "), "tokens per step": said("tokens per step: "),
        "steps": shown("step", ",.0f") + (f" of {int(planned[1]):,}" if planned else ""),
        "tokens": shown("tokens", ",.0f"), "training loss, last": shown("train_loss", ".4f"),
        "validation loss, last": shown("val_loss", ".4f"), "validation loss, least": shown("val_loss", ".4f", min),
        "tokens/s": shown("tokens_per_second", ",.0f"), "ms a step": shown("step_avg_ms", ",.2f"),
        "MFU": shown("mfu", ".1%"), "peak memory, MiB": shown("peak_mem_MB", ",.0f", max),
        "seconds of training": shown("time", ",.1f", scale=1000),
        **{what: f"{count:,}" for what, count in counts.items() if count},
        "end": ending(run.launches[-1]) if run.launches else "",
    }


def environment(run):
    """The command, versions and machine of each launch that has others than those before it."""
    html = ""
    for command, where in dict.fromkeys((lines[0].partition(": ")[2], "".join(lines[1:2])) for lines in run.launches):
        words = " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))  # none is broken at its dashes
        html += f'<p class="command">{words}</p>\n<p>{escape(where)}</p>\n'
    return html or "<p>There is no log.</p>\n"


def said_beside(run):
    """The log without its steps and checkpoints."""
    lines = [line for launch in run.launches for line in launch if line and not line.startswith(("step:", "saved "))]
    left_out = len(lines) - MOST_LINES
    if left_out > 0:
        lines[MOST_LINES // 2 : -MOST_LINES // 2] = [f"... {left_out:,} lines ..."]
    return "\n".join(lines)


def fields(part):
    """{name: text} of a part of the configuration."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in part.items()}


def folded(title, content):
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>\n"


def page(runs, sample):
    """The page as text. sample: (name, text) or None."""
    several, title = len(runs) > 1, escape(f"{len(runs)} runs" if len(runs) > 1 else runs[0].name)
    heads = [f"<h3>{escape(run.name)}</h3>\n" * several for run in runs]
    network, training = ([fields(run.config[part]) for run in runs] for part in ("network", "run"))
    both = [some | others for some, others in zip(network, training)]
    parts = {
        "Loss, nats a token": loss_figure(runs) + small_figures(runs),
        "Layers": "".join(head + figures for head, run in zip(heads, runs) if (figures := layer_figures(run))),
        "Where the time went": time_figure(runs),
        "Result": table(runs, [result(run) for run in runs]),
        "What differs": table(runs, both, differing=True) * several,
        "Environment": "".join(head + environment(run) for head, run in zip(heads, runs)),
        "Sample": f"<h3>{escape(sample[0])}</h3>\n<pre>{escape(sample[1])}</pre>\n" if sample else "",
        "Configuration": folded("Network", table(runs, network)) + folded("Training", table(runs, training)),
        "Log": "".join(folded(f"{run.name}, without its steps", f"<pre>{escape(said_beside(run))}</pre>")
                       for run in runs),
    }
    body = "".join(f"<section>\n<h2>{name}</h2>\n{content}</section>\n" for name, content in parts.items() if content)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n<meta name="viewport" '
            f'content="width=device-width, initial-scale=1">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n")


def write(path, content):
    """The file is there whole or not at all, and takes the place of no other kind of file."""
    require(path.parent.is_dir(), f"output={path}: {path.parent} is no folder; make it, or name another")
    if path.exists():
        require(path.is_file(), f"output={path} is no file; name one")
        with open(path, "rb") as file:
            require(GENERATOR.encode() in file.read(1000), f"output={path} is there, and no report; name another file")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def report(argv):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("logs")], metavar="PATH",
                        help="a run's folder, or a folder of runs, of which the newest is meant [logs]")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE",
                        help="the page to write [report.html]")
    parser.add_argument("--sample_file", type=Path, metavar="FILE", help="text to show, such as tools/sample.py prints")
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(find(path).resolve() for path in args.paths))
    names = [folder.name for folder in folders]
    runs = [read_run(folder, folder.name if names.count(folder.name) == 1 else str(folder)) for folder in folders]
    sample = args.sample_file and (args.sample_file.name, args.sample_file.read_text("utf-8", "replace"))
    content = page(runs, sample).encode("utf-8", "replace")
    try:
        write(args.output, content)
    except OSError as e:  # which of a full disk names no file
        raise OSError(e.errno, e.strerror, e.filename or str(args.output)) from e
    try:
        print(f"{args.output}: {', '.join(run.name for run in runs)}; {len(content):,} bytes", flush=True)
    except (OSError, UnicodeEncodeError):  # the page is there
        sys.stdout = open(os.devnull, "w")


def main(argv=None):
    return exit_code(lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main())
