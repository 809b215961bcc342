"""The live browser in a real Chromium: try a text, steer, vote, search; hostile text; a server that stops."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fixtures.browsing import Visit
from fixtures.live_runs import NEURONS, live_runs
from fixtures.serving import Served, serve

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

EVIL = "<script>window.__ran=1</script><img src=x onerror='window.__ran=1'> \"'> {{1+1}}"
TRY = "#/try?model=crate-2l&text=the+neuron+code&steer=1/7:set:2.5"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, browser: object) -> list[Path]:
    assert browser is not None
    return live_runs(tmp_path_factory.mktemp("runs"), np.random.default_rng(12))


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[Served]:
    with serve(*runs) as found:
        yield found


def visit_to(browser: "Browser", server: Served, **context: object) -> Visit:
    return Visit(browser, server.address.rstrip("/"), **context)


@pytest.fixture
def tab(browser: "Browser", server: Served) -> Iterator[Visit]:
    found = visit_to(browser, server)
    yield found
    found.close()
    assert found.errors == []
    assert all(url.startswith((server.address, "about:", "blob:")) for url in found.asked)


def open_(tab: Visit, address: str) -> "Page":
    tab.page.set_default_timeout(40_000)  # the first request loads its model
    tab.page.goto("about:blank")
    tab.page.goto(f"{tab.home}/{address}")
    tab.page.wait_for_selector("main[data-shown]:not([aria-busy])")
    return tab.page


def test_a_text_shows_activations_and_a_neuron_along_it(tab: Visit) -> None:
    page = open_(tab, "")
    page.get_by_role("link", name="Try").click()
    page.get_by_label("Text", exact=True).fill("the sparse code")
    page.get_by_role("button", name="Show activations").click()
    page.wait_for_function("() => document.querySelectorAll('.token').length && location.hash.includes('sparse')")
    assert "".join(page.locator(".token").all_inner_texts()).replace("␣", " ").split() != []
    page.locator(".token").first.click()
    assert page.locator(".strongest h4").all_inner_texts() == ["Layer 0", "Layer 1"]
    page.locator(".layers-of button").first.click()
    page.wait_for_selector(".along .excerpt")
    page.get_by_role("button", name="Steer it").click()
    page.wait_for_selector(".change input[type=range]")
    page.wait_for_selector(".effect table")


def test_a_report_in_the_making_appears_when_it_is_ready(tab: Visit) -> None:
    asked = list[str]()

    def answer(route: "Route") -> None:
        asked.append(route.request.url)
        empty = {"format_version": 1, "sentences": [], "tables": [], "figures": [], "missing": []}
        if len(asked) < 3:
            route.fulfill(json=empty | {"making": "The report is being made."})
        else:
            route.continue_()

    tab.page.route("**/data/overview.json", answer)
    page = open_(tab, "")
    assert page.locator(".sentences [role=status]").inner_text() == "The report is being made."
    assert page.get_by_role("link", name="layer 1").count() > 0
    page.wait_for_selector("#numbers")
    page.wait_for_function("() => !document.querySelector('.sentences [role=status]')")
    assert len(asked) >= 3
    assert page.locator("table").count() > 1


def test_a_slider_changes_the_next_token_and_the_address(tab: Visit) -> None:
    page = open_(tab, TRY)
    page.wait_for_selector(".effect table")
    before = page.locator(".effect h3").inner_text()
    slider = page.get_by_label("Strength of neuron 7 of layer 1")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('.effect h3').textContent !== before", arg=before)
    assert "steer=1%2F7%3Aset%3A3.5" in page.url
    page.get_by_role("button", name="Remove neuron 7 of layer 1").click()
    page.wait_for_function("() => !document.querySelector('.change') && !document.querySelector('.effect table')")


def test_both_texts_are_generated_side_by_side(tab: Visit) -> None:
    page = open_(tab, TRY)
    page.wait_for_selector(".effect table")
    page.get_by_label("Tokens to generate").fill("12")
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("() => document.getElementById('status').textContent === 'Both texts are complete.'")
    plain, steered = page.locator(".written").all_inner_texts()
    assert plain.startswith("the neuron code")
    assert steered.startswith("the neuron code")
    assert plain != steered


def test_a_neurons_page_links_to_steering_and_back(tab: Visit) -> None:
    page = open_(tab, "#/crate-2l/layer/1/neuron/7")
    page.get_by_role("link", name="Steer it on your text").click()
    page.wait_for_selector(".change")
    assert page.locator(".change b").inner_text() == "1/7"
    page.go_back()
    page.wait_for_selector("#live")
    assert "Neuron 7" in page.locator("h1").inner_text()


def test_wrong_input_shows_an_error_message(browser: "Browser", server: Served) -> None:
    tab = visit_to(browser, server)
    page = open_(tab, f"#/try?model=crate-2l&text=the+neuron&steer=1/{NEURONS}:set:1")
    page.wait_for_selector(".effect .error")
    assert str(NEURONS - 1) in page.locator(".effect .error").inner_text()
    page.get_by_label("Text", exact=True).fill("code " * 300)
    page.get_by_role("button", name="Show activations").click()
    page.wait_for_selector(".activations .error")
    assert "at most" in page.locator(".activations .error").inner_text()
    tab.close()


def test_typed_and_linked_text_is_never_executed(tab: Visit) -> None:
    from urllib.parse import quote

    page = open_(tab, f"#/try?model={quote(EVIL)}&text={quote(EVIL[:40])}")
    page.wait_for_selector(".error")
    open_(tab, f"#/try?model=crate-2l&text={quote(EVIL[:40])}&steer={quote(EVIL)}")
    page.wait_for_selector(".token")
    page.get_by_role("button", name="Continue").click()
    page.wait_for_selector(".written")
    open_(tab, f"#/search?q={quote(EVIL)}")
    open_(tab, f"#/{quote(EVIL)}")
    assert page.evaluate("() => window.__ran") is None


def test_votes_are_shared_through_the_server(browser: "Browser", server: Served) -> None:
    first, second = visit_to(browser, server), visit_to(browser, server)
    before = len(server.ask("/api/votes").json["votes"])
    page = open_(first, "#/vote")
    page.get_by_role("button", name="No difference").click()
    page.wait_for_selector("button:has-text('Next pair')")
    assert len(server.ask("/api/votes").json["votes"]) == before + 1
    other = open_(second, "#/vote")
    assert "Votes on this server" in other.locator("main").inner_text()
    assert f"Export {before + 1}" in other.locator("main").inner_text()
    assert first.errors == second.errors == []
    first.close()
    second.close()


def test_search_shows_full_text_matches(tab: Visit, server: Served) -> None:
    word = str(server.ask("/api/search?q=fires").json["found"][0]["text"]).split()[0]
    page = open_(tab, f"#/search?q={word}")
    page.wait_for_selector(".full-text li")
    page.locator(".full-text a").first.click()
    page.wait_for_selector("#explained")


def test_an_explanation_on_request_is_shown_as_text_only(browser: "Browser", runs: list[Path]) -> None:
    pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
    from fakes.llm_server import Answer, Server, completion

    with (
        Server(lambda _path, _body: Answer(completion(f"boats {EVIL}"))) as llm,
        serve(runs[1], "--llm", llm.url) as one,
    ):
        tab = visit_to(browser, one)
        page = open_(tab, "#/gpt2-2l/layer/0/neuron/9")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector("section[aria-labelledby=ask] .explanation")
        assert "<script>" in page.locator("section[aria-labelledby=ask] .explanation").inner_text()
        assert page.evaluate("() => window.__ran") is None
        assert tab.errors == []
        tab.close()


def test_it_fits_a_narrow_screen_and_works_by_keyboard(browser: "Browser", server: Served) -> None:
    tab = visit_to(browser, server, viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = open_(tab, TRY)
    page.wait_for_selector(".effect table")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.get_by_label("Text", exact=True).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("sparse")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => location.hash.includes('text=sparse')")
    names = page.evaluate(
        "() => Array.from(document.querySelectorAll('main button, main input, main select, main textarea'),"
        " (one) => one.getAttribute('aria-label') || one.labels?.[0]?.textContent || one.textContent)"
    )
    assert all(name.strip() for name in names), json.dumps(names)
    assert tab.errors == []
    tab.close()


def test_the_list_of_a_layer_looks_as_in_a_folder(tab: Visit) -> None:
    page = open_(tab, "#/crate-2l/layer/1")
    page.wait_for_selector(".neurons td.tokens")
    shown = "() => getComputedStyle(document.querySelector('.neurons td.tokens')).display"
    assert page.evaluate(shown) == "table-cell"


def test_limits_are_explained_on_the_page(browser: "Browser", server: Served) -> None:
    tab = visit_to(browser, server)
    tab.page.route("**/search/directory.json", lambda route: route.fulfill(
        status=503, headers={"retry-after": "2"}, json={"error": "the search index has 1 of 4 layers so far"},
    ))  # fmt: skip
    page = open_(tab, "#/search?q=fires")
    assert page.locator(".error").first.inner_text().split("\n") == [
        "The search index has 1 of 4 layers so far.", "", "Try again in 2 s."
    ]  # fmt: skip
    panel = page.evaluate("() => cratelm.live.live({}, { place: { tap: { name: 'sae-mine' } } }).textContent")
    assert "cratelm steer --sae" in panel
    page = open_(tab, "#/try?model=none&text=the")
    assert "no model none to try" in page.locator(".error").inner_text()
    tab.close()


def test_a_server_that_stops_is_reported_on_the_page(browser: "Browser", runs: list[Path]) -> None:
    with serve(runs[0]) as dying:
        tab = visit_to(browser, dying)
        page = open_(tab, TRY)
        page.wait_for_selector(".effect table")
        dying.process.kill()
        dying.process.wait()
        page.get_by_role("button", name="Show activations").click()
        page.wait_for_selector(".activations .error")
        assert "cratelm serve" in page.locator(".activations .error").inner_text()
        page.get_by_role("button", name="Continue").click()
        page.wait_for_selector(".texts .error")
        tab.go("#/gpt2-2l/layer/0")
        assert page.locator(".error").count() > 0
        tab.close()
