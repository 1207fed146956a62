"""The process and its machine: signals, launch, locks, private names of libraries.

Open `stopping.py` for how a command ends, `outputs.py` for how files are written and locked.
A new version of a library that lacks something: `compat.py`. A class that moved: `moved.py`.
"""
