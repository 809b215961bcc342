"""Records, explanations and scores in Neuronpedia's export format, which its import page and its data sets use.

    DIR/config/*.jsonl                                        the kinds of explanation
    DIR/<model>/<layer>-<set>/{release,model,sourceset,source}.jsonl
    DIR/<model>/<layer>-<set>/features/batch-N.jsonl.gz       one line per neuron, 1024 to a batch
    DIR/<model>/<layer>-<set>/activations/batch-N.jsonl.gz    one line per excerpt of those neurons
    DIR/<model>/<layer>-<set>/explanations/batch-N.jsonl.gz   one line per explanation of those neurons

`docs/formats.md` names the revision of the format and describes the fields. Neuronpedia takes the columns of a file
from its first line and does not support NaN: all lines of a file have the same fields, and all numbers are finite.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from cratelm.activations.interchange import PER_INTERVAL
from cratelm.activations.records import Excerpt, Excerpts, Mode, read_collection
from cratelm.errors import CrateError
from cratelm.report.export.neuronrecord import choose_width, shortest
from cratelm.report.neuron_table import NeuronTable, open_table
from cratelm.report.shown_text import sign
from cratelm.rundir import atomic_path, origin, read_json
from cratelm.runtime import progress_bar

BATCH = 1024
"""Neurons per file."""
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The default user of a new Neuronpedia, the author of exports without `creator_id`."""
COMPAT_SHARES = (0.5, 0.4, 0.09, 0.009, 0.001)
"""Share of all tokens in each quantile interval of wide `compat` excerpts, weakest first."""
LOOKUP = "The tokens a neuron fires on, with their mean activations in its explaining excerpts. No language model."
BARS = 40
LOWEST_EDGE = 1.5 * 2.0**-16
"""Lower edge of the second bin of a record's histogram."""
PARTS = {
    "release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl", "features", "activations", "explanations"
}  # fmt: skip
"""Files and folders of an export of one layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """Names of an export on Neuronpedia."""

    model: str
    """Letters, digits, - and _ only."""
    source_set: str
    explainer: str
    creator_id: str
    date: str
    """ISO 8601."""

    def source(self, layer: int) -> str:
        """The Neuronpedia source of a layer."""
        return f"{layer}-{self.source_set}"


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer to export."""

    table: NeuronTable
    naming: Naming
    width: int
    per_interval: int
    centred: bool
    """Whether excerpts are centred on their token, as in `compat` mode, instead of containing it as the strongest."""

    @property
    def source(self) -> str:
        return self.naming.source(self.table.records.layer)

    @property
    def place(self) -> dict[str, str]:
        """The columns that identify the layer of a row."""
        return {"modelId": self.naming.model, "layer": self.source, "createdAt": self.naming.date}

    def identifier(self, *parts: object) -> str:
        """An id that is the same in every export, so that a second import does not add a row."""
        text = "/".join(map(str, (self.naming.model, self.source, *parts)))
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]

    @cached_property
    def sets(self) -> dict[str, list[Excerpts]]:
        """Top and quantile excerpts of each half."""
        records = self.table.records
        return {
            kind: [records.excerpts(*key) for key in records.sets if key[0] == self.width and key[2] == kind]
            for kind in ("top", "quantile")
        }


def export_neuronpedia(
    run: Path, out: Path, layers: Sequence[int], *, mode: Mode = "fixed", tap: str = "neurons",
    explainer: str = "lookup", width: int | None = None, model_id: str | None = None, creator_id: str = CREATOR_ID,
) -> None:  # fmt: skip
    """Write some layers; each layer's folder is complete or missing."""
    naming = Naming(
        model=_checked(model_id) if model_id is not None else _slug(_name(run)),
        source_set=_slug(f"cratelm-{tap}" + ("-compat" if mode == "compat" else "")),
        explainer=f"cratelm-{_slug(explainer)}", creator_id=creator_id, date=origin()["date"],
    )  # fmt: skip
    collection = read_collection(run, mode=mode)
    _write_config(out / "config", naming)
    with progress_bar("export", total=len(layers), unit="layers") as bar:
        for number in layers:
            table = open_table(run, number, mode=mode, tap=tap, explainer=explainer)
            layer = _Layer(
                table=table, naming=naming, width=choose_width(table.records, width),
                per_interval=int(collection.get("per_quantile", PER_INTERVAL[mode])),
                centred=mode == "compat" and "imported" not in collection,
            )  # fmt: skip
            _write_layer(out / naming.model / layer.source, layer, collection)
            bar.advance(1, note=layer.source)


def _write_layer(folder: Path, layer: _Layer, collection: Mapping[str, Any]) -> None:
    if others := sorted({path.name for path in folder.glob("*")} - PARTS):
        raise CrateError(f"{folder} has {others[0]}, which is not part of an export. Give another --out")
    kinds = {"features": _features, "activations": _activations, "explanations": _explanations}
    with atomic_path(folder) as temporary:
        for name, row in _metadata(layer, collection).items():
            _write_lines(temporary / f"{name}.jsonl", [row])
        neurons = layer.table.records.num_neurons
        for batch, start in enumerate(range(0, neurons, BATCH)):
            for name, make_rows in kinds.items():
                rows = (row for i in range(start, min(start + BATCH, neurons)) for row in make_rows(layer, i))
                _write_lines(temporary / name / f"batch-{batch}.jsonl.gz", rows)


def _name(run: Path) -> str:
    """The run's name; without `run.json`, the name of its folder."""
    path = run / "run.json"
    return str(read_json(path, made_by="cratelm train")["name"]) if path.exists() else run.resolve().name


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-") or "model"


def _checked(model_id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", model_id):
        raise CrateError(f"--model-id must be letters, digits, - and _ only, got {model_id!r}")
    return model_id.lower()


def _write_config(folder: Path, naming: Naming) -> None:
    """Write the rows that explanations refer to; the import needs all five files, even if they are empty."""
    kind = {
        "name": naming.explainer, "displayName": naming.explainer, "creatorName": "cratelm",
        "description": LOOKUP if naming.explainer == "cratelm-lookup" else "Explanations made by cratelm.",
    }  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {
        "explanation_type": [kind | {"creatorId": naming.creator_id}], "explanation_model_type": [kind],
        "explanation_score_model": [], "explanation_score_type": [], "eval_type": [],
    }  # fmt: skip
    for name, lines in rows.items():
        with atomic_path(folder / f"{name}.jsonl") as temporary:
            _write_lines(temporary, lines)


def _metadata(layer: _Layer, collection: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The row of each of the files that describe the layer."""
    records, naming = layer.table.records, layer.naming
    created = {"creatorId": naming.creator_id, "createdAt": naming.date, "visibility": "PUBLIC"}
    described = f"{records.tap} of {naming.model}, {records.mode} records"
    release = f"{naming.model}-{naming.source_set}"
    return {
        "release": {
            "name": release, "description": described, "descriptionShort": described, "urls": [],
            "creatorName": "cratelm", "creatorNameShort": "cratelm", "defaultSourceSetName": naming.source_set,
        } | created,
        "model": {
            "id": naming.model, "displayNameShort": naming.model, "displayName": naming.model, "owner": "cratelm",
            "layers": int(collection.get("num_layers", records.layer + 1)), "neuronsPerLayer": records.num_neurons,
        } | created,
        "sourceset": {
            "modelId": naming.model, "name": naming.source_set, "description": described, "type": "neurons",
            "creatorName": "cratelm", "urls": [], "releaseName": release,
        } | created,
        "source": {
            "id": layer.source, "modelId": naming.model, "setName": naming.source_set,
            "num_prompts": collection.get("documents"), "num_tokens_in_prompt": layer.width,
            "notes": f"{collection.get('tokens')} tokens of whole documents observed; excerpts are pieces of them",
        } | created,
    }  # fmt: skip


def _features(layer: _Layer, index: int) -> Iterator[dict[str, Any]]:
    statistics, tables = layer.table.records.statistics, layer.table.records.tables
    heights, middles = np.zeros(0), np.zeros(0)
    if "histogram" in tables:
        heights, middles = frequency_bars(tables["histogram"][index], statistics["maximum"][index])
    has_similar = "similar_neuron" in tables
    yield layer.place | {
        "index": str(index), "creatorId": layer.naming.creator_id, "sourceSetName": layer.naming.source_set,
        "maxActApprox": _finite(statistics["maximum"][index]), "frac_nonzero": _finite(statistics["density"][index]),
        "hasVector": False,
        "topkCosSimIndices": tables["similar_neuron"][index].tolist() if has_similar else [],
        "topkCosSimValues": shortest(tables["similar_cosine"][index]) if has_similar else [],
        "freq_hist_data_bar_heights": heights.tolist(), "freq_hist_data_bar_values": middles.tolist(),
    }  # fmt: skip


def _finite(value: np.floating) -> float:
    return float(str(value)) if np.isfinite(value) else 0.0


def frequency_bars(
    histogram: Integer[np.ndarray, " bins"], maximum: np.floating
) -> tuple[Float[np.ndarray, " bars"], Float[np.ndarray, " bars"]]:
    """Counts in bars of equal width from 0 to the maximum, and the centres of the bars.

    A record's histogram has two bins per octave; the count of a bin is spread evenly. The first bin, with values near 0
    and below, is left out.
    """
    if not maximum > LOWEST_EDGE:
        return np.zeros(0), np.zeros(0)
    edges = np.append(bin_edges(), np.inf).clip(max=float(maximum))
    below = np.concatenate([[0], np.cumsum(histogram[1:])])
    bounds = np.linspace(0, float(maximum), BARS + 1)
    return np.diff(np.interp(bounds, edges, below)).round(2), ((bounds[1:] + bounds[:-1]) / 2).round(6)


def bin_edges() -> Float[np.ndarray, " edges"]:
    """Lower edges of all bins but the first of a record's histogram: 2^-16 times 1.5, 2, 3, 4, 6, 8, ..."""
    steps = np.arange(1, 64)
    return 2.0 ** (steps // 2 - 16) * np.where(steps % 2, 1.5, 1)


def _activations(layer: _Layer, index: int) -> Iterator[dict[str, Any]]:
    """Top excerpts of both halves, strongest first, then excerpts of quantile intervals, strongest interval first."""
    row, size = slice(index, index + 1), layer.per_interval

    def value(excerpt: Excerpt) -> float:
        return float(str(excerpt.activations[_token(excerpt, layer)]))

    top = sorted((excerpt for part in layer.sets["top"] for excerpt in part.rows(row).of(0)), key=value, reverse=True)
    # Neuronpedia identifies the top excerpts by these numbers.
    groups = [(-1.0, value(top[0]) if top else 0.0, -1.0, top)]
    count = max((part.tokens.shape[1] // size for part in layer.sets["quantile"]), default=0)
    mode = layer.table.records.mode
    shares = COMPAT_SHARES if mode == "compat" and count == len(COMPAT_SHARES) else (1 / max(count, 1),) * count
    for interval in reversed(range(count)):
        picks = range(interval * size, (interval + 1) * size)
        parts = [part.rows(row).take(picks) for part in layer.sets["quantile"]]
        inside = [excerpt for part in parts for excerpt in part.of(0)]
        values = [value(excerpt) for excerpt in inside] or [0.0]
        groups.append((min(values), max(values), shares[interval], inside))
    number = 0
    for low, high, share, members in groups:
        for excerpt in members:
            yield _activation(layer, index, number, excerpt) | {"binMin": low, "binMax": high, "binContains": share}
            number += 1


def _token(excerpt: Excerpt, layer: _Layer) -> int:
    """The place of the token for which an excerpt was recorded."""
    if not layer.centred:
        return int(np.argmax(excerpt.activations))
    # Only excerpts at both ends of the corpus are shorter; at the start of the corpus, their front is missing.
    length = len(excerpt.tokens)
    cut = layer.width - length if excerpt.position == 0 else 0
    return min(max(layer.width // 2 - cut, 0), length - 1)


def _activation(layer: _Layer, index: int, number: int, excerpt: Excerpt) -> dict[str, Any]:
    values, peak = shortest(excerpt.activations), int(np.argmax(excerpt.activations))
    return layer.place | {
        "id": layer.identifier(index, "activation", number), "index": str(index),
        "creatorId": layer.naming.creator_id,
        "tokens": [layer.table.strings[token] for token in excerpt.tokens.tolist()], "values": values,
        "maxValue": values[peak], "maxValueTokenIndex": peak, "minValue": min(values),
        "qualifyingTokenIndex": _token(excerpt, layer), "dataIndex": str(excerpt.document),
    }  # fmt: skip


def _explanations(layer: _Layer, index: int) -> Iterator[dict[str, Any]]:
    """Each distinct text once, with the scores by all its protocols."""
    correlations: dict[str, dict[str, float | None]] = {}
    for protocol, interpretation in layer.table.interpretations.items():
        if index in interpretation.explanations:
            scores = interpretation.scores
            value = np.nan if scores is None else float(scores.correlation[index])
            by_protocol = correlations.setdefault(interpretation.explanations[index], {})
            by_protocol[protocol] = None if np.isnan(value) else value
    for number, (text, by_protocol) in enumerate(correlations.items()):
        yield layer.place | {
            "id": layer.identifier(index, "explanation", layer.naming.explainer, number), "index": str(index),
            "authorId": layer.naming.creator_id, "description": text, "typeName": layer.naming.explainer,
            "explanationModelName": layer.naming.explainer,
            "notes": json.dumps({"mode": layer.table.records.mode, "correlation": by_protocol}),
        }  # fmt: skip


_ESCAPE = re.compile(r"\\u0000|\\.|[\ud800-\udfff]")
"""An escape in JSON text, that of NUL first, or half a surrogate pair."""


def _storable(match: re.Match[str]) -> str:
    """Replace NUL and half surrogates by their signs in the browser, because Postgres stores neither in JSON."""
    if match[0] == r"\u0000":
        return sign("\0")
    return match[0] if match[0][0] == "\\" else sign(match[0])


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    content = "".join(_ESCAPE.sub(_storable, line) for line in lines).encode()
    path.write_bytes(gzip.compress(content, 5, mtime=0) if path.suffix == ".gz" else content)
