"""Whether two arms compute the same: a comparison of speed says nothing otherwise."""

from torch import Tensor

from data2vec_train.benchmark.measurements import Agreement

# Gradients that are smaller than this share of the largest are rounding: that of a key's bias is zero in truth.
NEGLIGIBLE = 1e-6


def outputs_agree(expected: dict[str, Tensor], found: dict[str, Tensor], *, what: str, atol: float) -> Agreement:
    """Largest difference between tensors of the same names, as it is."""
    return _agree(expected, found, dict.fromkeys(expected, 1.0), what, atol)


def gradients_agree(expected: dict[str, Tensor], found: dict[str, Tensor], *, what: str, share: float) -> Agreement:
    """Largest difference of each gradient as a share of its largest value; negligible gradients are passed over."""
    largest = {name: float(one.abs().max()) for name, one in expected.items()}
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
        if not difference <= worst or where == "nothing to compare":  # also when it is not a number
            worst, where = difference, name
        if difference != difference:
            break
    return Agreement(what, worst if scales else float("inf"), allowed, where)
