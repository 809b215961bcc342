"""Try a text in a real Chromium: late answers, cancelled continuations, any neuron along a text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fixtures.browsing import Visit
from fixtures.live_runs import live_runs
from fixtures.serving import Served, serve
from report.server.test_live_browser import TRY, open_, visit_to

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: object) -> Iterator[Served]:
    assert browser is not None
    with serve(*live_runs(tmp_path_factory.mktemp("runs"), np.random.default_rng(13))) as found:
        yield found


@pytest.fixture
def tab(browser: "Browser", server: Served) -> Iterator[Visit]:
    found = visit_to(browser, server)
    yield found
    found.close()
    assert found.errors == []


ENDLESS = """() => {
    const real = window.fetch;
    window.writing = [];
    window.fetch = (address, options = {}) => {
        if (!String(address).endsWith("api/continue")) return real(address, options);
        const said = (line) => new TextEncoder().encode(`${JSON.stringify(line)}\\n`);
        const body = new ReadableStream({ start(stream) {
            window.writing.push({ model: JSON.parse(options.body).model, signal: options.signal, say: (text) => {
                try { stream.enqueue(said({ plain: text, steered: text })); } catch { /* it was given up */ }
            } });
            options.signal.addEventListener("abort", () => stream.error(new DOMException("", "AbortError")));
        } });
        return Promise.resolve(new Response(body));
    };
}"""
"""Replaces the server's continuation by a stream that the test feeds through `window.writing`."""


def test_choosing_another_model_cancels_the_continuation(tab: Visit) -> None:
    page = open_(tab, TRY)
    page.wait_for_selector(".effect table")
    page.evaluate(ENDLESS)
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("() => window.writing.length === 1")
    page.evaluate("writing[0].say('of the first')")
    page.wait_for_selector(".written:has-text('of the first')")
    assert "CRATE-2L" in page.locator(".texts").inner_text()
    page.get_by_label("Model").select_option("GPT-2-2L")
    assert page.evaluate("writing[0].signal.aborted")
    page.evaluate("writing[0].say('too late')")
    assert page.locator(".written").count() == 0
    page.wait_for_selector(".activations:not([aria-busy]) .token")
    page.get_by_label("Neuron", exact=True).fill("7")
    page.get_by_role("button", name="Add").click()
    page.wait_for_selector(".effect table")
    assert page.locator(".written").count() == 0
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("() => window.writing.length === 2")
    page.evaluate("writing[1].say('of the second')")
    page.wait_for_selector(".written:has-text('of the second')")
    assert page.locator(".written").count() == 2
    assert page.evaluate("writing[1].model") == "gpt2-2l"
    assert "GPT-2-2L" in page.locator(".texts").inner_text()
    assert "too late" not in page.locator(".texts").inner_text()
    page.get_by_role("button", name="Stop").click()
    assert page.evaluate("writing[1].signal.aborted")
    page.get_by_role("button", name="Continue").wait_for()


def test_leaving_the_page_cancels_the_continuation(tab: Visit) -> None:
    page = open_(tab, TRY)
    page.evaluate(ENDLESS)
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("() => window.writing.length === 1")
    assert not page.evaluate("writing[0].signal.aborted")
    tab.go("#/crate-2l/layer/1")
    assert page.evaluate("writing[0].signal.aborted")


def test_a_late_answer_about_another_model_or_text_is_ignored(tab: Visit) -> None:
    page = open_(tab, "#/try?model=crate-2l&text=the+neuron")
    page.wait_for_selector(".activations:not([aria-busy]) .token")
    held: list[Any] = []

    def hold_the_first(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/api/activations", hold_the_first)
    page.get_by_label("Text", exact=True).fill("sparse code")
    page.get_by_role("button", name="Show activations").click()
    page.wait_for_selector(".activations[aria-busy]")
    page.get_by_label("Model").select_option("GPT-2-2L")
    page.wait_for_selector(".activations:not([aria-busy]) .token")
    now = page.locator(".activations").inner_html()
    [route] = held
    with page.expect_response(lambda answer: answer.request == route.request):
        route.fulfill(json={"tokens": ["late"], "layers": []})
    page.wait_for_timeout(100)
    assert page.locator(".activations").inner_html() == now
    with page.expect_request("**/api/activations") as asked:
        page.locator(".layers-of button").first.click()
    assert asked.value.post_data_json["model"] == "gpt2-2l"
    page.wait_for_selector(".along .excerpt")


def test_any_neuron_can_be_shown_along_the_text(tab: Visit, server: Served) -> None:
    """Also a neuron that is not among the strongest of any token; the address names it."""
    page = open_(tab, TRY)
    page.wait_for_selector(".activations:not([aria-busy]) .token")
    assert page.locator(".along .excerpt").count() == 0
    page.get_by_role("button", name="Show neuron 7 of layer 1 along the text").click()
    page.wait_for_selector(".along .excerpt")
    assert "along=1%2F7" in page.url
    again = open_(tab, page.url.removeprefix(f"{tab.home}/"))
    again.wait_for_selector(".along .excerpt")
    asked = {"model": "crate-2l", "text": "the neuron code"}
    for layer, neuron in ((1, 7), (0, 60)):
        again.get_by_label("Layer", exact=True).fill(str(layer))
        again.get_by_label("Neuron", exact=True).fill(str(neuron))
        again.locator(".add").get_by_role("button", name="Show it along the text").click()
        again.wait_for_selector(f".along h3:has-text('Neuron {neuron} of layer {layer} along the text')")
        values = server.post("/api/activations", asked | {"layer": layer, "neuron": neuron}).json["values"]
        box = again.locator(".along .excerpt span")
        assert box.count() == len(values)
        strongest = int(np.argmax(values))
        box.nth(strongest).hover()
        shown = np.float32(again.inner_text("#tip span").replace("\u2212", "-"))
        assert shown == np.float32(values[strongest])
    again.get_by_role("button", name="Close").click()
    assert again.locator(".along .excerpt").count() == 0
    assert "along" not in again.url


def test_a_neurons_page_shows_the_neuron_on_a_typed_text(tab: Visit) -> None:
    page = open_(tab, "#/crate-2l/layer/1/neuron/7")
    page.get_by_label("This neuron on your text").fill("sparse neuron")
    page.get_by_role("button", name="Show it along the text").click()
    page.wait_for_selector(".along h3:has-text('Neuron 7 of layer 1')")
    assert page.get_by_label("Text", exact=True).input_value() == "sparse neuron"
    assert page.locator(".change").count() == 0


def test_a_neuron_along_the_text_has_the_colours_of_its_largest_recorded_activation(tab: Visit) -> None:
    page = open_(tab, f"{TRY}&along=1/7")
    page.wait_for_selector(".along .excerpt")
    legend = page.locator(".along .legend").inner_text().split("\n")[0:2]
    page = open_(tab, "#/crate-2l/layer/1/neuron/7")
    assert page.locator(".legend").first.inner_text().split("\n")[0:2] == legend


def test_the_strongest_neurons_of_a_layer_are_one_in_a_row(tab: Visit) -> None:
    page = open_(tab, TRY)
    page.wait_for_selector(".layers-of li")
    rows = page.locator(".layers-of ol").first.locator("li")
    tops = rows.evaluate_all("all => all.map((one) => one.getBoundingClientRect().top)")
    assert len(tops) > 1
    assert tops == sorted(set(tops))
