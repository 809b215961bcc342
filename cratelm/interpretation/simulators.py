"""Simulators that are language models: an explanation and the tokens of excerpts -> an activation on every token.

    all-at-once       one prompt per excerpt; every activation is read from the probabilities of the prompt itself
    token-by-token    one prompt per token
    structured        one answer per excerpt, as JSON; needs no probabilities

Activations come on the scale of prompts, 0 to 10 (0 to 9 for models that write 10 as two tokens, see `read_out.py`).
The paper's simulator is all at once.
"""

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation import simulator_prompts as prompts
from cratelm.interpretation.answers import quoted
from cratelm.interpretation.few_shot import FILE as FEW_SHOT
from cratelm.interpretation.few_shot import FewShotNeuron, few_shot_neurons
from cratelm.interpretation.llm import LLM, Echo, LLMError, Prompt, Sampling
from cratelm.interpretation.prompts import PromptTooLong
from cratelm.interpretation.read_out import ReadOut, ReadOutRepair

METHODS = ("all-at-once", "token-by-token", "structured")
UNKNOWN = ("unknown", "?", "_", "-", "x")
"""What stands for an activation that is not known: the first that leaves the tab before it a token of its own."""
BROKEN = "\N{REPLACEMENT CHARACTER}"
MOST_UNREAD = 0.5
"""Share of an explanation's tokens at which no number was among the candidates, from which on it counts as failed."""

Activations = Float64[np.ndarray, " _"]


@runtime_checkable
class Simulator(Protocol):
    """Predicts activations from an explanation."""

    @property
    def name(self) -> str:
        """Method and model, which tell sets apart: `all-at-once:MODEL`, or `all-at-once-0-9:MODEL` on that scale."""
        ...

    @property
    def strings_mode(self) -> Mode:
        """How tokens are to be made text for it: `escape.prompt_strings(tokenizer, strings_mode)`."""
        ...

    @property
    def counts(self) -> Counter[str]:
        """`tokens` simulated, and of them `unread`: nothing the model thought of was a number, so 0 was taken.

        `left out`: excerpts of solved neurons that a prompt has no room for, the most.
        """
        ...

    def told(self) -> dict[str, Any]:
        """All that its simulations depend on beside explanations and records."""
        ...

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """Predict the activation on every token of every excerpt. Raises `LLMError` where that cannot be had."""
        ...


async def open_simulator(
    method: str, llm: LLM, *, mode: Mode = "fixed", repairs: frozenset[ReadOutRepair] = frozenset()
) -> Simulator:
    """The simulator of this method; a model whose probabilities it needs is asked how it writes numbers.

    `repairs` are of `compat` mode. Raises `LLMError` where the model does not give the probabilities of a prompt.
    """
    if method not in METHODS:
        raise CrateError(f"there is no simulator {method!r}. Use one of: {', '.join(METHODS)}")
    if method == "structured":
        return Structured(llm=llm, mode=mode)
    ten, unknown = await written(llm)
    read_out = ReadOut.of(mode, repairs, ten_is_one_token=ten)
    if method == "token-by-token":
        return TokenByToken(llm=llm, read_out=read_out)
    return AllAtOnce(llm=llm, read_out=read_out, unknown=UNKNOWN[0] if mode == "compat" else unknown)


async def written(llm: LLM) -> tuple[bool, str]:
    """Whether a model writes 10 as one token, and what it can read in the place of an activation."""
    table = "a\t10\n"
    texts = [table, *(f"a\t{unknown}\n the\t{unknown}\n" for unknown in UNKNOWN)]
    prompts_ = [Prompt(prefix=table, rest=text, at=tuple(_after_tabs(text))) for text in texts]
    ten, *others = await llm.echo(prompts_, top=1)
    begins = dict(zip(np.cumsum([0, *map(len, ten.tokens)]).tolist(), ten.tokens, strict=False))
    fitting = [
        u for u, p, echo in zip(UNKNOWN, prompts_[1:], others, strict=True) if set(p.at or ()) <= set(echo.candidates)
    ]
    if not fitting:
        raise LLMError(
            f"the tokenizer of {llm.name} joins a tab with whatever follows it, so activations cannot be read"
        )
    return begins.get(2) == "10", fitting[0]


def _after_tabs(text: str) -> list[int]:
    return [i + 1 for i, letter in enumerate(text) if letter == "\t"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AllAtOnce:
    """Reads every activation from one prompt, in which they all are given as unknown."""

    llm: LLM
    read_out: ReadOut
    unknown: str = UNKNOWN[0]
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Method and model."""
        return _name("all-at-once", self.read_out, self.llm)

    @property
    def strings_mode(self) -> Mode:
        """How tokens are made text."""
        return "fixed" if self.read_out.escaped else "compat"

    def told(self) -> dict[str, Any]:
        """Its settings."""
        return _told(self.name, self.llm, {**asdict(self.read_out), "unknown": self.unknown})

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """One prompt per excerpt, all with the same prefix."""
        tables = [prompts.all_at_once_rows(tokens, unknown=self.unknown) for tokens in excerpts]
        prefix = self._prefix(explanation, [rest for rest, _ in tables])
        wanted = [
            tuple(place for place, token in zip(places, tokens, strict=True) if self._is_read(token))
            for (_, places), tokens in zip(tables, excerpts, strict=True)
        ]
        asked = [Prompt(prefix=prefix, rest=rest, at=at) for (rest, _), at in zip(tables, wanted, strict=True)]
        echoes = await self.llm.echo(asked, top=self.read_out.candidates)
        reads = [_read(self.read_out, echo, at, self.llm) for echo, at in zip(echoes, wanted, strict=True)]
        _count(self.counts, reads, self.read_out, self.llm)
        # A place that was not asked for is one whose token the released code skips.
        return [
            np.array([found.get(place) or 0.0 for place in places])
            for found, (_, places) in zip(reads, tables, strict=True)
        ]

    def _is_read(self, token: str) -> bool:
        return self.read_out.escaped or BROKEN not in token

    def _prefix(self, explanation: str, rests: Sequence[str]) -> str:
        def prefix(examples: Sequence[FewShotNeuron]) -> str:
            return prompts.all_at_once_prefix(explanation, examples, top=self.read_out.top, unknown=self.unknown)

        return _fitting(prefix, rests, self.llm, self.counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenByToken:
    """Asks about one token at a time, which costs a prompt each."""

    llm: LLM
    read_out: ReadOut
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Method and model."""
        return _name("token-by-token", self.read_out, self.llm)

    @property
    def strings_mode(self) -> Mode:
        """How tokens are made text."""
        return "fixed" if self.read_out.escaped else "compat"

    def told(self) -> dict[str, Any]:
        """Its settings."""
        return _told(self.name, self.llm, asdict(self.read_out))

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """One prompt per token."""
        asked = [
            [prompts.token_by_token_question(tokens, place, answer="0") for place in range(len(tokens))]
            for tokens in excerpts
        ]

        def prefix(examples: Sequence[FewShotNeuron]) -> str:
            return prompts.token_by_token_prefix(explanation, examples, top=self.read_out.top)

        before = _fitting(prefix, [rest for rows in asked for rest, _ in rows], self.llm, self.counts)
        questions = [Prompt(prefix=before, rest=rest, at=(at,)) for rows in asked for rest, at in rows]
        echoes = await self.llm.echo(questions, top=self.read_out.candidates)
        reads = [
            _read(self.read_out, echo, one.at or (), self.llm) for echo, one in zip(echoes, questions, strict=True)
        ]
        _count(self.counts, reads, self.read_out, self.llm)
        values = np.array([next(iter(found.values())) or 0.0 for found in reads])
        ends = np.cumsum([len(tokens) for tokens in excerpts])[:-1]
        return np.split(values, ends) if excerpts else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Structured:
    """Asks for the activations of an excerpt as JSON, and checks that each token came back once and unchanged."""

    llm: LLM
    mode: Mode = "fixed"
    """In `compat` mode an excerpt whose answer cannot be used is simulated as silence, as released."""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Method and model."""
        return f"structured:{self.llm.name}"

    @property
    def strings_mode(self) -> Mode:
        """How tokens are made text."""
        return self.mode

    def told(self) -> dict[str, Any]:
        """Its settings."""
        return _told(self.name, self.llm, {"mode": self.mode})

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """One chat per excerpt."""
        return list(await asyncio.gather(*(self._one(explanation, tokens) for tokens in excerpts)))

    async def _one(self, explanation: str, tokens: Sequence[str]) -> Activations:
        chat = prompts.structured_chat(explanation, tokens, few_shot_neurons())
        longest = self.llm.count(prompts.structured_answer(tokens, [10] * len(tokens)))
        # Half as much again: models put line breaks and spaces where we do not.
        sampling = Sampling(max_tokens=longest + longest // 2 + 32, schema=prompts.structured_schema(len(tokens)))
        reply = await self.llm.chat(chat, sampling)
        self.counts["tokens"] += len(tokens)
        try:
            return structured_activations(reply.text, tokens)
        except LLMError:
            if self.mode == "compat":
                self.counts["unread"] += len(tokens)
                return np.zeros(len(tokens))
            raise


def structured_activations(answer: str, tokens: Sequence[str]) -> Activations:
    """The activations in an answer. Raises `LLMError`, with the answer, where it is not what was asked for."""
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", answer, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except json.JSONDecodeError as error:
        raise LLMError(f"the answer is no JSON ({error.msg}): {quoted(answer)}") from None
    rows = found.get("activations") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LLMError(f"the answer has no list of activations: {quoted(answer)}")
    if len(rows) != len(tokens):
        raise LLMError(f"the answer has {len(rows)} activations for {len(tokens)} tokens: {quoted(answer)}")
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True), 1):
        if row.get("token") != token:
            raise LLMError(f"token {number} is {token!r}, and the answer has {row.get('token')!r}: {quoted(answer)}")
        value = row.get("activation")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
            raise LLMError(
                f"the activation of token {number} is {value!r}, not a number from 0 to 10: {quoted(answer)}"
            )
    return np.array([float(row["activation"]) for row in rows])


def _read(read_out: ReadOut, echo: Echo, at: Sequence[int], llm: LLM) -> dict[int, float | None]:
    """The activation at each place, None where no number was among the candidates."""
    missing = [place for place in at if place not in echo.candidates]
    if missing and read_out.strict:
        raise LLMError(f"{llm.name} gave no candidates at {len(missing)} of {len(at)} places of a prompt")
    return {place: read_out.expected(echo.candidates.get(place, {})) for place in at}


def _count(
    counts: Counter[str], reads: Sequence[Mapping[int, float | None]], read_out: ReadOut, llm: LLM
) -> None:  # fmt: skip
    """Count tokens, and refuse where hardly any could be read."""
    values = [value for found in reads for value in found.values()]
    unread = sum(value is None for value in values)
    counts["tokens"] += len(values)
    counts["unread"] += unread
    if read_out.strict and unread > MOST_UNREAD * len(values):
        raise LLMError(
            f"{llm.name} thinks of no number at {unread} of {len(values)} tokens: it does not follow the format"
        )


def _fitting(
    prefix: Callable[[Sequence[FewShotNeuron]], str], rests: Sequence[str], llm: LLM, counts: Counter[str]
) -> str:  # fmt: skip
    """The prefix with as many solved neurons as leave room for the longest rest."""
    examples = list(few_shot_neurons())
    if llm.context is None:
        return prefix(examples)
    longest = llm.count(max(rests, key=len, default=""))
    while True:
        said = prefix(examples)
        # A few more than counted: the token that begins a text, and where prefix and rest meet.
        needed = llm.count(said) + longest + 4
        if needed <= llm.context:
            return said
        if not examples:
            raise PromptTooLong(
                f"the simulator's prompt has {needed:,} tokens without any example, too long for a context of "
                f"{llm.context:,}. Use a model with a longer context, or --protocol anthropic, whose excerpts are short"
            )
        counts["left out"] = max(
            counts["left out"], sum(len(one.records) for one in few_shot_neurons()[len(examples) - 1 :])
        )
        examples.pop()


def _name(method: str, read_out: ReadOut, llm: LLM) -> str:
    return f"{method}{'' if read_out.top == 10 else f'-0-{read_out.top}'}:{llm.name}"


def _told(name: str, llm: LLM, settings: Mapping[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(prompts.FILE.read_bytes() + FEW_SHOT.read_bytes()).hexdigest()[:16]
    return {"simulator": name, "model": llm.identity, "prompts": digest, **settings}
