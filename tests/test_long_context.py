"""docs/25-long-context: frequencies against transformers', windows and losses against loops, needles, whole runs."""
import hashlib
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt2_mod as script
from helpers import batch_of, write_shards
from launch import ROOT, VOCABULARY, column, steps, write_shard
from test_moe import program, registered

long = program("25-long-context", "long_context")
PROGRAM = ROOT / "docs" / "25-long-context" / "long_context.py"
EOT = VOCABULARY - 1
EXACT = script.Numerics("fp32", torch.device("cpu"))
BYTES = long.find_encoding("bytes", "", "", VOCABULARY)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    registered(long, monkeypatch)


def config_of(**changes):
    return long.LongConfig(**{**dict(vocab_size=61, n_layer=2, n_head=4, n_embd=32, precision="fp32"), **changes})


def model_of(**changes):
    torch.manual_seed(1)
    return script.GPT(config_of(**changes)).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Positions


def transformers_frequencies(kind, dims, base, factor, trained, length=None):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(rope_type=kind, rope_theta=base, factor=factor, original_max_position_embeddings=trained)
    config = LlamaConfig(hidden_size=2 * dims, num_attention_heads=2, head_dim=dims, max_position_embeddings=trained,
                         rope_parameters=rope)
    frequencies, size = ROPE_INIT_FUNCTIONS[kind](config, "cpu", length)
    return frequencies.double().numpy(), size


@pytest.mark.parametrize("dims, base, factor, trained", [
    (64, 10000.0, 8.0, 1024), (64, 10000.0, 32.0, 1024), (8, 500.0, 4.0, 64), (128, 1e6, 2.5, 4096),
])
@pytest.mark.filterwarnings("ignore")
def test_frequencies_are_those_of_transformers(dims, base, factor, trained):
    def mine(method):
        return long.frequencies(method, dims, base, factor, trained)

    def agree(found, expected):
        np.testing.assert_allclose(found[0], expected[0], rtol=3e-6)
        assert found[1] == pytest.approx(expected[1], rel=1e-12)

    agree(mine("linear"), transformers_frequencies("linear", dims, base, factor, trained))
    # Theirs grows with the text; at its whole length, with a factor of 1, it is the static form.
    agree(mine("ntk"), transformers_frequencies("dynamic", dims, base, 1.0, trained, int(factor * trained)))
    yarn = transformers_frequencies("yarn", dims, base, factor, trained)
    agree(mine("yarn"), yarn)
    agree(mine("by_parts"), (yarn[0], 1.0))
    agree(mine("base"), transformers_frequencies("linear", dims, 100 * base, 1.0, trained))
    agree(mine("window"), transformers_frequencies("linear", dims, base, 1.0, trained))


def test_what_the_methods_do_to_the_fastest_and_the_slowest():
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = 1024 * plain / (2 * math.pi)
    ratio = {method: long.frequencies(method, 64, 10000.0, 8.0, 1024)[0] / plain for method in long.SCALED}
    assert ratio["ntk"][0] == 1 and ratio["ntk"][-1] == pytest.approx(1 / 8)
    assert (ratio["by_parts"][turns > 40] == 1).all() and ratio["by_parts"][turns < 0.7] == pytest.approx(1 / 8)
    assert (np.diff(ratio["by_parts"]) < 1e-12).all()
    assert ratio["linear"] == pytest.approx(1 / 8)


def test_interpolated_positions_are_the_trained_ones_and_those_between(float64):
    plain = script.Rotary(8, 10000.0)(32)
    scaled = model_of(extension="linear", extension_factor=4.0, trained_length=32).rotary(128)
    for mine, theirs in zip(scaled, plain):
        torch.testing.assert_close(mine[::4], theirs)


def test_the_temperature_of_yarn_is_in_the_scores(float64):
    q, k = torch.randn(2, 1, 40, 4, 8)
    scores = {}
    for method in ("by_parts", "yarn"):
        cos, sin = model_of(extension=method, extension_factor=4.0, trained_length=16).rotary(40)
        scores[method] = torch.einsum("bqhd,bkhd->bhqk", script.rotate(q, cos, sin), script.rotate(k, cos, sin))
    torch.testing.assert_close(scores["yarn"], scores["by_parts"] * (0.1 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize("method", long.METHODS)
def test_at_the_trained_length_nothing_changes_bitwise(method):
    own = {} if method == "none" else dict(extension=method, trained_length=24)
    idx, _ = batch_of(config_of(), T=24)
    plain, extended = model_of(), model_of(**own)
    assert torch.equal(plain(idx)[0], extended(idx)[0])
    further, _ = batch_of(config_of(), T=48)
    factor = dict(extension_factor=2.0) if method in long.SCALED else {}
    other = model_of(**own, **factor)(further)[0]
    assert torch.equal(plain(further)[0], other) == (method == "none")


# ----------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("T", [17, 32, 45])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_window_is_a_mask(float64, T, kv_heads):
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, kv_heads, T, 8), torch.randn(2, kv_heads, T, 8)
    inputs = [z.requires_grad_() for z in (q, k, v)]
    found = long.windowed(*inputs, 16, 0, None, None, 0.3)
    keys, values = (z.repeat_interleave(4 // kv_heads, 1) for z in (k, v))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    scores = (0.3 * q @ keys.mT).masked_fill((j > i) | (i - j >= 16), -torch.inf)
    expected = scores.softmax(-1) @ values
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected))):
        torch.testing.assert_close(mine, theirs)


def streamed(q, k, v, window, sinks, rotary, scale):
    """Token by token with a cache, as text is drawn: q, k, v (B, heads, T, D) before any rotation."""
    out, turned = torch.zeros_like(q), lambda z, p: script.rotate(z.transpose(1, 2), *(t[p] for t in rotary))
    for i in range(q.size(2)):
        cache = list(range(i + 1))
        if len(cache) > window:
            cache = cache[:sinks] + cache[-(window - sinks) :]
        keys = turned(k[:, :, cache], torch.arange(len(cache))).transpose(1, 2)
        query = turned(q[:, :, i : i + 1], torch.tensor([len(cache) - 1])).transpose(1, 2)
        out[:, :, i] = ((scale * query @ keys.mT).softmax(-1) @ v[:, :, cache])[:, :, 0]
    return out


@pytest.mark.parametrize("T", [17, 32, 45])
def test_sinks_are_those_of_a_cache_that_forgets(float64, T):
    q, k, v = torch.randn(3, 2, 4, T, 8)
    tables = script.Rotary(8, 100.0)(T)
    expected = streamed(q, k, v, 16, long.SINKS, tables, 0.3)
    rotated = (script.rotate(z.transpose(1, 2), *tables).transpose(1, 2) for z in (q, k))
    torch.testing.assert_close(long.windowed(*rotated, v, 16, long.SINKS, *tables, 0.3), expected)


def test_a_network_with_a_window_is_the_scripts():
    """Of grouped heads, with its norm and gate."""
    changes = dict(n_kv_head=2, qk_norm=True, attention_gate=8, softmax_scale=0.2)
    idx, targets = batch_of(config_of(), T=50)
    mine, theirs = model_of(extension="window", trained_length=16, **changes), model_of(window=16, **changes)
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(idx)[0], theirs(idx)[0])
    assert mine.flops_per_token(50) == theirs.flops_per_token(50)
    again = model_of(extension="window", trained_length=16, gradient_checkpointing=True, **changes).train()
    again.load_state_dict(theirs.state_dict())
    gradients = [torch.autograd.grad(model(idx, targets)[1], list(model.parameters())) for model in (again, theirs)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Documents, losses, needles


def shards_of(folder, *sizes, seed=0):
    """Documents of so many tokens each in two shards, of which the second begins within a document."""
    random = np.random.default_rng(seed)
    tokens = np.concatenate([[EOT, *random.integers(97, 123, size - 1)] for size in sizes]).tolist()
    return script.TokenShards(write_shards(folder, tokens[:70], tokens[70:], vocab_size=VOCABULARY)), tokens


def test_long_documents_are_found_also_where_shards_meet(tmp_path):
    shards, _ = shards_of(tmp_path, 30, 60, 8, 61, 200)
    assert long.long_documents(shards, 60) == [(30, 60), (98, 61), (159, 200)]
    assert long.long_documents(shards, 201) == []


def test_a_training_row_lies_within_one_document(tmp_path):
    shards, tokens = shards_of(tmp_path, 30, 60, 8, 61, 200)
    long.write_rows(shards, 25, 120, tmp_path / "rows.bin")
    rows = script.TokenShards(str(tmp_path / "rows.bin"))
    starts = [0, 30, 55, 98, 123, 159]  # one more than 120 tokens need
    assert rows.vocab_size == VOCABULARY and rows.total == 25 * len(starts)
    assert rows.read(0, rows.total).tolist() == sum((tokens[start : start + 25] for start in starts), [])


@pytest.mark.parametrize("trained, T, ends", [
    (1024, 8192, [256, 512, 1024, 2048, 4096, 8192]), (32, 100, [8, 16, 32, 64, 100]), (32, 33, [8, 16, 32, 33]),
])
def test_buckets(trained, T, ends):
    assert long.bucket_ends(trained, T) == ends


def test_losses_by_position_are_those_of_a_loop(float64, monkeypatch):
    monkeypatch.setattr(long, "TOKENS_AT_ONCE", 50)
    monkeypatch.setattr(long, "HEAD_ROWS", 7)
    model = model_of(extension="yarn", extension_factor=2.5, trained_length=16, logit_softcap=5.0)
    rows, ends = np.random.default_rng(0).integers(0, 61, (3, 41)), long.bucket_ends(16, 40)
    found = long.by_bucket(long.token_losses(model, rows, EXACT), ends)
    expected = []
    for row in torch.from_numpy(rows):
        losses = []
        for t in range(40):  # target t + 1 has t + 1 tokens before it
            logits = model(row[None, : t + 1])[0][0, -1].detach()
            losses.append(float(logits.exp().sum().log() - logits[row[t + 1]]))
        expected.append([sum(losses[a:b]) / (b - a) for a, b in zip([0, *ends], ends)])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_bootstrap_is_what_the_normal_distribution_says_and_goes_by_sequences():
    values = np.random.default_rng(1).normal(3, 2, (400, 2))
    low, high = long.bootstrap(values)
    error = values.std(0) / 20
    np.testing.assert_allclose([low, high], [values.mean(0) - 1.96 * error, values.mean(0) + 1.96 * error], atol=0.03)
    assert long.bootstrap([2.0, 2.0]).tolist() == [2, 2]


@pytest.mark.parametrize("hits, count", [(0, 20), (3, 100), (50, 100), (100, 100)])
def test_the_interval_of_a_share_is_scipys(hits, count):
    from scipy.stats import binomtest

    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert long.measuring.wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-7)


def documents(count=3, size=400):
    random = np.random.default_rng(2)
    texts = [bytes(random.choice(list(b"abcdefgh .0123456789"), size - 1).tolist()) for _ in range(count)]
    return [np.array([EOT, *text]) for text in texts]


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0, None])
def test_a_needle_lies_at_its_depth_and_its_key_stands_once(depth):
    T, texts = 200, documents()
    rows, right, keys = long.needle_rows(texts, T, depth, 7, BYTES, np.random.default_rng(5))
    assert rows.shape == (7, T) and sorted(keys) == list(b"0123456789") and len(set(right.tolist())) > 2
    for i, (row, key) in enumerate(zip(rows.tolist(), right.tolist())):
        asked = list(b"\nThe pass key is ")
        assert row[0] == EOT and row[-len(asked) :] == asked
        assert [token for token in row if token in keys] == [key] * (depth is not None)
        text, needle = row[: -len(asked)], [*asked, key, *b".\n"]
        if depth is not None:
            at = text.index(key) - len(asked)
            assert text[at : at + len(needle)] == needle
            text = text[:at] + text[at + len(needle) :]
            assert (at - 1) / (len(text) - 1) == pytest.approx(depth, abs=0.5 / len(text))
        plain = [token for token in texts[i % 3].tolist() if token not in keys]
        assert text == plain[: len(text)]


def test_keys_are_one_token_behind_one_question():
    class Letters:  # a tokenizer that has " 0" to " 99" and no longer numbers
        def encode(self, text):
            words = [1, 2, 3, 4] if text.startswith(long.ASKED) else []
            number = text.removeprefix(long.ASKED).strip()
            return np.array(words + ([100 + int(number)] if len(number) < 3 else [300, *map(ord, number)]))

    question, keys = long.pass_keys(Letters())
    assert question == [1, 2, 3, 4] and keys == list(range(100, 200))


class Reader:
    """In the place of a network: its logits are what `answer` makes of the tokens so far."""

    def __init__(self, answer):
        self.lm_head, self.answer = SimpleNamespace(weight=torch.zeros(1, dtype=torch.float64)), answer

    def trunk(self, idx):
        return [torch.stack([self.answer(row) for row in idx])[:, None].expand(-1, idx.size(1), -1)]

    def head(self, x):
        return x


def test_who_copies_finds_each_key_and_who_knows_nothing_none():
    def copying(row):  # what stood behind the first of the same 8 tokens
        asked = row[-8:].tolist()
        at = next(i for i in range(len(row)) if row[i : i + 8].tolist() == asked)
        return torch.eye(VOCABULARY)[row[at + 8]] if at + 8 < len(row) else torch.zeros(VOCABULARY)

    rows, right, keys = long.needle_rows(documents(), 200, 0.4, 9, BYTES, np.random.default_rng(5))
    assert long.key_ranks(Reader(copying), rows, right, keys, EXACT) == [1] * 9
    assert long.key_ranks(Reader(lambda row: torch.zeros(VOCABULARY)), rows, right, keys, EXACT) == [10] * 9
    order = long.key_ranks(Reader(lambda row: torch.arange(float(VOCABULARY))), rows, right, keys, EXACT)
    assert order == [1 + ord("9") - key for key in right]


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture
def trained(trainer, tmp_path, capsys):
    """A small run on documents of 200 bytes, and how it is measured."""
    for name, seed in (("train", 0), ("val", 1)):
        _, tokens = shards_of(tmp_path, *[200] * 12, seed=seed)
        (trainer.data / f"{name}_001.bin").unlink(missing_ok=True)
        write_shard(trainer.data / f"{name}_000.bin", tokens)
    folder = trainer.run("--sequence_length", 64, "--val_loss_every", 0).folder
    fixed = ["--checkpoint", str(folder), "--lengths", "128", "--methods", "none", "yarn", "window", "--trials", "2",
             "--documents", "5", "--total_batch_size", "256", "--steps", "2", "--device", "cpu",
             "--output_dir", str(tmp_path / "out"), "--results", str(tmp_path / "results.jsonl")]

    def measured(*flags):
        capsys.readouterr()
        code = long.measure([*fixed, *map(str, flags)])
        return code, *capsys.readouterr()

    return SimpleNamespace(folder=folder, data=trainer.data, results=tmp_path / "results.jsonl", measured=measured,
                           output=tmp_path / "out")


def test_what_is_measured_is_kept_and_what_is_missing_is_made_again(trained, capsys):
    assert trained.measured()[0] == 0
    lines = trained.results.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["kind"], r["method"], r["tested"], r["steps"]) for r in records] == [
        (kind, method, tested, steps) for steps in (0, 2) for method in ("none", "yarn", "window")
        for kind, tested in (("loss", 128), ("needle", 64), ("needle", 128))]
    files = ("train_gpt2_mod.py", "fused_softmax.py", "docs/25-long-context/long_context.py", "docs/extending.py")
    sha256 = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in files)).hexdigest()
    assert all((r["gpu"], r["seed"], r["script_sha256"]) == ("cpu", 1337, sha256) for r in records)
    assert not any(str(trained.folder.parent) in line for line in lines)  # no paths of a machine

    model, val = script.GPT(config_of(vocab_size=VOCABULARY, n_head=2)), script.TokenShards(str(trained.data / "val_*"))
    model.load_state_dict(script.load_checkpoint(trained.folder / "step000006.pt")["model"])
    rows = np.stack([val.read(200 * i, 129) for i in range(5)])
    expected = long.by_bucket(long.token_losses(model.eval(), rows, EXACT), [16, 32, 64, 128])
    np.testing.assert_allclose(records[0]["losses"], expected, atol=2e-6)
    losses = {(r["method"], r["steps"]): r["losses"] for r in records if r["kind"] == "loss"}
    assert len({str(loss) for loss in losses.values()}) == 6  # each arm is another, before and after

    assert trained.measured()[:2] == (0, "") and trained.results.read_text().splitlines() == lines
    # Without its last two records, and with the last training to be done again.
    trained.results.write_text("\n".join(lines[:-2]) + "\n")
    folder, = trained.output.glob("window*")
    for path in folder.glob("*/*.pt"):
        path.unlink()
    assert trained.measured()[0] == 0
    again = [json.loads(line) for line in trained.results.read_text().splitlines()]
    timed = ("tokens_per_second", "peak_mem_MB")
    assert [{k: v for k, v in r.items() if k not in timed} for r in again] == [
        {k: v for k, v in r.items() if k not in timed} for r in records]

    runs = sorted(trained.output.glob("*/*/"))
    assert trained.measured("--trials", 3)[0] == 0 and sorted(trained.output.glob("*/*/")) == runs  # not trained again
    assert len(trained.results.read_text().splitlines()) == 2 * len(lines)
    trained.results.write_text("\n".join(lines) + "\n")
    code, out, _ = trained.measured("--table")
    assert code == 0 and "5 documents, 640 targets" in out and "of 10 (by chance 10.0%)" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| `")]
    assert len(rows) == 12 and {len(row) for row in rows[:6]} == {8} and {len(row) for row in rows[6:]} == {10}
    mean = np.mean(losses["yarn", 2], 0)
    assert rows[4][:2] == ["| `yarn`", "2"] and rows[4][2].startswith(f"{mean[0]:.3f} ±")
    assert rows[2][-2] == "-" and any(word in rows[1][-2] for word in ("better", "worse", "not distinguishable"))


def test_a_training_that_is_stopped_says_how_it_goes_on(trained, monkeypatch):
    monkeypatch.setattr(script, "main", lambda argv: script.Stopped.exit_code)
    code, _, err = trained.measured("--methods", "yarn", "--trials", 1)
    assert (code, err) == (75, "stopped; the same command goes on where it was\n")  # behind the script's line


def test_the_loser_is_called_worse():
    ends, losses = [8, 16, 32, 64], np.random.default_rng(0).normal(3, 1, (20, 4))
    worse = losses + [5, 5, 5, 0.1]
    worse[:, 3] += np.linspace(-0.02, 0.02, 20)
    base, other = (dict(ends=ends, trained=32, losses=x.tolist()) for x in (losses, worse))
    assert long.against(other, base).startswith("+0.100 [+0.0") and long.against(other, base).endswith(", worse")
    assert long.against(base, other).endswith(", better") and long.against(base, base) == "-"
    other["losses"] = (losses + np.random.default_rng(1).normal(0, 1, (20, 4))).tolist()
    assert long.against(other, base).endswith(", not distinguishable")


@pytest.mark.parametrize("flags, said", [
    (["--lengths", 64], "lengths=64 must be above the 64 tokens that"),
    (["--lengths", 500], "has no document of 501 tokens; name others, or lower --lengths"),
    (["--methods", "yarm"], "argument --methods: invalid choice: 'yarm'"),
    (["--trials", 0], "trials=0 must be from 1 to"),
    (["--checkpoint", "nowhere"], "nowhere holds no checkpoint"),
    (["--input_bin", "none*.bin"], "no file matches 'none*.bin'"),
    (["--methods", "window", "--", "--attention", "math"], "attention=math would be ignored: extension=window has a"),
    (["--input_bin", "OTHER"], "has a vocabulary of 61, the network of"),
    (["--table"], "/results.jsonl holds nothing: not measured yet"),
    (["--results", "/dev/null/here.jsonl"], "results=/dev/null/here.jsonl cannot be written"),
    (["--output_dir", "OTHER"], "cannot be written"),
    (["--", "--n_layer", "3"], "holds another network (n_layer 2, not 3); drop the flag, or start without "
     "--checkpoint"),
    (["--", "--init_std", "1"], "init_std would be ignored: the weights come from --checkpoint; drop it"),
    (["--", "--seed", "3"], "seed is set by this program; drop it from what stands behind --"),
    (["--total_batch_size", 300], "total_batch_size=300 must be a multiple of"),
    (["--", "--learning_rat", "1"], "--learning_rat is not a flag; did you mean --learning_rate?"),
])
def test_what_cannot_be_measured_is_one_line(trained, flags, said):
    other = write_shard(trained.results.parent / "other.bin", [1] * 300, vocab_size=61)
    code, _, err = trained.measured(*(other if flag == "OTHER" else flag for flag in flags))
    assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not trained.results.exists() and not trained.output.exists()  # before anything is measured


@pytest.mark.parametrize("flags, said", [
    ("--trained_length 512", "trained_length=512 would be ignored; add --extension yarn, or another"),
    ("--extension window --extension_factor 2", "extension_factor=2 would be ignored by extension=window; drop it, or "
     "choose one of linear, ntk, base, by_parts, yarn"),
    ("--extension yarn --extension_factor 0.5", "extension_factor=0.5 must be at least 1; it is the new length / "
     "trained_length"),
    ("--extension yarn --position learned", "extension=yarn needs position=rope, mixer=attention and heads of size 4 "
     "or more; drop it"),
    ("--extension sinks --window 64", "window=64 with extension=sinks, which has a mask of its own; drop one of the "
     "two"),
    ("--extension yarm", "extension=yarm is not known; did you mean yarn?"),
])
def test_what_cannot_be_trained_is_one_line(capsys, flags, said):
    assert long.main(["train", *flags.split(), "--dry_run"]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_an_extended_network_is_no_plain_one_and_draws_with_a_cache(trained, monkeypatch, capsys):
    code, _, err = trained.measured("--methods", "yarn", "--trials", 1)
    folder, = trained.output.glob("yarn*")
    assert code == 0 and trained.measured("--checkpoint", folder)[2].endswith(
        "is extended already; name what it was made of\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    texts = []
    for cache in ([], ["--no_cache"]):
        argv = [ROOT / "tools" / "sample.py", folder, "--max_new_tokens", 50, "--device", "cpu", *cache]
        assert long.main([str(word) for word in argv]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    monkeypatch.setattr(script, "GPTConfig", long.PlainConfig)
    path, = folder.glob("*/*.pt")
    with pytest.raises(script.DataError, match="extension, extension_factor, trained_length, unknown here"):
        script.load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["yarn", "sinks"])
def test_compiled_it_is_the_same_training(trainer, method):
    factor = ["--extension_factor", 2] if method == "yarn" else []
    flags = ["--extension", method, "--trained_length", 16, *factor, "--gradient_checkpointing", "--val_loss_every", 0]
    plain, compiled = (steps(trainer.run(*flags, *more).folder) for more in ((), ("--compile",)))
    assert column(compiled, "train_loss") == pytest.approx(column(plain, "train_loss"), rel=1e-4)
