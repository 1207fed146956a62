"""Attacks on transcripts, vocabularies, tables of recordings, long recordings, and labels that say nothing."""

import io
import json
import random
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data2vec_train as ours
from data2vec_train.data.audio import AudioWindows
from data2vec_train.data.sources.files import FolderSource, RawSample
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.finetune.base import Inputs
from data2vec_train.finetune.speech import CTC, FrameClassification, SpecAugment
from data2vec_train.finetune.text import CausalLM, LanguageMeter, MaskedLM, QuestionAnswering, TokenClassification
from data2vec_train.finetune.vision import SemanticSegmentation
from data2vec_train.weights.preprocessing import AudioFeatureExtractor
from data2vec_train.weights.tokenizers import CTCTokenizer, TextTokenizer
from tests.finetune.conftest import SIZE, run

MASKS = SpecAugment(time_fraction=0.0, time_span=10, channel_fraction=0.0, channel_span=0.1)
RATE = 8000
RNG = np.random.default_rng(0)


class Rows:
    """Records with a column each, as a source has them."""

    lengths = None

    def __init__(self, values: list, lengths: list[int] | None = None) -> None:
        self.values = values
        self.lengths = None if lengths is None else np.array(lengths)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> RawSample:
        return RawSample(f"r{row}", None, None, {})

    def column(self, name: str) -> list:
        return self.values


def ctc(**settings) -> CTC:
    plain = {
        "text_column": "text",
        "vocabulary": "letters",
        "case": "auto",
        "remove": None,
        "words": None,
        "beam": None,
    }
    return CTC(**{**plain, "unicode": "NFC", **settings}, inputs=Inputs(token_count=lambda n: n // 100), masks=MASKS)


def reasons(values: list, lengths: list[int] | None = None, **settings) -> list[str]:
    """Why each of the records cannot be learnt, after `setup` with all; "" if it can."""
    task, source = ctc(**settings), Rows(values, lengths)
    task.setup(source, np.arange(len(values)))
    found = dict(task.unusable(source, np.arange(len(values))))
    return [found.get(row, "") for row in range(len(values))]


# ---------------------------------------------------------------------------------------------------------------------
# Transcripts


TRANSCRIPTS = {
    "a number in the column of transcripts": (5, "empty"),
    "not a number, as pandas leaves it": (float("nan"), "empty"),
    "bytes in the column": (b"ab", "empty"),
    "a list of words": (["a", "b"], "empty"),
    "invisible letters only": ("\u200b\ufeff\u2060", "empty"),
    "white space of many kinds only": ("\u00a0\u3000\t\r\n", "empty"),
    "a blank written out": ("a<pad>b", "contains <pad>"),
    "a start of text written out": ("<s>ab</s>", "contains <s>"),
    "an unknown symbol written out": ("<unk>", "contains <unk>"),
    "a word delimiter in the text": ("a|b", "contains |"),
    "a table of markdown": ("| a |", "contains |"),
    "control characters around letters": ("a\x00\x07b", ""),
    "half of a surrogate pair": ("a\ud800b", ""),
    "an emoji of several": ("a 👩\u200d👩\u200d👧 b", ""),
    "arabic from right to left with a mark of direction": ("\u202bمرحبا\u202c", ""),
    "hebrew with points": ("שָׁלוֹם", ""),
    "marks in another order": ("a\u0302\u0323", ""),
    "korean in single letters": (unicodedata.normalize("NFD", "한국어"), ""),
    "devanagari with a joiner": ("क्\u200dष", ""),
    "chinese in one run": ("今天天气", ""),
    "a line separator of unicode": ("a\u2028b", ""),
}


@pytest.mark.parametrize("attack", TRANSCRIPTS)
def test_a_transcript_that_is_odd(attack):
    value, wanted = TRANSCRIPTS[attack]
    why = reasons(["ab", value])[1]
    assert (wanted in why) if wanted else not why
    if not wanted:
        task = ctc()
        task.setup(Rows(["ab", value]), np.arange(2))
        text = task.text_of(value)
        again = task.tokenizer.decode(task.spelt(text)[0], group_tokens=False)
        assert task.writing(again) == text, "what is learnt is what is said"


def test_two_hundred_thousand_letters_in_a_short_recording_are_named_in_a_short_line():
    started = time.process_time()
    why = reasons(["ab", "ab" * 100_000], [1000, 1000])[1]
    assert "200000 symbols in 10 frames" in why
    assert len(why) < 200
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("letters", "samples", "fits"), [("aa", 200, 0), ("aa", 300, 1), ("aba", 300, 1), ("a  a", 300, 1)]
)
def test_letters_that_fit_only_with_their_blanks(letters, samples, fits):
    assert (not reasons(["ab", letters], [1000, samples])[1]) == bool(fits)


def test_removing_every_letter_leaves_an_empty_transcript():
    assert "empty" in reasons(["ab", "[noise]"], remove=r"\[.*\]")[1]


def test_codes_without_a_word_for_them_are_empty():
    assert "empty" in reasons([1, 2], words={1: "one"})[1]


def test_a_vocabulary_of_single_korean_letters_spells_whole_syllables():
    task = ctc(vocabulary="keep")
    letters = sorted(set(unicodedata.normalize("NFD", "한국어")))
    task._use(CTCTokenizer({letter: number for number, letter in enumerate(["<pad>", "<unk>", "|", *letters])}))
    ids, why = task.spelt(task.text_of("한국어"))
    assert not why
    assert task.score([task.tokenizer.decode(ids)], ["한국어"]) == {"wer": 0.0, "cer": 0.0}


def test_the_same_transcripts_in_another_order_give_the_same_numbers():
    texts = ["über", "ab", "zé", "漢字", "-'"]
    made = []
    for seed in range(3):
        task = ctc()
        shuffled = random.Random(seed).sample(texts, len(texts))
        task.setup(Rows(shuffled), np.arange(len(texts)))
        made.append(list(task.tokenizer.vocabulary.items()))
    assert made[0] == made[1] == made[2]


def test_two_apostrophes_are_one_letter_in_training_and_scores():
    task = ctc()
    task.setup(Rows(["don't", "don’t"]), np.arange(2))
    assert task.spelt(task.text_of("don't"))[0] == task.spelt(task.text_of("don’t"))[0]
    assert task.score(["don't"], [task.text_of("don’t")])["wer"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies


FOLDERS = {
    "an empty file": {"vocab.json": ""},
    "half a file": {"vocab.json": '{"<pad>": 0, "a"'},
    "a list of symbols": {"vocab.json": '["<pad>", "a"]'},
    "wide letters": {"vocab.json": '{"<pad>": 0}'.encode("utf-16")},
    "depth without end": {"vocab.json": '{"a":' * 50_000},
    "numbers as texts": {"vocab.json": '{"<pad>": "0", "a": "1"}'},
    "a number below zero": {"vocab.json": '{"<pad>": 0, "a": -1}'},
    "a number with a fraction": {"vocab.json": '{"<pad>": 0, "a": 1.5}'},
    "a blank of another name that nothing says": {"vocab.json": '{"BLANK": 0, "a": 1}'},
    "settings that name a blank which is not there": {
        "vocab.json": '{"<pad>": 0}',
        "tokenizer_config.json": '{"pad_token": "[PAD]"}',
    },
    "settings with no blank": {"vocab.json": '{"<pad>": 0}', "tokenizer_config.json": '{"pad_token": null}'},
    "a space that is a number": {
        "vocab.json": '{"<pad>": 0}',
        "tokenizer_config.json": '{"replace_word_delimiter_char": 5}',
    },
    "added symbols as a list": {"vocab.json": '{"<pad>": 0}', "added_tokens.json": '["<s>"]'},
    "added symbols with odd numbers": {"vocab.json": '{"<pad>": 0}', "added_tokens.json": '{"<s>": null}'},
    "added symbols without numbers": {
        "vocab.json": '{"<pad>": 0}',
        "tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "<s>"}}}',
    },
    "languages without a choice": {"vocab.json": '{"deu": {"<pad>": 0}}'},
}


@pytest.mark.parametrize("attack", FOLDERS)
def test_a_vocabulary_that_is_broken(tmp_path, attack):
    for name, content in FOLDERS[attack].items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        CTCTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_symbols_as_objects_an_empty_symbol_and_a_space_as_symbol(tmp_path):
    (tmp_path / "vocab.json").write_text('{"[PAD]": 0, "[UNK]": 1, " ": 2, "a": 3, "": 4}')
    settings = {"pad_token": {"content": "[PAD]"}, "unk_token": {"content": "[UNK]"}, "word_delimiter_token": " "}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = CTCTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a a")["input_ids"] == [3, 2, 3]
    assert tokenizer.decode([3, 0, 2, 3]) == "a a"


def test_a_word_delimiter_that_stands_in_transcripts():
    task = ctc(vocabulary="keep")
    task._use(CTCTokenizer({"<pad>": 0, "<unk>": 1, "▁": 2, "a": 3}, word_delimiter="▁"))
    assert "contains ▁" in task.spelt("a▁a")[1]
    assert task.spelt("a a")[0] == [3, 2, 3]


def test_no_symbol_for_the_space_is_named():
    task = ctc(vocabulary="keep")
    task._use(CTCTokenizer({"<pad>": 0, "<unk>": 1, "a": 2}, word_delimiter=None))
    assert "has (the space)" in task.spelt("a a")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def described(folder: Path, name: str, content: str | bytes, files: tuple[str, ...] = ("0.wav", "1.wav")) -> list:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = FolderSource(
        path=str(folder), extensions=[".wav"], class_from_folder=False, metadata="auto", fields=["text"]
    )
    return [source[row].fields["text"] for row in range(len(source))]


TABLES = {
    "quoted names of columns": ("metadata.tsv", '"path"\t"sentence"\n0.wav\tA\n1.wav\tB\n', ["A", "B"]),
    "lines that end as on old macs": ("metadata.csv", "path,text\r0.wav,A\r1.wav,B\r", ["A", "B"]),
    "two columns of files": ("metadata.csv", "path,file_name,text\nx,0.wav,A\ny,1.wav,B\n", ["A", "B"]),
    "lines of librispeech with a mark and returns": ("x.trans.txt", "\ufeff0 A B\r\n1 C\r\n", ["A B", "C"]),
    "blank lines between": ("metadata.csv", "path,text\n\n0.wav,A\n\n\n1.wav,B\n\n", ["A", "B"]),
    "a row that ends early": ("metadata.csv", "path,text\n0.wav,A\n1.wav\n", ["A", None]),
    "the same row twice": ("metadata.csv", "path,text\n0.wav,A\n0.wav,A\n1.wav,B\n", ["A", "B"]),
    "a path that leads out": ("metadata.csv", "path,text\n../../etc/passwd,A\n", DataError),
    "an absolute path elsewhere": ("metadata.csv", "path,text\n/etc/passwd,A\n", DataError),
    "a cell of a million letters": ("metadata.csv", f"path,text\n0.wav,{'a' * 1_000_000}\n", DataError),
    "bytes of no encoding": ("metadata.csv", b"path,text\n0.wav,\xff\xfe\xfa\n", DataError),
    "rows of json that are lists": ("metadata.jsonl", '["0.wav", "A"]\n', DataError),
    "json whose file is a list": ("metadata.jsonl", '{"path": ["0.wav"], "text": "A"}\n', DataError),
    "json of great depth": ("metadata.jsonl", "[" * 100_000 + "\n", DataError),
    "only names of columns": ("metadata.tsv", "path\tsentence\n", DataError),
    "a name in capitals": ("METADATA.CSV", "path,text\n0.wav,A\n", DataError),
    "a quote that opens and never closes": ("metadata.csv", 'path,text\n0.wav,"A\n1.wav,B\n', DataError),
    "a comma too many": ("metadata.csv", "path,text\n0.wav,A,B\n1.wav,C\n", DataError),
    "other words for a file": ("metadata.csv", "path,text\n0.wav,A\n./0.wav,B\n", DataError),
}


@pytest.mark.parametrize("attack", TABLES)
def test_a_table_that_is_odd(tmp_path, attack):
    name, content, wanted = TABLES[attack]
    if isinstance(wanted, list):
        assert described(tmp_path, name, content) == wanted
        return
    with pytest.raises(wanted) as caught:
        described(tmp_path, name, content)
    assert len(str(caught.value)) < 1000


def test_names_with_accents_from_a_mac(tmp_path):
    two = unicodedata.normalize("NFD", "é.wav")
    assert described(tmp_path, "metadata.csv", "path,text\né.wav,A\n", (two,)) == ["A"]


def test_a_large_table_takes_seconds(tmp_path):
    started = time.process_time()
    rows = "".join(f"{number}.wav\tA {number}\n" for number in range(60_000))
    with pytest.raises(DataError, match="59998 of 60000 files"):
        described(tmp_path, "metadata.tsv", "path\tsentence\n" + rows)
    assert time.process_time() - started < 15


# ---------------------------------------------------------------------------------------------------------------------
# Long recordings


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A small head that says another letter at almost every frame."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    front = {"conv_dim": [32] * 6, "conv_kernel": [10, 3, 3, 3, 3, 2], "conv_stride": [5, 2, 2, 2, 2, 2]}
    config = ours.Data2VecAudioConfig(**SIZE, **front, num_conv_pos_embedding_groups=4)
    model = ours.Data2VecAudioForCTC(config)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if name.endswith("lm_head.weight")).normal_(
            std=3.0
        )
    model.save_pretrained(folder)
    AudioFeatureExtractor(sampling_rate=RATE).save_pretrained(folder)
    CTCTokenizer().save_pretrained(folder)
    return folder


def predicted(reader: Path, folder: Path, *more: str) -> list[dict]:
    out = folder / f"said{len(list(folder.glob('said*')))}.jsonl"
    given = [f"checkpoint={reader}", "data=folder", f"data.path={folder / 'data'}", f"out={out}"]
    given += [f"cache_dir={folder}/cache"]
    given += [] if any(word.startswith("data.num_workers") for word in more) else ["data.num_workers=0"]
    assert run("predict", *given, "window_seconds=2", "stride_seconds=0.4", *more) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def sound(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(round(seconds * RATE)).astype(np.float32) * 0.1


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3", "wav"])
def test_a_long_file_of_each_kind_has_one_line(reader, tmp_path, ending):
    (tmp_path / "data").mkdir()
    soundfile.write(tmp_path / "data" / f"a.{ending}", sound(7.3), RATE)
    (line,) = predicted(reader, tmp_path)
    assert 6.5 < line["words"][-1]["end"] <= 7.4


@pytest.mark.parametrize("ending", ["flac", "ogg", "wav"])
def test_a_long_file_that_is_cut_off_gives_no_shorter_transcript_in_silence(reader, tmp_path, ending):
    (tmp_path / "data").mkdir()
    file = io.BytesIO()
    soundfile.write(file, sound(9.0), RATE, format=ending)
    (tmp_path / "data" / f"a.{ending}").write_bytes(file.getvalue()[: len(file.getvalue()) * 2 // 3])
    soundfile.write(tmp_path / "data" / "b.wav", sound(1.0), RATE)
    line = next(row for row in predicted(reader, tmp_path) if row["key"].startswith("a."))
    assert "error" in line or ending == "ogg"  # of which a truncated file is a shorter one, see `decode_audio`


def test_loader_processes_give_the_same_lines(reader, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "data" / f"{number}.wav", sound(1.0 + 2 * number), RATE)
    assert predicted(reader, tmp_path) == predicted(reader, tmp_path, "data.num_workers=2")


def test_long_recordings_in_a_table_of_bytes(reader, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = []
    for seconds in (1.0, 7.0):
        file = io.BytesIO()
        soundfile.write(file, sound(seconds), RATE, format="wav")
        rows.append({"audio": {"bytes": file.getvalue(), "path": None}})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    given = [f"checkpoint={reader}", "modality=audio", "data=hf", f"data.path={tmp_path}/a.parquet"]
    given += [f"out={tmp_path}/said.jsonl", "data.num_workers=0", "window_seconds=2", "stride_seconds=0.4"]
    assert run("predict", *given) == 0
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a.parquet:0", "a.parquet:1"]
    assert lines[1]["words"][-1]["end"] > 6


@pytest.mark.parametrize(
    "wrong",
    ["window_seconds=0", "window_seconds=-1", "window_seconds=long", "stride_seconds=.inf", "stride_seconds=0",
     "stride_seconds=null", "stride_seconds=1"],
)  # fmt: skip
def test_windows_that_cannot_be(reader, tmp_path, capsys, wrong):
    (tmp_path / "data").mkdir()
    soundfile.write(tmp_path / "data" / "a.wav", sound(1.0), RATE)
    given = [f"checkpoint={reader}", "data=folder", f"data.path={tmp_path / 'data'}", f"out={tmp_path}/said.jsonl"]
    assert run("predict", *given, "data.num_workers=0", "window_seconds=2", wrong) == 2
    error = capsys.readouterr().err
    assert "seconds" in error
    assert "Traceback" not in error
    assert not (tmp_path / "said.jsonl").exists()


def test_a_day_of_sound_is_cut_without_being_read(tmp_path):
    source = Rows([None])
    source.class_names, source.rejected, source.grouped = None, (), None
    source.labels = lambda: None
    day = np.broadcast_to(np.float32(0), (24 * 3600 * RATE,))  # of no memory
    source.__class__ = type("Day", (Rows,), {"__getitem__": lambda self, row: RawSample("day", day, None, {})})
    cut = {"window_samples": 240_000, "stride_samples": 40_000, "sample_rate_hz": RATE, "min_seconds": 0.1}
    windows = AudioWindows(source, cache_dir=None, **cut)
    assert len(windows) == windows.parts[0] == 4320
    assert windows._starts[-1] + windows.lengths[-1] / RATE == 24 * 3600


# ---------------------------------------------------------------------------------------------------------------------
# Labels that say nothing


FRAMES = {
    "times in milliseconds": ([{"start": 0, "end": 900, "label": "a"}], "times in seconds"),
    "a segment that ends before it starts": ([{"start": 0.9, "end": 0.1, "label": "a"}], "a segment from 0.9 to 0.1"),
    "a segment without end": ([{"start": 0, "end": float("inf"), "label": "a"}], "a segment from 0 to inf"),
    "a segment that is no number": ([{"start": 0, "end": float("nan"), "label": "a"}], "to nan"),
    "a segment before the beginning": ([{"start": -1, "end": 0.5, "label": "a"}], "a segment from -1"),
    "segments behind the end": ([{"start": 1.5, "end": 2, "label": "a"}], "no frame has a class"),
    "no segments": ([], "no frame has a class"),
    "a segment shorter than a frame": ([{"start": 0.101, "end": 0.102, "label": "a"}], "no frame has a class"),
}


@pytest.mark.parametrize("attack", FRAMES)
def test_segments_that_teach_nothing(attack):
    labels, wanted = FRAMES[attack]
    inputs = Inputs(token_count=lambda n: n // 160, sample_rate_hz=RATE)
    task = FrameClassification(labels_column="s", background=None, layer_sum=False, inputs=inputs, masks=MASKS)
    good = [{"start": 0, "end": 0.5, "label": "a"}, {"start": 0.5, "end": 1, "label": "b"}]
    source = Rows([good, labels], [RATE, RATE])
    task.class_names = ["a", "b"]
    ((row, why),) = task.unusable(source, np.arange(2))
    assert row == 1
    assert wanted in why


@pytest.fixture(scope="module")
def words() -> Inputs:
    from data2vec_train.data.tokenizer import Tokenizer

    tokenizer = TextTokenizer.from_json(Tokenizer.train(["alpha beta gamma delta"] * 3, vocab_size=270).to_json())
    return Inputs(tokenizer=tokenizer, max_tokens=16)


def test_words_that_begin_behind_the_end(words):
    task = TokenClassification(words_column="w", tags_column="t", inputs=words, max_tokens=2)
    task.class_names = ["a", "b"]
    with pytest.raises(BadSample, match="no word begins within 2 tokens"):
        task.example(RawSample("x", ["alpha"], None, {"t": ["a"]}), train=True, rng=RNG)


def test_an_answer_that_fits_into_no_window(words):
    columns = {"question_column": "q", "context_column": "c", "answers_column": "a"}
    more = {"stride": 2, "max_answer_tokens": 30, "unanswerable": True, "max_tokens": 16}
    task = QuestionAnswering(**columns, **more, inputs=words)
    context = "alpha beta gamma delta " * 8
    fields = {"c": context, "a": {"text": [context.strip()], "answer_start": [0]}}
    with pytest.raises(BadSample, match="no window of .* contains"):
        task.example(RawSample("x", "beta", None, fields), train=True, rng=RNG)


def test_a_text_of_one_token_hides_nothing_and_goes_nowhere(words):
    raw = RawSample("x", np.array([0]), None, {})
    with pytest.raises(BadSample, match="there is no token to mask"):
        MaskedLM(hidden_fraction=0.15, inputs=words, max_tokens=None).example(raw, train=True, rng=RNG)
    with pytest.raises(BadSample, match="there is no next token"):
        CausalLM(continue_tokens=3, inputs=words, max_tokens=None).example(raw, train=True, rng=RNG)


def test_a_language_model_without_tokens_has_no_perfect_score():
    with pytest.raises(DataError, match="no test text has a token"):
        LanguageMeter(shift=True).compute()


@pytest.mark.parametrize("corner", [False, True], ids=["a map without a class", "a class in a corner only"])
def test_maps_of_pixels_without_a_class(corner):

    classes = np.full((64, 64), 255, dtype=np.uint8)
    classes[0, 0] = 1 if corner else 255
    classes[:4, :4] = classes[0, 0]
    shape = {"map_column": "map", "maps": None, "classes": 3, "reduce_labels": False, "auxiliary_weight": 0.0}
    transform = type("T", (), {"size": (32, 32), "normalise": staticmethod(lambda x: x.float())})()
    inputs = Inputs(decode=lambda value: value, transform=transform)
    task = SemanticSegmentation(**shape, inputs=inputs, crop_scale=[0.01, 0.02], horizontal_flip=0.0)
    raw = RawSample("x", np.zeros((64, 64, 3), np.uint8), None, {"map": classes.tolist()})
    if not corner:
        with pytest.raises(BadSample, match="no pixel of its map has a class"):
            task.example(raw, train=True, rng=RNG)
        assert task.example(raw, train=False, rng=RNG)["reference"] is None
        return
    for seed in range(20):
        torch.manual_seed(seed)
        assert (task.example(raw, train=True, rng=RNG)["classes"] != 255).any()
