"""`python -m data2vec_train.embed`: write the features of files to a table.

Open `run.py`.
How features are pooled: `features/embedding.py`.
"""

from data2vec_train.system.verbs import callable_module

callable_module(__name__)
