"""What looks at a run from outside: numbers, probes, checkpoints, signals, time.

Open `monitor.py` for what is logged and when a run counts as collapsed.
When a run saves: `checkpointing.py`.
"""
