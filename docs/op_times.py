#!/usr/bin/env python3
"""Time operations of the network alone, forward and backward: JSON lines, for docs/experiments.py.

    python docs/op_times.py '[["norm", {"kind": "rmsnorm", "dtype": "bfloat16", "compiled": true}]]' \\
        '[["attention", {"kernel": "math", "T": 512}], ["attention", {"kernel": "flash", "T": 512}]]'

Needs a GPU. Each argument is a group, whose operations take turns, five windows of 20 calls each; the groups come one
after the other, a line for each operation as soon as its group is measured. Milliseconds are of a call, the memory is
the allocator's peak above the inputs. An operation without room has "failed" in its line, one with another fault
"error".
"""
import gc
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import train_gpt2_mod as script  # noqa: E402
from shards import exit_code, require  # noqa: E402

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


def group(asked):
    """The lines of a group."""
    gpu, calls, rows = torch.cuda.get_device_name(), {}, {}

    def tried(i, measure):
        """measure(i); where it raises, the operation is out."""
        try:
            measure(i)
        except Exception as error:  # whatever it is, the others may do
            kind = "failed" if isinstance(error, torch.OutOfMemoryError) else "error"
            rows[i] = {**about(*asked[i]), kind: f"{type(error).__name__}: {error}".splitlines()[0]}
            calls.pop(i, None)
        if i not in calls:
            free_memory()

    def about(operation, settings):
        return dict(operation=operation, settings=settings, gpu=gpu, torch=torch.__version__)

    def begin(i):
        operation, settings = asked[i]
        call = OPERATIONS[operation](**settings)
        for _ in range(3):
            call()
        rows[i] = dict(about(operation, settings), peak_MiB=peak_of(call), windows_ms=[])
        calls[i] = call

    def time_it(i):
        rows[i]["windows_ms"].append(window(calls[i]))

    for i in range(len(asked)):
        tried(i, begin)
    for _ in range(WINDOWS):
        for i in list(calls):
            tried(i, time_it)
    for i in calls:
        rows[i]["ms"] = sorted(rows[i]["windows_ms"])[WINDOWS // 2]
    return [rows[i] for i in range(len(asked))]


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()


def main(groups):
    require(torch.cuda.is_available(), "no CUDA device, and these are a GPU's kernels; run it where there is one")
    for asked in groups:
        for row in group(asked):
            print(json.dumps(row), flush=True)
        torch.compiler.reset()  # the next group is compiled as in a process of its own
        free_memory()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(list(map(json.loads, sys.argv[1:])))))
