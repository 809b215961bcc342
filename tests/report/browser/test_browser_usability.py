"""What makes the pages easy to use, in a real Chromium: Back, tab stops, sizes, contrast, short explanations."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fixtures.browsing import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PAGES = ("#/", "#/crate-2l/layer/1", "#/crate-2l/layer/1/neuron/85", "#/compare", "#/vote", "#/search?q=class")
NARROW = {"width": 390, "height": 800}


@pytest.mark.parametrize("question", ["zzzzzz", "class"])
def test_a_search_in_one_model_shows_no_null(visit: Visit, question: str) -> None:
    page = visit.open("#/crate-2l/layer/1")
    page.evaluate("async () => { (await cratelm.data.site()).models.length = 1; }")
    visit.go(f"#/search?q={question}")
    assert page.locator(".tabs").count() == 0
    assert not re.search(r"\bnull\b", page.inner_text("main"))


def test_back_returns_to_the_place_in_the_list(visit: Visit) -> None:
    page = visit.open("#/crate-2l/layer/1?least=10")
    page.locator(".list").evaluate("list => { list.scrollTop = 3000; }")
    page.wait_for_selector("tr[data-place='80']")
    page.evaluate("scrollTo(0, 300)")
    before = page.evaluate("[location.hash, scrollY, document.querySelector('.list').scrollTop]")
    assert before[1:] == [300, 3000]
    page.locator("tr[data-place='80'] td.text").evaluate("cell => cell.click()")
    page.wait_for_selector("h1 small")
    assert page.evaluate("scrollY") == 0
    page.go_back()
    page.wait_for_selector(".neurons")
    assert page.evaluate("[location.hash, scrollY, document.querySelector('.list').scrollTop]") == before
    assert page.get_attribute("tr.active", "data-place") == "80"
    page.go_forward()
    page.wait_for_selector("h1 small")
    page.keyboard.press("u")
    page.wait_for_selector(".neurons")
    assert page.evaluate("[location.hash, scrollY, document.querySelector('.list').scrollTop]") == before


SPLIT = """() => [...document.querySelectorAll(".excerpt:not(.predicted) span:not(.long)")]
    .filter((token) => new Set([...token.getClientRects()].map((box) => Math.round(box.top))).size > 1)
    .map((token) => token.textContent)"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_highlight_of_a_token_is_on_one_line(browser: "Browser", site: Path, width: int) -> None:
    tab = Visit(browser, f"file://{site}", viewport={"width": width, "height": 800})
    page = tab.open("#/crate-2l/layer/1/neuron/85")
    assert page.locator(".excerpt span[class]").count() > 20
    assert page.evaluate("document.querySelector('.excerpt').getBoundingClientRect().height") > 40
    assert page.evaluate(SPLIT) == []
    tab.close()


def test_a_neuron_is_not_compared_twice(visit: Visit) -> None:
    page = visit.open("#/compare?a=crate-2l/layer/0/neuron/259")
    for number in (2, 3, 4):
        page.wait_for_function("number => document.querySelectorAll('.slot').length === number", arg=number)
        if number < 4:
            page.get_by_role("button", name="Add a neuron").click()
    heads = page.locator(".slot h2").all_inner_texts()
    assert len(set(heads)) == 4
    assert page.get_by_role("button", name="Add a neuron").is_hidden()


def test_the_sides_of_a_vote_do_not_depend_on_the_width(browser: "Browser", site: Path) -> None:
    tab = Visit(browser, f"file://{site}", viewport=NARROW)
    page = tab.open("#/vote")
    page.wait_for_selector(".choice")
    assert page.locator(".card h2").all_inner_texts() == ["A", "B"]
    assert not re.search(r"\b(left|right)\b", page.inner_text("main"), re.IGNORECASE)
    tops = page.locator(".choice").evaluate_all("all => all.map((one) => one.getBoundingClientRect().top)")
    assert len(set(tops)) == 1
    tab.close()


SMALL = """() => [...document.querySelectorAll("button, select, input:not([type=checkbox]), summary," +
        "header a:not(.skip), .layers a, .near a, .ends a")]
    .map((one) => [one.textContent, one.getBoundingClientRect()])
    .filter(([, box]) => box.width && (box.height < 24 || box.width < 24))
    .map(([text, box]) => `${text} ${box.width} ${box.height}`)"""
CONTRAST = """() => {
    const luminance = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const page = luminance(getComputedStyle(document.body).backgroundColor);
    const controls = "input:not([type=checkbox]), select, .get:not(.off), .choice, .layers a";
    return [...document.querySelectorAll(controls)].map((one) => {
        const [low, high] = [luminance(getComputedStyle(one).borderTopColor), page].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    });
}"""


@pytest.mark.parametrize("address", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_are_large_enough_and_have_visible_borders(
    browser: "Browser", site: Path, address: str, scheme: str
) -> None:
    tab = Visit(browser, f"file://{site}", viewport=NARROW, color_scheme=scheme)
    page = tab.open(address)
    assert page.evaluate(SMALL) == []
    ratios = page.evaluate(CONTRAST)
    assert ratios
    assert min(ratios) >= 3
    tab.close()


def test_a_list_of_excerpts_is_one_tab_stop(visit: Visit) -> None:
    page = visit.open("#/crate-2l/layer/1/neuron/85")
    lists = page.locator(".excerpts")
    stops = lists.evaluate_all("all => all.map((list) => list.querySelectorAll('[tabindex=\"0\"]').length)")
    assert lists.first.locator(".excerpt").count() > 1
    assert stops == [1] * len(stops)
    lists.first.locator("[tabindex='0']").focus()
    active = "[...document.querySelectorAll('.excerpts .excerpt')].indexOf(document.activeElement.closest('.excerpt'))"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(active) == 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(active) == 0
    page.keyboard.press("ArrowUp")
    assert page.evaluate(active) == 0
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert not page.evaluate("document.querySelector('.excerpts').contains(document.activeElement)")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(active) == 1
    assert page.url.endswith("/neuron/85")


TOPS = """() => [...document.querySelectorAll("thead")].map((head) => new Set([...head.querySelectorAll("th")]
    .filter((cell) => cell.getClientRects().length).map((cell) => {
        const range = document.createRange();
        range.selectNodeContents(cell);
        return Math.round(Math.min(...[...range.getClientRects()].filter((box) => box.width).map((box) => box.top)));
    })).size).filter((heights) => heights !== 1)"""


@pytest.mark.parametrize("address", PAGES[:3])
def test_the_heads_of_a_table_begin_at_one_height(visit: Visit, address: str) -> None:
    page = visit.open(address)
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    assert page.locator("thead").count() > 0
    assert page.evaluate(TOPS) == []


def explanation_of(explainer: str, protocol: str, text: str) -> dict[str, object]:
    return {"text": text, "explainer": explainer, "sample": 0, "protocols": [protocol], "scores": []}


def test_nearly_equal_explanations_of_an_explainer_are_one_entry(visit: Visit) -> None:
    lookup = [
        'fires on " a" (2), "b" (1.5), "c" (1); on nothing else',
        'fires on "b" (2), " a" (1), "d" (1); on nothing else',
    ]
    texts = [
        explanation_of("lookup", "random-only", lookup[0]), explanation_of("lookup", "anthropic", lookup[1]),
        explanation_of("lookup", "other", 'fires on "z" (1); on nothing else'),
        explanation_of("llm", "first", "Words about boats, mostly."),
        explanation_of("llm", "second", "words about boats mostly"),
        explanation_of("llm", "third", "names of rivers"),
    ]  # fmt: skip
    page = visit.open()
    found = page.evaluate(
        """explanations => [...cratelm.cards.explanations({ explanations, judged: [] }).children]
            .map((entry) => [".explanation", "summary"].map((part) => entry.querySelector(part)?.textContent ?? ""))""",
        texts,
    )
    assert [variants for _, variants in found] == [
        "Nearly the same for anthropic",
        "",
        "Nearly the same for second",
        "",
    ]
    assert found[2][0] == "Words about boats, mostly."


@pytest.mark.parametrize(
    ("text", "tokens", "more"),
    [
        ('fires on " """" (0.68); on nothing else', [[' """', 0.68]], 0),
        ('fires on "), "" (1e-05), "," (1e-06); up to 0.5 on 1 more token; on nothing else',
         [['), "', 1e-5], [",", 1e-6]], 1),
        ('fires on "↵" (120), " a" (3); up to 2.5 on 90 more tokens; on nothing else', [["↵", 120], [" a", 3]], 90),
        ("does not fire in the excerpts it was explained from", None, None), ('fires on "a" sometimes', None, None),
    ],
)  # fmt: skip
def test_the_lookup_sentence_is_shown_as_tokens_with_bars(
    visit: Visit, text: str, tokens: list[list[object]] | None, more: int | None
) -> None:
    page = visit.open()
    table = page.evaluate("text => cratelm.text.lookupTable(text)", text)
    if tokens is None:
        assert table is None
        return
    assert [[entry["token"], entry["strength"]] for entry in table["tokens"]] == tokens
    assert table["more"] == more
    html = page.evaluate("text => cratelm.text.explanation(text).outerHTML", text)
    assert "fires on" not in html
    assert html.count('class="chip"') == html.count('class="meter"') == len(tokens)
