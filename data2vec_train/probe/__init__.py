"""`python -m data2vec_train.probe`: how much labels are in each layer of a frozen encoder.

Open `run.py`.
How layers are compared and chosen: `layers.py`.
"""
