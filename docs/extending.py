"""What the programs in these folders share that train networks of their own, such as 23-mixture-of-experts/moe.py.

Such a program takes all of the script's flags. One that ends with .py, before them, is another program of this project,
which is then run with those networks known:

    python docs/23-mixture-of-experts/moe.py tools/sample.py logs --prompt 'Once upon a time'
    python tools/bench.py "--model d12" "--script docs/23-mixture-of-experts/moe.py --model d12_moe"

At the end stands what the experiments with a trained network share, whatever they train.
"""
import contextlib
import functools
import importlib.util
import sys
from functools import partial
from pathlib import Path

import measuring
import torch._functorch.config

ROOT = Path(__file__).resolve().parent.parent
INTERRUPTED = 130  # the script's exit code of Ctrl-C before it trained
MODULE = "train_gpt2_mod"  # under this name tools/bench.py loads what its --script names
sys.path.insert(0, str(ROOT))
if getattr(sys.modules.get(MODULE), "IS_PROGRAM", False):
    del sys.modules[MODULE]
import train_gpt2_mod as script  # noqa: E402
from shards import exit_code  # noqa: E402


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


def head_help(path, doc):
    """Have --help be headed by a program's name and the first paragraph of its docstring."""
    before = script.make_parser

    def make_parser():
        parser = before()
        parser.prog = Path(path).name
        its = parser.description.removeprefix(script.__doc__.split("\n")[0])
        parser.description = " ".join(doc.split("\n\n")[0].split()) + its
        return parser

    exchange(make_parser=make_parser)


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
    return exit_code(lambda: run_other(argv[0], argv[1:], program, modules, cache), known=ValueError)  # hf.py's, too


# ----------------------------------------------------------------------------------------------------------------------
# Experiments with a trained network: 25-long-context, 26-retrieval, 27-test-time-compute


def experiment_parser(program, doc, checkpoint, what, made, counts):
    """With the flags that all of them have, and this one's numbers {flag: (default, least, most, help)}. What the
    checkpoint is for, and what is made, are said in the help."""
    folder = Path(program).resolve().parent
    parser, output = script.FlagParser(description=doc.split("\n\n")[0], allow_abbrev=False), f"logs/{folder.name[:2]}"
    add = parser.add_argument
    add("--checkpoint", type=Path, default=checkpoint, help=what)
    add("--device", default="auto", help="cuda, mps or cpu [the first of them that is there]")
    add("--output_dir", type=Path, default=Path(output), help=f"folder of {made} [{output}]")
    add("--results", type=Path, default=folder / "results.jsonl", help="file of results [results.jsonl beside this]")
    add("--table", action="store_true", help="print the tables of the results and stop")
    for name, (default, _, _, text) in counts.items():
        add(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    return parser


def parse_experiment(parser, argv, counts):
    """(args, the flags of the script behind --), with all that can be said of them, of the results and of the folders
    before anything is read."""
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    for name, (_, least, most, _) in counts.items():
        value = getattr(args, name)
        script.require(least <= value <= most, f"{name}={value} must be from {least} to {most}")
    there = measuring.read(args.results)
    script.require(there or not args.table, f"results={args.results} holds nothing: not measured yet")
    if not args.table:
        measuring.check_place(f"output_dir={args.output_dir}", args.output_dir, folder=True)
        measuring.check_place(f"results={args.results}", args.results)
        args.results.parent.mkdir(parents=True, exist_ok=True)
    return args, argv[end + 1 :]


def experiment(main):
    """main(argv) as a program, to its exit code: what can be mended, or an interruption, is one line on stderr."""
    @functools.wraps(main)
    def program(argv=None):
        words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
        return exit_code(lambda: main(words), "interrupted; the same command goes on", ValueError)

    return program


def open_shards(pattern, flag, path, vocab_size):
    """The shards that a flag or the checkpoint at a path names, whose tokens its network knows."""
    script.require(pattern, f"{path} does not say what shards it is of; name them with --{flag}")
    shards = script.TokenShards(pattern)
    script.require(shards.vocab_size == vocab_size, f"{flag}={pattern} has a vocabulary of {shards.vocab_size}, the "
                   f"network of {path} one of {vocab_size}; name shards of its tokenizer")
    shards.check_ids()
    return shards


def refuse_own(words, own):
    """Raise ConfigError where flags of the script, behind --, are none or are in a program's own hands."""
    typed = script.parse_flags(words)
    for name in own:
        script.require(name not in typed, f"{name} is set by this program; drop it from what stands behind --")


def check_training(flags, world, vocab_size, path=None, content=None, flag="--checkpoint"):
    """The network's and the run's configuration of a training with flags of the script, from the weights of a
    checkpoint, of a flag's name, if there is one. Raises ConfigError for what the script will refuse of them."""
    typed = script.parse_flags(flags)
    ignored = [name for name in script.STARTS if content and name in typed]
    script.require(not ignored, f"{', '.join(ignored)} would be ignored: the weights come from {flag}; drop it")
    config, run, _ = script.resolve(typed, world.machine(vocab_size), content and script.initial_fields(content))
    try:
        script.refuse_other_network(config, run, script.Origin(path, content))
    except script.ConfigError as e:
        raise script.ConfigError(str(e).replace("--init_from", flag)) from e
    script.attention_kernel(config, run, world)
    return config, run


def train(flags):
    """The script's main(). A run that was stopped ends with a line of its --resume, which an experiment has not."""
    code = script.main(flags)
    if code in (measuring.STOPPED, INTERRUPTED):
        print("stopped; the same command goes on where it was", file=sys.stderr)
    return code


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type
