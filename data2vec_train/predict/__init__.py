"""`python -m data2vec_train.predict`: what a fine-tuned model says of new files.

Open `run.py`.
What is written for each task is in the task: `finetune/base.py`.
"""
