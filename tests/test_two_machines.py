"""Two machines: two network namespaces joined by a wire where the rights are there, else two launches on this one."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, arguments, disc_shards, rows, train

from coherent_ddrm.data import ids_for_step

ADDRESSES = ("10.89.0.1", "10.89.0.2")


@contextmanager
def two_machines():
    """Per machine (a prefix for its commands, its network interface, the first one's address)."""
    names = [f"ddrm-{os.getpid()}-{i}" for i in range(2)]
    wires = [f"v{os.getpid() % 100000}{end}" for end in "ab"]
    call = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)  # noqa: E731
    made = []
    try:
        try:
            for name in names:
                call("netns", "add", name)
                made.append(name)
            call("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
            for name, wire, address in zip(names, wires, ADDRESSES, strict=True):
                call("link", "set", wire, "netns", name)
                call("-n", name, "addr", "add", f"{address}/24", "dev", wire)
                call("-n", name, "link", "set", wire, "up")
                call("-n", name, "link", "set", "lo", "up")
            machines = [(["ip", "netns", "exec", n], w, ADDRESSES[0]) for n, w in zip(names, wires, strict=True)]
        except (OSError, subprocess.CalledProcessError):
            machines = [([], "lo", "127.0.0.1")] * 2
        yield machines
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return disc_shards(tmp_path_factory.mktemp("discs"), count=32)


def test_two_machines_of_8_equal_one_of_16(tmp_path, shards):
    """By accelerate's own launcher and the shipped config: the same losses at each step, the same weights nearly."""
    options = ["--model.size", "tiny", "--optim.steps", "4", "--optim.warmup", "1", "--optim.batch", "16"]
    train("diffusion", tmp_path / "one", shards, *options)
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
    launch += [str(ROOT / "configs" / "accelerate" / "nodes.yaml"), "--num_processes", "2"]
    script = [str(ROOT / "train" / "diffusion.py"), *arguments(tmp_path / "two", shards, *options)]
    with two_machines() as machines:
        running = []
        for rank, (prefix, interface, address) in enumerate(machines):
            settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": interface}
            port = str(29700 + os.getpid() % 200)
            where = ["--machine_rank", str(rank), "--main_process_ip", address, "--main_process_port", port]
            command = [*prefix, *launch, *where, *script]
            running.append(
                subprocess.Popen(command, env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True, cwd=ROOT)
            )
        errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(error[-1500:] for error in errors)
    one, two = ([row["loss"] for row in rows(tmp_path / run) if "loss" in row] for run in ("one", "two"))
    assert len(one) == 4 and one == pytest.approx(two, abs=1e-5)
    a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000004" / "net.safetensors") for run in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sample_once_an_epoch(world):
    """Over three epochs, whatever the number of machines."""
    length, batch = 96, 16
    for epoch in range(3):
        steps = range(epoch * length // batch, (epoch + 1) * length // batch)
        seen = [
            int(i) for step in steps for rank in range(world) for i in ids_for_step(step, batch, length, 3)[rank::world]
        ]
        assert sorted(seen) == list(range(length))
