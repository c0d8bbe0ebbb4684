"""The arithmetic: who gets which image, and that many ranks compute what one computes."""

import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
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
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DistributedSampler, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

import data
import train_ddp
import utils
from data import MAX_SHIFT, Digits, ResumableSampler, make_loader
from model import ConvNet
from train_ddp import LABEL_SMOOTHING, WARM_UP, default_learning_rate

# Who gets which image


def numbered(total: int) -> Digits:
    """Small random images, each labelled with its own index."""
    generator = torch.Generator().manual_seed(total)
    images = torch.randint(1, 256, (total, 5, 9), generator=generator)
    return Digits(images.to(torch.uint8), torch.arange(total))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [96, 97, 98, 99, 100, 2])
def test_each_step_takes_the_next_images_of_one_permutation(world_size, total):
    """From any start, no image comes twice, and fewer than world_size are left out.

    So another number of ranks can take over after any step, without repeating an image.
    """
    digits = numbered(total)
    digits.set_epoch(5, 3)
    torch_sampler = DistributedSampler(digits, 1, 0, seed=5)
    torch_sampler.set_epoch(3)
    order = torch.tensor(list(torch_sampler))
    for start in {0, 1, 7, 32, 48, total - 1, total} & {*range(total + 1)}:
        loaders = []
        for rank in range(world_size):
            sampler = ResumableSampler(digits, world_size, rank, seed=5)
            sampler.set_epoch(3, start)
            loaders.append(make_loader(digits, 8, sampler))
        position = start
        for step in zip(*loaders, strict=True):
            expected = order[position : position + world_size * 8]
            usable = len(expected) // world_size * world_size
            for rank, (images, labels) in enumerate(step):
                assert torch.equal(labels, expected[rank:usable:world_size])
                assert equal(images, [digits[i][0] for i in labels.tolist()])
            position += usable
        assert 0 <= total - position < world_size


def test_order_and_shifts_follow_from_seed_and_epoch_alone():
    digits = numbered(1000)

    def draw(seed: int, epoch: int) -> list[Tensor]:
        sampler = ResumableSampler(digits, 1, 0, seed=seed)
        sampler.set_epoch(epoch)
        digits.set_epoch(seed, epoch)
        return [torch.tensor(list(sampler)), *(digits[i][0] for i in range(1000))]

    first = draw(0, 0)
    torch.rand(7)  # The global generator has no influence.
    again = draw(0, 0)
    assert equal(first, again)
    for seed, epoch in [(0, 1), (7, 0), (7, 1)]:
        other = draw(seed, epoch)
        assert (first[0] == other[0]).sum() < 20  # 1 of 1000 agrees by chance.
        same = [a.equal(b) for a, b in zip(first[1:], other[1:], strict=True)]
        assert sum(same) < 200  # 1 of 9 by chance.


def test_images_are_moved_by_all_distances_and_filled_up_with_zeros():
    """And left alone until an epoch is set, as in a test set."""
    digits = numbered(300)
    originals = [digits[i][0] for i in range(300)]
    digits.set_epoch(seed=2, epoch=3)
    moves = set()
    for i, original in enumerate(originals):
        padded = F.pad(original, [MAX_SHIFT] * 4)
        parts = padded.unfold(0, 5, 1).unfold(1, 9, 1).flatten(0, 1)
        assert original.all()
        [move] = [n for n, part in enumerate(parts) if part.equal(digits[i][0])]
        moves.add(move)
    assert len(moves) == (2 * MAX_SHIFT + 1) ** 2


# Training as many ranks

BATCH = {1: 64, 2: 32, 3: 22, 4: 16}  # Images per rank and step.
TOTAL = 6 * 64 + 28  # The last of an epoch's seven steps is smaller.
EPOCHS = 2
SEED = 3
PEAK = 0.015


def train_as_rank(
    folder: Path, on_step: Callable = train_ddp.train_step, **flags
) -> None:
    """Call `train` in a rank that has joined the others already."""
    world_size = dist.get_world_size()
    defaults = {"world_size": world_size, "batch_size": BATCH[world_size], "lr": PEAK}
    defaults |= {"epochs": EPOCHS, "seed": SEED, "save_every": None, "keep": 99}
    args = Namespace(checkpoint_dir=folder, **defaults | {"data_dir": ""} | flags)
    lock = utils.FolderLock(folder)
    with (
        patch("utils.join_process_group", lambda info: torch.device("cpu")),
        patch("train_ddp.train_step", on_step),
        patch("torch.distributed.destroy_process_group"),
    ):
        train_ddp.train(args, None, lock)
    lock.release()


def small_set(data_dir=None, download=False) -> tuple[str, Digits, Digits]:
    images, labels = data.read(SAMPLE, train=True)
    test_set = Digits(images[-30:], labels[-30:])
    return "some digits", Digits(images[:TOTAL], labels[:TOTAL]), test_set


class SmoothNet(ConvNet):
    """The network without kinks: there a rounding error can tip a gradient by 1%."""

    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(self.layers):
            if isinstance(layer, nn.ReLU):
                self.layers[i] = nn.Tanh()
            elif isinstance(layer, nn.MaxPool2d):
                self.layers[i] = nn.AvgPool2d(2)


def train_and_resume(folder: Path) -> list[tuple]:
    """Train as one rank, and again from each checkpoint that this has left.

    For each step, return its images, their labels, the gradients, and the weights after it.
    """
    train_ddp.load_data = small_set
    train_ddp.ConvNet = SmoothNet
    train_step = train_ddp.train_step
    gradients = []
    steps = []

    def before_update(optimizer, *_) -> None:
        parameters = optimizer.param_groups[0]["params"]
        gradients.append(copies(p.grad for p in parameters))

    def on_step(run, ddp, images, labels) -> Tensor:
        assert all(module.training for module in ddp.modules())
        loss = train_step(run, ddp, images, labels)
        steps.append((images, labels, gradients[-1], copies(ddp.parameters())))
        return loss

    register_optimizer_step_pre_hook(before_update)
    train_as_rank(folder / "straight", on_step, save_every=4)
    for path in checkpoints(folder / "straight")[:-1]:
        if dist.get_rank() == 0:
            (folder / path.stem).mkdir()
            shutil.copy(path, folder / path.stem)
        train_as_rank(folder / path.stem)
    return steps


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def trained(request, tmp_path_factory):
    """The steps of each rank, and the folder of all checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    return in_ranks(request.param, train_and_resume, folder), folder


def train_plainly(world_size: int) -> Iterator[tuple]:
    """The same training as a plain loop: no DDP, no sampler, no loader."""
    _, digits, _ = small_set()
    torch.manual_seed(SEED)
    model = SmoothNet()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95))
    for epoch in range(EPOCHS):
        digits.set_epoch(SEED, epoch)
        generator = torch.Generator().manual_seed(SEED + epoch)
        order = torch.randperm(TOTAL, generator=generator)
        seen = epoch * TOTAL
        for chosen in order.split(world_size * BATCH[world_size]):
            count = len(chosen) // world_size * world_size
            items = [digits[i] for i in chosen[:count].tolist()]
            images, labels = default_collate(items)
            done = (seen + count / 2) / (EPOCHS * TOTAL)
            seen += count
            rate = PEAK * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            optimizer.param_groups[0]["lr"] = rate
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gradients = copies(p.grad for p in model.parameters())
            yield images, labels, gradients, copies(model.parameters())


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to their norm."""
    a = torch.cat([tensor.flatten() for tensor in ours])
    b = torch.cat([tensor.flatten() for tensor in theirs])
    return ((a - b).norm() / b.norm()).item()


def test_training_is_that_of_a_plain_loop_without_ddp(trained):
    """The same images with the same shifts, the same gradients on each rank, the same weights.

    The gradients are the mean over all images of the step, in the last one of an epoch too.
    """
    ranks, _ = trained
    plain = list(train_plainly(len(ranks)))
    for rank, steps in enumerate(ranks):
        for ours, theirs in zip(steps, plain, strict=True):
            assert torch.equal(ours[0], theirs[0][rank :: len(ranks)])
            assert torch.equal(ours[1], theirs[1][rank :: len(ranks)])
            assert difference(ours[2], theirs[2]) < 1e-5
            assert difference(ours[3], theirs[3]) < 1e-5
    # In the first step there is no difference yet that could have grown.
    assert difference(ranks[0][0][2], plain[0][2]) < 3e-6
    assert len(plain[6][1]) < len(plain[5][1])
    assert difference(plain[0][3], plain[-1][3]) > 0.2  # They have moved.


@pytest.mark.parametrize("trained", [2, 3, 4], indirect=True)
def test_all_ranks_hold_identical_weights_after_each_step(trained):
    [first, *others], _ = trained
    for other in others:
        for (*_, ours), (*_, theirs) in zip(first, other, strict=True):
            assert equal(ours, theirs)


@pytest.mark.parametrize("trained", [1], indirect=True)
def test_the_second_epoch_has_another_order_and_other_shifts(trained):
    """Nothing would look wrong if both repeated those of the first."""
    [steps], _ = trained
    images = torch.cat([step[0] for step in steps]).split(TOTAL)
    first, second = torch.cat([step[1] for step in steps]).split(TOTAL)
    assert first.bincount().equal(second.bincount())  # The same images.
    assert (first == second).float().mean() < 0.2  # 1 of 10 agrees by chance.
    pixels = [{image.numpy().tobytes() for image in epoch} for epoch in images]
    assert len(pixels[0] & pixels[1]) < TOTAL / 4  # 1 of 9 by chance.


def test_resumed_at_any_checkpoint_the_outcome_is_bit_equal(trained):
    """With three ranks and more, even the order of summation must not change.

    The ranks add up their losses at other steps, as only the first run saves midway.
    """
    _, folder = trained
    folders = [*folder.iterdir()]
    assert len(folders) == 5  # Saved after steps 4, 7, 8, 12 and 14.
    assert {newest(one)["progress"]["step"] for one in folders} == {14}
    assert len({checksum(one) for one in folders}) == 1


def test_the_default_learning_rate_follows_the_global_batch_up_to_a_limit():
    """A batch size above the number of images has no more images in a step."""

    def rate(batch_size: int, world_size: int, total: int) -> float:
        flags = Namespace(batch_size=batch_size, world_size=world_size)
        return default_learning_rate(flags, total)

    assert rate(16, 2, 10_000) < rate(16, 4, 10_000) == rate(64, 1, 10_000)
    assert rate(32, 2, 60) == rate(99_999, 1, 60) == rate(60, 1, 60)
    # Beyond it, large batches end far below what they could reach.
    assert rate(64, 2, 10_000) <= rate(8192, 100, 10**6) <= 0.03


# Single steps of a group of ranks


def add_up_in_rank() -> tuple[float, bool]:
    progress = train_ddp.Progress()
    rank = dist.get_rank()
    losses = [torch.tensor(1.0), torch.tensor(float(rank))]
    signals = [signal.SIGTERM] * (rank == 1)
    must_stop = train_ddp.add_up_losses_and_signals(progress, losses, signals)
    return progress.loss_sum, must_stop


def test_losses_and_stop_signals_are_those_of_all_ranks():
    assert in_ranks(3, add_up_in_rank) == [(6.0, True)] * 3


def evaluate_some(counts: list[int]) -> list[dict]:
    images, labels = data.read(SAMPLE, train=False)
    torch.manual_seed(0)
    model = nn.Sequential(ConvNet(), nn.Dropout(0.5))
    args = Namespace(batch_size=64)
    run = Namespace(model=model, device=torch.device("cpu"), args=args)
    sets = [Digits(images[:count], labels[:count]) for count in counts]
    return [train_ddp.evaluate(run, test_set) for test_set in sets]


def test_evaluation_counts_each_image_once_at_any_number_of_ranks():
    """Also where some ranks get fewer images than others, or none; and without dropout."""
    counts = [1, 2, 100, 1999]
    images, labels = data.read(SAMPLE, train=False)
    torch.manual_seed(0)
    with torch.inference_mode():
        logits = ConvNet()(images)
    for results in in_ranks(3, evaluate_some, counts):
        for n, result in zip(counts, results, strict=True):
            loss = F.cross_entropy(logits[:n], labels[:n]).item()
            right = int((logits[:n].argmax(1) == labels[:n]).sum())
            assert result == {
                "test_loss": pytest.approx(loss, rel=1e-5),
                "test_accuracy": right / n,
            }


def settle_normed() -> bool:
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    before = copies(ddp.state_dict().values())
    train_ddp.settle_buckets(ddp, [(torch.rand(6), 0)])
    assert not any(p.grad is not None and p.grad.any() for p in ddp.parameters())
    return equal(ddp.state_dict().values(), before)


def test_to_settle_the_buckets_leaves_weights_and_batch_statistics_alone():
    assert in_ranks(2, settle_normed) == [True, True]


def scheduling_policies() -> list[int]:
    """The scheduling policies of all threads of a rank; gloo has started all but one."""
    tasks = [*Path("/proc/self/task").iterdir()]
    return [os.sched_getscheduler(int(task.name)) for task in tasks]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has it")
def test_the_threads_of_gloo_are_scheduled_as_batch_jobs():
    """Otherwise they preempt each other: two ranks lose a third of their speed."""
    for policies in in_ranks(2, scheduling_policies):
        assert len(policies) > 1
        assert {*policies} == {os.SCHED_BATCH}


# A data set of one's own


class Pictures(ImageFolder):
    """Random transforms that belong to (seed, epoch, picture), as `load_data` advises."""

    def set_epoch(self, seed: int, epoch: int) -> None:
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            seed = (self.seed + self.epoch) * len(self) + index
            torch.default_generator.manual_seed(seed)
            return super().__getitem__(index)


def load_pictures(data_dir: Path, download: bool) -> tuple[str, Pictures, ImageFolder]:
    crop = transforms.RandomCrop(8, padding=2)
    train_set = Pictures(data_dir, transforms.Compose([crop, transforms.ToTensor()]))
    return "pictures", train_set, ImageFolder(data_dir, transforms.ToTensor())


def train_and_resume_on(pictures: Path, folder: Path) -> list[Tensor]:
    """Train as one rank with loader workers; return the pictures as the network got them."""
    data.LOADER_WORKERS = 2
    train_ddp.load_data = load_pictures
    train_ddp.ConvNet = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    train_step = train_ddp.train_step
    seen = []

    def on_step(run, ddp, images, labels) -> Tensor:
        seen.extend(images)
        if len(seen) == 4 * 4:
            signal.raise_signal(signal.SIGTERM)
        return train_step(run, ddp, images, labels)

    flags = {"batch_size": 4, "save_every": 2, "data_dir": pictures}
    train_as_rank(folder, on_step, **flags)
    assert len(seen) == 4 * 4
    train_as_rank(folder, on_step, **flags)
    return seen


def test_pictures_of_ones_own_with_random_transforms_and_loader_workers(tmp_path):
    """Three ranks, stopped in mid-epoch and resumed: each picture comes once, as it comes to a
    plain loop. Only `load_data` and the model are replaced."""
    for i in range(62):
        folder = tmp_path / "pictures" / ("cats" if i < 20 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (255 - i, 0, 0)).save(folder / f"{i:02}.png")
    folder = tmp_path / "pictures"
    ranks = in_ranks(3, train_and_resume_on, folder, tmp_path / "checkpoints")
    _, train_set, _ = load_pictures(folder, download=False)
    for epoch in range(EPOCHS):
        train_set.set_epoch(SEED, epoch)
        generator = torch.Generator().manual_seed(SEED + epoch)
        order = torch.randperm(62, generator=generator)[:60].tolist()
        expected = [train_set[i][0] for i in order]
        assert len({image.gt(0).numpy().tobytes() for image in expected}) > 9
        for rank, seen in enumerate(ranks):
            assert equal(seen[20 * epoch :][:20], expected[rank::3])

    state = newest(tmp_path / "checkpoints")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    model.load_state_dict(state["model"])
    test_set = load_pictures(folder, download=False)[2]
    right = [model(image[None]).argmax().item() == label for image, label in test_set]
    accuracy = state["progress"]["history"][-1]["test_accuracy"]
    assert accuracy == sum(right) / 62
