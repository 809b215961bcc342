"""The card of a model and its way to the hub: every measured number is on it, and nothing that was not measured."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import make_run, make_tokenizer

from cratelm import cli
from cratelm.errors import CrateError
from cratelm.hub import push_to_hub, write_directory
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import load_model, save_model
from cratelm.report.contents import ReportContents
from cratelm.report.export.model_card import model_card
from cratelm.report.results.gather import gather
from cratelm.report.tables.form import as_markdown
from cratelm.rundir import write_json


def make_model(arch: Any) -> LanguageModel:
    config = ModelConfig(arch=arch, num_layers=2, d_model=16, num_heads=2, vocab_size=384, context_length=48)
    return LanguageModel(config).initialise(0)


def test_the_model_card_says_what_was_measured(tmp_path: Path, rng: np.random.Generator) -> None:
    run = _scored_run(tmp_path, rng)
    card = model_card(run, title="me/crate-tiny")
    evaluation = json.loads((run / "evaluation.json").read_text())
    described = json.loads((run / "run.json").read_text())
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- cratelm\n- crate\n"
    )
    assert f"| held-out (val) | {evaluation['nats_per_token']:.4f} ± 0.0200 | {evaluation['perplexity']:.2f} |" in card
    assert "| lambada | 4.1000 ± 0.0300 | 60.34 | 1.2000 | 12,345 |" in card
    assert "Last word of lambada: accuracy 12.50 %, perplexity 99.00, over 8 passages." in card
    assert f"{described['parameters']:,}" in card
    assert 'from_pretrained("me/crate-tiny")' in card
    assert "import cratelm.huggingface" in card
    for table in ReportContents(gather([run])).tables:
        for row in as_markdown(table).splitlines()[2 : 4 + len(table.rows)]:
            assert row in card
    assert f"| top-and-random | {points_of(run)}" in card
    assert "Run: cratelm" not in card


def test_a_card_of_a_bare_directory_claims_nothing(tmp_path: Path) -> None:
    save_model(make_model("gpt2"), tmp_path / "gpt2")
    card = model_card(tmp_path / "gpt2", title="gpt2")
    assert "nothing was measured" in card
    assert "import cratelm" not in card


def test_push_to_hub_uploads_model_tokenizer_and_card(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[tuple[str, dict[str, bytes]]] = []

    class Api:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            uploaded.append((repo_id, {file.name: file.read_bytes() for file in folder_path.iterdir()}))
            return f"https://hub/{repo_id}"

    pytest.importorskip("transformers", reason="transformers is not installed (make test-all installs it)")
    from cratelm.huggingface import CrateForCausalLM

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    run = _scored_run(tmp_path, rng)
    assert push_to_hub(run, "me/one") == "https://hub/me/one"
    assert CrateForCausalLM.from_pretrained(run / "model").push_to_hub("me/two") == "https://hub/me/two"
    assert cli.main(["export", str(run), "--format", "hf", "--push", "me/three"]) == 0
    assert [name for name, _ in uploaded] == ["me/one", "me/two", "me/three"]
    for name, files in uploaded:
        wanted = {"README.md", "config.json", "model.safetensors", "modeling_crate.py", "tokenizer.json"}
        assert wanted | {"tokenizer_config.json"} <= files.keys()
        assert files["README.md"].decode() == model_card(run, title=name)


def test_an_exported_directory_holds_the_card(tmp_path: Path, rng: np.random.Generator) -> None:
    run = _scored_run(tmp_path, rng)
    write_directory(run, tmp_path / "exported")
    assert (tmp_path / "exported" / "README.md").read_text() == model_card(run, title="exported")
    assert load_model(tmp_path / "exported").config == load_model(run / "model").config


def test_a_hub_that_refuses_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, *_: Any, **__: Any) -> Any:
            raise OSError("no\nnetwork")

    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (make test-all installs it)")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    save_model(make_model("crate"), tmp_path / "crate")
    with pytest.raises(CrateError, match=r"me/one could not be uploaded \(no network\)"):
        push_to_hub(tmp_path / "crate", "me/one")


def test_the_card_copes_with_numbers_that_an_evaluation_does_not_have(tmp_path: Path, rng: np.random.Generator) -> None:
    run = _scored_run(tmp_path, rng)
    evaluation = json.loads((run / "evaluation.json").read_text())
    nothing: dict[str, Any] = {"standard_error": None, "perplexity": None}
    lambada = evaluation["zero_shot"]["lambada"]
    word = {**lambada["last_word"], "perplexity": None}
    evaluation["zero_shot"]["lambada"] = {**lambada, **nothing, "last_word": word}
    write_json(run / "evaluation.json", {**evaluation, "standard_error": math.nan, "perplexity": math.inf})
    card = model_card(run, title="me/crate-tiny")
    assert f"| held-out (val) | {evaluation['nats_per_token']:.4f} | too large for a number |" in card
    assert "| lambada | 4.1000 | too large for a number | 1.2000 | 12,345 |" in card
    assert "accuracy 12.50 %, perplexity too large for a number, over 8 passages" in card


def points_of(run: Path) -> str:
    [model] = gather([run]).models
    return f"{model.title} | {model.scores['top-and-random'].mean:.2f} |"


def _scored_run(folder: Path, rng: np.random.Generator) -> Path:
    """A run with a model, records and scores, and a zero-shot evaluation."""
    run = make_run(folder / "crate-tiny", rng, layers=2, neurons=12)
    assert cli.main(["interpret", str(run), "--protocol", "top-and-random"]) == 0
    save_model(make_model("crate"), run / "model", make_tokenizer())
    evaluation = json.loads((run / "evaluation.json").read_text())
    word = {"accuracy": 0.125, "standard_error": 0.1, "perplexity": 99.0, "passages": 8}
    evaluation["zero_shot"] = {
        "lambada": {
            "nats_per_token": 4.1, "standard_error": 0.03, "perplexity": 60.34, "bits_per_byte": 1.2,
            "tokens": 12345, "documents": 8, "last_word": word,
        }
    }  # fmt: skip
    write_json(run / "evaluation.json", evaluation)
    return run
