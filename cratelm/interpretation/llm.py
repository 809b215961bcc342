"""The `LLM` protocol: what explainers, simulators and scorers need of a language model, wherever it runs.

A model gives two things: the answer to a chat, and *prompt logprobs*, its own log-probabilities of the tokens of a
text. `clients/endpoint.py` gets them from a server, `cratelm.local_llm` from a model in this process. Both are
asynchronous and accept many calls at once: requests to a server run concurrently up to a limit, calls to a local model
are batched.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from cratelm.errors import CrateError


class LLMError(CrateError):
    """One call failed after all retries; the message quotes what the model or its server answered.

    Work on other neurons continues (`stages/concurrency.py`). If no call can succeed (no such server, a refused key, a
    spent budget), a plain `CrateError` ends the work.
    """


class Postponed(CrateError):
    """One call failed after all retries for a reason that passes. Nothing is stored for it: the next run asks again."""


class Queued(Postponed):
    """The call waits in a batch (`stages/batches.py`); a later run gets its answer."""


class Declined(LLMError):
    """The model refused or answered nothing. It is an answer like any other: paid for, and cached."""

    def __init__(self, message: str, *, prompt_tokens: int, new_tokens: int) -> None:
        super().__init__(message)
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens


class Unparsed(LLMError):
    """A response that failed to parse. It is paid for, not cached, and a retry may succeed (`Metered` retries)."""

    def __init__(self, message: str, *, prompt_tokens: int | None = None, new_tokens: int | None = None) -> None:
        super().__init__(message)
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        """Tokens read and generated; None if the server did not report them."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How an answer is sampled."""

    max_tokens: int
    """Longest answer, in the model's own tokens."""
    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
    """Share of the probability mass that is sampled from."""
    seed: int = 0
    """Seed of the sampling; a server may ignore it."""
    schema: Mapping[str, object] | None = None
    """JSON schema of the answer, enforced if the server supports it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer to a chat, with its cost."""

    text: str
    finish: str
    """Why generation ended: `stop`, or `length` if `max_tokens` cut it off; servers may report other words."""
    prompt_tokens: int
    """Tokens read, as the model counts them."""
    new_tokens: int
    """Tokens generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text whose logprobs are requested, in two parts: a prefix shared with other prompts, and the rest."""

    prefix: str
    """Shared beginning; computed once where possible."""
    rest: str
    """The text after the prefix; only its tokens are in the result."""
    at: tuple[int, ...] | None = None
    """Character offsets into `rest` at which candidates are requested; None for every token.

    The offset behind the last character, alone, requests the candidates of the next token (`asks_next`).
    """
    numbers: bool = False
    """Whether only the numbers among the candidates are used, so that nothing else has to be cached."""

    @property
    def asks_next(self) -> bool:
        """Whether only the candidates of the token after the text are requested."""
        return self.at == (len(self.rest),)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogprobs:
    """The model's log-probabilities of a prompt's `rest`, with their cost."""

    tokens: tuple[str, ...]
    """Text of each token; concatenated they are `rest`. A character split over tokens is in the first of them."""
    logprobs: Float64[np.ndarray, " tokens"] = field(repr=False)
    """Natural log-probability of each token given all tokens before it; NaN if not requested or not known."""
    candidates: Mapping[int, Mapping[str, float]] = field(repr=False)
    """Offset in `rest` -> text of the most probable next tokens -> natural log-probability.

    An offset inside a token has no candidates and is left out. Tokens with the same text are merged.
    """
    prompt_tokens: int = 0
    """Tokens read, prefix and rest, as the model counts them; 0 if not known."""


@runtime_checkable
class BatchService(Protocol):
    """The batches of a model on a server, which `clients/batch_api.py` implements."""

    @property
    def url(self) -> str:
        """The base URL of the server."""

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> tuple[str, dict[str, Any]]:
        """Where a chat is sent, and the body of the request."""

    async def upload(self, lines: Sequence[bytes], name: str) -> str:
        """Upload requests. Returns the identifier of the file."""

    async def create(self, file: str, path: str) -> str:
        """Begin the batch of a file. Returns its identifier."""

    async def find(self, file: str) -> str:
        """The identifier of a file's batch, empty if none was created."""

    async def status(self, batch: str) -> dict[str, Any]:
        """The state of a batch."""

    def results(self, batch: Mapping[str, Any], sizes: Mapping[str, int]) -> AsyncIterator[Any]:
        """The result of each request."""


@runtime_checkable
class LLM(Protocol):
    """A language model that can be called, and what is known of it."""

    @property
    def name(self) -> str:
        """Name in tables and in the store: the server's model name, or the name of a directory."""
        ...

    @property
    def identity(self) -> str:
        """Cache key of the model: its name and what is known of its weights."""
        ...

    @property
    def context(self) -> int | None:
        """Context length: prompt and answer together, in tokens; None if not known."""
        ...

    @property
    def price(self) -> tuple[float, float] | None:
        """Price of a million tokens read and generated, if the server lists it."""
        ...

    @property
    def batch_api(self) -> BatchService | None:
        """The Batch API of the model's server; None for a model in this process."""
        ...

    @property
    def remote(self) -> bool:
        """Whether a server runs the model: each call is a request, and the time of a call is mostly waiting."""
        ...

    @property
    def slots(self) -> int | None:
        """Prompts that the server computes and keeps at the same time; None if it reports no slots."""
        ...

    @property
    def served(self) -> tuple[str, ...]:
        """Models that the server lists; empty for a model in this process."""
        ...

    @property
    def counts_exactly(self) -> bool:
        """Whether `count` uses the model's tokenizer; otherwise it is an estimate that `calibrate` improves."""
        ...

    @property
    def logprobs_format(self) -> tuple[str, int] | None:
        """How the server returns prompt logprobs: `vllm` or `openai`, and the most candidates (0: no limit).

        `next-token` if it returned only candidates of the next token.
        None while not known, and for a model in this process.
        """
        ...

    @property
    def unsupported(self) -> set[str]:
        """Parameters that the server refuses, which are not sent; an earlier process may have detected some."""
        ...

    def set_logprobs_format(self, style: str, most: int) -> None:
        """Restore `logprobs_format` from an earlier process, so that it is not detected again."""
        ...

    def count(self, text: str) -> int:
        """Number of tokens of a text; if the tokenizer is not known, an estimate that is rarely too low."""
        ...

    def expected(self, text: str) -> int:
        """Most likely number of tokens of a text: `count` without its safety margin."""
        ...

    async def calibrate(self, tokens_per_byte: float | None = None) -> float:
        """Set the tokens per byte that `count` estimates with, or measure it with one request if not given."""
        ...

    async def connect(self) -> None:
        """Ask the server what it serves. Raises `CrateError` if it cannot be reached."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...

    async def rendered(self, messages: Sequence[Message]) -> str | None:
        """The chat as the model reads it, with its chat template; None if that is not known."""
        ...

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat. Raises `LLMError` after the last retry, or if the model has no chat."""
        ...

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """Log-probabilities of each prompt's rest, with up to `top` candidates per token.

        Raises `LLMError` if the model's server does not return prompt logprobs.
        """
        ...


class InProcess:
    """The part of `LLM` that is the same for every model in this process: an exact count, and no server."""

    remote = False
    price: tuple[float, float] | None = None
    batch_api: BatchService | None = None
    slots: int | None = None
    served: tuple[str, ...] = ()
    counts_exactly = True
    logprobs_format: tuple[str, int] | None = None
    unsupported: set[str] = set()

    def set_logprobs_format(self, style: str, most: int) -> None:
        """Nothing to restore."""

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        raise NotImplementedError

    def expected(self, text: str) -> int:
        """Number of tokens of a text."""
        return self.count(text)

    async def calibrate(self, tokens_per_byte: float | None = None) -> float:  # noqa: ARG002
        """Nothing to calibrate."""
        return 0.0

    async def rendered(self, messages: Sequence[Message]) -> str | None:  # noqa: ARG002
        """None: the template is not known."""
        return None

    async def connect(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to close."""
