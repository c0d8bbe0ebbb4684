"""The same training, whatever happens to it: whole runs, interrupted and taken up again."""

import os
import re
import shutil
import signal
import socket
import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import (
    SAMPLE,
    SCRIPT,
    checkpoints,
    checksum,
    command,
    copies,
    equal,
    fault,
    fault_in_step,
    hand_set,
    in_ranks,
    newest,
    run,
    wait_until,
)
from machines import two_machines

import data
import train_ddp
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
    done = run(command(*JOB), cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return cwd / "checkpoints"


@pytest.fixture
def finished(straight, tmp_path) -> Path:
    """A copy of them, where a command in tmp_path finds them."""
    return Path(shutil.copytree(straight, tmp_path / "checkpoints"))


@pytest.fixture
def midway(straight, tmp_path) -> Path:
    """A copy of one of them, where a command in tmp_path finds it."""
    (tmp_path / "checkpoints").mkdir()
    return Path(shutil.copy(straight / MIDWAY, tmp_path / "checkpoints"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoints(folder)}


def started_from(output: str) -> str:
    """The name of the checkpoint with which a run has started."""
    [line] = re.findall(r"^start +(.*)$", output, re.MULTILINE)
    return Path(line).name


def assert_same_result(folder: Path, straight: Path) -> None:
    assert [record["epoch"] for record in newest(folder)["progress"]["history"]] == [1]
    assert checksum(folder) == checksum(straight)


@pytest.fixture
def ranks(fork):
    """Start so many ranks without a launcher, which takes a tenth of the time."""

    def start_ranks(world_size: int, *flags: object, **env: str) -> list:
        return [fork(*flags, **env, **rank) for rank in hand_set(world_size)]

    return start_ranks


# A straight run


def test_the_record_of_an_epoch_adds_up(straight):
    names = [f"epoch00000-image{step * 128:09d}.pt" for step in range(10, 80, 10)]
    assert [*snapshot(straight)] == [*names, "epoch00001-image000000000.pt"]
    state = newest(straight)
    [record] = state["progress"]["history"]
    used = 10_000  # As both ranks get equally many.
    assert record["images_per_second"] * record["seconds"] == pytest.approx(used)
    expected = {"epoch": 1, "epochs": 1, "step": STEPS, "seed": 0, "lr": 0.01}
    expected |= {"batch_size": 64, "world_size": 2, "data": state["data"]}
    assert record.items() >= expected.items()
    assert 0.5 < record["train_loss"] < 1.5

    images, labels = data.read(SAMPLE, train=False)
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
    if len(calls) == 5:  # Each save flushes two: the file and its folder.
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
    wait_until((tmp_path / "held").exists, started=jobs[0])
    for job in jobs:
        job.kill()
    assert (folder / ".tmp-checkpoint").exists()
    assert len(checkpoints(folder)) == 2

    jobs = ranks(2, *JOB, **fault_in_step(1, KILL, step=25))
    assert [job.wait() for job in jobs] == [1, -signal.SIGKILL]
    assert started_from(jobs[0].output()) == f"epoch00000-image{20 * 128:09d}.pt"

    jobs = ranks(2, *JOB, **fault_in_step(1, STOP, step=5))
    assert [job.wait() for job in jobs] == [128 + signal.SIGTERM] * 2
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


LATE_RANK = """
import os, time
if os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1":
    time.sleep(5)
"""
KILL_ONCE = f"if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': {KILL}"


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_result_is_the_same(
    straight, start, tmp_path
):
    """Even if rank 0 is late: the other must not find the address of the dead one."""
    cmd = command(*JOB, torchrun=2)
    cmd.insert(cmd.index("--nproc_per_node=2"), "--max-restarts=1")
    job = start(cmd, **fault_in_step(1, KILL_ONCE, step=25, at_start=LATE_RANK))
    assert job.wait() == 0, job.output()
    assert (tmp_path / "fault").exists()
    assert started_from(job.output().split("from scratch")[1]) == (
        f"epoch00000-image{20 * 128:09d}.pt"
    )
    assert_same_result(tmp_path / "checkpoints", straight)


# Other flags


def test_another_number_of_processes_takes_over_in_mid_epoch(midway, fork, ranks):
    """Two, three, then one; the batch size and the learning rate may change as well."""
    folder = midway.parent
    flags = "--epochs", 1, "--batch_size", 32
    jobs = ranks(3, *flags, **fault_in_step(0, STOP, step=5))
    assert [job.wait() for job in jobs] == [128 + signal.SIGTERM] * 3
    assert started_from(jobs[0].output()) == MIDWAY
    for change in "batch_size from 64 to 32", "world_size from 2 to 3":
        assert f"changed    {change}\n" in jobs[0].output()
    middle = newest(folder)["progress"]
    assert middle["images_done"] == 40 * 128 + (middle["step"] - 40) * 96

    job = fork(*flags, "--world_size", 1, "--lr", 0.02)
    assert job.wait() == 0, job.output()
    for change in "world_size from 3 to 1", r"lr from 0.00\d+ to 0.02":
        assert re.search(rf"^changed    {change}$", job.output(), re.MULTILINE)
    state = newest(folder)
    assert state["args"]["batch_size"] == 32
    [record] = state["progress"]["history"]
    left = 10_000 - middle["images_done"]
    # The rate is that of this process, which began in mid-epoch.
    assert record["images_per_second"] * record["seconds"] == pytest.approx(left)
    assert record["step"] - middle["step"] == -(-left // 32)
    assert record["test_accuracy"] > 0.94


def test_a_finished_run_is_left_alone_and_a_longer_one_continues(finished, fork):
    """A rerun says with what was trained, as its own flags may be others."""
    before = snapshot(finished)
    flags = "--world_size", 1, "--batch_size", 128, "--lr", 0.02
    job = fork("--epochs", 1, *flags)
    assert job.wait() == 0
    [record] = newest(finished)["progress"]["history"]
    trained = "seed 0, epochs 1, batch_size 64, world_size 2, lr 0.01"
    assert job.output().splitlines()[-1] == (
        f"finished   nothing left to train; trained before with {trained}: "
        f"test accuracy {record['test_accuracy']:.2%}"
    )
    assert not re.search("^(epoch|step) ", job.output(), re.MULTILINE)
    assert snapshot(finished) == before

    job = fork("--epochs", 2, *flags, "--keep", 1)
    assert job.wait() == 0, job.output()
    assert "changed    epochs from 1 to 2\n" in job.output()
    assert started_from(job.output()) == [*before][-1]
    assert not re.search("^epoch 1/", job.output(), re.MULTILINE)
    [path] = checkpoints(finished)
    assert path.name == "epoch00002-image000000000.pt"
    first, second = newest(finished)["progress"]["history"]
    assert first == record
    assert (second["epoch"], second["step"], second["lr"]) == (2, 2 * STEPS, 0.02)
    assert second["train_loss"] < first["train_loss"]


def test_another_seed_is_refused_and_nothing_is_overwritten(finished, fork):
    before = snapshot(finished)
    job = fork("--epochs", 2, "--world_size", 1, "--seed", 5)
    assert job.wait() == 1
    [line] = re.findall("^error: .*", job.output(), re.MULTILINE)
    path = f"checkpoints/{[*before][-1]}"
    assert f"{path} has seed 0, this run has 5: choose another --check" in line
    assert "Traceback" not in job.output()
    assert snapshot(finished) == before


OTHER_TRAININGS = {
    "seed": "has seed 5, this run has 0",
    "data": "has data others, this run has MNIST 10000[+]2000 images",
    "optimizer_class": "has optimizer SGD, this run has AdamW",
    "one more layer": "does not fit.*layers.9.weight",
    "a wider layer": "does not fit.*size mismatch for layers.0.weight",
    "other groups": "does not fit.*parameter group",
}


def of_another_training(state: dict, kind: str) -> dict:
    """Return a checkpoint of a training that differs from this in one thing."""
    weights = state["model"]
    if kind == "seed":
        return state | {"args": state["args"] | {"seed": 5}}
    if kind == "data":
        return state | {"data": "others"}
    if kind == "optimizer_class":
        return state | {"optimizer_class": "SGD"}
    if kind == "one more layer":
        return state | {"model": weights | {"layers.9.weight": torch.zeros(10, 10)}}
    if kind == "a wider layer":
        wider = {"layers.0.weight": torch.zeros(20, 1, 5, 5)}
        return state | {"model": weights | wider}
    groups = [{"params": [weight.clone()]} for weight in weights.values()]
    return state | {"optimizer": torch.optim.AdamW(groups).state_dict()}


def new_run(state: dict, folder: Path) -> train_ddp.Run:
    """A training with the flags of a saved one, before it is resumed."""
    model = ConvNet()
    return train_ddp.Run(
        args=Namespace(**state["args"], checkpoint_dir=folder),
        device=torch.device("cpu"),
        data_name=state["data"],
        train_size=10_000,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), betas=(0.5, 0.6)),
        lock=utils.FolderLock(folder),
        progress=train_ddp.Progress(),
    )


def resume_others(path: Path, folders: Path) -> list[str]:
    state = torch.load(path, weights_only=True)
    messages = []
    for kind in OTHER_TRAININGS:
        folder = folders / kind
        if dist.get_rank() == 0:  # It alone reads the folder, as on one machine.
            folder.mkdir()
            torch.save(of_another_training(state, kind), folder / path.name)
        with pytest.raises(utils.UserError) as caught:
            train_ddp.resume(new_run(state, folder))
        messages.append(str(caught.value))
    return messages


def test_a_checkpoint_of_another_kind_of_training_is_refused(straight, tmp_path):
    """On all ranks, in one line that names both sides and the fix."""
    first, second = in_ranks(2, resume_others, straight / MIDWAY, tmp_path)
    assert first == second
    for message, (kind, pattern) in zip(first, OTHER_TRAININGS.items(), strict=True):
        assert message.startswith(f"{tmp_path / kind / MIDWAY} ")
        assert re.search(f"{pattern}.*: choose another --checkpoint_dir$", message)


def resume_on_two_machines(path: Path, older: Path, folders: list[Path]) -> list[tuple]:
    """Resume twice, where the newer checkpoint is on the one machine, then on the other."""
    rank = dist.get_rank()
    state = torch.load(path, weights_only=True)
    results = []
    for finder in 0, 1:
        folder = folders[rank] / str(finder)
        folder.mkdir(parents=True)
        shutil.copy(path if rank == finder else older, folder)
        resumed = new_run(state, folder)
        with patch("utils.machine_name", lambda: f"machine {rank}"):
            found = train_ddp.resume(resumed)
        weights = copies(resumed.model.parameters())
        results.append((found, weights, resumed.progress, resumed.optimizer))
    return results


def test_all_ranks_resume_from_the_newest_checkpoint_that_any_machine_has(
    straight, tmp_path
):
    """The optimizer's state is that of the file, its hyper-parameters those of the code."""
    newer = straight / MIDWAY
    older = checkpoints(straight)[0]
    folders = [tmp_path / "first", tmp_path / "second"]
    state = torch.load(newer, weights_only=True)
    for results in in_ranks(2, resume_on_two_machines, newer, older, folders):
        for path, weights, progress, optimizer in results:
            assert path.name == MIDWAY
            assert equal(weights, state["model"].values())
            assert progress == train_ddp.Progress(**state["progress"])
            saved = state["optimizer"]["state"][0]
            [first, *_] = optimizer.state.values()
            assert torch.equal(first["exp_avg"], saved["exp_avg"])
            assert first["step"] == saved["step"] == 40
            assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)


# Several nodes

LEAVE_WEIGHTS = """
import atexit
init = ConvNet.__init__
def init_and_leave_weights(self):
    init(self)
    atexit.register(lambda: torch.save(self.state_dict(), "weights.pt"))
ConvNet.__init__ = init_and_leave_weights
"""


@pytest.fixture
def agent(start, tmp_path):
    """Start a torchrun agent in a folder of its own; agents of a test find each other."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def start_agent(name, nodes, *flags, prefix=(), first="", **env):
        (tmp_path / name).mkdir(exist_ok=True)
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
def test_two_nodes_resume_where_only_one_has_checkpoints(straight, agent, tmp_path):
    (tmp_path / "first" / "checkpoints").mkdir(parents=True)
    shutil.copy(straight / MIDWAY, tmp_path / "first" / "checkpoints")
    names = "first", "second"
    env = fault(model=LEAVE_WEIGHTS)
    jobs = [agent(name, "2", "--epochs", 1, **env) for name in names]
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output()
    assert started_from(jobs[0].output() + jobs[1].output()) == MIDWAY
    weights = [torch.load(tmp_path / name / "weights.pt") for name in names]
    assert equal(weights[0].values(), weights[1].values())
    [result] = tmp_path.glob("*/checkpoints/epoch00001*.pt")
    assert_same_result(result.parent, straight)


@pytest.fixture
def machines():
    """Two names, each with the prefix of commands on that machine, if need be a pretended one."""
    with ExitStack() as stack:
        try:
            joined = stack.enter_context(two_machines())
        except OSError:
            joined = {"first": [], "second": []}
        yield joined


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_restart_after_a_killed_worker(
    straight, agent, machines, tmp_path
):
    first = next(iter(machines)) if all(machines.values()) else ""
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
        before = {path.name for path in checkpoints(folder)}
        wait_until(lambda: {*snapshot(folder)} - before, started=first)

    first.wait_for("processes  1 on")
    wait_for_progress()
    second = agent("second", "1:2", *flags)
    wait_until(
        lambda: "processes  2 on" in first.output() + second.output(), started=second
    )
    wait_for_progress()
    for pid in [second.process.pid, *second.workers()]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: first.output().count("processes  1 on") == 2, started=first)
    wait_for_progress()
    first.process.send_signal(signal.SIGTERM)
    first.wait()
    # The first time it stopped was when torchrun had to let the other node in.
    last = STOPPED.findall(first.output())[-1]
    assert Path(last).name == checkpoints(folder)[-1].name
    starts = re.findall(r"^start .*epoch(\d+)-image(\d+)", first.output(), re.MULTILINE)
    assert starts == sorted(starts)
