"""Peak memory of a collection in a real process, at two sizes of the corpus."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cratelm.activations.draws import RowBlocks

GROWN = {"fixed": 100, "compat": 500}
"""MiB by which five times as much text may raise the peak; with fragments of the heap `compat` raised it by 930."""


def peak(mode: str, tokens: int) -> int:
    command = [sys.executable, "-m", "fixtures.collection_peak", mode, str(tokens), "768"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units")
@pytest.mark.parametrize("mode", GROWN)
def test_the_peak_does_not_grow_with_the_corpus(mode: str) -> None:
    small, large = (peak(mode, tokens) for tokens in (20_480, 102_400))
    assert large < small + GROWN[mode], (small, large)


def test_rows_are_those_of_a_concatenation_in_few_blocks() -> None:
    generator, rows = torch.Generator().manual_seed(0), RowBlocks(torch.device("cpu"))
    rows.block_bytes = 4096
    parts = [(torch.arange(n), torch.rand(n, 8, generator=generator)) for n in (0, 3, 70, 500, 1, 0, 90)]
    for part in parts:
        rows.add(*part)
    assert all(map(torch.equal, rows.columns(), (torch.cat(column) for column in zip(*parts, strict=True))))
    assert 1 < len(rows.blocks) < len(parts)
