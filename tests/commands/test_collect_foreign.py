"""`cratelm collect` on Hugging Face models: a separate run, and what the later stages make of it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.collecting import CONTEXT, held_out_documents, make_run, message, options, snapshot
from fixtures.hugging_face import build, save
from fixtures.tiny import make_tokens, random_model, tiny_config
from torch import Tensor

from cratelm.activations.records import read_collection, read_records, records_folder
from cratelm.commands import collect, interpret, report
from cratelm.commands.collect import Options
from cratelm.data.tokens import TokenDirectory
from cratelm.model.weights import save_model
from cratelm.rundir import read_json


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return held_out_documents(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def foreign(data: TokenDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX directory with the tokens' tokenizer."""
    model = build("gpt_neox", np.random.default_rng(3), vocab=data.vocab_size)
    return save(model, tmp_path_factory.mktemp("foreign") / "model", data.path / "tokenizer.json")


def activations_of(model: Any, module: str, corpus: np.ndarray, position: int, length: int, end: int) -> Tensor:
    """What a module makes of the document around a position, up to the end of an excerpt, by torch's own hooks."""
    start = position
    while start > 0 and corpus[start - 1] != end:
        start -= 1
    row = torch.tensor([[end, *corpus[start : position + length].tolist()]])
    actual: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda _module, _inputs, output: actual.append(output))
    with torch.no_grad():
        model(row)
    handle.remove()
    assert row.shape[1] <= CONTEXT
    return actual[0][0, -length:]


def test_records_of_a_foreign_model_are_its_own_activations(
    foreign: Path, data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    run = tmp_path / "runs" / "neox"
    collect.run(options(foreign, data, out=run))
    expected_message = " ".join(capsys.readouterr().err.split())
    assert "neurons has negative activations" in expected_message
    assert "--sign negative" in expected_message
    model = transformers.AutoModelForCausalLM.from_pretrained(foreign).eval()
    corpus = np.asarray(data.tokens("val")).astype(np.int64)
    records = read_records(run, 1)
    checked = 0
    for kind, neuron in (("top", 3), ("random", 17), ("quantile", 39)):
        for excerpt in records.excerpts(64, "score", kind).of(neuron):
            if excerpt.position < CONTEXT - 70:  # the document's first row
                continue
            width = len(excerpt.tokens)
            before = corpus[: excerpt.position][::-1].tolist()
            if before.index(data.end_of_text) + width + 1 > 68:
                continue
            expected = activations_of(
                model, "gpt_neox.layers.1.mlp.act", corpus, excerpt.position, width, data.end_of_text
            )
            np.testing.assert_allclose(excerpt.activations, expected[:, neuron].numpy(), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked > 5
    actual = read_collection(run)
    assert actual["signed"] is True
    assert actual["taps"] == {"neurons": {"layers": [0, 1], "signed": True}}


def test_the_run_of_a_foreign_model_says_what_it_is_and_remembers_where_it_came_from(
    foreign: Path, data: TokenDirectory, tmp_path: Path
) -> None:
    run = tmp_path / "neox"
    collect.run(options(foreign, data, out=run, layer=(1,)))
    actual = read_json(run / "run.json", made_by="")
    assert (actual["arch"], actual["name"], actual["source"]) == ("gpt_neox", "neox", str(foreign.resolve()))
    assert actual["model"] == {
        "num_layers": 2, "d_model": 16, "num_heads": 2, "num_neurons": 40, "vocab_size": data.vocab_size,
        "context_length": 128,
    }  # fmt: skip
    assert actual["model_hash"] == read_collection(run)["model_hash"]
    assert TokenDirectory.open(data.path, tokenizer=str(records_folder(run, "fixed") / "tokenizer.json"))
    collect.run(options(run, data, tap="residual"))
    assert read_collection(run)["taps"].keys() == {"neurons", "residual"}


def test_the_later_stages_read_the_run_of_a_foreign_model(
    foreign: Path, data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "neox"
    collect.run(options(foreign, data, out=run))
    interpret.run(interpret.Options(runs=(run,), controls=("shuffled",)))
    report.run(report.Options(runs=(run,), out=tmp_path / "report"))
    assert "neox" in capsys.readouterr().out
    assert list((tmp_path / "report").iterdir())


def test_a_foreign_model_needs_a_run_and_a_run_has_one(foreign: Path, data: TokenDirectory, tmp_path: Path) -> None:
    assert f"cratelm collect {foreign} --data {data.path} --out runs/model" in message(options(foreign, data))
    ours, _ = make_run(tmp_path / "ours", data)
    assert "--out must be left out for a run" in message(options(ours, data, out=tmp_path / "other"))
    assert "is not a run directory" in message(options(tmp_path / "nowhere", data))
    several = Options(runs=(foreign, foreign), data=data.path, out=tmp_path / "x")
    assert "--out needs a single model, got 2" in message(several)


def test_two_models_do_not_share_a_run(foreign: Path, data: TokenDirectory, tmp_path: Path) -> None:
    run = tmp_path / "run"
    collect.run(options(foreign, data, out=run, layer=(0,)))
    model = build("gpt_neox", np.random.default_rng(99), vocab=data.vocab_size)
    other = save(model, tmp_path / "other", data.path / "tokenizer.json")
    before = snapshot(run)
    assert "--out must be left out for a run" in message(options(run, data, out=run))
    assert "is the run of another model (model_hash" in message(options(other, data, out=run))
    assert snapshot(run) == before


def test_the_tokens_must_be_the_models(foreign: Path, data: TokenDirectory, tmp_path: Path) -> None:
    others = make_tokens(tmp_path / "others", np.random.default_rng(7), documents=40, vocab=266)
    expected_message = message(options(foreign, others, out=tmp_path / "run"))
    assert f"tokens of {others.path} come from another tokenizer than the model of {foreign}" in expected_message
    assert f"cratelm tokenize SOURCE --tokenizer {foreign} --out DIR" in expected_message
    assert not (tmp_path / "run").exists()
    bare = save(build("gpt_neox", np.random.default_rng(3), vocab=data.vocab_size), tmp_path / "bare")
    assert "has no tokenizer.json" in message(options(bare, data, out=tmp_path / "run"))
    named = str(data.path / "tokenizer.json")
    collect.run(options(bare, data, out=tmp_path / "run", tokenizer=named, layer=(0,)))
    assert (records_folder(tmp_path / "run", "fixed") / "tokenizer.json").exists()


def test_a_crate_directory_from_elsewhere_needs_no_transformers(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = random_model(tiny_config("crate", context_length=CONTEXT, vocab_size=data.vocab_size),
                         np.random.default_rng(1))  # fmt: skip
    save_model(model, tmp_path / "crate", data.tokenizer())
    collect.run(options(tmp_path / "crate", data, out=tmp_path / "run"))
    actual = read_json(tmp_path / "run" / "run.json", made_by="")
    assert (actual["arch"], actual["parameters"]) == ("crate", model.config.num_parameters)
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "needs an extra: pip install 'cratelm[hf]'" in message(options(other, data, out=tmp_path / "other"))
