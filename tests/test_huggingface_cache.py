"""`generate` of transformers with our cache: the same tokens, each read once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-all installs it)")
from test_huggingface import SIZE, VARIANTS, make_model  # noqa: E402

from cratelm.model.weights import save_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_generate_reads_each_token_once_and_finds_the_same_as_without_a_cache(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    seed = int(rng.integers(2**31))
    tokens = torch.from_numpy(rng.integers(SIZE["vocab_size"], size=(3, 20)))
    for arch, changes in (("crate", {}), ("gpt2", {}), *VARIANTS):
        save_model(make_model(arch, seed, **changes), tmp_path / "model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        mask = torch.ones_like(tokens)
        mask[1, :4] = 0
        ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True}]
        for way in ways:
            made, read = [], []
            for use_cache in (True, False):
                count: list[int] = []
                hook = theirs.get_input_embeddings().register_forward_pre_hook(
                    lambda _, inputs, count=count: count.append(inputs[0].shape[1])
                )
                torch.manual_seed(seed)
                options = way | {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "use_cache": use_cache}
                made.append(theirs.generate(tokens, attention_mask=mask, **options))
                read.append(sum(count))
                hook.remove()
            assert torch.equal(made[0], made[1])
            if "num_beams" not in way:
                assert read == [20 + 7, sum(range(20, 28))]
