"""The compact prompt of an explainer, to the letter, and when it does not fit."""

import re
from pathlib import Path

import pytest
from interpretation.prompts.test_explainer_prompts import records, words

from cratelm.interpretation.prompts.compact_explainer import AFTER, BEFORE, LISTED, compact_prompt
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.prompts.few_shot import FewShotRecord, few_shot_neurons

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"


def text(*shown: FewShotRecord) -> str:
    prompt = compact_prompt(shown, count=words, context=None, max_tokens=60)
    [message] = prompt.messages
    assert message.role == "user"
    assert prompt.tokens == words(message.text) + 8
    return message.text


def record(tokens: str, *values: int) -> FewShotRecord:
    return FewShotRecord(tokens=tuple(tokens.split("|")), activations=values, unknown=0)


def test_the_whole_text_sent_is_the_golden_one() -> None:
    shown = [*records(), *(one for neuron in few_shot_neurons() for one in neuron.records)]
    assert text(*shown) == (GOLDEN / "explainer_compact.txt").read_text(encoding="utf-8")


def test_strong_tokens_are_marked_without_their_space() -> None:
    assert "1. a <<cat>> and a <<dog ran>>." in text(record("a| cat| and| a| dog| ran|.", 0, 9, 5, 0, 10, 6, 0))
    assert r"1. x <<\n>>y" in text(record(r"x| |\n|y", 0, 0, 10, 0))
    assert "1. <<é>>" in text(record(r"\xc3|\xa9", 7, 10)), "a character in two tokens is whole"


def test_an_excerpt_without_strong_tokens_has_its_strongest_marked_and_a_silent_one_is_left_out() -> None:
    shown = text(record("a|b", 10, 0), record("c|d", 0, 0), record("e|f|g", 1, 3, 3))
    assert "1. <<a>>b\n2. e<<fg>>\n\n" in shown
    assert '"a" 10, "f" 3, "g" 3, "e" 1' in shown


def test_the_text_around_the_strongest_token_is_shown() -> None:
    tokens = [f"w{i} " for i in range(64)]
    values = [0] * 64
    values[40] = 10
    shown = text(record("|".join(tokens), *values))
    inside = {i for i in range(64) if re.search(rf"\bw{i}\b", shown)}
    assert inside == set(range(40 - BEFORE, 40 + AFTER + 1))


def test_the_strongest_distinct_tokens_are_listed() -> None:
    many = record("|".join(f"t{i}" for i in range(20)) + "|t3", *[1] * 20, 10)
    listed = text(many).partition("strength from 1 to 10:\n")[2].partition("\n")[0].split(", ")
    assert listed[0] == '"t3" 10'
    assert len(listed) == LISTED


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    needed = compact_prompt(records(), count=words, context=None, max_tokens=60).tokens + 60
    compact_prompt(records(), count=words, context=needed, max_tokens=60)
    with pytest.raises(PromptTooLong, match=f"too long for a context of {needed - 1:,}. Use a model with a longer"):
        compact_prompt(records(), count=words, context=needed - 1, max_tokens=60)
