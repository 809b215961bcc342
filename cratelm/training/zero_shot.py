"""Zero-shot evaluation, as the paper reports it: the loss on texts the model was not trained for.

The paper's number is the cross-entropy of every token of the concatenated text; LAMBADA's metrics, accuracy and
perplexity of the last word of each passage, are measured too.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from cratelm.data.special_tokens import end_of_text_id
from cratelm.data.text import stream_documents
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.runtime import progress_bar
from cratelm.training.evaluate import Evaluation, document_losses, summarise


@dataclass(frozen=True, kw_only=True, slots=True)
class _Corpus:
    """A text that the paper evaluates on, and its source."""

    file: str
    """Its name in a folder of evaluation data."""
    hub: tuple[str, str]
    """The data set and configuration on the hub, split `test`."""
    field: str
    """The column of the text."""
    revision: str | None = None
    rows_are_documents: bool = False
    """Whether each row is a separate passage; otherwise the rows are lines of one text."""


CORPORA: Mapping[str, _Corpus] = {
    "lambada": _Corpus(
        file="lambada_test.jsonl", hub=("EleutherAI/lambada_openai", "default"), field="text", rows_are_documents=True,
    ),
    "wikitext2": _Corpus(file="wikitext2-test.txt", hub=("Salesforce/wikitext", "wikitext-2-v1"), field="text"),
    "ptb": _Corpus(
        file="ptb-test.txt", hub=("ptb-text-only/ptb_text_only", "penn_treebank"), field="sentence",
        revision="refs/convert/parquet",
    ),
}  # fmt: skip

LAST_WORD = ("lambada",)
"""The corpora made for predicting the last word of a passage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWord:
    """How well a model predicts the last word of passages, given all before it."""

    accuracy: float
    """Share of passages for which every token of the last word is the most probable one."""
    standard_error: float
    """Of the accuracy, over passages."""
    perplexity: float
    """exp of the mean over passages of the last word's cross-entropy in nats, summed over its tokens."""
    passages: int


def zero_shot(
    model: LanguageModel, tokenizer: Tokenizer, name: str, source: str, *, batch: int, end: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """All measurements on one text, as written to evaluation.json.

    `name` is one of `CORPORA`, or the path of a text; `source` is a folder that holds the corpora, or `hub`. `end`
    is as in `token_loss`.
    """
    texts = read_texts(name, source)
    result = asdict(token_loss(model, tokenizer, texts, batch=batch, what=name, end=end))
    if name in LAST_WORD:
        result["last_word"] = asdict(last_word(model, tokenizer, texts, batch=batch))
    return result


def read_texts(name: str, source: str) -> list[str]:
    """The documents of a text: the passages of LAMBADA, or the whole of a text file."""
    if name in CORPORA and source == "hub":
        return _from_hub(CORPORA[name])
    path = Path(source) / CORPORA[name].file if name in CORPORA else Path(name)
    if not path.exists():
        known = f"{', '.join(CORPORA)}, or a text file"
        missing = f"{path} is missing" if name in CORPORA else f"there is no text {name} (known: {known})"
        raise CrateError(f"{missing}. Give a folder that holds {CORPORA['lambada'].file} and the like, or hub")
    texts = [document.text for document in stream_documents([str(path)])]
    if not texts:
        raise CrateError(f"{path} is empty. Give a file with text")
    return texts


def token_loss(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], *, batch: int, what: str = "evaluate",
    end: int | None = None,
) -> Evaluation:  # fmt: skip
    """Cross-entropy of every token of the texts, one after the other as in training: each ends with the token `end`.

    `end` is by default `<|endoftext|>`. Another one precedes the first text, so that its first token is predicted too.
    The standard error is over the texts, or for a single text over stretches as long as the model's context.
    """
    end = end_of_text_id(tokenizer) if end is None else end
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    stream = np.fromiter(_stream(encoded, end), dtype=np.int64)
    check_vocabulary(model, stream)
    if len(texts) > 1:
        bounds = np.cumsum([1, *(len(ids) + 1 for ids in encoded)])
    else:
        bounds = np.append(np.arange(1, len(stream), model.config.context_length), len(stream))
    size = sum(len(text.encode()) for text in texts)
    with progress_bar(what, total=len(stream)) as bar:
        return summarise(document_losses(model, stream, bounds, batch=batch, bar=bar), text_bytes=size)


def _stream(encoded: Sequence[Sequence[int]], end: int) -> Iterator[int]:
    yield end
    for ids in encoded:
        yield from ids
        yield end


@torch.inference_mode()
def last_word(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], *, batch: int) -> LastWord:
    """Predict the last word of each text, with the space before it, from as much of the rest as the context holds."""
    pairs = sorted((_split(text, tokenizer) for text in texts), key=lambda pair: len(pair[0]) + len(pair[1]))
    nats, hits = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    with progress_bar("last words", total=len(pairs), unit="passages") as bar:
        for first in range(0, len(pairs), batch):
            rows = slice(first, first + batch)
            nats[rows], hits[rows] = zip(*_predict(model, pairs[rows]), strict=True)
            bar.advance(len(pairs[rows]))
    accuracy = float(hits.mean())
    return LastWord(
        accuracy=accuracy, standard_error=math.sqrt(accuracy * (1 - accuracy) / max(1, len(pairs) - 1)),
        perplexity=math.exp(nats.mean()), passages=len(pairs),
    )  # fmt: skip


def _split(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The token ids of a text, split before its last word."""
    before, space, _ = text.rstrip().rpartition(" ")
    if not space or not before.strip():
        raise CrateError(f"a passage must have at least two words, got {text[:60]!r}")
    ids = tokenizer.encode(text.rstrip(), add_special_tokens=False).ids
    cut = len(tokenizer.encode(before.rstrip(), add_special_tokens=False).ids)
    return ids[:cut], ids[cut:]


def _predict(model: LanguageModel, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
    """Cross-entropy in nats of each last word, and whether it is the most probable. Rows are padded on the right."""
    longest = model.config.context_length + 1
    rows = [(before + word)[-longest:] for before, word in pairs]
    width = max(map(len, rows)) - 1
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
    features = model.features(tokens.to(model.device))
    for row, (ids, (_, word)) in enumerate(zip(rows, pairs, strict=True)):
        count = min(len(word), len(ids) - 1)
        logits = F.linear(features[row, len(ids) - 1 - count : len(ids) - 1], model.embedding.weight).float()
        targets = torch.tensor(ids[-count:], device=logits.device)
        hit = bool((logits.argmax(-1) == targets).all())
        yield F.cross_entropy(logits, targets, reduction="sum").item(), hit


def check_vocabulary(model: LanguageModel, tokens: np.ndarray) -> None:
    """Raise CrateError if a token has no embedding in the model."""
    if tokens.max(initial=0) >= model.config.vocab_size:
        raise CrateError(
            f"the tokenizer gives id {tokens.max()}, the model's vocabulary has {model.config.vocab_size} rows. "
            "Put the model's own tokenizer.json next to its weights"
        )


def _from_hub(corpus: _Corpus) -> list[str]:
    name, config = corpus.hub
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise CrateError("evaluation data from the hub needs an extra. Run: pip install 'cratelm[hf]'") from None
    try:
        rows = datasets.load_dataset(name, config, split="test", revision=corpus.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CrateError(f"{name} could not be fetched from the hub ({reason}). Give --eval-data FOLDER") from error
    lines = [str(row[corpus.field]) for row in rows]
    if corpus.rows_are_documents:
        return lines
    return ["".join(line if line.endswith("\n") else f"{line}\n" for line in lines)]
