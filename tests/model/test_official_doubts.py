"""What a released checkpoint leaves open: whether its bytes are whole, which activation it has, its best loss."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import released
from model.test_official import HEADS, SIZE, assert_same, save

from cratelm import cli
from cratelm.errors import CrateError
from cratelm.model.official import read_official


@pytest.fixture
def tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(SIZE["vocab"], size=(3, SIZE["context"])))


def test_a_changed_byte_of_a_weight_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    state = released.crate_state(rng, **SIZE)
    path = save(released.checkpoint(state, heads=HEADS), tmp_path / "ckpt.pt")
    content = bytearray(path.read_bytes())
    atoms = state["transformer.h.1.ista.weight"].numpy().tobytes()
    content[content.index(atoms) + int(rng.integers(len(atoms)))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CrateError, match="is damaged .*was changed after it was written"):
        read_official(path)


def test_a_file_without_check_sums_is_read(
    tmp_path: Path, rng: np.random.Generator, tokens: torch.Tensor
) -> None:  # fmt: skip
    state = released.crate_state(rng, **SIZE)
    torch.serialization.set_crc32_options(False)
    try:
        path = save(released.checkpoint(state, heads=HEADS), tmp_path / "ckpt.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    model, _ = read_official(path)
    assert_same(model, tokens, released.crate(state, tokens, HEADS))


def test_a_best_loss_that_was_never_measured_is_absent(tmp_path: Path, rng: np.random.Generator) -> None:
    content = released.checkpoint(released.crate_state(rng, **SIZE), heads=HEADS) | {"best_val_loss": math.inf}
    assert read_official(save(content, tmp_path / "ckpt.pt"))[1].best_val_loss is None


@pytest.mark.parametrize(
    ("activation", "message"), [("relu", "nanoGPT uses gelu: --activation gelu"), ("gelu", "GELU")]
)
def test_the_assumed_activation_is_reported(
    activation: str, message: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(released.checkpoint(released.gpt_state(rng, **SIZE, bias=False), heads=HEADS), tmp_path / "ckpt.pt")
    assert cli.main(["import", str(path), "--out", str(tmp_path / "run"), "--activation", activation]) == 0
    assert message in " ".join(capsys.readouterr().err.split())
