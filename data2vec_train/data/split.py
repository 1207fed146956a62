"""Which records are held out: a function of what each comes from, so that new files move none into the held-out part.

A record is held out when the hash of its origin (`Source.origins`) lies below a threshold, its share of all hashes.
Neither the order of files nor their number matters, but for three rules that a small or unlabelled data set needs, and
a checkpoint keeps what they gave, for the run that goes on with other data.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data2vec_train.data.identity import mixed

UNLABELLED_HELD_OUT = 512
SALT = 156  # of these hashes, see `places`


def places(origins: np.ndarray) -> np.ndarray:
    """(n,) uint64: where the origins lie between 0 and 2^64; salted, since tables count their rows from 0 alike."""
    return mixed(origins, np.full(len(origins), SALT, dtype=np.uint64))


@dataclass(frozen=True)
class Split:
    """What is held out.

    Attributes:
        below: places below it are held out.
        trained: places below that train all the same: the highest of a class that would be held out whole.
        held_out: a place above that is held out, since none was below; or None.
    """

    below: int
    trained: tuple[int, ...]
    held_out: int | None

    def rows(self, origins: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """Indices of the held-out records, ascending; of a labelled source, of labelled ones and their like.

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
        """See `state`."""
        return cls(state["below"], tuple(state["trained"]), state["held_out"])


def choose(origins: np.ndarray, labels: np.ndarray | None, fraction: float) -> Split:
    """The split of a data set.

    With labels about `fraction` of the labelled records, never all of a class. Without labels, at most
    `UNLABELLED_HELD_OUT` origins: the fraction is halved until they are no more. Of two origins or more one is held out
    at least, unless that leaves nothing of a class.

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
    """The split of a run that goes on with other data: what trained is never held out.

    Of a class that would be held out whole one origin trains, as in `choose`.
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
