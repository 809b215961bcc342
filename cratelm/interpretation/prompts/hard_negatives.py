"""Texts on which a neuron is silent, as a part of an explainer's prompt, before the request at its end."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from cratelm.interpretation.llm import Message
from cratelm.interpretation.prompts.explainer import ExplainerPrompt
from cratelm.rundir import read_json

NEGATIVES_FILE = Path(__file__).with_name("hard_negatives.json")


@cache
def _words() -> str:
    return str(read_json(NEGATIVES_FILE, made_by="pip install --force-reinstall cratelm")["negatives"])


def negatives_block(texts: Sequence[str]) -> str:
    """The texts on a line each, with the sentence that says what they are; empty without texts."""
    return "\n".join([_words(), *(f"- {text}" for text in texts)]) if texts else ""


def with_negatives(prompt: ExplainerPrompt, block: str, count: Callable[[str], int]) -> ExplainerPrompt:
    """The prompt with a block before the last paragraph of its last turn, which is the request."""
    if not block:
        return prompt
    *before, last = prompt.messages
    body, _, request = last.text.rpartition("\n\n")
    text = "\n\n".join([body, block, request]) if body else f"{block}\n\n{request}"
    messages = (*before, Message(last.role, text))
    return replace(prompt, messages=messages, tokens=prompt.tokens - count(last.text) + count(text))
