"""Count what a stage would send to a language model, from the prompts themselves, without a call."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cratelm.interpretation.llm import LLM, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.llm_wrapper import LLMWrapper
from cratelm.interpretation.prompts.explainer import TURN
from cratelm.interpretation.store.answer_cache import chat_hash, is_cached, prompt_logprobs_hash
from cratelm.interpretation.store.database import Store


@dataclass(slots=True)
class Cost:
    """Calls to a language model, and their tokens. Cache hits and duplicates are not among the calls."""

    calls: int = 0
    """Chats and prompts."""
    read: int = 0
    """Tokens of all prompts."""
    computed: int = 0
    """Tokens of all prompts if a beginning that prompts share is computed once."""
    once: int = 0
    """Of those, the tokens that the prompts of all neurons share."""
    written: int = 0
    """Most tokens that the answers can have."""
    cached: int = 0
    """Cache hits."""
    duplicates: int = 0
    """Calls that are the same as another one of the plan."""

    def add(self, other: "Cost", times: float = 1.0) -> None:
        """Add another cost, `times` times, except what all neurons share: once."""
        for name in self.__slots__:
            shared = other.once if name in ("computed", "once") else 0
            added = round(times * (getattr(other, name) - shared)) + shared
            setattr(self, name, getattr(self, name) + added)


@dataclass(slots=True)
class CountingLLM(LLMWrapper):
    """Counts the calls to a language model instead of making them."""

    inner: LLM
    store: Store
    """Its answer cache is looked up."""
    seen: set[str] = field(default_factory=set)
    """Hashes of all calls of a plan, shared by the counters of its stages."""
    depends_on: str = ""
    """Hash of what the next prompts depend on, if a placeholder stands for an explanation that is not made yet."""
    cost: Cost = field(default_factory=Cost)
    last: Prompt | None = None
    """The last prompt for a next token: one that extends it is not computed whole."""

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Count a chat. The answer is a placeholder."""
        if self._is_new(chat_hash(self.identity, messages, sampling)):
            *before, last = (self.expected(message.text) + TURN for message in messages)
            beginning = repr(("beginning", self.identity, messages[:-1]))
            once = 0 if beginning in self.seen else sum(before)
            self.seen.add(beginning)
            cost = Cost(calls=1, read=sum(before) + last, computed=once + last, once=once, written=sampling.max_tokens)
            self.cost.add(cost)
        text = f"tokens {sampling.seed}" if sampling.seed else "tokens"  # samples differ
        return Reply(text=text, finish="stop", prompt_tokens=0, new_tokens=0)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """Count prompts. The model seems to expect a 0 everywhere."""
        new = [prompt for prompt in prompts if self._is_new(prompt_logprobs_hash(self.identity, prompt, top))]
        prefixes = {prefix: self.expected(prefix) for prefix in {prompt.prefix for prompt in new}}
        known = {self.last.prefix} if self.last is not None and all(prompt.asks_next for prompt in new) else set()
        self.cost.computed += sum(tokens for prefix, tokens in prefixes.items() if prefix not in known)
        for prompt in new:
            rest = self.expected(prompt.rest)
            before = self.last.rest if self.last is not None and prompt.prefix in known else ""
            shared = self.expected(before) if before and prompt.rest.startswith(before) else 0
            self.cost.add(Cost(calls=1, read=prefixes[prompt.prefix] + rest, computed=rest - shared))
            self.last = prompt if prompt.asks_next else None
        return [
            PromptLogprobs(
                tokens=(prompt.rest,), logprobs=np.array([np.nan]),
                candidates={at: {"0": 0.0} for at in prompt.at or () if top},
            )
            for prompt in prompts
        ]  # fmt: skip

    def _is_new(self, call: str) -> bool:
        """Whether a call (its hash) is neither cached nor a duplicate."""
        if not self.depends_on and is_cached(self.store, call):
            self.cost.cached += 1
            return False
        known = f"{self.depends_on} {call}" in self.seen
        self.cost.duplicates += known
        self.seen.add(f"{self.depends_on} {call}")
        return not known


def estimated_seconds(
    cost: Cost, *, alone: float, together: float, trial: Cost, in_flight: int, remote: bool
) -> float:  # fmt: skip
    """Estimate the time of all calls from a trial: seconds of one call alone, and of the calls of `trial` together.

    A model in this process takes time for each computed token; a server for each call, divided by the calls in flight.
    """
    if not remote:
        return (cost.computed + cost.written) * together / max(trial.computed, 1)
    each = max(together - alone, 0.0) / max(trial.calls - 1, 1)
    at_once = max(min(in_flight, cost.calls), 1)
    return max(cost.calls * max(each, alone / at_once), alone)
