"""Prompts from the command line and from files."""

from collections.abc import Sequence
from pathlib import Path

from cratelm.errors import CrateError


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of a file, one on each line; \\n and \\t become line break and tab."""
    texts = list(prompts)
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise CrateError(
                f"--prompts must be a text file with a prompt on each line, got {file}, which does not exist"
            ) from None
        except UnicodeDecodeError as error:
            raise CrateError(f"{file} must be UTF-8 text, got {error.reason}. Hint: save it as UTF-8") from None
    return [text.replace("\\n", "\n").replace("\\t", "\t") for text in texts]
