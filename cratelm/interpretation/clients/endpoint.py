"""A language model behind a server: vLLM, llama.cpp, `transformers serve`, or a provider, by its base URL.

Differences between servers are handled here: how they return prompt logprobs (`prompt_logprobs.py`), whether they
support a system message and a JSON schema, and OpenAI's newer parameter names.
"""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from cratelm.errors import CrateError
from cratelm.interpretation.clients.prompt_logprobs import STYLES, Absent, read, request
from cratelm.interpretation.clients.transport import Malformed, Refused, Retry, Transport
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.llm import Declined, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.prompts.explainer import without_system
from cratelm.interpretation.prompts.few_shot import solved_tables

NO_SYSTEM = re.compile(r"system.{0,20}role|role.{0,20}system|roles? must alternate|only user and assistant", re.I)
"""Error messages of servers whose chat template has no system message."""
UNKNOWN_MODEL = re.compile(
    r"model.{0,80}(not (found|exist|served|available)|does not exist|no such|unknown)|pinned to", re.I | re.S
)
FACTS = ("root", "parent", "owned_by", "meta", "quantization")
"""Fields of a server's model list that differ between models with the same name."""
CONTEXTS = ("max_model_len", "context_length", "max_context_length", "n_ctx", "n_ctx_train")
"""Fields under which servers report the context length."""
IGNORED = "ignored"
FEWER = 5
"""Candidates requested if a server refuses more: the most that OpenAI returns."""


class Endpoint:
    """A model on a server. `connect` asks the server about it."""

    remote = True

    def __init__(
        self, url: str, model: str, *, key_from: str = "", in_flight: int = 32, timeout: float = 300.0,
        retry: Retry | None = None, usage: Usage | None = None, counter: Callable[[str], int] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.identity = model, model
        self.context: int | None = None
        self.served: tuple[str, ...] = ()
        self.logprobs_format: tuple[str, int] | None = None
        self.transport = Transport(
            url, key_from=key_from, in_flight=in_flight, timeout=timeout, retry=retry, usage=usage
        )
        self.counts_exactly = counter is not None
        self.tokens_per_byte = 0.0
        """Measured on few-shot examples by `calibrate`; 0 if not known: then `count` assumes a token per byte."""
        self._counter = counter
        self._no_logprobs, self._answered = "", False
        self._detecting = asyncio.Lock()
        self._system, self._schema, self._limit = True, True, "max_tokens"

    async def connect(self) -> None:
        """Ask what is served. Raises `CrateError` if no server answers; whether it knows the model shows later."""
        try:
            listed = (await self.transport.get("/models")).get("data")
        except LLMError:
            listed = None  # not every server has a model list
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        self.served = tuple(sorted(str(entry["id"]) for entry in entries if "id" in entry))
        facts = next((entry for entry in entries if entry.get("id") == self.name), None)
        if facts is not None:
            self.identity = json.dumps([self.name, {key: facts[key] for key in FACTS if key in facts}], sort_keys=True)
            facts = facts | (facts["meta"] if isinstance(facts.get("meta"), dict) else {})
            self.context = next((int(facts[key]) for key in CONTEXTS if facts.get(key)), None)

    async def close(self) -> None:
        """Close the connections."""
        await self.transport.close()

    def set_logprobs_format(self, style: str, most: int) -> None:
        """Restore the format that an earlier process detected."""
        if style in STYLES:
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
            for body in self._chat_bodies([Message("user", text)], Sampling(max_tokens=4)):
                async with self._adapting_to_refusals(body):
                    cost = await self.transport.post("/chat/completions", body, _reported_usage)
                    break
        except LLMError:
            body = {"model": self.name, "prompt": text, "max_tokens": 1, "temperature": 0}
            with contextlib.suppress(LLMError):
                cost = await self.transport.post("/completions", body, _reported_usage)
        self.transport.usage.add(*cost)
        return cost[0] / len(text)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat. Raises `LLMError` if the server refuses or fails, `CrateError` if it cannot be reached."""
        size = sum(len(message.text.encode()) for message in messages)
        for body in self._chat_bodies(messages, sampling):
            async with self._adapting_to_refusals(body):
                return await self.transport.post("/chat/completions", body, partial(self._parse_chat, size))
        raise AssertionError("each feature is dropped once")

    def _chat_bodies(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[dict[str, Any]]:
        """The body of each attempt: before each, one more feature that the server does not support was dropped."""
        for _ in range(4):
            supported = messages if self._system else without_system(messages)
            turns = [{"role": message.role, "content": message.text} for message in supported]
            body: dict[str, Any] = {"model": self.name, "messages": turns, self._limit: sampling.max_tokens}
            body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
            if sampling.schema is not None and self._schema:
                schema = {"name": "answer", "strict": True, "schema": dict(sampling.schema)}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            yield body

    @contextlib.asynccontextmanager
    async def _adapting_to_refusals(self, body: Mapping[str, Any]) -> AsyncIterator[None]:
        """Suppress a refusal of an optional feature of this request, and drop the feature from later requests."""
        try:
            yield
        except Refused as error:
            if not self._drop_feature(error, body):
                await self._check_model(error)
                raise

    def _drop_feature(self, error: Refused, body: Mapping[str, Any]) -> bool:
        """Stop using the feature that the server refuses; whether this request used it.

        The request decides, not the current state: concurrent requests are all refused before the first one adapts.
        """
        message = str(error)
        if "max_tokens" in body and "max_completion_tokens" in message:
            self._limit = "max_completion_tokens"
        elif body["messages"][0]["role"] == "system" and len(body["messages"]) > 1 and NO_SYSTEM.search(message):
            self._system = False
        elif "response_format" in body and re.search(r"response_format|json_schema|grammar", message):
            self._schema = False
        else:
            return False
        return True

    def _parse_chat(self, size: int, answer: Mapping[str, Any]) -> Reply:
        try:
            choice = answer["choices"][0]
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            finish = str(choice.get("finish_reason") or "stop")
            usage = answer.get("usage") or {}
            read, generated = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Malformed(f"not a chat completion ({type(error).__name__}: {error})") from None
        self._answered = True
        cost = read or math.ceil(size / 3), self.count(refusal or text or "") if generated is None else generated
        if refusal:
            raise Declined(f"the model refused: {refusal}", prompt_tokens=cost[0], new_tokens=cost[1])
        if text is None and finish != "length":
            message = f"the model answered nothing: finish reason {finish!r}"
            raise Declined(message, prompt_tokens=cost[0], new_tokens=cost[1])
        return Reply(text=text or "", finish=finish, prompt_tokens=cost[0], new_tokens=cost[1])

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """Prompt logprobs. Raises `LLMError` if the server does not return them."""
        if not prompts:
            return []
        detected: list[PromptLogprobs] = []
        if self.logprobs_format is None:
            async with self._detecting:  # concurrent callers wait for the first one's result
                if self.logprobs_format is None:
                    detected = [await self._detect_format(prompts[0], top)]
        assert self.logprobs_format is not None
        style, most = self.logprobs_format
        try:
            waiting = (self._post_prompt(style, prompt, top, most) for prompt in prompts[len(detected) :])
            return [*detected, *await asyncio.gather(*waiting)]
        except Absent:
            url = self.transport.url
            raise LLMError(f"{url} returned prompt logprobs before, and does not return them any more") from None

    async def _post_prompt(self, style: str, prompt: Prompt, top: int, most: int) -> PromptLogprobs:
        top = min(top, most or top)

        def parse(answer: Mapping[str, Any]) -> PromptLogprobs:
            try:
                return read(style, answer, prompt, top)
            except Absent:
                self.transport.usage.add(*_reported_usage(answer), usable=False)
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
        if self._answered or self.name in self.served or not (error.status == 404 or UNKNOWN_MODEL.search(str(error))):
            return
        if not self.served:
            await self.connect()
        if self.name not in self.served:
            listed = ", ".join(self.served[:20]) or "no models"
            raise CrateError(
                f"{self.transport.url} does not serve {self.name} (it serves: {listed}). {error}"
            ) from None


def _reported_usage(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens read and generated as the server reports them, 0 if it does not."""
    usage = answer.get("usage") or {}
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
