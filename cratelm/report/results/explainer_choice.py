"""Which explainer and simulator a report is about, where the runs have several."""

from collections.abc import Sequence
from pathlib import Path

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.store.database import Store


def choose_explainer(runs: Sequence[Path], mode: Mode, explainer: str = "", simulator: str = "") -> tuple[str, str]:
    """Explainer and simulator of the scores to show: those named; else a language model, where it scored all that
    lookup did in every run, as `cratelm interpret --llm` leaves them; else lookup; else the first that all runs have.

    Refused where one is named that no run has scores by.
    """
    found = [_kinds(run, mode) for run in runs]
    everywhere = [kind for kind in dict.fromkeys(one for kinds in found for one in kinds)]
    fitting = [kind for kind in everywhere if explainer in ("", kind[0]) and simulator in ("", kind[1])]
    if not fitting:
        if everywhere and (explainer or simulator):
            named = {"explainer": explainer, "simulator": simulator}
            asked = " and ".join(f"{what} {name}" for what, name in named.items() if name)
            options = (f"--explainer {who}" + f" --simulator {how}" * bool(how) for who, how in everywhere)
            there = "; ".join(options)
            raise CrateError(f"no run has {mode} scores by the {asked}. There are: {there}")
        return explainer or EXPLAINER, simulator
    by_lookup = [kind for kind in fitting if kind == (EXPLAINER, "")]
    shared = [kind for kind in fitting if all(kind in kinds for kinds in found)]
    if not explainer:
        nothing = set[tuple[str, str, int]]()
        whole = [kind for kind in shared if all(kinds[kind] >= kinds.get((EXPLAINER, ""), nothing) for kinds in found)]
        if by_model := [kind for kind in whole if kind not in by_lookup]:
            return by_model[0]
    return (by_lookup or shared or fitting)[0]


def _kinds(run: Path, mode: Mode) -> dict[tuple[str, str], set[tuple[str, str, int]]]:
    """(explainer, simulator) of every scored set of a run -> (tap, protocol, layer) of those that are no control."""
    found: dict[tuple[str, str], set[tuple[str, str, int]]] = {}
    if (run / "interpretation.sqlite").exists():
        for key in Store.open(run).scored():
            if key.mode == mode:
                own = found.setdefault((key.explainer, key.simulator), set())
                own |= set() if key.control or key.sample else {(key.tap, key.protocol, key.layer)}
    return found


def described(explainer: str, simulator: str) -> str:
    """In words for a caption."""
    if not simulator:
        return f"{explainer} explainer"
    return f"explained by {explainer}, simulated by {simulator}"


def scored_taps(path: Path, taps: Sequence[str], mode: Mode) -> list[str]:
    """Which of the taps a run is scored at; where it is one or none, all, so that what is missing gets a message."""
    if len(taps) == 1 or not (path / "interpretation.sqlite").exists():
        return list(taps)[:1]
    scored = {key.tap for key in Store.open(path).scored() if key.mode == mode}
    return [tap for tap in dict.fromkeys(taps) if tap in scored] or list(taps)[:1]
