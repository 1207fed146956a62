"""Sections, rows and faults that comments cite are in the documents."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    file
    for folder in ("data2vec_train", "configs", "recipes", "tests")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".yaml") and file != Path(__file__).resolve()
]


def cited(document):
    """(file, section, row or fault or None) of each citation, lines joined."""
    found = []
    for file in SOURCES:
        text = re.sub(r"\s+(# )?", " ", file.read_text(encoding="utf-8"))
        for section, row in re.findall(rf"{document}(?: (\d(?:\.\d)?))?(?:, (?:row|fault) (\d+))?", text):
            found.append((file.name, section, row))
    return found


@pytest.mark.parametrize(
    "document", ["data2vec_train/objective/ALGORITHM.md", "data2vec_train/weights/TRANSFORMERS.md"]
)
def test_what_is_cited_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    sections = set(re.findall(r"^#{2,3} (\d(?:\.\d)?)", text, re.MULTILINE))
    rows = set(re.findall(r"^(?:\| |)(\d+)(?: \||\. \*\*)", text, re.MULTILINE))
    citations = cited(Path(document).name)
    assert len(citations) > 15
    assert any(citation[2] for citation in citations)
    assert [citation for citation in citations if citation[1] and citation[1] not in sections] == []
    assert [citation for citation in citations if citation[2] and citation[2] not in rows] == []
