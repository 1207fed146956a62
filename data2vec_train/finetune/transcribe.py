"""Beam search over CTC outputs, with or without a language model, by torchaudio's interface to Flashlight.

Needs `pip install 'data2vec_train[lm]'`: flashlight-text, and kenlm for language models.
"""

import gzip
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data2vec_train.errors import ConfigError
from data2vec_train.weights.tokenizers import CTCTokenizer

UNKNOWN_WORD = "<unk>"  # the unknown word of language models


class BeamDecoder:
    """The best transcript of logits that a beam search finds.

    Without a language model and lexicon, any string of symbols is possible. Otherwise only words of `lexicon` are, or,
    if it is not given, words of the ARPA file.

    Args:
        tokenizer: the tokenizer of the model.
        beam_size: hypotheses kept at every frame; 1500 in the papers, 50 is fast.
        beam_threshold: hypotheses whose score is lower than the best by more than this are dropped.
        lm: an n-gram model of words, as .arpa, .arpa.gz, or a KenLM binary; None = no language model.
        lexicon: file with "word l e t t e r s |" on each line, in the symbols of the model; None = see above.
        lm_weight: weight of the language model's score.
        word_score: added for every word.

    Raises:
        ConfigError: the packages are not installed, or a file is missing or cannot be used.
    """

    def __init__(
        self,
        tokenizer: CTCTokenizer,
        *,
        beam_size: int,
        beam_threshold: float,
        lm: str | None,
        lexicon: str | None,
        lm_weight: float,
        word_score: float,
    ) -> None:
        for name, path in (("lm", lm), ("lexicon", lexicon)):
            if path is not None and not Path(path).expanduser().is_file():
                raise ConfigError(f"head.beam.{name}: there is no file {path}")
        try:
            import flashlight.lib.text.decoder  # noqa: F401
            from torchaudio.models.decoder import ctc_decoder

            if lm is not None:
                import kenlm  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"head.beam needs {error.name}: pip install 'data2vec_train[lm]'") from error
        symbols = [tokenizer.symbols.get(number, f"<{number}>") for number in range(max(tokenizer.symbols) + 1)]
        self.tokenizer = tokenizer
        delimiter = tokenizer.word_delimiter if tokenizer.word_delimiter in symbols else tokenizer.pad
        self.with_words = lm is not None or lexicon is not None
        settings: dict[str, Any] = {
            "tokens": symbols,
            "beam_size": beam_size,
            "beam_threshold": beam_threshold,
            "lm_weight": lm_weight,
            "word_score": word_score,
            "blank_token": tokenizer.pad,
            "sil_token": delimiter,
        }
        with tempfile.TemporaryDirectory() as folder:
            language_model = None if lm is None else str(Path(lm).expanduser())
            if lm is not None and lexicon is None:
                lexicon = str(_lexicon_of(Path(lm).expanduser(), tokenizer, delimiter, Path(folder)))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torchaudio's deprecation warnings
                    self._decoder = ctc_decoder(lexicon=lexicon, lm=language_model, **settings)
            except (RuntimeError, ValueError, OSError) as error:
                raise ConfigError(f"head.beam: {lm or lexicon} cannot be used ({error})") from error

    def __call__(self, logits: Tensor, frames: Sequence[int]) -> list[str]:
        """Transcripts of logits (B, T, V); `frames` is the number of real frames of each row."""
        import torch

        scores = logits.float().log_softmax(dim=-1).cpu().contiguous()
        found = self._decoder(scores, torch.tensor(list(frames), dtype=torch.int64))
        return [self._text(hypotheses[0]) if hypotheses else "" for hypotheses in found]

    def with_times(self, logits: Tensor) -> tuple[str, list[dict[str, Any]]]:
        """The transcript of one recording's logits (T, V), and its words with their first and last frames."""
        import torch

        scores = logits[None].float().log_softmax(dim=-1).contiguous()
        found = self._decoder(scores, torch.tensor([len(logits)], dtype=torch.int64))[0]
        if not found:
            return "", []
        symbols = [self.tokenizer.symbols.get(number, self.tokenizer.unk) for number in found[0].tokens.tolist()]
        words: list[dict[str, Any]] = []
        inside = False
        for symbol, frame in zip(symbols, found[0].timesteps.tolist(), strict=True):
            if symbol in (self.tokenizer.word_delimiter, self.tokenizer.pad):
                inside = False
                continue
            if not inside or self.tokenizer.phones:
                words.append({"word": "", "start_offset": frame})
            inside = True
            words[-1]["word"] += symbol.lower() if self.tokenizer.do_lower_case else symbol
            words[-1]["end_offset"] = frame + 1
        return self._text(found[0]), words

    def _text(self, hypothesis: Any) -> str:
        if self.with_words:
            text = " ".join(word for word in hypothesis.words if word != UNKNOWN_WORD)
            return text.lower() if self.tokenizer.do_lower_case else text
        # Repeats are already merged: a symbol that occurs twice was spoken twice.
        return self.tokenizer.decode(hypothesis.tokens.tolist(), group_tokens=False)


def _lexicon_of(arpa: Path, tokenizer: CTCTokenizer, delimiter: str, folder: Path) -> Path:
    """A lexicon with the words of an ARPA file that the model's symbols can spell."""
    if not arpa.name.endswith((".arpa", ".arpa.gz")):
        raise ConfigError(
            f"head.beam.lm={arpa}: the words of a binary language model cannot be listed; give head.beam.lexicon, or "
            "the .arpa file"
        )
    lines: list[str] = []
    inside = False
    with (gzip.open if arpa.suffix == ".gz" else open)(arpa, "rt", encoding="utf-8") as file:
        for line in file:
            if line.startswith("\\"):
                inside = line.strip() == "\\1-grams:"
            elif inside and line.strip():
                word = line.split("\t")[1].strip() if "\t" in line else line.split()[1]
                symbols = tokenizer.split(word)
                if not word.startswith("<") and all(symbol in tokenizer.vocabulary for symbol in symbols):
                    lines.append(f"{word} {' '.join(symbols)} {delimiter}\n")
    if not lines:
        raise ConfigError(
            f"head.beam.lm={arpa}: none of its words can be spelt with the model's letters; are they in the same case "
            "(head.case)?"
        )
    path = folder / "lexicon.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path
