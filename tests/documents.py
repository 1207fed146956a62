"""The documents of the repository, and the commands that they tell people to type."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("data2vec_train", "configs", "recipes", "tests")
DOCUMENTS = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OURS = re.compile(
    r"(?:^|\s)(?:(?:python|torchrun\s[^`]*?) -m data2vec_train(?:\.(?P<module>\w+))?"
    r"|data2vec-train(?: (?P<verb>[a-z]+))?)(?![\w.=\[])(?P<arguments>.*)"
)
SLURM = re.compile(r"^sbatch recipes/cluster/pretrain.sbatch (.*)")


def code(text: str):
    """Each line of a block and each piece of code within a sentence, continued lines joined."""
    for _, block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    rest = FENCE.sub("", text)
    yield from re.findall(r"^    (.*)", rest, re.MULTILINE)
    for piece in re.findall(r"`([^`]+)`", rest):
        yield " ".join(piece.split())


def _commands():
    """(document, task, arguments) of each command of ours, and of the job that SLURM starts."""
    for name, text in DOCUMENTS.items():
        for line in code(text):
            line = line.partition("    #")[0]
            if found := OURS.search(line):
                task, arguments = found["module"] or found["verb"] or "train", found["arguments"]
            elif found := SLURM.search(line):
                task, arguments = "train", f"{found[1]} strategy=ddp strategy.devices=8 strategy.num_nodes=2"
            else:
                continue
            yield name, task, " ".join(arguments.split())


# In the order of the documents, each once
COMMANDS = list(dict.fromkeys(found for found in _commands() if found[2] and not found[2].startswith("--")))
