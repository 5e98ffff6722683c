#!/usr/bin/env python3
"""Measure the model-size document's networks, and where fp8 begins to pay; print README.md's tables.

    python docs/03-model-sizes/measure.py --input_bin 'sized/train_*.bin' --gpt2_bin 'fineweb/train_*.bin'
    python docs/03-model-sizes/measure.py --table

The first runs what results.jsonl does not hold yet for this GPU, half a minute to a minute and a half a run on an H100,
appends a record each, and writes docs/measured.json, from which --dry_run tells hours. The shards of --input_bin have
a vocabulary of 32,768, those of --gpt2_bin GPT-2's. The second only prints.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS, MEASURED = HERE / "results.jsonl", HERE.parent / "measured.json"
sys.path[:0] = [str(ROOT), str(HERE.parent)]
import measuring  # noqa: E402
from measuring import table  # noqa: E402

# Preset, and what the document says of it: parameters, tokens a second with fp8 (of another GPU).
SIZES = {
    "sized_small": ("125 M", "130-150 k"), "sized_current": ("180 M", "89-91 k"),
    "sized_medium_deep": ("140 M, 155 M", "110-125 k, 100-115 k"), "sized_wide_shallow": ("130 M", "115-130 k"),
    "sized_medium": ("350 M", "45-55 k"), "sized_16_layers": ("140 M", "115-130 k"),
    "sized_24_layers": ("165 M", "95-105 k"), "sized_40_layers": ("190 M", "80-85 k"), "sized_16gb": ("115 M", "-"),
}
WIDTHS = (768, 1024, 1536, 2048, 3072)
COMMON = "--sequence_length 1024 --val_loss_every 0 --no_save_checkpoints --seed 1"
STEPS = "--batch_size 16 --total_batch_size 65536 --num_iterations 40"
SIZED_RUNS = [f"--model {model} --precision {precision} {STEPS}" for model in SIZES for precision in ("bf16", "fp8")]
WIDTH_RUNS = [f"--model sized --n_layer 4 --n_embd {width} --precision {precision} {STEPS}"
              for width in WIDTHS for precision in ("bf16", "fp8")]
GPT2_RUNS = [
    "--model gpt2 --precision bf16 --batch_size 32 --total_batch_size 65536 --num_iterations 190 --warmup_iters 20 "
    "--schedule cosine --min_lr_fraction 0.1",
    "--model d12 --precision bf16 --batch_size 32 --total_batch_size 65536 --num_iterations 30",
    "--model d12 --precision bf16 --batch_size 32 --total_batch_size 65536 --num_iterations 30 "
    "--gradient_checkpointing",
    "--model d12_mla --precision bf16 --batch_size 32 --total_batch_size 65536 --num_iterations 30",
]


def results():
    return measuring.read(RESULTS)


def resolved(flags):
    """(GPTConfig, TrainConfig, model on the meta device) of a run's flags."""
    import torch

    import train_gpt2_mod as script

    config, run, _ = script.resolve(script.parse_flags(flags.split() + COMMON.split()), script.ANY_MACHINE)
    with torch.device("meta"):
        return config, run, script.GPT(config)


def measure(flags, pattern):
    """Run the script once; the figures of its last step."""
    import torch

    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, ROOT / "train_gpt2_mod.py", *flags.split(), *COMMON.split(), "--input_bin", pattern,
                   "--input_val_bin", "", "--log_every", "20", "--output_dir", logs]
        subprocess.run(command, check=True)
        records = [json.loads(line) for line in next(Path(logs).glob("*/metrics.jsonl")).read_text().splitlines()]
    config, run, model = resolved(flags)
    first, last = records[0], records[-1]
    return dict(
        flags=flags, model=run.model, precision=config.precision, n_embd=config.n_embd, batch_size=run.batch_size,
        parameters=model.parameter_count(), flops_per_token=model.flops_per_token(run.sequence_length),
        tokens_per_second=last["tokens_per_second"], mfu=last["mfu"], peak_mem_MB=last["peak_mem_MB"],
        first_step_s=first["step_ms"] / 1000, first_loss=first["train_loss"], last_loss=last["train_loss"],
        steps=last["step"], gpu=torch.cuda.get_device_name(), torch=torch.__version__,
    )


def write_measured():
    """docs/measured.json, the speeds that --dry_run goes by: this folder's results and the MLP experiment's."""
    rows = [dict(r, folder=HERE.name) for r in results()]
    other = HERE.parent / "02-mlp-3x-optimization"
    flags = "--model {} --precision bf16 --batch_size 64"
    for row in measuring.read(other / "results.jsonl"):
        if row["learning_rate"] == 6e-4 and row["seed"] == 1:
            flops = resolved(flags.format(row["model"]))[2].flops_per_token(1024)
            rows.append(dict(row, precision="bf16", flops_per_token=flops, batch_size=64, folder=other.name))
    names = ("gpu", "torch", "model", "precision", "batch_size", "flops_per_token", "tokens_per_second", "folder")
    lines = ",\n  ".join(json.dumps({name: row[name] for name in names}) for row in rows)
    measuring.write(MEASURED, f'{{"runs": [\n  {lines}\n]}}\n')


def figures(row):
    """Tokens a second, MFU and MiB of a run; dashes where it was not measured."""
    if row is None:
        return ["-"] * 3
    return [f"{row['tokens_per_second']:,.0f}", f"{100 * row['mfu']:.1f}%", f"{row['peak_mem_MB']:,}"]


def ratio(bf16, fp8):
    return f"{fp8['tokens_per_second'] / bf16['tokens_per_second']:.3f}" if bf16 and fp8 else "-"


def tables(rows):
    """The Markdown tables: the sizes, fp8 by width, GPT-2 and d12."""
    by = {r["flags"]: r for r in rows}
    sizes, widths, others = [], [], []
    for i, (model, (said, speed)) in enumerate(SIZES.items()):
        bf16, fp8 = (by.get(flags) for flags in SIZED_RUNS[2 * i : 2 * i + 2])
        count = resolved(SIZED_RUNS[2 * i])[2].parameter_count()
        sizes.append([f"`{model}`", f"{count:,}", said, *figures(bf16), *figures(fp8), ratio(bf16, fp8), speed])
    for i, width in enumerate(WIDTHS):
        bf16, fp8 = (by.get(flags) for flags in WIDTH_RUNS[2 * i : 2 * i + 2])
        widths.append([f"{width:,}", *figures(bf16)[:2], *figures(fp8)[:2], ratio(bf16, fp8)])
    for r in filter(None, map(by.get, GPT2_RUNS)):
        others.append([f"`{r['model']}`" + ", checkpointing" * ("checkpointing" in r["flags"]), f"{r['parameters']:,}",
                       *figures(r), f"{r['first_loss']:.3f}", f"{r['last_loss']:.3f}", str(r["steps"])])
    return [
        table(["preset", "parameters", "the document", "bf16 tokens/s", "MFU", "MiB", "fp8 tokens/s", "MFU", "MiB",
               "fp8 / bf16", "the document"], sizes),
        table(["n_embd", "bf16 tokens/s", "MFU", "fp8 tokens/s", "MFU", "fp8 / bf16"], widths),
        table(["preset", "parameters", "tokens/s", "MFU", "MiB", "loss of step 1", "last loss", "its step"], others),
    ]


def main(argv=None):
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the tables of results.jsonl and stop")
    parser.add_argument("--input_bin", help="training shards of a vocabulary of 32,768")
    parser.add_argument("--gpt2_bin", help="training shards of GPT-2's vocabulary")
    args = parser.parse_args(argv)
    if not args.table:
        gpu = measuring.gpu_name()
        runs = [(flags, args.input_bin) for flags in SIZED_RUNS] + [(flags, args.gpt2_bin) for flags in GPT2_RUNS]
        runs += [(flags, args.input_bin) for flags in WIDTH_RUNS]
        done = {r["flags"] for r in results() if r["gpu"] == gpu}
        for flags, pattern in runs:
            if flags not in done and pattern:
                measuring.append(RESULTS, measure(flags, pattern))
        write_measured()
    for gpu, rows in measuring.by_gpu(results()):
        print(f"{gpu}\n\n" + "\n\n".join(tables(rows)) + "\n")


if __name__ == "__main__":
    measuring.run(main, RESULTS)
