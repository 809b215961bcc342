"""What a command was asked to do with language models, checked."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cratelm.commands.asking import Explaining, Simulating, Spending
from cratelm.commands.language_models import explains
from cratelm.commands.selection import Selection
from cratelm.errors import CrateError
from cratelm.interpretation.explainer import ExplainerSettings, explainer_settings
from cratelm.interpretation.sample import Chosen, chosen
from cratelm.interpretation.schema import Stage
from cratelm.interpretation.scorers import SIMULATION, chosen_scorers

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
            self.selection.mode, samples=asked.samples, temperature=asked.temperature, seed=asked.seed
        )
