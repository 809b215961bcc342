"""A language model that explains one neuron at a time, on request of the live browser."""

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
from cratelm.workflows.llm.opening import LLMs, basename, cached, calibrate_counts, is_url, open_llms
from cratelm.workflows.options.language_model import Explaining, Spending

PROTOCOL = "top-and-random"
"""The protocol whose explaining excerpts the model sees."""


class LiveExplainer:
    """Explains neurons with the chosen model, which is opened at first use. Answers are cached in the run's store."""

    def __init__(self, explaining: Explaining) -> None:
        self.explaining, self.usage, self.spending = explaining, Usage(), Spending()
        self._llms: LLMs | None = None
        self._opening = asyncio.Lock()
        self._open = AsyncExitStack()

    @property
    def name(self) -> str:
        """Name of the model before a server reports it."""
        named = self.explaining.explainer_model or self.explaining.model
        where = self.explaining.llm
        return named or ("the language model" if is_url(where) else basename(where))

    async def __call__(self, layer: Layer, neuron: int) -> Mapping[str, Any]:
        """The explanation as `text`, or the error as `failure`, with the name of the `explainer`."""
        async with self._opening:
            if self._llms is None:
                opening = open_llms(self.explaining, None, self.spending, self.usage)
                self._llms = await self._open.enter_async_context(opening)
        assert self._llms.explainer is not None
        store = Store.create(layer.run)
        await calibrate_counts(self._llms.explainer, store, self.usage)
        llm = cached(self._llms.explainer, store, self.usage, self.spending)
        records, strings = await anyio.to_thread.run_sync(_read, layer)
        form = self.explaining.explainer_prompt
        settings = explainer_settings(layer.mode, prompt=None if form == "auto" else form)
        explainer = LLMExplainer(llm=llm, settings=settings, strings=strings)
        [(_, prompt)] = explainer.prompts(records, protocol(PROTOCOL, layer.mode), [neuron])
        try:
            text, failure = await explainer.ask(prompt), ""
        except LLMError as error:
            text, failure = "", str(error)
        return {"text": text, "failure": failure, "explainer": llm.name}


def _read(layer: Layer) -> tuple[LayerRecords, list[str]]:
    tokenizer = load_tokenizer(records_tokenizer(layer.run, layer.mode))
    return read_records(layer.run, layer.layer, mode=layer.mode, tap=layer.tap), prompt_strings(tokenizer, layer.mode)
