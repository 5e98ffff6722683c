"""What the measure.py of the experiments share: a file of results, the GPU that they are of, Markdown tables."""
import json
import sys


def read(path):
    """The records of a file of results, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path, *records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def gpu_name():
    """That of the GPU at hand; without one the program ends here."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device, and these figures are a GPU's; --table prints those that are there")
    return torch.cuda.get_device_name()


def by_gpu(records):
    """[(GPU, its records)], by name."""
    return [(gpu, [r for r in records if r["gpu"] == gpu]) for gpu in sorted({r["gpu"] for r in records})]


def table(heads, rows):
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"] + [f"| {' | '.join(r)} |" for r in rows])
