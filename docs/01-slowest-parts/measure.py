#!/usr/bin/env python3
"""Measure the speed of a step, and where it goes; print README.md's tables.

    python docs/01-slowest-parts/measure.py --input_bin 'fineweb/train_*.bin' --input_val_bin 'fineweb/val_*.bin'
    python docs/01-slowest-parts/measure.py --only table profile_d12 --input_bin ... --input_val_bin ...
    python docs/01-slowest-parts/measure.py --table

The first runs the EXPERIMENTS, PROFILES and CURVES that results.jsonl does not hold --runs times for this GPU and this
version of the script, a minute or two each on an H100, and appends what it finds; --only picks some by name. The shards
have GPT-2's vocabulary; CURVES needs git, for an earlier version of the script. The last only prints.
"""
import collections
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.jsonl"
sys.path[:0] = [str(ROOT), str(HERE.parent)]
import measuring  # noqa: E402
from measuring import table  # noqa: E402

COMMON = "--sequence_length 1024 --total_batch_size 131072 --num_iterations 1000 --seed 1"
WINDOWS = "--warmup 6 --windows 3 --steps 8"
D12, PLAIN = "--model d12 --batch_size 64", "--model d12_post_norm_qk_norm --batch_size 64"  # the second without GQA
LONG = "--sequence_length 4096 --batch_size 16"

# name -> (settings of tools/bench.py, the command lines that take turns)
EXPERIMENTS = {
    "cold": ("--windows 1", [D12]),  # with empty caches
    "table": ("--builds 2", [D12, "--model d12 --batch_size 32", "--model d12 --batch_size 16",
                             f"{D12} --precision fp8_head", f"{D12} --mtp_enabled --mtp_max_steps 4",
                             "--model d12_mlp3x --batch_size 64"]),
    "gqa": ("--builds 2", [PLAIN, "--model d12_gqa --batch_size 64"]),
    "long": ("--builds 2", [f"{PLAIN} {LONG}", f"{PLAIN} {LONG} --window 128"]),
    "checkpointing": ("--builds 2", [D12, f"{D12} --gradient_checkpointing"]),
    "validation": ("--validation --data_share", [f"{D12} --val_tokens 10485760"]),
    "card_of_24_gib": ("--memory_gib 22 --windows 2", ["--model d12 --batch_size 32 --total_batch_size 524288"]),
    "fp8": ("", [D12, f"{D12} --precision fp8"]),
    "attention": ("", [f"{D12} --attention {kernel}" for kernel in ("cudnn", "flash")]),
    "compile_mode": ("", [D12, f"{D12} --compile_mode reduce-overhead"]),
    "d24": ("", ["--model d24 --batch_size 16"]),
}
PROFILES = {f"profile_{model}": f"--model {model} --batch_size {size}"
            for model, size in (("d12", 64), ("d12_mlp3x", 64), ("d24", 16))}
EARLIER = "4862f74"  # all logits at once, the stream in fp32
CURVES = {"losses": "--model d12 --batch_size 4 --total_batch_size 4096 --sequence_length 1024 --num_iterations 200 "
                    "--warmup_iters 20 --learning_rate 6e-4 --seed 1 --val_loss_every 0 --no_save_checkpoints"}
PARTS = ("embedding", "norms and residual", "attention", "mlp", "head and loss", "gradients", "optimizer", "data",
         "communication", "not attributed", "host gaps")


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm")


def results():
    return measuring.read(RESULTS)


def bench(name, data):
    """Run tools/bench.py once; a record of each command line."""
    settings, lines = EXPERIMENTS[name]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.jsonl"
        command = [sys.executable, ROOT / "tools/bench.py", *WINDOWS.split(), *settings.split(), "--json", found]
        command += [*lines, "--", *COMMON.split(), *data]
        caches = dict(TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=folder) if name == "cold" else {}
        subprocess.run(command, check=True, env={**os.environ, **caches})
        return [json.loads(line) for line in found.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# A trace of --profile, by part


def read_trace(path):
    return json.loads(gzip.open(path).read())["traceEvents"]


def enclosing(launches, calls):
    """For each launch {key: (time, thread)} the calls of its thread that are around it, outermost first."""
    threads = collections.defaultdict(list)
    for event in calls:
        threads[event["tid"]].append((event["ts"], 1, event))
    for key, (time, thread) in launches.items():
        threads[thread].append((time, 2, key))
    around = {}
    for entries in threads.values():
        open_calls = []
        for time, kind, item in sorted(entries, key=lambda entry: entry[:2]):
            open_calls = [event for event in open_calls if event["ts"] + event["dur"] >= time]
            if kind == 1:
                open_calls.append(item)
            else:
                around[item] = list(open_calls)
    return around


def part_of(kernel, calls, sizes):
    """The part of the step that a kernel works for: by the calls around its launch, the shapes of its product, and the
    operations in the name that torch.compile gave it."""
    name, words = kernel["name"].lower(), " ".join(event["name"].lower() for event in calls)
    if "memcpy htod" in name:
        return "data"
    if "nccl" in name:
        return "communication"
    if any(word in words for word in ("optimizer.step", "_foreach_norm", "linalg_vector_norm", "_foreach_mul")):
        return "optimizer"
    if "headloss" in words:
        return "head and loss"
    if any(word in name for word in ("cudnn", "flash", "fmha", "flex_attention")) or "attention" in words:
        return "attention"
    product = next((event for event in reversed(calls) if event["name"] in PRODUCTS), None)
    if product:
        shapes = [size for shape in product["args"].get("Input Dims", []) for size in shape if isinstance(size, int)]
        return "mlp" if any(size in sizes["mlp"] for size in shapes) else "attention"
    if "accumulategrad" in words or "zero_" in words or ("functor_add" in name and "triton" not in name):
        return "gradients"  # also those of a weight that is used twice
    for part, marks in (("mlp", ("gelu", "silu", "relu")), ("embedding", ("embedding",)),
                        ("norms and residual", ("norm", "rsqrt", "pow", "mean")),
                        ("attention", ("cat", "split", "transpose", "neg", "cos", "sin")),
                        ("norms and residual", ("add", "mul", "_to_copy"))):
        if "triton" in name and any(mark in name for mark in marks):
            return part
    return "not attributed"


def milliseconds_by_part(events, sizes):
    """({part: ms a step}, {kernel that is not attributed: ms a step}) of a trace, without its first step, in which the
    profiler itself begins."""
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launches = {e["args"]["correlation"]: (e["ts"], e["tid"]) for e in events
                if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    calls = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation") and "dur" in e]
    around = enclosing(launches, calls)
    _, *later = sorted(e["ts"] for e in calls if e["name"].startswith("ProfilerStep#"))
    counted = {key for key, (time, _) in launches.items() if time >= later[0]}
    of_first = launches.keys() - counted
    parts, unknown = collections.Counter(), collections.Counter()
    end = begin = max(e["ts"] + e["dur"] for e in device if e["args"]["correlation"] in of_first)
    for event in sorted((e for e in device if e["args"]["correlation"] in counted), key=lambda e: e["ts"]):
        part = part_of(event, around[event["args"]["correlation"]], sizes)
        parts[part] += event["dur"]
        if part == "not attributed":
            unknown[event["name"]] += event["dur"]
        parts["host gaps"] += max(0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    return ({part: parts[part] / 1000 / len(later) for part in PARTS} | {"step": (end - begin) / 1000 / len(later)},
            {name: us / 1000 / len(later) for name, us in unknown.most_common(8)})


def ceilings():
    """(FLOP/s of a large bf16 product, bytes/s of a large copy) of this GPU."""
    import torch
    from torch.utils.benchmark import Timer

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    product = Timer("a @ b", globals=dict(a=a, b=b)).blocked_autorange(min_run_time=1).median
    copy = Timer("y.copy_(x)", globals=dict(x=x, y=torch.empty_like(x))).blocked_autorange(min_run_time=1).median
    return 2 * 8192**3 / product, 4 * 2**30 / copy


def floors(model, config, run, flops_rate, byte_rate):
    """{part: ms} below which no step in bf16 comes: its products, attention causal, at the rate of a large one; or what
    it must move at least, at the rate of a copy."""
    tokens, width, parameters = run.tokens_per_step, config.n_embd, model.parameter_count()
    flops = model.flops_by_part(run.sequence_length)
    core = sum(block.attn.flops(run.sequence_length) for block in model.transformer.h)
    micro_steps = run.grad_accumulation_steps
    moved = {
        "embedding": tokens * width * (4 + 2 + 2 + 4),  # rows read, stream written; its gradient read, rows written
        # Forward x and what is added read, x and its norm written; backward the norm's x and gradient and the stream's.
        "norms and residual": (2 * config.n_layer + 1) * tokens * width * 2 * (4 + 4),
        "gradients": (micro_steps - 1) * parameters * 12,
        "optimizer": parameters * (28 + 4 + 8),  # AdamW's; the gradient's norm and its scaling
        "data": tokens * 16,
    }
    products = {"attention": flops["attention"] - core / 2, "mlp": flops["mlp"], "head and loss": flops["head"]}
    ms = {part: 1000 * tokens * count / flops_rate for part, count in products.items()}
    return ms | {part: 1000 * count / byte_rate for part, count in moved.items()}


def profile(name, data):
    """Run the script with --profile; one record."""
    import torch

    import train_gpt2_mod as script

    flags = f"{PROFILES[name]} {COMMON} --num_iterations 15 --profile --val_loss_every 0 --no_save_checkpoints".split()
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, ROOT / "train_gpt2_mod.py", *flags, *data, "--output_dir", logs]
        subprocess.run(command, check=True)
        events = read_trace(next(Path(logs).glob("*/rank0.pt.trace.json.gz")))
    config, run, _ = script.resolve(script.parse_flags(flags), script.ANY_MACHINE)
    with torch.device("meta"):
        model = script.GPT(config)
    hidden = {config.ffn_hidden, 2 * config.ffn_hidden}
    parts, unknown = milliseconds_by_part(events, dict(mlp=hidden))
    flops_rate, byte_rate = ceilings()
    return dict(flags=" ".join(flags), parts=parts, unknown=unknown, flops_rate=flops_rate, byte_rate=byte_rate,
                floors=floors(model, config, run, flops_rate, byte_rate), gpu=torch.cuda.get_device_name(),
                torch=torch.__version__)


def curves(name, data):
    """The losses of an earlier version of the script and of this one, in bf16 and fp32; one record."""
    import torch

    found, runs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier.py"
        earlier.write_bytes(subprocess.run(["git", "-C", ROOT, "show", f"{EARLIER}:train_gpt2_mod.py"], check=True,
                                           capture_output=True).stdout)
        for version, path in (("earlier", earlier), ("now", ROOT / "train_gpt2_mod.py")):
            for precision in ("bf16", "fp32"):  # all at once: nothing is timed here
                logs = Path(folder) / f"{version}_{precision}"
                command = [sys.executable, path, *CURVES[name].split(), "--precision", precision, *data, "--output_dir"]
                runs[logs] = subprocess.Popen([*command, logs])
        for logs, run in runs.items():
            if run.wait():
                raise subprocess.CalledProcessError(run.returncode, run.args)
            lines = next(logs.glob("*/metrics.jsonl")).read_text().splitlines()
            found[logs.name] = [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]
    return dict(flags=CURVES[name], losses=found, gpu=torch.cuda.get_device_name(), torch=torch.__version__)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def speeds(rows):
    lines = []
    for r in rows:
        extra = []
        if r["val_tokens_per_second"]:
            extra.append(f"validation {r['val_tokens_per_second']:,.0f} tokens/s")
        if r["data_share"] is not None:
            extra.append(f"data {100 * r['data_share']:.2f}%")
        lines.append([r["name"], f"`{r['line']}`", f"{r['step_ms']:.2f}", f"{r['tokens_per_second']:,.0f}",
                      f"{100 * r['mfu']:.1f}%", f"{r['peak_mem_MB']:,}",
                      f"{r['first_step_s']:.1f}" if r["first_step_s"] else "-",
                      f"{r['ratio']:.3f}", ", ".join(extra)])
    return table(["experiment", "flags", "step ms", "tokens/s", "MFU", "MiB", "first step s", "ratio to its first line",
                  ""], lines)


def breakdown(row):
    parts, step = row["parts"], row["parts"]["step"]
    lines = [[part, f"{parts[part]:.2f}", f"{parts[part] / step:.1%}",
              f"{row['floors'][part]:.2f}" if part in row["floors"] else "-"] for part in PARTS]
    lines.append(["step", f"{step:.2f}", "100%", "-"])
    return f"`{row['flags']}`\n\n" + table(["part", "ms", "of the step", "floor ms"], lines)


def differences(row):
    """How far two versions and two precisions are apart, over the steps."""
    lines, losses = [], row["losses"]
    for a, b in (("earlier_bf16", "now_bf16"), ("earlier_bf16", "earlier_fp32"), ("now_bf16", "now_fp32"),
                 ("earlier_fp32", "now_fp32")):
        apart = [abs(x - y) for x, y in zip(losses[a], losses[b], strict=True)]
        lines.append([f"{a.replace('_', ', ')} and {b.replace('_', ', ')}", f"{max(apart):.1e}",
                      f"{sum(apart) / len(apart):.1e}", f"{losses[a][-1]:.4f}", f"{losses[b][-1]:.4f}"])
    return f"`{row['flags']}`\n\n" + table(["losses of", "largest difference", "mean", "last of the one",
                                             "of the other"], lines)


def planned(rows):
    """The memory plan against what was measured."""
    import torch

    import train_gpt2_mod as script

    lines = []
    for r in rows:
        config, run, _ = script.resolve(script.parse_flags(r["flags"].split()), script.ANY_MACHINE)
        with torch.device("meta"):
            mib = sum(script.memory_plan(config, run, script.GPT(config)).values()) / 2**20
        lines.append([f"`{r['line']}`", f"{mib:,.0f}", f"{r['peak_mem_MB']:,}", f"{mib / r['peak_mem_MB'] - 1:+.1%}"])
    return table(["run", "planned MiB", "measured MiB", "difference"], lines)


def tables(rows):
    """The Markdown tables of a GPU's rows, of each name those of its newest version."""
    newest = {r["name"]: r["script_sha256"] for r in rows}
    rows = [r for r in rows if r["script_sha256"] == newest[r["name"]]]
    fast = [r for r in rows if r["name"] in EXPERIMENTS]
    found = [speeds(fast), planned(fast)] if fast else []
    return [*found, *(breakdown(r) for r in rows if "parts" in r), *(differences(r) for r in rows if "losses" in r)]


def main(argv=None):
    parser = measuring.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the tables of results.jsonl and stop")
    parser.add_argument("--only", nargs="+", choices=[*EXPERIMENTS, *PROFILES, *CURVES], help="these alone")
    parser.add_argument("--runs", type=int, default=2, help="of each [2]")
    parser.add_argument("--input_bin", help="training shards of GPT-2's vocabulary")
    parser.add_argument("--input_val_bin", help="validation shards")
    args = parser.parse_args(argv)
    if not args.table:
        gpu = measuring.gpu_name()
        data = [word for name in ("input_bin", "input_val_bin") if getattr(args, name)
                for word in (f"--{name}", getattr(args, name))]
        files = ("train_gpt2_mod.py", "fused_softmax.py")
        source = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in files)).hexdigest()
        for name in args.only or [*EXPERIMENTS, *PROFILES, *CURVES]:
            done = {r["number"] for r in results() if (r["name"], r["gpu"], r["script_sha256"]) == (
                name, gpu, source)}
            for number in range(len(done), args.runs):
                if name in EXPERIMENTS:
                    found = zip(EXPERIMENTS[name][1], bench(name, data))
                else:
                    found = [("", profile(name, data) if name in PROFILES else curves(name, data))]
                measuring.append(RESULTS, *(dict(row, name=name, line=line, number=number, script_sha256=source)
                                            for line, row in found))
    for gpu, rows in measuring.by_gpu(results()):
        print("\n\n".join([f"{gpu}, torch {rows[-1]['torch']}", *tables(rows)]) + "\n")


if __name__ == "__main__":
    measuring.run(main, RESULTS)
