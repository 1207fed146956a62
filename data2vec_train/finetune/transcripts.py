"""Normalisation of transcripts before training and scoring: Unicode forms, letter case, invisible characters."""

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, replace

from data2vec_train.errors import ConfigError

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
CASES = ("auto", "upper", "lower", "keep")
# Zero-width space, word joiner, byte-order mark, soft hyphen, and direction marks. The joiners U+200C and U+200D are
# kept: they are part of the spelling in Persian and the languages of India.
INVISIBLE = dict.fromkeys(
    [0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
)
# Control characters except white space, and halves of surrogate pairs.
NO_LETTERS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
APOSTROPHES = "'\u2019\u02bc\uff07"
DOTTED = {"i": "İ", "ı": "I"}  # Turkish, Azerbaijani: the dot is part of the letter
TURKIC = ("tr", "az")
TONOS = "\u0301"  # Greek accent, omitted on capitals
# Scripts without spaces between words: CJK, kana, Thai, Lao, Burmese, Khmer, Tibetan.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Writing:
    """A normal form of texts, applied to transcripts and predictions.

    Attributes:
        unicode: NFC, NFD, NFKC or NFKD: equal letters get equal codes, and invisible characters are removed;
            None = texts stay as they are.
        case: "upper", "lower", "keep"; "auto" = the case of the vocabulary's letters.
        language: "tr" and "az" distinguish i from ı in both cases, "el" writes capitals without accents, "de" may write
            SS for ß; None = "tr" if the vocabulary has ı or İ. Other languages have no special rules.
        letters: the letters of the vocabulary; None = not known yet, or phones.
    """

    unicode: str | None
    case: str
    language: str | None
    letters: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.unicode not in (None, *FORMS):
            raise ConfigError(f"head.unicode={self.unicode!r}: expected one of {', '.join(FORMS)}, or null")
        if self.case not in CASES:
            raise ConfigError(f"head.case={self.case!r}: expected one of {', '.join(CASES)}")
        if self.language is not None and not re.fullmatch("[a-z]{2,3}([-_].*)?", str(self.language)):
            raise ConfigError(f"head.language={self.language!r}: expected a code such as tr, az, de or el, or null")

    def fitted(self, letters: Collection[str]) -> "Writing":
        """A copy for the letters of a vocabulary."""
        return replace(self, letters=frozenset(letters))

    def __call__(self, text: str) -> str:
        """The text in this writing, with one space between words."""
        if self.unicode is not None:
            text = unicodedata.normalize(self.unicode, text.translate(INVISIBLE))
            text = NO_LETTERS.sub("", text)
        text = self._cased(text)
        if self.unicode is not None and self.letters is not None and not set(text).isdisjoint(APOSTROPHES):
            text = "".join(self._apostrophe(letter) if letter in APOSTROPHES else letter for letter in text)
        return " ".join(text.split())

    def _cased(self, text: str) -> str:
        if self.case == "keep" or (self.case == "auto" and self.letters is None):
            return text
        code = (self.language or "")[:2]
        known = self.letters or ()
        turkic = code in TURKIC or (self.language is None and is_turkic(known))
        upper = self._upper(text, turkic=turkic, code=code)
        if self.case == "upper":
            return upper
        lower = _lower(text, turkic=turkic)
        if self.case == "lower":
            return lower
        for whole in (text, upper, lower):
            if all(letter in known for letter in set(whole) - {" "}):
                return whole
        if len(upper) != len(text):  # ß became SS, or an accent was removed
            return text
        choices = zip(text, upper, lower, strict=True)
        return "".join(next((letter for letter in three if letter in known), three[0]) for three in choices)

    def _upper(self, text: str, *, turkic: bool, code: str) -> str:
        """The text in capitals; letters whose capital is several letters stay as they are (ß does not become SS)."""
        if code == "el":
            text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).replace(TONOS, ""))
        known = self.letters or ()
        if code == "de" and "ß" not in known:
            text = text.replace("ß", "ẞ" if "ẞ" in known else "SS" if self.letters else "ß")
        if not turkic and len(text.upper()) == len(text):
            return text.upper()
        pairs = ((letter, DOTTED[letter] if turkic and letter in DOTTED else letter.upper()) for letter in text)
        return "".join(capital if len(capital) == 1 else letter for letter, capital in pairs)

    def _apostrophe(self, letter: str) -> str:
        """The form of the apostrophe that the vocabulary contains."""
        known = [apostrophe for apostrophe in APOSTROPHES if apostrophe in self.letters]
        return letter if letter in known or not known else known[0]


def is_turkic(letters: Collection[str]) -> bool:
    """Whether the letters contain ı or İ, so that i and ı are different letters."""
    return "ı" in letters or "İ" in letters


def _lower(text: str, *, turkic: bool) -> str:
    """The text in small letters, converted as a whole: Greek sigma has another form at the end of a word."""
    if turkic:
        text = text.replace("I", "ı").replace("İ", "i")
    return "İ".join(part.lower() for part in text.split("İ"))  # İ stays: its small letter is two characters


def has_no_spaces(texts: Collection[str]) -> bool:
    """Whether most letters belong to scripts without spaces between words."""
    letters = sum(len(text) - text.count(" ") for text in texts)
    return 2 * sum(len(UNSPACED.findall(text)) for text in texts) > letters
