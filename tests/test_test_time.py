"""docs/27-test-time-compute: sums and scratchpads, votes and verifiers of known distributions, small whole runs."""
import collections
import importlib.util
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

import train_gpt2_mod as script
from helpers import small_config
from launch import ROOT

PROGRAM = ROOT / "docs" / "27-test-time-compute" / "test_time.py"
spec = importlib.util.spec_from_file_location("test_time_compute", PROGRAM)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
BYTES = program.Characters(program.find_encoding("bytes", "x", "x", 257))


# ----------------------------------------------------------------------------------------------------------------------
# The task


def check_columns(a, b, text):
    """That the columns, least digit first, are those of a + b: each from its own digits and the carry before."""
    carry, total = 0, 0
    width = max(len(str(a)), len(str(b)))
    digits = zip(reversed(str(a).zfill(width)), reversed(str(b).zfill(width)))
    for place, (x, y, column) in enumerate(zip(*zip(*digits), text.split(","), strict=True)):
        assert column.split("=")[0] == f"{x}+{y}+{carry}"
        found = column.split("=")[1]
        assert len(found) == 2 and int(found) == int(x) + int(y) + carry
        carry = int(found[0])
        total += int(found[1]) * 10**place
    assert total + carry * 10**width == a + b


@pytest.mark.parametrize("scratchpad", program.SCRATCHPADS)
def test_solutions_parse_back(scratchpad):
    draw = random.Random(1)
    for _ in range(300):
        digits, k = draw.randint(1, 9), draw.randint(2, 7)
        terms = [draw.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(k)]
        order = draw.sample(range(k), k)
        text = program.solution(terms, scratchpad, order)
        assert program.answer_of(text) == sum(terms)
        assert len(text) < program.most_tokens(digits, k, scratchpad)
        *steps, last = text.split(";")
        assert last == f"#{sum(terms)}" and len(steps) == (k - 1) * (scratchpad != "none")
        total = terms[order[0]]
        for i, step in zip(order[1:], steps):
            asked, *work, answer = step.split(":")
            assert asked == f"{total}+{terms[i]}" and int(answer) == total + terms[i]
            assert len(work) == (scratchpad == "long")
            for columns in work:
                check_columns(total, terms[i], columns)
            total += terms[i]


def test_the_longest_solution_is_as_long_as_said():
    for scratchpad in program.SCRATCHPADS:
        lengths = [len(program.solution(terms, scratchpad)) for terms in itertools.product(range(1, 10), repeat=3)]
        assert max(lengths) + 1 == program.most_tokens(1, 3, scratchpad)


@pytest.mark.parametrize("text, answer", [
    ("#7", 7), ("1+2:3;#3", 3), ("#007", 7), ("nonsense#12", 12), ("", -1), ("#", -1), ("12", -1), ("#1#1", -1),
    ("#1 ", -1), ("#-1", -1), ("#" + "9" * 19, -1),
])
def test_what_counts_as_an_answer(text, answer):
    assert program.answer_of(text) == answer


def some_problems(seed=3, digits=2, most=4, **counts):
    return program.Problems(seed, digits, most, **{**dict(test=10, verifier=15, val=8), **counts})


def test_the_splits_share_no_problem_in_any_order_of_its_terms():
    problems = some_problems()
    held = {split: [terms for k in (2, 3, 4) for terms in problems.of(split, k)] for split in program.SPLITS[:3]}
    assert {split: len(own) for split, own in held.items()} == dict(test=30, verifier=45, val=24)
    held["train"] = list(problems.for_training(5000))
    assert {len(terms) for terms in held["train"]} == {2, 3, 4}
    asked = {split: {tuple(sorted(terms)) for terms in own} for split, own in held.items()}
    assert all(len(asked[split]) == len(held[split]) for split in program.SPLITS[:3])
    for one, other in itertools.combinations(program.SPLITS, 2):
        assert not asked[one] & asked[other]
    # Such a test can fail: 5000 draws without the rule meet many of the few problems of two terms.
    free = program.Problems(3, 2, 4)
    assert {tuple(sorted(terms)) for terms in free.for_training(5000)} & asked["test"]


def test_problems_are_those_of_their_seed():
    one, same, other = some_problems(), some_problems(), some_problems(seed=4)
    assert one.held_out == same.held_out != other.held_out
    texts = [list(p.texts("train", p.for_training(50))) for p in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert {text[0] for text in texts[0]} == {"n", "s", "l"}
    assert one.rng("test", 2).random() != one.rng("test", 1).random() != one.rng("test", 2, 1, 1).random()


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_each_character_is_one_token_of_the_encoding(name):
    encoding = program.find_encoding(name, "x", "x", {"bytes": 257, "gpt2": 50257}[name])
    characters, text = program.Characters(encoding), "l12+34=12+34:2+4+0=06,1+3+0=04:46;#46?y"
    tokens = characters.encode(text)
    assert tokens.tolist() == [int(i) for character in text for i in encoding.encode(character)]
    assert len(tokens) == len(text) and len(set(tokens.tolist())) == len(set(text))
    assert characters.decode(tokens) == encoding.decode(tokens) == text
    assert characters.decode(np.array([encoding.encode("Z")[0], tokens[0]])) == " l"


def test_documents_lie_whole_in_the_rows_that_the_script_reads(tmp_path):
    texts = list(some_problems().texts("train", some_problems().for_training(40)))
    program.write_shard(tmp_path / "sums" / "x.bin", program.rows_of(map(BYTES.encode, texts), 128, BYTES.eot), BYTES)
    shards = script.TokenShards(str(tmp_path / "sums" / "x.bin"))
    assert shards.vocab_size == 257 and shards.total % 128 == 1
    rows = shards.read(0, shards.total - 1).reshape(-1, 128)
    assert (rows[:, 0] == BYTES.eot).all() and shards.read(shards.total - 1, 1) == BYTES.eot
    found = [BYTES.decode(np.array(part)) for row in rows.tolist()
             for is_end, part in itertools.groupby(row, lambda i: i == BYTES.eot) if not is_end]
    assert found == texts
    sizes = [1 + len(text) for text in texts]
    assert len(rows) <= 2 * sum(sizes) / 128 + 1


# ----------------------------------------------------------------------------------------------------------------------
# Votes


def multinomial(chances, n):
    """The chance that the first of the answers wins the vote of n, the last being no answer: over all counts, of which
    equal ones share (Wang et al. 2022's vote; ties by chance)."""
    total = 0
    for counts in itertools.product(range(n + 1), repeat=len(chances)):
        if sum(counts) == n and counts[0] == max(counts[:-1]) > 0:
            ways = math.factorial(n) / math.prod(math.factorial(c) for c in counts)
            total += ways * math.prod(p**c for p, c in zip(chances, counts)) / counts[:-1].count(counts[0])
    return total


@pytest.mark.parametrize("chances", [(0.4, 0.3, 0.2, 0.1), (0.3, 0.45, 0.25, 0), (0.2, 0.1, 0.05, 0.65)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_vote_of_a_known_distribution_is_the_multinomials(chances, n):
    """All sequences of n samples, each with its chance: a tie by what came first is one by chance."""
    answers = np.array(list(itertools.product([0, 1, 2, -1], repeat=n)))
    weight = np.prod(np.array(chances)[answers], axis=1)  # -1 is the last
    places = program.vote(answers, np.ones(answers.shape))
    wins = (answers[np.arange(len(answers)), places] == 0) & (places >= 0)
    assert weight @ wins == pytest.approx(multinomial(chances, n), abs=1e-12)


def test_ties_go_to_the_answer_that_came_first():
    ones = np.ones((5, 4))
    answers = np.array([[2, 1, 1, 2], [1, 2, 2, 1], [-1, 3, 0, -1], [-1, -1, -1, -1], [3, -1, -1, -1]])
    assert program.vote(answers, ones).tolist() == [0, 0, 1, -1, 0]
    weights = np.array([[0.3, 0.5, 0.1, 0.2]] * 5)
    assert program.vote(answers, weights).tolist() == [1, 1, 1, -1, 0]  # 0.5 to 0.6, 0.5 to 0.6, 0.5 to 0.1
    assert program.vote(answers[2:3], np.zeros((1, 4))).tolist() == [1]  # a weight of 0 is a vote still


def naive_vote(answers, weights):
    """The winning answer, by a loop; None where there is none."""
    totals = collections.defaultdict(float)  # in the order of first appearance, of which max() takes the first
    for answer, weight in zip(answers, weights):
        if answer >= 0:
            totals[answer] += weight
    return max(totals, key=totals.get) if totals else None


@pytest.mark.parametrize("weighted", [False, True])
def test_a_vote_of_subsets_is_the_mean_over_all_of_them(weighted):
    rng = np.random.default_rng(0)
    answers = rng.integers(-1, 3, (6, 5)) * 11
    answers[answers < 0] = -1
    right, weights = answers == 11, rng.random((6, 5)) if weighted else np.ones((6, 5))
    orders = np.array(list(itertools.permutations(range(5))))
    for n in range(1, 6):
        mean = [np.mean([naive_vote(own[order], weight[order]) == 11 for order in orders[:, :n]])
                for own, weight in zip(answers, weights)]
        assert program.vote_of(right, answers, weights, n, orders) == pytest.approx(mean)
        drawn = np.mean([program.vote_of(right, answers, weights, n, program.orders_of(5, rng)) for _ in range(300)], 0)
        assert drawn == pytest.approx(mean, abs=0.03)
    orders = program.orders_of(5, rng)
    assert (np.sort(orders, 1) == np.arange(5)).all()
    assert all(np.bincount(column).tolist() == [program.PERMUTATIONS] * 5 for column in orders.T)
    assert program.vote_of(right, answers, weights, 1, orders) == pytest.approx(right.mean(1), abs=1e-12)
    if not weighted:  # two samples either agree or tie
        assert program.vote_of(right, answers, weights, 2, orders).mean() == pytest.approx(
            np.mean([naive_vote(own[order[:2]], [1, 1]) == 11 for own in answers for order in orders]))


# ----------------------------------------------------------------------------------------------------------------------
# Verifiers, likelihoods, pass@n


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_best_of_and_pass_at_are_the_means_over_all_subsets(n):
    rng = np.random.default_rng(1)
    right, scores = rng.random((8, 6)) < 0.4, rng.integers(0, 4, (8, 6)) / 4  # with ties
    subsets = list(itertools.combinations(range(6), n))
    best = [np.mean([own[max(subset, key=lambda j: (score[j], -j))] for subset in subsets])
            for own, score in zip(right, scores)]
    assert program.best_of(right, scores, n) == pytest.approx(best)
    assert program.pass_at(right, n) == pytest.approx([np.mean([own[list(s)].any() for s in subsets]) for own in right])
    assert program.best_of(right, right.astype(float), n) == pytest.approx(program.pass_at(right, n))
    worst = [math.comb(own.sum(), n) / math.comb(6, n) for own in right]
    assert program.best_of(right, -right.astype(float), n) == pytest.approx(worst)


def test_the_best_of_two_follows_from_the_verifiers_auc():
    """c right of M with AUC a: of the pairs of a right and a wrong sample a verifier chooses the share a well."""
    rng, M = np.random.default_rng(2), 9
    right = rng.random((40, M)) < 0.5
    right[:, 0], right[:, 1] = True, False
    scores = rng.random((40, M)) + 0.5 * right
    for own, score, found in zip(right, scores, program.best_of(right, scores, 2)):
        c, a = own.sum(), program.auc(own[None], score[None])
        assert found == pytest.approx((math.comb(c, 2) + a * c * (M - c)) / math.comb(M, 2))


def test_the_auc_counts_pairs_of_one_problem_and_ties_half():
    right = np.array([[True, False, False], [True, True, False], [True, True, True], [False, False, False]])
    scores = np.array([[1, 1, 0], [5, 2, 5], [0, 1, 2], [9, 9, 9]])
    assert program.auc(right, scores) == pytest.approx(((0.5 + 1) / 2 + (0.5 + 0) / 2) / 2)
    assert program.auc(right[2:], scores[2:]) is None


@pytest.mark.parametrize("apart", [0.0, 1.0, 2.5])
def test_a_verifier_of_known_auc_has_the_accuracy_of_its_formula(apart):
    """Scores of right samples are normal around `apart`, of wrong ones around 0: the AUC is Phi(apart / sqrt(2)), and
    the best of two is right with chance p^2 + 2 p (1 - p) AUC."""
    rng, p = np.random.default_rng(3), 0.3
    right = rng.random((3000, 16)) < p
    scores = rng.normal(size=right.shape) + apart * right
    known = norm.cdf(apart / math.sqrt(2))
    assert program.auc(right, scores) == pytest.approx(known, abs=0.01)
    assert program.best_of(right, scores, 2).mean() == pytest.approx(p * p + 2 * p * (1 - p) * known, abs=0.01)


@pytest.mark.parametrize("sensitivity, false_alarms", [(0.9, 0.2), (0.5, 0.5), (1.0, 0.0), (0.3, 0.8)])
def test_a_verifier_that_accepts_or_not_has_the_accuracy_of_its_formula(sensitivity, false_alarms):
    """Of the samples, right with chance p, it accepts these shares, and the first accepted counts, else the first."""
    p, n = 0.35, 4
    kinds = [(1, 1, p * sensitivity), (1, 0, p * (1 - sensitivity)), (0, 1, (1 - p) * false_alarms),
             (0, 0, (1 - p) * (1 - false_alarms))]
    drawn = list(itertools.product(kinds, repeat=n))
    right, accepted, weight = (np.array([[kind[i] for kind in row] for row in drawn]) for i in range(3))
    found = weight.prod(1) @ program.best_of(right.astype(bool), accepted.astype(float), n)
    accepts = p * sensitivity + (1 - p) * false_alarms
    none = (1 - accepts) ** n
    formula = (1 - none) * p * sensitivity / accepts
    if none:
        formula += none * p * (1 - sensitivity) / (1 - accepts)
    assert found == pytest.approx(formula, abs=1e-12)


def test_a_sample_without_an_answer_is_never_preferred():
    right, answers = np.array([[False, True]]), np.array([[-1, 5]])
    likelihood, chance = np.array([[-0.1, -9.0]]), np.array([[0.9, 0.1]])
    for method in program.METHODS:
        found = program.expected(method, right, answers, likelihood, chance, 2, program.orders_of(2, np.random))
        assert found == 1, method
        found = program.expected(method, right, answers, likelihood, chance, 1, program.orders_of(2, np.random))
        assert found == 0.5, method


def test_intervals():
    for right, count in ((0, 7), (7, 7), (13, 40), (999, 1000)):
        known = binomtest(right, count).proportion_ci(method="wilson")
        assert program.measuring.wilson(right, count) == pytest.approx((known.low, known.high), abs=1e-6)
    values = (np.arange(400) < 120).astype(float)
    mean, low, high = program.bootstrap(400, np.random.default_rng(0))(values)
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert mean == 0.3 and (low, high) == pytest.approx((0.3 - spread, 0.3 + spread), abs=0.006)


# ----------------------------------------------------------------------------------------------------------------------
# Samples


EOT = 4


def fixed(logits):
    """A network whose next token does not depend on what it reads."""
    return lambda idx: logits.expand(len(idx), -1)


def test_samples_have_the_networks_distribution():
    shares = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    chances = torch.from_numpy(np.random.default_rng(0).random((4000, 6))).float()
    tokens, likelihood = program.draw_solutions(fixed(shares.log()), torch.zeros(4000, 2, dtype=torch.long), chances,
                                                1.0, EOT)
    assert np.bincount(tokens[:, 0], minlength=5) / 4000 == pytest.approx(shares.numpy(), abs=0.025)
    for row, found in zip(tokens[:200].tolist(), likelihood):
        own = row[: row.index(EOT) + 1] if EOT in row else row
        assert set(row[len(own) :]) <= {EOT}
        assert found == pytest.approx(np.mean([math.log(shares[i]) for i in own]), abs=1e-5)
    at_half = shares.numpy() ** 2 / (shares.numpy() ** 2).sum()
    tokens, _ = program.draw_solutions(fixed(shares.log()), torch.zeros(4000, 2, dtype=torch.long), chances, 0.5, EOT)
    assert np.bincount(tokens[:, 0], minlength=5) / 4000 == pytest.approx(at_half, abs=0.025)
    tokens, _ = program.draw_solutions(fixed(shares.log()), torch.zeros(2, 2, dtype=torch.long), -torch.ones(2, 3), 1.0,
                                       EOT)
    assert (tokens == 2).all()


@pytest.fixture
def network():
    torch.manual_seed(3)
    return script.GPT(small_config(vocab_size=257, document_mask=True, init_std=0.3)).eval()


def test_samples_are_the_same_in_any_batch_and_those_of_the_whole_model(network):
    idx = torch.tensor([[256, *BYTES.encode(f"n{i}+{i}=").tolist()] for i in range(10, 16)])
    chances = torch.from_numpy(np.random.default_rng(1).random((6, 7))).float()
    chances[0] = -1
    cache = program.Cache(network)
    tokens, likelihood = program.draw_solutions(cache, idx, chances, 0.8, 256)
    parts = [program.draw_solutions(cache, *pair, 0.8, 256) for pair in zip(idx.split(4), chances.split(4))]
    assert np.array_equal(tokens, np.concatenate([part[0] for part in parts]))
    plain = script.GPT(network.config).eval()
    plain.load_state_dict(network.state_dict())
    tokens = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        losses = plain(torch.cat([idx, tokens], 1))[0][:, idx.size(1) - 1 : -1].log_softmax(-1)
    assert torch.equal(losses[0].argmax(-1), tokens[0])  # the likeliest
    for row, each, found in zip(tokens.tolist(), losses, likelihood):
        count = row.index(256) + 1 if 256 in row else len(row)
        assert found == pytest.approx(float(each[range(count), row[:count]].mean()), abs=1e-4)


def test_a_verdict_does_not_depend_on_the_rows_beside_it(network):
    rows = [np.append(256, BYTES.encode(text)) for text in ("n1+2=#3?", "s10+2=10+2:12;#12?", "n5+5=#1?")]
    found = program.chances_of_right(network, rows, BYTES, 2)
    for row, chance in zip(rows, found):
        with torch.no_grad():
            both = network(torch.from_numpy(row.astype(np.int64))[None])[0][0, -1, [ord("y"), ord("n")]]
        assert chance == pytest.approx(float(both.softmax(0)[0]), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


COUNTS = ("--digits 2 --terms 3 --train_problems 2000 --test_problems 6 --samples 4 --verifier_problems 20 "
         "--verifier_samples 3 --verifier_steps 3 --sample_batch_size 40 --device cpu").split()
TRAINING = ("--batch_size 8 --sequence_length 128 --total_batch_size 1024 --num_iterations 6 --warmup_iters 2 "
            "--learning_rate 6e-3 --val_tokens 500 --precision fp32 --no_compile").split()
NETWORK = "--model tiny --n_layer 2 --n_head 2 --n_embd 32".split()


def flags(folder, *more):
    return [*COUNTS, "--output_dir", folder / "runs", "--results", folder / "found.jsonl", *more, "--",
            *NETWORK, *TRAINING]


def mostly_right(cache, idx, chances, temperature, eot):
    """In the place of a network that has learned: right where the first of its numbers is below 0.6, else wrong by one
    or two, or without an end."""
    tokens = torch.full(chances.shape, eot)
    for i, (row, chance) in enumerate(zip(idx.tolist(), chances[:, 0].tolist())):
        asked = BYTES.decode(np.array(row[1:]))
        terms = [int(term) for term in re.findall(r"\d+", asked)]
        total = sum(terms) + (chance >= 0.6) + (chance >= 0.8)
        text = BYTES.encode(f"#{total}") if chance < 0.95 else BYTES.encode("+" * chances.size(1))
        tokens[i, : len(text)] = torch.from_numpy(text.astype(np.int64))
    return tokens.numpy().astype(np.uint16), chances[:, 0].numpy().astype(float)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run to its end; its samples are not its network's, which has learned nothing in so few steps."""
    folder = tmp_path_factory.mktemp("test_time")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "draw_solutions", mostly_right)
        assert program.main(flags(folder)) == 0
    return folder


def test_a_run_records_what_its_samples_say(measured, capsys):
    found = program.measuring.read(measured / "found.jsonl")
    assert [r["scratchpad"] for r in found] == ["none", "short", "long"]
    for r in found:
        parts = [np.load(measured / "runs" / "seed1" / "samples" / f"test_{r['scratchpad']}_{k}.npz") for k in (2, 3)]
        numbers = np.concatenate([part["likelihood"] for part in parts])  # mostly_right's first numbers
        right = numbers[:, 1:] < 0.6
        assert r["greedy"]["terms"] == {"2": [6, 6], "3": [6, 6]}
        assert list(r["curves"]) == list(program.METHODS)
        for n in ("1", "2", "4"):
            each = {method: curve[n]["accuracy"][0] for method, curve in r["curves"].items()}
            subsets = list(itertools.combinations(range(4), int(n)))
            assert each["oracle"] == pytest.approx(np.mean([right[:, s].any(1) for s in subsets]))
            assert each["vote"] <= each["oracle"] + 1e-9 >= each["verifier"]
            if n == "1":
                assert set(np.round(list(each.values()), 12)) == {round(right.mean(), 12)}
            low, value, high = (r["curves"]["vote"][n]["accuracy"][i] for i in (1, 0, 2))
            assert low <= value <= high and r["curves"]["vote"][n]["gain"][0] == pytest.approx(value - 1)
        assert r["unanswered"] == (numbers[:, 1:] >= 0.95).mean()
        written = {k: [2 + len(re.findall(r"\d", str(sum(terms)))) for terms in problems_of(k)] for k in (2, 3)}
        asked = np.repeat([1 + 1 + 6, 1 + 1 + 9], 6)
        assert r["greedy"]["tokens"] == pytest.approx(np.mean(asked + np.array(written[2] + written[3])))
        vote, verifier = (r["curves"][method]["4"]["tokens"] for method in ("vote", "verifier"))
        assert verifier == pytest.approx(2 * vote + 3 * asked.mean())  # the problem read 1 + 4 times, not once
    assert program.main(["--table", "--results", measured / "found.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "cpu, torch" in out and "| none | vote |" in out and "a ceiling" in out


def problems_of(k):
    return program.Problems(1, 2, 3, test=6).of("test", k)


def text_of(shards):
    """What a pattern's shards of bytes hold, a space for each end-of-text token."""
    stream = script.TokenShards(str(shards))
    return bytes(ord(" ") if i == 256 else i for i in stream.read(0, stream.total).tolist()).decode()


def test_the_generators_shards_hold_no_problem_of_the_others(measured):
    shards = measured / "runs" / "seed1" / "sums"
    asked = {}
    for name in ("train", "val"):
        text = text_of(shards / f"{name}_000.bin")
        asked[name] = {tuple(sorted(map(int, problem.split("+")))) for problem in re.findall(r"[nsl]([\d+]+)=", text)}
    held = program.Problems(1, 2, 3, test=6, verifier=20, val=6).held_out
    assert len(asked["train"]) > 1000 and not asked["train"] & set(held)
    assert asked["val"] == {terms for terms, (split, _) in held.items() if split == "val"}


def test_the_verifier_learned_from_samples_of_no_test_problem(measured):
    shards = measured / "runs" / "seed1" / "verdicts"
    documents = text_of(shards / "*.bin").split()
    held = program.Problems(1, 2, 3, test=6, verifier=20, val=6).held_out
    for document in documents:
        asked, total, said = re.fullmatch(r"[nsl]([\d+]+)=#(\d+)\?([yn])", document).groups()
        terms = tuple(sorted(map(int, asked.split("+"))))
        assert held[terms][0] == "verifier" and (sum(terms) == int(total)) == (said == "y")
    assert 200 < len(documents) < 360  # of 360 samples a twentieth have no answer
    assert 0.4 < np.mean([document.endswith("y") for document in documents]) < 0.8


def test_a_run_goes_on_where_it_stopped_and_ends_the_same(measured, tmp_path, monkeypatch, capsys):
    """What is measured is not measured again; what is lost is made again as it was, the rest is left as it is."""
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    monkeypatch.setattr(program, "draw_solutions", mostly_right)
    before, starts, train = (folder / "found.jsonl").read_text(), [], script.main
    monkeypatch.setattr(program.script, "main", lambda argv: starts.append(argv) or 75)
    assert program.main(flags(folder)) == 0 and (folder / "found.jsonl").read_text() == before
    lines = before.splitlines(keepends=True)
    (folder / "found.jsonl").write_text(lines[0])
    seed = folder / "runs" / "seed1"
    (seed / "samples" / "test_short_3.npz").unlink()
    assert program.main(flags(folder)) == 0 and (folder / "found.jsonl").read_text() == before and not starts
    (folder / "found.jsonl").write_text("")
    for name in ("verifier", "verdicts", "samples"):
        shutil.rmtree(seed / name)
    with pytest.raises(SystemExit) as end:  # as when a signal stopped the second training
        program.main(flags(folder))
    assert end.value.code == 75 and len(starts) == 1 and "--init_from" in starts[0]
    assert capsys.readouterr().err == "stopped; the same command goes on where it was\n"  # behind the script's line
    monkeypatch.setattr(program.script, "main", train)
    assert program.main(flags(folder)) == 0 and (folder / "found.jsonl").read_text() == before


@pytest.mark.parametrize("typed, said", [
    ("--samples 0", "samples=0 must be from 1 to 1024"),
    ("--terms 1", "terms=1 must be from 2 to 20"),
    ("--seed -1", "seed=-1 must be from 0 to 2147483647"),
    ("--temperature 0", "temperature=0.0 must be from 0.01 to 100"),
    ("--digits 1 --terms 2", "test_problems=200 must be at most a tenth of the 45 that there are of 2 terms; lower it, "
     "or raise --digits"),
    ("--checkpoint none", "none holds no checkpoint; name a .pt file, a run's folder or a folder of runs"),
    ("-- --seed 2", "seed is set by this program; drop it from what stands behind --"),
    ("-- --sequence_length 256", "sequence_length=256 must be at least 273, a sample and its verdict; type more behind "
     "--, or lower --terms or --digits"),
    ("--verifier_steps 50", "the verifier's training, of --verifier_steps: warmup_iters=100 + warmdown_iters=0 must "
     "not exceed num_iterations=50; shorten them or train longer"),
    ("--digits x", "argument --digits: invalid int value: 'x'; --help lists the flags"),
    ("--results /dev/null/x", "results=/dev/null/x cannot be written (/dev/null is not writable here); name another"),
    ("--output_dir /proc", "output_dir=/proc cannot be written (/proc is not writable here); name another"),
    ("--results /proc/x/y", "results=/proc/x/y cannot be written (/proc is not writable here); name another"),
    ("--results /proc", "/proc cannot be used (Is a directory); mend it, or name another"),
    ("--output_dir /dev/null/x", "output_dir=/dev/null/x cannot be written (/dev/null is not writable here); name "
     "another"),
    ("-- --init_std 0.1", "the verifier's training, of --verifier_steps: init_std would be ignored: the weights come "
     "from the generator; drop it"),
    ("-- --num_iterations x", None), ("--sampels 3", None), ("-- --warmup_iters 2900 --warmdown_iters 200", None),
])
def test_what_cannot_be_is_one_line(tmp_path, capsys, typed, said):
    code = program.main(["--output_dir", tmp_path / "runs", "--results", tmp_path / "found.jsonl", *typed.split()])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "runs").exists()
    assert said is None or err == f"error: {said}\n"


def test_a_training_text_smaller_than_a_step_is_refused_before_anything_trains(measured, tmp_path, capsys, monkeypatch):
    total = script.TokenShards(str(measured / "runs" / "seed1" / "sums" / "train_000.bin")).total
    steps = (total - 1) // 1024
    monkeypatch.setattr(program.Study, "run", lambda self, results: None)
    many = flags(tmp_path, "--verifier_samples", 1000)
    assert program.main([*many, "--total_batch_size", 1024 * steps]) == 0
    assert program.main([*many, "--total_batch_size", 1024 * (steps + 1)]) == 2
    assert capsys.readouterr().err == (
        f"error: train_problems=2000 is too few: {total:,} tokens, and a step of the training needs "
        f"{1024 * (steps + 1) + 1:,}; raise --train_problems, or lower --total_batch_size behind --\n")
    assert program.main([*flags(tmp_path), "--total_batch_size", 1024 * steps]) == 2
    assert "error: verifier_problems=20 is too few: " in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_verifiers_text_smaller_than_a_step_is_refused(tmp_path, capsys, monkeypatch):
    """As it is where few samples have an answer."""
    def seldom_right(cache, idx, chances, *others):
        return mostly_right(cache, idx, chances.masked_fill(chances > 0.05, 1.0), *others)

    starts, train = [], script.main
    monkeypatch.setattr(program, "draw_solutions", seldom_right)
    monkeypatch.setattr(program.script, "main", lambda argv: starts.append(argv) or train(argv))
    assert program.main(flags(tmp_path)) == 2 and len(starts) == 1
    assert re.match(r"error: verifier_problems=20 is too few: \d+ samples have an answer, \d+ tokens, and a step of "
                    "the training needs 1,025; raise --verifier_problems, or lower --total_batch_size behind --\n",
                    capsys.readouterr().err)


def test_the_scripts_flags_are_checked_with_a_checkpoint_too(measured, tmp_path, capsys):
    generator = measured / "runs" / "seed1" / "generator"
    fixed = ["--checkpoint", generator, "--output_dir", tmp_path / "runs", "--device", "cpu", "--results",
             tmp_path / "found.jsonl", "--"]
    for flag, said in (
        ("--n_layer 3", "holds another network (n_layer 2, not 3); drop the flag, or start without --checkpoint"),
        ("--init_std 1", "init_std would be ignored: the weights come from --checkpoint; drop it"),
        ("--warmup_iters 4000", "warmup_iters=4000 + warmdown_iters=0 must not exceed"),
    ):
        assert program.main([*fixed, *flag.split()]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_who_reads_no_further_gets_no_traceback(measured):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        done = subprocess.run([sys.executable, PROGRAM, "--table", "--results", measured / "found.jsonl"], stdout=closed,
                              stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_job_that_is_ended_says_how_it_goes_on(monkeypatch, tmp_path, capsys):
    """Between the trainings, where the script has no hand on the signal."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(program.Study, "run", lambda self, results: signal.raise_signal(signal.SIGTERM))
    assert program.main(flags(tmp_path)) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_kill_cut_short_is_refused_and_stays(measured, tmp_path, capsys):
    whole = (measured / "found.jsonl").read_text()
    (tmp_path / "found.jsonl").write_text(whole[:-100])
    for more in ([], ["--table"]):
        assert program.main([*more, *flags(tmp_path)]) == 2
        said = f"error: {tmp_path}/found.jsonl has no whole record in line 3; delete that line, and the same command "
        assert capsys.readouterr().err == said + "measures it again\n"
    assert (tmp_path / "found.jsonl").read_text() == whole[:-100] and not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "seed1").mkdir(parents=True)
    (tmp_path / "runs" / "seed1" / "settings.json").write_text("{")
    (tmp_path / "found.jsonl").unlink()
    assert program.main(flags(tmp_path)) == 2
    said = f"error: {tmp_path}/runs/seed1/settings.json is damaged; name another --output_dir\n"
    assert capsys.readouterr().err == said


def test_a_folder_of_other_settings_is_refused(measured, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    assert program.main(flags(folder, "--temperature", "0.9")) == 2
    said = f"error: {folder}/runs/seed1 was begun with temperature=0.7; name another --output_dir\n"
    assert capsys.readouterr().err == said


def test_without_results_there_is_no_table(tmp_path, capsys):
    assert program.main(["--table", "--results", tmp_path / "found.jsonl"]) == 2
    assert capsys.readouterr().err == f"error: results={tmp_path}/found.jsonl holds nothing: not measured yet\n"


@pytest.mark.slow
def test_a_small_network_is_measured_from_its_own_samples(tmp_path):
    """Long enough that its samples have answers; then one that begins with its weights."""
    folder = tmp_path / "first"
    longer = ["--num_iterations", 200, "--total_batch_size", 2048]
    assert program.main([*flags(folder, "--train_problems", 20000, "--verifier_steps", 20), *longer]) == 0
    found = program.measuring.read(folder / "found.jsonl")
    assert len(found) == 3 and all(r["unanswered"] < 0.5 for r in found)
    argv = flags(tmp_path / "second", "--checkpoint", folder / "runs" / "seed1" / "generator")
    first = argv.index("--model")
    assert program.main(argv[:first] + argv[first + len(NETWORK) :]) == 0  # the network is the checkpoint's
    assert len(program.measuring.read(tmp_path / "second" / "found.jsonl")) == 3
