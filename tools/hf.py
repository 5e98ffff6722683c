#!/usr/bin/env python3
"""Weights from and to Hugging Face's transformers.

    python tools/hf.py import gpt2 gpt2.pt                 a name on the hub, or a folder as transformers saves it
    python train_gpt2_mod.py --init_from gpt2.pt           goes on with these weights
    python tools/hf.py export logs/20260101-120000-gpt2-ab12 my_model

AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained take the folder that export writes. Two of
transformers' classes are networks of the script: GPT-2's and Llama's. What the script's network cannot express is not
imported, and what neither class can is not exported; each refusal names the setting.

The function stays the same up to rounding, and so do the bits of every weight but one: scale_attention's factor goes
into attention's last matrix on export, since no class has it. Norms without weights get ones on export, layers without
biases zeros where GPT-2's class has them. The blocks of separate MTP heads serve training alone and are left out.

The tokenizer comes along as tokenizer.json: the one beside the training shards, else the one known by the vocabulary's
size, or what --tokenizer names. In transformers the text "<|endoftext|>" is the end-of-text token; in the data scripts
it is ordinary text.

transformers itself is not needed, which machines for training seldom have: config.json is written by hand, and the
tests hold the result against transformers.
"""
import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS.parent / "data"), str(TOOLS)]
import train_gpt2_mod as script  # noqa: E402
from sample import find, find_encoding  # noqa: E402
from shards import MAX_VOCAB_SIZE, DataError, Parser, run  # noqa: E402
from text_encodings import BYTE_OF, EOT_TEXT, TOKENIZER  # noqa: E402
from train_gpt2_mod import GPT, GPTConfig, base_configs  # noqa: E402

CONFIG, SAFETENSORS, PICKLE, TOKENIZER_CONFIG = ("config.json", "model.safetensors", "pytorch_model.bin",
                                                 "tokenizer_config.json")
WRITTEN = (SAFETENSORS, TOKENIZER, TOKENIZER_CONFIG, CONFIG)  # config.json last: a folder that has it is whole
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
ROPE_LENGTH = 1024  # the longest sequence to tell transformers of, where a file knows none: RoPE itself has no end
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"

# -----------------------------------------------------------------------------
# The two classes: names of weights

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}  # theirs -> ours
SYNONYMS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}

LLAMA_NAMES = {  # our weight -> theirs whose rows it joins; GPT-2's names are ours
    WTE: ["model.embed_tokens.weight"],
    "transformer.h.N.ln_1.weight": ["model.layers.N.input_layernorm.weight"],
    "transformer.h.N.attn.c_attn.weight": [f"model.layers.N.self_attn.{part}_proj.weight" for part in "qkv"],
    "transformer.h.N.attn.c_proj.weight": ["model.layers.N.self_attn.o_proj.weight"],
    "transformer.h.N.ln_2.weight": ["model.layers.N.post_attention_layernorm.weight"],
    "transformer.h.N.mlp.c_fc.weight": ["model.layers.N.mlp.gate_proj.weight", "model.layers.N.mlp.up_proj.weight"],
    "transformer.h.N.mlp.c_proj.weight": ["model.layers.N.mlp.down_proj.weight"],
    "transformer.ln_f.weight": ["model.norm.weight"],
}


class Part(NamedTuple):
    """One of our weights, and where a class has it."""

    name: str
    shape: tuple
    theirs: list
    rows: list  # how many of ours each of theirs is
    transposed: bool

    def their_shapes(self):
        shapes = [(rows, *self.shape[1:]) for rows in self.rows]
        return [shape[::-1] if self.transposed else shape for shape in shapes]


def build(config):
    """The network without the memory of its weights."""
    with torch.device("meta"):
        return GPT(config)


def layout(config, family):
    """The Parts of a network that the class can be; the tied head is one with the embedding."""
    heads = [config.n_head * config.head_dim] + 2 * [config.n_kv_head * config.head_dim]
    for name, weight in build(config).state_dict().items():
        if name == HEAD and config.tie_embeddings:
            continue
        block = re.search(r"\.h\.(\d+)\.", name)
        theirs = family.names.get(re.sub(r"\.h\.\d+\.", ".h.N.", name), [name])
        theirs = [their.replace(".N.", f".{block[1]}.") for their in theirs] if block else theirs
        rows = {1: [len(weight)], 2: 2 * [config.ffn_hidden], 3: heads}[len(theirs)]
        yield Part(name, tuple(weight.shape), theirs, rows, bool(re.fullmatch(family.transposed, name)))


# -----------------------------------------------------------------------------
# The two classes: config.json

def setting(content, name, kind, default=None):
    """A value of config.json, or its class's default. Raises DataError for another kind, or for a number below 1 that
    counts something."""
    value = content.get(name)
    value = default if value is None else value
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind or kind is int and value < 1:
        wanted = {int: "a whole number of at least 1", float: "a number", bool: "true or false", str: "a name"}[kind]
        raise DataError(f"{name}={value} must be {wanted}")
    return value


def activation(content, name, known, default):
    theirs = setting(content, name, str, default)
    if SYNONYMS.get(theirs, theirs) not in known:
        raise DataError(f"{name}={theirs} is not an activation of the network here; only {', '.join(known)} are")
    return known[SYNONYMS.get(theirs, theirs)]


def rope_base(content):
    """rope_theta, from where transformers 5 has it or from where it was before."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise DataError(f"rope_parameters={rope} must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise DataError(f"rope_type={kind} scales the rotary angles; the network here has default ones only")
    rope = {**content, **rope}
    if setting(rope, "partial_rotary_factor", float, 1.0) != 1:
        raise DataError(f"partial_rotary_factor={rope['partial_rotary_factor']} must be 1: the network here rotates "
                        "whole heads")
    return setting(rope, "rope_theta", float, 10000.0)


def gpt2_fields(content):
    """(fields of GPTConfig, longest sequence, shares dropped) from GPT-2's config.json."""
    sizes = {name: setting(content, name, int) for name in ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")}
    fields = dict(
        **sizes, ffn_hidden=setting(content, "n_inner", int, 4 * sizes["n_embd"]),
        mlp=activation(content, "activation_function", ACTIVATIONS, "gelu_new"),
        norm_eps=setting(content, "layer_norm_epsilon", float, 1e-5),
        tie_embeddings=setting(content, "tie_word_embeddings", bool, True),
    )
    dropped = [setting(content, f"{what}_pdrop", float, 0.1) for what in ("embd", "attn", "resid")]
    return fields, sizes["n_positions"], dropped


def llama_fields(content):
    """The same from Llama's."""
    n_head, n_embd = (setting(content, f, int) for f in ("num_attention_heads", "hidden_size"))
    head_dim = setting(content, "head_dim", int, max(1, n_embd // n_head))
    if head_dim * n_head != n_embd:
        raise DataError(f"head_dim={head_dim} must be hidden_size / num_attention_heads = {n_embd} / {n_head}; the "
                        "network here has no heads of another size")
    fields = dict(
        vocab_size=setting(content, "vocab_size", int), n_layer=setting(content, "num_hidden_layers", int),
        n_head=n_head, n_kv_head=setting(content, "num_key_value_heads", int, n_head), n_embd=n_embd,
        ffn_hidden=setting(content, "intermediate_size", int),
        mlp=activation(content, "hidden_act", dict(silu="swiglu"), "silu"),
        norm_eps=setting(content, "rms_norm_eps", float, 1e-6), rope_base=rope_base(content),
        tie_embeddings=setting(content, "tie_word_embeddings", bool, False),
    )
    dropped = [setting(content, "attention_dropout", float, 0.0), 0.0]
    return fields, setting(content, "max_position_embeddings", int, 2048), dropped


def gpt2_settings(config, length):
    """GPT-2's config.json of a network."""
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return dict(
        model_type="gpt2", n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        n_inner=config.ffn_hidden, n_positions=length, activation_function=theirs[config.mlp],
        layer_norm_epsilon=config.norm_eps, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        resid_pdrop=config.dropout,
    )


def llama_settings(config, length):
    """Llama's; the base of the angles stands where transformers 5 reads it and where those before do."""
    return dict(
        model_type="llama", num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, head_dim=config.head_dim, hidden_size=config.n_embd,
        intermediate_size=config.ffn_hidden, max_position_embeddings=length, hidden_act="silu",
        rms_norm_eps=config.norm_eps, attention_bias=False, mlp_bias=False, rope_theta=config.rope_base,
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_base),
    )


class Family(NamedTuple):
    """A class of transformers as a set of our networks."""

    name: str  # of the class
    preset: str  # whose fields an imported network has, but for those that config.json tells
    bias: bool  # whether the class's layers have biases
    read: Any  # config.json -> (fields of GPTConfig, longest sequence, shares dropped)
    write: Any  # (GPTConfig, longest sequence) -> config.json
    only: dict  # field of GPTConfig -> the values that the class can be
    fixed: dict  # setting of config.json -> the one value that our network can be
    names: dict  # our weight -> theirs, where they have other names
    prefix: str  # of all their names but the head's; files of the network without a head lack it
    transposed: str  # pattern of our names whose matrices the class keeps as (in, out)
    buffers: str  # pattern of what old files hold besides the weights


PLAIN = dict(
    mixer=("attention",), qk_norm=(False,), post_norm=(False,), window=(0,), logit_softcap=(0.0,), softmax_scale=(0.0,),
    document_mask=(False,), value_embeddings=(0,), x0_lambdas=(False,), embd_norm=(False,), smear=("none",),
    attention_gate=(0,),
)
FAMILIES = {
    "gpt2": Family(
        name="GPT2LMHeadModel", preset="gpt2", bias=True, read=gpt2_fields, write=gpt2_settings,
        only=dict(norm=("layernorm",), position=("learned",), mlp=tuple(ACTIVATIONS.values()), gqa_enabled=(False,),
                  **PLAIN),
        fixed=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
                   add_cross_attention=False, quantization_config=False),
        names={}, prefix="transformer.", transposed=r".*\.c_\w+\.weight", buffers=r".*\.attn\.(bias|masked_bias)",
    ),
    "llama": Family(
        name="LlamaForCausalLM", preset="sized", bias=False, read=llama_fields, write=llama_settings,
        only=dict(norm=("rmsnorm",), position=("rope",), mlp=("swiglu",), bias=(False,), **PLAIN),
        fixed=dict(attention_bias=False, mlp_bias=False, rope_interleaved=False, quantization_config=False),
        names=LLAMA_NAMES, prefix="model.", transposed=r"(?!)", buffers=r".*\.rotary_emb\.inv_freq",
    ),
}


# -----------------------------------------------------------------------------
# import: the files

def folder_files(folder):
    """A function that gives the path of a file of the folder, or None."""
    return lambda name: folder / name if (folder / name).is_file() else None


def hub_files(repo):
    """The same for a repository of the hub: what is asked for is downloaded, to the library's cache."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError:
        raise DataError(f"import {repo} needs huggingface_hub; pip install huggingface_hub, or name a folder") from None
    logging.set_verbosity_error()  # its warnings about retries: what fails is said in one line
    if not sys.stderr.isatty():
        disable_progress_bars()

    def fetch(name):
        try:
            return Path(hf_hub_download(repo, name))
        except RemoteEntryNotFoundError:
            return None
        except Exception as e:  # of its HTTP library too, which differs between its versions
            cause = e.__cause__ or e
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
            raise DataError(f"{repo} is no folder, and {name} of a repository of that name cannot be fetched from the "
                            f"hub ({reason}); check the name and the network (HF_ENDPOINT names a mirror)") from e

    return fetch


def files_of(source):
    if Path(source).is_dir():
        return folder_files(Path(source))
    if Path(source).exists() or not re.fullmatch(HUB_NAME, source) or source.strip(".") == "":
        raise DataError(f"{source} is neither a folder nor a name on the hub; name a folder with {CONFIG}")
    return hub_files(source)


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path} is not JSON ({e}); fetch it again") from e
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object; fetch it again")
    return content


def read_tensors(path):
    """The tensors of one file by name. Nothing in the file is run (weights_only)."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error of one line is to come
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError("not tensors by name")
        return tensors
    except ImportError:
        raise DataError(f"{path.name} needs safetensors; pip install safetensors") from None
    except Exception as e:  # both raise many kinds
        raise DataError(f"{path} cannot be read as weights ({type(e).__name__}); fetch it again") from e


def read_weights(files, source):
    """All tensors by name, from one file or the shards of an index; pickled ones where there is nothing else."""
    for name in (SAFETENSORS, PICKLE):
        if path := files(name):
            return read_tensors(path)
        if path := files(f"{name}.index.json"):
            shards = read_json(path).get("weight_map")
            shards = sorted(set(shards.values())) if isinstance(shards, dict) else []
            if not shards or any(Path(str(shard)).name != shard for shard in shards):
                raise DataError(f"{path} does not say which files hold the weights; fetch it again")
            tensors = {}
            for shard in shards:
                if not (path := files(shard)):
                    raise DataError(f"{source} lacks {shard}, which its index names; fetch it again")
                tensors |= read_tensors(path)
            return tensors
    raise DataError(f"{source} has neither {SAFETENSORS} nor {PICKLE}, whole or with an index; name another")


def read_network(content, where):
    """(Family, GPTConfig, longest sequence, notes) of a config.json. Raises DataError for other networks."""
    try:
        kind = str(content.get("model_type"))
        if kind not in FAMILIES:
            raise DataError(f"model_type={kind} is not a network of the script; only {' and '.join(FAMILIES)} are")
        family, notes = FAMILIES[kind], []
        for name, value in family.fixed.items():
            if bool(content.get(name, value)) != value:
                raise DataError(f"{name}={content[name]} is not in the network here; only {value} is")
        fields, length, dropped = family.read(content)
        fields["dropout"] = dropped[0] if len(set(dropped)) == 1 else 0.0
        if len(set(dropped)) > 1:
            notes = [f"dropout: {', '.join(map(str, dropped))} in different places, where the network here has one "
                     "share; 0 is kept"]
        return family, GPTConfig(**{**base_configs[family.preset], **fields}), length, notes
    except (DataError, script.ConfigError) as e:
        raise DataError(f"{where}: {e}") from e


# -----------------------------------------------------------------------------
# import: weights

def to_ours(config, family, theirs, source):
    """Our weights, in fp32, from all tensors of the files. Raises DataError unless each has its place."""
    theirs = {name if name.startswith(family.prefix) or name == HEAD else family.prefix + name: tensor
              for name, tensor in theirs.items() if not re.fullmatch(family.buffers, name)}
    if config.tie_embeddings and HEAD in theirs:
        their_wte = family.names.get(WTE, [WTE])[0]
        if not torch.equal(theirs.setdefault(their_wte, theirs[HEAD]), theirs[HEAD]):
            raise DataError(f"{source} has another {HEAD} than {their_wte}, which {CONFIG} ties; set "
                            "tie_word_embeddings false there")
        del theirs[HEAD]
    ours = {}
    for part in layout(config, family):
        pieces = []
        for name, shape in zip(part.theirs, part.their_shapes()):
            if name not in theirs:
                raise DataError(f"{source} lacks the weight {name}, which its {CONFIG} asks for; fetch it again")
            piece = theirs.pop(name)
            if tuple(piece.shape) != shape or not piece.is_floating_point():
                raise DataError(f"{source} has {name} as {piece.dtype} {list(piece.shape)}, its {CONFIG} asks for "
                                f"floats {list(shape)}")
            pieces.append(piece.T if part.transposed else piece)
        ours[part.name] = torch.cat(pieces).float().contiguous()
    if theirs:
        others = f" and {len(theirs) - 1} others" if len(theirs) > 1 else ""
        raise DataError(f"{source} has the weight {min(theirs)}{others}, for which the network here has no place")
    if config.tie_embeddings:
        ours[HEAD] = ours[WTE]
    return ours


def preset_of(config, family):
    """The first preset that is the network, else the family's."""
    equal = (name for name, fields in base_configs.items() if GPTConfig(**fields).network() == config.network())
    return next(equal, family.preset)


def import_weights(source, out, overwrite):
    """SOURCE as a file for --init_from."""
    if out.is_dir():
        raise DataError(f"{out} is a folder; name a file, such as {out / 'weights.pt'}")
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; --overwrite replaces it, or name another file")
    files = files_of(source)
    path = files(CONFIG)
    if path is None:
        raise DataError(f"{source} has no {CONFIG}; name a folder as transformers saves it, or a name on the hub")
    family, config, length, notes = read_network(read_json(path), f"{source}/{CONFIG}")
    model = preset_of(config, family)
    content = dict(network=dataclasses.asdict(config), run=dict(model=model, sequence_length=length),
                   model=to_ours(config, family, read_weights(files, source), source))
    with staging(out) as new:
        try:
            script.write_checkpoint(Path(new) / out.name, content)
        except (OSError, RuntimeError) as e:  # torch has the second for a full disk
            raise DataError(f"{out} cannot be written ({str(e).splitlines()[0]}); free some space, or name another "
                            "place") from e
        place(Path(new) / out.name, out)
    if config.vocab_size > MAX_VOCAB_SIZE:
        notes.append(f"its vocabulary is above the {MAX_VOCAB_SIZE} tokens that shards can have: no training here")
    print("\n".join([f"{out}: {build(config).parameter_count():,} parameters, model {model}, vocabulary "
                     f"{config.vocab_size}, sequences of up to {length}; --init_from {out} goes on with them", *notes]))


# -----------------------------------------------------------------------------
# export: weights and config.json

def family_of(config, path):
    """The class of transformers that the network is. Raises DataError, by what is in the way, where there is none."""
    misfits = [(family, [name for name, values in family.only.items() if getattr(config, name) not in values])
               for family in FAMILIES.values()]
    family, names = min(misfits, key=lambda pair: len(pair[1]))
    if not names:
        return family
    found = ", ".join(f"{name} {getattr(config, name)}" for name in names)
    kinds = ["with " + ", ".join(f"{name} {' or '.join(map(str, values))}" for name, values in family.only.items()
                                 if name not in PLAIN) for family in FAMILIES.values()]
    plain = ", ".join(f"{name} {value}" for name, (value,) in PLAIN.items())
    raise DataError(f"{path} has {found}, which no class of transformers has with the rest; what can be exported is a "
                    f"network {', or '.join(kinds)}; and always {plain}")


def check_weights(config, weights, path):
    """The weights without those of MTP heads, and whether there were any. Raises DataError unless they are the
    network's."""
    shapes = {name: weight.shape for name, weight in build(config).state_dict().items()}
    wrong = [name for name in shapes.keys() | weights.keys()
             if name not in shapes or name not in weights or weights[name].shape != shapes[name]]
    if wrong:
        raise DataError(f"{path} does not hold the weights of its network ({min(wrong)}); name another")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("mtp_blocks.")}
    return kept, len(kept) < len(weights)


def to_theirs(config, family, ours):
    """The class's weights, by its names, each with memory of its own."""
    scale = build(config).transformer.h[0].attn_scale
    theirs = {}
    for part in layout(dataclasses.replace(config, norm_weights=True, bias=family.bias, mtp_enabled=False), family):
        weight = ours.get(part.name)
        if weight is None:
            weight = torch.full(part.shape, 0.0 if part.name.endswith("bias") else 1.0)
        if scale != 1 and ".attn.c_proj." in part.name:
            weight = weight * scale
        for name, piece in zip(part.theirs, weight.float().split(part.rows)):
            theirs[name] = (piece.T if part.transposed else piece).clone(memory_format=torch.contiguous_format)
    return theirs


# -----------------------------------------------------------------------------
# export: the tokenizer

def merges_of(tokens):
    """The pair of tokens that is joined to each token of several bytes, in the order of the ids."""
    ranks, merges = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens:
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges += [parts] if len(parts) == 2 else []
    return merges


def tokenizer_json(encoding):
    """The content of tokenizer.json: the encoding's own, or one in the same form for those that have no such file."""
    if encoding.file is not None:
        return encoding.file
    of_bytes = encoding.name == "bytes"
    tokens = [bytes([i]) if of_bytes else encoding.bpe.decode_single_token_bytes(i) for i in range(encoding.eot)]
    character = {byte: text for text, byte in BYTE_OF.items()}

    def text_of(token):
        return "".join(character[byte] for byte in token)

    end = dict(id=encoding.eot, content=EOT_TEXT, single_word=False, lstrip=False, rstrip=False, normalized=False,
               special=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)
    model = dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
        fuse_unk=False, byte_fallback=False, ignore_merges=False,
        vocab={**{text_of(token): i for i, token in enumerate(tokens)}, EOT_TEXT: encoding.eot},
        merges=[" ".join(map(text_of, pair)) for pair in merges_of(tokens)],
    )
    content = dict(version="1.0", truncation=None, padding=None, added_tokens=[end], normalizer=None,
                   pre_tokenizer=level, post_processor=level, decoder=level, model=model)
    return to_json(content)


def find_tokenizer(tokenizer, path, config, run):
    """The encoding and a line on it; None where none is found. Raises what is wrong with one that was named."""
    try:
        encoding = find_encoding(tokenizer, path, run.get("input_bin", str(path)), config.vocab_size)
        return encoding, f"tokenizer {encoding.name}"
    except (DataError, script.ConfigError) as e:
        if tokenizer:
            raise
        return None, f"without a tokenizer: {e}"


def export_weights(checkpoint, folder, tokenizer, overwrite):
    """A checkpoint as a folder of transformers."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise DataError(f"{folder} is not empty; --overwrite replaces a model in it, or name another folder")
    if (folder / CONFIG).exists() and "model_type" not in read_json(folder / CONFIG):
        raise DataError(f"{folder} holds another {CONFIG} than a model's; name another folder")  # perhaps a run's
    path = find(checkpoint)
    content = script.load_checkpoint(path, script.WEIGHTS, "checkpoint")
    config, run = GPTConfig(**content["network"]), content["run"]
    family = family_of(config, path)
    ours, had_heads = check_weights(config, content["model"], path)
    encoding, note = find_tokenizer(tokenizer, path, config, run)
    length = config.n_positions if config.position == "learned" else run.get("sequence_length", ROPE_LENGTH)
    # Shards have end-of-text as the last token; of weights from elsewhere we know it by their tokenizer alone.
    eot = config.vocab_size - 1 if encoding or "input_bin" in run else None
    files = {CONFIG: to_json(dict(
        architectures=[family.name], **family.write(config, length), vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_embeddings, bos_token_id=eot, eos_token_id=eot, dtype="float32",
    ))}
    if encoding:
        files[TOKENIZER] = tokenizer_json(encoding)
        files[TOKENIZER_CONFIG] = to_json(dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT_TEXT, eos_token=EOT_TEXT, model_max_length=length,
            clean_up_tokenization_spaces=False,
        ))
    with staging(folder) as new:
        new = Path(new)
        save_tensors(to_theirs(config, family, ours), new / SAFETENSORS)
        for name, data in files.items():
            (new / name).write_bytes(data)
        shutil.copymode(new / CONFIG, new / SAFETENSORS)  # which safetensors makes its owner's alone
        folder.mkdir(exist_ok=True)
        for name in reversed(WRITTEN):
            (folder / name).unlink(missing_ok=True)
        for name in sorted(os.listdir(new), key=WRITTEN.index):
            place(new / name, folder / name)
    print("\n".join([f"{folder}: {family.name} from {path}", note]
                    + ["left out: the blocks of the MTP heads, which serve training alone"] * had_heads))


# -----------------------------------------------------------------------------
# Files that appear when they are whole

def to_json(content):
    return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"


def staging(target):
    """A hidden folder beside the target, which goes when it is left: to write in, and to rename from."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)


def place(new, target):
    """Give a written file its name, once it is on the disk."""
    with open(new, "rb") as f:
        os.fsync(f.fileno())
    os.replace(new, target)


def save_tensors(tensors, path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise DataError("export needs safetensors; pip install safetensors") from None
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # which transformers asks for
    except SafetensorError as e:  # a full disk, among others
        raise DataError(f"{path.name} cannot be written ({e}); free some space, or name another place") from e


def main(argv):
    parser = Parser("hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="import | export")
    command = commands.add_parser("import", help="SOURCE's weights as a file for --init_from")
    command.set_defaults(act=import_weights)
    command.add_argument("source", metavar="SOURCE", help="folder as transformers saves it, or a name on the hub")
    command.add_argument("out", type=Path, metavar="OUT.pt", help="file to write")
    command.add_argument("--overwrite", action="store_true", help="replace the file")
    command = commands.add_parser("export", help="a checkpoint as a folder of transformers")
    command.set_defaults(act=export_weights)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT",
                         help="checkpoint, run or folder of runs, or a file that import wrote")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    command.add_argument("--tokenizer", help=f"gpt2, bytes or a {TOKENIZER} [what the training shards have]")
    command.add_argument("--overwrite", action="store_true", help="replace the model that FOLDER holds")
    flags = vars(parser.parse_args(argv))
    try:
        flags.pop("act")(**flags)
    except (script.ConfigError, script.DataError) as e:
        raise DataError(str(e)) from e


if __name__ == "__main__":
    run(main)
