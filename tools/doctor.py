#!/usr/bin/env python3
"""Is this machine ready, is this data whole, does a resume here go on bitwise?

    python tools/doctor.py [--output_dir DIR] [--input_bin SHARDS] [--input_val_bin SHARDS]
    python tools/doctor.py --data data/fineweb10B
    python tools/doctor.py --resume [--steps N] [--nproc P] [--keep DIR] [--output_dir DIR] -- FLAGS

The first looks at the environment, a line per check: ok, note (nothing is wrong, but good to know) or FAIL with what to
do. The second holds every file of a folder against its manifest.json (size, SHA-256) and looks into each shard. The
third trains 2N steps with FLAGS of train_gpt2_mod.py, then resumes a copy of that run at step N, and compares all that
the two runs logged and saved; --nproc trains in P processes. Both write beside the folder of runs, and --keep keeps it.

Exit codes: 0, all is well; 1, something is wrong, as the lines say; 2, it could not be found out, for the reason in one
line on stderr; 130, interrupted; 141, nobody read what was printed.
"""
import argparse
import collections
import contextlib
import functools
import importlib
import importlib.metadata
import json
import netrc
import operator
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
try:
    import torch
    import torch.distributed as dist

    import train_gpt2_mod as script
    from shards import MANIFEST, DataError, Parser, exit_code, read_manifest, sha256_of
except (ImportError, AttributeError, OSError) as e:  # missing; an old torch; a library that does not load
    print(f"FAIL    packages: {' '.join(str(e).split())}; source activate_env.sh, or pip install -r requirements.txt")
    sys.exit(1)

SCRIPT = ROOT / "train_gpt2_mod.py"
OK, NOTE, FAIL = "ok", "note", "FAIL"
GIB = 2**30
CHECKPOINTS, BYTES_A_PARAMETER = 3, 12  # to have room for; a weight and AdamW's two moments, in fp32
NVIDIA_DEVICE, NVIDIA_PROGRAM = "/dev/nvidia0", "nvidia-smi"
PATIENCE = 3  # seconds for W&B's host to answer
TRAINED = ("train_loss", "lr", "grad_norm", "mtp_weight", "tokens")  # of a step's record: the rest is time and memory
VALIDATED = ("val_loss", "val_ntp_loss", "val_mtp_loss", "mtp_weight", "val_targets", "tokens")
SAVED = ("model", "optimizer", "loader", "scaler", "rng", "step", "tokens", "skipped")  # of a checkpoint, likewise
LAST_LINES = 20  # of a trainer that failed without an error line of its own


def say(status, name, text):
    print(f"{status:<8}{name}: {' '.join(str(text).split())}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The environment. A check takes the flags and gives (status, text); the text of a FAIL ends with what to do.

COMPARISONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}


def requirements():
    """Package -> the versions that requirements.txt asks for, as it has them: torch -> '>=2.11,<2.14'."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return dict(re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups() for line in lines if line)


def fits(version, wanted):
    """Whether a version is one of those wanted. Its numbers alone count: 2.13.0+cpu is 2.13."""
    def numbers(text):
        release = [int(n) for n in re.match(r"\d+(\.\d+)*", text)[0].split(".")]
        return release + [0] * (6 - len(release))

    pairs = re.findall(r"([<>=]+)\s*(\d[\d.]*)", wanted)
    return all(COMPARISONS[sign](numbers(version), numbers(limit)) for sign, limit in pairs)


def check_python(args):
    version = platform.python_version()
    wanted = importlib.metadata.metadata("torch").get("Requires-Python") or ""
    if not fits(version, wanted):
        return FAIL, f"{version}, and torch wants {wanted}; set PYTHON to another, then source activate_env.sh"
    return OK, f"{version} ({sys.executable})"


def check_package(name, args):
    """Installed, of a version that requirements.txt asks for, and importable."""
    wanted = requirements()[name]
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(name.replace("-", "_"))
    except ImportError as e:
        return FAIL, f"cannot be imported ({e}); pip install '{name}{wanted}'"
    if not fits(version, wanted):
        return FAIL, f"{version}, supported is {wanted}; pip install '{name}{wanted}'"
    return OK, f"{version} (supported: {wanted})"


def driver():
    """NVIDIA's driver in words, and (major, minor) of the newest CUDA that it knows, None where torch cannot say."""
    words, number = "driver unknown", 0
    with contextlib.suppress(AttributeError, RuntimeError):  # a build without CUDA; no driver
        number = torch._C._cuda_getDriverVersion()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [NVIDIA_PROGRAM, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        words = f"driver {done.stdout.split()[0]}" if done.returncode == 0 and done.stdout.strip() else words
    known = (number // 1000, number % 1000 // 10) if number else None
    return words + (f" for CUDA {known[0]}.{known[1]}" if known else ""), known


def why_no_cuda():
    """Why torch finds no GPU, in one line of its own words."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as e:
        return str(e).strip().splitlines()[0]
    return "torch does not say why"


def check_gpu(args):
    if torch.cuda.is_available():
        return check_cuda()
    sign = NVIDIA_DEVICE if os.path.exists(NVIDIA_DEVICE) else shutil.which(NVIDIA_PROGRAM)
    if not sign:
        return NOTE, f"no NVIDIA GPU: torch {torch.__version__} trains on {script.World().device.type}"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return NOTE, "hidden by CUDA_VISIBLE_DEVICES; unset it to train on the GPU"
    if torch.version.cuda is None:
        return FAIL, (f"{sign} is here, and torch {torch.__version__} is built without CUDA; pip install "
                      f"--force-reinstall 'torch{requirements()['torch']}' from an index with CUDA's build")
    return FAIL, (f"{sign} is here, and torch for CUDA {torch.version.cuda} sees no GPU ({driver()[0]}): "
                  f"{why_no_cuda()}; update the driver, or install torch's build for the driver's CUDA")


def check_cuda():
    """The GPUs that torch sees, each asked to add, and whether the driver is as new as torch's CUDA."""
    found = []
    for i in range(torch.cuda.device_count()):
        (torch.ones(8, device=f"cuda:{i}") + 1).sum().item()  # raises where torch has no kernels for this GPU
        free, total = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        found.append(f"{torch.cuda.get_device_name(i)} ({free / GIB:.1f} of {total / GIB:.1f} GiB free, compute "
                     f"capability {capability})")
    machine, built, (words, known) = script.World("cuda").machine(), torch.version.cuda, driver()
    has = dict(bf16=machine.has_bf16, fp8=machine.has_fp8)
    kinds = [name if there else f"no {name}" for name, there in has.items()]
    text = ", ".join(found + kinds) + f"; {words}, torch for CUDA {built}"
    if known and built and known < tuple(map(int, built.split(".")[:2])):
        return NOTE, f"{text}; the driver's CUDA is the older one: update the driver where kernels do not load"
    return OK, text


def check_compile(args):
    device = script.World().device
    reason = script.why_no_compile(device)
    try:
        triton = f"Triton {importlib.metadata.version('triton')}"
    except ImportError:
        triton = "no Triton"
    if reason is None:
        return OK, f"works on {device.type}, {triton}"
    remedy = "it needs a C compiler (gcc), Python's headers and, on CUDA, Triton"
    if device.type == "cuda":
        return FAIL, f"does not work on cuda, {triton}: {reason}; {remedy}, or train slower with --no_compile"
    return NOTE, f"does not work on {device.type}, where it is not used unless you add --compile: {reason}; {remedy}"


def check_processes(args):
    """The library through which several processes train together."""
    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "missing"
    text = f"NCCL {version}, gloo {'there' if gloo else 'missing'}"
    needed = "NCCL" if torch.cuda.is_available() else "gloo"
    if not (nccl if needed == "NCCL" else gloo):
        return FAIL, f"{text}; one process trains without {needed}, for more install torch's own build from pytorch.org"
    return OK, text


def existing(folder):
    """The folder, or the nearest above it that is there."""
    path = Path(folder).absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def check_disk(args):
    model = script.TrainConfig.model
    with torch.device("meta"):
        parameters = script.GPT(script.GPTConfig(**script.base_configs[model])).parameter_count()
    size, free = BYTES_A_PARAMETER * parameters, shutil.disk_usage(existing(args.output_dir)).free
    text = f"{free / GIB:.1f} GiB free for {args.output_dir}, room for {free // size} checkpoints of {model}"
    if free < CHECKPOINTS * size:
        return FAIL, f"{text} ({size / GIB:.1f} GiB each); free some space, or name another place with --output_dir"
    return OK, text


def check_writable(args):
    place = existing(args.output_dir)
    remedy = "name another folder with --output_dir"
    if not place.is_dir():
        return FAIL, f"{place} is a file; {remedy}"
    try:
        with tempfile.TemporaryFile(dir=place) as f:
            f.write(b"x")
    except OSError as e:
        return FAIL, f"{place} cannot be written ({e.strerror}); {remedy}"
    return OK, str(place) + ("" if place == Path(args.output_dir).absolute() else f", where {args.output_dir} goes")


def describe(shards):
    files = f"{len(shards.files)} shard{'s' * (len(shards.files) != 1)}"
    return f"{shards.total:,} tokens in {files}, vocabulary {shards.vocab_size}"


def check_train_data(args):
    return OK, describe(script.TokenShards(args.input_bin))


def check_val_data(args):
    if not args.input_val_bin:
        return NOTE, "none named: no validation"
    shards = script.TokenShards(args.input_val_bin)
    with contextlib.suppress(script.DataError):  # which is for the check before to say
        trained = script.TokenShards(args.input_bin).vocab_size
        if trained != shards.vocab_size:
            return FAIL, (f"vocabulary {shards.vocab_size}, that of the training shards is {trained}; name shards of "
                          "one tokenizer")
    return OK, describe(shards)


def has_key(host):
    """Whether there is an API key for W&B, in the environment or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    return False


def reachable(host):
    """Whether the host takes a connection within PATIENCE seconds. In a thread, for a name's look-up has no limit."""
    connected = []

    def connect():
        with contextlib.suppress(OSError), socket.create_connection((host, 443), PATIENCE):
            connected.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(connected)


def check_account(args):
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return OK, f"WANDB_MODE={mode}: none is needed"
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    key = has_key(host)
    answers = None if urllib.request.getproxies().get("https") else reachable(host)
    answer = {None: "is behind a proxy, not tried", True: "answers", False: f"does not answer within {PATIENCE} s"}
    text = f"{'an API key' if key else 'no API key'}; {host} {answer[answers]}"
    if key and answers:
        return OK, text
    return NOTE, f"{text}; --log_wandb needs both, or WANDB_MODE=offline" + ("" if key else "; wandb login takes a key")


CHECKS = (
    ("Python", check_python),
    *((name, functools.partial(check_package, name)) for name in requirements()),
    ("GPU", check_gpu),
    ("torch.compile", check_compile),
    ("several processes", check_processes),
    ("disk", check_disk),
    ("folder of runs", check_writable),
    ("training data", check_train_data),
    ("validation data", check_val_data),
    ("W&B account", check_account),
)


def diagnose(output_dir=script.TrainConfig.output_dir, input_bin=script.TrainConfig.input_bin,
             input_val_bin=script.TrainConfig.input_val_bin):
    """Print a line per check; gives the exit code. A check that raises is one that fails."""
    args = argparse.Namespace(output_dir=output_dir, input_bin=input_bin, input_val_bin=input_val_bin)
    count = collections.Counter()
    for name, check in CHECKS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a line a check is to come
                status, text = check(args)
        except (script.ConfigError, script.DataError) as e:
            status, text = FAIL, e
        except Exception as e:
            reason = (str(e).strip() or "no more is known").splitlines()[0]
            status, text = FAIL, f"cannot be checked ({type(e).__name__}: {reason}); mend what this names"
        say(status, name, text)
        count[status] += 1
    print(f"{len(CHECKS)} checks: {count[OK]} ok, {count[NOTE]} to note, {count[FAIL]} failed")
    return 1 if count[FAIL] else 0


# ----------------------------------------------------------------------------------------------------------------------
# --data: a folder of shards against its manifest

def shard_records(folder):
    """File name -> record, of a folder's manifest. Raises DataError unless each has a size and a hash, and a name that
    stays in the folder."""
    manifest = read_manifest(folder)
    if manifest is None:
        what = "cannot be understood" if (folder / MANIFEST).exists() else "does not exist"
        raise DataError(f"{folder / MANIFEST} {what}; data/fineweb.py and data/prepare.py write one with their shards")
    for name, record in manifest["shards"].items():
        path = PureWindowsPath(name)  # which knows the separators of all systems
        if path.anchor or ".." in path.parts or not path.parts or "\0" in name:
            raise DataError(f"{folder / MANIFEST} names {name!r}, which is not inside the folder; do not trust it")
        if not re.fullmatch("[0-9a-fA-F]{64}", record["sha256"]):
            raise DataError(f"{folder / MANIFEST} has no SHA-256 of {name}; make it again")
    if not manifest["shards"]:
        raise DataError(f"{folder / MANIFEST} names no shards; make it again")
    return manifest["shards"]


def fault(path, record):
    """What is wrong with a file that the manifest records, None if nothing is."""
    remedy = "remove it, and run what made the folder again"
    try:
        if not path.is_file():
            return "missing; run what made the folder again"
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{size:,} bytes, the manifest says {record['bytes']:,}; {remedy}"
        sha256 = sha256_of(path)
        if sha256 != record["sha256"].lower():
            return f"SHA-256 {sha256}, the manifest says {record['sha256']}; {remedy}"
        script.TokenShards(str(path.absolute())).check_ids()
    except OSError as e:
        return f"cannot be read ({e.strerror}); mend the disk, or {remedy}"
    except script.DataError as e:
        return str(e)
    return None


def check_folder(data):
    """Print a line per file of a folder of shards; gives the exit code."""
    records = shard_records(data)
    wrong = 0
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:  # hashing leaves Python's lock to others
        for name, text in zip(records, pool.map(lambda name: fault(data / name, records[name]), records)):
            say(FAIL if text else OK, name, text or f"{records[name]['bytes']:,} bytes, SHA-256 and token ids right")
            wrong += text is not None
    for path in sorted(data.glob("*.bin")):
        if path.name not in records:
            say(NOTE, path.name, f"not in {MANIFEST}; a pattern such as '*.bin' takes it all the same")
    print(f"{wrong} of {len(records)} files are wrong" if wrong else f"{len(records)} files, all as {MANIFEST} says")
    return 1 if wrong else 0


# ----------------------------------------------------------------------------------------------------------------------
# --resume: N + N steps against 2N

def train(title, command):
    """Run a trainer to its end, silently. Raises DataError with its own error line if it fails, after its last lines
    if it has none."""
    print(f"{title}: {shlex.join(command)}", flush=True)
    settings = dict(os.environ, WANDB_MODE="disabled")  # neither run is one to look at
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", errors="replace", env=settings) as child:
        try:
            lines = child.communicate()[0].splitlines()
        except BaseException:
            child.terminate()  # which torchrun hands on to its processes
            raise
    if child.returncode == 0:
        return
    own = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    if own is None:
        print("\n".join(lines[-LAST_LINES:]), file=sys.stderr)
    raise DataError(f"{title} ended with code {child.returncode}: {own or 'its last lines are above'}")


def checkpoint_of(folder, step):
    return folder / f"step{step:06d}.pt"


def copy_as_of(whole, step, target):
    """A copy of a run's folder, without the checkpoints after a step."""
    def later(_, names):
        found = [(name, re.match(r"step(\d+)\.", name)) for name in names]
        return [name for name, match in found if match and int(match[1]) > step]

    return Path(shutil.copytree(whole, target / whole.name, ignore=later))


def read_records(folder):
    """{(step, whether it is a validation's): its records} of metrics.jsonl."""
    found = collections.defaultdict(list)
    for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        found[record["step"], "val_loss" in record].append(record)
    return found


def record_differences(whole, resumed, last):
    """Of read_records' two tables, in the order of steps: where the second is not the first, or a step of 1 to `last`
    is not there exactly once. Yields (step, text)."""
    for step, validation in sorted({*whole, *resumed, *((step, False) for step in range(1, last + 1))}):
        pair = whole[step, validation], resumed[step, validation]
        kind, names = ("validations", VALIDATED) if validation else ("records", TRAINED)
        if [len(records) for records in pair] != [1, 1]:
            yield step, f"{len(pair[0])} {kind} against {len(pair[1])}, where one each is right"
            continue
        (a,), (b,) = pair
        for name in names:
            if a.get(name) != b.get(name):
                yield step, f"{name} {a.get(name)} against {b.get(name)}"


def content_differences(a, b, where):
    """Where two parts of checkpoints are not the same, tensors bit for bit. Yields texts."""
    kind = torch.Tensor
    if isinstance(a, kind) and isinstance(b, kind) and (a.dtype, a.shape) == (b.dtype, b.shape):
        unequal = a != b
        if unequal.any():
            yield (f"{where}: {int(unequal.sum()):,} of {a.numel():,} values differ, the first is "
                   f"{a[unequal][0].item()} against {b[unequal][0].item()}")
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from content_differences(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from content_differences(x, y, f"{where} {i}")
    elif isinstance(a, kind) or type(a) is not type(b) or a != b:
        yield f"{where}: {str(a)[:60]} against {str(b)[:60]}"


def compare(whole, resumed, last):
    """[(step, text)] of all differences between two run folders, and the largest relative one of their losses."""
    tables = read_records(whole), read_records(resumed)
    found = list(record_differences(*tables, last))
    losses = [{key: rows[-1].get("train_loss") for key, rows in table.items() if rows} for table in tables]
    pairs = [(loss, losses[1].get(key)) for key, loss in losses[0].items()]
    ratio = max((abs(a - b) / abs(a) for a, b in pairs if a and b is not None), default=0.0)
    path = checkpoint_of(resumed, last)
    if not path.exists():
        return [*found, (last, f"{path.name} is missing: the resumed run did not come so far")], ratio
    a, b = script.load_checkpoint(checkpoint_of(whole, last)), script.load_checkpoint(path)
    return found + [(last, text) for part in SAVED for text in content_differences(a[part], b[part], part)], ratio


def remedy(run):
    """What to do about a difference, by the run's settings as a dict."""
    cuda = run["device"] == "cuda" or run["device"] == "auto" and torch.cuda.is_available()
    compiled = cuda if run["compile"] is None else run["compile"]
    if (cuda or compiled) and not run.get("deterministic"):
        return "add --deterministic: some kernels of a GPU, and compiled ones, may sum in another order each time"
    return ("what may differ: the number of threads (set OMP_NUM_THREADS), shards that changed meanwhile; if neither "
            "did, a resume loses something: keep both runs with --keep, and report it")


def verdict(whole, resumed, steps):
    """Print what the comparison of two run folders says; gives the exit code."""
    last = 2 * steps
    found, ratio = compare(whole, resumed, last)
    if not found:
        validations = sum(validation for _, validation in read_records(whole))
        print(f"ok: {steps} + {steps} steps equal {last} bitwise: {', '.join(TRAINED)} of {last} steps, {validations} "
              f"validation{'s' * (validations != 1)}, weights and optimizer of {checkpoint_of(whole, last).name}")
        return 0
    step, text = found[0]
    print(f"FAIL: first difference at step {step}: {' '.join(text.split())} ({steps} + {steps} steps)")
    losses = f"training losses differ by up to {ratio:.1e} of their value" if ratio else "training losses are equal"
    print(f"differences: {len(found)}, the last at step {found[-1][0]}; {losses}")
    print(remedy(json.loads((whole / "config.json").read_text())["run"]))
    return 1


@contextlib.contextmanager
def working_folder(keep, output_dir):
    """A new folder: `keep`, which stays, or one beside the folder of runs, which goes."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=existing(Path(output_dir).absolute().parent)) as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise DataError(f"keep={keep} is not an empty folder; name another")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep
    print(f"kept: {keep}")


def check_resume(flags, steps=10, nproc=1, keep=None, output_dir=script.TrainConfig.output_dir):
    """Train 2N steps, resume a copy at step N, compare; gives the exit code."""
    for name, value in dict(steps=steps, nproc=nproc).items():
        script.require(value >= 1, f"{name}={value} must be at least 1")
    typed = script.parse_flags(flags)
    refused = [f"--{name}" for name in ("resume", "dry_run") if name in typed]
    script.require(not refused, f"{', '.join(refused)} cannot be among the flags: the test begins and resumes runs of "
                   "its own; drop it")
    with working_folder(keep, typed.get("output_dir", output_dir)) as folder:
        ours = dict(num_iterations=2 * steps, save_every=steps, keep_last=0, output_dir=folder / "whole")
        overridden = [f"--{name}" for name in (*ours, "save_checkpoints") if name in typed]
        if overridden:
            print(f"overridden: {', '.join(overridden)}")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)] if nproc > 1 else []
        trainer = [sys.executable, *launch, str(SCRIPT)]
        settings = [str(word) for name, value in ours.items() for word in (f"--{name}", value)]
        train("first run", [*trainer, *flags, *settings, "--save_checkpoints"])
        whole, = (path for path in (folder / "whole").iterdir() if path.is_dir())
        for path in (checkpoint_of(whole, steps), checkpoint_of(whole, 2 * steps)):
            script.require(path.exists(), f"the first run has no {path.name}; drop what ends it early, such as "
                           "--target_val_loss")
        resumed = copy_as_of(whole, steps, folder / "resumed")
        train("resumed run", [*trainer, "--resume", str(checkpoint_of(resumed, steps))])
        return verdict(whole, resumed, steps)


# ----------------------------------------------------------------------------------------------------------------------

JOBS = {  # flag that asks for it -> its function, and the flags that go with it
    "": (diagnose, {"output_dir", "input_bin", "input_val_bin"}),
    "data": (check_folder, {"data"}),
    "resume": (check_resume, {"resume", "steps", "nproc", "keep", "output_dir"}),
}


def make_parser():
    parser = Parser("doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="doctor.py [FLAGS] | --data FOLDER | --resume [FLAGS] -- FLAGS of train_gpt2_mod.py",
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    run = script.TrainConfig
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="hold FOLDER's files against its manifest.json")
    parser.add_argument("--resume", action="store_true", help="hold N + N steps against 2N")
    parser.add_argument("--steps", type=int, metavar="N", help="with --resume: half of the steps [10]")
    parser.add_argument("--nproc", type=int, metavar="P", help="with --resume: processes, under torchrun [1]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with --resume: the runs go there, and stay")
    parser.add_argument("--output_dir", metavar="DIR", help=f"the folder of runs [{run.output_dir}]")
    parser.add_argument("--input_bin", metavar="SHARDS", help=f"training shards to look at [{run.input_bin}]")
    parser.add_argument("--input_val_bin", metavar="SHARDS", help=f"validation shards to look at [{run.input_val_bin}]")
    return parser


def doctor(argv):
    cut = argv.index("--") if "--" in argv else len(argv)
    typed = vars(make_parser().parse_args(argv[:cut]))
    job = next((name for name in ("data", "resume") if name in typed), "")
    act, allowed = JOBS[job]
    ignored = [f"--{name}" for name in typed if name not in allowed]
    ignored += ["--"] if job != "resume" and cut < len(argv) else []
    beside = f"with --{job}" if job else "without --resume"
    script.require(not ignored, f"{', '.join(ignored)} would be ignored {beside}; --help says what goes together")
    if typed.pop("resume", False):
        typed["flags"] = argv[cut + 1:]
    return act(**typed)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code(lambda: doctor(argv), known=ValueError)


if __name__ == "__main__":
    sys.exit(main())
