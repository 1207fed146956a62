"""From inputs to features: one transformer, and what each modality puts in front of it.

Open `base.py` for the contract between encoder and objective, then `transformer.py`.
A new kind of input: a file like `vision.py` with a subclass of `ModalityEncoder`.
"""
