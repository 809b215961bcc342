"""The command line: the overview, one-line errors, exit codes, and a help text for every flag of every command."""

import dataclasses
import errno
import importlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cratelm
from cratelm import cli
from cratelm.errors import CrateError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Flags of a command that exists only here."""

    steps: int
    """How many steps to take."""
    # A reason that is not a help text.
    arch: str = "crate"
    """Which model."""


@pytest.fixture
def ledger_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Put a function in the place of what `cratelm ledger` does."""

    def install(run: Callable[[Any], None]) -> None:
        module = types.ModuleType("cratelm.commands.ledger", "Write the tables.")
        vars(module).update(Options=Options, run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def test_a_command_gets_its_options_from_the_flags(ledger_runs: Any) -> None:
    got: list[Options] = []
    ledger_runs(got.append)
    assert cli.main(["ledger", "--steps", "7", "--arch", "gpt2"]) == 0
    assert got == [Options(steps=7, arch="gpt2")]


@pytest.mark.parametrize(
    ("typed", "count"),
    [("100k", 100_000), ("8.2M", 8_200_000), ("1_228_800", 1_228_800), ("-3", -3), ("2G", 2 * 10**9)],
)
def test_every_whole_number_is_read_as_people_write_it(typed: str, count: int, ledger_runs: Any) -> None:
    got: list[Options] = []
    ledger_runs(got.append)
    assert cli.main(["ledger", "--steps", typed]) == 0
    assert got == [Options(steps=count)]


@pytest.mark.parametrize("typed", ["many", "1e6", "0.2", "5 M", "all", ""])
def test_text_that_is_not_a_whole_number_is_one_line_that_says_how_to_write_one(
    typed: str, ledger_runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger_runs(print)
    assert cli.main(["ledger", "--steps", typed]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Write one such as 200000, 200k, 8.2M or 1G" in err


def test_tokens_of_a_training_are_counted_with_letters() -> None:
    train, study, demo = (importlib.import_module(f"cratelm.commands.{name}") for name in ("train", "study", "demo"))
    options = cli._parse(train, "train", ["--out", "run", "--tokens", "100k", "--batch-tokens", "65_536"])
    assert (options.training.tokens, options.training.batch_tokens) == (100_000, 65_536)
    arguments = ["--out", "s", "--data", "t", "--collect-tokens", "20k", "--tokens", "2M"]
    options = cli._parse(study, "study", arguments)
    assert (options.collect_tokens, options.training.tokens) == (20_000, 2_000_000)
    assert cli._parse(demo, "demo", ["--tokens", "1.5M"]).tokens == 1_500_000


def test_help_of_a_command_teaches_its_flags(ledger_runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ledger_runs(print)
    with pytest.raises(SystemExit) as stop:
        cli.main(["ledger", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: cratelm ledger" in text or "Write the tables." in text
    assert "How many steps to take." in text
    assert "not a help text" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "many"], "--steps"),
        (["--steps", "1", "--stesp", "2"], "--stesp"),
        ([], "--steps"),
        (["--steps"], "--steps"),
    ],
)
def test_a_wrong_flag_gets_one_line(
    flags: list[str], message: str, ledger_runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger_runs(lambda _: pytest.fail("the command ran"))
    assert cli.main(["ledger", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("Run: cratelm ledger --help\n")
    assert message in err
    assert err.count("\n") == 1
    assert not set(err) & set("│╭╰─")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["generate", "--run", "X"],
            "generate has no flag --run: RUN is written without a flag, as in cratelm generate RUN",
        ),
        (
            ["interpret", "R", "--bugdet-tokens=5"],
            "interpret has no flag --bugdet-tokens (did you mean --budget-tokens",
        ),
        (["train", "--data", "tokens"], "train needs --out PATH"),
    ],
)
def test_a_flag_that_does_not_exist_or_is_missing_is_named(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


NO_NATURAL_NEXT = {"study", "generate", "export", "whitebox", "dial", "circuit", "neurons", "serve", "steer", "ablate"}
ARGUMENTS = {
    "demo": "", "explore": "R", "tokenize": "stdlib --tokenizer bpe:300 --out T", "train": "--data T --out R",
    "evaluate": "R --data T", "import": "F --out R", "collect": "R --data T", "explain": "R", "simulate": "R",
    "score": "R", "interpret": "R", "sae train": "R --data T --layer 1",
    "sae evaluate": "R --data T --sae NAME", "directions": "R", "report": "R",
}  # fmt: skip


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in NO_NATURAL_NEXT | {"ledger"}])
def test_a_command_ends_with_a_next_command_that_can_be_typed(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module(cli.command_module(verb)), "run", lambda _: None)
    assert cli.main([*verb.split(), *ARGUMENTS[verb].split()]) == 0
    _, err = capsys.readouterr()
    line = re.fullmatch(r"next: cratelm (.*)\n", err)
    assert line is not None, err
    split = cli.split_verb(line[1].split())
    assert split is not None
    following, arguments = split
    assert following != verb
    cli._parse(importlib.import_module(cli.command_module(following)), following, arguments)


@pytest.mark.parametrize("flags", ["--dry-run", "--part 1/2"])
def test_a_command_that_did_not_do_all_its_work_names_no_next(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("cratelm.commands.interpret"), "run", lambda _: None)
    assert cli.main(["interpret", "R", *flags.split()]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_one_line_with_exit_code_2(ledger_runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(options: Options) -> None:
        raise CrateError(f"cannot take {options.steps} steps. Run: walk")

    ledger_runs(run)
    assert cli.main(["ledger", "--steps", "3"]) == 2
    assert capsys.readouterr() == ("", "error: cannot take 3 steps. Run: walk\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenize", "stdlib", "--tokenizer", "bpe:300", "--out", "FILE/x"],
        ["demo", "--out", "FILE"],
        ["report", "FILE"],
        ["report", "FILE/x"],
    ],
)
def test_a_file_where_a_folder_must_be_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    assert cli.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: FILE\S*: (File exists|Not a directory)\. Give another path", last)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
    assert (tmp_path / "FILE").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG])
def test_a_path_that_the_system_refuses_is_one_line(
    code: int, ledger_runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Options) -> None:
        raise OSError(code, os.strerror(code), "some/where")

    ledger_runs(run)
    assert cli.main(["ledger", "--steps", "3"]) == 2
    assert capsys.readouterr() == ("", f"error: some/where: {os.strerror(code)}. Give another path\n")


def test_a_system_error_about_no_path_keeps_its_traceback(ledger_runs: Any) -> None:
    def run(_: Options) -> None:
        raise OSError(errno.EIO, "broken")

    ledger_runs(run)
    with pytest.raises(OSError, match="broken"):
        cli.main(["ledger", "--steps", "3"])


def test_a_programming_error_keeps_its_traceback(ledger_runs: Any) -> None:
    def run(options: Options) -> None:
        assert options.steps > 3, "programmer"

    ledger_runs(run)
    with pytest.raises(AssertionError, match="programmer"):
        cli.main(["ledger", "--steps", "3"])


def test_ctrl_c_says_how_to_resume(ledger_runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Options) -> None:
        raise KeyboardInterrupt

    ledger_runs(run)
    assert cli.main(["ledger", "--steps", "3"]) == 130
    assert capsys.readouterr().err.strip() == "stopped. Run the same command again to resume."


@pytest.mark.parametrize(("typed", "meant"), [("tokenise", "tokenize"), ("scores", "score"), ("simulat", "simulate")])
def test_an_unknown_command_names_the_closest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"'{typed}'" in err
    assert meant in err


def test_an_unknown_command_like_no_other_names_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyzzy"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'xyzzy'; run: cratelm --help\n"


@pytest.mark.parametrize("columns", [1, 40, 57, 80, 300])
def test_the_overview_fits_the_terminal_and_names_every_command(columns: int) -> None:
    lines = cli.commands_overview(columns).splitlines()
    assert max(map(len, lines)) <= max(columns, 40)
    shown = [re.split(" {2,}", line.strip())[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert [verb for verb in shown if not verb.startswith("cratelm ")] == list(cli.VERBS)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_no_command_shows_the_overview(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "Start with" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cratelm {cratelm.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cratelm.cli import main; main(['--help']);"
        "print(sorted({'torch', 'numpy', 'tyro', 'rich', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"


def test_options_of_every_command_are_read_without_torch() -> None:
    modules = [cli.command_module(verb) for verb in cli.VERBS]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
