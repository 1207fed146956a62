"""Sixteen small records for each head of fine-tuning, which it can learn by heart."""

import io
import wave
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLES = 16
RATE = 8000
WORDS = ["alpha", "beta", "gamma", "delta", "red", "green", "blue", "north", "south", "seven", "eight", "nine"]
# Head -> what its command needs beside data and weights; the score that has to be reached, and in how many steps.
HEADS: dict[str, tuple[list[str], str, float, int]] = {
    "ctc": ([], "wer", 0.0, 400),
    "utterance": (["data.label_column=kind"], "accuracy", 0.95, 200),
    "frame": ([], "accuracy", 0.95, 200),
    "speaker": (["data.label_column=kind", "head.vector_dim=32", "head.tdnn_dim=[32,32,32,32,64]"], "eer", 0.05, 200),
    "sequence": (["data.label_column=kind"], "accuracy", 0.95, 150),
    "token": ([], "f1", 0.95, 150),
    "qa": ([], "f1", 0.95, 300),
    "multiple_choice": ([], "accuracy", 0.95, 300),
    "masked_lm": ([], "accuracy", 0.95, 2000),
    "causal_lm": ([], "accuracy", 0.95, 300),
    "image": (["data.label_column=kind", "head.label_smoothing=0"], "accuracy", 0.95, 200),
    "segmentation": (["head.map_column=map", "head.classes=3", "head.crop_scale=null"], "miou", 0.95, 200),
}
MODALITY = {"ctc": "audio", "utterance": "audio", "frame": "audio", "speaker": "audio", "image": "vision"}
MODALITY |= {"segmentation": "vision"}
# A language model of two words
ARPA = r"""\data\
ngram 1=5
ngram 2=3

\1-grams:
-1.0	<unk>
-9	<s>	-0.3
-1.0	</s>
-0.5	ABBA	-0.3
-2.0	AB	-0.3

\2-grams:
-0.1	<s> ABBA
-2.0	<s> AB
-0.1	ABBA </s>

\end\
"""


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((samples * 20000).astype(np.int16).tobytes())
    return file.getvalue()


def tone(hertz: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.5 * np.sin(2 * np.pi * hertz * time) + 0.01 * rng.standard_normal(len(time))


def audio_rows(head: str) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SAMPLES):
        letters = "".join(rng.choice(list("ABC"), 2 + number % 3))
        if head in ("utterance", "speaker"):
            letters = "ABCD"[number % 4] * 3
        hertz = {"A": 300, "B": 900, "C": 2000, "D": 3000}
        sound = np.concatenate([tone(hertz[letter], 0.2, rng) for letter in letters])
        segments = [
            {"start": 0.2 * place, "end": 0.2 * (place + 1), "label": letter} for place, letter in enumerate(letters)
        ]
        row = {"audio": {"bytes": wav(sound), "path": None}, "kind": f"class {letters[0]}"}
        rows.append(row | {"text": " ".join(letters), "segments": segments})
    return rows


def text_rows(head: str) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SAMPLES):
        words = [str(word) for word in rng.choice(WORDS, 8)]
        if head.endswith("_lm"):  # what stands where has to follow from what stands elsewhere
            words = [WORDS[(number + place) % len(WORDS)] for place in range(20)]
        tags = ["B-col" if word in ("red", "green", "blue") else "O" for word in words]
        text = " ".join(words)
        answer = words[3]
        start = len(" ".join(words[:3])) + 1
        row = {
            "text": text,
            "kind": ["low", "high"][WORDS.index(words[0]) % 2],
            "tokens": words,
            "tags": tags,
            "question": f"after {words[2]} number {number}",
            "context": text,
            "answers": {"text": [answer], "answer_start": [start]},
            "choices": [f"{word} {number}" for word in rng.choice(WORDS, 3, replace=False)],
            "label": int(rng.integers(3)),
        }
        rows.append(row)
    return rows


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def vision_rows(head: str) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SAMPLES):
        classes = np.zeros((32, 32), dtype=np.uint8)
        classes[8:24, :16] = 1 + number % 2
        classes[:8, 16:] = 2 - number % 2
        colours = np.array([[20, 20, 20], [220, 40, 40], [40, 40, 220]])
        pixels = np.clip(colours[classes] + rng.integers(-15, 15, (32, 32, 3)), 0, 255).astype(np.uint8)
        if head == "image":
            pixels = np.roll(pixels, number, axis=1)
        row = {"image": {"bytes": png(pixels), "path": None}, "kind": ["odd", "even"][number % 2]}
        rows.append(row | {"map": {"bytes": png(classes), "path": None}})
    return rows


def write(rows: list[dict], path: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS = {"audio": audio_rows, "text": text_rows, "vision": vision_rows}


def modality_of(head: str) -> str:
    return MODALITY.get(head, "text")
