"""Modules that sit on an encoder, with their losses, for the twelve fine-tuning tasks.

Open `losses.py`, then `vision.py`, `speech.py` or `text.py`.
A new head: a module here, and a task in `finetune/vision.py` or beside it.
"""
