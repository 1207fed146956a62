"""The benchmark command: prints tables, and writes all measurements to a file and a chart."""

import dataclasses
import json
import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data2vec_train.benchmark import machine
from data2vec_train.benchmark.attention import measure_attention
from data2vec_train.benchmark.context import Arithmetic, Bench
from data2vec_train.benchmark.ema import measure_ema
from data2vec_train.benchmark.encoder import CLASS, SAMPLE_RATE_HZ, measure_encoder
from data2vec_train.benchmark.loader import measure_loader
from data2vec_train.benchmark.measurements import Case
from data2vec_train.benchmark.originals import original_step
from data2vec_train.benchmark.peers import PEERS, installed
from data2vec_train.benchmark.picture import draw
from data2vec_train.benchmark.published import RECIPES, base_batch, base_config, base_objective, base_update
from data2vec_train.benchmark.seed_table import measure_seed_table
from data2vec_train.benchmark.startup import measure_startup
from data2vec_train.benchmark.steps import our_step
from data2vec_train.benchmark.tables import case_lines, overall, progress_line
from data2vec_train.benchmark.timing import Effort
from data2vec_train.benchmark.whole_step import EAGER, FP32, ORIGINAL, OURS, StepRun, measure_step
from data2vec_train.config.build import build
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.errors import ConfigError
from data2vec_train.paths import config_directory
from data2vec_train.system.outputs import lock_directory, replace_file
from data2vec_train.training.run_directory import command_line

log = logging.getLogger(__name__)

RESULTS, PICTURE = "benchmark.json", "benchmark.png"
FORMAT = 1  # version of the results; increased when the meaning of a field changes


def benchmark(cfg: DictConfig) -> None:
    """Measure what `cfg.what` names.

    Writes `benchmark.json` and `benchmark.png` into Hydra's run directory; they are also written when a later
    measurement fails.

    Raises:
        ConfigError: a setting of `loader.settings` is wrong.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    lock_directory(run_dir)
    kinds = _chosen(cfg.what, MEASURES)
    peers, left_out = installed(_chosen(cfg.against, PEERS), kinds)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    # Imported here because it imports Lightning.
    from data2vec_train.training.precision import choose_precision

    bench = Bench(
        arithmetic=Arithmetic(device, choose_precision(cfg.precision.trainer, torch.device(device).type)),
        effort=Effort(cfg.rounds, cfg.warmups, cfg.min_seconds),
        peers=peers,
        measures_memory=cfg.memory,
        threads=torch.get_num_threads(),
        tolerance=cfg.tolerance,
    )
    facts: dict[str, Any] = {
        "format": FORMAT,
        "command": command_line("data2vec_train.benchmark"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine.describe(bench.device),
        "left_out": left_out,
        "settings": OmegaConf.to_container(cfg, resolve=True),
    }
    log.info("%s", _machine_line(facts["machine"]))
    for line in left_out:
        log.info("%s", line)
    rates = _matmul_rates(cfg, bench)
    cases: list[Case] = []
    try:
        for kind in kinds:
            with _other_configs():
                for case in MEASURES[kind](cfg, bench):
                    cases.append(case)
                    log.info("%s", progress_line(case))
    finally:
        if cases:
            rates += _matmul_rates(cfg, bench)
            _write(cases, facts, rates, cfg.peak.stated_tflops, run_dir)


@contextmanager
def _other_configs() -> Iterator[None]:
    """Clear, then restore Hydra's global state, so that training configs can be composed within this command."""
    state = GlobalHydra.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.set_state(state)


def _write(
    cases: list[Case], facts: dict[str, Any], rates: list[float], stated_tflops: float | None, run_dir: Path
) -> None:
    peak, means = max(rates), overall(cases)
    stated_peak = None if stated_tflops is None else stated_tflops * 1e12
    facts["machine"]["load_average_at_the_end"] = machine.load_average()
    facts["matmul_flops_per_second"] = rates
    facts["geometric_means"] = {name: dataclasses.asdict(mean) for name, mean in means.items()}
    facts["cases"] = [case.as_json() for case in cases]
    for plain in facts["cases"]:
        for arm in plain["arms"]:
            rate = arm["gflop_per_second"]
            arm["share_of_peak"] = None if rate is None else rate * 1e9 / peak
            arm["share_of_stated_peak"] = None if rate is None or stated_peak is None else rate * 1e9 / stated_peak
    replace_file(run_dir / RESULTS, json.dumps(facts, indent=1).encode() + b"\n")
    draw(cases, run_dir / PICTURE, title=_machine_line(facts["machine"]))
    for case in cases:
        log.info("\n%s", "\n".join(case_lines(case, peak=peak, stated_peak=stated_peak)))
    for name, mean in means.items():
        log.info("\n%s: %s", name, mean)
    log.info("\npeak of matrix products: %.4g GFLOP/s; %s", peak / 1e9, run_dir / RESULTS)


def _machine_line(facts: dict[str, Any]) -> str:
    load = facts["load_average"]
    return (
        f"{facts['device_name']}, {facts['threads']} of {facts['cores']} cores, torch {facts['torch']}, load "
        f"{'unknown' if load is None else load[0]}"
    )


def _matmul_rates(cfg: DictConfig, bench: Bench) -> list[float]:
    dtype = bench.arithmetic.dtype
    return machine.matmul_rates(side=cfg.peak.side, repeats=cfg.peak.repeats, dtype=dtype, device=bench.device)


# ---------------------------------------------------------------------------------------------------------------------
# From settings to measurements


def _chosen(value: object, names: Iterable[str]) -> list[str]:
    """The names as a list, from one name, a list, or "all"."""
    if value == "all":
        return list(names)
    return [value] if isinstance(value, str) else list(value)


def _modalities(cfg: DictConfig) -> list[str]:
    return _chosen(cfg.modalities, CLASS)


def _settings(cfg: DictConfig, name: str) -> dict[str, Any]:
    return OmegaConf.to_container(cfg[name], resolve=True)


def _step(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    options = cfg.step
    lengths = {
        "vision": (0, f"{options.image_px} px"),
        "audio": (round(options.audio_seconds * SAMPLE_RATE_HZ), f"{options.audio_seconds:g} s"),
        "text": (options.text_tokens, f"{options.text_tokens} tokens"),
    }
    sizes = ("dim", "depth", "num_heads", "ffn_dim", "conv_dim")
    settings = [f"size.{name}={cfg.size[name]}" for name in sizes if name in cfg.size]
    settings += [f"attention.backend={cfg.attention.backend}", *shlex.split(options.settings)]
    for modality in _modalities(cfg):
        length, amount = lengths[modality]
        own = [f"modality.image_px={options.image_px}"] if modality == "vision" else []
        for objective in options.objectives:
            recipe = [f"+recipes={RECIPES[modality, objective]}", "data.path=."]  # no data is read
            _check([*recipe, *settings, *own], on_this_machine=False)
            make = partial(_step_run, modality, objective, (*settings, *own), options.batch_size, length, cfg.compile)
            yield from measure_step(
                bench,
                name=f"{modality} {objective}, {options.batch_size} x {amount}",
                make=lambda arm, make=make: partial(make, bench.arithmetic, arm),
                beside=list(options.beside),
                loss_tolerance=options.loss_tolerance,
            )


def _step_run(
    modality: str,
    objective: str,
    settings: tuple[str, ...],
    samples: int,
    length: int,
    how: bool | str,
    arithmetic: Arithmetic,
    arm: str,
) -> StepRun:
    """A step at the published settings, ours compiled according to `how`; may run in a new process."""
    if arm == FP32:
        arithmetic = Arithmetic(arithmetic.device, "32-true")
    plain = ("attention.backend=eager",) if arm in (FP32, EAGER) else ()
    cfg = base_config(modality, objective, *settings, *plain)
    ours = base_objective(cfg).to(arithmetic.device)
    batch = base_batch(cfg, ours, samples=samples, length=length).to(arithmetic.device)
    # With a learning rate of 0 a step does all its work, but weights stay the same after any number of steps.
    update = dataclasses.replace(base_update(cfg), lr=0.0)
    if arm == ORIGINAL:
        return StepRun(original_step(modality, objective, ours=ours, batch=batch, update=update), batch, arithmetic)
    if arm == OURS and how:
        from data2vec_train.training.precision import compile_blocks

        kind = torch.device(arithmetic.device).type
        compile_blocks(ours, how=how, device=kind, lengths_vary=False, backend="inductor")
    return StepRun(our_step(ours, batch, update), batch, arithmetic)


def _attention(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    return measure_attention(bench, **_settings(cfg, "backends"))


def _encoder(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    return measure_encoder(
        bench,
        modalities=_modalities(cfg),
        size=_settings(cfg, "size"),
        backend=cfg.attention.backend,
        **_settings(cfg, "encoder"),
    )


def _ema(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    return measure_ema(bench, size=_settings(cfg, "size"), **_settings(cfg, "ema"))


def _startup(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    options = _settings(cfg, "startup")
    return measure_startup(bench, demo=shlex.split(options.pop("demo")), **options)


def _seed_table(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    options = _settings(cfg, "seed_table")
    return measure_seed_table(bench, size=_settings(cfg, "size"), backend=cfg.attention.backend, **options)


def _loader(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    # Imported here because they import Lightning.
    from data2vec_train.training.assemble import build_data, quiet_libraries
    from data2vec_train.training.records import build_sources

    quiet_libraries()
    options = _settings(cfg, "loader")
    settings = shlex.split(options.pop("settings"))
    for modality in _modalities(cfg):
        train = _training_config([f"modality={modality}", *settings])
        encoder = build(train.modality.encoder)

        def make(workers: int, train: DictConfig = train, encoder: Any = encoder) -> Any:
            train.data.num_workers = workers
            run_dir = Path(HydraConfig.get().runtime.output_dir)
            return build_data(train, build_sources(train.data), encoder=encoder, run_dir=run_dir)

        name = " ".join([modality, *settings])
        yield from measure_loader(bench, name=name, make=make, **options)


def _check(overrides: list[str], *, on_this_machine: bool) -> None:
    """Raise ConfigError with all errors of a training command with these settings."""
    faults = find_faults(overrides, config_name="train", multirun=False, on_this_machine=on_this_machine)
    if faults:
        raise ConfigError("; ".join(faults))


def _training_config(overrides: list[str]) -> DictConfig:
    _check(overrides, on_this_machine=True)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose("train", overrides=overrides)


MEASURES: dict[str, Callable[[DictConfig, Bench], Iterator[Case]]] = {
    "step": _step,
    "attention": _attention,
    "encoder": _encoder,
    "loader": _loader,
    "ema": _ema,
    "startup": _startup,
    "seed_table": _seed_table,
}
