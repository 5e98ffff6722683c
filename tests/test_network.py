"""The network's options against formulas, slow references in float64, and transformers' GPT-2 and Llama."""
import dataclasses
import fractions
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (FakeWorld, batch_of, changed_id, naive_cross_entropy, random_tokens, shrunk_preset, small_config,
                     small_run, write_shards)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2_mod as script

SEPARATE = dict(mtp_enabled=True, mtp_heads="separate", mtp_max_steps=3)


def started(config, std=0.3):
    """A model whose vectors, which start as zeros and ones, are random too: none of them is then without effect."""
    model = script.GPT(config)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0, std=std)
    return model


def gradients(model, idx, targets):
    """The loss and the gradients of one backward pass, by name; without gradients of an earlier one."""
    model.zero_grad()
    loss = model(idx, targets, return_logits=False)[1]
    loss.backward()
    return dict(loss=loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()})


def assert_equal_dicts(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def context(config, T):
    mask = script.window_mask(T, config.window, torch.device("cpu"))
    return script.Context(*script.Rotary(config.rotary_dim, config.rope_base)(T), mask)


# Norms, positions, biases


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_are_their_formulas(float64, kind, weights, bias):
    config = small_config(norm=kind, norm_weights=weights, norm_eps=1e-3, bias=bias)
    norm = script.make_norm(config)
    expected = {"weight"} if weights else set()
    expected |= {"bias"} if weights and bias and kind == "layernorm" else set()
    assert {name for name, _ in norm.named_parameters()} == expected
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 5, 32) * torch.tensor([0.01, 100.0])[:, None, None] + 3
    centred = x - x.mean(-1, keepdim=True) * (kind == "layernorm")
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-3)
    y = y * norm.weight if "weight" in expected else y
    y = y + norm.bias if "bias" in expected else y
    torch.testing.assert_close(norm(x), y, rtol=0, atol=1e-12)


def test_the_inner_norms_have_no_weights_whatever_the_others_are():
    config = small_config(norm="layernorm", norm_weights=True, bias=True, post_norm=True, qk_norm=True, norm_eps=1e-3)
    block = script.Block(config, 0)
    for norm in (block.attn_norm, block.mlp_norm, block.attn.qk_norm):
        assert (norm.kind, norm.eps, list(norm.parameters())) == ("rmsnorm", script.NORM_EPS, [])


@pytest.mark.parametrize("bias", [False, True])
def test_biases_are_in_every_linear_layer_of_the_blocks_and_nowhere_else(bias):
    for changes in (dict(), dict(mlp="swiglu"), dict(mixer="latent")):
        model = script.GPT(small_config(bias=bias, norm="layernorm", norm_weights=True, **changes))
        linear = [m for block in model.transformer.h for m in block.modules() if isinstance(m, torch.nn.Linear)]
        assert linear and all((m.bias is not None) == bias for m in linear)
        assert model.lm_head.bias is None
        assert sum("bias" in name for name, _ in model.named_parameters()) == bias * (len(linear) + 5)


def test_learned_positions_are_added_once_and_nothing_is_rotated(float64):
    config = small_config(position="learned", n_positions=9, dropout=0.0)
    model = script.GPT(config)
    assert model.transformer.wpe.weight.shape == (9, 32)
    idx, _ = batch_of(config, T=7)
    x, ctx = model.embed(idx)
    assert torch.equal(x, model.transformer.wte.weight[idx] + model.transformer.wpe.weight[:7])
    assert ctx.cos is ctx.sin is None
    # Without positions attention could not tell the order of what it sees.
    with torch.no_grad():
        same = model(idx.flip(1))[0][:, -1]
        model.transformer.wpe.weight.zero_()
        first, *_ = model.transformer.h
        x = model.transformer.wte.weight[idx]
        order = [5, 2, 0, 1, 4, 3, 6]
        y = first(x, ctx)[:, -1]
        torch.testing.assert_close(first(x[:, order], ctx)[:, -1], y, rtol=0, atol=1e-13)
        assert (model(idx.flip(1))[0][:, -1] - same).abs().max() > 1e-3


def test_untied_matrices_are_two_and_both_learn(float64):
    for std in (0.0, 0.05):
        model = script.GPT(small_config(tie_embeddings=False, n_embd=64, vocab_size=300, init_std=std))
        embedding, head = model.transformer.wte.weight, model.lm_head.weight
        assert embedding is not head and not torch.equal(embedding, head)
        assert {"transformer.wte.weight", "lm_head.weight"} <= {name for name, _ in model.named_parameters()}
        for w in (embedding, head):
            assert w.std().item() == pytest.approx(std or 1 / math.sqrt(3 * 64), rel=0.05)
        idx, targets = batch_of(model.config)
        model(idx, targets)[1].backward()
        used = torch.zeros(300, dtype=torch.bool)
        used[idx] = True
        assert torch.equal(embedding.grad.abs().sum(1) > 0, used) and (head.grad.abs().sum(1) > 0).all()
        tied = script.GPT(dataclasses.replace(model.config, tie_embeddings=True))
        assert model.parameter_count() == tied.parameter_count() + 300 * 64


# Dropout


def test_dropout_is_on_embeddings_attention_weights_and_both_outputs_of_a_block(monkeypatch):
    config = small_config(dropout=0.25, n_layer=3, n_kv_head=2)
    model, dropped, attention = script.GPT(config), [], []
    dropout, attend = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace:
                        dropped.append((tuple(x.shape), p, training)) or dropout(x, p, training, inplace))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, dropout_p, **kw:
                        attention.append(dropout_p) or attend(*args, dropout_p=dropout_p, **kw))
    idx, _ = batch_of(config)
    for training in (True, False):
        model.train(training)
        model(idx)
        assert dropped == [((2, 8, 32), 0.25, training)] * (1 + 2 * 3) and attention == [0.25 * training] * 3
        dropped.clear(), attention.clear()


def test_dropout_drops_its_share_and_keeps_the_mean():
    config = small_config(dropout=0.25, n_positions=4096, position="learned")
    attention = script.CausalSelfAttention(config, 0)
    q = k = torch.randn(2048, 4, 1, 8)
    y = attention.attend(q, k, torch.ones_like(q), None)[:, :, 0]  # of one key the weight is 1: kept or dropped whole
    x, _ = script.GPT(config).embed(torch.zeros(1, 4096, dtype=torch.long))
    for kept, count in ((y != 0, 2048 * 4), (x != 0, 4096 * 32)):
        assert kept.float().mean().item() == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / count))
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]


@pytest.mark.parametrize("preset", ["gpt2", "sized", "d12_mla"])
def test_dropout_is_off_where_nothing_is_trained(preset, tmp_path):
    config = shrunk_preset(preset, dropout=0.5)
    model, plain = script.GPT(config), script.GPT(dataclasses.replace(config, dropout=0.0))
    plain.load_state_dict(model.state_dict())
    idx, targets = batch_of(config)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(300), vocab_size=61))
    run, cpu = small_run(val_tokens=200), torch.device("cpu")
    losses = [script.evaluate(m, shards, m.config, run, FakeWorld(), script.Numerics("fp32", cpu))
              for m in (model, model, plain)]
    assert losses[0] == losses[1] == losses[2]
    assert model.training and not torch.equal(model(idx)[0], model(idx)[0])  # as before
    assert torch.equal(model.eval()(idx)[0], plain.eval()(idx)[0])


def test_each_process_drops_others_of_the_same_network(monkeypatch, tmp_path):
    write_shards(tmp_path, random_tokens(300), vocab_size=61)
    typed = dict(model="tiny", n_layer=1, n_embd=64, dropout=0.5, batch_size=2, sequence_length=8,
                 input_bin=str(tmp_path / "*.bin"), input_val_bin="", precision="fp32")
    found = []
    for rank in (0, 1):
        for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2).items():
            monkeypatch.setenv(name, str(value))
        state, *_ = script.start_run(typed, script.World("cpu"), script.Origin())
        found.append((state.model.state_dict(), state.model(torch.zeros(2, 8, dtype=torch.long))[0]))
    assert_equal_dicts(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


# MLPs, widths, initial weights


@pytest.mark.parametrize("name, formula", [
    ("gelu", lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2),
    ("gelu_tanh", lambda h: h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2),
    ("relu2", lambda h: torch.where(h > 0, h * h, 0.0)),
    ("swiglu", lambda h: h[..., :85] * torch.sigmoid(h[..., :85]) * h[..., 85:]),
])
def test_mlps_with_biases_are_their_definitions(float64, name, formula):
    mlp = script.mlps[name](small_config(mlp=name, ffn_hidden=85, bias=True))
    x = 3 * torch.randn(2, 5, 32)
    h = formula(x @ mlp.c_fc.weight.T + mlp.c_fc.bias)
    torch.testing.assert_close(mlp(x), h @ mlp.c_proj.weight.T + mlp.c_proj.bias, rtol=0, atol=1e-12)
    assert h.shape[-1] == 85


@pytest.mark.parametrize("factor", ["8/3", "4", "3.5", "10/7", "1/3"])
def test_hidden_width_is_the_exact_products_floor(factor):
    exact = fractions.Fraction(factor)
    for width in range(64, 8192 + 1, 64):
        config = script.GPTConfig(n_embd=width, n_head=width // 64, mlp_expansion_factor=script.number(factor))
        assert config.ffn_hidden == exact * width // 1, width


@pytest.mark.parametrize("hidden", [1, 85, 1706, 2048, 2560, 2730, 3413, 10007])
def test_hidden_width_typed_is_kept_and_comes_back_from_a_checkpoint(hidden):
    for width in (64, 768, 896, 1600):
        config = script.GPTConfig(n_embd=width, n_head=width // 64, ffn_hidden=hidden)
        assert config.ffn_hidden == hidden and config.mlp_expansion_factor == pytest.approx(hidden / width)
        assert script.GPTConfig(**dataclasses.asdict(config)) == config
        factor_alone = {**dataclasses.asdict(config), "ffn_hidden": 0}
        assert script.GPTConfig(**factor_alone).ffn_hidden == hidden


@pytest.mark.parametrize("changes", [
    dict(bias=True), dict(mixer="latent", mlp="swiglu"), dict(n_kv_head=2, **SEPARATE),
    dict(position="learned", norm="layernorm", norm_weights=True, bias=True, tie_embeddings=False),
])
def test_init_std_is_that_of_every_matrix_and_less_into_the_stream(changes):
    model = script.GPT(small_config(n_layer=8, n_embd=64, vocab_size=500, init_std=0.03, **changes))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.03 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.03
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name
            assert p.abs().max() > 2.5 * std, name  # normal, not uniform
        else:
            assert torch.equal(p, torch.full_like(p, not name.endswith("bias"))), name


@pytest.mark.parametrize("scale_attention, post_norm", itertools.product((True, False), repeat=2))
def test_the_attention_outputs_scale(float64, scale_attention, post_norm):
    config = small_config(n_layer=7, scale_attention=scale_attention, post_norm=post_norm)
    block, ctx, x = script.Block(config, 0), context(config, 9), torch.randn(2, 9, 32)
    y = x + block.attn_norm(block.attn(script.Norm()(x), ctx)) * (1 / math.sqrt(14) if scale_attention else 1)
    torch.testing.assert_close(block(x, ctx), y + block.mlp_norm(block.mlp(script.Norm()(y))), rtol=0, atol=1e-12)


# Whole networks of others


def test_gpt2_is_that_of_transformers(float64):
    """Logits and gradients of the preset's switches on a small network; GPT-2's Conv1D has transposed weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = shrunk_preset("gpt2", n_positions=16, dropout=0.0, init_std=0.0)
    model = started(config)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=6, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    ))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    theirs.load_state_dict({name: w.T if name.endswith(conv1d) else w for name, w in model.state_dict().items()})
    idx, targets = batch_of(config, T=16)
    logits, loss = model(idx, targets)
    other = theirs(idx).logits
    torch.testing.assert_close(logits, other, rtol=0, atol=1e-12)
    loss.backward()
    F.cross_entropy(other.flatten(0, 1), targets["target_1"].flatten()).backward()
    for name, p in theirs.named_parameters():
        ours = model.get_parameter(name).grad
        torch.testing.assert_close(p.grad, ours.T if name.endswith(conv1d) else ours, rtol=0, atol=1e-12, msg=name)
    assert len(list(theirs.parameters())) == len(list(model.parameters()))


def test_gpt2_starts_as_transformers_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = dict(vocab_size=512, n_embd=64, n_layer=4, n_head=4)
    theirs = GPT2LMHeadModel(GPT2Config(**settings, n_positions=64, bos_token_id=None, eos_token_id=None))
    model = script.GPT(script.GPTConfig(**{**script.base_configs["gpt2"], **settings, "n_positions": 64}))
    for name, p in theirs.named_parameters():
        ours = model.get_parameter(name)
        assert ours.mean().item() == pytest.approx(p.mean().item(), abs=0.002), name
        assert ours.std().item() == pytest.approx(p.std().item(), rel=0.1, abs=1e-8), name


@pytest.mark.parametrize("kv_heads, hidden", [(2, 64), (3, 37)])
def test_sized_is_transformers_llama(float64, kv_heads, hidden):
    """To float32, in which its norms and angles are computed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = shrunk_preset("sized", n_kv_head=kv_heads, ffn_hidden=hidden, init_std=0.0)
    model = started(config)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=kv_heads, rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), attn_implementation="eager", bos_token_id=None,
        eos_token_id=None,
    ))
    weights = {"model.norm.weight": model.transformer.ln_f.weight}
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.split((24, 4 * kv_heads, 4 * kv_heads))
        gate, up = block.mlp.c_fc.weight.split(hidden)
        rows = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate,
                "self_attn.o_proj": block.attn.c_proj.weight, "mlp.up_proj": up,
                "mlp.down_proj": block.mlp.c_proj.weight, "input_layernorm": block.ln_1.weight,
                "post_attention_layernorm": block.ln_2.weight}
        weights.update({f"model.layers.{i}.{name}.weight": w for name, w in rows.items()})
    llama.load_state_dict(weights)
    idx, targets = batch_of(config, T=20)
    logits, loss = model(idx, targets)
    other = llama(idx).logits
    torch.testing.assert_close(logits, other, rtol=0, atol=1e-5)
    loss.backward()
    F.cross_entropy(other.flatten(0, 1), targets["target_1"].flatten()).backward()
    norms = [p.grad for name, p in llama.named_parameters() if "norm" in name]
    ours = [p.grad for name, p in model.named_parameters() if ".ln_" in name]
    for a, b in zip(norms, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(llama.lm_head.weight.grad, model.lm_head.weight.grad, rtol=0, atol=1e-5)


# Latent attention


def naive_latent(attention, x, config):
    """DeepSeek-V2, equations 9 to 13 and 16 to 19 with its rotary key, one query of one head at a time; queries come
    straight from the stream."""
    B, T, C = x.shape
    H, D, R, L = config.n_head, config.head_dim, config.rope_head_dim, config.kv_rank
    latent, shared = x @ attention.c_down.weight[:L].T, x @ attention.c_down.weight[L:].T
    rms = (lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()) if config.qk_norm else lambda z: z

    def turn(z):
        """z (B, T, R): pairs (d, d + R/2) turned by t base**(-2d/R)."""
        angle = torch.arange(T)[:, None] * config.rope_base ** (-2 * torch.arange(R // 2) / R)
        turned = torch.complex(z[..., : R // 2], z[..., R // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    k_rotary = turn(rms(shared))
    y = torch.zeros(B, T, H * D)
    for h in range(H):
        queries = x @ attention.c_q.weight[h * (D + R) : (h + 1) * (D + R)].T
        up = attention.c_up.weight[h * 2 * D : (h + 1) * 2 * D]
        content, values = latent @ up[:D].T, latent @ up[D:].T
        q = torch.cat((rms(queries[..., :D]), turn(rms(queries[..., D:]))), -1)
        k = torch.cat((rms(content), k_rotary), -1)
        for b, t in itertools.product(range(B), range(T)):
            seen = range(max(0, t - config.window + 1) if config.window else 0, t + 1)
            scores = torch.stack([q[b, t] @ k[b, s] / math.sqrt(D + R) for s in seen])
            weights = scores.exp() / scores.exp().sum()
            y[b, t, h * D : (h + 1) * D] = sum(w * values[b, s] for w, s in zip(weights, seen))
    return y @ attention.c_proj.weight.T


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("heads, rank, rotary", [(4, 5, 6), (1, 16, 2)])
def test_latent_attention_is_its_definition(float64, heads, rank, rotary, qk_norm, window):
    config = small_config(mixer="latent", n_head=heads, kv_rank=rank, rope_head_dim=rotary, qk_norm=qk_norm,
                          window=window, rope_base=50.0)
    attention, x = script.LatentAttention(config, 0), torch.randn(2, 9, 32)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    D = 32 // heads
    assert shapes == {"c_q.weight": (heads * (D + rotary), 32), "c_down.weight": (rank + rotary, 32),
                      "c_up.weight": (heads * 2 * D, rank), "c_proj.weight": (32, 32)}
    y = attention(x, context(config, 9))
    torch.testing.assert_close(y, naive_latent(attention, x, config), rtol=0, atol=1e-10)
    y.square().sum().backward()
    assert window == 1 or all(p.grad.abs().max() > 1e-6 for p in attention.parameters())


@pytest.mark.parametrize("window", [0, 3])
def test_latent_attention_sees_its_window_and_no_later_token(float64, window):
    config = small_config(mixer="latent", window=window, n_layer=1, qk_norm=True, kv_rank=8, rope_head_dim=4)
    model = script.GPT(config)
    idx, _ = batch_of(config, B=1, T=10)
    before = model(idx)[0]
    for j in range(10):
        moved = (model(changed_id(idx, j, 61))[0] - before).abs().amax(-1)[0]
        sees = torch.arange(10) >= j
        sees &= torch.arange(10) < j + (window or 10)
        assert (moved[sees] > 1e-7).all() and (moved[~sees] < 1e-13).all()


# Separate heads for the tokens further ahead


@pytest.mark.parametrize("preset", ["d12", "gpt2", "sized", "d12_mla"])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_separate_heads_are_their_definition(float64, steps, preset):
    config = shrunk_preset(preset, **{**SEPARATE, "mtp_max_steps": steps, "dropout": 0.0})
    model = started(config)
    idx, targets = batch_of(config, T=9)
    x, ctx = model.embed(idx)
    for block in model.transformer.h:
        x = block(x, ctx)
    streams = [x] + [model.mtp_blocks[str(k)](x, ctx) for k in range(2, steps + 1)]
    logits = [model.transformer.ln_f(z) @ model.lm_head.weight.T for z in streams]
    losses = [naive_cross_entropy(z, targets[f"target_{k}"]) for k, z in enumerate(logits, 1)]
    aux = sum(losses[1:]) / (steps - 1)
    _, components = model(idx, targets, return_loss_components=True)
    assert [z.item() for z in components] == pytest.approx([losses[0], aux], abs=1e-11)
    for weight in (0.0, 0.7):
        model.mtp_weight_buffer.fill_(weight)
        assert model(idx, targets)[1].item() == pytest.approx(losses[0] + weight * aux, abs=1e-11)
    torch.testing.assert_close(model(idx, targets)[0], logits[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(idx)[0], logits[0], rtol=0, atol=1e-12)


def test_separate_heads_are_trained_each_by_its_own_target(float64):
    model = script.GPT(small_config(**SEPARATE))
    assert list(model.mtp_blocks) == ["2", "3"]
    idx, targets = batch_of(model.config)
    everything = gradients(model, idx, targets)
    assert all(g.abs().max() > 1e-9 for g in everything.values())
    other = dict(targets, target_3=torch.full_like(targets["target_3"], 5))
    changed = gradients(model, idx, other)
    for name, g in everything.items():
        assert torch.equal(g, changed[name]) == name.startswith("mtp_blocks.2."), name


def test_separate_heads_leave_the_networks_logits_and_names():
    config = small_config(**SEPARATE)
    model, plain = script.GPT(config), script.GPT(small_config())
    names = model.state_dict().keys()
    own = {f"mtp_blocks.{k}.{name}" for k in (2, 3) for name, _ in model.transformer.h[0].named_parameters()}
    assert names == plain.state_dict().keys() | own
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if name not in own})
    idx, targets = batch_of(config)
    assert torch.equal(model(idx)[0], plain(idx)[0])
    assert torch.equal(model(idx, targets, return_loss_components=True)[1][0], plain(idx, targets)[1])


@pytest.mark.parametrize("changes", [dict(mtp_enabled=False), dict(mtp_max_steps=1), dict(mtp_heads="shared")])
def test_without_offsets_of_their_own_there_are_no_blocks(changes):
    assert not script.GPT(small_config(**{**SEPARATE, **changes})).mtp_blocks


@pytest.mark.parametrize("changes", [SEPARATE, dict(loss_clamp=4.2), dict(dropout=0.1, position="learned"),
                                     dict(mixer="latent"), dict(SEPARATE, gradient_checkpointing=True)])
def test_a_step_compiles_once_whatever_mtps_weight(changes):
    model, compilations = script.GPT(small_config(n_layer=1, **changes)), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=not model.config.gradient_checkpointing)
    idx, targets = batch_of(model.config)
    for seed, weight in enumerate((0.0, 0.1, 3.0)):
        model.mtp_weight_buffer.fill_(weight)
        torch.manual_seed(seed)
        loss = compiled(idx, targets, return_logits=False)[1]
        loss.backward()
        torch.manual_seed(seed)
        torch.testing.assert_close(loss, model(idx, targets, return_logits=False)[1])
    assert len(compilations) == 1
    torch._dynamo.reset()


# Capped losses


@pytest.mark.parametrize("changes", [dict(), dict(mtp_enabled=True, mtp_max_steps=3), SEPARATE])
def test_the_loss_is_capped_only_while_training(float64, changes, tmp_path):
    config = small_config(loss_clamp=4.2, **changes)
    model, plain = started(config), script.GPT(dataclasses.replace(config, loss_clamp=0.0))
    torch.nn.init.normal_(model.lm_head.weight, std=0.4)
    plain.load_state_dict(model.state_dict())
    idx, targets = batch_of(config, B=16)

    def parts(m):
        return [z.item() for z in m(idx, targets, return_loss_components=True)[1] if z is not None]

    capped, free = parts(model), parts(plain)
    assert all(1 < a < 4.2 and a + 0.5 < b for a, b in zip(capped, free))
    assert parts(model.eval()) == free
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(300), vocab_size=61))
    run, numerics = small_run(val_tokens=200), script.Numerics("fp32", torch.device("cpu"))
    losses = [script.evaluate(m, shards, m.config, run, FakeWorld(), numerics) for m in (model, plain)]
    assert losses[0] == losses[1] and losses[0]["val_loss"] > 4.2


# Memory for time


@pytest.mark.parametrize("preset", ["d12", "gpt2", "sized", "d12_mla", "d12_window"])
def test_blocks_run_again_give_the_same_loss_and_gradients(preset, monkeypatch):
    """Bitwise, dropped units included, and each block runs twice."""
    dropout = 0.0 if preset == "d12_window" else 0.3
    config = shrunk_preset(preset, **SEPARATE, dropout=dropout)
    model, found, runs = started(config), [], []
    forward = script.Block.forward
    monkeypatch.setattr(script.Block, "forward", lambda self, x, ctx: runs.append(self) or forward(self, x, ctx))
    idx, targets = batch_of(config)
    for checkpointing in (False, True):
        model.config = dataclasses.replace(config, gradient_checkpointing=checkpointing)
        torch.manual_seed(5)
        runs.clear()
        found.append((gradients(model, idx, targets), torch.get_rng_state()))
        assert len(runs) == (2 + 2) * (1 + checkpointing)
    assert_equal_dicts(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # so the next step drops the same too
    runs.clear()
    gradients(model.eval(), idx, targets)
    assert len(runs) == 2 + 2


def test_blocks_run_again_keep_less(monkeypatch):
    """Elements that autograd keeps for the backward pass."""
    def kept(checkpointing):
        model, sizes = script.GPT(small_config(n_layer=6, gradient_checkpointing=checkpointing)), []
        idx, targets = batch_of(model.config, T=32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(idx, targets, return_logits=False)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


# Padded products


class OnCuda(torch.Tensor):
    """A tensor on the CPU that says it is on CUDA, where widths are rounded up."""

    is_cuda = True


def integers(*shape):
    """Small whole numbers, whose products and sums are exact: no order of summation can tell."""
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [5, 8, 1706, 2048, 2389, 2730, 3413])
@pytest.mark.parametrize("mlp", ["relu2", "gated"])
def test_padded_products_are_the_unpadded_ones_bitwise(mlp, width, bias, monkeypatch):
    """Each product alone and an MLP's two in a row, their values and all gradients."""
    monkeypatch.setattr(F, "silu", lambda x: x)  # so that all numbers stay whole
    config = small_config(n_head=1, n_embd=6, bias=bias, ffn_hidden=width, mlp="relu2" if mlp == "relu2" else "swiglu")
    network, shapes, linear = script.mlps[config.mlp](config), [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: shapes.append(tuple(w.shape)) or linear(x, w, b))
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(integers(*p.shape))
    for module, fan_in in ((network.c_fc, 6), (network.c_proj, width), (network, 6)):
        x, results = integers(2, 3, fan_in).clamp(-1, 1), []
        dy = integers(*module(x).shape).clamp(-1, 1)
        for on_cuda in (False, True):
            shapes.clear()
            leaf = x.clone().requires_grad_()
            y = module(leaf.as_subclass(OnCuda) if on_cuda else leaf).as_subclass(torch.Tensor)
            results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
            assert all(size % 8 == 0 for shape in shapes for size in shape) or not on_cuda
        assert all(z.abs().max() < 2**24 for z in results[0])  # whole numbers up to there are exact
        for a, b in zip(*results):
            assert a.shape == b.shape and torch.equal(a, b)
    h = x @ network.c_fc.weight.T + (network.c_fc.bias if bias else 0)
    h = F.relu(h).square() if mlp == "relu2" else h[..., :width] * h[..., width:]
    assert torch.equal(results[1][0], h @ network.c_proj.weight.T + (network.c_proj.bias if bias else 0))


@pytest.mark.parametrize("mlp", script.mlps)
def test_an_mlp_keeps_what_is_padded_at_nothing(mlp):
    """So that the second product may take the first one's padding: its gradients are those of the unpadded one."""
    network, x = script.mlps[mlp](small_config(mlp=mlp, ffn_hidden=13, bias=True)), torch.randn(2, 5, 32)
    seen, linear = [], F.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda x, w, b=None: seen.append(x) or linear(x, w, b))
        network(x.as_subclass(OnCuda)).sum().backward()
    assert seen[1].size(-1) == 16 and torch.equal(seen[1][..., 13:], torch.zeros(2, 5, 3))


@pytest.mark.parametrize("shape, columns, rows", [
    ((3, 5), 8, 1), ((2, 3, 8), 8, 4), ((1, 1), 16, 16), ((4, 16), 16, 4), ((3, 24), 24, 1),
])
def test_pad_to(shape, columns, rows):
    x = torch.randn(shape)
    y = script.pad_to(x, columns, rows)
    assert y.size(-1) % columns == y.size(-2) % rows == 0
    assert y.size(-1) - x.size(-1) < columns and y.size(-2) - x.size(-2) < rows and y.shape[:-2] == x.shape[:-2]
    assert torch.equal(y[..., : x.size(-2), : x.size(-1)], x) and y.abs().sum() == x.abs().sum()
    assert (y is x) == (y.shape == x.shape)


@pytest.mark.parametrize("preset", ["d12", "gpt2", "sized", "d12_mla"])
def test_a_whole_padded_network_is_the_unpadded_one(float64, preset, monkeypatch):
    config = shrunk_preset(preset, n_head=3, n_kv_head=3, n_embd=18, ffn_hidden=37, dropout=0.0, **SEPARATE)
    model = started(config)
    idx, targets = batch_of(config)
    plain, shapes, linear = gradients(model, idx, targets), set(), F.linear

    def padded(x, weight, bias=None):
        shapes.add(tuple(size % 8 for size in weight.shape))
        return linear(x, weight, bias).as_subclass(OnCuda)

    monkeypatch.setattr(F, "linear", padded)
    embed, loss = script.GPT.embed, script.GPT.loss
    monkeypatch.setattr(script.GPT, "embed", lambda self, idx, mask: (lambda x, ctx: (x.as_subclass(OnCuda), ctx))(
        *embed(self, idx, mask)))
    monkeypatch.setattr(script.GPT, "loss", lambda self, x, *rest: loss(self, x.as_subclass(torch.Tensor), *rest))
    found = gradients(model, idx, targets)
    assert shapes == {(0, 0)}
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=0, atol=1e-12)


# FLOPs


@pytest.mark.parametrize("preset, changes", [
    ("d12", {}), ("d12_gqa", {}), ("d12_swiglu", {}), ("sized", {}), ("d12_mla", {}), ("d12", SEPARATE),
    ("gpt2", dict(bias=False)), ("d12", dict(tie_embeddings=False)), ("d12_mla", SEPARATE),
])
def test_flops_are_what_torch_counts(preset, changes):
    """Of the matrix products of a forward and backward pass, attention's over the full square as the plain kernel does
    them: what fused ones do again in the backward pass is no work of the network's."""
    config = shrunk_preset(preset, **{"dropout": 0.0, **changes})
    model = script.GPT(config)
    idx, targets = batch_of(config, B=2, T=16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, targets, return_logits=False)[1].backward()
    parts = model.flops_by_part(16)
    assert sum(parts.values()) == model.flops_per_token(16) and all(v > 0 for v in parts.values())
    assert model.flops_per_token(16) == counter.get_total_flops() / (2 * 16)
    heads = 1 + len(model.mtp_blocks)
    assert parts["head"] == heads * 6 * 61 * 24
    assert parts["mlp"] == 6 * sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
