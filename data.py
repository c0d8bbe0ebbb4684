"""The data, and who gets which part of it. For data of your own, replace `load_data`."""

import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import utils

# The name of a class in torchvision.datasets, and of a folder: MNIST, FashionMNIST or KMNIST.
# (The mean and the deviation of its pixels are in model.py.)
DATASET = "MNIST"
SAMPLE_DIR = Path(__file__).resolve().parent / "tests" / "mnist_sample"
# Training moves each image by at most so many pixels, in each direction.
MAX_SHIFT = 1
# How many processes load data for each rank. With 0, it loads them itself, which is enough for
# data in memory. If each item is read from a file, try 4.
LOADER_WORKERS = 0

# Anything with __len__ and __getitem__. (torch's own type, Dataset, has no __len__.)
SizedDataset = Any


def load_data(
    data_dir: Path, seed: int, download: bool
) -> tuple[str, SizedDataset, SizedDataset]:
    """Return a name for the data, the training set and the test set.

    Raises SystemExit, with a text, if files cannot be used. Replace this function to train on
    data of your own. For folders of pictures, tests/recipes/pictures.patch does so.

    - Items may be anything that `compute_loss` in train_ddp.py understands. Here an item is an
      image and the number of its class, an int.
    - A class must have the same number in each process, and in both sets. Sort the names of the
      classes: a `set` of strings has another order in each process, as Python hashes at random.
    - If items change at random, the training set needs a `set_epoch`, like that of `Digits`.
    - If you split one data set in two, draw the split with `seed`, which all ranks share.
    - First, one rank of each machine calls this function, with download=True. When that is done,
      the others call it with False. They wait for utils.TIMEOUT at most.
    """
    # Not at the top, as it is slow: a process that only starts the ranks does not need it.
    from torchvision import datasets  # type: ignore[import-untyped]

    dataset = getattr(datasets, DATASET)
    if download and not has_all_files(data_dir):
        download_files(dataset, data_dir)
    root = data_dir if has_all_files(data_dir) else SAMPLE_DIR
    try:
        train_files = dataset(root, train=True)
        test_files = dataset(root, train=False)
    except Exception as error:  # noqa: BLE001 (damaged files can raise anything)
        folder = root / DATASET
        fix = "delete the folder, and rerun with a network"
        raise SystemExit(f"the data in {folder} cannot be read ({error!r}): {fix}")
    train_set = Digits(train_files.data, train_files.targets, seed)
    test_set = Digits(test_files.data, test_files.targets, seed)
    return DATASET, train_set, test_set


def has_all_files(data_dir: Path) -> bool:
    """Return whether the four files are where torchvision looks for them."""
    raw = data_dir / DATASET / "raw"
    return len(list(raw.glob("*-ubyte"))) == 4


def download_files(dataset: Any, data_dir: Path) -> None:
    """Have torchvision download the files; if it cannot, warn that the sample is used."""
    # Give up after 10 s without an answer: a firewall that drops packets would cost minutes.
    socket.setdefaulttimeout(10)
    try:
        dataset(data_dir, download=True)
    except Exception as error:  # noqa: BLE001 (a failed download can raise anything)
        reason = str(error).partition("\n")[0]
        raw = data_dir / DATASET / "raw"
        utils.warn(
            f"{DATASET} could not be downloaded ({reason}).\n"
            "This uses THE BUNDLED SAMPLE of 10,000 digits of MNIST, which is less accurate.\n"
            f"For all, rerun with a network, or put its four files into {raw}"
        )
    finally:
        socket.setdefaulttimeout(None)


class Digits(Dataset):
    """Images, uint8 [28, 28], each with its label, an int; training shifts them at random."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        """Take images, uint8 [N, 28, 28], and labels, an integer type [N]."""
        self.height, self.width = images.shape[1:]
        # A black border on all four sides.
        self.padded = F.pad(images, [MAX_SHIFT] * 4)
        self.labels = labels.tolist()
        self.seed = seed
        # Until `set_epoch` is called (never, for a test set), each image is taken from the middle
        # of the padded one, at [MAX_SHIFT, MAX_SHIFT], and so is not shifted.
        self.shifts = [[MAX_SHIFT, MAX_SHIFT]] * len(images)

    def set_epoch(self, epoch: int) -> None:
        """Draw new shifts for all images.

        They follow from the seed and the epoch alone, so an image has the same shift on any
        rank, and after a resume.

        Random transforms usually draw from the global generator. But all ranks have seeded it
        alike, so all would draw the same transforms; and a resumed training would draw those of
        its start again.
        """
        generator = torch.Generator().manual_seed(self.seed + epoch)
        size = (len(self), 2)
        shifts = torch.randint(2 * MAX_SHIFT + 1, size, generator=generator)
        self.shifts = shifts.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        top, left = self.shifts[index]
        rows = slice(top, top + self.height)
        columns = slice(left, left + self.width)
        return self.padded[index, rows, columns], self.labels[index]


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that can start in mid-epoch, and that never repeats an item.

    An epoch of ten items on three ranks, if their random order is 3 8 0 5 9 1 | 7 2 6 4:

        rank 0 takes  3 5 7
        rank 1 takes  8 9 2
        rank 2 takes  0 1 6      and 4 goes unused in this epoch.

    All shares are equally large, as a rank with one batch more would wait for the gradients of
    the others. (DistributedSampler repeats 3 and 8 instead, to fill up the shares.) A training
    that was stopped at the bar goes on with start=6; here with two ranks instead of three:

        rank 0 takes  7 6
        rank 1 takes  2 4

    A script of your own that never resumes can use DistributedSampler itself. From it, this class
    has self.seed, self.epoch, self.rank and self.num_replicas (the world size).
    """

    dataset: SizedDataset  # This tells type checkers that it has a length.
    # The number of items of the epoch that all ranks together have finished.
    start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the item to start from; call it before each epoch."""
        super().set_epoch(epoch)
        self.start = start

    def __len__(self) -> int:
        return (len(self.dataset) - self.start) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        # All ranks draw the same order; DistributedSampler would draw it, too.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)
        own_items = order[self.start + self.rank :: self.num_replicas]
        # Some ranks may have one item more than others.
        return iter(own_items[: len(self)].tolist())


def make_loader(
    dataset: SizedDataset, batch_size: int, sampler: Iterable[int]
) -> DataLoader:
    """Return a DataLoader. `sampler` gives the indices of the items, in order.

    If there are workers, new ones are started for each epoch. With persistent_workers, they would
    keep their copies of the data set, which never see what `set_epoch` changes.
    """
    # A worker that is a copy of its rank ("fork") starts at once. On macOS it may crash.
    forks = LOADER_WORKERS > 0 and sys.platform == "linux"
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=LOADER_WORKERS,
        multiprocessing_context="fork" if forks else None,
        # The rank of a worker handles signals.
        worker_init_fn=utils.ignore_stop_signals,
        # The system never moves pinned memory elsewhere, so a GPU can fetch a batch from it while
        # the CPU goes on (non_blocking=True).
        pin_memory=torch.cuda.is_available(),
    )
