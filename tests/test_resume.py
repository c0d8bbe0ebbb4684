"""The same run, whatever happens: interrupted anywhere, and with any number of processes."""

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    SAMPLE,
    SCRIPT,
    alive,
    checkpoints,
    checksum,
    command,
    in_ranks,
    newest,
    run,
    runs,
    wait_until,
)
from machines import two_machines
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
import train_ddp
import utils
from data import Digits, ShardSampler, load_data
from model import ConvNet

EPOCH = "--epochs", 1, "--batch_size", 32  # 157 steps of two processes
STOPPED = r"stopped; (\S+\.pt) .*rerun.*"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an undisturbed run of so many processes, with a checkpoint midway."""
    folders = {}

    def folder(world_size: int) -> Path:
        if world_size not in folders:
            cwd = tmp_path_factory.mktemp(f"straight{world_size}")
            flags = "--world_size", world_size, "--save_every", 50
            assert run(command(*EPOCH, *flags), cwd).returncode == 0
            folders[world_size] = cwd / "checkpoints"
        return folders[world_size]

    return folder


@pytest.fixture
def midway(straight, tmp_path):
    """Leave the checkpoint of step 100 of a run of 2 processes, and no other, in ./checkpoints."""
    path = checkpoints(straight(2))[0]
    assert path.name == f"epoch00000-image{100 * 2 * 32:09d}.pt"
    (tmp_path / "checkpoints").mkdir()
    return Path(shutil.copy(path, tmp_path / "checkpoints"))


def same_result(folder: Path, other: Path) -> bool:
    """Model, optimizers and the records of all epochs are equal to the last bit."""
    epochs = [record["epoch"] for record in newest(folder)["history"]]
    return epochs == [1] and checksum(folder) == checksum(other)


def wait_for_progress(job, folder: Path) -> None:
    """Wait for a checkpoint that was not there before."""
    before = {path.name for path in checkpoints(folder)}
    wait_until(lambda: {p.name for p in checkpoints(folder)} - before, 90, job)


def trainers(job) -> list[int]:
    """The ranks' pids, in order of their start; not those of torchrun or other helpers."""
    pids = [job.process.pid, *job.workers()]
    ranks = [pid for pid in pids if runs(pid, "spawn_main")]
    return ranks or [pid for pid in pids if not runs(pid, "distributed.run")]


# Interrupted


def test_one_process_killed_then_stopped_then_rerun_equals_straight(
    straight, start, tmp_path
):
    folder = tmp_path / "checkpoints"
    cmd = command(*EPOCH, "--world_size", 1, "--save_every", 20)
    job = start(cmd)
    wait_for_progress(job, folder)
    job.process.kill()
    assert job.wait() == -9

    job = start(cmd)
    wait_for_progress(job, folder)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM
    assert re.search(r"^start .*epoch00000-image", job.output(), re.MULTILINE)
    assert len(re.findall(STOPPED, job.output())) == 1

    assert run(cmd, tmp_path).returncode == 0
    assert same_result(folder, straight(1))


def test_stopped_by_any_signal_to_anyone_all_ranks_leave_at_one_step(
    straight, start, tmp_path
):
    """Five times in one run, by both launchers; the end is that of a straight run.

    A worker may get SIGTERM and SIGHUP from its launcher and from a service manager too.
    """
    folder = tmp_path / "checkpoints"
    flags = *EPOCH, "--world_size", 2, "--save_every", 5, "--keep", 100
    for torchrun, signum, to_all in [
        (0, signal.SIGINT, True),
        (2, signal.SIGTERM, True),
        (0, signal.SIGHUP, True),
        (2, signal.SIGINT, False),
        (0, signal.SIGKILL, False),
    ]:
        job = start(command(*flags, torchrun=torchrun))
        wait_for_progress(job, folder)
        ranks = trainers(job)
        assert len(ranks) == 2
        everyone = [job.process.pid, *job.workers()]
        if signum == signal.SIGKILL:
            os.kill(ranks[0], signum)
        else:
            for pid in [job.process.pid, *ranks] if to_all else [job.process.pid]:
                os.kill(pid, signum)
        code, output = job.wait(30), job.output()
        wait_until(lambda pids=everyone: not any(map(alive, pids)), 10)
        if signum == signal.SIGKILL:
            assert code == 137
            continue
        assert code != 0 if torchrun else code == 128 + signum
        [named] = re.findall(STOPPED, output)
        assert named == f"checkpoints/{checkpoints(folder)[-1].name}"
        progress = newest(folder)
        assert progress["images"] == progress["step"] * 2 * 32
        if not torchrun:
            assert "Traceback" not in output and "rror" not in output
    assert run(command(*flags), tmp_path).returncode == 0
    assert same_result(folder, straight(2))


@pytest.fixture
def slow_disk(tmp_path) -> dict[str, str]:
    """The environment of a job whose processes report their first fsync, and wait in it."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    return {"PYTHONPATH": str(tmp_path)}


SLOW_DISK = """
import os, time
fsync, seconds = os.fsync, [5]
def slow_fsync(file):
    if seconds:
        print("slow fsync", flush=True)
        time.sleep(seconds.pop())
    fsync(file)
os.fsync = slow_fsync
"""


@pytest.mark.parametrize(
    "torchrun, signum",
    [
        (0, signal.SIGINT),
        pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow),
        (2, signal.SIGTERM),
    ],
)
def test_a_stop_is_complete_with_a_slow_disk(
    start, tmp_path, slow_disk, torchrun, signum
):
    """A self-spawning launcher gets the signal; under torchrun rank 0, which alone saves."""
    flags = "--epochs", 100, "--batch_size", 8, "--world_size", 2
    job = start(command(*flags, torchrun=torchrun), **slow_disk)
    job.wait_for("\nstep 200 ", 90)
    os.kill(trainers(job)[0] if torchrun else job.process.pid, signum)
    code, output = job.wait(60), job.output()
    assert "slow fsync" in output
    assert code != 0 if torchrun else code == 128 + signum
    [named] = re.findall(STOPPED, output)
    [path] = checkpoints(tmp_path / "checkpoints")
    assert named == f"checkpoints/{path.name}"
    progress = newest(path.parent)
    assert progress["step"] >= 200
    assert progress["images"] + progress["epoch"] * 10000 == progress["step"] * 16
    logged = [int(step) for step in re.findall(r"^step (\d+)", output, re.MULTILINE)]
    assert 0 <= progress["step"] - logged[-1] <= train_ddp.LOG_EVERY


@pytest.mark.slow
def test_a_stop_that_cannot_save_is_no_polite_one(start, tmp_path):
    """The exit code of Ctrl-C would say that all progress is safe."""
    full = 'import os\ndef fsync(file):\n    raise OSError(28, "no space left")\n'
    (tmp_path / "sitecustomize.py").write_text(f"{full}os.fsync = fsync\n")
    flags = "--epochs", 100, "--batch_size", 8, "--world_size", 2
    job = start(command(*flags), PYTHONPATH=str(tmp_path))
    job.wait_for("\nstep 200 ", 90)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(30) == 1
    assert (
        len(re.findall("^error: cannot save .*no space", job.output(), re.MULTILINE))
        == 1
    )
    assert not re.search(STOPPED, job.output())


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_stops_nothing(start, tmp_path):
    cmd = command("--epochs", 100, "--world_size", 2, "--save_every", 10)
    job = start(["nohup", *cmd])
    wait_for_progress(job, tmp_path / "checkpoints")
    for pid in [job.process.pid, *trainers(job)]:
        os.kill(pid, signal.SIGHUP)
    for _ in range(2):
        wait_for_progress(job, tmp_path / "checkpoints")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(30) == 128 + signal.SIGTERM, job.output()


def status(pid: int, name: str) -> str:
    """A value from /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return re.search(rf"^{name}:\s*(\w+)", text, re.MULTILINE)[1]


def test_a_second_ctrl_c_ends_even_a_frozen_run_at_once(start, tmp_path):
    cmd = command("--epochs", 100, "--world_size", 2, "--save_every", 10)
    job = start(cmd)
    wait_for_progress(job, tmp_path / "checkpoints")
    everyone = [job.process.pid, *job.workers()]
    frozen = trainers(job)[1]
    os.kill(frozen, signal.SIGSTOP)
    wait_until(lambda: status(frozen, "State") == "T", 10, job)
    job.process.send_signal(signal.SIGINT)
    # Until the launcher has passed it on: two signals at once could arrive as one.
    sigterm = 1 << signal.SIGTERM - 1
    wait_until(lambda: int(status(frozen, "ShdPnd"), 16) & sigterm, 10, job)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(10) == 128 + signal.SIGINT
    wait_until(lambda: not any(map(alive, everyone)), 10)
    assert not re.search(STOPPED, job.output())


def test_a_second_ctrl_c_to_a_worker_ends_it_in_mid_save(start, tmp_path, slow_disk):
    job = start(command("--epochs", 100, "--batch_size", 8), **slow_disk)
    job.wait_for("\nstep 200 ", 90)
    job.process.send_signal(signal.SIGINT)
    job.wait_for("slow fsync", 30)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(30) == 128 + signal.SIGINT
    assert not re.search(STOPPED, job.output())
    assert not checkpoints(tmp_path / "checkpoints")


LATE_RANK = """
import os, time
if os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1":
    time.sleep(5)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_result_is_the_same(
    straight, start, tmp_path
):
    """Even if rank 0 is late: the other must not find the address of the dead one."""
    (tmp_path / "sitecustomize.py").write_text(LATE_RANK)
    cmd = command(*EPOCH, "--save_every", 20, torchrun=2)
    at = cmd.index("--nproc_per_node=2")
    cmd[at:at] = ["--max-restarts=1"]
    job = start(cmd, PYTHONPATH=str(tmp_path))
    wait_for_progress(job, tmp_path / "checkpoints")
    os.kill(trainers(job)[1], signal.SIGKILL)
    assert job.wait(90) == 0, job.output()
    assert re.search(r"^start .*epoch00000-image", job.output(), re.MULTILINE)
    assert same_result(tmp_path / "checkpoints", straight(2))


# The number of processes

STEPS, GLOBAL_BATCH, LEFT_OVER = 20, 128, 50
EPOCHS = 10  # are planned, as in the default command on the sample; one is trained
TOTAL = STEPS * GLOBAL_BATCH + LEFT_OVER
BATCH = {1: 128, 2: 64, 3: 43, 4: 32}  # images per rank and step


def small_set(args=None) -> tuple[str, Digits, Digits]:
    _, train, test = load_data(SAMPLE)
    return "some digits", Digits(train.images[:TOTAL], train.labels[:TOTAL]), test


class SmoothNet(ConvNet):
    """The network without kinks: there a rounding error can tip a gradient by 1%."""

    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(list(self.layers)):
            if isinstance(layer, nn.ReLU | nn.MaxPool2d):
                smooth = nn.Tanh() if isinstance(layer, nn.ReLU) else nn.AvgPool2d(2)
                self.layers[i] = smooth


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def train_one_epoch(
    folder: Path, save_every: int | None, on_step=train_ddp.train_step, epoch: int = 1
) -> None:
    """Have `train` train as one rank, and stop after the last step of the first epoch."""
    size, stop, short_batches = dist.get_world_size(), [], []
    args = SimpleNamespace(
        epochs=EPOCHS,
        batch_size=BATCH[size],
        world_size=size,
        lr=0.01,
        seed=3,
        save_every=save_every,
        keep=99,
        checkpoint_dir=str(folder),
        data_dir="",
    )

    def step(ddp, optimizer, batch) -> torch.Tensor:
        assert all(module.training for module in ddp.modules())
        if len(batch[1]) < args.batch_size:  # the last one of an epoch
            short_batches.append(batch)
            if len(short_batches) == epoch:
                stop.append(signal.SIGTERM)
        return on_step(ddp, optimizer, batch)

    utils.join_process_group = lambda init_method: torch.device("cpu")
    train_ddp.load_on_every_rank, train_ddp.train_step = small_set, step
    utils.catch_stop_signals = lambda: stop
    assert train_ddp.train(args, "") == 128 + signal.SIGTERM


def train_recorded(folder: Path) -> dict[str, list]:
    """Train an epoch as one rank; for each step: its batch, weights before it, gradient."""
    record = {"batches": [], "weights": [], "gradients": []}
    train_step = train_ddp.train_step

    def before_step(optimizer, *_) -> None:
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        record["gradients"].append(copies(gradients))

    def on_step(ddp, optimizer, batch) -> torch.Tensor:
        parameters = list(ddp.parameters())
        if not record["batches"]:
            record["weights"].append(copies(parameters))
            optimizer.register_step_pre_hook(before_step)
        record["batches"].append(batch)
        loss = train_step(ddp, optimizer, batch)
        record["weights"].append(copies(parameters))
        return loss

    train_ddp.ConvNet = SmoothNet
    train_one_epoch(folder, None, on_step)
    return record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What each rank saw and computed, for each number of ranks."""
    folder = tmp_path_factory.mktemp("recorded")
    return {size: in_ranks(size, train_recorded, folder / str(size)) for size in BATCH}


@pytest.fixture(scope="module")
def plain() -> dict[str, list]:
    """The same training by one process, with no DDP, no sampler and images moved one by one."""
    _, digits, _ = small_set()
    span, moves = 2 * data.MAX_SHIFT, data.random_stream("shift", 3, 0)
    offsets = torch.randint(span + 1, (TOTAL, 2), generator=moves).tolist()
    torch.manual_seed(3)
    model = SmoothNet()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95))
    record = {"batches": [], "weights": [copies(model.parameters())], "gradients": []}
    seen = 0
    order = torch.randperm(TOTAL, generator=data.random_stream("order", 3, 0))
    for group in order.split(GLOBAL_BATCH):
        chosen = group.tolist()
        moved = []
        for i in chosen:
            (down, across), size = offsets[i], 28
            padded = F.pad(digits.images[i], [data.MAX_SHIFT] * 4)
            moved.append(padded[down : down + size, across : across + size])
        batch = torch.stack(moved), digits.labels[chosen]
        part = (seen + len(chosen) / 2) / (EPOCHS * TOTAL)
        seen += len(chosen)
        rising, falling = part / train_ddp.WARM_UP, (1 - part) / (1 - train_ddp.WARM_UP)
        optimizer.param_groups[0]["lr"] = 0.01 * min(rising, falling)
        loss = F.cross_entropy(
            model(batch[0]), batch[1], label_smoothing=train_ddp.LABEL_SMOOTHING
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record["batches"].append(batch)
        record["gradients"].append(copies(p.grad for p in model.parameters()))
        record["weights"].append(copies(model.parameters()))
    return record


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to their norm."""
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_is_that_of_a_plain_loop_without_ddp(recorded, plain, world_size):
    """The same weights at first, the same images as moved, the same gradients and weights."""
    ranks = recorded[world_size]
    assert equal(ranks[0]["weights"][0], plain["weights"][0])
    assert difference(ranks[0]["gradients"][0], plain["gradients"][0]) < 3e-6
    for step in range(STEPS):
        images, labels = plain["batches"][step]
        for r, rank in enumerate(ranks):
            assert torch.equal(rank["batches"][step][0], images[r::world_size])
            assert torch.equal(rank["batches"][step][1], labels[r::world_size])
        ours, theirs = ranks[0]["weights"][step + 1], plain["weights"][step + 1]
        assert difference(ours, theirs) < 1e-5
    moved = difference(plain["weights"][0], plain["weights"][STEPS])
    assert moved > 0.2  # there was something to differ by


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradients_are_the_mean_over_all_images_of_the_step(recorded, world_size):
    """On every rank, and in the last step too, where the ranks have only a few images left."""
    ranks = recorded[world_size]
    model = SmoothNet()
    lengths = [len(labels) for _, labels in ranks[0]["batches"]]
    assert 0 < lengths[-1] < lengths[0]
    for step in range(len(lengths)):
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), ranks[0]["weights"][step]):
                ours.copy_(theirs)
        images = torch.cat([rank["batches"][step][0] for rank in ranks])
        labels = torch.cat([rank["batches"][step][1] for rank in ranks])
        smoothing = train_ddp.LABEL_SMOOTHING
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        mean = torch.autograd.grad(loss, list(model.parameters()))
        for rank in ranks:
            assert difference(rank["gradients"][step], mean) < 1e-5


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_hold_identical_weights_after_each_step(recorded, world_size):
    for other in recorded[world_size][1:]:
        for ours, theirs in zip(
            recorded[world_size][0]["weights"], other["weights"], strict=True
        ):
            assert equal(ours, theirs)


def train_two_epochs(folder: Path) -> list[tuple]:
    batches, train_step = [], train_ddp.train_step

    def on_step(ddp, optimizer, batch) -> torch.Tensor:
        batches.append(batch)
        return train_step(ddp, optimizer, batch)

    train_one_epoch(folder, None, on_step, epoch=2)
    return batches


def test_the_second_epoch_has_another_order_and_other_shifts(tmp_path):
    """Nothing would look wrong if both repeated those of the first."""
    [batches] = in_ranks(1, train_two_epochs, tmp_path)
    steps = len(batches) // 2
    epochs = [
        [torch.cat(parts) for parts in zip(*half)]
        for half in (batches[:steps], batches[steps:])
    ]
    [first, second] = [labels for _, labels in epochs]
    assert first.bincount().equal(second.bincount())  # the same images
    assert (first == second).float().mean() < 0.2  # 1 of 10 agrees by chance
    pixels = [{image.numpy().tobytes() for image in images} for images, _ in epochs]
    assert len(pixels[0] & pixels[1]) < len(first) / 4  # 1 of 9 by chance


def train_resumed(folder: Path) -> None:
    """Train an epoch, and again from each of the checkpoints that this has left midway."""
    train_one_epoch(folder / "straight", 3)
    for path in checkpoints(folder / "straight")[:-1]:
        if dist.get_rank() == 0:
            (folder / path.stem).mkdir()
            shutil.copy(path, folder / path.stem)
        train_one_epoch(folder / path.stem, None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_resumed_at_any_checkpoint_the_outcome_is_bit_equal(tmp_path, world_size):
    """With three ranks and more, even the order of summation must not change.

    The ranks add up their losses at other steps, as only the first run saves midway.
    """
    in_ranks(world_size, train_resumed, tmp_path)
    states = [newest(folder) for folder in tmp_path.iterdir()]
    assert len(states) > 6
    assert len({state.pop("seconds") for state in states}) == len(states)
    assert {state["step"] for state in states} == {STEPS + 1}
    assert len({state["loss_sum"] for state in states}) == 1
    assert len({checksum(folder) for folder in tmp_path.iterdir()}) == 1


class Normed(nn.Module):
    """A network that keeps statistics of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.float())


def settle_normed() -> bool:
    ddp = DistributedDataParallel(Normed())
    before = copies(ddp.state_dict().values())
    train_ddp.settle_buckets(ddp, small_set()[2].images[:1])
    assert not any(p.grad is not None and p.grad.any() for p in ddp.parameters())
    return equal(ddp.state_dict().values(), before)


def test_to_settle_the_buckets_leaves_weights_and_batch_statistics_alone():
    assert in_ranks(2, settle_normed) == [True, True]


# Other processes take over


def test_another_number_of_ranks_takes_over_without_repeating_an_image():
    """2, then 3, 1 and 4 ranks take images where those before stopped, mid-epoch."""
    digits = Digits(torch.zeros(1000, 28, 28, dtype=torch.uint8), torch.arange(1000))
    position, taken, last_steps = 0, [], []
    for size, steps in (2, 7), (3, 5), (1, 3), (4, 99):
        shares = []
        for rank in range(size):
            sampler = ShardSampler(digits, size, rank)
            sampler.set_epoch(0, position)
            loader = DataLoader(digits, 8, sampler=sampler, collate_fn=tuple)
            shares.append([labels.tolist() for _, labels in loader][:steps])
        for step in zip(*shares, strict=True):
            for labels in step:
                taken += labels
                position += len(labels)
            last_steps.append(len(step))
    assert {*last_steps} == {1, 2, 3, 4}
    assert len(taken) == len({*taken}) == position
    assert 1000 - position < 4


@pytest.mark.slow
def test_runs_of_three_then_of_one_process_resume_mid_epoch(midway, start, tmp_path):
    folder = midway.parent
    job = start(command(*EPOCH, "--world_size", 3, "--save_every", 10))
    wait_for_progress(job, folder)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    assert "world_size from 2 to 3" in job.output()
    after_two, after_three = torch.load(midway, weights_only=True), newest(folder)
    steps = after_three["step"] - after_two["step"]
    assert after_three["images"] - after_two["images"] == steps * 3 * 32

    ended = run(command(*EPOCH, "--world_size", 1), tmp_path)
    assert ended.returncode == 0
    assert "world_size from 3 to 1" in ended.stdout
    [record] = newest(folder)["history"]
    used = record["images_per_second"] * record["seconds"]
    assert used == pytest.approx(10000)
    steps = record["step"] - after_three["step"]
    assert steps == -(-(10000 - after_three["images"]) // 32)
    assert record["test_accuracy"] > 0.95


# Several nodes

LEAVE_WEIGHTS = """
import atexit, os, torch
models = []
class Model(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, **kwargs):
        super().__init__(module, **kwargs)
        models.append(module)
torch.nn.parallel.DistributedDataParallel = Model
atexit.register(lambda: torch.save(models[0].state_dict(), "weights.pt"))
"""


@pytest.fixture
def agent(start, tmp_path):
    """Start a torchrun agent in a folder of its own; agents of a test find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "leave_weights.py"
    text = f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n{LEAVE_WEIGHTS}"
    script.write_text(f"{text}\nexec(compile({SCRIPT.read_text()!r}, 'x', 'exec'))\n")

    def start_agent(name: str, nodes: str, *flags: object, prefix=(), first=None):
        (tmp_path / name).mkdir(exist_ok=True)
        options = [f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=3"]
        options += ["--rdzv_conf=last_call_timeout=2,keep_alive_interval=1"]
        options += ["--rdzv_backend=c10d", "--rdzv_id=test"]
        options += [f"--rdzv_endpoint={first or '127.0.0.1'}:{port}"]
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if not first:
            options += ["--local_addr=127.0.0.1"]
            env |= {"GLOO_SOCKET_IFNAME": "lo"}
        cmd = [*prefix, sys.executable, "-m", "torch.distributed.run", *options]
        cmd += [str(script), *map(str, flags), "--data_dir", str(SAMPLE)]
        return start(cmd, tmp_path / name, **env)

    return start_agent


def resume_as_a_machine(folders: list[Path], args: dict) -> tuple:
    os.environ["LOCAL_RANK"] = "0"
    args = SimpleNamespace(**args | {"checkpoint_dir": folders[dist.get_rank()]})
    model = ConvNet()
    optimizer = torch.optim.AdamW(model.parameters())
    resumed = train_ddp.Run(args, model, optimizer)
    path = train_ddp.resume(resumed)
    weights = copies(model.parameters())
    position = resumed.epoch, resumed.images, resumed.step, resumed.loss_sum
    return path.name, weights, position, optimizer.state_dict()


@pytest.mark.parametrize("finder", [0, 1])
def test_all_ranks_resume_from_the_newest_checkpoint_that_any_has(
    midway, straight, tmp_path, finder
):
    newer = shutil.copy(checkpoints(straight(2))[1], tmp_path)
    state = newest(tmp_path)
    folders = [midway.parent] * 2
    folders[finder] = tmp_path
    for name, weights, position, optimizer in in_ranks(
        2, resume_as_a_machine, folders, state["args"]
    ):
        assert name == Path(newer).name
        assert equal(weights, state["model"].values())
        keys = "epoch", "images", "step", "loss_sum"
        assert position == tuple(state[key] for key in keys)
        moments = optimizer["state"][0]["exp_avg"]
        assert torch.equal(moments, state["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.slow
def test_two_nodes_resume_where_only_one_has_checkpoints(
    midway, straight, agent, tmp_path
):
    shutil.copytree(midway.parent, tmp_path / "first" / "checkpoints")
    jobs = [agent(name, "2", *EPOCH) for name in ("first", "second")]
    assert [job.wait(90) for job in jobs] == [0, 0]
    output = jobs[0].output() + jobs[1].output()
    [start_line] = re.findall(r"^start .*", output, re.MULTILINE)
    assert midway.name in start_line
    weights = [
        torch.load(tmp_path / name / "weights.pt", weights_only=True)
        for name in ("first", "second")
    ]
    assert equal([*weights[0].values()], [*weights[1].values()])
    [result] = tmp_path.glob("*/checkpoints/epoch00001*.pt")
    assert same_result(result.parent, straight(2))


@pytest.fixture(params=["namespaces", "loopback"])
def machines(request):
    """Two names, each with the prefix of commands on that machine."""
    with contextlib.ExitStack() as stack:
        try:
            joined = stack.enter_context(two_machines())
        except OSError as error:
            if request.param == "namespaces":
                pytest.skip(f"two machines cannot be simulated here: {error}")
            joined = {"first": [], "second": []}
        else:
            if request.param == "loopback":
                pytest.skip("the same is tested between two network namespaces")
        yield joined


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_restart_after_a_killed_worker(
    straight, agent, machines, tmp_path
):
    first = next(iter(machines)) if all(machines.values()) else None
    flags = *EPOCH, "--save_every", 20
    jobs = [
        agent(name, "2", *flags, prefix=prefix, first=first)
        for name, prefix in machines.items()
    ]
    wait_until(lambda: [*tmp_path.glob("*/checkpoints/epoch*.pt")], 90, jobs[0])
    [worker] = [pid for pid in jobs[1].workers() if runs(pid, "leave_weights")]
    os.kill(worker, signal.SIGKILL)
    assert [job.wait(90) for job in jobs] == [0, 0], jobs[0].output()
    output = jobs[0].output() + jobs[1].output()
    assert len(re.findall("^start .*from scratch", output, re.MULTILINE)) == 1
    assert re.search(r"^start .*epoch00000-image", output, re.MULTILINE)
    [result] = tmp_path.glob("*/checkpoints/epoch00001*.pt")
    assert same_result(result.parent, straight(2))


@pytest.mark.slow
def test_a_node_joins_and_is_killed_and_training_continues(agent, tmp_path):
    flags = "--epochs", 1000, "--batch_size", 16, "--save_every", 50
    first = agent("first", "1:2", *flags)
    folder = tmp_path / "first" / "checkpoints"
    first.wait_for("processes  1 on", 90)
    wait_for_progress(first, folder)
    second = agent("second", "1:2", *flags)
    wait_until(
        lambda: "processes  2 on" in first.output() + second.output(), 90, second
    )
    wait_until(lambda: checkpoints(folder), 90, first)
    for pid in [second.process.pid, *second.workers()]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: first.output().count("processes  1 on") == 2, 120, first)
    wait_for_progress(first, folder)
    first.process.send_signal(signal.SIGTERM)
    first.wait()
    # The first time it stopped was when torchrun had to let the other node in.
    assert re.findall(STOPPED, first.output())[-1].endswith(
        checkpoints(folder)[-1].name
    )
    positions = re.findall(
        r"^start .*epoch(\d+)-image(\d+)", first.output(), re.MULTILINE
    )
    assert positions == sorted(positions)
