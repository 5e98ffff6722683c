"""tools/report.py: what the page says and draws against the files of real runs, and how a browser shows it."""
import html
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

import train_gpt2_mod as script
from launch import ROOT, column, one_process, records, snapshot, steps, validations

sys.path.insert(0, str(ROOT / "tools"))
import report  # noqa: E402

VOID = {"meta", "input", "br", "hr", "img", "link"}
SMALL_PLOTS = {"Learning rate": ("lr", 1), "Gradient norm, before clipping": ("grad_norm", 1),
               "Tokens/s, mean of a launch so far": ("tokens_per_second", 1), "Peak memory, GiB": ("peak_mem_MB", 1024)}


class Element:
    def __init__(self, tag, attributes, parents):
        self.tag, self.attributes, self.parents, self.text = tag, dict(attributes), parents, ""


class Page(HTMLParser):
    """The elements of a page in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []  # every tag is closed

    def handle_starttag(self, tag, attributes):
        element = Element(tag, attributes, list(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(Element(tag, attributes, list(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def inside(self, parent, tag):
        return [element for element in self.elements if parent in element.parents and element.tag == tag]

    def section(self, title):
        found, = [element for element in self.elements if element.tag == "section"
                  and self.inside(element, "h2")[0].text == title]
        return found

    def rows(self, title):
        """The table of a section, {what: texts}"""
        rows = [[cell.text for cell in self.elements if row in cell.parents and cell.tag in ("td", "th")]
                for row in self.inside(self.section(title), "tr")]
        return {what: texts for what, *texts in rows}

    def plots(self):
        """{(title, what it is over): a plot}; its curves and marks are {classes: pieces}, in its axes' numbers."""
        return {(plot.title, plot.over): plot for plot in map(self.plot, self.of_class("plot"))}

    def of_class(self, name):
        return [element for element in self.elements if name in element.attributes.get("class", "").split()]

    def plot(self, element):
        svg, = self.inside(element, "svg")
        width, height = map(float, svg.attributes["viewbox"].split()[2:])
        spans = {kind: [(float(re.search(r":([-\d.]+)%", span.attributes["style"])[1]) / 100, number_of(span.text))
                        for span in self.inside(element, "span") if span.attributes["class"] == kind] for kind in "xy"}
        unit, = [span.text for span in self.inside(element, "span") if span.attributes["class"] == "unit"]
        scale = math.log10 if "logarithmic" in unit else float
        across, up = inverse(spans["x"], float), inverse(spans["y"], scale)
        curves, marks = {}, {}
        for path in self.inside(element, "path"):
            kinds = path.attributes["class"].split()
            if kinds != ["grid"]:
                pieces = [[(across(x / width), up(1 - y / height)) for x, y in piece]
                          for piece in pieces_of(path.attributes["d"])]
                (marks if kinds[0] == "dot" else curves).setdefault(" ".join(kinds[-3:]), []).extend(pieces)
        title = svg.attributes["aria-label"].split(" over ")[0]
        over = element.attributes["class"].split("over-")[1]
        return SimpleNamespace(title=title, over=over, unit=unit, curves=curves, marks=marks, spans=spans,
                               label=svg.attributes["aria-label"], element=element)


def number_of(label):
    """What a tick's label says."""
    powers = dict(k=3, M=6, B=9, T=12)
    label = label.replace(",", "")
    return float(label[:-1] + f"e{powers[label[-1]]}") if label[-1] in powers else float(label)


def inverse(ticks, scale):
    """The number at a share of an axis's length, by two of its ticks [(share, number)]."""
    if len(ticks) < 2:
        return lambda share: ticks[0][1] if ticks else None
    (a, low), (b, high) = ticks[0], ticks[-1]
    low, high = scale(low), scale(high)

    def invert(share):
        number = low + (share - a) / (b - a) * (high - low)
        return 10**number if scale is math.log10 else number

    return invert


def pieces_of(d):
    """[[(x, y)]] of the unbroken pieces of a path, without a first point's repetition."""
    pieces = [list(map(int, piece.split())) for piece in d.split("M")[1:]]
    points = [list(zip(piece[::2], piece[1::2])) for piece in pieces]
    assert all(piece[0] == piece[1] for piece in points)
    return [piece[1:] for piece in points]


def flat(pieces):
    return [point for piece in pieces for point in piece]


@pytest.fixture
def page_of(tmp_path, capsys):
    """page_of(words): the page that these arguments make, as tmp_path / "page.html"."""
    def page_of(*words):
        output = tmp_path / "page.html"
        capsys.readouterr()
        assert report.main([*map(str, words), "--output", str(output)]) == 0
        said, err = capsys.readouterr()
        assert err == "" and said.startswith(f"{output}: ") and said.count("\n") == 1
        return Page(output.read_text())

    return page_of


def write_run(folder, rows, config=None, log=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n"
                                                  for row in rows))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if log:
        (folder / f"{folder.name}.log").write_text(log)
    return folder


def step_row(step, **changes):
    return {**dict(step=step, train_loss=6 / step, lr=1e-3, grad_norm=1.0, tokens=64 * step, tokens_per_second=5e3,
                   mfu=None, peak_mem_MB=2048, step_ms=10.0, step_avg_ms=10.0, time=10.0 * step), **changes}


# ----------------------------------------------------------------------------------------------------------------------
# The numbers of real runs


@pytest.fixture
def trainer(trainer, monkeypatch):
    """Run ids count up; faults(step=what) makes the loss of that training step NaN, or sends this process a signal."""
    ids, calls, faults = iter(range(1000)), iter(range(1, 1000)), {}
    plain = script.GPT.loss

    def loss(self, *args):
        fault = faults.get(next(calls)) if self.training else None
        if fault == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args) * (math.nan if fault == "nan" else 1.0)

    monkeypatch.setattr(script, "new_run_id", lambda model: f"20260101-{next(ids):06d}-{model}-abcd")
    monkeypatch.setattr(script.GPT, "loss", loss)
    trainer.faults = faults
    return trainer


def assert_drawn(points, rows, x, y, plot):
    """Points (in the plot's numbers) are the rows' numbers, to a thousandth of what the plot shows."""
    expected = [(row[x[0]] / x[1], row[y[0]] / y[1]) for row in rows if row[y[0]] is not None]
    assert len(points) == len(expected)
    for i in (0, 1):
        shown = [number for _, number in plot.spans["xy"[i]]]
        if len(shown) > 1:
            margin = 1e-3 * max(max(e[i] for e in expected) - min(e[i] for e in expected), shown[-1] - shown[0])
            assert all(abs(point[i] - e[i]) <= margin for point, e in zip(points, expected))


def assert_plots_are(page, folder):
    plots = page.plots()
    for over, x in dict(step=("step", 1), tokens=("tokens", 1), time=("time", 1000)).items():
        plot = plots["Loss", over]
        assert_drawn(flat(plot.curves["plain c0 d0"]), steps(folder), x, ("train_loss", 1), plot)
        if validations(folder):
            assert_drawn(flat(plot.curves["bold c0 d0"]), validations(folder), x, ("val_loss", 1), plot)
            assert_drawn(flat(plot.marks["bold c0 d0"]), validations(folder), x, ("val_loss", 1), plot)
    for title, y in SMALL_PLOTS.items():
        plot = plots[title, "step"]
        assert_drawn(flat(plot.curves["plain c0 d0"]), steps(folder), ("step", 1), y, plot)
    assert len(plots) == 3 + len(SMALL_PLOTS)


def log_of(folder):
    """The lines of a run's log after its source."""
    return (folder / f"{folder.name}.log").read_text().rpartition("\n" + "-" * 100 + "\n")[2].splitlines()


def test_a_resumed_run(trainer, page_of):
    folder = trainer.run("--num_iterations", 5, "--save_every", 2).folder
    trainer.run("--num_iterations", 9, "--resume", "auto")
    page, losses = page_of(folder), column(validations(folder), "val_loss")
    assert_plots_are(page, folder)
    rows, last = page.rows("Result"), steps(folder)[-1]
    assert rows["steps"] == ["9 of 9"] and rows["tokens"] == [f"{9 * 64}"]
    assert rows["training loss, last"] == [f"{last['train_loss']:.4f}"]
    assert rows["validation loss, last"] == [f"{losses[-1]:.4f}"] and len(losses) == 4
    assert rows["validation loss, least"] == [f"{min(losses):.4f}"]
    assert rows["tokens/s"] == [f"{last['tokens_per_second']:,.0f}"]
    assert rows["peak memory, MiB"] == [f"{max(column(steps(folder), 'peak_mem_MB')):,}"]
    assert rows["end"][0].startswith("training took ") and "9 steps" in rows["end"][0]
    assert not {"updates skipped", "times rolled back", "unreadable records", "MFU"} & rows.keys()
    log = log_of(folder)
    assert rows["network"] == [next(line for line in log if line.startswith("model "))[6:]]
    environment = page.section("Environment").text
    commands = [line.partition(": ")[2] for line in log if line.startswith("run ")]
    versions = [line for line in log if line.startswith("python ")]
    assert len(commands) == 2 and all(line in environment for line in commands + versions)
    config = json.loads((folder / "config.json").read_text())
    shown = page.rows("Configuration")
    assert {name: [str(value)] for name, value in config["network"].items() if isinstance(value, int)
            and not isinstance(value, bool)}.items() <= shown.items()
    assert shown["learning_rate"] == ["0.003"] and shown["compile"] == ["false"] and shown["n_layer"] == ["2"]
    assert "differs from the checkpoint: num_iterations=9, was 5" in page.section("Log").text
    assert "step:6/9" not in page.section("Log").text


def test_the_time_of_all_launches_is_added_up(trainer, page_of):
    folder = trainer.run("--num_iterations", 5).folder
    path = folder / f"{folder.name}.log"
    text = re.sub(r"\ntime: .*", "\ntime: 20.5 s = first step 12.0 + further steps 4.5 + validation 3.0 + saving 1.0 + "
                  "the rest -0.0; of the steps the host spent 0.25 s on data", path.read_text())
    launch = text[text.rindex(f"\nrun {folder.name}: "):]
    text += launch[1:].replace("first step 12.0", "profile 7.0 + first step 1.0").replace("0.25 s on", "0.50 s on")
    path.write_text(text + launch[1:].partition("\ntime: ")[0] + "\n")  # a third, which was killed
    page = page_of(folder)
    section = page.section("Where the time went")
    texts = [span.text for span in page.inside(section, "span")]
    assert dict(zip(texts[::2], texts[1::2])) == {
        "first step": "13.0 s", "further steps": "9.0 s", "validation": "6.0 s", "saving": "2.0 s", "the rest": "0.0 s",
        "profile": "7.0 s"}
    widths = [bar.attributes["style"] for bar in page.inside(section, "i")]
    expected = [100 * seconds / 13 for seconds in (13, 9, 6, 2, 0, 7)]
    assert widths == [f"width:{width:.2f}%" for width in expected]
    assert "spent 0.75 s on data" in section.text and "Of 3 launches 1 did not say" in section.text
    assert page.rows("Result")["end"] == ["the log has no end: the run goes on, or was killed"]


def test_a_run_that_a_signal_ended(trainer, page_of):
    trainer.faults[4] = "signal"
    result = trainer.main(*trainer.flags("--num_iterations", 9))
    last = steps(result.folder)[-1]["step"]
    assert result.code == 75 and 4 <= last < 9
    page = page_of(trainer.output)
    assert_plots_are(page, result.folder)
    assert page.rows("Result")["steps"] == [f"{last} of 9"]
    assert page.rows("Result")["end"][0].startswith(f"SIGTERM: training ended after step {last}, saved as ")


def test_a_run_that_was_rolled_back_and_skipped_updates(trainer, page_of):
    trainer.faults.update({3: "nan", 7: "nan", 8: "nan"})
    folder = trainer.run("--num_iterations", 9, "--nan_policy", "rollback", "--nan_limit", 2).folder
    skipped = [row["step"] for row in steps(folder) if row.get("skipped")]
    assert skipped == [3] and column(steps(folder), "step") == list(range(1, 10))
    page = page_of(folder)
    assert_plots_are(page, folder)
    rows = page.rows("Result")
    assert rows["updates skipped"] == ["1"] and rows["times rolled back"] == ["1"]
    pieces = page.plots()["Loss", "step"].curves["plain c0 d0"]
    assert [len(piece) for piece in pieces] == [2, 6]  # a gap at step 3
    assert "rolled back from step 8" in page.section("Log").text


def test_a_run_that_diverged(trainer, page_of):
    trainer.faults[1] = "nan"
    result = trainer.main(*trainer.flags("--nan_policy", "stop"))
    assert result.code == 1 and len(records(result.folder)) == 1
    page = page_of(result.folder)
    assert page.rows("Result")["end"][0].startswith("step 1: the loss is nan")
    assert "None of them is finite" in page.section("Loss, nats a token").text
    assert {title for title, _ in page.plots()} == SMALL_PLOTS.keys() - {"Gradient norm, before clipping"}


def test_the_layers(trainer, page_of):
    """Every second step has them. A layer has one color in all plots, h.2 stands before h.10."""
    run = trainer.run("--log_stats", 2, "--zero_init", "--no_tie_embeddings", "--n_layer", 11)
    page, logged = page_of(run.folder), [record for record in steps(run.folder) if "weight_norm/wte" in record]
    plots = page.plots()
    assert [record["step"] for record in logged] == [2, 4, 6]
    layers = [*(f"h.{i}" for i in range(11)), "lm_head", "wte"]
    assert [item.text for item in page.inside(page.section("Layers"), "li")] == layers
    for figure, title in report.LAYERED.items():
        plot = plots[title, "step"]
        its = {f"plain c{i % 8} d{i // 8}": f"{figure}/{layer}" for i, layer in enumerate(layers)
               if f"{figure}/{layer}" in logged[0]}
        assert plot.curves.keys() == its.keys() and len(its) == (11 if figure == "activation_rms" else 13)
        for style, key in its.items():
            assert_drawn(flat(plot.curves[style]), logged, ("step", 1), (key, 1), plot)


def test_without_layers_there_is_no_such_section(trainer, page_of):
    page = page_of(trainer.run().folder)
    assert "Layers" not in [element.text for element in page.elements if element.tag == "h2"]


def test_a_run_without_validation(trainer, page_of):
    folder = trainer.run("--input_val_bin", "").folder
    page = page_of(folder)
    assert_plots_are(page, folder)
    assert page.of_class("dot") == [] and not any("validation" in what for what in page.rows("Result"))
    assert "validation" not in page.of_class("legend")[0].text


# ----------------------------------------------------------------------------------------------------------------------
# Several runs


def test_several_runs_share_the_plots(trainer, page_of):
    folders = [trainer.run("--seed", i, *flags).folder
               for i, flags in enumerate(([], ["--mlp", "swiglu"], ["--num_iterations", 9, "--input_val_bin", ""]))]
    page = page_of(*folders)
    plots = page.plots()
    assert len(plots) == 3 + len(SMALL_PLOTS)
    for i, folder in enumerate(folders):
        for (title, over), plot in plots.items():
            y = SMALL_PLOTS.get(title, ("train_loss", 1))
            x = dict(step=("step", 1), tokens=("tokens", 1), time=("time", 1000))[over]
            assert_drawn(flat(plot.curves[f"plain c{i} d0"]), steps(folder), x, y, plot)
            assert folder.name in plot.label
        assert (f"bold c{i} d0" in plots["Loss", "step"].curves) == (i < 2)
    for legend in page.of_class("legend"):
        items = [item.text for item in page.inside(legend, "li")]
        assert items[:3] == [folder.name for folder in folders] and items[3:] in ([], ["training", "validation"])
        colors = [path.attributes["class"] for path in page.inside(legend, "path")][:3]
        assert colors == [f"bold c{i} d0" for i in range(3)]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    flat_configs = [{**config["network"], **config["run"]} for config in configs]
    differing = {name for name in flat_configs[0] if len({str(config[name]) for config in flat_configs}) > 1}
    assert differing == {"seed", "mlp", "num_iterations", "input_val_bin"}
    rows = page.rows("What differs")
    assert rows.keys() - {""} == differing and rows["seed"] == ["0", "1", "2"] and rows["input_val_bin"][2] == "-"
    assert page.rows("Result")["steps"] == ["6 of 6", "6 of 6", "9 of 9"]
    headings = [element.text for element in page.elements if element.tag == "h2"]
    assert headings.index("What differs") < headings.index("Configuration")


def test_names(tmp_path, page_of):
    """One run twice is one; two of one name are told apart; a folder of runs is its newest."""
    for place in ("a/x", "b/x", "b/w"):
        write_run(tmp_path / place, [step_row(1)])
    write_run(tmp_path / "b/z", [])  # has not trained yet
    (tmp_path / "b/zz").mkdir()
    page = page_of(tmp_path / "a/x", tmp_path / "a", tmp_path / "a/../a/x")
    assert [element.text for element in page.elements if element.tag == "h1"] == ["x"]
    page = page_of(tmp_path / "a", tmp_path / "b")
    assert page.rows("Result")[""] == [str(tmp_path / "a/x"), str(tmp_path / "b/x")]
    assert [page_of(tmp_path / "b" / name).rows("Result")["steps"] for name in ("x", "w")] == [["1"], ["1"]]


def test_many_runs_are_told_apart(tmp_path, page_of):
    folders = [write_run(tmp_path / f"run{i:02d}", [step_row(1, train_loss=i), step_row(2)]) for i in range(20)]
    assert len(page_of(*folders).plots()["Loss", "step"].curves) == 20


# ----------------------------------------------------------------------------------------------------------------------
# Thinning


def test_thinning_keeps_what_a_bucket_spans():
    rng = random.Random(0)
    for count, buckets, absent in ((1000, 7, 0.1), (1001, 10, 0.0), (9999, 300, 0.9), (50, 3, 1.0), (41, 10, 0.5)):
        values = [None if rng.random() < absent else rng.gauss(0, 100 ** rng.random()) for _ in range(count)]
        kept = list(report.thin(values, buckets))
        assert kept == sorted(set(kept)) and buckets <= len(kept) <= 4 * buckets
        edges = [i * count // buckets for i in range(buckets + 1)]
        for start, end in zip(edges, edges[1:]):
            whole = [value for value in values[start:end] if value is not None]
            some = [values[i] for i in kept if start <= i < end]
            if whole:
                assert (min(some), max(some), some[0], some[-1]) == (min(whole), max(whole), whole[0], whole[-1])
            else:
                assert some == [None]
    assert list(report.thin([1.0] * 40, 10)) == list(range(40))


def test_a_hundred_thousand_steps(tmp_path, page_of):
    """A page of moderate size, with the spikes of one step each where they were."""
    rng, spikes = random.Random(1), {31_234: 40.0, 77_777: 35.0}
    rows = []
    for step in range(1, 100_001):
        rows.append(step_row(step, train_loss=spikes.get(step, 3 + rng.random()), grad_norm=rng.random() + 0.1,
                             lr=1e-3 * (1 - step / 100_000), stats={"layers": {"0": {"norm": 1.0}}}))
        if step == 55_555:
            rows[-1].update(train_loss=None, grad_norm=None, skipped=True)
        if step % 100 == 0:
            rows.append(dict(step=step, val_loss=3 - step / 1e5, tokens=64 * step, time=10.0 * step))
    folder = write_run(tmp_path / "long", rows)
    page = page_of(folder)
    assert (tmp_path / "page.html").stat().st_size < 500_000
    plot = page.plots()["Loss", "step"]
    high = [(x, y) for x, y in flat(plot.curves["plain c0 d0"]) if y > 5]
    assert high == [(pytest.approx(x, abs=50), pytest.approx(y, abs=0.1)) for x, y in spikes.items()]
    validated = flat(plot.marks["bold c0 d0"])
    assert validated[0] == (pytest.approx(100, abs=50), pytest.approx(2.999, abs=0.1)) and len(validated) < 300
    assert validated[-1] == (pytest.approx(100_000, abs=50), pytest.approx(2, abs=0.1))
    assert page.rows("Result")["updates skipped"] == ["1"]


# ----------------------------------------------------------------------------------------------------------------------
# Odd input

NUMBERS = st.one_of(st.none(), st.integers(), st.floats(), st.sampled_from([True, "1", [], 10**400, 5e-324, 1e308]))


@settings(max_examples=150)
@given(rows=st.lists(st.fixed_dictionaries({key: NUMBERS for key in step_row(1)}), min_size=1, max_size=8),
       losses=st.lists(NUMBERS, max_size=4))
def test_no_number_breaks_a_plot(rows, losses):
    """The coordinates are whole numbers within the plot, whatever the records hold."""
    rows = rows + [dict(step=i, tokens=i, time=i, val_loss=loss) for i, loss in enumerate(losses)]
    rows = [json.loads(json.dumps(row)) for row in rows]
    text = report.page([report.Run("name", rows, 0, dict(network={}, run={}), [])], None)
    page = Page(text)
    for plot in page.of_class("plot"):
        for path in page.inside(plot, "path"):
            if path.attributes["class"] != "grid":
                assert all(0 <= x <= report.WIDTH and 0 <= y <= report.HEIGHT
                           for piece in pieces_of(path.attributes["d"]) for x, y in piece)
        places = re.findall(r"(?:left|bottom):([^%]*)%", " ".join(
            span.attributes.get("style", "") for span in page.inside(plot, "span")))
        assert places and all(-0.01 <= float(place) <= 100.01 for place in places)
    assert not re.search(r"\b(nan|inf)\b", text.partition("</style>")[2])


@settings(max_examples=300)
@given(low=st.floats(-1e12, 1e12), span=st.floats(0, 1e13), exponent=st.integers(-30, 15), whole=st.booleans())
def test_labels_say_where_ticks_stand(low, span, exponent, whole):
    scale = 1 if whole else 10.0 ** (exponent - 12)
    axis = report.Axis(low * scale, (low + span) * scale, 5, whole=whole)
    assert len(axis.ticks) <= 7 and (whole or len(axis.ticks) >= 2)
    shown = [number_of(label) for _, label in axis.ticks]
    assert len(set(shown)) == len(shown)
    for (number, label), said in zip(axis.ticks, shown):
        assert said == pytest.approx(number, rel=1e-6, abs=1e-6 * axis.span) and -1e-6 <= axis.place(number) <= 1 + 1e-6
        assert not whole or number == int(number)


def test_a_norm_of_all_magnitudes_has_a_logarithmic_axis(tmp_path, page_of):
    norms = [0.01, 1.0, 35.0, 5000.0]
    rows = [step_row(i + 1, grad_norm=norm) for i, norm in enumerate(norms)]
    page = page_of(write_run(tmp_path / "run", rows))
    plot = page.plots()["Gradient norm, before clipping", "step"]
    assert plot.unit == "steps, vertical axis logarithmic"
    assert [y for _, y in flat(plot.curves["plain c0 d0"])] == pytest.approx(norms, rel=0.02)
    assert all("logarithmic" not in plot.unit for (title, _), plot in page.plots().items() if "norm" not in title)


@pytest.mark.parametrize("seconds, unit, shown", [(600, "seconds", 600), (660, "minutes", 11), (72_000, "hours", 20)])
def test_the_unit_of_time_fits_its_length(tmp_path, page_of, seconds, unit, shown):
    rows = [step_row(1), step_row(2, time=1000 * seconds)]
    plot = page_of(write_run(tmp_path / "run", rows)).plots()["Loss", "time"]
    assert plot.unit == f"{unit} of training"
    assert flat(plot.curves["plain c0 d0"])[-1] == (pytest.approx(shown, rel=1e-3), pytest.approx(3, rel=1e-2))


def test_of_a_long_log_both_ends_are_shown(tmp_path, page_of):
    notes = [f"note {i}" for i in range(1000)]
    log = "\n".join(["source", "run run: train.py", "python", "step:1/9 | loss 1", "saved x.pt", *notes, ""])
    page = page_of(write_run(tmp_path / "run", [step_row(1)], log=log))
    shown, = [element.text.splitlines() for element in page.inside(page.section("Log"), "pre")]
    half = report.MOST_LINES // 2
    assert shown == ["run run: train.py", "python", *notes[: half - 2], "... 802 lines ...", *notes[-half:]]


def test_what_a_crash_leaves_is_passed_over(tmp_path, page_of):
    rows = [step_row(1), "{broken\n", "[1]\n", step_row(2), dict(stats={"a": 1}), '{"step": 3, "train_lo']
    folder = write_run(tmp_path / "run", rows)
    (folder / "config.json").write_text('{"network": {"n_layer": 2}, "ru')
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\x00")
    page = page_of(folder)
    assert [y for _, y in flat(page.plots()["Loss", "step"].curves["plain c0 d0"])] == pytest.approx([6, 3], abs=0.01)
    rows = page.rows("Result")
    assert rows["steps"] == ["2"] and rows["unreadable records"] == ["3"]
    assert page.section("Where the time went").text.count("There is no log.") == 1


NASTY = """</pre></style><script src="http://example.com/x.js"></script><img src=x onerror='1'>&amp;"'<b>\ud800"""


def test_text_is_text(tmp_path, page_of):
    """Whatever stands in a name, a log, a configuration or a sample, it is shown as it is and is no element."""
    name = NASTY.replace("/", "").replace("\ud800", "")
    shown = NASTY.replace("\ud800", "?")
    rows, said = [step_row(1), dict(step=1, val_loss=1.0)], f"versions {shown}; machine\nmodel {shown}\nnote {shown}\n"
    folders = [write_run(tmp_path / (name + tail), rows, dict(network={NASTY: NASTY}, run=dict(a=[NASTY, tail])),
                         f"run {name}{tail}: train.py --model '{shown}'\n{said}") for tail in "xy"]
    sample = tmp_path / "sample.txt"
    sample.write_text(f"drawn: {shown}")
    for page in page_of(folders[0], "--sample_file", sample), page_of(*folders, "--sample_file", sample):
        assert {element.tag for element in page.elements} <= set(
            "html head meta title style body h1 h2 h3 section figure input label div svg path span ul li p table thead "
            "tbody tr th td details summary pre".split())
        assert page.section("Sample").text.endswith(f"drawn: {shown}\n")
        assert f"note {shown}" in page.section("Log").text and f"--model '{shown}'" in page.section("Environment").text
        assert page.rows("Configuration")[shown][0] == shown
        assert f"versions {shown}" in page.section("Environment").text
        assert page.rows("Result")["network"][0] == shown
        assert all(name in plot.label for plot in page.plots().values()) == (len(page.rows("Result")["steps"]) > 1)


def test_the_page_loads_nothing(trainer, page_of, tmp_path):
    trainer.run()
    page, text = page_of(trainer.output), (tmp_path / "page.html").read_text()
    assert not {element.tag for element in page.elements} & set(
        "script link img iframe object embed base use image video audio source".split())
    names = {name for element in page.elements for name in element.attributes}
    assert not names & {"src", "href", "srcset", "xlink:href", "data", "action", "http-equiv", "poster"}
    assert not any(name.startswith("on") for name in names)
    assert not re.search(r"url\(|@import|https?:", text)


def test_the_same_files_give_the_same_bytes(trainer, tmp_path):
    """Also with another seed of Python's hashes, and from another folder."""
    folders = [trainer.run("--seed", i).folder for i in range(2)]
    pages = []
    for seed in "12":
        (tmp_path / seed).mkdir()
        done = one_process(sys.executable, ROOT / "tools" / "report.py", *folders, cwd=tmp_path / seed,
                           PYTHONHASHSEED=seed)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("report.html: ")
        assert [path.name for path in (tmp_path / seed).iterdir()] == ["report.html"]
        pages.append((tmp_path / seed / "report.html").read_bytes())
    assert pages[0] == pages[1] and f"{len(pages[0]):,} bytes" in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("words, part", [
    (["nowhere"], "nowhere is no folder; name a run's"),
    (["file"], "file is no folder"),
    (["empty"], "empty holds no run that has trained"),
    ([], "logs is no folder"),
    (["new"], "metrics.jsonl has no record of a step; name another run"),
    (["other"], "metrics.jsonl has no record of a step"),
    (["run", "new"], "new/metrics.jsonl has no record"),
    (["run", "--sample_file", "nowhere.txt"], "nowhere.txt cannot be used (No such file"),
    (["run", "--output", "file"], "output=file is there, and no report; name another file"),
    (["run", "--output", "empty"], "output=empty is no file"),
    (["run", "--output", ""], "output=. is no file"),
    (["run", "--output", "nowhere/page.html"], "nowhere is no folder; make it"),
    (["run", "--outptu", "x"], "unrecognized arguments: --outptu"),
])
def test_what_is_refused_is_refused_in_one_line(tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", [step_row(1)])
    write_run(tmp_path / "new", [])
    write_run(tmp_path / "other", [dict(a=1), "no json\n"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    assert report.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert snapshot(tmp_path) == before


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    run, output = write_run(tmp_path / "run", [step_row(1)]), tmp_path / "page.html"
    assert report.main([str(run), "--output", str(output)]) == 0
    before = output.read_bytes()
    write_run(tmp_path / "other", [step_row(7)])
    plain = report.Path.write_bytes

    def full(path, content):
        plain(path, content[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report.Path, "write_bytes", full)
        assert report.main([str(tmp_path / "other"), "--output", str(output)]) == 2
    assert f"error: {output} cannot be used (No space left on device)" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "page.html", "run"]
    assert report.main([str(tmp_path / "other"), "--output", str(output)]) == 0
    assert output.read_bytes() != before


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

# What a page says of itself when it is laid out, as JSON: places (left, top, right, bottom) in pixels of the window.
FACTS = """
function facts(page) {
  const style = e => page.defaultView.getComputedStyle(e), all = (e, what) => [...e.querySelectorAll(what)];
  const place = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const shown = () => all(page, ".plot").filter(p => p.getClientRects().length);
  const plots = shown().map(p => ({
    title: p.querySelector("svg").getAttribute("aria-label"), place: place(p), size: parseFloat(style(p).fontSize),
    lines: all(p, "path:not(.grid)").map(l => [style(l).stroke, style(l).opacity]),
    labels: all(p, "span").map(l => [l.className, l.textContent, ...place(l)]) }));
  const bars = all(page, ".bars i").map(b => [style(b).backgroundColor, ...place(b)]);
  const picked = all(page, ".pick").map(pick => {
    pick.click();
    return shown().filter(p => p.closest(".large")).map(p => p.className.split("over-")[1]); });
  return JSON.stringify({
    width: page.documentElement.scrollWidth, window: page.defaultView.innerWidth, plots, bars, picked,
    back: style(page.body).backgroundColor, card: style(page.querySelector("figure")).backgroundColor });
}
"""
HEIGHT = 2400  # of the window, in pixels


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """look(page's text, width, theme): its facts, and a picture of it: (row, column, RGB) of 0 to 255."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(names)} is installed")
    folder = tmp_path_factory.mktemp("browser")
    page, picture = folder / "page.html", folder / "picture.png"

    def look(text, width, theme):
        def start(flag):
            command = [program, *"--headless --no-sandbox --disable-gpu --disable-background-networking".split(),
                       *"--disable-sync --no-first-run --hide-scrollbars".split(), f"--user-data-dir={folder}/profile",
                       f"--blink-settings=preferredColorScheme={dict(dark=0, light=1)[theme]}",
                       f"--window-size=1000,{HEIGHT}", flag, page.as_uri()]
            return subprocess.run(command, capture_output=True, text=True, timeout=100).stdout

        # In a frame, as no window is as narrow as a phone. A frame's theme is that of the page around it.
        page.write_text(f"""<meta name="color-scheme" content="light dark"><body style="margin:0"><iframe id="frame"
            width="{width}" height="{HEIGHT}" style="border:0" srcdoc="{html.escape(text)}"></iframe><pre></pre><script>
            {FACTS} frame.onload = () => document.querySelector("pre").textContent = facts(frame.contentDocument);
            </script>""")
        said = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", start("--dump-dom"))[1]))
        start(f"--screenshot={picture}")
        return SimpleNamespace(**said), (255 * imread(picture)[..., :3]).round()

    return look


def rgb(color):
    return [float(part) for part in re.findall(r"[\d.]+", color)[:3]]


def near(pixels, color, other):
    """Where pixels are nearer to a color than a third of the way to another."""
    return ((pixels - color) ** 2).sum(-1) < ((np.array(other) - color) ** 2).sum() / 9


def assert_apart(labels, axis):
    """Labels [(left, top, right, bottom)] do not touch along an axis."""
    spans = sorted((label[axis], label[axis + 2]) for label in labels)
    assert len(spans) >= 2 and all(a[1] + 2 <= b[0] for a, b in zip(spans, spans[1:])), spans


@pytest.mark.parametrize("theme, width", [("light", 1000), ("dark", 1000), ("light", 360), ("dark", 360)])
def test_in_a_browser(look, tmp_path, page_of, theme, width):
    """Plots of the first 48,000 steps of two runs: every line is seen, in its color and where the labels say."""
    folders = []
    for i in range(2):
        rows = [step_row(step, tokens=524_288 * step, train_loss=3 + i + 1 / step, lr=(3 + i) * 1e-5, grad_norm=2.0**-i,
                         tokens_per_second=(1 - i / 2) * 123_456, peak_mem_MB=2048 << i)
                for step in range(1, 48_000, 40)]
        rows.append(dict(step=40_000, val_loss=3.5 + i, tokens=524_288 * 40_000, time=4e5))
        log = (f"run x{i}: train.py\npython\ntime: 9.0 s = first step {2 + i}.0 + further steps 6.0; "
               "of the steps the host spent 0.10 s on data\n")
        folders.append(write_run(tmp_path / f"x{i}", rows, log=log))
    page_of(*folders)
    facts, picture = look((tmp_path / "page.html").read_text(), width, theme)
    assert facts.window == width and facts.width <= width  # nothing to scroll sideways
    back, card = rgb(facts.back), rgb(facts.card)
    assert max(back) < 50 if theme == "dark" else min(back) > 240
    assert abs(picture[3, 3] - back).max() <= 2
    assert facts.picked == [["step"], ["tokens"], ["time"]]
    assert [plot["title"].partition(" over ")[0] for plot in facts.plots] == ["Loss", *SMALL_PLOTS]
    for plot in facts.plots:
        left, top, right, bottom = map(round, plot["place"])
        area = picture[top : bottom + 1, left : right + 1]
        assert right - left > width / 3 and bottom < HEIGHT and plot["size"] >= 12
        for stroke, opacity in plot["lines"]:
            seen = near(area, float(opacity) * np.array(rgb(stroke)) + (1 - float(opacity)) * np.array(card), card)
            marks = plot["title"].startswith("Loss") and opacity == "1"
            assert seen.sum() >= 20 if marks else seen.any(0).mean() > 0.9
        texts = {kind: [label[2:] for label in plot["labels"] if label[0] == kind] for kind in ("x", "y", "unit")}
        assert all(0 <= label[0] and label[2] <= width for labels in texts.values() for label in labels)
        assert_apart(texts["x"], 0)
        assert_apart(texts["y"], 1)
        assert all(label[3] <= texts["unit"][0][1] for label in texts["x"])
    memory, middle = facts.plots[-1], round(sum(facts.plots[-1]["place"][::2]) / 2)
    for label, (stroke, _) in zip(("2", "4"), memory["lines"]):
        (top, bottom), = [(y[1], y[3]) for kind, said, *y in memory["labels"] if kind == "y" and said == label]
        row = round((top + bottom) / 2)
        assert near(picture[row - 2 : row + 3, middle], rgb(stroke), card).any()
    lengths = [bar[3] - bar[1] for bar in facts.bars]
    assert lengths == pytest.approx([length * max(lengths) / 6 for length in (2, 6, 3, 6)], abs=1)
    for color, left, top, right, bottom in facts.bars:
        assert abs(picture[round((top + bottom) / 2), round((left + right) / 2)] - rgb(color)).max() <= 2


def test_colors_are_legible_in_both_themes():
    """By the contrast of WCAG 2: 4.5 for text, 3 for lines."""
    light, dark = re.findall(r":root \{(.*?)\}", report.STYLE, re.DOTALL)

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        return sum(share * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
                   for share, part in zip((0.2126, 0.7152, 0.0722), parts))

    for block in light, dark:
        colors = {name: luminance(color) for name, color in re.findall(r"--(\w+): (#\w+)", block)}
        assert len(colors) == 5 + report.COLORS
        for name, one in colors.items():
            for behind in ("back", "card"):
                ratio = (max(one, colors[behind]) + 0.05) / (min(one, colors[behind]) + 0.05)
                assert name in ("back", "card", "grid") or ratio >= (3 if name[0] == "c" else 4.5), (name, behind)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_console_that_is_full_costs_no_page(trainer, tmp_path):
    run = trainer.run()
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "tools/report.py", run.folder, "--output", tmp_path / "a.html"],
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and (tmp_path / "a.html").stat().st_size > 10_000, done.stderr
