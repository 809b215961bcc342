"""Special tokens of a tokenizer: what begins a text, and what ends a document.

They are read from the tokenizer's post-processor and from the files that Hugging Face puts next to a tokenizer.json:
`tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and `config.json`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from cratelm.errors import CrateError
from cratelm.rundir import read_json

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token of GPT-2 and of the tokenizers that this package trains; it follows every document."""
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>")
"""The end-of-text tokens of Llama 3, of Llama 2 and Mistral, and of Gemma."""

LED_BY_END_OF_TEXT = ("gpt2", "gpt_neox")
"""Families whose tokenizers put nothing before a text, and that were trained on <|endoftext|> before every document."""

NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name special tokens by their text."""
NUMBERING_FILES = ("generation_config.json", "config.json")
"""Files that name special tokens by their id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """The special tokens that a model meets at the edges of texts."""

    begin: tuple[int, ...] = ()
    """Tokens that the tokenizer puts before every text; empty for most byte-level tokenizers."""
    end: int | None = None
    """The token that ends a document; None if no file names it."""
    unused_begin: int | None = None
    """A beginning token that the files name, but that the tokenizer does not put before a text."""


def special_tokens(tokenizer: Tokenizer, folder: Path | None = None, *, post_processor: bool = True) -> SpecialTokens:
    """The special tokens of a tokenizer and of the files in its folder.

    Texts begin with what the post-processor puts first; if it adds nothing, with `bos_token` where `add_bos_token` is
    true. `post_processor=False` reads only `add_bos_token`, for models that never saw what a post-processor adds.
    """
    begin = _put_first(tokenizer) if post_processor else ()
    files = _files(folder)
    named = _named(tokenizer, files, "bos_token")
    if not begin and named is not None and files["tokenizer_config.json"].get("add_bos_token") is True:
        begin = (named,)
    end = find_end(tokenizer, folder)
    unused = named if named not in (*begin, end, _named(tokenizer, files, "eos_token")) else None
    return SpecialTokens(begin=begin, end=end, unused_begin=None if begin else unused)


def find_end(tokenizer: Tokenizer, folder: Path | None = None) -> int | None:
    """The id of the end-of-text token; None if neither its text is known nor a file in the folder names it.

    In a folder that `save_model` wrote, the `eos_token` is the token that ended the documents. Elsewhere a known
    end-of-text token comes first, because the `eos_token` of a chat model ends a turn, not a document.
    """
    files, specials = _files(folder), _special_texts(tokenizer)
    if _is_saved_here(files) and (end := _named(tokenizer, files, "eos_token")) is not None:
        return end
    for text in (END_OF_TEXT, *(end for end in OTHER_ENDS if end in specials)):
        if (number := tokenizer.token_to_id(text)) is not None:
            return int(number)
    return _named(tokenizer, files, "eos_token")


def end_of_text_id(tokenizer: Tokenizer, folder: Path | None = None) -> int:
    """The id of the end-of-text token, as `find_end` finds it. Raises CrateError without one."""
    number = find_end(tokenizer, folder)
    if number is None:
        names = ", ".join(sorted(_special_texts(tokenizer))[:5]) or "none"
        raise CrateError(
            f"the tokenizer has no {END_OF_TEXT}, and no file next to it names an eos_token (special tokens: {names}). "
            "Hint: name the token that ends a document with --end-token"
        )
    return number


def choose_end(tokenizer: Tokenizer, folder: Path | None, asked: str | None) -> int:
    """The id of the end token that --end-token names, by default the tokenizer's own.

    A text that is not a token of the tokenizer is added as a special token with the next id.
    """
    if asked is None:
        return end_of_text_id(tokenizer, folder)
    if tokenizer.token_to_id(asked) is None:
        tokenizer.add_special_tokens([AddedToken(asked, normalized=False)])
    return choose_known(tokenizer, asked, "--end-token")


def choose_known(tokenizer: Tokenizer, asked: str, flag: str) -> int:
    """The id of the token that a flag names. Raises CrateError if the tokenizer does not have it."""
    number = tokenizer.token_to_id(asked)
    if number is None:
        names = ", ".join(sorted(_special_texts(tokenizer))[:5]) or "none"
        raise CrateError(f"{flag} must be a token of the tokenizer, got {asked!r} (special tokens: {names})")
    return int(number)


def _put_first(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that the post-processor puts before a text. What it puts after a text is not part of a prompt."""
    for probe in ("a", " ", "0"):
        encoded = tokenizer.encode(probe)
        if 0 in encoded.special_tokens_mask:
            return tuple(map(int, encoded.ids[: encoded.special_tokens_mask.index(0)]))
    return ()


def _special_texts(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _files(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The settings in each file of the folder, empty for a missing file."""
    paths = {name: folder / name if folder is not None else None for name in (*NAMING_FILES, *NUMBERING_FILES)}
    return {
        name: read_json(path, hint="Fetch it again") if path is not None and path.exists() else {}
        for name, path in paths.items()
    }


def _is_saved_here(files: dict[str, dict[str, Any]]) -> bool:
    """Whether `save_model` wrote the folder: it names its end token as the unknown and the padding token too."""
    settings = files["tokenizer_config.json"]
    names = [settings.get(name) for name in ("eos_token", "unk_token", "pad_token")]
    ours = settings.get("padding_side") == "left" and settings.get("tokenizer_class") == "PreTrainedTokenizerFast"
    return ours and isinstance(names[0], str) and names == names[:1] * 3


def _named(tokenizer: Tokenizer, files: dict[str, dict[str, Any]], role: str) -> int | None:
    """The id of the `bos_token` or `eos_token` that the first file with such a token of the tokenizer names."""
    for name in NAMING_FILES:
        value = files[name].get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (number := tokenizer.token_to_id(text)) is not None:
            return int(number)
    for name in NUMBERING_FILES:
        value = files[name].get(f"{role}_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and first >= 0 and tokenizer.id_to_token(first) is not None:
            return int(first)
    return None
