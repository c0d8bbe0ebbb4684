"""Checkpoint files and the lock of their folder: functions only, no runs."""

import errno
import io
import os
import pickle
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import checkpoints, copies, equal, in_ranks, newest, wait_until

import train_ddp
import utils
from model import ConvNet
from utils import lock_folder, newest_checkpoint, save_checkpoint

FLAGS = {
    "data": "some data",
    "seed": 0,
    "epochs": 2,
    "batch_size": 64,
    "world_size": 2,
    "lr": 0.01,
}
NEXT = "epoch00001-image000000000.pt"


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


# What is loaded


class Payload:
    """Unpickled, it creates a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def saved(item) -> bytes:
    """A file in torch's own format."""
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return buffer.getvalue()


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "pickle with code": lambda content: pickle.dumps(Payload()),
    "zip with code": lambda content: saved({"model": Payload()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(
    damage, folder, state, monkeypatch, capfd
):
    """Code in it is not executed. With all of them damaged, training does not begin anew."""
    monkeypatch.chdir(folder)
    sound, path = checkpoints(folder)
    content = sound.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    name, loaded = newest_checkpoint(folder)
    assert (name, loaded["progress"]) == (sound.name, state["progress"])
    warning = capfd.readouterr().err
    assert warning.startswith(f"warning: {path} is damaged")
    assert warning.count("\n") == 1

    sound.write_bytes(path.read_bytes())
    with pytest.raises(SystemExit, match=f"no checkpoint in {folder} can be loaded"):
        newest_checkpoint(folder)
    assert not Path("executed").exists()


def test_a_flipped_bit_anywhere_is_detected_or_harmless(tmp_path):
    """Flips a bit in each byte of a file, and never gets other content out of it."""
    small = {"model": torch.arange(6.0), "args": FLAGS}
    sound = saved(small)
    detected = 0
    for position in range(len(sound)):
        content = bytearray(sound)
        content[position] ^= 1 << position % 8
        try:
            loaded = utils.decode_checkpoint(bytes(content))
        except Exception:  # noqa: BLE001 (damage can raise anything)
            detected += 1
        else:
            assert repr(loaded) == repr(small), position
    assert detected > len(sound) / 4


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), MemoryError()])
def test_a_read_that_fails_is_not_taken_for_damage(folder, error):
    """Otherwise the training would be taken up from an older point."""
    path = checkpoints(folder)[-1]
    with (
        patch.object(Path, "read_bytes", side_effect=error),
        pytest.raises(SystemExit, match=f"cannot read {path}.*{type(error).__name__}"),
    ):
        newest_checkpoint(folder)


def test_a_checkpoint_of_a_gpu_is_loaded_without_one(state, tmp_path):
    """Its tensors are saved here as those of a GPU are, which needs a GPU to load them."""
    path = tmp_path / NEXT
    with patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
        save_checkpoint(path, state, keep=1)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    name, loaded = newest_checkpoint(tmp_path)
    assert name == NEXT
    assert equal(loaded["model"].values(), state["model"].values())


# Which training resumes


def resume_all(paths: list[Path]) -> list[str]:
    """Resume from each; return what rank 0 prints, or the codes of the others."""
    messages = []
    for path in paths:
        with patch("utils.print_line") as printed, pytest.raises(SystemExit) as caught:
            train_ddp.resume(some_run(path.parent))
        assert caught.value.code == 1
        messages += [call.args[0] for call in printed.call_args_list]
    return messages


def test_a_checkpoint_of_another_kind_of_training_is_refused(state, tmp_path):
    """All ranks exit; one line names both sides and the fix."""
    weights = state["model"]
    wider = weights | {"layers.0.weight": torch.zeros(20, 1, 5, 5)}
    renamed = {name.replace("layers.0", "layers.x"): w for name, w in weights.items()}
    swapped = state["weight_names"][::-1]
    others = {
        "it has seed 5, this run has 0": {"hyperparameters": FLAGS | {"seed": 5}},
        "it has data others, this run has some data": {
            "hyperparameters": FLAGS | {"data": "others"}
        },
        "RuntimeError: .*mismatch for layers.0.weight.*": {"model": wider},
        "RuntimeError: .*Missing key.*layers.0.weight.*": {"model": renamed},
        ".*other weights, or has them in another order": {"weight_names": swapped},
        "TypeError: .*argument 'minutes'.*": {"progress": {"minutes": 5}},
        "KeyError: 'state'": {"optimizer": {}},
    }
    paths = [tmp_path / str(number) / NEXT for number in range(len(others))]
    for path, change in zip(paths, others.values(), strict=True):
        path.parent.mkdir()
        torch.save(state | change, path)
    messages, nothing = in_ranks(2, resume_all, paths)
    assert nothing == []
    for path, pattern, message in zip(paths, others, messages, strict=True):
        reason = rf"{path} does not fit \((ValueError: )?{pattern}\)"
        assert re.fullmatch(f"error: {reason}: choose another --check.*", message)


def resume_with_damage(folder: Path) -> list[str]:
    if dist.get_rank() == 1:
        os.environ["LOCAL_RANK"] = "0"  # It is the first one of another machine.
    run = some_run(folder / str(dist.get_rank()))
    with patch("utils.print_line") as printed, pytest.raises(SystemExit):
        train_ddp.resume(run)
    return [call.args[0] for call in printed.call_args_list]


def test_damage_on_one_machine_only_is_one_error(state, tmp_path):
    """The other one, whose checkpoints are whole, must not add an error of its own."""
    for rank, size in (0, None), (1, 100):
        (tmp_path / str(rank)).mkdir()
        path = tmp_path / str(rank) / NEXT
        path.write_bytes(saved(state)[:size])
    first, second = in_ranks(2, resume_with_damage, tmp_path)
    assert first == [f"error: no checkpoint in {tmp_path}/1 can be loaded: restore one"]
    assert [line.split(" is ")[0] for line in second] == [
        f"warning: {tmp_path}/1/{NEXT}"
    ]


def resume_on_two_machines(path: Path, folders: Path) -> None:
    """Resume twice, where the newer checkpoint is on the one machine, then on the other."""
    rank = dist.get_rank()
    state = newest(path.parent)
    for finder in 0, 1:
        torch.manual_seed(rank)  # Other weights than those in the file.
        run = some_run(folders / f"{finder} {rank}")
        run.args.checkpoint_dir.mkdir()
        if rank == finder:
            shutil.copy(path, run.args.checkpoint_dir)
        else:
            older = run.args.checkpoint_dir / "epoch00000-image000000064.pt"
            save_checkpoint(older, train_ddp.checkpoint_of(run), keep=1)
        run.progress = train_ddp.Progress()
        run.optimizer.param_groups[0]["betas"] = (0.5, 0.6)
        with (
            patch.dict(os.environ, LOCAL_RANK="0"),
        ):
            resumed_from = train_ddp.resume(run)
        assert resumed_from.name == path.name
        assert equal(copies(run.model.parameters()), state["model"].values())
        assert run.progress == train_ddp.Progress(**state["progress"])
        moments = run.optimizer.state_dict()["state"][1]
        assert moments["exp_avg"].equal(state["optimizer"]["state"][1]["exp_avg"])
        assert run.optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_all_ranks_resume_from_the_newest_checkpoint_that_any_machine_has(
    folder, tmp_path_factory
):
    """The optimizer's state is that of the file, its hyper-parameters those of the code."""
    path = checkpoints(folder)[-1]
    in_ranks(2, resume_on_two_machines, path, tmp_path_factory.mktemp("machines"))


# What is saved


def test_the_newest_are_kept_and_so_are_files_with_other_names(state, folder, capfd):
    """A later one, which a run with another plan may have left, does not count as old."""
    names = "epoch_best.pt", "epoch00000-copy.pt", "epoch00009-image000000000.pt.bak"
    own = [shutil.copy(checkpoints(folder)[0], folder / name) for name in names]
    for epoch in 9, 1, 2, 3:
        path = folder / f"epoch{epoch:05d}-image000000000.pt"
        save_checkpoint(path, state, keep=2)
    kept = [folder / f"epoch{epoch:05d}-image000000000.pt" for epoch in (2, 3, 9)]
    assert {*folder.glob("epoch*")} == {*kept, *own}
    assert newest_checkpoint(folder)[0] == kept[-1].name


def test_a_new_checkpoint_is_on_the_disk_before_older_ones_are_deleted(state, folder):
    """Content, then name, then directory, then deletions: a power cut in between costs nothing.

    Here the directory cannot be flushed, as on some network file systems.
    """
    path = folder / NEXT
    older = {path.name for path in checkpoints(folder)}
    flushed = []

    def fsync(file: int) -> None:
        names = {path.name for path in folder.iterdir()}
        if os.path.samestat(os.fstat(file), folder.stat()):
            flushed.append(("folder", names))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flushed.append((os.fstat(file).st_size, names))

    descriptors = os.listdir("/dev/fd")
    with patch("os.fsync", fsync):
        save_checkpoint(path, state, keep=1)
        # Python keeps a small file in its buffer until that is flushed.
        utils.write_atomically(folder / "small", b"flushed too")
    assert flushed == [
        (path.stat().st_size, {*older, ".tmp-checkpoint"}),
        ("folder", {*older, NEXT}),
        (len("flushed too"), {NEXT, ".tmp-checkpoint"}),
        ("folder", {NEXT, "small"}),
    ]
    assert os.listdir("/dev/fd") == descriptors


def test_a_failed_save_leaves_the_others_whole_and_names_the_good_one(state, folder):
    """What a failed or killed save has left is not loaded, and replaced by the next."""
    before = {path: path.read_bytes() for path in checkpoints(folder)}

    def fsync(file: int) -> None:
        os.truncate(file, 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        patch("os.fsync", fsync),
        pytest.raises(SystemExit, match="cannot save .*No space left") as caught,
    ):
        save_checkpoint(folder / NEXT, state, keep=1)
    good = checkpoints(folder)[-1]
    assert str(caught.value).endswith(f"last good checkpoint: {good}")
    assert {path: path.read_bytes() for path in checkpoints(folder)} == before
    save_checkpoint(folder / NEXT, state, keep=1)
    assert {path.name for path in folder.iterdir()} == {NEXT}


def save_as_rank(folder: Path) -> None:
    run = some_run(folder / "good")
    train_ddp.save(run)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "good")
    train_ddp.save(run)  # The folder is created again.

    run.args.checkpoint_dir = folder / "bad"
    run.model.layers[0].bias.data[0] = torch.inf
    with patch("utils.print_line") as printed, pytest.raises(SystemExit):
        train_ddp.save(run)
    assert printed.call_count == (dist.get_rank() == 0)


def test_all_ranks_save_one_checkpoint_or_exit(tmp_path):
    """Weights that are not finite, after a finite loss, are not saved."""
    in_ranks(2, save_as_rank, tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"good", "epoch00000-image000000128.pt"}


def test_a_planted_link_is_not_followed(state, folder, tmp_path_factory):
    """Where several users share a folder, a save must not overwrite what a link leads to."""
    target = tmp_path_factory.mktemp("somebody") / "thesis"
    target.write_text("precious")
    (folder / ".tmp-checkpoint").symlink_to(target)
    save_checkpoint(folder / NEXT, state, keep=9)
    assert target.read_text() == "precious"
    assert newest_checkpoint(folder)[0] == NEXT


# The lock of the folder


def hold(folder: Path, child_file: Path) -> None:
    """Lock a folder, start a child as a data loader does, and wait to be killed."""
    lock_folder(folder)
    child = os.fork()
    if child:
        child_file.write_text(f"{child}\n")
    signal.pause()


def test_a_folder_is_locked_until_its_run_is_killed(tmp_path):
    """A loader worker may outlive it."""
    folder = tmp_path / "new" / "checkpoints"
    child_file = tmp_path / "child"
    context = torch.multiprocessing.get_context("forkserver")
    other = context.Process(target=hold, args=(folder, child_file), daemon=True)
    other.start()
    wait_until(
        lambda: child_file.exists() and child_file.read_text().endswith("\n"),
        "the other run has locked the folder",
    )
    try:
        problem = f"another run uses {folder}.*--checkpoint_dir"
        with pytest.raises(SystemExit, match=problem):
            lock_folder(folder)
        other.kill()
        other.join()
        lock_folder(folder)
    finally:
        os.kill(int(child_file.read_text()), signal.SIGKILL)


def test_a_disk_without_locks_gets_a_warning(tmp_path, capfd):
    """The lock file may be a link: what it points to keeps its content."""
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to("target")
    with patch("fcntl.lockf", side_effect=OSError(errno.ENOLCK, "No locks")):
        lock_folder(tmp_path)
    warning = f"{tmp_path} is on a disk without locks"
    assert capfd.readouterr().err.count(warning) == 1
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("failing", ["pathlib.Path.mkdir", "os.open"])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, failing):
    """The line names the folder, or the .lock of somebody else in it."""
    error = PermissionError(errno.EACCES, "denied", "checkpoints/.lock")
    problem = "cannot write to the checkpoint folder .*checkpoints/.lock"
    with patch(failing, side_effect=error), pytest.raises(SystemExit, match=problem):
        lock_folder(tmp_path)
