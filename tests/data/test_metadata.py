"""Tables that describe files: what stands between their cells, what their columns are called, what they lose."""

import pytest

from data2vec_train.data.sources.files import FolderSource
from data2vec_train.errors import ConfigError, DataError


def texts(folder, files=("0.wav", "1.wav"), metadata="auto") -> dict[str, str | None]:
    """Transcripts of the files, as a source reads them."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    described = metadata if metadata == "auto" else str(folder / metadata)
    source = FolderSource(
        path=str(folder), extensions=[".wav", ".mp3"], class_from_folder=False, metadata=described, fields=["text"]
    )
    return {source[row].key: source[row].fields["text"] for row in range(len(source))}


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("metadata.csv", 'file_name,text\n0.wav,A\n1.wav,"B, C"\n', ["A", "B, C"]),
        ("metadata.csv", "file_name\ttext\n0.wav\tA, B\n1.wav\tC\n", ["A, B", "C"]),
        ("metadata.csv", "path;sentence\n0.wav;A, B\n1.wav;C\n", ["A, B", "C"]),
        ("metadata.csv", "id|file|transcription\nx|0.wav|A\ny|1.wav|B\n", ["A", "B"]),
        ("metadata.tsv", "\ufeffpath\tsentence\r\n0.wav\tA\r\n1.wav\tB\r\n", ["A", "B"]),
        ("metadata.tsv", 'path\tsentence\n0.wav\t"Hallo" he said\n1.wav\tB "C\n', ['"Hallo" he said', 'B "C']),
        ("metadata.tsv", 'path\tsentence\n0.wav\t"Hello\n1.wav\tthere"\n', ['"Hello', 'there"']),
        ("metadata.tsv", 'path\tsentence\n0.wav\t"say ""hi"""\n1.wav\tB\n', ['say "hi"', "B"]),
        ("metadata.csv", 'file_name,text\n0.wav,"A\nB"\n1.wav,C\n', ["A\nB", "C"]),
        ("metadata.csv", "file_name , text\n0.wav,A\u2028B\n1.wav,C\x0bD\n", ["A\u2028B", "C\x0bD"]),
        ("metadata.csv", "audio,transcript\n0,A\n1,B\n", ["A", "B"]),
        ("metadata.csv", "file_name,text,\n0.wav,A,\n1.wav,B,\n", ["A", "B"]),
        ("metadata.jsonl", '{"file": "0.wav", "text": "A\u2028"}\n\n{"file": "1", "text": "B"}\n', ["A\u2028", "B"]),
    ],
)  # fmt: skip
def test_tables_are_read_as_their_first_line_says(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content, newline="")
    assert list(texts(tmp_path).values()) == wanted


def test_a_table_of_excel_in_wide_letters(tmp_path):
    (tmp_path / "metadata.csv").write_text("path\tsentence\n0.wav\té\n1.wav\tB\n", encoding="utf-16")
    assert list(texts(tmp_path).values()) == ["é", "B"]


def test_common_voice(tmp_path, caplog):
    (tmp_path / "train.tsv").write_text("client_id\tpath\tsentence\tup_votes\nx\ta.mp3\tA\t2\ny\tb.mp3\tB\t3\n")
    clips = ["clips/a.mp3", "clips/b.mp3", "clips/c.mp3"]
    assert texts(tmp_path, clips, "train.tsv") == {"clips/a.mp3": "A", "clips/b.mp3": "B"}
    assert "1 of 3 files" in caplog.text
    with pytest.raises(DataError, match=r"no metadata\.csv, .*it has train\.tsv"):
        texts(tmp_path, clips)


def test_absolute_paths_and_paths_of_windows(tmp_path):
    (tmp_path / "metadata.csv").write_text(f"path,text\n{tmp_path}/a/0.wav,A\n{tmp_path}/a/1.wav,B\n")
    assert texts(tmp_path, ["a/0.wav", "a/1.wav"]) == {"a/0.wav": "A", "a/1.wav": "B"}
    (tmp_path / "metadata.csv").write_text("path,text\na\\0.wav,A\na\\1.wav,B\n")
    assert texts(tmp_path, ["a/0.wav", "a/1.wav"]) == {"a/0.wav": "A", "a/1.wav": "B"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file_name,text\n0.wav,A, B\n1.wav,C\n", r"line 2: 3 cells, .* 2 columns"),
        ('file_name,text\n0.wav,"A\n1.wav,B\n', r"line 3: not a table .*a quote is not closed"),
        ("file_name,text\n0.wav,A\n0.wav,B\n1.wav,C\n", r"line 3: 0\.wav is described twice"),
        ("name,text\n0.wav,A\n", r"its first line is 'name,text'; expected the names of the columns"),
        ("0.wav,A\n1.wav,B\n", r"its first line is '0\.wav,A'"),
        ("LJ001|words|words\n", r"its first line is 'LJ001"),
        ("file_name,text,text\n0.wav,A,B\n", r"two columns called 'text'"),
        ("file_name,text\n,A\n", r"line 2: no file name"),
        ("file_name,text\n9.wav,A\n", r"1 of 1 files .* 9\.wav"),
        ("", r"its first line is ''"),
        ("file_name,text\n", r"is empty"),
        ("file_name\n0.wav\n", r"has no column text; it has"),
        (
            "file_name,sentence,transcription\n0.wav,A,B\n",
            r"no column text.* sentence and transcription.*head.text_column",
        ),
    ],
)
def test_what_a_table_would_lose_is_named(tmp_path, content, said):
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises((DataError, ConfigError), match=said):
        texts(tmp_path)


def test_two_tables_need_a_choice(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.wav,A\n1.wav,B\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.wav", "text": "C"}\n')
    with pytest.raises(ConfigError, match=r"metadata\.csv and metadata\.jsonl; say which"):
        texts(tmp_path)
    assert texts(tmp_path, metadata="metadata.csv") == {"0.wav": "A", "1.wav": "B"}
