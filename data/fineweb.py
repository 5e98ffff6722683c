"""Download FineWeb-10B as ready token shards: about 10 billion GPT-2 tokens, 21 GB.

    python data/fineweb.py                 all 103 training shards and the validation shard
    python data/fineweb.py 8               validation and the first 8 training shards (0.8 billion tokens, 1.8 GB)
    python data/fineweb.py 8 --out /fast/disk/fineweb10B
    HF_ENDPOINT=https://a.mirror python data/fineweb.py

The shards are those of the Hugging Face data set kjj0/fineweb10B-gpt2, the 10-billion-token sample of FineWeb (Penedo
et al. 2024) tokenized as llm.c's dev/data/fineweb.py does it: fineweb_val_000000.bin, fineweb_train_000001.bin to
..._000103.bin, 100 million tokens each (the last may have fewer), in the format that shards.py describes.

Every file is checked: its size and SHA-256 against what the hub says, its header against its length. The same command
continues after an interruption, at the file that it had come to, and fetches a damaged one again. manifest.json
remembers what was checked, by size and time of modification, so that a complete folder is found complete at once and
without a network. (.cache in the folder is the download library's own.)
"""
import argparse
import errno
import shutil
import sys
import time
from pathlib import Path

from shards import MANIFEST, DataError, Parser, read_manifest, run, shard_record, write_manifest
from shards import GPT2_VOCAB_SIZE as VOCAB_SIZE

REPO = "kjj0/fineweb10B-gpt2"
SHARDS = 103
TIMEOUT = 30  # seconds without an answer


def shard_names(count):
    """Validation first: with it and any train shard a run can start."""
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]


def is_checked(path, record):
    """Whether the file is the one that the manifest's record was made from, by size and time of modification."""
    if record is None or not path.is_file():
        return False
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (record["bytes"], record.get("mtime_ns"))


def from_hub(what, call):
    """call(), with whatever the hub's library raises as a DataError.

    All exceptions: the library has changed its HTTP client with its major versions, and these share no class of errors.
    """
    try:
        return call()
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # the disk's fault, and said so
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"cannot fetch {what} ({reason[:300]}); check the network (HF_ENDPOINT names a mirror) and "
                        "--repo; the same command continues") from error


def import_hub():
    try:
        import huggingface_hub
    except ImportError:
        raise DataError("data/fineweb.py needs huggingface_hub; pip install huggingface_hub") from None
    from huggingface_hub.utils import disable_progress_bars, logging
    logging.set_verbosity_error()  # its warnings about retries: if they fail, we say so in one line
    if not sys.stderr.isatty():
        disable_progress_bars()  # made for a terminal, unreadable in a log file
    return huggingface_hub


def remote_files(hub, repo, revision, names):
    """Return (commit, {name: (bytes, SHA-256 or None)}) of the wanted files. A file kept outside LFS has no SHA-256."""
    info = from_hub(f"the list of files of {repo}", lambda: hub.HfApi().dataset_info(
        repo, revision=revision, files_metadata=True, timeout=TIMEOUT))
    files = {f.rfilename: (f.size, f.lfs.sha256 if f.lfs else None) for f in info.siblings or []}
    absent = [name for name in names if name not in files]
    if absent:
        last = max((name for name in files if name.startswith("fineweb_train_")), default="no training shard at all")
        raise DataError(f"repo={repo} has no {absent[0]} (its last is {last}); ask for fewer shards, or "
                        "name another --repo")
    return info.sha, {name: files[name] for name in names}


def matches(record, size, sha256):
    return record["bytes"] == size and sha256 in (None, record["sha256"])


def check(path, size, sha256):
    """The record of a file that is the hub's and a shard, else None."""
    try:
        # The size first: it tells most damage without reading the file.
        record = shard_record(path) if path.is_file() and path.stat().st_size == size else None
    except DataError:
        return None
    return record if record and matches(record, size, sha256) else None


def fetch(hub, repo, commit, name, size, sha256, out):
    """Download one file, in place of what is there; return its record for the manifest."""
    path = out / name
    for force in (False, True):  # the second time past all caches: a damaged copy may come from one
        path.unlink(missing_ok=True)
        start = time.monotonic()
        from_hub(name, lambda: hub.hf_hub_download(
            repo, name, repo_type="dataset", revision=commit, local_dir=out, force_download=force))
        seconds = max(time.monotonic() - start, 1e-9)
        record = check(path, size, sha256)
        if record:
            print(f"{name}: {size / 1e6:.1f} MB, {size / 1e6 / seconds:.1f} MB/s", flush=True)
            return record
    path.unlink()
    raise DataError(f"{name} does not arrive as the token shard with sha256={sha256} that {repo} lists; try again "
                    "later, or with another HF_ENDPOINT or --repo")


def download(names, out, source):
    """Make the folder hold the named files of the hub, checked; return its manifest."""
    manifest = read_manifest(out)
    records = manifest["shards"] if manifest else {}
    if all(is_checked(out / name, records.get(name)) for name in names):
        print(f"{out} is complete already: {len(names)} files")
        return manifest
    hub = import_hub()
    commit, remote = remote_files(hub, source["repo"], source["revision"], names)
    todo = [name for name in names
            if not (is_checked(out / name, records.get(name)) and matches(records[name], *remote[name]))]
    out.mkdir(parents=True, exist_ok=True)
    needed = sum(remote[name][0] for name in todo if not (out / name).is_file())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(f"--out {out} has {free / 1e9:.1f} GB free, the shards need {needed / 1e9:.1f}; "
                        "ask for fewer, or name a folder on another disk")
    for name in todo:
        record = check(out / name, *remote[name])
        if record is None and (out / name).exists():
            print(f"{name} is damaged or incomplete: fetching it again", flush=True)
        record = record or fetch(hub, source["repo"], commit, name, *remote[name], out)
        records[name] = record | {"mtime_ns": (out / name).stat().st_mtime_ns}
        # After each file, so that an interruption loses no check. Only what is there is listed, in the order of names.
        present = {name: records[name] for name in sorted(records) if (out / name).is_file()}
        manifest = write_manifest(out, "gpt2", VOCAB_SIZE, source | {"commit": commit}, present)
    return manifest


def main(argv):
    parser = Parser("fineweb.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=int, default=SHARDS, metavar="N",
                        help="training shards to fetch, from the first on, 100 million tokens each "
                             "(default: all %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "fineweb10B", metavar="FOLDER",
                        help="folder to write (default: fineweb10B, beside this script)")
    parser.add_argument("--repo", default=REPO,
                        help="data set on the hub with files of these names (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of it (default: %(default)s)")
    flags = parser.parse_args(argv)
    if flags.shards < 1:
        raise DataError(f"N={flags.shards} must be at least 1, the number of training shards; all are {SHARDS}")
    source = {"repo": flags.repo, "revision": flags.revision}
    manifest = read_manifest(flags.out)
    if (flags.out / MANIFEST).exists() and (manifest is None or not manifest["options"].items() >= source.items()):
        raise DataError(f"--out {flags.out} holds other shards than {flags.repo} at {flags.revision}; "
                        "name another folder")
    manifest = download(shard_names(flags.shards), flags.out, source)
    print(f"{flags.out}: {manifest['tokens']:,} tokens, {manifest['documents']:,} documents in "
          f"{len(manifest['shards'])} shards")


if __name__ == "__main__":
    run(main)
