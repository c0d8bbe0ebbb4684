"""The data. For a data set of your own, all that you need from here is `ShardSampler`."""

import gzip
import hashlib
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from glob import glob  # Path.glob raises where a folder must not be entered
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, DistributedSampler

from utils import UserError, warn

# Or FashionMNIST or KMNIST: the class in torchvision, and the folder on the disk.
DATASET = "MNIST"
MAX_SHIFT = 1  # pixels by which training moves an image, each way
FILES = [
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
]
SAMPLE_DIR = Path(__file__).resolve().parent / "tests" / "mnist_sample"
SOCKET_SECONDS = 10  # how long a mirror may send nothing


def random_stream(*parts: int | str) -> torch.Generator:
    """Return a generator seeded by a hash of `parts`, so that no two uses share a stream."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class ShardSampler(DistributedSampler):
    """A DistributedSampler that always shuffles, starts at any item and never repeats one.

    Of the epoch's permutation, rank r takes start + r, start + r + world_size, and so on. The
    last items, fewer than world_size, go unused, where DistributedSampler would repeat some.
    """

    start = 0  # items of the permutation that all ranks together have finished

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and where to start in it; call it before each epoch."""
        super().set_epoch(epoch)
        self.start = start

    def __len__(self) -> int:
        return (len(self.dataset) - self.start) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        stream = random_stream("order", self.seed, self.epoch)
        order = torch.randperm(len(self.dataset), generator=stream)
        mine = order[self.start + self.rank :: self.num_replicas]
        return iter(mine[: len(self)].tolist())


class Digits(Dataset):
    """Images, uint8 [N, height, width], and labels, int64 [N], in memory."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        height, width = images.shape[1:]
        padded = F.pad(images, [MAX_SHIFT] * 4)
        # A view of all shifted versions, [N, down, across, height, width]: nothing is copied.
        self.shifted = padded.unfold(1, height, 1).unfold(2, width, 1)
        self.offsets = torch.full((2, len(images)), MAX_SHIFT)  # moves nothing
        self.images, self.labels = self.shifted[:, MAX_SHIFT, MAX_SHIFT], labels

    def draw_shifts(self, seed: int, epoch: int) -> None:
        """Draw a shift for each image from (seed, epoch), whichever rank will take it."""
        stream, size = random_stream("shift", seed, epoch), (len(self), 2)
        self.offsets = torch.randint(2 * MAX_SHIFT + 1, size, generator=stream).T

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch, uint8 [B, height, width] and int64 [B], for DataLoader."""
        # DataLoader prefers this to __getitem__: item by item is slower than the training.
        chosen = torch.tensor(indices)
        down, across = self.offsets[:, chosen]
        return self.shifted[chosen, down, across], self.labels[chosen]


# ---------------------------------------------------------------- files (skip at first)


def load_data(data_dir: Path) -> tuple[str, Digits, Digits]:
    """Return a name with a digest, training set and test set, or raise UserError."""
    raw, sample = (folder / DATASET / "raw" for folder in (data_dir, SAMPLE_DIR))
    if glob("*", root_dir=sample) and not glob("*", root_dir=raw):
        raw = sample
    digest, sets = hashlib.sha256(), []
    for images_file, labels_file in (FILES[:2], FILES[2:]):
        images, labels = read_idx(raw / images_file, 3), read_idx(raw / labels_file, 1)
        if len(images) != len(labels) or labels.max() > 9:
            found = f"{len(images)} images, {len(labels)} labels up to {labels.max()}"
            fix = "need equally many, from 0 to 9: replace the files"
            raise UserError(f"{raw / labels_file}: {found}: {fix}")
        digest.update(images.numpy())
        digest.update(labels.numpy())
        sets.append(Digits(images, labels.long()))
    counts = "+".join(str(len(digits)) for digits in sets)
    return f"{DATASET} {counts} {digest.hexdigest()[:12]}", *sets


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """Read an IDX file (yann.lecun.com/exdb/mnist) as uint8 [N, ...], or raise UserError."""
    try:
        if path.is_file():
            content = path.read_bytes()
        else:
            content = gzip.decompress(Path(f"{path}.gz").read_bytes())
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
        if magic != 0x800 + dimensions or 0 in shape:
            raise ValueError(f"no IDX file of {dimensions} dimensions, or empty")
        # bytearray: a tensor over read-only bytes would draw a warning.
        items = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return items[4 * (1 + dimensions) :].view(shape)
    except Exception as error:  # noqa: BLE001 (damage can raise anything)
        fix = f"delete {path.parent} and rerun with a network to download it again"
        raise UserError(f"{path} is unreadable or damaged ({error!r}): {fix}") from None


def download(data_dir: Path) -> None:
    """Have torchvision download all or none, or warn; raise UserError for a bad folder."""
    raw, seconds = data_dir / DATASET / "raw", socket.getdefaulttimeout()
    if glob("*", root_dir=raw):
        return
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "make it writable, or choose another --data_dir"
        raise UserError(f"cannot download to {data_dir} ({error}): {fix}") from None
    try:
        socket.setdefaulttimeout(SOCKET_SECONDS)
        # Importing torchvision takes as long as torch itself: only a download pays for it.
        from torchvision import datasets

        # Beside the target, so that the folder moves there in one step.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as fresh:
            getattr(datasets, DATASET)(fresh, download=True)
            os.replace(Path(fresh, DATASET, "raw"), raw)
    except Exception as error:  # noqa: BLE001 (whatever it is, there is the sample)
        if not glob("*", root_dir=raw):  # or another run was faster
            warn(
                f"{DATASET} could not be downloaded ({error!r}).\nThis uses THE BUNDLED SAMPLE "
                "of 10,000 digits of MNIST, which is less accurate. For all,\nrerun with a "
                f"network or put {', '.join(FILES)} in {raw}"
            )
    finally:
        socket.setdefaulttimeout(seconds)
