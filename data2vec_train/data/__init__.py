"""From files to batches, in the loader processes: sources, decoding, augmentation, masks, split.

Open `datamodule.py`, then `audio.py`, `image.py` or `text.py` of your modality.
A new file format: decode it there. A new place where samples lie: `sources/files.py`.
"""
