"""`python -m data2vec_train.plan +recipes=vision/base_imagenet_v2 hardware=h200`: memory, time, what fits."""

from typing import Any

from data2vec_train.config.command import run_command


def _run(cfg: Any) -> object:
    # Imported only after the command is checked: torch takes seconds to load.
    from data2vec_train.plan.run import plan

    return plan(cfg)


if __name__ == "__main__":
    run_command(_run, config_name="plan")
