"""Other places of a model than its neurons go through the same stages, and have separate rows in a report."""

from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import FIRST_TOKEN_NEURON, make_run
from safetensors.numpy import load_file, save_file

from cratelm.activations.records import layer_file, recorded_taps
from cratelm.cli import main
from cratelm.commands import report
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import gather
from cratelm.report.tables import paper as tables

TAP = "sae-tiny"


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A run with two layers of neurons, and one layer of eight latents: the last neurons in reverse order."""
    run = make_run(tmp_path / "crate-2l", rng)
    file = layer_file(run, "fixed", TAP, 1)
    file.parent.mkdir()
    neurons = load_file(layer_file(run, "fixed", "neurons", 1))
    latents = {name: np.ascontiguousarray(array[: FIRST_TOKEN_NEURON - 1 : -1]) for name, array in neurons.items()}
    save_file(latents, file, metadata={"format_version": "1"})
    return run


def test_latents_get_the_scores_of_the_neurons_they_equal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded_taps(run) == ["neurons", TAP]
    assert main(["interpret", str(run)]) == 0
    for verb in ("explain", "simulate", "score"):
        assert main([verb, str(run), "--tap", TAP, "--protocol", "anthropic"]) == 0
    assert f"crate-2l, {TAP} (fixed mode" in capsys.readouterr().out
    store = Store.open(run)
    neurons, latents = (store.scores(SetKey(tap=tap, layer=1, protocol="anthropic")) for tap in ("neurons", TAP))
    np.testing.assert_array_equal(latents.correlation, neurons.correlation[: FIRST_TOKEN_NEURON - 1 : -1])
    assert {(key.tap, key.layer) for key in store.scored()} == {("neurons", 0), ("neurons", 1), (TAP, 1)}


@pytest.mark.usefixtures("quick_report")
def test_a_report_shows_each_tap_in_separate_rows(run: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    other = make_run(tmp_path / "gpt2-2l", rng, name="gpt2-2l")
    assert main(["interpret", str(run), str(other)]) == 0
    assert main(["interpret", str(run), "--tap", TAP, "--protocol", "anthropic", "--controls", "shuffled"]) == 0
    results = gather([run, other], taps=("neurons", TAP))
    assert [(one.title, one.tap) for one in results.models] == [
        ("CRATE-2L", "neurons"), (f"CRATE-2L, {TAP}", TAP), ("GPT-2-2L", "neurons"),
    ]  # fmt: skip
    latents = results.models[1]
    assert [one.layer for one in latents.scores["anthropic"].layers] == [1]
    assert {one.layer for one in latents.examples} == {1}  # by the one protocol that all have
    assert "do not include a sparse autoencoder" in " ".join(tables.interpretability(results).notes)
    report.run(report.Options(runs=(run, other), tap=("neurons", TAP), out=tmp_path / "report"))
    assert f"CRATE\N{NON-BREAKING HYPHEN}2L, {TAP}" in (tmp_path / "report" / "report.html").read_text()
    assert [one.title for one in gather([run]).models] == ["CRATE-2L"]


@pytest.mark.parametrize(("arguments", "error"), [
    (["interpret", "RUN", "--tap", "sae-other"], f"(neurons, {TAP}), got sae-other. Hint: cratelm collect"),
    (["interpret", "RUN", "--tap", "sae-other"], "--data DIR --sae other"),
    (["score", "RUN", "--tap", TAP], f"of layer 1 of {TAP} in"),
    (["score", "RUN", "--tap", TAP], f"--protocol top-and-random --tap {TAP}"),
    (["report", "RUN", "--tap", TAP], f"--tap {TAP}"),
])  # fmt: skip
def test_an_unknown_tap_is_refused_with_the_known_ones(
    arguments: list[str], error: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run) if argument == "RUN" else argument for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert error in message
    assert message.count("\n") == 1


def test_a_report_names_the_first_tap_where_none_is_scored(run: Path) -> None:
    assert main(["interpret", str(run), "--protocol", "anthropic"]) == 0
    with pytest.raises(CrateError, match=rf"no fixed scores of {TAP}"):
        gather([run], taps=(TAP, "sae-other"))
