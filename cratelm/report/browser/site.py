"""The browser as one folder, which opens from disk by double click or from any static host.

    cratelm-site.json            marks the folder as a site, so that a later call may write into it
    index.html, viewer/          the page: the same files for every site
    data/site.js, overview.js    the models; the report
    data/mM/tT/lL/               a layer: its numbers, and its texts and neurons in chunks
    data/search/                 the search index

A layer's folder is complete or missing and records a hash of its sources: an interrupted site resumes, and a later call
renews only the layers that have changed. One layer is in memory at a time.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from cratelm.activations.direction_files import directions_file
from cratelm.activations.records import Mode, layer_file, records_strings
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.listing import stamps_of
from cratelm.report.browser.catalogue import Layer, Model, all_layers, catalogue, site_title
from cratelm.report.browser.chunks import as_script, read_script
from cratelm.report.browser.overview import manifest
from cratelm.report.browser.overview_cache import CachedOverview
from cratelm.report.browser.search_index import SearchIndex
from cratelm.report.browser.views import (
    NEURONS_EACH,
    TEXTS_EACH,
    LayerView,
    layer_value,
    neurons_value,
    open_layer,
    texts_value,
)
from cratelm.report.shown_text import visible
from cratelm.rundir import atomic_path, write_json, write_text
from cratelm.runtime import ProgressBar, progress_bar

VIEWER = Path(__file__).with_name("viewer")
SCRIPTS = (
    "core.js", "text.js", "data.js", "routes.js", "charts.js", "downloads.js", "table.js", "excerpts.js",
    "cards.js", "overview.js", "layer_list.js", "layer.js", "neuron.js", "compare.js", "votes.js", "search.js",
    "app.js",
)  # fmt: skip
"""In loading order. Classic scripts, since a browser does not load modules from disk."""
LIVE_SCRIPTS = ("api.js", "try.js", "steer.js", "ask.js")
"""Scripts that a served page loads before the last of `SCRIPTS`."""
LIVE_ONLY = (*LIVE_SCRIPTS, "live.css")
"""Files of the viewer that a folder does not need."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src {connect}; "
    "base-uri 'none'; form-action 'none'"
)
"""The page's content security policy. For a page from disk, `'self'` is the disk."""
FORMAT = 1
"""Version of the chunks of a layer; folders of another version are written again."""
_MADE = "made.json"
MARKER = "cratelm-site.json"
"""Written first into a new or empty folder; a folder without it is not a site."""
CHUNKS_OF_NEURONS = {"texts": (texts_value, TEXTS_EACH), "neurons": (neurons_value, NEURONS_EACH)}
"""Name of a chunk of some neurons -> its function, and the number of neurons."""


def write_site(runs: Sequence[Path], out: Path, *, mode: Mode = "fixed") -> Path:
    """Write or renew the folder, and return the path of its first page."""
    models = catalogue(runs, mode)
    _take_folder(out)
    layers = all_layers(models)
    data = out / "data"
    with progress_bar("site", total=len(layers) + 2, unit="layers") as bar:
        _write_layers(models, data, bar)
        _write_chunk(data, "overview", CachedOverview(models=models, mode=mode).value())
        bar.advance(1, note="overview")
        _write_search(layers, data)
        bar.advance(1, note="search")
    _write_chunk(data, "site", manifest(models, mode))
    _remove_others(data, layers)
    _write_viewer(models, out)
    return out / "index.html"


def policy_of(*, served: bool) -> str:
    """The content security policy: a served page may connect to its server, a page from disk to no one."""
    return POLICY.format(connect="'self'" if served else "'none'")


def index_html(title: str, *, served: bool, token: str = "") -> str:
    """The page. `token`: sent by a served page with its writes."""
    names = (*SCRIPTS[:-1], *(LIVE_SCRIPTS if served else ()), SCRIPTS[-1])
    scripts = "\n".join(f'<script defer src="viewer/{name}"></script>' for name in names)
    template = Template((VIEWER / "index.html").read_text(encoding="utf-8"))
    return template.substitute(
        policy=policy_of(served=served), title=escape(visible(title)), source="served" if served else "static",
        token=escape(token),
        styles='\n<link rel="stylesheet" href="viewer/live.css">' if served else "", scripts=scripts,
        more=' <a href="#/try">Try</a>' if served else "",
    )  # fmt: skip


def _take_folder(out: Path) -> None:
    """Mark the folder as a site. Raises `CrateError` for a folder with other files."""
    if out.exists() and not out.is_dir():
        raise CrateError(f"{out} is a file. Give a new folder with --out")
    if (out / MARKER).is_file():
        return
    if out.is_dir() and any(not re.fullmatch(r"\..*\.tmp", path.name) for path in out.iterdir()):  # of a killed process
        raise CrateError(f"{out} has other files and is not a site of cratelm. Give a new folder with --out")
    write_json(out / MARKER, {"made_by": "cratelm report --site"})


def _write_layers(models: Sequence[Model], data: Path, bar: ProgressBar) -> None:
    for model in models:
        strings: list[str] = []
        for layer in (layer for tap in model.taps for layer in tap.layers):
            folder, made = data / layer.folder, {"format": FORMAT, "from": layer_stamp(layer)}
            if not _is_made(folder, made):
                strings = strings or records_strings(model.run, layer.mode)
                with atomic_path(folder) as temporary:
                    _write_layer(temporary, layer, strings)
                    (temporary / _MADE).write_text(json.dumps(made), encoding="utf-8")
            bar.advance(1, note=f"{model.title}, {layer.tap}, layer {layer.layer}")


def _write_layer(folder: Path, layer: Layer, strings: Sequence[str]) -> None:
    """Write the chunks of a layer. A separate function, so that the layer is freed before the next is read."""
    for name, value in layer_chunks(open_layer(layer, strings)):
        _write(folder / f"{name}.js", as_script(f"{layer.folder}/{name}", value))


def layer_chunks(view: LayerView) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The chunks of one layer with their names."""
    neurons = view.records.num_neurons
    yield "layer", layer_value(view)
    for part, (make, each) in CHUNKS_OF_NEURONS.items():
        for number, start in enumerate(range(0, neurons, each)):
            yield f"{part}-{number}", make(view, start)


def layer_chunk(view: LayerView, name: str) -> Mapping[str, Any] | None:
    """One chunk of a layer by its name, for a server; None if there is no such chunk."""
    if name == "layer":
        return layer_value(view)
    match = re.fullmatch(r"(texts|neurons)-(0|[1-9]\d{0,6})", name, re.ASCII)
    if match is None:
        return None
    make, each = CHUNKS_OF_NEURONS[match[1]]
    start = int(match[2]) * each
    return make(view, start) if start < view.records.num_neurons else None


def layer_stamp(layer: Layer) -> str:
    """A hash of everything that the chunks of a layer depend on."""
    file = layer_file(layer.run, layer.mode, layer.tap, layer.layer)
    store = Store(layer.run)
    stamps = stamps_of(store, mode=layer.mode, tap=layer.tap, layer=layer.layer) if store.path.exists() else []
    weights = directions_file(layer.run, layer.layer, layer.tap)
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in (file, weights) if path.exists()]
    sources = [layer.model, layer.tap_slug, stats, identity(layer.run, layer.mode), stamps]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:32]


def _is_made(folder: Path, made: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / _MADE).read_text(encoding="utf-8")) == made)
    except (OSError, ValueError):
        return False


def _write_chunk(data: Path, name: str, value: Mapping[str, Any]) -> None:
    with atomic_path(data / f"{name}.js") as temporary:
        _write(temporary, as_script(name, value))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_search(layers: Sequence[Layer], data: Path) -> None:
    """Write the index of all layers, which is built from their chunks on disk."""
    index = SearchIndex()
    for layer in layers:
        folder = data / layer.folder
        numbers = read_script(folder / "layer.js")
        chunks = range(-(-numbers["neurons"] // numbers["texts_each"]))
        index.add_layer(layer, numbers, (read_script(folder / f"texts-{number}.js") for number in chunks))
    indexed = list(index.chunks())
    with atomic_path(data / "search") as folder:
        for name, chunk in (*enumerate(indexed), ("directory", index.directory(indexed))):
            _write(folder / f"{name}.js", as_script(f"search/{name}", chunk))


def _remove_others(data: Path, layers: Sequence[Layer]) -> None:
    """Remove the folders of layers that are no longer part of the site."""
    current = {layer.folder for layer in layers}
    for folder in data.glob("m*/t*/l*"):
        name = folder.relative_to(data).as_posix()
        if re.fullmatch(r"m\d+/t\d+/l\d+", name) and name not in current:
            shutil.rmtree(folder)


def _write_viewer(models: Sequence[Model], out: Path) -> None:
    """Write the viewer and at last the page, so that a site that opens is complete."""
    with atomic_path(out / "viewer") as temporary:
        temporary.mkdir()
        for file in sorted(VIEWER.iterdir()):
            if file.suffix in (".js", ".css", ".svg") and file.name not in LIVE_ONLY:
                shutil.copyfile(file, temporary / file.name)
    write_text(out / "index.html", index_html(site_title(models), served=False))
