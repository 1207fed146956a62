"""Which records are held out: decided by the origin of each, so adding files moves no trained record to the held-out.

A record is held out if the hash of its origin (`Source.origins`), as a fraction of 2^64, lies below a threshold. The
order and number of files do not matter, except in three rules for small or unlabelled data sets. A checkpoint stores
their outcome (`Split`), for a run that is resumed with other data.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data2vec_train.data.identity import mixed

UNLABELLED_HELD_OUT = 512
SALT = 156  # see `places`


def places(origins: np.ndarray) -> np.ndarray:
    """(n,) uint64: hash of each origin; salted, since all tables number their rows from 0."""
    return mixed(origins, np.full(len(origins), SALT, dtype=np.uint64))


@dataclass(frozen=True)
class Split:
    """Which records are held out, by their `places`.

    Attributes:
        below: places below this threshold are held out.
        trained: places below the threshold that are trained on: the highest of each class that would be held out whole.
        held_out: a place above the threshold that is held out because none lay below it; or None.
    """

    below: int
    trained: tuple[int, ...]
    held_out: int | None

    def rows(self, origins: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """Indices of the held-out records, ascending; of a labelled source, only origins with a labelled record.

        Args:
            origins: (n,) uint64, see `Source.origins`.
            labels: (n,) int64, -1 where one is missing; or None.
        """
        where = places(origins)
        mask = self._mask(where)
        if labels is not None and (labels < 0).any():
            mask &= np.isin(where, where[mask & (labels >= 0)])
        return np.flatnonzero(mask)

    def _mask(self, where: np.ndarray) -> np.ndarray:
        mask = where < np.uint64(self.below)
        if self.trained:
            mask &= ~np.isin(where, np.array(self.trained, dtype=np.uint64))
        return mask if self.held_out is None else mask | (where == np.uint64(self.held_out))

    def state(self) -> dict[str, Any]:
        """As plain containers, for a checkpoint."""
        return {"below": self.below, "trained": list(self.trained), "held_out": self.held_out}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Split":
        """The inverse of `state`."""
        return cls(state["below"], tuple(state["trained"]), state["held_out"])


def choose(origins: np.ndarray, labels: np.ndarray | None, fraction: float) -> Split:
    """The split of a data set.

    With labels about `fraction` of the labelled records, never all of a class. Without labels at most
    `UNLABELLED_HELD_OUT` origins: the fraction is halved until the limit holds. If there are two origins or more, at
    least one is held out, unless that leaves no training record of a class.

    Args:
        origins: (n,) uint64, see `Source.origins`.
        labels: (n,) int64, -1 where one is missing; or None.
        fraction: to hold out, below 1.
    """
    where = places(origins)
    if labels is not None:
        where, labels = where[labels >= 0], labels[labels >= 0]
    if not fraction or not len(where):
        return Split(0, (), None)
    below = int(fraction * 2**64)
    if labels is None:
        highest = where.max(keepdims=True)
        low = np.unique(where[where < np.uint64(below)])
        while np.searchsorted(low, np.uint64(below)) > UNLABELLED_HELD_OUT:
            below //= 2
    else:
        highest = np.unique(_highest(where, labels))
    split = Split(below, tuple(highest[highest < np.uint64(below)].tolist()), None)
    if not split._mask(where).any():
        others = where[~np.isin(where, highest)]
        split = Split(split.below, split.trained, int(others.min()) if len(others) else None)
    return split


def again(split: Split, origins: np.ndarray, labels: np.ndarray | None) -> Split:
    """The split of a run that is resumed with other data: records that were trained on are never held out.

    As in `choose`, one origin is trained on of each class that would be held out whole.
    """
    where = places(origins)
    if labels is not None:
        where, labels = where[labels >= 0], labels[labels >= 0]
    if not len(where):
        return split
    mask = split._mask(where)
    if labels is None:
        whole = np.array([where.max()] if mask.all() else [], dtype=np.uint64)
    else:
        trains = np.isin(labels, labels[~mask])
        whole = _highest(where[~trains], labels[~trains])
    held_out = None if split.held_out in whole.tolist() else split.held_out
    return Split(split.below, tuple(sorted({*split.trained, *whole.tolist()})), held_out)


def _highest(where: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes,) uint64: the highest place of each class."""
    order = np.lexsort((where, labels))
    ends = np.flatnonzero(np.diff(labels[order], append=labels.max(initial=-1) + 1))
    return where[order][ends]
