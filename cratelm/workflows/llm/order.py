"""What a command was asked to do with language models, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cratelm.activations.records import LayerRecords, Mode, read_records
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.language_model import ExplainerSettings, explainer_settings
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.prompts.normalisation import Rounding
from cratelm.interpretation.scorers.registry import SIMULATION, chosen_scorers
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.neuron_selection import Chosen, chosen
from cratelm.interpretation.store.schema import SetKey, Stage
from cratelm.workflows.llm.opening import explains, read_out_repairs
from cratelm.workflows.options.language_model import Explaining, Simulating, Spending
from cratelm.workflows.options.selection import Selection, chosen_layers, chosen_protocols

ROUNDINGS: dict[str, Rounding | None] = {"auto": None, "up": "ceil", "down": "floor"}
"""Option -> how activations are rounded; None for the mode's own way."""
CONTROLS = ("shuffled", "constant")
"""Controls by explanation: that of another neuron, or the same sentence for all."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a command was asked to do."""

    selection: Selection
    stages: tuple[Stage, ...]
    """Of explain, simulate and score; the other scorers are asked where they are in `scorers`."""
    explaining: Explaining
    spending: Spending
    simulating: Simulating | None = None
    controls: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    encoder: str = ""

    @classmethod
    def of(cls, options: Any, *, stages: tuple[Stage, ...]) -> "Order":
        """From a command's options, refused where they ask for what is not there."""
        for control in getattr(options, "controls", ()):
            if control not in CONTROLS:
                raise CrateError(f"there is no control {control!r}. Use: {', '.join(CONTROLS)}")
        scorers = chosen_scorers(getattr(options, "scorer", (SIMULATION,)))
        if SIMULATION not in scorers:  # neither simulated nor scored like that
            stages = tuple(stage for stage in stages if stage == "explain")
        return cls(
            selection=options, stages=stages, explaining=options.explaining, spending=options.spending,
            simulating=getattr(options, "simulating", None), controls=tuple(getattr(options, "controls", ())),
            scorers=scorers, encoder=getattr(options, "encoder", ""),
        )  # fmt: skip

    def check(self, runs: Sequence[Path]) -> None:
        """Refuse, before anything is opened or asked, layers, protocols and neurons that there are not.

        And simulations of what lookup explained where it has not: a part does not make that up for others.
        """
        read_out_repairs(self.simulating or Simulating(), self.selection.mode)
        self.settings  # noqa: B018 (refused here)
        names = chosen_protocols(self.selection)
        by_lookup = "simulate" in self.stages and not explains(self.explaining)
        needed = by_lookup and not self.explains_by_lookup and not self.spending.dry_run
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
        """Whether explanations are to be made by lookup here; parts, side by side, take those of the run."""
        return "explain" in self.stages and not explains(self.explaining) and not self.spending.part

    @cached_property
    def chosen(self) -> Chosen:
        """The rule that chooses neurons."""
        return chosen(self.explaining.neurons, seed=self.explaining.neuron_seed)

    @cached_property
    def settings(self) -> ExplainerSettings:
        """How explanations are drawn."""
        asked = self.explaining
        return explainer_settings(
            self.selection.mode, samples=asked.samples, temperature=asked.temperature, seed=asked.seed,
            rounding=ROUNDINGS[asked.rounding],
        )  # fmt: skip

    def named(self, model: str) -> str:
        """What a model's explanations are called in the store: with the rounding, where that is not the mode's."""
        return str(self.settings.name(model)) if model not in ("", EXPLAINER) else model


@lru_cache(maxsize=1)
def _read(run: Path, layer: int, mode: Mode, tap: str, _collection: str) -> LayerRecords:
    return read_records(run, layer, mode=mode, tap=tap)


def records_for(run: Path, key: SetKey) -> LayerRecords:
    """The records of a set's layer; the last ones are kept for the next set."""
    return _read(run, key.layer, key.mode, key.tap, identity(run, key.mode))
