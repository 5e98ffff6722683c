#!/usr/bin/env python3
"""Text from a checkpoint.

    python tools/sample.py                                    the newest checkpoint of the newest run in logs/
    python tools/sample.py logs/20260101-120000-d12-ab12 --prompt 'Once upon a time' --temperature 0.8 --top_k 50

The tokenizer is the tokenizer.json beside the training shards; where there is none, it is known by the vocabulary's
size: bytes (257) or GPT-2's (50257). --tokenizer names another. Each sample starts with the end-of-text token, as the
documents of the shards do, and then the prompt. Every new token runs the whole context again.
"""
import sys
from glob import glob
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from shards import Parser  # noqa: E402
from text_encodings import TOKENIZER, get_encoding  # noqa: E402
from train_gpt2_mod import (  # noqa: E402
    GPT, WEIGHTS, GPTConfig, candidates, load_checkpoint, newest_checkpoint, require,
)

ENCODINGS = {257: "bytes", 50257: "gpt2"}  # by size of the vocabulary


def find(path):
    """The checkpoint that a path means: a file, the newest of a run's folder, or that of the newest run in a folder."""
    if path.is_file():
        return path
    found = newest_checkpoint(path) or next(candidates(path, lambda network: True), None)
    require(found, f"{path} holds no checkpoint; name a .pt file, a run's folder or a folder of runs")
    return found


def find_encoding(tokenizer, path, input_bin, vocab_size):
    """The encoding that --tokenizer names, or that goes with a checkpoint's training shards and vocabulary."""
    # input_bin is a pattern, perhaps also in its folders; what it matches together has one tokenizer.
    beside = sorted(glob(str(Path(input_bin).parent / TOKENIZER)))
    tokenizer = tokenizer or (beside[0] if beside else ENCODINGS.get(vocab_size))
    known = ", ".join(f"{size} ({name})" for size, name in ENCODINGS.items())
    require(tokenizer, f"{path} has a vocabulary of {vocab_size}, which no tokenizer here has; known are {known}, and "
            f"--tokenizer names a {TOKENIZER}")
    encoding = get_encoding(tokenizer)
    require(encoding.n_vocab == vocab_size, f"tokenizer={tokenizer!r} has {encoding.n_vocab} tokens, the network of "
            f"{path} {vocab_size}; name its own with --tokenizer")
    return encoding


@torch.no_grad()
def sample(model, ids, max_new_tokens, context, temperature, top_k, generator):
    """Extend ids (a list) by max_new_tokens drawn from softmax(logits / temperature) over the top_k (0: all) tokens,
    one after another; temperature 0 takes the likeliest. Gives the new ids."""
    ids, start = list(ids), len(ids)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids[-context:]]))[0][0, -1].float()
        if top_k > 0:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return ids[start:]


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path("logs"), help="checkpoint, run or folder of runs")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--tokenizer", help=f"gpt2, bytes or a {TOKENIZER} [what the training shards have]")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to draw [200]")
    parser.add_argument("--num_samples", type=int, default=1, help="texts to draw [1]")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the logits; 0: the likeliest [0.8]")
    parser.add_argument("--top_k", type=int, default=50, help="draw among the likeliest k tokens; 0: among all [50]")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the draws [1337]")
    try:
        args = parser.parse_args(argv)
        require(args.temperature == 0 or 1e-3 <= args.temperature <= 1e3, f"temperature={args.temperature} must be 0 "
                "or from 0.001 to 1000")
        for name, least in dict(top_k=0, max_new_tokens=1, num_samples=1, seed=0).items():
            value = getattr(args, name)
            require(least <= value < 2**63, f"{name}={value} must be at least {least} and below 2^63")
        path = find(args.path)
        content = load_checkpoint(path, WEIGHTS, "checkpoint")  # what hf.py imports will do
        config = GPTConfig(**content["network"])
        encoding = find_encoding(args.tokenizer, path, content["run"].get("input_bin", str(path)), config.vocab_size)
    except ValueError as e:  # ConfigError and the data scripts' DataError
        print(f"error: {e}", file=sys.stderr)
        return 2
    model = GPT(config)
    model.load_state_dict(content["model"])
    model.eval()
    print(f"{path}, step {content.get('step', 0)}, temperature {args.temperature}, top_k {args.top_k}, seed {args.seed}")
    generator = torch.Generator().manual_seed(args.seed)
    prompt = [encoding.eot, *encoding.encode(args.prompt).tolist()]
    context = content["run"].get("sequence_length", config.n_positions)
    for _ in range(args.num_samples):
        new = sample(model, prompt, args.max_new_tokens, context, args.temperature, args.top_k, generator)
        print("-" * 80 + "\n" + args.prompt + encoding.decode(new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
