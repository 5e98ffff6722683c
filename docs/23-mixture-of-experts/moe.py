#!/usr/bin/env python3
"""Train with a mixture of experts in each block: --mlp moe, or a preset, d12_moe for one. All other flags, and the
other presets, such as d12, are those of train_gpt2_mod.py; docs/extending.py says how its tools are run.

    python docs/23-mixture-of-experts/moe.py --model d12_moe --balance bias --batch_size 32
    python docs/23-mixture-of-experts/moe.py tools/sample.py logs --prompt 'Once upon a time'
"""
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

IS_PROGRAM = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import extending  # noqa: E402
from extending import script  # noqa: E402

option, require, PlainConfig, PlainGPT = script.option, script.require, script.GPTConfig, script.GPT
# Groups of products of unequal sizes in one kernel, by the name that this torch has for it.
GROUPED_MM = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@dataclass(frozen=True)
class MoEConfig(PlainConfig):
    """The network, of which the MLPs may be experts. ffn_hidden and mlp_expansion_factor are then of one expert."""

    n_expert: int = option(8, "experts of an MLP, without those that are shared", most=2**16)
    experts_per_token: int = option(2, "experts that a token goes through", most=2**16)
    n_shared_expert: int = option(0, "further experts, that every token goes through", most=2**16)
    expert: str = option("gelu", "what an expert is", choices=lambda: ("swiglu", *script.activations))
    router: str = option("softmax", "what makes scores of the router's logits", choices=("softmax", "sigmoid"))
    router_scale: float = option(1.0, "factor of the sum of the chosen experts")
    balance: str = option("loss", "what evens the load of the experts", choices=("loss", "bias", "none"),
                          rebuilds=False)
    balance_weight: float = option(0.01, "weight of the loss of --balance loss, in each block", rebuilds=False)
    balance_rate: float = option(0.001, "how far a step of --balance bias moves each expert's bias", rebuilds=False)

    def __post_init__(self):
        super().__post_init__()
        for f in OWN:
            value, used = getattr(self, f.name), self.mlp == "moe"
            require(used or value == f.default, f"{f.name}={value} would be ignored; add --mlp moe")
        for name in ("n_expert", "experts_per_token"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        chosen = self.experts_per_token
        require(chosen <= self.n_expert, f"experts_per_token={chosen} must be at most n_expert={self.n_expert}")
        require(self.router_scale > 0, "router_scale=0.0 must be above 0; 1 is usual")
        for name, kind in (("balance_weight", "loss"), ("balance_rate", "bias")):
            value = getattr(self, name)
            require(self.mlp != "moe" or self.balance == kind or value == getattr(MoEConfig, name),
                    f"{name}={value} would be ignored; add --balance {kind}")

    def dense(self, hidden):
        """The plain configuration of a network whose MLPs are one expert, of another hidden width."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(PlainConfig)}
        return PlainConfig(**{**fields, "mlp": self.expert if self.mlp == "moe" else self.mlp, "ffn_hidden": hidden})


OWN = [f for f in dataclasses.fields(MoEConfig) if f.name not in {f.name for f in dataclasses.fields(PlainConfig)}]


class Taken(torch.autograd.Function):
    """Rows of x (N, C) in another order, (copies N, C): row i is x's number order[i] // copies. With the inverse of the
    order the backward pass takes rows too, and adds nothing up in an order that changes from run to run."""

    @staticmethod
    def forward(ctx, x, order, inverse, copies):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx, dy):
        inverse, = ctx.saved_tensors
        return dy[inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def balance_loss(load, scores):
    """E times the sum over the experts of load times mean score, as shares: 1 where all are even (Fedus et al. 2022,
    arXiv:2101.03961, eq. 4 to 6). load (E,) counts, scores (N, E); no gradient flows through the load."""
    mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return load.numel() * (load / load.sum() * mean).sum()


def moved_bias(bias, load, rate):
    """The bias (..., E) after a step in which so many tokens came to each expert (..., E): up by the rate where they
    were fewer than the mean, else down (DeepSeek-V3, arXiv:2412.19437, section 2.1.2; Wang et al. 2024,
    arXiv:2408.15664, algorithm 1)."""
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean(-1, keepdim=True) - load)


class MoE(nn.Module):
    """(B, T, C) -> (B, T, C): each token goes through the k = experts_per_token experts, of E, for which it scores
    highest, their outputs weighted by the scores (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024,
    arXiv:2401.04088, section 2.1). No expert has a capacity, so no token is dropped. Several scores are divided by
    their sum; one alone is not, since the router would then learn nothing. The router computes in fp32.

    The experts' matrices lie in one below the other, which Muon takes one by one. `balance_bias` counts for the choice
    and not for the weights. While training, `routed` has what a forward pass found out, until GPT.forward() takes it;
    `load` (E,) and `sums`, of each token's entropy and balance loss, add that up over the micro-batches of a step.
    """

    grouped = False  # whether the products may be GROUPED_MM's: start_run() tries

    def __init__(self, config):
        super().__init__()
        self.E, self.k, self.config = config.n_expert, config.experts_per_token, config
        C, hidden, halves = config.n_embd, config.ffn_hidden, 1 + (config.expert == "swiglu")
        self.router = nn.Linear(C, self.E, bias=False)
        self.c_fc = script.Linear(config, C, self.E * halves * hidden, self.E * halves * [hidden])
        self.c_proj = script.Linear(config, hidden, self.E * C, self.E * [C])
        shared = config.dense(config.n_shared_expert * hidden) if config.n_shared_expert else None
        self.shared = script.mlps[config.expert](shared) if shared else None
        self.routed = None
        self.register_buffer("balance_bias", torch.zeros(self.E))
        self.register_buffer("load", torch.zeros(self.E, dtype=torch.long), persistent=False)
        self.register_buffer("sums", torch.zeros(2), persistent=False)

    def scores(self, rows):
        """(N, C) -> (N, E), in fp32 whatever autocast has."""
        with torch.autocast(rows.device.type, enabled=False):
            wide = torch.promote_types(rows.dtype, torch.float32)
            logits = F.linear(rows.to(wide), self.router.weight.to(wide))
        return logits.softmax(-1) if self.config.router == "softmax" else logits.sigmoid()

    def choose(self, scores):
        """(N, E) -> the experts of each token and their weights, (N, k) both."""
        chosen = (scores.detach() + self.balance_bias).topk(self.k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return chosen, self.config.router_scale * weights

    def product(self, x, layer, ends, experts):
        """Rows x (M, K), sorted by their experts (M,), times each one's matrix, plus its bias; the rows of expert e end
        at ends[e]."""
        weight = layer.weight.view(self.E, -1, layer.in_features).to(x.dtype)
        if self.grouped and x.dtype == torch.bfloat16:
            x = script.pad_to(x, script.WIDTH_MULTIPLE)
            padded = script.pad_to(weight, x.size(-1), script.WIDTH_MULTIPLE)
            y = GROUPED_MM(x, padded.transpose(1, 2), offs=ends)[:, : weight.size(1)]
        else:  # the host waits for the sizes
            ends = ends.tolist()
            parts = x.split([end - start for start, end in zip([0, *ends], ends)])
            y = torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight)])
        return y if layer.bias is None else y + layer.bias.view(self.E, -1)[experts].type_as(y)

    def activation(self, hidden):
        if self.config.expert != "swiglu":
            return script.activations[self.config.expert](hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def mixed(self, rows, chosen, weights, load):
        """The weighted sum of the chosen experts, (N, C) -> (N, C)."""
        experts, order = chosen.flatten().sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = load.cumsum(0).to(torch.int32)
        x = Taken.apply(rows.to(script.product_dtype(rows)), order, inverse, self.k)
        y = self.product(self.activation(self.product(x, self.c_fc, ends, experts)), self.c_proj, ends, experts)
        y = Taken.apply(y, inverse, order, 1).unflatten(0, (-1, self.k))
        return (weights[..., None] * y).sum(1).type_as(y)

    def forward(self, x):
        rows = x.flatten(0, -2)
        scores = self.scores(rows)
        chosen, weights = self.choose(scores)
        load = (chosen.flatten()[:, None] == torch.arange(self.E, device=x.device)).sum(0)
        if self.training:
            shares = scores.detach() / scores.detach().sum(-1, keepdim=True)
            routed = load, torch.special.entr(shares).sum(-1).mean(), balance_loss(load, scores)
            self.routed = None if backward_is_running() else routed
        y = self.mixed(rows, chosen, weights, load).view(*x.shape)
        return y if self.shared is None else y + self.shared(x)

    def take(self):
        """The balance loss of the last forward pass, once it is added up with the rest."""
        load, entropy, balance = self.routed
        self.routed = None
        with torch.no_grad():
            self.load += load
            self.sums += load.sum() / self.k * torch.stack([entropy, balance]).to(self.sums.dtype)
        return balance


def backward_is_running():
    """Whether a block is run again, with gradient_checkpointing: what it leaves then would keep its activations.
    Compiled, the backward pass leaves nothing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class MoEGPT(PlainGPT):
    """The script's, whose loss has balance_weight times each block's balance loss while training."""

    def __init__(self, config):
        super().__init__(config)
        blocks = {f"h.{i}": block for i, block in enumerate(self.transformer.h)}
        blocks |= {f"mtp.{k}": block for k, block in self.mtp_blocks.items()}
        self.experts = {name: block.mlp for name, block in blocks.items() if isinstance(block.mlp, MoE)}

    def forward(self, idx, targets_dict=None, return_logits=True, return_loss_components=False):
        logits, loss = super().forward(idx, targets_dict, return_logits, return_loss_components)
        balances = [layer.take() for layer in self.experts.values() if layer.routed]
        if balances and self.config.balance == "loss" and isinstance(loss, torch.Tensor):
            loss = loss + self.config.balance_weight * sum(balances)
        return logits, loss

    def idle_parameters(self):
        """Those of experts that a token does not go through."""
        each = [layer.c_fc.parameters() for layer in self.experts.values()]
        each += [layer.c_proj.parameters() for layer in self.experts.values()]
        count = sum(p.numel() for parameters in each for p in parameters)
        return count // self.config.n_expert * (self.config.n_expert - self.config.experts_per_token)

    def flops_by_part(self, T):
        """Of the experts that a token goes through."""
        found = super().flops_by_part(T)
        return {**found, "mlp": found["mlp"] - 6 * self.idle_parameters()}


@torch.no_grad()
def after_step(model, run, world, finite, every_layer):
    """Move the biases, if the update counted (`finite`, a tensor), and say how the tokens of the step were spread, over
    all processes: {figure: tensor}. load_max and load_min are of an expert, as multiples of the mean, and with
    every_layer each one's share of a block's; entropy is of the scores of a token, in nats; all are means over the
    blocks but `dropped`, a number of tokens."""
    layers, config = model.experts, model.config
    load = world.sum(torch.stack([layer.load for layer in layers.values()]))  # (blocks, E)
    sums = world.sum(torch.stack([layer.sums for layer in layers.values()])) / run.tokens_per_step
    if config.balance == "bias":
        rate = config.balance_rate * finite.to(sums.dtype)
        for layer, its_load in zip(layers.values(), load):
            layer.balance_bias.copy_(moved_bias(layer.balance_bias, its_load, rate))
    shares = load / load.sum(1, keepdim=True)
    entropy, balance = sums.mean(0)
    missing = len(layers) * run.tokens_per_step - load.sum() / config.experts_per_token
    figures = dict(router_entropy=entropy, balance_loss=balance, load_max=config.n_expert * shares.amax(1).mean(),
                   load_min=config.n_expert * shares.amin(1).mean(), dropped=missing)
    for name, row, (its_entropy, _) in zip(layers, shares, sums) if every_layer else ():
        figures |= {f"expert_load/{name}.{e}": share for e, share in enumerate(row)}
        figures[f"router_entropy/{name}"] = its_entropy
    return {name: value.float() for name, value in figures.items()}


def counting_experts(train_step):
    """The script's train_step(), with after_step()."""
    def with_experts(model, state, scheduled, run, world, *others):
        for layer in state.model.experts.values():
            layer.load.zero_()
            layer.sums.zero_()
        numbers, grad_norm, statistics = train_step(model, state, scheduled, run, world, *others)
        if state.model.experts:
            every_layer = run.log_stats and script.due(state.step + 1, run.log_stats, run.num_iterations)
            finite = torch.isfinite(numbers[0]) & torch.isfinite(grad_norm)
            statistics = {**statistics, **after_step(state.model, run, world, finite, every_layer)}
        return numbers, grad_norm, statistics

    return with_experts


def why_not_grouped(device, dtype):
    """None where the experts' products can be one kernel, else the reason in a line. It is tried on groups of 5, 0 and
    32 rows, and must give what single products give, in values and gradients."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return f"{dtype} on {device.type}"
    if GROUPED_MM is None:
        return f"torch {torch.__version__} has no grouped_mm"
    try:
        return None if grouped_is_right(device, dtype) else "grouped_mm gives other values here"
    except Exception as e:  # what is wrong shows only now
        return script.first_line(e)


def grouped_is_right(device, dtype):
    x, weight = ((torch.arange(math.prod(shape), device=device) % 7 - 3).to(dtype).view(shape).requires_grad_()
                 for shape in ((37, 16), (3, 8, 16)))
    one = GROUPED_MM(x, weight.transpose(1, 2), offs=torch.tensor([5, 5, 37], device=device, dtype=torch.int32))
    each = torch.cat([x[:5] @ weight[0].T, x[5:] @ weight[2].T])
    pairs = [(y, *torch.autograd.grad(y, (x, weight), (y % 5).detach())) for y in (one, each)]
    return all(torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02) for a, b in zip(*pairs))


def choosing_kernels(start_run):
    """The script's start_run(), which also says how the experts are computed."""
    def with_experts(typed, world, origin):
        found = start_run(typed, world, origin)
        state, config, notes = found[0], found[1], found[-1]
        model = state.model
        if model.experts:
            reason = why_not_grouped(world.device, state.numerics.dtype)
            MoE.grouped = reason is None
            notes.append(f"experts: {config.experts_per_token} of {config.n_expert}, {config.n_shared_expert} shared; "
                         f"{model.parameter_count() - model.idle_parameters():,} parameters are active for a token; "
                         + ("grouped products" if MoE.grouped else f"one product after another ({reason})"))
        return found

    return with_experts


def with_idle(parameters_by_part):
    """The script's parameters_by_part(), with those that a token does not meet apart from the MLPs'."""
    def parts(model):
        counts, idle = parameters_by_part(model), getattr(model, "idle_parameters", int)()
        return {**counts, "mlp": counts["mlp"] - idle, "idle": idle} if idle else counts

    return parts


def kept_with_experts(kept_by_block):
    """The script's kept_by_block(): of each of its experts a token keeps the input, what the activation takes and
    gives, and the output, of which the weight's gradient is made."""
    def kept(config):
        if config.mlp != "moe":
            return kept_by_block(config)
        half, hidden = 4 if config.precision == "fp32" else 2, config.ffn_hidden
        expert = 2 * config.n_embd + (2 + (config.expert == "swiglu")) * hidden
        plain = kept_by_block(config.dense(max(1, config.n_shared_expert * hidden)))
        return plain + half * config.experts_per_token * expert + 8 * config.n_expert

    return kept


DEEPSEEK = dict(router="sigmoid", balance="bias")
PRESETS = {  # each of d12's FLOPs a token but for the router
    "d12_moe": dict(mlp="moe", mlp_expansion_factor=2.0),
    "d12_moe_bias": dict(mlp="moe", mlp_expansion_factor=2.0, **DEEPSEEK),
    "d12_moe_switch": dict(mlp="moe", experts_per_token=1),
    "d12_moe_shared": dict(mlp="moe", mlp_expansion_factor=1.0, n_expert=16, experts_per_token=3, n_shared_expert=1,
                           **DEEPSEEK),
    "tiny_moe": dict(n_layer=4, n_head=4, n_embd=128, mlp="moe", mlp_expansion_factor=2.0, n_expert=4),
}


def register():
    """Make the script know all this."""
    script.mlps["moe"] = MoE
    script.base_configs.update(PRESETS)
    extending.exchange(
        GPTConfig=MoEConfig, GPT=MoEGPT, train_step=counting_experts(script.train_step),
        start_run=choosing_kernels(script.start_run), parameters_by_part=with_idle(script.parameters_by_part),
        kept_by_block=kept_with_experts(script.kept_by_block),
        attention_kernel=extending.training_in(extending.exact_backward, script.attention_kernel,
                                               lambda config: config.mlp == "moe"),
    )
    extending.show_source(__file__)
    extending.head_help(__file__, __doc__)


def __getattr__(name):
    """What tools/bench.py wants of a script."""
    return getattr(script, name)


def main(argv=None):
    register()
    return extending.main(argv, __file__, {MoE, MoEGPT})


if __name__ == extending.MODULE:
    register()
if __name__ == "__main__":
    sys.exit(main())
