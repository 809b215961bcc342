"""What an explainer is sent, to the letter, and what is made of what it answers."""

from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import END, make_tokenizer

from cratelm.activations.records import Excerpt, Mode
from cratelm.interpretation.explainers.answers import explanation_of
from cratelm.interpretation.llm import LLMError, Message, Reply
from cratelm.interpretation.prompts.escaping import escaped, prompt_strings
from cratelm.interpretation.prompts.explainer import (
    RELEASED_CONTEXT,
    TURN,
    ExplainerPrompt,
    PromptTooLong,
    explainer_prompt,
    shown,
    without_system,
)
from cratelm.interpretation.prompts.few_shot import FewShotRecord, few_shot_neurons
from cratelm.interpretation.prompts.normalisation import OWN

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TEXT = "def café():\n\treturn naïve + 1"


def excerpt(activations: list[float], text: str = TEXT) -> Excerpt:
    ids = make_tokenizer().encode(text).ids
    values = np.zeros(len(ids), dtype=np.float32)
    values[: len(activations)] = activations
    return Excerpt(tokens=np.array(ids), activations=values, position=0, document=0)


def records(mode: Mode = "fixed") -> tuple[FewShotRecord, ...]:
    strings = prompt_strings(make_tokenizer(), mode)
    excerpts = [excerpt([0, 4, 0, 0, 0.79, 0, 0, 0, 2]), excerpt([0, 0.3], "for while" + END)]
    return shown(excerpts, strings, rounding=OWN[mode])


def words(text: str) -> int:
    """A tokenizer for tests: every line is two tokens."""
    return 2 * len(text.splitlines())


def prompt(context: int | None = None, mode: Mode = "fixed") -> ExplainerPrompt:
    return explainer_prompt(records(mode), count=words, context=context, max_tokens=60, mode=mode)


def written(found: ExplainerPrompt) -> str:
    return "\n".join(f"[{message.role}]\n{message.text}\n" for message in found.messages)


@pytest.mark.parametrize("mode", ["fixed", "compat"])
def test_the_whole_text_sent_is_the_golden_one(mode: Mode) -> None:
    assert written(prompt(mode=mode)) == (GOLDEN / f"explainer_{mode}.txt").read_text(encoding="utf-8")


def test_activations_are_scaled_by_the_strongest_shown() -> None:
    first, second = records("compat")
    assert first.activations[:9] == (0, 10, 0, 0, 1, 0, 0, 0, 5)
    assert max(second.activations) == 0, "less than a tenth of the strongest"
    first, second = records()
    assert first.activations[:9] == (0, 10, 0, 0, 2, 0, 0, 0, 5)
    assert max(second.activations) == 1, "it fires"
    alone = shown([excerpt([0, 0.3])], prompt_strings(make_tokenizer()))
    assert max(alone[0].activations) == 10


def test_the_block_is_repeated_without_zeros_only_where_few_tokens_fire() -> None:
    def question(values: list[int]) -> str:
        record = FewShotRecord(tokens=tuple("abcdefghij"), activations=tuple(values), unknown=0)
        return explainer_prompt([record], count=words, context=None, max_tokens=1).messages[-1].text

    assert question([9] + [0] * 9).count("<start>") == 2
    assert question([9, 1] + [0] * 8).count("<start>") == 1
    assert question([0] * 10).count("<start>") == 1


def test_records_of_the_solved_neurons_are_left_out_until_the_prompt_fits() -> None:
    whole = prompt()
    assert whole.tokens == sum(words(message.text) + TURN for message in whole.messages)
    total = sum(len(neuron.records) for neuron in few_shot_neurons())
    lengths, dropped = [whole.tokens], [0]
    for _ in range(total):
        shorter = prompt(context=lengths[-1] + 59)
        assert shorter.tokens < lengths[-1]
        assert (
            shorter.messages[-1].text.split("\n", 1)[1].rsplit("\n", 1)[0]
            == (whole.messages[-1].text.split("\n", 1)[1].rsplit("\n", 1)[0])
        )
        lengths.append(shorter.tokens)
        dropped.append(shorter.dropped)
    assert dropped == list(range(total + 1))
    assert prompt(context=lengths[0] + 60).dropped == 0
    assert len(shorter.messages) == 2
    with pytest.raises(PromptTooLong, match=f"{lengths[-1]:,} tokens without any example.*context of {total}"):
        prompt(context=total)


def test_compat_keeps_to_the_released_length_and_has_no_system_turn() -> None:
    found = prompt(mode="compat", context=100_000)
    assert [message.role for message in found.messages[:2]] == ["user", "assistant"]
    long = explainer_prompt(
        records(), count=lambda text: 10 * words(text), context=None, max_tokens=60, mode="compat"
    )  # fmt: skip
    assert long.dropped > 0
    assert long.tokens + 60 <= RELEASED_CONTEXT


def test_a_model_without_a_system_role_reads_the_same_words() -> None:
    whole = prompt().messages
    first, *rest = without_system(whole)
    assert first == Message("user", f"{whole[0].text}\n\n{whole[1].text}")
    assert tuple(rest) == whole[2:]
    assert without_system((first, *rest)) == (first, *rest)
    assert without_system(whole[:1]) == whole[:1]


@pytest.mark.parametrize(("token", "seen"), [
    (" the", " the"), ("\n\n", r"\n\n"), ("\t", r"\t"), ("\r", r"\r"), ("\x1b[0m", r"\x1b[0m"), ("\x85", r"\x85"),
    ("\u200b", r"\u200b"), ("\u2028", r"\u2028"), ("\U000e0001", r"\U000e0001"), ("é", "é"), ("\xa0", "\xa0"),
    (END, "<endoftext>"), ("<|im_end|>x", "<im_end>x"), ("a\\n", "a\\n"),
])  # fmt: skip
def test_nothing_inside_a_token_breaks_its_line_or_hides(token: str, seen: str) -> None:
    assert escaped(token) == seen
    assert len(escaped(token).splitlines()) == 1


def test_invalid_utf8_bytes_are_escaped_and_raw_in_compat() -> None:
    ids = make_tokenizer(257).encode("→").ids
    assert [prompt_strings(make_tokenizer(257))[i] for i in ids] == [r"\xe2", r"\x86", r"\x92"]
    assert [prompt_strings(make_tokenizer(257), "compat")[i] for i in ids] == ["\N{REPLACEMENT CHARACTER}"] * 3


def reply(text: str, finish: str = "stop") -> Reply:
    return Reply(text=text, finish=finish, prompt_tokens=1, new_tokens=1)


@pytest.mark.parametrize(("text", "explanation"), [
    (" words for rain, snow and hail.", "words for rain, snow and hail"),
    ("words for rain. It also likes snow.", "words for rain"),
    ("words for rain\n\nSome examples: storm", "words for rain"),
    ('"words for rain."', "words for rain"),
    ("**words for rain**", "words for rain"),
    ("this neuron fires on words for rain", "words for rain"),
    ("This neuron activates on words for rain!", "words for rain"),
    ("Explanation of neuron 4: this neuron fires on words for rain.", "words for rain"),
    ("Explanation of the behaviour of neuron 4: it fires when it reads rain.", "rain"),
    ("1. words for rain", "words for rain"),
    ("2-digit numbers, e.g. 12 or 99, in dates", "2-digit numbers, e.g. 12 or 99, in dates"),
    ("the U.S. and versions such as 1.5.2 of a library.", "the U.S. and versions such as 1.5.2 of a library"),
    ("<think>Hm. Rain?\nSnow.</think>\nwords for rain.", "words for rain"),
    ("the phrase 'I am sorry to hear'.", "the phrase 'I am sorry to hear'"),
    ("what cannot be determined or explained.", "what cannot be determined or explained"),
    ("I can see it fires on rain.", "I can see it fires on rain"),
    ("'than' and what follows", "'than' and what follows"),
])  # fmt: skip
def test_an_answer_becomes_a_sentence(text: str, explanation: str) -> None:
    assert explanation_of(reply(text)) == explanation


def test_an_answer_that_was_cut_off_says_so() -> None:
    assert explanation_of(reply("words for rain and for what", "length")) == "words for rain and for what …"
    assert explanation_of(reply("words for rain. And for what", "length")) == "words for rain"


@pytest.mark.parametrize(("text", "said"), [
    ("", "empty answer: the model said nothing"),
    (" \n", "empty answer: the model said nothing"),
    ("...", 'empty answer: "..."'),
    ("<think>Hm, is it rain or", 'empty answer: only reasoning: "<think>Hm, is it rain or"'),
    ("I'm sorry, but I cannot help with that.", 'refused: "I\'m sorry, but I cannot help with that."'),
    ("As an AI language model, I do not see neurons.", "refused: "),
    ("It is impossible to determine what this neuron does.", "refused: "),
    ("There is no clear pattern.", "refused: "),
    ("this neuron fires on I cannot determine that.", "refused: "),
    ("Sorry, I can't say.", "refused: "),
    ("Unfortunately, there is not enough information.", "refused: "),
    ("I can’t assist with this request.", "refused: "),
])  # fmt: skip
def test_an_unusable_answer_is_a_failure_with_its_text(text: str, said: str) -> None:
    with pytest.raises(LLMError) as failure:
        explanation_of(reply(text))
    assert said in str(failure.value)


def test_compat_takes_an_answer_as_it_is() -> None:
    assert explanation_of(reply(' "words". And mo', "length"), "compat") == '"words". And mo'
    with pytest.raises(LLMError, match="empty answer"):
        explanation_of(reply(" "), "compat")
