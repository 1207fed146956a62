"""`python -m data2vec_train.probe checkpoint=PATH data=folder data.path=DIR`: accuracy of each layer."""

from typing import Any

from data2vec_train.config.command import run_command


def _run(cfg: Any) -> object:
    # Imported only after the command is checked: torch takes seconds to load.
    from data2vec_train.probe.run import probe

    return probe(cfg)


if __name__ == "__main__":
    run_command(_run, config_name="probe", weights="checkpoint")
