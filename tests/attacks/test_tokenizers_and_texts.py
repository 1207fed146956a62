"""Attacks on tokenizers and long texts: files that strangers made, texts that are no prose, wrong settings."""

import contextlib
import gzip
import json
import os
import re
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data2vec_train.data import text as text_module
from data2vec_train.data import tokenizer as tokenizer_module
from data2vec_train.data import vocabulary
from data2vec_train.data.sources.files import RawSample
from data2vec_train.data.text import documents, prepare_text
from data2vec_train.data.tokenizer import Tokenizer as Ours
from data2vec_train.data.tokenizer import tokenizer_facts
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.weights.tokenizers import TextTokenizer
from tests.data.test_text import Stream, Texts, prepared
from tests.tokenizer_kinds import TEXTS, content_of, write_kind

SECONDS = 45  # a trial that fails by time takes `PROBE_SECONDS`
HOW = {"encodings": ["utf-8-sig", "cp1252"], "column": "text", "separator": None, "max_document_bytes": 2**30}


def words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))


def changed(**parts) -> str:
    """A small tokenizer whose parts are others."""
    made = words()
    for name, part in parts.items():
        setattr(made, name, part)
    return made.to_str()


def edited(*path: str, **change) -> str:
    """Its file with entries changed by hand."""
    content = json.loads(words().to_str())
    node = content
    for name in path:
        node = node[name]
    node.update(change)
    return json.dumps(content)


def added(number: object, token: object = "<mask>", **more) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, "special": True} | flags | more


REFUSED = {
    "an expression of nested repetitions": (
        lambda: changed(pre_tokenizer=pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")),
        "cannot|can be used|few short texts",
    ),
    "an expression of four repetitions in a row": (
        lambda: changed(pre_tokenizer=pre_tokenizers.Split(Regex(r"a+a+a+a+b"), "isolated")),
        "can be used|few short texts",
    ),
    "an expression that backtracks in a normalizer": (
        lambda: changed(normalizer=normalizers.Replace(Regex(r"(x+x+)+y"), "z")),
        "can be used|few short texts",
    ),
    "a replacement that makes a thousand letters of one": (
        lambda: changed(normalizer=normalizers.Replace("a", "b" * 1000)),
        "its normalizer makes",
    ),
    "a million letters before every text": (
        lambda: changed(normalizer=normalizers.Prepend("x" * 10**6)),
        "its normalizer makes",
    ),
    "a thousand tokens around every text": (
        lambda: changed(
            post_processor=processors.TemplateProcessing(single="[UNK] " * 1000 + "$A", special_tokens=[("[UNK]", 0)])
        ),
        "it puts 1000 tokens around each text",
    ),
    "an id that is a fraction": (lambda: edited("model", "vocab", a=1.5), "has the id 1.5"),
    "an id that is a text": (lambda: edited("model", "vocab", a="1"), "has the id '1'"),
    "an id that is true": (lambda: edited("model", "vocab", a=True), "has the id True"),
    "an id that is null": (lambda: edited("model", "vocab", a=None), "has the id None"),
    "an id below zero": (lambda: edited("model", "vocab", a=-1), "has the id -1"),
    "an id of a terabyte": (lambda: edited("model", "vocab", a=2**40), "has the id 1099511627776"),
    "one id for two words": (lambda: edited("model", "vocab", a=2), "'a' and 'b' have the same id 2"),
    "a special token on the id of a word": (lambda: edited(added_tokens=[added(1)]), "have the same id 1"),
    "an added token that moves a word": (lambda: edited(added_tokens=[added(7, "a")]), "reads the id 1 for 'a', not 7"),
    "an added token behind a gap": (lambda: edited(added_tokens=[added(70)]), r"reads the id \d for '<mask>', not 70"),
    "an added token without an id": (lambda: edited(added_tokens=[{"content": "x"}]), "not a tokenizer"),
    "an added token that is a list": (lambda: edited(added_tokens=[[1, 2]]), "not a tokenizer"),
    "an added token whose content is a number": (lambda: edited(added_tokens=[added(5, 5)]), "5 has the id 5"),
    "an empty vocabulary": (lambda: edited("model", vocab={}), "its vocabulary is empty"),
    "a vocabulary of letters": (lambda: edited("model", vocab="abc"), "not a tokenizer"),
    "a vocabulary of triples": (lambda: edited("model", vocab=[["a", 0.0, 1]]), "not a tokenizer"),
    "a model that is a list": (lambda: json.dumps({"model": [1]}), "not a tokenizer"),
    "a model of a kind that nobody knows": (lambda: edited("model", type="Magic"), "not a tokenizer"),
    "a file that is a number": (lambda: "5", "not a tokenizer"),
    "a file that is null": (lambda: "null", "not a tokenizer"),
    "an empty file": (lambda: "", "not a tokenizer"),
    "half a file": (lambda: words().to_str()[:100], "not a tokenizer"),
    "a NUL in the middle": (lambda: words().to_str()[:50] + "\x00" + words().to_str()[50:], "not a tokenizer"),
    "a million brackets": (lambda: "[" * 10**6, "nested"),
    "a file in UTF-16": (lambda: words().to_str().encode("utf-16"), "not a tokenizer"),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_a_strangers_tokenizer_with(attack, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "PROBE_SECONDS", 20.0)
    content, message = REFUSED[attack]
    content = content()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.monotonic()
    for read in (lambda: Ours.load(str(path)), lambda: TextTokenizer.from_pretrained(tmp_path)):
        with pytest.raises(ConfigError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 900
    assert time.monotonic() - started < 2 * SECONDS


def test_a_tokenizer_that_needs_all_memory_is_refused_by_its_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "PROBE_SECONDS", 3.0)
    grow = normalizers.Sequence([normalizers.Replace("a", "aaaaaaaaaa")] * 8)
    (tmp_path / "tokenizer.json").write_text(changed(normalizer=grow))
    with pytest.raises(ConfigError, match="can be used|more than 3 s"):
        Ours.load(str(tmp_path))


BESIDE = {
    "a list instead of settings": ("[]", "holds a list"),
    "settings that are no JSON": ("{", "not a tokenizer"),
    "settings of a million brackets": ("[" * 10**6, "too deep"),
    "bytes that are no text": (b"\xff\xfe\x00", "not a tokenizer"),
}


@pytest.mark.parametrize("attack", BESIDE)
def test_beside_a_tokenizer_lie(attack, tmp_path):
    content, message = BESIDE[attack]
    write_kind("lower-case BPE", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        tokenizer_facts(str(tmp_path), None)


HARMLESS = {
    "a special token of the wrong type": {"pad_token": 7, "cls_token": ["<s>"], "mask_token": None},
    "special tokens that are not in the vocabulary": {"pad_token": "[nope]", "mask_token": {"content": "[nope]"}},
    "all special tokens the same": dict.fromkeys(("pad_token", "mask_token", "cls_token", "sep_token"), "</s>"),
    "a longest text that is a word": {"model_max_length": "many"},
    "a class that does not exist": {"tokenizer_class": "NoSuchTokenizer"},
}


@pytest.mark.parametrize("attack", HARMLESS)
def test_settings_beside_a_tokenizer_name(attack, tmp_path):
    write_kind("lower-case BPE", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(HARMLESS[attack]))
    tokenizer = Ours.load(str(tmp_path))
    facts = tokenizer.facts
    assert facts["pad_id"] not in (facts["bos_id"], facts["eos_id"], facts["mask_id"])
    assert facts["mask_id"] not in (facts["bos_id"], facts["eos_id"])
    own = TextTokenizer.from_pretrained(tmp_path)
    assert own("moon", add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(["moon"])[0].tolist()


def test_a_module_named_tokenizers_in_the_working_directory_is_not_run_by_the_trial(tmp_path, monkeypatch):
    (tmp_path / "tokenizers.py").write_text("open('stolen', 'w')")
    (tmp_path / "tokenizer.json").write_text(words().to_str())
    monkeypatch.chdir(tmp_path)
    Ours.load(str(tmp_path / "tokenizer.json"))
    assert not (tmp_path / "stolen").exists()


def test_the_trial_writes_nothing_beside_the_tokenizer(tmp_path):
    write_kind("unigram", tmp_path)
    Ours.load(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_file_name_with_an_option_in_it_is_only_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("--help").write_text(words().to_str())
    assert Ours.load("--help").vocab_size == 6


def test_an_expression_that_gives_up_on_one_document_makes_only_that_one_broken(tmp_path):
    """The trial cannot know every text that an expression backtracks on."""
    made = words()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"(qw+e?)+#\1$"), "isolated")
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    tokenizer = Ours.load(str(tmp_path))
    started = time.monotonic()
    with contextlib.suppress(BadSample):
        tokenizer.encode_batch(["qw" + "w" * 3000 + "!"])
    assert time.monotonic() - started < SECONDS


# ---------------------------------------------------------------------------------------------------------------------
# Texts

WORD_TEXTS = {
    "special tokens written out many times": "<s> <pad> </s> <mask> <unk> " * 300,
    "one letter without an end": "z" * 9000,
    "only marks that combine": "\u0301" * 9000,
    "family emoji": "👨‍👩‍👧‍👦" * 1200,
    "right-to-left text": "שלום עולם مرحبا " * 500,
    "the character that becomes eighteen": "\ufdfa " * 3000,
    "Windows line ends": "a\r\n" * 4000,
    "tabs and form feeds": "\t\x0c\v" * 4000,
    "every plane of Unicode": "".join(map(chr, [*range(32, 0xD800), *range(0x1F300, 0x1F700)]))[:30000],
    "base64": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0" * 400,
    "minified code": "function(){return!0};var a=[1,2,3];" * 400,
    "spaces between letters": "a " * 6000,
    "no-break spaces": "one\u00a0two\u3000three" * 800,
    "sharp s and dotted I": "ẞßİı" * 3000,
}


# Thousands of unknown characters in a row are one unknown token: cut, they are several, and the log says so.
UNKNOWN = ("only marks that combine", "family emoji", "every plane of Unicode")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "LONG", 2048)
    monkeypatch.setattr(tokenizer_module, "OVERLAPS", (64, 256, 512))
    monkeypatch.setattr(text_module, "LONG", 2048)


@pytest.mark.parametrize("kind", ["embedded", "unigram", "lower-case BPE"])
@pytest.mark.parametrize("attack", WORD_TEXTS)
def test_a_long_text_keeps_its_ids_in_parts_when_it_is(attack, kind, small_parts, tmp_path, caplog):
    tokenizer = Ours.load(None if kind == "embedded" else str(write_kind(kind, tmp_path)))
    text = WORD_TEXTS[attack]
    (whole,) = tokenizer.encode_batch([text])
    parts = np.concatenate(list(tokenizer.encode_long(iter([text[:5], text[5:3000], "", text[3000:]]))))
    if kind == "unigram" and attack in UNKNOWN:
        assert "where its tokens depend on more than 512 characters around" in caplog.text
    else:
        assert np.array_equal(parts, whole)


@pytest.mark.parametrize("separator", ["", None])
def test_an_empty_separator_is_a_mistake_of_the_config(separator):
    if separator is None:
        assert len(prepared(Texts("moon jumps over the dog"))) == 1
        return
    with pytest.raises(ConfigError, match=r"modality\.separator is empty"):
        prepared(Texts("a"), separator="")


FILES = {
    "a file that ends within a character": (b"word " * 400 + "é".encode()[:1], None),
    "a byte order mark and nothing else": (b"\xef\xbb\xbf", "empty file"),
    "UTF-16 that ends within a character": (("word " * 400).encode("utf-16") + b"\x00", "not a text|binary"),
    "a NUL behind a million letters": (b"x" * 10**6 + b"\x00", "binary file"),
    "only line ends": (b"\r\n" * 4000, "empty file"),
}


@pytest.mark.parametrize("attack", FILES)
def test_a_large_text_file_is(attack, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG_BYTES", 500)
    monkeypatch.setattr(text_module, "CHUNK_BYTES", 64)
    raw, why = FILES[attack]
    (tmp_path / "a.txt").write_bytes(raw)
    ((_, _, found),) = documents(RawSample("a", tmp_path / "a.txt", None), **HOW)
    if why is None:
        assert "".join(found) == raw.decode("cp1252")
    else:
        assert isinstance(found, BadSample)
        assert re.search(why, str(found))


def test_a_large_file_that_is_removed_between_two_looks_is_a_broken_record(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG_BYTES", 500)
    (tmp_path / "a.txt").write_text("word " * 400)
    ((_, _, found),) = documents(RawSample("a", tmp_path / "a.txt", None), **HOW)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadSample, match="missing"):
        list(found)


def test_a_large_file_that_changes_between_two_looks_is_a_broken_record(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG_BYTES", 500)
    (tmp_path / "a.txt").write_text("wörd " * 400, encoding="utf-8")
    ((_, _, found),) = documents(RawSample("a", tmp_path / "a.txt", None), **HOW)
    (tmp_path / "a.txt").write_bytes(b"\xff\xff" * 400)
    with pytest.raises(BadSample, match="not readable"):
        list(found)


@pytest.mark.parametrize("cross", [False, True])
def test_a_document_that_fails_in_its_third_part_leaves_no_ids_behind(cross, small_parts, tmp_path):
    content = json.loads(content_of("word level"))
    content["model"]["unk_token"] = "[NONE]"
    (tmp_path / "strict.json").write_text(json.dumps(content))
    texts = Texts("moon over the dog", "moon " * 1500 + "unheard", "the fox", labelled=False)
    blocks = prepared(texts, tokenizer_path=str(tmp_path / "strict.json"), cross_documents=cross, block_tokens=4)
    ids = np.concatenate([blocks[row].value[1:] for row in range(len(blocks))])
    assert len(ids) <= 8
    assert [key for key, _ in blocks.rejected] == ["t1"]


def test_a_vocabulary_that_knows_no_word_of_any_document_is_an_error_that_says_why(tmp_path):
    content = json.loads(content_of("word level"))
    content["model"]["unk_token"] = "[NONE]"
    (tmp_path / "strict.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="the tokenizer cannot split 'unheard"):
        prepared(Texts("unheard words", "of others"), tokenizer_path=str(tmp_path / "strict.json"))


def test_a_packed_line_of_five_megabytes_is_one_document(tmp_path):
    line = json.dumps({"text": "word " * 10**6})
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(line + "\n" + line[:-2] + "\n")
    found = list(documents(RawSample("a", tmp_path / "a.jsonl.gz", None), **HOW))
    assert [isinstance(text, str) for _, _, text in found] == [True, False]


@pytest.mark.parametrize(
    "kind", ["runs of DNA", "one space in a million", "only spaces", "one letter", "mixed scripts"]
)
def test_a_tokenizer_is_trained_in_time_on(kind):
    text = {
        "runs of DNA": "ACGTTGCAAC" * 20_000,
        "one space in a million": "x" * 100_000 + " " + "y" * 100_000,
        "only spaces": " " * 200_000 + "a",
        "one letter": "q" * 200_000,
        "mixed scripts": "北京a1é🙂" * 30_000,
    }[kind]
    started = time.monotonic()
    trained = Ours.train([text], vocab_size=300)
    assert time.monotonic() - started < SECONDS
    assert trained.decode(trained.encode_batch([text[:5000]])[0]) == text[:5000]


def test_a_stream_with_a_document_longer_than_a_part_trains_its_tokenizer(small_parts):
    source = Stream(Texts("moon " * 3000, "fox " * 20, labelled=False))
    blocks = prepare_text(
        source,
        tokenizer_path=None,
        train_vocab_size=300,
        block_tokens=16,
        cross_documents=True,
        min_tokens=2,
        cache_dir=None,
        **HOW,
    )
    assert all(len(block.value) == 16 for block in blocks.stream(epoch=0))


def test_decoders_of_every_kind_give_texts_back(tmp_path):
    for kind in ("unigram", "lower-case BPE", "word level"):
        own = TextTokenizer.from_pretrained(write_kind(kind, tmp_path / kind).parent)
        ids = own("moon over the dog")["input_ids"]
        assert own.decode(ids, skip_special_tokens=True).strip() == "moon over the dog"


def test_old_caches_of_the_same_data_are_not_mixed_with_a_new_tokenizer(tmp_path):
    first = prepared(Texts(*TEXTS), cache=tmp_path / "cache", tokenizer_path=str(write_kind("unigram", tmp_path / "a")))
    other = prepared(Texts(*TEXTS), cache=tmp_path / "cache", tokenizer_path=str(write_kind("GPT-2", tmp_path / "b")))
    assert first.tokenizer.fingerprint != other.tokenizer.fingerprint
    for blocks in (first, other):
        expected = blocks.tokenizer.encode_batch([TEXTS[0]])[0][:15]
        assert np.array_equal(blocks[0].value[1:], expected)


def test_a_decoder_that_backtracks_is_not_met_before_it_is_used(tmp_path):
    made = words()
    made.decoder = decoders.Replace(Regex(r"(a+)+$"), "b")
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    started = time.monotonic()
    assert Ours.load(str(tmp_path)).encode_batch(["a"])[0].tolist() == [1]
    assert time.monotonic() - started < SECONDS
