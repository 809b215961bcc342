"""What explaining and simulating ask of a language model, whoever runs it.

Two things: an answer to a chat, and an *echo*, the model's own probabilities for the tokens of a text that it is
given. `endpoint.py` gets them from a server, `cratelm.local_llm` from a model in this process. Both are asynchronous
and may be asked many things at once: a server is kept busy up to a limit, a model in the process fills its batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from cratelm.errors import CrateError


class LLMError(CrateError):
    """A language model did not do what was asked, whatever was tried; the message says what it said instead.

    That is a failure of one question, which the work on other neurons survives (`work.py`). A model that cannot be
    asked at all (no such server, a refused key, a budget that is spent) is a plain `CrateError`, and ends the work.
    """


class Declined(LLMError):
    """The model answered, and said that it will not or said nothing: an answer like others, paid for and kept."""

    def __init__(self, message: str, *, prompt_tokens: int, new_tokens: int) -> None:
        super().__init__(message)
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How an answer is drawn."""

    max_tokens: int
    """Longest answer, in the model's own tokens."""
    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
    """Share of the probability that is drawn from."""
    seed: int = 0
    """Of the draw; a server is free to ignore it."""
    schema: Mapping[str, object] | None = None
    """JSON schema that the answer has to follow, where the model's server can be told so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer to a chat."""

    text: str
    finish: str
    """Why it ended: `stop`, or `length` where `max_tokens` cut it off; other words are the server's own."""
    prompt_tokens: int
    """Tokens read, as the model counts them."""
    new_tokens: int
    """Tokens written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text to echo, in two parts: what many prompts begin with alike, and the rest."""

    prefix: str
    """The beginning that is shared with other prompts; computed once where that can be."""
    rest: str
    """What follows; only its tokens are in the echo."""
    at: tuple[int, ...] | None = None
    """Offsets into `rest`, in characters, at which candidates are wanted; None for every token."""
    numbers: bool = False
    """Whether nothing is read but the numbers among the candidates: then nothing else has to be kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogprobs:
    """What a model expected while it read a prompt's `rest`."""

    tokens: tuple[str, ...]
    """The text of each token; one after the other they are `rest`. A cut character stands with its first token."""
    logprobs: Float64[np.ndarray, " tokens"] = field(repr=False)
    """Natural log-probability of each token given all before it; NaN where it was not asked for or is not known."""
    candidates: Mapping[int, Mapping[str, float]] = field(repr=False)
    """Offset in `rest` -> the most probable next tokens there, as text -> natural log-probability.

    An offset inside a token has no candidates and is left out. Tokens of the same text count as one.
    """
    prompt_tokens: int = 0
    """Tokens read, prefix and rest, as the model counts them; 0 where that is not known."""


@runtime_checkable
class LLM(Protocol):
    """A language model that can be asked."""

    @property
    def name(self) -> str:
        """What it is called in tables and in the store: the server's model name, or that of a directory."""
        ...

    @property
    def identity(self) -> str:
        """What tells it from every other model, for the cache: its name and what is known of its weights."""
        ...

    @property
    def context(self) -> int | None:
        """Longest prompt and answer together, in tokens; None where it is not known."""
        ...

    def count(self, text: str) -> int:
        """Tokens of a text in the model's own tokenizer, or the best estimate there is (never too few)."""
        ...

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat. Raises `LLMError` once retries are used up, or where the model has no chat."""
        ...

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """What the model expected at each token of each prompt's rest, with up to `top` candidates.

        Raises `LLMError` where the model's server does not give the probabilities of a prompt.
        """
        ...


class LLMWrapper:
    """What stands around a language model and passes on who it is: its own is only how it is asked."""

    __slots__ = ()
    inner: LLM
    """The model that answers."""

    @property
    def name(self) -> str:
        """That of the model."""
        return self.inner.name

    @property
    def identity(self) -> str:
        """That of the model."""
        return self.inner.identity

    @property
    def context(self) -> int | None:
        """That of the model."""
        return self.inner.context

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return self.inner.count(text)
