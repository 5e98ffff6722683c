"""The memory plan: what it takes a block to keep against what torch.compile's partitioner does keep."""
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers import shrunk_preset
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import train_gpt2_mod as script

T = 128


def bytes_kept(config):
    """Of all that the trunk's forward pass leaves to the backward pass, each piece of memory once; parameters not."""
    torch._dynamo.reset()

    def plain(graph, inputs):
        return make_boxed_func(graph.forward)

    model = script.GPT(config)
    backend = aot_autograd(fw_compiler=plain, bw_compiler=plain, partition_fn=min_cut_rematerialization_partition,
                           decompositions=select_decomp_table())
    with torch.autocast("cpu", torch.bfloat16):
        x, = torch.compile(model.trunk, backend=backend, dynamic=False)(torch.randint(61, (1, T)))
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    node = next(node for node in nodes_of(x) if hasattr(node, "saved_tensors"))
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in node.saved_tensors}
    torch._dynamo.reset()
    return sum(size for pointer, size in memory.items() if pointer not in own)


def nodes_of(x):
    nodes = [x.grad_fn]
    for node in nodes:
        yield node
        nodes += [following for following, _ in node.next_functions if following is not None]


# Without MLA: on the CPU its unequal heads take another kernel, which keeps the scores.
@pytest.mark.parametrize("preset, changes", [
    ("d12_gqa", {}), ("d12", dict(gradient_checkpointing=True)),
    *(pytest.param(preset, changes, marks=pytest.mark.slow) for preset, changes in (
        ("gpt2", {}), ("sized", dict(precision="fp8")), ("d12", {}), ("d12_post_norm", {}), ("d12_swiglu", {}),
        ("d12_post_norm_qk_norm", {}), ("sized", {}), ("d12", dict(mlp="relu2")), ("d12", dict(precision="fp8")),
        ("d12_fast", dict(value_embeddings=0)), ("d12", dict(attention_gate=12)))),
])
def test_a_block_keeps_what_the_plan_says(preset, changes):
    shape = dict(n_embd=64, n_head=4, ffn_hidden=160, dropout=0.0, precision="bf16")
    counts = dict(d12_gqa=2, sized=2).get(preset, 4)
    kept = []
    for n_layer in (2, 3):
        config = shrunk_preset(preset, **{**shape, "n_kv_head": counts, "n_layer": n_layer, **changes})
        kept.append(bytes_kept(config))
    matrices = sum(p.numel() for p in script.GPT(config).transformer.h[0].parameters() if p.dim() == 2)
    again = config.gradient_checkpointing or config.precision == "fp8"  # cast again, not kept
    found = (kept[1] - kept[0] - (0 if again else 2 * matrices)) / T
    planned = script.kept_by_block(config) if not config.gradient_checkpointing else 2 * 64
    assert planned == pytest.approx(found, rel=0.04, abs=40 if config.gradient_checkpointing else None)
