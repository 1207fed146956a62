"""`python -m data2vec_train.embed`: features of files, as a table.

Open `run.py`.
How features are pooled: `features/embedding.py`.
"""
