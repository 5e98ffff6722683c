"""The shape of the script: what importing it does, its sections and their sizes, its flags, fields and presets."""
import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import all_fields, machine

import train_gpt2_mod as script

PATH = Path(script.__file__)
LINES = PATH.read_text().splitlines()
TREE = ast.parse(PATH.read_text())

# Lines that each section may have, its rule and title included. Raising one is a decision: delete something first.
BUDGETS = {
    "imports and constants": 147, "Config": 838, "World and log": 497, "Model": 495, "Numerics": 108, "Loss": 165,
    "Optimizer and schedule": 325, "Data": 217, "Parallel": 152, "Checkpoint": 418, "Training": 785, "main": 30,
}
LONGEST_FUNCTION, LONGEST_TRAIN = 70, 75

# Run in a process of its own: the libraries are loaded first, and what the script does beyond them is an error.
IMPORT_PROBE = """
import os, random, sys
import numpy as np, torch, torch.distributed
import torch.nn.attention.flex_attention, torch.nn.parallel
import argparse, glob, platform, secrets, shlex, json, fractions, difflib, gc, datetime, contextlib, concurrent.futures

class Untouchable(list):
    def refuse(self, *args):
        raise AssertionError("importing reads sys.argv")
    __getitem__ = __iter__ = __len__ = refuse

def watch(event, args):
    if event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        raise AssertionError(f"importing opens {args[0]} for writing")
    if event in ("subprocess.Popen", "os.system", "socket.connect", "os.mkdir", "os.remove", "os.rename"):
        raise AssertionError(f"importing does {event} {args}")

def state():
    cudnn = torch.backends.cudnn
    return (torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
            torch.is_grad_enabled(), cudnn.benchmark, torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
            random.getstate(), sorted(os.environ.items()), os.getcwd(), os.umask(0o22))

sys.path.insert(0, FOLDER)
sys.argv = Untouchable(["x"])
before = state()
sys.addaudithook(watch)
import train_gpt2_mod
assert state() == before, "importing changes global state"
assert not torch.cuda.is_initialized(), "importing starts CUDA"
assert not torch.distributed.is_initialized(), "importing starts a process group"
"""


def section_of_lines():
    """[(title, number of lines)] in the file's order; what stands before the first rule is the imports."""
    rules = [i for i, line in enumerate(LINES) if re.fullmatch(r"# -{118}", line)]
    titles = ["imports and constants"] + [re.match(r"# ([^:.]+)", LINES[i + 1])[1] for i in rules]
    ends = [*rules, len(LINES)]
    return list(zip(titles, (end - start for start, end in zip([0, *rules], ends))))


def functions(tree=TREE):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_importing_does_nothing_else():
    code = IMPORT_PROBE.replace("FOLDER", repr(str(PATH.parent)))
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "train_gpt2_mod" not in done.stderr


def test_sections_stand_in_the_order_of_the_docstring():
    listed = script.__doc__.split("Sections:")[1].split("\n\n")[0].strip().rstrip(".")
    listed = [re.sub(r"\s+", " ", title) for title in re.split(r"\s+-\s+", listed)]
    assert ["imports and constants", *listed] == [title for title, _ in section_of_lines()]


def test_sections_keep_to_their_budgets():
    sizes = dict(section_of_lines())
    assert sizes.keys() == BUDGETS.keys()
    over = {title: f"{size} of {BUDGETS[title]}" for title, size in sizes.items() if size > BUDGETS[title]}
    assert not over


def test_no_line_is_too_long():
    assert not [f"line {i}: {len(line)} columns" for i, line in enumerate(LINES, 1) if len(line) > 120]


def test_no_function_is_too_long():
    limits = {"train": LONGEST_TRAIN}
    sizes = {f"{f.name} at line {f.lineno}": f.end_lineno - f.lineno + 1 for f in functions()
             if f.end_lineno - f.lineno + 1 > limits.get(f.name, LONGEST_FUNCTION)}
    assert not sizes


def test_no_class_prints():
    calls = [node for cls in ast.walk(TREE) if isinstance(cls, ast.ClassDef) for node in ast.walk(cls)
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"]
    assert not [f"line {call.lineno}" for call in calls]


def test_only_main_ends_the_process():
    """And the thread that reads the signals, for the second of them."""
    exits = [node for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and node.attr in ("exit", "_exit")]
    at_once, last = sorted(exits, key=lambda node: node.lineno)
    assert (ast.unparse(at_once), ast.unparse(last)) == ("os._exit", "sys.exit")
    signals, = [node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "StopSignals"]
    watch, = [node for node in signals.body if getattr(node, "name", "") == "watch"]
    assert watch.lineno < at_once.lineno <= watch.end_lineno and last.lineno > len(LINES) - 3


def test_a_field_has_one_place_and_a_name_one_meaning():
    names = [name for _, f in all_fields() for name in (f.name, *f.metadata["aliases"], *f.metadata["switches"])]
    assert sorted(set(names)) == sorted(names)


def test_every_field_has_help():
    for _, f in all_fields():
        text = f.metadata["help"]
        assert 10 < len(text) < 110 and text[0] != " " and text[-1] not in ". ", f.name
        assert f.type in (bool, int, float, str), f.name
        assert f.default is None or type(f.default) is f.type, f.name
    texts = [f.metadata["help"] for _, f in all_fields()]
    assert len(set(texts)) == len(texts)  # a help text copied from another flag


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_flags(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for _, f in all_fields():
        for name in (f.name, *f.metadata["aliases"], *f.metadata["switches"]):
            assert re.search(rf"--(no_)?{name}\b", shown), name
    assert all(name in shown for name in [*script.base_configs, *script.mlps, *script.mixers, *script.schedules])


def fields_read(tree):
    """Names that the code reads of a config: config.x, run.x or self.x in a property, or "x" asked of a dict of fields
    (fields["x"], typed.get("x"), "x" in typed). Checks in __post_init__ are no use of a value."""
    found = set()
    for cls in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
        if cls.name in ("GPTConfig", "TrainConfig"):
            properties = [node for node in cls.body if isinstance(node, ast.FunctionDef)
                          and any(getattr(d, "id", "") == "property" for d in node.decorator_list)]
            found |= {node.attr for p in properties for node in ast.walk(p) if isinstance(node, ast.Attribute)
                      and getattr(node.value, "id", "") == "self"}
    dicts = {"fields", "typed", "settings"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found |= {node.attr} if base in ("config", "run") else set()
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in dicts:
            found |= {getattr(node.slice, "value", None)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get" and node.args:
            if getattr(node.func.value, "id", "") in dicts:
                found |= {getattr(node.args[0], "value", None)}
    return found


def test_every_field_is_read_somewhere():
    assert not {f.name for _, f in all_fields()} - fields_read(TREE)


def test_every_shorthand_is_consumed():
    consumed = {name for _, consumes in script.RULES for name in consumes} | {"resume", "init_from", "dry_run",
                                                                              "memory_gib"}
    assert consumed == {f.name for f in dataclasses.fields(script.Shorthand)}


def test_presets_list_only_what_differs():
    defaults = {f.name: f.default for f in dataclasses.fields(script.GPTConfig)}
    for name, preset in {**script.base_configs, **{name: pair[0] for name, pair in script.fast_presets.items()}}.items():
        assert preset.keys() <= defaults.keys(), name
        made = name in script.fast_presets  # by formula, whose values may be the defaults
        assert made or not [key for key, value in preset.items() if value == defaults[key]], name
        assert all(type(value) is type(defaults[key]) for key, value in preset.items()), name
    defaults = {f.name: f.default for cls in (script.TrainConfig, script.Shorthand) for f in dataclasses.fields(cls)}
    defaults.update(tokens_per_step=0, precision="bf16")
    for name, (_, recipe) in script.fast_presets.items():
        assert recipe.keys() <= defaults.keys(), name
        assert all(type(value) is type(defaults[key]) for key, value in recipe.items()), name


@pytest.mark.parametrize("name", script.base_configs)
def test_every_preset_resolves_and_builds(name):
    config, run, _ = script.resolve(dict(model=name), machine(vocab_size=0))
    precision = "fp8_head" if name in script.fast_presets else "bf16"
    assert config == script.GPTConfig(**script.base_configs[name], precision=precision) and run.model == name
    recipe = script.preset(name)[1]
    assert run.tokens_per_step == recipe.get("tokens_per_step", run.batch_size * run.sequence_length)
    with torch.device("meta"):
        model = script.GPT(config)
    assert len(model.transformer.h) == config.n_layer


TYPED = [
    dict(), dict(model="d12_mlp3x"), dict(gqa_enabled=True), dict(model="d12_gqa", gqa_enabled=True),
    dict(model="d12_swiglu"), dict(n_embd=1024), dict(n_embd=960, n_head=10),
    dict(n_head=6, model="d12_gqa", n_kv_head=2),
    dict(kv_head_ratio=0.5), dict(embd_scale=1.25), dict(gqa_enabled=True, kv_head_ratio=0.4, embd_scale=1.0),
    dict(gqa_enabled=True, n_kv_head=2, n_embd=512), dict(total_batch_size=2**17, batch_size=4),
    dict(grad_accumulation_steps=12, sequence_length=64), dict(mtp_enabled=True, mtp_max_steps=4, mtp_weight=0.2),
    dict(precision="fp32", mlp_expansion_factor=8 / 3, window=77), dict(n_kv_head=0), dict(compile=False, shuffle=True),
    dict(model="gpt2"), dict(model="sized_small", n_layer=3), dict(model="sized", n_embd=640),
    dict(model="d12_mla", rope_head_dim=16), dict(model="sized_small", mlp_expansion_factor=2.0), dict(ffn_hidden=1000),
    dict(model="gpt2", norm="rmsnorm", position="rope", bias=False), dict(precision="amp"), dict(loss_clamp=12.0),
    dict(schedule="cosine", warmup_iters=9, min_lr_fraction=0.1), dict(mtp_enabled=True, mtp_heads="separate"),
    dict(model="tiny", warmup_iters=10, warmdown_iters=20, input_val_bin="", val_batch_size=3, rope_base=500.0),
    dict(nan_policy="rollback", nan_limit=2, keep_last=3, save_every_minutes=1.5), dict(nan_policy="stop"),
    dict(batch_size="auto", total_batch_size=2**17), dict(model="d12_fast"), dict(optimizer="muon", muon_lr=0.05),
    dict(model="d12_fast", num_iterations=50, total_batch_size=2**16), dict(model="d12_fast", optimizer="adamw"),
    dict(warmdown_fraction=0.5, num_iterations=21), dict(model="d12_fast", schedule="cosine", min_lr_fraction=0.0),
]


@pytest.mark.parametrize("typed", TYPED, ids=str)
@pytest.mark.parametrize("size", [1, 4])
def test_a_resolved_configuration_resolves_to_itself(typed, size):
    """From a checkpoint with nothing typed, with the same typed again, and with all its fields typed."""
    here = machine(world_size=size, memory=2**34)
    config, run, _ = script.resolve(typed, here)
    content = json.loads(json.dumps(dict(network=dataclasses.asdict(config), run=dataclasses.asdict(run))))
    assert (script.GPTConfig(**content["network"]), script.TrainConfig(**content["run"])) == (config, run)
    base = script.checkpoint_fields(content)
    assert script.resolve({}, here, base)[:2] == (config, run)
    assert script.resolve(typed, here, base)[:2] == (config, run)
    everything = {**content["network"], **content["run"]}
    if not config.mtp_enabled:  # then the flags of MTP would be ignored, which is an error
        everything = {name: value for name, value in everything.items() if not name.startswith("mtp_")}
    assert script.resolve(everything, here)[:2] == (config, run)
    assert script.resolve(everything, here, base)[:2] == (config, run)


def flag_of(f, name):
    """A flag with a value that is not the field's default, and that value."""
    choices = f.metadata["choices"]
    choices = choices() if callable(choices) else choices
    value = {int: 3, float: 0.75, str: choices[-1] if choices else "some where", bool: True}[f.type]
    assert value != f.default
    return [f"--{name}"] + ([] if f.type is bool else [str(value)]), value


@pytest.mark.parametrize("cls, f", all_fields(), ids=lambda x: getattr(x, "name", ""))
def test_a_flags_spellings_are_one(cls, f):
    if f.default is True:
        assert script.parse_flags([f"--no_{f.name}"]) == script.parse_flags([f"--no-{f.name}"]) == {f.name: False}
        return
    for name in (f.name, *f.metadata["aliases"]):
        argv, value = flag_of(f, name)
        assert script.parse_flags(argv) == {f.name: value}
        assert script.parse_flags([argv[0].replace("_", "-"), *argv[1:]]) == {f.name: value}
        if f.type is not bool:
            assert script.parse_flags([f"{argv[0].replace('_', '-')}={argv[1]}"]) == {f.name: value}
        elif cls is not script.Shorthand:
            assert script.parse_flags([f"--no-{name.replace('_', '-')}"]) == {f.name: False}
    assert type(script.parse_flags(argv)[f.name]) is f.type


def test_nothing_typed_is_nothing():
    assert script.parse_flags([]) == {}


def test_dashes_in_values_stay():
    argv = ["--input-bin=a-b_c-*.bin", "--output-dir", "my-logs_1"]
    assert script.parse_flags(argv) == dict(input_bin="a-b_c-*.bin", output_dir="my-logs_1")
