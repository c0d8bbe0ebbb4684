"""Checkpoint files and the lock of their folder: functions only, no runs."""

import errno
import fcntl
import io
import os
import pickle
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import alive, checkpoints, equal, in_ranks, newest, wait_until

import train_ddp
import utils
from model import ConvNet
from utils import FolderLock, UserError, newest_checkpoint, save_checkpoint

FLAGS = {"seed": 0, "epochs": 2, "batch_size": 64, "world_size": 2, "lr": 0.01}


def some_run(folder: Path) -> train_ddp.Run:
    """A training in its second step."""
    model = ConvNet()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 28, 28)).sum().backward()
    optimizer.step()
    return train_ddp.Run(
        args=Namespace(**FLAGS, keep=3, checkpoint_dir=folder),
        device=torch.device("cpu"),
        data_name="some data",
        train_size=1000,
        model=model,
        optimizer=optimizer,
        lock=FolderLock(folder),
        progress=train_ddp.Progress(images_done=128, step=1, loss_sum=2.5),
    )


@pytest.fixture(scope="module")
def state() -> dict:
    """What a checkpoint holds."""
    return train_ddp.checkpoint_of(some_run(Path()))


@pytest.fixture
def folder(state, tmp_path) -> Path:
    """A folder with two checkpoints."""
    for images in 128, 256:
        path = tmp_path / f"epoch00000-image{images:09d}.pt"
        save_checkpoint(path, state, keep=9)
    return tmp_path


NEXT = "epoch00001-image000000000.pt"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoints(folder)}


# What is loaded


def test_a_checkpoint_holds_all_that_is_needed_under_plain_names(state, folder):
    saved = newest(folder)
    assert saved["version"] == utils.VERSION
    assert saved["args"] == FLAGS
    assert (saved["data"], saved["optimizer_class"]) == ("some data", "AdamW")
    assert train_ddp.Progress(**saved["progress"]).loss_sum == 2.5
    assert {int(moments["step"]) for moments in saved["optimizer"]["state"].values()}
    assert not any(name.startswith("module.") for name in saved["model"])
    ConvNet().load_state_dict(saved["model"])


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def saved(item) -> bytes:
    """A file in torch's own format."""
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return buffer.getvalue()


def with_flipped_bit(content: bytes) -> bytes:
    """Flip a bit in the weights, where torch.load does not see it."""
    weights = torch.load(io.BytesIO(content), weights_only=True)["model"]
    flipped = bytearray(content)
    flipped[content.index(weights["layers.8.weight"].numpy().tobytes())] ^= 0x40
    changed = torch.load(io.BytesIO(flipped), weights_only=True)["model"]
    assert not equal(changed.values(), weights.values())
    return bytes(flipped)


DAMAGES = {
    "empty": lambda content, victim: b"",
    "cut": lambda content, victim: content[:-1],
    "half": lambda content, victim: content[: len(content) // 2],
    "zeroed": lambda content, victim: bytes(len(content)),
    "flipped": lambda content, victim: with_flipped_bit(content),
    "text": lambda content, victim: b"not a checkpoint",
    "pickle with code": lambda content, victim: pickle.dumps(Payload(victim)),
    "zip with code": lambda content, victim: saved({"model": Payload(victim)}),
    "foreign": lambda content, victim: saved({"weights": torch.zeros(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(
    damage, folder, capfd
):
    """Code in it is not executed. With all of them damaged, nothing is overwritten."""
    victim = folder / "executed"
    sound, path = checkpoints(folder)
    content = sound.read_bytes()
    path.write_bytes(DAMAGES[damage](content, victim))
    assert newest_checkpoint(folder) == (sound.name, content)
    warning = capfd.readouterr().err
    assert warning.startswith(f"warning: {path} is damaged")
    assert warning.count("\n") == 1

    sound.write_bytes(path.read_bytes())
    before = snapshot(folder)
    with pytest.raises(UserError, match=f"no checkpoint in {folder} can be loaded"):
        newest_checkpoint(folder)
    assert snapshot(folder) == before
    assert not victim.exists()


def test_a_flipped_bit_anywhere_is_detected_or_harmless(state, tmp_path):
    """Flips a bit in each byte of a file, and never gets other content out of it."""
    path = tmp_path / "small.pt"
    small = {"version": utils.VERSION, "model": torch.arange(6.0), "args": FLAGS}
    torch.save(small, path)
    sound = path.read_bytes()
    detected = 0
    for position in range(len(sound)):
        content = bytearray(sound)
        content[position] ^= 1 << position % 8
        try:
            loaded = utils.decode_checkpoint(path, bytes(content))
        except Exception:  # noqa: BLE001 (damage can raise anything)
            detected += 1
        else:
            assert repr(loaded) == repr(small), position
    assert detected > len(sound) / 4


@pytest.mark.parametrize("version", [None, utils.VERSION + 1])
def test_a_checkpoint_of_another_version_is_refused_not_passed_over(
    state, folder, version
):
    """Its training would be taken up from an older point, or overwritten."""
    changed = dict(state)
    del changed["version"]
    if version is not None:
        changed["version"] = version
    torch.save(changed, checkpoints(folder)[-1])
    before = snapshot(folder)
    with pytest.raises(UserError, match="another version.*--checkpoint_dir") as caught:
        newest_checkpoint(folder)
    assert str(checkpoints(folder)[-1]) in str(caught.value)
    assert snapshot(folder) == before


def test_a_checkpoint_of_a_gpu_is_loaded_without_one(state, tmp_path):
    """Its tensors are saved here as those of a GPU are, which needs a GPU to load them."""
    path = tmp_path / NEXT
    with patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
        save_checkpoint(path, state, keep=1)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    name, content = newest_checkpoint(tmp_path)
    assert name == NEXT
    loaded = utils.decode_checkpoint(path, content)
    assert equal(loaded["model"].values(), state["model"].values())


def test_files_with_other_names_are_neither_loaded_nor_deleted(state, folder):
    """They are the user's own: here sound checkpoints that would sort behind the newest."""
    *_, last = checkpoints(folder)
    names = "epoch_best.pt", "epoch00009-copy.pt", "epoch00009-image000000000.pt.bak"
    own = [Path(shutil.copy(last, folder / name)) for name in names]
    assert newest_checkpoint(folder)[0] == last.name
    save_checkpoint(folder / NEXT, state, keep=1)
    assert set(folder.glob("epoch*")) == {folder / NEXT, *own}


# What is saved


def test_the_newest_are_kept(state, tmp_path):
    """A later one, which a run with another plan may have left, does not count as old."""
    for epoch in 9, 1, 2, 3, 4:
        path = tmp_path / f"epoch{epoch:05d}-image000000000.pt"
        save_checkpoint(path, state, keep=2)
    assert [path.name[:10] for path in checkpoints(tmp_path)] == [
        "epoch00003",
        "epoch00004",
        "epoch00009",
    ]


@pytest.mark.parametrize("directories_can_be_flushed", [True, False])
def test_a_new_checkpoint_is_on_the_disk_before_older_ones_are_deleted(
    state, folder, monkeypatch, directories_can_be_flushed
):
    """Content, then name, then directory, then deletions: a power cut in between costs nothing."""
    path = folder / NEXT
    first, second = checkpoints(folder)
    events = []
    sizes = []

    def record(function: str) -> None:
        real = getattr(os, function)

        def recorder(item, *args, **kwargs):
            name = args[0] if args else item
            if isinstance(item, int):
                name = os.readlink(f"/proc/self/fd/{item}")
                sizes.append(os.fstat(item).st_size)
            events.append((function, Path(name).name))
            if name == str(folder) and not directories_can_be_flushed:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(item, *args, **kwargs)

        monkeypatch.setattr(os, function, recorder)

    for function in "fsync", "replace", "unlink":
        record(function)
    descriptors = os.listdir("/proc/self/fd")
    save_checkpoint(path, state, keep=1)
    assert events == [
        ("fsync", ".tmp-checkpoint"),
        ("replace", path.name),
        ("fsync", folder.name),
        ("unlink", second.name),
        ("unlink", first.name),
    ]
    assert sizes[0] == path.stat().st_size
    assert checkpoints(folder) == [path]
    # Python keeps a small file in its buffer until that is flushed.
    utils.write_atomically(folder / "small", b"flushed too")
    assert sizes[2] == len("flushed too")
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_failed_save_leaves_the_others_whole_and_names_the_good_one(state, folder):
    """What a failed or killed save has left is not loaded, and replaced by the next."""
    before = snapshot(folder)

    def fsync(file: int) -> None:
        os.truncate(file, 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        patch("os.fsync", fsync),
        pytest.raises(UserError, match="cannot save .*No space left") as caught,
    ):
        save_checkpoint(folder / NEXT, state, keep=1)
    good = checkpoints(folder)[-1]
    assert str(caught.value).endswith(f"last good checkpoint: {good}")
    assert snapshot(folder) == before
    assert newest_checkpoint(folder)[0] == good.name
    save_checkpoint(folder / NEXT, state, keep=1)
    assert {path.name for path in folder.iterdir()} == {NEXT}


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(state, folder, capfd):
    denied = PermissionError("denied")
    with patch.object(Path, "unlink", side_effect=denied):
        save_checkpoint(folder / NEXT, state, keep=1)
    assert len(checkpoints(folder)) == 3
    assert capfd.readouterr().err.count("warning: cannot delete") == 2


def test_a_checkpoint_that_may_not_be_read_is_refused_not_passed_over(folder):
    """It is not damaged: an older one would mean to train again what is there."""
    denied = PermissionError("denied")
    with (
        patch.object(Path, "read_bytes", side_effect=denied),
        pytest.raises(UserError, match=f"cannot read {checkpoints(folder)[-1]}"),
    ):
        newest_checkpoint(folder)


def save_as_rank(folder: Path) -> None:
    run = some_run(folder / "good")
    train_ddp.save(run)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder / "good")
    train_ddp.save(run)  # The folder is created again, and locked again.
    assert run.lock.is_held() == (torch.distributed.get_rank() == 0)

    run.args.checkpoint_dir = folder / "bad"
    run.model.layers[0].bias.data[0] = torch.inf
    with pytest.raises(UserError, match="lower --lr"):
        train_ddp.save(run)


def test_all_ranks_save_one_checkpoint_or_raise(tmp_path):
    """Weights that are not finite, after a finite loss, are not saved."""
    in_ranks(2, save_as_rank, tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"good", ".lock", "epoch00000-image000000128.pt"}


# The lock of the folder


def claim_or_say_why(folder: Path, answer: Path) -> None:
    try:
        FolderLock(folder).claim()
        answer.write_text("claimed")
    except UserError as error:
        answer.write_text(str(error))


def hold(folder: Path, files: Path, forks: bool) -> None:
    """Lock a folder, and wait to be killed; with `forks`, in the company of a child."""
    FolderLock(folder).claim()
    if forks:
        child = os.fork()
        if child == 0:
            signal.pause()
        (files / "child").write_text(str(child))
    (files / "held").touch()
    signal.pause()


@pytest.fixture
def other_process(tmp_path):
    """Call a function in another process; what is left of it at the end is killed."""
    context = torch.multiprocessing.get_context("forkserver")
    started = []

    def call(function, *args):
        started.append(context.Process(target=function, args=args))
        started[-1].start()
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.join()


def second_run(other_process, folder: Path, files: Path) -> str:
    """What a second run in the folder is told."""
    other_process(claim_or_say_why, folder, files / "answer").join(120)
    return (files / "answer").read_text()


@pytest.mark.parametrize("forks", [False, True])
def test_a_folder_is_locked_until_its_run_is_killed(other_process, tmp_path, forks):
    """A loader worker, which is a child of the run, may outlive it."""
    folder = tmp_path / "new" / "checkpoints"
    holder = other_process(hold, folder, tmp_path, forks)
    wait_until((tmp_path / "held").exists)
    with pytest.raises(UserError, match=f"another run uses {folder}.*--checkpoint_dir"):
        FolderLock(folder).claim()
    holder.kill()
    holder.join()
    try:
        FolderLock(folder).claim()
    finally:
        if forks:
            child = int((tmp_path / "child").read_text())
            assert alive(child)
            os.kill(child, signal.SIGKILL)


def test_a_deleted_folder_is_claimed_again_unless_another_run_has_it(
    other_process, tmp_path
):
    folder = tmp_path / "checkpoints"
    lock = FolderLock(folder)
    lock.claim()
    shutil.rmtree(folder)
    assert not lock.is_held()
    lock.claim()
    assert lock.is_held()
    assert "another run uses" in second_run(other_process, folder, tmp_path)

    shutil.rmtree(folder)
    other_process(hold, folder, tmp_path, False)
    wait_until((tmp_path / "held").exists)
    with pytest.raises(UserError, match="another run uses"):
        lock.claim()
    assert not lock.is_held()


def test_a_released_folder_is_free_and_its_file_closed(other_process, tmp_path):
    lock = FolderLock(tmp_path)
    lock.claim()
    descriptor = lock.file
    lock.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert second_run(other_process, tmp_path, tmp_path) == "claimed"


@pytest.mark.parametrize("ends_with", [UserError("a problem"), KeyboardInterrupt()])
def test_a_rank_releases_the_folder_however_it_ends(tmp_path, monkeypatch, ends_with):
    locks = []

    def train(args, info, lock) -> int:
        lock.claim()
        locks.append(lock)
        raise ends_with

    monkeypatch.setattr(train_ddp, "train", train)
    info = utils.RankInfo(0, 0, 1, 1, "")
    train_ddp.run_rank(info, Namespace(checkpoint_dir=tmp_path))
    assert locks[0].file is None


@pytest.mark.parametrize(
    "code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO]
)
def test_a_disk_without_locks_gets_a_warning(code, tmp_path, monkeypatch, capfd):
    """The lock file may be a link: what it points to keeps its content."""
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to("target")

    def lockf(*args) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = FolderLock(tmp_path)
    lock.claim()
    # Some network file systems refuse to append.
    assert not fcntl.fcntl(lock.file, fcntl.F_GETFL) & os.O_APPEND
    lock.claim()  # As each save does; once is enough for the warning.
    lock.release()
    warning = f"{tmp_path} is on a disk without locks"
    assert capfd.readouterr().err.count(warning) == 1
    assert (tmp_path / "target").read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the checkpoint folder.*file"):
        FolderLock(tmp_path / "file" / "checkpoints").claim()
