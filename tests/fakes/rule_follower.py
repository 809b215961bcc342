"""A made-up language model that follows rules: its probabilities are what an explanation of a known rule says.

It reads the last explanation of a prompt and the rows of the last excerpt. In place of an activation it expects
`unknown` most, then the rule's number, then the two neighbouring numbers, so that the mean is the rule's. In place of
the activation of a single token it expects the number. It recognises explanations by their words.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cratelm.interpretation.llm import InProcess, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling

Rule = Callable[[Sequence[str], int], float]
"""(tokens, index) -> activation, 0 to 10."""
WEATHER = ("rain", "snow", "hail", "storm", "wind")


def _word(tokens: Sequence[str], i: int) -> str:
    return tokens[i].strip()


def _after_colon(tokens: Sequence[str], i: int) -> float:
    before = "".join(tokens[:i]).rstrip(" ")
    return 9.0 if _word(tokens, i).isdigit() and before.endswith(":") else 0.0


RULES: dict[str, Rule] = {
    "digits after a colon": _after_colon,
    "the article 'the'": lambda tokens, i: 7.0 if _word(tokens, i).lower() == "the" else 0.0,
    "brackets": lambda tokens, i: 10.0 if set(_word(tokens, i)) & set("()[]{}") else 0.0,
    "words for the weather": lambda tokens, i: 8.5 if _word(tokens, i).lower() in WEATHER else 0.0,
    "names": lambda tokens, i: 6.0 if _word(tokens, i)[:1].isupper() and _word(tokens, i) != "The" else 0.0,
    "semicolons, and a little on commas": lambda tokens, i: {";": 10.0, ",": 3.0}.get(_word(tokens, i), 0.0),
}
"""What neurons of the planted model fire on, in words and as rules."""

_PUZZLES = (
    "colours red blue green grey", "numbers five 9 20 3", "names Maria Peter Anna", "animals dog cat horse geese",
    "question ? !", "body finger hand head",
)  # fmt: skip
"""Enough knowledge for the self-test: a word of the explanation, and the tokens it means."""


def rule_of(explanation: str) -> Rule:
    """The rule that an explanation states; silence if the rule is unknown."""
    said = explanation.strip().rstrip(".")
    if said in RULES:
        return RULES[said]
    known = next((set(line.split()[1:]) for line in _PUZZLES if line.split()[0] in said), set())
    return lambda tokens, i: 9.0 if _word(tokens, i) in known else 0.0


class RuleFollower(InProcess):
    """The model. Reads as if each character were a token, but for numbers and the word `unknown`."""

    def __init__(self, *, name: str = "rules", ten: bool = True, context: int | None = None) -> None:
        self.name = self.identity = name
        self.context = context
        self.ten = ten
        """Whether it writes 10 as one token."""
        self.top = 10
        """The largest number that the last prompt asked for."""
        self.asked: list[Prompt] = []
        self.chats: list[Sequence[Message]] = []

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokens(text))

    def tokens(self, text: str) -> list[str]:
        """The text of each token."""
        return re.findall(r"unknown|10|.|\n" if self.ten else r"unknown|.|\n", text)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """What it expects."""
        self.asked += prompts
        return [self._echo(prompt, top) for prompt in prompts]

    def _echo(self, prompt: Prompt, top: int) -> PromptLogprobs:
        tokens = self.tokens(prompt.rest)
        begins = np.cumsum([0, *map(len, tokens)]).tolist()[:-1]
        known = [*begins, *([len(prompt.rest)] if prompt.asks_next else [])]
        at = begins if prompt.at is None else [place for place in prompt.at if place in known]
        candidates = {place: self.expects(prompt.prefix + prompt.rest[:place], top) for place in at}
        logprobs = [candidates.get(place, {}).get(token, np.nan) for place, token in zip(begins, tokens, strict=True)]
        return PromptLogprobs(tokens=tuple(tokens), logprobs=np.array(logprobs), candidates=candidates)

    def expects(self, text: str, top: int) -> Mapping[str, float]:
        """The most probable next tokens after a text."""
        explanation = re.findall(r"Explanation of neuron \d+: this neuron fires on (.*)\n", text)[-1:]
        number: float | None = None
        if explanation and text.endswith("\nActivation:\t"):
            before, _, last = text.rpartition("Text: ")[2].removesuffix("\nActivation:\t").rpartition("\nLast token:\t")
            words = re.findall(r"\s*\w+|\s*[^\w\s]|\s+", before.removesuffix(last))
            number = rule_of(explanation[0])([*words, last], len(words))
        elif explanation and text.endswith("\t"):
            *rows, current = text.rpartition("<start>\n")[2].split("\tunknown\n")
            number = rule_of(explanation[0])([*rows, current[:-1]], len(rows))
        elif text.endswith("\t") and text.count("\t10\n") > 3:
            number = 10.0
        self.top = 9 if "number from 0 to 9" in text else 10
        number = None if number is None else min(number, float(self.top))
        return dict(sorted(self._numbers(number).items(), key=lambda one: -one[1])[:top])

    def _numbers(self, number: float | None) -> dict[str, float]:
        if number is None:
            return {"a": np.log(0.6), " ": np.log(0.4)}
        low = int(number)
        shares = {low: 0.3 * (1 - (number - low)), low + 1: 0.3 * (number - low)}
        if not self.ten and shares.get(10):
            shares[1] = shares.pop(10) + shares.get(1, 0)
        found = {str(value): share for value, share in shares.items() if share}
        found |= {"unknown": 0.6, "\n": 0.06, "0.": 0.03, " the": 0.01}
        return {text: float(np.log(share)) for text, share in found.items()}

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a structured question."""
        self.chats.append(messages)
        asked = re.search(r"Explanation: this neuron fires on (.*)\nTokens: (.*)$", messages[-1].text)
        if asked is None:
            raise LLMError("I only follow rules")
        tokens, rule = json.loads(asked[2]), rule_of(asked[1])
        rows = [{"token": token, "activation": round(rule(tokens, i))} for i, token in enumerate(tokens)]
        text = json.dumps({"activations": rows})
        return Reply(text=text, finish="stop", prompt_tokens=1, new_tokens=min(len(text), sampling.max_tokens))
