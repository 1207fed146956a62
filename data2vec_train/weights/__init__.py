"""Weights in and out: the fifteen classes of transformers' Data2Vec page, fairseq, our checkpoints.

Open `convert.py`; names of tensors are in `names.py`. TRANSFORMERS.md is the contract with transformers.
Another program's checkpoint: a reader like `fairseq.py`.
"""
