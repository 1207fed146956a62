"""What a benchmark finds: cases with arms, every single measurement of each, and the ratios that follow from them.

    case     the same work, done by several arms in turn: "vision, training, 1 x 224 px"
    arm      one way to do it: "ours", "transformers sdpa"
    ratio    seconds of the reference arm / seconds of an arm, round by round; above 1 = faster than the reference

A ratio whose range over the rounds includes 1 is not resolved, and arms whose results differ have none.
"""

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """That of some numbers, at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Agreement:
    """Results of an arm beside those of the reference: outputs, gradients, or the reference with itself."""

    what: str
    largest: float  # difference
    allowed: float
    where: str  # the tensor that differs most

    @property
    def holds(self) -> bool:
        """False also when the difference is not a number."""
        return self.largest <= self.allowed

    def __str__(self) -> str:
        return f"{self.what} differ by {self.largest:.2g} ({self.where}), allowed {self.allowed:.2g}"


@dataclass
class Arm:
    """One way to do the work of a case, and what was measured of it.

    Attributes:
        name: of the arm.
        seconds: wall time of one call, a number for each round.
        cpu_seconds: of all threads of this process, likewise.
        calls: that each of these numbers is the mean of.
        agreements: with the reference.
        refused: why it cannot do the work, in a sentence; then nothing was measured.
        items: what one call gets through, by unit: {"samples": 2, "tokens": 394}.
        flops: of one call.
        idle_bytes: of memory, before it works: weights, and on a CPU interpreter and libraries.
        peak_bytes: of memory, these included.
        memory_kind: what `peak_bytes` is: of a process of its own, or of the GPU.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    calls: int = 1
    agreements: list[Agreement] = field(default_factory=list)
    refused: str | None = None
    items: dict[str, float] = field(default_factory=dict)
    flops: int | None = None
    idle_bytes: int | None = None
    peak_bytes: int | None = None
    memory_kind: str | None = None

    @property
    def rates(self) -> dict[str, float]:
        """Items per second, by unit."""
        if not self.seconds:
            return {}
        return {f"{name}/s": count / Spread.of(self.seconds).median for name, count in self.items.items()}

    @property
    def flop_rate(self) -> float | None:
        """Floating-point operations per second."""
        return self.flops / Spread.of(self.seconds).median if self.flops and self.seconds else None


@dataclass
class Case:
    """The same work done by several arms; `reference` names the one that ratios are relative to, None = no ratios."""

    kind: str  # what was asked for: "encoder"
    name: str
    reference: str | None
    arms: list[Arm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(one for one in self.arms if one.name == name)

    def ratio(self, arm: Arm) -> "Ratio | None":
        """How many times as fast as the reference; None for the reference itself, and where there is nothing to say."""
        if self.reference is None or arm.name == self.reference or not arm.seconds:
            return None
        reference = self.arm(self.reference)
        if not reference.seconds:
            return None
        wrong = [str(one) for one in (*reference.agreements, *arm.agreements) if not one.holds]
        if wrong:
            return Ratio(None, None, f"no ratio: {'; '.join(wrong)}")
        return Ratio(_ratios(reference.seconds, arm.seconds), _ratios(reference.cpu_seconds, arm.cpu_seconds), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values: everything that was measured, and what follows from it."""
        plain = dataclasses.asdict(self)
        for one, arm in zip(plain["arms"], self.arms, strict=True):
            ratio = self.ratio(arm)
            one["wall"] = dataclasses.asdict(Spread.of(arm.seconds)) if arm.seconds else None
            one["rates"] = arm.rates
            one["gflop_per_second"] = None if arm.flop_rate is None else arm.flop_rate / 1e9
            one["ratio"] = None if ratio is None else ratio.as_json()
        return plain


@dataclass(frozen=True)
class Ratio:
    """Times as fast as the reference, or why that cannot be said."""

    wall: list[float] | None  # of each round
    cpu: list[float] | None
    refusal: str | None

    @property
    def is_resolved(self) -> bool:
        """Whether all rounds agree on which arm is faster."""
        return self.wall is not None and not min(self.wall) <= 1 <= max(self.wall)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        if self.refusal is not None:
            return {"refusal": self.refusal}
        return {
            "wall": dataclasses.asdict(Spread.of(self.wall)),
            "cpu": dataclasses.asdict(Spread.of(self.cpu)),
            "is_resolved": self.is_resolved,
        }

    def __str__(self) -> str:
        if self.refusal is not None:
            return self.refusal
        return ratio_text(self.wall) + ("" if self.is_resolved else " not resolved")


def ratio_text(ratios: list[float]) -> str:
    """Median and range: "1.24 [1.19..1.40]"."""
    spread = Spread.of(ratios)
    return f"{spread.median:.2f} [{spread.low:.2f}..{spread.high:.2f}]"


def _ratios(reference: list[float], other: list[float]) -> list[float]:
    """Round by round; a process that used no measurable time on the CPU is taken to have used a microsecond."""
    return [max(a, 1e-6) / max(b, 1e-6) for a, b in zip(reference, other, strict=True)]
