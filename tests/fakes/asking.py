"""The separate process of `test_llm_faults.py`: explain many neurons over HTTP, until done or killed."""

import asyncio
import sys
from pathlib import Path

from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.transport import Retry
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.llm import Message, Sampling
from cratelm.interpretation.stages.concurrency import each
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, Row
from cratelm.interpretation.store.schema import SetKey

PROTOCOLS = ("top-and-random", "random-only", "anthropic")


async def ask(run: Path, url: str, neurons: int, *, in_flight: int = 16) -> Usage:
    """Two calls for each neuron and protocol: an explanation, and how sure the model is of it."""
    usage, store = Usage(), Store.create(run)
    retry = Retry(first=0.02, longest=0.2, attempts=12)
    endpoint = Endpoint(url, "small", in_flight=in_flight, retry=retry, usage=usage)
    llm = Cached(Metered(endpoint, usage, attempts=12, pause=0.02), store, usage)
    for name in PROTOCOLS:
        key = SetKey(layer=0, protocol=name, explainer="small")

        async def do(neuron: int, name: str = name) -> Row:
            said = await llm.chat([Message("user", f"{name} {neuron}")], Sampling(max_tokens=20))
            sure = await llm.chat([Message("user", f"sure of {said.text}?")], Sampling(max_tokens=20))
            return f"{said.text} {sure.text}"

        growing = GrowingSet.begin(store, key, "explain", range(neurons), settings={})
        await each(growing.missing(), do, keep=growing.add, fail=growing.add_failures, in_flight=in_flight)
        growing.finish()
    await endpoint.close()
    return usage


if __name__ == "__main__":
    asyncio.run(ask(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
