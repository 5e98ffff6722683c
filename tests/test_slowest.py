"""docs/01-slowest-parts: the reader of traces on one made by hand, the floors by hand, the commands that it runs."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import train_gpt2_mod as script

ROOT = Path(script.__file__).resolve().parent
FOLDER = ROOT / "docs" / "01-slowest-parts"


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slowest = load(FOLDER / "measure.py", "measure_01")


class Trace:
    """A trace in the making: each kernel is launched inside the calls that are named, outermost first."""

    def __init__(self):
        self.events, self.clock, self.device, self.number = [], 0.0, 1000.0, 0

    def kernel(self, name, ms, calls=(), cat="kernel", gap_ms=0.0, thread=1, dims=()):
        begin, self.number = self.clock, self.number + 1
        for depth, call in enumerate(calls):
            args = {"Input Dims": [list(shape) for shape in dims]} if depth == len(calls) - 1 else {}
            self.events.append(dict(cat="cpu_op", name=call, ts=begin + depth, dur=100 - 2 * depth, tid=thread,
                                    args=args))
        self.events.append(dict(cat="cuda_runtime", name="cudaLaunchKernel", ts=begin + 50, dur=1, tid=thread,
                                args=dict(correlation=self.number)))
        self.device += 1000 * gap_ms
        self.events.append(dict(cat=cat, name=name, ts=self.device, dur=1000 * ms, tid=7,
                                args=dict(correlation=self.number)))
        self.device += 1000 * ms
        self.clock += 200

    def step(self):
        self.events.append(dict(cat="user_annotation", name="ProfilerStep#1", ts=self.clock, dur=1e6, tid=9))


PROGRAM = [  # kernel, calls, shapes, part
    ("triton_per_fused_add_embedding_mean_mul_0", ["CompiledFunction"], (), "embedding"),
    ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_4", ["CompiledFunction"], (), "norms and residual"),
    ("nvjet_hsh_128", ["CompiledFunction", "aten::mm"], [(64, 768), (768, 2304)], "attention"),
    ("triton_poi_fused__to_copy_cat_split_2", ["CompiledFunction"], (), "attention"),
    ("cudnn_generated_fort_native_sdpa", ["aten::_scaled_dot_product_cudnn_attention"], (), "attention"),
    ("nvjet_hsh_256", ["CompiledFunction", "aten::mm"], [(64, 768), (768, 3072)], "mlp"),
    ("triton_poi_fused_gelu_6", ["CompiledFunction"], (), "mlp"),
    ("nvjet_hsh_256", ["HeadLoss", "aten::matmul", "aten::mm"], [(64, 768), (768, 50304)], "head and loss"),
    ("softmax_losses_kernel", ["HeadLoss"], (), "head and loss"),
    ("vectorized_elementwise_kernel", ["HeadLossBackward", "aten::mul"], (), "head and loss"),
    ("nvjet_hsh_64", ["CompiledFunctionBackward", "aten::mm"], [(2304, 64), (64, 768)], "attention"),
    ("vectorized_elementwise_kernel", ["torch::autograd::AccumulateGrad", "aten::add_"], (), "gradients"),
    ("vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", [], (), "gradients"),
    ("multi_tensor_apply_kernel", ["Optimizer.step#AdamW.step", "aten::_fused_adamw_"], (), "optimizer"),
    ("multi_tensor_apply_kernel", ["aten::_foreach_norm"], (), "optimizer"),
    ("ncclDevKernel_AllReduce", ["c10d::allreduce_"], (), "communication"),
    ("mystery_kernel", ["aten::mystery"], (), "not attributed"),
]


@pytest.mark.parametrize("steps", [1, 3])
def test_kernels_are_attributed_and_gaps_counted(steps):
    trace, expected = Trace(), dict.fromkeys(slowest.PARTS, 0.0)
    trace.step()
    trace.kernel("mystery_kernel", 7.0, ["aten::mystery"], gap_ms=9)  # of the first step, which does not count
    for step in range(steps):
        trace.step()
        for i, (name, calls, dims, part) in enumerate(PROGRAM):
            trace.kernel(name, 0.5 + i / 16, calls, dims=dims, gap_ms=0.25 if i == 3 else 0)
            expected[part] += 0.5 + i / 16
        trace.kernel("Memcpy HtoD (Pinned -> Device)", 0.125, ["aten::copy_"], cat="gpu_memcpy")
        expected["data"] += 0.125
        expected["host gaps"] += 0.25
    parts, unknown = slowest.milliseconds_by_part(trace.events, dict(mlp={3072}))
    assert set(parts) == {*slowest.PARTS, "step"} and sum(expected.values()) == pytest.approx(steps * parts["step"])
    for part, ms in expected.items():
        assert parts[part] == pytest.approx(ms / steps), part
    assert unknown["mystery_kernel"] == pytest.approx(0.5 + 16 / 16)


def test_calls_of_another_thread_or_time_do_not_count():
    calls = [dict(name="HeadLoss", ts=0, dur=100, tid=1), dict(name="inner", ts=10, dur=20, tid=1),
             dict(name="late", ts=60, dur=30, tid=1), dict(name="other", ts=0, dur=100, tid=2)]
    around = slowest.enclosing({"a": (15, 1), "b": (40, 1), "c": (40, 2), "d": (200, 1), "e": (5, 3)}, calls)
    assert {key: [event["name"] for event in events] for key, events in around.items()} == {
        "a": ["HeadLoss", "inner"], "b": ["HeadLoss"], "c": ["other"], "d": [], "e": []}


def test_a_trace_of_the_script_can_be_read(trainer):
    """On a CPU there are calls and no kernels: the parts of its products are found as if each launched one."""
    folder = trainer.run("--num_iterations", 8, "--profile").folder
    events = slowest.read_trace(folder / "rank0.pt.trace.json.gz")
    calls = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation") and "dur" in e]
    inside = {i: (e["ts"] + e["dur"] / 2, e["tid"]) for i, e in enumerate(calls) if e["name"] == "aten::mm"}
    around = slowest.enclosing(inside, calls)
    kernel = dict(name="gemm", args={})
    parts = [slowest.part_of(kernel, around[i], dict(mlp={128})) for i in inside]
    assert {"head and loss", "attention", "mlp"} == set(parts)


def test_the_floors_are_what_the_arithmetic_says():
    config, run, _ = script.resolve(script.parse_flags(
        "--model d12 --batch_size 64 --total_batch_size 131072".split()), script.ANY_MACHINE)
    with torch.device("meta"):
        model = script.GPT(config)
    floors = slowest.floors(model, config, run, 800e12, 3e12)
    tokens, width = 131072, 768
    assert floors["mlp"] == pytest.approx(1000 * 6 * 12 * 8 * width**2 * tokens / 800e12)
    assert floors["head and loss"] == pytest.approx(1000 * 6 * 50257 * width * tokens / 800e12)
    assert floors["attention"] == pytest.approx(1000 * tokens * 12 * (6 * 4 * width**2 + 6 * width * 1024) / 800e12)
    assert floors["optimizer"] == pytest.approx(1000 * 40 * 123_532_032 / 3e12)
    assert floors.keys() < set(slowest.PARTS) and all(ms > 0 for ms in floors.values())


@pytest.mark.parametrize("name", [*slowest.EXPERIMENTS, *slowest.PROFILES, *slowest.CURVES])
def test_the_commands_resolve(monkeypatch, name):
    bench = load(ROOT / "tools" / "bench.py", "bench_01")
    if name in slowest.EXPERIMENTS:
        settings, lines = slowest.EXPERIMENTS[name]
        _, found = bench.read_arguments([*settings.split(), *lines, "--", *slowest.COMMON.split()])
        flags = [flags for _, _, flags in found]
        assert len(flags) == len(lines)
    elif name in slowest.PROFILES:
        flags = [f"{slowest.PROFILES[name]} {slowest.COMMON} --num_iterations 15 --profile".split()]
    else:
        flags = [slowest.CURVES[name].split()]
    for words in flags:
        config, run, _ = script.resolve(script.parse_flags(words), script.ANY_MACHINE)
        assert run.tokens_per_step == (4096 if name == "losses" else 524288 if name == "card_of_24_gib" else 131072)


def test_tables_of_results(monkeypatch, tmp_path, capsys):
    common = dict(gpu="A GPU", torch="2.11.0", script_sha256="0", number=0)
    fast = dict(common, name="cold", line="--model d12", step_ms=250.0, tokens_per_second=524288.0, mfu=0.45,
                peak_mem_MB=20000, first_step_s=30.0, ratio=1.0, val_tokens_per_second=None, data_share=0.001,
                flags="--model d12 --batch_size 64 --total_batch_size 131072")
    parts = dict.fromkeys(slowest.PARTS, 1.0) | {"step": float(len(slowest.PARTS))}
    profile = dict(common, name="profile_d12", line="", flags="--model d12", parts=parts, floors=dict(mlp=0.5))
    names = ("earlier_bf16", "now_bf16", "earlier_fp32", "now_fp32")
    losses = {name: [3.0, 2.0 + i / 100] for i, name in enumerate(names)}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        dict(fast, script_sha256="older", step_ms=999.0), fast, profile, dict(common, name="losses", line="", flags="--model d12", losses=losses))))
    monkeypatch.setattr(slowest, "RESULTS", tmp_path / "results.jsonl")
    slowest.main(["--table"])
    out = capsys.readouterr().out
    assert out.startswith("A GPU, torch 2.11.0\n") and "999" not in out  # what an older version took
    assert "| cold | `--model d12` | 250.00 | 524,288 | 45.0% | 20,000 | 30.0 | 1.000 | data 0.10% |" in out
    assert "| mlp | 1.00 | 9.1% | 0.50 |" in out and "| step | 11.00 | 100% | - |" in out
    assert "| earlier, bf16 and now, bf16 | 1.0e-02 | 5.0e-03 | 2.0000 | 2.0100 |" in out
    config, run, _ = script.resolve(script.parse_flags(fast["flags"].split()), script.ANY_MACHINE)
    plan = sum(script.memory_plan(config, run, script.GPT(config)).values()) / 2**20
    assert f"| `--model d12` | {plan:,.0f} | 20,000 | {plan / 20000 - 1:+.1%} |" in out


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        slowest.main([])


def test_the_readmes_tables_are_the_results():
    text = (FOLDER / "README.md").read_text()
    for gpu in {row["gpu"] for row in slowest.results()}:
        assert all(table in text for table in slowest.tables([r for r in slowest.results() if r["gpu"] == gpu]))
    assert ("Not measured yet" in text) == (not slowest.results())
