"""The pages of a site in a real Chromium, from disk and over http: what a reader does, and what can fail."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import pytest
from fixtures.browsing import Visit, saved, served
from safetensors.numpy import load_file

from cratelm.activations.records import layer_file, read_records
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.browser.chunks import as_script, read_script

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_the_overview_shows_models_tables_and_figures(visit: Visit, site: Path) -> None:
    page = visit.open()
    assert page.inner_text("h1") == "CRATE-2L and GPT-2-2L"
    assert page.locator(".models li").count() == 3
    assert page.locator(".models a[href='#/crate-2l/sae-demo/layer/0']").count() == 1
    overview = read_script(site / "data" / "overview.js")
    assert page.locator(".sentences p").all_inner_texts() == overview["sentences"]
    assert page.locator("table").count() == len(overview["tables"])
    table = page.locator("section.table").first
    name, content = saved(page, lambda: table.get_by_role("button", name="CSV").click())
    assert (name, content) == ("summary.csv", overview["tables"][0]["csv"])
    head = table.locator("th", has_text="random-only")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    values = [
        text.split("[")[0].replace("\u2212", "-")
        for text in table.locator("tbody tr td:nth-child(3)").all_inner_texts()
    ]
    assert [float(value) for value in values] == sorted(map(float, values), reverse=True)
    figure = page.locator("figure", has=page.locator(".figure-scores"))
    name, content = saved(page, lambda: figure.get_by_role("button", name="SVG").click())
    drawing = ElementTree.fromstring(content)
    assert name == "scores.svg"
    assert {one.tag.rpartition("}")[2] for one in drawing.iter()} <= {
        "svg", "g", "defs", "path", "use", "clipPath", "rect", "text", "tspan"
    }  # fmt: skip


def test_a_neuron_shows_the_exact_value_of_every_token(visit: Visit, runs: list[Path]) -> None:
    page = visit.open("#/crate-2l/layer/1/neuron/85")
    record = read_records(runs[0], 1)[85]
    excerpt = record.excerpts[64, "explain", "top"][0]
    box = page.locator(".excerpt").first
    assert box.locator("span").count() == len(excerpt.tokens)
    for at in (0, int(np.argmax(excerpt.activations)), len(excerpt.tokens) - 1):
        box.locator("span").nth(at).hover()
        shown = page.inner_text("#tip span").replace("\u2212", "-")
        assert np.float32(shown) == np.float32(excerpt.activations[at])
    peak = box.locator("[tabindex='0']")
    peak.focus()
    assert int(peak.get_attribute("data-at") or -1) == int(np.argmax(excerpt.activations))
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.at") == "1"
    assert np.float32(page.inner_text("#tip span").replace("\u2212", "-")) == np.float32(excerpt.activations[1])
    assert page.url.endswith("/neuron/85")


def test_spaces_of_a_token_are_visible(visit: Visit) -> None:
    page = visit.open()
    for token, shown in (
        (" the", "␣the"), ("\n    ", "↵␣␣␣␣"), ("\n" + " " * 12, "↵␣×12"), (" x ", "␣x␣"), ("a b", "a b"), ("  ", "␣␣"),
    ):  # fmt: skip
        assert page.evaluate("token => cratelm.text.chip(token).textContent", token) == shown


def test_the_state_of_a_dead_neuron_is_a_sentence(visit: Visit) -> None:
    page = visit.open("#/crate-2l/layer/0/neuron/0")
    assert "it never fired in the collected text" in page.inner_text(".state")
    page = visit.go("#/crate-2l/sae-demo/layer/0/neuron/7")
    assert page.inner_text("h1 small") == "CRATE-2L, sae-demo, layer 0"
    assert "cratelm interpret crate-2l" in page.inner_text("main")
    assert "cratelm directions crate-2l" in page.inner_text("aside")


def test_a_neuron_is_downloaded_as_json(visit: Visit, runs: list[Path]) -> None:
    page = visit.open("#/crate-2l/layer/1/neuron/85")
    name, content = saved(page, lambda: page.get_by_role("button", name="JSON").click())
    found = json.loads(content)
    assert (name, found["layer"], found["index"]) == ("crate-2l-layer-1-neuron-85.json", 1, 85)
    excerpt = read_records(runs[0], 1)[85].excerpts[64, "explain", "top"][0]
    assert np.array_equal(np.array(found["excerpts"][0]["activations"], np.float32), excerpt.activations)


def test_a_switch_shows_predictions_below_the_excerpts(visit: Visit, runs: list[Path]) -> None:
    page = visit.open("#/crate-2l/layer/1/neuron/85")
    assert page.locator(".predicted").first.is_hidden()
    page.get_by_label("predicts below each scored excerpt (top-and-random, lookup)").check()
    assert page.locator(".predicted:visible").count() == 10
    _, simulation, _ = Store.open(runs[0]).read_neuron(SetKey(layer=1, protocol="top-and-random"), 85)
    assert simulation is not None
    box = page.locator("h3", has_text="Random").locator("xpath=following-sibling::div[1]").locator(".excerpt").first
    at = int(np.argmax(simulation.activations[:64]))
    box.locator("span").nth(at).hover()
    shown = page.inner_text("#tip i").removeprefix("predicted ")
    assert float(shown) == pytest.approx(float(simulation.activations[at]), rel=0.02)
    page = visit.open("#/crate-2l/layer/1/neuron/86")
    assert page.get_by_label("what the explanation predicts").is_checked()


def test_a_neurons_page_has_the_panels_of_the_servers_capabilities(visit: Visit) -> None:
    page = visit.open("#/crate-2l/layer/1/neuron/85")
    page.evaluate("""async () => {
        const panel = (name) => (site, neuron) => cratelm.h("section", { class: "panel" }, `${name} ${neuron.index}`);
        cratelm.live = { steer: panel("steer"), explain: panel("explain") };
        (await cratelm.data.site()).capabilities.steer = true;
    }""")
    visit.go("#/crate-2l/layer/1/neuron/84")
    assert page.locator(".panel").all_inner_texts() == ["steer 84"]


def test_compared_neurons_are_part_of_the_address(visit: Visit) -> None:
    page = visit.open("#/compare")
    assert page.locator(".slot").count() == 3
    page.get_by_role("button", name="Remove").last.click()
    page.wait_for_function("() => document.querySelectorAll('.slot').length === 2")
    page.get_by_label("Neuron", exact=True).first.fill("17")
    page.get_by_label("Neuron", exact=True).first.press("Enter")
    page.wait_for_function("() => document.querySelector('.slot h2').innerText.includes('neuron 17')")
    heads = page.locator(".slot h2").all_inner_texts()
    again = visit.open(page.url.partition("index.html")[2])
    assert again.locator(".slot h2").all_inner_texts() == heads
    page = visit.open("#/compare?a=crate-2l/layer/0/neuron/99999&b=nowhere/layer/0")
    assert page.locator(".slot .error").count() == 2


def test_search_finds_tokens_and_words_by_their_beginning(visit: Visit, site: Path) -> None:
    texts = [read_script(site / "data" / "m0" / "t0" / "l0" / f"texts-{number}.js") for number in range(2)]
    tokens = [own for one in texts for own in one["tokens"]]
    word = max((token.strip() for own in tokens for token in own if token.strip().isalpha()), key=len)[:3].lower()
    page = visit.open()
    page.keyboard.press("/")
    page.keyboard.type(word.upper())
    page.keyboard.press("Enter")
    page.wait_for_selector(".results li")
    assert page.url.endswith(f"#/search?q={word.upper()}")
    while page.get_by_role("button", name="Show more").is_visible():
        shown = page.locator(".results li").count()
        page.get_by_role("button", name="Show more").click()
        page.wait_for_function("shown => document.querySelectorAll('.results li').length > shown", arg=shown)
    links = page.locator(".results a").evaluate_all("all => all.map((one) => one.getAttribute('href'))")
    known = {i for i, own in enumerate(tokens) if any(token.strip().lower().startswith(word) for token in own)}
    assert {f"#/crate-2l/layer/0/neuron/{one}" for one in known} <= set(links)
    assert len(links) == len(set(links))
    both = next(
        own for own in tokens if len({token.strip() for token in own}) > 2 and all(token.strip() for token in own[:2])
    )
    page = visit.go("#/search?q=" + quote(f"{both[0].strip()} {both[1].strip()}"))
    links = page.locator(".results a").evaluate_all("all => all.map((one) => one.getAttribute('href'))")
    assert f"#/crate-2l/layer/0/neuron/{tokens.index(both)}" in links
    assert "No neuron has a token or an explanation with these words" in visit.go("#/search?q=zzzzzz").inner_text(
        "main"
    )
    assert "No neuron" in visit.go("#/search?q=__proto__").inner_text("main")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("#/nowhere/layer/0", "This site has no model nowhere."),
        ("#/crate-2l/layer/9", "This site has no layer 9 of CRATE-2L."),
        ("#/crate-2l/layer/1/neuron/260", "This layer has no neuron 260; it has neurons 0 to 259."),
        ("#/crate-2l/sae-none/layer/0", "has no records of the tap sae-none"),
        ("#/crate-2l/layer/1/neuron/x", "This address does not exist"),
        ("#/__proto__/constructor", "This site has no model __proto__."), ("#/%E0%A4%A", "This site has no model"),
    ],
)  # fmt: skip
def test_a_wrong_address_shows_an_error_message(visit: Visit, address: str, message: str) -> None:
    page = visit.open(address)
    assert message in page.inner_text(".error")
    page.get_by_role("link", name="To the overview").click()
    page.wait_for_selector(".models")


def test_a_missing_newer_or_foreign_chunk_shows_an_error_message(
    browser: "Browser", site: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    layer = copy / "data" / "m0" / "t0" / "l1"
    (layer / "neurons-1.js").unlink()
    (layer / "neurons-2.js").write_bytes(
        as_script("m0/t0/l1/neurons-2", {}).replace(b'"format_version":1', b'"format_version":9')
    )
    (layer / "neurons-3.js").write_text("not a chunk")
    shutil.copyfile(copy / "data" / "m0" / "t0" / "l0" / "neurons-4.js", layer / "neurons-4.js")
    foreign = as_script("m0/t0/l1/neurons-5", read_script(copy / "data" / "m0" / "t0" / "l0" / "neurons-5.js"))
    (layer / "neurons-5.js").write_bytes(foreign)
    tab = Visit(browser, f"file://{copy}")
    for chunk, message in (
        (1, "is missing or cannot be read"), (2, "has format version 9, this page reads up to 1"),
        (3, "contains something else"), (4, "contains something else"), (5, "belongs to crate-2l, neurons, layer 0"),
    ):  # fmt: skip
        page = tab.open(f"#/crate-2l/layer/1/neuron/{16 * chunk}")
        assert message in page.inner_text(".error")
    page = tab.open("#/crate-2l/layer/1/neuron/0")
    assert page.inner_text("h1").startswith("Neuron 0")
    (copy / "data" / "overview.js").unlink()
    assert "data/overview.js is missing" in tab.open().inner_text("main")
    (copy / "data" / "site.js").unlink()
    assert "data/site.js is missing" in tab.open().inner_text("main")
    tab.close()


def test_chunks_beyond_the_limit_load_at_once_and_again(browser: "Browser", tmp_path: Path, site: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    names = [f"many/{number}" for number in range(150)]
    (copy / "data" / "many").mkdir()
    for name in names:
        (copy / "data" / f"{name}.js").write_bytes(as_script(name, {"name": name}))
    tab = Visit(browser, f"file://{copy}")
    page = tab.open("#/vote")
    found = page.evaluate(
        """async (names) => {
            const asked = [...names, ...names.slice(0, 20), "many/none", ...names.toReversed()];
            const all = await Promise.allSettled(asked.map((name) => cratelm.data.chunk(name)));
            const again = await cratelm.data.chunk(names[0]);
            return [...all.map((one) => one.value?.name ?? one.reason.message), again.name];
        }""",
        names,
    )
    missing = "data/many/none.js is missing or cannot be read."
    assert found == [*names, *names[:20], missing, *reversed(names), names[0]]
    assert len([url for url in tab.asked if "/data/many/" in url]) <= len(names) + 2
    tab.close()


PAGES = ("#/", "#/crate-2l/layer/1", "#/gpt2-2l/layer/0/neuron/5", "#/compare", "#/vote", "#/search?q=class")


@pytest.mark.parametrize("address", PAGES)
def test_nothing_is_wider_than_a_narrow_screen(browser: "Browser", site: Path, address: str) -> None:
    tab = Visit(browser, f"file://{site}", viewport={"width": 360, "height": 740}, has_touch=True)
    page = tab.open(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    tab.close()
    assert tab.errors == []


NAMELESS = """() => [...document.querySelectorAll("button, a, input, select, [role=region], [role=img]")]
    .filter((one) => !(one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length))
    .map((one) => one.outerHTML)"""
DOUBLE_IDS = """() => {
    const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
    return ids.length - new Set(ids).size;
}"""


@pytest.mark.parametrize("address", PAGES)
def test_every_page_has_landmarks_names_and_one_first_heading(visit: Visit, address: str) -> None:
    page = visit.open(address)
    assert page.locator("h1").count() == 1
    assert page.locator("main").count() == 1
    assert page.title().endswith("cratelm")
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(DOUBLE_IDS) == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()


def test_the_theme_follows_the_system_and_a_choice_is_remembered(browser: "Browser", site: Path) -> None:
    tab = Visit(browser, f"file://{site}", color_scheme="dark")
    page = tab.open()
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(20, 23, 27)"
    page.get_by_role("button", name="Theme").click()
    assert page.evaluate(colour) == "rgb(251, 250, 248)"
    page = tab.open("#/crate-2l/layer/0")
    assert page.evaluate(colour) == "rgb(251, 250, 248)"
    page.get_by_role("button", name="Theme").click()
    assert page.evaluate(colour) == "rgb(20, 23, 27)"
    tab.close()


def test_activations_below_0_are_blue_in_the_same_unit(browser: "Browser", site: Path, runs: list[Path]) -> None:
    tab = Visit(browser, f"file://{site}")
    page = tab.open("#/gpt2-2l/layer/0/neuron/5")
    levels = page.evaluate("[-1, -0.01, 0, 0.01, 1].map((value) => cratelm.excerpts.shade(value, 1))")
    assert levels == ["b8", "b1", "", "h1", "h8"]
    assert load_file(layer_file(runs[1], "fixed", "neurons", 0))["minimum"][5] >= 0
    tab.close()


def test_the_same_folder_works_over_http(browser: "Browser", site: Path) -> None:
    with served(site) as home:
        tab = Visit(browser, home)
        for address in PAGES:
            page = tab.open(address)
            assert page.locator(".error").count() == 0
        tab.close()
        assert tab.errors == []
        assert {url.partition("/index.html")[0].partition("/viewer")[0].partition("/data")[0] for url in tab.asked} <= {
            home,
            "about:blank",
        }
