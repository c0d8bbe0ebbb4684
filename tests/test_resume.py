"""The same run, whatever happens: interrupted anywhere, and with any number of processes."""

import os
import re
import shutil
import signal
import socket
import sys
import time
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
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import train_ddp
from data import Dataset, Digits, batches, load_mnist
from model import create_model, create_optimizers, optimizer_step

EPOCH = "--epochs", 1, "--batch_size", 32  # 157 steps of two processes
# Another number of threads rounds differently, and they wait for each other on busy cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
STOPPED = r"stopped; (\S+\.pt) .*rerun.*"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an undisturbed run of so many processes, with a checkpoint midway."""
    folders = {}

    def folder(world_size: int) -> Path:
        if world_size not in folders:
            cwd = tmp_path_factory.mktemp(f"straight{world_size}")
            flags = "--world_size", world_size, "--save_every", 50
            assert run(command(*EPOCH, *flags), cwd, **ONE_THREAD).returncode == 0
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
    epochs = [record["epoch"] for record in newest(folder)["progress"]["history"]]
    lines = len((folder / "metrics.jsonl").read_text().splitlines())
    return epochs == [1] and lines == 1 and checksum(folder) == checksum(other)


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


@pytest.mark.parametrize("world_size", [1, 3])
def test_killed_then_stopped_then_rerun_equals_straight(
    straight, start, tmp_path, world_size
):
    folder = tmp_path / "checkpoints"
    cmd = command(*EPOCH, "--world_size", world_size, "--save_every", 20)

    job = start(cmd, **ONE_THREAD)
    wait_for_progress(job, folder)
    pids = trainers(job)
    assert len(pids) == world_size
    os.kill(pids[-1], signal.SIGKILL)
    assert job.wait() == (-9 if world_size == 1 else 137)
    assert not any(map(alive, pids))

    signum = signal.SIGTERM if world_size == 1 else signal.SIGINT
    job = start(cmd, **ONE_THREAD)
    wait_for_progress(job, folder)
    job.process.send_signal(signum)
    assert job.wait() == 128 + signum
    assert re.search(r"^start .*epoch00000-image", job.output(), re.MULTILINE)
    assert len(re.findall(STOPPED, job.output())) == 1

    assert run(cmd, tmp_path, **ONE_THREAD).returncode == 0
    assert same_result(folder, straight(world_size))


def test_stopped_by_any_signal_to_anyone_all_ranks_leave_at_one_step(
    straight, start, tmp_path
):
    """Six times in one run, by both launchers in turn; the end is that of a straight run."""
    folder = tmp_path / "checkpoints"
    flags = *EPOCH, "--world_size", 2, "--save_every", 5, "--keep", 100
    for launcher, signum, to_all in [
        (None, signal.SIGTERM, False),
        (None, signal.SIGINT, True),
        (2, signal.SIGTERM, False),
        (None, signal.SIGHUP, True),
        (2, signal.SIGINT, True),
        (None, signal.SIGKILL, False),
    ]:
        job = start(command(*flags, torchrun=launcher))
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
        assert code == 128 + signum if not launcher else code != 0
        [named] = re.findall(STOPPED, output)
        assert named == f"checkpoints/{checkpoints(folder)[-1].name}"
        progress = newest(folder)["progress"]
        assert progress["images"] == progress["step"] * 2 * 32
        if not launcher:
            assert "Traceback" not in output and "rror" not in output
    assert run(command(*flags), tmp_path).returncode == 0
    assert same_result(folder, straight(2))


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


def test_a_second_signal_ends_even_a_run_that_cannot_obey_the_first(start, tmp_path):
    cmd = command("--epochs", 100, "--world_size", 2, "--save_every", 10)
    job = start(cmd)
    wait_for_progress(job, tmp_path / "checkpoints")
    everyone = [job.process.pid, *job.workers()]
    frozen = trainers(job)[1]
    os.kill(frozen, signal.SIGSTOP)
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(
        signal.SIGINT
    )  # as a terminal and a launcher may deliver it
    time.sleep(1.5)  # what comes more than a second later is meant
    assert job.process.poll() is None
    assert alive(frozen)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(10) != 0
    wait_until(lambda: not any(map(alive, everyone)), 10)
    assert not re.search(STOPPED, job.output())


def test_torchrun_restarts_a_killed_worker_and_the_result_is_the_same(
    straight, start, tmp_path
):
    cmd = command(*EPOCH, "--save_every", 20, torchrun=2)
    at = cmd.index("--nproc_per_node=2")
    job = start([*cmd[:at], "--standalone", "--max-restarts=3", *cmd[at:]])
    wait_for_progress(job, tmp_path / "checkpoints")
    os.kill(trainers(job)[1], signal.SIGKILL)
    assert job.wait(90) == 0
    assert re.search(r"^start .*epoch00000-image", job.output(), re.MULTILINE)
    assert same_result(tmp_path / "checkpoints", straight(2))


# The number of processes

STEPS, GLOBAL_BATCH, LEFT_OVER = 20, 128, 50
EPOCHS = 10  # are planned, as in the default command on the sample; one is trained
TOTAL = STEPS * GLOBAL_BATCH + LEFT_OVER


def small_set() -> Dataset:
    _, train, test = load_mnist(SAMPLE)
    return Dataset("some digits", Digits(*(x[:TOTAL] for x in train)), test)


def arguments(batch_size: int, **more) -> SimpleNamespace:
    size = dist.get_world_size()
    flags = {"epochs": EPOCHS, "batch_size": batch_size, "world_size": size}
    flags |= {
        "lr": 0.01,
        "seed": 3,
        "save_every": None,
        "keep": 99,
        "checkpoint_dir": None,
    }
    return SimpleNamespace(**flags | more)


def create_run(args, digits, checkpoint: Path | None = None) -> train_ddp.Run:
    """A run from scratch, or one that takes up a checkpoint, as `train` creates it."""
    settings = train_ddp.settings_of(args, digits)
    found = (str(checkpoint), checkpoint.read_bytes()) if checkpoint else None
    model = create_model(args.seed)
    path, *rest = train_ddp.load_newest(found, model, settings, dist.group.WORLD)
    assert path == (str(checkpoint) if checkpoint else None)
    return train_ddp.create_run(args, digits, model, *rest, torch.device("cpu"))


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def train_recorded(batch_size: int) -> dict[str, list]:
    """Train an epoch as one rank; for each step: its batch, weights before it, gradient."""
    created = create_run(arguments(batch_size), small_set())
    parameters = list(created.model.parameters())
    record = {"batches": [], "weights": [copies(parameters)], "gradients": []}

    def recorded_batches(*args):
        for batch in batches(*args):
            record["batches"].append(batch[:2])
            yield batch
            record["weights"].append(copies(parameters))

    def before_step(*_) -> None:
        if len(record["gradients"]) < len(record["batches"]):  # the first optimizer
            record["gradients"].append(copies(p.grad for p in parameters))

    train_ddp.batches = recorded_batches
    register_optimizer_step_pre_hook(before_step)
    train_ddp.train_epoch(created, SimpleNamespace(signum=0))
    return record


@pytest.fixture(scope="module")
def recorded():
    """What each rank saw and computed, for 1 x 128, 2 x 64, 3 x 43 and 4 x 32 images."""
    sizes = {1: 128, 2: 64, 3: 43, 4: 32}
    return {size: in_ranks(size, train_recorded, sizes[size]) for size in sizes}


@pytest.fixture(scope="module")
def plain() -> dict[str, list]:
    """The same training by one process, with no DDP, no sampler and images moved one by one."""
    _, (images, labels), _ = small_set()
    order = torch.Generator().manual_seed(data.derive_seed("order", 3))
    moves = torch.Generator().manual_seed(data.derive_seed("shift", 3, 0))
    span = 2 * data.MAX_SHIFT
    offsets = torch.randint(span + 1, (TOTAL, 2), generator=moves).tolist()
    model = create_model(3)
    optimizers = create_optimizers(model)
    record = {"batches": [], "weights": [copies(model.parameters())], "gradients": []}
    seen = 0
    for group in torch.randperm(TOTAL, generator=order).split(GLOBAL_BATCH):
        chosen = group.tolist()
        moved = []
        for i in chosen:
            (down, across), size = offsets[i], 28
            padded = F.pad(images[i], [data.MAX_SHIFT] * 4)
            moved.append(padded[down : down + size, across : across + size])
        batch = torch.stack(moved), labels[chosen]
        part = (seen + len(chosen) / 2) / (EPOCHS * TOTAL)
        seen += len(chosen)
        rising, falling = part / train_ddp.WARM_UP, (1 - part) / (1 - train_ddp.WARM_UP)
        loss = F.cross_entropy(
            model(batch[0]), batch[1], label_smoothing=train_ddp.LABEL_SMOOTHING
        )
        loss.backward()
        record["batches"].append(batch)
        record["gradients"].append(copies(p.grad for p in model.parameters()))
        optimizer_step(model, optimizers, 0.01 * min(rising, falling))
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
    for step in range(STEPS):
        images, labels = plain["batches"][step]
        for r, rank in enumerate(ranks):
            assert torch.equal(rank["batches"][step][0], images[r::world_size])
            assert torch.equal(rank["batches"][step][1], labels[r::world_size])
    assert difference(ranks[0]["gradients"][0], plain["gradients"][0]) < 3e-6
    # Muon rounds to bfloat16 and ReLUs have kinks: from here on, rounding grows.
    for step, bound in (1, 1e-5), (5, 5e-4), (STEPS, 1e-2):
        ours, theirs = ranks[0]["weights"][step], plain["weights"][step]
        assert difference(ours, theirs) < bound
    moved = difference(plain["weights"][0], plain["weights"][STEPS])
    assert moved > 0.2  # there was something to differ by


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradients_are_the_mean_over_all_images_of_the_step(recorded, world_size):
    """On every rank, and in the last step too, where the ranks have only a few images left."""
    ranks = recorded[world_size]
    model = create_model(0)
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


def outcome(run: train_ddp.Run) -> list[torch.Tensor]:
    """The weights and the loss of the epoch, all its digits."""
    loss_sum = torch.tensor(run.progress.loss_sum, dtype=torch.float64)
    return [*copies(run.model.parameters()), loss_sum]


def train_resumed(batch_size: int, folder: Path) -> tuple[list, list[list]]:
    """Outcome of an epoch: straight, and resumed at each of the checkpoints by a new Run."""
    never = SimpleNamespace(signum=0)
    args = arguments(batch_size, checkpoint_dir=folder, save_every=3)
    created = create_run(args, small_set())
    created.model.eval()  # as an evaluation has left it
    train_ddp.train_epoch(created, never)
    assert all(module.training for module in created.model.modules())
    straight, resumed = outcome(created), []
    dist.barrier()
    paths = checkpoints(folder)
    args.save_every = None
    for path in paths:
        created = create_run(args, small_set(), path)
        train_ddp.train_epoch(created, never)
        resumed.append(outcome(created))
    return straight, resumed


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_resumed_at_any_checkpoint_the_outcome_is_bit_equal(tmp_path, world_size):
    """With three ranks and more, even the order of summation must not change.

    The ranks add up their losses at other steps, as only the first run saves midway.
    """
    size = GLOBAL_BATCH // world_size
    for straight, resumed in in_ranks(world_size, train_resumed, size, tmp_path):
        assert len(resumed) > 5
        for one in resumed:
            assert equal(one, straight)


# Other processes take over


def test_another_number_of_ranks_takes_over_without_repeating_an_image(monkeypatch):
    """2, then 3, 1 and 4 ranks take images where those before stopped, mid-epoch."""
    labels = torch.arange(1000)
    digits = Digits(torch.zeros(1000, 28, 28, dtype=torch.uint8), labels)
    position, taken, last_steps = 0, [], []
    for size, steps in (2, 7), (3, 5), (1, 3), (4, 99):
        monkeypatch.setattr(dist, "get_world_size", lambda size=size: size)
        shares = []
        for rank in range(size):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            shares.append(list(batches(digits, 8, 0, 0, position))[:steps])
        for step in zip(*shares, strict=True):
            taken += torch.cat([labels for _, labels, _ in step]).tolist()
            position += step[0][2]
            last_steps.append(len(step))
    assert {*last_steps} == {1, 2, 3, 4}
    assert len(taken) == len({*taken}) == position
    assert 1000 - position < 4


def test_runs_of_three_then_of_one_process_go_on_mid_epoch(midway, start, tmp_path):
    folder = midway.parent
    job = start(command(*EPOCH, "--world_size", 3, "--save_every", 10))
    wait_for_progress(job, folder)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    assert "world_size from 2 to 3" in job.output()
    after_two = torch.load(midway, weights_only=True)["progress"]
    after_three = newest(folder)["progress"]
    steps = after_three["step"] - after_two["step"]
    assert after_three["images"] - after_two["images"] == steps * 3 * 32

    ended = run(command(*EPOCH, "--world_size", 1), tmp_path)
    assert ended.returncode == 0
    assert "world_size from 3 to 1" in ended.stdout
    [record] = newest(folder)["progress"]["history"]
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

    def start_agent(name: str, nodes: str, *flags: object, **env: str):
        (tmp_path / name).mkdir(exist_ok=True)
        options = [f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=3"]
        options += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
        options += ["--rdzv_id=test", "--local_addr=127.0.0.1"]
        options += ["--rdzv_conf=last_call_timeout=2,keep_alive_interval=1"]
        cmd = [sys.executable, "-m", "torch.distributed.run", *options, str(script)]
        cmd += [*map(str, flags), "--data_dir", str(SAMPLE)]
        env |= ONE_THREAD | {"GLOO_SOCKET_IFNAME": "lo"}
        return start(cmd, tmp_path / name, **env)

    return start_agent


def resume_where_found(path: Path, finder: int) -> list[torch.Tensor]:
    found = (str(path), path.read_bytes()) if dist.get_rank() == finder else None
    settings, model = newest(path.parent)["settings"], create_model(seed=1)
    train_ddp.load_newest(found, model, settings, dist.group.WORLD)
    return copies(model.parameters())


@pytest.mark.parametrize("finder", [0, 1])
def test_all_ranks_resume_from_the_checkpoint_that_any_rank_has(midway, finder):
    expected = [*torch.load(midway, weights_only=True)["model"].values()]
    for weights in in_ranks(2, resume_where_found, midway, finder):
        assert equal(weights, expected)


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


@pytest.mark.skipif(not os.environ.get("SLOW_TESTS"), reason="SLOW_TESTS is not set")
def test_a_node_joins_and_is_killed_and_training_goes_on(agent, tmp_path):
    # Without this, torch 2.14 gives a node that joins later no address to meet at.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    flags = "--epochs", 1000, "--batch_size", 16, "--save_every", 50
    first = agent("first", "1:2", *flags, **env)
    folder = tmp_path / "first" / "checkpoints"
    first.wait_for("processes  1 on", 90)
    wait_for_progress(first, folder)
    second = agent("second", "1:2", *flags, **env)
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
