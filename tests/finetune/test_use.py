"""What is done with trained weights: errors, freezing, export, features, probes, predictions."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import data2vec_train as ours
from data2vec_train import checkpoints
from data2vec_train.data.sources.files import FolderSource, RawSample
from data2vec_train.data.sources.metadata import classes_of
from data2vec_train.embed import run as embedding_task
from data2vec_train.encoders.waveform import ConvLayer
from data2vec_train.errors import BadSample, DataError
from data2vec_train.features.embedding import embed_inputs
from data2vec_train.finetune.data import few_of
from data2vec_train.finetune.metrics import (
    answer_scores,
    classification_scores,
    entity_scores,
    equal_error_rate,
    segmentation_scores,
    transcript_scores,
)
from data2vec_train.finetune.transcribe import BeamDecoder
from data2vec_train.finetune.vision import SemanticSegmentation
from data2vec_train.system import outputs
from data2vec_train.system.outputs import release, sole_writer, take_lock
from data2vec_train.training.optim import layered_adamw
from data2vec_train.weights.preprocessing import AudioFeatureExtractor
from data2vec_train.weights.tokenizers import CTCTokenizer
from tests.records import ARPA

CHECKOUT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# One clear error each


def one_error(capsys) -> str:
    """The only line on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("error:", "  "))]
    assert len(said) == 1, lines
    assert not any("Traceback" in line for line in lines)
    return said[0]


def test_a_head_of_another_modality(program_of, weights, capsys):
    given = ["modality=vision", "head=ctc", f"init_from={weights('vision')}", "data=folder", "data.path=."]
    assert program_of("finetune", *given) == 2
    assert "CTC is for modality=audio" in one_error(capsys)


def test_weights_of_another_modality(program_of, weights, records, tmp_path, capsys):
    path = records("utterance", tmp_path / "rows.parquet")
    given = ["modality=audio", "head=utterance", f"init_from={weights('vision')}", "data=hf", f"data.path={path}"]
    assert program_of("finetune", *given, f"hydra.run.dir={tmp_path}/run") == 2
    assert "is a model for vision; choose modality=vision" in one_error(capsys)


def test_patches_of_another_size_than_the_weights(program_of, weights, records, tmp_path, capsys):
    path = records("image", tmp_path / "rows.parquet")
    given = ["modality=vision", "head=image", f"init_from={weights('vision')}", "data=hf", f"data.path={path}"]
    assert program_of("finetune", *given, "modality.patch_px=16", f"hydra.run.dir={tmp_path}/run") == 2
    assert re.search(r"modality\.patch_px=16: init_from=.* was made for \d+; leave it out", one_error(capsys))


def test_pixels_of_a_class_that_there_is_not(command, capsys):
    status, _ = command("segmentation", "head.classes=2", steps=1)
    assert status == 2
    assert "its map has the class 2" in one_error(capsys)


def test_metadata_that_names_other_files(program_of, weights, rows, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, row in enumerate(rows("ctc")):
        (folder / f"{number}.wav").write_bytes(row["audio"]["bytes"])
    (folder / "metadata.csv").write_text("file_name,text\n0.wav,A B\n99.wav,B A\n")
    given = ["modality=audio", "head=ctc", f"init_from={weights('audio')}", "data=folder", f"data.path={folder}"]
    assert program_of("finetune", *given, f"hydra.run.dir={tmp_path}/run") == 2
    error = one_error(capsys)
    assert "1 of 2 files" in error
    assert "99.wav" in error


def test_no_transcripts_at_all(command, rows, capsys):
    status, _ = command("ctc", steps=1, rows=[row | {"text": " "} for row in rows("ctc")])
    assert status == 2
    message = one_error(capsys)
    assert "all 16 transcripts are empty" in message
    assert "ctc.parquet:0" in message


def test_weights_of_another_size(program_of, weights, records, tmp_path, capsys):
    import shutil

    broken = tmp_path / "weights"
    shutil.copytree(weights("vision"), broken)
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | {"hidden_size": 32}))
    path = records("image", tmp_path / "rows.parquet")
    given = ["modality=vision", "head=image", f"init_from={broken}", "data=hf", f"data.path={path}"]
    assert program_of("finetune", *given, "data.label_column=kind", f"hydra.run.dir={tmp_path}/run") == 2
    assert "shape" in one_error(capsys)


def test_test_records_of_an_unknown_class(program_of, weights, rows, tmp_path, capsys):
    import pyarrow

    some = rows("image")
    parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / "train.parquet")
    other = [row | {"kind": "neither"} if number == 0 else row for number, row in enumerate(some)]
    parquet.write_table(pyarrow.Table.from_pylist(other), tmp_path / "test.parquet")
    given = [f"init_from={weights('vision')}", "data=hf", f"data.path={tmp_path}/train.parquet", "head=image"]
    given += [f"data.test_source={{path:{tmp_path}/test.parquet}}", "data.label_column=kind", "modality=vision"]
    assert program_of("finetune", *given, f"hydra.run.dir={tmp_path}/run") == 2
    assert "test records have the class neither, which no training record has" in one_error(capsys)


def test_weights_that_are_not_there_are_said_beside_their_modality(program_of, tmp_path, capsys):
    given = ["data=hf", f"data.path={tmp_path}", f"out={tmp_path}/out.jsonl"]
    assert program_of("predict", f"checkpoint={tmp_path}/nowhere", *given) == 2
    said = capsys.readouterr().err
    assert "modality is not set" in said
    assert f"checkpoint: there is no file or folder {tmp_path}/nowhere" in said


def test_an_encoder_has_no_predictions(program_of, weights, records, tmp_path, capsys):
    path = records("image", tmp_path / "rows.parquet")
    given = [f"checkpoint={weights('vision')}", "data=hf", f"data.path={path}", f"out={tmp_path}/out.jsonl"]
    assert program_of("predict", *given) == 2
    assert "an encoder without a head" in one_error(capsys)


def test_probing_without_classes(program_of, weights, records, tmp_path, capsys):
    path = records("image", tmp_path / "rows.parquet")
    given = [f"checkpoint={weights('vision')}", "data=hf", f"data.path={path}", f"hydra.run.dir={tmp_path}/run"]
    assert program_of("probe", *given) == 2
    assert "the records have no classes" in one_error(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def encoder_of(run_dir: Path) -> dict[str, torch.Tensor]:
    content = checkpoints.read(checkpoints.resolve(run_dir))["state_dict"]
    return {name.partition("encoder.")[2]: tensor for name, tensor in content.items() if ".encoder." in name}


@pytest.mark.parametrize(
    ("setting", "moves"),
    [("freeze.encoder_steps=2", False), ("freeze.encoder_steps=1", True), ("freeze.encoder_steps=null", False)],
)
def test_a_frozen_encoder_stays_as_it_is(command, weights, setting, moves):
    status, run_dir = command("image", setting, "report=false", steps=2)
    assert status == 0
    before = ours.load_pretrained(weights("vision")).get_encoder().state_dict()
    after = encoder_of(run_dir)
    assert any(not torch.equal(before[name], after[name]) for name in after if name in before) == moves


def test_a_frozen_front_end_stays_as_it_is(command, weights):
    status, run_dir = command("utterance", "freeze.front_end=true", "report=false", steps=2)
    assert status == 0
    before, after = ours.load_pretrained(weights("audio")).get_encoder().state_dict(), encoder_of(run_dir)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("embedder.features") for name in changed)
    assert any(name.startswith("transformer") for name in changed)


def test_random_weights_keep_the_architecture_only(command, weights):
    status, run_dir = command("utterance", "random_weights=true", "report=false", "freeze.encoder_steps=null", steps=1)
    assert status == 0
    before, after = ours.load_pretrained(weights("audio")).get_encoder().state_dict(), encoder_of(run_dir)
    name = "transformer.blocks.0.ffn.fc1.weight"
    assert before[name].shape == after[name].shape
    assert not torch.equal(before[name], after[name])


def test_a_new_head_for_image_classes_can_start_small(command):
    # Spec 4.3: the original of 1.0 starts at 0.001 of the usual weights. The least learning rate leaves them there.
    still = ("freeze.encoder_steps=null", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "report=false")
    status, run_dir = command("image", "head.init_scale=0.001", *still, steps=1)
    assert status == 0
    head = ours.load_pretrained(run_dir).classifier
    assert float(head.weight.detach().abs().mean()) == pytest.approx(0.001 * 0.02 * (2 / np.pi) ** 0.5, rel=0.3)
    assert float(head.bias.detach().abs().max()) < 1e-20


def test_lower_layers_learn_slower():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("low", "middle", "top")})
    above = {"low": 2, "middle": 1, "top": 0}
    rest = {"lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decay_all": False, "fused": False}
    optimizer = layered_adamw(
        model, block_of=lambda name: above[name.split(".")[0]], no_decay=frozenset(), layer_decay=0.5, **rest
    )
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is known for known in group["params"])
    }
    assert found["low.weight"] == (0.25, 0.1)
    assert found["low.bias"] == (0.25, 0.0)
    assert found["middle.weight"] == (0.5, 0.1)
    assert found["top.weight"] == (1.0, 0.1)


def test_few_records_are_about_as_many_of_each_class():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 45)
    rows = few_of(labels, np.arange(100), 12, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert not np.array_equal(rows, few_of(labels, np.arange(100), 12, seed=1))


def test_a_map_stands_for_one_image_alone(tmp_path):
    for name in ("train/a.png", "test/a.png", "other/b.png", "maps/a.png", "maps/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    task = SemanticSegmentation(inputs=None, map_column=None, maps=str(tmp_path / "maps"), classes=2,
                                reduce_labels=False, crop_scale=None, horizontal_flip=0.0,
                                auxiliary_weight=0.0)  # fmt: skip
    sources = [
        FolderSource(path=str(tmp_path / name), extensions=[".png"], class_from_folder=False)
        for name in ("train", "test", "other")
    ]
    task.setup(sources[0], np.arange(1))
    task.check_test(sources[0])
    task.check_test(sources[2])
    with pytest.raises(DataError, match=r"a\.png is the name of a training image"):
        task.check_test(sources[1])
    (tmp_path / "maps" / "b.png").unlink()
    with pytest.raises(DataError, match="1 of 1 images have no map"):
        task.check_test(sources[2])


def test_a_map_may_be_lists_of_numbers():
    task = SemanticSegmentation(inputs=None, map_column="map", maps=None, classes=2, reduce_labels=False,
                                crop_scale=None, horizontal_flip=0.0, auxiliary_weight=0.0)  # fmt: skip
    transform = SimpleNamespace(size=(2, 2), normalise=torch.Tensor.float)
    task.inputs = SimpleNamespace(decode=lambda value: value, transform=transform)
    raw = RawSample("0", np.zeros((2, 2, 3), np.uint8), None, {"map": [[0, 1], [255, 0]]})
    found = task.example(raw, train=False, rng=np.random.default_rng(0))
    assert found["classes"].tolist() == [[0, 1], [255, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_scores_are_what_they_are_by_hand():
    assert transcript_scores(["a b c", "d"], ["a x c", "d e"])["wer"] == pytest.approx(2 / 5)
    scores = classification_scores([0, 1, 1, 1], [0, 0, 1, 1], 2)
    assert scores["accuracy"] == pytest.approx(0.75)
    assert scores["f1"] == pytest.approx(0.8)
    assert scores["matthews"] == pytest.approx(1 / 3**0.5)
    tags = ["B-a", "I-a", "O", "B-b", "B-b"]
    assert entity_scores([tags], [["B-a", "I-a", "O", "B-b", "I-b"]])["entity_f1"] == pytest.approx(2 * 1 / (3 + 2))
    found = answer_scores(["the red house", ""], [["red house"], [""]])
    assert found == {"exact_match": 1.0, "f1": 1.0}  # SQuAD takes articles out
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert segmentation_scores(confusion)["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_equal_error_rate_of_perfect_and_of_useless_vectors():
    labels = np.repeat(np.arange(4), 5)
    assert equal_error_rate(np.eye(4)[labels], labels) == pytest.approx(0.0, abs=1e-6)
    rng = np.random.default_rng(0)
    useless = rng.standard_normal((200, 16))
    useless /= np.linalg.norm(useless, axis=1, keepdims=True)
    assert equal_error_rate(useless, rng.integers(0, 4, 200)) == pytest.approx(0.5, abs=0.05)
    assert np.isnan(equal_error_rate(np.eye(3), np.arange(3)))


def test_classes_in_order_and_missing_ones():
    names, numbers = classes_of(["b", None, "a", "", "b"])
    assert names == ["a", "b"]
    assert numbers.tolist() == [1, -1, 0, -1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Transcripts


def spelt(tokenizer: CTCTokenizer, text: str, sure: float = 6.0) -> torch.Tensor:
    """Logits (1, T, V) of a text, a frame for each symbol and a blank behind it."""
    ids = [number for symbol in tokenizer(text)["input_ids"] for number in (symbol, 0)]
    logits = torch.zeros(1, len(ids), len(tokenizer.vocabulary))
    logits[0, torch.arange(len(ids)), torch.tensor(ids)] = sure
    return logits


def test_beam_search_without_a_language_model_reads_what_is_there(tmp_path):
    pytest.importorskip("flashlight.lib.text.decoder")
    tokenizer = CTCTokenizer()
    plain = {"beam_size": 20, "beam_threshold": 50.0, "lm_weight": 0.0, "word_score": 0.0}
    decoder = BeamDecoder(tokenizer, lm=None, lexicon=None, **plain)
    logits = spelt(tokenizer, "LETTER BOX")
    assert decoder(logits, [logits.shape[1]]) == ["LETTER BOX"]


def test_a_language_model_changes_what_is_read(tmp_path):
    pytest.importorskip("flashlight.lib.text.decoder")
    pytest.importorskip("kenlm")
    tokenizer = CTCTokenizer()
    (tmp_path / "words.arpa").write_text(ARPA)
    settings = {"beam_size": 50, "beam_threshold": 100.0, "lm": str(tmp_path / "words.arpa"), "lexicon": None}
    decoder = BeamDecoder(tokenizer, lm_weight=2.0, word_score=0.0, **settings)
    heard = spelt(tokenizer, "ABXA ", sure=2.0)  # no word
    assert decoder(heard, [heard.shape[1]]) == ["ABBA"]


# ---------------------------------------------------------------------------------------------------------------------
# Export and predictions


def test_a_fine_tuned_ctc_model_is_the_same_in_transformers(command, program_of, tmp_path):
    transformers = pytest.importorskip("transformers")
    status, run_dir = command("ctc", "optimizer.lr=3e-3", "report=false", steps=200)
    assert status == 0
    assert program_of("export", f"checkpoint={run_dir}", "format=hf", f"out={tmp_path}/hf") == 0
    mine = ours.load_pretrained(run_dir)
    theirs = transformers.Data2VecAudioForCTC.from_pretrained(tmp_path / "hf").eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "hf")
    assert isinstance(transformers.AutoProcessor.from_pretrained(tmp_path / "hf"), transformers.Wav2Vec2Processor)
    path = tmp_path / "ctc.parquet"
    given = [f"checkpoint={tmp_path}/hf", "data=hf", f"data.path={path}", f"out={tmp_path}/said.jsonl"]
    assert program_of("predict", *given, "data.num_workers=0") == 0
    said = {
        row["key"]: row["prediction"] for row in map(json.loads, (tmp_path / "said.jsonl").read_text().splitlines())
    }
    assert len(set(said.values())) > 1
    import io

    import soundfile

    for number, row in enumerate(parquet.read_table(path).to_pylist()):
        wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        inputs = extractor(wave, sampling_rate=rate, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(inputs["input_values"]).logits
            found = mine(inputs["input_values"]).logits
        assert torch.allclose(found, expected, atol=1e-5)
        assert tokenizer.decode(expected[0].argmax(-1)) == said[f"ctc.parquet:{number}"]


@pytest.mark.parametrize("head", ["frame", "speaker", "sequence", "token", "qa", "multiple_choice", "image"])
def test_predictions_of_a_head(command, program_of, head, tmp_path):
    status, run_dir = command(head, "report=false", steps=1)
    assert status == 0
    out = tmp_path / "said.jsonl"
    given = [f"checkpoint={run_dir}", "data=hf", f"data.path={tmp_path}/{head}.parquet", f"out={out}"]
    assert program_of("predict", *given, "data.num_workers=0") == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 16
    assert all("prediction" in line for line in lines)


def test_maps_are_written_as_pictures(command, program_of, tmp_path):
    status, run_dir = command("segmentation", "report=false", steps=1)
    assert status == 0
    facts = run_dir / "model" / "finetuning.json"  # as if the maps of the training had been files of these names
    settings = json.loads(facts.read_text())
    settings["head"] |= {"maps": str(tmp_path), "map_column": None}
    facts.write_text(json.dumps(settings))
    Image.new("L", (3, 3)).save(tmp_path / "segmentation.png")
    given = [f"checkpoint={run_dir}", "data=hf", f"data.path={tmp_path}/segmentation.parquet", f"out={tmp_path}/maps"]
    assert program_of("predict", *given, "data.num_workers=0") == 0
    lines = [json.loads(line) for line in (tmp_path / "maps" / "predictions.jsonl").read_text().splitlines()]
    classes = np.array(Image.open(tmp_path / "maps" / lines[0]["prediction"]))
    assert classes.shape == (32, 32)
    assert classes.max() <= 2
    assert all("prediction" in line for line in lines)


def test_files_are_read_as_pretraining_reads_them(command, program_of, tmp_path):
    status, run_dir = command("sequence", "report=false", steps=1)
    assert status == 0
    folder = tmp_path / "texts"
    folder.mkdir()
    words = {"plain": b"caf\xc3\xa9 alpha", "latin": b"caf\xe9 alpha", "wide": "café alpha".encode("utf-16")}
    words["mark"] = "\ufeffcafé alpha".encode()
    for name, raw in words.items():
        (folder / f"{name}.txt").write_bytes(raw)
    (folder / "rows.jsonl").write_text('{"text": "alpha"}\n')
    (folder / "binary.txt").write_bytes(b"alpha\0beta")
    out = tmp_path / "out.jsonl"
    given = [f"checkpoint={run_dir}", "data=folder", f"data.path={folder}", f"out={out}", "data.num_workers=0"]
    assert program_of("predict", *given) == 0
    lines = {line["key"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert "a table; read it with data=hf" in lines.pop("rows.jsonl")["error"]
    assert "a binary file" in lines.pop("binary.txt")["error"]
    assert sorted(lines) == sorted(f"{name}.txt" for name in words)
    assert len({line["prediction"]["probability"] for line in lines.values()}) == 1


def test_language_models_fill_in_and_go_on(command, program_of, tmp_path):
    import pyarrow

    texts = pyarrow.table({"text": ["alpha beta <mask> delta"]})
    parquet.write_table(texts, tmp_path / "texts.parquet")
    for head in ("masked_lm", "causal_lm"):
        status, run_dir = command(head, "report=false", f"hydra.run.dir={tmp_path}/{head}", steps=1)
        assert status == 0
        out = tmp_path / f"{head}.jsonl"
        given = [f"checkpoint={tmp_path}/{head}", "data=hf", f"data.path={tmp_path}/texts.parquet", f"out={out}"]
        assert program_of("predict", *given, "data.num_workers=0") == 0
        [line] = [json.loads(text) for text in out.read_text().splitlines()]
        assert len(line["prediction"][0]) == 5 if head == "masked_lm" else isinstance(line["prediction"], str)


def test_a_long_text_goes_on_at_its_end(command, program_of, tmp_path):
    status, run_dir = command("causal_lm", "report=false", steps=1)
    assert status == 0
    folder = tmp_path / "texts"
    folder.mkdir()
    end = " ".join(["seven eight nine"] * 40)
    for name, start in {"a": "alpha beta " * 100, "b": "gamma delta " * 100}.items():
        (folder / f"{name}.txt").write_text(start + end)
    out = tmp_path / "out.jsonl"
    given = [f"checkpoint={run_dir}", "data=folder", f"data.path={folder}", f"out={out}", "data.num_workers=0"]
    assert program_of("predict", *given) == 0
    first, second = (json.loads(line)["prediction"] for line in out.read_text().splitlines())
    assert first == second
    assert len(first) > 8


# ---------------------------------------------------------------------------------------------------------------------
# Features


def images(folder: Path, count: int, side: int = 32) -> Path:

    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{number:06d}.png")
    return folder


def embed_command(checkpoint: Path, folder: Path, out: Path, *more: str) -> list[str]:
    given = [f"checkpoint={checkpoint}", "data=folder", f"data.path={folder}", f"out={out}", "rows_per_part=8"]
    return [*given, "data.num_workers=0", *more]


def test_features_are_those_of_the_layers(program_of, weights, tmp_path):
    folder = images(tmp_path / "images", 10)
    out = tmp_path / "out.parquet"
    assert program_of("embed", *embed_command(weights("vision"), folder, out, "layers=[0,2,4]")) == 0
    table = parquet.read_table(out)
    assert table.column_names == ["key", "layer_0", "layer_2", "layer_4"]
    assert table["key"].to_pylist() == [f"{number:06d}.png" for number in range(10)]
    paths = [folder / name for name in table["key"].to_pylist()]
    called = embed_inputs(weights("vision"), paths, layers=[0, 2, 4])
    for place, name in enumerate(table.column_names[1:]):
        expected = np.stack([vectors[place] for vectors in called])
        assert np.allclose(np.array(table[name].to_pylist()), expected, atol=1e-6)

    from data2vec_train.weights.preprocessing import ImageProcessor

    model = ours.load_pretrained(weights("vision"))
    pixels = ImageProcessor.from_pretrained(weights("vision"))(Image.open(paths[3]), return_tensors="pt")
    with torch.no_grad():
        hidden = model(**pixels, output_hidden_states=True).hidden_states[2][0, 1:].mean(dim=0)
    assert np.allclose(called[3][1], hidden.numpy(), atol=1e-5)


def test_features_of_every_token_and_of_texts(program_of, weights, tmp_path):
    found = embed_inputs(weights("text"), ["alpha beta", "alpha beta gamma delta red"], pooling="none")
    alone = embed_inputs(weights("text"), ["alpha beta"], pooling="none")
    assert found[0][0].shape[0] < found[1][0].shape[0]
    assert np.allclose(found[0][0], alone[0][0], atol=1e-5)
    folder = images(tmp_path / "images", 3)
    out = tmp_path / "out.parquet"
    assert program_of("embed", *embed_command(weights("vision"), folder, out, "pooling=none", "dtype=float16")) == 0
    assert np.array(parquet.read_table(out)["layer_4"][0].as_py()).shape == (64, 64)
    spread = tmp_path / "spread.parquet"
    assert program_of("embed", *embed_command(weights("vision"), folder, spread, "pooling=mean_std")) == 0
    tokens = np.array(parquet.read_table(out)["layer_4"][0].as_py(), np.float32)
    found = np.array(parquet.read_table(spread)["layer_4"][0].as_py())
    assert np.allclose(found[:64], tokens.mean(axis=0), atol=2e-3)
    assert found.shape == (128,)
    assert np.allclose(found[64:], tokens.std(axis=0), atol=2e-2)


def test_features_of_texts_are_those_of_the_command(program_of, weights, tmp_path):
    folder, out = tmp_path / "texts", tmp_path / "out.parquet"
    folder.mkdir()
    (folder / "long.txt").write_text("alpha beta gamma delta red " * 50)
    (folder / "short.txt").write_text("alpha beta")
    assert program_of("embed", *embed_command(weights("text"), folder, out)) == 0
    table = parquet.read_table(out)
    rows = [table["key"].to_pylist().index(key) for key in ("long.txt@0", "short.txt@0")]
    called = embed_inputs(weights("text"), [(folder / name).read_text() for name in ("long.txt", "short.txt")])
    commanded = np.array([table.column(1)[row].as_py() for row in rows])
    assert np.allclose(commanded, [vectors[0] for vectors in called], atol=1e-5)


def test_speech_is_embedded_by_matrix_products(weights, monkeypatch):
    """The classes of Hugging Face's page convolve, as transformers does, which is slower."""
    multiplied = []
    multiply = ConvLayer._multiply
    monkeypatch.setattr(ConvLayer, "_multiply", lambda layer, x: multiplied.append(layer) or multiply(layer, x))
    wave = torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy()
    [[found]] = embed_inputs(weights("audio"), [wave])
    assert len(multiplied) == 6
    prepared = AudioFeatureExtractor.from_pretrained(weights("audio"))(wave, sampling_rate=8000, return_tensors="pt")
    with torch.no_grad():
        expected = ours.load_pretrained(weights("audio"))(**prepared).last_hidden_state[0].mean(dim=0)
    assert len(multiplied) == 6
    assert np.allclose(found, expected.numpy(), atol=1e-5)


def test_an_input_that_cannot_be_used_is_named(weights, tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(BadSample, match=r"a\.wav: not an audio file"):
        embed_inputs(weights("audio"), [np.sin(np.arange(8000)), str(tmp_path / "a.wav")])
    with pytest.raises(BadSample, match="input 1: "):
        embed_inputs(weights("vision"), [np.zeros((32, 32, 3), np.uint8), b"no image"])


def test_broken_files_are_left_out_and_listed(program_of, weights, tmp_path):
    folder = images(tmp_path / "images", 5)
    (folder / "000002.png").write_bytes(b"nothing")
    out = tmp_path / "out.parquet"
    assert program_of("embed", *embed_command(weights("vision"), folder, out)) == 0
    assert len(parquet.read_table(out)) == 4
    [line] = [json.loads(text) for text in (tmp_path / "out.parquet.rejected.jsonl").read_text().splitlines()]
    assert line["key"] == "000002.png"


def test_an_interrupted_embedding_goes_on(program_of, weights, tmp_path, monkeypatch, capsys):
    folder = images(tmp_path / "images", 40)
    assert program_of("embed", *embed_command(weights("vision"), folder, tmp_path / "whole.parquet")) == 0
    write, written = embedding_task._write_part, []

    def two_parts(parts, number, *more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return write(parts, number, *more)

    monkeypatch.setattr(embedding_task, "_write_part", two_parts)
    again = embed_command(weights("vision"), folder, tmp_path / "again.parquet")
    assert program_of("embed", *again) == 130
    monkeypatch.setattr(embedding_task, "_write_part", write)
    assert program_of("embed", *again[:-1], "pooling=mean_std", again[-1]) == 2
    assert "holds parts made with other settings: pooling=mean_std (was mean)" in capsys.readouterr().err
    assert program_of("embed", *again) == 0
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "again.parquet.parts").exists()


@pytest.fixture(scope="module")
def stopped(weights, program_of, tmp_path_factory):
    """A command whose work stopped after four of five parts, in a folder, and a copy of that folder."""
    place = tmp_path_factory.mktemp("stopped") / "work"
    place.mkdir()
    command = embed_command(weights("vision"), images(place / "images", 40), place / "out.parquet")
    write = embedding_task._write_part

    def four_parts(parts, number, *more):
        if number == 4:
            raise KeyboardInterrupt
        return write(parts, number, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embedding_task, "_write_part", four_parts)
        assert program_of("embed", *command) == 130
    kept = place.with_name("kept")
    shutil.copytree(place, kept)
    assert program_of("embed", *command) == 0
    return command, place, kept, (place / "out.parquet").read_bytes()


@pytest.fixture
def interrupted(stopped):
    """`stopped` as it was."""
    command, place, kept, whole = stopped
    shutil.rmtree(place)
    shutil.copytree(kept, place)
    out, parts = place / "out.parquet", place / "out.parquet.parts"
    return SimpleNamespace(command=command, folder=place / "images", parts=parts, out=out, whole=whole)


def test_damaged_parts_are_computed_anew(interrupted, program_of, capsys):
    parts = [next(interrupted.parts.glob(f"part-{number:06d}-*")) for number in range(4)]
    content = bytearray(parts[0].read_bytes())
    content[len(content) // 2] ^= 1
    parts[0].write_bytes(content)
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    parts[2].write_bytes(b"")
    parts[3].rename(parts[3].with_name("part-abc.parquet"))
    assert program_of("embed", *interrupted.command) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("the part is computed again") == 4
    assert interrupted.out.read_bytes() == interrupted.whole
    assert not interrupted.parts.exists()


def test_parts_that_do_not_say_what_they_are_of_are_not_used(interrupted, program_of, capsys):
    (interrupted.parts / "identity.json").write_bytes(b"\0" * 100)
    assert program_of("embed", *interrupted.command) == 0
    assert "is damaged, so the origin of its parts is unknown" in capsys.readouterr().out
    assert interrupted.out.read_bytes() == interrupted.whole


@pytest.mark.parametrize(
    "change", ["one file added", "one in the middle removed", "one renamed", "one replaced", "other weights"]
)
def test_parts_of_other_data_are_refused(change, interrupted, program_of, weights, tmp_path, capsys):
    command, third = interrupted.command, interrupted.folder / "000003.png"
    match change:
        case "one file added":
            Image.new("RGB", (32, 32)).save(interrupted.folder / "000003b.png")
        case "one in the middle removed":
            third.unlink()
        case "one renamed":
            third.rename(third.with_name("000003b.png"))
        case "one replaced":
            Image.new("RGB", (32, 32)).save(third)
        case "other weights":
            model = ours.load_pretrained(weights("vision"))
            with torch.no_grad():
                next(model.parameters()).add_(1e-3)
            ours.save_pretrained(model, tmp_path / "other")
            command = [f"checkpoint={tmp_path}/other", *command[1:]]
    capsys.readouterr()
    assert program_of("embed", *command) == 2
    what = "weights" if change == "other weights" else "(records and )?data"
    assert re.search(f"holds parts made with other {what}: .*Remove it", one_error(capsys))
    assert not interrupted.out.exists()


def test_a_part_that_changes_before_they_are_joined_gives_no_wrong_rows(interrupted, program_of, monkeypatch, capsys):
    merge = embedding_task._merge

    def damaged(parts, *more):
        parts[2].write_bytes(parts[2].read_bytes()[:-1] + b"x")
        return merge(parts, *more)

    with monkeypatch.context() as patched:
        patched.setattr(embedding_task, "_merge", damaged)
        assert program_of("embed", *interrupted.command) == 2
    assert "has changed on disk" in one_error(capsys)
    assert not interrupted.out.exists()
    assert program_of("embed", *interrupted.command) == 0
    assert interrupted.out.read_bytes() == interrupted.whole


OUTPUTS = {"embed": "out.parquet", "predict": "out.jsonl", "export": "out"}


@pytest.mark.parametrize("verb", OUTPUTS)
def test_the_second_of_two_commands_for_one_output_is_told(verb, program_of, weights, tmp_path, capsys):
    out = tmp_path / OUTPUTS[verb]
    given = embed_command(weights("vision"), images(tmp_path / "images", 8), out)
    given = {"export": [given[0], "format=safetensors", f"out={out}"], "predict": given[:4], "embed": given}[verb]
    with sole_writer(out):
        assert program_of(verb, *given) == 2
        said = rf"{out}: another process .*\(process {os.getpid()} on"
        assert re.search(said, one_error(capsys))
    assert not out.exists()


def test_the_second_of_two_probes_is_told(program_of, weights, records, tmp_path, capsys):
    path = records("image", tmp_path / "rows.parquet")
    given = [f"checkpoint={weights('vision')}", "data=hf", f"data.path={path}", "data.label_column=kind"]
    (tmp_path / "run").mkdir()
    handle = take_lock(tmp_path / "run" / "lock", "it")
    held = outputs._held.pop(handle)  # as if another process had it
    assert program_of("probe", *given, f"hydra.run.dir={tmp_path}/run") == 2
    error = one_error(capsys)
    assert f"{tmp_path}/run: another process" in error
    assert f"(process {os.getpid()} on" in error
    outputs._held[handle] = held
    release(handle)
    assert not (tmp_path / "run" / "probe.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", OUTPUTS)
def test_two_identical_commands_at_once_make_one_whole_output(verb, weights, command, tmp_path):
    folder, out = images(tmp_path / "images", 60), tmp_path / OUTPUTS[verb]
    given = embed_command(weights("vision"), folder, out)
    if verb == "export":
        given = [given[0], "format=hf", f"out={out}"]
    if verb == "predict":
        assert command("image", steps=1)[0] == 0
        given = [f"checkpoint={tmp_path}/run", *given[1:4], "data.num_workers=0"]
    both = [
        subprocess.Popen([sys.executable, "-m", f"data2vec_train.{verb}", *given], cwd=CHECKOUT,
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    loser = next(error for process, error in zip(both, errors, strict=True) if process.returncode == 2)
    assert "another process" in loser or "exists already" in loser  # when it was late
    assert "Traceback" not in loser
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))}
    assert left == {out.name}


def test_a_part_takes_no_open_file_for_each_record(program_of, weights, tmp_path):
    folder = images(tmp_path / "images", 300)
    many = ["rows_per_part=300", "data.num_workers=1"]
    command = embed_command(weights("vision"), folder, tmp_path / "worker.parquet", *many)
    few_files = ["bash", "-c", 'ulimit -n 200; exec "$@"', "bash", sys.executable, "-m", "data2vec_train.embed"]
    subprocess.run([*few_files, *command], cwd=CHECKOUT, capture_output=True, timeout=120, check=True)
    assert program_of("embed", *embed_command(weights("vision"), folder, tmp_path / "own.parquet", many[0])) == 0
    assert (tmp_path / "worker.parquet").read_bytes() == (tmp_path / "own.parquet").read_bytes()


@pytest.mark.slow
def test_kill_nine_in_the_middle_changes_nothing(weights, tmp_path):
    folder = images(tmp_path / "images", 4000)

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "data2vec_train.embed", *embed_command(weights("vision"), folder, out)]
        return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole.parquet").wait(timeout=300) == 0
    out = tmp_path / "again.parquet"
    for kills in (20, 150, 300):
        process = start(out)
        parts = out.with_name("again.parquet.parts")
        while process.poll() is None and len(list(parts.glob("part-*.parquet"))) < kills:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    assert start(out).wait(timeout=300) == 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.slow
def test_a_hundred_thousand_images_in_flat_memory(weights, tmp_path):
    folder = images(tmp_path / "images", 1000)
    for copy in range(1, 100):
        below = folder / f"{copy:03d}"
        below.mkdir()
        for number in range(1000):
            os.link(folder / f"{number:06d}.png", below / f"{number:06d}.png")
    given = [f"checkpoint={weights('vision')}", "data=folder", f"data.path={folder}", f"out={tmp_path}/out.parquet"]
    command = [sys.executable, "-m", "data2vec_train.embed", *given, "data.num_workers=0"]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.parquet.parts"
    sizes: list[tuple[int, int]] = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        resident = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), None)
        if resident:
            sizes.append((len(list(parts.glob("part-*.parquet"))), resident))
        time.sleep(0.5)
    assert process.returncode == 0
    assert parquet.ParquetFile(tmp_path / "out.parquet").metadata.num_rows == 100_000
    early = max(size for done, size in sizes if 5 <= done <= 40)
    late = max(size for done, size in sizes if done >= 120)
    assert late < 1.1 * early, f"{early / 1024:.0f} MiB early, {late / 1024:.0f} MiB late"


# ---------------------------------------------------------------------------------------------------------------------
# Probes


def test_every_layer_is_probed_beside_untrained_ones(program_of, weights, records, tmp_path):
    path = records("image", tmp_path / "rows.parquet")
    given = [f"checkpoint={weights('vision')}", "data=hf", f"data.path={path}", "data.label_column=kind"]
    given += [f"data.test_source={{path:{path}}}", f"hydra.run.dir={tmp_path}/run", "attentive.epochs=20"]
    assert program_of("probe", *given, "data.num_workers=0", "neighbours=3") == 0
    found = json.loads((tmp_path / "run" / "probe.json").read_text())
    for which in ("trained", "untrained"):
        assert all(len(found[which][name]) == 5 for name in ("knn", "linear", "attentive"))
    assert max(found["trained"]["attentive"]) == 1.0
    assert set(found["raw"]) == {"knn", "linear"}
    assert "data:image/png" in (tmp_path / "run" / "probe.html").read_text()
    assert (tmp_path / "run" / "probe.csv").read_text().splitlines()[0].startswith("layer,k-NN untrained")
