"""A language model whose answers the test writes, and a simulator that follows its explanations to the letter."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from cratelm.interpretation.llm import InProcess, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling


class ScriptedLLM(InProcess):
    """Answers by a function of the chat and the sampling; counts what it is asked."""

    name, identity = "scripted", "scripted-1"

    def __init__(
        self, answer: Callable[[Sequence[Message], Sampling], str] | None = None, *, context: int | None = None
    ) -> None:
        self.answer, self.context = answer or strongest_tokens, context
        self.asked: list[tuple[tuple[Message, ...], Sampling]] = []

    def count(self, text: str) -> int:
        """A token for every line."""
        return len(text.splitlines())

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The answer that the test wrote."""
        self.asked.append((tuple(messages), sampling))
        return Reply(text=self.answer(messages, sampling), finish="stop", prompt_tokens=100, new_tokens=10)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """No probabilities."""
        raise LLMError(f"{len(prompts)} prompts, {top} candidates: none of it")


def shown_pairs(messages: Sequence[Message]) -> list[tuple[str, int]]:
    """The tokens of the last question with their activations, zeros and all."""
    first = messages[-1].text.split("\n\nThe same activations")[0]
    return [(token, int(value)) for token, value in re.findall(r"^(.*)\t(\d+)$", first, flags=re.MULTILINE)]


def strongest_tokens(messages: Sequence[Message], _: Sampling) -> str:
    """A true explanation of a neuron that is a function of the token: every token that fires at 2 or above."""
    found = sorted({token for token, value in shown_pairs(messages) if value >= 2})
    return " the tokens " + " ".join(f"[{token}]" for token in found) + "."


async def simulate(explanation: str, excerpts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """10 on the tokens that the explanation names, 0 elsewhere."""
    named = set(re.findall(r"\[(.*?)\](?= \[|$)", explanation))
    return [np.array([10.0 * (token in named) for token in tokens]) for tokens in excerpts]
