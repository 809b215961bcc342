"""Tokenizers without a tokenizer.json, converted by `transformers` (extra `hf`)."""

import importlib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cratelm.errors import CrateError
from cratelm.rundir import check_regular


def converted(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that holds only a SentencePiece `tokenizer.model`. Runs no code of the folder."""
    path = check_regular(folder / "tokenizer.model")
    try:
        transformers: Any = importlib.import_module("transformers")
        importlib.import_module("sentencepiece")
    except ImportError:
        raise CrateError(f"{path} must be converted, which needs an extra: pip install 'cratelm[hf]'") from None
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except (ValueError, OSError, KeyError, AttributeError, RuntimeError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CrateError(
            f"{path} is not a tokenizer that transformers converts ({reason[:160]}). Hint: save a tokenizer.json with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        ) from None
    finally:
        logging.set_verbosity(level)
