"""The network and its loss against slow references in float64, and transformers' Llama."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, changed_id, naive_cross_entropy, shrunk_preset, small_config

import train_gpt2_mod as script

# Parameters of each preset, and the numbers they follow from: layers, query heads, key/value heads, width, the MLP's
# hidden width and its matrices.
PRESETS = {
    "d12": (123_532_032, 12, 12, 12, 768, 3072, 2),
    "d12_mlp3x": (124_880_704, 12, 13, 13, 832, 2496, 2),
    "d12_mlp2x": (136_720_320, 12, 15, 15, 960, 1920, 2),
    "d12_mlp3x_no_comp": (109_376_256, 12, 12, 12, 768, 2304, 2),
    "d12_post_norm": (123_532_032, 12, 12, 12, 768, 3072, 2),
    "d12_post_norm_qk_norm": (123_532_032, 12, 12, 12, 768, 3072, 2),
    "d12_gqa": (114_094_848, 12, 12, 4, 768, 3072, 2),
    "d12_mqa": (110_555_904, 12, 12, 1, 768, 3072, 2),
    "d12_window": (123_532_032, 12, 12, 12, 768, 3072, 2),
    "d12_window_large": (123_532_032, 12, 12, 12, 768, 3072, 2),
    "d12_swiglu": (123_532_032, 12, 12, 12, 768, 2048, 3),
    "d24": (353_453_056, 24, 16, 16, 1024, 4096, 2),
    "d36": (772_117_760, 36, 20, 20, 1280, 5120, 2),
    "d48": (1_554_971_200, 48, 25, 25, 1600, 6400, 2),
    "d12_mla": (120_288_000, 12, 12, 12, 768, 3072, 2),
    "d12_fast": (239_335_044, 12, 6, 6, 768, 3072, 2),
    "gpt2": (124_439_808, 12, 12, 12, 768, 3072, 2),
    "gpt2-medium": (354_823_168, 24, 16, 16, 1024, 4096, 2),
    "gpt2-large": (774_030_080, 36, 20, 20, 1280, 5120, 2),
    "gpt2-xl": (1_557_611_200, 48, 25, 25, 1600, 6400, 2),
    "sized": (100_682_496, 12, 12, 4, 768, 2048, 3),
    "sized_small": (114_838_272, 12, 12, 4, 768, 2560, 3),
    "sized_current": (226_542_336, 32, 12, 4, 768, 2048, 3),
    "sized_medium_deep": (162_822_912, 20, 12, 4, 768, 2304, 3),
    "sized_wide_shallow": (165_676_032, 12, 16, 4, 1024, 2730, 3),
    "sized_medium": (398_509_056, 24, 16, 4, 1024, 4096, 3),
    "sized_16_layers": (135_291_648, 16, 12, 4, 768, 2304, 3),
    "sized_24_layers": (176_198_400, 24, 12, 4, 768, 2048, 3),
    "sized_40_layers": (253_293_312, 40, 12, 4, 768, 1792, 3),
    "sized_16gb": (100_682_496, 12, 12, 4, 768, 2048, 3),
    "tiny": (7_219_328, 4, 4, 4, 128, 512, 2),
    "mini": (29_915_520, 6, 6, 6, 384, 1536, 2),
}


def rope_complex(x, base):
    """x (..., T, D) turned as complex numbers x[d] + i x[d + D/2], by t * base**(-2d/D)."""
    T, D = x.shape[-2:]
    theta = torch.tensor([base ** (-2 * d / D) for d in range(D // 2)], dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * theta
    z = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double()) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), dim=-1)


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def naive_attention(attention, x, window, qk_norm, base):
    """The definition: each query of each head on its own, a softmax over the keys that it may see."""
    B, T, _ = x.shape
    H, K, D = attention.n_head, attention.n_kv_head, attention.head_dim
    wq, wk, wv = attention.c_attn.weight.split((H * D, K * D, K * D))
    heads_out = []
    for h in range(H):
        g = h * K // H
        q, k, v = x @ wq[h * D : h * D + D].T, x @ wk[g * D : g * D + D].T, x @ wv[g * D : g * D + D].T
        if qk_norm:
            q, k = rms(q), rms(k)
        q, k = rope_complex(q, base), rope_complex(k, base)
        out = torch.zeros(B, T, D)
        for b, t in itertools.product(range(B), range(T)):
            allowed = [s for s in range(T) if s <= t and (window == 0 or s > t - window)]
            scores = torch.stack([q[b, t] @ k[b, s] for s in allowed]) / math.sqrt(D)
            weights = torch.exp(scores) / torch.exp(scores).sum()
            out[b, t] = sum(w * v[b, s] for w, s in zip(weights, allowed))
        heads_out.append(out)
    return torch.cat(heads_out, dim=-1) @ attention.c_proj.weight.T


def context(config, T):
    mask = script.window_mask(T, config.window, torch.device("cpu"))
    return script.Context(*script.Rotary(config.head_dim, config.rope_base)(T), mask)


def expected_count(name, layers, heads, kv_heads, width, hidden, matrices):
    """Parameters by the formulas of the papers: a tied embedding, and by layer attention, MLP, biases and norms."""
    head_dim, vocabulary = width // heads, 32768 if name.startswith("sized") else 50257
    attention = width * head_dim * (heads + kv_heads + kv_heads) + width * width
    if name == "d12_mla":
        attention = width * heads * (64 + 32) + width * (256 + 32) + 256 * 2 * heads * 64 + width * width
    layer, rest = attention + matrices * width * hidden, vocabulary * width
    if name == "d12_fast":  # a block's two numbers for x0 and its smear; two for the values in 6, a smear,
        layer, rest = layer + 2 + width + heads * 12, rest + 6 * 2 + width + 3 * vocabulary * width  # gates, tables
    if name.startswith("gpt2"):
        layer += 3 * width + width + hidden + width + 4 * width  # biases, two LayerNorms
        rest += 1024 * width + 2 * width
    elif name.startswith("sized"):
        layer, rest = layer + 2 * width, rest + width
    return rest + layers * layer


def test_every_preset_has_its_parameter_count():
    assert PRESETS.keys() == script.base_configs.keys()
    for name, (count, *shape) in PRESETS.items():
        assert count == expected_count(name, *shape), name
        with torch.device("meta"):
            model = script.GPT(script.GPTConfig(**script.base_configs[name]))
        assert model.parameter_count() == count, name
        assert sum(script.parameters_by_part(model).values()) == count, name
        tied = model.config.vocab_size * model.config.n_embd * model.config.tie_embeddings
        assert sum(p.numel() for p in model.state_dict().values()) == count + tied, name  # both tied names


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_attention_is_its_definition(float64, heads, kv_heads, window, qk_norm):
    config = small_config(n_embd=24, n_head=heads, n_kv_head=kv_heads, window=window, qk_norm=qk_norm, rope_base=50.0)
    attention = script.CausalSelfAttention(config, 0)
    x = torch.randn(2, 9, 24)
    expected = naive_attention(attention, x, window, qk_norm, base=50.0)
    torch.testing.assert_close(attention(x, context(config, 9)), expected, rtol=0, atol=1e-10)


def test_rope_is_a_complex_rotation(float64):
    x = torch.randn(2, 20, 3, 10)  # (B, T, heads, D)
    turned = script.rotate(x, *script.Rotary(10, 1234.0)(20))
    expected = rope_complex(x.transpose(1, 2), 1234.0).transpose(1, 2)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)


def test_rope_scores_depend_on_the_distance_alone(float64):
    cos, sin = script.Rotary(8, 10000.0)(32)
    q, k = (script.rotate(torch.randn(8).expand(1, 32, 1, 8), cos, sin)[0, :, 0] for _ in range(2))
    scores = q @ k.T
    for distance in range(-31, 32):
        diagonal = torch.diagonal(scores, distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores[0].std() > 0.01  # and it does depend on it


def test_rope_tables_grow_when_a_longer_sequence_comes():
    rotary, long = script.Rotary(8, 10000.0, length=4), script.Rotary(8, 10000.0, length=50)
    for T in (3, 9, 50, 2):
        for table, expected in zip(rotary(T), long(T)):
            assert table.shape == (T, 4) and torch.equal(table, expected)
    model = script.GPT(small_config(n_layer=1))
    idx, _ = batch_of(model.config, B=1, T=1030)
    model.rotary.build(5)
    short = model(idx[:, :7])[0]
    torch.testing.assert_close(model(idx)[0][:, :7], short)


def test_rope_tables_are_rounded_once():
    """Angles in float32 would be off by 1e-5 at position 1000; the tables are the float64 ones, rounded."""
    cos, sin = script.Rotary(64, 10000.0, length=2048)(2048)
    angles = torch.arange(2048.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-7)


def test_gqa_with_all_heads_is_multi_head_attention_bitwise():
    config = small_config(n_kv_head=4)
    assert config == small_config() and not config.gqa_enabled
    attention = script.CausalSelfAttention(config, 0)
    q, k, v = attention.qkv(torch.randn(2, 9, 32), context(config, 9))
    grouped = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(attention.attend(q, k, v, None), grouped)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gqa_is_multi_head_attention_with_repeated_weights(float64, kv_heads):
    config = small_config(n_kv_head=kv_heads)
    grouped, full = script.CausalSelfAttention(config, 0), script.CausalSelfAttention(small_config(), 0)
    H, D = 4, config.head_dim
    q, k, v = grouped.c_attn.weight.split((H * D, kv_heads * D, kv_heads * D))
    k, v = (w.view(kv_heads, D, -1).repeat_interleave(H // kv_heads, dim=0).flatten(0, 1) for w in (k, v))
    full.load_state_dict({"c_attn.weight": torch.cat((q, k, v)), "c_proj.weight": grouped.c_proj.weight})
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(grouped(x, context(config, 9)), full(x, context(config, 9)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [9, 10, 1000])
def test_a_window_over_the_whole_sequence_is_full_attention(window):
    full, windowed = script.GPT(small_config()), script.GPT(small_config(window=window))
    windowed.load_state_dict(full.state_dict())
    idx, _ = batch_of(full.config, T=9)
    assert torch.equal(full(idx)[0], windowed(idx)[0])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_window_counts_its_own_token(float64, window):
    model = script.GPT(small_config(n_layer=1, window=window))
    idx, _ = batch_of(model.config, B=1, T=12)
    before = model(idx)[0]
    for i in range(window, 12):
        outside = model(changed_id(idx, i - window, 61))[0]
        inside = model(changed_id(idx, i - window + 1, 61))[0]
        torch.testing.assert_close(outside[:, i], before[:, i], rtol=0, atol=1e-13)
        assert (inside[:, i] - before[:, i]).abs().max() > 1e-6


@pytest.mark.parametrize("mlp", script.mlps)
@pytest.mark.parametrize("preset", script.base_configs)
def test_no_logit_sees_a_later_token(float64, preset, mlp):
    config = shrunk_preset(preset, mlp=mlp)
    model = script.GPT(config).eval()
    idx, _ = batch_of(config, T=9)
    before = model(idx)[0]
    for j in (1, 4, 8):
        after = model(changed_id(idx, j, config.vocab_size))[0]
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-13)
        assert (after[:, j] - before[:, j]).abs().max() > 1e-6


def test_norm_is_rmsnorm(float64):
    x = torch.randn(3, 5, 16) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    torch.testing.assert_close(script.Norm()(x), rms(x), rtol=1e-12, atol=0)
    assert not list(script.Norm().parameters())


def test_mlps_are_their_definitions(float64):
    x = torch.randn(2, 5, 32)
    gelu = script.MLP(small_config(mlp_expansion_factor=3))
    assert gelu.c_fc.weight.shape == (96, 32) and gelu.c_proj.weight.shape == (32, 96)
    h = x @ gelu.c_fc.weight.T
    expected = (h * (1 + torch.erf(h / math.sqrt(2))) / 2) @ gelu.c_proj.weight.T
    torch.testing.assert_close(gelu(x), expected, rtol=0, atol=1e-12)

    swiglu = script.SwiGLUMLP(small_config(mlp="swiglu", mlp_expansion_factor=8 / 3))
    assert swiglu.c_fc.weight.shape == (2 * 85, 32) and swiglu.c_proj.weight.shape == (32, 85)
    gate, up = x @ swiglu.c_fc.weight[:85].T, x @ swiglu.c_fc.weight[85:].T
    expected = (gate / (1 + torch.exp(-gate)) * up) @ swiglu.c_proj.weight.T
    torch.testing.assert_close(swiglu(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("mlp", script.mlps)
def test_block_is_its_formula(float64, mlp, post_norm):
    config = small_config(n_layer=7, mlp=mlp, post_norm=post_norm)
    block, ctx = script.Block(config, 0), context(config, 9)
    after = rms if post_norm else lambda z: z
    x = 3 * torch.randn(2, 9, 32)
    y = x + after(block.attn(rms(x), ctx)) / math.sqrt(2 * 7)
    torch.testing.assert_close(block(x, ctx), y + after(block.mlp(rms(y))), rtol=0, atol=1e-12)


def test_the_model_is_embedding_blocks_norm_head(float64):
    model = script.GPT(small_config(n_layer=3))
    idx, _ = batch_of(model.config, T=9)
    x = model.transformer.wte.weight[idx]
    for block in model.transformer.h:
        x = block(x, context(model.config, 9))
    torch.testing.assert_close(model(idx)[0], rms(x) @ model.lm_head.weight.T, rtol=0, atol=1e-12)


def test_weights_start_uniform_within_one_over_root_fan_in():
    model = script.GPT(small_config(n_layer=1, n_embd=64))
    for name, p in model.named_parameters():
        bound = 1 / math.sqrt(p.size(1))
        assert p.abs().max() <= bound, name
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name  # a uniform one's


def test_tied_embeddings_are_one_parameter_with_both_gradients(float64):
    model = script.GPT(small_config())
    assert model.transformer.wte.weight is model.lm_head.weight
    assert [n for n, p in model.named_parameters() if p is model.lm_head.weight] == ["transformer.wte.weight"]
    idx, targets = batch_of(model.config)
    model(idx, targets)[1].backward()
    untied = [model.lm_head.weight.detach().clone().requires_grad_() for _ in range(2)]
    parameters = dict(zip(("transformer.wte.weight", "lm_head.weight"), untied))
    torch.func.functional_call(model, parameters, (idx, targets), tie_weights=False)[1].backward()
    into_embedding, into_head = (w.grad for w in untied)
    assert into_embedding.abs().max() > 1e-6 and into_head.abs().max() > 1e-6
    torch.testing.assert_close(model.lm_head.weight.grad, into_embedding + into_head, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_are_those_of_transformers_llama(kv_heads):
    """With the scale of the attention's output folded into its last matrix, this is a Llama whose norms weigh 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = small_config(n_layer=3, n_kv_head=kv_heads, mlp="swiglu", mlp_expansion_factor=8 / 3)
    model = script.GPT(config)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=85, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), bos_token_id=None, eos_token_id=None,
    )).eval()
    weights = {name: torch.ones_like(p) for name, p in llama.state_dict().items() if "norm" in name}
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.split((32, 8 * kv_heads, 8 * kv_heads))
        gate, up = block.mlp.c_fc.weight.split(85)
        rows = dict(q_proj=q, k_proj=k, v_proj=v, o_proj=block.attn.c_proj.weight / math.sqrt(2 * 3))
        weights.update({f"model.layers.{i}.self_attn.{name}.weight": w for name, w in rows.items()})
        rows = dict(gate_proj=gate, up_proj=up, down_proj=block.mlp.c_proj.weight)
        weights.update({f"model.layers.{i}.mlp.{name}.weight": w for name, w in rows.items()})
    llama.load_state_dict(weights)
    idx, _ = batch_of(config, T=20)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], llama(idx).logits, rtol=0, atol=1e-4)


class OnCuda(torch.Tensor):
    """A tensor on the CPU that says it is on CUDA."""

    is_cuda = True


def test_padding_the_heads_rows_changes_nothing(float64, monkeypatch):
    """61 rows are computed as 128 on CUDA: the same logits and gradients."""
    model, x, dy = script.GPT(small_config()), torch.randn(2, 8, 32), torch.randn(2, 8, 61)
    shapes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: shapes.append(weight.shape) or linear(x, weight))
    results = []
    for z in (x, x.as_subclass(OnCuda)):
        logits = model.head(z).as_subclass(torch.Tensor)
        results.append((logits, *torch.autograd.grad(logits, model.lm_head.weight, dy)))
    assert shapes == [(61, 32), (128, 32)]
    for plain, padded in zip(*results):
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-12)


def test_plain_loss_and_mtp_of_one_step_are_cross_entropy(float64):
    model = script.GPT(small_config())
    for changes in (dict(), dict(mtp_enabled=True, mtp_max_steps=1), dict(mtp_enabled=True, mtp_weight=0.0)):
        model.config = small_config(**changes)
        idx, targets = batch_of(model.config)
        expected = F.cross_entropy(model(idx)[0].view(-1, 61), targets["target_1"].reshape(-1))
        torch.testing.assert_close(model(idx, targets)[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_mtp_loss_is_its_definition(float64, steps):
    config = small_config(mtp_enabled=True, mtp_max_steps=steps)
    model = script.GPT(config)
    idx, targets = batch_of(config)
    assert list(targets) == [f"target_{k}" for k in range(1, steps + 1)]
    logits, _ = model(idx)
    losses = [naive_cross_entropy(logits, target) for target in targets.values()]
    aux = sum(losses[1:]) / (steps - 1)
    for weight in (0.0, 0.1, 2.0):
        model.mtp_weight_buffer.fill_(weight)
        assert model(idx, targets)[1].item() == pytest.approx(losses[0] + weight * aux, abs=1e-12)
    _, components = model(idx, targets, return_loss_components=True)
    assert [z.item() for z in components] == pytest.approx([losses[0], aux], abs=1e-12)


def test_the_mtp_weight_starts_at_the_configs_and_is_not_saved():
    model = script.GPT(small_config(mtp_enabled=True, mtp_weight=0.25))
    assert model.mtp_weight_buffer.item() == 0.25
    assert not [name for name in model.state_dict() if "buffer" in name or "rotary" in name]


def test_ignored_targets_count_neither_in_the_sum_nor_in_the_mean(float64):
    config = small_config(mtp_enabled=True, mtp_max_steps=2)
    model = script.GPT(config)
    idx, targets = batch_of(config)
    targets = {name: target.clone() for name, target in targets.items()}
    targets["target_1"][0, 3:] = targets["target_2"][:, 5:] = script.IGNORED
    logits, _ = model(idx)
    main, aux = (naive_cross_entropy(logits, target) for target in targets.values())
    assert main != naive_cross_entropy(logits, batch_of(config)[1]["target_1"])
    assert model(idx, targets)[1].item() == pytest.approx(main + 0.1 * aux, abs=1e-12)


@pytest.mark.parametrize("mtp", [False, True])
def test_what_forward_returns(mtp):
    model = script.GPT(small_config(mtp_enabled=mtp))
    idx, targets = batch_of(model.config)
    logits, loss = model(idx)
    assert logits.shape == (2, 8, 61) and loss is None
    full, loss = model(idx, targets)
    assert torch.equal(full, logits) and loss.shape == ()
    none, same = model(idx, targets, return_logits=False)
    assert none is None and torch.equal(same, loss)
    _, (main, aux) = model(idx, targets, return_logits=False, return_loss_components=True)
    assert main.shape == () and (aux is not None) == mtp
    assert torch.equal(main + 0.1 * aux if mtp else main, loss)
    assert model(idx, return_logits=False, return_loss_components=True) == (None, None)


def test_the_compiled_loss_follows_the_mtp_weight_without_a_new_compilation():
    config = small_config(n_layer=1, mtp_enabled=True, mtp_max_steps=3)
    model, compilations = script.GPT(config), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    idx, targets = batch_of(config)
    losses = []
    for weight in (0.0, 0.1, 0.7, 3.0):
        model.mtp_weight_buffer.fill_(weight)
        losses.append(compiled(idx, targets, return_logits=False)[1].item())
        torch.testing.assert_close(losses[-1], model(idx, targets)[1].item())
    assert len(compilations) == 1 and len(set(losses)) == 4


def test_flops_per_token_follow_palm():
    with torch.device("meta"):
        d12, window = (script.GPT(script.GPTConfig(**script.base_configs[n])) for n in ("d12", "d12_window"))
        grouped = script.GPT(script.GPTConfig(**script.base_configs["d12_gqa"]))
    assert d12.flops_per_token(1024) == 854_438_400
    assert d12.flops_per_token(1024) == 6 * 123_532_032 + 12 * 12 * 12 * 64 * 1024
    assert window.flops_per_token(1024) == 6 * 123_532_032 + 12 * 12 * 12 * 64 * 256
    assert window.flops_per_token(128) == d12.flops_per_token(128) == 6 * 123_532_032 + 12 * 12 * 12 * 64 * 128
    assert grouped.flops_per_token(1024) == 6 * 114_094_848 + 12 * 12 * 12 * 64 * 1024  # fewer weights, equal scores
