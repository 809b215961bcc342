"""A live browser as a process of its own on loopback, and requests to it. Ended by its id, whatever a test does."""

import contextlib
import http.client
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECONDS = 60


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """The content as JSON."""
        return json.loads(self.content)


@dataclass
class Served:
    """A running server."""

    address: str
    process: subprocess.Popen[str]
    token: str = ""

    @property
    def place(self) -> str:
        """Host and port."""
        return urlsplit(self.address).netloc

    def ask(self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        """One request, with just these headers."""
        connection = http.client.HTTPConnection(self.place, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            found = connection.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())

    def post(self, path: str, value: Any, **headers: str) -> Answer:
        """Write as our own page does."""
        own = {"content_type": "application/json", "x_cratelm_token": self.page_token()} | headers
        return self.ask(path, method="POST", body=json.dumps(value).encode(), **own)

    def page_token(self) -> str:
        """The token in the page."""
        if not self.token:
            page = self.ask("/").content.decode()
            match = re.search(r'<meta name="cratelm-token" content="([^"]+)">', page)
            assert match is not None, page[:2000]
            self.token = match[1]
        return self.token


@contextlib.contextmanager
def serve(*arguments: str | Path, env: dict[str, str] | None = None) -> Iterator[Served]:
    """Start `cratelm serve ... --port 0`, wait for its address, end it."""
    command = [sys.executable, "-m", "cratelm", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | (env or {})
    )
    try:
        yield Served(_address(process), process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    until, said = time.monotonic() + SECONDS, ""
    while time.monotonic() < until:
        if select.select([process.stderr], [], [], 0.2)[0]:
            said += os.read(process.stderr.fileno(), 4096).decode()
            if match := re.search(r"(http://\S+)\s", said):
                return match[1]
        if process.poll() is not None:
            break
    raise AssertionError(f"no server: {said}")
