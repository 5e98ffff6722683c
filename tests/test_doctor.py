"""tools/doctor.py: each of its checks passes and fails as it should, and no damage to data or to a resume is missed."""
import contextlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import time
import types

import pytest
import torch

import train_gpt2_mod as script
from launch import ROOT, SMALL, checkpoints, data_flags, one_process, records, runs_in, write_data, write_shard

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import doctor  # noqa: E402
from shards import shard_record, write_manifest  # noqa: E402

N = 3  # of N + N steps
GIB = 2**30


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def args(tmp_path, data):
    """What a check takes: flags that are all right."""
    flags = dict(zip(("input_bin", "input_val_bin"), data_flags(data)[1::2]))
    return types.SimpleNamespace(output_dir=str(tmp_path / "logs"), **flags)


@pytest.fixture
def call(capsys):
    """call(words) is (exit code, lines on stdout, text on stderr)."""
    def main(*words):
        code = doctor.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return main


def refused(outcome, part):
    code, out, err = outcome
    return code == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err


def is_failure(outcome, *parts):
    """A FAIL that says what is wrong, and after a semicolon what to do."""
    status, text = outcome
    return status == doctor.FAIL and all(part in text for part in parts) and "; " in text


def raising(error):
    def function(*_, **__):
        raise error

    return function


# ----------------------------------------------------------------------------------------------------------------------
# The environment


@pytest.mark.parametrize("version, wanted, right", [
    ("2.13.0+cpu", ">=2.11,<2.14", True), ("2.11.0a0+git12", ">=2.11,<2.14", True), ("2.14.0", ">=2.11,<2.14", False),
    ("2.9.1", ">=2.11", False), ("0.1.5", "==0.1.5", True), ("0.1.5.0", "==0.1.5", True), ("0.1.50", "==0.1.5", False),
    ("3.10", "<=3.10,>3", True), ("7", "", True),
])
def test_versions_are_compared_as_numbers(version, wanted, right):
    assert doctor.fits(version, wanted) is right


def test_the_requirements_are_those_of_the_file():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [name + wanted for name, wanted in doctor.requirements().items()] == lines
    checked = dict(doctor.CHECKS)
    assert doctor.requirements().keys() <= checked.keys() and "torch" in doctor.requirements()


def test_python(args, monkeypatch):
    assert doctor.check_python(args)[0] == doctor.OK
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.4.10")
    assert is_failure(doctor.check_python(args), "3.4.10", "set PYTHON")


def test_packages(args, monkeypatch):
    assert doctor.check_package("numpy", args)[0] == doctor.OK
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert is_failure(doctor.check_package("wandb", args), "wandb", "pip install 'wandb>=")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.10.1+cu128")
    assert is_failure(doctor.check_package("torch", args), "2.10.1+cu128", doctor.requirements()["torch"])
    monkeypatch.setattr(importlib.metadata, "version", raising(importlib.metadata.PackageNotFoundError("tiktoken")))
    assert is_failure(doctor.check_package("tiktoken", args), "tiktoken", "pip install")


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without NVIDIA's device, program or CUDA; monkeypatch, to add what a test needs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "NVIDIA_DEVICE", "/no/such/device")
    monkeypatch.setattr(doctor, "NVIDIA_PROGRAM", "no-such-program")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return monkeypatch


def test_a_gpu_that_is_not_seen(args, no_gpu):
    assert doctor.check_gpu(args)[0] == doctor.NOTE
    no_gpu.setattr(doctor, "NVIDIA_DEVICE", "/dev/null")
    no_gpu.setattr(torch.cuda, "init", raising(RuntimeError("The driver is too old\nmore")))
    assert is_failure(doctor.check_gpu(args), "/dev/null", "CUDA 13.0", "The driver is too old", "update the driver")
    no_gpu.setattr(torch.version, "cuda", None)
    assert is_failure(doctor.check_gpu(args), "built without CUDA", "--force-reinstall")
    no_gpu.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.check_gpu(args)[0] == doctor.NOTE


@pytest.fixture
def gpu(no_gpu):
    """A machine with one GPU, as far as torch is asked."""
    no_gpu.setattr(torch.cuda, "is_available", lambda: True)
    no_gpu.setattr(torch.cuda, "device_count", lambda: 1)
    no_gpu.setattr(torch.cuda, "mem_get_info", lambda i: (70 * GIB, 80 * GIB))
    no_gpu.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    no_gpu.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100 80GB HBM3")
    ones = torch.ones
    no_gpu.setattr(torch, "ones", lambda size, device: ones(size))
    machine = script.Machine(1, "cuda", has_bf16=True, has_fp8=False)
    world = types.SimpleNamespace(device=torch.device("cuda"), machine=lambda: machine)
    no_gpu.setattr(script, "World", lambda *_: world)
    no_gpu.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    no_gpu.setattr(doctor.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "580.95.05\n", ""))
    return no_gpu


def test_a_gpu_that_is_seen(args, gpu):
    status, text = doctor.check_gpu(args)
    assert status == doctor.OK
    for part in ("H100 80GB HBM3 (70.0 of 80.0 GiB free, compute capability 9.0)", "bf16, no fp8",
                 "driver 580.95.05 for CUDA 13.0", "torch for CUDA 13.0"):
        assert part in text
    gpu.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080)
    status, text = doctor.check_gpu(args)
    assert status == doctor.NOTE and "CUDA 12.8" in text and "older" in text
    gpu.setattr(torch._C, "_cuda_getDriverVersion", raising(RuntimeError("no driver")))
    gpu.setattr(doctor.subprocess, "run", raising(FileNotFoundError()))
    assert doctor.check_gpu(args)[0] == doctor.OK and "driver unknown" in doctor.check_gpu(args)[1]


def test_a_gpu_for_which_torch_has_no_kernels_fails(gpu, call, monkeypatch):
    gpu.setattr(torch, "ones", raising(RuntimeError("CUDA error: no kernel image is available\nmore")))
    monkeypatch.setattr(doctor, "CHECKS", (("GPU", doctor.check_gpu),))
    code, (line, _), _ = call()
    assert code == 1 and line.startswith("FAIL    GPU: cannot be checked (RuntimeError: CUDA error: no kernel image")


def test_compile_on_a_cpu(args, no_gpu):
    no_gpu.setattr(script, "why_no_compile", lambda device: None)
    assert doctor.check_compile(args)[0] == doctor.OK
    no_gpu.setattr(script, "why_no_compile", lambda device: "no C compiler")
    status, text = doctor.check_compile(args)
    assert status == doctor.NOTE and "no C compiler" in text


def test_compile_on_a_gpu(args, gpu):
    gpu.setattr(script, "why_no_compile", lambda device: "no working triton" if device.type == "cuda" else None)
    assert is_failure(doctor.check_compile(args), "no working triton", "--no_compile")


def test_several_processes(args, no_gpu):
    no_gpu.setattr(doctor.dist, "is_nccl_available", lambda: False)
    no_gpu.setattr(doctor.dist, "is_gloo_available", lambda: True)
    assert doctor.check_processes(args) == (doctor.OK, "NCCL missing, gloo there")
    no_gpu.setattr(torch.cuda, "is_available", lambda: True)
    assert is_failure(doctor.check_processes(args), "NCCL missing")
    no_gpu.setattr(doctor.dist, "is_nccl_available", lambda: True)
    no_gpu.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    assert doctor.check_processes(args) == (doctor.OK, "NCCL 2.28.9, gloo there")
    no_gpu.setattr(torch.cuda, "is_available", lambda: False)
    no_gpu.setattr(doctor.dist, "is_gloo_available", lambda: False)
    assert is_failure(doctor.check_processes(args), "gloo missing")


@pytest.mark.parametrize("gib, room, status", [(2, 1, doctor.FAIL), (5, 3, doctor.OK)])
def test_room_for_three_checkpoints_of_d12(args, monkeypatch, gib, room, status):
    """123.5 million parameters of 12 bytes are 1.38 GiB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=gib * GIB))
    outcome = doctor.check_disk(args)
    assert outcome[0] == status and f"{gib}.0 GiB free" in outcome[1] and f"room for {room} checkpoints" in outcome[1]
    assert status == doctor.OK or is_failure(outcome, "1.4 GiB each", "--output_dir")


def test_the_folder_of_runs(args, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    status, text = doctor.check_writable(args)
    assert status == doctor.OK and text == f"{tmp_path}, where {args.output_dir} goes"
    assert sorted(tmp_path.iterdir()) == before  # nothing is left, nothing made
    (tmp_path / "logs").write_text("")
    assert is_failure(doctor.check_writable(args), "is a file")
    args.output_dir = str(tmp_path)
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", raising(OSError(30, "Read-only file system")))
    assert is_failure(doctor.check_writable(args), "Read-only file system", "--output_dir")


def test_shards(args, data):
    assert doctor.check_train_data(args) == (doctor.OK, "260 tokens in 2 shards, vocabulary 257")
    assert doctor.check_val_data(args) == (doctor.OK, "200 tokens in 1 shard, vocabulary 257")
    write_shard(data / "val_000.bin", [1, 2, 3], vocab_size=50257)
    assert is_failure(doctor.check_val_data(args), "50257", "257", "one tokenizer")
    args.input_val_bin = ""
    assert doctor.check_val_data(args)[0] == doctor.NOTE


@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_shards_that_are_absent_or_damaged_fail_with_the_scripts_own_words(args, data, call, monkeypatch, damage):
    path = data / "train_001.bin"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    pattern = args.input_bin if damage == "cut" else str(data / "none_*.bin")
    with pytest.raises(script.DataError) as error:
        script.TokenShards(pattern)
    monkeypatch.setattr(doctor, "CHECKS", (("training data", doctor.check_train_data),))
    code, out, _ = call("--input_bin", pattern)
    assert code == 1 and out[0] == f"FAIL    training data: {error.value}"


KEY = "0123456789abcdef" * 2


@pytest.fixture
def wandb_at(tmp_path, monkeypatch):
    """A home without W&B's key; monkeypatch, to add one."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setattr(doctor, "reachable", lambda host: host == "api.wandb.ai")
    return monkeypatch


def test_an_account_is_never_more_than_a_note(args, wandb_at, tmp_path):
    status, text = doctor.check_account(args)
    assert status == doctor.NOTE and "no API key" in text and "wandb login" in text and "WANDB_MODE=offline" in text
    login = f"login user password {KEY}\n"
    for content, status in ((f"machine api.wandb.ai {login}", doctor.OK), (f"machine github.com {login}", doctor.NOTE),
                            ("machine\n", doctor.NOTE)):
        (tmp_path / ".netrc").write_text(content)
        assert doctor.check_account(args)[0] == status and KEY not in doctor.check_account(args)[1]
    wandb_at.setenv("WANDB_API_KEY", KEY)
    assert doctor.check_account(args) == (doctor.OK, "an API key; api.wandb.ai answers")
    wandb_at.setenv("WANDB_BASE_URL", "https://wandb.example.com:8080")
    status, text = doctor.check_account(args)
    assert status == doctor.NOTE and "wandb.example.com does not answer" in text
    wandb_at.setenv("https_proxy", "http://user:secret@proxy:3128")
    status, text = doctor.check_account(args)
    assert status == doctor.NOTE and "proxy" in text and "secret" not in text
    wandb_at.setenv("WANDB_MODE", "offline")
    assert doctor.check_account(args)[0] == doctor.OK


def test_a_host_has_little_time_to_answer(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    monkeypatch.setattr(doctor.socket, "create_connection", lambda *_: contextlib.nullcontext())
    assert doctor.reachable("somewhere")
    for answer in (raising(OSError("no route")), lambda *_: time.sleep(0.3) or contextlib.nullcontext()):
        monkeypatch.setattr(doctor.socket, "create_connection", answer)
        assert not doctor.reachable("somewhere")


def test_a_check_that_raises_fails_and_the_pass_goes_on(call, monkeypatch):
    checks = {"a": lambda args: (doctor.OK, "all\nwell"), "b": raising(ZeroDivisionError("by zero\nTraceback")),
              "c": raising(script.ConfigError("x=1 is wrong; type 2")), "d": lambda args: (doctor.NOTE, "so so"),
              "e": raising(AssertionError())}
    monkeypatch.setattr(doctor, "CHECKS", tuple(checks.items()))
    code, out, err = call()
    assert (code, err) == (1, "")
    assert out == ["ok      a: all well",
                   "FAIL    b: cannot be checked (ZeroDivisionError: by zero); mend what this names",
                   "FAIL    c: x=1 is wrong; type 2", "note    d: so so",
                   "FAIL    e: cannot be checked (AssertionError: no more is known); mend what this names",
                   "5 checks: 1 ok, 1 to note, 3 failed"]
    monkeypatch.setattr(doctor, "CHECKS", (("a", checks["a"]), ("d", checks["d"])))
    assert call()[0] == 0


def test_the_whole_pass_has_a_line_per_check(args, call, monkeypatch):
    monkeypatch.setattr(script, "why_no_compile", lambda device: None)
    monkeypatch.setattr(doctor, "reachable", lambda host: False)
    code, out, err = call("--output_dir", args.output_dir, "--input_bin", args.input_bin, "--input_val_bin",
                          args.input_val_bin)
    statuses = [line[:8].strip() for line in out[:-1]]
    assert [line[8:].partition(":")[0] for line in out[:-1]] == [name for name, _ in doctor.CHECKS]
    assert set(statuses) <= {doctor.OK, doctor.NOTE, doctor.FAIL}
    assert code == (doctor.FAIL in statuses) and err == "" and not runs_in(args.output_dir)


def test_without_torch_there_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open\\nshared object file')")
    done = one_process(sys.executable, ROOT / "tools" / "doctor.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr == "" and done.stdout.count("\n") == 1
    assert done.stdout.startswith("FAIL    packages: libcudart.so.13: cannot open shared object file; source activate")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("words, part", [
    (["--data", "x", "--resume"], "--resume would be ignored with --data"), (["--steps", "3"], "--steps would be"),
    (["--data", "x", "--input_bin", "y"], "--input_bin"), (["--", "--model", "d12"], "-- would be ignored"),
    (["--data", "x", "--", "--model", "d12"], "-- would be ignored"), (["--resume", "--steps", "many"], "--steps"),
    (["--resume", "--input_bin", "y"], "--input_bin would be ignored"), (["--modle", "d12"], "--modle"), (["x"], "x"),
    (["--resume", "--steps", "0", "--"], "steps=0 must be at least 1"), (["--resume", "--nproc", "0"], "nproc=0"),
    (["--resume", "--", "--resume", "auto"], "--resume cannot"), (["--resume", "--", "--dry-run"], "--dry_run cannot"),
    (["--resume", "--", "--modle", "d12"], "did you mean --model"), (["--data"], "--data"),
])
def test_what_is_refused_is_refused_in_one_line(call, words, part):
    assert refused(call(*words), part)


def test_help_shows_the_three_uses(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"python tools/doctor.py {use}" in out for use in ("[--output_dir", "--data", "--resume [--steps N]"))


# ----------------------------------------------------------------------------------------------------------------------
# --data


def record_all(folder, **changes):
    """A manifest of the folder's shards as they are now; `changes` to the record of train_000.bin."""
    shards = {path.name: shard_record(path) for path in sorted(folder.glob("*.bin"))}
    shards["train_000.bin"].update(changes)
    return write_manifest(folder, "bytes", 257, {}, shards)


def test_a_whole_folder(data, call):
    record_all(data)
    code, out, err = call("--data", data)
    assert (code, err, out[-1]) == (0, "", "3 files, all as manifest.json says")
    assert [line.split(":")[0] for line in out[:-1]] == [f"ok      {name}.bin" for name in ("train_000", "train_001",
                                                                                           "val_000")]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the tokens": (lambda path: flip(path, -2), "SHA-256"),
    "a bit of the header": (lambda path: flip(path, 1000), "SHA-256"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "1,223 bytes, the manifest says 1,224"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "1,225 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "missing": (lambda path: path.unlink(), "missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file(data, call, name):
    damage, part = DAMAGE[name]
    record_all(data)
    damage(data / "train_000.bin")
    code, out, err = call("--data", data)
    assert (code, err, out[-1]) == (1, "", "1 of 3 files are wrong")
    assert out[0].startswith("FAIL    train_000.bin: ") and part in out[0] and "; " in out[0]
    assert all(line.startswith("ok ") for line in out[1:3])


def test_a_file_that_is_as_recorded_and_no_shard(data, call):
    record_all(data)
    manifest = json.loads((data / "manifest.json").read_text())
    write_shard(data / "train_000.bin", [1, 300, 2])  # an id past the vocabulary of 257
    (data / "train_001.bin").write_bytes(bytes(3000))
    for name in ("train_000.bin", "train_001.bin"):
        path = data / name
        manifest["shards"][name] = dict(bytes=path.stat().st_size, sha256=doctor.sha256_of(path).upper())
    (data / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = call("--data", data)
    assert code == 1 and "token 1 is 300, past the vocabulary" in out[0] and "is not a token shard" in out[1]


def test_a_file_that_the_disk_does_not_give_back(data, call, monkeypatch):
    record_all(data)
    monkeypatch.setattr(doctor, "sha256_of", raising(OSError(5, "Input/output error")))
    code, out, _ = call("--data", data)
    assert code == 1 and all("(Input/output error); mend the disk" in line for line in out[:3])


def test_a_shard_beside_the_manifest_is_noted(data, call):
    record_all(data)
    shutil.copy(data / "train_000.bin", data / "train_9.bin")
    (data / "notes.txt").write_text("")
    code, out, _ = call("--data", data)
    assert code == 0 and [line for line in out if line.startswith("note")] == [
        "note    train_9.bin: not in manifest.json; a pattern such as '*.bin' takes it all the same"]


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a/../../x.bin", "..", "", ".", "C:\\x", "..\\x", "a\0b"])
def test_a_name_that_leads_out_is_refused(data, call, name):
    manifest = record_all(data)
    manifest["shards"][name] = manifest["shards"]["train_000.bin"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    outcome = call("--data", data)
    assert refused(outcome, "not inside the folder") and outcome[1] == []


@pytest.mark.parametrize("changes", [dict(sha256="abc"), dict(sha256=None), dict(bytes="1224"), dict(bytes=None)])
def test_a_record_without_size_or_hash_is_refused(data, call, changes):
    record_all(data, **changes)
    assert refused(call("--data", data), "train_000.bin" if "abc" in changes.values() else "cannot be understood")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"options": {}, "shards": []}', '{"options": {}, "shards": {}}',
                                  '{"options": {}, "shards": {"a.bin": 7}}', "\udcff"])
def test_a_manifest_that_cannot_be_understood_is_refused(data, call, text):
    (data / "manifest.json").write_text(text, errors="surrogateescape")
    assert refused(call("--data", data), "manifest.json")


@pytest.mark.parametrize("place", [".", "none"])
def test_a_folder_without_a_manifest_is_refused(data, call, place):
    assert refused(call("--data", data / place), "manifest.json does not exist")


# ----------------------------------------------------------------------------------------------------------------------
# --resume


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """doctor's own two runs, kept: exit code, output, the folder."""
    folder = tmp_path_factory.mktemp("resume")
    flags = [*SMALL, *data_flags(write_data(folder / "data")), "--save_every", "2", "--no_save_checkpoints"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        code = doctor.main(["--resume", "--steps", str(N), "--keep", str(folder / "kept"), "--", *flags])
    return code, out.getvalue().splitlines(), folder / "kept"


def test_the_program_that_trains_may_be_another(call, tmp_path, monkeypatch):
    """One of docs/extending.py."""
    commands = []

    def train(title, command):
        commands.append(command)
        raise script.DataError("enough")

    monkeypatch.setattr(doctor, "SCRIPT", tmp_path / "other.py")
    monkeypatch.setattr(doctor, "train", train)
    assert refused(call("--resume", "--output_dir", tmp_path / "logs", "--", "--model", "tiny"), "enough")
    assert commands[0][1:4] == [str(tmp_path / "other.py"), "--model", "tiny"]


def test_n_and_n_steps_are_2n(resumed):
    code, out, kept = resumed
    assert code == 0, out
    assert out[0] == "overridden: --num_iterations, --save_every, --save_checkpoints"
    first, second = (line.split(": ", 1)[1] for line in out[1:3])
    assert f"--num_iterations {2 * N} --save_every {N} --keep_last 0 --output_dir {kept / 'whole'}" in first
    whole, = runs_in(kept / "whole")
    copy, = runs_in(kept / "resumed")
    assert second.endswith(f"train_gpt2_mod.py --resume {copy / f'step{N:06d}.pt'}")
    assert out[3].startswith(f"ok: {N} + {N} steps equal {2 * N} bitwise: ") and "6 steps, 2 validations" in out[3]
    assert out[4:] == [f"kept: {kept}"] and sorted(kept.iterdir()) == [kept / "resumed", kept / "whole"]
    assert {f"step{N:06d}.pt", f"step{2 * N:06d}.pt"} <= {*checkpoints(whole)} & {*checkpoints(copy)}
    times = [[record.get("step_ms") for record in records(folder)][-2] for folder in (whole, copy)]
    assert times[0] != times[1]  # the last step was done twice, and not copied


@pytest.fixture
def pair(resumed, tmp_path):
    """The first run's folder, and a copy of the resumed one, to plant differences in."""
    whole, = runs_in(resumed[2] / "whole")
    copy, = runs_in(resumed[2] / "resumed")
    return whole, shutil.copytree(copy, tmp_path / copy.name)


def change(rows, step, name, value):
    next(row for row in rows if row["step"] == step and name in row)[name] = value


PLANTED = {  # change to the records of metrics.jsonl, what is said
    "a loss": (lambda rows: change(rows, 5, "train_loss", rows[0]["train_loss"]), "step 5: train_loss "),
    "a learning rate": (lambda rows: change(rows, 4, "lr", 1.0), "step 4: lr "),
    "a norm": (lambda rows: change(rows, 6, "grad_norm", None), "step 6: grad_norm "),
    "tokens": (lambda rows: change(rows, 6, "tokens", 1), "step 6: tokens 384 against 1 "),
    "a validation": (lambda rows: change(rows, 6, "val_loss", 1.5), "step 6: val_loss "),
    "a step lost": (lambda rows: rows.remove(next(r for r in rows if r["step"] == 4)), "step 4: 1 records against 0"),
    "a step twice": (lambda rows: rows.append(rows[1]), "step 2: 1 records against 2"),
    "a step more": (lambda rows: rows.append({**rows[0], "step": 7}), "step 7: 0 records against 1"),
    "a skipped step": (lambda rows: change(rows, 4, "train_loss", None), "step 4: train_loss "),
    "a validation lost": (lambda rows: rows.pop(), "step 6: 1 validations against 0"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_difference_in_the_records_is_found(pair, capsys, name):
    plant, said = PLANTED[name]
    whole, copy = pair
    rows = records(copy)
    plant(rows)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert doctor.verdict(whole, copy, N) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and out[0].startswith(f"FAIL: first difference at {said}")


def test_the_largest_difference_of_the_losses_is_relative(pair, capsys):
    whole, copy = pair
    rows = records(copy)
    for step, factor in ((4, 1.001), (6, 1.01)):
        change(rows, step, "train_loss", factor * next(r for r in rows if r["step"] == step)["train_loss"])
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert doctor.verdict(whole, copy, N) == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line == "differences: 2, the last at step 6; training losses differ by up to 1.0e-02 of their value"


def first_tensor(part):
    return next(value for value in part.values() if isinstance(value, torch.Tensor) and value.numel() > 1)


SWAPS = {  # change to what the last checkpoint holds, the beginning of what is said
    "a weight": (lambda saved: first_tensor(saved["model"]).view(-1)[0].mul_(1 + 2**-20), "model transformer"),
    "a moment": (lambda saved: first_tensor(saved["optimizer"]["state"][0]).view(-1)[0].add_(1), "optimizer state 0"),
    "a type": (lambda saved: saved.update(model={key: value.double() for key, value in saved["model"].items()}),
               "model transformer"),
    "a weight less": (lambda saved: saved["model"].popitem(), "model: "),
    "the cursor": (lambda saved: saved["loader"].update(tokens=1), "loader tokens: "),
    "random numbers": (lambda saved: saved["rng"][0][0].add_(1), "rng 0 0: "),
    "the group's rate": (lambda saved: saved["optimizer"]["param_groups"][0].update(lr=1.0), "optimizer param_groups"),
}


@pytest.mark.parametrize("name", SWAPS)
def test_a_difference_in_the_checkpoint_is_found(pair, capsys, monkeypatch, name):
    plant, said = SWAPS[name]
    whole, copy = pair
    load = script.load_checkpoint

    def loaded(path):
        content = load(path)
        if path.parent == copy:
            plant(content)
        return content

    monkeypatch.setattr(script, "load_checkpoint", loaded)
    assert doctor.verdict(whole, copy, N) == 1
    assert capsys.readouterr().out.startswith(f"FAIL: first difference at step {2 * N}: {said}")


def test_a_resumed_run_that_saved_nothing_is_found(pair, capsys):
    whole, copy = pair
    (copy / f"step{2 * N:06d}.pt").unlink()
    assert doctor.verdict(whole, copy, N) == 1 and "step000006.pt is missing" in capsys.readouterr().out


@pytest.mark.parametrize("run, part", [
    (dict(device="cuda", compile=None), "--deterministic"), (dict(device="cpu", compile=True), "--deterministic"),
    (dict(device="auto", compile=None), "OMP_NUM_THREADS"), (dict(device="cpu", compile=False), "OMP_NUM_THREADS"),
    (dict(device="cuda", compile=None, deterministic=True), "OMP_NUM_THREADS"),
])
def test_the_remedy_fits_the_run(no_gpu, run, part):
    assert part in doctor.remedy(run)


def test_the_copy_is_the_run_as_of_the_step(tmp_path):
    whole = tmp_path / "whole" / "run"
    whole.mkdir(parents=True)
    kept = ["step000002.pt", "step000003.pt", "metrics.jsonl", "run.log", "config.json", "steps.txt"]
    for name in [*kept, "step000004.pt", "step000006.pt", "step000004.pt.aside", "step1000000.pt"]:
        (whole / name).write_text(name)
    copy = doctor.copy_as_of(whole, 3, tmp_path / "resumed")
    assert copy == tmp_path / "resumed" / "run" and sorted(p.name for p in copy.iterdir()) == sorted(kept)


@pytest.mark.parametrize("code, said, lines", [
    ("import sys; print('error: x=1 is wrong; type 2', file=sys.stderr); print('more'); sys.exit(2)",
     "some run ended with code 2: x=1 is wrong; type 2", 0),
    ("for i in range(50): print('line', i)\nraise SystemExit(7)", "some run ended with code 7: its last lines", 20),
])
def test_a_trainer_that_fails_says_why(capsys, code, said, lines):
    with pytest.raises(doctor.DataError, match=said):
        doctor.train("some run", [sys.executable, "-S", "-c", code])
    out, err = capsys.readouterr()
    assert out.startswith("some run: ") and len(err.splitlines()) == lines and ("line 49" in err) == (lines > 0)


def test_several_processes_go_through_torchrun(tmp_path, call, monkeypatch):
    commands = []

    def fail(title, command):
        commands.append((title, command))
        raise doctor.DataError("so far")

    monkeypatch.setattr(doctor, "train", fail)
    words = ("--nproc", 2, "--output_dir", tmp_path / "a" / "logs", "--", "--model", "tiny")
    assert refused(call("--resume", *words), "so far")
    (title, command), = commands
    assert title == "first run" and command[:6] == [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                    "--nproc_per_node", "2"]
    assert command[6:9] == [str(ROOT / "train_gpt2_mod.py"), "--model", "tiny"]
    assert command[-2].startswith(str(tmp_path / "doctor-")) and list(tmp_path.iterdir()) == []


def test_only_an_empty_folder_is_kept(tmp_path, call):
    (tmp_path / "file").write_text("")
    for keep in (tmp_path, tmp_path / "file"):
        assert refused(call("--resume", "--keep", keep, "--"), "is not an empty folder")


def test_an_interruption_is_one_line(call, monkeypatch):
    monkeypatch.setattr(doctor, "train", raising(KeyboardInterrupt()))
    assert call("--resume", "--") == (130, [], "interrupted\n")
