"""The explainer by a language model: the excerpts of a neuron -> one sentence.

Prompts depend on the records and the settings alone. A refusal, an empty answer and a prompt that does not fit raise
`LLMError`, which counts as a failure of that neuron.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cratelm.activations.direction_files import LayerDirections
from cratelm.activations.records import LayerRecords, Mode
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.answers import explanation_of
from cratelm.interpretation.explainers.best_of import BestOf, check_selection
from cratelm.interpretation.explainers.hard_negatives import hard_negatives
from cratelm.interpretation.llm import LLM, LLMError, Sampling
from cratelm.interpretation.prompts.compact_explainer import FILE as COMPACT
from cratelm.interpretation.prompts.compact_explainer import compact_prompt
from cratelm.interpretation.prompts.escaping import running_text
from cratelm.interpretation.prompts.explainer import ExplainerPrompt, PromptTooLong, explainer_prompt, shown
from cratelm.interpretation.prompts.few_shot import FewShotRecord
from cratelm.interpretation.prompts.hard_negatives import NEGATIVES_FILE, negatives_block, with_negatives
from cratelm.interpretation.prompts.normalisation import OWN, Rounding
from cratelm.interpretation.prompts.output_explainer import OUTPUTS_FILE, output_explanation, output_prompt
from cratelm.interpretation.protocols import Protocol, draw
from cratelm.interpretation.scorers.promoted import LIST, directions_identity
from cratelm.interpretation.stages.concurrency import Tally
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.identities import ExplainerName, ExplanationSource, PromptForm

MAX_TOKENS: dict[Mode, int] = {"fixed": 100, "compat": 60}
"""Maximum tokens of an answer. The released value of 60 often cuts a sentence."""
PROMPT_FORMS: dict[Mode, PromptForm] = {"fixed": "table", "compat": "table"}
"""The default prompt of each mode."""
LATER = {"prompt": "table", "source": "excerpts", "hard_negatives": False, "best_of": 1, "best_by": ""}
"""Settings that sets of earlier versions do not have, with the value that they had."""


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
    source: ExplanationSource = "excerpts"
    """What the prompts show: text on which the neuron fires, or the tokens that it promotes."""
    hard_negatives: bool = False
    """Whether prompts also show text on which the neuron is silent (`hard_negatives.py`)."""
    best_of: int = 1
    """Explanations per neuron, of which the best is kept (`best_of.py`)."""
    best_by: str = ""
    """The scorer that chooses; empty for a single explanation."""

    def name(self, model: str) -> ExplainerName:
        """The name of a model's explanations in the store, with what is not the mode's default."""
        rounding = None if self.rounding == OWN[self.mode] else self.rounding
        return ExplainerName(
            model=model, rounding=rounding, prompt=self.prompt, source=self.source,
            hard_negatives=self.hard_negatives, best_of=self.best_of, best_by=self.best_by,
        )  # fmt: skip

    def sampling(self, sample: int) -> Sampling:
        """The sampling parameters of one explanation."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed + sample)

    def cache_settings(self, llm: LLM, sample: int) -> dict[str, Any]:
        """Every setting that explanations depend on, apart from records and omitted few-shot examples (`needs`)."""
        settings = {name: value for name, value in asdict(self).items() if LATER.get(name, ...) != value}
        if self.hard_negatives:
            settings["negatives"] = hashlib.sha256(NEGATIVES_FILE.read_bytes()).hexdigest()[:16]
        prompts = _prompts_hash(self.prompt, self.source)
        return {**settings, "sample": sample, "model": llm.identity, "prompts": prompts}


def explainer_settings(
    mode: Mode, *, samples: int = 1, temperature: float | None = None, seed: int = 0, rounding: Rounding | None = None,
    max_tokens: int | None = None, prompt: PromptForm | None = None, source: ExplanationSource = "excerpts",
    hard_negatives: bool = False, best_of: int = 1, best_by: str = "detection",
) -> ExplainerSettings:  # fmt: skip
    """The settings of a mode; the default temperature is 1 in `compat` mode and for several samples, otherwise 0."""
    check_selection(best_of, best_by)
    several = samples > 1 or best_of > 1
    if temperature is None:
        temperature = 1.0 if mode == "compat" or several else 0.0
    if several and temperature == 0:
        raise CrateError(
            "--temperature 0 gives the same explanation every time. Use --samples 1 and --best-of 1, or a temperature "
            "above 0"
        )
    if source == "outputs" and hard_negatives:
        raise CrateError("--hard-negatives are texts, and --explain-from outputs shows no text. Use one of the two")
    if mode == "compat" and (hard_negatives or best_of > 1):
        option = "--hard-negatives" if hard_negatives else "--best-of"
        raise CrateError(f"{option} needs --mode fixed, whose records keep documents for explaining apart")
    return ExplainerSettings(
        mode=mode,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens or MAX_TOKENS[mode],
        rounding=rounding or OWN[mode],
        prompt=prompt or PROMPT_FORMS[mode],
        source=source,
        hard_negatives=hard_negatives,
        best_of=best_of,
        best_by=best_by if best_of > 1 else "",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LLMExplainer:
    """Explains neurons by asking a language model."""

    llm: LLM
    settings: ExplainerSettings
    strings: Sequence[str]
    """Text of each token id in prompts (`prompts.escaping.prompt_strings`)."""
    directions: Callable[[int], LayerDirections] | None = None
    """Layer -> its directions, for explanations from `outputs`."""
    best: BestOf | None = None
    """Chooses among several explanations of a neuron, if `settings.best_of` is above 1."""
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
        answer = self.answers(task)
        tally = await task.fill(growing, lambda neuron: answer(neuron, prompts[neuron]), missing)
        growing.finish()
        return tally

    def answers(self, task: SetTask) -> Callable[[int, ExplainerPrompt | PromptTooLong], Awaitable[str]]:
        """The function that requests the explanation of a neuron: one, or several and the best of them."""
        best, count = self.best, self.settings.best_of
        if best is None or count == 1:
            return lambda _, prompt: self.ask(prompt, task.key.sample)
        shown_excerpts = draw(task.records, task.protocol.explain, "explain")

        async def explanation(neuron: int, prompt: ExplainerPrompt | PromptTooLong) -> str:
            asked = (self.ask(prompt, task.key.sample * count + number) for number in range(count))
            replies = await asyncio.gather(*asked, return_exceptions=True)
            errors = [reply for reply in replies if isinstance(reply, BaseException)]
            for error in errors:
                if len(errors) == count or not isinstance(error, LLMError):
                    raise error
            seen = {excerpt.document for excerpt in shown_excerpts.of(neuron)}
            if self.settings.hard_negatives:
                seen |= {window.document for window in hard_negatives(task.records, neuron)}
            candidates = [reply for reply in replies if isinstance(reply, str)]
            return await best.best(candidates, task.records[neuron], seen)

        return explanation

    def with_llm(self, llm: LLM) -> "LLMExplainer":
        """The same explainer with another model, which chooses too; to count calls."""
        best = self.best and replace(self.best, context=replace(self.best.context, llm=llm))
        return replace(self, llm=llm, best=best)

    async def ask(self, prompt: ExplainerPrompt | PromptTooLong, sample: int = 0) -> str:
        """Request one explanation. Raises `LLMError` if the answer is unusable."""
        if isinstance(prompt, PromptTooLong):
            raise prompt
        reply = await self.llm.chat(prompt.messages, self.settings.sampling(sample))
        text = explanation_of(reply, self.settings.mode)
        return output_explanation(text) if self.settings.source == "outputs" else text

    def set_settings(self, task: SetTask) -> dict[str, Any]:
        """The settings of a set of explanations, including the number of omitted few-shot examples."""
        settings = self.settings.cache_settings(self.llm, task.key.sample)
        if self.settings.source == "outputs":
            settings["directions"] = directions_identity(task.store.run, task.key.tap)
        if self.best is not None:
            settings["chosen"] = self.best.cache_settings()
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
        if self.settings.source == "outputs":
            yield from self._output_prompts(records.layer, neurons)
            return
        excerpts = draw(records, protocol.explain, "explain")
        for neuron in neurons:
            try:
                records_shown = shown(tuple(excerpts.of(neuron)), self.strings, rounding=self.settings.rounding)
                yield neuron, self.prompt_of(records_shown, left_out, self._negatives(records, neuron))
            except PromptTooLong as error:
                yield neuron, error

    def prompt_of(self, records: Sequence[FewShotRecord], left_out: int = 0, negatives: str = "") -> ExplainerPrompt:
        """Build the prompt about a neuron with these excerpts. Raises `PromptTooLong`.

        `negatives` is the part with text on which the neuron is silent.
        """
        count, context = self.llm.count, self.llm.context
        limit = self.settings.max_tokens + (count(negatives) if negatives else 0)
        if self.settings.prompt == "compact":
            prompt = compact_prompt(records, count=count, context=context, max_tokens=limit)
        else:
            prompt = explainer_prompt(
                records, count=count, context=context, max_tokens=limit, mode=self.settings.mode, left_out=left_out
            )
        return with_negatives(prompt, negatives, count)

    def _output_prompts(
        self, layer: int, neurons: Iterable[int]
    ) -> Iterator[tuple[int, ExplainerPrompt | PromptTooLong]]:
        assert self.directions is not None, "explanations from outputs need directions"
        directions = self.directions(layer)
        for neuron in neurons:
            tokens = [self.strings[token] for token, effect in directions.ranked(LIST, neuron) if effect > 0]
            try:
                yield neuron, output_prompt(
                    tokens, count=self.llm.count, context=self.llm.context, max_tokens=self.settings.max_tokens
                )  # fmt: skip
            except PromptTooLong as error:
                yield neuron, error

    def _negatives(self, records: LayerRecords, neuron: int) -> str:
        """The part of a prompt with text on which the neuron is silent; empty without `settings.hard_negatives`."""
        windows = hard_negatives(records, neuron) if self.settings.hard_negatives else []
        return negatives_block([running_text([self.strings[t] for t in w.tokens.tolist()]) for w in windows])


def _prompts_hash(prompt: PromptForm, source: ExplanationSource) -> str:
    """Hash the words and the few-shot neurons of the prompts."""
    folder = Path(__file__).parent.parent / "prompts"
    files = [COMPACT] if prompt == "compact" else [folder / "explainer.json", folder / "few_shot.json"]
    parts = [file.read_bytes() for file in ([OUTPUTS_FILE] if source == "outputs" else files)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
