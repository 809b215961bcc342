"""A sentence encoder of sentence-transformers, for the scorers that compare texts (`interpretation/similarity.py`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from cratelm.errors import CrateError

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
"""A small one (22 million parameters) for English, on the Hugging Face hub."""
BATCH = 256
"""Texts of one pass."""


class SentenceEncoder:
    """An encoder by its name on the hub or its directory."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    @classmethod
    def open(cls, source: str | Path = DEFAULT) -> "SentenceEncoder":
        """Load an encoder; nothing is fetched where `source` is a directory."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise CrateError(
                "embedding scorers need sentence-transformers. Run: pip install 'cratelm[embed]'"
            ) from None
        if str(source).startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
            raise CrateError(f"there is no directory {source}. Give one that holds a sentence encoder, or {DEFAULT}")
        try:
            model = SentenceTransformer(str(source), trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CrateError(
                f"{source} is no encoder of sentence-transformers that can be opened ({reason}). Give a directory that "
                f"holds one, or a name on the Hugging Face hub such as {DEFAULT}"
            ) from None
        return cls(model, str(source).rstrip("/").split("/")[-1])

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dimensions"]:
        """A vector for each text, all of length 1."""
        found: Float32[np.ndarray, "texts dimensions"] = self.model.encode(
            list(texts), batch_size=BATCH, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
        )
        return found
