"""Muon against loops over single matrices in float64 and against torch's; the two optimizers as one; their rates."""
import copy
import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, FakeWorld, machine, shrunk_preset, small_config, small_run
from launch import (ROOT, assert_same, checkpoints, column, content_of, runs_in, some_tokens, steps, torchrun,
                    validations, write_shard)
from torch import nn

import train_gpt2_mod as script

SHAPES = [(6, 6), (4, 9), (9, 4), (6, 6), (9, 4), (1, 5), (5, 1), (4, 9), (1, 1), (3, 3)]
LOSS = torch.tensor(2.0)  # where nothing depends on it


# ----------------------------------------------------------------------------------------------------------------------
# Slow references


def naive_orthogonalized(x):
    """Five steps of the quintic Newton-Schulz iteration from x / |x|, of one matrix."""
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def naive_muon(weight, gradients, rates, momenta, decay=0.0, cautious=False, beta2=0.0):
    """(weight, mean of the gradients) of one matrix after a step for each gradient, in float64; with beta2 NorMuon's."""
    weight, mean = weight.detach().double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    rows, columns = weight.shape
    squares = [0.0] * max(rows, columns)
    for gradient, lr, momentum in zip(gradients, rates, momenta):
        gradient = gradient.double()
        mean = momentum * mean + (1 - momentum) * gradient
        update = naive_orthogonalized(momentum * mean + (1 - momentum) * gradient)
        if beta2:
            size, lines = update.square().sum().sqrt(), update if rows >= columns else update.T  # views
            for i, line in enumerate(lines):
                squares[i] = beta2 * squares[i] + (1 - beta2) * float(line.square().mean())
                line /= math.sqrt(squares[i])
            update = update * size / update.square().sum().sqrt()
        update = update * math.sqrt(max(1, rows / columns))
        shrinks = (weight * update > 0).double() if cautious else 1.0
        weight = weight - lr * decay * shrinks * weight - lr * update
    return weight, mean


def muon(parameters, parts=None, **settings):
    """A Muon whose matrices are the parameters, or where `parts` says so, what they consist of."""
    parts = parts or [(p.size(0),) for p in parameters]
    return script.Muon([dict(params=list(parameters), parts=parts)], **{**dict(lr=0.02), **settings})


def random_parameters(shapes=SHAPES, dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def random_gradients(parameters, steps=4, seed=1):
    """A list for each step of gradients of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [[10.0 ** (i % 5 - 3) * torch.randn(p.shape, generator=generator, dtype=p.dtype)
             for i, p in enumerate(parameters)] for _ in range(steps)]


def take_steps(optimizer, parameters, gradients, rates=(), momenta=()):
    for step, row in enumerate(gradients):
        for group in optimizer.param_groups if rates else ():
            group.update(lr=rates[step], momentum=momenta[step])
        for p, gradient in zip(parameters, row):
            p.grad = gradient.clone()
        optimizer.step()


def copies(parameters):
    return [nn.Parameter(p.detach().clone()) for p in parameters]


# ----------------------------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("cautious, beta2", [(False, 0.0), (True, 0.0), (False, 0.9), (True, 0.5)])
@pytest.mark.parametrize("default, dtype, tolerance", [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float64, 1e-7),  # rate and momentum are in the default type
    (torch.float32, torch.float32, 2e-5),
])
def test_muon_is_its_formula(float64, default, dtype, tolerance, cautious, beta2):
    """Wide, tall and square matrices together, with the rate and the momentum of each step."""
    torch.set_default_dtype(default)
    parameters = random_parameters(dtype=dtype)
    before, gradients = copies(parameters), random_gradients(parameters)
    rates, momenta = (0.02, 0.05, 0.04, 0.001), (0.85, 0.9, 0.95, 0.95)
    optimizer = muon(parameters, weight_decay=0.7, cautious=cautious, beta2=beta2)
    take_steps(optimizer, parameters, gradients, rates, momenta)
    tolerance = max(tolerance, 1e-10) if beta2 else tolerance  # 1e-10 is added to roots of about 1
    for i, (start, p) in enumerate(zip(before, parameters)):
        weight, mean = naive_muon(start, [row[i] for row in gradients], rates, momenta, 0.7, cautious, beta2)
        torch.testing.assert_close(p.detach().double(), weight, rtol=0, atol=tolerance)
        found = optimizer.state[p]["momentum_buffer"]
        allowed = 10 * tolerance * float(mean.abs().max())  # 1 - momentum has a digit less
        torch.testing.assert_close(found.double(), mean, rtol=0, atol=allowed)
        assert p.dtype == found.dtype == dtype


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (64, 32), (48, 48)])
def test_muon_is_torchs_but_for_its_bf16(shape):
    ours, = random_parameters([shape])
    start, (theirs,) = ours.detach().clone(), copies([ours])
    gradients = random_gradients([ours])
    take_steps(muon([ours], lr=0.02, weight_decay=2.0, momentum=0.9), [ours], gradients)
    take_steps(torch.optim.Muon([theirs], lr=0.02, weight_decay=2.0, momentum=0.9), [theirs], gradients)
    assert (ours - theirs).abs().max() < 0.08 * 0.02  # after four steps
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_the_defaults_are_torchs():
    parameter, = random_parameters([(2, 3)])
    ours, theirs = muon([parameter]).defaults, torch.optim.Muon([parameter]).defaults
    names = ("momentum", "weight_decay")
    assert [ours[name] for name in names] == [theirs[name] for name in names] and theirs["nesterov"]
    assert theirs["ns_coefficients"] == (3.4445, -4.7750, 2.0315) and theirs["ns_steps"] == 5


@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_many_matrices_at_once_are_each_by_itself(float64, beta2):
    together = random_parameters()
    alone, gradients = copies(together), random_gradients(together)
    take_steps(muon(together, beta2=beta2), together, gradients)
    for i, p in enumerate(alone):
        take_steps(muon([p], beta2=beta2), [p], [[row[i]] for row in gradients])
        torch.testing.assert_close(p.detach(), together[i].detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta2", [0.0, 0.9])
@pytest.mark.parametrize("parts", [(4, 4, 4), (8, 2, 2), (2, 1, 1), (9, 4), (7,), (3, 5, 3, 5)])
@pytest.mark.parametrize("columns", [3, 4, 8])
def test_matrices_one_below_the_other_are_as_many_parameters(float64, parts, columns, beta2):
    joined, = random_parameters([(sum(parts), columns)])
    pieces = [nn.Parameter(piece.clone()) for piece in joined.detach().split(parts)]
    rows = [row for row, in random_gradients([joined])]
    ours, theirs = muon([joined], parts=[parts], beta2=beta2), muon(pieces, beta2=beta2)
    take_steps(ours, [joined], [[row] for row in rows])
    take_steps(theirs, pieces, [row.split(parts) for row in rows])
    torch.testing.assert_close(joined.detach(), torch.cat([p.detach() for p in pieces]), rtol=0, atol=1e-13)
    for name in ours.state[joined]:
        kept = torch.cat([theirs.state[p][name] for p in pieces])
        torch.testing.assert_close(ours.state[joined][name], kept, rtol=0, atol=1e-13)


@pytest.mark.parametrize("changes, rows", [
    (dict(), dict(c_attn=(32, 32, 32), c_fc=(128,))),
    (dict(n_kv_head=2), dict(c_attn=(32, 16, 16), c_fc=(128,))),
    (dict(n_kv_head=1, mlp="swiglu", ffn_hidden=40), dict(c_attn=(32, 8, 8), c_fc=(40, 40))),
    (dict(mixer="latent", kv_rank=12, rope_head_dim=4), dict(c_q=(48,), c_down=(16,), c_up=(64,), c_fc=(128,))),
])
def test_an_update_of_a_network_is_that_of_its_single_matrices(float64, changes, rows):
    """Queries, keys and values by themselves, gate and up too, as many rows of each as the configuration says."""
    config = small_config(mtp_enabled=True, mtp_heads="separate", **changes)
    model = script.GPT(config)
    run = small_run(optimizer="muon", muon_lr=0.03, muon_momentum=0.9, weight_decay=0.5)
    optimizer = script.make_optimizer(model, run, CPU)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    ours = {name: p for name, p in model.named_parameters() if re.search(r"c_\w+\.weight", name)}
    assert len(ours) == 3 * (6 if "mixer" in changes else 4)  # two blocks of the trunk, and MTP's
    for name, p in ours.items():
        cut = rows.get(name.split(".")[-2], (p.size(0),))
        pieces = [naive_muon(weight, [gradient], [0.03], [0.9], 0.5)[0]
                  for weight, gradient in zip(before[name].split(cut), p.grad.split(cut))]
        torch.testing.assert_close(p.detach(), torch.cat(pieces), rtol=0, atol=1e-12)


def test_a_matrix_without_a_gradient_is_left_alone():
    parameters = random_parameters([(3, 4), (3, 4)])
    before, optimizer = copies(parameters), muon(parameters)
    parameters[0].grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(parameters[1], before[1]) and not torch.equal(parameters[0], before[0])
    assert list(optimizer.state) == [parameters[0]]


def singular_values_after(s):
    """What the iteration makes of singular values: an odd polynomial, five times."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 24), (16, 16), (31, 32), (64, 64), (3, 100)])
def test_the_iteration_keeps_singular_vectors_and_brings_singular_values_near_1(shape, dtype, tolerance):
    x = torch.randn(4, *shape, dtype=dtype) * torch.tensor([1e-4, 1.0, 30.0, 1e4], dtype=dtype).view(4, 1, 1)
    found = script.orthogonalized(x)
    assert found.dtype == dtype
    for matrix, near in zip(x.double(), found.double()):
        U, s, V = torch.linalg.svd(matrix, full_matrices=False)
        share = s / s.norm()
        expected = U @ torch.diag(singular_values_after(share)) @ V
        torch.testing.assert_close(near, expected, rtol=0, atol=tolerance)
        inside = U.T @ near @ V.T
        large = share > 0.002  # what is smaller takes more than five steps
        assert large.sum() >= 0.9 * len(s)
        assert ((inside.diagonal() > 0.68) & (inside.diagonal() < 1.21))[large].all()
        assert (near - U @ V).norm() < 0.33 * (U @ V).norm()


@pytest.mark.parametrize("shape", [(8, 24), (12, 40), (2, 3), (5, 64)])
def test_a_random_matrix_becomes_nearly_orthogonal(shape):
    """Well-conditioned ones: all singular values, not only the large ones."""
    values = torch.linalg.svdvals(script.orthogonalized(torch.randn(16, *shape)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_nothing_stays_nothing():
    """As in the first steps with zero_init, where most gradients are 0: the others of the stack are as without it."""
    x = torch.randn(3, 4, 6)
    x[1] = 0
    found = script.orthogonalized(x)
    assert torch.equal(found[1], torch.zeros(4, 6))
    torch.testing.assert_close(found[[0, 2]], script.orthogonalized(x[[0, 2]]))
    for cautious in (False, True):  # the weight decays, but where only an update's direction lets it
        parameter, = random_parameters([(4, 6)])
        expected = parameter.detach() * (1 if cautious else 1 - 0.02 * 0.5)
        take_steps(muon([parameter], weight_decay=0.5, cautious=cautious), [parameter], [[torch.zeros(4, 6)]])
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_cautious_decay_is_where_the_update_makes_a_weight_smaller(float64, shape):
    lr, decay = 0.02, 5.0
    without, = random_parameters([shape])
    without.data[0, :2] = 0.0
    start, (cautious, plain) = without.detach().clone(), copies([without, without])
    gradients = random_gradients([without], steps=1)
    for p, settings in ((without, dict(weight_decay=0.0)), (cautious, dict(weight_decay=decay, cautious=True)),
                        (plain, dict(weight_decay=decay))):
        take_steps(muon([p], lr=lr, **settings), [p], gradients)
    update, counts = start - without.detach(), {True: 0, False: 0}
    for i in range(shape[0]):
        for j in range(shape[1]):
            smaller = bool(start[i, j] > 0 and update[i, j] > 0 or start[i, j] < 0 and update[i, j] < 0)
            shrunk = start[i, j] * (1 - lr * decay)
            assert cautious[i, j].item() == pytest.approx(float((shrunk if smaller else start[i, j]) - update[i, j]),
                                                          abs=1e-14)
            assert plain[i, j].item() == pytest.approx(float(shrunk - update[i, j]), abs=1e-14)
            counts[smaller] += 1
    assert min(counts.values()) > 4  # both happen


# ----------------------------------------------------------------------------------------------------------------------
# Updates that are skipped


def with_muon(fused=False, **changes):
    """A small network and its optimizers, AdamW's kernel as on a GPU if so asked, after a good update."""
    torch.manual_seed(0)
    model = script.GPT(small_config(bias=True, tie_embeddings=False, n_kv_head=2))
    run = small_run(optimizer="muon", weight_decay=0.2, learning_rate=0.01, embedding_lr=0.03, **changes)
    optimizer = script.make_optimizer(model, run, torch.device("cuda") if fused else CPU)
    assert [type(one) for one in optimizer.each] == [torch.optim.AdamW, script.Muon]
    give_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def give_gradients(model, seed, value=None):
    """Random gradients, or of one value."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if value is None else torch.full_like(p, value)


def contents(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("beta2", [0.0, 0.9])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0])
def test_an_update_found_to_be_bad_changes_no_bit(value, beta2):
    """Neither of weights nor of momentum, means and squares; what follows is as if it had not been."""
    (model, optimizer), (other, theirs) = (with_muon(fused=True, muon_beta2=beta2) for _ in range(2))
    before = contents(model, optimizer)
    give_gradients(model, 1, value)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert_same(contents(model, optimizer), before)
    for each, its in ((model, optimizer), (other, theirs)):
        give_gradients(each, 2)
        its.step(found_inf=torch.tensor(0.0))
    assert_same(contents(model, optimizer), contents(other, theirs))
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all() and not torch.equal(p, before[0][name]), name


def test_a_bad_first_update_leaves_muon_without_momentum():
    parameter, = random_parameters([(3, 5)])
    before, optimizer = parameter.detach().clone(), muon([parameter])
    optimizer.found_inf = torch.tensor(1.0)
    take_steps(optimizer, [parameter], [[torch.full((3, 5), math.nan)]])
    assert torch.equal(parameter, before)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.zeros(3, 5))


@pytest.mark.parametrize("cautious, beta2", [(False, 0.0), (True, 0.0), (False, 0.9)])
def test_nothing_found_is_nothing_asked(cautious, beta2):
    changes = dict(cautious_weight_decay=cautious, muon_beta2=beta2)
    (model, optimizer), (other, theirs) = (with_muon(fused=True, **changes) for _ in range(2))
    for seed in (1, 2):
        for each in (model, other):
            give_gradients(each, seed)
        optimizer.step(found_inf=torch.tensor(0.0))
        theirs.step()
    assert_same(contents(model, optimizer), contents(other, theirs))


def backward_of(model, numerics, where=None):
    """A backward pass that gives each parameter a random gradient, one of them infinite in what is AdamW's or Muon's;
    gives the loss, which may be what is not finite."""
    generator, loss, hit = torch.Generator().manual_seed(3), 0.0, False
    for name, p in model.named_parameters():
        gradient = torch.randn(p.shape, generator=generator)
        if where == ("muon" if re.search(r"c_\w+\.weight", name) else "adamw") and not hit:
            gradient.view(-1)[-1], hit = math.inf, True
        loss = loss + (p * gradient).sum()
    assert hit == (where in ("muon", "adamw"))
    numerics.backward(loss)
    return torch.tensor(math.nan) if where == "loss" else LOSS


@pytest.mark.parametrize("where", ["muon", "adamw", "loss"])
@pytest.mark.parametrize("precision, fused", [("fp32", False), ("fp32", True), ("fp16", False)])
def test_what_is_bad_for_one_optimizer_is_skipped_by_both(precision, fused, where):
    (model, optimizer), numerics = with_muon(fused), script.Numerics(precision, CPU)
    before, scale = contents(model, optimizer), numerics.scaler.get_scale()
    loss = backward_of(model, numerics, where)
    norm = numerics.step(optimizer, list(model.parameters()), 1.0, loss)
    assert_same(contents(model, optimizer), before)
    assert all(p.grad is None for p in model.parameters())
    if precision == "fp16":
        assert numerics.scaler.get_scale() == scale / 2
    else:
        assert math.isfinite(norm) == (where == "loss")


def test_the_scaler_takes_a_finite_step_with_both():
    """Bitwise that without it, for its scale is a power of two; then a bad one and a good one."""
    (model, optimizer), (other, theirs) = with_muon(), with_muon()
    before, fp16, fp32 = contents(model, optimizer), script.Numerics("fp16", CPU), script.Numerics("fp32", CPU)
    for where in (None, "muon", None):
        norms = [numerics.step(its, list(each.parameters()), 1.0, backward_of(each, numerics, where)).item()
                 for each, its, numerics in ((model, optimizer, fp16), (other, theirs, fp32))]
        assert where or norms[0] == norms[1]
        assert_same(contents(model, optimizer), contents(other, theirs))
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[0][name]), name


# ----------------------------------------------------------------------------------------------------------------------
# Groups and their rates

RATES = dict(learning_rate=0.004, embedding_lr=0.15, value_lr=0.35, head_lr=0.03, scalar_lr=0.02, muon_lr=0.025)
EVERYTHING = dict(norm_weights=True, mtp_enabled=True, mtp_heads="separate", mtp_max_steps=3)
NETWORKS = {
    **{name: dict() for name in script.base_configs},
    "fast with learned positions": dict(script.FAST, value_embeddings=1, position="learned", norm="layernorm"),
    "fast with groups": dict(script.FAST, value_embeddings=1, n_kv_head=2, mlp="swiglu", document_mask=True),
}


def network(name, **changes):
    """One of NETWORKS, made small, with room for its value embeddings."""
    preset = {**script.base_configs.get(name, {}), **NETWORKS[name]}
    tables = preset.get("value_embeddings", 0)
    sizes = dict(n_layer=2 * max(1, tables), value_embeddings=tables)
    return script.GPT(shrunk_preset(name if name in script.base_configs else "d12",
                                    **{**NETWORKS[name], **sizes, **changes}))


def group_by_name(name, p):
    """The group that a parameter belongs to; a tied head has the embedding's name."""
    if re.fullmatch(r"transformer\.w[tp]e\.weight", name):
        return "embeddings"
    if re.fullmatch(r"value_embeddings\.\d+\.weight", name):
        return "values"
    if name == "lm_head.weight":
        return "head"
    if name == "smear.weight":
        return "scalars"
    assert re.match(r"(transformer\.h|mtp_blocks)\.\d+\.|transformer\.ln_f\.", name), name
    return "matrices" if p.dim() >= 2 else "scalars"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_group_with_its_rate_and_decay(name, tied):
    for changes in ({}, dict(bias=True, **EVERYTHING)):
        model = network(name, tie_embeddings=tied, **changes)
        expected = {id(p): group_by_name(n, p) for n, p in model.named_parameters()}
        assert tied == ("head" not in expected.values()) and {"embeddings", "matrices"} <= set(expected.values())
        groups = script.parameter_groups(model)
        assert sorted(id(p) for params in groups.values() for p in params) == sorted(expected)
        assert all(expected[id(p)] == group for group, params in groups.items() for p in params)
        for kind in script.OPTIMIZERS:
            rates = dict(RATES, head_lr=0.0) if tied else RATES
            optimizer = script.make_optimizer(model, small_run(optimizer=kind, weight_decay=0.3, **rates), CPU)
            assert len(optimizer.each) == 1 + (kind == "muon")
            found = [(id(p), type(one), row["lr"], row["weight_decay"])
                     for one in optimizer.each for row in one.param_groups for p in row["params"]]
            assert sorted(row[0] for row in found) == sorted(expected)  # each once, and AdamW's as Muon's
            for number, owner, rate, decay in found:
                group = expected[number]
                muons = kind == "muon" and group == "matrices"
                assert owner is (script.Muon if muons else torch.optim.AdamW)
                field = dict(embeddings="embedding_lr", values="value_lr", head="head_lr", scalars="scalar_lr",
                             matrices="muon_lr" if muons else "learning_rate")[group]
                assert rate == RATES[field]
                assert decay == (0.3 if muons or kind == "adamw" and group != "scalars" else 0.0)


def test_the_value_embeddings_have_the_embeddings_rate_unless_they_have_their_own():
    model = network("d12_fast")
    for own, rate in ((0.0, 0.15), (0.35, 0.35)):
        optimizer = script.make_optimizer(model, small_run(optimizer="muon", embedding_lr=0.15, value_lr=own), CPU)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert (rates["embeddings"], rates["values"]) == (0.15, rate)


def test_no_group_is_empty():
    for kind in script.OPTIMIZERS:
        optimizer = script.make_optimizer(script.GPT(small_config()), small_run(optimizer=kind), CPU)
        assert all(group["params"] for group in optimizer.param_groups)


def test_adamws_settings_reach_all_its_groups():
    model = network("d12_fast", tie_embeddings=False)
    run = small_run(optimizer="muon", beta1=0.7, beta2=0.8, adam_eps=1e-5, **RATES)
    adamw, muons = script.make_optimizer(model, run, CPU).each
    assert len(adamw.param_groups) == 4
    assert {(group["betas"], group["eps"]) for group in adamw.param_groups} == {((0.7, 0.8), 1e-5)}
    group, = muons.param_groups
    assert (group["momentum"], group["cautious"]) == (0.95, False)


def test_muons_settings_reach_muon():
    run = small_run(optimizer="muon", muon_momentum=0.6, cautious_weight_decay=True, weight_decay=0.25, muon_beta2=0.7)
    group, = script.make_optimizer(network("d12"), run, CPU).each[1].param_groups
    assert (group["momentum"], group["cautious"], group["weight_decay"], group["beta2"]) == (0.6, True, 0.25, 0.7)


@pytest.mark.parametrize("kind", script.OPTIMIZERS)
@pytest.mark.parametrize("step, factor", [(0, 0.25), (3, 1.0), (9, 1.0), (16, 1.0), (18, 0.55), (19, 0.325), (20, 0.1)])
def test_every_group_has_its_rate_times_the_schedules_factor(kind, step, factor):
    """Four steps of warm-up; the last four of twenty come down to a tenth."""
    model = network("d12_fast", tie_embeddings=False)
    schedule = dict(num_iterations=20, warmup_iters=4, warmdown_iters=4, min_lr_fraction=0.1)
    run = small_run(optimizer=kind, **schedule, **RATES)
    optimizer = script.make_optimizer(model, run, CPU)
    script.apply_plan(script.plan(step, model.config, run), model, optimizer)
    names = {id(p): group_by_name(name, p) for name, p in model.named_parameters()}
    own = dict(embeddings=0.15, values=0.35, head=0.03, scalars=0.02, matrices=0.025 if kind == "muon" else 0.004)
    rates = {names[id(group["params"][0])]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({name: rate * factor for name, rate in own.items()}, rel=1e-12)


def test_without_rates_of_their_own_all_groups_have_the_plans():
    """Exactly, so that what was trained before there were others is trained as it was."""
    model = network("d12_fast")
    for rate in (6e-4, 0.1, 1 / 3, 3e-3, 0.0):
        run = small_run(learning_rate=rate, warmup_iters=7)
        optimizer = script.make_optimizer(model, run, CPU)
        for step in range(run.num_iterations):
            scheduled = script.plan(step, model.config, run)
            script.apply_plan(scheduled, model, optimizer)
            assert {group["lr"] for group in optimizer.param_groups} == {scheduled.lr}
    run = small_run(optimizer="muon", learning_rate=0.3, muon_lr=0.3)
    optimizer = script.make_optimizer(model, run, CPU)
    script.apply_plan(script.Plan(lr=0.1, mtp_weight=0.0), model, optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.parametrize("last", [0.95, 0.86, 0.85, 0.5, 0.0])
def test_muons_momentum_warms_up(last):
    """From 0.85, unless it stays below."""
    run = small_run(num_iterations=1000, optimizer="muon", muon_momentum=last, momentum_warmup_steps=300)
    for step in (0, 1, 75, 150, 299, 300, 301, 1000, 5000):
        done = min(step, 300) / 300
        expected = last if last < 0.85 else 0.85 + done * (last - 0.85)
        assert script.plan(step, small_config(), run).momentum == pytest.approx(expected, abs=1e-12), step
    assert script.plan(300, small_config(), run).momentum == last
    if last > 0.85:
        rising = [script.plan(step, small_config(), run).momentum for step in range(301)]
        assert sorted(set(rising)) == rising
    without = small_run(num_iterations=1000, optimizer="muon", muon_momentum=last)
    assert {script.plan(step, small_config(), without).momentum for step in (0, 1, 999)} == {last}


def test_a_plans_momentum_reaches_muon_and_not_adamw():
    model, optimizer = with_muon(beta1=0.8)
    script.apply_plan(script.Plan(lr=0.1, mtp_weight=0.0, momentum=0.625), model, optimizer)
    adamw, muons = optimizer.each
    assert [group["momentum"] for group in muons.param_groups] == [0.625]
    assert all(group["betas"][0] == 0.8 and "momentum" not in group for group in adamw.param_groups)


# ----------------------------------------------------------------------------------------------------------------------
# Two optimizers as one, and their checkpoints


def test_one_state_has_both_in_the_order_of_the_groups():
    model, optimizer = with_muon()
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(parameters))) == sorted(state["state"])
    assert len(parameters) == len(list(model.parameters()))
    owners = {p: one for one in optimizer.each for p in one.state}
    for number, p in enumerate(parameters):
        assert_same(state["state"][number], dict(owners[p].state[p]))
    kinds = [set(state["state"][number]) for number in numbers]
    assert kinds == sorted(kinds, key=lambda kind: kind == {"momentum_buffer"})  # AdamW's come first
    assert {frozenset(kind) for kind in kinds} == {frozenset({"step", "exp_avg", "exp_avg_sq"}),
                                                   frozenset({"momentum_buffer"})}


def test_a_state_is_taken_over_and_the_groups_are_not():
    """A resumed run has the rates, the decay and the momentum of now."""
    (model, optimizer), (other, theirs) = with_muon(), with_muon(muon_momentum=0.5)
    give_gradients(model, 1)
    optimizer.step()
    saved, groups = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(theirs.state_dict()["param_groups"])
    theirs.load_state(copy.deepcopy(saved["state"]))
    assert_same(theirs.state_dict()["state"], saved["state"])
    assert_same(theirs.state_dict()["param_groups"], groups)
    assert theirs.param_groups[-1]["momentum"] == 0.5 != saved["param_groups"][-1]["momentum"]
    # It then goes on as the other does, where the groups are the same.
    other.load_state_dict(model.state_dict())
    theirs.param_groups[-1]["momentum"] = 0.95
    for each, its in ((model, optimizer), (other, theirs)):
        give_gradients(each, 2)
        its.step()
    assert_same(contents(model, optimizer)[0], contents(other, theirs)[0])
    assert_same(optimizer.state_dict()["state"], theirs.state_dict()["state"])


@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_what_a_state_is_like_is_known_before_it_is_there(beta2):
    model, optimizer = with_muon(muon_beta2=beta2)
    like = script.make_optimizer(model, small_run(optimizer="muon", muon_beta2=beta2), CPU).state_like()
    state = optimizer.state_dict()["state"]
    assert ("square_buffer" in state[len(state) - 1]) == (beta2 > 0)
    shapes = [{number: {name: value.shape for name, value in content.items()} for number, content in one.items()}
              for one in (like, state)]
    assert shapes[0] == shapes[1] and script.is_like(state, like)


def state_with_muon():
    """A TrainState after an update, and what a checkpoint would hold of it."""
    model, optimizer = with_muon()
    loader = SimpleNamespace(state_dict=lambda: dict(epoch=0, tokens=16))
    state = script.TrainState(model, optimizer, script.Numerics("fp32", CPU), loader)
    return state, dict(copy.deepcopy(state.state_dict(FakeWorld())), made_by={})


def changed_momentum(change):
    def of(moments, number):
        moments[number]["momentum_buffer"] = change(moments[number]["momentum_buffer"])

    return of


@pytest.mark.parametrize("damage", {
    "transposed": changed_momentum(lambda mean: mean.T.contiguous()),
    "flat": changed_momentum(torch.flatten),
    "with a row more": changed_momentum(lambda mean: torch.cat([mean, mean[:1]])),
    "of whole numbers": changed_momentum(torch.Tensor.long),
    "no tensor": changed_momentum(lambda mean: 0.0),
    "gone": lambda moments, number: moments[number].clear(),
    "with another beside it": lambda moments, number: moments[number].update(step=torch.tensor(1.0)),
    "AdamW's": lambda moments, number: moments.update({number: dict(
        step=torch.tensor(1.0), exp_avg=moments[number]["momentum_buffer"],
        exp_avg_sq=moments[number]["momentum_buffer"])}),
    "of the parameter before": lambda moments, number: moments.update({number: moments[number - 1]}),
}.items(), ids=lambda item: item[0])
def test_a_checkpoint_with_a_momentum_of_another_form_is_refused(damage):
    state, content = state_with_muon()
    assert state.can_load(content)
    moments = content["optimizer"]["state"]
    # The last one is a matrix that is not square, and the one before it is its transpose.
    assert moments[max(moments)]["momentum_buffer"].shape == moments[max(moments) - 1]["momentum_buffer"].T.shape
    damage[1](moments, max(moments))
    assert not state.can_load(content)


def test_a_checkpoint_before_muons_first_update_is_like_the_state():
    state, content = state_with_muon()
    moments = content["optimizer"]["state"]
    content["optimizer"]["state"] = {i: one for i, one in moments.items() if "momentum_buffer" not in one}
    assert content["optimizer"]["state"] and state.can_load(content)


# ----------------------------------------------------------------------------------------------------------------------
# Flags

NO_SHARDS = machine(vocab_size=0)
MUONS = ("--muon_lr 0.01", "--muon_momentum 0.9", "--momentum_warmup_steps 5", "--cautious_weight_decay")


def resolved(flags, base=None):
    return script.resolve(script.parse_flags(flags.split()), NO_SHARDS, base)


def refused(flags, base=None):
    with pytest.raises(script.ConfigError) as error:
        resolved(flags, base)
    return str(error.value)


def checkpoint_of(flags):
    """What resolve() takes as its base in a resume of such a run."""
    config, run, _ = resolved(flags)
    return script.checkpoint_fields(dict(network=dataclasses.asdict(config), run=dataclasses.asdict(run)))


@pytest.mark.parametrize("flags", MUONS)
def test_a_flag_of_muon_needs_muon(flags):
    field = flags.split()[0][2:]
    expected = f"{field} without optimizer=muon would be ignored; add --optimizer muon"
    assert refused(flags) == refused(f"{flags} --optimizer adamw") == expected
    assert refused(f"--model d12_fast --optimizer adamw {flags}") == expected
    value = getattr(resolved(f"{flags} --optimizer muon")[1], field)
    assert value == (True if flags.endswith("decay") else float(flags.split()[1]))
    run = resolved(flags, checkpoint_of("--optimizer muon"))[1]  # which the resumed run has
    assert (run.optimizer, getattr(run, field)) == ("muon", value)


def test_all_flags_that_need_muon_are_named_at_once():
    names = "muon_lr, muon_momentum, momentum_warmup_steps, cautious_weight_decay"
    assert refused(" ".join(MUONS)) == f"{names} without optimizer=muon would be ignored; add --optimizer muon"
    assert resolved("--muon_lr 0.02 --no_cautious_weight_decay")[1].optimizer == "adamw"  # they are so anyway


@pytest.mark.parametrize("flags, beginning, end", [
    ("--head_lr 0.1", "head_lr=0.1 would be ignored: the head is the embedding", "add --no_tie_embeddings"),
    ("--model d12_fast --tie_embeddings --head_lr 0.1", "head_lr=0.1 would be ignored", "add --no_tie_embeddings"),
    ("--optimizer muon --learning_rate 0", "learning_rate=0 with optimizer=muon: ", "type a rate above 0"),
    ("--embedding_lr 0.1 --scalar_lr 0.1 --learning_rate 0", "learning_rate=0 with embedding_lr, scalar_lr: ",
     "type a rate above 0"),
    ("--optimizer moun", "optimizer=moun is not known", "did you mean muon?"),
    ("--optimizer muon --muon_momentum 1", "muon_momentum=1.0 must be below 1", "are usual"),
    ("--optimizer muon --muon_lr -0.1", "muon_lr=-0.1 must be a finite number", "at least 0"),
    ("--warmdown_fraction 1.01", "warmdown_fraction=1.01 must be from 0 to 1", "0.5 is usual"),
    ("--warmdown_fraction 0.5 --warmdown_iters 500", "warmdown_iters and warmdown_fraction both say", "drop one"),
    ("--warmdown_fraction 0 --warmdown_iters 0", "warmdown_iters and warmdown_fraction both say", "drop one"),
    ("--warmdown_fraction 0.5 --schedule cosine", "warmdown_fraction=0.5 would be ignored: schedule=cosine",
     "drop one of the two"),
    ("--model d12_fast --warmdown_fraction 0.5 --schedule cosine", "warmdown_fraction=0.5 would be ignored",
     "drop one of the two"),
])
def test_what_is_refused(flags, beginning, end):
    said = refused(flags)
    assert said.startswith(beginning) and said.endswith(end) and "\n" not in said


def test_a_rate_of_the_head_is_taken_where_it_has_a_matrix():
    assert resolved("--no_tie_embeddings --head_lr 0.1")[1].head_lr == 0.1
    assert resolved("--head_lr 0")[1].head_lr == 0.0
    assert resolved("--learning_rate 0")[1].learning_rate == 0.0  # a run that only validates


@pytest.mark.parametrize("fraction, steps, warmup, expected", [
    (0, 10, 0, 0), (1, 10, 0, 10), (1, 10, 3, 7), (1, 10, 10, 0), (0.5, 10, 5, 5), (0.5, 10, 6, 4), (0.6, 1100, 0, 660),
    (0.04, 10, 0, 0), (0.06, 10, 0, 1), (0.999, 10, 0, 10), (1, 1, 0, 1), (0.5, 1, 1, 0),
])
def test_a_share_of_the_run_is_so_many_steps(fraction, steps, warmup, expected):
    """The nearest whole number, without those of the warm-up."""
    _, run, notes = resolved(f"--warmdown_fraction {fraction} --num_iterations {steps} --warmup_iters {warmup}")
    assert run.warmdown_iters == expected
    cut = f", as far as warmup_iters={warmup} leaves it" * (round(fraction * steps) > steps - warmup)
    assert f"warmdown_iters={expected}: {fraction} of num_iterations={steps}{cut}" in notes


def test_a_share_of_a_resumed_run_is_of_its_new_length():
    base = checkpoint_of("--num_iterations 100 --warmdown_iters 10")
    assert resolved("--num_iterations 200", base)[1].warmdown_iters == 10
    assert resolved("--num_iterations 200 --warmdown_fraction 0.25", base)[1].warmdown_iters == 50


RECIPE = {name: value for name, value in script.preset("d12_fast")[1].items() if name != "precision"}
NO_MUON = {f.name: f.default for f in dataclasses.fields(script.TrainConfig)
           if "muon" in f.name or f.name in ("momentum_warmup_steps", "cautious_weight_decay")}


def fields_of(run):
    """A run's fields, and what makes two of them."""
    return dict(dataclasses.asdict(run), tokens_per_step=run.tokens_per_step,
                warmdown_fraction=run.warmdown_iters / run.num_iterations)


def test_a_run_begins_with_its_presets_recipe():
    assert fields_of(resolved("--model d12_fast")[1]).items() >= RECIPE.items()
    assert resolved("--model d12_fast")[1].warmdown_iters == 1200
    assert resolved("--model d12_fast --num_iterations 200")[1].warmdown_iters == 120
    assert resolved("--model d12_fast --batch_size 4 --sequence_length 512")[1].grad_accumulation_steps == 32


def test_recipes_are_of_presets_and_of_fields_that_there_are():
    known = {f.name for cls in (script.TrainConfig, script.Shorthand) for f in dataclasses.fields(cls)}
    for _, recipe in script.fast_presets.values():
        assert recipe.keys() - {"tokens_per_step", "precision"} <= known
    for name in script.base_configs.keys() - script.fast_presets.keys():  # the others change nothing of a run
        assert fields_of(resolved(f"--model {name}")[1]) == dict(fields_of(resolved("")[1]), model=name)


@pytest.mark.parametrize("flags, expected", [
    ("--muon_lr 0.01", dict(muon_lr=0.01)), ("--learning_rate 0.01", dict(learning_rate=0.01)),
    ("--embedding_lr 0.01", dict(embedding_lr=0.01)), ("--scalar_lr 0", dict(scalar_lr=0.0)),
    ("--value_lr 0.2", dict(value_lr=0.2)),
    ("--momentum_warmup_steps 0", dict(momentum_warmup_steps=0)), ("--beta1 0.7", dict(beta1=0.7)),
    ("--no_cautious_weight_decay", dict(cautious_weight_decay=False)), ("--adam_eps 1e-8", dict(adam_eps=1e-8)),
    ("--grad_clip 1", dict(grad_clip=1.0)), ("--total_batch_size 131072", dict(tokens_per_step=131072)),
    ("--grad_accumulation_steps 4", dict(tokens_per_step=4 * 8 * 1024)),
    ("--num_iterations 100", dict(num_iterations=100)), ("--warmdown_fraction 0.25", dict(warmdown_fraction=0.25)),
    ("--warmdown_iters 200", dict(warmdown_fraction=0.1)), ("--min_lr_fraction 0", dict(min_lr_fraction=0.0)),
    ("--schedule cosine", dict(schedule="cosine", warmdown_fraction=0.0)),
    ("--optimizer adamw", dict(optimizer="adamw", **NO_MUON)),
    ("--optimizer adamw --warmdown_iters 200", dict(optimizer="adamw", warmdown_fraction=0.1, **NO_MUON)),
])
def test_what_is_typed_wins_over_the_recipe(flags, expected):
    """And over nothing else of it."""
    assert fields_of(resolved(f"--model d12_fast {flags}")[1]).items() >= {**RECIPE, **expected}.items()


@pytest.mark.parametrize("place, precision", [
    (dict(has_fp8=True), "fp8_head"), (dict(has_fp8=False), "bf16"), (dict(has_fp8=False, has_bf16=False), "fp32"),
    (dict(device_type="cpu", has_fp8=False, has_bf16=False), "fp32"),
])
def test_the_head_is_float8_where_the_gpu_has_it(place, precision):
    machine = script.ANY_MACHINE._replace(**place)
    for name in ("d12_fast", "d6_fast"):
        assert script.resolve(dict(model=name), machine)[0].precision == precision
        assert script.resolve(dict(model=name, precision="bf16"), machine)[0].precision == "bf16"
    begun = checkpoint_of("--model d12_fast")
    assert begun["precision"] == "fp8_head"
    with pytest.raises(script.ConfigError, match="precision=fp8_head needs a GPU with float8"):
        script.resolve({}, machine._replace(has_fp8=False), begun)


def test_a_recipe_does_not_reach_a_resume():
    """Not even where the preset is typed again: the run goes on with what it had."""
    base = checkpoint_of("--model d12_fast --muon_lr 0.01 --num_iterations 50 --warmdown_iters 7 --grad_clip 2 "
                         "--total_batch_size 16384 --scalar_lr 0.03")
    for flags in ("", "--model d12_fast"):
        config, run, _ = resolved(flags, base)
        assert dict(dataclasses.asdict(run), tokens_per_step=run.tokens_per_step).items() >= {
            name: value for name, value in base.items() if hasattr(run, name)}.items()
        assert (run.muon_lr, run.warmdown_iters, run.tokens_per_step, config.n_layer) == (0.01, 7, 16384, 12)
    assert resolved("--muon_lr 0.5", base)[1].muon_lr == 0.5
    before = checkpoint_of("--model d12")  # a run of another preset gets no recipe from a resume either
    assert resolved("--model d12_fast", before)[1].optimizer == "adamw"


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

NETWORK = ("--model d12_fast --n_layer 6 --n_head 2 --n_embd 64 --value_embeddings 2 --document_mask "
           "--smear embedding+attention+mlp --attention_gate 7 --value_lr 0.2").split()
RUN = "--total_batch_size 64 --momentum_warmup_steps 4 --muon_lr 0.03 --muon_beta2 0.9 --min_lr_fraction 0".split()


@pytest.fixture
def documents(trainer):
    """A trainer whose shards hold documents of about a dozen tokens."""
    for i, path in enumerate(sorted(trainer.data.glob("*.bin"))):
        tokens = some_tokens(200, i)
        tokens[5 + i :: 13] = 256
        write_shard(path, tokens)
    return trainer


def assert_same_end(a, b, last):
    for name in ("train_loss", "lr", "grad_norm", "tokens"):
        assert column(steps(a), name) == column(steps(b), name), name
    assert column(validations(a), "val_loss") == column(validations(b), "val_loss")
    contents = content_of(a, last), content_of(b, last)
    for part in ("model", "optimizer", "loader", "rng", "step"):
        assert_same(contents[0][part], contents[1][part], part)


def test_a_resumed_run_is_the_run_bit_for_bit(documents):
    """Interrupted while momentum and rate still change: weights, momentum and losses."""
    whole = documents.run(*NETWORK, *RUN, "--num_iterations", 7, "--save_every", 3).folder
    part = documents.copy_of(whole, "interrupted")
    for name in checkpoints(part)[1:]:
        (part / name).unlink()
    result = documents.main("--resume", part / "step000003.pt")
    assert (result.code, result.err) == (0, "")
    assert_same_end(whole, part, 7)
    early, late = content_of(whole, 3), content_of(whole, 7)
    moments = late["optimizer"]["state"]
    means = {i: one["momentum_buffer"] for i, one in moments.items() if "momentum_buffer" in one}
    assert len(means) == 6 * 4 and len(moments) + 1 == len(late["model"])  # tied: one has two names
    for i, mean in means.items():  # so that equality says something
        assert not torch.equal(mean, early["optimizer"]["state"][i]["momentum_buffer"])
    assert not [name for name, weight in late["model"].items() if torch.equal(weight, early["model"][name])]
    assert len(set(column(steps(whole), "train_loss"))) == 7
    momenta = [content["optimizer"]["param_groups"][-1]["momentum"] for content in (early, late)]
    assert momenta == pytest.approx([0.85 + 0.1 * 2 / 4, 0.95])


def test_a_run_made_longer_is_the_long_run_bit_for_bit(documents):
    """With the preset typed again, whose recipe has other rates."""
    flags = [*NETWORK, "--warmdown_iters", 0]
    whole = documents.run(*flags, *RUN, "--num_iterations", 6).folder
    half = documents.run(*flags, *RUN, "--num_iterations", 3).folder
    again = [*NETWORK, "--num_iterations", 6, "--output_dir", documents.output]
    result = documents.main("--resume", half / "step000003.pt", *again)
    assert (result.code, result.err, result.folder) == (0, "", None)
    assert "num_iterations=6, was 3" in result.out and "muon_lr=" not in result.out
    assert_same_end(whole, half, 6)


def test_a_checkpoint_with_a_momentum_of_another_form_is_refused_in_a_line(documents):
    folder = documents.run("--optimizer", "muon", "--n_layer", 1, "--num_iterations", 4).folder
    path, content = folder / "step000004.pt", content_of(folder, 4)
    moments = content["optimizer"]["state"]
    mean = moments[max(moments)]["momentum_buffer"]
    moments[max(moments)]["momentum_buffer"] = mean.T.contiguous()
    script.write_checkpoint(path, content)
    result = documents.main("--resume", path)
    assert result.code == 2 and result.err == (f"error: {path} does not hold the state of a run of its own network; "
                                               "name another\n")


# In float64: what two processes add up in another order differs by little more than 1e-16.
TWO = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import train_gpt2_mod as script
from test_muon import steps_of_few_matrices

plain, found = script.train_step, {{}}

def train_step(model, state, *others):
    if state.step == 0:
        found["few"] = steps_of_few_matrices()
    result = plain(model, state, *others)
    found.update(model=dict(state.model.state_dict()), optimizer=state.optimizer.state_dict())
    return result

script.train_step = train_step
code = script.main(sys.argv[1:])
torch.save(found, "rank " + os.environ["RANK"])
sys.exit(code)
"""


def steps_of_few_matrices():
    """The weights after steps of one to five matrices of a shape: fewer than processes, as many, and no multiple."""
    found = []
    for count in (1, 2, 3, 5):
        parameters = random_parameters([(4, 6)] * count + [(6, 4)], dtype=torch.float64, seed=count)
        take_steps(muon(parameters), parameters, random_gradients(parameters, steps=2))
        found.append([p.detach() for p in parameters])
    return found


def test_two_processes_are_one(float64, documents, tmp_path):
    """Losses and weights to rounding; the two hold the same bits. Of 9 matrices of a shape one has 5 and one 4, of a
    single one nothing is left for the second."""
    few = steps_of_few_matrices()
    flags = ["--optimizer", "muon", "--n_layer", 3, "--mlp", "swiglu", "--mlp_expansion_factor", 2, "--n_kv_head", 1,
             "--muon_lr", 0.03, "--cautious_weight_decay", "--momentum_warmup_steps", 4, "--no_tie_embeddings",
             "--grad_accumulation_steps", 2]
    one = documents.run(*flags).folder
    program, documents.output = tmp_path / "two.py", tmp_path / "two"
    program.write_text(TWO)
    result = torchrun(program, *documents.flags(*flags), cwd=tmp_path)
    assert result.returncode == 0 and "2 processes on cpu" in result.stdout, result.stderr
    two, = runs_in(documents.output)
    for name in ("train_loss", "grad_norm", "lr", "tokens"):
        assert column(steps(two), name) == pytest.approx(column(steps(one), name), rel=1e-9, abs=1e-9), name
    assert column(validations(two), "val_loss") == pytest.approx(column(validations(one), "val_loss"), abs=1e-9)
    ranks = [torch.load(tmp_path / f"rank {rank}", weights_only=True) for rank in (0, 1)]
    assert_same(ranks[0], ranks[1])
    ends = content_of(one, 6), content_of(two, 6)
    assert_same(ends[1]["model"], ranks[0]["model"])
    for name, weight in ends[0]["model"].items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(ends[1]["model"][name], weight, rtol=0, atol=1e-9)
    for number, moments in ends[0]["optimizer"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(ends[1]["optimizer"]["state"][number][name], value, rtol=0, atol=1e-9)
    for ours, theirs in zip(few, ranks[1]["few"]):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)


@pytest.mark.parametrize("begun, wanted", [("adamw", "muon"), ("muon", "adamw")])
def test_a_resume_with_another_optimizer_is_refused_by_name(trainer, begun, wanted):
    path = trainer.run("--optimizer", begun).folder / "step000006.pt"
    for flags in ([], ["--dry_run"]):
        result = trainer.main("--resume", path, "--num_iterations", 8, "--optimizer", wanted, *flags)
        assert result.code == 2 and result.err.count("\n") == 1
        assert f"optimizer={wanted}, and {path.resolve()} holds the state of {begun}; drop the flag" in result.err


@pytest.mark.parametrize("begun, wanted", [("0.0", "0.9"), ("0.9", "0.0")])
def test_a_resume_with_squares_that_are_not_there_is_refused_by_name(trainer, begun, wanted):
    path = trainer.run("--optimizer", "muon", "--muon_beta2", begun).folder / "step000006.pt"
    result = trainer.main("--resume", path, "--num_iterations", 8, "--muon_beta2", wanted)
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"muon_beta2={wanted}, and {path.resolve()} holds the state of {begun}; drop the flag" in result.err
    trainer.run("--resume", path, "--num_iterations", 8, *(["--muon_beta2", "0.5"] if begun != "0.0" else []))


@pytest.mark.parametrize("flags", [
    "--warmdown_iters 0", "--warmdown_fraction 0", "--num_iterations 9 --warmup_iters 9"])
def test_a_presets_floor_of_the_rate_gives_way_where_nothing_falls(flags):
    _, run, _ = script.resolve(script.parse_flags(["--model", "d12_fast", *flags.split()]), script.ANY_MACHINE)
    assert (run.warmdown_iters, run.min_lr_fraction) == (0, 0.0)
    with pytest.raises(script.ConfigError, match="min_lr_fraction=0.2 would be ignored"):
        script.resolve(script.parse_flags(["--model", "d12_fast", "--min_lr_fraction", "0.2", *flags.split()]),
                       script.ANY_MACHINE)


def test_a_runs_log_has_its_rates_and_its_momentum(trainer):
    flags = "--optimizer muon --muon_lr 0.04 --embedding_lr 0.25 --momentum_warmup_steps 4".split()
    result = trainer.run(*flags)
    assert "learning rates: embeddings 0.25, matrices (Muon) 0.04" in result.out
    found = column(steps(result.folder), "momentum")
    assert found == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    plain = trainer.run()
    assert "learning rates:" not in plain.out and "momentum" not in (plain.folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("flag", ["--zero_init", "--embd_init_std 1", "--init_std 0.02"])
def test_weights_that_come_from_a_file_have_no_start_of_their_own(trainer, flag):
    path = trainer.run().folder / "step000006.pt"
    result = trainer.main("--init_from", path, *flag.split())
    name = flag.split()[0].removeprefix("--")
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"{name} would be ignored: the weights come from --init_from" in result.err
