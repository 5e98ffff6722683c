"""docs/experiments.py and docs/claims.py: the generated documents are those of the data, every command in them
resolves, made-up records get the verdicts that they should, and what is run, with stand-ins for the programs."""
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_gpt2_mod as script
from helpers import all_fields

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


def resolved(flags):
    return script.resolve(script.parse_flags(shlex.split(flags)), script.ANY_MACHINE)[:2]


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
    for name, experiment in experiments.EXPERIMENTS.items():
        text = (DOCS / experiment.folder / "README.md").read_text()
        assert experiments.rewritten(text, experiments.block(name)) == text, name


def test_an_analysis_is_there_when_there_is_something_to_analyse():
    for name, experiment in experiments.EXPERIMENTS.items():
        text = (DOCS / experiment.folder / "README.md").read_text()
        measured = any(experiments.found_by_gpu(name, title) for title in experiment.parts)
        assert ("Nothing measured yet." in text.split("## Analysis")[1]) == (not measured), name
        assert all(f"## {section}\n" in text for section in ("Theory", "Method", "Results", "Analysis"))


def test_commands_in_the_documents_parse():
    """Those of bash blocks and of CLAIMS.md's column."""
    folders = [DOCS / experiment.folder / "README.md" for experiment in experiments.EXPERIMENTS.values()]
    lines = [line for path in [DOCS / "README.md", *folders]
             for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S)
             for line in block.splitlines()]
    lines += set(re.findall(r"`((?:python|torchrun) [^`]*)`", (DOCS / "CLAIMS.md").read_text()))
    assert len(lines) > 80
    known = [claim["id"] for claim in claims.load()]
    for line in lines:
        _, program, *words = shlex.split(line, comments=True)
        assert (ROOT / program).exists(), line
        if program == "docs/experiments.py":
            experiments.make_parser().parse_args(words)
        elif program == "docs/claims.py":
            assert not set(words) - {"--id", *known}, line
        elif program == "train_gpt2_mod.py":
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
        elif (name, title) != ("mtp", "loss"):  # where one differs by its program
            assert len({str(each) for each in arms}) == len(arms), (name, title)


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
    monkeypatch.setattr(experiments, "write", lambda: None)
    asked = []

    def run(command, **how):
        words = list(map(str, command))
        asked.append(words)
        if words[1].endswith("bench.py"):
            lines = [word for word in words[:words.index("--")] if word.startswith("--seed 1 ")]
            full = [line for line in lines if "--attention math" in line and "--sequence_length 8192" in " ".join(words)]
            if full:
                shown = " ".join(shlex.split(full[0]) + words[words.index("--") + 1 :])
                return types_done(2, f'error: "{shown}": OutOfMemoryError: CUDA out of memory')
            keys = dict(gpu=GPU, torch="2", script_sha256="f" * 64, date="", warmup=1, steps=1, parameters=1, mfu=None,
                        flops_per_token=1, tokens_per_step=1, first_step_s=1.0, windows_ms=[1.0], step_ms=1.0,
                        tokens_per_second=1.0, peak_mem_MB=1, infinite_gradients=0)
            path = Path(words[words.index("--json") + 1])
            path.write_text("".join(json.dumps(dict(keys, flags=line)) + "\n" for line in lines))
            return types_done(0, "")
        rows = [dict(operation=operation, settings=settings, gpu=GPU, torch="2", ms=1.0, windows_ms=[1.0], peak_MiB=1)
                for operation, settings in json.loads(words[2])]
        return types_done(0, "", "\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(experiments.subprocess, "run", run)
    return asked


def types_done(code, stderr, stdout=""):
    return experiments.subprocess.CompletedProcess([], code, stdout, stderr)


def test_nothing_is_measured_twice(bench, capsys):
    assert experiments.main(["--only", "rmsnorm", "--kind", "speed", "kernels"]) == 0
    assert [words[1].rpartition("/")[2] for words in bench] == ["bench.py", "op_times.py", "op_times.py"]
    assert all(len(word.split()) > 1 for word in bench[0][:bench[0].index("--")] if word.startswith("--seed"))
    rows = measuring.read(experiments.RESULTS)
    assert [row["arm"] for row in rows] == ["layernorm", "rmsnorm"] * 3
    assert experiments.main(["--only", "rmsnorm", "--kind", "speed", "kernels"]) == 0 and len(bench) == 3
    assert "not run yet" not in experiments.block("rmsnorm").lower().split("**loss**")[0]


def test_an_arm_without_room_is_recorded_and_the_others_are_measured(bench, capsys):
    assert experiments.main(["--only", "flash-attention", "--kind", "speed"]) == 0
    rows = [r for r in measuring.read(experiments.RESULTS) if r["part"] == "T=8192"]
    assert [(row["arm"], "failed" in row) for row in rows] == [("flash", False), ("math", True)]
    assert experiments.main(["--only", "flash-attention", "--kind", "speed"]) == 0 and len(bench) == 8
    assert "--builds 1" in " ".join(bench[6])  # before it is given up


def test_another_failure_is_said_and_the_next_part_goes_on(bench, monkeypatch, capsys):
    whole = experiments.bench
    monkeypatch.setattr(experiments, "bench", lambda part, *how: whole(part, *how) if "d12" in part.common else 1 / 0)
    assert experiments.main(["--only", "torch-compile", "--kind", "speed"]) == 1
    assert "failed: torch-compile: gpt2-medium: ZeroDivisionError" in capsys.readouterr().out
    assert {row["part"] for row in measuring.read(experiments.RESULTS)} == {"d12", "first steps"}


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


def test_without_a_gpu_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "none.jsonl")
    monkeypatch.setattr(experiments, "write", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: no CUDA device"):
        experiments.main(["--only", "gqa"])


def test_the_bench_takes_the_command_lines(monkeypatch):
    """Each arm is a command line of tools/bench.py, under the name that is looked for when it does not fit."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

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
                experiments.bench(part, list(part.arms))
            args, lines = tool.read_arguments(commands[0])
            assert [text for text, *_ in lines] == [experiments.text_of(part, arm) for arm in part.arms], title
            asked = [resolved(shlex.join(flags)) for *_, flags in lines]
            assert asked == [resolved(f"{part.flags(arm)} --seed 1") for arm in part.arms]
            assert args.warmup >= 1 and args.builds == (1 if "builds 1" in part.settings else 2)


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
