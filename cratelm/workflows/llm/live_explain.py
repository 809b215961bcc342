"""A language model that explains one neuron at a time, when a reader of the live browser asks for it."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio.to_thread

from cratelm.activations.records import LayerRecords, read_records, records_tokenizer
from cratelm.data.tokenizer import load_tokenizer
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.catalogue import Layer
from cratelm.workflows.llm.opening import LLMs, basename, is_url, kept, measure, open_llms
from cratelm.workflows.options.language_model import Explaining, Spending

PROTOCOL = "top-and-random"
"""Whose explaining excerpts are shown to the model."""


class LiveExplainer:
    """Asks the model that was named; it is opened when it is first needed, and answers are kept in the run's store."""

    def __init__(self, explaining: Explaining) -> None:
        self.explaining, self.usage, self.spending = explaining, Usage(), Spending()
        self._llms: LLMs | None = None
        self._opening = asyncio.Lock()
        self._open = AsyncExitStack()

    @property
    def name(self) -> str:
        """What the model is called before a server was asked."""
        named = self.explaining.explainer_model or self.explaining.model
        where = self.explaining.llm
        return named or ("the language model" if is_url(where) else basename(where))

    async def __call__(self, layer: Layer, neuron: int) -> Mapping[str, Any]:
        """The explanation as `text`, or what came instead as `failure`; with the `explainer` and tokens spent."""
        async with self._opening:
            if self._llms is None:
                opening = open_llms(self.explaining, None, self.spending, self.usage)
                self._llms = await self._open.enter_async_context(opening)
        assert self._llms.explainer is not None
        store = Store.create(layer.run)
        await measure(self._llms.explainer, store, self.usage)
        llm = kept(self._llms.explainer, store, self.usage, self.spending)
        records, strings = await anyio.to_thread.run_sync(_read, layer)
        explainer = LLMExplainer(llm=llm, settings=explainer_settings(layer.mode), strings=strings)
        [(_, prompt)] = explainer.prompts(records, protocol(PROTOCOL, layer.mode), [neuron])
        try:
            text, failure = await explainer.ask(prompt), ""
        except LLMError as error:
            text, failure = "", str(error)
        return {"text": text, "failure": failure, "explainer": llm.name}


def _read(layer: Layer) -> tuple[LayerRecords, list[str]]:
    tokenizer = load_tokenizer(records_tokenizer(layer.run, layer.mode))
    return read_records(layer.run, layer.layer, mode=layer.mode, tap=layer.tap), prompt_strings(tokenizer, layer.mode)
