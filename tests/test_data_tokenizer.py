"""data/train_tokenizer.py and the encodings it makes, against a naive BPE, the tokenizers library and transformers."""
import argparse
import collections
import hashlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "tests")]

import prepare  # noqa: E402
import shards  # noqa: E402
import text_encodings  # noqa: E402
import train_tokenizer  # noqa: E402
from test_data_prepare import (assert_one_line_error, bad_input, read_shard, run_here, run_script,  # noqa: E402
                               snapshot, write_input)

spec = importlib.util.spec_from_file_location("sample", ROOT / "tools" / "sample.py")
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)

EOT = "<|endoftext|>"
SIZE = 700
WORLD = ["naïve café, größer 12½ \r\n\t  日本語のテキスト 🙂🙂 don't WE'LL", "\u2028 \x85x",
         f"an {EOT} inside, <|x|>{EOT}", "три поросёнка\n\n\n   and three   spaces ", "aaaaaaaaaaaaa aaa aaaaaa"]
PROSE = inspect.getsource(argparse)
DOCUMENTS = [*PROSE.split("\n\n"), *WORLD * 3]
# As GPT-2's src/encoder.py has it, before it was made possessive.
ORIGINAL_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Characters at which splits and merges are decided, whole words, and whatever else there is.
any_text = st.lists(st.one_of(st.text(" \n\t\r\x0b\x1c\x85\xa0\u2028\u3000'sdtlveam.1½é", max_size=12),
                              st.sampled_from([EOT, " the", "argument", "don't", *WORLD]), st.text(max_size=6)),
                    max_size=8).map("".join)


def byte_characters():
    """Byte -> character, by the rule of GPT-2's bytes_to_unicode."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


CHARACTER = byte_characters()


def naive_merges(documents, count):
    """The first merges as the definition says it: of the most frequent pairs of neighbours, the one of lowest ids."""
    pieces = collections.Counter(piece for text in documents for piece in regex.findall(ORIGINAL_PATTERN, text))
    words = {tuple(CHARACTER[b] for b in piece.encode()): n for piece, n in pieces.items()}
    ids = {c: i for i, c in enumerate(sorted(CHARACTER.values()))}
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        assert max(pairs.values(), default=0) >= 2
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(list(best))
        ids["".join(best)] = len(ids)
        merged = collections.Counter()
        for word, n in words.items():
            merged[tuple(join(word, best))] += n
        words = merged
    return merges, ids


def join(word, pair):
    """The word with each occurrence of the pair, from the left, joined."""
    out, i = [], 0
    while i < len(word):
        length = 2 if tuple(word[i:i + 2]) == tuple(pair) else 1
        out.append("".join(word[i:i + length]))
        i += length
    return out


def naive_encode(text, merges, ids):
    """Piece by piece, every merge in its turn."""
    tokens = []
    for piece in regex.findall(ORIGINAL_PATTERN, text):
        word = [CHARACTER[b] for b in piece.encode()]
        for pair in merges:
            if len(word) > 1 and "".join(pair) in "".join(word):
                word = join(word, pair)
        tokens += [ids[part] for part in word]
    return tokens


def train(*args, **environment):
    result = run_script("train_tokenizer.py", *args, **environment)
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with tokenizer.json of SIZE tokens, input file, stdout) as the command makes it."""
    folder = tmp_path_factory.mktemp("bpe")
    path = folder / "in.txt"
    write_input(path, DOCUMENTS)
    return folder / "out", path, train(path, "--vocab_size", SIZE, "--out", folder / "out")


@pytest.fixture(scope="module")
def encoding(made):
    return text_encodings.get_encoding(str(made[0]))


@pytest.fixture(scope="module")
def library(made):
    """The tokenizers library's own reading of the file, which is told to match no special token in text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(made[0] / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def content_of(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


# -----------------------------------------------------------------------------
# Training

def test_the_naive_join():
    assert join(list("aaaaa"), "aa") == ["aa", "aa", "a"] and join(list("abab"), ["a", "b"]) == ["ab", "ab"]
    assert join(["b", "a", "aa"], ["a", "a"]) == ["b", "a", "aa"]


def test_merges_are_those_of_a_naive_trainer(made):
    merges, ids = naive_merges(DOCUMENTS, SIZE - 257)
    model = content_of(made[0])["model"]
    assert model["merges"] == merges
    assert model["vocab"] == ids | {EOT: SIZE - 1}


def test_what_is_written_and_said(made, encoding):
    out, _, stdout = made
    assert [p.name for p in out.iterdir()] == ["tokenizer.json"]
    said = float(stdout.split(" bytes a token")[0].split()[-1])
    text = "".join(text for text in DOCUMENTS if text.strip())
    assert said == pytest.approx(len(text.encode()) / len(encoding.encode(text)), abs=0.05)  # documents apart: a little
    assert stdout.count("\n") == 1 and stdout.startswith(f"{out / 'tokenizer.json'}: {SIZE} tokens, ")


def test_end_of_text_is_last_and_every_byte_a_token(made, encoding, library):
    assert (encoding.n_vocab, encoding.eot, library.get_vocab_size()) == (SIZE, SIZE - 1, SIZE)
    assert library.token_to_id(EOT) == SIZE - 1 and encoding.decode([SIZE - 1]) == EOT
    assert [library.get_added_tokens_decoder()[SIZE - 1].special, len(library.get_added_tokens_decoder())] == [True, 1]
    assert sorted(encoding.bpe.decode_single_token_bytes(i) for i in range(256)) == [bytes([b]) for b in range(256)]


def test_same_bytes_whatever_the_threads(made, tmp_path):
    out, path, _ = made
    for threads, seed in (("1", "0"), ("7", "1")):
        train(path, "--vocab_size", SIZE, "--out", tmp_path / threads, RAYON_NUM_THREADS=threads, PYTHONHASHSEED=seed)
        assert snapshot(tmp_path / threads) == snapshot(out)


def test_inputs_are_those_of_prepare(made, tmp_path):
    """Folders, files of several kinds, compression, another key: the same documents give the same file."""
    folder, half = tmp_path / "in", len(DOCUMENTS) // 2
    folder.mkdir()
    write_input(folder / "a.jsonl.xz", DOCUMENTS[:half], key="body")
    write_input(folder / "b.parquet", DOCUMENTS[half:], key="body")
    (folder / "image.png").write_bytes(b"")
    stdout = train(folder, "--text_key", "body", "--vocab_size", SIZE, "--out", tmp_path / "out")
    assert "skipped 1 files" in stdout
    assert snapshot(tmp_path / "out") == snapshot(made[0])


def test_max_chars_is_the_beginning(tmp_path):
    documents = ["word one two " * 50, "two three " * 50, "four five " * 500]
    write_input(tmp_path / "all.txt", documents)
    write_input(tmp_path / "part.txt", [documents[0], documents[1][:150]])
    write_input(tmp_path / "two.txt", documents[:2])
    files = {}
    for name, *flags in [("all", "--max_chars", len(documents[0]) + 150), ("part",), ("two",)]:
        train(tmp_path / f"{name}.txt", "--vocab_size", 270, "--out", tmp_path / name, *flags)
        files[name] = snapshot(tmp_path / name)
    assert files["all"] == files["part"]
    chunks = list(train_tokenizer.sections_of([tmp_path / "all.txt"], "text", len(documents[0]) + 150))
    assert chunks == [documents[0], documents[1][:150]]
    assert "".join(train_tokenizer.sections_of([tmp_path / "all.txt"], "text", 0)) == "".join(documents)


def test_long_documents_come_in_sections(tmp_path):
    text = "a few words, and\n\nlines " * 40_000
    write_input(tmp_path / "a.txt", [text])
    sections = list(train_tokenizer.sections_of([tmp_path / "a.txt"], "text", 0))
    assert "".join(sections) == text and 1 < max(map(len, sections)) < len(text) / 3


def test_lone_surrogates_count_as_replacement_characters(tmp_path):
    text = "ab \ud800ab \udfffab"
    (tmp_path / "bad.jsonl").write_text("\n".join([json.dumps({"text": text})] * 9))
    (tmp_path / "good.jsonl").write_text("\n".join([json.dumps({"text": "ab \ufffdab \ufffdab"})] * 9))
    for name in ("bad", "good"):
        train(tmp_path / f"{name}.jsonl", "--vocab_size", 261, "--out", tmp_path / name)
    assert snapshot(tmp_path / "bad") == snapshot(tmp_path / "good")


def test_as_many_tokens_as_the_text_gives(tmp_path):
    text = "low low low lower lower newest newest newest widest widest"
    write_input(tmp_path / "a.txt", [text])
    result = run_script("train_tokenizer.py", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert_one_line_error(result, "vocab_size=32768", "gives: ", "--vocab_size")
    assert not (tmp_path / "out").exists()
    most = int(result.stderr.split("gives: ")[1].split()[0])
    naive_merges([text], most - 257)  # of pairs that occur twice
    with pytest.raises(AssertionError):
        naive_merges([text], most - 256)
    train(tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab_size", most)
    assert_one_line_error(run_script("train_tokenizer.py", tmp_path / "a.txt", "--out", tmp_path / "more",
                                     "--vocab_size", most + 1), f"{most} tokens")


def test_the_smallest_is_bytes(tmp_path):
    write_input(tmp_path / "a.txt", ["größer 日本"])
    stdout = train(tmp_path / "a.txt", "--out", tmp_path, "--vocab_size", 257)
    assert stdout.endswith(": 257 tokens, 1.00 bytes a token\n")
    smallest = text_encodings.get_encoding(str(tmp_path))
    assert smallest.decode(smallest.encode("größer")) == "größer" and len(smallest.encode("größer")) == 8


@pytest.mark.parametrize("arguments, parts", [
    (lambda t: [t / "ok.txt", "--vocab_size", "256"], ["vocab_size=256", "257", "65536"]),
    (lambda t: [t / "ok.txt", "--vocab_size", "65537"], ["vocab_size=65537", "65536", "uint16"]),
    (lambda t: [t / "ok.txt", "--vocab_size", "many"], ["vocab_size", "--help"]),
    (lambda t: [t / "ok.txt", "--vocab_size", "9999"], ["vocab_size=9999", "add text"]),
    (lambda t: [t / "ok.txt", "--vocab_size", "300", "--max_chars", "9"], ["vocab_size=300"]),
    (lambda t: [t / "ok.txt", "--max_chars", "-1"], ["max_chars=-1"]),
    (lambda t: [t / "none.txt"], ["none.txt", "spelling"]),
    (lambda t: bad_input(t, "a.pdf", b"x"), ["a.pdf", ".jsonl"]),
    (lambda t: bad_input(t, "a.md", b"caf\xe9"), ["a.md", "not UTF-8"]),
    (lambda t: bad_input(t, "a.txt", b" \0\n"), ["no documents"]),
    (lambda t: bad_input(t, "a.jsonl", b'{"body": "x"}'), ["text_key='text'", "body"]),
    (lambda t: [t / "folder"], ["no files"]),
    (lambda t: [], ["INPUT", "--help"]),
    (lambda t: [t / "ok.txt", "--out", t / "ok.txt"], ["ok.txt is a file"]),
    (lambda t: [t / "ok.txt", "--out", t / "full"], ["already holds tokenizer.json", "--overwrite"]),
])
def test_training_errors_write_nothing(tmp_path, arguments, parts, monkeypatch, capsys):
    for name in ("folder", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "tokenizer.json").write_text("mine")
    (tmp_path / "ok.txt").write_text("some text, some text")
    args = arguments(tmp_path)
    args += [] if "--out" in args else ["--out", tmp_path / "out"]
    before = snapshot(tmp_path)
    assert_one_line_error(run_here(train_tokenizer.main, args, monkeypatch, capsys), *parts)
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


def test_overwrite(made, tmp_path):
    (tmp_path / "tokenizer.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    train(made[1], "--out", tmp_path, "--vocab_size", SIZE, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "tokenizer.json"]
    assert content_of(tmp_path) == content_of(made[0])


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    (tmp_path / "tokenizer.json").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        text_encodings.write_tokenizer(tmp_path, b"new")
    assert snapshot(tmp_path) == {Path("tokenizer.json"): b"old"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_training_at_once(tmp_path, number):
    with open(tmp_path / "a.txt", "w") as file:
        file.writelines("word after word " * 60_000 + "\0" for _ in range(60))  # some 15 s of work
    process = subprocess.Popen([sys.executable, ROOT / "data" / "train_tokenizer.py", tmp_path / "a.txt", "--out",
                                tmp_path / "out"], stderr=subprocess.PIPE, text=True)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(number)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - start < 2
    assert process.returncode in (-number, 130)  # 130: before the library had begun
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_signals_reach_python_again():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    train_tokenizer.train(iter(["word after word"]), 260)
    assert [signal.getsignal(number) for number in numbers] == before and signal.SIG_DFL not in before[:1]


def test_without_the_library(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(shards.DataError, match="pip install tokenizers"):
        train_tokenizer.main([str(made[1]), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    text_encodings.BPEEncoding(made[0]).encode("training alone needs it")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(shards.DataError, match="pip install tiktoken"):
        text_encodings.BPEEncoding(made[0])


# -----------------------------------------------------------------------------
# Encoding

def test_tokens_are_those_of_naive_merging(made, encoding):
    model = content_of(made[0])["model"]
    for text in [*DOCUMENTS[:150], *WORLD]:
        assert encoding.encode(text).tolist() == naive_encode(text, model["merges"], model["vocab"])


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_tokens_are_those_of_the_library(encoding, library, text):
    ids = encoding.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == library.encode(text).ids
    assert encoding.eot not in ids and encoding.decode(ids) == text == library.decode(ids.tolist())


def test_tokens_are_those_of_transformers(made, encoding):
    from transformers import PreTrainedTokenizerFast
    fast = PreTrainedTokenizerFast(tokenizer_file=str(made[0] / "tokenizer.json"))
    assert len(fast) == fast.vocab_size == SIZE
    for text in [PROSE, "".join(DOCUMENTS).replace(EOT, ""), *WORLD]:
        ids = fast(text, split_special_tokens=True)["input_ids"]
        assert encoding.encode(text).tolist() == ids
    assert fast(f"a{EOT}b")["input_ids"] == [*encoding.encode("a"), encoding.eot, *encoding.encode("b")]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=[]), max_size=30))
def test_round_trip_of_any_unicode(encoding, text):
    """Lone surrogates come back as U+FFFD, as they do from bytes."""
    ids = encoding.encode(text)
    as_bytes = text_encodings.get_encoding("bytes")
    assert encoding.decode(ids) == as_bytes.decode(as_bytes.encode(text))
    assert encoding.decode(encoding.encode("🙂")[:1]).startswith("\ufffd") and encoding.eot not in ids


@settings(max_examples=300, deadline=None)
@given(text=any_text, size=st.integers(1, 8))
def test_sections_have_the_pieces_and_tokens_of_the_whole(encoding, library, text, size):
    sections = list(prepare.cut_sections(text, size))
    assert [t for s in sections for t in encoding.encode(s)] == encoding.encode(text).tolist()

    def pieces(part):
        return [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(part)]

    assert [piece for s in sections for piece in pieces(s)] == pieces(text)  # so training may cut there too


def test_every_character_is_split_the_same(made, encoding, library):
    """Both know the same letters, digits and spaces, else a new Unicode version would part them: all of the plane."""
    for i in range(0x10000):
        if 0xD800 <= i < 0xE000:
            continue
        text = f"a{chr(i)}1{chr(i)} {chr(i)}!{chr(i)}{chr(i)} the"
        if i % 16 == 0:
            batch = []
        batch.append(text)
        if i % 16 == 15:
            whole = "\n".join(batch)
            assert encoding.encode(whole).tolist() == library.encode(whole).ids, hex(i)


# -----------------------------------------------------------------------------
# What is refused

def change(**fields):
    return lambda content: content.update(fields)


def model(**fields):
    return lambda content: content["model"].update(fields)


def without(name):
    return lambda content: content.pop(name)


def move_eot_first(content):
    vocab = content["model"]["vocab"]
    ids = sorted(vocab, key=lambda token: (token != EOT, vocab[token]))
    content["model"]["vocab"] = {token: i for i, token in enumerate(ids)}
    content["added_tokens"][0]["id"] = 0


def leave_a_hole(content):
    content["model"]["vocab"][EOT] = content["added_tokens"][0]["id"] = SIZE


def add_token(content):
    content["added_tokens"].append(content["added_tokens"][0] | {"id": SIZE, "content": "<pad>"})


def too_many(content):
    content["model"]["vocab"] |= {f"w{i}": i for i in range(SIZE, 65537)}


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def drop_merge(content):
    content["model"]["merges"].pop(5)


def drop_byte(content):
    vocab = content["model"]["vocab"]
    vocab["Ġ!?"] = vocab.pop("a")


def foreign_character(content):
    vocab = content["model"]["vocab"]
    vocab["▁the"] = vocab.pop(next(token for token, i in vocab.items() if i == 300))


@pytest.mark.parametrize("damage, parts", [
    (change(normalizer={"type": "NFC"}), ["not a byte-level BPE", "normalizer"]),
    (change(pre_tokenizer={"type": "Whitespace"}), ["not a byte-level BPE"]),
    (change(pre_tokenizer=None), ["not a byte-level BPE"]),
    (change(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), ["no prefix space"]),
    (change(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}), ["GPT-2's pattern"]),
    (model(type="WordPiece"), ["not a byte-level BPE"]),
    (model(dropout=0.1), ["dropout"]),
    (model(end_of_word_suffix="</w>"), ["end_of_word_suffix"]),
    (too_many, ["65537 tokens", "65536"]),
    (leave_a_hole, [f"ids other than each of 0 to {SIZE - 1}"]),
    (move_eot_first, ["other added tokens than <|endoftext|>"]),
    (change(added_tokens=[]), ["other added tokens than <|endoftext|>"]),
    (add_token, ["other added tokens than <|endoftext|>"]),
    (drop_byte, ["256 bytes"]),
    (foreign_character, ["256 bytes"]),
    (swap_merges, ["order of the ids"]),
    (drop_merge, ["order of the ids"]),
    (without("model"), ["not a file of the tokenizers library"]),
    (without("added_tokens"), ["not a file of the tokenizers library"]),
    (model(vocab=[]), ["not a file of the tokenizers library"]),
    (model(merges=[["a"]]), ["not a file of the tokenizers library"]),
])
def test_files_that_do_not_fit(made, tmp_path, damage, parts, monkeypatch, capsys):
    content = content_of(made[0])
    damage(content)
    assert_refused(tmp_path, json.dumps(content).encode(), parts, monkeypatch, capsys)


@pytest.mark.parametrize("data", [b"", b"no JSON", b"\xff\xfe", b"[]", b"3", b"null", b'{"model": null}'])
def test_files_of_something_else(tmp_path, data, monkeypatch, capsys):
    assert_refused(tmp_path, data, ["not a file of the tokenizers library"], monkeypatch, capsys)


def assert_refused(folder, data, parts, monkeypatch, capsys):
    """prepare.py says what is wrong in one line, and writes nothing."""
    (folder / "ok.txt").write_text("some text\0more text")
    (folder / "mine.json").write_bytes(data)
    args = [folder / "ok.txt", "--tokenizer", folder / "mine.json", "--out", folder / "out"]
    result = run_here(prepare.main, args, monkeypatch, capsys)
    assert_one_line_error(result, "mine.json", "data/train_tokenizer.py", *parts)
    assert sorted(p.name for p in folder.iterdir()) == ["mine.json", "ok.txt"]


@pytest.mark.parametrize("name", ["none.json", "empty", "gpt5"])
def test_no_such_file(tmp_path, name, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "ok.txt").write_text("some text\0more text")
    with pytest.raises(shards.DataError):
        prepare.Options(tokenizer=str(tmp_path / name))
    args = [tmp_path / "ok.txt", "--tokenizer", tmp_path / name, "--out", tmp_path / "out"]
    assert_one_line_error(run_here(prepare.main, args, monkeypatch, capsys), name, "gpt2, bytes", "train_tokenizer.py")


def hand_made(*merges):
    """A tokenizer.json with these merges, in the format that the library wrote before version 0.20."""
    ids = {c: i for i, c in enumerate(sorted(CHARACTER.values()))}
    for merge in merges:
        ids[merge.replace(" ", "")] = len(ids)
    ids[EOT] = len(ids)
    return json.dumps(dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=None,
        added_tokens=[dict(id=ids[EOT], content=EOT, special=True, single_word=False, lstrip=False, rstrip=False,
                           normalized=False)],
        pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True),
        model=dict(type="BPE", vocab=ids, merges=merges)))


def test_older_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text(hand_made("b c", "a bc", "Ġ abc"))
    assert text_encodings.BPEEncoding(tmp_path).encode("abc abc").tolist() == [257, 258]


def test_a_token_that_merging_never_gives(tmp_path):
    """abc is made of ab and c only, but b and c are joined first: the library gives a, bc and tiktoken would give abc.
    """
    text = hand_made("b c", "a b", "ab c")
    library = tokenizers.Tokenizer.from_str(text)
    assert library.encode("abc").tokens == ["a", "bc"]
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(shards.DataError, match="never gives its token 'abc'"):
        text_encodings.BPEEncoding(tmp_path)


# -----------------------------------------------------------------------------
# Shards

def run_prepare(*args):
    result = run_script("prepare.py", *args)
    assert (result.returncode, result.stderr) == (0, "")


def test_shards(made, encoding, library, tmp_path):
    """Ids of the library, each document after one end-of-text, which text that spells it does not give."""
    (tmp_path / "v.md").write_text("val")
    out = tmp_path / "out"
    run_prepare(made[1], "--val_input", tmp_path / "v.md", "--tokenizer", made[0], "--out", out)
    documents = [text for text in DOCUMENTS if text.strip()]
    expected = [token for text in documents for token in [SIZE - 1, *library.encode(text).ids]]
    assert read_shard(out / "train_000.bin") == (SIZE, expected)
    assert expected.count(SIZE - 1) == len(documents) and sum(EOT in text for text in documents) >= 3
    assert read_shard(out / "val_000.bin") == (SIZE, [SIZE - 1, *encoding.encode("val").tolist()])


def test_manifest_and_copy(made, tmp_path):
    folder, path, _ = made
    run_prepare(path, "--tokenizer", folder, "--out", tmp_path / "a", "--workers", 1)
    moved = tmp_path / "elsewhere.json"
    moved.write_bytes((folder / "tokenizer.json").read_bytes())
    run_prepare(path, "--tokenizer", moved, "--out", tmp_path / "b", "--workers", 3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    names = ["manifest.json", "tokenizer.json", "train_000.bin", "val_000.bin"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    data = (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == data
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    assert manifest["tokenizer"] == manifest["options"]["tokenizer"] == f"bpe:{digest}"
    assert (manifest["vocab_size"], manifest["eot"]) == (SIZE, SIZE - 1)
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_workers_do_not_matter(made, tmp_path):
    path = tmp_path / "long.txt"
    write_input(path, [PROSE * 8, *DOCUMENTS * 8])
    for workers in (1, 3):
        run_prepare(path, "--tokenizer", made[0], "--out", tmp_path / f"{workers}", "--workers", workers)
    assert path.stat().st_size > 4 * prepare.BATCH_CHARS
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")


def test_the_tokenizer_beside_the_shards_is_theirs(made, tmp_path):
    folder, path, _ = made
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    data = (folder / "tokenizer.json").read_bytes()

    def refused(*args):
        before = snapshot(out)
        assert_one_line_error(run_script("prepare.py", path, "--out", out, *args), "--overwrite")
        assert snapshot(out) == before

    (out / "tokenizer.json").write_bytes(data)
    refused("--tokenizer", "bytes")  # it may be wanted for other shards
    run_prepare(path, "--out", out, "--tokenizer", out)  # trained in the same folder
    assert (out / "tokenizer.json").read_bytes() == data
    run_prepare(path, "--out", out, "--tokenizer", out / "tokenizer.json", "--overwrite")
    assert (out / "tokenizer.json").read_bytes() == data
    refused("--tokenizer", "gpt2")
    run_prepare(path, "--out", out, "--tokenizer", "bytes", "--overwrite")
    names = ["manifest.json", "notes.txt", "train_000.bin", "val_000.bin"]
    assert sorted(p.name for p in out.iterdir()) == names
    (out / "tokenizer.json").write_text("another's")
    run_prepare(path, "--out", out, "--tokenizer", folder, "--overwrite")
    assert (out / "tokenizer.json").read_bytes() == data
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "tokenizer.json"])


# -----------------------------------------------------------------------------
# Text from a checkpoint

@pytest.fixture
def bpe_run(made, trainer):
    """A trainer and the folder of a run of it on shards of the tokenizer."""
    for path in trainer.data.iterdir():
        path.unlink()
    run_prepare(made[1], "--tokenizer", made[0], "--out", trainer.data, "--val_fraction", 0.2)
    return trainer, trainer.run().folder


def draw(trainer, *flags):
    """(exit code, stdout, stderr but for note and speed) of sample.py."""
    trainer.capsys.readouterr()
    code = sample.main([str(flag) for flag in flags])
    out, err = trainer.capsys.readouterr()
    return code, out, regex.sub(r"(note: .*\n)?\d+ tokens in .* tokens/s on \w+\n$", "", err)


def test_sample_finds_the_tokenizer(bpe_run, made, tmp_path):
    trainer, folder = bpe_run
    short = ["--max_new_tokens", 20, "--prompt", "The größer "]
    code, out, err = draw(trainer, folder, *short)
    assert (code, err) == (0, "") and out.split("-" * 80 + "\n")[1].startswith("The größer ")
    moved = tmp_path / "moved.json"
    os.rename(trainer.data / "tokenizer.json", moved)
    code, _, err = draw(trainer, folder, *short)
    assert code == 2 and err.count("\n") == 1 and str(SIZE) in err and "--tokenizer" in err
    for path in (moved, made[0]):
        assert draw(trainer, folder, *short, "--tokenizer", path) == (0, out, "")
    for name, size in (("bytes", 257), ("gpt2", 50257)):
        code, _, err = draw(trainer, folder, *short, "--tokenizer", name)
        assert code == 2 and err.count("\n") == 1 and str(SIZE) in err and str(size) in err
    code, _, err = draw(trainer, folder, *short, "--tokenizer", tmp_path / "none.json")
    assert code == 2 and err.count("\n") == 1 and "none.json" in err


def test_sample_starts_with_end_of_text_and_the_prompt(bpe_run, encoding, monkeypatch):
    trainer, folder = bpe_run
    seen = []

    def fake(model, prompt, *rest):
        seen.append((model.training, prompt, rest[1]))
        return [*encoding.encode(" the end"), encoding.eot]

    monkeypatch.setattr(sample, "sample", fake)
    code, out, _ = draw(trainer, folder, "--prompt", "The ")
    assert code == 0 and out.endswith(f"\nThe  the end{EOT}\n")
    assert seen == [(False, [SIZE - 1, *encoding.encode("The ").tolist()], 32)]  # evaluation mode; the run's context


def test_what_stands_beside_the_shards_comes_before_the_size(trainer, made):
    """A tokenizer of 257 or 50257 tokens of one's own is not taken for the bytes or GPT-2's."""
    folder = trainer.run().folder
    assert draw(trainer, folder, "--max_new_tokens", 1)[0] == 0
    (trainer.data / "tokenizer.json").write_bytes((made[0] / "tokenizer.json").read_bytes())
    code, _, err = draw(trainer, folder)
    assert code == 2 and err.count("\n") == 1 and "257" in err and str(SIZE) in err and "--tokenizer" in err
    assert draw(trainer, folder, "--max_new_tokens", 1, "--tokenizer", "bytes")[0] == 0
