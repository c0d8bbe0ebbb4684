"""The arithmetic: who gets which image, and that many ranks compute what one computes."""

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    SAMPLE,
    assert_same_result,
    checkpoints,
    copies,
    equal,
    in_ranks,
    newest,
    train_as_rank,
)
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DistributedSampler, default_collate
from torchvision.datasets import MNIST

import train_ddp
import utils
from data import MAX_SHIFT, Digits, ResumableSampler, make_loader
from model import ConvNet
from train_ddp import LABEL_SMOOTHING, WARM_UP, default_learning_rate

# Who gets which image


def numbered(total: int, seed: int = 5) -> Digits:
    """Small random images, each labelled with its own index."""
    generator = torch.Generator().manual_seed(total)
    images = torch.randint(1, 256, (total, 5, 9), generator=generator)
    return Digits(images.to(torch.uint8), torch.arange(total), seed)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [96, 97, 98, 99, 100, 2])
def test_each_step_takes_the_next_images_of_one_permutation(world_size, total):
    """From any start, no image comes twice, and fewer than world_size are left out.

    So another number of ranks can take over after any step, without repeating an image.
    """
    digits = numbered(total)
    digits.set_epoch(3)
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

    def draw(seed: int, epoch: int) -> list[Tensor]:
        digits = numbered(1000, seed)
        sampler = ResumableSampler(digits, 1, 0, seed=seed)
        sampler.set_epoch(epoch)
        digits.set_epoch(epoch)
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
    digits.set_epoch(3)
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


def small_set(data_dir=None, seed=SEED, download=False) -> tuple[str, Digits, Digits]:
    files = MNIST(SAMPLE)
    images, labels = files.data, files.targets
    test_set = Digits(images[-30:], labels[-30:], seed)
    return "some digits", Digits(images[:TOTAL], labels[:TOTAL], seed), test_set


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
    train_ddp.build_model = lambda train_set: SmoothNet()
    train_step = train_ddp.train_step
    gradients = []
    steps = []

    def before_update(optimizer, *_) -> None:
        parameters = optimizer.param_groups[0]["params"]
        gradients.append(copies(p.grad for p in parameters))

    def on_step(run, ddp, batch) -> Tensor:
        assert all(module.training for module in ddp.modules())
        loss = train_step(run, ddp, batch)
        steps.append((*batch, gradients[-1], copies(ddp.parameters())))
        return loss

    register_optimizer_step_pre_hook(before_update)
    flags = {"batch_size": BATCH[dist.get_world_size()], "lr": PEAK, "seed": SEED}
    with patch("train_ddp.train_step", on_step):
        train_as_rank(folder / "straight", save_every=4, **flags)
    for path in checkpoints(folder / "straight")[:-1]:
        if dist.get_rank() == 0:
            (folder / path.stem).mkdir()
            shutil.copy(path, folder / path.stem)
        train_as_rank(folder / path.stem, **flags)
    return steps


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def trained(request, tmp_path_factory):
    """The steps of each rank, and the folder of all checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    return in_ranks(request.param, train_and_resume, folder), folder


def train_plainly(world_size: int) -> Iterator[tuple]:
    """The same training as a plain loop: no DDP, no sampler, no loader.

    For each step: its images, labels, gradients, the weights after it, the summed loss.
    """
    _, digits, _ = small_set()
    torch.manual_seed(SEED)
    model = SmoothNet()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95))
    for epoch in range(EPOCHS):
        digits.set_epoch(epoch)
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
            loss_sum = loss.item() * len(labels)
            yield images, labels, gradients, copies(model.parameters()), loss_sum


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to their norm."""
    a = torch.cat([tensor.flatten() for tensor in ours])
    b = torch.cat([tensor.flatten() for tensor in theirs])
    return ((a - b).norm() / b.norm()).item()


def test_training_is_that_of_a_plain_loop_without_ddp(trained):
    """The same images with the same shifts, the same gradients on each rank, the same weights.

    The gradients are the mean over all images of the step, in the last one of an epoch too.
    """
    ranks, folder = trained
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
    records = newest(folder / "straight")["progress"]["history"]
    for record, epoch in zip(records, (plain[:7], plain[7:]), strict=True):
        mean = sum(step[4] for step in epoch) / sum(len(step[1]) for step in epoch)
        assert record["train_loss"] == pytest.approx(mean, rel=1e-5)


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
    # Saved after steps 4, 7, 8, 12 and 14, of which the last one is no place to resume from.
    assert len([*folder.iterdir()]) == 5
    for resumed in folder.iterdir():
        assert newest(resumed)["progress"]["step"] == 14
        assert_same_result(resumed, folder / "straight")


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


def add_up_in_rank() -> tuple:
    rank = dist.get_rank()
    progress = train_ddp.Progress(images_done=12, loss_sum=0.5, loss_count=3)
    own_sums = torch.tensor([float(rank), 3.0], dtype=torch.float64)
    train_ddp.add_up_losses(progress, own_sums)
    is_stopped = utils.any_rank(rank == 1)
    nobody_is = utils.any_rank(False)
    return progress.loss_sum, progress.loss_count, own_sums.sum(), is_stopped, nobody_is


def test_losses_and_stops_are_those_of_all_ranks():
    assert in_ranks(3, add_up_in_rank) == [(3.5, 12, 0, True, False)] * 3


def fail_together(values: list[float]) -> list[str]:
    problems = []
    for value in values:
        own = value if dist.get_rank() == 1 else 1.0
        sums = torch.tensor([own, 3.0], dtype=torch.float64)
        with patch("utils.exit_together", problems.append):
            train_ddp.add_up_losses(train_ddp.Progress(images_done=6), sums)
    return problems


def test_a_loss_of_one_rank_that_is_not_finite_ends_all():
    first, second = in_ranks(2, fail_together, [torch.nan, torch.inf, -torch.inf])
    assert first == second
    assert [text.split()[3] for text in first] == ["nan", "inf", "-inf"]


def evaluate_some(counts: list[int]) -> list[dict]:
    files = MNIST(SAMPLE, train=False)
    torch.manual_seed(0)
    model = nn.Sequential(ConvNet(), nn.Dropout(0.5))
    run = Namespace(model=model, device=torch.device("cpu"), last_print=torch.inf)
    run.args = Namespace(batch_size=64)
    results = []
    for count in counts:
        test_set = Digits(files.data[:count], files.targets[:count], seed=0)
        results.append(train_ddp.evaluate(run, test_set))
    return results


def test_evaluation_counts_each_image_once_at_any_number_of_ranks():
    """Also where some ranks get fewer images than others, or none; and without dropout."""
    counts = [1, 2, 100, 1999]
    files = MNIST(SAMPLE, train=False)
    labels = files.targets
    torch.manual_seed(0)
    with torch.no_grad():
        logits = ConvNet()(files.data)
    for results in in_ranks(3, evaluate_some, counts):
        for n, result in zip(counts, results, strict=True):
            loss = F.cross_entropy(logits[:n], labels[:n]).item()
            right = int((logits[:n].argmax(1) == labels[:n]).sum())
            assert result == {
                "test_loss": pytest.approx(loss, rel=1e-5),
                "test_accuracy": right / n,
            }


def test_pixels_are_normalised_by_mean_and_deviation_of_mnist():
    images = torch.arange(784).remainder(256).to(torch.uint8).view(1, 28, 28)
    model = ConvNet()
    got = []
    model.layers.register_forward_pre_hook(lambda layers, inputs: got.append(inputs[0]))
    model(images)
    expected = (images[:, None].double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(got[0].double(), expected, atol=0.01, rtol=0)


# What a person reads


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_line_of_a_step_is_that_of_a_plain_count(world_size, capsys):
    """Steps and time that are left, in the first epoch, at its end, and in the last one."""
    size, batch_size, epochs = 1000, 64, 3
    loaders = []
    for epoch in range(epochs):
        sampler = ResumableSampler(numbered(size), world_size, rank=0)
        loaders.append(len(make_loader(numbered(size), batch_size, sampler)))
    total = sum(loaders)
    args = Namespace(epochs=epochs, batch_size=batch_size, world_size=world_size)
    for step in 1, loaders[0], total - 1:
        epoch, step_of_epoch = divmod(step - 1, loaders[0])
        usable = size - size % world_size
        images = min((step_of_epoch + 1) * batch_size * world_size, usable)
        progress = train_ddp.Progress(epoch, images, step, seconds=images / 200)
        progress.loss_sum = 1.5
        progress.loss_count = 2
        run = Namespace(args=args, train_size=size, progress=progress, last_print=0.0)
        with patch("torch.distributed.get_rank", lambda: 0):
            train_ddp.report_step(run)
            train_ddp.report_step(run)  # It is too early for another line.
        seconds = round((total - step) * batch_size * world_size / 200)
        expected = f"step {step}/{total}  train loss 0.7500  200 images/s  "
        assert capsys.readouterr().out == f"{expected}0:00:{seconds:02} left\n"


def scheduling_policies() -> list[int]:
    """The scheduling policies of all threads of a rank; gloo has started all but one."""
    policies = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # It has just ended.
            policies.append(os.sched_getscheduler(int(thread)))
    return policies


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has it")
def test_the_threads_of_gloo_are_scheduled_as_batch_jobs():
    """Otherwise they preempt each other: two ranks lose a third of their speed."""
    for policies in in_ranks(2, scheduling_policies):
        assert len(policies) > 1
        assert {*policies} == {os.SCHED_BATCH}
