"""docs/24-mamba-2: chunks against the recurrence and transformers' mixer, sampling with states, whole runs."""
import contextlib
import sys

import pytest
import torch

import train_gpt2_mod as script
from helpers import batch_of, changed_id, small_config
from launch import ROOT, assert_same, column, content_of, steps, torchrun
from test_moe import errors_compiled, program, registered, rounds_backward

mamba = program("24-mamba-2", "mamba")
PROGRAM = ROOT / "docs" / "24-mamba-2" / "mamba.py"
TINY = ("--model", "tiny_mamba2", "--n_layer", 2, "--attention_every", 2, "--ssm_head_dim", 8, "--ssm_chunk", 16)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    registered(mamba, monkeypatch)


def config_of(**changes):
    small = dict(vocab_size=61, n_layer=2, n_head=4, n_embd=32, precision="fp32", mixer="mamba2", ssm_state=6,
                 ssm_head_dim=8, ssm_groups=2, ssm_chunk=16)
    return mamba.MambaConfig(**{**small, **changes})


def recurrence(x, log_decay, B, C, state):
    """One token after another: h = exp(log_decay) h + x B', y = h C."""
    y = torch.zeros_like(x)
    for t in range(x.size(1)):
        state = state * log_decay[:, t].exp()[..., None, None] + torch.einsum("bgrp,bgn->bgrpn", x[:, t], B[:, t])
        y[:, t] = torch.einsum("bgrpn,bgn->bgrp", state, C[:, t])
    return y, state


@pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("begun", [False, True])
def test_chunks_are_the_recurrence(float64, T, begun):
    b, G, R, P, N = 2, 2, 3, 4, 5
    x, B, C = torch.randn(b, T, G, R, P), torch.randn(b, T, G, N), torch.randn(b, T, G, N)
    log_decay, state = -3 * torch.rand(b, T, G, R), torch.randn(b, G, R, P, N) * begun
    inputs = [z.requires_grad_() for z in (x, log_decay, B, C)]
    found = mamba.chunked(*inputs, 8, state if begun else None)
    expected = recurrence(*inputs, state)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)
    weight = torch.randn_like(x)
    gradients = (torch.autograd.grad((y * weight).sum() + last.sum(), inputs) for y, last in (found, expected))
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs)


def test_decays_that_come_to_nothing_are_no_nan():
    x, log_decay = torch.ones(1, 20, 1, 1, 1), torch.full((1, 20, 1, 1), -200.0).requires_grad_()
    y, _ = mamba.chunked(x, log_decay, torch.ones(1, 20, 1, 1), torch.ones(1, 20, 1, 1), 16)
    y.sum().backward()
    assert torch.equal(y, torch.ones_like(y)) and log_decay.grad.isfinite().all()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_mixer_is_transformers(groups):
    """In float32, as theirs computes whatever x is; 21 tokens are no multiple of the chunk."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = Mamba2Mixer(Mamba2Config(num_heads=8, head_dim=8, hidden_size=32, state_size=6, n_groups=groups,
                                      chunk_size=8, num_hidden_layers=1), layer_idx=0).eval()
    mine = mamba.Mamba2(config_of(ssm_groups=groups), 0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
        pairs = dict(c_in=theirs.in_proj, c_proj=theirs.out_proj)
        for name, layer in pairs.items():
            getattr(mine, name).weight.copy_(layer.weight)
        for name, p in dict(conv_weight=theirs.conv1d.weight, conv_bias=theirs.conv1d.bias, dt_shift=theirs.dt_bias,
                            log_a=theirs.A_log, skip=theirs.D, norm_weight=theirs.norm.weight).items():
            getattr(mine, name).copy_(p.flatten())
    x = torch.randn(2, 21, 32, requires_grad=True)
    found, expected = mine(x, None), theirs(x)
    torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", [1, 4])
def test_a_mixer_goes_on_from_its_state(float64, conv):
    """In pieces of one token, of less and of more than a chunk."""
    mixer = mamba.Mamba2(config_of(ssm_conv=conv), 0)
    x, state, found = torch.randn(2, 23, 32), None, []
    for piece in x.split([3, 1, 1, 12, 1, 5], 1):
        y, state = mixer.scan(piece, state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), mixer(x, None))


@pytest.mark.parametrize("changes", [
    dict(), dict(attention_every=2), dict(mlp="none"), dict(position="learned", n_positions=64, bias=True)], ids=str)
def test_a_later_token_moves_no_earlier_logit(changes):
    model = script.GPT(config_of(**changes)).eval()
    idx, _ = batch_of(model.config, T=19)
    first, second = model(idx)[0], model(changed_id(idx, 11, 61))[0]
    torch.testing.assert_close(first[:, :11], second[:, :11], rtol=0, atol=1e-6)
    assert all((first[:, t] - second[:, t]).abs().max() > 1e-5 for t in range(11, 19))  # all that follow see it


def test_presets_are_as_large_as_they_should_be():
    from transformers import Mamba2Config, Mamba2Model

    published = Mamba2Config(num_heads=24, head_dim=64, hidden_size=768, num_hidden_layers=24, state_size=128,
                             n_groups=1, vocab_size=50257)
    with torch.device("meta"):
        counts = {name: script.GPT(script.GPTConfig(**script.base_configs[name])).parameter_count()
                  for name in mamba.PRESETS}
        theirs = sum(p.numel() for p in Mamba2Model(published).parameters())
    assert counts["d24_mamba2"] == theirs - 25 * 768  # the weights of the norms
    mixer = (counts["d24_mamba2"] - 50257 * 768) // 24
    assert counts["d24_mamba2_hybrid"] == counts["d24_mamba2"] - 3 * (mixer - 4 * 768**2)
    assert abs(counts["d12_mamba2"] / 123_532_032 - 1) < 0.03


def test_every_nth_block_has_attention_and_all_keep_something():
    for every, attending in ((0, []), (2, [1, 3]), (3, [2]), (5, [])):
        config = config_of(n_layer=4, attention_every=every)
        found = [type(block.attn) is script.CausalSelfAttention for block in script.GPT(config).transformer.h]
        assert [i for i, yes in enumerate(found) if yes] == attending and config.attends == len(attending)
    kept = [script.kept_by_block(config_of(n_layer=4, attention_every=every)) for every in (0, 3, 2, 1)]
    assert kept[-1] == script.kept_by_block(script.GPTConfig(vocab_size=61, n_layer=4, n_head=4, n_embd=32,
                                                             precision="fp32"))
    assert kept == sorted(kept, reverse=True)


# ----------------------------------------------------------------------------------------------------------------------
# Runs and samples


@pytest.mark.parametrize("flags", [(), ("--mlp", "none", "--attention_every", 0, "--gradient_checkpointing")], ids=str)
def test_a_resumed_run_is_the_run_that_was_not_stopped(trainer, flags):
    flags = (*TINY, "--save_every", 3, *flags)
    result = trainer.run(*flags)
    rows = steps(result.folder)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.3
    assert ("attention kernel" in result.out) == ("none" not in flags)
    half = trainer.copy_of(result.folder, "half")
    (half / "step000006.pt").unlink()
    trainer.output = half.parent
    trainer.run(*flags, "--resume", "auto", "--output_dir", half.parent)
    contents = [content_of(folder, 6) for folder in (result.folder, half)]
    for part in ("model", "optimizer", "loader", "rng"):
        assert_same(contents[0][part], contents[1][part])


def sampling():
    """tools/sample.py's module, its cache exchanged as mamba.main() has it."""
    sys.path.insert(0, str(ROOT / "tools"))
    import sample

    return sample, mamba.with_states(sample.Cache)


@pytest.mark.parametrize("changes", [dict(), dict(attention_every=2), dict(mlp="none", smear="embedding+attention")],
                         ids=str)
def test_the_cache_gives_the_networks_logits(monkeypatch, changes):
    """Of a text that grows, of another that begins with the prompt, and of some that begin otherwise."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    sample, StateCache = sampling()
    monkeypatch.setattr(sample, "KNOWN", sample.KNOWN | {mamba.Mamba2, mamba.NoMLP})
    torch.manual_seed(3)
    model, plain = (script.GPT(config_of(**changes)).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    cache, ran = StateCache(model), []
    text = torch.randint(61, (1, 30), generator=torch.Generator().manual_seed(1))
    other = torch.cat([text[:, :9], (text[:, 9:] + 1) % 61], 1)
    for idx in (text[:, :9], text[:, :10], text[:, :11], text[:, :14], other[:, :10], other[:, :11], other[:, 3:15],
                text[:, :5], text[:, :6]):
        torch.testing.assert_close(cache(idx), plain(idx)[0][:, -1], rtol=1e-4, atol=1e-5)
        ran.append(idx.size(1) - cache.start)
    assert ran == [9, 1, 1, 3, 1, 1, 12, 5, 1]


def test_a_text_with_the_cache_is_that_without(trainer, monkeypatch, capsys):
    trainer.run(*TINY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    texts = []
    for cache in ([], ["--no_cache"]):
        argv = [ROOT / "tools" / "sample.py", trainer.output, "--max_new_tokens", 12, "--device", "cpu",
                "--num_samples", 2, *cache]
        modules = {mamba.Mamba2, mamba.NoMLP}
        assert mamba.extending.main([str(word) for word in argv], PROGRAM, modules, mamba.with_states) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0].splitlines()[0]) > 10


@pytest.mark.parametrize("flags, said", [
    ("--ssm_state 16", "ssm_state=16 would be ignored; add --mixer mamba2"),
    ("--mixer mamba2 --ssm_head_dim 100", "ssm_expand x n_embd = 1536 must be a multiple of ssm_head_dim=100"),
    ("--mixer mamba2 --ssm_groups 5", "the 24 heads of ssm_expand x n_embd / ssm_head_dim must be a multiple of "
     "ssm_groups=5"),
    ("--mixer mamba2 --ssm_chunk 10", "ssm_chunk=10 must be a multiple of 16; 128 is usual"),
    ("--mixer mamba2 --document_mask", "document_mask with mixer=mamba2: a state goes on from document to document; "
     "drop one of the two"),
    ("--mixer mamba2 --window 9", "window=9 would be ignored: no block has attention; drop it, or add "
     "--attention_every 8"),
    ("--mlp none --mlp_expansion_factor 2", "mlp_expansion_factor=2 would be ignored: there are no MLPs; drop it"),
])
def test_what_cannot_be_is_one_line(capsys, flags, said):
    assert mamba.extending.main([*flags.split(), "--dry_run"], PROGRAM) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.slow
def test_compiled_it_is_the_same_run(trainer):
    flags = (*TINY, "--sequence_length", 40, "--val_loss_every", 0, "--no_save_checkpoints", "--gradient_checkpointing")
    plain, compiled = (steps(trainer.run(*flags, *more).folder) for more in ((), ("--compile",)))
    assert column(compiled, "train_loss") == pytest.approx(column(plain, "train_loss"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(trainer, parallel):
    flags = [*TINY, "--no_save_checkpoints"]
    alone = steps(trainer.run(*flags).folder)
    output = trainer.output.parent / "two"
    flags = trainer.flags(*flags, "--batch_size", 1, "--parallel", parallel, "--output_dir", output)
    result = torchrun(PROGRAM, *flags)
    assert result.returncode == 0, result.stderr
    folder, = output.iterdir()
    assert column(steps(folder), "train_loss") == pytest.approx(column(alone, "train_loss"), rel=1e-5)


@pytest.mark.slow
def test_what_is_in_fp32_is_not_rounded_backward():
    assert not rounds_backward(config_of()) and rounds_backward(small_config())
    layer = mamba.Mamba2(config_of(), 0)
    x = torch.randn(2, 35, 32)
    with mamba.extending.exact_backward(contextlib.nullcontext):
        assert max(errors_compiled(layer, x, None)) < 1e-5
