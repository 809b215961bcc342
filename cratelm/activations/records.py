"""Records: the excerpts of text on which each neuron was observed, and the numbers that describe it.

The interface between measuring and interpreting: `collect` writes these files, and every later stage reads them with
numpy alone. `docs/formats.md` gives the layout. In short, under `RUN/records/<mode>/`:

    records.json                     what was collected: settings, counts, hashes, origin
    tokenizer.json                   how token ids become text
    windows.safetensors              the tokens that excerpts point into, and the split of each document
    <tap>/layer_NN.safetensors       per neuron: statistics, and excerpts as (position, length, activations)

An excerpt's position is the index of its first token in the split that was collected (`val.bin` by default).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from cratelm.activations.record_checks import WINDOW_NAMES, problem_of_layer, problem_of_windows
from cratelm.checksums import read_tensors
from cratelm.errors import CrateError
from cratelm.rundir import read_json

Mode = Literal["fixed", "compat"]
Kind = Literal["top", "random", "quantile"]

ABSENT = -1
"""Position of an excerpt that does not exist, and token id beyond the end of a short excerpt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronId:
    """A neuron of a run: tap, zero-based layer, and zero-based index in the code of that layer."""

    tap: str
    layer: int
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """One stretch of text with a neuron's activation on each of its tokens."""

    tokens: Integer[np.ndarray, " width"]
    """Token ids."""
    activations: Float[np.ndarray, " width"]
    """Raw activation of the neuron on each token, in the model's own units."""
    position: int
    """Index of the first token in the collected split."""
    document: int
    """Index of the document in the collected split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpts:
    """The same number of excerpts for many neurons, as arrays; absent excerpts and ends of short ones are padding."""

    tokens: Integer[np.ndarray, "neurons excerpts width"]
    """Token ids, `ABSENT` where padded."""
    activations: Float[np.ndarray, "neurons excerpts width"]
    """Raw activations, 0 where padded."""
    position: Int[np.ndarray, "neurons excerpts"]
    """Index of the first token in the collected split, `ABSENT` for an excerpt that does not exist."""
    document: Int[np.ndarray, "neurons excerpts"]
    """Index of the document in the collected split, `ABSENT` likewise."""

    @property
    def valid(self) -> Bool[np.ndarray, "neurons excerpts width"]:
        """True at tokens, False at padding."""
        return self.tokens != ABSENT

    @property
    def present(self) -> Bool[np.ndarray, "neurons excerpts"]:
        """True for excerpts that exist."""
        return self.position != ABSENT

    def of(self, row: int) -> Iterator[Excerpt]:
        """The excerpts of one row (one neuron), without padding."""
        for i in np.flatnonzero(self.present[row]):
            length = int((self.tokens[row, i] != ABSENT).sum())
            yield Excerpt(
                tokens=self.tokens[row, i, :length], activations=self.activations[row, i, :length],
                position=int(self.position[row, i]), document=int(self.document[row, i]),
            )  # fmt: skip

    def take(self, picks: Sequence[int]) -> "Excerpts":
        """Some of the excerpts of every neuron, by their index; an index beyond the last gives an absent excerpt."""
        short = max(picks, default=-1) + 1 - self.tokens.shape[1]
        source = self if short <= 0 else join([self, _absent(len(self.tokens), short, self.tokens.shape[2])])
        chosen = np.asarray(picks, dtype=np.int64)
        return source._map(lambda array: array[:, chosen])

    def rows(self, neurons: Integer[np.ndarray, " chosen"] | slice) -> "Excerpts":
        """The same excerpts for some of the neurons."""
        return self._map(lambda array: array[neurons])

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Excerpts":
        return Excerpts(**{name: change(getattr(self, name)) for name in self.__slots__})

    def crop(self, first: Int[np.ndarray, "neurons excerpts"], width: int) -> "Excerpts":
        """Keep `width` tokens from index `first` of each excerpt."""
        columns = first[..., None] + np.arange(width)
        inside = columns < self.tokens.shape[2]
        columns = np.minimum(columns, self.tokens.shape[2] - 1)
        tokens = np.where(inside, np.take_along_axis(self.tokens, columns, axis=2), ABSENT)
        activations = np.where(inside, np.take_along_axis(self.activations, columns, axis=2), 0)
        return Excerpts(
            tokens=tokens, activations=activations.astype(self.activations.dtype),
            position=np.where(self.present, self.position + first, ABSENT), document=self.document,
        )  # fmt: skip


def join(parts: Sequence[Excerpts]) -> Excerpts:
    """Put the excerpts of the same neurons after each other, padding to the longest width."""
    width = max(part.tokens.shape[2] for part in parts)

    def padded(array: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, 0), (0, width - array.shape[2])), constant_values=fill)

    return Excerpts(
        tokens=np.concatenate([padded(part.tokens, ABSENT) for part in parts], axis=1),
        activations=np.concatenate([padded(part.activations, 0) for part in parts], axis=1),
        position=np.concatenate([part.position for part in parts], axis=1),
        document=np.concatenate([part.document for part in parts], axis=1),
    )


def _absent(neurons: int, excerpts: int, width: int) -> Excerpts:
    nowhere = np.full((neurons, excerpts), ABSENT, dtype=np.int64)
    return Excerpts(
        tokens=np.full((neurons, excerpts, width), ABSENT, dtype=np.int64),
        activations=np.zeros((neurons, excerpts, width), dtype=np.float32), position=nowhere, document=nowhere,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The tokens that excerpts point into: spans of the collected split, and its documents."""

    tokens: Integer[np.ndarray, " kept"]
    """Token ids of all spans, one after the other."""
    span_position: Int[np.ndarray, " spans"]
    """Index in the collected split of each span's first token, ascending; spans do not overlap."""
    span_offset: Int[np.ndarray, " spans"]
    """Index in `tokens` of each span's first token."""
    document_position: Int[np.ndarray, " documents"]
    """Index in the collected split of each document's first token, ascending."""
    document_split: Int[np.ndarray, " documents"]
    """0 where a document is for explaining, 1 where it is for scoring (all 0 in `compat`)."""

    def look_up(
        self, position: Int[np.ndarray, "neurons excerpts"], length: Integer[np.ndarray, "neurons excerpts"], width: int
    ) -> Integer[np.ndarray, "neurons excerpts width"]:
        """Token ids of excerpts, `ABSENT` beyond their length."""
        span = np.maximum(np.searchsorted(self.span_position, position, side="right") - 1, 0)
        first = self.span_offset[span] + position - self.span_position[span]
        columns = np.arange(width)
        inside = columns < length[..., None]
        index = np.where(inside, first[..., None] + columns, 0)
        if index.size and not 0 <= index.min() <= index.max() < max(len(self.tokens), 1):
            raise CrateError("an excerpt lies outside windows.safetensors. Hint: remove the records and collect again")
        return np.where(inside, self.tokens[index].astype(np.int64), ABSENT)

    def document_of(self, position: Int[np.ndarray, "neurons excerpts"]) -> Int[np.ndarray, "neurons excerpts"]:
        """Index of the document that holds a position; `ABSENT` stays."""
        document = np.searchsorted(self.document_position, position, side="right") - 1
        return np.where(position == ABSENT, ABSENT, document)


@dataclass(frozen=True, kw_only=True)
class LayerRecords:
    """Everything that was recorded about the neurons of one layer."""

    tap: str
    layer: int
    mode: Mode
    statistics: Mapping[str, np.ndarray]
    """Per neuron: `density` (share of tokens with activation > 0), `mean`, `variance`, `skewness`, `kurtosis`
    (standardised, not excess), `maximum`, `minimum`; activations in the model's own units."""
    tables: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Per neuron, several numbers: `histogram` (64 bins, two an octave from 2^-16 on, of every fourth token),
    `similar_neuron` and `similar_cosine` (nearest by decoder direction), `cofiring_neuron` and `cofiring_jaccard`."""
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    """The file's tensors, named `<width>.<split>.<kind>.<position|length|activation>`."""
    windows: Windows = field(repr=False)

    @property
    def num_neurons(self) -> int:
        """Neurons of this layer."""
        return len(self.statistics["density"])

    @cached_property
    def sets(self) -> tuple[tuple[int, str, str], ...]:
        """The recorded sets of excerpts, as (width, split, kind)."""
        names = (name.rsplit(".", 1)[0].split(".") for name in self.arrays if name.endswith(".position"))
        return tuple(sorted((int(width), split, kind) for width, split, kind in names))

    def excerpts(self, width: int, split: str, kind: str) -> Excerpts:
        """All recorded excerpts of one set.

        `split` is `explain` or `score` (`fixed` mode) or `all` (`compat`). Top excerpts come strongest first. Random
        ones in random order. Quantile ones interval by interval, weakest interval first, the same number in each.
        """
        name = f"{width}.{split}.{kind}"
        if f"{name}.position" not in self.arrays:
            recorded = ", ".join("/".join(map(str, key)) for key in self.sets)
            raise CrateError(
                f"the {self.mode} records of layer {self.layer} hold no {width}-token {kind} excerpts for {split} "
                f"(found {recorded}). Run: cratelm collect RUN --data DIR"
            )
        position, length = self.arrays[f"{name}.position"], self.arrays[f"{name}.length"]
        activations = self.arrays[f"{name}.activation"]
        return Excerpts(
            tokens=self.windows.look_up(position, length, width), activations=activations.astype(np.float32),
            position=position, document=self.windows.document_of(position),
        )  # fmt: skip

    def rows(self, neurons: slice) -> "LayerRecords":
        """The records of consecutive neurons, without a copy; the indices of the result begin at 0."""
        return replace(
            self, statistics={name: values[neurons] for name, values in self.statistics.items()},
            tables={name: values[neurons] for name, values in self.tables.items()},
            arrays={name: values[neurons] for name, values in self.arrays.items()},
        )  # fmt: skip

    def __getitem__(self, index: int) -> "NeuronRecord":
        """One neuron's record."""
        if not 0 <= index < self.num_neurons:
            raise CrateError(f"layer {self.layer} has neurons 0 to {self.num_neurons - 1}, not {index}")
        single = self.rows(slice(index, index + 1))
        return NeuronRecord(
            neuron=NeuronId(tap=self.tap, layer=self.layer, index=index),
            statistics={name: float(values[0]) for name, values in single.statistics.items()},
            excerpts={key: tuple(single.excerpts(*key).of(0)) for key in self.sets},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronRecord:
    """One neuron: its statistics and its excerpts, by (width, split, kind)."""

    neuron: NeuronId
    statistics: Mapping[str, float]
    excerpts: Mapping[tuple[int, str, str], tuple[Excerpt, ...]] = field(repr=False)


def records_folder(run: Path, mode: Mode) -> Path:
    """The folder of a run's records of one mode."""
    return run / "records" / mode


def layer_file(run: Path, mode: Mode, tap: str, layer: int) -> Path:
    """The file of one layer's records."""
    return records_folder(run, mode) / tap / f"layer_{layer:02d}.safetensors"


def recorded_layers(run: Path, *, mode: Mode = "fixed", tap: str = "neurons") -> list[int]:
    """The layers a run has records of, ascending."""
    files = (records_folder(run, mode) / tap).glob("layer_*.safetensors")
    return sorted(int(file.stem.removeprefix("layer_")) for file in files if file.exists())


def recorded_taps(run: Path, *, mode: Mode = "fixed") -> list[str]:
    """The taps a run has records of, the model's own neurons first."""
    files = records_folder(run, mode).rglob("layer_*.safetensors")
    taps = {file.parent.relative_to(records_folder(run, mode)).as_posix() for file in files}
    return sorted(taps, key=lambda tap: (tap != "neurons", tap))


def records_tokenizer(run: Path, mode: Mode) -> Path:
    """Path of the tokenizer next to the records. Raises CrateError if it is missing."""
    path = records_folder(run, mode) / "tokenizer.json"
    if not path.exists():
        raise CrateError(
            f"{path} is missing. Copy {run / 'model' / 'tokenizer.json'} to it, or remove {path.parent} "
            f"and run: {collect_command(run, mode)}"
        )
    return path


def read_collection(run: Path, *, mode: Mode = "fixed") -> dict[str, Any]:
    """The contents of `records.json`: what was collected, and the settings."""
    return read_json(records_folder(run, mode) / "records.json", made_by=f"cratelm collect {run} --data DIR")


def read_records(run: str | Path, layer: int, *, mode: Mode = "fixed", tap: str = "neurons") -> LayerRecords:
    """Read the records of one layer of a run, with numpy alone."""
    run = Path(run)
    path = layer_file(run, mode, tap, layer)
    if not path.exists():
        layers = ", ".join(map(str, recorded_layers(run, mode=mode, tap=tap))) or "none"
        raise CrateError(
            f"no {mode} records of layer {layer} in {run} (found layers: {layers}). Run: {collect_command(run, mode)}"
        )
    arrays = read_tensors(path, hint=_collect_again(run, mode))
    if problem := problem_of_layer(arrays):
        raise CrateError(f"{path}: {problem}. {_collect_again(run, mode)}")
    per_neuron = {name: value for name, value in arrays.items() if "." not in name and value.ndim == 1}
    tables = {name: value for name, value in arrays.items() if "." not in name and value.ndim > 1}
    excerpts = {name: value for name, value in arrays.items() if "." in name}
    return LayerRecords(
        tap=tap, layer=layer, mode=mode, statistics=per_neuron, tables=tables, arrays=excerpts,
        windows=read_windows(run, mode),
    )  # fmt: skip


def read_windows(run: Path, mode: Mode) -> Windows:
    """Read the tokens that a run's excerpts point into."""
    path = records_folder(run, mode) / "windows.safetensors"
    arrays = read_tensors(path, hint=_collect_again(run, mode))
    if problem := problem_of_windows(arrays):
        raise CrateError(f"{path}: {problem}. {_collect_again(run, mode)}")
    return Windows(**{name: arrays[name] for name in WINDOW_NAMES})


def records_strings(run: Path, mode: Mode) -> list[str]:
    """Text of each token id of the records. Raises CrateError if they have ids beyond their tokenizer."""
    from cratelm.data.tokenizer import load_tokenizer, token_strings

    path = records_tokenizer(run, mode)
    strings, largest = token_strings(load_tokenizer(path)), read_windows(run, mode).tokens.max(initial=0)
    if largest >= len(strings):
        raise CrateError(
            f"{path} must have the token ids of the records, got none for {largest}. {_collect_again(run, mode)}"
        )
    return strings


def collect_command(run: Path, mode: Mode) -> str:
    """The command that makes the records of a run."""
    return f"cratelm collect {run} --data DIR{' --mode compat' if mode == 'compat' else ''}"


def _collect_again(run: Path, mode: Mode) -> str:
    return f"Remove {records_folder(run, mode)} and run: {collect_command(run, mode)}"
