"""Our fifteen classes against transformers: the same weights give the same outputs, losses and gradients.

Tiny random models with noise on every parameter, so that biases, tables and scales that start at zero matter. Weights
go through real folders, in both directions. Tolerances are those of TRANSFORMERS.md 6.
"""

import copy
import json
import os
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import data2vec_train as ours

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SMALL = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
AUDIO = SMALL | {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embedding_groups": 4,
    "conv_pos_kernel_size": 5,
    "num_conv_pos_embeddings": 3,
    "vocab_size": 20,
    "classifier_proj_size": 12,
    "tdnn_dim": [16, 16, 24],
    "tdnn_kernel": [3, 3, 1],
    "tdnn_dilation": [1, 2, 1],
    "xvector_output_dim": 10,
    "num_labels": 3,
    "ctc_zero_infinity": True,
}
TEXT = SMALL | {"vocab_size": 60, "max_position_embeddings": 40, "type_vocab_size": 2, "layer_norm_eps": 1e-5}
VISION = SMALL | {
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
    "use_mask_token": True,
    "use_shared_relative_position_bias": True,
    "out_indices": [0, 1, 2, 3],
    "num_hidden_layers": 4,
    "auxiliary_channels": 8,
}
DROPOUT = {
    "Audio": ("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout", "layerdrop"),
    "Text": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "Vision": ("drop_path_rate",),
}
CASES = {
    "Data2VecAudioModel": {},
    "Data2VecAudioModel adapter": {"add_adapter": True, "output_hidden_size": 24, "num_adapter_layers": 2},
    "Data2VecAudioModel even kernel, biases": {"conv_pos_kernel_size": 4, "conv_bias": True, "layer_norm_eps": 1e-3},
    "Data2VecAudioModel other activations": {"hidden_act": "gelu_new", "feat_extract_activation": "relu"},
    "Data2VecAudioForCTC": {},
    "Data2VecAudioForCTC mean, adapter": {"add_adapter": True, "ctc_loss_reduction": "mean", "num_adapter_layers": 1},
    "Data2VecAudioForSequenceClassification": {},
    "Data2VecAudioForSequenceClassification weighted sum": {"use_weighted_layer_sum": True},
    "Data2VecAudioForAudioFrameClassification": {},
    "Data2VecAudioForAudioFrameClassification weighted sum": {"use_weighted_layer_sum": True},
    "Data2VecAudioForXVector": {},
    "Data2VecAudioForXVector weighted sum": {"use_weighted_layer_sum": True},
    "Data2VecTextModel": {},
    "Data2VecTextModel decoder": {"is_decoder": True, "add_cross_attention": True},
    "Data2VecTextForMaskedLM": {},
    "Data2VecTextForMaskedLM untied": {"tie_word_embeddings": False},
    "Data2VecTextForCausalLM": {"is_decoder": True},
    "Data2VecTextForSequenceClassification": {"num_labels": 3, "classifier_dropout": 0.0},
    "Data2VecTextForSequenceClassification regression": {"num_labels": 1},
    "Data2VecTextForSequenceClassification many": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "Data2VecTextForTokenClassification": {"num_labels": 3},
    "Data2VecTextForMultipleChoice": {},
    "Data2VecTextForQuestionAnswering": {},
    "Data2VecVisionModel": {"use_mean_pooling": False},
    "Data2VecVisionModel fine-tuned style": {
        "use_relative_position_bias": True,
        "use_shared_relative_position_bias": False,
        "use_mask_token": False,
    },
    "Data2VecVisionModel everything": {
        "use_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": False,
    },
    "Data2VecVisionModel default config": {"use_shared_relative_position_bias": False, "layer_scale_init_value": 0.0},
    "Data2VecVisionForImageClassification": {},
    "Data2VecVisionForImageClassification class token": {"use_mean_pooling": False},
    "Data2VecVisionForImageClassification regression": {"num_labels": 1},
    "Data2VecVisionForSemanticSegmentation": {},
    "Data2VecVisionForSemanticSegmentation concatenated": {
        "auxiliary_concat_input": True,
        "auxiliary_num_convs": 2,
        "num_hidden_layers": 5,
        "out_indices": [1, 2, 3, 4],
    },
}
TOLERANCE = {"Audio": 2e-6, "Text": 1e-6, "Vision": 1e-6}
CLASSES = sorted({case.split()[0] for case in CASES})


def family_of(case: str) -> str:
    return next(modality for modality in ("Audio", "Text", "Vision") if modality in case)


def theirs(case: str, *, attention: str = "eager"):
    """A transformers model with noise on every parameter, and its config."""
    family = family_of(case)
    options = {"Audio": AUDIO, "Text": TEXT, "Vision": VISION}[family] | CASES[case]
    options = dict.fromkeys(DROPOUT[family], 0.0) | options
    config = getattr(transformers, f"Data2Vec{family}Config")(**options)
    if family == "Audio":
        config.apply_spec_augment = case == "Data2VecAudioModel"
    torch.manual_seed(1)
    model = getattr(transformers, case.split()[0])._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn(parameter.shape) * 0.05)
        for name, buffer in sorted(model.named_buffers()):
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape) * 0.1)
    return model.eval()


def inputs_of(case: str, *, padded: bool) -> dict:
    torch.manual_seed(2)
    family, kind = family_of(case), case.split()[0]
    if family == "Audio":
        given = {"input_values": torch.randn(3, 400)}
        if padded:
            given["attention_mask"] = (torch.arange(400) < torch.tensor([400, 331, 257])[:, None]).long()
        labels = {"ForCTC": torch.tensor([[3, 4, 5], [6, 6, -100], [7, -100, -100]])}
        labels["ForSequenceClassification"] = labels["ForXVector"] = torch.tensor([2, 0, 1])
        frames = (((400 - 10) // 5 + 1 - 3) // 2 + 1 - 2) // 2 + 1
        labels["ForAudioFrameClassification"] = torch.eye(3)[torch.randint(0, 3, (3, frames))]
    elif family == "Text":
        ids = torch.randint(3, 60, (3, 12))
        if "MultipleChoice" in kind:
            ids = torch.randint(3, 60, (3, 2, 12))
        given = {"input_ids": ids}
        if padded:
            mask = (torch.arange(12) < torch.tensor([12, 7, 4])[:, None]).long()
            mask = mask[:, None].expand_as(ids).contiguous() if ids.dim() == 3 else mask
            given = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
            given["token_type_ids"] = torch.randint(0, 2, ids.shape)
        if "decoder" in case:
            given["encoder_hidden_states"] = torch.randn(3, 6, 32)
            if padded:
                given["encoder_attention_mask"] = (torch.arange(6) < torch.tensor([6, 4, 2])[:, None]).long()
        tokens = ids.clone()
        tokens[:, :2] = -100
        labels = {"ForMaskedLM": tokens, "ForCausalLM": tokens, "ForMultipleChoice": torch.tensor([1, 0, 1])}
        labels["ForTokenClassification"] = tokens.remainder(3).masked_fill(tokens < 0, -100)
        labels["ForSequenceClassification"] = torch.tensor([2, 0, 1])
        if "regression" in case:
            labels["ForSequenceClassification"] = torch.randn(3)
        if "many" in case:
            labels["ForSequenceClassification"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
        if "QuestionAnswering" in kind:
            return given | {"start_positions": torch.tensor([1, 3, 50]), "end_positions": torch.tensor([4, 3, 2])}
    else:
        size = (40, 48) if padded else (32, 32)  # images have no padding: another size instead
        if "Segmentation" in kind:
            size = (32, 32)
        given = {"pixel_values": torch.randn(2, 3, *size)}
        if kind == "Data2VecVisionModel" and "style" not in case and not padded:
            given["bool_masked_pos"] = torch.rand(2, 16) < 0.4
        labels = {"ForImageClassification": torch.tensor([2, 0])}
        if "regression" in case:
            labels["ForImageClassification"] = torch.randn(2)
        labels["ForSemanticSegmentation"] = torch.randint(0, 3, (2, 32, 32)).masked_fill(
            torch.rand(2, 32, 32) < 0.2, 255
        )
    wanted = [label for name, label in labels.items() if kind.endswith(name)]
    return given | ({"labels": wanted[0]} if wanted else {})


def load_ours(case: str, folder, **options):
    return getattr(ours, case.split()[0]).from_pretrained(folder, **options)


def gradient_source(output) -> torch.Tensor:
    """Something to differentiate: the loss, or random projections of every output that has a gradient."""
    if output.get("loss") is not None:
        return output["loss"]
    torch.manual_seed(3)
    fields = ("last_hidden_state", "pooler_output", "extract_features")
    return sum(
        (output[field] * torch.randn(output[field].shape)).mean() for field in fields if output.get(field) is not None
    )


def tensors_of(output) -> dict[str, torch.Tensor]:
    """All tensors of an output, tuples spread out."""
    found = {}
    for name, value in output.items():
        if name == "past_key_values":
            continue
        for index, part in enumerate(value if isinstance(value, tuple) else (value,)):
            found[f"{name}.{index}"] = part
    return found


@pytest.fixture
def order_of_sums(case):
    """In one case a gradient is a hundred-thousandth of its terms: its tolerance was measured with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if case == "Data2VecAudioForSequenceClassification weighted sum" else before)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("order_of_sums")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_and_gradients_are_those_of_transformers(case, padded, attention, tmp_path):
    reference = theirs(case, attention=attention)
    reference.save_pretrained(tmp_path)
    model = load_ours(case, tmp_path, attn_implementation=attention, hf_compat=True)
    family = family_of(case)
    given = inputs_of(case, padded=padded)
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    expected = reference(**copy.deepcopy(given), **wanted)
    output = model(**copy.deepcopy(given), **wanted)
    tolerance = TOLERANCE[family]

    a, b = tensors_of(expected), tensors_of(output)
    assert list(a) == list(b)
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=tolerance, rtol=1e-5, msg=partial("{}: {}".format, name))
    if "loss" in expected:
        torch.testing.assert_close(output.loss, expected.loss, atol=0, rtol=1e-6)

    gradient_source(expected).backward()
    gradient_source(output).backward()
    names, parameters = model.names(), dict(model.named_parameters(remove_duplicate=False))
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    compared = 0
    for name, gradient in gradients.items():
        own, _, part = names[name].partition("#")
        found = parameters[own].grad
        found = found.chunk(3)["qkv".index(part)] if part else found
        size = float(gradient.abs().max())
        if size < 1e-6 * largest:
            continue
        compared += 1
        assert float((found - gradient).abs().max()) <= 1e-5 * size, name
    assert compared > 30


@pytest.mark.parametrize("case", CASES)
def test_weights_go_both_ways_bit_for_bit(case, tmp_path):
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_ours(case, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    back, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    expected = reference.state_dict()
    found = back.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    # What the config said is still said.
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "ours"))
    assert {k: v for k, v in before.items() if after.get(k) != v} == {}


@pytest.mark.parametrize(
    "case", ["Data2VecAudioForCTC", "Data2VecTextForMaskedLM", "Data2VecVisionForImageClassification"]
)
def test_fresh_models_of_ours_load_into_transformers(case, tmp_path):
    family = family_of(case)
    options = {"Audio": AUDIO, "Text": TEXT, "Vision": VISION}[family] | CASES[case]
    model = getattr(ours, case)(getattr(ours, f"Data2Vec{family}Config")(**options, hf_compat=True)).eval()
    model.save_pretrained(tmp_path)
    reference = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(reference).__name__ == f"Data2Vec{family}Model"
    reference = getattr(transformers, case).from_pretrained(tmp_path)
    given = inputs_of(case, padded=True)
    torch.testing.assert_close(model(**given).logits, reference(**given).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_come_in_the_same_order(name):
    import inspect

    expected = [
        parameter
        for parameter in inspect.signature(getattr(transformers, name).forward).parameters
        if parameter != "kwargs"
    ]
    found = list(inspect.signature(getattr(ours, name).forward).parameters)
    assert found[: len(expected)] == expected
