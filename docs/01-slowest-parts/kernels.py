#!/usr/bin/env python3
"""Time the loss's kernel and the kernels of windowed attention alone: README.md's two comparisons of kernels.

    python docs/01-slowest-parts/kernels.py

Needs a GPU; a minute on an H100. Prints milliseconds, means of 20 calls after 3.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "data")]
import train_gpt2_mod as script  # noqa: E402
from shards import exit_code, require  # noqa: E402

CHOICES = ((1, 8192, 16), (2, 8192, 16), (3, 8192, 16), (4, 8192, 16), (2, 8192, 32))  # rows, block, warps
WINDOWS = {1024: (128, 256, 512), 4096: (128, 1024, 2048)}
HEADS, SIZE, TOKENS = 12, 64, 65536


def ms(call):
    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 20


def losses(n=16384, V=50257, columns=50304):
    """The loss's kernel on one part, by rows of a multiprocessor, warps, targets a token and soft-cap."""
    logits = torch.randn(n, columns, device="cuda").bfloat16()
    gradient8 = torch.empty_like(logits, dtype=torch.float8_e5m2)
    fused = script.fused_softmax_losses(logits.device)
    known = fused.func.__globals__
    for targets_each, softcap in ((1, 0.0), (4, 0.0), (1, 15.0)):
        targets = torch.randint(V, (targets_each, n), device="cuda")
        weights = torch.rand(targets_each, device="cuda").softmax(0)
        for known["ROWS_AT_ONCE"], known["BLOCK"], known["WARPS"] in CHOICES:
            both = ms(lambda: fused(logits, targets, weights, V, 0.0, softcap, logits))
            alone = ms(lambda: fused(logits, targets, weights, V, 0.0, softcap))
            with8 = ms(lambda: fused(logits, targets, weights, V, 0.0, softcap, logits, gradient8))
            print(f"{known['ROWS_AT_ONCE']} rows, {known['WARPS']} warps, {targets_each} targets, soft-cap {softcap:g}: "
                  f"{both:.2f}, with the gradient in float8 too {with8:.2f}, without any {alone:.2f}")
    copy = torch.empty_like(logits)
    print(f"a copy of the logits: {ms(lambda: copy.copy_(logits)):.2f}")


def forward_and_backward(attend, tensors):
    dy = torch.randn_like(attend(*tensors))
    return ms(lambda: torch.autograd.grad(attend(*tensors), tensors, dy))


def attention(T):
    """Full and windowed attention of q, k, v (B, T, heads, size), as the network lays them out."""
    def heads_first(function, **settings):
        return lambda *tensors: function(*(z.transpose(1, 2) for z in tensors), **settings)

    tensors = [torch.randn(TOKENS // T, T, HEADS, SIZE, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    full = heads_first(F.scaled_dot_product_attention, is_causal=True)
    print(f"T={T}, full: {forward_and_backward(full, tensors):.2f}")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        print(f"T={T}, full, flash: {forward_and_backward(full, tensors):.2f}")
    starts = torch.arange(0, TOKENS + 1, T, device="cuda", dtype=torch.int32)
    for window in WINDOWS[T]:
        mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, T, T, device="cuda")
        flex = torch.compile(heads_first(flex_attention, block_mask=mask), dynamic=False)
        flat = lambda *qkv: varlen_attn(  # noqa: E731
            *(z.flatten(0, 1) for z in qkv), starts, starts, T, T, window_size=(window - 1, 0))
        print(f"T={T}, window {window}, flex: {forward_and_backward(flex, tensors):.2f}, varlen_attn: "
              f"{forward_and_backward(flat, tensors):.2f}")


def main():
    require(torch.cuda.is_available(), "no CUDA device, and these are a GPU's kernels; run it where there is one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    losses()
    for length in WINDOWS:
        attention(length)


if __name__ == "__main__":
    sys.exit(exit_code(main))
