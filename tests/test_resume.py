"""The same training, whatever happens to it: whole runs, interrupted and taken up again."""

import os
import re
import shutil
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    SAMPLE,
    SCRIPT,
    Forked,
    assert_same_result,
    checkpoints,
    command,
    fault,
    fault_in_step,
    hand_set,
    newest,
    wait_until,
)
from machines import two_machines
from torchvision.datasets import MNIST

import utils
from model import ConvNet

JOB = "--epochs", 1, "--world_size", 2, "--save_every", 10, "--keep", 100
STEPS = 79  # Of such a run.
MIDWAY = f"epoch00000-image{40 * 2 * 64:09d}.pt"  # After 40 of them.
STOPPED = re.compile(
    r"^stopped; (\S+) has all progress: rerun to resume$", re.MULTILINE
)
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
STOP = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The checkpoints of a run to which nothing has happened."""
    cwd = tmp_path_factory.mktemp("straight")
    flags = command(*JOB)[2:]
    jobs = [Forked(flags, cwd, **rank) for rank in hand_set(2)]
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output()
    return cwd / "checkpoints"


def started_from(output: str) -> str:
    """The name of the checkpoint with which the last run in the output has started."""
    return Path(re.findall(r"^start +(.*)$", output, re.MULTILINE)[-1]).name


@pytest.fixture
def ranks(fork):
    """Start so many ranks without a launcher, which takes a tenth of the time."""

    def start_ranks(world_size: int, *flags: object, **env: str) -> list:
        return [fork(*flags, **env, **rank) for rank in hand_set(world_size)]

    return start_ranks


def test_the_record_of_an_epoch_adds_up(straight):
    names = [f"epoch00000-image{step * 128:09d}.pt" for step in range(10, 80, 10)]
    names += ["epoch00001-image000000000.pt"]
    assert [path.name for path in checkpoints(straight)] == names
    state = newest(straight)
    [record] = state["progress"]["history"]
    assert (record["epoch"], record["step"]) == (1, STEPS)
    # Both ranks get equally many of the 10,000 images.
    assert record["images_per_second"] == pytest.approx(10_000 / record["seconds"])
    flags = {"seed": 0, "epochs": 1, "batch_size": 64, "world_size": 2, "lr": 0.01}
    assert state["hyperparameters"] == {"data": "MNIST, 10000 + 2000 items", **flags}

    files = MNIST(SAMPLE, train=False)
    images, labels = files.data, files.targets
    model = ConvNet()
    model.load_state_dict(state["model"])
    with torch.inference_mode():
        logits = model(images)
    assert record["test_accuracy"] == (logits.argmax(1) == labels).sum() / 2000 > 0.94
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert record["test_loss"] == pytest.approx(loss, rel=1e-4)


# Interrupted

HOLD_THIRD_SAVE = """
import os, signal
fsync, calls = os.fsync, []
def fsync_and_hold(file):
    calls.append(file)
    # Each save flushes two: the file and its folder.
    if len(calls) == 5:
        os.truncate(file, os.fstat(file).st_size // 2)
        open("held", "w").close()
        signal.pause()
    fsync(file)
os.fsync = fsync_and_hold
"""


def test_killed_in_mid_save_then_killed_then_stopped_the_end_is_bit_equal(
    straight, ranks, tmp_path
):
    folder = tmp_path / "checkpoints"
    jobs = ranks(2, *JOB, **fault(HOLD_THIRD_SAVE))
    wait_until((tmp_path / "held").exists, "the third save", jobs[0])
    for job in jobs:
        job.kill()
    assert (folder / ".tmp-checkpoint").exists()
    assert len(checkpoints(folder)) == 2

    jobs = ranks(2, *JOB, **fault_in_step(1, KILL, step=25))
    assert [job.wait() for job in jobs] == [1, -signal.SIGKILL]
    assert started_from(jobs[0].output()) == f"epoch00000-image{20 * 128:09d}.pt"

    jobs = ranks(2, *JOB, **fault_in_step(1, STOP, step=5))
    assert [job.wait() for job in jobs] == [-signal.SIGTERM] * 2
    assert started_from(jobs[0].output()) == MIDWAY
    stopped_at = checkpoints(folder)[-1]
    assert STOPPED.findall(jobs[0].output()) == [f"checkpoints/{stopped_at.name}"]
    progress = newest(folder)["progress"]
    assert 45 <= progress["step"] <= 50  # All ranks have learned of it by then.
    assert progress["images_done"] == progress["step"] * 128

    jobs = ranks(2, *JOB)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output()
    assert started_from(jobs[0].output()) == stopped_at.name
    assert not (folder / ".tmp-checkpoint").exists()
    assert_same_result(folder, straight)


# Other flags


def test_another_number_of_processes_takes_over_in_mid_epoch(
    straight, fork, ranks, tmp_path
):
    """Two, three, then one; the batch size and the learning rate may change as well."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(straight / MIDWAY, folder)
    flags = "--epochs", 1, "--batch_size", 32
    jobs = ranks(3, *flags, **fault_in_step(0, STOP, step=5))
    assert [job.wait() for job in jobs] == [-signal.SIGTERM] * 3
    assert started_from(jobs[0].output()) == MIDWAY
    middle = newest(folder)["progress"]
    assert middle["images_done"] == 40 * 128 + (middle["step"] - 40) * 96

    job = fork(*flags, "--world_size", 1, "--lr", 0.02)
    assert job.wait() == 0, job.output()
    changed = ["batch_size from 64 to 32", "world_size from 2 to 3"]
    changed += ["world_size from 3 to 1", r"lr from 0.00\d+ to 0.02"]
    for change in changed:
        output = jobs[0].output() + job.output()
        assert re.search(rf"^changed    {change}$", output, re.MULTILINE)
    [record] = newest(folder)["progress"]["history"]
    left = 10_000 - middle["images_done"]
    # Of the whole epoch, of which this process has trained the end only.
    assert record["seconds"] > middle["seconds"]
    assert record["images_per_second"] == pytest.approx(10_000 / record["seconds"])
    assert record["step"] - middle["step"] == -(-left // 32)
    assert record["test_accuracy"] > 0.94


def test_a_finished_run_is_left_alone_and_a_longer_one_continues(
    straight, fork, tmp_path
):
    """Another seed is refused, and nothing is overwritten."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(straight, folder)
    before = {path: path.read_bytes() for path in checkpoints(folder)}
    last = [*before][-1]
    flags = "--world_size", 1, "--batch_size", 128, "--lr", 0.02
    finished = fork("--epochs", 1, *flags)
    assert finished.wait() == 0
    [record] = newest(folder)["progress"]["history"]
    accuracy = f"test accuracy {record['test_accuracy']:.2%}"
    last_line = finished.output().splitlines()[-1]
    assert last_line == f"finished   1 epochs, {accuracy}"
    assert not re.search("^(epoch|step) ", finished.output(), re.MULTILINE)

    refused = fork("--epochs", 2, *flags, "--seed", 5)
    assert refused.wait() == 1
    assert refused.output() == (
        f"error: checkpoints/{last.name} does not fit (ValueError: it has seed 0, "
        "this run has 5): choose another --checkpoint_dir\n"
    )
    assert {path: path.read_bytes() for path in checkpoints(folder)} == before

    longer = fork("--epochs", 2, *flags, "--keep", 1)
    assert longer.wait() == 0, longer.output()
    assert "changed    epochs from 1 to 2\n" in longer.output()
    assert started_from(longer.output()) == last.name
    assert not re.search("^epoch 1/", longer.output(), re.MULTILINE)
    [path] = checkpoints(folder)
    assert path.name == "epoch00002-image000000000.pt"
    first, second = newest(folder)["progress"]["history"]
    assert first == record
    assert (second["epoch"], second["step"]) == (2, 2 * STEPS)
    assert newest(folder)["hyperparameters"]["lr"] == 0.02
    assert second["train_loss"] < first["train_loss"]


# Under torchrun, on several machines

KILL_ONCE = f"if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': {KILL}"


def test_restarted_ranks_do_not_find_the_addresses_of_dead_ones(monkeypatch):
    """torchrun keeps its store over all restarts."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one_rank = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    one_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port}
    one_rank |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in one_rank.items():
        monkeypatch.setenv(name, str(value))
    for restarts in "0", "1":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        store, _, _ = utils.open_store()
        assert not store.check(["address"])
        store.set("address", "127.0.0.1")


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_result_is_the_same(
    straight, start, tmp_path
):
    cmd = command(*JOB, torchrun=2)
    cmd.insert(cmd.index("--nproc_per_node=2"), "--max-restarts=1")
    job = start(cmd, **fault_in_step(1, KILL_ONCE, step=25))
    assert job.wait() == 0, job.output()
    assert (tmp_path / "fault").exists()
    assert started_from(job.output()) == f"epoch00000-image{20 * 128:09d}.pt"
    assert_same_result(tmp_path / "checkpoints", straight)


@pytest.fixture
def agent(start, tmp_path):
    """Start a torchrun agent in a folder of its own; agents of a test find each other."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def start_agent(name, nodes, *flags, prefix=(), first="", **env):
        (tmp_path / name).mkdir()
        options = [f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=3"]
        options += ["--rdzv_conf=last_call_timeout=2,keep_alive_interval=1"]
        options += ["--rdzv_backend=c10d", "--rdzv_id=test"]
        options += [f"--rdzv_endpoint={first or '127.0.0.1'}:{port}"]
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if not first:
            options += ["--local_addr=127.0.0.1"]
            env["GLOO_SOCKET_IFNAME"] = "lo"
        cmd = [*prefix, sys.executable, "-m", "torch.distributed.run", *options]
        cmd += [SCRIPT, *flags, "--data_dir", SAMPLE]
        return start([str(part) for part in cmd], tmp_path / name, **env)

    return start_agent


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_restart_after_a_killed_worker(
    straight, agent, tmp_path
):
    """Afterwards only one of them has checkpoints."""
    with ExitStack() as stack:
        try:
            machines = stack.enter_context(two_machines())
            [first, _] = machines
        except OSError:  # It needs root: two folders have to do.
            machines = {"first": [], "second": []}
            first = ""
        flags = "--epochs", 1, "--save_every", 10
        env = fault_in_step(1, KILL_ONCE, step=25)
        jobs = [
            agent(name, "2", *flags, prefix=prefix, first=first, **env)
            for name, prefix in machines.items()
        ]
        assert [job.wait() for job in jobs] == [0, 0], jobs[0].output()
    assert len([*tmp_path.glob("*/fault")]) == 1
    output = jobs[0].output() + jobs[1].output()
    assert output.count("from scratch") == 1
    assert re.search(r"^start .*epoch00000-image000002560.pt$", output, re.MULTILINE)
    [result] = tmp_path.glob("*/checkpoints/epoch00001*.pt")
    assert_same_result(result.parent, straight)


@pytest.mark.slow
def test_a_node_joins_and_is_killed_and_training_continues(agent, tmp_path):
    flags = "--epochs", 1000, "--batch_size", 16, "--save_every", 50
    first = agent("first", "1:2", *flags)
    folder = tmp_path / "first" / "checkpoints"

    def wait_for_progress() -> None:
        before = {*checkpoints(folder)}
        wait_until(lambda: {*checkpoints(folder)} - before, "a new checkpoint", first)

    first.wait_for("processes  1 on")
    wait_for_progress()
    second = agent("second", "1:2", *flags)
    wait_until(
        lambda: "processes  2 on" in first.output() + second.output(),
        "the second node has joined",
        second,
    )
    wait_for_progress()
    for pid in [second.process.pid, *second.workers()]:
        os.kill(pid, signal.SIGKILL)
    restarted = lambda: first.output().count("processes  1 on") == 2
    wait_until(restarted, "the first node trains alone again", first)
    wait_for_progress()
    first.process.send_signal(signal.SIGTERM)
    first.wait()
    # The first time it stopped was when torchrun had to let the other node in.
    last = STOPPED.findall(first.output())[-1]
    assert Path(last).name == checkpoints(folder)[-1].name
    starts = re.findall(r"^start .*epoch(\d+)-image(\d+)", first.output(), re.MULTILINE)
    assert starts == sorted(starts)
