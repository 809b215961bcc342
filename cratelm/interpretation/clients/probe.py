"""Detect what a language model supports with a few test calls: some servers ignore unknown parameters silently."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from cratelm.interpretation.llm import LLM, LLMError, Message, Prompt, PromptLogprobs, Sampling
from cratelm.interpretation.reasoning import without_reasoning

WORDS = ("10", "unknown", *map(str, range(10)))
"""Cells after a tab in a simulator's tables; how the tokenizer splits them decides how they are read."""
TABLE = "".join(f" boat\t{word}\n" for word in WORDS)
_SCHEMA = {
    "type": "object", "properties": {"boats": {"type": "integer"}}, "required": ["boats"],
    "additionalProperties": False,
}  # fmt: skip
CUT_TABLE = TABLE + " boat\t"
"""A text whose next token is requested."""
SAMPLED = 1e-9, -30.0
"""A best log-probability within this of 0, and all others below that: the candidates are those after sampling."""
SAME = 0.05
"""Nats by which the answers to two equal requests may differ: servers batch in 16 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a model supports."""

    name: str
    """Name of the model."""
    served: tuple[str, ...] = ()
    """Models that its server lists; empty for a model in this process."""
    context: int | None = None
    """Context length in tokens; None if not known."""
    chat: bool = False
    """Whether it answers a chat."""
    prompt_logprobs: bool = False
    """Whether it returns prompt logprobs that pass the checks."""
    next_token: int = 0
    """Most candidates of the next token that it returned, if it returns no prompt logprobs; 0: none."""
    style: str = ""
    """Format of a server's prompt logprobs: `vllm` or `openai`; `next-token` if it has only the next token's."""
    top: int = 0
    """Most candidates that it returned at a token."""
    most: int | None = None
    """Most candidates that can be requested; 0: no limit, None: not known."""
    pieces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tokens of "10", "unknown", the digits after a tab, and the tab; empty without prompt logprobs."""
    schema: bool = False
    """Whether its answers follow a JSON schema."""
    notes: tuple[str, ...] = ()
    """Why something is not supported, one sentence each."""

    def row(self) -> dict[str, Any]:
        """As JSON for the store, where `prompt_logprobs` is called `echo`."""
        values = asdict(self)
        return {"echo" if name == "prompt_logprobs" else name: value for name, value in values.items()}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Capabilities":
        """Read a row of the store; unknown fields are ignored."""
        values = {"prompt_logprobs" if name == "echo" else name: value for name, value in row.items()}
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        pieces = {word: tuple(tokens) for word, tokens in row["pieces"].items()}
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in (values | lists | {"pieces": pieces}).items() if name in known})

    @property
    def whole_ten(self) -> bool:
        """Whether "10" is one token, so that its probability is one number."""
        return self.pieces.get("10") == ("10",)

    @property
    def whole_values(self) -> bool:
        """Whether every value from 0 to 9 is a single token after a tab that is a single token."""
        return all(self.pieces.get(word) == (word,) for word in ("\t", *map(str, range(10))))

    @property
    def reason(self) -> str:
        """Summary in one line."""
        if self.prompt_logprobs:
            how = f" ({self.style})" if self.style else ""
            ten = "10 is one token" if self.whole_ten else f"10 is {len(self.pieces.get('10', ()))} tokens"
            logprobs = f"returns prompt logprobs{how}, {self.top} candidates, {ten}"
        else:
            logprobs = "returns no prompt logprobs"
            logprobs += f", but {self.next_token} candidates of the next token" if self.next_token else ""
        can = ["answers chats" if self.chat else "has no chat", logprobs]
        can += ["follows a JSON schema"] if self.schema else []
        context = f", context {self.context}" if self.context else ""
        return f"{self.name}: {'; '.join(can)}{context}"


async def probe(
    llm: LLM, *, top: int = 15, meter: Callable[[LLM], LLM] | None = None, temperature: float = 0.0
) -> Capabilities:
    """Make a few small calls and check the answers. `meter` wraps the model to count the cost.

    Chats have the `temperature` of the explanations to come: some servers refuse some temperatures.

    Raises `CrateError` if its server cannot be reached, refuses the key, or does not serve the model.
    """
    notes: list[str] = []
    await llm.connect()
    metered = meter(llm) if meter is not None else llm
    chat = await _chats(metered, temperature, notes)
    answers = await _prompt_logprobs(metered, top, notes)
    next_token = 0 if answers else await _next_token(metered, top, notes)
    if llm.served and llm.name not in llm.served:
        notes.append(f"the server answers as {llm.name}, but lists only {', '.join(llm.served[:5])}")
    style, most = llm.logprobs_format or ("", None)
    return Capabilities(
        name=llm.name, served=llm.served, context=llm.context, chat=chat, prompt_logprobs=bool(answers),
        next_token=next_token, style=style if answers or next_token else "",
        top=_candidates(answers[0]) if answers else 0,
        pieces=_pieces(answers[0]) if answers else {}, most=most if answers or next_token else None,
        schema=chat and await _follows_a_schema(metered, temperature, notes), notes=tuple(notes),
    )  # fmt: skip


async def _chats(llm: LLM, temperature: float, notes: list[str]) -> bool:
    try:
        await llm.chat([Message("user", "Say hello.")], Sampling(max_tokens=4, temperature=temperature))
    except LLMError as error:
        notes.append(f"no chat: {error}")
        return False
    return True


async def _prompt_logprobs(llm: LLM, top: int, notes: list[str]) -> list[PromptLogprobs]:
    """Prompt logprobs of the same table, requested twice; empty if they fail a check."""
    prompt = Prompt(prefix="Boats:\n", rest=TABLE)
    try:
        answers = [(await llm.prompt_logprobs([prompt], top=top))[0] for _ in range(2)]
    except LLMError as error:
        notes.append(f"no prompt logprobs: {error}")
        return []
    fault = _fault(answers[0], top) or _difference(*answers)
    if fault:
        notes.append(f"its prompt logprobs are not usable: {fault}")
        return []
    return answers


async def _next_token(llm: LLM, top: int, notes: list[str]) -> int:
    """Number of candidates of the next token, requested twice; 0 if they fail a check."""
    prompt = Prompt(prefix="Boats:\n", rest=CUT_TABLE, at=(len(CUT_TABLE),))
    try:
        answers = [(await llm.prompt_logprobs([prompt], top=top))[0] for _ in range(2)]
    except LLMError as error:
        notes.append(f"no candidates of the next token: {error}")
        return 0
    first, second = (answer.candidates.get(len(CUT_TABLE), {}) for answer in answers)
    best, *others = [*sorted(first.values(), reverse=True), *[-math.inf] * 2][: max(len(first), 2)]
    fault = ""
    if len(first) < 2 or (best > -SAMPLED[0] and others[0] < SAMPLED[1]):
        fault = "they are those after sampling"
    elif len(first) > top or sum(map(math.exp, first.values())) > 1.01:
        fault = f"{len(first)} candidates have a probability of {sum(map(math.exp, first.values())):.3g}"
    elif any(abs(first[text] - second[text]) > SAME for text in first.keys() & second.keys()):
        fault = "two equal requests have different log-probabilities"
    if fault:
        notes.append(f"its candidates of the next token are not usable: {fault}")
    return 0 if fault else len(first)


def _fault(answer: PromptLogprobs, top: int) -> str:
    """Why the prompt logprobs of the table cannot be right; empty if they pass."""
    known = answer.logprobs[~np.isnan(answer.logprobs)]
    if "".join(answer.tokens) != TABLE or len(answer.tokens) != len(answer.logprobs):
        return "the tokens are not the prompt's"
    if len(known) < len(answer.tokens) - 1:
        return f"{len(answer.tokens) - len(known)} of {len(answer.tokens)} tokens have none"
    if not np.isfinite(known).all() or known.max() > 1e-2 or np.ptp(known) == 0:
        return "they are not log-probabilities of different tokens"
    at = _offsets(answer)
    for number, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        candidates = answer.candidates.get(at[number], {})
        total = sum(math.exp(value) for value in candidates.values())
        if number and token and not candidates:
            return f"no candidates at {token!r}"
        if total > 1.01 or len(candidates) > top:
            return f"the {len(candidates)} candidates at {token!r} have a probability of {total:.3g}"
        # Several tokens can share one text, but none is more probable than all of them together.
        if token in candidates and logprob > candidates[token] + SAME:
            return f"{token!r} has two different probabilities"
    return ""


def _difference(first: PromptLogprobs, second: PromptLogprobs) -> str:
    if first.tokens != second.tokens:
        return "two equal requests have different tokens"
    most = float(np.nanmax(np.abs(first.logprobs - second.logprobs)))
    return f"two equal requests have log-probabilities {most:.2g} apart" if most > SAME else ""


def _offsets(answer: PromptLogprobs) -> list[int]:
    return np.cumsum([0, *map(len, answer.tokens[:-1])]).tolist()


def _candidates(answer: PromptLogprobs) -> int:
    return max(map(len, answer.candidates.values()))


def _pieces(answer: PromptLogprobs) -> dict[str, tuple[str, ...]]:
    """The tokens of each word of the table, and of the tab before the first word."""
    pieces: dict[str, tuple[str, ...]] = {}
    spans = [(at, at + len(token), token) for at, token in zip(_offsets(answer), answer.tokens, strict=True) if token]
    cursor = 0
    for word in WORDS:
        tab = TABLE.index("\t", cursor)
        start, cursor = tab + 1, tab + 1 + len(word)
        pieces[word] = tuple(token for first, last, token in spans if first < cursor and last > start)
        pieces.setdefault("\t", tuple(token for first, last, token in spans if first < start and last > tab))
    return pieces


async def _follows_a_schema(llm: LLM, temperature: float, notes: list[str]) -> bool:
    """Whether a question that is usually not answered in JSON is answered in JSON."""
    turns = [Message("user", "Write a line of a poem about boats.")]
    try:
        reply = await llm.chat(turns, Sampling(max_tokens=64, temperature=temperature, schema=_SCHEMA))
        value = json.loads(without_reasoning(reply.text))
    except (LLMError, ValueError, RecursionError):
        notes.append("answers do not follow a JSON schema")
        return False
    return isinstance(value, dict) and list(value) == ["boats"] and isinstance(value["boats"], int)
