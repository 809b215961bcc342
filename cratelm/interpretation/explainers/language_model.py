"""The explainer that is a language model: the excerpts of a neuron -> one sentence.

What is asked depends on the records and the settings alone. An answer that refuses or is empty raises `LLMError` with
its text, as does a prompt that does not fit; whoever does this for many neurons counts that and goes on.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cratelm.activations.records import LayerRecords, Mode
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.answers import explanation_of
from cratelm.interpretation.llm import LLM, Sampling
from cratelm.interpretation.prompts.explainer import ExplainerPrompt, PromptTooLong, explainer_prompt, shown
from cratelm.interpretation.prompts.normalisation import OWN, Rounding
from cratelm.interpretation.protocols import Protocol, draw
from cratelm.interpretation.store.identities import ExplainerName

MAX_TOKENS: dict[Mode, int] = {"fixed": 100, "compat": 60}
"""Longest answer. The released 60 often cut a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainerSettings:
    """How explanations are drawn."""

    mode: Mode
    temperature: float
    """0 takes the most probable token each time."""
    seed: int
    """Of the first explanation of each neuron; the next ones count on from it."""
    max_tokens: int
    rounding: Rounding
    """How activations become the whole numbers of a prompt (`normalise.py`)."""

    def name(self, model: str) -> ExplainerName:
        """The name of a model's explanations in the store, with the rounding if it is not the mode's default."""
        return ExplainerName(model=model, rounding=None if self.rounding == OWN[self.mode] else self.rounding)

    def sampling(self, sample: int) -> Sampling:
        """How the explanation of this number is drawn."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed + sample)

    def told(self, llm: LLM, sample: int) -> dict[str, Any]:
        """All that explanations depend on beside the records and what a short context leaves out (`needs`)."""
        return {**asdict(self), "sample": sample, "model": llm.identity, "prompts": _prompts_hash()}


def explainer_settings(
    mode: Mode, *, samples: int = 1, temperature: float | None = None, seed: int = 0, rounding: Rounding | None = None
) -> ExplainerSettings:
    """The settings, with the mode's own temperature where none is given: 1 as released, 0 for one explanation each.

    Likewise the rounding: down as released, or up, so that whatever fires is at least 1.
    """
    if temperature is None:
        temperature = 1.0 if mode == "compat" or samples > 1 else 0.0
    if samples > 1 and temperature == 0:
        raise CrateError(
            "--temperature 0 gives the same explanation every time. Use --samples 1, or a temperature above 0"
        )
    return ExplainerSettings(
        mode=mode, temperature=temperature, seed=seed, max_tokens=MAX_TOKENS[mode], rounding=rounding or OWN[mode]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Explainer:
    """Asks a language model what neurons fire on."""

    llm: LLM
    settings: ExplainerSettings
    strings: Sequence[str]
    """What prompts show for each token id (`escape.prompt_strings`)."""
    _needed: dict[tuple[Any, ...], int] = field(default_factory=dict, repr=False)

    def needs(self, records: LayerRecords, protocol: Protocol, neurons: Iterable[int]) -> int:
        """Records of solved neurons that have to be left out for the longest prompt of these neurons to fit.

        All neurons of a set are shown the same ones. A neuron whose prompt never fits does not count. In `compat` mode
        each prompt leaves out its own, as released, and this is 0.
        """
        if self.llm.context is None or self.settings.mode == "compat":
            return 0
        wanted = tuple(neurons)
        asked = records.layer, protocol.name, wanted
        if asked not in self._needed:
            found = self.prompts(records, protocol, wanted)
            dropped = (prompt.dropped for _, prompt in found if isinstance(prompt, ExplainerPrompt))
            self._needed[asked] = max(dropped, default=0)
        return self._needed[asked]

    def prompts(
        self, records: LayerRecords, protocol: Protocol, neurons: Iterable[int], *, left_out: int = 0
    ) -> Iterator[tuple[int, ExplainerPrompt | PromptTooLong]]:
        """What each neuron is asked with, without so many records of solved neurons; or why it cannot be."""
        excerpts = draw(records, protocol.explain, "explain")
        for neuron in neurons:
            try:
                records_shown = shown(tuple(excerpts.of(neuron)), self.strings, rounding=self.settings.rounding)
                yield neuron, explainer_prompt(
                    records_shown, count=self.llm.count, context=self.llm.context,
                    max_tokens=self.settings.max_tokens, mode=self.settings.mode, left_out=left_out,
                )  # fmt: skip
            except PromptTooLong as error:
                yield neuron, error

    async def explain(self, prompt: ExplainerPrompt | PromptTooLong, sample: int = 0) -> str:
        """Ask for one explanation. Raises `LLMError` where there is none."""
        if isinstance(prompt, PromptTooLong):
            raise prompt
        reply = await self.llm.chat(prompt.messages, self.settings.sampling(sample))
        return explanation_of(reply, self.settings.mode)


def _prompts_hash() -> str:
    """Of the words and the solved neurons that prompts are made of."""
    folder = Path(__file__).parent.parent / "prompts"
    parts = [(folder / name).read_bytes() for name in ("explainer.json", "few_shot.json")]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
