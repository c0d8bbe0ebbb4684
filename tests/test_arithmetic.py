"""The arithmetic: who gets which image, and that many ranks compute what one computes."""

import contextlib
import os
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SAMPLE, checkpoints, checksum, copies, equal, in_ranks, newest
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

import data
import train_ddp
import utils
from data import Digits, ResumableSampler, load_data, make_loader
from model import ConvNet
from train_ddp import LABEL_SMOOTHING, WARM_UP, default_learning_rate

# Who gets which image


def numbered(total: int) -> Digits:
    """Random images, each labelled with its own index."""
    generator = torch.Generator().manual_seed(total)
    images = torch.randint(256, (total, 28, 28), generator=generator)
    return Digits(images.to(torch.uint8), torch.arange(total))


def deal(
    world_size: int, digits: Digits, size: int, seed: int, epoch: int, start: int = 0
) -> list[list[list[Tensor]]]:
    """Load as each of `world_size` ranks, as `train` does: [rank][step] -> images, labels."""
    digits.set_epoch(seed, epoch)
    dealt = []
    for rank in range(world_size):
        sampler = ResumableSampler(digits, world_size, rank, seed=seed)
        sampler.set_epoch(epoch, start)
        loader = make_loader(digits, size, sampler)
        dealt.append(list(loader))
        assert len(loader) == len(dealt[-1])
    return dealt


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [96, 97, 98, 99, 100, 2])
def test_each_step_takes_the_next_images_of_one_permutation(world_size, total):
    """From any start, no image comes twice, and fewer than world_size are left out."""
    digits = numbered(total)
    [whole] = deal(1, digits, 8, seed=5, epoch=3)
    order = torch.cat([labels for _, labels in whole])
    pictures = dict(zip(order.tolist(), torch.cat([images for images, _ in whole])))
    torch_sampler = DistributedSampler(digits, 1, 0, seed=5)
    torch_sampler.set_epoch(3)
    assert order.tolist() == list(torch_sampler)
    for start in {0, 1, 7, 32, 48, total - 1, total} & {*range(total + 1)}:
        position = start
        for step in zip(*deal(world_size, digits, 8, 5, 3, start), strict=True):
            expected = order[position : position + world_size * 8]
            usable = len(expected) // world_size * world_size
            for rank, (images, labels) in enumerate(step):
                assert torch.equal(labels, expected[rank:usable:world_size])
                # The same shift, whichever rank takes the image.
                same = [pictures[label] for label in labels.tolist()]
                assert torch.equal(images, torch.stack(same))
            position += usable
        assert 0 <= total - position < world_size


def test_order_and_shifts_follow_from_seed_and_epoch_alone():
    digits = numbered(1000)
    first = deal(1, digits, 1000, 0, 0)[0][0]
    torch.rand(7)  # The global generator has no influence.
    again = deal(1, digits, 1000, 0, 0)[0][0]
    assert equal(first, again)
    for seed, epoch in [(0, 1), (7, 0), (7, 1)]:
        other = deal(1, digits, 1000, seed, epoch)[0][0]
        assert (first[1] == other[1]).sum() < 20  # 1 of 1000 agrees by chance.
        pairs = zip(first[0][first[1].argsort()], other[0][other[1].argsort()])
        assert sum(a.equal(b) for a, b in pairs) < 200  # 1 of 9 by chance.


def test_another_number_of_ranks_takes_over_without_repeating_an_image():
    """2, then 3, 1 and 4 ranks take images where those before stopped, in mid-epoch."""
    digits = numbered(1000)
    taken = []
    last_steps = set()
    for world_size, steps in (2, 7), (3, 5), (1, 3), (4, 99):
        ranks = deal(world_size, digits, 8, 0, 0, start=len(taken))
        for step in list(zip(*ranks, strict=True))[:steps]:
            taken += torch.cat([labels for _, labels in step]).tolist()
            last_steps.add(len(step))
    assert last_steps == {1, 2, 3, 4}
    assert len(taken) == len({*taken})
    assert 1000 - len(taken) < 4


def test_shifts_reach_all_distances_and_are_those_of_a_plain_loop():
    images = numbered(300).padded[:, 3:8, 3:12]  # Any height and width will do.
    digits = Digits(images, torch.arange(300))
    assert torch.equal(digits[7][0], images[7])  # Until an epoch is set, as in tests.
    digits.set_epoch(seed=2, epoch=3)
    generator = torch.Generator().manual_seed(2 + 3)
    reach = data.MAX_SHIFT
    moves = torch.randint(2 * reach + 1, (300, 2), generator=generator) - reach
    assert len(moves.unique(dim=0)) == (2 * reach + 1) ** 2
    for i, (down, right) in enumerate(moves.tolist()):
        expected = torch.zeros(5, 9, dtype=torch.uint8)
        for y in range(5):
            for x in range(9):
                if 0 <= y + down < 5 and 0 <= x + right < 9:
                    expected[y, x] = images[i, y + down, x + right]
        assert torch.equal(digits[i][0], expected)


# Training as many ranks

STEPS = 12
GLOBAL_BATCH = 64
TOTAL = STEPS * GLOBAL_BATCH + 28
EPOCHS = 5  # Are planned; one is trained.
BATCH = {1: 64, 2: 32, 3: 22, 4: 16}  # Images per rank and step.
PEAK = 0.015


def small_set(data_dir=None, download=False) -> tuple[str, Digits, Digits]:
    images, labels = data.read(SAMPLE, train=True)
    test_set = load_data(SAMPLE, download=False)[2]
    return "some digits", Digits(images[:TOTAL], labels[:TOTAL]), test_set


class SmoothNet(ConvNet):
    """The network without kinks: there a rounding error can tip a gradient by 1%."""

    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(list(self.layers)):
            if isinstance(layer, nn.ReLU | nn.MaxPool2d):
                smooth = nn.Tanh() if isinstance(layer, nn.ReLU) else nn.AvgPool2d(2)
                self.layers[i] = smooth


def train_as_rank(load, on_step, stop: list[int], **flags) -> int:
    """Call `train` in a rank that has joined the others already; return the exit code."""
    defaults = {"seed": 3, "lr": PEAK, "save_every": None, "keep": 99, "data_dir": ""}
    args = Namespace(**defaults | {"world_size": dist.get_world_size()} | flags)
    lock = utils.FolderLock(args.checkpoint_dir)
    with (
        patch("utils.join_process_group", lambda info: torch.device("cpu")),
        patch("utils.catch_stop_signals", lambda: contextlib.nullcontext(stop)),
        patch("train_ddp.load_data", load),
        patch("train_ddp.train_step", on_step),
        patch("torch.distributed.destroy_process_group"),
    ):
        try:
            return train_ddp.train(args, None, lock)
        finally:
            lock.release()


def train_small(
    folder: Path, save_every: int | None, on_step=train_ddp.train_step, epochs: int = 1
) -> None:
    """Train on the small set; stop after the last step of the epoch."""
    batch_size = BATCH[dist.get_world_size()]
    stop = []
    last_steps = []

    def step(run, ddp, images, labels) -> Tensor:
        assert all(module.training for module in ddp.modules())
        if len(labels) < batch_size:
            last_steps.append(1)
            if len(last_steps) == epochs:
                stop.append(signal.SIGTERM)
        return on_step(run, ddp, images, labels)

    flags = {"epochs": EPOCHS, "batch_size": batch_size, "save_every": save_every}
    code = train_as_rank(small_set, step, stop, checkpoint_dir=folder, **flags)
    assert code == 128 + signal.SIGTERM


def train_recorded(folder: Path) -> dict[str, list]:
    """Train an epoch as one rank; for each step: its batch, weights before it, gradients."""
    record = {"batches": [], "weights": [], "gradients": []}
    train_step = train_ddp.train_step

    def before_step(optimizer, *_) -> None:
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        record["gradients"].append(copies(gradients))

    def on_step(run, ddp, images, labels) -> Tensor:
        parameters = list(ddp.parameters())
        if not record["batches"]:
            record["weights"].append(copies(parameters))
            run.optimizer.register_step_pre_hook(before_step)
        record["batches"].append((images, labels))
        loss = train_step(run, ddp, images, labels)
        record["weights"].append(copies(parameters))
        return loss

    train_ddp.ConvNet = SmoothNet
    train_small(folder, None, on_step)
    return record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What each rank saw and computed, for each number of ranks."""
    folder = tmp_path_factory.mktemp("recorded")
    return {size: in_ranks(size, train_recorded, folder / str(size)) for size in BATCH}


@pytest.fixture(scope="module")
def plain() -> dict[str, list]:
    """The same training as a plain loop: no DDP, no sampler, no loader."""
    _, digits, _ = small_set()
    digits.set_epoch(3, 0)
    torch.manual_seed(3)
    model = SmoothNet()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95))
    record = {"batches": [], "weights": [copies(model.parameters())], "gradients": []}
    seen = 0
    order = torch.randperm(TOTAL, generator=torch.Generator().manual_seed(3))
    for chosen in order.split(GLOBAL_BATCH):
        items = [digits[i] for i in chosen.tolist()]
        images = torch.stack([image for image, _ in items])
        labels = torch.tensor([label for _, label in items])
        done = (seen + len(labels) / 2) / (EPOCHS * TOTAL)
        seen += len(labels)
        rate = PEAK * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
        optimizer.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record["batches"].append((images, labels))
        record["gradients"].append(copies(p.grad for p in model.parameters()))
        record["weights"].append(copies(model.parameters()))
    return record


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to their norm."""
    a = torch.cat([tensor.flatten() for tensor in ours])
    b = torch.cat([tensor.flatten() for tensor in theirs])
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_is_that_of_a_plain_loop_without_ddp(recorded, plain, world_size):
    """The same weights at first, the same shifted images, the same gradients and weights."""
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
    assert moved > 0.2  # There was something to differ by.


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
        loss = F.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING)
        mean = torch.autograd.grad(loss, list(model.parameters()))
        for rank in ranks:
            assert difference(rank["gradients"][step], mean) < 1e-5


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_hold_identical_weights_after_each_step(recorded, world_size):
    first, *others = recorded[world_size]
    for other in others:
        for ours, theirs in zip(first["weights"], other["weights"], strict=True):
            assert equal(ours, theirs)


def train_two_epochs(folder: Path) -> list[tuple[Tensor, Tensor]]:
    batches = []
    train_step = train_ddp.train_step

    def on_step(run, ddp, images, labels) -> Tensor:
        batches.append((images, labels))
        return train_step(run, ddp, images, labels)

    train_small(folder, None, on_step, epochs=2)
    return batches


def test_the_second_epoch_has_another_order_and_other_shifts(tmp_path):
    """Nothing would look wrong if both repeated those of the first."""
    [batches] = in_ranks(1, train_two_epochs, tmp_path)
    images = torch.cat([images for images, _ in batches]).split(TOTAL)
    first, second = torch.cat([labels for _, labels in batches]).split(TOTAL)
    assert first.bincount().equal(second.bincount())  # The same images.
    assert (first == second).float().mean() < 0.2  # 1 of 10 agrees by chance.
    pixels = [{image.numpy().tobytes() for image in epoch} for epoch in images]
    assert len(pixels[0] & pixels[1]) < TOTAL / 4  # 1 of 9 by chance.


def train_resumed(folder: Path) -> None:
    """Train an epoch, and again from each of the checkpoints that this has left midway."""
    train_small(folder / "straight", 2)
    for path in checkpoints(folder / "straight")[:-1]:
        if dist.get_rank() == 0:
            (folder / path.stem).mkdir()
            shutil.copy(path, folder / path.stem)
        train_small(folder / path.stem, None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_resumed_at_any_checkpoint_the_outcome_is_bit_equal(tmp_path, world_size):
    """With three ranks and more, even the order of summation must not change.

    The ranks add up their losses at other steps, as only the first run saves midway.
    """
    in_ranks(world_size, train_resumed, tmp_path)
    states = [newest(folder)["progress"] for folder in tmp_path.iterdir()]
    assert len(states) == 7
    assert {state["step"] for state in states} == {STEPS + 1}
    assert len({state["loss_sum"] for state in states}) == 1
    assert len({checksum(folder) for folder in tmp_path.iterdir()}) == 1


def test_the_default_learning_rate_follows_the_global_batch_up_to_a_limit():
    """A batch size above the number of images has no more images in a step."""

    def rate(batch_size: int, world_size: int, total: int) -> float:
        flags = Namespace(batch_size=batch_size, world_size=world_size)
        return default_learning_rate(flags, total)

    assert rate(16, 2, 10_000) < rate(16, 4, 10_000) == rate(64, 1, 10_000)
    assert rate(32, 2, 60) == rate(99_999, 1, 60) == rate(60, 1, 60)
    # Beyond it, large batches end far below what they could reach.
    assert rate(64, 2, 10_000) <= rate(8192, 100, 10**6) <= 0.03


def add_up_in_rank() -> tuple[float, bool]:
    progress = train_ddp.Progress()
    rank = dist.get_rank()
    losses = [torch.tensor(1.0), torch.tensor(float(rank))]
    signals = [15] * (rank == 1)
    must_stop = train_ddp.add_up_losses_and_signals(progress, losses, signals)
    return progress.loss_sum, must_stop


def test_losses_and_stop_signals_are_those_of_all_ranks():
    assert in_ranks(3, add_up_in_rank) == [(6.0, True)] * 3


# Evaluation and pieces


def evaluate_some(counts: list[int]) -> list[dict]:
    images, labels = data.read(SAMPLE, train=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(ConvNet(), torch.nn.Dropout(0.5))
    args = Namespace(batch_size=64)
    run = Namespace(model=model, device=torch.device("cpu"), args=args)
    sets = [Digits(images[:count], labels[:count]) for count in counts]
    return [train_ddp.evaluate(run, test_set) for test_set in sets]


def test_evaluation_counts_each_image_once_at_any_number_of_ranks():
    """Also where some ranks get fewer images than others, or none; and without dropout."""
    counts = [1, 2, 3, 100, 1999]
    images, labels = data.read(SAMPLE, train=False)
    torch.manual_seed(0)
    model = ConvNet()
    with torch.inference_mode():
        logits = model(images)
    for results in in_ranks(3, evaluate_some, counts):
        for n, result in zip(counts, results, strict=True):
            right = int((logits[:n].argmax(1) == labels[:n]).sum())
            loss = F.cross_entropy(logits[:n], labels[:n]).item()
            assert result == {
                "test_loss": pytest.approx(loss, rel=1e-5),
                "test_accuracy": right / n,
            }


class Normed(nn.Module):
    """A network that keeps statistics of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float())


def settle_normed() -> bool:
    ddp = DistributedDataParallel(Normed())
    before = copies(ddp.state_dict().values())
    train_ddp.settle_buckets(ddp, numbered(1))
    assert not any(p.grad is not None and p.grad.any() for p in ddp.parameters())
    return equal(ddp.state_dict().values(), before)


def test_to_settle_the_buckets_leaves_weights_and_batch_statistics_alone():
    assert in_ranks(2, settle_normed) == [True, True]


def scheduling_policies() -> list[int]:
    """The scheduling policies of the threads of gloo."""
    tasks = [*Path("/proc/self/task").iterdir()]
    named = [task for task in tasks if "gloo" in (task / "comm").read_text()]
    if not named:  # As with torch 2.10: those that started last.
        named = sorted(tasks, key=lambda task: int(task.name))[-2:]
    return [os.sched_getscheduler(int(task.name)) for task in named]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has it")
def test_the_threads_of_gloo_are_scheduled_as_batch_jobs():
    """Otherwise they preempt each other: two ranks lose a third of their speed."""
    for policies in in_ranks(2, scheduling_policies):
        assert policies and {*policies} == {os.SCHED_BATCH}


# A data set of one's own

PICTURES = {"train": 62, "test": 20}


class Pictures(ImageFolder):
    """A folder of pictures; its random transforms belong to (seed, epoch, picture)."""

    def set_epoch(self, seed: int, epoch: int) -> None:
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, self.epoch, index)))
            return super().__getitem__(index)


class PictureNet(nn.Sequential):
    def __init__(self) -> None:
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
        super().__init__(*layers)


@pytest.fixture
def pictures(tmp_path):
    """A folder of small pictures: the red of each is its number, half of it is green."""
    folder = tmp_path / "pictures"
    for part, count in PICTURES.items():
        for name in "cats", "dogs":
            (folder / part / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.new("RGB", (8, 8), (4 * (i + 1), 0, 0))
            picture.paste((4 * (i + 1), 255, 0), (0, 0, 4, 8))
            name = "cats" if i < count / 3 else "dogs"
            picture.save(folder / part / name / f"{i:02}.png")
    yield folder
    shutil.rmtree(folder)


def load_pictures(data_dir: Path, download: bool) -> tuple[str, Pictures, ImageFolder]:
    crop = transforms.RandomCrop(8, padding=2)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    train_set = Pictures(data_dir / "train", transforms.Compose(steps))
    return "pictures", train_set, ImageFolder(data_dir / "test", transforms.ToTensor())


def train_on_pictures(
    pictures: Path, folder: Path, stop_at: int | None
) -> list[Tensor]:
    """Train as one rank with loader workers; return the pictures as the network got them."""
    data.LOADER_WORKERS = 2
    train_ddp.ConvNet = PictureNet
    train_step = train_ddp.train_step
    seen = []
    steps = []
    stop = []

    def on_step(run, ddp, images, labels) -> Tensor:
        seen.extend(images)
        steps.append(len(labels))
        if len(steps) == stop_at:
            stop.append(signal.SIGTERM)
        return train_step(run, ddp, images, labels)

    flags = {"epochs": 2, "batch_size": 4, "save_every": 2, "data_dir": pictures}
    train_as_rank(load_pictures, on_step, stop, checkpoint_dir=folder, **flags)
    return seen


def train_straight_and_resumed(pictures: Path, folder: Path) -> list[list[Tensor]]:
    straight = train_on_pictures(pictures, folder / "straight", None)
    stopped = train_on_pictures(pictures, folder / "resumed", 4)
    return [straight, stopped, train_on_pictures(pictures, folder / "resumed", None)]


def test_pictures_of_ones_own_with_random_transforms_and_loader_workers(
    pictures, tmp_path
):
    """Three ranks, stopped in mid-epoch and resumed: each picture comes once, as it would
    have come without the stop. Only `load_data` and the model are replaced."""
    ranks = in_ranks(3, train_straight_and_resumed, pictures, tmp_path)
    taken = []
    for straight, stopped, resumed in ranks:
        assert len(stopped) == 4 * 4
        assert equal([*stopped, *resumed], straight)
        taken += [round(255 * image[0].max().item()) for image in straight[:20]]
    assert len(taken) == len({*taken}) == 60
    # Of each picture only how it was moved and flipped: ranks must not do that alike.
    moves = [[image > 0 for image in straight] for straight, _, _ in ranks]
    assert not equal(moves[0], moves[1]) and not equal(moves[1], moves[2])
    assert not equal(moves[0][:20], moves[0][20:])
    assert checksum(tmp_path / "straight") == checksum(tmp_path / "resumed")

    state = newest(tmp_path / "straight")
    model = PictureNet()
    model.load_state_dict(state["model"])
    test_set = load_pictures(pictures, download=False)[2]
    right = [model(image[None]).argmax().item() == label for image, label in test_set]
    accuracy = state["progress"]["history"][-1]["test_accuracy"]
    assert accuracy == sum(right) / len(test_set) == sum(right) / PICTURES["test"]
