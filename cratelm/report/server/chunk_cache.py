"""The chunks of the live browser, made on request: the same values that a site holds as files.

Open layers and encoded chunks are cached up to a number of bytes each, and made again when a layer's files have
changed. Threads that ask for the same layer wait for each other. The overview and the search index are made in the
background from the moment the server starts.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.catalogue import Layer, catalogue
from cratelm.report.browser.chunks import as_json
from cratelm.report.browser.overview import manifest
from cratelm.report.browser.overview_cache import KeptOverview, LiveOverview
from cratelm.report.browser.search_index import SearchIndex
from cratelm.report.browser.site import chunk_value, layer_stamp
from cratelm.report.browser.views import TEXTS_EACH, LayerView, layer_value, open_layer, texts_value
from cratelm.runtime import console

LAYER_BYTES, CHUNK_BYTES = 2 << 30, 128 << 20
"""Of open layers and of chunks, how much is kept."""
LOOK_SECONDS = 2.0
"""How long a layer is taken to be as it was."""
SEARCH_ROWS = 50


class NotReady(Exception):
    """The search index is still being made; the message says how far it is."""


class Kept:
    """The values last used, up to a number of bytes; one value at least."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """The value, None where it is not kept."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep a value and let the oldest go."""
        with self._lock:
            self._bytes += size - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, size)
            while self._bytes > self._most and len(self._values) > 1:
                self._bytes -= self._values.popitem(last=False)[1][1]


class Chunks:
    """What the page asks for under `data/`, by name. All methods may be called from several threads at once."""

    def __init__(self, runs: Sequence[Path], *, mode: Mode = "fixed", capabilities: Mapping[str, Any]) -> None:
        self.models, self.mode, self.capabilities = catalogue(runs, mode), mode, dict(capabilities)
        layers = [layer for model in self.models for tap in model.taps for layer in tap.layers]
        self.layers = {layer.folder: layer for layer in layers}
        self._views, self._sent = Kept(LAYER_BYTES), Kept(CHUNK_BYTES)
        self._locks = {folder: threading.RLock() for folder in self.layers}
        self.overview = LiveOverview(KeptOverview(models=self.models, mode=self.mode))
        self._stamps: dict[str, tuple[float, str]] = {}
        self._search: list[bytes] | None = None
        self._indexed = 0
        self._problem = ""

    def find(self, model: str, tap: str, layer: int) -> Layer:
        """The layer of these slugs; `CrateError` where there is none."""
        for one in self.layers.values():
            if (one.model, one.tap_slug, one.layer) == (model, tap, layer):
                return one
        raise CrateError(f"there is no layer {layer} of {model[:60]}, {tap[:60]}")

    def chunk(self, name: str) -> bytes | None:
        """A chunk as JSON; None where there is none of this name. `NotReady` while the search index is being made."""
        if name == "site":
            return _encoded(manifest(self.models, self.mode) | {"capabilities": self.capabilities})
        if name == "overview":
            return self.overview.chunk()
        folder, _, last = name.rpartition("/")
        if folder == "search":
            return self._search_chunk(last)
        if folder not in self.layers:
            return None
        layer = self.layers[folder]

        def make() -> tuple[bytes | None, int]:
            value = chunk_value(self.models, name, self.view)
            content = None if value is None else _encoded(value)
            return content, len(content or b"")

        content: bytes | None = self._current(self._sent, name, layer, make)
        return content

    def view(self, layer: Layer) -> LayerView:
        """An open layer."""

        def make() -> tuple[LayerView, int]:
            view = open_layer(layer)
            return view, sum(array.nbytes for array in view.records.arrays.values())

        found: LayerView = self._current(self._views, layer.folder, layer, make)
        return found

    def full_text(self, words: str) -> list[dict[str, Any]]:
        """Explanations that hold all the words, best match first in each model.

        One that several protocols share is there once, with all of them as its `protocol`.
        """
        found: list[dict[str, Any]] = []
        each = max(10, 2 * SEARCH_ROWS // len(self.models))
        for model in self.models:
            taps = {tap.name: tap for tap in model.taps}
            if not Store(model.run).path.exists():
                continue
            merged: dict[tuple[Any, ...], dict[str, Any]] = {}
            for key, index, text in Store.open(model.run).search(words, mode=self.mode, limit=10 * SEARCH_ROWS):
                if key.tap not in taps:
                    continue
                one = {
                    "model": model.slug, "tap": taps[key.tap].slug, "layer": key.layer, "neuron": index,
                    "explainer": key.explainer, "text": text,
                }  # fmt: skip
                protocols = merged.setdefault(tuple(one.values()), one | {"protocol": ""})
                protocols["protocol"] = ", ".join(filter(None, (protocols["protocol"], key.protocol)))
            found += list(merged.values())[:each]
        return found

    def begin(self) -> threading.Thread:
        """Begin to make the overview, where it is out of date, and the search index, in the thread returned."""
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
            made = list(index.chunks())
            self._search = [_encoded(index.directory(made)), *map(_encoded, made)]
        except Exception as error:  # the server goes on without a search, and says why
            self._problem = f"the search index could not be made ({error})"
            console.print(self._problem, markup=False)

    def _search_chunk(self, name: str) -> bytes | None:
        if self._search is None:
            raise NotReady(self._problem or f"the search index has {self._indexed} of {len(self.layers)} layers so far")
        if name == "directory":
            return self._search[0]
        number = int(name) + 1 if name.isascii() and name.isdigit() and len(name) < 7 else 0
        return self._search[number] if 0 < number < len(self._search) else None

    def _current(self, cache: Kept, name: str, layer: Layer, make: Callable[[], tuple[Any, int]]) -> Any:
        """The cached value, made again if the layer has changed: by one thread, while the others wait for it."""
        stamp = self._stamp(layer)
        with self._locks[layer.folder]:
            cached = cache.get(name)
            if cached is None or cached[0] != stamp:
                value, size = make()
                if value is None:  # no chunk has this name, and names are the client's
                    return None
                cached = (stamp, value)
                cache.put(name, cached, size)
        return cached[1]

    def _stamp(self, layer: Layer) -> str:
        """What a layer was made from, looked at now and then."""
        looked, stamp = self._stamps.get(layer.folder, (-LOOK_SECONDS, ""))
        if time.monotonic() - looked > LOOK_SECONDS or not stamp:
            stamp = layer_stamp(layer)
            self._stamps[layer.folder] = (time.monotonic(), stamp)
        return stamp


def _encoded(value: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair, which UTF-8 cannot hold, becomes JSON's escape for it.
    return as_json(value).encode("utf-8", "backslashreplace")
