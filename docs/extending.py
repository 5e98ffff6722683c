"""What the programs in these folders share that train networks of their own, such as 23-mixture-of-experts/moe.py.

Such a program takes all of the script's flags. One that ends with .py, before them, is another program of this project,
which is then run with those networks known:

    python docs/23-mixture-of-experts/moe.py tools/sample.py logs --prompt 'Once upon a time'
    python tools/bench.py "--model d12" "--script docs/23-mixture-of-experts/moe.py --model d12_moe"
"""
import contextlib
import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch._functorch.config

ROOT = Path(__file__).resolve().parent.parent
MODULE = "train_gpt2_mod"  # under this name tools/bench.py loads what its --script names
sys.path.insert(0, str(ROOT))
if getattr(sys.modules.get(MODULE), "IS_PROGRAM", False):
    del sys.modules[MODULE]
import train_gpt2_mod as script  # noqa: E402


def exchange(**parts):
    """Put classes and functions in the place of the script's."""
    for name, part in parts.items():
        getattr(script, name)  # AttributeError where the script has it no more
        setattr(script, name, part)


@contextlib.contextmanager
def exact_backward(context):
    """The context, in which what torch.autocast(enabled=False) exempts forward is not rounded backward either: compiled
    under autocast, a backward pass otherwise has autocast of its own, for all products; uncompiled it has none."""
    with context(), torch._functorch.config.patch(backward_pass_autocast="off"):
        yield


def with_exact_backward(attention_kernel, concerns):
    """The script's attention_kernel(), in whose context training runs, with exact_backward() where concerns(config)."""
    def kernel(config, run, world):
        context, note = attention_kernel(config, run, world)
        return partial(exact_backward, context) if concerns(config) else context, note

    return kernel


def show_source(path):
    """Have the head of a run's log, and what its processes compare, hold a program's text too."""
    before = script.source
    exchange(source=lambda: f"{before()}\n{f' {Path(path).name} ':-^100}\n{Path(path).read_text()}")


def run_other(path, argv, program, modules, cache):
    """The main() of another program. What starts runs starts `program`; tools/sample.py's cache takes the modules, in
    whose forward no token meets another but where the cache, as cache() makes it of its class, sees to that."""
    script.require(Path(path).is_file(), f"{path} is no program here; name one such as tools/sample.py")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    if hasattr(module, "SCRIPT"):
        module.SCRIPT = Path(program)
    if hasattr(module, "KNOWN"):
        module.KNOWN.update(modules)
        module.Cache = cache(module.Cache)
    return module.main(argv)


def main(argv, program, modules=(), cache=lambda own: own):
    """The script's main(), or that of the program named first."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or not argv[0].endswith(".py"):
        return script.main(argv)
    try:
        return run_other(argv[0], argv[1:], program, modules, cache)
    except (ValueError, OSError) as e:  # of hf.py, which leaves them to its own last lines
        print(f"error: {script.first_line(e)}", file=sys.stderr)
        return 2
