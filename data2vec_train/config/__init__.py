"""From a command line to objects: composing, checking, building.

Open `compose.py`; a command starts in `command.py`, objects are made in `build.py`.
What weights in files say about inputs goes before the config in `inputs.py`.
`--help` is `help.py`, configs/README.md is `reference.py`: both read comments of the YAML files with `commented.py`.
"""
