"""Terminal output that `steer`, `ablate` and `ledger` share."""

from rich.console import Console
from rich.table import Table


def plain_console() -> Console:
    """A console that prints text as it is, without markup."""
    return Console(highlight=False, markup=False, emoji=False)


def plain_table(width: int | None = None) -> Table:
    """A table without lines."""
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, width=width)


def tail(text: str, longest: int) -> str:
    """The end of a text, at most `longest` characters."""
    return text if len(text) <= longest else "…" + text[1 - longest :]
