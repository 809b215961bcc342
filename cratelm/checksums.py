"""Checksums of the files that results depend on: written next to a file, compared when it is read.

    FOLDER/checksums.json    {"format_version": 1, "sha256": {"model.safetensors": ["..."]}}

A file is read whole for its checksum once per machine: the cache directory of the user remembers its device, inode,
size and times. Files without an entry (from other tools, or an earlier version) are read as they are.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cratelm.errors import CrateError
from cratelm.rundir import (
    FORMAT_VERSION,
    VERIFY_SWITCH,
    atomic_path,
    check_format_version,
    check_regular,
    read_json,
    write_json,
)

CHECKSUMS = "checksums.json"


@contextlib.contextmanager
def checked_path(path: Path) -> Iterator[Path]:
    """`atomic_path` for one file, with its checksum in `checksums.json` of the same folder.

    While the file is replaced, the old and the new checksum are both valid, so a kill leaves a file that passes.
    """
    with atomic_path(path) as temporary:
        yield temporary
        new = sha256_of(temporary)
        write_checksums(path.parent, {path.name: [*_expected(path), new]})
    write_checksums(path.parent, {path.name: [new]})


def write_checksums(folder: Path, files: Mapping[str, list[str]] | None = None) -> None:
    """Add the checksums of some files to those of a folder; by default compute those of all its files."""
    path = folder / CHECKSUMS
    if files is None:
        names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS)
        files = {name: [sha256_of(folder / name)] for name in names}
    write_json(path, {"sha256": dict(sorted((_read(folder) | dict(files)).items()))})


def listed_files(folder: Path) -> list[str]:
    """The names of the files of a folder that have a checksum, whether or not they exist."""
    return sorted(_read(folder))


def verify(
    path: Path, expected: str | None = None, *, hint: str = "Write it again with the command that made it."
) -> None:
    """Raise CrateError if a file does not have its checksum: `expected`, or the one in `checksums.json` next to it."""
    checksums = _expected(path) if expected is None else [expected]
    if not checksums or os.environ.get(VERIFY_SWITCH) == "0" or not path.is_file():
        return
    if (checksum := remembered_sha256(path)) not in checksums:
        raise CrateError(
            f"{path} is damaged or was changed: its sha256 must be {checksums[-1][:12]}..., got {checksum[:12]}.... "
            f"{hint.rstrip('.')}. Or read it as it is: --no-verify"
        )


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Write a safetensors file with its format version and checksum."""
    # The library writes memory as it lies, so anything transposed or strided must be laid out first.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with checked_path(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata | {"format_version": str(FORMAT_VERSION)})


def read_tensors(path: Path, *, hint: str) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file that cratelm wrote. `hint` ends the error message of a damaged file."""
    return read_tensors_and_metadata(path, hint=hint)[0]


def read_tensors_and_metadata(path: Path, *, hint: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a safetensors file that cratelm wrote."""
    verify(path, hint=hint)
    try:
        with safe_open(check_regular(path), framework="np") as file:
            metadata = file.metadata() or {}
            check_format_version(path, metadata.get("format_version", 1))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # a type that numpy lacks
        raise CrateError(f"{path} is not readable ({error}). {hint}") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, list[str]]:
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    return read_json(path, made_by="the command that wrote this folder").get("sha256") or {}


def _expected(path: Path) -> list[str]:
    return _read(path.parent).get(path.name, [])


def remembered_sha256(path: Path) -> str:
    """The checksum of a file, computed again only if the file changed since it was last computed on this machine."""
    status = path.stat()
    identity = json.dumps([status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    try:
        with contextlib.closing(sqlite3.connect(_memory(), timeout=5)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS files (identity TEXT PRIMARY KEY, sha256 TEXT)")
            if row := connection.execute("SELECT sha256 FROM files WHERE identity = ?", (identity,)).fetchone():
                return str(row[0])
            checksum = sha256_of(path)
            connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (identity, checksum))
            return checksum
    except (sqlite3.Error, OSError):  # no cache directory, or a damaged one: only slower
        return sha256_of(path)


def cache_folder() -> Path:
    """The user's cache directory of this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cratelm"


def _memory() -> Path:
    cache_folder().mkdir(parents=True, exist_ok=True)
    return cache_folder() / "checksums.sqlite"
