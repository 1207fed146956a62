"""What all training verbs share: Lightning module, optimizer, precision, processes, run directory.

Open `assemble.py`, which builds the parts of a run, then `module.py`.
What a run stores and how it continues: `run_directory.py`.
"""
