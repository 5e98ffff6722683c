#!/usr/bin/env python3
"""Text from a checkpoint.

    python tools/sample.py                                    the newest checkpoint of the newest run in logs/
    python tools/sample.py logs/20260101-120000-d12-ab12 --prompt 'Once upon a time' --temperature 0.8 --top_k 50
    python tools/sample.py logs --num_samples 5 --top_k 0 --top_p 0.9 --seed 7

The tokenizer is the tokenizer.json beside the training shards; where there is none, it is known by the vocabulary's
size: bytes (257) or GPT-2's (50257). --tokenizer names another. Each sample starts with the end-of-text token, as the
documents of the shards do, and then the prompt. It is computed in fp32, whatever the precision of the training.

The text comes token by token; bytes of a character wait until it is whole. Samples are drawn one after another, number
i with a generator of (seed, i): it is the same however many others are asked for. The network sees the last
sequence_length tokens of its training. Up to there the keys and values of what was read are kept and each token runs
alone; beyond, where every token would stand at another place, each runs the last sequence_length tokens again, as
--no_cache does from the first.

Standard output has the text, standard error the speed. Exit codes: 0, drawn; 2, one line on stderr says what to mend;
130, interrupted; 141, nobody read what was printed.
"""
import codecs
import sys
import time
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import train_gpt2_mod as script  # noqa: E402
from shards import Parser, exit_code  # noqa: E402
from text_encodings import EOT_TEXT, TOKENIZER, get_encoding, without_surrogates  # noqa: E402
from train_gpt2_mod import GPT, WEIGHTS, DataError, GPTConfig, load_checkpoint, require  # noqa: E402

MASK_ROW_MULTIPLE = 16  # numbers from row to row of the masks that CUDA's kernel in fp32 takes as they are
ENCODINGS = {257: "bytes", 50257: "gpt2"}  # by size of the vocabulary
# Modules in whose forward a token meets no other, or meets them only in those that the cache sees to.
KNOWN = {
    GPT, script.Block, script.CausalSelfAttention, script.LatentAttention, script.Smear, script.Gate, script.Rotary,
    script.MLP, script.SwiGLUMLP, script.Linear, script.Norm, script.Mix, script.First, nn.Linear, nn.Embedding,
    nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict,
}


def find(path):
    """The checkpoint that a path means: a file, the newest of a run's folder, or that of the newest run in a folder."""
    if path.is_file():
        return path
    found = script.newest_checkpoint(path) or next(script.checkpoints_of_runs(path, {}), None)
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


def load(path, tokenizer):
    """(path, content, network in fp32 for evaluation, encoding) of the checkpoint that a path means."""
    path = find(path)
    content = load_checkpoint(path, WEIGHTS, "checkpoint")  # what hf.py imports will do
    config = GPTConfig(**{**content["network"], "precision": "fp32"})
    encoding = find_encoding(tokenizer, path, content["run"].get("input_bin", str(path)), config.vocab_size)
    model = GPT(config)
    if not script.is_like(content["model"], model.state_dict()):
        raise DataError(f"{path} does not hold the weights of its own network; name another")
    model.load_state_dict(content["model"])
    return path, content, model.eval(), encoding


def context_of(content):
    """The longest sequence that a checkpoint's network was trained on, or may be where nobody knows, in tokens."""
    return content["run"].get("sequence_length", content["network"]["n_positions"])


class Cache:
    """What a network computed of the tokens that it has read, so that it runs only those behind them.

    Called with idx (B, T), whole sequences each time, it gives the logits (B, V) of the tokens that come next: those of
    model(idx). What a token leaves depends on it and on the tokens before it alone, so it holds as far as idx begins
    like the idx before: to the last token where a text has grown by one, through the prompt where another sample
    begins. A context that has slid begins otherwise, and runs whole.

    The forward pass is the script's. Where tokens meet in it, what is kept joins them: keys and values in attend(), a
    block's normed stream in its smear. What stands before the blocks is cheap, and done for all tokens. The model
    serves its cache alone from then on.

    MLA's keys and values are kept as its latent gives them, in d12_mla 1920 numbers a token and block where latent and
    rotary key are 288. From these c_up would make the same keys for all tokens at every step; that it multiply the
    queries instead (DeepSeek-V2, section 2.1.2), the norm of the keys (qk_norm) does not allow.

    Raises ConfigError for a network with a part that may look at other tokens in a way unknown here.
    """

    def __init__(self, model):
        unknown = sorted({type(module).__name__ for module in model.modules() if type(module) not in KNOWN})
        require(not unknown, f"the cache does not know whether {', '.join(unknown)} of this network looks at other "
                "tokens; add --no_cache")
        self.model, self.idx, self.kept = model, torch.zeros(0, 0), {}
        self.start = self.first = 0  # the first token of those that run, and the first that these may look at
        for block in model.transformer.h:
            block.attn.attend = partial(self.attend, block.attn)
            for smear in (block.smear_1, block.smear_2):
                if isinstance(smear, script.Smear):
                    smear.forward = partial(self.smear, smear)

    @torch.no_grad()
    def __call__(self, idx):
        window = self.model.config.window
        self.start = start = self.known(idx)
        self.first = max(0, start + 1 - window) if window else 0
        self.idx = idx[:, :start]
        own = idx.to(self.model.lm_head.weight.device)
        x, ctx = self.model.embed(own, self.mask(own) if start else None)
        cos, sin = (None if table is None else table[start:] for table in (ctx.cos, ctx.sin))
        x, follows = x[:, start:], ctx.follows[:, max(0, start - 1) :]  # that of the token before too: smear() has it
        ctx = script.Context(cos, sin, ctx.mask, x, follows=follows)
        for block, values in zip(self.model.transformer.h, self.model.values_of_blocks(own[:, start:])):
            x = block(x, ctx._replace(values=values))
        self.idx = idx
        return self.model.head(self.model.transformer.ln_f(x[:, -1]))

    def known(self, idx):
        """How many of its first tokens were read already; the last one runs in any case, for its logits."""
        if len(idx) != len(self.idx):
            return 0
        most = min(self.idx.size(1), idx.size(1) - 1)
        differ = (idx[:, :most] != self.idx[:, :most]).any(0).nonzero()
        return int(differ[0]) if len(differ) else most

    def extended(self, key, new):
        """new (..., t, width) behind the `start` first of what was kept under this key, and kept with them."""
        start, end, kept = self.start, self.start + new.size(-2), self.kept.get(key)
        if start == 0 or kept.size(-2) < end:
            larger = new.new_empty(*new.shape[:-2], 2 * end, new.size(-1))  # twice, so that it is seldom copied
            if start:
                larger[..., :start, :] = kept[..., :start, :]
            self.kept[key] = kept = larger
        kept[..., start:end, :] = new
        return kept[..., :end, :]

    def mask(self, idx):
        """0 where the tokens that run may look, else -inf, (t, keys) or (B, 1, t, keys). Done here for all blocks: of a
        mask of truth values, or with rows of another length, each block's attention would make such a one itself."""
        T, documents = idx.size(1), self.model.documents(idx)
        q = torch.arange(self.start, T, device=idx.device)[:, None]
        k = torch.arange(self.first, T, device=idx.device)
        seen = (q >= k) & (q - k < (self.model.config.window or T))
        if documents is not None:
            seen = seen & (documents[:, None, self.start :, None] == documents[:, None, None, self.first :])
        mask = torch.zeros_like(seen, dtype=self.model.lm_head.weight.dtype).masked_fill_(~seen, -torch.inf)
        return script.pad_to(mask, MASK_ROW_MULTIPLE)[..., : mask.size(-1)]

    def attend(self, attention, q, k, v, mask):
        k, v = (self.extended((attention, name), z)[:, :, self.first :] for name, z in (("k", k), ("v", v)))
        return type(attention).attend(attention, q, k, v, mask)

    def smear(self, smear, x, follows):
        kept = self.extended(smear, x)[:, max(0, self.start - 1) :]
        return type(smear).forward(smear, kept, follows)[:, -x.size(1) :]


def draw(logits, temperature, top_k, top_p, generator):
    """A token drawn from softmax(logits / temperature), logits (V,), among the top_k likeliest (0: all) and of these
    the fewest that together have top_p of the probability (Holtzman et al. 2020, arXiv:1904.09751, section 3.1);
    temperature 0 takes the likeliest."""
    require(logits.isfinite().all(), "the network gives logits that are no numbers; name an earlier checkpoint")
    if temperature == 0:
        return int(logits.argmax())
    if top_k > 0:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
    chances = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        likeliest, order = chances.sort(descending=True, stable=True)
        chances[order[likeliest.cumsum(-1) - likeliest >= top_p]] = 0
    return int(torch.multinomial(chances, 1, generator=generator))


@torch.no_grad()
def sample(model, ids, max_new_tokens, context, temperature, top_k, top_p, generator, cache=None):
    """Give max_new_tokens that go on from ids (a list), one after another, each drawn with the last `context` tokens
    read: by the model, or by a Cache of it."""
    ids, device = list(ids), model.lm_head.weight.device
    for _ in range(max_new_tokens):
        idx = torch.tensor([ids[-context:]])
        logits = cache(idx) if cache else model.head(model.trunk(idx.to(device))[0][:, -1])
        ids.append(draw(logits[0].float().cpu(), temperature, top_k, top_p, generator))
        yield ids[-1]


def token_bytes(encoding, token):
    """What a token is in UTF-8: perhaps a part of a character."""
    if token == encoding.eot:
        return EOT_TEXT.encode()
    return encoding.bpe.decode_single_token_bytes(token) if hasattr(encoding, "bpe") else bytes([token])


def texts(encoding, tokens):
    """The text of each token; bytes of a character that is not whole come with those that complete it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(token_bytes(encoding, token))
    yield decoder.decode(b"", final=True)


def print_samples(args):
    path, content, model, encoding = load(args.path, args.tokenizer)
    device = script.World(args.device).device
    cache = Cache(model.to(device)) if args.cache else None
    print(f"{path}, step {content.get('step', 0)}, temperature {args.temperature}, top_k {args.top_k}, "
          f"top_p {args.top_p}, seed {args.seed}")
    prompt, context = without_surrogates(args.prompt), context_of(content)
    ids = [encoding.eot, *encoding.encode(prompt).tolist()]
    if len(ids) + args.max_new_tokens - 1 > context:
        print(f"note: prompt and new tokens are more than the context of {context} tokens; beyond it each token runs "
              f"the last {context} again", file=sys.stderr)
    begin = time.perf_counter()
    for i in range(args.num_samples):
        seed = int(np.random.SeedSequence([args.seed, i]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        new = sample(model, ids, args.max_new_tokens, context, args.temperature, args.top_k, args.top_p, generator,
                     cache)
        print("-" * 80 + "\n" + prompt, end="", flush=True)
        for text in texts(encoding, new):
            print(text, end="", flush=True)
        print(flush=True)
    count, seconds = args.num_samples * args.max_new_tokens, time.perf_counter() - begin
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s on {device.type}"
          + ", without a cache" * (not cache), file=sys.stderr)


def read_arguments(argv):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path("logs"), help="checkpoint, run or folder of runs")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--tokenizer", help=f"gpt2, bytes or a {TOKENIZER} [what the training shards have]")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to draw [200]")
    parser.add_argument("--num_samples", type=int, default=1, help="texts to draw [1]")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the logits; 0: the likeliest [0.8]")
    parser.add_argument("--top_k", type=int, default=50, help="draw among the likeliest k tokens; 0: among all [50]")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the fewest tokens that have this share of "
                        "the probability; 1: among all [1]")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the draws [1337]")
    parser.add_argument("--no_cache", dest="cache", action="store_false", help="run the whole context for each token")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu [the first of them that is there]")
    args = parser.parse_args(argv)
    require(args.temperature == 0 or 1e-3 <= args.temperature <= 1e3, f"temperature={args.temperature} must be 0 "
            "or from 0.001 to 1000")
    require(0 < args.top_p <= 1, f"top_p={args.top_p} must be above 0 and at most 1, which is all tokens")
    for name, least in dict(top_k=0, max_new_tokens=1, num_samples=1, seed=0).items():
        value = getattr(args, name)
        require(least <= value < 2**63, f"{name}={value} must be at least {least} and below 2^63")
    return args


def main(argv=None):
    return exit_code(lambda: print_samples(read_arguments(argv)), "\ninterrupted", ValueError)


if __name__ == "__main__":
    sys.exit(main())
