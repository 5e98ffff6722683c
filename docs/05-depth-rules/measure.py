#!/usr/bin/env python3
"""Measure whether the formula of d4_fast to d48_fast holds, and whether d12_fast fits a card of 24 GB; print the tables
of README.md.

    python docs/05-depth-rules/measure.py --input_bin 'bench/train_*.bin' --input_val_bin 'bench/val_*.bin'
    python docs/05-depth-rules/measure.py --only rates --parallel 3 --input_bin ... --input_val_bin ...
    python docs/05-depth-rules/measure.py --table
    python docs/05-depth-rules/measure.py --plot

The first runs what results.jsonl does not hold yet for this GPU and appends a record each: of three depths the
formula's rates, half and twice of them; the preset and the plain network of its size in equal minutes; presets of six
depths in full; two recipes on a whole GPU and on 22 GiB of it. --only picks kinds, --seeds says how many, --budget_s
when to stop; --parallel N has N runs on each GPU at a time, whose losses count but not their speed.
"""
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS, CURVE = HERE / "results.jsonl", HERE / "curve.png"
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
import measuring  # noqa: E402
from measuring import Run, losses, mean, table  # noqa: E402

SHAPE = "--sequence_length 1024 --no_save_checkpoints"
KINDS = ("rates", "minutes", "scale", "card")
DEPTHS = (6, 12, 18)  # of which the rules are tested
FACTORS = (0.5, 1, 2)  # on all rates of the formula
BY_BATCH = (6,)  # depths of which rates by the root of the batch are run as well
SHORT = 29_753_344  # tokens; 454 steps of 65,536
MINUTES = {6: 0.4, 12: 1, 18: 2}
PLAIN_RATES = {6: ("1e-3", "1.5e-3", "3e-3"), 12: ("1.5e-3", "2e-3"), 18: ("5e-4", "7e-4", "1e-3")}
SCALED = (4, 6, 8, 12, 16, 18)
RATES = ("muon_lr", "value_lr", "learning_rate", "scalar_lr")
NOCAP = ("--model d12 --total_batch_size 524288 --num_iterations {} --learning_rate 1.8e-3 --warmup_iters 10 "
         "--grad_clip 0")
CARDS = {  # what -> its flags; each on the whole GPU, and with the micro-batch that fits
    "d12_fast": "--model d12_fast --total_batch_size 65536 --num_iterations 150",
    "nocap": NOCAP.format(20),
    "nocap, 100 steps": NOCAP.format(100),
}
FLOPS, STARTING = 3.5e14, 90  # a second, and seconds beyond those of training: what a run is expected to take
WHOLE, CAPPED = "--batch_size 64", "--batch_size auto --memory_gib 22"
PLACES = {WHOLE: "the whole GPU", CAPPED: "22 GiB of it", "--batch_size 16 --memory_gib 22": "22 GiB, 16 at a time"}


def preset(depth):
    import train_gpt2_mod as script

    return script.preset(f"d{depth}_fast")


def micro_batch(depth):
    """Sequences that leave room on 80 GB, and divide the batch."""
    return min(64 if depth <= 12 else 32, preset(depth)[1]["tokens_per_step"] // 1024)


def size_of(depth):
    """(parameters, FLOPs of a token of training) of a preset."""
    import torch
    import train_gpt2_mod as script

    config = script.GPTConfig(**preset(depth)[0])
    with torch.device("meta"):
        model = script.GPT(config)
    return model.parameter_count(), model.flops_per_token(1024)


def fast(kind, depth, flags, parts=1, factor=1, by_batch=False):
    """A run of a preset, what the formula says in words, so that a record is of this formula and no later one; the
    micro-batch in smaller parts leaves room for others beside it."""
    batch = preset(depth)[1]["tokens_per_step"]
    size = f"--batch_size {micro_batch(depth) // parts} --total_batch_size {batch}"
    return Run(kind, f"d{depth}_fast",
               f"--model d{depth}_fast {size} {typed_rates(depth, factor, by_batch)} {flags} {SHAPE}")


def typed_rates(depth, factor=1, by_batch=False):
    """The formula's rates by a factor, and its decay; or, of another formula, with these by the root of the batch."""
    recipe = preset(depth)[1]
    root = math.sqrt(recipe["tokens_per_step"] / 65536) if by_batch else 1
    typed = " ".join(f"--{name} {factor * recipe[name] * (root if name != 'scalar_lr' else 1):.6g}" for name in RATES)
    return f"{typed} --weight_decay {root * recipe['weight_decay']:.6g}"


def rates(depth, factor, by_batch=False):
    steps = round(SHORT / preset(depth)[1]["tokens_per_step"])
    return fast("rates", depth, f"--num_iterations {steps} --val_loss_every 0", 2, factor, by_batch)


def in_minutes(depth, by_batch=False):
    return fast("minutes", depth, f"--minutes {MINUTES[depth]:g} --val_loss_every 0", by_batch=by_batch)


def plain(depth, rate):
    """d12 with the preset's depth and width, and AdamW: as many tokens a step, the same schedule."""
    network, recipe = preset(depth)
    width = network["n_embd"]
    flags = (f"--model d12 --n_layer {depth} --n_embd {width} --n_head {width // 64} --learning_rate {rate} "
             f"--warmup_iters 45 --warmdown_fraction 0.6 --min_lr_fraction 0.1 --shuffle --minutes {MINUTES[depth]:g} "
             f"--batch_size {micro_batch(depth)} --total_batch_size {recipe['tokens_per_step']} --val_loss_every 0")
    return Run("minutes", f"d{depth}", f"{flags} {SHAPE}")


def scale(depth):
    return fast("scale", depth, f"--num_iterations {preset(depth)[1]['num_iterations']} --val_loss_every 0")


def card(name, place):
    typed = typed_rates(12) if name == "d12_fast" else ""
    return Run("card", name, f"{CARDS[name]} {typed} {place} --val_loss_every 0 --shuffle {SHAPE}")


def runs(kinds, seeds, depths=None):
    """[(Run, seed)] in the order of running, of all depths or of these; only the rates have more than one seed."""
    tested, scaled = ([depth for depth in its if depth in (depths or its)] for its in (DEPTHS, SCALED))
    every = dict(
        rates=[(rates(depth, factor), seed) for seed in range(1, seeds + 1) for depth in tested for factor in FACTORS]
        + [(rates(depth, factor, True), 1) for depth in tested if depth in BY_BATCH for factor in FACTORS],
        minutes=[(run, 1) for depth in tested
                 for run in (in_minutes(depth), *(plain(depth, rate) for rate in PLAIN_RATES[depth]))],
        scale=[(scale(depth), 1) for depth in scaled],
        card=[(card(name, place), 1) for name in CARDS for place in (WHOLE, CAPPED)],
    )
    return [task for kind in kinds for task in every[kind]]


def expected_seconds(run, rows, sharing=0, processes=1):
    """What a run will take, by its minutes or its FLOPs."""
    typed = measuring.last_of(run.flags)
    if "minutes" in typed:
        return STARTING + 60 * float(typed["minutes"])
    depth = int(re.search(r"d(\d+)|nocap", run.name)[1] or 12)
    return STARTING + run.tokens * size_of(depth)[1] * (1 + sharing) / (FLOPS * processes)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def rates_table(rows):
    """The mean losses over the seeds that all three factors have, so that a row's cells can be compared."""
    lines = []
    for depth in DEPTHS:
        for by_batch in (False, True)[:2 if depth in BY_BATCH else 1]:
            each = [losses(rows, rates(depth, factor, by_batch)) for factor in FACTORS]
            seeds = set.intersection(*map(set, each))
            name = f"`d{depth}_fast`" + ", rates by the root of the batch" * by_batch
            if seeds:
                means = (mean([its[seed] for seed in seeds]) for its in each)
                lines.append([name, str(len(seeds)), *(f"{value:.4f}" for value in means)])
    return lines and table(["preset", "seeds", *(f"rates x {factor:g}" for factor in FACTORS)], lines)


def minutes_table(rows):
    lines = []
    for depth in DEPTHS:
        each = [(in_minutes(depth), "the formula's"), (in_minutes(depth, by_batch=True), "by the root of the batch")]
        each = each[:2 if depth in BY_BATCH else 1] + [(plain(depth, rate), rate) for rate in PLAIN_RATES[depth]]
        lines += [[f"`{run.name}`", rate, f"{MINUTES[depth]:g}", f"{r['curve'][-1][1] / 1e6:.1f}",
                   f"{r['tokens_per_second']:,.0f}", f"{r['val_loss']:.4f}"]
                  for run, rate in each for r in rows if run.is_of(r) and not r["sharing"]]
    return lines and table(["network", "learning rate", "minutes", "M tokens", "tokens/s", "loss"], lines)


def scaled(rows):
    """[(depth, tokens, FLOPs of training, loss)] of the presets' full lengths."""
    each = []
    for depth in SCALED:
        for loss in list(losses(rows, scale(depth)).values())[:1]:
            recipe = preset(depth)[1]
            tokens = recipe["tokens_per_step"] * recipe["num_iterations"]
            each.append((depth, tokens, tokens * size_of(depth)[1], loss))
    return each


def power_law(points):
    """(a, b) of loss = a FLOPs^-b, by least squares of the logarithms."""
    x, y = ([math.log(z) for z in values] for values in zip(*points))
    slope = sum((u - mean(x)) * (v - mean(y)) for u, v in zip(x, y)) / sum((u - mean(x)) ** 2 for u in x)
    return math.exp(mean(y) - slope * mean(x)), -slope


def scale_table(rows):
    each = scaled(rows)
    lines = [[f"`d{depth}_fast`", f"{size_of(depth)[0] / 1e6:.1f}", f"{tokens / 1e6:.1f}", f"{flops / 1e15:.2f}",
              f"{loss:.4f}"] for depth, tokens, flops, loss in each]
    if len(each) > 2:
        a, b = power_law([(flops, loss) for _, _, flops, loss in each])
        lines.append(["the line", "", "", f"{a:.2f} FLOP^-{b:.4f}", ""])
    return lines and table(["preset", "M parameters", "M tokens", "PFLOP", "loss"], lines)


def card_table(rows):
    lines = []
    for name in CARDS:
        for place, words in PLACES.items():
            lines += [[f"`{name}`", words, f"{r['peak_mem_MB']:,}", f"{r['tokens_per_second']:,.0f}",
                       f"{r['val_loss']:.4f}"] for r in rows if card(name, place).is_of(r)]
    return lines and table(["recipe", "on", "MiB", "tokens/s", "loss"], lines)


def tables(rows):
    return [made for make in (rates_table, minutes_table, scale_table, card_table) if (made := make(rows))]


def plot():
    """Write curve.png; the exit code."""
    pyplot = measuring.pyplot()
    if not pyplot:
        return 2
    each = scaled(measuring.read(RESULTS))
    points = [(flops, loss) for _, _, flops, loss in each]
    if len(points) < 3:
        print("error: results.jsonl has fewer than three runs of scale; --only scale measures them", file=sys.stderr)
        return 2
    a, b = power_law(points)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(*zip(*points), marker="o", linestyle="", label="presets at their own lengths")
    axes.plot(*zip(*((flops, a * flops**-b) for flops, _ in points)), label=f"{a:.2f} FLOP^-{b:.4f}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="validation loss, nats a token")
    for depth, _, *point in each:
        axes.annotate(f"d{depth}_fast", point, xytext=(6, 6), textcoords="offset points")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:.1f}")
    axes.legend()
    figure.savefig(CURVE, dpi=150)
    print(f"{CURVE.name} has {len(points)} runs")
    return 0


def make_parser():
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    measuring.add_flags(parser, "runs of scale", "the rates", 2)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="these alone")
    parser.add_argument("--depths", type=int, nargs="+", choices=SCALED, help="of rates, minutes and scale these alone")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="each run on N GPUs by torchrun [1]")
    parser.add_argument("--keep", metavar="DIR", help="keep the runs' folders there: what was stopped goes on")
    return parser


def main(argv=None):
    """The exit code: 1 if a run failed."""
    begun, args = time.monotonic(), make_parser().parse_args(argv)
    if args.plot:
        return plot()
    failed = 0
    if not args.table:
        if {"minutes", "card"} & {*args.only} and max(args.parallel or 1, args.processes) > 1:
            print("error: minutes and card are timed, each run on one GPU of its own; with --parallel N or --processes "
                  "N name rates or scale with --only", file=sys.stderr)
            return 2
        if args.processes > 1 and args.parallel:
            print(f"error: --processes {args.processes} takes all GPUs for each run; drop --parallel", file=sys.stderr)
            return 2
        failed = measuring.run_what_is_missing(
            runs(args.only, args.seeds, args.depths), RESULTS, args, begun, processes=args.processes, keep=args.keep,
            expected=partial(expected_seconds, processes=args.processes),
        )
    measuring.print_tables(RESULTS, tables)
    return 1 if failed else 0


if __name__ == "__main__":
    measuring.run(main, RESULTS)
