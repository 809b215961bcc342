"""Reasoning in the answers of language models: removed in every known form, and never taken for the answer.

    tags        <think>...</think>, <|START_THINKING|>..., [THINK]..., ◁think▷...; also with one of the two tags only
    channels    <|channel|>analysis<|message|>...<|channel|>final<|message|>...; also with the markers removed
    headings    Thinking: ... Answer: ...; Here is my thought process: ... Here is my response: ...

The answer itself may be in tags (<answer>...</answer>) and may end with a token of the chat template.

Reasoning that a server returns in a separate field is put into an open tag if there is no answer next to it
(`clients/responses.py`).
"""

import html
import re
from collections.abc import Sequence

from cratelm.interpretation.llm import LLM, LLMError, Message, Reply, Sampling
from cratelm.runtime import printable

ROOM = 4096
"""Tokens added to the limit of an answer that ended within its reasoning."""
_SHOWN = 120
"""Characters of the reasoning that an error quotes."""

_NAME = (
    r"(?:think(?:ing)?(?:[_ ]process)?|thoughts?|thought[_ ]process|reason(?:ing)?|reflection|scratchpad|analysis|cot"
    r"|chain[_ ]of[_ ]thought|inner[_ ](?:monologue|thoughts?)|plan(?:ning)?|deliberation)"
)
_UNQUOTED = r"(?<![`\"'“‘])"
_OPEN = (
    rf"{_UNQUOTED}(?:<\s*(?:\w+:)?{_NAME}(?:\s[^<>]*)?>|<[|｜](?:start_|begin_of_|begin_)?{_NAME}[|｜]>|◁{_NAME}▷"
    rf"|\[{_NAME}\]|<details[^<>]*{_NAME}[^<>]*>|<\|channel>\s*{_NAME}|<unused94>)"
)
_CLOSE = (
    rf"{_UNQUOTED}(?:<\s*/\s*(?:\w+:)?{_NAME}\s*>|<[|｜](?:/|end_of_|end_){_NAME}[|｜]>|◁/{_NAME}▷|\[/{_NAME}\]"
    r"|</details\s*>|<channel\|>|<unused95>)"
)
_FLAGS = re.DOTALL | re.IGNORECASE
_TAG = re.compile(rf"{_OPEN}|(?P<close>{_CLOSE})", _FLAGS)
_CHANNEL = re.compile(r"<\|channel\|>", re.I)
_FINAL = re.compile(
    r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?:<\|(?:return|end|start|call)\|>|$)",
    _FLAGS,
)
_BARE_CHANNEL = re.compile(r"^\s*analysis(?:(?=[A-Z])|.*assistant\s*final)(?:.*assistant\s*final|.*)", re.DOTALL)


_ANSWER = r"(?:(?:final[_ ])?(?:answer|response|output|solution|explanation|result)|final)"
_IN_TAGS = re.compile(
    rf"^<({_ANSWER})\s*>(.*?)(?:</\1\s*>.*|$)|^<[|｜]begin_of_solution[|｜]>(.*?)(?:<[|｜].*|$)", _FLAGS
)
_ANSWER_LATER = re.compile(r".*<(?:final_)?answer\s*>(.*?)(?:</(?:final_)?answer\s*>.*|$)", _FLAGS)
_HEADED = re.compile(
    r"^\W*(?:here(?: is|['’]s) my (?:thought|thinking|reasoning)(?: process)?|(?:my )?(?:thinking|thoughts?|reasoning)"
    rf"(?: process)?)\W{{0,8}}:(?:.*\n\W{{0,8}}(?:here(?: is|['’]s) my )?{_ANSWER}\b\W{{0,8}}:(?:\*\*)?|.*)",
    _FLAGS,
)
"""Reasoning under a heading, up to the heading of the answer, or all text without one."""
_END = re.compile(
    r"(?<=\S)(?:<\|(?:im_end|eot_id|eom_id|end|end_of_turn|return)\|>|<end_of_turn>|</s>|<｜end▁of▁sentence｜>)\s*$",
    _FLAGS,
)
"""A token of the chat template at the end of an answer; an answer may be about such tokens, after a space."""


def without_reasoning(text: str) -> str:
    """A model's answer without its reasoning; empty if it is only reasoning. JSON is returned as it is."""
    text = text.strip()
    if text.startswith(("{", "```")):
        return text
    if re.match(rf"&lt;/?\s*{_NAME}", text, re.I):
        text = html.unescape(text)
    text = _END.sub("", _without_tags(text))
    text = _HEADED.sub("", text).strip()
    if match := _IN_TAGS.match(text):
        return (match[2] or match[3] or "").strip()
    if (match := _ANSWER_LATER.match(text)) and not _quotes(text):
        return match[1].strip()
    return text


def _quotes(text: str) -> bool:
    """Whether an answer mentions the tag of an answer, in quotes."""
    return re.search(r"[`\"'“‘]</?(?:final_)?answer", text, re.I) is not None


def _without_tags(text: str) -> str:
    """A text without reasoning in tags and channels."""
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
