"""Explaining, simulating and scoring neuron by neuron with a language model whose answers the test writes."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.scripted import ScriptedLLM, simulate, strongest_tokens
from fixtures.synthetic import CONSTANT, DEAD, FIRST_TOKEN_NEURON, NOISE, RARE, make_run

from cratelm.activations.records import read_records, records_tokenizer
from cratelm.data.tokenizer import load_tokenizer
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.llm import LLMError, Message, Sampling
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scoring.correlation import NO_EXPLANATION, NO_SIMULATION, NOT_CHOSEN, LayerScores
from cratelm.interpretation.simulators.language_model import simulate_set
from cratelm.interpretation.stages.pipeline import score_set
from cratelm.interpretation.stages.set_task import SetTask, failures
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.neuron_selection import chosen
from cratelm.interpretation.store.schema import SetKey

KEY = SetKey(layer=1, protocol="top-and-random", explainer="scripted")
SIMULATED = replace(KEY, simulator="by-rule scripted")


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "run", rng)


def task(run: Path, key: SetKey = KEY, *, neurons: str = "all", part: tuple[int, int] = (1, 1)) -> SetTask:
    return SetTask(
        store=Store.create(run, part[0] if part != (1, 1) else 0), key=key, chosen=chosen(neurons), part=part,
        records=read_records(run, key.layer), protocol=protocol(key.protocol), in_flight=4,
    )  # fmt: skip


def strings(run: Path) -> list[str]:
    return prompt_strings(load_tokenizer(records_tokenizer(run, "fixed")))


def explainer(run: Path, llm: ScriptedLLM, **settings: Any) -> LLMExplainer:
    return LLMExplainer(llm=llm, settings=explainer_settings("fixed", **settings), strings=strings(run))


def interpret(
    run: Path, llm: ScriptedLLM, *, simulator: Any = simulate, control: str = "", neurons: str = "all", **settings: Any
) -> LayerScores:
    key = replace(SIMULATED, control=control)
    asyncio.run(explainer(run, llm, **settings).explain(task(run, neurons=neurons)))
    asyncio.run(simulate_set(task(run, key, neurons=neurons), simulator, {"by": "rule"}, strings(run)))
    return asyncio.run(score_set(task(run, key)))


def test_true_explanations_score_high_and_those_of_others_near_nothing(run: Path) -> None:
    llm = ScriptedLLM()
    scores = interpret(run, llm)
    assert scores.reason[:NOISE] == ("dead", "too rare", "constant activations")
    assert scores.correlation[FIRST_TOKEN_NEURON:].mean() > 0.8
    shuffled = interpret(run, llm, control="shuffled")
    assert np.nanmean(shuffled.correlation[FIRST_TOKEN_NEURON:]) < 0.4
    constant = interpret(run, llm, control="constant")
    assert set(constant.reason[NOISE:]) == {"constant simulation"}
    assert len(llm.asked) == 12 - FIRST_TOKEN_NEURON + 2, "dead and rare neurons are asked about, or somebody twice"
    assert Store.open(run).texts(replace(SIMULATED, control="shuffled"))[5] != Store.open(run).texts(SIMULATED)[5]


def test_a_sample_is_scored_alone_and_grows(run: Path) -> None:
    llm = ScriptedLLM()
    few = interpret(run, llm, neurons="4")
    assert few.neuron.tolist() == [1, 4, 7, 10]
    assert few.reason[0] == "too rare"
    assert len(llm.asked) == 3
    whole = few.of_layer(12)
    assert whole.reason[DEAD] == whole.reason[5] == NOT_CHOSEN
    np.testing.assert_array_equal(whole.correlation[few.neuron], few.correlation)
    assert (whole.tokens[5], np.isnan(whole.correlation[5])) == (0, True)
    everyone = interpret(run, llm, neurons="all")
    assert len(everyone.neuron) == 12
    assert len(llm.asked) == 10
    np.testing.assert_array_equal(everyone.correlation[few.neuron], few.correlation)
    assert len(interpret(run, llm, neurons="4").neuron) == 12, "a larger sample that is there already was cut"
    assert len(llm.asked) == 10


def test_what_goes_wrong_is_counted_with_its_text_and_never_scored(run: Path) -> None:
    def answer(messages: Sequence[Message], sampling: Sampling) -> str:
        said = strongest_tokens(messages, sampling)
        return "I'm sorry, I cannot say." if refused(said) else said

    def refused(said: str) -> bool:
        return said.strip(" .") == texts[5]

    async def fails(explanation: str, excerpts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        if explanation == texts[7]:
            raise LLMError("unreadable: 3 numbers for 64 tokens")
        return await simulate(explanation, excerpts)

    interpret(run, ScriptedLLM())
    texts = Store.open(run).texts(KEY)
    (run / "interpretation.sqlite").unlink()
    scores = interpret(run, ScriptedLLM(answer), simulator=fails)
    assert [scores.reason[i] for i in (DEAD, RARE, 5, 6, 7)] == ["dead", "too rare", NO_EXPLANATION, "", NO_SIMULATION]
    assert scores.reason[CONSTANT] == "constant activations"
    assert np.isnan(scores.correlation[[5, 7]]).all()
    store = Store.open(run)
    assert failures(store, KEY, "explain") == {5: 'refused: "I\'m sorry, I cannot say."'}
    assert failures(store, SIMULATED, "simulate") == {7: "unreadable: 3 numbers for 64 tokens"}


def test_another_temperature_makes_explanations_and_simulations_again(run: Path) -> None:
    llm = ScriptedLLM()
    interpret(run, llm)
    first = len(llm.asked)
    assert {sampling.temperature for _, sampling in llm.asked} == {0.0}
    interpret(run, llm)
    assert len(llm.asked) == first
    interpret(run, llm, temperature=0.5, seed=3)
    assert len(llm.asked) == 2 * first
    assert {(one.temperature, one.seed) for _, one in llm.asked[first:]} == {(0.5, 3)}
    key = replace(KEY, sample=2)
    asyncio.run(explainer(run, llm, samples=3).explain(task(run, key)))
    assert {(one.temperature, one.seed) for _, one in llm.asked[2 * first :]} == {(1.0, 2)}


def test_several_samples_at_temperature_0_are_refused() -> None:
    with pytest.raises(CrateError, match="same explanation every time"):
        explainer_settings("fixed", samples=2, temperature=0.0)


def test_a_context_that_is_too_short_is_refused_before_anything_is_asked(run: Path) -> None:
    llm = ScriptedLLM(context=150)
    with pytest.raises(CrateError, match="tokens without any example, .* context of 150") as refusal:
        interpret(run, llm)
    assert not isinstance(refusal.value, LLMError)
    assert llm.asked == []


def test_parts_ask_about_their_own_share(run: Path) -> None:
    shares: list[set[int]] = []
    for number in (1, 2, 3):
        llm = ScriptedLLM()
        part = task(run, part=(number, 3))
        asyncio.run(explainer(run, llm).explain(part))
        asyncio.run(simulate_set(task(run, SIMULATED, part=(number, 3)), simulate, {"by": "rule"}, strings(run)))
        assert len(llm.asked) == len(part.share)
        shares.append(part.share)
    assert sorted(neuron for share in shares for neuron in share) == list(range(CONSTANT, 12))
    with pytest.raises(CrateError, match="is not there. Run: cratelm interpret"):
        asyncio.run(simulate_set(
            task(run, replace(SIMULATED, control="shuffled"), part=(1, 3)), simulate, {}, strings(run)
        ))  # fmt: skip


@pytest.mark.parametrize(("text", "indices"), [
    ("all", list(range(12))), ("99", list(range(12))), ("3", [2, 6, 10]), ("1", [6]), ("0-2,5", [0, 1, 2, 5]),
    ("7-7", [7]), ("5,1", [1, 5]),
])  # fmt: skip
def test_neurons_are_chosen_by_number_or_name(text: str, indices: list[int]) -> None:
    assert chosen(text).of(12).tolist() == indices


def test_a_random_choice_is_the_same_for_every_model_and_even_choices_are_even(rng: np.random.Generator) -> None:
    one, other = (chosen("40", seed=seed).of(500, layer=2).tolist() for seed in (1, 2))
    assert one == chosen("40", seed=1).of(500, layer=2).tolist() != other
    assert len(set(one)) == 40
    count, size = int(rng.integers(1, 300)), 300
    even = chosen(str(count)).of(size)
    assert len(set(even.tolist())) == count
    assert np.ptp(np.diff(even)) <= 1 if count > 2 else True


@pytest.mark.parametrize(("text", "said"), [
    ("0", "must be at least 1, got 0"), ("x", "must be all"), ("3-1", "ascending order"), ("1,,2", "must be all"),
])  # fmt: skip
def test_a_choice_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(CrateError, match=said):
        chosen(text)


def test_an_index_beyond_the_layer_is_refused() -> None:
    with pytest.raises(CrateError, match="layer 3 has neurons 0 to 11, not 12"):
        chosen("0-12").of(12, layer=3)
