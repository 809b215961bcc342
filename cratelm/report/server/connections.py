"""Limits of the connections to a live browser: per address, until a request arrives, and while an answer is not read.

The guard counts requests. A connection without a request is invisible to it, and still takes one of the files that the
process may open.
"""

import asyncio
from typing import Any

CONNECTIONS = 800
"""Limit of open connections; a process may usually open 1,024 files."""
PER_ADDRESS = 200
"""Limit of open connections of one address. A browser opens about six; visitors behind a proxy share its address."""
HEAD_SECONDS = 10.0
"""Longest time from the opening of a connection, or from the first byte after an answer, to a whole request head."""
READ_SECONDS = 30.0
"""Longest time in which a client reads nothing of an answer."""


def limited_protocol(
    per_address: int = PER_ADDRESS, head_seconds: float = HEAD_SECONDS, read_seconds: float = READ_SECONDS
) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits. uvicorn itself limits only the pause after an answer.

    A new connection of an address with too many replaces the oldest one that waits for a request; it is refused if
    every connection of the address has a request.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class LimitedProtocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.opened, address = self.loop.time(), self.client and self.client[0]
            peers = [
                peer for peer in self.connections
                if (peer.client and peer.client[0]) == address and not peer.transport.is_closing()
            ]  # fmt: skip
            if len(peers) > per_address:
                idle = [peer for peer in peers if peer is not self and peer.is_idle()]
                min(idle, key=lambda peer: peer.opened, default=self).transport.abort()
            self.expect(head_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self.expect(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.flow.write_paused:
                return
            if not self.is_idle():
                self.expect(None)
            elif self.deadline is None:  # the first bytes of the next head
                self.expect(head_seconds)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.expect(read_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.expect(None)

        def expect(self, seconds: float | None) -> None:
            """Close the connection after this time; None removes the limit."""
            if self.deadline is not None:
                self.deadline.cancel()
            self.deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

        def is_idle(self) -> bool:
            """Whether the connection waits for a request: no answer is computed (`cycle`: the last request) or sent."""
            return not self.flow.write_paused and (self.cycle is None or self.cycle.response_complete)

    return LimitedProtocol
