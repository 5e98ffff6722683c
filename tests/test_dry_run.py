"""--dry_run: every command line of the owner's documents, and the numbers that it says."""
import argparse
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo  # meta tensors import it, and importing it makes torch's own cache folder
from launch import ROOT, SCRIPT, one_process, snapshot, some_tokens, write_shard

import train_gpt2_mod as script

LISTED = [line.split(" | ") for line in (Path(__file__).parent / "spec_commands.txt").read_text().splitlines()
          if line[0] != "#"]
# What a document's lines without a model are about.
MODELS = {
    "model_size_configurations.md": "sized", "experiments_and_optimizations.md": "gpt2-medium",
    "changelog_mtp_gqa_precision.md": "d12", "mlp3x_usage_example.md": "d12_mlp3x",
}


def flags_of(document, command):
    """[(arguments of the script, processes)] of a listed line; a choice [a|b] makes one each."""
    found = []
    for choice in re.findall(r"\[(.*)\]", command) or [""]:
        for word in choice.split("|"):
            parts = shlex.split(re.sub(r"\[.*\]", word, command), comments=True)
            processes, start = 1, 0
            if parts[0] == "torchrun":
                start = parts.index("train_gpt2_mod.py") + 1
                processes = int(next(p for p in parts if p.startswith("--nproc_per_node=")).partition("=")[2])
            elif parts[0] == "python":
                assert parts[1] == "train.py"
                start = 2
            flags = ["12" if part == "X" else part for part in parts[start:]]
            named = any(flag.startswith("--model") for flag in flags)
            found.append((flags if named else ["--model", MODELS[document], *flags], processes))
    return found


COMMANDS = [(document, flags, processes) for document, command in LISTED
            for flags, processes in flags_of(document, command)]


@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """A dry run in an empty folder where nothing may be written and no GPU is asked for; gives code, lines, stderr."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(here))

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run needs no GPU and no process group")

    for place, names in ((torch.cuda, ("is_available", "get_device_capability", "current_device", "init")),
                         (torch.distributed, ("init_process_group",)), (script, ("World", "open_log"))):
        for name in names:
            monkeypatch.setattr(place, name, refuse)

    def run(*flags):
        before = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = script.main([*map(str, flags), "--dry_run"])
        out, err = capsys.readouterr()
        assert (snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == before, "something was written"
        return code, out.splitlines(), err

    return run


def amount(lines, pattern):
    """The number that a pattern's first group finds in the lines."""
    return float(re.search(pattern, "\n".join(lines))[1].replace(",", ""))


def table(lines):
    """{part: (parameters, MFLOP forward, MFLOP backward)}."""
    parts = ("embedding", "attention", "mlp", "norms", "head", "total")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()[0] in parts and len(line.split()) == 4}
    assert tuple(rows) == parts
    return {part: tuple(float(number.replace(",", "")) for number in row) for part, row in rows.items()}


def sized_count(flags):
    """Parameters by the document's own formula, of what is typed and what it says of the rest."""
    parser = argparse.ArgumentParser()
    for flag, default in dict(d_model=768, n_layers=12, n_heads=0, n_kv_heads=0, ffn_hidden=0).items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    typed, _ = parser.parse_known_args(flags)
    d, f = typed.d_model, typed.ffn_hidden or typed.d_model * 8 // 3
    heads = typed.n_heads or d // 64
    kv_heads = typed.n_kv_heads or max(k for k in (1, 2, 3, 4) if heads % k == 0)
    attention = d * (d + 2 * kv_heads * (d // heads) + d)
    return 32768 * d + typed.n_layers * (attention + 3 * d * f + 2 * d) + d


def expected_count(document, flags):
    if flags[:2] == ["--model", "sized"]:
        return sized_count(flags)
    words = " ".join(flags)
    if "gpt2-medium" in words:
        L, C, V, T = 24, 1024, 50257, 1024
        norms, weights = 2 * L + 1, (V + T) * C + L * (12 * C * C + 9 * C) + (2 * L + 1) * 2 * C
        return weights - (norms * C if "rmsnorm" in words else 0) - (T * C if "use-rope" in words else 0)
    if "gqa_enabled" in words:
        C, K = (864, 4) if "n_kv_head" in words else (864, 3)
        return 50257 * C + 12 * (2 * C * C + 2 * C * K * 72 + 8 * C * C)
    return 124_880_704 if "d12_mlp3x" in words else 123_532_032


@pytest.mark.parametrize("document, flags, processes", COMMANDS, ids=[f"{d[:9]} {' '.join(f)}" for d, f, _ in COMMANDS])
def test_every_command_of_the_documents_has_a_dry_run(dry, monkeypatch, document, flags, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    code, lines, err = dry(*flags)
    assert (code, err) == (0, "")
    count = expected_count(document, flags)
    assert amount(lines, r"parameters: ([\d,]+)") == table(lines)["total"][0] == count
    assert ("precision fp8" in lines[0]) == ("--use_fp8" in flags)
    config, run, _ = script.resolve(script.parse_flags(flags), script.ANY_MACHINE._replace(world_size=processes))
    assert amount(lines, r"([\d,]+) tokens a step") == run.tokens_per_step
    typed = script.parse_flags(flags)
    assert run.grad_accumulation_steps == typed.get("grad_accumulation_steps", processes)
    assert all(getattr(config, name, value) == value for name, value in typed.items() if name not in ("precision",))


@pytest.mark.parametrize("flags", [
    "--model d12", "--model gpt2", "--model sized_small", "--model d12_mla", "--model d12 --no_tie_embeddings",
    "--model d12 --mtp_enabled --mtp_heads separate --mtp_max_steps 3", "--model gpt2-medium --use-rmsnorm",
])
def test_the_parts_add_up(dry, flags):
    code, lines, _ = dry(*flags.split())
    rows = table(lines)
    total = rows.pop("total")
    assert code == 0 and sum(row[0] for row in rows.values()) == total[0]
    for i in (1, 2):
        assert sum(row[i] for row in rows.values()) == pytest.approx(total[i], abs=0.3)  # each is rounded to 0.1
    for _, forward, backward in [*rows.values(), total]:
        assert backward == pytest.approx(2 * forward, abs=0.2)
    assert amount(lines, r"without the embedding ([\d,]+)") == total[0] - rows["embedding"][0]
    memory = next(line for line in lines if line.startswith("memory plan"))
    parts = [float(n.replace(",", "")) for n in re.findall(r"[a-z]+ ([\d,]+)[,)]", memory)]
    assert amount([memory], r": ([\d,]+) MiB") == pytest.approx(sum(parts), abs=len(parts)) and len(parts) >= 4


def test_what_counts_as_which_part(dry):
    rows = table(dry("--model", "gpt2")[1])
    attention, mlp = 12 * (4 * 768**2 + 4 * 768), 12 * (8 * 768**2 + 5 * 768)
    counts = dict(embedding=(50257 + 1024) * 768, attention=attention, mlp=mlp, norms=(2 * 12 + 1) * 2 * 768, head=0)
    assert {part: rows[part][0] for part in counts} == counts
    rows = table(dry("--model", "d12", "--no_tie_embeddings")[1])
    assert rows["head"][0] == rows["embedding"][0] == 50257 * 768 and rows["norms"] == (0, 0, 0)
    assert rows["head"][1] == pytest.approx(2 * 50257 * 768 / 1e6, abs=0.05)


def plan_of(*flags, steps=2):
    flags = ["--model", "sized", "--grad_accumulation_steps", steps, *flags]
    config, run, _ = script.resolve(script.parse_flags([str(flag) for flag in flags]), script.ANY_MACHINE)
    with torch.device("meta"):
        model = script.GPT(config)
    return script.memory_plan(config, run, model), model.parameter_count()


def test_the_memory_plan_scales_as_memory_does():
    base, count = plan_of()
    assert all(size > 0 for size in base.values())
    casts = base["weights"] - 4 * count  # the blocks' matrices in bf16
    assert casts == 2 * 12 * (768 * 1280 + 768**2 + 3 * 768 * 2048)
    assert (base["gradients"], base["optimizer"]) == (4 * count, 8 * count)
    for flags in (("--batch_size", 16), ("--sequence_length", 2048)):
        double, _ = plan_of(*flags)
        for part, size in double.items():
            if part != "head":
                assert size == base[part] * (2 if part == "activations" else 1), part
    assert plan_of(steps=4)[0] == base
    alone = plan_of(steps=1)[0]  # whose gradients take the place of activations
    assert alone["gradients"] < base["gradients"] and {**alone, "gradients": base["gradients"]} == base
    assert plan_of("--batch_size", 1, "--sequence_length", 16, steps=1)[0]["gradients"] > 0.3 * base["gradients"]
    parts = {p: plan_of("--precision", p)[0] for p in ("fp32", "bf16", "fp16", "fp8", "fp8_head")}
    assert parts["fp32"]["activations"] > parts["fp16"]["activations"] > base["activations"]  # fp16's stream is fp32
    assert base["activations"] == parts["fp8_head"]["activations"] > parts["fp8"]["activations"]
    assert parts["fp32"]["head"] > parts["fp8_head"]["head"] == parts["fp8"]["head"] > base["head"]
    again, _ = plan_of("--gradient_checkpointing")
    assert again["activations"] < 0.5 * base["activations"] and again["weights"] == 4 * count
    deep, heads = plan_of("--n_layer", 24)[0], plan_of("--mtp_enabled", "--mtp_heads", "separate")[0]
    assert deep["activations"] == 2 * base["activations"]
    assert heads["activations"] > base["activations"] and heads["head"] > base["head"]


def test_a_block_that_is_run_again_needs_its_room_beside_the_streams():
    """It has that of the logits, which are gone by then, and where it is larger, more."""
    streams = 12 * 8 * 1024 * 2 * 768
    assert plan_of("--gradient_checkpointing")[0]["activations"] == streams
    block, logits = plan_of("--vocab_size", 1024)[0]["activations"] // 12, 2 * 8 * 1024 * 1024
    assert block > logits
    assert plan_of("--gradient_checkpointing", "--vocab_size", 1024)[0]["activations"] == streams + block - logits


def test_the_plan_of_the_head_is_its_parts():
    """8 x 1024 tokens of d12: all their logits are 412 M numbers and one part. Sixteen times as many tokens are seven."""
    head = plan_of("--model", "d12")[0]["head"]
    matrix, C, tokens = 50257 * 768, 768, 8 * 1024
    assert head == 2 * tokens * 50257 + (2 + 4) * matrix + 2 * 2 * tokens * C
    own = plan_of("--model", "d12", "--mtp_enabled", "--mtp_heads", "separate", "--mtp_max_steps", 4)[0]["head"]
    assert own == head + 3 * (4 * matrix + 2 * 2 * tokens * C)  # each head's gradients wait for the backward pass
    assert plan_of("--model", "d12", "--batch_size", 1)[0]["head"] == (4 + 2 + 4) * matrix + 2 * 2 * 1024 * C
    tokens *= 16
    large = plan_of("--model", "d12", "--batch_size", 128)[0]["head"]
    assert large == 2 * 18736 * 50257 + (2 + 4) * matrix + 2 * 2 * tokens * C


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_tokens_and_hours_are_those_of_all_processes(dry, monkeypatch, tmp_path, world_size):
    """By hand: 4,768 steps of 524,288 tokens at 500,000 tokens/s are 4,999.6 s on one GPU."""
    flops = 854_438_400  # of d12 at 1,024 tokens
    rows = [
        dict(batch_size=64, gpu="Fast", model="d12", precision="fp32", flops_per_token=flops, tokens_per_second=20),
        dict(batch_size=64, gpu="Fast", model="d12", precision="bf16", flops_per_token=flops,
             tokens_per_second=500_000),
        dict(batch_size=64, gpu="Fast", model="d24", precision="bf16", flops_per_token=3 * flops, tokens_per_second=10),
        # Of the two others one is nearer: half of twice the FLOPs is as fast again.
        dict(batch_size=64, gpu="Slow", model="d24", precision="bf16", flops_per_token=2 * flops,
             tokens_per_second=50_000),
        dict(batch_size=64, gpu="Slow", model="d48", precision="bf16", flops_per_token=9 * flops, tokens_per_second=30),
        dict(batch_size=64, gpu="Other", model="d12", precision="fp32", flops_per_token=flops, tokens_per_second=40),
    ]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "measured.json").write_text(json.dumps(dict(runs=rows)))
    monkeypatch.setattr(script, "__file__", str(tmp_path / "train_gpt2_mod.py"))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    code, lines, _ = dry(*"--model d12 --batch_size 64 --total_batch_size 524288 --num_iterations 4768".split())
    assert code == 0 and "524,288 tokens a step, 2,499,805,184 in 4,768 steps" in lines
    hours = 4768 * 524288 / 500_000 / 3600 / world_size
    found = [line for line in lines if line.startswith("on ")]
    assert found == [
        f"on {world_size} x Fast: {hours:.3g} hours at 500,000 tokens/s each (measured with batches of 64)",
        f"on {world_size} x Slow: {5 * hours:.3g} hours at 100,000 tokens/s each "
        "(estimated by the FLOP/s of d24 in bf16)",
    ]
    code, lines, _ = dry(*"--model d12_gqa --total_batch_size 524288 --batch_size 64".split())
    assert code == 0 and not any("(measured" in line for line in lines)  # another network of nearly as many FLOPs
    assert sum(line.startswith("on ") for line in lines) == 2
    for flags in ("--precision fp16", "--device cpu"):  # of which nothing is known
        assert not any(line.startswith("on ") for line in dry("--model", "d12", *flags.split())[1])


def test_without_measurements_there_are_no_hours(dry, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "train_gpt2_mod.py"))
    code, lines, _ = dry("--model", "tiny")
    assert code == 0 and not any(re.search(r"[\d.]+ hours", line) for line in lines)


def test_the_vocabulary_is_the_shards_where_there_are_any(dry, tmp_path):
    _, lines, _ = dry("--model", "tiny", "--input_bin", tmp_path / "*.bin")
    assert amount(lines, r"parameters: ([\d,]+)") == 7_219_328
    write_shard(tmp_path / "train.bin", some_tokens(300, 0))
    code, lines, _ = dry("--model", "tiny", "--input_bin", tmp_path / "*.bin")
    assert code == 0 and amount(lines, r"parameters: ([\d,]+)") == 819_328
    code, _, err = dry("--model", "tiny", "--input_bin", tmp_path / "*.bin", "--vocab_size", 999)
    assert code == 2 and err.startswith("error: vocab_size=999 differs from the shards' vocabulary of 257")


def test_on_a_cpu(dry):
    code, lines, _ = dry("--model", "tiny", "--device", "cpu")
    assert code == 0 and "precision fp32" in lines[0]


@pytest.mark.parametrize("flags, message", [
    ("--n_head 5", "n_embd=768 must be a multiple of n_head=5"),
    ("--model nope", "model=nope is not known"),
    ("--nope", "--nope is not a flag"),
    ("--device tpu", "device=tpu is not known"),
    ("--device cpu --attention flash", "attention=flash needs CUDA"),
    ("--device cpu --use_fp8", "precision=fp8 needs a GPU"),
    ("--device cpu --precision fp16", "precision=fp16 needs CUDA"),
    ("--sequence_length 2048 --model gpt2", "sequence_length=2048 is longer than the n_positions=1024"),
    ("--total_batch_size 100", "total_batch_size=100 must be a multiple"),
    ("--device cpu --batch_size auto", "batch_size=auto keeps the tokens a step"),
    ("--device cpu --batch_size auto --total_batch_size 1000", "total_batch_size=1000 must be a multiple"),
    ("--nan_policy stop --nan_limit 2", "nan_limit=2 would be ignored"),
    ("--no_save_checkpoints --keep_last 2", "keep_last=2 would be ignored"),
    ("--resume nowhere.pt", "resume="),
    ("--init_from nowhere.pt", "init_from=nowhere.pt does not exist"),
])
def test_what_a_run_refuses_its_dry_run_refuses(dry, flags, message):
    code, lines, err = dry(*flags.split())
    assert (code, lines) == (2, []) and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_batch_size_that_is_found_is_that_of_the_gpu_there_is(tmp_path, monkeypatch, capsys):
    """The one flag for which a dry run asks a GPU, and the one that it refuses without."""
    flags = ["--model", "tiny", "--total_batch_size", str(2**19), "--input_bin", str(tmp_path / "*.bin"), "--dry_run"]
    for free in (2**31, 2**33):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (free, 2**37))
        assert script.main(["--batch_size", "auto", *flags]) == 0
        out = capsys.readouterr().out
        said = re.search(r"^batch_size=(\d+): a plan of ([\d,]+) MiB, with room for ([\d,]+); val_batch", out, re.M)
        size, plan, room = (int(number.replace(",", "")) for number in said.groups())
        assert plan <= room == round(0.9 * free / 2**20) and 2**9 % size == 0
        assert f"memory plan of one GPU at its peak, {size} x 1024 tokens a micro-batch: {plan:,} MiB" in out
        assert f"tokens per step: 524,288 = {2**9 // size} x {size} x 1024" in out
        assert script.main(["--batch_size", str(2 * size), *flags]) == 0
        assert int(re.search(r"micro-batch: ([\d,]+) MiB", capsys.readouterr().out)[1].replace(",", "")) > room
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--batch_size", "auto", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: batch_size=auto needs a device that says how much memory is free")


@pytest.mark.parametrize("world_size", ["x", "0", "-1"])
def test_a_world_that_is_none_is_refused_in_one_line(dry, monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    code, _, err = dry("--model", "tiny")
    assert code == 2 and re.fullmatch(r"error: .*WORLD_SIZE.*torchrun.*\n", err)


def test_processes_share_the_micro_batches(dry, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert amount(dry("--batch_size", 2)[1], r"([\d,]+) tokens a step") == 4 * 2 * 1024
    code, _, err = dry("--grad_accumulation_steps", 6)
    assert code == 2 and "multiple of their number, 4; try 4 or 8" in err
    monkeypatch.setenv("RANK", "1")
    assert dry("--model", "tiny") == (0, [], "")  # the first process says it


def test_a_dry_run_of_a_checkpoint_is_of_its_network(trainer, monkeypatch):
    folder = trainer.run("--save_every", 3, "--ffn_hidden", 100).folder
    before = snapshot(trainer.output)
    for flag in ("--resume", "--init_from"):
        result = trainer.main(flag, folder / "step000003.pt", "--dry_run", "--input_bin", trainer.data / "train_*.bin")
        count = 257 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 100)
        assert result.code == 0 and f"parameters: {count:,}, without" in result.out
        result = trainer.main(flag, folder / "step000003.pt", "--dry_run", "--n_layer", 3)
        assert result.code == 2 and "holds another network" in result.err
    result = trainer.main(*trainer.flags("--resume", "auto", "--dry_run"))
    assert result.code == 0
    assert snapshot(trainer.output) == before


# In a process of its own, in which writing, connecting and starting others is an error.
PROBE = """
import os, sys
sys.path.insert(0, ROOT)
import torch._dynamo  # importing it makes torch's own cache folder
import train_gpt2_mod

def watch(event, args):
    if event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        raise AssertionError(f"opens {args[0]} for writing")
    if event in ("subprocess.Popen", "os.system", "socket.connect", "socket.bind", "os.mkdir", "os.rename"):
        raise AssertionError(f"does {event} {args}")

sys.addaudithook(watch)
sys.exit(train_gpt2_mod.main(sys.argv[1:]))
"""


def test_of_a_card_that_is_not_there(dry):
    for gib, size in ((24, 32), (22, 32), (21, 16), (60, 64)):
        code, lines, _ = dry("--model", "d12_fast", "--device", "cuda", "--batch_size", "auto", "--memory_gib", gib)
        assert code == 0 and any(line.startswith(f"batch_size={size}: a plan of ") for line in lines)


def test_under_torchrun_without_a_gpu_it_starts_and_writes_nothing(tmp_path):
    """The environment that torchrun makes; nobody listens at its address."""
    environment = dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
                       CUDA_VISIBLE_DEVICES="")
    command = ["--model", "sized_medium", "--use_fp8", "--compile", "--log_wandb", "--dry_run"]
    for rank in ("0", "3"):
        result = one_process(sys.executable, "-B", "-c", PROBE.replace("ROOT", repr(str(ROOT))), *command, cwd=tmp_path,
                             RANK=rank, **environment)
        assert (result.returncode, result.stderr) == (0, "")
        assert ("parameters: 398,509,056, without" in result.stdout) == (rank == "0") == bool(result.stdout)
    result = one_process(sys.executable, SCRIPT, "--model", "tiny", "--dry_run", cwd=tmp_path)
    assert result.returncode == 0 and "parameters: 7,219,328" in result.stdout
    assert not list(tmp_path.iterdir())
