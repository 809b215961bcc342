"""Token usage of calls to a language model: counters, prices, and a budget that is never exceeded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cratelm.errors import CrateError
from cratelm.interpretation.llm import (
    LLM,
    Declined,
    LLMError,
    Message,
    Prompt,
    PromptLogprobs,
    Reply,
    Sampling,
    Unparsed,
)
from cratelm.interpretation.llm_wrapper import LLMWrapper
from cratelm.runtime import human

_Tokens = tuple[int, int]
"""Tokens read, and tokens generated."""
OnUnparsed = Callable[[int, int], Awaitable[None]]
"""Callback for a response that failed to parse: (tokens read, tokens generated)."""


@dataclass(slots=True)
class Usage:
    """Counters of calls and tokens so far."""

    calls: int = 0
    """Answers that were paid for, unusable ones included."""
    unusable: int = 0
    """Paid answers that cannot be used: refusals, empty answers, and responses that failed to parse."""
    cached: int = 0
    """Cache hits."""
    requests: int = 0
    """Requests sent to a server, retries included."""
    retries: int = 0
    """Requests that repeated an earlier one."""
    prompt_tokens: int = 0
    """Tokens read, as the server counts them."""
    new_tokens: int = 0
    """Tokens generated."""
    prompt_cached: int = 0
    """Tokens of prompts that the server took from its cache, as far as it reports them."""
    in_batches: tuple[int, int] = (0, 0)
    """Most tokens that the batches submitted by this process read and generate; the budget counts them."""

    def add(self, prompt_tokens: int, new_tokens: int, *, usable: bool = True) -> None:
        """Count one answer."""
        self.calls += 1
        self.unusable += not usable
        self.prompt_tokens += prompt_tokens
        self.new_tokens += new_tokens

    def line(self) -> str:
        """Summary for the end of a progress bar: `212 calls, 40 cached, 1.3M tok`."""
        words = [f"{self.calls} calls"]
        more = ((self.unusable, "unusable"), (self.cached, "cached"), (self.retries, "retries"))
        words += [f"{number} {what}" for number, what in more if number]
        return ", ".join([*words, f"{human(self.prompt_tokens + self.new_tokens)} tok"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """Price of tokens."""

    prompt: float = 0.0
    """Price of a million tokens read."""
    new: float = 0.0
    """Price of a million tokens generated."""
    currency: str = "USD"
    """Currency in messages."""

    def of(self, prompt_tokens: int, new_tokens: int) -> float:
        """Price of these tokens."""
        return (self.prompt * prompt_tokens + self.new * new_tokens) / 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Limits on spending; None for unlimited."""

    tokens: int | None = None
    """Tokens read and generated together."""
    money: float | None = None
    """Amount in the currency of the price."""
    price: Price = field(default_factory=Price)


@dataclass(slots=True)
class Metered(LLMWrapper):
    """Counts the usage of a language model, stops before a budget is exceeded, and retries unparsed responses.

    The upper bound of each call's cost (its prompt and the longest answer) is reserved before the call. So calls in
    flight when the budget ends are covered and finish; a call that fits only without the reservations of others waits.
    """

    inner: LLM
    usage: Usage
    budget: Budget = field(default_factory=Budget)
    spent_before: _Tokens = (0, 0)
    """Tokens spent by earlier processes of the same work: the budget covers all of them."""
    attempts: int = 3
    """Attempts if responses fail to parse; each attempt is paid for and reserved separately."""
    pause: float = 1.0
    """Seconds before the second attempt; later pauses grow in proportion."""
    on_unparsed: OnUnparsed | None = None
    """Set by the cache, which writes the cost to disk, so that later processes count it."""
    _reserved: _Tokens = (0, 0)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat within the budget."""
        bound = self.bound(messages, sampling)
        for attempt in range(self.attempts):
            async with self._paid(attempt, bound):
                reply = await self.inner.chat(messages, sampling)
                self.usage.add(reply.prompt_tokens, reply.new_tokens)
                return reply
        raise AssertionError("the last attempt raises")

    def bound(self, messages: Sequence[Message], sampling: Sampling) -> _Tokens:
        """Most tokens that a chat reads and generates."""
        # A chat template adds a few tokens to each turn.
        return sum(self.count(turn.text) + 16 for turn in messages), sampling.max_tokens

    def affordable(self, bounds: Sequence[_Tokens]) -> int:
        """How many of these calls, from the first, the budget covers together."""
        read = generated = 0
        for number, bound in enumerate(bounds):
            read, generated = read + bound[0], generated + bound[1]
            if self._exceeds((read, generated), self._reserved):
                return number
        return len(bounds)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """Prompt logprobs within the budget, one call for each prompt. Servers generate one token after a prompt."""

        async def paid(prompt: Prompt) -> PromptLogprobs:
            bound = self.count(prompt.prefix + prompt.rest) + 2, 1
            for attempt in range(self.attempts):
                async with self._paid(attempt, bound):
                    (answer,) = await self.inner.prompt_logprobs([prompt], top=top)
                    self.usage.add(answer.prompt_tokens, 1)
                    return answer
            raise AssertionError("the last attempt raises")

        return await asyncio.gather(*map(paid, prompts))

    @contextlib.asynccontextmanager
    async def _paid(self, attempt: int, bound: _Tokens) -> AsyncIterator[None]:
        """Reserve `bound`, and count an unusable answer. `Unparsed` is suppressed in all attempts but the last.

        An unparsed response without reported usage counts as `bound`.
        """
        if attempt:
            self.usage.retries += 1
            await asyncio.sleep(attempt * self.pause)
        await self._reserve(bound)
        try:
            yield
        except Declined as error:
            self.usage.add(error.prompt_tokens, error.new_tokens, usable=False)
            raise
        except Unparsed as error:
            read = bound[0] if error.prompt_tokens is None else error.prompt_tokens
            generated = bound[1] if error.new_tokens is None else error.new_tokens
            self.usage.add(read, generated, usable=False)
            if self.on_unparsed is not None:
                await self.on_unparsed(read, generated)
            if attempt == self.attempts - 1:
                raise LLMError(f"could not parse the server's answer in {self.attempts} attempts: {error}") from None
        finally:
            self._release(bound)

    def spent(self) -> _Tokens:
        """Tokens read and generated so far, with the bound of open batches, earlier processes included."""
        usage, (read, generated) = self.usage, self.spent_before
        return usage.prompt_tokens + usage.in_batches[0] + read, usage.new_tokens + usage.in_batches[1] + generated

    async def _reserve(self, bound: _Tokens) -> None:
        while self._exceeds(bound, self._reserved):
            if self._exceeds(bound, (0, 0)):
                raise CrateError(self.spent_line())
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
        self._reserved = self._reserved[0] + bound[0], self._reserved[1] + bound[1]

    def _exceeds(self, bound: _Tokens, reserved: _Tokens) -> bool:
        """Whether tokens spent, tokens reserved and one more call exceed the budget."""
        read, generated = (a + b + c for a, b, c in zip(self.spent(), reserved, bound, strict=True))
        if self.budget.tokens is not None and read + generated > self.budget.tokens:
            return True
        return self.budget.money is not None and self.budget.price.of(read, generated) > self.budget.money

    def _release(self, bound: _Tokens) -> None:
        self._reserved = self._reserved[0] - bound[0], self._reserved[1] - bound[1]
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def spent_line(self) -> str:
        """The error that the budget is spent."""
        spent, budget = self.spent(), self.budget
        line = f"{human(sum(spent))} tokens of {'no limit' if budget.tokens is None else human(budget.tokens)}"
        if budget.money is not None:
            paid, currency = budget.price.of(*spent), budget.price.currency
            line += f", {paid:.2f} {currency} of {budget.money:.2f} (left: {budget.money - paid:.2f})"
        return f"the budget is spent: {line}. All answers are cached. Give a larger budget to resume"
