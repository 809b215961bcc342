"""The base URL of a server, and the key that is sent to it."""

import os
from urllib.parse import urlsplit

from cratelm.errors import CrateError

KEY = "OPENAI_API_KEY"
"""Environment variable of the key, unless another one is named."""
NO_KEY = "none"
"""Sent as the key if there is none: servers without keys ignore it."""


def check_url(url: str) -> str:
    """A base URL without its trailing slash. Refuses one without http, or with a password: URLs are stored."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CrateError(f"{url!r} is not a server URL; expected something like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise CrateError(f"the URL of {parts.hostname} holds a secret or a query. Put the key in {KEY} instead")
    return url.rstrip("/")


def find_key(url: str, variable: str) -> tuple[str, str]:
    """The environment variable and the key in it; an empty key if none is set.

    Unless the variable is named, no key is sent over a connection that others could read.
    """
    if variable and not os.environ.get(variable):
        raise CrateError(f"the environment variable {variable} is empty. Put the key of {url} into it")
    parts = urlsplit(url)
    private = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
    name = variable or KEY
    return name, os.environ.get(name, "") if variable or private else ""
