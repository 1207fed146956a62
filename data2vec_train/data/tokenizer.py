"""Tokenizers for pretraining: loaded, or trained as a byte-level BPE; they encode long texts in bounded memory."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data2vec_train.data.vocabulary import EMBEDDED, SPECIALS, SPELLINGS, open_tokenizer, splitting, tokenizer_facts
from data2vec_train.system.outputs import replace_file

if TYPE_CHECKING:
    import tokenizers

__all__ = ["EMBEDDED", "Tokenizer", "cut_runs", "tokenizer_facts"]

log = logging.getLogger(__name__)

# Longer texts are encoded in parts of this many characters: the library takes about 160 bytes for each.
LONG = 2**19
OVERLAPS = (2**10, 2**12, 2**14, 2**16)  # characters on which two neighbouring parts are compared, tried in this order
# Longest run without white space to train on: the time of merging within a run is its length times the number of
# merges, and few entries of a vocabulary are longer.
LONGEST_RUN = 100


class Tokenizer:
    """Text to ids and back, with the ids of the special tokens as attributes (see `tokenizer_facts`).

    Make one with `load` or `train`.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", facts: dict[str, int]) -> None:
        self._inner = inner
        self.facts = facts
        self.vocab_size, self.pad_id, self.mask_id = facts["vocab_size"], facts["pad_id"], facts["mask_id"]
        self.bos_id, self.eos_id, self.unk_id = facts["bos_id"], facts["eos_id"], facts["unk_id"]

    @classmethod
    def load(cls, path: str | None, *, trusted: bool = False) -> "Tokenizer":
        """The tokenizer at `path`; see `vocabulary.open_tokenizer`.

        Raises:
            ConfigError: there is none, or it cannot be used.
        """
        inner, vocabulary = open_tokenizer(path, trusted=trusted)
        return cls(inner, vocabulary.facts)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """A byte-level BPE for these texts; no text is unknown to it.

        If the texts give fewer merges than `vocab_size` needs, the remaining ids are unused. Runs of more than 100
        characters without white space (DNA, Chinese, base64) are cut, so the time grows linearly with the length of
        the texts, not with its square.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        facts = tokenizer_facts(None, vocab_size)
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # the mask token follows as the last
            special_tokens=SPECIALS[:-1],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        num_cuts = 0

        def pieces() -> Iterator[str]:
            nonlocal num_cuts
            for text in texts:
                num_cuts -= 1
                for piece in cut_runs(text, LONGEST_RUN):
                    num_cuts += 1
                    yield piece

        inner.train_from_iterator(pieces(), trainer)
        if num_cuts:
            log.info(
                "to train the tokenizer, runs of more than %d characters without white space were cut in %d places; no "
                "token is longer",
                LONGEST_RUN,
                num_cuts,
            )
        # The mask token always has the last id: the encoder is built from it before the tokenizer is trained.
        content = json.loads(inner.to_str())
        mask = {"id": vocab_size - 1, "content": SPECIALS[-1], "special": True, "normalized": False}
        content["added_tokens"].append(mask | {"single_word": False, "lstrip": True, "rstrip": False})
        content["model"]["vocab"][SPECIALS[-1]] = vocab_size - 1
        return cls(tokenizers.Tokenizer.from_str(json.dumps(content)), facts)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (n,) int32, without special tokens around them.

        Raises:
            BadSample: the tokenizer has no token for a part of a text, or fails on it.
        """
        return [np.array(encoding.ids, dtype=np.int32) for encoding in self._encode(texts)]

    def encode_long(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of one text of any length, in parts and in bounded memory; the same ids as from the whole text.

        Neighbouring parts overlap. They are joined at a token in the middle of the overlap, if both parts have the same
        tokens at the same characters there: these tokens do not depend on where a part ends. If the tokens differ in
        the longest overlap (a word of a million letters that is one unknown token), the text is cut there and the cut
        is logged.

        Args:
            pieces: the text, in strings of any length.

        Yields:
            (n,) int32 each, without special tokens around them.

        Raises:
            BadSample: see `encode_batch`.
        """
        feed = iter(pieces)
        text, known, num_unsafe = "", 0, 0  # the first `known` tokens of `text` were yielded with the previous part
        while True:
            text = _filled(text, feed, LONG + OVERLAPS[-1])
            if len(text) <= LONG:
                break
            left = self._tokens(text[:LONG])
            for overlap in OVERLAPS:
                seam = self._seam(text, left, overlap)
                if seam is not None:
                    break
            else:
                num_unsafe += 1
                seam = len(left), LONG, 0
            last, first_character, next_known = seam
            yield left[known:last, 2].astype(np.int32)
            text, known = text[first_character:], next_known
        yield self._tokens(text)[known:, 2].astype(np.int32)
        if num_unsafe:
            log.warning(
                "a text was cut in %d places where its tokens depend on more than %d characters around them",
                num_unsafe,
                OVERLAPS[-1],
            )

    def _seam(self, text: str, left: np.ndarray, overlap: int) -> tuple[int, int, int] | None:
        """Where to join a part of a text to the next one; None if their tokens differ in the overlap.

        Args:
            text: starts with the first character of the part.
            left: tokens of the part, see `_tokens`; the part has `LONG` characters.
            overlap: characters to compare.

        Returns:
            Number of tokens before the seam, the next part's first character, number of its tokens before the seam.
        """
        # The next part starts at a token of this one, so that tokens of fixed length within a run, such as groups of
        # three digits, start at the same characters in both.
        row = int(np.searchsorted(left[:, 0], LONG - 2 * overlap))
        start = int(left[row, 0]) if row < len(left) else 0
        if start == 0:
            return None
        right = self._tokens(text[start : LONG + overlap]) + [start, start, 0]
        edges = (LONG - 3 * overlap // 2, LONG - overlap // 2)
        (first, last), (other_first, other_last) = (np.searchsorted(tokens[:, 0], edges) for tokens in (left, right))
        count = int(last - first)
        if count < 4 or not np.array_equal(left[first:last], right[other_first:other_last]):
            return None
        return int(first) + count // 2, start, int(other_first) + count // 2

    def _tokens(self, text: str) -> np.ndarray:
        """(T, 3) int64: first character, end, id of each token."""
        (encoding,) = self._encode([text])
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.column_stack([offsets, np.array(encoding.ids, dtype=np.int64)])

    def _encode(self, texts: Sequence[str]) -> "list[tokenizers.Encoding]":
        with splitting("".join(texts[:1])):
            return self._inner.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, without special tokens."""
        return self._inner.decode([int(token_id) for token_id in ids], skip_special_tokens=True)

    def pieces(self, ids: np.ndarray) -> list[str]:
        """The text of each id; incomplete UTF-8 bytes become a replacement character."""
        special = {self.facts[name]: token for name, token in self.special_tokens.items() if name != "unk_id"}
        return [
            special.get(token_id) or self._inner.decode([token_id], skip_special_tokens=False)
            for token_id in map(int, ids)
        ]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "tokenizer.json", self._inner.to_str(pretty=True).encode())

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by name: {"bos_id": "<s>", ...}."""
        return {name: self._inner.id_to_token(self.facts[name]) for name in SPELLINGS}

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self._inner.to_str()

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the ids."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def __getstate__(self) -> dict:
        return {"content": self._inner.to_str(), "facts": self.facts}

    def __setstate__(self, state: dict) -> None:
        import tokenizers

        self.__init__(tokenizers.Tokenizer.from_str(state["content"]), state["facts"])


def cut_runs(text: str, longest: int) -> Iterator[str]:
    """The text in pieces, so that no run without white space, and none of white space, exceeds `longest` characters."""
    first = 0
    for run in re.finditer(rf"\S{{{longest}}}(?=\S)|\s{{{longest}}}(?=\s)", text):
        yield text[first : run.end()]
        first = run.end()
    yield text[first:]


def _filled(text: str, feed: Iterator[str], length: int) -> str:
    """`text` extended with strings of `feed` until it has `length` characters, or `feed` ends."""
    parts, size = [text], len(text)
    while size < length and (piece := next(feed, None)) is not None:
        parts.append(piece)
        size += len(piece)
    return "".join(parts)
