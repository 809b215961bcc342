"""The released code's own autoencoder: its loss, its unit rows and its resampling, against hand-worked float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sae_lens", reason="sae-lens is not installed (make test-all installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")

D_IN, WIDTH, BATCH = 5, 12, 30


def make(rng: np.random.Generator, **changes: Any) -> Any:
    """The class in float64, with no bias at 0."""
    from cratelm.sae.paper import PaperTrainingSAE, PaperTrainingSAEConfig

    torch.manual_seed(int(rng.integers(1 << 31)))
    settings: dict[str, Any] = {"d_in": D_IN, "d_sae": WIDTH, "dtype": "float64", "decoder_init_norm": None} | changes
    sae = PaperTrainingSAE(PaperTrainingSAEConfig(**settings))
    for bias in (sae.b_enc, sae.b_dec):
        bias.data = torch.from_numpy(rng.normal(size=bias.shape))
    return sae


def forward(sae: Any, x: Tensor, l1: float) -> Any:
    """One forward pass as the trainer makes it."""
    from sae_lens.saes.sae import TrainStepInput

    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients={"l1": l1}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
    )


def by_hand(sae: Any, x: np.ndarray, l1: float) -> tuple[float, np.ndarray]:
    """Loss and latents, token by token, number by number."""
    encoder, decoder = sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()
    b_enc, b_dec = sae.b_enc.detach().numpy(), sae.b_dec.detach().numpy()
    errors, penalties, latents = [], [], []
    for one in x:
        f = [max(sum((one[j] - b_dec[j]) * encoder[j, i] for j in range(D_IN)) + b_enc[i], 0) for i in range(WIDTH)]
        norm = sum(value**2 for value in one) ** 0.5
        for j in range(D_IN):
            out = sum(f[i] * decoder[i, j] for i in range(WIDTH)) + b_dec[j]
            errors.append((out - one[j]) ** 2 / norm if norm > 0 else 0.0)
        penalties.append(sum(abs(value) for value in f))
        latents.append(f)
    return float(np.mean(errors) + l1 * np.mean(penalties)), np.array(latents)


def test_the_loss_is_the_released_codes(rng: np.random.Generator) -> None:
    sae, x = make(rng), rng.normal(size=(BATCH, D_IN)) * 3
    result = forward(sae, torch.from_numpy(x), 0.01)
    loss, latents = by_hand(sae, x, 0.01)
    assert float(result.loss) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(result.feature_acts.detach().numpy(), latents, atol=1e-12)
    assert float(result.metrics["zero_inputs"]) == 0
    assert float(result.losses["relative_error"] + result.losses["l1_loss"]) == pytest.approx(loss, rel=1e-12)


def test_an_input_that_is_all_zero_divides_nothing_by_zero(rng: np.random.Generator) -> None:
    sae, x = make(rng), rng.normal(size=(BATCH, D_IN))
    x[[3, 8]] = 0
    result = forward(sae, torch.from_numpy(x), 0.01)
    assert float(result.loss) == pytest.approx(by_hand(sae, x, 0.01)[0], rel=1e-12)
    assert float(result.metrics["zero_inputs"]) == 2
    result.loss.backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in sae.parameters())


def test_rows_keep_norm_1_and_their_gradient_is_across_them(rng: np.random.Generator) -> None:
    sae, x = make(rng), torch.from_numpy(rng.normal(size=(BATCH, D_IN)))
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(WIDTH, dtype=torch.float64))
    sae.W_dec.data *= torch.from_numpy(rng.uniform(0.5, 2, (WIDTH, 1)))
    forward(sae, x, 0.01).loss.backward()
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(WIDTH, dtype=torch.float64))
    along = (sae.W_dec.grad * sae.W_dec).sum(dim=1)
    assert float(along.detach().abs().max()) < 1e-12
    assert float(sae.W_dec.grad.norm()) > 1e-4
    rows = sae.W_dec.data.clone().requires_grad_()
    latents, _ = sae.encode_with_hidden_pre(x)
    out = latents.detach() @ rows + sae.b_dec
    (((out - x) ** 2 / x.norm(dim=1, keepdim=True)).mean()).backward()
    assert rows.grad is not None
    whole = rows.grad - (rows.grad * rows).sum(dim=1, keepdim=True) * rows
    torch.testing.assert_close(sae.W_dec.grad, whole.detach())


def test_the_initial_weights_are_kaiming_uniform(rng: np.random.Generator) -> None:
    sae = make(rng, d_in=400, d_sae=600)
    bound = (6 / 600) ** 0.5
    assert float(sae.W_enc.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(sae.W_enc.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    aligned = (sae.W_enc.T * sae.W_dec).sum(dim=1) / sae.W_enc.norm(dim=0)
    assert float(aligned.abs().mean()) < 0.1, "encoder and decoder are drawn apart"


def test_resampled_latents_start_at_their_input_and_the_others_stay(rng: np.random.Generator) -> None:
    from cratelm.sae.paper import resample

    sae, x = make(rng), torch.from_numpy(rng.normal(size=(BATCH, D_IN)))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        forward(sae, x, 0.01).loss.backward()
        optimizer.step()
    sae.normalise()
    before = {name: weight.detach().clone() for name, weight in sae.named_parameters()}
    dead = torch.zeros(WIDTH, dtype=torch.bool)
    dead[[1, 4, 7]] = True
    inputs = torch.from_numpy(rng.normal(size=(3, D_IN)))
    resample(sae, optimizer, dead, inputs)
    mean_norm = np.mean([np.linalg.norm(before["W_enc"].numpy()[:, i]) for i in range(WIDTH) if not dead[i]])
    for i, start in zip((1, 4, 7), inputs.numpy(), strict=True):
        unit = start / np.sqrt((start**2).sum())
        np.testing.assert_allclose(sae.W_dec[i].detach().numpy(), unit, rtol=1e-12)
        np.testing.assert_allclose(sae.W_enc[:, i].detach().numpy(), 0.2 * mean_norm * unit, rtol=1e-12)
        assert float(sae.b_enc[i]) == 0
    torch.testing.assert_close(sae.W_dec[~dead].detach(), before["W_dec"][~dead])
    torch.testing.assert_close(sae.W_enc[:, ~dead].detach(), before["W_enc"][:, ~dead])
    assert torch.equal(sae.b_dec, before["b_dec"])
    for name in ("exp_avg", "exp_avg_sq"):
        moments = {key: optimizer.state[getattr(sae, key)][name] for key in ("W_dec", "W_enc", "b_enc")}
        assert not moments["W_dec"][dead].any()
        assert not moments["W_enc"][:, dead].any()
        assert not moments["b_enc"][dead].any()
        assert moments["W_dec"][~dead].any()
    resample(sae, optimizer, torch.ones(WIDTH, dtype=torch.bool), torch.from_numpy(rng.normal(size=(WIDTH, D_IN))))
    assert bool(sae.W_enc.isfinite().all())


def test_latents_that_hardly_fire_are_resampled_by_what_was_counted_in_the_window(rng: np.random.Generator) -> None:
    from cratelm.sae.config import SaeConfig
    from cratelm.sae.training import Trainer, TrainingPlace

    config = SaeConfig(
        kind="paper", expansion=2, batch_tokens=10, buffer_tokens=10, resample_at=(6, 9), resample_window=2, log_every=1
    )
    place = TrainingPlace(tap="t", layer=0, path="p", d_in=D_IN, context=4, identity={}, model_flops_per_token=1)
    trainer = Trainer(config, place, 120, device=torch.device("cpu"))
    trainer.sae.b_enc.data[:] = 5.0  # all fire; two will stop in the window, one fired before it alone
    asked: list[tuple[int, int]] = []

    def candidates(_trainer: Any, count: int, step: int) -> Tensor:
        asked.append((count, step))
        return torch.ones(count, D_IN)

    rows = []
    for step in range(12):
        if step == 4:
            trainer.sae.b_enc.data[[2, 3]] = -1e6
        rows.append(trainer.learn(torch.from_numpy(rng.normal(size=(10, D_IN))).float(), candidates))
    assert asked == [(2, 6)], (
        "the window of step 6 are steps 5 and 6; at step 9 the two fire again or their time is short"
    )
    assert [row["resampled"] for row in rows if "resampled" in row] == [2, 0]
    assert [row["step"] for row in rows] == list(range(1, 13))
    rates = [row["learning_rate"] for row in rows]
    assert rates[0] == rates[6] == rates[9] == pytest.approx(4e-5)
