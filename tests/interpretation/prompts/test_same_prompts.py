"""One rule of asking for all neurons of a set: a restart changes no prompt, nor what a short one leaves out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes.rule_server import RuleServer
from fixtures.planted_rules import make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from fakes.llm_server import Answer, Body, completion, refusal
from workflows.llm.test_interpret_llm import TAR, puzzle

from cratelm.cli import main
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.prompts.few_shot import solved_tables
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import begun
from cratelm.interpretation.store.schema import SetKey

CONTEXT = 3080
"""Room for some of the solved neurons, in the explainer's prompts and in the simulator's."""


def questions(server: RuleServer) -> list[Body]:
    """What was asked about neurons, solved ones shown or not."""
    text = [json.dumps(body) for _, body in server.asked]
    about = ["Explanation of neuron" in said and not puzzle(said) for said in text]
    return [body for (_, body), is_about in zip(server.asked, about, strict=True) if is_about]


class Stopping(RuleServer):
    """Refuse the key after N questions about neurons: the work ends as by a kill."""

    most = 1 << 30

    def answer(self, path: str, body: Body) -> Answer:
        if len(questions(self)) > self.most:
            return refusal("no key", 401)
        return super().answer(path, body)


def solved(body: Body) -> int:
    """Solved neurons that a prompt shows."""
    text = body.get("prompt") or "".join(turn["content"] for turn in body["messages"])
    return text.count("Explanation of neuron") - 1


def test_a_stop_and_a_restart_change_no_prompt(tmp_path: Path) -> None:
    """The context holds some of the solved neurons, whichever way tokens are counted."""
    runs = [make_planted(tmp_path / "whole", np.random.default_rng(7))]
    runs.append(shutil.copytree(runs[0], tmp_path / "stopped"))
    sent = []
    for run, stops in zip(runs, ((), (3, 9)), strict=True):
        with Stopping(context=CONTEXT) as server:
            command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "4", "--in-flight", "1"]
            for most in stops:
                server.most = most
                assert main(command) == 2
            server.most = 1 << 30
            assert main(command) == 0
            sent.append({json.dumps(body, sort_keys=True) for body in questions(server)})
            assert len(sent[-1]) > 4 + 5
    whole, stopped = sent
    assert stopped == whole
    for kind in ("messages", "prompt"):
        shown = {solved(json.loads(body)) for body in whole if kind in json.loads(body)}
        assert len(shown) == 1
    told = {}
    for stage, simulator in (("explain", ""), ("simulate", "all-at-once:rules")):
        key = SetKey(layer=0, protocol="random-only", explainer="rules", simulator=simulator)
        had = begun(Store.open(runs[1]), key, stage)
        told[stage] = json.loads(had.settings) if had else {}
    assert all(settings["left_out"] > 0 for settings in told.values()), told


def test_a_plan_and_the_work_leave_out_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_planted(tmp_path / "run", np.random.default_rng(7))
    with RuleServer(context=CONTEXT) as server:
        command = ["explain", str(run), "--llm", server.url, *TAR, "--neurons", "4"]
        assert main([*command, "--dry-run"]) == 0
        plan = capsys.readouterr().out
        assert main(command) == 0
        assert plan.strip() in capsys.readouterr().out


def test_tokens_are_measured_once_and_never_too_few() -> None:
    import asyncio

    from fakes.llm_server import Server

    def answer(path: str, body: Body) -> Answer:
        if path.endswith("/chat/completions"):
            return refusal("no chat template", 400)
        return Answer(completion("", prompt_tokens=len(body["prompt"]) // 4, new_tokens=1))

    async def measured(url: str) -> tuple[Endpoint, float]:
        endpoint = Endpoint(url, "small")
        assert endpoint.count("a é") == 4
        rate = await endpoint.calibrate()
        await endpoint.close()
        return endpoint, rate

    with Server(answer) as server:
        endpoint, rate = asyncio.run(measured(server.url))
    assert rate == len(solved_tables()) // 4 / len(solved_tables())
    assert endpoint.transport.usage.prompt_tokens == len(solved_tables()) // 4
    endpoint.tokens_per_byte = 0.25
    assert endpoint.count("abcd" * 100) == 125
    assert endpoint.count("é" * 100) == 200, "a character outside ASCII may take one token a byte"
