#!/usr/bin/env python3
"""Measure how soon d12_fast and d12 reach a loss, and what each part of d12_fast gains; print README.md's tables.

    python docs/04-time-to-loss/measure.py --input_bin 'bench/train_*.bin' --input_val_bin 'bench/val_*.bin'
    python docs/04-time-to-loss/measure.py --only sweep_d12 sweep_muon --budget_s 1500 --input_bin ...
    python docs/04-time-to-loss/measure.py --parallel --input_bin ... --input_val_bin ...
    python docs/04-time-to-loss/measure.py --table
    python docs/04-time-to-loss/measure.py --plot

The first runs what results.jsonl does not hold yet for this GPU and appends a record each: the SWEEPS with seed 1, then
seed by seed the FULL runs and the LADDER, with seed 1 also what is TRIED and each rung's speed. A run is its flags and
its seed: one that is there is not run again when the script has changed, and its record says which version it is of.
--only picks some by name, --seeds says how many, --budget_s when to stop; --parallel uses all GPUs of the machine,
--parallel 3 with three runs on each at a time: while one compiles another trains, and their losses count, but not their
speed. The last two only show.
"""
import ast
import re
import statistics
import sys
import time
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS, CURVE = HERE / "results.jsonl", HERE / "curve.png"
sys.path.insert(0, str(HERE.parent))
import measuring  # noqa: E402
from measuring import Run, last_of, learning_curve, losses, mean, reached, table  # noqa: E402

SHAPE = ("--batch_size 64 --sequence_length 1024 --total_batch_size 65536 --shuffle --warmdown_fraction 0.6 "
         "--min_lr_fraction 0.1 --no_save_checkpoints")
SHORT = "--num_iterations 454 --val_loss_every 0"  # 29.8 M tokens, validated at the end
RUNG = "--val_loss_every 50"
TIMED = "--num_iterations 60 --val_loss_every 0"
TWICE = "--total_batch_size 131072 --num_iterations 227"  # as many in larger batches, and in smaller ones
HALF = "--batch_size 32 --total_batch_size 32768 --num_iterations 908"
IN_ORDER = "--no_shuffle"
D12 = "--model d12 --learning_rate {learning_rate} --warmup_iters {warmup_iters}"
FAST = "--model d12_fast --muon_lr {muon_lr} --embedding_lr {embedding_lr} --learning_rate {learning_rate}"
LONG = "--num_iterations 1200 --val_loss_every 200"  # 79 M tokens
SIMPLER = "--softmax_scale 0 --no_cautious_weight_decay"
TIED = "--tie_embeddings --embd_init_std 0.02 --value_init_std 1 --embedding_lr 0"  # and a --value_lr
HIGHER = "--muon_lr 0.025 --muon_momentum 0.9"  # and of the embeddings' rates 0.45
# What of the preset is not in the words of a run below, so that a record stays true when the preset changes.
PARTS = ("--softmax_scale 0.12 --cautious_weight_decay --attention_gate 0 --no_tie_embeddings --embd_init_std 1 "
         "--value_init_std 0 --value_lr 0")
FIRST = f"--muon_momentum 0.95 --muon_beta2 0 --smear none {PARTS}"  # d12_fast as the sweeps had it
SECOND = "--embedding_lr 0.45 --muon_momentum 0.9 --muon_beta2 0.95 --smear embedding"  # with what helped there
SMEARED = "--muon_beta2 0.95 --smear embedding+mlp --precision fp8_head"
UNTIED = f"--muon_momentum 0.95 {SMEARED} {PARTS}"  # the preset as it was before the two last rungs
NOW = (f"--muon_lr 0.02 --learning_rate 0.004 --muon_momentum 0.95 {SMEARED} --softmax_scale 0.12 "
       f"--cautious_weight_decay --attention_gate 12 {TIED} --value_lr 0.3")  # what a full run is
SHORTER = f"--learning_rate 0.004 {HIGHER} {SMEARED} {SIMPLER} --attention_gate 12 {TIED} --value_lr 0.45"
THIRD = f"{SECOND} --smear embedding+mlp"
RATES = {  # those that the ladder and `untied` have
    D12: dict(learning_rate="1.5e-3", warmup_iters="45"),
    FAST: dict(muon_lr="0.02", embedding_lr="0.3", learning_rate="0.004"),
}
START = {  # those that the sweeps and the trials change
    D12: dict(learning_rate="1e-3", warmup_iters="45"),
    FAST: dict(muon_lr="0.025", embedding_lr="0.15", learning_rate="0.004"),
}

# name -> (the flags, the rate that is swept, its values, what else is typed)
SWEEPS = {
    "sweep_d12": (D12, "learning_rate", ("6e-4", "1e-3", "1.5e-3", "2e-3"), ""),
    "sweep_muon": (FAST, "muon_lr", ("0.0125", "0.025", "0.05"), FIRST),
    "sweep_embedding": (FAST, "embedding_lr", ("0.05", "0.15", "0.45"), FIRST),
    "sweep_head": (FAST, "learning_rate", ("0.002", "0.004", "0.008"), FIRST),  # of d12_fast only the head has it
    "in_order_d12": (D12, "learning_rate", ("3e-4", "6e-4", "1e-3"), IN_ORDER),
    "in_order_d12_131072": (D12, "learning_rate", ("3e-4", "6e-4", "1e-3", "1.5e-3", "2e-3"),
                            f"{IN_ORDER} {TWICE} --warmup_iters 23"),
    "in_order_muon": (FAST, "muon_lr", ("0.025", "0.05"), f"{FIRST} {IN_ORDER}"),
    "in_order_embedding": (FAST, "embedding_lr", ("0.15", "0.45"), f"{FIRST} {IN_ORDER}"),
    "in_order_head": (FAST, "learning_rate", ("0.004", "0.008"), f"{FIRST} {IN_ORDER}"),
    "in_order_131072_muon": (FAST, "muon_lr", ("0.0125", "0.025", "0.05"), f"{FIRST} {IN_ORDER} {TWICE}"),
    "in_order_131072_embedding": (FAST, "embedding_lr", ("0.05", "0.15"), f"{FIRST} {IN_ORDER} {TWICE}"),
}

# rung -> (what it adds to the flags of the rung before, in words); of a flag that stands twice the last counts
LADDER = {
    "adamw": (D12.format(**RATES[D12]), "`d12` with AdamW, at the best rate of its sweep"),
    "muon": ("--optimizer muon --muon_lr 0.02 --beta1 0.8 --adam_eps 1e-10 --grad_clip 0 --warmup_iters 0",
             "Muon for the blocks' matrices; AdamW, for the rest, with d12_fast's settings; no warm-up, no clipping"),
    "untied": ("--no_tie_embeddings --learning_rate 0.004 --embd_norm --embd_init_std 1 --embedding_lr 0.3",
               "a head of its own; the embedding normalised, its numbers begin at a size of 1; a rate for each"),
    "qk_norm": ("--qk_norm --n_head 6", "queries and keys normalised, 6 heads of 128 for 12 of 64"),
    "zero_init": ("--zero_init", "head and matrices into the stream begin at 0"),
    "no_attention_scale": ("--no_scale_attention", "attention added as it is, not by 1/sqrt(24)"),
    "relu2": ("--mlp relu2", "ReLU squared for GELU"),
    "x0_lambdas": ("--x0_lambdas --scalar_lr 0.02", "each block begins with a x + b x0"),
    "value_embeddings": ("--value_embeddings 3", "three tables of embeddings in the values of six blocks"),
    "softcap": ("--logit_softcap 15", "logits bent to stay within 15"),
    "softmax_scale": ("--softmax_scale 0.12", "scores times 0.12, not 1/sqrt(128) = 0.088"),
    "cautious_weight_decay": ("--cautious_weight_decay", "decay only where the update shrinks the weight too"),
    "momentum_warmup": ("--momentum_warmup_steps 300", "Muon's momentum from 0.85 to 0.95 over 300 steps"),
    "normuon": ("--muon_beta2 0.95", "Muon's updates evened by neuron (NorMuon)"),
    "smear_embedding": ("--smear embedding", "to each embedding a learned share of the one before"),
    "smear_mlp": ("--smear embedding+mlp", "the same where the MLPs read the stream"),
    "fp8_head": ("--precision fp8_head", "two of the head's three products in float8: for speed"),
    "attention_gate": ("--attention_gate 12", "each head's output weighed by its token"),
    "tied": (f"{TIED} --value_lr 0.3", "embedding and head one matrix again, at the head's rate, begun small"),
}
CODE = {  # rung -> what of the script is there for it: definitions, whole, and words, each line with one of them
    "adamw": (),
    "muon": ("Muon", "momentum_step", "orthogonalized", "updated", "longer_sides", "shape_factor", "laid_wide",
             "Optimizers", "muon", "muon_lr", "muon_momentum", "embedding_lr", "head_lr"),
    "untied": ("tie_embeddings", "untied", "embd_norm", "embd_init_std"),
    "qk_norm": ("qk_norm",),
    "zero_init": ("zero_init", "into_stream"),
    "no_attention_scale": ("scale_attention",),
    "relu2": ("relu2",),
    "x0_lambdas": ("x0_lambdas", "x0", "Mix", "scalar_lr"),
    "value_embeddings": ("value_embeddings", "value_mix", "values_of_blocks"),
    "softcap": ("logit_softcap", "softcap", "softcapped"),
    "softmax_scale": ("softmax_scale",),
    "cautious_weight_decay": ("cautious_weight_decay", "cautious"),
    "momentum_warmup": ("momentum_warmup_steps", "FIRST_MOMENTUM"),
    "normuon": ("evened", "muon_beta2", "squares"),
    "smear_embedding": ("Smear", "smear", "smears", "SMEARABLE", "follows"),
    "smear_mlp": ("smear_1", "smear_2"),
    "fp8_head": ("Float8HeadProducts", "memory8", "gradient8", "dlogits8"),
    "attention_gate": ("Gate", "gate", "attention_gate"),
    "tied": ("value_lr", "value_init_std"),
}
DROPPED = ()  # rungs that were measured and not kept: those after them are without

ALONE = "--no_tie_embeddings --learning_rate 0.004"
RAISED = f"{HIGHER} --embedding_lr 0.45"
# what -> (what it adds to the flags of the first that it goes back to, what it is compared with, in words), at as many
# tokens but for the long ones. The first is d12_fast as it was at first, or a rung.
TRIED = {
    "batch_131072": (TWICE, "first", "twice the batch, half the steps"),
    "batch_32768": (HALF, "first", "half the batch, twice the steps"),
    "batch_32768_slower": (f"{HALF} --muon_lr 0.018 --embedding_lr 0.1 --learning_rate 0.003", "first",
                           "the same, all rates over the square root of 2"),
    "warmdown_1": ("--warmdown_fraction 1", "first", "the warm-down from the first step"),
    "floor_0": ("--min_lr_fraction 0", "first", "the warm-down to 0"),
    "no_weight_decay": ("--weight_decay 0", "first", "no decay"),
    "muon_beta2": ("--muon_beta2 0.95", "first", "Muon's updates evened by neuron (NorMuon)"),
    "smear": ("--smear embedding", "first", "the embedding of the token before added, by a learned factor a channel"),
    "normuon_smear": ("--muon_beta2 0.95 --smear embedding", "first", "both"),
    "momentum_0.9": ("--muon_momentum 0.9", "first", "a shorter mean of Muon's gradients"),
    "value_embeddings_6": ("--value_embeddings 6", "first", "value embeddings in all blocks, six tables"),
    "softcap_30": ("--logit_softcap 30", "first", "a wider cap"),
    "second": (SECOND, "first", "NorMuon, smear, momentum 0.9, embeddings' rate 0.45"),
    "smear_both": (f"{SECOND} --smear embedding+attention+mlp", "second", "what attention and MLPs read smeared too"),
    "third": (THIRD, "second", "what the MLPs read smeared too"),
    "third_no_smear": (f"{THIRD} --smear mlp", "third", "the embedding not smeared: the MLPs' alone"),
    "third_fp8_head": (f"{THIRD} --precision fp8_head", "third", "two of the head's three products in float8"),
    "third_momentum_0.95": (f"{THIRD} --muon_momentum 0.95", "third", "the longer mean again"),
    "third_muon_0.035": (f"{THIRD} --muon_lr 0.035", "third", "Muon's rate times 1.4"),
    "third_head_0.008": (f"{THIRD} --learning_rate 0.008", "third", "the head's rate twice"),
    "third_embedding_0.9": (f"{THIRD} --embedding_lr 0.9", "third", "the embeddings' rate twice"),
    "third_floor_0": (f"{THIRD} --min_lr_fraction 0", "third", "the warm-down to 0"),
    "third_warmdown_1": (f"{THIRD} --warmdown_fraction 1", "third", "the warm-down from the first step"),
    "third_tables_6": (f"{THIRD} --value_embeddings 6", "third", "value embeddings in all blocks, six tables"),
    "in_order": (IN_ORDER, "first", "the sequences as they lie in the shards"),
    "in_order_slower": (f"{IN_ORDER} --muon_lr 0.018 --embedding_lr 0.1 --learning_rate 0.003", "in_order",
                        "all rates over the square root of 2"),
    "in_order_131072": (f"{IN_ORDER} {TWICE}", "in_order", "twice the batch, half the steps"),
    "in_order_131072_floor_0": (f"{IN_ORDER} {TWICE} --min_lr_fraction 0", "in_order_131072", "the warm-down to 0"),
    "in_order_32768_slower": (f"{IN_ORDER} {HALF} --muon_lr 0.0125 --embedding_lr 0.075 --learning_rate 0.002",
                              "in_order", "half the batch, twice the steps, at half the rates"),
    "untied_alone": (ALONE, "muon", "a head of its own, the embedding as it was but for its rate"),
    "untied_qk_norm": (f"{ALONE} --qk_norm --n_head 6", "untied_alone", "`qk_norm` next"),
    "untied_relu2": (f"{ALONE} --qk_norm --n_head 6 --mlp relu2", "untied_qk_norm", "`relu2` next"),
    "untied_zero_init": (f"{ALONE} --qk_norm --n_head 6 --mlp relu2 --zero_init", "untied_relu2",
                         "`zero_init` next"),
    "untied_no_attention_scale": (f"{ALONE} --qk_norm --n_head 6 --mlp relu2 --zero_init --no_scale_attention",
                                  "untied_zero_init", "`no_attention_scale` next"),
    "higher_rates": (RAISED, "fp8_head",
                     "higher rates for Muon and the embeddings, a shorter mean of Muon's gradients"),
    "simpler": (f"{RAISED} {SIMPLER}", "higher_rates", "without two rungs that gained nothing"),
    "simpler_gate": (f"{RAISED} {SIMPLER} --attention_gate 12", "simpler", "each head's output weighed by its token"),
    "no_qk_norm": (f"{RAISED} --no_qk_norm --softmax_scale 0", "higher_rates",
                   "queries and keys, and their scale, as they are"),
    "no_zero_init": (f"{RAISED} --no_zero_init", "higher_rates", "all matrices begin as in `d12`"),
    "scale_attention": (f"{RAISED} --scale_attention", "higher_rates", "attention times 1/sqrt(24)"),
    "no_relu2": ("--mlp gelu", "fp8_head", "GELU for ReLU squared"),
    "no_x0_lambdas": (f"{RAISED} --no_x0_lambdas", "higher_rates", "blocks begin with the stream as it is"),
    "no_value_embeddings": (f"{RAISED} --value_embeddings 0", "higher_rates", "no tables of values"),
    "no_softcap": (f"{RAISED} --logit_softcap 0", "higher_rates", "logits as they are"),
    "no_softmax_scale": (f"{RAISED} --softmax_scale 0", "higher_rates", "scores times 1/sqrt(128)"),
    "no_cautious_weight_decay": (f"{RAISED} --no_cautious_weight_decay", "higher_rates", "every weight decays"),
    "twice_the_heads_rate": (f"{RAISED} --learning_rate 0.008", "higher_rates", "the head's rate twice"),
    "twice_the_embeddings_rate": (f"{RAISED} --embedding_lr 0.9", "higher_rates", "the embeddings' rate twice"),
    "no_momentum_warmup": (f"{RAISED} --momentum_warmup_steps 0", "higher_rates",
                           "Muon's momentum 0.9 from the first step"),
    "document_mask": (f"{RAISED} --document_mask", "higher_rates",
                      "no attention to other documents, in validation neither"),
    "tied_higher_rates": (f"{HIGHER} --value_lr 0.45", "tied", "higher rates, a shorter mean of Muon's gradients"),
    "gate_768": ("--attention_gate 768", "tied", "the gate computed from all channels"),
    "tied_0.008": ("--learning_rate 0.008", "tied", "twice the rate of embedding and head"),
    "tied_0.002": ("--learning_rate 0.002", "tied", "half of it"),
    "long": (LONG, "fp8_head", "2.6 times as many steps"),
    "long_gate": (f"{LONG} --attention_gate 12", "long", "the gate"),
    "long_tied": (f"{LONG} {TIED} --value_lr 0.3", "long", "embedding and head one matrix"),
    "long_gate_tied": (f"{LONG} --attention_gate 12 {TIED} --value_lr 0.3", "long", "both"),
    "long_gate_tied_rates": (f"{LONG} --attention_gate 12 {TIED} --value_lr 0.45 {HIGHER}",
                             "long_gate_tied", "and higher rates"),
    "long_gate_tied_simpler": (f"{LONG} --attention_gate 12 {TIED} --value_lr 0.3 {SIMPLER}", "long_gate_tied",
                               "and without two rungs that gained nothing in 454 steps"),
}

FULL = {
    "d12": f"{D12.format(**RATES[D12] | dict(warmup_iters='152'))} --num_iterations 1526 --val_loss_every 100 {SHAPE}",
    "d12_fast": f"--model d12_fast --num_iterations 2000 --val_loss_every 100 {SHAPE} {NOW}",
    **{name: f"--model d12_fast --num_iterations {steps} --val_loss_every 50 {SHAPE} {recipe}"
       for name, steps, recipe in (("d12_fast_33M", 500, NOW), ("d12_fast_20M", 300, NOW),
                                   ("shorter_2000", 2000, SHORTER), ("shorter_33M", 500, SHORTER))},
    **{name: f"{FAST.format(**RATES[FAST])} --num_iterations {steps} --val_loss_every 50 {SHAPE} {UNTIED}"
       for name, steps in (("untied_2000", 2000), ("untied_33M", 500))},
    "d12_fast_in_order": f"{FAST.format(**START[FAST] | dict(embedding_lr='0.45'))} --num_iterations 2200 "
                         f"--val_loss_every 50 {SHAPE} {FIRST} {IN_ORDER}",
}
ANCHORS = {  # (seconds, loss) of the public trainers on an H100, see README.md
    "modded-nanogpt of 2025-08-23": ((43.3, 4.780), (57.9, 4.501), (72.7, 4.271), (87.5, 4.128), (102.4, 4.007),
                                     (148.0, 3.802), (194.3, 3.632), (241.3, 3.493), (278.1, 3.416)),
    "NoCap's d12, without its warm-down": ((302.0, 4.914),),
}
LOSSES = (4.914, 4.01, 3.80, 3.416)  # of the public trainers' curves, see README.md
LEVEL = 0.05  # of p, below which two rungs are told apart


def swept(name):
    """[(value, Run)] of a sweep."""
    flags, rate, values, adds = SWEEPS[name]
    each = [f"{flags.format(**START[flags] | {rate: value})} {SHORT} {SHAPE} {adds}".strip() for value in values]
    return [(value, Run("sweep", name, flags)) for value, flags in zip(values, each)]


def ladder():
    """{rung: (the rung it is compared with, None for the first; its Run)}"""
    found, before, kept = {}, None, ""
    for rung, (adds, _) in LADDER.items():
        flags = f"{kept} {adds}".strip()
        found[rung] = before, Run("ladder", rung, f"{flags} {SHORT} {SHAPE} {RUNG}")
        if rung not in DROPPED:
            before, kept = rung, flags
    return found


def speeds():
    """{rung: a Run of it that is for its speed alone}"""
    return {rung: Run("speed", "speed", run.flags.replace(f"{SHORT} {SHAPE} {RUNG}", f"{SHAPE} {TIMED}"))
            for rung, (_, run) in ladder().items()}


def full(name):
    return Run("full", name, FULL[name])


def tried():
    """{what: its Run}, each of the ladder's length."""
    found = {rung: run for rung, (_, run) in ladder().items()}
    found["first"] = Run("tried", "first", f"{FAST.format(**START[FAST])} {SHORT} {SHAPE} {FIRST}")
    for name, (adds, against, _) in TRIED.items():
        while against in TRIED:
            against = TRIED[against][1]
        found[name] = Run("tried", name, f"{found[against].flags} {adds}")
    return {name: run for name, run in found.items() if run.kind == "tried"}


def runs(only, seeds):
    """[(Run, seed)] in the order of running, that of `only` where it names some: each of its flags and seed once. Those
    in order are run where they are named."""
    each = [full(name) for name in FULL] + [run for _, run in ladder().values()]
    each += tried().values()
    found = [(run, 1) for name in SWEEPS for _, run in swept(name)]
    found += [(run, seed) for seed in range(1, seeds + 1) for run in each if only or seed == 1 or run.kind != "tried"]
    found += [(run, 1) for run in speeds().values()]
    once = {}
    for run, seed in found:
        if run.name in only if only else "in_order" not in run.name:
            once.setdefault((frozenset(last_of(run.flags).items()), seed), (run, seed))
    return sorted(once.values(), key=lambda task: only.index(task[0].name)) if only else list(once.values())


def results():
    return measuring.read(RESULTS)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def verdict(difference, p):
    if p is None:
        return "-"
    return "not told apart" if p >= LEVEL else "better" if difference < 0 else "worse"


def alone(rows):
    """Tokens a second of the runs which had a GPU to themselves; None where there is none."""
    return mean([r["tokens_per_second"] for r in rows if not r["sharing"]])


def in_thousands(speed):
    return "-" if speed is None else f"{speed:,.0f}"


def variants():
    """{rung, or what was tried: its Run}"""
    return {**{rung: run for rung, (_, run) in ladder().items()}, **tried()}


def judge(rows):
    """What says by how much two of the variants are apart."""
    found = {(name, seed): loss for name, run in variants().items() for seed, loss in losses(rows, run).items()}
    return measuring.Blocks(found) if found else None


def comparison(label, words, rows, name, other, judged):
    """A line of a table, [] where the variant is not measured: its losses beside those of the other (None: of none).
    Speed is that of the runs which had a GPU to themselves."""
    runs = variants()
    mine, values = [r for r in rows if runs[name].is_of(r)], list(losses(rows, runs[name]).values())
    apart, p = (judged.apart(name, other) if mine and other else None) or (None, None)
    return mine and [
        label, words, str(len(values)), in_thousands(alone(mine)),
        f"{max(r['peak_mem_MB'] for r in mine):,}", f"{mean(values):.4f}",
        f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-", "-" if apart is None else f"{apart:+.4f}",
        "-" if p is None else f"{p:.1g}", verdict(apart, p),
    ]


COMPARED = ("what it adds", "seeds", "tokens/s", "MiB", "loss", "std")  # the columns of every comparison


@cache
def script_lines(path):
    """({name: the numbers of its lines} of each definition of a script, the words of each of its lines)."""
    text, its = path.read_text(), {}
    for node in ast.walk(ast.parse(text)):
        if hasattr(node, "name"):
            its.setdefault(node.name, set()).update(range(node.lineno, node.end_lineno + 1))
    return its, [{*re.findall(r"\w+", line)} for line in text.splitlines()]


def code_lines(words):
    """How many lines of the script are for one of the words: of definitions of that name, or with the word."""
    its, lines = script_lines(measuring.SCRIPT)
    return len(set().union(*(its.get(word, ()) for word in words),
                           (i for i, line in enumerate(lines, 1) if {*words} & line)))


def seconds_to(target, rows, speed):
    """What a rung's runs need on average to a loss at that speed; None where one does not come to it."""
    places = [reached(learning_curve(r), target) for r in rows]
    return statistics.fmean(tokens for _, tokens in places) / speed if rows and speed and all(places) else None


def ladder_table(rows):
    rungs, timed, judged, lines = ladder(), speeds(), judge(rows), []
    for rung, (before, run) in rungs.items():
        label = f"`{rung}`" + " (dropped)" * (rung in DROPPED)
        line = comparison(label, LADDER[rung][1], rows, rung, before, judged)
        if line:
            speed = alone([r for r in rows if timed[rung].is_of(r)])
            seconds = seconds_to(4.01, [r for r in rows if run.is_of(r)], speed)
            line[3] = in_thousands(speed)
            lines.append([*line[:2], str(code_lines(CODE[rung])), *line[2:],
                          "-" if seconds is None else f"{seconds:.1f}"])
    heads = ["rung", COMPARED[0], "lines", *COMPARED[1:], "to the rung before", "p", "", "s to 4.010"]
    return lines and table(heads, lines)


def tried_table(rows):
    begin = "`d12_fast` as it was at first, at the rates that the sweeps begin with"
    judged = judge(rows)
    lines = [comparison("`first`", begin, rows, "first", None, judged)]
    lines += [comparison(f"`{name}`", f"to `{against}`: {words}", rows, name, against, judged)
              for name, (_, against, words) in TRIED.items()]
    return any(lines[1:]) and table(["tried", *COMPARED, "to that", "p", ""], [line for line in lines if line])


def place(seconds, tokens):
    return f"{seconds:.1f} s, {tokens / 1e6:.1f} M"


def place_of(target, curve):
    """Where a curve comes to a loss, in words."""
    found = reached(curve, target)
    seconds, tokens, first = curve[0]
    return place(*found) if found else f"before {place(seconds, tokens)}" if first <= target else "-"


def full_table(rows):
    lines = []
    for name in FULL:
        for r in sorted((r for r in rows if full(name).is_of(r) and not r["sharing"]), key=lambda r: r["seed"]):
            curve = learning_curve(r)
            lines.append([f"`{name}`", str(r["seed"]), f"{r['tokens_per_second']:,.0f}", f"{r['peak_mem_MB']:,}",
                          f"{r['first_step_s']:.1f}", *(place_of(target, curve) for target in LOSSES),
                          f"{r['val_loss']:.4f} at {place(*curve[-1][:2])}"])
    heads = [f"to {target:.3f}" for target in LOSSES]
    return lines and table(["run", "seed", "tokens/s", "MiB", "first step s", *heads, "last loss"], lines)


def sweep_table(rows):
    lines = []
    for name, (flags, rate, values, adds) in SWEEPS.items():
        found = {value: losses(rows, run)[1] for value, run in swept(name) if 1 in losses(rows, run)}
        if not found:
            continue
        best = min(found, key=found.get)
        best += " (the end of the row)" * (best in (values[0], values[-1]))
        each = ", ".join(f"{value}: {loss:.4f}" for value, loss in found.items())
        lines.append([f"`{name}`", f"`{flags.split()[1]}`, {rate}", each,
                      best if len(found) == len(values) else "not all measured",
                      "-" if IN_ORDER in adds else RATES[flags][rate]])
    return lines and table(["sweep", "what is swept", "loss by its value", "best", "taken"], lines)


def tables(rows):
    """The Markdown tables of a GPU's rows: the full runs, the ladder, what was tried over the preset, the sweeps; of a
    run that is there twice its newest record."""
    rows = list({(frozenset(last_of(r["flags"]).items()), r["seed"]): r for r in rows}.values())
    return [found for make in (full_table, ladder_table, tried_table, sweep_table) if (found := make(rows))]


def plot():
    """Write curve.png; the exit code."""
    pyplot = measuring.pyplot()
    if not pyplot:
        return 2
    found = [(name, r) for name in FULL if name.startswith("d12") for r in results()
             if full(name).is_of(r) and not r["sharing"]]
    if not found:
        print("error: results.jsonl holds no full run; --only d12 d12_fast measures them", file=sys.stderr)
        return 2
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, r in found:
        seconds, _, values = zip(*learning_curve(r))
        axes.plot(seconds, values, label=f"{name}, seed {r['seed']}, {r['gpu']}")
    for label, points in ANCHORS.items():
        axes.plot(*zip(*points), label=label, marker="o", linestyle=":")
    for target in LOSSES:
        axes.axhline(target, color="0.8", linewidth=0.8, zorder=0)
    axes.set(ylim=(3.3, 5.5), xlabel="seconds of training, compilation left out")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend(loc="upper center", fontsize="small")
    figure.savefig(CURVE, dpi=150)
    print(f"{CURVE.name} has {len(found)} runs")
    return 0


def make_parser():
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    measuring.add_flags(parser, "full runs", "each rung and each full run", 3)
    names = [*SWEEPS, *FULL, *LADDER, *TRIED, "first", "speed"]
    parser.add_argument("--only", nargs="+", choices=names, help="these alone")
    return parser


def main(argv=None):
    """The exit code: 1 if a run failed."""
    begun, args = time.monotonic(), make_parser().parse_args(argv)
    if args.plot:
        return plot()
    failed = 0
    if not args.table:
        tasks = runs(args.only, args.seeds)
        failed = measuring.run_what_is_missing(tasks, RESULTS, args, begun, retimed=("full", "speed"))
    measuring.print_tables(RESULTS, tables)
    return 1 if failed else 0


if __name__ == "__main__":
    measuring.run(main, RESULTS)
