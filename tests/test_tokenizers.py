"""One tokenizer for both sides: the ids of pretraining are those of every program that reads the weights later."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import data2vec_train as ours
from data2vec_train.data import text as text_module
from data2vec_train.data import tokenizer as tokenizer_module
from data2vec_train.data import vocabulary
from data2vec_train.data.text import LongText, documents
from data2vec_train.data.tokenizer import Tokenizer, cut_runs
from data2vec_train.errors import BadSample, ConfigError
from data2vec_train.export.run import export
from data2vec_train.features.embedding import embed_inputs
from data2vec_train.pretrain.run import write_tokenizer
from data2vec_train.weights.tokenizers import EXAMPLES_NAME, TextTokenizer
from tests.tokenizer_kinds import KINDS, TEXTS, write_kind

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


def weights_with(tokenizer: Tokenizer, folder: Path) -> Path:
    """An encoder of the tokenizer's vocabulary, with the files that a run writes."""
    config = ours.Data2VecTextConfig(
        **SIZE,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        max_position_embeddings=tokenizer.pad_id + 1 + 32,
        type_vocab_size=1,
    )
    torch.manual_seed(0)
    ours.Data2VecTextModel(config).save_pretrained(folder)
    write_tokenizer(tokenizer, TEXTS, folder, 32)
    return folder


def exported(source: Path, out: Path) -> Path:
    given = {"checkpoint": str(source), "out": str(out), "format": "hf", "weights": "student", "num_heads": None}
    export(OmegaConf.create(given))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_pretraining_are_those_of_transformers_and_of_our_heads(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(str(write_kind(kind, tmp_path / "given")))
    folder = exported(weights_with(tokenizer, tmp_path / "weights"), tmp_path / "out")
    theirs, own = transformers.AutoTokenizer.from_pretrained(folder), TextTokenizer.from_pretrained(folder)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        whole = [tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id]
        assert theirs(text)["input_ids"] == own(text)["input_ids"] == whole
        assert own.beginning(text, 8) == whole[:-1][:8]
        assert own.end(text, 8) == [whole[0], *whole[1:-1][-7:]]
        assert max(whole) < tokenizer.vocab_size
        assert own.decode(ids) == theirs.decode(ids)
    assert list(theirs("a")) == ["input_ids", "attention_mask"]
    assert theirs("a", "b")["input_ids"] == own("a", "b")["input_ids"]
    assert (theirs.pad_token_id, theirs.mask_token_id) == (tokenizer.pad_id, tokenizer.mask_id)
    assert theirs.model_max_length == 32
    card = (folder / "README.md").read_text()
    assert "texts that the weights were trained on: equal, read back by data2vec_train and transformers" in card
    assert not (folder / EXAMPLES_NAME).exists()


@pytest.mark.parametrize("kind", ["unigram", "no special tokens"])
def test_features_are_those_of_the_blocks_of_pretraining(kind, tmp_path):
    tokenizer = Tokenizer.load(str(write_kind(kind, tmp_path / "given")))
    model = ours.load_pretrained(weights_with(tokenizer, tmp_path / "weights")).eval()
    (ids,) = tokenizer.encode_batch([TEXTS[0]])
    block = torch.tensor([[tokenizer.bos_id, *ids.tolist()][:32]])
    with torch.no_grad():
        expected = model(input_ids=block)["last_hidden_state"]
    (found,) = embed_inputs(tmp_path / "weights", [TEXTS[0]], pooling="none")
    np.testing.assert_allclose(found[-1], expected[0].numpy(), atol=2e-5)


def test_a_folder_of_a_run_of_before_is_exported_with_the_class_that_keeps_its_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(str(write_kind("word level", tmp_path / "given")))
    folder = weights_with(tokenizer, tmp_path / "weights")
    (folder / EXAMPLES_NAME).unlink()
    described = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "RobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    theirs = transformers.AutoTokenizer.from_pretrained(exported(folder, tmp_path / "out"))
    expected = [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)]
    assert theirs(list(TEXTS), add_special_tokens=False)["input_ids"] == expected
    assert "texts in several scripts: equal" in (tmp_path / "out" / "README.md").read_text()


def test_weights_with_another_tokenizer_than_in_training_are_not_exported(tmp_path):
    tokenizer = Tokenizer.load(str(write_kind("word level", tmp_path / "given")))
    folder = weights_with(tokenizer, tmp_path / "weights")
    content = (folder / "tokenizer.json").read_text().replace('"moon"', '"MOON"')
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="the weights were trained with"):
        exported(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pad_token_id": 0}, "pads with the id 3, the encoder with 0"), ({"vocab_size": 20}, "has 47 tokens, the enc")],
)
def test_a_tokenizer_that_is_not_the_encoders_is_refused(change, message, tmp_path):
    tokenizer = TextTokenizer.from_pretrained(
        weights_with(Tokenizer.load(str(write_kind("word level", tmp_path))), tmp_path / "weights")
    )
    config = ours.Data2VecTextConfig(**{"vocab_size": 47, "pad_token_id": 3} | change)
    with pytest.raises(ConfigError, match=message):
        tokenizer.check_fits(config)


def test_another_reading_of_what_was_written_stops_the_run_before_it_starts(tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(str(write_kind("unigram", tmp_path / "given")))
    other = TextTokenizer.from_pretrained(write_kind("word level", tmp_path / "other").parent)
    monkeypatch.setattr(TextTokenizer, "from_pretrained", classmethod(lambda cls, folder: other))
    with pytest.raises(ConfigError, match="modality.tokenizer: .* has the ids"):
        write_tokenizer(tokenizer, TEXTS, tmp_path / "out", 32)


def test_settings_that_change_ids_from_call_to_call_are_switched_off(tmp_path):
    drawn = Tokenizer.load(str(write_kind("no special tokens", tmp_path / "a")))
    assert len({tuple(drawn.encode_batch([TEXTS[0] * 5])[0]) for _ in range(5)}) == 1
    cut = Tokenizer.load(str(write_kind("WordPiece", tmp_path / "b")))
    assert len(cut.encode_batch([TEXTS[0]])[0]) > 9


def test_tokens_that_the_files_beside_a_tokenizer_name_go_first(tmp_path):
    write_kind("lower-case BPE", tmp_path)
    named = {"pad_token": "</s>", "cls_token": {"content": "!"}, "sep_token": "nowhere", "eos_token": 5}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    found = vocabulary.read_vocabulary(vocabulary.tokenizer_files(tmp_path)).tokens
    # Padding with the token that ends a text could not be told from it.
    expected = {"pad_id": "<pad>", "eos_id": "</s>", "unk_id": "<unk>", "mask_id": "<mask>"}
    assert found == expected | {"bos_id": "!"}


# ---------------------------------------------------------------------------------------------------------------------
# Texts of any length


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "LONG", 4096)
    monkeypatch.setattr(tokenizer_module, "OVERLAPS", (64, 256, 1024))
    monkeypatch.setattr(text_module, "LONG", 4096)


def drawn(alphabet: str, count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=count))


LONG_TEXTS = {
    "prose": " ".join(itertools.islice(itertools.cycle(TEXTS), 400)),
    "DNA in one run": drawn("ACGT", 20_000),
    "Chinese in one run": drawn("北京天安门上太阳升的一是不了人我在有", 20_000),
    "one letter": "a" * 20_001,
    "digits": drawn("0123456789", 20_000),
    "spaces": " " * 20_000 + "end",
    "combining characters and emoji": drawn("e\u0301🙂 \u200db", 20_000),
    "lines": "\r\n\n".join(TEXTS * 100),
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("kind", ["embedded", "unigram", "sentencepiece BPE", "lower-case BPE", "WordPiece"])
def test_parts_of_a_long_text_have_the_ids_of_the_whole(kind, name, small_parts, tmp_path):
    tokenizer = Tokenizer.load(None if kind == "embedded" else str(write_kind(kind, tmp_path)))
    text = LONG_TEXTS[name]
    (whole,) = tokenizer.encode_batch([text])
    parts = list(tokenizer.encode_long(text[first : first + 777] for first in range(0, len(text), 777)))
    if kind == "WordPiece" and name not in ("prose", "lines", "Chinese in one run", "spaces"):
        # A word too long is one unknown token, whatever its length: here it is several, and the log says so.
        assert set(np.concatenate(parts)) <= set(whole)
    else:
        assert np.array_equal(np.concatenate(parts), whole)
    assert len(parts) > 3


def test_a_cut_that_changes_tokens_is_said(small_parts, tmp_path, caplog):
    tokenizer = Tokenizer.load(str(write_kind("word level", tmp_path)))
    parts = np.concatenate(list(tokenizer.encode_long(["x" * 10_000])))
    assert parts.tolist() == [tokenizer.unk_id] * 3
    assert "cut in 2 places where its tokens depend on more than 1024 characters" in caplog.text


def test_a_document_that_the_tokenizer_has_no_token_for_is_a_broken_record(tmp_path, small_parts):
    from tests.data.test_text import Stream, Texts, prepared

    content = json.loads(write_kind("word level", tmp_path / "a").read_text())
    content["model"]["unk_token"] = "[NONE]"
    path = tmp_path / "strict.json"
    path.write_text(json.dumps(content))
    texts = Texts(
        "moon jumps over", "unheard words", "the brown fox", "moon " * 5000 + "unheard", "dog moon", "the fox"
    )
    blocks = prepared(texts, tokenizer_path=str(path))
    assert [key for key, _ in blocks.rejected] == ["t1", "t3"]
    assert [blocks[row].key for row in range(len(blocks))] == ["t0@0", "t2@0", "t4@0", "t5@0"]
    assert all(blocks[row].value[0] == blocks.tokenizer.bos_id for row in range(len(blocks)))
    found = list(prepared(Stream(texts), tokenizer_path=str(path)).stream(epoch=0))
    assert [record.key for record in found if isinstance(record.value, BadSample)] == ["t1", "t3"]


@pytest.mark.parametrize("cross", [False, True])
def test_long_documents_give_the_same_blocks_in_a_file_and_in_a_stream(cross, small_parts):
    from tests.data.test_text import Stream, Texts, prepared

    texts = Texts("moon jumps over", LONG_TEXTS["prose"], "the brown fox", LONG_TEXTS["lines"], labelled=False)
    blocks = prepared(texts, cross_documents=cross)
    stream = list(prepared(Stream(texts), cross_documents=cross).stream(epoch=0))
    assert len(stream) == len(blocks) > 500
    for row, other in enumerate(stream):
        assert np.array_equal(blocks[row].value, other.value)
    assert len({block.key for block in stream}) == len(stream)
    (whole,) = blocks.tokenizer.encode_batch([texts.texts[1]])
    if not cross:
        inside = [blocks[row] for row in range(len(blocks)) if blocks[row].key.startswith("t1@")]
        assert np.array_equal(np.concatenate([block.value[1:] for block in inside]), whole)


HOW = {"encodings": ["utf-8-sig", "cp1252"], "column": "text", "separator": None, "max_document_bytes": 2**30}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-32"])
def test_long_files_are_decoded_as_they_are_read(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG_BYTES", 1000)
    monkeypatch.setattr(text_module, "CHUNK_BYTES", 101)  # ends within characters
    text = "Größe – naïve façade\r\n" * 200
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    sample = text_module.RawSample("a", tmp_path / "a.txt", None)
    ((key, _, found),) = documents(sample, **HOW)
    assert isinstance(found, LongText)
    assert (key, "".join(found)) == ("a", text)
    ((_, _, found),) = documents(text_module.RawSample("a", text.encode(encoding), None), **HOW)
    assert "".join(found) == text
    parts = list(documents(sample, **HOW | {"separator": "e\r\n"}))
    assert [part for _, _, part in parts] == ["Größe – naïve façad"] * 200
    assert [key for key, _, _ in parts[:2]] == ["a#0", "a#1"]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"x" * 5000 + b"\x00", "a binary file"),
        (b"\x01\x02 word" * 1000, "control characters"),
        (b" \n" * 3000, "empty file"),
        (b"word " * 1000 + b"\x81", "not a text in utf-8-sig or cp1252"),
    ],
)
def test_long_files_that_are_no_text_get_the_same_reasons(raw, why, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG_BYTES", 1000)
    monkeypatch.setattr(text_module, "CHUNK_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(raw)
    ((_, _, found),) = documents(text_module.RawSample("a", tmp_path / "a.txt", None), **HOW)
    assert isinstance(found, BadSample)
    assert why in str(found)


@pytest.mark.parametrize("separator", ["--", "aab", "\n\n", "x"])
def test_separators_are_found_across_pieces(separator):
    text = drawn("ab-\nx", 3000)
    pieces = [text[first : first + 7] for first in range(0, len(text), 7)]
    assert list(text_module._split(pieces, separator)) == text.split(separator)


def test_heads_encode_no_more_of_a_long_text_than_they_use(tmp_path):
    own = TextTokenizer.from_json(Tokenizer.load(None).to_json())
    text = LONG_TEXTS["prose"] * 40
    started = time.monotonic()
    ids = own.windows(text, max_length=64)[0].ids
    assert len(own.end(text, 64)) == len(own.beginning(text, 64)) == 64
    assert time.monotonic() - started < 2
    whole = own(text[:20_000])["input_ids"]
    assert ids == [*whole[:63], whole[-1]]
    assert own.end(text, 64)[1:] == own(text[-20_000:])["input_ids"][-64:-1]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_runs_without_spaces_are_cut_where_they_are_long():
    assert list(cut_runs("ab cd  ef", 2)) == ["ab cd  ef"]
    assert list(cut_runs("abcde f", 2)) == ["ab", "cd", "e f"]
    assert list(cut_runs("a     b", 2)) == ["a  ", "  ", " b"]
    assert "".join(cut_runs(LONG_TEXTS["lines"], 5)) == LONG_TEXTS["lines"]


def test_training_on_a_text_without_spaces_takes_time_in_proportion_and_says_what_it_cut(caplog):
    caplog.set_level("INFO")

    def seconds(count: int) -> float:
        started = time.process_time()
        Tokenizer.train([drawn("ACGT", count)], vocab_size=600)
        return time.process_time() - started

    seconds(10_000)
    short, long = seconds(250_000), seconds(1_000_000)
    assert long < 8 * short  # four times the text; it was sixteen times the time and more
    assert "runs of more than 100 characters without white space were cut in 9999 places" in caplog.text


def test_words_of_usual_length_train_as_before(caplog):
    caplog.set_level("INFO")
    Tokenizer.train(list(TEXTS), vocab_size=300)
    assert "were cut" not in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Memory

BIG = """
import resource, sys
from pathlib import Path
from data2vec_train.data.sources.files import RawSample, Source
from data2vec_train.data.text import prepare_text
class One(Source):
    class_names = None
    def __len__(self): return 1
    def __getitem__(self, index): return RawSample("big", Path(sys.argv[1]), None)
    def labels(self): return None
blocks = prepare_text(One(), tokenizer_path=None, train_vocab_size=None, block_tokens=512, cross_documents=False,
    min_tokens=2, encodings=["utf-8-sig", "cp1252"], column="text", separator=None, max_document_bytes=2**30,
    cache_dir=sys.argv[2])
print(int(blocks._ends[-1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of(path: Path) -> tuple[int, float]:
    """Tokens, and gigabytes that a process needed for them."""
    found = subprocess.run(
        [sys.executable, "-c", BIG, str(path), str(path.parent / "cache")], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    tokens, kilobytes = map(int, found.stdout.split())
    return tokens, kilobytes / 1e6


def write_big(path: Path, megabytes: int) -> None:
    line = "The quick brown fox jumps over the lazy dog, and nobody minds at all; number {} follows. "
    with path.open("w") as file:
        file.write('{"text": "' if path.suffix == ".jsonl" else "")
        size = number = 0
        while size < megabytes * 1e6:
            size += file.write(line.format(number))
            number += 1
        file.write('"}\n' if path.suffix == ".jsonl" else "")


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["big.txt", "big.jsonl"])
def test_200_megabytes_in_one_line_need_less_than_one_and_a_half_gigabytes(name, tmp_path):
    write_big(tmp_path / name, 200)
    tokens, gigabytes = peak_of(tmp_path / name)
    assert tokens > 40e6
    assert gigabytes < 1.5
