"""From files to batches, in the loader processes: sources, decoding, augmentation, masks, split.

Open `datamodule.py`, then `audio.py`, `image.py` or `text.py` of your modality.
To add a file format, decode it there. To add a source of samples, start from `sources/files.py`.
"""
