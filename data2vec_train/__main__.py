"""`python -m data2vec_train modality=vision`: pretraining."""

from typing import Any

from data2vec_train.config.command import run_command


def _pretrain(cfg: Any) -> float | None:
    # Imported after the command has been checked: torch and lightning take seconds to load.
    from data2vec_train.pretrain.run import pretrain

    return pretrain(cfg)


if __name__ == "__main__":
    run_command(_pretrain, config_name="train")
