"""A language model behind a server: vLLM, llama.cpp, `transformers serve`, or a provider, by its base URL.

Differences between servers are handled here and in the modules next to this one: how they return prompt logprobs
(`prompt_logprobs.py`), which parameters they support (`parameters.py`), the forms of their answers (`responses.py`),
models that answer at `/responses` only (`responses_endpoint.py`), and what they list (`server_facts.py`).
"""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

from cratelm.errors import CrateError
from cratelm.interpretation.clients.batch_api import BatchAPI
from cratelm.interpretation.clients.parameters import Parameters, chat_body, check_extra
from cratelm.interpretation.clients.prompt_logprobs import NEXT_TOKEN, STYLES, Absent, read, request
from cratelm.interpretation.clients.responses import LONGEST_QUOTE, Malformed, answer_text, paid_tokens
from cratelm.interpretation.clients.responses_endpoint import (
    CHAT_LABEL,
    NO_CHAT,
    ChatRequest,
    as_chat_completion,
    responses_body,
)
from cratelm.interpretation.clients.server_facts import cache_hint, context_in, price_in, slots_in, with_cache_hint
from cratelm.interpretation.clients.transport import Refused, Retry, Transport
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.llm import Declined, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.prompts.explainer import without_system
from cratelm.interpretation.prompts.few_shot import solved_tables
from cratelm.runtime import printable

UNKNOWN_MODEL = re.compile(
    r"model.{0,80}(not (found|exist|served|available)|does not exist|no such|unknown)|pinned to", re.I | re.S
)
FACTS = ("root", "parent", "owned_by", "meta", "quantization")
"""Fields of a server's model list that differ between models with the same name."""
IGNORED = "ignored"
LENGTH = ("max_tokens", "max_output_tokens", "token_limit", "model_length")
"""Other words of servers for the finish reason `length`."""
LONGEST_TEXT = 1_000_000
"""Characters of an answer; no limit of tokens that is requested allows more."""
FEWER = 5
"""Candidates requested if a server refuses more: the most that OpenAI returns."""


class Endpoint:
    """A model on a server. `connect` asks the server about it."""

    remote = True

    def __init__(
        self, url: str, model: str, *, key_from: str = "", in_flight: int = 32, timeout: float = 300.0,
        retry: Retry | None = None, usage: Usage | None = None, counter: Callable[[str], int] | None = None,
        temperature: float = 0.0, extra: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`temperature` of the endpoint's own test calls; `extra`: more fields of each chat request."""
        self.name, self.temperature, self.extra = model, temperature, dict(extra or {})
        self.identity = self._identity({})
        self.context: int | None = None
        self.price: tuple[float, float] | None = None
        self.slots: int | None = None
        self.served: tuple[str, ...] = ()
        self.logprobs_format: tuple[str, int] | None = None
        self.transport = Transport(
            url, key_from=key_from, in_flight=in_flight, timeout=timeout, retry=retry, usage=usage
        )
        self.counts_exactly = counter is not None
        self.tokens_per_byte = 0.0
        """Measured on few-shot examples by `calibrate`; 0 if not known: then `count` assumes a token per byte."""
        self._counter = counter
        self._no_logprobs = ""
        self._hint = cache_hint(url, model)
        self._detecting = asyncio.Lock()
        self._parameters = Parameters()

    @property
    def unsupported(self) -> set[str]:
        """Parameters that the server refuses, which are not sent."""
        return self._parameters.unsupported

    def _identity(self, facts: Mapping[str, Any]) -> str:
        reported = {key: facts[key] for key in FACTS if key in facts}
        parts = [self.name, reported, *([self.extra] if self.extra else [])]
        return json.dumps(parts, sort_keys=True) if facts or self.extra else self.name

    async def connect(self) -> None:
        """Ask what is served. Raises `CrateError` if no server answers; whether it knows the model shows later."""
        try:
            answer = await self.transport.get("/models")
            listed = answer.get("data") or answer.get("models")
        except LLMError:
            listed = None  # not every server has a model list
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        by_name = {str(entry.get("id") or entry.get("name")): entry for entry in entries}
        self.served = tuple(sorted(set(by_name) - {"None"}))
        if (facts := by_name.get(self.name)) is not None:
            self.identity = self._identity(facts)
            self.context, self.price = context_in(facts), price_in(facts)
        await self._ask_slots("llama" in str((facts or {}).get("owned_by", "")).lower())

    async def _ask_slots(self, llama_cpp: bool) -> None:
        """Ask llama.cpp for its slots: no more requests are in flight, and the context is that of one slot."""
        if self.transport.url.startswith("https:") and not llama_cpp:
            return
        for path in ("/props", "/slots") if llama_cpp else ("/props",):
            with contextlib.suppress(CrateError):
                slots, context = slots_in(await self.transport.get(path, timeout=5.0, root=True))
                if slots:
                    self.transport.limit(slots)
                    self.slots = self.transport.in_flight
                    self.context = context or self.context
                    return

    async def close(self) -> None:
        """Close the connections."""
        await self.transport.close()

    def set_logprobs_format(self, style: str, most: int) -> None:
        """Restore the format that an earlier process detected."""
        if style in (*STYLES, NEXT_TOKEN):
            self.logprobs_format = style, most

    def count(self, text: str) -> int:
        """Number of tokens: exact with a `counter`, else estimated with a margin of 25 % above `tokens_per_byte`.

        The estimate is fixed once per model: prompts depend on it, and all prompts of a set must be cut alike. A byte
        outside ASCII counts as a token.
        """
        return self._counter(text) if self._counter is not None else self._estimate(text, 1.25)

    def expected(self, text: str) -> int:
        """Number of tokens without the margin of `count`."""
        return self._counter(text) if self._counter is not None else self._estimate(text, 1.0)

    def _estimate(self, text: str, margin: float) -> int:
        ascii_letters = sum(map(str.isascii, text))
        rate = min(1.0, margin * self.tokens_per_byte) if self.tokens_per_byte else 1.0
        return math.ceil(ascii_letters * rate) + len(text.encode()) - ascii_letters

    async def calibrate(self, tokens_per_byte: float | None = None) -> float:
        """Set `tokens_per_byte`, or measure it once; 0 if the server reports no usage."""
        if tokens_per_byte is None:
            tokens_per_byte = self.tokens_per_byte or await self._measure()
        self.tokens_per_byte = tokens_per_byte
        return tokens_per_byte

    async def _measure(self) -> float:
        text, cost = solved_tables(), (0, 0)
        try:
            question = [Message("user", text)], Sampling(max_tokens=4, temperature=self.temperature)
            for asked in self._requests(*question):
                with asked:
                    cost = await self.transport.post(asked.path, asked.body, asked.reader(paid_tokens))
            if asked.refusal is not None:
                raise asked.refusal
        except LLMError:
            body = {"model": self.name, "prompt": text, "max_tokens": 1, "temperature": 0}
            with contextlib.suppress(LLMError):
                cost = await self.transport.post("/completions", body, paid_tokens)
        self.transport.usage.add(*cost)
        return cost[0] / len(text)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat. Raises `LLMError` if the server refuses or fails, `CrateError` if it cannot be reached."""
        parse = partial(self._parse_chat, sum(len(message.text.encode()) for message in messages))
        for asked in self._requests(messages, sampling):
            with asked:
                return await self.transport.post(
                    asked.path, asked.body, asked.reader(parse), same_500s=asked.attempt.same_500s
                )
        assert asked.refusal is not None
        check_extra(self.transport.url, asked.refusal, self.extra)
        await self._check_model(asked.refusal)
        raise asked.refusal

    def _requests(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[ChatRequest]:
        """The requests to make in turn until one is answered: fewer parameters, then the other path."""

        def build(without: Set[str]) -> dict[str, Any]:
            supported = without_system(messages) if "system" in without else messages
            turns = [{"role": message.role, "content": message.text} for message in supported]
            body = chat_body(self.name, turns, sampling, without) | self.extra
            return with_cache_hint(body, self._hint) if self._hint not in without else body

        for attempt in self._parameters.attempts(build):
            refusal = None
            if CHAT_LABEL not in self.unsupported:
                yield (first := ChatRequest(attempt, leads_on=self._may_answer_responses))
                if first.refusal is None or attempt.refusal is not None:
                    continue
                refusal = None if NO_CHAT.search(first.refusal.detail) else first.refusal
            yield ChatRequest(attempt, converted=True, instead=refusal)

    def _may_answer_responses(self, refusal: Refused) -> bool:
        """Whether a refusal at `/chat/completions` leads to `/responses`: it says so, or the path is unknown."""
        unknown = UNKNOWN_MODEL.search(refusal.detail) or (self.served and self.name not in self.served)
        guess = not (self.transport.answered or unknown) and refusal.status in (404, 405)
        return bool(NO_CHAT.search(refusal.detail)) or guess

    def _parse_chat(self, size: int, answer: Mapping[str, Any]) -> Reply:
        try:
            choice = answer["choices"][0]
            message, finish = choice.get("message"), str(choice.get("finish_reason") or "stop").lower()
            if message is None and finish == "content_filter":
                message = {}
            text, refusal = answer_text(message), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Malformed(f"not a chat completion ({type(error).__name__}: {error})") from None
        finish = "length" if finish in LENGTH else finish
        usage = answer.get("usage") or {}
        read = usage.get("prompt_tokens") or math.ceil(size / 3)
        generated = usage.get("completion_tokens")
        generated = self.count(str(refusal or text or "")[:LONGEST_TEXT]) if generated is None else generated
        problem = ""
        if refusal:
            problem = f"the model refused: {str(refusal)[:LONGEST_QUOTE]}"
        elif finish == "content_filter" or (text is None and finish != "length"):
            problem = f"the model answered nothing: finish reason {finish!r}"
        elif len(text or "") > LONGEST_TEXT:
            problem = f"the model answered too much: {len(text or ''):,} characters"
        if problem:
            raise Declined(printable(problem), prompt_tokens=read, new_tokens=generated)
        return Reply(text=text or "", finish=finish, prompt_tokens=read, new_tokens=generated)

    async def rendered(self, messages: Sequence[Message]) -> str | None:
        """The chat as the model reads it, from llama.cpp (`/apply-template`) or vLLM (`/tokenize`, `/detokenize`)."""
        turns = next(self._requests(messages, Sampling(max_tokens=1))).attempt.body["messages"]
        with contextlib.suppress(CrateError):
            answer = await self.transport.send("/apply-template", root=True, json={"messages": turns})
            return str(answer["prompt"]) if "prompt" in answer else None
        with contextlib.suppress(CrateError):
            chat = {"model": self.name, "messages": turns, "add_generation_prompt": True}
            tokens = (await self.transport.send("/tokenize", root=True, json=chat)).get("tokens")
            ids = {"model": self.name, "tokens": tokens}
            return str((await self.transport.send("/detokenize", root=True, json=ids)).get("prompt") or "") or None
        return None

    @property
    def batch_api(self) -> BatchAPI:
        """The Batch API of the server. Whether the server has one shows at the first batch."""

        def request(messages: Sequence[Message], sampling: Sampling) -> tuple[str, dict[str, Any]]:
            body = next(self._requests(messages, sampling)).attempt.body
            converted = CHAT_LABEL in self.unsupported
            return ("/v1/responses", responses_body(body)) if converted else ("/v1/chat/completions", body)

        def parse(size: int, answer: Mapping[str, Any]) -> Reply:
            return self._parse_chat(size, as_chat_completion(answer) if "output" in answer else answer)

        return BatchAPI(self.transport, request, parse)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """Prompt logprobs. Raises `LLMError` if the server does not return them."""
        if not prompts:
            return []
        if all(prompt.asks_next for prompt in prompts):
            return await asyncio.gather(*(self._next_token(prompt, top) for prompt in prompts))
        detected: list[PromptLogprobs] = []
        if self.logprobs_format is None or self.logprobs_format[0] == NEXT_TOKEN:
            async with self._detecting:  # concurrent callers wait for the first one's result
                if self.logprobs_format is None or self.logprobs_format[0] == NEXT_TOKEN:
                    detected = [await self._detect_format(prompts[0], top)]
        assert self.logprobs_format is not None
        style, most = self.logprobs_format
        try:
            waiting = (self._post_prompt(style, prompt, top, most) for prompt in prompts[len(detected) :])
            return [*detected, *await asyncio.gather(*waiting)]
        except Absent:
            url = self.transport.url
            raise LLMError(f"{url} returned prompt logprobs before, and does not return them any more") from None

    async def _next_token(self, prompt: Prompt, top: int) -> PromptLogprobs:
        """The candidates of the token after a prompt; fewer if the server refuses that many."""
        most = self.logprobs_format[1] if self.logprobs_format is not None else 0
        try:
            try:
                answer = await self._post_prompt(NEXT_TOKEN, prompt, top, most)
            except Refused:
                if most or top <= FEWER:
                    raise
                answer, most = await self._post_prompt(NEXT_TOKEN, prompt, top, FEWER), FEWER
        except Absent:
            raise LLMError(f"{self.transport.url} does not return candidates of the next token (logprobs)") from None
        except Refused as error:
            await self._check_model(error)
            raise
        if self.logprobs_format is None:
            self.logprobs_format = NEXT_TOKEN, most
        return answer

    async def _post_prompt(self, style: str, prompt: Prompt, top: int, most: int) -> PromptLogprobs:
        top = min(top, most or top)

        def parse(answer: Mapping[str, Any]) -> PromptLogprobs:
            try:
                return read(style, answer, prompt, top)
            except Absent:
                self.transport.usage.add(*paid_tokens(answer), usable=False)
                raise

        return await self.transport.post("/completions", request(style, self.name, prompt, top), parse)

    async def _detect_format(self, prompt: Prompt, top: int) -> PromptLogprobs:
        """Try each style, with fewer candidates if many are refused; remember which works, or that none does."""
        if self._no_logprobs:
            raise LLMError(self._no_logprobs)
        reasons = {}
        for style in STYLES:
            for most in (0, FEWER):
                try:
                    answer = await self._post_prompt(style, prompt, top, most)
                except Absent:
                    reasons[style] = IGNORED
                    break
                except Refused as error:
                    reasons[style] = str(error)
                    if error.status in (404, 405, 501):
                        await self._check_model(error)
                        break
                else:
                    self.logprobs_format = style, most
                    return answer
        ways = {"vllm": "prompt_logprobs", "openai": "echo with logprobs"}
        listed = "; ".join(f"{ways[style]}: {reason}" for style, reason in reasons.items())
        message = f"{self.transport.url} does not return prompt logprobs ({listed})"
        if set(reasons.values()) == {IGNORED}:  # a refusal may concern this prompt only
            self._no_logprobs = message
        raise LLMError(message)

    async def _check_model(self, error: Refused) -> None:
        """If a refusal is about the model's name, raise an error that lists what the server has."""
        if (
            self.transport.answered
            or self.name in self.served
            or not (error.status == 404 or UNKNOWN_MODEL.search(str(error)))
        ):
            return
        if not self.served:
            await self.connect()
        if self.name not in self.served:
            listed = printable(", ".join(self.served[:20])) or "no models"
            raise CrateError(
                f"{self.transport.url} does not serve {self.name} (it serves: {listed}). {error}"
            ) from None
