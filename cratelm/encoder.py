"""A sentence encoder of sentence-transformers, for the scorers that compare texts (`scorers/embedding.py`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from cratelm.errors import CrateError

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
"""A small English encoder (22 million parameters) on the Hugging Face hub."""
SENTENCES_AT_ONCE = 256
"""Texts per forward pass."""


class SentenceEncoder:
    """A sentence encoder, from a directory or the hub."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    @classmethod
    def open(cls, source: str | Path = DEFAULT) -> "SentenceEncoder":
        """Load an encoder; a directory is read without network access."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise CrateError(
                "embedding scorers need sentence-transformers. Hint: pip install 'cratelm[embed]'"
            ) from None
        if str(source).startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
            raise CrateError(
                f"--encoder must be a directory or a hub name, got {source}, which does not exist. Hint: use {DEFAULT}"
            )
        try:
            model = SentenceTransformer(str(source), trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CrateError(
                f"{source} must be an encoder of sentence-transformers, got: {reason}. Hint: give a directory or a "
                f"name on the Hugging Face hub such as {DEFAULT}"
            ) from None
        return cls(model, str(source).rstrip("/").split("/")[-1])

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dimensions"]:
        """A unit vector for each text."""
        vectors: Float32[np.ndarray, "texts dimensions"] = self.model.encode(
            list(texts),
            batch_size=SENTENCES_AT_ONCE,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return vectors
