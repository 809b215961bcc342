"""What the collector sees of a model, against forward hooks of torch on fresh tokens; the families of Hugging Face."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.hugging_face import FAMILIES, NEURONS, build, save
from fixtures.tiny import random_model, tiny_config
from torch import Tensor

from cratelm.activations.causal_model import causal_model
from cratelm.activations.foreign import load_foreign
from cratelm.activations.observe import observe
from cratelm.activations.places import decoders, find_places, tap_folder
from cratelm.activations.taps import capture, edit
from cratelm.errors import CrateError
from cratelm.model.config import Architecture

families = pytest.mark.parametrize("family", FAMILIES)
both = pytest.mark.parametrize("arch", get_args(Architecture))


def fresh_tokens(rng: np.random.Generator, vocab: int = 60, length: int = 30) -> Tensor:
    return torch.from_numpy(rng.integers(vocab, size=(3, length)))


def hooked(model: Any, names: list[str], tokens: Tensor, *, read: bool = False) -> list[Tensor]:
    """What modules make, or read, taken with hooks of torch's own and copied at that moment."""
    result: dict[str, Tensor] = {}
    handles = []
    for name in names:
        module = model.get_submodule(name)

        def keep(_module: object, inputs: Any, output: Any = None, name: str = name) -> None:
            value = inputs[0] if output is None else output
            result[name] = (value[0] if isinstance(value, tuple) else value).clone()

        handles.append(module.register_forward_pre_hook(keep) if read else module.register_forward_hook(keep))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return [result[name] for name in names]


def gated(model: Any, tokens: Tensor) -> list[Tensor]:
    """act(gate) * up of each layer, computed from what the MLP reads."""
    names = [f"model.layers.{layer}.mlp" for layer in range(2)]
    codes = []
    for name, x in zip(names, hooked(model, names, tokens, read=True), strict=True):
        mlp = model.get_submodule(name)
        with torch.no_grad():
            if hasattr(mlp, "gate_up_proj"):
                gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
            else:
                gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            codes.append(F.silu(gate) * up)
    return codes


@families
def test_the_neurons_of_a_family_are_those_that_hooks_see(family: str, rng: np.random.Generator) -> None:
    model, tokens = build(family, rng), fresh_tokens(rng)
    subject = observe(model, model_hash="h")
    expected = (
        hooked(model, [NEURONS[family].format(layer) for layer in range(2)], tokens)
        if family in NEURONS
        else gated(model, tokens)
    )
    codes = subject.forward(tokens)
    assert subject.layers == {0: 40, 1: 40}
    assert subject.tap == "neurons"
    for layer, code in enumerate(expected):
        torch.testing.assert_close(codes[layer], code.view(codes[layer].shape), rtol=1e-5, atol=1e-6)


@families
def test_what_the_neurons_of_a_family_write_is_what_its_mlp_adds(family: str, rng: np.random.Generator) -> None:
    model, tokens = build(family, rng), fresh_tokens(rng)
    places = find_places(model, "neurons")
    directions = decoders(model, places)
    assert directions is not None
    paths = [place.removesuffix(":input") for place in places.values()]
    codes = observe(model, model_hash="h").forward(tokens)
    for layer, made in enumerate(hooked(model, paths, tokens)):
        bias = getattr(model.get_submodule(paths[layer]), "bias", None)
        written = codes[layer] @ directions[layer] + (0 if bias is None else bias)
        torch.testing.assert_close(written, made.view(written.shape), rtol=1e-4, atol=1e-5)


@families
def test_heads_and_residual_of_a_family_are_those_that_hooks_see(family: str, rng: np.random.Generator) -> None:
    model, tokens = build(family, rng), fresh_tokens(rng)
    blocks = list(find_places(model, "residual").values())
    maps = [place.removesuffix(":input") for place in find_places(model, "heads").values()]
    assert [path.rpartition(".")[2] for path in blocks] == ["0", "1"]
    assert all(path.startswith(f"{block}.") and "att" in path for path, block in zip(maps, blocks, strict=True))
    heads, residual = (observe(model, model_hash="h", tap=tap).forward(tokens) for tap in ("heads", "residual"))
    for layer in range(2):
        torch.testing.assert_close(heads[layer], hooked(model, maps, tokens, read=True)[layer])
        torch.testing.assert_close(residual[layer], hooked(model, blocks, tokens)[layer])


@both
def test_our_models_give_neurons_heads_and_residual(arch: Architecture, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(arch), rng)
    tokens = fresh_tokens(rng, 272, 16)
    subjects = {tap: observe(model, model_hash="h", tap=tap) for tap in ("neurons", "heads", "residual")}
    codes = {tap: subject.forward(tokens) for tap, subject in subjects.items()}
    attention = "mssa" if arch == "crate" else "attention"
    for layer in range(2):
        neurons, attended, block = hooked(
            model, [model.neuron_taps[layer], f"blocks.{layer}.{attention}", f"blocks.{layer}"], tokens
        )
        assert torch.equal(codes["neurons"][layer], neurons)
        assert torch.equal(codes["residual"][layer], block)
        output: Any = model.get_submodule(f"blocks.{layer}.{attention}.output")
        with torch.no_grad():
            torch.testing.assert_close(output(codes["heads"][layer]), attended)
    assert subjects["neurons"].identity["layers"] == [0, 1]


@both
def test_our_neurons_write_their_decoder_directions(arch: Architecture, rng: np.random.Generator) -> None:
    model, tokens = random_model(tiny_config(arch, bias=False), rng), fresh_tokens(rng, 272, 16)
    subject = observe(model, model_hash="h")
    part = "ista" if arch == "crate" else "mlp"
    assert subject.decoders is not None
    for layer, made in enumerate(hooked(model, [f"blocks.{layer}.{part}" for layer in range(2)], tokens)):
        torch.testing.assert_close(subject.forward(tokens)[layer] @ subject.decoders[layer], made)


def test_a_place_that_writes_nowhere_has_no_decoder(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    assert decoders(model, find_places(model, "residual")) is None
    assert decoders(model, find_places(model, "blocks.{layer}.norm_1:input")) is None
    baseline = random_model(tiny_config("gpt2"), rng)
    assert decoders(baseline, find_places(baseline, "blocks.{layer}.mlp.up:input")) is None
    heads = decoders(model, find_places(model, "heads"))
    assert heads is not None
    output: Any = model.get_submodule("blocks.1.mssa.output")
    assert torch.equal(heads[1], output.weight.T)


def test_a_tap_by_hand_names_modules_and_what_they_read(rng: np.random.Generator) -> None:
    model, tokens = random_model(tiny_config(num_layers=3), rng), fresh_tokens(rng, 272, 16)
    names = [f"blocks.{layer}.mssa.output" for layer in range(3)]
    made = observe(model, model_hash="h", tap="blocks.{layer}.mssa.output", layers=(2, 0))
    read = observe(model, model_hash="h", tap="blocks.{layer}.mssa.output:input")
    assert (made.tap, read.tap) == ("blocks.L.mssa.output", "blocks.L.mssa.output-input")
    assert list(made.layers) == [0, 2]
    assert torch.equal(made.forward(tokens)[2], hooked(model, names, tokens)[2])
    assert torch.equal(read.forward(tokens)[1], hooked(model, names, tokens, read=True)[1])
    one = observe(model, model_hash="h", tap="blocks.1.ista.neurons")
    assert (one.tap, one.layers) == ("blocks.1.ista.neurons", {1: 64})
    assert observe(model, model_hash="h", tap="norm").layers == {0: 16}


def test_a_tap_on_the_head_runs_the_head(rng: np.random.Generator) -> None:
    model, tokens = build("llama", rng), fresh_tokens(rng)
    logits = observe(model, model_hash="h", tap="lm_head").forward(tokens)[0]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits)


def test_the_mirrored_tap_is_the_tap_times_minus_one(rng: np.random.Generator) -> None:
    model, tokens = random_model(tiny_config("gpt2", activation="gelu"), rng), fresh_tokens(rng, 272, 16)
    up, down = (observe(model, model_hash="h", sign=sign) for sign in ("positive", "negative"))
    assert (up.tap, down.tap) == ("neurons", "neurons-negative")
    assert up.forward(tokens)[1].min() < 0
    assert torch.equal(down.forward(tokens)[1], -up.forward(tokens)[1])
    assert up.decoders is not None
    assert down.decoders is not None
    assert torch.equal(down.decoders[0], -up.decoders[0])


def test_folders_of_different_taps_differ() -> None:
    taps = ["neurons", "heads", "m.{layer}.x", "m.1.x", "m.{layer}.x:input", "m.x"]
    folders = [tap_folder(tap, negative=negative) for tap in taps for negative in (False, True)]
    assert len(set(folders)) == len(folders)
    assert all(set(folder) <= set("abcdefghijklmnopqrstuvwxyzL.-_0123456789") for folder in folders)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("blocks.{layer}.msa.output", r"no modules 'blocks.\{layer\}.msa.output'.*blocks.\{layer\}.mssa.output"),
        ("blocks.{layer}.mssa.outptu:input", r"no modules .*blocks.\{layer\}.mssa.output"),
        ("blocks.7.ista.neurons", "no module 'blocks.7.ista.neurons'.*blocks.1.ista.neurons"),
        ("quite.{layer}.else", r"Similar: .*blocks.\{layer\}.norm_1"),
        ("positions", "positions does not run in the model's forward pass"),
        ("blocks", "no module 'blocks'"),
    ],
)
def test_a_tap_that_is_not_there_is_an_error_that_lists_what_is(
    tap: str, message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(CrateError, match=message):
        observe(random_model(tiny_config(), rng), model_hash="h", tap=tap)


def test_a_layer_that_is_not_there_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(CrateError, match=r"--layer must be a layer with this tap \(0, 1\), got 5"):
        observe(random_model(tiny_config(), rng), model_hash="h", layers=(0, 5))


def test_a_model_that_sees_later_tokens_is_refused(rng: np.random.Generator) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    torch.manual_seed(int(rng.integers(1 << 31)))
    config = transformers.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=40)  # fmt: skip
    model = transformers.BertModel(config).eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    with pytest.raises(CrateError, match="layer 0 sees later tokens"):
        observe(model, model_hash="h", tap="encoder.layer.{layer}.output.dense:input")


def test_a_mixture_of_experts_asks_for_a_tap(rng: np.random.Generator) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    torch.manual_seed(int(rng.integers(1 << 31)))
    config = transformers.MixtralConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=1, intermediate_size=40, num_local_experts=2)  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    with pytest.raises(CrateError, match=r"neurons are not recognised. Give a module: --tap 'model.layers"):
        observe(model, model_hash="h")
    assert observe(model, model_hash="h", tap="residual").layers == {0: 16}


def test_a_capture_of_an_input_and_an_edit_of_one_agree_with_the_module(rng: np.random.Generator) -> None:
    model, tokens = random_model(tiny_config("gpt2"), rng), fresh_tokens(rng, 272, 16)
    down: Any = model.get_submodule("blocks.1.mlp.down")
    with torch.no_grad():
        names = ["blocks.1.mlp.down:input", "blocks.1.mlp.down", "blocks.1.mlp.neurons"]
        with edit(model, {"blocks.1.mlp.down:input": lambda code: 2 * code}), capture(model, names) as seen:
            model(tokens)
        torch.testing.assert_close(seen["blocks.1.mlp.down:input"], 2 * seen["blocks.1.mlp.neurons"])
        torch.testing.assert_close(seen["blocks.1.mlp.down"], down(seen["blocks.1.mlp.down:input"]))
    assert not down._forward_pre_hooks


def test_rows_are_as_long_as_ours_read_and_shorter_for_long_contexts(rng: np.random.Generator) -> None:
    ours = random_model(tiny_config(context_length=1500), rng)
    assert causal_model(ours).row_length() == 1500
    assert causal_model(ours).row_length(70) == 70
    with pytest.raises(CrateError, match="--context must be 1 to 1500 tokens .*, got 1501"):
        causal_model(ours).row_length(1501)
    assert causal_model(build("llama", rng, max_position_embeddings=5000)).row_length() == 1024
    assert causal_model(build("llama", rng, max_position_embeddings=5000)).row_length(3000) == 3000


@families
def test_a_saved_model_comes_back_with_the_same_activations(
    family: str, rng: np.random.Generator, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokens = build(family, rng), fresh_tokens(rng)
    capfd.readouterr()
    loaded = load_foreign(save(model, tmp_path / "model"))
    assert capfd.readouterr() == ("", "")
    assert loaded.arch == family
    assert loaded.tokenizer is None
    first, second = (observe(one, model_hash="h").forward(tokens) for one in (model, loaded.model))
    torch.testing.assert_close(first, second)


def test_the_hash_differs_with_weights_and_settings(rng: np.random.Generator, tmp_path: Path) -> None:
    model = build("llama", rng)
    first = load_foreign(save(model, tmp_path / "a")).model_hash
    assert load_foreign(save(model, tmp_path / "b")).model_hash == first
    model.config.rms_norm_eps *= 2
    assert load_foreign(save(model, tmp_path / "c")).model_hash != first
    model.config.rms_norm_eps /= 2
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert load_foreign(save(model, tmp_path / "d")).model_hash != first


def test_missing_weights_are_refused_and_not_drawn_at_random(rng: np.random.Generator, tmp_path: Path) -> None:
    model = build("qwen2", rng)
    folder = save(model, tmp_path / "model")
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CrateError, match=r"weights of .* lack model.layers.0.mlp.up_proj.weight. Fetch"):
        load_foreign(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CrateError, match="is not a causal language model that transformers reads"):
        load_foreign(folder)


def test_costs_of_a_gpt2_are_those_of_our_own(rng: np.random.Generator) -> None:
    config = tiny_config("gpt2", bias=True, vocab_size=60, context_length=128, activation="gelu")
    model = build("gpt2", rng, n_inner=64)
    assert causal_model(model).num_parameters == config.num_parameters
    assert causal_model(model).flops_per_token == config.flops_per_token()
