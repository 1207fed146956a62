"""Quality of frozen features: extraction, kNN and linear probes, raw-input baselines.

Open `embedding.py` for how features are extracted and pooled, `measures.py` for the measures.
To add a measure, write a function in `measures.py`.
"""
