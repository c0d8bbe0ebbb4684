"""The data, and who gets which part of it. A data set of your own replaces `load_data`."""

import contextlib
import glob
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from utils import UserError, first_line, ignore_stop_signals, warn

# The name of a class in torchvision.datasets, and of a folder: MNIST, FashionMNIST or KMNIST.
DATASET = "MNIST"
# The number of pixels by which training moves an image, in each direction.
MAX_SHIFT = 1
# The number of processes per rank that load data. With 0, the rank loads them itself, which is
# enough for data in memory. If each item is read from a file, try 4.
LOADER_WORKERS = 0

# Anything with __len__ and __getitem__; torch's own type Dataset does not promise __len__.
SizedDataset = Any


def load_data(data_dir: Path, download: bool) -> tuple[str, SizedDataset, SizedDataset]:
    """Return a name for the data, the training set and the test set; raises UserError.

    Replace this function to train on data of your own, for example on folders of pictures:

        transform = Compose([Resize((64, 64)), ToTensor()])
        train_set = ImageFolder(data_dir / "train", transform)
        test_set = ImageFolder(data_dir / "test", transform)
        return "my pictures", train_set, test_set

    An item is a pair of an image and the number of its class. Here an image is a float32
    tensor [3, 64, 64]: replace ConvNet by a network that takes batches of these. The name can
    be any text; a checkpoint is only resumed with data of the same name.

    If items change at random, the training set needs a `set_epoch`, as `Digits` has. For the
    random transforms of torchvision, let it keep seed and epoch, and write in `__getitem__`:

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed + self.epoch) * len(self) + index)
            return super().__getitem__(index)

    If you split one data set in two, use the same seed on all ranks. A Subset has no
    `set_epoch`: split the files or the tensors, and make a data set of each part.

    `download` is True on the first rank of each machine. Meanwhile the others wait, TIMEOUT in
    utils.py at most, and then call this function with False.
    """
    if download:
        download_if_absent(data_dir)
    root = data_dir if has_all_files(data_dir) else SAMPLE_DIR
    train_images, train_labels = read(root, train=True)
    test_images, test_labels = read(root, train=False)
    # With the digest in the name, a machine that has other data is noticed, and a checkpoint of
    # a training with other data as well.
    digest = hashlib.sha256()
    for tensor in train_images, train_labels, test_images, test_labels:
        digest.update(tensor.numpy().tobytes())
    sizes = f"{len(train_images)}+{len(test_images)} images"
    name = f"{DATASET} {sizes}, SHA-256 {digest.hexdigest()[:12]}"
    train_set = Digits(train_images, train_labels)
    test_set = Digits(test_images, test_labels)
    return name, train_set, test_set


class Digits(Dataset):
    """Images, uint8 [28, 28], each with its label, an int; training shifts them at random."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Take images, uint8 [N, 28, 28], and labels, an integer type [N]."""
        self.height, self.width = images.shape[1:]
        self.padded = F.pad(images, [MAX_SHIFT] * 4)
        self.labels = labels.tolist()
        # Until `set_epoch` is called, as for a test set, each image is taken from the middle of
        # the padded one, and so is not shifted.
        self.shifts = [[MAX_SHIFT, MAX_SHIFT]] * len(images)

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw new shifts for all images.

        They belong to (seed, epoch, image), not to a rank. Random transforms usually draw from
        the global generator, which has two traps here. All ranks were seeded alike, so they
        draw the same transforms. And a resumed training draws those of its start again.
        """
        generator = torch.Generator().manual_seed(seed + epoch)
        size = (len(self), 2)
        shifts = torch.randint(2 * MAX_SHIFT + 1, size, generator=generator)
        self.shifts = shifts.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        down, right = self.shifts[index]
        image = self.padded[
            index, down : down + self.height, right : right + self.width
        ]
        return image, self.labels[index]


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that can start in mid-epoch, and that never repeats an item.

    All ranks draw the same permutation of the epoch; rank r takes the items at start + r,
    start + r + world_size, and so on. The last items, fewer than world_size, go unused, since
    all shares must be equally large: a rank with one batch more would wait for the gradients
    of the others for ever. DistributedSampler repeats some items instead.

    A script that never resumes in mid-epoch can use DistributedSampler itself. Of that, only
    seed, epoch, rank and num_replicas (the world size) are used here.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        world_size: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """Take world size and rank from the process group, unless they are given."""
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)
        self.size = len(dataset)
        # The number of items of the permutation that all ranks together have finished.
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the item to start from; call it before each epoch."""
        super().set_epoch(epoch)
        self.start = start

    def __len__(self) -> int:
        return (self.size - self.start) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        # This is the same permutation as DistributedSampler's own.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        own_items = order[self.start + self.rank :: self.num_replicas]
        return iter(own_items[: len(self)].tolist())


def make_loader(
    dataset: SizedDataset, batch_size: int, sampler: Sampler | None = None
) -> DataLoader:
    """Return a DataLoader whose worker processes, if any, leave stop signals to their rank."""
    # New workers are started for each epoch: persistent_workers would keep their copy of the
    # data set, which never sees what `set_epoch` changes. With "fork", a worker starts as a
    # copy of its rank; otherwise, in a spawned rank, each would import torch again.
    forks = LOADER_WORKERS > 0 and sys.platform == "linux"
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=LOADER_WORKERS,
        multiprocessing_context="fork" if forks else None,
        worker_init_fn=ignore_stop_signals,
        # From pinned memory, copies to a GPU do not make the CPU wait.
        pin_memory=torch.cuda.is_available(),
    )


# ================================================================ MNIST's files (skip at first)
# Nothing below is needed for a data set of your own.

FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
SAMPLE_DIR = Path(__file__).resolve().parent / "tests" / "mnist_sample"
SOCKET_SECONDS = 10  # How long a mirror may send nothing.
OTHER_DATASETS = {"MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST"} - {DATASET}
# What torchvision and urllib raise where the network, not the disk, is to blame. torchvision
# raises RuntimeError if no mirror works, or if a proxy answers with a page of its own.
NETWORK_ERRORS = (
    RuntimeError,
    URLError,
    TimeoutError,
    ConnectionError,
    HTTPException,
)


def raw_folder(data_dir: Path) -> Path:
    """Return the folder in which torchvision looks for the files."""
    return data_dir / DATASET / "raw"


def has_all_files(data_dir: Path) -> bool:
    """Return whether all four files are in place."""
    return all((raw_folder(data_dir) / name).is_file() for name in FILES)


def read(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images, uint8 [N, 28, 28], and labels, int64 [N]; raises UserError."""
    # torchvision takes as long to import as torch. The process that only spawns the ranks
    # does not need it.
    from torchvision import datasets  # type: ignore[import-untyped]

    raw = raw_folder(root)
    try:
        dataset = getattr(datasets, DATASET)(root, train=train)
        images = dataset.data
        labels = dataset.targets
        # torchvision does not compare them with each other.
        if len(images) != len(labels) or labels.max() > 9:
            found = f"{len(images)} images, {len(labels)} labels up to {labels.max()}"
            raise ValueError(f"{found}; needed: equally many, labels from 0 to 9")
    except Exception as error:  # noqa: BLE001 (damaged files can raise anything)
        kind = "training" if train else "test"
        problem = f"the {kind} set in {raw} cannot be read ({first_line(error)})"
        fix = f"rename {raw} and rerun with a network, or put good files there"
        raise UserError(f"{problem}: {fix}")
    return images, labels


def download_if_absent(data_dir: Path) -> None:
    """Download the four files if none of them is there.

    Without a network, warn that the bundled sample is used. Files that are there but cannot
    be used raise UserError: nobody who has data wants to train on a sample.
    """
    raw = raw_folder(data_dir)
    try:
        if has_all_files(data_dir):
            return
        refuse_unusable_folders(data_dir)
        if not interrupted_downloads(raw):
            refuse_misplaced_files(data_dir)
        raw.mkdir(parents=True, exist_ok=True)
        with locked(raw) as can_lock:
            # Without a lock, they could be another run's.
            if can_lock:
                for leftover in interrupted_downloads(raw):
                    shutil.rmtree(leftover)
            # Another run may have been faster.
            if not has_all_files(data_dir):
                fetch(raw)
    except OSError as error:
        fix = "make it usable, or choose another --data_dir"
        raise UserError(f"cannot use the data folder {data_dir} ({error}): {fix}")


def refuse_unusable_folders(data_dir: Path) -> None:
    """Raise UserError or OSError if a folder is there but cannot be looked into."""
    for folder in data_dir, data_dir / DATASET, raw_folder(data_dir):
        if folder.is_symlink() and not folder.exists():
            target = os.readlink(folder)
            fix = "mount or create it, or choose another --data_dir"
            raise UserError(f"{folder} leads to {target}, which is not there: {fix}")
        with contextlib.suppress(FileNotFoundError):
            # With the dot, this also needs the right to enter the folder.
            os.listdir(f"{folder}/.")


def refuse_misplaced_files(data_dir: Path) -> None:
    """Raise UserError if files of this data set seem to be there, but not as torchvision has them."""
    # At most two folders down, and some likely places below: this may be a huge disk.
    patterns = ["*ubyte*", "*/*ubyte*", "*/*/*ubyte*", f"*/{DATASET}/raw/*ubyte*"]
    patterns.append(f"{DATASET}/raw/*/*ubyte*")
    raw = raw_folder(data_dir)
    for pattern in patterns:
        for name in sorted(glob.glob(pattern, root_dir=data_dir)):
            file = data_dir / name
            if file.parent.name == "raw" and file.parent.parent.name in OTHER_DATASETS:
                continue
            if has_all_files(data_dir):
                return  # Another run has just downloaded them.
            problem = f"{file} was found, but {DATASET} is not complete in {raw}"
            raise UserError(f"{problem}: it needs {', '.join(FILES)}, unpacked")


def interrupted_downloads(raw: Path) -> list[Path]:
    """Return what a killed download has left, or what another run downloads at the moment."""
    return list(raw.glob(".download-*"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Wait until no other run has locked a folder; provide whether this disk can lock."""
    import fcntl  # Windows lacks it.

    directory = os.open(folder, os.O_RDONLY)
    try:
        # lockf would need the right to write, with which no folder can be opened.
        fcntl.flock(directory, fcntl.LOCK_EX)
        can_lock = True
    except OSError:
        can_lock = False
    try:
        yield can_lock
    finally:
        os.close(directory)


def fetch(raw: Path) -> None:
    """Have torchvision download the files; warn without a network. Raises OSError."""
    from torchvision import datasets

    seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_SECONDS)
    try:
        # It is inside the target, and so on the same disk, even if the target is a link.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=raw) as folder:
            getattr(datasets, DATASET)(folder, download=True)
            for name in FILES:
                os.replace(raw_folder(Path(folder)) / name, raw / name)
    except NETWORK_ERRORS as error:
        problem = f"{DATASET} could not be downloaded ({first_line(error)})"
        if not has_all_files(SAMPLE_DIR):
            fix = f"rerun with a network, or put {', '.join(FILES)} in {raw}"
            raise UserError(f"{problem}: {fix}")
        warn(
            f"{problem}.\n"
            "This uses THE BUNDLED SAMPLE of 10,000 digits of MNIST, which is less accurate. "
            f"For all,\nrerun with a network or put {', '.join(FILES)} in {raw}"
        )
    finally:
        socket.setdefaulttimeout(seconds)
