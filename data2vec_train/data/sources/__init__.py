"""Sources of samples: folders, arrays and manifests in `files.py`, Hugging Face datasets in `hf.py`.

Open `files.py` first: it defines `Source`. `metadata.py` reads tables beside the files.
To add a source, write a subclass of `Source` and a file in `configs/data`.
"""
