"""`cratelm steer`, `ablate` and `ledger`: output, files and errors."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.autoencoders import write_run_sae
from fixtures.hugging_face import build, save
from fixtures.synthetic import make_run as make_records
from fixtures.synthetic import make_tokenizer
from fixtures.tiny import make_tokens, random_model, tiny_config

from cratelm import cli
from cratelm.activations.records import read_records
from cratelm.data.tokens import TokenDirectory, tokenize
from cratelm.model.weights import load, save_model
from cratelm.steering.ablation_file import AblationFile, AblationRow
from cratelm.steering.changes import Change
from cratelm.steering.generate import Decoding, generate
from cratelm.steering.intervention import Intervention
from cratelm.steering.reference import reference

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model and synthetic records and scores of its neurons, and a run with only a model."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(4)
    make_records(folder / "crate", rng, layers=2, neurons=64)
    for name in ("crate", "bare"):
        model = random_model(tiny_config(vocab_size=320, context_length=32), rng)
        save_model(model, folder / name / "model", make_tokenizer())
    assert cli.main(["interpret", str(folder / "crate"), "--protocol", "top-and-random"]) == 0
    return folder


@pytest.fixture(scope="module")
def data(runs: Path) -> TokenDirectory:
    make_tokens(runs / "text", np.random.default_rng(3), documents=40)
    return tokenize([str(runs / "text.jsonl")], runs / "tokens", str(runs / "bare" / "model"), held_out=0.3)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that must succeed, or with code=2 fail with one line; return its output."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        if code == 2:
            assert out == ""
            assert err.startswith("error: ")
            assert err.count("\n") == 1
        return out, err

    return run


PROMPT = "7: a crate holds rain."


def written(folder: Path, kind: str = "steer") -> Any:
    """The newest JSON file of a kind."""
    newest = max(folder.glob(f"{kind}-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_steer_writes_both_texts_the_effect_and_its_controls(runs: Path, tmp_path: Path, command: Run) -> None:
    run = runs / "crate"
    words = (
        "steer", run, "--neuron", "1/9=set:20x", "--prompt", PROMPT, "--tokens", 8, "--out", tmp_path, "--excerpts", 3,
    )  # fmt: skip
    out, _ = command(*words)
    result = written(tmp_path)
    model, tokenizer = load(run)
    assert tokenizer is not None
    prompt = torch.tensor([[tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode(PROMPT).ids]])
    value = 20 * float(read_records(run, 1).statistics["maximum"][9])
    decoding = Decoding(temperature=0.8, seed=0)
    for key, changes in (("without", []), ("with", [Change(layer=1, index=9, how="set", value=value)])):
        tokens = generate(model, prompt, 8, Intervention(changes=changes), decoding=decoding)
        text = tokenizer.decode(tokens[0].tolist())
        assert PROMPT + result["texts"][0][key] == text
    assert result["changes"] == [f"1/9=set:{value:.4g}"]
    assert result["strength_0_is_exact"] is True
    assert "strength 0: the logits are identical" in out
    assert [row["name"] for row in result["prompts"]["rows"]][2:] == ["opposite sign", "random direction"]
    assert result["prompts"]["rows"][1]["name"].startswith("matched neuron 1/")
    assert (result["prompts"]["texts"], result["excerpts"]["texts"]) == (1, 3)
    (name,) = {path.stem for path in tmp_path.iterdir()}
    assert name.startswith("steer-7-a-crate-holds-rain-")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}
    again, _ = command(*words)
    assert again == out
    before = (tmp_path / f"{name}.json").read_bytes()
    command(*words, "--seed", 1)
    command(*words[:5], "a crate", *words[6:])
    assert len(list(tmp_path.glob("steer-*.json"))) == 3  # other settings, another prompt: other files
    assert (tmp_path / f"{name}.json").read_bytes() == before


def test_several_changes_and_prompts_at_chosen_positions(runs: Path, tmp_path: Path, command: Run) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the neuron sees light.\n\none code keeps sand.\n")
    out, _ = command(
        "steer", runs / "bare", "--neuron", "1/9=add:3", "0/5=clamp:0..0.1", "0/6=silence", "--prompts", prompts,
        "--positions", "generated", "--tokens", 5, "--temperature", 0, "--out", tmp_path,
    )  # fmt: skip
    result = written(tmp_path)
    assert [text["prompt"] for text in result["texts"]] == ["the neuron sees light.", "one code keeps sand."]
    assert result["prompts"]["rows"][0]["moved"] == 0  # nothing is generated before the next token
    assert "excerpts" not in result
    assert "after 2 prompts" in out


def test_a_sweep_tries_every_strength(runs: Path, tmp_path: Path, command: Run) -> None:
    out, _ = command(
        "steer", runs / "crate", "--neuron", "1/9=add", "--sweep", "0x,10x,40x", "--prompt", PROMPT, "--tokens", 6,
        "--out", tmp_path,
    )  # fmt: skip
    result = written(tmp_path, "sweep")
    assert [point["strength"] for point in result["points"]] == ["0x", "10x", "40x"]
    moved = [point["rows"][0]["moved"] for point in result["points"]]
    assert moved[0] == 0 < moved[1] < moved[2]
    assert all(point["nats_per_token"] > 0 for point in result["points"])
    assert len({path.stem for path in tmp_path.iterdir()}) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}
    assert "40x" in out


def test_steer_refuses_wrong_options_in_one_line(runs: Path, tmp_path: Path, command: Run) -> None:
    crate, bare = runs / "crate", runs / "bare"
    for run, neuron, more, message in (
        (crate, "1/64", (), "layer 1 has neurons 0 to 63, got 64"),
        (crate, "2/0", (), "layer must be one with neurons (0, 1), got 2"),
        (crate, "1-9", (), "a change must be LAYER/NEURON=HOW:STRENGTH"),
        (crate, "1/0=set:1x", (), "never fires in the records"),  # the synthetic neuron 0 is dead
        (crate, "1/9=set:1e38", (), "logits are not finite with 1/9=set:1e+38"),
        (crate, "sae:1/3=silence", (), "layer must be one with latents of a --sae (none), got 1"),
        (crate, "1/9", ("--positions", "first"), "positions must be all, prompt, generated"),
        (crate, "1/9", ("--after", "the neuron"), "--after must be one token"),
        (crate, "1/9=set", ("--sweep", "1x"), "at least 2 strengths"),
        (crate, "1/9=scale", ("--sweep", "1x,2x"), "a sweep of scale takes factors"),
        (crate, "1/9", ("--tokens", 0), "--tokens must be at least 1, got 0"),
        (bare, "1/9=set:2x", (), "multiples of its maximum need records"),
    ):
        _, err = command("steer", run, "--neuron", neuron, "--prompt", PROMPT, *more, "--out", tmp_path / "out", code=2)
        assert message in err
    for prompt, message in (("", "the prompt is empty"), ("a " * 80, "the model's context is 32")):
        _, err = command("steer", crate, "--neuron", "1/9", "--prompt", prompt, code=2)
        assert message in err
    _, err = command("steer", crate, "--neuron", "1/9", code=2)
    assert "no prompt was given" in err
    assert not (tmp_path / "out").exists()


def test_the_reference_is_the_maximum_or_the_99_9th_percentile(rng: np.random.Generator) -> None:
    from cratelm.activations.running import Moments

    values = np.abs(rng.normal(size=(400_000, 2))).astype(np.float32) * (rng.random((400_000, 2)) < 0.2)
    moments = Moments(2, torch.device("cpu"))
    moments.update(torch.from_numpy(values))
    records = _records({name: value.numpy() for name, value in moments.result().items()})
    active = values[:, 1][values[:, 1] > 0]
    assert reference(records, 1) == active.max()
    assert reference(records, 1, "p99.9") == pytest.approx(np.quantile(active, 0.999), rel=0.1)


def _records(result: dict[str, Any]) -> Any:
    from cratelm.activations.records import LayerRecords, Windows

    nothing = np.zeros(0, dtype=np.int64)
    windows = Windows(
        tokens=nothing, span_position=nothing, span_offset=nothing, document_position=nothing, document_split=nothing
    )
    tables = {"histogram": result.pop("histogram")}
    return LayerRecords(
        tap="neurons", layer=0, mode="fixed", statistics=result, tables=tables, arrays={}, windows=windows
    )


def test_ledger_prints_and_writes_what_adds_up(runs: Path, tmp_path: Path, command: Run) -> None:
    out, _ = command("ledger", runs / "crate", "--prompt", PROMPT, "--show", 3, "--out", tmp_path)
    result = written(tmp_path, "ledger")
    assert abs(result["remainder"]) < 1e-4
    assert f"sum {result['total']:.6f}" in out
    (table,) = tmp_path.glob("ledger-7-a-crate-holds-rain-*.csv")
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    total = sum(float(row["contribution"]) for row in rows if row["name"] != "logit")
    assert total == pytest.approx(float(rows[-1]["contribution"]), abs=1e-9) == result["logit"]
    assert any(row["explanation"] for row in rows)
    best = max(result["neurons"], key=lambda row: row["contribution"])
    assert f"neuron 1/{best['neuron']} " in out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".svg", ".png"}
    out, _ = command("ledger", runs / "bare", "--prompt", PROMPT, "--token", "#5", "--versus", "#6", "--out", tmp_path)
    assert written(tmp_path, "ledger")["versus"] == 6
    assert " minus that of " in out
    for words, message in (
        (("--token", "the neuron"), "--token must be one token"), (("--token", "#9999"), "the vocabulary, got #9999"),
        (("--position", 99), "got 99"), (("--show", 0), "--show must be at least 1, got 0"),
    ):  # fmt: skip
        assert message in command("ledger", runs / "bare", "--prompt", PROMPT, *words, code=2)[1]
    assert "the prompt is empty" in command("ledger", runs / "bare", "--prompt", "", code=2)[1]


def ablation_of(folder: Path) -> tuple[dict[str, Any], list[AblationRow]]:
    """Settings and rows that `cratelm ablate` wrote."""
    file = AblationFile(folder)
    return json.loads(file.head.read_text()), list(file.rows())


def test_ablate_measures_resumes_and_draws(
    runs: Path, data: TokenDirectory, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cratelm.commands import ablate
    from cratelm.steering.ablation import Ablation

    monkeypatch.setattr(ablate, "TOGETHER", 16)
    words = ("ablate", runs / "crate", "--data", data.path, "--tokens", 300, "--out", tmp_path)
    out, _ = command(*words, "--neuron", "1/9", "0/3", "--group", "1/9,1/10", "--kind", "zero", "mean")
    head, rows = ablation_of(tmp_path)
    assert {(row.neurons, row.kind) for row in rows} == {
        (neurons, kind) for neurons in (("1/9",), ("0/3",), ("1/9", "1/10")) for kind in ("zero", "mean")
    }
    assert head["plain"]["nats_per_token"] > 0
    assert "ablated (mean), change of loss" in out

    measured = []
    each = Ablation.each

    def counted(self: Ablation, layer: int, neurons: Any, kind: Any, **more: Any) -> Any:
        measured.append(len(neurons))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return each(self, layer, neurons, kind, **more)

    monkeypatch.setattr(Ablation, "each", counted)
    assert cli.main([str(word) for word in (*words, "--layer", "1")]) == 130
    assert sum(1 for row in ablation_of(tmp_path)[1] if row.kind == "zero" and row.density is not None) == 2 + 32
    command(*words, "--layer", "1")
    assert measured == [16, 16, 16, 16, 15]
    rows = ablation_of(tmp_path)[1]
    assert len({row.key for row in rows}) == len(rows) == 6 + 63
    assert ">score (points)</text>" in (tmp_path / "ablation-zero.svg").read_text()
    whole = Ablation(load(runs / "crate")[0], _text(data, runs, 300), [1])
    wanted = each(whole, 1, [20], "zero")[0].sum() / whole.text.sizes.sum()
    assert {row.neurons: row.nats for row in rows}[("1/20",)] == pytest.approx(wanted, rel=1e-6)
    before = (tmp_path / "ablation.jsonl").read_bytes()
    _, err = command(*words[:-4], "--tokens", 3000, "--out", tmp_path, "--layer", "1", code=2)
    assert "must have the same model and text to resume" in err
    assert (tmp_path / "ablation.jsonl").read_bytes() == before


def _text(data: TokenDirectory, runs: Path, limit: int) -> Any:
    from cratelm.steering.ablation import held_out

    return held_out(data.tokens("val"), data.documents("val"), load(runs / "crate")[0], limit)


def test_ablate_refuses_wrong_options_in_one_line(
    runs: Path, data: TokenDirectory, tmp_path: Path, command: Run
) -> None:
    for more, message in (
        ((), "no neuron was given"), (("--neuron", "1/64"), "layer 1 has neurons 0 to 63"),
        (("--neuron", "x"), "--neuron must be LAYER/NEURON"),
        (("--layer", 2), "--layer must be a layer with neurons (0, 1), got 2"),
        (("--neuron", "1/2,1/3"), "Use --group"), (("--all", "--tokens", "few"), "got 'few'"),
    ):  # fmt: skip
        _, err = command("ablate", runs / "bare", "--data", data.path, *more, "--out", tmp_path / "out", code=2)
        assert message in err
    _, err = command("ablate", runs / "bare" / "model", "--data", data.path, "--neuron", "1/2", code=2)
    assert "is a model, not a run" in err
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_model_is_steered_ablated_and_decomposed(
    data: TokenDirectory, tmp_path: Path, command: Run, rng: np.random.Generator
) -> None:
    model = build("gpt2", rng, vocab=data.vocab_size)
    folder = save(model, tmp_path / "gpt2", data.path / "tokenizer.json")
    command("steer", folder, "--neuron", "1/9=set:3", "--prompt", PROMPT, "--tokens", 4, "--out", tmp_path / "out")
    result = written(tmp_path / "out")
    assert result["prompts"]["rows"][0]["moved"] > 0
    out, _ = command("ledger", folder, "--prompt", PROMPT, "--out", tmp_path / "out")
    assert "residual stream" in out
    command("ablate", folder, "--data", data.path, "--tokens", 200, "--neuron", "1/9", "0/9", "--out", tmp_path / "out")
    assert len(ablation_of(tmp_path / "out")[1]) == 2


def test_latents_are_ablated_like_neurons(runs: Path, data: TokenDirectory, tmp_path: Path, command: Run) -> None:
    rng = np.random.default_rng(7)
    write_run_sae(runs / "bare", "taken", "topk", rng, layer=1, d_in=64, width=20)
    folder = runs / "bare" / "saes" / "taken"
    words = ("ablate", runs / "bare", "--data", data.path, "--tokens", 200, "--sae", "taken")
    out, _ = command(*words, "--layer", 1, "--group", "sae:1/3,sae:1/4", "--kind", "zero", "mean")
    head, rows = ablation_of(folder)
    assert len(head["sae_hash"]) == 64
    assert len(rows) == 2 * (20 + 1)
    assert max(abs(row.nats) for row in rows) > 1e-4
    assert "sae:1/3 sae:1/4" in out
    assert (folder / "ablation-zero.png").exists()
    before = (folder / "ablation.jsonl").read_bytes()
    command(*words, "--neuron", "sae:1/3")
    assert (folder / "ablation.jsonl").read_bytes() == before
    for more, message in (
        (("--neuron", "sae:1/20"), "sae:1/20: layer 1 has latents of the --sae 0 to 19, got 20"),
        (("--neuron", "sae:0/2"), "sae:0/2: layer must be one with latents of the --sae (1), got 0"),
        (("--layer", 0), "--layer must be a layer with latents of the --sae (1), got 0"),
        (("--neuron", "1/3"), "Write sae:1/3"),
    ):
        assert message in command(*words, *more, code=2)[1]
    _, err = command(*words[:-2], "--neuron", "sae:1/3", code=2)
    assert "names a latent, so --sae must name its autoencoder" in err
    elsewhere = (*words[:-1], folder.rename(tmp_path / "elsewhere"), "--neuron", "sae:1/3")
    assert "--out must name a folder" in command(*elsewhere, code=2)[1]
    command(*elsewhere, "--out", tmp_path / "out")
    assert [row.neurons for row in ablation_of(tmp_path / "out")[1]] == [("sae:1/3",)]
