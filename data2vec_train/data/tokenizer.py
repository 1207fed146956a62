"""Byte-level BPE: load a trained one, or train one. `tokenizers` does the work; here it gets five special tokens.

`tokenizer_facts` answers with json alone while a config is composed; it must not import anything heavy.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data2vec_train.errors import ConfigError
from data2vec_train.outputs import replace_file

if TYPE_CHECKING:
    import tokenizers

EMBEDDED = Path(__file__).parent.parent / "samples" / "gpt2_bpe"
# What each special token is called in the wild; the first is ours.
SPELLINGS = {
    "bos_id": ("<s>", "[CLS]", "<|startoftext|>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "pad_id": ("<pad>", "[PAD]", "<|pad|>"),
    "eos_id": ("</s>", "[SEP]", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_id": ("<unk>", "[UNK]"),
    "mask_id": ("<mask>", "[MASK]", "<|mask|>"),
}
SPECIALS = [spellings[0] for spellings in SPELLINGS.values()]


def tokenizer_facts(path: str | None, train_vocab_size: int | None) -> dict[str, int]:
    """`vocab_size`, `bos_id`, `pad_id`, `eos_id`, `unk_id` and `mask_id` of a tokenizer.

    A tokenizer without a token for padding or masking gets one behind its last id, and `vocab_size` counts it. Without
    a token that begins or ends a text it is the other of the two, and without either, like an unknown token, padding.

    Args:
        path: a tokenizer.json, or a folder with one or with vocab.json and merges.txt; None = the embedded GPT-2 BPE.
        train_vocab_size: a tokenizer of this size is going to be trained instead.

    Raises:
        ConfigError: there is no tokenizer at `path`, or both arguments are given.
    """
    if train_vocab_size is not None:
        if path is not None:
            raise ConfigError("tokenizer.path and tokenizer.train_vocab_size exclude each other; set one to null")
        if train_vocab_size < 256 + len(SPECIALS):
            raise ConfigError(
                f"tokenizer.train_vocab_size={train_vocab_size}; expected at least {256 + len(SPECIALS)}, "
                f"256 bytes and {len(SPECIALS)} special tokens"
            )
        return {"vocab_size": train_vocab_size, "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3} | {
            "mask_id": train_vocab_size - 1
        }
    return _facts_of(_vocabulary(_files(path)))


def _files(path: str | None) -> list[Path]:
    """[tokenizer.json], or [vocab.json, merges.txt]."""
    place = EMBEDDED if path is None else Path(path).expanduser()
    if place.is_file():
        return [place]
    if (place / "tokenizer.json").is_file():
        return [place / "tokenizer.json"]
    if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
        return [place / "vocab.json", place / "merges.txt"]
    raise ConfigError(
        f"{place} holds no tokenizer: expected a tokenizer.json, or a folder with one or with vocab.json and merges.txt"
    )


def _vocabulary(files: list[Path]) -> dict[str, int]:
    """Token -> id."""
    try:
        content = json.loads(files[0].read_text(encoding="utf-8"))
        if len(files) == 2:
            return {str(token): int(number) for token, number in content.items()}
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return vocabulary | {one["content"]: one["id"] for one in content.get("added_tokens") or ()}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{files[0]} is not a tokenizer ({type(error).__name__}: {error})") from error


def _facts_of(vocabulary: dict[str, int]) -> dict[str, int]:
    size = max(vocabulary.values()) + 1
    facts = {
        name: next((vocabulary[one] for one in spellings if one in vocabulary), None)
        for name, spellings in SPELLINGS.items()
    }
    for name in ("pad_id", "mask_id"):
        if facts[name] is None:
            facts[name], size = size, size + 1
    facts["bos_id"] = next(one for one in (facts["bos_id"], facts["eos_id"], facts["pad_id"]) if one is not None)
    facts["eos_id"] = facts["bos_id"] if facts["eos_id"] is None else facts["eos_id"]
    facts["unk_id"] = facts["pad_id"] if facts["unk_id"] is None else facts["unk_id"]
    return {"vocab_size": size} | facts


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
    def load(cls, path: str | None) -> "Tokenizer":
        """The tokenizer at `path`, see `tokenizer_facts`.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        files = _files(path)
        facts = _facts_of(_vocabulary(files))
        try:
            if len(files) == 2:
                inner = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
                inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                inner.decoder = decoders.ByteLevel()
            else:
                inner = tokenizers.Tokenizer.from_file(str(files[0]))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{files[0]} is not a tokenizer ({error})") from error
        inner.no_padding()
        inner.no_truncation()
        return cls(inner, facts)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """A byte-level BPE for these texts; no text is unknown to it.

        Where the texts give fewer merges than `vocab_size` asks for, the ids between stay unused.
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
        inner.train_from_iterator(texts, trainer)
        # Its id has to be known before training, so that an encoder can be built: the last one, whatever was found.
        content = json.loads(inner.to_str())
        mask = {"id": vocab_size - 1, "content": SPECIALS[-1], "special": True, "normalized": False}
        content["added_tokens"].append(mask | {"single_word": False, "lstrip": False, "rstrip": False})
        content["model"]["vocab"][SPECIALS[-1]] = vocab_size - 1
        return cls(tokenizers.Tokenizer.from_str(json.dumps(content)), facts)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (n,) int32, without special tokens around them."""
        return [
            np.array(one.ids, dtype=np.int32) for one in self._inner.encode_batch(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, special tokens left out."""
        return self._inner.decode([int(one) for one in ids], skip_special_tokens=True)

    def pieces(self, ids: np.ndarray) -> list[str]:
        """The text of each id by itself; bytes that are no character alone show as a replacement character."""
        special = {self.facts[name]: spellings[0] for name, spellings in SPELLINGS.items() if name != "unk_id"}
        return [special.get(int(one)) or self._inner.decode([int(one)], skip_special_tokens=False) for one in ids]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`, in one go."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "tokenizer.json", self._inner.to_str(pretty=True).encode())

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self._inner.to_str()

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes ids."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def __getstate__(self) -> dict:
        return {"content": self._inner.to_str(), "facts": self.facts}

    def __setstate__(self, state: dict) -> None:
        import tokenizers

        self.__init__(tokenizers.Tokenizer.from_str(state["content"]), state["facts"])


def batched(texts: Iterable[tuple], *, characters: int) -> Iterator[list[tuple]]:
    """Tuples whose last entry is a text, in lists of about so many characters."""
    batch, size = [], 0
    for one in texts:
        batch.append(one)
        size += len(one[-1])
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
