"""What is in a response: JSON, an error with a status or without, the text of an answer, and reported usage."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST_QUOTE = 500
"""Characters of a server's message that an error quotes."""
MOST_EXTRA_TOKENS = 100_000
"""Tokens by which reported usage may exceed what was sent and requested; a larger number is not believed."""
BY_WORDS = (
    (429, r"rate.?limit|too many"), (401, r"authentication|api.?key"), (400, r"invalid_request|context length"),
)  # fmt: skip
"""The status that an error without one means; 502, which is retried, if its words say nothing."""
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thoughts")
"""Fields of a message that hold the reasoning before an answer."""


class Malformed(Exception):
    """Content of a response that does not have the expected form: not JSON, wrong lengths, cut off, too long."""


def json_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object. A list of objects, as some servers list their models, becomes `data`. Raises `Malformed`."""
    import jiter  # twice as fast as json on tables of prompt logprobs

    try:
        value = jiter.from_json(content, cache_mode="all")
    except ValueError as error:
        raise Malformed(f"not JSON ({error}): {content[:80].decode(errors='replace')!r}") from None
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return {"data": value}
    if not isinstance(value, dict):
        raise Malformed(f"JSON {type(value).__name__} instead of an object")
    return value


def error_in(answer: Mapping[str, Any], status: int) -> tuple[int, str, Any]:
    """Status, code and content of the error in a response, also in one with status 200; (0, "", None) without one."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = answer.get("error") or choice.get("error") or (answer if answer.get("object") == "error" else None)
    if status < 300 and not error and choice.get("finish_reason") != "error":
        return 0, "", None
    error = error or (answer if status >= 300 else "an error without a reason")
    fields = error if isinstance(error, dict) else {}
    code = " ".join(str(fields[name]) for name in ("code", "type") if fields.get(name))
    if status < 300:
        number, words = re.match(r"[45]\d\d\b", code), f"{code} {fields.get('message') or error}"
        named = (named for named, pattern in BY_WORDS if re.search(pattern, words, re.I))
        status = int(number[0]) if number else next(named, 502)
    return status, code, error


def error_message(error: Any) -> str:
    """The words of an error, on one line."""
    message = error
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or error.get("error") or error
    return " ".join(str(message).split())[:LONGEST_QUOTE] or "no reason given"


def answer_text(message: Mapping[str, Any]) -> str | None:
    """The text of an answer, its blocks joined; None if it has none. Reasoning without an answer is in a `<think>` tag.

    Raises `Malformed` for another form of content.
    """
    content = message.get("content")
    blocks = content if isinstance(content, list) else [content] if isinstance(content, dict) else None
    if blocks is not None:
        content = "".join(block if isinstance(block, str) else _block_text(block) for block in blocks)
    if content is not None and not isinstance(content, str):
        raise Malformed(f"content that is not text but {type(content).__name__}")
    reasoning = next((message[name] for name in REASONING if message.get(name)), None)
    if reasoning is None and blocks and not content:
        reasoning = blocks
    if reasoning is not None and not (content or "").strip():
        return f"<think>{str(reasoning)[:LONGEST_QUOTE]}"
    return content


def _block_text(block: Any) -> str:
    text = block.get("text") if isinstance(block, dict) and "text" in str(block.get("type", "text")) else None
    return str(text.get("value", "")) if isinstance(text, dict) else text if isinstance(text, str) else ""


def reported_usage(answer: Mapping[str, Any], sent: int, limit: Any) -> dict[str, int]:
    """The tokens that a server reports, without numbers that cannot be true: they count as not reported.

    `sent`: bytes of the request; `limit`: the most tokens that were requested. `cached_tokens` are those of the prompt
    that the server did not compute again.
    """
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = [usage.get(name) for name in ("prompt_tokens_details", "input_tokens_details")]
    cached = [value.get("cached_tokens") for value in details if isinstance(value, dict)]
    most = sent + MOST_EXTRA_TOKENS, (limit if isinstance(limit, int) else 0) + MOST_EXTRA_TOKENS
    counts = {
        "prompt_tokens": _credible((usage.get("prompt_tokens"), usage.get("input_tokens")), most[0]),
        "completion_tokens": _credible((usage.get("completion_tokens"), usage.get("output_tokens")), most[1]),
        "cached_tokens": _credible((*cached, usage.get("prompt_cache_hit_tokens")), most[0]),
    }
    return {name: count for name, count in counts.items() if count is not None}


def _credible(counts: Iterable[Any], most: int) -> int | None:
    """The first number of tokens from 0 to `most`; None without one."""
    numbers = (count for count in counts if type(count) in (int, float) and math.isfinite(count))
    return next((int(count) for count in numbers if 0 <= count <= most), None)


def paid_tokens(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens read and generated as the server reports them, 0 if it does not."""
    usage = answer.get("usage") or {}
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
