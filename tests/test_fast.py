"""The parts of the fast recipe: documents apart, value embeddings, the mixes, norm and start of the embedding."""
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, batch_of, shrunk_preset, small_config, small_run
from torch.nn.attention.flex_attention import create_block_mask

import train_gpt2_mod as script

EOT = 60  # the last token of small_config's vocabulary


def fast_config(**changes):
    return shrunk_preset("d12_fast", **{**dict(n_layer=3, n_head=2, n_embd=32), **changes})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def caught(model, name, call):
    """What each block's attention hands to its method `name` while a call runs: a list of tuples of arguments."""
    found = []
    for block in model.transformer.h:
        method = getattr(block.attn, name)
        setattr(block.attn, name, lambda *args, method=method: found.append(args) or method(*args))
    call()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Documents


def documents_of(row):
    """The slices of a row of ids that are a document each: one begins at each end-of-text token."""
    starts = sorted({0, *(i for i, token in enumerate(row) if token == EOT)})
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(row)])]


@pytest.mark.parametrize("window", [0, 1, 4, 50])
@pytest.mark.parametrize("preset", ["d12", "d12_gqa", "d12_fast", "d12_mla"])
def test_a_masked_document_is_read_as_if_it_were_alone(float64, preset, window):
    """RoPE tells only distances, so a document in the midst of a row is the same as one at its beginning."""
    config = shrunk_preset(preset, document_mask=True, window=window, precision="fp32")
    model = script.GPT(config).eval()
    idx, _ = batch_of(config, B=3, T=17)
    idx[idx == EOT] = 0
    idx[0, 5] = idx[0, 11] = idx[1, 0] = idx[1, 1] = idx[1, 16] = EOT  # the last row has none
    together = model(idx)[0]
    for row, logits in zip(idx, together):
        pieces = documents_of(row.tolist())
        for piece in pieces:
            alone = model(row[None, piece])[0][0]
            torch.testing.assert_close(logits[piece], alone, rtol=0, atol=1e-10)
    unmasked = script.GPT(shrunk_preset(preset, window=window)).eval()
    unmasked.load_state_dict(model.state_dict())
    if window != 1:  # where each token sees itself alone in any case
        assert (unmasked(idx)[0] - together)[0, 6:].abs().max() > 1e-6
    torch.testing.assert_close(unmasked(idx)[0][2], together[2], rtol=0, atol=1e-12)


def test_the_mask_of_documents_is_its_definition():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 3, 3]])
    for window in (0, 2, 6, 9):
        mask = script.window_mask(6, window, documents.device, documents)
        assert mask.shape == (2, 1, 6, 6)
        for b in range(2):
            for q in range(6):
                for k in range(6):
                    seen = k <= q and q - k < (window or 6) and documents[b, q] == documents[b, k]
                    assert mask[b, 0, q, k] == seen, (window, b, q, k)


def test_dropout_and_forced_kernels_do_not_go_with_masked_documents():
    with pytest.raises(script.ConfigError, match="dropout=0.1 with document_mask"):
        small_config(document_mask=True, dropout=0.1)
    with pytest.raises(script.ConfigError, match="attention=flash would be ignored: document_mask=True"):
        script.resolve(dict(document_mask=True, attention="flash"), script.ANY_MACHINE)


def test_the_log_names_the_kernel_of_masked_documents():
    world = script.World("cpu")
    for window, said in ((0, "for masked documents:"), (4, "for a window of 4 tokens and masked documents:")):
        run = script.TrainConfig(sequence_length=8, grad_accumulation_steps=1)
        _, note = script.attention_kernel(small_config(document_mask=True, window=window), run, world)
        assert note.startswith(f"attention kernel {said}")


@pytest.mark.parametrize("window", [0, 5, 50, 400])
def test_the_block_mask_of_documents_masks_as_the_dense_mask_does(float64, window):
    """FlexAttention uncompiled is torch's own reference of itself."""
    config = small_config(document_mask=True, window=window, n_embd=32, n_head=2)
    model, unmasked = script.GPT(config), script.GPT(small_config(n_embd=32, n_head=2))
    unmasked.load_state_dict(model.state_dict())
    for seed in range(2):  # another batch, other documents
        idx, targets = batch_of(config, B=2, T=300)
        idx[torch.rand(2, 300, generator=torch.Generator().manual_seed(seed)) < 0.03] = EOT
        found = []
        for model.block_mask in (None, create_block_mask):
            with torch.no_grad():  # its backward pass needs a GPU
                found.append(model(idx, targets)[0])
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)
        assert (found[1] - unmasked(idx)[0]).abs().max() > 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a GPU")
@pytest.mark.parametrize("documents", [True, False])
def test_on_a_gpu_flex_attention_masks_as_the_dense_mask_does(documents):
    config = small_config(document_mask=documents, window=100, n_embd=128, n_head=2, precision="fp32")
    model, found = script.GPT(config).cuda(), []
    for _ in range(2):
        for seed in range(3):
            idx, targets = batch_of(config, B=2, T=256)
            idx[torch.rand(2, 256, generator=torch.Generator().manual_seed(seed)) < 0.02 * seed] = EOT
            idx, targets = idx.cuda(), {name: target.cuda() for name, target in targets.items()}
            model.zero_grad()
            loss = model.train()(idx, targets, return_logits=False)[1]
            loss.backward()
            with torch.no_grad():
                logits = model.eval()(idx)[0]
            found.append([logits, loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.trunk = torch.compile(model.trunk, dynamic=False)
        model.block_mask = torch.compile(create_block_mask, dynamic=False)
    for dense, flex in zip(found[:3], found[3:]):
        for a, b in zip(dense, flex):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What is mixed


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("n_layer, tables, of_layer", [
    (2, 1, [0, 0]), (3, 1, [0, None, 0]), (5, 2, [0, 1, None, 0, 1]), (6, 3, [0, 1, 2, 0, 1, 2]), (3, 0, [None] * 3),
])
def test_value_embeddings_are_mixed_into_the_first_and_last_blocks(float64, n_layer, tables, of_layer, n_kv_head):
    config = fast_config(n_layer=n_layer, value_embeddings=tables, n_kv_head=n_kv_head)
    model = script.GPT(config)
    for i, block in enumerate(model.transformer.h):
        if of_layer[i] is not None:
            block.attn.value_mix.lambdas.data = torch.tensor([0.3 + i, 0.7 - i])
    idx, _ = batch_of(config, T=9)
    inputs = caught(model, "qkv", lambda: None)
    values = caught(model, "attend", lambda: model(idx))
    assert len(values) == len(inputs) == n_layer
    for i, ((x, _), (_, _, v, _), block) in enumerate(zip(inputs, values, model.transformer.h)):
        plain = F.linear(x, block.attn.c_attn.weight[-n_kv_head * 16 :]).view(2, 9, n_kv_head, 16)
        if of_layer[i] is None:
            assert not list(block.attn.value_mix.parameters())
            expected = plain
        else:
            rows = model.value_embeddings[of_layer[i]].weight[idx].view(2, 9, n_kv_head, 16)
            expected = (0.3 + i) * plain + (0.7 - i) * rows
        torch.testing.assert_close(v.transpose(1, 2), expected, rtol=1e-12, atol=1e-14)


def test_value_embeddings_that_do_not_fit_are_refused():
    with pytest.raises(script.ConfigError, match="value_embeddings=2 go into .* n_layer=3 has no 4; try 1"):
        small_config(n_layer=3, value_embeddings=2)
    with pytest.raises(script.ConfigError, match="value_embeddings=1 with mixer=latent"):
        small_config(mixer="latent", value_embeddings=1)


def test_each_block_begins_with_a_mix_of_stream_and_embedding(float64):
    config = fast_config(x0_lambdas=True)
    model = script.GPT(config)
    inputs, mixed = [], []
    for i, block in enumerate(model.transformer.h):
        block.mix.lambdas.data = torch.tensor([1.5 + i, -0.5 * (i + 1)])
        block.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
        block.ln_1.register_forward_pre_hook(lambda norm, args: mixed.append(args[0]))
    idx, _ = batch_of(config, T=7)
    model(idx)
    x0 = model.embed(idx)[0]
    torch.testing.assert_close(inputs[0], x0)
    for i, (x, found) in enumerate(zip(inputs, mixed, strict=True)):
        torch.testing.assert_close(found, (1.5 + i) * x - 0.5 * (i + 1) * x0, rtol=1e-12, atol=1e-14)


def test_at_the_start_the_lambdas_of_x0_change_nothing(float64):
    model = script.GPT(fast_config(x0_lambdas=True))
    plain = script.GPT(fast_config(x0_lambdas=False))
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if ".mix." not in name})
    idx, _ = batch_of(model.config)
    torch.testing.assert_close(model(idx)[0], plain(idx)[0], rtol=0, atol=0)


@pytest.mark.parametrize("changes", [dict(), dict(position="learned", softmax_scale=0.3)])
def test_the_embedding_is_normalised_where_the_stream_begins(float64, changes):
    config = small_config(embd_norm=True, **changes)
    model = script.GPT(config)
    idx, _ = batch_of(config, T=6)
    x = model.transformer.wte.weight[idx]
    if config.position == "learned":
        x = x + model.transformer.wpe.weight[:6]
    expected = x / (x.square().mean(-1, keepdim=True) + script.NORM_EPS).sqrt()
    torch.testing.assert_close(model.embed(idx)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("scale", [0.0, 0.12, 2.0])
def test_softmax_scale_is_the_factor_of_the_scores(float64, scale, window):
    attention = script.CausalSelfAttention(small_config(softmax_scale=scale, window=window), 0)
    q, k, v = (torch.randn(2, 4, 7, 8) for _ in range(3))
    mask = script.window_mask(7, window, q.device)
    seen = torch.ones(7, 7, dtype=torch.bool).tril() if mask is None else mask
    scores = (q @ k.mT * (scale or 1 / math.sqrt(8))).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(attention.attend(q, k, v, mask), scores.softmax(-1) @ v, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The start, and the whole


def test_a_zero_start_predicts_every_token_alike():
    config = fast_config(zero_init=True, tie_embeddings=False)
    model = script.GPT(config)
    for block in model.transformer.h:
        assert not block.attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
        assert block.attn.c_attn.weight.std() > 0.05 and block.mlp.c_fc.weight.std() > 0.05
    idx, targets = batch_of(config)
    logits, loss = model(idx, targets)
    assert not logits.any() and loss.item() == pytest.approx(math.log(61), abs=1e-6)
    tied = script.GPT(small_config(zero_init=True))
    assert tied(idx)[0].std() > 0.01  # its head is the embedding
    torch.testing.assert_close(tied.trunk(idx)[0], script.Norm()(tied.transformer.wte(idx)))  # the blocks add nothing


def test_embeddings_start_with_their_own_deviation():
    sizes = dict(n_embd=256, vocab_size=500, embd_init_std=0.7, value_init_std=0.0)
    model = script.GPT(fast_config(**sizes, tie_embeddings=False, zero_init=False))
    for table in (model.transformer.wte, *model.value_embeddings):
        assert table.weight.std().item() == pytest.approx(0.7, rel=0.02)
        assert abs(table.weight.mean().item()) < 0.01
    bound = 1 / 16
    others = [model.lm_head.weight, model.transformer.h[0].attn.c_attn.weight]
    for weight in others:
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("changes", [
    dict(), dict(document_mask=True, gradient_checkpointing=True), dict(tie_embeddings=True, n_kv_head=1),
    dict(mtp_enabled=True, mtp_heads="separate", mtp_max_steps=2), dict(attention_gate=12, smear="embedding+attention"),
], ids=str)
def test_every_weight_learns(changes):
    """From a zero start each weight has had a gradient after a few steps; the loss falls."""
    config = fast_config(zero_init=True, **changes)
    model, numerics = script.GPT(config), script.Numerics("fp32", CPU)
    run = small_run(optimizer="muon", muon_lr=0.05, learning_rate=0.01)
    optimizer = script.make_optimizer(model, run, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    idx, targets = batch_of(config, B=4)
    losses = []
    for _ in range(4):
        loss = model(idx, targets, return_logits=False)[1]
        numerics.backward(loss)
        numerics.step(optimizer, list(model.parameters()), 0.0, loss.detach())
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not same


def test_checkpointing_and_compiling_the_trunk_change_no_gradient(float64):
    config = fast_config(document_mask=True, softmax_scale=0.2)
    model = script.GPT(config)
    idx, targets = batch_of(config, B=3, T=12)
    idx[0, 4] = EOT

    def gradients(model):
        model.zero_grad()
        model(idx, targets, return_logits=False)[1].backward()
        return [p.grad.clone() for p in model.parameters()]

    again = script.GPT(fast_config(document_mask=True, softmax_scale=0.2, gradient_checkpointing=True))
    again.load_state_dict(model.state_dict())
    expected, recomputed = gradients(model), gradients(again)
    model.trunk = torch.compile(model.trunk, backend="aot_eager", dynamic=False)
    for one, two, three in zip(expected, recomputed, gradients(model)):
        torch.testing.assert_close(two, one, rtol=0, atol=0)
        torch.testing.assert_close(three, one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", [False, True])
def test_the_smear_is_its_definition(float64, norm):
    config = small_config(smear="embedding", embd_norm=norm)
    model, plain = script.GPT(config), script.GPT(small_config(embd_norm=norm))
    assert torch.equal(model.smear.weight, torch.zeros(32))
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if name != "smear.weight"})
    idx, _ = batch_of(config, B=3, T=9)
    idx[0, 4] = idx[1, 0] = EOT
    assert torch.equal(model.embed(idx)[0], plain.embed(idx)[0])  # it begins as nothing
    with torch.no_grad():
        model.smear.weight.normal_()
    x = plain.embed(idx)[0]
    for b in range(3):
        for t in range(9):
            before = 0 if t == 0 or idx[b, t] == EOT else model.smear.weight * x[b, t - 1]
            torch.testing.assert_close(model.embed(idx)[0][b, t], x[b, t] + before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "attention+mlp"])
def test_a_block_that_smears_is_its_definition(float64, kind):
    config = small_config(smear=kind)
    block, plain = script.Block(config, 0), script.Block(small_config(), 0)
    block.load_state_dict(plain.state_dict(), strict=False)
    x, follows = torch.randn(2, 9, 32), torch.rand(2, 9, 1) < 0.7
    ctx = script.Context(*script.Rotary(config.rotary_dim, config.rope_base)(9), None, follows=follows)
    torch.testing.assert_close(block(x, ctx), plain(x, ctx), rtol=0, atol=0)  # it begins as nothing

    def smeared(z, weight):
        rows = [[z[b, t] + (weight * z[b, t - 1] if t and follows[b, t] else 0) for t in range(9)] for b in range(2)]
        return torch.stack([torch.stack(row) for row in rows])

    weights = [torch.randn(32) * ("attention" in kind), torch.randn(32)]
    with torch.no_grad():
        for name, weight in zip(("smear_1", "smear_2"), weights):
            for p in getattr(block, name).parameters():
                p.copy_(weight)
    y = x + plain.attn_scale * plain.attn(smeared(plain.ln_1(x), weights[0]), ctx)
    y = y + plain.mlp(smeared(plain.ln_2(y), weights[1]))
    torch.testing.assert_close(block(x, ctx), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=1, window=3), dict(mixer="latent", kv_rank=8, rope_head_dim=4)])
def test_a_gated_attention_is_its_definition(float64, changes):
    """Each head's part of the output projection's input, times 2 sigmoid of its own sum over the first channels."""
    config = small_config(attention_gate=5, **changes)
    mixer = script.mixers[config.mixer]
    attention, plain = mixer(config, 0), mixer(small_config(**changes), 0)
    assert torch.equal(attention.gate.weight, torch.zeros(4 * 5))
    attention.load_state_dict(plain.state_dict(), strict=False)
    x, angles = torch.randn(2, 9, 32), script.Rotary(config.rotary_dim, config.rope_base)(9)
    ctx = script.Context(*angles, script.window_mask(9, config.window, x.device))
    torch.testing.assert_close(attention(x, ctx), plain(x, ctx), rtol=0, atol=1e-14)  # it begins as nothing
    with torch.no_grad():
        attention.gate.weight.normal_()
    heads = []
    plain.c_proj.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    plain(x, ctx)
    y, weight = heads[0].clone(), attention.gate.weight.tolist()
    for b, t, head in itertools.product(range(2), range(9), range(4)):
        z = sum(weight[5 * head + channel] * float(x[b, t, channel]) for channel in range(5))
        y[b, t, 8 * head : 8 * (head + 1)] *= 2 / (1 + math.exp(-z))
    torch.testing.assert_close(attention(x, ctx), plain.c_proj(y), rtol=0, atol=1e-12)


def test_a_gate_has_no_more_channels_than_there_are():
    assert small_config(attention_gate=32).attention_gate == 32
    with pytest.raises(script.ConfigError, match="attention_gate=33 must be at most n_embd=32"):
        small_config(attention_gate=33)


def test_the_value_tables_begin_at_a_size_of_their_own():
    """Else at that of the other embeddings."""
    uniform = 1 / math.sqrt(3 * 32)
    for std, own, expected in ((0.0, 0.0, uniform), (0.02, 0.0, 0.02), (0.02, 1.0, 1.0), (0.0, 0.5, 0.5)):
        model = script.GPT(fast_config(embd_init_std=std, value_init_std=own, vocab_size=4096))
        assert model.transformer.wte.weight.std().item() == pytest.approx(std or uniform, rel=0.02)
        for table in model.value_embeddings:
            assert table.weight.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("flags", [
    "--value_lr 0.1", "--value_init_std 1", "--model d12_fast --value_embeddings 0 --value_lr 1"])
def test_flags_of_value_embeddings_that_are_not_there_are_refused(flags):
    typed = script.parse_flags(flags.split())
    name = next(name for name in ("value_lr", "value_init_std") if name in typed)
    with pytest.raises(script.ConfigError, match=f"^{name}=.* would be ignored: there are no value embeddings"):
        script.resolve(typed, script.ANY_MACHINE)


def test_the_places_of_smear_have_one_order():
    assert small_config(smear="mlp+embedding+mlp") == small_config(smear="embedding+mlp")
    assert small_config(smear=False) == small_config()
    with pytest.raises(script.ConfigError, match="smear= must be none or some of"):
        small_config(smear="")
    assert small_config().smears == set() and small_config(smear="mlp").smears == {"mlp"}
    for wrong in ("mlp+", "none+mlp", "head", "embedding, mlp"):
        with pytest.raises(script.ConfigError, match=re.escape(f"smear={wrong} must be none or some of embedding")):
            small_config(smear=wrong)


def test_a_smeared_document_is_read_as_if_it_were_alone(float64):
    config = small_config(smear="embedding+attention+mlp", document_mask=True)
    model = script.GPT(config).eval()
    smears = [module for module in model.modules() if isinstance(module, script.Smear)]
    assert len(smears) == 1 + 2 * config.n_layer
    with torch.no_grad():
        for smear in smears:
            smear.weight.normal_()
    idx, _ = batch_of(config, B=1, T=12)
    idx[idx == EOT] = 0
    idx[0, 5] = EOT
    torch.testing.assert_close(model(idx)[0][0, 5:], model(idx[:, 5:])[0][0], rtol=0, atol=1e-10)
