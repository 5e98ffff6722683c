#!/usr/bin/env python3
"""Judge what the owner's documents expect by what was measured, and write CLAIMS.md and the tables that quote it.

    python docs/claims.py            # CLAIMS.md, README.md's and QUICK_IMPLEMENTATION.md's tables
    python docs/claims.py --id kv-cache compile

claims.json has each expectation: where it is said and in which words, what would hold it, and where its measurement is:
an arm of docs/experiments.py, records of an older experiment, or a count that is made at once. The first of them that
has a value decides. No verdict is typed; the rules are verdict().
"""
import json
import math
import statistics
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import experiments  # noqa: E402
import measuring  # noqa: E402
from experiments import NOT_RUN, percent, rewritten  # noqa: E402
from measuring import last_of, table  # noqa: E402

CLAIMS, DOCUMENT = HERE / "claims.json", HERE / "CLAIMS.md"
HOLDS, DOES_NOT, UNDECIDED, NOWHERE = "holds", "does not", "not distinguishable", "not measurable here"
ABOUT = 0.05  # of a figure that is given as about
SHORT_NAMES = {
    "changelog_mtp_gqa_precision.md": "changelog", "experiments_and_optimizations.md": "experiments",
    "mlp3x_implementation_summary.md": "MLP summary", "mlp3x_usage_example.md": "MLP usage",
    "model_size_configurations.md": "model sizes",
}
NOT_COMPARED = {"input_bin", "input_val_bin", "sequence_length", "total_batch_size", "num_iterations", "seed",
                "val_tokens"}  # of older records' flags: their experiment's name says the rest


class Found(NamedTuple):
    """A value, the least and the most that it may be, None where nothing says; in words; what it was measured on."""

    value: float
    low: float | None
    high: float | None
    words: str
    source: str


# ----------------------------------------------------------------------------------------------------------------------
# Counts, made on the meta device


@lru_cache(maxsize=None)
def network(flags):
    """(GPTConfig, TrainConfig, model) of a command line."""
    import torch

    import train_gpt2_mod as script

    class Uninitialised(script.GPT):  # which takes most of the time
        def start_weights(self):
            pass

    config, run, _ = script.resolve(script.parse_flags(flags.split()), script.ANY_MACHINE)
    with torch.device("meta"):
        return config, run, Uninitialised(config)


def by_part(model):
    import train_gpt2_mod as script

    return script.parameters_by_part(model)


def kv_cache_bytes(config, run, model):
    """Of a token, in bf16: keys and values of all layers; of latent attention what they are made from."""
    numbers = (config.kv_rank + config.rope_head_dim if config.mixer == "latent"
               else 2 * config.n_kv_head * config.head_dim)
    return 2 * config.n_layer * numbers


COUNTS = dict(
    parameters=lambda config, run, model: model.parameter_count(),
    embedding=lambda config, run, model: by_part(model)["embedding"],
    non_embedding=lambda config, run, model: model.parameter_count() - by_part(model)["embedding"],
    block_parameters=lambda config, run, model: sum(p.numel() for p in model.transformer.h[0].parameters()),
    mlp_parameters=lambda config, run, model: sum(p.numel() for p in model.transformer.h[0].mlp.parameters()),
    mlp_flops=lambda config, run, model: model.flops_by_part(run.sequence_length)["mlp"],
    mlp_share=lambda config, run, model: (model.flops_by_part(run.sequence_length)["mlp"]
                                          / model.flops_per_token(run.sequence_length)),
    n_embd=lambda config, run, model: config.n_embd,
    n_kv_head=lambda config, run, model: config.n_kv_head,
    head_dim=lambda config, run, model: config.head_dim,
    ffn_hidden=lambda config, run, model: config.ffn_hidden,
    tokens_per_step=lambda config, run, model: run.tokens_per_step,
    kv_cache_bytes=kv_cache_bytes,
)


def counted(measure):
    """The Found of a count, or of its change against another network's."""
    what = measure["count"]
    if what == "mlp_width":  # C of two matrices of C x factor C
        value = math.sqrt(measure["parameters"] / 2 / measure["factor"])
        return Found(value, value, value, f"{value:,.2f}", "arithmetic")
    value = COUNTS[what](*network(measure["flags"]))
    words = f"{100 * value:.1f}%" if what == "mlp_share" else f"{value:,}"
    if "against" in measure:
        base = COUNTS[what](*network(measure["against"]))
        value, words = value / base - 1, f"{base:,} -> {words}: {100 * (value / base - 1):+.2f}%"
    return Found(value, value, value, words, "arithmetic")


# ----------------------------------------------------------------------------------------------------------------------
# Records


@lru_cache(maxsize=None)
def older_records(folder):
    return tuple(measuring.read(HERE / folder / "results.jsonl"))


def is_like(record, wanted):
    """Whether an older record is one that a claim asks for."""
    def essential(flags):
        return {name: value for name, value in last_of(flags).items() if name not in NOT_COMPARED}

    return all(essential(record.get(key, "")) == essential(value) if key == "flags" else record.get(key) == value
               for key, value in wanted.items())


def older_arm(records, wanted):
    """The experiments.Arm of older records: the newest, or the newest of each seed."""
    mine = list({r.get("seed"): r for r in records if is_like(r, wanted)}.values())
    if not mine:
        return None
    windows = mine[-1].get("windows_ms") or [1000 * 1e5 / r["tokens_per_second"] for r in mine]
    tokens = mine[-1].get("tokens_per_step", 100_000)  # of records without windows only the rate counts
    losses = {r["seed"]: r["val_loss"] for r in mine if "val_loss" in r}
    memory = statistics.fmean(r["peak_mem_MB"] for r in mine)
    return experiments.Arm(memory, windows, tokens, losses, None, None, mine)


def settling(arm):
    """By how much later windows are faster than the first."""
    first, *later = arm.windows
    gains = [first / ms - 1 for ms in later]
    return statistics.median(gains), min(gains), max(gains)


def compared(metric, before, after, source):
    """The Found of two arms, or of one where the metric is a value of it; None where a value is missing."""
    if after is None or (before is None and metric in experiments.CHANGES):
        return None
    if metric == "GB":
        return after.memory and Found(gb := after.memory * 2**20 / 1e9, gb, gb, f"{gb:.1f} GB", source)
    if metric == "rate":
        return after.windows and Found(rate := experiments.rate(after), rate, rate, f"{rate:,.0f} tokens/s", source)
    if metric == "settling":
        if len(after.windows) < 2:
            return None
        value, low, high = settling(after)
        return Found(value, low, high, f"{percent(value)} ({percent(low)} to {percent(high)})", source)
    if before.failed or after.failed:
        words = "the base" if before.failed else "the variant"
        return Found(math.nan, None, None, f"{words} did not fit into memory", source)
    change = experiments.CHANGES[metric](before, after)
    if change is None:
        return None
    value, low, high = change[:3]
    if metric == "loss":
        nats = [statistics.fmean(arm.losses[s] for s in before.losses.keys() & after.losses.keys())
                for arm in (before, after)]
        spread = f"{low:+.2%} to {high:+.2%}, " if low is not None else ""
        words = f"{nats[0]:.4f} -> {nats[1]:.4f}: {value:+.2%} ({spread}{change[3]['seeds']} seeds)"
    elif metric == "memory":
        words = f"{before.memory:,.0f} -> {after.memory:,.0f} MiB: {percent(value)}"
    else:
        words = f"{metric} {percent(value)}" + f" ({percent(low)} to {percent(high)})" * (low != high)
        if metric == "speed" and before.tokens:
            words = f"{experiments.rate(before):,.0f} -> {experiments.rate(after):,.0f} tokens/s: {words}"
    return Found(value, low, high, words, source)


def experiment_found(measure, rows):
    """The Found of an arm of docs/experiments.py; of several GPUs the one that has the arms and was used last."""
    part = experiments.EXPERIMENTS[measure["experiment"]].parts[measure["part"]]
    for gpu, arms in reversed(experiments.found_by_gpu(measure["experiment"], measure["part"], rows).items()):
        after, before = arms[measure["arm"]], arms[measure.get("against", part.base)]
        its = after.rows + before.rows
        folder = experiments.EXPERIMENTS[measure["experiment"]].folder
        if its and after.rows:
            found = compared(measure["metric"], before, after, f"{gpu}, torch {its[-1]['torch']}, docs/{folder[:2]}")
            if found:
                return found
    return None


def older_found(measure):
    records = older_records(measure["folder"])
    for gpu, its in measuring.by_gpu([r for r in records if "gpu" in r]):
        after = older_arm(its, measure["variant"])
        before = older_arm(its, measure["base"]) if "base" in measure else None
        source = f"{gpu}, torch {its[-1]['torch']}, docs/{measure['folder'][:2]}"
        if found := compared(measure["metric"], before, after, source):
            return found
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def bounds(expect):
    """(the least, the most) that an expectation allows."""
    if "about" in expect:
        ends = sorted((1 + sign * ABOUT) * expect["about"] for sign in (-1, 1))
        return tuple(ends)
    if "equals" in expect:
        within = expect.get("within", 0)
        return expect["equals"] - within, expect["equals"] + within
    return expect.get("at_least", -math.inf), expect.get("at_most", math.inf)


def verdict(expect, found):
    """By where the interval of a value lies: inside what is allowed, outside of it, or on both sides of an end. A value
    without an interval, that of one seed, decides nothing."""
    if math.isnan(found.value) or found.low is None:
        return UNDECIDED
    if expect.get("whole"):
        return HOLDS if found.value == round(found.value) else DOES_NOT
    low, high = bounds(expect)
    if low <= found.low and found.high <= high:
        return HOLDS
    return DOES_NOT if found.high < low or found.low > high else UNDECIDED


def find(measure, rows):
    if "count" in measure:
        return counted(measure)
    return experiment_found(measure, rows) if "experiment" in measure else older_found(measure)


def command(measure):
    if "folder" in measure:
        return f"python docs/{measure['folder']}/measure.py --table"
    if "experiment" in measure:
        kind = experiments.EXPERIMENTS[measure["experiment"]].parts[measure["part"]].kind
        return f"python docs/experiments.py --only {measure['experiment']} --kind {kind}"
    if "flags" in measure and measure["count"] in ("parameters", "embedding", "non_embedding", "tokens_per_step"):
        return f"python train_gpt2_mod.py {measure['flags']} --dry_run"
    return "python docs/claims.py"


class Judged(NamedTuple):
    verdict: str
    words: str  # what was measured
    source: str
    command: str


def judge(claim, rows):
    measures = claim.get("measure", [])
    for measure in measures:
        found = find(measure, rows)
        if found:
            said = NOWHERE if "why" in claim else verdict(claim["expect"], found)
            return Judged(said, found.words, found.source, command(measure))
    how = command(measures[0]) if measures else ""
    return Judged(NOWHERE if "why" in claim else NOT_RUN, "", "", how)


def load():
    return json.loads(CLAIMS.read_text())


def judged(rows=None):
    """{id: (claim, Judged)}"""
    rows = measuring.read(experiments.RESULTS) if rows is None else rows
    return {claim["id"]: (claim, judge(claim, rows)) for claim in load()}


# ----------------------------------------------------------------------------------------------------------------------
# The documents


def cell(text):
    return text.replace("|", "\\|")


def expectation(claim):
    """What would hold it, in words."""
    if "expect" not in claim:
        return "-"
    expect = claim["expect"]
    if expect.get("whole"):
        return "a whole number"
    low, high = bounds(expect)

    def shown(value):
        if claim["unit"] == "percent":
            return "0%" if value == 0 else f"{100 * value:+.4g}%"
        return f"{value:,.4g} GB" if claim["unit"] == "GB" else f"{value:,.0f}"

    if low == high:
        return shown(low)
    return (f"at least {shown(low)}" if high == math.inf else f"at most {shown(high)}" if low == -math.inf
            else f"{shown(low)} to {shown(high)}")


def claims_table(found):
    rows = []
    for claim, its in found:
        said = "; ".join(f'"{quote}" ({place})' for _, place, quote in claim["said"])
        note = f": {claim['note']}" if "note" in claim else ""
        verdict = f"**{its.verdict}**" + (f": {claim['why']}" if "why" in claim else "")
        words = f"{its.words}; {its.source}" if its.words else "-"
        rows.append([cell(said + note), expectation(claim), f"`{its.command}`" if its.command else "-",
                     words, verdict])
    return table(["claim", "holds if", "command", "measured", "verdict"], rows)


HEAD = """# What the documents expect, and what came out

Made by `python docs/claims.py` from `docs/claims.json` and the records of the experiments; no verdict is typed. It
quotes each expectation of the five documents that this project began with, with the section; what several of them say
alike is one row.

{summary}

- **holds if** is what the words were taken to mean: as a change against the base where it has a sign, of speed in
  tokens a second. Of a range the weaker end counts, and more than was promised holds too; "~" of a size is 5% either
  way. "15% faster" is 15% more tokens a second, "better" a lower validation loss.
- **verdict**: *holds* and *does not* where the whole interval lies on one side; *not distinguishable* where it does
  not, and where there is one seed. Of losses it is the 95% interval of paired seeds (`tools/compare.py`), of speed the
  range of the windows in which the arms took turns (`tools/bench.py`). Speeds of docs/03 are of one run each, without a
  range, and its version of the script is an earlier one, as is docs/02's. *Not run yet*: the command measures it. GB
  are 10^9 bytes of the allocator's peak.
- Not listed: what a command's flags say themselves (heads, layers, defaults), line numbers, dates. Each command of the
  documents runs with `--dry_run` in `tests/test_dry_run.py`.
"""


def claims_document(found):
    counts = {}
    for _, its in found.values():
        counts[its.verdict] = counts.get(its.verdict, 0) + 1
    order = (HOLDS, DOES_NOT, UNDECIDED, NOT_RUN, NOWHERE)
    summary = f"**{len(found)} expectations**: " + ", ".join(f"{name} {counts.get(name, 0)}" for name in order) + "."
    text = HEAD.format(summary=summary)
    for document in SHORT_NAMES:
        its = [pair for pair in found.values() if pair[0]["said"][0][0] == document]
        text += f"\n## {document}\n\n{claims_table(its)}\n"
    return text


# The documents' tables by impact and difficulty: what -> the claims that have its figure.
IMPACT = {
    "Memory savings": [("Gradient checkpointing", "40-50% less", ["checkpointing-memory"]),
                       ("Mixed precision", "30-40% less", ["amp-memory"]),
                       ("Flash attention, long sequences", "5-20x less", ["flash-memory", "flash-memory-alone"])],
    "Speed": [("Flash attention", "2-4x", ["flash-step-1024", "flash-step-8192"]),
              ("torch.compile", "20-30%", ["compile", "compile-d12"]), ("Mixed precision", "2x", ["amp-2x"])],
    "Quality": [("RoPE", "better", ["rope-loss"]), ("SwiGLU", "better", ["swiglu-loss"]),
                ("Gradient accumulation", "better", ["accumulation-loss"])],
}
def against_d12(experiment, *arms):
    """Measures of networks of docs/23, 24 and 28 at equal tokens."""
    return [dict(experiment=experiment, part="equal tokens", arm=arm, metric="loss") for arm in arms]


MOE, MAMBA = against_d12("mixture-of-experts", "d12_moe"), against_d12("mamba-2", "d12_mamba2")
RECURRENCES = against_d12("linear-recurrences", "d12_retnet", "d12_delta", "d12_rwkv7", "d12_hyena")
DIFFICULTY = {  # as the documents have it, with the time they give; here it is a flag
    "Easy (< 1 hour)": [("torch.compile", "`--compile`", ["compile"]),
                        ("Gradient accumulation", "`--gradient_accumulation_steps 4`", ["accumulation-loss"]),
                        ("RMSNorm", "`--use_rmsnorm`", ["rmsnorm", "rmsnorm-step"])],
    "Medium (2-4 hours)": [("Gradient checkpointing", "`--gradient_checkpointing`", ["checkpointing-memory"]),
                           ("Mixed precision", "`--precision bf16`", ["amp-2x", "amp-memory"]),
                           ("RoPE", "`--use_rope`", ["rope-loss"]),
                           ("SwiGLU", "`--mlp swiglu --mlp_expansion_factor 8/3`", ["swiglu-loss"])],
    "Hard (1-2 days)": [("Flash attention", "`--attention flash`", ["flash-step-1024"]),
                        ("Grouped-query attention", "`--gqa_enabled`", ["gqa-throughput", "gqa-saves"]),
                        ("Mixture of experts", "`--model d12_moe` of docs/23", MOE),
                        ("Mamba", "`--model d12_mamba2` of docs/24", MAMBA)],
}
OWN_RESULTS = "its own"  # of a folder that is not in docs/experiments.py: its README.md has tables of its results.jsonl
# experiment -> (priority, difficulty, impact as the documents expect it, stages, claims, folder)
STATUS = {
    "Gradient accumulation": ("High", "Easy", "Medium", "1 and 2", ["accumulation-loss"], "06-gradient-accumulation"),
    "torch.compile": ("High", "Easy", "High", "1 and 2", ["compile"], "22-torch-compile"),
    "Mixed precision (AMP)": ("High", "Medium", "High", "1 and 2", ["amp-2x", "amp-memory"], "11-mixed-precision"),
    "Gradient checkpointing": ("High", "Medium", "High", "1 and 2", ["checkpointing-memory"],
                               "10-gradient-checkpointing"),
    "RMSNorm": ("Medium", "Easy", "Low", "1 only", ["rmsnorm"], "08-rmsnorm"),
    "RoPE": ("Medium", "Medium", "Medium", "1 only", ["rope-loss"], "09-rope-embeddings"),
    "SwiGLU": ("Medium", "Medium", "Medium", "1 only", ["swiglu-loss"], "12-swiglu"),
    "Flash attention": ("Low", "Hard", "High", "1 and 2", ["flash-step-1024", "flash-memory"], "13-flash-attention"),
    "Multi-token prediction": ("-", "-", "-", "1 and 2", ["mtp-efficiency", "mtp-cost"], "14-mtp"),
    "GQA, MQA, latent attention": ("-", "Hard", "-", "1 only", ["gqa-sooner", "kv-cache"], "15-gqa"),
    "MLP family": ("-", "-", "-", "1 only", ["mlp3x-step", "mlp3x-loss"], "16-mlp-family"),
    "Mamba": ("Low", "Hard", "Educational", "1 only", MAMBA, "24-mamba-2"),
    "MoE": ("Low", "Hard", "Educational", "1 only", MOE, "23-mixture-of-experts"),
    "Long context": ("-", "-", "-", "2 only", [OWN_RESULTS], "25-long-context"),
    "Retrieval": ("-", "-", "-", "after", [OWN_RESULTS], "26-retrieval"),
    "Test-time compute": ("-", "-", "-", "after", [OWN_RESULTS], "27-test-time-compute"),
    "RetNet, gated DeltaNet, RWKV-7, Hyena": ("-", "-", "-", "1 only", RECURRENCES, "28-linear-recurrences"),
}
# what -> (flag, claims or measures, in words)
OPTIONS = [
    ("1. torch.compile", "`--compile` (on for CUDA)", ["compile", "compile-d12"]),
    ("2. bf16 for fp32", "`--precision bf16` (on for CUDA)", ["amp-2x", "amp-memory"]),
    ("3. MLP 3x, 832 wide", "`--model d12_mlp3x`", ["mlp3x-step", "mlp3x-memory", "mlp3x-loss"]),
    ("4. MLP 3x at equal width", "`--model d12_mlp3x_no_comp`", ["no-comp-speed", "no-comp-loss"]),
    ("5. MLP 2x, 960 wide", "`--model d12_mlp2x`", ["mlp2x-speed"]),
    ("6. Grouped queries", "`--gqa_enabled --embd_scale 1.0`", ["gqa-throughput", "gqa-saves", "gqa-quality"]),
    ("7. MLP 3x and one key/value head", "`--model d12_mlp3x --n_kv_head 1`", ["mlp3x-gqa"]),
    ("8. Float8 in the head alone", "`--precision fp8_head`", [dict(
        folder="01-slowest-parts", base=dict(name="table", flags="--model d12 --batch_size 64"),
        variant=dict(name="table", flags="--model d12 --batch_size 64 --precision fp8_head"), metric="speed")]),
    ("9. Float8 everywhere, width 768", "`--precision fp8`", ["fp8-768"]),
    ("10. The same, width 1024", "`--precision fp8`", ["fp8-wide"]),
    ("11. A window of 128 at T = 4096", "`--window 128`", [dict(
        folder="01-slowest-parts", variant=dict(
            name="long", flags="--model d12_post_norm_qk_norm --batch_size 16 --window 128"),
        base=dict(name="long", flags="--model d12_post_norm_qk_norm --batch_size 16"), metric="speed")]),
    ("12. A micro-batch of 64 for 16", "`--batch_size 64`", [dict(
        folder="01-slowest-parts", base=dict(name="table", flags="--model d12 --batch_size 16"),
        variant=dict(name="table", flags="--model d12 --batch_size 64"), metric="speed")]),
    ("13. Less memory for time", "`--gradient_checkpointing`", ["checkpointing-memory", dict(
        experiment="gradient-checkpointing", part="gpt2-medium", arm="checkpointing", metric="speed")]),
    ("14. RMSNorm for LayerNorm", "`--use_rmsnorm`", ["rmsnorm-step", "rmsnorm-loss"]),
    ("15. Multi-token prediction, four heads", "`--mtp_enabled --mtp_max_steps 4`", ["mtp-cost"]),
]


def in_brief(found, claims, rows, verdicts=True, folder=None):
    """What is known of some claims, or by a measure, for a cell; not run yet where nothing is."""
    cells = []
    for claim in claims:
        if claim == OWN_RESULTS:
            cells += ["in its README"] if measuring.read(HERE / folder / "results.jsonl") else []
        elif isinstance(claim, dict):
            its = find(claim, rows)
            arm = f"`{claim['arm']}` " if "experiment" in claim else ""
            cells += [f"{arm}{its.words}; {its.source}"] if its else []
        elif found[claim][1].words:
            its = found[claim][1]
            cells.append(f"{its.words}; {its.source}" + f" (**{its.verdict}**)" * verdicts)
    return "<br>".join(cells) or NOT_RUN


def index_tables(found, rows):
    """docs/README.md's tables."""
    made = []
    for title, lines in IMPACT.items():
        made += [f"**{title}**", "", table(["", "expected", "measured"], [
            [f"{i}. {name}", said, in_brief(found, ids, rows)] for i, (name, said, ids) in enumerate(lines, 1)]), ""]
    made += ["## By difficulty", ""]
    for title, lines in DIFFICULTY.items():
        made += [f"**{title}**, here a flag", "", table(["", "flag", "measured"], [
            [name, flag, in_brief(found, ids, rows)] for name, flag, ids in lines]), ""]
    made += ["## Status", "", "Stage 1 is a run from nothing, stage 2 one that goes on from weights, where what",
             "changes the network is refused, with a line that says so; after: on a network that is trained.", ""]
    lines = []
    for name, (priority, difficulty, impact, stages, ids, folder) in STATUS.items():
        link = f"[{folder}]({folder}/README.md)"
        lines.append([name, "built", priority, difficulty, impact, stages,
                      in_brief(found, ids, rows, folder=folder), link])
    made += [table(["experiment", "status", "priority", "difficulty", "impact expected", "stages", "measured",
                    "folder"], lines)]
    return "\n".join(made)


def options_table(found, rows):
    return table(["option", "flag", "gain measured"],
                 [[name, flag, in_brief(found, ids, rows, verdicts=False).replace(NOT_RUN, "not measured")]
                  for name, flag, ids in OPTIONS])


def documents(rows=None):
    """{path: its text} of what this makes."""
    rows = measuring.read(experiments.RESULTS) if rows is None else rows
    found = judged(rows)
    index, quick = HERE / "README.md", HERE / "01-slowest-parts" / "QUICK_IMPLEMENTATION.md"
    return {DOCUMENT: claims_document(found),
            index: rewritten(index.read_text(), index_tables(found, rows)),
            quick: rewritten(quick.read_text(), options_table(found, rows))}


def write():
    for path, text in documents().items():
        measuring.write(path, text)


def main(argv=None):
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--id", nargs="+", metavar="ID", choices=[claim["id"] for claim in load()],
                        help="print these claims, and write nothing")
    args = parser.parse_args(argv)
    if args.id:
        print(claims_table([pair for name, pair in judged().items() if name in args.id]))
        return 0
    write()
    print(f"written: {', '.join(str(path.relative_to(HERE.parent)) for path in documents())}")
    return 0


if __name__ == "__main__":
    measuring.run(main, experiments.RESULTS)
