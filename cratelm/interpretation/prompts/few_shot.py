"""Neurons that prompts show solved before the one that is asked about; `few_shot.json` holds them as data.

They are of our own invention. The same three begin the explainer's prompt, which shows their activations and then
their explanations, and the simulators' prompts, which show their explanations and then their activations.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cratelm.rundir import read_json

FILE = Path(__file__).with_name("few_shot.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotRecord:
    """One excerpt of a solved neuron."""

    tokens: tuple[str, ...]
    """The text of each token."""
    activations: tuple[int, ...]
    """What the neuron did on each, normalised to 0-10."""
    unknown: int
    """How many activations at the beginning an all-at-once simulator is shown as unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotNeuron:
    """A neuron with a good explanation."""

    explanation: str
    """What it fires on, as it continues `this neuron fires on`."""
    records: tuple[FewShotRecord, ...]


@cache
def solved_tables() -> str:
    """The tokens of all solved neurons with their activations, in ASCII: a text like those that prompts are made of."""
    records = (record for neuron in few_shot_neurons() for record in neuron.records)
    rows = (f"{token}\t{value}" for one in records for token, value in zip(one.tokens, one.activations, strict=True))
    return "\n".join(rows).encode("ascii", "ignore").decode()


@cache
def few_shot_neurons() -> tuple[FewShotNeuron, ...]:
    """The solved neurons, in the order in which prompts show them."""
    return tuple(
        FewShotNeuron(
            explanation=neuron["explanation"],
            records=tuple(
                FewShotRecord(
                    tokens=tuple(record["tokens"]), activations=tuple(record["activations"]), unknown=record["unknown"]
                )
                for record in neuron["records"]
            ),
        )
        for neuron in read_json(FILE, made_by="pip install --force-reinstall cratelm")["neurons"]
    )
