"""The YAML files that a run directory keeps."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data2vec_train.errors import ConfigError, disk_fault

COMMAND = ".command.yaml"  # of a run directory: the overrides that the run has


HEAL = "put back a copy of it, or give the run's own command with resume=changed, which writes it again"


MAX_YAML_BYTES = 500_000  # of what a run directory holds; ours have some ten thousand


def read_yaml(file: Path) -> Any:
    """The plain content of a YAML file of a run directory, interpolations as they stand.

    Raises:
        ConfigError: it is damaged.
    """
    size = file.stat().st_size
    if size > MAX_YAML_BYTES:
        raise ConfigError(f"{file} is damaged: it has {size} bytes; {HEAL}")
    try:
        # References can stand for any number of values, and no run writes them.
        events = yaml.parse(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ConfigError(f"{file} is damaged: it has references; {HEAL}")
        return OmegaConf.to_container(OmegaConf.load(file))
    except ConfigError:
        raise
    except (ValueError, OSError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        if disk_fault(error):
            raise
        raise ConfigError(f"{file} is damaged ({type(error).__name__}); {HEAL}") from error
