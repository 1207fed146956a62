"""What a modality shows in a report: masks over inputs, PCA of features, neighbours.

Open `vision.py`; what they share is in `shared.py`.
A new modality: a file beside `vision.py`, named in its config.
"""
