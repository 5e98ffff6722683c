"""docs/26-retrieval: the store against n-gram sets and a forward pass, neighbours and probabilities against loops in
float64, whole runs on small shards."""
import ctypes
import importlib.util
import json
import math
import multiprocessing
import sys
import threading
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from launch import ROOT, some_tokens, write_shard
from test_evaluate import network, write_weights

import train_gpt2_mod as script

spec = importlib.util.spec_from_file_location("retrieval", ROOT / "docs" / "26-retrieval" / "retrieval.py")
retrieval = importlib.util.module_from_spec(spec)
spec.loader.exec_module(retrieval)
measuring = retrieval.measuring

T, P, EOT = 16, 4, 256
MEMORY = 2**20
WORLD = script.World("cpu")


def shards(path, tokens):
    """As the script reads them."""
    return script.TokenShards(str(write_shard(path, tokens)))


def texts(seed, count, every=29):
    """Ids with a document's beginning now and then."""
    tokens = some_tokens(count, seed, 256)
    tokens[::every] = EOT
    return tokens


@pytest.fixture
def place(tmp_path):
    """A folder with a network, 700 training and 400 validation tokens."""
    model = network(smear="mlp", logit_softcap=20.0, x0_lambdas=True)
    write_weights(tmp_path / "weights.pt", model, sequence_length=T, input_bin=str(tmp_path / "train_*.bin"),
                  input_val_bin=str(tmp_path / "val.bin"))
    for name, seed, count in (("train_0", 1, 300), ("train_1", 2, 400), ("val", 3, 400)):
        write_shard(tmp_path / f"{name}.bin", texts(seed, count))
    return tmp_path


def flags(place, *more):
    own = dict(checkpoint=place / "weights.pt", output_dir=place / "store", results=place / "results.jsonl",
               passage_tokens=P, passages=1, k=9, ngram=6, tune_tokens=3 * T, test_tokens=6 * T, batch_size=2,
               device="cpu")
    return [word for name, value in own.items() for word in (f"--{name}", str(value))] + [str(word) for word in more]


def run(capsys, place, *more):
    """(exit code, stdout, stderr)."""
    capsys.readouterr()
    code = retrieval.main(flags(place, *more))
    return code, *capsys.readouterr()


def refused(capsys, place, *more):
    code, out, err = run(capsys, place, *more)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


def built(place, windows=43, key="mlp", folder="store", B=2, P=P):
    """(reader, training text, store)."""
    reader = retrieval.Reader(place / "weights.pt", key, "fp32", WORLD)
    train, val = script.TokenShards(str(place / "train_*.bin")), script.TokenShards(str(place / "val.bin"))
    store = retrieval.Store(place / folder, dict(sequence_length=T, passage_tokens=P, width=32, ngram=6, key=key))
    store.build(reader, train, val, windows, B, MEMORY)
    return reader, train, store


class Arrays(dict):
    """A stand-in for a store."""

    @property
    def C(self):
        return self["keys"].shape[1]


def contents(store):
    return {name: (store.folder / f"{name}.bin").read_bytes() for name in store.arrays}


# ----------------------------------------------------------------------------------------------------------------------
# What is in the store


def ngrams(tokens, n):
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


@pytest.mark.parametrize("n, width, vocabulary, memory", [(5, 8, 5, 128), (1, 8, 900, 128 * 7), (8, 8, 3, 128 * 40),
                                                          (6, 16, 4, 2**20)])
def test_windows_that_share_an_ngram_are_those_of_a_set(tmp_path, n, width, vocabulary, memory):
    """A window counts as soon as one of its tokens is in a shared n-gram, wherever this begins and ends; the validation
    text in parts of 1, 7, 40 and all tokens."""
    generator = np.random.default_rng(n)
    seen = total = 0
    for trial in range(4):
        train, val = (generator.integers(0, vocabulary, size).tolist() for size in (150, 60))
        count = 149 // width - trial % 2
        found = retrieval.shared_windows(shards(tmp_path / "t.bin", train), shards(tmp_path / "v.bin", val), count,
                                         width, n, memory)
        known = ngrams(val, n)
        for window in range(count):
            tokens = range(window * width, (window + 1) * width + 1)
            touching = [i for i in range(len(train) - n + 1) if i <= tokens[-1] and i + n - 1 >= tokens[0]]
            assert found[window] == any(tuple(train[i : i + n]) in known for i in touching), window
        seen, total = seen + found.sum(), total + count
    assert 0 < seen < total / 2


@pytest.mark.parametrize("at, windows", [(100, [6]), (106, [6, 7]), (0, [0]), (112, [6, 7]), (287, [17]), (288, [17]),
                                         (289, [])])
def test_a_planted_validation_passage_is_not_in_the_store(place, at, windows):
    """Ten validation tokens in the training text, also across a boundary of windows, or behind the last of them; the
    last target of a window is the first token of the next."""
    train, val = texts(1, 300), texts(3, 400)
    train[at : at + 10] = val[50:60]
    (place / "train_1.bin").unlink()
    write_shard(place / "train_0.bin", train)
    assert not ngrams(texts(1, 300).tolist(), 6) & ngrams(val.tolist(), 6)
    store = built(place, windows=18)[2]
    kept = [w for w in range(18) if w not in windows]
    assert store["values"].tolist() == [t for w in kept for t in train[w * T + 1 : (w + 1) * T + 1].tolist()]
    assert store.dropped == len(windows) and len(store["keys"]) == T * len(kept)
    every = np.arange(len(store["passages"]))
    known = ngrams(val.tolist(), 6)
    assert not any(ngrams(text, 6) & known for text in store.passage_tokens(every[:, None]).tolist())


def keys_slowly(model, row, key):
    """Of tokens (T,): what the last block's MLP reads, or the head, step by step, (T, C)."""
    x, ctx = model.embed(torch.tensor(row)[None])
    if key == "final":
        return model.trunk(torch.tensor(row)[None])[0][0]
    *others, last = model.transformer.h
    for block in others:
        x = block(x, ctx)
    x = last.mix(x, ctx.x0)
    x = x + last.attn_scale * last.attn(last.ln_1(x), ctx)
    return last.smear_2(last.ln_2(x), ctx.follows)[0]


@pytest.mark.parametrize("key", ["mlp", "final"])
def test_the_store_has_states_and_next_tokens(place, key):
    reader, train, store = built(place, key=key)
    assert store.dropped == 0 and store.windows == 43
    with torch.no_grad():
        for window in (0, 17, 18, 42):  # 18 begins in one shard and ends in the other
            row = train.read(window * T, T + 1).tolist()
            keys = keys_slowly(reader.model, row[:-1], key)
            here = slice(window * T, (window + 1) * T)
            np.testing.assert_allclose(store["keys"][here], keys, rtol=1e-3, atol=1e-3)
            assert store["values"][here].tolist() == row[1:]
            for i in range(3):
                mean = keys[i * P : (i + 1) * P].mean(0).numpy()
                np.testing.assert_allclose(store["passages"][3 * window + i], mean, rtol=1e-3, atol=1e-3)
                found = store.passage_tokens(np.array([[3 * window + i]]))
                assert found.tolist() == [row[1 + i * P : 1 + (i + 2) * P]]
    ids = np.array([[5, 0], [7, 100]])
    each = [[store.passage_tokens(np.array([[i]]))[0] for i in row] for row in ids]
    assert store.passage_tokens(ids).tolist() == [np.concatenate(row).tolist() for row in each]


@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_a_store_goes_on_where_it_was_stopped(place, monkeypatch, end):
    whole = contents(built(place, folder="whole")[2])
    states, calls = retrieval.Reader.states, []

    def stopping(self, idx):
        calls.append(len(idx))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return states(self, idx)

    monkeypatch.setattr(retrieval.Reader, "states", stopping)
    with pytest.raises(KeyboardInterrupt):
        built(place)
    if end == "killed":  # what was written after the last save
        path = place / "store" / "store.json"
        path.write_text(path.read_text().replace('"built": 10', '"built": 6'))
    calls.append("again")
    store = built(place)[2]
    assert sum(calls[calls.index("again") + 1 :]) == 43 - dict(interrupted=10, killed=6)[end]
    assert contents(store) == whole
    done = len(calls)
    assert built(place)[2].windows == 43 and len(calls) == done


def test_a_store_grows_and_a_part_of_it_is_used(place):
    whole = contents(built(place, folder="whole", B=1)[2])
    assert built(place, windows=20, B=1)[2].windows == 20
    store = built(place, windows=43, B=1)[2]
    assert contents(store) == whole
    part = built(place, windows=20)[2]
    assert part["keys"].shape == (20 * T, 32) and contents(part) == whole


# ----------------------------------------------------------------------------------------------------------------------
# Neighbours


def naive_neighbours(queries, rows, k):
    distances = ((queries[:, None].astype(np.float64) - rows[None].astype(np.float64)) ** 2).sum(-1)
    return np.argsort(distances, 1, kind="stable")[:, :k]


@pytest.mark.parametrize("memory", [24 * 12, 24 * 12 * 17, MEMORY])
@pytest.mark.parametrize("k", [1, 9, 40])
def test_the_flat_index_is_a_naive_search(memory, k):
    """In parts of 1 row, of 17 and of all; where k is more than there are, -1."""
    generator = np.random.default_rng(0)
    rows, queries = generator.normal(size=(31, 12)).astype(np.float16), generator.normal(size=(23, 12))
    found = retrieval.FlatIndex(faiss, rows, memory).search(queries.astype(np.float32), k)
    assert found[:, :31].tolist() == naive_neighbours(queries.astype(np.float32), rows, k).tolist()
    assert (found[:, 31:] == -1).all() and found.shape == (23, k)


def test_an_index_in_files_that_looks_everywhere_is_the_flat_one(tmp_path):
    """And goes on with the files that are there."""
    generator = np.random.default_rng(0)
    rows, queries = generator.normal(size=(2000, 8)).astype(np.float16), generator.normal(size=(50, 8))
    queries, folder = queries.astype(np.float32), tmp_path / "index"
    memory = 16 * 8 * 39 * 256
    index = retrieval.FileIndex(faiss, rows, folder, "IVF8,Flat", 8, memory // 8 * 8, 1)
    flat = retrieval.FlatIndex(faiss, rows, MEMORY).search(queries, 5)
    assert len(index.parts) == 1 and index.search(queries, 5).tolist() == flat.tolist()
    several = retrieval.FileIndex(faiss, rows, folder, "IVF8,Flat", 8, 4 * 40 * 300, 1)  # 32 bytes a row and 8 of an id
    files = sorted(path.name for path in folder.iterdir())
    assert len(several.parts) == 7 and files[1] == "0_300.faiss" and len(files) == 9
    assert several.search(queries, 5).tolist() == flat.tolist()
    assert several.size == sum((folder / name).stat().st_size for name in files if name not in
                               ("trained.faiss", "0_2000.faiss"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "300_600.faiss").unlink()
    again = retrieval.FileIndex(faiss, rows, folder, "IVF8,Flat", 8, 4 * 40 * 300, 1)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after.keys() == before.keys() and {n for n in after if after[n] != before[n]} == {"300_600.faiss"}
    assert again.search(queries, 5).tolist() == flat.tolist()
    few = retrieval.FileIndex(faiss, rows, folder, "IVF8,Flat", 1, 4 * 40 * 300, 1).search(queries, 5)
    assert 0.1 < (few == flat).mean() < 1


def private_memory():
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def memory_taken(folder, count, width, memory):
    """What numpy takes at most, and what the process does, faiss included, in bytes, and what was found. A process of
    its own calls it: what other tests gave back to their process' allocator is taken from there again or is not."""
    retrieval.POINTS = 1
    rows = np.memmap(folder / "keys.bin", np.float16, "r", shape=(count, width))
    train, val = (shards(folder / f"{i}.bin", some_tokens(total, i)) for i, total in enumerate((50_000, 400_000)))
    queries, store = rows[:: count // 50].astype(np.float32), Arrays(keys=rows, values=np.zeros(count, np.uint16))
    targets, many = torch.arange(300) % 3, torch.from_numpy(rows[:300].astype(np.float32))
    retrieval.FlatIndex(faiss, rows[:1000], memory).search(queries, 3)  # faiss' threads have their memory now
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], private_memory())

    ctypes.CDLL(None).malloc_trim(0)  # what is free already is not to be taken unseen
    before, thread = private_memory(), threading.Thread(target=watch)
    thread.start()
    tracemalloc.start()
    try:
        retrieval.shared_windows(train, val, 49_999 // 64, 64, 50, memory)
        index = retrieval.FileIndex(faiss, rows, folder / "index", "IVF16,PQ16x4", 2, memory, 1)
        flat = retrieval.FlatIndex(faiss, rows, memory).search(queries, 3)
        hit = retrieval.knn_probabilities(store, index, many, targets, 1024, [1.0], memory)[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        done.set()
        thread.join()
    return peak, most[0] - before, flat[:, 0].tolist(), hit, len(index.parts), index.size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_flag(tmp_path, monkeypatch):
    """Of keys of 32 MiB, in fp32 64, and of 400,000 validation tokens, with 4 MiB."""
    count, width, memory = 2**18, 64, 2**22
    with open(tmp_path / "keys.bin", "wb") as file:
        for part in range(16):
            file.write(np.random.default_rng(part).normal(size=(count // 16, width)).astype(np.float16).tobytes())
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))  # glibc: what is larger goes back when it is freed
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak, grown, flat, hit, parts, size = process.submit(memory_taken, tmp_path, count, width, memory).result()
    assert peak <= memory and grown <= 4 * memory, (peak, grown)
    assert flat == list(range(0, count, count // 50)) and hit == 100  # all values are 0
    assert parts == count // (memory // 4 // 16) and 16 * count < size < 20 * count


# ----------------------------------------------------------------------------------------------------------------------
# kNN-LM


def naive_probability(query, keys, values, target, k, temperature):
    """A neighbour after another, in float64; keys and values of the whole store."""
    distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(query, key)) for key in keys]
    nearest = sorted(range(len(keys)), key=lambda i: distances[i])[:k]
    weights = {i: math.exp(-(distances[i] - distances[nearest[0]]) / temperature) for i in nearest}
    return sum(w for i, w in weights.items() if values[i] == target) / sum(weights.values())


@pytest.mark.parametrize("memory", [1, 24 * 5 * 32 * 3, MEMORY])
def test_probabilities_are_those_of_a_loop(place, memory):
    """Queries searched and compared one at a time, three at a time and all together."""
    store = built(place, windows=6)[2]
    queries = torch.from_numpy(store["keys"][3::9].astype(np.float32)) + 0.3 * torch.randn(11, 32)
    targets = torch.from_numpy(store["values"][4::9].astype(np.int64))[:11]
    index, temperatures = retrieval.FlatIndex(faiss, store["keys"], MEMORY), [0.5, 20.0]
    found, hit = retrieval.knn_probabilities(store, index, queries, targets, 5, temperatures, memory)
    keys, values = store["keys"].astype(np.float64).tolist(), store["values"].tolist()
    expected = [[naive_probability(q, keys, values, t, 5, temperature) for temperature in temperatures]
                for q, t in zip(queries.double().tolist(), targets.tolist())]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=1e-6)
    assert hit == sum(row[1] > 0 for row in expected) and 0 < hit < 11


def test_fewer_neighbours_than_asked_for():
    """An index may find fewer, or none; then the neighbours say nothing."""
    store = Arrays(keys=np.eye(4, dtype=np.float16), values=np.full(4, 7, np.uint16))
    index = SimpleNamespace(search=lambda queries, k: np.array([[2, -1], [-1, -1]]))
    found, hit = retrieval.knn_probabilities(store, index, torch.zeros(2, 4), torch.tensor([7, 7]), 2, [1.0], MEMORY)
    assert found.tolist() == [[1], [0]] and hit == 1


def test_mixed_losses_are_the_formula_and_lambda_0_is_exactly_the_network():
    generator = torch.Generator().manual_seed(0)
    lm = 12 * torch.rand(1000, dtype=torch.float64, generator=generator)
    knn = torch.rand(1000, dtype=torch.float64, generator=generator) * (torch.arange(1000) % 3 > 0)
    assert torch.equal(retrieval.mixed_losses(lm, knn, 0), lm)
    for share in (0.02, 0.25, 0.7):
        expected = [-math.log(share * p + (1 - share) * math.exp(-nats)) for p, nats in zip(knn.tolist(), lm.tolist())]
        np.testing.assert_allclose(retrieval.mixed_losses(lm, knn, share), expected, rtol=1e-12)


def test_losses_of_windows_are_those_of_the_evaluation(place):
    """lambda 0 is the network's, as the script's validation has it; of other settings the mean over each window."""
    reader, _, store = built(place, windows=12)
    val = script.TokenShards(str(place / "val.bin"))
    args = SimpleNamespace(batch_size=2, k=9, memory=MEMORY)
    starts, settings = np.array([0, T, 2 * T, 7 * T, 100]), [(0, 1), (0.25, 30), (0.5, 30), (0.25, 1)]
    index = retrieval.FlatIndex(faiss, store["keys"], MEMORY)
    found, share, clock = retrieval.knn_losses(reader, store, index, val, starts, settings, args)
    keys, values, hits = store["keys"].astype(np.float64), store["values"], 0
    for start, row in zip(starts, found):
        tokens = torch.from_numpy(val.read(int(start), T + 1))[None]
        with torch.no_grad():
            logits, loss = reader.model(tokens[:, :-1], dict(target_1=tokens[:, 1:]))
            queries = keys_slowly(reader.model, tokens[0, :-1].tolist(), "mlp").double().numpy()
        lm = logits[0].double().log_softmax(-1).exp()
        assert row[0] == pytest.approx(float(loss), rel=1e-6)
        distances = ((queries[:, None] - keys) ** 2).sum(-1)
        nearest = np.argsort(distances, 1)[:, :9]
        for (weight, temperature), value in zip(settings[1:], row[1:]):
            total = 0.0
            for t in range(T):
                chances = np.exp(-(distances[t, nearest[t]] - distances[t].min()) / temperature)
                same = values[nearest[t]] == int(tokens[0, t + 1])
                p = weight * chances[same].sum() / chances.sum() + (1 - weight) * float(lm[t, tokens[0, t + 1]])
                total -= math.log(p)
            assert value == pytest.approx(total / T, rel=1e-4)
        hits += sum((values[nearest[t]] == int(tokens[0, t + 1])).any() for t in range(T))
    assert share == pytest.approx(hits / 80) and set(clock.seconds) == {"lm", "knn"}


# ----------------------------------------------------------------------------------------------------------------------
# Passages in the context


@pytest.mark.parametrize("P, k", [(4, 1), (2, 3)])
def test_losses_with_passages_are_those_of_sequences_made_one_by_one(place, P, k):
    """The nearest passage stands last; of T = 16 the passages take 8, or 12."""
    reader, _, store = built(place, windows=12, P=P)
    val = script.TokenShards(str(place / "val.bin"))
    args, start, means = SimpleNamespace(batch_size=T // P, passages=k), 50, store["passages"].astype(np.float64)
    index, clock = retrieval.FlatIndex(faiss, store["passages"], MEMORY), retrieval.Clock(WORLD)
    found = retrieval.context_losses(reader, store, index, val, start, np.random.default_rng(5), args, clock)
    stream, drawn = val.read(0, val.total).tolist(), np.random.default_rng(5).integers(0, len(means), (T // P, k))

    def text_of(numbers):
        return [token for number in numbers for token in store.passage_tokens(np.array([[number]]))[0].tolist()]

    def losses(text, chunk):
        with torch.no_grad():
            logits = reader.model(torch.tensor(text + chunk[:-1])[None])[0][0, -P:].double()
        return [float(-row.log_softmax(-1)[target]) for row, target in zip(logits, chunk)]

    for i, first in enumerate(range(start + 1, start + 1 + T, P)):  # the first target of each P
        before, chunk = stream[first + P - 1 - T : first], stream[first : first + P]
        with torch.no_grad():
            query = keys_slowly(reader.model, before, "mlp")[-P:].mean(0).double().numpy()
        nearest = ((means - query) ** 2).sum(1).argsort()[:k]
        kept = before[2 * P * k :]
        expected = {"full context": losses(before, chunk), "shorter context": losses(kept, chunk),
                    "random passages": losses(text_of(drawn[i]) + kept, chunk),
                    "retrieved passages": losses(text_of(nearest[::-1]) + kept, chunk)}
        for arm, values in expected.items():
            assert found[arm][i * P : (i + 1) * P].tolist() == pytest.approx(values, rel=1e-4), (arm, i)
            assert len(found[arm]) == T


def test_what_is_scored_does_not_choose_the_passages(place, monkeypatch):
    """The last four tokens of the text are targets alone, and the first of them is not even read by the query."""
    reader, _, store = built(place, windows=12)
    tokens, asked = texts(3, 400), []
    index, args = retrieval.FlatIndex(faiss, store["passages"], MEMORY), SimpleNamespace(batch_size=8, passages=1)
    search = index.search
    index.search = lambda queries, k: asked.append(queries) or search(queries, k)
    for changed in (False, True):
        if changed:
            tokens[50 + T - P + 1 : 50 + T + 1] = (tokens[50 + T - P + 1 : 50 + T + 1] + 1) % 256
        val = shards(place / "other.bin", tokens)
        retrieval.context_losses(reader, store, index, val, 50, np.random.default_rng(0), args, retrieval.Clock(WORLD))
    np.testing.assert_allclose(asked[0], asked[1], rtol=1e-5, atol=1e-6)
    tokens[50 + T - P] = (tokens[50 + T - P] + 1) % 256  # the last that the query may know
    retrieval.context_losses(reader, store, index, shards(place / "other.bin", tokens), 50, np.random.default_rng(0),
                             args, retrieval.Clock(WORLD))
    assert not np.allclose(asked[1][-1], asked[2][-1])


# ----------------------------------------------------------------------------------------------------------------------
# Results


def test_the_splits_share_no_target_and_no_document(tmp_path):
    tokens = texts(0, 200, every=29)
    tune, test = retrieval.split_starts(shards(tmp_path / "a.bin", tokens), T, 2, 3, EOT)
    assert tune.tolist() == [0, 16] and test.tolist() == [58, 74, 90]  # 33 is the first that is no tuning target
    assert tokens[58] == EOT
    tokens[:] = 1
    assert retrieval.split_starts(shards(tmp_path / "b.bin", tokens), T, 2, 3, EOT)[1].tolist() == [33, 49, 65]
    with pytest.raises(script.ConfigError, match="tune_tokens=32 and test_tokens=176 are more than the 200"):
        retrieval.split_starts(shards(tmp_path / "b.bin", tokens), T, 2, 11, EOT)


def test_the_interval_is_that_of_the_normal_distribution():
    """For many values, of mean 3 and known scatter, to a tenth of its width."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = retrieval.mean_interval(values, 1)
    half = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
    assert retrieval.mean_interval(values, 1) == [low, high] != retrieval.mean_interval(values, 2)


def test_verdicts_say_who_lost():
    losses = {"base": np.zeros(50), "worse": np.full(50, 0.1), "better": np.linspace(-2, -1, 50),
              "unclear": np.linspace(-1, 1, 50)}
    rows = retrieval.arms_of(losses, dict.fromkeys(losses, 1.0), 0)
    found = [measuring.verdict([row["interval"]]) for row in rows]
    assert found == ["not distinguishable", "worse", "better", "not distinguishable"]
    assert measuring.verdict([(-2, -1), (1, 2)]) == measuring.verdict([(-2, -1), (-2, 1)]) == found[0]
    assert [measuring.verdict([pair], "more") for pair in ((-2, -1), (1, 2), (-1, 1))] == ["worse", "better", found[0]]
    assert rows[2]["difference"] == rows[2]["loss"] == pytest.approx(-1.5)


def test_a_run_measures_once_what_it_is_asked_for(capsys, place):
    code, out, err = run(capsys, place)
    assert (code, err) == (0, ""), err
    first, second = rows = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["knn", "context"] and first["store_tokens"] == 43 * T
    assert first["store_bytes"] == 43 * T * (64 + 2) + 43 * 3 * 64 and first["dropped"] == 0
    assert first["gpu"] == "cpu" and first["torch"] == torch.__version__ and "--k 9" in first["flags"]
    assert [row["arm"] for row in second["arms"]] == list(retrieval.ARMS)
    alone, tuned, published = first["arms"]
    assert alone["difference"] == 0 and "published lambda 0.25" in published["arm"]
    assert out.startswith("store of 688 tokens, 0.1 MiB: 0 of 43 windows share 6 tokens")
    assert f"| network alone | {alone['loss']:.4f} |" in out.replace("the network", "network")
    assert run(capsys, place)[:2] == (0, out) and len((place / "results.jsonl").read_text().splitlines()) == 2
    assert run(capsys, place, "--passages", 1, "--k", 5)[0] == 0
    again = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in again] == ["knn", "context", "knn"] and again[2]["settings"]["k"] == 5
    assert retrieval.main(["--table", "--results", place / "results.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("cpu, torch ") and shown.count("| arm |") == 3 and out.split("\n\n\n")[1] in shown


def test_lambda_and_temperature_are_the_best_of_the_tuning_split(capsys, place, monkeypatch):
    run(capsys, place, "--only", "knn")
    row = json.loads((place / "results.jsonl").read_text())
    grid = [(share, t) for share in retrieval.LAMBDAS for t in retrieval.TEMPERATURES]
    best = grid[int(np.argmin(row["tuning_losses"]))]
    assert row["arms"][1]["arm"] == "tuned lambda {:g}, temperature {:g}".format(*best)
    reader, _, store = built(place, folder="another")
    index, args = retrieval.FlatIndex(faiss, store["keys"], MEMORY), SimpleNamespace(batch_size=2, k=9, memory=MEMORY)
    val = script.TokenShards(str(place / "val.bin"))
    tuning = retrieval.knn_losses(reader, store, index, val, np.arange(3) * T, grid, args)[0].mean(0)
    assert row["tuning_losses"] == pytest.approx(tuning.tolist(), abs=1e-5)


def test_a_store_of_another_network_is_refused(capsys, place):
    assert run(capsys, place, "--only", "store")[0] == 0
    before = contents(built(place, folder="unused")[2])
    other = network(smear="mlp", logit_softcap=20.0, x0_lambdas=True)
    run_of = script.load_checkpoint(place / "weights.pt", script.WEIGHTS)["run"]
    write_weights(place / "other.pt", other, **{name: value for name, value in run_of.items() if name != "model"})
    said = refused(capsys, place, "--checkpoint", place / "other.pt")
    assert f"output_dir={place / 'store'} was made with checkpoint=" in said and "name another" in said
    assert "made with key=mlp, not final" in refused(capsys, place, "--key", "final")
    write_shard(place / "val.bin", texts(4, 401))
    assert "made with input_val_bin=" in refused(capsys, place)
    write_shard(place / "val.bin", texts(3, 400))
    assert {path.stem: path.read_bytes() for path in (place / "store").glob("*.bin")} == before
    (place / "store" / "keys.bin").write_bytes(before["keys"][:-1])
    assert "is cut short" in refused(capsys, place)
    (place / "store" / "store.json").write_text("{}")
    assert "cannot be read ('made_of')" in refused(capsys, place)


@pytest.mark.parametrize("words, said", [
    ("--sequence_length 18", "passage_tokens=4 must divide sequence_length=18"),
    ("--passages 2", "with passages=2, leave twice as many of it to the text"),
    ("--ngram 17", "ngram=17 must be at most sequence_length=16"),
    ("--test_tokens 16", "tune_tokens=48 must be at least sequence_length=16, test_tokens=16 twice that"),
    ("--test_tokens 4000", "tune_tokens=48 and test_tokens=4000 are more than the 400 validation tokens"),
    ("--store_tokens 3", "store_tokens=3 and the training text must be over sequence_length=16"),
    ("--k 0", "k=0 must be from 1 to"),
    ("--index PQ4", "index=PQ4 must be flat or have inverted lists"),
    ("--index IVFnone,Flat", "index=IVFnone,Flat cannot be made of 688 rows of 32 (could not parse"),
    ("--index IVF1000,Flat", "should be at least as large as number of clusters"),
    ("--index IVF4,Flat --memory_mib 1 --store_tokens 640", None),
    ("--input_bin none_*.bin", "no file matches"),
    ("--input_val_bin SMALL", "has a vocabulary of 61, the network"),
    ("--checkpoint NONE", "holds no checkpoint"),
    ("--key last", "invalid choice"),
    ("--table", "/results.jsonl holds nothing: not measured yet"),
    ("--results SMALL/here.jsonl", "/here.jsonl cannot be written"),
    ("--output_dir SMALL", "/small.bin cannot be written"),
    ("-- --batch_size 3", "--batch_size 3 would be ignored: nothing is trained here"),
])
def test_what_cannot_be_is_one_line(capsys, place, words, said):
    write_shard(place / "small.bin", [1] * 100, vocab_size=61)
    words = words.replace("SMALL", str(place / "small.bin")).replace("NONE", str(place / "nothing")).split()
    if said is None:
        assert run(capsys, place, *words)[0] == 0
    else:
        assert said in refused(capsys, place, *words)


def test_validation_text_for_training_text_leaves_nothing(capsys, place):
    assert "all 24 windows share text" in refused(capsys, place, "--input_bin", place / "val.bin")


def test_without_faiss_it_says_so(capsys, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert refused(capsys, place) == ("error: this needs the package faiss-cpu; pip install -r "
                                      "requirements-tools.txt\n")
    assert not (place / "store").exists()
