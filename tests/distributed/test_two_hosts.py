"""Two hosts train together: network namespaces with a cable between them, and torchrun in each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.distributed.test_launch import arguments_of, environment
from tests.stress import tiny

HOSTS = [f"d2v{os.getpid()}{letter}" for letter in "ab"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip (iproute2)")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", HOSTS[0][-14:], "type", "veth", "peer", "name", HOSTS[1][-14:])
        for number, host in enumerate(HOSTS, 1):
            ip("link", "set", host[-14:], "netns", host)
            ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", host[-14:])
            ip("-n", host, "link", "set", host[-14:], "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield HOSTS
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def test_two_hosts_share_a_run(hosts, tmp_path):
    run = tmp_path / "run"
    arguments = [*arguments_of(tmp_path, 3), "strategy.devices=1", "strategy.num_nodes=2", f"hydra.run.dir={run}"]
    started = []
    for number, host in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
        torchrun += ["--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", "29511"]
        command = ["ip", "netns", "exec", host, *torchrun, "-m", "data2vec_train", *arguments]
        env = environment(GLOO_SOCKET_IFNAME=host[-14:])
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env))
    try:
        assert [process.wait(150) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    assert tiny.step_of(run) == 3
    assert (run / "summary.json").is_file()
    assert [file.name for file in run.glob("*.log")] == ["train.log"]
