"""Transcripts that CTC cannot spell, vocabularies that others made, and how languages are written."""

import json
import random

import numpy as np
import pytest
import torch

import data2vec_train as ours
from data2vec_train.errors import BadSample, ConfigError
from data2vec_train.finetune.base import Inputs
from data2vec_train.finetune.speech import CTC, SpecAugment, _tokenizer_of, _too_short
from data2vec_train.finetune.transcripts import Writing, has_no_spaces
from data2vec_train.heads.losses import connectionist_loss
from data2vec_train.weights.tokenizers import CTCTokenizer

MASKS = SpecAugment(time_fraction=0.0, time_span=10, channel_fraction=0.0, channel_span=0.1)
PLAIN = {"text_column": "text", "vocabulary": "letters", "case": "auto", "remove": None, "words": None, "beam": None}


def ctc(symbols: str | None = None, **settings) -> CTC:
    """A head, which knows a vocabulary of letters."""
    task = CTC(**{**PLAIN, "unicode": "NFC", **settings}, inputs=Inputs(token_count=lambda n: n // 320), masks=MASKS)
    if symbols is not None:
        own = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}
        task._use(
            CTCTokenizer(symbols if isinstance(symbols, dict) else own | {s: 5 + i for i, s in enumerate(symbols)})
        )
    return task


def listed(run_dir) -> dict[str, str]:
    lines = (run_dir / "quarantine.jsonl").read_text().splitlines()
    return {row["key"]: row["reason"] for row in map(json.loads, lines)}


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be spelt


@pytest.mark.parametrize(
    ("ids", "frames", "fits"),
    [
        ([7, 7], 2, False),
        ([7, 7], 3, True),
        ([7, 8, 7], 3, True),
        ([7] * 4, 6, False),
        ([7] * 4, 7, True),
        ([], 0, True),
    ],
)
def test_blanks_between_equal_symbols_are_counted_as_torch_counts_them(ids, frames, fits):
    assert (not _too_short(ids, frames)) == fits
    if ids:
        how = {"num_frames": None, "blank_id": 0, "reduction": "sum", "zero_infinity": False}
        loss = connectionist_loss(torch.zeros(1, frames, 9), torch.tensor([ids]), **how)
        assert bool(loss.isfinite()) == fits


def test_records_that_cannot_be_spelt_are_listed_in_training_and_in_the_test(command, rows, write, tmp_path):
    changed = rows("ctc")
    frames = 0.4 * 8000 // 160  # of two letters
    changed[0]["text"] = "A" * int(frames)  # as many letters as frames, and a blank between any two
    changed[1]["text"] = ""
    changed[2]["text"] = "A | B"
    changed[4]["text"] = "<pad> A"
    test = [row | {"text": "Ž" if number == 5 else row["text"]} for number, row in enumerate(changed)]
    other = f"data.test_source={{path:{write(test, tmp_path / 'test.parquet')}}}"
    status, run_dir = command("ctc", other, "head.vocabulary=letters", "report=false", steps=2, rows=changed)
    assert status == 0
    found = listed(run_dir)
    assert "blanks between equal ones" in found["ctc.parquet:0"]
    assert "its transcript is empty" in found["ctc.parquet:1"]
    assert "contains |" in found["ctc.parquet:2"]
    assert "contains <pad>" in found["ctc.parquet:4"]
    assert "has Ž" in found["test.parquet:5"]
    assert {"test.parquet:0", "test.parquet:1", "test.parquet:2", "test.parquet:4"} < found.keys()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["train_records"] == 12
    assert summary["broken_samples"] == 4
    assert np.isfinite(summary["best"]["loss"])


def test_too_many_that_cannot_be_spelt_end_the_run_in_a_line(command, rows, capsys):
    changed = [row | {"text": "A" * 300} for row in rows("ctc")]
    status, _ = command("ctc", steps=1, rows=changed)
    assert status == 2
    assert "16 of 32 samples cannot be used" in capsys.readouterr().err


def test_the_loss_of_a_test_batch_is_that_of_what_can_be_spelt(weights):
    task = ctc("AB")
    examples = [{"key": str(n), "wave": torch.randn(1600 * (n + 1)), "text": "A", "ids": [5]} for n in range(3)]
    model = lambda **_: {"logits": torch.randn(3, 15, 7, generator=torch.Generator().manual_seed(0))}  # noqa: E731
    rng = np.random.default_rng(0)

    def loss_of(rows: list[dict]) -> tuple[float, int]:
        batch = task.collate(rows, train=False, rng=rng)
        batch = type(batch)(batch.inputs, batch.targets, batch.host, batch.references, keys=("a", "b", "c"))
        return float(task.loss(model, batch)[0]), task.counted(batch)

    whole = loss_of(examples)
    without = loss_of([*examples[:2], examples[2] | {"ids": None}])
    alone = loss_of([examples[0] | {"ids": None}, examples[1] | {"ids": None}, examples[2]])
    assert (whole[1], without[1], alone[1]) == (3, 2, 1)
    assert whole[0] * 3 == pytest.approx(without[0] * 2 + alone[0], rel=1e-6)


def test_more_symbols_than_frames_after_decoding_is_a_broken_sample(rows):
    task = ctc("AB")
    task.inputs = Inputs(token_count=lambda n: 2, decode=lambda value: value, transform=Same(), sample_rate_hz=8000)
    from data2vec_train.data.sources.files import RawSample

    raw = RawSample("x", np.zeros(800, np.float32), None, {"text": "AA"})
    with pytest.raises(BadSample, match="2 symbols and 1 blanks between equal ones in 2 frames"):
        task.example(raw, train=True, rng=np.random.default_rng(0))
    assert task.example(raw, train=False, rng=np.random.default_rng(0))["ids"] is None


class Same:
    @staticmethod
    def train(wave):
        return torch.from_numpy(wave)


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies


@pytest.mark.parametrize("seed", range(24))
def test_texts_are_cut_as_transformers_cuts_them(tmp_path, seed):
    transformers = pytest.importorskip("transformers")
    chance = random.Random(seed)
    letters = list("abcABəʃ̃'-漢字éß")
    units = chance.sample(letters, 8)
    units += ["".join(chance.choices(letters, k=chance.choice([2, 2, 3]))) for _ in range(chance.choice([0, 2, 5]))]
    pad, unk = chance.choice([("<pad>", "<unk>"), ("[PAD]", "[UNK]")])
    own = [pad, unk] + ["<s>", "</s>"] * (seed % 2) + ["|"] * (seed % 5 > 0)
    symbols = list(dict.fromkeys(own + units))
    chance.shuffle(symbols)
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    if seed % 3 == 0:
        kind, more = transformers.Wav2Vec2PhonemeCTCTokenizer, {"do_phonemize": False}
        more |= {"word_delimiter_token": "|"} if seed % 2 else {}
    else:
        kind, more = transformers.Wav2Vec2CTCTokenizer, {"do_lower_case": seed % 4 == 0}
    theirs = kind(str(tmp_path / "vocab.json"), pad_token=pad, unk_token=unk, **more)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = CTCTokenizer.from_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    again = kind.from_pretrained(tmp_path / "mine")
    for _ in range(20):
        pool = [*units, *letters, " ", " ", "  ", "|", "\u00a0", "z", pad, "<s>"]
        text = "".join(chance.choices(pool, k=chance.randint(0, 12)))
        assert mine(text)["input_ids"] == theirs(text)["input_ids"] == again(text)["input_ids"]
        ids = [token for token in chance.choices(range(len(symbols) + 3), k=9) for _ in range(chance.choice([1, 1, 3]))]
        assert mine.decode(ids) == theirs.decode(ids) == again.decode(ids)


def test_a_folder_without_settings_has_the_usual_symbols(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "|": 2, "[UNK]": 3, "[PAD]": 4}')
    tokenizer = CTCTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([0, 4, 0, 1, 2, 1]) == "aab b"
    assert tokenizer("a<s>")["input_ids"] == [0, 5], "symbols beyond the vocabulary get the next numbers"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected an object"),
        ("{}", "expected symbols with their ids"),
        ('{"a": 0}', "lacks <pad>, which is CTC's blank"),
        ('{"<pad>": "0"}', "expected a number from 0"),
        ('{"<pad>": 0, "a": -1}', "expected a number from 0"),
        ('{"<pad>": 0, "a": true}', "expected a number from 0"),
        ('{"deu": {"<pad>": 0}, "eng": {"<pad>": 0}}', "vocabularies for deu, eng; .*target_lang"),
    ],
)
def test_a_vocabulary_that_is_none(tmp_path, content, said):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        CTCTokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_of_a_language(tmp_path):
    (tmp_path / "vocab.json").write_text('{"deu": {"<pad>": 0, "ß": 1}, "eng": {"<pad>": 0, "w": 1}}')
    (tmp_path / "tokenizer_config.json").write_text('{"target_lang": "deu"}')
    assert CTCTokenizer.from_pretrained(tmp_path).decode([1]) == "ß"


def community(folder, tmp_path):
    """The weights of a head with the vocabulary that most tutorials make: [UNK] and [PAD] last, <s> and </s> beyond."""
    symbols = {"a": 0, "b": 1, "c": 2, "|": 3, "[UNK]": 4, "[PAD]": 5}
    config = ours.load_pretrained(folder).config
    config.vocab_size, config.pad_token_id = 8, 5
    model = ours.Data2VecAudioForCTC(config)
    target = tmp_path / "community"
    model.save_pretrained(target)
    (target / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    (target / "vocab.json").write_text(json.dumps(symbols))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    (target / "tokenizer_config.json").write_text(json.dumps(special | {"word_delimiter_token": "|"}))
    (target / "added_tokens.json").write_text('{"<s>": 6, "</s>": 7}')
    return target


def test_the_usual_community_folder_goes_on_and_predicts(command, program_of, weights, tmp_path):
    folder = community(weights("audio"), tmp_path)
    more = [f"init_from={folder}", "head.vocabulary=keep", "report=false"]
    status, run_dir = command("ctc", *more, steps=1)
    assert status == 0, "transcripts in capitals, a vocabulary in small letters: its letters decide"
    assert not (run_dir / "quarantine.jsonl").exists()
    model = ours.load_pretrained(run_dir)
    assert (model.config.vocab_size, model.config.pad_token_id) == (8, 5)
    given = [f"checkpoint={folder}", "data=hf", f"data.path={tmp_path}/ctc.parquet", f"out={tmp_path}/said.jsonl"]
    assert program_of("predict", *given, "data.num_workers=0") == 0


def test_a_vocabulary_of_another_model_is_refused(program_of, weights, tmp_path, records, capsys):
    folder = community(weights("audio"), tmp_path)
    (folder / "vocab.json").write_text(json.dumps({"[PAD]": 0, "[UNK]": 1, "|": 2, "z": 99}))
    path = records("ctc", tmp_path / "ctc.parquet")
    given = [f"checkpoint={folder}", "data=hf", f"data.path={path}", f"out={tmp_path}/said.jsonl"]
    assert program_of("predict", *given, "data.num_workers=0") == 2
    assert "vocab.json has ids up to 99" in capsys.readouterr().err


def test_phones_are_symbols_of_their_own(command, rows, tmp_path):
    phones = {"A": "t͡ʃ", "B": "AH0", "C": "ʃ"}
    changed = rows("ctc")
    for row in changed:
        row["text"] = " ".join(phones[letter] for letter in row["text"].split())
    status, run_dir = command("ctc", "head.vocabulary=phones", "report=false", steps=1, rows=changed)
    assert status == 0
    content = json.loads((run_dir / "model" / "vocab.json").read_text())
    assert list(content) == ["<pad>", "<s>", "</s>", "<unk>", "AH0", "t͡ʃ", "ʃ"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(run_dir / "model")
    assert isinstance(theirs, transformers.Wav2Vec2PhonemeCTCTokenizer)
    assert theirs("AH0 ʃ t͡ʃ")["input_ids"] == [4, 6, 5]


def test_the_vocabulary_of_the_transcripts_is_the_same_in_any_order():
    texts = ["zebra", "<pad> é", "a|b", "’tis 'twas", "[UNK]"]
    first = _tokenizer_of("letters", texts).vocabulary
    assert first == _tokenizer_of("letters", texts[::-1]).vocabulary
    assert list(first)[:5] == ["<pad>", "<s>", "</s>", "<unk>", "|"]
    assert "’" not in first
    assert sorted(first.values()) == list(range(len(first)))


# ---------------------------------------------------------------------------------------------------------------------
# Languages


@pytest.mark.parametrize(
    ("vocabulary", "settings", "raw", "wanted"),
    [
        ("café", {}, "cafe\u0301", "café"),
        ("cafe\u0301", {}, "café", "café"),
        ("ABC", {}, "abc Cab", "ABC CAB"),
        ("abc", {}, "ABC", "abc"),
        ("aAbB", {}, "aAbB", "aAbB"),
        ("IİĞ", {}, "iığ", "İIĞ"),
        ("iığ", {}, "İIĞ", "iığ"),
        ("abiı", {"language": "en"}, "I", "i"),
        ("AIİ", {"language": "tr"}, "iı", "İI"),
        ("STRAßE", {}, "straße", "STRAßE"),
        ("STRAẞE", {"language": "de"}, "straße", "STRAẞE"),
        ("STRAE", {"language": "de"}, "straße", "STRASSE"),
        ("ΑΒΣ", {"language": "el"}, "άβς", "ΑΒΣ"),
        ("οδσς", {}, "ΟΔΟΣ", "οδος"),
        ("don't", {}, "don’t", "don't"),
        ("don’t", {}, "don't", "don’t"),
        ("ab", {}, "\ufeffa\u200bb\u00ad\u202e", "ab"),
        ("ab", {}, "a\u00a0b\u3000a\u2009b", "a b a b"),
        ("می\u200cخواهم", {}, "می\u200cخواهم", "می\u200cخواهم"),
        ("fi", {"unicode": "NFKC"}, "ﬁ", "fi"),
        ("ﬁ", {}, "ﬁ", "ﬁ"),
        ("123", {"unicode": "NFKC"}, "１２３", "123"),
    ],
)
def test_letters_are_written_as_a_speaker_would(vocabulary, settings, raw, wanted):
    task = ctc(vocabulary, **settings)
    text = task.text_of(raw)
    assert text == wanted
    ids, why = task.spelt(text)
    assert not why
    assert task.writing(task.tokenizer.decode(ids, group_tokens=False)) == wanted, "it comes back as it was"
    assert task.score([task.tokenizer.decode(ids, group_tokens=False)], [text])["wer"] == 0


def test_sharp_s_is_not_two_letters_unless_asked_for():
    _, why = ctc("STRAE").spelt(ctc("STRAE").text_of("straße"))
    assert "has ß" in why


def test_capital_letters_of_turkish_transcripts(monkeypatch):
    task = ctc(case="upper")
    texts = ["iki", "ılık"]
    source = type("Rows", (), {"column": lambda self, name: texts, "lengths": None})()
    task.setup(source, np.arange(2))
    assert [task.text_of(text) for text in texts] == ["İKİ", "ILIK"]


def test_marks_without_a_composed_letter_stay_marks():
    task = ctc("ɔ\u0303n")
    text = task.text_of("ɔ\u0303n")
    assert len(task.spelt(text)[0]) == 3


def test_scripts_without_spaces_are_judged_by_letters():
    assert has_no_spaces(["今天天气很好", "你好 world"])
    assert has_no_spaces(["สวัสดีครับ"])
    assert not has_no_spaces(["안녕 세상", "hello", "Привет"])


@pytest.mark.parametrize(
    "wrong", [{"unicode": "nfc"}, {"case": "title"}, {"language": "Turkish"}, {"metric": "per"}, {"vocabulary": "all"}]
)
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(ConfigError, match=f"head.{next(iter(wrong))}=.*expected"):
        ctc(**wrong)


def test_a_transcript_of_forms_is_as_it_is_where_nothing_is_asked_for():
    writing = Writing(unicode=None, case="keep", language=None)
    assert writing("cafe\u0301 \u200b") == "cafe\u0301 \u200b"


def test_transcripts_in_a_column_of_another_usual_name(command, rows):
    changed = [{("sentence" if name == "text" else name): value for name, value in row.items()} for row in rows("ctc")]
    assert command("ctc", "report=false", steps=1, rows=changed)[0] == 0
