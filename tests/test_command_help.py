"""The help of every command: it fits the terminal, says nothing empty, and explains every flag."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from typing import Annotated, Any, get_args, get_origin

import pytest

from cratelm import cli


def help_text(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb.split(), "--no-such-flag", flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.VERBS)
@pytest.mark.parametrize("columns", [20, 60, 80, 90])
def test_the_help_of_every_command_fits_the_terminal_and_keeps_its_examples(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    docstring = importlib.import_module(cli.command_module(verb)).__doc__ or ""
    text, _, flags = help_text(verb, "--help-all", capsys).partition("\nusage: cratelm ")
    assert flags.count("\n") > 3
    assert text.split() == docstring.split()
    assert text.strip().count("\n\n") == docstring.strip().count("\n\n")
    assert "\n\n\n" not in text + flags
    examples = [line for line in docstring.splitlines() if line.startswith("  ")]
    assert [line for line in text.splitlines() if line.startswith("  ")] == examples
    assert max(len(line) for line in text.splitlines() if line not in examples) <= max(columns, 40)
    longest_word = max(len(word) for word in flags.split())
    assert max(map(len, flags.splitlines())) <= max(columns, 40, longest_word + 6)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_every_command_says_nothing_empty(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(verb, "--help-all", capsys)
    assert not re.search(r"\{None|None\}|default: (?:None|False)?\)| --no-(?!open)|\(\)", " ".join(text.split()))
    assert not re.search(r"default: \d{6}", text)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_basic_help_is_a_part_of_the_whole_and_fits_two_screens(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    basic, everything = help_text(verb, "--help", capsys), help_text(verb, "--help-all", capsys)
    options = importlib.import_module(cli.command_module(verb)).Options
    shown, known = (set(re.findall(r"^  --([\w-]+)", text, flags=re.MULTILINE)) for text in (basic, everything))
    if not hasattr(options, "BASIC"):
        assert basic == everything
        return
    assert {name.replace("_", "-") for name in options.BASIC} <= shown < known
    assert f"{len(known) - len(shown)} more options and an explanation: cratelm {verb} --help-all" in basic
    assert basic.count("\n") <= 48


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_command_explains_itself_and_every_flag(verb: str) -> None:
    module = importlib.import_module(cli.command_module(verb))
    assert module.__doc__, f"{verb} has no docstring"
    assert callable(module.run)
    assert _fields_without_help(module.Options) == []


def test_a_flag_without_help_is_noticed() -> None:
    assert _fields_without_help(_Undocumented) == ["_Undocumented.size", "_Silent.deep"]


@dataclasses.dataclass(frozen=True)
class _Silent:
    deep: int = 1


@dataclasses.dataclass(frozen=True)
class _Undocumented:
    size: int
    inner: _Silent | None = None
    """Has a help text."""


def _fields_without_help(options: type) -> list[str]:
    """The fields of a dataclass, and of the dataclasses inside it, that no docstring follows."""
    missing, documented = [], set()
    for owner in options.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str())):
                    documented.add(name)
    missing = [
        f"{options.__name__}.{field.name}"
        for field in dataclasses.fields(options)
        if field.name not in documented and not any(getattr(mark, "help", None) for mark in get_args(field.type)[1:])
    ]
    for field in dataclasses.fields(options):
        for inner in _classes(field.type):
            missing += _fields_without_help(inner)
    return missing


def _classes(annotation: Any) -> list[type]:
    """The dataclasses that an annotation names, inside unions and `Annotated` too."""
    if get_origin(annotation) is Annotated:
        return _classes(get_args(annotation)[0])
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return [annotation]
    return [result for part in get_args(annotation) for result in _classes(part)]
