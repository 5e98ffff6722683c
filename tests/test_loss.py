"""The head's loss, done part by part with its gradient, against torch's cross_entropy on all logits at once."""
import itertools
import math
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, shrunk_preset, small_config

import train_gpt2_mod as script


def head_loss(x, weight, targets, shares, **settings):
    return script.HeadLoss.apply(x, weight, targets, shares, script.LossSettings(**settings))


def whole(x, weight, targets, shares, clamp=0.0, softcap=0.0):
    """The same from torch's functions, on all logits."""
    logits, loss = x @ weight.T, 0.0
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    for target, share in zip(targets, shares):
        losses = F.cross_entropy(logits, target, ignore_index=script.IGNORED, reduction="none")
        losses = losses.clamp(max=clamp) if clamp else losses
        loss = loss + share * losses.sum() / (target != script.IGNORED).sum()
    return loss


def example(N, C, V, K, dtype=torch.float64, ignored=0.3):
    """x, weight, targets, shares of N tokens, a third of the targets IGNORED."""
    generator = torch.Generator().manual_seed(N + V)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(V, (K, N), generator=generator)
    targets[torch.rand(K, N, generator=generator) < ignored] = script.IGNORED
    return normal(N, C), normal(V, C), targets, torch.rand(K, dtype=torch.float64, generator=generator) + 0.1


def gradients_of(loss, x, weight):
    return torch.autograd.grad(3 * loss, (x, weight))


@pytest.mark.parametrize("clamp, softcap", [(0.0, 0.0), (9.0, 0.0), (0.0, 5.0), (6.0, 4.0)])
@pytest.mark.parametrize("N, C, V", [(1, 8, 2), (77, 24, 61), (100, 16, 300), (64, 7, 128)])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("numbers", [1, 2000, 10**6])
def test_loss_and_gradients_are_those_of_all_logits(numbers, K, N, C, V, clamp, softcap):
    x, weight, targets, shares = example(N, C, V, K, ignored=0.3 if N > 1 else 0)
    found = head_loss(x, weight, targets, shares, clamp=clamp, softcap=softcap, logits_at_once=numbers)
    expected = whole(x, weight, targets, shares, clamp, softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients_of(found, x, weight), gradients_of(expected, x, weight)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    x, weight, targets, shares = example(33, 3, 11, 2)
    assert torch.autograd.gradcheck(
        lambda x, weight: head_loss(x, weight, targets, shares, softcap=3.0, logits_at_once=16 * 11), (x, weight))


def test_a_token_at_the_clamp_has_no_gradient():
    logits = 4 * torch.randn(21, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 11, (1, 21), generator=torch.Generator().manual_seed(2))
    targets[0, 2:5] = targets[0, 20] = script.IGNORED
    gradient = torch.full_like(logits, math.nan)
    losses = script.softmax_losses(logits, targets, torch.tensor([0.5], dtype=torch.float64), 11, 3.0, 0.0, gradient)
    capped = 0
    for row, target in enumerate(targets[0].tolist()):
        p = logits[row].softmax(-1)
        nats = -math.log(p[target]) if target != script.IGNORED else 0.0
        capped += nats >= 3
        assert losses[0, row].item() == pytest.approx(min(nats, 3.0), abs=1e-12)
        counts = target != script.IGNORED and nats < 3
        expected = 0.5 * (p - F.one_hot(torch.tensor(target), 11)) if counts else torch.zeros(11)
        torch.testing.assert_close(gradient[row], expected.double(), rtol=0, atol=1e-12)
    assert 0 < capped < 17


def test_a_high_clamp_and_a_high_softcap_are_none():
    x, weight, targets, shares = example(40, 8, 61, 1)
    plain = head_loss(x, weight, targets, shares)
    torch.testing.assert_close(head_loss(x, weight, targets, shares, clamp=1e6), plain)
    torch.testing.assert_close(head_loss(x, weight, targets, shares, softcap=1e6), plain)


def test_targets_that_are_all_ignored_have_no_mean():
    x, weight, targets, shares = example(10, 8, 61, 1)
    targets.fill_(script.IGNORED)
    assert head_loss(x, weight, targets, shares).isnan()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_rows_that_pad_the_head_are_neither_predicted_nor_trained(monkeypatch, softcap):
    """All true logits are below 0, which is what a row of zeros gives."""
    x, weight, targets, shares = example(50, 8, 61, 1)
    x, weight = x.abs().detach().requires_grad_(), (-weight.abs()).detach().requires_grad_()
    shapes, pad_to = [], script.pad_to

    def padded(z, columns, rows=1):
        shapes.append(pad_to(z, columns, 128).shape)
        return pad_to(z, columns, 128)

    monkeypatch.setattr(script, "pad_to", padded)
    found = head_loss(x, weight, targets, shares, softcap=softcap, logits_at_once=61 * 16)
    assert shapes == [(128, 8)]
    expected = whole(x, weight, targets, shares, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients_of(found, x, weight), gradients_of(expected, x, weight)):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows, most, sizes", [
    (64, 10**6, [64]), (64, 32, [32, 32]), (64, 31, [32, 32]), (65, 32, [32, 32, 1]), (5, 0, [5]), (33, 0, [16, 16, 1]),
    (65536, 2**30 // 50257, [16384] * 4), (131072, 2**30 // 50257, [18736] * 6 + [18656]),
])
def test_the_parts_are_equal_and_small(rows, most, sizes):
    slices = list(script.parts_of(rows, most))
    assert [part.stop - part.start for part in slices] == sizes
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))


@pytest.mark.parametrize("gradient", [True, False])
def test_of_the_logits_no_more_than_a_part_is_ever_there(monkeypatch, gradient):
    alive, logits_of = [], script.HeadProducts.logits

    def logits(self, rows):
        assert not any(tensor() is not None for tensor in alive)
        result = logits_of(self, rows)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(script.HeadProducts, "logits", logits)
    x, weight, targets, shares = example(100, 8, 61, 2)
    loss = head_loss(x, weight, targets, shares, gradient=gradient, logits_at_once=32 * 61)
    assert len(alive) == 4 and not any(tensor() is not None for tensor in alive)
    torch.testing.assert_close(loss, whole(x, weight, targets, shares))


def test_nothing_is_kept_where_no_gradient_is_wanted():
    model = script.GPT(small_config())
    idx, targets = batch_of(model.config)
    with torch.no_grad():
        loss = model(idx, targets, return_logits=False)[1]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, model(idx, targets, return_logits=False)[1].detach())


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 6e-3), (torch.float16, 8e-4), (torch.float32, 1e-6)])
def test_gradients_in_few_bits_are_as_near_as_the_bits(dtype, most):
    """Each token's part of the mean, 1/4096, is far below what fp16 holds beside 1: it must not be in the products."""
    x, weight, targets, shares = example(4096, 32, 61, 2)
    low = [z.detach().to(dtype).requires_grad_() for z in (x, weight)]
    rounded = [z.detach().double().requires_grad_() for z in low]
    exact = gradients_of(whole(*rounded, targets, shares), *rounded)
    low[1] = rounded[1].detach().float().requires_grad_()  # weights are fp32 wherever products are not
    loss = head_loss(*low, targets, shares, logits_at_once=61 * 512)
    expected = whole(*rounded, targets, shares).item()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=most)
    found = gradients_of(loss, *low)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert all(error(ours, theirs) < most for ours, theirs in zip(found, exact))


@pytest.mark.parametrize("N, C, V, K", [(64, 32, 128, 1), (75, 24, 61, 3)])
def test_float8_gradients_are_as_near_as_their_formats(N, C, V, K):
    """Independent errors, uniform in half a unit of the last place: e4m3 has 4 significant bits, e5m2 has 3."""
    x, weight, targets, shares = example(N, C, V, K, torch.float32)
    x, weight, shares = (0.5 * x).detach().requires_grad_(), (0.2 * weight).detach().requires_grad_(), 10 * shares
    exact = [z.detach().double().requires_grad_() for z in (x, weight)]
    expected = whole(*exact, targets, shares)
    loss = head_loss(x, weight, targets, shares, fp8=True, logits_at_once=V * 32)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3) and loss.item() != expected.item()
    limit = math.sqrt((4**-3 + 4**-4 + 2 * 4**-4) / 3)  # the product's two operands, and the logits that made one
    for ours, theirs in zip(gradients_of(loss, x, weight), gradients_of(expected, *exact)):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        assert 1e-3 < error(ours, theirs) < limit


# ----------------------------------------------------------------------------------------------------------------------
# In the network

NETWORKS = [
    ("d12", {}), ("gpt2", {}), ("sized", {}), ("d12_mla", {}), ("d12_post_norm_qk_norm", {}),
    ("d12", dict(mtp_enabled=True, mtp_max_steps=3)), ("d12", dict(tie_embeddings=False, logit_softcap=3.0)),
    ("d12_gqa", dict(mtp_enabled=True, mtp_max_steps=3, mtp_heads="separate", logit_softcap=2.0)),
    ("d12", dict(loss_clamp=4.5)),
]


@pytest.mark.parametrize("preset, changes", NETWORKS)
def test_every_variants_gradient_is_that_of_its_logits(float64, preset, changes):
    config = shrunk_preset(preset, **{"dropout": 0.0, **changes})
    model = script.GPT(config)
    model.loss_parts = dict(logits_at_once=61 * 16)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # so that softcap and clamp bite
    idx, targets = batch_of(config, B=4, T=12)
    targets = {name: target.clone() for name, target in targets.items()}
    for target in targets.values():
        target[0, :5] = script.IGNORED

    def plain_loss():
        streams = model.trunk(idx, 3 if config.mtp_heads == "separate" else 1)
        losses = []
        for k in range(1, config.lookahead + 1):
            stream = streams[k - 1] if len(streams) > 1 else streams[0]
            logits, target = stream @ model.lm_head.weight.T, targets[f"target_{k}"].flatten()
            if config.logit_softcap:
                logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
            each = F.cross_entropy(logits.flatten(0, 1), target, ignore_index=script.IGNORED, reduction="none")
            each = each.clamp(max=config.loss_clamp) if config.loss_clamp else each
            losses.append(each.sum() / (target != script.IGNORED).sum())
        return losses[0] + config.mtp_weight * sum(losses[1:]) / max(1, len(losses) - 1)

    expected = plain_loss()
    names, weights = zip(*model.named_parameters())
    theirs = torch.autograd.grad(expected, weights)
    main, aux = model(idx, targets, return_logits=False, return_loss_components=True)[1]
    total = main if aux is None else main + model.mtp_weight_buffer * aux
    for loss in (model(idx, targets, return_logits=False)[1], model(idx, targets)[1], total):
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        for name, ours, other in zip(names, torch.autograd.grad(loss, weights), theirs):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("cap", [1e-300, 0.5, -5.0, math.inf])
def test_a_softcap_that_learns_nothing_is_refused(cap):
    with pytest.raises(script.ConfigError, match="logit_softcap"):
        small_config(logit_softcap=cap)


def test_a_second_derivative_is_refused():
    x, weight, targets, shares = example(20, 8, 61, 1)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(head_loss(x, weight, targets, shares), x, create_graph=True)


def test_the_softcap_bounds_the_logits(float64):
    model = script.GPT(small_config(logit_softcap=2.0))
    free = script.GPT(small_config())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    free.load_state_dict(model.state_dict())
    idx, _ = batch_of(model.config)
    capped, plain = model(idx)[0], free(idx)[0]
    assert plain.abs().max() > 2.2 and capped.abs().max() < 2
    torch.testing.assert_close(capped, 2 * torch.tanh(plain / 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["d12", "gpt2", "sized", "d12_mla", "d12_post_norm"])
def test_the_stream_is_bf16_where_products_are(preset):
    model = script.GPT(shrunk_preset(preset, dropout=0.0))
    idx, _ = batch_of(model.config)
    seen, hooks = [], []
    for block in model.transformer.h:
        hooks.append(block.register_forward_hook(lambda _, args, y: seen.extend((args[0].dtype, y.dtype))))
    for dtype, stream in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (None, torch.float32)):
        seen.clear()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), torch.no_grad():
            model.trunk(idx)
        assert len(seen) == 2 * len(hooks) and set(seen) == {stream}


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_a_norms_weights_count_in_full_on_a_bf16_stream(kind):
    """1.001 is 1 in bf16."""
    norm, x = script.Norm(kind, 256), torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        plain = norm(x)
        norm.weight.fill_(1.001)
        grown = norm(x)
    assert plain.dtype == grown.dtype == torch.bfloat16
    assert (grown.double().norm() / plain.double().norm()).item() == pytest.approx(1.001, abs=3e-4)


def test_bf16_losses_stay_near_those_of_fp32():
    """A run in small: the same batches, 40 steps; what bf16 changes is far below what training does."""
    curves = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(1)
        model = script.GPT(small_config(n_layer=3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step, (idx, targets) in zip(range(40), itertools.repeat(batch_of(model.config, B=8, T=32))):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                loss = model(idx, targets, return_logits=False)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    exact, low = curves
    assert exact[0] - exact[-1] > 1 and max(abs(a - b) for a, b in zip(exact, low)) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# The kernel that may be missing


def parallelized(monkeypatch, lines):
    """loss_parts of a model that is made ready for CUDA, where there is none."""
    monkeypatch.setattr(script, "why_no_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    model = script.GPT(small_config())
    world = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), size=1)
    run = types.SimpleNamespace(compile=None, compile_mode="default", parallel="ddp")
    script.parallelize(model, run, world, types.SimpleNamespace(text=lines.append))
    return model.loss_parts


def test_the_kernel_is_taken_on_cuda(monkeypatch):
    lines, kernel = [], object()
    monkeypatch.setattr(script, "fused_softmax_losses", lambda device: kernel)
    parts = parallelized(monkeypatch, lines)
    assert parts["softmax_losses"] is kernel and parts["logits_at_once"] == 2**30 and not lines


def test_a_script_alone_trains_without_the_kernel(monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(script, "KERNEL", tmp_path / "fused_softmax.py")
    parts = parallelized(monkeypatch, lines)
    assert "softmax_losses" not in parts and "logits_at_once" not in parts
    assert lines == ["the loss takes several kernels, and more time: there is no fused_softmax.py beside "
                     "train_gpt2_mod.py"]


def test_without_triton_or_with_one_that_fails_training_goes_on(monkeypatch):
    lines = []
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "softmax_losses" not in parallelized(monkeypatch, lines)

    def broken(device):
        raise RuntimeError("too many threads\nand a page more")

    monkeypatch.setattr(script, "fused_softmax_losses", broken)
    assert "softmax_losses" not in parallelized(monkeypatch, lines)
    assert "triton" in lines[0] and lines[1].endswith("more time: too many threads")


def test_what_a_gradient_is_multiplied_by_is_not_rounded_to_its_bits():
    x = torch.randn(1000).bfloat16()
    factor = torch.tensor(1 / 3)
    assert factor.bfloat16() != factor
    found, wide = script.multiplied(factor, x, x.float())
    assert torch.equal(found, (x.double() / 3).bfloat16()) and torch.equal(wide, x.float() * factor)
