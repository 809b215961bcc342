"""Real transformers on our model directories: a stock GPT-2, and CRATE by its own classes or by the stub."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.documented import code_block
from fixtures.synthetic import make_tokenizer

from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import load_model, save_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-all installs it)")
from cratelm.huggingface import CrateConfig, CrateForCausalLM  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
SIZE: dict[str, Any] = {"num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 384, "context_length": 48}
SWITCHES: list[str] = [name for name in ("rotary", "shifted_keys") if name in ModelConfig.__dataclass_fields__]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("crate", {"penalty": 1.0, "ista_steps": 3}), *[("crate", {name: True}) for name in SWITCHES],
    *[("gpt2", {name: True}) for name in SWITCHES],
]  # fmt: skip
"""Departures from the paper, as far as a `ModelConfig` has them."""
END = "<|endoftext|>"


def make_model(arch: Any, seed: int, **changes: Any) -> LanguageModel:
    """A model with weights large enough that every part matters, biases included."""
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(arch=arch, **SIZE | changes)).initialise(seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


@pytest.fixture
def tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(SIZE["vocab_size"], size=(3, 20)))


@pytest.fixture
def crate(tmp_path: Path, seed: int) -> tuple[LanguageModel, Path]:
    """A CRATE and its directory, tokenizer included."""
    model = make_model("crate", seed)
    save_model(model, tmp_path / "crate", make_tokenizer())
    return model, tmp_path / "crate"


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_our_gpt2_is_a_stock_gpt2(activation: str, bias: bool, tmp_path: Path, seed: int, tokens: torch.Tensor) -> None:
    model = make_model("gpt2", seed, activation=activation, bias=bias)
    save_model(model, tmp_path / "gpt2")
    theirs, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gpt2", output_loading_info=True
    )
    assert type(theirs) is transformers.GPT2LMHeadModel
    assert not any(loading_info.values())
    torch.testing.assert_close(logits_of(theirs, tokens), logits_of(model, tokens), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "gpt2" / "modeling_crate.py").exists()


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_stock_gpt2_is_ours_without_its_zero_biases(
    activation: str, zero: bool, tmp_path: Path, seed: int, tokens: torch.Tensor
) -> None:
    transformers.set_seed(seed)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=4, vocab_size=384, n_positions=48, activation_function=activation
        )
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not (zero and name.endswith(".bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    torch.testing.assert_close(logits_of(model, tokens), logits_of(theirs, tokens), atol=1e-5, rtol=1e-5)
    assert model.config.bias is not zero
    counted = sum(p.numel() for name, p in model.named_parameters() if name != "positions.weight")
    assert counted == model.config.num_parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "silu"}, "must be relu or gelu_new or gelu_pytorch_tanh, got 'silu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx of .* must be False, got True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon of .* must be 1e-05, got 1e-06"),
        ({"n_inner": 50}, "n_inner of .* must be a multiple of n_embd 32, got 50"),
        ({"model_type": "llama"}, "describes a 'llama' model"),
        ({"n_head": None}, "n_head"),
        ({"n_embd": 16}, "do not fit its configuration"),
    ],
)
def test_a_gpt2_that_computes_something_else_is_refused_in_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, seed: int
) -> None:
    save_model(make_model("gpt2", seed), tmp_path / "gpt2")
    (tmp_path / "gpt2" / "checksums.json").unlink()
    path = tmp_path / "gpt2" / "config.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    with pytest.raises(CrateError, match=message) as refusal:
        load_model(tmp_path / "gpt2")
    assert "\n" not in str(refusal.value)


def test_an_untied_head_and_a_damaged_file_are_refused(tmp_path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    for arch in ("crate", "gpt2"):
        save_model(make_model(arch, seed), tmp_path / arch)
        (tmp_path / arch / "checksums.json").unlink()
        path = tmp_path / arch / "model.safetensors"
        state = load_file(path)
        save_file(state | {"lm_head.weight": torch.zeros(384, 32)}, path)
        with pytest.raises(CrateError, match="the head of .* is not its embedding"):
            load_model(tmp_path / arch)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(CrateError, match="is damaged"):
            load_model(tmp_path / arch)
        path.unlink()
        with pytest.raises(CrateError, match=r"no model\.safetensors"):
            load_model(tmp_path / arch)


def test_auto_classes_open_a_crate_directory(crate: tuple[LanguageModel, Path], tokens: torch.Tensor) -> None:
    model, folder = crate
    config = transformers.AutoConfig.from_pretrained(folder)
    assert isinstance(config, CrateConfig)
    assert config.model_config() == model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 2, 128)
    theirs, loading_info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is CrateForCausalLM
    assert not any(loading_info.values())
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(theirs, tokens), logits_of(model, tokens), atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the neuron").input_ids == make_tokenizer().encode("the neuron").ids
    assert (tokenizer.eos_token, tokenizer.model_max_length) == (END, 48)


def test_a_variant_of_either_architecture_is_of_our_type_and_keeps_its_fields(
    tmp_path: Path, seed: int, tokens: torch.Tensor
) -> None:
    for arch, change in VARIANTS:
        model = make_model(arch, seed, **change)
        save_model(model, tmp_path / "variant")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "variant")
        assert type(theirs) is CrateForCausalLM
        assert theirs.config.model_config() == model.config
        torch.testing.assert_close(logits_of(theirs, tokens), logits_of(model, tokens), atol=1e-5, rtol=1e-5)
        assert load_model(tmp_path / "variant").config == model.config


def test_saved_by_transformers_it_is_read_by_both(tmp_path: Path, seed: int) -> None:
    model = make_model("crate", seed, penalty=0.7, ista_steps=3)
    save_model(model, tmp_path / "first")
    theirs = CrateForCausalLM.from_pretrained(tmp_path / "first")
    theirs.save_pretrained(tmp_path / "second", max_shard_size="30KB")
    assert len(list((tmp_path / "second").glob("model-*.safetensors"))) > 1
    again = load_model(tmp_path / "second")
    assert again.config == model.config
    third = CrateForCausalLM.from_pretrained(tmp_path / "second").model
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
        assert torch.equal(third.state_dict()[name], weight)


def test_the_loss_counts_the_labels_that_are_not_masked(
    crate: tuple[LanguageModel, Path], tokens: torch.Tensor
) -> None:
    model, folder = crate
    theirs = CrateForCausalLM.from_pretrained(folder)
    labels = tokens.clone()
    labels[1, 5:] = -100
    logits = logits_of(model, tokens)
    log_p = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    expected = -log_p[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(theirs(tokens, labels=labels).loss, expected)


def test_padding_at_either_end_changes_nothing(crate: tuple[LanguageModel, Path], rng: np.random.Generator) -> None:
    model, folder = crate
    theirs = CrateForCausalLM.from_pretrained(folder)
    rows = [torch.from_numpy(rng.integers(384, size=int(rng.integers(3, 12)))) for _ in range(4)]
    for side in ("left", "right"):
        padded = torch.zeros(4, 12, dtype=torch.long)
        mask = torch.zeros(4, 12, dtype=torch.long)
        for row, ids in enumerate(rows):
            where = slice(12 - len(ids), 12) if side == "left" else slice(0, len(ids))
            padded[row, where], mask[row, where] = ids, 1
        with torch.no_grad():
            output = theirs(padded, attention_mask=mask, output_hidden_states=True)
        for row, ids in enumerate(rows):
            alone = logits_of(model, ids[None])[0]
            torch.testing.assert_close(output.logits[row][mask[row].bool()], alone, atol=1e-5, rtol=1e-5)
        assert len(output.hidden_states) == 3
        head = torch.nn.functional.linear(output.hidden_states[-1], theirs.lm_head.weight)
        torch.testing.assert_close(head, output.logits)
    with pytest.raises(CrateError, match="got masked tokens inside"):
        theirs(padded, attention_mask=torch.tensor([[1] * 5 + [0] * 2 + [1] * 5] * 4))


def test_generate_and_pipeline_continue_as_the_model_does(crate: tuple[LanguageModel, Path]) -> None:
    model, folder = crate
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["the neuron", "def read of a layer and then"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    made = theirs.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        alone = model.generate(ids, 6, temperature=0.0)[0]
        assert made[row, -len(alone) :].tolist() == alone.tolist()
    write = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    text = write(prompts[0], max_new_tokens=6, do_sample=False, eos_token_id=None)[0]["generated_text"]
    assert text == tokenizer.decode(
        model.generate(torch.tensor([tokenizer(prompts[0]).input_ids]), 6, temperature=0.0)[0]
    )


def test_the_documented_code_runs(
    crate: tuple[LanguageModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(
        str(code_block("ecosystem.md", "Load a model with transformers", tmp_path / "it.py", model=crate[1]))
    )
    assert "def read_file(" in capsys.readouterr().out


def test_fresh_weights_are_drawn_as_ours() -> None:
    config = CrateConfig(**SIZE | {"d_model": 64, "vocab_size": 5000})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    block = model.model.blocks[0]
    assert block.ista.atoms.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert block.mssa.output.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert model.model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.weight is model.model.embedding.weight
    torch.manual_seed(3)
    again = transformers.AutoModelForCausalLM.from_config(config)
    assert torch.equal(again.model.blocks[1].ista.atoms, model.model.blocks[1].ista.atoms)


def test_trainer_takes_a_step_and_resumes(crate: tuple[LanguageModel, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (make test-all installs it)")
    _, folder = crate
    rows = [{"input_ids": list(range(i, i + 16)), "labels": list(range(i, i + 16))} for i in range(8)]

    def train(steps: int, resume: bool) -> Any:
        model = CrateForCausalLM.from_pretrained(folder)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
            report_to=[], save_steps=1, use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume or None)
        return model

    before = load_model(folder).state_dict()
    once = train(1, False).model.state_dict()
    assert all(not torch.equal(once[name], before[name]) for name in before if "positions" not in name)
    saved = load_model(tmp_path / "out" / "checkpoint-1").state_dict()
    assert all(torch.equal(saved[name], once[name]) for name in saved)
    straight = train(2, False).model.state_dict()
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "away")
    resumed = train(2, True).model.state_dict()
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight)


def test_a_larger_vocabulary_and_low_precision_work(crate: tuple[LanguageModel, Path], tmp_path: Path) -> None:
    _, folder = crate
    model = CrateForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.resize_token_embeddings(400)
    assert model(torch.tensor([[399]])).logits.shape == (1, 1, 400)
    model.save_pretrained(tmp_path / "grown")
    assert load_model(tmp_path / "grown").config.vocab_size == 400


def test_inputs_it_cannot_take_are_refused(crate: tuple[LanguageModel, Path]) -> None:
    model = CrateForCausalLM.from_pretrained(crate[1])
    with pytest.raises(CrateError, match="longer than the model's context"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(CrateError, match="without inputs_embeds"):
        model(torch.zeros(1, 4, dtype=torch.long), inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(CrateError, match="num_heads"):
        CrateConfig(**SIZE | {"num_heads": 5})


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_stub_opens_a_directory_where_nothing_imported_cratelm(crate: tuple[LanguageModel, Path]) -> None:
    model, folder = crate
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "cratelm" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
model.save_pretrained({str(folder / "again")!r})
ids = tokenizer("the neuron", return_tensors="pt").input_ids
print(type(model).__module__, ids.tolist(), round(model(ids).logits.double().sum().item(), 3), sep=";")
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    module, ids, total = result.stdout.strip().split(";")
    assert module == "cratelm.huggingface"
    expected = logits_of(model, torch.tensor(json.loads(ids))).double().sum().item()
    assert float(total) == pytest.approx(expected, abs=0.01)
    assert (folder / "again" / "modeling_crate.py").read_text() == (folder / "modeling_crate.py").read_text()
    assert not (folder / "again" / "huggingface.py").exists()


def test_without_transformers_one_line_names_the_extra() -> None:
    result = python("import sys; sys.modules['transformers'] = None\nimport cratelm.huggingface")
    assert "CrateError: cratelm.huggingface needs transformers. Hint: pip install 'cratelm[hf]'" in result.stderr
