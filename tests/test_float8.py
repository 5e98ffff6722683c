"""Products in float8 against float64, first on the CPU, where torch computes them too; then compiled steps on a GPU.

What is derived from the formats: a number of p significant bits is off by at most u = 2**-p of itself, and below the
smallest normal number by half the distance of two neighbours there. e4m3 has 4 bits, e5m2 has 3, bf16 has 8.
"""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FakeWorld, batch_of, random_tokens, shrunk_preset, small_config, small_run, write_shards
from launch import column, steps, validations

import train_gpt2_mod as script

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BITS = {E4M3: 4, E5M2: 3}
U_BF16 = 2**-8
has_float8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
on_gpu = pytest.mark.skipif(not has_float8, reason="needs a GPU with float8 products: compute capability 8.9 or more")


@pytest.fixture
def strict(monkeypatch):
    """The CPU takes what the GPU's kernel refuses; here it does not. Gives the shapes of the products done."""
    shapes, product = [], torch._scaled_mm

    def scaled_mm(a, b, a_scale, b_scale, *, out_dtype, use_fast_accum, **out):
        assert a.stride(1) == 1 and b.stride(0) == 1, "the first in rows, the second in columns"
        assert all(size % 16 == 0 and size > 0 for size in (*a.shape, *b.shape)), (a.shape, b.shape)
        assert {a.dtype, b.dtype} != {E5M2} and a_scale.dtype == b_scale.dtype == torch.float32
        shapes.append((*a.shape, b.size(1)))
        return product(a, b, a_scale, b_scale, out_dtype=out_dtype, use_fast_accum=use_fast_accum, **out)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    return shapes


def rounding(x, dtype):
    """How far each element may be from what float8 makes of it, scaled so that the largest is the format's."""
    info = torch.finfo(dtype)
    step = info.smallest_normal * 2 ** (1 - BITS[dtype])  # of the numbers below the smallest normal one
    return torch.maximum(x.abs() * 2 ** -BITS[dtype], (step / 2 * x.abs().max() / info.max).expand_as(x))


def assert_product(found, a, a_dtype, b, b_dtype, u_out):
    """found is a @ b.T of the two rounded to float8: each element within the bound, and the whole as near as
    independent errors are, uniform in +-u."""
    a, b, found = a.double(), b.double(), found.double()
    da, db = rounding(a, a_dtype), rounding(b, b_dtype)
    bound = da @ b.abs().T + a.abs() @ db.T + da @ db.T
    exact = a @ b.T
    assert ((found - exact).abs() <= bound + u_out * (exact.abs() + bound) + 1e-300).all()
    share = math.sqrt(sum(4 ** -BITS[t] for t in (a_dtype, b_dtype)) / 3)
    assert (found - exact).norm() <= (share + 2 * u_out) * exact.norm()


def check_products(device, M, K, N, spread=1.0):
    # Exponents that vary more widely than e5m2's leave elements that become 0.
    x, w, dy = (torch.randn(shape, device=device) * torch.exp(spread * torch.randn(shape, device=device))
                for shape in ((M, K), (N, K), (M, N)))
    x.requires_grad_(), w.requires_grad_()
    y = script.Float8Product.apply(x, w)
    assert y.dtype == torch.bfloat16 and y.shape == (M, N)
    dy = dy.bfloat16()
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert dx.dtype == dw.dtype == torch.float32 and dx.shape == x.shape and dw.shape == w.shape
    x, w = x.detach(), w.detach()
    assert_product(y, x, E4M3, w, E4M3, U_BF16)
    # The gradient comes in bf16, and so are the scale and the scaled number rounded.
    assert_product(dx, dy, E5M2, w.T, E4M3, 4 * U_BF16)
    assert_product(dw, dy.T, E5M2, x.T, E4M3, 4 * U_BF16)


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("M, K, N", [(16, 16, 16), (64, 160, 32), (16, 1712, 48), (256, 48, 64)])
def test_products_and_gradients_are_as_near_as_their_formats(strict, M, K, N, spread):
    check_products("cpu", M, K, N, spread)
    assert strict == [(M, K, N), (M, N, K), (N, M, K)]


def test_numbers_that_float8_has_are_multiplied_exactly(strict):
    x, w = (torch.randint(-7, 8, shape).float() for shape in ((32, 16), (16, 16)))
    x[0, 0], w[0, 0] = 448.0, -448.0  # so that nothing is scaled
    y = script.Float8Product.apply(x, w)
    assert torch.equal(y, (x @ w.T).bfloat16())


def test_gradients_have_the_range_of_e5m2(strict):
    """Of 2**-24 the largest they still count; e4m3 would make them 0."""
    x, w = (torch.eye(16, requires_grad=True) for _ in range(2))
    dy = torch.full((16, 16), 2.0**-24)
    dy[0, 0] = 1.0
    dx, dw = torch.autograd.grad(script.Float8Product.apply(x, w), (x, w), dy.bfloat16())
    torch.testing.assert_close(dx, dy, rtol=2**-3, atol=0)
    torch.testing.assert_close(dw, dy.T, rtol=2**-3, atol=0)


@pytest.mark.parametrize("dtype", BITS)
def test_scaling_is_by_the_largest_and_by_any_power_of_two_the_same(dtype):
    x = torch.randn(64, 64)
    x8, inverse = script.Float8Product.scaled(x, dtype)
    assert x8.dtype == dtype and x8.float().abs().max() == torch.finfo(dtype).max
    assert inverse.item() == pytest.approx(x.abs().max().item() / torch.finfo(dtype).max, rel=1e-6)
    error = (x8.double() * inverse - x.double()).abs()
    assert (error <= rounding(x.double(), dtype) * (1 + 1e-6)).all()
    for exponent in (-30, -3, 20, 100):
        y8, other = script.Float8Product.scaled(x * 2.0**exponent, dtype)
        assert torch.equal(y8.float(), x8.float()) and other.item() == inverse.item() * 2.0**exponent


@pytest.mark.parametrize("dtype", BITS)
def test_scaling_of_bf16_is_as_near_as_that_of_fp32(dtype):
    """Without a bias from a scale that is rounded to the tensor's own type: over many numbers errors cancel."""
    for largest in (1.3, 2.9, 3.0, 5.9):
        x = (largest * torch.rand(512, 512)).bfloat16()
        x[0, 0] = largest
        bias = []
        for y in (x.float(), x):
            y8, inverse = script.Float8Product.scaled(y, dtype)
            bias.append(((y8.double() * inverse).sum() / x.double().sum() - 1).abs().item())
        assert bias[1] <= bias[0] + 2**-12


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-10, 1e4, 1e30, 3e38])
def test_neither_tiny_nor_huge_numbers_become_something_else(strict, size):
    x, w, dy = (torch.randn(16, 16).clamp(-1, 1) for _ in range(3))
    for i in range(3):
        tensors = [t * size if i == j else t for j, t in enumerate((x, w, dy))]
        a, b = (t.requires_grad_() for t in tensors[:2])
        y = script.Float8Product.apply(a, b)
        found = y, *torch.autograd.grad(y, (a, b), tensors[2].bfloat16())
        assert all(torch.isfinite(z).all() or size > 1e37 for z in found)
        assert all(torch.isfinite(z).all() for z, uses in zip(found, ((0, 1), (1, 2), (0, 2))) if i not in uses)
        if size == 0:
            assert all((z == 0).all() for z, uses in zip(found, ((0, 1), (1, 2), (0, 2))) if i in uses)
        if 1e-10 <= size <= 1e4:
            exact = tensors[0].double() @ tensors[1].double().T
            assert (found[0].double() - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(3))
def test_what_is_no_number_stays_none(strict, where, value):
    """Else a run that diverged would go on."""
    tensors = [torch.randn(16, 16) for _ in range(3)]
    tensors[where][3, 5] = value
    x, w = (t.requires_grad_() for t in tensors[:2])
    y = script.Float8Product.apply(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), tensors[2].bfloat16())
    if where < 2:
        assert not torch.isfinite(y).all()
    assert not (torch.isfinite(dx).all() and torch.isfinite(dw).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, T, fan_in, fan_out", [(2, 8, 32, 48), (1, 1, 32, 16), (3, 5, 24, 40), (1, 7, 5, 1706),
                                                   (2, 3, 1706, 6), (1, 2, 853, 51)])
def test_a_linear_layer_of_any_size(strict, B, T, fan_in, fan_out, bias):
    """Near the product in float64, as if it were padded nowhere."""
    layer = script.Linear(small_config(precision="fp8", bias=bias), fan_in, fan_out)
    x, dy = torch.randn(B, T, fan_in, requires_grad=True), torch.randn(B, T, fan_out).bfloat16()
    y = layer(x)
    assert y.shape == (B, T, fan_out) and y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    for g, p in zip(grads, (x, *layer.parameters())):
        assert g.shape == p.shape and g.dtype == p.dtype
    rows, weight, dy = x.detach().flatten(0, 1), layer.weight.detach(), dy.flatten(0, 1)
    product = y.flatten(0, 1).double() - (layer.bias.detach().bfloat16().double() if bias else 0)
    u_sum = U_BF16 * (4 if bias else 1)  # the bias is rounded too, and so is the sum, which may be larger
    exact, wrong = rows.double() @ weight.double().T, rounding(rows.double(), E4M3) @ weight.double().abs().T
    wrong = wrong * (1 + 2**-4) + rows.double().abs() @ rounding(weight.double(), E4M3).T
    assert ((product - exact).abs() <= wrong + u_sum * (exact.abs() + wrong + (layer.bias.abs() if bias else 0))).all()
    assert_bounded = [(grads[0].flatten(0, 1), dy, weight.T), (grads[1], dy.T, rows.T)]
    for found, a, b in assert_bounded:
        a, b, found = a.double(), b.double(), found.double()
        da, db = rounding(a, E5M2), rounding(b, E4M3)
        bound = da @ b.abs().T + a.abs() @ db.T + da @ db.T
        assert ((found - a @ b.T).abs() <= bound + 4 * U_BF16 * (a.abs() @ b.abs().T + bound)).all()
    if bias:
        torch.testing.assert_close(grads[2], dy.float().sum(0), rtol=2 * U_BF16, atol=2 * U_BF16)


def test_a_row_of_zeros_more_changes_nothing(strict):
    """Rows are added up to a multiple of 16 and do not come back; a layer's halves are padded each by itself."""
    config = small_config(precision="fp8", mlp="swiglu", ffn_hidden=85)
    mlp, x = script.SwiGLUMLP(config), torch.randn(3, 7, 32)
    longer = torch.cat((x.flatten(0, 1), torch.zeros(11, 32)))
    torch.testing.assert_close(mlp(x).flatten(0, 1), mlp(longer)[:21], rtol=0, atol=0)
    gate, up = mlp.c_fc.weight.split(85)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.c_proj.weight.T
    assert (mlp(x) - expected).norm() < 0.1 * expected.norm()


def step_of(model, idx, targets):
    """Loss and gradients of a step as training does it."""
    numerics = script.Numerics(model.config.precision, idx.device)
    model.zero_grad()
    with numerics.autocast():
        loss = model(idx, targets, return_logits=False)[1]
    numerics.backward(loss)
    return loss.item(), {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def distance(found, expected):
    """Of two gradients, as a share of the expected one."""
    a, b = (torch.cat([g.double().flatten() for g in grads.values()]) for grads in (found, expected))
    return ((a - b).norm() / b.norm()).item()


def expected_distance(config):
    """What independent errors of all products of a step add up to, each as large as the gradients' are."""
    layers = 6 if config.mixer == "latent" else 4
    products = 3 * (layers * (config.n_layer + config.lookahead - 1) + config.lookahead)
    return math.sqrt(products * (4 ** -BITS[E4M3] + 4 ** -BITS[E5M2]) / 3)


def twin(model, **changes):
    """The same weights in a network of other switches."""
    other = script.GPT(dataclasses.replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("preset, changes", [
    ("d12", {}), ("gpt2", {}), ("sized", dict(ffn_hidden=37)), ("d12_mla", dict(qk_norm=False)), ("d12_gqa", {}),
    ("d12", dict(mtp_enabled=True, mtp_heads="separate")), ("d12", dict(tie_embeddings=False, bias=True)),
])
def test_a_step_in_float8_is_near_that_in_fp32(strict, preset, changes):
    config = shrunk_preset(preset, **{"n_head": 2, "n_kv_head": 2, "n_embd": 32, "dropout": 0.0, **changes})
    model = script.GPT(config)
    quantised = twin(model, precision="fp8")
    idx, targets = batch_of(config, B=4, T=16)
    loss, grads = step_of(model, idx, targets)
    loss8, grads8 = step_of(quantised, idx, targets)
    assert strict and loss8 != loss and loss8 == pytest.approx(loss, abs=0.02)
    limit = expected_distance(config)
    assert limit < 0.65 and distance(grads8, grads) < limit
    assert all(g.dtype == torch.float32 and distance({0: g}, {0: grads[name]}) < limit for name, g in grads8.items())


def test_the_products_of_blocks_and_head_are_float8_but_for_the_heads_own_gradient(strict, monkeypatch):
    plain, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: plain.append(w.shape) or linear(x, w, b))
    for preset, per_block in (("d12", 4), ("sized", 4), ("d12_mla", 6)):
        strict.clear()
        model = script.GPT(shrunk_preset(preset, precision="fp8", n_head=2, n_kv_head=2, n_embd=32))
        model(*batch_of(model.config), return_logits=False)[1].backward()
        layers = [m for m in model.transformer.h[0].modules() if isinstance(m, torch.nn.Linear)]
        assert len(layers) == per_block and len(strict) == 3 * 2 * len(layers) + 2 and not plain


@pytest.mark.parametrize("width, heads", [(24, 3), (72, 9), (936, 13)])
def test_a_width_that_is_no_multiple_of_sixteen(strict, width, heads):
    """As --gqa_enabled makes of d12_mlp3x: 13 heads of size 72."""
    config = small_config(n_layer=1, n_embd=width, n_head=heads, mlp="swiglu", ffn_hidden=17)
    model = script.GPT(config)
    idx, targets = batch_of(config)
    (loss, grads), (loss8, grads8) = (step_of(m, idx, targets) for m in (model, twin(model, precision="fp8")))
    assert loss8 == pytest.approx(loss, abs=0.02) and distance(grads8, grads) < expected_distance(config)


def test_the_network_is_the_one_of_bf16(strict):
    for preset in ("d12", "gpt2", "sized", "d12_mla", "d12_swiglu"):
        states = [script.GPT(shrunk_preset(preset, precision=precision, ffn_hidden=37)).state_dict()
                  for precision in ("bf16", "fp8")]
        assert [(n, w.shape, w.dtype) for n, w in states[0].items()] == \
            [(n, w.shape, w.dtype) for n, w in states[1].items()]


@pytest.mark.parametrize("vocabulary", [61, 128, 257])
def test_rows_that_pad_the_head_are_never_predicted(strict, vocabulary):
    config = small_config(precision="fp8", vocab_size=vocabulary)
    model = script.GPT(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(-model.lm_head.weight.abs())
    x = torch.rand(2, 8, 32)  # so that the logit of a row of zeros were the largest
    logits = model.head(x)
    assert logits.shape == (2, 8, vocabulary) and (logits < 0).all()
    idx, targets = batch_of(config)
    full, loss = model(idx, targets)
    assert full.shape == (2, 8, vocabulary)
    expected = F.cross_entropy(full.flatten(0, 1).float(), targets["target_1"].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=U_BF16)
    loss.backward()
    assert model.lm_head.weight.grad.shape == (vocabulary, 32)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_evaluation_and_blocks_run_again_in_float8(strict, tmp_path):
    model = script.GPT(small_config(precision="fp8", dropout=0.2))
    again = twin(model, gradient_checkpointing=True)
    idx, targets = batch_of(model.config)
    found = []
    for m in (model, again):
        torch.manual_seed(3)
        found.append(step_of(m, idx, targets))
    assert found[0][0] == found[1][0] and all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(300), vocab_size=61))
    losses = [script.evaluate(m, shards, m.config, small_run(val_tokens=200), FakeWorld(),
                              script.Numerics(precision, torch.device("cpu")))["val_loss"]
              for m, precision in ((model, "fp8"), (model, "fp8"), (twin(model, precision="fp32"), "fp32"))]
    assert losses[0] == losses[1] != losses[2] and losses[0] == pytest.approx(losses[2], abs=0.02)


def test_float8_needs_a_gpu_that_has_it():
    for place in (dict(device_type="cpu", has_fp8=False), dict(device_type="cuda", has_fp8=False)):
        machine = script.ANY_MACHINE._replace(**place)
        for flags in (["--use_fp8"], ["--precision", "fp8"]):
            with pytest.raises(script.ConfigError, match="precision=fp8 needs a GPU with float8 .*; use bf16"):
                script.resolve(script.parse_flags(flags), machine)
    assert script.resolve(script.parse_flags(["--use-fp8"]), script.ANY_MACHINE)[0].precision == "fp8"


# On a GPU: widths as they are in the presets, few layers


def gpu_config(preset, width, **changes):
    small = dict(n_layer=1, n_embd=width, n_head=width // 64, vocab_size=1000, dropout=0.0)
    kv_heads = dict(n_kv_head=2) if script.base_configs[preset].get("n_kv_head") else {}
    return script.GPTConfig(**{**script.base_configs[preset], **small, **kv_heads, **changes})


def gpu_batch(config):
    idx, targets = batch_of(config, B=4, T=128)
    return idx.cuda(), {name: target.cuda() for name, target in targets.items()}


def compiled_step(model, idx, targets):
    model = model.cuda()
    model.compile(dynamic=False)
    return step_of(model, idx, targets)


@on_gpu
@pytest.mark.parametrize("M, K, N", [(64, 160, 32), (256, 1712, 1024)])
def test_gpu_products_and_gradients_are_as_near_as_their_formats(M, K, N):
    check_products("cuda", M, K, N)


@on_gpu
@pytest.mark.parametrize("width, hidden", [(640, 1706), (896, 2389), (1024, 2730), (1280, 3413)])
def test_gpu_compiled_steps_at_the_odd_widths_of_swiglu(width, hidden):
    torch._dynamo.reset()
    config = gpu_config("sized", width, precision="fp32")
    assert config.ffn_hidden == hidden
    model = script.GPT(config)
    idx, targets = gpu_batch(config)
    bf16, fp8 = (compiled_step(twin(model, precision=p), idx, targets) for p in ("bf16", "fp8"))
    loss, grads = step_of(model.cuda(), idx, targets)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for (found, gradients), near, far in ((bf16, 0.01, 0.05), (fp8, 0.05, expected_distance(config))):
        assert math.isfinite(found) and found == pytest.approx(loss, abs=near)
        assert {name: g.shape for name, g in gradients.items()} == shapes
        assert all(torch.isfinite(g).all() and g.any() for g in gradients.values())
        assert distance(gradients, grads) < far
    assert bf16[0] != fp8[0]


@on_gpu
@pytest.mark.parametrize("preset, changes", [
    ("d12_mla", {}), ("gpt2", dict(dropout=0.1)), ("d12", dict(mtp_enabled=True, mtp_heads="separate", loss_clamp=9.0)),
])
def test_gpu_compiled_steps_of_other_networks(preset, changes):
    torch._dynamo.reset()
    config = gpu_config(preset, 256, precision="bf16", **changes)
    model = script.GPT(config)
    plain = twin(model, precision="fp32", dropout=0.0)
    idx, targets = gpu_batch(config)
    loss, grads = compiled_step(model, idx, targets)
    expected, exact = step_of(plain.cuda(), idx, targets)
    assert loss == pytest.approx(expected, abs=0.1 if config.dropout else 0.01)
    assert distance(grads, exact) < (1 if config.dropout else 0.05)
    assert all(g.any() and torch.isfinite(g).all() for g in grads.values())


@on_gpu
def test_gpu_blocks_run_again_compiled_are_the_same():
    torch._dynamo.reset()
    model = script.GPT(gpu_config("sized", 256, n_layer=2, precision="bf16"))
    idx, targets = gpu_batch(model.config)
    again = twin(model, gradient_checkpointing=True)
    (loss, grads), (loss2, grads2) = (compiled_step(m, idx, targets) for m in (model, again))
    assert loss2 == pytest.approx(loss, abs=1e-3) and distance(grads2, grads) < 0.01


ON_CUDA = ["--device", "cuda", "--precision", "bf16", "--n_embd", 128, "--n_head", 2, "--n_kv_head", 1]


@on_gpu
def test_gpu_attention_kernels_are_close(trainer):
    losses = {}
    for kernel in ("auto", "flash", "cudnn", "math"):
        result = trainer.run(*ON_CUDA, "--attention", kernel)
        losses[kernel] = column(steps(result.folder), "train_loss")
        line, = [line for line in result.out.splitlines() if line.startswith("attention kernel: ")]
        assert kernel == "auto" or line == f"attention kernel: {kernel}"
    for kernel, found in losses.items():
        assert found == pytest.approx(losses["math"], abs=0.02), kernel
    assert losses["flash"] != losses["math"]


@on_gpu
def test_gpu_cuda_graphs_have_the_losses_of_plain_compilation(trainer):
    """With two micro-batches a step, and validations between the steps."""
    flags = [*ON_CUDA, "--compile", "--grad_accumulation_steps", 2]
    plain, graphs = (trainer.run(*flags, "--compile_mode", mode) for mode in ("default", "reduce-overhead"))
    for rows, name in ((steps, "train_loss"), (steps, "grad_norm"), (validations, "val_loss")):
        found = column(rows(graphs.folder), name)
        assert found == pytest.approx(column(rows(plain.folder), name), rel=5e-3), name
    assert "does not work here" not in graphs.out
