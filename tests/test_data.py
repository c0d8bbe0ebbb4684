"""The data: who gets which image in which step, and what happens to bad files and networks."""

import gzip
import hashlib
import os
import socket
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SAMPLE, in_ranks
from torch.utils.data import DataLoader, Dataset

import data
import train_ddp
import utils
from data import FILES, Digits, ShardSampler, download, load_data
from utils import UserError

FULL = "MNIST 200+50 "  # how the name of the small set below begins


def numbered(total: int) -> Digits:
    """Random digits, each labelled with its own index."""
    generator = torch.Generator().manual_seed(total)
    images = torch.randint(256, (total, 28, 28), generator=generator)
    return Digits(images.to(torch.uint8), torch.arange(total))


def deal(
    world_size: int, digits: Digits, size: int, seed: int, epoch: int, start: int = 0
) -> list[list[tuple]]:
    """Load as each of `world_size` ranks, as `train` does: [rank][step] -> (images, labels)."""
    digits.draw_shifts(seed, epoch)
    dealt = []
    for rank in range(world_size):
        sampler = ShardSampler(digits, world_size, rank, seed=seed)
        sampler.set_epoch(epoch, start)
        loader = DataLoader(digits, size, sampler=sampler, collate_fn=tuple)
        dealt.append(list(loader))
        assert len(loader) == len(dealt[-1])
    return dealt


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [96, 97, 98, 99, 100, 2])
def test_each_step_takes_the_next_images_of_one_permutation(world_size, total):
    """From any start, whole or not, no image twice and fewer than world_size left out."""
    digits, size = numbered(total), 8
    [whole] = deal(1, digits, size, 5, 3)
    order = torch.cat([labels for _, labels in whole])
    pictures = dict(zip(order.tolist(), torch.cat([images for images, _ in whole])))
    assert sorted(order) == list(range(total))
    for start in {0, 1, 7, 32, 48, total - 1, total} & {*range(total + 1)}:
        position = start
        for step in zip(*deal(world_size, digits, size, 5, 3, start), strict=True):
            expected = order[position : position + world_size * size]
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
    torch.rand(7)  # the global generator has no influence
    again = deal(1, digits, 1000, 0, 0)[0][0]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for seed, epoch in [(0, 1), (1, 0), (1, 1)]:
        other = deal(1, digits, 1000, seed, epoch)[0][0]
        assert (first[1] == other[1]).sum() < 20  # 1 of 1000 agrees by chance
        pairs = zip(first[0][first[1].argsort()], other[0][other[1].argsort()])
        assert sum(a.equal(b) for a, b in pairs) < 200  # 1 of 9 shifts by chance


def test_what_is_left_out_changes_with_the_epoch():
    left = set()
    for epoch in range(8):
        steps = [step for rank in deal(4, numbered(99), 8, 0, epoch) for step in rank]
        left |= {*range(99)} - {*torch.cat([labels for _, labels in steps]).tolist()}
    assert len(left) > 3


class Squares(Dataset):
    """A data set as anybody may write it: one item at a time, unknown to data.py."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 2), index**2), index


def load_squares(*epochs: tuple[int, int]) -> list[list[list[int]]]:
    """Return the batches of this rank, for each epoch and start."""
    sampler, loaded = ShardSampler(Squares(), seed=1), []
    loader = DataLoader(Squares(), 4, sampler=sampler, num_workers=2)
    for epoch, start in epochs:
        sampler.set_epoch(epoch, start)
        loaded.append([])
        for squares, indices in loader:
            assert torch.equal(squares[:, 2, 1], indices**2)
            loaded[-1].append(indices.tolist())
    return loaded


def test_the_sampler_serves_a_data_set_of_ones_own_loaded_by_workers():
    """Three ranks; an epoch interrupted after four of its steps has the same remainder."""
    ranks = in_ranks(3, load_squares, (0, 0), (1, 0), (1, 4 * 3 * 4))
    for first, second, resumed in ranks:
        assert resumed == second[4:] and first != second
    for epoch in range(2):
        taken = [index for rank in ranks for batch in rank[epoch] for index in batch]
        assert len(taken) == len({*taken} & {*range(100)}) == 99


def test_training_shifts_by_all_distances_up_to_the_limit():
    dots = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    dots[:, 14, 14] = 255
    [[(images, _)]] = deal(1, Digits(dots, torch.arange(2000)), 2000, 0, 0)
    places = images.nonzero()[:, 1:].tolist()
    reach = range(14 - data.MAX_SHIFT, 15 + data.MAX_SHIFT)
    assert {(y, x) for y, x in places} == {(y, x) for y in reach for x in reach}


@pytest.mark.parametrize("height, width", [(28, 28), (5, 9)])
def test_a_shifted_image_is_that_of_a_plain_loop(height, width):
    """Unless an epoch is set, as for the test set, nothing is moved."""
    reach = range(-data.MAX_SHIFT, data.MAX_SHIFT + 1)
    moves = [(down, across) for down in reach for across in reach]
    images = numbered(len(moves)).images[:, :height, :width]
    digits = Digits(images, torch.arange(len(moves)))
    assert torch.equal(digits.__getitems__([1, 0])[0], images[[1, 0]])
    digits.offsets = torch.tensor(moves).T + data.MAX_SHIFT
    shifted, labels = digits.__getitems__([*range(len(moves))])
    expected = torch.zeros_like(images)
    for i, (down, across) in enumerate(moves):
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + across < width:
                    expected[i, y, x] = images[i, y + down, x + across]
    assert shifted.dtype == torch.uint8
    assert torch.equal(shifted, expected)
    assert labels.tolist() == [*range(len(moves))]


# Files


@pytest.fixture
def small() -> dict[str, bytes]:
    """Four files with 200 + 50 digits of the sample, by name."""
    files, raw = {}, SAMPLE / "MNIST" / "raw"
    for name in FILES:
        content = gzip.decompress((raw / f"{name}.gz").read_bytes())
        count = 200 if name.startswith("train") else 50
        header, size = (16, 784) if "images" in name else (8, 1)
        body = content[8 : header + count * size]
        files[name] = content[:4] + count.to_bytes(4, "big") + body
    return files


def put(files: dict[str, bytes], data_dir: Path) -> Path:
    raw = data_dir / data.DATASET / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def forbid(*args, **kwargs):
    raise AssertionError("the network was used")


def test_the_sample_is_ten_thousand_balanced_real_digits():
    name, train, test = load_data(SAMPLE)
    assert name.startswith("MNIST 10000+2000 ")
    for digits, each in (train, 1000), (test, 200):
        assert digits.images.shape == (10 * each, 28, 28)
        assert digits.images.dtype == torch.uint8
        assert digits.labels.dtype == torch.int64
        assert digits.labels.bincount().tolist() == [each] * 10
    mean, deviation = train.images.float().mean(), train.images.float().std()
    assert 32 < mean < 35 and 77 < deviation < 80
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*.gz")) < 2.5e6


def test_data_on_the_disk_needs_no_network_and_no_write(tmp_path, small, monkeypatch):
    """Whatever the data set, as the files are or gzipped."""
    monkeypatch.setattr(data, "DATASET", "FashionMNIST")
    monkeypatch.setattr(socket, "create_connection", forbid)
    put(small, tmp_path / "plain")
    packed = {f"{name}.gz": gzip.compress(content) for name, content in small.items()}
    put(packed, tmp_path / "packed")
    before = sorted(tmp_path.rglob("*"))
    names = set()
    for folder in "plain", "packed":
        download(tmp_path / folder)
        name, train, test = load_data(tmp_path / folder)
        names.add(name)
        assert train.images.flatten().tolist() == list(small[FILES[0]][16:])
        assert test.labels.tolist() == list(small[FILES[3]][8:])
    assert len(names) == 1
    assert name.startswith("FashionMNIST 200+50 ")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_name_of_the_data_changes_with_any_byte(tmp_path, small):
    names = set()
    for changed in (None, *FILES):
        files = dict(small)
        if changed:
            files[changed] = files[changed][:-1] + bytes([files[changed][-1] ^ 1])
        put(files, tmp_path / str(changed))
        names.add(load_data(tmp_path / str(changed))[0])
    assert len(names) == 5


DAMAGES = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "no items": lambda content: content[:4] + bytes(4) + content[8:16],
    "truncated": lambda content: content[:-1],
    "too long": lambda content: content + b"0",
    "wrong magic": lambda content: b"\0\0\x08\2" + content[4:],
    "a label less": lambda content: (
        content[:7] + bytes([content[7] - 1]) + content[8:-1]
    ),
    "label 10": lambda content: content[:-1] + b"\n",
    "no gzip": lambda content: b"<html>",
    "gzip truncated": lambda content: gzip.compress(content)[:-9],
    "gzip flipped": lambda content: gzip.compress(content)[:-8] + bytes(8),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_bad_file_is_named_with_the_fix(tmp_path, small, name, damage):
    if counted := damage in ("a label less", "label 10"):
        name = name.replace("images-idx3", "labels-idx1")
    raw = put(small, tmp_path)
    bad = DAMAGES[damage](small[name])
    (raw / name).unlink()
    if bad is not None:
        (raw / (f"{name}.gz" if "gzip" in damage else name)).write_bytes(bad)
    with pytest.raises(UserError) as caught:
        load_data(tmp_path)
    message = str(caught.value)
    assert str(raw / name) in message
    assert ("replace the files" if counted else f"delete {raw}") in message
    assert "\n" not in message


@pytest.mark.parametrize("place", ["file", "file/x", "locked/x", "hidden/x"])
def test_a_folder_that_cannot_be_written_is_named_with_the_fix(place):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "file").touch()
        (folder / "locked").mkdir(mode=0o555)
        (folder / "hidden").mkdir(mode=0)
        try:
            if user == 0:  # root may write anywhere
                os.seteuid(65534)
            with pytest.raises(UserError) as caught:
                download(folder / place)
        finally:
            os.seteuid(user)
    message = str(caught.value)
    assert str(folder / place) in message and "--data_dir" in message
    assert "\n" not in message


def start_and_catch(folder: Path, data_dirs: list[Path], seeds: list[int]) -> str:
    """Start to train; return the error that ends it before the first step."""
    rank = torch.distributed.get_rank()
    args = SimpleNamespace(checkpoint_dir=folder / str(rank), seed=seeds[rank])
    args.data_dir = data_dirs[rank]
    utils.join_process_group = lambda init_method: torch.device("cpu")
    with pytest.raises(UserError) as caught:
        train_ddp.train(args, "")
    return str(caught.value)


def test_ranks_that_were_started_with_different_flags_end_with_one_error(tmp_path):
    """Each machine has a command line of its own: they would train different models."""
    errors = in_ranks(2, start_and_catch, tmp_path, [SAMPLE] * 2, [5, 6])
    assert "seed 5, seed 6" in errors[0] and "MNIST" not in errors[0]
    assert errors[0] == errors[1]


def test_a_rank_with_other_or_bad_data_ends_all_with_one_error(tmp_path, small):
    raw, folder = put(small, tmp_path), tmp_path / "checkpoints"
    errors = in_ranks(2, start_and_catch, folder, [SAMPLE, tmp_path], [5, 5])
    assert "MNIST 10000+2000 " in errors[0] and FULL in errors[0]
    assert errors[0] == errors[1]
    (raw / FILES[2]).write_bytes(b"")
    errors = in_ranks(2, start_and_catch, folder, [SAMPLE, tmp_path], [5, 5])
    assert f"{raw / FILES[2]} is unreadable or damaged" in errors[0]
    assert errors[0] == errors[1]


# The network


class Mirror(ThreadingHTTPServer):
    """Serves files below /good/; `broken` ones are a page of HTML. /hang/ never answers."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"{n}.gz": gzip.compress(c) for n, c in files.items()}
        self.requested: list[str] = []
        self.broken: set[str] = set()
        self.closed = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.resources = [
            (n, hashlib.md5(content).hexdigest()) for n, content in self.files.items()
        ]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        folder, name = self.path[1:].split("/")
        self.server.requested.append(name)
        if folder == "hang":
            self.server.closed.wait(60)
            return
        page = b"<html>Log in to this network</html>"
        content = page if name in self.server.broken else self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def mirror(small, monkeypatch):
    """A local server of the small set; torchvision knows no other."""
    from torchvision.datasets import MNIST, FashionMNIST

    server = Mirror(small)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for dataset in MNIST, FashionMNIST:
        monkeypatch.setattr(dataset, "mirrors", [f"{server.url}/good/"])
        monkeypatch.setattr(dataset, "resources", server.resources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    yield server
    assert socket.getdefaulttimeout() == 77  # a download has put it back
    socket.setdefaulttimeout(seconds)
    server.closed.set()
    server.shutdown()
    server.server_close()


def load_in_rank(data_dir: Path, url: str, resources: list) -> str:
    from torchvision.datasets import MNIST

    MNIST.mirrors, MNIST.resources = [url], resources
    return train_ddp.load_on_every_rank(data_dir)[0]


def test_processes_that_start_together_download_once(tmp_path, mirror):
    download(tmp_path / "alone")
    requested_alone = sorted(mirror.requested)
    mirror.requested.clear()
    folder, url = tmp_path / "new" / "data", f"{mirror.url}/good/"
    names = in_ranks(3, load_in_rank, folder, url, mirror.resources)
    assert names == [load_data(folder)[0]] * 3
    assert names[0].startswith(FULL)
    assert sorted(mirror.requested) == requested_alone
    assert {path.name for path in (folder / "MNIST" / "raw").iterdir()} >= {*FILES}
    assert len([*folder.iterdir()]) == 1  # the temporary folder is gone


def test_fashion_mnist_is_downloaded_too(tmp_path, small, mirror, monkeypatch):
    monkeypatch.setattr(data, "DATASET", "FashionMNIST")
    download(tmp_path)
    assert load_data(tmp_path)[0].startswith("FashionMNIST 200+50 ")
    raw = tmp_path / "FashionMNIST" / "raw"
    assert {name: (raw / name).read_bytes() for name in FILES} == small


def test_a_download_takes_all_files_or_none(tmp_path, mirror, capsys):
    mirror.broken = {f"{FILES[3]}.gz"}  # the last one
    download(tmp_path)
    assert "10000+2000" in load_data(tmp_path)[0]
    assert {*mirror.requested} == {*mirror.files}
    assert "could not be downloaded" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    mirror.broken = set()
    download(tmp_path)
    assert load_data(tmp_path)[0].startswith(FULL)


@pytest.mark.parametrize("network", ["hangs", "refuses"])
def test_without_a_network_the_sample_is_used_after_a_warning(
    tmp_path, mirror, monkeypatch, capsys, network
):
    url = f"{mirror.url}/hang/" if network == "hangs" else "http://127.0.0.1:9/"
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [url])
    monkeypatch.setattr(data, "SOCKET_SECONDS", 0.3)
    if network == "refuses":  # as a failed download by torchvision itself leaves it
        (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    download(tmp_path)
    assert "10000+2000" in load_data(tmp_path)[0]
    assert bool(mirror.requested) == (network == "hangs")
    warning = capsys.readouterr().err
    assert "could not be downloaded" in warning and "BUNDLED SAMPLE" in warning
    assert str(tmp_path / "MNIST" / "raw") in warning  # where to put the full set
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
