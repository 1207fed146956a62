"""Other programs to compare with: whether they are installed, and the message if one is not."""

import importlib.util

PEERS: dict[str, tuple[str, ...]] = {  # program -> measurements that compare with it
    "transformers": ("encoder", "seed_table"),
    "fairseq": ("step",),
}


def installed(names: list[str], kinds: list[str]) -> tuple[list[str], list[str]]:
    """The importable programs of `names`, and one line for each missing program that one of `kinds` compares with."""
    here = [name for name in names if importlib.util.find_spec(name) is not None]
    missed = {name: [kind for kind in PEERS[name] if kind in kinds] for name in names if name not in here}
    return here, [
        f"{name} is not installed: {' and '.join(kinds)} without it" for name, kinds in missed.items() if kinds
    ]
