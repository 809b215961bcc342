"""Best of K from the command line, and what its plan counts."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.rule_server import RuleServer
from fixtures.planted_rules import EXPLANATIONS, make_planted
from fixtures.synthetic import make_run
from interpretation.stages.test_best_of import BEST, Several, explainer
from interpretation.stages.test_language_model_stages import task

from cratelm.cli import main
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.workflows.llm.plan import CostPlan
from cratelm.workflows.options.language_model import Spending


def test_the_plan_counts_the_candidates_and_what_chooses_among_them(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "run", rng)
    llm, some = Several(run, good=2), task(run, BEST, neurons="8")
    plan = CostPlan(store=some.store, spending=Spending())
    asyncio.run(plan.explain([some], explainer(run, llm)))
    assert (llm.seeds, llm.questions) == ([], []), "a plan asks nothing"
    asyncio.run(explainer(run, llm).explain(some))
    assert plan.total.calls == len(llm.seeds) + len(llm.questions) > 4 * len(some.explainable)
    again = CostPlan(store=some.store, spending=Spending())
    asyncio.run(again.explain([some], explainer(run, llm)))
    assert again.total.calls == 0


def test_best_of_is_a_separate_set_that_every_command_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
    run = make_planted(tmp_path / "crate-1l", np.random.default_rng(7))
    best = ["--protocol", "random-only", "--neurons", "2", "--best-of", "2", "--best-by", "fuzzing"]
    with RuleServer() as server:
        assert main(["interpret", str(run), "--llm", server.url, *best]) == 0
        said, asked = capsys.readouterr(), len(server.asked)
        assert "explained by rules+best-of-2-by-fuzzing" in said.out
        assert main(["interpret", str(run), "--llm", server.url, *best]) == 0
        assert len(server.asked) == asked
        seeds = [
            body.get("seed", 0) for _, body in server.asked if "Explanation of neuron" in str(body.get("messages"))
        ]
        assert sorted(set(seeds)) == [0, 1]
    key = SetKey(layer=0, protocol="random-only", explainer="rules+best-of-2-by-fuzzing")
    texts = Store.open(run).texts(key)
    assert len(texts) == 2
    assert texts == {neuron: EXPLANATIONS[neuron] for neuron in texts}
    assert replace(key, control="").command("explain", run).endswith("--model rules --best-of 2 --best-by fuzzing")
    capsys.readouterr()
    assert main(["score", str(run), "--model", "rules", *best]) == 0
    assert re.search(r"explained by rules\+best-of-2-by-fuzzing", capsys.readouterr().out)
    assert main(["interpret", str(run), "--llm", "http://127.0.0.1:9/v1", "--best-of", "2", "--best-by", "bogus"]) == 2
    assert "--best-by must be one of detection, fuzzing" in capsys.readouterr().err
