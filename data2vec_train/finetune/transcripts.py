"""How transcripts are written before they are learnt and scored: Unicode forms, letter case, what nobody sees."""

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, replace

from data2vec_train.errors import ConfigError

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
CASES = ("auto", "upper", "lower", "keep")
# Zero-width space, word joiner, byte-order mark, soft hyphen, and marks of direction. The joiners U+200C and U+200D
# stay: Persian and the languages of India spell with them.
INVISIBLE = dict.fromkeys(
    [0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
)
# Control characters but for white space, and halves of surrogate pairs.
NO_LETTERS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
APOSTROPHES = "'\u2019\u02bc\uff07"
DOTTED = {"i": "İ", "ı": "I"}  # Turkish, Azerbaijani: the dot is part of the letter
TURKIC = ("tr", "az")
TONOS = "\u0301"  # Greek capitals are written without it
# Scripts that put no spaces between words: CJK, kana, Thai, Lao, Burmese, Khmer, Tibetan.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Writing:
    """One way to write texts, for transcripts and predictions alike.

    Attributes:
        unicode: NFC, NFD, NFKC or NFKD: letters that look the same are the same, and what is invisible is taken out;
            None = texts stay as they are.
        case: "upper", "lower", "keep"; "auto" = as the letters of the vocabulary are.
        language: "tr" and "az" tell i from ı in both cases, "el" writes capitals without accents, "de" may write SS for
            ß; None = "tr" where the vocabulary has ı or İ. Others have no rules of their own.
        letters: of the vocabulary; None = not known yet, or of phones.
    """

    unicode: str | None
    case: str
    language: str | None
    letters: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.unicode not in (None, *FORMS):
            raise ConfigError(f"head.unicode is {', '.join(FORMS)} or null, got {self.unicode!r}")
        if self.case not in CASES:
            raise ConfigError(f"head.case is {', '.join(CASES)}, got {self.case!r}")
        if self.language is not None and not re.fullmatch("[a-z]{2,3}([-_].*)?", str(self.language)):
            raise ConfigError(f"head.language is a code such as tr, az, de or el, or null, got {self.language!r}")

    def fitted(self, letters: Collection[str]) -> "Writing":
        """The same for the letters of a vocabulary."""
        return replace(self, letters=frozenset(letters))

    def __call__(self, text: str) -> str:
        """The text, with one space between words."""
        if self.unicode is not None:
            text = unicodedata.normalize(self.unicode, text.translate(INVISIBLE))
            text = NO_LETTERS.sub("", text)
        text = self._cased(text)
        if self.unicode is not None and self.letters is not None and not set(text).isdisjoint(APOSTROPHES):
            text = "".join(self._apostrophe(one) if one in APOSTROPHES else one for one in text)
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
            if all(one in known for one in set(whole) - {" "}):
                return whole
        if len(upper) != len(text):  # ß as SS, or an accent less
            return text
        choices = zip(text, upper, lower, strict=True)
        return "".join(next((one for one in three if one in known), three[0]) for three in choices)

    def _upper(self, text: str, *, turkic: bool, code: str) -> str:
        """Letters whose capital is several letters stay as they are: ß is no SS."""
        if code == "el":
            text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).replace(TONOS, ""))
        known = self.letters or ()
        if code == "de" and "ß" not in known:
            text = text.replace("ß", "ẞ" if "ẞ" in known else "SS" if self.letters else "ß")
        if not turkic and len(text.upper()) == len(text):
            return text.upper()
        pairs = ((one, DOTTED[one] if turkic and one in DOTTED else one.upper()) for one in text)
        return "".join(capital if len(capital) == 1 else one for one, capital in pairs)

    def _apostrophe(self, letter: str) -> str:
        """The apostrophe that the vocabulary has."""
        known = [one for one in APOSTROPHES if one in self.letters]
        return letter if letter in known or not known else known[0]


def is_turkic(letters: Collection[str]) -> bool:
    """Whether the dot of i makes another letter."""
    return "ı" in letters or "İ" in letters


def _lower(text: str, *, turkic: bool) -> str:
    """As a whole: the last sigma of a Greek word has a letter of its own."""
    if turkic:
        text = text.replace("I", "ı").replace("İ", "i")
    return "İ".join(part.lower() for part in text.split("İ"))  # whose small letter would be two


def has_no_spaces(texts: Collection[str]) -> bool:
    """Whether most of the letters are of scripts that put no spaces between words."""
    letters = sum(len(text) - text.count(" ") for text in texts)
    return 2 * sum(len(UNSPACED.findall(text)) for text in texts) > letters
