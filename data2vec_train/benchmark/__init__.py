"""`python -m data2vec_train.benchmark`: speed, memory and agreement with the original programs.

Open `run.py` for what can be measured, `timing.py` for how two programs are timed side by side.
A new measurement: a file beside `attention.py`, and a case in `run.py`.
"""
