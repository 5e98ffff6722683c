#!/usr/bin/env python3
"""Time an operation of the network alone, forward and backward: JSON lines, for docs/experiments.py.

    python docs/op_times.py '[["norm", {"kind": "rmsnorm", "dtype": "bfloat16", "compiled": true}]]'

Needs a GPU. The operations take turns, five windows of 20 calls each; milliseconds are of a call, the memory is the
allocator's peak above the inputs.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt2_mod as script  # noqa: E402

TOKENS, WIDTH, HEADS, SIZE = 65536, 1024, 16, 64  # of the norms; of the attention, whose tokens are fewer:
ATTENDING = 16384
WINDOWS, CALLS = 5, 20


def norm(kind, dtype, compiled, device="cuda", tokens=TOKENS):
    """A call that norms (tokens, WIDTH), with weights, and a bias where there is one, and goes back."""
    layer = script.Norm(kind, WIDTH, bias=True).to(device)
    x = torch.randn(tokens, WIDTH, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    forward, dy = torch.compile(layer) if compiled else layer, torch.randn_like(x)
    return lambda: torch.autograd.grad(forward(x), [x, *layer.parameters()], dy)


def attention(kernel, T, device="cuda", tokens=ATTENDING):
    """A call of causal attention on (tokens / T, HEADS, T, SIZE) by one kernel, and back. In float32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(tokens // T, HEADS, T, SIZE, device=device, dtype=dtype, requires_grad=True)
               for _ in range(3))
    dy = torch.randn_like(q)

    def call():
        with script.sdpa_kernel(script.ATTENTION_KERNELS[kernel]):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(y, (q, k, v), dy)

    return call


OPERATIONS = dict(norm=norm, attention=attention)


def window(call):
    """Milliseconds of a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / CALLS


def peak_of(call):
    """MiB above what is there before, of a call that is warm."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main(asked):
    gpu, calls, rows = torch.cuda.get_device_name(), {}, []
    for i, (operation, settings) in enumerate(asked):
        rows.append(dict(operation=operation, settings=settings, gpu=gpu, torch=torch.__version__))
        try:
            call = OPERATIONS[operation](**settings)
            for _ in range(3):
                call()
            rows[i]["peak_MiB"], calls[i] = peak_of(call), call
        except torch.OutOfMemoryError as error:
            rows[i]["failed"] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
    for i in calls:
        rows[i]["windows_ms"] = []
    for _ in range(WINDOWS):
        for i, call in calls.items():
            rows[i]["windows_ms"].append(window(call))
    for i, row in enumerate(rows):
        if i in calls:
            row["ms"] = sorted(row["windows_ms"])[WINDOWS // 2]
        print(json.dumps(row))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device, and these are a GPU's kernels; run it where there is one")
    main(json.loads(sys.argv[1]))
