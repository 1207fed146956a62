"""Encoders of other libraries, timm and transformers, as encoders of this package.

Open `base.py` first: what a wrapper takes over from a library's model, and what it does itself.
Another family: a subclass like `timm.py`; a folder beside `encoders`, which imports torch only.
"""
