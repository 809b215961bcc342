"""The models, taps and layers that a browser shows, and their names in links.

A link consists of slugs, such as `#/crate-2l/layer/1/neuron/85`; a chunk's name of numbers, such as `m0/t0/l1`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode, recorded_layers, records_folder
from cratelm.errors import CrateError
from cratelm.report.results.descriptions import described_runs, distinct

RESERVED = ("compare", "search", "vote", "try", "layer", "neuron")
"""First or second words of links that are not names of models."""
OWN_TAP = "neurons"
"""The tap of the model's neurons; links name every other tap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of one tap of one model."""

    run: Path
    model: str
    """The model's slug."""
    tap: str
    tap_slug: str
    layer: int
    mode: Mode
    folder: str
    """The folder of its chunks, below `data/`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A recorded tap of a model."""

    name: str
    slug: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One run."""

    run: Path
    name: str
    title: str
    slug: str
    description: dict[str, Any]
    """The contents of `run.json`."""
    taps: tuple[Tap, ...]
    """Neurons first; empty if nothing was collected."""


def slug(text: str, taken: Sequence[str]) -> str:
    """The text with lower-case letters, digits, `.`, `_` and `-` only, different from all taken slugs."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", text.casefold()).strip("-.")[:60] or "model"
    plain = f"{plain}-model" if plain in RESERVED else plain
    numbered = (f"{plain}-{number}" for number in range(2, len(taken) + 3))
    return next(name for name in (plain, *numbered) if name not in taken)


def catalogue(runs: Sequence[Path], mode: Mode) -> tuple[Model, ...]:
    """All distinct runs in the given order. At least one must have records."""
    paths = distinct(runs)
    if not paths:
        raise CrateError("a site needs at least one run. Run: cratelm report RUN... --site")
    models: list[Model] = []
    for path, title, description in described_runs(paths, "model.num_layers"):
        name = str(description["name"])
        link = slug(name, [model.slug for model in models])
        taps = _taps(path, link, len(models), mode)
        models.append(Model(run=path, name=name, title=title, slug=link, description=description, taps=taps))
    if not any(model.taps for model in models):
        option = " --mode compat" if mode == "compat" else ""
        raise CrateError(f"{paths[0]} holds no {mode} records. Run: cratelm collect {paths[0]} --data DIR{option}")
    return tuple(models)


def all_layers(models: Sequence[Model]) -> list[Layer]:
    """The layers of all taps of all models."""
    return [layer for model in models for tap in model.taps for layer in tap.layers]


def site_title(models: Sequence[Model]) -> str:
    """The titles of the models, without controls unless there are only controls."""
    titles = [model.title for model in models if model.description.get("control") is None]
    return ", ".join(titles) or models[0].title


def _taps(run: Path, model: str, number: int, mode: Mode) -> tuple[Tap, ...]:
    folders = (folder.name for folder in records_folder(run, mode).glob("*/") if folder.is_dir())
    taps: list[Tap] = []
    for name in sorted(folders, key=lambda name: (name != OWN_TAP, name)):
        numbers = recorded_layers(run, mode=mode, tap=name)
        tap_slug, folder = slug(name, [tap.slug for tap in taps]), f"m{number}/t{len(taps)}"
        layers = tuple(
            Layer(
                run=run, model=model, tap=name, tap_slug=tap_slug, layer=layer, mode=mode, folder=f"{folder}/l{layer}"
            )
            for layer in numbers
        )
        taps += [Tap(name=name, slug=tap_slug, layers=layers)] if layers else []
    return tuple(taps)
