"""The stages on a whole run: against a slow reference, one after the other, broken off, and with mistakes."""

import signal
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import CONSTANT, DEAD, FIRST_TOKEN_NEURON, NOISE, RARE, make_run

from cratelm.activations.records import Excerpt, Mode, NeuronRecord, read_records
from cratelm.cli import main
from cratelm.interpretation.explainers.explanation import unexplained
from cratelm.interpretation.lookup import explain, simulate
from cratelm.interpretation.protocols import PROTOCOLS, Draw, protocol
from cratelm.interpretation.stages import pipeline
from cratelm.interpretation.store.database import Store


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "crate-2l", rng)


def contents(run: Path) -> list[str]:
    """Everything in the store but where and when it was made."""
    connection = sqlite3.connect(Store.open(run).path)
    tables = ("sets", "explanations", "simulations", "scores", "failures")
    rows = [repr(row) for table in tables for row in connection.execute(f"SELECT * FROM {table}")]
    rows += [repr(row) for row in connection.execute("SELECT set_id, stage, records FROM stages")]
    connection.close()
    return rows


def drawn(record: NeuronRecord, draws: tuple[Draw, ...], split: str) -> list[Excerpt]:
    """Whole excerpts of one neuron, pick by pick."""
    return [record.excerpts[one.width, split, one.kind][pick] for one in draws for pick in one.picks]


@pytest.mark.parametrize("mode", ["fixed", "compat"])
@pytest.mark.parametrize("name", ["top-and-random", "random-only"])
def test_scores_equal_a_slow_reference(name: str, mode: Mode, tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path, rng, layers=1, mode=mode)
    assert main(["interpret", str(run), "--protocol", name, "--mode", mode]) == 0
    scores = Store.open(run).read_scores(0, name, mode=mode)
    records, asked = read_records(run, 0, mode=mode), protocol(name, mode)
    explain, score = ("explain", "score") if mode == "fixed" else ("all", "all")
    for index in range(NOISE, records.num_neurons):
        table = defaultdict(list)
        for excerpt in drawn(records[index], asked.explain, explain):
            for token, activation in zip(excerpt.tokens, excerpt.activations, strict=True):
                table[token].append(activation)
        tested = drawn(records[index], asked.score, score)
        tokens = np.concatenate([excerpt.tokens for excerpt in tested])
        activations = np.concatenate([excerpt.activations for excerpt in tested])
        simulated = [np.mean(table[token]) if token in table else 0 for token in tokens]
        if np.ptp(activations) == 0 or np.ptp(simulated) == 0:
            assert np.isnan(scores.correlation[index])
            continue
        expected = np.corrcoef(activations.astype(np.float64), simulated)[0, 1]
        assert scores.correlation[index] == pytest.approx(expected, abs=1e-6)
        assert (scores.tokens[index], scores.excerpts[index]) == (len(tokens), len(tested))


def test_planted_neurons_get_the_scores_they_deserve(run: Path) -> None:
    assert main(["interpret", str(run), "--controls", "shuffled"]) == 0
    store = Store.open(run)
    for name in PROTOCOLS:
        scores, shuffled = (store.read_scores(1, name, control=control) for control in ("", "shuffled"))
        planted = slice(FIRST_TOKEN_NEURON, None)
        assert scores.reason[DEAD] == "dead"
        assert scores.reason[RARE] == "too rare"
        assert scores.reason[CONSTANT] == "constant activations"
        assert np.nanmean(scores.correlation[planted]) > 0.8
        assert np.nanmean(shuffled.correlation[planted]) < 0.4
        assert scores.correlation[NOISE] < 0.5
        assert shuffled.reason[DEAD] == "dead"


@pytest.mark.parametrize(("name", "part", "needed"), [
    ("top-and-random", "64.explain", 5), ("top-and-random", "64.score", 5), ("random-only", "64.explain", 5),
    ("anthropic", "8.explain", 15), ("anthropic", "8.score", 20),
])  # fmt: skip
def test_a_neuron_that_fires_in_too_few_documents_of_either_half_is_too_rare(
    name: str, part: str, needed: int, run: Path
) -> None:
    records = read_records(run, 0)
    activations = records.arrays[f"{part}.top.activation"].copy()
    activations[5, needed:], activations[6, needed - 1 :] = 0, 0
    changed = replace(records, arrays={**records.arrays, f"{part}.top.activation": activations})
    assert unexplained(changed, protocol(name))[5:7] == ("", "too rare")


def test_compat_gives_no_reason_but_the_released_ones(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path, rng, layers=1, mode="compat")
    assert main(["interpret", str(run), "--mode", "compat"]) == 0
    for name in PROTOCOLS:
        scores = Store.open(run).read_scores(0, name, mode="compat")
        assert set(scores.reason) <= {"", "constant activations", "constant simulation"}
        assert scores.reason[DEAD] == "constant activations"


def test_the_stages_one_by_one_give_what_interpret_gives(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture
) -> None:
    state = rng.bit_generator.state
    together = make_run(tmp_path / "a" / "run", rng)
    rng.bit_generator.state = state
    apart = make_run(tmp_path / "b" / "run", rng)
    assert main(["interpret", str(together), "--controls", "shuffled"]) == 0
    table = capsys.readouterr().out
    assert main(["explain", str(apart)]) == 0
    assert main(["simulate", str(apart), "--controls", "shuffled"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["score", str(apart), "--controls", "shuffled"]) == 0
    assert capsys.readouterr().out == table
    assert contents(together) == contents(apart)


def test_an_interrupted_interpret_resumes_and_repeats_nothing(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = rng.bit_generator.state
    whole = make_run(tmp_path / "a" / "run", rng)
    rng.bit_generator.state = state
    broken = make_run(tmp_path / "b" / "run", rng)
    assert main(["interpret", str(whole)]) == 0
    worked = 0

    def counting(function: Callable[..., Any], stop_after: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal worked
            if worked >= stop_after:
                raise KeyboardInterrupt
            worked += 1
            return function(*args, **kwargs)

        return wrapped

    stages = {"explain_layer": explain, "simulate_layer": simulate, "score_layer": pipeline}
    originals = {name: getattr(module, name) for name, module in stages.items()}
    for stop_after in (2, 8, 15, 99):
        for name, module in stages.items():
            monkeypatch.setattr(module, name, counting(originals[name], stop_after))
        assert main(["interpret", str(broken)]) == (130 if stop_after < 18 else 0)
    assert worked == 3 * 2 * len(PROTOCOLS)
    assert contents(broken) == contents(whole)
    assert main(["interpret", str(broken)]) == 0
    assert worked == 3 * 2 * len(PROTOCOLS)


KILLED_WHILE_WRITING = """
import os, signal, sys
from cratelm.cli import main
from cratelm.interpretation.simulators.simulation import LayerSimulations
of = LayerSimulations.of
LayerSimulations.of = lambda self, row: of(self, row) if row < 5 else os.kill(os.getpid(), signal.SIGKILL)
main(["interpret", sys.argv[1]])
"""


def test_a_process_killed_while_it_writes_leaves_whole_sets_and_no_claim(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    state = rng.bit_generator.state
    whole = make_run(tmp_path / "a" / "run", rng)
    rng.bit_generator.state = state
    killed = make_run(tmp_path / "b" / "run", rng)
    assert main(["interpret", str(whole)]) == 0
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(killed)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert main(["interpret", str(killed)]) == 0
    assert contents(killed) == contents(whole)


def test_records_collected_again_are_interpreted_again(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path, rng, layers=1)
    assert main(["interpret", str(run)]) == 0
    before = Store.open(run).read_scores(0, "anthropic").correlation
    make_run(tmp_path, rng, layers=1)
    assert main(["score", str(run)]) == 2
    assert main(["interpret", str(run)]) == 0
    assert (Store.open(run).read_scores(0, "anthropic").correlation != before)[NOISE:].all()


def test_the_printed_table_fits_80_columns_and_shows_every_layer(
    run: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture
) -> None:
    other = make_run(tmp_path / "gpt2-2l", rng, name="gpt2-2l", layers=3)
    assert main(["interpret", str(run), str(other), "--controls", "shuffled"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("shuffled" in line for line in lines) == 2
    assert sum(line.split()[:1] == ["mean"] for line in lines) == 4 * len(PROTOCOLS)
    first = next(line for line in lines if line.startswith("top-and-random")).split()
    points = Store.open(run).read_scores(0, "top-and-random").correlation
    assert first[:3] == ["top-and-random", "0", f"{100 * np.nanmean(points):.1f}"]
    assert first[5:] == ["9/12", "1", "1", "1", "0"]


def test_layers_and_protocols_can_be_chosen(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["interpret", str(run), "--layer", "1", "--protocol", "random-only", "anthropic"]) == 0
    assert [(key.protocol, key.layer) for key in Store.open(run).scored()] == [("anthropic", 1), ("random-only", 1)]
    assert "mean" not in capsys.readouterr().out


MISTAKES = [
    (["interpret", "RUN", "--protocol", "tar"], "no protocol 'tar'"),
    (["interpret", "RUN", "--layer", "7"], "(0, 1), got 7"),
    (["interpret", "RUN", "--controls", "swapped"], "no control 'swapped'. Use: shuffled"),
    (["interpret", "RUN", "--mode", "compat"], "must have compat records, got none. Hint: cratelm collect"),
    (["interpret", "NOWHERE"], "no run directory"),
    (["simulate", "RUN"], "no fixed top-and-random explanations of layer 0"),
    (["score", "RUN"], "no fixed top-and-random simulations of layer 0"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_reported_in_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    named = {"RUN": str(run), "NOWHERE": str(run / "nowhere")}
    assert main([named.get(argument, argument) for argument in arguments]) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
    assert not (run / "nowhere").exists()


def test_interpreting_needs_no_torch(run: Path) -> None:
    code = f"import sys; from cratelm.cli import main; main(['interpret', {str(run)!r}]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
