#!/usr/bin/env python3
"""What a trained network gains from looking up the text that it was trained on: kNN-LM, and passages in its context.

    python docs/26-retrieval/retrieval.py --checkpoint logs/A --output_dir logs/A_store --store_tokens 20000000
    python docs/26-retrieval/retrieval.py --table

The first builds store and index in --output_dir, or what is missing of them, measures on validation text what the file
of results does not have yet, and appends a record each to it; stopped, the same command goes on. README.md says what is
measured.

Exit codes: 0, done; 2, one line on stderr says what to mend; 130, interrupted; 141, nobody read what was printed.
"""
import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tools"), str(HERE.parents[1] / "data"), str(HERE.parent)]
import extending  # noqa: E402
import measuring  # noqa: E402
from extending import script  # noqa: E402
from evaluate import Progress  # noqa: E402
from sample import context_of, find  # noqa: E402
from shards import sha256_of  # noqa: E402

DataError, require = script.DataError, script.require
LAMBDAS = (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)  # tried on the tuning split
TEMPERATURES = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)  # that divide squared distances; likewise
PUBLISHED_LAMBDA = 0.25  # of the paper on Wikitext-103
RESAMPLES = 10_000
POINTS, PQ_CENTROIDS = 39, 256  # that faiss wants of a sample for each centroid; centroids of a byte
SAVE_EVERY = 10  # seconds
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # of n-gram hashes; odd
ARMS = ("full context", "shorter context", "random passages", "retrieved passages")
MOST = script.LARGEST
COUNTS = dict(  # flags: default, least, most, help
    store_tokens=(0, 0, MOST, "tokens of training text to read; 0: all"),
    sequence_length=(0, 0, MOST, "tokens in a window; 0: the checkpoint's"),
    ngram=(50, 1, MOST, "tokens shared with the validation text for which a window is dropped"),
    nprobe=(32, 1, MOST, "inverted lists that a query looks at"),
    k=(1024, 1, MOST, "neighbours of a token"),
    passage_tokens=(64, 1, MOST, "tokens that are looked for, and scored, together; a passage has as many again"),
    passages=(2, 1, MOST, "passages in the context"),
    tune_tokens=(2**16, 1, MOST, "validation tokens that choose lambda and temperature"),
    test_tokens=(2**16, 1, MOST, "those behind them that are reported"),
    batch_size=(8, 1, MOST, "sequences computed at once"),
    memory_mib=(1024, 1, MOST, "main memory for keys and index"),
    seed=(1, 0, MOST, "of the index' sample, the random passages and the intervals"),
)


def import_faiss():
    try:
        import faiss
    except ImportError as e:
        raise script.ConfigError("this needs the package faiss-cpu; pip install -r requirements-tools.txt") from e
    return faiss


class Reader:
    """A trained network: the losses of tokens, and the states that are keys. They are what the last block's MLP reads,
    as in Khandelwal et al. 2020 (arXiv:1911.00172), or (`final`) what the head reads."""

    def __init__(self, path, key, precision, world):
        self.path, self.key, self.world = path, key, world
        content = script.load_checkpoint(path, script.WEIGHTS, "checkpoint")
        self.content, config = content, script.GPTConfig(**{**content["network"], "precision": "fp32"})
        self.model, self.kept = script.GPT(config), None
        if not script.is_like(content["model"], self.model.state_dict()):
            raise DataError(f"{path} does not hold the weights of its own network; name another")
        self.model.load_state_dict(content.pop("model"))
        self.model.eval().to(world.device)
        self.numerics, self.sha256 = script.Numerics(precision, world.device), sha256_of(path)
        self.model.transformer.h[-1].mlp.register_forward_pre_hook(self.keep)

    def keep(self, mlp, inputs):
        self.kept = inputs[0]

    @torch.no_grad()
    def states(self, idx):
        """(B, T) -> what the head reads, and the keys in fp32, (B, T, C) both."""
        with self.numerics.autocast():
            x = self.model.trunk(idx.to(self.world.device))[0]
        return x, (self.kept if self.key == "mlp" else x).float()

    @torch.no_grad()
    def losses(self, x, targets):
        """Nats of each target, (B, T) in float64 on the CPU; one sequence's logits at a time."""
        with self.numerics.autocast():
            rows = [F.cross_entropy(self.model.head(row).float(), target.to(row.device), reduction="none")
                    for row, target in zip(x, targets)]
        return torch.stack(rows).double().cpu()


# ----------------------------------------------------------------------------------------------------------------------
# The store: training text without what it shares with the validation text


def ngram_hashes(tokens, n):
    """(N,) -> 64 bits of each n-gram, (N - n + 1,)."""
    each = np.random.default_rng(0).integers(0, 2**64, 2**16, np.uint64)
    hashes = np.zeros(max(0, len(tokens) - n + 1), np.uint64)
    for i in range(n):
        hashes *= MULTIPLIER  # wraps
        hashes += each[tokens[i : i + len(hashes)]]
    return hashes


def shared_windows(train, val, count, T, n, memory):
    """Which of the first `count` windows, tokens [wT, wT + T] of the training text, hold a token of an n-gram (n <= T)
    that is in the validation text too, a bool array. As far as 64 bits tell: a collision drops a window, and keeps
    none. The validation text is gone through in parts, each sorted, and the training text once for each of them."""
    dropped, part = np.zeros(count, bool), max(1, memory // 128)
    progress = Progress("windows compared with the validation text", count * -(-(val.total - n + 1) // part))
    for first in range(0, val.total - n + 1, part):
        known = np.unique(ngram_hashes(val.read(first, min(part + n - 1, val.total - first)), n))
        step = max(1, part // T)
        for window in range(0, count, step):
            start, last = max(0, window * T - n + 1), min(count, window + step)
            found = ngram_hashes(train.read(start, min(train.total, last * T + n) - start), n)
            places = np.searchsorted(known, found).clip(max=len(known) - 1)
            at = start + np.flatnonzero(known[places] == found)  # first tokens of n-grams that are shared
            for touched in (at - 1, at + n - 1):  # the first token of a window is the last target of the one before
                dropped[(touched // T).clip(0, count - 1)] = True
            progress.add(last - window)
    return dropped


class Store:
    """The training text as a network reads it, in windows of T tokens one after another, as files in a folder.

    Of the windows that are kept `keys` has the state at each token, (rows, C) in float16, `values` the token that
    follows it, (rows,), and `passages` the mean of each P keys but the last P of a window, behind which no text of it
    stands. dropped.npy says which windows are not kept, store.json what all this was made of and how far it is built.
    """

    def __init__(self, folder, made_of):
        self.folder, self.made_of, self.built = Path(folder), made_of, 0
        self.T, self.P, self.C = (made_of[name] for name in ("sequence_length", "passage_tokens", "width"))
        self.per_window = self.T // self.P - 1  # passages
        self.windows = self.dropped = 0  # in use: of those that were built perhaps the first ones
        self.arrays = dict(keys=(np.float16, self.T, self.C), values=(np.uint16, self.T),
                           passages=(np.float16, self.per_window, self.C))  # of a window
        path = self.folder / "store.json"
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            its, self.built = {name: found["made_of"][name] for name in made_of}, int(found["built"])
            whole = all(os.path.getsize(self.folder / f"{name}.bin") >= self.built * size
                        for name, size in zip(self.arrays, self.window_bytes()))
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise DataError(f"output_dir={folder} cannot be read ({script.first_line(e)}); remove it, or name "
                            "another") from e
        for name, value in made_of.items():
            require(its[name] == value, f"output_dir={folder} was made with {name}={its[name]}, not {value}; name "
                    "another")
        require(whole, f"output_dir={folder} is cut short; remove it, or name another")

    def __getitem__(self, name):
        """An array, mapped."""
        dtype, rows, *others = self.arrays[name]
        return np.memmap(self.folder / f"{name}.bin", dtype, "r", shape=(self.windows * rows, *others))

    def window_bytes(self):
        """Bytes of a window in each file."""
        return [np.dtype(dtype).itemsize * math.prod(shape) for dtype, *shape in self.arrays.values()]

    def passage_tokens(self, ids):
        """Passages (N, k) -> their tokens and as many that follow them, (N, k 2 P)."""
        first = ids // self.per_window * self.T + ids % self.per_window * self.P
        return self["values"][first[..., None] + np.arange(2 * self.P)].reshape(len(ids), -1).astype(np.int64)

    def save(self):
        text = json.dumps(dict(made_of=self.made_of, built=self.built), indent=2)
        script.write_atomically(self.folder / "store.json", lambda f: f.write(text.encode()))

    def build(self, reader, train, val, windows, B, memory):
        """Have what is to be kept of the first so many windows of the training text."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "dropped.npy"
        dropped = np.load(path) if path.exists() else np.zeros(0, bool)
        if len(dropped) < windows:
            dropped = shared_windows(train, val, windows, self.T, self.made_of["ngram"], memory)
            script.write_atomically(path, lambda f: np.save(f, dropped))
        kept = np.flatnonzero(~dropped[:windows])
        require(len(kept), f"all {windows} windows share text with the validation shards; name other --input_bin")
        if self.built < len(kept):
            self.save()
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(open(self.folder / f"{name}.bin", "ab")) for name in self.arrays]
                self.extend(reader, train, kept[self.built :], B, files)
        self.windows, self.dropped = len(kept), windows - len(kept)

    def extend(self, reader, train, windows, B, files):
        for file, size in zip(files, self.window_bytes()):
            file.truncate(self.built * size)  # what was written after the last save
        progress, saved = Progress("windows read", len(windows)), time.monotonic()
        try:
            for numbers in np.split(windows, range(B, len(windows), B)):
                tokens = np.stack([train.read(w * self.T, self.T + 1) for w in numbers])
                keys = reader.states(torch.from_numpy(tokens[:, :-1]))[1]
                means = keys.unflatten(1, (-1, self.P)).mean(2)[:, :-1]
                keys, means = (z.to(torch.float16).cpu() for z in (keys, means))
                require(keys.isfinite().all(), "a state is no number in float16; take the other --key")
                for file, data in zip(files, (keys.numpy(), tokens[:, 1:].astype(np.uint16), means.numpy())):
                    file.write(data.tobytes())
                    file.flush()
                self.built += len(numbers)
                progress.add(len(numbers))
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        finally:
            self.save()


# ----------------------------------------------------------------------------------------------------------------------
# Neighbours


def nearest(searches, count, k):
    """The numbers of the k nearest neighbours, (count, k), the nearest first, of what several searches found, squared
    distances and numbers (count, any) each; -1 where there are fewer."""
    best, best_ids = np.full((count, k), np.inf, np.float32), np.full((count, k), -1)
    for distances, ids in searches:
        distances, ids = np.concatenate([best, distances], 1), np.concatenate([best_ids, ids], 1)
        order = np.argsort(distances, 1, kind="stable")[:, :k]
        best, best_ids = np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)
    return best_ids


class FlatIndex:
    """All rows of an array (N, C) are compared, a part after another that fits the memory; nothing is kept."""

    size = 0  # bytes on the disk

    def __init__(self, faiss, rows, memory):
        self.faiss, self.rows, self.at_once = faiss, rows, max(1, memory // (24 * rows.shape[1]))

    def search(self, queries, k):
        """(N, C) -> the numbers of their nearest rows, (N, k)."""
        return nearest((self.search_part(queries, k, first) for first in range(0, len(self.rows), self.at_once)),
                       len(queries), k)

    def search_part(self, queries, k, first):
        part = self.rows[first : first + self.at_once].astype(np.float32)
        distances, ids = self.faiss.knn(queries, part, min(k, len(part)))
        return distances, ids + first


class FileIndex:
    """An index of faiss with inverted lists, by its factory's name, in files that each take a quarter of the memory to
    fill, and are mapped when they are searched. The quantizers are those of one sample of the rows, so that several
    files find what one would. Files that are there are not made again."""

    def __init__(self, faiss, rows, folder, name, nprobe, memory, seed):
        self.faiss, self.rows, self.folder = faiss, rows, folder
        count, width = rows.shape
        try:
            trained = self.trained(name, memory, seed)
            each = max(1, memory // (4 * (faiss.extract_index_ivf(faiss.read_index(trained)).code_size + 8)))
            progress, at_once = Progress("rows indexed", count), max(1, memory // (24 * width))
            paths = [self.filled(trained, first, min(first + each, count), at_once, progress)
                     for first in range(0, count, each)]
        except RuntimeError as e:
            why = str(e).strip().rsplit(": ", 1)[-1]
            raise script.ConfigError(f"index={name} cannot be made of {count:,} rows of {width} ({why}); take another, "
                                     "or flat") from e
        self.parts = [faiss.read_index(path, faiss.IO_FLAG_MMAP) for path in paths]
        for part in self.parts:
            faiss.extract_index_ivf(part).nprobe = nprobe
        self.size = sum(os.path.getsize(path) for path in paths)

    def write(self, index, path):
        self.folder.mkdir(exist_ok=True)
        self.faiss.write_index(index, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    def trained(self, name, memory, seed):
        path, (count, width) = self.folder / "trained.faiss", self.rows.shape
        if not path.exists():
            index, most = self.faiss.index_factory(width, name), memory // (16 * width)
            least = POINTS * max(PQ_CENTROIDS, self.faiss.extract_index_ivf(index).nlist)
            require(most >= min(least, count), f"memory_mib={memory // 2**20} is for a sample of {most:,} rows, and "
                    f"index={name} is trained on {least:,}; try {16 * width * least // 2**20 + 1}")
            drawn = np.unique(np.random.default_rng(seed).integers(0, count, most)) if count > most else slice(None)
            index.train(self.rows[drawn].astype(np.float32))
            self.write(index, path)
        return str(path)

    def filled(self, trained, first, last, at_once, progress):
        path = self.folder / f"{first}_{last}.faiss"
        if not path.exists():
            index = self.faiss.read_index(trained)
            for start in range(first, last, at_once):
                end = min(start + at_once, last)
                index.add_with_ids(self.rows[start:end].astype(np.float32), np.arange(start, end))
                progress.add(end - start)
            self.write(index, path)
        return str(path)

    def search(self, queries, k):
        return nearest((part.search(queries, k) for part in self.parts), len(queries), k)


# ----------------------------------------------------------------------------------------------------------------------
# kNN-LM


def squared_distances(queries, keys, ids):
    """Those of queries (N, C) and their neighbours, (N, k), of the keys as they are stored; infinite where there is
    none."""
    rows = torch.from_numpy(keys[ids.clip(min=0)]).to(queries.device).float()
    distances = rows.sub_(queries[:, None]).square_().sum(-1)
    return distances.masked_fill(torch.from_numpy(ids < 0).to(queries.device), math.inf)


def target_probabilities(distances, hits, temperature):
    """What the neighbours give the target: distances (N, k), hits (N, k) where a neighbour's value is the target, ->
    the share of the hits in the softmax of -distance / temperature (arXiv:1911.00172, section 2; there the temperature
    is 1)."""
    weights = torch.softmax(-distances / temperature, -1).nan_to_num(0.0)  # all NaN where there is no neighbour
    return (weights * hits).sum(-1)


def mixed_losses(lm, knn, share):
    """-ln(share p_knn + (1 - share) p_lm) of the LM's losses and the neighbours' probabilities, float64."""
    share = torch.tensor(share, dtype=torch.float64)
    return -torch.logaddexp(share.log() + knn.log(), torch.log1p(-share) - lm)


def knn_probabilities(store, index, queries, targets, k, temperatures, memory):
    """p_knn of each target (N,) with each temperature, (N, temperatures) in float64, and how many are among their
    neighbours' values. The index finds the neighbours, their distances are those of the stored keys."""
    keys, values, found, hit = store["keys"], store["values"], [], 0
    few = max(1, memory // (24 * k * store.C))
    for some, wanted in zip(*(z.split(max(1, memory // (128 * k))) for z in (queries, targets))):
        every = index.search(some.cpu().numpy(), k)
        for q, target, ids in zip(some.split(few), wanted.split(few), np.split(every, range(few, len(every), few))):
            distances = squared_distances(q, keys, ids)
            hits = (values[ids.clip(min=0)] == target.numpy()[:, None]) & (ids >= 0)
            hit += int(hits.any(1).sum())
            hits = torch.from_numpy(hits).to(q.device)
            found.append(torch.stack([target_probabilities(distances, hits, t) for t in temperatures], 1).cpu())
    return torch.cat(found).double(), hit


class Clock:
    """Seconds by part."""

    def __init__(self, world):
        self.world, self.seconds = world, Counter()

    @contextlib.contextmanager
    def __call__(self, part):
        self.world.synchronize()
        begin = time.perf_counter()
        yield
        self.world.synchronize()
        self.seconds[part] += time.perf_counter() - begin


def knn_losses(reader, store, index, source, starts, settings, args):
    """Mean loss of the T targets of each window with each (lambda, temperature), (windows, settings), the share of
    targets that are among their neighbours' values, and a Clock."""
    temperatures, clock = sorted({temperature for _, temperature in settings}), Clock(reader.world)
    losses, hit, progress = [], 0, Progress("windows", len(starts))
    for batch in np.split(starts, range(args.batch_size, len(starts), args.batch_size)):
        tokens = torch.from_numpy(np.stack([source.read(start, store.T + 1) for start in batch]))
        with clock("lm"):
            x, keys = reader.states(tokens[:, :-1])
            lm = reader.losses(x, tokens[:, 1:])
        with clock("knn"):
            chances, some = knn_probabilities(store, index, keys.flatten(0, 1), tokens[:, 1:].flatten(), args.k,
                                              temperatures, args.memory)
        chances = chances.view(*lm.shape, -1)
        losses.append(torch.stack([mixed_losses(lm, chances[..., temperatures.index(t)], share).mean(1)
                                   for share, t in settings], 1))
        hit += some
        progress.add(len(batch))
    return torch.cat(losses).numpy(), hit / (len(starts) * store.T), clock


def measure_knn(reader, store, faiss, val, splits, args):
    """The arms' losses on the test split {arm: (windows,)}, their ms a token, and what else there is to say."""
    begin = time.perf_counter()
    if args.index == "flat":
        index = FlatIndex(faiss, store["keys"], args.memory)
    else:
        folder = store.folder / f"index_{args.index.replace(',', '_')}_{store.windows}_{args.seed}"
        index = FileIndex(faiss, store["keys"], folder, args.index, args.nprobe, args.memory, args.seed)
    grid, built = [(share, t) for share in LAMBDAS for t in TEMPERATURES], time.perf_counter() - begin
    tuning = knn_losses(reader, store, index, val, splits[0], grid, args)[0].mean(0)
    best = grid[int(tuning.argmin())]
    published = min((pair for pair in grid if pair[0] == PUBLISHED_LAMBDA), key=lambda pair: tuning[grid.index(pair)])
    losses, hit, clock = knn_losses(reader, store, index, val, splits[1], [(0, 1), best, published], args)
    names = ["the network alone", *(f"{what} lambda {share:g}, temperature {t:g}"
                                    for what, (share, t) in (("tuned", best), ("published", published)))]
    lm, knn = (1000 * clock.seconds[part] / losses[:, 0].size / store.T for part in ("lm", "knn"))
    more = dict(index_bytes=index.size, index_s=built, share_found=hit, tuning_losses=tuning.round(6).tolist())
    return dict(zip(names, losses.T)), dict(zip(names, (lm, lm + knn, lm + knn))), more


# ----------------------------------------------------------------------------------------------------------------------
# Passages in the context


def context_losses(reader, store, index, source, start, rng, args, clock):
    """{arm: losses (T,)} of the T targets behind token `start`, P at a time, each P at the end of a sequence of T. The
    query is the mean key of the P tokens before them; the nearest passage stands last."""
    T, P, k = store.T, store.P, args.passages
    block = torch.from_numpy(source.read(start + P - T, 2 * T - P + 1))
    losses = {arm: [] for arm in ARMS}
    for rows in block.unfold(0, T + 1, P).split(args.batch_size):
        idx, targets = rows[:, :-1], rows[:, -P:]
        with clock("full context"):
            x, keys = reader.states(idx)
            losses["full context"].append(reader.losses(x[:, -P:], targets))
        with clock("search"):
            ids = index.search(keys[:, T - 2 * P + 1 : T - P + 1].mean(1).cpu().numpy(), k)
        drawn = rng.integers(0, len(index.rows), ids.shape)
        kept, before = idx[:, 2 * P * k :], dict(zip(ARMS[1:], (None, drawn, ids[:, ::-1])))
        for arm, numbers in before.items():
            with clock(arm):
                text = kept if numbers is None else torch.cat(
                    [torch.from_numpy(store.passage_tokens(numbers)), kept], 1)
                losses[arm].append(reader.losses(reader.states(text)[0][:, -P:], targets))
    return {arm: torch.cat(parts).flatten() for arm, parts in losses.items()}


def measure_context(reader, store, faiss, val, splits, args):
    """As measure_knn(). The time of the retrieved passages has the pass that makes the query and the search in it."""
    require(args.passages <= len(store["passages"]), f"passages={args.passages} are more than the store has; lower it")
    index, rng = FlatIndex(faiss, store["passages"], args.memory), np.random.default_rng(args.seed)
    context_losses(reader, store, index, val, splits[1][0], np.random.default_rng(0), args, Clock(reader.world))
    clock, progress = Clock(reader.world), Progress("windows", len(splits[1]))
    found = []
    for start in splits[1]:
        found.append(context_losses(reader, store, index, val, start, rng, args, clock))
        progress.add(1)
    losses = {arm: np.array([float(each[arm].mean()) for each in found]) for arm in ARMS}
    ms = {arm: 1000 * clock.seconds[arm] / len(found) / store.T for arm in ARMS}
    ms[ARMS[3]] += ms[ARMS[0]] + 1000 * clock.seconds["search"] / len(found) / store.T
    return losses, ms, {}


# ----------------------------------------------------------------------------------------------------------------------
# Results


def split_starts(source, T, tune, test, eot):
    """First tokens of the windows of T tokens of the tuning split and of the test split, which begins with a document:
    no target is in both, nor a document where each begins with eot."""
    first = tune * T + 1
    for start in range(first, source.total, script.CHECKED_TOKENS):
        ends = np.flatnonzero(source.read(start, min(script.CHECKED_TOKENS, source.total - start)) == eot)
        if len(ends):
            first = start + int(ends[0])
            break
    require(first + test * T < source.total, f"tune_tokens={tune * T} and test_tokens={test * T} are more than the "
            f"{source.total:,} validation tokens; lower them")
    return T * np.arange(tune), first + T * np.arange(test)


def mean_interval(values, seed):
    """95% interval of the mean by the percentile bootstrap (Efron 1979)."""
    counts = np.random.default_rng(seed).multinomial(len(values), [1 / len(values)] * len(values), RESAMPLES)
    return np.quantile(counts @ values / len(values), (0.025, 0.975)).tolist()


def arms_of(losses, ms, seed):
    """Rows of a record; the first arm is what the others are compared with."""
    base = next(iter(losses.values()))
    rows = [dict(arm=arm, loss=float(each.mean()), ms_per_token=ms[arm], difference=float((each - base).mean()),
                 interval=mean_interval(each - base, seed)) for arm, each in losses.items()]
    require(all(math.isfinite(row["loss"]) for row in rows), "a loss is no number; name an earlier checkpoint")
    return rows


def tables(records):
    """What --table prints of a GPU's records."""
    for r in records:
        s, rows = r["settings"], []
        for i, row in enumerate(r["arms"]):
            low, high = row["interval"]
            against = [f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})", measuring.verdict([(low, high)])]
            rows.append([row["arm"], f"{row['loss']:.4f}", *(against if i else ["", ""]), f"{row['ms_per_token']:.4g}"])
        how = (f"{s['index']}, nprobe {s['nprobe']}, k {s['k']}, {r['index_bytes'] / 2**20:,.1f} MiB; the target is "
               f"among the neighbours' {r['share_found']:.1%} of the time" if r["kind"] == "knn" else
               f"{s['passages']} of 2 x {s['passage_tokens']} tokens")
        title = dict(knn="kNN-LM", context="Passages in the context")[r["kind"]]
        yield (f"{title}: {r['checkpoint']}, {s['precision']}, seed {s['seed']}; keys `{s['key']}` of "
               f"{r['store_tokens']:,} tokens, {r['store_bytes'] / 2**20:,.1f} MiB, {r['dropped']:,} windows of "
               f"{s['sequence_length']} dropped; {how}; {s['test_tokens']:,} test tokens.\n\n"
               + measuring.table(["arm", "loss, nats", "difference (95%)", "it is", "ms a token"], rows))


# ----------------------------------------------------------------------------------------------------------------------
# main


KINDS = dict(knn=(measure_knn, ("index", "nprobe", "k", "seed")), context=(measure_context, ("passages", "seed")))


def run(args):
    """Build the store and measure what is not in the results yet."""
    faiss = import_faiss()
    world = script.World(args.device)
    require(world.size == 1, "this is one process's; start it without torchrun")
    reader = Reader(find(args.checkpoint), args.key, args.precision, world)
    run_of, config = reader.content["run"], reader.model.config
    T, P = args.sequence_length or context_of(reader.content), args.passage_tokens
    require(config.position == "rope" or T <= config.n_positions, f"sequence_length={T} must be at most "
            f"{config.n_positions}, the positions that the network learned")
    require(T % P == 0 and 2 * P * (args.passages + 1) <= T, f"passage_tokens={P} must divide sequence_length={T} and, "
            f"with passages={args.passages}, leave twice as many of it to the text; lower one of them")
    patterns = {name: getattr(args, name) or run_of.get(name, "") for name in ("input_bin", "input_val_bin")}
    train, val = (extending.open_shards(pattern, name, reader.path, config.vocab_size)
                  for name, pattern in patterns.items())
    require(args.ngram <= min(T, val.total), f"ngram={args.ngram} must be at most sequence_length={T} and the "
            f"{val.total} validation tokens")
    made_of = dict(checkpoint=reader.sha256, key=args.key, precision=args.precision, sequence_length=T,
                   passage_tokens=P, width=config.n_embd, ngram=args.ngram,
                   **{name: script.description(pattern) for name, pattern in patterns.items()})
    tune, test = args.tune_tokens // T, args.test_tokens // T
    require(tune >= 1 and test >= 2, f"tune_tokens={args.tune_tokens} must be at least sequence_length={T}, "
            f"test_tokens={args.test_tokens} twice that")
    splits = split_starts(val, T, tune, test, config.vocab_size - 1)
    windows = (train.total - 1) // T
    windows = min(windows, args.store_tokens // T) if args.store_tokens else windows
    require(windows >= 1, f"store_tokens={args.store_tokens} and the training text must be over sequence_length={T}")
    store, begin = Store(args.output_dir, made_of), time.perf_counter()
    store.build(reader, train, val, windows, args.batch_size, args.memory)
    tokens, size = store.windows * T, store.windows * sum(store.window_bytes())
    print(f"store of {tokens:,} tokens, {size / 2**20:,.1f} MiB: {store.dropped} of {windows} windows share "
          f"{args.ngram} tokens with the validation text and are not in it", flush=True)
    common = dict(
        gpu=extending.device_name(world.device),
        checkpoint=f"{reader.path.parent.name}/{reader.path.name}", step=reader.content.get("step", 0),
        store_tokens=tokens, store_bytes=size, dropped=store.dropped, build_s=time.perf_counter() - begin,
        flags=" ".join(args.argv), torch=torch.__version__, faiss=faiss.__version__, script_sha256=measuring.source(),
        program_sha256=sha256_of(__file__),
    )
    for kind, (measure, asked) in KINDS.items():
        if args.only not in (None, kind):
            continue
        settings = dict(made_of, windows=windows, tune_tokens=tune * T, test_tokens=test * T,
                        **{name: getattr(args, name) for name in asked})
        done = [r for r in measuring.read(args.results)
                if (r["kind"], r["settings"], r["gpu"]) == (kind, settings, common["gpu"])]
        if not done:
            losses, ms, more = measure(reader, store, faiss, val, splits, args)
            done = [dict(kind=kind, arms=arms_of(losses, ms, args.seed), settings=settings, **common, **more)]
            measuring.append(args.results, *done)
        print("\n\n".join(["", *tables(done)]), flush=True)


def make_parser():
    parser = extending.experiment_parser(__file__, __doc__, Path("logs"), "checkpoint, run or folder of runs [logs]",
                                         "store and index", COUNTS)
    add = parser.add_argument
    add("--input_bin", help="training shards, whose text is stored [the checkpoint's]")
    add("--input_val_bin", help="validation shards [the checkpoint's]")
    add("--key", choices=("mlp", "final"), default="mlp", help="what the last block's MLP reads, or the head [mlp]")
    add("--index", default="flat", help="flat, or what faiss' factory calls an index with inverted lists, such as "
        "OPQ64_256,IVF4096,PQ64 [flat]")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products [fp32]")
    add("--only", choices=("store", "knn", "context"), help="do this alone [all]")
    return parser


@extending.experiment
def main(argv):
    args, words = extending.parse_experiment(make_parser(), argv, COUNTS)
    if args.table:
        return measuring.print_tables(args.results, tables)
    require(not words, f"{' '.join(words)} would be ignored: nothing is trained here; drop what stands behind --")
    require(args.index == "flat" or "IVF" in args.index, f"index={args.index} must be flat or have inverted lists (IVF "
            "in its name)")
    args.memory, args.argv = args.memory_mib * 2**20, argv
    run(args)


if __name__ == "__main__":
    sys.exit(main())
