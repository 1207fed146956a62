"""`python -m data2vec_train.export`: write a folder that transformers reads, or ONNX.

Open `run.py`.
The names of tensors in other programs: `weights/names.py`.
"""

from data2vec_train.system.verbs import callable_module

callable_module(__name__)
