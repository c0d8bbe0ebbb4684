"""The data: what load_data returns, which files it refuses, and how it downloads."""

import errno
import gzip
import hashlib
import os
import resource
import socket
import subprocess
import tempfile
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SAMPLE, in_ranks

import data
import train_ddp
import utils
from data import FILES, load_data
from utils import UserError

SMALL = "MNIST 200+50 images"  # How the name of the small set below begins.
NOBODY = 65534  # A user who, unlike root, must keep to the permissions of files.


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    """Four files with 200 + 50 digits of the sample, by name."""
    files = {}
    for name in FILES:
        content = (SAMPLE / "MNIST" / "raw" / name).read_bytes()
        count = 200 if name.startswith("train") else 50
        header = 16 if "images" in name else 8
        item = 784 if "images" in name else 1
        body = content[8 : header + count * item]
        files[name] = content[:4] + count.to_bytes(4, "big") + body
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
    with (
        mock.patch("socket.create_connection", side_effect=AssertionError("network")),
        pytest.raises(UserError) as caught,
    ):
        load_data(data_dir, download=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "delete" not in message and "remove" not in message
    return message


# What is returned


def test_the_sample_is_ten_thousand_balanced_real_digits():
    name, train_set, test_set = load_data(SAMPLE, download=False)
    assert name.startswith("MNIST 10000+2000 images, SHA-256 ")
    for digits, each in (train_set, 1000), (test_set, 200):
        assert len(digits) == 10 * each
        assert torch.tensor(digits.labels).bincount().tolist() == [each] * 10
    image, label = train_set[0]
    assert image.dtype == torch.uint8 and image.shape == (28, 28)
    assert type(label) is int
    pixels = torch.stack([image for image, _ in train_set]).float()
    assert 32 < pixels.mean() < 35 and 77 < pixels.std() < 80


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST"])
def test_files_on_the_disk_need_no_network_and_no_write(
    tmp_path, small, monkeypatch, dataset
):
    monkeypatch.setattr(data, "DATASET", dataset)
    monkeypatch.setattr(socket, "create_connection", None)
    put(small, tmp_path / dataset / "raw")
    before = sorted(tmp_path.rglob("*"))
    name, train_set, test_set = load_data(tmp_path, download=True)
    assert name.startswith(f"{dataset} 200+50 ")
    images = torch.stack([image for image, _ in train_set])
    assert images.flatten().tolist() == list(small[FILES[0]][16:])
    assert [label for _, label in test_set] == list(small[FILES[3]][8:])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_name_of_the_data_changes_with_any_byte(tmp_path, small):
    names = set()
    for changed in (None, *FILES):
        files = dict(small)
        if changed:
            files[changed] = files[changed][:-1] + bytes([files[changed][-1] ^ 1])
        put(files, tmp_path / str(changed) / "MNIST" / "raw")
        names.add(load_data(tmp_path / str(changed), download=False)[0])
    assert len(names) == 5


# Files that cannot be used


def a_label_less(content: bytes) -> bytes:
    return content[:7] + bytes([content[7] - 1]) + content[8:-1]


DAMAGES = {
    "empty": lambda content: b"",
    "no items": lambda content: content[:4] + bytes(4) + content[8:16],
    "truncated": lambda content: content[:-1],
    "too long": lambda content: content + b"0",
    "wrong magic": lambda content: b"\0\0\x08\2" + content[4:],
    "a page": lambda content: b"<html>Log in to this network</html>",
    "a label less": a_label_less,
    "label 10": lambda content: content[:-1] + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_bad_file_is_refused_in_one_line_with_its_folder(
    tmp_path, small, name, damage
):
    if "label" in damage:
        name = name.replace("images-idx3", "labels-idx1")
    raw = put(small, tmp_path / "MNIST" / "raw")
    (raw / name).write_bytes(DAMAGES[damage](small[name]))
    before = tree(tmp_path)
    kind = "training" if name.startswith("train") else "test"
    assert f"the {kind} set in {raw} cannot be read" in refusal(tmp_path)
    assert tree(tmp_path) == before


RAW = "MNIST/raw"
KAGGLE = {name: name.replace("-idx", ".idx") for name in FILES}
MISPLACED = {
    "three of four": (RAW, {name: name for name in FILES[:3]}, "."),
    "other names": (RAW, KAGGLE, "."),
    "only gzipped": (RAW, {name: f"{name}.gz" for name in FILES}, "."),
    "a folder per file": (RAW, {name: f"{name}/{name}" for name in FILES}, "."),
    "one folder higher": ("MNIST", None, "."),
    "two folders higher": (".", None, "."),
    "one folder lower": (f"{RAW}/files", None, "."),
    "another layout": ("mnist", None, "."),
    "--data_dir too deep": (RAW, None, "MNIST"),
    "--data_dir far too deep": (RAW, None, RAW),
    "--data_dir too high": (f"sets/{RAW}", None, "."),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_files_in_another_place_are_refused_with_where_they_should_be(
    tmp_path, small, case
):
    """Whoever has data does not want to train on the sample."""
    place, names, data_dir = MISPLACED[case]
    put({}, tmp_path / place)
    for name, used_name in (names or {name: name for name in FILES}).items():
        file = tmp_path / place / used_name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(small[name])
    before = tree(tmp_path)
    message = refusal(tmp_path / data_dir)
    assert f"not complete in {tmp_path / data_dir / RAW}" in message
    assert all(name in message for name in FILES)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("link", ["data", "data/MNIST", f"data/{RAW}"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, link):
    """The disk behind it is not mounted, for example."""
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "gone")
    assert f"{tmp_path / link} leads to {tmp_path / 'gone'}" in refusal(
        tmp_path / "data"
    )


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


@pytest.mark.parametrize("closed", [".", "MNIST", RAW])
@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.parametrize("is_like_python_3_14", [False, True])
def test_data_that_may_not_be_entered_are_refused(
    as_nobody, small, monkeypatch, closed, mode, is_like_python_3_14
):
    if is_like_python_3_14:  # There, what cannot be looked at does not exist.
        monkeypatch.setattr(Path, "is_file", os.path.isfile)
        monkeypatch.setattr(Path, "is_symlink", os.path.islink)
    folder, call = as_nobody
    put(small, folder / "data" / RAW)
    (folder / "data" / closed).chmod(mode)
    message = call(refusal, folder / "data")
    assert str(folder / "data") in message and "--data_dir" in message


def test_incomplete_data_that_may_not_be_listed_are_refused(as_nobody, small):
    """Complete ones can be used: the names of the files are known."""
    folder, call = as_nobody
    raw = put(small, folder / RAW)
    raw.chmod(0o111)
    assert call(load_data, folder, True)[0].startswith(SMALL)
    (raw / FILES[3]).unlink()
    assert str(folder) in call(refusal, folder)


@pytest.mark.parametrize("place", ["file", "file/x", "locked", "locked/x", "hidden/x"])
def test_a_folder_that_cannot_be_made_is_an_error_without_a_network_too(
    as_nobody, place
):
    """The sample stands in for a network, not for a mistaken --data_dir."""
    folder, call = as_nobody
    (folder / "file").touch()
    (folder / "locked").mkdir(mode=0o555)
    (folder / "hidden").mkdir(mode=0)
    message = call(refusal, folder / place)
    assert str(folder / place) in message and "--data_dir" in message


# Ranks


def start_and_catch(folder: Path, data_dirs: list[Path], seeds: list[int]) -> str:
    """Start to train; return the error that ends it before the first step."""
    rank = torch.distributed.get_rank()
    lock = utils.FolderLock(folder / str(rank))
    args = Namespace(data_dir=data_dirs[rank], seed=seeds[rank])
    with (
        mock.patch("utils.join_process_group"),
        pytest.raises(UserError) as caught,
    ):
        train_ddp.train(args, None, lock)
    return str(caught.value)


def test_ranks_that_were_started_differently_end_with_one_error(tmp_path, small):
    """Each machine has a command line and a disk of its own."""
    errors = in_ranks(2, start_and_catch, tmp_path, [SAMPLE] * 2, [5, 6])
    assert "seed 5, seed 6" in errors[0] and "MNIST" not in errors[0]
    assert errors[0] == errors[1]

    raw = put(small, tmp_path / "MNIST" / "raw")
    errors = in_ranks(2, start_and_catch, tmp_path, [SAMPLE, tmp_path], [5, 5])
    assert "MNIST 10000+2000 " in errors[0] and SMALL in errors[0]
    assert errors[0] == errors[1]

    (raw / FILES[2]).write_bytes(b"")
    with mock.patch.dict(os.environ, {"NO_PROXY": "*"}):
        errors = in_ranks(2, start_and_catch, tmp_path, [SAMPLE, tmp_path], [5, 5])
    assert f"the test set in {raw} cannot be read" in errors[0]
    assert errors[0] == errors[1]


def test_more_ranks_than_images_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="3 ranks, but 2 training images"):
        train_ddp.check_sizes(2, 1)
    with pytest.raises(UserError, match="test set is empty"):
        train_ddp.check_sizes(3, 0)
    train_ddp.check_sizes(3, 1)


# Downloading


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
            self.server.closed.wait(300)
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
    assert socket.getdefaulttimeout() == 77  # Each download has put it back.
    socket.setdefaulttimeout(seconds)
    server.closed.set()
    server.shutdown()
    server.server_close()


def load_in_rank(data_dir: Path, url: str, resources: list) -> str:
    from torchvision.datasets import MNIST

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
    # torchvision asks for each file twice: first, where it is.
    assert sorted(mirror.requested) == sorted([*mirror.files] * 2)


def test_a_run_that_starts_when_another_has_just_downloaded_uses_the_files(
    tmp_path, small, monkeypatch
):
    """What it has found a moment before, an incomplete data set, is out of date."""

    def complete(raw: Path) -> list[Path]:
        put(small, raw)
        return []

    monkeypatch.setattr(data, "interrupted_downloads", complete)
    put({FILES[0]: small[FILES[0]]}, tmp_path / RAW)
    assert load_data(tmp_path, download=True)[0].startswith(SMALL)


def test_what_a_killed_download_has_left_is_cleared_by_the_next(
    tmp_path, mirror, small
):
    left = put(small, tmp_path / RAW / ".download-abc" / RAW)
    (left / f"{FILES[0]}.gz").touch()
    assert load_data(tmp_path, download=True)[0].startswith(SMALL)
    raw = tmp_path / RAW
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == small


def test_a_download_goes_to_another_disk_behind_a_link(tmp_path, mirror, monkeypatch):
    """Files cannot be moved from one disk to another."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "MNIST").mkdir()
    (tmp_path / RAW).symlink_to(disk)
    replace = os.replace

    def replace_on_one_disk(source, target) -> None:
        folders = [Path(path).parent.resolve() for path in (source, target)]
        if len({folder.is_relative_to(disk) for folder in folders}) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_on_one_disk)
    assert load_data(tmp_path, download=True)[0].startswith(SMALL)
    assert {path.name for path in disk.iterdir()} == {*FILES}


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, mirror):
    """A limit for the size of files stands in for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError) as caught:
            load_data(tmp_path, download=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value) and "too large" in str(caught.value)
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


@pytest.mark.parametrize("network", ["hangs", "refuses"])
def test_with_nothing_there_and_no_network_the_sample_is_used_after_a_warning(
    tmp_path, small, mirror, monkeypatch, capsys, network
):
    """Another data set in the folder, or an empty folder, is no reason to refuse."""
    url = f"{mirror.url}/hang/" if network == "hangs" else "http://127.0.0.1:9/"
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [url])
    monkeypatch.setattr(data, "SOCKET_SECONDS", 0.3)
    put(small, tmp_path / "FashionMNIST" / "raw")
    if network == "refuses":
        (tmp_path / RAW).mkdir(parents=True)
    before = tree(tmp_path)
    started = time.monotonic()
    assert "10000+2000" in load_data(tmp_path, download=True)[0]
    assert time.monotonic() - started < 60  # The fixture would have it wait for 77 s.
    assert bool(mirror.requested) == (network == "hangs")
    warning = capsys.readouterr().err
    assert "could not be downloaded" in warning and "BUNDLED SAMPLE" in warning
    assert str(tmp_path / RAW) in warning  # Where to put the full set.
    assert tree(tmp_path) == before


def test_without_a_network_and_without_the_sample_the_problem_is_the_network(
    tmp_path, mirror, monkeypatch
):
    """As where the four scripts were copied without the tests."""
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(data, "SAMPLE_DIR", tmp_path / "none")
    with pytest.raises(UserError, match="MNIST could not be downloaded") as caught:
        load_data(tmp_path, download=True)
    assert str(tmp_path / RAW) in str(caught.value)
    assert "\n" not in str(caught.value)
