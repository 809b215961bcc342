"""Scorers on a whole layer: what is kept, what is asked again, what is counted."""

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.judges import Answer, Judge, answers
from fixtures.synthetic import CONSTANT, DEAD, FIRST_TOKEN_NEURON, RARE, make_run

from cratelm import CrateError, read_records
from cratelm.activations.records import records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_bytes
from cratelm.interpretation.lookup.explain import explain_layer
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.registry import aggregate_scorer
from cratelm.interpretation.scorers.windows import TOO_FEW
from cratelm.interpretation.stages.concurrency import Tally
from cratelm.interpretation.stages.judge import (
    JudgeContext,
    aggregate_judged,
    judge_set,
    judged,
    judged_key,
    judged_sets,
)
from cratelm.interpretation.stages.set_task import CONSTANT_EXPLANATION, SetTask, failures
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import write_explanations
from cratelm.interpretation.store.neuron_selection import chosen
from cratelm.interpretation.store.parts import merge
from cratelm.interpretation.store.schema import SetKey

KEY = SetKey(layer=0, protocol="top-and-random")


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_explained(tmp_path / "run", rng)


def make_explained(path: Path, rng: np.random.Generator, neurons: int = 12) -> Path:
    make_run(path, rng, layers=1, neurons=neurons)
    records = read_records(path, 0)
    write_explanations(Store.create(path), KEY, explain_layer(records, protocol(KEY.protocol), strings(path)))
    return path


def strings(run: Path) -> list[str]:
    return prompt_strings(load_tokenizer(records_tokenizer(run, "fixed")))


def pieces(run: Path) -> list[bytes]:
    return token_bytes(load_tokenizer(records_tokenizer(run, "fixed")))


def apply(
    run: Path, scorer: str, judge: Judge, *, control: str = "", neurons: str = "all", questions: Questions | None = None
) -> Tally:
    key = judged_key(replace(KEY, control=control), scorer, judge.name)
    task = SetTask(
        store=Store.create(run), key=key, records=read_records(run, 0), protocol=protocol(KEY.protocol),
        chosen=chosen(neurons), in_flight=3,
    )  # fmt: skip
    jury = JudgeContext(pieces=pieces(run), questions=questions or Questions(), llm=judge)
    return asyncio.run(judge_set(task, scorer, jury))


def always(number: int) -> Answer:
    return lambda pieces, _: answers([number] * len(pieces))


def patterns(judge: Judge) -> set[str]:
    """The explanations that were shown."""
    return {chat[-1].text.split("\n\nPieces:")[0].removeprefix("Pattern: ") for chat in judge.chats}


def test_every_explained_neuron_is_judged_with_its_own_explanation(run: Path) -> None:
    judge = Judge(always(1))
    tally = apply(run, "detection", judge)
    store, key = Store.open(run), judged_key(KEY, "detection", "judge")
    found, texts = judged(store, key, "detection"), store.texts(KEY)
    assert tally == Tally(done=len(texts), failed=0)
    assert sorted(found) == sorted(texts)
    assert not {DEAD, RARE} & set(found)
    assert found[CONSTANT].reason == TOO_FEW
    assert {texts[neuron] for neuron in found if not found[neuron].reason} == patterns(judge)
    assert judged_sets(store) == [(key, "detection")]


def test_what_is_there_is_not_asked_again_and_other_settings_are(run: Path) -> None:
    first, again, other = Judge(always(1)), Judge(always(0)), Judge(always(0))
    apply(run, "detection", first)
    apply(run, "detection", again)
    assert first.chats
    assert again.chats == []
    apply(run, "detection", other, questions=Questions(seed=1))
    assert patterns(other) == patterns(first)


def test_what_was_done_before_a_break_is_kept(run: Path) -> None:
    count = iter(range(1000))

    def breaks(pieces: list[str], _: object) -> str:
        if next(count) == 30:
            raise CrateError("the server is gone")
        return answers([1] * len(pieces))

    with pytest.raises(CrateError, match="gone"):
        apply(run, "detection", Judge(breaks))
    store, key = Store.open(run), judged_key(KEY, "detection", "judge")
    texts = store.texts(KEY)
    kept = judged(store, key, "detection")
    assert 0 < len(kept) < len(texts)
    judge = Judge(always(1))
    apply(run, "detection", judge)
    assert patterns(judge) == {texts[neuron] for neuron in texts if neuron not in kept}
    assert sorted(judged(store, key, "detection")) == sorted(texts)


def test_controls_are_judged_with_what_they_say(run: Path) -> None:
    constant, shuffled = Judge(always(1)), Judge(always(1))
    apply(run, "fuzzing", constant, control="constant")
    assert all(f"Pattern: {CONSTANT_EXPLANATION}\n" in chat[-1].text for chat in constant.chats)
    apply(run, "fuzzing", shuffled, control="shuffled")
    own = Judge(always(1))
    apply(run, "fuzzing", own)

    def said(judge: Judge) -> list[str]:
        return [chat[-1].text.split("\n\n")[0] for chat in judge.chats]

    def shown(judge: Judge) -> list[str]:
        return sorted(chat[-1].text.split("\n\n")[1] for chat in judge.chats)

    assert shown(own) == shown(shuffled) == shown(constant), "the same windows are asked about"
    assert not set(zip(said(own), (chat[-1].text for chat in own.chats), strict=True)) & set(
        zip(said(shuffled), (chat[-1].text for chat in shuffled.chats), strict=True)
    )


def test_intruders_need_no_explanation_and_are_asked_about_every_chosen_neuron(run: Path) -> None:
    judge = Judge(lambda *_: json.dumps({"intruder": 2}))
    apply(run, "intruder", judge)
    key = judged_key(replace(KEY, control="shuffled"), "intruder", "judge")
    assert (key.protocol, key.explainer, key.control) == ("", "", "")
    found = judged(Store.open(run), key, "intruder")
    assert sorted(found) == list(range(12))
    assert {neuron for neuron in found if found[neuron].reason} >= {DEAD, CONSTANT}
    one = aggregate_judged(Store.open(run), key, "intruder", resamples=50)
    assert (one.total, one.chance) == (12, 20)
    assert one.undefined[TOO_FEW] == 12 - one.judged
    said = "".join(message.text for chat in judge.chats for message in chat)
    explanations = [text for text in Store.open(run).texts(KEY).values() if "(" in text]  # those that name tokens
    assert explanations
    assert not [text for text in explanations if text in said]


def test_the_chance_level_is_known_where_no_neuron_was_judged(run: Path) -> None:
    """In the questions, because no neuron has an answer that would say it."""
    for options in (3, 5, 8):
        judge, many = Judge(lambda *_: json.dumps({"intruder": 2})), 10**6
        questions = Questions(least=many, positives=many, negatives=many, options=options)
        apply(run, "intruder", judge, questions=questions)
        key = judged_key(KEY, "intruder", "judge")
        one = aggregate_judged(Store.open(run), key, "intruder", resamples=50)
        assert (one.mean, one.judged, judge.chats) == (None, 0, [])
        assert one.chance == pytest.approx(100 / options)
    alone = aggregate_scorer("intruder", {}, rng=np.random.default_rng(0))
    assert alone.chance == pytest.approx(100 / Questions().options)
    assert aggregate_scorer("detection", {}, rng=np.random.default_rng(0)).chance == 50


def test_a_neuron_that_gets_only_nonsense_is_a_failure_and_counted(run: Path) -> None:
    first = Store.open(run).texts(KEY)[FIRST_TOKEN_NEURON]

    def answer(pieces: list[str], _: object) -> str:
        judge.turn = judge.chats[-1][-1].text  # type: ignore[attr-defined]
        return "I cannot." if first in judge.turn else answers([1] * len(pieces))  # type: ignore[attr-defined]

    judge = Judge(answer)
    assert apply(run, "detection", judge).failed == 1
    store, key = Store.open(run), judged_key(KEY, "detection", "judge")
    (message,) = failures(store, key, "detection").values()
    assert re.fullmatch(r"none of \d answers could be parsed; the first is 'I cannot.'", message)
    assert aggregate_judged(store, key, "detection", resamples=50).undefined["failed"] == 1


def test_a_model_that_only_refuses_is_given_up_with_what_it_said(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_explained(tmp_path / "run", rng, neurons=24)
    with pytest.raises(CrateError, match="I cannot"):
        apply(run, "detection", Judge(lambda *_: "I cannot."))


def test_parts_judge_what_they_explained_and_merged_that_is_all(run: Path) -> None:
    """One part explains and judges its share without the other's explanations; a lookup's are read by both."""
    judge, key = Judge(always(1)), replace(KEY, explainer="a-model")
    whole = Store.open(run).texts(KEY)
    for number in (1, 2):
        store = Store.create(run, number)
        for one in (key, KEY):
            task = SetTask(
                store=store, key=one, records=read_records(run, 0), protocol=protocol(KEY.protocol),
                chosen=chosen("all"), part=(number, 2),
            )  # fmt: skip
            if one is key:
                explained = task.begin("explain", task.explainable, {})
                explained.add({neuron: f"words {neuron}" for neuron in task.share})
            jury = JudgeContext(pieces=pieces(run), questions=Questions(seed=0), llm=judge)
            asyncio.run(judge_set(replace(task, key=judged_key(one, "detection", "judge")), "detection", jury))
    merged = merge(run)
    assert (merged.whole, merged.missing) == (3, 0)
    for one in (key, KEY):
        assert sorted(judged(Store.open(run), judged_key(one, "detection", "judge"), "detection")) == sorted(whole)
