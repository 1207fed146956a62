"""The interface of a head for fine-tuning: from records to batches, from outputs to losses, predictions and scores.

There is a `HeadTask` for each of the twelve heads. It is independent of files and optimizers: records come from a
`Source`, and the training module calls `loss`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data2vec_train.data.dataset import Sample
from data2vec_train.data.sources.files import RawSample, Source
from data2vec_train.errors import DataError
from data2vec_train.weights.base import PretrainedModel

Scores = dict[str, float]
NO_LABEL = -100  # ignored by losses
NOTHING_KNOWN = "no test record has a label, so there is nothing to score; leave data.test_source out"


@dataclass(frozen=True)
class Inputs:
    """How the content of a record becomes input of the encoder; the fields that are set depend on the modality."""

    modality: str = ""  # its name; "" = that of the task
    decode: Callable[[Any], Any] | None = None  # encoded value -> waveform or image
    transform: Any = None  # has `train` and `evaluate`: decoded -> tensor
    token_count: Callable[[int], int] | None = None  # length of an input -> tokens
    tokenizer: Any = None  # `weights.tokenizers.TextTokenizer`
    max_tokens: int = 0  # longest text, special tokens included
    encodings: Sequence[str] = ()  # encodings of text files, tried in this order
    dim: int = 0  # D, width of the encoder
    sample_rate_hz: int = 0
    pad_value: float = 0.0  # appended to shorter inputs of a plugin's modality
    blocks: Callable[[Source], Source] | None = None  # documents -> blocks of ids, for language models


@dataclass(frozen=True)
class Examples:
    """A batch.

    Attributes:
        inputs: arguments of the model, (B, ...) each.
        targets: tensors that only the loss needs, on the device.
        host: tensors that stay on the host, such as lengths whose values the loss reads.
        references: for each example, the value that its prediction is compared with; None = unknown.
        keys: names of the records.
        places: indices of the records in the source.
        rejected: (key, reason) of records that could not be used.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor] = field(default_factory=dict)
    host: dict[str, Tensor] = field(default_factory=dict)
    references: tuple[Any, ...] = ()
    keys: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Examples":
        """A copy with `inputs` and `targets` on a device."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}

        return replace(self, inputs=moved(self.inputs), targets=moved(self.targets))

    def pin_memory(self) -> "Examples":
        """A copy with `inputs` and `targets` in pinned host memory."""

        def pinned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}

        return replace(self, inputs=pinned(self.inputs), targets=pinned(self.targets))


class Meter(ABC):
    """Accumulates the scores of a data set, batch by batch."""

    @abstractmethod
    def update(self, outputs: Mapping[str, Any], batch: Examples) -> None:
        """Add a batch."""

    @abstractmethod
    def compute(self) -> Scores:
        """The scores of all batches so far."""


class PredictionMeter(Meter):
    """Stores the predictions of all examples that have a reference, and scores them together."""

    def __init__(self, task: "HeadTask") -> None:
        self.task = task
        self.predictions: list[Any] = []
        self.references: list[Any] = []
        self.keys: list[str] = []

    def update(self, outputs: Mapping[str, Any], batch: Examples) -> None:
        """Store the predictions of the batch's examples that have a reference."""
        rows = zip(self.task.predictions(outputs, batch), batch.references, batch.keys, strict=True)
        for prediction, reference, key in rows:
            if reference is not None:
                self.predictions.append(prediction)
                self.references.append(reference)
                self.keys.append(key)

    def compute(self) -> Scores:
        """The scores of all stored predictions.

        Raises:
            DataError: no record had a reference.
        """
        if not self.references:
            raise DataError(NOTHING_KNOWN)
        return self.task.score(self.predictions, self.references)


class HeadTask(ABC):
    """The task of a head.

    The order of calls: `setup` with the training records, `model_settings` for the model, then `example` and `collate`
    in the loader processes, `loss` in training, `meter` to score a data set, `predictions` for output files.

    Attributes:
        model_class: name of one of the fifteen model classes, or of the one for encoders of plugins.
        modality: the modality of the encoder.
        metric: the score that chooses the best checkpoint.
        lower_is_better: whether a lower score is better.
        same_classes: whether test records must have the classes of the training records.
        may_crop: whether a crop of a record keeps the record's label.
        class_names: the meaning of labels 0, 1, ...; None before `setup`, and for heads without classes.
    """

    model_class: ClassVar[str]
    modality: ClassVar[str]
    metric: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    same_classes: ClassVar[bool] = True
    may_crop: bool = True
    class_names: list[str] | None = None

    def __init__(self, *, inputs: Inputs) -> None:
        self.inputs = inputs

    @property
    def input_fields(self) -> list[str]:
        """Columns of the records, besides their content, that predictions are made from."""
        return []

    @property
    def label_fields(self) -> list[str]:
        """Columns of the records, besides their class, that hold labels."""
        return []

    @property
    def column(self) -> str | None:
        """The column with the content of a record; None = the first one of the modality's kind."""
        return None

    @property
    def needs_classes(self) -> bool:
        """Whether the head learns the class of a record."""
        return False

    def prepare(self, source: Source) -> Source:
        """The records to train on, if they are not the records of the files themselves."""
        return source

    def setup(self, source: Source, rows: np.ndarray) -> None:
        """Collect from the training records what is needed to build the model, such as the class names.

        Args:
            source: the records.
            rows: (n,) indices of the training records.

        Raises:
            DataError: this head cannot be trained on the records, with the reason.
        """
        if self.needs_classes:
            labels = source.labels()
            if labels is None or not len(source.class_names or ()):
                raise DataError(
                    "the records have no classes: put files into a folder for each class, or name the column with "
                    "data.label_column"
                )
            present = np.unique(labels[rows][labels[rows] >= 0])
            if len(present) < 2:
                found = ", ".join(source.class_names[label] for label in present) or "none"
                raise DataError(f"classes among the training records: {found}; expected at least two")
            self.class_names = list(source.class_names)

    @property
    def outputs(self) -> list[str] | None:
        """The meaning of each output of the model, after `setup`; None if outputs are not classes."""
        return self.class_names

    def usable(self, source: Source) -> np.ndarray:
        """Indices of the records that have labels, which can train and test the head; ascending."""
        known = np.ones(len(source), dtype=bool)
        if self.needs_classes and source.labels() is not None:
            known &= source.labels() >= 0
        for name in self.label_fields:
            known &= np.array([value is not None for value in source.column(name)], dtype=bool)
        return np.flatnonzero(known)

    def unusable(self, source: Source, rows: np.ndarray) -> list[tuple[int, str]]:
        """The rows whose labels cannot be learned, with the reason; after `setup`."""
        return []

    def check_test(self, source: Source) -> None:
        """Refuse test records whose labels have another meaning than those of the training records.

        Raises:
            DataError: they have.
        """
        if self.needs_classes and source.class_names != self.class_names:
            raise DataError(_other_classes(source.class_names, self.class_names))

    def check_held_out(self, source: Source, rows: np.ndarray) -> None:  # noqa: B027 - most score any
        """Refuse held-out records that cannot be scored.

        Raises:
            DataError: they cannot.
        """

    def setup_from_pretrained(self, model: PretrainedModel) -> None:
        """Replaces `setup`: take the same information from a trained model."""
        self.class_names = [model.config.id2label[number] for number in range(model.config.num_labels)]

    def continues(self, model: PretrainedModel) -> bool:
        """Whether the outputs of the model's head have the same meaning as in this task; after `setup`."""
        names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        return self.class_names in (None, names)

    def model_settings(self) -> dict[str, Any]:
        """Fields of the model's config."""
        if self.class_names is None:
            return {}
        return {"id2label": dict(enumerate(self.class_names)), "label2id": None, "num_labels": len(self.class_names)}

    def start_head(self, model: PretrainedModel) -> None:  # noqa: B027 - likewise
        """Change the initial weights of a new head."""

    def save(self, folder: Path) -> None:  # noqa: B027 - most tasks have nothing to add
        """Write what prediction needs beyond weights, config and the encoder's preprocessing."""

    @abstractmethod
    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """One record as input of `collate`; torch's CPU generator is seeded for it. Labels may be missing.

        Args:
            raw: the record.
            train: whether to augment it.
            rng: also seeded for the record.

        Raises:
            BadSample: the record cannot be used.
        """

    @abstractmethod
    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """A batch of results of `example`; the caller fills in keys and rejected records."""

    def loss(self, model: PretrainedModel, batch: Examples) -> tuple[Tensor | None, Mapping[str, Any]]:
        """The mean loss over the batch's examples (None without labels), and the model's outputs."""
        outputs = model(**batch.inputs)
        return outputs.get("loss"), outputs

    def counted(self, batch: Examples) -> int:
        """The number of the batch's examples that the loss averages over."""
        return len(batch)

    def predict(self, model: PretrainedModel, batch: Examples) -> list[Any]:
        """Predictions for a batch, with or without labels."""
        _, outputs = self.loss(model, batch)
        return self.predictions(outputs, batch)

    def meter(self) -> Meter:
        """A new meter that scores a data set."""
        return PredictionMeter(self)

    @abstractmethod
    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[Any]:
        """The prediction for each example, as plain values."""

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """Scores of predictions, by name; fractions of 1 unless documented otherwise."""
        raise TypeError(f"{type(self).__name__} has a meter of its own")


class Collate:
    """Samples of a task -> `Examples`; runs in the loader processes."""

    def __init__(self, task: HeadTask, *, train: bool, seed: int) -> None:
        self.task = task
        self.train = train
        self.seed = seed

    def __call__(self, samples: Sequence[Sample]) -> Examples:
        """Make a batch; records that cannot be used are left out and listed in `rejected`."""
        from data2vec_train.data.seeding import generator, torch_seeded

        rejected = tuple(pair for sample in samples for pair in sample.rejected)
        good = [sample for sample in samples if sample.inputs is not None]
        if not good:
            return Examples({}, rejected=rejected)
        place = (good[0].epoch, good[0].id)
        with torch_seeded(self.seed, "batch", *place):
            examples = [sample.inputs for sample in good]
            batch = self.task.collate(examples, train=self.train, rng=generator(self.seed, "batch", *place))
        keys = tuple(example["key"] for example in examples)
        return replace(batch, keys=keys, places=tuple(sample.id for sample in good), rejected=rejected)


def padded(rows: Sequence[Any], value: float, length: int | None = None) -> Tensor:
    """Rows (n_i, ...) as one tensor (B, longest, ...), padded at the end with `value`."""
    tensors = [torch.as_tensor(np.asarray(row)) for row in rows]
    longest = max(len(tensor) for tensor in tensors) if length is None else length
    filled = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[1:]), value)
    for place, tensor in zip(filled, tensors, strict=True):
        place[: len(tensor)] = tensor[:longest]
    return filled


def real_places(lengths: Sequence[int]) -> Tensor:
    """(B, longest) bool, True at positions inside a row, False at padding."""
    sizes = torch.tensor(list(lengths))
    return torch.arange(int(sizes.max())) < sizes[:, None]


def _other_classes(found: Sequence[str] | None, expected: Sequence[str]) -> str:
    if not found:
        return (
            "test records have no classes: put files into a folder for each class, or name the column with "
            "data.label_column"
        )
    new = [name for name in found if name not in expected]
    if new:
        return f"test records have the class {new[0]}, which no training record has; known: {', '.join(expected[:10])}"
    return f"test records have the classes {found[:10]}, training records {expected[:10]}; they must be the same"
