"""Our encoders compared with those of transformers: the same weights and inputs, inference and training."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from data2vec_train.benchmark.agreement import gradients_agree, outputs_agree
from data2vec_train.benchmark.context import Arithmetic, Bench
from data2vec_train.benchmark.measurements import Arm, Case
from data2vec_train.encoders.waveform import multiply_convolutions
from data2vec_train.plan.flops import count_flops
from data2vec_train.weights.convert import CLASSES

Mode = Literal["inference", "training", "step"]
CLASS = {"vision": "Data2VecVisionModel", "audio": "Data2VecAudioModel", "text": "Data2VecTextModel"}
MAIN_INPUT = {"vision": "pixel_values", "audio": "input_values", "text": "input_ids"}
OURS, EAGER, SDPA = "ours", "transformers eager", "transformers sdpa"
SAMPLE_RATE_HZ = 16000
_SEED = 0


def measure_encoder(
    bench: Bench,
    *,
    modalities: list[str],
    modes: list[Mode],
    batch_sizes: list[int],
    size: dict[str, Any],
    image_px: int,
    patch_px: int,
    audio_seconds: float,
    text_tokens: int,
    vocab_size: int,
    backend: str,
) -> Iterator[Case]:
    """One case for each modality, mode and batch size."""
    for modality in modalities:
        with TemporaryDirectory(prefix="data2vec_benchmark_") as folder:
            write_weights(
                modality,
                Path(folder),
                size=size,
                image_px=image_px,
                patch_px=patch_px,
                max_tokens=text_tokens,
                vocab_size=vocab_size,
            )
            for mode in modes:
                for batch_size in batch_sizes:
                    shape, amount = shape_of(modality, batch_size, image_px, audio_seconds, text_tokens)
                    name = f"{modality}, {mode}, {batch_size} x {amount}"
                    make = partial(EncoderRun, modality, folder, shape, vocab_size, mode, bench.arithmetic)
                    yield compare(bench, Case("encoder", name, SDPA), make, batch_size=batch_size, backend=backend)


def compare(bench: Bench, case: Case, make: Callable[[str], "EncoderRun"], *, batch_size: int, backend: str) -> Case:
    """Measure our arm, and those of transformers if it is installed; `make` takes the full name of an arm.

    Without transformers there is no reference.
    """
    theirs = [EAGER, SDPA] if "transformers" in bench.peers else []
    makes = {name: partial(make, name) for name in theirs} | {OURS: partial(make, f"{OURS} {backend}")}
    case.reference = case.reference if theirs else None
    case.arms = [Arm(name) for name in makes]
    for arm in case.arms:
        bench.memory_of(arm, makes[arm.name])
    runs = {name: build() for name, build in makes.items()}
    expected = runs[case.reference or OURS].results()
    tokens = expected[0]["last_hidden_state"].shape[:2].numel()
    flops = count_flops(make(f"{OURS} eager"))  # all operations of eager attention are counted
    for arm in case.arms:
        arm.agreements = agreements(expected, runs[arm.name].results(), bench.tolerance, arm.name == case.reference)
        arm.items = {"samples": batch_size, "tokens": tokens}
        arm.flops = flops
    return bench.time(case, runs)


def agreements(expected: "Results", found: "Results", tolerance: float, is_itself: bool) -> list[Any]:
    """Agreement of outputs, and of gradients if there are any."""
    suffix = " of the reference and of the reference again" if is_itself else ""
    checks = [outputs_agree(expected[0], found[0], what=f"outputs{suffix}", atol=tolerance)]
    if expected[1]:
        checks.append(gradients_agree(expected[1], found[1], what=f"gradients{suffix}", share=tolerance))
    return checks


Results = tuple[dict[str, Tensor], dict[str, Tensor]]


class EncoderRun:
    """One encoder and its inputs, ready to run: a call is one pass.

    Args:
        modality: modality of the encoder.
        folder: folder with the weights.
        shape: shape of the inputs.
        vocab_size: vocabulary size, for texts.
        mode: "training" = forward and backward; "step" = also the optimizer, with learning rate 0, so that it does all
            its work but the weights stay equal to those of the other arms.
        arithmetic: device and dtypes.
        arm: the program, and its attention implementation.
    """

    def __init__(
        self,
        modality: str,
        folder: str,
        shape: tuple[int, ...],
        vocab_size: int,
        mode: Mode,
        arithmetic: Arithmetic,
        arm: str,
    ) -> None:
        program, _, attention = arm.partition(" ")
        self.model = load(modality, folder, program, attention).to(arithmetic.device)
        self.is_ours, self.mode, self.arithmetic = program == OURS, mode, arithmetic
        self.inputs = {MAIN_INPUT[modality]: draw_inputs(modality, shape, vocab_size).to(arithmetic.device)}
        self.weights: Tensor | None = None  # weights of the outputs in the differentiated sum
        self.optimizer = AdamW(self.model.parameters(), lr=0.0, fused=True) if mode == "step" else None

    def __call__(self) -> Tensor:
        """Run one pass; returns the last hidden state."""
        if self.mode == "inference":
            with torch.no_grad(), self.arithmetic.autocast():
                return self.model(**self.inputs).last_hidden_state
        self.model.zero_grad(set_to_none=True)
        with self.arithmetic.autocast():
            output = self.model(**self.inputs).last_hidden_state
        if self.weights is None:
            made = torch.randn(output.shape, generator=torch.Generator().manual_seed(_SEED))
            self.weights = made.to(output.device)
        (output.float() * self.weights).mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return output.detach()

    def results(self) -> Results:
        """Outputs, and gradients by the names of transformers; both copied, so that the model can run again."""
        output = {"last_hidden_state": self().clone()}
        if self.mode == "inference":
            return output, {}
        found = {
            name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.grad is not None
        }
        if self.is_ours:
            found = _by_names_in_files(self.model, found)
        found = {name: gradient.clone() for name, gradient in found.items()}
        self.model.zero_grad(set_to_none=True)
        return output, found


def _by_names_in_files(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, own in model.names().items():
        own, _, part = own.partition("#")
        if own in gradients:
            found[name] = gradients[own].chunk(3)["qkv".index(part)] if part else gradients[own]
    return found


def load(modality: str, folder: str, program: str, attention: str) -> nn.Module:
    """A model in evaluation mode: no dropout, but gradients."""
    if program == OURS:
        model = CLASSES[CLASS[modality]].from_pretrained(folder, attn_implementation=attention)
        multiply_convolutions(model)  # as in fine-tuning and feature extraction
        return model
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = getattr(transformers, CLASS[modality])
    return kind.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()


def draw_inputs(modality: str, shape: tuple[int, ...], vocab_size: int) -> Tensor:
    """Random numbers, or random token ids above the special ones."""
    generator = torch.Generator().manual_seed(_SEED)
    if modality == "text":
        return torch.randint(5, vocab_size, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def shape_of(
    modality: str, batch_size: int, image_px: int, audio_seconds: float, text_tokens: int
) -> tuple[tuple[int, ...], str]:
    """Shape of a batch, and the size of a sample in words."""
    if modality == "vision":
        return (batch_size, 3, image_px, image_px), f"{image_px} px"
    if modality == "audio":
        return (batch_size, round(audio_seconds * SAMPLE_RATE_HZ)), f"{audio_seconds:g} s"
    return (batch_size, text_tokens), f"{text_tokens} tokens"


def write_weights(
    modality: str,
    folder: Path,
    *,
    size: dict[str, Any],
    image_px: int,
    patch_px: int,
    max_tokens: int,
    vocab_size: int,
) -> None:
    """Write random weights of the published architecture at this size into a folder that both programs read.

    Biases, scales and tables that start at zero or one get noise, so that each of them affects the outputs.
    """
    common = {
        "hidden_size": size["dim"],
        "num_hidden_layers": size["depth"],
        "num_attention_heads": size["num_heads"],
        "intermediate_size": size["ffn_dim"],
    }
    if modality == "vision":
        own = {"image_size": image_px, "patch_size": patch_px, "drop_path_rate": 0.0}
        own |= {"use_shared_relative_position_bias": True, "use_mask_token": True}
        own["out_indices"] = list(range(min(4, size["depth"])))
    elif modality == "audio":
        own = {"conv_dim": [size["conv_dim"]] * 7, "apply_spec_augment": False}
        own |= dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout"), 0.0)
        own |= {"feat_proj_dropout": 0.0, "layerdrop": 0.0}
    else:
        own = {"vocab_size": vocab_size, "max_position_embeddings": max_tokens + 2, "type_vocab_size": 1}
        own |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    kind = CLASSES[CLASS[modality]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = kind(kind.config_class(**common, **own))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
