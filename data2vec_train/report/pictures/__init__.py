"""Report pictures of each modality: masks over inputs, PCA of features, neighbours.

Open `vision.py`; code for all modalities is in `shared.py`.
A new modality: a file beside `vision.py`, named in its config.
"""
