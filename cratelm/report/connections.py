"""Connections to a live browser: how many there may be, and how long one may take to ask its first thing.

A browser keeps some six connections open, so fifty readers hold three hundred that ask nothing. The guard counts
requests; this only keeps idle or dripping connections from using up the files that a process may open.
"""

import asyncio
from typing import Any

CONNECTIONS = 800
"""Open at a time; a process may usually open 1,024 files."""
FIRST_SECONDS = 10.0
"""From a connection's opening to the end of its first request's head."""


def impatient(seconds: float = FIRST_SECONDS) -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP, which closes a connection that has not asked for anything in time."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self.close_if_idle)

        def close_if_idle(self) -> None:
            # `cycle` is the request under way or the last one; None until the first head has come.
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Impatient
