"""The compact prompt of an explainer: one user turn of a few hundred tokens, assembled from `compact_explainer.json`.

    A neuron ... Below are pieces of text in which it fires ...

    1. def head(<<self>>, path):\\n    return <<self>>.rows
    2. ...

    Tokens on which it fires, with the strength from 1 to 10:
    " self" 10, "os" 6

    In one short sentence: what do these tokens have in common? Begin with: The neuron fires on

Small models copy the few-shot examples of the table prompt (`explainer.py`); this prompt has none to copy.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from cratelm.interpretation.llm import Message
from cratelm.interpretation.prompts.escaping import running_text
from cratelm.interpretation.prompts.explainer import TURN, ExplainerPrompt, PromptTooLong
from cratelm.interpretation.prompts.few_shot import FewShotRecord
from cratelm.rundir import read_json

FILE = Path(__file__).with_name("compact_explainer.json")
OPEN, CLOSE = "<<", ">>"
LEAST_MARKED = 6
"""Least activation, from 0 to 10, of a token that is marked."""
BEFORE, AFTER = 16, 8
"""Tokens shown before and after the strongest token of an excerpt."""
LISTED = 12
"""Most tokens that are listed with their strength."""


@cache
def _words() -> dict[str, str]:
    texts: dict[str, str] = read_json(FILE, made_by="pip install --force-reinstall cratelm")["compact"]
    return texts


def compact_prompt(
    records: Sequence[FewShotRecord], *, count: Callable[[str], int], context: int | None, max_tokens: int
) -> ExplainerPrompt:  # fmt: skip
    """The chat that asks what a neuron with these excerpts fires on. Raises `PromptTooLong` if it does not fit."""
    words = _words()
    task = words["task"].replace("{escapes}", words["escapes"]).replace("{open}", OPEN).replace("{close}", CLOSE)
    pieces = [_piece(record) for record in records if any(record.activations)]
    numbered = [f"{number}. {piece}" for number, piece in enumerate(pieces, 1)]
    listed = ", ".join(f'"{token}" {value}' for token, value in _strongest(records))
    message = Message("user", "\n".join([task, "", *numbered, "", words["strongest"], listed, "", words["cue"]]))
    tokens = count(message.text) + TURN
    if context is not None and tokens + max_tokens > context:
        raise PromptTooLong(
            f"the explainer's prompt has {tokens:,} tokens, and with {max_tokens} more for the answer that is too long "
            f"for a context of {context:,}. Use a model with a longer context"
        )
    return ExplainerPrompt(messages=(message,), tokens=tokens, dropped=0)


def _piece(record: FewShotRecord) -> str:
    """The text around the strongest token of an excerpt, with marks around its strong tokens."""
    values = record.activations
    middle = max(range(len(values)), key=lambda i: (values[i], -i))
    shown = slice(max(middle - BEFORE, 0), middle + AFTER + 1)
    least = min(LEAST_MARKED, values[middle])  # an excerpt without strong tokens has its strongest marked
    parts = []
    pairs = zip(record.tokens[shown], values[shown], strict=True)
    for strong, group in groupby(pairs, key=lambda pair: pair[1] >= least):
        text = running_text([token for token, _ in group])
        space = text[: len(text) - len(text.lstrip(" "))] if strong else ""
        parts.append(f"{space}{OPEN}{text[len(space) :]}{CLOSE}" if strong else text)
    return "".join(parts).strip(" ")


def _strongest(records: Sequence[FewShotRecord]) -> list[tuple[str, int]]:
    """The tokens with the largest activations, strongest first, each with its largest."""
    largest: dict[str, int] = {}
    for record in records:
        for token, value in zip(record.tokens, record.activations, strict=True):
            if value:
                largest[token] = max(value, largest.get(token, 0))
    return sorted(largest.items(), key=lambda pair: -pair[1])[:LISTED]
