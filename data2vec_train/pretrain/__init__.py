"""`python -m data2vec_train`: pretraining.

Open `run.py`: build everything, train, write the run directory.
The table at the end of a sweep: `sweep.py`.
"""

from data2vec_train.system.verbs import callable_module

callable_module(__name__)
