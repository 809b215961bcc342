"""Steering: exact where it should be exact, the same text with and without a cache, and clear errors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.hugging_face import FAMILIES, build
from fixtures.tiny import random_model, tiny_config
from torch import Tensor

from cratelm.activations.taps import capture, edit
from cratelm.errors import CrateError
from cratelm.model.generate import pad_left
from cratelm.model.language_model import LanguageModel
from cratelm.steering.changes import Change, parse_request, parse_strengths, swept
from cratelm.steering.generate import Decoding, all_logits, generate, next_logits
from cratelm.steering.intervention import NO_INTERVENTION, Control, Intervention
from cratelm.steering.measure import draw_matched_neuron, next_token_effect, steered_effect, text_loss
from cratelm.steering.place import SparseCoder, neuron_places
from cratelm.steering.positions import EVERYWHERE, Positions, Text, parse_positions
from cratelm.steering.steer import steer

VARIANTS: list[dict[str, Any]] = [
    {"arch": "crate"}, {"arch": "gpt2"}, {"arch": "crate", "untied_decoder": True, "ista_residual": True},
    {"arch": "crate", "dictionary": "complete", "expansion": 1, "ista_steps": 1}, {"arch": "crate", "rotary": True},
]  # fmt: skip
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
POSITIONS = [
    EVERYWHERE, Positions(part="prompt"), Positions(part="generated"), Positions(spans=((1, 2), (-1, -1), (12, 14))),
    Positions(part="generated", spans=((20, 40),)),
]  # fmt: skip
CHANGES = [Change(layer=0, index=3, how="set", value=4.0), Change(layer=1, index=5, how="add", value=3.0)]
STEERED = Intervention(changes=CHANGES)


def random_tokens(rng: np.random.Generator, *shape: int, vocab: int = 272) -> Tensor:
    return torch.from_numpy(rng.integers(vocab, size=shape))


def steered_logits(model: Any, tokens: Tensor, changes: Sequence[Change], **options: Any) -> Tensor:
    with torch.no_grad(), steer(model, Intervention(changes=changes, **options), text=Text(tokens)):
        return all_logits(model, tokens)


@variants
def test_a_change_moves_what_the_layer_writes_by_its_direction_alone(
    variant: dict[str, Any], rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(**variant), rng).double()
    tokens, place = random_tokens(rng, 2, 7), neuron_places(model)[1]
    with capture(model, [place.tap, place.written]) as before:
        model(tokens)
    change = Change(layer=1, index=6, how="set", value=1.5)
    with steer(model, Intervention(changes=[change])), capture(model, [place.tap, place.written]) as after:
        model(tokens)
    wanted = (1.5 - before[place.tap][..., 6:7]) * place.directions[6]
    torch.testing.assert_close(after[place.written] - before[place.written], wanted, rtol=0, atol=1e-12)
    assert (after[place.tap][..., 6] == 1.5).all()


@pytest.mark.parametrize(
    ("how", "value", "most", "wanted"),
    [
        ("set", 2.0, 0, [2, 2, 2, 2]), ("add", 0.5, 0, [-0.5, 0.5, 1, 3.5]), ("scale", -2.0, 0, [2, -0.0, -1, -6]),
        ("clamp", 0.0, 1.0, [0, 0, 0.5, 1]), ("clamp", 0.2, np.inf, [0.2, 0.2, 0.5, 3]),
        ("silence", 9, 0, [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_each_kind_of_change_gives_its_documented_activation(
    how: Any, value: float, most: float, wanted: list[float]
) -> None:
    model = random_model(tiny_config(), np.random.default_rng(0))
    code = torch.zeros(1, 4, 64)
    code[0, :, 9] = torch.tensor([-1.0, 0, 0.5, 3])
    tap, change = model.neuron_taps[0], Change(layer=0, index=9, how=how, value=value, most=most)
    intervention = Intervention(changes=[change])
    with edit(model, {tap: lambda _: code}), steer(model, intervention), capture(model, [tap]) as seen:
        model(torch.tensor([[1, 2, 3, 4]]))
    assert seen[tap][0, :, 9].tolist() == pytest.approx(wanted)
    seen[tap][0, :, 9] = code[0, :, 9]
    assert torch.equal(seen[tap], code)


@variants
@pytest.mark.parametrize("how", [("add", 0.0), ("scale", 1.0), ("clamp", -np.inf)])
def test_a_change_by_nothing_leaves_every_bit_of_the_logits(
    variant: dict[str, Any], how: tuple[Any, float], rng: np.random.Generator
) -> None:
    model, tokens = random_model(tiny_config(**variant), rng), random_tokens(rng, 3, 11)
    changes = [Change(layer=layer, index=7, how=how[0], value=how[1]) for layer in (0, 1)]
    with torch.no_grad():
        bare = model(tokens)
    result = steered_logits(model, tokens, changes)
    assert torch.equal(bare.view(torch.int32), result.view(torch.int32))
    coders = (planted_coder(model, rng),)
    latents = [Change(layer=1, index=2, how=how[0], value=how[1], latent=True)]
    assert torch.equal(bare, steered_logits(model, tokens, latents, coders=coders))
    loss = text_loss(model, tokens[:1])
    assert text_loss(model, tokens[:1], Intervention(changes=changes)) == loss
    assert text_loss(model, tokens[:1], Intervention(coders=coders, keep_error=False)) != loss


def planted_coder(model: LanguageModel, rng: np.random.Generator, latents: int = 24) -> SparseCoder:
    """A sparse autoencoder of random weights on the output of the last layer."""
    width = model.config.d_model
    encoder, decoder = (torch.from_numpy(rng.normal(size=(width, latents))).float() for _ in range(2))
    return SparseCoder(
        tap="blocks.1", layer=1, directions=decoder.T.contiguous(), encode=lambda x: (x @ encoder).relu(),
        decode=lambda f: f @ decoder.T + 0.1,
    )  # fmt: skip


def test_a_latent_is_steered_with_and_without_the_error(rng: np.random.Generator) -> None:
    model, tokens = random_model(tiny_config(), rng), random_tokens(rng, 1, 6)
    coder, change = planted_coder(model, rng), Change(layer=1, index=4, how="set", value=2.0, latent=True)
    with torch.no_grad(), capture(model, ["blocks.1"]) as before:
        model(tokens)
    x = before["blocks.1"]
    latents = coder.encode(x)
    latents[..., 4] = 2.0
    for keep, wanted in (
        (True, x + coder.decode(latents) - coder.decode(coder.encode(x))),
        (False, coder.decode(latents)),
    ):
        intervention = Intervention(changes=[change], coders=[coder], keep_error=keep)
        with torch.no_grad(), steer(model, intervention), capture(model, ["blocks.1"]) as seen:
            model(tokens)
        torch.testing.assert_close(seen["blocks.1"], wanted)


@variants
@pytest.mark.parametrize("slide", [1, 5])
def test_cached_and_uncached_generation_are_the_same_text_and_logits(
    variant: dict[str, Any], slide: int, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(**variant), rng)
    tokens, mask = pad_left([rng.integers(272, size=size).tolist() for size in (3, 6)])
    intervention = Intervention(
        changes=[*CHANGES, Change(layer=1, index=2, how="scale", value=3.0, latent=True)],
        coders=[planted_coder(model, rng)],
    )
    greedy = Decoding(temperature=0, slide=slide)
    plain = generate(model, tokens, 18, decoding=greedy, mask=mask)
    for positions in rng.choice(np.array(POSITIONS, dtype=object), 2, replace=False):
        texts, logits = [], []
        for use_cache in (True, False):
            steps: list[Tensor] = []
            texts.append(generate(
                model, tokens, 18, replace(intervention, positions=positions), mask=mask,
                decoding=replace(greedy, use_cache=use_cache),
                on_step=lambda _, step_logits, steps=steps: steps.append(step_logits),  # type: ignore[misc]
            ))  # fmt: skip
            logits.append(torch.stack(steps))
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
        assert torch.equal(texts[0], texts[1])
    assert torch.equal(plain, model.generate(tokens, 18, mask=mask, temperature=0, slide=slide))


def test_positions_count_in_the_whole_text_even_if_a_pass_reads_only_its_end(rng: np.random.Generator) -> None:
    tokens = torch.tensor([[0, 0, 7, 8, 9], [5, 8, 6, 8, 4]])
    text = Text(tokens, torch.tensor([[False, False, True, True, True], [True] * 5]))
    text.append(torch.tensor([8, 3]))

    def selected(positions: Positions, count: int = 6) -> list[list[int]]:
        return text.select(positions, count).int().tolist()

    assert selected(EVERYWHERE) == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert selected(Positions(part="prompt"), 2) == [[1, 0], [1, 0]]
    assert selected(Positions(part="generated")) == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]]
    assert selected(parse_positions("0,-1")) == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0]]
    assert selected(parse_positions("1..3")) == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]]
    assert selected(parse_positions("-2..-1"), 3) == [[1, 1, 0], [1, 1, 0]]
    assert selected(Positions(after=8)) == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert selected(Positions(after=8, part="generated")) == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]]
    model = random_model(tiny_config(), rng)
    tokens = random_tokens(rng, 1, 8)
    bare, steered = (steered_logits(model, tokens, x, positions=Positions(spans=((5, 5),))) for x in ([], CHANGES))
    torch.testing.assert_close(bare[:, :5], steered[:, :5], rtol=0, atol=1e-6)
    assert ((bare - steered)[:, 5:].abs().amax(2) > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_models_are_steered_with_and_without_a_cache(family: str, rng: np.random.Generator) -> None:
    model = build(family, rng)
    tokens, mask = pad_left([rng.integers(60, size=size).tolist() for size in (3, 6)])
    bare = next_logits(model, tokens, mask=mask)
    nothing = [Change(layer=0, index=3, how="add", value=0.0), Change(layer=1, index=5, how="scale", value=1.0)]
    assert torch.equal(next_logits(model, tokens, Intervention(changes=nothing), mask=mask), bare)
    steered = next_logits(model, tokens, STEERED, mask=mask)
    assert not torch.allclose(steered, bare, atol=1e-4)
    for positions in (EVERYWHERE, Positions(part="generated")):
        steps: list[Tensor] = []
        texts = [
            generate(
                model, tokens, 6, replace(STEERED, positions=positions), mask=mask,
                decoding=Decoding(temperature=0, use_cache=use_cache),
                on_step=lambda _, logits, steps=steps: steps.append(logits),  # type: ignore[misc]
            )
            for use_cache in (True, False)
        ]  # fmt: skip
        assert torch.equal(*texts)
        torch.testing.assert_close(torch.stack(steps[:6]), torch.stack(steps[6:]), rtol=1e-4, atol=1e-4)
    alone = next_logits(model, tokens[:1, 3:], STEERED)
    torch.testing.assert_close(steered[:1], alone, rtol=1e-4, atol=1e-4)


def test_steering_a_hugging_face_gpt2_equals_steering_ours_with_the_same_weights(
    rng: np.random.Generator, tmp_path: Any
) -> None:
    theirs = build("gpt2", rng, n_inner=64)
    theirs.save_pretrained(tmp_path / "model")
    from cratelm.model.weights import load_model

    ours, tokens = load_model(tmp_path / "model"), random_tokens(rng, 2, 9, vocab=60)
    for intervention in (STEERED, Intervention(changes=[Change(layer=1, index=11, how="silence")])):
        logits = [next_logits(model, tokens, intervention) for model in (ours, theirs)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_controls_move_the_output_by_the_same_length_in_another_direction(arch: Any, rng: np.random.Generator) -> None:
    model, tokens = random_model(tiny_config(arch), rng).double(), random_tokens(rng, 1, 6)
    place = neuron_places(model)[1]
    changes = [Change(layer=1, index=5, how="add", value=3.0)]
    moves = {}
    for control in (None, Control(kind="opposite"), Control(kind="random-direction", seed=4)):
        with torch.no_grad(), capture(model, [place.written]) as before:
            model(tokens)
        intervention = Intervention(changes=changes, control=control)
        with torch.no_grad(), steer(model, intervention), capture(model, [place.written]) as after:
            model(tokens)
        moves[control and control.kind] = after[place.written] - before[place.written]
    lengths = [move.norm(dim=-1) for move in moves.values()]
    torch.testing.assert_close(lengths[0], lengths[1])
    torch.testing.assert_close(lengths[0], lengths[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(moves[None], -moves["opposite"])
    assert torch.nn.functional.cosine_similarity(moves[None], moves["random-direction"], dim=-1).abs().max() < 0.99


def test_a_matched_neuron_is_among_the_ten_nearest_in_length_and_density(rng: np.random.Generator) -> None:
    lengths = rng.normal(size=200)
    density = np.exp(rng.normal(size=200)).astype(np.float32)
    density[50:] = 0  # never fire
    result = {draw_matched_neuron(np.exp(lengths), 7, density, seed=seed, avoid=[3]) for seed in range(40)}
    distance = np.abs(lengths - lengths[7]) + np.abs(np.log(np.maximum(density, 1e-30)) - np.log(density[7]))
    distance[[7, 3]] = np.inf
    assert result <= set(np.argsort(distance)[:10].tolist())
    assert len(result) > 3


def test_an_effect_is_the_mean_change_of_probability(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    texts = [rng.integers(272, size=size).tolist() for size in (4, 9, 6)]
    effect = next_token_effect(model, texts, STEERED)
    p, q = (
        np.stack([next_logits(model, torch.tensor([text]), side)[0].double().softmax(-1).numpy() for text in texts])
        for side in (NO_INTERVENTION, STEERED)
    )
    np.testing.assert_allclose(effect.before, p.mean(0), atol=1e-6)
    np.testing.assert_allclose(effect.change, (q - p).mean(0), atol=1e-6)
    np.testing.assert_allclose(effect.spread, (q - p).std(0, ddof=1) / np.sqrt(3), atol=1e-6)
    assert effect.divergence == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-4)
    assert effect.largest(1)[0] == (q - p).mean(0).argmax()
    assert effect.largest(1, decreases=True)[0] == (q - p).mean(0).argmin()
    matched = Intervention(changes=[Change(layer=1, index=9, how="add", value=3.0)])
    rows = steered_effect(model, texts, STEERED, matched=matched).rows(5)
    assert [row["name"] for row in rows] == ["steered", "matched neuron 1/9", "opposite sign", "random direction"]
    assert rows[0]["on_tokens"] == pytest.approx(np.sort((q - p).mean(0))[-5:].sum(), abs=1e-6)
    assert next_token_effect(model, texts, NO_INTERVENTION).divergence == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "must be LAYER/NEURON"), ("1/x=set:2", "must be LAYER/NEURON"), ("1/2=turn:3", "'turn'"),
        ("1/2=set", "set needs a strength"), ("1/2=set:big", "must be a number .* 'big'"),
        ("1/2=set:nan", "must be a number .* 'nan'"), ("1/2=clamp:3", "clamp needs a range"),
        ("1/2=clamp:3..1", "start at the smaller number"), ("1/2=scale:2x", "scale takes a factor"),
        ("1/2=silence:0", "silence takes no strength"), ("-1/2=set:1", "must be LAYER/NEURON"),
        ("", "must be LAYER/NEURON"),
    ],
)  # fmt: skip
def test_a_malformed_change_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(CrateError, match=message) as error:
        parse_request(text)
    assert "\n" not in str(error.value)


def test_requests_are_parsed_and_resolved() -> None:
    assert parse_request("1/85=set:2x").resolve(3.0) == Change(layer=1, index=85, how="set", value=6.0)
    assert parse_request("1/85").resolve(3.0).value == 3.0
    assert str(parse_request("sae:0/7=clamp:..1x").resolve(0.5)) == "sae:0/7=clamp:..0.5"
    assert not parse_request("0/7=add:-1e-3").needs_maximum
    assert parse_request("0/7=clamp:0..2x").resolve(2.0).most == 4.0
    strengths = parse_strengths("2x,0x, 1x")
    assert [str(strength) for strength in strengths] == ["0x", "1x", "2x"]
    assert swept(parse_request("1/2=add", swept=True), strengths[2]).resolve(1.5).value == 3.0
    for wrong in ("1x", "1,2x", "a,b"):
        with pytest.raises(CrateError):
            parse_strengths(wrong)


def test_changes_outside_the_model_are_refused_with_the_valid_range(rng: np.random.Generator) -> None:
    model, tokens = random_model(tiny_config(), rng), random_tokens(rng, 1, 5)
    coder = planted_coder(model, rng)
    for change, message in (
        (Change(layer=2, index=0, how="silence"), r"one with neurons \(0, 1\), got 2"),
        (Change(layer=1, index=64, how="silence"), "neurons 0 to 63, got 64"),
        (Change(layer=1, index=0, how="silence", latent=True), r"one with latents \(none\)"),
        (Change(layer=0, index=1, how="set", value=1e38), "logits are not finite with 0/1=set:1e[+]38"),
        (Change(layer=0, index=1, how="add", value=1e300), "logits are not finite with 0/1=add:1e[+]300"),
        (Change(layer=0, index=1, how="scale", value=float("nan")), "logits are not finite with 0/1=scale:nan"),
    ):
        with pytest.raises(CrateError, match=message):
            next_logits(model, tokens, Intervention(changes=[change]))
    latent = Change(layer=1, index=24, how="silence", latent=True)
    with pytest.raises(CrateError, match="latents 0 to 23, got 24"):
        next_logits(model, tokens, Intervention(changes=[latent], coders=[coder]))
    with pytest.raises(CrateError, match="got two for layer 1"):
        next_logits(model, tokens, Intervention(coders=[coder, coder]))
    with pytest.raises(CrateError, match="17 tokens, the model's context is 16"):
        next_logits(model, random_tokens(rng, 1, 17))
    prompt_only = Intervention(positions=Positions(part="prompt"))
    with pytest.raises(CrateError, match="positions need the text"), steer(model, prompt_only):
        pytest.fail("entered")
    for wrong in ("first", "3..1", "1,,2", ""):
        with pytest.raises(CrateError, match="positions must be"):
            parse_positions(wrong)
