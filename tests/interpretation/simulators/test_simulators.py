"""Simulators: what they send, what they read, and what they refuse, with a model that follows rules."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fakes.rule_follower import RULES, RuleFollower
from fixtures import planted_rules
from fixtures.planted_rules import EXPLANATIONS, make_planted

from cratelm.activations.records import Mode, read_records
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, LLMError, Prompt, PromptLogprobs
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.prompts.simulator import (
    all_at_once_prefix,
    all_at_once_rows,
    structured_chat,
    structured_schema,
    token_by_token_prefix,
    token_by_token_question,
)
from cratelm.interpretation.protocols import draw, protocol
from cratelm.interpretation.simulators.all_at_once import AllAtOnce
from cratelm.interpretation.simulators.opening import METHODS, find_notation, open_simulator
from cratelm.interpretation.simulators.readout import ReadOut
from cratelm.interpretation.simulators.simulation import TextSimulator
from cratelm.interpretation.simulators.structured import Structured, structured_activations

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TOKENS = ["The", " rain", r"\n", r"\t", r" \xc3", r"\xa9", " :", " 4", ".", "", " [", "10"]
"""Tokens as prompts show them: a line break, a tab, two halves of a letter, one without text."""


def simulated(simulator: TextSimulator, explanation: str, *excerpts: Sequence[str]) -> list[list[float]]:
    return [one.tolist() for one in asyncio.run(simulator.simulate(explanation, excerpts))]


def opened(method: str, llm: LLM, mode: Mode = "fixed") -> TextSimulator:
    return asyncio.run(open_simulator(method, llm, mode=mode))


@pytest.mark.parametrize("top", [10, 9])
def test_the_whole_text_of_each_prompt_is_the_golden_one(top: int) -> None:
    rows, _ = all_at_once_rows(TOKENS, unknown="unknown")
    question, _ = token_by_token_question(TOKENS, 7, answer="0")
    chat = structured_chat("brackets", TOKENS, few_shot_neurons())
    sent = {
        f"all_at_once_{top}": all_at_once_prefix("brackets", few_shot_neurons(), top=top, unknown="unknown") + rows,
        f"token_by_token_{top}": token_by_token_prefix("brackets", few_shot_neurons(), top=top) + question,
        "structured": "\n".join(f"[{message.role}]\n{message.text}\n" for message in chat),
    }
    for name, text in sent.items():
        assert text == (GOLDEN / f"simulator_{name}.txt").read_text(encoding="utf-8"), name


def test_places_are_those_of_the_activations() -> None:
    rows, places = all_at_once_rows(TOKENS, unknown="?")
    assert [rows[place - 1 : place + 2] for place in places] == ["\t?\n"] * len(TOKENS)
    assert [rows[:place].count("\n") for place in places] == list(range(len(TOKENS)))
    question, place = token_by_token_question(TOKENS, 3, answer="7")
    assert question[place:] == "7\n"
    assert question.startswith(r"The rain\n\t" + "\n")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("explanation", ["digits after a colon", "brackets", "words for the weather"])
def test_a_model_that_follows_rules_is_read_exactly(method: str, explanation: str) -> None:
    simulator = opened(method, RuleFollower())
    excerpts = [TOKENS, [" snow", " row", ":", " 3"], ["(", "x", ")"]]
    rounded = round if method == "structured" else float
    expected = [[rounded(RULES[explanation](tokens, i)) for i in range(len(tokens))] for tokens in excerpts]
    for found, wanted in zip(simulated(simulator, explanation, *excerpts), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-9)
    assert str(simulator.name) == f"{method}:rules"
    assert simulator.counts["tokens"] == sum(map(len, excerpts))
    assert simulator.counts["unread"] == 0


def test_an_explanation_by_lookup_names_firing_once_in_the_prompt() -> None:
    prefix = all_at_once_prefix('fires on " rain" (3.2); on nothing else', [], top=10, unknown="unknown")
    assert 'this neuron fires on " rain" (3.2); on nothing else\n' in prefix


def test_all_excerpts_of_a_neuron_have_one_prefix_and_only_activations_are_asked_for() -> None:
    llm = RuleFollower()
    simulator = opened("all-at-once", llm)
    llm.asked.clear()
    simulated(simulator, "brackets", TOKENS, TOKENS[:3])
    assert len({prompt.prefix for prompt in llm.asked}) == 1
    assert [len(prompt.at or ()) for prompt in llm.asked] == [len(TOKENS), 3]


class Joining(RuleFollower):
    """A tokenizer that joins a tab with any letters after it."""

    def tokens(self, text: str) -> list[str]:
        joined: list[str] = []
        for token in super().tokens(text):
            if joined and joined[-1][:1] == "\t" and token[0].isalpha():
                joined[-1] += token
            else:
                joined.append(token)
        return joined


def test_how_a_model_writes_numbers_is_found_out() -> None:
    assert asyncio.run(find_notation(RuleFollower())) == (True, "unknown")
    assert asyncio.run(find_notation(RuleFollower(ten=False))) == (False, "unknown")
    assert asyncio.run(find_notation(Joining())) == (True, "?")


def test_a_model_that_writes_10_as_two_tokens_is_asked_for_0_to_9() -> None:
    simulator = opened("all-at-once", RuleFollower(ten=False))
    assert str(simulator.name) == "all-at-once-0-9:rules"
    assert simulator.cache_settings()["top"] == 9
    assert simulated(simulator, "brackets", ["(", "a"]) == [[9.0, 0.0]]
    released = opened("all-at-once", RuleFollower(ten=False), "compat")
    assert str(released.name) == "all-at-once:rules"
    assert simulated(released, "brackets", ["(", "a"]) == [[1.0, 0.0]]  # 10 is read as the 1 it begins with


def test_the_released_read_out_reads_tokens_with_parts_of_characters() -> None:
    tokens = ["(", "\N{REPLACEMENT CHARACTER}", "[\N{REPLACEMENT CHARACTER}", "]"]
    simulator = opened("all-at-once", RuleFollower(), "compat")
    assert simulator.strings_mode == "compat"
    assert simulated(simulator, "brackets", tokens) == [[10.0, 0.0, 10.0, 10.0]]
    assert simulator.counts["tokens"] == 4
    assert opened("all-at-once", RuleFollower()).strings_mode == "fixed"


def test_raw_tabs_and_line_breaks_are_read_in_compat_mode_too() -> None:
    simulator = opened("all-at-once", RuleFollower(), "compat")
    assert simulated(simulator, "brackets", ["(", "\n", "\t", "\n\t(", ")"]) == [[10.0, 0.0, 0.0, 10.0, 10.0]]


@dataclass
class Fixed(RuleFollower):
    """Says the same everywhere."""

    said: Mapping[str, float]
    skip: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def _echo(self, prompt: Prompt, top: int) -> PromptLogprobs:
        echo = super()._echo(prompt, top)
        kept = {} if self.skip else {place: self.said for place in echo.candidates}
        return PromptLogprobs(tokens=echo.tokens, logprobs=echo.logprobs, candidates=kept)


def test_a_model_that_thinks_of_no_number_is_refused_and_in_compat_mode_read_as_silence() -> None:
    mute = Fixed({"unknown": 0.0})
    fixed, compat = (
        AllAtOnce(llm=mute, read_out=ReadOut.of(mode, ten_is_one_token=True)) for mode in ("fixed", "compat")
    )
    with pytest.raises(LLMError, match="^rules expects no number at 12 of 12 tokens: it does not follow the format$"):
        simulated(fixed, "brackets", TOKENS)
    assert simulated(compat, "brackets", TOKENS) == [[0.0] * len(TOKENS)]
    assert compat.counts["unread"] == len(TOKENS)


def test_places_without_candidates_are_refused() -> None:
    deaf = AllAtOnce(llm=Fixed({"1": 0.0}, skip=True), read_out=ReadOut())
    with pytest.raises(LLMError, match="^rules gave no candidates at 12 of 12 places of a prompt$"):
        simulated(deaf, "brackets", TOKENS)


def test_solved_neurons_are_left_out_where_the_context_is_short() -> None:
    whole = all_at_once_prefix("brackets", few_shot_neurons(), top=10, unknown="unknown")
    rest, _ = all_at_once_rows(TOKENS, unknown="unknown")
    needed = RuleFollower().count(whole) + RuleFollower().count(rest) + 4
    for context, solved in ((needed, 3), (needed - 1, 2), (needed // 2, 0)):
        llm = RuleFollower(context=context)
        simulated(opened("all-at-once", llm), "brackets", TOKENS)
        assert llm.asked[-1].prefix.count("Explanation of neuron") == solved + 1
    message = (
        r"^the simulator's prompt has [\d,]+ tokens without any example, too long for a context of 60\. Use a model"
    )
    with pytest.raises(LLMError, match=message):
        simulated(AllAtOnce(llm=RuleFollower(context=60), read_out=ReadOut()), "brackets", TOKENS)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(
        CrateError,
        match="^--simulator must be one of all-at-once, next-token, token-by-token, structured, got 'sideways'",
    ):
        opened("sideways", RuleFollower())


def test_a_simulators_settings_change_with_everything_that_matters() -> None:
    told = [opened(method, llm, mode).cache_settings() for method in METHODS for mode in ("fixed", "compat")
            for llm in (RuleFollower(), RuleFollower(name="other"))]  # fmt: skip
    assert len({json.dumps(one, sort_keys=True) for one in told}) == len(told)


ROWS = [{"token": "a", "activation": 3}, {"token": " b", "activation": 0}]
BAD: list[tuple[str, str]] = [
    ("I cannot do that", r'the answer is not JSON \(Expecting value\): "I cannot do that"'),
    (json.dumps(ROWS), "the answer has no list of activations: "),
    (json.dumps({"activations": [3, 0]}), "the answer has no list of activations: "),
    (json.dumps({"activations": ROWS[:1]}), "the answer has 1 activations for 2 tokens: "),
    (json.dumps({"activations": [ROWS[1], ROWS[0]]}), "token 1 is 'a', and the answer has ' b': "),
    (json.dumps({"activations": [ROWS[0], {"activation": 3}]}), "token 2 is ' b', and the answer has None: "),
    (
        json.dumps({"activations": [ROWS[0], {"token": " b", "activation": 11}]}),
        "the activation of token 2 is 11, not a",
    ),
    (
        json.dumps({"activations": [ROWS[0], {"token": " b", "activation": True}]}),
        "the activation of token 2 is True, n",
    ),
    (
        '{"activations": [{"token": "a", "activation": NaN}, {"token": " b", "activation": 0}]}',
        "token 1 is nan, not a n",
    ),
    (json.dumps({"activations": ROWS})[:-4], r"the answer is not JSON \("),
]


@pytest.mark.parametrize(("answer", "message"), BAD)
def test_a_structured_answer_that_is_not_what_was_asked_for_is_a_failure_with_its_text(
    answer: str, message: str
) -> None:
    with pytest.raises(LLMError, match=message) as error:
        structured_activations(answer, ["a", " b"])
    assert answer[:30] in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [json.dumps({"activations": ROWS}), f"Here:\n```json\n{json.dumps({'activations': ROWS}, indent=1)}\n```\n"],
)
def test_a_structured_answer_may_be_fenced(answer: str) -> None:
    assert structured_activations(answer, ["a", " b"]).tolist() == [3.0, 0.0]


def test_a_structured_answer_may_spell_a_token_without_its_escapes() -> None:
    tokens = [r"\n", r" \xc3", r"a\t\u200b", "<endoftext>", "a"]
    for said in (tokens, ["\n", " \xc3", "a\t\u200b", "<|endoftext|>", "a"]):
        rows = [{"token": token, "activation": number} for number, token in enumerate(said)]
        answer = json.dumps({"activations": rows}, ensure_ascii=False)
        assert structured_activations(answer, tokens).tolist() == [0, 1, 2, 3, 4]
        as_it_is = answer.replace(r'"\n"', '"\n"')
        assert structured_activations(as_it_is, tokens).tolist() == [0, 1, 2, 3, 4]
    for other in ("\n\n", "n", r"\\n", "", None):
        with pytest.raises(LLMError, match="token 1 is"):
            structured_activations(json.dumps({"activations": [{"token": other, "activation": 0}]}), [r"\n"])


def test_a_prompt_explains_escapes_where_it_has_any() -> None:
    few = few_shot_neurons()
    for escaped in (True, False):
        for text in (
            all_at_once_prefix("x", few, top=10, unknown="unknown", escaped=escaped),
            token_by_token_prefix("x", few, top=10, escaped=escaped),
            structured_chat("x", ["a"], few, escaped=escaped)[0].text,
        ):
            assert (r"\xc3 for one byte" in text) == escaped


def test_a_structured_question_says_what_form_its_answer_has() -> None:
    llm = RuleFollower()
    simulated(Structured(llm=llm), "brackets", TOKENS)
    schema = structured_schema(["a"] * 12)
    assert json.loads(json.dumps(schema))["properties"]["activations"]["minItems"] == 12


def test_a_failed_structured_answer_fails_the_neuron_and_in_compat_mode_is_silence() -> None:
    class Mumbling(RuleFollower):
        async def chat(self, messages, sampling):  # type: ignore[no-untyped-def]
            reply = await super().chat(messages, sampling)
            return type(reply)(
                text=reply.text.replace("token", "word", 1), finish="stop", prompt_tokens=1, new_tokens=1
            )

    with pytest.raises(LLMError, match="token 1 is '\\(', and the answer has None"):
        simulated(Structured(llm=Mumbling()), "brackets", ["(", "a"])
    released = Structured(llm=Mumbling(), mode="compat")
    assert simulated(released, "brackets", ["(", "a"], ["b"]) == [[0.0, 0.0], [0.0]]
    assert released.counts == {"tokens": 3, "unread": 3}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["fixed", "compat"])
def test_planted_neurons_are_predicted_by_their_rules_and_not_by_others(
    method: str, mode: Mode, rng: np.random.Generator, tmp_path: Path
) -> None:
    """In `fixed` mode, whose excerpts begin where their documents do, nothing of a rule's context is missing."""
    records = read_records(make_planted(tmp_path / "run", rng, mode=mode), 0, mode=mode)
    simulator = opened(method, RuleFollower(), mode)
    strings = prompt_strings(planted_rules.make_tokenizer(), simulator.strings_mode)
    scored = draw(records, protocol("top-and-random", mode).score, "score")
    for neuron, explanation in enumerate(EXPLANATIONS):
        excerpts = list(scored.of(neuron))
        tokens = [[strings[token] for token in excerpt.tokens.tolist()] for excerpt in excerpts]
        activations = np.concatenate([excerpt.activations for excerpt in excerpts])
        scores = []
        for said in (explanation, EXPLANATIONS[(neuron + 2) % len(EXPLANATIONS)]):
            predicted = np.concatenate(simulated(simulator, said, *tokens))
            scores.append(float(np.corrcoef(activations, predicted)[0, 1]) if np.ptp(predicted) else 0.0)
        assert scores[0] > (0.95 if mode == "fixed" else 0.8), explanation
        assert abs(scores[1]) < 0.2, explanation
