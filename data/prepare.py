"""Turn your own text into token shards.

    python data/prepare.py INPUT [INPUT ...] --out FOLDER
    python data/prepare.py book.txt --out data/book --tokenizer bytes
    python data/prepare.py corpus/ --out data/mine --tokenizer data/mine/tokenizer.json
    python data/prepare.py corpus/ more.jsonl.xz --out data/mine --val_fraction 0.005 --max_document_chars 16000
    python data/prepare.py train.parquet --val_input val.parquet --out data/mine

An INPUT is a file, or a folder that is searched for files (sorted, hidden ones left out). What holds documents:
    .txt        one document, or several with a NUL between them
    .md         one document
    .jsonl      one JSON object a line, the document under --text_key    (https://jsonlines.org)
    .parquet    the column --text_key; needs pyarrow
each also compressed, with .xz or .gz behind it. Text is UTF-8 and taken as it is; blank documents are left out.

Writes train_000.bin, train_001.bin, ..., val_000.bin, ... and manifest.json; shards.py has the format. A tokenizer of
your own, which train_tokenizer.py makes, is copied beside them as tokenizer.json. The same inputs and flags give the
same bytes, whatever the machine and the number of workers. Memory holds the longest document and a few batches, never
the corpus.

The split is by document. Which documents are validation follows from --seed and the document's number alone. There is
at least one, and never all; of a single document, the last --val_fraction is cut off at a line break.
"""
import argparse
import collections
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from shards import MAX_SHARD_TOKENS, DataError, Parser, ShardWriter, new_folder, run, write_manifest
from text_encodings import ENCODINGS, TOKENIZER, get_encoding, tokenizer_file, write_tokenizer

BATCH_CHARS = 1 << 18  # characters that one worker tokenizes at a time: some 60 ms
OPENERS = {"": open, ".xz": lzma.open, ".gz": gzip.open}


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the shards, apart from the inputs' text. The flags of main() say what each one means."""
    tokenizer: str = "gpt2"
    val_fraction: float = 0.01
    shard_tokens: int = 100_000_000
    shard_per_file: bool = False
    max_document_chars: int = 0
    seed: int = 0
    text_key: str = "text"

    def __post_init__(self):
        if self.tokenizer not in ENCODINGS:
            tokenizer_file(self.tokenizer)  # which raises DataError where there is none
        if not 0 < self.val_fraction < 1:
            raise DataError(f"val_fraction={self.val_fraction} must lie between 0 and 1; try 0.01")
        if not 1 <= self.shard_tokens <= MAX_SHARD_TOKENS:
            raise DataError(f"shard_tokens={self.shard_tokens} must lie between 1 and {MAX_SHARD_TOKENS}; "
                            "try 100000000")
        if self.max_document_chars < 0:
            raise DataError(f"max_document_chars={self.max_document_chars} must not be negative; 0 cuts nothing")


# -----------------------------------------------------------------------------
# Inputs

def kind_of(path):
    """(kind, compression) of a file by its suffixes, such as (".jsonl", ".xz"); kind is None where it is unknown."""
    suffixes = [""] + [s.lower() for s in path.suffixes]
    compression = suffixes[-1] if suffixes[-1] in OPENERS else ""
    kind = suffixes[-2] if compression else suffixes[-1]
    return (kind if kind in READERS else None), compression


def find_files(inputs):
    """The files that the inputs name, in order and each once, and how many files in folders have unknown suffixes."""
    files, unknown = {}, 0
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(path).parts))
            known = [p for p in inside if kind_of(p)[0]]
            unknown += len(inside) - len(known)
        elif not path.is_file():
            raise DataError(f"input {path} is neither a file nor a folder; check the spelling")
        elif kind_of(path)[0] is None:
            raise DataError(f"input {path} has an unknown suffix; it must be one of {', '.join(READERS)}, "
                            "compressed with .xz or .gz or not")
        else:
            known = [path]
        files.update((p.resolve(), p) for p in known if p.resolve() not in files)
    return list(files.values()), unknown


def open_text(path):
    # newline="\n" touches neither carriage returns nor Unicode's line separators; utf-8-sig drops a byte order mark.
    return io.TextIOWrapper(OPENERS[kind_of(path)[1]](path, "rb"), encoding="utf-8-sig", newline="\n")


def read_txt(path, text_key):
    with open_text(path) as file:
        pending = []  # of the document that the last block ended in: joined once, so that long ones stay linear
        while block := file.read(1 << 20):
            first, *rest = block.split("\0")
            pending.append(first)
            for part in rest:
                yield "".join(pending)
                pending = [part]
        yield "".join(pending)


def read_md(path, text_key):
    with open_text(path) as file:
        yield file.read()


def read_jsonl(path, text_key):
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error}); correct or remove it") from None
            if not isinstance(record, dict) or text_key not in record:
                found = ", ".join(record) if isinstance(record, dict) else "not an object"
                raise DataError(f"text_key={text_key!r} is not a key of {path}, line {number} ({found}); "
                                "name one of its keys")
            yield checked(record[text_key], f"{path}, line {number}", text_key)


def read_parquet(path, text_key):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow; pip install pyarrow") from None
    with OPENERS[kind_of(path)[1]](path, "rb") as file, tempfile.TemporaryFile() as plain:
        if kind_of(path)[1]:  # a Parquet file is read from its end, which a compressed stream cannot do
            shutil.copyfileobj(file, plain)
            file = plain
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if text_key not in table.schema_arrow.names:
                raise DataError(f"text_key={text_key!r} is not a column of {path} "
                                f"({', '.join(table.schema_arrow.names)}); name one of them")
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0):
                    yield checked(text.as_py(), path, text_key)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} cannot be read ({error}); is it whole?") from None


def checked(text, place, text_key):
    if text is not None and not isinstance(text, str):
        raise DataError(f"text_key={text_key!r} of {place} holds {type(text).__name__}; it must hold text")
    return text or ""


READERS = {".txt": read_txt, ".md": read_md, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_documents(path, text_key):
    """Yield the documents of a file that are not blank."""
    try:
        for text in READERS[kind_of(path)[0]](path, text_key):
            if text.strip():
                yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); convert it, for example with iconv -t UTF-8") from None
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} cannot be decompressed ({error}); is it whole?") from None


# -----------------------------------------------------------------------------
# Train and validation

def draw(seed, number):
    """A number in [0, 1) for a document, the same on every machine and Python."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:7], "big") / 2**56


def all_train(number, text):
    return [("train", text)]


def choose_split(texts, options):
    """Return split(number, text) -> the pairs (split, text) that the document gives.

    Reads `texts` only until a document of each split is found, which in a corpus of any size is soon. If one split has
    none, the document nearest to it changes sides; a single document is cut.
    """
    fraction, draws = options.val_fraction, []
    first = ""
    for text in texts:
        first = first or text
        draws.append(draw(options.seed, len(draws)))
        if min(draws) < fraction <= max(draws):
            break
    if not draws:
        raise DataError("the inputs hold no documents, or only blank ones; name files with text")
    if len(draws) == 1:
        train, val = cut_tail(first, fraction)
        return lambda number, text: [("train", train), ("val", val)]
    moved = {}
    if min(draws) >= fraction:
        moved = {draws.index(min(draws)): "val"}
    elif max(draws) < fraction:
        moved = {draws.index(max(draws)): "train"}

    def split(number, text):
        return [(moved.get(number, "val" if draw(options.seed, number) < fraction else "train"), text)]

    return split


def cut_tail(text, fraction):
    """Cut the last `fraction` of the characters off, at the first line break in it that leaves text after it."""
    cut = min(len(text) - 1, int(len(text) * (1 - fraction)))
    line = text.find("\n", cut) + 1
    if line and text[line:].strip():
        cut = line
    if not (text[:cut].strip() and text[cut:].strip()):
        raise DataError("the inputs hold one document, too short to cut validation from; add text, or name "
                        "a --val_input")
    return text[:cut], text[cut:]


def cut_document(text, limit):
    """Cut a document at blank lines into pieces of at most `limit` characters; a longer paragraph stays whole."""
    if not limit:
        return [text]
    pieces, start, paragraph = [], 0, 0
    while paragraph <= len(text):
        end = text.find("\n\n", paragraph)
        end = len(text) if end < 0 else end
        if end - start > limit and paragraph > start:
            pieces.append(text[start:paragraph - 2])
            start = paragraph
        paragraph = end + 2
    return pieces + [text[start:]]


# -----------------------------------------------------------------------------
# Tokens

@dataclasses.dataclass(frozen=True)
class Section:
    """Text for one worker: a whole document, or some of a long one."""
    split: str
    shard: int  # which input file's shard with --shard_per_file, else 0
    starts: bool  # a document starts here
    text: str


def cut_sections(text, size=BATCH_CHARS):
    """Cut text into sections of about `size` characters that have the same tokens apart as together.

    GPT-2's pattern never matches across the place before a space or line break that has a non-space after it: such a
    character starts the next match, or is one. (Anywhere else, a run of spaces could come apart in another way.)
    """
    start = 0
    while start + size < len(text):
        place = re.compile(r"[ \n](?=\S)").search(text, start + size)
        if place is None:
            break
        yield text[start:place.start()]
        start = place.start()
    yield text[start:]


def batches(sections):
    """Lists of sections with at least BATCH_CHARS characters in all (the last list may have fewer)."""
    batch, size = [], 0
    for section in sections:
        batch.append(section)
        size += len(section.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(name, batch):
    """Return ({(split, shard): tokens}, UTF-8 bytes) of a batch. Runs in a worker."""
    encoding = get_encoding(name)
    eot, parts, size = np.array([encoding.eot], np.uint16), collections.defaultdict(list), 0
    for section in batch:
        parts[section.split, section.shard] += [eot] * section.starts + [encoding.encode(section.text)]
        size += len(section.text.encode("utf-8", "surrogatepass"))
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}, size


def start_worker(name):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent alone answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    get_encoding(name)


def encode_all(name, batch_list, workers):
    """Yield encode_batch's results in order.

    Not Pool.imap: it reads its input ahead without limit, which would be the whole corpus, and waits for ever on a
    worker that the system has killed. Processes are spawned everywhere, as macOS does it: one path for all platforms.
    """
    get_encoding(name)  # whatever is missing is said once, here
    if workers == 1:
        yield from (encode_batch(name, batch) for batch in batch_list)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(name,))
    pending = collections.deque()
    try:
        for batch in batch_list:
            pending.append(pool.submit(encode_batch, name, batch))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(f"workers={workers}: one was ended by the system, most often for want of memory; "
                        "try fewer --workers, or --max_document_chars") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Split:
    """The shards of a split in order: each full to `limit` tokens, or (None) one for each value of `shard`."""

    def __init__(self, folder, name, vocab_size, limit):
        self.folder, self.name, self.vocab_size, self.limit = folder, name, vocab_size, limit
        self.writer, self.shard, self.records = None, None, {}

    def write(self, tokens, shard):
        while len(tokens):
            if self.writer and (self.writer.tokens == self.limit or self.shard != shard):
                self.close()
            if self.writer is None:
                self.writer = ShardWriter(self.folder / f"{self.name}_{len(self.records):03d}.bin", self.vocab_size)
                self.shard = shard
            room = len(tokens) if self.limit is None else self.limit - self.writer.tokens
            self.writer.write(tokens[:room])
            tokens = tokens[room:]

    def close(self):
        if self.writer:
            self.records[self.writer.path.name] = self.writer.close()
            self.writer = None


class Progress:
    """One line: rewritten in place on a terminal, a new one now and then in a log file."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.start = self.last = time.monotonic()
        self.bytes = self.tokens = 0

    def update(self, size, tokens, done=False):
        self.bytes, self.tokens = self.bytes + size, self.tokens + tokens
        now = time.monotonic()
        if not done and now - self.last < (0.2 if self.terminal else 10):
            return
        self.last, seconds = now, max(now - self.start, 1e-9)
        line = (f"{self.bytes / 1e6:,.1f} MB of text | {self.tokens:,} tokens | {seconds:.0f} s | "
                f"{self.bytes / 1e6 / seconds:.2f} MB/s | {self.tokens / seconds:,.0f} tokens/s")
        # A terminal's line is padded, so that nothing of a longer one stays behind it.
        end = "" if self.terminal and not done else "\n"
        print(f"\r{line:<100}" if self.terminal else line, end=end, flush=True)


# -----------------------------------------------------------------------------
# All together

def documents_of(files, text_key):
    """Yield (number of the file, document)."""
    for number, path in enumerate(files):
        for text in read_documents(path, text_key):
            yield number, text


def sections_of(files, val_files, options):
    """Yield the sections of all documents in order."""
    split = all_train
    if not val_files:
        split = choose_split((text for _, text in documents_of(files, options.text_key)), options)
    numbered = enumerate(documents_of(files, options.text_key))
    documents = ((file, split(number, text)) for number, (file, text) in numbered)
    validation = ((0, [("val", text)]) for _, text in documents_of(val_files, options.text_key))
    for file, parts in itertools.chain(documents, validation):
        for split_name, part in parts:
            shard = file if options.shard_per_file and split_name == "train" else 0
            for piece in cut_document(part, options.max_document_chars):
                for i, text in enumerate(cut_sections(piece)):
                    yield Section(split_name, shard, i == 0, text)


def prepare(files, val_files, folder, options, workers=1):
    """Write the shards and manifest.json of `files`, and a tokenizer.json, to a new folder; return the manifest."""
    encoding = get_encoding(options.tokenizer)
    tokenizer = options.tokenizer
    if encoding.file is not None:
        write_tokenizer(folder, encoding.file)
        tokenizer = str(folder / TOKENIZER)  # the workers read what stays, whatever becomes of the other
    limit = None if options.shard_per_file else options.shard_tokens
    splits = {name: Split(folder, name, encoding.n_vocab, limit) for name in ("train", "val")}
    progress = Progress()
    for tokens, size in encode_all(tokenizer, batches(sections_of(files, val_files, options)), workers):
        for (split, shard), part in tokens.items():
            splits[split].write(part, shard)
        progress.update(size, sum(map(len, tokens.values())))
    shards = {}
    for name, split in splits.items():
        split.close()
        shards.update(split.records)
        if not split.records:
            raise DataError(f"there are no documents for {name}, or only blank ones; name files with text")
    progress.update(0, 0, done=True)
    recorded = dataclasses.asdict(options)
    recorded |= {"tokenizer": encoding.name}  # a path would be this machine's
    recorded |= {"inputs": [path.name for path in files], "val_inputs": [path.name for path in val_files]}
    for name in ["val_fraction", "seed"] * bool(val_files) + ["shard_tokens"] * options.shard_per_file:
        del recorded[name]  # it decided nothing
    return write_manifest(folder, encoding.name, encoding.n_vocab, recorded, shards)


def check_tokenizer(out, data, overwrite):
    """Raise DataError where shards would come to stand beside the tokenizer.json of others: it must hold `data`."""
    path = out / TOKENIZER
    if path.exists() and not overwrite and path.read_bytes() != data:
        raise DataError(f"--out {out} already holds {TOKENIZER}, which is not these shards'; --overwrite replaces it, "
                        "or name another folder")


def available_cpus():
    # The CPUs this process may use, where the system tells (Linux): a job often has fewer than the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv):
    parser = Parser("prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # A flag that would be ignored is an error, so what was typed must be told from a default: those stand in Options.
    default = Options()
    typed = {"default": argparse.SUPPRESS}
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="file or folder of .txt, .md, .jsonl, .parquet (.xz, .gz)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; it must not hold shards yet")
    parser.add_argument("--overwrite", action="store_true",
                        help=f"replace the shards (*.bin), manifest.json and {TOKENIZER} that --out holds; its other "
                             "files stay")
    parser.add_argument("--tokenizer", metavar="T", **typed,
                        help="gpt2: byte-pair encoding, 50257 tokens; bytes: 257 tokens; or the path of a "
                             f"{TOKENIZER} of train_tokenizer.py, or of its folder (default {default.tokenizer})")
    parser.add_argument("--val_fraction", type=float, metavar="F", **typed,
                        help=f"fraction of the documents that become validation (default {default.val_fraction})")
    parser.add_argument("--val_input", nargs="+", default=[], metavar="FILE",
                        help="validation is these files or folders; those of them that INPUT also has are left out "
                             "of train")
    parser.add_argument("--shard_tokens", type=int, metavar="N", **typed,
                        help=f"tokens in a full shard (default {default.shard_tokens})")
    parser.add_argument("--shard_per_file", action="store_true", **typed,
                        help="one train shard for each input file that has train documents, in order, and one val "
                             "shard, whatever their sizes")
    parser.add_argument("--max_document_chars", type=int, metavar="N", **typed,
                        help="cut longer documents at blank lines into documents of at most N characters; a longer "
                             "paragraph stays whole (default 0: do not cut)")
    parser.add_argument("--seed", type=int, metavar="S", **typed,
                        help=f"another seed draws other documents for validation (default {default.seed})")
    parser.add_argument("--text_key", metavar="KEY", **typed,
                        help=f"key (.jsonl) or column (.parquet) of the text (default {default.text_key})")
    parser.add_argument("--workers", type=int, default=available_cpus(), metavar="N",
                        help="processes that tokenize; the shards do not depend on it (default: the CPUs, here "
                             "%(default)s)")
    flags = parser.parse_args(argv)
    if flags.workers < 1:
        raise DataError(f"workers={flags.workers} must be at least 1")
    for name in ("val_fraction", "seed"):
        if flags.val_input and hasattr(flags, name):
            raise DataError(f"--{name} has no effect with --val_input, which names the validation documents; drop one")
    if hasattr(flags, "shard_per_file") and hasattr(flags, "shard_tokens"):
        raise DataError("--shard_tokens has no effect with --shard_per_file, which makes a shard of each file; "
                        "drop one")
    names = {field.name for field in dataclasses.fields(Options)}
    return flags, Options(**{name: value for name, value in vars(flags).items() if name in names})


def main(argv):
    flags, options = parse(argv)
    val_files, _ = find_files(flags.val_input)
    files, unknown = find_files(flags.inputs)
    if unknown:
        print(f"skipped {unknown} files with other suffixes than {', '.join(READERS)}")
    validation = {path.resolve() for path in val_files}
    train_files = [path for path in files if path.resolve() not in validation]
    if len(train_files) < len(files):
        print(f"left {len(files) - len(train_files)} files out of train: they are validation, by --val_input")
    if not train_files or (flags.val_input and not val_files):
        raise DataError(f"no {'train' if val_files or not flags.val_input else 'validation'} files among the inputs; "
                        f"name files with one of {', '.join(READERS)}")
    out = Path(flags.out)
    with new_folder(out, flags.overwrite) as folder:
        tokenizer = get_encoding(options.tokenizer).file
        check_tokenizer(out, tokenizer, flags.overwrite)
        manifest = prepare(train_files, val_files, folder, options, flags.workers)
        if tokenizer is None:
            (out / TOKENIZER).unlink(missing_ok=True)  # the old shards', which go next
    for name, record in manifest["shards"].items():
        print(f"{out / name}: {record['tokens']:,} tokens, {record['documents']:,} documents")


if __name__ == "__main__":
    run(main)
