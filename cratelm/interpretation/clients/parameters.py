"""Parameters of a chat request that a server does not support: found once for a server, then left out.

A refusal that names a parameter drops it. After another refusal of a request with parameters that the server has not
accepted yet, each is left out on trial. A server error is answered so for the system message alone: chat templates
without one often fail with status 500. The fields that the user gave are never left out.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from cratelm.errors import CrateError
from cratelm.interpretation.clients.transport import Refused
from cratelm.interpretation.llm import Sampling

Body = dict[str, Any]
NO_SYSTEM = re.compile(
    r"system.{0,20}(role|message|prompt|turn)|role.{0,20}system|roles? must alternate|only user and assistant", re.I
)
"""Error messages of servers whose chat template has no system message."""
_NAMED: dict[str, str] = {
    "prompt_cache_key": r"prompt_cache_key",
    "cache_control": r"cache_control|content.{0,60}(str\b|string)|content.{0,20}(list|array|parts)",
    "prefixItems": r"prefixItems|\bconst\b|schema",
    "response_format": r"response_format|text\.format|json_schema|grammar|guided|structured.?output",
    "top_p": r"top[_-]?p(?![a-z])",
    "seed": r"(?<![a-z])seed(?![a-z])",
    "temperature": r"temperature",
    "max_tokens": r"max_completion_tokens|max_tokens",
}
"""Feature of a request -> pattern of a refusal that names it, in the order in which features are dropped."""
OPTIONS = ("reasoning_effort", "chat_template_kwargs")
"""Fields that have an option of this name; any other field that the user gave is from `--extra-body`."""
ABOUT_PROMPT = re.compile(
    r"context.{0,3}(length|window|size)|too (long|large|many tokens)|chat template|exceed|maximum|moderat|flagged"
    r"|content.{0,3}polic|model.{0,80}(not (found|exist|served)|does not exist)", re.I | re.S,
)  # fmt: skip
"""Refusals that no parameter changes."""


@dataclass(slots=True)
class Attempt:
    """One request: enter it around `Transport.post`. A refusal is suppressed and kept as `refusal`."""

    body: Body
    left_out: str
    """The feature that is left out on trial."""
    same_500s: int
    """Identical server errors that end the attempt (`Transport.post`)."""
    owner: "Parameters"
    refusal: Refused | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> Literal[False] | bool:
        if error is None:
            self.owner.accepted.update(features(self.body))
            self.owner.unsupported.update({self.left_out} - {""})
        self.refusal = error if isinstance(error, Refused) else None
        return self.refusal is not None


@dataclass(slots=True)
class Parameters:
    """What is known of a server's parameters."""

    unsupported: set[str] = field(default_factory=set)
    """Features that are left out: parameters, `system` (its text is put before the first turn), `prefixItems`."""
    accepted: set[str] = field(default_factory=set)
    """Features of requests that were answered."""
    futile: set[str] = field(default_factory=set)
    """Features that were left out on trial without success."""

    def attempts(self, build: Callable[[Set[str]], Body]) -> Iterator[Attempt]:
        """The requests to make in turn until one is answered; the refusal of the last one is final."""
        tried, left_out = set[str](), ""
        while True:
            whole = build(self.unsupported)
            new = [name for name in features(whole) if name not in self.accepted | self.futile]
            same_500s = 1 if left_out else 2 if "system" in new else 0
            attempt = Attempt(build(self.unsupported | {left_out}), left_out, same_500s, self)
            yield attempt
            if attempt.refusal is None:
                return
            if name := self._named(attempt.refusal, attempt.body):
                self.unsupported.add(name)
            if build(self.unsupported) != whole:  # by this refusal, or by one of a concurrent request
                left_out = ""
                continue
            failed, about_prompt = attempt.refusal.status == 500, ABOUT_PROMPT.search(str(attempt.refusal))
            candidates = [name for name in new if name not in tried and (name == "system" or not failed)]
            if candidates and not (about_prompt and not failed):
                left_out = candidates[0]
                tried.add(left_out)
            elif left_out or failed:
                self.futile |= tried
                tried, left_out = set(), ""
            else:
                return

    def _named(self, refusal: Refused, body: Body) -> str:
        """The feature of this request that a refusal names; empty if none."""
        message = refusal.detail
        for name in features(body):
            if name == "system" and NO_SYSTEM.search(message):
                return name
            pattern = _NAMED.get(name.split()[0])
            about_limit = name == "max_tokens" and ABOUT_PROMPT.search(message)
            if pattern and name not in self.accepted and not about_limit and re.search(pattern, message, re.I):
                return name
        return ""


def check_extra(url: str, refusal: Refused, extra: Mapping[str, Any]) -> None:
    """Raise `CrateError` if a refusal names a field that the user gave: every request would fail."""
    for name in extra:
        spelled = r"[_. ]".join(map(re.escape, name.split("_")))  # reasoning.effort at /responses
        if "_" in name and re.search(rf"(?<![a-z]){spelled}(?![a-z])", refusal.detail, re.I):
            option = f"--{name.replace('_', '-')}" if name in OPTIONS else "--extra-body"
            raise CrateError(
                f"{url} refuses {name} ({option}): {refusal}. Hint: give another value, or leave {option} out"
            ) from None


def chat_body(model: str, turns: list[dict[str, str]], sampling: Sampling, without: Set[str]) -> Body:
    """The body of a chat request without some features. `top_p` and `seed` are in it only if they are set."""
    limit = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
    body: Body = {"model": model, "messages": turns, limit: sampling.max_tokens, "temperature": sampling.temperature}
    body |= {"top_p": sampling.top_p} if sampling.top_p != 1 else {}
    body |= {"seed": sampling.seed} if sampling.seed else {}
    if sampling.schema is not None:
        schema = dict(sampling.schema) if "prefixItems" not in without else unpinned(sampling.schema)
        answer = {"name": "answer", "strict": True, "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": answer}
    return {key: value for key, value in body.items() if key == "max_tokens" or _label(key, value) not in without}


def features(body: Mapping[str, Any]) -> list[str]:
    """The optional features of a request, in the order in which they are dropped."""
    turns = body["messages"]
    system = ["system"] if turns[0]["role"] == "system" and len(turns) > 1 else []
    pinned = ["prefixItems"] if "prefixItems" in json.dumps(body.get("response_format")) else []
    hints = ["cache_control"] if any(not isinstance(turn["content"], str) for turn in turns) else []
    return hints + system + pinned + [_label(name, body[name]) for name in _NAMED if name in body]


def _label(name: str, value: Any) -> str:
    """The feature of a parameter; that of a temperature includes the value, because some servers accept only 1."""
    return f"{name} {value:g}" if name == "temperature" and isinstance(value, int | float) else name


def unpinned(schema: Any) -> Any:
    """A schema without `prefixItems` and `const`: all items of a list have the form of the first item."""
    if not isinstance(schema, Mapping):
        return schema
    plain = {name: unpinned(value) for name, value in schema.items() if name not in ("prefixItems", "items")}
    if "const" in plain:
        return {"type": "string"}
    if "prefixItems" in schema or "items" in schema:
        plain["items"] = unpinned(schema["prefixItems"][0] if "prefixItems" in schema else schema["items"])
    return plain
