"""How the rows of records begin, as records.json says it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode, read_collection, records_folder, records_tokenizer
from cratelm.rundir import read_json

EVERY_ROW, EVERY_DOCUMENT = "every", "first of each document"
"""The rows that begin with the tokens of `row_beginning` in records.json."""

LED = ("crate", "gpt2", "gpt_neox")
"""Kinds of models whose tokenizers have no beginning-of-text token: earlier records of them are like new ones."""


def setting_of(row_beginning: tuple[int, ...] | None) -> dict[str, Any]:
    """The setting of a collection for `Subject.row_beginning`.

    Empty for None, where rows are those of earlier versions: older records and new ones may then share a run.
    """
    return {} if row_beginning is None else {"row_beginning": {"rows": EVERY_ROW, "tokens": list(row_beginning)}}


def lines_on_beginning(run: Path, mode: Mode, strings: Sequence[str]) -> Iterator[str]:
    """How the rows of a run's records begin, and a warning if they lack their beginning; empty if nothing says it."""
    if not (records_folder(run, mode) / "records.json").exists():
        return
    collection = read_collection(run, mode=mode)
    if "imported" in collection:
        return
    yield describe_row_beginning(collection, strings, mode)
    yield from earlier_beginning(run, mode, run.name)


def describe_row_beginning(collection: Mapping[str, Any], strings: Sequence[str], mode: Mode = "fixed") -> str:
    """A sentence on how the rows of records begin. `collection` is records.json, `strings` the text of each token id.

    Records of earlier versions do not say it: there, no row began with a beginning-of-text token.
    """
    known = collection.get("row_beginning")
    if known is None and mode == "fixed":
        return (
            "An earlier version made these records: no row begins with a beginning-of-text token, and the end-of-text "
            "token comes before each document."
        )
    text = "" if known is None else "".join(_text(strings, token) for token in known["tokens"])
    if known is None or not text:
        return "Rows begin with the text itself."
    if known["rows"] == EVERY_ROW:
        return f"Every row begins with {text}, as the model's tokenizer begins a text; that position is not recorded."
    return f"{text} comes before each document; a row in mid-document begins with the document's own tokens."


def earlier_beginning(run: Path, mode: Mode, title: str) -> Iterator[str]:
    """A sentence on records of an earlier version whose rows lack the tokens that the model's tokenizer puts first.

    Rows of compat records begin with the text itself in every version.
    """
    collection = read_collection(run, mode=mode)
    if mode == "fixed" and not {"row_beginning", "imported"} & set(collection) and _has_beginning(run, mode):
        yield f"{title} was recorded without a beginning-of-text token before its rows. Collect into another run."


def _has_beginning(run: Path, mode: Mode) -> bool:
    """Whether the tokenizer of a Hugging Face model puts tokens before a text, as far as the files on this disk say."""
    from cratelm.data.special_tokens import special_tokens
    from cratelm.data.tokenizer import load_tokenizer

    path = run / "run.json"
    description = read_json(path, made_by="cratelm collect") if path.exists() else {}
    if "source" not in description or description.get("arch") in LED:
        return False
    folder = Path(description["source"])
    tokenizer = load_tokenizer(records_tokenizer(run, mode))
    return bool(special_tokens(tokenizer, folder if folder.is_dir() else None).begin)


def _text(strings: Sequence[str], token: int) -> str:
    return strings[token] if token < len(strings) else f"#{token}"
