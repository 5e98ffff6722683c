#!/usr/bin/env python3
"""train_gpt2_mod.py: trains GPT-2-class language models, in one file.

    python train_gpt2_mod.py --model tiny --input_bin 'data/quickstart/train_*.bin' --input_val_bin ''
    torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --model d12_mlp3x --total_batch_size 524288
    torchrun --standalone --nproc_per_node=8 train_gpt2_mod.py --model d12 --resume auto

Tokens come from shards in llm.c's format (data/ writes them). A run writes logs/<run_id>/: a log with the source and
the versions at its head, metrics.jsonl with one record a step, config.json and checkpoints. `--help` lists every flag;
each is a field of one of the three dataclasses of the Config section. Importing this file runs nothing.

Sections: Config - World and log - Model - Numerics - Loss - Optimizer and schedule - Data - Parallel - Checkpoint -
Training - main
"""
import argparse
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fractions
import gc
import glob
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

KERNEL = Path(__file__).with_name("fused_softmax.py")  # the loss in one kernel, for CUDA
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 256 * 4
GPT2_VOCAB_SIZE = 50257
HEAD_DIM = 64  # GPT-2's head size, taken where --n_embd is typed without --n_head
HEAD_ROWS_MULTIPLE = 128  # the rows of the head's matrix are padded to a multiple of it: kernels like round shapes
LOGITS_AT_ONCE, FUSED_LOGITS_AT_ONCE = 2**25, 2**30  # most logits in memory at a time; the second with KERNEL
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # the compile modes that launch kernels as CUDA graphs
FLOAT8_HEADS = ("fp8", "fp8_head")  # precisions whose head multiplies in float8
BYTES = dict(fp32=(4, 4), fp16=(2, 4))  # precision -> bytes of a product's operand, of the stream; others (2, 2)
FLOAT8_GRADIENT_SCALE = 2.0**15  # for gradients, which are at most 1: float8's e5m2 ends at 1.75 times that
WIDTH_MULTIPLE, FLOAT8_MULTIPLE = 8, 16  # of a product's three sizes on CUDA: 16 bytes; float8 kernels refuse others
NORM_EPS = 1e-6
NAN_POLICIES = ("stop", "skip", "rollback")
OPTIMIZERS = ("adamw", "muon")
STARTS = ("init_std", "embd_init_std", "value_init_std", "zero_init")  # the flags of the initial weights
SMEARABLE = ("embedding", "attention", "mlp")  # what --smear may name
FIRST_MOMENTUM = 0.85  # Muon's at step 0, with --momentum_warmup_steps
LARGEST_BATCH = 2**14  # most sequences in a micro-batch that --batch_size auto tries
CHECKED_TOKENS = 2**22  # read at a time when a shard's ids are checked: 8 MiB
MOST_ROLLBACKS = 3  # to one checkpoint
MEMORY_SHARE = 0.9  # of the free memory, that the plan of --batch_size auto may fill
IGNORED = -1  # a target that counts neither in the loss nor in its mean
LARGEST = 10**12  # whole number that a flag may have: a larger one is a slip, and would overflow somewhere
JOINING = datetime.timedelta(minutes=5)  # most that the processes wait for each other while they come together
PATIENCE = datetime.timedelta(minutes=10)  # and from then on: the one that they wait for may be writing a checkpoint
WANDB_PATIENCE = 60  # seconds that W&B has to start, and to send its last records
TIMING_WARMUP_STEPS = 10  # first steps, which compile and allocate, left out of step_avg
PROFILED_STEPS = 3  # that --profile traces, after those
UNKNOWN_STEPS = 10**9  # num_iterations while the first steps of --minutes are timed
FITTED_AT = (2, 5, 10, 20)  # steps after which fit_to_minutes() looks whether it can tell num_iterations
FAST_TOKENS_PER_PARAMETER = 1.061  # of blocks and head: d12_fast's 131 M tokens

# Dense bf16 peak in TFLOP/s with fp32 accumulation, from the vendor's data sheets. The first name found in the device's
# name counts, so longer names stand before their beginnings.
GPU_PEAK_TFLOPS = {
    "B200": 2250.0, "GH200": 989.4, "H200 NVL": 835.5, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.5,
    "H100": 989.4, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "RTX 5090": 209.5,
    "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71.0, "RTX 3080": 59.5,
}

# torch's kernels of scaled_dot_product_attention that --attention forces
ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}


class ConfigError(ValueError):
    """The user's flags, environment or machine cannot do what was asked."""

    exit_code, said_by_each = 2, False  # said_by_each: each process that has it says it; else the first one for all


class FullMemoryError(ConfigError):
    """What was asked for does not fit, on this process perhaps alone."""

    said_by_each = True


class DataError(ValueError):
    """A shard or a checkpoint is not what it should be."""

    exit_code, said_by_each = 2, True


class SharedDataError(DataError):
    """One that all processes have heard of."""

    said_by_each = False


class DivergedError(RuntimeError):
    """The loss or the gradient stopped being a number."""

    exit_code, said_by_each = 1, False


class LostError(RuntimeError):
    """Another process of this run is gone."""

    exit_code, said_by_each = 1, True


class Stopped(Exception):
    """A signal ended training early, in good order."""

    exit_code, said_by_each = 75, False  # sysexits.h's "try again"


KNOWN_ENDINGS = ConfigError, DataError, DivergedError, LostError, Stopped


# ----------------------------------------------------------------------------------------------------------------------
# Config: three dataclasses are the one source of flags, defaults, help and validation


def option(default, help, *, choices=None, aliases=(), switches=None, rebuilds=True, parse=None, most=None):
    """A dataclass field with what its flag needs. `choices` may be a function, for registries that stand further down;
    `switches` are flags without a value that set one, flag -> value; `rebuilds` says, for a field of GPTConfig, whether
    another value makes another network; `most` is the largest value that can be meant. The help of a switch that is on
    is that of its --no_ form, which --help shows."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, aliases=aliases, switches=switches or {}, rebuilds=rebuilds, parse=parse,
        most=most or LARGEST,
    ))


def number(text):
    """A float, also written as a fraction: 8/3."""
    try:
        return float(fractions.Fraction(text)) if "/" in text else float(text)
    except ArithmeticError as e:  # 8/0
        raise ValueError(text) from e


def number_or_auto(text):
    return text if text == "auto" else int(text)


def require(condition, message):
    if not condition:
        raise ConfigError(message)


def first_line(error):
    """What an error of a library says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown_choice(name, value, choices):
    close = difflib.get_close_matches(str(value), choices, 1)
    listed = f"choose one of {', '.join(choices)}" if len(choices) < 12 else "train_gpt2_mod.py --help lists them"
    hint = f"did you mean {close[0]}?" if close else listed
    return f"{name}={value} is not known; {hint}"


def check_fields(config):
    """Values every field must satisfy by its type and choices, whoever made the config."""
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        choices = choices() if callable(choices) else choices
        if choices and value not in choices:
            raise ConfigError(unknown_choice(f.name, value, choices))
        kinds = (int, float) if f.type is float else f.type
        right = isinstance(value, kinds) and (f.type is bool or not isinstance(value, bool))
        require(right or value is f.default is None, f"{f.name}={value!r} must be of type {f.type.__name__}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            require(math.isfinite(value) and value >= 0, f"{f.name}={value} must be a finite number of at least 0")
            limit = f.metadata["most"] if isinstance(value, int) else torch.finfo(torch.float32).max
            require(value <= limit, f"{f.name}={value} must be at most {limit:g}")


@dataclass(frozen=True)
class GPTConfig:
    """The network. --resume and --init_from keep a checkpoint's, and refuse flags that would make another of it."""

    vocab_size: int = option(GPT2_VOCAB_SIZE, "number of token ids (unset: what the shards say)", most=2**24)
    n_layer: int = option(12, "number of blocks", aliases=("n_layers",), most=1000)
    n_head: int = option(12, "query heads (unset with --n_embd typed: of size 64)", aliases=("n_heads",), most=2**16)
    n_kv_head: int = option(0, "key/value heads, a divisor of n_head; 0: n_head", aliases=("n_kv_heads",), most=2**16)
    n_embd: int = option(768, "width of the residual stream", aliases=("d_model",), most=2**20)
    tie_embeddings: bool = option(True, "give the head a matrix of its own, not the embedding's")
    bias: bool = option(False, "biases in the linear layers of the blocks, and in LayerNorms with weights")
    dropout: float = option(0.0, "share dropped of embeddings, attention weights and blocks' outputs", rebuilds=False)
    norm: str = option("rmsnorm", "kind of the norms before attention, MLP and head", choices=("rmsnorm", "layernorm"),
                       switches=dict(use_rmsnorm="rmsnorm"))
    norm_weights: bool = option(False, "learned weights in the norms before attention, MLP and head")
    norm_eps: float = option(NORM_EPS, "what those norms add to the mean square, before they divide by its root")
    post_norm: bool = option(False, "also normalise the outputs of attention and MLP, before the stream takes them")
    position: str = option("rope", "positions by rotary embeddings, or by a learned table", choices=("rope", "learned"),
                           switches=dict(use_rope="rope"))
    rope_base: float = option(10000.0, "base of the rotary frequencies")
    n_positions: int = option(1024, "positions in the learned table, the longest sequence that it allows", most=2**24)
    mixer: str = option("attention", "what mixes positions; latent is DeepSeek-V2's MLA", choices=lambda: tuple(mixers))
    kv_rank: int = option(256, "width of the latent from which MLA makes keys and values", most=2**20)
    rope_head_dim: int = option(32, "rotary dimensions of MLA's heads, beside n_embd / n_head others", most=2**20)
    qk_norm: bool = option(False, "RMSNorm of each head's queries and keys, before RoPE")
    softmax_scale: float = option(0.0, "factor of attention's scores before the softmax; 0: 1 / sqrt(head size)")
    attention_gate: int = option(0, "channels of the input that gate each head's output; 0: no gate", most=2**20)
    window: int = option(0, "tokens a query sees, its own included; 0: all before it")
    document_mask: bool = option(False, "attend within a document alone; the vocabulary's last token begins one")
    value_embeddings: int = option(0, "tables of token embeddings, mixed into the values of as many first and last "
                                   "blocks", most=500)
    x0_lambdas: bool = option(False, "begin each block with a x + b x0: stream x, embedding x0, a and b learned")
    smear: str = option("none", "add a learned share of the token before in embedding, attention, mlp; + joins them")
    embd_norm: bool = option(False, "RMSNorm of the embedding, before the first block")
    scale_attention: bool = option(True, "add attention's output as it is, not times 1/sqrt(2 n_layer)")
    mlp: str = option("gelu", "kind of MLP, by its activation; swiglu is gated", choices=lambda: tuple(mlps))
    mlp_expansion_factor: float = option(4.0, "MLP hidden width as a multiple of n_embd; 8/3 is allowed", parse=number)
    ffn_hidden: int = option(0, "MLP hidden width; 0: from mlp_expansion_factor", most=2**24)
    logit_softcap: float = option(0.0, "soft cap: logits z become cap tanh(z / cap); 0: none")
    init_std: float = option(0.0, "std of the initial matrices (c_proj's / sqrt(2 n_layer)); 0: uniform in "
                             "+-1/sqrt(fan_in)", rebuilds=False)
    embd_init_std: float = option(0.0, "std of the initial embeddings; 0: as the other matrices", rebuilds=False)
    value_init_std: float = option(0.0, "std of the initial value embeddings; 0: embd_init_std", rebuilds=False)
    zero_init: bool = option(False, "start matrices into the stream (c_proj) and an untied head at 0", rebuilds=False)
    mtp_enabled: bool = option(False, "multi-token prediction: an auxiliary loss on the tokens 2..mtp_max_steps ahead")
    mtp_heads: str = option("shared", "predict those tokens by the next token's logits, or by a block for each",
                            choices=("shared", "separate"))
    mtp_max_steps: int = option(2, "furthest token ahead that the auxiliary loss predicts", most=1000)
    mtp_weight: float = option(0.1, "weight of the auxiliary loss", rebuilds=False)
    mtp_rampup_steps: int = option(64, "steps over which mtp_weight rises linearly from 0", rebuilds=False)
    loss_clamp: float = option(0.0, "cap on a token's loss in nats while training; 0: none", rebuilds=False)
    gradient_checkpointing: bool = option(False, "run each block again in the backward pass: less memory, more time",
                                          aliases=("use_gradient_checkpointing",), rebuilds=False)
    precision: str = option("bf16", "type of matrix products; fp8_head: float8 in the head alone (unset: bf16 if CUDA "
                            "has it, else fp32)", choices=("fp32", "bf16", "fp16", "fp8", "fp8_head"),
                            switches=dict(use_fp8="fp8", use_amp="amp"), rebuilds=False)

    def __post_init__(self):
        self.settle("smear", "none" if self.smear is False else self.smear)  # a switch in older checkpoints
        check_fields(self)
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "mtp_max_steps", "kv_rank", "n_positions"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        self.settle("n_kv_head", self.n_kv_head or self.n_head)
        hidden = self.mlp_expansion_factor * self.n_embd
        require(1 <= hidden < 2**31, f"mlp_expansion_factor={self.mlp_expansion_factor} gives the MLP {hidden:g} "
                "hidden units; 4 is usual")
        if self.ffn_hidden in (0, hidden_width(self.mlp_expansion_factor, self.n_embd)):
            self.settle("ffn_hidden", hidden_width(self.mlp_expansion_factor, self.n_embd))
        else:
            self.settle("mlp_expansion_factor", self.ffn_hidden / self.n_embd)
        require(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}; "
                f"try n_embd {nearest_multiples(self.n_embd, self.n_head)}")
        divisors = [k for k in range(1, self.n_head + 1) if self.n_head % k == 0]
        require(self.n_kv_head in divisors, f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}; "
                f"try one of {', '.join(map(str, divisors))}")
        self.check_positions()
        require(self.dropout < 1, f"dropout={self.dropout} must be below 1; 0.1 is usual")
        masked = f"window={self.window}" if self.window else "document_mask" if self.document_mask else ""
        require(not (self.dropout and masked), f"dropout={self.dropout} with {masked}: the kernel of a mask has no "
                "dropout; drop one of the two")
        tables, values = self.value_embeddings, self.mixer == "attention"
        require(values or not tables, f"value_embeddings={tables} with mixer={self.mixer}, whose values come from a "
                "latent; drop one of the two")
        require(2 * tables <= self.n_layer, f"value_embeddings={tables} go into as many first and last blocks, and "
                f"n_layer={self.n_layer} has no {2 * tables}; try {self.n_layer // 2}")
        require(self.attention_gate <= self.n_embd, f"attention_gate={self.attention_gate} must be at most "
                f"n_embd={self.n_embd}, the channels that there are; 12 is usual")
        require(self.softmax_scale <= 100, f"softmax_scale={self.softmax_scale} must be at most 100; 0.12 is usual "
                "with qk_norm")
        require(0 < self.norm_eps < 1, f"norm_eps={self.norm_eps} must be above 0 and below 1; 1e-6 is usual")
        cap = self.logit_softcap
        require(cap == 0 or cap >= 1, f"logit_softcap={cap} must be 0 (none) or at least 1; 15 and 30 are usual")
        require(self.init_std < 1, f"init_std={self.init_std} must be below 1; 0.02 is usual")
        for name in ("embd_init_std", "value_init_std"):
            require(getattr(self, name) <= 10, f"{name}={getattr(self, name)} must be at most 10; 1 is usual")
        require(self.smears <= set(SMEARABLE), f"smear={self.smear} must be none or some of {', '.join(SMEARABLE)}, "
                "joined by +; try embedding+mlp")
        self.settle("smear", "+".join(part for part in SMEARABLE if part in self.smears) or "none")
        chance = math.log(self.vocab_size)
        require(self.loss_clamp == 0 or self.loss_clamp > chance, f"loss_clamp={self.loss_clamp} is not above the loss "
                f"at the start, ln(vocab_size) = {chance:.2f}, so nothing would be learned; type more, or 0 for none")

    def check_positions(self):
        latent, learned = self.mixer == "latent", self.position == "learned"
        require(not (latent and learned), "mixer=latent with position=learned: MLA's heads have a rotary part; drop "
                "one of the two")
        require(not latent or self.n_kv_head == self.n_head, f"mixer=latent with n_kv_head={self.n_kv_head}: MLA makes "
                f"keys and values for all n_head={self.n_head} heads from one latent; drop one of the two")
        require(not latent or (self.rope_head_dim > 0 and self.rope_head_dim % 2 == 0),
                f"rope_head_dim={self.rope_head_dim} must be even and at least 2; 32 is usual")
        require(latent or learned or self.head_dim % 2 == 0, f"n_embd={self.n_embd} with n_head={self.n_head} gives "
                f"head size {self.head_dim}; rotary embeddings need an even one: try n_embd {2 * self.n_embd} or half "
                "the heads")
        require(self.rope_base > 1, f"rope_base={self.rope_base} must be above 1; 10000 is usual")
        for name, used, remedy in (("rope_base", not learned, "position rope"), ("kv_rank", latent, "mixer latent"),
                                   ("rope_head_dim", latent, "mixer latent"),
                                   ("n_positions", learned, "position learned")):
            value = getattr(self, name)
            require(used or value == getattr(GPTConfig, name), f"{name}={value} would be ignored; add --{remedy}")

    def settle(self, name, value):
        """Set a field while the config is made."""
        object.__setattr__(self, name, value)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def rotary_dim(self):
        """Dimensions of a head that are rotated."""
        return self.rope_head_dim if self.mixer == "latent" else self.head_dim

    @property
    def gqa_enabled(self):
        return self.n_kv_head < self.n_head

    @property
    def mtp_offsets(self):
        """The offsets, beside 1, whose targets the training loss counts. Heads of their own are computed at any weight:
        DDP waits for their gradients in each step."""
        counts = self.mtp_enabled and (self.mtp_weight > 0 or self.mtp_heads == "separate")
        return tuple(range(2, self.mtp_max_steps + 1)) if counts else ()

    @property
    def smears(self):
        return set() if self.smear == "none" else set(self.smear.split("+"))

    @property
    def lookahead(self):
        """Targets a position needs: 1, or mtp_max_steps with MTP."""
        return self.mtp_max_steps if self.mtp_enabled else 1

    def network(self):
        """The fields that make the network what it is, as a dict. The MLP's width is in ffn_hidden alone, which several
        factors may give."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.metadata["rebuilds"] and f.name != "mlp_expansion_factor"}


def hidden_width(factor, n_embd):
    """int(factor * n_embd) of the true factor: a product that rounding left just below a whole number counts as it."""
    return int(factor * n_embd + 1e-6)


def nearest_multiples(value, of):
    below = max(0, value // of * of)
    return f"{below} or {below + of}" if below else str(of)


@dataclass(frozen=True)
class TrainConfig:
    """The run: data, batch, schedule, evaluation, output. Counts are in the unit their help names."""

    model: str = option("d12", "preset, which other flags change; any depth from d4_fast to d48_fast",
                        choices=lambda: tuple({**base_configs, **fast_presets}))
    input_bin: str = option("data/fineweb10B/fineweb_train_*.bin", "training shards (a glob pattern, quoted)")
    input_val_bin: str = option("data/fineweb10B/fineweb_val_*.bin", "validation shards; empty: no validation")
    output_dir: str = option("logs", "folder of runs; each run makes its own folder in it")
    batch_size: int = option(8, "sequences in a micro-batch of one process; auto: the most that fits and divides "
                             "--total_batch_size", parse=number_or_auto)
    sequence_length: int = option(1024, "tokens in a sequence")
    grad_accumulation_steps: int = option(0, "micro-batches a step, over all processes (unset: one per process)",
                                          aliases=("grad_accum_steps", "gradient_accumulation_steps"))
    num_iterations: int = option(1000, "optimizer steps")
    minutes: float = option(0.0, "minutes to train, compiling and validating aside; the first steps set num_iterations")
    optimizer: str = option("adamw", "what updates the blocks' matrices; all else is AdamW's", choices=OPTIMIZERS)
    learning_rate: float = option(6e-4, "highest learning rate, that after the warm-up")
    embedding_lr: float = option(0.0, "learning rate of the embeddings, tied or not; 0: learning_rate")
    value_lr: float = option(0.0, "learning rate of the value embeddings; 0: embedding_lr")
    head_lr: float = option(0.0, "learning rate of an untied head; 0: learning_rate")
    scalar_lr: float = option(0.0, "learning rate of vectors and scalars; 0: learning_rate")
    muon_lr: float = option(0.02, "learning rate of Muon's matrices, on the same schedule")
    muon_momentum: float = option(0.95, "Muon's momentum: decay of the mean of its gradients")
    muon_beta2: float = option(0.0, "NorMuon: decay of the mean squares that even Muon's updates; 0: plain Muon")
    momentum_warmup_steps: int = option(0, f"steps over which muon_momentum rises from {FIRST_MOMENTUM}")
    cautious_weight_decay: bool = option(False, "Muon decays a weight only where its update makes it smaller too")
    schedule: str = option("linear", "how the learning rate falls: linear over the last steps, or from the warm-up on "
                           "by half a cosine", choices=lambda: tuple(schedules))
    warmup_iters: int = option(0, "steps of linear warm-up from 0")
    warmdown_iters: int = option(0, "last steps, over which the linear schedule falls; 0: it stays constant")
    min_lr_fraction: float = option(0.0, "where the schedule ends, as a share of learning_rate")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices; with --optimizer muon of Muon's alone")
    beta1: float = option(0.9, "AdamW's decay of the gradient's mean")
    beta2: float = option(0.95, "AdamW's decay of the gradient's square")
    adam_eps: float = option(1e-8, "what AdamW adds to the root of the mean square")
    grad_clip: float = option(1.0, "clip the gradient of all parameters to this norm; 0: no clipping")
    seed: int = option(1337, "seed of the initial weights, of dropout and of --shuffle")
    shuffle: bool = option(False, "permute the sequences in each epoch, by seed and epoch")
    val_loss_every: int = option(250, "steps between validations; 0: only after the last step")
    val_tokens: int = option(1_048_576, "targets in a validation, from the beginning of its shards")
    val_batch_size: int = option(0, "sequences in a validation batch of one process; 0: batch_size, with --batch_size "
                                 "auto what fits")
    target_val_loss: float = option(0.0, "stop when the validation loss is at most this; 0: never")
    save_every: int = option(0, "steps between checkpoints, beside those before each validation and at the end")
    save_every_minutes: float = option(0.0, "minutes between checkpoints; 0: the steps alone decide")
    keep_last: int = option(0, "newest checkpoints to keep; 0: two, and all that --save_every asked for")
    save_checkpoints: bool = option(True, "write no checkpoints")
    nan_policy: str = option("skip", "when loss or gradient is not finite: stop, skip up to nan_limit updates, or then "
                             "rollback to a checkpoint", choices=NAN_POLICIES)
    nan_limit: int = option(5, "skipped updates in a row that end the run, or take it back to a checkpoint")
    deterministic: bool = option(False, "the same bits in each run of the same machine and flags, GPU or not; slower")
    log_every: int = option(10, "steps between lines on the console (the log file and metrics.jsonl have every step)")
    log_stats: int = option(0, "steps between logs of each layer's norms, update ratio and activation RMS; 0: never")
    device: str = option("auto", "where to train", choices=("auto", "cuda", "mps", "cpu"))
    parallel: str = option("ddp", "each process holds the whole network, or a share of it and of the optimizer's state",
                           choices=("ddp", "fsdp"))
    gradient_dtype: str = option("fp32", "type in which the processes add their gradients up", choices=("fp32", "bf16"))
    compile: bool = option(None, "torch.compile the model (unset: on CUDA)", aliases=("use_compile",))
    compile_mode: str = option("default", "how long torch.compile may search for speed; reduce-overhead and "
                               "max-autotune take CUDA graphs",
                               choices=("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"))
    attention: str = option("auto", "kernel of full attention; auto: torch's choice",
                            choices=("auto", *ATTENTION_KERNELS))
    profile: bool = option(False, f"trace {PROFILED_STEPS} steps into the run's folder, for Perfetto or TensorBoard")
    empty_cache_every: int = option(0, "steps between returns of unused memory to the GPU (CUDA, MPS); 0: never")
    log_wandb: bool = option(False, "log to Weights & Biases too (WANDB_MODE=offline needs no network)")
    wandb_project: str = option("train_gpt2_mod", "project for --log_wandb")
    wandb_name: str = option("", "the run's name in W&B; empty: its id")
    wandb_group: str = option("", "the run's group in W&B; empty: one for all runs that differ in seed alone")
    wandb_checkpoint: bool = option(False, "upload the last checkpoint to W&B as an artifact")

    def __post_init__(self):
        check_fields(self)
        counts = ("batch_size", "sequence_length", "grad_accumulation_steps", "num_iterations", "val_tokens",
                  "log_every", "nan_limit")
        for name in counts:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.schedule == "linear" or not self.warmdown_iters, f"warmdown_iters={self.warmdown_iters} would be "
                f"ignored: schedule={self.schedule} falls from the warm-up to the end; drop one of the two")
        require(self.min_lr_fraction <= 1, f"min_lr_fraction={self.min_lr_fraction} must be at most 1; 0.1 is usual")
        falls = self.schedule != "linear" or self.warmdown_iters
        require(falls or not self.min_lr_fraction, f"min_lr_fraction={self.min_lr_fraction} would be ignored: nothing "
                "falls; add --warmdown_iters or --schedule cosine")
        require(self.compile is not False or self.compile_mode == "default", f"compile_mode={self.compile_mode} would "
                "be ignored; drop it or --no_compile")
        fits = self.warmup_iters + self.warmdown_iters <= self.num_iterations
        require(fits, f"warmup_iters={self.warmup_iters} + warmdown_iters={self.warmdown_iters} must not exceed "
                f"num_iterations={self.num_iterations}; shorten them or train longer")
        require(not self.profile or self.num_iterations > PROFILED_STEPS + 1, f"profile traces {PROFILED_STEPS} steps "
                f"after two others; num_iterations={self.num_iterations} must be at least {PROFILED_STEPS + 2}")
        require(self.nan_policy != "rollback" or self.save_checkpoints, "nan_policy=rollback goes back to checkpoints; "
                "drop --no_save_checkpoints")
        require(self.input_val_bin or not self.target_val_loss, f"target_val_loss={self.target_val_loss} needs a "
                "validation; name its shards with --input_val_bin")
        for name in ("wandb_project", "wandb_name", "wandb_group", "wandb_checkpoint"):
            value = getattr(self, name)
            require(self.log_wandb or value == getattr(TrainConfig, name), f"{name}={value} would be ignored; add "
                    "--log_wandb")
        require(self.save_checkpoints or not self.wandb_checkpoint, "wandb_checkpoint has nothing to hand over; drop "
                "--no_save_checkpoints")
        for name in ("beta1", "beta2", "muon_momentum", "muon_beta2"):
            require(getattr(self, name) < 1, f"{name}={getattr(self, name)} must be below 1; 0.9 and 0.95 are usual")
        require(self.adam_eps > 0, "adam_eps=0.0 must be above 0: a token that was never seen has no gradient; 1e-8 is "
                "usual")
        own_rates = [name for name in ("embedding_lr", "value_lr", "head_lr", "scalar_lr") if getattr(self, name)]
        own_rates += ["optimizer=muon"] * (self.optimizer == "muon")
        require(self.muon_lr > 0, "muon_lr=0.0 must be above 0, or nothing that is Muon's would learn; 0.02 is usual")
        require(self.learning_rate or not own_rates, f"learning_rate=0 with {', '.join(own_rates)}: all rates follow "
                "one schedule, that of learning_rate; type a rate above 0")

    @property
    def unfitted(self):
        """Whether the steps of --minutes are not known yet."""
        return self.minutes > 0 and self.num_iterations == UNKNOWN_STEPS

    @property
    def tokens_per_step(self):
        return self.grad_accumulation_steps * self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Shorthand:
    """Flags that act once, when a run is put together: what it starts from, and short ways to set the flags above."""

    resume: str = option("", "go on from a checkpoint, or a run's newest; auto: the newest in --output_dir of the "
                         "network typed, if any")
    init_from: str = option("", "start with the weights of a checkpoint, or of a file that tools/hf.py imported")
    dry_run: bool = option(False, "say what the run would be, its parameters, FLOPs, memory and hours, and stop")
    memory_gib: float = option(0.0, "GiB that a process may take of its GPU, as if the card were smaller; 0: all")
    gqa_enabled: bool = option(False, "grouped-query attention: kv_head_ratio 0.25, embd_scale 1.12 unless typed")
    kv_head_ratio: float = option(0.25, "key/value heads as a share of the query heads, rounded down to a divisor")
    embd_scale: float = option(1.0, "widen n_embd by this factor, to a head size that is a multiple of 8", parse=number)
    total_batch_size: int = option(0, "tokens a step over all processes; sets --grad_accumulation_steps")
    tokens: int = option(0, "train on about so many tokens; sets --num_iterations", most=2**53)
    warmdown_fraction: float = option(0.0, "share of num_iterations that is warm-down; sets --warmdown_iters")


# Presets are what differs from GPTConfig's defaults, which are d12's.
HYBRID = dict(post_norm=True, qk_norm=True)
GPT2 = dict(  # Radford et al. 2019, as published: github.com/openai/gpt-2
    norm="layernorm", norm_weights=True, norm_eps=1e-5, position="learned", bias=True, mlp="gelu_tanh", dropout=0.1,
    scale_attention=False, init_std=0.02,
)
SIZED = dict(  # Llama's parts (Touvron et al. 2023, arXiv:2302.13971, section 2.2), tied, with grouped queries
    vocab_size=32768, norm_weights=True, mlp="swiglu", mlp_expansion_factor=8 / 3, n_kv_head=4, scale_attention=False,
    init_std=0.02,
)
FAST = dict(  # but for the MLPs' smear and the tied start from records of github.com/KellerJordan/modded-nanogpt
    qk_norm=True, softmax_scale=0.12, attention_gate=12, mlp="relu2", scale_attention=False, embd_norm=True,
    embd_init_std=0.02, zero_init=True, x0_lambdas=True, value_embeddings=3, value_init_std=1.0, logit_softcap=15.0,
    smear="embedding+mlp",
)
base_configs: dict[str, dict[str, Any]] = {
    "d12": dict(),
    "d12_mlp3x": dict(n_head=13, n_embd=832, mlp_expansion_factor=3.0, **HYBRID),
    "d12_mlp2x": dict(n_head=15, n_embd=960, mlp_expansion_factor=2.0, **HYBRID),
    "d12_mlp3x_no_comp": dict(mlp_expansion_factor=3.0, **HYBRID),
    "d12_post_norm": dict(post_norm=True),
    "d12_post_norm_qk_norm": dict(**HYBRID),
    "d12_gqa": dict(n_kv_head=4, **HYBRID),
    "d12_mqa": dict(n_kv_head=1),
    "d12_window": dict(window=256, **HYBRID),
    "d12_window_large": dict(window=512, **HYBRID),
    "d12_swiglu": dict(mlp="swiglu", mlp_expansion_factor=8 / 3),
    "d24": dict(n_layer=24, n_head=16, n_embd=1024),
    "d36": dict(n_layer=36, n_head=20, n_embd=1280),
    "d48": dict(n_layer=48, n_head=25, n_embd=1600),
    "d12_mla": dict(mixer="latent", **HYBRID),
    "gpt2": dict(**GPT2),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, **GPT2),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, **GPT2),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, **GPT2),
    "sized": dict(**SIZED),
    "sized_small": dict(ffn_hidden=2560, **SIZED),
    "sized_current": dict(n_layer=32, ffn_hidden=2048, **SIZED),
    "sized_medium_deep": dict(n_layer=20, ffn_hidden=2304, **SIZED),
    "sized_wide_shallow": dict(n_head=16, n_embd=1024, ffn_hidden=2730, **SIZED),
    "sized_medium": dict(n_layer=24, n_head=16, n_embd=1024, ffn_hidden=4096, **SIZED),
    "sized_16_layers": dict(n_layer=16, ffn_hidden=2304, **SIZED),
    "sized_24_layers": dict(n_layer=24, ffn_hidden=2048, **SIZED),
    "sized_40_layers": dict(n_layer=40, ffn_hidden=1792, **SIZED),
    "sized_16gb": dict(ffn_hidden=2048, **SIZED),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),
    "mini": dict(n_layer=6, n_head=6, n_embd=384),
}


def fast_configs(depth):
    """(The network, and what differs from the defaults when a run begins with it) of the preset of so many blocks. How
    width, batch, rates and decay go with depth are nanochat's rules (github.com/karpathy/nanochat), but that rates and
    decay do not go with the batch (docs/05-depth-rules); the values of 12 blocks are those of docs/04-time-to-loss."""
    width = 128 * math.ceil(depth / 2)
    network = dict(FAST, n_layer=depth, n_embd=width, n_head=width // 128, value_embeddings=min(3, depth // 2))
    size, size_of_12 = (12 * n * w**2 + GPT2_VOCAB_SIZE * w for n, w in ((depth, width), (12, 768)))
    batch = 2 ** round(16 + 0.383 * math.log2(size / size_of_12))
    steps = round(FAST_TOKENS_PER_PARAMETER * size / batch)
    wide = 1 / math.sqrt(width / 768)
    return network, dict(
        optimizer="muon", muon_lr=0.02, muon_beta2=0.95, momentum_warmup_steps=300, cautious_weight_decay=True,
        weight_decay=0.1 * (12 / depth), learning_rate=0.004 * wide, value_lr=0.3 * wide, scalar_lr=0.02,
        beta1=0.8, adam_eps=1e-10, grad_clip=0.0, tokens_per_step=batch, num_iterations=steps, shuffle=True,
        warmdown_fraction=0.6, min_lr_fraction=0.1, precision="fast",
    )


fast_presets = {f"d{depth}_fast": fast_configs(depth) for depth in range(4, 49)}
base_configs["d12_fast"] = fast_presets["d12_fast"][0]  # which stands for them where presets are listed


def preset(name):
    """(What differs from GPTConfig's defaults, what from TrainConfig's)."""
    return fast_presets.get(name) or (base_configs[name], {})


class Machine(NamedTuple):
    """What the rules may know of the place a run is put together on."""

    world_size: int
    device_type: str
    has_bf16: bool
    has_fp8: bool
    vocab_size: int = 0  # of the shards; 0: they are not looked at
    memory: int = 0  # free bytes of one device; 0: nobody knows


ANY_MACHINE = Machine(world_size=1, device_type="cuda", has_bf16=True, has_fp8=True)

# From flags to a configuration: an ordered list of pure rules. Each takes the fields known so far, what was typed and
# the machine; it gives the fields it sets and a note for the log (or None), or None where it sets none. A rule acts
# only on what was typed or is still unknown, so a resolved configuration passes through unchanged.


def rule_heads_of_width(fields, typed, machine):
    require(fields["n_head"] >= 1, f"n_head={fields['n_head']} must be at least 1")
    if "n_embd" not in typed or "n_head" in typed:
        return None
    width = typed["n_embd"]
    require(width >= HEAD_DIM and width % HEAD_DIM == 0, f"n_embd={width} must be a multiple of {HEAD_DIM} when no "
            f"--n_head is typed; type one, or try n_embd {nearest_multiples(width, HEAD_DIM)}")
    return dict(n_head=width // HEAD_DIM), f"n_head={width // HEAD_DIM}: heads of size {HEAD_DIM} for n_embd={width}"


def largest_divisor(number, limit):
    """The largest divisor of a number that is at most the limit, and at least 1."""
    return next(k for k in range(max(1, int(limit)), 0, -1) if number % k == 0)


def rule_kv_heads(fields, typed, machine):
    n_head = fields["n_head"]
    wanted = typed.get("gqa_enabled", False)
    if "n_kv_head" in typed:
        require("kv_head_ratio" not in typed, "n_kv_head and kv_head_ratio both say how many key/value heads; drop one")
        kept = typed["n_kv_head"] or n_head
        require(not wanted or kept < n_head, f"gqa_enabled needs fewer key/value heads than n_head={n_head}, "
                f"not n_kv_head={kept}; drop one of the two flags")
        return None
    if "kv_head_ratio" not in typed and (not wanted or 0 < fields["n_kv_head"] < n_head):
        kept = fields["n_kv_head"]
        if kept == 0 or n_head % kept == 0 or not typed.keys() & {"n_embd", "n_head"}:
            return None
        fitting = largest_divisor(n_head, kept)
        return dict(n_kv_head=fitting), f"n_kv_head={fitting}: the largest divisor of n_head={n_head} up to {kept}"
    ratio = typed.get("kv_head_ratio", Shorthand.kv_head_ratio)
    require(0 < ratio <= 1, f"kv_head_ratio={ratio} must be above 0 and at most 1")
    n_kv_head = largest_divisor(n_head, n_head * ratio)
    require(not wanted or n_kv_head < n_head, f"kv_head_ratio={ratio} leaves all {n_head} key/value heads, "
            "which is not what gqa_enabled asks for; lower the ratio or drop the flag")
    return dict(n_kv_head=n_kv_head), f"n_kv_head={n_kv_head}: {ratio:g} of n_head={n_head}"


def rule_embd_scale(fields, typed, machine):
    scale = typed.get("embd_scale", 1.12 if typed.get("gqa_enabled") else 1.0)
    if scale == 1.0:
        return None
    n_embd, n_head = fields["n_embd"], fields["n_head"]
    require(0 < scale < 100, f"embd_scale={scale} must be above 0 and below 100")
    head_dim = max(8, 8 * math.floor(n_embd * scale / n_head / 8 + 0.5))
    note = f"n_embd={n_head * head_dim}: {n_embd} x {scale:g} in {n_head} heads of size {head_dim}, a multiple of 8"
    return dict(n_embd=n_head * head_dim), note


def rule_ffn_hidden(fields, typed, machine):
    if "mlp_expansion_factor" not in typed or not fields["ffn_hidden"]:
        return None
    hidden = hidden_width(typed["mlp_expansion_factor"], fields["n_embd"])
    require(typed.get("ffn_hidden", hidden) == hidden, f"ffn_hidden={fields['ffn_hidden']} is not mlp_expansion_factor="
            f"{typed['mlp_expansion_factor']:g} times n_embd={fields['n_embd']}; drop one of the two flags")
    return dict(ffn_hidden=0), None


def rule_mtp(fields, typed, machine):
    ignored = [name for name in typed if name.startswith("mtp_") and name != "mtp_enabled"]
    require(fields["mtp_enabled"] or not ignored, f"{', '.join(ignored)} without mtp_enabled would be ignored; "
            "add --mtp_enabled")


def rule_positions(fields, typed, machine):
    length, positions = fields["sequence_length"], fields["n_positions"]
    require(fields["position"] == "rope" or length <= positions, f"sequence_length={length} is longer than the "
            f"n_positions={positions} that are learned; lower it, or start a network with --position rope")


def rule_precision(fields, typed, machine):
    cuda, wanted = machine.device_type == "cuda", fields.get("precision")
    if wanted == "fast" and "precision" not in typed:  # of a preset
        wanted = "fp8_head" if machine.has_fp8 else None
    if wanted is None:
        return dict(precision="bf16" if cuda and machine.has_bf16 else "fp32"), None
    if wanted == "amp":
        return dict(precision="fp16" if cuda and not machine.has_bf16 else "bf16"), None
    require(wanted != "fp16" or cuda, f"precision=fp16 needs CUDA, and this run is on {machine.device_type}; use bf16 "
            "or fp32")
    require(wanted not in FLOAT8_HEADS or machine.has_fp8, f"precision={wanted} needs a GPU with float8 matrix "
            "products (compute capability 8.9 or more: Ada, Hopper, Blackwell), which this one is not; use bf16")
    return dict(precision=wanted), None


def rule_kernels(fields, typed, machine):
    """Flags about kernels that this run would not use."""
    cuda = machine.device_type == "cuda"
    kernel, mode = fields["attention"], typed.get("compile_mode", "default")
    for name in ("window", "document_mask"):
        require(kernel == "auto" or not fields[name], f"attention={kernel} would be ignored: {name}={fields[name]} has "
                "a kernel of its own; drop one of the two")
    require(cuda or kernel == "math" or kernel not in ATTENTION_KERNELS, f"attention={kernel} needs CUDA, and this run "
            f"is on {machine.device_type}; drop it, or in a resume add --attention auto")
    require(mode == "default" or cuda or fields["compile"], f"compile_mode={mode} would be ignored: on "
            f"{machine.device_type} nothing is compiled unless you add --compile")
    require(not typed.get("empty_cache_every") or machine.device_type != "cpu", "empty_cache_every would be ignored: "
            "a CPU keeps no such cache; drop it")


def rule_parallel(fields, typed, machine):
    """What is for several processes: one alone refuses it typed, and drops it where it resumes what several began."""
    several, meant = machine.world_size > 1, dict(parallel="fsdp", gradient_dtype="bf16")
    for name, value in meant.items():
        require(several or typed.get(name) != value, f"{name}={value} is for several processes, and this run is one; "
                "launch it with torchrun, or drop it")
    if not several:
        return {name: getattr(TrainConfig, name) for name, value in meant.items() if fields[name] == value}, None
    fsdp, mode = fields["parallel"] == "fsdp", fields["compile_mode"]
    require(not fsdp or machine.device_type != "mps", "device=mps with parallel=fsdp: torch has no such processes on "
            "an Apple GPU; drop one of the two")
    require(not fsdp or mode not in CUDA_GRAPHS, f"compile_mode={mode} with parallel=fsdp: "
            "CUDA graphs want weights that stay where they are; drop one of the two")


def rule_optimizer(fields, typed, machine):
    """Flags of an optimizer that this run does not have are refused; what a preset says of it does not count."""
    defaults = field_defaults(TrainConfig)
    muons = ("muon_lr", "muon_momentum", "muon_beta2", "momentum_warmup_steps", "cautious_weight_decay")
    ignored = [name for name in muons if typed.get(name, defaults[name]) != defaults[name]]
    require(fields["optimizer"] == "muon" or not ignored, f"{', '.join(ignored)} without optimizer=muon would be "
            "ignored; add --optimizer muon")
    untied = not fields["tie_embeddings"]
    require(untied or not typed.get("head_lr"), f"head_lr={typed.get('head_lr')} would be ignored: the head is the "
            "embedding, whose rate is embedding_lr; drop it, or add --no_tie_embeddings")
    for name in ("value_lr", "value_init_std"):
        require(fields["value_embeddings"] or not typed.get(name), f"{name}={typed.get(name)} would be ignored: there "
                "are no value embeddings; drop it, or add --value_embeddings 3")
    return {} if fields["optimizer"] == "muon" else {name: defaults[name] for name in muons}, None


def rule_length(fields, typed, machine):
    """The steps of --tokens; those of --minutes are found while training, and until then there is no end."""
    require(typed.get("tokens", 1) > 0, f"tokens={typed.get('tokens')} must be at least 1")
    given = [name for name in ("num_iterations", "tokens", "minutes") if typed.get(name)]
    require(len(given) < 2, f"{' and '.join(given)} each say how long the run is; drop all but one")
    if typed.get("minutes"):
        require("warmdown_iters" not in typed, "warmdown_iters with minutes: how many steps there will be is not known "
                "yet; type --warmdown_fraction")
        share = fields["warmdown_iters"] / fields["num_iterations"]  # of a checkpoint's run
        return dict(num_iterations=UNKNOWN_STEPS, warmdown_iters=round(share * UNKNOWN_STEPS)), None
    if not typed.get("tokens"):
        return dict(minutes=0.0) if typed.get("num_iterations") else {}, None
    step = fields["grad_accumulation_steps"] * fields["batch_size"] * fields["sequence_length"]
    steps = max(1, round(typed["tokens"] / step))
    return dict(num_iterations=steps, minutes=0.0), f"num_iterations={steps}: {steps * step:,} tokens"


def rule_warmdown(fields, typed, machine):
    """The linear schedule's warm-down as a share of the run, unless it is typed in steps."""
    wanted, share = "warmdown_fraction" in typed, fields.get("warmdown_fraction", 0.0)
    require(0 <= share <= 1, f"warmdown_fraction={share} must be from 0 to 1; 0.5 is usual")
    if wanted:
        require("warmdown_iters" not in typed, "warmdown_iters and warmdown_fraction both say how long the warm-down "
                "is; drop one")
        require(fields["schedule"] == "linear", f"warmdown_fraction={share} would be ignored: "
                f"schedule={fields['schedule']} has no warm-down; drop one of the two")
    changes, note, linear, steps = {}, None, fields["schedule"] == "linear", fields["num_iterations"]
    if wanted or (share and linear and "warmdown_iters" not in typed):
        meant, left = round(share * steps), max(0, steps - fields["warmup_iters"])
        changes["warmdown_iters"] = min(meant, left)
        if steps != UNKNOWN_STEPS:
            note = f"warmdown_iters={changes['warmdown_iters']}: {share:g} of num_iterations={steps}"
            note += f", as far as warmup_iters={fields['warmup_iters']} leaves it" if meant > left else ""
    falls = not linear or changes.get("warmdown_iters", fields["warmdown_iters"])
    if not falls and "min_lr_fraction" not in typed:  # a preset's gives way
        changes["min_lr_fraction"] = 0.0
    return changes, note


def rule_checkpoints(fields, typed, machine):
    """Flags about checkpoints and skipped updates that this run would not use."""
    for name in ("save_every", "save_every_minutes", "keep_last"):
        require(fields["save_checkpoints"] or not typed.get(name), f"{name}={typed.get(name)} would be ignored; "
                "drop it or --no_save_checkpoints")
    limit = typed.get("nan_limit", TrainConfig.nan_limit)
    require(fields["nan_policy"] != "stop" or limit == TrainConfig.nan_limit, f"nan_limit={limit} would be ignored: "
            "nan_policy=stop ends with the first; drop one of the two")


def rule_vocabulary(fields, typed, machine):
    known, shards = fields.get("vocab_size", GPT2_VOCAB_SIZE), machine.vocab_size
    size = typed.get("vocab_size", shards or known)
    require(size == (shards or size), f"vocab_size={size} differs from the shards' vocabulary of {shards}; "
            "drop --vocab_size or name other shards")
    note = None if size == known or "vocab_size" not in fields else f"vocab_size={size}: the shards', not {known}"
    return dict(vocab_size=size), note


def rule_batch_size(fields, typed, machine):
    """--batch_size auto: the largest micro-batch that divides the tokens a step and fits by the memory plan."""
    if fields["batch_size"] != "auto":
        return None
    T, world, tokens = fields["sequence_length"], machine.world_size, typed.get("total_batch_size")
    tokens = fields.get("tokens_per_step", 0) if tokens is None else tokens
    require(tokens, "batch_size=auto keeps the tokens a step; say how many with --total_batch_size")
    require(T >= 1, f"sequence_length={T} must be at least 1")
    require(tokens >= T * world and tokens % (T * world) == 0, f"total_batch_size={tokens} must be a multiple of "
            f"sequence_length x processes = {T} x {world}; try {nearest_multiples(tokens, T * world)}")
    require(machine.memory, "batch_size=auto needs a device that says how much memory is free; type a number")
    config = GPTConfig(**{f.name: fields[f.name] for f in dataclasses.fields(GPTConfig)})
    with torch.device("meta"):
        model = GPT(config)
    room, least = MEMORY_SHARE * machine.memory, T * world  # bytes; tokens of one sequence for each process

    def needed(size, training):
        run = TrainConfig(batch_size=size, sequence_length=T, grad_accumulation_steps=max(1, tokens // (size * T)),
                          parallel=fields["parallel"], optimizer=fields["optimizer"])
        return sum(memory_plan(config, run, model, world, training).values())

    most = min(tokens // least, LARGEST_BATCH)
    sizes = [size for size in range(1, most + 1) if tokens % (size * least) == 0]
    size = max((size for size in sizes if needed(size, True) <= room), default=None)
    require(size, f"batch_size=auto: one sequence of {T} takes {needed(1, True) / 2**20:,.0f} MiB by the memory plan, "
            f"and there is room for {room / 2**20:,.0f}; add --gradient_checkpointing or lower --sequence_length")
    changes = dict(batch_size=size)
    if not fields["val_batch_size"]:
        most = max(size, fields["val_tokens"] // least)
        doubled = (size * 2**i for i in range(most.bit_length()) if size * 2**i <= most)
        changes["val_batch_size"] = max(s for s in doubled if s == size or needed(s, False) <= room)
    return changes, (f"batch_size={size}: a plan of {needed(size, True) / 2**20:,.0f} MiB, with room for "
                     f"{room / 2**20:,.0f}; val_batch_size={changes.get('val_batch_size', fields['val_batch_size'])}")


def rule_accumulation(fields, typed, machine):
    """Micro-batches a step, as typed in either way; else as many tokens as a resumed run had; else one per process."""
    per_micro_batch, world = fields["batch_size"] * fields["sequence_length"], machine.world_size
    for name in ("batch_size", "sequence_length"):
        require(fields[name] >= 1, f"{name}={fields[name]} must be at least 1")
    tokens, steps = typed.get("total_batch_size"), typed.get("grad_accumulation_steps")
    if tokens is None and steps is None:
        tokens = fields.get("tokens_per_step")  # of the preset, or of the checkpoint: a resume keeps it
        steps = world if tokens is None else None
    if tokens is not None:
        step_tokens = per_micro_batch * world
        said = "total_batch_size" + " (the checkpoint's or the preset's)" * ("total_batch_size" not in typed)
        require(tokens >= step_tokens and tokens % step_tokens == 0,
                f"{said}={tokens} must be a multiple of batch_size x sequence_length x processes = "
                f"{fields['batch_size']} x {fields['sequence_length']} x {world} = {step_tokens}; "
                f"try {nearest_multiples(tokens, step_tokens)}")
        require(steps in (None, tokens // per_micro_batch), f"total_batch_size={tokens} takes "
                f"{tokens // per_micro_batch} micro-batches, not grad_accumulation_steps={steps}; drop one of the two")
        steps = tokens // per_micro_batch
    require(steps >= 1 and steps % world == 0, f"grad_accumulation_steps={steps} counts micro-batches over all "
            f"processes and must be a multiple of their number, {world}; try {nearest_multiples(steps, world)}")
    note = (f"tokens per step: {steps * per_micro_batch:,} = {steps} x {fields['batch_size']} x "
            f"{fields['sequence_length']} (micro-batches x sequences x tokens)")
    return dict(grad_accumulation_steps=steps), note


RULES = (
    # rule, and the shorthands it consumes
    (rule_heads_of_width, ()),
    (rule_kv_heads, ("gqa_enabled", "kv_head_ratio")),
    (rule_embd_scale, ("embd_scale",)),
    (rule_ffn_hidden, ()),
    (rule_mtp, ()),
    (rule_positions, ()),
    (rule_precision, ()),
    (rule_kernels, ()),
    (rule_parallel, ()),
    (rule_optimizer, ()),
    (rule_checkpoints, ()),
    (rule_vocabulary, ()),
    (rule_batch_size, ()),
    (rule_accumulation, ("total_batch_size",)),
    (rule_length, ("tokens",)),
    (rule_warmdown, ("warmdown_fraction",)),
)
PRESET_FLAGS = {"model", "gqa_enabled", "kv_head_ratio", "embd_scale"}  # typed, they start from a preset's numbers
FOUND_BY_RULES = ("vocab_size", "precision", "grad_accumulation_steps")  # no default counts: a rule finds them


def field_defaults(cls):
    """Field name -> default, without the fields for which a rule finds the value."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in FOUND_BY_RULES}


def fields_before_typed(typed, base):
    """Field name -> value before what was typed counts: a default, a preset's or a checkpoint's, as resolve() says."""
    network = field_defaults(GPTConfig)
    fields = {**field_defaults(TrainConfig), **(base or network)}
    if base is None or typed.keys() & PRESET_FLAGS:
        name, known = typed.get("model", fields["model"]), {**base_configs, **fast_presets}
        require(name in known, unknown_choice("model", name, known))
        preset_network, preset_training = preset(name)
        fields.update(network, **preset_network)
        if "tokens_per_step" not in fields:  # which a resumed run has: it trains on as it began
            fields.update(preset_training)
    return fields


def resolve(typed, machine, base=None):
    """Turn typed flags into the two configurations.

    Precedence: defaults < preset < typed; with `base` (the fields of a checkpoint's configurations) it is base < typed,
    and a typed --model, or a shorthand that starts from the preset's numbers, puts the preset in place of base's
    network. Returns GPTConfig, TrainConfig, notes for the log.
    """
    fields = {**fields_before_typed(typed, base), **typed}
    if base and not typed.keys() & PRESET_FLAGS and typed.get("n_embd") == base["n_embd"]:
        typed = {name: value for name, value in typed.items() if name != "n_embd"}  # which asks for no other heads
    for f in (f for cls in (GPTConfig, TrainConfig, Shorthand) for f in dataclasses.fields(cls)):
        value = fields.get(f.name)
        require(not isinstance(value, int) or value <= f.metadata["most"],
                f"{f.name}={value} must be at most {f.metadata['most']:g}")
    consumed, notes = {"resume", "init_from", "dry_run", "memory_gib", "tokens_per_step"}, []
    for rule, consumes in RULES:
        changes, note = rule(fields, typed, machine) or ({}, None)
        fields.update(changes)
        consumed.update(consumes)
        notes += [note] if note else []
    gpt, run = ({f.name: fields[f.name] for f in dataclasses.fields(c)} for c in (GPTConfig, TrainConfig))
    left_over = set(fields) - set(gpt) - set(run) - consumed
    assert not left_over, f"no rule consumes {left_over}"
    return GPTConfig(**gpt), TrainConfig(**run), notes


class FlagParser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like all others."""

    def error(self, message):
        raise ConfigError(f"{message}; --help lists the flags")


def make_parser():
    """The parser of all flags, from the fields of the three dataclasses."""
    about = f"{__doc__.split(chr(10))[0]} Dashes and underscores are the same; of a flag typed twice the last counts."
    parser = FlagParser(prog="train_gpt2_mod.py", description=about, allow_abbrev=False,
                        argument_default=argparse.SUPPRESS)
    for cls in (GPTConfig, TrainConfig, Shorthand):
        group = parser.add_argument_group(cls.__name__, cls.__doc__.split("\n\n")[0])
        for f in dataclasses.fields(cls):
            choices = f.metadata["choices"]
            choices = choices() if callable(choices) else choices
            listed = base_configs if f.name == "model" else choices
            text = f.metadata["help"] + (f": {', '.join(listed)}" if choices else "")
            if f.type is not bool and f.default != "" and f.name not in FOUND_BY_RULES:
                text += f" [{f.default}]"
            text = text.replace("%", "%%")
            names = (f.name, *f.metadata["aliases"])
            settings = dict(dest=f.name, help=text)
            for switch, value in f.metadata["switches"].items():
                group.add_argument(f"--{switch}", dest=f.name, action="store_const", const=value,
                                   help=f"--{f.name} {value}")
            if f.type is not bool:
                kind = f.metadata["parse"] or f.type
                group.add_argument(*(f"--{n}" for n in names), type=kind, metavar=f.type.__name__.upper(), **settings)
                continue
            switches = dict(store_true="--", store_false="--no_") if cls is not Shorthand else dict(store_true="--")
            for action, dashes in switches.items():  # --help shows the one that changes something
                settings["help"] = argparse.SUPPRESS if (action == "store_true") == (f.default is True) else text
                group.add_argument(*(dashes + n for n in names), action=action, **settings)
    return parser


def parse_flags(argv):
    """What was typed, as a dict from field name to value. Dashes and underscores are the same in a flag's name, and
    every boolean flag has its --no_ form."""
    parser, normal = make_parser(), []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        dashed = flag.startswith("--") and len(flag) > 2
        normal.append("--" + flag[2:].replace("-", "_") + equals + value if dashed else argument)
    typed, unknown = parser.parse_known_args(normal)
    if unknown:
        flag = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(flag, parser._option_string_actions, 1)
        raise ConfigError(f"{flag} is not a flag; " + (f"did you mean {close[0]}?" if close else "--help lists them"))
    for name, value in vars(typed).items():
        require(value != [], f"{name} has no value; --help lists the flags")  # argparse's reading of --name=--
    return vars(typed)


# ----------------------------------------------------------------------------------------------------------------------
# World and log: the processes, and where lines and records go


def torchrun_place():
    """(rank, local rank, number of processes) from torchrun's environment; without torchrun one process."""
    try:
        given = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
        rank, local_rank, size = (int(os.environ.get(name, given[name])) for name in given)
    except ValueError as e:
        raise ConfigError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers ({e}); launch with torchrun") from e
    require(0 <= rank < size, f"RANK={rank} must be below WORLD_SIZE={size}; launch with torchrun")
    return rank, local_rank, size


def speaks_for_all():
    """Whether this process is the one that says what all of them know."""
    try:
        return torchrun_place()[0] == 0
    except ConfigError:
        return True


class World:
    """The processes of this run as torchrun's environment tells them (without torchrun: one), and this one's device.

    A context manager: the process group lives inside it. Reductions are over all processes, so that the loop has no
    `if distributed`.
    """

    def __init__(self, device="auto", memory_gib=0):
        self.rank, self.local_rank, self.size = torchrun_place()
        self.is_main = self.rank == 0
        self.device = self.find_device(device)
        if memory_gib:
            self.limit_memory(memory_gib)

    def find_device(self, wanted):
        available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
        kind = next(d for d in available if available[d]) if wanted == "auto" else wanted
        require(kind in available, unknown_choice("device", kind, ("auto", *available)))
        require(available[kind], f"device={kind} is not available to torch {torch.__version__}; use one of "
                f"{', '.join(d for d in available if available[d])}")
        if kind != "cuda":
            return torch.device(kind)
        require(self.local_rank < torch.cuda.device_count(), f"local rank {self.local_rank} has no GPU of its own: "
                f"{torch.cuda.device_count()} visible; lower --nproc_per_node")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def limit_memory(self, gib):
        """Let this process have so much of its GPU and no more, as if the card were smaller."""
        require(self.device.type == "cuda", f"memory_gib={gib:g} can be held only on a CUDA device, and this run is on "
                f"{self.device.type}; drop it")
        total = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        require(gib <= total, f"memory_gib={gib:g} must be at most what the device has, {total:.1f}; lower it")
        torch.cuda.set_per_process_memory_fraction(gib / total)

    def machine(self, vocab_size=0):
        cuda = self.device.type == "cuda"
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        fp8 = cuda and torch.cuda.get_device_capability() >= (8, 9)
        return Machine(self.size, self.device.type, bf16, fp8, vocab_size, min(self.gather(self.free_memory())))

    def free_memory(self):
        """Free bytes of this process's device, 0 where nobody says."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            return min(free, int(total * torch.cuda.get_per_process_memory_fraction()))
        if self.device.type == "mps":
            return torch.mps.recommended_max_memory()
        pages = "SC_AVPHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // self.size if pages in os.sysconf_names else 0

    def __enter__(self):
        if self.size > 1:
            require("MASTER_ADDR" in os.environ, f"WORLD_SIZE={self.size} without MASTER_ADDR; launch with torchrun")
            one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(self.size)
            shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
            require(one_host or restarts == "0" or not shared_store, f"max_restarts={restarts} of torchrun on several "
                    "machines: none would succeed; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for all of them")
            try:
                self.join(one_host)
            except (RuntimeError, ValueError) as e:
                raise LostError(f"the {self.size} processes did not all come together ({first_line(e)}); see what the "
                                "others say, or check torchrun's --nnodes and --rdzv_endpoint, and that "
                                "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network between the hosts") from e
        return self

    def join(self, one_host):
        """Make the process group. After a restart torchrun's store still holds the addresses of the processes that
        died, and the new ones dial them (github.com/pytorch/pytorch/issues/135712): on one host each attempt has its
        own keys in the store."""
        cuda, meeting, attempt = self.device.type == "cuda", {}, os.environ.get("TORCHELASTIC_RESTART_COUNT")
        if one_host and attempt is not None:
            store, rank, size = next(dist.rendezvous("env://", timeout=JOINING))
            meeting = dict(store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=JOINING, device_id=self.device if cuda else None,
                                **meeting)

    def __exit__(self, kind, error, trace):
        # A DDP object that outlives its process group aborts gloo at exit, so it goes first: also out of the frames
        # that an error keeps alive.
        traceback.clear_frames(trace)
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()

    def require_alike(self, mine):
        """Raise ConfigError where another process has not what the first one has, {name: text}."""
        (first_host, first), *others = self.gather((platform.node(), mine))
        for rank, (host, theirs) in enumerate(others, 1):
            unlike = [f"{name} is {theirs.get(name, 'not there')}, not {first.get(name, 'there')}"
                      for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
            require(not unlike, f"process {rank} on {host} is not like process 0 on {first_host}: {'; '.join(unlike)}; "
                    "give all of them the same script, torch, shards and flags")

    def wait_longer(self):
        """From here on have the processes, which have come together in JOINING, wait PATIENCE for each other."""
        dist.distributed_c10d._set_pg_timeout(PATIENCE)

    def sum(self, tensor):
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """Mean over the processes, in place."""
        return self.sum(tensor) if self.size == 1 else self.sum(tensor).div_(self.size)

    def gather(self, item):
        """The items of all processes in order of rank, on every process."""
        items = [item]
        if dist.is_initialized():
            items = [None] * self.size
            dist.all_gather_object(items, item)
        return items

    def read_later(self, tensor):
        """A function that gives the tensor's values as a list, waiting only for what was queued before this call."""
        if self.device.type != "cuda":
            return tensor.tolist
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def read():
            event.synchronize()
            return copy.tolist()

        return read

    def synchronize(self):
        """Wait until the device has done all that was asked of it."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def empty_cache(self):
        """Return the memory that torch keeps for later to the GPU."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).empty_cache()

    def peak_memory_mb(self):
        """Peak memory of this process in MiB: of the device where it keeps count, else resident on the host."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() // 2**20
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() // 2**20
        import resource  # not on Windows

        unit = 1 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20

    def peak_flops(self):
        """The device's dense bf16 peak in FLOP/s, None where the table does not know it."""
        if self.device.type != "cuda":
            return None
        name, variants = torch.cuda.get_device_name(), r"(?! (?:Ti|SUPER|D|Laptop)\b)"  # which have peaks of their own
        known = (peak for gpu, peak in GPU_PEAK_TFLOPS.items() if re.search(rf"\b{gpu}\b{variants}", name))
        return next((1e12 * peak for peak in known), None)

    def describe(self):
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()
        count = f"{self.size} process{'es' * (self.size > 1)}"
        return f"{count} on {self.device.type} ({name}), {torch.get_num_threads()} CPU threads"


class StopSignals:
    """The signals that end training in good order: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1. `asked` names the first that
    came, None before; the loop looks at it after each step.

    Another one ends the process at once, whatever it is waiting for; within REPEATED seconds of the first it counts as
    the same, since a terminal and torchrun both pass a Ctrl-C on. Python's handlers only run when the main thread is
    next in Python, so a thread of its own reads the signals from a pipe.
    """

    HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    REPEATED = 1.0

    def __enter__(self):
        self.asked, self.handlers = None, {}
        if threading.current_thread() is threading.main_thread():  # Python allows no other to handle signals
            reading, self.pipe = os.pipe()
            os.set_blocking(self.pipe, False)
            self.handlers = {number: signal.signal(number, lambda *_: None) for number in self.HANDLED}
            self.wakeup = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
            threading.Thread(target=self.watch, args=(reading,), daemon=True).start()
        return self

    def watch(self, reading):
        first = math.inf
        while number := os.read(reading, 1):
            now, number = time.monotonic(), number[0]
            if number in self.HANDLED and self.asked is None:
                self.asked, first = signal.Signals(number).name, now
            elif number in self.HANDLED and now - first > self.REPEATED:
                os._exit(128 + number)
        os.close(reading)

    def __exit__(self, *error):
        if self.handlers:
            signal.set_wakeup_fd(self.wakeup)
            os.close(self.pipe)  # which ends the thread
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class NullLog:
    """Takes everything, writes nothing: the log of every process but the first, and the base of RunLog."""

    def text(self, line):
        """A line for the console and the log file."""

    def record(self, record, steps):
        """One flat record: formatted for the eye, whole for metrics.jsonl and W&B. `steps` is the run's total."""

    def rewind(self, step):
        """Forget the records of later steps, and this one's validation: they will be done again."""

    def ending(self, reason):
        """Why the run ends, for the log file: the console has it from main()."""

    def summary(self, details, checkpoint):
        """What there is to say of a whole run, as a dict for W&B (the log has it in words); whether it gets the last
        checkpoint too."""

    def close(self):
        """Flush and release."""


class GrowingFile:
    """A text file that is only added to, each line at once. What a full disk does not take waits for the next line."""

    def __init__(self, path):
        self.file, self.waiting, self.error = open(path, "ab", buffering=0), b"", None

    def write(self, text):
        self.waiting += text.encode("utf-8", "backslashreplace")
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
            self.error = None
        except OSError as e:
            self.error = e

    def close(self):
        self.write("")
        self.file.close()


class RunLog(NullLog):
    """Console, <run_id>.log, metrics.jsonl and, when asked, W&B. Each step is in all files; on the console every
    `log_every`-th step stays, and on a terminal the last line shows the steps between. Nothing that happens to one of
    them ends training; the console says what did."""

    def __init__(self, folder, lock, log_every, wandb_run=None):
        self.folder, self.lock, self.log_every, self.wandb_run = folder, lock, log_every, wandb_run
        self.complained = False  # of a file that cannot be written
        # W&B's step of a record is its tokens, or the next one where a rollback or a resume has gone behind the last
        self.wandb_at = None, wandb_run.starting_step if wandb_run else 0
        self.file, self.metrics = GrowingFile(folder / f"{folder.name}.log"), GrowingFile(folder / "metrics.jsonl")
        self.overwrite = "\r\x1b[K" if sys.stdout and sys.stdout.isatty() else ""

    def text(self, line):
        self.file.write(line + "\n")
        self.show(f"{line}\n")

    def show(self, text):
        """On the console, over what it shows of the last step. A console that is closed or full ends no run."""
        try:
            if sys.stdout:
                encoding = sys.stdout.encoding or "utf-8"
                sys.stdout.write(self.overwrite + text.encode(encoding, "backslashreplace").decode(encoding))
                sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")

    def record(self, record, steps):
        line = format_record(record, steps)
        self.metrics.write(json.dumps(record) + "\n")
        tokens, (before, last) = record["tokens"], self.wandb_at
        self.wandb_at = tokens, max(tokens, last + (tokens != before))
        self.tell_wandb("log", {k: v for k, v in record.items() if v is not None}, step=self.wandb_at[1])
        step = record["step"]
        if "val_loss" in record or record.get("skipped") or step % self.log_every == 0 or step in (1, steps):
            self.text(line)
        else:
            self.file.write(line + "\n")
            if self.overwrite:
                self.show(line[: shutil.get_terminal_size().columns - 1])
        error = self.metrics.error or self.file.error
        if error and not self.complained:
            self.show(f"{self.folder} cannot be written ({error.strerror}): training goes on, its records wait in "
                      "memory\n")
        self.complained = error is not None

    def rewind(self, step):
        self.metrics.close()
        try:
            trim_metrics(self.folder, step, keep_validation=False)
        except OSError as e:
            self.show(f"{self.metrics.file.name} cannot be cut ({e.strerror}): it has the steps after {step} twice\n")
        self.metrics = GrowingFile(self.folder / "metrics.jsonl")

    def ending(self, reason):
        self.file.write(f"{reason}\n")

    def tell_wandb(self, method, *values, **settings):
        if not self.wandb_run:
            return
        try:
            getattr(self.wandb_run, method)(*values, **settings)
        except Exception as e:  # it raises many kinds
            self.wandb_run = None
            self.text(f"W&B failed ({first_line(e)}): training goes on without, metrics.jsonl has all")

    def summary(self, details, checkpoint):
        self.tell_wandb("log", details)
        path = newest_checkpoint(self.folder) if checkpoint else None
        if path:
            names = dict(name=self.folder.name, type="model", aliases=["latest", path.stem])
            self.tell_wandb("log_artifact", str(path), **names)

    def close(self):
        ending = threading.Thread(target=self.tell_wandb, args=("finish",), daemon=True)
        ending.start()
        ending.join(WANDB_PATIENCE)
        if ending.is_alive():
            self.text(f"W&B has not taken everything in {WANDB_PATIENCE} s; `wandb sync {self.folder}/wandb/run-*` "
                      "sends the rest")
        for file in (self.file, self.metrics):
            file.close()
            if file.error:
                self.show(f"{file.file.name} lacks its last lines ({file.error.strerror})\n")
        self.lock.close()


def format_record(record, steps):
    """The console line of a record: `step:S/N | loss L | ... | step_avg:X ms`, or the validation's."""
    head = f"step:{record['step']}/{'?' if steps == UNKNOWN_STEPS else steps}"
    if record.get("skipped"):
        return f"{head} | update skipped: the loss or the gradient is not finite | tokens {record['tokens']:,}"
    if "val_loss" in record:
        parts = [f"val_loss {record['val_loss']:.4f}"]
        if record["mtp_weight"]:
            parts.append(f"val_mtp_loss {record['val_mtp_loss']:.4f}")
        parts += [f"targets {record['val_targets']:,}", f"tokens {record['tokens']:,}"]
        parts += [f"time {record['time'] / 1000:.1f} s"]
        return " | ".join([head, *parts])
    norm, mfu = record["grad_norm"], record["mfu"]
    parts = [
        f"loss {record['train_loss']:.4f}",
        f"lr {record['lr']:.2e}",
        "norm " + ("overflow" if norm is None else f"{norm:.3f}"),
        f"{record['tokens_per_second']:,.0f} tok/s",
        "mfu " + ("n/a" if mfu is None else f"{100 * mfu:.1f}%"),
        f"mem {record['peak_mem_MB']:,} MiB",
        f"left {datetime.timedelta(seconds=round(record['seconds_left']))}",
        f"step_avg:{record['step_avg_ms']:.2f} ms",
    ]
    return " | ".join([head, *parts])


def new_run_id(model):
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{model}-{secrets.token_hex(2)}"


def make_run_folder(output_dir, run_id, fresh):
    """(the run's folder, its log as a file that keeps other processes from the run until it is closed)"""
    folder = Path(output_dir) / run_id
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
        lock = open(folder / f"{run_id}.log", "a")
        with contextlib.suppress(ImportError):  # on Windows
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ConfigError(f"{folder} is being trained by another process; stop that one, or start a run of its own "
                          "without --resume") from e
    except OSError as e:
        raise ConfigError(f"output_dir={output_dir} cannot be written ({e.strerror}); name another folder") from e
    return folder, lock


def trim_metrics(folder, step, keep_validation):
    """Drop the records of later steps, which will be done again, and with them perhaps the validation of this one."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a record cut short by a crash
            record = json.loads(line)
            last = step if keep_validation or "val_loss" not in record else step - 1
            kept += [line] if record["step"] <= last else []
    write_atomically(path, lambda f: f.write("".join(line + "\n" for line in kept).encode()))


def set_aside(folder, step):
    """Rename the checkpoints of steps that a resumed run will do again, and remove what a crash left half written;
    gives the notes to say so."""
    for unfinished in folder.glob(".step*.pt.tmp"):
        unfinished.unlink()
    later = [path for path in folder.glob("step*.pt") if step_of(path) > step]
    for path in later:
        path.replace(path.with_suffix(".pt.aside"))
    return [f"set aside: {path} is now {path.name}.aside" for path in sorted(later)]


def source():
    """The text of this script, and of the kernel beside it under a line with its name."""
    kernel = f"\n{f' {KERNEL.name} ':-^100}\n{KERNEL.read_text()}" if KERNEL.exists() else ""
    return Path(__file__).read_text() + kernel


def open_log(world, config, run, run_id, notes, resumed_at, keep_validation):
    """The log of this process. The first one's opens with the run's source, versions and command; that of a run resumed
    at a step (else None) goes on there, its validation of that step kept or not."""
    if not world.is_main:
        return NullLog()
    wandb = import_wandb() if run.log_wandb else None  # before there is a folder
    folder, lock = make_run_folder(run.output_dir, run_id, fresh=resumed_at is None)
    settings = dict(network=dataclasses.asdict(config), run=dataclasses.asdict(run))
    try:
        write_atomically(folder / "config.json", lambda f: f.write(json.dumps(settings, indent=1).encode() + b"\n"))
        if resumed_at is not None:
            trim_metrics(folder, resumed_at, keep_validation)
            notes = notes + set_aside(folder, resumed_at)
        wandb_run, note = start_wandb(wandb, run, run_id, settings, folder) if wandb else (None, None)
        log = RunLog(folder, lock, run.log_every, wandb_run)
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written ({e.strerror}); free some space, or name another "
                          "--output_dir") from e
    if resumed_at is None:
        log.file.write(source() + "\n" + "-" * 100 + "\n")
    log.text(f"run {run_id}: {shlex.join(sys.argv)}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    log.text(f"{versions}; {world.describe()}")
    for line in notes + [note] * bool(note):
        log.text(line)
    return log


def import_wandb():
    try:
        import wandb
    except ImportError as e:
        raise ConfigError("log_wandb needs the package wandb; pip install wandb, or drop --log_wandb") from e
    return wandb


def start_wandb(wandb, run, run_id, settings, folder):
    """(W&B's run, a note or None). Where W&B cannot be reached its records stay on the disk."""
    flat, note = {**settings["network"], **settings["run"]}, None
    own = ("seed", "output_dir", "wandb_name", "wandb_group")
    alike = json.dumps({name: value for name, value in flat.items() if name not in own}, sort_keys=True)
    group = run.wandb_group or f"{run.model}-{hashlib.sha256(alike.encode()).hexdigest()[:8]}"
    common = dict(project=run.wandb_project, name=run.wandb_name or run_id, group=group, id=run_id, resume="allow",
                  config=flat, dir=folder)
    try:
        try:
            started = wandb.init(**common, settings=wandb.Settings(init_timeout=WANDB_PATIENCE))
        except (wandb.errors.CommError, OSError) as e:
            if isinstance(e, wandb.errors.AuthenticationError):
                raise
            note = (f"W&B cannot be reached ({first_line(e)}): its records stay in {folder}/wandb; "
                    "`wandb sync` sends them")
            started = wandb.init(**common, mode="offline")
    except (wandb.Error, ValueError) as e:
        raise ConfigError(f"log_wandb: W&B does not start ({first_line(e)}); set WANDB_MODE=offline, or drop the "
                          "flag") from e
    started.define_metric("*", step_metric="tokens")  # the x-axis: W&B's own step has to rise, tokens need not
    return started, note


# ----------------------------------------------------------------------------------------------------------------------
# Model. Shapes: B batch, T time, C n_embd, H query heads, K key/value heads, D head_dim, V vocabulary


class Context(NamedTuple):
    """What every mixer of one forward pass shares."""

    cos: Any  # (T, D/2); None where positions are learned
    sin: Any  # (T, D/2)
    mask: Any  # None: causal; else (T, T) or (B, 1, T, T), True where a query may look, or FlexAttention's BlockMask
    x0: Any = None  # (B, T, C), the stream where it began
    values: Any = None  # (B, T, K D), this block's value embedding, if it has one
    follows: Any = None  # (B, T, 1), False where a document begins


def product_dtype(x):
    """What matrix products with x compute in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def stream_dtype(x):
    """What the residual stream is kept in: bf16 where products are, which halves what the norms and sums between them
    move; fp16 would overflow."""
    dtype = product_dtype(x)
    return dtype if dtype == torch.bfloat16 else x.dtype


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm (Ba et al. 2016, arXiv:1607.06450) over the last
    dimension, in the type of x. The weights, `width` of them, are none with width 0; `bias` counts for a LayerNorm with
    weights."""

    def __init__(self, kind="rmsnorm", width=0, bias=False, eps=NORM_EPS):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width)) if width else None
        self.bias = nn.Parameter(torch.zeros(width)) if width and bias and kind == "layernorm" else None

    def forward(self, x):
        wide = x if self.weight is None else x.to(self.weight.dtype)
        if self.kind == "layernorm":
            return F.layer_norm(wide, (x.size(-1),), self.weight, self.bias, self.eps).type_as(x)
        return F.rms_norm(wide, (x.size(-1),), self.weight, self.eps).type_as(x)


def make_norm(config):
    """The norm that stands before attention, MLP and head."""
    return Norm(config.norm, config.n_embd if config.norm_weights else 0, config.bias, config.norm_eps)


def pad_to(x, columns, rows=1):
    """x with zeros up to a multiple of `columns` in the last dimension and of `rows` in the one before."""
    padding = (0, -x.size(-1) % columns, 0, -x.size(-2) % rows)
    return F.pad(x, padding) if any(padding) else x


class Linear(nn.Linear):
    """The linear layers of the blocks: the product of the precision asked for, at widths that CUDA's kernels do well.

    Weights keep their true shape. Where that is no multiple of WIDTH_MULTIPLE (float8: FLOAT8_MULTIPLE) the product is
    done with rows and columns of zeros added, which changes neither values nor gradients.

    `parts` are the numbers of rows of several matrices in one, which Muon takes one by one.
    """

    def __init__(self, config, fan_in, fan_out, parts=()):
        super().__init__(fan_in, fan_out, bias=config.bias)
        self.fp8 = config.precision == "fp8"
        self.parts = tuple(parts) or (fan_out,)

    def padded(self, x, parts=1):
        """x (..., fan_in, or more with zeros behind) -> (..., fan_out) with zeros behind each of its equal parts."""
        multiple = FLOAT8_MULTIPLE if self.fp8 else WIDTH_MULTIPLE if x.is_cuda else 1  # CPU kernels gain nothing
        x = pad_to(x, multiple)
        weight = pad_to(self.weight.unflatten(0, (parts, -1)), x.size(-1), multiple).flatten(0, 1)
        bias = None if self.bias is None else pad_to(self.bias.view(parts, -1), multiple).flatten()
        return linear(x, weight, bias, self.fp8)

    def forward(self, x):
        return self.padded(x)[..., : self.out_features]


class Rotary(nn.Module):
    """The angles of rotary position embeddings (Su et al. 2021, arXiv:2104.09864, section 3.2.2), as cos and sin of
    shape (T, D/2). The tables are built ahead: in a compiled graph they would be computed anew in every layer."""

    def __init__(self, head_dim, base, length=1024):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.build(length)

    def build(self, length, device=None):
        angles = np.outer(np.arange(length), self.base ** (-np.arange(0, self.head_dim, 2) / self.head_dim))
        for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            table = torch.from_numpy(table).to(torch.get_default_dtype())
            self.register_buffer(name, table.to(device), persistent=False)

    def forward(self, T):
        if T > self.cos.size(0):
            self.build(T, self.cos.device)
        return self.cos[:T], self.sin[:T]


def rotate(x, cos, sin):
    """Rotate the pairs (x[d], x[d + D/2]) of x (B, T, heads, D) by the angles: the half-split layout of Llama. Without
    angles x stays: learned positions are in it."""
    if cos is None:
        return x
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # for all heads
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def window_mask(T, window, device, documents=None, block_mask=None):
    """The mask of causal attention, None where that is plain: a query sees the last `window` tokens (0: all), its own
    included, and with `documents` (B, T), the numbers of the tokens' documents, those of its own document.

    FlexAttention's mask, which skips blocks outside, where there is `block_mask` (create_block_mask, compiled by
    itself) to make it, or a window alone is compiled for CUDA; else a dense one, (T, T) or (B, 1, T, T)."""
    if not 0 < window < T:
        if documents is None:
            return None
        window = T

    def seen(b, h, q, k):
        near = (q >= k) & (q - k < window)
        return near if documents is None else near & (documents[b, q] == documents[b, k])

    if block_mask:
        return block_mask(seen, None if documents is None else len(documents), None, T, T, device=device)
    if documents is None and device.type == "cuda" and torch.compiler.is_compiling():
        return create_block_mask(seen, None, None, T, T, device=device)
    q, k = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    if documents is None:
        return seen(None, None, q, k)
    return seen(torch.arange(len(documents), device=device)[:, None, None, None], None, q, k)


class First(nn.Module):
    """Its first argument: what stands in place of a Mix, Smear or Gate that is not asked for."""

    def forward(self, x, other):
        return x


class Mix(nn.Module):
    """a x + b other, a and b learned (modded-nanogpt's records; for values Zhou et al. 2024, arXiv:2410.17897)."""

    def __init__(self, *start):
        super().__init__()
        self.lambdas = nn.Parameter(torch.tensor(start))

    def forward(self, x, other):
        return self.lambdas[0] * x + self.lambdas[1] * other


class Smear(nn.Module):
    """x (B, T, C) plus the token before's, times a number a channel, within its document, as `follows` (B, T, 1) says:
    token shift (RWKV, Peng et al. 2023, arXiv:2305.13048, section 3.1) begun at none, and a Canon layer (Allen-Zhu
    2025, arXiv:2512.17351) that reaches one token back."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x, follows):
        return (x + follows * self.weight * F.pad(x[:, :-1], (0, 0, 1, 0))).type_as(x)


class Gate(nn.Module):
    """Each head's output y (B, H, T, D) times 2 sigmoid(w x[:n]) of its token's x (B, T, C). w, n numbers a head, is 0
    at first, so the factors are 1 (modded-nanogpt's records; Qiu et al. 2025, arXiv:2505.06708, with all of x)."""

    def __init__(self, n_head, channels):
        super().__init__()
        self.n_head = n_head
        self.weight = nn.Parameter(torch.zeros(n_head * channels))  # a vector, for the scalars' rate

    def forward(self, y, x):
        weight = self.weight.view(self.n_head, -1)
        factors = 2 * torch.sigmoid(F.linear(x[..., : weight.size(1)], weight))
        return y * factors.transpose(1, 2)[..., None].type_as(y)


class CausalSelfAttention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C). Multi-head, grouped-query (Ainslie et al. 2023, arXiv:2305.13245)
    and multi-query attention, full or windowed, are values of the config: n_kv_head, window, qk_norm."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.window, self.dropout = config.window, config.dropout
        self.qk_norm = Norm() if config.qk_norm else nn.Identity()
        self.scale = config.softmax_scale or None  # torch's own
        first_and_last = min(layer, config.n_layer - 1 - layer) in range(config.value_embeddings)
        self.value_mix = Mix(0.5, 0.5) if first_and_last else First()
        self.gate = Gate(config.n_head, config.attention_gate) if config.attention_gate else First()
        self.make_projections(config)
        self.c_proj = Linear(config, config.n_embd, config.n_embd)

    def make_projections(self, config):
        parts = [heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.c_attn = Linear(config, config.n_embd, sum(parts), parts)

    def qkv(self, x, ctx):
        """(B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), q and k normalised (if so configured) and rotated."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k = (rotate(self.qk_norm(z), ctx.cos, ctx.sin).type_as(v) for z in (q, k))
        v = self.value_mix(v, ctx.values if ctx.values is None else ctx.values.view_as(v))
        # Only here, so that the memory stays (B, T, heads, D): the kernels then write y in the layout that out() reads.
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q, k, v, mask):
        """Softmax attention, (B, H, T, D) from q, k, v; query head h uses key/value head h // (H / K)."""
        grouped = self.n_kv_head < self.n_head
        if mask is None or isinstance(mask, torch.Tensor):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout * self.training,
                                                  is_causal=mask is None, scale=self.scale, enable_gqa=grouped)
        return flex_attention(q, k, v, block_mask=mask, scale=self.scale, enable_gqa=grouped)

    def out(self, y):
        """(B, H, T, D) -> (B, T, C)."""
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x, ctx):
        return self.out(self.gate(self.attend(*self.qkv(x, ctx), ctx.mask), x))

    def flops(self, T):
        """FLOPs per token of scores and weighted sum, forward and backward, over the full square of T x T (T x window):
        the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return 12 * self.n_head * self.head_dim * min(T, self.window or T)


class LatentAttention(CausalSelfAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, sections 2.1.2 and 2.1.3): keys and values of all
    heads come from one latent of width kv_rank, and beside them each head has a part of R = rope_head_dim dimensions
    that is rotated, its key shared by all heads. Queries are not compressed, and the latent is not normalised."""

    def make_projections(self, config):
        self.kv_rank, self.rope_head_dim = config.kv_rank, config.rope_head_dim
        self.c_q = Linear(config, config.n_embd, config.n_head * (config.head_dim + config.rope_head_dim))
        self.c_down = Linear(config, config.n_embd, config.kv_rank + config.rope_head_dim)
        self.c_up = Linear(config, config.kv_rank, 2 * config.n_head * config.head_dim)

    def qkv(self, x, ctx):
        """(B, T, C) -> q and k (B, H, T, D + R), v (B, H, T, D); each of the two parts normalised by itself."""
        B, T, _ = x.shape
        D, R, H = self.head_dim, self.rope_head_dim, self.n_head
        latent, k_rotary = self.c_down(x).split((self.kv_rank, R), dim=-1)
        k, v = self.c_up(latent).view(B, T, H, 2 * D).chunk(2, dim=-1)
        q, q_rotary = self.c_q(x).view(B, T, H, D + R).split((D, R), dim=-1)
        q_rotary, k_rotary = (rotate(self.qk_norm(z), ctx.cos, ctx.sin).type_as(v)
                              for z in (q_rotary, k_rotary.unsqueeze(2)))
        q = torch.cat((self.qk_norm(q).type_as(v), q_rotary), dim=-1)
        k = torch.cat((self.qk_norm(k).type_as(v), k_rotary.expand(-1, -1, H, -1)), dim=-1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def flops(self, T):
        return 6 * self.n_head * (2 * self.head_dim + self.rope_head_dim) * min(T, self.window or T)


mixers = {"attention": CausalSelfAttention, "latent": LatentAttention}

activations = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv:2109.08668, section 4.2
}


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C) through ffn_hidden units of one of the activations. All of them leave 0 as it is, so what
    the first product pads, the second one takes."""

    def __init__(self, config):
        super().__init__()
        self.activation = activations[config.mlp]
        self.c_fc = Linear(config, config.n_embd, config.ffn_hidden)
        self.c_proj = Linear(config, config.ffn_hidden, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc.padded(x)))


class SwiGLUMLP(nn.Module):
    """(B, T, C) -> (B, T, C): silu(gate) * up, projected down (Shazeer 2020, arXiv:2002.05202, eq. 6). Gate and up are
    the halves of one matrix, in that order, so that one product makes both."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config, config.n_embd, 2 * config.ffn_hidden, 2 * [config.ffn_hidden])
        self.c_proj = Linear(config, config.ffn_hidden, config.n_embd)

    def forward(self, x):
        gate, up = self.c_fc.padded(x, parts=2).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * up)


mlps = {"gelu": MLP, "gelu_tanh": MLP, "relu2": MLP, "swiglu": SwiGLUMLP}


class Block(nn.Module):
    """x + s norm(attention(norm(x))), then x + norm(mlp(norm(x))), the outer norms only with post_norm. The scale
    s = 1/sqrt(2 n_layer), off by scale_attention, is on attention alone, as in the trainer of the NoCap benchmark. With
    x0_lambdas x is mixed with the embedding before all else, with smear norm(x) with the token before's."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.ln_2 = make_norm(config), make_norm(config)
        self.attn = mixers[config.mixer](config, layer)
        self.mlp = mlps[config.mlp](config)
        self.attn_norm = Norm() if config.post_norm else nn.Identity()
        self.mlp_norm = Norm() if config.post_norm else nn.Identity()
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer) if config.scale_attention else 1.0
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.mix = Mix(1.0, 0.0) if config.x0_lambdas else First()
        self.smear_1 = Smear(config.n_embd) if "attention" in config.smears else First()
        self.smear_2 = Smear(config.n_embd) if "mlp" in config.smears else First()

    def forward(self, x, ctx):
        x = self.mix(x, ctx.x0)
        read = self.smear_1(self.ln_1(x), ctx.follows)
        x = x + self.drop(self.attn_scale * self.attn_norm(self.attn(read, ctx)))
        read = self.smear_2(self.ln_2(x), ctx.follows)
        return x + self.drop(self.mlp_norm(self.mlp(read)))


class GPT(nn.Module):
    """A decoder-only transformer: token ids (B, T) -> logits (B, T, V) and loss. Names of weights are GPT-2's.

    Every matrix starts uniform in +-1/sqrt(fan_in), torch's default for a linear layer, the embeddings included; with
    init_std normal as GPT-2's (Radford et al. 2019, section 2.3), biases then 0.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.rotary_dim, config.rope_base)
        blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd), h=blocks))
        self.transformer["ln_f"] = make_norm(config)
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.embd_norm = Norm() if config.embd_norm else nn.Identity()
        self.smear = Smear(config.n_embd) if "embedding" in config.smears else First()
        values = config.n_kv_head * config.head_dim
        self.value_embeddings = nn.ModuleList(nn.Embedding(config.vocab_size, values)
                                              for _ in range(config.value_embeddings))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.transformer.wte.weight = self.lm_head.weight
        own = range(2, config.lookahead + 1) if config.mtp_heads == "separate" else ()
        self.mtp_blocks = nn.ModuleDict({str(k): Block(config, config.n_layer) for k in own})
        # A buffer, not a number: a compiled graph reads its value at each call, so the ramp compiles nothing anew.
        self.register_buffer("mtp_weight_buffer", torch.tensor(config.mtp_weight), persistent=False)
        # What parallelize() exchanges: parts of LossSettings; on CUDA create_block_mask, compiled by itself, where the
        # trunk does not make the mask: as a part of it a mask of documents had strides that FlexAttention did not
        # expect, and failed (torch 2.11).
        self.loss_parts, self.block_mask = {}, None
        self.start_weights()

    @torch.no_grad()
    def start_weights(self):
        config = self.config
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        for table in tables:
            if table.weight is not self.lm_head.weight:
                table.weight.uniform_(-(config.n_embd**-0.5), config.n_embd**-0.5)
        for name, p in self.named_parameters() if config.init_std else ():
            if p.dim() == 2:
                scale = 1 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                p.normal_(0.0, config.init_std * scale)
            elif name.endswith("bias"):
                p.zero_()
        values = {*self.value_embeddings}
        for table in tables:
            own = config.value_init_std if table in values else 0.0
            if own or config.embd_init_std:
                table.weight.normal_(0.0, own or config.embd_init_std)
        into_stream = [p for name, p in self.named_parameters() if name.endswith("c_proj.weight")]
        untied = [] if config.tie_embeddings else [self.lm_head.weight]
        for p in into_stream + untied if config.zero_init else ():
            p.zero_()

    def documents(self, idx):
        """(B, T) -> the number of each token's document, (B, T), which begins with the end-of-text token, the last of
        the vocabulary; None where documents are not masked."""
        return (idx == self.config.vocab_size - 1).cumsum(1) if self.config.document_mask else None

    def embed(self, idx, mask=None):
        """(B, T) -> the stream (B, T, C), and the Context of a sequence of T, with the mask if there is one already."""
        T, learned = idx.size(1), self.config.position == "learned"
        x = self.transformer.wte(idx)
        x = self.drop(x + self.transformer.wpe.weight[:T] if learned else x)
        follows = (idx != self.config.vocab_size - 1)[..., None]  # a document's first token follows none
        x = self.smear(self.embd_norm(x), follows)
        x = x.to(stream_dtype(x))
        cos, sin = (None, None) if learned else self.rotary(T)
        if mask is None:
            mask = window_mask(T, self.config.window, idx.device, self.documents(idx))
        return x, Context(cos, sin, mask, x, follows=follows)

    def values_of_blocks(self, idx):
        """What each block mixes into its values, a list of (B, T, K D) or None. Of n tables block i and block
        n_layer - n + i have the i-th; those between have none."""
        found = [table(idx) for table in self.value_embeddings]
        found = [values.to(stream_dtype(values)) for values in found]
        return [*found, *[None] * (self.config.n_layer - 2 * len(found)), *found]

    def run_block(self, block, x, ctx):
        if self.config.gradient_checkpointing and self.training:
            return checkpoint(block, x, ctx, use_reentrant=False)
        return block(x, ctx)

    def trunk(self, idx, heads=1, mask=None):
        """(B, T) -> what each head reads, a list of (B, T, C): the stream, normalised, for MTP's through its block."""
        x, ctx = self.embed(idx, mask)
        for block, values in zip(self.transformer.h, self.values_of_blocks(idx)):
            x = self.run_block(block, x, ctx._replace(values=values))
        own = [self.mtp_blocks[str(k)] for k in range(2, heads + 1)]
        return [self.transformer.ln_f(z) for z in (x, *(self.run_block(block, x, ctx) for block in own))]

    def head(self, x):
        """What trunk() gives, (B, T, C), -> logits (B, T, V)."""
        fp8 = self.config.precision in FLOAT8_HEADS
        x = pad_to(x, FLOAT8_MULTIPLE if fp8 else 1)
        weight = pad_to(self.lm_head.weight, x.size(-1), HEAD_ROWS_MULTIPLE if x.is_cuda or fp8 else 1)
        logits = linear(x, weight, None, fp8)
        return softcapped(logits[..., : self.config.vocab_size], self.config.logit_softcap)

    def loss(self, x, targets, shares):
        """Sum over k of shares[k] times the mean cross-entropy in nats of head(x) against targets[k] (B, T)."""
        clamp = self.config.loss_clamp if self.training else 0.0
        settings = LossSettings(self.config.precision in FLOAT8_HEADS, clamp, self.config.logit_softcap,
                                torch.is_grad_enabled(), **self.loss_parts)
        targets = torch.stack([target.flatten() for target in targets])
        return HeadLoss.apply(x.flatten(0, 1).to(product_dtype(x)), self.lm_head.weight, targets, shares, settings)

    def forward(self, idx, targets_dict=None, return_logits=True, return_loss_components=False):
        """Token ids idx (B, T); targets_dict["target_k"] (B, T) holds the token k ahead of each position, IGNORED where
        there is none. Gives (logits, loss), either of them None where not asked for; with return_loss_components
        (logits, (main_loss, aux_loss)), aux_loss None without MTP. Losses are means in nats; while training, each
        token's is at most loss_clamp.

        aux_loss is the mean of the losses against targets 2 to mtp_max_steps, and the loss has it mtp_weight_buffer
        times. With mtp_heads separate that is Gloeckle et al. 2024 (arXiv:2404.19737, section 2), the trunk's last
        block being the first head; shared, the next token's logits stand for all offsets: that costs next to nothing.
        """
        offsets = self.config.mtp_offsets if targets_dict is not None else ()
        mask = None
        if self.block_mask:
            mask = window_mask(idx.size(1), self.config.window, idx.device, self.documents(idx), self.block_mask)
        streams = self.trunk(idx, 1 + len(offsets) if self.mtp_blocks else 1, mask)
        logits = self.head(streams[0]) if return_logits else None
        if targets_dict is None:
            return logits, None
        first, further = targets_dict["target_1"], [targets_dict[f"target_{k}"] for k in offsets]
        one = self.mtp_weight_buffer.new_ones(1)
        equal = one.new_full((len(further),), 1 / max(1, len(further)))  # shares of a mean over the further targets
        if further and not self.mtp_blocks and not return_loss_components:  # the logits are there once for all of them
            shares = torch.cat([one, self.mtp_weight_buffer * equal])
            return logits, self.loss(streams[0], [first, *further], shares)
        main, aux = self.loss(streams[0], [first], one), None
        if self.mtp_blocks and further:
            aux = sum(self.loss(x, [target], equal[:1]) for x, target in zip(streams[1:], further))
        elif further:
            aux = self.loss(streams[0], further, equal)
        if return_loss_components:
            return logits, (main, aux)
        return logits, main if aux is None else main + self.mtp_weight_buffer * aux

    def parameter_count(self):
        """Parameters, the tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_by_part(self, T):
        """FLOPs of a token of training, forward and backward, by part: 6 a parameter of attention and MLP, biases too,
        and attention's own. The head's matrix counts once for each time that it is used; tables and norms do not."""
        blocks = [*self.transformer.h, *self.mtp_blocks.values()]
        weights = {part: sum(p.numel() for block in blocks for p in getattr(block, part).parameters())
                   for part in ("attn", "mlp")}
        return dict(
            attention=6 * weights["attn"] + sum(block.attn.flops(T) for block in blocks), mlp=6 * weights["mlp"],
            head=6 * self.lm_head.weight.numel() * (1 + len(self.mtp_blocks)),
        )

    def flops_per_token(self, T):
        """FLOPs of a token of training, forward and backward, as PaLM counts them."""
        return sum(self.flops_by_part(T).values())


# ----------------------------------------------------------------------------------------------------------------------
# Numerics: float8 products, autocast, the loss scaler, one optimizer step


class Float8Product(torch.autograd.Function):
    """x @ weight.T of x (M, K) and weight (N, K), all three sizes multiples of FLOAT8_MULTIPLE, in float8.

    Scaling is dynamic, one scale a tensor; what is multiplied forward is e4m3, the gradient e5m2, sums are fp32
    (Micikevicius et al. 2022, arXiv:2209.05433). Gives (M, N) in bf16, the weight's gradient in the weight's dtype.

    Our own rather than torchao's, which exchanges nn.Linear modules of widths that are multiples of 16: the head is no
    such module (padded, tied), some widths here are no such multiples, and each of its releases is for one of torch's.
    """

    @staticmethod
    def scaled(x, dtype):
        """x as float8, and what to multiply that by to have x again."""
        largest = torch.finfo(dtype).max
        scale = largest / x.detach().abs().amax().float().clamp(min=1e-12)
        return (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous(), scale.reciprocal()

    @staticmethod
    def product(a, a_scale, b, b_scale, out_dtype, fast=False, **out):
        """a (M, K) @ b (N, K).T, both row-major: the one layout that Hopper's kernels take."""
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=out_dtype, use_fast_accum=fast, **out)

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = Float8Product.scaled(x, torch.float8_e4m3fn)
        w8, w_scale = Float8Product.scaled(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return Float8Product.product(x8, x_scale, w8, w_scale, torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx, dy):
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        dy8, scale = Float8Product.scaled(dy, torch.float8_e5m2)
        dx = Float8Product.product(dy8, scale, w8.t().contiguous(), w_scale, torch.bfloat16)
        dw = Float8Product.product(dy8.t().contiguous(), scale, x8.t().contiguous(), x_scale, torch.float32)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1])


def linear(x, weight, bias, fp8):
    """x (..., K) @ weight (N, K).T + bias -> (..., N), the product in float8 or as autocast has it."""
    if not fp8:
        return F.linear(x, weight, bias)
    flat = x.flatten(0, -2)
    y = Float8Product.apply(pad_to(flat, 1, FLOAT8_MULTIPLE), weight)[: flat.size(0)].unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias.type_as(y)


def whole(tensor):
    """A tensor of which each process has a share, made by all of them together; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def total_norm(tensors):
    """The 2-norm of all of them, whole."""
    return whole(nn.utils.get_total_norm(tensors))


class Numerics:
    """What precision means to the loop. Weights, gradients and optimizer stay fp32; matrix products run in `dtype`. The
    scaler is real for fp16 and passes everything through otherwise (Micikevicius et al. 2018, arXiv:1710.03740)."""

    def __init__(self, precision, device):
        self.device_type = device.type
        dtypes = dict(fp32=torch.float32, fp16=torch.float16)
        self.dtype = dtypes.get(precision, torch.bfloat16)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self):
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, optimizer, parameters, grad_clip, loss):
        """Clip, update, forget the gradients. Gives the norm of the gradient before clipping, as a tensor.

        Where the norm or the loss (the mean over the processes, so that all agree) is not finite, weights and optimizer
        stay as they are. With fp16 that is the scaler's decision, which then lowers its scale; on a GPU the optimizers
        take the verdict as a tensor, so that nobody waits for it; elsewhere the host looks."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.scaler.is_enabled():  # which looks at the gradients of one optimizer alone
            bad = ~torch.isfinite(loss) | ~torch.isfinite(total_norm(gradients))
            for one in optimizer.each:
                first = next(p for group in one.param_groups for p in group["params"] if p.grad is not None)
                first.grad.masked_fill_(bad, math.inf)
                self.scaler.unscale_(one)
        grad_norm = total_norm(gradients)
        if grad_clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
        finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        if self.scaler.is_enabled():
            for one in optimizer.each:
                self.scaler.step(one)
            self.scaler.update()
        elif optimizer.fused:
            optimizer.step(found_inf=(~finite).float())
        elif finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return grad_norm


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def softcapped(logits, cap):
    """cap tanh(logits / cap) (Gemma Team 2024, arXiv:2408.00118, section 2), with cap 0 the logits."""
    return cap * torch.tanh(logits / cap) if cap else logits


def softmax_losses(logits, targets, weights, vocab_size, clamp, softcap, gradient=None, gradient8=None):
    """Cross-entropies in nats, (K, n), of the first vocab_size of the logits (n, V or more), before the softcap, and
    targets (K, n), K of each token: 0 where IGNORED, at most `clamp` (0: any).
    Into `gradient`, which may be the logits themselves, goes that of the sum over k of weights[k] times the sum of
    losses[k], and into gradient8 FLOAT8_GRADIENT_SCALE times that. A token at the clamp and a logit that is none, from
    vocab_size on, have none."""
    z = softcapped(logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    log_p, counted, ids = F.log_softmax(z, dim=-1), targets != IGNORED, targets.clamp(min=0).T
    losses = -log_p.gather(1, ids).T
    if gradient is not None:
        below = losses < clamp if clamp else torch.ones_like(counted)
        counts = weights[:, None] * (counted & below)  # (K, n), for how much each loss counts
        # The gradient of -log p[id] is p, less 1 at the id; p takes the place of log_p.
        dz = log_p.exp_().mul_(counts.sum(0)[:, None]).scatter_add_(1, ids, -counts.T)
        dz = dz.mul_(1 - (z / softcap).square()) if softcap else dz
        gradient.fill_(0)[:, :vocab_size].copy_(dz)
        if gradient8 is not None:
            gradient8.fill_(0)[:, :vocab_size].copy_(FLOAT8_GRADIENT_SCALE * dz)
    losses = losses.clamp(max=clamp) if clamp else losses
    return torch.where(counted, losses, torch.zeros_like(losses))


def fused_softmax_losses(device):
    """The same in one kernel, that of the module beside this script, tried on one row. Raises what goes wrong."""
    if not KERNEL.exists():
        raise ImportError(f"there is no {KERNEL.name} beside {Path(__file__).name}")
    spec = importlib.util.spec_from_file_location(KERNEL.stem, KERNEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses = partial(module.softmax_losses, ignored=IGNORED, scale8=FLOAT8_GRADIENT_SCALE)
    row = torch.zeros(1, FLOAT8_MULTIPLE, device=device)
    losses(row, torch.zeros(1, 1, dtype=torch.long, device=device), torch.ones(1, device=device), 1, 0.0, 0.0, row)
    return losses


class HeadProducts:
    """The three products of the head, logits = x @ weight.T of x (N, C) and weight (V, C), for some of the N tokens, a
    slice, at a time. On CUDA zero rows make V a multiple of HEAD_ROWS_MULTIPLE: their logits must not count."""

    def __init__(self, x, weight, scaled=None):
        self.x = x
        self.weight = pad_to(weight.to(x.dtype), 1, HEAD_ROWS_MULTIPLE if x.is_cuda else 1)

    def logits(self, tokens):
        return self.x[tokens] @ self.weight.T

    def memory8(self, logits):
        """Memory for the gradient of these logits in float8; None where it is not wanted."""

    def gradient_of_x(self, dlogits, dlogits8, out):
        torch.mm(dlogits, self.weight, out=out)

    def add_gradient_of_weight(self, tokens, dlogits, total):
        a, b = dlogits.T, self.x[tokens]
        if b.is_cuda and b.dtype != total.dtype:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # sums that no 16 bits ever hold
        elif b.dtype == total.dtype:
            torch.addmm(total, a, b, out=total)
        else:
            total += a @ b


class Float8HeadProducts(HeadProducts):
    """The same with logits and the gradient of x in float8, as in Float8Product. The weight's gradient stays in bf16:
    in float8 it needs a transposed copy of the logits' gradient, which costs what it gains."""

    def __init__(self, x, weight, scaled):
        self.x = pad_to(x, FLOAT8_MULTIPLE, FLOAT8_MULTIPLE).bfloat16()
        self.x8, self.x_scale = scaled(self.x, torch.float8_e4m3fn)
        self.weight, self.scale = scaled(pad_to(weight, FLOAT8_MULTIPLE, HEAD_ROWS_MULTIPLE), torch.float8_e4m3fn)
        self.turned, self.memory = self.weight.T.contiguous(), None
        self.gradient_scale = self.scale.new_full((), 1 / FLOAT8_GRADIENT_SCALE)

    def logits(self, tokens):
        return Float8Product.product(self.x8[tokens], self.x_scale, self.weight, self.scale, torch.bfloat16, fast=True)

    def memory8(self, logits):
        if self.memory is None:
            self.memory = torch.empty_like(logits, dtype=torch.float8_e5m2)
        return self.memory[: logits.size(0)]

    def gradient_of_x(self, dlogits, dlogits8, out):
        Float8Product.product(dlogits8, self.gradient_scale, self.turned, self.scale, torch.bfloat16, out=out)


def multiplied(factor, *tensors):
    """The tensors times a factor, which 16 bits would round."""
    return tuple((factor * z.to(factor.dtype)).to(z.dtype) for z in tensors)


class LossSettings(NamedTuple):
    """What HeadLoss needs to know beside tensors."""

    fp8: bool = False
    clamp: float = 0.0
    softcap: float = 0.0
    gradient: bool = True  # whether it is wanted
    logits_at_once: int = LOGITS_AT_ONCE
    softmax_losses: Any = softmax_losses  # or the fused one
    scaled: Any = Float8Product.scaled  # or compiled
    multiplied: Any = multiplied  # or compiled


def parts_of(count, most):
    """Slices that cut so many tokens into equal parts, but for the last, of at most `most` (rounded up to 16)."""
    parts = math.ceil(count / max(1, most))
    size = math.ceil(count / parts)
    size += -size % FLOAT8_MULTIPLE
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))


class HeadLoss(torch.autograd.Function):
    """Sum over k of shares[k] times the mean cross-entropy of the logits x @ weight.T against targets[k]: of x (N, C),
    weight (V, C), targets (K, N) and shares (K,). A mean is over the targets that are not IGNORED.

    Never are all logits there: they come in parts, and the gradient of each part is taken while it is there, so that
    nothing is computed twice either (Hsu et al. 2024, arXiv:2410.10989, section 3.2)."""

    @staticmethod
    def forward(ctx, x, weight, targets, shares, settings):
        with torch.autocast(x.device.type, enabled=False):
            return HeadLoss.in_parts(ctx, x, weight, targets, shares, settings)

    @staticmethod
    def in_parts(ctx, x, weight, targets, shares, settings):
        (N, C), V, exact = x.shape, weight.size(0), torch.promote_types(x.dtype, torch.float32)
        products = (Float8HeadProducts if settings.fp8 else HeadProducts)(x, weight, settings.scaled)
        targets = F.pad(targets, (0, products.x.size(0) - N), value=IGNORED)
        weights = shares.to(exact) / (targets != IGNORED).sum(1)  # (K,), of a single target's loss
        scale = weights.abs().sum()  # left to backward(): a token's share of the mean is too small for fp16
        dx = torch.empty_like(products.x)
        dweight = torch.zeros(products.weight.shape, dtype=exact, device=x.device) if settings.gradient else None
        loss = torch.zeros_like(scale)
        for tokens in parts_of(targets.size(1), settings.logits_at_once // V):
            logits = products.logits(tokens)
            gradients = (logits, products.memory8(logits)) if settings.gradient else ()  # in place of the logits
            losses = settings.softmax_losses(logits, targets[:, tokens], weights / scale, V, settings.clamp,
                                             settings.softcap, *gradients)
            loss += (weights * losses.sum(1)).sum()
            if gradients:
                products.gradient_of_x(*gradients, out=dx[tokens])
                products.add_gradient_of_weight(tokens, gradients[0], dweight)
            del logits, gradients  # before the next part's are made
        if settings.gradient:
            ctx.save_for_backward(dx[:N, :C].to(x.dtype), dweight[:V, :C], scale)
            ctx.multiplied = settings.multiplied
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():  # with create_graph
            raise RuntimeError("the loss has no second derivative: its gradient was taken with it")
        dx, dweight, scale = ctx.saved_tensors
        return *ctx.multiplied(dloss * scale, dx, dweight), None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def momentum_step(gradient, mean, momentum, skipped):
    """(Nesterov's update, the mean of the gradients after this step) of stacked matrices (n, a, b). Where `skipped`, a
    tensor, is not 0, the mean stays; so do evened()'s squares and updated()'s weights."""
    after = torch.where(skipped != 0, mean, momentum * mean + (1 - momentum) * gradient)
    return momentum * after + (1 - momentum) * gradient, after


def orthogonalized(x):
    """The orthogonal matrix nearest to each of x (n, a, b), a <= b, roughly: singular values above 0.0015 of x's norm
    come to between 0.68 and 1.21, by five steps of the Newton-Schulz iteration of torch.optim.Muon, in bf16 on CUDA."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16() if x.is_cuda else x
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y


def evened(update, squares, beta2, skipped):
    """(The updates (n, a, b), a <= b, evened; the mean squares (n, b) after this step). Each column, in a square matrix
    each row, is divided by the root of its mean square over the steps, and then each matrix is made as large as it was.
    NorMuon (Li et al. 2025, arXiv:2510.05491), which divides a weight's rows whatever its shape."""
    update, across = update.to(squares.dtype), 2 if update.size(1) == update.size(2) else 1
    squares = squares.unsqueeze(across)
    after = beta2 * squares + (1 - beta2) * update.square().mean(across, keepdim=True)
    after = torch.where(skipped != 0, squares, after)
    even = update / (after.sqrt() + 1e-10)
    size_before, size = (z.norm(dim=(1, 2), keepdim=True) for z in (update, even))
    return even * (size_before / size.clamp(min=1e-10)), after.squeeze(across)


def updated(weight, update, factors, lr, decay, cautious, skipped):
    """Stacked weights (n, a, b), decayed by lr times `decay`, less lr times factors (n, 1, 1) times the update.
    Cautious: they decay only where the update makes them smaller too (Chen et al. 2025, arXiv:2510.12402)."""
    update = factors * update.to(weight.dtype)
    kept = 1 - lr * decay * (weight * update > 0) if cautious else 1 - lr * decay
    return torch.where(skipped != 0, weight, weight * kept - lr * update)


def longer_sides(p, parts):
    """Those of the matrices that lie in a parameter."""
    return [max(rows, p.size(1)) for rows in parts]


def shape_factor(rows, columns):
    """What Muon multiplies a matrix's update by."""
    return math.sqrt(max(1.0, rows / columns))


def laid_wide(matrices):
    """(..., a, b), transposed if that makes a <= b."""
    return matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices


def gathered(share, length, dim):
    """The whole tensor, so long along a dimension, of which each process has the next ceil(length / processes)."""
    size = dist.get_world_size()
    missing = -(-length // size) - share.size(dim)
    share = torch.cat([share, share.new_zeros(*share.shape[:dim], missing, *share.shape[dim + 1 :])], dim)
    every = [torch.empty_like(share) for _ in range(size)]
    dist.all_gather(every, share)
    return torch.cat(every, dim).narrow(dim, 0, length)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): each update is Nesterov's momentum, orthogonalised,
    times sqrt(max(1, rows / columns)). The arithmetic and the defaults are those of torch.optim.Muon; with beta2 it is
    NorMuon, see evened().

    Several matrices may lie one below the other in a parameter: group["parts"] has a tuple for each parameter, the
    numbers of their rows. Matrices of one shape, or its transpose, are updated together, as a stack (n, a, b) with
    a <= b; of several processes each orthogonalises a share of it. `found_inf`, a tensor, if it is set: where it is not
    0, weights and momentum stay.
    """

    def __init__(self, groups, lr, momentum=0.95, weight_decay=0.1, cautious=False, beta2=0.0):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, cautious=cautious, beta2=beta2)
        super().__init__(groups, defaults)
        self.found_inf = None
        self.momentum_step, self.updated, self.evened = momentum_step, updated, evened  # or compiled
        self.factors = {}  # shape_factor()s, kept on the device: to copy them there in each step makes the host wait

    def state_like(self, group, i):
        """What is kept of a group's parameter, as tensors of the shape."""
        p, parts = group["params"][i].detach(), group["parts"][i]
        squares = torch.empty(sum(longer_sides(p, parts)), dtype=p.dtype, device=p.device)
        return dict(momentum_buffer=p, **(dict(square_buffer=squares) if group["beta2"] else {}))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            stacks, sharded = collections.defaultdict(list), collections.defaultdict(list)
            for i, (p, parts) in enumerate(zip(group["params"], group["parts"])):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    like = self.state_like(group, i)
                    self.state[p].update({name: torch.zeros_like(tensor) for name, tensor in like.items()})
                if hasattr(p, "full_tensor"):
                    sharded[p.shape, tuple(parts)].append(p)
                    continue
                for matrix in self.matrices_of(group, p, parts):
                    stacks[matrix[0].shape].append(matrix)
            for matrices in stacks.values():
                self.step_of_stack(group, *zip(*matrices))
            for (_, parts), params in sharded.items():
                self.step_of_shards(group, params, parts)

    def matrices_of(self, group, p, parts):
        """(weight, gradient, mean, squares, factor) of each matrix that lies in a parameter: three views (a, b), laid
        wide, NorMuon's mean squares (b,) or None, and a number."""
        tensors = (tensor.split(parts) for tensor in (p, p.grad, self.state[p]["momentum_buffer"]))
        for weight, gradient, mean, squares in zip(*tensors, self.squares_of(group, p, parts)):
            factor = shape_factor(*weight.shape)
            yield laid_wide(weight), laid_wide(gradient), laid_wide(mean), squares, factor

    def squares_of(self, group, p, parts):
        """NorMuon's mean squares of each matrix that lies in a parameter, None without it."""
        return self.state[p]["square_buffer"].split(longer_sides(p, parts)) if group["beta2"] else [None] * len(parts)

    def step_of_stack(self, group, weights, gradients, means, squares, factors):
        """One step of matrices of one shape, each argument with one item a matrix, as matrices_of() gives it."""
        if factors not in self.factors:
            self.factors[factors] = weights[0].new_tensor(factors).view(-1, 1, 1)
        self.apply(group, weights, gradients, means, self.factors[factors], partial(self.direction, group, squares))

    def step_of_shards(self, group, params, parts):
        """One step of sharded parameters (rows, columns) of one shape and with the same parts. Each process has some of
        the rows, and updates momentum and weights of those. Between the two the updates are gathered, whole, of this
        shape alone and in the type of products: as much is sent once more as orthogonalized_by_all() sends."""
        rows, columns = params[0].shape
        weights = [p.to_local() for p in params]
        gradients = [p.grad.to_local() for p in params]
        means = [self.state[p]["momentum_buffer"].to_local() for p in params]
        first = dist.get_rank() * -(-rows // dist.get_world_size())  # as FSDP2 shards
        own = slice(first, first + len(weights[0]))
        if (parts, columns) not in self.factors:
            of_rows = [shape_factor(count, columns) for count in parts for _ in range(count)]
            self.factors[parts, columns] = weights[0].new_tensor(of_rows[own]).view(1, -1, 1)
        squares = list(zip(*(self.squares_of(group, p, parts) for p in params)))  # of each part those of all params

        def direction_of_own_rows(skipped, update):
            whole_update = gathered(update.bfloat16() if update.is_cuda else update, rows, dim=1)
            directed = [self.direction(group, of_part, skipped, stack)
                        for of_part, stack in zip(squares, whole_update.split(parts, dim=1))]
            return torch.cat(directed, dim=1)[:, own]

        self.apply(group, weights, gradients, means, self.factors[parts, columns], direction_of_own_rows)

    def apply(self, group, weights, gradients, means, factors, direction):
        """Update the means, then by what direction(skipped, update) makes of Nesterov's update the weights, stacked."""
        skipped = weights[0].new_zeros(()) if self.found_inf is None else self.found_inf
        weight, gradient, mean = map(torch.stack, (weights, gradients, means))
        lr, momentum = (torch.tensor(group[name]) for name in ("lr", "momentum"))  # numbers would be compiled anew
        update, mean = self.momentum_step(gradient, mean, momentum, skipped)
        update = direction(skipped, update)
        weight = self.updated(weight, update, factors, lr, group["weight_decay"], group["cautious"], skipped)
        torch._foreach_copy_(weights, weight.unbind())
        torch._foreach_copy_(means, mean.unbind())

    def direction(self, group, squares, skipped, update):
        """What a stack of updates (n, a, b) becomes: orthogonalised and, with beta2, evened."""
        tall = update.size(1) > update.size(2)
        update = self.orthogonalized_by_all(laid_wide(update))
        if group["beta2"]:
            update, square = self.evened(update, torch.stack(squares), group["beta2"], skipped)
            torch._foreach_copy_(squares, square.unbind())
        return update.mT if tall else update

    def orthogonalized_by_all(self, update):
        """A stack of updates orthogonalised, each process a share of its matrices."""
        size = dist.get_world_size() if dist.is_initialized() else 1
        if size == 1:
            return orthogonalized(update)
        share, rank = -(-len(update) // size), dist.get_rank()
        return gathered(orthogonalized(update[rank * share : (rank + 1) * share]), len(update), 0)


class Optimizers:
    """AdamW, and Muon where there is one, as one optimizer: a list of groups, and a state in which the parameters of
    the one come before those of the other."""

    def __init__(self, *each):
        self.each = each
        self.fused = bool(each[0].defaults.get("fused"))  # then step() takes found_inf, a tensor

    @property
    def param_groups(self):
        return [group for one in self.each for group in one.param_groups]

    def zero_grad(self, set_to_none=True):
        for one in self.each:
            one.zero_grad(set_to_none=set_to_none)

    def step(self, found_inf=None):
        for one in self.each:
            one.found_inf = found_inf
            one.step()

    def sizes(self):
        return [sum(len(group["params"]) for group in one.param_groups) for one in self.each]

    def state_dict(self):
        state, groups, first = {}, [], 0
        for one, size in zip(self.each, self.sizes()):
            saved = one.state_dict()
            state.update({first + i: content for i, content in saved["state"].items()})
            groups += [dict(group, params=[first + i for i in group["params"]]) for group in saved["param_groups"]]
            first += size
        return dict(state=state, param_groups=groups)

    def load_state(self, state):
        """Take the state of a state_dict() and leave the groups as they are."""
        first = 0
        for one, size in zip(self.each, self.sizes()):
            own = {i - first: content for i, content in state.items() if first <= i < first + size}
            one.load_state_dict(dict(state=own, param_groups=one.state_dict()["param_groups"]))
            first += size

    def state_like(self):
        """What a state has of each parameter, once that was updated: {its number: {name: a tensor of the shape}}."""
        every = []
        for one in self.each:
            for group in one.param_groups:
                for i, p in enumerate(group["params"]):
                    adamw = dict(step=torch.tensor(0.0), exp_avg=p, exp_avg_sq=p)
                    every.append(one.state_like(group, i) if isinstance(one, Muon) else adamw)
        return dict(enumerate(every))


def parameter_groups(model):
    """Each parameter in one of five groups, {group: its parameters}: embeddings, tied to the head or not; those in the
    values; the blocks' matrices; an untied head; vectors and scalars."""
    kinds = {id(module.weight): "embeddings" for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds.update({id(table.weight): "values" for table in model.value_embeddings})
    kinds.setdefault(id(model.lm_head.weight), "head")
    groups = dict(embeddings=[], values=[], matrices=[], head=[], scalars=[])
    for p in model.parameters():
        groups[kinds.get(id(p), "matrices" if p.dim() >= 2 else "scalars")].append(p)
    return groups


def make_optimizer(model, run, device):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with decay on matrices only; with optimizer=muon the blocks'
    matrices are Muon's, and nothing else is decayed. Each parameter is in one group, whose learning rate is that of the
    plan times relative_lr."""
    parameters, groups = parameter_groups(model), []
    muons = parameters.pop("matrices") if run.optimizer == "muon" else []
    rates = dict(embeddings=run.embedding_lr, values=run.value_lr or run.embedding_lr, head=run.head_lr,
                 scalars=run.scalar_lr)  # 0: learning_rate
    decayed = ("embeddings", "values", "matrices", "head") if run.optimizer == "adamw" else ()
    for name, params in parameters.items():
        rate, decay = rates.get(name) or run.learning_rate, run.weight_decay if name in decayed else 0.0
        groups += [dict(name=name, params=params, lr=rate, weight_decay=decay)] if params else []
    each = [torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2), eps=run.adam_eps,
                              fused=device.type == "cuda")]
    if muons:
        parts = {id(module.weight): module.parts for module in model.modules() if isinstance(module, Linear)}
        group = dict(name="matrices (Muon)", params=muons, parts=[parts.get(id(p), (len(p),)) for p in muons])
        each.append(Muon([group], run.muon_lr, run.muon_momentum, run.weight_decay, run.cautious_weight_decay,
                         run.muon_beta2))
    optimizer = Optimizers(*each)
    for group in optimizer.param_groups:
        group["relative_lr"] = group["lr"] / run.learning_rate if run.learning_rate else 1.0
    return optimizer


class Plan(NamedTuple):
    """The scheduled values of one step."""

    lr: float
    mtp_weight: float
    momentum: float = 0.95  # Muon's


def linear_schedule(step, run):
    """1, and over the last warmdown_iters steps linearly down to 0 where the run ends."""
    left = max(0, run.num_iterations - step)  # a run may be resumed beyond its end, to validate
    return left / run.warmdown_iters if left < run.warmdown_iters else 1.0


def cosine_schedule(step, run):
    """Half a cosine from 1 after the warm-up to 0 where the run ends (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    done = (step - run.warmup_iters) / max(1, run.num_iterations - run.warmup_iters)
    return (1 + math.cos(math.pi * max(0.0, done))) / 2


schedules = {"linear": linear_schedule, "cosine": cosine_schedule}  # (step, run) -> between 1 and 0, warm-up aside


def plan(step, config, run):
    """The values of step number `step`, counted from 0: linear warm-up, then the schedule; MTP's ramp; Muon's
    momentum."""
    rising = (step + 1) / run.warmup_iters if step < run.warmup_iters else 1.0
    falling = run.min_lr_fraction + (1 - run.min_lr_fraction) * schedules[run.schedule](step, run)
    ramp = min(1.0, step / config.mtp_rampup_steps) if config.mtp_rampup_steps else 1.0
    mtp_weight = config.mtp_weight * ramp if config.mtp_enabled else 0.0
    first, last = min(FIRST_MOMENTUM, run.muon_momentum), run.muon_momentum
    left = max(0.0, 1 - step / run.momentum_warmup_steps) if run.momentum_warmup_steps else 0.0
    momentum = last - left * (last - first)
    return Plan(lr=run.learning_rate * min(rising, falling), mtp_weight=mtp_weight, momentum=momentum)


def fitted(run, step_seconds, done):
    """The run with as many steps as its minutes hold, at least those that are done, and the same share of warm-down."""
    steps = max(run.warmup_iters, done, round(60 * run.minutes / step_seconds))
    warmdown = min(round(run.warmdown_iters / run.num_iterations * steps), steps - run.warmup_iters)
    return dataclasses.replace(run, num_iterations=steps, warmdown_iters=warmdown)


def apply_plan(scheduled, model, optimizer):
    """Put a step's Plan where the update and the loss read it."""
    for group in optimizer.param_groups:
        group["lr"] = scheduled.lr * group["relative_lr"]
        if "momentum" in group:
            group["momentum"] = scheduled.momentum
    model.mtp_weight_buffer.fill_(scheduled.mtp_weight)


# ----------------------------------------------------------------------------------------------------------------------
# Data: token shards joined end to end, and one global order of sequences whatever the number of processes


class TokenShards:
    """The tokens of all shards that match a pattern, in order of name, joined end to end.

    A shard is llm.c's: 256 little-endian int32 (magic, version, number of tokens, vocabulary size or 0 for GPT-2's,
    zeros), then the tokens as uint16. Raises DataError for a shard that is not one.
    """

    def __init__(self, pattern):
        pattern = os.path.expanduser(pattern)
        self.files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        if not self.files:
            raise DataError(f"no file matches '{pattern}'; python data/fineweb.py 1 fetches a first shard of FineWeb, "
                            "python data/prepare.py makes shards of your own text")
        opened = [self.open(path) for path in self.files]
        counts, sizes = [count for count, _ in opened], {size for _, size in opened}
        if len(sizes) > 1:
            raise DataError(f"'{pattern}' matches shards of vocabularies {sorted(sizes)}; narrow it to one tokenizer's")
        self.vocab_size = sizes.pop()
        self.starts = np.cumsum([0] + counts)
        self.total = int(self.starts[-1])

    @staticmethod
    def open(path):
        """(number of tokens, vocabulary size) of one shard, its header checked against its length."""
        if not os.path.isfile(path):
            raise DataError(f"{path} cannot be read (not a file); mend or remove it")
        try:
            header = np.fromfile(path, "<i4", 256)
            size = os.path.getsize(path)
        except OSError as e:
            raise DataError(f"{path} cannot be read ({e.strerror}); mend or remove it") from e
        if len(header) < 256 or header[0] != SHARD_MAGIC:
            raise DataError(f"{path} is not a token shard (no {SHARD_MAGIC} at its head); data/prepare.py makes shards")
        if header[1] != SHARD_VERSION:
            raise DataError(f"{path} is a shard of version {header[1]} and this script reads version {SHARD_VERSION}; "
                            "make it again with data/prepare.py")
        tokens = (size - SHARD_HEADER_BYTES) // 2
        if header[2] < 0 or size != SHARD_HEADER_BYTES + 2 * int(header[2]):
            raise DataError(f"{path} is truncated or corrupt: {header[2]} tokens by its header, {tokens} by its "
                            "length; make or fetch it again")
        if not 0 <= header[3] <= 2**16:
            raise DataError(f"{path} says its vocabulary has {header[3]} tokens, which uint16 cannot hold; make or "
                            "fetch it again")
        if tokens == 0:
            raise DataError(f"{path} holds no tokens; remove it")
        return tokens, int(header[3]) or GPT2_VOCAB_SIZE

    def check_ids(self, rank=0, world_size=1):
        """Raise DataError for a token id past the vocabulary: on a GPU it would be a crash without a name. Each process
        reads its share of the shards."""

        def check(i):
            count = int(self.starts[i + 1] - self.starts[i])
            for first in range(0, count, CHECKED_TOKENS):
                tokens = self.read_shard(i, first, min(CHECKED_TOKENS, count - first))
                if tokens.max() >= self.vocab_size:
                    where = int(np.argmax(tokens >= self.vocab_size))
                    raise DataError(f"{self.files[i]}: token {first + where} is {tokens[where]}, past the vocabulary "
                                    f"of {self.vocab_size}; make the shard again with its own tokenizer")

        with ThreadPoolExecutor() as pool:
            list(pool.map(check, range(rank, len(self.files), world_size)))

    def read_shard(self, i, first, count):
        """Tokens [first, first + count) of shard i as uint16. Read and not mapped: a mapped file that is cut short
        kills whoever reads it."""
        path = self.files[i]
        try:
            tokens = np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * first)
        except OSError as e:
            raise DataError(f"{path} cannot be read any more ({e.strerror}); bring it back") from e
        if len(tokens) < count:
            raise DataError(f"{path} was cut short while in use: its token {first + len(tokens)} is gone; make or "
                            "fetch it again")
        return tokens

    def read(self, start, count):
        """Tokens [start, start + count) of the joined shards, as int64."""
        pieces = []
        while count > 0:
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.read_shard(i, start - int(self.starts[i]), min(count, int(self.starts[i + 1]) - start))
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces).astype(np.int64)


def description(pattern):
    """What a pattern's shards are by their names, sizes and headers, which takes no time, as a short text."""
    sha256, size, path = hashlib.sha256(), 0, os.path.expanduser(pattern)
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path))
    for file in filter(os.path.isfile, files):  # to open a pipe would wait for who writes into it
        with contextlib.suppress(OSError), open(file, "rb") as f:  # who cannot read it says so later
            sha256.update(f"{os.path.basename(file)} {os.fstat(f.fileno()).st_size}".encode() + f.read(16))
            size += os.fstat(f.fileno()).st_size
    return f"{len(files)} files of {size:,} bytes ({sha256.hexdigest()[:8]})"


def to_device(tokens, T, lookahead, device):
    """Tokens (B, T + lookahead) as inputs (B, T) and {"target_k": (B, T)} on the device, copied without waiting."""
    tokens = torch.from_numpy(tokens)
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :T].clamp(min=0), {f"target_{k}": tokens[:, k : k + T] for k in range(1, lookahead + 1)}


class DistributedDataLoader:
    """Endless training batches of this process.

    Sequence i of an epoch is tokens [iT, iT + T + lookahead) of the joined shards; with shuffle the sequences are
    permuted by (seed, epoch). A step takes the next ones, in micro-batches that the processes take in turn: so a step
    trains on the same sequences for any number of processes. An epoch ends where a whole step no longer fits. The next
    batch is copied while the device computes with the one before.

    Three steps are read ahead: an error in reading stands in `error`, and the processes have time to stop together and
    save before those tokens are missed (on a GPU each hears of the others two steps later).
    """

    def __init__(self, shards, run, lookahead, world):
        self.shards, self.lookahead, self.world, self.device = shards, lookahead, world, world.device
        self.B, self.T, self.micro_batches = run.batch_size, run.sequence_length, run.grad_accumulation_steps
        self.seed, self.tokens_per_step = run.seed if run.shuffle else None, run.tokens_per_step
        self.turns = range(world.rank, self.micro_batches, world.size)  # this process's micro-batches of a step
        self.epoch_order = None, None  # epoch, its permutation
        self.seconds = 0.0  # spent on batches: while a GPU computes, the host has them
        needed = run.tokens_per_step + lookahead
        if needed > shards.total:
            raise DataError(f"a step of {run.tokens_per_step:,} tokens (and {lookahead} ahead) is larger than the "
                            f"{shards.total:,} tokens of '{run.input_bin}'; lower --batch_size or --total_batch_size")
        self.load_state_dict(dict(epoch=0, tokens=0))

    def state_dict(self):
        """The cursor after the last batch given out: the epoch, and the tokens of it that whole steps have taken."""
        return dict(self.cursor)

    def load_state_dict(self, state):
        self.cursor = dict(state)
        self.batches = self.iterate(state["epoch"], state["tokens"])
        self.queue, self.error = collections.deque(), None  # batches that are read; what ended the reading
        self.uploaded = None  # the next batch, on the device

    def next_batch(self):
        """(inputs (B, T), {"target_k": (B, T)}), token ids on the device. Raises DataError for shards that cannot be
        read any more."""
        begin = time.perf_counter()
        self.read_ahead()
        x, targets, self.cursor = self.uploaded or self.upload()
        self.read_ahead()
        self.uploaded = self.upload() if self.queue else None
        self.seconds += time.perf_counter() - begin
        return x, targets

    def read_ahead(self):
        while self.error is None and len(self.queue) <= 3 * len(self.turns):
            try:
                self.queue.append(next(self.batches))
            except DataError as e:
                self.error = e

    def upload(self):
        if not self.queue:
            raise self.error
        tokens, cursor = self.queue.popleft()
        return *to_device(tokens, self.T, self.lookahead, self.device), cursor

    def iterate(self, epoch, tokens):
        """This process's batches, as tokens (B, T + lookahead), each with the cursor after it."""
        while True:
            epoch, tokens, numbers = self.sequences_of_step(epoch, tokens)
            for turn in self.turns:
                done = tokens + (self.tokens_per_step if turn == self.turns[-1] else 0)
                micro_batch = self.read_sequences(numbers[turn * self.B : (turn + 1) * self.B])
                yield micro_batch, dict(epoch=epoch, tokens=done)
            tokens += self.tokens_per_step

    def sequences_of_step(self, epoch, tokens):
        """(epoch, tokens, numbers of the sequences) of the step that a cursor stands before."""
        if tokens + self.tokens_per_step + self.lookahead > self.shards.total:
            epoch, tokens = epoch + 1, 0
        places = np.arange(self.B * self.micro_batches) + tokens // self.T
        if self.seed is None:
            return epoch, tokens, places
        if self.epoch_order[0] != epoch:
            count = (self.shards.total - self.lookahead) // self.T
            self.epoch_order = epoch, np.random.default_rng((self.seed, epoch)).permutation(count)
        return epoch, tokens, self.epoch_order[1][places]

    def read_sequences(self, numbers):
        """Sequences by their numbers, as int64 (len(numbers), T + lookahead)."""
        width, first = self.T + self.lookahead, int(numbers[0])
        if self.seed is None:  # they lie side by side
            tokens = self.shards.read(first * self.T, (len(numbers) - 1) * self.T + width)
            return np.lib.stride_tricks.sliding_window_view(tokens, width)[:: self.T].copy()
        return np.stack([self.shards.read(int(number) * self.T, width) for number in numbers])


def validation_batches(shards, run, lookahead, world, together=False):
    """The first val_tokens targets (or all there are) as consecutive windows of T without overlap: this process's
    batches as (inputs, targets, number of next-token targets), all of one shape, filled up with IGNORED targets.
    Together: each process has as many batches, the last perhaps of token 0 alone, with a number of 0."""
    B, T = run.val_batch_size or run.batch_size, run.sequence_length
    targets, stride = min(run.val_tokens, shards.total - 1), world.size * B * T
    end = targets + (-targets % stride if together else 0)
    for start in range(world.rank * B * T, end, stride):
        batch = np.full((B, T + lookahead), IGNORED if start < targets else 0, dtype=np.int64)
        for i, first in enumerate(range(start, min(start + B * T, targets), T)):
            last = first + T + lookahead if first + T <= targets else targets + 1
            tokens = shards.read(first, min(last, shards.total) - first)
            batch[i, : len(tokens)] = tokens
        yield *to_device(batch, T, lookahead, world.device), max(0, min(start + B * T, targets) - start)


# ----------------------------------------------------------------------------------------------------------------------
# Parallel: compilation and data parallelism, in one call


def why_no_compile(device):
    """None if torch.compile works on this device, else the reason in one line. Tried on a function of one line, since a
    missing compiler or Triton shows only then."""
    try:
        torch.compile(lambda x: torch.relu(x) + 1)(torch.ones(8, device=device)).sum().item()
    except Exception as e:
        return first_line(e)
    finally:
        torch._dynamo.reset()
    return None


def placed(model, config, run, world):
    """The model on the device of this process; with fsdp its share (FSDP2, Zhao et al. 2023, arXiv:2304.11277): of each
    parameter, and so of its gradient and of the optimizer's state, some rows. A block's weights are whole while it
    computes, and come in the type of products, but for float8, which is made of fp32. What lies outside the blocks is
    whole from the forward pass to the end of the backward, since the loss reads the head's matrix itself; it stays
    fp32, as its gradients' sums are."""
    if run.parallel == "ddp":
        return model.to(world.device)
    from torch.distributed.device_mesh import init_device_mesh  # seconds that others need not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    as_kept = config.precision in ("fp32", "fp8")
    products = None if as_kept else Numerics(config.precision, world.device).dtype
    reduced = torch.bfloat16 if run.gradient_dtype == "bf16" else torch.float32 if products else None
    policy = partial(MixedPrecisionPolicy, reduce_dtype=reduced, cast_forward_inputs=False)
    for block in (*model.transformer.h, *model.mtp_blocks.values()):
        fully_shard(block, mesh=mesh, mp_policy=policy(param_dtype=products))
    return fully_shard(model, mesh=mesh, mp_policy=policy(), reshard_after_forward=False)


def averaged_in_bf16(processes, bucket):
    """DDP's communication hook for gradient_dtype=bf16: torch's own is for NCCL alone."""
    gradients = bucket.buffer()
    mean = dist.all_reduce(gradients.bfloat16().div_(processes), async_op=True).get_future()
    return mean.then(lambda done: gradients.copy_(done.value()[0]))


def parallelize(model, run, world, log, optimizer=None):
    """Compile the model's parts in place (so that its state_dict keeps its names), and Muon's, and wrap the model for
    the processes there are. With fsdp each block is compiled by itself, between the moments when its weights come and
    go."""
    wanted = run.compile if run.compile is not None else world.device.type == "cuda"
    reason = why_no_compile(world.device) if wanted else None
    if reason:
        log.text(f"torch.compile does not work here, training goes on uncompiled and slower: {reason}")
    elif wanted:
        for part, name in ([(model, "trunk")] if run.parallel == "ddp" else
                           [(block, "forward") for block in (*model.transformer.h, *model.mtp_blocks.values())]):
            setattr(part, name, torch.compile(getattr(part, name), dynamic=False, mode=run.compile_mode))
        if world.device.type == "cuda" and run.compile_mode in CUDA_GRAPHS:
            # A gradient lies where the next micro-batch's graph will write; so what is kept and added to is a copy
            # (github.com/pytorch/pytorch/issues/169545).
            for p in model.parameters():
                p.register_hook(torch.Tensor.clone)
        model.loss_parts = {f.__name__: torch.compile(f, dynamic=False) for f in (Float8Product.scaled, multiplied)}
        for one in optimizer.each if optimizer and world.device.type == "cuda" else ():
            if isinstance(one, Muon):
                parts = (momentum_step, updated, evened)
                one.momentum_step, one.updated, one.evened = (torch.compile(f, dynamic=False) for f in parts)
        if world.device.type == "cuda":
            if model.config.document_mask or run.parallel == "fsdp":
                model.block_mask = torch.compile(create_block_mask, dynamic=False)
            try:
                fused = fused_softmax_losses(world.device)
                model.loss_parts.update(softmax_losses=fused, logits_at_once=FUSED_LOGITS_AT_ONCE)
            except Exception as e:  # as for torch.compile: what is wrong shows only now
                log.text(f"the loss takes several kernels, and more time: {first_line(e)}")
    if world.size == 1 or run.parallel == "fsdp":
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 means to rename broadcast_buffers
        # No static_graph: torch 2.13 fails an assertion where the first micro-batch is not to be averaged, and without
        # accumulation it gives the same bits.
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if run.gradient_dtype == "bf16":
        wrapped.register_comm_hook(world.size, averaged_in_bf16)
    return wrapped


@contextlib.contextmanager
def deterministic_algorithms(wanted):
    """Run what is inside with kernels that give the same bits each time; compiled ones are then not chosen by timing
    them. Not wanted: with any."""
    if not wanted:
        yield
        return
    import torch._inductor.config as inductor  # a second that others need not wait

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write
        with inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def force_attention(name):
    """Run full attention on one of ATTENTION_KERNELS. The tag keeps compiled graphs apart in torch's cache on the disk,
    which knows nothing of the kernel that it holds (torch 2.11: a graph with cuDNN's was taken for math's)."""
    with sdpa_kernel(ATTENTION_KERNELS[name]), torch.compiler.config.patch(cache_key_tag=f"attention={name}"):
        yield


def attention_kernel(config, run, world):
    """(function that makes a context in which full attention runs on the kernel asked for, note on which one that is).
    The kernel that torch chooses depends on types and sizes, so it is asked with this run's."""
    context = contextlib.nullcontext if run.attention == "auto" else partial(force_attention, run.attention)
    masks = [f"a window of {config.window} tokens"] * (0 < config.window < run.sequence_length)
    masks += ["masked documents"] * config.document_mask
    if masks:
        flex = "flex, which skips the blocks outside; uncompiled, " * (world.device.type == "cuda")
        why = f"{flex}torch's for a dense mask, which skips nothing"
        return context, f"attention kernel for {' and '.join(masks)}: {why}"
    if world.device.type not in ("cuda", "cpu"):  # others have one kernel
        return context, None
    dtype = Numerics(config.precision, world.device).dtype
    width = config.head_dim + (config.rotary_dim if config.mixer == "latent" else 0)
    q, k, v = (torch.zeros(1, heads, 128, size, dtype=dtype, device=world.device, requires_grad=True) for heads, size
               in ((config.n_head, width), (config.n_kv_head, width), (config.n_kv_head, config.head_dim)))
    settings = dict(dropout_p=config.dropout, is_causal=True, scale=config.softmax_scale or None,
                    enable_gqa=config.gqa_enabled)
    try:
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each kernel that is passed over; what counts is the error
            F.scaled_dot_product_attention(q, k, v, **settings).sum().backward()
            choice = SDPBackend(torch._fused_sdp_choice(q, k, v, **settings))
    except RuntimeError as e:
        raise ConfigError(f"attention={run.attention} has no kernel for {dtype} and heads of size {width} on this "
                          "device; drop the flag") from e
    return context, f"attention kernel: {choice.name.lower().replace('_attention', '')}"


def gradient_sync(model, run, wanted):
    """A context in which backward averages the gradients over the processes, or (not wanted) leaves them local."""
    if hasattr(model, "set_requires_gradient_sync"):  # which leaves them in gradient_dtype: sums need fp32
        model.set_requires_gradient_sync(wanted or run.gradient_dtype == "bf16")
    local = not wanted and isinstance(model, DistributedDataParallel)
    return model.no_sync() if local else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint


@dataclass
class TrainState:
    """All that changes while training: what a checkpoint holds."""

    model: GPT
    optimizer: Optimizers
    numerics: Numerics
    loader: DistributedDataLoader
    step: int = 0
    tokens: int = 0  # trained on, over all processes
    seconds: float = 0.0  # of training, over all sittings
    skipped: int = 0  # updates in a row, up to the last step

    def state_dict(self, world):
        cuda = [torch.cuda.get_rng_state()] if world.device.type == "cuda" else []
        return dict(
            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), loader=self.loader.state_dict(),
            scaler=self.numerics.scaler.state_dict(), rng=world.gather([torch.get_rng_state(), *cuda]),
            step=self.step, tokens=self.tokens, seconds=self.seconds, skipped=self.skipped,
        )

    def can_load(self, state):
        """Whether a checkpoint's content has the form of this state. A file whose checksum is right need not."""
        moments, every = state["optimizer"]["state"], self.optimizer.state_like()
        like = {i: every[i] for i in moments}
        byte = torch.zeros(0, dtype=torch.uint8)
        rng = [[byte.new_empty(len(stream)) for stream in streams] for streams in state["rng"]]
        mine = dict(model=self.model.state_dict(), loader=self.loader.state_dict(), rng=rng, step=0, tokens=0,
                    seconds=0.0, skipped=0)
        if state["scaler"] and self.numerics.scaler.is_enabled():
            mine["scaler"] = self.numerics.scaler.state_dict()
        same = all(is_like(state[name], part) for name, part in mine.items()) and isinstance(state["made_by"], dict)
        return same and all(rng) and is_like(moments, like)

    def load_state_dict(self, state, world):
        self.model.load_state_dict(shared_like(state["model"], self.model.state_dict()))
        moments = shared_like(state["optimizer"]["state"], self.optimizer.state_like())
        self.optimizer.load_state(moments)  # the groups are by the flags of now
        if state["scaler"]:  # else the checkpoint is of another precision, and the scale begins anew
            self.numerics.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.skipped = state["skipped"]
        if len(state["rng"]) == world.size:  # else the processes are others, and a stream each cannot be kept
            cpu, *cuda = state["rng"][world.rank]
            torch.set_rng_state(cpu)
            if cuda and world.device.type == "cuda":
                torch.cuda.set_rng_state(cuda[0])


def shared_like(value, like):
    """Nested content with this process's share of the tensors that another has sharded."""
    if isinstance(value, dict):
        return {key: shared_like(item, like[key]) for key, item in value.items()}
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    share = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return share.clone()  # or it would keep the whole


def is_like(value, like):
    """Whether nested content has the keys, lengths and kinds of another, its tensors the shapes and a place for each
    element, and its numbers finite and not negative. One floating dtype counts as another, which loading converts."""
    if isinstance(like, torch.Tensor):
        return (isinstance(value, torch.Tensor) and (value.shape, value.layout) == (like.shape, like.layout)
                and value.is_floating_point() == like.is_floating_point()
                and (value.layout != torch.strided or value.is_contiguous() or not like.is_contiguous()))
    if isinstance(like, dict):
        return isinstance(value, dict) and value.keys() == like.keys() and all(is_like(value[k], like[k]) for k in like)
    if isinstance(like, list):
        return isinstance(value, list) and len(value) == len(like) and all(map(is_like, value, like))
    if type(like) in (int, float):
        return type(value) in (int, type(like)) and 0 <= value < 2**63
    return type(value) is type(like)


def write_atomically(path, write):
    """Have `write` fill a file that appears under its name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class Hashing:
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


CHECKSUM_BYTES = 2 + len("sha256:") + 64  # a zip file ends with the length of its comment and the comment


def write_checkpoint(path, content):
    """Write what torch.save makes of the content, a zip file, with the SHA-256 of all before it as its comment:
    torch.load reads it, unzip reads it, and verify_checksum() sees each flipped bit, which torch.load does not."""

    def write(f):
        hashing = Hashing(f)
        torch.save(dict(content, format=2), hashing)
        comment = f"sha256:{hashing.sha256.hexdigest()}".encode()
        f.seek(-2, os.SEEK_END)
        f.write(len(comment).to_bytes(2, "little") + comment)

    write_atomically(path, write)


def verify_checksum(path):
    """Raise DataError for a file that is not as write_checkpoint() left it."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        left = os.fstat(f.fileno()).st_size - CHECKSUM_BYTES
        while piece := f.read(max(0, min(left, 2**20))):
            sha256.update(piece)
            left -= len(piece)
        end = f.read()
    sha256.update(bytes(2))
    if end != (CHECKSUM_BYTES - 2).to_bytes(2, "little") + f"sha256:{sha256.hexdigest()}".encode():
        what = "is damaged: its SHA-256 is another" if end[2:9] == b"sha256:" else "is cut short, or no checkpoint"
        raise DataError(f"{path} {what}; name another")


def step_of(path):
    """The step in a checkpoint's name, step000000.pt; -1 for another name."""
    digits = path.stem.removeprefix("step")
    return int(digits) if digits.isdecimal() else -1


def checkpoints_of(folder):
    """The checkpoints in a run's folder, the one of the most steps first."""
    return sorted((path for path in folder.glob("step*.pt") if step_of(path) >= 0), key=step_of, reverse=True)


def environment(world):
    """What a resume must have in common with the run before it to be bitwise the same, beside the configuration."""
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine()
    return dict(torch=str(torch.__version__), device=name, processes=world.size, threads=torch.get_num_threads(),
                source=hashlib.sha256(source().encode()).hexdigest())


class Saver:
    """Saves the checkpoints of a run as <output_dir>/<run_id>/step000000.pt. Training waits for a copy of its state in
    host memory; the file is written in the background, one at a time. A write that fails is said and ends nothing, but
    for the last one; what was saved before it is whole."""

    def __init__(self, state, config, run, world, log, run_id, resumed_from):
        self.bytes = 12 * state.model.parameter_count() + 2**20  # weights, AdamW's two means, in fp32; and the rest
        self.run, self.world, self.log = run, world, log
        self.settings = dict(network=dataclasses.asdict(config), run=dataclasses.asdict(run), run_id=run_id,
                             made_by=environment(world))
        self.folder = Path(run.output_dir) / run_id
        self.newest, self.rollbacks = resumed_from, 0  # the newest file that is whole; how often a run went back to it
        self.saved_step = state.step if resumed_from else None  # of which a file is there, or being written
        self.writing, self.copies, self.error = None, {}, None  # the last write's error, if it failed
        self.mark, self.waited = time.monotonic(), 0.0  # when the last save began, how long training waited for it

    def refit(self, run):
        """The run has another length from now on."""
        self.run, self.settings["run"] = run, dataclasses.asdict(run)

    def __enter__(self):
        self.pool = ThreadPoolExecutor(1)
        if self.world.is_main and self.run.save_checkpoints and (free := self.free()) < self.bytes:
            self.log.text(f"{self.folder} has {free / 2**20:,.0f} MiB free, and a checkpoint takes "
                          f"{self.bytes / 2**20:,.0f}: free some space before the first one")
        return self

    def __exit__(self, *error):
        self.finish()
        self.pool.shutdown()

    def free(self):
        """Free bytes on the disk of the run's folder."""
        return shutil.disk_usage(self.folder).free

    def due(self):
        """Whether --save_every_minutes asks for a checkpoint."""
        minutes = self.run.save_every_minutes
        return self.run.save_checkpoints and minutes > 0 and time.monotonic() - self.mark >= 60 * minutes

    def save(self, state):
        """Save the state, if it is not saved yet; every process takes part, the first one writes."""
        if not self.run.save_checkpoints or state.step == self.saved_step:
            return
        self.saved_step, self.mark = state.step, time.monotonic()
        content = dict(state.state_dict(self.world), **self.settings)
        self.finish()
        content = self.copy(content)
        if not self.world.is_main:
            return
        self.world.synchronize()
        self.waited = time.monotonic() - self.mark
        path = self.folder / f"step{state.step:06d}.pt"
        self.writing = path, self.pool.submit(self.write, path, content)

    def copy(self, value, place="", done=None):
        """Nested values with their tensors in host memory, where each place has its own for the whole run. What shares
        memory shares its copy. Each process gives its share of what is sharded, and the first one has the copy."""
        done = {} if done is None else done
        if isinstance(value, dict):
            return {key: self.copy(item, f"{place}/{key}", done) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copy(item, f"{place}/{i}", done) for i, item in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return value
        same = getattr(value, "_local_tensor", value).data_ptr(), value.shape
        value = whole(value)
        if same not in done and self.world.is_main:
            if place not in self.copies:
                self.copies[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            done[same] = self.copies[place].copy_(value, non_blocking=True)
        return done.get(same)

    def write(self, path, content):
        """In the background: the file, and what it makes superfluous. Gives the seconds it took."""
        begin = time.monotonic()
        if (free := self.free()) < self.bytes:
            raise OSError(errno.ENOSPC, f"{self.bytes / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} free")
        write_checkpoint(path, content)
        every, newest = self.run.save_every, self.run.keep_last or 2
        for old in checkpoints_of(self.folder)[newest:]:
            if self.run.keep_last or not every or step_of(old) % every:
                old.unlink(missing_ok=True)
        return time.monotonic() - begin

    def look(self):
        """Say it if a write has ended."""
        if self.writing and self.writing[1].done():
            self.finish()

    def finish(self):
        """Wait for the write, if one is going on, and say how it ended."""
        if not self.writing:
            return
        (path, writing), self.writing = self.writing, None
        try:
            took = writing.result()
            self.newest, self.error, self.rollbacks = path, None, 0
            self.log.text(f"saved {path}: training waited {self.waited:.3f} s, the file took {took:.3f} s")
        except (OSError, RuntimeError, MemoryError) as e:  # torch.save has the second for a full disk
            self.error = getattr(e, "strerror", None) or first_line(e)
            kept = f"{self.newest} is whole" if self.newest else "there is none yet"
            self.log.text(f"{path} was not saved ({self.error}): training goes on, {kept}")

    def finish_last(self):
        """Wait for the last write, all processes together: torchrun ends the others when one has left. Raises DataError
        where it failed."""
        self.finish()
        error, self.newest = self.world.gather((self.error, self.newest))[0]
        if error:
            kept = f"{self.newest} is whole: " if self.newest else ""
            raise SharedDataError(f"the last checkpoint was not saved ({error}); {kept}free some space, then "
                                  f"{how_to_go_on(self.newest)}")


WEIGHTS = {"model", "network", "run"}  # what --init_from needs of a file; a resume needs all of a checkpoint
CHECKPOINT = WEIGHTS | {"optimizer", "loader", "scaler", "rng", "step", "tokens", "seconds", "skipped", "run_id",
                        "made_by"}


def load_checkpoint(path, parts=CHECKPOINT, flag="resume"):
    """The content of a checkpoint, on the CPU, its configurations with all of today's fields. Nothing in the file is
    run (weights_only)."""
    path = Path(path)
    try:
        return read_checkpoint(path, parts, flag)
    except (ConfigError, DataError):
        raise
    except FileNotFoundError as e:
        raise ConfigError(f"{flag}={path} does not exist; name a .pt file of a run's folder"
                          + ", or auto" * (flag == "resume")) from e
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}); name another") from e
    except Exception as e:  # torch.load raises many kinds
        raise DataError(f"{path} cannot be read as a checkpoint ({type(e).__name__}); name another") from e


def read_checkpoint(path, parts, flag):
    """The same, where the file is there and torch can read it."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a file; name another")
    verify_checksum(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error of one line is to come
        content = torch.load(path, map_location="cpu", weights_only=True)
    held = set(content) if isinstance(content, dict) and content["format"] == 2 else set()
    require(parts <= held or not WEIGHTS <= held, f"{flag}={path} holds weights and no training state; start from "
            "them with --init_from")
    named = parts <= held and "model" in content["run"]
    if not named or not re.fullmatch(r"\w[\w.-]*", content.get("run_id", "none"), re.ASCII):
        raise DataError(f"{path} is not a checkpoint of this script; name another")
    unknown = sorted(set(content["network"]) - {f.name for f in dataclasses.fields(GPTConfig)})
    if unknown:
        raise DataError(f"{path} holds a network with {', '.join(unknown)}, unknown here; use the program, or the "
                        "version of it, that trained it")
    try:
        content["network"] = dataclasses.asdict(GPTConfig(**content["network"]))
        if "step" in parts:  # more than --init_from needs
            content["run"] = dataclasses.asdict(TrainConfig(**content["run"]))
    except ConfigError as e:
        raise DataError(f"{path} holds a configuration that cannot be ({e}); name another") from e
    return content


def newest_checkpoint(folder):
    """The checkpoint of the most steps in a run's folder, or None."""
    return next(iter(checkpoints_of(folder)), None)


def how_to_go_on(saved):
    """What helps a run that ended early, of which a checkpoint is there or none."""
    return "--resume auto goes on" if saved else "begin again, for there is no checkpoint yet"


def load_first_whole(paths, wanted):
    """(path, content, notes on damaged ones) of the first of these checkpoints that is whole and has the wanted fields
    of a network, {name: value}; path and content None where none is. Raises DataError where all are damaged."""
    damaged, others = [], []
    for path in paths:
        try:
            content = load_checkpoint(path)
        except (ConfigError, DataError) as e:
            damaged.append(f"passed over: {e}".removesuffix("; name another"))
            continue
        if wanted.items() <= content["network"].items():
            return path, content, damaged
        others.append(path)
    if damaged and not others:
        raise DataError(f"there is nothing whole to resume ({'; '.join(damaged)}); remove them to start afresh")
    return None, None, damaged


def checkpoints_of_runs(output_dir, wanted):
    """The checkpoints in output_dir, of the newest run first, without the runs whose config.json has not the wanted
    fields of a network, {name: value}."""
    for folder in sorted(Path(output_dir).glob("*/"), key=lambda p: p.name, reverse=True):
        try:
            network = GPTConfig(**json.loads((folder / "config.json").read_text())["network"]).network()
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            network = wanted  # the checkpoints themselves say
        if wanted.items() <= network.items():
            yield from checkpoints_of(folder)


def checkpoint_fields(content):
    """The fields of a checkpoint's configurations, the base for resolve(), with its accumulation as tokens per step."""
    run = TrainConfig(**content["run"])
    fields = {**content["network"], **content["run"], "tokens_per_step": run.tokens_per_step}
    del fields["grad_accumulation_steps"]
    return fields


def initial_fields(content):
    """The base for resolve() of a new run that starts with a file's weights: its network, nothing of how it was
    trained."""
    network = GPTConfig(**content["network"]).network()
    return {**field_defaults(GPTConfig), **field_defaults(TrainConfig), **network, "model": content["run"]["model"]}


def refuse_other_network(config, run, origin):
    """Raise ConfigError where the run's network is not that of the weights it starts from, if any, or its optimizer not
    that of the run it resumes."""
    if origin.content is None:
        return
    for name, form in (("optimizer", str), ("muon_beta2", bool)):  # with which there are squares in its state
        used, wanted = origin.content["run"].get(name), getattr(run, name)
        require(not origin.resumed or form(used) == form(wanted), f"{name}={wanted}, and {origin.path} holds the "
                f"state of {used}; drop the flag, or start from the weights alone with --init_from")
    saved, flag = GPTConfig(**origin.content["network"]), "resume" if origin.resumed else "init_from"
    other = next((name for name, value in config.network().items() if value != getattr(saved, name)), None)
    if other is None:
        return
    remedy = "name other shards" if other == "vocab_size" else f"drop the flag, or start without --{flag}"
    if not origin.resumed:
        free = ", ".join(f.name for f in dataclasses.fields(GPTConfig)
                         if not f.metadata["rebuilds"] and f.name not in STARTS)
        remedy += f" (fixed at pre-training: {', '.join(config.network())}; free: {free}, and the run's own flags)"
    raise ConfigError(f"{origin.path} holds another network ({other} {getattr(saved, other)}, not "
                      f"{getattr(config, other)}); {remedy}")


def differences(config, run, content, world):
    """Notes on what else a resumed run does in another way."""
    saved = {**content["network"], **content["run"]}
    now = {**dataclasses.asdict(config), **dataclasses.asdict(run)}
    notes = [f"differs from the checkpoint: {k}={v}, was {saved[k]}" for k, v in now.items() if v != saved[k]]
    here, there = environment(world), content["made_by"]
    other = [f"{k}={v}, was {there.get(k)}" for k, v in here.items() if v != there.get(k) and k != "source"]
    notes += [f"differs from the checkpoint, so losses go on equal to rounding, not bitwise: {line}" for line in other]
    if here["source"] != there.get("source"):
        notes.append("differs from the checkpoint: the script or its kernel; the run's log begins with those of then")
    return notes


# ----------------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def evaluate(model, shards, config, run, world, numerics, signals=None):
    """Means in nats over the validation targets, None if a process was asked to stop before it had done its share.

    val_loss and val_ntp_loss are of the next token alone and the same for any batch and number of processes;
    val_mtp_loss has MTP's auxiliary loss at its present weight (where the last window is cut short, its further targets
    are fewer, and their weight depends a little on the batch)."""
    exact = torch.float32 if world.device.type == "mps" else torch.float64
    sums = torch.zeros(4, dtype=exact, device=world.device)  # main and aux loss, targets, processes that stopped
    model.eval()
    together = run.parallel == "fsdp"  # and nobody can leave
    for x, targets, count in validation_batches(shards, run, config.lookahead, world, together):
        if signals and signals.asked and not together:
            sums[3] = 1
            break
        with numerics.autocast():
            _, (main, aux) = model(x, targets, return_logits=False, return_loss_components=True)
        aux = torch.zeros_like(main) if aux is None else aux.nan_to_num()  # a batch of one target has none two ahead
        sums[:3] += count * torch.stack([main, aux, torch.ones_like(main)]).to(exact)
    model.train()
    main, aux, count, stopped = world.sum(sums).tolist()
    if stopped:
        return None
    weight = float(model.mtp_weight_buffer) if config.mtp_enabled else 0.0
    ntp, mtp = main / count, (main + weight * aux) / count
    return dict(val_loss=ntp, val_ntp_loss=ntp, val_mtp_loss=mtp, mtp_weight=weight, val_targets=round(count))


class Meter:
    """Times the steps and reports each. On a GPU a step's numbers are read when the next one is already queued, so that
    the device never waits for the host. Seconds count training alone: flush() before anything else, resume() after.

    With the numbers come the requests: what any process has asked of all, which they so see after the same step."""

    REQUESTS = ("stop", "save", "data")  # by a signal; by the clock; since shards cannot be read

    def __init__(self, state, run, world, log, run_id):
        self.state, self.run, self.world, self.log, self.run_id = state, run, world, log, run_id
        self.flops_per_token = state.model.flops_per_token(run.sequence_length)
        self.peak_flops = world.peak_flops()
        self.pending, self.requests, self.rollback, self.rolled_back = None, set(), False, 0
        self.count, self.total, self.first = 0, 0.0, []  # steps of this process, their seconds, those of the first few
        self.begin, self.others = time.perf_counter(), dict(validation=0.0, saving=0.0)  # seconds
        self.profiling = False  # the steps that come are slower
        self.resume()

    def resume(self):
        self.mark = time.perf_counter()

    def submit(self, numbers, grad_norm, statistics, scheduled, cursor):
        """The step that was just queued: its loss and the requests, the same on all processes, as a tensor; the norm of
        its gradient; its layer_statistics(); its Plan; the data cursor before it."""
        names = ["loss", *self.REQUESTS, "grad_norm", *statistics]
        read = self.world.read_later(torch.cat([numbers, torch.stack([grad_norm, *statistics.values()])]))
        previous, self.pending = self.pending, (self.state.step, self.state.tokens, names, read, scheduled, cursor)
        if previous:
            self.report(*previous)
        if self.world.device.type != "cuda":  # the host has waited already
            self.flush()

    def flush(self):
        if self.pending:
            self.report(*self.pending)
            self.pending = None
        self.world.synchronize()

    @contextlib.contextmanager
    def other(self, what):
        """Counts the seconds of what is not a step."""
        begin = time.perf_counter()
        yield
        self.others[what] = self.others.get(what, 0.0) + time.perf_counter() - begin

    @contextlib.contextmanager
    def says_where_time_went(self):
        """Logs at the end, also of a run that is stopped, where the seconds since the start of train() went."""
        try:
            yield
        finally:
            first, every = sum(self.first[:1]), time.perf_counter() - self.begin
            parts = {"first step": first, "further steps": self.total - first, **self.others}
            parts["the rest"] = every - sum(parts.values())
            said = " + ".join(f"{what} {seconds:.1f}" for what, seconds in parts.items())
            on_data = f"of the steps the host spent {self.state.loader.seconds:.2f} s on data"
            self.log.text(f"time: {every:.1f} s = {said}; {on_data}")

    @property
    def step_average(self):
        """Mean seconds of a step without the first ones, which compile and allocate; of a short run, of its second
        half: what the host sees of a single step may be much shorter or longer than the step was."""
        skipped = min(len(self.first), self.count // 2)
        return (self.total - sum(self.first[:skipped])) / (self.count - skipped)

    def count_step(self):
        """The seconds of the step that has just ended, once they are counted."""
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        self.state.seconds += seconds
        if self.profiling:
            self.others["profile"] += seconds
            return seconds
        self.count, self.total = self.count + 1, self.total + seconds
        self.first += [seconds] if self.count <= TIMING_WARMUP_STEPS else []
        if self.count == 1:
            self.log.text(f"first step done after {seconds:.1f} s, with what compiles and allocates")
        return seconds

    def report(self, step, tokens, names, read, scheduled, cursor):
        """Log a submitted step, and judge it if its update was skipped."""
        figures = dict(zip(names, read()))
        loss, grad_norm = figures.pop("loss"), figures.pop("grad_norm")
        self.requests.update(name for name in self.REQUESTS if figures.pop(name))
        seconds = self.count_step()
        overflow = not math.isfinite(grad_norm)  # with a scaler only a step that lowers its scale
        skipped = not math.isfinite(loss) or (overflow and not self.state.numerics.scaler.is_enabled())
        rate = self.run.tokens_per_step / self.step_average
        per_gpu = rate * self.flops_per_token / self.world.size
        whole_run = 60 * self.run.minutes if self.run.unfitted else self.run.num_iterations * self.step_average
        momentum = dict(momentum=scheduled.momentum) if self.run.optimizer == "muon" else {}
        record = dict(
            step=step, train_loss=None if skipped else loss, lr=scheduled.lr, grad_norm=None if overflow else grad_norm,
            mtp_weight=scheduled.mtp_weight, **momentum, tokens=tokens, tokens_per_second=rate,
            mfu=per_gpu / self.peak_flops if self.peak_flops else None, peak_mem_MB=self.world.peak_memory_mb(),
            step_ms=1000 * seconds, step_avg_ms=1000 * self.step_average, time=1000 * self.state.seconds,
            seconds_left=max(0.0, whole_run - step * self.step_average),
        )
        record.update((name, value if math.isfinite(value) else None) for name, value in figures.items())
        if skipped:
            record["skipped"] = True
        self.log.record(record, self.run.num_iterations)
        self.state.skipped = self.state.skipped + 1 if skipped else 0
        if skipped:
            self.judge(step, loss, grad_norm, cursor)

    def judge(self, step, loss, grad_norm, cursor):
        """What follows from a skipped update."""
        said = f"step {step}: the loss is {loss}, the norm of its gradient {grad_norm}"
        again = f"-{self.rolled_back}" if self.rolled_back else ""  # the step had another batch before
        path = Path(self.run.output_dir) / self.run_id / f"skipped{step:06d}{again}.npz"
        if self.world.is_main:
            epoch, _, numbers = self.state.loader.sequences_of_step(**cursor)
            try:
                tokens = self.state.loader.read_sequences(numbers).astype(np.uint16)
                write_atomically(path, lambda f: np.savez(f, tokens=tokens, rows=numbers, epoch=epoch, step=step))
                said += f"; its batch is in {path}"
            except (OSError, DataError) as e:
                said += f"; its batch cannot be written ({e})"
        self.log.text(said)
        limit = 1 if self.run.nan_policy == "stop" else self.run.nan_limit
        if self.state.skipped >= limit and self.run.nan_policy != "rollback":
            raise DivergedError(f"{said}: {self.state.skipped} update{'s' * (limit > 1)} in a row came to nothing, and "
                                "training stopped; what was saved is whole: lower --learning_rate, lengthen "
                                "--warmup_iters, or see --nan_policy")
        self.rollback = self.state.skipped >= limit


def due(step, every, last):
    """Whether what is done each so many steps (0: never), and after the last one, is to be done after this many."""
    return step > 0 and (step == last or (every > 0 and step % every == 0))


def layers_of(model):
    """{layer: its parameters}: h.3 is block 3, wte the embedding, the head's too if they are tied."""
    layers = {}
    for name, p in model.named_parameters():
        first, *rest = name.removeprefix("transformer.").split(".")
        layer = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
        layers.setdefault(layer, []).append(p)
    return layers


@contextlib.contextmanager
def whole_outside_blocks(model):
    """For a part of the model, which sharded makes whole only itself and its blocks; uncompiled."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()
    with torch.compiler.set_stance("force_eager"):
        yield
    model.reshard()


@torch.no_grad()
def activation_rms(model, idx, numerics):
    """{layer: the root mean square of the stream that the block gives}, tensors, for sequences idx (B, T), without
    dropout. The model is not compiled here, so that nothing is compiled again for this."""
    found, training = {}, model.training
    hooks = [block.register_forward_hook(lambda *args, layer=layer: found.update({
        f"h.{layer}": args[-1].float().square().mean().sqrt()})) for layer, block in enumerate(model.transformer.h)]
    try:
        with numerics.autocast(), whole_outside_blocks(model):
            GPT.trunk(model.eval(), idx)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def layer_statistics(state, idx, wanted):
    """What the update inside does to each layer, for --log_stats: {figure/layer: tensor}, filled when it is done. The
    norm of its gradient before clipping, that of its weights and of their change as a share of it, and the RMS of the
    stream behind it for the sequences idx (B, T). They change nothing that is trained; the host waits for fp16's scale
    alone."""
    found, norm = {}, total_norm
    if not wanted:
        yield found
        return
    found |= {f"activation_rms/{layer}": rms for layer, rms in activation_rms(state.model, idx, state.numerics).items()}
    layers, before = layers_of(state.model), {}
    for layer, weights in layers.items():
        gradients = [p.grad for p in weights if p.grad is not None]
        if gradients:
            found[f"grad_norm/{layer}"] = norm(gradients) / state.numerics.scaler.get_scale()
        found[f"weight_norm/{layer}"] = norm([p.detach() for p in weights])
        before[layer] = [p.detach().clone() for p in weights]
    yield found
    for layer, weights in layers.items():
        change = norm([p.detach() - old for p, old in zip(weights, before[layer])])
        found[f"update_ratio/{layer}"] = change / found[f"weight_norm/{layer}"]


def train_step(model, state, scheduled, run, world, asked):
    """One optimizer step: forward and backward of this process's micro-batches, then the update. Gives tensors: the
    mean loss of the micro-batches and the share of the processes that asked for each of Meter.REQUESTS; the norm of the
    gradient; layer_statistics()."""
    apply_plan(scheduled, state.model, state.optimizer)
    micro_steps = run.grad_accumulation_steps // world.size
    loss = 0.0
    for micro in range(micro_steps):
        x, targets = state.loader.next_batch()
        with gradient_sync(model, run, wanted=micro == micro_steps - 1):
            with state.numerics.autocast():
                _, micro_loss = model(x, targets, return_logits=False)
            state.numerics.backward(micro_loss / micro_steps)
        loss = loss + micro_loss.detach() / micro_steps
    asked = [torch.full_like(loss, float(request)) for request in asked]  # written on the device: nobody waits
    numbers = world.mean(torch.stack([loss, *asked]))
    wanted = run.log_stats and due(state.step + 1, run.log_stats, run.num_iterations)
    with layer_statistics(state, x[:1], wanted) as statistics:
        grad_norm = state.numerics.step(state.optimizer, list(state.model.parameters()), run.grad_clip, numbers[0])
    return numbers, grad_norm, statistics


def fit_to_minutes(state, run, meter, saver, world, log):
    """The run with as many steps as its minutes hold, by the mean of those timed so far without the first, which
    compile; or the run as it is, while those are few."""
    meter.flush()
    seconds = world.gather(meter.step_average)[0]  # one answer for all processes
    meter.resume()
    if meter.count < FITTED_AT[-1] and meter.count * seconds < 0.1 * 60 * run.minutes:
        return run
    run = meter.run = fitted(run, seconds, state.step)
    saver.refit(run)
    log.text(f"num_iterations={run.num_iterations}, warmdown_iters={run.warmdown_iters}: what {run.minutes:g} minutes "
             f"hold of steps of {1000 * seconds:.2f} ms")
    return run


def train(state, config, run, world, log, run_id, val_shards, resumed_from):
    """Train from state.step to the end of the run, to its target, or to a signal."""
    meter, begun = Meter(state, run, world, log, run_id), state.step
    model = parallelize(state.model, run, world, log, state.optimizer)
    meter.resume()
    saver = Saver(state, config, run, world, log, run_id, resumed_from)
    with (meter.says_where_time_went(), StopSignals() as signals, saver, frozen_garbage(),
          profiler(meter) as next_step):
        while True:
            saver.look()
            validate = val_shards is not None and due(state.step, run.val_loss_every, run.num_iterations)
            if validate or meter.requests or meter.rollback or due(state.step, run.save_every, run.num_iterations):
                meter.flush()
                if meter.rollback:
                    roll_back(state, meter, saver, world, log)
                    continue
                with meter.other("saving"):
                    saver.save(state)
                end_if_asked(state, meter, signals, saver, world)
                if validate:
                    apply_plan(plan(state.step - 1, config, run), state.model, state.optimizer)  # MTP's weight
                    with meter.other("validation"):
                        losses = evaluate(state.model, val_shards, config, run, world, state.numerics, signals)
                    if losses is None:
                        meter.requests.add("stop")
                        continue
                    if report_validation(losses, state, run, log):
                        break
                meter.resume()
            if state.step >= run.num_iterations:
                break
            scheduled, cursor = plan(state.step, config, run), state.loader.state_dict()
            asked = signals.asked is not None, world.is_main and saver.due(), state.loader.error is not None
            figures = train_step(model, state, scheduled, run, world, asked)
            state.step, state.tokens = state.step + 1, state.tokens + run.tokens_per_step
            meter.submit(*figures, scheduled, cursor)
            if run.unfitted and state.step - begun in FITTED_AT:
                run = fit_to_minutes(state, run, meter, saver, world, log)
            next_step()
            if run.empty_cache_every and state.step % run.empty_cache_every == 0:
                world.empty_cache()
        with meter.other("saving"):
            saver.finish_last()


@contextlib.contextmanager
def frozen_garbage():
    """Inside, Python's garbage collector passes over what was there before: the many objects of libraries and model."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def profiler(meter):
    """Gives what to call after each step. With --profile each process traces some steps, after its first ones; neither
    those nor starting and writing the trace count in the speeds that are logged."""
    run, world, log = meter.run, meter.world, meter.log
    if not run.profile:
        yield lambda: None
        return
    before = max(0, min(TIMING_WARMUP_STEPS, run.num_iterations - meter.state.step - 1 - PROFILED_STEPS))
    begin, end, steps = before + 1, before + 1 + PROFILED_STEPS, 0
    path = Path(run.output_dir) / meter.run_id / f"rank{world.rank}.pt.trace.json.gz"

    def write(trace):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
            log.text(f"profile: {path} has {min(steps, end) - begin} steps, for https://ui.perfetto.dev or TensorBoard")
        except (OSError, RuntimeError) as e:
            log.text(f"profile: {path} cannot be written ({first_line(e)}); training goes on without")

    def next_step():
        nonlocal steps
        steps += 1
        if steps in (before, begin, end):
            meter.flush()
            with meter.other("profile"):
                trace.step()
            meter.profiling = steps == begin
            meter.resume()
        elif steps < end:
            trace.step()

    schedule = torch.profiler.schedule(wait=before, warmup=1, active=PROFILED_STEPS, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True) as trace:
        try:
            yield next_step
        finally:
            if steps <= begin:
                log.text("profile: the run ended before the steps to trace; there is no trace")


def end_if_asked(state, meter, signals, saver, world):
    """Do what the processes asked of one another, once the state is saved."""
    asked, meter.requests = meter.requests, set()
    if state.step >= saver.run.num_iterations:
        asked.discard("data")  # all that is needed has been read
    if not asked & {"stop", "data"}:
        return
    saver.finish_last()
    saved = f"saved as {saver.newest}" if saver.run.save_checkpoints else "not saved (--no_save_checkpoints)"
    if "data" in asked:
        reason = next(error for error in world.gather(str(state.loader.error or "")) if error)
        raise SharedDataError(f"{reason}: training ended after step {state.step}, {saved}")
    raise Stopped(f"{signals.asked or 'a signal'}: training ended after step {state.step}, {saved}; "
                  f"{how_to_go_on(saver.newest)}")


def roll_back(state, meter, saver, world, log):
    """Go back to the last checkpoint, but with the data that comes next: what was trained on since is passed over."""
    saver.finish()
    saver.rollbacks += 1
    path, rollbacks = world.gather((saver.newest, saver.rollbacks))[0]
    step, cursor = state.step, state.loader.state_dict()
    if path is None or rollbacks > MOST_ROLLBACKS:
        why = "there is no checkpoint to go back to" if path is None else f"{MOST_ROLLBACKS} times {path} led there"
        raise DivergedError(f"{state.skipped} updates in a row came to nothing, and {why}: lower --learning_rate, or "
                            "lengthen --warmup_iters")
    seconds = state.seconds
    state.load_state_dict(load_checkpoint(path), world)
    state.loader.load_state_dict(cursor)
    state.seconds, state.skipped, meter.rollback, saver.saved_step = seconds, 0, False, state.step
    meter.rolled_back += 1
    log.text(f"rolled back from step {step} to {path}; the data trained on since it is passed over")
    log.rewind(state.step)
    meter.resume()


def report_validation(losses, state, run, log):
    """Log a validation; gives whether the run's target is reached. Raises DivergedError for a loss that is none."""
    if not math.isfinite(losses["val_loss"]):
        raise DivergedError(f"the validation loss after step {state.step} is {losses['val_loss']}; training stopped: "
                            "lower --learning_rate or lengthen --warmup_iters")
    log.record(dict(step=state.step, **losses, tokens=state.tokens, time=1000 * state.seconds), run.num_iterations)
    reached = 0 < run.target_val_loss and losses["val_loss"] <= run.target_val_loss
    if reached:
        log.text(f"target validation loss {run.target_val_loss} reached at step {state.step}, after "
                 f"{state.seconds:.1f} s of training and {state.tokens:,} tokens")
    return reached


def report_end(state, config, run, world, log):
    """The last lines of a run: its time, its memory and what that was spent on."""
    peak = world.peak_memory_mb()
    details = dict(
        peak_memory_mb=peak, n_head=config.n_head, n_kv_head=config.n_kv_head, n_embd=config.n_embd,
        n_layer=config.n_layer, kv_sharing_ratio=config.n_head / config.n_kv_head,
        embd_scale_factor=config.n_embd / GPTConfig(**preset(run.model)[0]).n_embd,
    )
    log.text(f"training took {state.seconds:.1f} s for {state.step:,} steps, {state.tokens:,} tokens")
    log.text(f"Peak memory consumption: {peak} MiB with precision={config.precision}")
    log.text("mem_details: " + json.dumps(details))
    log.summary(dict(details, precision=config.precision), run.wandb_checkpoint)


def kept_by_block(config):
    """Bytes of a token that a block keeps for its backward pass, as torch.compile chooses: the stream before each half,
    what makes a product's operand or the kernel of attention (q and k are copies, v keeps the product that made it),
    and in float8 no operand that can be made again."""
    product, stream = BYTES.get(config.precision, (2, 2))  # bytes of a number
    C, F, H, K, D = config.n_embd, config.ffn_hidden, config.n_head, config.n_kv_head, config.head_dim
    projected, copied = (H + 2 * K) * D, (H + K) * D * (config.position == "rope" or config.qk_norm)
    if config.mixer == "latent":
        R, rank = config.rope_head_dim, config.kv_rank
        projected, copied = H * (D + R) + rank + R + 2 * H * D, 2 * H * (D + R)
    attended, log_sums = H * D * product, 4 * H  # attention's output, the logs of its softmaxes' sums in fp32
    hidden = 2 * F if config.mlp == "swiglu" else F
    operands = C if config.precision == "fp8" else (2 * C + F) * product
    added = 2 * C * product * config.post_norm  # attention's and the MLP's outputs, before their norms
    added += C * stream * config.x0_lambdas  # the stream before it was mixed
    added += 3 * C * product * len(config.smears & {"attention", "mlp"})
    added += attended * (config.attention_gate > 0)  # before the gate
    return 2 * C * stream + (projected + copied + hidden) * product + attended + log_sums + operands + added


def planned_state(config, run, model, shares):
    """(bytes of the fp32 weights, of the optimizer's means) on one GPU, with one of so many shares of them."""
    parameters = model.parameter_count()
    muons = sum(p.numel() for p in parameter_groups(model)["matrices"]) if run.optimizer == "muon" else 0
    means = 4 * (2 * parameters - muons) // shares  # AdamW keeps two of each parameter, Muon one
    weights = 4 * parameters // shares
    if shares > 1:  # and whole: what is outside the blocks, the block that computes, and the one that comes
        inside = sum(p.numel() for part in (model.transformer.h, model.mtp_blocks) for p in part.parameters())
        number = 4 if config.precision == "fp8" else BYTES.get(config.precision, (2, 2))[0]
        weights += 4 * (parameters - inside) + 2 * number * inside // (config.n_layer + len(model.mtp_blocks))
    return weights, means


def planned_head(config, model, tokens, training):
    """(bytes of the first part of the logits, of them and what else the loss needs): what the heads read, the matrix in
    the type of products and, training, the gradients of both."""
    product, heads = BYTES.get(config.precision, (2, 2))[0], 1 + len(model.mtp_blocks)
    streams, matrix = heads * tokens * config.n_embd * product, model.lm_head.weight.numel()
    part = next(parts_of(tokens, FUSED_LOGITS_AT_ONCE // config.vocab_size))
    with_float8 = training and config.precision in FLOAT8_HEADS  # the gradient beside the logits
    logits = (part.stop - part.start) * config.vocab_size * (product + with_float8)
    if not training:
        return logits, logits + streams + product * matrix
    # For each head a gradient of the matrix waits for backward(). One comes once more, scaled, where the logits were.
    return logits, max(logits, 4 * matrix) + 2 * streams + product * matrix + 4 * heads * matrix


def memory_plan(config, run, model, world_size=1, training=True):
    """Bytes on one GPU at the peak of compiled training (else of validation, run.batch_size being that of its batch),
    by part: what is there with the first part of the logits."""
    parameters, tokens = model.parameter_count(), run.batch_size * run.sequence_length
    product, stream = BYTES.get(config.precision, (2, 2))
    shares = world_size if run.parallel == "fsdp" else 1
    weights, means = planned_state(config, run, model, shares)
    logits, head = planned_head(config, model, tokens, training)
    blocks, block = config.n_layer + len(model.mtp_blocks), tokens * kept_by_block(config)
    if not training:  # one block at a time, and nothing is kept for later
        return dict(weights=weights, gradients=0, optimizer=means, activations=block, head=head)
    if config.gradient_checkpointing:
        kept = blocks * tokens * config.n_embd * stream + max(0, block - logits)
    else:
        values = 3 * config.value_embeddings * config.n_kv_head * config.head_dim * product  # and v in two blocks
        begun = config.n_embd * (config.embd_norm * stream + 3 * product * ("embedding" in config.smears))
        kept = blocks * block + tokens * (values + begun)
        if config.precision not in ("fp32", "fp8") and shares == 1:
            # Each micro-batch keeps the blocks' matrices in the type of products; sharded they come in it.
            weights += product * sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    # A sum over micro-batches stays whole until the last, see gradient_sync(); those of one come as activations go.
    summed = run.grad_accumulation_steps > world_size and (shares == 1 or run.gradient_dtype == "fp32")
    gradients = 4 * parameters if summed else max(0, 4 * parameters // shares - kept - head)
    return dict(weights=weights, gradients=gradients, optimizer=means, activations=kept, head=head)


def parameters_by_part(model):
    """Parameters of embedding, attention, mlp, norms and head; the tied matrix is in the embedding."""
    counts = dict(embedding=0, attention=0, mlp=0, norms=0, head=0)
    words = {".wte.": "embedding", ".wpe.": "embedding", "value_embeddings.": "embedding", ".attn.": "attention",
             ".mlp.": "mlp", "lm_head.": "head"}
    for name, p in model.named_parameters():
        counts[next((part for word, part in words.items() if word in name), "norms")] += p.numel()
    return counts


def estimate_speeds(config, run, flops_per_token):
    """[(GPU, tokens/s of one, how that is known)] from docs/measured.json: measured for this preset, precision and
    number of FLOPs a token; else by the FLOP/s of the run there in this precision with the nearest number of them."""
    path = Path(__file__).parent / "docs" / "measured.json"
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    found = []
    for gpu in sorted({other["gpu"] for other in known}):
        here = [other for other in known if (other["gpu"], other["precision"]) == (gpu, config.precision)]
        if not here:
            continue
        nearest = min(here, key=lambda other: (abs(math.log(other["flops_per_token"] / flops_per_token)),
                                               other["model"] != run.model))
        exact = (nearest["model"], nearest["flops_per_token"]) == (run.model, flops_per_token)
        how = (f"measured with batches of {nearest['batch_size']}" if exact else
               f"estimated by the FLOP/s of {nearest['model']} in {nearest['precision']}")
        found.append((gpu, nearest["tokens_per_second"] * nearest["flops_per_token"] / flops_per_token, how))
    return found


def dry_run(typed, origin):
    """--dry_run: what the run would be, without a GPU, data, or anything written. Gives the lines."""
    settings = {**field_defaults(TrainConfig), **(origin.base or {}), **typed}
    device = "cuda" if settings["device"] == "auto" else settings["device"]
    vocab_size, (_, _, world_size) = 0, torchrun_place()
    with contextlib.suppress(DataError):  # there need be no shards
        vocab_size = TokenShards(settings["input_bin"]).vocab_size
    memory = int(2**30 * typed.get("memory_gib", 0))  # of a card that need not be here
    if settings["batch_size"] == "auto" and device == "cuda" and not memory and torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[0]
    machine = Machine(world_size, device, device == "cuda", device == "cuda", vocab_size, memory)
    config, run, notes = resolve(typed, machine, origin.base)
    refuse_other_network(config, run, origin)
    notes += [] if vocab_size else [f"no shards of --input_bin can be read: vocab_size={config.vocab_size} is assumed"]
    steps = run.num_iterations - (origin.content["step"] if origin.resumed else 0)
    with torch.device("meta"):
        model = GPT(config)
    counts, flops = parameters_by_part(model), model.flops_by_part(run.sequence_length)
    total, per_token = model.parameter_count(), model.flops_per_token(run.sequence_length)
    lines = [f"dry run of {run.model}, precision {config.precision}: nothing is trained, nothing is written", *notes,
             f"parameters: {total:,}, without the embedding {total - counts['embedding']:,}",
             f"{'part':10}{'parameters':>16}{'MFLOP a token, forward':>26}{'backward':>12}"]
    for part, count in [*counts.items(), ("total", total)]:
        mflop = (per_token if part == "total" else flops.get(part, 0)) / 1e6
        lines.append(f"{part:10}{count:>16,}{mflop / 3:>26,.1f}{2 * mflop / 3:>12,.1f}")
    memory = {part: size / 2**20 for part, size in memory_plan(config, run, model, world_size).items()}
    lines.append(f"memory plan of one GPU at its peak, {run.batch_size} x {run.sequence_length} tokens a micro-batch: "
                 f"{sum(memory.values()):,.0f} MiB (" + ", ".join(f"{k} {v:,.0f}" for k, v in memory.items()) + ")")
    tokens = run.tokens_per_step * steps
    length = f"{tokens:,} in {steps:,} steps" + " to go" * origin.resumed
    length = f"for {run.minutes:g} minutes" if run.unfitted else length
    lines.append(f"{run.tokens_per_step:,} tokens a step, {length}")
    speeds = estimate_speeds(config, run, per_token) if device == "cuda" else []
    for gpu, speed, how in speeds:
        hours, in_time = tokens / speed / world_size / 3600, 60 * run.minutes * speed * world_size
        takes = f"{in_time / 1e6:,.0f} M tokens" if run.unfitted else f"{hours:.3g} hours"
        lines.append(f"on {world_size} x {gpu}: {takes} at {speed:,.0f} tokens/s each ({how})")
    return lines + ["another GPU: in the ratio of the two dense bf16 peaks"] * bool(speeds)


def wanted_network(typed):
    """What --resume auto asks of a run's network, {name: value}: what was typed makes one, or --init_from names it."""
    shaping = {f.name for f in dataclasses.fields(GPTConfig) if f.metadata["rebuilds"]} | PRESET_FLAGS
    shaping = {name: typed[name] for name in shaping & typed.keys()}
    wanted = resolve(shaping, ANY_MACHINE)[0].network() if shaping else {}
    if "init_from" in typed:  # the run that began with those weights, if any
        return GPTConfig(**load_weights(typed)[1]["network"]).network()
    if "vocab_size" not in typed:
        wanted.pop("vocab_size", None)  # it is the shards'
    return wanted


def find_resume(typed):
    """(path, content, notes) of the checkpoint that --resume means; path and content None for a fresh start."""
    if "resume" not in typed:
        return None, None, []
    path = typed["resume"]
    require(path, "resume= names nothing; name a checkpoint or auto, or drop the flag")
    if path == "auto":
        wanted = wanted_network(typed)
        paths = checkpoints_of_runs(typed.get("output_dir", TrainConfig.output_dir), wanted)
        path, content, notes = load_first_whole(paths, wanted)
    elif Path(path).is_dir():
        paths = checkpoints_of(Path(path))
        require(paths, f"resume={path} is a folder without checkpoints; name a run's folder, a .pt file, or auto")
        path, content, notes = load_first_whole(paths, wanted={})
    else:
        content, notes = load_checkpoint(path), []
    return path and Path(os.path.realpath(path)), content, notes


class Origin(NamedTuple):
    """What a run starts from: nothing, a checkpoint to resume, or (resumed False) weights to begin a new run with."""

    path: Any = None
    content: Any = None
    base: Any = None  # fields for resolve()
    resumed: bool = False
    notes: Any = ()

    def is_of_run_in(self, output_dir):
        """Whether it lies in the folder of the run that wrote it, which then goes on; a copy begins another run."""
        return self.resumed and str(self.path.parent) == os.path.realpath(Path(output_dir) / self.content["run_id"])


def load_weights(typed):
    """(path, content) of what --init_from means."""
    path = Path(typed["init_from"])
    require(typed["init_from"], "init_from= names nothing; name a .pt file, or drop the flag")
    found = newest_checkpoint(path) if path.is_dir() else path
    require(found, f"init_from={path} is a folder without checkpoints; name a run's folder or a .pt file, which "
            "tools/hf.py import makes of a model of transformers")
    return found, load_checkpoint(found, WEIGHTS, "init_from")


def find_origin(typed):
    both = typed.keys() >= {"init_from", "resume"} and typed["resume"] != "auto"
    require(not both, "resume and init_from both say what to start from; drop one, or type --resume auto")
    path, content, notes = find_resume(typed)
    if content:
        fields = checkpoint_fields(content)
        if path.parent.name == content["run_id"]:
            fields["output_dir"] = str(path.parent.parent)  # the run may have been moved
        return Origin(path, content, fields, True, notes)
    if "init_from" not in typed:  # else it counts where --resume auto found nothing to go on from
        return Origin(notes=notes)
    ignored = [name for name in STARTS if name in typed]
    require(not ignored, f"{', '.join(ignored)} would be ignored: the weights come from --init_from; drop one of them")
    path, content = load_weights(typed)
    return Origin(path, content, initial_fields(content))


def start_run(typed, world, origin):
    """Put a run together, from shards, flags and what it starts from: what train() takes, and notes."""
    settings = {**field_defaults(TrainConfig), **(origin.base or {}), **typed}
    shards = TokenShards(settings["input_bin"])
    val_shards = TokenShards(settings["input_val_bin"]) if settings["input_val_bin"] else None
    if val_shards and val_shards.total < 2:
        raise DataError(f"'{settings['input_val_bin']}' holds one token, and a target needs one before it; name others")
    if val_shards and val_shards.vocab_size != shards.vocab_size:
        raise DataError(f"training shards have a vocabulary of {shards.vocab_size}, validation shards one of "
                        f"{val_shards.vocab_size}; name shards of one tokenizer")
    config, run, notes = resolve(typed, world.machine(shards.vocab_size), origin.base)
    notes += origin.notes
    refuse_other_network(config, run, origin)
    kernel, note = attention_kernel(config, run, world)
    notes += [note] if note else []
    loader = DistributedDataLoader(shards, run, config.lookahead, world)
    for some in (shards, val_shards):
        if some:
            some.check_ids(world.rank, world.size)
    if val_shards and val_shards.total - 1 < run.val_tokens:
        notes.append(f"validation takes all {val_shards.total - 1:,} targets of its shards, "
                     f"fewer than val_tokens={run.val_tokens:,}")
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")
    model = GPT(config)
    model.rotary.build(run.sequence_length)
    model = placed(model, config, run, world)
    if config.dropout:
        torch.manual_seed(run.seed + 1 + world.rank)  # each process drops others
    numerics = Numerics(config.precision, world.device)
    state = TrainState(model, make_optimizer(model, run, world.device), numerics, loader)
    try:
        if origin.resumed:
            if not state.can_load(origin.content):
                raise ValueError(origin.path)
            state.load_state_dict(origin.content, world)
            notes += [*differences(config, run, origin.content, world), f"resumed {origin.path} at step {state.step}"]
        elif origin.content:
            if not is_like(origin.content["model"], model.state_dict()):
                raise ValueError(origin.path)
            model.load_state_dict(shared_like(origin.content["model"], model.state_dict()))
            notes.append(f"weights from {origin.path}")
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:  # other names, shapes, kinds
        raise DataError(f"{origin.path} does not hold the state of a run of its own network; name another") from e
    mflop = model.flops_per_token(run.sequence_length) / 1e6
    rates = {group["name"]: group["relative_lr"] * run.learning_rate for group in state.optimizer.param_groups}
    if len(set(rates.values())) > 1:
        notes.append("learning rates: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
    notes += [f"model {run.model}: {model.parameter_count():,} parameters, {mflop:.1f} MFLOP a token at "
              f"sequence_length={run.sequence_length}, precision {config.precision}",
              f"data: {shards.total:,} training tokens in {len(shards.files)} shards, vocabulary {shards.vocab_size}"]
    return state, config, run, val_shards, kernel, notes


def what_must_be_alike(typed, settings):
    """{name: text} of what all processes must have. The shards may lie elsewhere."""
    mine = {f"--{name}": str(value) for name, value in typed.items()}
    for name in ("input_bin", "input_val_bin"):
        mine[f"--{name}"] = description(settings.get(name, getattr(TrainConfig, name)))
    return dict(mine, torch=str(torch.__version__), script=hashlib.sha256(source().encode()).hexdigest()[:8])


def run_training(typed):
    """One run from what was typed, to its end."""
    gib = typed.get("memory_gib", 0)
    require(0 <= gib < math.inf, f"memory_gib={gib} must be at least 0, and finite; 0 is all there is")
    origin = find_origin(typed)
    if typed.get("dry_run"):
        if speaks_for_all():
            print("\n".join(dry_run(typed, origin)))
        return
    settings = {**(origin.base or {}), **typed}
    world = World(settings.get("device", TrainConfig.device), gib)
    # What is wrong with the flags waits for nothing; what depends on the vocabulary waits for the shards.
    resolve(typed, world.machine(settings.get("vocab_size", 1)), origin.base)
    deterministic = deterministic_algorithms(settings.get("deterministic", TrainConfig.deterministic))
    with world, deterministic, own_words_for_failures(world):
        if world.size > 1:
            world.require_alike(what_must_be_alike(typed, settings))
            world.wait_longer()
        found = world.gather(origin.path and (origin.path.name, origin.content["step"] if origin.resumed else 0))
        if len(set(found)) > 1:
            raise DataError(f"the processes start from different files ({', '.join(map(str, found))}); give all the "
                            "same --output_dir")
        state, config, run, val_shards, kernel, notes = start_run(typed, world, origin)
        if typed.get("resume") and not origin.resumed:
            notes.append(f"no checkpoint of such a network in {run.output_dir}: this is a fresh start")
        if state.step >= run.num_iterations:
            notes.append(f"nothing is left to train: {state.step} of {run.num_iterations} steps are done; "
                         "--num_iterations sets a later end")
        goes_on = origin.is_of_run_in(run.output_dir)
        run_id = world.gather(origin.content["run_id"] if goes_on else new_run_id(run.model))[0]
        resumed_at, resumed_from = (state.step, origin.path) if goes_on else (None, None)
        validates_again = val_shards is not None and due(state.step, run.val_loss_every, run.num_iterations)
        log = open_log(world, config, run, run_id, notes, resumed_at, keep_validation=not validates_again)
        del origin  # weights and optimizer once more
        try:
            with kernel(), own_words_for_failures(world, state, config, run, Path(run.output_dir) / run_id):
                train(state, config, run, world, log, run_id, val_shards, resumed_from)
            report_end(state, config, run, world, log)
        except KNOWN_ENDINGS as e:
            log.ending(e)
            raise
        finally:
            log.close()


@contextlib.contextmanager
def own_words_for_failures(world, state=None, config=None, run=None, folder=None):
    """Make one line of what torch has to say of processes that are gone and of memory that is out; with a state, in the
    numbers of its training, whose checkpoints are in the folder."""
    try:
        yield
    except KNOWN_ENDINGS:
        raise
    except (MemoryError, RuntimeError) as e:
        said, then = first_line(e), how_to_go_on(newest_checkpoint(folder)) if folder else "run the same command again"
        full = isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e)
        if full and state is None:
            raise FullMemoryError(f"out of memory before training ({said}); --dry_run says how large a run is") from e
        if full:
            wanted = re.search(r"ried to allocate ([\d.]+ \w+)", said)
            said = f"{wanted[1]} more" if wanted else said
            raise FullMemoryError(f"{out_of_memory(state, config, run, world, said)}; {then}") from e
        lost = isinstance(e, dist.DistError) or any(word in str(e) for word in ("gloo", "NCCL", "ProcessGroup"))
        if world.size > 1 and lost:
            when = f"after step {state.step}" if state else "before training"
            raise LostError(f"{when} another process of the run did not answer ({said}); {then}") from e
        raise


def out_of_memory(state, config, run, world, said):
    """What an exhausted memory means in this run's numbers, and what helps."""
    training, T = state.model.training, run.sequence_length
    size = run.batch_size if training else run.val_batch_size or run.batch_size
    planned = sum(memory_plan(config, dataclasses.replace(run, batch_size=size), state.model, world.size,
                              training).values())
    where = f"step {state.step + 1}" if training else f"the validation after step {state.step}"
    flag, tokens = "batch_size" if training else "val_batch_size", f"--total_batch_size {run.tokens_per_step}"
    first = f"--{flag} {max(1, size // 2)}" + f" {tokens}" * training
    return (f"out of memory in {where} ({said}): {flag}={size} x {T} tokens was planned at {planned / 2**20:,.0f} MiB, "
            f"{world.peak_memory_mb():,} MiB were taken; try {first}, --gradient_checkpointing, or --batch_size auto "
            f"{tokens}")


# ----------------------------------------------------------------------------------------------------------------------
# main


def main(argv=None):
    """The program: 0 when the run ended well, 75 when a signal ended it and it can go on, 2 for what the user can mend,
    1 when it cannot go on by itself, 130 when interrupted before it trained; one line on stderr."""
    code, line = 0, ""
    try:
        run_training(parse_flags(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        code, line = 130, "interrupted: --resume auto goes on from what was saved, or begins again"
    except KNOWN_ENDINGS as e:
        if e.said_by_each or speaks_for_all():
            line = " ".join((str(e) if isinstance(e, Stopped) else f"error: {e}").splitlines())
        code = e.exit_code
    except OSError as e:  # of a path that nobody looked at
        code, line = 2, f"error: {e.filename} cannot be used ({e.strerror}); name another"
    with contextlib.suppress(OSError):  # a closed stderr
        print(line, end="\n" * bool(line), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
