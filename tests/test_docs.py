"""The documentation is executed: its Python runs on a small run, its commands parse, its links and paths exist."""

import importlib
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from fixtures.tiny import make_tokens, short_training, tiny_config, train_quietly
from test_house import FLOORS

import cratelm
from cratelm import cli
from cratelm.commands import demo, tokenize, train

PAGES = (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The cratelm commands of a page's shell blocks, as lists of arguments."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words and words[0].removeprefix(".venv/bin/") == "cratelm"]


def make_demo(folder: Path, rng: np.random.Generator) -> None:
    """What the examples use of a finished demo: tokens and one run, collected and interpreted."""
    folder.mkdir(parents=True)
    data = make_tokens(folder / "tokens", rng, documents=300)
    training = short_training(context=80, batch_tokens=160, tokens=960)
    run = folder / "crate-2l"
    train_quietly(training, tiny_config(vocab_size=data.vocab_size, context_length=80), data, run)
    assert cli.main(["collect", str(run), "--data", str(data.path), "--device", "cpu"]) == 0
    assert cli.main(["interpret", str(run)]) == 0


def test_the_examples_of_the_readme_and_of_the_python_page_run(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_demo(tmp_path / "runs" / "demo", rng)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    readme: dict[str, Any] = {}
    for block in blocks(REPOSITORY / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), readme)
    assert readme["logits"].shape == (*readme["tokens"].shape, readme["model"].config.vocab_size)
    assert capsys.readouterr().out.startswith(f"neuron {readme['neuron']}: ")
    result: dict[str, Any] = {}
    for number, block in enumerate(blocks(REPOSITORY / "docs" / "python.md", "python")):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), result)
    model, tokens, length = result["model"], result["tokens"], result["tokens"].shape[1]
    assert result["logits"].shape == (1, length, model.config.vocab_size)
    assert result["longer"].shape == result["steered"].shape == (1, length + 20)
    assert torch.equal(result["longer"][:, :length], tokens)
    assert {tap: tuple(code.shape) for tap, code in result["codes"].items()} == {
        f"blocks.{layer}.ista.neurons": (1, length, 64) for layer in (0, 1)
    }
    correlation = result["scores"].correlation
    assert correlation[result["best"]].tolist() == sorted(correlation[~np.isnan(correlation)], reverse=True)[:5]
    printed = capsys.readouterr().out
    assert result["explanation"].text in printed
    assert "no fixed records of layer 99" in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documentation_is_one_that_runs(page: Path) -> None:
    for words in commands(page):
        if words == ["--help"]:
            continue
        result = cli.split_verb(words)
        assert result is not None, f"cratelm {' '.join(words)}"
        verb, rest = result
        module = importlib.import_module(cli.command_module(verb))
        options = cli._parse(module, verb, rest)
        assert isinstance(options, module.Options), f"cratelm {verb} {' '.join(rest)}"


def test_the_demo_page_trains_and_tokenizes_by_hand_as_the_demo_does() -> None:
    by_hand = {words[0]: words[1:] for words in reversed(commands(REPOSITORY / "docs" / "demo.md"))}
    options = cli._parse(train, "train", by_hand["train"])
    assert options.training == demo.training(demo.Options().tokens)
    asked = cli._parse(tokenize, "tokenize", by_hand["tokenize"])
    assert (asked.sources, asked.tokenizer, asked.held_out) == (demo.SOURCE, demo.TOKENIZER, demo.HELD_OUT)


def recipe(tmp_path: Path, name: str) -> list[list[str]]:
    """The commands that a recipe gives, as lists of arguments: a stand-in for cratelm only writes them down."""
    stand_in = tmp_path / "bin" / "cratelm"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/said\n')
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    subprocess.run(["bash", REPOSITORY / "recipes" / name, "runs/demo"], check=True, env=os.environ | {"PATH": path})
    return [shlex.split(line) for line in (tmp_path / "said").read_text().splitlines()]


def test_the_recipe_of_the_demo_does_what_the_demo_does(tmp_path: Path) -> None:
    result: dict[str, list[Any]] = {}
    for verb, *rest in recipe(tmp_path, "demo.sh"):
        module = importlib.import_module(cli.command_module(verb))
        result.setdefault(verb, []).append(cli._parse(module, verb, rest))
    out = demo.Options().out
    models = tuple(out / f"{arch}-2l" for arch in demo.COMPARED_ARCHITECTURES)
    controls = tuple(one.with_name(f"{one.name}-random") for one in models)
    (tokens,) = result["tokenize"]
    assert (tokens.sources, tokens.tokenizer, tokens.held_out) == (demo.SOURCE, demo.TOKENIZER, demo.HELD_OUT)
    trained = [one for one in result["train"] if one.control_of is None]
    assert [(one.out, one.arch, one.size) for one in trained] == [
        (model, arch, "2l") for model, arch in zip(models, demo.COMPARED_ARCHITECTURES, strict=True)
    ]
    assert all(one.training == demo.training(demo.Options().tokens) for one in trained)
    written = [(one.control_of, one.out) for one in result["train"] if one.control_of is not None]
    assert written == list(zip(models, controls, strict=True))
    for verb in ("evaluate", "collect"):
        assert [(one.runs, one.data) for one in result[verb]] == [(models + controls, out / "tokens")]
    assert [(one.runs, one.controls) for one in result["interpret"]] == [(models, ("shuffled",)), (controls, ())]
    assert [(one.runs, one.out) for one in result["report"]] == [(models + controls, out / "report")]


def test_the_readmes_own_text_is_trained_on_at_a_laptops_size() -> None:
    by_verb: dict[str, list[Any]] = {}
    for verb, *rest in commands(REPOSITORY / "README.md"):
        if verb in ("tokenize", "train"):
            options = cli._parse(importlib.import_module(cli.command_module(verb)), verb, rest)
            by_verb.setdefault(verb, []).append(options)
    (tokens,) = by_verb["tokenize"]
    assert (tokens.tokenizer, tokens.held_out) == (demo.TOKENIZER, demo.HELD_OUT)
    assert [one.arch for one in by_verb["train"]] == list(demo.COMPARED_ARCHITECTURES)
    own, small = (by_verb["train"][0].training, demo.training(demo.Options().tokens))
    assert own == replace(small, evaluate_tokens=own.evaluate_tokens)
    assert by_verb["train"][1].training == own


def test_a_command_with_a_flag_that_is_not_there_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Try\n\n```sh\nmake demo\ncratelm evaluate runs/x --data t \\\n    --no-such-flag 3  # a note\n```\n"
    )
    assert commands(page) == [["evaluate", "runs/x", "--data", "t", "--no-such-flag", "3"]]
    with pytest.raises(cratelm.CrateError, match="no-such-flag"):
        test_every_command_in_the_documentation_is_one_that_runs(page)


def test_the_index_links_to_every_page() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    pages = sorted(page.name for page in (REPOSITORY / "docs").glob("*.md") if page.name != "index.md")
    assert [name for name in pages if f"({name})" not in index] == []


def test_the_import_directions_in_contributing_are_those_that_the_house_test_checks() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (chain,) = re.findall(r"^ +commands, cli > .*(?:\n +> .*)*", text, re.MULTILINE)
    levels = [re.findall(r"\w+", level) for level in chain.split(">")]
    assert sorted(name for level in levels for name in level) == sorted(FLOORS.keys() - {"__main__"})
    for upper, lower in zip(levels, levels[1:], strict=False):
        assert min(FLOORS[name] for name in upper) > max(FLOORS[name] for name in lower), f"{upper} > {lower}"


def test_the_python_page_names_the_whole_public_surface() -> None:
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in cratelm.__all__ if f"`{name}`" not in text and f"cratelm.{name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_that_an_example_imports_from_the_package_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for module, names in re.findall(r"^from (cratelm[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            try:
                imported = importlib.import_module(module)
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("cratelm"):
                    raise
                pytest.skip(f"{error.name} is not installed (make test-all installs it)")
            for name in names.split(", "):
                assert hasattr(imported, name), f"{page.name}: {module} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_path_in_the_documentation_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:cratelm|tests|docs|recipes|benchmarks)/[\w./-]+)`", prose)
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
