#!/usr/bin/env python3
"""Check d12_mlp3x: parameter counts, forward and backward pass, the MLP's reduction, backward compatibility.

    python docs/02-mlp-3x-optimization/test_mlp3x.py

Needs no data and no GPU. Ends with code 1 at the first check that fails.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from train_gpt2_mod import GPT, MLP, GPTConfig, SwiGLUMLP, base_configs  # noqa: E402


def check(what, found, expected):
    if found != expected:
        sys.exit(f"FAILED: {what} is {found}, not {expected}")
    print(f"✓ {what}: {found:,}" if type(found) is int else f"✓ {what}")


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def mlp_parameters(model):
    return sum(parameters(block.mlp) for block in model.transformer.h)


def on_meta(**fields):
    with torch.device("meta"):
        return GPT(GPTConfig(**fields))


def test_expansion_factor():
    print("Testing MLP expansion factor configuration...")
    small = dict(n_layer=2, n_head=2, n_embd=128)
    four, three = (mlp_parameters(on_meta(**small, mlp_expansion_factor=factor)) for factor in (4, 3))
    check("4× expansion, parameters", four, 2 * 2 * 128 * 512)
    check("3× expansion, parameters", three, 2 * 2 * 128 * 384)
    check("the reduction is 25%", four - three, four // 4)
    config = GPTConfig(**small, mlp_expansion_factor=3)
    check("SwiGLU follows the factor too, parameters", parameters(SwiGLUMLP(config)), 3 * 128 * 384)


def test_d12_mlp3x():
    print("\nTesting the d12_mlp3x configuration...")
    config = GPTConfig(**base_configs["d12_mlp3x"])
    check("n_embd", config.n_embd, 832)
    check("n_head", config.n_head, 13)
    check("head size", config.head_dim, 64)
    check("MLP hidden width", config.ffn_hidden, 2496)
    check("post_norm and qk_norm are on", (config.post_norm, config.qk_norm), (True, True))
    torch.manual_seed(0)
    model = GPT(config)
    ids = torch.randint(config.vocab_size, (1, 17))
    logits, loss = model(ids[:, :-1], {"target_1": ids[:, 1:]})
    check("logits are (1, 16, 50257)", tuple(logits.shape), (1, 16, 50257))
    by_hand = torch.nn.functional.cross_entropy(logits[0].detach().double(), ids[0, 1:]).item()
    check("the loss is the logits' cross-entropy", abs(loss.item() - by_hand) < 1e-4, True)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    check("every parameter has a finite gradient", all(g is not None and g.isfinite().all() for g in grads), True)


def test_sizes():
    print("\nComparing model sizes...")
    d12, mlp3x = on_meta(**base_configs["d12"]), on_meta(**base_configs["d12_mlp3x"])
    base, ours = d12.parameter_count(), mlp3x.parameter_count()
    check("d12 baseline, parameters", base, 123_532_032)
    check("d12_mlp3x, parameters", ours, 124_880_704)
    print(f"  Difference: {ours - base:+,} ({100 * (ours / base - 1):+.2f}%)")
    per_layer = [mlp_parameters(model) // 12 for model in (d12, mlp3x)]
    check("MLP of a d12 layer, parameters", per_layer[0], 4_718_592)
    check("MLP of a d12_mlp3x layer, parameters", per_layer[1], 4_153_344)
    print(f"  MLP layer reduction: {100 * (1 - per_layer[1] / per_layer[0]):.1f}%")
    flops = [model.flops_per_token(1024) for model in (d12, mlp3x)]
    print(f"  FLOPs of a token at T = 1024: {flops[0] / 1e6:.1f} M and {flops[1] / 1e6:.1f} M "
          f"({100 * (flops[1] / flops[0] - 1):+.1f}%)")


def test_backward_compatibility():
    print("\nTesting backward compatibility...")
    check("without the field the expansion is 4×, hidden width", GPTConfig().ffn_hidden, 3072)
    check("d12 is the default network", GPTConfig(**base_configs["d12"]), GPTConfig())
    torch.manual_seed(0)
    plain = MLP(GPTConfig(n_embd=64, n_head=1))
    torch.manual_seed(0)
    explicit = MLP(GPTConfig(n_embd=64, n_head=1, mlp_expansion_factor=4))
    x = torch.randn(3, 64)
    check("factor 4 computes what the default does", torch.equal(plain(x), explicit(x)), True)


if __name__ == "__main__":
    test_expansion_factor()
    test_d12_mlp3x()
    test_sizes()
    test_backward_compatibility()
    line = "=" * 70
    print(f"\n{line}\nAll tests passed! ✅\n{line}\n\nYou can now train with: --model=d12_mlp3x")
