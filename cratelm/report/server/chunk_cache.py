"""The chunks of the browser, made when they are asked for: the same values that a folder holds as files.

A layer that was opened is kept, and so are chunks as they were sent, each up to a bound; both are made anew when what
they come from has changed, once for all who wait. The overview and the search index are made in the background from the
moment the server starts.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.catalogue import Layer, catalogue
from cratelm.report.browser.chunks import as_json, unpack
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


class OneByOne:
    """A lock for each name, there for as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Alone under this name."""
        with self._lock:
            lock, users = self._held.get(name, (threading.Lock(), 0))
            self._held[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users = self._held[name][1] - 1
                if users:
                    self._held[name] = (lock, users)
                else:
                    del self._held[name]


class Chunks:
    """What the page asks for under `data/`, by name. All methods may be called from several threads at once."""

    def __init__(self, runs: Sequence[Path], *, mode: Mode = "fixed", capabilities: Mapping[str, Any]) -> None:
        self.models, self.mode, self.capabilities = catalogue(runs, mode), mode, dict(capabilities)
        layers = [layer for model in self.models for tap in model.taps for layer in tap.layers]
        self.layers = {layer.folder: layer for layer in layers}
        self._views, self._sent = Kept(LAYER_BYTES), Kept(CHUNK_BYTES)
        self._opening = {folder: threading.Lock() for folder in self.layers}
        self._alone = OneByOne()
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
        return self._cached(name, lambda: chunk_value(self.models, name, self.view), self._stamp(self.layers[folder]))

    def view(self, layer: Layer) -> LayerView:
        """An open layer; whoever asks for the same one meanwhile waits for it."""
        stamp = self._stamp(layer)
        with self._opening[layer.folder]:
            kept = self._views.get(layer.folder)
            if kept is None or kept[0] != stamp:
                view = open_layer(layer)
                size = sum(array.nbytes for array in view.records.arrays.values())
                kept = (stamp, view)
                self._views.put(layer.folder, kept, size)
        found: LayerView = kept[1]
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
        index, places = SearchIndex(), []
        try:
            for place, layer in enumerate(self.layers.values()):
                view = self.view(layer)
                numbers = layer_value(view)
                count = view.records.num_neurons
                scores = unpack(numbers["sets"][0]["correlation"]) if numbers["sets"] else np.full(count, np.nan)
                explainers = [one["explainer"] for one in numbers["explained"]]
                for start in range(0, count, TEXTS_EACH):
                    index.add(place, texts_value(view, start), scores.tolist(), explainers)
                places.append({"model": layer.model, "tap": layer.tap_slug, "layer": layer.layer})
                self._indexed += 1
            made = list(index.chunks())
            directory = {"first": [chunk["terms"][0] for chunk in made], "places": places}
            self._search = [_encoded(directory), *map(_encoded, made)]
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

    def _cached(self, name: str, make: Callable[[], Mapping[str, Any] | None], stamp: str) -> bytes | None:
        kept = self._sent.get(name)
        if kept is None or kept[0] != stamp:
            with self._alone(name):
                kept = self._sent.get(name)  # whoever was there before may have made it
                if kept is None or kept[0] != stamp:
                    value = make()
                    if value is None:
                        return None
                    content = _encoded(value)
                    kept = (stamp, content)
                    self._sent.put(name, kept, len(content))
        found: bytes = kept[1]
        return found

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
