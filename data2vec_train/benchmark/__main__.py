"""`python -m data2vec_train.benchmark what=[encoder,attention]`: speed, compared with other programs."""

from typing import Any

from data2vec_train.config.command import run_command


def _run(cfg: Any) -> object:
    # Imported only after the command is checked: torch takes seconds to load.
    from data2vec_train.benchmark.run import benchmark

    return benchmark(cfg)


if __name__ == "__main__":
    run_command(_run, config_name="benchmark")
