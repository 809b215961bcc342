"""The figure of the best examples: two models' neurons side by side, in the heat of their tokens."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from report.tables.test_tables import scored_runs
from rich.cells import cell_len

from cratelm.report.figures.firing_examples import HEAT, LETTERS, PREDICTED, cut, firing_panel, window
from cratelm.report.figures.form import write_figures
from cratelm.report.results.firing import RunFiring, gather_firing
from cratelm.report.results.gather import gather
from cratelm.report.shown_text import visible
from cratelm.report.tables.form import points


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFiring, ...]:
    """Made once; what is compared with a threshold is compared on these numbers."""
    rng = np.random.default_rng(5)
    return gather_firing(gather(scored_runs(tmp_path_factory.mktemp("runs"), rng, "crate-2l", "gpt2-2l", neurons=16)))


def test_the_panel_sets_two_models_side_by_side_in_the_heat_of_their_tokens(found: tuple[RunFiring, ...]) -> None:
    figure = firing_panel(found)["firing_examples"]
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts.index("CRATE-2L") < texts.index("GPT-2-2L")
    behind = Counter(to_hex(patch.get_facecolor()) for patch in axes.patches)
    for one in (example for run in found for example in run.examples):
        assert f"Layer {one.layer}, neuron {one.index}: {points(100 * one.score)} points" in texts
        both = f"consistency {100 * one.consistency:.0f} %, distinctiveness {100 * one.distinctiveness:.0f} %"
        assert f"{both} on random text" in texts
        first = visible(one.explanation).split(" ")[0]
        assert any(text.startswith(f"{first}\N{NO-BREAK SPACE}") for text in texts), "SVG drops spaces at the ends"
    assert set(behind) >= {HEAT[-1], PREDICTED}
    wide, high = figure.get_size_inches()
    for text in axes.texts:
        x, y = text.get_position()
        assert 0 <= x <= wide
        assert 0 <= y <= high
    heads = [text.get_position() for text in axes.texts if text.get_text().startswith("Layer ")]
    assert len({x for x, _ in heads}) == 2
    assert set(Counter(y for _, y in heads).values()) == {2}, "the neurons of a row begin at one height"
    assert firing_panel(()) == {}


def test_a_line_holds_the_strongest_token_and_as_many_around_it_as_fit(rng: np.random.Generator) -> None:
    letters = list("ab \u65e5\u0301<&")
    for _ in range(200):
        tokens = ["".join(rng.choice(letters, int(rng.integers(1, 90)))) for _ in range(int(rng.integers(1, 40)))]
        widths = [cell_len(cut(token)) for token in tokens]
        strongest = int(rng.integers(len(tokens)))
        first, last = window(widths, strongest)
        assert 0 <= first <= strongest < last <= len(tokens)
        assert sum(widths[first:last]) <= LETTERS
        assert first == 0 or sum(widths[first - 1 : last]) > LETTERS
        assert last == len(tokens) or sum(widths[first : last + 1]) > LETTERS


def test_hostile_text_in_the_panel_is_shown_not_run(found: tuple[RunFiring, ...], tmp_path: Path) -> None:
    evil = ["<script>alert(1)</script>", "]]>", "&lt;", "\"'>", "$x^2$", "\x00\u202e\ud800", "\n\t"]
    strings = [evil[i % len(evil)] for i in range(len(found[0].run.token_strings))]
    changed = [
        replace(
            one, run=replace(one.run, token_strings=strings, title=f"{evil[0]}{one.run.title}"),
            examples=tuple(replace(example, explanation=" ".join(evil)) for example in one.examples),
        )
        for one in found
    ]  # fmt: skip
    write_figures(firing_panel(changed), tmp_path)
    source = (tmp_path / "firing_examples.svg").read_text(encoding="utf-8")
    tree = ElementTree.fromstring(source)
    assert {element.tag.rpartition("}")[2] for element in tree.iter()} <= {
        "svg", "metadata", "RDF", "Work", "type", "format", "creator", "Agent", "title", "defs", "style", "g", "path",
        "text", "clipPath", "rect", "use", "tspan",
    }  # fmt: skip
    assert "<script" not in source
    said = "".join("".join(element.itertext()) for element in tree.iter() if element.tag.endswith("}text"))
    for shown in ("<script>", "]]>", "&lt;", "$x^2$", "U+0000U+202EU+D800", "\u21b5\u21e5"):
        assert shown in said
    assert (tmp_path / "firing_examples.png").stat().st_size > 10_000
