"""Small tokenizers of the kinds that people bring, trained in a moment."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = (
    "Hello World, hello moon. The QUICK brown fox can't jump over 12345 lazy dogs!",
    "Größe und naïve Façade, cafe\u0301; İstanbul.",
    "  two  spaces,\ttabs\nand lines  ",
    "北京 is far from here, Привет мир",
    "an <mask> or [MASK] token, </s> and [SEP] written out <pad> [PAD] <unk>",
    "nothing",
)
CORPUS = [text for text in TEXTS[:4] for _ in range(20)] + ["the moon over the quick brown dog jumps far"] * 20
BERT = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]  # with other ids than RoBERTa's


def _word_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=BERT, show_progress=False))
    return made


def _word_piece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=BERT, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_truncation(4)  # cuts documents, where it is not switched off
    made.enable_padding(length=9, pad_id=3, pad_token="[PAD]")
    return made


def _unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>", "<s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def _lower_case_bpe() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def _gpt2() -> tokenizers.Tokenizer:
    """Without tokens for padding and masking, and with a post-processor that puts nothing around texts."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor, made.decoder = processors.ByteLevel(trim_offsets=True), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def _sentencepiece_bpe() -> tokenizers.Tokenizer:
    """As converted ones of Llama: no pre-tokenizer, the whole text is one piece; a token that begins a text only."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def _no_special_tokens() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(dropout=0.3))  # pieces by chance
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "word level": _word_level,
    "WordPiece": _word_piece,
    "unigram": _unigram,
    "lower-case BPE": _lower_case_bpe,
    "GPT-2": _gpt2,
    "sentencepiece BPE": _sentencepiece_bpe,
    "no special tokens": _no_special_tokens,
}


@cache
def content_of(kind: str) -> str:
    """tokenizer.json of that kind."""
    return KINDS[kind]().to_str()


def write_kind(kind: str, folder: Path) -> Path:
    """The same as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content_of(kind), encoding="utf-8")
    return folder / "tokenizer.json"
