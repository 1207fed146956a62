"""`python -m data2vec_train.embed checkpoint=PATH data=folder data.path=DIR out=FILE.parquet`: features of files."""

from omegaconf import DictConfig

from data2vec_train.config import main


def _run(cfg: DictConfig) -> object:
    # Imported when the command is known to be right: torch takes seconds to load.
    from data2vec_train.tasks.embed import embed

    return embed(cfg)


if __name__ == "__main__":
    main(_run, config_name="embed", weights="checkpoint")
