"""From a command line to objects: composing, checking, building.

Open `compose.py`; a command starts in `command.py`, objects are made in `build.py`.
What weights in files say about inputs goes before the config in `inputs.py`.
"""
