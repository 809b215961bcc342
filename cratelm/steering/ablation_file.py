"""`ablation.json` and `ablation.jsonl`: what taking neurons out cost, row by row as it is measured. No torch here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cratelm.errors import CrateError
from cratelm.rundir import append_jsonl, differing_fields, read_json, read_jsonl, write_json

Kind = Literal["zero", "mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """What taking one neuron, or several together, out of a model does to its loss."""

    neurons: tuple[str, ...]
    """`LAYER/NEURON` of all that were taken out together."""
    kind: Kind
    """Set to zero, or to the mean over the text."""
    nats: float
    """Change of loss in nats per token; above 0 the model is worse without."""
    standard_error: float | None
    """Of `nats`, over documents; None for a single document."""
    density: float | None
    """Share of the text's tokens on which it is above 0; None for several neurons."""

    @property
    def key(self) -> tuple[tuple[str, ...], str]:
        """What a row is of."""
        return self.neurons, self.kind


@dataclass(frozen=True, slots=True)
class AblationFile:
    """The two files in a folder: the first says of which model and text, the second grows by a row at a time."""

    folder: Path

    @property
    def head(self) -> Path:
        """Settings and the loss without any change."""
        return self.folder / "ablation.json"

    @property
    def body(self) -> Path:
        """The rows."""
        return self.folder / "ablation.jsonl"

    def open(self, settings: Mapping[str, Any], more: Mapping[str, Any]) -> set[tuple[tuple[str, ...], str]]:
        """Begin, or go on with what is there if it is of the same model and text; gives the rows that are there."""
        if self.head.exists():
            found = read_json(self.head, made_by="cratelm ablate RUN --data DIR")
            if different := differing_fields({key: found.get(key) for key in settings}, settings):
                raise CrateError(
                    f"{self.head} is of another model or text ({different}). Give another --out, or remove it and "
                    f"{self.body.name}"
                )
        else:
            self.body.unlink(missing_ok=True)
            write_json(self.head, {**settings, **more})
        return {row.key for row in self.rows()}

    def append(self, row: AblationRow) -> None:
        """Add a row that is measured."""
        append_jsonl(self.body, asdict(row))

    def rows(self) -> Iterator[AblationRow]:
        """The rows there are, in the order in which they were measured."""
        for one in read_jsonl(self.body):
            known = {name: one.get(name) for name in AblationRow.__dataclass_fields__}
            yield AblationRow(**known | {"neurons": tuple(one["neurons"])})


def read_ablation(folder: Path) -> tuple[dict[str, Any], list[AblationRow]]:
    """What `cratelm ablate` wrote in a run: settings and plain loss, and the rows."""
    file = AblationFile(folder)
    return read_json(file.head, made_by=f"cratelm ablate {folder} --data DIR"), list(file.rows())


def strongest_first(rows: Sequence[AblationRow]) -> list[AblationRow]:
    """From what costs most to what the model is better without."""
    return sorted(rows, key=lambda row: -row.nats)
