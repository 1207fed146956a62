"""R2 of the student's predictions on held-out samples."""

from collections.abc import Iterable

import torch

from data2vec_train.batch import Batch
from data2vec_train.objective.data2vec import Data2Vec


@torch.no_grad()
def held_out_r2(objective: Data2Vec, batches: Iterable[Batch], *, device: torch.device) -> tuple[float, int, int]:
    """R2, the share of the targets' variance predicted at masked positions; and the number of positions and samples.

    R2 = 1 - sum (p - y)^2 / sum (y - mean y)^2 over all masked positions and channels, with the mean per channel. 1 =
    exact prediction, 0 = no better than predicting the mean, below 0 = worse. Targets come from the current teacher:
    they change during training, and richer targets are harder to predict.

    Args:
        objective: student, teacher and decoder; put into evaluation mode during the call.
        batches: batches with masks.
        device: of the objective.
    """
    was_training = objective.training
    objective.eval()
    count, samples, error = 0, 0, torch.zeros((), dtype=torch.float64, device=device)
    total = squares = 0.0
    try:
        # Use the same decoder noise at each call, and keep the random state of training.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for batch in batches:
                output = objective(batch.to(device))
                y = output.targets.double()
                error += (output.predictions.double() - y).square().sum()
                total, squares = total + y.sum(dim=0), squares + y.square().sum(dim=0)
                count, samples = count + len(y), samples + len(batch)
    finally:
        objective.train(was_training)
    spread = (squares - total.square() / count).sum()
    return float(1 - error / spread.clamp(min=1e-12)), count, samples
