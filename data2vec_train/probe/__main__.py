"""`python -m data2vec_train.probe checkpoint=PATH data=folder data.path=DIR`: what each layer knows."""

from typing import Any

from data2vec_train.config.command import run_command


def _run(cfg: Any) -> object:
    # Imported when the command is known to be right: torch takes seconds to load.
    from data2vec_train.probe.run import probe

    return probe(cfg)


if __name__ == "__main__":
    run_command(_run, config_name="probe", weights="checkpoint")
