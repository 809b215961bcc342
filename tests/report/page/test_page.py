import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fixtures import synthetic
from report.tables.test_tables import change, scored_runs

from cratelm.activations.records import Excerpt, read_records
from cratelm.commands import interpret
from cratelm.interpretation.store.database import Store
from cratelm.report.contents import ReportContents
from cratelm.report.page import html as report_page
from cratelm.report.page.cards import excerpt_html
from cratelm.report.page.html import page, write_report
from cratelm.report.results.descriptions import display_name
from cratelm.report.results.firing import gather_firing
from cratelm.report.results.gather import Results, gather
from cratelm.report.sentences import verdict
from cratelm.report.shown_text import marked, prose

EVIL = "<script>alert('corpus')</script>"
VOID = {"meta", "br", "link", "img", "path", "use", "rect"}
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "article", "figure",
    "figcaption", "h1", "h2", "h3", "h4", "h5", "p", "a", "b", "i", "small", "span", "div", "ul", "li", "dl", "dt",
    "dd", "details", "summary", "table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "g", "defs", "path",
    "use", "clippath", "rect", "text", "tspan", "u",
}  # fmt: skip


class Reader(HTMLParser):
    """What a browser would find: tags, attributes, and the text inside each element of a class."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[tuple[str, str]] = []
        self.text: dict[str, list[str]] = {}
        self.titles: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        given = {key: value or "" for key, value in attrs}
        self.attributes += given.items()
        if tag not in VOID or (tag in ("path", "use", "rect") and not (self.get_starttag_text() or "").endswith("/>")):
            self.open.append((tag, given.get("class", "")))
            self.text.setdefault(given.get("class") or tag, []).append("")
        if tag == "span" and "title" in given:
            self.titles.append((given["class"], given["title"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for tag, kind in self.open:
            self.text[kind or tag][-1] += data


def written_page(runs: list[Path], out: Path) -> tuple[str, Reader]:
    source = write_report(ReportContents(gather(runs)), out).read_text(encoding="utf-8")
    return source, Reader(source)


def no_break(text: str) -> str:
    """The text as the page writes it."""
    for name in ("CRATE-2L", "GPT-2-2L"):
        text = text.replace(name, name.replace("-", "\u2011"))
    return text.replace(" %", "\u00a0%")


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> Results:
    return gather(scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l", "crate-2l-random"))


def test_the_page_asks_nothing_of_the_network_and_holds_no_script(tmp_path: Path, rng: np.random.Generator) -> None:
    source, reader = written_page(scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l"), tmp_path / "report")
    assert set(reader.tags) <= ALLOWED
    assert not reader.open
    for key, value in reader.attributes:
        assert not key.startswith("on")
        assert key not in ("style", "src", "srcset", "action", "xlink:href")
        if key in ("href", "clip-path"):
            assert value.startswith(("#", "url(#"))
    assert "@import" not in source
    assert "url(" not in "".join(reader.text["style"])
    assert len(source.encode()) < 3_000_000


@pytest.mark.usefixtures("quick_report")
def test_the_policy_allows_this_style_and_nothing_else(tmp_path: Path, rng: np.random.Generator) -> None:
    _, reader = written_page(scored_runs(tmp_path, rng, "crate-2l"), tmp_path / "report")
    [policy] = [value for _, value in reader.attributes if "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(reader.text["style"][0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert [key for key, _ in reader.attributes].count("http-equiv") == 1


def test_hostile_text_in_corpus_names_and_settings_is_shown_not_run(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "WORDS", [EVIL, "\"'><img src=x onerror=alert(1)>", "&lt;b&gt;", "]]>", "</style>"])
    run = synthetic.make_run(tmp_path / "evil", rng)
    change(run / "run.json", name=f"{EVIL}\"'&", origin={"commit": EVIL, "versions": {EVIL: EVIL}})
    change(run / "evaluation.json", split=EVIL)
    interpret.run(interpret.Options(runs=(run,)))
    source, reader = written_page([run], tmp_path / "report")
    assert set(reader.tags) <= ALLOWED
    assert not any(key.startswith("on") or key == "src" for key, _ in reader.attributes)
    assert f"{EVIL}\"'&" in reader.text["h1"]
    assert any("onerror=alert(1)" in text for text in reader.text["excerpt"])
    assert "<script" not in source


@pytest.mark.usefixtures("quick_report")
def test_every_excerpt_shows_its_tokens_and_every_coloured_token_its_activation(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l")
    results = gather(runs)
    [model] = results.models
    _, reader = written_page(runs, tmp_path / "report")
    both = [
        (excerpt, predicted)
        for run in gather_firing(results) for one in run.examples
        for excerpt, predicted in zip(one.excerpts, one.predicted, strict=True)
    ]  # fmt: skip
    assert both
    both += [
        (excerpt, np.zeros(len(excerpt.tokens), dtype=np.float32))
        for rank in ("best", "median", "worst")
        for one in model.examples
        if one.rank == rank
        for excerpt in (*one.scored, *one.explained)
    ]
    for (excerpt, _), shown in zip(both, reader.text["excerpt"], strict=True):
        text = "".join(model.token_strings[token] for token in excerpt.tokens)
        assert shown == text.replace("\n", "↵").replace("\t", "⇥")
    told = [
        f"{value:.3g}" + f", predicted {100 * share:.0f} % of the largest" * (share > 0)
        for excerpt, predicted in both
        for value, share in zip(excerpt.activations.tolist(), predicted.tolist(), strict=True)
        if value != 0 or share > 0
    ]
    assert [title for _, title in reader.titles] == told


def test_the_shade_of_a_token_is_its_activation_in_eighths_of_the_maximum(rng: np.random.Generator) -> None:
    maximum = float(rng.uniform(0.1, 50))
    activations = np.concatenate([[-0.1 * maximum, 0.0, 1e-6, maximum], rng.uniform(0, maximum, 40)])
    excerpt = Excerpt(
        tokens=np.arange(44), activations=activations.astype(np.float64), position=0, document=0
    )  # fmt: skip
    reader = Reader(excerpt_html(excerpt, maximum, [f"t{i} " for i in range(44)]))
    kinds = [kind for kind, _ in reader.titles]
    assert kinds[:3] == ["below", "h1", "h8"]
    assert kinds[3:] == [f"h{int(np.ceil(8 * value / maximum))}" for value in activations[4:]]
    assert "t1 " in reader.text["excerpt"][0]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n\n", "<b>↵</b><b>↵</b>"), ("\t", "<b>⇥</b>"), ("\u202e", "<b>U+202E</b>"), ("\x00", "<b>U+0000</b>"),
        ("\\xe2", "\\xe2"), (" the", " the"), ("\u00a0", "\u00a0"), ("<&\"'", "&lt;&amp;&quot;&#x27;"),
        ("日本", "日本"),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_written_out(token: str, shown: str) -> None:
    assert marked(token) == shown


def test_best_median_and_worst_are_those_of_the_scores(tmp_path: Path, rng: np.random.Generator) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l", neurons=20)
    [model] = gather([run]).models
    for layer in range(2):
        scores = Store.open(run).read_scores(layer, "top-and-random")
        order = sorted((-r, i) for i, r in enumerate(scores.correlation.tolist()) if r == r)
        chosen = {
            rank: [(-one.correlation, one.index) for one in model.examples if (one.rank, one.layer) == (rank, layer)]
            for rank in ("best", "median", "worst")
        }
        assert chosen["best"] == order[:3]
        assert chosen["worst"] == order[-2:]
        middle = (len(order) - 1) / 2
        assert [abs(order.index(one) - middle) <= 1 for one in chosen["median"]] == [True, True]
    for one in model.examples:
        records = read_records(run, one.layer)
        assert one.density == records.statistics["density"][one.index]
        assert one.maximum == records.statistics["maximum"][one.index]
        assert one.explanation == Store.open(run).read_explanations(one.layer, "top-and-random")[one.index]
        assert {excerpt.document % 2 for excerpt in one.explained} == {0}
        assert {excerpt.document % 2 for excerpt in one.scored} == {1}


def test_few_scored_neurons_are_shown_once_each(tmp_path: Path, rng: np.random.Generator) -> None:
    for neurons in range(3, 9):
        [run] = scored_runs(tmp_path / str(neurons), rng, "crate-1l", layers=1, neurons=neurons)
        [model] = gather([run]).models
        shown = [one.index for one in model.examples]
        assert len(shown) == len(set(shown)) == min(7, model.scores["top-and-random"].layers[0].scored)


def test_no_line_breaks_inside_a_models_name_or_before_a_per_cent_sign(pair: Results) -> None:
    reader = Reader(page(ReportContents(pair)))
    assert reader.text["h1"][0] == "CRATE\u20112L and GPT\u20112\u20112L"
    assert reader.text["title"] == ["CRATE-2L and GPT-2-2L"]
    first, *others = verdict(pair)
    assert reader.text["lead"] == [no_break(first)]
    assert {no_break(text) for text in others} <= set(reader.text["p"])
    for tag in ("h1", "h3", "lead", "p", "caption", "th", "td", "n", "figcaption", "dd"):
        shown = " ".join(reader.text[tag])
        assert " %" not in shown
        assert not re.search(r"(CRATE|GPT-?2)-2L", shown)
    assert "95\u00a0% interval" in " ".join(reader.text["n"])
    for arch in ("crate", "gpt2"):
        for size in ("1l", "2l", "3l", "s", "b"):
            title = display_name(f"{arch}-{size}")
            assert "-" not in prose(title)
            assert prose(f"my-{title}-run").startswith("my-")


def test_the_page_says_what_the_held_out_curve_and_compat_mode_are_not(pair: Results) -> None:
    captions = Reader(page(ReportContents(pair))).text["figcaption"]
    [caption] = [text for text in captions if text.startswith("Loss during training.")]
    assert "held-out curve is measured on a sample of the held-out tokens" in caption
    assert "full pass" in caption
    compat = replace(pair, mode="compat")
    details = Reader(report_page._method(compat)).text["dd"]
    assert any("excerpts of the released procedure" in text for text in details)


def test_neurons_without_a_score_are_counted_with_the_reason(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", neurons=3)
    _, reader = written_page(runs, tmp_path / "report")
    said = "0 of 6 neurons are scored on top-and-random; 6 have no score (dead 2, too rare 2, constant activations 2)."
    assert "Not scored on top-and-random." not in reader.text["p"]
    assert said in reader.text["p"]


def test_the_method_names_mode_seed_hashes_and_versions(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l")
    _, reader = written_page(runs, tmp_path / "report")
    facts = "\n".join(reader.text["facts"])
    for run in runs:
        collection = json.loads((run / "records" / "fixed" / "records.json").read_text())
        assert collection["model_hash"] in facts
        assert f"{collection['tokens']:,}" in facts
    assert re.search(r"numpy \d", facts)
    assert "fixed mode" in reader.text["dt"]


def test_dark_and_light_text_is_readable_on_every_shade() -> None:
    """WCAG's contrast ratio of at least 4.5, in both colour schemes."""
    css = Path(report_page.__file__).with_name("style.css").read_text()
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", css[: css.index("@media")]))
    dark_part = css[css.index("@media (prefers-color-scheme: dark)") : css.index("* { box-sizing")]
    dark = {**light, **dict(re.findall(r"--([\w-]+): (#\w{6})", dark_part))}

    def luminance(color: str) -> float:
        parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one: str, other: str) -> float:
        low, high = sorted([luminance(one), luminance(other)])
        return (high + 0.05) / (low + 0.05)

    for colors in (light, dark):
        for level in range(1, 9):
            text = colors["on-low"] if level <= 4 else colors["on-high"]
            assert contrast(text, colors[f"h{level}"]) >= 4.5
        assert contrast(colors["on-low"], colors["negative"]) >= 4.5
        for text in ("ink", "soft", "accent"):
            assert min(contrast(colors[text], colors[back]) for back in ("paper", "card", "shade")) >= 4.5
        levels = [abs(luminance(colors[f"h{level}"]) - luminance(colors["shade"])) for level in range(2, 9)]
        assert levels == sorted(levels)


def test_a_model_of_twelve_layers_stays_a_small_page(tmp_path: Path, rng: np.random.Generator) -> None:
    results = gather(scored_runs(tmp_path, rng, "crate-b", layers=12, neurons=8))
    [model] = results.models
    assert {one.layer for one in model.examples} == set(range(12))
    assert len(page(ReportContents(results)).encode()) < 1_500_000
