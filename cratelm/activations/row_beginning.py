"""How the rows of records begin, as records.json says it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

EVERY_ROW, EVERY_DOCUMENT = "every", "first of each document"
"""The rows that begin with the tokens of `row_beginning` in records.json."""

LED = ("crate", "gpt2", "gpt_neox")
"""Kinds of models whose tokenizers have no beginning-of-text token: earlier records of them are like new ones."""


def setting_of(row_beginning: tuple[int, ...] | None) -> dict[str, Any]:
    """The setting of a collection for `Subject.row_beginning`.

    Empty for None, where rows are those of earlier versions: older records and new ones may then share a run.
    """
    return {} if row_beginning is None else {"row_beginning": {"rows": EVERY_ROW, "tokens": list(row_beginning)}}


def describe_row_beginning(collection: Mapping[str, Any], strings: Sequence[str]) -> str:
    """A sentence on how the rows of records begin. `collection` is records.json, `strings` the text of each token id.

    Records of earlier versions do not say it: there, no row began with a beginning-of-text token.
    """
    known = collection.get("row_beginning")
    if known is None:
        return (
            "An earlier version made these records: no row begins with a beginning-of-text token, and the end-of-text "
            "token comes before each document."
        )
    text = "".join(strings[token] if token < len(strings) else f"#{token}" for token in known["tokens"])
    if not text:
        return "Rows begin with the text itself."
    if known["rows"] == EVERY_ROW:
        return f"Every row begins with {text}, as the model's tokenizer begins a text; that position is not recorded."
    return f"{text} comes before each document; a row in mid-document begins with the document's own tokens."


def earlier_beginning(title: str, arch: str, collection: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on records of an earlier version, if the model may have missed its beginning-of-text token there."""
    if "row_beginning" not in collection and "imported" not in collection and arch not in LED:
        yield f"{title} was recorded without a beginning-of-text token before its rows. Collect into another run."
