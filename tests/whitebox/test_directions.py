"""Directions of neurons: lists and shares against brute force and against what the models do, on disk and shown."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fixtures.dense_families import BOS, build_dense, save_with_beginning
from fixtures.tiny import hidden_bar, make_tokens, random_model, short_training, tiny_config, train_quietly
from torch import Tensor

from cratelm.activations.direction_files import described_directions, read_directions
from cratelm.activations.foreign import load_foreign, write_foreign_run
from cratelm.activations.observe import observe
from cratelm.activations.taps import capture, edit
from cratelm.cli import main
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.language_model import LanguageModel
from cratelm.whitebox.directions import layer_directions, tokens_alone
from cratelm.whitebox.wiring import wiring
from cratelm.workflows.opening import open_model

both = pytest.mark.parametrize("arch", get_args(Architecture))
VARIANTS: list[dict[str, Any]] = [
    {}, {"untied_decoder": True, "ista_residual": True}, {"dictionary": "complete", "expansion": 1},
    {"attention": "qkv"},
]  # fmt: skip


def model_of(arch: Architecture, rng: np.random.Generator, **changes: Any) -> LanguageModel:
    return random_model(tiny_config(arch, num_layers=3, **changes), rng).double().requires_grad_(False)


def scores_of(arrays: dict[str, np.ndarray], name: str, neuron: int) -> dict[int, float]:
    """Both ends of a list of one neuron."""
    return {
        int(index): float(value)
        for end in ("largest", "smallest")
        for index, value in zip(
            arrays[f"{name}.{end}.index"][neuron], arrays[f"{name}.{end}.value"][neuron], strict=True
        )
    }


def extremes(scores: Tensor, keep: int) -> set[int]:
    order = scores.argsort().tolist()
    return set(order[:keep] + order[-keep:])


@both
def test_tokens_in_are_the_drive_of_an_embedding_in_the_first_layer_without_attention(
    arch: Architecture, rng: np.random.Generator
) -> None:
    model = model_of(arch, rng)
    block: Any = model.blocks[0]
    with torch.no_grad():  # nothing but the embedding comes to the first layer's neurons
        model.positions.weight.zero_()
        for weight in (block.mssa if arch == "crate" else block.attention).output.parameters():
            weight.zero_()
    arrays = layer_directions(wiring(model), 0, vocabulary=250, keep=7)
    seen = "blocks.0.ista:input" if arch == "crate" else "blocks.0.mlp.up"
    with torch.no_grad(), capture(model, [seen]) as actual:
        model.features(torch.arange(250)[:, None])
    drive = actual[seen][:, 0] @ block.ista.atoms.T if arch == "crate" else actual[seen][:, 0]
    for neuron in rng.integers(64, size=5).tolist():
        scores = scores_of(arrays, "tokens_in", neuron)
        assert scores.keys() == extremes(drive[:, neuron], 7)
        assert all(value == pytest.approx(float(drive[token, neuron]), abs=1e-4) for token, value in scores.items())


@both
@pytest.mark.parametrize("changes", VARIANTS)
def test_tokens_out_of_the_last_layer_are_the_exact_change_of_the_logits_at_the_tokens_scale(
    arch: Architecture, changes: dict[str, Any], rng: np.random.Generator
) -> None:
    if arch == "gpt2" and changes:
        return
    model = model_of(arch, rng, **changes)
    arrays = layer_directions(wiring(model), 2, vocabulary=272, keep=272)
    tokens, neuron = torch.from_numpy(rng.integers(272, size=(1, 9))), int(rng.integers(model.config.num_neurons))
    # At a fixed scale a norm is linear. Then N'(w) is what w adds behind it.
    with torch.no_grad(), capture(model, ["norm:input"]) as actual:
        model.features(tokens)
    stream = actual["norm:input"][0, -1]
    write = wiring(model).layers[2].write[neuron]
    complete = model.config.dictionary == "complete"
    scale = torch.ones(()).double() if complete else (stream.var(correction=0) + 1e-5).sqrt()
    moved = write if complete else (write - write.mean()) * model.norm.weight / scale  # type: ignore[operator]
    change = model.embedding.weight @ moved
    change = (change - change.mean()).detach()
    for token, value in scores_of(arrays, "tokens_out", neuron).items():
        assert value / float(scale) == pytest.approx(float(change[token]), abs=1e-4)


@both
@pytest.mark.parametrize("changes", VARIANTS)
def test_a_neuron_drives_the_next_layer_as_its_map_says(
    arch: Architecture, changes: dict[str, Any], rng: np.random.Generator
) -> None:
    """With the attention silent and the scale known, the next drive changes by the map times the change of the code."""
    if arch == "gpt2" and changes:
        return
    model = model_of(arch, rng, **changes)
    second: Any = model.blocks[1]
    crate = arch == "crate"
    with torch.no_grad():
        for weight in (second.mssa if hasattr(second, "mssa") else second.attention).output.parameters():
            weight.zero_()
    actual = wiring(model)
    between = actual.layers[1].read @ actual.layers[1].norm.along(actual.layers[0].write).T
    neuron = int(rng.integers(model.config.num_neurons))
    tokens = torch.from_numpy(rng.integers(272, size=(2, 9)))
    places = ["blocks.1.norm_2:input", "blocks.1.ista:input" if crate else "blocks.1.mlp.up"]

    def drive(amount: float) -> tuple[Tensor, Tensor]:
        def add(code: Tensor) -> Tensor:
            return code + amount * torch.nn.functional.one_hot(torch.tensor(neuron), code.shape[-1])

        with torch.no_grad(), edit(model, {model.neuron_taps[0]: add}), capture(model, places) as seen:
            model.features(tokens)
        scale = (seen[places[0]].var(dim=-1, correction=0) + 1e-5).sqrt()
        read = seen[places[1]] @ second.ista.atoms.T if crate else seen[places[1]]
        offset = second.norm_2.bias @ second.ista.atoms.T if crate else 0
        return read - offset, scale

    (before, scale), (after, later) = drive(0.0), drive(0.7)
    change = after * later[..., None] - before * scale[..., None]
    assert torch.allclose(change, 0.7 * between[:, neuron].expand_as(change), atol=1e-6)
    arrays = [layer_directions(actual, layer, vocabulary=272, keep=6) for layer in (0, 1)]
    assert scores_of(arrays[0], "successors", neuron).keys() == extremes(between[:, neuron], 6)
    assert scores_of(arrays[1], "predecessors", neuron).keys() == extremes(between[neuron], 6)
    assert "successors.largest.index" not in layer_directions(actual, 2, vocabulary=272, keep=6)
    assert "predecessors.largest.index" not in arrays[0]


@both
def test_head_shares_are_squared_lengths_in_each_heads_subspace(arch: Architecture, rng: np.random.Generator) -> None:
    model = model_of(arch, rng)
    actual = wiring(model)
    arrays = layer_directions(actual, 0, vocabulary=272)
    block: Any = model.blocks[1]
    neuron = int(rng.integers(64))
    write = actual.layers[0].write[neuron]
    moved = (write - write.mean()) * block.norm_1.weight
    if arch == "crate":
        projected = {"shared": block.mssa.subspaces.weight @ moved}
    else:
        rows = block.attention.query_key_value.weight @ moved
        projected = dict(zip(("query", "key", "value"), rows.chunk(3), strict=True))
    assert {name for name in arrays if name.startswith("heads_out")} == {f"heads_out.{name}" for name in projected}
    for name, values in projected.items():
        halves = values.detach().view(2, 8).square().sum(dim=1)
        shares = arrays[f"heads_out.{name}"][neuron]
        assert shares == pytest.approx((halves / halves.sum()).numpy(), abs=1e-5)
    assert arrays["heads_in"].sum(axis=1) == pytest.approx(np.ones(64), abs=1e-5)
    own: Any = model.blocks[0]
    attention = own.mssa if arch == "crate" else own.attention
    read = actual.layers[0].read[neuron] * own.norm_2.weight
    fed = ((read - read.mean()) @ attention.output.weight).detach().view(2, 8).square().sum(dim=1)
    assert arrays["heads_in"][neuron] == pytest.approx((fed / fed.sum()).numpy(), abs=1e-5)


@both
@pytest.mark.parametrize("start", [None, 3])
def test_tokens_alone_are_the_strongest_codes_of_the_model(
    arch: Architecture, start: int | None, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(arch), rng)
    subject = observe(model, model_hash="")
    actual = tokens_alone(
        subject, vocabulary=200, start=start, device=torch.device("cpu"), bar=hidden_bar(), keep=4, batch=17
    )
    neuron = int(rng.integers(64))
    for layer in (0, 1):
        rows = torch.arange(200)[:, None]
        rows = rows if start is None else torch.cat([torch.full_like(rows, start), rows], dim=1)
        codes = subject.forward(rows)[layer][:, -1, neuron]
        best = codes.topk(4)
        index = actual[layer]["tokens_alone.largest.index"][neuron]
        assert actual[layer]["tokens_alone.largest.value"][neuron] == pytest.approx(best.values.numpy(), abs=1e-5)
        assert index[best.values.numpy() <= 0].tolist() == [-1] * int((best.values <= 0).sum())
        assert [float(codes[i]) for i in index if i >= 0] == pytest.approx(best.values[best.values > 0].tolist())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_token_alone_is_read_as_the_browser_reads_a_text_of_that_token(
    family: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    tokenizer = make_tokens(tmp_path / "tokens", rng).tokenizer()
    tokenizer.add_special_tokens([BOS])
    model = build_dense(family, rng, vocab=tokenizer.get_vocab_size())
    folder, run = save_with_beginning(family, model, tmp_path / "model", tokenizer), tmp_path / "run"
    write_foreign_run(run, load_foreign(folder))
    assert main(["directions", str(run), "--device", "cpu", "--keep", "1"]) == 0
    causal, actual, neuron = open_model(run, "cpu").causal, read_directions(run, 1), int(rng.integers(40))
    place = causal.places()[1]
    rows = torch.tensor([[*causal.text_beginning, token] for token in range(tokenizer.get_vocab_size())])
    with torch.inference_mode(), capture(causal.module, [place]) as codes:
        causal.read(rows, [place])
    best = float(codes[place].reshape(*rows.shape, -1)[:, -1, neuron].max())
    assert actual.arrays["tokens_alone.largest.value"][neuron] == pytest.approx([max(best, 0)], abs=1e-5)
    begins = {"llama": [tokenizer.token_to_id(BOS)], "qwen2": []}
    assert described_directions(run).get("row_beginning") == begins.get(family)


@pytest.fixture
def trained(tmp_path: Path, rng: np.random.Generator) -> Path:
    data = make_tokens(tmp_path / "tokens", rng, documents=300)
    run = tmp_path / "crate-2l"
    train_quietly(short_training(context=80, batch_tokens=160, tokens=320),
                  tiny_config(vocab_size=data.vocab_size, context_length=80), data, run)  # fmt: skip
    return run


def test_the_command_writes_what_numpy_reads_and_neurons_shows(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["directions", str(trained), "--device", "cpu", "--keep", "9"]) == 0
    described = described_directions(trained)
    assert described["layers"]["1"] == ["predecessors", "tokens_alone", "tokens_in", "tokens_out"]
    assert described["origin"]["versions"]["torch"]
    actual = read_directions(trained, 0)
    assert actual.lists == ("tokens_in", "tokens_alone", "tokens_out", "successors")
    assert actual.num_neurons == 64
    assert len(actual.ranked("tokens_in", 5)) == 9
    scores = [value for _, value in actual.ranked("tokens_out", 5)]
    assert scores == sorted(scores, reverse=True)
    assert actual.ranked("predecessors", 5) == []
    assert actual.head_shares(3)["heads_out.shared"].sum() == pytest.approx(1)
    with pytest.raises(CrateError, match="neurons 0 to 63, not 64"):
        actual.ranked("tokens_in", 64)
    with pytest.raises(CrateError, match="found layers: 0, 1"):
        read_directions(trained, 7)

    before = (trained / "directions/neurons/layer_00.safetensors").stat().st_mtime_ns
    assert main(["directions", str(trained), "--device", "cpu", "--keep", "9"]) == 0
    assert (trained / "directions/neurons/layer_00.safetensors").stat().st_mtime_ns == before
    assert main(["directions", str(trained), "--device", "cpu", "--keep", "3"]) == 0
    assert json.loads((trained / "directions/neurons/directions.json").read_text())["keep"] == 3
    assert len(read_directions(trained, 0).ranked("tokens_in", 5)) == 3

    tokens = trained.parent / "tokens"
    assert main(["collect", str(trained), "--data", str(tokens), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["neurons", str(trained), "--layer", "1", "--neuron", "5"]) == 0
    message = capsys.readouterr().out
    for line in ("tokens in (their", "alone in a document:", "tokens out (its", "driven by neurons of layer 0: "):
        assert line in message
    assert "drives neurons" not in message
    assert main(["neurons", str(trained), "--layer", "0", "--neuron", "5"]) == 0
    assert "read by heads of layer 1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN must be at least one run directory, got none"),
        (["nowhere"], "there is no run directory nowhere"),
        (["RUN", "--keep", "0"], "--keep must be at least 1, got 0"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["directions", *(str(tmp_path) if word == "RUN" else word for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_directions_of_an_untied_decoder_are_the_ones_it_writes(rng: np.random.Generator) -> None:
    from cratelm.activations.places import decoders, find_places

    untied, complete = (random_model(tiny_config(**changes), rng) for changes in VARIANTS[1:3])
    blocks: list[Any] = [untied.blocks[0], complete.blocks[0]]
    actual = decoders(untied, find_places(untied, "neurons"))
    assert actual is not None
    assert torch.equal(actual[0], blocks[0].ista.decoder)
    actual = decoders(complete, find_places(complete, "neurons"))
    assert actual is not None
    assert torch.equal(actual[0], torch.eye(16))
