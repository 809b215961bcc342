"""A run or model folder from elsewhere does no harm: planted links, pipes, pickles, token ids and patterns."""

import json
import os
import pickle
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
