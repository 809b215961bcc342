"""Which folder a site is written into, by which options, and names of any letters in it."""

from pathlib import Path

import numpy as np
import pytest
from fixtures import synthetic
from report.browser.test_site import files
from report.tables.test_tables import change, scored_runs

from cratelm import cli
from cratelm.errors import CrateError
from cratelm.report.browser import site
from cratelm.report.browser.chunks import read_script
from cratelm.report.browser.site import write_site
from cratelm.report.shown_text import visible

pytestmark = pytest.mark.usefixtures("quick_report")


def test_a_folder_of_other_things_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    run = synthetic.make_run(tmp_path / "run", rng)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(CrateError, match="has other files"):
        write_site([run], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(CrateError, match="is a file"):
        write_site([run], tmp_path / "mine" / "thesis.tex")


@pytest.mark.parametrize("page", ["precious", '<meta name="generator" content="Hugo">', None])
def test_a_folder_of_the_same_shape_is_not_taken_for_a_site(
    tmp_path: Path, rng: np.random.Generator, page: str | None
) -> None:
    run, mine = synthetic.make_run(tmp_path / "run", rng), tmp_path / "mine"
    for name in ("data/search/mine.csv", "data/m0/t0/l7/mine.csv", "viewer/mine.js", "index.html"):
        if name != "index.html" or page:
            (mine / name).parent.mkdir(parents=True, exist_ok=True)
            (mine / name).write_text(page or "precious")
    before = files(mine)
    with pytest.raises(CrateError, match="has other files"):
        write_site([run], mine)
    assert files(mine) == before


def test_a_site_is_written_into_an_empty_folder_and_renewed(tmp_path: Path, rng: np.random.Generator) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l")
    (tmp_path / "out").mkdir()
    out = write_site([run], tmp_path / "out").parent
    assert (out / site.MARKER).is_file()
    before = files(out / "data" / "m0")
    write_site([run], out)
    assert files(out / "data" / "m0") == before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GPT-2, Größe 3, 日本語, ✓", "GPT-2, Größe 3, 日本語, ✓"), ("a\u202eb\u2066c", "aU+202EbU+2066c"),
        ("a\nb\tc\rd", "a↵b⇥c␍d"), ("\x00\x07\u200b\ufeff", "U+0000U+0007U+200BU+FEFF"), ("\ud800", "U+D800"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)  # fmt: skip
def test_invisible_letters_are_replaced(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_a_name_of_any_letters_gives_a_whole_site(tmp_path: Path, rng: np.random.Generator) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l")
    change(run / "run.json", name="left\u202etfel\x07\n\ud800")
    source = write_site([run], tmp_path / "out").read_text(encoding="utf-8")
    assert "U+202EtfelU+0007↵U+D800</title>" in source
    assert "U+202E" in read_script(tmp_path / "out" / "data" / "site.js")["models"][0]["title"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--tap", "nonsense"], "without --tap:"), (["--explainer", "nobody"], "without --explainer:"),
        (["--tap", "x", "--simulator", "y"], "without --tap and --simulator:"),
    ],
)  # fmt: skip
def test_what_a_site_would_ignore_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    assert cli.main(["report", str(tmp_path / "run"), "--site", *options]) == 2
    error = capsys.readouterr().err
    assert f"--site must be given {named}" in " ".join(error.split())
    assert not (tmp_path / "run").exists()
