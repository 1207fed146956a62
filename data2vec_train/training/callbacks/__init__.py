"""Callbacks of a run: metrics, probes, checkpoints, signals, timing.

Open `monitor.py` for what is logged and when a run counts as collapsed.
When a run saves: `checkpointing.py`.
"""
