#!/usr/bin/env python3
"""Make a network with RoPE read more tokens than it was trained on, and measure how well it does.

    python docs/25-long-context/long_context.py --checkpoint logs --lengths 8192 32768
    python docs/25-long-context/long_context.py --table
    python docs/25-long-context/long_context.py train --init_from d12.pt --extension yarn --extension_factor 8
    python docs/25-long-context/long_context.py tools/sample.py logs --prompt 'Once upon a time'

The first measures the loss by position and a needle test, of each method at each length, before and after a short
continued training, whose flags of the script stand behind `--`. It appends a record each to the file of results, and
stopped, the same command goes on. `train` takes every flag of the script; docs/extending.py says how its tools are run.

Exit codes: 0, done; 2, one line on stderr says what to mend; 130, interrupted; 141, nobody read what was printed; else
what a training ended with.
"""
import functools
import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

IS_PROGRAM = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tools"), str(HERE.parents[1] / "data"), str(HERE.parent)]
import extending  # noqa: E402
import measuring  # noqa: E402
from extending import script  # noqa: E402
from sample import context_of, find, find_encoding  # noqa: E402
from shards import ShardWriter, sha256_of  # noqa: E402

option, require, PlainConfig, PlainGPT = script.option, script.require, script.GPTConfig, script.GPT
SCALED, WINDOWS = ("linear", "ntk", "base", "by_parts", "yarn"), ("window", "sinks")
METHODS = ("none", *SCALED, *WINDOWS)
BASE_FACTOR = 100  # Code Llama's 1e6 in place of 1e4
FAST, SLOW = 32, 1  # turns within the trained length: with more a frequency stays, with fewer it is divided
SINKS = 4  # first tokens that are always seen
ASKED = "The pass key is"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9, None)  # shares of the text before the needle; None: there is none
TOKENS_AT_ONCE, HEAD_ROWS = 32_768, 2_048  # of a forward pass, and of logits in fp32
RESAMPLES = 2_000
SET_HERE = ("init_from", "resume", "input_bin", "input_val_bin", "output_dir", "sequence_length", "batch_size",
            "device", "num_iterations", "total_batch_size", "seed", "save_checkpoints", "save_every_minutes",
            "keep_last", "dry_run", "extension", "extension_factor", "trained_length")
TRAINING = "--learning_rate 1e-4 --gradient_checkpointing --shuffle --val_loss_every 0"


COUNTS = dict(  # flags: default, least, most, help
    documents=(64, 1, script.LARGEST, "to read for the loss by position"),
    trials=(20, 1, script.LARGEST, "needles at each depth and length"),
    steps=(100, 0, script.LARGEST, "of continued training; 0: none"),
    total_batch_size=(65_536, 1, script.LARGEST, "tokens of such a step"),
    seed=(1337, 0, script.LARGEST, "of keys and training"),
)


@dataclass(frozen=True)
class LongConfig(PlainConfig):
    """The network, perhaps made to read further than it was trained. Its weights stay those of the plain one."""

    extension: str = option("none", "what lets a sequence be longer than trained_length", choices=METHODS,
                            rebuilds=False)
    extension_factor: float = option(1.0, "the length to be read as a multiple of trained_length", rebuilds=False)
    trained_length: int = option(1024, "tokens of a sequence before the extension", most=2**24, rebuilds=False)

    def __post_init__(self):
        super().__post_init__()
        method, factor, trained = self.extension, self.extension_factor, self.trained_length
        require(method != "none" or trained == LongConfig.trained_length, f"trained_length={trained} would be ignored; "
                "add --extension yarn, or another")
        require(method in SCALED or factor == 1, f"extension_factor={factor:g} would be ignored by extension={method}; "
                f"drop it, or choose one of {', '.join(SCALED)}")
        require(factor >= 1, f"extension_factor={factor:g} must be at least 1; it is the new length / trained_length")
        require(trained >= 16, f"trained_length={trained} must be at least 16")
        rotary = self.position == "rope" and self.mixer == "attention" and self.head_dim >= 4
        require(method == "none" or rotary, f"extension={method} needs position=rope, mixer=attention and heads of "
                "size 4 or more; drop it")
        for name in ("window", "document_mask", "dropout") if method in WINDOWS else ():
            require(not getattr(self, name), f"{name}={getattr(self, name)} with extension={method}, which has a mask "
                    "of its own; drop one of the two")


def frequencies(method, dims, base=10000.0, factor=1.0, trained=1024):
    """The angles of one position (dims / 2,) in float64, and what cos and sin are multiplied by.

    linear: position interpolation (Chen et al. 2023, arXiv:2306.15595, eq. 4). ntk: a base at which the slowest
    frequency is divided by the factor and the fastest stays (bloc97 2023; arXiv:2309.00071, section 3.1). base: a
    hundred times the base, whatever the factor (Code Llama, arXiv:2308.12950, section 2.3). by_parts: frequencies of
    more than FAST turns within the trained length stay, those of fewer than SLOW are divided, and between them the
    share goes linearly with the number of the frequency, as in the authors' code and transformers, where the paper
    (section 3.2) has the turns. yarn: that, and scores times (0.1 ln(factor) + 1)^2 (section 3.4), in cos and sin.
    """
    if method == "ntk":
        base = base * factor ** (dims / (dims - 2))
    elif method == "base" and factor > 1:
        base = base * BASE_FACTOR
    plain = base ** (-np.arange(0, dims, 2) / dims)
    if method == "linear":
        return plain / factor, 1.0
    if method not in ("by_parts", "yarn"):
        return plain, 1.0
    low, high = (dims * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (FAST, SLOW))
    low, high = max(0, math.floor(low)), min(dims - 1, math.ceil(high))
    share = np.clip((np.arange(dims // 2) - low) / (high - low or 1e-3), 0, 1)
    return plain + share * (plain / factor - plain), 0.1 * math.log(factor) + 1 if method == "yarn" else 1.0


class ScaledRotary(script.Rotary):
    """The script's tables of angles, of other frequencies."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.speeds, self.size = frequencies(config.extension, config.rotary_dim, config.rope_base,
                                             config.extension_factor, config.trained_length)
        self.build(config.trained_length)

    def build(self, length, device=None):
        angles = np.outer(np.arange(length), self.speeds)
        for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            table = torch.from_numpy(self.size * table).to(torch.get_default_dtype())
            self.register_buffer(name, table.to(device), persistent=False)


def windowed(q, k, v, window, sinks, cos, sin, scale):
    """Attention of q (B, H, T, D), k and v (B, K, T, D), rotated by cos and sin (T, D/2), to the last `window` tokens,
    the query's own included: (B, H, T, D). `window` queries at once see their own chunk and the one before, so that
    time and memory go with T.

    With sinks a query sees so many first tokens and the last window - sinks, and positions are those within that: it
    stands at min(i, window - 1) for the sinks (Xiao et al. 2023, arXiv:2309.17453, section 3.2). Rotated so, it has
    dimensions of its own, in which all other keys are 0."""
    B, H, T, D = q.shape
    chunks, query = -(-T // window), torch.arange(window, device=q.device)[:, None]
    if sinks:
        back = (torch.arange(T, device=q.device) - (window - 1)).clamp(min=0)
        turned = script.rotate(q.transpose(1, 2), cos[back], -sin[back]).type_as(q).transpose(1, 2)
        q, k, first_k, first_v = torch.cat([q, turned], -1), F.pad(k, (0, D)), k[:, :, :sinks], v[:, :, :sinks]
    q, k, v = (F.pad(z, (0, 0, 0, chunks * window - T)).unflatten(2, (chunks, window)) for z in (q, k, v))
    k, v = (torch.cat([F.pad(z, (0, 0, 0, 0, 1, 0))[:, :, :-1], z], 3) for z in (k, v))  # (B, K, chunks, 2 window, D)
    begin = window * torch.arange(chunks, device=q.device)[:, None, None]
    key = torch.arange(2 * window, device=q.device) - window
    seen = (key <= query) & (query - key < window - sinks) & (begin + key >= 0)
    if sinks:
        firsts = (z[:, :, None].expand(-1, -1, chunks, -1, -1) for z in (F.pad(first_k, (D, 0)), first_v))
        k, v = (torch.cat([first, z], 3) for first, z in zip(firsts, (k, v)))
        seen = torch.cat([begin + query - query[:sinks, 0] >= window - sinks, seen], -1)
    q, k, v = (z.transpose(1, 2).flatten(0, 1) for z in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.repeat(B, 1, 1)[:, None], scale=scale,
                                       enable_gqa=k.size(1) < H)
    return y.unflatten(0, (B, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :T]


class WindowAttention(script.CausalSelfAttention):
    """Attention that sees as many tokens as the network was trained on."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.window, self.sinks = config.trained_length, SINKS * (config.extension == "sinks")

    def forward(self, x, ctx):
        q, k, v = self.qkv(x, ctx)
        if x.size(1) <= self.window:
            return self.out(self.gate(self.attend(q, k, v, ctx.mask), x))
        y = windowed(q, k, v, self.window, self.sinks, ctx.cos, ctx.sin, self.scale or self.head_dim**-0.5)
        return self.out(self.gate(y, x))


class LongGPT(PlainGPT):
    def __init__(self, config):
        super().__init__(config)
        if config.extension in SCALED:
            self.rotary = ScaledRotary(config)


def naming_kernel(attention_kernel):
    """The script's attention_kernel(), which knows nothing of windowed()."""
    def named(config, run, world):
        context, note = attention_kernel(config, run, world)
        if config.extension not in WINDOWS:
            return context, note
        require(run.attention == "auto", f"attention={run.attention} would be ignored: extension={config.extension} "
                "has a kernel of its own; drop one of the two")
        return context, f"attention kernel for {config.extension}: torch's for a mask, in chunks"

    return named


def register():
    """Make the script know all this."""
    plain = script.mixers["attention"]
    script.mixers["attention"] = lambda config, layer: (
        WindowAttention if config.extension in WINDOWS else plain)(config, layer)
    extending.exchange(GPTConfig=LongConfig, GPT=LongGPT, attention_kernel=naming_kernel(script.attention_kernel))
    extending.head_help(__file__, __doc__)
    extending.show_source(__file__)


# ----------------------------------------------------------------------------------------------------------------------
# Documents and the loss by position


@functools.lru_cache(maxsize=32)
def long_documents(shards, tokens):
    """(first token, number of tokens) of each document of at least so many, the end-of-text token before it counted."""
    begins = np.concatenate([int(start) + np.flatnonzero(shards.read_shard(i, 0, int(end - start)) ==
                                                         shards.vocab_size - 1)
                             for i, (start, end) in enumerate(zip(shards.starts, shards.starts[1:]))])
    sizes = np.diff(np.append(begins, shards.total))
    return [(int(begin), int(size)) for begin, size in zip(begins, sizes) if size >= tokens]


def write_rows(shards, T, tokens, path):
    """A shard of rows of T tokens, each within one document, a row more than so many tokens make if there are as many.
    What stands behind a document's last whole row is left out."""
    writer, left = ShardWriter(path, shards.vocab_size), -(-tokens // T) + 1
    for begin, size in long_documents(shards, T):
        count = min(size // T, left)
        if count:
            writer.write(shards.read(begin, count * T).astype(np.uint16))
        left -= count
    writer.close()


def bucket_ends(trained, T):
    """The most tokens before a target of each bucket: the trained length times powers of two, and T."""
    return [trained // 4, trained // 2, *(trained << i for i in range(math.ceil(math.log2(T / trained)))), T]


@torch.no_grad()
def token_losses(model, rows, numerics):
    """Of rows (N, T + 1) the loss of each target in nats, (N, T) in float64; number t has t + 1 tokens before it."""
    T, weight, losses = rows.shape[1] - 1, model.lm_head.weight, []
    for batch in torch.from_numpy(rows).to(weight.device).split(max(1, TOKENS_AT_ONCE // T)):
        with numerics.autocast():
            x = model.trunk(batch[:, :-1])[0].flatten(0, 1).to(weight.dtype)
        losses += [F.cross_entropy(model.head(part), targets, reduction="none").double().cpu()
                   for part, targets in zip(x.split(HEAD_ROWS), batch[:, 1:].flatten().split(HEAD_ROWS))]
    return torch.cat(losses).view(-1, T).numpy()


def by_bucket(losses, ends):
    """The mean of each row's losses (N, T) in each bucket, (N, buckets)."""
    return np.add.reduceat(losses, [0, *ends[:-1]], axis=1) / np.diff([0, *ends])


def bootstrap(values):
    """The 95% interval of the mean of values (N, ...) over sequences, (2, ...): percentiles of the means of RESAMPLES
    draws of N with replacement (Efron 1979, Ann. Stat. 7)."""
    values = np.asarray(values)
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return np.quantile(values[draws].mean(1), [0.025, 0.975], axis=0)


# ----------------------------------------------------------------------------------------------------------------------
# The needle


def pass_keys(encoding):
    """(tokens of the question, the keys): the most numbers below 1000 that are one token each behind the same ones."""
    groups = {}
    for number in range(1000):
        *before, last = encoding.encode(f"{ASKED} {number}").tolist()
        groups.setdefault(tuple(before), []).append(last)
    question, keys = max(groups.items(), key=lambda group: len(group[1]))
    return list(question), keys


def needle_rows(documents, T, depth, trials, encoding, random):
    """(rows (trials, T), the key of each (trials,), all keys): documents, arrays of tokens, whose numbers are taken
    out, with the line "The pass key is 417." behind that share of them, and at the end "The pass key is". `random` is
    numpy's generator, of which the keys come."""
    question, keys = pass_keys(encoding)
    newline, stop = (encoding.encode(text).tolist() for text in ("\n", ".\n"))
    needle = len(newline) + len(question) + 1 + len(stop)
    used = T - len(newline) - len(question) - needle * (depth is not None)
    texts = [text[~np.isin(text, keys)][:used] for text in documents]
    texts = [text for text in texts if len(text) == used > 1]
    require(texts, f"no document has {T} tokens when its numbers are out; name other shards with --input_val_bin")
    rows, keys = [], np.array(keys)
    right = random.choice(keys, trials)
    for trial, key in enumerate(right):
        text = texts[trial % len(texts)]
        if depth is not None:
            at = 1 + round(depth * (used - 1))  # the end-of-text token stays the first
            text = np.concatenate([text[:at], newline, question, [key], stop, text[at:]])
        rows.append(np.concatenate([text, newline, question]))
    return np.stack(rows).astype(np.int64), right, keys


@torch.no_grad()
def key_ranks(model, rows, right, keys, numerics):
    """The rank of each row's key among all keys by the probability of coming next, 1 the likeliest; ties count against
    it."""
    weight, ranks = model.lm_head.weight, []
    size = max(1, TOKENS_AT_ONCE // rows.shape[1])
    for batch, own in zip(torch.from_numpy(rows).split(size), torch.from_numpy(right).split(size)):
        with numerics.autocast():
            x = model.trunk(batch.to(weight.device))[0][:, -1].to(weight.dtype)
        logits = model.head(x).cpu()
        require(logits.isfinite().all(), "the network gives logits that are no numbers; name an earlier checkpoint")
        ranks += (logits[:, keys] >= logits.gather(1, own[:, None])).sum(1).tolist()
    return ranks


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


class Experiment:
    """All arms of one checkpoint. What is measured stands in the file of results, what is trained in folders."""

    def __init__(self, args, training):
        self.args, self.path = args, find(args.checkpoint)
        self.content = script.load_checkpoint(self.path, script.WEIGHTS, "checkpoint")
        self.trained, network, run = context_of(self.content), self.content["network"], self.content["run"]
        require(network["extension"] == "none", f"{self.path} is extended already; name what it was made of")
        self.train_bin, val_bin = (getattr(args, name) or run.get(name, "") for name in ("input_bin", "input_val_bin"))
        self.encoding = find_encoding(args.tokenizer, self.path, self.train_bin, network["vocab_size"])
        world = script.World(args.device)
        require(world.size == 1, "this is one process's; start it without torchrun")
        self.device = world.device
        self.shards = extending.open_shards(val_bin, "input_val_bin", self.path, network["vocab_size"])
        self.train_shards = args.steps and extending.open_shards(self.train_bin, "input_bin", self.path,
                                                                 network["vocab_size"])
        extending.refuse_own(training, SET_HERE)
        self.training = " ".join([f"--num_iterations {args.steps} --warmup_iters {min(20, args.steps // 5)} {TRAINING} "
                                  f"--total_batch_size {args.total_batch_size} --seed {args.seed}", *training])
        for T in args.lengths:
            require(self.trained < T <= 2**20, f"lengths={T} must be above the {self.trained} tokens that {self.path} "
                    "was trained on, and at most 1048576")
            self.places(self.shards, T + 1, "input_val_bin", val_bin)
            if args.steps:
                self.places(self.train_shards, T, "input_bin", self.train_bin)
            for method in args.methods:
                self.config(method, T)
                if args.steps:
                    extending.check_training(self.flags(method, T), world, network["vocab_size"], self.path,
                                             self.content)
        self.numerics = script.Numerics("bf16" if self.device.type == "cuda" else "fp32", self.device)
        self.common = dict(
            checkpoint=sha256_of(self.path)[:12], trained=self.trained, seed=args.seed, documents=args.documents,
            trials=args.trials, data=script.description(val_bin),
            gpu=extending.device_name(self.device),
        )

    @staticmethod
    def places(shards, tokens, name, pattern):
        found = long_documents(shards, tokens)
        require(found, f"{name}={pattern} has no document of {tokens} tokens; name others, or lower --lengths")
        return found

    def extension(self, method, T):
        """The fields of a network that is to read T tokens."""
        length = dict(trained_length=self.trained) if method != "none" else {}
        return dict(extension=method, **length, **(dict(extension_factor=T / self.trained) if method in SCALED else {}))

    def config(self, method, T):
        return LongConfig(**{**self.content["network"], "precision": "fp32", **self.extension(method, T)})

    def flags(self, method, T):
        """Those of the script that say how an arm is trained."""
        return [*(f"--{field}={value}" for field, value in self.extension(method, T).items()), *self.training.split(),
                "--sequence_length", str(T), "--batch_size", str(max(1, min(TOKENS_AT_ONCE, self.args.total_batch_size)
                                                                     // T)), "--device", self.args.device]

    def measure(self, method, T, steps):
        """Append the records that an arm has not yet; an exit code."""
        arm, there = self.common | dict(method=method, length=T, steps=steps), measuring.read(self.args.results)
        if steps:
            arm |= dict(training=self.training, training_data=script.description(self.train_bin))
        tasks = [("loss", T), *(("needle", tested) for tested in bucket_ends(self.trained, T)[2:])]
        tasks = [dict(kind=kind, tested=tested) for kind, tested in tasks]
        missing = [task for task in tasks if not any((arm | task).items() <= record.items() for record in there)]
        if not missing:
            return 0
        code, path, trained = self.train(method, T, arm) if steps else (0, self.path, {})
        if code:
            return code
        model = LongGPT(self.config(method, T))
        model.load_state_dict(script.load_checkpoint(path, script.WEIGHTS, "checkpoint")["model"])
        model.to(self.device).eval()
        torch.set_float32_matmul_precision("highest")  # training may have lowered it
        for task in missing:
            said, found = (self.loss if task["kind"] == "loss" else self.needle)(model, task["tested"])
            here = dict(network=self.path.parent.name, step=self.content.get("step", 0), torch=str(torch.__version__),
                        script_sha256=measuring.source(__file__, extending.__file__))
            measuring.append(self.args.results, arm | task | found | trained | here)
            print(f"{method} for {T:,} after {steps} steps: {said}", flush=True)
        return 0

    def loss(self, model, T):
        ends, places = bucket_ends(self.trained, T), long_documents(self.shards, T + 1)[: self.args.documents]
        losses = token_losses(model, np.stack([self.shards.read(begin, T + 1) for begin, _ in places]), self.numerics)
        require(np.isfinite(losses).all(), f"the loss of {self.path} is no number; name an earlier checkpoint")
        means = by_bucket(losses, ends)
        found = dict(read=len(places), tokens=losses.size, ends=ends, losses=means.round(6).tolist())
        return f"loss {means.mean(0)[2]:.4f} up to {ends[2]:,} tokens, {means.mean(0)[-1]:.4f} up to {T:,}", found

    def needle(self, model, T):
        places = long_documents(self.shards, T)[: 2 * self.args.trials]
        documents, ranks = [self.shards.read(begin, min(size, 2 * T)) for begin, size in places], {}
        for i, depth in enumerate(DEPTHS):
            random = np.random.default_rng((self.args.seed, T, i))
            rows, right, keys = needle_rows(documents, T, depth, self.args.trials, self.encoding, random)
            ranks[str(depth)] = key_ranks(model, rows, right, keys, self.numerics)
        return f"needles in {T:,} tokens: {share(inserted(ranks))}", dict(candidates=len(keys), ranks=ranks)

    def train(self, method, T, arm):
        """(exit code, weights, figures) of an arm's continued training, which goes on where it was stopped."""
        tokens, own = self.args.total_batch_size, [arm[name] for name in ("checkpoint", "training", "training_data")]
        folder = self.args.output_dir / f"{method}_{T}_{hashlib.sha256(str(own).encode()).hexdigest()[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / "rows.bin"
        if not rows.exists():
            write_rows(self.train_shards, T, self.args.steps * tokens, rows)
        code = extending.train([*self.flags(method, T), "--init_from", str(self.path), "--input_bin", str(rows),
                                "--input_val_bin", "", "--output_dir", str(folder), *measuring.KEPT])
        torch.compiler.reset()  # or the graphs of all arms would count as those of one function
        if code:
            return code, None, None
        path = next(script.checkpoints_of_runs(folder, {}))
        curve = [r for r in measuring.read(path.parent / "metrics.jsonl") if "train_loss" in r]
        return 0, path, dict(rows=script.TokenShards(str(rows)).total // T, train_loss=curve[-1]["train_loss"],
                             tokens_per_second=curve[-1]["tokens_per_second"], peak_mem_MB=curve[-1]["peak_mem_MB"])


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def inserted(ranks):
    return [rank for depth in DEPTHS if depth is not None for rank in ranks[str(depth)]]


def share(ranks):
    """How many are the first, with its interval."""
    hits = sum(rank == 1 for rank in ranks)
    low, high = measuring.wilson(hits, len(ranks))
    return f"{hits / len(ranks):.0%} [{low:.0%}, {high:.0%}]"


def beyond(record):
    """Each document's mean loss beyond the trained length (N,)."""
    sizes = np.diff([0, *record["ends"]]) * (np.array(record["ends"]) > record["trained"])
    return np.array(record["losses"]) @ sizes / sizes.sum()


def against(record, base):
    """By how much a record's loss beyond the trained length is above another's of the same documents, in words."""
    if base is None or base is record:
        return "-"
    low, high = bootstrap(beyond(record) - beyond(base))
    return (f"{(beyond(record) - beyond(base)).mean():+.3f} [{low:+.3f}, {high:+.3f}], "
            + measuring.verdict([(low, high)]))


def rows_of(records):
    """{what begins a row: {tested length: record}}, in order."""
    found = {}
    for r in sorted(records, key=lambda r: (r["steps"], r.get("training", ""), METHODS.index(r["method"]))):
        found.setdefault((r["method"], r["steps"], r.get("training")), {})[r["tested"]] = r
    return found


def loss_table(records, T):
    arms, rows = {arm: its[T] for arm, its in rows_of(records).items()}, []
    for arm, r in arms.items():
        (low, high), means = bootstrap(r["losses"]), np.mean(r["losses"], 0)
        cells = [f"{mean:.3f} ±{half:.3f}" for mean, half in zip(means, (high - low) / 2)]
        speed = f"{r['tokens_per_second']:,.0f}" if arm[1] else "-"
        rows.append([f"`{arm[0]}`", str(arm[1]), *cells, against(r, arms.get(("window", *arm[1:]))), speed])
    ends = records[0]["ends"]
    heads = [f"{begin + 1:,}-{end:,}" for begin, end in zip([0, *ends], ends)]
    return measuring.table(["method", "steps", *heads, f"above {ends[2]:,}, less `window`'s", "tokens/s"], rows)


def needle_table(records, T):
    lengths, rows = sorted({r["tested"] for r in records}), []
    for arm, its in rows_of(records).items():
        cells = [share(inserted(its[tested]["ranks"])) if tested in its else "-" for tested in lengths]
        cells += [share(its[T]["ranks"][str(depth)]) if T in its else "-" for depth in DEPTHS]
        rows.append([f"`{arm[0]}`", str(arm[1]), *cells])
    heads = [f"at {depth}" if depth else "without" for depth in DEPTHS]
    return measuring.table(["method", "steps", *(f"{tested:,}" for tested in lengths), *heads], rows)


def tables(rows):
    """Of one GPU's records, those of each checkpoint, length and settings by themselves."""
    named = ("network", "step", "checkpoint", "trained", "length", "seed", "data", "documents", "trials")
    for key in dict.fromkeys(tuple(r[name] for name in named) for r in rows):
        its = [r for r in rows if tuple(r[name] for name in named) == key]
        yield "{} at step {} ({}), trained at {:,}, extended to {:,}, seed {}; {}".format(*key)
        losses, needles = ([r for r in its if r["kind"] == kind] for kind in ("loss", "needle"))
        for flags in dict.fromkeys(r["training"] for r in its if r["steps"]):
            yield f"Training: `{flags}`"
        if losses:
            yield f"Loss by tokens before the target: {losses[0]['read']} documents, {losses[0]['tokens']:,} targets"
            yield loss_table(losses, key[4])
        if needles:
            count = needles[0]["candidates"]
            yield (f"Keys found, of {count} (by chance {1 / count:.1%}): by length, all depths together, and at "
                   f"{key[4]:,} by depth; {key[-1]} needles at each depth")
            yield needle_table(needles, key[4])


# ----------------------------------------------------------------------------------------------------------------------


def make_parser():
    parser = extending.experiment_parser(__file__, __doc__, Path("logs"), "checkpoint, run or folder of runs [logs]",
                                         "what is trained", COUNTS)
    add = parser.add_argument
    add("--input_bin", help="shards of the continued training [the checkpoint's]")
    add("--input_val_bin", help="shards of what is read [the checkpoint's]")
    add("--tokenizer", help="gpt2, bytes or a tokenizer.json [what the training shards have]")
    add("--lengths", type=int, nargs="+", default=[8192, 32768], help="to extend to [8192 32768]")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=METHODS, help=f"{', '.join(METHODS)} [all]")
    parser.epilog = "Behind -- stand flags of train_gpt2_mod.py, for the continued training."
    return parser


@extending.experiment
def measure(argv):
    """All but `train` and tools."""
    args, words = extending.parse_experiment(make_parser(), argv, COUNTS)
    if args.table:
        return measuring.print_tables(args.results, tables)
    experiment = Experiment(args, words)
    codes = (experiment.measure(method, T, steps) for steps in sorted({0, args.steps}) for T in args.lengths
             for method in args.methods)
    return next((code for code in codes if code), 0)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    register()
    if argv and (argv[0] == "train" or argv[0].endswith(".py")):
        return extending.main(argv[argv[0] == "train" :], __file__, {LongGPT, ScaledRotary})
    return measure(argv)


if __name__ == "__main__":
    sys.exit(main())
