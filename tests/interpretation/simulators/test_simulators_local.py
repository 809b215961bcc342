"""Simulators on a real small model: against the released chain written down naively, and what they compute."""

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

import torch
from fakes.language_models import KINDS, Kind, make_llm
from fixtures.planted_rules import EXPLANATIONS, make_planted, make_tokenizer

from cratelm.activations.records import read_records
from cratelm.data.tokenizer import token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.prompts.simulator import all_at_once_prefix, all_at_once_rows
from cratelm.interpretation.protocols import draw, protocol
from cratelm.interpretation.scoring.correlation import compare
from cratelm.interpretation.simulators.all_at_once import AllAtOnce
from cratelm.interpretation.simulators.opening import METHODS, open_simulator
from cratelm.interpretation.simulators.readout import ReadOut
from cratelm.interpretation.simulators.self_test import require_self_test


def counting_llm(rng: np.random.Generator, kind: Kind) -> Any:
    """A random model that thinks of numbers everywhere: their rows of the head are longer than all others."""
    llm = make_llm(rng, kind=kind)
    strings = token_strings(llm.tokenizer.backend_tokenizer)
    numbers = [i for i, text in enumerate(strings) if text.strip().isdigit()]
    with torch.no_grad():
        head = llm.reader.model.get_output_embeddings().weight
        head *= 0.05
        head[numbers] *= 40
        half = len(numbers) // 2  # opposite rows: at every place some numbers are likelier than all that are none
        head[numbers[half : 2 * half]] = -head[numbers[:half]]
    return llm


def released_expectations(llm: Any, prefix: str, rest: str, tokens: list[str]) -> list[float]:
    """The released read-out: along the model's tokens, at each tab that `unknown` follows, five candidates are read.

    A row counts if the text since the row before is the token asked about; one that holds half a character does not.
    """
    ids = llm.tokenizer.backend_tokenizer.encode(prefix + rest, add_special_tokens=False)
    texts, end = [], 0
    for _, stop in ids.offsets:
        texts.append((prefix + rest)[end:stop])
        end = stop
    with torch.no_grad():
        logits = llm.reader.model(input_ids=torch.tensor([ids.ids]), use_cache=False).logits[0].double().numpy()
    strings = token_strings(llm.tokenizer.backend_tokenizer)
    i = next(i for i in range(len(texts)) if ids.offsets[i][1] >= len(prefix)) + 1
    assert (prefix + rest)[: ids.offsets[i - 1][1]].endswith("<start>\n")
    found: list[float] = []
    current = ""
    while len(found) < len(tokens):
        following = "".join(texts[i + 1 : i + 12])
        if texts[i].endswith("\t") and following.startswith("unknown\n"):
            current += texts[i][:-1]
            known = current == tokens[len(found)]
            best = np.argsort(-logits[i], kind="stable")[:5]
            seen = {strings[one]: float(logits[i, one]) for one in reversed(best)}
            numbers = {int(text): logit for text, logit in seen.items() if text in [str(v) for v in range(11)]}
            total = sum(math.exp(logit) for logit in numbers.values())
            value = sum(v * math.exp(logit) for v, logit in numbers.items()) / total if numbers else 0.0
            found.append(value if known else 0.0)
            passed = ""
            while not passed.endswith("unknown\n"):
                i += 1
                passed += texts[i]
            current = ""
        else:
            current += texts[i]
        i += 1
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_compat_scores_are_those_of_the_released_chain(kind: Kind, rng: np.random.Generator, tmp_path: Path) -> None:
    """Same records, same candidate probabilities, same scores; records hold line breaks, tabs and cut characters."""
    records = read_records(make_planted(tmp_path / "run", rng, mode="compat"), 0, mode="compat")
    # A fixed model: a random one may think of no number at any token.
    llm, explanation = counting_llm(np.random.default_rng(3), kind), EXPLANATIONS[0]
    simulator = asyncio.run(open_simulator("all-at-once", llm, mode="compat"))
    strings = prompt_strings(make_tokenizer(), "compat")
    prefix = all_at_once_prefix(explanation, few_shot_neurons(), top=10, unknown="unknown", escaped=False)
    scored = draw(records, protocol("top-and-random", "compat").score, "score").take((3, 4, 5, 6))
    for neuron in range(2):
        excerpts = list(scored.of(neuron))
        tokens = [[strings[token] for token in excerpt.tokens.tolist()] for excerpt in excerpts]
        assert any("\n" in token or "\N{REPLACEMENT CHARACTER}" in token for one in tokens for token in one)
        simulated = np.concatenate(asyncio.run(simulator.simulate(explanation, tokens)))
        expected: list[float] = []
        for one in tokens:
            expected += released_expectations(llm, prefix, all_at_once_rows(one, unknown="unknown")[0], one)
        assert simulated == pytest.approx(expected, abs=1e-9)
        assert np.ptp(expected) > 1e-3
        a = np.concatenate([excerpt.activations for excerpt in excerpts]).astype(np.float64)
        s = np.array(expected)
        own = scored.rows(np.array([neuron]))
        laid = np.zeros(own.tokens.shape, dtype=np.float32)
        laid[own.valid] = simulated
        found = compare(own, laid)
        assert found.correlation[0] == pytest.approx(np.corrcoef(a, s)[0, 1], abs=1e-6)
        assert found.r_squared[0] == pytest.approx(1 - np.mean((a - s) ** 2) / np.mean(a**2), rel=1e-6, abs=1e-6)
        deviation = 1 - np.mean(np.abs(a - s)) / np.mean(np.abs(a))
        assert found.absolute_deviation[0] == pytest.approx(deviation, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_read_whatever_the_tokenizer(kind: Kind, rng: np.random.Generator) -> None:
    """Against the whole distribution at the end of the text up to each activation, computed alone."""
    llm = counting_llm(rng, kind)
    simulator = asyncio.run(open_simulator("all-at-once", llm))
    assert isinstance(simulator, AllAtOnce)
    assert str(simulator.name) == ("all-at-once:small" if kind == "ten" else "all-at-once-0-9:small")
    tokens = ["The", r"\n", r"\xc3", "é", "", " 10", "х→", r" \t", "."]
    (found,) = asyncio.run(simulator.simulate("brackets", [tokens]))
    prefix = all_at_once_prefix("brackets", few_shot_neurons(), top=simulator.read_out.top, unknown="unknown")
    rest, places = all_at_once_rows(tokens, unknown="unknown")
    strings = token_strings(llm.tokenizer.backend_tokenizer)
    expected = []
    for place in places:
        ids = llm.tokenizer.backend_tokenizer.encode(prefix + rest[:place], add_special_tokens=False).ids
        with torch.no_grad():
            logits = llm.reader.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        best: dict[str, float] = {}
        for one in logits.argsort(descending=True)[:15].tolist():
            best[strings[one]] = float(np.logaddexp(best.get(strings[one], -np.inf), float(logits[one])))
        expected.append(ReadOut(top=simulator.read_out.top).expected(best) or 0.0)
    assert found == pytest.approx(expected, abs=1e-9)
    assert simulator.counts["tokens"] == len(tokens)


def test_an_explanation_costs_its_own_tokens_and_those_of_its_excerpts(rng: np.random.Generator) -> None:
    llm = counting_llm(rng, "ten")
    simulator = asyncio.run(open_simulator("all-at-once", llm))
    excerpts = [[" the", " rain", ";"] * n for n in (3, 5, 2, 9)]
    rows = [all_at_once_rows(tokens, unknown="unknown")[0] for tokens in excerpts]

    async def both() -> None:
        await asyncio.gather(*(simulator.simulate(said, excerpts) for said in ("brackets", "words for the weather")))

    asyncio.run(both())
    for explanation in ("digits after a colon", "brackets"):
        before = llm.reader.tokens_computed
        asyncio.run(simulator.simulate(explanation, excerpts))
        explained = llm.count(f" {explanation}\nActivations:\n<start>\n")
        assert 0 < llm.reader.tokens_computed - before <= sum(map(llm.count, rows)) + explained


@pytest.mark.parametrize("method", METHODS)
def test_a_randomly_initialised_model_is_refused(method: str, rng: np.random.Generator) -> None:
    llm = make_llm(rng, max_position_embeddings=8192, tokens_at_once=8192)
    if method == "structured":  # an answer of thousands of tokens, which are drawn one by one, would say no more
        llm._ends = frozenset(range(100, 500))
    simulator = asyncio.run(open_simulator(method, llm))
    with pytest.raises(CrateError, match=rf"^{simulator.name} cannot simulate: on 6 obvious neurons its mean"):
        asyncio.run(require_self_test(simulator))
