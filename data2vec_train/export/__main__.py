"""`python -m data2vec_train.export checkpoint=... format=hf out=DIR`: weights for other tools."""

from typing import Any

from data2vec_train.config.command import run_command


def _export(cfg: Any) -> None:
    # Imported only after the command is checked: torch takes seconds to load.
    from data2vec_train.export.run import export

    export(cfg)


if __name__ == "__main__":
    run_command(_export, config_name="export")
