"""Train a byte-level BPE on your own text: a tokenizer of any size for prepare.py.

    python data/train_tokenizer.py INPUT [INPUT ...] --out FOLDER
    python data/train_tokenizer.py corpus/ --vocab_size 16384 --out data/mine
    python data/prepare.py corpus/ --tokenizer data/mine --out data/mine

An INPUT is what prepare.py takes: .txt, .md, .jsonl, .parquet, compressed or not, or folders of them.

Writes FOLDER/tokenizer.json in the format of Hugging Face's tokenizers library, which trains it;
transformers.PreTrainedTokenizerFast(tokenizer_file=...) loads it. Text is split by GPT-2's pattern, and in the pieces
the most frequent pair of neighbours becomes a token, again and again (Sennrich et al. 2016; on bytes: Radford et al.
2019, section 2.2), as long as a pair occurs twice. Token ids: the 256 bytes, so that any text has tokens; what they are
joined to, in the order learned; end-of-text, the last. The same inputs and flags give the same bytes. Memory holds the
different words of the text with their counts, never the text.
"""
import argparse
import json
import signal
from pathlib import Path

from prepare import READERS, cut_sections, documents_of, find_files
from shards import MAX_VOCAB_SIZE, DataError, Parser, run
from text_encodings import EOT_TEXT, MIN_VOCAB_SIZE, TOKENIZER, BPEEncoding, without_surrogates, write_tokenizer

SAMPLE_CHARS = 1_000_000  # of the text's beginning, on which bytes per token are counted
MIN_COUNT = 2  # of a pair that becomes a token: one that occurs once says nothing about other text


def sections_of(files, text_key, max_chars):
    """Yield the first `max_chars` characters (0: all) of the documents, cut where no word is: one long document does
    not stand in memory as the library's pieces."""
    left = max_chars or float("inf")
    for _, document in documents_of(files, text_key):
        for section in cut_sections(without_surrogates(document)):
            yield section[:left] if len(section) > left else section
            left -= len(section)
            if left <= 0:
                return


def train(sections, vocab_size):
    """The content of tokenizer.json, and the first SAMPLE_CHARS characters of the sections."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    except ImportError:
        raise DataError("data/train_tokenizer.py needs tokenizers; pip install tokenizers") from None
    sample = []

    def sampled():
        size = 0
        for section in sections:
            sample.extend([section[:SAMPLE_CHARS - size]] * (size < SAMPLE_CHARS))
            size += len(section)
            yield section

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=MIN_COUNT, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # While the library works, Python's handlers do not run, which would put Ctrl-C off for minutes. The system's end
    # the process at once: nothing is on disk yet.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        tokenizer.train_from_iterator(sampled(), trainer)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    learned = tokenizer.get_vocab_size() + 1
    if not sample:
        raise DataError("the inputs hold no documents, or only blank ones; name files with text")
    if learned < vocab_size:
        raise DataError(f"vocab_size={vocab_size} is more than the text gives: {learned} tokens, joining pairs that "
                        f"occur at least {MIN_COUNT} times; add text, or give --vocab_size {learned}")
    tokenizer.add_special_tokens([EOT_TEXT])
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][EOT_TEXT] = vocab_size - 1  # as GPT-2's file has it: there, and among the added tokens
    return content, "".join(sample)


def main(argv):
    parser = Parser("train_tokenizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="file or folder of .txt, .md, .jsonl, .parquet (.xz, .gz)")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help=f"folder to write {TOKENIZER} to")
    parser.add_argument("--overwrite", action="store_true", help=f"replace the {TOKENIZER} that --out holds")
    parser.add_argument("--vocab_size", type=int, default=32768, metavar="V",
                        help=f"number of tokens, the bytes and end-of-text included: {MIN_VOCAB_SIZE} to "
                             f"{MAX_VOCAB_SIZE} (default %(default)s)")
    parser.add_argument("--max_chars", type=int, default=1_000_000_000, metavar="N",
                        help="train on the first N characters of the inputs, in their order; 0: on all "
                             "(default %(default)s: minutes)")
    parser.add_argument("--text_key", default="text", metavar="KEY",
                        help="key (.jsonl) or column (.parquet) of the text (default %(default)s)")
    flags = parser.parse_args(argv)
    if not MIN_VOCAB_SIZE <= flags.vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(f"vocab_size={flags.vocab_size} must be from {MIN_VOCAB_SIZE}, the bytes and end-of-text, to "
                        f"{MAX_VOCAB_SIZE}: tokens are stored as uint16")
    if flags.max_chars < 0:
        raise DataError(f"max_chars={flags.max_chars} must not be negative; 0 takes all")
    if flags.out.exists() and not flags.out.is_dir():
        raise DataError(f"--out {flags.out} is a file; name a folder")
    path = flags.out / TOKENIZER
    if path.exists() and not flags.overwrite:
        raise DataError(f"--out {flags.out} already holds {TOKENIZER}; --overwrite replaces it, or name another folder")
    files, unknown = find_files(flags.inputs)
    if unknown:
        print(f"skipped {unknown} files with other suffixes than {', '.join(READERS)}")
    if not files:
        raise DataError(f"no files among the inputs; name files with one of {', '.join(READERS)}")
    content, sample = train(sections_of(files, flags.text_key, flags.max_chars), flags.vocab_size)
    flags.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(flags.out, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())
    tokens = len(BPEEncoding(path).encode(sample))
    print(f"{path}: {flags.vocab_size} tokens, {len(sample.encode()) / tokens:.2f} bytes a token")


if __name__ == "__main__":
    run(main)
