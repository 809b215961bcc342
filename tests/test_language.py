"""Plain technical English: phrases that are not used in what people read, and one module for each public name."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
THIS_FILE = "tests/test_language.py"

PHRASES = {
    r"(?<!there )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|fewer\b|better\b|worse\b|other\b)": "is not a",
    r"\bso many\b": "that many, N",
    r"\banew\b": "again, re-run",
    r"\bwho(?:m)?ever\b": "anyone who, or name the person",
    r"\b(?:tells?|told|telling)\b(?! apart\b)": "report, record, know, say",
    r"\bof (?:its|their) own\b": "separate",
    r"\b(?:no|every)body\b": "no one, everyone, or name the person",
    r"\bbeside\b": "next to, alongside",
    r"\b(?:go|goes|going|went) on\b": "resume, continue",
    r"\b(?:lay|lays|laid|lying) along\b": "align",
    r"\basked alike\b": "deduplicated",
    r"\bforet(?:ell|ells|old)\b": "estimate, predict",
    r"\bturn(?:s|ed|ing)? (?:the |a |any |some |all )?neurons?\b|\bneurons? (?:is |are |was |were )?turned\b": "steer",
    r"\b(?:write|writes|writing) on\b": "continue, generate",
}  # fmt: skip
"""Pattern -> what to write in its place."""

SWEPT = tuple((REPOSITORY / "tests" / "swept.txt").read_text(encoding="utf-8").split())
"""Folders and files that follow the list. Add yours to `swept.txt`; in the end this is the whole repository."""

SUFFIXES = (".py", ".md", ".js", ".html", ".css", ".toml")
EVERYWHERE_PUBLIC = {"Options", "run"}
"""Names that every command defines."""

SHARED_NAMES = set((REPOSITORY / "tests" / "shared_names.txt").read_text(encoding="utf-8").split())
"""Public names that two modules define today. Shorten `shared_names.txt`; it must not grow."""


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of what a person reads in a file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(node.value.split())
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def unwanted_phrases(file: Path) -> list[str]:
    """Where a file has a phrase of the list, and what to write in its place."""
    return [
        f"{file}:{line}: {match[0].strip()!r} in {text.strip()[:100]!r}: write {better}"
        for line, text in prose(file)
        for pattern, better in PHRASES.items()
        if (match := re.search(pattern, text, re.IGNORECASE))
    ]


def swept_files() -> list[Path]:
    files = []
    for name in SWEPT:
        path = REPOSITORY / name
        files += [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in SUFFIXES]
    return sorted({file for file in files if file != REPOSITORY / THIS_FILE})


def test_what_people_read_is_plain_english() -> None:
    result = [line for file in swept_files() for line in unwanted_phrases(file)]
    assert not result, "\n".join(["", *result])


@pytest.mark.parametrize(
    "text",
    [
        "A dialog is no form.", "Keep so many rows.", "It is read anew.", "Whoever asks waits.", "It tells the reader.",
        "It was told twice.", "a file of its own", "Nobody asks.", "They stand beside it.", "Run it to go on.",
        "laid along the text", "prompts asked alike", "the memory foretold", "Turn neurons while it writes.",
        "a neuron is turned", "It writes on.",
    ],
)  # fmt: skip
def test_each_phrase_is_noticed_in_comments_docstrings_messages_and_pages(text: str, tmp_path: Path) -> None:
    for name, content in (
        ("a.py", f"# {text}\n"), ("b.py", f'"""{text}"""\n'), ("c.py", f'print(f"{{1}} {text}")\n'), ("d.md", text)
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        assert len(unwanted_phrases(tmp_path / name)) == 1, content


@pytest.mark.parametrize(
    "text", ["There is no such run.", "It is no longer there.", "They are hard to tell apart.", "besides the loss"]
)
def test_plain_english_passes(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(text)
    assert unwanted_phrases(tmp_path / "a.md") == []


@cache
def public_names() -> dict[str, list[str]]:
    """Public name -> the modules that define it."""
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for file in sorted((REPOSITORY / "cratelm").rglob("*.py")):
        names = set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Assign(targets=targets):
                    names |= {target.id for target in targets if isinstance(target, ast.Name)}
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(name)
        for name in names:
            if not name.startswith("_"):
                modules[name].append(file.relative_to(REPOSITORY).as_posix())
    return modules


def test_a_public_name_is_defined_in_one_module() -> None:
    shared = {name: modules for name, modules in public_names().items() if len(modules) > 1}
    new = {name: modules for name, modules in shared.items() if name not in EVERYWHERE_PUBLIC | SHARED_NAMES}
    assert not new, "\n".join(["", *(f"{name}: {', '.join(modules)}" for name, modules in new.items())])
