"""Token shards, their manifest, and the command-line manners that the programs beside the trainer share.

A shard has the format of llm.c (https://github.com/karpathy/llm.c, dev/data/data_common.py), word 3 being our addition:
    256 little-endian int32    magic 20240520, version 1, number of tokens, vocabulary size (0: GPT-2's 50257), zeros
    then little-endian uint16  the tokens
Each document starts with the end-of-text token, which is the last of the vocabulary. The shards of a split are one
stream of tokens: where a shard is full, the document goes on in the next one.

manifest.json says what a folder of shards holds: tokenizer, vocab_size, eot, documents, tokens, options, and for each
shard its tokens, documents (those that start in it), bytes and SHA-256.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_WORDS
GPT2_VOCAB_SIZE = 50257  # written as 0, so that GPT-2 shards are byte for byte those of llm.c
MAX_VOCAB_SIZE = 2**16  # tokens are uint16
MAX_SHARD_TOKENS = 2**31 - 1  # the token count is an int32
MANIFEST = "manifest.json"


class DataError(ValueError):
    """Something that the user can put right: one line, `name=value, the rule, what to do`."""


def require(condition, message):
    if not condition:
        raise DataError(message)


# -----------------------------------------------------------------------------
# Shards

class ShardWriter:
    """Write one shard piece by piece. The file gets its name when it is complete and synced."""

    def __init__(self, path, vocab_size):
        if vocab_size > MAX_VOCAB_SIZE:
            raise DataError(f"vocab_size={vocab_size} must be at most {MAX_VOCAB_SIZE}: tokens are stored as uint16")
        self.path, self.vocab_size = Path(path), vocab_size
        self.tokens = self.documents = 0
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.file = open(self.partial, "wb")
        self.file.write(bytes(HEADER_BYTES))  # rewritten by close(), when the number of tokens is known

    def write(self, tokens):
        assert tokens.dtype == np.uint16, tokens.dtype
        self.tokens += len(tokens)
        if self.tokens > MAX_SHARD_TOKENS:
            raise DataError(f"{self.path.name} has over {MAX_SHARD_TOKENS} tokens, the format's limit; "
                            "drop --shard_per_file or split the input")
        self.documents += int(np.count_nonzero(tokens == self.vocab_size - 1))
        self.file.write(tokens.astype("<u2", copy=False).tobytes())

    def close(self):
        """Finish the file; return its record for the manifest."""
        header = np.zeros(HEADER_WORDS, "<i4")
        header[:4] = MAGIC, VERSION, self.tokens, 0 if self.vocab_size == GPT2_VOCAB_SIZE else self.vocab_size
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)
        # Hashed from the file, not on the way: the header stands first and is known last.
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.path.stat().st_size,
                "sha256": sha256_of(self.path)}


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_header(path):
    """Return (number of tokens, vocabulary size) of a shard. Raises DataError where it is not one, or is cut short."""
    with open(path, "rb") as file:
        data = file.read(HEADER_BYTES)
    header = np.frombuffer(data.ljust(HEADER_BYTES, b"\0"), "<i4")
    if len(data) < HEADER_BYTES or header[0] != MAGIC or header[1] != VERSION:
        raise DataError(f"{path} is not a token shard (magic {MAGIC}, version {VERSION}); remove it, or name another")
    tokens, vocab_size = int(header[2]), int(header[3]) or GPT2_VOCAB_SIZE
    expected = HEADER_BYTES + 2 * tokens
    if path.stat().st_size != expected:
        raise DataError(f"{path} has {path.stat().st_size} bytes, its header asks for {expected}; make it again")
    return tokens, vocab_size


def shard_record(path):
    """The record of an existing shard for the manifest: read_header's checks, then one reading of the file."""
    tokens, vocab_size = read_header(path)
    documents = 0
    data = np.memmap(path, "<u2", "r", HEADER_BYTES, (tokens,)) if tokens else np.zeros(0, np.uint16)
    for start in range(0, tokens, 1 << 22):  # by blocks: the comparison makes a copy
        documents += int(np.count_nonzero(data[start:start + (1 << 22)] == vocab_size - 1))
    return {"tokens": tokens, "documents": documents, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


# -----------------------------------------------------------------------------
# Folders and manifests

def write_manifest(folder, tokenizer, vocab_size, options, shards):
    """Write manifest.json for `shards` (file name -> record) in one rename, and return what it says."""
    records = shards.values()
    manifest = {
        "tokenizer": tokenizer, "vocab_size": vocab_size, "eot": vocab_size - 1,
        "documents": sum(r["documents"] for r in records), "tokens": sum(r["tokens"] for r in records),
        "options": options, "shards": shards,
    }
    partial = Path(folder) / (MANIFEST + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, Path(folder) / MANIFEST)
    return manifest


def read_manifest(folder):
    """What manifest.json says, or None where there is none that can be read."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = has_kinds(manifest, options=dict, shards=dict, tokens=int, documents=int, vocab_size=int)
    whole = whole and all(has_kinds(record, bytes=int, sha256=str) for record in manifest["shards"].values())
    return manifest if whole else None


def has_kinds(value, **kinds):
    """Whether a value is a dict with these keys, each of its kind."""
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def check_out(out, overwrite):
    """Raise DataError unless shards may be written to the folder `out`."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; name a folder")
    present = sorted(out.glob("*.bin")) + sorted(out.glob(MANIFEST))
    if present and not overwrite:
        raise DataError(f"--out {out} already holds {present[0].name}; --overwrite replaces it, or name another folder")
    for path in out.glob("*.bin"):
        with open(path, "rb") as file:  # other things than shards are called .bin too: never remove those
            if file.read(4) != MAGIC.to_bytes(4, "little"):
                raise DataError(f"--out {out} holds {path.name}, which is not a token shard; name another folder")


@contextlib.contextmanager
def new_folder(out, overwrite=False):
    """Yield a hidden sibling of `out` to write to; it takes the place of `out` if the block ends without an error.

    Where `out` has files already, its shards and manifest make way (with overwrite) and the rest stays.
    """
    out = Path(out).resolve()
    check_out(out, overwrite)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if not out.exists():
            os.rename(partial, out)
        else:  # the manifest goes first and comes last: whatever has one is complete
            for old in [out / MANIFEST, *out.glob("*.bin")]:
                old.unlink(missing_ok=True)
            for new in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
                os.replace(new, out / new.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -----------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """argparse, with its own errors as one line like all others."""

    def error(self, message):
        raise DataError(f"{message}; {self.prog} --help lists the flags")


@contextlib.contextmanager
def ended_as_by_ctrl_c():
    """SIGTERM, as of timeout, is a KeyboardInterrupt: no process that was started goes on, and all is closed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_a_line(error):
    """What can be mended."""
    if isinstance(error, OSError) and error.strerror:
        place = "the output, or a file," if error.filename is None else error.filename
        return f"{place} cannot be used ({error.strerror}); mend it, or name another"
    if isinstance(error, UnicodeEncodeError):
        return f"the output is {error.encoding}, which lacks a character of the text; set PYTHONIOENCODING=utf-8"
    return " ".join(str(error).split()) or type(error).__name__


def exit_code(act, interrupted="interrupted", known=DataError):
    """That of a command, act(): its own, None being 0; 2 for what can be mended, errors that are `known` and a file
    system's, which is one line on stderr; 130 after an interruption, which says `interrupted`; 141 where nobody reads
    on, as before head. A stream that was closed before, or cannot be written, changes none of it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
    try:
        with ended_as_by_ctrl_c():
            code = act() or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return 128 + signal.SIGPIPE
    except (known, OSError) as error:
        return said(2, f"error: {in_a_line(error)}")
    except KeyboardInterrupt:
        return said(130, interrupted)


def said(code, line):
    """The exit code, with a line on stderr if that takes it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
    return code


def run(main):
    """Run main(argv), which makes files, as a command."""
    sys.exit(exit_code(lambda: main(sys.argv[1:]),
                       "interrupted; nothing half-done is left, run the same command again"))
