"""The blind vote in a real Chromium: what it hides until the choice, and what it stores."""

import json
import re

import pytest
from fixtures.browsing import Visit, saved


def test_a_blind_vote_is_stored_and_exported(visit: Visit) -> None:
    page = visit.open("#/vote")
    page.wait_for_selector(".choice")
    assert page.locator(".card h2").all_inner_texts() == ["A", "B"]
    assert "2L" not in page.inner_text(".side")
    page.keyboard.press("1")
    page.wait_for_selector(".card.won h2 a")
    names = page.locator(".card h2").all_inner_texts()
    assert all("2L" in name for name in names)
    page.keyboard.press("n")
    page.wait_for_function("() => !document.querySelector('.won')")
    page.get_by_role("button", name="No difference").click()
    page.wait_for_selector("text=Export 2 as JSON")
    page = visit.open("#/vote")
    name, content = saved(page, lambda: page.get_by_role("button", name="Export").click())
    votes = json.loads(content)["votes"]
    assert (name, [one["choice"] for one in votes]) == ("votes.json", ["a", "same"])
    assert votes[0]["a"].startswith("crate-2l/" if names[0].startswith("CRATE") else "gpt2-2l/")
    assert len(votes[0]["explanations"]) == 2


SHOWN_AND_READ_OUT = """() => {
    const side = document.querySelector(".side"), tips = [];
    for (const token of side.querySelectorAll("[data-at]")) {
        token.focus();
        tips.push(document.querySelector("#tip span").textContent);
    }
    return { html: side.outerHTML, tips };
}"""


def test_a_blind_vote_shows_no_activation_in_the_models_units(visit: Visit) -> None:
    """Their size alone would name the model, as would a scale that goes below 0. The made-up text has no numbers."""
    strengths = 0
    for _ in range(6):
        page = visit.open("#/vote")
        page.wait_for_selector(".choice")
        shown = page.evaluate(SHOWN_AND_READ_OUT)
        assert {re.sub(r"^(100|\d\d?) %$", "", tip) for tip in shown["tips"]} == {""}
        assert set(shown["tips"]) > {"0 %"}
        assert re.findall(r"\d\.\d|\d+e[+-]\d", shown["html"]) == []
        assert 'class="b' not in shown["html"]
        written = page.locator(".side .strength small").all_inner_texts()
        strengths += len(written)
        assert all(re.fullmatch(r"\d+ %", text) for text in written)
        assert page.locator(".side .legend").all_inner_texts()[0].split("\n")[0] == "0"
    assert strengths


@pytest.mark.parametrize("low", [-3.0, 0.0])
def test_a_blind_vote_is_in_units_of_the_neurons_largest_activation(visit: Visit, low: float) -> None:
    page = visit.open("#/vote")
    neuron = {
        "statistics": {"maximum": 1.6, "minimum": low},
        "excerpts": [{"kind": "top", "items": [{"values": [1.6, 0.8, 0, low, 0.001], "predicted": [1, 1, 1, 1, 1]}]}],
    }
    shown = page.evaluate("neuron => JSON.parse(JSON.stringify(cratelm.blindly.anonymous(neuron)))", neuron)
    assert shown["statistics"] == {"maximum": 1, "minimum": 0}
    assert shown["excerpts"][0]["items"] == [{"values": [1, 0.5, 0, 0, 0], "predicted": None}]
    neuron["statistics"] = {"maximum": low, "minimum": low}
    shown = page.evaluate("neuron => JSON.parse(JSON.stringify(cratelm.blindly.anonymous(neuron)))", neuron)
    assert shown["excerpts"][0]["items"][0]["values"] == [0] * 5


def test_strengths_of_an_explanation_are_in_per_cent_in_a_blind_vote(visit: Visit) -> None:
    page = visit.open("#/vote")
    write = "text => cratelm.text.explanation(text, { write: (strength) => `${50 * strength} %` }).textContent"
    for text, expected in (
        ('fires on " return" (1.6), "(2)" (1e-01); up to 0.04 on 12 more tokens; on nothing else',
         "␣return80 %(2)5 %at most 2 % on 12 other tokens"),
        ('fires on "a" (2); on nothing else', "a100 %"),
        ("words about boats (7) and up to 3 on them", "words about boats (7) and up to 3 on them"),
    ):  # fmt: skip
        assert page.evaluate(write, text) == expected


def test_a_browser_without_storage_still_votes_and_warns(visit: Visit) -> None:
    refuse = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    visit.page.add_init_script(refuse)
    page = visit.open("#/vote")
    page.get_by_role("button", name="B is better").click()
    page.wait_for_selector("text=Export 1 as JSON")
    assert "stores nothing" in page.inner_text("main")
    page.keyboard.press("t")
    assert page.get_attribute("html", "data-theme") == "light"
