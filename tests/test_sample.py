"""tools/sample.py: the cache against the full forward pass, draws against their definition, the text as it comes."""
import copy
import re
import sys

import pytest
import torch
from helpers import batch_of, shrunk_preset, small_config
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT, content_of, write_sealed

import train_gpt2_mod as script

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import sample  # noqa: E402
from text_encodings import EOT_TEXT, get_encoding  # noqa: E402

EVERYWHERE = "embedding+attention+mlp"
SEPARATE = dict(mtp_enabled=True, mtp_heads="separate", mtp_max_steps=3)
OPTIONS = [  # beside what the presets have
    dict(), dict(smear=EVERYWHERE), dict(smear="attention", window=3), dict(document_mask=True),
    dict(document_mask=True, window=4, n_kv_head=2), dict(window=1), dict(window=100), dict(x0_lambdas=True),
    dict(value_embeddings=1, n_kv_head=1), dict(logit_softcap=2.0), dict(mtp_enabled=True), SEPARATE,
    dict(embd_norm=True, tie_embeddings=False), dict(attention_gate=5, n_kv_head=2),
    dict(mixer="latent", attention_gate=3), dict(softmax_scale=0.3, rope_base=50.0, n_layer=3),
    dict(position="learned", n_positions=24, window=5, smear=EVERYWHERE, document_mask=True, qk_norm=True),
    dict(mixer="latent", window=4, document_mask=True, smear=EVERYWHERE, kv_rank=16, rope_head_dim=6, qk_norm=True),
    dict(mixer="latent", bias=True, x0_lambdas=True, embd_norm=True, norm="layernorm", norm_weights=True),
    dict(value_embeddings=2, n_layer=5, x0_lambdas=True, smear=EVERYWHERE, document_mask=True, post_norm=True),
]


def cases():
    presets = [pytest.param(shrunk_preset(name), id=name) for name in script.base_configs]
    options = [pytest.param(small_config(**changes), id=str(changes)) for changes in OPTIONS]
    kinds = [pytest.param(small_config(mixer=mixer, mlp=mlp), id=f"{mixer}-{mlp}")
             for mixer in script.mixers for mlp in script.mlps]
    return presets + options + kinds


def network(config):
    """One in which no part is without effect, ready to evaluate."""
    model = script.GPT(config)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return model.eval()


def texts_of(config, T, same=0):
    """Three texts (3, T) of several documents, of which the first `same` tokens are alike."""
    idx, _ = batch_of(config, B=3, T=T)
    idx[:, 5] = idx[1, 9] = idx[2, T - 3] = config.vocab_size - 1
    idx[:, :same] = idx[:1, :same]
    return idx


# ----------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("config", cases())
def test_cached_logits_are_those_of_the_full_forward_pass(float64, config):
    """A prompt that is longer than the small windows, then token by token; then again from the middle of it, in
    pieces, with another text behind."""
    model, T, prompt = network(config), 24, 8
    cache, idx = sample.Cache(copy.deepcopy(model)), texts_of(config, T, same=prompt)
    other = idx.clone()
    other[:, prompt:] = idx[:, prompt:].roll(1, dims=0)
    with torch.no_grad():
        full, full_of_other = model(idx)[0], model(other)[0]
    for end in range(prompt, T + 1):
        torch.testing.assert_close(cache(idx[:, :end]), full[:, end - 1], rtol=0, atol=1e-12)
    for end in (prompt, prompt + 1, prompt + 7, T):
        torch.testing.assert_close(cache(other[:, :end]), full_of_other[:, end - 1], rtol=0, atol=1e-12)
    assert len({tuple(row) for row in full_of_other[:, -1].tolist()}) == 3


def test_the_cases_have_every_option_that_makes_a_network():
    """A new field of GPTConfig needs a case above, in which the cache shows that it knows of it."""
    seen = {name for case in cases() for name, value in case.values[0].network().items()
            if value != getattr(script.GPTConfig, name)}
    assert seen == small_config().network().keys()


@pytest.mark.parametrize("preset", ["d12", "d12_gqa", "d12_mla", "d12_fast", "gpt2", "sized"])
def test_cached_logits_in_fp32(preset):
    model = network(shrunk_preset(preset, n_embd=96))
    cache, idx = sample.Cache(copy.deepcopy(model)), texts_of(model.config, 40)
    with torch.no_grad():
        full = model(idx)[0]
    for end in range(4, 41):
        torch.testing.assert_close(cache(idx[:, :end]), full[:, end - 1], rtol=1e-4, atol=1e-5)


def test_only_what_was_not_read_is_run(monkeypatch):
    model = network(small_config())
    cache, idx, run = sample.Cache(model), texts_of(model.config, 12), []
    first = model.transformer.h[0]
    first.register_forward_hook(lambda block, args, x: run.append(x.size(1)))
    other = idx.clone()
    other[1, 6] = (other[1, 6] + 1) % 61  # in one of the texts alone
    for tokens in (idx[:, :5], idx[:, :6], idx[:, :9], idx[:, :9], other, idx[:, 1:], idx[:2, 1:], idx[:2, 1:4]):
        cache(tokens)
    assert run == [5, 1, 3, 1, 6, 11, 11, 1]


@pytest.mark.parametrize("changes", [dict(), dict(window=5), dict(document_mask=True)], ids=str)
def test_the_mask_is_made_once_for_all_blocks(monkeypatch, changes):
    """One that attention's kernels take as it is: numbers, in rows that are aligned."""
    cache, masks = sample.Cache(network(small_config(n_layer=3, **changes))), []
    plain = script.F.scaled_dot_product_attention
    monkeypatch.setattr(script.F, "scaled_dot_product_attention", lambda *args, attn_mask, **more: (
        masks.append(attn_mask), plain(*args, attn_mask=attn_mask, **more))[1])
    idx = texts_of(cache.model.config, 20)
    cache(idx[:, :9])
    del masks[:]
    cache(idx[:, :19])
    assert len(masks) == 3 and len(set(map(id, masks))) == 1
    assert masks[0].dtype == torch.float32 and masks[0].stride(-1) == 1
    assert all(stride % 16 == 0 for stride in masks[0].stride()[:-1])


def test_what_failed_on_the_way_is_not_taken_for_read(float64):
    model = network(small_config(n_layer=3))
    cache, idx = sample.Cache(copy.deepcopy(model)), texts_of(model.config, 12)
    cache(idx)
    other = idx.roll(1, dims=0)
    handle = cache.model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache(other)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(cache(idx), model(idx)[0][:, -1], rtol=0, atol=1e-12)


class Backwards(script.MLP):
    """An MLP that looks at the next token."""

    def forward(self, x):
        return super().forward(x.roll(-1, dims=1))


class Further(script.CausalSelfAttention):
    def forward(self, x, ctx):
        return super().forward(x, ctx) + x.mean(1, keepdim=True)


@pytest.mark.parametrize("registry, name, kind", [("mlps", "gelu", Backwards), ("mixers", "attention", Further)])
def test_parts_that_the_cache_does_not_know_are_refused_by_name(registry, name, kind, trainer, monkeypatch):
    folder = trainer.run().folder
    monkeypatch.setitem(getattr(script, registry), name, kind)
    with pytest.raises(script.ConfigError, match=f"{kind.__name__} .*--no_cache"):
        sample.Cache(script.GPT(small_config()))
    assert kind.__name__ in refuse(trainer, folder, "--max_new_tokens", 3)
    assert draw(trainer, folder, "--max_new_tokens", 3, "--no_cache")


# ----------------------------------------------------------------------------------------------------------------------
# The draws


def naive_chances(logits, temperature, top_k, top_p):
    """The definition in plain numbers, of logits of which no two are the same."""
    by_chance = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = {i: 2.718281828459045 ** (logits[i] / temperature) for i in by_chance}
    total, kept, sum_of_kept = sum(weights.values()), [], 0.0
    for i in by_chance:
        if sum_of_kept < top_p:
            kept.append(i)
            sum_of_kept += weights[i] / total
    return [weights[i] / total / sum_of_kept if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (100, 1.0), (0, 0.5), (0, 0.95), (4, 0.8), (0, 1e-9)])
def test_draws_have_the_chances_of_the_definition(temperature, top_k, top_p):
    logits, generator, count = [1.0, -0.5, 2.0, 0.3, -4.0, 1.7], torch.Generator().manual_seed(5), 4000
    tokens = [sample.draw(torch.tensor(logits), temperature, top_k, top_p, generator) for _ in range(count)]
    for i, chance in enumerate(naive_chances(logits, temperature, top_k, top_p)):
        assert abs(tokens.count(i) / count - chance) <= 5 * (chance * (1 - chance) / count) ** 0.5 + 1e-12


def test_the_likeliest_token_and_logits_that_are_no_numbers():
    logits = torch.tensor([0.1, 3.0, 2.9])
    for setting in ((0, 0, 1.0), (0, 2, 0.3), (1.0, 1, 1.0), (1.0, 0, 1e-6), (1e-3, 0, 1.0)):
        assert sample.draw(logits.clone(), *setting, torch.Generator()) == 1
    for bad in (float("nan"), float("inf")):
        with pytest.raises(script.ConfigError, match="no numbers"):
            sample.draw(torch.tensor([0.0, bad]), 1.0, 0, 1.0, torch.Generator())


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("preset", ["tiny", "d12_mla", "d12_fast", "d12_window", "gpt2"])
def test_the_same_tokens_with_and_without_a_cache_also_past_the_context(preset, temperature):
    model = network(shrunk_preset(preset, vocab_size=61))
    cache = sample.Cache(copy.deepcopy(model))
    for prompt in ([60, 3, 4], list(range(30)), [60, 3, 4]):  # the second is longer than the context
        def new(*cached):
            return list(sample.sample(model, prompt, 40, 20, temperature, 0, 0.9, torch.Generator(), *cached))

        assert new(cache) == new() and len(new()) == 40


# ----------------------------------------------------------------------------------------------------------------------
# The text


@given(st.lists(st.integers(0, 256), max_size=12) | st.text(max_size=6).map(lambda text: list(text.encode())))
def test_pieces_of_text_make_what_the_encoding_decodes(ids):
    encoding = get_encoding("bytes")
    assert "".join(sample.texts(encoding, ids)) == encoding.decode(ids)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_bytes_of_a_character_wait_until_it_is_whole(name):
    encoding, text = get_encoding(name), "größer 漢字 🙂!"
    ids = encoding.encode(text).tolist()
    pieces = list(sample.texts(encoding, ids))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and "" in pieces[:-1]
    assert b"".join(sample.token_bytes(encoding, i) for i in ids) == text.encode()
    assert list(sample.texts(encoding, [ids[0], encoding.eot, ids[0]]))[1] == EOT_TEXT
    assert "".join(sample.texts(encoding, encoding.encode("🙂").tolist()[:-1])) == "\ufffd"


# ----------------------------------------------------------------------------------------------------------------------
# The program


def draw(trainer, *flags):
    """The texts, and what is said on stderr."""
    trainer.capsys.readouterr()
    code = sample.main([str(flag) for flag in flags])
    out, err = trainer.capsys.readouterr()
    assert code == 0, err
    return [text.removesuffix("\n") for text in out.split("-" * 80 + "\n")[1:]], err


def refuse(trainer, *flags):
    trainer.capsys.readouterr()
    code = sample.main([str(flag) for flag in flags])
    err = trainer.capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_samples_are_the_same_however_many_and_with_or_without_a_cache(trainer):
    folder = trainer.run().folder
    flags = [folder, "--prompt", "The ", "--max_new_tokens", 25, "--top_k", 0, "--top_p", 0.9, "--seed", 3]
    three, err = draw(trainer, *flags, "--num_samples", 3)
    assert len(set(three)) == 3 and all(text.startswith("The ") for text in three)
    assert re.fullmatch(r"75 tokens in \d+\.\d\d s, \d+\.\d tokens/s on (cpu|cuda|mps)\n", err)
    assert draw(trainer, *flags)[0] == three[:1]
    plain, err = draw(trainer, *flags, "--num_samples", 2, "--no_cache", "--device", "cpu")
    assert plain == three[:2] and err.endswith("tokens/s on cpu, without a cache\n")
    assert draw(trainer, *flags[:-1], 4)[0] != three[:1]


def test_beyond_the_context_it_says_so_and_slides(trainer):
    folder = trainer.run().folder
    for new, full in ((32, False), (33, True), (60, True)):  # of 32 tokens, one is end-of-text
        texts, err = draw(trainer, folder, "--max_new_tokens", new)
        assert err.startswith("note: ") == full and ("context of 32 tokens" in err) == full
        assert draw(trainer, folder, "--max_new_tokens", new, "--no_cache")[0] == texts


def test_the_text_is_written_token_by_token(trainer, monkeypatch):
    folder, seen = trainer.run().folder, []

    def slow(*_):
        for byte in "aé!".encode():
            yield byte
            seen.append(trainer.capsys.readouterr().out.split("-" * 80 + "\n")[-1])

    monkeypatch.setattr(sample, "sample", slow)
    trainer.capsys.readouterr()
    assert sample.main([str(folder), "--prompt", "x"]) == 0
    assert seen == ["xa", "", "é", "!"]


def test_an_interruption_is_no_traceback(trainer, monkeypatch):
    folder = trainer.run().folder

    def interrupted(*_):
        yield 65
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "sample", interrupted)
    trainer.capsys.readouterr()
    assert sample.main([str(folder)]) == 130
    out, err = trainer.capsys.readouterr()
    assert out.endswith("\nA") and err.endswith("\n\ninterrupted\n")


@pytest.mark.parametrize("flags, said", [
    (["--top_p", "0"], "top_p=0"), (["--top_p", "1.5"], "top_p=1.5"), (["--top_p", "nan"], "top_p=nan"),
    (["--top_k", "-1"], "top_k=-1"), (["--num_samples", "0"], "num_samples=0"), (["--device", "tpu"], "device=tpu"),
    (["--temperature", "1e9"], "temperature="), (["--seed", "-1"], "seed=-1"), (["--flag"], "--flag"),
    (["--max_new_tokens", "x"], "max_new_tokens"),
])
def test_flags_that_cannot_be(trainer, tmp_path, flags, said):
    path = tmp_path / "weights.pt"
    write_weights(path)
    assert said in refuse(trainer, path, *flags)


def write_weights(path, **changes):
    """A network without a run, as tools/hf.py import writes it."""
    model = script.GPT(small_config(vocab_size=257))
    content = dict(format=2, model=model.state_dict(), network=script.dataclasses.asdict(model.config),
                   run=dict(model="tiny"))
    write_sealed(path, {**content, **changes})
    return model


def test_weights_without_a_run(trainer, tmp_path):
    path = tmp_path / "weights.pt"
    write_weights(path)
    texts, _ = draw(trainer, path, "--max_new_tokens", 5)
    assert len(texts) == 1
    model = write_weights(path, network={**script.dataclasses.asdict(small_config(vocab_size=257)),
                                         "precision": "fp8"})
    assert sample.load(path, None)[2].config.precision == "fp32"  # float8's scales would depend on what is run at once
    model.transformer.wte.weight.data.fill_(float("nan"))
    write_weights(path, model=model.state_dict())
    assert "no numbers" in refuse(trainer, path)
    write_weights(path, model=script.GPT(small_config(vocab_size=257, n_layer=1)).state_dict())
    assert "weights of its own network" in refuse(trainer, path)


def test_a_prompt_that_is_no_unicode_text(trainer):
    """An argument of other bytes arrives with surrogates, which no terminal prints."""
    assert draw(trainer, trainer.run().folder, "--prompt", "a\udcff", "--max_new_tokens", 3)[0][0].startswith("a\ufffd")


def test_the_context_is_the_training_runs(trainer):
    content = content_of(trainer.run("--sequence_length", 16, "--n_positions", 40, "--position", "learned").folder, 6)
    assert sample.context_of(content) == 16
    del content["run"]["sequence_length"]
    assert sample.context_of(content) == 40
