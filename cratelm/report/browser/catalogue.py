"""Which models, taps and layers a browser shows, and how its links name them.

A link is made of slugs, such as `#/crate-2l/layer/1/neuron/85`; a chunk's name of numbers alone, such as `m0/t0/l1`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode, recorded_layers, records_folder
from cratelm.errors import CrateError
from cratelm.report.results.gather import run_titles
from cratelm.rundir import read_json

RESERVED = ("compare", "search", "vote", "try", "layer", "neuron")
"""First or second words of links that name no model."""
OWN_TAP = "neurons"
"""The model's own neurons; every other tap is named in a link."""


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
    """Where its chunks are, below `data/`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A place of a model where neurons were recorded."""

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
    """Its own neurons first; empty where nothing was collected."""


def slug(text: str, taken: Sequence[str]) -> str:
    """Lower-case letters, digits, `.`, `_` and `-` only, unlike any other that is taken."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", text.casefold()).strip("-.")[:60] or "model"
    plain = f"{plain}-model" if plain in RESERVED else plain
    numbered = (f"{plain}-{number}" for number in range(2, len(taken) + 3))
    return plain if plain not in taken else next(one for one in numbered if one not in taken)


def catalogue(runs: Sequence[Path], mode: Mode) -> tuple[Model, ...]:
    """All runs in the order given, each once. At least one must have records."""
    paths = list({path.resolve(): path for path in runs}.values())
    if not paths:
        raise CrateError("no run was named. Run: cratelm report RUN... --site")
    descriptions = [read_json(path / "run.json", made_by=f"cratelm train --out {path} --data DIR") for path in paths]
    models: list[Model] = []
    for number, (path, description, title) in enumerate(
        zip(paths, descriptions, run_titles(paths, descriptions), strict=True)
    ):
        own = slug(str(description["name"]), [model.slug for model in models])
        models.append(
            Model(
                run=path,
                name=str(description["name"]),
                title=title,
                slug=own,
                description=description,
                taps=_taps(path, own, number, mode),
            )  # fmt: skip
        )
    if not any(model.taps for model in models):
        option = " --mode compat" if mode == "compat" else ""
        raise CrateError(f"{paths[0]} holds no {mode} records. Run: cratelm collect {paths[0]} --data DIR{option}")
    return tuple(models)


def _taps(run: Path, model: str, number: int, mode: Mode) -> tuple[Tap, ...]:
    folders = records_folder(run, mode).glob("*/")
    names = sorted((one.name for one in folders if one.is_dir()), key=lambda name: (name != OWN_TAP, name))
    taps: list[Tap] = []
    for name in names:
        if not (layers := recorded_layers(run, mode=mode, tap=name)):
            continue
        own, place = slug(name, [tap.slug for tap in taps]), f"m{number}/t{len(taps)}"
        taps.append(
            Tap(
                name=name,
                slug=own,
                layers=tuple(
                    Layer(
                        run=run, model=model, tap=name, tap_slug=own, layer=layer, mode=mode, folder=f"{place}/l{layer}"
                    )
                    for layer in layers
                ),
            )  # fmt: skip
        )
    return tuple(taps)
