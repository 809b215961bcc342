"""Files on disk: nothing half-written under a final name, one process per run, and versions."""

import contextlib
import errno
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures.disk import small_disk
from fixtures.synthetic import make_tokenizer

from cratelm import rundir
from cratelm.errors import CrateError
from cratelm.rundir import (
    append_jsonl,
    atomic_path,
    differing_fields,
    origin,
    read_json,
    read_jsonl,
    rewind_jsonl,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def fill(path: Path, text: str, *, folder: bool) -> None:
    """Write a file, or a folder with one file and one folder in it."""
    if folder:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / f"{text}.txt").write_text(text)
    else:
        path.write_text(text)


def content(path: Path) -> str:
    return path.read_text() if path.is_file() else "".join(file.read_text() for file in path.rglob("*.txt"))


def fail_while_writing(path: Path, error: BaseException, *, folder: bool) -> None:
    with atomic_path(path) as temporary:
        fill(temporary, "half", folder=folder)
        raise error


both = pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])


@both
def test_a_file_or_folder_appears_whole_and_replaces_the_old(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "new" / "it"
    for text in ("first", "second"):
        with atomic_path(path) as temporary:
            fill(temporary, text, folder=folder)
            assert temporary.name == "it"
            (temporary.parent / "journal").touch()
            assert not path.exists() or content(path) == "first"
        assert content(path) == text
        assert names(path.parent) == ["it"]


@both
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_content_and_nothing_else(
    folder: bool, error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "it"
    fill(path, "old", folder=folder)
    with pytest.raises(error):
        fail_while_writing(path, error(), folder=folder)
    assert content(path) == "old"
    assert names(tmp_path) == ["it"]


@both
@pytest.mark.parametrize("at", ["rename", "flush", "delete"])
def test_a_process_killed_at_the_end_leaves_all_or_nothing(folder: bool, at: str, tmp_path: Path) -> None:
    """Whichever renaming, flush or deletion it dies in, the old content, the new one, or nothing is there."""
    call = {"rename": "replace", "flush": "fsync", "delete": "rmdir"}[at]
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cratelm.rundir import atomic_path
from test_rundir import fill
real, left = os.{call}, [int(sys.argv[2])]
def deadly(*arguments, **named):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
    return real(*arguments, **named)
os.{call} = deadly
with atomic_path(Path(sys.argv[1])) as temporary:
    fill(temporary, "new", folder={folder})
"""
    path = tmp_path / "it"
    fill(path, "old", folder=folder)
    deaths = 0
    while subprocess.run([sys.executable, "-c", code, str(path), str(deaths)], check=False).returncode:
        assert not path.exists() or content(path) in ("old", "new")
        deaths += 1
    assert deaths > 0
    assert content(path) == "new"
    assert names(tmp_path) == ["it"]


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "it", os.replace
    fill(path, "old", folder=True)

    def replace(source: Path, target: Path) -> None:
        if target == path and content(source) == "new":
            raise PermissionError
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError), atomic_path(path) as temporary:
        fill(temporary, "new", folder=True)
    assert content(path) == "old"
    assert names(tmp_path) == ["it"]


def test_what_dead_processes_left_is_swept_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    dead, own, living = dead_process(), os.getpid(), os.getppid()
    for process in (dead, own, living):
        (tmp_path / f".it.{process}.tmp").mkdir()
        (tmp_path / f".it.{process}.tmp" / "half").touch()
    kept = [f".it.{living}.tmp", f".other.{dead}.tmp", ".it.x.tmp", f".it.{dead}", f"it.{dead}.tmp"]
    for name in kept[1:]:
        (tmp_path / name).touch()
    with atomic_path(tmp_path / "it") as temporary:
        temporary.mkdir()
    assert names(tmp_path) == sorted(["it", *kept])


def test_a_name_with_wildcards_sweeps_its_own_only(tmp_path: Path) -> None:
    dead = dead_process()
    (tmp_path / f".a[bc]*.{dead}.tmp").touch()
    (tmp_path / f".ab.{dead}.tmp").touch()
    write_text(tmp_path / "a[bc]*", "x")
    assert names(tmp_path) == sorted(["a[bc]*", f".ab.{dead}.tmp"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_one_line(code: int, wrapped: bool, tmp_path: Path) -> None:
    """Libraries wrap it: safetensors and tokenizers keep only the words of the system's error."""
    error = RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})") if wrapped else OSError(code, "full")
    (tmp_path / "it").write_text("old")
    with pytest.raises(CrateError, match="no space left while writing .*it. Free some and run"):
        fail_while_writing(tmp_path / "it", error, folder=False)
    assert names(tmp_path) == ["it"]
    assert (tmp_path / "it").read_text() == "old"


def write_lines(disk: Path) -> None:
    for step in range(100_000):
        append_jsonl(disk / "metrics.jsonl", {"step": step})


def write_tokenizer(disk: Path) -> None:
    (disk / "filler").write_bytes(b"x" * 56_000)
    with atomic_path(disk / "model") as temporary:
        temporary.mkdir()
        make_tokenizer(500).save(str(temporary / "tokenizer.json"))


def write_database(disk: Path) -> None:
    with atomic_path(disk / "store") as temporary, contextlib.closing(sqlite3.connect(temporary)) as new, new:
        new.execute("CREATE TABLE texts (text)")
        new.execute("INSERT INTO texts VALUES (?)", ["x" * 100_000])


@pytest.mark.parametrize(
    "write",
    [write_lines, write_tokenizer, write_database, lambda disk: write_text(disk / "a", "x" * 100_000)],
)
def test_a_disk_that_fills_up_is_one_line(write: Callable[[Path], None], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(CrateError, match="no space left while writing"):
            write(disk)
        assert not [name for name in names(disk) if name.startswith(".")]
        lines = read_jsonl(disk / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(len(lines)))


def test_other_system_errors_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file" / "below", "x")


def test_a_temporary_folder_that_cannot_be_made_is_reported_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    with pytest.raises(OSError, match="too long") as refusal:
        write_text(path, "x")
    assert refusal.value.filename == str(path)


def test_json_comes_back_with_its_version(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "naïve", "loss": 0.1})
    assert read_json(tmp_path / "a.json", made_by="it") == {"format_version": 1, "name": "naïve", "loss": 0.1}
    assert next(iter(json.loads((tmp_path / "a.json").read_text()))) == "format_version"


def test_file_names_that_are_not_utf8_come_back_from_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    write_json(tmp_path / "a.json", {"name": name})
    assert read_json(tmp_path / "a.json", made_by="it")["name"] == name
    (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a.json is not there. Run: cratelm make"),
        (b"{", r"a.json is not readable JSON \(.*\). Remove it and run: cratelm make"),
        (b"\xff\xfe", r"a.json is not readable JSON"),
        (b"[1]", "a.json holds a list, not a JSON object"),
        (
            b'{"format_version": 2}',
            "format version 2, this cratelm reads up to 1. Upgrade with: pip install -U cratelm",
        ),
    ],
)
def test_an_unusable_json_file_names_the_command_that_makes_it(
    text: bytes | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CrateError, match=message) as refusal:
        read_json(tmp_path / "a.json", made_by="cratelm make")
    assert "\n" not in str(refusal.value)


def test_lines_are_read_without_a_torn_last_one(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "logs" / "m.jsonl"
    assert read_jsonl(path) == []
    rows = [{"step": step, "loss": float(rng.normal())} for step in range(5)]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    whole = path.read_text()
    last = len(whole.splitlines()[-1]) + 1
    for cut in (1, last // 2, last - 1):
        path.write_text(whole[:-cut])
        assert read_jsonl(path) == rows[:4]
        rewind_jsonl(path, lambda row: row["step"] != 1)
        append_jsonl(path, {"step": 9})
        assert read_jsonl(path) == [rows[0], rows[2], rows[3], {"step": 9}]
        assert len(path.read_text().splitlines()) == 4


def test_rewinding_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    rewind_jsonl(tmp_path / "m.jsonl", lambda _: True)
    assert names(tmp_path) == []


def test_a_line_that_is_not_json_is_reported(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(CrateError, match="has a line that is not JSON .*nonsense"):
        read_jsonl(tmp_path / "m.jsonl")


def test_differing_fields_are_named_with_both_values() -> None:
    result = {"seed": 1, "lr": 0.1, "gone": "x", "same": [1]}
    assert differing_fields(result, {"seed": 2, "lr": 0.1, "same": [1], "new": None}) == "gone 'x' -> None, seed 1 -> 2"
    assert differing_fields(result, dict(result)) == ""


def test_the_origin_says_when_with_what_and_from_which_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cratelm", "train", "--seed", "1"])
    where = origin()
    assert where["command"] == "cratelm train --seed 1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", where["date"])
    assert where["versions"]["numpy"] == np.__version__
    json.dumps(where)


def test_the_commit_is_that_of_the_checkout_and_marks_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "__file__", str(tmp_path / "cratelm" / "rundir.py"))
    assert origin()["commit"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:12]
    assert origin()["commit"] == commit
    (tmp_path / "file").write_text("2")
    assert origin()["commit"] == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert origin()["commit"] is None
