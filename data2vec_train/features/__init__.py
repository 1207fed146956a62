"""What frozen features are worth: extraction, kNN and linear probes, the raw-input baseline.

Open `embedding.py` for how features are taken and pooled, `measures.py` for the measures.
A new measure: a function in `measures.py`.
"""
