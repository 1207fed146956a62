"""Measuring: a table on the screen, every single number in a file, and a picture."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data2vec_train.bench import machine
from data2vec_train.bench.attention import measure_attention
from data2vec_train.bench.context import Arithmetic, Bench
from data2vec_train.bench.ema import measure_ema
from data2vec_train.bench.encoder import measure_encoder
from data2vec_train.bench.loader import measure_loader
from data2vec_train.bench.measurements import Case
from data2vec_train.bench.peers import installed
from data2vec_train.bench.picture import draw
from data2vec_train.bench.seed_table import measure_seed_table
from data2vec_train.bench.startup import measure_startup
from data2vec_train.bench.tables import case_lines, overall, progress_line
from data2vec_train.bench.timing import Effort
from data2vec_train.config import build
from data2vec_train.errors import ConfigError
from data2vec_train.places import config_directory
from data2vec_train.preflight import find_faults
from data2vec_train.tasks.run_report import command_line

log = logging.getLogger(__name__)

RESULTS, PICTURE = "benchmark.json", "benchmark.png"
FORMAT = 1  # of the results; counted up when a field changes its meaning


def benchmark(cfg: DictConfig) -> None:
    """Measure what `cfg.what` names.

    Writes `benchmark.json` and `benchmark.png` into Hydra's run directory; what is found is also there when a later
    measurement fails.

    Raises:
        ConfigError: nothing to measure, or a setting of `loader.settings` is wrong.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    kinds = [cfg.what] if isinstance(cfg.what, str) else list(cfg.what)
    against = [cfg.against] if isinstance(cfg.against, str) else list(cfg.against or [])
    peers, left_out = installed(against)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    bench = Bench(
        arithmetic=Arithmetic(device, cfg.precision.trainer),
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
            for case in MEASURES[kind](cfg, bench):
                cases.append(case)
                log.info("%s", progress_line(case))
    finally:
        if cases:
            rates += _matmul_rates(cfg, bench)
            _write(cases, facts, rates, run_dir)


def _write(cases: list[Case], facts: dict[str, Any], rates: list[float], run_dir: Path) -> None:
    peak, means = max(rates), overall(cases)
    facts["machine"]["load_average_at_the_end"] = machine.load_average()
    facts["matmul_flops_per_second"] = rates
    facts["geometric_means"] = means
    facts["cases"] = [case.as_json() for case in cases]
    for plain in facts["cases"]:
        for arm in plain["arms"]:
            rate = arm["gflop_per_second"]
            arm["share_of_peak"] = None if rate is None else rate * 1e9 / peak
    (run_dir / RESULTS).write_text(json.dumps(facts, indent=1) + "\n")
    draw(cases, run_dir / PICTURE, title=_machine_line(facts["machine"]))
    for case in cases:
        log.info("\n%s", "\n".join(case_lines(case, peak=peak)))
    for name, mean in means.items():
        log.info("\n%s: %.2f, the geometric mean", name, mean)
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


def _settings(cfg: DictConfig, name: str) -> dict[str, Any]:
    return OmegaConf.to_container(cfg[name], resolve=True)


def _attention(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    return measure_attention(bench, **_settings(cfg, "backends"))


def _encoder(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    return measure_encoder(
        bench,
        modalities=list(cfg.modalities),
        size=_settings(cfg, "size"),
        backend=cfg.attention.backend,
        **_settings(cfg, "encoder"),
    )


def _ema(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    return measure_ema(bench, size=_settings(cfg, "size"), **_settings(cfg, "ema"))


def _startup(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    return measure_startup(bench, **_settings(cfg, "startup"))


def _seed_table(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    options = _settings(cfg, "seed_table")
    return measure_seed_table(bench, size=_settings(cfg, "size"), backend=cfg.attention.backend, **options)


def _loader(cfg: DictConfig, bench: Bench) -> Iterator[Case]:
    # Lightning comes with these.
    from data2vec_train.tasks.pretrain import build_data, quiet_libraries

    quiet_libraries()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    options = _settings(cfg, "loader")
    settings = options.pop("settings")
    for modality in cfg.modalities:
        train = training_config([f"modality={modality}", *settings])
        encoder = build(train.modality.encoder)

        def make(workers: int, train: DictConfig = train, encoder: Any = encoder) -> Any:
            train.data.num_workers = workers
            return build_data(train, encoder=encoder, run_dir=run_dir)

        name = " ".join([modality, *settings])
        yield from measure_loader(bench, name=name, make=make, **options)


def training_config(overrides: list[str]) -> DictConfig:
    """What a training command with these settings would have.

    Raises:
        ConfigError: it would not start.
    """
    faults = find_faults(overrides, config_name="train", multirun=False, on_this_machine=True)
    if faults:
        raise ConfigError("; ".join(faults))
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose("train", overrides=overrides)


MEASURES: dict[str, Callable[[DictConfig, Bench], Iterator[Case]]] = {
    "attention": _attention,
    "encoder": _encoder,
    "loader": _loader,
    "ema": _ema,
    "startup": _startup,
    "seed_table": _seed_table,
}
