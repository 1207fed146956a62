"""`python -m data2vec_train.export checkpoint=... format=hf out=DIR`: weights for other tools."""

from omegaconf import DictConfig

from data2vec_train.config import main


def _export(cfg: DictConfig) -> None:
    # Imported when the command is known to be right: torch takes seconds to load.
    from data2vec_train.tasks.export import export

    export(cfg)


if __name__ == "__main__":
    main(_export, config_name="export")
