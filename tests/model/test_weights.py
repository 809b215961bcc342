"""Model directories: exact round trips, Hugging Face's GPT-2 layout, and what each kind of damage is told."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from fixtures.synthetic import make_tokenizer
from fixtures.tiny import random_model, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

import cratelm
from cratelm.errors import CrateError
from cratelm.model.config import Architecture, ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import find_model, load_model, save_model, weights_hash


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests change files and read what the checks behind the checksums say."""
    monkeypatch.setenv("CRATELM_VERIFY", "0")


CONFIGS = [
    tiny_config("crate"),
    tiny_config("crate", ista_steps=3, ista_step_size=0.05, penalty=0.2, expansion=2),
    tiny_config("gpt2"),
    tiny_config("gpt2", bias=True, activation="gelu"),
    tiny_config("gpt2", expansion=3),
]


def names(config: ModelConfig) -> str:
    return ",".join(f"{value}" for value in config.as_dict().values())


@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_a_saved_model_comes_back_exactly(config: ModelConfig, tmp_path: Path, rng: np.random.Generator) -> None:
    model = random_model(config, rng)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == config
    assert not again.training
    state, actual = model.state_dict(), again.state_dict()
    assert list(state) == list(actual)
    assert all(torch.equal(state[name], actual[name]) and actual[name].dtype == torch.float32 for name in state)
    assert weights_hash(again) == weights_hash(model)
    tokens = torch.from_numpy(rng.integers(272, size=(2, 16)))
    assert torch.equal(model(tokens), again(tokens))


def test_biases_that_are_still_zero_are_biases(tmp_path: Path) -> None:
    model = LanguageModel(tiny_config("gpt2", bias=True)).initialise(0)
    save_model(model, tmp_path / "m")
    assert load_model(tmp_path / "m").config == model.config
    assert weights_hash(load_model(tmp_path / "m")) == weights_hash(model)


def test_saving_again_replaces_the_directory_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    save_model(random_model(CONFIGS[0], rng), tmp_path / "m", make_tokenizer())
    second = random_model(CONFIGS[2], rng)
    save_model(second, tmp_path / "m")
    assert weights_hash(load_model(tmp_path / "m")) == weights_hash(second)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "checksums.json", "config.json", "model.safetensors"
    ]  # fmt: skip


def test_gpt2_is_laid_out_as_hugging_face_lays_it_out(tmp_path: Path, rng: np.random.Generator) -> None:
    model = random_model(tiny_config("gpt2"), rng)
    save_model(model, tmp_path, make_tokenizer())
    state, ours = load_file(tmp_path / "model.safetensors"), model.state_dict()
    inner = {
        "ln_1.weight": (16,), "attn.c_attn.weight": (16, 48), "attn.c_attn.bias": (48,), "attn.c_proj.weight": (16, 16),
        "attn.c_proj.bias": (16,), "ln_1.bias": (16,), "ln_2.weight": (16,), "ln_2.bias": (16,),
        "mlp.c_fc.weight": (16, 64), "mlp.c_fc.bias": (64,), "mlp.c_proj.weight": (64, 16), "mlp.c_proj.bias": (16,),
    }  # fmt: skip
    expected: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (272, 16), "transformer.wpe.weight": (16, 16),
        "transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,),
    }  # fmt: skip
    expected |= {f"transformer.h.{layer}.{name}": shape for layer in (0, 1) for name, shape in inner.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert torch.equal(state["transformer.h.1.mlp.c_fc.weight"], ours["blocks.1.mlp.up.weight"].T)
    assert torch.equal(state["transformer.h.0.attn.c_attn.weight"], ours["blocks.0.attention.query_key_value.weight"].T)
    assert torch.equal(state["transformer.ln_f.weight"], ours["norm.weight"])
    assert not any(tensor.any() for name, tensor in state.items() if name.endswith(".bias"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert (config["n_layer"], config["n_embd"], config["n_head"], config["n_inner"]) == (2, 16, 2, 64)
    assert (config["activation_function"], config["eos_token_id"], config["n_positions"]) == ("relu", 319, 16)
    assert (tmp_path / "tokenizer_config.json").exists()


@pytest.mark.parametrize("config", CONFIGS[2:], ids=names)
def test_hugging_face_computes_the_same_logits(config: ModelConfig, tmp_path: Path, rng: np.random.Generator) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(config, rng)
    save_model(model, tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    tokens = torch.from_numpy(rng.integers(272, size=(2, 16)))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert weights_hash(load_model(tmp_path / "theirs")) == weights_hash(model)


def rewrite(folder: Path, change: Any) -> None:
    """Change the weights of a saved model: `change` gets and returns the state dict."""
    state = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def test_gpt2_of_other_tools_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """No prefix, half precision, mask buffers, a copy of the tied head, and no word about biases in config.json."""
    model = random_model(tiny_config("gpt2", bias=True, activation="gelu"), rng)
    save_model(model, tmp_path)

    def as_others_write(state: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix("transformer."): tensor.bfloat16() for name, tensor in state.items()}
        bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in (0, 1)}
        return bare | {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": bare["wte.weight"].clone()}

    rewrite(tmp_path, as_others_write)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields = {name: fields[name] for name in ("model_type", "n_layer", "n_embd", "n_head", "vocab_size", "n_positions")}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    again = load_model(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16().float())


def test_biases_trained_elsewhere_are_not_lost(tmp_path: Path, rng: np.random.Generator) -> None:
    save_model(random_model(tiny_config("gpt2"), rng), tmp_path)
    one = "transformer.h.1.mlp.c_fc.bias"
    rewrite(tmp_path, lambda state: state | {one: torch.arange(64.0)})
    again = load_model(tmp_path)
    assert again.config.bias
    assert torch.equal(again.state_dict()["blocks.1.mlp.up.bias"], torch.arange(64.0))


@pytest.fixture
def crate(tmp_path: Path, rng: np.random.Generator) -> Path:
    save_model(random_model(tiny_config(vocab_size=320), rng), tmp_path / "run" / "model", make_tokenizer())
    return tmp_path / "run" / "model"


def refused(source: Path | str, message: str) -> None:
    with pytest.raises(CrateError, match=message) as raised:
        cratelm.load(source)
    assert "\n" not in str(raised.value)


def test_damaged_weights_are_refused(crate: Path) -> None:
    file = crate / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:20], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        refused(crate, r"model\.safetensors is damaged")
    file.unlink()
    refused(crate, "has a config.json but no model.safetensors")
    (crate / "model.safetensors.index.json").write_text("{")
    refused(crate, r"index.json is not readable .*\. Restore the model.safetensors.index.json that belongs to")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"surplus": torch.ones(2)}, r"surplus is \(2,\), expected nothing of that name"),
        (
            lambda state: {k: v for k, v in state.items() if k != "model.norm.bias"},
            r"norm.bias is missing, expected \(16,\)",
        ),
        (lambda state: state | {"norm.bias": torch.ones(3)}, r"norm.bias is \(3,\), expected \(16,\)"),
        (lambda state: {k: v for k, v in state.items() if k[:12] != "model.blocks"}, "is missing, .* and 15 more"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_named(crate: Path, change: Any, message: str) -> None:
    rewrite(crate, change)
    refused(crate, message)


@pytest.mark.parametrize("name", ["surplus", "score.weight", "transformer.h.0.attn.q.weight", "h.0", "h.x.ln_1.weight"])
def test_weights_that_no_gpt2_has_are_named(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    save_model(random_model(tiny_config("gpt2"), rng), tmp_path)
    rewrite(tmp_path, lambda state: state | {name: torch.ones(2)})
    refused(tmp_path, rf"{name.replace('h.x.ln_1', 'blocks.x.norm_1')} is \(2,\), expected nothing of that name")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json is not readable .*\. Restore the config.json that belongs to the weights"),
        ("[]", r"config.json holds a list, not a JSON object\. Restore the config.json"),
        ("{}", "describes a None model; this command reads crate and gpt2"),
        ('{"model_type": "llama"}', "describes a 'llama' model"),
        ('{"model_type": "crate"}', r"lacks or misspells a field .*num_layers.*\. Restore the config.json"),
        ('{"model_type": "crate", "format_version": 99}', "has format version 99, this cratelm reads up to 1"),
        ('{"model_type": "gpt2"}', "lacks or misspells a field .*n_embd"),
        (
            '{"model_type": "gpt2", "activation_function": "silu"}',
            "activation_function of .* must be relu or gelu_new or gelu_pytorch_tanh, got 'silu'",
        ),
        ('{"model_type": "gpt2", "layer_norm_epsilon": 1e-6}', "layer_norm_epsilon of .* must be 1e-05, got 1e-06"),
        ('{"model_type": "gpt2", "tie_word_embeddings": false}', "tie_word_embeddings of .* must be True, got False"),
    ],
)
def test_an_unusable_config_is_refused(crate: Path, text: str, message: str) -> None:
    (crate / "config.json").write_text(text)
    refused(crate, message)


FIELDS = [
    ("crate", "num_layers", 2.0, "num_layers must be a whole number, got 2.0. Restore the config.json"),
    ("crate", "num_layers", True, "num_layers must be a whole number, got True"),
    ("crate", "num_layers", 10**9, "1000000000 layers"),
    ("crate", "d_model", 1e9, "d_model must be a whole number, got 1000000000.0"),
    ("crate", "d_model", 10**12, "do not fit its configuration"),
    ("crate", "rotary", "yes", "rotary must be true or false, got 'yes'"),
    ("crate", "penalty", math.nan, "penalty must be a finite number, got nan"),
    ("crate", "penalty", "0.1", "penalty must be a finite number, got '0.1'"),
    ("crate", "activation", [], "activation must be relu or gelu, got []"),
    ("gpt2", "n_layer", 2.0, "num_layers must be a whole number, got 2.0"),
    ("gpt2", "n_embd", 0, "lacks or misspells a field"),
    ("gpt2", "n_positions", "16", "context_length must be a whole number, got '16'"),
]
LOAD_ALL = """
import subprocess
import sys
from cratelm.errors import CrateError
from cratelm.model.weights import load_model
from pathlib import Path
for folder in map(Path, sys.argv[1:]):
    try:
        load_model(folder)
    except CrateError as error:
        print(error)
"""


def test_a_field_of_another_type_or_size_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    """In a process of its own: here the annotations are executed and would be the first to refuse."""
    folders = [tmp_path / str(number) for number in range(len(FIELDS))]
    for folder, (arch, field, value, _) in zip(folders, FIELDS, strict=True):
        save_model(random_model(tiny_config(cast(Architecture, arch)), rng), folder)
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {field: value}))
    command = [sys.executable, "-c", LOAD_ALL, *map(str, folders)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(FIELDS), lines
    for line, (*_, message) in zip(lines, FIELDS, strict=True):
        assert message in line


def test_a_damaged_tokenizer_is_refused(crate: Path) -> None:
    (crate / "tokenizer.json").write_text("{}")
    refused(crate, r"tokenizer\.json is not a readable tokenizer")


def test_load_takes_a_run_or_a_model_directory(crate: Path) -> None:
    for source in (crate, crate.parent, str(crate.parent)):
        model, tokenizer = cratelm.load(source)
        assert weights_hash(model) == weights_hash(load_model(crate))
        assert tokenizer is not None
        assert tokenizer.to_str() == make_tokenizer().to_str()
    (crate / "tokenizer.json").unlink()
    assert cratelm.load(crate)[1] is None


def test_a_path_without_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(tmp_path, r"no model in .* \(no config.json there or in model/\). Run: cratelm train --data DIR --out")
    refused(tmp_path / "nowhere", r"nowhere does not exist. Run: cratelm train --data DIR --out .*nowhere$")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("./x", "a/b/c", "~/x", "runs/crate-2l"):
        refused(path, rf"{path} does not exist. Run: cratelm train")


def test_a_file_in_the_place_of_a_model_is_not_to_be_trained_into(tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pt"
    file.write_text("weights")
    refused(file, r"ckpt.pt is a file, .* run: cratelm import \S+/ckpt.pt --out RUN$")


def test_a_hub_name_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("someone/gpt2", r"is not a local folder, and hub names need an extra. Run: pip install 'cratelm\[hf\]'")


def test_a_hub_name_is_fetched_and_a_failure_is_one_line(
    crate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        if name == "gone":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more")
        return str(crate)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("someone/gpt2") == crate
    refused(
        "gone",
        r"gone is neither a local folder nor reachable on the hub \(offline\)\. Check the name .* cratelm train --data",
    )
    assert asked == ["someone/gpt2", "gone"]


def test_the_hash_is_of_every_weight_and_every_setting(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    seen = {weights_hash(model)}
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        at = int(rng.integers(flat.numel()))
        flat[at] = torch.nextafter(flat[at], torch.tensor(9.0))
        seen.add(weights_hash(model))
    assert len(seen) == 1 + len(list(model.parameters()))
    for change in ({"penalty": 0.2}, {"ista_step_size": 0.2}, {"ista_steps": 3}, {"num_heads": 4}):
        other = LanguageModel(tiny_config(**change))
        other.load_state_dict(model.state_dict())
        seen.add(weights_hash(other))
    assert len(seen) == 5 + len(list(model.parameters()))
