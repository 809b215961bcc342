"""Losses of two models compared by document, against a jackknife and a simulation; what cannot be paired."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cratelm import rundir
from cratelm.errors import CrateError
from cratelm.report.results.loss import DOCUMENTS, DocumentLosses, Loss, loss_difference, read_loss


def loss_of(nats: np.ndarray, tokens: np.ndarray) -> Loss:
    return Loss(
        nats_per_token=float(nats.sum() / tokens.sum()), standard_error=9.0, perplexity=1.0, bits_per_byte=1.0,
        tokens=int(tokens.sum()), documents=len(tokens), split="val", data_hash="data",
        by_document=DocumentLosses(nats=nats, tokens=tokens),
    )  # fmt: skip


def two_models(rng: np.random.Generator, documents: int, shift: float = 0.0) -> tuple[Loss, Loss]:
    """Documents of very different difficulty, on which two models nearly agree."""
    tokens = rng.integers(20, 400, size=documents)
    hard = tokens * rng.uniform(1, 6, size=documents)
    apart = tokens * (shift + rng.normal(0, 0.05, size=documents))
    return loss_of(hard + apart, tokens), loss_of(hard, tokens)


def test_the_difference_has_the_standard_error_of_a_jackknife_over_documents(rng: np.random.Generator) -> None:
    for documents in (40, 300):
        first, second = two_models(rng, documents, shift=0.02)
        a, b = first.by_document, second.by_document
        assert a is not None
        assert b is not None
        found = loss_difference(first, second)
        assert found.nats == pytest.approx(first.nats_per_token - second.nats_per_token)
        left_out = []
        for i in range(documents):
            rest = np.arange(documents) != i
            left_out.append((a.nats - b.nats)[rest].sum() / a.tokens[rest].sum())
        jackknife = math.sqrt((documents - 1) * np.var(left_out))
        assert found.standard_error == pytest.approx(jackknife, rel=0.1)


def test_models_that_do_not_differ_are_called_clearly_different_once_in_twenty(rng: np.random.Generator) -> None:
    called = np.mean([loss_difference(*two_models(rng, 100)).clear for _ in range(600)])
    assert 0.02 < called < 0.1
    assert np.mean([loss_difference(*two_models(rng, 100, shift=0.05)).clear for _ in range(100)]) > 0.95


def test_only_losses_on_the_same_documents_are_paired(rng: np.random.Generator) -> None:
    first, second = two_models(rng, 30)
    shifted = two_models(rng, 30)[1]
    others = [
        replace(second, data_hash="other"), replace(second, split="test"), replace(second, by_document=None),
        replace(second, data_hash=None), two_models(rng, 29)[1], shifted,
    ]  # fmt: skip
    for other in others:
        for found, sign in ((loss_difference(first, other), 1), (loss_difference(other, first), -1)):
            assert found.standard_error is None
            assert found.nats == pytest.approx(sign * (first.nats_per_token - other.nats_per_token))
    unknown = (replace(first, data_hash=None), replace(second, data_hash=None))
    assert loss_difference(*unknown).standard_error is None
    alone = two_models(rng, 1)
    assert loss_difference(*alone).standard_error is None
    assert loss_difference(first, second).standard_error is not None


@pytest.fixture
def evaluated(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, dict[str, np.ndarray], dict[str, str]]:
    """A run with an evaluation and its documents, what these hold, and what is written into them."""
    tokens = rng.integers(20, 400, size=25)
    arrays = {"nats": tokens * rng.uniform(1, 6, size=25), "tokens": tokens}
    rundir.write_json(tmp_path / "evaluation.json", {
        "split": "val", "data_hash": "data", "documents": 25, "tokens": int(tokens.sum()), "perplexity": None,
        "nats_per_token": float(arrays["nats"].sum() / tokens.sum()), "standard_error": 0.1, "bits_per_byte": 1.0,
    })  # fmt: skip
    named = {"split": "val", "data_hash": "data", "format_version": "1"}
    save_file(arrays, tmp_path / DOCUMENTS, metadata=named)
    return tmp_path, arrays, named


def test_documents_of_another_evaluation_are_left_aside(
    evaluated: tuple[Path, dict[str, np.ndarray], dict[str, str]],
) -> None:
    run, arrays, named = evaluated
    loss = read_loss(run)
    assert loss is not None
    assert loss.by_document is not None
    np.testing.assert_array_equal(loss.by_document.nats, arrays["nats"])
    stale = [
        (arrays, {**named, "split": "test"}), (arrays, {**named, "data_hash": "other"}),
        ({**arrays, "nats": 1.0001 * arrays["nats"]}, named), ({name: one[:-1] for name, one in arrays.items()}, named),
    ]  # fmt: skip
    for other, said in stale:
        save_file({name: np.ascontiguousarray(one) for name, one in other.items()}, run / DOCUMENTS, metadata=said)
        found = read_loss(run)
        assert found is not None
        assert found.by_document is None
        assert found.nats_per_token == loss.nats_per_token
    (run / DOCUMENTS).unlink()
    assert read_loss(run) == replace(loss, by_document=None)


def test_broken_documents_are_refused_with_the_command_that_makes_them(
    evaluated: tuple[Path, dict[str, np.ndarray], dict[str, str]],
) -> None:
    run, arrays, named = evaluated
    (run / DOCUMENTS).write_bytes((run / DOCUMENTS).read_bytes()[:-9])
    with pytest.raises(CrateError, match=f"is not readable .*Run: cratelm evaluate {run} --data DIR$"):
        read_loss(run)
    save_file(arrays, run / DOCUMENTS, metadata={**named, "format_version": "99"})
    with pytest.raises(CrateError, match="format version 99"):
        read_loss(run)
    evaluation = run / "evaluation.json"
    evaluation.write_text(json.dumps({"zero_shot": {}}))
    assert read_loss(run) is None
    evaluation.write_text("[")
    with pytest.raises(CrateError, match=f"run: cratelm evaluate {run} --data DIR$"):
        read_loss(run)
