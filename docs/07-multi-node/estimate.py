#!/usr/bin/env python3
"""What several GPUs send one another in a step, and when that takes longer than the backward pass hides: the tables on
paper of README.md, from formulas and from what one GPU was measured to do.

    python docs/07-multi-node/estimate.py --table
    python docs/07-multi-node/estimate.py --table --links 64 3.125 --per_host 4

--links puts a machine of yours in the place of the table's: GB/s of a GPU to the next of its host, and of a host to the
next, each in one direction; --reached says what share of that is reached.
"""
import functools
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]
from measuring import Parser, exit_code, read, table  # noqa: E402

T = 1024  # tokens a sequence
BACKWARD = 2 / 3  # of the time of a micro-batch, as of its FLOPs
PROFILED = 131_072  # tokens of a step in docs/01-slowest-parts
REACHED = 0.8  # of a link's speed; assumed
PER_HOST = 8
GPUS = (2, 8, 128)
HOSTS = 16
SPEEDS = {  # GB/s in one direction: from a GPU to the next, from a host to the next
    "NVLink 4, 8 x 400 Gbit/s": (450, 400), "NVLink 4, 100 Gbit/s": (450, 12.5), "PCIe 5 x16, 10 Gbit/s": (64, 1.25),
}
NETWORKS = ("d12", "d12_fast", "d24", "gpt2-xl")
RUN = 524_288  # tokens a step of the reference run
LOSS, KAPLAN = 3.3821, (2e8, 0.21)  # its target; B* in tokens and alpha_B


class Network(NamedTuple):
    """A preset: its parameters, and of them those outside the blocks, Muon's, and those whose gradient comes last (the
    input embedding's); tokens/s of one GPU, and seconds of a step that more GPUs do not share (AdamW's, the norm's)."""

    name: str
    parameters: int
    outside: int
    muons: int
    last: int
    tokens_per_second: float
    unshared: float
    measured: bool


class Links(NamedTuple):
    """Bytes/s that a GPU sends to the next one of its host, and a host to the next, and GPUs a host."""

    inside: float
    between: float
    per_host: int = PER_HOST

    def seconds(self, sent, gpus):
        """Of so many bytes from each GPU to the next, all at once in a ring: between hosts as many come from a host as
        from a GPU, over whatever cards it has."""
        return sent / (self.inside if gpus <= self.per_host else min(self.inside, self.between))


def all_reduced(size, gpus):
    """Bytes that each GPU sends for a sum of tensors of so many bytes, in a ring (Patarasuk and Yuan 2009, J. Parallel
    Distrib. Comput. 69): each part goes round once to be added up, and once as the sum."""
    return 2 * (gpus - 1) / gpus * size


def gathered(size, gpus):
    """The same where all get what each has a share of, and where each gets its share of the sum."""
    return (gpus - 1) / gpus * size


def ddp(network, gpus, width):
    """Bytes a GPU sends in a step, of gradients of so many bytes an element."""
    return all_reduced(width * network.parameters, gpus)


def by_muon(network, gpus, fsdp=False):
    """For its updates in bf16: orthogonalised by shares, with fsdp brought together before as well."""
    return gathered(2 * network.muons, gpus) * (2 if fsdp else 1)


def fsdp(network, gpus, width, micro_batches=1):
    """The blocks' weights come in bf16 for the forward pass and for the backward, of each micro-batch; what is outside
    of them in fp32, once; the sums of the gradients go once a step."""
    weights = 2 * 2 * (network.parameters - network.outside) + 4 * network.outside
    return gathered(micro_batches * weights + width * network.parameters, gpus)


def kept(network, shares=1):
    """Bytes of weights, gradients and what the optimizer keeps: AdamW two numbers a parameter, Muon one."""
    return (16 * network.parameters - 4 * network.muons) / shares


def exposed(network, micro_batch, gpus, width, links):
    """Seconds of a step with ddp in which a GPU waits: the sum begins with the backward pass of the last micro-batch,
    of so many tokens, and what comes last cannot begin before its end."""
    every, last = (links.seconds(all_reduced(width * count, gpus), gpus)
                   for count in (network.parameters, network.last))
    backward = BACKWARD * micro_batch * per_token(network)
    return max(every - backward, last) + links.seconds(by_muon(network, gpus), gpus)


def hidden_from(network, gpus, width, links):
    """Tokens of a micro-batch on each GPU whose backward pass takes as long as the sum."""
    return links.seconds(ddp(network, gpus, width), gpus) / (BACKWARD * per_token(network))


def fsdp_hidden_from(network, gpus, width, links):
    """The same with fsdp, of the last micro-batch: the blocks' weights come beside its forward pass, and once more
    beside its backward, from which the gradients go."""
    weights, sums = (links.seconds(gathered(size, gpus), gpus) for size in (
        2 * (network.parameters - network.outside), width * network.parameters))
    return max(weights / (1 - BACKWARD), (weights + sums) / BACKWARD) / per_token(network)


def per_token(network):
    """Seconds, without what is done once a step."""
    return 1 / network.tokens_per_second - network.unshared / PROFILED


def step_seconds(network, tokens, micro_batch, gpus, width, links):
    """Of a step of so many tokens in all, in micro-batches of at most so many."""
    mine = tokens / gpus
    waiting = exposed(network, min(micro_batch, mine), gpus, width, links) if gpus > 1 else 0
    return mine * per_token(network) + network.unshared + waiting


def efficiency(network, tokens, micro_batch, gpus, width, links):
    """The speed of one GPU over a GPU's of so many, at as many tokens a step."""
    one, all_of_them = (step_seconds(network, tokens, micro_batch, n, width, links) for n in (1, gpus))
    return one / (gpus * all_of_them)


def critical_batch(loss):
    """Tokens at which both steps and tokens to a loss are twice their least (Kaplan et al. 2020, arXiv:2001.08361,
    section 5.1)."""
    return KAPLAN[0] / loss ** (1 / KAPLAN[1])


# ----------------------------------------------------------------------------------------------------------------------
# What one GPU was measured to do


def profile_of(name):
    """{part: seconds of a step} of docs/01-slowest-parts."""
    rows = read(DOCS / "01-slowest-parts" / "results.jsonl")
    parts = next(row["parts"] for row in rows if row["name"] == f"profile_{name}")
    return {part: ms / 1000 for part, ms in parts.items()}


def measured_speeds():
    """{network: (tokens/s of one H100, seconds of a step that are AdamW's and the norm's)}."""
    rows = read(DOCS / "01-slowest-parts" / "results.jsonl")
    d12 = statistics.median(row["tokens_per_second"] for row in rows if row.get("line") == "--model d12 --batch_size 64"
                            and row["name"] == "table")
    fast = [row["tokens_per_second"] for row in read(DOCS / "04-time-to-loss" / "results.jsonl")
            if row["name"] == "d12_fast" and "H100" in row["gpu"] and not row["sharing"]]
    d24 = profile_of("d24")
    return {"d12": (d12, profile_of("d12")["optimizer"]), "d12_fast": (fast[-1], 0.0),
            "d24": (PROFILED / d24["step"], d24["optimizer"])}


@functools.cache
def networks():
    """{name: Network}; what was not measured has the FLOP/s of d24."""
    import torch
    import train_gpt2_mod as script

    speeds, made, flops = measured_speeds(), {}, {}
    for name in NETWORKS:
        fields, recipe = script.preset(name)
        with torch.device("meta"):
            model = script.GPT(script.GPTConfig(**fields))
        count, flops[name] = model.parameter_count(), model.flops_per_token(T)
        blocks = sum(p.numel() for p in model.transformer.h.parameters())
        muons = sum(p.numel() for p in script.parameter_groups(model)["matrices"])
        speed, unshared = speeds[name] if name in speeds else (speeds["d24"][0] * flops["d24"] / flops[name], 0.0)
        made[name] = Network(name, count, count - blocks, muons if recipe.get("optimizer") == "muon" else 0,
                             model.transformer.wte.weight.numel(), speed, unshared, name in speeds)
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def places(args):
    """{how the GPUs are linked: Links}."""
    speeds = {"as given": args.links} if args.links else SPEEDS
    return {name: Links(*(1e9 * args.reached * speed for speed in pair), args.per_host)
            for name, pair in speeds.items()}


def networks_table(every):
    return table(["network", "parameters, M", "outside the blocks", "last to come", "tokens/s of one GPU"], [
        [f"`{n.name}`", *(f"{count / 1e6:.1f}" for count in (n.parameters, n.outside, n.last)),
         f"{n.tokens_per_second:,.0f}" + ("" if n.measured else " (not measured: by d24's FLOP/s)")]
        for n in every.values()])


def bytes_table(every):
    lines = []
    for n in every.values():
        for gpus in GPUS:
            sent = [ddp(n, gpus, 4), ddp(n, gpus, 2), by_muon(n, gpus), fsdp(n, gpus, 4), fsdp(n, gpus, 2)]
            lines.append([f"`{n.name}`", str(gpus), *(f"{size / 1e9:.2f}" if size else "-" for size in sent),
                          f"{kept(n) / 2**30:.1f}", f"{kept(n, gpus) / 2**30:.2f}"])
    heads = ["network", "GPUs", "ddp, fp32", "ddp, bf16", "Muon adds", "fsdp, fp32", "fsdp, bf16", "GiB kept, ddp",
             "GiB kept, fsdp"]
    return table(heads, lines)


def hiding_table(every, linked):
    """In fp32, inside a host of each kind and on 16 hosts of each."""
    cases = {(name.split(",")[0], links.inside, gpus): links for name, links in linked.items()
             for gpus in sorted({2, links.per_host})}
    cases |= {(name, links.between, HOSTS * links.per_host): links for name, links in linked.items()}
    lines = []
    for (name, _, gpus), links in cases.items():
        cells = []
        for n in every.values():
            whole, last = (1e3 * links.seconds(all_reduced(4 * count, gpus), gpus) for count in (n.parameters, n.last))
            cells.append(f"{whole:,.1f} / {last:,.1f} / {hidden_from(n, gpus, 4, links):,.0f}")
        lines.append([name, str(gpus), *cells, f"{fsdp_hidden_from(n, gpus, 4, links):,.0f}"])
    return table(["links", "GPUs", *(f"`{name}`" for name in every), f"`{n.name}`, fsdp"], lines)


def run_table(every, linked):
    """The reference run, its tokens a step on more and more GPUs; milliseconds are those of the first column."""
    n, counts = every["d12"], [2**i for i in range(8)]
    columns = [(links, width) for links in linked.values() for width in (4, 2)]
    lines = [[str(gpus), f"{RUN // gpus:,}", f"{1e3 * step_seconds(n, RUN, 65536, gpus, 4, columns[0][0]):,.1f}",
              *(f"{100 * efficiency(n, RUN, 65536, gpus, width, links):.0f}%" for links, width in columns)]
             for gpus in counts]
    heads = ["GPUs", "tokens a GPU", "step, ms",
             *(f"{name}: {dtype}" for name in linked for dtype in ("fp32", "bf16"))]
    return table(heads, lines)


def batch_table(every, linked):
    """65,536 tokens a GPU, more GPUs: speed in tokens, and in time to a loss."""
    n, critical, links = every["d12"], critical_batch(LOSS), next(iter(linked.values()))
    lines = []
    for gpus in (2**i for i in range(8)):
        batch = 65536 * gpus
        one, all_of_them = (step_seconds(n, 65536 * g, 65536, g, 4, links) for g in (1, gpus))
        times = gpus * one / all_of_them
        needed = (1 + batch / critical) / (1 + 65536 / critical)
        lines.append([str(gpus), f"{batch:,}", f"{1 + critical / batch:.2f}", f"{1 + batch / critical:.2f}",
                      f"{times:.1f}", f"{times / needed:.1f}"])
    heads = ["GPUs", "tokens a step", "steps / least", "tokens / least", "tokens/s, x", "time to the loss, x less"]
    return table(heads, lines)


def tables(args):
    every, linked = networks(), places(args)
    return [networks_table(every), bytes_table(every), hiding_table(every, linked), run_table(every, linked),
            f"Critical batch at a loss of {LOSS}: {critical_batch(LOSS):,.0f} tokens.", batch_table(every, linked)]


def positive(text):
    """A number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def make_parser():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", required=True, help="print the tables")
    parser.add_argument("--links", type=positive, nargs=2, metavar="GB/s", help="of a GPU in its host, and of a host")
    parser.add_argument("--per_host", type=int, default=PER_HOST, choices=range(2, 73), metavar="N",
                        help=f"GPUs a host [{PER_HOST}]")
    parser.add_argument("--reached", type=positive, default=REACHED, help=f"share of a link's speed [{REACHED}]")
    return parser


def main(argv=None):
    return exit_code(lambda: print("\n\n".join(tables(make_parser().parse_args(argv)))))


if __name__ == "__main__":
    sys.exit(main())
