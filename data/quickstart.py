"""Make the quickstart's shards: English that comes with Python, so that a first run needs no network.

    python data/quickstart.py
    python data/quickstart.py --out data/quickstart

The text is pydoc's reference topics (pydoc_data.topics, what `help("CLASSES")` shows) and the docstrings of the
standard library, which are read from its source files and never imported. One topic, or all docstrings of one module,
is one document; a docstring counts once, and neither very short ones nor those that are only doctests count. It is a
few MB, which is enough to see a loss fall; it differs a little from one Python version to the next.

Writes python_docs.txt (documents with a NUL between them), train_000.bin, val_000.bin and manifest.json: one token
per byte of UTF-8, vocabulary 257. Does nothing where the folder is complete already; makes it again where it is
damaged.
"""
import argparse
import ast
import inspect
import os
import sys
import sysconfig
import tokenize
import warnings
from pathlib import Path

from prepare import Options, prepare
from shards import DataError, Parser, new_folder, read_manifest, run, sha256_of

# Tests, programs and copies of other projects: little prose, or prose that is there twice.
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data",
            "site-packages", "dist-packages", "__pycache__"}
MIN_CHARS = 80  # shorter docstrings are mostly signatures and fragments
OPTIONS = Options(tokenizer="bytes", val_fraction=0.05)  # more than prepare.py's 1%: here that would be a few documents
TEXT = "python_docs.txt"


def topics():
    """pydoc's reference topics in order of their names; none where this Python comes without them."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        print("this Python has no pydoc_data: the text is docstrings alone")
        return []
    return [texts[name].strip() for name in sorted(texts)]


def source_files(root):
    """The standard library's own .py files under `root`, in an order that does not depend on the file system."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in LEFT_OUT and not n.startswith((".", "config-")))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def docstrings(path):
    """The docstrings of a source file in order, cleaned as inspect.getdoc does it; none where it does not parse."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # ast.walk goes by depth; a module has no line
    return [inspect.cleandoc(text) for text in (ast.get_docstring(node, clean=False) for node in nodes) if text]


def is_prose(text):
    """Whether a docstring is long enough, and has that much left without its doctests."""
    prose, in_doctest = 0, False
    for line in text.split("\n"):
        in_doctest = bool(line.strip()) and (in_doctest or line.lstrip().startswith(">>>"))  # to the next blank line
        prose += 0 if in_doctest else len(line) + 1
    return prose > MIN_CHARS


def module_documents(root):
    """One document for each module that has docstrings not seen before."""
    seen, documents = set(), []
    for path in source_files(root):
        fresh = [text for text in dict.fromkeys(docstrings(path)) if text not in seen and is_prose(text)]
        seen.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    return documents


def is_complete(out):
    """Whether manifest.json stands there and every shard is as it says."""
    manifest = read_manifest(out)
    return manifest is not None and bool(manifest["shards"]) and all(
        (out / name).is_file() and (out / name).stat().st_size == record["bytes"]
        and sha256_of(out / name) == record["sha256"] for name, record in manifest["shards"].items())


def is_ours(out):
    """Whether the folder was made by this script: then what is missing or damaged may be made again."""
    manifest = read_manifest(out)
    return manifest is not None and manifest["options"].get("inputs") == [TEXT]


def say(out, manifest):
    size = sum(record["bytes"] for record in manifest["shards"].values())
    print(f"{out}: {size / 1e6:.1f} MB, {manifest['tokens']:,} tokens, {manifest['documents']:,} documents, "
          f"vocabulary {manifest['vocab_size']}")


def main(argv):
    parser = Parser("quickstart.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "quickstart", metavar="FOLDER",
                        help="folder to write (default: quickstart, beside this script)")
    parser.add_argument("--overwrite", action="store_true",
                        help="make the shards again, also in place of others that --out holds")
    flags = parser.parse_args(argv)
    out = flags.out
    if is_ours(out) and is_complete(out) and not flags.overwrite:
        say(out, read_manifest(out))
        print("complete already; nothing to do")
        return
    with new_folder(out, overwrite=flags.overwrite or is_ours(out)) as folder:
        documents = topics() + module_documents(sysconfig.get_paths()["stdlib"])
        if len(documents) < 2:
            raise DataError(f"{sys.executable} comes without pydoc_data and its library's source; use another Python, "
                            "or your own text with python data/prepare.py")
        # Docstrings can hold NULs and lone surrogates, which are neither documents' ends nor UTF-8.
        text = "\0".join(document.replace("\0", "") for document in documents)
        (folder / TEXT).write_bytes(text.encode("utf-8", "replace"))
        say(out, prepare([folder / TEXT], [], folder, OPTIONS))


if __name__ == "__main__":
    run(main)
