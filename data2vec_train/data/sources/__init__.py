"""Where samples lie: folders, arrays and manifests in `files.py`, Hugging Face datasets in `hf.py`.

Open `files.py` for what a source is; tables beside the files are read by `metadata.py`.
A new source: a subclass of `Source` there, and a file in `configs/data`.
"""
