"""The data: MNIST as uint8 tensors, fetched once per machine, dealt out without overlap.

Each rank holds the whole set (55 MB) and draws its batches by index. There is no per-image
Python: in the usual pipeline of transforms and a DataLoader it costs more than the network.
"""

import contextlib
import fcntl
import gzip
import hashlib
import shutil
import socket
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DistributedSampler

from utils import UserError, last_line, warn

DATASET = "MNIST"  # the class in torchvision.datasets, and its folder in --data_dir
SHA256 = {  # of the published files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
EXTRA_MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"
SAMPLE = Path(__file__).resolve().parent / "tests" / "mnist_sample"
CONNECT_SECONDS = 8  # to wait for each of the three mirrors
STALL_SECONDS = 25  # a download that has not grown for so long is given up
MAX_SHIFT = 1  # pixels by which training moves a digit, each way


class Digits(NamedTuple):
    images: torch.Tensor  # uint8 [N, 28, 28]
    labels: torch.Tensor  # int64 [N]


class Dataset(NamedTuple):
    name: str  # ends with a digest: equal names mean equal bytes
    train: Digits
    test: Digits


def load_mnist(data_dir: Path, may_download: bool = False) -> Dataset:
    """Read the data set in `data_dir`, or the bundled sample if it holds none.

    With `may_download`, set on one rank per machine, a missing or damaged file is fetched first.
    Raises UserError for a damaged file, or a folder that should be written to and cannot be.
    """
    raw = data_dir / DATASET / "raw"
    if data_dir.resolve() == SAMPLE:
        return read_digits(SAMPLE, "MNIST sample", ".gz")
    try:
        return read_digits(raw, f"full {DATASET}")
    except UserError as problem:
        if may_download:
            if not (failure := download(data_dir)):
                return load_mnist(data_dir)
            if not any(raw.glob("*-ubyte")):
                warn(
                    f"{DATASET} could not be downloaded: {failure}.",
                    "TRAINING ON THE BUNDLED SAMPLE of 10,000 digits: less accurate.",
                    f"For all of it, rerun with a network or put {', '.join(SHA256)} in {raw}",
                )
        if any(raw.glob("*-ubyte")):
            cure = f"delete {raw} and rerun with a network"
            raise UserError(f"{problem}, no download mended it: {cure}") from None
    return load_mnist(SAMPLE)


def read_digits(folder: Path, kind: str = "", suffix: str = "") -> Dataset:
    """Read four IDX files (yann.lecun.com/exdb/mnist), gzipped if `suffix` is ".gz".

    Raises UserError if one is missing, or not as published: torchvision takes any file that
    exists, and so keeps for ever what a killed download had cut short.
    """
    contents, digest = [], hashlib.sha256()
    for name, published in SHA256.items():
        try:
            content = (folder / (name + suffix)).read_bytes()
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}") from None
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != published and not suffix:
            raise UserError(f"{folder / name} is damaged (its SHA-256 is {sha256})")
        digest.update(sha256.encode())
        # bytearray: a tensor over read-only bytes would draw a warning.
        contents.append(bytearray(gzip.decompress(content) if suffix else content))
    images = [torch.frombuffer(c, dtype=torch.uint8, offset=16) for c in contents[::2]]
    labels = [torch.frombuffer(c, dtype=torch.uint8, offset=8) for c in contents[1::2]]
    train, test = (Digits(i.view(-1, 28, 28), n.long()) for i, n in zip(images, labels))
    counts = f"{len(train.labels)}+{len(test.labels)}"
    return Dataset(f"{kind} {counts} {digest.hexdigest()[:12]}", train, test)


def download(data_dir: Path) -> str | None:
    """Fetch the files into `data_dir`, each whole or not at all; return why that failed, or None.

    Raises UserError if the folder cannot be written to.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / ".lock").open("w")
    except OSError as error:
        cure = "make it writable, or choose another --data_dir"
        raise UserError(f"cannot download to {data_dir} ({error}): {cure}") from None
    raw, fresh, failures = data_dir / DATASET / "raw", data_dir / ".download", []

    def fetch() -> None:
        try:
            # Importing torchvision takes as long as torch itself: only a download pays for it.
            from torchvision import datasets

            kind = getattr(datasets, DATASET)
            for mirror in [*kind.mirrors, EXTRA_MIRROR]:
                kind.mirrors = [mirror]  # given all, torchvision ends at one that hangs
                try:
                    kind(fresh, download=True)
                    break
                except (OSError, RuntimeError) as error:
                    failures[:] = [last_line(error)]
            else:
                return
            failures.clear()
            read_digits(fresh / DATASET / "raw")
            raw.mkdir(parents=True, exist_ok=True)
            for name in SHA256:
                (fresh / DATASET / "raw" / name).replace(raw / name)
        except Exception as error:  # noqa: BLE001 (whatever it is, there is the sample)
            failures.append(last_line(error))

    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # runs that share the folder take turns
        with contextlib.suppress(UserError):
            read_digits(raw)
            return None  # fetched by the run before this one
        shutil.rmtree(fresh, ignore_errors=True)  # of a download that was killed
        socket.setdefaulttimeout(CONNECT_SECONDS)
        # In a thread, as a name lookup heeds no timeout and can hang for minutes.
        thread, size = threading.Thread(target=fetch, daemon=True), -1
        thread.start()
        while thread.is_alive() and size != (size := folder_size(fresh)):
            thread.join(STALL_SECONDS)
        shutil.rmtree(fresh, ignore_errors=True)
        if thread.is_alive():
            return f"nothing arrived for {STALL_SECONDS} s"
        return failures[0] if failures else None


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` to 63 bits, so that no two uses of --seed share a random stream."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batches(
    digits: Digits, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield this rank's augmented batches of an epoch, from its image number `start` on.

    Order and augmentation follow from (seed, epoch, image) alone: to resume needs no saved
    generator, and the number of ranks changes nothing. Each step takes the next world_size *
    batch_size images of one permutation, the last step what is left. A remainder of fewer
    than world_size images, other ones each epoch, goes unused.

    Yields images uint8 [B, 28, 28], labels int64 [B], and the image count of all ranks.
    """
    rank, world_size, total = dist.get_rank(), dist.get_world_size(), len(digits.labels)
    # Rank r takes the images start + r, start + r + world_size, ... of the permutation: where
    # world_size does not divide `start`, this is another rank's share, entered midway.
    first = start + rank
    sampler = DistributedSampler(
        range(total), world_size, first % world_size, seed=derive_seed("order", seed)
    )
    sampler.set_epoch(epoch)  # or each epoch would repeat the order of the first
    skip, share = first // world_size, (total - start) // world_size
    # islice ends before DistributedSampler's duplicates.
    mine = torch.tensor(list(islice(sampler, skip, skip + share)), dtype=torch.int64)
    generator = torch.Generator().manual_seed(derive_seed("shift", seed, epoch))
    offsets = torch.randint(2 * MAX_SHIFT + 1, (total, 2), generator=generator)
    mine, offsets = mine.to(digits.labels.device), offsets.to(digits.labels.device)
    # Many batches are drawn and shifted at once. One at a time, before each step, it takes
    # three times as long: by then the caches hold the code and the data of the network.
    for begin in range(0, share, 64 * batch_size):
        part = mine[begin : begin + 64 * batch_size]
        # index_select copies whole images, where images[part] would go pixel by pixel.
        images = shift(digits.images.index_select(0, part), offsets[part])
        pairs = images.split(batch_size), digits.labels[part].split(batch_size)
        for batch, labels in zip(*pairs):
            yield batch, labels, world_size * len(labels)


def shift(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move each image by its own offset: crop the zero-padded batch, all in one copy.

    Takes images uint8 [B, height, width] and offsets int64 [B, 2] from 0 to 2 * MAX_SHIFT, down
    and across; MAX_SHIFT moves nothing.
    """
    count, height, width = images.shape
    # With its rows one after another, a crop is one run of `height` padded rows, to be copied
    # whole. The row too many at the end lets the lowest, rightmost run fit.
    padded = F.pad(images, [MAX_SHIFT, MAX_SHIFT, MAX_SHIFT, MAX_SHIFT + 1])
    per_image, per_row, _ = padded.stride()
    runs = padded.view(-1).unfold(0, height * per_row, 1)  # one from each pixel; a view
    begins = torch.arange(count, device=images.device) * per_image
    begins += offsets[:, 0] * per_row + offsets[:, 1]
    return runs.index_select(0, begins).view(count, height, per_row)[:, :, :width]
