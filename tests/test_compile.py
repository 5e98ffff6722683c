"""torch.compile: the losses of an uncompiled run where it works, one line where it does not."""
import pytest
import torch

import train_gpt2_mod as script
from launch import column, steps, validations


def test_where_compilation_fails_training_goes_on_and_says_why_in_one_line(trainer, monkeypatch):
    plain = trainer.run("--no_compile")

    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler is found\nand three pages more")

    monkeypatch.setattr(torch, "compile", broken)
    result = trainer.run("--compile")
    lines = [line for line in result.out.splitlines() if "torch.compile" in line]
    assert len(lines) == 1 and lines[0].endswith("no C++ compiler is found") and "three pages" not in result.out
    assert column(steps(result.folder), "train_loss") == column(steps(plain.folder), "train_loss")


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_uncompiled_one_and_compiles_three_graphs(trainer, monkeypatch):
    flags = ["--window", 8, "--qk_norm", "--n_kv_head", 1, "--mtp_enabled", "--mtp_max_steps", 3]
    flags += ["--mtp_rampup_steps", 4]
    plain = trainer.run("--no_compile", *flags)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(script, "why_no_compile", lambda device: None)  # its own graph is not to be counted
    compiled = trainer.run("--compile", *flags)
    # Blocks to train and to validate, and what the loss's gradients are multiplied by: whatever MTP's weight.
    assert counters["stats"]["unique_graphs"] == 3
    for key, rows in (("train_loss", steps), ("val_loss", validations), ("val_mtp_loss", validations)):
        assert column(rows(compiled.folder), key) == pytest.approx(column(rows(plain.folder), key), abs=1e-4)
    torch._dynamo.reset()
