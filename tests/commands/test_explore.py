"""`cratelm explore`: from a model and texts to the neuron browser, and the forecast of a collection."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.collecting import held_out_documents, make_run, options
from fixtures.hugging_face import build, save
from fixtures.tiny import texts_of_three_parts

from cratelm import cli
from cratelm.activations.collect import check_documents
from cratelm.activations.forecast import fewest_tokens, forecast_collection
from cratelm.activations.observe import observe
from cratelm.activations.plan import CollectConfig, make_plan
from cratelm.activations.records import read_collection
from cratelm.activations.subject import Corpus
from cratelm.commands import collect, explore
from cratelm.commands.explore import Options
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.rundir import read_json
from cratelm.training.opening import write_run
from cratelm.workflows.next_command import explored_run
from cratelm.workflows.opening import open_model
from cratelm.workflows.token_data import open_corpus


@pytest.fixture(autouse=True)
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment instead of seconds."""
    monkeypatch.setattr("cratelm.activations.forecast.TRIAL_SECONDS", 0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return held_out_documents(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts_of_three_parts(np.random.default_rng(5), 90)):
        (folder / f"{number}.txt").write_text(text)
    return folder


def exploring(model: Path, texts: Path, **changes: object) -> Options:
    return replace(Options(model=model, text=(str(texts),), no_open=True, device="cpu"), **changes)  # type: ignore[arg-type]


def corpus_of(run: Path) -> Corpus:
    return open_corpus(open_model(run, "cpu"), run / "tokens", explore.SPLIT)[0]


def records_times(run: Path) -> dict[Path, int]:
    """When each file of records was written."""
    return {file: file.stat().st_mtime_ns for file in (run / "records").rglob("*.safetensors")}


@pytest.fixture(scope="module")
def explored(data: TokenDirectory, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours that was explored."""
    run, model = make_run(tmp_path_factory.mktemp("explored") / "mine", data)
    write_run(run, model.config, training=None, control=None, of=None)
    explore.run(exploring(run, texts))
    return run


def test_every_step_is_done(explored: Path) -> None:
    made = [
        "tokens/train.bin",
        "explore.json",
        "interpretation.sqlite",
        "directions/neurons/directions.json",
        "site/index.html",
    ]
    assert [name for name in made if not (explored / name).is_file()] == []
    assert read_collection(explored, mode="fixed")["num_layers"] == 2


def test_the_same_command_finds_everything_done(
    explored: Path, texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cratelm.activations.forecast.forecast_collection", None)  # not measured again
    before = records_times(explored)
    explore.run(exploring(explored, texts))
    assert records_times(explored) == before
    assert capsys.readouterr().out.strip().endswith(str(explored / "site" / "index.html"))


def test_the_printed_commands_do_the_same(
    explored: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    explore.run(exploring(explored, texts))
    steps = [line.removeprefix("step: ") for line in capsys.readouterr().err.splitlines() if line.startswith("step: ")]
    assert [step.split()[1] for step in steps] == ["tokenize", "collect", "interpret", "directions", "report"]
    before = records_times(explored)
    for step in steps:
        assert cli.main(shlex.split(step)[1:]) == 0, step
    assert records_times(explored) == before


def test_other_settings_of_an_explored_run_are_refused(explored: Path, texts: Path) -> None:
    with pytest.raises(CrateError, match=r"explored with other settings \(minutes 20.0 -> 1.0\)"):
        explore.run(exploring(explored, texts, minutes=1.0))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"minutes": 0.0}, "--minutes must be above 0, got 0"),
        ({"minutes": float("nan")}, "--minutes must be a number of at least 0"),
        ({"out": Path("x")}, "--out must be left out for a run"),
        ({"tokens": "many"}, "--tokens must be all or a number"),
    ],
)
def test_wrong_options_are_refused(explored: Path, texts: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(CrateError, match=re.escape(says)):
        explore.run(exploring(explored, texts, **changes))


def test_a_dry_run_records_nothing(
    data: TokenDirectory, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path / "mine", data)
    explore.run(exploring(run, texts, dry_run=True))
    assert sorted(path.name for path in run.iterdir() if not path.name.startswith(".")) == ["model", "tokens"]
    assert "tokens/s on this machine" in " ".join(capsys.readouterr().err.split())


def test_a_foreign_model_gets_a_run(data: TokenDirectory, texts: Path, tmp_path: Path) -> None:
    model = save(
        build("llama", np.random.default_rng(3), vocab=data.vocab_size), tmp_path / "m", data.path / "tokenizer.json"
    )
    explore.run(exploring(model, texts, out=tmp_path / "run", layer=(1,), force=True))
    assert (tmp_path / "run" / "site" / "index.html").is_file()
    assert read_json(tmp_path / "run" / "explore.json", made_by="")["layer"] == [1]


def test_the_forecast_of_a_collection_is_that_of_its_records(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = make_run(tmp_path / "run", data)
    opened = open_model(run, "cpu")
    corpus, _ = open_corpus(opened, data.path, "val")
    cost = forecast_collection(CollectConfig(), observe(model, model_hash=""), corpus, device=torch.device("cpu"))
    collect.run(options(run, data, dry_run=True))
    assert not (run / "records").exists()
    assert capsys.readouterr().out.startswith("neurons: ")
    collect.run(options(run, data))
    actual = sum(file.stat().st_size for file in (run / "records").rglob("layer*.safetensors"))
    assert cost.records_bytes == pytest.approx(actual, rel=0.1)
    assert cost.tokens_per_second > 0


def test_the_fewest_tokens_are_just_enough_documents(explored: Path) -> None:
    """Fewer by one document are refused; those are taken."""
    corpus, config = corpus_of(explored), CollectConfig(top_narrow=5, top_wide=5)
    opened = open_model(explored, "cpu")
    subject = observe(opened.model, model_hash=opened.model_hash)
    fewest = fewest_tokens(config, subject, corpus)

    def plan(tokens: int) -> None:
        check_documents(make_plan(corpus.tokens, corpus.documents, context=subject.context, max_tokens=tokens), config)

    plan(fewest)
    with pytest.raises(CrateError, match="at least 5 documents"):
        plan(fewest - 1)


@pytest.mark.parametrize(
    ("model", "run"),
    [("meta/Llama-3.2-1B", "Llama-3.2-1B"), ("Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("small.Q4_1.gguf", "small.Q4_1")],
)
def test_the_run_has_the_name_of_the_model(model: str, run: str) -> None:
    assert explored_run(Options(model=Path(model))) == Path("runs") / run
