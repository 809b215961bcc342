"""OpenAI's Batch API: a file of requests is uploaded, answered within a day for about half the price, and downloaded.

POST /files            the requests, one JSON object a line, each with a `custom_id`
POST /batches          begins the batch; the only request that costs
GET  /batches/{id}     its state
GET  /files/{id}/content    the answers, and the requests that failed
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cratelm.errors import CrateError
from cratelm.interpretation.clients.responses import Malformed, error_in, json_object, reported_usage
from cratelm.interpretation.clients.transport import Refused, Transport
from cratelm.interpretation.llm import Declined, LLMError, Message, Reply, Sampling
from cratelm.runtime import printable

MOST_REQUESTS, MOST_BYTES = 50_000, 90 << 20
"""Of one batch. OpenAI takes 50,000 requests and 200 MB, others 100 MB."""
PAGES = 20
"""Pages of the list of batches that are read, of 100 batches each."""
ENDED = ("completed", "expired", "cancelled", "canceled", "failed")
"""States of a batch that does not change any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LineResult:
    """What a batch returned for one request."""

    key: str
    reply: Reply | None = None
    failed: str = ""
    """Why the request has no usable answer, and would have none if it were sent again."""
    paid: tuple[int, int] = (0, 0)
    """Tokens read and generated for a failed request."""
    again: str = ""
    """Why the request was not answered, if it has to be sent again."""


@dataclass(frozen=True, slots=True)
class BatchAPI:
    """The batches of one model on one server."""

    transport: Transport
    chat_request: Callable[[Sequence[Message], Sampling], tuple[str, dict[str, Any]]]
    """Chat -> where it is sent, and the body of the request."""
    parse: Callable[[int, Mapping[str, Any]], Reply]
    """(bytes of the prompt, body of the response) -> the answer."""

    @property
    def url(self) -> str:
        """The base URL of the server."""
        return self.transport.url

    async def upload(self, lines: Sequence[bytes], name: str) -> str:
        """Upload the requests. Returns the identifier of the file. Nothing is paid yet."""
        file = {"file": (name, b"\n".join(lines) + b"\n", "application/jsonl")}
        try:
            answer = await self.transport.send("/files", data={"purpose": "batch"}, files=file)
        except Refused as error:
            if error.status in (404, 405, 501):
                raise CrateError(f"{self.url} has no Batch API ({error}). Run without --batch") from None
            raise CrateError(f"{self.url} refuses the file of a batch: {error}") from None
        return _identifier(answer, "file")

    async def create(self, file: str, path: str) -> str:
        """Begin the batch of an uploaded file. Returns its identifier. Sent once: a repetition would be paid for."""
        body = {"input_file_id": file, "endpoint": path, "completion_window": "24h"}
        try:
            return _identifier(await self.transport.send("/batches", json=body), "batch")
        except Refused as error:
            raise CrateError(f"{self.url} refuses the batch: {error}") from None

    async def find(self, file: str) -> str:
        """The identifier of a file's batch, empty if none was created. Raises `CrateError` if that is not known."""
        after = ""
        try:
            for _ in range(PAGES):
                page = await self.transport.get(f"/batches?limit=100{after}")
                batches = [batch for batch in page.get("data") or () if isinstance(batch, dict)]
                for batch in batches:
                    if batch.get("input_file_id") == file:
                        return _identifier(batch, "batch")
                if not (page.get("has_more") and batches):
                    return ""
                after = f"&after={quote(_identifier(batches[-1], 'batch'), safe='')}"
        except LLMError as error:
            raise CrateError(
                f"the process ended while the batch of the file {printable(file)} was submitted, and {self.url} does "
                f"not list batches ({error}). If the provider's page shows no such batch: --forget-batches"
            ) from None
        return ""

    async def status(self, batch: str) -> dict[str, Any]:
        """The state of a batch, its `status` in lower case."""
        try:
            answer = await self.transport.get(f"/batches/{quote(batch, safe='')}")
        except LLMError as error:
            raise CrateError(
                f"{self.url} does not report the state of the batch {printable(batch)}: {error}. Use the key that it "
                "was submitted with. If the batch is lost: --forget-batches"
            ) from None
        return answer | {"status": str(answer.get("status", "")).lower()}

    async def results(self, batch: Mapping[str, Any], sizes: Mapping[str, int]) -> AsyncIterator[LineResult | None]:
        """The result of each request, in any order; None for a line that is not about one of them.

        `sizes`: key of each request -> bytes of its prompt.
        """
        self.transport.answered = True  # a 403 is about a prompt
        for name in ("output_file_id", "error_file_id"):
            if isinstance(batch.get(name), str) and batch[name]:
                async for line in self.transport.lines(f"/files/{quote(batch[name], safe='')}/content"):
                    if line.strip():
                        yield self._result(line, sizes)

    def _result(self, line: bytes, sizes: Mapping[str, int]) -> LineResult | None:
        try:
            row = json_object(line)
            key, size = str(row.get("custom_id")), sizes[str(row.get("custom_id"))]
        except (Malformed, KeyError):
            return None
        response = row["response"] if isinstance(row.get("response"), dict) else {}
        body = response.get("body")
        body = body if isinstance(body, dict) else {"error": body} if body else {}
        status = response.get("status_code")
        if row.get("error") and not body:
            status, code, error = error_in({"error": row["error"]}, 200)
        else:
            status, code, error = error_in(body, status if isinstance(status, int) else 200 if body else 502)
        if status:
            failure = self.transport.error(status, code, error, {})
            failed = str(failure) if isinstance(failure, Refused) else ""
            return LineResult(key=key, failed=failed, again="" if failed else str(failure))
        body["usage"] = usage = reported_usage(body, size, None)
        paid = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        try:
            return LineResult(key=key, reply=self.parse(size, body))
        except Declined as refusal:
            return LineResult(key=key, failed=str(refusal), paid=(refusal.prompt_tokens, refusal.new_tokens))
        except Malformed as fault:
            return LineResult(key=key, failed=printable(f"could not parse the server's answer: {fault}"), paid=paid)


def _identifier(answer: Mapping[str, Any], what: str) -> str:
    value = answer.get("id")
    if not isinstance(value, str) or not value:
        raise CrateError(f"the server returned no identifier of the {what}: {printable(json.dumps(answer)[:200])}")
    return value
