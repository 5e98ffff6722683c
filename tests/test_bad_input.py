"""What the user gets wrong: exit code 2, one line that names the value and a remedy, and no file made or changed."""
import errno
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

import launch
import train_gpt2_mod as script
from launch import ROOT, SCRIPT, data_flags, error_lines, one_process, snapshot, some_tokens, write_sealed, write_shard

sys.path.insert(0, str(ROOT / "data"))
import shards  # noqa: E402


@pytest.fixture
def trainer(trainer, tmp_path, monkeypatch):
    """With another run's files in the output folder, and no CUDA even where there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    old = tmp_path / "logs" / "20200101-000000-tiny-0000"
    old.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json", "step000001.pt"):
        (old / name).write_text("what was there before")
    return trainer


def assert_refused(trainer, flags, *parts):
    before = snapshot(trainer.output.parent)
    folders = sorted(trainer.output.parent.rglob("*"))
    result = trainer.main(*flags)
    assert result.code == 2, result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result
    for part in parts:
        assert str(part) in result.err, (part, result.err)
    assert snapshot(trainer.output.parent) == before
    assert sorted(trainer.output.parent.rglob("*")) == folders  # no empty folder either


FLAGS = {
    # what was typed behind flags that are right, and what the line must say: the value, and a way out
    "preset": ("--model d12_mlp3", ["model=d12_mlp3 ", "did you mean d12_mlp3x"]),
    "preset like no other": ("--model zzzzz", ["model=zzzzz ", "--help lists them"]),
    "flag": ("--num_iteration 3", ["--num_iteration ", "did you mean --num_iterations"]),
    "flag like no other": ("--qqqqq", ["--qqqqq ", "--help"]),
    "word": ("stray", ["stray", "--help"]),
    "choice": ("--mlp swigl", ["mlp=swigl ", "did you mean swiglu"]),
    "choice of precision": ("--precision bf15", ["precision=bf15 ", "bf16"]),
    "choice of device": ("--device gpu", ["device=gpu ", "cpu"]),
    "word for an integer": ("--n_layer two", ["--n_layer", "two", "--help"]),
    "fraction for an integer": ("--num_iterations 1.5", ["--num_iterations", "1.5", "--help"]),
    "word for a number": ("--learning_rate fast", ["--learning_rate", "fast", "--help"]),
    "division by nothing": ("--embd_scale 1/0", ["--embd_scale", "1/0", "--help"]),
    "infinite scale": ("--embd_scale inf", ["embd_scale=inf"]),
    "no value": ("--n_layer", ["--n_layer", "--help"]),
    "heads": ("--n_head 5", ["n_embd=32", "n_head=5", "30 or 35"]),
    "no heads": ("--n_head 0", ["n_head=0"]),
    "no heads to scale": ("--n_head 0 --embd_scale 2", ["n_head=0"]),
    "fewer heads than none": ("--n_head -2", ["n_head=-2"]),
    "odd head size": ("--n_embd 30 --n_head 2", ["n_embd=30", "n_head=2", "head size 15", "even"]),
    "key/value heads": ("--n_head 4 --n_kv_head 3", ["n_head=4", "n_kv_head=3", "1, 2, 4"]),
    "more key/value heads": ("--n_kv_head 4", ["n_head=2", "n_kv_head=4", "1, 2"]),
    "two ways to key/value heads": ("--n_kv_head 1 --kv_head_ratio 0.5", ["n_kv_head", "kv_head_ratio", "drop one"]),
    "gqa with all heads": ("--gqa_enabled --n_kv_head 2", ["gqa_enabled", "n_kv_head=2", "drop one"]),
    "gqa with a ratio of one": ("--gqa_enabled --kv_head_ratio 1", ["kv_head_ratio=1", "gqa_enabled", "lower"]),
    "ratio of nothing": ("--kv_head_ratio 0", ["kv_head_ratio=0", "above 0"]),
    "ratio above one": ("--kv_head_ratio 1.5", ["kv_head_ratio=1.5", "at most 1"]),
    "scale of nothing": ("--embd_scale 0", ["embd_scale=0", "above 0"]),
    "mtp steps": ("--mtp_max_steps 3", ["mtp_max_steps", "--mtp_enabled"]),
    "mtp weight": ("--mtp_weight 0.5", ["mtp_weight", "--mtp_enabled"]),
    "mtp ramp": ("--mtp_rampup_steps 5", ["mtp_rampup_steps", "--mtp_enabled"]),
    "no mtp step": ("--mtp_enabled --mtp_max_steps 0", ["mtp_max_steps=0", "at least 1"]),
    "batch": ("--batch_size 0", ["batch_size", "at least 1"]),
    "batch for its data": ("--batch_size 9", ["288", "260", "lower --batch_size"]),
    "accumulation for its data": ("--grad_accumulation_steps 5", ["320", "260", "--total_batch_size"]),
    "accumulation": ("--grad_accumulation_steps 0", ["grad_accumulation_steps=0"]),
    "tokens a step": ("--total_batch_size 100", ["total_batch_size=100", "2 x 32 x 1 = 64", "64 or 128"]),
    "too few tokens a step": ("--total_batch_size 32", ["total_batch_size=32", "try 64"]),
    "fewer tokens than none": ("--total_batch_size -64", ["total_batch_size=-64", "try 64"]),
    "two sizes of a step": ("--total_batch_size 128 --grad_accumulation_steps 3",
                            ["total_batch_size=128", "grad_accumulation_steps=3", "drop one"]),
    "schedule": ("--warmup_iters 4 --warmdown_iters 3",
                 ["warmup_iters=4", "warmdown_iters=3", "num_iterations=6", "shorten"]),
    "negative rate": ("--learning_rate -1", ["learning_rate=-1", "at least 0"]),
    "rate that is no number": ("--learning_rate nan", ["learning_rate=nan", "finite"]),
    "infinite clip": ("--grad_clip inf", ["grad_clip=inf", "finite"]),
    "decay that is no number": ("--weight_decay nan", ["weight_decay=nan", "finite"]),
    "negative steps": ("--num_iterations -1", ["num_iterations=-1", "at least 0"]),
    "no steps": ("--num_iterations 0 --warmup_iters 0 --warmdown_iters 0", ["num_iterations=0", "at least 1"]),
    "negative cadence": ("--save_every -1", ["save_every=-1", "at least 0"]),
    "beta of one": ("--beta2 1", ["beta2=1", "below 1"]),
    "ratio that is no number": ("--kv_head_ratio nan", ["kv_head_ratio=nan"]),
    "scale that is no number": ("--embd_scale nan", ["embd_scale=nan"]),
    "vocabulary": ("--vocab_size 300", ["vocab_size=300", "257", "drop --vocab_size"]),
    "no hidden unit": ("--mlp_expansion_factor 0.01", ["mlp_expansion_factor=0.01"]),
    "rotary base": ("--rope_base 1", ["rope_base=1", "10000"]),
    "fp16": ("--precision fp16", ["precision=fp16", "CUDA", "bf16 or fp32"]),
    "CUDA": ("--device cuda", ["device=cuda", "not available", "cpu"]),
    "no file to resume": ("--resume logs/none.pt", ["logs/none.pt", "does not exist", "auto"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(trainer, case):
    typed, parts = FLAGS[case]
    assert_refused(trainer, trainer.flags(*typed.split()), *parts)


def test_a_width_needs_heads(trainer):
    flags = ["--model", "tiny", *data_flags(trainer.data), "--output_dir", trainer.output, "--n_embd"]
    assert_refused(trainer, [*flags, "100"], "n_embd=100", "64 or 128", "--n_head")
    assert_refused(trainer, [*flags, "-64"], "n_embd=-64", "n_embd 64", "--n_head")


def test_a_wrong_flag_is_said_without_any_data(trainer):
    """Nobody should download shards to learn of a typing error."""
    nothing = ["--input_bin", trainer.data / "none_*.bin"]
    assert_refused(trainer, trainer.flags(*nothing, "--n_head", 5), "n_head=5")


# Files that are not what they should be: what stands in the place of train_001.bin, and what the line must say.
SHARDS = {
    "magic": (lambda path: write_shard(path, some_tokens(160, 1), magic=20240521), ["train_001.bin", "20240520"]),
    "version": (lambda path: write_shard(path, some_tokens(160, 1), version=2), ["train_001.bin", "version 2", "1"]),
    "longer by its header": (lambda path: write_shard(path, some_tokens(160, 1), count=161),
                             ["train_001.bin", "161", "160", "again"]),
    "shorter by its header": (lambda path: write_shard(path, some_tokens(160, 1), count=159),
                              ["train_001.bin", "159", "160", "again"]),
    "negative by its header": (lambda path: write_shard(path, [], count=-1), ["train_001.bin", "-1", "again"]),
    "half a token": (lambda path: path.write_bytes(path.read_bytes()[:-1]), ["train_001.bin", "truncated", "again"]),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:500]), ["train_001.bin", "data/prepare.py"]),
    "no byte": (lambda path: path.write_bytes(b""), ["train_001.bin", "data/prepare.py"]),
    "no token": (lambda path: write_shard(path, []), ["train_001.bin", "no tokens", "remove"]),
    "text": (lambda path: path.write_text("text " * 1000), ["train_001.bin", "data/prepare.py"]),
    "folder": (lambda path: (path.unlink(), path.mkdir()), ["train_001.bin", "cannot be read"]),
    "id past the vocabulary": (lambda path: write_shard(path, [0] * 159 + [257]),
                               ["train_001.bin", "token 159 is 257", "257;", "again"]),
    "two vocabularies": (lambda path: write_shard(path, [0] * 160, vocab_size=300), ["257, 300", "narrow"]),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards(trainer, case):
    damage, parts = SHARDS[case]
    damage(trainer.data / "train_001.bin")
    assert_refused(trainer, trainer.flags(), *parts)


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_shard(trainer, split):
    for path in trainer.data.glob(f"{split}_*"):
        path.unlink()
    assert_refused(trainer, trainer.flags(), f"{trainer.data}/{split}_*.bin", "data/fineweb.py", "data/prepare.py")


def test_validation_shards(trainer):
    val = trainer.data / "val_000.bin"
    write_shard(val, some_tokens(200, 2), vocab_size=300)
    assert_refused(trainer, trainer.flags(), "257", "300", "one tokenizer")
    write_shard(val, [0] * 7 + [999] + [0] * 9)
    assert_refused(trainer, trainer.flags(), "val_000.bin", "token 7 is 999", "again")
    write_shard(val, [5])
    assert_refused(trainer, trainer.flags(), "val_")  # one token has no target


def test_gpt2_is_the_vocabulary_of_a_shard_that_names_none(trainer):
    write_shard(trainer.data / "train_001.bin", some_tokens(160, 1), vocab_size=0)
    assert_refused(trainer, trainer.flags(), "257, 50257")


def test_a_file_in_the_output_folders_place(trainer):
    place = trainer.output.parent / "taken"
    place.write_text("not a folder")
    assert_refused(trainer, trainer.flags("--output_dir", place), f"output_dir={place} ", "name another folder")
    below = place / "below"
    assert_refused(trainer, trainer.flags("--output_dir", below), f"output_dir={below} ", "name another folder")


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_network_of_another_program(trainer):
    """Such as one of docs/23, whose configuration has fields of its own."""
    whole = trainer.run().folder / "step000006.pt"
    content = torch.load(whole, weights_only=True)
    content["network"].update(n_expert=8, experts_per_token=2)
    path = trainer.output.parent / "another.pt"
    write_sealed(path, content)
    for flag in ("--resume", "--init_from"):
        assert_refused(trainer, [flag, path], path, "a network with experts_per_token, n_expert, unknown here")


def test_resume_runs_no_code(trainer, recwarn):
    path, proof = trainer.output.parent / "evil.pt", trainer.output.parent / "the code ran"
    write_sealed(path, dict(format=2, model=Exploit(proof)))
    script.verify_checksum(path)
    assert_refused(trainer, ["--resume", path], path, "cannot be read as a checkpoint", "name another")
    torch.save(dict(format=2, model=Exploit(proof)), path)
    assert_refused(trainer, ["--resume", path], path, "name another")
    path.write_bytes(pickle.dumps(Exploit(proof)))
    assert_refused(trainer, ["--resume", path], path, "name another")
    assert not proof.exists()
    assert not recwarn.list  # they would be lines on stderr
    pickle.loads(path.read_bytes())
    assert proof.exists()  # so the file was dangerous


def test_resume_of_what_is_no_checkpoint(trainer):
    whole = trainer.run().folder / "step000006.pt"
    damaged = trainer.output.parent / "damaged.pt"
    contents = dict(truncated=whole.read_bytes()[:-2000], half=whole.read_bytes()[:5000], empty=b"",
                    random=some_tokens(9000, 5, 60000).tobytes(), text=b"step 6\n")
    for content in contents.values():
        damaged.write_bytes(content)
        assert_refused(trainer, ["--resume", damaged], damaged, "name another")
    content = torch.load(whole, weights_only=True)
    for other in ([1, 2], dict(model={}), dict(content, format=1), dict(content, format=3), dict(content, network=[])):
        write_sealed(damaged, other)
        script.verify_checksum(damaged)
        assert_refused(trainer, ["--resume", damaged], damaged, "name another")
    torch.save(content, damaged)  # without a checksum
    assert_refused(trainer, ["--resume", damaged], damaged, "cut short, or no checkpoint; name another")
    for part in script.CHECKPOINT - script.WEIGHTS:
        write_sealed(damaged, {name: value for name, value in content.items() if name != part})
        assert_refused(trainer, ["--resume", damaged], damaged, "no training state", "--init_from")
    assert_refused(trainer, ["--resume", trainer.data], trainer.data, "name a run's folder")


def test_resume_of_another_network(trainer):
    path = trainer.run().folder / "step000006.pt"
    for flags, name, was, now in [
        ("--n_layer 3", "n_layer", 2, 3), ("--n_head 4 --n_embd 32", "n_head", 2, 4),
        ("--qk_norm", "qk_norm", False, True), ("--n_kv_head 1", "n_kv_head", 2, 1),
        ("--model mini", "n_layer", 2, 6), ("--window 8", "window", 0, 8),
        ("--mtp_enabled", "mtp_enabled", False, True), ("--mlp swiglu", "mlp", "gelu", "swiglu"),
    ]:
        assert_refused(trainer, ["--resume", path, *flags.split()], path, f"{name} {was}, not {now}", "drop the flag")


def test_resume_on_other_data(trainer):
    path = trainer.run().folder / "step000006.pt"
    launch.write_data(trainer.data, vocab_size=300)
    assert_refused(trainer, ["--resume", path], "257", "300", "other shards")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_an_environment_that_torchrun_did_not_make(trainer, monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    assert_refused(trainer, trainer.flags(), name, "abc", "torchrun")


def test_processes_without_an_address(trainer, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert_refused(trainer, trainer.flags(), "MASTER_ADDR", "torchrun")


def test_restarts_that_could_not_succeed(trainer, monkeypatch):
    place = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                 MASTER_PORT="1", TORCHELASTIC_MAX_RESTARTS="3", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert_refused(trainer, trainer.flags(), "max_restarts=3", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")


@pytest.mark.parametrize("environment, flags, parts", [
    (dict(), ["--model", "d12_gqaa"], ["model=d12_gqaa ", "did you mean d12_gqa?"]),
    (dict(), ["--precision", "fp16"], ["precision=fp16"]),
    # No address is given, so a process group would fail in another way.
    (dict(WORLD_SIZE="2", RANK="0"), ["--grad_accumulation_steps", "3"],
     ["grad_accumulation_steps=3", "multiple of their number, 2", "2 or 4"]),
])
def test_exit_code(trainer, environment, flags, parts):
    before = snapshot(trainer.output.parent)
    result = one_process(sys.executable, SCRIPT, *trainer.flags(*flags), CUDA_VISIBLE_DEVICES="", **environment)
    assert result.returncode == 2, result
    assert error_lines(result.stderr) == result.stderr.splitlines() and result.stderr.count("\n") == 1, result
    assert all(part in result.stderr for part in parts) and result.stdout == ""
    assert snapshot(trainer.output.parent) == before


def test_divergence(trainer):
    """Five updates are skipped, and what is saved then are the weights before them."""
    broken = trainer.main(*trainer.flags("--num_iterations", 100, "--learning_rate", "1e30", "--warmup_iters", 50,
                                         "--warmdown_iters", 0, "--grad_clip", 0, "--save_every", 1))
    assert broken.code == 1 and len(broken.err.splitlines()) == 1 and broken.err.startswith("error: step ")
    assert "--learning_rate" in broken.err and "--warmup_iters" in broken.err and "--nan_policy" in broken.err
    losses = launch.column(launch.steps(broken.folder), "train_loss")
    good = len(losses) - 5
    assert 1 <= good < 95 and losses[good:] == [None] * 5 and all(map(torch.isfinite, torch.tensor(losses[:good])))
    assert f"error: step {good + 5}: the loss is " in broken.err and "5 updates in a row came to nothing" in broken.err
    assert len(launch.checkpoints(broken.folder)) == good + 4
    assert sorted(path.name for path in broken.folder.glob("*.npz")) == [f"skipped{good + i:06d}.npz"
                                                                         for i in range(1, 6)]
    last, *later = (launch.content_of(broken.folder, step)["model"] for step in range(good, good + 5))
    for weights in later:
        launch.assert_same(weights, last)


def test_help_trains_nothing(trainer):
    with pytest.raises(SystemExit) as stop:
        trainer.main("--help")
    out = trainer.capsys.readouterr().out
    assert stop.value.code == 0
    assert "--no_save_checkpoints" in out and "--save_checkpoints" not in out  # the form that changes something


# ----------------------------------------------------------------------------------------------------------------------
# Tools, data scripts and measuring programs: data/shards.py's exit_code()

def ended(error):
    raise error


@pytest.mark.parametrize("act, known, code, said", [
    (lambda: None, ValueError, 0, ""),
    (lambda: 7, ValueError, 7, ""),
    (lambda: ended(shards.DataError("x=1 is wrong;\ntype 2")), shards.DataError, 2, "error: x=1 is wrong; type 2\n"),
    (lambda: ended(ValueError()), ValueError, 2, "error: ValueError\n"),
    (lambda: open("/nowhere/file"), shards.DataError, 2,
     "error: /nowhere/file cannot be used (No such file or directory); mend it, or name another\n"),
    (lambda: ended(OSError(errno.ENOSPC, "No space left")), ValueError, 2,
     "error: the output, or a file, cannot be used (No space left); mend it, or name another\n"),
    (lambda: "ü".encode("ascii"), ValueError, 2,
     "error: the output is ascii, which lacks a character of the text; set PYTHONIOENCODING=utf-8\n"),
    (lambda: ended(KeyboardInterrupt()), ValueError, 130, "stopped\n"),
    (lambda: os.kill(os.getpid(), signal.SIGTERM) or signal.sigtimedwait([], 5), ValueError, 130, "stopped\n"),
])
def test_a_command_ends_with_a_line_and_a_code(capsys, act, known, code, said):
    before = signal.getsignal(signal.SIGTERM)
    assert shards.exit_code(act, "stopped", known) == code
    assert capsys.readouterr() == ("", said) and signal.getsignal(signal.SIGTERM) == before


def test_what_a_command_does_not_know_is_no_line():
    for error in (ValueError("a defect"), RuntimeError("another")):
        with pytest.raises(type(error)):
            shards.exit_code(lambda: ended(error))


def test_a_command_whose_reader_has_gone_ends_without_a_word():
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'data')!r}); import shards; sys.exit(shards.exit_code(print))"
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        done = subprocess.run([sys.executable, "-c", program], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("streams, act, code", [
    (">&-", "print('all')", 0), (">&- 2>&-", "print('all')", 0), (">&- 2>&-", "open('/nowhere')", 2),
    ("2>/dev/full", "open('/nowhere')", 2), (">/dev/full", "print('all')", 2),
])
def test_a_stream_that_is_closed_or_full_changes_no_exit_code(streams, act, code):
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'data')!r}); import shards\n"
    program += f"sys.exit(shards.exit_code(lambda: {act} and None))"
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {streams}', sys.executable, program], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == code and done.stdout == "" and "Traceback" not in done.stderr
