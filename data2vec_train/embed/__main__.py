"""`python -m data2vec_train.embed checkpoint=PATH data=folder data.path=DIR out=FILE.parquet`: features of files."""

from typing import Any

from data2vec_train.config.command import run_command


def _run(cfg: Any) -> object:
    # Imported only after the command is checked: torch takes seconds to load.
    from data2vec_train.embed.run import embed

    return embed(cfg)


if __name__ == "__main__":
    run_command(_run, config_name="embed", weights="checkpoint")
