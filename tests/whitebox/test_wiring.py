"""The wiring of models: norms seen by what they do, Hugging Face families against what they compute."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.hugging_face import FAMILIES, build, save
from fixtures.tiny import make_tokens
from torch import Tensor

from cratelm.activations.direction_files import read_directions
from cratelm.cli import main
from cratelm.whitebox.directions import layer_directions
from cratelm.whitebox.parts import Wiring, seen_norm
from cratelm.whitebox.wiring import wiring


@pytest.mark.parametrize("width", [7, 8])
def test_the_gain_of_any_norm_is_seen(width: int, rng: np.random.Generator) -> None:
    class RootMeanSquare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(rng.normal(1, 0.3, width)))

        def forward(self, x: Tensor) -> Tensor:
            return x / x.square().mean(dim=-1, keepdim=True).sqrt() * (1 + self.weight)

    class Centred(torch.nn.Module):  # no nn.LayerNorm, so that it is seen by what it does
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.LayerNorm(width).double()
            self.inner.weight.data.normal_()
            self.inner.bias.data.normal_()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    plain, centred = RootMeanSquare(), Centred()
    with torch.no_grad():
        seen = seen_norm(plain, torch.zeros(width).double())
        assert not seen.centres
        assert torch.allclose(seen.gain, 1 + plain.weight, atol=1e-4)
        seen = seen_norm(centred, torch.zeros(width).double())
        assert seen.centres
        assert torch.allclose(seen.gain, centred.inner.weight, atol=1e-4)
        x, v = torch.from_numpy(rng.normal(size=(2, 5, width)))
        assert torch.allclose((seen.along(v) * x).sum(dim=1), (v * seen.before(x)).sum(dim=1))


def parts_of(result: Wiring) -> list[str]:
    """What is known of the first layer's heads and of the ends of the model."""
    first = result.layers[0]
    ends = [name for name in ("embedding", "head", "final_norm") if getattr(result, name) is not None]
    return [*first.subspaces, *(["output"] if first.output is not None else []), *ends]


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_models_are_wired_as_they_compute(family: str, rng: np.random.Generator) -> None:
    model = build(family, rng)
    result = wiring(model)
    ends = [] if family == "opt" else ["embedding", "head", "final_norm"]  # OPT's embeddings are narrower here
    assert parts_of(result) == ["query", "key", "value", "output", *ends]
    # Whatever is known fits what the model computes: the map from the last layer's code to the logits at a fixed scale.
    if family == "opt":
        return
    tokens = torch.from_numpy(rng.integers(60, size=(1, 6)))
    last = result.layers[-1]
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        normed = out.hidden_states[-1][0, -1]
        bias = model.get_output_embeddings().bias
        expected = result.head @ normed + (0 if bias is None else bias)
        assert torch.allclose(expected, out.logits[0, -1], atol=1e-4)
    assert last.read.shape == last.write.shape
    arrays = layer_directions(result, 0, vocabulary=60, keep=5)
    assert {"tokens_in.largest.index", "tokens_out.smallest.value", "successors.largest.index"} <= arrays.keys()


def test_gpt2_from_hugging_face_has_the_directions_of_ours(tmp_path: Path, rng: np.random.Generator) -> None:
    from cratelm.model.weights import load

    model = build("gpt2", rng, n_inner=64)
    ours, _ = load(save(model, tmp_path / "gpt2"))
    theirs, own = wiring(model), wiring(ours)
    for layer in (0, 1):
        first, second = (layer_directions(result, layer, vocabulary=60, keep=5) for result in (theirs, own))
        assert first.keys() == second.keys()
        for name, values in first.items():
            if not name.endswith(".index"):
                assert values == pytest.approx(second[name], abs=1e-4), name


def test_a_run_of_a_hugging_face_model_has_directions_and_circuits(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    from cratelm.activations.foreign import load_foreign, write_foreign_run

    data = make_tokens(tmp_path / "tokens", rng)
    save(build("gpt_neox", rng, vocab=data.vocab_size), tmp_path / "pythia", data.path / "tokenizer.json")
    run = tmp_path / "run"
    write_foreign_run(run, load_foreign(tmp_path / "pythia"))
    assert main(["directions", str(run), "--device", "cpu", "--keep", "4"]) == 0
    result = read_directions(run, 1)
    assert result.lists == ("tokens_in", "tokens_alone", "tokens_out", "predecessors")
    assert set(read_directions(run, 0).head_shares(3)) == {
        "heads_in", "heads_out.query", "heads_out.key", "heads_out.value",
    }  # fmt: skip
    assert main(["circuit", str(run), "--prompt", "a crate", "--device", "cpu", "--candidates", "9"]) == 0
    assert capsys.readouterr().out.strip().endswith(".svg")
    assert main(["whitebox", str(run), "--data", str(data.path)]) == 2
    assert main(["dial", str(run), "--data", str(data.path)]) == 2
    message = capsys.readouterr().err.splitlines()
    assert all("must be a model of cratelm, got a Hugging Face model" in line for line in message[-2:])
