"""Checkpoints of the released code: the same logits and codes as a naive reading of its description, and back."""

import io
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import released
from fixtures.synthetic import make_tokenizer

import cratelm
from cratelm import cli
from cratelm.data.tokenizer import vocabulary_size
from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.official import read_official, write_official
from cratelm.rundir import read_json

SIZE: dict[str, Any] = {"layers": 2, "width": 32, "vocab": 99, "context": 24}
HEADS = 4
CAN_BE_COMPLETE = "dictionary" in ModelConfig.__dataclass_fields__


def save(content: Any, path: Path, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(model: LanguageModel, tokens: torch.Tensor, expected: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    with cratelm.capture(model, model.neuron_taps) as codes, torch.no_grad():
        logits = model(tokens)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-5)
    for tap, code in zip(model.neuron_taps, expected[1], strict=True):
        torch.testing.assert_close(codes[tap], code, atol=1e-5, rtol=1e-5)
    assert all(code.gt(0).any() for code in expected[1])


@pytest.fixture
def tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(SIZE["vocab"], size=(3, SIZE["context"])))


def test_a_released_crate_gives_the_same_logits_and_codes(
    tmp_path: Path, rng: np.random.Generator, tokens: torch.Tensor
) -> None:
    state = released.crate_state(rng, **SIZE)
    model, message = read_official(save(released.checkpoint(state, heads=HEADS), tmp_path / "ckpt.pt"))
    assert_same(model, tokens, released.crate(state, tokens, HEADS))
    assert message.iter_num == 600000
    assert message.best_val_loss == pytest.approx(2.27)
    assert model.config == ModelConfig(
        arch="crate", num_layers=2, d_model=32, num_heads=4, vocab_size=99, context_length=24
    )


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_released_gpt_gives_the_same_logits_and_activations(
    bias: bool, gelu: bool, tmp_path: Path, rng: np.random.Generator, tokens: torch.Tensor
) -> None:
    state = released.gpt_state(rng, **SIZE, bias=bias)
    path = save(released.checkpoint(state, heads=HEADS, bias=bias), tmp_path / "ckpt.pt")
    model, _ = read_official(path, activation="gelu" if gelu else "relu")
    assert_same(model, tokens, released.gpt(state, tokens, HEADS, gelu=gelu))
    assert model.config.bias == bias


def test_a_complete_dictionary_gives_the_same_logits_and_codes_or_is_refused(
    tmp_path: Path, rng: np.random.Generator, tokens: torch.Tensor
) -> None:
    state = released.crate_state(rng, **SIZE, complete=True)
    path = save(released.checkpoint(state, heads=HEADS), tmp_path / "ckpt.pt")
    if CAN_BE_COMPLETE:
        assert_same(read_official(path)[0], tokens, released.crate(state, tokens, HEADS))
    else:
        with pytest.raises(CrateError, match="complete dictionary"):
            read_official(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_prefixes_and_mask_buffers_are_gone_past(
    zipped: bool, tmp_path: Path, rng: np.random.Generator, tokens: torch.Tensor
) -> None:
    state = released.crate_state(rng, **SIZE)
    content = released.checkpoint(state, heads=HEADS)
    content["model"] = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    content["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    model, _ = read_official(save(content, tmp_path / "ckpt.pt", zipped=zipped))
    assert_same(model, tokens, released.crate(state, tokens, HEADS))


@pytest.mark.parametrize("kind", ["crate", "complete", "gpt", "gpt with biases"])
def test_what_was_read_is_written_back_bit_for_bit(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    if kind == "complete" and not CAN_BE_COMPLETE:
        return
    if kind.startswith("gpt"):
        state = released.gpt_state(rng, **SIZE, bias="biases" in kind)
    else:
        state = released.crate_state(rng, **SIZE, complete=kind == "complete")
    model, message = read_official(save(released.checkpoint(state, heads=HEADS), tmp_path / "ckpt.pt"))
    write_official(model, tmp_path / "again.pt", message)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again["model"].keys() == state.keys()
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in state.items())
    assert again["model"]["lm_head.weight"].data_ptr() == again["model"]["transformer.wte.weight"].data_ptr()
    expected = released.checkpoint(state, heads=HEADS, bias="biases" in kind)
    assert again["model_args"] == expected["model_args"]
    assert again.keys() == expected.keys()
    assert again["iter_num"] == 600000


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo code was run",)


def test_pickled_code_is_refused_and_not_run(
    tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    content = released.checkpoint(released.crate_state(rng, **SIZE), heads=HEADS, config=_Code())
    path = save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CrateError, match=r"holds pickled code \((posix|nt)\.system\) and is refused") as refusal:
        read_official(path)
    assert "\n" not in str(refusal.value)
    assert "code was run" not in capfd.readouterr().out


def _without(name: str) -> Any:
    return lambda content: content["model"].pop(name)


def _shaped(name: str, *shape: int) -> Any:
    return lambda content: content["model"].update({name: torch.zeros(*shape)})


def _argument(name: str, value: Any) -> Any:
    return lambda content: content["model_args"].update({name: value})


def _tensor(value: torch.Tensor, name: str = "prenorm_1") -> Any:
    return lambda content: content["model"].update({f"transformer.h.0.{name}.weight": value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_shaped("lm_head.weight", 99, 32), "two different copies of the tied head"),
        (
            _shaped("transformer.h.1.attn.c_attn.weight", 96, 32),
            r"transformer\.h\.1\.attn\.c_attn\.weight is \(96, 32\)",
        ),
        (_without("transformer.h.0.prenorm_1.bias"), r"transformer\.h\.0\.prenorm_1\.bias is missing"),
        (_shaped("transformer.h.0.surprise", 3), r"transformer\.h\.0\.surprise is \(3,\), expected nothing"),
        (_shaped("transformer.h.0.ista.weight", 100, 32), "not a multiple of the width 32"),
        (_without("transformer.ln_f.weight"), "no ln_f"),
        (_without("transformer.h.0.ista.weight"), "neither a CRATE nor a GPT-2"),
        (_without("transformer.wpe.weight"), "no table transformer.wpe.weight"),
        (_argument("n_embd", 64), "n_embd 64, weights 32"),
        (_argument("n_head", None), "how many heads"),
        (_argument("n_head", 5), "must be a multiple of num_heads 5"),
        (lambda content: content.pop("model_args"), "no model and model_args"),
        (lambda content: content["model"].update({"transformer.wte.weight": "no tensor"}), "has a str under"),
        (_tensor(torch.zeros(32, dtype=torch.int64)), "holds int64, not floating-point"),
        (_tensor(torch.zeros(32, dtype=torch.complex64)), "holds complex64, not floating-point"),
        (
            _tensor(torch.tensor([math.nan, math.inf] + [0.0] * 30)),
            r"prenorm_1\.weight of .* has 2 numbers that are inf",
        ),
        (_tensor(torch.zeros(32).to_sparse()), "is sparse"),
        (_tensor(torch.zeros(32, device="meta")), "a meta tensor"),
        (_tensor(torch.tensor(1.0), "ista"), r"ista\.weight has shape \(\)"),
        (_shaped("transformer.wte.weight", 99, 0), "no table transformer.wte.weight"),
        (lambda content: content["model"].update({3: torch.zeros(2)}), "a weight under 3,"),
        (_argument("n_layer", torch.tensor([2, 3])), "n_layer in model_args of .* must be a number, got a Tensor"),
        (_argument("n_head", torch.tensor(4)), "n_head in model_args of .* must be a number, got a Tensor"),
        (lambda content: content.update(iter_num=math.nan), "must be a number of steps, got nan"),
        (
            lambda content: content.update(iter_num=torch.zeros(2)),
            r"single number, got a tensor of shape \(2,\)",
        ),
        (lambda content: content.update(best_val_loss=torch.zeros(3)), r"best_val_loss of .* shape \(3,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_gets_one_line(
    damage: Any, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    content = released.checkpoint(released.crate_state(rng, **SIZE), heads=HEADS)
    damage(content)
    with pytest.raises(CrateError, match=message) as refusal:
        read_official(save(content, tmp_path / "ckpt.pt"))
    assert "\n" not in str(refusal.value)
    assert "ckpt.pt" in str(refusal.value) or "n_head" in str(damage) or "num_heads" in str(refusal.value)


def test_damaged_and_foreign_files_get_one_line(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = io.BytesIO()
    torch.save(released.checkpoint(released.crate_state(rng, **SIZE), heads=HEADS), whole)
    files = {
        "half.pt": whole.getvalue()[: len(whole.getvalue()) // 2], "empty.pt": b"", "text.pt": b"no checkpoint",
        "list.pt": pickle.dumps([1, 2]),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "missing.pt", "."):
        with pytest.raises(CrateError) as refusal:
            read_official(tmp_path / name)
        assert "\n" not in str(refusal.value), name
        assert str(tmp_path) in str(refusal.value)


def test_a_model_that_the_released_code_does_not_know_is_not_written(tmp_path: Path) -> None:
    config = ModelConfig(
        arch="crate", num_layers=1, d_model=8, num_heads=2, vocab_size=9, context_length=4, penalty=1.0
    )
    with pytest.raises(CrateError, match=r"cannot express this model \(penalty 1\.0\)"):
        write_official(LanguageModel(config).initialise(0), tmp_path / "ckpt.pt")
    assert not (tmp_path / "ckpt.pt").exists()


def test_import_and_export_are_commands(tmp_path: Path, rng: np.random.Generator, tokens: torch.Tensor) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    state = released.crate_state(rng, **SIZE | {"vocab": vocabulary_size(tokenizer) + 3})
    path = save(released.checkpoint(state, heads=HEADS), tmp_path / "ckpt.pt")
    run = tmp_path / "run"
    assert cli.main(["import", str(path), "--out", str(run), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    described = read_json(run / "run.json", made_by="")
    assert described["imported"]["steps"] == 600000
    assert len(described["imported"]["sha256"]) == 64
    model, loaded = cratelm.load(run)
    assert loaded is not None
    assert loaded.to_str() == tokenizer.to_str()
    assert_same(model, tokens, released.crate(state, tokens, HEADS))
    assert cli.main(["export", str(run), "--format", "official", "--out", str(tmp_path / "again.pt")]) == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in state.items())
    assert again["best_val_loss"] == pytest.approx(2.27)
    assert cli.main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "hf").iterdir()
    }
    assert cli.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "second")]) == 0
    assert_same(cratelm.load(tmp_path / "second")[0], tokens, released.crate(state, tokens, HEADS))


def test_a_foreign_vocabulary_brings_no_tokenizer_and_only_text_refuses(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(released.checkpoint(released.crate_state(rng, **SIZE), heads=HEADS), tmp_path / "ckpt.pt")
    assert cli.main(["import", str(path), "--out", str(tmp_path / "run")]) == 0
    assert cratelm.load(tmp_path / "run")[1] is None
    capsys.readouterr()
    assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "text"]) == 2
    assert "must have a tokenizer.json, got none" in capsys.readouterr().err
    tokenizer = make_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"the neuron {i} " * 40}) + "\n" for i in range(30))
    )
    told = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--held-out", "0.5", "--out", str(tmp_path / "tokens")]
    assert cli.main(["tokenize", str(tmp_path / "text.jsonl"), *told]) == 0
    for command, message in (("collect", "has no tokenizer.json"), ("evaluate", "at most the 99 tokens")):
        capsys.readouterr()
        assert cli.main([command, str(tmp_path / "run"), "--data", str(tmp_path / "tokens")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert cli.main(["export", str(tmp_path / "run"), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0


def test_the_gpt2_vocabulary_brings_the_gpt2_tokenizer(
    tmp_path: Path, rng: np.random.Generator, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cratelm.data import tokenizer as module

    state = released.gpt_state(rng, layers=1, width=8, vocab=50304, context=8, bias=False)
    path = save(released.checkpoint(state, heads=2), tmp_path / "ckpt.pt")
    monkeypatch.setattr(module, "_fetched", lambda name: real_data / "gpt2" if name == "gpt2" else None)
    assert cli.main(["import", str(path), "--out", str(tmp_path / "run")]) == 0
    loaded = cratelm.load(tmp_path / "run")[1]
    assert loaded is not None
    assert loaded.encode("white-box").ids == module.gpt2_bpe(real_data / "gpt2").encode("white-box").ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "{tmp}/nothing.pt", "--out", "{tmp}/new"], "does not exist. Hint: give a checkpoint"),
        (["import", "{ckpt}", "--out", "{tmp}/new", "--tokenizer", "{tokenizer}"], "the tokenizer must have at most"),
        (["import", "{run}/model/model.safetensors", "--out", "{tmp}/new"], "give its folder"),
        (["export", "{run}"], "--out must be a path (or use --push NAME), got none"),
        (["export", "{run}", "--out", "{run}"], "--out must not exist, got"),
        (["export", "{run}", "--format", "official", "--push", "me/model"], "--push needs --format hf, got official"),
    ],
)
def test_a_wrong_import_or_export_gets_one_line(
    arguments: list[str], message: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = save(released.checkpoint(released.crate_state(rng, **SIZE), heads=HEADS), tmp_path / "ckpt.pt")
    assert cli.main(["import", str(ckpt), "--out", str(tmp_path / "run")]) == 0
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    names = {"ckpt": ckpt, "run": tmp_path / "run", "tmp": tmp_path, "tokenizer": tmp_path / "tokenizer.json"}
    capsys.readouterr()
    assert cli.main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
