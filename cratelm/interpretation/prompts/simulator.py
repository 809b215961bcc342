"""The prompts of simulators, assembled from the texts in `simulator.json` and `few_shot.json`.

The end of an all-at-once prompt; the few-shot examples before it look the same, with numbers:

    Neuron 4
    Explanation of neuron 4: this neuron fires on ...
    Activations:
    <start>
    The    unknown          the end of the text that all excerpts of a neuron begin with is here, before its first token
     rain  unknown
    <end>
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cratelm.interpretation.llm import Message
from cratelm.interpretation.prompts.escaping import running_text
from cratelm.interpretation.prompts.explainer import explanation_prefix
from cratelm.interpretation.prompts.few_shot import FewShotNeuron
from cratelm.rundir import read_json

FILE = Path(__file__).with_name("simulator.json")
STRUCTURED_EXAMPLES = 2
"""Few-shot neurons in a structured prompt, each with its shortest excerpt: an answer is long."""
ASKED_OF_EACH = 3
"""Tokens that a token-by-token prompt asks about in each few-shot excerpt."""


@cache
def _all_words() -> dict[str, Any]:
    return read_json(FILE, made_by="pip install --force-reinstall cratelm")


@cache
def _words(method: str) -> dict[str, str]:
    texts = _all_words()[method]
    return {name: "\n\n".join(text) if isinstance(text, list) else text for name, text in texts.items()}


def _filled(text: str, **values: object) -> str:
    """Fill in `{names}`; not with `format`, because the texts contain other braces."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def _task(method: str, escaped: bool, **values: object) -> str:
    return _filled(_words(method)["task"], escapes=_all_words()["escapes"] if escaped else "", **values)


def _explained(method: str, explanation: str, number: int = 0) -> str:
    """The line with an explanation, without the leading `fires on` of explanations by lookup: the prefix has it."""
    sentence = explanation.strip().removeprefix("fires on ")
    return _filled(_words(method)["explanation"], number=number, prefix=explanation_prefix(), explanation=sentence)


def all_at_once_prefix(
    explanation: str, examples: Sequence[FewShotNeuron], *, top: int, unknown: str, escaped: bool = True
) -> str:  # fmt: skip
    """The prompt before the first token of an excerpt; `escaped` if tokens are shown with escapes."""
    parts = [_task("all-at-once", escaped, top=top, unknown=unknown), ""]
    for number, neuron in enumerate(examples, 1):
        parts += [*_heading(number, neuron.explanation), *_tables(neuron, top=top, unknown=unknown), ""]
    parts += [*_heading(len(examples) + 1, explanation), "<start>", ""]
    return "\n".join(parts)


def _heading(number: int, explanation: str) -> tuple[str, str, str]:
    words = _words("all-at-once")
    explained = _explained("all-at-once", explanation, number)
    return _filled(words["neuron"], number=number), explained, words["activations"]


def _tables(neuron: FewShotNeuron, *, top: int, unknown: str) -> list[str]:
    lines = []
    for record in neuron.records:
        pairs = zip(record.tokens, record.activations, strict=True)
        rows = [
            f"{token}\t{unknown if i < record.unknown else min(value, top)}" for i, (token, value) in enumerate(pairs)
        ]
        lines += ["<start>", *rows, "<end>"]
    return lines


def all_at_once_rows(tokens: Sequence[str], *, unknown: str) -> tuple[str, tuple[int, ...]]:
    """The rows of an excerpt, and the character offset of each activation."""
    rows, places, length = [], [], 0
    for token in tokens:
        places.append(length + len(token) + 1)
        rows.append(f"{token}\t{unknown}\n")
        length += len(rows[-1])
    return "".join(rows) + "<end>\n", tuple(places)


def token_by_token_prefix(
    explanation: str, examples: Sequence[FewShotNeuron], *, top: int, escaped: bool = True
) -> str:  # fmt: skip
    """The prompt before the text whose last token is asked about."""
    words = _words("token-by-token")
    parts = [_task("token-by-token", escaped, top=top), ""]
    for number, neuron in enumerate(examples, 1):
        parts += [_filled(words["neuron"], number=number), _explained("token-by-token", neuron.explanation, number)]
        for record in neuron.records:
            for place in _telling(record.activations):
                question, _ = token_by_token_question(
                    record.tokens, place, answer=str(min(record.activations[place], top))
                )
                parts.append(words["text"] + question)
        parts.append("")
    number = len(examples) + 1
    parts += [_filled(words["neuron"], number=number), _explained("token-by-token", explanation, number)]
    return "\n".join(parts) + "\n" + words["text"]


def _telling(activations: Sequence[int]) -> list[int]:
    """Places worth asking about: the first of the strongest, and silent ones before and after it."""
    best = max(range(len(activations)), key=lambda i: (activations[i], -i))
    silent = [i for i, value in enumerate(activations) if value == 0]
    return sorted({best, *[i for i in silent if i < best][-1:], *silent[-1:]})[:ASKED_OF_EACH]


def token_by_token_question(tokens: Sequence[str], place: int, *, answer: str) -> tuple[str, int]:
    """The text up to one token, with its activation, and the character offset of the activation."""
    words = _words("token-by-token")
    asked = f"{running_text(tokens[: place + 1])}\n{words['last']}\t{tokens[place]}\n{words['activation']}\t"
    return f"{asked}{answer}\n", len(asked)


def structured_chat(
    explanation: str, tokens: Sequence[str], examples: Sequence[FewShotNeuron], *, escaped: bool = True
) -> tuple[Message, ...]:  # fmt: skip
    """The chat that asks for the activations of one excerpt as JSON."""
    messages = [Message("system", _task("structured", escaped))]
    for neuron in examples[:STRUCTURED_EXAMPLES]:
        record = min(neuron.records, key=lambda one: len(one.tokens))
        messages.append(Message("user", _structured_question(neuron.explanation, record.tokens)))
        messages.append(Message("assistant", structured_answer(record.tokens, record.activations)))
    return (*messages, Message("user", _structured_question(explanation, tokens)))


def _structured_question(explanation: str, tokens: Sequence[str]) -> str:
    listed = _filled(_words("structured")["tokens"], tokens=json.dumps(list(tokens), ensure_ascii=False))
    return f"{_explained('structured', explanation)}\n{listed}"


def structured_answer(tokens: Sequence[str], activations: Sequence[int]) -> str:
    """The correct form of an answer."""
    rows = [{"token": token, "activation": value} for token, value in zip(tokens, activations, strict=True)]
    return json.dumps({"activations": rows}, ensure_ascii=False)


def structured_schema(tokens: Sequence[str]) -> Mapping[str, object]:
    """The JSON schema of an answer about these tokens, each in its place."""
    number = {"type": "integer", "minimum": 0, "maximum": 10}
    items = [
        {
            "type": "object", "required": ["token", "activation"], "additionalProperties": False,
            "properties": {"token": {"type": "string", "const": token}, "activation": number},
        }
        for token in tokens
    ]  # fmt: skip
    rows = {"type": "array", "prefixItems": items, "minItems": len(tokens), "maxItems": len(tokens)}
    properties = {"activations": rows}
    return {"type": "object", "required": ["activations"], "additionalProperties": False, "properties": properties}
