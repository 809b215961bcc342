"""Zero-shot evaluation: the same numbers as a token-by-token reading, and as lm-eval's on the same file."""

import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.synthetic import END, WORDS, make_tokenizer
from tokenizers import Tokenizer

from cratelm import cli
from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import save_model
from cratelm.training.zero_shot import last_word, read_texts, token_loss

CONTEXT = 40


def make_model(arch: Any, seed: int) -> LanguageModel:
    """A model with opinions: without training every next token would cost the same."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "num_layers": 1,
        "d_model": 16,
        "num_heads": 2,
        "vocab_size": 384,
        "context_length": CONTEXT,
    }
    model = LanguageModel(ModelConfig(arch=arch, **size)).initialise(seed).eval()
    with torch.no_grad():
        model.embedding.weight.add_(0.5 * torch.randn_like(model.embedding.weight))
    return model


@pytest.fixture
def model(rng: np.random.Generator) -> LanguageModel:
    return make_model("crate", int(rng.integers(2**31)))


@pytest.fixture
def passages(rng: np.random.Generator) -> list[str]:
    words = [word.strip() for word in WORDS if word.strip()]
    return [" ".join(rng.choice(words, size=int(rng.integers(3, 30))).tolist()) for _ in range(30)]


@pytest.fixture
def folder(tmp_path: Path, passages: list[str]) -> Path:
    """A folder of evaluation data, in the files' real layout."""
    rows = "".join(json.dumps({"text": passage}) + "\n" for passage in passages)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "lambada_test.jsonl").write_text(rows)
    (tmp_path / "eval" / "ptb-test.txt").write_text(" \n ".join(passages[:9]) + " \n")
    (tmp_path / "eval" / "wikitext2-test.txt").write_text(" = Title = \n" + "\n".join(passages[9:]))
    return tmp_path / "eval"


@pytest.fixture
def run(tmp_path: Path, model: LanguageModel) -> Path:
    save_model(model, tmp_path / "run" / "model", make_tokenizer())
    return tmp_path / "run"


def costs(model: LanguageModel, ids: list[int]) -> list[float]:
    """The nats of every token but the first, each predicted from what its window of CONTEXT tokens holds before it."""
    actual = []
    for position in range(1, len(ids)):
        start = (position - 1) // CONTEXT * CONTEXT
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:position]]))[0, -1].double()
        actual.append(-logits.log_softmax(-1)[ids[position]].item())
    return actual


def stream_of(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    (end,) = tokenizer.encode(END).ids
    return [end] + [i for text in texts for i in (*tokenizer.encode(text).ids, end)]


def test_every_token_of_the_texts_is_predicted_once(model: LanguageModel, passages: list[str]) -> None:
    tokenizer = make_tokenizer()
    actual = token_loss(model, tokenizer, passages[:7], batch=3)
    ids = stream_of(passages[:7], tokenizer)
    expected = costs(model, ids)
    assert actual.tokens == len(expected) == len(ids) - 1
    assert actual.documents == 7
    assert actual.nats_per_token == pytest.approx(np.mean(expected), abs=1e-5)
    assert actual.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    size = sum(len(passage.encode()) for passage in passages[:7])
    assert actual.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / size, rel=1e-4)
    ends = [i for i, token in enumerate(ids[1:]) if token == ids[0]]
    sums = [sum(expected[a:b]) for a, b in zip([0, *(i + 1 for i in ends)], [i + 1 for i in ends], strict=False)]
    sizes = np.diff([-1, *ends])
    spread = sum((s - n * np.mean(expected)) ** 2 for s, n in zip(sums, sizes, strict=True)) * 7 / 6
    assert actual.standard_error == pytest.approx(math.sqrt(spread) / len(expected), rel=1e-3)
    assert token_loss(model, tokenizer, passages[:7], batch=16) == actual


def test_one_text_has_an_error_over_its_stretches(model: LanguageModel, passages: list[str]) -> None:
    tokenizer = make_tokenizer()
    text = " \n ".join(passages)
    actual = token_loss(model, tokenizer, [text], batch=4)
    expected = costs(model, stream_of([text], tokenizer))
    assert actual.nats_per_token == pytest.approx(np.mean(expected), abs=1e-5)
    assert actual.documents == math.ceil(len(expected) / CONTEXT)
    assert 0 < actual.standard_error < 1


@pytest.mark.parametrize("batch", [1, 7])
def test_the_last_word_is_predicted_whole_from_the_text_that_fits_the_context(
    batch: int, model: LanguageModel, passages: list[str]
) -> None:
    tokenizer = make_tokenizer()
    nats, hits = [], []
    for passage in passages:
        before, _, _ = passage.rpartition(" ")
        ids, cut = tokenizer.encode(passage).ids, len(tokenizer.encode(before).ids)
        window = ids[-(CONTEXT + 1) :]
        with torch.no_grad():
            log_p = model(torch.tensor([window[:-1]]))[0].double().log_softmax(-1)
        word = range(len(window) - len(ids) + cut - 1, len(window) - 1)
        nats.append(-sum(log_p[i, window[i + 1]].item() for i in word))
        hits.append(all(log_p[i].argmax().item() == window[i + 1] for i in word))
    actual = last_word(model, tokenizer, passages, batch=batch)
    assert actual.passages == 30
    assert actual.accuracy == pytest.approx(np.mean(hits))
    assert actual.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert actual.standard_error == pytest.approx(np.std(hits, ddof=1) / math.sqrt(30))


def test_a_model_that_knows_the_words_is_right(model: LanguageModel) -> None:
    tokenizer = make_tokenizer()
    word, target = next((w, ids) for w in WORDS if w.isalpha() and len(ids := tokenizer.encode(f" {w}").ids) == 1)
    texts = [f"the neuron {word}", f"of a layer {word}"]
    with torch.no_grad():  # the head is the embedding: make one row win everywhere
        model.embedding.weight[target[0]] = 10.0
        model.get_parameter("norm.weight").zero_()
        model.get_parameter("norm.bias").fill_(1.0)
    assert last_word(model, tokenizer, texts, batch=2).accuracy == 1.0


def test_the_command_writes_and_prints_every_text_and_keeps_earlier_results(
    run: Path, folder: Path, passages: list[str], model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluation.json").write_text(json.dumps({"split": "val", "nats_per_token": 3.25}))
    (folder.parent / "own.txt").write_text(passages[0])
    texts = f"lambada, wikitext2,ptb,{folder.parent / 'own.txt'}"
    assert cli.main(["evaluate", str(run), "--zero-shot", texts, "--eval-data", str(folder)]) == 0
    printed = capsys.readouterr().out
    actual = json.loads((run / "evaluation.json").read_text())
    assert actual["nats_per_token"] == 3.25
    assert list(actual["zero_shot"]) == ["lambada", "wikitext2", "ptb", str(folder.parent / "own.txt")]
    tokenizer = make_tokenizer()
    for name, row in actual["zero_shot"].items():
        assert f"{row['nats_per_token']:.4f}" in printed
        assert ("last_word" in row) == (name == "lambada")
    expected = token_loss(model, tokenizer, passages, batch=16)
    assert actual["zero_shot"]["lambada"]["nats_per_token"] == pytest.approx(expected.nats_per_token, abs=1e-6)
    assert cli.main(["evaluate", str(run), "--zero-shot", "ptb", "--eval-data", str(folder)]) == 0
    again = json.loads((run / "evaluation.json").read_text())
    strip = {name: {k: v for k, v in row.items() if k != "origin"} for name, row in again["zero_shot"].items()}
    assert strip == {name: {k: v for k, v in row.items() if k != "origin"} for name, row in actual["zero_shot"].items()}


def test_texts_end_in_the_token_that_ended_the_documents_of_training(
    folder: Path, model: LanguageModel, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    (end,) = (tokenizer.token_to_id(word) for word in WORDS[:1])
    save_model(model, tmp_path / "run" / "model", tokenizer, end=end)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--zero-shot", "ptb", "--eval-data", str(folder)]) == 0
    actual = json.loads((tmp_path / "run" / "evaluation.json").read_text())["zero_shot"]["ptb"]["nats_per_token"]
    texts = read_texts("ptb", str(folder))
    assert actual == pytest.approx(token_loss(model, tokenizer, texts, batch=16, end=end).nats_per_token, abs=1e-6)
    assert actual != pytest.approx(token_loss(model, tokenizer, texts, batch=16).nats_per_token, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no text to evaluate on"),
        (["--zero-shot", "lambda", "--eval-data", "{folder}"], "there is no text lambda (known: lambada"),
        (["--zero-shot", "ptb", "--eval-data", "{folder}/none"], "ptb-test.txt is missing"),
    ],
)
def test_a_missing_text_gets_one_line(
    arguments: list[str], message: str, run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(run), *(argument.format(folder=folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_a_fitting_tokenizer_is_refused(
    folder: Path, model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model, tmp_path / "mute" / "model")
    assert cli.main(["evaluate", str(tmp_path / "mute"), "--zero-shot", "ptb", "--eval-data", str(folder)]) == 2
    assert "must have a tokenizer.json, got none" in capsys.readouterr().err
    small = LanguageModel(ModelConfig(arch="crate", num_layers=1, d_model=8, num_heads=1, vocab_size=20))
    with pytest.raises(CrateError, match="vocabulary has 20 rows"):
        token_loss(small, make_tokenizer(), ["the neuron"], batch=1)
    with pytest.raises(CrateError, match="must have at least two words"):
        last_word(model, make_tokenizer(), ["the neuron", "word"], batch=1)


def test_the_hub_is_asked_for_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str, *, split: str, revision: str | None) -> list[dict[str, str]]:
        asked.append((name, config, split, revision))
        if "lambada" in name:
            return [{"text": "first passage"}, {"text": "second one"}]
        return [{"text": " = T = \n"}, {"text": "line\n"}] if "wikitext" in name else [{"sentence": "a b"}] * 2

    module = types.ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(__import__("sys").modules, "datasets", module)
    assert read_texts("lambada", "hub") == ["first passage", "second one"]
    assert read_texts("wikitext2", "hub") == [" = T = \nline\n"]
    assert read_texts("ptb", "hub") == ["a b\na b\n"]
    assert [one[:3] for one in asked] == [
        ("EleutherAI/lambada_openai", "default", "test"), ("Salesforce/wikitext", "wikitext-2-v1", "test"),
        ("ptb-text-only/ptb_text_only", "penn_treebank", "test"),
    ]  # fmt: skip

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no\nnetwork")

    vars(module)["load_dataset"] = offline
    with pytest.raises(CrateError, match=r"could not be fetched from the hub \(no network\)"):
        read_texts("ptb", "hub")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(CrateError, match=r"pip install 'cratelm\[hf\]'"):
        read_texts("ptb", "hub")


def test_the_real_files_are_read_whole(real_data: Path) -> None:
    passages = read_texts("lambada", str(real_data / "eval"))
    assert len(passages) == 5153
    assert all(" " in passage for passage in passages)
    for name in ("wikitext2", "ptb"):
        (text,) = read_texts(name, str(real_data / "eval"))
        assert len(text.encode()) == (real_data / "eval" / f"{name}-test.txt").stat().st_size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_lm_eval_finds_the_same_on_the_same_file(
    arch: str, tmp_path: Path, folder: Path, passages: list[str], rng: np.random.Generator
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test-all installs it)")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = make_model(arch, int(rng.integers(2**31)))
    save_model(model, tmp_path / "model", make_tokenizer())
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "local_last_word", "dataset_path": "json", "output_type": "loglikelihood", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "lambada_test.jsonl")}},
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }  # fmt: skip
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))
    results = simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32", device="cpu",
        tasks=["local_last_word"], task_manager=TaskManager(include_path=str(tmp_path / "tasks")), batch_size=4,
        bootstrap_iters=0, cache_requests=False,
    )["results"]["local_last_word"]  # fmt: skip
    actual = last_word(model, make_tokenizer(), passages, batch=8)
    assert results["acc,none"] == pytest.approx(actual.accuracy)
    assert results["perplexity,none"] == pytest.approx(actual.perplexity, rel=1e-4)
