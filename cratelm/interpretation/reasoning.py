"""Reasoning in the answers of language models: removed in every known form, and never taken for the answer.

    tags        <think>...</think>, <|START_THINKING|>..., [THINK]..., ◁think▷...; also with one of the two tags only
    channels    <|channel|>analysis<|message|>...<|channel|>final<|message|>...; also with the markers removed

Reasoning that a server returns in a separate field is put into an open tag if there is no answer next to it
(`clients/responses.py`).
"""

import re
from collections.abc import Sequence

from cratelm.interpretation.llm import LLM, LLMError, Message, Reply, Sampling
from cratelm.runtime import printable

ROOM = 4096
"""Tokens added to the limit of an answer that ended within its reasoning."""
_SHOWN = 120
"""Characters of the reasoning that an error quotes."""

_NAME = (
    r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis|chain[_ ]of[_ ]thought|inner_monologue)"
)
_UNQUOTED = r"(?<![`\"'“‘])"
_OPEN = (
    rf"{_UNQUOTED}(?:<(?:\w+:)?{_NAME}(?:\s[^<>]*)?>|<\|(?:start_|begin_of_|begin_)?{_NAME}\|>|◁{_NAME}▷|\[{_NAME}\]"
    r"|<unused94>)"
)
_CLOSE = rf"{_UNQUOTED}(?:</(?:\w+:)?{_NAME}\s*>|<\|(?:/|end_of_|end_){_NAME}\|>|◁/{_NAME}▷|\[/{_NAME}\]|<unused95>)"
_FLAGS = re.DOTALL | re.IGNORECASE
_TAG = re.compile(rf"{_OPEN}|(?P<close>{_CLOSE})", _FLAGS)
_CHANNEL = re.compile(r"<\|channel\|>", re.I)
_FINAL = re.compile(
    r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?:<\|(?:return|end|start|call)\|>|$)",
    _FLAGS,
)
_BARE_CHANNEL = re.compile(r"^\s*analysis(?:(?=[A-Z])|.*assistant\s*final)(?:.*assistant\s*final|.*)", re.DOTALL)


def without_reasoning(text: str) -> str:
    """A model's answer without its reasoning; empty if it is only reasoning. JSON is returned as it is."""
    text = text.strip()
    if text.startswith(("{", "```")):
        return text
    if _CHANNEL.search(text):
        return (_FINAL.findall(text) or [""])[-1].strip()
    text = _BARE_CHANNEL.sub("", text)
    kept, start, inside = list[str](), 0, False
    for tag in _TAG.finditer(text):
        if tag["close"]:
            if not inside:  # all before a closing tag without an opening one is reasoning
                kept.clear()
            start, inside = tag.end(), False
        elif not inside:
            kept.append(text[start : tag.start()])
            inside = True
    return "".join([*kept, *([] if inside else [text[start:]])]).strip()


def larger_limit(llm: LLM, messages: Sequence[Message], sampling: Sampling) -> int:
    """The limit of a second request, after reasoning that reached the first limit; the same limit if it is the most."""
    if llm.context is None:
        return sampling.max_tokens + ROOM
    used = sum(llm.count(message.text) + 16 for message in messages)
    return max(sampling.max_tokens, min(sampling.max_tokens + ROOM, llm.context - used))


def is_cut(reply: Reply, limit: int) -> bool:
    """Whether the limit of tokens ended an answer within its reasoning, or right after it."""
    text = without_reasoning(reply.text)
    return (reply.finish == "length" or reply.new_tokens >= limit) and (not text or text != reply.text.strip())


def spoken(reply: Reply, limit: int) -> str:
    """The answer without reasoning. Raises `LLMError` if nothing is left of it."""
    text = without_reasoning(reply.text)
    cut = reply.finish == "length" or reply.new_tokens >= limit > 0
    if text == reply.text.strip() and (text or not cut):
        return reply.text
    if text:
        return text
    quoted = " ".join(reply.text.split())[:_SHOWN]
    by = f", cut by the limit of {limit} tokens" if cut else ""
    raise LLMError(
        f'only reasoning and no answer{by}: "{printable(quoted)}". '
        "Give a larger --max-answer-tokens, or a lower --reasoning-effort"
    )
