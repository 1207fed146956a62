"""`python -m data2vec_train.export`: a folder that transformers reads, or ONNX.

Open `run.py`.
How tensors are named for other programs: `weights/names.py`.
"""
