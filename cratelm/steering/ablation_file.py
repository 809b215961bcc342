"""`ablation.json` and `ablation.jsonl`: changes of loss, one row per ablation. Does not import torch."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cratelm.errors import CrateError
from cratelm.rundir import append_jsonl, differing_fields, read_json, read_jsonl, write_json

AblationKind = Literal["zero", "mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """Change of loss when one neuron, or several together, are ablated."""

    neurons: tuple[str, ...]
    """`LAYER/NEURON` of all neurons ablated together."""
    kind: AblationKind
    """Set to zero, or to the mean over the text."""
    nats: float
    """Change of loss in nats per token; positive if the model is worse without them."""
    standard_error: float | None
    """Of `nats`, over documents; None for one document."""
    density: float | None
    """Share of tokens with an activation above 0; None for several neurons."""

    @property
    def key(self) -> tuple[tuple[str, ...], str]:
        """What identifies the measurement: the neurons and the kind of ablation."""
        return self.neurons, self.kind


@dataclass(frozen=True, slots=True)
class AblationFile:
    """The two files of a folder: settings, and rows that are appended one at a time."""

    folder: Path

    @property
    def head(self) -> Path:
        """Path of the file with the settings and the loss of the intact model."""
        return self.folder / "ablation.json"

    @property
    def body(self) -> Path:
        """Path of the file with the rows."""
        return self.folder / "ablation.jsonl"

    def open(self, settings: Mapping[str, Any], more: Mapping[str, Any]) -> set[tuple[tuple[str, ...], str]]:
        """Create the files, or resume them if the settings match; return the keys of the existing rows."""
        if self.head.exists():
            existing = read_json(self.head, made_by="cratelm ablate RUN --data DIR")
            if different := differing_fields({key: existing.get(key) for key in settings}, settings):
                raise CrateError(
                    f"{self.head} must have the same model and text to resume, got other values ({different}). Use "
                    f"another --out, or remove it and {self.body.name}"
                )
        else:
            self.body.unlink(missing_ok=True)
            write_json(self.head, {**settings, **more})
        return {row.key for row in self.rows()}

    def append(self, row: AblationRow) -> None:
        """Append a row."""
        append_jsonl(self.body, asdict(row))

    def rows(self) -> Iterator[AblationRow]:
        """All rows, in the order of measurement."""
        for row in read_jsonl(self.body):
            fields = {name: row.get(name) for name in AblationRow.__dataclass_fields__}
            yield AblationRow(**fields | {"neurons": tuple(row["neurons"])})
