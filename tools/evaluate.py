#!/usr/bin/env python3
"""How good is a checkpoint? Loss, perplexity and bits per byte of a text, accuracy on HellaSwag; JSON on stdout.

    python tools/evaluate.py                                         the newest run in logs/, on its validation shards
    python tools/evaluate.py logs/20260101-120000-d12-ab12 --data book.txt
    python tools/evaluate.py logs --data 'data/fineweb10B/fineweb_val_*.bin' --tokens 1048576
    python tools/evaluate.py logs --hellaswag                        fetched once into data/hellaswag/; or name a file

PATH and the tokenizer are those of sample.py. The loss is the mean next-token loss in nats over the first --tokens
targets, read in consecutive windows of --sequence_length that do not overlap: what the script logs as val_loss. A text
file (UTF-8) is one document: it is read behind an end-of-text token, and all of its tokens are targets. bits_per_byte
divides the loss of all targets by the bytes of their text. End-of-text tokens among the targets have no bytes, and
their loss counts.

HellaSwag (Zellers et al. 2019, arXiv:1905.07830): of the four endings of a context, each with a space before it, the
likeliest is chosen, by the sum of its tokens' losses (accuracy) or by their mean (accuracy_norm), without an
end-of-text token before the context. The beginning of what is longer than --sequence_length is cut off; `cut` counts
those examples.

Exit codes: 0, measured; 2, one line on stderr says what to mend; 130, interrupted; 141, nobody read what was
printed.
"""
import hashlib
import http.client
import json
import math
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS.parent / "data"), str(TOOLS)]
import train_gpt2_mod as script  # noqa: E402
from sample import context_of, load, token_bytes  # noqa: E402
from shards import Parser, exit_code, has_kinds, sha256_of  # noqa: E402
from train_gpt2_mod import IGNORED, DataError, require  # noqa: E402

HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
HELLASWAG_FILE = TOOLS.parent / "data" / "hellaswag" / "hellaswag_val.jsonl"
ENDINGS = 4
TIMEOUT = 30  # seconds without an answer
PROGRESS_EVERY = 10  # seconds


class Text:
    """The tokens of a text file behind an end-of-text token, to be read as TokenShards are."""

    def __init__(self, path, encoding):
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as e:
            raise DataError(f"{path} is not UTF-8 (byte {e.start} is {e.object[e.start]:#04x}); convert it, or name "
                            "another") from e
        self.tokens = np.append(encoding.eot, encoding.encode(text)).astype(np.int64)
        self.total = len(self.tokens)

    def read(self, start, count):
        return self.tokens[start : start + count]


def open_data(data, path, encoding):
    """The tokens of a text file, or of the shards that a name or pattern with .bin at its end means."""
    if not data.endswith(".bin"):
        require(Path(data).is_file(), f"data={data} is not a file; name a text file, or shards (.bin) in quotes")
        source = Text(data, encoding)
    else:
        source = script.TokenShards(data)
        require(source.vocab_size == encoding.n_vocab, f"data={data} has a vocabulary of {source.vocab_size}, the "
                f"network of {path} one of {encoding.n_vocab}; name shards of its tokenizer")
        source.check_ids()
    require(source.total > 1, f"data={data} holds no token to predict; name another")
    return source


class Progress:
    """A line on stderr now and then."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.last = what, total, 0, time.monotonic()

    def add(self, count):
        self.done += count
        if time.monotonic() - self.last >= PROGRESS_EVERY:
            self.last = time.monotonic()
            print(f"{self.what} {self.done:,} of {self.total:,}", file=sys.stderr, flush=True)


@torch.no_grad()
def measure_loss(model, source, encoding, tokens, T, B, world, numerics):
    """The figures of the first `tokens` targets (0: all) of a source, as a dict."""
    sizes = torch.tensor([0 if i == encoding.eot else len(token_bytes(encoding, i)) for i in range(encoding.n_vocab)])
    run = SimpleNamespace(val_batch_size=B, sequence_length=T, val_tokens=tokens or source.total)
    progress = Progress("targets", min(run.val_tokens, source.total - 1))
    nats, size, share = 0.0, 0, torch.ones(1, device=world.device)
    for x, targets, count in script.validation_batches(source, run, 1, world):
        with numerics.autocast():
            nats += count * model.loss(model.trunk(x)[0], [targets["target_1"]], share).item()
        ids = targets["target_1"].cpu()
        size += int(sizes[ids[ids != IGNORED]].sum())
        progress.add(count)
    loss = nats / progress.done
    require(math.isfinite(loss), f"the loss is {loss}; name an earlier checkpoint")
    return dict(tokens=progress.done, bytes=size, loss=loss, perplexity=math.exp(loss) if loss < 700 else None,
                bits_per_byte=nats / math.log(2) / size if size else None)


# -----------------------------------------------------------------------------
# HellaSwag

def fetch_hellaswag():
    """The file of the public validation set, fetched where it is not there yet or is another."""
    path = HELLASWAG_FILE
    if path.is_file() and sha256_of(path) == HELLASWAG_SHA256:
        return path
    try:
        with urllib.request.urlopen(HELLASWAG, timeout=TIMEOUT) as reply:
            data = reply.read()
    except (OSError, http.client.HTTPException) as e:
        raise DataError(f"cannot fetch {HELLASWAG} ({script.first_line(e)}); check the network, or name a copy: "
                        "--hellaswag FILE") from e
    if hashlib.sha256(data).hexdigest() != HELLASWAG_SHA256:
        raise DataError(f"{HELLASWAG} does not arrive as the file with sha256={HELLASWAG_SHA256}; try again later, or "
                        "name a copy: --hellaswag FILE")
    path.parent.mkdir(parents=True, exist_ok=True)
    script.write_atomically(path, lambda f: f.write(data))
    return path


def read_hellaswag(path):
    """[(context, endings, label)] of a file of a JSON object a line. Raises DataError for a line that is not one."""
    require(Path(path).is_file(), f"hellaswag={path} is not a file; name the .jsonl, or --hellaswag alone fetches it")
    examples = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}, line {number} is not JSON ({script.first_line(e)}); mend it") from e
        if not (has_kinds(row, ctx=str, endings=list) and row["ctx"] and len(row["endings"]) == ENDINGS
                and all(isinstance(ending, str) for ending in row["endings"])
                and type(row.get("label")) is int and 0 <= row["label"] < ENDINGS):
            raise DataError(f"{path}, line {number} must have ctx (text, not empty), endings ({ENDINGS} texts) and "
                            f"label (0 to {ENDINGS - 1}); mend it")
        examples.append((row["ctx"], row["endings"], row["label"]))
    if not examples:
        raise DataError(f"{path} holds no example; name another")
    return examples


def rows_of(context, endings, encoding, T):
    """(rows, whether one was cut) of an example: of each ending the last T + 1 tokens of all, of which all but the
    first can be predicted, and how many of the last count."""
    context = encoding.encode(context).tolist()
    endings = [encoding.encode(" " + ending).tolist() for ending in endings]
    rows = [((context + ending)[-T - 1 :], min(len(ending), T)) for ending in endings]
    return rows, len(context) + max(map(len, endings)) > T + 1


@torch.no_grad()
def ending_losses(model, rows, numerics):
    """Sum and mean (2, N) in float64 of the losses that count in N rows of rows_of()."""
    width, device = max(len(tokens) for tokens, _ in rows) - 1, model.lm_head.weight.device
    idx, targets = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    for i, (tokens, scored) in enumerate(rows):
        end = len(tokens) - 1  # what stands behind it is seen by no token that counts
        idx[i, :end] = torch.tensor(tokens[:-1])
        targets[i, end - scored : end] = torch.tensor(tokens[-scored:])
    chosen = targets != IGNORED
    with numerics.autocast():
        logits = model.head(model.trunk(idx.to(device))[0][chosen.to(device)])
    losses = F.cross_entropy(logits.float(), targets[chosen].to(device), reduction="none").cpu().double()
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, chosen.nonzero()[:, 0], losses)
    return torch.stack([sums, sums / chosen.sum(1)])


def measure_hellaswag(model, examples, encoding, T, B, numerics):
    """The figures of some examples, as a dict."""
    right, cut, progress = torch.zeros(2), 0, Progress("examples", len(examples))
    at_once = max(1, B // ENDINGS)
    for start in range(0, len(examples), at_once):
        batch = examples[start : start + at_once]
        rows, are_cut = zip(*(rows_of(context, endings, encoding, T) for context, endings, _ in batch))
        cut += sum(are_cut)
        losses = ending_losses(model, sum(rows, []), numerics)
        require(losses.isfinite().all(), "the loss of an ending is no number; name an earlier checkpoint")
        labels = torch.tensor([label for *_, label in batch])
        right += (losses.view(2, -1, ENDINGS).argmin(2) == labels).sum(1)
        progress.add(len(batch))
    accuracy, accuracy_norm = (right / len(examples)).tolist()
    return dict(examples=len(examples), accuracy=accuracy, accuracy_norm=accuracy_norm, cut=cut)


# -----------------------------------------------------------------------------

def evaluate(args):
    """What is printed, as a dict."""
    path, content, model, encoding = load(args.path, args.tokenizer)
    world, T = script.World(args.device), args.sequence_length or context_of(content)
    require(world.size == 1, "the figures are those of one process; start evaluate.py without torchrun")
    require(model.config.position == "rope" or T <= model.config.n_positions, f"sequence_length={T} must be at most "
            f"{model.config.n_positions}, the positions that the network of {path} learned")
    require(args.data != "", "data is empty; name a text file or shards, or drop the flag")
    data = args.data or content["run"].get("input_val_bin", "") * (args.hellaswag is None)
    require(data or args.hellaswag is not None, f"{path} knows no validation shards; name --data or --hellaswag")
    require(data or not args.tokens, f"tokens={args.tokens} would be ignored: they are of --data; name it too")
    require(args.hellaswag is not None or not args.examples, f"examples={args.examples} would be ignored: they are "
            "HellaSwag's; add --hellaswag")
    source = open_data(data, path, encoding) if data else None
    if args.hellaswag is not None:
        file = args.hellaswag or fetch_hellaswag()
        examples = read_hellaswag(file)[: args.examples or None]
    numerics = script.Numerics(args.precision, world.device)
    model.to(world.device)
    result = dict(checkpoint=str(path), step=content.get("step", 0), sequence_length=T, precision=args.precision)
    if source:
        figures = measure_loss(model, source, encoding, args.tokens, T, args.batch_size, world, numerics)
        result |= dict(data=data, **figures)
    if args.hellaswag is not None:
        figures = measure_hellaswag(model, examples, encoding, T, args.batch_size, numerics)
        result |= dict(hellaswag=str(file), **figures)
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type
    return result | dict(device=name, torch=torch.__version__)


def read_arguments(argv):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path("logs"), help="checkpoint, run or folder of runs")
    parser.add_argument("--data", help="text file, or shards (.bin), perhaps as a pattern [without --hellaswag: the "
                        "run's validation shards]")
    parser.add_argument("--hellaswag", nargs="?", const="", metavar="FILE", help="its .jsonl; without a name the "
                        "validation set is fetched")
    parser.add_argument("--tokens", type=int, default=0, help="targets to count, the first ones; 0: all [0]")
    parser.add_argument("--examples", type=int, default=0, help="of HellaSwag, the first ones; 0: all [0]")
    parser.add_argument("--sequence_length", type=int, default=0, help="tokens in a window [the checkpoint's]")
    parser.add_argument("--batch_size", type=int, default=8, help="windows, or endings, computed at once [8]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products [fp32]")
    parser.add_argument("--tokenizer", help="gpt2, bytes or a tokenizer.json [what the training shards have]")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu [the first of them that is there]")
    args = parser.parse_args(argv)
    limits = dict(tokens=(0, script.LARGEST), examples=(0, script.LARGEST), sequence_length=(0, 2**20),
                  batch_size=(1, script.LARGEST_BATCH))
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        require(least <= value <= most, f"{name}={value} must be from {least} to {most}")
    return args


def main(argv=None):
    def report():
        print(json.dumps(evaluate(read_arguments(argv)), indent=2, ensure_ascii=False))

    return exit_code(report, known=ValueError)


if __name__ == "__main__":
    sys.exit(main())
