"""Limits of connections, with a small application on loopback."""

import contextlib
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

from cratelm.report.server.connections import limited_protocol  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the client needs several loopback addresses")
LARGE = 30_000_000
"""Bytes of the answer at /large: more than the buffers of two sockets hold."""
REQUEST = b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def application(scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * (LARGE if scope["path"] == "/large" else 1)})


@contextlib.contextmanager
def running(**limits: Any) -> Iterator[int]:
    """The port of a server with these limits."""
    config = uvicorn.Config(
        application, log_level="critical", lifespan="off", http=limited_protocol(**limits), ws="none"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)
            assert not thread.is_alive()


def connect(port: int, address: str = "127.0.0.1", sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(address, 0))
    connection.sendall(sent)
    return connection


def is_answered(connection: socket.socket, path: bytes = b"/") -> bool:
    try:
        connection.sendall(REQUEST % path)
        return connection.recv(12) == b"HTTP/1.1 200"
    except ConnectionError:
        return False


def is_closed(connection: socket.socket, within: float = 10.0) -> bool:
    """Whether the server closes the connection within a time."""
    connection.settimeout(within)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def hold_and_ask(port: int, count: int, sent: bytes) -> float:
    """Hold `count` idle connections of one address; seconds until another address and the same are answered."""
    with contextlib.ExitStack() as held:
        for _ in range(count):
            held.enter_context(connect(port, "127.0.0.2", sent))
        began = time.monotonic()
        for address in ("127.0.0.1", "127.0.0.2"):
            assert is_answered(held.enter_context(connect(port, address)))
        return time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", b"GET / HT"], ids=["silent", "half a head"])
def test_idle_connections_of_an_address_shut_out_no_visitor(sent: bytes) -> None:
    with running(per_address=10, head_seconds=60.0) as port:
        assert hold_and_ask(port, 60, sent) < 8


def test_idle_connections_of_many_addresses_shut_out_no_visitor() -> None:
    with running(connections=40, per_address=10, head_seconds=60.0) as port, contextlib.ExitStack() as held:
        early = held.enter_context(connect(port, "127.0.0.9"))
        for number in range(60):
            held.enter_context(connect(port, f"127.0.0.{number % 6 + 2}"))
        assert is_answered(held.enter_context(connect(port)))
        assert is_answered(early), "the address with most connections loses its oldest ones"


@pytest.mark.slow
def test_three_hundred_idle_connections_shut_out_no_visitor() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 1000:
        pytest.skip(f"a process may open {files} files only")
    with running(head_seconds=60.0) as port:
        assert hold_and_ask(port, 300, b"") < 8


def test_the_oldest_idle_connection_is_replaced_and_a_busy_one_is_not() -> None:
    with running(per_address=2, head_seconds=60.0) as port, contextlib.ExitStack() as opened:
        busy = opened.enter_context(connect(port, sent=REQUEST % b"/large"))
        assert busy.recv(12, socket.MSG_PEEK)  # the request has arrived before the others connect
        idle, new = (opened.enter_context(connect(port)) for _ in range(2))
        assert is_closed(idle)
        assert is_answered(new)
        received = 0
        while received < LARGE:
            part = busy.recv(1 << 20)
            assert part, received
            received += len(part)


@pytest.mark.parametrize("sent", [b"", b"GET / HT"], ids=["silent", "half a head"])
def test_a_connection_without_a_whole_request_head_is_closed_in_time(sent: bytes) -> None:
    with running(head_seconds=0.5) as port, connect(port, sent=sent) as connection:
        assert is_closed(connection)


def test_a_connection_that_sends_byte_after_byte_is_closed_in_time() -> None:
    with running(head_seconds=0.5) as port, connect(port) as connection:
        assert is_answered(connection)
        for _ in range(200):
            time.sleep(0.05)
            try:
                connection.sendall(b"G")
            except ConnectionError:
                return
        pytest.fail("still open after 10 s")


def test_a_client_that_does_not_read_its_answer_is_disconnected() -> None:
    with running(read_seconds=0.5) as port, connect(port) as connection:
        assert is_answered(connection, b"/large")
        time.sleep(2)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                received += len(part)
        assert received < LARGE


def test_a_client_that_asks_now_and_then_stays_connected() -> None:
    with running(head_seconds=0.5, per_address=2) as port, connect(port) as connection:
        for _ in range(3):
            assert is_answered(connection)
            connection.recv(1 << 16)
            time.sleep(0.8)
