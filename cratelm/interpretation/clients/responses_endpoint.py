"""OpenAI's `/responses` for models that do not answer at `/chat/completions`: requests and answers are converted."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar

from cratelm.interpretation.clients.parameters import Attempt, Body
from cratelm.interpretation.clients.responses import Malformed
from cratelm.interpretation.clients.transport import Refused

Parsed = TypeVar("Parsed")

CHAT_LABEL = "chat/completions"
"""Recorded with the parameters that a server does not support, if a model answers at `/responses` only."""
NO_CHAT = re.compile(
    r"v1/responses|responses (api|endpoint)|not a chat model|not supported in the v1/chat/completions"
    r"|chat.?completions? (operation|endpoint|api)?.{0,20}(does not work|(is )?not supported|unsupported)",
    re.I | re.S,
)
"""Refusals of a model that does not answer at `/chat/completions`."""
SMALLEST_LIMIT = 16
"""The smallest `max_output_tokens` that OpenAI accepts."""
DROPPED = ("messages", "max_tokens", "max_completion_tokens", "response_format", "reasoning_effort", "seed")
"""Fields of a chat request that have another form at `/responses`, or none (`seed`)."""


@dataclass(slots=True)
class ChatRequest:
    """One request of an `Attempt`, at one path: enter it around `Transport.post`."""

    attempt: Attempt
    converted: bool = False
    """Asked at `/responses`."""
    leads_on: Callable[[Refused], bool] = lambda _: False
    """Whether a refusal at `/chat/completions` may mean that the model answers at `/responses`."""
    instead: Refused | None = None
    """Reported in place of a refusal at `/responses`: the refusal at `/chat/completions`, if it did not name a path."""
    refusal: Refused | None = None

    @property
    def path(self) -> str:
        """Path of the server."""
        return "/responses" if self.converted else "/chat/completions"

    @property
    def body(self) -> Body:
        """Body of the request."""
        return responses_body(self.attempt.body) if self.converted else self.attempt.body

    def reader(self, parse: Callable[[Body], Parsed]) -> Callable[[Body], Parsed]:
        """`parse` reads chat completions; the result reads the answers of this path."""
        return partial(_parse_converted, parse) if self.converted else parse

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False] | bool:
        if isinstance(error, Refused):
            self.refusal = self.instead or error
            return self.leads_on(error) or self.attempt.__exit__(kind, self.refusal, trace)
        if error is None and self.converted:
            self.attempt.owner.unsupported.add(CHAT_LABEL)
        return self.attempt.__exit__(kind, error, trace)


def _parse_converted(parse: Callable[[Body], Parsed], answer: Body) -> Parsed:
    return parse(as_chat_completion(answer))


def responses_body(chat: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat request for `/responses`. Nothing is stored by the provider."""
    body = {name: value for name, value in chat.items() if name not in DROPPED}
    limit = chat.get("max_tokens", chat.get("max_completion_tokens"))
    body |= {"input": chat["messages"], "store": False}
    body |= {} if limit is None else {"max_output_tokens": max(limit, SMALLEST_LIMIT)}
    if effort := chat.get("reasoning_effort"):
        body["reasoning"] = {"effort": effort}
    if answer := chat.get("response_format"):
        body["text"] = {"format": {"type": "json_schema", **answer["json_schema"]}}
    return body


def as_chat_completion(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer of `/responses` as a chat completion. Raises `Malformed`."""
    items = answer.get("output")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Malformed("not a response: no list of outputs")
    messages = [item for item in items if item.get("type", "message") == "message"]
    blocks = [block for item in messages for block in _blocks(item.get("content")) if isinstance(block, dict)]
    texts = [str(block["text"]) for block in blocks if isinstance(block.get("text"), str)]
    refusals = [str(block["refusal"]) for block in blocks if block.get("refusal")]
    reasoning = [item for item in items if item.get("type") == "reasoning"]
    thoughts = [block.get("text", "") for item in reasoning for name in ("summary", "content")
                for block in _blocks(item.get(name)) if isinstance(block, dict)]  # fmt: skip
    details = answer.get("incomplete_details")
    cut = details.get("reason") if isinstance(details, dict) else None
    message = {
        "content": "".join(texts) if texts else None, "refusal": "".join(refusals) or None,
        "reasoning": " ".join(map(str, thoughts)) or ("(not shown)" if reasoning else None),
    }  # fmt: skip
    choice = {
        "message": message,
        "finish_reason": cut or ("length" if answer.get("status") == "incomplete" else "stop"),
    }
    return {"choices": [choice], "usage": answer.get("usage")}


def _blocks(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"text": content}] if isinstance(content, str) else []
