"""`python -m data2vec_train.plan`: will it fit, and how long will it take.

Open `planner.py` for how the largest batch is found, `dry_run.py` for how memory is counted.
A new GPU: a file in `configs/hardware`; what operations cost is in `flops.py`.
"""
