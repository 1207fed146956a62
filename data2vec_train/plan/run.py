"""The plan command: the memory that a training command needs, what fits, how long it takes; without GPU and data."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data2vec_train.batch import Batch
from data2vec_train.config.build import build
from data2vec_train.data.dataset import Sample
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.spectrogram import SpectrogramEncoder
from data2vec_train.encoders.text import TextEncoder
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.plan.planner import GIB, Hardware, Planner, Reserve, Setup, largest_that_fits
from data2vec_train.system.outputs import replace_file
from data2vec_train.training.assemble import build_collator, global_batch

log = logging.getLogger(__name__)

PLAN = "plan.json"
# Precision of the trainer -> its name in `hardware.tflops`, and the dtype of autocast; "auto" becomes one of these.
PRECISIONS = {
    "32-true": ("fp32", None),
    "32-tf32": ("tf32", None),
    "bf16-mixed": ("bf16", torch.bfloat16),
    "16-mixed": ("fp16", torch.float16),
    "fp8-mixed": ("bf16", torch.bfloat16),
}
_DRAWN = 8  # number of samples whose masks are drawn, to measure the masked fraction


def plan(cfg: DictConfig) -> None:
    """Print the plan and write it into Hydra's run directory.

    Raises:
        ConfigError: the run does not fit; the message lists changes that make it fit.
    """
    facts = make_plan(cfg)
    for line in lines_of(facts):
        log.info("%s", line)
    file = Path(HydraConfig.get().runtime.output_dir) / PLAN
    replace_file(file, json.dumps(facts, indent=2).encode() + b"\n")
    log.info("plan: %s", file)
    if not facts["fits"]:
        raise ConfigError(facts["refusal"])


def make_plan(cfg: DictConfig) -> dict[str, Any]:
    """All facts about the run, as written to `plan.json`."""
    if cfg.init_from is not None:
        from data2vec_train.training.init_from import config_from_pretrained

        config_from_pretrained(cfg)
    with torch.device("meta"):
        objective: Data2Vec = build(cfg.objective)
    hardware = Hardware(**OmegaConf.to_container(cfg.hardware, resolve=True))
    planner = Planner(
        objective=objective,
        batch=drawn_batch(cfg, objective, samples=_DRAWN),
        optimizer=_stepped_optimizer(cfg, objective),
        hardware=hardware,
        reserve=Reserve(**cfg.reserve),
    )
    setup, rate = _setup(cfg, objective, hardware)
    memory, flops = planner.memory(setup), planner.flops(setup)
    twice = planner.memory(replace(setup, samples=2 * setup.samples))
    most = largest_that_fits(
        lambda n: planner.memory(replace(setup, samples=n)).needed, planner.limit, near=setup.samples
    )
    seconds = planner.seconds(
        setup, flops_per_sample=sum(flops.values()), tflops=hardware.tflops[rate], utilisation=cfg.utilisation
    )
    micro_batch = setup.samples * setup.devices
    facts: dict[str, Any] = {
        "modality": cfg.modality.name,
        "objective": f"{objective.mask_mode}, masks per sample: {setup.masks_per_sample}",
        "hardware": hardware.name,
        "precision": rate,
        "attention": cfg.attention.backend,
        "strategy": setup.strategy,
        "devices": setup.devices,
        "samples_per_device": setup.samples,
        "sample": _sample_size(cfg, objective.student),
        "global_batch": global_batch(cfg, setup.devices),
        "masks_per_sample": setup.masks_per_sample,
        "activation_checkpointing": setup.checkpointing,
        "parameters": {
            "student": _count(objective.student),
            "decoder": _count(objective.decoder),
            "teacher": _count(objective.teacher),
        },
        "flops_per_sample": flops | {"all": sum(flops.values())},
        "flops_per_step": sum(flops.values()) * micro_batch * setup.accumulate,
        "memory": {
            **memory.parts,
            "allocated": memory.allocated,
            "fragmentation": memory.fragmentation,
            "context": memory.context,
            "needed": memory.needed,
            "device": planner.limit,
        },
        "activations": {
            "per_sample": (twice.step.activations - memory.step.activations) // setup.samples,
            "by_part": memory.step.held,
        },
        "fits": memory.needed <= planner.limit,
        "largest_batch": most,
        "time": {
            "utilisation": cfg.utilisation,
            "tflops": hardware.tflops[rate],
            "seconds_per_step": seconds,
            "samples_per_second": micro_batch * setup.accumulate / seconds,
            "steps": cfg.trainer.max_steps,
            "hours": seconds * cfg.trainer.max_steps / 3600,
            "device_hours": seconds * cfg.trainer.max_steps / 3600 * setup.devices,
        },
        "assumptions": _assumptions(cfg, objective, setup),
    }
    if setup.masks_per_sample > 1:
        with_one_mask = planner.memory(replace(setup, masks_per_sample=1)).step.activations
        facts["activations"]["per_mask"] = (memory.step.activations - with_one_mask) // (setup.masks_per_sample - 1)
        facts["largest_masks_per_sample"] = largest_that_fits(
            lambda n: planner.memory(replace(setup, masks_per_sample=n)).needed,
            planner.limit,
            near=setup.masks_per_sample,
        )
    if not facts["fits"]:
        facts["refusal"] = _refusal(cfg, planner, setup, facts)
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# From the config


def drawn_batch(cfg: DictConfig, objective: Data2Vec, *, samples: int) -> Batch:
    """Empty samples of the largest size, with masks from the masker of the run.

    Raises:
        ConfigError: the encoder comes from a plugin, so its inputs are unknown.
    """
    modality, encoder = cfg.modality, objective.student
    batching = build(modality.batching)
    if isinstance(encoder, SpectrogramEncoder):
        inputs = [torch.zeros(encoder.mel_bins, batching.max_length)] * samples
    elif isinstance(encoder, VisionEncoder):
        inputs = [torch.zeros(modality.channels, *encoder.image_size)] * samples
    elif isinstance(encoder, WaveformEncoder):
        shape = (batching.max_length,) if encoder.channels == 1 else (encoder.channels, batching.max_length)
        inputs = [torch.zeros(shape)] * samples
    elif isinstance(encoder, TextEncoder):
        inputs = [torch.zeros(modality.block_tokens, dtype=torch.int64)] * samples
        if not modality.cross_documents:
            inputs[-1] = inputs[-1][1:]  # one shorter sample, so that the batch has padding and attention a mask
    else:
        raise ConfigError(
            f"modality={modality.name}: a plan supports the encoders of vision, audio and text, not "
            f"{type(encoder).__name__}"
        )
    return build_collator(cfg, encoder=encoder)(
        [Sample(tensor, 0, number, None, ()) for number, tensor in enumerate(inputs)]
    )


def _stepped_optimizer(cfg: DictConfig, objective: Data2Vec) -> torch.optim.Optimizer:
    plain = OmegaConf.merge(cfg.optimizer, {"fused": False}) if "fused" in cfg.optimizer else cfg.optimizer
    optimizer = build(plain)([objective.student, objective.decoder], no_decay=objective.student.no_decay)
    for parameter in objective.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _setup(cfg: DictConfig, objective: Data2Vec, hardware: Hardware) -> tuple[Setup, str]:
    """The setup of the config, and the name of its precision in `hardware.tflops`.

    Raises:
        ConfigError: plans do not support the precision, or the hardware does not have it.
    """
    trainer = cfg.precision.trainer
    if trainer == "auto":
        trainer = "bf16-mixed" if (hardware.tflops.get("bf16") or 0) > hardware.tflops["fp32"] else "32-true"
    if trainer not in PRECISIONS:
        raise ConfigError(
            f"precision.trainer={trainer}: a plan supports auto, {', '.join(PRECISIONS)}; choose one of them"
        )
    rate, low = PRECISIONS[trainer]
    if hardware.tflops.get(rate) is None:
        known = [name for name, value in hardware.tflops.items() if value is not None]
        raise ConfigError(f"precision={rate}: {hardware.name} does not support {rate}; choose {' or '.join(known)}")
    devices = cfg.strategy.devices
    devices = hardware.devices if devices in ("auto", -1) else devices
    devices = len(devices) if isinstance(devices, list) or OmegaConf.is_list(devices) else int(devices)
    devices *= cfg.strategy.num_nodes
    setup = Setup(
        samples=_samples(cfg),
        masks_per_sample=objective.masks_per_sample,
        low=low,
        checkpointing=cfg.modality.encoder.activation_checkpointing,
        strategy=_strategy(cfg, devices),
        devices=devices,
        accumulate=cfg.trainer.accumulate_grad_batches,
    )
    return setup, rate


def _samples(cfg: DictConfig) -> int:
    """Samples of the largest size in the batch of one device."""
    batching, size = build(cfg.modality.batching), cfg.data.batch_size_per_device
    if batching is None:
        return size
    return batching.batch_size(0, size)


def _strategy(cfg: DictConfig, devices: int) -> str:
    given = cfg.strategy.strategy
    name = (given if isinstance(given, str) else given._target_.rpartition(".")[2]).lower()
    if name.startswith(("fsdp", "shardedstrategy", "model_parallel")):
        return "fsdp"
    return "ddp" if devices > 1 else "single"


def _sample_size(cfg: DictConfig, encoder: ModalityEncoder) -> str:
    if isinstance(encoder, (SpectrogramEncoder, WaveformEncoder)):
        return f"recording of {cfg.modality.max_seconds:g} s"
    if isinstance(encoder, VisionEncoder):
        return "image of {} x {} px".format(*encoder.image_size)
    return f"block of {cfg.modality.block_tokens} tokens"


def _assumptions(cfg: DictConfig, objective: Data2Vec, setup: Setup) -> list[str]:
    """What the plan does not compute."""
    made = [f"time: a step reaches {cfg.utilisation:.0%} of the matmul rate, which was not measured"]
    if isinstance(objective.student, TextEncoder):
        made.append(f"text: a vocabulary of {cfg.modality.vocab_size:,} tokens, and full blocks")
    if isinstance(objective.student, (SpectrogramEncoder, WaveformEncoder)):
        made.append("sound: every recording is as long as modality.max_seconds allows")
    if cfg.modality.encoder.get("layer_drop", 0) > 0:
        made.append("layer drop skips no block")
    if cfg.precision.trainer == "fp8-mixed":
        made.append("fp8: memory and time are those of bf16")
    if cfg.attention.backend == "auto":
        made.append("attention=auto: flash or flex if supported, else sdpa; a run measures which is fastest")
    if cfg["compile"]:
        made.append("compile: memory and time are those of a model that is not compiled")
    if setup.devices > 1:
        made.append("communication between devices takes no time")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What to change


def _refusal(cfg: DictConfig, planner: Planner, setup: Setup, facts: dict[str, Any]) -> str:
    needed, name = facts["memory"]["needed"], planner.hardware.name
    helps = [_batch_setting(cfg, setup, facts["largest_batch"])] if facts["largest_batch"] else []
    if facts.get("largest_masks_per_sample"):
        helps.append(f"objective.masks_per_sample={facts['largest_masks_per_sample']}")
    others = {
        "modality.encoder.activation_checkpointing=true": replace(setup, checkpointing=True),
        "precision=bf16": replace(setup, low=torch.bfloat16) if planner.hardware.tflops.get("bf16") else setup,
        "strategy=fsdp strategy.devices=8": replace(setup, strategy="fsdp", devices=max(8, setup.devices)),
    }
    less = {
        setting: planner.memory(other).needed
        for setting, other in others.items()
        if other != setup and planner.hardware.gpu >= (other.strategy != setup.strategy)
    }
    helps += [f"{setting}, which needs {_gib(size)}" for setting, size in less.items() if size <= planner.limit]
    text = f"this run needs {_gib(needed)} on each device, and {name} has {_gib(planner.limit)}"
    text += f"; what fits: {'; or '.join(helps)}" if helps else "; choose a smaller size, or other hardware"
    tried = [f"{setting} ({_gib(size)})" for setting, size in less.items() if planner.limit < size < needed]
    return f"{text}; not enough alone: {', '.join(tried)}" if tried else text


def _batch_setting(cfg: DictConfig, setup: Setup, most: int) -> str:
    """The setting for the largest batch that fits, with the accumulation that keeps the samples per step."""
    by_length = cfg.modality.name in ("audio", "sound") and cfg.data.batch_size_per_device is None
    setting = (
        f"modality.batch_seconds={most * cfg.modality.max_seconds:g}"
        if by_length
        else f"data.batch_size_per_device={most}"
    )
    steps = -(-setup.samples * setup.accumulate // most)
    return f"{setting} with trainer.accumulate_grad_batches={steps} for as many samples in a step"


# ---------------------------------------------------------------------------------------------------------------------
# On the screen


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def lines_of(facts: dict[str, Any]) -> list[str]:
    """The plan as lines of a table."""
    memory, time, activations = facts["memory"], facts["time"], facts["activations"]
    where = f"{facts['devices']} x {facts['hardware']}, {facts['strategy']}"
    lines = [
        f"{facts['modality']}: {facts['objective']}, {facts['precision']}, attention={facts['attention']}"
        f"{', activation checkpointing' if facts['activation_checkpointing'] else ''}; {where}",
        f"batch of a device: {facts['samples_per_device']} x {facts['sample']}",
        f"global batch: {facts['global_batch']}",
        "",
    ]
    rows = [[f"parameters, {part}", f"{count / 1e6:.1f} M"] for part, count in facts["parameters"].items()]
    rows += [[f"one sample, {part}", f"{count / 1e9:.1f} GFLOP"] for part, count in facts["flops_per_sample"].items()]
    rows.append(["one step on all devices", f"{facts['flops_per_step'] / 1e12:.1f} TFLOP"])
    rows.append([])
    rows += [[f"memory, {part}", _gib(size)] for part, size in memory.items() if size]
    rows.append([])
    rows += [[f"activations, {part}", _gib(size)] for part, size in activations["by_part"].items()]
    rows.append(["activations, of each sample", _gib(activations["per_sample"])])
    if "per_mask" in activations:
        rows.append(["activations, of each mask of all samples", _gib(activations["per_mask"])])
    rows.append([])
    rows.append(["largest batch on a device", f"{facts['largest_batch']} samples"])
    if "largest_masks_per_sample" in facts:
        rows.append(["most masks per sample with this batch", str(facts["largest_masks_per_sample"])])
    rows.append(["time of a step", f"{1000 * time['seconds_per_step']:.0f} ms"])
    rows.append(["samples per second", f"{time['samples_per_second']:.0f}"])
    rows.append([f"time of {time['steps']:,} steps", f"{time['hours']:.1f} h"])
    rows.append(["device hours", f"{time['device_hours']:.1f}"])
    widths = [max(len(row[column]) for row in rows if row) for column in (0, 1)]
    lines += [f"{row[0].ljust(widths[0])}  {row[1].rjust(widths[1])}" if row else "" for row in rows]
    return [*lines, "", *(f"assumed: {assumption}" for assumption in facts["assumptions"])]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
