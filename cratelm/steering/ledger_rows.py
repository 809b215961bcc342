"""The rows of a ledger as a reader wants them: the largest neurons with what explains them, then all other terms."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRow:
    """One line of a ledger."""

    name: str
    """`neuron 1/85`, a term's name, or how many neurons are taken together."""
    contribution: float
    """In logits."""
    neuron: int | None = None
    activation: float | None = None
    """In the model's own units."""
    explanation: str = ""


def ledger_rows(found: Mapping[str, Any], count: int, explanations: Mapping[int, str]) -> list[LedgerRow]:
    """The rows of `Ledger.as_dict()`: the most positive neurons, the most negative, the rest together, the terms.

    All rows together are the ledger's total.
    """
    neurons = sorted(found["neurons"], key=lambda row: -row["contribution"])
    positive = [row for row in neurons if row["contribution"] > 0][:count]
    negative = [row for row in neurons if row["contribution"] < 0][::-1][:count][::-1]
    rows = [
        LedgerRow(
            name=f"neuron {found['layer']}/{row['neuron']}", contribution=row["contribution"], neuron=row["neuron"],
            activation=row["activation"], explanation=explanations.get(row["neuron"], ""),
        )
        for row in (*positive, *negative)
    ]  # fmt: skip
    rest = len(neurons) - len(rows)
    terms = dict(found["terms"])
    left = terms.pop("neurons") - sum(row.contribution for row in rows)
    if rest:
        rows.append(LedgerRow(name=f"{rest} other neurons", contribution=left))
    return rows + [LedgerRow(name=name, contribution=value) for name, value in terms.items()]


def as_csv(found: Mapping[str, Any], explanations: Mapping[int, str]) -> str:
    """Every active neuron and every term, unrounded, strongest first, then the model's logit."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "neuron", "activation", "contribution", "explanation"])
    for row in found["neurons"]:
        said = explanations.get(row["neuron"], "")
        writer.writerow([
            f"{found['layer']}/{row['neuron']}", row["neuron"], row["activation"], row["contribution"], said
        ])  # fmt: skip
    terms: Sequence[tuple[str, float]] = [item for item in found["terms"].items() if item[0] != "neurons"]
    for name, value in (*terms, ("remainder", found["remainder"]), ("logit", found["logit"])):
        writer.writerow([name, "", "", value, ""])
    return out.getvalue()
