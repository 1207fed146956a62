"""Documents, tokenizers and blocks."""

import bz2
import gzip
import json
import lzma
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data2vec_train.data import text as text_module
from data2vec_train.data.sources.files import FolderSource, RawSample, Source, StreamingSource
from data2vec_train.data.text import (
    StreamedBlocks,
    TextBlocks,
    TokenTransform,
    bag_of_tokens,
    decode_text,
    decode_tokens,
    documents,
    prepare_text,
)
from data2vec_train.data.tokenizer import EMBEDDED, Tokenizer, tokenizer_facts
from data2vec_train.errors import BadSample, ConfigError, DataError

ENCODINGS = ["utf-8-sig", "cp1252"]
HOW = {"encodings": ENCODINGS, "column": "text", "separator": None, "max_document_bytes": 2**20}
EXTENSIONS = [".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2", ".parquet"]
WORDS = "The quick brown fox jumps over the lazy dog, and nobody minds. "


class Texts(Source):
    class_names = ["even", "odd"]

    def __init__(self, *texts: str, labelled: bool = True) -> None:
        self.texts, self.labelled = texts, labelled
        self.class_names = ["even", "odd"] if labelled else None

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return RawSample(f"t{index}", self.texts[index], index % 2 if self.labelled else None)

    def labels(self):
        return np.arange(len(self.texts)) % 2 if self.labelled else None


class Stream(StreamingSource):
    class_names = None

    def __init__(self, source: Source) -> None:
        self.source = source

    def stream(self, **place):
        yield from (self.source[index] for index in range(len(self.source)))


PLACE = {"epoch": 0, "seed": 0, "worker": 0, "num_workers": 1, "rank": 0, "world_size": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(None)


def prepared(source, cache=None, **changes):
    options = {"tokenizer_path": None, "train_vocab_size": None, "block_tokens": 16, "cross_documents": False}
    return prepare_text(source, cache_dir=cache, **options | {"min_tokens": 2} | HOW | changes)


# -------------------------------------------------------------------------------------------------------- tokenizer


def test_facts_are_those_of_the_embedded_vocabulary(tokenizer):
    facts = tokenizer_facts(None, None)
    assert facts == {"vocab_size": 50262, "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "mask_id": 50261}
    assert tokenizer.facts == facts
    assert tokenizer_facts(str(EMBEDDED), None) == facts


@pytest.mark.parametrize("text", ["Hello world", "  two  spaces", "Größe 北京 🙂", "tab\tand\nline", "don't <s> stop"])
def test_ids_give_the_text_back(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.int32
    if "<s>" not in text:  # a special token written out in a text
        assert tokenizer.decode(ids) == text
        assert min(ids) > 3
    assert len(tokenizer.pieces(ids)) == len(ids)


def test_ids_are_gpt2s_order_of_merges(tokenizer):
    vocabulary = json.loads((EMBEDDED / "vocab.json").read_text())
    (ids,) = tokenizer.encode_batch(["Hello world"])
    assert ids.tolist() == [vocabulary["Hello"], vocabulary["\u0120world"]]
    assert tokenizer.pieces(np.array([0, *ids, 2, 50261])) == ["<s>", "Hello", " world", "</s>", "<mask>"]


def test_a_trained_tokenizer_has_the_promised_size_and_special_tokens_even_with_little_text():
    small = Tokenizer.train([WORDS] * 5, vocab_size=1000)
    assert small.facts == tokenizer_facts(None, 1000)
    assert (small.mask_id, small.vocab_size) == (999, 1000)
    (ids,) = small.encode_batch(["Größe 北京 quick"])
    assert small.decode(ids) == "Größe 北京 quick"
    assert 3 < min(ids) <= max(ids) < 999
    assert len(small.encode_batch([WORDS])[0]) < len(WORDS) / 3  # it did learn merges


def test_saving_pickling_and_loading_keep_the_ids(tmp_path):
    trained = Tokenizer.train([WORDS] * 5, vocab_size=400)
    trained.save(tmp_path)
    (ids,) = trained.encode_batch([WORDS])
    for other in (
        Tokenizer.load(str(tmp_path)),
        Tokenizer.load(str(tmp_path / "tokenizer.json")),
        pickle.loads(pickle.dumps(trained)),
    ):
        assert other.encode_batch([WORDS])[0].tolist() == ids.tolist()
        assert other.facts == trained.facts
        assert other.fingerprint == trained.fingerprint


def test_other_spellings_are_found_and_missing_special_tokens_get_new_ids(tmp_path):
    import tokenizers
    from tokenizers import models

    def saved(name: str, vocabulary: list[str]) -> str:
        ids = {token: number for number, token in enumerate(vocabulary)}
        tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[UNK]")).save(str(tmp_path / name))
        return str(tmp_path / name)

    bert = tokenizer_facts(saved("bert.json", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]), None)
    assert bert == {"vocab_size": 6, "bos_id": 2, "pad_id": 0, "eos_id": 3, "unk_id": 1, "mask_id": 4}
    bare = tokenizer_facts(saved("bare.json", ["[UNK]", "a", "<|endoftext|>"]), None)
    assert bare == {"vocab_size": 5, "bos_id": 2, "pad_id": 3, "eos_id": 2, "unk_id": 0, "mask_id": 4}


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "tokenizer.json", tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="tokenizer"):
            tokenizer_facts(str(path), None)
    with pytest.raises(ConfigError, match="exclude each other"):
        tokenizer_facts("somewhere", 5000)
    with pytest.raises(ConfigError, match="at least 261"):
        tokenizer_facts(None, 100)


# -------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("Größe".encode(), "Größe"),
        (b"\xef\xbb\xbfmark", "mark"),
        ("Größe – “so”".encode("cp1252"), "Größe – “so”"),
        ("Größe".encode("utf-16"), "Größe"),
        (b"line\r\nbreak\tand\x0cfeed", "line\r\nbreak\tand\x0cfeed"),
        (b"one stray \x02 in" + b" a long text" * 100, "one stray \x02 in" + " a long text" * 100),
    ],
)
def test_files_in_several_encodings(raw, text):
    assert decode_text(raw, ENCODINGS) == text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty file"),
        (b" \n\t ", "empty file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "a binary file"),
        (b"text with \x01 in it", "control characters"),
        (b"\x81\x8d undefined in cp1252", "not a text in utf-8-sig or cp1252"),
    ],
)
def test_what_is_no_text_gets_a_reason(raw, reason):
    with pytest.raises(BadSample, match=reason):
        decode_text(raw, ENCODINGS)


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_lines_of_json_are_documents_and_bad_lines_are_named(tmp_path, suffix, pack):
    lines = ['{"text": "one"}', "", "not json", '{"other": 1}', '{"text": 5}', '{"text": " "}', '{"text": "two"}']
    path = tmp_path / f"docs.jsonl{suffix}"
    path.write_bytes(pack("\n".join(lines).encode()))
    found = [(key, str(text)) for key, _, text in documents(RawSample("docs", path, None), **HOW)]
    assert found == [
        ("docs:1", "one"),
        ("docs:3", "not a line of JSON"),
        ("docs:4", "no field 'text'"),
        ("docs:5", "int instead of a text"),
        ("docs:6", "empty text"),
        ("docs:7", "two"),
    ]


def test_rows_of_parquet_are_documents(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "docs.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), path)
    found = [(key, str(text)) for key, _, text in documents(RawSample("d", path, None), **HOW)]
    assert found == [("d:0", "one"), ("d:1", "null instead of a text"), ("d:2", "two")]
    ((_, _, error),) = documents(RawSample("d", path, None), **HOW | {"column": "words"})
    assert str(error) == "no column 'words'; there are text"
    path.write_bytes(b"PAR1 not at all")
    ((_, _, error),) = documents(RawSample("d", path, None), **HOW)
    assert "not a parquet file" in str(error)


def test_a_separator_cuts_a_file_into_documents(tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("first\n\nsecond\n\n\n\nthird")
    found = [text for _, _, text in documents(RawSample("all", path, 3), **HOW | {"separator": "\n\n"})]
    assert found == ["first", "second", "third"]
    ((key, label, _),) = documents(RawSample("all", path, 3), **HOW)
    assert (key, label) == ("all", 3)


# -------------------------------------------------------------------------------------------------------- blocks


def test_blocks_start_with_the_start_token_stay_within_documents_and_lose_nothing(tokenizer):
    source = Texts(WORDS * 4, WORDS, "Short one.", "x")
    blocks = prepared(source, block_tokens=16, min_tokens=1)
    per_document = {}
    for index in range(len(blocks)):
        sample = blocks[index]
        assert sample.value[0] == 0
        assert len(sample.value) == blocks.lengths[index] <= 16
        document = source.hashes().tolist().index(blocks.origins()[index])
        per_document.setdefault(document, []).extend(sample.value[1:])
        assert sample.label == blocks.labels()[index] == document % 2
    for document, text in enumerate(source.texts):
        assert tokenizer.decode(np.array(per_document[document])) == text
    assert blocks[0].key == "t0@0"
    assert blocks[1].key == "t0@15"


def test_short_rests_and_documents_are_left_out():
    blocks = prepared(Texts(WORDS * 2, "x"), block_tokens=16, min_tokens=8)
    assert (blocks.lengths - 1).min() >= 8
    assert blocks.num_short == 1
    assert set(blocks.origins()) == {blocks.origins()[0]}


def test_crossing_documents_gives_full_blocks_with_an_end_token_between(tokenizer):
    source = Texts("One two three.", WORDS, "Four five.", WORDS)
    blocks = prepared(source, cross_documents=True, block_tokens=8)
    assert set(blocks.lengths) == {8}
    assert (blocks.labels(), blocks.class_names) == (None, None)
    assert len(set(blocks.origins())) == len(blocks)
    ids = np.concatenate([blocks[index].value[1:] for index in range(len(blocks))])
    texts = tokenizer.encode_batch(source.texts)
    expected = np.concatenate([np.append(text, 2) for text in texts])
    assert ids.tolist() == expected[: len(ids)].tolist()
    assert len(expected) - len(ids) < 7


def test_files_are_tokenized_once_and_again_when_they_change(tmp_path, monkeypatch):
    import data2vec_train.data.text as module

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text(WORDS * 3)
    (folder / "bad.txt").write_bytes(b"\x00\x01")
    source = FolderSource(path=str(folder), extensions=EXTENSIONS, class_from_folder=False)
    first = prepared(source, tmp_path / "cache")
    calls = []
    original = module._tokenize
    monkeypatch.setattr(module, "_tokenize", lambda *args: calls.append(1) or original(*args))
    again = prepared(source, tmp_path / "cache")
    assert not calls
    assert again[1].value.tolist() == first[1].value.tolist()
    assert (
        again.rejected
        == first.rejected
        == (("bad.txt", "a binary file, or UTF-16 or UTF-32 without a byte order mark"),)
    )
    assert prepared(source, tmp_path / "cache", separator=". ").lengths is not None
    assert len(calls) == 1  # another setting
    (folder / "a.txt").write_text(WORDS * 5)
    assert len(prepared(source, tmp_path / "cache")) > len(first)
    assert len(calls) == 2
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if "." in path.name]  # nothing half done


def test_processes_that_start_together_tokenize_once(tmp_path, monkeypatch):
    tokenized = []
    tokenize = text_module._tokenize

    def slowly(*args):
        tokenized.append(args)
        time.sleep(0.3)
        tokenize(*args)

    monkeypatch.setattr(text_module, "_tokenize", slowly)
    with ThreadPoolExecutor(4) as processes:
        made = list(processes.map(lambda _: prepared(Texts(WORDS * 40), tmp_path), range(4)))
    assert len(tokenized) == 1, "each would take all cores, and as much of the disk"
    assert len({tuple(blocks[0].value) for blocks in made}) == 1


def test_blocks_can_be_sent_to_a_worker(tmp_path):
    blocks = prepared(Texts(WORDS * 3), tmp_path)
    blocks[0]
    assert pickle.loads(pickle.dumps(blocks))[1].value.tolist() == blocks[1].value.tolist()


def test_a_tokenizer_is_trained_once_and_shared(tmp_path):
    source = Texts(*[WORDS] * 4)
    first = prepared(source, tmp_path, train_vocab_size=400)
    again = prepared(source, tmp_path, train_vocab_size=400)
    assert first.tokenizer.vocab_size == 400
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    other = prepared(Texts("Other words entirely."), tmp_path, train_vocab_size=400, tokenizer=first.tokenizer)
    assert other.tokenizer is first.tokenizer


def test_nothing_usable_is_an_error_that_names_the_first():
    with pytest.raises(DataError, match="no document of 2 records.*t0: empty text"):
        prepared(Texts("", "  "))
    with pytest.raises(DataError, match="shorter than 50 tokens"):
        prepared(Texts("Short."), min_tokens=50)


@pytest.mark.parametrize("cross", [False, True])
def test_a_stream_gives_the_same_blocks(cross):
    texts = (WORDS * 3, "Short.", WORDS)
    streamed = prepared(Stream(Texts(*texts, labelled=False)), cross_documents=cross, block_tokens=10)
    assert isinstance(streamed, StreamedBlocks)
    local = prepared(Texts(*texts, labelled=False), cross_documents=cross, block_tokens=10)
    assert isinstance(local, TextBlocks)
    found = [sample.value.tolist() for sample in streamed.stream(**PLACE)]
    assert found == [local[index].value.tolist() for index in range(len(local))]


def test_a_broken_document_of_a_stream_is_raised_where_it_is_decoded(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\x00")
    source = FolderSource(path=str(tmp_path), extensions=[".txt"], class_from_folder=False)
    (sample,) = prepared(Stream(source)).stream(**PLACE)
    assert sample.key == "bad.txt"
    with pytest.raises(BadSample, match="a binary file"):
        decode_tokens(sample.value)


def test_ids_become_int64_tensors():
    ids = decode_tokens(np.array([0, 7, 8], dtype=np.int32))
    assert torch.equal(TokenTransform().train(ids), torch.tensor([0, 7, 8]))


def test_a_bag_of_tokens_counts_real_ones():
    ids = torch.tensor([[0, 5, 5, 7], [0, 5, 1, 1]])
    bag = bag_of_tokens(ids, ids != 1, vocab_size=10)
    assert bag.shape == (2, 10)
    np.testing.assert_allclose(bag[0, [0, 5, 7, 1]], np.log1p([1, 2, 1, 0]), rtol=1e-6)
    np.testing.assert_allclose(bag[1, [0, 5, 7, 1]], np.log1p([1, 1, 0, 0]), rtol=1e-6)
    assert bag_of_tokens(torch.tensor([[9000, 3]]), None, vocab_size=50_000).shape == (1, 8192)
