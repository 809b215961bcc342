"""Sources of text: the standard library, files and folders, JSON lines, Parquet, Hugging Face datasets -> documents.

Documents come one at a time in a fixed order, so memory holds one document, never a corpus. A plain text file is one
document; a JSON line or a Parquet row is one document. Documents without any character are left out.
"""

import contextlib
import hashlib
import importlib
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tokenize import detect_encoding
from typing import Any

import zstandard

from cratelm.data.lines import encoding_by_mark, read_lines
from cratelm.errors import CrateError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
STDLIB_LEFT_OUT = (
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    # Generated character tables, most of them near-duplicates. The hash that splits documents detects exact duplicates
    # only, so a fifth of the held-out text would be tables seen in training.
    "encodings",
    # The settings of one machine's build, its paths among them.
    "_sysconfigdata*",
)  # fmt: skip
"""Folders and files of the standard library that are skipped: tests, installed packages, generated tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text, and where it comes from."""

    text: str
    """At least one character, always encodable as UTF-8."""
    origin: str
    """`path` or `path:line`, for messages and provenance."""


@dataclass(frozen=True, slots=True)
class _Bad:
    """An unreadable document: a one-line reason that begins with its origin."""

    problem: str


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    name: str
    """Path relative to the source, which determines the order and the fingerprint."""


def stream_documents(
    sources: Sequence[str],
    *,
    skip_bad: bool = False,
    on_bad: Callable[[str], None] | None = None,
    text_field: str = "text",
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """Yield the documents of `sources`, source by source in the given order, files sorted by name inside each.

    Missing, empty and unknown sources are refused at once, before the first document. A bad document is an error
    unless `skip_bad`; then `on_bad` is called with it. In `stdlib`, files in an undeclared encoding are always skipped.
    `on_bytes` hears how many bytes of the source files were read since its last call (compressed bytes where they are).
    """
    listed = [(source, list_files(source)) for source in _checked(sources)]
    return _stream(listed, skip_bad, on_bad or _ignore, text_field, on_bytes or _ignore)


def _stream(
    listed: list[tuple[str, list[_File]]],
    skip_bad: bool,
    on_bad: Callable[[str], None],
    field: str,
    on_bytes: Callable[[int], None],
) -> Iterator[Document]:
    seen = False
    for source, files in listed:
        for item in _read_hub(source, field) if _is_hub(source) else _read_files(files, field, on_bytes):
            if isinstance(item, _Bad):
                if not (skip_bad or source == "stdlib"):
                    raise CrateError(f"{item.problem}. Repair or remove it, or go past it with --skip-bad")
                on_bad(item.problem)
            elif item.text:
                seen = True
                yield item
    if not seen:
        raise CrateError(f"no document with text in {', '.join(source for source, _ in listed)}. Give another source")


def list_files(source: str) -> list[_File]:
    """The files of one source, sorted by their names relative to it; none for a dataset on the hub."""
    if _is_hub(source):
        return []
    if source == "stdlib":
        return _walk(Path(sysconfig.get_paths()["stdlib"]), TEXT_SUFFIXES, STDLIB_LEFT_OUT)
    path = Path(source)
    if path.is_dir():
        return _walk(path, TEXT_SUFFIXES + ROW_SUFFIXES, ("__pycache__",))
    if not path.exists():
        raise CrateError(f"source {source} does not exist. Give a file, a folder, stdlib, or hf:DATASET")
    if not path.name.lower().endswith(TEXT_SUFFIXES + ROW_SUFFIXES):
        known = " ".join(TEXT_SUFFIXES + ROW_SUFFIXES)
        raise CrateError(f"source {source} is of an unknown type. Known types: {known}; rename it if it has one")
    return [_File(path, path.name)]


def source_bytes(sources: Sequence[str]) -> int:
    """Size on disk of all files of `sources`: the total that `on_bytes` of `stream_documents` adds up to."""
    return sum(_size_and_time(file)[0] for source in sources for file in list_files(source))


def _size_and_time(file: _File) -> tuple[int, int]:
    """Size and time of a file; zeros for a broken link, which is reported when it is read."""
    with contextlib.suppress(OSError):
        stat = file.path.stat()
        return stat.st_size, stat.st_mtime_ns
    return 0, 0


def fingerprint(sources: Sequence[str]) -> str:
    """A hash of names, sizes and modification times of all source files."""
    digest = hashlib.sha256()
    for source in _checked(sources):
        digest.update(f"source {source}\n".encode(errors="surrogateescape"))
        for file in list_files(source):
            size, time = _size_and_time(file)
            digest.update(f"{file.name} {size} {time}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _checked(sources: Sequence[str]) -> Sequence[str]:
    if not sources or not all(sources):
        raise CrateError("no source of text was given. Give a file, a folder, stdlib, or hf:DATASET")
    return sources


def _is_hub(source: str) -> bool:
    return source.startswith("hf:")


def _ignore(_: object) -> None:
    """Do nothing."""


def _walk(root: Path, suffixes: tuple[str, ...], left_out: tuple[str, ...]) -> list[_File]:
    def is_out(name: str) -> bool:
        return name.startswith(".") or any(fnmatchcase(name, pattern) for pattern in left_out)

    files, others, visited = [], Counter[str](), set[str]()
    for folder, folders, names in os.walk(root, followlinks=True):
        # Links to folders are followed, each folder once: a link may lead back to a folder around it.
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted((name for name in folders if not is_out(name)), key=lambda name: _link_last(folder, name))
        for name in names:
            path = Path(folder, name)
            if is_out(name) or not (path.is_file() or path.is_symlink()):
                continue
            if name.lower().endswith(suffixes):
                files.append(_File(path, path.relative_to(root).as_posix()))
            else:
                others[path.suffix or name] += 1
    if not files:
        saw = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6)) or "nothing"
        raise CrateError(f"folder {root} holds no text file (found: {saw}). Known types: {' '.join(suffixes)}")
    return sorted(files, key=lambda file: file.name)


def _link_last(folder: str, name: str) -> tuple[bool, str]:
    return os.path.islink(os.path.join(folder, name)), name


def _read_files(files: list[_File], field: str, on_bytes: Callable[[int], None]) -> Iterator[Document | _Bad]:
    for file in files:
        name = file.path.name.lower()
        if name.endswith(TEXT_SUFFIXES):
            yield _read_text(file.path)
            on_bytes(_size_and_time(file)[0])
        elif name.endswith(".parquet"):
            yield from _read_parquet(file.path, field, on_bytes)
        else:
            yield from _read_jsonl(file.path, field, on_bytes)


def _read_text(path: Path) -> Document | _Bad:
    """A whole file: Python source in its declared encoding, otherwise UTF-8, or UTF-16 or 32 with a mark."""
    try:
        data = path.read_bytes()
        encoding = encoding_by_mark(data)
        if path.suffix.lower() == ".py":
            with contextlib.suppress(SyntaxError):  # an undeclared encoding: decoding finds the position
                encoding = detect_encoding(iter(data.splitlines(keepends=True)).__next__)[0].removesuffix("-sig")
        return _document(data.decode(encoding).removeprefix("\ufeff"), str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return _undecodable(error, str(path), f" (line {line})")
    except OSError as error:
        return _Bad(f"{path}: cannot be read ({error.strerror})")


def _undecodable(error: UnicodeDecodeError, origin: str, where: str) -> _Bad:
    byte = error.object[error.start]
    return _Bad(f"{origin}: byte 0x{byte:02x} at position {error.start}{where} is not {error.encoding}")


def _read_jsonl(path: Path, field: str, on_bytes: Callable[[int], None]) -> Iterator[Document | _Bad]:
    number = 0
    try:
        for number, line in enumerate(read_lines(path, on_bytes), start=1):
            if line.strip(b"\0 \t\r"):  # a disk that filled up pads with zero bytes
                yield _parse(line, f"{path}:{number}", field)
    except (EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError) as error:
        yield _Bad(f"{path}: truncated or damaged after line {number} ({_one_line(error)})")
    except OSError as error:
        yield _Bad(f"{path}: cannot be read ({error.strerror})")


def _parse(line: bytes, origin: str, field: str) -> Document | _Bad:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return _undecodable(error, origin, " of the line")
    except json.JSONDecodeError as error:
        return _Bad(f"{origin}: broken JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets in brackets
        return _Bad(f"{origin}: JSON beyond what can be read ({_one_line(error)})")
    if not isinstance(row, dict):
        return _Bad(f"{origin}: a {type(row).__name__}, not a JSON object")
    return _from_row(row, origin, field)


def _from_row(row: Mapping[str, Any], origin: str, field: str) -> Document | _Bad:
    if field not in row:
        return _Bad(f"{origin}: no text field {field!r} (fields: {', '.join(row) or 'none'})")
    text = row[field]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return _undecodable(error, origin, " of the text")
    if not isinstance(text, str):
        return _Bad(f"{origin}: the text field {field!r} holds a {type(text).__name__}, not a text")
    return _document(text, origin)


def _document(text: str, origin: str) -> Document | _Bad:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _Bad(f"{origin}: half a surrogate pair at character {error.start}, not text")
    return Document(text=text, origin=origin)


def _read_parquet(path: Path, field: str, on_bytes: Callable[[int], None]) -> Iterator[Document | _Bad]:
    # pyarrow takes longer to import than most corpora of text files take to list.
    import pyarrow
    import pyarrow.parquet

    number, rows = 0, "?"
    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path) as file:
            columns, rows = file.schema_arrow.names, str(file.metadata.num_rows)
            if field not in columns:
                raise CrateError(
                    f"{path} has no column {field!r} (columns: {', '.join(columns)}). Give another --text-field"
                )
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for value in _as_bytes(batch.column(0)).to_pylist():
                    number += 1
                    yield _from_row({field: value}, f"{path}:{number}", field)
                on_bytes(size * batch.num_rows // max(file.metadata.num_rows, 1))
    except (OSError, pyarrow.ArrowException) as error:
        yield _Bad(f"{path}: truncated or damaged after row {number} of {rows} ({_one_line(error)})")


def _as_bytes(column: Any) -> Any:
    """A column of texts as bytes, which one row that is not UTF-8 does not stop; other columns as they are."""
    import pyarrow

    with contextlib.suppress(pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid):
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            return column.cast(pyarrow.large_binary())
    return column


def _read_hub(source: str, field: str) -> Iterator[Document | _Bad]:
    """Rows of the `train` split of a dataset on the hub, streamed: nothing is stored, memory holds a few rows."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise CrateError(f"{source} needs the package datasets. Run: pip install 'cratelm[hf]'") from None
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _from_row(row, f"{source}:{number}", field)
    except (OSError, ValueError) as error:
        raise CrateError(
            f"{source} cannot be streamed ({_one_line(error)}). Check the name and the connection"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
