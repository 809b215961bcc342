"""OpenAI's `/responses` for models that do not answer at `/chat/completions`: requests and answers are converted."""

import re
from collections.abc import Mapping
from typing import Any

from cratelm.interpretation.clients.responses import Malformed

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
