"""The list of a layer's neurons in a real Chromium: sorting, filters, keys, and its address."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fixtures.browsing import NEURONS, Visit, saved

from cratelm.activations.records import read_records
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.chunks import read_script

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


def shown_neurons(page: "Page") -> list[int]:
    """The neurons of the rows that are made, in order."""
    return [int(text) for text in page.locator(".neurons tbody th a").all_inner_texts()]


def test_the_list_sorts_as_numpy_does_and_has_few_rows(visit: Visit, runs: list[Path]) -> None:
    page = visit.open("#/crate-2l/layer/1")
    scores = Store.open(runs[0]).read_scores(1, "top-and-random").correlation.astype(np.float32)
    order = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")
    first = shown_neurons(page)
    assert first == order[: len(first)].tolist()
    assert len(first) < 60
    page.get_by_role("button", name="Density").click()
    density = read_records(runs[0], 1).statistics["density"]
    order = np.argsort(-density, kind="stable")
    assert shown_neurons(page)[:10] == order[:10].tolist()
    page.get_by_role("button", name="Density").click()
    assert page.locator("th", has_text="Density").get_attribute("aria-sort") == "ascending"
    assert shown_neurons(page)[:10] == np.argsort(density, kind="stable")[:10].tolist()
    page.locator(".list").evaluate("one => { one.scrollTop = one.scrollHeight; }")
    page.wait_for_function(
        f"() => document.querySelectorAll('.neurons tbody tr[aria-rowindex=\"{NEURONS + 1}\"]').length === 1"
    )
    assert shown_neurons(page)[-1] == np.argsort(density, kind="stable")[-1]
    assert page.get_attribute(".neurons", "aria-rowcount") == str(NEURONS + 1)


def test_filters_stay_in_the_address_and_up_returns_to_them(visit: Visit, runs: list[Path]) -> None:
    page = visit.open("#/crate-2l/layer/1")
    page.get_by_label("Score from").fill("70")
    page.get_by_label("to", exact=True).fill("90")
    page.wait_for_function("() => location.hash.includes('most=90')")
    scores = 100 * Store.open(runs[0]).read_scores(1, "top-and-random").correlation.astype(np.float32)
    expected = sorted(np.flatnonzero((scores >= 70) & (scores <= 90)).tolist(), key=lambda one: (-scores[one], one))
    assert page.inner_text(".total") == f"{len(expected)} of {NEURONS} neurons"
    address = page.url
    page.locator(".neurons tbody th a").nth(1).click()
    page.wait_for_selector("h1 small")
    assert page.url.endswith(f"#/crate-2l/layer/1/neuron/{expected[1]}")
    assert f"2 of {len(expected)} in the list" in page.inner_text(".steps")
    page.keyboard.press("j")
    page.wait_for_url(f"**/neuron/{expected[2]}")
    page.wait_for_function("() => document.querySelector('.steps').innerText.includes('3 of')")
    page.keyboard.press("k")
    page.wait_for_url(f"**/neuron/{expected[1]}")
    page.keyboard.press("u")
    page.wait_for_selector(".neurons")
    assert page.url == address
    page.go_back()
    page.wait_for_selector("h1 small")
    page.go_back()
    again = visit.open(address.partition("index.html")[2])
    assert again.inner_text(".total") == f"{len(expected)} of {NEURONS} neurons"
    name, content = saved(again, lambda: again.get_by_role("button", name="CSV of this list").click())
    rows = list(csv.DictReader(io.StringIO(content)))
    assert name == "crate-2l-layer-1.csv"
    assert [int(row["neuron"]) for row in rows] == expected


def test_states_and_words_filter_the_list(visit: Visit, site: Path) -> None:
    page = visit.open("#/crate-2l/layer/0?state=dead")
    assert shown_neurons(page) == [0]
    texts = [read_script(site / "data" / "m0" / "t0" / "l0" / f"texts-{number}.js") for number in range(2)]
    tokens, explanations = ([own for one in texts for own in one[part]] for part in ("tokens", "texts"))
    word = next(token.strip() for own in tokens for token in own if len(token.strip()) == 2)
    page.get_by_label("State").select_option("any")
    page.get_by_label("Token or word").fill(word.upper())
    page.wait_for_function("() => location.hash.includes('words=')")
    expected = [
        i
        for i in range(NEURONS)
        if any(word.lower() in text.lower() for text in (*tokens[i], *(text for text, _ in explanations[i])))
    ]
    assert page.inner_text(".total") == f"{len(expected)} of {NEURONS} neurons"
    assert set(shown_neurons(page)) <= set(expected)
    page.get_by_label("Token or word").fill("no such token anywhere")
    page.wait_for_selector(".empty:not([hidden])")
    assert "No neuron of this layer passes the filters" in page.inner_text("main")


def test_the_keyboard_chooses_and_opens_a_neuron_of_the_list(visit: Visit) -> None:
    page = visit.open("#/crate-2l/layer/1")
    order = shown_neurons(page)
    page.locator(".list").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    assert page.inner_text("tr.active th") == str(order[2])
    assert f"Neuron {order[2]}" in page.inner_text("#status")
    page.keyboard.press("End")
    assert page.get_attribute("tr.active", "aria-rowindex") == str(NEURONS + 1)
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/neuron/{order[0]}")


def test_a_row_shows_five_tokens_of_an_explanation_and_the_number_of_the_others(visit: Visit) -> None:
    page = visit.open("#/crate-2l/layer/1")
    tokens = [f" identifier{i}" for i in range(8)]
    text = (
        "fires on " + ", ".join(f'"{token}" (1)' for token in tokens) + "; up to 0.5 on 59 more tokens; on nothing else"
    )
    page.evaluate(
        """text => {
            cratelm.data.texts = async () => ({ tokens: [], texts: [{ text, sets: [] }] });
            document.querySelector(".neurons thead button").click();
        }""",
        text,
    )
    cell = page.locator(".neurons tbody td.text", has_text="identifier0").first
    assert cell.locator(".chip").all_inner_texts() == [f"␣{token.strip()}" for token in tokens[:5]]
    more = cell.locator("small")
    assert more.inner_text() == "+62"
    line = more.evaluate("element => parseFloat(getComputedStyle(element).fontSize)")
    box = more.bounding_box()
    assert box is not None
    assert box["height"] < 2 * line


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_explanations_and_every_sort(
    browser: "Browser", site: Path, runs: list[Path], width: int
) -> None:
    tab = Visit(browser, f"file://{site}", viewport={"width": width, "height": 800}, has_touch=True)
    page = tab.open("#/crate-2l/layer/1")
    page.wait_for_function("() => document.querySelector('.neurons tbody td.text').textContent")
    rows = page.locator(".neurons tbody tr[data-place]")
    for at in range(3):
        row, box = rows.nth(at).bounding_box(), rows.nth(at).locator("td.text").bounding_box()
        assert row is not None
        assert box is not None
        assert box["height"] > 10
        assert row["y"] <= box["y"] <= box["y"] + box["height"] <= row["y"] + row["height"] + 1
        neuron = int(rows.nth(at).locator("th").inner_text())
        text = Store.open(runs[0]).read_explanations(1, "top-and-random").get(neuron)
        first = page.evaluate("text => cratelm.text.lookupTable(text).tokens[0].token", text)
        chip = rows.nth(at).locator("td.text .chip").first.inner_text()
        assert chip == page.evaluate("token => cratelm.text.chip(token).innerText", first)
    heights = rows.evaluate_all("all => all.map((one) => one.getBoundingClientRect().height)")
    assert max(heights) - min(heights) < 1
    statistics = read_records(runs[0], 1).statistics
    for name, title in (("maximum", "Max"), ("kurtosis", "Kurtosis"), ("density", "Density")):
        button = page.locator(".neurons thead").get_by_role("button", name=title)
        box = button.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        button.click()
        values = statistics[name].astype(np.float32)
        order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")
        assert shown_neurons(page)[:5] == order[:5].tolist()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()
    assert tab.errors == []


def test_the_csv_button_of_a_wide_table_is_in_sight(browser: "Browser", site: Path) -> None:
    tab = Visit(browser, f"file://{site}", viewport={"width": 600, "height": 800})
    page = tab.open("#/")
    page.locator("details > summary").first.click()
    tables = page.locator("section.table")
    boxes = page.locator("section.table .scroll")
    wide = boxes.evaluate_all("all => all.filter((one) => one.scrollWidth > one.clientWidth).length")
    assert wide > 0
    for at in range(tables.count()):
        box = tables.nth(at).get_by_role("button", name="CSV").bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 600
    tab.close()
