"""What the flaws of the released simulator's read-out cost, on neurons whose rules are known.

    python benchmarks/compat_llm.py [--seeds 5]

The neurons and the simulator are those of the tests (`tests/planted_rules.py`, `tests/rule_follower.py`): each neuron
fires as a rule says, and the simulator expects what the rule of the explanation says, here with some doubt: it thinks
of `unknown` most, of words, and of the neighbouring numbers, some written with a space before them. So all that is
lost on the way from its probabilities to the score is the read-out's. It writes 10 as one token or as two.
"""

import argparse
import asyncio
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fakes.rule_follower import RuleFollower
from fixtures.planted_rules import EXPLANATIONS, make_planted, make_tokenizer

from cratelm.activations.records import Excerpts, Mode, read_records
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.prompts.explainer import shown
from cratelm.interpretation.prompts.normalisation import Rounding, shown_maximum
from cratelm.interpretation.protocols import draw, protocol
from cratelm.interpretation.simulators.opening import open_simulator

READ_OUTS: dict[str, Mode] = {"as released": "compat", "all repairs": "fixed"}


class Doubtful(RuleFollower):
    """Spreads its probability: most on words, and on numbers by how far they are from the rule's."""

    def _numbers(self, number: float | None) -> Mapping[str, float]:
        if number is None:
            return super()._numbers(number)
        shares: dict[str, float] = {"unknown": 0.45, "\n": 0.05, "high": 0.04, "none": 0.03}
        weights = {value: math.exp(-abs(value - number)) for value in range(self.top + 1)}
        total = sum(weights.values())
        for value, weight in weights.items():
            text = "1" if value == 10 and not self.ten else str(value)
            # Of the rule's own number a part is written with a space, as models do that saw tables with spaces.
            spaced = 0.6 if abs(value - number) < 0.6 else 0.1
            shares[f" {text}"] = shares.get(f" {text}", 0) + spaced * 0.43 * weight / total
            shares[text] = shares.get(text, 0) + (1 - spaced) * 0.43 * weight / total
        return {text: math.log(share) for text, share in shares.items()}


async def points(excerpts: Excerpts, mode: Mode, ten: bool) -> float:
    """Mean correlation x 100 over the neurons."""
    simulator = await open_simulator("all-at-once", Doubtful(ten=ten), mode=mode)
    strings = prompt_strings(make_tokenizer(), simulator.strings_mode)
    scores = []
    for neuron, explanation in enumerate(EXPLANATIONS):
        several = list(excerpts.of(neuron))
        tokens = [[strings[token] for token in one.tokens.tolist()] for one in several]
        simulated = np.concatenate(await simulator.simulate(explanation, tokens))
        activations = np.concatenate([one.activations for one in several])
        scores.append(float(np.corrcoef(activations, simulated)[0, 1]) if np.ptp(simulated) else 0.0)
    return 100 * float(np.mean(scores))


def shown_as_silent(excerpts: Excerpts, rounding: Rounding, outlier: float) -> float:
    """Share of the tokens on which neurons fire that the explainer's prompt shows as 0.

    With an `outlier` above 0 each neuron has one token on which it fires so many times as strongly as on its strongest.
    """
    strings, lost = prompt_strings(make_tokenizer()), []
    for neuron in range(len(EXPLANATIONS)):
        several = [replace(one, activations=one.activations.copy()) for one in excerpts.of(neuron)]
        if outlier:
            several[0].activations[0] = outlier * max(shown_maximum([one.activations for one in several]), 1e-6)
        values = np.concatenate([one.activations for one in several])
        numbers = np.concatenate([one.activations for one in shown(several, strings, rounding=rounding)])
        lost.append(float((numbers[values > 0] == 0).mean()))
    return float(np.mean(lost))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    correlations: dict[tuple[str, bool], list[float]] = {}
    silent: dict[tuple[Rounding, float], list[float]] = {
        (rounding, outlier): [] for rounding in get_args(Rounding) for outlier in (0.0, 12.0)
    }
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(seed)
            records = read_records(make_planted(Path(folder) / "run", rng, mode="compat"), 0, mode="compat")
        by = protocol("top-and-random", "compat")
        scored = draw(records, by.score, "score")
        for way, shares in silent.items():
            shares.append(shown_as_silent(draw(records, by.explain, "explain"), *way))
        for name, mode in READ_OUTS.items():
            for ten in (True, False):
                correlations.setdefault((name, ten), []).append(asyncio.run(points(scored, mode, ten)))
    print(f"{'read-out':22}{'10 is one token':>22}{'10 is two tokens':>22}")
    for name in dict.fromkeys(name for name, _ in correlations):
        both = (correlations[name, ten] for ten in (True, False))
        cells = [f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}" for values in both]
        print(f"{name:22}{cells[0]:>22}{cells[1]:>22}")
    for (rounding, outlier), shares in silent.items():
        option = {"floor": "--rounding down (compat)", "ceil": "--rounding up (fixed)"}[rounding]
        beside = f"beside an outlier {outlier:.0f} times as strong" if outlier else "as they are"
        print(f"{option}: {np.mean(shares):.0%} of firing tokens are shown as 0, {beside}")


if __name__ == "__main__":
    main()
