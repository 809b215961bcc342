"""Malformed files never give a traceback: seeded damage to every kind of file, and to a language model's answers.

`CRATELM_TEST_SEED` and `CRATELM_TEST_CASES` choose the first case and the number of cases.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.llm_server import Answer, Body
from fakes.rule_server import RuleServer
from fixtures import earlier
from fixtures.damage import CONTENT, damage, huge_number, other_type

from cratelm.cli import main
from cratelm.errors import CrateError

OVERVIEW = hashlib.sha256(json.dumps(["fixed", "crate-2l"]).encode()).hexdigest()[:16] + ".json"
RUN, DATA, MODEL, SAE = "crate-2l", "tokens", "crate-2l/model", "crate-2l/saes/old"
TRAINED, URL, ANSWERS = "trained", "URL", "the answers of a server"
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
if importlib.util.find_spec("starlette"):
    OF_RECORDS.append(("serve", RUN))
OF_STORE = [*OF_RECORDS[:4], *OF_RECORDS[5:8], *OF_RECORDS[10:]]
OF_DATA = [
    ("evaluate", RUN, "--data", DATA), ("collect", RUN, "--data", DATA, "--mode", "compat"),
    ("train", "--out", "new", "--data", DATA, "--tokens", "64", "--dry-run"),
]  # fmt: skip
OF_SAE = [
    ("steer", RUN, "--sae", "old", "--neuron", "sae:1/2=set:2x", *PROMPT, "--tokens", "3"),
    ("sae evaluate", RUN, "--data", DATA, "--tokens", "200"), ("report", RUN, "--out", "out"),
]  # fmt: skip
OF_TRAINING: list[tuple[str, ...]] = [
    ("train", "--out", TRAINED, "--data", DATA, "--size", "1l", "--context", "16", "--batch-tokens", "64",
     "--micro-batch", "4", "--warmup-steps", "2", "--log-every", "1", "--tokens", "384", "--checkpoint-every", "2",
     "--evaluate-every", "3", "--evaluate-tokens", "64", "--device", "cpu"),
]  # fmt: skip
OF_LLM: list[tuple[str, ...]] = [
    ("interpret", RUN, "--layer", "1", "--skip-lookup", "--protocol", "random-only", "--neurons", neurons,
     "--skip-self-test", "--simulator", simulator, "--llm", URL)
    for simulator in ("all-at-once", "structured") for neurons in ("1,2,7", "0,3,5")
    if importlib.util.find_spec("httpx")
]  # fmt: skip
CHECKPOINT = f"{TRAINED}/checkpoints/step_0000004"
FILES: dict[str, list[tuple[str, ...]]] = {
    f"{RUN}/run.json": [*OF_RECORDS, *OF_MODEL], f"{RUN}/metrics.jsonl": [("report", RUN, "--out", "out")],
    f"{RUN}/evaluation.json": [("report", RUN, "--out", "out"), OF_MODEL[1], OF_MODEL[3]],
    f"{RUN}/evaluation_documents.safetensors": [("report", RUN, "--out", "out")],
    f"{RUN}/whitebox.json": [("report", RUN, "--out", "out"), ("report", RUN, "--site", "--out", "out")],
    f"{RUN}/dial.json": [("report", RUN, "--out", "out"), ("dial", RUN, "--data", DATA, "--tokens", "200")],
    f"{RUN}/interpretation.sqlite": [*OF_STORE, *OF_LLM],
    f"{MODEL}/config.json": OF_MODEL, f"{MODEL}/tokenizer.json": OF_MODEL,
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
    f"{TRAINED}/run.json": OF_TRAINING, f"{TRAINED}/metrics.jsonl": OF_TRAINING,
    **{f"{CHECKPOINT}/{name}": OF_TRAINING for name in ("checkpoint.json", ".metadata", "__0_0.distcp")},
    f"{RUN}/votes.sqlite": OF_RECORDS[11:], f"{RUN}/overviews/{OVERVIEW}": OF_RECORDS[11:], ANSWERS: OF_LLM,
    "theirs/0/0.json": [("import", "theirs", "--out", "imported")], "text.jsonl": [
        ("tokenize", "text.jsonl", "--out", "new", "--tokenizer", "bpe:260"),
    ],
}  # fmt: skip
"""A file of a run, of its tokens, or next to them -> the commands that read it."""
FILES = {name: commands for name, commands in FILES.items() if commands}  # without the commands of missing extras


class DamagingServer(RuleServer):
    """A server of rules; while it has a generator of random numbers, two of three answers are damaged."""

    chance: random.Random | None = None
    folder: Path

    def answer(self, path: str, body: Body) -> Answer:
        answer = super().answer(path, body)
        if self.chance is None or self.chance.random() < 0.33:
            return answer
        if self.chance.random() < 0.3:
            answer.status = self.chance.choice((200, 204, 206, 301, 400, 402, 404, 418, 422, 429, 500, 503))
            answer.headers = {"Retry-After": self.chance.choice(("0", "-1", "x", "1e9999", "0.01"))}
            return answer
        answer.cut = self.chance.random() < 0.1
        with self.lock:
            file = self.folder / "answer.json"
            file.write_bytes(answer.content)
            self.chance.choice((*CONTENT, huge_number, *[other_type] * 8))(file, self.chance)
            answer.content = file.read_bytes()
        return answer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DamagingServer]:
    with DamagingServer() as server:
        server.folder = tmp_path_factory.mktemp("server")
        yield server


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_intact(tmp_path_factory.mktemp("intact"))


def make_intact(folder: Path) -> Path:
    """A run of an earlier version, one in the middle of its training, and further files that commands read."""
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
    for command in [*OF_TRAINING, *OF_RECORDS[11:]]:
        assert end_of(command, folder) == (0, [])
    for path in (folder / TRAINED / "checkpoints").iterdir():
        if path.name != Path(CHECKPOINT).name:
            shutil.rmtree(path)
    shutil.rmtree(folder / TRAINED / "model")
    return folder


def serve(run: Path) -> int:
    """Start a server, and ask it for every kind of answer. Returns 2 if it does not start."""
    from report.server.test_guard import HOST, ask

    from cratelm.commands.serve import Options, application_parts
    from cratelm.report.server.application import application

    before = set(threading.enumerate())
    try:
        app = application(application_parts(Options(runs=(run,), device="cpu")))
    except CrateError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    ours = {"content_type": "application/json", "x_cratelm_token": app.page_token, "host": HOST}
    text = json.dumps({"model": "crate-2l", "text": "a b", "changes": [{"layer": 1, "neuron": 2, "strength": 1}]})

    async def every() -> None:
        chunks = ("site", "overview", "m0/t0/l1/layer", "m0/t0/l1/neurons-0", "m0/t1/l1/texts-0", "search/directory")
        for path in ("/", *(f"/data/{name}.json" for name in chunks), "/api/votes"):
            await ask(app, path=path)
        await ask(app, path="/api/search", query="q=fires")
        for path in ("/api/activations", "/api/effect", "/api/continue"):
            await ask(app, "POST", path=path, parts=(text.encode(),), **ours)

    asyncio.run(every())  # a handler that fails raises its error here
    for thread in set(threading.enumerate()) - before:
        thread.join(SECONDS)
    return 0


class Hang(BaseException):
    """A command took too long."""


def end_of(command: tuple[str, ...], folder: Path) -> tuple[int, list[str]]:
    """Run a command in a folder; its exit code and its errors. Raises what the command or a thread of it raises."""
    raised: list[BaseException | None] = []
    err = io.StringIO()

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    before, threading.excepthook = threading.excepthook, lambda failed: raised.append(failed.exc_value)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            if command[0] == "serve":
                code = serve(Path(command[1]))
            else:
                code = main([*command[0].split(), *command[1:], "--no-verify"])
    finally:
        signal.alarm(0)
        threading.excepthook = before
    for error in raised:
        if error is not None:
            raise error
    return code, [line for line in err.getvalue().splitlines() if line.startswith("error: ")]


def problem_of(intact: Path, folder: Path, seed: int, server: DamagingServer | None) -> str:
    """Damage one file of a copy and run a command on it; what is wrong with its end, empty if nothing is."""
    chance = random.Random(seed)
    name = chance.choice(sorted(FILES))
    command = chance.choice(FILES[name])
    if server is not None:
        command = tuple(server.url if word == URL else word for word in command)
        server.chance = random.Random(seed) if name == ANSWERS else None
    shutil.copytree(intact, folder)
    if name == ANSWERS:
        done = "damaged"
    elif chance.random() < 0.05:
        other = chance.choice(sorted(FILES.keys() - {ANSWERS}))
        done = f"swapped with {other}"
        (folder / name).write_bytes((intact / other).read_bytes())
    else:
        done = damage(folder / name, chance)
    before = {path for path in folder.rglob("*") if not path.is_dir()}
    try:
        code, errors = end_of(command, folder)
        wrong = "" if (code, len(errors)) in ((0, 0), (2, 1)) else f"code {code}, errors {errors}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/cratelm/" in frame.filename]
        where = " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
        wrong = f"{type(error).__name__} {str(error)[:100]} at {where}"
    half = [path.name for path in folder.rglob(".*.tmp") if path not in before]
    wrong += f", left {half}" if half else ""
    shutil.rmtree(folder, ignore_errors=True)
    return wrong and f"seed {seed}: {name} {done}: {' '.join(command)}: {wrong}"


def check(intact: Path, folder: Path, cases: int, first: int, server: DamagingServer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        impatient(patch)
        problems = [problem_of(intact, folder / str(number), number, server) for number in range(first, first + cases)]
    problems = list(filter(None, problems))
    assert not problems, "\n".join([f"{len(problems)} of {cases} cases, CRATELM_TEST_SEED={first}", *problems])


def impatient(patch: pytest.MonkeyPatch) -> None:
    """Retries without waits, and files read without comparing checksums."""
    patch.setenv("CRATELM_VERIFY", "0")
    if OF_LLM:
        from cratelm.interpretation.clients import endpoint, transport

        assert endpoint  # annotates with the class, so it is imported before
        short = transport.Retry(attempts=3, first=0.001, longest=0.002)
        patch.setattr(transport, "Retry", lambda: short)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quick_report")
def test_a_malformed_file_ends_a_command_in_one_line(intact: Path, tmp_path: Path, server: DamagingServer) -> None:
    first = int(os.environ.get("CRATELM_TEST_SEED") or 1000)
    check(intact, tmp_path, int(os.environ.get("CRATELM_TEST_CASES", "30")), first, server)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("part", range(4))
def test_malformed_files_end_commands_in_one_line(
    part: int, intact: Path, tmp_path: Path, server: DamagingServer
) -> None:
    """400 cases, always the same, in parts; `CRATELM_TEST_CASES` and `CRATELM_TEST_SEED` choose more and others."""
    cases = int(os.environ.get("CRATELM_TEST_CASES", "400")) // 4
    first = int(os.environ.get("CRATELM_TEST_SEED") or 1000)
    check(intact, tmp_path, cases, first + part * cases, server)
