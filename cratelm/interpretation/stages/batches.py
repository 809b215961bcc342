"""Chats in batches: requests are queued instead of sent, submitted as one file, and collected by a later run.

collect_batches    the answers of finished batches go into the cache
BatchLLM           a chat whose answer is not in the cache is queued, and its neuron is left for the next run
submit_batches     the queue becomes a batch for each file's worth of requests
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from cratelm.errors import CrateError
from cratelm.interpretation.clients.batch_api import ENDED, MOST_BYTES, MOST_REQUESTS, LineResult
from cratelm.interpretation.clients.responses import error_message
from cratelm.interpretation.clients.usage import Metered
from cratelm.interpretation.llm import (
    LLM,
    BatchService,
    LLMError,
    Message,
    Prompt,
    PromptLogprobs,
    Queued,
    Reply,
    Sampling,
)
from cratelm.interpretation.llm_wrapper import LLMWrapper
from cratelm.interpretation.store.answer_cache import DECLINED, Cached, answer_row, chat_hash
from cratelm.interpretation.store.batches import BatchRecord, close_batch, open_batches, write_batch
from cratelm.interpretation.store.database import Store
from cratelm.runtime import console, human, printable

TRIED = 3
"""Requests that are sent alone before a batch, until one succeeds: the server may refuse a parameter."""
Request = tuple[tuple[Message, ...], Sampling]
"""A chat."""


@dataclass(slots=True)
class BatchLLM(LLMWrapper):
    """A language model whose chats are queued for a batch once `queues` is set; other calls are made as usual."""

    inner: LLM
    waiting: set[str] = field(default_factory=set)
    """Keys of the requests in batches that are not collected: they are never sent again."""
    queues: bool = False
    queue: dict[str, Request] = field(default_factory=dict)
    """Requests of the next batch, by the key of their answer."""
    failed: dict[str, str] = field(default_factory=dict)
    """Key of each request that failed when it was sent alone -> the error. This process does not send it again."""
    postponed: int = 0
    """Requests that were queued or wait in a batch."""

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Queue a chat and raise `Queued`, or answer it. Raises the error of a request that failed alone."""
        key = chat_hash(self.identity, messages, sampling)
        if key in self.failed:
            raise LLMError(self.failed[key])
        if key not in self.waiting and not self.queues:
            return await self.inner.chat(messages, sampling)
        if key not in self.waiting:
            self.queue[key] = tuple(messages), sampling
        self.postponed += 1
        raise Queued("the request waits in a batch")

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """Prompt logprobs, which are never queued."""
        return await self.inner.prompt_logprobs(prompts, top=top)


async def collect_batches(store: Store, llm: LLM) -> None:
    """Put the answers of the model's finished batches into the cache; print the state of the others."""
    api = llm.batch_api
    for record in open_batches(store) if api is not None else ():
        assert api is not None
        if (record.url, record.model) != (api.url, llm.name):
            continue
        record = record if record.id else await _identified(store, api, record)
        batch = await api.status(record.id)
        if batch["status"] in ENDED:
            await _collect(store, api, record, batch)
        else:
            counts = batch.get("request_counts")
            done = counts.get("completed", "?") if isinstance(counts, dict) else "?"
            console.print(
                f"batch {record.id}: {batch['status'] or 'in progress'}, {done} of {len(record.requests):,} requests "
                f"answered, submitted {record.date}. Run the same command again to collect",
                soft_wrap=True,
            )  # fmt: skip


async def _identified(store: Store, api: BatchService, record: BatchRecord) -> BatchRecord:
    """The batch of a process that ended while it submitted: the server's, or a new one if the server has none."""
    batch = await api.find(record.file)
    if not batch:
        console.print(f"the batch of the file {record.file} was not created; it is submitted now", soft_wrap=True)
        batch = await api.create(record.file, record.path)
    record = replace(record, id=batch)
    write_batch(store, record)
    return record


async def _collect(store: Store, api: BatchService, record: BatchRecord, batch: Mapping[str, object]) -> None:
    results: dict[str, LineResult] = {}
    unread = 0
    async for result in api.results(batch, record.requests):
        if result is None:
            unread += 1
        elif result.key not in results or not result.again:
            results[result.key] = result
    rows = [
        answer_row(key, record.model, asdict(result.reply) if result.reply else _declined(result))
        for key, result in results.items() if not result.again
    ]  # fmt: skip
    close_batch(store, record, rows)
    failed = sum(bool(result.failed) for result in results.values())
    missing, tokens = len(record.requests) - len(rows), sum(row[2] + row[3] for row in rows)
    line = f"batch {record.id} ({batch['status']}): {len(rows) - failed:,} answers, {human(tokens)} tokens"
    line += f", {failed:,} failures" if failed else ""
    line += f", {missing:,} requests without an answer, which are submitted again" if missing else ""
    line += f", {unread:,} lines that cannot be read" if unread else ""
    reason = next((result.again for result in results.values() if result.again), "") or _errors(batch)
    console.print(line + (f": {reason}" if reason and missing else ""), soft_wrap=True)
    if batch["status"] == "failed" and not rows:
        raise CrateError(
            f"the batch {printable(record.id)} failed: {printable(reason) or 'no reason given'}. Nothing was answered. "
            "Run the same command again to submit it again"
        )


def _declined(result: LineResult) -> dict[str, object]:
    return {DECLINED: result.failed, "prompt_tokens": result.paid[0], "new_tokens": result.paid[1]}


def _errors(batch: Mapping[str, object]) -> str:
    """The first error that a batch reports."""
    errors = batch.get("errors")
    rows = errors.get("data") if isinstance(errors, dict) else errors
    return error_message(rows[0]) if isinstance(rows, list) and rows else ""


async def submit_batches(store: Store, cached: Cached, llm: BatchLLM) -> bool:
    """Submit the queue. Returns whether it was emptied by requests sent alone, so that the stages should run again.

    The first request is sent alone, so that a refused parameter, key or model shows before anything is submitted.
    Raises `CrateError` if the budget covers no request, or if the first requests fail.
    """
    await cached.drain()
    if not llm.queue:
        return False
    await _try_alone(cached, llm)
    queue, llm.queue = llm.queue, {}
    if not queue:
        return True
    meter = cached.inner
    assert isinstance(meter, Metered)
    bounds = {key: meter.bound(*request) for key, request in queue.items()}
    covered = dict(list(queue.items())[: meter.affordable(list(bounds.values()))])
    if not covered:
        raise CrateError(meter.spent_line())
    if len(covered) < len(queue):
        console.print(f"the budget covers {len(covered):,} of {len(queue):,} requests; the others are not submitted")
    assert llm.batch_api is not None
    for path, lines in _files(llm.batch_api, covered):
        read, generated = (sum(bounds[key][place] for key in lines) for place in (0, 1))
        usage = meter.usage
        usage.in_batches = usage.in_batches[0] + read, usage.in_batches[1] + generated
        await _submit(store, llm.batch_api, llm.name, path, lines, (read, generated))
        llm.waiting |= set(lines)
    return False


async def _try_alone(cached: Cached, llm: BatchLLM) -> None:
    """Send the first request of the queue alone; after a failure, which is remembered, the next one."""
    llm.queues, failure = False, ""
    for key in list(llm.queue)[:TRIED]:
        messages, sampling = llm.queue.pop(key)
        try:
            await cached.chat(messages, sampling)
        except LLMError as error:
            failure = llm.failed[key] = str(error)
        else:
            failure = ""
            break
    llm.queues = True
    if failure and llm.queue:
        raise CrateError(f"the first {TRIED} requests failed, so no batch is submitted. The last one: {failure}")


def _files(api: BatchService, queue: Mapping[str, Request]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The requests as lines by key, in files that servers accept, each with the path of its requests."""
    path, lines, size = "", dict[str, bytes](), 0
    for key, (messages, sampling) in queue.items():
        path, body = api.chat_request(messages, sampling)
        line = json.dumps({"custom_id": key, "method": "POST", "url": path, "body": body}).encode()
        if lines and (len(lines) == MOST_REQUESTS or size + len(line) > MOST_BYTES):
            yield path, lines
            lines, size = {}, 0
        lines[key] = line
        size += len(line) + 1
    yield path, lines


async def _submit(
    store: Store, api: BatchService, model: str, path: str, lines: Mapping[str, bytes], bound: tuple[int, int]
) -> None:  # fmt: skip
    """Submit one file. The note with the file is written before the batch is created, and once more with its number."""
    file = await api.upload(list(lines.values()), "cratelm-requests.jsonl")
    record = BatchRecord(
        file=file, url=api.url, model=model, path=path, bound=bound,
        requests={key: len(line) for key, line in lines.items()},
    )  # fmt: skip
    write_batch(store, record)
    batch = await api.create(file, path)
    write_batch(store, replace(record, id=batch))
    console.print(
        f"batch {batch}: submitted {len(lines):,} requests, at most {human(sum(bound))} tokens. "
        "Run the same command again to collect the answers, within 24 hours at most",
        soft_wrap=True,
    )
