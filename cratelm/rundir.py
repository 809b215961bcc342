"""Files on disk: atomic writes, format versions, JSON, JSON lines, tensors, and the lock on a run directory.

A run directory holds everything about one model (`docs/formats.md`). Nothing here knows what a model is.
"""

import contextlib
import errno
import glob
import json
import os
import platform
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from cratelm.errors import CrateError
from cratelm.json_fields import CHECKSUM, JSON_FIELDS, checksum_of, mismatch, shortened

FORMAT_VERSION = 1
"""Version written into every file. A file with a higher one is refused."""
VERIFY_SWITCH = "CRATELM_VERIFY"
"""The environment variable that is `0` where checksums are not compared; `--no-verify` sets it for one command."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is flushed to disk and renamed to `path`.

    On any exception the temporary file or folder is removed and `path` is untouched, so a file under its final
    name is always whole. A full disk becomes a `CrateError`. The temporary path lies in a separate folder next
    to `path`, because some libraries write further files next to the requested one.
    """
    with _space_for(path):
        check_inside(path).parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        _make(folder, path)
        try:
            temporary = folder / path.name
            yield temporary
            _flush(temporary)
            _replace(temporary, path)
        finally:
            _remove(folder)


def check_inside(path: Path) -> Path:
    """Return a path that is to be written. Raises CrateError if links lead from its run to a place outside the run."""
    run = next((folder for folder in path.parents if (folder / "run.json").is_file()), None)
    if run is not None and not path.parent.resolve().is_relative_to(run.resolve()):
        raise CrateError(f"{path} must lie in {run}, got a link to {path.parent.resolve()}. Hint: remove the link")
    return path


def check_writable(path: Path) -> Path:
    """Return the path of a file that is written in place. Raises CrateError for a link and for anything but a file."""
    if path.is_symlink():
        raise CrateError(f"{path} must be a file, got a link. Hint: remove the link")
    with contextlib.suppress(FileNotFoundError):  # not there yet, or a journal that another process has just removed
        check_regular(path)
    return check_inside(path)


def _open_writable(path: Path, flags: int) -> TextIO:
    """Open a file, made if it is missing, to write in place."""
    check_writable(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    return open(descriptor, "a" if flags & os.O_APPEND else "r+", encoding="utf-8")


def _make(folder: Path, path: Path) -> None:
    """Make the temporary folder; an error names the requested path instead."""
    try:
        folder.mkdir()
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def _space_for(path: Path) -> Iterator[None]:
    """Convert the error of a full disk to a `CrateError`.

    Libraries wrap the system's error but keep its message; SQLite has a different message.
    """
    codes = (errno.ENOSPC, errno.EDQUOT)
    messages = (*map(os.strerror, codes), "database or disk is full")
    try:
        yield
    except BaseException as error:
        if getattr(error, "errno", None) in codes or any(message in str(error) for message in messages):
            raise CrateError(f"no space left while writing {path}. Free some and run the same command again") from error
        raise


def remove_leftovers(path: Path) -> None:
    """Remove temporary folders that killed processes left behind while writing this path.

    In a container, successive processes can have the same id, so a folder with the id of this process is stale too.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = stale.name.removesuffix(".tmp").rpartition(".")[2]
        if process.isdigit() and (int(process) == os.getpid() or not _alive(int(process))):
            _remove(stale)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    for file in (path, *path.rglob("*")):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def _replace(temporary: Path, path: Path) -> None:
    """Rename into place. A folder cannot replace a folder that is not empty, so the old folder is renamed first."""
    aside = temporary.with_name(f"{path.name}.old")
    try:
        if temporary.is_dir() and path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write a whole text file atomically.

    Half surrogates, which stand for the bytes of a file name that is not UTF-8, become `\udc..`, as JSON escapes them.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with `format_version` first and its checksum last."""
    value = {"format_version": FORMAT_VERSION, **value}
    value[CHECKSUM] = checksum_of(json.loads(json.dumps(value)))
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_regular(path: Path) -> Path:
    """Return the path of a file. A folder, FIFO, socket or device raises CrateError before anything opens it."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # a null byte in the name
        raise CrateError(f"{str(path)!r} must be the name of a file") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CrateError(f"{path} must be a file, got {kind}. Hint: give another path, or move it away")
    return path


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Text that is not JSON, nested too deeply or with endless numbers raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, *, made_by: str = "", hint: str = "") -> dict[str, Any]:
    """Read a JSON object without its checksum, which must be right; its fields have the types of `JSON_FIELDS`.

    `made_by` is the command, or `hint` the advice, that the error of a missing or malformed file ends with.
    """
    absent, malformed = (hint, hint) if hint else (f"Run: {made_by}", f"Remove it and run: {made_by}")
    try:
        value = parse_json(check_regular(path).read_bytes())
    except FileNotFoundError:
        raise CrateError(f"{path} is not there. {absent}") from None
    except ValueError as error:
        raise CrateError(f"{path} is not readable JSON ({shortened(error)}). {malformed}") from None
    if not isinstance(value, dict):
        raise CrateError(f"{path} holds a {type(value).__name__}, not a JSON object. {malformed}")
    check_format_version(path, value.get("format_version", FORMAT_VERSION))
    if problem := mismatch(value, JSON_FIELDS.get(path.name, {})):
        raise CrateError(f"{path}: {problem}. {malformed}")
    expected = value.pop(CHECKSUM, None)  # files from elsewhere, and of earlier versions, have none
    if expected not in (None, checksum_of(value)) and os.environ.get(VERIFY_SWITCH) != "0":
        raise CrateError(
            f"{path} is damaged or was edited: its checksum must be {checksum_of(value)}, got {shortened(expected)}. "
            f"{malformed}. Or read it as it is: --no-verify"
        )
    return value


def check_format_version(path: Path, version: object) -> None:
    """Refuse a file written by a newer cratelm, and a version that is not a whole number."""
    if not re.fullmatch(r"\d{1,9}", str(version), re.ASCII):
        raise CrateError(
            f"{path}: format_version must be a whole number, got {str(version)[:40]!r}. Write the file again"
        )
    if int(str(version)) > FORMAT_VERSION:
        raise CrateError(
            f"{path} has format version {version}, this cratelm reads up to {FORMAT_VERSION}. "
            "Upgrade with: pip install -U cratelm"
        )


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line and push it to the operating system, so that a killed process loses no earlier line."""
    with _space_for(path), _open_writable(path, os.O_APPEND | os.O_WRONLY) as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, their fields of the types of `JSON_FIELDS`; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in check_regular(path).read_bytes().split(b"\n")[:-1]:
        if line:
            try:
                row = parse_json(line)
            except ValueError:
                raise CrateError(
                    f"{path} has a line that is not JSON ({shortened(line[:40])}). Remove the line"
                ) from None
            if problem := mismatch(row, JSON_FIELDS.get(path.name, {})):
                raise CrateError(f"{path}: {problem} in the line {shortened(line[:40])}. Remove the line")
            rows.append(row)
    return rows


def rewind_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that `keep` refuses: lines that a killed run logged after the checkpoint it resumes from."""
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in read_jsonl(path) if keep(row)))


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer, some NFS and Lustre among them."""


def _check_holder(run: Path, lock: Path, file: TextIO, error: OSError) -> None:
    """Without a lock, trust the note of the process that claimed the run; warn that two may start at once."""
    file.seek(0)
    holder = file.read().strip()
    known = re.match(r"process (\d+) on (\S+)", holder)
    if known and (known[2] != socket.gethostname() or _alive(int(known[1]))):
        raise CrateError(
            f"{run} is in use by {holder}, and its file system has no locks ({error.strerror}). Hint: wait for it; if "
            f"that process has ended, remove {lock}"
        ) from None
    sys.stderr.write(f"warning: {run} cannot be locked ({error.strerror}). Start no second command in it\n")


@contextlib.contextmanager
def claim(run: Path, *, part: int = 0) -> Iterator[None]:
    """Lock the run directory, or one part of its work, for this process; a second process gets a `CrateError`.

    The lock belongs to the open file, so it ends with the process, even one that is killed.
    """
    import fcntl

    lock = run / (f".lock.part-{part}" if part else ".lock")
    with _open_writable(lock, os.O_RDWR) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            what, remedy = (f"part {part} of {run}", "another --part") if part else (str(run), "another --out")
            raise CrateError(f"{what} is in use by {holder}. Wait for it, or use {remedy}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _check_holder(run, lock, file, error)
        with _space_for(run):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:120]})")
            file.flush()
        yield
        file.truncate(0)


def origin() -> dict[str, Any]:
    """Where a result comes from: time, command, versions, machine, and the commit of a source checkout."""
    versions = {}
    for package in ("cratelm", "torch", "numpy", "tokenizers", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": _command(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
        "commit": _commit(),
    }


def _command() -> str:
    """The command line, ready to be copied: `cratelm` stands for the interpreter's path to this package."""
    program, *arguments = sys.argv
    is_cratelm = Path(program).parent == Path(__file__).parent or Path(program).name == "cratelm"
    return shlex.join(["cratelm" if is_cratelm else program, *arguments])


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with `+` if files differ; None for an installed wheel."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=checkout, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()


def differing_fields(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """Name the fields in which two configurations differ: `seed 1 -> 2, lr 0.1 -> 0.2`; empty if they agree."""
    keys = sorted(recorded.keys() | requested.keys())
    return ", ".join(
        f"{key} {recorded.get(key)!r} -> {requested.get(key)!r}"
        for key in keys
        if recorded.get(key) != requested.get(key)
    )
