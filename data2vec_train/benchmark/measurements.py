"""Results of a benchmark: cases with arms, all measurements of each, and the ratios computed from them.

    case     the same work, done by several arms in turn: "vision, training, 1 x 224 px"
    arm      one way to do it: "ours", "transformers sdpa"
    ratio    seconds of the reference arm / seconds of an arm, round by round; above 1 = faster than the reference

A ratio whose range over the rounds includes 1 is not resolved. Arms whose results differ have no ratio.
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
        """The spread of at least one number."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Agreement:
    """Comparison of an arm's results with the reference's: outputs or gradients; also the reference with itself."""

    what: str
    largest: float  # largest difference
    allowed: float
    where: str  # the tensor that differs most

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed; False for NaN."""
        return self.largest <= self.allowed

    def __str__(self) -> str:
        return f"{self.what} differ by {self.largest:.2g} ({self.where}), allowed {self.allowed:.2g}"


@dataclass
class Arm:
    """One way to do the work of a case, and its measurements.

    Attributes:
        name: name of the arm.
        seconds: wall time of one call, one number for each round.
        cpu_seconds: CPU time of all threads of this process, one number for each round.
        calls: number of calls that each of these numbers is the mean of.
        agreements: comparisons with the reference.
        refused: why the arm cannot do the work, as a sentence; then nothing was measured.
        items: amount of work of one call, by unit: {"samples": 2, "tokens": 394}.
        flops: floating-point operations of one call.
        idle_bytes: memory before the first call: weights, and on a CPU interpreter and libraries.
        peak_bytes: peak memory, these included.
        memory_kind: what `peak_bytes` measures: a separate process, or the GPU.
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
    """The same work done by several arms; ratios are relative to the arm named `reference`, None = no ratios."""

    kind: str  # an entry of `what`, such as "encoder"
    name: str
    reference: str | None
    arms: list[Arm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def ratio(self, arm: Arm) -> "Ratio | None":
        """How many times faster than the reference; None for the reference itself, and without measurements."""
        if self.reference is None or arm.name == self.reference or not arm.seconds:
            return None
        reference = self.arm(self.reference)
        if not reference.seconds:
            return None
        wrong = [str(agreement) for agreement in (*reference.agreements, *arm.agreements) if not agreement.holds]
        if wrong:
            return Ratio(None, None, f"no ratio: {'; '.join(wrong)}")
        return Ratio(_ratios(reference.seconds, arm.seconds), _ratios(reference.cpu_seconds, arm.cpu_seconds), None)

    def as_json(self) -> dict[str, Any]:
        """All measurements and derived values, as plain values."""
        plain = dataclasses.asdict(self)
        for fields, arm in zip(plain["arms"], self.arms, strict=True):
            ratio = self.ratio(arm)
            fields["wall"] = dataclasses.asdict(Spread.of(arm.seconds)) if arm.seconds else None
            fields["rates"] = arm.rates
            fields["gflop_per_second"] = None if arm.flop_rate is None else arm.flop_rate / 1e9
            fields["ratio"] = None if ratio is None else ratio.as_json()
        return plain


@dataclass(frozen=True)
class Ratio:
    """Speed relative to the reference, or the reason why there is no ratio."""

    wall: list[float] | None  # one ratio for each round
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
    """Ratios by round; times below one microsecond count as one microsecond."""
    return [max(a, 1e-6) / max(b, 1e-6) for a, b in zip(reference, other, strict=True)]
