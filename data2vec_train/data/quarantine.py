"""The list of samples that could not be used."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from data2vec_train.errors import DataError
from data2vec_train.system.outputs import read_rows


class Quarantine:
    """Writes each broken sample once, with its reason, and stops the run when there are too many.

    Only rank 0 writes; `share` sends it what the other processes found.

    Args:
        path: the JSON-lines file; created with the first broken sample.
        num_samples: of the data set; None for a stream, where the number of samples drawn so far is used instead.
        max_bad_fraction: share of broken samples above which the run stops.
        tolerated: up to this number, broken samples never stop the run: in a small folder a few are a large share.
    """

    def __init__(self, *, path: Path, num_samples: int | None, max_bad_fraction: float, tolerated: int) -> None:
        self.path = path
        self.found: dict[str, str] = {}  # since the last `share`
        self.num_samples = num_samples
        self.max_bad_fraction = max_bad_fraction
        self.tolerated = tolerated
        self.reasons: dict[str, str] = {}
        self.written: set[str] = set()
        if path.is_file():  # of the resumed run
            _cut_unfinished_line(path)
            self.written = {str(row.get("key")) for row in read_rows(path)}
        self.drawn = 0  # samples of all processes, as far as this one knows
        self.drawn_here = 0  # since the last `share`

    def add(self, rejected: tuple[tuple[str, str], ...], *, num_good: int) -> None:
        """Record a batch with `num_good` usable samples.

        Raises:
            DataError: more than `max_bad_fraction` of the data is broken.
        """
        self.drawn += num_good + len(rejected)
        self.drawn_here += num_good + len(rejected)
        new = {key: reason for key, reason in rejected if key not in self.reasons}
        self.reasons |= new
        self.found |= new
        self.write(new.items())
        if self._too_many():
            self.stop(f"data.max_bad_fraction={self.max_bad_fraction:g}")

    def write(self, pairs: Iterable[tuple[str, str]]) -> None:
        """List (key, reason) without counting it as broken: samples that are left out on purpose."""
        new = {key: reason for key, reason in pairs if key not in self.written}
        self.written |= new.keys()
        lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in new.items()]
        if lines and rank_zero_only.rank == 0:
            with self.path.open("a") as file:
                file.write("".join(lines))

    def share(self) -> None:
        """Exchange counts and broken samples with the other processes; a collective call.

        The limit is checked again with the next batch.
        """
        everywhere: list[tuple[int, dict[str, str]]] = [(0, {})] * dist.get_world_size()
        dist.all_gather_object(everywhere, (self.drawn_here, self.found))
        self.drawn += sum(drawn for drawn, _ in everywhere) - self.drawn_here
        self.drawn_here, self.found = 0, {}
        for _, found in everywhere:
            self.reasons = found | self.reasons
            self.write(found.items())

    def stop(self, why: str) -> NoReturn:
        """Raise the DataError that names the first broken sample and the file that lists all."""
        key, reason = next(iter(self.reasons.items()), ("none", "no samples were found"))
        raise DataError(
            f"{len(self.reasons)} of {self.num_samples or self.drawn} samples cannot be used ({why}); the first is "
            f"{key}: {reason}. All are listed in {self.path}. Repair or remove them, or raise data.max_bad_fraction"
        )

    def _too_many(self) -> bool:
        # A stream has no size: use the number of samples drawn, but at least 1000.
        total = self.num_samples or max(self.drawn, 1000)
        return len(self.reasons) > max(self.max_bad_fraction * total, self.tolerated)


def _cut_unfinished_line(path: Path) -> None:
    """Remove a last line that a killed process left unfinished, so that the next line is not appended to it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content) and rank_zero_only.rank == 0:  # others may read while rank 0 is already writing
        os.truncate(path, whole)
