"""Work on many neurons under load, with faults of the server and kills of the process: nothing lost or paid twice."""

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.asking import PROTOCOLS, ask
from fakes.llm_server import Answer, Body, Server, completion, refusal
from fixtures.synthetic import make_run

from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet
from cratelm.interpretation.store.schema import SetKey

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

NEURONS = 200


def said(text: str) -> str:
    return f"<{text}>"


def row(asked: str) -> str:
    return f"{said(asked)} {said(f'sure of {said(asked)}?')}"


def expected(neurons: int) -> dict[str, dict[int, str]]:
    return {name: {neuron: row(f"{name} {neuron}") for neuron in range(neurons)} for name in PROTOCOLS}


def rows(run: Path) -> dict[str, Any]:
    store = Store.open(run)
    found = {}
    for name in PROTOCOLS:
        key = SetKey(layer=0, protocol=name, explainer="small")
        found[name] = GrowingSet(store=store, key=key, stage="explain", neurons=np.arange(1)).rows()
    return found


class Faulty:
    """Answers, but for a share of requests that each of its faults gets; counts what it answered well."""

    def __init__(self, rng: random.Random, share: float, *, slow: float = 0.0) -> None:
        self.rng, self.share, self.slow = rng, share, slow
        self.lock, self.answered = threading.Lock(), Counter[str]()
        self.faults = Counter[str]()

    def __call__(self, _path: str, body: Body) -> Answer:
        text = body["messages"][0]["content"]
        right = Answer(completion(said(text)), wait=self.slow)
        faults = {
            "429": refusal("busy", 429, **{"Retry-After": "0.05"}), "500": refusal("oops", 500),
            "cut": Answer(completion(said(text)), cut=True), "no JSON": Answer(b'{"choices": ['),
            "lengths": Answer({"choices": []}),
        }  # fmt: skip
        with self.lock:
            if self.rng.random() < self.share:
                name = self.rng.choice(list(faults))
                self.faults[name] += 1
                return faults[name]
            self.answered[text] += 1
        return right


def test_faults_under_load_lose_nothing_and_nothing_is_paid_twice(tmp_path: Path, rng: np.random.Generator) -> None:
    """200 neurons by 3 protocols, every sixth answer a fault."""
    run, answer = make_run(tmp_path / "run", rng), Faulty(random.Random(int(rng.integers(1 << 30))), 0.16)
    with Server(answer) as server:
        usage = asyncio.run(ask(run, server.url, NEURONS))
        assert rows(run) == expected(NEURONS)
        assert set(answer.answered.values()) == {1}
        assert len(answer.answered) == usage.calls - usage.unusable == NEURONS * 3 * 2
        assert usage.unusable == answer.faults["no JSON"] + answer.faults["lengths"]
        assert usage.retries == answer.faults.total() == len(server.asked) - len(answer.answered)
        assert set(answer.faults) == {"429", "500", "cut", "no JSON", "lengths"}
        again = asyncio.run(ask(run, server.url, NEURONS))
        assert (again.calls, again.requests) == (0, 0)


def test_a_second_run_of_other_sets_is_paid_by_the_cache(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "run", rng)
    with Server(Faulty(random.Random(0), 0.0)) as server:
        asyncio.run(ask(run, server.url, 20))
        with Store.open(run).transaction() as connection:
            for table in ("sets", "stages", "explanations", "begun"):
                connection.execute(f"DELETE FROM {table}")
        usage = asyncio.run(ask(run, server.url, 20))
        assert (usage.calls, usage.requests, usage.cached) == (0, 0, 20 * 3 * 2)
        assert rows(run) == expected(20)


def test_kill_9_loses_at_most_the_calls_in_flight(tmp_path: Path, rng: np.random.Generator) -> None:
    """A process killed three times at any moment: the next process asks only what was not answered."""
    run, neurons, in_flight, kills = make_run(tmp_path / "run", rng), 50, 16, 3
    answer = Faulty(random.Random(0), 0.0, slow=0.01)
    with Server(answer) as server:
        script = Path(__file__).parents[2] / "fakes" / "asking.py"
        command = [sys.executable, str(script), str(run), server.url, str(neurons)]
        for number in range(kills):
            before = len(server.asked)
            with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
                while process.poll() is None and len(server.asked) < before + 40 + 20 * number:
                    time.sleep(0.005)
                time.sleep(float(rng.random()) / 20)
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                process.kill()
            whole = set(_kept(run))
            assert set(rows(run)["top-and-random"].items()) <= set(expected(neurons)["top-and-random"].items())
            assert whole
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert rows(run) == expected(neurons)
        repeated = len(server.asked) - neurons * 3 * 2
        assert len(answer.answered) == neurons * 3 * 2
        assert repeated <= kills * in_flight
        assert max(answer.answered.values()) <= 1 + kills
    assert not list(run.glob("*-journal"))


def _kept(run: Path) -> list[str]:
    with Store.open(run).transaction() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return [row[0] for row in connection.execute("SELECT hash FROM calls")]


def test_a_refused_neuron_is_a_failure_with_its_text_and_no_score(tmp_path: Path, rng: np.random.Generator) -> None:
    def answer(_path: str, body: Body) -> Answer:
        text = body["messages"][0]["content"]
        if "anthropic 7" in text and "sure" not in text:
            return refusal("I will not talk about neuron 7.", 400)
        body = completion("")
        if "random-only 3" in text and "sure" not in text:
            body["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "No."}
            return Answer(body)
        return Answer(completion(said(text)))

    run = make_run(tmp_path / "run", rng)
    with Server(answer) as server:
        asyncio.run(ask(run, server.url, 9))
        asked = len(server.asked)
        asyncio.run(ask(run, server.url, 9))  # failures are not asked again
        assert len(server.asked) == asked == 9 * 3 * 2 - 2
    found = rows(run)
    assert sorted(set(range(9)) - set(found["anthropic"])) == [7]
    with Store.open(run).transaction() as connection:
        failures = connection.execute("SELECT neuron, message FROM failures ORDER BY neuron").fetchall()
    assert [neuron for neuron, _ in failures] == [3, 7]
    assert "No." in failures[0][1]
    assert "I will not talk about neuron 7." in failures[1][1]
    assert json.dumps(failures)
