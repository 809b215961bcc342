"""The cache of a language model's answers, in the run's store: no call is paid for twice.

The key of an answer is a hash of the model and of the complete call, so another protocol, a control or the same command
run again get cache hits. A part also uses the answers in the run's own store.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import secrets
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from cratelm.errors import CrateError
from cratelm.interpretation.clients.parameters import unpinned
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.llm import LLM, Declined, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.llm_wrapper import LLMWrapper
from cratelm.interpretation.reasoning import is_cut, larger_limit, spoken
from cratelm.interpretation.store.database import Store, StoreBusy
from cratelm.runtime import console

DECLINED = "declined"
"""Key of a cached refusal: the model's message."""
CallRow = tuple[str, str, int, int, str, bytes]
"""A row of the table `calls`."""
BUSY_ATTEMPTS = 5
"""Attempts to write answers while another process holds the store."""
Answer = asyncio.Future[dict[str, Any]]
"""An answer in flight, in the form of the cache."""


class Cached(LLMWrapper):
    """A language model with a cache: answers are on disk before the caller gets them. Duplicate calls are merged."""

    def __init__(self, inner: LLM, store: Store, usage: Usage | None = None, *, in_flight: int = 0) -> None:
        """`in_flight`: most calls that are in flight or not on disk yet; 0 for any number."""
        self.inner, self.store, self.usage, self.in_flight = inner, store, usage or Usage(), in_flight
        if isinstance(inner, Metered):
            inner.on_unparsed = self._keep_unparsed
        self._slots: tuple[Any, asyncio.Semaphore] | None = None
        self._asking: dict[str, Answer] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._unwritten: list[tuple[CallRow, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._noted, self._ending = set[str](), False

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The cached answer, or the model's, without its reasoning.

        After an answer that its limit of tokens ended within the reasoning, a larger limit is tried once.
        """
        limit = sampling.max_tokens
        for last in (False, True):
            asked = replace(sampling, max_tokens=limit)
            key = chat_hash(self.inner.identity, messages, asked)
            if (future := self._joined(key)) is None:
                future = self._asking[key] = asyncio.get_running_loop().create_future()
                call = partial(self.inner.chat, messages, asked)
                self._keep_running(asyncio.create_task(self._answer(key, future, call, asdict)))
            reply = Reply(**_accepted(await asyncio.shield(future)))
            larger = larger_limit(self.inner, messages, sampling)
            if last or larger == limit or not is_cut(reply, limit):
                break
            limit = larger
        return replace(reply, text=spoken(reply, limit))

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """The cached prompt logprobs, or the model's. One call for each prompt: if one fails, the others are cached."""
        futures = []
        for prompt in prompts:
            key = prompt_logprobs_hash(self.inner.identity, prompt, top)
            if (future := self._joined(key)) is None:
                future = self._asking[key] = asyncio.get_running_loop().create_future()
                call = partial(self.inner.prompt_logprobs, [prompt], top=top)
                work = asyncio.create_task(self._answer(key, future, call, partial(_single_to_json, prompt)))
                self._keep_running(work)
            futures.append(future)
        answers = [_accepted(await asyncio.shield(future)) for future in futures]
        return [logprobs_from_json(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    async def settle(self) -> None:
        """Wait until the answers of calls in flight are on disk, and begin no more calls. The work has ended."""
        self._ending = True
        await self.drain()

    async def drain(self) -> None:
        """Wait until the answers of calls in flight are on disk."""
        while self._working:
            await asyncio.wait(self._working)

    def _joined(self, key: str) -> Answer | None:
        """The answer to a call in flight, which counts as a cache hit."""
        future = self._asking.get(key)
        self.usage.cached += future is not None
        return future

    def _keep_running(self, work: asyncio.Task[None]) -> None:
        """Hold a task that continues even if the caller is cancelled: its answer is paid for."""
        self._working.add(work)
        work.add_done_callback(self._working.discard)

    async def _answer(
        self, key: str, future: Answer, call: Callable[[], Awaitable[Any]], to_json: Callable[[Any], dict[str, Any]]
    ) -> None:
        """Set the future to the stored answer, or call the model and store its answer first."""
        try:
            answer = await asyncio.to_thread(self._find, key)
            if answer is not None:
                self.usage.cached += 1
            else:
                async with self._slot():
                    if self._ending:
                        raise CrateError("the work has ended")
                    try:
                        answer = to_json(await call())
                    except Declined as error:
                        paid = {"prompt_tokens": error.prompt_tokens, "new_tokens": error.new_tokens}
                        answer = {DECLINED: str(error), **paid}
                    await self._keep(answer_row(key, self.inner.name, answer))
                    await self._note_unsupported()
        except Exception as error:
            self._done(key, future, error)
        else:
            self._done(key, future, answer)
        finally:
            if not future.done():  # this task was cancelled
                del self._asking[key]
                future.cancel()

    def _slot(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A slot for a call until its answer is on disk: a killed process loses at most `in_flight` answers."""
        if not self.in_flight:
            return contextlib.nullcontext()
        loop = asyncio.get_running_loop()
        if self._slots is None or self._slots[0] is not loop:
            self._slots = loop, asyncio.Semaphore(self.in_flight)
        return self._slots[1]

    def _done(self, key: str, future: Answer, answer: dict[str, Any] | Exception) -> None:
        if future.done():
            return
        del self._asking[key]
        if isinstance(answer, Exception):
            future.set_exception(answer)
            future.exception()  # marks it as retrieved: the caller may be gone
        else:
            future.set_result(answer)

    async def _keep(self, row: CallRow) -> None:
        """Wait until the row is on disk. Rows that arrive during a transaction are written in the next one."""
        written = asyncio.get_running_loop().create_future()
        self._unwritten.append((row, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written

    async def _note_unsupported(self) -> None:
        """Note which parameters the server refuses, next to the results, so that later processes know it."""
        if not self._noted >= self.inner.unsupported:
            self._noted = set(self.inner.unsupported)
            names = ", ".join(sorted(self._noted))
            console.print(f"not sent, because the server of {self.name} does not support them: {names}", soft_wrap=True)
            note = json.dumps(sorted(self._noted))
            await asyncio.to_thread(self.store.note, unsupported_note(self.identity), note)

    async def _keep_unparsed(self, prompt_tokens: int, new_tokens: int) -> None:
        await self._keep(lost_row(self.inner.name, prompt_tokens, new_tokens))

    async def _write(self) -> None:
        while self._unwritten:
            batch, self._unwritten = self._unwritten, []
            try:
                await asyncio.to_thread(add_calls, self.store, [row for row, _ in batch])
            except Exception as error:
                for _, written in batch:
                    if not written.done():
                        written.set_exception(error)
            else:
                for _, written in batch:
                    if not written.done():
                        written.set_result(None)

    def _find(self, key: str) -> dict[str, Any] | None:
        """The stored answer; in a part also one in the run's own store."""
        for store in (self.store, *([Store(self.store.run)] if self.store.part else [])):
            if store.path.exists():
                with store.transaction() as connection:
                    row = connection.execute("SELECT reply FROM calls WHERE hash = ?", [key]).fetchone()
                if row is not None:
                    return json.loads(zlib.decompress(row[0]))
        return None


def _accepted(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is not a refusal. Raises `Declined` for a stored refusal."""
    if DECLINED in answer:
        raise Declined(answer[DECLINED], prompt_tokens=answer["prompt_tokens"], new_tokens=answer["new_tokens"])
    return answer


def _single_to_json(prompt: Prompt, answers: Sequence[PromptLogprobs]) -> dict[str, Any]:
    (answer,) = answers
    return logprobs_to_json(prompt, answer)


def unsupported_note(identity: str) -> str:
    """The name of the note of parameters that the server of a model refuses."""
    return f"unsupported parameters of {identity}"


def answer_row(key: str, model: str, answer: Mapping[str, Any]) -> CallRow:
    """The row of an answer, or of a refusal."""
    return _row(key, model, int(answer["prompt_tokens"]), int(answer.get("new_tokens", 1)), answer)


def lost_row(model: str, prompt_tokens: int, new_tokens: int) -> CallRow:
    """A row that records the cost of a call without a usable answer; it is never a cache hit."""
    return _row(secrets.token_hex(20), model, prompt_tokens, new_tokens, {})


def _row(key: str, model: str, prompt_tokens: int, new_tokens: int, answer: Mapping[str, Any]) -> CallRow:
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = zlib.compress(json.dumps(answer, ensure_ascii=False).encode(), 6)
    return key, model, prompt_tokens, new_tokens, date, content


def chat_hash(identity: str, messages: Sequence[Message], sampling: Sampling) -> str:
    """Key under which the answer to a chat is cached.

    The constants in a schema are not part of the key: the prompt lists them, and earlier versions sent none.
    """
    asked = {**asdict(sampling), "schema": unpinned(sampling.schema)}
    return _hash(["chat", identity, {"turns": [asdict(message) for message in messages], **asked}])


def prompt_logprobs_hash(identity: str, prompt: Prompt, top: int) -> str:
    """Key under which a prompt's logprobs are cached. The word `echo` is part of every stored key."""
    asked = {name: value for name, value in asdict(prompt).items() if value or name != "numbers"}
    return _hash(["echo", identity, {**asked, "top": top}])


def _hash(asked: list[Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:40]


def is_cached(store: Store, key: str) -> bool:
    """Whether the answer with this hash is cached."""
    if not store.path.exists():
        return False
    with store.transaction() as connection:
        return connection.execute("SELECT 1 FROM calls WHERE hash = ?", [key]).fetchone() is not None


def add_calls(store: Store, rows: Sequence[CallRow]) -> None:
    """Write answers, with `BUSY_ATTEMPTS` attempts while another process holds the store: they are paid for."""
    for attempt in range(1, BUSY_ATTEMPTS + 1):
        try:
            with store.transaction() as connection:
                connection.executemany("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?, ?)", rows)
        except StoreBusy:
            if attempt == BUSY_ATTEMPTS:
                raise
        else:
            return


def add_new_calls(store: Store, rows: Sequence[CallRow]) -> int:
    """Write the answers that are not in the store yet. Returns their number."""
    with store.transaction() as connection:
        connection.executemany("INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?, ?, ?)", rows)
        return connection.total_changes


def spent(store: Store) -> tuple[int, int]:
    """Tokens read and written for all cached answers, earlier processes included."""
    with store.transaction() as connection:
        row = connection.execute("SELECT total(prompt_tokens), total(new_tokens) FROM calls").fetchone()
    return int(row[0]), int(row[1])


def logprobs_to_json(prompt: Prompt, read: PromptLogprobs) -> dict[str, Any]:
    """Prompt logprobs as JSON. Tokens are stored as lengths: their text is the prompt's.

    If only numbers are used (`Prompt.numbers`), only they are stored, with nine decimals.
    """
    logprobs = [None if math.isnan(logprob) else logprob for logprob in read.logprobs.tolist()]
    candidates = [[at, dict(next_tokens)] for at, next_tokens in read.candidates.items()]
    if prompt.numbers:
        logprobs = []
        candidates = [
            [at, {text: round(logprob, 9) for text, logprob in next_tokens.items() if text.strip().isdigit()}]
            for at, next_tokens in read.candidates.items()
        ]
    return {
        "tokens": [len(token) for token in read.tokens], "logprobs": logprobs, "candidates": candidates,
        "prompt_tokens": read.prompt_tokens,
    }  # fmt: skip


def logprobs_from_json(prompt: Prompt, stored: dict[str, Any]) -> PromptLogprobs:
    """Read what `logprobs_to_json` wrote."""
    ends = np.cumsum([0, *stored["tokens"]]).tolist()
    return PromptLogprobs(
        tokens=tuple(prompt.rest[start:end] for start, end in zip(ends, ends[1:], strict=False)),
        logprobs=np.array(
            [math.nan if value is None else value for value in stored["logprobs"] or [None] * len(stored["tokens"])],
            dtype=np.float64,
        ),
        candidates={at: next_tokens for at, next_tokens in stored["candidates"]}, prompt_tokens=stored["prompt_tokens"],
    )  # fmt: skip
