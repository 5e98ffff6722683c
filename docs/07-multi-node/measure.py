#!/usr/bin/env python3
"""Measure what a second GPU gives, and FSDP2 against DDP; print the tables of README.md.

    python docs/07-multi-node/measure.py --input_bin 'bench/train_*.bin' --input_val_bin 'bench/val_*.bin'
    python docs/07-multi-node/measure.py --only scaling --budget_s 600 --input_bin ... --input_val_bin ...
    python docs/07-multi-node/measure.py --table

The first runs what results.jsonl does not hold yet for this kind of GPU and appends a record each: d12, d12_fast and
d24 on one GPU and on two at equal tokens a step; d12's gradients in bf16; gpt2-xl with ddp and with fsdp; a profile of
d12 on two. --only picks kinds, --budget_s says when to begin no more.
"""
import gzip
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
import estimate  # noqa: E402
import measuring  # noqa: E402
from measuring import Run, table  # noqa: E402

PROCESSES = 2
SHAPE = "--sequence_length 1024 --no_save_checkpoints --val_tokens 524288 --log_every 20"
SCALED = {  # a step of so many tokens, in micro-batches of at most so many sequences a GPU; steps
    "d12": (131_072, 64, 160), "d12_fast": (65_536, 64, 200), "d24": (131_072, 32, 60),
}
RATES = {"d12": "--learning_rate 1e-3 --warmup_iters 40", "d24": "--learning_rate 7e-4 --warmup_iters 20"}
LARGE = ("--model gpt2-xl --dropout 0 --batch_size 8 --total_batch_size 65536 --num_iterations 40 --learning_rate 2e-4 "
         "--warmup_iters 10 --val_loss_every 20")
KINDS = ("scaling", "bf16", "fsdp", "profile")
FLOPS, STARTING = 3e14, 40  # a second and GPU, and seconds beyond those of training: what a run is expected to take
MUST = 1.90  # times one GPU's speed


def scaled(name, processes, dtype="fp32"):
    """A preset on so many GPUs. A run on several says how, so that no record of one is taken for the other's."""
    tokens, most, steps = SCALED[name]
    size = min(most, tokens // 1024 // processes)
    flags = (f"--model {name} --batch_size {size} --total_batch_size {tokens} --num_iterations {steps} "
             f"--val_loss_every {steps // 4} {RATES.get(name, '')} {SHAPE}")
    how = f" --parallel ddp --gradient_dtype {dtype}" * (processes > 1)
    return Run("scaling" if dtype == "fp32" else "bf16", name, " ".join(flags.split()) + how)


def large(parallel):
    return Run("fsdp", "gpt2-xl", f"{LARGE} {SHAPE} --parallel {parallel} --gradient_dtype fp32")


def profiled():
    """d12 on two GPUs, three of its steps traced."""
    short = " --num_iterations 15 --warmup_iters 5 --val_loss_every 0 --profile"
    return Run("profile", "d12", scaled("d12", PROCESSES).flags + short)


def runs(kinds, processes):
    """The runs on so many GPUs."""
    every = dict(
        scaling=[scaled(name, processes) for name in SCALED],
        bf16=[scaled("d12", processes, "bf16")] * (processes > 1),
        fsdp=[large(parallel) for parallel in ("ddp", "fsdp")] * (processes > 1),
        profile=[],
    )
    return [(run, 1) for kind in kinds for run in every[kind]]


def expected_seconds(run, rows, sharing=0, processes=1):
    """What a run will take, by its FLOPs."""
    import torch
    import train_gpt2_mod as script

    with torch.device("meta"):
        flops = script.GPT(script.GPTConfig(**script.preset(run.name)[0])).flops_per_token(1024)
    return STARTING + run.tokens * flops / (FLOPS * processes)


# ----------------------------------------------------------------------------------------------------------------------
# A profile: how much of the communication is hidden


def milliseconds(spans):
    """Of the union of [(begin, end)] in microseconds."""
    total, reached = 0.0, -1.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1000


def communication(events):
    """(Milliseconds in which a kernel of NCCL's ran, those of them in which no other did) of a trace's events."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    ours, others = ([(e["ts"], e["ts"] + e["dur"]) for e in kernels if ("nccl" in e["name"].lower()) == nccl]
                    for nccl in (True, False))
    return milliseconds(ours), milliseconds(ours + others) - milliseconds(others)


def profile(data):
    """One record of the run that is traced: of the steps in the trace together."""
    run = profiled()
    with tempfile.TemporaryDirectory() as logs:
        command = [*measuring.torchrun(PROCESSES), measuring.SCRIPT, *run.flags.split(), *data, "--output_dir", logs]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        traces = sorted(Path(logs).glob("*/rank*.trace.json.gz"))
        found = [communication(json.loads(gzip.open(path).read())["traceEvents"]) for path in traces]
    import torch

    return dict(**run._asdict(), seed=1, ranks=found, processes=PROCESSES, script_sha256=measuring.source(),
                gpu=measuring.gpu_name(), torch=torch.__version__)


def profile_if_missing(args):
    """Append its record to the file of results; 1 if it failed."""
    if of([r for r in measuring.read(RESULTS) if r["gpu"] == measuring.gpu_name()], profiled()):
        return 0
    try:
        measuring.append(RESULTS, profile([word for name in ("input_bin", "input_val_bin") if getattr(args, name)
                                           for word in (f"--{name}", getattr(args, name))]))
    except subprocess.CalledProcessError as error:
        print(f"failed: profile d12: {measuring.why(error)}", flush=True)
        return 1
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def of(rows, run):
    return next((r for r in rows if run.is_of(r)), None)


def apart(a, b):
    """The largest difference of two validation curves at the same steps."""
    losses = [{step: loss for step, *_, loss in r["curve"]} for r in (a, b)]
    return max(abs(losses[0][step] - losses[1][step]) for step in losses[0].keys() & losses[1].keys())


def scaling_table(rows):
    lines, links = [], estimate.places(estimate.make_parser().parse_args(["--table"]))
    on_paper, inside = estimate.networks(), next(iter(links.values()))
    for name, dtype in [*((name, "fp32") for name in SCALED), ("d12", "bf16")]:
        one, two = of(rows, scaled(name, 1)), of(rows, scaled(name, PROCESSES, dtype))
        if one and two:
            tokens, most, _ = SCALED[name]
            expected = PROCESSES * estimate.efficiency(on_paper[name], tokens, 1024 * most, PROCESSES,
                                                       4 if dtype == "fp32" else 2, inside)
            times = two["tokens_per_second"] / one["tokens_per_second"]
            lines.append([f"`{name}`", dtype, f"{tokens:,}", f"{one['tokens_per_second']:,.0f}",
                          f"{two['tokens_per_second']:,.0f}", f"{times:.3f}", f"{expected:.3f}",
                          "yes" if times >= MUST else "no", f"{one['val_loss']:.4f}", f"{two['val_loss']:.4f}",
                          f"{apart(one, two):.4f}"])
    return lines and table(["preset", "gradients", "tokens a step", "tokens/s, 1 GPU", "2 GPUs", "times", "on paper",
                            f"at least {MUST:.2f}", "loss, 1 GPU", "2 GPUs", "curves apart by"], lines)


def fsdp_table(rows):
    lines = [[f"`gpt2-xl`, {parallel}", f"{r['peak_mem_MB']:,}", f"{r['tokens_per_second']:,.0f}",
              f"{r['val_loss']:.4f}"] for parallel in ("ddp", "fsdp") if (r := of(rows, large(parallel)))]
    return lines and table(["on 2 GPUs", "MiB a GPU", "tokens/s", "loss"], lines)


def profile_table(rows):
    row = of(rows, profiled())
    ranks = row["ranks"] if row else []
    lines = [[str(rank), f"{every:.1f}", f"{alone:.1f}"] for rank, (every, alone) in enumerate(ranks)]
    return lines and table(["rank", "ms of NCCL's kernels", "of them with no other kernel"], lines)


def tables(rows):
    return [made for make in (scaling_table, fsdp_table, profile_table) if (made := make(rows))]


def make_parser():
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the tables of results.jsonl and stop")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="these alone")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--input_bin", help="training shards, as train_gpt2_mod.py takes them")
    parser.add_argument("--input_val_bin", help="validation shards")
    return parser


def main(argv=None):
    """The exit code: 1 if a run failed, 2 if there are not two GPUs."""
    begun, args, failed = time.monotonic(), make_parser().parse_args(argv), 0
    if not args.table:
        import torch

        measuring.gpu_name()
        if torch.cuda.device_count() < PROCESSES:
            print(f"error: {torch.cuda.device_count()} GPU, and these figures are of two; --table prints those that "
                  "are there", file=sys.stderr)
            return 2
        args.parallel = None
        for kind in args.only:
            for processes in (PROCESSES, 1):
                failed += measuring.run_what_is_missing(
                    runs([kind], processes), RESULTS, args, begun, processes=processes,
                    expected=partial(expected_seconds, processes=processes))
        if "profile" in args.only and time.monotonic() + STARTING < begun + args.budget_s:
            failed += profile_if_missing(args)
    measuring.print_tables(RESULTS, tables)
    return 1 if failed else 0


if __name__ == "__main__":
    measuring.run(main, RESULTS)
