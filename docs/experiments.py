#!/usr/bin/env python3
"""The experiments of docs/06 to docs/24 and docs/28, one table and one runner: what the owner's documents expect,
measured.

    python docs/experiments.py --plan
    python docs/experiments.py --only rmsnorm --input_bin 'bench/train_*.bin' --input_val_bin 'bench/val_*.bin'
    python docs/experiments.py --kind speed kernels
    python docs/experiments.py --parallel 3 --kind loss --budget_s 1500 --input_bin ... --input_val_bin ...
    python docs/experiments.py --table
    python docs/experiments.py --write

A run measures what experiments.jsonl does not hold yet for this GPU, in the order of --plan: speed and memory,
operations alone, then losses after equal tokens and after equal seconds; it appends a record each, and at its end
writes the results into the folders' README.md and what docs/claims.py makes. So the same command goes on where the last
one stopped. Runs of the same flags are the same run, in whatever experiment, and a few parts of speed are timed in turn
by one call of tools/bench.py. Only losses need shards, of GPT-2's vocabulary. --only picks experiments, --kind their
parts, --seeds says how many, --budget_s when to stop; --parallel N has N runs of the losses on each GPU at a time,
whose losses count but not their speed; those of equal seconds are one at a time. The last two print, and write.

    python docs/experiments.py --script docs/24-mamba-2/mamba.py --model d12_mamba2

is how it starts a run of a network of docs/23, 24 or 28; tools/bench.py takes the same words.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "experiments.jsonl"
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tools")]
import measuring  # noqa: E402
from measuring import Run, last_of, table  # noqa: E402
from shards import Parser, require  # noqa: E402

KINDS = ("speed", "kernels", "loss", "seconds")
RUNS = ("loss", "seconds")  # kinds that train
CONFIDENCE = 0.95
WINDOWS = "--warmup 5 --windows 3 --steps 6"
TOGETHER = 9  # command lines at most of several parts that share a call of tools/bench.py
BEGIN, END = "<!-- made by docs/experiments.py -->", "<!-- end -->"
NOT_RUN = "not run yet"
DATA = "--input_bin 'data/fineweb10B/fineweb_train_*.bin' --input_val_bin 'data/fineweb10B/fineweb_val_*.bin'"
# A flag that the script has not -> who takes it.
OWN_PROGRAMS = {"mtp_anneal": HERE / "14-mtp" / "annealed.py", "script": HERE / "experiments.py"}
NOT_THE_SCRIPTS = {*OWN_PROGRAMS, "hyena_length"}


class Part(NamedTuple):
    """Arms that are compared, the first of them the base. Their flags stand behind the common ones."""

    kind: str  # speed: by tools/bench.py, in turn; kernels: by op_times.py; loss, seconds: whole runs
    about: str  # what is compared, in words
    common: str
    arms: dict  # name -> flags; of kernels name -> (operation, settings)
    settings: str = ""  # of tools/bench.py

    def flags(self, arm):
        return " ".join(f"{self.common} {self.arms[arm]}".split())

    @property
    def base(self):
        return next(iter(self.arms))


class Experiment(NamedTuple):
    folder: str
    parts: dict


# ----------------------------------------------------------------------------------------------------------------------
# What is measured. Tokens: 454 steps of 65,536 are 29.8 M, 305 are 20.0 M.

SCHEDULE = ("--learning_rate 1.5e-3 --warmup_iters 45 --warmdown_fraction 0.6 --min_lr_fraction 0.1 --shuffle "
            "--val_loss_every 0 --no_save_checkpoints")
SHAPE = f"--batch_size 64 --sequence_length 1024 --total_batch_size 65536 {SCHEDULE}"
LONG, SHORT = f"{SHAPE} --num_iterations 454", f"{SHAPE} --val_loss_every 50 --num_iterations 305"
GPT2_D6 = "--model gpt2 --n_layer 6 --n_head 6 --n_embd 384 --dropout 0"
GPT2_D12, GPT2_D4 = "--model gpt2 --dropout 0", "--model gpt2 --n_layer 4 --n_head 4 --n_embd 256 --dropout 0"
MODERN = "--norm rmsnorm --position rope --mlp swiglu --mlp_expansion_factor 8/3 --qk_norm --no_bias"
MINI = "--model mini"
MEDIUM = "--model gpt2-medium --batch_size 16 --total_batch_size 32768"
LARGE_D12 = "--batch_size 64 --total_batch_size 131072"
MTP = "--mtp_enabled --mtp_max_steps"
MINUTES = 0.5  # of training, of equal seconds


def lengths(common, **arms):
    return {f"T={T}": f"{common} --sequence_length {T} --batch_size {65536 // T}" for T in (1024, 256, 512, 2048, 4096)}


def at_length(T):
    """Attention by two kernels, in a step and alone."""
    return Part("speed", f"4 layers of `d12`, 8,192 tokens a step, T = {T:,}",
                f"--model d12 --n_layer 4 --sequence_length {T} --batch_size {8192 // T} --total_batch_size 8192",
                {"math": "--attention math", "flash": "--attention flash"}, "--steps 20 --builds 4")


def stacked():
    """All combinations of three switches, from none to all."""
    switches = {"checkpointing": ("", "--gradient_checkpointing"), "bf16": ("--precision fp32", "--precision bf16"),
                "fused attention": ("--attention math", "--attention auto")}
    arms = {}
    for bits in sorted(range(8), key=lambda bits: (bits.bit_count(), bits)):
        on = [name for i, name in enumerate(switches) if bits >> i & 1]
        arms[" + ".join(on) or "none"] = " ".join(flags[name in on] for name, flags in switches.items())
    return arms


def against_d12(program, *presets, long=None):
    """Networks of another program against `d12`, whose run of equal tokens is docs/15's and docs/16's too. `long` has
    the further flags of a preset at T = 8,192."""
    def arms(own="", further=None):
        its = {name: f"--script docs/{program} --model {name} {own} {(further or {}).get(name, '')}"
               for name in presets}
        return {"d12": "--model d12", **{name: " ".join(flags.split()) for name, flags in its.items()}}

    alike, brief = "--batch_size 16 --total_batch_size 65536", "--warmup 3 --steps 4 --builds 4"
    return {
        "T=1024": Part("speed", "65,536 tokens a step, 16 sequences of 1,024 at a time", alike, arms(), brief),
        "T=8192": Part("speed", "65,536 tokens a step, 2 sequences of 8,192 at a time",
                       "--sequence_length 8192 --batch_size 2 --total_batch_size 65536", arms(further=long), brief),
        "equal tokens": Part("loss", "20.0 M tokens; `d12` has 64 sequences at a time, others 16: only losses compare",
                             SHORT, arms(own="--batch_size 16")),
        "equal seconds": Part("seconds", f"{60 * MINUTES:g} s of training each, one run at a time",
                              f"{alike} --sequence_length 1024 {SCHEDULE} --warmup_iters 20 --minutes {MINUTES:g}",
                              arms()),
    }


EXPERIMENTS = {
    "torch-compile": Experiment("22-torch-compile", {
        "gpt2-medium": Part("speed", "the documents' 24-layer model", MEDIUM,
                            {"eager": "--no_compile", "compiled": "--compile"}, "--builds 1"),
        "d12": Part("speed", "`d12`", LARGE_D12 + " --model d12", {
            "eager": "--no_compile", "compiled": "--compile"}, "--builds 1"),
        "CUDA graphs": Part("speed", "`d12`, kernels launched as CUDA graphs", LARGE_D12 + " --model d12 --compile", {
            "compiled": "", "reduce-overhead": "--compile_mode reduce-overhead"}, "--builds 1"),
        "first steps": Part("speed", "windows of 3 steps from the third step on", LARGE_D12 + " --model d12",
                            {"compiled": "--compile"}, "--warmup 1 --windows 8 --steps 3"),
    }),
    "mlp-family": Experiment("16-mlp-family", {
        "speed": Part("speed", "131,072 tokens a step", LARGE_D12, {
            "d12": "--model d12", "d12_mlp3x": "--model d12_mlp3x", "d12_mlp3x_no_comp": "--model d12_mlp3x_no_comp",
            "d12_mlp2x": "--model d12_mlp2x", "d12_mlp3x + MQA": "--model d12_mlp3x --n_kv_head 1",
            "d12_post_norm_qk_norm": "--model d12_post_norm_qk_norm"}),
        "loss": Part("loss", "20.0 M tokens", SHORT, {
            "d12": "--model d12", "d12_mlp3x": "--model d12_mlp3x", "d12_mlp3x_no_comp": "--model d12_mlp3x_no_comp",
            "d12_post_norm_qk_norm": "--model d12_post_norm_qk_norm", "d12_mlp2x": "--model d12_mlp2x",
            "d12_mlp3x + MQA": "--model d12_mlp3x --n_kv_head 1"}),
    }),
    "mixed-precision": Experiment("11-mixed-precision", {
        "gpt2-medium": Part("speed", "the documents' 24-layer model", MEDIUM, {
            "fp32": "--precision fp32", "fp16": "--precision fp16", "bf16": "--precision bf16",
            "fp8": "--precision fp8"}, "--builds 1"),  # fp32 had no room beside another that compiles
        "loss": Part("loss", "GPT-2's parts, 6 layers of width 384, 29.8 M tokens", f"{GPT2_D6} {LONG}", {
            "fp32": "--precision fp32", "fp16": "--precision fp16", "bf16": "--precision bf16",
            "fp8": "--precision fp8"}),
    }),
    "gradient-checkpointing": Experiment("10-gradient-checkpointing", {
        "gpt2-medium": Part("speed", "the documents' 24-layer model, bf16", MEDIUM, {
            "without": "", "checkpointing": "--gradient_checkpointing"}),
        "baseline": Part("speed", "the documents' baseline by its micro-batch, bf16", "--model gpt2-medium", {
            "batch of 1": "--batch_size 1 --total_batch_size 8192",
            "batch of 2": "--batch_size 2 --total_batch_size 8192",
            "batch of 4": "--batch_size 4 --total_batch_size 8192"}),
    }),
    "rmsnorm": Experiment("08-rmsnorm", {
        "alone": Part("kernels", "the norm alone, forward and backward, 65,536 tokens of width 1024, compiled", "", {
            "layernorm": ("norm", dict(kind="layernorm", dtype="bfloat16", compiled=True)),
            "rmsnorm": ("norm", dict(kind="rmsnorm", dtype="bfloat16", compiled=True))}),
        "alone, eager": Part("kernels", "the same, not compiled", "", {
            "layernorm": ("norm", dict(kind="layernorm", dtype="bfloat16", compiled=False)),
            "rmsnorm": ("norm", dict(kind="rmsnorm", dtype="bfloat16", compiled=False))}),
        "gpt2-medium": Part("speed", "the documents' 24-layer model, a whole step", MEDIUM, {
            "layernorm": "", "rmsnorm": "--use_rmsnorm"}),
        "loss": Part("loss", "GPT-2's parts, 6 layers of width 384, 29.8 M tokens", f"{GPT2_D6} {LONG}", {
            "layernorm": "", "rmsnorm": "--use_rmsnorm"}),
    }),
    "gqa": Experiment("15-gqa", {
        "speed": Part("speed", "131,072 tokens a step", LARGE_D12, {
            "d12": "--model d12", "GQA 1/4": "--model d12 --gqa_enabled --kv_head_ratio 0.25 --embd_scale 1.0",
            "GQA 1/4, width x 1.12": "--model d12 --gqa_enabled --kv_head_ratio 0.25 --embd_scale 1.12",
            "MQA": "--model d12_mqa"}),
        "latent": Part("speed", "131,072 tokens a step, with post-norm and QK-norm", LARGE_D12, {
            "d12_post_norm_qk_norm": "--model d12_post_norm_qk_norm", "d12_gqa": "--model d12_gqa",
            "d12_mla": "--model d12_mla"}),
        "loss": Part("loss", "20.0 M tokens", SHORT, {
            "d12": "--model d12",
            "GQA 1/4, width x 1.12": "--model d12 --gqa_enabled --kv_head_ratio 0.25 --embd_scale 1.12",
            "GQA 1/4": "--model d12 --gqa_enabled --kv_head_ratio 0.25 --embd_scale 1.0",
            "MQA": "--model d12_mqa"}),
        "latent loss": Part("loss", "20.0 M tokens, with post-norm and QK-norm", SHORT, {
            "d12_post_norm_qk_norm": "--model d12_post_norm_qk_norm", "d12_gqa": "--model d12_gqa",
            "d12_mla": "--model d12_mla"}),
    }),
    "rope-embeddings": Experiment("09-rope-embeddings", {
        "gpt2-medium": Part("speed", "the documents' 24-layer model", MEDIUM, {"learned": "", "rope": "--use_rope"}),
        "loss": Part("loss", "GPT-2's parts, 6 layers of width 384, 29.8 M tokens", f"{GPT2_D6} {LONG}", {
            "learned": "", "rope": "--use_rope"}),
    }),
    "swiglu": Experiment("12-swiglu", {
        "gpt2-medium": Part("speed", "the documents' 24-layer model, equal parameters but for 0.1%", MEDIUM, {
            "GELU, 4": "", "SwiGLU, 8/3": "--mlp swiglu --mlp_expansion_factor 8/3"}),
        "loss": Part("loss", "GPT-2's parts, 6 layers of width 384, 29.8 M tokens, equal parameters",
                     f"{GPT2_D6} {LONG}", {
                         "GELU, 4": "", "SwiGLU, 8/3": "--mlp swiglu --mlp_expansion_factor 8/3"}),
        "loss at 3": Part("loss", "`d12_mlp3x`'s parts, 6 layers of width 384, 29.8 M tokens",
                          f"--model d12_mlp3x --n_layer 6 --n_head 6 --n_embd 384 {LONG}", {
                              "GELU, 3": "", "SwiGLU, 3": "--mlp swiglu",
                              "GELU, 4.5": "--mlp_expansion_factor 4.5"}),
    }),
    "flash-attention": Experiment("13-flash-attention", {
        **{f"alone, T={T}": Part("kernels", f"attention alone, forward and backward, 16 heads of 64, T = {T:,}", "", {
            kernel: ("attention", dict(kernel=kernel, T=T)) for kernel in ("math", "flash")})
           for T in (256, 512, 1024, 2048, 4096, 8192)},
        **{f"T={T}": at_length(T) for T in (256, 512, 1024, 2048, 4096, 8192)},
    }),
    "stacking": Experiment("20-stacking", {
        "gpt2": Part("speed", "GPT-2 of 12 layers without dropout, 16,384 tokens a step",
                     "--model gpt2 --dropout 0 --batch_size 8 --total_batch_size 16384", stacked(),
                     "--warmup 3 --steps 4 --builds 4"),
    }),
    "gradient-accumulation": Experiment("06-gradient-accumulation", {
        "equal step": Part("speed", "GPT-2, 65,536 tokens a step in fewer or more micro-batches", "--model gpt2", {
            "1 x 64": "--batch_size 64 --total_batch_size 65536",
            "4 x 16": "--batch_size 16 --gradient_accumulation_steps 4",
            "16 x 4": "--batch_size 4 --gradient_accumulation_steps 16"}),
        "loss": Part("loss", "GPT-2's parts, 6 layers of width 384, 29.8 M tokens, micro-batches of 16",
                     f"{GPT2_D6} {SCHEDULE} --sequence_length 1024 --batch_size 16", {
                         "1 micro-batch": "--gradient_accumulation_steps 1 --num_iterations 1816 --warmup_iters 180",
                         "4 micro-batches": "--gradient_accumulation_steps 4 --num_iterations 454",
                         "1 micro-batch, half the rate": "--gradient_accumulation_steps 1 --num_iterations 1816 "
                                                         "--warmup_iters 180 --learning_rate 7.5e-4"}),
    }),
    "small-models": Experiment("17-small-models", {
        "d4": Part("loss", "4 layers of width 256, 29.8 M tokens", LONG, {
            "GPT-2's parts": GPT2_D4, "modern parts": f"{GPT2_D4} {MODERN}"}),
        "d12": Part("loss", "12 layers of width 768, 20.0 M tokens", SHORT, {
            "GPT-2's parts": GPT2_D12, "modern parts": f"{GPT2_D12} {MODERN}"}),
    }),
    "mtp": Experiment("14-mtp", {
        "speed": Part("speed", "`d12`, 131,072 tokens a step", LARGE_D12 + " --model d12", {
            "without": "", "k=2": f"{MTP} 2", "k=3": f"{MTP} 3", "k=4": f"{MTP} 4",
            "k=2, separate": f"{MTP} 2 --mtp_heads separate"}),
        "loss": Part("loss", "`mini`, 29.8 M tokens, weight 0.1 and a ramp of 64 steps but where it is said",
                     f"{MINI} {LONG}", {
                         "without": "", "k=2": f"{MTP} 2", "k=3": f"{MTP} 3", "k=4": f"{MTP} 4",
                         "k=2, annealed": f"{MTP} 2 --mtp_anneal 0.5", "k=2, separate": f"{MTP} 2 --mtp_heads separate",
                         "k=2, weight 0.3": f"{MTP} 2 --mtp_weight 0.3",
                         "k=2, weight 0.03": f"{MTP} 2 --mtp_weight 0.03",
                         "k=2, no ramp": f"{MTP} 2 --mtp_rampup_steps 0",
                         "k=2, ramp of 227": f"{MTP} 2 --mtp_rampup_steps 227"}),
    }),
    "sequence-length": Experiment("18-sequence-length", {
        "loss": Part("loss", "`mini`, 65,536 tokens a step, 29.8 M tokens, validated at its own length",
                     f"{MINI} {SCHEDULE} --total_batch_size 65536 --num_iterations 454", lengths("")),
    }),
    "architecture-or-data": Experiment("19-architecture-or-data", {
        "loss": Part("loss", "6 layers of width 384, 1 x is 29.8 M tokens", f"{GPT2_D6} {SHAPE}", {
            f"{parts}, {share} x": f"{flags} --num_iterations {round(454 * share)}"
            for parts, flags in (("GPT-2's parts", ""), ("modern parts", MODERN))
            for share in (1, 1.1, 0.5, 1.5, 2)}),
    }),
    "model-sizes": Experiment("21-model-sizes", {
        "commands": Part("speed", "the model-size document's commands, fp8, T = 1024",
                         "--model sized --use_fp8 --compile --sequence_length 1024", {
                             "2. Current": "--n_layers 32 --ffn_hidden 2048 --batch_size 8 --grad_accum_steps 12",
                             "1. GPT-2 Small": "--ffn_hidden 2560 --batch_size 12 --grad_accum_steps 8",
                             "3. Medium-Deep": "--n_layers 20 --ffn_hidden 2304 --batch_size 10 --grad_accum_steps 10",
                             "4. Wide-Shallow": "--d_model 1024 --n_heads 16 --n_kv_heads 4 --ffn_hidden 2730 "
                                                "--batch_size 8 --grad_accum_steps 12",
                             "5. GPT-2 Medium": "--d_model 1024 --n_layers 24 --n_heads 16 --n_kv_heads 4 --ffn_hidden "
                                                "4096 --batch_size 4 --grad_accum_steps 16"},
                         "--warmup 3 --windows 2 --steps 4 --builds 4"),
        "memory": Part("speed", "`sized` with a hidden width of 8/3 in bf16: what doubles, what grows",
                       "--model sized --sequence_length 1024 --grad_accumulation_steps 2 --precision bf16", {
                           "16 layers": "--n_layer 16 --batch_size 8", "32 layers": "--n_layer 32 --batch_size 8",
                           "16 layers of 1024": "--n_layer 16 --n_embd 1024 --n_kv_head 4 --batch_size 8",
                           "16 layers, batch of 16": "--n_layer 16 --batch_size 16"},
                       "--warmup 3 --windows 2 --steps 4 --builds 4"),
    }),
    "mixture-of-experts": Experiment("23-mixture-of-experts", against_d12("23-mixture-of-experts/moe.py", "d12_moe")),
    "mamba-2": Experiment("24-mamba-2", against_d12("24-mamba-2/mamba.py", "d12_mamba2")),
    "linear-recurrences": Experiment("28-linear-recurrences", against_d12(
        "28-linear-recurrences/recurrences.py", "d12_retnet", "d12_delta", "d12_rwkv7", "d12_hyena",
        long={"d12_hyena": "--hyena_length 8192"})),
    "moe-presets": Experiment("23-mixture-of-experts", against_d12(
        "23-mixture-of-experts/moe.py", "d12_moe_bias", "d12_moe_switch", "d12_moe_shared")),
    "mamba-presets": Experiment("24-mamba-2", against_d12(
        "24-mamba-2/mamba.py", "d12_mamba2_hybrid", "d24_mamba2", "d24_mamba2_hybrid")),
    "delta-hybrid": Experiment("28-linear-recurrences", against_d12(
        "28-linear-recurrences/recurrences.py", "d12_delta_hybrid")),
}
FOLDERS = {}  # folder -> its experiments
for its_name, its in EXPERIMENTS.items():
    FOLDERS.setdefault(its.folder, []).append(its_name)


def parts(names=None, kinds=None):
    """[(experiment, part's name, Part)] in the order in which they are run."""
    return [(name, title, part) for kind in KINDS for name, experiment in EXPERIMENTS.items()
            for title, part in experiment.parts.items()
            if part.kind == kind and (not names or name in names) and (not kinds or kind in kinds)]


def run_of(name, part, arm):
    """A Run of the loss arms. Runs of the same flags are the same run, in whatever experiment."""
    return Run(name, arm.replace(" ", "_").replace("/", "_"), part.flags(arm))


def script_flags(flags):
    """Those that the script takes, without what a program of the experiment's own takes; of another program's network
    those of `d12`, which it has the size of."""
    typed = last_of(flags)
    typed |= dict(model="d12") if "script" in typed else {}
    return words_of({name: value for name, value in typed.items() if name not in NOT_THE_SCRIPTS})


def words_of(typed):
    """What last_of() understood, as one types it."""
    return " ".join(f"--no_{name}" if value == "no" else f"--{name} {value}".strip() for name, value in typed.items())


def line_of(part, arm):
    """Its command line for tools/bench.py, the same for arms of the same flags."""
    return words_of(dict(sorted(last_of(f"{part.flags(arm)} --seed 1").items())))


def named_in(words, line):
    """Whether tools/bench.py says there that it was this one."""
    return f'"{line}"' in words


# ----------------------------------------------------------------------------------------------------------------------
# What a part is expected to take

FLOPS = dict(fp32=4e13, fp16=3e14, bf16=3.5e14, fp8=3.5e14)  # a second, of a step: to plan with
EAGER, STARTING = 0.5, 15  # its share of that; seconds of a process beside training and compiling
SLOWER = 2  # seconds of another program's network by those of d12: assumed, none was measured


@lru_cache(maxsize=None)
def resolved(flags):
    """(GPTConfig, TrainConfig, FLOPs of a token) of a command line of the script on a GPU."""
    import torch

    import train_gpt2_mod as script

    config, run, _ = script.resolve(script.parse_flags(script_flags(flags).split()), script.ANY_MACHINE)
    with torch.device("meta"):
        return config, run, script.GPT(config).flops_per_token(run.sequence_length)


def planned_seconds(kind, flags, settings=""):
    """What an arm takes by FLOPs and layers, where none like it was measured."""
    if kind == "kernels":
        return 3.0
    config, run, flops = resolved(flags)
    eager = run.compile is False
    rate = FLOPS[config.precision] * (EAGER if eager else 1) / flops * (0.3 if run.attention == "math" else 1)
    rate /= SLOWER if "script" in last_of(flags) else 1
    compiling = 3 if eager else (8 + 1.3 * config.n_layer) * (2 if config.precision == "fp8" else 1)
    if kind == "seconds":
        return STARTING + compiling / 2 + 60 * run.minutes
    if kind == "loss":
        return STARTING + compiling / 2 + run.num_iterations * run.tokens_per_step / rate  # compiled once for the seeds
    bench = last_of(f"{WINDOWS} --builds 2 {settings}")
    warmup, windows, steps, builds = (int(bench[name]) for name in ("warmup", "windows", "steps", "builds"))
    return compiling / builds + (warmup + windows * (steps + 1)) * run.tokens_per_step / rate


def arm_seconds(part, arm):
    return planned_seconds(part.kind, part.arms[arm] if part.kind == "kernels" else part.flags(arm), part.settings)


def part_seconds(part, started=False):
    """Of kernels, whose process may have been started by another part."""
    return STARTING * (not started) + sum(arm_seconds(part, arm) for arm in part.arms)


def together(places):
    """The parts of speed [(experiment, part's name, Part)] in groups that share a call of tools/bench.py: of the same
    settings, those of the same common flags side by side."""
    alike, groups = {}, []
    for place in places:
        alike.setdefault(place[2].settings, {}).setdefault(place[2].common, []).append(place)
    for its in alike.values():
        lines = None
        for place in chain(*its.values()):
            more = {line_of(place[2], arm) for arm in place[2].arms}
            if lines is None or len(lines | more) > TOGETHER:
                groups.append([])
                lines = set()
            groups[-1].append(place)
            lines |= more
    return groups


def group_seconds(group):
    """What each part of a group adds: the first the start, and each the lines that none before it has."""
    lines, found = set(), []
    for _, _, part in group:
        fresh = {line: arm for arm in part.arms if (line := line_of(part, arm)) not in lines}
        found.append(STARTING * (not lines) + sum(arm_seconds(part, arm) for arm in fresh.values()))
        lines |= fresh.keys()
    return found


def expected_seconds(run, rows, sharing=0):
    """By runs of the same flags on this GPU, else by the plan."""
    like = [r for r in rows if run.is_of(r)]
    if "minutes" in last_of(run.flags):
        return measuring.MARGIN * max((r["wall_s"] for r in like), default=planned_seconds("seconds", run.flags))
    return (measuring.expected_seconds(run, like, sharing) if like
            else measuring.MARGIN * planned_seconds("loss", run.flags))


def run_key(name, part, arm):
    """What two runs have in common that are the same."""
    return frozenset(last_of(run_of(name, part, arm).flags).items())


def print_plan(names, kinds, seeds):
    """A part a line, in the order in which they are run, with what is there already on whatever GPU. Kernels have one
    process; what another part has too counts there where it is first."""
    rows, total, started, seen = measuring.read(RESULTS), 0.0, False, set()
    every = parts(names, kinds)
    groups = together([place for place in every if place[2].kind == "speed"])
    speed = {place[:2]: seconds for group in groups for place, seconds in zip(group, group_seconds(group))}
    print(f"{'expected s':>10} {'in all':>7}  {'kind':8} {'there':>7}  experiment: part")
    for name, title, part in [*chain(*groups), *(place for place in every if place[2].kind != "speed")]:
        if part.kind == "speed":
            seconds = speed[name, title]
        elif part.kind in RUNS:
            fresh = {arm: key for arm in part.arms if (key := run_key(name, part, arm)) not in seen}
            seconds = seeds * sum(arm_seconds(part, arm) for arm in fresh)
            seen.update(fresh.values())
        else:
            seconds, started = part_seconds(part, started), True
        total += seconds
        every = len(part.arms) * (seeds if part.kind in RUNS else 1)
        there = sum(len({r.get("seed") for r in rows if is_of(r, name, title, part, arm)}) for arm in part.arms)
        print(f"{seconds:10,.0f} {total:7,.0f}  {part.kind:8} {f'{there} of {every}':>7}  {name}: {title}")


# ----------------------------------------------------------------------------------------------------------------------
# Running


def is_of(record, name, title, part, arm):
    """Whether a record is of this arm as the table has it now."""
    if part.kind in RUNS:
        alone = part.kind == "loss" or not record.get("sharing")
        return record["kind"] not in KINDS and alone and run_of(name, part, arm).is_of(record)
    place = (record["kind"], record.get("experiment"), record.get("part"), record.get("arm"))
    if place != (part.kind, name, title, arm):
        return False
    if part.kind == "kernels":
        return [record["operation"], record["settings"]] == [*part.arms[arm]]
    return last_of(part.flags(arm)) == last_of(record["flags"])


def bench(lines, settings):
    """{line: the record of tools/bench.py}. Raises RuntimeError with its one line."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.jsonl"
        how = f"{WINDOWS} --builds 2 {settings}"
        command = [sys.executable, ROOT / "tools" / "bench.py", *how.split(), "--json", found, *lines, "--"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(last_line(done.stderr))
        return dict(zip(lines, map(json.loads, found.read_text().splitlines())))


def last_line(stderr):
    return (stderr.strip().splitlines() or ["it said nothing"])[-1]


def speed_records(*asked):
    """The records of each of these parts, whose lines take turns, equal ones as one. A line that has no room, nor when
    it compiles alone, is recorded as such, and the others are measured without it; but of several parts it may have
    room where the others are not: RuntimeError, as for other faults."""
    import torch

    gpu, failed, found, alone = dict(gpu=measuring.gpu_name(), torch=torch.__version__), {}, {}, ""
    lines = list(dict.fromkeys(line_of(part, arm) for part in asked for arm in part.arms))
    while lines:
        try:
            found = bench(lines, f"{asked[0].settings} {alone}")
            break
        except RuntimeError as error:
            full = [line for line in lines if "memory" in str(error) and named_in(str(error), line)]
            if not full or len(asked) > 1:
                raise
            if alone:
                failed[full[0]] = str(error)
                lines.remove(full[0])
            alone = "--builds 1"
    kept = ("flags", "script_sha256", "date", "warmup", "steps", "parameters", "flops_per_token", "tokens_per_step",
            "first_step_s", "windows_ms", "step_ms", "tokens_per_second", "mfu", "peak_mem_MB", "infinite_gradients",
            "gpu", "torch")

    def record(part, arm):
        row, own = dict(arm=arm, flags=part.flags(arm)), measuring.extended_by(part.flags(arm))
        if words := failed.get(line_of(part, arm)):
            return dict(row, failed=words, script_sha256=measuring.source(*own), **gpu)
        measured = found[line_of(part, arm)]
        row = {**row, **{key: measured[key] for key in kept}, "flags": part.flags(arm)}
        return row | (dict(script_sha256=measuring.source(*own)) if own else {})  # bench.py's is of the program alone

    return [[record(part, arm) for arm in part.arms] for part in asked]


def kernel_records(asked):
    """(records of the arms, why there are none of the others) of each of these parts of kernels, as soon as op_times.py
    has said what it gave. An operation without room is recorded as such. If the process dies, another one measures the
    parts behind the one in which it did."""
    waiting = list(asked)
    while waiting:
        command = [sys.executable, HERE / "op_times.py", *(json.dumps([*part.arms.values()]) for part in waiting)]
        with (tempfile.TemporaryFile("w+") as stderr,
              subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process):
            lines, whole = (line for line in process.stdout if line[0] == "{" and line[-1] == "\n"), True
            try:
                while waiting and whole:
                    part = waiting.pop(0)
                    its = [json.loads(line) for line in islice(lines, len(part.arms))]
                    wrong, whole = [row["error"] for row in its if "error" in row], len(its) == len(part.arms)
                    if not whole:
                        process.wait()
                        stderr.seek(0)
                        wrong.append(last_line(stderr.read()))
                    yield [dict(arm=arm, flags="", script_sha256=measuring.source(), **row)
                           for arm, row in zip(part.arms, its) if "error" not in row], "; ".join(wrong)
            except BaseException:
                process.kill()
                raise


def run_parts(names, kinds, end):
    """Measure the parts that train nothing and are not there; how many failed. Those of kernels share a process."""
    gpu, failures = measuring.gpu_name(), 0

    def missing(kind):
        rows = [r for r in measuring.read(RESULTS) if r["gpu"] == gpu]
        return [(name, title, part) for name, title, part in parts(names, kinds) if part.kind == kind
                and not all(any(is_of(r, name, title, part, arm) for r in rows) for arm in part.arms)]

    def fits(seconds, name="", title=""):
        if time.monotonic() + measuring.MARGIN * seconds <= end:
            return True
        if name:
            print(f"no time left for {name}: {title}", flush=True)
        return False  # a shorter one may have it

    def keep(name, title, part, found, wrong=""):
        measuring.append(RESULTS, *(dict(kind=part.kind, experiment=name, part=title, **row) for row in found))
        if found:
            print(f"{name}: {title}: " + ", ".join(f"{r['arm']} {said(r)}" for r in found), flush=True)
        if wrong:
            print(f"failed: {name}: {title}: {wrong}", flush=True)
        return bool(wrong)

    waiting = together(missing("speed"))
    while waiting:
        group = waiting.pop(0)
        one_by_one = [[place] for place in group] if len(group) > 1 else []
        if not fits(sum(group_seconds(group)), *(() if one_by_one else group[0][:2])):
            waiting[:0] = one_by_one
            continue
        try:
            found, wrong = speed_records(*(part for *_, part in group)), ""
        except Exception as error:  # whatever it is, the next part may do
            found, wrong = [[]], measuring.why(error)
            if one_by_one:
                print(f"not together: {wrong}", flush=True)
                alone = [[place] for place in group
                         if any(named_in(wrong, line_of(place[2], arm)) for arm in place[2].arms)]
                rest = [place for place in group if [place] not in alone]
                waiting[:0] = [rest] * bool(rest) + alone if alone else one_by_one
                continue
        failures += sum(keep(*place, rows, wrong) for place, rows in zip(group, found))
    fitting, seconds = [], 0.0
    for name, title, part in missing("kernels"):
        more = part_seconds(part, started=bool(fitting))
        if fits(seconds + more, name, title):
            fitting.append((name, title, part))
            seconds += more
    for its, place in zip(kernel_records([part for *_, part in fitting]), fitting):
        failures += keep(*place, *its)
    return failures


def said(record):
    if "failed" in record:
        return "did not fit"
    if "ms" in record:
        return f"{record['ms']:.3f} ms"
    return f"{record['tokens_per_second']:,.0f} tokens/s, {record['peak_mem_MB']:,} MiB"


def run_losses(names, kind, args, begun):
    """Run what is missing of the losses, experiment by experiment, seed by seed; how many failed. Those of equal
    seconds have a GPU each."""
    tasks = {}
    for name, _, part in parts(names, [kind]):
        for seed in range(1, args.seeds + 1):
            for arm in part.arms:
                tasks.setdefault((run_key(name, part, arm), seed), (run_of(name, part, arm), seed))
    if kind == "seconds" and args.parallel:
        args = argparse.Namespace(**{**vars(args), "parallel": 1})
    failures = 0
    own = {program: [task for task in tasks.values() if flag in last_of(task[0].flags)]
           for flag, program in OWN_PROGRAMS.items()}
    plain = [task for task in tasks.values() if not any(task in its for its in own.values())]
    for program, its in [(measuring.SCRIPT, plain), *own.items()]:
        failures += measuring.run_what_is_missing(its, RESULTS, args, begun, expected=expected_seconds, program=program)
    return failures


# ----------------------------------------------------------------------------------------------------------------------
# What came out


class Arm(NamedTuple):
    """What the records of one GPU say of an arm; None where they say nothing."""

    memory: float | None  # MiB; of kernels beside the operation's own tensors
    windows: list  # ms of a step, in the order in which the arms took turns; of kernels of one call
    tokens: int | None  # a step; of kernels None
    losses: dict  # seed -> validation loss
    seconds: float | None  # of training, mean of those that had the GPU to themselves, compilation left out
    failed: str | None
    rows: list


def arm_of(rows, name, title, part, arm):
    """Of speed and kernels the newest record counts, of a seed's loss too."""
    mine = [r for r in rows if is_of(r, name, title, part, arm)]
    if part.kind not in RUNS:
        last = mine[-1] if mine else {}
        if part.kind == "kernels":
            return Arm(last.get("peak_MiB"), last.get("windows_ms", []), None, {}, None, last.get("failed"), mine[-1:])
        return Arm(last.get("peak_mem_MB"), last.get("windows_ms", []), last.get("tokens_per_step"), {}, None,
                   last.get("failed"), mine[-1:])
    alone = [r for r in mine if not r["sharing"]]
    seconds = [measuring.learning_curve(r)[-1][0] for r in alone]
    peaks = [r["peak_mem_MB"] for r in mine]
    return Arm(max(peaks, default=None), [r["step_avg_ms"] for r in alone],
               mine[-1]["curve"][-1][1] // mine[-1]["curve"][-1][0] if mine else None,
               {r["seed"]: r["val_loss"] for r in mine}, measuring.mean(seconds), None, mine)


def rate(arm, windows=None):
    """Tokens a second; of kernels calls a second."""
    ms = windows or arm.windows
    return 1000 * (arm.tokens or 1) / statistics.median(ms) if ms else None


def speed_change(before, after):
    """(share by which it is faster, the least and the most of the windows in pairs); None if either is missing."""
    if not before.windows or not after.windows:
        return None
    size = (after.tokens or 1) / (before.tokens or 1)
    pairs = [size * a / b - 1 for a, b in zip(before.windows, after.windows)]
    return rate(after) / rate(before) - 1, min(pairs), max(pairs)


def memory_change(before, after):
    if before.memory is None or after.memory is None:
        return None
    change = after.memory / before.memory - 1
    return change, change, change


def loss_change(before, after):
    """(relative difference of the losses of common seeds, the ends of its interval, what tools/compare.py says of it in
    nats). The ends are None with one seed, which tells nothing of chance."""
    from compare import judge

    seeds = sorted(before.losses.keys() & after.losses.keys())
    if not seeds:
        return None
    base = statistics.fmean(before.losses[seed] for seed in seeds)
    found = judge([after.losses[seed] - before.losses[seed] for seed in seeds], CONFIDENCE)
    low, high = found["interval"] or ([found["mean"]] * 2 if found["sd"] == 0 else (None, None))
    return found["mean"] / base, *(None if end is None else end / base for end in (low, high)), found


def seconds_change(before, after):
    """By how much longer the variant takes to come to the base's last loss: the mean and the extremes over the seeds. A
    seed that never gets there counts as infinitely long."""
    found = []
    for row in before.rows:
        pair = [r for r in after.rows if r["seed"] == row["seed"] and not r["sharing"]]
        if pair and not row["sharing"]:
            there = measuring.reached(measuring.learning_curve(pair[-1]), row["val_loss"])
            found.append(there[0] / measuring.learning_curve(row)[-1][0] - 1 if there else math.inf)
    return (statistics.fmean(found), min(found), max(found)) if found else None


CHANGES = dict(speed=speed_change, memory=memory_change, loss=loss_change, seconds=seconds_change)


def found_by_gpu(name, title, rows=None):
    """{GPU: {arm: Arm}} where a part has any record."""
    part, by = EXPERIMENTS[name].parts[title], {}
    for gpu, its in measuring.by_gpu(measuring.read(RESULTS) if rows is None else rows):
        arms = {arm: arm_of(its, name, title, part, arm) for arm in part.arms}
        if any(arm.rows for arm in arms.values()):
            by[gpu] = arms
    return by


def percent(change):
    return "never" if math.isinf(change) else f"{100 * change:+.1f}%"


def improvement(metric, before, after):
    """The last cell of a row."""
    change = CHANGES[metric](before, after)
    if change is None:
        return "-"
    if metric == "loss":
        difference = change[3]["mean"]
        if change[3]["interval"] is None:
            return f"{difference:+.4f} ({percent(change[0])}), {len(after.losses)} seed: no interval"
        low, high = change[3]["interval"]
        return (f"{difference:+.4f} ({percent(change[0])}), {CONFIDENCE:.0%} interval {low:+.4f} to {high:+.4f}, "
                f"{change[3]['seeds']} seeds: {change[3]['verdict'].removesuffix(' at this number of seeds')}")
    spread = f" ({percent(change[1])} to {percent(change[2])})" if change[1] != change[2] else ""
    return percent(change[0]) + spread


def cells_of(part, arm):
    """{metric: (label, value in words)} of what is known."""
    found = {}
    if arm.memory is not None:
        found["memory"] = ("Memory", f"{arm.memory:,.0f} MiB")
    if arm.windows:
        found["speed"] = (("Time", f"{statistics.median(arm.windows):.3f} ms") if part.kind == "kernels" else
                          ("Speed", f"{rate(arm):,.0f} tok/s"))
    if arm.losses:
        found["loss"] = ("Loss", f"{statistics.fmean(arm.losses.values()):.4f}")
    if arm.seconds:
        found["seconds"] = ("Time", f"{arm.seconds:.1f} s")
    return found


def time_cells(before, after):
    return percent(after.seconds / before.seconds - 1)


def rows_of(part, arms):
    """The documents' template: a row a variant and metric."""
    base, rows = arms[part.base], []
    known = cells_of(part, base)
    for name, arm in list(arms.items())[1:]:
        mine = cells_of(part, arm)
        if arm.failed:
            rows.append([f"`{name}`", "-", "-", "did not fit into memory", "-"])
        elif not mine:
            rows.append([f"`{name}`", "-", "-", NOT_RUN, "-"])
        for metric, (label, after) in mine.items():
            before = known.get(metric, ("", "did not fit into memory" if base.failed else NOT_RUN))[1]
            last = (time_cells(base, arm) if metric == "seconds" and base.seconds else
                    "-" if metric == "seconds" else improvement(metric, base, arm))
            rows.append([f"`{name}`", label, before, after, last])
    if len(arms) == 1:
        rows += [[f"`{part.base}`", label, "-", value, "-"] for label, value in known.values()]
        rows.append([f"`{part.base}`", "ms of a step, window by window", "-",
                     ", ".join(f"{ms:.1f}" for ms in base.windows), "-"])
    return rows


def products(part, arms):
    """Rows that set what several switches do together against the product of what each does alone."""
    rows, base = [], arms[part.base]
    for name, arm in arms.items():
        singles = [arms.get(single) for single in name.split(" + ")]
        if len(singles) < 2 or None in singles:
            continue
        for metric in ("memory", "speed"):
            changes = [CHANGES[metric](base, single) for single in singles]
            together = CHANGES[metric](base, arm)
            if together and None not in changes:
                product = math.prod(1 + change[0] for change in changes)
                rows.append([f"`{name}`", metric, f"x {1 + together[0]:.3f}", f"x {product:.3f}",
                             f"{(1 + together[0]) / product:.3f}"])
    return rows


def as_good_as(arms):
    """By how many tokens the plain network is worth what the modern one is after 1 x: its losses interpolated in the
    logarithm of the tokens."""
    plain = {float(name.split(", ")[1].split()[0]): statistics.fmean(arm.losses.values())
             for name, arm in arms.items() if name.startswith("GPT-2") and arm.losses}
    modern = arms["modern parts, 1 x"].losses
    if len(plain) < 2 or not modern:
        return None
    target = statistics.fmean(modern.values())
    curve = [(0.0, math.log(share), plain[share]) for share in sorted(plain)]
    found = measuring.reached(curve, target)
    reach = (f"after {math.exp(found[1]):.2f} x the tokens" if found else
             f"at none of these lengths, {min(plain):g} x to {max(plain):g} x")
    return f"The loss of the modern parts after 1 x, {target:.4f}, the GPT-2 parts have {reach}."


def flags_in_words(part):
    """Of a flag that stands twice the last counts."""
    if part.kind == "kernels":
        return "Calls: " + ", ".join(f"`{arm}` {operation}({', '.join(f'{k}={v}' for k, v in settings.items())})"
                                     for arm, (operation, settings) in part.arms.items()) + "."
    each = "; ".join(f"`{arm}` " + (f"`{flags}`" if flags else "none") for arm, flags in part.arms.items())
    bench = f" `tools/bench.py {part.settings}`." if part.settings else ""
    return f"Flags of all: {f'`{part.common}`' if part.common else 'none'}. Of each, behind them: {each}.{bench}"


def block(name, rows=None):
    """The generated part of an experiment's README.md."""
    rows = measuring.read(RESULTS) if rows is None else rows
    lines = []
    for title, part in EXPERIMENTS[name].parts.items():
        lines += [f"**{title}**: {part.about}. Before: `{part.base}`.", ""]
        found = found_by_gpu(name, title, rows)
        if not found:
            lines += [f"{NOT_RUN.capitalize()}: {', '.join(f'`{arm}`' for arm in part.arms)}.", ""]
        for gpu, arms in found.items():
            its = [r for arm in arms.values() for r in arm.rows]
            versions = ", ".join(dict.fromkeys(r["script_sha256"][:8] for r in its))
            lines += [f"{gpu}, torch {its[-1]['torch']}, script {versions}:", "",
                      table(["Variant", "Metric", "Before", "After", "Improvement"], rows_of(part, arms)), ""]
            together = products(part, arms)
            if together:
                lines += [table(["Together", "of", "measured", "product of the single effects", "ratio"], together), ""]
            if name == "architecture-or-data" and (sentence := as_good_as(arms)):
                lines += [sentence, ""]
        lines += [flags_in_words(part), ""]
    return "\n".join(lines).rstrip()


def blocks(folder):
    """Those of all experiments of a folder."""
    if len(FOLDERS[folder]) == 1:
        return block(FOLDERS[folder][0])
    return "\n\n".join(f"### `{name}`\n\n{block(name)}" for name in FOLDERS[folder])


def rewritten(text, made):
    """A document with what stands between the two marks made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def write():
    """Write the results into each folder's README.md, and what docs/claims.py makes."""
    import claims

    for folder in FOLDERS:
        path = HERE / folder / "README.md"
        measuring.write(path, rewritten(path.read_text(), blocks(folder)))
    claims.write()


def make_parser():
    parser = Parser("experiments.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--plan", action="store_true", help="print what each part is expected to take, and stop")
    parser.add_argument("--table", action="store_true", help="print what experiments.jsonl says, and stop")
    parser.add_argument("--write", action="store_true", help="write it into the documents, and stop")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME",
                        help=f"these alone: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="these parts alone")
    parser.add_argument("--seeds", type=int, default=3, help="of each loss [3]")
    parser.add_argument("--budget_s", type=float, default=math.inf, help="begin nothing that would end later than this")
    parser.add_argument("--parallel", type=int, nargs="?", const=1, metavar="N", help="N losses on each GPU [1]")
    parser.add_argument("--input_bin", help="training shards, as train_gpt2_mod.py takes them")
    parser.add_argument("--input_val_bin", help="validation shards")
    return parser


def main(argv=None):
    """The exit code: 1 if something failed."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--script"]:
        path = next((place / name for name in argv[1:2] for place in (Path(), ROOT) if (place / name).is_file()), None)
        require(path and path.suffix == ".py", "--script takes the program of an experiment, such as "
                "docs/24-mamba-2/mamba.py, and its flags")
        os.execv(sys.executable, [sys.executable, path, *argv[2:]])
    begun, args = time.monotonic(), make_parser().parse_args(argv)
    measuring.check_flags(args)
    names, failed = args.only or list(EXPERIMENTS), 0
    if args.plan:
        print_plan(names, args.kind, args.seeds)
        return 0
    if not args.table and not args.write:
        measuring.gpu_name()
        measuring.check_place(RESULTS, RESULTS, remedy="see to its permissions")
        kinds = [kind for kind in RUNS if kind in (args.kind or RUNS)]
        if kinds and parts(names, kinds):
            measuring.check_shards(args)
        try:
            failed = run_parts(names, args.kind, begun + args.budget_s)
            for kind in kinds:
                failed += run_losses(names, kind, args, begun)
        finally:
            write()
    if args.write:
        write()
    else:
        print("\n\n".join(f"## {name}\n\n{block(name)}" for name in names))
    return 1 if failed else 0


if __name__ == "__main__":
    measuring.run(main, RESULTS)
