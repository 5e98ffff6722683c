"""--log_stats: its figures against a naive loop's in float64, when they are logged, and that they change nothing."""
import math
import types

import pytest
import torch

import train_gpt2_mod as script
from helpers import CPU, FakeWorld, shrunk_preset, small_config, small_run
from launch import column, steps

FIGURES = {"grad_norm", "weight_norm", "update_ratio", "activation_rms"}


def figures(record):
    return {name: value for name, value in record.items() if "/" in name}


def test_each_parameter_is_in_one_layer():
    for name in script.base_configs:
        with torch.device("meta"):
            model = script.GPT(shrunk_preset(name))
        layers = script.layers_of(model)
        every = [id(p) for weights in layers.values() for p in weights]
        assert sorted(every) == sorted(map(id, model.parameters())) and {"h.0", "h.1", "wte"} <= {*layers}
        assert {id(p) for p in layers["h.1"]} == {id(p) for p in model.transformer.h[1].parameters()}
        assert ("lm_head" in layers) == (not model.config.tie_embeddings)


def root_mean_square(x):
    return math.sqrt(sum(value**2 for value in x.double().flatten().tolist()) / x.numel())


def norm(tensors):
    return math.sqrt(sum(value**2 for z in tensors for value in z.double().flatten().tolist()))


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=False, smear="embedding+mlp", x0_lambdas=True)])
def test_the_figures_are_those_of_a_naive_loop(changes):
    torch.manual_seed(1)
    config, run = small_config(dropout=0.5, **changes), small_run(log_stats=1, learning_rate=0.01, grad_clip=1e-3)
    model = script.GPT(config)
    naive = script.GPT(config)
    naive.load_state_dict(model.state_dict())
    idx = torch.randint(0, 61, (2, 8))
    targets = dict(target_1=torch.randint(0, 61, (2, 8)))
    state = types.SimpleNamespace(
        model=model, numerics=script.Numerics("fp32", CPU), step=0, tokens=0,
        optimizer=script.make_optimizer(model, run, CPU),
        loader=types.SimpleNamespace(next_batch=lambda: (idx, targets)))
    torch.manual_seed(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, _, found = script.train_step(model, state, script.Plan(0.01, 0.0), run, FakeWorld(), (False,) * 3)

    torch.manual_seed(2)
    _, loss = naive(idx, targets)  # the same dropout: the figures have drawn nothing
    loss.backward()
    after = dict(model.named_parameters())
    layers = {"h.0": "transformer.h.0.", "h.1": "transformer.h.1.", "wte": "transformer.wte."}
    layers |= {layer: f"{layer}." for layer in ("lm_head", "smear") if f"{layer}.weight" in after}
    layers |= {"smear": "smear."} if changes else {}
    for layer, start in layers.items():
        mine = [name for name in before if name.startswith(start)]
        gradients = [p.grad for name, p in naive.named_parameters() if name in mine]
        assert mine and found[f"grad_norm/{layer}"].item() == pytest.approx(norm(gradients), rel=1e-5)
        weights = norm([before[name] for name in mine])
        assert found[f"weight_norm/{layer}"].item() == pytest.approx(weights, rel=1e-5)
        change = norm([after[name].detach() - before[name] for name in mine])
        share = change / weights if weights else math.inf  # the smear's factors begin at 0
        assert found[f"update_ratio/{layer}"].item() == pytest.approx(share, rel=1e-5) and change > 0

    naive.eval()
    x, ctx = naive.embed(idx[:1])
    for layer, block in enumerate(naive.transformer.h):
        x = block(x, ctx)
        assert found[f"activation_rms/h.{layer}"].item() == pytest.approx(root_mean_square(x.detach()), rel=1e-5)
    assert model.training and not any(block._forward_hooks for block in model.transformer.h)
    assert {name.split("/")[1] for name in found} == {*layers}


def test_the_scale_of_fp16_is_not_in_the_gradients():
    model = script.GPT(small_config())
    idx = torch.randint(0, 61, (1, 8))
    model(idx, dict(target_1=idx))[1].backward()
    numerics = script.Numerics("fp32", CPU)
    numerics.scaler = types.SimpleNamespace(get_scale=lambda: 8.0)
    with script.layer_statistics(types.SimpleNamespace(model=model, numerics=numerics), idx, True) as found:
        pass
    assert found["grad_norm/h.0"].item() == pytest.approx(norm(p.grad for p in model.transformer.h[0].parameters()) / 8)
    assert found["update_ratio/h.0"] == 0


def test_they_are_logged_when_due_and_change_nothing(trainer):
    flags = ["--dropout", 0.1, "--log_every", 1]
    plain, logged = trainer.run(*flags), trainer.run(*flags, "--log_stats", 4)
    for key in ("train_loss", "grad_norm", "lr"):
        assert column(steps(plain.folder), key) == column(steps(logged.folder), key)
    assert not any(figures(record) for record in steps(plain.folder))
    for record in steps(logged.folder):
        found = figures(record)
        assert bool(found) == (record["step"] in (4, 6))  # the last one too
        if found:
            assert {name.split("/")[0] for name in found} == FIGURES
            whole = math.sqrt(sum(value**2 for name, value in found.items() if name.startswith("grad_norm/")))
            assert whole == pytest.approx(record["grad_norm"], rel=1e-5)


def test_what_is_not_finite_is_null(trainer):
    """With weights at 0 the share of the update is none."""
    run = trainer.run("--zero_init", "--no_tie_embeddings", "--log_stats", 1)
    first, second, *_ = steps(run.folder)
    assert first["weight_norm/lm_head"] == 0 and first["update_ratio/lm_head"] is None
    assert second["update_ratio/lm_head"] > 0


def test_bad_values_are_refused(trainer):
    result = trainer.main(*trainer.flags("--log_stats", -1))
    assert result.code == 2 and "log_stats=-1" in result.err


@pytest.mark.slow
def test_nothing_is_compiled_for_them(trainer, monkeypatch):
    plain = trainer.run("--compile")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(script, "why_no_compile", lambda device: None)
    logged = trainer.run("--compile", "--log_stats", 1)
    torch._dynamo.reset()
    graphs = counters["stats"]["unique_graphs"]
    counters.clear()
    trainer.run("--compile")
    assert graphs == counters["stats"]["unique_graphs"] > 0
    assert column(steps(plain.folder), "train_loss") == column(steps(logged.folder), "train_loss")
    torch._dynamo.reset()
