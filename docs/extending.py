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


def training_in(manager, attention_kernel, concerns):
    """The script's attention_kernel(), in whose context training runs: within manager() where concerns(config)."""
    def kernel(config, run, world):
        context, note = attention_kernel(config, run, world)
        return partial(manager, context) if concerns(config) else context, note

    return kernel


def without_attention(attention_kernel):
    """The script's attention_kernel(), which has nothing to say where no block attends."""
    def kernel(config, run, world):
        if config.attends:
            return attention_kernel(config, run, world)
        script.require(run.attention == "auto", f"attention={run.attention} would be ignored: no block has attention; "
                       "drop it")
        return contextlib.nullcontext, None

    return kernel


def with_states(Cache, kind, scan):
    """tools/sample.py's cache for a network with mixers of a kind that keep a state: scan(mixer, x, ctx, state) gives
    the output and the state after, of a state that may be None. A state cannot be taken back by some tokens, so those
    behind the first context that was read, the prompt, and behind the last one are kept, and what begins otherwise runs
    from the longest of them that it begins with. One token alone is a step of the recurrence."""
    class StateCache(Cache):
        def __init__(self, model):
            super().__init__(model)
            self.states, self.new = {}, {}  # {number of tokens: {mixer: State}}, and those of this call
            self.mixers = [block.attn for block in model.transformer.h if isinstance(block.attn, kind)]
            for mixer in self.mixers:
                mixer.forward = partial(self.mix, mixer)

        def mix(self, mixer, x, ctx):
            y, self.new[mixer] = scan(mixer, x, ctx, self.states[self.start][mixer] if self.start else None)
            return y

        def known(self, idx):
            most = super().known(idx)
            if not self.mixers:
                return most
            self.states = {count: states for count, states in self.states.items() if count <= most}
            return max(self.states, default=0)

        def __call__(self, idx):
            logits = super().__call__(idx)
            self.states = {count: self.states[count] for count in sorted(self.states)[:1]}
            self.states[idx.size(1)], self.new = self.new, {}
            return logits

    return StateCache


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
