"""docs/28-linear-recurrences: chunks against the recurrence and transformers, Hyena against a direct convolution, each
mixer's causality, sampling with states, whole runs."""
import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gpt2_mod as script
from helpers import batch_of, changed_id, small_config
from launch import ROOT, assert_same, column, content_of, steps, torchrun
from test_moe import errors_compiled, program, registered, rounds_backward

recurrences = program("28-linear-recurrences", "recurrences")
PROGRAM = ROOT / "docs" / "28-linear-recurrences" / "recurrences.py"
KINDS = dict(
    retnet=dict(value_expand=2.0), delta=dict(key_expand=0.5, value_expand=1.5), rwkv7=dict(low_rank=4),
    hyena=dict(short_conv=3, filter_width=8, hyena_length=20),
)
MODULES = {*recurrences.KINDS.values(), recurrences.ShortConv}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    registered(recurrences, monkeypatch)
    monkeypatch.setattr(sys, "path", list(sys.path))


def config_of(kind, **changes):
    small = dict(vocab_size=61, n_layer=2, n_head=4, n_embd=32, precision="fp32", mixer=kind)
    if kind != "hyena":
        small["recurrence_chunk"] = 16
    return recurrences.RecurrentConfig(**{**small, **KINDS[kind], **changes})


def context(T, width=8, start=0):
    cos, sin = script.Rotary(width, 10000.0)(start + T)
    return script.Context(cos[start:], sin[start:], None)


def flags_of(kind, layers=1):
    flags = dict(KINDS[kind], mixer=kind, n_layer=layers)
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


# ----------------------------------------------------------------------------------------------------------------------
# The recurrence


def inputs_of(kind, T, b=2, H=3, K=5, V=4):
    """As its mixer makes them: q, k, v, log_decay, and what the kind has beside."""
    q, k, v = torch.randn(b, T, H, K), torch.randn(b, T, H, K), torch.randn(b, T, H, V)
    if kind == "retnet":
        return dict(q=q, k=k, v=v, log_decay=-torch.rand(1, T, H, 1))
    if kind == "delta":
        return dict(q=q, k=F.normalize(k, dim=-1), v=v, log_decay=-3 * torch.rand(b, T, H, 1),
                    beta=torch.rand(b, T, H, 1))
    removed, rate = F.normalize(torch.randn(b, T, H, K), dim=-1), torch.rand(b, T, H, K)
    log_decay = -recurrences.MOST_DECAY * torch.rand(b, T, H, K)
    return dict(q=q, k=k, v=v, log_decay=log_decay, read=-removed, write=removed * rate)


def naive(kind, state, q, k, v, log_decay, beta=None, read=None, write=None):
    """Token after token as the papers have it, the state (B, H, V, K): S = gamma S + v k'; S = alpha S (1 - beta k k')
    + beta v k'; S = S (diag(w) + read write') + v k'."""
    S, y = state.mT, []
    for t in range(q.size(1)):
        k_t, v_t, w = k[:, t, :, None], v[:, t, :, :, None], log_decay[:, t, :, None].exp()
        if kind == "retnet":
            S = w * S + v_t @ k_t
        elif kind == "delta":
            b = beta[:, t, :, None]
            S = w * S @ (torch.eye(k.size(-1)) - b * k_t.mT @ k_t) + b * v_t @ k_t
        else:
            S = S @ (torch.diag_embed(w[:, :, 0]) + read[:, t, :, :, None] @ write[:, t, :, None]) + v_t @ k_t
        y.append((S @ q[:, t, :, :, None])[..., 0])
    return torch.stack(y, 1), S.mT


@pytest.mark.parametrize("kind", ["retnet", "delta", "rwkv7"])
@pytest.mark.parametrize("T", [1, 16, 55, 96])
@pytest.mark.parametrize("begun", [False, True])
def test_chunks_are_the_recurrence(float64, kind, T, begun):
    inputs = {name: z.requires_grad_() for name, z in inputs_of(kind, T).items()}
    state = (torch.randn(2, 3, 5, 4) * begun).requires_grad_()
    found = recurrences.chunked(**inputs, chunk=16, state=state if begun else None)
    expected = naive(kind, state, **inputs)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)
    weight, wanted = torch.randn_like(found[0]), [*inputs.values(), *[state] * begun]
    gradients = (torch.autograd.grad((y * weight).sum() + last.square().sum(), wanted) for y, last in (found, expected))
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs)


def test_the_chunks_length_changes_nothing(float64):
    for kind, lengths in (("retnet", (16, 48, 256)), ("delta", (16, 64)), ("rwkv7", (16, 64, 128))):
        inputs = inputs_of(kind, 130)
        for length in lengths:
            torch.testing.assert_close(recurrences.chunked(**inputs, chunk=length), naive(kind, torch.zeros(2, 3, 5, 4),
                                                                                          **inputs))


def test_decays_at_their_bounds_stay_numbers_in_fp32():
    """RWKV-7's strongest at all tokens, in the longest chunk, and one number a head far beyond what fp32 can hold."""
    for kind, decay, length in (("rwkv7", recurrences.MOST_DECAY, 128), ("delta", 200.0, 64), ("retnet", 200.0, 1024)):
        inputs = inputs_of(kind, 256)
        inputs["log_decay"] = torch.full_like(inputs["log_decay"], -decay)
        expected = naive(kind, torch.zeros(2, 3, 5, 4), **inputs)
        inputs = {name: z.requires_grad_() for name, z in inputs.items()}
        found = recurrences.chunked(**inputs, chunk=length)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(found[0].square().sum(), list(inputs.values()))
        assert all(z.isfinite().all() for z in gradients)


@pytest.mark.parametrize("T", [1, 40, 64, 100])
def test_the_gated_delta_rule_is_transformers(T):
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule,
    )

    inputs, state = inputs_of("delta", T), torch.randn(2, 3, 5, 4)
    theirs = dict(query=inputs["q"] * 5**0.5, key=inputs["k"], value=inputs["v"], g=inputs["log_decay"][..., 0],
                  beta=inputs["beta"][..., 0], initial_state=state, output_final_state=True)
    found = recurrences.chunked(**inputs, chunk=32, state=state)
    for other in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        torch.testing.assert_close(found, other(**theirs), rtol=1e-4, atol=1e-5)


def test_it_is_the_same_to_the_bit_each_time():
    inputs = {name: z.requires_grad_() for name, z in inputs_of("rwkv7", 70).items()}
    values = []
    for _ in range(2):
        y, _ = recurrences.chunked(**inputs, chunk=32)
        values.append((y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*values))


@pytest.mark.parametrize("T", [1, 2, 33])
def test_hyenas_convolution_is_the_direct_one(float64, T):
    u, h = torch.randn(2, T, 3, requires_grad=True), torch.randn(T, 3, requires_grad=True)
    found = recurrences.convolved(u, h)
    expected = torch.stack([sum(h[t - s] * u[:, s] for s in range(t + 1)) for t in range(T)], 1)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad(y.pow(3).sum(), (u, h)) for y in (found, expected))):
        torch.testing.assert_close(mine, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# Mixers


def test_gated_deltanet_is_transformers():
    """On its weights, which lie in another order; theirs computes in fp32 whatever x is."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    H, K, V = 4, 4, 12
    theirs = Qwen3NextGatedDeltaNet(Qwen3NextConfig(
        hidden_size=32, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=K,
        linear_value_head_dim=V, linear_conv_kernel_dim=4, num_hidden_layers=1), 0).eval()
    mine = recurrences.DeltaNet(config_of("delta"), 0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
        q, k, v, gate = theirs.in_proj_qkvz.weight.view(H, -1, 32).split([K, K, V, V], 1)
        beta, dt = theirs.in_proj_ba.weight.view(H, 2, 32).unbind(1)
        mine.c_in.weight.copy_(torch.cat([z.reshape(-1, 32) for z in (q, k, v, gate, beta, dt)]))
        mine.conv.weight.copy_(theirs.conv1d.weight.flatten())
        mine.dt_shift.copy_(theirs.dt_bias)
        mine.log_a.copy_(theirs.A_log)
        mine.norm_weight.copy_(theirs.norm.weight)
        mine.c_proj.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, 21, 32, requires_grad=True)
    found, expected = mine(x, None), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_retention_is_its_matrix(float64):
    """Section 2.1's parallel form: (q k' times gamma^(n - m)) v, group norm by heads, swish gate."""
    mixer, x, T = recurrences.RetNet(config_of("retnet"), 0), torch.randn(2, 37, 32), 37
    q, k, v, gate = mixer.c_in(x).split([32, 32, 64, 64], -1)
    q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in (q, k, v))
    ctx = context(T)
    q, k = (script.rotate(z.transpose(1, 2), ctx.cos, ctx.sin).transpose(1, 2) for z in (q, k))
    gamma = torch.tensor([1 - 1 / 32, 1 - 2 ** (-19 / 3), 1 - 2 ** (-23 / 3), 1 - 1 / 512])
    apart = torch.arange(T)[:, None] - torch.arange(T)
    kept = torch.where(apart >= 0, gamma[:, None, None] ** apart.clamp(min=0), 0)
    y = (q @ k.mT / 8**0.5 * kept) @ v
    y = F.group_norm(y.transpose(1, 2).reshape(2 * T, 64), 4).view(2, T, 64)
    torch.testing.assert_close(mixer(x, ctx), mixer.c_proj(F.silu(gate) * y), rtol=1e-6, atol=1e-6)


def test_rwkvs_time_mixing_is_its_equations(float64):
    """Token by token, in the terms of the paper's section 4."""
    m, T = recurrences.RWKV7(config_of("rwkv7"), 1), 20
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, y, S, before = torch.randn(T, 32), [], torch.zeros(4, 8, 8), torch.zeros(32)
    for x_t in x:
        of = {name: x_t + (before - x_t) * getattr(m, f"shift_{name}") for name in "rwkvag"}
        before = x_t
        r, k, v = m.c_r.weight @ of["r"], m.c_k.weight @ of["k"], m.c_v.weight @ of["v"]
        d = m.w_shift + m.w_up.weight @ torch.tanh(m.w_down.weight @ of["w"])
        w = torch.exp(-torch.exp(torch.tensor(-0.5)) * torch.sigmoid(d)).view(4, 8)
        a = torch.sigmoid(m.a_shift + m.a_up.weight @ (m.a_down.weight @ of["a"]))
        g = m.g_up.weight @ torch.sigmoid(m.g_down.weight @ of["g"])
        kappa = F.normalize((k * m.k_remove).view(4, 8), dim=-1)
        k = (k * (1 + (a - 1) * m.k_rate)).view(4, 8)
        r, v, a = r.view(4, 8), v.view(4, 8), a.view(4, 8)
        S = S * w[:, None] - (S @ kappa[:, :, None]) @ (a * kappa)[:, None] + v[:, :, None] @ k[:, None]
        p = F.group_norm((S @ r[:, :, None]).view(1, 32), 4, m.norm_weight, m.norm_bias, eps=64e-5)[0]
        bonus = (r * k * m.bonus.view(4, 8)).sum(-1, keepdim=True) * v
        y.append(m.c_proj.weight @ (g * (p + bonus.flatten())))
    torch.testing.assert_close(m(x[None], None)[0], torch.stack(y))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_goes_on_from_its_state(float64, kind):
    """In pieces of one token, of less and of more than a chunk."""
    mixer = recurrences.KINDS[kind](config_of(kind), 1)
    x, state, found, start = torch.randn(2, 41, 32), None, [], 0
    for piece in x.split([3, 1, 1, 19, 1, 16], 1):
        y, state = mixer.scan(piece, context(piece.size(1), start=start), state)
        start += piece.size(1)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), mixer(x, context(41)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [dict(), dict(attention_every=2, smear="attention")], ids=str)
def test_a_later_token_moves_no_earlier_logit(kind, changes):
    model = script.GPT(config_of(kind, **changes)).eval()
    idx, _ = batch_of(model.config, T=35)
    first, second = model(idx)[0], model(changed_id(idx, 21, 61))[0]
    torch.testing.assert_close(first[:, :21], second[:, :21], rtol=0, atol=2e-6)
    assert all((first[:, t] - second[:, t]).abs().max() > 1e-5 for t in range(21, 35))  # all that follow see it


def test_presets_have_about_as_many_parameters_as_d12():
    with torch.device("meta"):
        counts = {name: script.GPT(script.GPTConfig(**script.base_configs[name])).parameter_count()
                  for name in recurrences.PRESETS}
    assert counts["d12_retnet"] == 123_532_032
    assert all(abs(count / 123_532_032 - 1) < 0.03 for count in counts.values()), counts


@pytest.mark.parametrize("kind", KINDS)
def test_every_nth_block_has_attention_and_all_keep_something(kind):
    found = [type(block.attn) for block in script.GPT(config_of(kind, n_layer=3, attention_every=2)).transformer.h]
    own = recurrences.KINDS[kind]
    assert found == [own, script.CausalSelfAttention, own]
    kept = [script.kept_by_block(config_of(kind, n_layer=2, attention_every=every)) for every in (0, 2, 1)]
    assert kept[2] == script.kept_by_block(script.GPTConfig(vocab_size=61, n_layer=2, n_head=4, n_embd=32,
                                                            precision="fp32"))
    assert kept[0] - kept[1] == pytest.approx(kept[1] - kept[2], abs=1) and kept[0] != kept[2]


# ----------------------------------------------------------------------------------------------------------------------
# The kernels of flash-linear-attention, by a stand-in


def fake_fla(monkeypatch, **wrong):
    """Modules fla and fla.ops whose kernels are naive(), times a factor where one is wrong."""
    def kernel(kind, of):
        def run(*args, scale):
            inputs = {name: z.float() for name, z in of(*args).items()}
            state = torch.zeros(*inputs["q"].shape[::2], inputs["k"].size(-1), inputs["v"].size(-1))
            return (naive(kind, state, **inputs)[0] * wrong.get(kind, scale)).to(args[0].dtype), None
        return run

    ops = SimpleNamespace(
        chunk_simple_gla=kernel("retnet", lambda q, k, v, g: dict(q=q, k=k, v=v, log_decay=g[..., None])),
        chunk_gated_delta_rule=kernel("delta", lambda q, k, v, g, beta: dict(q=q, k=k, v=v, log_decay=g[..., None],
                                                                             beta=beta[..., None])),
        chunk_rwkv7=kernel("rwkv7", lambda r, w, k, v, a, b: dict(q=r, k=k, v=v, log_decay=w, read=a, write=b)),
    )
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "fla.ops", ops)


@pytest.mark.parametrize("kind", ["retnet", "delta", "rwkv7"])
def test_a_kernel_is_compared_before_it_is_used(monkeypatch, kind):
    mixer, cpu = recurrences.KINDS[kind](config_of(kind), 0), torch.device("cpu")
    for wrong in ({}, {kind: 1.1}):
        fake_fla(monkeypatch, **wrong)
        assert recurrences.fla_is_right(mixer, cpu, torch.bfloat16, T=40) == (not wrong)
    assert recurrences.why_not_fla(mixer, cpu, torch.bfloat16) == "torch.bfloat16 on cpu"
    fake_fla(monkeypatch)
    x, ctx = torch.randn(2, 20, 32), context(20)
    expected = mixer(x, ctx)
    monkeypatch.setattr(recurrences.Recurrent, "by_fla", True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixer(x, ctx)
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.05 * expected.norm()


def test_without_the_package_a_line_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    mixer = recurrences.RetNet(config_of("retnet"), 0)
    assert "fla" in recurrences.why_not_fla(mixer, torch.device("cuda"), torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# Runs and samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(trainer, kind):
    flags = (*flags_of(kind), "--save_every", 3)
    result = trainer.run(*flags)
    rows = steps(result.folder)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.2
    assert ("recurrences: torch, in chunks of 64 (torch.float32 on cpu)" in result.out) == (kind != "hyena")
    half = trainer.copy_of(result.folder, "half")
    (half / "step000006.pt").unlink()
    trainer.output = half.parent
    trainer.run(*flags, "--resume", "auto", "--output_dir", half.parent)
    contents = [content_of(folder, 6) for folder in (result.folder, half)]
    for part in ("model", "optimizer", "loader", "rng"):
        assert_same(contents[0][part], contents[1][part])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [dict(), dict(attention_every=2, smear="embedding+attention")], ids=str)
def test_the_cache_gives_the_networks_logits(monkeypatch, kind, changes):
    """Of a text that grows, of another that begins with the prompt, and of some that begin otherwise."""
    sys.path.insert(0, str(ROOT / "tools"))
    import sample

    monkeypatch.setattr(sample, "KNOWN", sample.KNOWN | MODULES)
    torch.manual_seed(3)
    model, plain = (script.GPT(config_of(kind, **changes)).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    cache, ran = recurrences.with_states(sample.Cache)(model), []
    text = torch.randint(61, (1, 30), generator=torch.Generator().manual_seed(1))
    other = torch.cat([text[:, :9], (text[:, 9:] + 1) % 61], 1)
    for idx in (text[:, :9], text[:, :10], text[:, :11], text[:, :14], other[:, :10], other[:, :11], other[:, 3:15],
                text[:, :5], text[:, :6]):
        torch.testing.assert_close(cache(idx), plain(idx)[0][:, -1], rtol=1e-4, atol=1e-5)
        ran.append(idx.size(1) - cache.start)
    assert ran == [9, 1, 1, 3, 1, 1, 12, 5, 1]


def test_a_text_with_the_cache_is_that_without(trainer, capsys):
    trainer.run(*flags_of("delta", layers=2), "--attention_every", 2)
    texts = []
    for cache in ([], ["--no_cache"]):
        argv = [ROOT / "tools" / "sample.py", trainer.output, "--max_new_tokens", 12, "--device", "cpu", *cache]
        assert recurrences.extending.main([str(word) for word in argv], PROGRAM, MODULES, recurrences.with_states) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0].splitlines()[0]) > 10


@pytest.mark.parametrize("flags, said", [
    ("--short_conv 3", "short_conv=3 would be ignored; add --mixer delta or hyena"),
    ("--mixer rwkv7 --value_expand 2", "value_expand=2.0 would be ignored; add --mixer retnet or delta"),
    ("--mixer rwkv7 --recurrence_chunk 256", "recurrence_chunk=256 must be a multiple of 16, up to 128; 64 is usual"),
    ("--mixer delta --key_expand 0.7", "key_expand x n_embd = 537.6 must be a multiple of n_head=12"),
    ("--mixer retnet --document_mask", "document_mask with mixer=retnet: a state goes on from document to document; "
     "drop one of the two"),
    ("--mixer hyena --n_kv_head 4", "n_kv_head=4 would be ignored: no block has attention; drop it, or add "
     "--attention_every 4"),
    ("--mixer hyena --window 9", "window=9 would be ignored: no block has attention; drop it, or add "
     "--attention_every 4"),
])
def test_what_cannot_be_is_one_line(capsys, flags, said):
    assert recurrences.extending.main([*flags.split(), "--dry_run"], PROGRAM) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_kernel_that_cannot_be_is_one_line(trainer):
    result = trainer.main(*trainer.flags(*flags_of("delta"), "--recurrence_kernel", "fla"))
    assert result.code == 2 and result.err == ("error: recurrence_kernel=fla is not possible here (torch.float32 on "
                                               "cpu); drop it\n")


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_bf16_the_backward_pass_is_no_coarser(kind):
    """What is computed in fp32 forward: with autocast of its own the compiled backward pass would round it."""
    mixer, x, ctx = recurrences.KINDS[kind](config_of(kind), 0), torch.randn(2, 35, 32), context(35)
    with recurrences.extending.exact_backward(contextlib.nullcontext):
        assert max(errors_compiled(mixer, x, ctx)) < 1e-4
    assert not rounds_backward(config_of(kind)) and rounds_backward(small_config())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_the_same_run(trainer, kind):
    flags = (*flags_of(kind), "--sequence_length", 72, "--val_loss_every", 0, "--no_save_checkpoints",
             "--gradient_checkpointing")
    plain, compiled = (steps(trainer.run(*flags, *more).folder) for more in ((), ("--compile",)))
    assert column(compiled, "train_loss") == pytest.approx(column(plain, "train_loss"), rel=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(trainer, kind):
    flags = [*flags_of(kind), "--no_save_checkpoints"]
    alone = steps(trainer.run(*flags).folder)
    output = trainer.output.parent / "two"
    parallel = "fsdp" if kind in ("hyena", "retnet") else "ddp"
    flags = trainer.flags(*flags, "--batch_size", 1, "--parallel", parallel, "--output_dir", output)
    result = torchrun(PROGRAM, *flags)
    assert result.returncode == 0, result.stderr
    folder, = output.iterdir()
    assert column(steps(folder), "train_loss") == pytest.approx(column(alone, "train_loss"), rel=3e-5)
