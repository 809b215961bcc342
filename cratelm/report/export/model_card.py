"""The card of a model, the README.md of its directory on the hub: configuration, training, loss, scores, origin."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cratelm.report.contents import ReportContents
from cratelm.report.results.gather import gather
from cratelm.report.tables.form import as_markdown
from cratelm.rundir import read_json

PAPER = "[Improving Neuron-level Interpretability with White-box Language Models](https://arxiv.org/abs/2410.16443)"
ARCHITECTURES = {
    "crate": f"a CRATE language model: compression by subspace attention, then sparse coding, of {PAPER}",
    "gpt2": f"a GPT-2, the baseline of {PAPER}",
}


def run_of(model: Path) -> Path | None:
    """The run directory of a model directory; None for a model directory outside of a run."""
    return model.parent if model.name == "model" and (model.parent / "run.json").is_file() else None


def model_card(folder: Path, *, title: str) -> str:
    """The card as Markdown, from a run directory, or from a model directory alone."""
    return "\n".join(line for part in _parts(folder, title) for line in (*part, "")).rstrip() + "\n"


def _parts(folder: Path, title: str) -> Iterator[list[str]]:
    if not (folder / "run.json").exists():
        fields = read_json(folder / "config.json", hint="Put it back")
        kind = fields.get("model_type", "")
        yield from _heading(title, fields.get("arch", kind), stock=kind == "gpt2")
        yield ["Its training is not recorded, and nothing was measured."]
        return
    run = read_json(folder / "run.json", made_by=f"cratelm train --out {folder}")
    config = read_json(folder / "model" / "config.json", hint="Put it back")
    yield from _heading(title, run["arch"], stock=config.get("model_type") == "gpt2")
    yield _sizes(run)
    yield _training(run)
    evaluation = folder / "evaluation.json"
    measured = read_json(evaluation, made_by=f"cratelm evaluate {folder} --data DIR") if evaluation.exists() else {}
    yield ["## Loss", "", *(_loss(measured) or ["Not evaluated."])]
    yield ["## Interpretability of the neurons", "", *_scores(folder)]
    yield ["## Origin", "", *_origin(run.get("origin"))]


def _heading(title: str, arch: str, *, stock: bool) -> Iterator[list[str]]:
    tags = ["cratelm", arch, "interpretability"]
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    yield ["---", *head, "---"]
    yield [f"# {title}", "", f"This is {ARCHITECTURES.get(arch, 'a language model')}. It was made with cratelm."]
    lines = ["import cratelm.huggingface  # pip install 'cratelm[hf]'", ""]
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{title}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
    ]  # fmt: skip
    yield ["```python", *([] if stock else lines), *code, "```"]


def _sizes(run: Mapping[str, Any]) -> list[str]:
    rows = {name.replace("_", " "): value for name, value in run["model"].items() if name != "arch"}
    rows["parameters, without positions"] = f"{run['parameters']:,}"
    rows["FLOPs per token, forward"] = f"{run['flops_per_token']:,}"
    return ["| model | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _training(run: Mapping[str, Any]) -> list[str]:
    if run.get("control") is not None:
        return ["## Training", "", f"None: this is the {run['control']} control of {run['of']}."]
    if run.get("imported"):
        source = [
            f"{name} {value}" for name, value in run["imported"].items() if value is not None and name != "sha256"
        ]
        return ["## Training", "", f"Imported: {', '.join(source)}."]
    training = run.get("training") or {}
    if not training:
        return ["## Training", "", "Its training is not recorded."]
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in training.items()]
    return ["## Training", "", "| | |", "|---|---|", *rows]


def _loss(measured: Mapping[str, Any]) -> list[str]:
    rows = {f"held-out ({measured.get('split')})": measured} if "nats_per_token" in measured else {}
    rows |= measured.get("zero_shot", {})
    table = [
        f"| {name} | {row['nats_per_token']:.4f}{_error(row)} | {_perplexity(row)} | "
        f"{row['bits_per_byte']:.4f} | {row['tokens']:,} |"
        for name, row in rows.items()
    ]
    words = [
        f"Last word of {name}: accuracy {100 * row['last_word']['accuracy']:.2f} %, perplexity "
        f"{_perplexity(row['last_word'])}, over {row['last_word']['passages']:,} passages."
        for name, row in rows.items()
        if "last_word" in row
    ]
    heading = ["| text | nats per token | perplexity | bits per byte | tokens |", "|---|---|---|---|---|"]
    return [*heading, *table, *(["", *words] if words else [])] if table else []


def _error(row: Mapping[str, Any]) -> str:
    """The standard error; empty for a single document."""
    error = row.get("standard_error")
    return f" ± {error:.4f}" if error is not None and math.isfinite(error) else ""


def _perplexity(row: Mapping[str, Any]) -> str:
    value = row.get("perplexity")
    return f"{value:.2f}" if value is not None and math.isfinite(value) else "too large for a number"


def _scores(folder: Path) -> list[str]:
    if not (folder / "interpretation.sqlite").exists():
        return ["Not scored."]
    tables = ReportContents(gather([folder])).tables
    # Notes name commands for missing measurements, which need the run.
    readable = (replace(table, notes=tuple(note.partition(" Run:")[0] for note in table.notes)) for table in tables)
    return [line for table in readable for line in (as_markdown(table).rstrip(), "")]


def _origin(origin: Mapping[str, Any] | None) -> list[str]:
    if origin is None:
        return ["Not known."]
    versions = ", ".join(f"{name} {version}" for name, version in (origin.get("versions") or {}).items())
    known = {name: origin.get(name) or "not known" for name in ("date", "machine", "python", "command")}
    return [f"{known['date']}, {known['machine']}, Python {known['python']}, {versions}: `{known['command']}`"]
