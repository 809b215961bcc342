"""Malformed files never give a traceback: seeded damage to every kind of file, read by the commands that read it."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import earlier

from cratelm.cli import main

RUN, DATA, MODEL, SAE = "crate-2l", "tokens", "crate-2l/model", "crate-2l/saes/old"
SECONDS = 120
NEURON = ("--layer", "1", "--neuron", "2")
PROMPT = ("--prompt", "a b")
OF_MODEL = [
    ("generate", RUN, "--tokens", "3", *PROMPT), ("evaluate", RUN, "--data", DATA), ("directions", RUN),
    ("export", RUN, "--format", "hf", "--out", "out"), ("ledger", RUN, *PROMPT),
    ("steer", RUN, "--neuron", "1/2=set:2x", *PROMPT, "--tokens", "3"),
    ("ablate", RUN, "--data", DATA, "--neuron", "1/2", "--tokens", "200"), ("import", MODEL, "--out", "imported"),
]  # fmt: skip
OF_RECORDS = [
    ("neurons", RUN, *NEURON), ("neurons", RUN, "--layer", "1"), ("neurons", RUN, "--tap", "sae-old", "--layer", "1"),
    ("score", RUN), ("explain", RUN), ("interpret", RUN, "--protocol", "random-only"), ("report", RUN, "--out", "out"),
    ("report", RUN, "--site", "--out", "out"), ("export", RUN, "--format", "csv", "--out", "out"),
    ("export", RUN, "--format", "neuronrecord", "--out", "out"),
    ("export", RUN, "--format", "neuronpedia", "--out", "out"),
]  # fmt: skip
OF_STORE = [*OF_RECORDS[:4], *OF_RECORDS[5:8], OF_RECORDS[-1]]
OF_DATA = [
    ("evaluate", RUN, "--data", DATA), ("collect", RUN, "--data", DATA, "--mode", "compat"),
    ("train", "--out", "new", "--data", DATA, "--tokens", "64", "--dry-run"),
]  # fmt: skip
OF_SAE = [
    ("steer", RUN, "--sae", "old", "--neuron", "sae:1/2=set:2x", *PROMPT, "--tokens", "3"),
    ("sae evaluate", RUN, "--data", DATA, "--tokens", "200"), ("report", RUN, "--out", "out"),
]  # fmt: skip
FILES: dict[str, list[tuple[str, ...]]] = {
    f"{RUN}/run.json": [*OF_RECORDS, *OF_MODEL], f"{RUN}/metrics.jsonl": [("report", RUN, "--out", "out")],
    f"{RUN}/evaluation.json": [("report", RUN, "--out", "out"), OF_MODEL[1], OF_MODEL[3]],
    f"{RUN}/evaluation_documents.safetensors": [("report", RUN, "--out", "out")],
    f"{RUN}/whitebox.json": [("report", RUN, "--out", "out"), ("report", RUN, "--site", "--out", "out")],
    f"{RUN}/dial.json": [("report", RUN, "--out", "out"), ("dial", RUN, "--data", DATA, "--tokens", "200")],
    f"{RUN}/interpretation.sqlite": OF_STORE, f"{MODEL}/config.json": OF_MODEL, f"{MODEL}/tokenizer.json": OF_MODEL,
    f"{MODEL}/model.safetensors": OF_MODEL, f"{MODEL}/model.safetensors.index.json": OF_MODEL[:2],
    f"{MODEL}/checksums.json": OF_MODEL[:2], f"{SAE}/cfg.json": OF_SAE, f"{SAE}/sae.json": OF_SAE,
    f"{SAE}/sae_weights.safetensors": OF_SAE, f"{RUN}/directions/neurons/directions.json": [OF_RECORDS[0]],
    f"{RUN}/directions/neurons/layer_01.safetensors": [OF_RECORDS[0], OF_RECORDS[7]],
    f"{RUN}/directions/tokenizer.json": [OF_RECORDS[0], OF_RECORDS[7]], f"{DATA}/tokens.json": OF_DATA,
    f"{DATA}/tokenizer.json": OF_DATA, f"{DATA}/val.bin": OF_DATA[:2],
    f"{RUN}/records/fixed/records.json": OF_RECORDS, f"{RUN}/records/fixed/tokenizer.json": OF_RECORDS,
    f"{RUN}/records/fixed/windows.safetensors": OF_RECORDS,
    f"{RUN}/records/fixed/neurons/layer_01.safetensors": OF_RECORDS,
    f"{RUN}/records/fixed/sae-old/layer_01.safetensors": [OF_RECORDS[2]],
    "theirs/0/0.json": [("import", "theirs", "--out", "imported")], "text.jsonl": [
        ("tokenize", "text.jsonl", "--out", "new", "--tokenizer", "bpe:260"),
    ],
}  # fmt: skip
"""A file of a run, of its tokens, or next to them -> the commands that read it."""
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 70, 1e308, float("nan"), "", "text", "9" * 30, "../../etc/passwd", "a\0b", "\ud800", [], {},
    [1], [[]], {"a": 1}, ["x", 1, None], 2.5,
)  # fmt: skip


def truncated(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def flipped(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 3, 40))):
        content[chance.randrange(min(len(content), chance.choice((100, 4000, 1 << 30))))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def empty(path: Path, _chance: random.Random) -> None:
    path.write_bytes(b"")


def replaced_by_a_folder(path: Path, _chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path: Path, _chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_a_socket(path: Path, _chance: random.Random) -> None:
    path.unlink()
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:  # an address has at most 107 bytes
        made.bind(path.name)


def nested(path: Path, chance: random.Random) -> None:
    depth, opening = chance.choice((2000, 200_000)), chance.choice(('{"a":', "["))
    path.write_text(opening * depth + ("" if chance.random() < 0.5 else "1" + {"[": "]"}.get(opening, "}") * depth))


def huge_number(path: Path, chance: random.Random) -> None:
    path.write_text('{"format_version": 1, "tokens": ' + "9" * chance.choice((400, 5000)) + "}\n")


def other_type(path: Path, chance: random.Random) -> None:
    """Another value at a place of a JSON file, or of the header of a safetensors file."""
    content = path.read_bytes()
    start, end = 0, len(content)
    if path.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    lines = content[start:end].decode().splitlines() if path.suffix == ".jsonl" else [content[start:end].decode()]
    number = chance.randrange(len(lines))
    value = json.loads(lines[number])
    places = list(containers(value))
    place = chance.choice(places) if chance.random() < 0.8 else places[0]
    key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    match chance.randrange(4):
        case 0 if isinstance(place, dict):
            del place[key]
        case 1 if isinstance(place, dict):
            place[chance.choice(("unknown", "0", "", "format_version"))] = chance.choice(ODD)
        case _:
            place[key] = chance.choice(ODD)
    lines[number] = json.dumps(value)
    header = "\n".join(lines).encode() + b"\n" * (path.suffix == ".jsonl")
    size = len(header).to_bytes(8, "little") if path.suffix == ".safetensors" else b""
    path.write_bytes(size + header + content[end:])


def containers(value: Any) -> Iterator[Any]:
    """Every object and list inside a JSON value that is not empty, the outermost first."""
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value[:5]:
            yield from containers(part)


def other_row(path: Path, chance: random.Random) -> None:
    """Other values in a column of a table of the store."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(path)) as store, store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = chance.choice([name for name in tables if not name.startswith("explanation_search")])
        column = chance.choice([row[1] for row in store.execute(f"PRAGMA table_info({table})")])
        odd = chance.choice((None, -1, 1 << 62, "text", b"", b"\x00\xff", 2.5, "[]", "{}", "[" * 3000))
        with contextlib.suppress(sqlite3.Error):
            store.execute(f"UPDATE {table} SET {column} = ?", [odd])


Damage = Callable[[Path, random.Random], None]
ANY: tuple[Damage, ...] = (
    truncated, flipped, empty, replaced_by_a_folder, replaced_by_a_pipe, replaced_by_a_socket, nested,
)  # fmt: skip


def damages(path: Path) -> tuple[Damage, ...]:
    if path.suffix in (".json", ".jsonl"):
        return (*ANY, huge_number, *[other_type] * 12)
    return {".safetensors": (*ANY, *[other_type] * 4), ".sqlite": (*ANY, *[other_row] * 8)}.get(path.suffix, ANY)


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an earlier version, with further files that commands read."""
    folder = tmp_path_factory.mktemp("intact")
    earlier.unpack(folder)
    (folder / "expected.json").unlink()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(40)))
    record = {"tokens": ["a", "b"], "activations": [0.5, 1.0]}
    theirs = {"most_positive_activation_records": [record] * 4, "random_sample": [record] * 4, "mean": 0.1}
    (folder / "theirs" / "0").mkdir(parents=True)
    (folder / "theirs" / "0" / "0.json").write_text(json.dumps(theirs))
    index = {"weight_map": {"embedding.weight": "model.safetensors"}}
    (folder / MODEL / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / MODEL / "checksums.json").write_text(json.dumps({"format_version": 1, "sha256": {}}))
    return folder


class Hang(BaseException):
    """A command took too long."""


def problem_of(intact: Path, folder: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Damage one file of a copy and run a command on it; what is wrong with its end, empty if nothing is."""
    chance = random.Random(seed)
    name = chance.choice(sorted(FILES))
    command = chance.choice(FILES[name])
    shutil.copytree(intact, folder)
    if chance.random() < 0.05:
        other = chance.choice(sorted(FILES))
        damage, case = "swapped with", f"{name} swapped with {other}"
        (folder / name).write_bytes((intact / other).read_bytes())
    else:
        damage = chance.choice(damages(folder / name)).__name__
        case = f"{name} {damage}"
        globals()[damage](folder / name, chance)
    before = {path for path in folder.rglob("*") if not path.is_dir()}

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    capsys.readouterr()
    try:
        with contextlib.chdir(folder):
            code = main([*" ".join(command[:1]).split(), *command[1:], "--no-verify"])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        wrong = "" if (code, len(errors)) in ((0, 0), (2, 1)) else f"code {code}, errors {errors}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f"{one.filename}:{one.lineno}" for one in reversed(frames) if "/cratelm/" in one.filename), "")
        wrong = f"{type(error).__name__} {str(error)[:100]} at {where}"
    finally:
        signal.alarm(0)
    half = [path.name for path in folder.rglob(".*.tmp") if path not in before]
    wrong += f", left {half}" if half else ""
    return wrong and f"seed {seed}: {case}: {' '.join(command)}: {wrong}"


def check(
    intact: Path,
    folder: Path,
    cases: int,
    seed: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = int(os.environ.get("CRATELM_TEST_SEED") or seed)
    problems: list[str] = []
    monkeypatch.setattr("cratelm.report.results.gather.RESAMPLES", 20)  # most of the time of a report
    for number in range(first, first + cases):
        problems += filter(None, [problem_of(intact, folder / str(number), number, capsys)])
        shutil.rmtree(folder / str(number))
    assert not problems, "\n".join([f"{len(problems)} of {cases} cases, CRATELM_TEST_SEED={first}", *problems])


@pytest.mark.filterwarnings("ignore")
def test_a_malformed_file_ends_a_command_in_one_line(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(intact, tmp_path, int(os.environ.get("CRATELM_TEST_CASES", "30")), 1000, capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_malformed_files_end_commands_in_one_line(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(intact, tmp_path, 250, 900_000, capsys, monkeypatch)
