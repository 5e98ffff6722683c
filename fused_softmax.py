"""The losses of logits and their gradient in one Triton kernel, which train_gpt2_mod.py takes on a GPU.

The trainer runs without this file. It stands beside it for its speed: what torch.compile makes of the same arithmetic
works on four rows of a multiprocessor at a time, which at GPT-2's vocabulary are more than the cache of an H100 holds,
and so reads each logit from memory three times. Here only so many rows are worked on as stay in the cache until they
are read again for the gradient: in 16 bits a logit is read from memory once and its gradient written once.
"""
import functools
import math

import torch
import triton
import triton.language as tl

ROWS_AT_ONCE = 2  # of a multiprocessor: rows of 50,304 logits in bf16 are 27 MB on an H100, whose cache has 50
BLOCK, WARPS = 8192, 32  # logits of a row that are read at a time, and by how many warps: two rows fill an H100's 64
LOG2_E = tl.constexpr(1 / math.log(2))
LARGEST_BOUND = 40.0  # the soft-cap up to which exp(z - cap) is a number of fp32 for every z: no maximum is needed
HAS_TANH = torch.cuda.is_available() and torch.version.cuda is not None  # the interpreter knows no GPU's instructions


@triton.jit
def softcapped(x, cap: tl.constexpr):
    """cap tanh(x / cap), near 0 by Taylor's series, since the other form cancels there; with cap 0 and where x is -inf,
    x."""
    if cap > 0:
        u = x / cap
        small = u * (1 - u * u * (1.0 / 3 - u * u * (2.0 / 15)))
        tanh = tl.where(tl.abs(u) < 0.1, small, 1 - 2 / (1 + tl.exp2(u * (2 * LOG2_E))))
        x = tl.where(x > -float("inf"), cap * tanh, x)
    return x


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """To 1e-7, or by the GPU's own instruction (sm_75 and later) to 2^-11 of itself; -1 where x is -inf."""
    if APPROXIMATE:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))
    return y


@triton.jit
def slope(z, cap: tl.constexpr):
    """The derivative of softcapped() where its value is z; 0 where that is -inf."""
    return tl.where(z > -float("inf"), 1 - (z / cap) * (z / cap), 0.0)


@triton.jit
def softmax_losses_kernel(
    logits, targets, weights, losses, gradient, gradient8, n, V, beyond, clamp, K, ignored, scale8,
    CAP: tl.constexpr, KS: tl.constexpr, GRADIENT: tl.constexpr, GRADIENT8: tl.constexpr, BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr, APPROXIMATE: tl.constexpr,
):
    """What softmax_losses() says, of rows program, program + programs, ... Of each 8 logits side by side (16 bytes in 16
    bits, for one thread) the maximum is kept, and the sum of their exponentials below it (Milakov and Gimelshein 2018,
    arXiv:1805.02867); of logits z that a soft-cap has BOUNDED the sum of exp(z - cap), from which `beyond` is taken, the
    part of columns that are no logits."""
    columns = 8 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 8)[None, :]
    k = tl.arange(0, KS)
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        first = tl.cast(row, tl.int64) * V
        # The targets' logits are read before any is overwritten: the maximum below is a barrier for all threads.
        target = tl.load(targets + k * n + row, mask=k < K, other=ignored)
        counted = target != ignored
        z = softcapped(tl.load(logits + first + target, mask=counted, other=0.0).to(tl.float32), CAP)
        top, sums = tl.full([BLOCK // 8], -1e30, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            x = tl.load(logits + first + start + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
            x = x.to(tl.float32)
            if BOUNDED:
                sums += tl.sum(tl.exp2(tanh(x / CAP, APPROXIMATE) * (CAP * LOG2_E) - CAP * LOG2_E), 1)
            else:
                x = softcapped(x, CAP)
                higher = tl.maximum(top, tl.max(x, 1))
                terms = tl.exp2(x * LOG2_E - (higher * LOG2_E)[:, None])
                sums = sums * tl.exp2((top - higher) * LOG2_E) + tl.sum(terms, 1)
                top = higher
        if BOUNDED:
            log2_total = CAP * LOG2_E + tl.log2(tl.sum(sums, 0) - beyond)
        else:
            highest = tl.max(top, 0)
            log2_total = highest * LOG2_E + tl.log2(tl.sum(sums * tl.exp2((top - highest) * LOG2_E), 0))

        loss = log2_total / LOG2_E - z
        tl.store(losses + k * n + row, tl.where(counted, tl.where(loss > clamp, clamp, loss), 0.0), mask=k < K)
        if GRADIENT:
            weight = tl.load(weights + k, mask=k < K, other=0.0).to(tl.float32)
            weight = tl.where(counted & (loss < clamp), weight, 0.0)
            total = tl.sum(weight, 0)
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                x = tl.load(logits + first + start + columns, mask=inside, other=-float("inf"),
                            eviction_policy="evict_first")
                x = x.to(tl.float32)
                if BOUNDED:
                    y = tanh(x / CAP, APPROXIMATE)
                    dx = tl.exp2(y * (CAP * LOG2_E) - log2_total) * (total - total * y * y)
                else:
                    x = softcapped(x, CAP)
                    dx = tl.exp2(x * LOG2_E - log2_total) * total
                    if CAP > 0:
                        dx = dx * slope(x, CAP)
                tl.store(gradient + first + start + columns, dx.to(gradient.dtype.element_ty), mask=inside)
                if GRADIENT8:
                    tl.store(gradient8 + first + start + columns, (dx * scale8).to(gradient8.dtype.element_ty),
                             mask=inside)
            own = tl.sum(tl.where(target[:, None] == target[None, :], weight[None, :], 0.0), 1)
            dz = tl.exp2(z * LOG2_E - log2_total) * total - own
            if CAP > 0:
                dz = dz * slope(z, CAP)
            tl.debug_barrier()  # the targets' elements come last
            tl.store(gradient + first + target, dz.to(gradient.dtype.element_ty), mask=counted)
            if GRADIENT8:
                tl.store(gradient8 + first + target, (dz * scale8).to(gradient8.dtype.element_ty), mask=counted)


@functools.cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def softmax_losses(logits, targets, weights, vocab_size, clamp, softcap, gradient=None, gradient8=None, *, ignored,
                   scale8):
    """train_gpt2_mod.softmax_losses() of contiguous logits, of which those from vocab_size on are lost: `ignored` is the
    target that counts in nothing, scale8 what the gradient in float8 is multiplied by."""
    logits[:, vocab_size:] = -math.inf
    (n, V), K, targets = logits.shape, targets.size(0), targets.contiguous()
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, max(8, triton.next_power_of_2(V)))
    beyond = (triton.cdiv(V, block) * block - vocab_size) * math.exp(-2 * softcap)
    softmax_losses_kernel[(min(n, ROWS_AT_ONCE * multiprocessors(logits.device)),)](
        logits, targets, weights, losses, logits if gradient is None else gradient,
        logits if gradient8 is None else gradient8, n, V, beyond, float(clamp or math.inf), K, ignored,
        float(scale8),
        CAP=float(softcap), KS=triton.next_power_of_2(K), GRADIENT=gradient is not None,
        GRADIENT8=gradient8 is not None, BLOCK=block, BOUNDED=0 < softcap <= LARGEST_BOUND,
        APPROXIMATE=HAS_TANH and gradient8 is not None, num_warps=WARPS)
    return losses
