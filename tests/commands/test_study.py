"""The study: its trainings, its estimate, resuming, and the arithmetic over seeds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import make_run
from fixtures.tiny import make_tokens, short_training

from cratelm import rundir
from cratelm.commands import study
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.interpretation.scoring.small_samples import student
from cratelm.report.contents import ReportContents
from cratelm.report.page.html import write_report
from cratelm.report.results.gather import Results, RunResult, gather
from cratelm.report.results.study import Group, Study, estimate, study_of
from cratelm.report.sentences import study_sentences
from cratelm.report.tables.study import study_tables


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens", np.random.default_rng(0), documents=220)


def options(data: TokenDirectory, out: Path, **more: Any) -> study.Options:
    training = short_training(context=96, batch_tokens=96 * 4, micro_batch=4, tokens=96 * 4 * 3, evaluate_tokens=500)
    settings: dict[str, Any] = {"sizes": "1l", "seeds": 2, "training": training, "device": "cpu"}
    settings |= {"variant": ("crate:expansion=1", "gpt2:expansion=1")} | more
    return study.Options(data=data.path, out=out, **settings)


def test_the_plan_is_every_variant_at_every_size_from_every_seed(data: TokenDirectory, tmp_path: Path) -> None:
    asked = options(data, tmp_path, sizes="1l, 3l", variant=("crate", "gpt2", "sparser:penalty=1,ista_steps=3"))
    parts = list(study.plan(asked, data))
    assert [part.run.name for part in parts[:6]] == [
        f"{name}-{size}-seed0" for size in ("1l", "3l") for name in ("crate", "gpt2", "sparser")
    ]
    assert len(parts) == 12
    assert {part.config.tokens for part in parts} == {96 * 4 * 3}
    assert [part.config.seed for part in parts] == [1337] * 6 + [1338] * 6
    sparser = parts[2].model
    assert (sparser.arch, sparser.penalty, sparser.ista_steps, sparser.num_layers) == ("crate", 1.0, 3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", "must be crate, gpt2 or NAME"),
        ("mine:penalty", "got 'penalty' in"),
        ("mine:penality=1", "no field 'penality'.*penalty"),
        ("mine:penalty=much", "penalty must be float, got 'much'"),
        ("mine:arch=gpt3", "arch must be crate or gpt2, got 'gpt3'"),
        ("mine:arch=gpt2,bias=1", "bias must be bool, got '1'"),
        ("mine:num_heads=3", "must be a multiple of num_heads 3"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(CrateError, match=message):
        study.variant(text, "1l", vocab_size=320, context=64)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sizes": "1l,4l"}, "--sizes must be of 1l, 2l, 3l, s, b, got '4l'"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"variant": ("a:bias=true", "a:bias=false")}, "variants must have different names"),
        ({"collect_tokens": 500}, "must have at least 25 documents"),
    ],
)
def test_an_impossible_study_is_refused_before_it_starts(
    more: dict[str, Any], message: str, data: TokenDirectory, tmp_path: Path
) -> None:
    with pytest.raises(CrateError, match=message):
        study.run(options(data, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_report")
def test_a_study_estimates_trains_reports_and_repeats_nothing(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    study.run(options(data, out, dry_run=True))
    message = " ".join(capsys.readouterr().err.split())
    assert "crate-1l: " in message
    assert "4 trainings, about " in message
    assert not out.exists()
    study.run(options(data, out))
    assert "CRATE minus GPT-2 at equal size" in capsys.readouterr().out
    names = {f"{arch}-1l-seed{seed}{end}" for arch in ("crate", "gpt2") for seed in (0, 1) for end in ("", "-random")}
    assert {folder.name for folder in out.iterdir()} == names | {"report"}
    for name in ("report.html", "seeds.csv", "differences.csv", "steadiness.svg", "differences.svg"):
        assert (out / "report" / name).exists()
    shutil.rmtree(out / "gpt2-1l-seed1" / "records")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    monkeypatch.setattr(study, "_report", lambda *_: None)
    study.run(options(data, out))
    after = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert before.items() <= after.items()
    assert len(after) > len(before)
    other = options(data, out)
    with pytest.raises(CrateError, match="is another run .*learning_rate"):
        study.run(replace(other, training=replace(other.training, learning_rate=0.5)))


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_students_quantile(freedom: int, expected: float) -> None:
    assert student(freedom) == pytest.approx(expected, abs=1.5e-3)


def test_an_estimate_is_the_mean_with_students_interval() -> None:
    actual = estimate([1.0, 2.0, 6.0])
    assert actual is not None
    half = 4.303 * np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert (actual.mean, *(actual.interval or ())) == pytest.approx((3, 3 - half, 3 + half))
    single = estimate([5.0])
    assert single is not None
    assert (single.mean, single.interval, single.seeds) == (5.0, None, 1)
    assert estimate([]) is None


def made_up(variant: str, layers: int, parameters: int, flops: int, values: dict[int, float]) -> Group:
    runs = {}
    for seed, value in values.items():
        runs[seed] = object.__new__(RunResult)
        object.__setattr__(runs[seed], "parameters", value)  # stands for any quantity
    return Group(
        variant=variant, title=f"{variant}-{layers}l", num_layers=layers, size=(layers, 128, 4), parameters=parameters,
        flops_per_token=flops, runs=runs,
    )  # fmt: skip


def test_differences_are_paired_by_seed_and_interpolated_in_the_logarithm_of_the_cost() -> None:
    from cratelm.report.results.study import _difference

    crate = made_up("crate", 2, 2000, 900, {0: 10.0, 1: 20.0, 7: 99.0})
    small = made_up("gpt2", 1, 1000, 1000, {0: 1.0, 1: 3.0})
    large = made_up("gpt2", 2, 4000, 2000, {0: 5.0, 1: 5.0})

    def of(run: RunResult) -> float | None:
        return run.parameters

    size = _difference(crate, [small, large], of, "size")
    assert size == estimate([10.0 - 5.0, 20.0 - 5.0])
    parameters = _difference(crate, [small, large], of, "parameters")
    assert parameters is not None
    assert parameters.mean == pytest.approx(np.mean([10 - 3, 20 - 4]))
    assert _difference(crate, [small, large], of, "FLOPs") is None


def test_a_variant_is_compared_with_the_paper_s_model_too_and_rows_without_an_answer_are_left_out() -> None:
    groups = []
    for variant, arch, layers in (("crate", "crate", 1), ("crate", "crate", 2), ("sparser", "crate", 2),
                                  ("gpt2", "gpt2", 2)):  # fmt: skip
        group = made_up(variant, layers, 1000 * layers, 900 * layers, {0: 4.0 + layers, 1: 5.0 + layers})
        for run in group.runs.values():
            object.__setattr__(run, "arch", arch)
            object.__setattr__(run, "loss", SimpleNamespace(nats_per_token=run.parameters))
        groups.append(group)
    empty = Results(mode="fixed", explainer="lookup", protocols=(), models=(), missing=())
    study = Study(empty, tuple(groups))
    assert study.pairs == [("crate", "gpt2"), ("sparser", "gpt2"), ("sparser", "crate")]
    rows = [(one.group.title, one.other, one.basis, one.estimate is not None) for one in study.differences]
    # All models of 2 layers cost the same here, so equal parameters and FLOPs would say again what equal size says.
    assert rows == [
        ("crate-1l", "gpt2", "size", False), ("crate-2l", "gpt2", "size", True),
        ("sparser-2l", "gpt2", "size", True), ("sparser-2l", "crate", "size", True),
    ]  # fmt: skip
    object.__setattr__(groups[2], "parameters", 1500)
    between = Study(empty, tuple(groups))
    assert [one.basis for one in between.differences if one.other == "crate"] == ["size", "parameters"]
    for group in groups[:3]:
        object.__setattr__(group, "parameters", 1)
        object.__setattr__(group, "flops_per_token", 1)
    dear = Study(empty, tuple(groups))
    assert {one.basis for one in dear.differences if one.other == "gpt2"} == {"size"}
    message = study_sentences(dear)
    assert not any("no two models" in sentence for sentence in message)
    object.__setattr__(groups[2], "size", (7, 128, 4))
    alone = Study(empty, tuple(groups))
    assert "sparser minus GPT-2: no two models to compare." in study_sentences(alone)


@pytest.fixture
def seeds(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    """Two architectures with two layers, three seeds each."""
    runs = []
    for seed in range(3):
        for arch in ("crate", "gpt2"):
            run = make_run(tmp_path / f"{arch}-2l-seed{seed}", rng, name=f"{arch}-2l-seed{seed}", layers=2)
            actual = json.loads((run / "run.json").read_text())
            actual["training"]["seed"] = seed
            rundir.write_json(run / "run.json", actual)
            runs.append(run)
    return runs


@pytest.mark.usefixtures("quick_report")
def test_runs_that_differ_in_their_seed_are_one_group(seeds: list[Path], tmp_path: Path) -> None:
    results = scored(seeds)
    actual = study_of(results)
    assert actual is not None
    assert {group.title: sorted(group.runs) for group in actual.groups} == {
        "CRATE-2L": [0, 1, 2], "GPT-2-2L": [0, 1, 2]
    }  # fmt: skip
    assert actual.pairs == [("crate", "gpt2")]
    assert len(actual.first_seeds.models) == 2
    table = study_tables(actual)[0]
    mine = next(row for row in table.rows if row[:2] == ("CRATE-2L", "top-and-random"))
    means = [run.scores["top-and-random"].mean for run in actual.groups[0].runs.values()]
    assert mine[2] == pytest.approx(np.mean([mean for mean in means if mean is not None]))
    assert any("at equal size" in sentence for sentence in study_sentences(actual))
    page = write_report(ReportContents(results), tmp_path / "report").read_text()
    assert "Differences, seed by seed" in page
    assert "steadiness" in page


def test_runs_of_one_seed_are_not_a_study(seeds: list[Path]) -> None:
    assert study_of(scored(seeds[:2])) is None


def scored(runs: list[Path]) -> Results:
    from cratelm.commands import interpret

    interpret.run(interpret.Options(runs=tuple(runs), protocol=("top-and-random",)))
    return gather(runs)
