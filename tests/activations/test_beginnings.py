"""How rows and texts begin: the live value of a recorded excerpt is the recorded one, for every family."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import earlier
from fixtures.dense_families import BOS, DENSE, END_FIRST, NOTHING_FIRST, build_dense, save_with_beginning
from fixtures.tiny import OBJECTS, SUBJECTS, VERBS, hidden_bar, random_model, tiny_config

from cratelm import cli
from cratelm.activations.collect import collect
from cratelm.activations.observe import observe
from cratelm.activations.plan import CollectConfig
from cratelm.activations.records import Excerpt, read_collection, read_records
from cratelm.activations.row_beginning import describe_row_beginning
from cratelm.activations.subject import Corpus
from cratelm.activations.taps import capture
from cratelm.commands import collect as command
from cratelm.data.special_tokens import SpecialTokens
from cratelm.data.tokens import TokenDirectory, tokenize
from cratelm.errors import CrateError
from cratelm.live_models import LiveModel, LiveModels
from cratelm.model.weights import save_model
from cratelm.report.browser.catalogue import catalogue
from cratelm.report.browser.overview import overview
from cratelm.report.server.requests import Limits, TextRequest
from cratelm.rundir import write_json
from cratelm.workflows.opening import OpenModel, open_model
from cratelm.workflows.token_data import open_corpus, row_beginning

CONTEXT = 72
"""Room for one wide excerpt in a row, so that most documents have rows in mid-document."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    """Documents of 15 to 150 tokens whose tokenizer has a beginning-of-text token."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(8)
    words = [*SUBJECTS, *VERBS, *OBJECTS]
    texts = [f"{i} " + " ".join(rng.choice(words, size=int(rng.integers(4, 40)))) for i in range(120)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    plain = tokenize([str(source)], folder / "plain", "bpe:280", held_out=0.6).tokenizer()
    plain.add_special_tokens([BOS])
    return tokenize([str(source)], folder / "tokens", plain, held_out=0.6)


def collected(opened: OpenModel, data: TokenDirectory, run: Path) -> Corpus:
    """Collect records of both layers; the corpus that was read."""
    corpus, tokenizer = open_corpus(opened, data.path, "val")
    begin = row_beginning(opened, corpus)
    subject = observe(opened.model, model_hash="h", context=CONTEXT, row_beginning=begin)
    collect(CollectConfig(sample_wide=8, sample_narrow=12), subject, corpus, run, device=torch.device("cpu"),
            bar=hidden_bar())  # fmt: skip
    tokenizer.save(str(run / "records" / "fixed" / "tokenizer.json"))
    return corpus


def live_values(opened: OpenModel, text: str, layer: int, neuron: int) -> list[float]:
    """What the live browser answers for a text."""
    live = LiveModel(
        model=opened.model, tokenizer=opened.tokenizer, strings=opened.strings, maximum=lambda *_: None,
        special=opened.special,
    )  # fmt: skip
    models = LiveModels({"m": 128}, lambda _: live, limits=Limits())
    values: list[float] = models.activations(TextRequest(model="m", text=text, layer=layer, neuron=neuron))["values"]
    return values


def row_number(excerpt: Excerpt, corpus: Corpus, begin: tuple[int, ...] | None) -> int:
    """The row of its document that holds an excerpt: 0 for the first."""
    context = 4 - (1 if begin is None or begin else 0)  # of the document's tokens before the first excerpt
    return int((excerpt.position - corpus.documents[excerpt.document] - context) // 64)


def row_of(excerpt: Excerpt, corpus: Corpus, begin: tuple[int, ...] | None) -> list[int]:
    """The tokens that the model read up to the end of an excerpt, by the rules of docs/collect.md."""
    start, row = int(corpus.documents[excerpt.document]), row_number(excerpt, corpus, begin)
    first = start + 64 * row - (1 if begin is None and row else 0)
    lead = [*(begin or ())] if begin is not None or row else [corpus.end_of_text]
    return [*lead, *corpus.tokens[first : excerpt.position + len(excerpt.tokens)].tolist()]


def check_live_equals_recorded(opened: OpenModel, corpus: Corpus, run: Path) -> None:
    tokenizer, begin, places = opened.tokenizer, opened.causal.row_beginning, opened.causal.places()
    whole = later = 0
    for layer in (0, 1):
        records = read_records(run, layer)
        for kind, width, neuron in (("top", 64, 3), ("random", 8, 17), ("quantile", 8, 39)):
            for excerpt in list(records.excerpts(width, "score", kind).of(neuron))[:10]:
                start, end = corpus.documents[excerpt.document : excerpt.document + 2].tolist()
                row = row_of(excerpt, corpus, begin)
                with torch.inference_mode(), capture(opened.model, [places[layer]]) as codes:
                    opened.causal.read(torch.tensor([row]), [places[layer]])
                live = codes[places[layer]].reshape(len(row), -1)[-len(excerpt.tokens) :, neuron].numpy()
                np.testing.assert_allclose(live, excerpt.activations, rtol=2e-4, atol=2e-6)
                first_row = row_number(excerpt, corpus, begin) == 0
                later += not first_row
                if first_row and end - start < 120:
                    text = tokenizer.decode(corpus.tokens[start : end - 1].tolist())
                    values = live_values(opened, text, layer, neuron)
                    at = slice(excerpt.position - start, excerpt.position - start + len(excerpt.tokens))
                    np.testing.assert_allclose(values[at], excerpt.activations, rtol=2e-4, atol=2e-6)
                    whole += 1
    assert whole > 0
    assert later > 0


FAST = ("gpt2", "llama", "qwen2")


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in DENSE]
)
def test_the_live_value_of_a_recorded_excerpt_is_the_recorded_value(
    family: str, data: TokenDirectory, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = build_dense(family, rng, vocab=data.vocab_size)
    opened = open_model(save_with_beginning(family, model, tmp_path / "model", data.tokenizer()), "cpu")
    bos, end = data.tokenizer().token_to_id(BOS), data.end_of_text
    expected = None if family in END_FIRST else () if family in NOTHING_FIRST else (bos,)
    assert opened.causal.row_beginning == expected
    text = data.tokenizer().encode("a crate").ids
    assert opened.causal.encode("a crate") == [*((end,) if expected is None else expected), *text]
    corpus = collected(opened, data, tmp_path / "run")
    check_live_equals_recorded(opened, corpus, tmp_path / "run")
    sentence = describe_row_beginning(read_collection(tmp_path / "run"), opened.strings)
    words = "<|endoftext|> comes before each document" if expected is None else f"Every row begins with {BOS}"
    assert sentence.startswith("Rows begin with the text itself" if expected == () else words)


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_a_text_is_a_document_for_models_of_this_package(
    arch: Any, data: TokenDirectory, rng: np.random.Generator, tmp_path: Path
) -> None:
    config = tiny_config(arch, vocab_size=data.vocab_size, context_length=128)
    save_model(random_model(config, rng), tmp_path / "run" / "model", data.tokenizer())
    opened = open_model(tmp_path / "run", "cpu")
    corpus = collected(opened, data, tmp_path / "run")
    check_live_equals_recorded(opened, corpus, tmp_path / "run")


def test_the_beginning_is_in_no_excerpt_histogram_or_maximum(
    data: TokenDirectory, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = build_dense("llama", rng, vocab=data.vocab_size)
    bos = data.tokenizer().token_to_id(BOS)
    model.model.embed_tokens.weight.data[bos] *= 1000
    model.model.layers[0].mlp.gate_proj.weight.data *= 1000 ** (torch.rand(40, 1) < 0.5)
    opened = open_model(save_with_beginning("llama", model, tmp_path / "model", data.tokenizer()), "cpu")
    corpus = collected(opened, data, tmp_path / "run")
    records = read_records(tmp_path / "run", 0)
    assert bos not in records.windows.tokens
    subject = observe(opened.model, model_hash="h", context=CONTEXT, row_beginning=opened.causal.row_beginning)
    largest, counted = np.full(40, -np.inf), 0
    for start, end in zip(corpus.documents[:-1], corpus.documents[1:], strict=True):
        for first in range(start, end - 1 - 3, 64):
            row = corpus.tokens[first : min(first + 67, end - 1)].astype(np.int64)
            code = subject.forward(torch.from_numpy(row)[None])[0][0, 3:]
            largest, counted = np.maximum(largest, code.amax(0).numpy()), counted + len(code)
    np.testing.assert_allclose(records.statistics["maximum"], largest, rtol=1e-4)
    assert read_collection(tmp_path / "run")["tokens"] == counted
    assert records.tables["histogram"].sum(1).max() <= counted / 4 + 200


def test_records_with_another_beginning_do_not_share_a_run(
    data: TokenDirectory, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = build_dense("llama", rng, vocab=data.vocab_size)
    opened = open_model(save_with_beginning("llama", model, tmp_path / "model", data.tokenizer()), "cpu")
    collected(opened, data, tmp_path / "run")
    other = replace(opened, special=SpecialTokens(end=data.end_of_text))
    with pytest.raises(CrateError, match="holds fixed records of other settings .*row_beginning"):
        collected(other, data, tmp_path / "run")


@pytest.mark.parametrize("options", [("--limit", "2"), ("--neuron", "2")])
def test_the_neurons_of_older_records_are_shown_with_how_their_rows_began(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier.unpack(tmp_path)
    run = tmp_path / earlier.RUN
    assert cli.main(["neurons", str(run), "--layer", "1", *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "An earlier version made these records: no row begins with a beginning-of-text token" in shown
    assert "Collect into another run" not in shown  # <|endoftext|> before each document is how this model was trained
    assert cli.main(["neurons", str(run), "--layer", "1", "--mode", "compat", *options]) == 0
    assert "Rows begin with the text itself." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_only_older_records_that_lack_the_beginning_of_their_tokenizer_are_to_be_collected_again(
    family: str, data: TokenDirectory, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_with_beginning(
        family, build_dense(family, rng, vocab=data.vocab_size), tmp_path / "model", data.tokenizer()
    )
    run = tmp_path / "run"
    command.run(command.Options(runs=(folder,), data=data.path, out=run, device="cpu", context=CONTEXT, force=True))

    def warned() -> list[bool]:
        assert cli.main(["neurons", str(run)]) == 0
        found = overview(catalogue([run], "fixed"), "fixed")["missing"]
        return ["without a beginning-of-text token" in text for text in (capsys.readouterr().out, " ".join(found))]

    assert warned() == [False, False]
    description = read_collection(run)
    del description["row_beginning"]
    write_json(run / "records" / "fixed" / "records.json", description)
    assert warned() == [family == "llama"] * 2


def test_a_token_named_when_tokenizing_begins_the_rows_of_the_run(
    data: TokenDirectory, rng: np.random.Generator, tmp_path: Path
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_bytes((data.path.parent / "texts.jsonl").read_bytes())
    named = tokenize([str(source)], tmp_path / "tokens", data.tokenizer(), held_out=0.6, begin_token=BOS)
    assert named.begin_of_text == (data.tokenizer().token_to_id(BOS),)
    model = build_dense("qwen2", rng, vocab=data.vocab_size)
    folder = save_with_beginning("qwen2", model, tmp_path / "model", data.tokenizer())
    assert open_model(folder, "cpu").causal.row_beginning == ()
    run = tmp_path / "run"
    command.run(command.Options(runs=(folder,), data=named.path, out=run, device="cpu", context=CONTEXT, force=True))
    assert read_collection(run)["row_beginning"] == {"rows": "every", "tokens": list(named.begin_of_text)}
    assert open_model(run, "cpu").causal.row_beginning == named.begin_of_text


@pytest.mark.parametrize("imported", [False, True])
def test_our_own_models_read_no_rows_that_begin_otherwise_than_their_prompts(
    imported: bool, data: TokenDirectory, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = data.path.parent / "texts.jsonl"
    named = tokenize([str(texts)], tmp_path / "tokens", data.tokenizer(), held_out=0.6, begin_token=BOS)
    bos = data.tokenizer().token_to_id(BOS)
    model = random_model(tiny_config(vocab_size=data.vocab_size, context_length=128), rng)
    save_model(model, tmp_path / "run" / "model", data.tokenizer(), begin=bos if imported else None)
    opened = open_model(tmp_path / "run", "cpu")
    if imported:  # by `cratelm import --begin-token`
        check_live_equals_recorded(opened, collected(opened, named, tmp_path / "run"), tmp_path / "run")
        return
    for arguments in (["collect", str(tmp_path / "run")], ["ablate", str(tmp_path / "run"), "--layer", "0"]):
        assert cli.main([*arguments, "--data", str(named.path), "--device", "cpu"]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "must begin rows as the model of" in message
        assert f"(no --begin-token), got --begin-token {BOS}" in message
    assert cli.main(["train", "--data", str(named.path), "--out", str(tmp_path / "trained"), "--device", "cpu"]) == 2
    assert "must be made without --begin-token" in capsys.readouterr().err
    assert not (tmp_path / "trained").exists()


def test_our_own_models_begin_a_text_with_the_token_that_ended_their_documents(
    data: TokenDirectory, rng: np.random.Generator, tmp_path: Path
) -> None:
    texts = str(data.path.parent / "texts.jsonl")
    tokens = tokenize([texts], tmp_path / "tokens", "bpe:280", held_out=0.6, end_token="[EOS]")
    end = tokens.tokenizer().token_to_id("[EOS]")
    model = random_model(tiny_config(vocab_size=tokens.vocab_size, context_length=128), rng)
    save_model(model, tmp_path / "run" / "model", tokens.tokenizer(), end=tokens.end_of_text)
    opened = open_model(tmp_path / "run", "cpu")
    assert tokens.end_of_text == end
    assert opened.causal.text_beginning == (end,)
    check_live_equals_recorded(opened, collected(opened, tokens, tmp_path / "run"), tmp_path / "run")
    again = tokenize([texts], tmp_path / "again", str(tmp_path / "run" / "model" / "tokenizer.json"), held_out=0.6)
    assert again.end_of_text == end
