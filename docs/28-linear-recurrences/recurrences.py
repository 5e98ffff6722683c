#!/usr/bin/env python3
"""Train with a recurrence or a long convolution in place of attention: --mixer retnet, delta, rwkv7 or hyena, or a
preset, d12_delta for one. All other flags, and the other presets, such as d12, are those of train_gpt2_mod.py;
docs/extending.py says how its tools are run.

    python docs/28-linear-recurrences/recurrences.py --model d12_delta --batch_size 32
    python docs/28-linear-recurrences/recurrences.py tools/sample.py logs --prompt 'Once upon a time'
"""
import contextlib
import dataclasses
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

IS_PROGRAM = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import extending  # noqa: E402
from extending import script  # noqa: E402

option, require, PlainConfig, Linear = script.option, script.require, script.GPTConfig, script.Linear
CHUNK_MULTIPLE = 16
MOST_DECAY = math.exp(-0.5)  # of RWKV-7 at one token, -log
GAMMAS = 32.0, 512.0  # of RetNet: 1 / (1 - gamma) of the first head and of the last
STEPS, DECAYS = (1e-3, 1e-1), (1.0, 16.0)  # of gated DeltaNet: where dt and -A begin
DELTA_NORM_EPS, RETNET_NORM_EPS, RWKV_NORM_EPS = 1e-6, 1e-5, 64e-5
FILTER_BANDS, FILTER_LAYERS, FILTER_FREQUENCY = 16, 2, 14.0  # of Hyena's filters
FILTER_LEFT, FILTER_REACHES = 1e-2, (0.3, 1.5)  # what the windows leave at these shares of hyena_length
CHUNKED = {"recurrence_chunk", "recurrence_kernel", "attention_every"}
WIDTHS = {"key_expand", "value_expand"}
USED = dict(retnet=CHUNKED | WIDTHS, delta=CHUNKED | WIDTHS | {"short_conv"}, rwkv7=CHUNKED | {"low_rank"},
            hyena={"short_conv", "filter_width", "hyena_length", "attention_every"})


@dataclass(frozen=True)
class RecurrentConfig(PlainConfig):
    """The network, of which the mixers may be recurrences or long convolutions. Recurrences have n_head heads."""

    key_expand: float = option(1.0, "keys of all heads as a multiple of n_embd", parse=script.number)
    value_expand: float = option(1.0, "values of all heads as a multiple of n_embd", parse=script.number)
    short_conv: int = option(4, "tokens that the convolution before delta and hyena sees", most=2**10)
    low_rank: int = option(64, "width of rwkv7's small maps; that of its gate has twice that", most=2**16)
    filter_width: int = option(64, "width of the network that makes hyena's filters", most=2**16)
    hyena_length: int = option(1024, "tokens over which hyena's filters fade", most=2**24)
    recurrence_chunk: int = option(64, "tokens that the chunked form takes at once", rebuilds=False)
    recurrence_kernel: str = option("auto", "what computes a recurrence; auto: fla where it can and torch else",
                                    choices=("auto", "torch", "fla"), rebuilds=False)
    attention_every: int = option(0, "each so many blocks one has attention; 0: none has", most=1000)

    def __post_init__(self):
        super().__post_init__()
        used = USED.get(self.mixer, set())
        for f in OWN:
            value, remedy = getattr(self, f.name), " or ".join(name for name in USED if f.name in USED[name])
            require(f.name in used or value == f.default, f"{f.name}={value} would be ignored; add --mixer {remedy}")
        for name in ("short_conv", "low_rank", "filter_width", "hyena_length"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        chunk, most = self.recurrence_chunk, 128 if self.mixer == "rwkv7" else 1024
        require(chunk in range(CHUNK_MULTIPLE, most + 1, CHUNK_MULTIPLE), f"recurrence_chunk={chunk} must be a "
                f"multiple of {CHUNK_MULTIPLE}, up to {most}; 64 is usual")
        for name in ("key_expand", "value_expand"):
            width = getattr(self, name) * self.n_embd
            require(width >= 1 and width % self.n_head == 0, f"{name} x n_embd = {width:g} must be a multiple of "
                    f"n_head={self.n_head}")
        require(self.mixer != "retnet" or self.key_expand == 1 or not self.attention_every, f"key_expand="
                f"{self.key_expand:g} with attention_every={self.attention_every}: both rotate, heads of two sizes; "
                "drop one of the two")
        require(self.mixer != "retnet" or self.rotary_dim % 2 == 0, f"key_expand x n_embd / n_head = "
                f"{self.rotary_dim} must be even, to be rotated")
        require(not (used and self.document_mask), f"document_mask with mixer={self.mixer}: a state goes on from "
                "document to document; drop one of the two")
        for name in ("window", "softmax_scale", "attention_gate", "qk_norm") if used and not self.attends else ():
            require(not getattr(self, name), f"{name}={getattr(self, name)} would be ignored: no block has attention; "
                    "drop it, or add --attention_every 4")
        require(not used or self.attends or self.n_kv_head == self.n_head, f"n_kv_head={self.n_kv_head} would be "
                "ignored: no block has attention; drop it, or add --attention_every 4")

    @property
    def attends(self):
        """The number of blocks with attention."""
        every = self.attention_every if self.mixer in USED else 1
        return self.n_layer // every if every else 0

    @property
    def rotary_dim(self):
        return int(self.key_expand * self.n_embd) // self.n_head if self.mixer == "retnet" else super().rotary_dim

    def plain(self):
        """The configuration without what is added here, its mixer attention."""
        fields = {name: getattr(self, name) for name in PLAIN}
        return PlainConfig(**{**fields, **(dict(mixer="attention") if self.mixer in USED else {})})


PLAIN = {f.name for f in dataclasses.fields(PlainConfig)}
OWN = [f for f in dataclasses.fields(RecurrentConfig) if f.name not in PLAIN]


# ----------------------------------------------------------------------------------------------------------------------
# The recurrence. Shapes: B batch, T time, H heads, K numbers of a key, V of a value, c chunks of l tokens


def as_general(k, log_decay, beta, read, write):
    """k, read and write of the recurrence; with beta (B, T, H, 1) those of the delta rule on keys k."""
    return (k, read, write) if beta is None else (beta * k, log_decay.exp() * k, None)


def states_before(move, add, first):
    """The states S before each of c chunks, (B, H, c, K, V), and the last: S = move S + add of one after another, move
    (B, H, c, K, K), or (B, H, c, K or 1, 1) for a diagonal. Chunks are put together in pairs, those again, so that the
    depth is 2 log2(c) and the work that of 2 c."""
    times = torch.mul if move.size(-1) == 1 else torch.matmul

    def before(move, add):
        c = add.size(2)
        if c == 1:
            return first
        move, add = (F.pad(z, (0, 0, 0, 0, 0, c % 2)) for z in (move, add))
        move_1, move_2, add_1, add_2 = move[:, :, 0::2], move[:, :, 1::2], add[:, :, 0::2], add[:, :, 1::2]
        even = before(times(move_2, move_1), times(move_2, add_1) + add_2)
        return torch.stack([even, times(move_1, even) + add_1], 3).flatten(2, 3)[:, :, :c]

    states = before(move, add)
    return states, (times(move[:, :, -1:], states[:, :, -1:]) + add[:, :, -1:])[:, :, 0]


def chunked(q, k, v, log_decay, chunk, beta=None, read=None, write=None, state=None):
    """The linear recurrence S_t = (diag(exp(log_decay_t)) + write_t read_t') S_(t-1) + k_t v_t', y_t = S_t' q_t, of q,
    k, read, write (B, T, H, K), v (B, T, H, V), from a state (B, H, K, V), None for 0: y like v, and the last state.
    log_decay, none above 0, is (B or 1, T, H, K), or (B or 1, T, H, 1) for one number a head. No read is no such term.
    beta (B, T, H, 1) is the gated delta rule, which is this with beta k for k, exp(log_decay) k for read, -beta k for
    write. All is computed in the type of the inputs, which are to be fp32 or wider.

    Within a chunk all u_t = S_(t-1)' read_t solve one unit triangular system (the WY or UT form: Yang et al. 2024,
    arXiv:2406.06484, section 3; with decays arXiv:2412.06464, section 3.3). The rest of the last chunk is filled with
    tokens that change nothing.

    Of one decay a head, exp takes sums that are at most 0. With one a channel, it takes their distance from the middle
    of the chunk's sum, in both directions: with decays of at most d a token no factor is above exp(d chunk / 2), and no
    product of two above exp(d chunk). RWKV-7's d is exp(-1/2): with chunks of 64 that is exp(39), with 128 exp(78),
    and fp32 ends at exp(88).
    """
    B, T, H, V = v.shape
    chunk = min(chunk, T + -T % CHUNK_MULTIPLE)
    k, read, write = as_general(k, log_decay, beta, read, write)
    q, k, v, log_decay, read, write = (
        z if z is None else F.pad(z, (0, 0, 0, 0, 0, -T % chunk)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for z in (q, k, v, log_decay, read, write))  # (B, H, c, l, K)
    total = log_decay.cumsum(-2)
    before, end = total - log_decay, total[..., -1:, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)

    def pairs(x, x_total, y, hidden):
        """x_i . y_j times what is left at i of what came at j, (B, H, c, l, l), 0 where hidden."""
        if total.size(-1) == 1:
            return (x @ y.mT) * (x_total - total.mT).masked_fill(hidden, -torch.inf).exp()
        middle = end.detach() / 2
        products = (x * (x_total - middle).exp()) @ (y * (middle - total).exp()).mT
        return products.masked_fill(hidden, 0)

    scores, left = pairs(q, total, k, later), (end - total).exp()
    y, add = scores @ v, (k * left).mT @ v
    taken, move = q * total.exp(), end.exp().mT  # what reads the state before the chunk, and what becomes of that
    if read is not None:
        itself = later.logical_not().triu()  # a token reads what was there before it
        from_k = pairs(read, before, k, later | itself)
        by_write = (-scores, -from_k, -k * left) if write is None else (
            pairs(q, total, write, later), pairs(read, before, write, later | itself), write * left)
        sides = torch.cat([from_k @ v, read * before.exp()], -1)
        found = torch.linalg.solve_triangular(-by_write[1], sides, upper=False, unitriangular=True)
        u, of_state = found.split([V, found.size(-1) - V], -1)  # u_t = u + of_state S
        y, taken = y + by_write[0] @ u, taken + by_write[0] @ of_state
        add, move = add + by_write[2].mT @ u, torch.diag_embed(move[..., 0].expand(taken[..., 0, :].shape))
        move = move + by_write[2].mT @ of_state
    first = add.new_zeros(add[:, :, :1].shape) if state is None else state[:, :, None]
    states, last = states_before(move, add, first)
    y = (y + taken @ states).permute(0, 2, 3, 1, 4)
    return y.flatten(1, 2)[:, :T], last


def stepped(q, k, v, log_decay, state, beta=None, read=None, write=None):
    """The same recurrence of one token, T = 1."""
    k, read, write = as_general(k, log_decay, beta, read, write)
    write = -k if write is None else write
    new = state * log_decay[:, 0, :, :, None].exp() + k[:, 0, :, :, None] * v[:, 0, :, None]
    if read is not None:
        new = new + write[:, 0, :, :, None] * (read[:, 0, :, :, None] * state).sum(-2, keepdim=True)
    return (q[:, 0, :, :, None] * new).sum(-2)[:, None], new


@torch.compiler.disable
def fused(dtype, q, k, v, log_decay, beta=None, read=None, write=None):
    """y of the same recurrence from 0, by the kernels of flash-linear-attention; products in dtype."""
    import fla.ops

    log_decay = log_decay.expand(len(q), -1, -1, -1).contiguous()
    q, k, v, read, write = (z if z is None else z.to(dtype).contiguous() for z in (q, k, v, read, write))
    if read is not None:
        return fla.ops.chunk_rwkv7(q, log_decay, k, v, read, write, scale=1.0)[0]
    if beta is not None:
        return fla.ops.chunk_gated_delta_rule(q, k, v, log_decay[..., 0], beta[..., 0].contiguous(), scale=1.0)[0]
    return fla.ops.chunk_simple_gla(q, k, v, log_decay[..., 0], scale=1.0)[0]  # what chunk_retention is made of


# ----------------------------------------------------------------------------------------------------------------------
# Mixers


class State(NamedTuple):
    """What a mixer leaves of the tokens that it has read."""

    inputs: Any  # (B, n, channels), the last that its short convolution or its token shift took
    state: Any  # (B, H, K, V); of a Hyena what its filters take, (B, tokens, C)


class ShortConv(nn.Module):
    """A causal convolution of each channel over the last `width` tokens, (B, T, channels) -> the same, behind the
    width - 1 inputs before. Begun as torch's; its weight is a vector, for the scalars' rate, without decay."""

    def __init__(self, channels, width):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels * width).uniform_(-1, 1) / width**0.5)

    def forward(self, x, before):
        T, x, weight = x.size(1), torch.cat([before, x], 1), self.weight.view(-1, self.width)
        return sum(x[:, i : i + T] * weight[:, i] for i in range(self.width))


class Mixer(nn.Module):
    """(B, T, C) -> (B, T, C). A kind has mixed(), which makes of x behind a State what c_proj takes, and the State."""

    kept_inputs = 0  # tokens of State.inputs

    def scan(self, x, ctx, state=None):
        """x behind the tokens that left a State (None: there were none): (B, T, C) and the State after."""
        y, state = self.mixed(x, ctx, state)
        return self.c_proj(y.to(script.product_dtype(x))), state

    def forward(self, x, ctx):
        return self.scan(x, ctx)[0]

    def behind(self, inputs, state):
        """The inputs that were kept, (B, kept_inputs, channels), and those to keep."""
        before = state.inputs if state else inputs.new_zeros(len(inputs), self.kept_inputs, inputs.size(-1))
        return before, torch.cat([before, inputs], 1)[:, inputs.size(1) :]


def exactly(x):
    """A context without autocast, for what is computed in the type of its inputs."""
    return torch.autocast(x.device.type, enabled=False)


class Recurrent(Mixer):
    """A mixer that is the recurrence on n_head heads."""

    by_fla = False  # whether fused() computes what begins at 0: start_run() tries
    terms = 1  # of the recurrence: 1 k v'; 2 the delta rule; 4 a rank-one term of its own

    def __init__(self, config, key_width, value_width):
        super().__init__()
        self.H, self.K, self.V = config.n_head, key_width // config.n_head, value_width // config.n_head
        self.chunk, self.keys, self.values = config.recurrence_chunk, key_width, value_width
        self.c_proj = Linear(config, value_width, config.n_embd)

    def heads(self, z):
        """(B, T, H D) -> (B, T, H, D), in fp32 or wider."""
        return z.to(torch.promote_types(z.dtype, torch.float32)).unflatten(-1, (self.H, -1))

    def recurrence(self, dtype, q, k, v, log_decay, state, **others):
        if state and q.size(1) == 1:
            return stepped(q, k, v, log_decay, state.state, **others)
        if self.by_fla and not state:
            return fused(dtype, q, k, v, log_decay, **others).type_as(v), None
        return chunked(q, k, v, log_decay, self.chunk, state=state.state if state else None, **others)

    def flops(self, T):
        """FLOPs of a token, forward and backward, of the chunked form over whole chunks."""
        length, K, V = min(T, self.chunk), self.K, self.V
        products = length * (K + V) + 2 * K * V  # scores and what they take; the chunk's state, and what reads it
        if self.terms > 1:
            products += length * ((self.terms - 1) * K + V + 3 * (K + V) / 2) + K * (K + V)
            products += K * (K * K + 3 * K * V) / length  # states from chunk to chunk
        return round(6 * self.H * products)

    def kept(self, half):
        """Bytes of a token for the backward pass, as torch.compile chooses: projections, and in fp32 what the chunked
        form makes of them, scores and states."""
        length, K, V = self.chunk, self.K, self.V
        wide = length + 4 * K + 3 * V + K * V // length
        if self.terms > 1:
            wide += 2 * self.terms * length + self.terms * K + 3 * (K + V) + 3 * K * (K + V) // length
        return half * (2 * self.keys + 3 * self.values) + 4 * self.H * wide


class RetNet(Recurrent):
    """Multi-scale retention (Sun et al. 2023, arXiv:2307.08621, section 2): decays are fixed, one a head, queries and
    keys rotated; each head's output is normalised and all are gated."""

    def __init__(self, config, layer):
        keys, values = int(config.key_expand * config.n_embd), int(config.value_expand * config.n_embd)
        super().__init__(config, keys, values)
        parts = [keys, keys, values, values]
        self.c_in = Linear(config, config.n_embd, sum(parts), parts)
        self.parts = parts
        log_decay = torch.log1p(-torch.linspace(*(-math.log(g) for g in GAMMAS), self.H).exp())  # section 3.1's
        self.register_buffer("log_decay", log_decay, persistent=False)

    def mixed(self, x, ctx, state):
        q, k, v, gate = self.c_in(x).split(self.parts, -1)
        with exactly(x):
            q, k, v = (self.heads(z) for z in (q, k, v))
            q, k = (script.rotate(z, ctx.cos, ctx.sin) for z in (q * self.K**-0.5, k))
            log_decay = self.log_decay.to(v.dtype).view(1, 1, -1, 1).expand(1, x.size(1), -1, 1)
            y, last = self.recurrence(script.product_dtype(gate), q, k, v, log_decay, state)
            y = F.layer_norm(y, (self.V,), eps=RETNET_NORM_EPS).flatten(2)
            return F.silu(gate) * y, State(None, last)


class DeltaNet(Recurrent):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464, section 3): queries, keys and values go through a short
    convolution; each token makes its heads' decay and how far the value found at its key gives way to its own."""

    terms = 2

    def __init__(self, config, layer):
        keys, values = int(config.key_expand * config.n_embd), int(config.value_expand * config.n_embd)
        super().__init__(config, keys, values)
        self.parts = [2 * keys + values, values, self.H, self.H]
        parts = [keys, keys, values, values, self.H, self.H]
        self.c_in = Linear(config, config.n_embd, sum(parts), parts)
        self.conv = ShortConv(2 * keys + values, config.short_conv)
        self.kept_inputs = config.short_conv - 1
        dt = torch.empty(self.H).uniform_(*map(math.log, STEPS)).exp()
        self.dt_shift = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # of which softplus makes dt
        self.log_a = nn.Parameter(torch.empty(self.H).uniform_(*DECAYS).log())
        self.norm_weight = nn.Parameter(torch.ones(self.V))

    def mixed(self, x, ctx, state):
        inputs, gate, beta, dt = self.c_in(x).split(self.parts, -1)
        before, kept = self.behind(inputs, state)
        with exactly(x):
            read = F.silu(self.conv(inputs, before))
            q, k, v = (self.heads(z) for z in read.split([self.keys, self.keys, self.values], -1))
            q, k = (F.rms_norm(z, (self.K,), eps=DELTA_NORM_EPS / self.K) * self.K**-0.5 for z in (q, k))  # of length 1
            beta, dt = self.heads(beta).sigmoid(), self.heads(dt)
            log_decay = -F.softplus(dt + self.dt_shift[:, None]) * self.log_a.exp()[:, None]
            y, last = self.recurrence(script.product_dtype(gate), q * self.K**-0.5, k, v, log_decay, state, beta=beta)
            y = F.rms_norm(y, (self.V,), eps=DELTA_NORM_EPS) * self.norm_weight
            return F.silu(gate) * y.flatten(2), State(kept, last)


class RWKV7(Recurrent):
    """The time mixing of RWKV-7 (Peng et al. 2025, arXiv:2503.14456, section 4): what the projections take is x moved
    towards the token before; decays, one a channel, the rate a at which what was at a key is removed, and the gate come
    from maps of low rank. The share of the first block's values in those of all others is left out: a mixer sees its
    own block alone."""

    terms = 4

    def __init__(self, config, layer):
        C, rank = config.n_embd, config.low_rank
        super().__init__(config, C, C)
        self.kept_inputs = 1
        self.c_r, self.c_k, self.c_v = (Linear(config, C, C) for _ in range(3))
        self.w_down, self.a_down, self.g_down = (Linear(config, C, width) for width in (rank, rank, 2 * rank))
        self.w_up, self.a_up, self.g_up = (Linear(config, width, C) for width in (rank, rank, 2 * rank))
        along, depth = torch.arange(C) / max(1, C - 1), layer / max(1, config.n_layer - 1)
        for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
            share = 1 - (torch.arange(C) / C) ** (power * max(0.0, 1 - layer / config.n_layer))
            setattr(self, f"shift_{name}", nn.Parameter(share))
        self.w_shift = nn.Parameter(6 * along ** (1 + depth**0.3) - 5.5)
        self.a_shift = nn.Parameter(torch.zeros(C))
        self.k_remove, self.k_rate = nn.Parameter(torch.full((C,), 0.85)), nn.Parameter(torch.ones(C))
        self.bonus = nn.Parameter(torch.zeros(C))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def mixed(self, x, ctx, state):
        before, kept = self.behind(x, state)
        moved = torch.cat([before, x[:, :-1]], 1) - x
        of = {name: (x + moved * getattr(self, f"shift_{name}")).type_as(x) for name in "rwkvag"}
        r, k, v = self.c_r(of["r"]), self.c_k(of["k"]), self.c_v(of["v"])
        w, a = self.w_up(self.w_down(of["w"]).tanh()), self.a_up(self.a_down(of["a"]))
        gate = self.g_up(self.g_down(of["g"]).sigmoid())
        with exactly(x):
            q, v = self.heads(r), self.heads(v)
            log_decay = -MOST_DECAY * self.heads(w + self.w_shift).sigmoid()
            rate = (a + self.a_shift).sigmoid()
            removed = F.normalize(self.heads(k * self.k_remove), dim=-1)
            k, rate = self.heads(k * (1 + (rate - 1) * self.k_rate)), self.heads(rate)
            y, last = self.recurrence(script.product_dtype(gate), q, k, v, log_decay, state, read=-removed,
                                      write=removed * rate)
            y = F.layer_norm(y, (self.V,), eps=RWKV_NORM_EPS).flatten(2) * self.norm_weight + self.norm_bias
            bonus = (q * k * self.bonus.view(self.H, -1)).sum(-1, keepdim=True) * v
            return gate * (y + bonus.flatten(2)), State(kept, last)


def convolved(u, h):
    """y_t = the sum over s <= t of h_(t-s) u_s, of u (B, T, C) and h (T, C): y like u. By FFTs of 2 T."""
    T = u.size(1)
    return torch.fft.irfft(torch.fft.rfft(u, 2 * T, 1) * torch.fft.rfft(h, 2 * T, 0), 2 * T, 1)[:, :T]


class Hyena(Mixer):
    """The Hyena operator of order 2 (Poli et al. 2023, arXiv:2302.10866, section 3), as its authors train it: x1, x2, v
    through a short convolution, then x2 (h * (x1 v)) with one filter h a channel, as long as the text. A small network
    with sines makes h of the position (section 3.3), and a window lets it fade, in each channel at another rate."""

    def __init__(self, config, layer):
        super().__init__()
        C, width = config.n_embd, config.filter_width
        self.length, self.kept_inputs = config.hyena_length, config.short_conv - 1
        self.c_in = Linear(config, C, 3 * C, 3 * [C])
        self.conv = ShortConv(3 * C, config.short_conv)
        widths = [1 + 2 * FILTER_BANDS, *[width] * (1 + FILTER_LAYERS)]
        self.filter = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))
        self.frequencies = nn.Parameter(torch.full((width,), FILTER_FREQUENCY))
        self.filter_out = nn.Linear(width, C, bias=False)
        self.skip = nn.Parameter(torch.randn(C))
        self.c_proj = Linear(config, C, C)
        self.register_buffer("fading", torch.linspace(*(math.log(FILTER_LEFT) / r for r in FILTER_REACHES[::-1]), C),
                             persistent=False)

    def filters(self, T):
        """h (T, C)."""
        t = torch.arange(T, device=self.skip.device, dtype=self.skip.dtype)[:, None] / self.length
        angles = 2 * math.pi * t * torch.linspace(1e-4, FILTER_BANDS - 1, FILTER_BANDS, device=t.device, dtype=t.dtype)
        z = torch.cat([t, angles.cos(), -angles.sin()], 1)
        for layer in self.filter:
            z = (self.frequencies * layer(z)).sin()
        return self.filter_out(z) * (t * self.fading).exp()

    def mixed(self, x, ctx, state):
        inputs = self.c_in(x)
        before, kept = self.behind(inputs, state)
        T, wide = x.size(1), torch.promote_types(x.dtype, torch.float32)
        with exactly(x):
            x1, x2, v = self.conv(inputs.to(wide), before.to(wide)).chunk(3, -1)
            own = x1 * v
            u = torch.cat([state.state, own], 1) if state else own
            h = self.filters(u.size(1)).to(wide)
            y = (u * h.flip(0)).sum(1, keepdim=True) if state and T == 1 else convolved(u, h)[:, -T:]
            return x2 * (y + self.skip * own), State(kept, u)

    def flops(self, T):
        """FLOPs of a token, forward and backward, of the FFTs there and back, each 5/2 n log2 n of n = 2 T."""
        return round(30 * self.skip.numel() * math.log2(2 * T))

    def kept(self, half):
        """Bytes of a token for the backward pass: the projection, the convolution's, and the FFT's of 2 T."""
        return self.skip.numel() * (4 * half + 4 * 9)


KINDS = dict(retnet=RetNet, delta=DeltaNet, rwkv7=RWKV7, hyena=Hyena)


def make_mixer(config, layer):
    """A mixer of KINDS, and in each attention_every-th block attention."""
    every = config.attention_every
    return (script.CausalSelfAttention if every and (layer + 1) % every == 0 else KINDS[config.mixer])(config, layer)


# ----------------------------------------------------------------------------------------------------------------------
# What the script and its tools have to know


def why_not_fla(mixer, device, dtype):
    """None where flash-linear-attention's kernel can compute a mixer's recurrence, else the reason in a line. It is
    tried on random inputs of the mixer's sizes, and must give what chunked() gives, in values and gradients."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} on {device.type}"
    try:
        import fla.ops  # noqa: F401
        return None if fla_is_right(mixer, device, dtype) else "flash-linear-attention gives other values here"
    except Exception as e:  # what is wrong, or missing, shows only now
        return script.first_line(e)


def fla_is_right(mixer, device, dtype, T=200):
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, read = (torch.randn(2, T, mixer.H, size, generator=generator, device=device)
                     for size in (mixer.K, mixer.K, mixer.V, mixer.K))
    k, read = (F.normalize(z, dim=-1).to(dtype).float() for z in (k, read))
    rates = torch.rand(2, T, mixer.H, mixer.K, generator=generator, device=device)
    inputs = dict(q=q.to(dtype).float(), k=k, v=v.to(dtype).float(),
                  log_decay=-MOST_DECAY * (rates if mixer.terms == 4 else rates[..., :1]))
    more = {1: {}, 2: dict(beta=rates[..., -1:]), 4: dict(read=-read, write=(read * rates).to(dtype).float())}
    inputs = {name: z.requires_grad_() for name, z in {**inputs, **more[mixer.terms]}.items()}
    both = []
    for y in (fused(dtype, **inputs).float(), chunked(**inputs, chunk=mixer.chunk)[0]):
        both.append((y, *torch.autograd.grad((y * v).sum(), list(inputs.values()))))
    return all(bool((a - b).norm() <= 0.02 * b.norm()) for a, b in zip(*both))


def choosing_kernels(start_run):
    """The script's start_run(), which also says what computes the recurrences."""
    def with_recurrences(typed, world, origin):
        found = start_run(typed, world, origin)
        state, config, run, notes = found[0], found[1], found[2], found[-1]
        mixer = next((module for module in state.model.modules() if isinstance(module, Recurrent)), None)
        if mixer:
            wanted, reason = config.recurrence_kernel, "--recurrence_kernel torch"
            if wanted == "auto" and run.deterministic:
                reason = "--deterministic"
            elif wanted != "torch":
                reason = why_not_fla(mixer, world.device, state.numerics.dtype)
            require(wanted != "fla" or not reason, f"recurrence_kernel=fla is not possible here ({reason}); drop it")
            Recurrent.by_fla = reason is None
            notes.append("recurrences: " + (f"torch, in chunks of {mixer.chunk} ({reason})" if reason else
                                            "flash-linear-attention"))
        return found

    return with_recurrences


def with_states(Cache):
    return extending.with_states(Cache, Mixer, lambda mixer, x, ctx, state: mixer.scan(x, ctx, state))


def kept_with_recurrences(kept_by_block):
    """The script's kept_by_block(), for the mean of a network's blocks."""
    def kept(config):
        plain = kept_by_block(config.plain())
        if config.mixer not in USED:
            return plain
        half, H, heads = 4 if config.precision == "fp32" else 2, config.n_head, config.n_head + config.n_kv_head
        rotated = heads * config.head_dim * (config.position == "rope" or config.qk_norm)
        attention = half * ((heads + config.n_kv_head) * config.head_dim + rotated + H * config.head_dim) + 4 * H
        with torch.device("meta"):
            own = KINDS[config.mixer](config, 0).kept(half)
        return plain + round((own - attention) * (1 - config.attends / config.n_layer))

    return kept


@contextlib.contextmanager
def exact_backward(context):
    """extending.exact_backward(), without a warning that torch.compile leaves the FFTs as they are."""
    with extending.exact_backward(context), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
        yield


DELTA = dict(n_head=6, mixer="delta", key_expand=0.75, value_expand=1.5, mlp_expansion_factor=3.0)
PRESETS = {  # each with about d12's parameters
    "d12_retnet": dict(n_head=3, mixer="retnet", value_expand=2.0, recurrence_chunk=256, mlp_expansion_factor=2.0),
    "d12_rwkv7": dict(mixer="rwkv7", mlp_expansion_factor=11 / 3),
    "d12_hyena": dict(mixer="hyena", short_conv=3),
    "d12_delta": DELTA,
    "d12_delta_hybrid": dict(**DELTA, attention_every=4),
}


def register():
    """Make the script know all this."""
    script.mixers.update({name: make_mixer for name in KINDS})
    script.base_configs.update(PRESETS)
    extending.exchange(GPTConfig=RecurrentConfig, kept_by_block=kept_with_recurrences(script.kept_by_block),
                       attention_kernel=extending.training_in(
                           exact_backward, extending.without_attention(script.attention_kernel),
                           lambda config: config.mixer in USED),
                       start_run=choosing_kernels(script.start_run))
    extending.show_source(__file__)
    extending.head_help(__file__, __doc__)


def __getattr__(name):
    """What tools/bench.py wants of a script."""
    return getattr(script, name)


def main(argv=None):
    register()
    return extending.main(argv, __file__, {*KINDS.values(), ShortConv}, with_states)


if __name__ == extending.MODULE:
    register()
if __name__ == "__main__":
    sys.exit(main())
