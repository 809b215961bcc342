"""The browser as one folder: opens from disk by double click, or from any static host, and asks nothing of a server.

    cratelm-site.json            says that the folder is a site, so that it may be written into again
    index.html, viewer/          the page: the same files for every site
    data/site.js, overview.js    which models there are; the report
    data/mM/tT/lL/               a layer: its numbers, texts and neurons, some to a chunk
    data/search/                 the search index

A layer's folder is there whole or not at all and remembers what it was made from, so a site that was interrupted goes
on where it stopped, and one whose runs have changed renews what changed. One layer is held in memory at a time.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from cratelm.activations.direction_files import directions_file
from cratelm.activations.records import Mode, layer_file, records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.listing import stamps_of
from cratelm.report.browser.catalogue import Layer, Model, catalogue
from cratelm.report.browser.chunks import as_script, read_script
from cratelm.report.browser.overview import manifest
from cratelm.report.browser.overview_cache import KeptOverview
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
"""In the order in which they are loaded. Classic scripts: a browser loads no modules from disk."""
LIVE_SCRIPTS = ("api.js", "try.js", "steer.js", "ask.js")
"""What a served page loads besides, before the last one."""
LIVE_ONLY = (*LIVE_SCRIPTS, "live.css")
"""Files of the viewer that a folder does without."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src {connect}; "
    "base-uri 'none'; form-action 'none'"
)
"""What the page may do. `'self'` is, for a page from disk, the disk."""
FORMAT = 1
"""Of the chunks of a layer; folders of another are written anew."""
MADE = "made.json"
MARKER = "cratelm-site.json"
"""Written first into a new or empty folder. What has none, and was not made before there was one, is not ours."""
GENERATOR = '<meta name="generator" content="cratelm">'
"""In the page of every site, those of versions without the marker too."""


def write_site(runs: Sequence[Path], out: Path, *, mode: Mode = "fixed") -> Path:
    """Write or renew the folder, and return the path of its first page."""
    models = catalogue(runs, mode)
    _take_folder(out)
    layers = _layers(models)
    data = out / "data"
    with progress_bar("site", total=len(layers) + 2, unit="layers") as bar:
        _write_layers(models, data, bar)
        _write_chunk(data, "overview", KeptOverview(models=models, mode=mode).value())
        bar.advance(1, note="overview")
        _write_search(layers, data)
        bar.advance(1, note="search")
    _write_chunk(data, "site", manifest(models, mode))
    _remove_others(data, layers)
    _write_viewer(models, out)
    return out / "index.html"


def policy_of(*, served: bool) -> str:
    """What the page may do: a served one may ask its own server, one from disk nobody."""
    return POLICY.format(connect="'self'" if served else "'none'")


def index_html(title: str, *, served: bool, token: str = "") -> str:
    """The one page. `token` is what a served one shows its server when it writes."""
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
    """Mark the folder as a site; one that holds other things is none of ours to write into or to delete from."""
    if out.exists() and not out.is_dir():
        raise CrateError(f"{out} is a file. Give a new folder with --out")
    if (out / MARKER).is_file():
        return
    if out.is_dir() and any(out.iterdir()) and not _is_older_site(out):
        raise CrateError(f"{out} holds other files and is no site of cratelm. Give a new folder with --out")
    write_json(out / MARKER, {"made_by": "cratelm report --site"})


def _is_older_site(out: Path) -> bool:
    """Whether the page was written by a version that left no marker."""
    try:
        with (out / "index.html").open(encoding="utf-8", errors="replace") as page:
            return GENERATOR in page.read(4096)
    except OSError:
        return False


def _write_layers(models: Sequence[Model], data: Path, bar: ProgressBar) -> None:
    for model in models:
        strings: list[str] = []
        for layer in (layer for tap in model.taps for layer in tap.layers):
            folder, note = data / layer.folder, f"{model.title}, {layer.tap}, layer {layer.layer}"
            made = {"format": FORMAT, "from": layer_stamp(layer)}
            if not _is_made(folder, made):
                strings = strings or token_strings(load_tokenizer(records_tokenizer(model.run, layer.mode)))
                with atomic_path(folder) as temporary:
                    _write_layer(temporary, layer, strings)
                    (temporary / MADE).write_text(json.dumps(made), encoding="utf-8")
            bar.advance(1, note=note)


def _write_layer(folder: Path, layer: Layer, strings: Sequence[str]) -> None:
    """A function of its own, so that the layer is let go before the next one is read."""
    for name, value in layer_chunks(open_layer(layer, strings)):
        _write(folder / f"{name}.js", as_script(f"{layer.folder}/{name}", value))


def layer_chunks(view: LayerView) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The chunks of one layer with their names."""
    neurons = view.records.num_neurons
    yield "layer", layer_value(view)
    for number, start in enumerate(range(0, neurons, TEXTS_EACH)):
        yield f"texts-{number}", texts_value(view, start)
    for number, start in enumerate(range(0, neurons, NEURONS_EACH)):
        yield f"neurons-{number}", neurons_value(view, start)


def chunk_value(models: Sequence[Model], name: str, view_of: Callable[[Layer], LayerView]) -> Mapping[str, Any] | None:
    """The value of a layer's chunk by its name, for a server; None where there is no such chunk.

    Nothing of the name reaches the file system: it is three numbers, one of three words and a number.
    """
    match = re.fullmatch(r"m(\d{1,4})/t(\d{1,4})/l(\d{1,4})/(layer|texts|neurons)(?:-(\d{1,7}))?", name, re.ASCII)
    folder, _, what = name.rpartition("/")
    layer = next((one for one in _layers(models) if one.folder == folder), None)
    if match is None or layer is None or (match[4] == "layer") != (match[5] is None):
        return None
    view = view_of(layer)
    if match[5] is None:
        return layer_value(view)
    make, each = (texts_value, TEXTS_EACH) if match[4] == "texts" else (neurons_value, NEURONS_EACH)
    start = int(match[5]) * each
    return make(view, start) if start < view.records.num_neurons and what == f"{match[4]}-{int(match[5])}" else None


def _layers(models: Sequence[Model]) -> list[Layer]:
    return [layer for model in models for tap in model.taps for layer in tap.layers]


def layer_stamp(layer: Layer) -> str:
    """A hash of all that the chunks of a layer depend upon."""
    file = layer_file(layer.run, layer.mode, layer.tap, layer.layer)
    store = Store(layer.run)
    stamps = stamps_of(store, mode=layer.mode, tap=layer.tap, layer=layer.layer) if store.path.exists() else []
    weights = directions_file(layer.run, layer.layer, layer.tap)
    stats = [(one.st_size, one.st_mtime_ns) for one in (file.stat(), *([weights.stat()] if weights.exists() else []))]
    told = [layer.model, layer.tap_slug, stats, identity(layer.run, layer.mode), stamps]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _is_made(folder: Path, made: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / MADE).read_text(encoding="utf-8")) == made)
    except (OSError, ValueError):
        return False


def _write_chunk(data: Path, name: str, value: Mapping[str, Any]) -> None:
    path = data / f"{name}.js"
    content = as_script(name, value)
    with atomic_path(path) as temporary:
        _write(temporary, content)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_search(layers: Sequence[Layer], data: Path) -> None:
    """The index of all layers, from their chunks: those of a layer that was not renewed are read from disk."""
    index = SearchIndex()
    for layer in layers:
        folder = data / layer.folder
        numbers = read_script(folder / "layer.js")
        chunks = range(-(-numbers["neurons"] // numbers["texts_each"]))
        index.add_layer(layer, numbers, (read_script(folder / f"texts-{number}.js") for number in chunks))
    made = list(index.chunks())
    with atomic_path(data / "search") as folder:
        for name, chunk in (*enumerate(made), ("directory", index.directory(made))):
            _write(folder / f"{name}.js", as_script(f"search/{name}", chunk))


def _remove_others(data: Path, layers: Sequence[Layer]) -> None:
    """Folders of layers that this site no longer has."""
    kept = {layer.folder for layer in layers}
    for folder in data.glob("m*/t*/l*"):
        name = folder.relative_to(data).as_posix()
        if re.fullmatch(r"m\d+/t\d+/l\d+", name) and name not in kept:
            shutil.rmtree(folder)


def _write_viewer(models: Sequence[Model], out: Path) -> None:
    """The page last: what opens is whole."""
    with atomic_path(out / "viewer") as temporary:
        temporary.mkdir()
        for file in sorted(VIEWER.iterdir()):
            if file.suffix in (".js", ".css", ".svg") and file.name not in LIVE_ONLY:
                shutil.copyfile(file, temporary / file.name)
    title = ", ".join(model.title for model in models if model.description.get("control") is None)
    write_text(out / "index.html", index_html(title or models[0].title, served=False))
