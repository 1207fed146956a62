"""`python -m data2vec_train.finetune head=ctc init_from=PATH data=hf data.path=FILE`: a head on trained weights."""

from omegaconf import DictConfig

from data2vec_train.config import main


def _run(cfg: DictConfig) -> object:
    # Imported when the command is known to be right: torch takes seconds to load.
    from data2vec_train.tasks.finetune import finetune

    return finetune(cfg)


if __name__ == "__main__":
    main(_run, config_name="finetune", weights="init_from")
