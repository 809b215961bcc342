"""What servers report about a model in their lists: context length, price, number of slots, hints for caching."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

CONTEXTS = ("max_model_len", "context_length", "max_context_length", "n_ctx", "n_ctx_train")
"""Fields under which servers report the context length."""
PRICES = (("prompt", "completion"), ("input", "output"), ("input_tokens", "output_tokens"))
"""Fields of a price list: the price of tokens read, and of tokens generated."""
PER_TOKEN = 1e-3
"""A listed price below this is the price of a token, otherwise that of a million tokens."""
CacheHint = Literal["", "prompt_cache_key", "cache_control"]
SHORTEST_CACHED = 4096
"""Characters of the shortest beginning that gets a `cache_control`: providers cache from about 1,024 tokens."""


def tokens_in(value: Any) -> int | None:
    """A number of tokens as servers write it: 4096, 4096.0, "4096", "128k", "1M"; None if it is something else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)", str(value).strip().lower().replace(",", ""))
    return int(float(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2]]) or None if match else None


def context_in(entry: Mapping[str, Any]) -> int | None:
    """The context length in an entry of a model list."""
    meta = entry.get("meta")
    facts = {**entry, **(meta if isinstance(meta, dict) else {})}
    return next((size for key in CONTEXTS if (size := tokens_in(facts.get(key)))), None)


def price_in(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """The price of a million tokens read and generated in an entry of a model list; None if it lists none."""
    metadata = entry.get("metadata")
    listed = entry.get("pricing") or (metadata.get("pricing") if isinstance(metadata, dict) else None)
    prices: dict[str, Any] = listed if isinstance(listed, dict) else {}
    for names in PRICES:
        read, generated = (_per_million(prices.get(name)) for name in names)
        if read is not None and generated is not None:
            return read, generated
    return None


def _per_million(value: Any) -> float | None:
    try:
        price = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    if not 0 <= price < math.inf:
        return None
    return price * 1e6 if price < PER_TOKEN else price


def slots_in(props: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Number of slots, and the context length of one slot, as llama.cpp's `/props` or `/slots` reports them."""
    rows = props.get("data")
    slots = [row for row in rows if isinstance(row, dict) and "n_ctx" in row] if isinstance(rows, list) else []
    settings = props.get("default_generation_settings")
    context = slots[0]["n_ctx"] if slots else settings.get("n_ctx") if isinstance(settings, dict) else None
    return tokens_in(props.get("total_slots")) or len(slots) or None, tokens_in(context)


def cache_hint(url: str, model: str) -> CacheHint:
    """The hint with which a provider caches the beginning that prompts share; empty if it caches without one."""
    if re.search(r"claude|^~?anthropic/", model, re.I):
        return "cache_control"
    host = urlsplit(url).hostname or ""
    return "prompt_cache_key" if re.search(r"(^|\.)openai\.(com|azure\.com)$", host) else ""


def with_cache_hint(body: dict[str, Any], hint: CacheHint) -> dict[str, Any]:
    """The body of a chat request with the hint; the turns before the last one are what prompts share."""
    *shared, last = body["messages"]
    if not shared or not hint:
        return body
    if hint == "prompt_cache_key":
        return body | {hint: "cratelm-" + hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:16]}
    if sum(len(turn["content"]) for turn in shared) < SHORTEST_CACHED:
        return body
    block = {"type": "text", "text": shared[-1]["content"], "cache_control": {"type": "ephemeral"}}
    return body | {"messages": [*shared[:-1], shared[-1] | {"content": [block]}, last]}
