"""`kill -9` at random moments of every other stage, the same command again, and the results of a run left alone."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import earlier, forking
from fixtures.forking import Forks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only on Linux may a process that has imported torch fork"),
]
KILLS = int(os.environ.get("CRATELM_TEST_CASES", "3"))
PROMPT = "--prompt crate --tokens 12"
SAE = "--tokens 900 --batch-tokens 64 --buffer-tokens 128 --k 2 --expansion 1 --log-every 5"
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "evaluate": ("evaluate {run} --data {data}", ("evaluation*",)),
    "whitebox": ("whitebox {run} --data {data}", ("whitebox.json",)),
    "dial": ("dial {run} --data {data} --tokens 200 --penalty 1 2 --step-size 1 --threshold 0 --loss-only", ("dial*",)),
    "directions": ("directions {run}", ("directions",)),
    "ablate": ("ablate {run} --data {data} --neuron 1/2 1/7 0/3 --tokens 400", ()),
    "steer": ("steer {run} --neuron 1/2=set:2x " + PROMPT, ()),
    "ledger": ("ledger {run} --prompt crate", ()),
    "report": ("report {run}", ()),
    "report --site": ("report {run} --site", ()),
    "export": ("export {run} --format neuronrecord --out {run}/exported", ()),
    "sae train": ("sae train {run} --data {data} --layer 1 --name new " + SAE, ()),
    "sae evaluate": ("sae evaluate {run} --data {data} --tokens 200", ("saes/old/evaluation.json",)),
    "interpret --llm": (
        "interpret {run} --layer 1 --skip-lookup --protocol random-only --neurons 1,2,7 --skip-self-test --llm {url}",
        ("interpretation.sqlite",),
    ),
}
"""Stage -> its command, and the results of it that the earlier run has already."""
ORIGINS = ("origin", "checksum", "made", "seconds", "date", "command", "tokens_per_second")
"""Fields of JSON that differ between two runs of a command."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forking.forks(tmp_path_factory.mktemp("forks")) as process:
        yield process


def without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_origin(part) for key, part in value.items() if key not in ORIGINS}
    return [without_origin(part) for part in value] if isinstance(value, list) else value


def tables(store: Path) -> dict[str, list[str]]:
    """Table -> its rows, of the tables with results; numbers of explanations are in the order of answers."""
    with contextlib.closing(sqlite3.connect(store)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        names = [name for name in names if name not in ("stages", "answers", "calls", "meta")]
        return {
            name: sorted(repr(row[name == "explanations" :]) for row in connection.execute(f"SELECT * FROM {name}"))
            for name in names
            if not name.startswith("explanation_search")
        }


def contents(run: Path) -> dict[str, Any]:
    """Name -> content of every file without its origin; of drawings and pages only the name."""
    files: dict[str, Any] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock"):
        name = re.sub(r"\d{8}-\d{6}", "DATE", str(file.relative_to(run)))
        if file.parent.name == "overviews":  # a cache, whose names depend on the place of the run
            continue
        if file.suffix in (".svg", ".png", ".html"):
            files[name] = None
        elif file.suffix == ".sqlite":
            files[name] = tables(file)
        elif file.suffix in (".json", ".jsonl", ".tex", ".js"):
            text = re.sub(r"[\w:.-]*20\d\d-[\w:.-]*", "", file.read_text().replace(str(run.parent), ""))
            parsed = {".json": lambda text: [text], ".jsonl": str.splitlines}.get(file.suffix)
            files[name] = [without_origin(json.loads(part)) for part in parsed(text)] if parsed else text
        else:
            files[name] = file.read_bytes()
    return files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_any_moment_ends_with_the_same_results(stage: str, forks: Forks, tmp_path: Path) -> None:
    command, made_before = STAGES[stage]
    whole, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    earlier.unpack(tmp_path)
    for pattern in made_before:
        for path in (tmp_path / earlier.RUN).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for run in (whole, killed):
        shutil.copytree(tmp_path / earlier.RUN, run)
    with contextlib.ExitStack() as stack:
        url = ""
        if stage == "interpret --llm":
            pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
            from fakes.rule_server import RuleServer

            url = stack.enter_context(RuleServer()).url
        if stage == "sae train":
            pytest.importorskip("sae_lens", reason="sae-lens is not installed (make test-all installs it)")
        command = command.replace("{data}", str(tmp_path / earlier.TOKENS)).replace("{url}", url)
        assert forks.ask("kill_at_random", KILLS, str(whole), str(killed), command) == KILLS
    expected, actual = contents(whole), contents(killed)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == value, name
    assert not [path for path in killed.rglob(".*") if path.name not in (".lock", ".metadata")]
