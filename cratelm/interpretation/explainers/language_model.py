"""The explainer by a language model: the excerpts of a neuron -> one sentence.

Prompts depend on the records and the settings alone. A refusal, an empty answer and a prompt that does not fit raise
`LLMError`, which counts as a failure of that neuron.
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
from cratelm.interpretation.prompts.compact_explainer import FILE as COMPACT
from cratelm.interpretation.prompts.compact_explainer import compact_prompt
from cratelm.interpretation.prompts.explainer import ExplainerPrompt, PromptTooLong, explainer_prompt, shown
from cratelm.interpretation.prompts.few_shot import FewShotRecord
from cratelm.interpretation.prompts.normalisation import OWN, Rounding
from cratelm.interpretation.protocols import Protocol, draw
from cratelm.interpretation.stages.concurrency import Tally
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.identities import ExplainerName, PromptForm

MAX_TOKENS: dict[Mode, int] = {"fixed": 100, "compat": 60}
"""Maximum tokens of an answer. The released value of 60 often cuts a sentence."""
PROMPT_FORMS: dict[Mode, PromptForm] = {"fixed": "table", "compat": "table"}
"""The default prompt of each mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainerSettings:
    """How explanations are sampled."""

    mode: Mode
    temperature: float
    """0 for greedy decoding."""
    seed: int
    """Seed of the first explanation of each neuron; sample N uses seed + N."""
    max_tokens: int
    rounding: Rounding
    """How activations are rounded to the integers of a prompt (`prompts/normalisation.py`)."""
    prompt: PromptForm = "table"
    """`table`: few-shot examples, and every token with its activation. `compact`: marked text, one turn."""

    def name(self, model: str) -> ExplainerName:
        """The name of a model's explanations in the store, with the rounding if it is not the mode's default."""
        rounding = None if self.rounding == OWN[self.mode] else self.rounding
        return ExplainerName(model=model, rounding=rounding, prompt=self.prompt)

    def sampling(self, sample: int) -> Sampling:
        """The sampling parameters of one explanation."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed + sample)

    def cache_settings(self, llm: LLM, sample: int) -> dict[str, Any]:
        """Every setting that explanations depend on, apart from records and omitted few-shot examples (`needs`)."""
        settings = asdict(self)
        if self.prompt == "table":
            del settings["prompt"]  # sets of earlier versions do not have it
        return {**settings, "sample": sample, "model": llm.identity, "prompts": _prompts_hash(self.prompt)}


def explainer_settings(
    mode: Mode, *, samples: int = 1, temperature: float | None = None, seed: int = 0, rounding: Rounding | None = None,
    max_tokens: int | None = None, prompt: PromptForm | None = None,
) -> ExplainerSettings:  # fmt: skip
    """The settings of a mode; the default temperature is 1 in `compat` mode and for several samples, otherwise 0."""
    if temperature is None:
        temperature = 1.0 if mode == "compat" or samples > 1 else 0.0
    if samples > 1 and temperature == 0:
        raise CrateError(
            "--temperature 0 gives the same explanation every time. Use --samples 1, or a temperature above 0"
        )
    return ExplainerSettings(
        mode=mode,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens or MAX_TOKENS[mode],
        rounding=rounding or OWN[mode],
        prompt=prompt or PROMPT_FORMS[mode],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LLMExplainer:
    """Explains neurons by asking a language model."""

    llm: LLM
    settings: ExplainerSettings
    strings: Sequence[str]
    """Text of each token id in prompts (`prompts.escaping.prompt_strings`)."""
    _needed: dict[tuple[Any, ...], int] = field(default_factory=dict, repr=False)

    async def explain(self, task: SetTask) -> Tally:
        """Explain the chosen neurons of a set. Raises `CrateError` if no prompt fits the model's context."""
        settings = self.set_settings(task)
        growing = task.begin("explain", task.explainable, settings)
        share = task.share if task.part != (1, 1) else set(growing.neurons.tolist())
        missing = sorted(share & set(growing.missing()))
        left_out = settings.get("left_out", 0)
        prompts = dict(self.prompts(task.records, task.protocol, missing, left_out=left_out))
        too_long = [prompt for prompt in prompts.values() if isinstance(prompt, PromptTooLong)]
        if too_long and len(too_long) == len(prompts):
            raise CrateError(str(too_long[0]))
        tally = await task.fill(growing, lambda neuron: self.ask(prompts[neuron], task.key.sample), missing)
        growing.finish()
        return tally

    async def ask(self, prompt: ExplainerPrompt | PromptTooLong, sample: int = 0) -> str:
        """Request one explanation. Raises `LLMError` if the answer is unusable."""
        if isinstance(prompt, PromptTooLong):
            raise prompt
        reply = await self.llm.chat(prompt.messages, self.settings.sampling(sample))
        return explanation_of(reply, self.settings.mode)

    def set_settings(self, task: SetTask) -> dict[str, Any]:
        """The settings of a set of explanations, including the number of omitted few-shot examples."""
        settings = self.settings.cache_settings(self.llm, task.key.sample)
        needed = self.needs(task.records, task.protocol, task.explainable.tolist())
        left_out = task.left_out("explain", needed, settings)
        return settings | ({"left_out": left_out} if left_out else {})

    def needs(self, records: LayerRecords, protocol: Protocol, neurons: Iterable[int]) -> int:
        """Count the few-shot excerpts to leave out for the longest prompt of these neurons to fit.

        All neurons of a set get the same few-shot excerpts; a neuron whose prompt never fits is ignored. In `compat`
        mode each prompt leaves out its own, as in the released code, and the count is 0.
        """
        if self.llm.context is None or self.settings.mode == "compat":
            return 0
        wanted = tuple(neurons)
        asked = records.layer, protocol.name, wanted
        if asked not in self._needed:
            prompts = (prompt for _, prompt in self.prompts(records, protocol, wanted))
            dropped = (prompt.dropped for prompt in prompts if isinstance(prompt, ExplainerPrompt))
            self._needed[asked] = max(dropped, default=0)
        return self._needed[asked]

    def prompts(
        self, records: LayerRecords, protocol: Protocol, neurons: Iterable[int], *, left_out: int = 0
    ) -> Iterator[tuple[int, ExplainerPrompt | PromptTooLong]]:
        """Build the prompt of each neuron without `left_out` few-shot excerpts, or the error that it does not fit."""
        excerpts = draw(records, protocol.explain, "explain")
        for neuron in neurons:
            try:
                records_shown = shown(tuple(excerpts.of(neuron)), self.strings, rounding=self.settings.rounding)
                yield neuron, self.prompt_of(records_shown, left_out)
            except PromptTooLong as error:
                yield neuron, error

    def prompt_of(self, records: Sequence[FewShotRecord], left_out: int = 0) -> ExplainerPrompt:
        """Build the prompt about a neuron with these excerpts. Raises `PromptTooLong`."""
        count, context, limit = self.llm.count, self.llm.context, self.settings.max_tokens
        if self.settings.prompt == "compact":
            return compact_prompt(records, count=count, context=context, max_tokens=limit)
        return explainer_prompt(
            records, count=count, context=context, max_tokens=limit, mode=self.settings.mode, left_out=left_out
        )


def _prompts_hash(prompt: PromptForm) -> str:
    """Hash the words and the few-shot neurons of the prompts."""
    folder = Path(__file__).parent.parent / "prompts"
    files = [COMPACT] if prompt == "compact" else [folder / "explainer.json", folder / "few_shot.json"]
    parts = [file.read_bytes() for file in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
