"""The explainer and simulator that a report shows, where the runs have several."""

from collections.abc import Sequence
from pathlib import Path

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.store.database import Store

Kinds = dict[tuple[str, str], set[tuple[str, str, int]]]
"""(explainer, simulator) -> (tap, protocol, layer) of its scored sets, without controls."""


def choose_explainer(runs: Sequence[Path], mode: Mode, explainer: str = "", simulator: str = "") -> tuple[str, str]:
    """The named explainer and simulator; else a language model that scored everything that lookup scored in every run;
    else lookup; else the first pair that all runs have.

    Raises `CrateError` if no run has scores by a named explainer or simulator.
    """
    by_run = [_kinds(run, mode) for run in runs]
    anywhere = list(dict.fromkeys(pair for kinds in by_run for pair in kinds))
    fitting = [pair for pair in anywhere if explainer in ("", pair[0]) and simulator in ("", pair[1])]
    if not fitting:
        if anywhere and (explainer or simulator):
            names = {"explainer": explainer, "simulator": simulator}
            named = " and ".join(f"{what} {name}" for what, name in names.items() if name)
            choices = "; ".join(f"--explainer {e}" + f" --simulator {s}" * bool(s) for e, s in anywhere)
            raise CrateError(f"no run has {mode} scores by the {named}. Use one of: {choices}")
        return explainer or EXPLAINER, simulator
    lookup = (EXPLAINER, "")
    shared = [pair for pair in fitting if all(pair in kinds for kinds in by_run)]
    if not explainer:
        for pair in shared:
            if pair != lookup and all(kinds[pair] >= kinds.get(lookup, set()) for kinds in by_run):
                return pair
    return lookup if lookup in fitting else (shared or fitting)[0]


def _kinds(run: Path, mode: Mode) -> Kinds:
    kinds: Kinds = {}
    if (run / "interpretation.sqlite").exists():
        for key in Store.open(run).scored():
            if key.mode == mode:
                layers = kinds.setdefault((key.explainer, key.simulator), set())
                layers |= set() if key.control or key.sample else {(key.tap, key.protocol, key.layer)}
    return kinds


def described(explainer: str, simulator: str) -> str:
    """Explainer and simulator in words, for a caption."""
    return f"explained by {explainer}, simulated by {simulator}" if simulator else f"{explainer} explainer"


def scored_taps(path: Path, taps: Sequence[str], mode: Mode) -> list[str]:
    """The taps at which a run is scored; without any, the first tap, so that reading its scores raises an error."""
    if len(taps) == 1 or not (path / "interpretation.sqlite").exists():
        return list(taps)[:1]
    scored = {key.tap for key in Store.open(path).scored() if key.mode == mode}
    return [tap for tap in dict.fromkeys(taps) if tap in scored] or list(taps)[:1]
