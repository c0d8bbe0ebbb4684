"""The data: what load_data returns, which files it refuses, and how it downloads."""

import contextlib
import gzip
import hashlib
import resource
import socket
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SAMPLE, in_ranks
from torchvision.datasets import MNIST, FashionMNIST

import data
import train_ddp

RAW = "MNIST/raw"
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def load(data_dir: Path, download: bool = True) -> tuple:
    return data.load_data(data_dir, seed=0, download=download)


def sizes(data_dir: Path, download: bool = True) -> tuple[int, int]:
    _, train_set, test_set = load(data_dir, download)
    return len(train_set), len(test_set)


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    """Four files with 200 + 50 digits of the sample, by name."""
    files = {}
    for name in FILES:
        content = (SAMPLE / RAW / name).read_bytes()
        count = 200 if name.startswith("train") else 50
        end = 16 + 784 * count if "images" in name else 8 + count
        files[name] = content[:4] + count.to_bytes(4, "big") + content[8:end]
    return files


def put(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(data_dir: Path) -> str:
    """The one line with which load_data refuses what is there; it must not touch it."""
    before = tree(data_dir)
    with pytest.raises(SystemExit) as caught:
        load(data_dir)
    message = str(caught.value)
    assert tree(data_dir) == before
    assert "\n" not in message
    return message


# What is returned


def test_the_sample_is_ten_thousand_balanced_real_digits():
    name, train_set, test_set = load(SAMPLE, download=False)
    assert name == "MNIST"
    for digits, each in (train_set, 1000), (test_set, 200):
        assert len(digits) == 10 * each
        assert torch.tensor(digits.labels).bincount().tolist() == [each] * 10
    image, label = train_set[0]
    assert image.dtype == torch.uint8 and image.shape == (28, 28)
    assert type(label) is int


def test_files_on_the_disk_need_no_network_and_no_write(tmp_path, small, monkeypatch):
    monkeypatch.setattr(data, "DATASET", "FashionMNIST")
    monkeypatch.setattr(socket, "create_connection", None)
    put(small, tmp_path / "FashionMNIST" / "raw")
    before = sorted(tmp_path.rglob("*"))
    name, train_set, test_set = load(tmp_path)
    assert (name, len(train_set), len(test_set)) == ("FashionMNIST", 200, 50)
    images = torch.stack([image for image, _ in train_set])
    assert images.flatten().tolist() == list(small[FILES[0]][16:])
    assert [label for _, label in test_set] == list(small[FILES[3]][8:])
    assert sorted(tmp_path.rglob("*")) == before


# Files that cannot be used

DAMAGES = {
    "truncated": (FILES[0], lambda content: content[:-1]),
    "a page": (FILES[2], lambda content: b"<html>Log in to this network</html>"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line_with_its_folder(tmp_path, small, damage):
    """Whoever has data does not want to train on the sample."""
    name, change = DAMAGES[damage]
    raw = put({**small, name: change(small[name])}, tmp_path / RAW)
    assert f"the data in {raw.parent} cannot be read" in refusal(tmp_path)


# Downloading


class Mirror(ThreadingHTTPServer):
    """Serves files below /good/, and below /slow/ only after two seconds.

    Those in `broken` are a page of HTML.
    """

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
        if folder == "slow":
            self.server.closed.wait(2)
        page = b"<html>Log in to this network</html>"
        content = page if name in self.server.broken else self.server.files[name]
        with contextlib.suppress(OSError):  # The client may have given up.
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def mirror(small, monkeypatch):
    """A local server of the small set; torchvision knows no other."""
    server = Mirror(small)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for dataset in MNIST, FashionMNIST:
        monkeypatch.setattr(dataset, "mirrors", [f"{server.url}/good/"])
        monkeypatch.setattr(dataset, "resources", server.resources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    assert socket.getdefaulttimeout() is None  # Each download has put it back.
    server.closed.set()
    server.shutdown()
    server.server_close()


def load_in_rank(data_dir: Path, url: str, resources: list) -> tuple[str, list]:
    """Return the name of the data, and with which `download` this rank has loaded them."""
    MNIST.mirrors = [url]
    MNIST.resources = resources
    args = Namespace(data_dir=data_dir, seed=0, world_size=3)
    load = mock.Mock(wraps=train_ddp.load_data)
    with mock.patch("train_ddp.load_data", load):
        name, *_ = train_ddp.load_on_every_rank(args)
    return name, [call.args[-1] for call in load.call_args_list]


def test_ranks_of_a_machine_download_once(tmp_path, mirror):
    folder = tmp_path / "new" / "data"
    url = f"{mirror.url}/good/"
    loaded = in_ranks(3, load_in_rank, folder, url, mirror.resources)
    name = "MNIST, 200 + 50 items"
    assert loaded == [(name, [True]), (name, [False]), (name, [False])]
    assert sorted({*mirror.requested}) == sorted(mirror.files)
    # torchvision asks for each file twice: first, where it is.
    assert len(mirror.requested) == 2 * len(mirror.files)


def test_what_a_killed_download_has_left_is_completed_by_the_next(
    tmp_path, mirror, small
):
    """Two files are there, and a part of a third one."""
    left = put(dict([*small.items()][:2]), tmp_path / RAW)
    (left / f"{FILES[2]}.gz").write_bytes(mirror.files[f"{FILES[2]}.gz"][:100])
    assert sizes(tmp_path) == (200, 50)


@pytest.mark.parametrize(
    "network", ["slow", "refusing", "with a log-in page", "with a full disk"]
)
def test_without_a_network_the_sample_is_used_after_a_warning(
    tmp_path, small, mirror, monkeypatch, capsys, network
):
    """Another data set in the folder is no reason to refuse. Later, with a network, all is well.

    A limit for the size of files stands in for a full disk.
    """
    good = [f"{mirror.url}/good/"]
    urls = {"slow": [f"{mirror.url}/slow/"], "refusing": ["http://127.0.0.1:9/"]}
    monkeypatch.setattr(MNIST, "mirrors", urls.get(network, good))
    if network == "with a log-in page":
        mirror.broken = {f"{FILES[0]}.gz"}
    timeout = socket.setdefaulttimeout
    shorter = mock.Mock(side_effect=lambda seconds: timeout(seconds and seconds / 50))
    put(small, tmp_path / "FashionMNIST" / "raw")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if network == "with a full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    with mock.patch("socket.setdefaulttimeout", shorter):
        assert sizes(tmp_path) == (10000, 2000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [call.args[0] for call in shorter.call_args_list] == [10, None]
    warning = capsys.readouterr().err
    assert "could not be downloaded" in warning and "BUNDLED SAMPLE" in warning
    assert str(tmp_path / RAW) in warning  # Where to put the full set.

    # As where the four scripts were copied without the tests.
    monkeypatch.setattr(MNIST, "mirrors", urls["refusing"])
    monkeypatch.setattr(data, "SAMPLE_DIR", tmp_path / "none")
    with pytest.raises(SystemExit, match="rerun with a network"):
        load(tmp_path)
    mirror.broken = set()
    monkeypatch.setattr(MNIST, "mirrors", good)
    assert sizes(tmp_path) == (200, 50)


def load_two_kinds() -> str:
    def load_data(*_) -> tuple:
        return "pictures", range(4 + torch.distributed.get_rank()), range(2)

    with (
        mock.patch("train_ddp.load_data", load_data),
        mock.patch("utils.exit_together", side_effect=InterruptedError) as ended,
        pytest.raises(InterruptedError),
    ):
        train_ddp.load_on_every_rank(Namespace(data_dir=None, seed=0, world_size=2))
    return ended.call_args.args[0]


def test_machines_with_different_data_do_not_train_together():
    """One of them may have the sample only, and would have fewer steps."""
    first, second = in_ranks(2, load_two_kinds)
    assert first == second
    assert "pictures, 4 + 2 items; pictures, 5 + 2 items" in first
