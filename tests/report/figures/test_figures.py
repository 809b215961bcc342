import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from cratelm.interpretation.scoring.correlation import LayerAggregate, ModelAggregate
from cratelm.report.figures.form import PALETTE, inline_svg, looks, write_figures
from cratelm.report.figures.paper import LONGEST_CURVE, figures
from cratelm.report.results.gather import Curve, Results, RunResult

PROTOCOLS = ("top-and-random", "random-only", "anthropic")
HOSTILE = "_<script>alert('x')</script> $\\frac{$ & \N{CJK UNIFIED IDEOGRAPH-4E2D}"


def model_aggregate(rng: np.random.Generator, layers: int, protocol: str, height: float) -> ModelAggregate:
    lines = []
    for layer in range(layers):
        points = height + float(rng.normal(0, 3))
        low, high = points - float(rng.uniform(0.5, 3)), points + float(rng.uniform(0.5, 3))
        lines.append(
            LayerAggregate(
                layer=layer,
                points=round(points, 1),
                points_undefined_zero=points,
                interval=(low, high),
                scored=9,
                total=10,
                undefined={"dead": 1},
                deviation=15.0,
            )  # fmt: skip
        )
    return ModelAggregate(
        protocol=protocol, layers=tuple(lines), mean=height, variance=1.0, mean_all_layers=height,
        variance_all_layers=1.0, mean_undefined_zero=height, interval=(height - 1, height + 1),
    )  # fmt: skip


def model(rng: np.random.Generator, title: str, arch: str, layers: int, *, control: bool = False) -> RunResult:
    height = float(rng.uniform(3, 40)) * (not control)
    steps = np.arange(1, 900, dtype=np.float64)
    curve = Curve(tokens=tuple((1000 * steps).tolist()), loss=tuple((3 + 5 * np.exp(-steps / 100)).tolist()))
    return RunResult(
        path=Path(title), name=title, title=title, arch=arch, num_layers=layers,
        control="random-init" if control else None, of=None, parameters=1, flops_per_token=1, training={}, loss=None,
        train_curve=curve, held_out_curve=Curve(tokens=curve.tokens[::100], loss=curve.loss[::100]),
        scores={name: model_aggregate(rng, layers, name, height) for name in PROTOCOLS},
        shuffled={name: model_aggregate(rng, layers, name, 0.0) for name in PROTOCOLS},
        random_init=None if control else model(rng, f"{title}, random-init", arch, layers, control=True),
        examples=(), token_strings=(), collection={}, origin={},
    )  # fmt: skip


def results(*models: RunResult) -> Results:
    return Results(mode="fixed", explainer="lookup", protocols=PROTOCOLS, models=models, missing=())


def rendered(figure: Figure) -> np.ndarray:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    out.seek(0)
    return imread(out)[..., :3]


def error_bars(axes: Axes) -> list[ErrorbarContainer]:
    return [bars for bars in axes.containers if isinstance(bars, ErrorbarContainer)]


def numbers(bars: ErrorbarContainer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, heights and ends of what was drawn."""
    x, y = (np.asarray(values, dtype=np.float64) for values in bars.lines[0].get_data())
    return x, y, np.array([np.asarray(path.vertices)[:, 1] for path in bars.lines[2][0].get_paths()])


def pixels(image: np.ndarray, color: str) -> int:
    return int((np.abs(image - np.array(to_rgb(color))).max(axis=2) < 0.02).sum())


def test_the_same_results_give_the_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    found = results(model(rng, "CRATE-2L", "crate", 2), model(rng, "GPT-2-2L", "gpt2", 2))
    first, second = (write_figures(figures(found), tmp_path / name) for name in ("one", "two"))
    assert [path.name for path in first] == ["loss.svg", "loss.png", "scores.svg", "scores.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("layers", [1, 2, 6, 12])
def test_every_layer_is_drawn_at_its_score_with_its_interval(rng: np.random.Generator, layers: int) -> None:
    found = results(model(rng, "CRATE", "crate", layers), model(rng, "GPT-2", "gpt2", layers))
    figure = figures(found)["scores"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PROTOCOLS)
    for axes in figure.axes:
        drawn = {bars.lines[0].get_color(): bars for bars in error_bars(axes) if bars.lines[0].get_alpha() is None}
        for run, color in zip(found.models, (PALETTE["crate"][0], PALETTE["gpt2"][0]), strict=True):
            expected = run.scores[axes.get_title(loc="left")].layers
            layer, points, ends = numbers(drawn[color])
            np.testing.assert_allclose(np.round(layer), range(layers))
            np.testing.assert_allclose(points, np.array([one.points for one in expected], dtype=np.float64))
            np.testing.assert_allclose(ends, np.array([one.interval for one in expected], dtype=np.float64))
            low, high = axes.get_ylim()
            assert (ends > low).all()
            assert (ends < high).all()
        ticks = axes.get_xticks()
        assert len(ticks) == layers
        assert ticks.tolist() == list(range(layers))
    image = rendered(figure)
    assert all(pixels(image, PALETTE[arch][0]) > 100 for arch in ("crate", "gpt2"))


def test_controls_are_drawn_fainter_than_their_model(rng: np.random.Generator) -> None:
    [axes, *_] = figures(results(model(rng, "CRATE", "crate", 2)))["scores"].axes
    faint = [bars.lines[0] for bars in error_bars(axes) if bars.lines[0].get_alpha() is not None]
    assert sorted(line.get_linestyle() for line in faint) == ["--", "--"]
    assert all((line.get_alpha() or 1) <= 0.5 and line.get_linewidth() < 1.6 for line in faint)


def test_a_layer_without_a_score_leaves_a_gap_and_no_error(rng: np.random.Generator) -> None:
    run = model(rng, "CRATE", "crate", 3)
    scores = run.scores["anthropic"]
    empty = replace(scores.layers[1], points=None, interval=None, deviation=None, scored=0)
    gap = replace(scores, layers=(scores.layers[0], empty, scores.layers[2]))
    figure = figures(results(replace(run, scores={**run.scores, "anthropic": gap}, shuffled={}, random_init=None)))
    [bars] = error_bars(figure["scores"].axes[2])
    assert numbers(bars)[0].tolist() == [0, 2]


def test_models_of_another_depth_have_a_separate_row(rng: np.random.Generator) -> None:
    found = results(*(model(rng, f"{arch}-{layers}", arch, layers) for arch in ("crate", "gpt2") for layers in (1, 3)))
    axes = figures(found)["scores"].axes
    assert [one.get_title(loc="left") for one in axes[:4]] == [
        "top-and-random, 1 layers", "random-only, 1 layers", "anthropic, 1 layers", "top-and-random, 3 layers",
    ]  # fmt: skip


def test_models_of_a_figure_never_look_the_same(rng: np.random.Generator) -> None:
    models = [model(rng, f"{arch} {i}", arch, 1) for i in range(5) for arch in ("crate", "gpt2")]
    found = looks(models)
    assert len({(look.color, look.marker) for look in found.values()}) == len(models)
    assert found["crate 0"].color != found["gpt2 0"].color


def test_a_long_curve_is_thinned_without_moving_it(rng: np.random.Generator) -> None:
    run = model(rng, "CRATE", "crate", 1)
    tokens = np.arange(12 * LONGEST_CURVE, dtype=np.float64)
    loss = rng.normal(3, 0.1, len(tokens))
    long = Curve(tokens=tuple(tokens.tolist()), loss=tuple(loss.tolist()))
    [axes] = figures(results(replace(run, train_curve=long)))["loss"].axes
    x, y = (np.asarray(values) for values in axes.lines[0].get_data())
    assert len(x) == LONGEST_CURVE
    assert x.mean() == pytest.approx(tokens.mean())
    assert y.mean() == pytest.approx(loss.mean())


def test_the_axis_shows_the_end_of_every_curve(rng: np.random.Generator) -> None:
    found = results(model(rng, "CRATE", "crate", 1), model(rng, "GPT-2", "gpt2", 1))
    [axes] = figures(found)["loss"].axes
    low, high = axes.get_ylim()
    for run in found.models:
        assert low < run.train_curve.loss[-1] < high
        assert low < run.held_out_curve.loss[-1] < high


def test_runs_without_training_have_no_loss_figure(rng: np.random.Generator) -> None:
    run = replace(model(rng, "gpt2", "gpt2", 1), train_curve=Curve(), held_out_curve=Curve())
    assert figures(results(run)).keys() == {"scores"}


def test_text_in_the_svg_is_text_and_a_hostile_name_stays_one(tmp_path: Path, rng: np.random.Generator) -> None:
    write_figures(figures(results(model(rng, HOSTILE, "crate", 1), model(rng, "GPT-2", "gpt2", 1))), tmp_path)
    for name in ("scores", "loss"):
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        texts = {(text.text or "").strip() for text in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {HOSTILE, "GPT-2"} <= texts
        assert not any(element.tag.endswith("script") for element in root.iter())


def test_an_inlined_figure_holds_nothing_but_a_drawing(rng: np.random.Generator) -> None:
    found = figures(results(model(rng, HOSTILE, "crate", 2), model(rng, "GPT-2", "gpt2", 2)))
    parts = {name: inline_svg(figure, name, 'a "quoted" <description>') for name, figure in found.items()}
    ids = []
    for name, text in parts.items():
        root = ElementTree.fromstring(text)
        assert root.get("aria-label") == 'a "quoted" <description>'
        assert {element.tag for element in root.iter()} <= {
            "svg", "g", "defs", "path", "use", "clipPath", "rect", "text", "tspan",
        }  # fmt: skip
        for element in root.iter():
            assert not any(key.startswith("on") or key in ("style", "src") for key in element.attrib)
            assert element.get("href", f"#{name}-").startswith(f"#{name}-")
        own = [element.get("id") for element in root.iter() if element.get("id")]
        links = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
        assert links
        assert set(links) <= set(own)
        ids += own
    assert len(ids) == len(set(ids))
