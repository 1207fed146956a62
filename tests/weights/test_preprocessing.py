"""What models are fed equals what transformers feeds them, and files go both ways."""

import json
import lzma
import os
import random
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import data2vec_train
from data2vec_train.errors import ConfigError
from data2vec_train.weights.preprocessing import AudioFeatureExtractor, ImageProcessor
from data2vec_train.weights.tokenizers import LIBRISPEECH_SYMBOLS, CTCTokenizer, TextTokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SAMPLES = Path(data2vec_train.__file__).parent / "samples"
BPE = SAMPLES / "gpt2_bpe"


def recordings(*lengths: int) -> list[np.ndarray]:
    random_ = np.random.default_rng(0)
    return [(random_.standard_normal(length) * 0.3 + 0.1).astype(np.float32) for length in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# Speech


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 64},
        {"padding": "max_length", "max_length": 2000},
        {"padding": "max_length", "max_length": 1000, "truncation": True},
        {"padding": True, "max_length": 1000, "truncation": True, "pad_to_multiple_of": 128},
        {"padding": False},
        {"padding": False, "max_length": 700, "truncation": True},
    ],
    ids=str,
)
def test_waveforms_are_prepared_exactly(options, mask, normalize):
    theirs = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=mask)
    own = AudioFeatureExtractor(do_normalize=normalize, return_attention_mask=mask)
    waves = recordings(1600, 1203, 801)
    for given in (waves, [wave.astype(np.float64) for wave in waves], [wave.tolist() for wave in waves]):
        expected = theirs(given, sampling_rate=16000, **options)
        found = own(given, sampling_rate=16000, **options)
        assert list(found) == list(expected.keys())
        for name, rows in found.items():
            for row, other in zip(rows, expected[name], strict=True):
                assert row.dtype == other.dtype
                assert np.array_equal(row, other)


def test_one_waveform_and_tensors():
    theirs, own = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True), AudioFeatureExtractor()
    wave = recordings(900)[0]
    expected = theirs(wave, return_tensors="pt", sampling_rate=16000)
    for given in (wave, torch.from_numpy(wave), wave.tolist()):
        found = own(given, return_tensors="pt")
        assert torch.equal(found["input_values"], expected["input_values"])
        assert torch.equal(found["attention_mask"], expected["attention_mask"])
    both = own(np.stack([wave, wave]), return_tensors="np")["input_values"]
    assert both.shape == (2, 900)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (recordings(50)[0], {"sampling_rate": 8000}, "recordings at 8000 Hz, .* 16000"),
        (np.zeros((2, 2, 50)), {}, "expected mono recordings"),
        (recordings(50, 40), {"return_tensors": "pt"}, "set padding=True"),
        (recordings(50), {"truncation": True}, "truncation needs max_length"),
        (recordings(50), {"padding": "max_length"}, "needs max_length"),
        (recordings(50), {"padding": "left"}, "got 'left'"),
    ],
)
def test_waveforms_that_cannot_be_prepared(given, options, message):
    with pytest.raises(ValueError, match=message):
        AudioFeatureExtractor()(given, **options)


def test_files_of_the_extractor_go_both_ways(tmp_path):
    AudioFeatureExtractor(sampling_rate=8000, do_normalize=False).save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == "Wav2Vec2FeatureExtractor"
    assert (theirs.sampling_rate, theirs.do_normalize, theirs.return_attention_mask) == (8000, False, True)
    theirs.save_pretrained(tmp_path / "theirs")
    assert vars(AudioFeatureExtractor.from_pretrained(tmp_path / "theirs")) == vars(
        AudioFeatureExtractor(sampling_rate=8000, do_normalize=False)
    )
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json"):
        AudioFeatureExtractor.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def pictures() -> list[np.ndarray]:
    random_ = np.random.default_rng(1)
    return [random_.integers(0, 256, shape, dtype=np.uint8) for shape in ((37, 51, 3), (224, 224, 3), (300, 119, 3))]


OPTIONS = [
    {},
    {"size": (64, 48)},
    {"size": (40, 40), "crop_size": (32, 36)},
    {"size": (20, 24), "crop_size": (33, 31)},
    {"size": None, "crop_size": (30, 30)},
    {"resample": 2, "image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)},
    {"rescale_factor": None},
    {"image_mean": None, "image_std": None},
]


def their_processor(options: dict, **more):
    names = dict(options)
    changed = {}
    if "size" in names:
        size = names.pop("size")
        changed |= {"do_resize": False} if size is None else {"size": {"height": size[0], "width": size[1]}}
    if "crop_size" in names:
        height, width = names.pop("crop_size")
        changed |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    for name, switch in (("rescale_factor", "do_rescale"), ("image_mean", "do_normalize")):
        if name in names and names[name] is None:
            del names[name]
            names.pop("image_std", None) if name == "image_mean" else None
            changed[switch] = False
    return transformers.BeitImageProcessorPil(**names, **changed, **more)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_images_are_prepared_bit_for_bit(options):
    theirs, own = their_processor(options), ImageProcessor(**options)
    for picture in pictures():
        for given in (picture, Image.fromarray(picture), picture.transpose(2, 0, 1), torch.from_numpy(picture)):
            expected = theirs(given, return_tensors="np")["pixel_values"]
            found = own(given, return_tensors="np")["pixel_values"]
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("reduce", [False, True])
def test_segmentation_maps(reduce):
    classes = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], dtype=np.uint8), (37, 51))
    theirs = transformers.BeitImageProcessorPil(do_reduce_labels=reduce)
    expected = theirs(pictures()[0], segmentation_maps=classes.copy(), return_tensors="pt")["labels"]
    compatible = ImageProcessor(do_reduce_labels=reduce, hf_compat=True)
    found = compatible(pictures()[0], segmentation_maps=classes, return_tensors="pt")["labels"]
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert len(found.unique()) > 4  # classes that nobody drew
    right = ImageProcessor(do_reduce_labels=reduce)(pictures()[0], classes, return_tensors="pt")["labels"]
    assert set(right.unique().tolist()) == ({0, 1, 255} if reduce else {0, 1, 2, 255})


def test_maps_of_classes_from_logits():
    logits = torch.randn(2, 5, 8, 8)
    own, theirs = ImageProcessor(), transformers.BeitImageProcessorPil()
    output = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits)
    for sizes in (None, [(31, 20), (8, 8)]):
        expected = theirs.post_process_semantic_segmentation(output, target_sizes=sizes)
        for given in (logits, output):
            found = own.post_process_semantic_segmentation(given, sizes)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="1 target sizes for 2 images"):
        own.post_process_semantic_segmentation(logits, [(3, 3)])


def test_images_that_cannot_be_prepared():
    with pytest.raises(ValueError, match="8-bit values from 0 to 255, got float64"):
        ImageProcessor()(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="4 channels; expected 3"):
        ImageProcessor()(np.zeros((9, 9, 4), dtype=np.uint8))
    with pytest.raises(ConfigError, match="go together"):
        ImageProcessor(image_mean=None)
    grey = ImageProcessor()(np.zeros((9, 9), dtype=np.uint8), return_tensors="pt")["pixel_values"]
    assert grey.shape == (1, 3, 224, 224)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_of_the_processor_go_both_ways(options, tmp_path):
    ImageProcessor(**options).save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    expected = ImageProcessor(**options)(pictures()[0], return_tensors="np")["pixel_values"]
    assert np.array_equal(theirs(pictures()[0], return_tensors="np")["pixel_values"], expected)
    their_processor(options).save_pretrained(tmp_path / "theirs")
    again = ImageProcessor.from_pretrained(tmp_path / "theirs")
    assert np.array_equal(again(pictures()[0], return_tensors="np")["pixel_values"], expected)


def test_old_files_of_released_models_are_understood(tmp_path):
    old = {"feature_extractor_type": "BeitFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": False}
    old |= {"do_resize": True, "resample": 3, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | {"reduce_labels": False}))
    again = ImageProcessor.from_pretrained(tmp_path)
    found, expected = (
        processor(pictures()[0], return_tensors="np")["pixel_values"] for processor in (again, ImageProcessor())
    )
    assert np.array_equal(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def speeches(count: int) -> list[str]:
    with lzma.open(SAMPLES / "sotu.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    lines = [line for text in texts for line in re.split(r"(?<=[.;?!]) |\n", text) if line.strip()]
    chosen = random.Random(0).sample(lines, count)
    words = random.Random(1)
    for index in range(0, count, 3):  # a mask in every third, with and without spaces
        parts = chosen[index].split(" ")
        parts.insert(words.randrange(len(parts) + 1), words.choice(["<mask>", "<mask>,", "(<mask>", "<mask><mask>"]))
        chosen[index] = " ".join(parts)
    return chosen


def their_tokenizer():
    mask = transformers.AddedToken("<mask>", lstrip=True, rstrip=False, normalized=False, special=True)
    vocabulary = json.loads((BPE / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (BPE / "merges.txt").read_text().splitlines()[1:] if line]
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges, mask_token=mask)


@pytest.fixture(scope="module")
def tokenizers_() -> tuple:
    return their_tokenizer(), TextTokenizer.from_files(BPE / "vocab.json", BPE / "merges.txt")


def test_a_thousand_lines_are_tokenized_alike(tokenizers_):
    theirs, own = tokenizers_
    lines = speeches(1000)
    assert sum("<mask>" in line for line in lines) > 300
    expected, found = theirs(lines), own(lines)
    assert found["input_ids"] == expected["input_ids"]
    assert found["attention_mask"] == expected["attention_mask"]
    assert own.mask_token_id == theirs.mask_token_id
    assert any(own.mask_token_id in row for row in found["input_ids"])
    assert own.batch_decode(found["input_ids"]) == theirs.batch_decode(expected["input_ids"])
    assert own.batch_decode(found["input_ids"][:9], skip_special_tokens=True) == theirs.batch_decode(
        expected["input_ids"][:9], skip_special_tokens=True
    )


def test_pairs_padding_and_truncation(tokenizers_):
    theirs, own = tokenizers_
    first, second = speeches(6)[:3], speeches(6)[3:]
    for options in (
        {"padding": True},
        {"padding": "max_length", "max_length": 60, "truncation": True},
        {"padding": True, "truncation": True, "max_length": 20},
    ):
        for pair in (None, second):
            expected = theirs(first, pair, return_tensors="pt", **options)
            found = own(first, pair, return_tensors="pt", **options)
            assert torch.equal(found["input_ids"], expected["input_ids"])
            assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert own("Hello <mask>.")["input_ids"] == theirs("Hello <mask>.")["input_ids"]
    plain = own("Hello", add_special_tokens=False)["input_ids"]
    assert plain == theirs("Hello", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="need max_length"):
        own("Hello", truncation=True)
    with pytest.raises(ValueError, match="set padding=True"):
        own(["Hello", "Hello my friend"], return_tensors="pt")


def test_files_of_the_tokenizer_go_both_ways(tokenizers_, tmp_path):
    theirs, own = tokenizers_
    lines = speeches(30)
    own.save_pretrained(tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again(lines)["input_ids"] == own(lines)["input_ids"]
    assert again.mask_token_id == own.mask_token_id
    assert again.pad_token_id == own.pad_token_id == 1
    theirs.save_pretrained(tmp_path / "theirs")
    assert TextTokenizer.from_pretrained(tmp_path / "theirs")(lines)["input_ids"] == own(lines)["input_ids"]
    assert TextTokenizer.from_pretrained(BPE)(lines)["input_ids"] == own(lines)["input_ids"]
    with pytest.raises(ConfigError, match="has no tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Letters


@pytest.mark.parametrize("lower", [False, True])
def test_letters(lower, tmp_path):
    own = CTCTokenizer(do_lower_case=lower, hf_compat=True)
    own.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "vocab.json").read_text())) == list(LIBRISPEECH_SYMBOLS)
    theirs = transformers.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", do_lower_case=lower)
    texts = ["A MAN SAID TO THE UNIVERSE", "sweat covered", "DON'T 5"]
    assert own(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert own(texts[0])["input_ids"] == theirs(texts[0])["input_ids"]
    random_ = np.random.default_rng(0)
    rows = random_.choice(32, (5, 60), p=[0.4, *[0.6 / 31] * 31]).repeat(2, axis=1)
    for options in ({}, {"group_tokens": False}, {"skip_special_tokens": True}):
        assert own.batch_decode(rows, **options) == theirs.batch_decode(rows, **options)
    spelled = (
        own(
            "A MAN SAID",
        )["input_ids"]
        if not lower
        else own("a man said")["input_ids"]
    )
    frames = [0, 0, *np.repeat(spelled, 3), 0]
    expected = theirs.decode(frames, output_char_offsets=True, output_word_offsets=True)
    found = own.decode(frames, output_char_offsets=True, output_word_offsets=True)
    assert found["text"] == expected.text
    assert found["word_offsets"] == expected.word_offsets
    assert found["char_offsets"] == expected.char_offsets
    again = CTCTokenizer.from_pretrained(tmp_path)
    assert again.vocabulary == own.vocabulary
    assert again.do_lower_case is lower
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto(texts)["input_ids"] == own(texts)["input_ids"]


def test_doubled_letters_survive_without_special_symbols():
    frames = [5, 5, 0, 5, 1, 6]  # E, blank, E, <s>, T
    assert CTCTokenizer().decode(frames, skip_special_tokens=True) == "EET"
    assert CTCTokenizer(hf_compat=True).decode(frames, skip_special_tokens=True) == "ET"


def test_a_vocabulary_without_a_blank_is_refused():
    with pytest.raises(ConfigError, match=r"lacks <pad>, which is CTC's blank"):
        CTCTokenizer({"<unk>": 0, "A": 1})
    assert CTCTokenizer({"<pad>": 0, "A": 1})("A B")["input_ids"][0] == 1, "others get numbers beyond the vocabulary"


# ---------------------------------------------------------------------------------------------------------------------
# processor_config.json of transformers 5


def write(folder, name, content) -> None:
    (folder / name).write_text(json.dumps(content))


SPEECH = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 8000, "do_normalize": False}


@pytest.mark.parametrize("key", ["feature_extractor", "audio_processor"])
def test_the_nested_file_of_transformers_5_is_read(key, tmp_path):
    write(tmp_path, "processor_config.json", {key: SPEECH, "processor_class": "Wav2Vec2Processor"})
    found = AudioFeatureExtractor.from_pretrained(tmp_path)
    assert (found.sampling_rate, found.do_normalize) == (8000, False)


def test_the_nested_file_goes_before_the_old_one_and_a_difference_is_said(tmp_path, caplog):
    write(tmp_path, "processor_config.json", {"feature_extractor": SPEECH})
    write(tmp_path, "preprocessor_config.json", SPEECH | {"sampling_rate": 16000})
    assert AudioFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 8000
    assert "sampling_rate=8000" in caplog.text
    assert "16000" in caplog.text
    assert "do_normalize" not in caplog.text


def test_a_nested_file_without_the_part_leaves_the_old_one(tmp_path):
    write(tmp_path, "processor_config.json", {"processor_class": "Wav2Vec2Processor"})
    write(tmp_path, "preprocessor_config.json", SPEECH)
    assert AudioFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 8000


def test_a_nested_image_processor_is_read(tmp_path):
    size = {"height": 40, "width": 24}
    nested = {"size": size, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_center_crop": None, "crop_size": None}
    write(tmp_path, "processor_config.json", {"image_processor": nested})
    found = ImageProcessor.from_pretrained(tmp_path)
    assert (found.size, found.image_mean, found.crop_size) == ((40, 24), [0.1] * 3, None)


def test_transformers_itself_writes_what_is_read(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False)
    transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(tmp_path / "both")
    found = AudioFeatureExtractor.from_pretrained(tmp_path / "both")
    assert (found.sampling_rate, found.do_normalize) == (8000, False)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_rate": "16000"},
        {"sampling_rate": 0},
        {"sampling_rate": 16000.5},
        {"do_normalize": "yes"},
        {"padding_value": float("nan")},
        {"feature_size": 80},
        {"padding_side": "left"},
        {"feature_extractor_type": "SeamlessM4TFeatureExtractor"},
    ],
    ids=str,
)
def test_settings_of_recordings_that_cannot_be_are_one_line(change, tmp_path):
    write(tmp_path, "preprocessor_config.json", SPEECH | change)
    with pytest.raises(ConfigError) as caught:
        AudioFeatureExtractor.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"image_std": [0.0, 0.5, 0.5]},
        {"image_std": [0.5]},
        {"image_mean": [float("nan")] * 3},
        {"image_mean": "imagenet"},
        {"size": {"shortest_edge": 224}},
        {"size": {"height": "a", "width": 3}},
        {"size": [1, 2]},
        {"size": {"height": 0, "width": 0}},
        {"rescale_factor": 0},
        {"resample": "bicubic"},
        {"fit": "squash"},
    ],
    ids=str,
)
def test_settings_of_images_that_cannot_be_are_one_line(change, tmp_path):
    write(tmp_path, "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | change)
    with pytest.raises(ConfigError) as caught:
        ImageProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
