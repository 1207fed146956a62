"""What every folder needs: constraints on settings, signals, launch, locks, private names of libraries.

Open `constraints.py` for what settings must fulfil, `stopping.py` for how a command ends, `outputs.py` for files.
If a new version of a library lacks a name, change `compat.py`; if a class or setting moves, add it to `moved.py`.
"""
