"""The names in a `SetKey` as typed records: who explained, who simulated, who judged.

    explainer    lookup            MODEL[+compact][+rounded-up][+outputs][+hard-negatives][+best-of-K-by-SCORER]
    simulator    (empty: lookup)   METHOD[-0-TOP][+REPAIR...][+CONTRAST][+CALIBRATION]:MODEL    judge MODEL

`str` of a record is the stored name, and `parse_explainer` and `parse_simulator` are the only code that takes a stored
name apart; `str(parse(name)) == name` for every name.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from cratelm.interpretation.prompts.normalisation import Rounding

SimulationMethod = Literal["all-at-once", "next-token", "token-by-token", "structured"]
CalibrationMethod = Literal["linear", "percentile"]
ContrastMethod = Literal["minus-neutral"]
PromptForm = Literal["table", "compact"]
ExplanationSource = Literal["excerpts", "outputs"]
SUFFIXES: dict[Rounding, str] = {"ceil": "+rounded-up", "floor": "+rounded-down"}
"""Appended to an explainer's name when its prompts round activations differently from the mode's default."""
OUTPUTS, NEGATIVES = "+outputs", "+hard-negatives"
_BEST = re.compile(r"\+best-of-([2-9]|[1-9]\d+)-by-([a-z]+(?:-[a-z]+)*)$")
_JUDGE = "judge "
_SIMULATOR = re.compile(rf"({'|'.join(get_args(SimulationMethod))})(?:-0-([1-9]\d*))?((?:\+[^:+]+)*):(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainerName:
    """Which model explained, or `lookup`, and how."""

    model: str
    """Name of a language model, or `lookup`."""
    rounding: Rounding | None = None
    """How prompts round activations, if not by the mode's default."""
    prompt: PromptForm = "table"
    """The form of the prompt."""
    source: ExplanationSource = "excerpts"
    """What prompts show: text on which the neuron fires, or the tokens that it promotes."""
    hard_negatives: bool = False
    """Whether prompts show text on which the neuron is silent (`explainers/hard_negatives.py`)."""
    best_of: int = 1
    """Explanations that the stored one was chosen from (`explainers/best_of.py`)."""
    best_by: str = ""
    """The scorer that chose it; empty for a single explanation."""

    def __str__(self) -> str:
        rounded = SUFFIXES[self.rounding] if self.rounding else ""
        best = f"+best-of-{self.best_of}-by-{self.best_by}" if self.best_of > 1 else ""
        outputs = OUTPUTS if self.source == "outputs" else ""
        form = "" if self.prompt == "table" else f"+{self.prompt}"
        return self.model + form + rounded + outputs + (NEGATIVES if self.hard_negatives else "") + best


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatorName:
    """Which language model simulated, and how."""

    method: str
    """One of `SimulationMethod`; the whole name if it has another form."""
    model: str | None = None
    """Name of the language model; None if the name has another form."""
    top: int = 10
    """Largest activation on the scale of the prompts."""
    repairs: tuple[str, ...] = ()
    """Repairs of the `compat` read-out in sets of an earlier version: `spaced-numbers` and the like."""
    contrast: str | None = None
    """What was subtracted from the simulated activations (`simulators/contrastive.py`)."""
    calibration: str | None = None
    """How simulated activations were mapped to the neuron's own units."""

    def __str__(self) -> str:
        scale = "" if self.top == 10 else f"-0-{self.top}"
        additions = (*self.repairs, *(name for name in (self.contrast, self.calibration) if name))
        return "+".join((self.method + scale, *additions)) + ("" if self.model is None else f":{self.model}")

    @property
    def is_plain(self) -> bool:
        """Whether it has neither repairs nor a calibration."""
        return not (self.repairs or self.calibration)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeName:
    """Which model answered the questions of a scorer."""

    model: str

    def __str__(self) -> str:
        return _JUDGE + self.model


def parse_explainer(name: str) -> ExplainerName:
    """Parse the name of an explainer."""
    best = _BEST.search(name)
    rest = name[: best.start()] if best else name
    negatives, rest = rest.endswith(NEGATIVES), rest.removesuffix(NEGATIVES)
    outputs, rest = rest.endswith(OUTPUTS), rest.removesuffix(OUTPUTS)
    rounding = next((rounding for rounding, suffix in SUFFIXES.items() if rest.endswith(suffix)), None)
    rest = rest.removesuffix(SUFFIXES[rounding]) if rounding else rest
    return ExplainerName(
        model=rest.removesuffix("+compact"), prompt="compact" if rest.endswith("+compact") else "table",
        rounding=rounding, source="outputs" if outputs else "excerpts", hard_negatives=negatives,
        best_of=int(best[1]) if best else 1, best_by=best[2] if best else "",
    )  # fmt: skip


def parse_simulator(name: str) -> SimulatorName | JudgeName | None:
    """Parse the name of a simulator or judge; None for simulation by lookup, whose name is empty."""
    if not name:
        return None
    if name.startswith(_JUDGE):
        return JudgeName(model=name.removeprefix(_JUDGE))
    match = _SIMULATOR.fullmatch(name)
    if match is None or match[2] == "10":
        return SimulatorName(method=name)
    method, top, additions, model = match.groups()
    names = additions.split("+")[1:]
    calibration = names.pop() if names and names[-1] in get_args(CalibrationMethod) else None
    contrast = names.pop() if names and names[-1] in get_args(ContrastMethod) else None
    return SimulatorName(
        method=method, model=model, top=int(top or 10), repairs=tuple(names), contrast=contrast,
        calibration=calibration,
    )  # fmt: skip
