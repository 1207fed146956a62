"""`python -m data2vec_train.predict checkpoint=PATH data=folder data.path=DIR`: transcripts, labels, maps."""

from omegaconf import DictConfig

from data2vec_train.config import main


def _run(cfg: DictConfig) -> object:
    # Imported when the command is known to be right: torch takes seconds to load.
    from data2vec_train.tasks.predict import predict

    return predict(cfg)


if __name__ == "__main__":
    main(_run, config_name="predict", weights="checkpoint")
