"""Export: write weights in another format, read them back, compare the outputs, and write a model card."""

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
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
from data2vec_train.weights.plugin import PluginConfig
from data2vec_train.weights.preprocessing import PREPROCESSOR_NAME
from data2vec_train.weights.tokenizers import EXAMPLES_NAME, TextTokenizer, has_tokenizer
from data2vec_train.wrapped.base import WrappedEncoder

log = logging.getLogger(__name__)

FORMATS = ("hf", "timm", "safetensors", "onnx", "torch_export")
# Used if no texts of the weights' own training data are stored with them.
TEXTS = (
    "The quick brown fox jumps over the lazy dog; it's 3:45 pm, and nobody minds.",
    "  Two  spaces,\ttabs\nand lines\r\n\nIn UPPER and lower Case.",
    "Größe, naïve façade, İstanbul, cafe\u0301",
    "北京は今日も晴れ Привет мир",
    "def f(x): return x**2 + 1_000_000  # comment",
)
LIMIT = 1e-3  # largest accepted difference; outputs are of order 1
CARD_NAME = "README.md"


@dataclass
class Example:
    """Inputs on which outputs are compared."""

    inputs: dict[str, Tensor]  # the first sample has no padding; the second one has, if the model takes a mask
    # axis -> (name, smallest size, largest size or None) of the axes whose size may differ from call to call
    axes: dict[int, tuple[str, int, int | None]]


@dataclass
class Comparison:
    """How much the outputs of the exported model differ from those of the loaded one."""

    reader: str  # the program that read the export back
    layers: list[tuple[str, float]]  # (output, largest absolute difference)

    @property
    def largest(self) -> float:
        """The largest difference of all layers."""
        return max(difference for _, difference in self.layers)


def export(cfg: DictConfig) -> dict[str, float]:
    """Write `cfg.checkpoint` to `cfg.out` in `cfg.format`; returns the largest difference for each reader.

    Raises:
        ConfigError: an invalid setting, or a format that cannot hold this model.
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
    _refuse(model, cfg.format)
    with writing(out) as unfinished:
        unfinished.mkdir()
        write_preprocessing(model, unfinished)
        texts = compare_ids(model, unfinished)
        write = {"onnx": _write_onnx, "torch_export": _write_program}.get(cfg.format, _write_folder)
        if _goes_back(model, cfg.format):
            write = _write_for_library
        comparisons = write(model, unfinished, cfg.format)
        for comparison in comparisons:
            log.info("read back by %s: largest difference %.1e", comparison.reader, comparison.largest)
            if not comparison.largest <= LIMIT:
                raise RuntimeError(
                    f"the outputs of {comparison.reader} differ from {cfg.checkpoint} by {comparison.largest:.1e}; "
                    f"rounding explains at most {LIMIT:.0e}; {out} was not written"
                )
        (unfinished / CARD_NAME).write_text(_card(cfg, model, comparisons, texts, unfinished), encoding="utf-8")
    log.info("written: %s", out)
    return {comparison.reader: comparison.largest for comparison in comparisons}


def _refuse(model: PretrainedModel, kind: str) -> None:
    """Raise ConfigError if a format cannot hold the model."""
    if _goes_back(model, kind):
        return
    if kind == "timm":
        raise ConfigError("format=timm is for encoders that timm has (encoder=timm); choose format=safetensors")
    if isinstance(model.config, PluginConfig) and kind != "safetensors":
        name = model.config.encoder["_target_"]
        raise ConfigError(
            f"format=hf: transformers has no class for {name}, the encoder of a plugin; choose format=safetensors"
            if kind == "hf"
            else f"format={kind} needs an example of the inputs, and only the plugin knows what {name} takes; choose "
            "format=safetensors"
        )
    refusal = refusal_of_transformers(model) if kind == "hf" else None
    if refusal is not None:
        raise ConfigError(f"{refusal}; choose format=safetensors, onnx or torch_export")


def _goes_back(model: PretrainedModel, kind: str) -> bool:
    """Whether the encoder is one of another library, and goes back into it."""
    encoder = model.get_encoder()
    return isinstance(encoder, WrappedEncoder) and encoder.library == kind


# ---------------------------------------------------------------------------------------------------------------------
# Formats


@torch.no_grad()
def _write_for_library(model: PretrainedModel, folder: Path, kind: str) -> list[Comparison]:
    encoder = model.get_encoder()
    encoder.save_for_library(folder)
    inputs = encoder.example()
    difference = (encoder(inputs).tokens - encoder.read_back(folder, inputs)).abs().max()
    reader = {"hf": "transformers", "timm": "timm"}[kind]
    return [Comparison(f"{reader} {version(reader)}", [("features", float(difference))])]


def _write_folder(model: PretrainedModel, folder: Path, kind: str) -> list[Comparison]:
    save_pretrained(model, folder)
    if isinstance(model.config, PluginConfig):
        return [_compare_weights(model, load_pretrained(folder))]
    example = example_for(model, folder)
    expected = _layers_of(model, example)
    comparisons = [_compare("data2vec_train", expected, _layers_of(load_pretrained(folder), example))]
    if kind == "hf":
        comparisons += _read_by_transformers(model, folder, example)
    return comparisons


def _read_by_transformers(model: PretrainedModel, folder: Path, example: Example) -> list[Comparison]:
    """Compare with transformers, if it is installed; without padding, which changes its outputs for speech."""
    if find_spec("transformers") is None:
        log.info("transformers is not installed: its outputs were not compared")
        return []
    import transformers

    transformers.logging.set_verbosity_error()  # this program reports missing and unexpected tensors itself
    transformers.logging.disable_progress_bar()
    theirs = getattr(transformers, type(model).__name__).from_pretrained(folder).eval()
    whole = {name: tensor[:1] for name, tensor in example.inputs.items()}
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
    names = [entry.name for entry in session.get_inputs()]

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
    """A model with positional inputs and one output tensor, as graph formats require."""

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
    """For each input, the axes whose size may change."""
    axes = {
        axis: torch.export.Dim(name, min=smallest, max=largest)
        if largest is not None
        else torch.export.Dim(name, min=smallest)
        for axis, (name, smallest, largest) in example.axes.items()
    }
    return tuple({axis: dim for axis, dim in axes.items() if axis < tensor.dim()} for tensor in example.inputs.values())


def _write_facts(model: PretrainedModel, folder: Path, example: Example) -> None:
    """Write the config, and the inputs and the output of the graph."""
    model.config.save_pretrained(folder)
    facts = {
        "inputs": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in example.inputs.items()
        },
        "output": _main_output(model),
        "free_axes": {str(axis): list(limits) for axis, limits in example.axes.items()},
    }
    (folder / "signature.json").write_text(json.dumps(facts, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare_ids(model: PretrainedModel, folder: Path) -> str | None:
    """Check that the tokenizer in `folder` gives the ids that the weights were trained with.

    The check reads it with this program, and with transformers if it is installed.

    Returns:
        A sentence for the card; None without a tokenizer.

    Raises:
        ConfigError: a reader gives other ids for a text.
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
                f"{where} gives the ids {row[:10]} for {text[:60]!r}; the weights were trained with {other[:10]}. Use "
                "the tokenizer that the weights were trained with"
            )


def example_for(model: PretrainedModel, folder: Path | None = None) -> Example:
    """Two inputs for a model, the second one padded: texts if `folder` has a tokenizer, otherwise noise.

    Raises:
        ConfigError: the encoder comes from a plugin, so its inputs are unknown.
    """
    generator = torch.Generator().manual_seed(0)
    encoder = model.get_encoder()
    if isinstance(encoder, WaveformEncoder):
        count = encoder.token_count
        shortest = next(
            size for size in range(1, 10**7) if count(size) >= 2
        )  # with one frame, graphs fix the axis at 1
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
        f"{type(encoder).__name__} comes from a plugin, and its inputs are unknown: use save_pretrained in Python"
    )


@torch.no_grad()
def _layers_of(model: PretrainedModel, example: Example) -> dict[str, Tensor]:
    return _named(model(**example.inputs, output_hidden_states=True))


def _named(output: Any) -> dict[str, Tensor]:
    """The hidden states of every layer and the main outputs, by name."""
    layers = {f"layer {number}": hidden for number, hidden in enumerate(output["hidden_states"])}
    main = [name for name in ("last_hidden_state", "logits", "start_logits", "embeddings") if name in output]
    return layers | {name: output[name] for name in main}


def _compare(reader: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> Comparison:
    return Comparison(
        reader, [(name, float((found[name].float() - tensor.float()).abs().max())) for name, tensor in expected.items()]
    )


def _compare_weights(model: PretrainedModel, again: PretrainedModel) -> Comparison:
    """Compare the tensors of an encoder of a plugin: nobody else knows inputs on which outputs could be compared."""
    found = again.state_dict()
    pairs = [(tensor.float(), found[name].float()) for name, tensor in model.state_dict().items() if tensor.numel()]
    return Comparison(
        "data2vec_train", [("weights", max(float((written - read).abs().max()) for written, read in pairs))]
    )


@torch.no_grad()
def _compare_function(
    reader: str, model: PretrainedModel, example: Example, run: Callable[[dict[str, Tensor]], Tensor]
) -> Comparison:
    """Compare on the example, and on an example of another batch size and length."""
    other = dict(example.inputs)
    for axis, (name, _, _) in example.axes.items():
        for key, tensor in other.items():
            if axis < tensor.dim():
                other[key] = tensor[:1] if name == "batch" else tensor.narrow(axis, 0, tensor.shape[axis] * 3 // 4)
    main, layers = _main_output(model), []
    for what, inputs in (("", example.inputs), (", another shape", other)):
        difference = float((run(inputs) - model(**inputs)[main]).abs().max())
        layers.append((main + what, difference))
    return Comparison(reader, layers)


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def _card(
    cfg: DictConfig, model: PretrainedModel, comparisons: list[Comparison], texts: str | None, folder: Path
) -> str:
    """The card, in Markdown; `texts` is the sentence of `compare_ids`."""
    name = type(model).__name__
    load = {
        "hf": f"transformers.{name}.from_pretrained(DIR)   # or data2vec_train.load_pretrained(DIR)",
        "timm": "",
        "safetensors": "data2vec_train.load_pretrained(DIR)",
        "onnx": 'onnxruntime.InferenceSession("DIR/model.onnx")   # inputs: signature.json',
        "torch_export": 'torch.export.load("DIR/model.pt2").module()   # inputs: signature.json',
    }[cfg.format]
    goes_back = _goes_back(model, cfg.format)
    load = model.get_encoder().reading_call() if goes_back else load
    lines = [
        f"# {name}",
        "",
        f"- from `{Path(cfg.checkpoint).name}`, weights of the {cfg.weights}",
        f"- format {cfg.format}; {model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')}",
        f"- encoder: width {model.get_encoder().dim}, {model.get_encoder().depth} blocks",
        "- files: " + ", ".join(sorted(path.name for path in folder.iterdir())),
        "",
        "Load it with",
        "",
        f"    {load}",
        "",
    ]
    is_plugin = isinstance(model.config, PluginConfig) and not isinstance(model.get_encoder(), WrappedEncoder)
    if is_plugin:
        module = model.config.encoder["_target_"].rpartition(".")[0]
        lines += [
            f"The encoder is part of a plugin: `{module}` has to be importable, and named in DATA2VEC_PLUGINS.",
            "" if model.config.modality is None else "`modality` in config.json says how inputs are prepared.",
            "",
        ]
    elif not any((folder / file_name).is_file() for file_name in PREPROCESSING):
        lines += [
            "No preprocessor or tokenizer was found beside the weights: prepare inputs as in training.",
            "",
        ]
    images = read_json(folder / PREPROCESSOR_NAME) if (folder / PREPROCESSOR_NAME).is_file() else {}
    if images.get("max_value") is not None:
        lines += [
            f"The stored value {images['max_value']:g} is white. Scale values by it to 0 to 255, then apply",
            "preprocessor_config.json; `decode_image` of `data2vec_train.data.image` does the first step.",
            "",
        ]
    if images.get("fit") == "cover" and not name.endswith("SemanticSegmentation"):
        lines += [
            "transformers stretches images to the size in preprocessor_config.json. This model was trained on images",
            "that keep their aspect: crop images of any other size first, as `ImageTransform.evaluate` of",
            "`data2vec_train.data.image` does.",
            "",
        ]
    if texts is not None:
        lines += [texts, ""]
    on = "" if is_plugin else ", on noise" if texts is None else ", on a text"
    for comparison in comparisons:
        lines += [f"Largest absolute difference from the loaded model, read back by {comparison.reader}{on}:", ""]
        lines += ["| | difference |", "|---|---|"]
        lines += [f"| {layer} | {difference:.1e} |" for layer, difference in comparison.layers]
        lines += [""]
    return "\n".join(lines)
