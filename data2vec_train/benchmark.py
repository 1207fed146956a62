"""`python -m data2vec_train.benchmark what=[encoder,attention]`: how fast this is, beside other programs."""

from omegaconf import DictConfig

from data2vec_train.config import main


def _run(cfg: DictConfig) -> object:
    # Imported when the command is known to be right: torch takes seconds to load.
    from data2vec_train.tasks.benchmark import benchmark

    return benchmark(cfg)


if __name__ == "__main__":
    main(_run, config_name="benchmark")
