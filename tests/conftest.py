"""Fixtures of all tests; imports find the script and the helpers whatever the working directory."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torch's and numpy's, here and in what is started: a worker has one processor

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Modules and tensors made in the test are in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def trainer(tmp_path, capsys, monkeypatch):
    """Runs of the script as one process, whatever the tests run in; some files add to it."""
    from launch import Trainer

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Trainer(tmp_path, capsys)
