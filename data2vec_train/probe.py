"""`python -m data2vec_train.probe checkpoint=PATH data=folder data.path=DIR`: what each layer knows."""

from omegaconf import DictConfig

from data2vec_train.config import main


def _run(cfg: DictConfig) -> object:
    # Imported when the command is known to be right: torch takes seconds to load.
    from data2vec_train.tasks.probe import probe

    return probe(cfg)


if __name__ == "__main__":
    main(_run, config_name="probe", weights="checkpoint")
