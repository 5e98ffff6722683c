"""docs/23-mixture-of-experts: experts against transformers' and a loop, balance on made-up routings, whole runs."""
import importlib.util
import math
import sys

import pytest
import torch

import train_gpt2_mod as script
from helpers import FakeWorld, batch_of, changed_id, small_config, small_run
from launch import ROOT, assert_same, column, content_of, steps, torchrun


def program(folder, name):
    """A program of docs/ that trains networks of its own, as a module; importing it changes nothing of the script."""
    before = dict(vars(script))
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / folder / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # torch.compile looks for it by its name
    spec.loader.exec_module(module)
    assert dict(vars(script)) == before
    return module


def registered(module, monkeypatch):
    """Make the script know it for the length of a test."""
    for name in ("mlps", "mixers", "base_configs"):
        monkeypatch.setattr(script, name, dict(getattr(script, name)))
    before = dict(vars(script))
    module.register()
    after = {name: part for name, part in vars(script).items() if part is not before[name]}
    for name, part in after.items():
        setattr(script, name, before[name])
        monkeypatch.setattr(script, name, part)


moe = program("23-mixture-of-experts", "moe")
PROGRAM = ROOT / "docs" / "23-mixture-of-experts" / "moe.py"
TINY = ("--model", "tiny_moe", "--n_layer", 2)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    registered(moe, monkeypatch)


def config_of(**changes):
    small = dict(vocab_size=61, n_layer=2, n_head=4, n_embd=32, precision="fp32", mlp="moe", ffn_hidden=24, n_expert=4)
    return moe.MoEConfig(**{**small, **changes})


def rounds_backward(config):
    """Whether a compiled backward pass has autocast of its own while this network trains."""
    context, _ = script.attention_kernel(config, small_run(), FakeWorld())
    with context():
        return torch._functorch.config.backward_pass_autocast != "off"


def errors_compiled(layer, *inputs):
    """How far the gradients of the layer's parameters, compiled, are from those uncompiled, both under bf16's autocast;
    of each its norm's share."""
    gradients = []
    for f in (layer, torch.compile(layer, backend="aot_eager", dynamic=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = f(*inputs)
        gradients.append(torch.autograd.grad(y.float().square().sum(), list(layer.parameters())))
    return [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in zip(*gradients)]


# ----------------------------------------------------------------------------------------------------------------------
# The experts


def naive(layer, x):
    """Token by token, expert by expert."""
    c, out = layer.config, torch.zeros_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            logits = layer.router.weight @ x[b, t]
            scores = torch.softmax(logits, 0) if c.router == "softmax" else 1 / (1 + torch.exp(-logits))
            best = sorted(range(c.n_expert), key=lambda e: -float((scores + layer.balance_bias)[e].detach()))
            best = best[: c.experts_per_token]
            total = sum(scores[e] for e in best) if len(best) > 1 else 1
            for e in best:
                up, down = (m.weight.chunk(c.n_expert)[e] for m in (layer.c_fc, layer.c_proj))
                biases = [m.bias.chunk(c.n_expert)[e] if c.bias else 0 for m in (layer.c_fc, layer.c_proj)]
                hidden = up @ x[b, t] + biases[0]
                if c.expert == "swiglu":
                    gate, hidden = hidden.chunk(2)
                    hidden = gate * torch.sigmoid(gate) * hidden
                else:
                    hidden = torch.relu(hidden) ** 2
                out[b, t] += c.router_scale * scores[e] / total * (down @ hidden + biases[1])
            if layer.shared is not None:
                out[b, t] += layer.shared(x[b, t][None])[0]
    return out


@pytest.mark.parametrize("changes", [
    dict(expert="swiglu", experts_per_token=2), dict(expert="relu2", experts_per_token=1),
    dict(expert="relu2", experts_per_token=3, router="sigmoid", router_scale=2.5, n_shared_expert=2),
    dict(expert="swiglu", experts_per_token=1, router="sigmoid", bias=True), dict(expert="relu2", experts_per_token=4),
], ids=str)
def test_experts_are_those_of_a_loop_over_tokens(float64, changes):
    layer = moe.MoE(config_of(**changes))
    layer.balance_bias.copy_(torch.linspace(-0.1, 0.1, 4))
    x = torch.randn(2, 5, 32, requires_grad=True)
    found, expected = layer(x), naive(layer, x)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    weights = [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), weights) for y in (found, expected))):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("k", [2, 3])
def test_a_layer_is_transformers_mixtral_block(k):
    """In float32: there the block's router computes in it whatever x is."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    theirs = MixtralSparseMoeBlock(MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=4,
                                                 num_experts_per_tok=k))
    layer = moe.MoE(config_of(expert="swiglu", experts_per_token=k))
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        layer.router.weight.copy_(theirs.gate.weight)
        layer.c_fc.weight.copy_(theirs.experts.gate_up_proj.flatten(0, 1))
        layer.c_proj.weight.copy_(theirs.experts.down_proj.flatten(0, 1))
    x = torch.randn(3, 7, 32, requires_grad=True)
    expected = theirs(x)
    torch.testing.assert_close(layer(x), expected)
    mine, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), expected))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_grouped_products_are_those_of_the_loop(monkeypatch):
    """torch's kernel, on the CPU a reference of its own; widths that are no multiples of 8, and an expert without a
    token."""
    config = config_of(expert="swiglu", ffn_hidden=21, n_head=2, n_embd=36, n_expert=5, bias=True)
    layer, results = moe.MoE(config), []
    layer.balance_bias[2] = -100
    x = torch.randn(2, 9, 36)
    for grouped in (False, True):
        monkeypatch.setattr(moe.MoE, "grouped", grouped)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        gradients = torch.autograd.grad((y * y.detach()).float().sum(), list(layer.parameters()))
        results.append([y.float(), *gradients])
    assert layer.routed[0][2] == 0
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * float(theirs.detach().abs().max()))


def test_why_products_are_not_grouped():
    assert "cpu" in moe.why_not_grouped(torch.device("cpu"), torch.bfloat16)
    assert "float16" in moe.why_not_grouped(torch.device("cuda"), torch.float16)


@pytest.mark.parametrize("spoiled, right", [(lambda y: y, True), (lambda y: y * 1.1, False)])
def test_a_grouped_kernel_that_is_wrong_is_seen(monkeypatch, spoiled, right):
    grouped = moe.GROUPED_MM
    monkeypatch.setattr(moe, "GROUPED_MM", lambda *args, **settings: spoiled(grouped(*args, **settings)))
    assert moe.grouped_is_right(torch.device("cpu"), torch.bfloat16) == right


def test_a_later_token_moves_no_earlier_logit():
    model = script.GPT(config_of()).eval()
    idx, _ = batch_of(model.config, T=12)
    first, second = model(idx)[0], model(changed_id(idx, 7, 61))[0]
    assert torch.equal(first[:, :7], second[:, :7]) and not torch.equal(first[:, 7:], second[:, 7:])


def test_presets_have_the_flops_of_d12_and_their_router():
    counts = dict(d12_moe=293_475_072, d12_moe_bias=293_475_072, d12_moe_switch=519_967_488, d12_moe_shared=307_704_576)
    dense = script.GPTConfig()
    with torch.device("meta"):
        base = script.GPT(dense).flops_per_token(1024)
        for name, count in counts.items():
            model = script.GPT(script.GPTConfig(**script.base_configs[name]))
            assert model.parameter_count() == count, name
            router = 6 * 12 * 768 * model.config.n_expert
            assert model.flops_per_token(1024) == base + router, name
            assert sum(script.parameters_by_part(model).values()) == count
            assert script.kept_by_block(model.config) > script.kept_by_block(dense)


def test_muon_takes_each_expert_by_itself():
    layer = moe.MoE(config_of(expert="swiglu"))
    assert layer.c_fc.parts == (24,) * 8 and layer.c_proj.parts == (32,) * 4


# ----------------------------------------------------------------------------------------------------------------------
# Balance


def test_the_balance_loss_is_transformers():
    """Theirs counts each token k times."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, 6)
    scores = logits.softmax(-1)
    load = torch.bincount(scores.topk(2).indices.flatten(), minlength=6)
    found = moe.balance_loss(load, scores)
    torch.testing.assert_close(found, load_balancing_loss_func((logits,), 6, 2) / 2)


def test_the_balance_loss_of_even_and_of_one_sided_routings():
    even = torch.full((8, 4), 0.25)
    assert moe.balance_loss(torch.tensor([2, 2, 2, 2]), even) == pytest.approx(1)
    one = torch.eye(4)[[1] * 8]
    assert moe.balance_loss(torch.tensor([0, 8, 0, 0]), one) == pytest.approx(4)
    assert moe.balance_loss(torch.tensor([0, 8, 0, 0]), 3 * one) == pytest.approx(4)  # sigmoids need not sum to 1


def test_the_balance_loss_is_in_the_loss_and_leads_to_evenness():
    """Also where blocks are run again in the backward pass; validation is without it."""
    results = {}
    for again in (False, True):
        torch.manual_seed(1)
        model = script.GPT(config_of(balance_weight=0.5, gradient_checkpointing=again))
        idx, targets = batch_of(model.config)
        plain = model.eval()(idx, targets)[1]
        loss = model.train()(idx, targets)[1]
        seen = [layer.sums[1] / 16 for layer in model.experts.values()]
        torch.testing.assert_close(loss, plain + 0.5 * sum(seen))
        assert sum(seen) > 1.99
        loss.backward()
        assert all(layer.routed is None for layer in model.experts.values())
        assert [int(layer.load.sum()) for layer in model.experts.values()] == [32, 32]  # counted once
        results[again] = [p.grad for p in model.parameters()]
    for mine, theirs in zip(*results.values()):
        torch.testing.assert_close(mine, theirs)
    parts = script.GPT(config_of()).train()(idx, targets, return_loss_components=True)[1]
    assert parts[1] is None


def test_the_bias_moves_by_the_sign_alone():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.25])
    found = moe.moved_bias(bias, torch.tensor([10, 0, 5, 5]), 0.125)
    assert found.tolist() == [0.375, 0.125, -0.5, 0.25]  # the mean is 5


def test_the_bias_evens_a_skewed_router():
    layer = moe.MoE(config_of(router="sigmoid", balance="bias"))
    scores = torch.sigmoid(torch.randn(400, 4) + torch.tensor([2.0, 0.5, 0.0, -2.0]))

    def load():
        return torch.bincount(layer.choose(scores)[0].flatten(), minlength=4)

    assert load().max() > 320
    for _ in range(600):
        layer.balance_bias.copy_(moe.moved_bias(layer.balance_bias, load(), 0.002))
    assert (load() - 200).abs().max() < 20


def test_the_bias_counts_for_the_choice_alone():
    layer = moe.MoE(config_of(router="sigmoid"))
    scores = torch.tensor([[0.9, 0.6, 0.3, 0.1]])
    layer.balance_bias.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.0]))
    chosen, weights = layer.choose(scores)
    assert chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.3]]) / 0.9)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_logs_how_tokens_are_spread(trainer):
    result = trainer.run(*TINY, "--grad_accumulation_steps", 2, "--log_stats", 6, "--mlp_expansion_factor", 1)
    rows = steps(result.folder)
    assert column(rows, "dropped") == [0] * 6
    assert all(0 < x <= math.log(4) for x in column(rows, "router_entropy"))
    assert all(row["load_min"] <= 1 <= row["load_max"] <= 2 for row in rows)
    for block in range(2):
        shares = [rows[-1][f"expert_load/h.{block}.{e}"] for e in range(4)]
        assert sum(shares) == pytest.approx(1) and all((256 * share).is_integer() for share in shares)
    assert "expert_load/h.0.0" not in rows[0]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    log = (result.folder / f"{result.folder.name}.log").read_text()
    assert "class MoEGPT(" in log and "experts: 2 of 4, 0 shared" in log


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(trainer, balance):
    flags = (*TINY, "--balance", balance, "--save_every", 3, "--expert", "swiglu", "--router", "sigmoid")
    whole = trainer.run(*flags).folder
    half = trainer.copy_of(whole, "half")
    (half / "step000006.pt").unlink()
    trainer.output = half.parent
    trainer.run(*flags, "--resume", "auto", "--output_dir", half.parent)
    contents = [content_of(folder, 6) for folder in (whole, half)]
    for part in ("model", "optimizer", "loader", "rng"):
        assert_same(contents[0][part], contents[1][part])
    biases = contents[0]["model"]["transformer.h.1.mlp.balance_bias"]
    assert biases.any() == (balance == "bias") and biases.abs().max() <= 6 * 0.001 + 1e-9


def test_an_update_that_is_skipped_moves_no_bias(trainer):
    from helpers import FakeWorld, small_run

    model = script.GPT(config_of(balance="bias"))
    idx, targets = batch_of(model.config)
    model(idx, targets)
    for finite in (False, True):
        moe.after_step(model, small_run(), FakeWorld(), torch.tensor(finite), False)
        moved = [bool(layer.balance_bias.any()) for layer in model.experts.values()]
        assert moved == [finite] * 2


@pytest.mark.parametrize("flags, said", [
    ("--n_expert 4", "n_expert=4 would be ignored; add --mlp moe"),
    ("--mlp moe --experts_per_token 9", "experts_per_token=9 must be at most n_expert=8"),
    ("--mlp moe --n_expert 0", "n_expert=0 must be at least 1"),
    ("--mlp moe --balance_rate 0.1", "balance_rate=0.1 would be ignored; add --balance bias"),
    ("--mlp moe --expert swiglo", "expert=swiglo is not known; did you mean swiglu?"),
    ("tools/none.py", "tools/none.py is no program here; name one such as tools/sample.py"),
])
def test_what_cannot_be_is_one_line(capsys, flags, said):
    code = moe.extending.main(flags.split() + ["--dry_run"] * flags.startswith("--"), PROGRAM)
    assert (code, capsys.readouterr().err) == (2, f"error: {said}\n")


@pytest.mark.parametrize("folder, name", [("23-mixture-of-experts", "moe"), ("24-mamba-2", "mamba"),
                                          ("28-linear-recurrences", "recurrences")])
def test_help_is_headed_by_the_programs_name(folder, name, monkeypatch, capsys):
    monkeypatch.undo()
    registered(program(folder, name), monkeypatch)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    said = capsys.readouterr().out
    head = " ".join(said.split("options:")[0].split())
    assert said.startswith(f"usage: {name}.py ") and "train_gpt2_mod.py: " not in head
    assert "the other presets, such as d12, are those of train_gpt2_mod.py" in head and "typed twice the last" in head
    monkeypatch.undo()
    assert script.make_parser().prog == "train_gpt2_mod.py"


def test_a_text_with_the_cache_is_that_without(trainer, monkeypatch, capsys):
    trainer.run(*TINY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    texts = []
    for cache in ([], ["--no_cache"]):
        argv = [ROOT / "tools" / "sample.py", trainer.output, "--max_new_tokens", 12, "--device", "cpu", *cache]
        assert moe.extending.main([str(word) for word in argv], PROGRAM, {moe.MoE, moe.MoEGPT}) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0].splitlines()[0]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing", "--n_shared_expert", 1)], ids=str)
def test_compiled_it_is_the_same_run(trainer, flags):
    flags = (*TINY, "--log_stats", 6, "--val_loss_every", 0, "--no_save_checkpoints", *flags)
    plain, compiled = (steps(trainer.run(*flags, *more).folder) for more in ((), ("--compile",)))
    names = ["train_loss", "router_entropy", "balance_loss", "load_max", "dropped"]
    for one, two in zip(plain, compiled, strict=True):
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(trainer, parallel):
    flags = [*TINY, "--balance", "bias", "--log_stats", 6, "--no_save_checkpoints"]
    alone = trainer.run(*flags).folder
    output = trainer.output.parent / "two"
    flags = trainer.flags(*flags, "--batch_size", 1, "--parallel", parallel, "--output_dir", output)
    result = torchrun(PROGRAM, *flags)
    assert result.returncode == 0, result.stderr
    folder, = output.iterdir()
    names = ["train_loss", "router_entropy", "load_max", "dropped"]
    for one, two in zip(steps(alone), steps(folder), strict=True):
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)


def test_the_router_is_not_rounded_backward():
    assert not rounds_backward(config_of()) and rounds_backward(small_config())
    assert torch._functorch.config.backward_pass_autocast == "same_as_forward"
