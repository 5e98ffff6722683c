"""The Triton kernel of the loss against the plain function: on a GPU where there is one, else in Triton's interpreter,
which runs one thread at a time and so sees no missing barrier."""
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from test_loss import example, gradients_of, head_loss, whole

import train_gpt2_mod as script

pytest.importorskip("triton")  # which PyPI has for Linux alone
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy warns of overflow and NaN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 11 if DEVICE == "cpu" else 3001  # several of each program, and a remainder
CASES = [  # K, V, columns, clamp, softcap
    (1, 61, 64, 0.0, 0.0), (1, 300, 384, 0.0, 0.0), (3, 300, 304, 0.0, 0.0), (4, 61, 61, 0.0, 0.0), (1, 7, 7, 4.0, 0.0),
    (3, 61, 64, 6.0, 3.0), (1, 300, 384, 0.0, 15.0), (1, 61, 64, 0.0, 40.0), (1, 7, 40, 0.0, 1.0),
    (1, 61, 64, 0.0, 41.0),
    (1, 61, 64, 0.0, 1e6),
    *([(1, 50257, 50304, 0.0, 0.0), (4, 50257, 50304, 0.0, 15.0)] if DEVICE == "cuda" else []),
]


@pytest.fixture
def softmax_losses(monkeypatch):
    """That of the module, with blocks that fit small rows."""
    function = script.fused_softmax_losses(torch.device(DEVICE))
    if DEVICE == "cpu":
        monkeypatch.setitem(function.func.__globals__, "BLOCK", 64)
    return function


def logits_and_targets(K, V, columns, dtype, n=ROWS):
    """Rows with some targets IGNORED, some the same at several offsets, and one row whose logits are far from 0."""
    logits = 4 * torch.randn(n, columns)
    logits[2] += 150
    logits[3] -= 150
    logits[:, V:] = 0
    targets = torch.randint(V, (K, n))
    targets[:, 4] = script.IGNORED
    targets[-1, 5] = script.IGNORED
    targets[:, 6] = V - 1
    return logits.to(DEVICE, dtype), targets.to(DEVICE), torch.rand(K, device=DEVICE).softmax(0)


@pytest.mark.parametrize("K, V, columns, clamp, softcap", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_the_plain_ones(softmax_losses, K, V, columns, clamp, softcap, dtype):
    logits, targets, weights = logits_and_targets(K, V, columns, dtype)
    expected, expected8 = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.float8_e5m2)
    losses = script.softmax_losses(logits, targets, weights, V, clamp, softcap, expected, expected8)
    bent = softcap * (logits[:, :V].double() / softcap).tanh() if softcap else logits[:, :V].double()
    shares = F.pad(bent.softmax(-1), (0, columns - V)).float() * weights.sum()
    eps = max(torch.finfo(dtype).eps, 1e-5)
    exact = None
    for with8 in (False, True):
        approximate = DEVICE == "cuda" and with8 and 0 < softcap <= 40  # the GPU's tanh, to 2^-11 of each logit
        into, into8 = logits.clone(), torch.full_like(expected8, math.nan) if with8 else None
        found = softmax_losses(into, targets, weights, V, clamp, softcap, into, into8)
        exact = found if exact is None else exact
        torch.testing.assert_close(found, losses, rtol=1e-6, atol=softcap / 1024 if approximate else 1e-5)
        # Of p (1 - y^2), the gradient where no target is, tanh's error is as much as 2^-10 p where y is near 1 or -1.
        slack = shares / 512 if approximate else 0
        assert ((into - expected).float().abs() <= (0.05 if approximate else eps) * expected.abs() + slack + 2e-6).all()
        assert not into[:, V:].any()
        if with8:
            # Where rounding carries into the exponent, Triton's interpreter (3.9) gives half of what there should be.
            rtol = 0.25 if DEVICE == "cuda" else 0.5
            apart = (into8.float() - expected8.float()).abs()
            assert (apart <= rtol * expected8.float().abs() + script.FLOAT8_GRADIENT_SCALE * slack + 1e-4).all()
    torch.testing.assert_close(softmax_losses(logits, targets, weights, V, clamp, softcap), exact, rtol=0, atol=0)


def test_a_program_takes_several_rows(softmax_losses):
    logits, targets, weights = logits_and_targets(1, 61, 64, torch.float32)
    known = softmax_losses.func.__globals__
    assert 3 * known["ROWS_AT_ONCE"] * known["multiprocessors"](logits.device) < len(logits)
    losses = softmax_losses(logits.clone(), targets, weights, 61, 0.0, 0.0)
    assert (losses[:, 4] == 0).all() and (losses != 0).sum() == len(logits) - 2


@pytest.mark.parametrize("where", ["x", "weight"])
def test_logits_that_are_no_number_give_a_loss_that_is_none(softmax_losses, where):
    x, weight, targets, shares = (z.detach().to(DEVICE) for z in example(20, 8, 61, 1, torch.float32, ignored=0))
    dict(x=x, weight=weight)[where][3, 3] = math.nan
    assert head_loss(x, weight, targets, shares, softmax_losses=softmax_losses).isnan()


@pytest.mark.parametrize("K, clamp, softcap", [(1, 0.0, 0.0), (3, 5.0, 4.0)])
def test_the_head_with_it_is_the_head_without(softmax_losses, K, clamp, softcap):
    x, weight, targets, shares = (z.detach().to(DEVICE) for z in example(40, 16, 100, K, torch.float32))
    x.requires_grad_(), weight.requires_grad_()
    found = head_loss(x, weight, targets, shares, clamp=clamp, softcap=softcap, logits_at_once=1600,
                      softmax_losses=softmax_losses)
    expected = whole(x, weight, targets, shares, clamp, softcap)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients_of(found, x, weight), gradients_of(expected, x, weight)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_float8_products_take_its_gradient(softmax_losses):
    x, weight, targets, shares = (z.detach().to(DEVICE) for z in example(64, 32, 128, 2, torch.float32))
    x, weight = (z.bfloat16().requires_grad_() for z in (x, weight))
    results = []
    for function in (softmax_losses, script.softmax_losses):
        loss = head_loss(x, weight, targets, shares, fp8=True, softmax_losses=function)
        results.append((loss, *gradients_of(loss, x, weight)))
    for ours, theirs in zip(*results):
        assert (ours - theirs).float().norm() <= (0.25 if DEVICE == "cpu" else 0.01) * theirs.float().norm()
