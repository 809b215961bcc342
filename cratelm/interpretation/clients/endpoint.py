"""A language model behind a server: vLLM, llama.cpp, `transformers serve`, or a provider, by its base URL.

Differences between servers are handled here: how they return prompt logprobs (`prompt_logprobs.py`), whether they
support a system message and a JSON schema, and OpenAI's newer parameter names.
"""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cratelm.errors import CrateError
from cratelm.interpretation.clients import prompt_logprobs as shapes
from cratelm.interpretation.clients.transport import Refused, Retry, Transport, Unreadable
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.llm import Declined, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.prompts.explainer import without_system
from cratelm.interpretation.prompts.few_shot import solved_tables

NO_SYSTEM = re.compile(r"system.{0,20}role|role.{0,20}system|roles? must alternate|only user and assistant", re.I)
"""How servers say that a chat template knows no system turn."""
UNKNOWN_MODEL = re.compile(
    r"model.{0,80}(not (found|exist|served|available)|does not exist|no such|unknown)|pinned to", re.I | re.S
)
FACTS = ("root", "parent", "owned_by", "meta", "quantization")
"""What a server may tell of a model that another model under the same name would have otherwise."""
CONTEXTS = ("max_model_len", "context_length", "max_context_length", "n_ctx", "n_ctx_train")
"""Names under which servers tell the context."""
IGNORED = "ignored"
FEWER = 5
"""Candidates that are asked for where a server refuses as many as are wanted: OpenAI's most."""


class Endpoint:
    """A model that a server has. `connect` asks the server for it."""

    def __init__(
        self, url: str, model: str, *, key_from: str = "", in_flight: int = 32, timeout: float = 300.0,
        retry: Retry | None = None, usage: Usage | None = None, counter: Callable[[str], int] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.identity = model, model
        self.context: int | None = None
        self.served: tuple[str, ...] = ()
        """Models that the server says it has."""
        self.style: shapes.Style | None = None
        """How it gives the probabilities of a prompt, once that was found out."""
        self.transport = Transport(
            url, key_from=key_from, in_flight=in_flight, timeout=timeout, retry=retry, usage=usage
        )
        self.counts_exactly = counter is not None
        self.tokens_per_byte = 0.0
        """Of text like that of prompts, as `measure` found it once; 0 where it is not known: a token for each byte."""
        self._counter = counter
        self._no_logprobs, self._answered = "", False
        self._layouts = shapes.Layouts()
        self.most = 0
        """Candidates that can be asked for, where that is fewer than are wanted; 0 while no such limit is known."""
        self._finding: tuple[Any, asyncio.Lock] | None = None
        self._system, self._schema, self._limit = True, True, "max_tokens"

    async def connect(self) -> None:
        """Ask what is served. Raises `CrateError` where there is no server; the model may still turn out unknown."""
        try:
            listed = (await self.transport.get("/models")).get("data")
        except LLMError:
            listed = None  # not every server can say
        entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        self.served = tuple(sorted(str(one["id"]) for one in entries if "id" in one))
        own = next((one for one in entries if one.get("id") == self.name), None)
        if own is not None:
            self.identity = json.dumps([self.name, {key: own[key] for key in FACTS if key in own}], sort_keys=True)
            told = own | (own["meta"] if isinstance(own.get("meta"), dict) else {})
            self.context = next((int(told[key]) for key in CONTEXTS if told.get(key)), None)

    async def close(self) -> None:
        """Give the connections back."""
        await self.transport.close()

    def count(self, text: str) -> int:
        """Tokens of a text: counted if a counter was given, else estimated from `tokens_per_byte`, a fifth to spare.

        The estimate never learns: what prompts look like depends on it, and those of a set have to look alike. What is
        no ASCII is taken for a token a byte.
        """
        if self._counter is not None:
            return self._counter(text)
        plain = sum(map(str.isascii, text))
        rate = min(1.0, 1.25 * self.tokens_per_byte) if self.tokens_per_byte else 1.0
        return math.ceil(plain * rate) + len(text.encode()) - plain

    async def measure(self) -> float:
        """Ask once how many tokens a byte of a prompt makes; 0 where the server does not tell."""
        text = solved_tables()
        found = Reply(text="", finish="", prompt_tokens=0, new_tokens=0)
        try:
            found = await self._ask_chat([Message("user", text)], Sampling(max_tokens=4), _told_usage)
        except LLMError:
            body = {"model": self.name, "prompt": text, "max_tokens": 1, "temperature": 0}
            with contextlib.suppress(LLMError):
                found = await self.transport.ask("/completions", body, _told_usage)
        self.transport.usage.add(found.prompt_tokens, found.new_tokens)
        return found.prompt_tokens / len(text)

    def expected(self, text: str) -> int:
        """Tokens that a text is likely to have: `count` without what that has to spare."""
        if self._counter is not None or not self.tokens_per_byte:
            return self.count(text)
        plain = sum(map(str.isascii, text))
        return math.ceil(plain * min(1.0, self.tokens_per_byte)) + len(text.encode()) - plain

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat. Raises `LLMError` where the server refuses or fails, `CrateError` where it cannot be asked."""
        size = sum(len(message.text.encode()) for message in messages)
        return await self._ask_chat(messages, sampling, partial(self._read_chat, size))

    async def _ask_chat(
        self, messages: Sequence[Message], sampling: Sampling, read: Callable[[dict[str, Any]], Reply]
    ) -> Reply:
        for _ in range(4):  # each round gives up one thing that the server may not know
            body = self._chat_body(messages, sampling)
            try:
                return await self.transport.ask("/chat/completions", body, read)
            except Refused as error:
                if not self._adapted(error, body):
                    await self._check_model(error)
                    raise
        raise AssertionError("every adaptation can be made once")

    def _chat_body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        known = messages if self._system else without_system(messages)
        turns = [{"role": message.role, "content": message.text} for message in known]
        body: dict[str, Any] = {"model": self.name, "messages": turns, self._limit: sampling.max_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        if sampling.schema is not None and self._schema:
            schema = {"name": "answer", "strict": True, "schema": dict(sampling.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _adapted(self, error: Refused, body: Mapping[str, Any]) -> bool:
        """Give up what the server says it does not know; whether this request had it.

        What counts is what was sent: of requests made at once each is refused, whatever another has learnt meanwhile.
        """
        said = str(error)
        if "max_tokens" in body and "max_completion_tokens" in said:
            self._limit = "max_completion_tokens"
        elif body["messages"][0]["role"] == "system" and len(body["messages"]) > 1 and NO_SYSTEM.search(said):
            self._system = False
        elif "response_format" in body and re.search(r"response_format|json_schema|grammar", said):
            self._schema = False
        else:
            return False
        return True

    def _read_chat(self, size: int, answer: Mapping[str, Any]) -> Reply:
        try:
            choice = answer["choices"][0]
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            finish = str(choice.get("finish_reason") or "stop")
            usage = answer.get("usage") or {}
            read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Unreadable(f"no answer to a chat in it ({type(error).__name__}: {error})") from None
        self._answered = True
        paid = read or math.ceil(size / 3), self.count(refusal or text or "") if written is None else written
        if refusal:
            raise Declined(f"the model refused: {refusal}", prompt_tokens=paid[0], new_tokens=paid[1])
        if text is None and finish != "length":
            said = f"the model answered nothing: it ended by {finish!r}"
            raise Declined(said, prompt_tokens=paid[0], new_tokens=paid[1])
        return Reply(text=text or "", finish=finish, prompt_tokens=paid[0], new_tokens=paid[1])

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """What the model expected. Raises `LLMError` where the server does not give the probabilities of a prompt."""
        if not prompts:
            return []
        if self.style is None:
            async with self._finder():  # one tries, and those that come meanwhile do it as was found
                if self.style is None:
                    first = await self._logprobs_in_some_style(prompts[0], top)
                    prompts = prompts[1:]
                    found = [first]
                else:
                    found = []
            return [*found, *await self.prompt_logprobs(prompts, top=top)]
        try:
            return await asyncio.gather(*(self._logprobs(self.style, prompt, top, self.most) for prompt in prompts))
        except shapes.Absent:
            raise LLMError(
                f"{self.transport.url} gave the probabilities of a prompt before, and does not now"
            ) from None

    def _finder(self) -> asyncio.Lock:
        """Held by whoever tries how to ask, in the loop that runs."""
        loop = asyncio.get_running_loop()
        if self._finding is None or self._finding[0] is not loop:
            self._finding = loop, asyncio.Lock()
        return self._finding[1]

    async def _logprobs(self, style: shapes.Style, prompt: Prompt, top: int, most: int) -> PromptLogprobs:
        asked = min(top, most or top)
        body = shapes.request(style, self.name, prompt, asked)
        return await self.transport.ask(
            "/completions", body, lambda answer: shapes.read(style, answer, prompt, asked, self._layouts)
        )

    async def _logprobs_in_some_style(self, prompt: Prompt, top: int) -> PromptLogprobs:
        """Try each way, with fewer candidates where many are refused; remember what works, or that nothing does."""
        if self._no_logprobs:
            raise LLMError(self._no_logprobs)
        reasons = {}
        for style in shapes.STYLES:
            for most in (0, FEWER):
                try:
                    answer = await self._logprobs(style, prompt, top, most)
                except shapes.Absent:
                    reasons[style] = IGNORED
                    break
                except Refused as error:
                    reasons[style] = str(error)
                    if error.status in (404, 405, 501):
                        await self._check_model(error)
                        break
                else:
                    self.style, self.most = style, most
                    return answer
        ways = {"vllm": "prompt_logprobs", "openai": "echo with logprobs"}
        told = "; ".join(f"{ways[style]}: {reason}" for style, reason in reasons.items())
        message = f"{self.transport.url} does not give the probabilities of a prompt ({told})"
        if set(reasons.values()) == {IGNORED}:  # a refusal may be about this prompt alone
            self._no_logprobs = message
        raise LLMError(message)

    async def _check_model(self, error: Refused) -> None:
        """Where a refusal is about the model, say what the server has."""
        if self._answered or self.name in self.served or not (error.status == 404 or UNKNOWN_MODEL.search(str(error))):
            return
        if not self.served:
            await self.connect()
        if self.name not in self.served:
            found = ", ".join(self.served[:20]) or "nothing that it lists"
            raise CrateError(f"{self.transport.url} does not serve {self.name} (it serves: {found}). {error}") from None

    async def honours_n(self) -> bool:
        """Whether several answers can be asked for in one request."""
        turns = [{"role": "user", "content": "Say a word."}]
        body = {"model": self.name, "messages": turns, self._limit: 8, "n": 2, "temperature": 1}

        def read(answer: Mapping[str, Any]) -> bool:
            paid = _told_usage(answer)
            self.transport.usage.add(paid.prompt_tokens, paid.new_tokens)
            return len(answer["choices"]) == 2

        try:
            return await self.transport.ask("/chat/completions", body, read)
        except (LLMError, KeyError, TypeError):
            return False


def _told_usage(answer: Mapping[str, Any]) -> Reply:
    """An answer of which nothing but the numbers of tokens is wanted; 0 for those that it does not tell."""
    usage = answer.get("usage") or {}
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Reply(text="", finish="", prompt_tokens=read or 0, new_tokens=written or 0)
