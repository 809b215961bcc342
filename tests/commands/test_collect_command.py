"""`cratelm collect` on runs of ours: other taps, and every input it refuses."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.collecting import held_out_documents, make_run, message, options, snapshot

from cratelm import cli
from cratelm.activations import collect as collecting
from cratelm.activations.records import layer_file, read_collection, read_records, records_folder
from cratelm.commands import collect, interpret
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.workflows.token_data import read_count


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return held_out_documents(tmp_path_factory.mktemp("data"))


def test_tokens_beyond_the_vocabulary_are_refused(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data, vocab_size=200)
    largest = int(np.asarray(data.tokens("val")).max())
    assert f"must be at most 199, the model's vocabulary, got {largest}" in message(options(run, data))


def test_several_taps_live_side_by_side(data: TokenDirectory, tmp_path: Path) -> None:
    run, model = make_run(tmp_path / "run", data)
    collect.run(options(run, data))
    first = read_records(run, 1)
    before = {key: first.excerpts(*key) for key in first.sets}
    assert read_collection(run)["signed"] is False
    for tap in ("residual", "blocks.{layer}.attention.output:input"):
        collect.run(options(run, data, tap=tap, layer=(1,)))
    again, heads = read_records(run, 1), read_records(run, 1, tap="blocks.L.attention.output-input")
    for key, excerpts in before.items():
        now = again.excerpts(*key)
        assert np.array_equal(now.tokens, excerpts.tokens)
        assert np.array_equal(now.document, excerpts.document)
    corpus = np.asarray(data.tokens("val"))
    for records in (heads, read_records(run, 1, tap="residual")):
        assert records.num_neurons == model.config.d_model
        for excerpt in records.excerpts(8, "explain", "top").of(2):
            end = excerpt.position + len(excerpt.tokens)
            assert np.array_equal(excerpt.tokens, corpus[excerpt.position : end])
    result = read_collection(run)
    assert result["taps"] == {
        "blocks.L.attention.output-input": {"layers": [1], "signed": True},
        "neurons": {"layers": [0, 1], "signed": False}, "residual": {"layers": [1], "signed": True},
    }  # fmt: skip
    assert result["signed"] is True


def test_another_tap_leaves_the_scores_of_the_neurons_valid(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data)
    collect.run(options(run, data))
    interpret.run(interpret.Options(runs=(run,), protocol=("anthropic",)))
    scores = (run / "interpretation.sqlite").read_bytes()
    collect.run(options(run, data, tap="residual"))
    interpret.run(interpret.Options(runs=(run,), protocol=("anthropic",)))
    assert (run / "interpretation.sqlite").read_bytes() == scores


def test_the_mirrored_tap_ranks_the_negative_side(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data, activation="gelu")
    collect.run(options(run, data, layer=(0,)))
    collect.run(options(run, data, layer=(0,), sign="negative"))
    up, down = read_records(run, 0), read_records(run, 0, tap="neurons-negative")
    np.testing.assert_allclose(down.statistics["maximum"], -up.statistics["minimum"])
    np.testing.assert_allclose(down.statistics["mean"], -up.statistics["mean"], rtol=1e-6)
    top = down.excerpts(64, "explain", "top")
    strongest = np.where(top.valid, top.activations, -np.inf).max(axis=2)
    assert (strongest[top.present] > 0).all()
    assert down.statistics["density"].sum() + up.statistics["density"].sum() == pytest.approx(down.num_neurons)


def test_compat_refuses_negative_activations(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data, activation="gelu", context_length=32)
    assert "negative activations" in message(options(run, data, mode="compat"))


def test_layers_that_were_not_recorded_differ_from_those_that_were(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data)
    collect.run(options(run, data, layer=(1,)))
    before = snapshot(records_folder(run, "fixed") / "neurons")
    assert before.keys() == {"layer_01.safetensors", "checksums.json"}
    collect.run(options(run, data, layer=(1,)))
    assert snapshot(records_folder(run, "fixed") / "neurons") == before
    assert "(layers [1] -> [0, 1]). Remove" in message(options(run, data))
    assert "--layer must be a layer with this tap (0, 1), got 4" in message(options(run, data, layer=(4,)))


def test_records_of_another_model_are_not_mixed(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data)
    collect.run(options(run, data))
    make_run(run, data, seed=1)
    before = snapshot(records_folder(run, "fixed"))
    assert "holds fixed records of other settings (model_hash" in message(options(run, data))
    assert snapshot(records_folder(run, "fixed")) == before


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tokens": "many"}, "--tokens must be all or a number such as"),
        ({"tokens": "0"}, "got '0'"),
        ({"tokens": "200"}, "the half for .* must have at least .* Collect from more documents"),
        ({"batch_rows": 0}, "--batch-rows must be at least 1, got 0"),
        ({"split": "test"}, "has no split test"),
        ({"tap": "blocks.{layer}.mpl"}, r"no modules 'blocks.\{layer\}.mpl'.*blocks.\{layer\}.mlp"),
        ({"context": 4000}, "--context must be 1 to 128 tokens .* got 4000"),
        ({"context": 60}, "the model's context must be at least 68 tokens"),
        ({"layer": (9,)}, "--layer must be a layer with this tap .*, got 9"),
    ],
)
def test_a_bad_option_gets_one_line_and_changes_nothing(
    changes: dict[str, Any], error: str, data: TokenDirectory, tmp_path: Path
) -> None:
    run, _ = make_run(tmp_path / "run", data)
    with pytest.raises(CrateError, match=error):
        collect.run(options(run, data, **changes))
    assert not list(run.rglob("layer_*"))


@pytest.mark.parametrize(
    ("text", "count"), [("all", None), ("200000", 200000), ("8.2M", 8_200_000), ("200k", 200_000), ("1G", 10**9)]
)
def test_token_counts_are_read_as_people_write_them(text: str, count: int | None) -> None:
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["", "-5", "1e6", "0.2", "M", "8 M", "0.0001", "all of it"])
def test_a_bad_token_count_is_refused(text: str) -> None:
    with pytest.raises(CrateError, match="--tokens must be all or a number"):
        read_count(text)


def test_fewer_tokens_read_fewer_documents(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data)
    bounds = data.documents("val")
    collect.run(options(run, data, tokens=f"{bounds[70] / 1000}k"))
    assert read_collection(run)["documents"] == 70


def test_bfloat16_is_recorded_and_is_near_float32(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data)
    other, _ = make_run(tmp_path / "other", data)
    collect.run(options(run, data))
    collect.run(options(other, data, bf16=True))
    assert read_collection(other)["precision"] == "bfloat16"
    exact, rounded = (read_records(one, 0).statistics["mean"] for one in (run, other))
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(exact, rounded, atol=0.05 * exact.max())


def test_a_truncated_records_file_is_named(data: TokenDirectory, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", data)
    collect.run(options(run, data, layer=(0,)))
    file = layer_file(run, "fixed", "neurons", 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CrateError, match=r"layer_00.safetensors is damaged or was changed"):
        read_records(run, 0)
    for checksums in (run / "records").rglob("checksums.json"):  # records of earlier versions have none
        checksums.unlink()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CrateError, match=r"layer_00.safetensors is not readable ") as refusal:
            read_records(run, 0)
        assert str(refusal.value).endswith(f"Remove {run}/records/fixed and run: cratelm collect {run} --data DIR")
    file.write_bytes(whole)
    (run / "records" / "fixed" / "windows.safetensors").write_bytes(b"")
    with pytest.raises(CrateError, match=r"windows.safetensors is not .*Remove \S+/run/records/fixed and run"):
        read_records(run, 0)


def test_a_tokenizer_missing_from_the_records_is_reported_with_both_remedies(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path / "run", data)
    collect.run(options(run, data))
    (run / "records" / "fixed" / "tokenizer.json").unlink()
    for command in (["interpret", str(run)], ["neurons", str(run)]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: {run}/records/fixed/tokenizer.json is missing. Copy {run}/model/tokenizer.json to it, "
            f"or remove {run}/records/fixed and run: cratelm collect {run} --data DIR"
        )


def test_damaged_records_of_the_released_procedure_are_collected_again_by_it(tmp_path: Path) -> None:
    file = layer_file(tmp_path / "run", "compat", "neurons", 3)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with pytest.raises(CrateError, match=r"Remove \S+/run/records/compat and run: .*/run --data DIR --mode compat$"):
        read_records(tmp_path / "run", 3, mode="compat")


@pytest.mark.parametrize("full_at", [2, 5, 8])
def test_a_full_disk_loses_nothing_and_the_same_command_resumes(
    full_at: int, data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills while a file is flushed: the state of a collection under way, records, or their description."""
    undisturbed, _ = make_run(tmp_path / "undisturbed", data)
    collect.run(options(undisturbed, data))
    run, _ = make_run(tmp_path / "run", data)
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0)
    flush, calls = os.fsync, 0

    def fills(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills)
        assert "no space left while writing" in message(options(run, data))
    assert not list(run.rglob("*.tmp"))
    collect.run(options(run, data))
    for layer in range(2):
        first, second = (read_records(one, layer) for one in (undisturbed, run))
        assert _same(dict(first.arrays) | dict(first.statistics), dict(second.arrays) | dict(second.statistics))


def _same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f") for name in first
    )
