"""`python -m data2vec_train modality=vision`: pretraining."""

from omegaconf import DictConfig

from data2vec_train.config import main


def _pretrain(cfg: DictConfig) -> float | None:
    # Imported when the command is known to be right: torch and lightning take seconds to load.
    from data2vec_train.tasks.pretrain import pretrain

    return pretrain(cfg)


if __name__ == "__main__":
    main(_pretrain, config_name="train")
