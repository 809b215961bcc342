"""nnsight on our model directories: it reads and steers a neuron as `capture` and `edit` do."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.documented import code_block
from fixtures.synthetic import make_tokenizer

import cratelm
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import save_model

pytest.importorskip("nnsight", reason="nnsight is not installed (make test-all installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_documented_code_reads_and_steers_a_neuron(tmp_path: Path, rng: np.random.Generator) -> None:
    config = ModelConfig(arch="crate", num_layers=2, d_model=32, num_heads=4, vocab_size=384, context_length=48)
    model = LanguageModel(config).initialise(int(rng.integers(2**31))).eval()
    save_model(model, tmp_path / "crate", make_tokenizer())
    result = runpy.run_path(
        str(code_block("ecosystem.md", "Open a model in nnsight", tmp_path / "it.py", model=tmp_path / "crate"))
    )
    tokens, tap = torch.tensor([make_tokenizer().encode("def read_file(").ids]), model.neuron_taps[0]

    def turn(code: torch.Tensor) -> torch.Tensor:
        code[..., 85] = 4.0
        return code

    with torch.no_grad(), cratelm.capture(model, [tap]) as codes:
        before = model(tokens)
    with torch.no_grad(), cratelm.edit(model, {tap: turn}):
        after = model(tokens)
    torch.testing.assert_close(result["code"], codes[tap], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result["before"], before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result["after"], after, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)
