"""Weights as other tools leave them: in `pytorch_model.bin`, in several files, under names with wrappers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import released
from fixtures.tiny import random_model, tiny_config
from model.test_official import HEADS, SIZE, save
from safetensors.torch import load_file, save_file

from cratelm.errors import CrateError
from cratelm.model.official import read_official
from cratelm.model.weights import load_model, save_model, weights_hash

Rename = Callable[[str], str]


@pytest.fixture(params=["crate", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> Path:
    save_model(random_model(tiny_config(request.param), rng), tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()  # other tools write none
    return tmp_path / "model"


def test_a_folder_with_pytorch_model_bin_alone_is_read(folder: Path) -> None:
    expected = weights_hash(load_model(folder))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert weights_hash(load_model(folder)) == expected
    halves: list[dict[str, Any]] = [{}, {}]
    for number, (name, tensor) in enumerate(state.items()):
        halves[number % 2][name] = tensor
    (folder / "pytorch_model.bin").unlink()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        torch.save(half, folder / name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for f, half in zip(names, halves, strict=True) for n in half}}))
    assert weights_hash(load_model(folder)) == expected
    (folder / names[1]).unlink()
    (folder / names[1]).symlink_to(folder / "nowhere")
    with pytest.raises(CrateError, match=names[1]):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(CrateError, match="index.json: weight_map must be an object, got None"):
        load_model(folder)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("the code ran",)


def test_code_in_pytorch_model_bin_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(CrateError, match=r"pytorch_model.bin holds pickled code \(.*print\) and is refused"):
        load_model(folder)
    assert capsys.readouterr().out == ""


WRAPPED: list[Rename] = [
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: re.sub(r"^(model|transformer)\.", r"\1._orig_mod.", name),
    lambda name: re.sub(r"\.(\d+)\.", r".\1._orig_mod.", name),
    lambda name: re.sub(r"\.(\d+)\.", r"._fsdp_wrapped_module.\1._checkpoint_wrapped_module.", name),
]


@pytest.mark.parametrize("rename", WRAPPED)
def test_wrappers_in_names_are_left_out_wherever_they_stand(folder: Path, rename: Rename) -> None:
    expected = weights_hash(load_model(folder))
    state = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    assert weights_hash(load_model(folder)) == expected


@pytest.mark.parametrize("rename", WRAPPED)
def test_wrappers_in_released_names_are_left_out(rename: Rename, tmp_path: Path, rng: np.random.Generator) -> None:
    content = released.checkpoint(released.crate_state(rng, **SIZE), heads=HEADS)
    expected = weights_hash(read_official(save(content, tmp_path / "plain.pt"))[0])
    content["model"] = {rename(name): tensor for name, tensor in content["model"].items()}
    assert weights_hash(read_official(save(content, tmp_path / "wrapped.pt"))[0]) == expected
