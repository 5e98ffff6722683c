"""Every command of README.md is run, small, in a copy of the repository; run.sh and activate_env.sh besides.

The copy's .venv is a stub that leads to the Python of the tests, so that nothing is installed.
"""
import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import train_gpt2_mod as script
from helpers import machine
from launch import ROOT, SMALL, column, data_flags, one_process, runs_in, some_tokens, steps, write_data, write_shard
from test_data_fineweb import FILES, VAL, fineweb, hub  # noqa: F401  (hub is a fixture)

GPT2 = script.GPT2_VOCAB_SIZE


def commands():
    """The commands of README.md's bash blocks, each as a list of words; comments are left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


# ----------------------------------------------------------------------------------------------------------------------
# The copy


def requirements_stamp(folder):
    return hashlib.sha256((folder / "requirements.txt").read_bytes()).hexdigest()


def make_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bare_copy(tmp_path):
    """The repository's files without data, runs or environment, in a folder whose name has a space."""
    copy = tmp_path / "a copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".py", ".sh", ".txt", ".md", ".ini"):
            shutil.copy(path, copy)
    for folder in ("tests", "tools", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data").mkdir()
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, copy / "data")
    return copy


@pytest.fixture
def copy(bare_copy):
    """With the stub of an environment, finished by its stamps."""
    programs = bare_copy / ".venv" / "bin"
    make_program(programs / "python", f'exec {shlex.quote(sys.executable)} "$@"')
    make_program(programs / "torchrun", f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"')
    make_program(programs / "pip", 'echo "pip must not be called: $*" >&2; exit 1')
    (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
    (bare_copy / ".venv" / ".stamp").write_text(requirements_stamp(bare_copy) + "\n")
    stamp = subprocess.run("cat requirements*.txt | cksum", shell=True, cwd=bare_copy, capture_output=True, check=True)
    (bare_copy / ".venv" / ".stamp-dev").write_bytes(stamp.stdout)
    return bare_copy


def run_words(copy, words, **environment):
    """A command line in the copy, its environment activated."""
    result = one_process("bash", "-c", f"set -e; source .venv/bin/activate; {shlex.join(words)}", cwd=copy,
                         PYTHON=str(copy / ".venv/bin/python"), WANDB_MODE="offline", WANDB_SILENT="true",
                         **environment)
    assert result.returncode == 0, (words, result.stdout[-2000:], result.stderr[-4000:])
    assert "making the environment" not in result.stdout
    return result


# ----------------------------------------------------------------------------------------------------------------------
# The commands, by kind: each makes what the command finds there, shrinks it, runs it and looks at what it left


def shrunk(processes, words=()):
    tokens, warmdown = 32 * processes, "--warmdown_iters 0" * ("--warmdown_fraction" not in words)
    return ("--n_layer 1 --n_head 4 --n_embd 32 --batch_size 1 --sequence_length 32 --num_iterations 2 --val_tokens 64 "
            f"--warmup_iters 0 {warmdown} --total_batch_size {tokens} --grad_accumulation_steps {processes} "
            "--device cpu --no_compile").split()


def make_shards(copy, words):
    """Shards where FineWeb's lie and where the command's patterns look."""
    values = dict(zip(words, words[1:]))
    for name in ("data/fineweb10B/fineweb_train_*.bin", "data/fineweb10B/fineweb_val_*.bin",
                 values.get("--input_bin"), values.get("--input_val_bin")):
        if name:
            write_shard(copy / name.replace("*", "000"), some_tokens(300, 0, GPT2), vocab_size=0)


def check_training(copy, result, processes):
    folder, = [path.parent for path in (copy / "logs").rglob("metrics.jsonl")]
    assert column(steps(folder), "step") == [1, 2]
    assert column(steps(folder), "tokens") == [32 * processes, 64 * processes]
    assert "Peak memory consumption" in result.stdout and f"{processes} process" in result.stdout
    assert [path.name for path in folder.glob("*.pt")] == ["step000002.pt"]


def small_weights(path):
    """A file of weights for --init_from: GPT-2's network in the size that shrunk() asks for."""
    changes = dict(n_layer=1, n_head=4, n_embd=32, precision="fp32")
    config = script.GPTConfig(**{**script.base_configs["gpt2"], **changes})
    script.write_checkpoint(path, dict(network=dataclasses.asdict(config), run=dict(model="gpt2", sequence_length=32),
                                       model=script.GPT(config).state_dict()))


def try_training(copy, words, server):
    if "--help" in words:
        return run_words(copy, words)
    if "--dry_run" in words:
        result = run_words(copy, words)
        assert re.search(r"^parameters: [\d,]+", result.stdout, re.M) and not (copy / "logs").exists()
        return result
    if "--init_from" in words:
        small_weights(copy / words[words.index("--init_from") + 1])
    count = re.compile(r"(--nproc[-_]per[-_]node=|NPROC=)(\d+)")
    words = [count.sub(lambda m: m[1] + str(min(2, int(m[2]))), word) for word in words]
    processes = int(next((m[2] for m in map(count.fullmatch, words) if m), 1))
    make_shards(copy, words)
    environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    check_training(copy, run_words(copy, [*words, *shrunk(processes, words)], **environment), processes)


def try_run_sh(copy, words, server):
    name = words[words.index("./run.sh") + 1 :][:1]
    if name in (["test"], ["test-all"]):
        collected = run_words(copy, [*words, "--collect-only", "-q", "--ignore=tests/test_readme.py"]).stdout
        assert "test_data_fineweb.py" in collected and "test_model.py" in collected
    elif name == ["help"]:
        assert "./run.sh test" in run_words(copy, words).stdout
    elif name == ["speedrun"]:  # which wants a GPU: see test_speedrun_of_run_sh
        assert "./run.sh speedrun" in run_words(copy, ["./run.sh", "help"]).stdout
    elif name in ([], ["quickstart"]):
        result = run_words(copy, ["./run.sh", "quickstart", *words[2:], *shrunk(1)])
        check_training(copy, result, 1)
        assert result.stdout.split("-" * 80)[-1].startswith("\nThe ")  # the sample
        assert (copy / "data/quickstart/python_docs.txt").stat().st_size > 10**6
    else:
        try_training(copy, words, server)


def try_activation(copy, words, server):
    result = run_words(copy, ["bash", "-c", f"{shlex.join(words)} && command -v python"])
    assert result.stdout.strip() == str(copy / ".venv/bin/python")


def try_fineweb(copy, words, server):
    wanted = int((words[2:] + ["103"])[0])
    names = fineweb.shard_names(wanted)
    server.files.update({name: FILES[VAL] for name in names})
    server.listed.update(server.files)
    run_words(copy, words, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", HF_HOME=str(copy / "home"), NO_PROXY="127.0.0.1",
              no_proxy="127.0.0.1", HF_HUB_ETAG_TIMEOUT="5")
    # Where the trainer looks by default.
    for pattern, count in ((script.TrainConfig.input_bin, wanted), (script.TrainConfig.input_val_bin, 1)):
        assert len(list(copy.glob(pattern))) == count


def make_texts(folder):
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"Document number {i}. Some words again, and others. " * 50)


def try_tokenizer(copy, words, server):
    make_texts(copy / words[2])
    run_words(copy, [*words, "--vocab_size", "270"])
    assert (copy / words[words.index("--out") + 1] / "tokenizer.json").is_file()


def try_prepare(copy, words, server):
    if "--tokenizer" in words:
        tokenizer = words[words.index("--tokenizer") + 1]
        try_tokenizer(copy, ["python", "data/train_tokenizer.py", words[2], "--out", tokenizer], server)
    else:
        make_texts(copy / words[2])
    run_words(copy, words)
    out = copy / words[words.index("--out") + 1]
    assert list(out.glob("train_*.bin")) and list(out.glob("val_*.bin")) and (out / "manifest.json").is_file()


def try_quickstart_data(copy, words, server):
    run_words(copy, words)
    assert list((copy / "data/quickstart").glob("train_*.bin"))


def try_sample(copy, words, server):
    write_data(copy / "data/some")
    flags = [*SMALL, *data_flags(copy / "data/some"), "--output_dir", str(copy / "logs"), "--num_iterations", "4"]
    assert script.main(flags) == 0
    folder, = runs_in(copy / "logs")
    result = run_words(copy, [folder.name.join(word.split("RUN_ID")) for word in words] + ["--max_new_tokens", "20"])
    assert "step000004.pt" in result.stdout and "-" * 80 in result.stdout
    if "--prompt" in words:
        assert words[words.index("--prompt") + 1] in result.stdout


def try_plan(copy, words, server):
    assert re.search(r"^flags: --model \S+ --n_embd \d+", run_words(copy, words).stdout, re.M)


def try_hf(copy, words, server):
    """Weights as they come and go; what is fetched from the hub lies in a folder of that name."""
    if words[2] == "import":
        small_weights(copy / "weights.pt")
        run_words(copy, ["python", "tools/hf.py", "export", "weights.pt", words[3]])
        run_words(copy, words)
        assert script.load_checkpoint(copy / words[4], script.WEIGHTS)["network"]["norm"] == "layernorm"
        return
    write_data(copy / "data/some")
    flags = [*SMALL, *data_flags(copy / "data/some"), "--output_dir", str(copy / "logs"), "--model", "gpt2"]
    assert script.main(flags) == 0
    run_words(copy, words)
    assert (copy / words[4] / "model.safetensors").is_file() and (copy / words[4] / "config.json").is_file()


def try_doctor(copy, words, server):
    if "--data" in words:
        try_fineweb(copy, ["python", "data/fineweb.py", "1"], server)
        assert run_words(copy, words).stdout.count("SHA-256 and token ids right") == 2
    elif "--resume" in words:
        make_shards(copy, words)
        place = shrunk(1).index("--num_iterations")
        flags = shrunk(1)[:place] + shrunk(1)[place + 2 :]
        assert "\nok: 10 + 10 steps equal 20 bitwise: " in run_words(copy, [*words, *flags]).stdout
    else:
        make_shards(copy, words)
        assert re.search(r"^ok +Python: ", run_words(copy, words).stdout, re.M)


def try_bench(copy, words, server):
    few = ["--warmup", "1", "--windows", "1", "--steps", "1"]
    small = SMALL[2:] + ["--total_batch_size", "64"]
    cut = words.index("--")
    lines = [f"{words[i]} {' '.join(small[:6])}" for i in range(2, cut)]
    result = run_words(copy, [*words[:2], *few, *lines, "--", *words[cut + 1 :], *small[6:]])
    assert "tokens/s" in result.stdout and "ratio to 1" in result.stdout


def two_runs(copy):
    """logs/A and logs/B."""
    write_data(copy / "data/some")
    for name, seed in (("A", "1"), ("B", "2")):
        flags = [*SMALL, *data_flags(copy / "data/some"), "--output_dir", str(copy / "made"), "--seed", seed]
        assert script.main(flags) == 0
        made, = runs_in(copy / "made")
        (copy / "logs").mkdir(exist_ok=True)
        made.rename(copy / "logs" / name)


def try_compare(copy, words, server):
    if "--base" not in words:
        two_runs(copy)
        found = run_words(copy, words).stdout
        assert "final validation loss" in found and re.search(r"differs in.*\n.*\n\| seed ", found)
        return
    make_shards(copy, words)
    result = run_words(copy, [*words, *shrunk(1, words), "--n_head", "8", "--n_embd", "64"])  # of which gqa's presets share 4
    assert re.search(r"variant - base = .* \(paired t, 3 seeds\): ", result.stdout)


def try_report(copy, words, server):
    two_runs(copy)
    run_words(copy, words)
    page = (copy / words[words.index("--output") + 1]).read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count("<svg") > 4


def try_evaluate(copy, words, server):
    two_runs(copy)
    (copy / words[words.index("--data") + 1]).write_text("Some words, and others. " * 20)
    assert json.loads(run_words(copy, words).stdout).keys() >= {"loss", "perplexity", "bits_per_byte"}


def try_more_requirements(copy, words, server):
    lines = (copy / words[words.index("-r") + 1]).read_text().split("\n")
    assert lines[0] == "-r requirements.txt" and any(line.startswith("scipy") for line in lines)


def try_mlp3x(copy, words, server):
    assert re.search(r"124,880,704", run_words(copy, words).stdout)


KINDS = (
    # how a command begins, behind variables that it sets; the first that fits counts
    (r"source activate_env\.sh$", try_activation),
    (r"\./run\.sh( |$)", try_run_sh),
    (r"torchrun .*\btrain_gpt2_mod\.py ", try_training),
    (r"python train_gpt2_mod\.py ", try_training),
    (r"python data/fineweb\.py( |$)", try_fineweb),
    (r"python data/prepare\.py ", try_prepare),
    (r"python data/quickstart\.py$", try_quickstart_data),
    (r"python data/train_tokenizer\.py ", try_tokenizer),
    (r"python tools/plan\.py ", try_plan),
    (r"python tools/hf\.py ", try_hf),
    (r"python tools/sample\.py( |$)", try_sample),
    (r"python tools/doctor\.py( |$)", try_doctor),
    (r"python tools/bench\.py ", try_bench),
    (r"python tools/compare\.py ", try_compare),
    (r"python tools/report\.py ", try_report),
    (r"python tools/evaluate\.py ", try_evaluate),
    (r"pip install -r requirements-\w+\.txt$", try_more_requirements),
    (r"python docs/02-mlp-3x-optimization/test_mlp3x\.py$", try_mlp3x),
)


def kind_of(words):
    line = " ".join(word for word in words if not re.match(r"[A-Z_]+=", word))
    return next((attempt for pattern, attempt in KINDS if re.match(pattern, line)), None)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(copy, hub, words):  # noqa: F811
    attempt = kind_of(words)
    assert attempt, f"README.md has a command that no test runs: {shlex.join(words)}; add its kind to KINDS"
    attempt(copy, words, hub)


def test_the_readme_has_its_commands():
    """A README of which no command is found would pass the test above."""
    lines = [" ".join(words) for words in commands()]
    for line in ("./run.sh", "./run.sh test"):
        assert line in lines
    assert {kind for _, kind in KINDS} - {try_quickstart_data} <= {kind_of(words) for words in commands()}
    assert kind_of(["rm", "-r", "logs"]) is None and kind_of(["python", "other.py"]) is None


# ----------------------------------------------------------------------------------------------------------------------
# run.sh


SAY = 'printf "%s\\n" "$(basename "$0")" "$@"'
PRESETS = [name for name in script.base_configs if name[0] in "dgs"] + ["nocap", "gqa"]


def flags_of(out, program):
    """The words behind a program's name in what the stub of torchrun or python printed."""
    words = out.splitlines()
    assert words[0] == program or program == "python"
    return words[words.index("train_gpt2_mod.py") + 1 :]


def resolve(flags, world_size=1):
    return script.resolve(script.parse_flags(flags), machine(world_size=world_size))[:2]


def test_presets_of_run_sh(copy):
    make_program(copy / ".venv/bin/torchrun", SAY)
    runs = {}
    for name in PRESETS:
        result = run_words(copy, ["./run.sh", name, "--seed", "99", "--output_dir", "some where"], NPROC="2")
        assert "--standalone\n--nproc_per_node=2\n" in result.stdout
        config, runs[name] = resolve(flags_of(result.stdout, "torchrun"), world_size=2)
        if name in script.base_configs:
            assert runs[name].model == name
            assert config.network() == script.resolve(dict(model=name), machine())[0].network()
        assert runs[name].seed == 99 and runs[name].output_dir == "some where"
        assert runs[name].input_bin == script.TrainConfig.input_bin
    for name in ("nocap", "gqa"):
        run = runs[name]
        assert (run.model, run.tokens_per_step, run.num_iterations) == ("d12", 524_288, 4768)
        assert (run.learning_rate, run.warmup_iters, run.warmdown_iters) == (1.8e-3, 256, 1024)
        assert (run.weight_decay, run.target_val_loss) == (0.1, 3.3821)
    assert (config.n_head, config.n_kv_head, config.n_embd) == (12, 3, 864)  # gqa's, the last


def test_processes_of_run_sh(copy):
    make_program(copy / ".venv/bin/torchrun", SAY)
    result = run_words(copy, ["./run.sh", "nocap", "--batch_size", "64"], NPROC="8")
    assert "--nproc_per_node=8\n" in result.stdout
    _, run = resolve(flags_of(result.stdout, "torchrun"), world_size=8)
    assert (run.batch_size, run.grad_accumulation_steps, run.tokens_per_step) == (64, 8, 524_288)


def test_quickstart_of_run_sh(copy):
    make_program(copy / ".venv/bin/python", SAY)
    result = one_process("./run.sh", cwd=copy, PYTHON=sys.executable)
    assert result.returncode == 0, result
    data, train, draw = re.split(r"^python\n", result.stdout, flags=re.M)[1:]
    assert data.split() == ["data/quickstart.py"] and draw.splitlines()[:2] == ["tools/sample.py", "logs"]
    config, run = resolve(train.splitlines()[1:])
    assert run.model == "tiny" and run.input_bin == "data/quickstart/train_*.bin" and run.output_dir == "logs"
    assert run.num_iterations * run.tokens_per_step < 3 * 60 * 12_000  # three minutes at the speed of two plain cores


def test_speedrun_of_run_sh(copy):
    """The stub of python lets the first call, whether there is a GPU, fail or not."""
    make_program(copy / ".venv/bin/python", f'[ "$1" = -c ] && exit $NO_GPU; {SAY}')
    for words, fetched in ((["--seed", "99"], ["data/fineweb.py", "2"]), (["--input_bin", "mine_*.bin"], None)):
        result = one_process("./run.sh", "speedrun", *words, cwd=copy, PYTHON=sys.executable, NO_GPU="0")
        assert result.returncode == 0, result
        *before, train = re.split(r"^python\n", result.stdout, flags=re.M)[1:]
        assert [said.split() for said in before] == ([fetched] if fetched else [])
        typed = script.parse_flags(train.splitlines()[1:])
        config, run, notes = script.resolve(typed, machine(memory=24 * 2**30))
        assert (run.model, run.tokens_per_step, run.num_iterations, run.batch_size) == ("d12_fast", 65536, 2000, 32)
        assert any(note.startswith("batch_size=32: a plan of ") for note in notes)  # it says what it picked
        assert script.resolve(typed, machine(memory=80 * 2**30))[1].batch_size == 64
    result = one_process("./run.sh", "speedrun", cwd=copy, PYTHON=sys.executable, NO_GPU="1")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == ("error: speedrun needs an NVIDIA GPU; ./run.sh trains a small model on what is here\n")


def test_run_sh_elsewhere_and_its_words(copy, tmp_path):
    result = one_process(copy / "run.sh", "help", cwd=tmp_path, PYTHON=sys.executable)
    assert result.returncode == 0 and "./run.sh test" in result.stdout and "set -e" not in result.stdout
    assert all(line == line.lstrip("#") for line in result.stdout.splitlines())
    for name in ("nonsense", "tiny "):
        result = one_process(copy / "run.sh", name, cwd=tmp_path, PYTHON=sys.executable)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert name in result.stderr and "help" in result.stderr and result.stdout == ""


def test_run_sh_hands_failures_on(copy):
    make_program(copy / ".venv/bin/torchrun", "exit 3")
    assert one_process(copy / "run.sh", "d12", PYTHON=sys.executable, NPROC="2").returncode == 3


def test_one_process_without_data_is_told_so_in_one_line(copy):
    result = one_process(copy / "run.sh", "d12", PYTHON=sys.executable)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: no file matches 'data/fineweb10B/fineweb_train_*.bin'; python data/fineweb")


# ----------------------------------------------------------------------------------------------------------------------
# activate_env.sh, with a Python whose venv has a pip that only says what it was asked


class Environments:
    """A copy of the repository on a PATH of a few tools; .calls() is what was made and installed."""

    def __init__(self, copy, tools):
        self.copy, self.tools, self.log = copy, tools, copy / "calls"
        tools.mkdir()
        for name in ("bash", "sh", "cat", "tr", "grep", "sort", "dirname", "mkdir", "chmod", "cp", "rm", "head", "sed"):
            (tools / name).symlink_to(shutil.which(name))
        pip = tools / "fake-pip"
        make_program(pip, f"""
case "$1" in
index) echo "torch (2.13.0+cpu)"; echo "Available versions: 2.13.0+cpu, 2.12.1+cpu, 2.12.1" ;;
*) echo "pip $*" >>{shlex.quote(str(self.log))}; exit "${{PIP_EXIT:-0}}" ;;
esac""")
        make_program(tools / "python3", f"""
if [ "$1" = -m ] && [ "$2" = venv ]; then
    echo venv >>{shlex.quote(str(self.log))}
    mkdir -p "$3/bin" && cp {shlex.quote(str(pip))} "$3/bin/pip" && echo "ACTIVATED=yes" >"$3/bin/activate"
else
    exec {shlex.quote(sys.executable)} "$@"
fi""")
        self.stamp = copy / ".venv" / ".stamp"

    def activate(self, **environment):
        return one_process("bash", "-c", 'source "$0/activate_env.sh"; echo "code $? activated $ACTIVATED"',
                           str(self.copy), PATH=str(self.tools), PYTHON="", **environment)

    def calls(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def environments(bare_copy, tmp_path):
    return Environments(bare_copy, tmp_path / "tools")


def test_an_environment_is_made_once(environments):
    result = environments.activate()
    assert result.stdout.endswith("code 0 activated yes\n"), result
    calls = environments.calls()
    assert calls[0] == "venv" and len(calls) > 1
    assert any(re.fullmatch(r"pip install .*-r .*requirements\.txt", call) for call in calls)
    assert environments.stamp.read_text().strip() == requirements_stamp(environments.copy)
    result = environments.activate()
    assert result.stdout == "code 0 activated yes\n" and environments.calls() == []


def test_other_requirements_are_installed(environments):
    environments.activate()
    environments.calls()
    with open(environments.copy / "requirements.txt", "a") as file:
        file.write("another-package\n")
    assert environments.activate().stdout.endswith("code 0 activated yes\n")
    assert any("requirements.txt" in call for call in environments.calls())
    assert environments.stamp.read_text().strip() == requirements_stamp(environments.copy)


def test_an_environment_without_a_stamp_is_installed(environments):
    environments.activate()
    environments.stamp.unlink()
    environments.calls()
    environments.activate()
    assert environments.calls() and environments.stamp.exists()


@pytest.mark.parametrize("before", ["nothing", "an older environment"])
def test_a_failed_installation_leaves_no_stamp(environments, before):
    if before != "nothing":
        environments.activate()
        (environments.copy / "requirements.txt").write_text("another-package\n")
    result = environments.activate(PIP_EXIT="1")
    assert result.stdout.endswith("code 1 activated \n"), result
    assert not environments.stamp.exists()
    result = one_process("bash", environments.copy / "run.sh", "d12", PATH=str(environments.tools), PYTHON="",
                         PIP_EXIT="1")
    assert result.returncode != 0 and not (environments.copy / "logs").exists()
    assert environments.activate().stdout.endswith("code 0 activated yes\n") and environments.stamp.exists()


def test_torch_for_the_machine(environments):
    """Its CPU build where there is no NVIDIA GPU, the newest that the index has."""
    environments.activate()
    assert any("torch==2.13.0+cpu" in call for call in environments.calls())
    make_program(environments.tools / "nvidia-smi", "exit 0")
    environments.stamp.unlink()
    environments.activate()
    calls = environments.calls()
    assert len(calls) > 1 and not any("+cpu" in call for call in calls)


def test_another_python(environments):
    """PYTHON names it; one that is not there is an error."""
    (environments.tools / "python3").rename(environments.tools / "snake")
    environment = dict(PATH=str(environments.tools))
    activate = ["bash", "-c", f'source {shlex.quote(str(environments.copy))}/activate_env.sh; echo "code $?"']
    assert one_process(*activate, **environment, PYTHON="none").stdout == "code 1\n"
    assert one_process(*activate, **environment, PYTHON="snake").stdout.endswith("code 0\n")
    assert environments.calls()[0] == "venv"
