"""TransformerLens on our model directories: the same logits, the same codes, the same edits."""

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

import cratelm
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import save_model

pytest.importorskip("transformer_lens", reason="transformer-lens is not installed (make test-all installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")

SWITCHES: list[str] = [name for name in ("rotary", "shifted_keys") if name in ModelConfig.__dataclass_fields__]


def make_model(folder: Path, rng: np.random.Generator, arch: Any, **changes: Any) -> LanguageModel:
    """A model, and its directory."""
    size = {"num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 384, "context_length": 48}
    model = LanguageModel(ModelConfig(arch=arch, **size | changes)).initialise(int(rng.integers(2**31))).eval()
    save_model(model, folder, make_tokenizer())
    return model


def boot(folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    import cratelm.lens  # noqa: F401

    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def test_logits_codes_and_the_residual_stream_are_those_of_the_model(tmp_path: Path, rng: np.random.Generator) -> None:
    tokens = torch.from_numpy(rng.integers(384, size=(2, 20)))
    kinds: list[tuple[str, dict[str, Any]]] = [("crate", {})]
    kinds += [(arch, {switch: True}) for arch in ("crate", "gpt2") for switch in SWITCHES]
    for arch, changes in kinds:
        model = make_model(tmp_path / arch, rng, arch, **changes)
        logits, cache = boot(tmp_path / arch).run_with_cache(tokens)
        blocks = [f"blocks.{layer}" for layer in range(2)]
        with cratelm.capture(model, (*model.neuron_taps, *blocks)) as seen, torch.no_grad():
            torch.testing.assert_close(logits, model(tokens), atol=1e-5, rtol=1e-5)
        for layer, tap in enumerate(model.neuron_taps):
            torch.testing.assert_close(cache[f"blocks.{layer}.mlp.hook_post"], seen[tap], atol=1e-5, rtol=1e-5)
            post = cache[f"blocks.{layer}.hook_resid_post"]
            torch.testing.assert_close(post, seen[f"blocks.{layer}"], atol=1e-5, rtol=1e-5)
            if arch == "crate":
                assert torch.equal(cache[f"blocks.{layer}.hook_mlp_out"], post)
            middle = cache[f"blocks.{layer}.hook_resid_pre"] + cache[f"blocks.{layer}.hook_attn_out"]
            torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_mid"], middle, atol=1e-5, rtol=1e-5)


def test_a_hook_on_the_neurons_edits_as_ours_does(tmp_path: Path, rng: np.random.Generator) -> None:
    model = make_model(tmp_path / "crate", rng, "crate")
    tokens = torch.from_numpy(rng.integers(384, size=(2, 20)))

    def turn(code: torch.Tensor, **_: Any) -> torch.Tensor:
        changed = code.clone()
        changed[..., 7] = 3.0
        return changed

    bridge = boot(tmp_path / "crate")
    with torch.no_grad():
        turned = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_post", turn)])
        with cratelm.edit(model, {model.neuron_taps[0]: turn}):
            expected = model(tokens)
        torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(turned, bridge(tokens), atol=1e-3)
        assert torch.equal(bridge(tokens), bridge(tokens))


def test_generation_continues_as_the_model_does(tmp_path: Path, rng: np.random.Generator) -> None:
    model = make_model(tmp_path / "crate", rng, "crate")
    ids = torch.tensor([make_tokenizer().encode("the neuron").ids])
    bridge = boot(tmp_path / "crate")
    made = bridge.generate(ids, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, prepend_bos=False)
    assert made[0].tolist() == model.generate(ids, 5, temperature=0.0)[0].tolist()


def test_a_gpt2_directory_opens_without_us(tmp_path: Path, rng: np.random.Generator) -> None:
    model = make_model(tmp_path / "gpt2", rng, "gpt2")
    code = f"""
import sys, torch
from transformer_lens.model_bridge import TransformerBridge
model = TransformerBridge.boot_transformers({str(tmp_path / "gpt2")!r}, device="cpu")
logits, cache = model.run_with_cache(torch.arange(20)[None])
assert "cratelm" not in sys.modules
print(logits.double().sum().item(), cache["blocks.1.mlp.hook_post"].double().sum().item())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with cratelm.capture(model, model.neuron_taps) as codes, torch.no_grad():
        expected = model(torch.arange(20)[None]).double().sum().item()
    measured = [float(number) for number in result.stdout.split()[-2:]]
    assert measured == pytest.approx([expected, codes[model.neuron_taps[1]].double().sum().item()], abs=1e-2)


def test_sae_lens_boots_the_same_way(tmp_path: Path, rng: np.random.Generator) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (make test-all installs it)")
    import cratelm.lens

    model = make_model(tmp_path / "crate", rng, "crate")
    bridge = sae_lens.SAETransformerBridge.boot_transformers(str(tmp_path / "crate"), device="cpu")
    tokens = torch.from_numpy(rng.integers(384, size=(1, 12)))
    _, cache = bridge.run_with_cache(tokens, names_filter=["blocks.1.mlp.neurons.hook_out"])
    with cratelm.capture(model, model.neuron_taps) as codes, torch.no_grad():
        model(tokens)
    result = cache["blocks.1.mlp.neurons.hook_out"]
    torch.testing.assert_close(result, codes[model.neuron_taps[1]], atol=1e-5, rtol=1e-5)


def test_the_documented_code_runs(tmp_path: Path, rng: np.random.Generator) -> None:
    make_model(tmp_path / "crate", rng, "crate")
    script = code_block(
        "ecosystem.md", "Open a model in TransformerLens or sae-lens", tmp_path / "it.py", model=tmp_path / "crate"
    )
    assert runpy.run_path(str(script))["code"].shape[-1] == 128


def test_without_transformer_lens_one_line_names_the_extra() -> None:
    code = "import sys; sys.modules['transformer_lens'] = None\nimport cratelm.lens"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CrateError: cratelm.lens needs TransformerLens. Hint: pip install 'cratelm[lens]'" in result.stderr
