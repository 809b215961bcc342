"""The chunks of the live browser, made on request: the same values that a site has as files.

Open layers and encoded chunks are cached up to a number of bytes each, and made again when a layer's files have
changed. Threads that request the same layer wait for each other. The overview and the search index are made in the
background when the server starts.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.catalogue import Layer, all_layers, catalogue
from cratelm.report.browser.chunks import encoded
from cratelm.report.browser.overview import manifest
from cratelm.report.browser.overview_cache import CachedOverview, LiveOverview, Stamp
from cratelm.report.browser.search_index import SearchIndex
from cratelm.report.browser.site import layer_chunk, layer_stamp
from cratelm.report.browser.views import TEXTS_EACH, LayerView, layer_value, open_layer, texts_value
from cratelm.runtime import console

LAYER_BYTES, CHUNK_BYTES = 2 << 30, 128 << 20
"""Size of the caches of open layers and of chunks."""
SEARCH_ROWS = 50


class NotReady(Exception):
    """The search index is not complete; the message says how far it is."""


class SizedCache:
    """The last used values, up to a number of bytes; at least one value."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._values: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Any:
        """The value; None if it is not cached."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: str, value: Any, size: int) -> None:
        """Add a value and remove the values that were not used for the longest time."""
        with self._lock:
            self._bytes += size - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, size)
            while self._bytes > self._most and len(self._values) > 1:
                self._bytes -= self._values.popitem(last=False)[1][1]


class Chunks:
    """The chunks under `data/`, by name. All methods may be called from several threads at once."""

    def __init__(self, runs: Sequence[Path], *, mode: Mode = "fixed", capabilities: Mapping[str, Any]) -> None:
        self.models, self.mode, self.capabilities = catalogue(runs, mode), mode, dict(capabilities)
        self.layers = {layer.folder: layer for layer in all_layers(self.models)}
        self._views, self._chunks = SizedCache(LAYER_BYTES), SizedCache(CHUNK_BYTES)
        self._locks = {folder: threading.RLock() for folder in self.layers}
        self._stamps = {layer.folder: Stamp(partial(layer_stamp, layer)) for layer in self.layers.values()}
        self.overview = LiveOverview(CachedOverview(models=self.models, mode=self.mode))
        self._search: list[bytes] | None = None
        self._indexed = 0
        self._problem = ""

    def find(self, model: str, tap: str, layer: int) -> Layer:
        """The layer of these slugs; `CrateError` if there is none."""
        for known in self.layers.values():
            if (known.model, known.tap_slug, known.layer) == (model, tap, layer):
                return known
        raise CrateError(f"there is no layer {layer} of {model[:60]}, {tap[:60]}")

    def chunk(self, name: str) -> bytes | None:
        """A chunk as JSON; None if there is none of this name. `NotReady` while the search index is being made."""
        if name == "site":
            return encoded(manifest(self.models, self.mode) | {"capabilities": self.capabilities})
        if name == "overview":
            return self.overview.chunk()
        folder, _, last = name.rpartition("/")
        if folder == "search":
            return self._search_chunk(last)
        if folder not in self.layers:
            return None
        layer = self.layers[folder]

        def make() -> tuple[bytes | None, int]:
            value = layer_chunk(self.view(layer), last)
            content = None if value is None else encoded(value)
            return content, len(content or b"")

        content: bytes | None = self._current(self._chunks, name, layer, make)
        return content

    def view(self, layer: Layer) -> LayerView:
        """An open layer."""

        def make() -> tuple[LayerView, int]:
            view = open_layer(layer)
            return view, sum(array.nbytes for array in view.records.arrays.values())

        view: LayerView = self._current(self._views, layer.folder, layer, make)
        return view

    def full_text(self, words: str) -> list[dict[str, Any]]:
        """Explanations with all the words, best match first in each model.

        An explanation shared by several protocols is listed once, with all of them as its `protocol`.
        """
        matches: list[dict[str, Any]] = []
        each = max(10, 2 * SEARCH_ROWS // len(self.models))
        for model in self.models:
            taps = {tap.name: tap.slug for tap in model.taps}
            if not Store(model.run).path.exists():
                continue
            merged: dict[tuple[Any, ...], dict[str, Any]] = {}
            for key, index, text in Store.open(model.run).search(words, mode=self.mode, limit=10 * SEARCH_ROWS):
                if key.tap in taps:
                    match: dict[str, Any] = {
                        "model": model.slug, "tap": taps[key.tap], "layer": key.layer, "neuron": index,
                        "explainer": key.explainer, "text": text,
                    }  # fmt: skip
                    match = merged.setdefault(tuple(match.values()), match | {"protocol": ""})
                    match["protocol"] = ", ".join(filter(None, (match["protocol"], key.protocol)))
            matches += list(merged.values())[:each]
        return matches

    def begin(self) -> threading.Thread:
        """Start making the overview, if it is out of date, and the search index in the thread returned."""
        self.overview.chunk()
        thread = threading.Thread(target=self._index, name="search index", daemon=True)
        thread.start()
        return thread

    def _index(self) -> None:
        index = SearchIndex()
        try:
            for layer in self.layers.values():
                view = self.view(layer)
                starts = range(0, view.records.num_neurons, TEXTS_EACH)
                index.add_layer(layer, layer_value(view), (texts_value(view, start) for start in starts))
                self._indexed += 1
            chunks = list(index.chunks())
            self._search = [encoded(index.directory(chunks)), *map(encoded, chunks)]
        except Exception as error:  # the server continues without a search and shows the reason
            self._problem = f"the search index could not be made ({error})"
            console.print(self._problem, markup=False)

    def _search_chunk(self, name: str) -> bytes | None:
        if self._search is None:
            raise NotReady(self._problem or f"the search index has {self._indexed} of {len(self.layers)} layers so far")
        if name == "directory":
            return self._search[0]
        number = int(name) + 1 if name.isascii() and name.isdigit() and len(name) < 7 else 0
        return self._search[number] if 0 < number < len(self._search) else None

    def _current(self, cache: SizedCache, name: str, layer: Layer, make: Callable[[], tuple[Any, int]]) -> Any:
        """The cached value, made again if the layer has changed: by one thread, while the others wait for it."""
        stamp = self._stamps[layer.folder]()
        with self._locks[layer.folder]:
            cached = cache.get(name)
            if cached is None or cached[0] != stamp:
                value, size = make()
                if value is None:  # there is no chunk of this name; names of clients are not cached
                    return None
                cached = (stamp, value)
                cache.put(name, cached, size)
        return cached[1]
