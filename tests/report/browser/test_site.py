"""The folder itself: what is in its files, that it is whole, renewed and resumed, and how large it is."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import synthetic
from report.browser.test_chunks import unpack_sparse
from report.tables.test_tables import change, scored_runs

from cratelm import cli
from cratelm.activations.records import read_records
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.browser import site
from cratelm.report.browser.catalogue import all_layers, catalogue, slug
from cratelm.report.browser.chunks import read_script, unpack
from cratelm.report.browser.overview import overview, public
from cratelm.report.browser.site import write_site
from cratelm.report.server.chunk_cache import Chunks
from cratelm.rundir import write_json

pytestmark = pytest.mark.usefixtures("quick_report")


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("CRATE 2L", [], "crate-2l"), ("../../etc", [], "etc"), ("<script>", [], "script"), ("日本", [], "model"),
        ("search", [], "search-model"), ("a", ["a", "a-2"], "a-3"),
        ("__proto__", [], "__proto__"), ("x" * 99, [], "x" * 60),
    ],
)  # fmt: skip
def test_a_slug_is_short_plain_and_unlike_the_others(name: str, taken: list[str], expected: str) -> None:
    assert slug(name, taken) == expected


def test_every_neuron_is_there_as_the_run_has_it(tmp_path: Path, rng: np.random.Generator) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l", neurons=20)
    data = write_site([run], tmp_path / "out").parent / "data"
    records, store = read_records(run, 1), Store.open(run)
    for index in range(20):
        chunk = read_script(data / f"m0/t0/l1/neurons-{index // 16}.js")
        found = chunk["neurons"][index - chunk["start"]]
        record = records[index]
        assert found["index"] == index
        assert found["statistics"]["density"] == pytest.approx(record.statistics["density"], rel=1e-5)
        said = [one for one in found["explanations"] if one["text"] is not None]
        texts = {protocol: one["text"] for one in said for protocol in one["protocols"]}
        for protocol in ("top-and-random", "random-only", "anthropic"):
            assert texts.get(protocol) == store.read_explanations(1, protocol).get(index)
            [score] = [
                score for one in found["explanations"] for score in one["scores"] if score["protocol"] == protocol
            ]  # fmt: skip
            scores = store.read_scores(1, protocol)
            assert score["reason"] == scores.reason[index]
            assert np.isnan(scores.correlation[index]) == (score["correlation"] is None)
            if score["correlation"] is not None:
                assert score["correlation"] == pytest.approx(scores.correlation[index], rel=1e-5)
        strings = site.records_strings(run, "fixed")
        for group in found["excerpts"]:
            expected = record.excerpts[64, group["part"], group["kind"]]
            if group["kind"] != "quantile":
                expected = expected[: len(group["items"])]
            else:
                expected = expected[::2]
            for item, excerpt in zip(group["items"], expected, strict=True):
                ids = np.frombuffer(base64.b64decode(item["tokens"]), "<u2")
                assert [chunk["strings"][one] for one in ids] == [strings[token] for token in excerpt.tokens]
                assert np.array_equal(unpack_sparse(item["values"], len(ids)), excerpt.activations)
                assert (item["position"], item["document"]) == (excerpt.position, excerpt.document)


def test_what_an_explanation_predicts_stands_with_the_excerpts_it_was_scored_on(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l", neurons=16)
    data = write_site([run], tmp_path / "out").parent / "data"
    assert read_script(data / "m0/t0/l1/layer.js")["predicted"]["protocol"] == "top-and-random"
    simulations = Store.open(run).simulations(SetKey(layer=1, protocol="top-and-random"))
    for found in read_script(data / "m0/t0/l1/neurons-0.js")["neurons"]:
        groups = {(group["kind"], group["part"]): group["items"] for group in found["excerpts"]}
        shown = [item for kind in ("random", "top") for item in groups.get((kind, "score"), [])[:5]]
        there = [item["predicted"] for item in shown if "predicted" in item]
        if found["index"] not in simulations.neuron:
            assert there == []
            continue
        values = np.concatenate([unpack({"u8": one["u8"]}) / 255 * one["largest"] for one in there])
        expected = simulations.of(int(np.flatnonzero(simulations.neuron == found["index"])[0]))
        assert np.abs(values - expected).max() <= max(one["largest"] for one in there) / 255
        assert all("predicted" not in item for item in groups["top", "explain"])


def test_light_and_dark_text_is_readable_on_every_shade() -> None:
    """WCAG's contrast ratio: at least 4.5 for text, 3 for the borders of controls, in both colour schemes."""
    css = (site.VIEWER / "viewer.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    for colors in ({name: light for name, light, _ in pairs}, {name: dark for name, _, dark in pairs}):
        for back in ("paper", "card"):
            assert contrast(colors["edge"], colors[back]) >= 3, back
        for text, backs in {
            "ink": ["paper", "card", "shade", "mark"], "soft": ["paper", "card", "shade"], "accent": ["paper", "card"],
            "paper": ["ink"], "on-low": [f"{hue}{level}" for hue in "hb" for level in range(1, 5)] + ["shade"],
            "on-high": [f"{hue}{level}" for hue in "hb" for level in range(5, 9)],
        }.items():  # fmt: skip
            for back in backs:
                assert contrast(colors[text], colors[back]) >= 4.5, (text, back, contrast(colors[text], colors[back]))
        for hue in "hb":
            distance = [abs(luminance(colors[f"{hue}{level}"]) - luminance(colors["shade"])) for level in range(2, 9)]
            assert distance == sorted(distance)


def luminance(color: str) -> float:
    parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_a_server_gets_the_value_of_every_chunk_by_its_name_and_of_no_other(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l", neurons=20)
    models = catalogue(runs, "fixed")
    data = write_site(runs, tmp_path / "out").parent / "data"
    views = {layer.folder: site.open_layer(layer) for layer in all_layers(models)}

    def value(name: str) -> Any:
        folder, _, chunk = name.rpartition("/")
        return site.layer_chunk(views[folder], chunk)

    names = [path.relative_to(data).with_suffix("").as_posix() for path in data.glob("m*/t*/l*/*.js")]
    assert len(names) == 4 * 4
    for name in names:
        assert {"format_version": 1, **json.loads(json.dumps(value(name)))} == read_script(data / f"{name}.js")
    for chunk in ("neurons-2", "neurons", "layer-0", "neurons-00", "layer\n", "neurons-٠", "texts-", ""):
        assert value(f"m0/t0/l0/{chunk}") is None
    chunks = Chunks(runs, capabilities={})
    for name in ("m9/t0/l0/layer", "../m0/t0/l0/layer", "m0/t0/l0/../l0/layer", "m0/t0/l٠/layer", ""):
        assert chunks.chunk(name) is None


def test_dead_and_unscored_neurons_say_so(tmp_path: Path, rng: np.random.Generator) -> None:
    [scored] = scored_runs(tmp_path, rng, "crate-2l")
    plain = synthetic.make_run(tmp_path / "plain", rng, name="gpt2-2l")
    data = write_site([scored, plain], tmp_path / "out").parent / "data"
    neurons = read_script(data / "m0/t0/l0/neurons-0.js")["neurons"]
    assert neurons[synthetic.DEAD]["status"] == "dead"
    assert neurons[synthetic.RARE]["status"] == "too rare"
    assert neurons[synthetic.DEAD]["explanations"][0]["text"] is None
    assert not [group for group in neurons[synthetic.DEAD]["excerpts"] if group["kind"] == "top"]
    others = read_script(data / "m1/t0/l0/neurons-0.js")["neurons"]
    assert [one["status"] for one in others[:1] + others[4:6]] == ["dead", "not scored", "not scored"]
    assert all(one["explanations"] == [] for one in others)
    missing = read_script(data / "overview.js")["missing"]
    assert any("cratelm interpret" in line and "plain" in line for line in missing)


def test_a_run_without_records_is_named_or_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    [scored] = scored_runs(tmp_path, rng, "crate-2l")
    bare = tmp_path / "bare"
    write_json(bare / "run.json", json.loads((scored / "run.json").read_text()) | {"name": "bare"})
    data = write_site([scored, bare], tmp_path / "out").parent / "data"
    told = read_script(data / "site.js")["models"][1]
    assert told["taps"] == []
    assert "cratelm collect" in told["missing"]
    with pytest.raises(CrateError, match="holds no fixed records. Run: cratelm collect"):
        write_site([bare], tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CrateError, match="needs at least one run"):
        catalogue([], "fixed")


def test_a_run_without_scores_hides_no_other(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l")
    (runs[1] / "interpretation.sqlite").unlink()
    Store.create(runs[1])
    found = overview(catalogue(runs, "fixed"), "fixed")
    assert found["tables"]
    assert found["figures"]
    assert any(f"cratelm interpret {runs[1].name}" in said for said in found["missing"])


def test_a_site_does_not_contain_the_paths_of_its_folders(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l")
    (runs[1] / "interpretation.sqlite").unlink()
    Store.create(runs[1])
    monkeypatch.setattr("sys.argv", ["/usr/bin/cratelm", "report", *map(str, runs), "--site"])
    write_site(runs, tmp_path / "out")
    written = "".join(path.read_text() for path in (tmp_path / "out" / "data").rglob("*.js"))
    assert "cratelm report crate-2l gpt2-2l --site" in written
    assert "cratelm interpret gpt2-2l" in written
    assert str(tmp_path) not in written
    kept = "see https://example.org/a/b, runs/demo/x, ../y/z and ./w/v at 3/4"
    assert public(kept) == kept
    assert public("cratelm report '/home/some one/runs/a' --out=/srv/www/site") == "cratelm report 'a' --out=site"


def test_what_has_not_changed_is_not_written_again(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l")
    out = tmp_path / "out"
    write_site(runs, out)
    before = files(out / "data")
    write_site(runs, out)
    after = files(out / "data")
    layers = [name for name in before if re.match(r"m\d/", name)]
    assert len(layers) == 4 * 4
    assert {name: before[name] for name in layers} == {name: after[name] for name in layers}
    monkeypatch.setattr("cratelm.interpretation.store.database.made_by", lambda: "another day")
    store, key = Store.open(runs[1]), SetKey(layer=1, protocol="random-only")
    store.write_scores(key, store.scores(key))
    write_site(runs, out)
    renewed = files(out / "data")
    assert {name.rpartition("/")[0] for name in layers if renewed[name] != before[name]} == {"m1/t0/l1"}
    write_site(runs[:1], out)
    assert {name.split("/")[0] for name in files(out / "data") if name[0] == "m"} == {"m0"}


def test_an_interrupted_site_resumes(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", layers=3)
    out, opened = tmp_path / "out", []
    real = site.open_layer

    def failing(layer: Any, strings: Any) -> Any:
        opened.append(layer.layer)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return real(layer, strings)

    monkeypatch.setattr(site, "open_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        write_site(runs, out)
    assert not (out / "index.html").exists()
    assert (out / site.MARKER).is_file()
    assert not list(out.rglob("*.tmp"))
    write_site(runs, out)
    assert opened == [0, 1, 2, 2]
    assert (out / "index.html").exists()


def test_a_neuron_takes_less_than_20_kb_where_every_activation_is_different(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dense(
        rng: np.random.Generator, tokens: np.ndarray, _s: Any, neurons: int, *, trained: bool = True
    ) -> np.ndarray:
        assert trained
        return rng.normal(size=(neurons, len(tokens))).astype(np.float32)

    monkeypatch.setattr(synthetic, "plant", dense)
    [run] = scored_runs(tmp_path, rng, "gpt2-1l", layers=1, neurons=64)
    data = write_site([run], tmp_path / "out").parent / "data"
    size = sum(path.stat().st_size for path in (data / "m0").rglob("*.js"))
    assert size / 64 < 20_000


def test_the_page_has_one_strict_policy_and_no_inline_code(tmp_path: Path, rng: np.random.Generator) -> None:
    run = synthetic.make_run(tmp_path / "run", rng)
    change(run / "run.json", name='"><script>alert(1)</script>')
    source = write_site([run], tmp_path / "out").read_text(encoding="utf-8")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    assert policy == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'none'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert re.findall(r"<script(?! defer src=\"viewer/[a-z_]+\.js\"></script>)", source) == []
    assert not re.search(r"<style|\son\w+=|\sstyle=|javascript:", source)
    assert source.index("Content-Security-Policy") < source.index("<script")
    loaded = re.findall(r'src="viewer/([a-z_]+\.js)"', source)
    there = {path.name for path in site.VIEWER.glob("*.js")}
    assert sorted(loaded) == sorted(there - set(site.LIVE_SCRIPTS))
    assert not (tmp_path / "out" / "viewer" / site.LIVE_SCRIPTS[0]).exists()
    served = site.index_html("x", served=True, token="t")
    assert set(re.findall(r'src="viewer/([a-z_]+\.js)"', served)) == there


def test_no_script_of_the_viewer_makes_markup_of_text() -> None:
    for path in site.VIEWER.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function", source
        )
        assert len(source.splitlines()) <= 350


def test_the_command_writes_the_site_and_prints_its_path(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l")
    capsys.readouterr()
    assert cli.main(["report", *map(str, runs), "--site"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "site" / "index.html")
    assert (
        json.loads((tmp_path / "site" / "data" / "m0" / "t0" / "l0" / "made.json").read_text())["format"] == site.FORMAT
    )


def test_a_folder_that_a_killed_process_began_is_taken(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l")
    (tmp_path / "out" / f".{site.MARKER}.4194305.tmp").mkdir(parents=True)
    assert write_site(runs, tmp_path / "out").is_file()
    assert not list((tmp_path / "out").glob(".*.tmp"))
