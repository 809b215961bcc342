"""Scripts planted in corpus, tokens, explanations, names and settings: nothing runs, from disk and over http."""

import csv
import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fixtures import synthetic
from fixtures.browsing import Visit, served
from report.tables.test_tables import change
from tokenizers import Tokenizer

from cratelm.activations.records import records_folder
from cratelm.commands import interpret
from cratelm.interpretation.explainers.explanation import LayerExplanations
from cratelm.interpretation.lookup.tables import tables_of
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import write_explanations
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.browser.chunks import read_script
from cratelm.report.browser.site import write_site

if TYPE_CHECKING:
    from playwright.sync_api import Browser

RUN = "window.__ran = (window.__ran || 0) + 1"
EVIL = (
    f"<script>{RUN}</script>", f"<img src=x onerror='{RUN}'>", f"\"'><svg onload='{RUN}'>", f"javascript:{RUN}",
    f"</script><script>{RUN}</script>", f"');{RUN};//", "\u2028\u2029\u202e\u0000", "__proto__", "constructor",
    "<iframe srcdoc='<script>parent.__ran=1</script>'>", "=HYPERLINK(\"http://127.0.0.1:1/\",\"x\")", "${1+1}{{1+1}}",
)  # fmt: skip

REORDERS = "\u202edrawkcab\u200b\u0007"
"""The first reverses the order of what follows; and two invisible characters."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, browser: object) -> Path:
    """A site in which everything that comes from data is hostile."""
    assert browser is not None
    folder, rng = tmp_path_factory.mktemp("hostile"), np.random.default_rng(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cratelm.report.results.gather.RESAMPLES", 20)
        patch.setattr(synthetic, "WORDS", [*EVIL, "word"])
        patch.setattr(synthetic, "make_tokenizer", lambda _vocab: evil_tokenizer())
        run = synthetic.make_run(folder / "run", rng, neurons=40)
        name = f"{EVIL[0]}{REORDERS}/../__proto__"
        change(
            run / "run.json",
            name=name,
            arch=EVIL[1],
            of=EVIL[2],
            origin={"commit": EVIL[0], "versions": {EVIL[0]: EVIL[1]}},
        )
        change(run / "evaluation.json", split=EVIL[1])
        with ThreadPoolExecutor(1) as thread:  # the browser's event loop runs in this thread
            thread.submit(interpret.run, interpret.Options(runs=(run,))).result()
        store = Store.open(run)
        for layer in range(2):
            key = SetKey(layer=layer, protocol="top-and-random", explainer=EVIL[3])
            texts = tuple(EVIL[i % len(EVIL)] for i in range(40))
            made = LayerExplanations(
                neuron=np.arange(40), texts=texts, tables=tables_of([(np.empty(0), np.empty(0))] * 40)
            )
            write_explanations(store, key, made)
            store.write_scores(key, store.read_scores(layer, "top-and-random"))
        return write_site([run], folder / "site").parent


def evil_tokenizer() -> Tokenizer:
    """Every planted text is one token, so that it stands whole in excerpts, lists and the search index."""
    tokenizer = synthetic.Tokenizer(synthetic.models.BPE())
    tokenizer.pre_tokenizer = synthetic.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = synthetic.decoders.ByteLevel()
    trainer = synthetic.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(synthetic.pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([synthetic.SENTENCE], trainer)
    tokenizer.add_special_tokens([synthetic.END])
    tokenizer.add_tokens(list(EVIL))
    return tokenizer


def every_page(site: Path) -> list[str]:
    slug = read_script(site / "data" / "site.js")["models"][0]["slug"]
    neurons = [f"#/{slug}/layer/{layer}/neuron/{index}" for layer in (0, 1) for index in range(0, 40, 5)]
    words = ("%3Cscript", "__proto__", "constructor", "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    return [
        "#/", f"#/{slug}/layer/0", f"#/{slug}/layer/1?words=%3Cscript%3E&state=%3Cimg%3E", "#/compare", "#/vote",
        *neurons, *(f"#/search?q={word}" for word in words), "#/compare?a=%3Cscript%3E/layer/0",
        "#/javascript:window.__ran=1", "#/__proto__/layer/0",
    ]  # fmt: skip


ATTRIBUTES = """() => [...document.querySelectorAll("*")].flatMap((one) => [...one.attributes])
    .filter((one) => /^on/i.test(one.name)).map((one) => one.name)"""
UNSEEN = """() => {
    const unseen = /[\\p{Cc}\\p{Cf}\\p{Cs}\\p{Co}\\p{Cn}\\p{Zl}\\p{Zp}]/u;
    const texts = [document.title], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) texts.push(walk.currentNode.data);
    for (const one of document.querySelectorAll("[title]")) texts.push(one.title);
    for (const one of document.querySelectorAll("[aria-label]")) texts.push(one.getAttribute("aria-label"));
    return texts.filter((text) => text && text.trim() && unseen.test(text.replaceAll("\\n", "")));
}"""
SURVIVED = "() => ({}).x === undefined && Object.getPrototypeOf({}) === Object.prototype"
PLANTED = """run => {
    const inline = document.createElement("script");
    inline.textContent = run;
    document.body.append(inline);
    const holder = document.createElement("div");
    holder.innerHTML = `<img src=nothing onerror="${run}"><svg onload="${run}"></svg>
        <a id=bad href="javascript:${run}">x</a>`;
    document.body.append(holder);
    const outside = document.createElement("script");
    outside.src = "data:text/javascript," + encodeURIComponent(run);
    document.body.append(outside);
    document.getElementById("bad").click();
}"""
EVALUATED = """run => new Promise((resolve) => setTimeout(() => {
    try { resolve((0, eval)(run)); } catch { resolve("refused"); }
}))"""


def look_everywhere(tab: Visit, site: Path) -> None:
    """Open every page, focus excerpts, and check that nothing ran."""
    texts = ""
    for address in every_page(site):
        page = tab.open(address)
        page.wait_for_timeout(30)
        texts += page.inner_text("main")
        assert page.evaluate("window.__ran") is None
        assert page.locator("main script, main iframe, main img, main object, main embed, main style").count() == 0
        assert page.evaluate(ATTRIBUTES) == []
        assert page.evaluate(UNSEEN) == []
        assert page.evaluate(SURVIVED)
        for token in page.locator(".excerpt [tabindex='0']").all()[:2]:
            token.focus()
    assert tab.dialogs == []
    for planted in EVIL[:6]:
        assert planted in texts
    assert "U+202Edrawkcab" in texts
    assert "U+202Edrawkcab" in (site / "index.html").read_text(encoding="utf-8")
    assert not [url for url in tab.asked if "127.0.0.1:1/" in url]


def test_nothing_planted_runs_from_disk(browser: "Browser", hostile: Path) -> None:
    tab = Visit(browser, f"file://{hostile}")
    look_everywhere(tab, hostile)
    tab.close()
    assert tab.errors == []


def test_nothing_planted_runs_over_http(browser: "Browser", hostile: Path) -> None:
    with served(hostile) as home:
        tab = Visit(browser, home)
        look_everywhere(tab, hostile)
        tab.close()
    assert tab.errors == []
    assert all(url.startswith((home, "about:", "blob:")) for url in tab.asked)


@pytest.mark.parametrize("over_http", [False, True])
def test_the_policy_stops_what_the_page_itself_would_let_through(
    browser: "Browser", hostile: Path, *, over_http: bool
) -> None:
    """The second line of defence, tried by putting markup into the page as a mistake of ours would."""
    with served(hostile) as home:
        tab = Visit(browser, home if over_http else f"file://{hostile}")
        page = tab.open("#/")
        page.evaluate(PLANTED, RUN)
        assert page.evaluate(EVALUATED, RUN) == "refused"
        assert page.evaluate("fetch('data/site.js').then(() => 'sent', () => 'refused')") == "refused"
        page.wait_for_timeout(100)
        assert page.evaluate("window.__ran") is None
        tab.close()
    assert any("Content Security Policy" in error for error in tab.errors)


def test_no_cell_of_a_saved_table_is_a_formula(browser: "Browser", hostile: Path) -> None:
    tab = Visit(browser, f"file://{hostile}")
    slug = every_page(hostile)[1]
    page = tab.open(slug)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="CSV of this list").click()
    rows = list(csv.reader(io.StringIO(Path(waiting.value.path()).read_text(encoding="utf-8"))))
    assert len(rows) == 41
    texts = [cell for row in rows[1:] for cell in row if not is_number(cell)]
    assert any("HYPERLINK" in cell for cell in texts)
    assert not [cell for cell in texts if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    tab.close()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_names_from_data_are_in_no_file_name(hostile: Path) -> None:
    names = [path.relative_to(hostile).as_posix() for path in hostile.rglob("*")]
    allowed = (
        r"index\.html|cratelm-site\.json|viewer(/[a-z_]+\.(js|css|svg))?"
        r"|data(/(site|overview)\.js)?|data/search(/(\d+|directory)\.js)?"
    )
    assert [
        one for one in names if not re.fullmatch(rf"{allowed}|data/m\d+(/t\d+(/l\d+(/[a-z]+(-\d+)?\.js(on)?)?)?)?", one)
    ] == []
    assert records_folder(hostile, "fixed").exists() is False


def test_a_tap_with_a_hostile_name_is_one_more_tap(
    browser: "Browser", tmp_path: Path, rng: np.random.Generator
) -> None:
    run = synthetic.make_run(tmp_path / "run", rng)
    records: Any = records_folder(run, "fixed")
    (records / "neurons").rename(records / "<img src=x onerror=alert(1)>\u202e")
    site = write_site([run], tmp_path / "site").parent
    tab = Visit(browser, f"file://{site}")
    page = tab.open("#/crate-2l/layer/1/neuron/5")
    assert "<img src=x onerror=alert(1)>U+202E" in page.inner_text("h1")
    assert page.evaluate(UNSEEN) == []
    tab.close()
    assert tab.errors == []
