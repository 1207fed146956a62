"""The two tables of Hugging Face's page on Data2Vec: image models with eager attention, with sdpa, and ours.

Weights are made for the image size of inference, like published weights, and position biases are interpolated for
training. The page trains on images of 1048 x 640; 1048 is not a multiple of the 16-pixel patch, so 1040 rows are used
here, which is the part of 1048 rows that a patch convolution covers.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data2vec_train.benchmark.context import Bench
from data2vec_train.benchmark.encoder import EAGER, EncoderRun, Mode, compare, write_weights
from data2vec_train.benchmark.measurements import Case


def measure_seed_table(
    bench: Bench,
    *,
    size: dict[str, Any],
    patch_px: int,
    training_px: list[int],
    training_batch: int,
    inference_px: int,
    inference_batches: list[int],
    backend: str,
) -> Iterator[Case]:
    """One case for training steps, and one for each inference batch size."""
    whole = [side // patch_px * patch_px for side in training_px]
    cut = "" if whole == training_px else f" (of {training_px[0]} x {training_px[1]}, which patches do not cover)"
    cases: list[tuple[Mode, str, list[int], int]] = [("step", f"training step{cut}", whole, training_batch)]
    cases += [("inference", "inference", [inference_px, inference_px], batch_size) for batch_size in inference_batches]
    with TemporaryDirectory(prefix="data2vec_benchmark_") as folder:
        write_weights(
            "vision", Path(folder), size=size, image_px=inference_px, patch_px=patch_px, max_tokens=0, vocab_size=0
        )
        for mode, what, (height, width), batch_size in cases:
            name = f"{what}, {batch_size} x {height} x {width} px"
            make = partial(EncoderRun, "vision", folder, (batch_size, 3, height, width), 0, mode, bench.arithmetic)
            yield compare(bench, Case("seed_table", name, EAGER), make, batch_size=batch_size, backend=backend)
