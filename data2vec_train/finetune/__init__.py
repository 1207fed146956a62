"""`python -m data2vec_train.finetune`: an encoder with a head, trained on labels.

Open `run.py`, then `base.py` for what a task consists of.
A new task: a class like those in `vision.py`, `speech.py` and `text.py`, and a file in `configs/head`.
"""
