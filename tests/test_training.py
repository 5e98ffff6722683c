"""Schedule, optimizer, numerics, the training step, evaluation and the meter against slow references."""
import contextlib
import copy
import gc
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (CPU, FakeWorld, LateMeter, batch_of, naive_cross_entropy, random_tokens, read_slowly, small_config,
                     small_run, write_shards)
from launch import assert_same
from torch import nn

import train_gpt2_mod as script


def naive_lr(step, run):
    """Warm-up's step s of W, from 0, has (s + 1)/W; the last D steps have D/D, ..., 2/D, 1/D."""
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / run.warmup_iters
    if step >= run.num_iterations - run.warmdown_iters:
        return run.learning_rate * (run.num_iterations - step) / run.warmdown_iters
    return run.learning_rate


@pytest.mark.parametrize("warmup, warmdown", [(0, 0), (4, 0), (0, 5), (4, 5), (10, 10), (20, 0), (0, 20), (1, 1)])
def test_the_learning_rate_warms_up_stays_and_warms_down(warmup, warmdown):
    run = small_run(num_iterations=20, warmup_iters=warmup, warmdown_iters=warmdown, learning_rate=3.0)
    rates = [script.plan(step, small_config(), run).lr for step in range(20)]
    assert rates == pytest.approx([naive_lr(step, run) for step in range(20)], rel=1e-12)
    assert all(0 < rate <= 3.0 for rate in rates) and max(rates) == 3.0


def test_beyond_its_end_the_schedule_stays():
    for warmdown, last in ((0, 1.0), (5, 0.0)):
        run = small_run(num_iterations=20, warmdown_iters=warmdown, learning_rate=1.0)
        assert [script.plan(step, small_config(), run).lr for step in (20, 21, 30)] == [last] * 3


def test_the_ends_of_the_schedule():
    run = small_run(num_iterations=100, warmup_iters=10, warmdown_iters=20, learning_rate=1.0)
    at = {step: script.plan(step, small_config(), run).lr for step in (0, 8, 9, 10, 79, 80, 81, 98, 99)}
    assert at == pytest.approx({0: 0.1, 8: 0.9, 9: 1, 10: 1, 79: 1, 80: 1, 81: 0.95, 98: 0.1, 99: 0.05})


def test_the_mtp_weight_ramps_up_from_zero():
    config, run = small_config(mtp_enabled=True, mtp_weight=0.3, mtp_rampup_steps=64), small_run(num_iterations=200)
    weights = {step: script.plan(step, config, run).mtp_weight for step in (0, 1, 32, 63, 64, 65, 199)}
    assert weights == pytest.approx({0: 0, 1: 0.3 / 64, 32: 0.15, 63: 0.3 * 63 / 64, 64: 0.3, 65: 0.3, 199: 0.3})
    assert script.plan(0, replace(config, mtp_rampup_steps=0), run).mtp_weight == 0.3
    assert script.plan(100, replace(config, mtp_enabled=False), run).mtp_weight == 0


def test_a_plan_reaches_optimizer_and_buffer():
    model = model_with_a_vector()
    optimizer = script.make_optimizer(model, small_run(), CPU)
    script.apply_plan(script.Plan(lr=0.125, mtp_weight=0.5), model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125] * 3  # embedding, matrices, the vector
    assert model.mtp_weight_buffer.item() == 0.5


def model_with_a_vector(**changes):
    """A GPT with one more parameter, which is no matrix."""
    model = script.GPT(small_config(**changes))
    model.gain = nn.Parameter(torch.randn(5))
    return model


def test_the_optimizer_has_each_parameter_once_and_decays_matrices_only():
    model = model_with_a_vector()
    run = small_run(weight_decay=0.3, beta1=0.8, beta2=0.9, learning_rate=0.01)
    optimizer = script.make_optimizer(model, run, CPU)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}
        assert group["weight_decay"] in (0.3, 0.0)
        assert (group["betas"], group["lr"], group["eps"]) == ((0.8, 0.9), 0.01, 1e-8)
    assert all(group["params"] for group in script.make_optimizer(script.GPT(small_config()), run, CPU).param_groups)


def test_a_step_is_adamw_written_out(float64):
    """m, v: decayed means of gradient and square, both unbiased; the weight shrinks by lr x decay beside the update."""
    model, run = model_with_a_vector(n_layer=1), small_run(weight_decay=0.2, beta1=0.8, beta2=0.95, grad_clip=0.0)
    optimizer, numerics = script.make_optimizer(model, run, CPU), script.Numerics("fp32", CPU)
    parameters = list(model.parameters())
    expected = [p.detach().clone() for p in parameters]
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for t, lr in enumerate((0.01, 0.02, 0.005), 1):
        script.apply_plan(script.Plan(lr=lr, mtp_weight=0.0), model, optimizer)
        for p in parameters:
            p.grad = torch.randn_like(p)
        for w, p, m, v in zip(expected, parameters, means, squares):
            m.copy_(0.8 * m + 0.2 * p.grad)
            v.copy_(0.95 * v + 0.05 * p.grad**2)
            w.mul_(1 - lr * (0.2 if p.dim() >= 2 else 0))
            w.sub_(lr * (m / (1 - 0.8**t)) / (torch.sqrt(v / (1 - 0.95**t)) + 1e-8))
        numerics.step(optimizer, parameters, run.grad_clip, LOSS)
        assert all(p.grad is None for p in parameters)
        for w, p in zip(expected, parameters):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-14)


LOSS = torch.tensor(2.0)  # where nothing depends on it


def sgd(*tensors):
    """Parameters and an optimizer whose step is the gradient itself."""
    parameters = [nn.Parameter(t) for t in tensors]
    return parameters, script.Optimizers(torch.optim.SGD(parameters, lr=1.0))


@pytest.mark.parametrize("clip", [0.0, 1.0, 12.9, 13.1, 50.0])
def test_clipping_is_by_the_norm_of_the_whole_gradient(float64, clip):
    (a, b), optimizer = sgd(torch.zeros(2), torch.zeros(1, 1))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])  # of norm 13
    norm = script.Numerics("fp32", CPU).step(optimizer, [a, b], clip, LOSS)
    assert norm.item() == pytest.approx(13, rel=1e-12)
    factor = clip / 13 if 0 < clip < 13 else 1.0
    assert [-z for z in (*a.tolist(), *b.flatten().tolist())] == pytest.approx([3 * factor, 4 * factor, 12 * factor],
                                                                              rel=1e-6)


def test_adamws_defaults_are_gpt3s():
    """Brown et al. 2020, arXiv:2005.14165: table 2.1, the rate of 12 layers of 768, and appendix B."""
    run = small_run()
    assert (run.learning_rate, run.beta1, run.beta2, run.adam_eps) == (6e-4, 0.9, 0.95, 1e-8)
    assert (run.grad_clip, run.weight_decay) == (1.0, 0.1)


def test_a_parameter_without_a_gradient_is_left_alone():
    (a, b), optimizer = sgd(torch.zeros(2), torch.ones(2))
    a.grad = torch.tensor([3.0, 4.0])
    assert script.Numerics("fp32", CPU).step(optimizer, [a, b], 1.0, LOSS).item() == 5
    assert torch.equal(b.detach(), torch.ones(2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_fp16_the_scaler_passes_everything_through(precision):
    """Bitwise the plain loop of backward, clipping and step."""
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]
    ours, plain = (script.GPT(small_config()) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    numerics, run = script.Numerics(precision, CPU), small_run(learning_rate=0.01)
    assert numerics.dtype == dtype
    optimizers = [script.make_optimizer(model, run, CPU) for model in (ours, plain)]
    for seed in range(3):
        idx, targets = batch_of(ours.config, seed=seed)
        with numerics.autocast():
            logits, loss = ours(idx, targets)
        assert logits.dtype == dtype
        numerics.backward(loss)
        norm = numerics.step(optimizers[0], list(ours.parameters()), 0.5, loss.detach())
        with torch.autocast("cpu", dtype) if precision == "bf16" else contextlib.nullcontext():
            plain(idx, targets)[1].backward()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        optimizers[1].step()
        optimizers[1].zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(a, b) and a.dtype == torch.float32


def test_the_fp16_scaler_skips_an_overflow_and_halves_its_scale():
    (w,), optimizer = sgd(torch.ones(2))
    numerics = script.Numerics("fp16", CPU)
    before = numerics.scaler.get_scale()
    for norm in (math.inf, math.nan):
        numerics.backward((w * torch.tensor([1.0, norm])).sum())
        assert not math.isfinite(numerics.step(optimizer, [w], 1.0, LOSS).item())
        assert torch.equal(w.detach(), torch.ones(2)) and w.grad is None
    assert numerics.scaler.get_scale() == before / 4
    numerics.backward((w * torch.tensor([3.0, 4.0])).sum())
    norm = numerics.step(optimizer, [w], 1.0, LOSS)
    assert norm.item() == pytest.approx(5)  # of the gradient unscaled, before clipping
    torch.testing.assert_close(w.detach(), 1 - torch.tensor([0.6, 0.8]))
    assert numerics.scaler.get_scale() == before / 4


def three_updates(fused, clip, bad):
    """Weights and state of AdamW after a good update, a bad one (a loss and two gradients) and a good one; a bad one
    that is None is left out. Gives the states after the first, the second and the last, and the norms."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]
    optimizer = script.Optimizers(torch.optim.AdamW(parameters, lr=0.1, fused=fused))
    numerics = script.Numerics("fp32", CPU)
    good = [(LOSS, [torch.randn(3, 2), torch.randn(2)]) for _ in range(2)]
    states, norms = [], []
    for loss, gradients in [good[0], *([bad] if bad else []), good[1]]:
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient.clone()
        norms.append(numerics.step(optimizer, parameters, clip, loss).item())
        assert all(p.grad is None for p in parameters)
        states.append(copy.deepcopy([[p.detach() for p in parameters], optimizer.state_dict()]))
    return states, norms


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loss, value", [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (2.0, math.nan),
                                         (2.0, math.inf), (2.0, -math.inf), (math.nan, math.nan)])
def test_an_update_that_is_not_finite_changes_no_bit(fused, clip, loss, value):
    """Neither of the weights nor of AdamW's means, squares and count; the next update is as if it had not been."""
    gradients = [torch.ones(3, 2), torch.ones(2)]
    gradients[0][2, 1] = value
    states, norms = three_updates(fused, clip, (torch.tensor(loss), gradients))
    without, other_norms = three_updates(fused, clip, None)
    assert_same(states[1], states[0])
    assert_same(states[2], without[1])
    assert math.isfinite(norms[1]) == math.isfinite(value) and norms[::2] == other_norms
    for before, after in zip(states[1][0], states[2][0]):
        assert not torch.equal(before, after)  # the good update that follows counts


NOBODY = False, False, False  # asks for anything


def state_of(model, run, precision, batches):
    """A TrainState whose loader gives these batches, one after the other."""
    loader = SimpleNamespace(next_batch=iter(batches).__next__)
    optimizer = script.make_optimizer(model, run, CPU)
    return script.TrainState(model, optimizer, script.Numerics(precision, CPU), loader)


@pytest.mark.parametrize("micro_steps", [2, 4])
def test_accumulated_micro_batches_are_one_big_batch(float64, micro_steps):
    config = small_config(mtp_enabled=True)
    small, big = (script.GPT(config) for _ in range(2))
    big.load_state_dict(small.state_dict())
    scheduled = script.Plan(lr=0.01, mtp_weight=0.3)
    idx, targets = batch_of(config, B=8)
    size = 8 // micro_steps
    cut = [slice(i * size, i * size + size) for i in range(micro_steps)]
    batches = [(idx[part], {name: target[part] for name, target in targets.items()}) for part in cut]
    results = []
    for model, given, steps in ((small, batches, micro_steps), (big, [(idx, targets)], 1)):
        run = small_run(batch_size=8 // steps, grad_accumulation_steps=steps, grad_clip=0.1)
        state = state_of(model, run, "fp32", given)
        results.append(script.train_step(model, state, scheduled, run, FakeWorld(), (False, True, False)))
    (numbers, norm, _), (big_numbers, big_norm, _) = results
    torch.testing.assert_close(numbers, big_numbers, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm, big_norm, rtol=0, atol=1e-12)
    assert norm > 0.1 and not numbers.requires_grad and numbers.tolist()[1:] == [0, 1, 0]
    for a, b in zip(small.parameters(), big.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_process_takes_its_share_of_the_micro_batches():
    model, run = script.GPT(small_config()), small_run(grad_accumulation_steps=6)
    given = []
    batches = (given.append(i) or batch_of(model.config, seed=i) for i in range(100))
    state = state_of(model, run, "fp32", batches)
    script.train_step(model, state, script.Plan(0.0, 0.0), run, FakeWorld(0, 3), NOBODY)
    assert given == [0, 1]


def naive_evaluation(model, tokens, run):
    """Mean losses over the first val_tokens targets, in windows of T: {offset: mean}, an offset's targets being those
    in the windows."""
    T, config = run.sequence_length, model.config
    wanted = min(run.val_tokens, len(tokens) - 1)
    losses = {k: [] for k in range(1, config.lookahead + 1)}
    for first in range(0, wanted, T):
        length = min(T, wanted - first)
        logits, _ = model(torch.tensor([tokens[first : first + length]]))
        for k in losses:
            for t in range(length):
                if first + t + k < len(tokens):
                    target = torch.tensor(tokens[first + t + k])
                    losses[k].append(naive_cross_entropy(logits[0, t], target))
    return {k: sum(values) / len(values) for k, values in losses.items()}


def evaluate_everywhere(model, shards, run, size, signals=None):
    """evaluate() of each of `size` processes: first all give their share of the sum, then all get the whole. `signals`
    makes those of a process, by its rank."""
    shares, numerics = [], script.Numerics("fp32", CPU)

    class World(FakeWorld):
        def sum(self, tensor):
            shares.append(tensor.clone())
            return torch.ones_like(tensor) if len(shares) <= size else sum(shares[:size])

    return [script.evaluate(model, shards, model.config, run, World(rank, size), numerics, signals and signals(rank))
            for rank in [*range(size), *range(size)]][size:]


@pytest.mark.parametrize("val_tokens", [5, 48, 53, 1000])
@pytest.mark.parametrize("batch, size", [(1, 1), (2, 1), (3, 2), (20, 1), (2, 4)])
def test_evaluation_is_the_mean_over_its_targets(float64, tmp_path, batch, size, val_tokens):
    model = script.GPT(small_config())
    tokens = random_tokens(70)
    shards = script.TokenShards(write_shards(tmp_path, tokens[:33], tokens[33:]))
    run = small_run(val_tokens=val_tokens, val_batch_size=batch)
    expected = naive_evaluation(model, tokens, run)[1]
    for found in evaluate_everywhere(model, shards, run, size):
        assert found["val_loss"] == found["val_ntp_loss"] == pytest.approx(expected, rel=1e-12)
        assert found["val_mtp_loss"] == found["val_loss"] and found["mtp_weight"] == 0
        assert found["val_targets"] == min(val_tokens, 69)


@pytest.mark.parametrize("batch, size", [(1, 1), (2, 2), (20, 1)])
def test_evaluation_tells_mtp_from_the_next_token_loss(float64, tmp_path, batch, size):
    model = script.GPT(small_config(mtp_enabled=True, mtp_max_steps=3))
    model.mtp_weight_buffer.fill_(0.25)
    tokens = random_tokens(70)
    shards = script.TokenShards(write_shards(tmp_path, tokens))
    run = small_run(val_tokens=48, val_batch_size=batch)
    expected = naive_evaluation(model, tokens, run)
    for found in evaluate_everywhere(model, shards, run, size):
        assert found["val_loss"] == found["val_ntp_loss"] == pytest.approx(expected[1], rel=1e-12)
        aux = (expected[2] + expected[3]) / 2
        assert found["val_mtp_loss"] == pytest.approx(expected[1] + 0.25 * aux, rel=1e-12)
        assert found["mtp_weight"] == 0.25


class StopBefore:
    """Signals that come before the batch of this number."""

    def __init__(self, batch):
        self.left = batch

    @property
    def asked(self):
        self.left -= 1
        return "SIGTERM" if self.left < 0 else None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_evaluation_that_one_process_is_asked_to_stop_is_none_for_all(tmp_path, size):
    model = script.GPT(small_config())
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(100)))
    run = small_run(val_tokens=96, val_batch_size=2)  # six batches
    whole = evaluate_everywhere(model, shards, run, size)
    never = evaluate_everywhere(model, shards, run, size, lambda rank: StopBefore(6))
    assert whole == never and whole[0]["val_targets"] == 96
    for before in range(6 // size):
        last = lambda rank: StopBefore(before if rank == size - 1 else 6)  # noqa: E731
        assert evaluate_everywhere(model, shards, run, size, last) == [None] * size
        assert model.training


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_none_ends_the_run_and_is_not_recorded(loss):
    log, state = Records(), SimpleNamespace(step=7, tokens=112, seconds=1.0)
    losses = dict(val_loss=loss, val_ntp_loss=loss, val_mtp_loss=loss, mtp_weight=0.0, val_targets=69)
    with pytest.raises(script.DivergedError, match=f"^the validation loss after step 7 is {loss}; training stopped: "):
        script.report_validation(losses, state, small_run(target_val_loss=3.0), log)
    assert log.records == [] and log.said == []
    assert script.report_validation(dict(losses, val_loss=3.0), state, small_run(target_val_loss=3.0), log)
    assert [record["val_loss"] for record in log.records] == [3.0]


def test_evaluation_keeps_no_graph_and_no_gradient(tmp_path):
    model = script.GPT(small_config())
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(70)))
    losses = script.evaluate(model, shards, model.config, small_run(), FakeWorld(), script.Numerics("fp32", CPU))
    assert all(p.grad is None for p in model.parameters())
    assert {type(value) for value in losses.values()} <= {int, float}


class Records(script.NullLog):
    def __init__(self):
        self.records, self.lines, self.said = [], [], []

    def text(self, line):
        self.said.append(line)

    def record(self, record, steps):
        self.records.append(record)
        self.lines.append(script.format_record(record, steps))


def metered(monkeypatch, seconds, run=None, device=CPU, losses=None, norm=0.5, precision="fp32"):
    """A meter that has seen steps of these lengths, its log, and the clock: a list of one, to be set."""
    run = run or small_run(num_iterations=len(seconds))
    clock = [100.0]
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    state = SimpleNamespace(model=script.GPT(small_config()), numerics=script.Numerics(precision, CPU), seconds=0.0,
                            step=0, tokens=0, skipped=0)
    log = Records()
    meter = script.Meter(state, run, FakeWorld(device=device), log, "run")
    for i, length in enumerate(seconds):
        clock[0] += length
        submit(meter, losses[i] if losses else 2.0, norm)
    return meter, log, clock


def submit(meter, loss=2.0, norm=0.5, asked=NOBODY, cursor=None):
    """Count a step and give the meter its numbers."""
    state = meter.state
    state.step, state.tokens = state.step + 1, state.tokens + meter.run.tokens_per_step
    meter.submit(torch.tensor([loss, *map(float, asked)]), torch.tensor(norm), {}, script.Plan(1e-3, 0.0), cursor)


def test_the_average_step_leaves_the_first_ones_out(monkeypatch):
    skipped = script.TIMING_WARMUP_STEPS
    seconds = [50.0] + [9.0] * (skipped - 1) + [0.25, 0.5, 0.75] * 5
    meter, log, _ = metered(monkeypatch, seconds)
    averages = [record["step_avg_ms"] for record in log.records]
    assert averages[0] == pytest.approx(50_000)  # there is no other
    assert averages[1:skipped] == pytest.approx([9000.0] * (skipped - 1))
    halves = [seconds[count // 2 : count] for count in range(skipped + 1, 2 * skipped)]  # none rests on one step
    assert averages[skipped : 2 * skipped - 1] == pytest.approx([1000 * sum(half) / len(half) for half in halves])
    assert averages[2 * skipped - 1 :] == pytest.approx([
        1000 * sum(seconds[skipped:count]) / (count - skipped) for count in range(2 * skipped, len(seconds) + 1)])
    assert [record["step_ms"] for record in log.records] == pytest.approx([1000 * s for s in seconds])
    assert meter.state.seconds == pytest.approx(sum(seconds))
    assert log.records[-1]["time"] == pytest.approx(1000 * sum(seconds))


def test_time_outside_training_does_not_count(monkeypatch):
    meter, log, clock = metered(monkeypatch, [1.0, 1.0])
    clock[0] += 1000
    meter.flush()
    meter.resume()
    clock[0] += 3
    submit(meter)
    assert log.records[-1]["step_ms"] == pytest.approx(3000) and meter.state.seconds == pytest.approx(5)


def test_a_record_has_the_steps_numbers(monkeypatch):
    run = small_run(num_iterations=4, batch_size=2, sequence_length=8, grad_accumulation_steps=3)
    _, log, _ = metered(monkeypatch, [2.0, 2.0, 2.0], run)
    record = log.records[-1]
    assert (record["step"], record["train_loss"], record["lr"], record["grad_norm"]) == (3, 2.0, 1e-3, 0.5)
    assert record["tokens"] == 3 * 48 and record["tokens_per_second"] == pytest.approx(24)
    assert record["seconds_left"] == pytest.approx(2.0) and record["mfu"] is None and record["peak_mem_MB"] == 7


def test_mfu_is_the_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(FakeWorld, "peak_flops", lambda self: 1e6)
    run = small_run(num_iterations=1)
    meter, log, clock = metered(monkeypatch, [2.0], run)
    flops = meter.state.model.flops_per_token(8)
    assert log.records[0]["mfu"] == pytest.approx(flops * 16 / 2 / 1e6)
    meter.world.size = 4  # the step's tokens are those of all processes, the peak is of one
    clock[0] += 2.0
    submit(meter)
    assert log.records[1]["mfu"] == pytest.approx(flops * 16 / 2 / 4e6)


def test_what_is_left_of_a_run_whose_steps_are_not_known_is_what_is_left_of_its_minutes(monkeypatch):
    run = small_run(num_iterations=script.UNKNOWN_STEPS, minutes=2.0)
    _, log, _ = metered(monkeypatch, [2.0, 2.0, 2.0], run)
    assert [record["seconds_left"] for record in log.records] == pytest.approx([118.0, 116.0, 114.0])


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125),
    ("NVIDIA L40", None), ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3080 Ti", None), ("Tesla P100-PCIE-16GB", None),
])
def test_the_peak_of_a_gpu_is_its_own_or_unknown(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    world = script.World("cpu")
    assert world.peak_flops() is None
    world.device = torch.device("cuda")
    assert world.peak_flops() == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_on_a_gpu_a_step_is_reported_when_the_next_is_queued(monkeypatch):
    meter, log, clock = metered(monkeypatch, [1.0, 1.0, 1.0], device=torch.device("cuda"))
    assert [record["step"] for record in log.records] == [1, 2]
    clock[0] += 1
    meter.flush()
    meter.flush()
    assert [record["step"] for record in log.records] == [1, 2, 3]


def meter_on_data(folder, device="cpu", rank=0, size=1, **changes):
    """A meter whose run's folder is folder/run, over a loader of three steps of 32 tokens an epoch."""
    run = small_run(output_dir=str(folder), grad_accumulation_steps=2, **changes)
    tokens = random_tokens(3 * 32 + 2 + 5, vocab_size=50257)
    shards = script.TokenShards(write_shards(folder, tokens[:50], tokens[50:]))
    (folder / "run").mkdir(exist_ok=True)
    state = SimpleNamespace(
        model=script.GPT(small_config()), numerics=script.Numerics("fp32", CPU), seconds=0.0, step=0, tokens=0,
        skipped=0, loader=script.DistributedDataLoader(shards, run, 2, FakeWorld(rank, size)),
    )
    return script.Meter(state, run, FakeWorld(rank, size, torch.device(device)), Records(), "run")


@pytest.mark.parametrize("shares, requests", [
    ((0, 0, 0), set()), ((1, 0, 0), {"stop"}), ((0, 0.5, 0), {"save"}), ((0, 0, 0.125), {"data"}),
    ((1, 1 / 3, 0.25), {"stop", "save", "data"}),
])
def test_what_any_process_asks_for_is_a_request(tmp_path, shares, requests):
    """Seen with the step's other numbers: at once, or on a GPU when the next step is queued."""
    meter, late, last = (meter_on_data(tmp_path, device) for device in ("cpu", "cuda", "cuda"))
    submit(meter, asked=shares)
    assert meter.requests == requests
    submit(meter)
    assert meter.requests == requests  # until they are done
    submit(late, asked=shares)
    assert late.requests == set()
    submit(late)
    assert late.requests == requests
    submit(last, asked=shares)
    last.flush()
    assert last.requests == requests


def next_step(meter, loss=2.0, norm=0.5):
    """Take a step's batches from the loader and submit it; gives their rows of T + lookahead tokens."""
    loader, rows = meter.state.loader, []
    cursor = loader.state_dict()
    for _ in loader.turns:
        x, targets = loader.next_batch()
        rows += torch.cat((x, *(target[:, -1:] for target in targets.values())), dim=1).tolist()
    submit(meter, loss, norm, cursor=cursor)
    return rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_skipped_batch_is_written_as_it_was(tmp_path, shuffle, device):
    """In each of seven steps, which are two epochs and one step; on a GPU they are read when the next is queued."""
    meter = meter_on_data(tmp_path, device, shuffle=shuffle, nan_limit=100)
    given = [next_step(meter, math.nan) for _ in range(7)]
    meter.flush()
    tokens, T = read_slowly(tmp_path), meter.run.sequence_length
    for step, rows in enumerate(given, 1):
        epoch, place = divmod(step - 1, 3)
        order = np.random.default_rng((meter.run.seed, epoch)).permutation(12) if shuffle else np.arange(12)
        numbers = order[4 * place : 4 * place + 4].tolist()
        with np.load(tmp_path / "run" / f"skipped{step:06d}.npz") as saved:
            assert (saved["step"], saved["epoch"], saved["rows"].tolist()) == (step, epoch, numbers)
            assert saved["tokens"].dtype == np.uint16 and saved["tokens"].tolist() == rows
        assert rows == [tokens[number * T : number * T + T + 2] for number in numbers]
    assert len(list((tmp_path / "run").iterdir())) == 7
    assert f"its batch is in {tmp_path}/run/skipped000007.npz" in meter.log.said[-1]


def test_a_skipped_batch_is_that_of_all_processes_and_written_once(tmp_path):
    rows = []
    for rank in (1, 0):
        assert not list((tmp_path / "run").glob("*"))
        rows[:0] = next_step(meter_on_data(tmp_path, rank=rank, size=2), math.nan)
    path, = (tmp_path / "run").iterdir()
    with np.load(path) as saved:
        assert saved["tokens"].tolist() == rows and len(rows) == 4


@pytest.mark.parametrize("damage", ["shards", "folder"])
def test_a_skipped_batch_that_cannot_be_written_is_said(tmp_path, damage):
    meter = meter_on_data(tmp_path)
    next_step(meter)
    for path in tmp_path.glob("*.bin" if damage == "shards" else "run"):
        path.unlink() if damage == "shards" else path.rmdir()
    next_step(meter, math.nan)
    assert "its batch cannot be written (" in meter.log.said[-1] and not list(tmp_path.rglob("*.npz"))
    assert ("part_000.bin" if damage == "shards" else "No such file") in meter.log.said[-1]


def test_updates_skipped_in_a_row_are_counted(tmp_path):
    meter = meter_on_data(tmp_path, nan_limit=3)
    counts = []
    for loss, norm in ((2.0, 0.5), (math.nan, 0.5), (2.0, math.inf), (2.0, 0.5), (math.inf, math.nan), (-math.inf, 1)):
        next_step(meter, loss, norm)
        counts.append(meter.state.skipped)
    assert counts == [0, 1, 2, 0, 1, 2] and not meter.rollback
    records = meter.log.records
    assert [record.get("skipped", False) for record in records] == [count > 0 for count in counts]
    assert [record["train_loss"] for record in records] == [None if count else 2.0 for count in counts]
    assert [record["grad_norm"] for record in records] == [0.5, 0.5, None, 0.5, None, 1]
    assert meter.log.lines[1] == "step:2/10 | update skipped: the loss or the gradient is not finite | tokens 64"
    with pytest.raises(script.DivergedError, match="step 7: the loss is nan.*skipped000007.npz: 3 updates in a row came"
                       " to nothing.*lower --learning_rate"):
        next_step(meter, math.nan)
    assert len(meter.log.records) == 7


def test_a_rollback_is_asked_for_at_the_limit(tmp_path):
    meter = meter_on_data(tmp_path, nan_limit=2, nan_policy="rollback")
    asked = []
    for loss in (math.nan, 2.0, math.nan, math.nan):
        next_step(meter, loss)
        asked.append(meter.rollback)
    assert asked == [False, False, False, True]


@pytest.mark.parametrize("loss, norm", [(math.nan, 0.5), (math.inf, 0.5), (2.0, math.inf), (2.0, math.nan)])
def test_the_first_number_that_is_none_stops_training_where_that_is_the_policy(tmp_path, loss, norm):
    meter = meter_on_data(tmp_path, nan_policy="stop")
    next_step(meter)
    with pytest.raises(script.DivergedError, match=f"step 2: the loss is {loss}, the norm of its gradient {norm}.*"
                       "1 update in a row.*lower --learning_rate"):
        next_step(meter, loss, norm)
    assert (tmp_path / "run" / "skipped000002.npz").is_file()


def test_an_overflow_that_the_scaler_takes_care_of_is_no_skipped_update(monkeypatch):
    run = small_run(num_iterations=1, nan_policy="stop")
    meter, log, _ = metered(monkeypatch, [1.0], run, norm=math.inf, precision="fp16")
    record, = log.records
    assert record["grad_norm"] is None and record["train_loss"] == 2.0 and "skipped" not in record
    assert meter.state.skipped == 0


STEP_LINE = re.compile(
    r"step:(\d+)/(\d+) \| loss (\d+\.\d{4}) \| lr \S+ \| norm (\S+) \| [\d,]+ tok/s \| mfu (\S+) \| mem [\d,]+ MiB"
    r" \| left \d+:\d\d:\d\d \| step_avg:(\d+\.\d\d) ms"
)


def test_the_lines_of_the_log(monkeypatch):
    _, log, _ = metered(monkeypatch, [0.5, 0.25])
    assert STEP_LINE.fullmatch(log.lines[1]).groups() == ("2", "2", "2.0000", "0.500", "n/a", "250.00")
    record = dict(log.records[1], grad_norm=None, mfu=0.4567, step_avg_ms=12345.678)
    groups = STEP_LINE.fullmatch(script.format_record(record, 9)).groups()
    assert groups == ("2", "9", "2.0000", "overflow", "45.7%", "12345.68")
    validation = dict(step=7, val_loss=3.14159, val_ntp_loss=3.14159, val_mtp_loss=3.5, mtp_weight=0.0, val_targets=69,
                      tokens=1000, time=1500.0)
    line = script.format_record(validation, 9)
    assert re.fullmatch(r"step:7/9 \| val_loss 3\.1416 \| targets 69 \| tokens 1,000 \| time 1\.5 s", line)
    line = script.format_record(dict(validation, mtp_weight=0.1), 9)
    assert line.startswith("step:7/9 | val_loss 3.1416 | val_mtp_loss 3.5000 | ")


def test_the_last_step_is_recorded_where_numbers_come_late(tmp_path, monkeypatch):
    """As on a GPU, where a step's numbers are read when the next one is queued; nothing is saved or validated."""

    class Log(script.NullLog):
        steps = []

        def record(self, record, steps):
            self.steps.append(record["step"])

    monkeypatch.setattr(script, "Meter", LateMeter)
    state = trained(tmp_path, FakeWorld(), Log(), num_iterations=3)
    assert Log.steps == [1, 2, 3] and state.step == 3


def trained(folder, world, log, **changes):
    """The state of a run that saves and validates nothing, at its end."""
    config, run = small_config(), small_run(save_checkpoints=False, input_val_bin="", **changes)
    shards = script.TokenShards(write_shards(folder, random_tokens(300)))
    model, loader = script.GPT(config), script.DistributedDataLoader(shards, run, 1, world)
    state = script.TrainState(model, script.make_optimizer(model, run, CPU), script.Numerics("fp32", CPU), loader)
    script.train(state, config, run, world, log, "x", None, None)
    return state


@pytest.mark.parametrize("every, after", [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (5, [5]), (6, [])])
def test_unused_memory_is_returned_after_each_so_many_steps(tmp_path, every, after):
    world, log = FakeWorld(), Records()
    returned = []
    world.empty_cache = lambda: returned.append(len(log.records))
    trained(tmp_path, world, log, num_iterations=5, empty_cache_every=every)
    assert returned == after


def test_the_collector_of_garbage_passes_over_what_was_there_before(trainer, monkeypatch):
    frozen, step = [], script.train_step
    monkeypatch.setattr(script, "train_step", lambda *args: frozen.append(gc.get_freeze_count()) or step(*args))
    trainer.run()
    assert min(frozen) > 10_000 and gc.get_freeze_count() == 0
