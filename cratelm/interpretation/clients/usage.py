"""What the work with a language model costs: a count of it, and a budget that ends the work before it is overdrawn."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, Declined, LLMWrapper, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.runtime import human

Lost = Callable[[int | None, int | None, bool], Awaitable[None]]
"""(tokens read, tokens written, whether it is asked again): None where the server did not tell."""
LOST: ContextVar[Lost | None] = ContextVar("LOST", default=None)
"""Whom to tell of an answer that cannot be read: `Metered` stands around a language model, and the answers that are
asked for again come and go inside of it. Raises where the budget does not allow another one."""


@dataclass(slots=True)
class Usage:
    """What was asked so far. Counted up by whoever asks."""

    calls: int = 0
    """Answers that were paid for, those that cannot be used too."""
    unusable: int = 0
    """Of them, those that cannot be used: refusals, empty ones, and what cannot be read."""
    cached: int = 0
    """Answers that were there already."""
    requests: int = 0
    """Requests sent to a server, repeated ones too."""
    retries: int = 0
    """Requests that repeated another."""
    prompt_tokens: int = 0
    """Tokens read, as the server counts them."""
    new_tokens: int = 0
    """Tokens written."""
    unkept: list[tuple[int, int]] = field(default_factory=list, repr=False)
    """Tokens read and written of answers that cannot be read, until they are noted on disk."""

    def lose(self, prompt_tokens: int, new_tokens: int) -> None:
        """Count an answer that cannot be read."""
        self.add(prompt_tokens, new_tokens)
        self.unusable += 1
        self.unkept.append((prompt_tokens, new_tokens))

    def add(self, prompt_tokens: int, new_tokens: int) -> None:
        """Count one answer."""
        self.calls += 1
        self.prompt_tokens += prompt_tokens
        self.new_tokens += new_tokens

    def line(self) -> str:
        """In a few words, for the end of a progress bar: `212 calls, 40 cached, 1.3M tok`."""
        words = [f"{self.calls} calls"]
        more = ((self.unusable, "unusable"), (self.cached, "cached"), (self.retries, "retries"))
        words += [f"{number} {what}" for number, what in more if number]
        return ", ".join([*words, f"{human(self.prompt_tokens + self.new_tokens)} tok"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a provider asks."""

    prompt: float = 0.0
    """Of a million tokens read."""
    new: float = 0.0
    """Of a million tokens written."""
    currency: str = "USD"
    """For what is printed."""

    def of(self, prompt_tokens: int, new_tokens: int) -> float:
        """The price of so many tokens."""
        return (self.prompt * prompt_tokens + self.new * new_tokens) / 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What may be spent; what is not set has no limit."""

    tokens: int | None = None
    """Read and written together."""
    money: float | None = None
    """In the currency of the price."""
    price: Price = field(default_factory=Price)


@dataclass(slots=True)
class Metered(LLMWrapper):
    """A language model whose answers are counted, and that stops before a budget is overdrawn.

    Before each call, what it can cost at most is set aside: its prompt, and the longest answer. So calls that are on
    their way when the budget ends are covered and finish; a call that would fit but for what is set aside waits.
    """

    inner: LLM
    usage: Usage
    budget: Budget = field(default_factory=Budget)
    spent_before: tuple[int, int] = (0, 0)
    """Tokens read and written by earlier processes of the same work: the budget is for all of it."""
    _aside: tuple[int, int] = (0, 0)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat if the budget allows it."""
        # What a chat template adds is a few tokens for each turn.
        most = sum(self.count(message.text) + 16 for message in messages), sampling.max_tokens
        async with self._paying(most, 1):
            reply = await self.inner.chat(messages, sampling)
            self.usage.add(reply.prompt_tokens, reply.new_tokens)
        return reply

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """PromptLogprobs prompts if the budget allows it. Servers write a token after each, so one is counted."""
        most = sum(self.count(one.prefix + one.rest) + 2 for one in prompts), len(prompts)
        async with self._paying(most, len(prompts)):
            answers = await self.inner.prompt_logprobs(prompts, top=top)
            for answer in answers:
                self.usage.add(answer.prompt_tokens, 1)
        return answers

    @contextlib.asynccontextmanager
    async def _paying(self, most: tuple[int, int], calls: int) -> AsyncIterator[None]:
        """Set aside what calls can cost at most, and count those of their answers that cannot be used.

        An answer that cannot be read counts as what was set aside for it where its server does not tell; before it is
        asked for again, as much is set aside anew.
        """
        each = most[0] // max(calls, 1), most[1] // max(calls, 1)
        held = [*most]

        async def lost(read: int | None, written: int | None, again: bool) -> None:
            self.usage.lose(each[0] if read is None else read, each[1] if written is None else written)
            if again:
                held[:] = held[0] - each[0], held[1] - each[1]
                self._release(each)
                await self._set_aside(each)
                held[:] = held[0] + each[0], held[1] + each[1]

        await self._set_aside(most)
        before = LOST.set(lost)
        try:
            yield
        except Declined as error:
            self.usage.add(error.prompt_tokens, error.new_tokens)
            self.usage.unusable += 1
            raise
        finally:
            LOST.reset(before)
            self._release((held[0], held[1]))

    def spent(self) -> tuple[int, int]:
        """Tokens read and written so far, with those of earlier processes."""
        return self.usage.prompt_tokens + self.spent_before[0], self.usage.new_tokens + self.spent_before[1]

    async def _set_aside(self, most: tuple[int, int]) -> None:
        while self._is_over(most, self._aside):
            if self._is_over(most, (0, 0)):
                raise CrateError(self._spent_line())
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
        self._aside = self._aside[0] + most[0], self._aside[1] + most[1]

    def _is_over(self, most: tuple[int, int], aside: tuple[int, int]) -> bool:
        """Whether what is spent, what is set aside and one more call are more than the budget."""
        reading, writing = (a + b + c for a, b, c in zip(self.spent(), aside, most, strict=True))
        if self.budget.tokens is not None and reading + writing > self.budget.tokens:
            return True
        return self.budget.money is not None and self.budget.price.of(reading, writing) > self.budget.money

    def _release(self, most: tuple[int, int]) -> None:
        self._aside = self._aside[0] - most[0], self._aside[1] - most[1]
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    def _spent_line(self) -> str:
        spent, budget = self.spent(), self.budget
        said = f"{human(sum(spent))} tokens of {'no limit' if budget.tokens is None else human(budget.tokens)}"
        if budget.money is not None:
            paid, currency = budget.price.of(*spent), budget.price.currency
            said += f", {paid:.2f} {currency} of {budget.money:.2f} (left: {budget.money - paid:.2f})"
        return f"the budget is spent: {said}. All that was answered is kept. Give a larger one to go on"
