"""Starts commands in forked processes: torch and Lightning are imported once, and a start costs milliseconds.

Each line of stdin is a command in JSON. Its answers are two lines: the id of its process, then its exit status.
"""

import importlib
import json
import os
import runpy
import sys
import time

VERBS = ("pretrain", "finetune", "probe", "embed", "predict", "export", "plan", "benchmark")
# What they import when a command is known to be right, and later; nothing is computed, since threads survive no fork.
LOADED = (*(f"data2vec_train.{verb}.run" for verb in VERBS), "data2vec_train.report.pretraining")
LOADED += ("sklearn.linear_model", "torchvision.transforms.v2")


def receive() -> dict:
    """Return in the child of each command."""
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            return json.loads(line)
        os.write(1, f"{child}\n".encode())
        os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
    sys.exit()


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file
    for name in LOADED:
        importlib.import_module(name)
    command = receive()
    for number, name in ((0, os.devnull), (1, command["stdout"]), (2, command["stderr"])):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.stdin = os.fdopen(0)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.path[:0] = command["paths"]
    sys.argv = ["data2vec_train", *command["arguments"]]
    importlib.import_module("data2vec_train").STARTED = time.perf_counter()
    runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
