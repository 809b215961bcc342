"""Simulators that are language models: an explanation and the tokens of excerpts -> an activation on every token.

    all-at-once       one prompt per excerpt; every activation is read from the probabilities of the prompt itself
    token-by-token    one prompt per token
    structured        one answer per excerpt, as JSON; needs no probabilities

Activations come on the scale of prompts, 0 to 10 (0 to 9 for models that write 10 as two tokens, see `read_out.py`).
The paper's simulator is all at once.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, LLMError, Prompt, PromptLogprobs, Sampling
from cratelm.interpretation.prompts import simulator as prompts
from cratelm.interpretation.prompts.escaping import BROKEN
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.prompts.few_shot import FILE as FEW_SHOT
from cratelm.interpretation.prompts.few_shot import FewShotNeuron, few_shot_neurons
from cratelm.interpretation.simulators.readout import ReadOut, ReadOutRepair
from cratelm.interpretation.simulators.structured_answers import structured_activations

METHODS = ("all-at-once", "token-by-token", "structured")
UNKNOWN = ("unknown", "?", "_", "-", "x")
"""What stands for an activation that is not known: the first that leaves the tab before it a token of its own."""
EXPLANATION = 150
"""Tokens that are kept free for an explanation where it is settled how many solved neurons a set shows."""
MARGIN = 4
"""Tokens more than counted: the one that begins a text, and where prefix and rest meet."""
MOST_UNREAD = 0.5
"""Share of an explanation's tokens at which no number was among the candidates, from which on it counts as failed."""

Activations = Float64[np.ndarray, " _"]


@runtime_checkable
class Simulator(Protocol):
    """Predicts activations from an explanation."""

    @property
    def name(self) -> str:
        """Method, scale, repairs, model: `all-at-once:M`, `all-at-once-0-9:M`, `all-at-once+spaced-numbers:M`."""
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

    def needs(self, excerpts: Iterable[Sequence[str]], /) -> int:
        """Solved neurons that prompts have to leave out for the longest of these excerpts to fit the context.

        A set is simulated with as many (`left_out`), so that all of its neurons are asked alike.
        """
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
    ten, *others = await llm.prompt_logprobs(prompts_, top=1)
    begins = dict(zip(np.cumsum([0, *map(len, ten.tokens)]).tolist(), ten.tokens, strict=False))
    read = zip(UNKNOWN, prompts_[1:], others, strict=True)
    fitting = [unknown for unknown, prompt, answer in read if set(prompt.at or ()) <= set(answer.candidates)]
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
    left_out: int = 0
    """Solved neurons that its prompts leave out; a prompt that is still too long leaves out more."""
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
        return _told(self.name, self.llm, {**asdict(self.read_out), "unknown": self.unknown}, self.left_out)

    def needs(self, excerpts: Iterable[Sequence[str]]) -> int:
        """Solved neurons that prompts have to leave out."""
        rests = (prompts.all_at_once_rows(tokens, unknown=self.unknown)[0] for tokens in excerpts)
        return _needed(partial(self._head, ""), rests, self.llm)

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """One prompt per excerpt, all with the same prefix."""
        tables = [prompts.all_at_once_rows(tokens, unknown=self.unknown) for tokens in excerpts]
        prefix = self._prefix(explanation, [rest for rest, _ in tables])
        wanted = [
            tuple(place for place, token in zip(places, tokens, strict=True) if self._is_read(token))
            for (_, places), tokens in zip(tables, excerpts, strict=True)
        ]
        pairs = zip(tables, wanted, strict=True)
        asked = [Prompt(prefix=prefix, rest=rest, at=at, numbers=True) for (rest, _), at in pairs]
        answers = await self.llm.prompt_logprobs(asked, top=self.read_out.candidates)
        reads = [_read(self.read_out, answer, at, self.llm) for answer, at in zip(answers, wanted, strict=True)]
        _count(self.counts, reads, self.read_out, self.llm)
        # A place that was not asked for is one whose token the released code skips.
        return [
            np.array([found.get(place) or 0.0 for place in places])
            for found, (_, places) in zip(reads, tables, strict=True)
        ]

    def _is_read(self, token: str) -> bool:
        return self.read_out.escaped or BROKEN not in token

    def _prefix(self, explanation: str, rests: Sequence[str]) -> str:
        return _fitting(partial(self._head, explanation), rests, self.llm, self.counts, self.left_out)

    def _head(self, explanation: str, examples: Sequence[FewShotNeuron]) -> str:
        top, escaped = self.read_out.top, self.read_out.escaped
        return prompts.all_at_once_prefix(explanation, examples, top=top, unknown=self.unknown, escaped=escaped)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenByToken:
    """Asks about one token at a time, which costs a prompt each."""

    llm: LLM
    read_out: ReadOut
    left_out: int = 0
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
        return _told(self.name, self.llm, asdict(self.read_out), self.left_out)

    def needs(self, excerpts: Iterable[Sequence[str]]) -> int:
        """Solved neurons that prompts have to leave out."""
        rests = (prompts.token_by_token_question(tokens, len(tokens) - 1, answer="0")[0] for tokens in excerpts)
        return _needed(partial(self._head, ""), rests, self.llm)

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """One prompt per token."""
        asked = [
            [prompts.token_by_token_question(tokens, place, answer="0") for place in range(len(tokens))]
            for tokens in excerpts
        ]
        rests = [rest for rows in asked for rest, _ in rows]
        before = _fitting(partial(self._head, explanation), rests, self.llm, self.counts, self.left_out)
        questions = [Prompt(prefix=before, rest=rest, at=(at,), numbers=True) for rows in asked for rest, at in rows]
        answers = await self.llm.prompt_logprobs(questions, top=self.read_out.candidates)
        reads = [
            _read(self.read_out, answer, one.at or (), self.llm) for answer, one in zip(answers, questions, strict=True)
        ]
        _count(self.counts, reads, self.read_out, self.llm)
        values = np.array([next(iter(found.values())) or 0.0 for found in reads])
        ends = np.cumsum([len(tokens) for tokens in excerpts])[:-1]
        return np.split(values, ends) if excerpts else []

    def _head(self, explanation: str, examples: Sequence[FewShotNeuron]) -> str:
        read_out = self.read_out
        return prompts.token_by_token_prefix(explanation, examples, top=read_out.top, escaped=read_out.escaped)


@dataclass(frozen=True, kw_only=True, slots=True)
class Structured:
    """Asks for the activations of an excerpt as JSON, and checks that each token came back once and unchanged."""

    llm: LLM
    mode: Mode = "fixed"
    """In `compat` mode an excerpt whose answer cannot be used is simulated as silence, as released."""
    left_out: int = 0
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

    def needs(self, _: Iterable[Sequence[str]]) -> int:
        """None: its prompts show all solved neurons."""
        return 0

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """One chat per excerpt."""
        return list(await asyncio.gather(*(self._one(explanation, tokens) for tokens in excerpts)))

    async def _one(self, explanation: str, tokens: Sequence[str]) -> Activations:
        chat = prompts.structured_chat(explanation, tokens, few_shot_neurons(), escaped=self.mode == "fixed")
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


def _read(read_out: ReadOut, answer: PromptLogprobs, at: Sequence[int], llm: LLM) -> dict[int, float | None]:
    """The activation at each place, None where no number was among the candidates."""
    missing = [place for place in at if place not in answer.candidates]
    if missing and read_out.strict:
        raise LLMError(f"{llm.name} gave no candidates at {len(missing)} of {len(at)} places of a prompt")
    return {place: read_out.expected(answer.candidates.get(place, {})) for place in at}


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
    prefix: Callable[[Sequence[FewShotNeuron]], str], rests: Sequence[str], llm: LLM, counts: Counter[str],
    left_out: int,
) -> str:  # fmt: skip
    """The prefix without so many solved neurons, and with as many of the others as leave room for the longest rest."""
    solved = few_shot_neurons()
    examples = list(solved[: len(solved) - left_out])
    longest = llm.count(max(rests, key=len, default="")) if llm.context is not None else 0
    while True:
        said = prefix(examples)
        gone = sum(len(one.records) for one in solved[len(examples) :])
        counts["left out"] = max(counts["left out"], gone)
        if llm.context is None:
            return said
        needed = llm.count(said) + longest + MARGIN
        if needed <= llm.context:
            return said
        if not examples:
            shorter = ", or --protocol anthropic, whose excerpts are short" if longest > 128 else ""
            said = f"the simulator's prompt has {needed:,} tokens without any example, too long for a context of"
            raise PromptTooLong(f"{said} {llm.context:,}. Use a model with a longer context{shorter}")
        examples.pop()


def _needed(prefix: Callable[[Sequence[FewShotNeuron]], str], rests: Iterable[str], llm: LLM) -> int:
    """Solved neurons to leave out for the longest rest to fit, with room for an explanation; what never fits apart."""
    if llm.context is None:
        return 0
    solved = few_shot_neurons()
    used = [llm.count(prefix(solved[:count])) + EXPLANATION + MARGIN for count in range(len(solved), -1, -1)]
    by_size = sorted(set(rests), key=lambda rest: len(rest.encode()), reverse=True)
    if not by_size or used[0] + len(by_size[0].encode()) <= llm.context:  # a token has a byte at least
        return 0
    longest = max((size for size in map(llm.count, by_size) if used[-1] + size <= llm.context), default=0)
    return next(number for number, size in enumerate(used) if size + longest <= llm.context or number == len(solved))


def _name(method: str, read_out: ReadOut, llm: LLM) -> str:
    scale = "" if read_out.top == 10 else f"-0-{read_out.top}"
    return f"{'+'.join((method + scale, *read_out.repaired))}:{llm.name}"


def _told(name: str, llm: LLM, settings: Mapping[str, Any], left_out: int = 0) -> dict[str, Any]:
    digest = hashlib.sha256(prompts.FILE.read_bytes() + FEW_SHOT.read_bytes()).hexdigest()[:16]
    short = {"left_out": left_out} if left_out else {}
    return {"simulator": name, "model": llm.identity, "prompts": digest, **settings, **short}
