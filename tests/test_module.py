"""Training through Lightning's Trainer, on CPU with tiny models."""

import copy
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from data2vec_train.data.collate import Collator
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.sources.files import RawSample, Source
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.objective.decoders import Conv2dDecoder, LinearDecoder
from data2vec_train.objective.masking import BlockMasker, InverseBlockMasker
from data2vec_train.objective.targets import TargetBuilder
from data2vec_train.training.module import Data2VecModule
from data2vec_train.training.optim import CosineSchedule, adamw

GRID = (4, 6)
SCHEDULE = CosineSchedule(lr=4e-3, start_lr=1e-3, min_lr=1e-4, warmup_steps=2, max_steps=8)
TAU = {"tau_start": 0.5, "tau_end": 0.9, "tau_anneal_steps": 4}


class Noise(Source):
    class_names = None

    def __init__(self, count: int = 100) -> None:
        self.images = np.random.default_rng(0).normal(size=(count, 1, 8, 12)).astype(np.float32)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return RawSample(f"noise:{index}", self.images[index])

    def labels(self):
        return None


class Jitter:
    """A random augmentation from torch's global generator, as the real transforms use it."""

    def train(self, image):
        return torch.from_numpy(image) + 0.1 * torch.randn(image.shape)

    def evaluate(self, image):
        return torch.from_numpy(image)


def untouched(value):
    return value


def objective(version: int, *, dropout: float = 0.0, noise_std: float = 0.0) -> Data2Vec:
    torch.manual_seed(0)
    first = version == 1
    encoder = VisionEncoder(
        image_px=[8, 12],
        patch_px=2,
        channels=1,
        dim=8,
        depth=2,
        prenet_depth=0,
        num_heads=2,
        ffn_dim=16,
        norm_first=first,
        final_norm=first,
        norm_eps=1e-6,
        activation="gelu",
        positions="none" if first else "sincos",
        relative_bias="shared" if first else "none",
        class_token=True,
        mask_token=first,
        qkv_bias="qv" if first else "qkv",
        layer_scale=0.1 if first else None,
        dropout=dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        drop_path=dropout,
        init="beit" if first else "bert",
        activation_checkpointing=False,
        attention="eager",
    )
    convolutions = {"channels": 8, "depth": 2, "kernel": 3, "groups": 2, "residual": True, "projection_layers": 1}
    convolutions |= {"reference_padding": False}
    targets = TargetBuilder(
        target_layer="block" if first else "ffn",
        top_k_layers=2,
        layer_norms=["layer" if first else "instance"],
        mean_norms=["layer"],
        reference_padding=False,
    )
    return Data2Vec(
        encoder=encoder,
        decoder=LinearDecoder(dim=8, init_std=None)
        if first
        else Conv2dDecoder(dim=8, input_dropout=dropout, noise_std=noise_std, init_std=None, **convolutions),
        targets=targets,
        mask_mode="replace" if first else "drop",
        masks_per_sample=1 if first else 3,
        loss_beta=2.0 if first else 0.0,
        channel_reduction="mean" if first else "sum_over_sqrt_dim",
        class_token_weight=0.0 if first else 0.5,
        share_embeddings=False,
        copied=[],
        **TAU,
    )


def module_of(model: Data2Vec, *, optimizer=None, seed: int = 0, fused: bool = False) -> Data2VecModule:
    def make(modules, *, no_decay):
        # A large eps: where a gradient is only rounding noise, Adam would make a full step of it.
        options = {"lr": 1.0, "betas": [0.9, 0.98], "eps": 1e-3, "weight_decay": 0.1}
        return adamw(modules, no_decay=no_decay, decay_all=False, fused=fused, **options)

    return Data2VecModule(
        objective=model, optimizer=optimizer or make, schedule=SCHEDULE, seed=seed, log_every_n_steps=3
    )


def tokens_on_grid(length: int) -> int:
    return GRID[0] * GRID[1]


def data_of(
    version: int, folder: Path, *, batch: int, num_workers: int = 0, seed: int = 0, source=None, **options
) -> DataModule:
    if version == 1:
        masker = BlockMasker(hidden_fraction=0.6, min_block_fraction=0.2, min_aspect=0.3)
    else:
        masker = InverseBlockMasker(hidden_fraction=0.75, adjust_fraction=0.1, block_patches=2)
    return DataModule(
        source=source or Noise(),
        test_source=None,
        held_out_fraction=0.0,
        max_probe_samples=0,
        decode=untouched,
        transform=Jitter(),
        batching=None,
        collator=Collator(
            masker=masker, masks_per_sample=1 if version == 1 else 3, grid=GRID, token_count=tokens_on_grid, seed=seed
        ),
        batch_size_per_device=batch,
        num_workers=num_workers,
        prefetch_factor=2,
        max_bad_fraction=0.0,
        tolerated_bad_samples=0,
        quarantine_path=folder / "quarantine.jsonl",
        seed=seed,
        **options,
    )


def trainer_of(folder: Path, *, steps: int, **options) -> L.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    fixed = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "default_root_dir": folder}
    return L.Trainer(**quiet | fixed | options)


def fit(version: int, folder: Path, *, steps: int, batch: int = 8, num_workers: int = 0, seed: int = 0, **options):
    regularised, global_seed = options.pop("regularised", False), options.pop("global_seed", 0)
    extras = {"dropout": 0.1, "noise_std": 0.01} if regularised else {}
    module = module_of(objective(version, **extras), seed=seed)
    data = data_of(version, folder, batch=batch, num_workers=num_workers, seed=seed)
    torch.manual_seed(global_seed)
    trainer_of(folder, steps=steps, **options).fit(module, datamodule=data)
    return module


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def distance(module: nn.Module, other: nn.Module) -> float:
    other = weights(other)
    return max((value - other[name]).abs().max().item() for name, value in weights(module).items())


# ------------------------------------------------------------------------------------------------------ accumulation


class Counts(L.Callback):
    """Hidden tokens per micro-batch and norms of clipped gradients."""

    def __init__(self) -> None:
        self.hidden: list[int] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.hidden.append(batch.masks.hidden.numel())

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        gradients = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.stack(gradients).norm().item())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_four_micro_batches_of_16_equal_a_batch_of_64(version, clip, tmp_path):
    """For student and teacher, over five steps; the ragged masks of 1.0 weigh micro-batches unequally."""
    counts = Counts()
    common = {"steps": 5, "gradient_clip_val": clip}
    whole = fit(version, tmp_path, batch=64, **common)
    parts = fit(version, tmp_path, batch=16, accumulate_grad_batches=4, callbacks=[counts], **common)
    start = objective(version)
    assert len(counts.hidden) == 20
    assert (len(set(counts.hidden)) > 1) == (version == 1)
    for module, other, initial in (
        (whole.objective.student, parts.objective.student, start.student),
        (whole.objective.decoder, parts.objective.decoder, start.decoder),
        (whole.objective.teacher, parts.objective.teacher, start.teacher),
    ):
        assert distance(module, initial) > 1e-3
        assert distance(module, other) < 1e-6


def test_the_logged_loss_is_that_of_the_whole_batch(tmp_path):
    """Micro-batches with unequal numbers of hidden tokens: their plain mean is another number."""
    whole, parts, counts = Trace(), Trace(), Counts()
    fit(1, tmp_path, steps=3, batch=64, callbacks=[whole])
    fit(1, tmp_path, steps=3, batch=32, accumulate_grad_batches=2, callbacks=[parts, counts])
    assert counts.hidden[0] != counts.hidden[1]
    assert not parts.metrics[0], "a batch that completes no step has nothing to log"
    for metrics, other in ((parts.metrics[1], whole.metrics[0]), (parts.metrics[5], whole.metrics[2])):
        torch.testing.assert_close(metrics["train/loss"], other["train/loss"], rtol=1e-6, atol=0)


def test_losses_and_terms_are_weighted_by_counts_and_other_values_are_not():
    module = module_of(objective(2))
    module._trainer = SimpleNamespace(world_size=1, global_step=0, max_steps=9, accumulate_grad_batches=2)
    for count, loss, part, std in ((3, 1.0, 0.25, 2.0), (1, 5.0, 1.25, 4.0)):
        terms = {"part": torch.tensor(part)}
        module.accumulate(torch.tensor(loss, requires_grad=True), count, torch.arange(2), terms=terms)
        module.measure({"train/target_std": torch.tensor(std)})
    found = {name: float(value) for name, value in module._micro_batches.metrics(1).items()}
    assert found == {"train/loss": 2.0, "train/loss_part": 0.5, "train/target_std": 3.0}


def test_clipping_bounds_the_norm_over_all_gradients_of_the_step(tmp_path):
    free, clipped = Counts(), Counts()
    fit(1, tmp_path, steps=2, batch=4, accumulate_grad_batches=2, callbacks=[free])
    fit(1, tmp_path, steps=2, batch=4, accumulate_grad_batches=2, gradient_clip_val=0.01, callbacks=[clipped])
    assert min(free.norms) > 0.02
    assert clipped.norms
    assert max(clipped.norms) == pytest.approx(0.01, rel=1e-3)


# ------------------------------------------------------------------------------------------------- teacher, rate, state


class Trace(L.Callback):
    """Copies of student and teacher after each batch, and the learning rate that was used."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.students: list[dict] = []
        self.teachers: list[dict] = []
        self.taus: list[float] = []
        self.metrics: list[dict] = []  # of each batch; empty where it completed no logged step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.students.append(weights(pl_module.objective.student))
        self.teachers.append(weights(pl_module.objective.teacher.encoder))
        self.metrics.append({} if pl_module.step_result is None else dict(pl_module.step_result.metrics))


def test_the_teacher_moves_once_per_optimizer_step_towards_the_new_student(tmp_path):
    trace, start = Trace(), objective(2)
    fit(2, tmp_path, steps=5, batch=4, accumulate_grad_batches=2, callbacks=[trace])
    assert trace.steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    wanted = weights(start.teacher.encoder)
    taus = [None, 0.6, 0.7, 0.8, 0.9, 0.9]  # after step 1, 2, ...: linear from 0.5 to 0.9 in 4 steps
    last = 0
    for step, student, teacher in zip(trace.steps, trace.students, trace.teachers, strict=True):
        if step > last:
            last = step
            wanted = {name: taus[step] * value + (1 - taus[step]) * student[name] for name, value in wanted.items()}
        for name, value in teacher.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    assert last == 5


def test_the_learning_rate_of_step_n_plus_1_is_the_schedule_at_n(tmp_path):
    trace = Trace()
    fit(1, tmp_path, steps=9, batch=2, callbacks=[trace])
    assert trace.steps == list(range(1, 10))
    assert trace.rates == [SCHEDULE(step) for step in range(9)]
    assert trace.rates[0] == 1e-3
    assert trace.rates[2] == 4e-3
    assert trace.rates[8] == pytest.approx(1e-4)


def test_the_first_step_uses_the_schedule_and_not_the_optimizers_own_rate(tmp_path):
    """With plain SGD the weights move by rate times gradient."""

    def sgd(modules, *, no_decay):
        return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=1e6)

    model = objective(1)
    module, data = module_of(model, optimizer=sgd), data_of(1, tmp_path, batch=4)
    reference = copy.deepcopy(model)
    trainer_of(tmp_path, steps=1).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    reference(batch).loss.backward()
    for name, parameter in reference.student.named_parameters():
        moved = parameter.detach() - 1e-3 * parameter.grad
        torch.testing.assert_close(model.student.get_parameter(name), moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_of_step_n_holds_the_teacher_of_step_n(accumulate, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    trace = Trace()
    checkpoints = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"callbacks": [trace, checkpoints], "enable_checkpointing": True, "accumulate_grad_batches": accumulate}
    fit(2, tmp_path, steps=4, batch=4, **options)
    for step in (2, 4):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)
        assert saved["global_step"] == step
        index = accumulate * step - 1
        for prefix, kept in (("student.", trace.students), ("teacher.encoder.", trace.teachers)):
            for name, value in kept[index].items():
                assert torch.equal(saved["state_dict"][f"objective.{prefix}{name}"], value), name


def test_what_is_measured_on_logged_steps(tmp_path):
    trace = Trace()
    fit(2, tmp_path, steps=4, batch=4, callbacks=[trace], gradient_clip_val=1.0)
    logged = {
        "train/loss",
        "train/loss_regression",
        "train/loss_class_token",
        "train/feature_std",
        "train/target_std",
        "train/prediction_std",
        "train/grad_norm",
        "train/tau",
        "train/lr",
    }
    first, second, third, last = trace.metrics  # every 3 steps, the first and the last
    assert set(first) == set(third) == set(last) == logged
    assert not second
    assert first["train/tau"] == pytest.approx(0.6)
    parts = third["train/loss_regression"] + third["train/loss_class_token"]
    torch.testing.assert_close(third["train/loss"], parts)
    assert third["train/lr"] == SCHEDULE(2)


# ---------------------------------------------------------------------------------------------------------- repeating


@pytest.mark.parametrize("version", [1, 2])
def test_the_same_seed_gives_the_same_bits_whatever_the_workers(version, tmp_path):
    """With dropout, drop path, decoder noise and augmentation on."""
    options = {"steps": 3, "batch": 8, "accumulate_grad_batches": 2, "regularised": True}
    first = fit(version, tmp_path, **options)
    again = fit(version, tmp_path, global_seed=123, **options)  # the state of the global generator must not matter
    workers = fit(version, tmp_path, global_seed=456, num_workers=2, **options)
    other = fit(version, tmp_path, seed=1, **options)
    assert distance(first, again) == 0
    assert distance(first, workers) == 0
    assert distance(first, other) > 1e-4


def test_dropout_differs_between_micro_batches_of_a_step(tmp_path):
    seen = []

    class Record(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(torch.get_rng_state())

    fit(1, tmp_path, steps=2, batch=2, accumulate_grad_batches=2, callbacks=[Record()], regularised=True)
    assert len(seen) == 4
    assert not any(torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))
