"""Limits of the connections to a live browser: in all, per address, until a request arrives, while an answer is unread.

The guard counts requests. A connection without a request is invisible to it, and still takes one of the files that the
process may open.
"""

import asyncio
from collections import Counter
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
    connections: int = CONNECTIONS, per_address: int = PER_ADDRESS, head_seconds: float = HEAD_SECONDS,
    read_seconds: float = READ_SECONDS,
) -> type[asyncio.Protocol]:  # fmt: skip
    """uvicorn's HTTP protocol with these limits. uvicorn itself limits only the pause after an answer.

    A new connection of an address with too many replaces the oldest one that waits for a request; one too many in all
    replaces the oldest waiting one of the address that has most of these. It is refused if there is none to replace.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class LimitedProtocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.opened, self.address = self.loop.time(), self.client and self.client[0]
            self.expect(head_seconds)
            peers = [peer for peer in self.connections if not peer.transport.is_closing()]
            alike = [peer for peer in peers if peer.address == self.address]
            if len(alike) > per_address:
                self.replace(alike)
            elif len(peers) > connections:
                self.replace(peers)

        def replace(self, peers: list[Any]) -> None:
            """Close the oldest waiting connection of the address with most of them, or this one if none is waiting."""
            idle = [peer for peer in peers if peer is not self and peer.is_idle()]
            waiting = Counter(peer.address for peer in idle)
            oldest = min(idle, key=lambda peer: (-waiting[peer.address], peer.opened), default=self)
            oldest.transport.abort()

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
