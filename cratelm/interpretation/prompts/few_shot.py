"""The few-shot examples of prompts: invented neurons with activations and explanations (`few_shot.json`).

The explainer's prompt shows their activations and then their explanations, the simulators' prompts the reverse.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cratelm.rundir import read_json

FILE = Path(__file__).with_name("few_shot.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotRecord:
    """One excerpt of a few-shot neuron."""

    tokens: tuple[str, ...]
    """The text of each token."""
    activations: tuple[int, ...]
    """The neuron's activation on each token, normalised to 0-10."""
    unknown: int
    """Number of leading activations that the all-at-once prompt shows as `unknown`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotNeuron:
    """A neuron with a good explanation."""

    explanation: str
    """What it fires on, as it continues `this neuron fires on`."""
    records: tuple[FewShotRecord, ...]


@cache
def solved_tables() -> str:
    """Tokens and activations of all few-shot neurons, in ASCII: a text that resembles a prompt, to count its tokens."""
    records = (record for neuron in few_shot_neurons() for record in neuron.records)
    rows = (
        f"{token}\t{value}"
        for record in records
        for token, value in zip(record.tokens, record.activations, strict=True)
    )
    return "\n".join(rows).encode("ascii", "ignore").decode()


@cache
def few_shot_neurons() -> tuple[FewShotNeuron, ...]:
    """The few-shot neurons, in the order of the prompts."""
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
