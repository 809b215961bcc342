"""Records that other tools made: a folder of OpenAI's `NeuronRecord` JSON becomes records that every command reads.

    DIR/<layer>/<neuron>.json    or DIR/neurons/<layer>/<neuron>.json

Such a file has the texts of tokens without ids, so the distinct texts become the vocabulary of a new tokenizer. It
does not name documents either, so each distinct excerpt counts as a document.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float32, Integer
from tokenizers import Tokenizer, models

from cratelm.activations.records import ABSENT, Mode, layer_file, records_folder
from cratelm.checksums import checked_path, write_tensors
from cratelm.errors import CrateError
from cratelm.rundir import check_regular, origin, parse_json, read_json, remove_leftovers, write_json
from cratelm.runtime import ProgressBar, progress_bar

Half = Literal["explain", "score"]
Item = TypeVar("Item")

TOP_HALVES: tuple[Half, ...] = ("explain", "explain", "score", "score")
"""The half of each of four consecutive top excerpts: the official train, calibration, validation and test slices."""
RANDOM_HALVES: tuple[Half, ...] = ("explain", "score", "score")
"""The half of each of three consecutive random excerpts: calibration, validation, test."""
PER_INTERVAL: Mapping[Mode, int] = {"fixed": 2, "compat": 20}
"""Excerpts kept of each quantile interval, in each half, as the protocols count them."""
PROTOCOL_WIDTHS = (8, 64)
MOMENTS = ("mean", "variance", "skewness", "kurtosis")

Read = tuple[list[str], Float32[np.ndarray, " _"]]
"""An excerpt of a file: texts of its tokens, and their activations."""
Placed = tuple[int, Float32[np.ndarray, " _"]]
"""An excerpt of the records: index of its first token among all tokens kept, and its activations."""


def interleave(explain: Sequence[Item], score: Sequence[Item], halves: Sequence[Half]) -> list[Item]:
    """Two ranked lists as one in which every whole group follows the pattern `halves`.

    Slices with the pattern's stride then hold one half only. The rest of the longer list is dropped, except up to
    `len(halves) - 1` items at the end, which do not fill a group and are in no such slice.
    """
    waiting = {"explain": deque(explain), "score": deque(score)}
    groups = min(len(queue) // halves.count(half) for half, queue in waiting.items() if half in halves)
    merged = [waiting[half].popleft() for half in tuple(halves) * groups]
    for half in halves[:-1]:
        if queue := waiting[half] or waiting["explain"] or waiting["score"]:
            merged.append(queue.popleft())
    return merged


def deal(items: Sequence[Item], halves: Sequence[Half]) -> dict[Half, list[Item]]:
    """Split a list that `interleave` made into its two halves."""
    dealt: dict[Half, list[Item]] = {"explain": [], "score": []}
    for i, item in enumerate(items):
        dealt[halves[i % len(halves)]].append(item)
    return dealt


def import_neuron_records(folder: Path, run: Path, *, mode: Mode | None = None) -> Path:
    """Convert a folder of `NeuronRecord` JSON to the records of a run; return the folder of the records.

    `compat` keeps each list as it is, as the released procedure reads it. `fixed` splits top and random excerpts into
    those that the official tools explain from and those they score on. By default a folder that `cratelm export` wrote
    keeps its mode, and any other is `compat`. Missing statistics are estimated or undefined: the density is the share
    of positive tokens in the random sample; a neuron without a file has no statistics.
    """
    layers = _layer_files(folder)
    chosen = mode or _exported_mode(folder) or "compat"
    target = records_folder(run, chosen)
    remove_leftovers(target / "records.json")
    known = target / "records.json"
    before = read_json(known, made_by="cratelm import") if known.exists() else None
    text, digest = _Text(), hashlib.sha256()
    with progress_bar("import", total=sum(map(len, layers.values())), unit="neurons") as bar:
        imported = {layer: _read_layer(files, chosen, text, digest.update, bar) for layer, files in layers.items()}
    if before is not None:
        if before.get("content_hash") == digest.hexdigest():  # the same import again
            return target
        raise CrateError(f"{run} already has {chosen} records. Give another run directory, or remove {target}")
    longest = max((layer.longest for layer in imported.values()), default=0)
    width = next((wide for wide in PROTOCOL_WIDTHS if longest <= wide), longest)
    target.mkdir(parents=True, exist_ok=True)
    text.write(target)
    for number, layer in imported.items():
        write_tensors(layer_file(run, chosen, "neurons", number), layer.arrays(width))
    signed = any(bool((layer.statistics["minimum"] < 0).any()) for layer in imported.values())
    write_json(target / "records.json", {
        "mode": chosen, "taps": {"neurons": {"layers": list(imported), "signed": signed}}, "signed": signed,
        "tokens": text.size, "documents": len(text.starts),
        "num_layers": len(imported), "imported": "NeuronRecord JSON", "content_hash": digest.hexdigest(),
        "density": "share of positive tokens in the random sample", "origin": origin(),
    })  # fmt: skip
    return target


def _layer_files(folder: Path) -> dict[int, dict[int, Path]]:
    """The file of each neuron of each layer."""
    root = folder / "neurons" if (folder / "neurons").is_dir() else folder
    layers = {int(path.name): path for path in _numbered(root) if path.is_dir()}
    files = {layer: {int(path.stem): path for path in _numbered(layers[layer])} for layer in sorted(layers)}
    files = {layer: dict(sorted(inside.items())) for layer, inside in files.items() if inside}
    if not files:
        raise CrateError(f"{folder} has no <layer>/<neuron>.json. Give the folder that contains 0/0.json")
    return files


def _numbered(folder: Path) -> Iterable[Path]:
    return (path for path in folder.glob("*") if path.stem.isascii() and path.stem.isdecimal())


def _exported_mode(folder: Path) -> Mode | None:
    path = folder / "export.json"
    return read_json(path, made_by="cratelm export").get("mode") if path.exists() else None


@dataclass(kw_only=True)
class _Text:
    """The excerpts read so far as one stream of tokens, each distinct excerpt of a half once."""

    vocabulary: dict[str, int] = field(default_factory=dict)
    pieces: list[Integer[np.ndarray, " _"]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    halves: list[int] = field(default_factory=list)
    size: int = 0
    known: dict[tuple[bytes, int], int] = field(default_factory=dict)

    def place(self, tokens: Sequence[str], half: int) -> int:
        """Index of the excerpt's first token in the stream; a new excerpt is appended."""
        ids = np.array(
            [self.vocabulary.setdefault(_encodable(token), len(self.vocabulary)) for token in tokens], np.uint32
        )
        key = (ids.tobytes(), half)
        if key not in self.known:
            self.known[key] = self.size
            self.pieces.append(ids)
            self.starts.append(self.size)
            self.halves.append(half)
            self.size += len(ids)
        return self.known[key]

    def write(self, folder: Path) -> None:
        """Write `tokenizer.json` and `windows.safetensors`."""
        tokenizer = Tokenizer(models.WordLevel(vocab=self.vocabulary))
        with checked_path(folder / "tokenizer.json") as temporary:
            tokenizer.save(str(temporary))
        dtype = np.uint16 if len(self.vocabulary) <= 1 << 16 else np.uint32
        write_tensors(folder / "windows.safetensors", {
            "tokens": np.concatenate([*self.pieces, np.empty(0, np.uint32)]).astype(dtype),
            "span_position": np.zeros(1, np.int64), "span_offset": np.zeros(1, np.int64),
            "document_position": np.array(self.starts, np.int64), "document_split": np.array(self.halves, np.int64),
        })  # fmt: skip


def _encodable(token: str) -> str:
    """The token's text with unpaired surrogates, which UTF-8 cannot encode, replaced."""
    return token.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(kw_only=True)
class _Layer:
    """The excerpts and statistics of one layer's neurons."""

    statistics: dict[str, Float32[np.ndarray, " neurons"]]
    sets: dict[str, list[list[Placed | None]]] = field(default_factory=dict)
    """By `<split>.<kind>`, for every neuron; None stands for an absent excerpt."""

    @property
    def longest(self) -> int:
        """Tokens of the longest excerpt."""
        lengths = (
            len(excerpt[1]) for rows in self.sets.values() for row in rows for excerpt in row if excerpt is not None
        )
        return max(lengths, default=0)

    def arrays(self, width: int) -> dict[str, np.ndarray]:
        """The tensors of the layer's file."""
        arrays: dict[str, np.ndarray] = dict(self.statistics)
        for name, rows in self.sets.items():
            count = max(map(len, rows))
            position = np.full((len(rows), count), ABSENT, np.int64)
            length = np.zeros((len(rows), count), np.int16)
            activation = np.zeros((len(rows), count, width), np.float32)
            for i, row in enumerate(rows):
                for k, placed in enumerate(row):
                    if placed is not None:
                        position[i, k], length[i, k] = placed[0], len(placed[1])
                        activation[i, k, : len(placed[1])] = placed[1]
            arrays[f"{width}.{name}.position"] = position
            arrays[f"{width}.{name}.length"] = length
            arrays[f"{width}.{name}.activation"] = activation
        return arrays


def _read_layer(files: Mapping[int, Path], mode: Mode, text: _Text, digest: Any, bar: ProgressBar) -> _Layer:
    neurons = max(files) + 1
    names = ("density", *MOMENTS, "maximum", "minimum")
    layer = _Layer(statistics={name: np.full(neurons, np.nan, np.float32) for name in names})
    for index, path in files.items():
        content = check_regular(path).read_bytes()
        digest(content)
        record = _parse(path, content)
        for name, value in _statistics(record).items():
            layer.statistics[name][index] = value
        for name, excerpts in _divide(record, mode).items():
            rows = layer.sets.setdefault(name, [[] for _ in range(neurons)])
            half = int(name.startswith("score"))
            rows[index] = [excerpt and (text.place(excerpt[0], half), excerpt[1]) for excerpt in excerpts]
        bar.advance(1)
    return layer


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    """The contents of a file, with its excerpts as arrays."""
    try:
        record = parse_json(content)
        return {
            **{name: record.get(name) for name in MOMENTS},
            "top": [_excerpt(value) for value in record["most_positive_activation_records"]],
            "random": [_excerpt(value) for value in record.get("random_sample") or []],
            "quantile": [[_excerpt(value) for value in part] for part in record.get("random_sample_by_quantile") or []],
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CrateError(
            f"{path} is not a NeuronRecord ({type(error).__name__}: {error}). Remove it, or give another folder"
        ) from None


def _excerpt(value: Mapping[str, Any]) -> Read:
    tokens, activations = list(map(str, value["tokens"])), np.array(value["activations"], np.float32)
    if activations.shape != (len(tokens),) or not np.isfinite(activations).all():
        raise ValueError(f"{len(tokens)} tokens need {len(tokens)} finite activations, got shape {activations.shape}")
    return tokens, activations


def _statistics(record: Mapping[str, Any]) -> dict[str, float]:
    """Statistics from the file, and estimates from its excerpts."""
    excerpts = [excerpt for part in (record["top"], record["random"], *record["quantile"]) for excerpt in part]
    empty = np.empty(0, np.float32)
    values = np.concatenate([*(activations for _, activations in excerpts), empty])
    sample = np.concatenate([*(activations for _, activations in record["random"] or excerpts), empty])
    moments = {name: np.nan if record[name] is None else float(record[name]) for name in MOMENTS}
    if not len(values):
        return moments | {"density": 0.0, "maximum": 0.0, "minimum": 0.0}
    extremes = {"maximum": float(values.max()), "minimum": float(values.min())}
    return moments | {"density": float((sample > 0).mean())} | extremes


def _divide(record: Mapping[str, Any], mode: Mode) -> dict[str, list[Read | None]]:
    """The excerpts of one neuron by `<split>.<kind>`."""
    intervals, keep = record["quantile"], PER_INTERVAL[mode]
    if mode == "compat":
        sets = {"all.top": record["top"], "all.random": record["random"]}
        quantiles = {"all": [interval[:keep] for interval in intervals]}
    else:
        halves = {"top": deal(record["top"], TOP_HALVES), "random": deal(record["random"], RANDOM_HALVES)}
        sets = {f"{half}.{kind}": items for kind, parts in halves.items() for half, items in parts.items()}
        first = [min(keep, (len(interval) + 1) // 2) for interval in intervals]
        quantiles = {
            "explain": [interval[:n] for interval, n in zip(intervals, first, strict=True)],
            "score": [interval[n : n + keep] for interval, n in zip(intervals, first, strict=True)],
        }
    if intervals:
        sets |= {f"{split}.quantile": list(_padded(parts, keep)) for split, parts in quantiles.items()}
    return sets


def _padded(intervals: Sequence[list[Read]], size: int) -> Iterator[Read | None]:
    for interval in intervals:
        yield from interval
        yield from [None] * (size - len(interval))
