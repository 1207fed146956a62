"""`python -m data2vec_train.predict checkpoint=PATH data=folder data.path=DIR`: transcripts, labels, maps."""

from typing import Any

from data2vec_train.config.command import run_command


def _run(cfg: Any) -> object:
    # Imported only after the command is checked: torch takes seconds to load.
    from data2vec_train.predict.run import predict

    return predict(cfg)


if __name__ == "__main__":
    run_command(_run, config_name="predict", weights="checkpoint")
