"""Export: write weights in another format, read back what was written, compare, and say so on a card."""

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from data2vec_train.encoders.text import TextEncoder
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.system.outputs import output_path, sole_writer, writing
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.convert import (
    PREPROCESSING,
    load_pretrained,
    refusal_of_transformers,
    save_pretrained,
    write_preprocessing,
)
from data2vec_train.weights.files import read_json
from data2vec_train.weights.preprocessing import PREPROCESSOR_NAME
from data2vec_train.weights.tokenizers import EXAMPLES_NAME, TextTokenizer, has_tokenizer

log = logging.getLogger(__name__)

FORMATS = ("hf", "safetensors", "onnx", "torch_export")
# Where no texts of the weights' own data are at hand.
TEXTS = (
    "The quick brown fox jumps over the lazy dog; it's 3:45 pm, and nobody minds.",
    "  Two  spaces,\ttabs\nand lines\r\n\nIn UPPER and lower Case.",
    "Größe, naïve façade, İstanbul, cafe\u0301",
    "北京は今日も晴れ Привет мир",
    "def f(x): return x**2 + 1_000_000  # comment",
)
LIMIT = 1e-3  # of differences; outputs are of order 1
CARD_NAME = "README.md"


@dataclass
class Example:
    """Inputs to compare outputs on."""

    inputs: dict[str, Tensor]  # the first sample is whole, the second one padded where there is padding
    # axis -> (name, smallest, largest or None) of those that may differ from call to call
    axes: dict[int, tuple[str, int, int | None]]


@dataclass
class Comparison:
    """How far what was written is from what was loaded."""

    reader: str  # who read it back
    layers: list[tuple[str, float]]  # (what, largest absolute difference)

    @property
    def largest(self) -> float:
        """Of all layers."""
        return max(difference for _, difference in self.layers)


def export(cfg: DictConfig) -> dict[str, float]:
    """Write `cfg.checkpoint` to `cfg.out` in `cfg.format`; returns the largest difference for each reader.

    Raises:
        ConfigError: a setting that cannot be met, or a format that cannot hold this model.
    """
    if cfg.format not in FORMATS:
        raise ConfigError(f"format={cfg.format}: expected one of {', '.join(FORMATS)}")
    out = output_path(cfg.out, make_parents=True)
    with sole_writer(out):
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"out={out} is not an empty folder; choose another, or remove it")
        return _export(cfg, out)


def _export(cfg: DictConfig, out: Path) -> dict[str, float]:
    model = load_pretrained(cfg.checkpoint, weights=cfg.weights, num_heads=cfg.num_heads)
    log.info("%s, %.2f M parameters, from %s", type(model).__name__, model.num_parameters() / 1e6, cfg.checkpoint)
    refusal = refusal_of_transformers(model) if cfg.format == "hf" else None
    if refusal is not None:
        raise ConfigError(f"{refusal}; choose format=safetensors, onnx or torch_export")
    with writing(out) as unfinished:
        unfinished.mkdir()
        write_preprocessing(model, unfinished)
        texts = compare_ids(model, unfinished)
        write = {"onnx": _write_onnx, "torch_export": _write_program}.get(cfg.format, _write_folder)
        comparisons = write(model, unfinished, cfg.format)
        for one in comparisons:
            log.info("read back by %s: largest difference %.1e", one.reader, one.largest)
            if not one.largest <= LIMIT:
                raise RuntimeError(
                    f"what {one.reader} reads back differs from {cfg.checkpoint} by {one.largest:.1e}, and {LIMIT:.0e} "
                    f"is the most that rounding explains; {out} was not written"
                )
        (unfinished / CARD_NAME).write_text(_card(cfg, model, comparisons, texts, unfinished), encoding="utf-8")
    log.info("written: %s", out)
    return {one.reader: one.largest for one in comparisons}


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def _write_folder(model: PretrainedModel, folder: Path, kind: str) -> list[Comparison]:
    save_pretrained(model, folder)
    example = example_for(model, folder)
    expected = _layers_of(model, example)
    comparisons = [_compare("data2vec_train", expected, _layers_of(load_pretrained(folder), example))]
    if kind == "hf":
        comparisons += _read_by_transformers(model, folder, example)
    return comparisons


def _read_by_transformers(model: PretrainedModel, folder: Path, example: Example) -> list[Comparison]:
    """With transformers' own code, where it is installed; padding aside, which it lets leak in speech."""
    if find_spec("transformers") is None:
        log.info("transformers is not installed: what it makes of the folder was not compared")
        return []
    import transformers

    transformers.logging.set_verbosity_error()  # what is missing and what loads is our own to say
    transformers.logging.disable_progress_bar()
    theirs = getattr(transformers, type(model).__name__).from_pretrained(folder).eval()
    whole = {name: one[:1] for name, one in example.inputs.items()}
    with torch.no_grad():
        output = theirs(**whole, output_hidden_states=True)
    expected = _layers_of(model, Example(whole, example.axes))
    found = _named(output)
    return [_compare(f"transformers {transformers.__version__}", expected, found)]


def _write_onnx(model: PretrainedModel, folder: Path, kind: str) -> list[Comparison]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ConfigError(f"format=onnx needs {error.name}: pip install 'data2vec_train[onnx]'") from error
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    model.set_attn_implementation("eager")  # the fused kernels have no counterpart in ONNX
    example = example_for(model, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*The axis name: \w+ will not be used")  # both inputs share it
        program = torch.onnx.export(
            _Plain(model, tuple(example.inputs)),
            tuple(example.inputs.values()),
            input_names=list(example.inputs),
            output_names=[_main_output(model)],
            dynamic_shapes=(_dynamic(example),),
            dynamo=True,
            verbose=False,
        )
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    names = [one.name for one in session.get_inputs()]

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

    _write_facts(model, folder, example)
    return [_compare_function(f"onnxruntime {onnxruntime.__version__}", model, example, run)]


def _write_program(model: PretrainedModel, folder: Path, kind: str) -> list[Comparison]:
    example = example_for(model, folder)
    program = torch.export.export(
        _Plain(model, tuple(example.inputs)), tuple(example.inputs.values()), dynamic_shapes=(_dynamic(example),)
    )
    torch.export.save(program, folder / "model.pt2")
    again = torch.export.load(folder / "model.pt2").module()
    _write_facts(model, folder, example)
    return [
        _compare_function(
            f"torch.export, torch {torch.__version__}", model, example, lambda inputs: again(*inputs.values())
        )
    ]


class _Plain(nn.Module):
    """A model with positional inputs and one tensor as output, as graph formats want it."""

    def __init__(self, model: PretrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.main = _main_output(model)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """The main output."""
        return self.model(**dict(zip(self.names, inputs, strict=True)))[self.main]


def _main_output(model: PretrainedModel) -> str:
    return "last_hidden_state" if model.base_model is model else "logits"


def _dynamic(example: Example) -> tuple:
    """Which axes of which input may change."""
    axes = {
        axis: torch.export.Dim(name, min=smallest, max=largest)
        if largest is not None
        else torch.export.Dim(name, min=smallest)
        for axis, (name, smallest, largest) in example.axes.items()
    }
    return tuple({axis: dim for axis, dim in axes.items() if axis < one.dim()} for one in example.inputs.values())


def _write_facts(model: PretrainedModel, folder: Path, example: Example) -> None:
    """The config, and what a graph takes and gives."""
    model.config.save_pretrained(folder)
    facts = {
        "inputs": {
            name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in example.inputs.items()
        },
        "output": _main_output(model),
        "free_axes": {str(axis): list(limits) for axis, limits in example.axes.items()},
    }
    (folder / "signature.json").write_text(json.dumps(facts, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare_ids(model: PretrainedModel, folder: Path) -> str | None:
    """Whether the tokenizer in `folder` makes the ids that the weights were trained with; a sentence for the card.

    Read by this program, and by transformers where it is installed. None: there is no tokenizer.

    Raises:
        ConfigError: somebody makes other ids of a text.
    """
    if not isinstance(model.get_encoder(), TextEncoder) or not has_tokenizer(folder):
        return None
    own = TextTokenizer.from_pretrained(folder)
    own.check_fits(model.config)
    kept = model.source / EXAMPLES_NAME
    if kept.is_file() and read_json(kept)["texts"]:
        texts, ids = read_json(kept)["texts"], read_json(kept)["ids"]
        which = "texts that the weights were trained on"
    else:
        texts, which = list(TEXTS), "texts in several scripts"
        ids = TextTokenizer.from_pretrained(model.source)(texts, add_special_tokens=False)["input_ids"]
    whole = own(texts)["input_ids"]
    _check_ids(f"{folder} as data2vec_train reads it", texts, own(texts, add_special_tokens=False)["input_ids"], ids)
    readers = "data2vec_train"
    if find_spec("transformers") is not None:
        import transformers

        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        where = f"{folder} as transformers {transformers.__version__} reads it"
        _check_ids(where, texts, theirs(texts, add_special_tokens=False)["input_ids"], ids)
        _check_ids(where, texts, theirs(texts)["input_ids"], whole)
        readers += f" and transformers {transformers.__version__} ({type(theirs).__name__})"
    return f"Ids of {len(texts)} {which}: equal, read back by {readers}."


def _check_ids(where: str, texts: list[str], found: list[list[int]], expected: list[list[int]]) -> None:
    for text, row, other in zip(texts, found, expected, strict=True):
        if row != other:
            raise ConfigError(
                f"{where} makes the ids {row[:10]} of {text[:60]!r}, and not those of the weights, {other[:10]}; give "
                "the tokenizer that they were trained with"
            )


def example_for(model: PretrainedModel, folder: Path | None = None) -> Example:
    """Two inputs that suit a model, the second one padded: texts where `folder` has a tokenizer, otherwise noise.

    Raises:
        ConfigError: the encoder comes from a plugin, whose inputs nobody can guess.
    """
    generator = torch.Generator().manual_seed(0)
    encoder = model.get_encoder()
    if isinstance(encoder, WaveformEncoder):
        count = encoder.token_count
        shortest = next(size for size in range(1, 10**7) if count(size) >= 2)  # graphs take one frame for a constant
        size = next(size for size in range(shortest, 10**7) if count(size) >= 48)
        shape = (2, size) if encoder.channels == 1 else (2, encoder.channels, size)
        waves = torch.randn(shape, generator=generator)
        mask = torch.arange(size) < torch.tensor([size, size * 2 // 3])[:, None]
        axes = {0: ("batch", 1, None), len(shape) - 1: ("samples", shortest, None)}
        inputs = {"input_values": waves * (mask if encoder.channels == 1 else mask[:, None])}
        return Example(inputs | ({"attention_mask": mask.long()} if encoder.channels == 1 else {}), axes)
    if isinstance(encoder, TextEncoder):
        size, vocabulary, pad = min(encoder.max_tokens, 24), model.config.vocab_size, model.config.pad_token_id
        ids = torch.randint(0, vocabulary, (2, size), generator=generator)
        ids = torch.where(ids == pad, (pad + 1) % vocabulary, ids)
        if folder is not None and has_tokenizer(folder):
            tokenizer = TextTokenizer.from_pretrained(folder)
            longest = max((tokenizer.beginning(text, encoder.max_tokens) for text in TEXTS), key=len)
            size = len(longest)
            ids = torch.tensor([longest, longest[::-1]])
        mask = torch.arange(size) < torch.tensor([size, size * 2 // 3])[:, None]
        inputs = {"input_ids": torch.where(mask, ids, pad), "attention_mask": mask.long()}
        return Example(inputs, {0: ("batch", 1, None), 1: ("tokens", 1, encoder.max_tokens)})
    if isinstance(encoder, VisionEncoder):
        channels = encoder.embedder.project.in_channels
        images = torch.randn(2, channels, *encoder.image_size, generator=generator)
        return Example({"pixel_values": images}, {0: ("batch", 1, None)})
    raise ConfigError(
        f"{type(encoder).__name__} comes from a plugin, and nobody knows its inputs: use save_pretrained in Python"
    )


@torch.no_grad()
def _layers_of(model: PretrainedModel, example: Example) -> dict[str, Tensor]:
    return _named(model(**example.inputs, output_hidden_states=True))


def _named(output: Any) -> dict[str, Tensor]:
    """Every layer, and what the model is for."""
    layers = {f"layer {number}": one for number, one in enumerate(output["hidden_states"])}
    main = [name for name in ("last_hidden_state", "logits", "start_logits", "embeddings") if name in output]
    return layers | {name: output[name] for name in main}


def _compare(reader: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> Comparison:
    return Comparison(
        reader, [(name, float((found[name].float() - one.float()).abs().max())) for name, one in expected.items()]
    )


@torch.no_grad()
def _compare_function(
    reader: str, model: PretrainedModel, example: Example, run: Callable[[dict[str, Tensor]], Tensor]
) -> Comparison:
    """On the example, and on one of another batch size and length."""
    other = dict(example.inputs)
    for axis, (name, _, _) in example.axes.items():
        for key, one in other.items():
            if axis < one.dim():
                other[key] = one[:1] if name == "batch" else one.narrow(axis, 0, one.shape[axis] * 3 // 4)
    main, layers = _main_output(model), []
    for what, inputs in (("", example.inputs), (", another shape", other)):
        difference = float((run(inputs) - model(**inputs)[main]).abs().max())
        layers.append((main + what, difference))
    return Comparison(reader, layers)


# ---------------------------------------------------------------------------------------------------------------------
# The card


def _card(
    cfg: DictConfig, model: PretrainedModel, comparisons: list[Comparison], texts: str | None, folder: Path
) -> str:
    """The card, in Markdown; `texts` is what `compare_ids` says."""
    name = type(model).__name__
    load = {
        "hf": f"transformers.{name}.from_pretrained(DIR)   # or data2vec_train.load_pretrained(DIR)",
        "safetensors": "data2vec_train.load_pretrained(DIR)",
        "onnx": 'onnxruntime.InferenceSession("DIR/model.onnx")   # inputs: signature.json',
        "torch_export": 'torch.export.load("DIR/model.pt2").module()   # inputs: signature.json',
    }[cfg.format]
    lines = [
        f"# {name}",
        "",
        f"- from `{Path(cfg.checkpoint).name}`, weights of the {cfg.weights}",
        f"- format {cfg.format}; {model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')}",
        f"- encoder: width {model.get_encoder().dim}, {model.get_encoder().depth} blocks",
        "- files: " + ", ".join(sorted(one.name for one in folder.iterdir())),
        "",
        "Load it with",
        "",
        f"    {load}",
        "",
    ]
    if not any((folder / one).is_file() for one in PREPROCESSING):
        lines += [
            "No preprocessor or tokenizer was found beside the weights: inputs have to be prepared as in training.",
            "",
        ]
    images = read_json(folder / PREPROCESSOR_NAME) if (folder / PREPROCESSOR_NAME).is_file() else {}
    if images.get("max_value") is not None:
        lines += [
            f"The stored value {images['max_value']:g} is white: values were brought to 0 to 255 by it before what",
            "preprocessor_config.json says, as `decode_image` of `data2vec_train.data.image` does.",
            "",
        ]
    if images.get("fit") == "cover" and not name.endswith("SemanticSegmentation"):
        lines += [
            "transformers stretches images to the size in preprocessor_config.json. This model was trained on images",
            "that keep their aspect: others than of that size have to be cropped before, as `ImageTransform.evaluate`",
            "of `data2vec_train.data.image` does.",
            "",
        ]
    if texts is not None:
        lines += [texts, ""]
    on = "noise" if texts is None else "a text"
    for one in comparisons:
        lines += [f"Largest absolute difference from the loaded model, read back by {one.reader}, on {on}:", ""]
        lines += ["| | difference |", "|---|---|"]
        lines += [f"| {layer} | {difference:.1e} |" for layer, difference in one.layers]
        lines += [""]
    return "\n".join(lines)
