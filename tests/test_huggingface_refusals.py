"""What transformers can ask of a CRATE and does not get, refused in our words; and `AutoModel`, without the head."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-all installs it)")
from test_huggingface import SIZE, make_model  # noqa: E402

from cratelm.errors import CrateError  # noqa: E402
from cratelm.huggingface import CrateForCausalLM, CrateModel  # noqa: E402
from cratelm.model.weights import save_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    save_model(make_model("crate", int(rng.integers(2**31))), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def theirs(folder: Path) -> CrateForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(SIZE["vocab_size"], size=(3, 20)))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_that_outgrows_the_context_gets_one_line(
    use_cache: bool, theirs: CrateForCausalLM, tokens: torch.Tensor
) -> None:
    context, options = SIZE["context_length"], GREEDY | {"use_cache": use_cache}
    mask = torch.ones_like(tokens)  # else one is guessed from tokens that happen to be the padding
    theirs.generate(tokens, attention_mask=mask, max_new_tokens=context - 20 + 1, **options)
    with pytest.raises(CrateError, match=f"{context + 1} tokens is longer than the model's context of {context}"):
        theirs.generate(tokens, attention_mask=mask, max_new_tokens=context - 20 + 2, **options)


@pytest.mark.parametrize("place", ["option", "config", "positional", "own"])
@pytest.mark.parametrize("name", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding_is_refused(name: str, place: str, theirs: CrateForCausalLM, tokens: torch.Tensor) -> None:
    if name == "assistant_model":
        options: dict[str, Any] = {"assistant_model": theirs}
        more: tuple[Any, ...] = ()
    else:
        config = transformers.GenerationConfig(prompt_lookup_num_tokens=3)
        options = {"option": {"prompt_lookup_num_tokens": 3}, "config": {"generation_config": config}}.get(place, {})
        more = (config,) if place == "positional" else ()
        if place == "own":
            theirs.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(CrateError, match=f"{name} must be left out for CRATE: assisted decoding"):
        theirs.generate(tokens[:1], *more, max_new_tokens=2, **options)


def test_position_ids_are_taken_where_they_are_the_own_ones_and_refused_elsewhere(
    theirs: CrateForCausalLM, folder: Path, tokens: torch.Tensor
) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    own = (mask.cumsum(1) - 1).clamp_min(0)
    bare = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask).logits
        torch.testing.assert_close(theirs(tokens, attention_mask=mask, position_ids=own).logits, expected)
        theirs(tokens, position_ids=torch.arange(20)[None])
        packed = torch.cat([torch.arange(12), torch.arange(8)])[None]
        for model in (theirs, bare):
            for wrong in (packed, packed.expand(3, -1), torch.arange(1, 21)[None], torch.arange(19)[None], own):
                with pytest.raises(CrateError, match="position_ids of a CRATE must match the attention_mask"):
                    model(tokens, position_ids=wrong)


def test_the_automatic_class_without_a_head_reads_what_the_head_reads(
    theirs: CrateForCausalLM, folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    bare, loading_info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(bare) is CrateModel
    assert not any(loading_info.values())
    mask = torch.ones_like(tokens)
    mask[2, :7] = 0
    with torch.no_grad():
        result = bare.eval()(tokens, attention_mask=mask, output_hidden_states=True)
        expected = theirs(tokens, attention_mask=mask, output_hidden_states=True)
    for ours, state in zip(result.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, state)
    torch.testing.assert_close(theirs.lm_head(result.last_hidden_state), expected.logits)
    bare.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens)[0], bare(tokens)[0])
