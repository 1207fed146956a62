"""`python -m data2vec_train.predict`: apply a fine-tuned model to new files.

Open `run.py`.
The format of a prediction is defined by its task: `finetune/base.py`.
"""

from data2vec_train.system.verbs import callable_module

callable_module(__name__)
