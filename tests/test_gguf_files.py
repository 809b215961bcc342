"""GGUF files: converted once, equal to the model they were written from, and refused in one line if unusable."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra gguf)")
pytest.importorskip("accelerate", reason="accelerate is not installed (extra gguf)")
pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")

import torch
from fakes.language_models import CHAT_TEMPLATE
from fixtures.gguf_models import write_gguf
from fixtures.hugging_face import build
from fixtures.tiny import make_tokens

from cratelm import gguf_files
from cratelm.activations.foreign import load_foreign
from cratelm.commands import collect, import_
from cratelm.data.tokenizer import load_tokenizer
from cratelm.data.tokens import tokenize
from cratelm.errors import CrateError
from cratelm.gguf_files import llama_3_factors, model_directory, quantization
from cratelm.local_llm import LocalLLM
from cratelm.workflows.llm.opening import basename
from cratelm.workflows.opening import open_model

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
Write = Callable[..., tuple[Path, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cratelm" / "gguf"


@pytest.fixture
def write(tmp_path: Path, rng: np.random.Generator) -> Write:
    """Writes a Llama as `small.gguf`; returns the file and the model."""
    tokenizer = make_tokens(tmp_path / "tokens", np.random.default_rng(0), documents=30).tokenizer()

    def write(kind: str = "F32", *, family: str = "llama", **options: Any) -> tuple[Path, Any]:
        settings = WIDE if family == "llama" else {"n_embd": 64, "n_inner": 256, "n_positions": 1024}
        model = build(family, rng, vocab=tokenizer.get_vocab_size(), tie_word_embeddings=True, **settings)
        return write_gguf(tmp_path / "small.gguf", model, tokenizer, kind=kind, **options), model

    return write


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 30)[None]).logits.float()


def refusal(file: Path) -> str:
    with pytest.raises(CrateError) as refused:
        model_directory(file)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_converted_model_computes_what_the_written_model_computes(write: Write) -> None:
    file, model = write()
    torch.testing.assert_close(logits(load_foreign(file).model), logits(model), rtol=1e-5, atol=1e-5)


def test_a_quantised_model_is_close_and_stored_as_bfloat16(write: Write) -> None:
    file, model = write("Q8_0")
    foreign = load_foreign(file)
    assert torch.corrcoef(torch.stack([logits(foreign.model).flatten(), logits(model).flatten()]))[0, 1] > 0.995
    assert json.loads((model_directory(file) / "config.json").read_text())["dtype"] == "bfloat16"
    assert foreign.quantization == quantization(model_directory(file)) == "Q8_0"


def test_tokenizer_and_chat_template_come_from_the_file(write: Write, tmp_path: Path) -> None:
    file, _ = write(template=CHAT_TEMPLATE)
    written = make_tokens(tmp_path / "again", np.random.default_rng(0), documents=30).tokenizer()
    text = "some words, 1234 and more<|endoftext|>\n\tthe end"
    assert load_tokenizer(str(file)).encode(text).ids == load_tokenizer(file).encode(text).ids
    assert load_tokenizer(file).encode(text).ids == written.encode(text).ids
    llm = LocalLLM.open(file, device="cpu")
    assert llm.tokenizer.chat_template == CHAT_TEMPLATE
    assert llm._ends == {0}
    settings = json.loads((model_directory(file) / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False


def test_a_file_is_converted_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = write()
    folder = model_directory(file)
    monkeypatch.setattr(gguf_files, "_convert", None)
    assert model_directory(file) == folder


def test_a_file_that_changed_is_converted_again(write: Write) -> None:
    file, first = write()
    before = model_directory(file)
    file, second = write()
    assert model_directory(file) != before
    torch.testing.assert_close(logits(load_foreign(file).model), logits(second), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(first), logits(second))


def test_a_damaged_conversion_is_made_again(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file, model = write()
    weights = model_directory(file) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    torch.testing.assert_close(logits(load_foreign(file).model), logits(model), rtol=1e-5, atol=1e-5)
    assert "is converted again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "checksums.json"])
def test_a_conversion_that_lacks_a_file_is_made_again(name: str, write: Write) -> None:
    file, _ = write()
    missing = model_directory(file) / name
    missing.unlink()
    assert model_directory(file) == missing.parent
    assert missing.is_file()


def test_a_conversion_by_another_version_is_made_again(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = write()
    folder = model_directory(file)
    monkeypatch.setattr(gguf_files, "CONVERSION", 2)
    model_directory(file)
    assert json.loads((folder / "gguf.json").read_text())["conversion"] == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "version 2 of the conversion, got 1. The GGUF file is converted again" in message


def test_a_gguf_json_of_another_program_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "gguf.json").write_text('{"other": 1}')
    assert quantization(tmp_path) is None
    (tmp_path / "gguf.json").write_text('{"quantization": [4]}')
    with pytest.raises(CrateError, match=r"gguf.json: quantization must be a text, got \[4\]. Remove \S+gguf.json$"):
        quantization(tmp_path)


def test_a_conversion_that_was_killed_leaves_nothing_that_is_used(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, model = write()
    if (process := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            monkeypatch.setattr(gguf_files, "_complete_settings", lambda *_: os._exit(9))
            model_directory(file)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert list(cache.glob(".*.tmp/*/model.safetensors"))
    torch.testing.assert_close(logits(load_foreign(file).model), logits(model), rtol=1e-5, atol=1e-5)
    assert not list(cache.glob(".*.tmp"))


def test_the_quantisation_is_named_in_the_identity_and_in_the_records(write: Write, tmp_path: Path) -> None:
    file, _ = write("Q8_0")
    llm = LocalLLM.open(file, device="cpu")
    assert llm.identity.endswith(" Q8_0")
    assert llm.name == basename(str(file)) == open_model(file, "cpu").name == "small"
    data, run = tmp_path / "data", tmp_path / "run"
    make_tokens(tmp_path / "texts", np.random.default_rng(2), documents=120)
    tokenize([str(tmp_path / "texts.jsonl")], data, str(file), held_out=0.8)
    collect.run(collect.Options(runs=(file,), data=data, out=run, context=128, device="cpu", force=True))
    records, described = (json.loads((run / name).read_text()) for name in ("records/fixed/records.json", "run.json"))
    assert records["quantization"] == described["quantization"] == "Q8_0"
    assert described["source"] == str(file)
    assert open_model(run, "cpu").model_hash == load_foreign(file).model_hash == records["model_hash"]
    collect.run(collect.Options(runs=(run,), data=data, context=128, device="cpu"))  # there already


def test_a_gpt2_file_can_be_imported(write: Write, tmp_path: Path) -> None:
    file, model = write(family="gpt2")
    import_.run(import_.Options(checkpoint=str(file), out=tmp_path / "run"))
    imported = open_model(tmp_path / "run", "cpu")
    tokens = torch.arange(1, 30)[None]
    torch.testing.assert_close(imported.causal.logits(tokens), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_a_file_that_was_cut_is_refused(share: float, write: Write) -> None:
    content = (file := write("Q8_0")[0]).read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "fetch it again" in refusal(file)


def test_damaged_bytes_are_refused_in_one_line_or_give_a_model(write: Write, rng: np.random.Generator) -> None:
    content = (file := write()[0]).read_bytes()
    for _ in range(8):
        damaged = bytearray(content)
        for place in rng.integers(4, 2000, size=3):
            damaged[place] = int(rng.integers(256))
        file.write_bytes(damaged)
        message = ""
        try:
            assert (model_directory(file) / "model.safetensors").is_file()
        except CrateError as error:
            message = str(error)
        assert "\n" not in message


def test_unusable_files_are_named_in_one_line(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    assert "does not exist" in refusal(other)
    other.write_text("hello, world")
    assert "must be a GGUF file, got a file that begins with b'hell'" in refusal(other)
    assert "(lama: " in refusal(write(architecture="lama")[0])
    assert "lacks weights" in refusal(write(leave_out=("blk.1.ffn_up.weight",))[0])
    assert "model.layers.1.mlp.up_proj.weight" in refusal(write(leave_out=("blk.1.ffn_up.weight",))[0])
    factors = np.linspace(1, 3, 16, dtype=np.float32)
    assert "rope factors" in refusal(write(more={"rope_freqs.weight": factors})[0])
    assert "rope scaling" in refusal(write(more={"rope_factors_long.weight": factors})[0])
    file, _ = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'cratelm[gguf]'" in refusal(file)


def test_the_rope_factors_of_llama_3_become_its_settings(write: Write) -> None:
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    file, model = write(more={"rope_freqs.weight": np.array(llama_3_factors(10000.0, 32, scaling), dtype=np.float32)})
    transformers = pytest.importorskip("transformers")
    model.config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "llama3", **scaling}
    expected = transformers.LlamaForCausalLM(model.config).eval()
    expected.load_state_dict(model.state_dict())
    converted: Any = load_foreign(file).model
    torch.testing.assert_close(converted.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    assert not torch.allclose(converted.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(logits(converted), logits(expected), rtol=1e-5, atol=1e-5)
