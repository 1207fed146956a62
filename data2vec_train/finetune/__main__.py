"""`python -m data2vec_train.finetune head=ctc init_from=PATH data=hf data.path=FILE`: train a head on weights."""

from typing import Any

from data2vec_train.config.command import run_command


def _run(cfg: Any) -> object:
    # Imported only after the command is checked: torch takes seconds to load.
    from data2vec_train.finetune.run import finetune

    return finetune(cfg)


if __name__ == "__main__":
    run_command(_run, config_name="finetune", weights="init_from")
