"""Mistakes in a command or config, answered before torch is imported.

Open `overrides.py`, which reads the command; then `rules.py`, one function per rule.
A new rule: a function in `rules.py`, or in `system/constraints.py` when a constructor needs it too.
What a config may call: `security.py`.
"""
