"""A run or model folder from elsewhere does no harm: planted links, pipes, pickles, token ids and patterns."""

import contextlib
import json
import os
import pickle
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import earlier
from fixtures.tiny import make_tokens, random_model, short_training, tiny_config, train_quietly
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from cratelm.cli import main
from cratelm.data.tokenizer import LARGEST_VOCABULARY, token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.model.weights import load_model, save_model
from cratelm.report.browser.overview_cache import CachedOverview
from cratelm.report.export.model_card import model_card
from cratelm.report.server.chunk_cache import Chunks
from cratelm.report.server.votes import Votes
from cratelm.rundir import append_jsonl, claim, write_json, write_text
from cratelm.training.checkpoints import checkpoints


class Planted:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside of the run, which nothing may change."""
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside" / "victim"
    path.write_text("precious")
    return path


def refused(message: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; it ends with one line."""
    capsys.readouterr()
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_written_through_a_planted_link(tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    write_json(run / "run.json", {"name": "run"})
    for name in (".lock", "metrics.jsonl", "interpretation.sqlite", "interpretation.sqlite-journal"):
        (run / name).symlink_to(victim)
    (run / "records").symlink_to(victim.parent)
    with pytest.raises(CrateError, match="lock must be a file, got a link"), claim(run):
        pass
    with pytest.raises(CrateError, match="jsonl must be a file, got a link"):
        append_jsonl(run / "metrics.jsonl", {"step": 1})
    with pytest.raises(CrateError, match="sqlite must be a file, got a link"):
        Store.open(run)
    (run / "interpretation.sqlite").unlink()
    with pytest.raises(CrateError, match="journal must be a file, got a link"):
        Store.create(run).note("a", "b")
    with pytest.raises(CrateError, match=f"must lie in {run}, got a link to {victim.parent}"):
        write_text(run / "records" / "victim", "changed")
    assert victim.read_text() == "precious"
    assert list(victim.parent.iterdir()) == [victim]


def test_a_run_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    write_json(tmp_path / "disk" / "run.json", {"name": "run"})
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with claim(tmp_path / "run"):
        write_text(tmp_path / "run" / "report" / "a.txt", "text")
    assert (tmp_path / "disk" / "report" / "a.txt").read_text() == "text"


@pytest.mark.filterwarnings("ignore")
def test_commands_on_a_run_with_planted_links_and_pipes_end_in_one_line(
    tmp_path: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier.unpack(tmp_path)
    run = tmp_path / earlier.RUN
    (run / "report").symlink_to(victim.parent)
    (run / "site").symlink_to(run.parent / "empty")
    (run.parent / "empty").mkdir()
    (run / "overviews").symlink_to(victim.parent)
    refused("got a link", "report", str(run), capsys=capsys)
    refused("got a link", "report", str(run), "--site", capsys=capsys)
    assert [*victim.parent.iterdir(), *(run.parent / "empty").iterdir()] == [victim]
    for name in ("evaluation.json", "records/fixed/windows.safetensors", "interpretation.sqlite"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        refused(f"{name} must be a file", "report", str(run), "--out", str(tmp_path / "out"), capsys=capsys)
        (run / name).unlink()
        (run / name).write_bytes(content)


def test_serving_a_run_with_planted_links_writes_nothing_outside(tmp_path: Path, victim: Path) -> None:
    earlier.unpack(tmp_path)
    run = tmp_path / earlier.RUN
    (victim.parent / "theirs.json").write_text("{}")
    (run / "overviews").symlink_to(victim.parent)
    for name in ("votes.sqlite", "ballots.sqlite-journal"):
        (run / name).symlink_to(victim)
    chunks = Chunks([run], capabilities={})
    chunks.begin().join(60)
    while (content := chunks.chunk("overview")) is None:
        time.sleep(0.05)
    assert "tables" in json.loads(content)
    for name in ("votes.sqlite", "ballots.sqlite"):
        with pytest.raises(CrateError, match="must be a file, got a link"):
            Votes(run / name).open()
    (run / "overviews").unlink()
    (run / "overviews").mkdir()
    os.mkfifo(CachedOverview(models=chunks.models, mode="fixed").path)
    assert CachedOverview(models=chunks.models, mode="fixed").read() is None
    assert victim.read_text() == "precious"
    assert {path.name for path in victim.parent.iterdir()} == {"victim", "theirs.json"}


def test_votes_from_elsewhere_that_are_not_json_are_one_line(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    votes.open()
    for text in ("[" * 100_000, "{", b"\xff", 3):
        with contextlib.closing(sqlite3.connect(votes.path)) as connection, connection:
            connection.execute("DELETE FROM votes")
            connection.execute("INSERT INTO votes (vote) VALUES (?)", [text])
        with pytest.raises(CrateError, match="is not a votes file"):
            votes.page()


@pytest.mark.filterwarnings("ignore")
def test_a_model_card_and_an_export_of_a_run_with_planted_pipes_and_links_end_in_one_line(
    tmp_path: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier.unpack(tmp_path)
    run = tmp_path / earlier.RUN
    for name in ("evaluation.json", "run.json", "model/config.json", "interpretation.sqlite"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(CrateError, match=f"{name} must be a file, got a pipe"):
            model_card(run, title="me/crate")
        (run / name).unlink()
        (run / name).symlink_to(victim)
        with pytest.raises(CrateError):
            model_card(run, title="me/crate")
        (run / name).unlink()
        (run / name).write_bytes(content)
    assert "me/crate" in model_card(run, title="me/crate")
    (tmp_path / "out").symlink_to(victim.parent)
    refused("--out", "export", str(run), "--format", "hf", "--out", str(tmp_path / "out"), capsys=capsys)
    assert [victim] == list(victim.parent.iterdir())
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("place", ["metadata", "value"])
def test_training_runs_no_code_of_a_planted_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, config, made = make_tokens(tmp_path / "tokens", rng), short_training(checkpoint_every=4), tmp_path / "made"
    steps = iter(range(100))
    if place == "value":  # what an optimizer's number is pickled as
        save = torch.save
        monkeypatch.setattr(
            "torch.save", lambda value, file: save(value if torch.is_tensor(value) else Planted(made), file)
        )
    with pytest.raises(KeyboardInterrupt):
        train_quietly(config, tiny_config(), data, tmp_path / "run", stop=lambda: next(steps) >= 5)
    monkeypatch.undo()
    for folder in checkpoints(tmp_path / "run"):
        (folder / "checkpoint.json").unlink()  # a checkpoint without sums is accepted as older ones are
        if place == "metadata":
            (folder / ".metadata").write_bytes(pickle.dumps(Planted(made)))
    train_quietly(config, tiny_config(), data, tmp_path / "run")
    assert not made.exists()
    assert "is not readable" in " ".join(capsys.readouterr().err.split())


def test_the_files_of_an_index_lie_in_its_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    save_model(random_model(tiny_config(), rng), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    for name in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CrateError, match="must name files of its folder, got"):
            load_model(tmp_path / "model")


def test_ids_far_beyond_a_vocabulary_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": LARGEST_VOCABULARY}, unk_token="a"))
    with pytest.raises(CrateError, match="ids of a tokenizer must be below 4,194,304, got 4,194,304"):
        token_strings(tokenizer)


@pytest.mark.parametrize("weights", ["not a number", "a pattern that never ends"])
def test_generation_from_a_damaged_model_is_one_line(
    weights: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = random_model(tiny_config(), rng), make_tokens(tmp_path / "tokens", rng).tokenizer()
    message = "the weights of the model are damaged"
    if weights == "not a number":
        next(model.parameters()).data.fill_(float("nan"))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
        message = "Hint: the tokenizer.json may be malformed"
    save_model(model, tmp_path / "model", tokenizer)
    for temperature in ("0", "1"):
        arguments = ("--prompt", "a" * 60 + "!", "--tokens", "2", "--temperature", temperature)
        refused(message, "generate", str(tmp_path / "model"), *arguments, capsys=capsys)
