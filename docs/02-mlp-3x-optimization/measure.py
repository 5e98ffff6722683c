#!/usr/bin/env python3
"""Measure d12_mlp3x against d12, and print the tables of README.md.

    python docs/02-mlp-3x-optimization/measure.py --input_bin 'bench/train_*.bin' --input_val_bin 'bench/val_*.bin'
    python docs/02-mlp-3x-optimization/measure.py --table

The first runs what results.jsonl does not hold yet for this GPU, a minute or two a run on an H100, and appends a record
each; the second only prints.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.jsonl"
sys.path.insert(0, str(HERE.parent))
import measuring  # noqa: E402
from measuring import gpu_name, table  # noqa: E402

# The comparison first, at one learning rate and with two seeds; then what shows where that rate stands.
RUNS = [(model, 6e-4, seed) for seed in (1, 2) for model in ("d12", "d12_mlp3x")]
RUNS += [("d12", lr, 1) for lr in (3e-4, 1e-3, 2e-3, 4e-3)] + [("d12_mlp3x", 2e-3, 1)]
FLAGS = (
    "--batch_size 64 --sequence_length 1024 --total_batch_size 131072 --num_iterations 230 --warmup_iters 23 "
    "--warmdown_iters 77 --val_loss_every 0 --no_save_checkpoints --log_every 115"
)


def results():
    return measuring.read(RESULTS)


def measure(model, lr, seed, data):
    """Run the script once; the figures of its last step and its validation."""
    import torch

    with tempfile.TemporaryDirectory() as logs:
        flags = ["--model", model, "--learning_rate", str(lr), "--seed", str(seed), *FLAGS.split(), *data]
        subprocess.run([sys.executable, ROOT / "train_gpt2_mod.py", *flags, "--output_dir", logs], check=True)
        records = [json.loads(line) for line in next(Path(logs).glob("*/metrics.jsonl")).read_text().splitlines()]
    return record(model, lr, seed, records, gpu_name(), torch.__version__)


def record(model, lr, seed, records, gpu, torch_version):
    step = [r for r in records if "train_loss" in r][-1]
    return dict(
        model=model, learning_rate=lr, seed=seed, val_loss=records[-1]["val_loss"], tokens=records[-1]["tokens"],
        step_avg_ms=step["step_avg_ms"], tokens_per_second=step["tokens"] / step["step"] / step["step_avg_ms"] * 1000,
        mfu=step["mfu"], peak_mem_MB=step["peak_mem_MB"], gpu=gpu, torch=torch_version,
    )


def tables(rows):
    """The two Markdown tables: the comparison, and the losses by learning rate."""
    heads = ("model", "seed", "step, ms", "tokens/s", "MFU", "peak memory, MiB", "validation loss")
    rows = sorted(rows, key=lambda r: (r["model"], r["learning_rate"], r["seed"]))
    compared = [[f"`{r['model']}`", str(r["seed"]), f"{r['step_avg_ms']:.1f}", f"{r['tokens_per_second']:,.0f}",
                 f"{100 * r['mfu']:.1f}%", f"{r['peak_mem_MB']:,}", f"{r['val_loss']:.4f}"]
                for r in rows if r["learning_rate"] == 6e-4]
    rates, by_rate = sorted({r["learning_rate"] for r in rows}), []
    for model in sorted({r["model"] for r in rows}):
        mine = [r for r in rows if r["model"] == model]
        losses = [[f"{r['val_loss']:.3f}" for r in mine if r["learning_rate"] == lr] for lr in rates]
        by_rate.append([f"`{model}`", *(", ".join(each) or "-" for each in losses)])
    return table(heads, compared) + "\n\n" + table(["model", *(f"{lr:g}" for lr in rates)], by_rate)


def main(argv=None):
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="only print the tables of results.jsonl")
    parser.add_argument("--input_bin", help="training shards, as train_gpt2_mod.py takes them")
    parser.add_argument("--input_val_bin", help="validation shards")
    args = parser.parse_args(argv)
    if not args.table:
        data = [word for flag in ("input_bin", "input_val_bin") if (value := getattr(args, flag))
                for word in (f"--{flag}", value)]
        gpu = gpu_name()
        done = {(r["model"], r["learning_rate"], r["seed"]) for r in results() if r["gpu"] == gpu}
        for run in RUNS:
            if run not in done:
                measuring.append(RESULTS, measure(*run, data))
    for gpu, rows in measuring.by_gpu(results()):
        print(f"{gpu}\n\n{tables(rows)}\n")


if __name__ == "__main__":
    measuring.run(main, RESULTS)
