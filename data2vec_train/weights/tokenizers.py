"""Converts texts and transcripts to ids and back exactly as transformers does, and reads and writes its files.

    TextTokenizer   PreTrainedTokenizerFast       tokenizer.json, tokenizer_config.json
    CTCTokenizer    Wav2Vec2CTCTokenizer          vocab.json, tokenizer_config.json
                    Wav2Vec2PhonemeCTCTokenizer   (symbols separated by spaces)

Letters: B texts, T tokens or frames, U symbols. Source: TRANSFORMERS.md 4.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from data2vec_train.data.vocabulary import (
    NAMED,
    Vocabulary,
    as_used,
    ids_of,
    open_files,
    special_tokens,
    splitting,
    tokenizer_files,
)
from data2vec_train.errors import ConfigError
from data2vec_train.weights.configs import Data2VecTextConfig
from data2vec_train.weights.files import read_json, stacked, write_json

if TYPE_CHECKING:
    import tokenizers

EXAMPLES_NAME = "tokenizer_examples.json"  # texts of a run's data with the ids they had in training
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Symbols of the released CTC models, by id; the first is also CTC's blank.
LIBRISPEECH_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
# Usual names of the special symbols in vocabularies for CTC.
USUAL_SYMBOLS = {"pad": ("<pad>", "[PAD]"), "unk": ("<unk>", "[UNK]"), "bos": ("<s>",), "eos": ("</s>",)}
PHONE_CLASSES = ("Wav2Vec2PhonemeCTCTokenizer", "Wav2Vec2PhonemeCTCTokenizerFast")


class TextTokenizer:
    """A tokenizer that transformers reads with the same ids: `<s> A </s>`, or `<s> A </s></s> B </s>` for two texts.

    `<s>` and `</s>` stand for the tokenizer's tokens that begin and end a text. Make one with `from_pretrained`,
    `from_files` or `from_json`.

    Args:
        inner: result of `vocabulary.as_used`.
        tokens: name of each special token: "bos_id" and so on.
        model_max_length: tokens, special ones included; None = not known.
    """

    def __init__(
        self, inner: "tokenizers.Tokenizer", tokens: Mapping[str, str], *, model_max_length: int | None = None
    ) -> None:
        self._inner = inner
        self.tokens = dict(tokens)
        self.model_max_length = model_max_length
        if inner.post_processor is None:
            _put_around(inner, tokens)
        self.bos_token_id = inner.token_to_id(tokens["bos_id"])
        self.pad_token_id = inner.token_to_id(tokens["pad_id"])
        self.mask_token_id = inner.token_to_id(tokens["mask_id"])

    @classmethod
    def from_files(
        cls, vocab: str | Path, merges: str | Path, *, model_max_length: int | None = None
    ) -> "TextTokenizer":
        """From vocab.json and merges.txt; `<mask>` absorbs the space before it.

        Raises:
            ConfigError: a file is missing or broken.
        """
        inner, vocabulary = open_files([Path(vocab), Path(merges)])
        return cls(inner, vocabulary.tokens, model_max_length=model_max_length)

    @classmethod
    def from_json(
        cls, content: str, *, tokens: Mapping[str, str] | None = None, model_max_length: int | None = None
    ) -> "TextTokenizer":
        """From the content of a tokenizer.json; special tokens that it lacks are added.

        The tokens that it adds around texts are replaced by those that begin and end a text, as in pretraining.

        Args:
            content: of the file, from a source that is trusted.
            tokens: see the class; None = those with the usual names.
            model_max_length: see the class.
        """
        import tokenizers

        ids = ids_of(json.loads(content), "tokenizer.json")
        vocabulary = Vocabulary(ids, special_tokens(ids, tokens or {}))
        inner = as_used(tokenizers.Tokenizer.from_str(content), vocabulary, "tokenizer.json")
        _put_around(inner, vocabulary.tokens)
        return cls(inner, vocabulary.tokens, model_max_length=model_max_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextTokenizer":
        """From a folder with a tokenizer.json, or with vocab.json and merges.txt.

        With a tokenizer_config.json, as transformers writes it, the tokenizer's own tokens around texts are kept;
        otherwise they are those that begin and end a text.

        Raises:
            ConfigError: there is none, or it is broken.
        """
        folder = Path(folder)
        if not has_tokenizer(folder):
            raise ConfigError(f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
        inner, vocabulary = open_files(tokenizer_files(folder))
        described = (folder / "tokenizer_config.json").is_file()
        longest = read_json(folder / "tokenizer_config.json").get("model_max_length") if described else None
        if not described:
            _put_around(inner, vocabulary.tokens)
        longest = longest if isinstance(longest, int) and longest < 10**9 else None
        return cls(inner, vocabulary.tokens, model_max_length=longest)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        transformers reads them as `PreTrainedTokenizerFast`, which uses tokenizer.json unchanged. `RobertaTokenizer`
        would build a byte-level BPE from its vocabulary, whatever its kind.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.save(str(folder / "tokenizer.json"))
        added = {entry.content: entry for entry in self._inner.get_added_tokens_decoder().values()}
        content: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        }
        for name, settings in NAMED.items():
            if name == "unk_id" and self.tokens[name] == self.tokens["pad_id"]:
                continue  # it has no unknown token
            token = added[self.tokens[name]]
            described = {"__type": "AddedToken", "content": token.content}
            described |= {flag: getattr(token, flag) for flag in FLAGS}
            content |= dict.fromkeys(settings, described)
        if self.model_max_length is not None:
            content["model_max_length"] = self.model_max_length
        write_json(folder / "tokenizer_config.json", content)

    def check_fits(self, config: Data2VecTextConfig) -> None:
        """Check that all ids are rows of a model's embedding, and that both pad with the same id.

        Raises:
            ConfigError: they do not fit.
        """
        if self.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.vocab_size} tokens, the encoder {config.vocab_size}; set "
                "modality.tokenizer.path to the one it was trained with"
            )
        if self.pad_token_id != config.pad_token_id:
            raise ConfigError(
                f"the tokenizer pads with the id {self.pad_token_id}, the encoder with {config.pad_token_id}; set "
                "modality.tokenizer.path to the one it was trained with"
            )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask`: (B, T) int64 with `return_tensors`, else lists; for one text without B.

        Args:
            text: one or several.
            text_pair: as many second texts.
            padding: True or "longest", "max_length", or False; padding is on the right.
            truncation: cut texts to `max_length`, the longer of two texts first.
            max_length: tokens, special ones included; None = `model_max_length`.
            add_special_tokens: the ones around the text.
            return_tensors: "pt", "np" or None.

        Raises:
            ValueError: settings that contradict each other, or rows of different lengths that should be a tensor.
        """
        single = isinstance(text, str)
        texts = [text] if single else list(text)
        pairs = text_pair if text_pair is None else [text_pair] if single else list(text_pair)
        longest = self.model_max_length if max_length is None else max_length
        if (truncation or padding == "max_length") and longest is None:
            raise ValueError("truncation and padding='max_length' need max_length")
        if truncation:
            self._inner.enable_truncation(longest)
        else:
            self._inner.no_truncation()
        inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self._inner.encode_batch(inputs, add_special_tokens=add_special_tokens)
        rows = [encoding.ids for encoding in encoded]
        size = {True: max(map(len, rows)), "longest": max(map(len, rows)), "max_length": longest}.get(padding, 0)
        masks = [[1] * len(row) + [0] * (size - len(row)) for row in rows]
        rows = [row + [self.pad_token_id] * (size - len(row)) for row in rows]
        if return_tensors is None:
            return {"input_ids": rows[0], "attention_mask": masks[0]} if single else _ids(rows, masks)
        return {
            name: stacked([np.array(row) for row in values], return_tensors)
            for name, values in _ids(rows, masks).items()
        }

    def windows(
        self, text: str, pair: str | None = None, *, max_length: int, stride: int | None = None
    ) -> list["tokenizers.Encoding"]:
        """Encode one text, or two, with the place of each token in them; several windows if `stride` is given.

        Args:
            text: the first; a single text is encoded only as far as a window needs.
            pair: the second.
            max_length: tokens in a window, special ones included; longer texts are cut.
            stride: tokens that neighbouring windows of the second text share; None = only the first window.

        Raises:
            BadSample: the first text alone fills a window, so that there is no room for the second, or the tokenizer
                has no token for something in a text.
        """
        text = self._part(text, max_length) if pair is None else text
        strategy = "longest_first" if stride is None else "only_second"
        with splitting(text):
            self._inner.enable_truncation(max_length, stride=stride or 0, strategy=strategy)
            found = self._inner.encode(text, pair)
        return [found] if stride is None else [found, *found.overflowing]

    def beginning(self, text: str, max_tokens: int) -> list[int]:
        """Ids of the beginning of a text, after the token that begins texts and without the one that ends them."""
        ids = self._ids(self._part(text, max_tokens))
        return [self.bos_token_id, *ids[: max_tokens - 1]]

    def end(self, text: str, max_tokens: int) -> list[int]:
        """Ids of the end of a text, after the token that begins texts and without the one that ends them."""
        ids = self._ids(self._part(text, max_tokens, from_end=True))
        return [self.bos_token_id, *ids[max(len(ids) - max_tokens + 1, 0) :]]

    def _part(self, text: str, tokens: int, *, from_end: bool = False) -> str:
        """Enough of a text's beginning or end that its first or last tokens are those of the whole text."""
        size = 16 * tokens + 1000
        while size < len(text):
            part = text[-size:] if from_end else text[:size]
            if len(self._ids(part)) > tokens + 100:
                return part
            size *= 8
        return text

    def _ids(self, text: str) -> list[int]:
        self._inner.no_truncation()
        with splitting(text):
            return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Ids (T,) to a text."""
        return self._inner.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        """Several rows of ids to texts."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


def has_tokenizer(folder: Path) -> bool:
    """Whether `TextTokenizer.from_pretrained` finds files in a folder."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _put_around(inner: "tokenizers.Tokenizer", tokens: Mapping[str, str]) -> None:
    """Make a tokenizer add the tokens that begin and end a text around texts."""
    from tokenizers import processors

    begin, end = ((tokens[name], inner.token_to_id(tokens[name])) for name in ("bos_id", "eos_id"))
    pre_tokenizer = json.dumps(json.loads(inner.to_str())["pre_tokenizer"])
    # Tokens of a byte-level BPE include the space before a word; their places in a text leave it out.
    inner.post_processor = processors.RobertaProcessing(
        end,
        begin,
        trim_offsets='"ByteLevel"' in pre_tokenizer,
        add_prefix_space='"add_prefix_space": true' in pre_tokenizer,
    )


class CTCTokenizer:
    """Symbols for CTC: text to ids, and frames' ids to text, as Wav2Vec2CTCTokenizer or its version for phones does.

    A symbol may have several letters: texts are split at such symbols first, the leftmost and longest one at a time,
    and the white space around each is dropped; the rest is read letter by letter. With `phones`, symbols are separated
    by spaces. Texts are never converted to phones: `do_phonemize` of a folder is ignored.

    Args:
        vocabulary: symbol -> id; None = that of the released models.
        do_lower_case: convert texts to upper case, for an upper-case vocabulary; else lower-case letters are unknown.
        word_delimiter: symbol that stands for a space; None = none.
        pad: the padding symbol, which is CTC's blank.
        unk: symbol for unknown symbols.
        bos: start of a text; not added to texts.
        eos: end of a text; not added to texts.
        phones: symbols are separated by spaces, as in Wav2Vec2PhonemeCTCTokenizer.
        space: text that the word delimiter is decoded to.
        added: symbols with ids beyond the vocabulary; special symbols that are in neither get the next ids.
        hf_compat: with `skip_special_tokens`, transformers also drops the blanks before it merges repeated symbols, so
            that LETTER is read as LETER; do the same.

    Raises:
        ConfigError: ids that are not numbers, or no blank.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int] | None = None,
        *,
        do_lower_case: bool = False,
        word_delimiter: str | None = "|",
        pad: str = "<pad>",
        unk: str = "<unk>",
        bos: str | None = "<s>",
        eos: str | None = "</s>",
        phones: bool = False,
        space: str = " ",
        added: Mapping[str, int] | None = None,
        hf_compat: bool = False,
    ) -> None:
        self.hf_compat = hf_compat
        self.vocabulary = dict(vocabulary or {symbol: i for i, symbol in enumerate(LIBRISPEECH_SYMBOLS)})
        numbers = self.vocabulary | dict(added or {})
        odd = next((symbol for symbol, number in numbers.items() if type(number) is not int or number < 0), None)
        if odd is not None:
            raise ConfigError(f"the vocabulary gives {odd!r} the id {numbers[odd]!r}; expected a number from 0")
        for name, symbol in {"pad": pad, "unk": unk, "replace_word_delimiter_char": space}.items():
            if not isinstance(symbol, str):
                raise ConfigError(f"the symbol {name} is {symbol!r}; expected a text")
        if pad not in self.vocabulary:
            raise ConfigError(
                f"the vocabulary lacks {pad}, which is CTC's blank; name the symbol of the blank as pad_token in "
                "tokenizer_config.json"
            )
        self.do_lower_case = do_lower_case
        self.word_delimiter = word_delimiter
        self.pad, self.unk, self.bos, self.eos = pad, unk, bos, eos
        self.phones = phones
        self.space = space
        self.added = {symbol: number for symbol, number in (added or {}).items() if symbol not in self.vocabulary}
        for symbol in self.special_symbols:
            if symbol not in self.vocabulary and symbol not in self.added:
                self.added[symbol] = len(self.vocabulary) + len(self.added)
        self.symbols = {number: symbol for symbol, number in (self.added | self.vocabulary).items()}
        self.pad_token_id = self.vocabulary[pad]
        self._cuts = self._pattern()

    @property
    def special_symbols(self) -> list[str]:
        """The symbols that stand for no letter: start, end, unknown, blank, word delimiter."""
        found = [self.bos, self.eos, self.unk, self.pad, None if self.phones else self.word_delimiter]
        return [symbol for symbol in dict.fromkeys(found) if symbol]

    def _pattern(self) -> re.Pattern:
        """Pattern of the symbols that texts are split at before they are read letter by letter."""
        whole = {*self.special_symbols, *filter(None, self.added)}
        if not self.phones:
            whole |= {symbol for symbol in self.vocabulary if len(symbol) > 1}
        return re.compile("|".join(map(re.escape, sorted(whole, key=len, reverse=True))))

    def __call__(self, text: str | Sequence[str]) -> dict[str, Any]:
        """`input_ids` of one text (U,), or of several, as lists."""
        if not isinstance(text, str):
            return {"input_ids": [self._encode(transcript) for transcript in text]}
        return {"input_ids": self._encode(text)}

    def _encode(self, text: str) -> list[int]:
        unknown = self.id_of(self.unk)
        return [unknown if number is None else number for number in map(self.id_of, self.split(text))]

    def id_of(self, symbol: str) -> int | None:
        """The id of a symbol; None if there is none."""
        return self.added.get(symbol, self.vocabulary.get(symbol))

    def split(self, text: str) -> list[str]:
        """The symbols of a text, also those that the vocabulary does not have."""
        pieces: list[str] = []
        end = 0
        for cut in self._cuts.finditer(text):
            pieces += [text[end : cut.start()], cut.group()]
            end = cut.end()
        pieces.append(text[end:])  # texts at even indices, symbols at odd ones
        symbols: list[str] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                symbols.append(piece)
                continue
            if index + 1 < len(pieces) and self._strips(pieces[index + 1]):
                piece = piece.rstrip()
            if index and self._strips(pieces[index - 1]):
                piece = piece.lstrip()
            symbols += self._letters(piece)
        return symbols

    def _strips(self, symbol: str) -> bool:
        """Whether the white space around a symbol is dropped."""
        return not self.phones and len(symbol) > 1 and symbol in self.vocabulary

    def _letters(self, text: str) -> list[str]:
        if self.phones:
            return [phone for phone in text.strip().split(" ") if phone.strip()]
        text = text.upper() if self.do_lower_case else text
        return list(text if self.word_delimiter is None else text.replace(" ", self.word_delimiter))

    def decode(
        self,
        ids: Sequence[int] | Tensor,
        skip_special_tokens: bool = False,
        group_tokens: bool = True,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> Any:
        """Ids of frames (T,) -> text, or a mapping of `text`, `char_offsets` and `word_offsets` in frames.

        Args:
            ids: the likeliest symbol of each frame.
            skip_special_tokens: leave out start, end and unknown, too, before repeated symbols are merged.
            group_tokens: merge repeated symbols.
            output_char_offsets: also return where each symbol starts and ends.
            output_word_offsets: also return where each word starts and ends; with `phones`, each phone.
        """
        numbers = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else [int(number) for number in ids]
        if skip_special_tokens:
            special = [symbol for symbol in self.special_symbols if symbol != self.word_delimiter]
            left_out = {self.id_of(symbol) for symbol in special if symbol != self.pad or self.hf_compat}
            numbers = [number for number in numbers if number not in left_out]
        start = 0
        found: list[dict[str, Any]] = []
        for symbol, run in groupby(self.symbols.get(number, self.unk) for number in numbers):
            length = len(list(run))
            pieces = [(start, start + length)] if group_tokens else [(start + i, start + i + 1) for i in range(length)]
            start += length
            if symbol == self.pad or (self.phones and symbol == self.word_delimiter):
                continue
            char = self.space if symbol == self.word_delimiter else symbol
            found += [{"char": char, "start_offset": first, "end_offset": last} for first, last in pieces]
        text = (" " if self.phones else "").join(entry["char"] for entry in found).strip()
        if self.do_lower_case:
            text = text.lower()
        if not (output_char_offsets or output_word_offsets):
            return text
        output: dict[str, Any] = {"text": text}
        if output_char_offsets:
            output["char_offsets"] = found
        if output_word_offsets:
            output["word_offsets"] = [_word([entry]) for entry in found] if self.phones else _words(found, self.space)
        return output

    def batch_decode(self, rows: Any, **options: Any) -> list[Any]:
        """Several rows; see `decode`."""
        return [self.decode(row, **options) for row in rows]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CTCTokenizer":
        """From vocab.json and, if present, tokenizer_config.json, special_tokens_map.json, added_tokens.json.

        If no file names them, the blank and the unknown symbol are `<pad>` and `<unk>`, or `[PAD]` and `[UNK]`.

        Raises:
            ConfigError: there is no vocabulary, or it has no blank.
        """
        folder = Path(folder)
        settings = _mapping(folder / "special_tokens_map.json") | _mapping(folder / "tokenizer_config.json")
        vocabulary = _mapping(folder / "vocab.json")
        if not vocabulary:
            raise ConfigError(f"{folder / 'vocab.json'}: expected symbols with their ids")
        if isinstance(next(iter(vocabulary.values())), dict):  # one vocabulary for each language
            language = settings.get("target_lang")
            if language not in vocabulary:
                raise ConfigError(
                    f"{folder / 'vocab.json'} has vocabularies for {', '.join(sorted(vocabulary)[:20])}; choose one "
                    "with target_lang in tokenizer_config.json"
                )
            vocabulary = vocabulary[language]
        named = {
            name: _content(settings[f"{name}_token"]) if f"{name}_token" in settings else _usual(vocabulary, usual)
            for name, usual in USUAL_SYMBOLS.items()
        }
        phones = settings.get("tokenizer_class") in PHONE_CLASSES
        try:
            listed = settings.get("added_tokens_decoder", {}).items()
            added = {_content(token): int(number) for number, token in listed} | _mapping(folder / "added_tokens.json")
            return cls(
                vocabulary,
                do_lower_case=bool(settings.get("do_lower_case", False)),
                word_delimiter=_content(settings.get("word_delimiter_token", None if phones else "|")),
                phones=phones,
                space=settings.get("replace_word_delimiter_char", " "),
                added=added,
                **named,
            )
        except (ConfigError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"the tokenizer in {folder}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json, tokenizer_config.json and, for symbols beyond the vocabulary, added_tokens.json."""
        folder = Path(folder)
        write_json(folder / "vocab.json", self.vocabulary)
        content = {
            "tokenizer_class": PHONE_CLASSES[0] if self.phones else "Wav2Vec2CTCTokenizer",
            "processor_class": "Wav2Vec2Processor",  # AutoProcessor would give the tokenizer alone
            "do_lower_case": self.do_lower_case,
            "word_delimiter_token": self.word_delimiter,
            "replace_word_delimiter_char": self.space,
            **{"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unk, "pad_token": self.pad},
        }
        if self.phones:
            content |= {"do_phonemize": False, "phone_delimiter_token": " "}
        write_json(folder / "tokenizer_config.json", content)
        if self.added:
            write_json(folder / "added_tokens.json", self.added)


def _mapping(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; nothing if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A symbol, which files hold as a text or as an object with its text."""
    return token.get("content") if isinstance(token, dict) else token


def _usual(vocabulary: Mapping[str, int], names: Sequence[str]) -> str:
    """The first of these names that the vocabulary has; else the first name."""
    return next((name for name in names if name in vocabulary), names[0])


def _words(chars: list[dict[str, Any]], space: str) -> list[dict[str, Any]]:
    runs = [(is_space, list(run)) for is_space, run in groupby(chars, key=lambda char: char["char"] == space)]
    return [_word(run) for is_space, run in runs if not is_space]


def _word(chars: list[dict[str, Any]]) -> dict[str, Any]:
    """A word from its symbols with their frames."""
    ends = {"start_offset": chars[0]["start_offset"], "end_offset": chars[-1]["end_offset"]}
    return {"word": "".join(char["char"] for char in chars), **ends}


def _ids(rows: list[list[int]], masks: list[list[int]]) -> dict[str, Any]:
    return {"input_ids": rows, "attention_mask": masks}
