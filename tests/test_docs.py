"""What the documents say is what the code and the results say."""
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt2_mod as script
from helpers import machine
from launch import SMALL, data_flags, steps, write_data

ROOT = Path(script.__file__).parent
MLP3X, SIZES = ROOT / "docs" / "02-mlp-3x-optimization", ROOT / "docs" / "03-model-sizes"
RESUMING = ROOT / "docs" / "00-checkpoint-resumption"


def program(folder):
    """The measure.py of an experiment."""
    spec = importlib.util.spec_from_file_location(f"measure_{folder.name[:2]}", folder / "measure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measure, sizes, resuming = program(MLP3X), program(SIZES), program(RESUMING)


def parameters(**fields):
    with torch.device("meta"):
        return script.GPT(script.GPTConfig(**fields)).parameter_count()


def table_rows(text):
    """The cells of each table row of a Markdown text whose first cell is a name in backticks."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [[cells[0].strip("`"), *cells[1:]] for cells in rows]


def test_the_readme_lists_every_preset_with_its_numbers():
    section = (ROOT / "README.md").read_text().split("## Presets")[1].split("## Where")[0]
    rows = {cells[0]: cells for cells in table_rows(section)}
    assert list(rows) and set(rows) == set(script.base_configs)
    for name, cells in rows.items():
        c = script.GPTConfig(**script.base_configs[name])
        assert cells[1] == f"{c.n_layer}, {c.n_head}/{c.n_kv_head}, {c.n_embd}"
        assert cells[3] == f"{parameters(**script.base_configs[name]):,}"


def test_the_readme_has_the_means_of_the_results():
    rows = {cells[0]: cells for cells in table_rows((ROOT / "README.md").read_text().split("## Presets")[1])}
    for name in ("d12", "d12_mlp3x"):
        runs = [r for r in measure.results() if (r["model"], r["learning_rate"]) == (name, 6e-4)]
        assert {r["seed"] for r in runs} == {1, 2}
        step, rate, mfu, memory = (
            sum(r[key] for r in runs) / len(runs) for key in ("step_avg_ms", "tokens_per_second", "mfu", "peak_mem_MB")
        )
        found = [float(cell.strip("%").replace(",", "")) for cell in rows[name][4:]]
        assert found == pytest.approx([step, rate, 100 * mfu, memory], abs=0.55, rel=1e-4)


def test_the_tables_of_the_mlp_experiment_are_its_results():
    text = (MLP3X / "README.md").read_text()
    for table in measure.tables(measure.results()).split("\n\n"):
        assert table in text


def test_the_expectations_table_of_the_mlp_experiment_follows_from_its_results():
    text = (MLP3X / "README.md").read_text()
    mean = {}
    for name in ("d12", "d12_mlp3x"):
        runs = [r for r in measure.results() if (r["model"], r["learning_rate"]) == (name, 6e-4)]
        mean[name] = [sum(r[key] for r in runs) / len(runs) for key in ("step_avg_ms", "peak_mem_MB", "val_loss")]
    names = ("step time", "peak memory", "validation loss")
    for row, base, ours in zip(names, mean["d12"], mean["d12_mlp3x"], strict=True):
        line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
        assert f"{100 * (ours / base - 1):.1f}%" in line
        before, after = (float(x.replace(",", "")) for x in re.search(r"([\d.,]+) -> ([\d.,]+)", line).groups())
        assert (before, after) == pytest.approx((base, ours), rel=2e-4)


def test_the_mlp_experiments_own_check_passes_and_prints_the_counts():
    done = subprocess.run([sys.executable, MLP3X / "test_mlp3x.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "123,532,032" in done.stdout and "124,880,704" in done.stdout
    end = "All tests passed! ✅\n" + "=" * 70 + "\n\nYou can now train with: --model=d12_mlp3x\n"
    assert done.stdout.endswith(end)


def test_the_mlp_experiments_own_check_can_fail(tmp_path):
    source = (ROOT / "train_gpt2_mod.py").read_text()
    broken = source.replace("return int(factor * n_embd", "return int(4 * n_embd")
    assert broken != source
    folder = tmp_path / "docs" / "02"
    folder.mkdir(parents=True)
    (tmp_path / "train_gpt2_mod.py").write_text(broken)
    (folder / "test_mlp3x.py").write_text((MLP3X / "test_mlp3x.py").read_text())
    done = subprocess.run([sys.executable, folder / "test_mlp3x.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED" in done.stderr and "All tests passed" not in done.stdout


def test_the_tables_of_the_model_sizes_are_their_results():
    text = (SIZES / "README.md").read_text()
    assert all(table in text for table in sizes.tables(sizes.results()))
    for row in sizes.results():
        config, run, model = sizes.resolved(row["flags"])
        assert row["parameters"] == model.parameter_count() and row["precision"] == config.precision
        assert row["flops_per_token"] == model.flops_per_token(run.sequence_length)
        peak = 1e12 * script.GPU_PEAK_TFLOPS["H100"]
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / peak)


def test_what_the_memory_plan_says_of_blocks_is_near_what_was_measured():
    """With a version of the script whose stream was fp32, and whose head had all logits 1.4 times, or 2.2 times where
    their padding needed a mask or the product was float8's: the plan of the head is of today's version alone."""
    for row in sizes.results():
        config, run, model = sizes.resolved(row["flags"])
        plan, tokens = script.memory_plan(config, run, model), run.batch_size * run.sequence_length
        stream = tokens * config.n_layer * 2 * config.n_embd * 2
        copies = 2.2 if config.precision == "fp8" or config.vocab_size % 128 else 1.4
        then = sum(plan.values()) - plan["head"] + stream + tokens * 2 * copies * config.vocab_size
        assert then / 2**20 == pytest.approx(row["peak_mem_MB"], rel=0.035), row["flags"]
    assert len(sizes.results()) >= 18


def test_what_dry_run_goes_by_is_in_the_results(tmp_path, monkeypatch):
    written = (ROOT / "docs" / "measured.json").read_text()
    monkeypatch.setattr(sizes, "MEASURED", tmp_path / "measured.json")
    sizes.write_measured()
    assert (tmp_path / "measured.json").read_text() == written
    assert {"d12", "gpt2", "sized_small"} <= {row["model"] for row in json.loads(written)["runs"]}


def test_the_tables_of_the_resumption_are_its_results():
    text = (RESUMING / "README.md").read_text()
    for gpu in {row["gpu"] for row in resuming.results()}:
        assert resuming.tables([row for row in resuming.results() if row["gpu"] == gpu]) in text
    for row in resuming.results():
        typed = script.parse_flags(row["flags"].split(" "))
        assert resuming.EXPERIMENTS[row["experiment"]][1] == row["flags"]
        assert row.get("bitwise") in (None, typed.get("deterministic", False)), row


@pytest.mark.slow
def test_a_slurm_job_saves_and_queues_itself_again(tmp_path):
    """The script with a stand-in for scontrol: signalled, it leaves a checkpoint and asks for another job, which goes
    on and, at its end, asks for none."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    scontrol.chmod(0o755)
    shutil.copy(script.__file__, tmp_path)
    path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = dict(os.environ, PATH=path, SLURM_JOB_NAME="job", SLURM_JOB_ID="7", NPROC="2", OMP_NUM_THREADS="1")
    data = data_flags(write_data(tmp_path / "data"))
    command = ["bash", RESUMING / "slurm.sh", *SMALL, *data, "--val_loss_every", "0"]
    with open(tmp_path / "out", "w") as out:
        job = subprocess.Popen([*command, "--num_iterations", "100000"], cwd=tmp_path, env=settings, stdout=out,
                               stderr=out)
        while not any(path.stat().st_size for path in tmp_path.glob("logs/job/*/metrics.jsonl")):
            assert job.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        job.wait(60)
    folder, = tmp_path.glob("logs/job/*")
    saved, = folder.glob("step*.pt")
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    last = str(script.step_of(saved) + 3)
    flags = ["--warmdown_iters", "0", "--num_iterations", last]
    done = subprocess.run([*command, *flags], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(steps(folder)) == int(last) and (tmp_path / "asked").read_text() == "requeue 7\n"


def training_commands():
    """Every command of a document that runs the script, with the document's name."""
    for path in sorted((ROOT / "docs").glob("*/*.md")):
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "train_gpt2_mod.py" in words:
                    yield pytest.param(words[words.index("train_gpt2_mod.py") + 1 :], id=f"{path.stem}: {line[-40:]}")


@pytest.mark.parametrize("words", training_commands())
def test_the_training_commands_of_the_documents_resolve(words):
    config, run, _ = script.resolve(script.parse_flags(words), machine())
    typed = dict(zip(words, words[1:]))
    assert run.model in script.base_configs and config.n_layer == int(typed.get("--n_layer", 12))


def test_measuring_leaves_other_gpus_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_text((MLP3X / "results.jsonl").read_text())
    row = measure.results()[0]
    monkeypatch.setattr(measure, "gpu_name", lambda: "Another")
    asked = []
    monkeypatch.setattr(measure, "measure", lambda *run: asked.append(run) or dict(row, gpu="Another"))
    measure.main(["--input_bin", "x*.bin"])
    assert [run[:3] for run in asked] == measure.RUNS and asked[0][3] == ["--input_bin", "x*.bin"]
    assert capsys.readouterr().out.startswith("Another\n\n| model |")


def test_measuring_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "none.jsonl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        measure.main([])
    assert not measure.RESULTS.exists()
