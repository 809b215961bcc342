"""The request of an interpreting command, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cratelm.activations.records import LayerRecords, Mode, read_records
from cratelm.interpretation.explainers.language_model import ExplainerSettings, explainer_settings
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.prompts.normalisation import Rounding
from cratelm.interpretation.scorers.registry import SIMULATION, chosen_scorers
from cratelm.interpretation.simulators.controls import CONTROLS, LOOKUP_CONTROLS, check_controls
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.identities import PromptForm
from cratelm.interpretation.store.neuron_selection import Chosen, chosen
from cratelm.interpretation.store.schema import SetKey, Stage
from cratelm.workflows.llm.opening import explains
from cratelm.workflows.options.language_model import Explaining, Simulating, Spending, asks
from cratelm.workflows.options.selection import Selection, chosen_layers, chosen_protocols

ROUNDINGS: dict[str, Rounding | None] = {"auto": None, "up": "ceil", "down": "floor"}
"""Option -> how activations are rounded; None for the mode's default."""


@dataclass(frozen=True, kw_only=True)
class InterpretRequest:
    """The request of an interpreting command."""

    selection: Selection
    stages: tuple[Stage, ...]
    """Of explain, simulate and score; `scorers` has the other scorers."""
    explaining: Explaining
    spending: Spending
    simulating: Simulating | None = None
    controls: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    encoder: str = ""

    @classmethod
    def of(cls, options: Any, *, stages: tuple[Stage, ...]) -> "InterpretRequest":
        """Read a command's options. Raises `CrateError` for unknown controls and scorers."""
        simulating = getattr(options, "simulating", None)
        by_lookup = not asks(options.explaining, simulating)
        controls = check_controls(getattr(options, "controls", ()), LOOKUP_CONTROLS if by_lookup else CONTROLS)
        scorers = chosen_scorers(getattr(options, "scorer", (SIMULATION,)))
        if SIMULATION not in scorers and not by_lookup:  # the other scorers need explanations only
            stages = tuple(stage for stage in stages if stage == "explain")
        return cls(
            selection=options, stages=stages, explaining=options.explaining, spending=options.spending,
            simulating=simulating, controls=controls,
            scorers=scorers, encoder=getattr(options, "encoder", ""),
        )  # fmt: skip

    @classmethod
    def lookup(cls, selection: Selection, *, controls: tuple[str, ...] = ()) -> "InterpretRequest":
        """All stages by lookup."""
        return cls(
            selection=selection, stages=("explain", "simulate", "score"), explaining=Explaining(),
            spending=Spending(), controls=controls, scorers=(SIMULATION,),
        )  # fmt: skip

    @property
    def by_lookup(self) -> bool:
        """Whether neither explainer nor simulator is a language model."""
        return not asks(self.explaining, self.simulating)

    def check(self, runs: Sequence[Path]) -> None:
        """Raise `CrateError`, before anything is opened, for layers, protocols and neurons that do not exist.

        Also for simulations of explanations by lookup that are missing: a part does not make them.
        """
        self.settings  # noqa: B018 (refused here)
        names = chosen_protocols(self.selection)
        simulated = "simulate" in self.stages and not self.by_lookup and not explains(self.explaining)
        needed = simulated and not self.explains_by_lookup and not self.spending.dry_run
        for run in runs:
            for layer in chosen_layers(run, self.selection):
                key = SetKey(mode=self.selection.mode, tap=self.selection.tap, layer=layer, protocol=names[0])
                if self.chosen.spans:
                    self.chosen.of(records_for(run, key).num_neurons, layer=layer)
                if needed:
                    for name in names:
                        Store.open(run).check(replace(key, protocol=name), "explain")

    @property
    def explains_by_lookup(self) -> bool:
        """Whether to explain by lookup; parts use the explanations of the run."""
        return "explain" in self.stages and not explains(self.explaining) and not self.spending.part

    @cached_property
    def chosen(self) -> Chosen:
        """The rule that selects neurons."""
        return chosen(self.explaining.neurons, seed=self.explaining.neuron_seed)

    @cached_property
    def settings(self) -> ExplainerSettings:
        """How explanations are sampled."""
        asked = self.explaining
        return explainer_settings(
            self.selection.mode, samples=asked.samples, temperature=asked.temperature, seed=asked.seed,
            rounding=ROUNDINGS[asked.rounding], max_tokens=asked.max_answer_tokens,
            prompt=None if asked.explainer_prompt == "auto" else asked.explainer_prompt,
            source=asked.explain_from, hard_negatives=asked.hard_negatives, best_of=asked.best_of,
            best_by=asked.best_by,
        )  # fmt: skip

    def with_prompt(self, form: PromptForm) -> "InterpretRequest":
        """The request with this prompt of the explainer."""
        return replace(self, explaining=replace(self.explaining, explainer_prompt=form))

    def subject(self, run: Path) -> str:
        """For the plan: how many neurons of which layers of a run."""
        layers = chosen_layers(run, self.selection)
        key = SetKey(mode=self.selection.mode, tap=self.selection.tap, layer=layers[0], protocol="")
        total = records_for(run, key).num_neurons
        asked = len(self.chosen.of(total, layer=layers[0]))
        some = f"all {total:,} neurons" if asked == total else f"{asked:,} of {total:,} neurons"
        return f"{some} of {f'each of {len(layers)} layers' if len(layers) > 1 else f'layer {layers[0]}'}"

    def named(self, model: str) -> str:
        """The stored name of a model's explanations, with the settings that are not the mode's default."""
        return str(self.settings.name(model)) if model not in ("", EXPLAINER) else model


@lru_cache(maxsize=1)
def _read(run: Path, layer: int, mode: Mode, tap: str, _collection: str) -> LayerRecords:
    return read_records(run, layer, mode=mode, tap=tap)


def records_for(run: Path, key: SetKey) -> LayerRecords:
    """Read the records of a set's layer; those of the last layer are cached."""
    return _read(run, key.layer, key.mode, key.tap, identity(run, key.mode))
