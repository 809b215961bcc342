"""Made-up language models for the classifying scorers: they answer right, wrong, in another form, or not at all."""

import json
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cratelm.interpretation.llm import InProcess, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling

Answer = Callable[[list[str], Sampling], str]
"""What is said about the numbered pieces of a question."""


class Judge(InProcess):
    """Answers by a rule; keeps what it was asked."""

    name = "judge"
    identity = "judge"
    context: int | None = None

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.chats: list[Sequence[Message]] = []

    def count(self, text: str) -> int:
        return len(text)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        self.chats.append(messages)
        text = self.answer(pieces_of(messages[-1].text), sampling)
        return Reply(text=text, finish="stop", prompt_tokens=1, new_tokens=1)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:  # noqa: ARG002
        raise LLMError("this server ignores logprobs")


class Reader(Judge):
    """Return probabilities: of each letter of a prompt's rest, or of 1 and 0 at a given place."""

    def __init__(
        self, logprob: Callable[[Prompt], float], *, candidates: Callable[[Prompt], Mapping[str, float]]
    ) -> None:
        super().__init__(lambda *_: "")
        self.logprob, self.candidates = logprob, candidates
        self.prompts: list[Prompt] = []

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:  # noqa: ARG002
        self.prompts.extend(prompts)
        return [
            PromptLogprobs(
                tokens=tuple(one.rest), logprobs=np.full(len(one.rest), self.logprob(one)),
                candidates={place: self.candidates(one) for place in one.at or ()},
            )
            for one in prompts
        ]  # fmt: skip


def pieces_of(question: str) -> list[str]:
    """The numbered pieces of a question. No piece breaks a line."""
    return re.findall(r"^\d+\. (.*)$", question, re.MULTILINE)


def answers(numbers: Sequence[int]) -> str:
    return json.dumps({"answers": list(numbers)})


def by_truth(truth: Mapping[str, int], *, lie: bool = False) -> Answer:
    """Right about every piece, or wrong about every piece."""
    return lambda pieces, _: answers([truth[piece] ^ lie for piece in pieces])
