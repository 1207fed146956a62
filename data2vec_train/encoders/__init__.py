"""Encoders, from inputs to features: one transformer, and the input layers of each modality.

Open `base.py` for the contract between encoder and objective, then `transformer.py`.
A new kind of input: a file like `vision.py` with a subclass of `ModalityEncoder`.
"""
