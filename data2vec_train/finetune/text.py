"""The six text heads: classes or numbers, classes of words, answers, choices, masked tokens, next tokens.

Letters: B texts, T tokens, C classes or choices, W windows.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.data.files import read_file
from data2vec_train.data.sources.files import RawSample, Source
from data2vec_train.data.text import decode_text, is_table
from data2vec_train.errors import BadSample, DataError
from data2vec_train.finetune.base import NO_LABEL, Examples, HeadTask, Inputs, Meter, Scores, padded
from data2vec_train.finetune.metrics import (
    answer_scores,
    classification_scores,
    entity_scores,
    multilabel_scores,
    regression_scores,
)
from data2vec_train.finetune.speech import class_predictions
from data2vec_train.system.constraints import checked, require
from data2vec_train.weights.base import PretrainedModel

Problem = Literal["classification", "regression", "multi_label"]
_PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi_label": "multi_label_classification",
}


class TextTask(HeadTask):
    """Base class of the six text tasks: inputs are ids with their mask.

    Args:
        inputs: see `Inputs`.
        max_tokens: longer texts are truncated, special tokens included; None = the number of positions of the encoder.
    """

    modality = "text"

    def __init__(self, *, inputs: Inputs, max_tokens: int | None) -> None:
        super().__init__(inputs=inputs)
        self.max_tokens = min(max_tokens or inputs.max_tokens, inputs.max_tokens)

    def ids_of(self, text: str, pair: str | None = None) -> list[int]:
        """Ids of one text or a pair of texts, with special tokens, truncated to `max_tokens`."""
        return self.inputs.tokenizer.windows(text, pair, max_length=self.max_tokens)[0].ids

    def batch_of(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Ids and their mask, (B, T)."""
        ids = padded([np.array(row, dtype=np.int64) for row in rows], self.inputs.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None]}


def text_of(value: Any, encodings: Sequence[str] = ()) -> str:
    """The text of a record; a file is decoded with the first of `encodings` that fits.

    Raises:
        BadSample: it has no text.
    """
    if isinstance(value, Path):
        if is_table(value):
            raise BadSample("a table; read it with data=hf data.path=FILE")
        value = decode_text(read_file(value, max_bytes=math.inf, limit="nothing"), encodings)
    if not isinstance(value, str) or not value.strip():
        raise BadSample("empty text" if not value or isinstance(value, str) else f"{type(value).__name__}, not a text")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# A text


class SequenceClassification(TextTask):
    """A class, a number or several classes for a text or a pair of texts.

    Args:
        text_columns: one column or two.
        problem: "classification" = a class, "regression" = a number, "multi_label" = a list of classes.
        label_column: the column of the numbers or lists; classes come from `data.label_column`.
        metric: the score that chooses the best weights: "accuracy", "f1", "matthews", "pearson" or "spearman".
        inputs, max_tokens: see `TextTask`.
    """

    model_class = "Data2VecTextForSequenceClassification"

    @checked
    def __init__(
        self,
        *,
        text_columns: Sequence[str],
        problem: Problem,
        label_column: str | None,
        metric: str,
        inputs: Inputs,
        max_tokens: int | None,
    ) -> None:
        super().__init__(inputs=inputs, max_tokens=max_tokens)
        self.text_columns = list(text_columns)
        self.problem = problem
        self.label_column = label_column or "label"
        self.metric = metric

    @property
    def column(self) -> str | None:
        """The first text column."""
        return self.text_columns[0]

    @property
    def input_fields(self) -> list[str]:
        """The second text column, if there is one."""
        return self.text_columns[1:]

    @property
    def label_fields(self) -> list[str]:
        """The column of numbers or lists; none for classes."""
        return [] if self.needs_classes else [self.label_column]

    @property
    def needs_classes(self) -> bool:
        """Only with problem="classification"."""
        return self.problem == "classification"

    def setup(self, source: Source, rows: np.ndarray) -> None:
        """Collect the class names, or check that all labels are numbers."""
        if self.problem == "multi_label":
            lists = source.column(self.label_column)
            names = {str(name) for row in rows for name in lists[row] or ()}
            if not names:
                raise DataError(f"column {self.label_column} has no classes; expected lists of classes")
            self.class_names = sorted(names)
        elif self.problem == "regression":
            _check_numbers(source, rows, self.label_column)
            self.class_names = ["score"]
        else:
            super().setup(source, rows)

    def check_test(self, source: Source) -> None:
        """Refuse test records with new classes, or with labels that are not numbers."""
        if self.problem == "multi_label":
            _check_known(source.column(self.label_column), self.class_names)
        elif self.problem == "regression":
            _check_numbers(source, self.usable(source), self.label_column)
        else:
            super().check_test(source)

    def model_settings(self) -> dict[str, Any]:
        """Class names and the problem type."""
        return super().model_settings() | {"problem_type": _PROBLEM_TYPES[self.problem]}

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The ids and the label of a record; a list of classes becomes 0 or 1 for each class."""
        pair = text_of(raw.fields.get(self.text_columns[1])) if len(self.text_columns) == 2 else None
        label = raw.label if self.needs_classes else raw.fields.get(self.label_column)
        if label is not None and self.problem == "regression":
            label = float(label)
        elif label is not None and self.problem == "multi_label":
            label = [float(name in {str(tag) for tag in label}) for name in self.class_names]
        return {"key": raw.key, "ids": self.ids_of(text_of(raw.value, self.inputs.encodings), pair), "label": label}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Ids, and labels if all examples have one."""
        inputs = self.batch_of([example["ids"] for example in examples])
        labels = tuple(example["label"] for example in examples)
        if all(label is not None for label in labels):
            kind = torch.int64 if self.needs_classes else torch.float32
            inputs["labels"] = torch.tensor(labels, dtype=kind)
        return Examples(inputs, references=labels)

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[Any]:
        """Class names with their probabilities, numbers, or lists of classes."""
        logits = outputs["logits"].float()
        if self.problem == "regression":
            return logits[:, 0].tolist()
        if self.problem == "multi_label":
            rows = (logits > 0).tolist()
            return [
                {"labels": [n for n, on in zip(self.class_names, row, strict=True) if on], "on": row} for row in rows
            ]
        return class_predictions(logits, self.class_names)

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """The scores of the problem: classification, regression or multi-label."""
        if self.problem == "regression":
            return regression_scores(predictions, references)
        if self.problem == "multi_label":
            return multilabel_scores(np.array([prediction["on"] for prediction in predictions]), np.array(references))
        return classification_scores(
            [prediction["index"] for prediction in predictions], references, len(self.class_names)
        )


def _check_numbers(source: Source, rows: np.ndarray, name: str) -> None:
    values = source.column(name)
    wrong = next((row for row in rows if not _is_number(values[row])), None)
    if wrong is not None:
        raise DataError(f"{source[int(wrong)].key}: {name} is {values[wrong]!r}; expected a number")


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # all values of a .csv file are strings
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)


def _check_known(lists: Sequence[Any], names: Sequence[str]) -> None:
    new = {str(name) for row in lists for name in row or ()} - set(names)
    if new:
        raise DataError(f"test records have the class {sorted(new)[0]}, which no training record has")


# ---------------------------------------------------------------------------------------------------------------------
# Words


class TokenClassification(TextTask):
    """A class for every word: names, parts of speech.

    The class of a word is learned and predicted at its first token.

    Args:
        words_column: lists of words.
        tags_column: lists of classes, one for each word.
        inputs, max_tokens: see `TextTask`.
    """

    model_class = "Data2VecTextForTokenClassification"
    metric = "f1"

    def __init__(self, *, words_column: str, tags_column: str, inputs: Inputs, max_tokens: int | None) -> None:
        super().__init__(inputs=inputs, max_tokens=max_tokens)
        self.words_column = words_column
        self.tags_column = tags_column

    @property
    def column(self) -> str | None:
        """The column of the words."""
        return self.words_column

    @property
    def label_fields(self) -> list[str]:
        """The column of the classes."""
        return [self.tags_column]

    def setup(self, source: Source, rows: np.ndarray) -> None:
        """Collect the classes."""
        column = source.column(self.tags_column)
        names = {str(tag) for row in rows for tag in column[row] or ()}
        if len(names) < 2:
            raise DataError(
                f"column {self.tags_column} has the classes {sorted(names) or 'none'}; expected two or more"
            )
        self.class_names = sorted(names)

    def check_test(self, source: Source) -> None:
        """Refuse test records with classes that no training record has."""
        _check_known(source.column(self.tags_column), self.class_names)

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The ids, the first token of each word (-1 if truncated), and the class of that token."""
        words = raw.value
        words = text_of(words, self.inputs.encodings).split() if isinstance(words, (str, Path)) else list(words)
        if not words:
            raise BadSample("no words")
        tags = raw.fields.get(self.tags_column)
        if tags is not None and len(tags) != len(words):
            raise BadSample(f"{len(words)} words and {len(tags)} classes")
        found = self.inputs.tokenizer.windows(" ".join(words), max_length=self.max_tokens)[0]
        starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
        # Assign a token to a word by its last character: in some vocabularies a token starts with a space.
        owner = np.searchsorted(starts, [last - 1 for _, last in found.offsets], side="right") - 1
        first = np.full(len(words), -1)
        for place in range(len(found.ids) - 1, -1, -1):
            if not found.special_tokens_mask[place] and found.offsets[place][1] > found.offsets[place][0]:
                first[owner[place]] = place
        labels = np.full(len(found.ids), NO_LABEL, dtype=np.int64)
        if not (first >= 0).any():
            raise BadSample(f"no word begins within {self.max_tokens} tokens, so no token can hold a class")
        reference = None
        if tags is not None:
            number = {name: index for index, name in enumerate(self.class_names)}
            unknown = next((str(tag) for tag in tags if str(tag) not in number), None)
            if unknown is not None:
                raise BadSample(f"the class {unknown} is none of {', '.join(self.class_names[:10])}")
            for word, tag in enumerate(tags):
                if first[word] >= 0:
                    labels[first[word]] = number[str(tag)]
            reference = [str(tag) for tag in tags]
        return {"key": raw.key, "ids": found.ids, "first": first, "labels": labels, "words": words, "tags": reference}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Ids, and labels if all examples have them; `host["first"]` holds the first token of each word."""
        inputs = self.batch_of([example["ids"] for example in examples])
        tags = tuple(example["tags"] for example in examples)
        if all(row is not None for row in tags):
            inputs["labels"] = padded([example["labels"] for example in examples], NO_LABEL)
        first = padded([example["first"] for example in examples], -2)
        references = tuple(None if example["tags"] is None else example["tags"] for example in examples)
        return Examples(inputs, host={"first": first}, references=references)

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[list[str | None]]:
        """The class of each word; None for words beyond `max_tokens`."""
        best = outputs["logits"].argmax(dim=-1).cpu().numpy()
        return [
            [None if place < 0 else self.class_names[row[place]] for place in first if place > -2]
            for row, first in zip(best, batch.host["first"].numpy(), strict=True)
        ]

    def score(self, predictions: Sequence[list[str | None]], references: Sequence[list[str]]) -> Scores:
        """Scores of the words with a prediction; `f1` is the entity F1 if classes are named B-x and I-x."""
        pairs = [
            [(predicted, reference) for predicted, reference in zip(*both, strict=True) if predicted is not None]
            for both in zip(predictions, references, strict=True)
        ]
        number = {name: index for index, name in enumerate(self.class_names)}
        flat = [pair for row in pairs for pair in row]
        scores = classification_scores([number[a] for a, _ in flat], [number[b] for _, b in flat], len(number))
        if any(name.startswith("B-") for name in self.class_names):
            entity = entity_scores([[a for a, _ in row] for row in pairs], [[b for _, b in row] for row in pairs])
            scores = scores | {"f1": entity["entity_f1"]}
        return scores


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class QuestionAnswering(TextTask):
    """The part of a text that answers a question, as in SQuAD.

    Long texts are read in overlapping windows. Training uses a window that contains the answer.

    Args:
        question_column: the questions.
        context_column: the texts.
        answers_column: {text: [...], answer_start: [...]}, in characters, or a list of {text, answer_start}; empty =
            no answer.
        stride: tokens that neighbouring windows share; at most a quarter of a window.
        max_answer_tokens: longer answers are not predicted.
        unanswerable: whether "no answer" may be predicted.
        inputs, max_tokens: see `TextTask`.
    """

    model_class = "Data2VecTextForQuestionAnswering"
    metric = "f1"

    def __init__(
        self,
        *,
        question_column: str,
        context_column: str,
        answers_column: str,
        stride: int,
        max_answer_tokens: int,
        unanswerable: bool,
        inputs: Inputs,
        max_tokens: int | None,
    ) -> None:
        super().__init__(inputs=inputs, max_tokens=max_tokens)
        self.question_column = question_column
        self.context_column = context_column
        self.answers_column = answers_column
        self.stride = min(stride, self.max_tokens // 4)
        self.max_answer_tokens = max_answer_tokens
        self.unanswerable = unanswerable

    @property
    def column(self) -> str | None:
        """The column of the questions."""
        return self.question_column

    @property
    def input_fields(self) -> list[str]:
        """The column of the texts."""
        return [self.context_column]

    @property
    def label_fields(self) -> list[str]:
        """The column of the answers."""
        return [self.answers_column]

    def setup_from_pretrained(self, model: PretrainedModel) -> None:
        """Nothing to do: there are no classes."""

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The windows of a record; in training one random window, with the answer if there is one."""
        question = text_of(raw.value, self.inputs.encodings).strip()
        context = text_of(raw.fields.get(self.context_column))
        answers = raw.fields.get(self.answers_column)
        texts, starts = _texts_and_starts(answers)
        if len(texts) and context[starts[0] : starts[0] + len(texts[0])] != texts[0]:
            raise BadSample(f"the answer {texts[0][:40]!r} is not at character {starts[0]} of its text")
        try:
            found = self.inputs.tokenizer.windows(question, context, max_length=self.max_tokens, stride=self.stride)
        except ValueError as error:
            raise BadSample(str(error)) from error
        windows = [self._window(window, texts, starts) for window in found]
        if train:
            with_answer = [window for window in windows if window["start"] > 0]
            if len(texts) and not with_answer:  # training on its windows would teach "no answer"
                raise BadSample(f"no window of {self.max_tokens} tokens contains the whole answer {texts[0][:40]!r}")
            with_answer = with_answer or windows
            windows = [with_answer[int(rng.integers(len(with_answer)))]]
        reference = None if answers is None else (list(texts) or [""])
        return {"key": raw.key, "windows": windows, "context": context, "answers": reference}

    def _window(self, found: Any, texts: Sequence[str], starts: Sequence[int]) -> dict[str, Any]:
        """Ids, the character span of each token, (T, 2), -1 outside the text, and the answer's first and last token."""
        inside = np.array([sequence == 1 for sequence in found.sequence_ids])
        offsets = np.where(inside[:, None], np.array(found.offsets), -1)
        start = end = 0  # position 0 means "no answer in this window"
        if len(texts):
            first, last = starts[0], starts[0] + len(texts[0])
            tokens = np.flatnonzero(inside & (offsets[:, 1] > first) & (offsets[:, 0] < last))
            covers = len(tokens) and offsets[tokens[0], 0] <= first and offsets[tokens[-1], 1] >= last
            start, end = (int(tokens[0]), int(tokens[-1])) if covers else (0, 0)
        return {"ids": found.ids, "offsets": offsets, "start": start, "end": end}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """One row for each window; `host["owner"]` is the example that it belongs to."""
        windows = [window for example in examples for window in example["windows"]]
        inputs = self.batch_of([window["ids"] for window in windows])
        answers = tuple(example["answers"] for example in examples)
        if all(answer is not None for answer in answers):
            inputs |= {
                f"{edge}_positions": torch.tensor([window[edge] for window in windows]) for edge in ("start", "end")
            }
        owner = [number for number, example in enumerate(examples) for _ in example["windows"]]
        host = {"owner": torch.tensor(owner), "offsets": padded([window["offsets"] for window in windows], -1)}
        references = tuple((example["context"], example["answers"]) for example in examples)
        return Examples(inputs, host=host, references=references)

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[str]:
        """The answer to each question, "" for none."""
        edges = [outputs[name].float().cpu() for name in ("start_logits", "end_logits")]
        offsets = batch.host["offsets"].numpy()
        found: list[tuple[float, str]] = [(-np.inf, "")] * len(batch)
        nothing = [np.inf] * len(batch)
        for row, owner in enumerate(batch.host["owner"].tolist()):
            first, last = edges[0][row].numpy(), edges[1][row].numpy()
            nothing[owner] = min(nothing[owner], float(first[0] + last[0]))
            inside = np.flatnonzero(offsets[row, :, 0] >= 0)
            pairs = first[inside][:, None] + last[inside][None]  # (tokens, tokens)
            allowed = np.triu(np.ones_like(pairs), 0) - np.triu(np.ones_like(pairs), self.max_answer_tokens)
            pairs = np.where(allowed > 0, pairs, -np.inf)
            start, end = np.unravel_index(int(pairs.argmax()), pairs.shape)
            span = slice(offsets[row, inside[start], 0], offsets[row, inside[end], 1])
            found[owner] = max(found[owner], (float(pairs[start, end]), batch.references[owner][0][span].strip()))
        return [
            "" if self.unanswerable and none > score else text
            for (score, text), none in zip(found, nothing, strict=True)
        ]

    def score(self, predictions: Sequence[str], references: Sequence[tuple[str, list[str] | None]]) -> Scores:
        """SQuAD's exact match and F1."""
        return answer_scores(predictions, [answers or [""] for _, answers in references])


def _texts_and_starts(answers: Any) -> tuple[list[str], list[int]]:
    """The reference answers and their first characters; empty for None."""
    if isinstance(answers, Mapping):
        texts, starts = answers.get("text"), answers.get("answer_start")
    else:
        rows = [] if answers is None else answers
        both = [answer for answer in rows if isinstance(answer, Mapping)]
        texts, starts = [answer.get("text") for answer in both], [answer.get("answer_start") for answer in both]
        if len(both) < len(rows):
            texts = None
    if texts is None or starts is None or len(texts) != len(starts):
        raise BadSample(f"the answers {str(answers)[:60]}; expected {{text: [...], answer_start: [...]}}")
    return list(texts), list(starts)


class MultipleChoice(TextTask):
    """Which of several texts continues or answers another text.

    Args:
        context_columns: the text before the choice, joined by a space.
        choice_columns: one column with lists, or a column for each choice.
        label_column: number of the correct choice, from 0.
        inputs, max_tokens: see `TextTask`.
    """

    model_class = "Data2VecTextForMultipleChoice"
    metric = "accuracy"

    def __init__(
        self,
        *,
        context_columns: Sequence[str],
        choice_columns: Sequence[str],
        label_column: str,
        inputs: Inputs,
        max_tokens: int | None,
    ) -> None:
        super().__init__(inputs=inputs, max_tokens=max_tokens)
        self.context_columns = list(context_columns)
        self.choice_columns = list(choice_columns)
        self.label_column = label_column

    @property
    def column(self) -> str | None:
        """The first context column."""
        return self.context_columns[0]

    @property
    def input_fields(self) -> list[str]:
        """The other context columns and the choice columns."""
        return [*self.context_columns[1:], *self.choice_columns]

    @property
    def label_fields(self) -> list[str]:
        """The column with the number of the correct choice."""
        return [self.label_column]

    def setup_from_pretrained(self, model: PretrainedModel) -> None:
        """Nothing to do: there are no classes."""

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The ids of the context with each choice, and the number of the correct choice."""
        more = [str(raw.fields.get(name) or "") for name in self.context_columns[1:]]
        context = " ".join([text_of(raw.value, self.inputs.encodings), *more]).strip()
        found = [raw.fields.get(name) for name in self.choice_columns]
        choices = list(found[0] or ()) if len(found) == 1 and not isinstance(found[0], str) else found
        if len(choices) < 2:
            raise BadSample(f"{len(choices)} choices; expected two or more")
        label = raw.fields.get(self.label_column)
        if label is not None:
            if not str(label).isdigit() or int(label) >= len(choices):
                raise BadSample(f"choice {label} of {len(choices)}; expected 0 to {len(choices) - 1}")
            label = int(label)
        rows = [self.ids_of(context, text_of(choice)) for choice in choices]
        return {"key": raw.key, "rows": rows, "label": label}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Ids (B, C, T); examples with fewer choices are padded with choices that `loss` and `predictions` ignore."""
        most = max(len(example["rows"]) for example in examples)
        pad = [self.inputs.tokenizer.bos_token_id]  # any token: attention needs one
        rows = [row for example in examples for row in [*example["rows"], *[pad] * (most - len(example["rows"]))]]
        inputs = {name: x.unflatten(0, (len(examples), most)) for name, x in self.batch_of(rows).items()}
        real = torch.tensor([[place < len(example["rows"]) for place in range(most)] for example in examples])
        labels = tuple(example["label"] for example in examples)
        targets = {"real": real}
        if all(label is not None for label in labels):
            targets["labels"] = torch.tensor(labels)
        return Examples(inputs, targets, references=labels)

    def loss(self, model: PretrainedModel, batch: Examples) -> tuple[Tensor | None, Mapping[str, Any]]:
        """Cross entropy over the real choices; None without labels."""
        outputs = model(**batch.inputs)
        outputs["logits"] = outputs["logits"].masked_fill(~batch.targets["real"], -1e4)
        labels = batch.targets.get("labels")
        return None if labels is None else F.cross_entropy(outputs["logits"].float(), labels), outputs

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[int]:
        """The number of the most likely choice."""
        return outputs["logits"].argmax(dim=-1).tolist()

    def score(self, predictions: Sequence[int], references: Sequence[int]) -> Scores:
        """Accuracy."""
        return {"accuracy": float(np.mean(np.array(predictions) == np.array(references)))}


# ---------------------------------------------------------------------------------------------------------------------
# Language


class LanguageMeter(Meter):
    """Perplexity, and the fraction of tokens that were predicted correctly."""

    def __init__(self, *, shift: bool) -> None:
        self.shift = shift
        self.count, self.nats, self.right = 0, 0.0, 0

    def update(self, outputs: Mapping[str, Any], batch: Examples) -> None:
        """Add the labelled tokens of a batch."""
        logits, labels = outputs["logits"].float(), batch.inputs["labels"]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        real = labels != NO_LABEL
        logits, labels = logits[real], labels[real]
        self.count += len(labels)
        self.nats += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.right += int((logits.argmax(dim=-1) == labels).sum())

    def compute(self) -> Scores:
        """`perplexity` and `accuracy` over all tokens so far.

        Raises:
            DataError: there was no token to predict.
        """
        if not self.count:
            raise DataError("no test text has a token to predict; use longer texts")
        return {"perplexity": float(np.exp(min(self.nats / self.count, 700.0))), "accuracy": self.right / self.count}


class LanguageTask(TextTask):
    """Base class of the two language models: inputs are blocks of ids instead of documents.

    Args:
        inputs, max_tokens: see `TextTask`.
    """

    metric = "perplexity"
    lower_is_better = True

    def prepare(self, source: Source) -> Source:
        """The texts as blocks of ids."""
        return self.inputs.blocks(source)

    def setup_from_pretrained(self, model: PretrainedModel) -> None:
        """Nothing to do: there are no classes."""

    def _ids(self, raw: RawSample) -> np.ndarray:
        if isinstance(raw.value, np.ndarray):
            return raw.value[: self.max_tokens].astype(np.int64)
        return np.array(self.ids_of(text_of(raw.value, self.inputs.encodings)), dtype=np.int64)


class MaskedLM(LanguageTask):
    """Predict masked tokens, as BERT does.

    Args:
        hidden_fraction: fraction of the tokens to predict; 80 % of them become `<mask>`, 10 % another token, 10 % stay.
        inputs, max_tokens: see `TextTask`.
    """

    model_class = "Data2VecTextForMaskedLM"

    def __init__(self, *, hidden_fraction: float, inputs: Inputs, max_tokens: int | None) -> None:
        super().__init__(inputs=inputs, max_tokens=max_tokens)
        require(hidden_fraction=hidden_fraction)
        self.hidden_fraction = hidden_fraction

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """A block with randomly masked tokens as labels; a text to predict must contain `<mask>`."""
        tokenizer, ids = self.inputs.tokenizer, self._ids(raw)
        labels = np.full(len(ids), NO_LABEL, dtype=np.int64)
        if isinstance(raw.value, np.ndarray):
            order = rng.permutation(np.arange(1, len(ids)))  # never the start token
            hidden = order[: max(1, round(self.hidden_fraction * len(ids)))]
            if not len(hidden):
                raise BadSample(f"a text of {len(ids)} tokens: there is no token to mask")
            labels[hidden] = ids[hidden]
            ids = ids.copy()
            what = rng.random(len(hidden))
            ids[hidden[what < 0.8]] = tokenizer.mask_token_id
            other = hidden[what >= 0.9]
            ids[other] = rng.integers(0, tokenizer.vocab_size, len(other))
        elif tokenizer.mask_token_id not in ids:
            raise BadSample(f"no <mask> in the first {len(ids)} tokens of this text: there is nothing to predict")
        return {"key": raw.key, "ids": ids, "labels": labels}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Ids, and labels if there are any."""
        inputs = self.batch_of([example["ids"] for example in examples])
        labels = padded([example["labels"] for example in examples], NO_LABEL)
        if bool((labels != NO_LABEL).any()):
            inputs["labels"] = labels
        return Examples(inputs, references=(None,) * len(examples))

    def meter(self) -> Meter:
        """A meter of perplexity."""
        return LanguageMeter(shift=False)

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[list[list[str]]]:
        """For each `<mask>`, the five most likely tokens in order."""
        tokenizer = self.inputs.tokenizer
        asked = (batch.inputs["input_ids"] == tokenizer.mask_token_id).cpu()
        best = outputs["logits"].topk(5, dim=-1).indices.cpu()
        return [
            [[tokenizer.decode([token]) for token in tokens] for tokens in row[where].tolist()]
            for row, where in zip(best, asked, strict=True)
        ]


class CausalLM(LanguageTask):
    """Predict the next token.

    Args:
        continue_tokens: number of tokens that a prediction appends to a text; of a long text, only the end is read.
        inputs, max_tokens: see `TextTask`.
    """

    model_class = "Data2VecTextForCausalLM"

    def __init__(self, *, continue_tokens: int, inputs: Inputs, max_tokens: int | None) -> None:
        super().__init__(inputs=inputs, max_tokens=max_tokens)
        self.continue_tokens = continue_tokens

    def model_settings(self) -> dict[str, Any]:
        """Make the model a decoder, with causal attention."""
        return {"is_decoder": True}

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """A block unchanged; a text is truncated at its start if it leaves no room for `continue_tokens`."""
        if isinstance(raw.value, np.ndarray):
            ids = self._ids(raw)
            if len(ids) < 2:
                raise BadSample(f"a text of {len(ids)} tokens: there is no next token")
            return {"key": raw.key, "ids": ids}
        text = text_of(raw.value, self.inputs.encodings)
        room = max(self.max_tokens - self.continue_tokens, self.max_tokens // 2)
        return {"key": raw.key, "ids": np.array(self.inputs.tokenizer.end(text, room), dtype=np.int64)}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Ids, which are also the labels."""
        inputs = self.batch_of([example["ids"] for example in examples])
        inputs["labels"] = inputs["input_ids"].masked_fill(~inputs["attention_mask"], NO_LABEL)
        return Examples(inputs, references=(None,) * len(examples))

    def meter(self) -> Meter:
        """A meter of perplexity, with labels shifted by one token."""
        return LanguageMeter(shift=True)

    def predict(self, model: PretrainedModel, batch: Examples) -> list[str]:
        """The continuation of each text by greedy decoding: the most likely token at each step."""
        found = []
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
            known = ids[mask][None]
            room = self.max_tokens - known.shape[1]
            longer = model.generate(known, max_new_tokens=max(1, min(self.continue_tokens, room)))
            found.append(self.inputs.tokenizer.decode(longer[0, known.shape[1] :], skip_special_tokens=True))
        return found

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[str]:
        """The most likely next token of each text."""
        last = batch.inputs["attention_mask"].sum(dim=1) - 1
        best = outputs["logits"].argmax(dim=-1).gather(1, last[:, None])
        return [self.inputs.tokenizer.decode(row) for row in best]
