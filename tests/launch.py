"""Whole runs for the tests: small shards of bytes, the script in this process, alone or under torchrun."""
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt2_mod as script

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt2_mod.py"
VOCABULARY = 257
# 64 tokens a step unless said otherwise: a network of 33 thousand parameters on the shards that write_data makes.
SMALL = ("--model tiny --n_layer 2 --n_head 2 --n_embd 32 --batch_size 2 --sequence_length 32 --num_iterations 6 "
         "--warmup_iters 2 --warmdown_iters 2 --learning_rate 3e-3 --val_tokens 150 --val_loss_every 3 "
         "--precision fp32 --device cpu --no_compile").split()


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    folder: Path  # the run's, None if it made none


def write_shard(path, tokens, vocab_size=VOCABULARY, magic=20240520, version=1, count=None):
    """A shard in llm.c's format; `count` for a header that lies."""
    header = np.zeros(256, "<i4")
    header[:4] = magic, version, len(tokens) if count is None else count, vocab_size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def some_tokens(count, seed, vocab_size=VOCABULARY):
    """Ids of which a few are frequent, so that there is something to learn."""
    return (vocab_size * np.random.default_rng(seed).random(count) ** 3).astype("<u2")


def write_data(folder, vocab_size=VOCABULARY):
    """260 training tokens in two shards, four steps of SMALL an epoch, and 200 for validation."""
    for i, (name, count) in enumerate(dict(train_000=100, train_001=160, val_000=200).items()):
        write_shard(folder / f"{name}.bin", some_tokens(count, i, vocab_size), vocab_size)
    return folder


def data_flags(folder):
    return ["--input_bin", str(folder / "train_*.bin"), "--input_val_bin", str(folder / "val_*.bin")]


def runs_in(output_dir):
    return sorted(p for p in Path(output_dir).glob("*") if p.is_dir())


class Trainer:
    """Runs of the script in this process, on data of its own; their folders go to .output."""

    def __init__(self, folder, capsys):
        self.data, self.output, self.capsys = write_data(folder / "data"), folder / "logs", capsys

    def main(self, *flags):
        """The script with these flags and no others."""
        before = runs_in(self.output)
        self.capsys.readouterr()
        code = script.main([str(flag) for flag in flags])
        new = [folder for folder in runs_in(self.output) if folder not in before]
        return Outcome(code, *self.capsys.readouterr(), new[0] if new else None)

    def flags(self, *flags):
        return [*SMALL, *data_flags(self.data), "--output_dir", str(self.output), *map(str, flags)]

    def run(self, *flags):
        """A run that ends well, with SMALL's flags before those given."""
        result = self.main(*self.flags(*flags))
        assert result.code == 0 and result.err == "", result
        return result

    def copy_of(self, folder, name):
        """A run's folder in another output folder, as if it had been made there."""
        return Path(shutil.copytree(folder, self.output.parent / name / folder.name))


def one_process(*command, cwd=None, seconds=120, **environment):
    """A command to its end, in the environment of one process whatever the tests run in."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=seconds,
                          env={**kept, "OMP_NUM_THREADS": "1", **environment}, stdin=subprocess.DEVNULL)


def torchrun(program, *flags, processes=2, cwd=None, seconds=120):
    """A program in some processes on this machine, under torchrun."""
    return one_process(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                       program, *flags, cwd=cwd, seconds=seconds)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
    """The records of the training steps."""
    return [record for record in records(folder) if "train_loss" in record]


def validations(folder):
    return [record for record in records(folder) if "val_loss" in record]


def column(rows, name):
    return [row[name] for row in rows]


def checkpoints(folder):
    return [path.name for path in sorted(folder.glob("*.pt"))]


def content_of(folder, step):
    return torch.load(folder / f"step{step:06d}.pt", weights_only=True)


def write_sealed(path, content):
    """A file of any content with the right checksum: what torch.save makes, its SHA-256 as the zip file's comment."""
    file = io.BytesIO()
    torch.save(content, file)
    comment = b"sha256:" + hashlib.sha256(file.getvalue()).hexdigest().encode()
    path.write_bytes(file.getvalue()[:-2] + len(comment).to_bytes(2, "little") + comment)


def assert_same(a, b, where=""):
    """Two nested contents of checkpoints are the same, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def snapshot(folder):
    """Every file in a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_lines(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]
