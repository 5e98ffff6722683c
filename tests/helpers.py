"""What the test files share: small configurations, machines, a stand-in for World, shards, slow references."""
import dataclasses
import struct

import numpy as np
import torch

import train_gpt2_mod as script

CPU = torch.device("cpu")
CUDA_MACHINE = script.Machine(world_size=1, device_type="cuda", has_bf16=True, has_fp8=True,
                              vocab_size=script.GPT2_VOCAB_SIZE)


def machine(**changes):
    return CUDA_MACHINE._replace(**changes)


def small_config(**changes):
    """A network of a few thousand parameters."""
    return script.GPTConfig(**{**dict(vocab_size=61, n_layer=2, n_head=4, n_embd=32, precision="fp32"), **changes})


def shrunk_preset(name, **changes):
    """A preset's switches on a network of two layers, six heads of size 4; its window and share of heads shrunk too."""
    preset = dict(script.base_configs[name])
    heads = preset.get("n_head", script.GPTConfig.n_head)
    if preset.get("n_kv_head"):
        preset["n_kv_head"] = max(1, 6 * preset["n_kv_head"] // heads)
    if preset.get("window"):
        preset["window"] = preset["window"] // 100
    if preset.get("value_embeddings"):
        preset["value_embeddings"] = 1
    preset.pop("ffn_hidden", None)
    preset.pop("zero_init", None)  # with which all logits begin as 0
    return small_config(**{**preset, **dict(n_layer=2, n_head=6, n_embd=24, vocab_size=61), **changes})


def small_run(**changes):
    small = dict(batch_size=2, sequence_length=8, grad_accumulation_steps=1, num_iterations=10, device="cpu")
    return script.TrainConfig(**{**small, **changes})


class FakeWorld:
    """One of `size` processes, alone: the loader, the evaluation, the meter and the saver need no more of World."""

    def __init__(self, rank=0, size=1, device=CPU):
        self.rank, self.size, self.device = rank, size, device
        self.is_main = rank == 0

    def sum(self, tensor):
        return tensor

    mean = sum

    def gather(self, item):
        return [item]

    def read_later(self, tensor):
        return tensor.tolist

    def synchronize(self):
        pass

    def peak_memory_mb(self):
        return 7

    def peak_flops(self):
        return None


class LateMeter(script.Meter):
    """As on a GPU, where a step's numbers are read when the next one is queued."""

    def __init__(self, state, run, world, *others):
        super().__init__(state, run, FakeWorld(device=torch.device("cuda")), *others)


def write_shard(path, tokens, *, magic=20240520, version=1, count=None, vocab_size=0):
    """A shard in llm.c's format, byte by byte; `count` for a header that lies."""
    header = [magic, version, len(tokens) if count is None else count, vocab_size] + [0] * 252
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens))
    return path


def write_shards(folder, *streams, vocab_size=0):
    """Shards named so that their order is that of the arguments; gives the pattern that matches them."""
    for i, tokens in enumerate(streams):
        write_shard(folder / f"part_{i:03d}.bin", tokens, vocab_size=vocab_size)
    return str(folder / "part_*.bin")


def read_slowly(folder):
    """The joined tokens of write_shards' files, unpacked one by one, as a list."""
    joined = []
    for path in sorted(folder.glob("part_*.bin")):
        content = path.read_bytes()
        joined += [token for token, in struct.iter_unpack("<H", content[1024:])]
    return joined


def random_tokens(count, vocab_size=61, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def batch_of(config, B=2, T=8, seed=0):
    """Random ids (B, T) and the targets that a loader would give with them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, config.vocab_size, (B, T + config.lookahead), generator=generator)
    return rows[:, :T], {f"target_{k}": rows[:, k : k + T] for k in range(1, config.lookahead + 1)}


def changed_id(idx, position, vocab_size):
    """idx with another token at one position of every row."""
    other = idx.clone()
    other[:, position] = (other[:, position] + 1) % vocab_size
    return other


def naive_cross_entropy(logits, targets):
    """Mean in float64 over the targets that are not IGNORED, one at a time; NaN where there is none."""
    losses = []
    flat = logits.detach().double().reshape(-1, logits.size(-1))
    for row, target in zip(flat, targets.reshape(-1).tolist()):
        if target != script.IGNORED:
            losses.append(float(torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[target]))
    return sum(losses) / len(losses) if losses else float("nan")


def all_fields():
    """(dataclass, field) of every flag."""
    return [(cls, f) for cls in (script.GPTConfig, script.TrainConfig, script.Shorthand)
            for f in dataclasses.fields(cls)]
