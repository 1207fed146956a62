"""Report pictures of a text run: hidden tokens, token features as colours, neighbours."""

import numpy as np

from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.dataset import EvaluationDataset, Sample
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.features.raw import token_counts
from data2vec_train.report.page import Section
from data2vec_train.report.pictures.shared import features_of, good_samples, masks_of, neighbours, shown_set
from data2vec_train.report.sequences import text_neighbours_section, token_features_section, tokens_section

NUM_DOCUMENTS = 4
NUM_NEIGHBOURS = 3
FIRST_WORDS = 24


def pictures(*, student: ModalityEncoder, untrained: ModalityEncoder, data: DataModule, drawn_as: str) -> list[Section]:
    """Sections for the report; arguments as in `pictures.vision.pictures`."""
    shown = shown_set(data)
    if shown is None:
        return []
    tokenizer = data.source.tokenizer
    samples = good_samples(shown, NUM_DOCUMENTS)
    documents = [(tokenizer.pieces(sample.inputs.numpy()), _name(data, shown, sample)) for sample in samples]
    sections = [
        tokens_section(documents, masks_of(data, samples), drawn_as=drawn_as),
        token_features_section(documents, features_of(untrained, samples), features_of(student, samples)),
    ]
    if len(data.indices) < 2:
        return sections

    def raw(inputs, mask):  # noqa: ANN001, ANN202 - see RawFeatures
        return token_counts(inputs, mask, vocab_size=tokenizer.vocab_size)

    encoders = {"trained": student, "untrained": untrained}
    found, ids, labels = neighbours(
        data, encoders, ("bag of tokens", raw), samples, pooling="mean", count=NUM_NEIGHBOURS
    )
    labelled = labels is not None and data.class_names is not None and data.test_set is not None
    gallery = {}
    for row in {int(row) for rows in found.values() for row in rows.flat}:
        text = _first_words(tokenizer.decode(data.source[int(ids[row])].value))
        gallery[row] = f"{data.class_names[int(labels[row])]}: {text}" if labelled else text
    sections.append(
        text_neighbours_section(
            [_first_words(tokenizer.decode(sample.inputs.numpy())) for sample in samples],
            {name: [[gallery[int(i)] for i in row] for row in rows] for name, rows in found.items()},
            query_labels=np.array([sample.label for sample in samples]) if labelled else None,
            found_labels={name: labels[rows] for name, rows in found.items()} if labelled else None,
        )
    )
    return sections


def _name(data: DataModule, shown: EvaluationDataset, sample: Sample) -> str:
    key = shown.source[sample.id].key
    return key if sample.label is None or data.class_names is None else f"{key} ({data.class_names[sample.label]})"


def _first_words(text: str) -> str:
    words = text.split()
    return " ".join(words[:FIRST_WORDS]) + (" ..." if len(words) > FIRST_WORDS else "")
