"""Load a tokenizer and split texts that are hard for its regular expressions; `vocabulary` runs it in a subprocess.

    python try_tokenizer.py tokenizer.json | vocab.json merges.txt

Exits with status 0, or prints the error in one line. The caller limits the time.
"""

import itertools
import os
import re
import sys

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers
from tokenizers import models

MAX_BYTES = 4 * 2**30
MAX_GROWTH = 20  # NFKC turns one character into up to 18
MAX_AROUND = 16  # special tokens added to a text
USUAL = "a0 !\n\u00e9"
RUN, PAIRS = 5000, 500


def limit_memory() -> None:
    """Limit the memory of this process, where the system supports it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def texts(patterns: str) -> list[str]:
    """Runs of one character and of pairs, made of `USUAL` characters and those in the expressions."""
    named = re.sub(r"[\\()\[\]{}|?*+^$.<>=:,]", "", patterns)
    characters = list(dict.fromkeys([*USUAL, *named]))[:18]
    runs = [character * RUN + end for character in characters for end in ("", "\x01")]
    return [*runs, *("".join(pair) * PAIRS + "\x01" for pair in itertools.permutations(characters, 2))]


def trouble(files: list[str]) -> str | None:
    """Why a tokenizer cannot be used."""
    try:
        if len(files) == 2:
            inner = tokenizers.Tokenizer(models.BPE.from_file(*files))
        else:
            inner = tokenizers.Tokenizer.from_file(files[0])
    except Exception as error:  # the library raises nothing more specific
        return str(error)
    inner.no_padding()
    inner.no_truncation()
    if inner.num_special_tokens_to_add(False) > MAX_AROUND:
        return f"it puts {inner.num_special_tokens_to_add(False)} tokens around each text"
    patterns = "".join(re.findall(r'"Regex":\s*"((?:[^"\\]|\\.)*)"', inner.to_str()))
    for text in texts(patterns):
        grown = text if inner.normalizer is None else inner.normalizer.normalize_str(text)
        if len(grown) > MAX_GROWTH * len(text) + 100:
            return f"its normalizer makes {len(grown)} characters of {len(text)}"
        try:
            ids = inner.encode(text, add_special_tokens=False).ids
        except Exception:  # no token for unknown characters: reported for each document
            continue
        inner.decode(ids[:100])
    return None


if __name__ == "__main__":
    limit_memory()
    found = trouble(sys.argv[1:])
    if found is not None:
        sys.exit(found.replace("\n", " ")[:300])
