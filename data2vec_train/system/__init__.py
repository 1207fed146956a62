"""Processes and their machine: signals, launch, locks, private names of libraries.

Open `stopping.py` for how a command ends, `outputs.py` for how files are written and locked.
If a new version of a library lacks a name, change `compat.py`; if a class or setting moves, add it to `moved.py`.
"""
