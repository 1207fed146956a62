"""Other programs to compare with: whether they are here, and how a line says that one is not."""

import importlib.util

PEERS = {"transformers": "encoder and seed_table", "fairseq": "step"}  # what they are compared in


def installed(names: list[str]) -> tuple[list[str], list[str]]:
    """Those of `names` that can be imported, and a line for each of the others."""
    here = [name for name in names if importlib.util.find_spec(name) is not None]
    return here, [f"{name} is not installed: {PEERS[name]} without it" for name in names if name not in here]
