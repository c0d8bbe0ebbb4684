"""The data: which rank trains on which image, how images are varied, where they come from.

For a data set of your own, all that you need from here is `ShardSampler`.
"""

import gzip
import hashlib
import math
import os
import socket
import tempfile
import zlib
from collections.abc import Iterator
from os.path import isfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, DistributedSampler

from utils import UserError, one_line, warn

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
    """A DistributedSampler that can start at any image of an epoch, and never repeats one.

    Works with any data set of known length. Each epoch is one permutation of all images; rank
    r takes the images start + r, start + r + world_size, ... of it. All ranks get equally many:
    the last images, fewer than world_size and different ones each epoch, go unused, where
    DistributedSampler would repeat some.
    """

    start = 0  # images of the permutation that all ranks together have finished

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
        self.images, self.labels = images, labels
        self.offsets: torch.Tensor | None = None  # int64 [N, 2], see shift

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw a shift for each image from (seed, epoch), whichever rank will take it."""
        stream, size = random_stream("shift", seed, epoch), (len(self), 2)
        self.offsets = torch.randint(2 * MAX_SHIFT + 1, size, generator=stream)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a whole batch: DataLoader calls this, if it is there, and not __getitem__.

        To fetch images one at a time would take longer than to train on them.
        """
        chosen = torch.tensor(indices)
        images = self.images[chosen]
        if self.offsets is not None:
            images = shift(images, self.offsets[chosen])
        return images, self.labels[chosen]


def shift(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move each image by its own offset: crop the zero-padded batch.

    Takes images uint8 [B, height, width] and offsets int64 [B, 2] from 0 to 2 * MAX_SHIFT, down
    and across; MAX_SHIFT moves nothing.
    """
    count, height, width = images.shape
    padded = F.pad(images, [MAX_SHIFT] * 4)
    # A view of every crop of every image, [B, down, across, height, width]: no copies yet.
    crops = padded.unfold(1, height, 1).unfold(2, width, 1)
    return crops[torch.arange(count), offsets[:, 0], offsets[:, 1]]


# ---------------------------------------------------------------- files (skip at first)


def load_data(data_dir: Path, may_download: bool = False) -> tuple[str, Digits, Digits]:
    """Read the four files below `data_dir`, or the sample in the repository if it has none.

    Returns a name with a digest of all bytes, the training set and the test set. `may_download`
    is for one rank per machine. Raises UserError for a file that is not what it should be.
    """
    raw, sample = (folder / DATASET / "raw" for folder in (data_dir, SAMPLE_DIR))
    if may_download and len(find_files(raw)) < len(FILES):
        problem = download(data_dir)
        if problem and find_files(sample) and not find_files(raw):
            warn(
                f"{DATASET} could not be downloaded ({problem}).\n"
                "TRAINING ON THE BUNDLED SAMPLE of 10,000 digits: less accurate. For all of "
                f"it,\nrerun with a network or put {', '.join(FILES)} in {raw}"
            )
    if find_files(sample) and not find_files(raw):
        raw = sample
    digest, sets = hashlib.sha256(), []
    for images_file, labels_file in (FILES[:2], FILES[2:]):
        images = read_idx(raw / images_file, 3, digest)
        labels = read_idx(raw / labels_file, 1, digest)
        if len(images) != len(labels) or labels.max() > 9:
            found = f"{len(images)} images, {len(labels)} labels up to {labels.max()}"
            fix = "need equally many, from 0 to 9: replace the files"
            raise UserError(f"{raw / labels_file}: {found}: {fix}")
        sets.append(Digits(images, labels.long()))
    counts = "+".join(str(len(digits)) for digits in sets)
    return f"{DATASET} {counts} {digest.hexdigest()[:12]}", *sets


def find_files(raw: Path) -> list[str]:
    """List those of the four files that exist, as they are or gzipped."""
    # Not Path.is_file: it raises where a parent folder must not be entered.
    return [n for n in FILES if isfile(raw / n) or isfile(raw / f"{n}.gz")]


def read_idx(path: Path, dimensions: int, digest: "hashlib._Hash") -> torch.Tensor:
    """Read an IDX file (yann.lecun.com/exdb/mnist) or the same with .gz as a uint8 tensor.

    Adds its bytes to `digest`. Raises UserError if the file contradicts what it says of itself.
    """
    fix = f"delete {path.parent} and rerun with a network to download it again"
    try:
        if path.is_file():
            content = path.read_bytes()
        else:
            content = gzip.decompress(Path(f"{path}.gz").read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): {fix}") from None
    digest.update(content)
    words = [content[i : i + 4] for i in range(0, 4 + 4 * dimensions, 4)]
    magic, *shape = (int.from_bytes(word, "big") for word in words)
    header, size = 4 * len(words), math.prod(shape)
    if magic != 0x800 + dimensions or len(content) != header + size or size == 0:
        raise UserError(
            f"{path} is damaged, or no IDX file of {dimensions} dimensions: {fix}"
        )
    # bytearray: a tensor over read-only bytes would draw a warning.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].view(shape)


def download(data_dir: Path) -> str | None:
    """Have torchvision download the files, all or none; return why that failed, or None.

    Raises UserError if the folder cannot be written to.
    """
    raw = data_dir / DATASET / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that each file moves there in one step.
        fresh = tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir)
    except OSError as error:
        fix = "make it writable, or choose another --data_dir"
        raise UserError(f"cannot download to {data_dir} ({error}): {fix}") from None
    seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_SECONDS)
    try:
        # Importing torchvision takes as long as torch itself: only a download pays for it.
        from torchvision import datasets

        with fresh:
            getattr(datasets, DATASET)(fresh.name, download=True)
            for name in FILES:
                os.replace(f"{fresh.name}/{DATASET}/raw/{name}", raw / name)
        return None
    except Exception as error:  # noqa: BLE001 (whatever it is, there is the sample)
        return one_line(error)
    finally:
        socket.setdefaulttimeout(seconds)
