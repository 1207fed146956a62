"""A sample alone and in a batch with longer ones: the same features, targets and loss, with the default settings.

Noise in the decoder is off, since it cannot be the same in tensors of different sizes; everything else is what
`python -m data2vec_train modality=... objective=...` builds, with five positional convolutions and instance-normalised
targets for speech. Images have no padding: all are cropped to one size. Spectrograms with `reference_padding` have none
either: the transform fills every clip up.
"""

import pytest
import torch
from torch import Tensor

from data2vec_train.batch import Batch
from data2vec_train.config.build import build
from data2vec_train.data.collate import Collator
from data2vec_train.data.dataset import Sample
from data2vec_train.objective.data2vec import Data2Vec, mean_over_time

SMALL = ["size.dim=32", "size.num_heads=4", "size.ffn_dim=64", "size.conv_dim=16"]
LENGTHS = {"audio": (9_000, 12_345, 16_000), "sound": (32, 80, 144), "text": (40, 77, 128)}
CASES = [(modality, objective) for modality in LENGTHS for objective in ("data2vec", "data2vec2")]


def built(composed, modality: str, objective: str, *overrides: str) -> tuple[Data2Vec, Collator]:
    noise = ["objective.decoder.noise_std=0"] if objective == "data2vec2" else []
    cfg = composed(f"modality={modality}", f"objective={objective}", *SMALL, *noise, *overrides)
    torch.manual_seed(0)
    model: Data2Vec = build(cfg.objective).eval()
    with torch.no_grad():  # a teacher that differs from the student
        for parameter in model.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    collator = Collator(
        masker=build(cfg.modality.masker),
        masks_per_sample=cfg.objective.masks_per_sample,
        grid=model.student.grid,
        token_count=model.student.token_count,
        seed=0,
        pad_value=cfg.modality.pad_value,
        corruption=build(cfg.modality.corruption),
    )
    # Equalised masks depend on the company: every sample keeps the mask it has by itself.
    collator.masker.equalise = lambda masks, rng: masks
    return model, collator


def samples_of(modality: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    make = {
        "audio": lambda length: torch.randn(length, generator=generator),
        "sound": lambda length: torch.randn(128, length, generator=generator),
        "text": lambda length: torch.randint(4, 4000, (length,), generator=generator),
    }[modality]
    return [Sample(make(length), 0, number, None, ()) for number, length in enumerate(LENGTHS[modality])]


@torch.no_grad()
def measured(model: Data2Vec, batch: Batch) -> list[dict[str, Tensor]]:
    """Features, targets and loss of each sample of a batch."""
    embedded = model.student.embed(batch.inputs, batch.attention_mask)
    encoded = model.student.contextualize(*embedded)
    features = encoded.tokens
    targets = model.compute_targets(batch, embedded)
    output = model(batch)
    errors = model.scale * model._error(output.predictions, output.targets).sum(dim=1)
    class_tokens = model.predict(batch, embedded)[1].prefix.unflatten(0, (len(batch), -1))[:, :, -1:]  # (B, M, E, D)
    summary = mean_over_time(targets, embedded[1])[:, None, None].expand_as(class_tokens)
    owner = batch.masks.hidden // (model.masks_per_sample * batch.masks.masked.shape[2])
    real = torch.ones(features.shape[:2], dtype=torch.bool) if embedded[1] is None else embedded[1]
    return [
        {
            "features": features[row, real[row]],
            "targets": targets[row, real[row]],
            "loss": errors[owner == row].mean(),
            "class token": encoded.prefix[row],
            "class-token loss": model.scale * model._error(class_tokens, summary)[row].sum(dim=-1),
        }
        for row in range(len(batch))
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("modality", "objective"), CASES)
def test_a_padded_sample_equals_the_same_sample_alone(composed, modality, objective, attention):
    model, collator = built(composed, modality, objective, f"attention={attention}")
    samples = samples_of(modality)
    together = measured(model, collator(samples))
    for sample, in_batch in zip(samples, together, strict=True):
        (alone,) = measured(model, collator([sample]))
        for name, value in alone.items():
            torch.testing.assert_close(
                in_batch[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize(
    ("modality", "objective"), [("audio", "data2vec"), ("audio", "data2vec2"), ("text", "data2vec2")]
)
def test_reference_padding_brings_the_originals_dependence_on_the_company_back(composed, modality, objective):
    model, collator = built(composed, modality, objective, "modality.reference_padding=true")
    samples = samples_of(modality)
    (alone,) = measured(model, collator(samples[:1]))
    in_batch = measured(model, collator(samples))[0]
    assert (alone["targets"] - in_batch["targets"]).abs().max() > 1e-3


def test_padding_is_never_hidden_and_takes_part_in_no_loss(composed):
    model, collator = built(composed, "audio", "data2vec2")
    batch = collator(samples_of("audio"))
    counts = [model.student.token_count(length) for length in LENGTHS["audio"]]
    for row, count in enumerate(counts):
        assert not batch.masks.masked[row, :, count:].any()
        assert batch.masks.masked[row].sum(dim=1).tolist() == [count // 2] * model.masks_per_sample
    assert batch.masks.visible.shape[1] == max(count - count // 2 for count in counts)


def test_the_released_code_of_text_shows_its_teacher_padding_in_place_of_visible_tokens(composed):
    model, collator = built(composed, "text", "data2vec")
    collator.legacy_teacher_input = True
    batch = collator(samples_of("text")[2:] * 3)
    hidden = batch.masks.masked[:, 0]
    assert torch.equal(batch.teacher_attention_mask, hidden)
    assert torch.equal(batch.teacher_inputs[hidden], batch.inputs[hidden])
    assert (batch.teacher_inputs[~hidden] == collator.pad_value).all()
    assert (~hidden).float().mean().item() == pytest.approx(0.71, abs=0.08)  # issue #4881: 71 % of the input
    fixed = Batch(inputs=batch.inputs, masks=batch.masks, corrupted=batch.corrupted)
    assert model(batch).loss != model(fixed).loss
