"""The command line: a table of verbs. A verb's module is imported when the verb runs, so `--help` loads no torch.

`cratelm VERB ...` runs `cratelm.commands.VERB` (`import_` for `import`): its `Options` become the flags, its docstring
the help text.
"""

import contextlib
import difflib
import errno
import importlib
import io
import keyword
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from cratelm import __version__
from cratelm.errors import CrateError
from cratelm.rundir import VERIFY_SWITCH

VERBS = {
    "demo": "run the whole flow below in small, on text that is already on this machine",
    "explore": "from any model and texts to a neuron browser, within a stated time",
    "study": "train, score and compare many models, sizes by seeds: the paper's comparison with intervals",
    "tokenize": "tokenize files, folders or data sets into a token directory",
    "train": "train a CRATE or GPT-2 model; the same command resumes a stopped run",
    "evaluate": "measure the loss of a model on held-out text",
    "generate": "generate text from a prompt",
    "import": "make a run from a released or nanoGPT checkpoint, or a Hugging Face GPT-2",
    "export": "write a model or its records for other tools: Hugging Face, NeuronRecord, Neuronpedia",
    "collect": "record every neuron in one pass: where it fires and how strongly",
    "explain": "explain neurons from their records: what a neuron fires on",
    "simulate": "predict from an explanation how strongly the neuron fires on other text",
    "score": "score simulations: how well the explanation predicts the neuron",
    "interpret": "explain, simulate and score in one command",
    "sae train": "train a sparse autoencoder on activations of a model, post hoc",
    "sae evaluate": "measure an autoencoder: sparsity, reconstruction, loss added to the model",
    "whitebox": "measure each layer's objective: coding rates, sparsity, LASSO, dictionary",
    "dial": "sparsity at run time: active neurons, loss and lookup score, nothing retrained",
    "directions": "read each neuron's weights: tokens in and out, neighbours in the next layer",
    "circuit": "find the neurons that make the model predict a token, as a graph",
    "neurons": "list the neurons of a layer, or show one with its excerpts",
    "report": "write tables, figures and a page of scores; --site: the neuron browser as a folder",
    "serve": "the neuron browser live: try a text, steer neurons, see what changes",
    "steer": "change neurons while the model generates: effect on the text and the next token",
    "ablate": "remove neurons: change of the loss on held-out text",
    "ledger": "contribution of every neuron to a logit, exact",
}
"""Verb -> one line of help, in the order of the flow."""

FLOW = (
    ("Everything at once", ("demo", "explore", "study")),
    ("From text to a model", ("tokenize", "train", "evaluate", "generate")),
    ("To and from other tools", ("import", "export")),
    ("From a model to scores", ("collect", "explain", "simulate", "score", "interpret")),
    ("Sparse autoencoders", ("sae train", "sae evaluate")),
    ("Inside a model", ("whitebox", "dial", "directions", "circuit")),
    ("Look at neurons", ("neurons", "report", "serve")),
    ("Steer neurons", ("steer", "ablate", "ledger")),
)
"""The verbs as the overview groups them."""

FIRST_COMMANDS = (
    "cratelm demo",
    "cratelm explore runs/demo/crate-2l",
    "cratelm generate runs/demo/crate-2l",
    "cratelm train --help",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a user's mistake, reported in one line, and 130 for Ctrl-C."""
    arguments, switch = list(sys.argv[1:] if argv is None else argv), os.environ.get(VERIFY_SWITCH, "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal, a file name that is not UTF-8
    try:
        _run(arguments)
        sys.stdout.flush()
    except CrateError as error:
        from cratelm.runtime import printable

        one_line = printable(str(error).replace("\n", "\\n"))  # a file name may hold a line break
        print(f"error: {one_line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. Run the same command again to resume.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python flushes once more at exit, which must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        if (line := _system_error(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    finally:
        os.environ[VERIFY_SWITCH] = switch
    return 0


_NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "Cannot allocate memory",
    "failed to map",
    "can't start new thread",
)
"""What torch, CUDA, the dynamic loader and Python say when memory ends."""


def _system_error(error: BaseException | None) -> str | None:
    """The line for a path that the system refuses, or for a lack of memory; None for every other error."""
    if isinstance(error, OSError) and error.filename is not None and error.errno != errno.ENOMEM:
        return f"{error.filename}: {error.strerror}. Give another path"
    if type(error).__name__ == "PanicException":  # a library in Rust: the regular expression of a tokenizer, mostly
        return f"a library stopped ({' '.join(str(error).split())[:120]}). Hint: the tokenizer.json may be malformed"
    while error is not None:
        text = " ".join(str(error).split())[:120]
        if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
            return f"not enough memory ({text or type(error).__name__}). Hint: a smaller batch or model, or more memory"
        error = error.__cause__ or error.__context__
    return None


def _run(arguments: list[str]) -> None:
    match arguments:
        case [] | ["-h" | "--help" | "help", *_]:
            print(commands_overview(shutil.get_terminal_size().columns))
        case ["--version" | "-V", *_]:
            print(f"cratelm {__version__}")
        case _ if (verb_and_rest := split_verb(arguments)) is not None:
            verb, rest = verb_and_rest
            if "--no-verify" in rest:
                rest.remove("--no-verify")
                os.environ[VERIFY_SWITCH] = "0"
            module = importlib.import_module(command_module(verb))
            options = _parse(module, verb, rest)
            if getattr(options, "runs", None) == ():
                raise CrateError(f"RUN must be at least one run directory, got none. Hint: cratelm {verb} --help")
            if module.run(options) is not False:  # False: requests wait in a batch, and the same command follows
                _print_next(verb, options)
        case [first, *_] if parts := [verb for verb in VERBS if verb.startswith(f"{first} ")]:
            commands = " or ".join(f"cratelm {verb}" for verb in parts)
            raise CrateError(f"cratelm {first} is several commands: {commands}. Run: cratelm {parts[0]} --help")
        case [unknown, *_]:
            close = difflib.get_close_matches(unknown, VERBS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}? Run" if close else "run"
            raise CrateError(f"there is no command {unknown!r}; {hint}: cratelm --help")


def _print_next(verb: str, options: Any) -> None:
    from cratelm.workflows.next_command import next_command

    if command := next_command(verb, options):
        print(f"next: {command}", file=sys.stderr)


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]] | None:
    """The verb at the beginning of the arguments, one word or two, and the remaining arguments."""
    for words in (2, 1):
        if (verb := " ".join(arguments[:words])) in VERBS:
            return verb, list(arguments[words:])
    return None


def command_module(verb: str) -> str:
    """The module of a verb: `import` -> `cratelm.commands.import_`, `sae train` -> `cratelm.commands.sae_train`."""
    return f"cratelm.commands.{verb.replace(' ', '_')}{'_' if keyword.iskeyword(verb) else ''}"


def commands_overview(columns: int) -> str:
    """The text of `cratelm --help`, fitted to a terminal of 40 columns or more."""
    width = min(max(columns, 40), 100)
    indent = 2 + max(map(len, VERBS)) + 2
    lines = textwrap.wrap(
        "cratelm trains white-box language models, measures how interpretable their neurons are, and shows them.", width
    )
    lines += ["", "usage: cratelm COMMAND [options]", "", "Start with"]
    lines += [f"  {command}" for command in FIRST_COMMANDS]
    for title, verbs in FLOW:
        lines += ["", title]
        for verb in verbs:
            first = f"  {verb}".ljust(indent)
            lines += textwrap.wrap(VERBS[verb], width, initial_indent=first, subsequent_indent=" " * indent)
    lines += ["", "Options: cratelm COMMAND --help"]
    lines += textwrap.wrap("--no-verify, with any command: read files without comparing checksums", width)
    return "\n".join(lines)


def _parse(module: ModuleType, verb: str, arguments: list[str]) -> Any:
    """The command's `Options` from its flags. A mistake becomes one line instead of tyro's box."""
    import tyro

    from cratelm.workflows.options.counts import registry

    if asked := {"-h", "--help", "--help-all"} & set(arguments):
        print(command_help(module, verb, shutil.get_terminal_size().columns, everything="--help-all" in asked))
        raise SystemExit(0)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                module.Options, prog=f"cratelm {verb}", description="", args=arguments, config=_tyro_config(),
                registry=registry(),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code == 2 and (line := first_paragraph(stderr.getvalue())):
            line = _unknown_flag(module, verb, arguments) or _missing_flag(line, verb) or line.rstrip(".")
            raise CrateError(f"{line}. Run: cratelm {verb} --help") from None
        print(stderr.getvalue(), end="", file=sys.stderr)
        raise


def _tyro_config() -> tuple[Any, ...]:
    import tyro

    return tyro.conf.HelptextFromCommentsOff, tyro.conf.FlagCreatePairsOff


def _flags(module: ModuleType) -> list[Any]:
    """The command's flags and positional arguments as argparse actions, in the order of its options."""
    import tyro

    from cratelm.workflows.options.counts import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(module.Options, description="", config=_tyro_config(), registry=registry())
    actions = [action for group in parser._action_groups for action in group._group_actions]
    return [action for action in actions if "--help" not in action.option_strings]


def _unknown_flag(module: ModuleType, verb: str, arguments: Sequence[str]) -> str:
    """The error message for the first unknown flag; empty if the command has all flags."""
    actions = _flags(module)
    known = [flag for action in actions for flag in action.option_strings]
    positional = {action.dest.rstrip("s"): _metavar(action) for action in actions if not action.option_strings}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if not flag.startswith("--") or flag == "--" or flag in known:
            continue
        if (name := flag[2:].rstrip("s")) in positional:
            value = positional[name]
            return f"{verb} has no flag {flag}: {value} is written without a flag, as in cratelm {verb} {value}"
        close = difflib.get_close_matches(flag, known, n=2, cutoff=0.6)
        return f"{verb} has no flag {flag}" + (f" (did you mean {' or '.join(close)}?)" if close else "")
    return ""


def _missing_flag(line: str, verb: str) -> str:
    """`Missing from cratelm train: --out PATH ...` -> `train needs --out PATH`; empty for other errors."""
    match = re.match(rf"Missing from cratelm {verb}: (--\S+ [A-Z|{{}}]+)", line)
    return f"{verb} needs {match[1]}" if match else ""


def command_help(module: ModuleType, verb: str, columns: int, *, everything: bool = False) -> str:
    """The text of `cratelm VERB --help`: summary, examples, options.

    `Options.BASIC`, where a command has it, names the options that are shown without `--help-all`; the paragraphs that
    explain the command then come with `--help-all` too.
    """
    width, actions = min(max(columns, 40), 100), _flags(module)
    basic = getattr(module.Options, "BASIC", None)
    positional = [action for action in actions if not action.option_strings]
    named = [action for action in actions if action.option_strings]
    first = [action for action in named if basic is None or _field_name(action) in basic or action.required]
    rest = [action for action in named if action not in first]
    doc = module.__doc__ or ""
    lines = [wrapped(doc if everything or not rest else "\n\n".join(doc.split("\n\n")[:2]), columns), ""]
    names = " ".join(_metavar(action) for action in positional)
    lines += [f"usage: cratelm {verb} {names + ' ' if names else ''}[options]", ""]
    lines += [line for action in positional for line in _option_lines(action, width)] + [""] * bool(positional)
    lines += ["Basic options" if rest else "Options", *(line for a in first for line in _option_lines(a, width))]
    if rest and everything:
        lines += ["", "Advanced options", *(line for action in rest for line in _option_lines(action, width))]
    elif rest:
        lines += ["", f"{len(rest)} more options and an explanation: cratelm {verb} --help-all"]
    return "\n".join(lines)


def _field_name(action: Any) -> str:
    """`--training.batch-tokens` and `--batch-tokens` -> `batch_tokens`."""
    name: str = action.option_strings[0].lstrip("-").rpartition(".")[2]
    return name.replace("-", "_")


def _metavar(action: Any) -> str:
    """The placeholder of a value, without `None`, which only a flag that is left out has."""
    text = str(action.metavar or "")
    if not action.option_strings and text in ("", "PATH", "STR"):
        text = action.dest.upper()
    text = text.replace("{None}|", "").replace("{None,", "{").replace("|{None}", "")
    return re.sub(r"^\[(\S+) \[\1 \.\.\.\]\]$", r"\1...", text)


def _option_lines(action: Any, width: int) -> list[str]:
    """Flag, placeholder and help of one option, wrapped; empty defaults are left out."""
    indent = 21 if width >= 60 else 6
    head = "  " + " ".join([*action.option_strings[:1], *filter(None, [_metavar(action)])])
    text = re.sub(r"\s*\((?:default: (?:None|False|\(\)|''|\"\"|)|required|repeatable)\)", "", str(action.help or ""))
    text = re.sub(r"(?<=default: )\d{6,}(?=\))", lambda match: f"{int(match[0]):_}", text)
    if action.required and action.option_strings:
        text += " (required)"
    body = textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent,
                         break_on_hyphens=False)  # fmt: skip
    if len(head) + 2 > indent or not body:
        return [*textwrap.wrap(head, width, subsequent_indent="    ", break_on_hyphens=False), *body]
    return [head.ljust(indent) + body[0].lstrip(), *body[1:]]


def wrapped(text: str, columns: int) -> str:
    """A docstring fitted to a terminal of 40 columns or more; indented lines are commands to copy and stay whole."""
    width, lines = min(max(columns, 40), 100), []
    for paragraph in text.strip().split("\n\n"):
        lines += [paragraph] if paragraph.startswith(" ") else textwrap.wrap(paragraph, width, break_on_hyphens=False)
        lines.append("")
    return "\n".join(lines).rstrip()


def first_paragraph(box: str) -> str:
    """The first paragraph below the title of a box drawn with lines or dashes, as one line; empty if there is none."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip(" │") for line in plain.splitlines()]
    rules = [index for index, row in enumerate(rows) if re.match(r"[╭╰─]|-{5}", row)]
    return " ".join(rows[rules[0] + 1 : rules[1]]) if len(rules) > 1 else ""
