"""Checks that two arms compute the same; otherwise a comparison of their speed is meaningless."""

from torch import Tensor

from data2vec_train.benchmark.measurements import Agreement

# Gradients below this fraction of the largest are rounding errors: the exact gradient of a key's bias is zero.
NEGLIGIBLE = 1e-6


def outputs_agree(expected: dict[str, Tensor], found: dict[str, Tensor], *, what: str, atol: float) -> Agreement:
    """Largest absolute difference between tensors of the same names."""
    return _agree(expected, found, dict.fromkeys(expected, 1.0), what, atol)


def gradients_agree(expected: dict[str, Tensor], found: dict[str, Tensor], *, what: str, share: float) -> Agreement:
    """Largest difference of each gradient as a fraction of its largest value; negligible gradients are skipped."""
    largest = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    floor = NEGLIGIBLE * max(largest.values())
    return _agree(expected, found, {name: size for name, size in largest.items() if size > floor}, what, share)


def _agree(
    expected: dict[str, Tensor], found: dict[str, Tensor], scales: dict[str, float], what: str, allowed: float
) -> Agreement:
    worst, where = 0.0, "nothing to compare"
    for name, scale in scales.items():
        if name not in found or found[name].shape != expected[name].shape:
            return Agreement(what, float("inf"), allowed, f"{name} is missing or has another shape")
        difference = float((found[name].detach().float() - expected[name].detach().float()).abs().max()) / scale
        if not difference <= worst or where == "nothing to compare":  # also true for NaN
            worst, where = difference, name
        if difference != difference:
            break
    return Agreement(what, worst if scales else float("inf"), allowed, where)
