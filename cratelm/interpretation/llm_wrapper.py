"""A wrapper of a language model: the part that every cache, meter and counter of calls has."""

from collections.abc import Sequence

from cratelm.interpretation.llm import LLM, BatchService, Message


class LLMWrapper:
    """A wrapper of a language model (a cache, a meter): it changes how calls are made, and passes on all else."""

    __slots__ = ()
    inner: LLM
    """The wrapped model."""

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def identity(self) -> str:
        return self.inner.identity

    @property
    def context(self) -> int | None:
        return self.inner.context

    @property
    def price(self) -> tuple[float, float] | None:
        return self.inner.price

    @property
    def batch_api(self) -> BatchService | None:
        return self.inner.batch_api

    @property
    def remote(self) -> bool:
        return self.inner.remote

    @property
    def slots(self) -> int | None:
        return self.inner.slots

    @property
    def served(self) -> tuple[str, ...]:
        return self.inner.served

    @property
    def counts_exactly(self) -> bool:
        return self.inner.counts_exactly

    @property
    def logprobs_format(self) -> tuple[str, int] | None:
        return self.inner.logprobs_format

    @property
    def unsupported(self) -> set[str]:
        """Parameters that its server refuses."""
        return self.inner.unsupported

    def set_logprobs_format(self, style: str, most: int) -> None:
        self.inner.set_logprobs_format(style, most)

    def count(self, text: str) -> int:
        return self.inner.count(text)

    def expected(self, text: str) -> int:
        return self.inner.expected(text)

    async def calibrate(self, tokens_per_byte: float | None = None) -> float:
        return await self.inner.calibrate(tokens_per_byte)

    async def rendered(self, messages: Sequence[Message]) -> str | None:
        return await self.inner.rendered(messages)

    async def connect(self) -> None:
        await self.inner.connect()

    async def close(self) -> None:
        await self.inner.close()
