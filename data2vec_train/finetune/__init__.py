"""`python -m data2vec_train.finetune`: train an encoder with a head on labels.

Open `run.py`, then `base.py` for the parts of a task.
A new task: a class like those in `vision.py`, `speech.py` and `text.py`, and a file in `configs/head`.
"""

from data2vec_train.system.verbs import callable_module

callable_module(__name__)
