#!/usr/bin/env python3
"""Accuracy against tokens spent, on sums: train a generator and a verifier with the script, sample, vote, rank.

    python docs/27-test-time-compute/test_time.py --seed 1
    python docs/27-test-time-compute/test_time.py --seed 1 --checkpoint logs/RUN_ID     begins with a trained network
    python docs/27-test-time-compute/test_time.py --table

What stands behind -- are flags of the script, for both trainings. Shards, runs and samples lie in --output_dir, and
stopped, the same command goes on. It appends a record of each scratchpad to the file of results.

Exit codes: 0, done; 2, one line on stderr says what to mend; 130, interrupted; 141, nobody read what was printed; else
what a training ended with.
"""
import dataclasses
import json
import math
import re
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tools"), str(HERE.parents[1] / "data"), str(HERE.parent)]
import extending  # noqa: E402
import measuring  # noqa: E402
from extending import script  # noqa: E402
from sample import Cache, find, find_encoding, load  # noqa: E402
from shards import ShardWriter  # noqa: E402

require = script.require
SCRATCHPADS = dict(none="n", short="s", long="l")  # and the character by which a problem asks for it
CHARACTERS = "nsl0123456789+=:,;#?y"
SPLITS = ("test", "verifier", "val", "train")
METHODS = ("likelihood", "vote", "verifier", "weighted vote", "oracle")
READ_AGAIN = ("verifier", "weighted vote")  # methods for which a second network reads each sample
VALIDATED = 1000  # samples of the verifier's validation loss, at most a tenth of all
PERMUTATIONS, RESAMPLES = 4, 2000  # of the samples of a problem, for the votes; of the problems, for the intervals
NETWORK = "--model mini --document_mask"
TRAINING = ("--sequence_length 512 --batch_size 128 --total_batch_size 65536 --num_iterations 3000 "
            "--learning_rate 1e-3 --warmup_iters 100 --warmdown_fraction 0.5 --val_loss_every 500 --log_every 100 "
            "--save_every_minutes 3 --keep_last 1")
SET_HERE = ("input_bin", "input_val_bin", "output_dir", "seed", "device", "resume", "init_from", "save_checkpoints",
            "dry_run")
COUNTS = dict(  # flags: default, least, most, help
    digits=(3, 1, 9, "of each number"),
    terms=(6, 2, 20, "a sum has 2 to so many"),
    train_problems=(1_200_000, 1, 10**8, "that the generator trains on"),
    test_problems=(200, 1, 10**5, "for each number of terms"),
    samples=(64, 1, 1024, "of each test problem"),
    verifier_problems=(2000, 1, 10**6, "for each number of terms, from samples of which the verifier learns"),
    verifier_samples=(16, 1, 1024, "of each of those"),
    verifier_steps=(1000, 1, 10**6, "of the verifier's training"),
    sample_batch_size=(1024, 1, 2**16, "samples drawn at a time"),
    seed=(1, 0, 2**31 - 1, "of problems, trainings and samples"),
)


# ----------------------------------------------------------------------------------------------------------------------
# The task: sums of several numbers, two added at a time, in an order drawn at random


def prompt(terms, scratchpad):
    return SCRATCHPADS[scratchpad] + "+".join(map(str, terms)) + "="


def columns(a, b):
    """The digits of a sum from the last on, each with the carry into it: of 47 and 85 7+5+0=12,4+8+1=13."""
    written, carry = [], 0
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        written.append(f"{x}+{y}+{carry}={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return ",".join(written)


def solution(terms, scratchpad, order=None):
    """The steps, as long as the scratchpad, then # and the sum (Nye et al. 2021, arXiv:2112.00114). A short step is
    12+7:19; and a long one has its columns, 12+7:2+7+0=09,1+0+0=01:19; . The order permutes the terms."""
    total, *others = terms if order is None else [terms[i] for i in order]
    steps = ""
    for term in others:
        work = columns(total, term) + ":" if scratchpad == "long" else ""
        steps += f"{total}+{term}:{work}{total + term};"
        total += term
    return steps * (scratchpad != "none") + f"#{total}"


def answer_of(text):
    """The number behind the one # of a solution; -1, no answer, where it has not that form."""
    found = re.fullmatch(r"[^#]*#([0-9]{1,18})", text)
    return int(found[1]) if found else -1


def most_tokens(digits, terms, scratchpad):
    """Of a right solution, the end-of-text token behind it counted."""
    return len(solution([10**digits - 1] * terms, scratchpad)) + 1


class Problems:
    """Sums of 2 to `most` terms of so many digits. No problem of one split is, in any order of its terms, one of
    another. All splits but "train" have given numbers of different problems for each number of terms; that of training
    has no end, and repeats itself where there are few."""

    def __init__(self, seed, digits, most, **counts):
        self.seed, self.digits, self.most, self.held_out = seed, digits, most, {}
        for split, count in counts.items():
            for k in range(2, most + 1):
                there = math.comb(9 * 10 ** (digits - 1) + k - 1, k)  # multisets
                require(10 * count <= there, f"{split}_problems={count} must be at most a tenth of the {there:,} that "
                        f"there are of {k} terms; lower it, or raise --digits")
                rng, end = self.rng(split, k), len(self.held_out) + count
                while len(self.held_out) < end:
                    terms = self.draw(rng, k)
                    self.held_out.setdefault(tuple(sorted(terms)), (split, terms))

    def rng(self, split, *more):
        """A generator of its own; the last of `more` must not be 0, which SeedSequence takes for no number."""
        return np.random.default_rng([self.seed, SPLITS.index(split), *more])

    def draw(self, rng, k):
        return tuple(rng.integers(10 ** (self.digits - 1), 10**self.digits, k).tolist())

    def of(self, split, k):
        """Those of a split with k terms, in the order in which they were drawn."""
        return [terms for own, terms in self.held_out.values() if own == split and len(terms) == k]

    def for_training(self, count):
        rng = self.rng("train", 2)
        while count:
            terms = self.draw(rng, rng.integers(2, self.most + 1))
            if tuple(sorted(terms)) not in self.held_out:
                count -= 1
                yield terms

    def texts(self, split, problems):
        """Problems with solutions, scratchpad and order of the terms drawn for each."""
        rng, kinds = self.rng(split, 1), list(SCRATCHPADS)
        for terms in problems:
            kind = kinds[rng.integers(len(kinds))]
            yield prompt(terms, kind) + solution(terms, kind, rng.permutation(len(terms)))


# ----------------------------------------------------------------------------------------------------------------------
# Tokens: one a character, so that each digit stands by itself


class Characters:
    """The tokens of single characters in an encoding of data/text_encodings.py, such as GPT-2's."""

    def __init__(self, encoding):
        self.n_vocab, self.eot, self.token = encoding.n_vocab, encoding.eot, np.zeros(128, np.uint16)
        for character in CHARACTERS:
            self.token[ord(character)], = encoding.encode(character)
        self.character = {int(self.token[ord(character)]): character for character in CHARACTERS}

    def encode(self, text):
        return self.token[np.frombuffer(text.encode("ascii"), np.uint8)]

    def decode(self, tokens):
        """The text, with a space for a token that is none of the task's."""
        return "".join(self.character.get(token, " ") for token in tokens.tolist())


def rows_of(documents, T, eot):
    """Rows of T tokens, each with as many whole documents as it holds and end-of-text tokens behind them. Documents
    come without the end-of-text token that begins them."""
    row, filled = np.full(T, eot, np.uint16), 0
    for document in documents:
        size = 1 + len(document)
        if filled + size > T:
            yield row
            row, filled = np.full(T, eot, np.uint16), 0
        row[filled + 1 : filled + size] = document
        filled += size
    yield row


def write_shard(path, rows, characters):
    """A shard of which the script's row i is row i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(path, characters.n_vocab)
    for row in rows:
        writer.write(row)
    writer.write(row[:1])  # the target of the last token
    writer.close()


# ----------------------------------------------------------------------------------------------------------------------
# Samples and their verification


@torch.no_grad()
def draw_solutions(cache, idx, chances, temperature, eot):
    """Tokens (B, L) that go on from problems idx (B, S), eot from the first of them on, and the mean log-likelihood
    (B,) of those to the first eot, at temperature 1. A token is drawn by a number of chances (B, L) from 0 to 1, the
    first one whose sum of softmax(logits / temperature) is above it; a number below 0 takes the likeliest."""
    (B, S), (total, count) = idx.shape, torch.zeros(2, len(idx), device=idx.device)
    alive = torch.ones(B, dtype=torch.bool, device=idx.device)
    for chance in chances.T:
        logits = cache(idx).float()
        require(logits.isfinite().all(), "the generator gives logits that are no numbers; train it at a lower rate")
        sums = (logits / temperature).softmax(-1).cumsum(-1)
        drawn = (sums <= chance[:, None] * sums[:, -1:]).sum(-1).clamp(max=logits.size(-1) - 1)
        token = torch.where(chance < 0, logits.argmax(-1), drawn).where(alive, eot)
        total += alive * logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        count += alive
        alive &= token != eot
        idx = torch.cat([idx, token[:, None]], 1)
        if not alive.any():
            break
    tokens = torch.full(chances.shape, eot)
    tokens[:, : idx.size(1) - S] = idx[:, S:].cpu()
    return tokens.numpy().astype(np.uint16), (total / count).cpu().numpy().astype(float)


@torch.no_grad()
def chances_of_right(model, rows, characters, batch_size):
    """Of each row of tokens what a verifier gives to "y" behind it, as a share of what it gives to "y" and "n"."""
    yes, no = map(int, characters.encode("yn"))
    device, found = model.lm_head.weight.device, []
    for start in range(0, len(rows), batch_size):
        some = [torch.from_numpy(row.astype(np.int64)) for row in rows[start : start + batch_size]]
        ends = torch.tensor([len(row) - 1 for row in some])
        idx = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=characters.eot)
        stream = model.trunk(idx.to(device))[0]
        logits = model.head(stream[torch.arange(len(some)), ends]).cpu().double()
        found += (logits[:, yes] - logits[:, no]).sigmoid().tolist()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What n of M samples would have given: expectations over the subsets of n, of each of P problems


def pass_at(right, n):
    """(P, M) -> the share of subsets with a right sample, (P,) (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""
    M = right.shape[1]
    none = np.array([math.comb(M - c, n) / math.comb(M, n) for c in range(M + 1)])
    return 1 - none[right.sum(1)]


def best_of(right, scores, n):
    """(P, M) both -> the share of subsets whose sample of highest score is right, (P,). Of equal scores that of the
    sample drawn first counts as the higher."""
    M = right.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")
    highest = np.array([math.comb(M - 1 - rank, n - 1) / math.comb(M, n) for rank in range(M)])
    return np.take_along_axis(right, order, 1) @ highest


def vote(answers, weights):
    """Where in each row of answers (R, n), small whole numbers, the one with most weight stands first (Wang et al.
    2022, arXiv:2203.11171, section 2): (R,). Of answers with equal weight that one wins which comes first in the row.
    -1 is no answer and has no vote; a row with no other gives -1."""
    width = answers.max() + 2
    keys = np.arange(len(answers))[:, None] * width + answers + 1
    totals = np.bincount(keys.ravel(), weights.ravel())[keys]
    totals[answers < 0] = -1
    return np.where(totals.max(1) >= 0, totals.argmax(1), -1)


def orders_of(M, rng):
    """Orders of M samples whose first n are a subset: permutations drawn at random with all their rotations, so that
    each sample is equally often at each place. (PERMUTATIONS M, M)"""
    rotations = (np.arange(M)[:, None] + np.arange(M)) % M
    return np.concatenate([rng.permutation(M)[rotations] for _ in range(PERMUTATIONS)])


def vote_of(right, answers, weights, n, orders):
    """(P, M) each -> the share of the orders whose first n vote for the right answer, (P,)."""
    same = (answers[:, :, None] == answers[:, None, :]).argmax(2)  # the place of the first with this answer
    same[answers < 0] = -1
    subsets, found = orders[:, :n], np.zeros(len(right))
    for i, (own, weight) in enumerate(zip(same, weights)):
        places = vote(own[subsets], weight[subsets])
        found[i] = (right[i, subsets[np.arange(len(subsets)), places]] & (places >= 0)).mean()
    return found


def expected(method, right, answers, likelihood, chance, n, orders):
    """(P, M) each -> what a method with n samples gets right of each problem, (P,). One with an answer is preferred to
    all without, whatever its score."""
    if method == "oracle":
        return pass_at(right, n)
    if method in ("vote", "weighted vote"):
        return vote_of(right, answers, np.ones_like(chance) if method == "vote" else chance, n, orders)
    return best_of(right, np.where(answers < 0, -np.inf, likelihood if method == "likelihood" else chance), n)


def auc(right, scores):
    """How often a right sample scores above a wrong one of the same problem, equal scores counted half: the mean over
    problems that have both, None without such a problem."""
    apart = [score[own][:, None] - score[~own] for own, score in zip(right, scores) if 0 < own.sum() < len(own)]
    return float(np.mean([(a > 0).mean() + (a == 0).mean() / 2 for a in apart])) if apart else None


def bootstrap(P, rng):
    """A function that gives mean and 95% interval of P values, one a problem, by the percentiles of the means of P
    drawn with replacement, the same draws each time."""
    shares = rng.multinomial(P, np.full(P, 1 / P), RESAMPLES) / P
    return lambda values: [float(values.mean()), *np.percentile(shares @ values, [2.5, 97.5]).tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# The experiment


def validated(count):
    """How many of so many samples are for the verifier's validation loss."""
    return max(1, min(VALIDATED, count // 10))


class Study:
    """What one seed needs, in a folder of its own, where each step goes on from the files that are there."""

    def __init__(self, args, flags):
        extending.refuse_own(flags, SET_HERE)
        self.args, self.folder, world = args, args.output_dir / f"seed{args.seed}", script.World(args.device)
        require(world.size == 1, "this is one process's; start it without torchrun")
        self.device, self.T = world.device, script.parse_flags([*TRAINING.split(), *flags])["sequence_length"]
        longest = len(prompt([10**args.digits - 1] * args.terms, "long") + "?y")
        longest += most_tokens(args.digits, args.terms, "long")
        require(self.T >= longest, f"sequence_length={self.T} must be at least {longest}, a sample and its verdict; "
                "type more behind --, or lower --terms or --digits")
        self.start, content = args.checkpoint and find(args.checkpoint), None
        if self.start:
            content = script.load_checkpoint(self.start, script.WEIGHTS, "checkpoint")
        vocab_size = content["network"]["vocab_size"] if content else 257
        self.typed = [*("" if content else NETWORK).split(), *TRAINING.split(), *flags]
        # All that can be said of the trainings before the folder is begun, of whose settings the flags are a part.
        config, run = extending.check_training(self.typed, world, vocab_size, self.start, content)
        try:
            trained = dict(network=dataclasses.asdict(config), run=dict(model=run.model))
            extending.check_training([*self.typed, "--num_iterations", str(args.verifier_steps)], world, vocab_size,
                                     "the generator", trained, "the generator")
        except script.ConfigError as e:
            raise script.ConfigError(f"the verifier's training, of --verifier_steps: {e}") from e
        self.characters = Characters(find_encoding(None, self.start, str(self.folder / "sums" / "x"), vocab_size))
        self.problems = Problems(args.seed, args.digits, args.terms, test=args.test_problems,
                                 verifier=args.verifier_problems, val=args.test_problems)
        self.terms, self.cache, self.needed = range(2, args.terms + 1), None, run.tokens_per_step + config.lookahead
        self.check_sizes()
        self.settings = dict(checkpoint=args.checkpoint and str(args.checkpoint), temperature=args.temperature)
        self.settings |= {name: getattr(args, name) for name in COUNTS if name != "seed"}
        self.settings["flags"] = " ".join(flags)

    def check_sizes(self):
        """Raise ConfigError unless each training has the tokens of a step; of the verifier's as if all samples were
        right, which is known only when the generator is trained."""
        problems, kinds = self.problems, list(SCRATCHPADS)
        sums = problems.texts("train", problems.for_training(self.args.train_problems))
        self.check_rows(self.rows(map(self.characters.encode, sums)), "train_problems")
        texts = (prompt(terms, kind) + solution(terms, kind) + "?y" for k in self.terms
                 for terms in problems.of("verifier", k) for kind in kinds for _ in range(self.args.verifier_samples))
        count = len(self.terms) * self.args.verifier_problems * len(kinds) * self.args.verifier_samples
        texts = islice(texts, validated(count), None)
        self.check_rows(self.rows(map(self.characters.encode, texts)), "verifier_problems")

    def check_rows(self, rows, flag, more=""):
        """Raise ConfigError unless rows are a step's tokens, and the last one's target."""
        most = 1 + self.T * sum(1 for _ in islice(rows, -(-self.needed // self.T)))
        require(most >= self.needed, f"{flag}={getattr(self.args, flag)} is too few: {more}{most:,} tokens, and a step "
                f"of the training needs {self.needed:,}; raise --{flag}, or lower --total_batch_size behind --")

    def rows(self, documents):
        return rows_of(documents, self.T, self.characters.eot)

    def begin(self):
        """The SHA-256 of the script, and of this program, with which the folder was begun. Raises ConfigError where it
        has other settings."""
        path = self.folder / "settings.json"
        mine = dict(self.settings, script_sha256=measuring.source(__file__, extending.__file__))
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            script.write_atomically(path, lambda f: f.write(json.dumps(mine).encode()))
        try:
            there = json.loads(path.read_text())
        except ValueError as e:
            raise script.DataError(f"{path} is damaged; name another --output_dir") from e
        other = next((name for name, value in self.settings.items() if there.get(name) != value), None)
        require(not other, f"{self.folder} was begun with {other}={there.get(other)!r}; name another --output_dir")
        return there["script_sha256"]

    def train(self, name, shards, *more):
        """The checkpoint of a training that is done, by the script's own main()."""
        output = self.folder / name
        flags = [*self.typed, *more, "--seed", self.args.seed, "--input_bin", shards / "train_*.bin", "--input_val_bin",
                 shards / "val_*.bin", "--output_dir", output, "--device", self.args.device, "--resume", "auto"]
        while True:
            path = next(script.checkpoints_of_runs(output, {}), None)
            content = path and script.load_checkpoint(path)
            if content and content["step"] >= content["run"]["num_iterations"]:
                return path
            if code := extending.train([str(flag) for flag in flags]):
                sys.exit(code)

    def network(self, path):
        torch.set_float32_matmul_precision("highest")  # whatever a training before it has left
        return load(path, None)[2].to(self.device)

    def generator(self):
        shards = self.folder / "sums"
        val = (terms for k in self.terms for terms in self.problems.of("val", k))
        for split, own in dict(val=val, train=self.problems.for_training(self.args.train_problems)).items():
            path = shards / f"{split}_000.bin"
            if not path.exists():
                texts = self.problems.texts(split, own)
                write_shard(path, self.rows(map(self.characters.encode, texts)), self.characters)
        return self.train("generator", shards, *(["--init_from", self.start] if self.start else []))

    def samples(self, split, kind, k):
        """Tokens (P, M, L) of solutions of a split's problems with k terms, and their mean log-likelihoods (P, M).
        Those of "test" are M = 1 + samples, in the first of which each token is the likeliest."""
        path, begin = self.folder / "samples" / f"{split}_{kind}_{k}.npz", time.perf_counter()
        if path.exists():
            with np.load(path) as there:
                return there["tokens"], there["likelihood"]
        self.cache = self.cache or Cache(self.network(self.generator()))
        args, eot, problems = self.args, self.characters.eot, self.problems.of(split, k)
        shape = args.samples if split == "test" else args.verifier_samples, most_tokens(args.digits, k, kind)
        number = 1 + list(SCRATCHPADS).index(kind)
        chances = np.stack([self.problems.rng(split, k, 1 + i, number).random(shape) for i in range(len(problems))])
        if split == "test":
            chances = np.concatenate([np.full_like(chances[:, :1], -1), chances], 1)
        idx = [[eot, *self.characters.encode(prompt(terms, kind)).tolist()] for terms in problems]
        idx = torch.tensor(idx).repeat_interleave(chances.shape[1], 0).split(args.sample_batch_size)
        drawn = torch.from_numpy(chances).float().flatten(0, 1).split(args.sample_batch_size)
        parts = [draw_solutions(self.cache, some.to(self.device), chance.to(self.device), args.temperature, eot)
                 for some, chance in zip(idx, drawn)]
        tokens, likelihood = map(np.concatenate, zip(*parts))
        tokens, likelihood = tokens.reshape(chances.shape), likelihood.reshape(chances.shape[:2])
        path.parent.mkdir(exist_ok=True)
        script.write_atomically(path, lambda f: np.savez(f, tokens=tokens, likelihood=likelihood))
        print(f"sampled: {split}, {kind}, {k} terms, {len(problems)} problems x {chances.shape[1]}, "
              f"{time.perf_counter() - begin:.1f} s", flush=True)
        return tokens, likelihood

    def judged(self, split, kind, k):
        """Answers, whether they are right, tokens written, log-likelihoods, (P, M) each; and, of each sample with an
        answer, {(problem, sample): the tokens that a verifier reads}."""
        (tokens, likelihood), problems = self.samples(split, kind, k), self.problems.of(split, k)
        ended = tokens == self.characters.eot
        written = np.where(ended.any(2), ended.argmax(2) + 1, tokens.shape[2])
        answers, rows = np.full(written.shape, -1), {}
        for i, j in np.argwhere(ended.any(2)):
            own = tokens[i, j, : written[i, j] - 1]
            answers[i, j] = answer_of(self.characters.decode(own))
            if answers[i, j] >= 0:
                asked = self.characters.encode(prompt(problems[i], kind))
                rows[i, j] = np.concatenate([[self.characters.eot], asked, own, self.characters.encode("?")])
        right = answers == np.array([sum(terms) for terms in problems])[:, None]
        return answers, right, written, likelihood, rows

    def verifier(self):
        """Its checkpoint: the generator's weights, trained on with samples that end in ?y where they are right, else in
        ?n, all tokens being targets (Cobbe et al. 2021, arXiv:2110.14168, section 4)."""
        shards, generator, documents = self.folder / "verdicts", self.generator(), []
        if not (shards / "train_000.bin").exists():
            for kind, k in ((kind, k) for kind in SCRATCHPADS for k in self.terms):
                _, right, _, _, rows = self.judged("verifier", kind, k)
                verdicts = {at: self.characters.encode("y" if right[at] else "n") for at in rows}
                documents += [np.append(row[1:], verdicts[at]).astype(np.uint16) for at, row in rows.items()]
            require(len(documents) > 1, "no sample of the generator has an answer; train it longer, in another "
                    "--output_dir")
            order, cut = self.problems.rng("verifier", 1).permutation(len(documents)), validated(len(documents))
            rows = {split: lambda places=places: self.rows(documents[i] for i in places)
                    for split, places in dict(val=order[:cut], train=order[cut:]).items()}
            self.check_rows(rows["train"](), "verifier_problems", f"{len(documents):,} samples have an answer, ")
            for split, its in rows.items():
                write_shard(shards / f"{split}_000.bin", its(), self.characters)
        return self.train("verifier", shards, "--init_from", generator, "--num_iterations", self.args.verifier_steps)

    def record(self, kind, verifier):
        """What the results have of one scratchpad. Tokens are those of a problem, read once, and those written; where a
        verifier reads, also all that it reads."""
        parts, rng, size = [], self.problems.rng("test", 1), self.args.sample_batch_size
        for k in self.terms:
            *part, rows = self.judged("test", kind, k)
            chance = np.zeros(part[0].shape)
            for at, found in zip(rows, chances_of_right(verifier, list(rows.values()), self.characters, size)):
                chance[at] = found
            asked = 1 + len(prompt(self.problems.of("test", k)[0], kind))
            parts.append((*part, chance, np.full(len(chance), asked)))
        answers, right, written, likelihood, chance, asked = map(np.concatenate, zip(*parts))
        greedy, sampled = right[:, 0], [column[:, 1:] for column in (right, answers, likelihood, chance)]
        interval, orders, each = bootstrap(len(right), rng), orders_of(self.args.samples, rng), written[:, 1:].mean(1)
        curves = {method: {} for method in METHODS}
        for method in METHODS:
            for n in (2**i for i in range(self.args.samples.bit_length())):
                found = expected(method, *sampled, n, orders)
                tokens = asked + n * each + (method in READ_AGAIN) * n * (asked + each)
                curves[method][n] = dict(tokens=float(tokens.mean()), accuracy=interval(found),
                                         gain=interval(found - greedy))
        terms = {k: [int(part[1][:, 0].sum()), len(part[1])] for k, part in zip(self.terms, parts)}
        return dict(scratchpad=kind, greedy=dict(tokens=float((asked + written[:, 0]).mean()), terms=terms),
                    curves=curves, unanswered=float((answers[:, 1:] < 0).mean()),
                    auc_likelihood=auc(sampled[0], sampled[2]), auc_verifier=auc(sampled[0], sampled[3]))

    def run(self, results):
        """Append the records that are not there yet."""
        whole = dict(gpu=extending.device_name(self.device), seed=self.args.seed, settings=self.settings)
        done = [r["scratchpad"] for r in measuring.read(results) if whole.items() <= r.items()]
        missing = [kind for kind in SCRATCHPADS if kind not in done]
        if missing:
            whole |= dict(torch=torch.__version__, script_sha256=self.begin())
            verifier = self.network(self.verifier())
        for kind in missing:
            measuring.append(results, whole | self.record(kind, verifier))


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def cell(found):
    """Of [(mean, low, high)] of the seeds, in percent: their mean, and the widest ends."""
    value, low, high = (100 * f(column) for f, column in zip((np.mean, min, max), zip(*found)))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def average(values, form):
    known = [value for value in values if value is not None]
    return format(np.mean(known), form) if known else "-"


def tables_of(records):
    """Of records that differ in seed and scratchpad alone."""
    its = {kind: own for kind in SCRATCHPADS if (own := [r for r in records if r["scratchpad"] == kind])}
    counts, rows = list(records[0]["curves"]["vote"]), ([], [], [])
    shown = [n for n in counts if int(n).bit_length() % 2 or n == counts[-1]]
    for kind, own in its.items():
        right = {k: np.sum([r["greedy"]["terms"][k] for r in own], 0) for k in own[0]["greedy"]["terms"]}
        right["all"] = sum(right.values())
        rows[0].append([kind, average([r["greedy"]["tokens"] for r in own], ".0f"),
                        *(cell([(r / count, *measuring.wilson(r, count))]) for r, count in right.values()),
                        average([100 * r["unanswered"] for r in own], ".1f"),
                        *(average([r[f"auc_{score}"] for r in own], ".3f") for score in ("likelihood", "verifier"))])
        for method in METHODS:
            points = {n: [r["curves"][method][n] for r in own] for n in shown}
            rows[1].append([kind, method, *(average([point["tokens"] for point in each], ".0f") + ": "
                                            + cell([point["accuracy"] for point in each]) for each in points.values())])
            gains = [point["gain"] for point in points[counts[-1]]]
            said = measuring.verdict([interval for _, *interval in gains], "more")
            rows[2].append([kind, method, cell(gains), said if method != "oracle" else "a ceiling"])
    return [measuring.table(["greedy, scratchpad", "tokens", *(f"{k} terms" if k != "all" else k for k in right),
                   "samples without an answer", "AUC of likelihood", "AUC of verifier"], rows[0]),
            measuring.table(["scratchpad", "best by", *(f"N = {n}, tokens: right" for n in shown)], rows[1]),
            measuring.table(["scratchpad", f"N = {counts[-1]}, best by", "points above greedy", "verdict"], rows[2])]


def tables(records):
    """Of one GPU's records, those of each settings by themselves."""
    for settings in {json.dumps(r["settings"]): r["settings"] for r in records}.values():
        its = [r for r in records if r["settings"] == settings]
        seeds = ", ".join(dict.fromkeys(str(r["seed"]) for r in its))
        yield f"Seeds {seeds}; " + ", ".join(f"{name} {value}" for name, value in settings.items() if value)
        yield from tables_of(its)


def make_parser():
    parser = extending.experiment_parser(__file__, __doc__, None, "checkpoint, run or folder of runs, with whose "
                                         "weights the generator begins [none: a new mini]",
                                         "shards, runs and samples", COUNTS)
    parser.add_argument("--temperature", type=float, default=0.7, help="divides the logits of samples [0.7]")
    parser.epilog = "Behind -- stand flags of train_gpt2_mod.py, for both trainings."
    return parser


@extending.experiment
def main(argv):
    args, words = extending.parse_experiment(make_parser(), argv, COUNTS)
    require(0.01 <= args.temperature <= 100, f"temperature={args.temperature} must be from 0.01 to 100")
    if not args.table:
        Study(args, words).run(args.results)
    measuring.print_tables(args.results, tables)


if __name__ == "__main__":
    sys.exit(main())
