"""Records as OpenAI's NeuronRecord JSON and back, read by the rules of the official loader and slices."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import DEAD, FIRST_TOKEN_NEURON, RARE, make_run

from cratelm.activations.interchange import RANDOM_HALVES, TOP_HALVES, deal, import_neuron_records, interleave
from cratelm.activations.records import Mode, read_records
from cratelm.cli import main
from cratelm.errors import CrateError
from cratelm.interpretation.protocols import QUANTILES_RECORDED
from cratelm.interpretation.store.database import Store


@dataclass
class ActivationRecord:
    """Fields of the official class of this name."""

    tokens: list[str]
    activations: list[float]


@dataclass
class NeuronId:
    """Fields of the official class of this name."""

    layer_index: int
    neuron_index: int


@dataclass
class NeuronRecord:
    """Fields of the official class of this name."""

    neuron_id: NeuronId
    random_sample: list[ActivationRecord] = field(default_factory=list)
    random_sample_by_quantile: list[list[ActivationRecord]] | None = None
    quantile_boundaries: list[float] | None = None
    mean: float | None = math.nan
    variance: float | None = math.nan
    skewness: float | None = math.nan
    kurtosis: float | None = math.nan
    most_positive_activation_records: list[ActivationRecord] = field(default_factory=list)

    def valid(self, per_split: int | None = None) -> list[ActivationRecord]:
        """The official validation split: the third of four top slices, and the second of three random ones."""
        top, random = self.most_positive_activation_records, self.random_sample
        return top[2 : 4 * (per_split or len(top) // 4) : 4] + random[1 : 3 * (per_split or len(random) // 3) : 3]

    def train(self, per_split: int | None = None) -> list[ActivationRecord]:
        """The official training split: the first of four top slices."""
        top = self.most_positive_activation_records
        return top[0 : 4 * (per_split or len(top) // 4) : 4]


NEURONS = 7
CLASSES = {one.__name__: one for one in (ActivationRecord, NeuronId, NeuronRecord)}


def load(path: Path) -> NeuronRecord:
    """The official rule: every JSON object names its class, and its other keys are that class's arguments."""

    def construct(value: dict[str, Any]) -> Any:
        return CLASSES[value.pop("dataclass_name")](**value)

    record = json.loads(path.read_text(encoding="utf-8"), object_hook=construct)
    assert isinstance(record, NeuronRecord)
    return record


def export(run: Path, out: Path, *more: str) -> Path:
    assert main(["export", str(run), "--format", "neuronrecord", "--out", str(out), *more]) == 0
    return out


def contents(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.glob("*/*.json")}


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "crate-2l", rng, neurons=NEURONS)


def key(record: ActivationRecord) -> tuple:
    return tuple(record.tokens), tuple(record.activations)


def of_half(run: Path, layer: int, index: int, half: str, kind: str, strings: dict[int, str]) -> list[tuple]:
    """A half's excerpts of one neuron as the files should say them."""
    excerpts = read_records(run, layer)[index].excerpts[64, half, kind]
    return [(tuple(strings[t] for t in one.tokens.tolist()), tuple(map(float, map(str, one.activations))))
            for one in excerpts]  # fmt: skip


def strings_of(run: Path) -> dict[int, str]:
    """Token texts, decoded from the byte-level vocabulary by another way than the package's: its own decoder."""
    from tokenizers import Tokenizer

    from cratelm.data.tokenizer import token_bytes

    tokenizer = Tokenizer.from_file(str(run / "records/fixed/tokenizer.json"))
    whole = {i: tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())}
    broken = {i: text for i, text in enumerate(token_bytes(tokenizer)) if "\ufffd" in whole[i]}
    return whole | {i: text.decode(errors="backslashreplace") for i, text in broken.items()}


def test_the_official_loader_reads_what_is_exported_and_finds_each_excerpt(run: Path, tmp_path: Path) -> None:
    out, strings = export(run, tmp_path / "out"), strings_of(run)
    for layer in (0, 1):
        records = read_records(run, layer)
        assert len(list((out / str(layer)).iterdir())) == records.num_neurons
        for index in range(records.num_neurons):
            found = load(out / str(layer) / f"{index}.json")
            assert found.neuron_id == NeuronId(layer_index=layer, neuron_index=index)
            for name in ("mean", "variance", "skewness", "kurtosis"):
                assert np.float32(getattr(found, name)) == records.statistics[name][index]
            explain, score = (of_half(run, layer, index, half, "top", strings) for half in ("explain", "score"))
            top = [key(one) for one in found.most_positive_activation_records]
            assert set(top) <= {*explain, *score}
            if len(explain) == len(score) == 20:
                assert sorted(top) == sorted(explain + score)
            assert found.random_sample_by_quantile is not None
            assert [len(interval) for interval in found.random_sample_by_quantile] == [4] * 5
            peaks = [max(max(one.activations) for one in part) for part in found.random_sample_by_quantile]
            assert peaks == sorted(peaks)


@pytest.mark.parametrize("per_split", [None, 5])
def test_the_official_slices_keep_the_halves_apart(per_split: int | None, run: Path, tmp_path: Path) -> None:
    out, strings = export(run, tmp_path / "out"), strings_of(run)
    for index in range(FIRST_TOKEN_NEURON, NEURONS):
        found = load(out / "0" / f"{index}.json")
        explain = {one for kind in ("top", "random") for one in of_half(run, 0, index, "explain", kind, strings)}
        score = {one for kind in ("top", "random") for one in of_half(run, 0, index, "score", kind, strings)}
        trained, validated = found.train(per_split), found.valid(per_split)
        assert len(trained) == (per_split or 10)
        assert {key(one) for one in trained} <= explain - score
        assert {key(one) for one in validated} <= score - explain
        assert key(trained[0]) == of_half(run, 0, index, "explain", "top", strings)[0]


@pytest.mark.parametrize(("mode", "width"), [("fixed", 64), ("compat", 64), ("compat", 8)])
def test_import_and_export_again_gives_the_same_files(
    mode: Mode, width: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    run = make_run(tmp_path / "run", rng, mode=mode, neurons=NEURONS, layers=1)
    options = ("--mode", mode, "--width", str(width))
    first = export(run, tmp_path / "first", *options)
    import_neuron_records(first, tmp_path / "again")
    second = export(tmp_path / "again", tmp_path / "second", *options)
    assert contents(first) == contents(second)
    assert len(contents(first)) == NEURONS


def test_imported_records_are_scored_as_the_records_they_came_from(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "run", rng, mode="compat", layers=1, neurons=NEURONS)
    import_neuron_records(export(run, tmp_path / "out", "--mode", "compat"), tmp_path / "again")
    scores = []
    for one in (run, tmp_path / "again"):
        assert main(["interpret", str(one), "--mode", "compat", "--protocol", "top-and-random"]) == 0
        scores.append(Store.open(one).read_scores(0, "top-and-random", mode="compat").correlation)
    # Tokens with the same text are one token in what was imported; here every text is a separate token.
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-9)
    assert np.isfinite(scores[0][FIRST_TOKEN_NEURON:]).all()


def test_imported_halves_can_be_explained_and_scored(run: Path, tmp_path: Path) -> None:
    import_neuron_records(export(run, tmp_path / "out"), tmp_path / "again")
    records = read_records(tmp_path / "again", 1)
    halves = {half: set(records.excerpts(64, half, "top").document.ravel()) - {-1} for half in ("explain", "score")}
    assert not halves["explain"] & halves["score"]
    assert {half: set(records.windows.document_split[list(found)].tolist()) for half, found in halves.items()} == {
        "explain": {0}, "score": {1}
    }  # fmt: skip
    assert main(["interpret", str(tmp_path / "again"), "--protocol", "top-and-random"]) == 0
    scores = Store.open(tmp_path / "again").read_scores(1, "top-and-random")
    assert np.nanmean(scores.correlation[FIRST_TOKEN_NEURON:]) > 0.8


def test_interleaving_and_dealing_out_undo_each_other(rng: np.random.Generator) -> None:
    for halves in (TOP_HALVES, RANDOM_HALVES):
        for length in range(30):
            items = rng.permutation(1000)[:length].tolist()
            dealt = deal(items, halves)
            assert interleave(dealt["explain"], dealt["score"], halves) == items
        for _ in range(100):
            counts = rng.integers(0, 25, size=2)
            explain, score = (list(range(i, i + n)) for i, n in zip((0, 100), counts.tolist(), strict=True))
            merged, size = interleave(explain, score, halves), len(halves)
            whole = len(merged) // size * size
            for i, item in enumerate(merged[:whole]):
                assert item in {"explain": explain, "score": score}[halves[i % size]]
            groups = min(len(explain) // halves.count("explain"), len(score) // halves.count("score"))
            assert whole == groups * size
            assert len(merged) - whole == min(size - 1, len(explain) + len(score) - whole)
            assert len(set(merged)) == len(merged)


def test_a_dead_and_a_rare_neuron_have_records_too(run: Path, tmp_path: Path) -> None:
    out, strings = export(run, tmp_path / "out"), strings_of(run)
    assert load(out / "0" / f"{DEAD}.json").most_positive_activation_records == []
    rare = load(out / "0" / f"{RARE}.json")
    every = [one for half in ("explain", "score") for one in of_half(run, 0, RARE, half, "top", strings)]
    assert 0 < len(every) <= 3
    assert sorted(map(key, rare.most_positive_activation_records)) == sorted(every)


def test_one_half_is_written_as_it_is(run: Path, tmp_path: Path) -> None:
    out, strings = export(run, tmp_path / "out", "--split", "score", "--layer", "1"), strings_of(run)
    assert [path.name for path in sorted(out.iterdir())] == ["1", "export.json"]
    found = load(out / "1" / "5.json")
    assert [key(one) for one in found.most_positive_activation_records] == of_half(run, 1, 5, "score", "top", strings)
    assert [key(one) for one in found.random_sample] == of_half(run, 1, 5, "score", "random", strings)


def foreign(folder: Path, index: int, tokens: list[str], activations: list[Any], **more: Any) -> None:
    """A file as another tool may write it: without class names and quantiles."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"tokens": tokens, "activations": activations}
    found = {"neuron_id": {"layer_index": 3, "neuron_index": index}, "most_positive_activation_records": [record] * 8}
    (folder / f"{index}.json").write_text(json.dumps(found | {"random_sample": [record] * 6, "mean": None} | more))


def test_files_of_another_tool_are_imported_with_what_they_say(tmp_path: Path) -> None:
    foreign(tmp_path / "in" / "neurons" / "3", 0, [" a", "\n", "\ud83d", " a"], [0.1, 0, 2.5, -1.0])
    foreign(tmp_path / "in" / "neurons" / "3", 2, ["x"] * 64, list(range(64)), variance=2.0)
    import_neuron_records(tmp_path / "in", tmp_path / "run")
    records = read_records(tmp_path / "run", 3, mode="compat")
    assert (records.num_neurons, records.sets) == (3, ((64, "all", "random"), (64, "all", "top")))
    first, missing, last = (records[i] for i in range(3))
    np.testing.assert_array_equal(
        first.excerpts[64, "all", "top"][7].activations, np.array([0.1, 0, 2.5, -1], np.float32)
    )
    assert (first.statistics["density"], first.statistics["maximum"], first.statistics["minimum"]) == (0.5, 2.5, -1)
    assert math.isnan(first.statistics["mean"])
    assert last.statistics["variance"] == 2
    assert math.isnan(missing.statistics["density"])
    assert missing.excerpts[64, "all", "top"] == ()
    assert main(["neurons", str(tmp_path / "run"), "--mode", "compat"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a NeuronRecord"),
        ("[]", "is not a NeuronRecord"),
        ('{"neuron_id": {}}', "most_positive_activation_records"),
        ('{"most_positive_activation_records": [{"tokens": ["a"], "activations": [1, 2]}]}', "1 tokens"),
        ('{"most_positive_activation_records": [{"tokens": ["a"], "activations": [NaN]}]}', "finite"),
        ('{"most_positive_activation_records": [{"tokens": ["a"], "activations": ["b"]}]}', "is not a NeuronRecord"),
    ],
)
def test_a_file_that_is_not_a_record_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "0").mkdir(parents=True)
    (tmp_path / "in" / "0" / "7.json").write_text(content)
    with pytest.raises(CrateError, match=message) as error:
        import_neuron_records(tmp_path / "in", tmp_path / "run")
    assert "0/7.json" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_records_and_a_run_with_records_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CrateError, match="has no <layer>/<neuron>.json"):
        import_neuron_records(tmp_path, tmp_path / "new")
    with pytest.raises(CrateError, match="already has fixed records"):
        import_neuron_records(export(run, tmp_path / "out"), run)


def test_mistakes_in_an_export_are_reported_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "0").mkdir(parents=True)
    (out / "0" / "thesis.tex").write_text("mine")
    cases = [
        (["--layer", "5"], f"--layer must be one with fixed records in {run} (0, 1), got 5"),
        (["--width", "32"], "no excerpts of 32 tokens. Use --width 8 or 64"),
        (["--mode", "compat"], "must have compat records, got none"),
        ([], "has thesis.tex, which is not part of an export"),
    ]
    for more, message in cases:
        assert main(["export", str(run), "--format", "neuronrecord", "--out", str(out), *more]) == 2
        assert message in capsys.readouterr().err
    assert (out / "0" / "thesis.tex").read_text() == "mine"


def test_the_counts_per_interval_are_those_the_protocols_expect() -> None:
    from cratelm.activations.interchange import PER_INTERVAL

    assert dict(PER_INTERVAL) == QUANTILES_RECORDED


def test_the_import_command_turns_a_folder_of_records_into_a_run_that_can_be_interpreted(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    make_run(tmp_path / "crate-2l", rng)
    assert main(["export", str(tmp_path / "crate-2l"), "--format", "neuronrecord", "--out", str(tmp_path / "n")]) == 0
    assert main(["import", str(tmp_path / "n"), "--out", str(tmp_path / "theirs")]) == 0
    assert main(["interpret", str(tmp_path / "theirs"), "--protocol", "top-and-random"]) == 0
