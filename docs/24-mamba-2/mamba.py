#!/usr/bin/env python3
"""Train with selective state spaces in place of attention: --mixer mamba2, or a preset, d24_mamba2 for one. All other
flags, and the other presets, such as d12, are those of train_gpt2_mod.py; docs/extending.py says how its tools are run.

    python docs/24-mamba-2/mamba.py --model d24_mamba2 --attention_every 8 --batch_size 32
    python docs/24-mamba-2/mamba.py tools/sample.py logs --prompt 'Once upon a time'
"""
import dataclasses
import math
import sys
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

option, require, PlainConfig = script.option, script.require, script.GPTConfig
SSM_NORM_EPS = 1e-5
CHUNK_MULTIPLE = 16  # compiled for a CPU, chunks of 10 and 12 wrote beyond their memory (torch 2.13)
STEPS = 1e-3, 1e-1  # between which the step sizes dt begin
DECAYS = 1.0, 16.0  # between which -A begins


@dataclass(frozen=True)
class MambaConfig(PlainConfig):
    """The network, of which the mixers may be state spaces and the MLPs may be left out."""

    ssm_expand: float = option(2.0, "inner width of a state space as a multiple of n_embd", parse=script.number)
    ssm_state: int = option(128, "numbers that a state has for each channel", most=2**16)
    ssm_head_dim: int = option(64, "channels of a head, which share their decay", most=2**16)
    ssm_groups: int = option(1, "groups of heads, each with its own B and C, and its own norm", most=2**16)
    ssm_conv: int = option(4, "tokens that the convolution before a state space sees", most=2**10)
    ssm_chunk: int = option(128, "tokens that the chunked form takes at once", most=2**16, rebuilds=False)
    attention_every: int = option(0, "each so many blocks one has attention; 0: none has", most=1000)

    def __post_init__(self):
        super().__post_init__()
        mamba = self.mixer == "mamba2"
        for f in OWN:
            value = getattr(self, f.name)
            require(mamba or value == f.default, f"{f.name}={value} would be ignored; add --mixer mamba2")
        require(self.mlp != "none" or self.mlp_expansion_factor == PlainConfig.mlp_expansion_factor,
                f"mlp_expansion_factor={self.mlp_expansion_factor:g} would be ignored: there are no MLPs; drop it")
        for name in ("ssm_state", "ssm_head_dim", "ssm_groups", "ssm_conv", "ssm_chunk"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.ssm_chunk % CHUNK_MULTIPLE == 0, f"ssm_chunk={self.ssm_chunk} must be a multiple of "
                f"{CHUNK_MULTIPLE}; 128 is usual")
        inner, P, G = self.ssm_expand * self.n_embd, self.ssm_head_dim, self.ssm_groups
        require(not mamba or inner >= 1 and inner % P == 0, f"ssm_expand x n_embd = {inner:g} must be a multiple of "
                f"ssm_head_dim={P}")
        heads = int(inner) // P
        require(not mamba or heads % G == 0, f"the {heads} heads of ssm_expand x n_embd / ssm_head_dim must be a "
                f"multiple of ssm_groups={G}")
        require(not (mamba and self.document_mask), "document_mask with mixer=mamba2: a state goes on from document to "
                "document; drop one of the two")
        for name in ("window", "softmax_scale", "attention_gate", "qk_norm") if mamba and not self.attends else ():
            require(not getattr(self, name), f"{name}={getattr(self, name)} would be ignored: no block has attention; "
                    "drop it, or add --attention_every 8")

    @property
    def attends(self):
        """The number of blocks with attention."""
        every = self.attention_every if self.mixer == "mamba2" else 1
        return self.n_layer // every if every else 0

    def plain(self, **changes):
        """The configuration without what is added here."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(PlainConfig)}
        return PlainConfig(**{**fields, **changes})


OWN = [f for f in dataclasses.fields(MambaConfig) if f.name not in {f.name for f in dataclasses.fields(PlainConfig)}]


# Shapes, beside those of the script: G groups, R heads of a group, P channels of a head, N numbers of a state, c chunks
# of l tokens


def decays(log):
    """exp of the sums of log (..., l) over j+1 to i, (..., l, l): what is left at i of what came at j; 0 for j > i."""
    total = log.cumsum(-1)
    later = torch.ones(log.size(-1), log.size(-1), dtype=torch.bool, device=log.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()


def chunked(x, log_decay, B, C, chunk, state=None, dtype=None):
    """The linear recurrence h_t = exp(log_decay_t) h_(t-1) + x_t B_t', y_t = h_t C_t, of x (B, T, G, R, P), log_decay
    (B, T, G, R), B and C (B, T, G, N), from a state (B, G, R, P, N), None for 0: y like x, and the last state. The wide
    products are in `dtype` (None: that of x), decays and states in that of log_decay.

    Within a chunk it is attention with decays in place of the softmax; each chunk's own state is then handed on (Dao
    and Gu 2024, arXiv:2405.21060, section 6). The rest of the last chunk is filled with tokens that change nothing.
    """
    T, exact, dtype = x.size(1), log_decay.dtype, dtype or x.dtype
    x, log_decay, B, C = (F.pad(z, (0, 0) * (z.dim() - 2) + (0, -T % chunk)).unflatten(1, (-1, chunk))
                          for z in (x, log_decay, B, C))
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    log_decay = log_decay.permute(0, 1, 3, 4, 2)  # (B, c, G, R, l)
    total = log_decay.cumsum(-1)
    scores = torch.einsum("bclgn,bcsgn->bcgls", C, B)
    y = torch.einsum("bcgrls,bcsgrp->bclgrp", (scores[:, :, :, None] * decays(log_decay)).to(dtype), x)
    left = (total[..., -1:] - total).exp().permute(0, 1, 4, 2, 3)  # at the chunk's end, (B, c, l, G, R)
    states = torch.einsum("bclgn,bclgrp->bcgrpn", B, (x * left[..., None]).to(dtype)).to(exact)
    first = torch.zeros_like(states[:, :1]) if state is None else state[:, None].to(exact)
    between = decays(F.pad(total[..., -1], (0, 0, 0, 0, 1, 0)).movedim(1, -1))  # (B, G, R, c + 1, c + 1)
    states = torch.einsum("bgrij,bjgrpn->bigrpn", between, torch.cat([first, states], 1))
    before = torch.einsum("bclgn,bcgrpn->bclgrp", C, states[:, :-1].to(dtype))
    y = y + before * total.exp().permute(0, 1, 4, 2, 3)[..., None]
    return y.flatten(1, 2)[:, :T], states[:, -1]


def stepped(x, log_decay, B, C, state):
    """The same recurrence of one token, T = 1."""
    x, log_decay, B, C = (z[:, 0].to(state.dtype) for z in (x, log_decay, B, C))
    state = state * log_decay.exp()[..., None, None] + x[..., None] * B[:, :, None, None]
    return (state * C[:, :, None, None]).sum(-1)[:, None], state


class State(NamedTuple):
    """What a Mamba2 leaves of the tokens that it has read."""

    inputs: Any  # (B, ssm_conv - 1, channels), the last that the convolution took
    state: Any  # (B, G, R, P, N)


class Mamba2(nn.Module):
    """A selective state space, (B, T, C) -> (B, T, C) (Dao and Gu 2024, arXiv:2405.21060, sections 6 and 7.1). One
    product makes gate, x, B, C and step size of each token; a short causal convolution goes over x, B and C; the step
    size says how fast a head forgets and how much it takes in. The output is gated and then normalised by groups."""

    def __init__(self, config, layer):
        super().__init__()
        inner = int(config.ssm_expand * config.n_embd)
        self.G, self.P, self.N = config.ssm_groups, config.ssm_head_dim, config.ssm_state
        self.heads, self.inner, self.chunk, self.conv = inner // self.P, inner, config.ssm_chunk, config.ssm_conv
        self.channels = inner + 2 * self.G * self.N
        parts = [inner, inner, self.G * self.N, self.G * self.N, self.heads]
        self.c_in = script.Linear(config, config.n_embd, sum(parts), parts)
        self.c_proj = script.Linear(config, inner, config.n_embd)
        # Vectors all, for the scalars' rate, without decay.
        self.conv_weight = nn.Parameter(torch.empty(self.channels * self.conv).uniform_(-1, 1) / self.conv**0.5)
        self.conv_bias = nn.Parameter(torch.zeros(self.channels))
        dt = torch.empty(self.heads).uniform_(*map(math.log, STEPS)).exp()
        self.dt_shift = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # of which softplus makes dt
        self.log_a = nn.Parameter(torch.empty(self.heads).uniform_(*DECAYS).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))

    def convolved(self, x, before):
        """(B, T, channels) -> the same, from the inputs before (B, ssm_conv - 1, channels)."""
        T, x = x.size(1), torch.cat([before, x], 1)
        weight = self.conv_weight.view(self.channels, -1)
        return F.silu(sum(x[:, i : i + T] * weight[:, i] for i in range(self.conv)) + self.conv_bias)

    def normed(self, y, gate):
        y = (y * F.silu(gate.to(y.dtype))).unflatten(-1, (self.G, -1))
        return F.rms_norm(y, y.shape[-1:], eps=SSM_NORM_EPS).flatten(-2) * self.norm_weight

    def scan(self, x, state=None):
        """x (B, T, C) behind the tokens that left a State (None: there were none): (B, T, C) and the State after."""
        gate, inputs, dt = self.c_in(x).split([self.inner, self.channels, self.heads], dim=-1)
        before = state.inputs if state else inputs.new_zeros(len(x), self.conv - 1, self.channels)
        dtype = script.product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            read = self.convolved(inputs, before)
            u, B, C = read.split([self.inner, self.G * self.N, self.G * self.N], dim=-1)
            u = u.unflatten(-1, (self.G, -1, self.P))
            B, C = (z.unflatten(-1, (self.G, self.N)) for z in (B, C))
            dt = F.softplus(dt + self.dt_shift).unflatten(-1, (self.G, -1))  # (B, T, G, R)
            log_decay = -dt * self.log_a.exp().view(self.G, -1)
            taken = u * dt[..., None]
            if state and x.size(1) == 1:
                y, last = stepped(taken, log_decay, B, C, state.state)
            else:
                y, last = chunked(taken, log_decay, B, C, self.chunk, state.state if state else None, dtype)
            y = y + self.skip.view(self.G, -1, 1) * u
            y = self.normed(y.flatten(2), gate).to(dtype)
        kept = torch.cat([before, inputs], 1)[:, x.size(1) :] if self.conv > 1 else before
        return self.c_proj(y), State(kept, last)

    def forward(self, x, ctx):
        return self.scan(x)[0]

    def flops(self, T):
        """FLOPs of a token, forward and backward, of the chunked form over whole chunks."""
        length = min(T, self.chunk)
        return 6 * (length * (self.G * self.N + self.inner) + 2 * self.N * self.inner)


def make_mixer(config, layer):
    """--mixer mamba2: a state space, and in each attention_every-th block attention."""
    every = config.attention_every
    return (script.CausalSelfAttention if every and (layer + 1) % every == 0 else Mamba2)(config, layer)


class NoMLP(nn.Module):
    """--mlp none: a block that is a mixer and nothing else, as in Mamba."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return torch.zeros_like(x)


def with_states(Cache):
    return extending.with_states(Cache, Mamba2, lambda mixer, x, ctx, state: mixer.scan(x, state))


def kept_with_states(kept_by_block):
    """The script's kept_by_block(), for the mean of a network's blocks: of a state space what its products make and
    take, the decays within a chunk, and the chunks' states."""
    def kept(config):
        half, C = 4 if config.precision == "fp32" else 2, config.n_embd
        bare = dict(mlp="gelu", ffn_hidden=1) if config.mlp == "none" else {}
        plain = kept_by_block(config.plain(**{**bare, **(dict(mixer="attention") if config.mixer == "mamba2" else {})}))
        if config.mixer != "mamba2":
            return plain
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        rotated = (H + K) * D * (config.position == "rope" or config.qk_norm)
        attention = half * ((H + 2 * K) * D + rotated + H * D) + 4 * H
        inner, B_and_C = int(config.ssm_expand * C), 2 * config.ssm_groups * config.ssm_state
        heads = inner // config.ssm_head_dim
        own = half * (3 * inner + 2 * B_and_C + heads) + (4 + half) * inner  # c_in and convolution; y, and c_proj's
        own += (4 + half) * heads * config.ssm_chunk + 8 * inner * config.ssm_state // config.ssm_chunk
        return plain + round((own - attention) * (1 - config.attends / config.n_layer))

    return kept


PRESETS = {
    "d24_mamba2": dict(n_layer=24, mixer="mamba2", mlp="none", scale_attention=False),  # as published, at 130M
    "d24_mamba2_hybrid": dict(n_layer=24, mixer="mamba2", mlp="none", scale_attention=False, attention_every=8),
    "d12_mamba2": dict(mixer="mamba2", mlp_expansion_factor=3.0),
    "d12_mamba2_hybrid": dict(mixer="mamba2", mlp_expansion_factor=3.0, attention_every=4),
    "tiny_mamba2": dict(n_layer=4, n_head=4, n_embd=128, mixer="mamba2", ssm_state=16, ssm_head_dim=16, ssm_chunk=32,
                        attention_every=4),
}


def register():
    """Make the script know all this."""
    script.mixers["mamba2"] = make_mixer
    script.mlps["none"] = NoMLP
    script.base_configs.update(PRESETS)
    extending.exchange(GPTConfig=MambaConfig, kept_by_block=kept_with_states(script.kept_by_block),
                       attention_kernel=extending.training_in(
                           extending.exact_backward, extending.without_attention(script.attention_kernel),
                           lambda config: config.mixer == "mamba2"))
    extending.show_source(__file__)
    extending.head_help(__file__, __doc__)


def __getattr__(name):
    """What tools/bench.py wants of a script."""
    return getattr(script, name)


def main(argv=None):
    register()
    return extending.main(argv, __file__, {Mamba2, NoMLP}, with_states)


if __name__ == extending.MODULE:
    register()
if __name__ == "__main__":
    sys.exit(main())
