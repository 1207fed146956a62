"""`python -m data2vec_train.probe`: how well each layer of a frozen encoder predicts labels.

Open `run.py`.
How layers are compared and chosen: `layers.py`.
"""

from data2vec_train.system.verbs import callable_module

callable_module(__name__)
