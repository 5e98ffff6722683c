#!/usr/bin/env python3
"""Resize a variant so that it equals a baseline in parameters or FLOPs, for a fair comparison.

    python tools/plan.py --match params d12 -- --model d12_gqa
    python tools/plan.py --match flops gpt2 -- --model sized --n_layer 14

After -- stand the variant's flags, as train_gpt2_mod.py takes them. Its share of key/value heads and its MLP expansion
stay (a typed --ffn_hidden too); the width becomes what comes nearest with heads of a size that is a multiple of 8. Both
networks are counted with one vocabulary: --vocab_size of the flags, else the baseline's.
A program of docs/ that knows further networks runs this for them: docs/24-mamba-2/mamba.py tools/plan.py --match ...
"""
import bisect
import contextlib
import dataclasses
import itertools
import math
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import train_gpt2_mod as script  # noqa: E402
from shards import Parser, exit_code  # noqa: E402

MOST_HEADS = 1024


def build(typed, vocab_size):
    """(GPTConfig, TrainConfig, model on the meta device) of typed flags."""
    config, run, _ = script.resolve(typed, script.ANY_MACHINE._replace(vocab_size=vocab_size))
    with torch.device("meta"):
        return config, run, script.GPT(config)


def resized(typed, config, n_head, head_dim):
    """The flags that give the variant n_head heads of size head_dim, and what else follows the width."""
    flags = dict(n_embd=n_head * head_dim, n_head=n_head)
    if config.gqa_enabled:
        flags["n_kv_head"] = 1 if config.n_kv_head == 1 else n_head * config.n_kv_head // config.n_head
    if "ffn_hidden" in typed or "ffn_hidden" in script.preset(typed.get("model", script.TrainConfig.model))[0]:
        hidden = script.hidden_width(config.mlp_expansion_factor, flags["n_embd"])
        flags["ffn_hidden"] = typed.get("ffn_hidden", hidden)
    return flags


def candidates(typed, config):
    """The flags of every width that can be had, ascending: numbers of heads that keep the share of key/value heads, of
    sizes that are multiples of 8 and within a half and twice the variant's; for one width the size nearest to that."""
    group = config.n_head // config.n_kv_head if config.n_kv_head > 1 else 1
    sizes = [size for size in range(8, 2 * config.head_dim + 1, 8) if 2 * size >= config.head_dim] or [config.head_dim]
    by_width = {}
    for size in sorted(sizes, key=lambda size: -abs(size - config.head_dim)):
        by_width.update({n_head * size: (n_head, size) for n_head in range(group, MOST_HEADS + 1, group)})
    return [resized(typed, config, *by_width[width]) for width in sorted(by_width)]


def match(typed, config, target, size_of):
    """The flags whose network comes nearest to the target. Size grows with width, so the search halves the range; heads
    of another size disturb that a little, which is why some neighbours are looked at too. Widths that the network's
    other parts do not allow are passed over."""
    flags = candidates(typed, config)

    def sized(some):
        for one in some:
            with contextlib.suppress(script.ConfigError):
                yield size_of(one), one

    def size_from(i):
        return next(sized(flags[i:]), (math.inf, None))[0]

    low = bisect.bisect_left(range(len(flags)), target, key=size_from)
    near = [*itertools.islice(sized(flags[low - 1 :: -1] if low else []), 2), *itertools.islice(sized(flags[low:]), 2)]
    script.require(near, "no width that may be had suits the flags; type the variant's --n_embd and --n_head")
    return min(near, key=lambda found: abs(found[0] - target))[1]


def flags_text(flags):
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def plan(how, preset, argv):
    """The lines to print."""
    typed = script.parse_flags(argv)
    known = {**script.base_configs, **script.fast_presets}
    script.require(preset in known, script.unknown_choice("baseline", preset, known))
    shaping = {"gqa_enabled", "kv_head_ratio", "embd_scale"} & typed.keys()
    script.require(not shaping, f"{', '.join(shaping)} would change the width again; type the network's own flags")
    vocab_size = typed.get("vocab_size", script.GPTConfig(**script.preset(preset)[0]).vocab_size)
    config, run, variant = build(typed, vocab_size)
    same = dict(model=preset, sequence_length=run.sequence_length)
    if script.preset(preset)[0].get("position") == "learned":
        same["n_positions"] = max(run.sequence_length, script.GPTConfig.n_positions)
    baseline = build(same, vocab_size)[2]

    def size(model):
        return model.parameter_count() if how == "params" else model.flops_per_token(run.sequence_length)

    def line(name, model):
        return (f"{name}: {model.parameter_count():,} parameters, "
                f"{model.flops_per_token(run.sequence_length) / 1e6:,.1f} MFLOP a token")

    fitting = match(typed, config, size(baseline), lambda flags: size(build({**typed, **flags}, vocab_size)[2]))
    matched = build({**typed, **fitting}, vocab_size)[2]
    once = {f.name for f in dataclasses.fields(script.Shorthand)}
    kept = [[f"--{name}", str(value)] if not isinstance(value, bool) else [f"--{'no_' * (not value)}{name}"]
            for name, value in typed.items() if name not in fitting.keys() | once]
    typed_flags = shlex.join(sum(kept, []))
    return [
        f"at sequence_length={run.sequence_length} and a vocabulary of {vocab_size:,}:",
        line(f"baseline {preset}", baseline), line("variant as typed", variant),
        line(f"variant with n_embd={matched.config.n_embd}, heads of size {matched.config.head_dim}", matched)
        + f", {size(matched) / size(baseline) - 1:+.2%} in {how}",
        f"flags: {typed_flags} {flags_text(fitting)}",
    ]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(prog="plan.py", description=__doc__.split("\n\n")[0],
                    usage="plan.py --match {params,flops} PRESET -- FLAGS of train_gpt2_mod.py")
    parser.add_argument("preset", help="the baseline, a preset")
    parser.add_argument("--match", choices=("params", "flops"), required=True, help="what becomes equal")

    def show():
        args = parser.parse_args(argv[:cut])
        print("\n".join(plan(args.match, args.preset, argv[cut + 1:])))

    return exit_code(show, known=ValueError)


if __name__ == "__main__":
    sys.exit(main())
