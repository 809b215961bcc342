"""Codes that are known beforehand, collected in `compat` mode by a model that only looks them up."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cratelm.activations.compat import collect_compat
from cratelm.activations.repairs import Repair
from cratelm.activations.subject import Corpus, Subject
from cratelm.runtime import progress_bar

CONTEXT, BLOCKS, NEURONS = 100, 37, 6
TOKENS = BLOCKS * CONTEXT
TWO_DOCUMENTS = (0, 900, TOKENS + 30)


def planted(tokens: int) -> np.ndarray:
    """Codes of all tokens: from dense to dead, with many equal values, some neurons firing on fewer than TOP tokens."""
    rng = np.random.default_rng(3)
    codes = np.maximum(rng.normal(0, 1, (tokens, NEURONS)), 0).astype(np.float32)
    codes[:, 1] = rng.integers(0, 4, tokens)  # few values, so that intervals end inside one
    codes[:, 2] *= rng.random(tokens) < 0.05
    codes[:, 3] = 0
    codes[rng.integers(0, tokens, 20), 3] = 1.5
    codes[:, 4] = 0
    codes[:, 5] += 1  # never zero
    return codes


def collect_planted(
    run: Path, codes: np.ndarray, batch_rows: int, seed: int = 0, documents: tuple[int, ...] = TWO_DOCUMENTS,
    max_tokens: int | None = None, repairs: frozenset[Repair] = frozenset(),
) -> None:  # fmt: skip
    """Each token is its own index, so a forward pass can look it up; the last 30 make no whole block."""
    tokens = np.arange(TOKENS + 30, dtype=np.uint16)

    def forward(blocks: Tensor) -> Mapping[int, Tensor]:
        return {0: torch.from_numpy(codes)[blocks]}

    subject = Subject(forward=forward, layers={0: NEURONS}, context=CONTEXT, tap="neurons", identity={})
    corpus = Corpus(tokens=tokens, documents=np.array(documents), end_of_text=0, identity={})
    with progress_bar("collect", total=2 * TOKENS) as bar:
        collect_compat(
            subject, corpus, run, device=torch.device("cpu"), bar=bar, seed=seed, batch_rows=batch_rows,
            max_tokens=max_tokens, repairs=repairs,
        )  # fmt: skip
