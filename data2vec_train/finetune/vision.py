"""The two image heads: a class for an image, and a class for every pixel.

Letters: B images, C classes, (H, W) pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.data.image import read, to_tensor
from data2vec_train.data.sources.files import RawSample, Source
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.finetune.base import NOTHING_KNOWN, Examples, HeadTask, Inputs, Meter, Scores
from data2vec_train.finetune.metrics import classification_scores, segmentation_scores
from data2vec_train.finetune.speech import class_predictions
from data2vec_train.weights.base import PretrainedModel

NO_CLASS = 255  # a pixel without a class


class ImageClassification(HeadTask):
    """A class for an image, optionally trained on mixed images (ALGORITHM.md 4.3).

    Args:
        inputs: see `Inputs`; its transform augments single images.
        mixup: alpha of the Beta distribution of the blending weight of two images; 0 = no mixup.
        cutmix: alpha of the Beta distribution of the area pasted from another image; 0 = no cutmix.
        mix_probability: probability that a batch is mixed; with both kinds, each is used in half of the cases.
        label_smoothing: fraction of the label that is spread over all classes.
        init_scale: factor on the initial weights of a new head.
    """

    model_class = "Data2VecVisionForImageClassification"
    modality = "vision"
    metric = "accuracy"
    needs_classes = True

    def __init__(
        self,
        *,
        inputs: Inputs,
        mixup: float,
        cutmix: float,
        mix_probability: float,
        label_smoothing: float,
        init_scale: float = 1.0,  # default for models saved before this setting existed
    ) -> None:
        super().__init__(inputs=inputs)
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value < 0:
                raise ConfigError(f"head.{name}={value}: expected 0 or a positive number")
        if not 0 <= mix_probability <= 1 or not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"head.mix_probability={mix_probability} head.label_smoothing={label_smoothing}: expected numbers from "
                "0 to 1 (label_smoothing below 1)"
            )
        self.mixup, self.cutmix = float(mixup), float(cutmix)  # torchvision cannot sample with an int
        self.mix_probability = mix_probability
        self.label_smoothing = label_smoothing
        self.init_scale = init_scale

    @torch.no_grad()
    def start_head(self, model: PretrainedModel) -> None:
        """Scale the initial weights of a new head by `init_scale`."""
        model.classifier.weight.mul_(self.init_scale)

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The pixels and the class of an image."""
        image = self.inputs.decode(raw.value)
        transform = self.inputs.transform.train if train else self.inputs.transform.evaluate
        return {"key": raw.key, "pixels": transform(image), "label": raw.label}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Pixels and labels, in training mixed by mixup or cutmix."""
        pixels = torch.stack([example["pixels"] for example in examples])
        labels = tuple(example["label"] for example in examples)
        if any(label is None for label in labels):
            return Examples({"pixel_values": pixels}, references=labels)
        classes = torch.tensor(labels)
        kinds = [(kind, alpha) for kind, alpha in (("MixUp", self.mixup), ("CutMix", self.cutmix)) if alpha]
        if train and kinds and len(examples) > 1 and rng.random() < self.mix_probability:
            from torchvision.transforms import v2

            kind, alpha = kinds[int(rng.integers(len(kinds)))]
            pixels, classes = getattr(v2, kind)(alpha=alpha, num_classes=len(self.class_names))(pixels, classes)
        return Examples({"pixel_values": pixels}, {"labels": classes}, references=labels)

    def loss(self, model: PretrainedModel, batch: Examples) -> tuple[Tensor | None, Mapping[str, Any]]:
        """Cross entropy with classes (B,), or with probabilities of classes (B, C)."""
        outputs = model(**batch.inputs)
        if "labels" not in batch.targets:
            return None, outputs
        smoothing = self.label_smoothing if model.training else 0.0
        logits = outputs["logits"].float()
        return F.cross_entropy(logits, batch.targets["labels"], label_smoothing=smoothing), outputs

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[dict[str, Any]]:
        """Class names with their probabilities."""
        found = class_predictions(outputs["logits"], self.class_names)
        if len(self.class_names) > 5:
            best = outputs["logits"].topk(5, dim=-1).indices.tolist()
            found = [prediction | {"best_five": five} for prediction, five in zip(found, best, strict=True)]
        return found

    def score(self, predictions: Sequence[dict[str, Any]], references: Sequence[int]) -> Scores:
        """Accuracy, F1, Matthews correlation, and `top5` with more than five classes."""
        scores = classification_scores(
            [prediction["index"] for prediction in predictions], references, len(self.class_names)
        )
        if predictions and "best_five" in predictions[0]:
            among = [
                label in prediction["best_five"] for prediction, label in zip(predictions, references, strict=True)
            ]
            scores["top5"] = float(np.mean(among))
        return scores


class SegmentationMeter(Meter):
    """Counts pixels by true and predicted class, at the size of the reference maps."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, outputs: Mapping[str, Any], batch: Examples) -> None:
        """Add the pixels of the batch's images that have a map."""
        for row, wanted in enumerate(batch.references):
            if wanted is None:
                continue
            found = map_of(outputs["logits"][row], wanted.shape)
            reference = torch.from_numpy(wanted.astype(np.int64))
            real = reference != NO_CLASS
            pairs = reference[real] * self.num_classes + found[real]
            counts = torch.bincount(pairs, minlength=self.num_classes**2)
            self.confusion += counts.view(self.num_classes, self.num_classes)

    def compute(self) -> Scores:
        """Mean intersection over union, and accuracy.

        Raises:
            DataError: no image had a map.
        """
        if not self.confusion.any():
            raise DataError(NOTHING_KNOWN)
        return segmentation_scores(self.confusion)


def map_of(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Classes (H, W) int64 on the host, from logits (C, h, w)."""
    resized = F.interpolate(logits[None].float(), size=tuple(size), mode="bilinear", align_corners=False)
    return resized[0].argmax(dim=0).cpu()


class SemanticSegmentation(HeadTask):
    """A class for every pixel (ALGORITHM.md 4.3: UPerNet as configured for BEiT).

    Training: a random crop of a random size, flipped at random. Scoring: the whole image at the model's size, the
    prediction resized to the size of the reference map.

    Args:
        inputs: see `Inputs`.
        map_column: column of images with a class number in every pixel; None = the files in `maps`.
        maps: folder with a .png for each image, at the same relative path; None = `map_column`.
        classes: the names of the classes, or their number.
        reduce_labels: 0 in a map means no class, and other values decrease by 1, as in ADE20K.
        crop_scale: smallest and largest fraction of an image that a training crop covers; None = the whole image.
        horizontal_flip: probability of a flip.
        auxiliary_weight: weight of the auxiliary head's loss; 0 = no auxiliary head.
    """

    model_class = "Data2VecVisionForSemanticSegmentation"
    modality = "vision"
    metric = "miou"

    def __init__(
        self,
        *,
        inputs: Inputs,
        map_column: str | None,
        maps: str | None,
        classes: Sequence[str] | int,
        reduce_labels: bool,
        crop_scale: Sequence[float] | None,
        horizontal_flip: float,
        auxiliary_weight: float,
    ) -> None:
        super().__init__(inputs=inputs)
        if (map_column is None) == (maps is None):
            raise ConfigError("set exactly one of head.map_column and head.maps; the other must be null")
        names = (
            [str(number) for number in range(classes)] if isinstance(classes, int) else [str(name) for name in classes]
        )
        if not 2 <= len(names) < NO_CLASS:
            raise ConfigError(f"head.classes: {len(names)} classes; expected 2 to {NO_CLASS - 1}")
        self.class_names = names
        self.map_column = map_column
        self.maps = None if maps is None else Path(maps).expanduser()
        self.reduce_labels = reduce_labels
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.auxiliary_weight = auxiliary_weight

    @property
    def label_fields(self) -> list[str]:
        """The column of the maps, if they are in a column."""
        return [] if self.map_column is None else [self.map_column]

    def usable(self, source: Source) -> np.ndarray:
        """All records; maps are read only when an example is made."""
        return np.arange(len(source))

    def setup(self, source: Source, rows: np.ndarray) -> None:
        """Check that every image has a map.

        Raises:
            DataError: an image has none.
        """
        if self.maps is not None:
            self._images = self._check_maps(source, rows)

    def check_test(self, source: Source) -> None:
        """Check that every image has a map, and that no map belongs to two images."""
        if self.maps is None:
            return
        trained = self._images
        tested = self._check_maps(source, np.arange(len(source)))
        shared = sorted(key for key in tested.keys() & trained.keys() if tested[key] != trained[key])
        if shared:
            raise DataError(
                f"{shared[0]} is the name of a training image and of a different test image ({len(shared)} such "
                "names), and head.maps has one map for both. Rename them, or list the maps in a metadata.csv beside "
                "the images, with head.map_column=COLUMN head.maps=null"
            )

    def _check_maps(self, source: Source, rows: np.ndarray) -> dict[str, Path | None]:
        """The images by key, after a check that each has a map."""
        records = (source[int(row)] for row in rows)
        images = {raw.key: raw.value if isinstance(raw.value, Path) else None for raw in records}
        if not self.maps.is_dir():
            raise DataError(f"head.maps: there is no folder {self.maps}")
        absent = [key for key in images if not self._map_file(key).is_file()]
        if absent:
            raise DataError(
                f"{len(absent)} of {len(rows)} images have no map; the first is {absent[0]}, expected "
                f"{self._map_file(absent[0])}"
            )
        return images

    def _map_file(self, key: str) -> Path:
        return (self.maps / key).with_suffix(".png")

    def model_settings(self) -> dict[str, Any]:
        """Class names, the auxiliary head, and the label that the loss ignores."""
        weight = self.auxiliary_weight
        auxiliary = {"use_auxiliary_head": weight > 0, "auxiliary_loss_weight": weight}
        return super().model_settings() | auxiliary | {"semantic_loss_ignore_index": NO_CLASS}

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The pixels and the map of an image, in training a random crop."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        transform = self.inputs.transform
        pixels = to_tensor(self.inputs.decode(raw.value))  # (channels, H, W) uint8
        classes = self._classes(raw)
        if train and classes is None:
            raise BadSample("it has no map")
        if classes is not None and not (classes != NO_CLASS).any():
            if train:
                raise BadSample("no pixel of its map has a class")
            classes = None
        if classes is not None and classes.shape != pixels.shape[1:]:
            raise BadSample(f"a map of {classes.shape} pixels for an image of {tuple(pixels.shape[1:])}")
        size = pixels.shape[1:]
        crop = v2.Resize(transform.size, antialias=True)
        if train and self.crop_scale is not None:
            crop = v2.RandomResizedCrop(transform.size, tuple(self.crop_scale), antialias=True)
        change = v2.Compose([v2.RandomHorizontalFlip(self.horizontal_flip if train else 0.0), crop])
        reference = classes
        if classes is None:
            pixels = change(tv_tensors.Image(pixels))
        else:
            whole = tv_tensors.Image(pixels), tv_tensors.Mask(torch.from_numpy(classes))
            pixels, mask = change(*whole)
            if train and not bool((mask != NO_CLASS).any()):  # no pixel of the crop has a class
                pixels, mask = v2.Resize(transform.size, antialias=True)(*whole)
            classes = mask.as_subclass(torch.Tensor).long()
        pixels = transform.normalise(pixels.as_subclass(torch.Tensor))
        return {"key": raw.key, "pixels": pixels, "classes": classes, "reference": reference, "size": tuple(size)}

    def _classes(self, raw: RawSample) -> np.ndarray | None:
        """The map (H, W) uint8."""
        from PIL import Image

        if self.maps is not None:
            if not self._map_file(raw.key).is_file():
                return None
            value = read(self._map_file(raw.key))
        else:
            value = raw.fields.get(self.map_column)
            if isinstance(value, Mapping):
                value = value["bytes"] if value.get("bytes") is not None else read(Path(value["path"]))
            elif isinstance(value, str):
                value = read(raw.value.parent / value if isinstance(raw.value, Path) else Path(value))
            elif isinstance(value, list):
                value = np.array(value)
            if value is None:
                return None
        if not isinstance(value, np.ndarray):
            from io import BytesIO

            try:
                value = np.array(Image.open(BytesIO(value)))
            except (OSError, ValueError) as error:
                raise BadSample(f"its map is not an image: {error}") from error
        if value.ndim != 2:
            raise BadSample(f"a map of shape {value.shape}; expected one class number for each pixel")
        classes = value.astype(np.int64)
        if self.reduce_labels:
            classes = np.where((classes == 0) | (classes == NO_CLASS), NO_CLASS, classes - 1)
        outside = (classes != NO_CLASS) & ((classes < 0) | (classes >= len(self.class_names)))
        if outside.any():
            raise BadSample(
                f"its map has the class {int(classes[outside][0])}; with head.classes, expected 0 to "
                f"{len(self.class_names) - 1}, or {NO_CLASS} for no class"
            )
        return classes.astype(np.uint8)

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Pixels, and maps if all examples have one."""
        inputs = {"pixel_values": torch.stack([example["pixels"] for example in examples])}
        if all(example["classes"] is not None for example in examples):
            inputs["labels"] = torch.stack([example["classes"] for example in examples])
        host = {"size": torch.tensor([example["size"] for example in examples])}
        return Examples(inputs, host=host, references=tuple(example["reference"] for example in examples))

    def meter(self) -> Meter:
        """A meter that counts pixels."""
        return SegmentationMeter(len(self.class_names))

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[np.ndarray]:
        """Maps (H, W) uint8 at the size of the images."""
        pairs = zip(outputs["logits"], batch.host["size"].tolist(), strict=True)
        return [map_of(logits, size).numpy().astype(np.uint8) for logits, size in pairs]
