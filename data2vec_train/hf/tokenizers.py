"""From texts and transcripts to ids and back, exactly as transformers does it, and its files.

    TextTokenizer   RobertaTokenizer         tokenizer.json, tokenizer_config.json
    CTCTokenizer    Wav2Vec2CTCTokenizer     vocab.json, tokenizer_config.json

Letters: B texts, T tokens or frames, U symbols. Source: contract section 4.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from data2vec_train.errors import ConfigError
from data2vec_train.hf.files import read_json, stacked, write_json

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Symbols of the released CTC models, by id; the first is also CTC's blank.
LIBRISPEECH_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")


class TextTokenizer:
    """Byte-level BPE with RoBERTa's special tokens: `<s> text </s>`, or `<s> A </s></s> B </s>` for two.

    Make one with `from_pretrained` or `from_files`.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", *, model_max_length: int | None = None) -> None:
        self._inner = inner
        self.model_max_length = model_max_length
        absent = [one for one in ("<s>", "<pad>", "</s>", "<mask>") if inner.token_to_id(one) is None]
        if absent:
            raise ConfigError(f"the tokenizer has no {', '.join(absent)}; expected RoBERTa's special tokens")
        self.pad_token_id = inner.token_to_id("<pad>")
        self.mask_token_id = inner.token_to_id("<mask>")

    @classmethod
    def from_files(
        cls, vocab: str | Path, merges: str | Path, *, model_max_length: int | None = None
    ) -> "TextTokenizer":
        """From vocab.json and merges.txt; `<mask>` takes the space before it.

        Raises:
            ConfigError: a file is missing or broken.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        try:
            inner = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{vocab} and {merges} are no byte-level BPE ({error})") from error
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        return cls(with_special_tokens(inner), model_max_length=model_max_length)

    @classmethod
    def from_json(cls, content: str, *, model_max_length: int | None = None) -> "TextTokenizer":
        """From the content of a tokenizer.json of a byte-level BPE that may lack special tokens; they are added."""
        import tokenizers

        return cls(with_special_tokens(tokenizers.Tokenizer.from_str(content)), model_max_length=model_max_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextTokenizer":
        """From a folder with a tokenizer.json, or with vocab.json and merges.txt.

        Raises:
            ConfigError: there is none, or it is broken.
        """
        import tokenizers

        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        longest = settings.get("model_max_length")
        longest = longest if isinstance(longest, int) and longest < 10**9 else None
        if not (folder / "tokenizer.json").is_file():
            if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
                raise ConfigError(f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
            return cls.from_files(folder / "vocab.json", folder / "merges.txt", model_max_length=longest)
        try:
            inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{folder / 'tokenizer.json'} is no tokenizer ({error})") from error
        return cls(inner, model_max_length=longest)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.save(str(folder / "tokenizer.json"))
        mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False}
        content = {
            "tokenizer_class": "RobertaTokenizer",
            "add_prefix_space": False,
            "trim_offsets": True,
            **{f"{name}_token": token for name, token in (("bos", "<s>"), ("cls", "<s>"), ("eos", "</s>"))},
            **{f"{name}_token": token for name, token in (("sep", "</s>"), ("unk", "<unk>"), ("pad", "<pad>"))},
            "mask_token": mask | {"rstrip": False, "single_word": False, "special": True},
        }
        if self.model_max_length is not None:
            content["model_max_length"] = self.model_max_length
        write_json(folder / "tokenizer_config.json", content)

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
        """`input_ids` and `attention_mask`: (B, T) int64 with `return_tensors`, else lists; of one text without B.

        Args:
            text: one or several.
            text_pair: as many second texts.
            padding: True or "longest", "max_length", or False; padding is on the right.
            truncation: cut what is longer than `max_length`, the longer of two texts first.
            max_length: tokens, special ones included; None = `model_max_length`.
            add_special_tokens: the ones around the text.
            return_tensors: "pt", "np" or None.

        Raises:
            ValueError: settings that contradict each other, or rows that differ in length and should be a tensor.
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
        rows = [one.ids for one in encoded]
        size = {True: max(map(len, rows)), "longest": max(map(len, rows)), "max_length": longest}.get(padding, 0)
        masks = [[1] * len(row) + [0] * (size - len(row)) for row in rows]
        rows = [row + [self.pad_token_id] * (size - len(row)) for row in rows]
        if return_tensors is None:
            return {"input_ids": rows[0], "attention_mask": masks[0]} if single else _ids(rows, masks)
        return {
            name: stacked([np.array(one) for one in values], return_tensors)
            for name, values in _ids(rows, masks).items()
        }

    def windows(
        self, text: str, pair: str | None = None, *, max_length: int, stride: int | None = None
    ) -> list["tokenizers.Encoding"]:
        """One text, or two, with the place of each token in them; several windows where `stride` says so.

        Args:
            text: the first.
            pair: the second.
            max_length: of a window, tokens, special ones included; what is longer is cut.
            stride: tokens that neighbouring windows of the second text share; None = only the first window.

        Raises:
            ValueError: the first text alone fills a window, so that there is no room for the second.
        """
        strategy = "longest_first" if stride is None else "only_second"
        try:
            self._inner.enable_truncation(max_length, stride=stride or 0, strategy=strategy)
            found = self._inner.encode(text, pair)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{text[:60]!r} leaves no room in {max_length} tokens ({error})") from error
        return [found] if stride is None else [found, *found.overflowing]

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Ids (T,) to a text."""
        return self._inner.decode([int(one) for one in ids], skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        """Several rows of ids to texts."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


def with_special_tokens(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """A byte-level BPE that recognises RoBERTa's special tokens in texts and puts them around texts."""
    from tokenizers import AddedToken, processors

    inner.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in SPECIAL_TOKENS[:-1]])
    inner.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    ends = [(token, inner.token_to_id(token)) for token in ("</s>", "<s>")]
    inner.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    return inner


class CTCTokenizer:
    """Letters for CTC: text to ids, and frames' ids to text.

    Args:
        vocabulary: symbol -> id.
        do_lower_case: the vocabulary is in upper case: turn texts into it. Otherwise lower-case letters are unknown.
        word_delimiter: what stands for a space.
        hf_compat: with `skip_special_tokens`, transformers also drops the blanks before it merges repeated symbols, so
            that LETTER is read as LETER; do the same.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int] | None = None,
        *,
        do_lower_case: bool = False,
        word_delimiter: str = "|",
        hf_compat: bool = False,
    ) -> None:
        self.hf_compat = hf_compat
        self.vocabulary = dict(vocabulary or {symbol: i for i, symbol in enumerate(LIBRISPEECH_SYMBOLS)})
        absent = [one for one in ("<pad>", "<unk>", word_delimiter) if one not in self.vocabulary]
        if absent:
            raise ConfigError(f"the vocabulary lacks {', '.join(absent)}")
        self.symbols = {number: symbol for symbol, number in self.vocabulary.items()}
        self.do_lower_case = do_lower_case
        self.word_delimiter = word_delimiter
        self.pad_token_id = self.vocabulary["<pad>"]

    def __call__(self, text: str | Sequence[str]) -> dict[str, Any]:
        """`input_ids` of one text (U,), or of several, as lists."""
        if not isinstance(text, str):
            return {"input_ids": [self._encode(one) for one in text]}
        return {"input_ids": self._encode(text)}

    def _encode(self, text: str) -> list[int]:
        text = text.upper() if self.do_lower_case else text
        unknown = self.vocabulary["<unk>"]
        return [self.vocabulary.get(one, unknown) for one in text.replace(" ", self.word_delimiter)]

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
            skip_special_tokens: leave out `<s>`, `</s>` and `<unk>`, too, before repetitions are counted.
            group_tokens: count a repeated symbol once.
            output_char_offsets: also say where each symbol starts and ends.
            output_word_offsets: also say where each word starts and ends.
        """
        numbers = [int(one) for one in ids]
        if skip_special_tokens:
            left_out = {self.vocabulary.get(one) for one in SPECIAL_TOKENS if one != "<pad>" or self.hf_compat}
            numbers = [one for one in numbers if one not in left_out]
        start = 0
        found: list[dict[str, Any]] = []
        for number, run in groupby(numbers):
            length = sum(1 for _ in run)
            pieces = [(start, start + length)] if group_tokens else [(start + i, start + i + 1) for i in range(length)]
            start += length
            symbol = self.symbols.get(number, "<unk>")
            if symbol == "<pad>":
                continue
            char = " " if symbol == self.word_delimiter else symbol
            found += [{"char": char, "start_offset": first, "end_offset": last} for first, last in pieces]
        text = "".join(one["char"] for one in found).strip()
        if self.do_lower_case:
            text = text.lower()
        if not (output_char_offsets or output_word_offsets):
            return text
        output: dict[str, Any] = {"text": text}
        if output_char_offsets:
            output["char_offsets"] = found
        if output_word_offsets:
            output["word_offsets"] = _words(found)
        return output

    def batch_decode(self, rows: Any, **options: Any) -> list[Any]:
        """Several rows; see `decode`."""
        return [self.decode(row, **options) for row in rows]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CTCTokenizer":
        """From vocab.json and, if there is one, tokenizer_config.json.

        Raises:
            ConfigError: there is no vocabulary.
        """
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        return cls(
            read_json(folder / "vocab.json"),
            do_lower_case=settings.get("do_lower_case", False),
            word_delimiter=settings.get("word_delimiter_token", "|"),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json and tokenizer_config.json."""
        folder = Path(folder)
        write_json(folder / "vocab.json", self.vocabulary)
        content = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "processor_class": "Wav2Vec2Processor",  # AutoProcessor would give the tokenizer alone
            "do_lower_case": self.do_lower_case,
            "word_delimiter_token": self.word_delimiter,
            **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        }
        write_json(folder / "tokenizer_config.json", content)


def _words(chars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    words = []
    for is_space, run in groupby(chars, key=lambda one: one["char"] == " "):
        run = list(run)
        if not is_space:
            word = "".join(one["char"] for one in run)
            words.append({"word": word, "start_offset": run[0]["start_offset"], "end_offset": run[-1]["end_offset"]})
    return words


def _ids(rows: list[list[int]], masks: list[list[int]]) -> dict[str, Any]:
    return {"input_ids": rows, "attention_mask": masks}
