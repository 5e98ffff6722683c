"""Where a run's time goes: the last line of its log, and the trace of --profile."""
import gzip
import json
import re

import pytest
from launch import column, steps

import train_gpt2_mod as script


def breakdown(out):
    """(seconds of all, {what: seconds}, those on data) as the log says them."""
    line = r"^time: ([\d.]+) s = (.*); of the steps the host spent ([\d.]+) s on data$"
    (whole, parts, data), = re.findall(line, out, re.M)
    parts = {what: float(seconds) for what, seconds in re.findall(r"([a-z ]+?) ([\d.]+)(?: \+ |$)", parts)}
    return float(whole), parts, float(data)


def slow(monkeypatch, owner, name, seconds):
    plain = getattr(owner, name)

    def slowly(*args, **settings):
        script.time.sleep(seconds)
        return plain(*args, **settings)

    monkeypatch.setattr(owner, name, slowly)


@pytest.mark.parametrize("owner, name, seconds, what, least, most", [
    (script, "train_step", 0.2, "further steps", 1.0, 1.6), (script, "evaluate", 0.4, "validation", 0.8, 1.4),
    (script, "write_checkpoint", 0.6, "saving", 0.6, 1.8), (script, "parallelize", 0.6, "the rest", 0.6, 1.2),
])
def test_the_last_lines_say_where_the_time_went(trainer, monkeypatch, owner, name, seconds, what, least, most):
    """6 steps, validated twice, saved twice in the background: the end waits for the last one."""
    slow(monkeypatch, owner, name, seconds)
    whole, parts, _ = breakdown(trainer.run().out)
    assert list(parts) == ["first step", "further steps", "validation", "saving", "the rest"]
    assert least <= parts[what] <= most and parts[what] == max(parts.values())
    assert sum(parts.values()) == pytest.approx(whole, abs=0.3)  # each is rounded to a tenth


def test_seconds_spent_on_data_are_those_of_reading(trainer, monkeypatch):
    slow(monkeypatch, script.TokenShards, "read", 0.05)
    whole, parts, data = breakdown(trainer.run("--val_loss_every", 0, "--no_save_checkpoints").out)
    assert 0.3 <= data <= parts["first step"] + parts["further steps"] + 0.1 <= whole + 0.1


def test_a_profile_is_a_trace_of_three_steps_and_changes_no_loss(trainer):
    plain = trainer.run("--num_iterations", 16)
    result = trainer.run("--num_iterations", 16, "--profile")
    path = result.folder / "rank0.pt.trace.json.gz"
    assert f"\nprofile: {path} has 3 steps, for https://ui.perfetto.dev or TensorBoard\n" in result.out
    whole, parts, _ = breakdown(result.out)
    assert list(parts)[-2:] == ["profile", "the rest"] and parts["profile"] > 0
    assert sum(parts.values()) == pytest.approx(whole, abs=0.3)
    events = json.loads(gzip.open(path).read())["traceEvents"]
    names = [event.get("name") for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names if name) == script.PROFILED_STEPS
    assert names.count("Optimizer.step#AdamW.step") == names.count("HeadLossBackward") == script.PROFILED_STEPS
    assert {"aten::mm", "HeadLoss"} <= set(names)
    assert any("Input Dims" in event.get("args", {}) for event in events)
    for key in ("train_loss", "grad_norm"):
        assert column(steps(result.folder), key) == column(steps(plain.folder), key)
    assert not list(plain.folder.glob("*.gz"))


def test_a_profile_of_a_short_run_has_all_its_steps(trainer):
    few = ["--warmup_iters", 0, "--warmdown_iters", 0, "--profile", "--num_iterations"]
    path = trainer.run(*few, 5).folder / "rank0.pt.trace.json.gz"
    events = json.loads(gzip.open(path).read())["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in events) == script.PROFILED_STEPS
    refused = trainer.main(*trainer.flags(*few, 4))
    assert refused.code == 2
    assert refused.err.startswith("error: profile traces 3 steps after two others; num_iterations=4 must be at least 5")


def test_a_profile_that_cannot_be_written_ends_nothing(trainer, monkeypatch):
    plain = trainer.run("--num_iterations", 16)

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch.profiler.profile, "export_chrome_trace", full)
    result = trainer.run("--num_iterations", 16, "--profile")
    assert "rank0.pt.trace.json.gz cannot be written ([Errno 28] No space left on device); training goes on" in result.out
    assert column(steps(result.folder), "train_loss") == column(steps(plain.folder), "train_loss")


def test_steps_that_are_traced_count_in_no_speed(trainer, monkeypatch):
    """The three are slowed down, and so is the writing."""
    count, train_step = [0], script.train_step

    def slowly(*args):
        count[0] += 1
        script.time.sleep(0.5 if 12 <= count[0] <= 14 else 0)
        return train_step(*args)

    monkeypatch.setattr(script, "train_step", slowly)
    result = trainer.run("--num_iterations", 18, "--profile", "--val_loss_every", 0)
    rows = steps(result.folder)
    assert [row["step"] for row in rows if row["step_ms"] > 500] == [12, 13, 14]
    assert max(row["step_avg_ms"] for row in rows[10:]) < 300
    assert breakdown(result.out)[1]["profile"] >= 1.5


def test_a_profile_that_is_cut_short_says_so(trainer, monkeypatch):
    def stopped_at(number):
        count, train_step = [0], script.train_step

        def step(*args):
            count[0] += 1
            if count[0] == number:
                script.os.kill(script.os.getpid(), script.signal.SIGTERM)
                script.time.sleep(0.2)
            return train_step(*args)

        monkeypatch.setattr(script, "train_step", step)
        result = trainer.main(*trainer.flags("--num_iterations", 20, "--profile", "--val_loss_every", 0))
        monkeypatch.setattr(script, "train_step", train_step)
        assert result.code == 75 and "\ntime: " in result.out  # also of a run that is stopped
        return result.out

    assert "\nprofile: the run ended before the steps to trace; there is no trace\n" in stopped_at(4)
    assert "rank0.pt.trace.json.gz has 2 steps, for" in stopped_at(12)
