"""What a language model can be asked, found out by asking: some servers ignore what they do not know."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.llm import LLM, LLMError, Message, Prompt, PromptLogprobs, Sampling

WORDS = ("10", "unknown", *map(str, range(10)))
"""What stands behind a tab in a simulator's tables; how the model's tokenizer writes it decides what can be read."""
TABLE = "".join(f" boat\t{word}\n" for word in WORDS)
SCHEMA = {
    "type": "object", "properties": {"boats": {"type": "integer"}}, "required": ["boats"],
    "additionalProperties": False,
}  # fmt: skip
SAME = 0.05
"""Nats by which an answer may differ from itself when it is asked for again: servers batch in 16 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a model can be asked."""

    name: str
    """Name of the model."""
    served: tuple[str, ...] = ()
    """Models that its server lists; none for a model in the process."""
    context: int | None = None
    """Longest prompt and answer together, in tokens; None where that is not told."""
    chat: bool = False
    """Whether it answers a chat."""
    prompt_logprobs: bool = False
    """Whether it gives the probabilities of a prompt's own tokens, and they pass for such."""
    style: str = ""
    """How a server gives them: `vllm` or `openai`."""
    top: int = 0
    """Candidates that it gives at a token, at most."""
    most: int | None = None
    """Candidates that can be asked for; 0 for as many as are wanted, None where that was not noted."""
    pieces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """How its tokenizer writes "10", "unknown", the digits behind a tab, and the tab; empty without answer."""
    schema: bool = False
    """Whether it holds an answer to a JSON schema."""
    several: bool = False
    """Whether several answers can be asked for in one request; else they are several requests."""
    notes: tuple[str, ...] = ()
    """Why something cannot be asked, a sentence each."""

    def row(self) -> dict[str, Any]:
        """As JSON for the store, which calls `prompt_logprobs` `echo`."""
        values = asdict(self)
        return {"echo" if name == "prompt_logprobs" else name: value for name, value in values.items()}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Capabilities":
        """From the store."""
        values = {"prompt_logprobs" if name == "echo" else name: value for name, value in row.items()}
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        pieces = {word: tuple(tokens) for word, tokens in row["pieces"].items()}
        return cls(**values | lists | {"pieces": pieces})

    @property
    def whole_ten(self) -> bool:
        """Whether "10" is one token, so that its probability is one number."""
        return self.pieces.get("10") == ("10",)

    @property
    def whole_values(self) -> bool:
        """Whether every value from 0 to 9 is one token of its own behind a tab that is one token."""
        return all(self.pieces.get(word) == (word,) for word in ("\t", *map(str, range(10))))

    @property
    def reason(self) -> str:
        """All of it in one line."""
        if self.prompt_logprobs:
            how = f" ({self.style})" if self.style else ""
            ten = "10 is one token" if self.whole_ten else f"10 is {len(self.pieces.get('10', ()))} tokens"
            gives = f"gives the probabilities of a prompt{how}, {self.top} candidates, {ten}"
        else:
            gives = "gives no probabilities of a prompt"
        can = ["answers chats" if self.chat else "has no chat", gives]
        can += ["holds to a JSON schema"] if self.schema else []
        context = f", context {self.context}" if self.context else ""
        return f"{self.name}: {'; '.join(can)}{context}"


async def probe(llm: LLM, *, top: int = 15, meter: Callable[[LLM], LLM] | None = None) -> Capabilities:
    """Ask a model a few small things and look hard at the answers. What is put around it by `meter` counts them.

    Raises `CrateError` where its server cannot be reached, refuses the key, or does not serve it.
    """
    notes: list[str] = []
    server = llm if isinstance(llm, Endpoint) else None
    if server is not None:
        await server.connect()
    asked = meter(llm) if meter is not None else llm
    chat = await _chats(asked, notes)
    answers = await _prompt_logprobs(asked, top, notes)
    listed = server is not None and bool(server.served)
    if server is not None and listed and llm.name not in server.served:
        notes.append(f"the server answers as {llm.name}, and lists only {', '.join(server.served[:5])}")
    return Capabilities(
        name=llm.name, served=server.served if server else (), context=llm.context, chat=chat,
        prompt_logprobs=bool(answers), style=(server.style or "") if server and answers else "",
        top=_candidates(answers[0]) if answers else 0, pieces=_pieces(answers[0]) if answers else {},
        most=server.most if server and answers else None, schema=chat and await _holds_to_a_schema(asked, notes),
        several=server is not None and chat and await server.honours_n(), notes=tuple(notes),
    )  # fmt: skip


async def _chats(llm: LLM, notes: list[str]) -> bool:
    try:
        await llm.chat([Message("user", "Say hello.")], Sampling(max_tokens=4))
    except LLMError as error:
        notes.append(f"no chat: {error}")
        return False
    return True


async def _prompt_logprobs(llm: LLM, top: int, notes: list[str]) -> list[PromptLogprobs]:
    """Prompt logprobs of the same table, twice, if they are what they should be."""
    prompt = Prompt(prefix="Boats:\n", rest=TABLE)
    try:
        found = [(await llm.prompt_logprobs([prompt], top=top))[0] for _ in range(2)]
    except LLMError as error:
        notes.append(f"no probabilities of a prompt: {error}")
        return []
    fault = _fault(found[0], top) or _difference(*found)
    if fault:
        notes.append(f"its probabilities of a prompt cannot be used: {fault}")
        return []
    return found


def _fault(answer: PromptLogprobs, top: int) -> str:
    """What is wrong with the prompt logprobs of the table; nothing if it passes."""
    known = answer.logprobs[~np.isnan(answer.logprobs)]
    if "".join(answer.tokens) != TABLE or len(answer.tokens) != len(answer.logprobs):
        return "the tokens are not the prompt's"
    if len(known) < len(answer.tokens) - 1:
        return f"{len(answer.tokens) - len(known)} of {len(answer.tokens)} tokens have none"
    if not np.isfinite(known).all() or known.max() > 1e-2 or np.ptp(known) == 0:
        return "they are no log-probabilities of different tokens"
    at = _offsets(answer)
    for number, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        candidates = answer.candidates.get(at[number], {})
        total = sum(math.exp(one) for one in candidates.values())
        if number and token and not candidates:
            return f"no candidates are given at {token!r}"
        if total > 1.01 or len(candidates) > top:
            return f"the {len(candidates)} candidates at {token!r} have a probability of {total:.3g}"
        # Several tokens can have one text, but none is likelier than all of them together.
        if token in candidates and logprob > candidates[token] + SAME:
            return f"{token!r} has two different probabilities"
    return ""


def _difference(one: PromptLogprobs, other: PromptLogprobs) -> str:
    if one.tokens != other.tokens:
        return "asked twice, it reads two different tokenizations"
    most = float(np.nanmax(np.abs(one.logprobs - other.logprobs)))
    return f"asked twice, it gives log-probabilities {most:.2g} apart" if most > SAME else ""


def _offsets(answer: PromptLogprobs) -> list[int]:
    return np.cumsum([0, *map(len, answer.tokens[:-1])]).tolist()


def _candidates(answer: PromptLogprobs) -> int:
    return max(len(one) for one in answer.candidates.values())


def _pieces(answer: PromptLogprobs) -> dict[str, tuple[str, ...]]:
    """The tokens that each word of the table is written with, and those of the tab before the first."""
    found: dict[str, tuple[str, ...]] = {}
    spans = [(at, at + len(token), token) for at, token in zip(_offsets(answer), answer.tokens, strict=True) if token]
    cursor = 0
    for word in WORDS:
        tab = TABLE.index("\t", cursor)
        start, cursor = tab + 1, tab + 1 + len(word)
        found[word] = tuple(token for first, last, token in spans if first < cursor and last > start)
        found.setdefault("\t", tuple(token for first, last, token in spans if first < start and last > tab))
    return found


async def _holds_to_a_schema(llm: LLM, notes: list[str]) -> bool:
    """Whether a question that nobody answers in JSON is answered in JSON."""
    turns = [Message("user", "Write a line of a poem about boats.")]
    try:
        reply = await llm.chat(turns, Sampling(max_tokens=64, schema=SCHEMA))
        value = json.loads(reply.text)
    except (LLMError, json.JSONDecodeError):
        notes.append("a JSON schema is not held to")
        return False
    return isinstance(value, dict) and list(value) == ["boats"] and isinstance(value["boats"], int)
