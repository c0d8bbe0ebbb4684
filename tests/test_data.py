"""The data: what load_data returns, which files it refuses, and how it downloads."""

import contextlib
import gzip
import hashlib
import os
import resource
import socket
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SAMPLE, in_ranks
from torchvision.datasets import MNIST, FashionMNIST

import data
import train_ddp
from data import FILES, load_data
from utils import UserError

RAW = "MNIST/raw"
SMALL = "MNIST 200+50 images"  # How the name of the small set below begins.
NOBODY = 65534  # A user who, unlike root, must keep to the permissions of files.


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
    """The one line with which load_data refuses what is there, without a network."""
    before = tree(data_dir)
    with (
        mock.patch("socket.create_connection", side_effect=AssertionError("network")),
        pytest.raises(UserError) as caught,
    ):
        load_data(data_dir, download=True)
    message = str(caught.value)
    assert tree(data_dir) == before
    assert "\n" not in message
    assert "delete" not in message and "remove" not in message
    return message


# What is returned


def test_the_sample_is_ten_thousand_balanced_real_digits():
    name, train_set, test_set = load_data(SAMPLE, download=False)
    # A checkpoint has this name, and is only resumed with data of the same name. Any byte
    # changes it.
    assert name == "MNIST 10000+2000 images, SHA-256 6340084232d1"
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
    name, train_set, test_set = load_data(tmp_path, download=True)
    assert name.startswith("FashionMNIST 200+50 ")
    images = torch.stack([image for image, _ in train_set])
    assert images.flatten().tolist() == list(small[FILES[0]][16:])
    assert [label for _, label in test_set] == list(small[FILES[3]][8:])
    assert sorted(tmp_path.rglob("*")) == before


# Files that cannot be used

DAMAGES = {
    "truncated": (FILES[0], lambda content: content[:-1]),
    "a label less": (FILES[1], lambda content: content[:7] + b"\xc7" + content[8:-1]),
    "a page": (FILES[2], lambda content: b"<html>Log in to this network</html>"),
    "label 10": (FILES[3], lambda content: content[:-1] + b"\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_refused_in_one_line_with_its_folder(tmp_path, small, damage):
    name, change = DAMAGES[damage]
    raw = put({**small, name: change(small[name])}, tmp_path / RAW)
    kind = "training" if name.startswith("train") else "test"
    assert f"the {kind} set in {raw} cannot be read" in refusal(tmp_path)


MISPLACED = {
    # Where the files are, their names, and what --data_dir is.
    "three of four": (RAW, FILES[:3], "."),
    "gzipped": (RAW, [f"{name}.gz" for name in FILES], "."),
    "one folder higher": ("MNIST", FILES, "."),
    "one folder lower": (f"{RAW}/files", FILES, "."),
    "--data_dir too deep": (RAW, FILES, RAW),
    "--data_dir too high": (f"sets/{RAW}", FILES, "."),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_files_in_another_place_are_refused_with_where_they_should_be(tmp_path, case):
    """Whoever has data does not want to train on the sample."""
    place, names, data_dir = MISPLACED[case]
    put(dict.fromkeys(names, b""), tmp_path / place)
    message = refusal(tmp_path / data_dir)
    assert f"not complete in {tmp_path / data_dir / RAW}" in message
    assert all(name in message for name in FILES)


@pytest.mark.parametrize("link", ["data", "data/MNIST", f"data/{RAW}"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, link):
    """The disk behind it is not mounted, for example."""
    folder = tmp_path / link
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(tmp_path / "gone")
    assert f"{folder} leads to {tmp_path / 'gone'}" in refusal(tmp_path / "data")


@pytest.fixture
def as_nobody():
    """A folder, and a function that calls another one as a user without rights."""
    user = os.geteuid()

    def call(function, *args):
        os.seteuid(NOBODY if user == 0 else user)
        try:
            return function(*args)
        finally:
            os.seteuid(user)

    # Others may not enter the folders of pytest.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder, call
        subprocess.run(["chmod", "-R", "u+rwx", folder], check=True)


def test_data_that_may_not_be_entered_or_listed(as_nobody, small, monkeypatch):
    # As from Python 3.14 on: what cannot be looked at does not exist.
    monkeypatch.setattr(Path, "is_file", os.path.isfile)
    monkeypatch.setattr(Path, "is_symlink", os.path.islink)
    folder, call = as_nobody
    raw = put(small, folder / RAW)
    raw.chmod(0o444)
    message = call(refusal, folder)
    assert str(folder) in message and "--data_dir" in message
    # The names of complete data are known, so they need not be listed.
    raw.chmod(0o111)
    assert call(load_data, folder, True)[0].startswith(SMALL)
    (raw / FILES[3]).unlink()
    assert str(folder) in call(refusal, folder)


@pytest.mark.parametrize("place", ["file", "locked"])
def test_a_folder_that_cannot_be_made_is_an_error_without_a_network_too(
    as_nobody, place
):
    """The sample stands in for a network, not for a mistaken --data_dir."""
    folder, call = as_nobody
    (folder / "file").touch()
    (folder / "locked").mkdir(mode=0o555)
    message = call(refusal, folder / place)
    assert str(folder / place) in message and "--data_dir" in message


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
    seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    yield server
    assert socket.getdefaulttimeout() == 77  # Each download has put it back.
    socket.setdefaulttimeout(seconds)
    server.closed.set()
    server.shutdown()
    server.server_close()


def load_in_rank(data_dir: Path, url: str, resources: list) -> str:
    MNIST.mirrors = [url]
    MNIST.resources = resources
    return train_ddp.load_on_every_rank(data_dir)[0]


def test_ranks_of_a_machine_download_once(tmp_path, mirror):
    folder = tmp_path / "new" / "data"
    url = f"{mirror.url}/good/"
    names = in_ranks(3, load_in_rank, folder, url, mirror.resources)
    assert names == [load_data(folder, download=False)[0]] * 3
    assert names[0].startswith(SMALL)
    # torchvision asks for each file twice: first, where it is.
    assert sorted(mirror.requested) == sorted([*mirror.files] * 2)
    # Nothing else is left there.
    assert {path.name for path in (folder / RAW).iterdir()} == {*FILES}


def test_two_runs_that_start_together_download_once(tmp_path, mirror, monkeypatch):
    """Here another data set than MNIST."""
    monkeypatch.setattr(data, "DATASET", "FashionMNIST")
    both = threading.Barrier(2)
    locked = data.locked

    def locked_by_one_of_both(folder: Path):
        both.wait(120)  # Both have found no files.
        return locked(folder)

    monkeypatch.setattr(data, "locked", locked_by_one_of_both)
    with ThreadPoolExecutor() as pool:
        loaded = pool.map(lambda _: load_data(tmp_path, download=True), range(2))
    assert all(name.startswith("FashionMNIST 200+50 ") for name, _, _ in loaded)
    assert sorted(mirror.requested) == sorted([*mirror.files] * 2)


def test_what_a_killed_download_has_left_is_cleared_by_the_next(
    tmp_path, mirror, small
):
    left = put(small, tmp_path / RAW / ".download-abc" / RAW)
    (left / f"{FILES[0]}.gz").touch()
    assert load_data(tmp_path, download=True)[0].startswith(SMALL)
    raw = tmp_path / RAW
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == small


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second disk")
def test_a_download_goes_to_another_disk_behind_a_link(tmp_path, mirror):
    """Files cannot be moved from one disk to another."""
    (tmp_path / "MNIST").mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        (tmp_path / RAW).symlink_to(disk)
        assert load_data(tmp_path, download=True)[0].startswith(SMALL)
        assert {*os.listdir(disk)} == {*FILES}


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, mirror):
    """A limit for the size of files stands in for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=f"{tmp_path} .*too large"):
            load_data(tmp_path, download=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert mirror.requested
    assert not tree(tmp_path)


def test_a_download_takes_all_files_or_none(tmp_path, mirror, capsys):
    mirror.broken = {f"{FILES[3]}.gz"}  # The last one.
    assert "10000+2000" in load_data(tmp_path, download=True)[0]
    assert {*mirror.requested} == {*mirror.files}
    assert "could not be downloaded" in capsys.readouterr().err
    assert not tree(tmp_path)
    mirror.broken = set()
    assert load_data(tmp_path, download=True)[0].startswith(SMALL)


@pytest.mark.parametrize("network", ["is too slow", "refuses"])
def test_with_nothing_there_and_no_network_the_sample_is_used_after_a_warning(
    tmp_path, small, mirror, monkeypatch, capsys, network
):
    """Another data set in the folder is no reason to refuse."""
    url = f"{mirror.url}/slow/" if network == "is too slow" else "http://127.0.0.1:9/"
    monkeypatch.setattr(MNIST, "mirrors", [url])
    monkeypatch.setattr(data, "SOCKET_SECONDS", 0.3)
    put(small, tmp_path / "FashionMNIST" / "raw")
    before = tree(tmp_path)
    assert "10000+2000" in load_data(tmp_path, download=True)[0]
    assert bool(mirror.requested) == (network == "is too slow")
    warning = capsys.readouterr().err
    assert "could not be downloaded" in warning and "BUNDLED SAMPLE" in warning
    assert str(tmp_path / RAW) in warning  # Where to put the full set.

    # As where the four scripts were copied without the tests. The empty folder is there now.
    monkeypatch.setattr(data, "SAMPLE_DIR", tmp_path / "none")
    with pytest.raises(UserError, match="MNIST could not be downloaded") as caught:
        load_data(tmp_path, download=True)
    assert str(tmp_path / RAW) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
