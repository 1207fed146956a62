"""The algorithm: `data2vec.py` has all of it, ALGORITHM.md is the specification.

Masks come from `masking.py`, targets from `targets.py`, the EMA of weights from `teacher.py`.
A new masking: a class in `masking.py`, named in `configs/modality`.
"""
