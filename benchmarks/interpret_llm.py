"""Calls per second and memory of the work with a language model, against a server on this machine that answers at once.

    OMP_NUM_THREADS=1 python benchmarks/interpret_llm.py [NEURONS]

For each of NEURONS neurons (5,000) and 3 protocols an explanation is asked for, with a prompt of 8 KB, and one answer
about it; both go through the cache into the store of a run. The server is a process of its own. Then the same again,
with all answers in the cache. What is measured is everything but the model.

Before that, all-at-once simulations: what is answered there is 15 candidates for each of 1,200 tokens of a prompt,
1.5 MB for an excerpt of 64 tokens. The server has these answers ready.
"""

import asyncio
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.llm import Message, Sampling
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.protocols import PROTOCOLS
from cratelm.interpretation.simulators.all_at_once import AllAtOnce
from cratelm.interpretation.simulators.readout import ReadOut
from cratelm.interpretation.stages.concurrency import each
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, Row, Simulated
from cratelm.interpretation.store.schema import SetKey
from cratelm.runtime import progress_bar

ANSWER = (
    b'{"choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"words about boats and '
    b'their parts, most of all sails"}}],"usage":{"prompt_tokens":2048,"completion_tokens":12,"total_tokens":2060}}'
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
RESPONSE = HEAD % len(ANSWER) + ANSWER
EXCERPTS, WIDTH = 40, 64
"""Excerpts that are simulated, and their tokens."""
SHOWN = "".join(f"token{i}\t{i % 11}\n" for i in range(800))
"""What an explainer is shown of a neuron: about 8 KB."""


class Instant(asyncio.Protocol):
    """Answers every request as soon as all of it is there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.waiting = transport, b""

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        while (end := self.waiting.find(b"\r\n\r\n")) >= 0:
            head = self.waiting[:end].lower()
            size = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self.waiting) < end + 4 + size:
                return
            body, self.waiting = self.waiting[end + 4 : end + 4 + size], self.waiting[end + 4 + size :]
            self.transport.write(echoed(body) if b'"prompt_logprobs"' in body else RESPONSE)


@cache
def echoed(body: bytes) -> bytes:
    """What vLLM answers: the tokens of a prompt, each with 15 more that might have stood there."""
    draw = random.Random(0)
    tokens = re.findall(r"unknown|10|\d| ?[^\W\d_]+|.", json.loads(body)["prompt"], re.S)
    words = [str(number) for number in range(11)] + ["unknown", " the", "\n", " 7"]
    tables: list[Any] = [None]
    for token in tokens[1:]:
        table = {"1": {"logprob": -draw.uniform(0.1, 9), "rank": 16, "decoded_token": token}}
        for place, word in enumerate(words):
            table[str(100 * place + 100)] = {"logprob": -draw.uniform(4, 9), "rank": place + 1, "decoded_token": word}
        tables.append(table)
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
    said = json.dumps({"choices": [{"text": "a", "prompt_logprobs": tables}], "usage": usage}).encode()
    return HEAD % len(said) + said


def serve(told: Connection) -> None:
    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def ask(run: Path, url: str, neurons: int) -> tuple[Usage, list[float]]:
    usage, store, memory = Usage(), Store.create(run), [resident()]
    endpoint = Endpoint(url, "instant", in_flight=64, usage=usage)
    llm = Cached(Metered(endpoint, usage), store, usage)
    total = neurons * len(PROTOCOLS) * 2
    with progress_bar("neurons", total=total, unit="neurons") as bar:

        def note() -> str:
            if usage.calls + usage.cached >= len(memory) * total / 8:
                memory.append(resident())
            return usage.line()

        async def fill(growing: GrowingSet, make_row: Callable[[int], Awaitable[Row]]) -> None:
            await each(
                growing.missing(), make_row, keep=growing.add, fail=growing.add_failures, in_flight=64,
                kept=lambda count: bar.advance(count, note=note()),
            )  # fmt: skip
            growing.finish()

        for name in PROTOCOLS:
            key = SetKey(layer=0, protocol=name, explainer="instant")

            async def explain(neuron: int, name: str = name) -> Row:
                turns = [Message("system", "Say what it fires on."), Message("user", f"{name} {neuron}\n{SHOWN}")]
                return (await llm.chat(turns, Sampling(max_tokens=60))).text

            async def simulate(neuron: int, name: str = name) -> Row:
                await llm.chat([Message("user", f"rate {name} {neuron}\n{SHOWN[:2000]}")], Sampling(max_tokens=600))
                return Simulated(source=neuron, activations=ACTIVATIONS)

            explained = GrowingSet.begin(store, key, "explain", range(neurons), settings={})
            await fill(explained, explain)
            simulated = GrowingSet.begin(store, key, "simulate", range(neurons), settings={})
            await fill(simulated, simulate)
    await endpoint.close()
    return usage, [*memory, resident()]


async def simulate_once(run: Path, url: str) -> None:
    """Every excerpt simulated, all at once, through the cache into a new store."""
    usage, store, draw = Usage(), Store.create(run), random.Random(1)
    words = [token for neuron in few_shot_neurons() for record in neuron.records for token in record.tokens]
    excerpts = [[draw.choice(words) for _ in range(WIDTH)] for _ in range(EXCERPTS)]
    endpoint = Endpoint(url, "instant", in_flight=32, usage=usage)
    llm = Cached(Metered(endpoint, usage), store, usage)
    simulator = AllAtOnce(llm=llm, read_out=ReadOut())
    await asyncio.gather(*(simulator.simulate(f"words, {i}", excerpts[i : i + 10]) for i in range(0, EXCERPTS, 10)))
    await endpoint.close()


def measure_echoes(folder: Path, url: str) -> None:
    for number in range(4):  # the first time the server makes its answers
        start, processor = time.perf_counter(), time.process_time()
        asyncio.run(simulate_once(folder / str(number), url))
        seconds, busy = time.perf_counter() - start, time.process_time() - processor
        if number:
            size = Store.open(folder / str(number)).path.stat().st_size
            print(
                f"echoes {EXCERPTS:>6} excerpts of {WIDTH} tokens: {EXCERPTS / seconds:5.1f} a second "
                f"({1e3 * busy / EXCERPTS:.1f} ms of processor each), {size / EXCERPTS / 1e3:.1f} kB stored each"
            )


def measure(what: str, run: Path, url: str, neurons: int) -> None:
    start, processor = time.perf_counter(), time.process_time()
    usage, memory = asyncio.run(ask(run, url, neurons))
    seconds, busy = time.perf_counter() - start, time.process_time() - processor
    answers = usage.calls + usage.cached
    print(
        f"{what:<6} {usage.calls:>6} calls, {usage.cached:>6} from the cache: {seconds:6.1f} s, "
        f"{answers / seconds:5.0f} answers/s ({1e3 * busy / answers:.2f} ms of processor each); "
        f"resident MB {', '.join(f'{one:.0f}' for one in memory)}"
    )


if __name__ == "__main__":
    import numpy as np

    ACTIVATIONS = np.zeros(640, dtype=np.float32)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    address = f"http://127.0.0.1:{ours.recv()}/v1"
    with tempfile.TemporaryDirectory() as folder:
        measure_echoes(Path(folder), address)
        place = Path(folder) / "chats"
        measure("first", place, address, count)
        store = Store.open(place)
        print(f"{store.path.stat().st_size / 1e6:.1f} MB stored")
        with store.transaction() as connection:
            for table in ("sets", "stages", "explanations", "simulations", "begun"):
                connection.execute(f"DELETE FROM {table}")
        measure("again", place, address, count)
    server.terminate()
