"""The rules of the house (`CONTRIBUTING.md`), read from the syntax trees: who imports whom, and how long things get."""

import ast
import graphlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from cratelm.cli import VERBS, command_module

REPOSITORY = Path(__file__).parent.parent

FLOORS = {
    "__main__": 6.3,
    "cli": 6.2,
    "commands": 6.1,
    "workflows": 6.07,
    "lens": 6.05,
    "local_llm": 6.05,
    "huggingface": 6.0,
    "hub": 5.5,
    "live_models": 5.5,
    "shared_prefix": 5.5,
    "encoder": 5.5,
    "report": 5.0,
    "whitebox": 4.2,
    "sae": 4.1,
    "steering": 4.1,
    "interpretation": 4.0,
    "training": 3.0,
    "activations": 3.0,
    "model": 2.0,
    "data": 2.0,
    "distributed": 1.6,
    "gguf_files": 1.7,
    "checksums": 1.6,
    "rundir": 1.5,
    "runtime": 1.5,
    "json_fields": 1.0,
    "errors": 1.0,
}
"""A room (a file or a folder of the package) -> its floor. A room imports from lower floors and from itself."""

REPORT_FLOORS = {
    "server": 7,
    "browser": 6,
    "page": 5,
    "export": 5,
    "contents": 4,
    "figures": 3,
    "sentences": 3,
    "tables": 2,
    "results": 1,
    "terminal": 1,
    "neuron_table": 0,
    "shown_text": 0,
}
"""The same inside `report/`: results are gathered, written as tables, drawn as figures, put together, and shown."""

NO_TORCH = ("interpretation/", "report/", "activations/records.py", "activations/direction_files.py")
"""The record line: records alone can be explained, scored and browsed without torch."""

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager", "types"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 80


def files(root: Path, *folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_name(root: Path, file: Path) -> str:
    """`cratelm/data/text.py` -> `cratelm.data.text`."""
    return ".".join(file.relative_to(root).with_suffix("").parts)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, wherever in the file; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{home}.{alias.name}") for alias in node.names)


def internal_imports(root: Path, file: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of a module of the package."""
    for line, name in imports(parsed(file)):
        if name.split(".")[0] == "cratelm" and name != "cratelm.__version__":
            parts = name.split(".")
            is_module = (root / Path(*parts)).with_suffix(".py").exists() or (root / Path(*parts)).is_dir()
            yield line, name if is_module else ".".join(parts[:-1])


def upward_imports(root: Path) -> list[str]:
    result = []
    for file in files(root, "cratelm"):
        here = module_name(root, file).split(".")[1]
        if here == "__init__":  # the public surface, whose names are imported when they are used
            continue
        if here not in FLOORS:
            result.append(f"{file}: {here} has no floor in tests/test_house.py")
            continue
        for line, name in internal_imports(root, file):
            there = name.split(".")[1] if "." in name else "the public surface"
            if there != here and not FLOORS.get(there, 9.0) < FLOORS[here]:
                result.append(f"{file}:{line}: {here} imports {there}")
    return result


def upward_imports_in_report(root: Path) -> list[str]:
    result = []
    for file in files(root, "cratelm/report"):
        here = ".".join(module_name(root, file).split(".")[2:3])
        if here == "__init__":
            continue
        if here not in REPORT_FLOORS:
            result.append(f"{file}: report.{here} has no floor in tests/test_house.py")
            continue
        for line, name in internal_imports(root, file):
            room, _, inside = name.removeprefix("cratelm.").partition(".")
            there = inside.partition(".")[0]
            if room == "report" and there != here and not REPORT_FLOORS.get(there, 9) < REPORT_FLOORS[here]:
                result.append(f"{file}:{line}: report.{here} imports report.{there}")
    return result


def relative_imports(root: Path) -> list[str]:
    return [
        f"{file}:{line}: {name}"
        for file in files(root, "cratelm")
        for line, name in imports(parsed(file))
        if name.startswith(".")
    ]


def import_circles(root: Path) -> list[str]:
    graph = {
        module_name(root, file): {name for _, name in internal_imports(root, file)} for file in files(root, "cratelm")
    }
    graph.pop("cratelm.__init__", None)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def torch_above_the_record_line(root: Path) -> list[str]:
    result = []
    for file in files(root, "cratelm"):
        if file.relative_to(root / "cratelm").as_posix().startswith(NO_TORCH):
            only_for_types = {
                line
                for node in ast.walk(parsed(file))
                if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
                for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            }
            result += [
                f"{file}:{line}: imports {name}"
                for line, name in imports(parsed(file))
                if name.split(".")[0] == "torch" and line not in only_for_types
            ]
    return result


def future_annotations(root: Path) -> list[str]:
    return [
        f"{file}:{line}: jaxtyping cannot execute postponed annotations"
        for file in files(root, "cratelm", "tests", "benchmarks")
        for line, name in imports(parsed(file))
        if name == "__future__.annotations"
    ]


def long_files(root: Path) -> list[str]:
    sizes = {file: len(file.read_text().splitlines()) for file in files(root, "cratelm", "tests", "benchmarks")}
    return [f"{file}: {size} lines" for file, size in sizes.items() if size > MAX_FILE_LINES]


def long_functions(root: Path) -> list[str]:
    result = []
    for file in files(root, "cratelm", "tests", "benchmarks"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    result.append(f"{file}:{node.lineno}: {node.name} has {size} lines")
    return result


def vague_names(root: Path) -> list[str]:
    return [str(file) for file in files(root, "cratelm") if file.stem.strip("_") in FORBIDDEN_NAMES]


def prints(root: Path) -> list[str]:
    result = []
    for file in files(root, "cratelm"):
        inside = file.relative_to(root / "cratelm")
        if inside.parts[0] not in ("commands", "workflows", "cli.py"):
            for node in ast.walk(parsed(file)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                    result.append(f"{file}:{node.lineno}")
    return result


def filled_package_files(root: Path) -> list[str]:
    """A sub-package whose `__init__.py` is missing or does something."""
    folders = {file.parent for file in files(root, "cratelm")} - {root / "cratelm"}
    inits = [folder / "__init__.py" for folder in sorted(folders)]
    return [str(init) for init in inits if not init.exists() or init.read_text().strip()]


WHOLE_COMMANDS = {"Options", "run"}
"""What a command may use of another command: it may run it. What commands share is in `workflows/`."""


def shared_through_commands(root: Path) -> list[str]:
    """A command that uses another command's helpers."""
    result = []
    for file in files(root, "cratelm/commands"):
        others = set()
        for line, name in imports(parsed(file)):
            if name.startswith("cratelm.commands."):
                others.add(name.split(".")[2])
                if len(name.split(".")) > 3:
                    result.append(f"{file}:{line}: imports {name}; move it to workflows/")
        result += [
            f"{file}:{node.lineno}: uses {ast.unparse(node)}; move it to workflows/"
            for node in ast.walk(parsed(file))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id in others and node.attr not in WHOLE_COMMANDS
        ]  # fmt: skip
    return result


def commands_without_a_verb(root: Path) -> list[str]:
    """A file in `commands/` that is not the module of a verb."""
    modules = {command_module(verb).rpartition(".")[2] for verb in VERBS}
    return [str(file) for file in files(root, "cratelm/commands") if file.stem not in modules | {"__init__"}]


def questions_of_kind(root: Path) -> list[str]:
    """Code outside `model/` and the adapter that asks whether a model is ours or Hugging Face's."""
    result = []
    for file in files(root, "cratelm"):
        inside = file.relative_to(root / "cratelm").as_posix()
        if not inside.startswith("model/") and inside != "activations/causal_model.py":
            for node in ast.walk(parsed(file)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2:
                    kinds = {kind.id for kind in ast.walk(node.args[1]) if isinstance(kind, ast.Name)}
                    if "LanguageModel" in kinds:
                        result.append(f"{file}:{node.lineno}: use activations.causal_model")
    return result


RULES: list[Callable[[Path], list[str]]] = [
    upward_imports,
    upward_imports_in_report,
    relative_imports,
    import_circles,
    torch_above_the_record_line,
    future_annotations,
    long_files,
    long_functions,
    vague_names,
    prints,
    filled_package_files,
    questions_of_kind,
    shared_through_commands,
    commands_without_a_verb,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[Path], list[str]]) -> None:
    result = rule(REPOSITORY)
    assert not result, "\n".join([f"{rule.__name__}:", *result])


VIOLATIONS = [
    (upward_imports, "cratelm/model/crate.py", "def f():\n    from cratelm.data import text"),
    (upward_imports, "cratelm/data/text.py", "from cratelm.model.crate import MSSA"),
    (upward_imports, "cratelm/steering.py", "import cratelm.sae"),
    (upward_imports, "cratelm/activations/taps.py", "from cratelm import load"),
    (upward_imports, "cratelm/nowhere.py", ""),
    (upward_imports_in_report, "cratelm/report/results/gather.py", "from cratelm.report.tables.form import Table"),
    (upward_imports_in_report, "cratelm/report/page/html.py", "from cratelm.report.browser import overview"),
    (upward_imports_in_report, "cratelm/report/plots.py", ""),
    (relative_imports, "cratelm/data/text.py", "from .tokens import write"),
    (import_circles, "cratelm/data/text.py", "from cratelm.data import text"),
    (torch_above_the_record_line, "cratelm/report/figures/sae.py", "def f():\n    import torch.nn"),
    (torch_above_the_record_line, "cratelm/activations/records.py", "from torch import Tensor"),
    (future_annotations, "tests/test_it.py", "from __future__ import annotations"),
    (long_files, "benchmarks/it.py", "x = 1\n" * 351),
    (long_functions, "cratelm/cli.py", "async def f():\n" + "    x = 1\n" * 80),
    (vague_names, "cratelm/data/_utils.py", ""),
    (prints, "cratelm/rundir.py", "def f(): print(1)"),
    (filled_package_files, "cratelm/data/__init__.py", "import os"),
    (filled_package_files, "cratelm/data/text.py", ""),
    (shared_through_commands, "cratelm/commands/dial.py", "def f():\n    from cratelm.commands.report import chosen"),
    (shared_through_commands, "cratelm/commands/demo.py", "from cratelm.commands import train\ntrain.padded(3)"),
    (commands_without_a_verb, "cratelm/commands/opening.py", ""),
    (questions_of_kind, "cratelm/steering/exit.py", "if isinstance(model.inner, str | LanguageModel): pass"),
]


@pytest.mark.parametrize(("rule", "name", "code"), VIOLATIONS)
def test_each_rule_notices_a_violation(rule: Callable[[Path], list[str]], name: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert len(rule(tmp_path)) == 1


ALLOWED = {
    "cratelm/activations/__init__.py": "",
    "cratelm/activations/causal_model.py": "isinstance(model, LanguageModel)",
    "cratelm/__init__.py": "from cratelm.model.crate import MSSA\nx = 1",
    "cratelm/cli.py": "from cratelm import __version__\nfrom cratelm.errors import CrateError\nprint(1)",
    "cratelm/commands/__init__.py": "",
    "cratelm/commands/demo.py": "from cratelm.commands import train\ntrain.run(train.Options())",
    "cratelm/commands/train.py": "def f():\n    from cratelm.training.train import train\n    print(1)",
    "cratelm/report/__init__.py": "",
    "cratelm/report/figures/__init__.py": "",
    "cratelm/report/figures/sae.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    "cratelm/steering.py": "import torch\nfrom cratelm.interpretation import score\n",
    "tests/test_long.py": "def f():\n" + "    x = 1\n" * 79 + "y = 1\n" * 270,
}


def test_what_is_allowed_passes_every_rule(tmp_path: Path) -> None:
    for name, code in ALLOWED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    assert [result for rule in RULES for result in rule(tmp_path)] == []


def test_every_verb_has_a_separate_file() -> None:
    folder = REPOSITORY / "cratelm" / "commands"
    assert {command_module(verb).rpartition(".")[2] for verb in VERBS} <= {file.stem for file in folder.glob("*.py")}
