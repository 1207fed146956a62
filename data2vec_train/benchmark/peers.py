"""Other programs to compare with: whether they are here, and how a line says that one is not."""

import importlib.util

PEERS: dict[str, tuple[str, ...]] = {  # what they are compared in
    "transformers": ("encoder", "seed_table"),
    "fairseq": ("step",),
}


def installed(names: list[str], kinds: list[str]) -> tuple[list[str], list[str]]:
    """Those of `names` that can be imported, and a line for each of the others that one of `kinds` compares with."""
    here = [name for name in names if importlib.util.find_spec(name) is not None]
    missed = {name: [kind for kind in PEERS[name] if kind in kinds] for name in names if name not in here}
    return here, [f"{name} is not installed: {' and '.join(one)} without it" for name, one in missed.items() if one]
