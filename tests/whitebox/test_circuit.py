"""Circuits: effects, gradients, edges and shares against single ablations done by hand; written, drawn, told."""

import functools
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from fixtures.hugging_face import build, save
from fixtures.tiny import hidden_bar, make_tokens, random_model, tiny_config
from torch import Tensor, nn

from cratelm.activations.places import find_places
from cratelm.activations.taps import capture, edit
from cratelm.cli import main
from cratelm.data.tokenizer import load_tokenizer
from cratelm.model.config import Architecture
from cratelm.model.weights import load, save_model
from cratelm.report.figures.circuit import circuit_figure, circuit_lines
from cratelm.rundir import write_json
from cratelm.whitebox.circuit import CircuitConfig, PromptSubject, choose, edges, explained, gradients, rank

both = pytest.mark.parametrize("arch", get_args(Architecture))


def subject_of(arch: Architecture, rng: np.random.Generator, *, baseline: bool = False) -> PromptSubject:
    model = random_model(tiny_config(arch), rng).requires_grad_(False)
    means = {layer: torch.from_numpy(rng.uniform(0, 0.2, 64)).float() for layer in (0, 1)} if baseline else None
    prompt = torch.from_numpy(rng.integers(272, size=7))
    return PromptSubject(model, find_places(model, "neurons"), prompt, int(rng.integers(272)), means)


def by_hand(subject: PromptSubject, layer: int, mask: Tensor, seen: str = "") -> tuple[float, Tensor | None]:
    """log p with the codes of one layer at the baseline where the mask says; and what passes at a tap."""
    model: nn.Module = subject.model
    change = {
        subject.places[layer]: lambda code: torch.where(
            mask, subject.baselines[layer], code.view(1, *mask.shape)
        ).view_as(code)
    }
    with torch.no_grad(), edit(model, change), capture(model, [seen] if seen else []) as actual:
        logits = model(subject.prompt[None])
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return float(logits[0, -1].log_softmax(0)[subject.target]), actual.get(seen)


def one(subject: PromptSubject, layer: int, position: int, neuron: int) -> Tensor:
    mask = torch.zeros(subject.codes[layer].shape[1:], dtype=torch.bool)
    mask[position, neuron] = True
    return mask


@both
@pytest.mark.parametrize("baseline", [False, True])
def test_effects_are_single_ablations(arch: Architecture, baseline: bool, rng: np.random.Generator) -> None:
    subject = subject_of(arch, rng, baseline=baseline)
    config = CircuitConfig(nodes=3, candidates=0, batch=13)
    ranked = rank(subject, config, bar=hidden_bar())
    differ = sum(int((code[0] != subject.baselines[layer]).sum()) for layer, code in subject.codes.items())
    assert len(ranked) == differ
    assert [abs(effect) for effect in ranked.values()] == sorted(map(abs, ranked.values()), reverse=True)
    for node in [*list(ranked)[:4], *list(ranked)[-4:]]:
        expected = subject.full - by_hand(subject, node[0], one(subject, *node))[0]
        assert ranked[node] == pytest.approx(expected, abs=1e-5)
    chosen = choose(ranked, config)
    assert [node[0] for node in chosen] == [0, 0, 0, 1, 1, 1]
    some = rank(subject, CircuitConfig(candidates=5), bar=hidden_bar())
    assert len(some) == 10
    assert all(some[node] == pytest.approx(ranked[node], abs=1e-5) for node in some)


@both
def test_gradients_are_the_slopes_of_small_changes(arch: Architecture, rng: np.random.Generator) -> None:
    subject = subject_of(
        arch, rng, baseline=True
    )  # not 0: there a LayerNorm behind a code alone has no slope to follow
    subject.model.double()
    subject = PromptSubject(subject.model, subject.places, subject.prompt, subject.target, subject.baselines)
    slopes = gradients(subject, CircuitConfig(method="gradient"))
    whole = gradients(subject, CircuitConfig(method="integrated", integration_steps=200))
    for layer, code in subject.codes.items():
        position, neuron = (int(i) for i in (code[0] > 0.05).nonzero()[-1])
        amount = 1e-3  # logits are float32
        change = torch.zeros_like(code[0])
        change[position, neuron] = amount
        up, down = (
            float(subject.measured(1, {layer: functools.partial(torch.add, other=sign * change)})[0])
            for sign in (1, -1)
        )
        slope = (up - down) / (2 * amount)
        assert float(slopes[layer][position, neuron]) == pytest.approx(
            slope * float(code[0, position, neuron] - subject.baselines[layer][neuron]), rel=5e-2, abs=5e-4
        )
        # Integrated gradients add up to what the whole layer does.
        none = by_hand(subject, layer, torch.ones_like(code[0], dtype=torch.bool))[0]
        assert float(whole[layer].sum()) == pytest.approx(subject.full - none, abs=2e-2)


@both
def test_edges_are_changes_of_codes_and_shares_are_what_is_left(arch: Architecture, rng: np.random.Generator) -> None:
    subject = subject_of(arch, rng)
    config = CircuitConfig(nodes=3, candidates=0)
    ranked = rank(subject, config, bar=hidden_bar())
    chosen = choose(ranked, config)
    actual = edges(subject, {node: ranked[node] for node in chosen}, config)
    assert {tuple(edge["from"]) for edge in actual} <= set(chosen)
    for edge in actual[:3]:
        source, (_, position, neuron) = edge["from"], edge["to"]
        _, code = by_hand(subject, 0, one(subject, *source), subject.places[1])
        assert code is not None
        own = float(subject.codes[1][0, position, neuron])
        assert edge["change"] == pytest.approx(own - float(code[0, position, neuron]), abs=1e-5)
        assert edge["effect"] == pytest.approx(edge["change"] / own * ranked[tuple(edge["to"])], abs=1e-5)
    shares = explained(subject, list(ranked), chosen)
    # All active nodes kept is the whole model; all ablated is none of it.
    assert shares["curve"][-1]["nodes"] == len(ranked)
    assert shares["curve"][-1]["log_probability"] == pytest.approx(subject.full, abs=1e-4)
    every = [(layer, *divmod(i, 64)) for layer, code in subject.codes.items() for i in range(code.numel())]
    assert explained(subject, list(ranked), every)["without"] == pytest.approx(shares["none"], abs=1e-4)
    whole = subject.full - shares["none"]
    assert shares["share_kept"] == pytest.approx((shares["kept"] - shares["none"]) / whole)
    assert shares["share_lost"] == pytest.approx((subject.full - shares["without"]) / whole)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_circuits_of_hugging_face_models(family: str, rng: np.random.Generator) -> None:
    model = build(family, rng).requires_grad_(False)
    subject = PromptSubject(model, find_places(model, "neurons"), torch.from_numpy(rng.integers(60, size=6)), 7)
    config = CircuitConfig(candidates=20, nodes=2, batch=7)
    ranked = rank(subject, config, bar=hidden_bar())
    for node in list(ranked)[:3]:
        expected = subject.full - by_hand(subject, node[0], one(subject, *node))[0]
        assert ranked[node] == pytest.approx(expected, abs=1e-5)
    chosen = choose(ranked, config)
    edge = edges(subject, {node: ranked[node] for node in chosen}, config)[0]
    _, position, neuron = edge["to"]
    _, code = by_hand(subject, 0, one(subject, *edge["from"]), subject.places[1])
    assert code is not None
    change = float(subject.codes[1][0, position, neuron] - code.view(6, -1)[position, neuron])
    assert edge["change"] == pytest.approx(change, abs=1e-5)
    whole = rank(subject, CircuitConfig(method="integrated"), bar=hidden_bar())
    shares = explained(subject, list(whole), chosen)
    assert shares["curve"][-1]["log_probability"] == pytest.approx(subject.full, abs=1e-4)


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    data = make_tokens(tmp_path / "tokens", rng)
    folder = tmp_path / "crate-2l"
    model = random_model(tiny_config(vocab_size=data.vocab_size), rng)
    save_model(model, folder / "model", load_tokenizer(data.path))
    write_json(folder / "run.json", {"name": folder.name, "arch": "crate", "control": None, "of": None})
    return folder


def test_the_command_writes_draws_and_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["circuit", str(run), "--prompt", "a crate holds", "--device", "cpu", "--nodes", "3"]
    assert main([*arguments, "--candidates", "20"]) == 0
    message = capsys.readouterr().out
    (path,) = (run / "circuits").glob("*.json")
    assert path.with_suffix(".svg").exists()
    assert path.with_suffix(".png").exists()
    actual = json.loads(path.read_text())
    assert len(actual["nodes"]) == 6
    assert actual["origin"]["versions"]["torch"]
    assert "".join(actual["tokens"]) == "<|endoftext|>a crate holds"
    assert f"probability {100 * math.exp(actual['explained']['log_probability']):.2f} %" in message
    assert message.splitlines()[-1].endswith(".svg")
    assert list(circuit_lines(actual))[0] in message
    figure = circuit_figure(actual, "crate-2l")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts[:-1]) == sorted(str(node["neuron"]) for node in actual["nodes"])
    assert main([*arguments, "--method", "gradient", "--token", "a"]) == 0
    assert len(list((run / "circuits").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token", "zzzz qqqq"], "must be one token of this model"),
        (["--prompt", "a crate holds rain. " * 9], "the model's context is 16"),
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--candidates", "-1"], "--candidates must be at least 0, got -1"),
        (["--baseline", "mean"], "no fixed records of layer 0"),
        (["--prompt", ""], "the prompt is empty. Give some text with --prompt"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if "--prompt" in arguments else ["--prompt", "a crate", *arguments]
    assert main(["circuit", str(run), "--device", "cpu", *given]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (run / "circuits").exists()


def test_a_model_whose_logits_are_not_finite_has_no_circuit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(run)
    nn.init.constant_(model.get_parameter("norm.weight"), torch.nan)
    save_model(model, run / "model", tokenizer)
    assert main(["circuit", str(run), "--device", "cpu", "--prompt", "a crate"]) == 2
    assert "shares of it are undefined" in capsys.readouterr().err
    assert not (run / "circuits").exists()


@pytest.mark.parametrize("words", [["circuit", "--prompt", "a crate"], ["directions"]], ids=lambda words: words[0])
def test_a_hugging_face_model_given_by_its_path_gets_a_hint(
    words: list[str], tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(build("llama", rng), tmp_path / "hf-llama")
    capsys.readouterr()
    assert main([words[0], str(folder), *words[1:]]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"must be a run, got a Hugging Face model (llama). Hint: cratelm collect {folder} --data DIR" in err
