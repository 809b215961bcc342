"""Connections to a live browser that ask slowly, or nothing."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cratelm.report.server.connections import impatient

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

SECONDS = 0.5
REQUEST = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


async def application(scope: Any, _receive: Any, send: Any) -> None:
    """Answers `/slow` after longer than a connection may be idle, and never reads a body."""
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * SECONDS)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port() -> Iterator[int]:
    config = uvicorn.Config(application, http=impatient(SECONDS), lifespan="off", log_level="error", ws="none")
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield int(listening.getsockname()[1])
    server.should_exit = True
    thread.join(30)
    listening.close()


def is_closed_while_dripping(connection: socket.socket, drip: bytes) -> bool:
    """Whether the server ends the connection though a byte comes now and then; a minute is more than it may take."""
    connection.settimeout(SECONDS / 5)
    until = time.monotonic() + 60
    for place in range(10**6):
        try:
            connection.sendall(drip[place % len(drip) : place % len(drip) + 1])
            if not connection.recv(100):
                return True
        except TimeoutError:
            pass
        except OSError:
            return True
        if time.monotonic() > until:
            break
    return False


def answered(connection: socket.socket) -> None:
    found = b""
    while not found.endswith(b"ok"):
        part = connection.recv(1000)
        assert part
        found += part


@pytest.mark.parametrize("requests", [0, 1, 3])
def test_a_head_that_drips_is_cut_off_whichever_request_it_is(port: int, requests: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        for _ in range(requests):
            connection.sendall(REQUEST)
            answered(connection)
        assert is_closed_while_dripping(connection, b"x")


def test_the_rest_of_a_body_that_nobody_reads_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 100000000\r\n\r\n")
        answered(connection)
        assert is_closed_while_dripping(connection, b"x")


def test_a_request_under_way_is_waited_for_and_a_connection_used_again(port: int) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        own = None
        for path in ("/slow", "/", "/slow", "/"):
            connection.request("GET", path)
            assert connection.getresponse().read() == b"ok"
            own = own or connection.sock
            assert connection.sock is own
