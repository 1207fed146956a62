"""`python -m data2vec_train.plan`: does a run fit into memory, and how long does it take.

Open `planner.py` for how the largest batch is found, `dry_run.py` for how memory is counted.
A new GPU: a file in `configs/hardware`. The cost of operations is in `flops.py`.
"""
