"""Tokenizer files: reads, checks and opens the tokenizer that pretraining, export and the heads share.

`tokenizer_facts` is called while a config is composed and needs only json, so this module imports nothing slow at the
top.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data2vec_train.errors import BadSample, ConfigError
from data2vec_train.paths import SAMPLES

if TYPE_CHECKING:
    import tokenizers

EMBEDDED = SAMPLES / "gpt2_bpe"
# Common spellings of each special token; tokenizers trained here use the first.
SPELLINGS = {
    "bos_id": ("<s>", "[CLS]", "<|startoftext|>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "pad_id": ("<pad>", "[PAD]", "<|pad|>"),
    "eos_id": ("</s>", "[SEP]", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_id": ("<unk>", "[UNK]"),
    "mask_id": ("<mask>", "[MASK]", "<|mask|>"),
}
SPECIALS = [spellings[0] for spellings in SPELLINGS.values()]
# Fields of tokenizer_config.json; transformers adds the first of each pair to texts.
NAMED = {
    "bos_id": ("cls_token", "bos_token"),
    "pad_id": ("pad_token",),
    "eos_id": ("sep_token", "eos_token"),
    "unk_id": ("unk_token",),
    "mask_id": ("mask_token",),
}
MAX_FILE_BYTES = 2**28  # the largest released tokenizers have about 35 MB
MAX_VOCABULARY = 2**22  # an id above needs an embedding of gigabytes; the largest released vocabularies have 1 M
PROBE_SECONDS = 30.0


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, their ids, and the special tokens.

    Attributes:
        ids: of the tokens in the file.
        tokens: special tokens by name ("bos_id" and so on); those that the file lacks get ids after its last one.
    """

    ids: Mapping[str, int]
    tokens: Mapping[str, str]

    @cached_property
    def new(self) -> dict[str, int]:
        """Special tokens that the file lacks, with their new ids."""
        size = max(self.ids.values()) + 1
        names = ("pad_id", "mask_id", "bos_id")
        absent = [self.tokens[name] for name in names if self.tokens[name] not in self.ids]
        return {token: size + number for number, token in enumerate(absent)}

    @property
    def facts(self) -> dict[str, int]:
        """See `tokenizer_facts`."""
        ids = self.ids | self.new
        return {"vocab_size": max(ids.values()) + 1} | {name: ids[token] for name, token in self.tokens.items()}


def tokenizer_facts(path: str | None, train_vocab_size: int | None) -> dict[str, int]:
    """`vocab_size`, `bos_id`, `pad_id`, `eos_id`, `unk_id` and `mask_id` of a tokenizer.

    The special tokens are those named in tokenizer_config.json beside the tokenizer, else their common spellings. If
    the token that begins a text or the one that ends it is missing, the other is used for both. If both, or the token
    for padding or masking, are missing, they are added after the last id and counted in `vocab_size`. Without an
    unknown token, `unk_id` is the id of padding.

    Args:
        path: a tokenizer.json, or a folder with one or with vocab.json and merges.txt; None = the embedded GPT-2 BPE.
        train_vocab_size: size of a tokenizer that will be trained instead.

    Raises:
        ConfigError: there is no tokenizer at `path`, it is damaged, or both arguments are given.
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
    return read_vocabulary(tokenizer_files(path)).facts


def tokenizer_files(path: str | Path | None) -> list[Path]:
    """[tokenizer.json], or [vocab.json, merges.txt].

    Raises:
        ConfigError: there is neither.
    """
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


def read_vocabulary(files: list[Path]) -> Vocabulary:
    """Tokens, ids and special tokens of `tokenizer_files`.

    Raises:
        ConfigError: the file is damaged, or its ids cannot be the rows of an embedding.
    """
    content, where = _json(files[0]), str(files[0])
    ids = ids_of(content, where) if len(files) == 1 else content
    if not isinstance(ids, dict):
        raise ConfigError(f"{where} is not a tokenizer (a {type(ids).__name__}; expected tokens and their ids)")
    _check_ids(ids, where)
    return Vocabulary(ids, special_tokens(ids, _named(files[0].parent)))


def ids_of(content: Any, where: str) -> dict[str, int]:
    """Token -> id, of the content of a tokenizer.json.

    Raises:
        ConfigError: it is damaged; `where` names it in the message.
    """
    try:
        ids = content["model"]["vocab"]
        if isinstance(ids, list):  # Unigram: pairs of token and score
            ids = {token: number for number, (token, _) in enumerate(ids)}
        return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} is not a tokenizer ({type(error).__name__}: {error})") from error


def _json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {size} bytes; no tokenizer needs more than {MAX_FILE_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{path} is not a tokenizer (its JSON is nested too deeply)") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a tokenizer ({type(error).__name__}: {error})") from error


def _check_ids(ids: dict[Any, Any], where: str) -> None:
    if not ids:
        raise ConfigError(f"{where} is not a tokenizer: its vocabulary is empty")
    owner: dict[int, str] = {}
    for token, number in ids.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < MAX_VOCABULARY:
            raise ConfigError(
                f"{where}: {token!r:.60} has the id {number!r:.60}; expected a whole number from 0 to "
                f"{MAX_VOCABULARY - 1}, a row of the embedding"
            )
        if number in owner:
            raise ConfigError(f"{where}: {owner[number]!r:.60} and {token!r:.60} have the same id {number}")
        owner[number] = token


def _named(folder: Path) -> dict[str, str]:
    """The special tokens named in the files beside a tokenizer."""
    found: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        content = _json(folder / file) if (folder / file).is_file() else {}
        if not isinstance(content, dict):
            raise ConfigError(f"{folder / file} holds a {type(content).__name__}, expected an object")
        for name, settings in NAMED.items():
            for setting in settings:
                token = content.get(setting)
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str) and token:
                    found.setdefault(name, token)
    return found


def special_tokens(ids: Mapping[str, int], named: Mapping[str, str]) -> dict[str, str]:
    """The special tokens by name, chosen as `tokenizer_facts` describes.

    Args:
        ids: token -> id.
        named: preferred tokens by name; ignored if they are not in `ids`.
    """
    found = {
        name: next((token for token in (named.get(name), *spellings) if token in ids), None)
        for name, spellings in SPELLINGS.items()
    }
    for name in ("pad_id", "mask_id"):
        # Many tokenizers pad with the token that ends a text; here padding must differ from it.
        others = {token for other, token in found.items() if other != name}
        if found[name] in others:
            found[name] = next((token for token in SPELLINGS[name] if token in ids and token not in others), None)
        found[name] = found[name] or SPELLINGS[name][0]
    # Not the padding token: transformers leaves it out when it counts positions.
    found["bos_id"] = found["bos_id"] or found["eos_id"] or SPELLINGS["bos_id"][0]
    found["eos_id"] = found["eos_id"] or found["bos_id"]
    found["unk_id"] = found["unk_id"] or found["pad_id"]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_tokenizer(path: str | Path | None, *, trusted: bool = False) -> tuple["tokenizers.Tokenizer", Vocabulary]:
    """The tokenizer at `path` for pretraining: no padding, truncation or dropout; special tokens in texts recognised.

    Args:
        path: see `tokenizer_facts`.
        trusted: it was made by this program; skip the test in a subprocess.

    Raises:
        ConfigError: as `tokenizer_facts`; the library cannot read it, or it takes too long or too much memory.
    """
    return open_files(tokenizer_files(path), trusted=trusted)


def open_files(files: list[Path], *, trusted: bool = False) -> tuple["tokenizers.Tokenizer", Vocabulary]:
    """`open_tokenizer` for [tokenizer.json] or [vocab.json, merges.txt]."""
    vocabulary = read_vocabulary(files)
    if not trusted and files[0].parent != EMBEDDED:
        _try_out(files)
    return as_used(_read(files), vocabulary, str(files[0])), vocabulary


def _read(files: list[Path]) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        if len(files) == 1:
            return tokenizers.Tokenizer.from_file(str(files[0]))
        inner = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{files[0]} is not a tokenizer ({error})") from error
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def as_used(inner: "tokenizers.Tokenizer", vocabulary: Vocabulary, where: str) -> "tokenizers.Tokenizer":
    """A tokenizer without padding, truncation and dropout, which recognises its special tokens in texts.

    transformers does too, with the names in tokenizer_config.json.

    Raises:
        ConfigError: the library gives tokens other ids than the file.
    """
    import tokenizers
    from tokenizers import AddedToken

    inner.no_padding()
    inner.no_truncation()
    if getattr(inner.model, "dropout", None):
        inner.model.dropout = None  # BPE dropout: ids would differ from call to call
    if vocabulary.new:
        content = json.loads(inner.to_str())
        for token, number in vocabulary.new.items():
            content["added_tokens"].append(_added(token, number))
            if isinstance(content["model"]["vocab"], dict):  # otherwise the library gives it the next free id
                content["model"]["vocab"][token] = number
        inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    for name, token in vocabulary.tokens.items():
        if token not in known:
            inner.add_special_tokens([AddedToken(token, lstrip=name == "mask_id", normalized=False, special=True)])
    ids = vocabulary.ids | vocabulary.new
    for token, number in inner.get_vocab(with_added_tokens=True).items():
        if ids.get(token) != number:
            raise ConfigError(f"{where}: the library reads the id {number} for {token!r:.60}, not {ids.get(token)}")
    return inner


def _added(token: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": token in SPELLINGS["mask_id"], "rstrip": False, "normalized": False}
    return {"id": number, "content": token, "special": True} | flags


def _try_out(files: list[Path]) -> None:
    """Test an untrusted tokenizer on a few texts in a subprocess with limited time and memory."""
    script = Path(__file__).with_name("try_tokenizer.py")
    try:
        found = subprocess.run(
            [sys.executable, "-P", str(script), *map(str, files)],
            capture_output=True,
            timeout=PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{files[0]}: the tokenizer needs more than {PROBE_SECONDS:.0f} s for a few short texts (a regular "
            "expression in it that backtracks?); use another one"
        ) from error
    if found.returncode != 0:
        lines = (found.stdout + b"\n" + found.stderr).decode("utf-8", "replace").strip().splitlines()
        why = lines[-1] if lines else f"exit status {found.returncode}; not enough memory?"
        raise ConfigError(f"{files[0]} is not a tokenizer that can be used ({why:.300})")


@contextmanager
def splitting(text: str) -> Iterator[None]:
    """Turn the exceptions that the library raises while splitting a text into `BadSample`.

    It raises a plain `Exception` if it has no token for a part, and a `PanicException`, which is no `Exception`, if a
    regular expression takes too many steps.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise BadSample(f"the tokenizer cannot split {text[:60]!r} ({error})") from error
        raise
