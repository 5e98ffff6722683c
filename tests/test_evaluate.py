"""tools/evaluate.py: its figures against the script's own and against plain loops in float64; bad files and flags."""
import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from helpers import FakeWorld, naive_cross_entropy, small_config, small_run
from launch import ROOT, column, one_process, some_tokens, validations, write_data, write_sealed, write_shard

import train_gpt2_mod as script

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import evaluate  # noqa: E402
import sample  # noqa: E402
from text_encodings import get_encoding  # noqa: E402

TEXT = "Größer 漢字 🙂, and then some more of it. " * 3
EXAMPLES = [  # context, endings, label
    ("The cat sits", ["on the mat.", "under a tree, and sings.", "no", "on the moon"], 0),
    ("She takes the key and", ["eats", "opens the old wooden door.", "opens", "a key"], 1),
    ("Größe ist", ["wenig", "viel", "alles, was zählt 🙂", ""], 2),
    ("He jumps", ["down", "in", "up", "over the very long fence of his neighbour"], 3),
]


def measure(capsys, *flags):
    """What is printed."""
    capsys.readouterr()
    code = evaluate.main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), err
    return json.loads(out, parse_constant=lambda name: pytest.fail(name))


def refuse(capsys, *flags):
    capsys.readouterr()
    code = evaluate.main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def write_weights(path, model, **run):
    """A network on the bytes of UTF-8 as a file that knows no more than tools/hf.py import does, and `run`."""
    write_sealed(path, dict(format=2, model=model.state_dict(), network=script.dataclasses.asdict(model.config),
                            run=dict(model="tiny", **run)))
    return path


def network(**changes):
    model = script.GPT(small_config(**{**dict(vocab_size=257, init_std=0.3), **changes}))
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return model.eval()


@pytest.fixture
def weights(tmp_path):
    """(file, network)."""
    model = network(smear="mlp", logit_softcap=20.0)
    return write_weights(tmp_path / "weights.pt", model, sequence_length=16), model


def write_examples(path, examples=EXAMPLES):
    rows = [dict(ind=i, ctx=context, endings=endings, label=label, split="val")
            for i, (context, endings, label) in enumerate(examples)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def naive_nats(model, tokens, T):
    """The sum over all targets in windows of T, in float64."""
    total = 0.0
    for first in range(0, len(tokens) - 1, T):
        window = torch.tensor([tokens[first : first + T + 1]])
        logits = model.double()(window[:, :-1])[0]
        total += naive_cross_entropy(logits, window[:, 1:]) * (window.size(1) - 1)
    return total


@pytest.mark.parametrize("T", [1, 7, 16, 1000])
def test_figures_of_a_text(capsys, tmp_path, weights, T):
    path, model = weights
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    found = measure(capsys, path, "--data", tmp_path / "text.txt", "--sequence_length", T, "--batch_size", 3)
    data = list(TEXT.encode())
    nats = naive_nats(model, [256, *data], T)
    assert (found["tokens"], found["bytes"], found["sequence_length"]) == (len(data), len(data), T)
    assert found["loss"] == pytest.approx(nats / len(data), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(data)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(data), rel=1e-5)
    assert found["checkpoint"] == str(path) and found["step"] == 0 and found["torch"] == torch.__version__
    assert found["data"] == str(tmp_path / "text.txt") and found["precision"] == "fp32" and "accuracy" not in found


def test_figures_of_the_first_tokens_of_shards(capsys, tmp_path, weights):
    """End-of-text tokens are targets that have no bytes."""
    path, model = weights
    tokens = np.concatenate([[256], some_tokens(40, 1, 256), [256, 256], some_tokens(30, 2, 256)])
    write_shard(tmp_path / "a_0.bin", tokens[:50])
    write_shard(tmp_path / "a_1.bin", tokens[50:])
    for most, count in ((0, 72), (1, 1), (45, 45), (72, 72), (1000, 72)):
        found = measure(capsys, path, "--data", tmp_path / "a_*.bin", "--tokens", most, "--batch_size", 2)
        nats, size = naive_nats(model, tokens[: count + 1].tolist(), 16), int((tokens[1 : count + 1] < 256).sum())
        assert (found["tokens"], found["bytes"]) == (count, size)
        assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_targets_without_any_bytes(capsys, tmp_path, weights):
    write_shard(tmp_path / "a.bin", [256, 256])
    found = measure(capsys, weights[0], "--data", tmp_path / "a.bin")
    assert found["tokens"] == 1 and found["bits_per_byte"] is None and found["loss"] > 0


def test_bytes_of_gpt2s_tokens(capsys, tmp_path):
    """All bytes of a text that GPT-2's tokens cut within its characters."""
    path = write_weights(tmp_path / "weights.pt", network(vocab_size=50257, n_embd=8), sequence_length=8)
    (tmp_path / "text.md").write_bytes(TEXT.encode())
    found = measure(capsys, path, "--data", tmp_path / "text.md")
    assert found["bytes"] == len(TEXT.encode()) and found["tokens"] == len(get_encoding("gpt2").encode(TEXT))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / found["bytes"] / math.log(2))


@pytest.mark.parametrize("flags", [
    [], ["--mtp_enabled"], ["--mtp_enabled", "--mtp_heads", "separate"], ["--document_mask", "--window", "9"],
    ["--mixer", "latent", "--post_norm"], ["--x0_lambdas", "--smear", "embedding+mlp", "--embd_norm", "--logit_softcap",
                                           "15", "--value_embeddings", "1"],
])
def test_the_loss_is_the_scripts(trainer, flags):
    folder = trainer.run(*flags).folder
    found = measure(trainer.capsys, folder, "--tokens", 150)
    assert found["loss"] == pytest.approx(column(validations(folder), "val_loss")[-1], rel=1e-5)
    assert (found["tokens"], found["step"], found["sequence_length"]) == (150, 6, 32)
    assert found["data"] == str(trainer.data / "val_*.bin")
    _, _, model, _ = sample.load(folder, None)
    shards, run = script.TokenShards(found["data"]), small_run(sequence_length=32, val_tokens=150, val_batch_size=8)
    cpu = torch.device("cpu")
    theirs = script.evaluate(model, shards, model.config, run, FakeWorld(), script.Numerics("fp32", cpu))
    assert found["loss"] == pytest.approx(theirs["val_loss"], rel=1e-9)


def test_bf16_is_another_precision_of_the_same(capsys, tmp_path, weights):
    (tmp_path / "text.txt").write_text("The same text in two precisions.")
    flags = [weights[0], "--data", tmp_path / "text.txt", "--device", "cpu"]
    exact, rough = measure(capsys, *flags), measure(capsys, *flags, "--precision", "bf16")
    assert exact["loss"] != rough["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert (exact["precision"], rough["precision"], rough["device"]) == ("fp32", "bf16", "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# HellaSwag


def naive_losses(model, context, ending, T):
    """The losses of the ending's bytes, one at a time, each with up to T tokens before it."""
    tokens, losses = list(context.encode()) + list(f" {ending}".encode()), []
    tokens = tokens[-T - 1 :]
    for i in range(max(1, len(tokens) - 1 - len(ending.encode())), len(tokens)):
        logits = model.double()(torch.tensor([tokens[:i]]))[0][:, -1:]
        losses.append(naive_cross_entropy(logits, torch.tensor([tokens[i]])))
    return losses


@pytest.mark.parametrize("T, cut", [(100, 0), (47, 1), (20, 4)])
def test_accuracies(capsys, tmp_path, weights, T, cut):
    path, model = weights
    file = write_examples(tmp_path / "examples.jsonl", EXAMPLES * 2)
    right, right_norm = 0, 0
    for context, endings, label in EXAMPLES:
        losses = [naive_losses(model, context, ending, T) for ending in endings]
        rows, _ = evaluate.rows_of(context, endings, get_encoding("bytes"), T)
        sums, means = evaluate.ending_losses(model.float(), rows, script.Numerics("fp32", torch.device("cpu")))
        assert sums.tolist() == pytest.approx([sum(each) for each in losses], rel=1e-5)
        assert means.tolist() == pytest.approx([sum(each) / len(each) for each in losses], rel=1e-5)
        right += min(range(4), key=lambda i: sum(losses[i])) == label
        right_norm += min(range(4), key=lambda i: sum(losses[i]) / len(losses[i])) == label
    for B in (1, 9, 100):
        found = measure(capsys, path, "--hellaswag", file, "--sequence_length", T, "--batch_size", B)
        assert (found["accuracy"], found["accuracy_norm"]) == (right / 4, right_norm / 4)
        assert (found["examples"], found["cut"], found["hellaswag"]) == (8, 2 * cut, str(file))
        assert "loss" not in found


def test_a_network_that_learned_the_endings_chooses_them(capsys, tmp_path):
    model = script.GPT(small_config(vocab_size=257))
    examples = [(context, [ending or "nichts" for ending in endings], label) for context, endings, label in EXAMPLES]
    rows = [list(f"{context} {endings[label]}".encode()) for context, endings, label in examples]
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        idx[i, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(idx[:, :-1], dict(target_1=idx[:, 1:]), return_logits=False)[1].backward()
        optimizer.step()
    path, file = write_weights(tmp_path / "weights.pt", model), tmp_path / "examples.jsonl"
    found = measure(capsys, path, "--hellaswag", write_examples(file, examples))
    assert found["accuracy_norm"] == 1.0 and found["examples"] == 4
    wrong = [(context, endings, (label + 1) % 4) for context, endings, label in examples]
    found = measure(capsys, path, "--hellaswag", write_examples(file, [examples[0], *wrong]), "--examples", 2)
    assert found["accuracy_norm"] == 0.5 and found["examples"] == 2


def test_loss_and_accuracy_together(capsys, tmp_path, weights):
    (tmp_path / "text.txt").write_text("Some text.")
    found = measure(capsys, weights[0], "--data", tmp_path / "text.txt", "--tokens", 4, "--hellaswag",
                    write_examples(tmp_path / "examples.jsonl"), "--examples", 3)
    assert found["tokens"] == 4 and found["examples"] == 3 and found["cut"] == 3


SOUND = dict(ctx="a", endings=["b", "c", "d", "e"], label=3)


@pytest.mark.parametrize("line", [
    "{", "[]", "3", "\udcff", '"ctx"', "{}", *(json.dumps({**SOUND, **change}) for change in (
        dict(label=4), dict(label=-1), dict(label="1"), dict(label=True), dict(label=1.0), dict(label=None),
        dict(ctx=""), dict(ctx=None), dict(ctx=5), dict(endings=["b"] * 3), dict(endings=["b"] * 5),
        dict(endings="bcde"), dict(endings=["b", "c", "d", 5]))),
])
def test_lines_that_are_no_example_are_named(capsys, tmp_path, weights, line):
    file = tmp_path / "examples.jsonl"
    lines = [json.dumps(SOUND), "", line, json.dumps(SOUND)]
    file.write_bytes("\r\n".join(lines).encode(errors="surrogateescape"))
    said = refuse(capsys, weights[0], "--hellaswag", file)
    assert f"{file}, line 3 " in said


def test_the_public_file_is_fetched_once(capsys, tmp_path, weights, monkeypatch):
    public, here = write_examples(tmp_path / "public.jsonl"), tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl"
    monkeypatch.setattr(evaluate, "HELLASWAG", public.as_uri())
    monkeypatch.setattr(evaluate, "HELLASWAG_FILE", here)
    said = refuse(capsys, weights[0], "--hellaswag")  # the file is not what the public one is
    assert evaluate.HELLASWAG_SHA256 in said and "--hellaswag FILE" in said and not here.exists()
    monkeypatch.setattr(evaluate, "HELLASWAG_SHA256", hashlib.sha256(public.read_bytes()).hexdigest())
    first = measure(capsys, weights[0], "--hellaswag")
    assert first["hellaswag"] == str(here) and here.read_bytes() == public.read_bytes()
    public.unlink()
    assert measure(capsys, weights[0], "--hellaswag") == first  # without a network
    here.write_text("damaged")
    said = refuse(capsys, weights[0], "--hellaswag")
    assert "cannot fetch" in said and "network" in said and [file.name for file in here.parent.iterdir()] == [here.name]


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_data_that_cannot_be_measured(capsys, tmp_path, weights):
    path, file = weights[0], tmp_path / "x.txt"
    assert "knows no validation shards" in refuse(capsys, path)
    assert "x.txt" in refuse(capsys, path, "--data", file)
    assert "is not a file" in refuse(capsys, path, "--data", tmp_path)
    file.write_bytes(b"")
    assert "no token to predict" in refuse(capsys, path, "--data", file)
    assert "no example" in refuse(capsys, path, "--hellaswag", file)
    file.write_bytes(b"ab\xffc")
    assert "not UTF-8 (byte 2 is 0xff)" in refuse(capsys, path, "--data", file)
    assert "is not a file" in refuse(capsys, path, "--hellaswag", tmp_path / "none.jsonl")
    assert "no file matches" in refuse(capsys, path, "--data", tmp_path / "none_*.bin")
    write_shard(tmp_path / "one.bin", [256])
    assert "no token to predict" in refuse(capsys, path, "--data", tmp_path / "one.bin")
    said = refuse(capsys, path, "--data", write_shard(tmp_path / "other.bin", [1, 2, 3], vocab_size=300))
    assert "300" in said and "257" in said
    write_shard(tmp_path / "past.bin", [1, 2, 257])
    assert "past the vocabulary" in refuse(capsys, path, "--data", tmp_path / "past.bin")
    (tmp_path / "no.bin").write_bytes(b"no shard")
    assert "not a token shard" in refuse(capsys, path, "--data", tmp_path / "no.bin")


def test_checkpoints_and_flags_that_cannot_be(capsys, tmp_path, weights):
    path, text = weights[0], tmp_path / "text.txt"
    text.write_text("text")
    for flags, said in ((["--tokens", -1], "tokens=-1"), (["--batch_size", 0], "batch_size=0"),
                        (["--precision", "fp8"], "fp8"), (["--sequence_length", 10**9], "sequence_length="),
                        (["--device", "tpu"], "device=tpu"), (["--tokenizer", "gpt2"], "50257"),
                        (["--examples", 3], "examples=3 would be ignored")):
        assert said in refuse(capsys, path, "--data", text, *flags)
    said = refuse(capsys, path, "--hellaswag", write_examples(tmp_path / "x.jsonl"), "--tokens", 3)
    assert "tokens=3 would be ignored" in said
    assert "holds no checkpoint" in refuse(capsys, tmp_path, "--data", text)
    learned = write_weights(tmp_path / "learned.pt", network(position="learned", n_positions=8))
    assert "at most 8" in refuse(capsys, learned, "--data", text, "--sequence_length", 9)
    assert measure(capsys, learned, "--data", text)["sequence_length"] == 8
    model = network()
    model.transformer.wte.weight.data.fill_(float("nan"))
    diverged = write_weights(tmp_path / "diverged.pt", model)
    assert "earlier checkpoint" in refuse(capsys, diverged, "--data", text)
    assert "earlier checkpoint" in refuse(capsys, diverged, "--hellaswag", tmp_path / "x.jsonl")


def test_several_processes_are_refused(capsys, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "text.txt").write_text("text")
    assert "without torchrun" in refuse(capsys, weights[0], "--data", tmp_path / "text.txt")


def test_as_a_program_progress_is_on_stderr(tmp_path, weights):
    write_data(tmp_path / "data")
    done = one_process(sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import evaluate; "
                       "evaluate.PROGRESS_EVERY = 0; sys.exit(evaluate.main(sys.argv[2:]))", ROOT / "tools",
                       weights[0], "--data", tmp_path / "data" / "val_*.bin", "--batch_size", 4)
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] == 199
    assert done.stderr.splitlines() == [f"targets {n} of 199" for n in (64, 128, 192, 199)]
