"""tools/compare.py: its verdicts are right as often as they say, its figures are those of the runs, and nothing is
trained twice."""
import fcntl
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launch import ROOT, SMALL, data_flags, records, runs_in, snapshot, steps, validations, write_data
from scipy import stats

import train_gpt2_mod as script

sys.path.insert(0, str(ROOT / "tools"))
import compare  # noqa: E402

SIMULATIONS = 2000


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def within(share, expected, count, sigmas=4.0):
    """Whether a share of so many trials is what it should be, to the binomial's error."""
    return abs(share - expected) <= sigmas * np.sqrt(expected * (1 - expected) / count)


def a_run(loss, curve=None, **changes):
    """A Run of that final loss; the curve falls to it."""
    curve = curve or [(10.0 * i, 100 * i, loss + 0.3 * (4 - i)) for i in range(1, 5)]
    fields = dict(folder="", settings=dict(script="", machine=""), commands=[], ending="finished", peak=1.0,
                  tokens_per_second=10.0, step_ms=100.0, seconds=curve[-1][0], tokens=curve[-1][1], curve=curve,
                  training=curve)
    return compare.Run(**{**fields, **changes})


def simulated(rng, seeds, difference, noise, shared=0.2):
    """{seed: (base, variant)} of runs whose losses have an effect of the seed in common, and each its own noise, so
    that differences spread by `noise`."""
    effects = 3 + shared * rng.standard_normal(seeds)
    own = noise / np.sqrt(2) * rng.standard_normal((seeds, 2))
    return {i: (a_run(effects[i] + own[i, 0]), a_run(effects[i] + difference + own[i, 1])) for i in range(seeds)}


@pytest.mark.parametrize("seeds, difference, noise, confidence", [
    (2, 0.0, 0.01, 0.95), (3, 0.0, 0.01, 0.95), (3, -0.02, 0.01, 0.95), (6, 0.005, 0.02, 0.95), (5, 0.0, 0.1, 0.8),
])
def test_the_interval_covers_and_chance_alone_gives_a_verdict_as_often_as_it_may(monkeypatch, seeds, difference, noise,
                                                                                   confidence):
    power = compare.power
    monkeypatch.setattr(compare, "power", lambda effect, *_: min(effect, 1.0))  # slow, and not what is tested here
    rng = np.random.default_rng(seeds)
    experiments = [simulated(rng, seeds, difference, noise) for _ in range(SIMULATIONS)]
    found = [compare.judge_runs(pairs, confidence) for pairs in experiments]
    losses = np.array([[(b.loss, v.loss) for b, v in pairs.values()] for pairs in experiments])
    reference = stats.ttest_rel(losses[..., 1], losses[..., 0], axis=1)
    intervals, verdicts = np.array([f["interval"] for f in found]), [f["verdict"].split()[0] for f in found]
    np.testing.assert_allclose(intervals, np.transpose(reference.confidence_interval(confidence)), atol=1e-12)
    words = np.where(reference.pvalue >= 1 - confidence, "not", np.where(reference.statistic < 0, "better", "worse"))
    assert verdicts == words.tolist()
    covered = (intervals[:, 0] <= difference) & (difference <= intervals[:, 1])
    assert within(covered.mean(), confidence, SIMULATIONS)
    if difference == 0:  # each of the two wrong verdicts, half as often as both together may come
        for wrong in ("better", "worse"):
            assert within(verdicts.count(wrong) / SIMULATIONS, (1 - confidence) / 2, SIMULATIONS)
    else:
        expected = power(abs(difference) / noise, seeds, confidence)
        right = verdicts.count("better" if difference < 0 else "worse")
        assert within(right / SIMULATIONS, expected, SIMULATIONS)


def tells(rng, effect, seeds, confidence, count=40_000):
    """The share of simulated experiments in which scipy's paired test tells a difference."""
    differences = effect + rng.standard_normal((count, seeds))
    return np.mean(stats.ttest_rel(differences, np.zeros_like(differences), axis=1).pvalue < 1 - confidence)


@pytest.mark.parametrize("effect, confidence", [(0.4, 0.95), (1.0, 0.95), (2.5, 0.95), (0.7, 0.9), (1.5, 0.99)])
def test_the_seeds_recommended_have_the_power_and_one_fewer_has_not(effect, confidence):
    rng, seeds = np.random.default_rng(0), compare.seeds_needed(effect, confidence)
    assert tells(rng, effect, seeds, confidence) >= compare.POWER - 0.01
    assert seeds == 2 or tells(rng, effect, seeds - 1, confidence) <= compare.POWER + 0.01


@pytest.mark.parametrize("seeds, confidence", [(2, 0.95), (3, 0.95), (10, 0.95), (4, 0.5), (3, 0.999), (200, 0.9)])
def test_the_smallest_difference_is_told_with_the_power(seeds, confidence):
    differences = np.random.default_rng(1).standard_normal(seeds)
    found = compare.judge(differences.tolist(), confidence)
    effect = found["smallest_difference"] / np.std(differences, ddof=1)
    assert within(tells(np.random.default_rng(2), effect, seeds, confidence), compare.POWER, 40_000)


def test_power_is_that_of_the_noncentral_t():
    """Where scipy's noncentral t has a value: for large effects it has gaps."""
    for effect in (0.0, 0.1, 0.5, 1.0, 3.0):
        for seeds in (2, 3, 5, 10, 40):
            critical, shift = stats.t.ppf(0.975, seeds - 1), effect * np.sqrt(seeds)
            tails = stats.nct.sf(critical, seeds - 1, shift), stats.nct.cdf(-critical, seeds - 1, shift)
            expected = tails[0] + np.nan_to_num(tails[1])
            assert compare.power(effect, seeds, 0.95) == pytest.approx(expected, abs=1e-6)
    assert compare.power(1e200, 3, 0.95) == 1.0 and compare.seeds_needed(1e9, 0.95) == 2
    assert compare.seeds_needed(0.0, 0.95) is None and compare.seeds_needed(1e-3, 0.95) is None


def test_the_seeds_recommended_do_tell_a_difference_like_the_one_seen():
    """By compare's own verdicts, from one experiment to the next."""
    found = compare.judge([0.01, 0.03, 0.0, 0.04], 0.95)
    assert found["verdict"] == "not distinguishable at this number of seeds"
    rng, n = np.random.default_rng(3), found["seeds_needed"]
    verdicts = [compare.judge((found["mean"] + found["sd"] * rng.standard_normal(n)).tolist(), 0.95)["verdict"]
                for _ in range(400)]
    assert within(verdicts.count("worse") / 400, compare.power(found["mean"] / found["sd"], n, 0.95), 400)
    said = " ".join(compare.in_words("loss", found, 0.95))
    assert f"takes {n} seeds" in said and "+0.0200" in said and "95% interval" in said


@pytest.mark.parametrize("differences, verdict", [
    ([], "no verdict: an interval takes two"), ([-0.5], "no verdict: an interval takes two"),
    ([0.0, 0.0, 0.0], "not distinguishable: the losses are the same"), ([-0.25, -0.25], "no verdict: each seed gave"),
])
def test_there_is_no_interval_without_a_spread(differences, verdict):
    found = compare.judge(differences, 0.95)
    assert found["verdict"].startswith(verdict)
    assert found["interval"] is found["seeds_needed"] is found["smallest_difference"] is None
    line, = compare.in_words("loss", found, 0.95)
    assert verdict in line and ("nats" in line) == bool(differences)


def test_a_run_that_diverged_is_worse_and_a_base_that_did_gives_no_verdict():
    fine, better, gone = a_run(3.0), a_run(2.9), a_run(9.0, ending="diverged")
    pairs = {1: (fine, better), 2: (a_run(3.1), a_run(2.99)), 3: (a_run(3.05), a_run(2.94))}
    assert compare.judge_runs(pairs, 0.95)["verdict"] == "better"
    found = compare.judge_runs(pairs | {4: (fine, gone)}, 0.95)
    assert found["verdict"] == "worse: it diverged with seed 4" and found["seeds"] == 3
    for pair in ((gone, better), (gone, gone)):
        found = compare.judge_runs(pairs | {4: pair, 5: (fine, gone)}, 0.95)
        assert found["verdict"].startswith("no verdict: the base diverged with seed 4;")


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def write_run(folder, step_ms, losses, sessions=("",), end="training took 1 s\n", tokens=1000, every=2, **settings):
    """A run's folder by hand: a step for each of step_ms, a validation after every second."""
    folder.mkdir(parents=True)
    network, run = dict(n_layer=2, vocab_size=257), dict(seed=1, val_tokens=5, output_dir=str(folder), **settings)
    (folder / "config.json").write_text(json.dumps(dict(network=network, run=run)))
    lines, passed, losses = [], 0.0, iter(losses)
    for i, ms in enumerate(step_ms, 1):
        passed += ms
        common = dict(step=i, tokens=tokens * i, time=passed)
        lines.append(dict(common, train_loss=9.0 / i, step_ms=ms, step_avg_ms=100.0, peak_mem_MB=50 + i % 3,
                          tokens_per_second=tokens * 10.0))
        lines += [dict(common, val_loss=next(losses))] if i % every == 0 else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = "the source: lower --learning_rate, training took\n" + "-" * 100
    log += "".join(f"\nrun {folder.name}: train --seed 1\npython 3, torch 2; 1 process on cpu\n{s}" for s in sessions)
    (folder / f"{folder.name}.log").write_text(log + f"\n{end}")
    return folder


def test_the_figures_are_those_computed_by_hand(tmp_path):
    """Base: steps of 100 ms after a first one of 5,100. Variant: 200 ms, resumed once, with 3,000 ms to compile."""
    a = write_run(tmp_path / "a", [5100] + [100] * 7, [4.0, 3.6, 3.2, 3.0])
    b = write_run(tmp_path / "b", [300, 200, 200, 200, 3100, 200, 200, 200], [3.9, 3.4, 3.1, 2.9], ["", "\n".join([
        "resumed logs/x.pt at step 4", "resumed: nothing"])])
    arms = {"a": [compare.read_run(a)], "b": [compare.read_run(b)]}
    base, variant = arms["a"][0], arms["b"][0]
    assert base.curve == [(pytest.approx(t), n, loss) for t, n, loss in [
        (0.2, 2000, 4.0), (0.4, 4000, 3.6), (0.6, 6000, 3.2), (0.8, 8000, 3.0)]]
    # The first steps of its two processes are taken for steps of step_avg_ms = 100.
    assert [point[0] for point in variant.curve] == pytest.approx([0.3, 0.7, 1.0, 1.4])
    assert len(variant.commands) == 2 and variant.settings["machine"] == "python 3, torch 2; 1 process on cpu"
    assert compare.default_target(arms) == 3.0
    found = compare.figures(arms, 3.0)
    assert found["a"] == pytest.approx(dict(
        peak=52, tokens_per_second=10000, step_ms=100, loss=3.0, seconds=0.8, tokens=8000, target_tokens=8000,
        target_seconds=0.8, equal_seconds_loss=3.0))
    assert found["b"] == pytest.approx(dict(
        peak=52, tokens_per_second=10000, step_ms=100, loss=2.9, seconds=1.4, tokens=8000, target_tokens=7000,
        target_seconds=1.2, equal_seconds_loss=3.4 - 0.3 * (0.8 - 0.7) / 0.3))
    rows = [re.split(r" *\| *", line.strip("| ")) for line in compare.before_and_after(found, 3.0) if line]
    assert rows[0] == ["a", "b", "change"] and len(rows) == 2 + len(compare.ROWS)
    assert ["tokens to loss 3.0000", "8,000", "7,000", "-12.5%"] in rows
    assert ["final validation loss", "3.0000", "2.9000", "-3.3%"] in rows
    assert ["training seconds", "0.8", "1.4", "+75.0%"] in rows
    assert compare.notes(arms, 3.0) == []


def test_of_several_seeds_the_table_has_means_and_each_pair_its_own_equal_seconds():
    base = [a_run(3.0), a_run(3.2, [(5.0, 100, 4.0), (25.0, 400, 3.2)])]
    variant = [a_run(2.8, [(10.0, 100, 3.8), (50.0, 400, 2.8)]), a_run(3.1, [(10.0, 100, 4.1), (20.0, 400, 3.1)])]
    found = compare.figures(dict(base=base, variant=variant), 3.5)
    assert found["variant"]["loss"] == pytest.approx((2.8 + 3.1) / 2)
    assert found["variant"]["equal_seconds_loss"] == pytest.approx((3.8 - 30 / 40 + 3.1) / 2)
    assert found["base"]["equal_seconds_loss"] == pytest.approx((3.0 + 4.0 - 0.8 * 15 / 20) / 2)
    assert found["base"]["target_seconds"] == pytest.approx((20 + 10 / 3 + 5 + 20 * 0.5 / 0.8) / 2)
    assert compare.figures(dict(base=base, variant=variant), 3.05)["base"]["target_tokens"] is None  # one never is


def test_a_loss_before_the_first_validation_is_not_known():
    slow, fast = a_run(3.0, [(10.0, 100, 3.0)]), a_run(2.9, [(4.0, 100, 2.9)])
    assert compare.at_equal_seconds([slow, fast]) == [None, 2.9]
    assert compare.at_equal_seconds([slow, a_run(1.0, ending="diverged")]) == [None, None]
    assert compare.figures(dict(a=[slow], b=[fast]), 3.0)["b"]["target_tokens"] == 100  # at most: a note says so
    assert "before its first validation" in compare.notes(dict(a=[slow], b=[fast]), 3.0)[0]


def tell(capsys, *words):
    """(exit code, stdout, stderr)"""
    code = compare.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_folders_are_compared_and_what_differs_is_said(tmp_path, capsys):
    write_run(tmp_path / "logs" / "20250101", [100] * 4, [5.0, 4.9])
    a = write_run(tmp_path / "logs" / "20260101", [200] + [100] * 3, [4.0, 3.0], mlp="gelu")
    b = write_run(tmp_path / "b", [100] * 8, [4.0, 3.0, 2.5, 2.2], mlp="relu2", end="killed\n")
    end = "error: the loss is nan: lower --learning_rate\n"
    c = write_run(tmp_path / "c", [100] * 4, [4.0, 3.5], mlp="gelu", end=end)
    with open(b / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "tok')  # a crash
    code, out, err = tell(capsys, tmp_path / "logs", b, c, "--target", 2.75)
    assert code == 0 and err == ""
    assert re.search(r"final validation loss *\| 3\.0000 *\| 2\.2000 *\| -26\.7% *\| - *\| - ", out)
    assert re.search(r"tokens to loss 2\.7500 *\| - *\| 5,000 *\| - ", out)
    assert re.search(r"\| mlp *\| gelu *\| relu2 *\| gelu *\|", out) and "n_layer" not in out
    assert f"{b}: unfinished" in out and f"{c}: diverged" in out and "different lengths" in out and str(a) not in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "logs"]  # nothing is written unless asked
    code, out, _ = tell(capsys, a, b, "--output", tmp_path / "out")
    page = (tmp_path / "out" / "compare.md").read_text()
    assert code == 0 and all(line in page for line in out.splitlines()[:-1]) and "train --seed 1" in page
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["figures"][str(b)]["loss"] == 2.2 and content["target"] == 3.0
    from matplotlib import image

    assert image.imread(tmp_path / "out" / "compare.png")[..., :3].std() > 0.01  # it is drawn on


def test_a_damaged_record_is_passed_over(tmp_path):
    a = write_run(tmp_path / "a", [100] * 4, [4.0, 3.0])
    whole = compare.read_run(a)
    wrong = dict(step=5, tokens=1, time=1.0, train_loss=1.0, step_ms=1, step_avg_ms=None, peak_mem_MB=1,
                 tokens_per_second="fast")
    with open(a / "metrics.jsonl", "a") as file:
        file.write("5\nnull\n[1, 2]\n" + "[" * 100_000 + '\n{"step": 6, "val_loss": null, "tokens": 1, "time": 1}\n'
                   f'{{"step": 6, "val_loss": NaN, "tokens": 1, "time": 1}}\n{json.dumps(wrong)}\n')
    assert compare.read_run(a) == whole


def test_the_log_is_the_one_of_the_folders_name(tmp_path, capsys):
    """One beside it says nothing; without any nothing is known of machine and script, and so nothing is said to differ."""
    a, b = (write_run(tmp_path / name, [100] * 4, [4.0, 3.0]) for name in "ab")
    (a / "0.log").write_text("n\n")
    assert compare.read_run(a).ending == "finished"
    (b / "b.log").unlink()
    code, out, err = tell(capsys, a, b)
    assert code == 0 and f"{b}: without a log" in out and "not all runs" not in out


def test_the_newest_run_is_one_that_has_trained(tmp_path):
    a = write_run(tmp_path / "logs" / "2026", [100] * 4, [4.0, 3.0])
    (tmp_path / "logs" / "2027").mkdir()
    (tmp_path / "logs" / "2027" / "metrics.jsonl").touch()
    assert compare.newest_run(tmp_path / "logs") == a


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


@pytest.fixture
def pairs(tmp_path, monkeypatch, capsys):
    """compare.py on small runs, which train in this process; .launched has the command of each."""
    class Pairs:
        data, output, launched = write_data(tmp_path / "data"), tmp_path / "out", []

        def command(self, *words, both=()):
            return [*words, "--output", self.output, "--", *SMALL, *data_flags(self.data), *both]

        def tell(self, *words, both=()):
            return tell(capsys, *self.command(*words, both=both))

        def runs(self):
            return {place.name: runs_in(place) for place in runs_in(self.output)}

    def launch(command, console, lock):
        Pairs.launched.append([str(word) for word in command])
        code = script.main(Pairs.launched[-1][2:])
        console.write_text(capsys.readouterr().err)
        return code

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compare, "launch", launch)
    return Pairs()


def test_pairs_train_once_each_go_on_and_give_the_runs_own_numbers(pairs):
    words = ["--base", "--mlp gelu", "--variant", "--mlp=relu2"]
    code, out, err = pairs.tell(*words, "--seeds", 1)
    assert code == 0 and err == "" and "no verdict: an interval takes two seeds" in out and len(pairs.launched) == 2
    first = pairs.runs()
    assert {name: len(runs) for name, runs in first.items()} == dict(base_seed1337=1, variant_seed1337=1)
    # What a kill after the checkpoint of step 3 leaves: the end is not there yet.
    folder, = first["variant_seed1337"]
    whole = records(folder)
    (folder / "step000006.pt").unlink()
    log = folder / f"{folder.name}.log"
    log.write_text(log.read_text().replace("\ntraining took ", "\n"))
    base = snapshot(pairs.output / "base_seed1337")

    code, out, err = pairs.tell(*words)
    assert code == 0 and err == "" and len(pairs.launched) == 2 + 1 + 4  # three seeds are the default
    assert snapshot(pairs.output / "base_seed1337") == base
    assert all(len(runs) == 1 for runs in pairs.runs().values()) and len(pairs.runs()) == 6
    assert f"resumed {folder.resolve()}/step000003.pt at step 3" in log.read_text()
    resumed = records(folder)
    assert [[r.get(k) for k in ("step", "train_loss", "val_loss")] for r in resumed] == [
        [r.get(k) for k in ("step", "train_loss", "val_loss")] for r in whole]

    content = json.loads((pairs.output / "compare.json").read_text())
    differences = []
    for run, (name, [its]) in zip(content["runs"], sorted(pairs.runs().items())):
        last = steps(its)[-1]
        assert name == f"{run['arm']}_seed{run['settings']['seed']}" and run["loss"] == validations(its)[-1]["val_loss"]
        assert [run[k] for k in ("step_ms", "tokens_per_second", "tokens")] == [
            last[k] for k in ("step_avg_ms", "tokens_per_second", "tokens")]
        assert run["settings"]["mlp"] == dict(base="gelu", variant="relu2")[run["arm"]]
    losses = {(run["arm"], run["settings"]["seed"]): run["loss"] for run in content["runs"]}
    base, variant = ([losses[arm, seed] for seed in (1337, 1338, 1339)] for arm in ("base", "variant"))
    interval = stats.ttest_rel(variant, base).confidence_interval(0.95)
    assert content["final_loss"]["interval"] == pytest.approx(list(interval))
    assert content["figures"]["variant"]["loss"] == pytest.approx(np.mean(variant))
    page = (pairs.output / "compare.md").read_text()
    for b, v in zip(base, variant):
        assert re.search(rf"\| {b:.4f} *\| {v:.4f} *\| {v - b:+.4f} ", page) and f"{v - b:+.4f}" in out
    assert content["final_loss"]["verdict"] in page and (pairs.output / "compare.png").stat().st_size > 10_000

    everything = {name: bytes for name, bytes in snapshot(pairs.output).items() if "seed" in name}
    code, out, err = pairs.tell(*words, both=["--mlp", "swiglu"])  # which both of them overrule
    assert code == 0 and err == "" and len(pairs.launched) == 7
    assert {name: bytes for name, bytes in snapshot(pairs.output).items() if "seed" in name} == everything
    code, out, err = pairs.tell(*words, both=["--learning_rate", "1e-3"])
    assert code == 2 and "holds runs of other flags" in err and err.count("\n") == 1 and len(pairs.launched) == 7


def test_a_variant_that_diverges_is_worse_and_not_trained_again(pairs):
    words = ["--base", "", "--variant", "--learning_rate 1e30 --warmup_iters 0 --nan_policy stop", "--seeds", 2]
    for _ in range(2):
        code, out, err = pairs.tell(*words)
        assert code == 0 and err == "" and "worse: it diverged with seed 1337, 1338" in out
        assert re.search(r"\| 1338 *\| \d\.\d{4} *\| diverged *\| -", out)
    assert len(pairs.launched) == 4 and (pairs.output / "compare.png").exists()


def test_a_run_that_fails_is_named_and_the_next_call_goes_on(pairs, monkeypatch):
    words = ["--base", "", "--variant", "--qk_norm", "--seeds", 1]
    train = script.train

    def train_and_fail(*arguments):
        train(*arguments)
        raise script.LostError("another process of the run did not answer")

    monkeypatch.setattr(script, "train", train_and_fail)
    code, out, err = pairs.tell(*words)
    assert code == 2 and re.fullmatch(r"error: base, seed 1337: exit code 1, another process .* the same command goes "
                                      r"on\n", err)
    monkeypatch.setattr(script, "train", train)
    code, out, err = pairs.tell(*words)
    assert code == 0 and err == ""
    assert [len(runs) for runs in pairs.runs().values()] == [1, 1] and len(pairs.launched) == 3


def test_the_folder_is_named_by_what_the_flags_mean(pairs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    common = [*SMALL, *data_flags(pairs.data)]

    class Begun(Exception):
        pass

    def launch(command, console, lock):
        raise Begun(command, console)

    monkeypatch.setattr(compare, "launch", launch)

    def place(*words, common=common):
        with pytest.raises(Begun) as caught:
            compare.main([*words, "--", *common])
        command, console = caught.value.args
        assert command[-1] == "auto" and str(console.parent) in command and "1337" in command
        return console.parent.parent.name, [str(word) for word in command]

    one, _ = place("--base", "", "--variant", "--qk_norm")
    assert one.startswith("compare-") and place("--variant", "--qk-norm", "--base=", "--seeds", "7")[0] == one
    assert place("--base", "", "--variant", "--qk_norm", common=[*common[2:], *common[:2]])[0] == one
    two, command = place("--base", "", "--variant", "--qk_norm", "--processes", "2")
    assert two != one and "--nproc_per_node=2" in command and "torch.distributed.run" in command
    assert place("--base", "", "--variant", "--qk_norm", common=[*common, "--weight_decay", "0"])[0] not in (one, two)


@pytest.mark.slow
def test_an_interruption_lets_the_run_save_and_the_same_command_goes_on(tmp_path, capsys):
    """In processes of their own: Ctrl-C, then to the end."""
    data, output = write_data(tmp_path / "data"), tmp_path / "out"
    words = ["--base", "", "--variant", "--qk_norm", "--seeds", "1", "--output", output, "--", *SMALL,
             *data_flags(data), "--num_iterations", "120", "--val_loss_every", "0"]
    command = [sys.executable, ROOT / "tools" / "compare.py", *words]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        end = time.monotonic() + 100
        while not (found := [p for p in output.glob("*/*/metrics.jsonl") if p.read_text().count("\n") > 3]):
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=100)
    assert child.returncode == 130 and err == "interrupted; the same command goes on where it stopped\n"
    folder = found[0].parent
    step = steps(folder)[-1]["step"]
    assert [p.name for p in folder.glob("*.pt")] == [f"step{step:06d}.pt"]  # it was told, and saved
    assert "--resume auto goes on" in (output / "base_seed1337" / "console.txt").read_text()

    with open(output / "settings.json") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, out, err = tell(capsys, *words)
    assert code == 2 and out == "" and "in use by another compare.py" in err and err.count("\n") == 1
    code, out, err = tell(capsys, *words)
    assert code == 0 and err == "" and [len(runs_in(place)) for place in runs_in(output)] == [1, 1]
    assert f"step{step:06d}.pt at step {step}" in (folder / f"{folder.name}.log").read_text()
    assert [r["step"] for r in steps(folder)] == list(range(1, 121))
    assert f"{validations(folder)[-1]['val_loss']:.4f}" in out


# ----------------------------------------------------------------------------------------------------------------------
# Bad input

PAIR = ["--base", "", "--variant", "--qk_norm"]


@pytest.mark.parametrize("words, part", [
    ([], "name two runs, or type --base and --variant"), (["nowhere", "nothing"], "nowhere has no run"),
    (["--base", "--model d12"], "type --base and --variant"), (["x", "y", *PAIR], "not both"),
    (["x", "y", "--", "--model", "d12"], "not both"), ([*PAIR, "--seeds", "0"], "at least 1"),
    ([*PAIR, "--seeds", "x"], "--seeds"), ([*PAIR, "--processes", "0"], "at least 1"),
    (["--base", "", "--variant"], "--variant needs a value"), (["x", "y", "--seeds", "5"], "seeds=5 would be ignored"),
    ([*PAIR, "--confidence", "95"], "confidence=95.0 must be between 0 and 1"),
    ([*PAIR, "--target", "-1"], "target=-1.0"), ([*PAIR, "--target", "nan"], "target=nan"),
    ([*PAIR, "--shuffle"], "--shuffle is no flag of compare.py; those of both runs stand after --"),
    (["--base", "", "--variant", "--mlp 'relu2"], "close the quotes"), ([*PAIR, "--base", ""], "same configuration"),
])
def test_a_wrong_command_line_is_one_line(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "same" in part:
        words = ["--base", "--qk_norm", "--variant", "--qk-norm", "--", *SMALL, *data_flags(write_data(tmp_path / "d"))]
    code, out, err = tell(capsys, *words)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("variant, both, part", [
    ("--mlpp relu2", [], "variant: --mlpp is not a flag; did you mean --mlp?"),
    ("--mlp relu3", [], "variant: mlp=relu3"),
    ("--model tinny", [], "variant: model=tinny"), ("--n_head 3", [], "variant: n_embd=32"),
    ("--qk_norm", ["--help"], "base: --help of the script is"),
    ("--seed 3", [], "variant: --seed cannot be typed"), ("", ["--output_dir", "x"], "base: --output_dir cannot"),
    ("--qk_norm", ["--resume", "auto"], "base: --resume cannot"), ("", [], "the same configuration"),
    ("--model mini --n_layer 2 --n_head 2 --n_embd 32", [], "the same configuration"),
    ("--val_tokens 10", [], "differ in val_tokens"), ("--qk_norm", ["--target_val_loss", "3"], "--target_val_loss"),
    ("--qk_norm", ["--input_val_bin", ""], "base: input_val_bin is empty"),
    ("--qk_norm", ["--input_val_bin", "none*.bin"], "no file matches"),
    ("--input_bin none.bin", [], "variant: no file matches"),
    ("--total_batch_size 65", [], "variant: total_batch_size"),
    ("--qk_norm", ["--init_from", "x.pt"], "with --init_from alone; add --shuffle"),
])
def test_wrong_flags_are_found_before_anything_runs(pairs, variant, both, part):
    code, out, err = pairs.tell("--base", "", "--variant", variant, both=both)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
    assert not pairs.launched and not pairs.output.exists()


def test_other_shards_under_the_same_names_are_other_runs(pairs, capsys):
    words = ["--base", "", "--variant", "--qk_norm", "--seeds", 1]
    assert pairs.tell(*words)[0] == 0 and len(pairs.launched) == 2
    path = pairs.data / "val_000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:1024] + data[1024:][::-1])
    code, out, err = pairs.tell(*words)
    assert code == 2 and "holds runs of other flags or shards" in err and len(pairs.launched) == 2
    runs = [run for place in pairs.runs().values() for run in place]
    code, out, err = tell(capsys, *runs, "--output", pairs.output)
    assert code == 2 and "holds a comparison of pairs; name another --output" in err
    code, out, err = tell(capsys, *runs, "--output", path)
    assert code == 2 and f"{path} is a file; name a folder" in err


def test_what_changes_no_loss_pays_for_no_time(pairs):
    code, out, err = pairs.tell("--base", "", "--variant", "--log_every 3", "--seeds", 2)
    assert code == 0 and out.count("not distinguishable: the losses are the same") == 2  # at equal tokens, and at equal seconds


def test_folders_that_cannot_be_compared_are_one_line(tmp_path, capsys, pairs):
    a = write_run(tmp_path / "a", [100] * 4, [4.0, 3.0])
    b = write_run(tmp_path / "b", [100], [])
    c = write_run(tmp_path / "c", [100] * 4, [4.0, 3.0])
    (c / "config.json").write_text("{")
    d = write_run(tmp_path / "d", [], [])
    (d / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n')  # another program's
    for words, part in [((a, b), "has no validation"), ((a, a), "each once"), ((a,), "at least two runs"),
                        ((a, c), "config.json cannot be read"), ((a, d), "no finished step"),
                        ((a, tmp_path / "x"), "has no run")]:
        code, out, err = tell(capsys, *words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
    pairs.output.mkdir()
    (pairs.output / "mine").mkdir()
    code, out, err = pairs.tell("--base", "", "--variant", "--qk_norm")
    assert code == 2 and "holds other things; name another --output" in err and not pairs.launched
    assert [path.name for path in pairs.output.iterdir()] == ["mine"]


def test_a_package_that_is_missing_is_named(monkeypatch, capsys, tmp_path):
    a, b = (write_run(tmp_path / name, [100] * 4, [4.0, 3.0]) for name in "ab")
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert tell(capsys, a, b)[0] == 0
    for words, part in (((a, b, "--output", tmp_path), "matplotlib"), (PAIR, "scipy matplotlib")):
        code, _, err = tell(capsys, *words)
        assert code == 2 and f"pip install {part}" in err


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(["--help"])
    assert ended.value.code == 0 and "--confidence" in capsys.readouterr().out
