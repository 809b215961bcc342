"""Connections to a live browser: how many there may be, and how long one may take to ask its next thing.

A browser keeps some six connections open, so fifty readers hold three hundred that ask nothing. The guard counts
requests; this only keeps idle or dripping connections from using up the files that a process may open.
"""

import asyncio
from typing import Any

CONNECTIONS = 800
"""Open at a time; a process may usually open 1,024 files."""
HEAD_SECONDS = 10.0
"""From a connection's opening, or the first byte after an answer, to the end of the next request's head."""


def impatient(seconds: float = HEAD_SECONDS) -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP, which closes a connection that does not ask, or go on asking, in time.

    uvicorn itself closes one that is silent after an answer; a byte now and then would keep it open for ever.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.until = self.loop.call_later(seconds, self.close_if_idle)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self.is_idle():
                self.until.cancel()
            elif self.until.cancelled():  # the first bytes of the next head, or the rest of a body that nobody reads
                self.until = self.loop.call_later(seconds, self.close_if_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self.until.cancel()
            super().connection_lost(exc)

        def is_idle(self) -> bool:
            # `cycle` is the request under way or the last one; None until the first head has come.
            return self.cycle is None or self.cycle.response_complete

        def close_if_idle(self) -> None:
            if self.is_idle() and not self.transport.is_closing():
                self.transport.close()

    return Impatient
