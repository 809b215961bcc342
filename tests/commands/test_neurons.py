"""`cratelm neurons` and the table behind it: right numbers, readable at any width, with and without colours."""

import csv
import io
import json
import operator
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import CONSTANT, DEAD, FIRST_TOKEN_NEURON, RARE, make_run
from rich.cells import cell_len

from cratelm.activations.records import read_records
from cratelm.cli import main
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.report.neuron_table import neurons_csv, open_table
from cratelm.report.shown_text import visible
from cratelm.report.terminal import HEAT
from cratelm.rundir import write_json

ANSI = re.compile(r"\x1b\[[0-9;]*m")
Show = Callable[..., str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with records and nothing else, and the same run scored."""
    folder = tmp_path_factory.mktemp("runs")
    bare = make_run(folder / "bare" / "crate-2l", np.random.default_rng(), neurons=14)
    shutil.copytree(bare, folder / "scored" / "crate-2l")
    assert main(["interpret", str(folder / "scored" / "crate-2l")]) == 0
    return folder


@pytest.fixture
def bare(runs: Path, tmp_path: Path) -> Path:
    """A run with records and nothing else."""
    return shutil.copytree(runs / "bare" / "crate-2l", tmp_path / "crate-2l")


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A run that is scored."""
    return shutil.copytree(runs / "scored" / "crate-2l", tmp_path / "crate-2l")


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    """What `cratelm neurons` prints at this number of columns."""

    def listing(run: Path, *options: str, columns: int = 120) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        assert main(["neurons", str(run), *options]) == 0
        return capsys.readouterr().out

    return listing


def strongest_by_hand(run: Path, layer: int, index: int) -> list[int]:
    """Ids of the tokens with the highest activations of a neuron, each once."""
    best: dict[int, float] = {}
    for (width, _, kind), excerpts in read_records(run, layer)[index].excerpts.items():
        for excerpt in excerpts if (width, kind) == (64, "top") else ():
            for token, activation in zip(excerpt.tokens.tolist(), excerpt.activations.tolist(), strict=True):
                if activation > 0:
                    best[token] = max(best.get(token, 0), activation)
    return sorted(best, key=lambda token: -best[token])[:5]


def test_the_strongest_tokens_are_those_of_a_search_by_hand(bare: Path) -> None:
    table = open_table(bare, 1)
    chosen = np.array([9, DEAD, 5, FIRST_TOKEN_NEURON])
    expected = [[table.strings[token] for token in strongest_by_hand(bare, 1, int(index))] for index in chosen]
    assert table.strongest(chosen) == expected
    assert expected[1] == []


def test_before_scoring_the_table_says_what_to_run(bare: Path, show: Show) -> None:
    text = show(bare)
    assert "layer 0: 14 neurons (layers with records: 0, 1)" in text
    assert f"no neuron is scored yet. Run: cratelm interpret {bare}\n" in text
    assert "explanation" not in text
    assert [line.split()[0] for line in text.splitlines() if line[:6].strip().isdigit()] == [str(i) for i in range(14)]
    assert "dead" in text.splitlines()[3]
    assert "not scored" in text


def test_after_scoring_it_shows_scores_reasons_and_explanations(run: Path, show: Show) -> None:
    lines = {line.split()[0]: line for line in show(run, "--layer", "1", columns=200).splitlines() if line.strip()}
    scores = Store.open(run).read_scores(1, "top-and-random")
    density = read_records(run, 1).statistics["density"]
    for index in range(FIRST_TOKEN_NEURON, 14):
        assert f"{100 * scores.correlation[index]:.1f}" in lines[str(index)]
        assert f"{100 * density[index]:.3g}" in lines[str(index)]
        assert "fires on" in lines[str(index)]
    for index, status in ((DEAD, "dead"), (RARE, "too rare"), (CONSTANT, "constant a")):
        assert status in lines[str(index)]


def test_another_protocol_and_outdated_scores_are_reported(run: Path, show: Show) -> None:
    assert "scores and explanations: anthropic" in show(run, "--protocol", "anthropic")
    path = run / "records" / "fixed" / "records.json"
    write_json(path, json.loads(path.read_text()) | {"model_hash": "another"})
    text = show(run)
    assert "come from other records" in text
    assert "Run: cratelm interpret" in text


def test_a_missing_file_next_to_whole_ones_is_a_line(run: Path, show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "records" / "fixed" / "records.json").unlink()
    assert "records.json is not there. Run: cratelm collect" in " ".join(show(run, "--layer", "0").split())
    layer = run / "records" / "fixed" / "neurons" / "layer_00.safetensors"
    layer.unlink()
    layer.symlink_to(run / "nowhere")
    capsys.readouterr()
    assert main(["neurons", str(run), "--layer", "0"]) == 2
    assert "error: --layer must be one with fixed records in" in (line := capsys.readouterr().err)
    assert line.endswith("(1), got 0\n")


def test_sorting_puts_neurons_without_a_value_last(run: Path) -> None:
    table = open_table(run, 0)
    scores = Store.open(run).read_scores(0, "top-and-random").correlation
    scored = np.flatnonzero(~np.isnan(scores))
    for reverse in (False, True):
        order = table.choose((), "score", reverse=reverse).tolist()
        np.testing.assert_array_equal(scores[order[: len(scored)]], sorted(scores[scored], reverse=not reverse))
        assert set(order[len(scored) :]) == set(np.flatnonzero(np.isnan(scores)).tolist())
    assert table.choose((), "neuron", reverse=True).tolist() == list(range(13, -1, -1))
    density = read_records(run, 0).statistics["density"]
    assert density[table.choose((), "density")[0]] == density.max()


@pytest.mark.parametrize(
    "text", ["score>50", "density < 10", "max>=3", "neuron<=5", "neuron = 7", "score<1e9", "min<0"]
)
def test_a_filter_keeps_what_a_loop_keeps(text: str, run: Path) -> None:
    table = open_table(run, 1)
    match = re.fullmatch(r"(\w+)\s*([<>=]+)\s*(.+)", text)
    assert match
    name, comparison, limit = match.groups()
    holds = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le, "=": operator.eq}[comparison]
    expected = [index for index, value in enumerate(table.column(name).tolist()) if holds(value, float(limit))]
    assert table.choose((text,), "neuron").tolist() == expected


def test_filters_by_text_and_together(run: Path) -> None:
    table = open_table(run, 1)
    assert table.choose(("status=dead",), "neuron").tolist() == [DEAD]
    token = table.strongest(np.array([7]))[0][0]
    with_token = table.choose((f"token={token}",), "neuron").tolist() if token.strip() else [7]
    assert 7 in with_token
    assert all(token.strip() in " ".join(table.strongest(np.array([i]))[0]) for i in with_token)
    matching = [i for i, explanation in table.explanations.items() if "FIRES ON" in explanation.upper()]
    assert table.choose(("explanation=FIRES on", "score>20"), "neuron").tolist() == [
        i for i in matching if table.column("score")[i] > 20
    ]


@pytest.mark.parametrize("text", ["foo", "score>", "score>high", "length=3", "status<dead", "score=nan"])
def test_a_filter_that_says_nothing_is_explained(text: str, run: Path) -> None:
    with pytest.raises(CrateError, match="must be NAME<NUMBER, NAME>NUMBER"):
        open_table(run, 0).choose((text,), "neuron")


@pytest.mark.parametrize("columns", [40, 59, 60, 80, 100, 200])
def test_the_list_and_a_neuron_fit_the_terminal(columns: int, run: Path, show: Show) -> None:
    for options in (("--layer", "1"), ("--neuron", "6", "--excerpts", "2")):
        text = show(run, *options, columns=columns)
        lines = [line for line in text.splitlines() if "Run: " not in line]
        assert max(map(cell_len, lines)) <= columns
        assert "6" in text
    listed = show(run, columns=columns).splitlines()
    head = next(line for line in listed if line.startswith("neuron"))
    shown = [name for name in ("density %", "max", "score", "status", "strongest", "explanation") if name in head]
    assert len(shown) == {40: 2, 59: 2, 60: 4, 80: 5, 100: 6, 200: 6}[columns]


def test_limit_and_filters_are_counted(run: Path, show: Show) -> None:
    assert "3 of 14 neurons; --limit 0 shows all" in show(run, "--limit", "3")
    assert "14 of 14 neurons. Show" in show(run, "--limit", "0")
    assert "0 of 0 neurons that pass score>5 and score<5. Show" in show(run, "--filter", "score>5", "score<5")


def test_a_neuron_is_shown_with_its_numbers_and_excerpts(run: Path, show: Show) -> None:
    text, record = show(run, "--layer", "1", "--neuron", "6", "--excerpts", "0", columns=200), read_records(run, 1)[6]
    assert "layer 1, neuron 6 (of 0 to 13)" in text
    assert f"density {100 * record.statistics['density']:.3g} %, max {record.statistics['maximum']:.3g}" in text
    score = Store.open(run).read_scores(1, "anthropic").correlation[6]
    assert f"anthropic: {100 * score:z.1f} points over" in text
    wide = {key: excerpts for key, excerpts in record.excerpts.items() if key[0] == 64}
    assert text.count("  document ") == sum(map(len, wide.values()))
    assert "top excerpts for explaining: 20 of 20, 64 tokens each" in text
    joined = re.sub(r"[«»\n]", "", text)
    strings = open_table(run, 1).strings
    for excerpt in wide[64, "score", "top"]:
        whole = "".join(visible(strings[token]) for token in excerpt.tokens.tolist())
        assert whole.replace(" ", "") in joined.replace(" ", "")


def test_without_colours_strong_tokens_are_marked(run: Path, show: Show) -> None:
    text, records = show(run, "--neuron", "8", "--excerpts", "0", columns=200), read_records(run, 0)
    assert not ANSI.search(text)
    strings, record = open_table(run, 0).strings, records[8]
    strong = [
        visible(strings[token])
        for (width, _, _), excerpts in record.excerpts.items() for one in excerpts if width == 64
        for token, value in zip(one.tokens.tolist(), one.activations.tolist(), strict=True)
        if value >= 0.3 * record.statistics["maximum"]
    ]  # fmt: skip
    marked = re.findall("«([^»]*)»", text.split("largest activation", 1)[1].replace("\n", ""))
    assert sorted(one.strip() for one in marked) == sorted(one.strip() for one in strong)


def test_on_a_terminal_tokens_are_coloured_and_no_color_marks_them(
    run: Path, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = show(run, "--neuron", "8")
    strongest = tuple(int(HEAT[-1][i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{strongest[0]};{strongest[1]};{strongest[2]}m" in text
    assert "38;2;0;0;0" in text
    assert "«" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    plain = show(run, "--neuron", "8")
    assert "«" in plain
    assert "48;2" not in plain


def test_letters_that_steer_a_terminal_are_shown_as_codes() -> None:
    assert visible("a\n\tb\r\x1b[31m\u202e c\u00a0é文") == "a↵⇥b␍U+001B[31mU+202E c\u00a0é文"


def test_layers_neurons_modes_and_runs_that_are_not_there_are_errors_with_the_range(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        ([str(run), "--layer", "2"], f"--layer must be one with fixed records in {run} (0, 1), got 2"),
        ([str(run), "--neuron", "14"], "layer 0 has neurons 0 to 13, not 14"),
        ([str(run), "--neuron", "-1"], "layer 0 has neurons 0 to 13, not -1"),
        ([str(run), "--mode", "compat"], "must have compat records, got none. Hint: cratelm collect"),
        ([str(run), "--protocol", "best"], "the protocol must be one of"),
        ([str(run), "--neuron", "3", "--width", "9"], "no excerpts of 9 tokens. Use --width 8 or 64"),
        ([str(run / "records")], "must have fixed records, got none. Hint: cratelm collect"),
        ([str(run / "nowhere")], "there is no run directory"),
    ]
    for arguments, message in cases:
        assert main(["neurons", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_csv_table_holds_every_neuron_unrounded(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--format", "csv", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["layer_00.csv", "layer_01.csv"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "layer_01.csv").read_text())))
    records, store, table = read_records(run, 1), Store.open(run), open_table(run, 1)
    assert [row["neuron"] for row in rows] == [str(index) for index in range(14)]
    for name, values in records.statistics.items():
        np.testing.assert_array_equal(np.array([float(row[name]) for row in rows], np.float32), values)
    for name in ("top-and-random", "random-only", "anthropic"):
        scores, texts = store.read_scores(1, name), store.read_explanations(1, name)
        for index, row in enumerate(rows):
            written = row[f"{name} correlation"]
            assert (float(written) if written else None) == (
                None if np.isnan(scores.correlation[index]) else scores.correlation[index]
            )
            assert row[f"{name} status"] == (scores.reason[index] or "scored")
            assert row[f"{name} explanation"] == texts.get(index, "")
    assert [json.loads(row["strongest_tokens"]) for row in rows] == table.strongest(np.arange(14))


def test_the_csv_table_works_before_scoring(bare: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(neurons_csv(open_table(bare, 0)))))
    assert len(rows) == 14
    assert not [name for name in rows[0] if "correlation" in name]
