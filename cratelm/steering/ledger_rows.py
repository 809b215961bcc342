"""The rows of a ledger as displayed: the largest neurons with their explanations, then all other terms."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRow:
    """One line of a ledger."""

    name: str
    """`neuron 1/85`, the name of a term, or `N other neurons`."""
    contribution: float
    """In logits."""
    neuron: int | None = None
    activation: float | None = None
    """In activation units."""
    explanation: str = ""


def ledger_rows(ledger: Mapping[str, Any], count: int, explanations: Mapping[int, str]) -> list[LedgerRow]:
    """The rows of `Ledger.as_dict()`: the most positive neurons, the most negative, the rest in one row, the terms.

    The rows sum to the ledger's total.
    """
    neurons = sorted(ledger["neurons"], key=lambda row: -row["contribution"])
    positive = [row for row in neurons if row["contribution"] > 0][:count]
    negative = [row for row in neurons if row["contribution"] < 0][::-1][:count][::-1]
    rows = [
        LedgerRow(
            name=f"neuron {ledger['layer']}/{row['neuron']}", contribution=row["contribution"], neuron=row["neuron"],
            activation=row["activation"], explanation=explanations.get(row["neuron"], ""),
        )
        for row in (*positive, *negative)
    ]  # fmt: skip
    terms = dict(ledger["terms"])
    rest = terms.pop("neurons") - sum(row.contribution for row in rows)
    if others := len(neurons) - len(rows):
        rows.append(LedgerRow(name=f"{others} other neurons", contribution=rest))
    return rows + [LedgerRow(name=name, contribution=value) for name, value in terms.items()]


def ledger_csv(ledger: Mapping[str, Any], explanations: Mapping[int, str]) -> str:
    """Every active neuron, largest contribution first, then every term and the model's logit; unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "neuron", "activation", "contribution", "explanation"])
    for row in ledger["neurons"]:
        writer.writerow([
            f"{ledger['layer']}/{row['neuron']}", row["neuron"], row["activation"], row["contribution"],
            explanations.get(row["neuron"], ""),
        ])  # fmt: skip
    terms: Sequence[tuple[str, float]] = [item for item in ledger["terms"].items() if item[0] != "neurons"]
    for name, value in (*terms, ("remainder", ledger["remainder"]), ("logit", ledger["logit"])):
        writer.writerow([name, "", "", value, ""])
    return out.getvalue()
