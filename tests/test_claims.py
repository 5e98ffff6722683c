"""docs/experiments.py and docs/claims.py: the generated documents are those of the data, every command in them
resolves, made-up records get the verdicts that they should, and what is run, with stand-ins for the programs."""
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_gpt2_mod as script
from helpers import all_fields, write_shard
from test_moe import program, registered

ROOT = Path(script.__file__).resolve().parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import claims  # noqa: E402
import experiments  # noqa: E402
import measuring  # noqa: E402
import op_times  # noqa: E402

PARTS = experiments.parts()
COMMANDS = [(name, title, part, arm) for name, title, part in PARTS if part.kind != "kernels" for arm in part.arms]
GPU, OTHER = "A GPU", "Another"


def bench_tool():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def resolved(flags):
    return script.resolve(script.parse_flags(shlex.split(flags)), script.ANY_MACHINE)[:2]


def is_plain(part, arm):
    """Whether the script itself has the network."""
    return "--script" not in part.flags(arm)


def part_of(name, title):
    return experiments.EXPERIMENTS[name].parts[title]


def speed(name, title, arm, ms, peak=1000, gpu=GPU, tokens=131072):
    return dict(kind="speed", experiment=name, part=title, arm=arm, flags=part_of(name, title).flags(arm), gpu=gpu,
                torch="2", script_sha256="f" * 64, windows_ms=ms, tokens_per_step=tokens, peak_mem_MB=peak)


def loss(name, title, arm, seed, value, seconds=100.0, sharing=0, gpu=GPU, curve=()):
    run = experiments.run_of(name, part_of(name, title), arm)
    curve = [*curve, (run.steps, run.tokens, seconds, value)]
    return dict(run._asdict(), seed=seed, val_loss=value, curve=curve, tokens_per_second=run.tokens / seconds,
                step_avg_ms=1000 * seconds / run.steps, first_step_s=seconds / run.steps, peak_mem_MB=900, gpu=gpu,
                torch="2", script_sha256="f" * 64, wall_s=seconds + 20, sharing=sharing, beside=0)


def verdict_of(claim, rows):
    return claims.judge(next(c for c in claims.load() if c["id"] == claim), rows)


# ----------------------------------------------------------------------------------------------------------------------
# The documents


def test_the_generated_documents_are_those_of_the_data():
    """python docs/experiments.py --write makes them anew."""
    for path, text in claims.documents().items():
        assert path.read_text() == text, path.name
    for folder in experiments.FOLDERS:
        text = (DOCS / folder / "README.md").read_text()
        assert experiments.rewritten(text, experiments.blocks(folder)) == text, folder
    assert {e.folder for e in experiments.EXPERIMENTS.values()} == {*experiments.FOLDERS}


def test_an_analysis_is_there_when_there_is_something_to_analyse():
    for folder, names in experiments.FOLDERS.items():
        text = (DOCS / folder / "README.md").read_text()
        measured = any(experiments.found_by_gpu(name, title)
                       for name in names for title in experiments.EXPERIMENTS[name].parts)
        assert ("Nothing measured yet." in text.split("## Analysis")[1]) == (not measured), folder
        assert all(f"## {section}\n" in text for section in ("Theory", "Method", "Results", "Analysis"))


def test_commands_in_the_documents_parse():
    """Those of bash blocks and of CLAIMS.md's column."""
    folders = [DOCS / folder / "README.md" for folder in experiments.FOLDERS]
    lines = [line for path in [DOCS / "README.md", *folders]
             for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S)
             for line in block.splitlines()]
    lines += set(re.findall(r"`((?:python|torchrun) [^`]*)`", (DOCS / "CLAIMS.md").read_text()))
    assert len(lines) > 80
    known = [claim["id"] for claim in claims.load()]
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        assert (ROOT / name).exists(), line
        if name == "docs/experiments.py":
            experiments.make_parser().parse_args(words)
        elif name == "docs/claims.py":
            assert not set(words) - {"--id", *known}, line
        elif name == "tools/bench.py":
            assert len(bench_tool().read_arguments(words)[1]) == 2
        elif name == "train_gpt2_mod.py":
            assert words[-1] == "--dry_run"
            script.resolve(script.parse_flags(words), script.ANY_MACHINE)
        else:
            assert words == ["--table"], line


def test_the_index_has_every_folder():
    text = (DOCS / "README.md").read_text()
    folders = sorted(path.parent.name for path in DOCS.glob("[0-9]*/README.md"))
    assert [name for name in folders if f"[{name}]({name}/README.md)" not in text] == []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (DOCS / link).exists(), link


def test_what_the_script_does_is_where_it_is_said():
    rows = [line.split("|") for line in (DOCS / "OPTIMIZATIONS.md").read_text().splitlines() if line.startswith("| ")]
    known = {name for _, f in all_fields() for name in (f.name, *f.metadata["aliases"])}
    assert len(rows) > 20
    for _, _, where, flags, _ in rows[1:]:
        for name in re.findall(r"`([^`]+)`", where):
            thing = script
            for attribute in name.split("."):
                thing = getattr(thing, attribute)
        for flag in re.findall(r"`--([^` ]+)", flags):
            assert flag.removeprefix("no_") in known, flag


def test_lines_are_not_too_long():
    for path in (DOCS / "experiments.py", DOCS / "claims.py", DOCS / "op_times.py", DOCS / "claims.json",
                 DOCS / "14-mtp" / "annealed.py"):
        assert max(map(len, path.read_text().splitlines())) <= 120, path.name


# ----------------------------------------------------------------------------------------------------------------------
# The table of experiments


@pytest.fixture(scope="module")
def networks():
    return {(name, title, arm): resolved(experiments.script_flags(part.flags(arm)))
            for name, title, part, arm in COMMANDS}


def test_the_commands_resolve_and_the_arms_differ(networks):
    for name, title, part in PARTS:
        arms = [networks.get((name, title, arm)) for arm in part.arms]
        if part.kind == "kernels":
            assert len({str(each) for each in part.arms.values()}) == len(part.arms)
        elif (name, title) != ("mtp", "loss") and all(is_plain(part, arm) for arm in part.arms):  # or by its program
            assert len({str(each) for each in arms}) == len(arms), (name, title)


@pytest.mark.parametrize("folder, module", [("23-mixture-of-experts", "moe"), ("24-mamba-2", "mamba"),
                                            ("28-linear-recurrences", "recurrences")])
def test_the_commands_of_other_programs_are_their_networks_at_d12s_size(folder, module, monkeypatch):
    """In the same tokens a step as d12 beside them; at equal seconds only the network differs."""
    registered(program(folder, module), monkeypatch)
    presets = set()
    for name in experiments.FOLDERS[folder]:
        for title, part in experiments.EXPERIMENTS[name].parts.items():
            base = resolved(part.flags("d12"))[1]
            for arm in [arm for arm in part.arms if arm != "d12"]:
                typed = f"--script docs/{folder}/{module}.py "
                assert typed in part.flags(arm)
                config, run = resolved(part.flags(arm).replace(typed, ""))
                assert (run.model, run.sequence_length) == (arm, 8192 if title == "T=8192" else 1024)
                same = ("tokens_per_step", "sequence_length", "num_iterations", "minutes", "learning_rate", "shuffle")
                assert all(getattr(run, field) == getattr(base, field) for field in same)
                assert title == "equal tokens" or run.batch_size == base.batch_size
                assert config.n_embd == 768 and ("hyena" not in arm or config.hyena_length == run.sequence_length)
                presets.add(arm)
    assert presets == {name for name in sys.modules[module].PRESETS if "tiny" not in name}


def test_the_tokens_are_those_that_are_said(networks):
    for name, title, part, arm in COMMANDS:
        _, run = networks[name, title, arm]
        tokens = run.num_iterations * run.tokens_per_step
        said = re.search(r"([\d.]+) M tokens", part.about)
        if said and part.kind == "loss" and name != "architecture-or-data":
            assert f"{tokens / 1e6:.1f}" == said[1], (name, title, arm)
            assert run.warmdown_iters == round(0.6 * run.num_iterations) and run.shuffle
        a_step = re.search(r"([\d,]+) tokens a step", part.about)
        if a_step:
            assert run.tokens_per_step == int(a_step[1].replace(",", "")), (name, title, arm)
        if name == "architecture-or-data":
            assert tokens == pytest.approx(float(re.search(r"([\d.]+) x", arm)[1]) * 29.75e6, rel=2e-3)


def test_all_three_switches_are_stacked(networks):
    arms = part_of("stacking", "gpt2").arms
    assert len(arms) == 8 and list(arms)[0] == "none" and list(arms)[-1].count("+") == 2
    for arm in arms:
        network, run = networks["stacking", "gpt2", arm]
        on = [] if arm == "none" else arm.split(" + ")
        found = [network.gradient_checkpointing, network.precision == "bf16", run.attention == "auto"]
        assert [name in on for name in ("checkpointing", "bf16", "fused attention")] == found


def test_equal_parameters_are_equal():
    for title in ("loss", "gpt2-medium"):
        part = part_of("swiglu", title)
        counts = [claims.network(part.flags(arm))[2].parameter_count() for arm in part.arms]
        assert counts[1] == pytest.approx(counts[0], rel=1.5e-3)
    part = part_of("swiglu", "loss at 3")
    counts = {arm: claims.network(part.flags(arm))[2].parameter_count() for arm in part.arms}
    assert counts["SwiGLU, 3"] == counts["GELU, 4.5"] > counts["GELU, 3"]


def test_the_plan_has_every_part(capsys):
    experiments.main(["--plan", "--only", "rmsnorm", "mtp"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].split()[-1] for line in lines[1:]][:1] == ["gpt2-medium"]
    assert len(lines) == 7 and all(float(line.split()[0].replace(",", "")) > 5 for line in lines[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize("expect, low, high, said", [
    (dict(at_least=0.15), 0.16, 0.18, "holds"), (dict(at_least=0.15), 0.1, 0.14, "does not"),
    (dict(at_least=0.15), 0.14, 0.16, "not distinguishable"), (dict(at_most=-0.4), -0.8, -0.7, "holds"),
    (dict(at_most=-0.4), -0.3, -0.2, "does not"), (dict(at_least=0, at_most=1), 1.1, 1.2, "does not"),
    (dict(about=100), 95, 105, "holds"), (dict(about=100), 94, 94, "does not"), (dict(about=-100), -95, -95, "holds"),
    (dict(equals=64), 64, 64, "holds"), (dict(equals=64), 65, 65, "does not"),
    (dict(equals=0.12, within=0.001), 0.1205, 0.1205, "holds"), (dict(at_most=0), None, None, "not distinguishable"),
    (dict(whole=True), 181.02, 181.02, "does not"),
])
def test_a_verdict_is_where_the_interval_lies(expect, low, high, said):
    value = 1.0 if low is None else (low + high) / 2
    assert claims.verdict(expect, claims.Found(value, low, high, "", "")) == said


@pytest.mark.parametrize("compiled, said", [
    ((80, 80, 80), "holds"), ((95, 95, 95), "does not"), ((80, 84, 88), "not distinguishable")])
def test_a_verdict_on_speed(compiled, said):
    """The windows stand in pairs: 100 ms against 84 is 19% faster, where 20% are expected."""
    rows = [speed("torch-compile", "gpt2-medium", "eager", [100, 100, 100]),
            speed("torch-compile", "gpt2-medium", "compiled", compiled)]
    judged = verdict_of("compile", rows)
    assert judged.verdict == said and GPU in judged.source and "docs/22" in judged.source
    assert f"{100 * (100 / compiled[1] - 1):+.1f}%" in judged.words


@pytest.mark.parametrize("losses, said", [
    ((4.00, 4.01, 4.02), "holds"), ((4.20, 4.21, 4.22), "does not"), ((4.03, 4.16, 4.10), "not distinguishable")])
def test_a_verdict_on_losses(losses, said):
    """Of three seeds, against 2% of a loss of 4: SU's "within 1-2%"."""
    rows = [loss("mlp-family", "loss", "d12", seed, 4.0 + 0.01 * seed) for seed in (1, 2, 3)]
    rows += [loss("mlp-family", "loss", "d12_mlp3x", seed, value) for seed, value in zip((1, 2, 3), losses)]
    assert verdict_of("mlp3x-loss", rows).verdict == said


def test_one_seed_decides_nothing_and_nothing_is_not_run():
    rows = [loss("rmsnorm", "loss", "layernorm", 1, 4.0), loss("rmsnorm", "loss", "rmsnorm", 1, 3.0)]
    assert verdict_of("rmsnorm-loss", rows).verdict == "not distinguishable"
    assert verdict_of("rmsnorm-loss", rows[:1]).verdict == verdict_of("rmsnorm-loss", []).verdict == "not run yet"
    assert verdict_of("hours", rows).verdict == "not measurable here"


def test_gpus_are_not_mixed():
    rows = [speed("torch-compile", "gpt2-medium", "eager", [100] * 3),
            speed("torch-compile", "gpt2-medium", "compiled", [50] * 3, gpu=OTHER)]
    assert verdict_of("compile", rows).verdict == "not run yet"


def test_a_record_of_other_flags_does_not_count():
    row = speed("torch-compile", "gpt2-medium", "compiled", [50] * 3)
    rows = [speed("torch-compile", "gpt2-medium", "eager", [100] * 3), dict(row, flags=row["flags"] + " --n_layer 2")]
    assert verdict_of("compile", rows).verdict == "not run yet"


def test_seconds_to_the_bases_loss():
    """A variant that has the base's last loss on its way, one that never has it, and one of a shared GPU."""
    base = loss("gqa", "loss", "d12", 1, 4.0, curve=[(100, 6_553_600, 30.0, 6.0)])
    sooner = loss("gqa", "loss", "GQA 1/4, width x 1.12", 1, 3.0, curve=[(100, 6_553_600, 30.0, 5.0)])
    never = loss("gqa", "loss", "GQA 1/4, width x 1.12", 1, 4.5, curve=[(100, 6_553_600, 30.0, 5.0)])
    judged = verdict_of("gqa-sooner", [base, sooner])
    assert judged.verdict == "holds" and "-35.0%" in judged.words  # 65 s of 100
    assert verdict_of("gqa-sooner", [base, never]).verdict == "does not"
    assert verdict_of("gqa-sooner", [base, dict(sooner, sharing=2)]).verdict == "not run yet"


def test_what_did_not_fit_is_said():
    name, title = "flash-attention", "T=8192"
    rows = [speed(name, title, "flash", [10] * 3),
            {**speed(name, title, "math", []), "failed": "memory", "windows_ms": [], "peak_mem_MB": None}]
    assert "did not fit" in verdict_of("flash-memory", rows).words
    assert "did not fit into memory" in experiments.block(name, rows)


def test_the_product_of_single_effects():
    part = part_of("stacking", "gpt2")
    ms = {arm: [100 / 2 ** len([s for s in arm.split(" + ") if s != "none"])] * 3 for arm in part.arms}
    rows = [speed("stacking", "gpt2", arm, its, peak=1000) for arm, its in ms.items()]
    text = experiments.block("stacking", rows)
    assert "| `checkpointing + bf16 + fused attention` | speed | x 8.000 | x 8.000 | 1.000 |" in text


def test_a_network_that_is_worth_more_text():
    """Losses 5 - log2(x): half a nat less is worth the square root of 2."""
    part = part_of("architecture-or-data", "loss")
    rows = [loss("architecture-or-data", "loss", arm, 1, 5 - math.log2(float(re.search(r"([\d.]+) x", arm)[1])) -
                 0.5 * arm.startswith("modern")) for arm in part.arms]
    assert "after 1.41 x the tokens" in experiments.block("architecture-or-data", rows)


def test_the_counts_by_hand():
    counts = {claim["id"]: claims.judge(claim, []).words for claim in claims.load()}
    assert counts["mlp3x-mlp"] == f"{2 * 832 * 2496:,}" and counts["d12-mlp"] == f"{2 * 768 * 3072:,}"
    assert counts["kv-cache"].startswith(f"{2 * 2 * 12 * 768:,} -> {2 * 2 * 12 * 3 * 64:,}")
    layer = 768 * (768 + 2 * 4 * 64 + 768) + 3 * 768 * 2048 + 2 * 768
    assert counts["calc-layer"] == f"{layer:,}" and counts["sized-current"] == f"{32 * layer + 768 + 32768 * 768:,}"
    assert float(counts["mlp-counts"]) == pytest.approx((262144 / 8) ** 0.5, abs=0.01)


def test_the_claims_are_well_formed():
    every = claims.load()
    assert len({claim["id"] for claim in every}) == len(every) > 100
    for claim in every:
        assert all(document in claims.SHORT_NAMES and place and quote for document, place, quote in claim["said"])
        assert ("expect" in claim) != ("why" in claim) and ("measure" in claim or "why" in claim), claim["id"]
        for measure in claim.get("measure", []):
            if "experiment" in measure:
                arms = part_of(measure["experiment"], measure["part"]).arms
                assert measure["arm"] in arms and measure.get("against", measure["arm"]) in arms, claim["id"]
        older = [measure for measure in claim.get("measure", []) if "folder" in measure]
        assert not older or any(map(claims.older_found, older)), claim["id"]


# ----------------------------------------------------------------------------------------------------------------------
# Running


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A GPU, its file of results, and stand-ins for the two programs: what they were asked is in .asked."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "found.jsonl")
    monkeypatch.setattr(measuring, "gpu_name", lambda: GPU)
    monkeypatch.setattr(measuring, "check_shards", lambda args: None)
    monkeypatch.setattr(experiments, "write", lambda: None)
    asked = []

    def run(command, **how):
        words = list(map(str, command))
        asked.append(words)
        if words[1].endswith("bench.py"):
            lines = words[words.index("--json") + 2 : words.index("--")]
            full = [line for line in lines if "--attention math" in line and "--sequence_length 8192" in line]
            if full:
                return types_done(2, f'error: "{full[0]}": OutOfMemoryError: CUDA out of memory')
            keys = dict(gpu=GPU, torch="2", script_sha256="f" * 64, date="", warmup=1, steps=1, parameters=1, mfu=None,
                        flops_per_token=1, tokens_per_step=1, first_step_s=1.0, windows_ms=[1.0], step_ms=1.0,
                        tokens_per_second=1.0, peak_mem_MB=1, infinite_gradients=0)
            path = Path(words[words.index("--json") + 1])
            path.write_text("".join(json.dumps(dict(keys, flags=line)) + "\n" for line in lines))
            return types_done(0, "")
        rows = [dict(operation=operation, settings=settings, gpu=GPU, torch="2", ms=1.0, windows_ms=[1.0], peak_MiB=1)
                for group in words[2:] for operation, settings in json.loads(group)]
        return types_done(0, "", "".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(experiments.subprocess, "run", run)
    monkeypatch.setattr(experiments.subprocess, "Popen", process(run))
    return asked


def types_done(code, stderr, stdout=""):
    return experiments.subprocess.CompletedProcess([], code, stdout, stderr)


def process(run):
    """subprocess.Popen of a program that run(command) stands in for."""
    class Process(contextlib.nullcontext):
        def __init__(self, command, stdout, stderr, text):
            super().__init__(self)
            done = run(command)
            self.stdout = io.StringIO(done.stdout)
            stderr.write(done.stderr)

        def wait(self):
            pass

    return Process


def test_nothing_is_measured_twice(bench, capsys):
    assert experiments.main(["--only", "rmsnorm", "--kind", "speed", "kernels"]) == 0
    assert [words[1].rpartition("/")[2] for words in bench] == ["bench.py", "op_times.py"]
    assert len(bench[1]) == 4  # both groups of operations in one process
    rows = measuring.read(experiments.RESULTS)
    assert [row["arm"] for row in rows] == ["layernorm", "rmsnorm"] * 3
    assert experiments.main(["--only", "rmsnorm", "--kind", "speed", "kernels"]) == 0 and len(bench) == 2
    assert "not run yet" not in experiments.block("rmsnorm").lower().split("**loss**")[0]


def test_an_arm_without_room_is_recorded_and_the_others_are_measured(bench, capsys):
    assert experiments.main(["--only", "flash-attention", "--kind", "speed"]) == 0
    rows = [r for r in measuring.read(experiments.RESULTS) if r["part"] == "T=8192"]
    assert [(row["arm"], "failed" in row) for row in rows] == [("math", True), ("flash", False)]
    first = [(r["part"], r["arm"]) for r in measuring.read(experiments.RESULTS)]
    assert first[-4:] == [("T=4096", "math"), ("T=4096", "flash"), ("T=8192", "math"), ("T=8192", "flash")]
    tries = [(len(words[words.index("--json") + 2 : -1]), " ".join(words).count("--builds 1")) for words in bench]
    assert tries == [(8, 0), (4, 0), (2, 0), (2, 0), (2, 1), (1, 1)]  # with T=4096, then alone, before it is given up
    assert experiments.main(["--only", "flash-attention", "--kind", "speed"]) == 0 and len(bench) == 6


def test_parts_share_a_call_and_equal_lines_a_process(bench, capsys):
    names = ["rmsnorm", "rope-embeddings", "swiglu", "gradient-accumulation"]
    assert experiments.main(["--only", *names, "--kind", "speed"]) == 0 and len(bench) == 1
    assert len(bench[0][bench[0].index("--json") + 2 : -1]) == 4 + 3  # one base for three of the parts
    rows = measuring.read(experiments.RESULTS)
    assert [row["arm"] for row in rows][:6] == ["layernorm", "rmsnorm", "learned", "rope", "GELU, 4", "SwiGLU, 8/3"]
    assert all(row["flags"] == part_of(row["experiment"], row["part"]).flags(row["arm"]) for row in rows)
    every = experiments.together([place for place in PARTS if place[2].kind == "speed"])
    assert sorted(place[:2] for group in every for place in group) == sorted(
        place[:2] for place in PARTS if place[2].kind == "speed")
    for group in every:
        lines = {experiments.line_of(part, arm) for *_, part in group for arm in part.arms}
        assert len({part.settings for *_, part in group}) == 1 and (len(lines) <= experiments.TOGETHER)
        alone = sum(sum(experiments.group_seconds([place])) for place in group)
        assert len(group) == 1 or sum(experiments.group_seconds(group)) < alone - experiments.STARTING / 2


def test_a_line_that_fails_is_tried_again_alone_and_the_others_stay_together(bench, monkeypatch, capsys):
    whole, calls = experiments.bench, []

    def failing(lines, how):
        calls.append(len(lines))
        bad = [line for line in lines if "--use_rope" in line]
        if bad:
            raise RuntimeError(f'error: "{bad[0]}": RuntimeError: broken')
        return whole(lines, how)

    monkeypatch.setattr(experiments, "bench", failing)
    names = ["rmsnorm", "rope-embeddings", "swiglu", "gradient-accumulation"]
    assert experiments.main(["--only", *names, "--kind", "speed"]) == 1
    assert calls == [4 + 3, 3 + 3, 2]
    assert {row["experiment"] for row in measuring.read(experiments.RESULTS)} == {*names} - {"rope-embeddings"}
    assert "failed: rope-embeddings: gpt2-medium: RuntimeError: error: " in capsys.readouterr().out


def test_another_failure_is_said_and_the_next_part_goes_on(bench, monkeypatch, capsys):
    whole = experiments.bench
    monkeypatch.setattr(experiments, "bench", lambda lines, how: 1 / 0 if "medium" in " ".join(lines) else
                        whole(lines, how))
    assert experiments.main(["--only", "torch-compile", "--kind", "speed"]) == 1
    assert "failed: torch-compile: gpt2-medium: ZeroDivisionError" in capsys.readouterr().out
    assert {row["part"] for row in measuring.read(experiments.RESULTS)} == {"d12", "CUDA graphs", "first steps"}


def test_the_budget_begins_nothing_that_would_not_end_in_it(bench, capsys):
    assert experiments.main(["--only", "torch-compile", "--kind", "speed", "--budget_s", "50"]) == 0
    assert {row["part"] for row in measuring.read(experiments.RESULTS)} == {"first steps"}
    assert "no time left for torch-compile: gpt2-medium" in capsys.readouterr().out


def test_runs_of_the_same_flags_are_one_run_and_the_annealed_one_has_its_program(bench, monkeypatch, capsys):
    asked = []

    def measure(run, seed, *others, program, **how):
        asked.append((run, seed, program.name))
        return dict(run._asdict(), seed=seed, val_loss=4.0, curve=[(run.steps, run.tokens, 9.0, 4.0)], wall_s=10.0,
                    tokens_per_second=1.0, step_avg_ms=1.0, peak_mem_MB=1, first_step_s=1.0, sharing=0, beside=0,
                    script_sha256="f" * 64)

    monkeypatch.setattr(measuring, "measure", measure)
    names = ["rmsnorm", "rope-embeddings", "mtp"]
    assert experiments.main(["--only", *names, "--kind", "loss", "--seeds", "2"]) == 0
    assert len(asked) == 2 * (2 + 1 + 10)  # the base of the first two is one
    programs = {(run.name, program) for run, _, program in asked if program != "train_gpt2_mod.py"}
    assert programs == {("k=2,_annealed", "annealed.py")}
    assert experiments.main(["--only", *names, "--kind", "loss", "--seeds", "2"]) == 0 and len(asked) == 26
    assert all("not run yet" not in experiments.block(name).split("**loss**")[1] for name in names)


def answer(rows, code=0, stderr=""):
    return process(lambda command: types_done(code, stderr, "".join(json.dumps(row) + "\n" for row in rows)))


def test_an_operation_that_fails_costs_the_others_nothing(bench, monkeypatch, capsys):
    """Of four operations in two groups one has no room and one another fault; and a process that dies between them."""
    every = [(operation, settings) for title in ("alone", "alone, eager")
             for operation, settings in part_of("rmsnorm", title).arms.values()]
    good = dict(gpu=GPU, torch="2", ms=1.0, windows_ms=[1.0], peak_MiB=1)
    rows = [dict(good, operation=operation, settings=settings) for operation, settings in every]
    rows[1] = dict(operation=every[1][0], settings=every[1][1], gpu=GPU, torch="2", failed="no room")
    rows[2] = dict(operation=every[2][0], settings=every[2][1], gpu=GPU, torch="2", error="RuntimeError: broken")
    monkeypatch.setattr(experiments.subprocess, "Popen", answer(rows))
    assert experiments.main(["--only", "rmsnorm", "--kind", "kernels"]) == 1
    found = [(r["part"], r["arm"], r.get("failed")) for r in measuring.read(experiments.RESULTS)]
    assert found == [("alone", "layernorm", None), ("alone", "rmsnorm", "no room"), ("alone, eager", "rmsnorm", None)]
    assert "failed: rmsnorm: alone, eager: RuntimeError: broken" in capsys.readouterr().out
    monkeypatch.setattr(experiments.subprocess, "Popen", answer([], 1, "Traceback\nkilled"))
    assert experiments.main(["--only", "rmsnorm", "--kind", "kernels"]) == 1
    assert "failed: rmsnorm: alone, eager: killed" in capsys.readouterr().out
    monkeypatch.setattr(experiments.subprocess, "Popen", answer(rows[:2], 1, "dead"))
    experiments.RESULTS.unlink()
    assert experiments.main(["--only", "rmsnorm", "--kind", "kernels"]) == 1
    assert {r["part"] for r in measuring.read(experiments.RESULTS)} == {"alone"}


STAND_IN = '''
import json, os, pathlib, sys, time
here, done = pathlib.Path(__file__).parent, 0
for group in map(json.loads, sys.argv[1:]):
    for operation, settings in group:
        what, _, after = (here / "then").read_text().partition(" after ")
        if after and done >= int(after):
            while what == "wait" and not any(kept.stat().st_size for kept in here.glob("found.jsonl")):
                time.sleep(0.01)  # until the groups before this one are kept
            (here / "pid").write_text(str(os.getpid()))
            (here / "then").write_text("")
            print('{"operation": "cut sh', end="", flush=True)
            print("Traceback\\nCUDA error", file=sys.stderr)
            os._exit(1) if what == "die" else time.sleep(100)
        row = dict(operation=operation, settings=settings, gpu="A GPU", torch="2", ms=1.0, windows_ms=[1.0], peak_MiB=1)
        print(json.dumps(row), flush=True)
        done += 1
'''


@pytest.fixture
def operations(monkeypatch, tmp_path):
    """A process in the place of op_times.py's, which may be told what to do after so many of its lines."""
    (tmp_path / "op_times.py").write_text(STAND_IN)
    for name, value in (("HERE", tmp_path), ("RESULTS", tmp_path / "found.jsonl"), ("write", lambda: None)):
        monkeypatch.setattr(experiments, name, value)
    monkeypatch.setattr(measuring, "gpu_name", lambda: GPU)

    def measured(then=""):
        (tmp_path / "then").write_text(then)
        code = experiments.main(["--only", "flash-attention", "--kind", "kernels"])
        return code, [row["part"] for row in measuring.read(experiments.RESULTS)]

    return measured


@contextlib.contextmanager
def interrupted_when_there(path, number):
    """This process has a signal as soon as there is that file."""
    def interrupt():
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers may ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_loses_no_group_of_operations(operations, tmp_path, capsys, number):
    """In the second of six groups; the process is ended too, and the next call measures the other five."""
    with pytest.raises(SystemExit, match="^130$"), interrupted_when_there(tmp_path / "pid", number):
        measuring.run(lambda: operations("wait after 3"), experiments.RESULTS)
    assert capsys.readouterr().err.endswith("interrupted: found.jsonl holds what was measured before\n")
    assert [row["part"] for row in measuring.read(experiments.RESULTS)] == ["alone, T=256"] * 2
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    rest = [f"alone, T={T}" for T in (512, 1024, 2048, 4096, 8192) for _ in range(2)]
    assert operations() == (0, ["alone, T=256"] * 2 + rest)


def test_a_document_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    measuring.write(path, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", ended_here)
        measuring.write(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("README.md", "old")]
    measuring.write(path, "new")
    assert path.read_text() == "new"


def ended_here(*_):
    raise KeyboardInterrupt


def test_a_run_that_is_interrupted_may_end_in_good_order(tmp_path):
    """As the script does, which saves."""
    program = ("import pathlib, signal, sys, time; here = pathlib.Path(sys.argv[1])\n"
               "def end(*_):\n    time.sleep(0.5)\n    (here / 'saved').touch()\n    sys.exit(75)\n"
               "signal.signal(signal.SIGTERM, end); (here / 'there').touch(); time.sleep(100)")
    with pytest.raises(KeyboardInterrupt), interrupted_when_there(tmp_path / "there", signal.SIGINT):
        measuring.ended([sys.executable, "-c", program, tmp_path])
    assert (tmp_path / "saved").exists()
    assert measuring.ended([sys.executable, "-c", "print(1); import sys; sys.exit('no')"]) == (1, "1\n", "no\n")


def test_runs_side_by_side_end_in_good_order_too(monkeypatch, tmp_path):
    """The signal comes to the main thread, and threads of their own wait for the runs."""
    (tmp_path / "script.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "here, own = pathlib.Path(__file__).parent, os.environ['CUDA_VISIBLE_DEVICES']\n"
        "def end(*_):\n    (here / f'saved{own}').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end); (here / f'there{own}').touch()\n"
        "while not (here / 'there0').exists():\n    time.sleep(0.01)\n"
        "(here / 'there').touch() if own == '1' else None; time.sleep(100)")
    monkeypatch.setattr(measuring, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(measuring, "gpu_name", lambda: GPU)
    tasks, begun = [(measuring.Run("loss", name, ""), 1) for name in "abc"], time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted_when_there(tmp_path / "there", signal.SIGINT):
        measuring.run_all(tasks, tmp_path / "found.jsonl", ["0", "1"], math.inf, [], lambda *run: 0)
    assert all((tmp_path / f"saved{device}").exists() for device in "01") and time.monotonic() - begun < 60
    assert not (tmp_path / "found.jsonl").exists() and not measuring.under_way


def test_a_process_that_dies_costs_one_group_of_operations(operations, capsys):
    code, found = operations("die after 2")
    assert code == 1 and found == [f"alone, T={T}" for T in (256, 1024, 2048, 4096, 8192) for _ in range(2)]
    assert "failed: flash-attention: alone, T=512: CUDA error\n" in capsys.readouterr().out
    assert operations()[1][-2:] == ["alone, T=512"] * 2


def test_the_budget_takes_as_many_operations_as_end_in_it(bench, capsys):
    """One start, and 6 s for each group's two."""
    seconds = measuring.MARGIN * (experiments.STARTING + 3 * 6) + 1
    assert experiments.main(["--only", "flash-attention", "--kind", "kernels", "--budget_s", str(seconds)]) == 0
    assert len(bench) == 1 and len(bench[0]) == 2 + 3
    assert capsys.readouterr().out.count("no time left for flash-attention: alone") == 3


def test_d12_is_trained_once_for_all_networks_of_other_programs(bench, monkeypatch, capsys):
    asked = []

    def measure(run, seed, data, device, beside, sharing, program):
        typed = experiments.last_of(run.flags)
        asked.append((typed["model"], "minutes" in typed, program.name, sharing))
        return dict(run._asdict(), seed=seed, val_loss=4.0, curve=[(305, 305 * 65536, 9.0, 4.0)], wall_s=10.0,
                    tokens_per_second=1.0, step_avg_ms=1.0, peak_mem_MB=1, first_step_s=1.0, sharing=sharing, beside=0,
                    script_sha256="f" * 64)

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    names = ["mixture-of-experts", "mamba-2", "linear-recurrences"]
    words = ["--only", *names, "--kind", "loss", "seconds", "--seeds", "1", "--parallel", "2"]
    assert experiments.main(words) == 0
    mixers = ["d12_moe", "d12_mamba2", "d12_retnet", "d12_delta", "d12_rwkv7", "d12_hyena"]
    assert [row for row in asked if row[1]] == [  # alone on the GPU
        ("d12", True, "train_gpt2_mod.py", 0), *((name, True, "experiments.py", 0) for name in mixers)]
    assert sorted(row[0] for row in asked if not row[1]) == sorted(["d12", *mixers])
    assert {row[3] for row in asked if not row[1]} == {1}
    assert experiments.main(words) == 0 and len(asked) == 14
    for name in names:
        text = experiments.block(name).split("**equal tokens**")[1]
        assert "Not run yet" not in text and "+0.0000" in text
    rows = measuring.read(experiments.RESULTS)
    assert all("docs/24" in claims.find(measure, rows).source for measure in claims.MAMBA)


def test_another_programs_run_is_started_as_that_program():
    """Which says that it is, by the networks that it knows."""
    words = [sys.executable, "docs/experiments.py", "--script", "docs/23-mixture-of-experts/moe.py"]
    done = subprocess.run([*words, "--model", "tiny_moe", "--dry_run"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "idle" in done.stdout, done.stderr


def test_a_plan_that_nobody_reads_on_ends_without_a_word():
    command = f"{sys.executable} docs/experiments.py --plan --only flash-attention --kind kernels | head -0"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "")


def test_without_a_gpu_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "none.jsonl")
    monkeypatch.setattr(experiments, "write", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        experiments.main(["--only", "gqa"])
    assert not experiments.RESULTS.exists()


@pytest.mark.parametrize("program", [*sorted(DOCS.glob("*/measure.py")), DOCS / "claims.py", DOCS / "experiments.py"],
                         ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_flag_that_there_is_not_is_one_line(program):
    done = subprocess.run([sys.executable, program, "--tabel"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == (
        f"error: unrecognized arguments: --tabel; {program.name} --help lists the flags\n")


WHOLE, CUT = '{"gpu": "A GPU", "kind": "loss"}\n', '{"gpu": "A GPU", "ki'


@pytest.mark.parametrize("words, said", [
    ("ONE --seeds 0", "seeds=0 must be at least 1"), ("--plan --seeds -1", "seeds=-1 must be at least 1"),
    ("ONE --parallel 0", "parallel=0 must be at least 1"), ("ONE --budget_s -5", "budget_s=-5 must be at least 0"),
    ("ONE --budget_s nan", "budget_s=nan must be at least 0"), ("--tabel", "unrecognized arguments: --tabel; "),
    ("--only gqaa", "argument --only: invalid choice: 'gqaa'"), ("--seeds x", "argument --seeds: invalid int value"),
    ("ONE --input_bin nothing*", "--input_bin: no file matches 'nothing*'"),
    ("ONE --input_bin SHARD --input_val_bin nothing*", "--input_val_bin: no file matches 'nothing*'"),
    ("--script", "--script takes the program of an experiment"),
    ("--script README.md --model d12", "--script takes the program of an experiment"),
    *((words + " CUT", "found.jsonl has no whole record in line 2; delete that line") for words in (
        "--table", "--plan", "--kind kernels --only rmsnorm", "ONE --input_bin SHARD --input_val_bin SHARD")),
])
def test_what_cannot_be_is_one_line_and_loses_nothing(monkeypatch, tmp_path, capsys, words, said):
    """Where there is a GPU."""
    monkeypatch.setattr(experiments, "write", lambda: None)
    monkeypatch.setattr(measuring, "gpu_name", lambda: GPU)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "found.jsonl")
    content = WHOLE + CUT * words.endswith(" CUT")
    experiments.RESULTS.write_text(content)
    shard = write_shard(tmp_path / "shard.bin", [1] * 300)
    words = words.removesuffix(" CUT").replace("SHARD", str(shard)).replace("ONE", "--only rmsnorm --kind loss").split()
    with pytest.raises(SystemExit) as end:
        measuring.run(lambda: experiments.main(words), experiments.RESULTS)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert experiments.RESULTS.read_text() == content


def test_a_file_of_results_that_cannot_be_written_is_found_before_anything_is_measured(bench, monkeypatch, capsys):
    for path in ("/proc/found.jsonl", "/proc"):
        monkeypatch.setattr(experiments, "RESULTS", Path(path))
        with pytest.raises(SystemExit) as end:
            measuring.run(lambda: experiments.main(["--only", "rmsnorm", "--kind", "kernels"]), experiments.RESULTS)
        said = f"error: {path} cannot be written (/proc is not writable here); see to its permissions\n"
        assert end.value.code == 2 and capsys.readouterr().err == said
    assert not bench


def test_a_record_begins_on_a_line_of_its_own(tmp_path):
    """Whatever an editor has left of the line before."""
    path = tmp_path / "found.jsonl"
    for i in range(2):
        measuring.append(path, dict(a=i), dict(b=i))
    assert path.read_text() == '{"a": 0}\n{"b": 0}\n{"a": 1}\n{"b": 1}\n'
    path.write_text('{"a": 0}')
    measuring.append(path, dict(b=1))
    assert measuring.read(path) == [dict(a=0), dict(b=1)]


def test_a_record_is_of_the_program_that_has_its_network(bench, monkeypatch, tmp_path):
    """Its hash tells a changed one; those of the script's own networks are of the script alone, as they were."""
    names = ["train_gpt2_mod.py", "fused_softmax.py", "docs/23-mixture-of-experts/moe.py", "docs/extending.py"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(i))
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    plain, own = (hashlib.sha256(text).hexdigest() for text in (b"01", b"0123"))
    monkeypatch.setattr(measuring, "ended", lambda command, env: (0, "", ""))
    monkeypatch.setattr(measuring, "newest", lambda logs: tmp_path / names[0])
    monkeypatch.setattr(measuring, "figures", lambda records: {})

    def hash_of(name, title, arm, program=measuring.SCRIPT):
        run = experiments.run_of(name, part_of(name, title), arm)
        return measuring.measure(run, 1, [], None, 0, 0, program=program)["script_sha256"]

    name, title, runner = "mixture-of-experts", "equal tokens", experiments.OWN_PROGRAMS["script"]
    assert (hash_of(name, title, "d12"), hash_of(name, title, "d12_moe", runner)) == (plain, own)
    assert hash_of("mtp", "loss", "k=2, annealed", tmp_path / names[2]) == hashlib.sha256(b"012").hexdigest()
    assert experiments.main(["--only", name, "--kind", "speed"]) == 0
    found = {(row["arm"], row["script_sha256"]) for row in measuring.read(experiments.RESULTS)}
    assert found == {("d12", "f" * 64), ("d12_moe", own)}


def test_the_bench_takes_the_command_lines(monkeypatch):
    """Each arm is a command line of tools/bench.py, under the name that is looked for when it does not fit."""
    tool = bench_tool()
    monkeypatch.setattr(measuring, "gpu_name", lambda: GPU)

    def run(command, **how):
        words = list(map(str, command[2:]))
        place = words.index("--json")  # whose folder is gone when the flags are looked at
        commands.append(words[:place] + words[place + 2 :])
        return types_done(1, "enough")

    monkeypatch.setattr(experiments.subprocess, "run", run)
    for name, title, part in PARTS:
        commands = []
        if part.kind == "speed":
            with pytest.raises(RuntimeError, match="enough"):
                experiments.speed_records(part)
            args, lines = tool.read_arguments(commands[0])
            assert [text for text, *_ in lines] == [experiments.line_of(part, arm) for arm in part.arms], title
            flags = [experiments.last_of(shlex.join(flags)) for *_, flags in lines]
            wanted = [experiments.last_of(f"{part.flags(arm)} --seed 1") for arm in part.arms]
            paths = [ROOT / its.pop("script", "train_gpt2_mod.py") for its in wanted]
            assert flags == wanted and [path for _, path, _ in lines] == paths
            assert args.warmup >= 1 and args.builds == int(experiments.last_of(part.settings).get("builds", 2))


def test_the_annealed_weight(monkeypatch):
    spec = importlib.util.spec_from_file_location("annealed", DOCS / "14-mtp" / "annealed.py")
    annealed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(annealed)
    config, run = resolved("--model mini --mtp_enabled --mtp_rampup_steps 10 --num_iterations 100")
    plan = annealed.annealed(script.plan, 0.5)
    weights = [plan(step, config, run).mtp_weight for step in (0, 5, 25, 50, 99)]
    assert weights == pytest.approx([0, 0.05 * 0.9, 0.05, 0, 0])
    assert plan(7, config, run)._replace(mtp_weight=0) == script.plan(7, config, run)._replace(mtp_weight=0)
    asked = []
    monkeypatch.setattr(script, "plan", script.plan)
    monkeypatch.setattr(script, "main", lambda argv: asked.append(argv) or 0)
    assert annealed.main(["--mtp_anneal", "0.5", "--model", "mini"]) == 0 and asked == [["--model", "mini"]]
    assert script.plan(50, config, run).mtp_weight == 0
    with pytest.raises(SystemExit):
        annealed.main(["--mtp_anneal", "0"])


# ----------------------------------------------------------------------------------------------------------------------
# Operations alone


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_the_timed_norm_is_the_norm(kind):
    """The gradient of x by the definition."""
    torch.manual_seed(0)
    found = op_times.norm(kind, "float32", compiled=False, device="cpu", tokens=3)()
    torch.manual_seed(0)
    x = torch.randn(3, op_times.WIDTH, requires_grad=True)
    dy = torch.randn_like(x)
    centred = x - x.mean(-1, keepdim=True) * (kind == "layernorm")
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found[0], torch.autograd.grad(y, x, dy)[0], rtol=1e-4, atol=1e-5)
    assert len(found) == (3 if kind == "layernorm" else 2)


def test_groups_are_timed_one_after_the_other_and_a_fault_is_its_own(monkeypatch, capsys):
    """On a CPU, with a clock that says how often each operation was called."""
    calls = []

    def operation(name):
        def call():
            calls.append(name)
            if name == "worse" and calls.count("worse") == 4:
                raise ValueError("not in its windows")
        if name == "full":
            raise torch.OutOfMemoryError("no room\nat all")
        return call

    monkeypatch.setattr(op_times, "OPERATIONS", dict(operation=operation))
    monkeypatch.setattr(op_times, "window", lambda call: call() or float(len(calls)))
    monkeypatch.setattr(op_times, "peak_of", lambda call: 5.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    op_times.main([[["operation", dict(name=name)] for name in group]
                   for group in (["one", "full", "two"], ["worse", "three"], ["four"])])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["settings"]["name"] for row in rows] == ["one", "full", "two", "worse", "three", "four"]
    assert calls[:6] == ["one"] * 3 + ["two"] * 3 and calls[6:10] == ["one", "two"] * 2  # they take turns
    one, full, two, worse, three, _ = rows
    assert one["windows_ms"] == [7.0, 9.0, 11.0, 13.0, 15.0] and (one["ms"], two["ms"], one["peak_MiB"]) == (11, 12, 5)
    assert full["failed"] == "OutOfMemoryError: no room" and "windows_ms" not in full
    assert worse["error"] == "ValueError: not in its windows" and "failed" not in worse
    assert len(three["windows_ms"]) == 5


def test_the_timed_attention_is_causal_attention():
    torch.manual_seed(0)
    found = op_times.attention("math", T=8, device="cpu", tokens=16)()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, op_times.HEADS, 8, op_times.SIZE, requires_grad=True) for _ in range(3))
    dy = torch.randn_like(q)
    scores = (q @ k.transpose(-1, -2) / op_times.SIZE**0.5).masked_fill(~torch.ones(8, 8).tril().bool(), -math.inf)
    expected = torch.autograd.grad(F.softmax(scores, -1) @ v, (q, k, v), dy)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
