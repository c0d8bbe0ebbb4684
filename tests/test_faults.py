"""Each fault is injected for real: it must end with a short, clear message and cost no work."""

import errno
import gzip
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    SCRIPT,
    checkpoints,
    checksum,
    command,
    in_ranks,
    newest,
    processes,
    run,
    runs,
    wait_until,
)

import train_ddp
import utils
from model import ConvNet

JOB = "--epochs", 1, "--save_every", 10, "--keep", 100  # 79 steps with 2 x 64 images
LONG = "--epochs", 1000, "--save_every", 20
TOGETHER = 10  # seconds within which a job ends once a part of it has died


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The checkpoints of a run with two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run(command(*JOB, "--world_size", 2), folder)
    assert result.returncode == 0, result.stderr
    return folder / "checkpoints"


@pytest.fixture
def folder(undisturbed, tmp_path):
    """A copy of these checkpoints, where a command in tmp_path resumes from."""
    return Path(shutil.copytree(undisturbed, tmp_path / "checkpoints"))


@pytest.fixture
def unshare():
    """A prefix that runs a shell script as root of private mount and host names."""
    for prefix in (
        ["unshare", "-mu"],
        ["unshare", "--map-root-user", "-mu"],
    ):
        try:
            subprocess.run([*prefix, "mount", "-t", "tmpfs", "x", "/mnt"], check=True)
            return [*prefix, "sh", "-ec"]
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip("unshare may not make private namespaces here")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoints(folder)}


def changed_program(folder: Path, **code: str):
    """Copy the program, with code appended to its modules; return `command` for the copy."""
    folder.mkdir()
    for script in ROOT.glob("*.py"):
        appended = code.pop(script.stem, "")
        (folder / script.name).write_text(f"{script.read_text()}\n{appended}\n")
    assert not code

    def changed_command(*flags: object, torchrun: int | None = None) -> list[str]:
        new = {str(SCRIPT): str(folder / SCRIPT.name)}
        return [new.get(part, part) for part in command(*flags, torchrun=torchrun)]

    return changed_command


def fault_in(rank: int, code: str, step: int = 6) -> str:
    """What to append to data.py so that `code` runs in a step of a rank."""
    return f"""
import shutil, signal
import torch.distributed as dist
fetch_batch, calls = Digits.__getitems__, []
def __getitems__(self, indices):
    calls.append(indices)
    if len(calls) == {step} and dist.get_rank() == {rank}:
        open("fault", "w").close()
        {code}
    return fetch_batch(self, indices)
Digits.__getitems__ = __getitems__
"""


def launched(torchrun: bool, *flags: object, make=command) -> list[str]:
    if torchrun:
        return make(*flags, torchrun=2)
    return make(*flags, "--world_size", 2)


def ends(job, mark: Path, seconds: float = TOGETHER) -> str:
    """Wait for the job to end, all of it, with a failure; return what it printed."""
    end = time.monotonic() + seconds
    assert job.wait(seconds) != 0, job.output()
    wait_until(lambda: not processes(mark), end - time.monotonic())
    return job.output()


def error_line(text: str) -> str:
    """The only error line of a run that ended without a traceback."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def flip_bit(path: Path) -> None:
    """Flip a bit in the last layer's weights, where torch.load does not see it."""
    weight = list(torch.load(path, weights_only=True)["model"].values())[-2]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 0x40
    path.write_bytes(content)
    loaded = list(torch.load(path, weights_only=True)["model"].values())[-2]
    assert (loaded != weight).sum() == 1


# Checkpoints


def test_damaged_checkpoints_are_named_and_the_sound_one_before_is_used(
    undisturbed, folder, tmp_path
):
    """The run ends bit-equal; a leftover of a killed save is cleaned away, not loaded."""
    *_, sound, pickled, zeroed, cut, flipped = checkpoints(folder)
    torch.save({"model": Payload(tmp_path / "executed")}, pickled)
    zeroed.write_bytes(bytes(zeroed.stat().st_size))
    flip_bit(flipped)
    leftover = folder / ".tmp-epoch00009-image000000000.pt"
    leftover.write_bytes(cut.read_bytes()[:100_000])
    shutil.copy(leftover, cut)
    foreign = folder / "epoch00007-image000000000.pt"
    foreign.write_text("not a checkpoint at all")
    result = run(command(*JOB, "--world_size", 2), tmp_path)
    assert result.returncode == 0, result.stderr
    for path in pickled, zeroed, cut, flipped, foreign:
        warning = rf"^.*{path.name} is damaged.*$"
        assert len(re.findall(warning, result.stderr, re.MULTILINE)) == 1
    assert re.search(rf"^start +\S*{sound.name}$", result.stdout, re.MULTILINE)
    assert not (tmp_path / "executed").exists()
    assert not leftover.exists()
    foreign.unlink()  # sorts behind what the run wrote
    assert checksum(folder) == checksum(undisturbed)


@pytest.mark.parametrize(
    "kind",
    ["empty", "cut", "zeroed", "flipped", "text", "zip", "pickle", "foreign", "old"],
)
def test_no_kind_of_damage_is_loaded(kind, folder, tmp_path, capfd):
    """The one before is, after a warning that names the damaged one; nothing is executed."""
    *_, sound, path = checkpoints(folder)
    content = path.read_bytes()
    if kind == "flipped":
        flip_bit(path)
    elif kind == "zip":  # torch's own format, with code to execute
        torch.save({"model": Payload(tmp_path / "executed")}, path)
    elif kind == "foreign":  # harmless and readable, but of another program
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "old":  # of this program, when it had two optimizers
        state = newest(folder)
        torch.save(state | {"optimizers": [state.pop("optimizer")]}, path)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[:-1],
                "zeroed": bytes(len(content)),
                "text": b"not a checkpoint",
                "pickle": pickle.dumps(Payload(tmp_path / "executed")),
            }[kind]
        )
    assert utils.newest_checkpoint(folder) == (sound.name, sound.read_bytes())
    assert f"{path} is damaged" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_a_flipped_bit_anywhere_is_detected_or_harmless(undisturbed, tmp_path):
    """Flips a bit in each byte of a file, and never gets other content out of it."""
    path = tmp_path / "small.pt"
    state = dict.fromkeys(newest(undisturbed), torch.arange(6.0))
    torch.save(state, path)
    sound = path.read_bytes()
    detected = 0
    for position in range(len(sound)):
        content = bytearray(sound)
        content[position] ^= 1 << position % 8
        try:
            loaded = utils.decode_checkpoint(bytes(content))
        except Exception:  # noqa: BLE001 (damage can raise anything)
            detected += 1
        else:
            assert repr(loaded) == repr(state), position
    assert detected > len(sound) / 4


def test_with_every_checkpoint_damaged_the_run_refuses_and_overwrites_nothing(
    folder, tmp_path
):
    for path in checkpoints(folder):
        path.write_bytes(path.read_bytes()[:-1000])
    before = snapshot(folder)
    result = run(command(*JOB), tmp_path)
    assert result.returncode == 1
    assert str(folder.name) in error_line(result.stderr)
    assert snapshot(folder) == before


def test_a_checkpoint_of_another_kind_of_training_is_refused(folder, tmp_path, start):
    """In a line that names both sides and the fix; the checkpoints stay as they are."""
    data = shutil.copytree(SAMPLE, tmp_path / "data")
    labels = data / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[-1] = (content[-1] + 1) % 10
    labels.write_bytes(gzip.compress(content))
    one_more_layer = """
class ConvNet(ConvNet):
    def __init__(self):
        super().__init__()
        self.layers.append(nn.Linear(10, 10))"""
    other_model = changed_program(tmp_path / "model", model=one_more_layer)
    weights = list(ConvNet().parameters())
    sgd = torch.optim.SGD(weights, momentum=0.9)
    groups = torch.optim.AdamW([{"params": weights[:4]}, {"params": weights[4:]}])
    cases = {
        "seed": (command(*JOB, "--seed", 5), r"seed 0,.* 5:"),
        "data": (
            command(*JOB, "--data_dir", data, data=False),
            r"MNIST 10000\+2000 (\w{12}),.* MNIST 10000\+2000 (?!\1)\w{12}:",
        ),
        "model": (other_model(*JOB), r"does not fit.*layers\.9\.weight"),
        "SGD": (command(*JOB), "optimizer SGD,.* AdamW:"),
        "groups": (command(*JOB), "does not fit.*parameter group"),
    }
    jobs = {}
    for kind, (cmd, pattern) in cases.items():
        own = shutil.copytree(folder, tmp_path / f"{kind}-checkpoints")
        state = newest(own)
        if kind == "SGD":
            state["args"]["optimizer"] = "SGD"
            state["optimizer"] = sgd.state_dict()
        elif kind == "groups":
            state["optimizer"] = groups.state_dict()
        torch.save(state, checkpoints(own)[-1])
        jobs[kind] = start([*cmd, "--checkpoint_dir", str(own)]), own, snapshot(own)
    for kind, (job, own, before) in jobs.items():
        assert job.wait() == 1, job.output()
        line = error_line(job.output())
        assert checkpoints(own)[-1].name in line
        assert "--checkpoint_dir" in line  # the fix
        assert re.search(cases[kind][1], line), line
        assert snapshot(own) == before


def test_changed_batch_size_lr_and_world_size_are_allowed_and_reported(
    folder, tmp_path
):
    checkpoints(folder)[-1].unlink()  # of the end: there are some steps to go
    result = run(
        command(*JOB, "--world_size", 1, "--batch_size", 32, "--lr", 0.02), tmp_path
    )
    assert result.returncode == 0, result.stderr
    for change in (
        "batch_size from 64 to 32",
        "lr from 0.01 to 0.02",
        "world_size from 2 to 1",
    ):
        assert result.stdout.count(change) == 1
    assert newest(folder)["args"]["batch_size"] == 32


def test_files_with_other_names_are_neither_loaded_nor_deleted(folder):
    """They are the user's own: here sound checkpoints that would sort behind the newest."""
    *_, last = checkpoints(folder)
    names = "epoch_best.pt", "epoch00009-copy.pt", "epoch00009-image000000000.pt.bak"
    own = [Path(shutil.copy(folder / last.name, folder / name)) for name in names]
    assert utils.newest_checkpoint(folder)[0] == last.name
    utils.claim_folder(folder).close()
    following = folder / "epoch00002-image000000000.pt"
    utils.save_checkpoint(following, newest(folder), keep=1)
    assert set(folder.glob("epoch*")) == {following, *own}


def test_a_new_checkpoint_is_on_the_disk_before_older_ones_are_deleted(
    folder, monkeypatch
):
    """Content, then name, then directory, then deletions: a power cut in between costs nothing."""
    old, path = checkpoints(folder)[-1], folder / "epoch00002-image000000000.pt"
    events, sizes = [], {}

    def record(function: str) -> None:
        real = getattr(os, function)

        def recorder(item, *args, **kwargs):
            name = args[0] if args else item
            if isinstance(item, int):
                name = os.readlink(f"/proc/self/fd/{item}")
                sizes[name] = os.fstat(item).st_size
            events.append((function, str(name)))
            return real(item, *args, **kwargs)

        monkeypatch.setattr(os, function, recorder)

    for function in "fsync", "replace", "unlink":
        record(function)
    utils.save_checkpoint(path, newest(folder), keep=1)
    content, name = ("fsync", f"{folder}/.tmp-{path.name}"), ("replace", str(path))
    order = [content, name, ("fsync", str(folder)), ("unlink", str(old))]
    assert sorted(map(events.index, order)) == list(map(events.index, order)), events
    # It was flushed before the fsync.
    assert sizes[f"{folder}/.tmp-{path.name}"] == path.stat().st_size
    assert checkpoints(folder) == [path]
    utils.write_atomically(folder / "small", b"flushed too")
    assert sizes[f"{folder}/.tmp-small"] == len("flushed too")


def test_a_checkpoint_holds_cpu_tensors_only(folder, tmp_path):
    """Here tensors are saved as those of a GPU are, which needs a GPU to load them."""
    state, path = newest(folder), tmp_path / "epoch00002-image000000000.pt"
    weights = [*state["model"].values()]
    on_gpu = {weight.untyped_storage().data_ptr() for weight in weights}
    registry = torch.serialization._package_registry
    before = [*registry]
    torch.serialization.register_package(
        0,
        lambda storage: "cuda:0" if storage.data_ptr() in on_gpu else None,
        lambda storage, location: None,
    )

    def devices(file) -> list[str]:
        seen = []
        torch.load(file, map_location=lambda item, tag: seen.append(tag) or item)
        return seen

    try:
        torch.save(state, tmp_path / "gpu.pt")
        utils.save_checkpoint(path, state, keep=1)
        assert devices(tmp_path / "gpu.pt").count("cuda:0") == len(weights)
        assert {*devices(path)} == {"cpu"}
    finally:
        registry[:] = before


# Disks


def test_a_full_disk_leaves_earlier_checkpoints_whole_and_names_the_good_one(
    folder, tmp_path, start
):
    """A file size limit stops the save midway: the same to the program as a full disk."""
    checkpoints(folder)[-1].unlink()
    before = snapshot(folder)
    limited = ["sh", "-c", 'ulimit -f 400; exec "$@"', "sh"]  # x 512 bytes: half of one
    job = start([*limited, *command(*JOB, "--world_size", 2)], MARK=str(tmp_path))
    job.wait_for("cannot save")
    line = error_line(ends(job, tmp_path))
    assert line.endswith(f"{checkpoints(folder)[-1].name}")
    assert "File too large" in line
    assert snapshot(folder) == before


def test_a_data_folder_that_cannot_be_made_is_an_error_without_a_network_too(tmp_path):
    """The sample stands in for a network, not for a mistaken --data_dir."""
    (tmp_path / "file").touch()
    cmd = command("--epochs", 1, "--data_dir", "file/data", data=False)
    result = run(cmd, tmp_path, http_proxy="http://127.0.0.1:9")
    assert (result.returncode, result.stdout) == (1, "")
    line = error_line(result.stderr)
    assert "file/data" in line and "--data_dir" in line


def test_an_error_is_printed_before_the_group_is_taken_down(tmp_path):
    """Meanwhile torchrun may end rank 0, because another rank has left already."""
    ended = "dist.destroy_process_group = lambda: os.kill(os.getpid(), signal.SIGTERM)"
    make = changed_program(tmp_path / "it", utils=ended)
    (tmp_path / "checkpoints").touch()
    result = run(make(*JOB), tmp_path)
    assert result.returncode == -signal.SIGTERM
    assert "cannot write to the checkpoint folder" in error_line(result.stderr)


@pytest.mark.slow
def test_a_folder_that_turns_read_only_is_reported_with_the_good_checkpoint(tmp_path):
    """A run that begins in a read-only folder is refused as clearly."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    # root may write in spite of the mode
    lock, unlock = (
        ("chmod a-w", "chmod u+w") if os.getuid() else ("chattr +i", "chattr -i")
    )
    if os.system(f"{lock} {folder} && {unlock} {folder}"):
        pytest.skip(f"no {lock} here")
    read_only = fault_in(0, f'os.system("{lock} {folder}")', step=30)
    make = changed_program(tmp_path / "it", data=read_only)
    try:
        result = run(make(*LONG), tmp_path)
        assert result.returncode == 1
        assert error_line(result.stderr).endswith(checkpoints(folder)[-1].name)
        assert [path.name for path in checkpoints(folder)] == [
            f"epoch00000-image{20 * 64:09d}.pt"
        ]
        utils.decode_checkpoint(checkpoints(folder)[-1].read_bytes())
        result = run(command(*LONG, "--checkpoint_dir", folder / "new"), tmp_path)
        assert result.returncode == 1
        assert str(folder) in error_line(result.stderr)
    finally:
        os.system(f"{unlock} {folder}")


@pytest.mark.slow
def test_a_folder_deleted_during_the_run_is_created_again(undisturbed, tmp_path):
    delete = fault_in(0, 'shutil.rmtree("checkpoints")', step=25)
    make = changed_program(tmp_path / "it", data=delete)
    result = run(make(*JOB, "--world_size", 2), tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        checkpoints(tmp_path / "checkpoints")[0].name == "epoch00000-image000003840.pt"
    )
    assert checksum(tmp_path / "checkpoints") == checksum(undisturbed)


def test_a_second_run_in_the_folder_refuses_and_the_first_trains_on(tmp_path, start):
    folder = tmp_path / "checkpoints"
    first = start(command(*LONG))
    wait_until(lambda: checkpoints(folder), 60, first)
    second = run(command("--epochs", 1), tmp_path)
    assert second.returncode == 1
    assert "another run" in error_line(second.stderr)
    seen = checkpoints(folder)[-1]
    wait_until(lambda: checkpoints(folder)[-1] > seen, 30, first)
    first.process.kill()  # the lock is gone with its holder: no file to delete by hand
    first.wait()
    utils.claim_folder(folder).close()


def test_a_refused_run_leaves_the_save_of_the_other_alone(tmp_path):
    leftover, saving = tmp_path / ".tmp-leftover.pt", tmp_path / ".tmp-saving.pt"
    leftover.touch()
    with utils.claim_folder(tmp_path):
        assert not leftover.exists()
        saving.touch()
        with pytest.raises(utils.UserError, match="another run"):
            utils.claim_folder(tmp_path)
        assert saving.exists()


@pytest.mark.parametrize(
    "code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO]
)
def test_a_disk_without_locks_gets_a_warning(code, tmp_path, monkeypatch, capfd):
    """The lock file may be a link: what it points to keeps its content."""
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to("target")

    def flock(*args) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(utils.fcntl, "flock", flock)
    if code == errno.EIO:
        with pytest.raises(utils.UserError, match=os.strerror(code)):
            utils.claim_folder(tmp_path)
    else:
        utils.claim_folder(tmp_path).close()
        assert f"{tmp_path} is on a disk without locks" in capfd.readouterr().err
    assert (tmp_path / "target").read_text() == "precious"


def test_without_fcntl_as_on_windows_the_program_ends_with_one_line(tmp_path):
    code = f"""
import runpy, sys
sys.modules["fcntl"] = None
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["train_ddp.py"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")"""
    result = run([sys.executable, "-c", code], tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Windows" in error_line(result.stderr)
    assert len(result.stderr.splitlines()) == 1


# Processes


def test_killed_in_the_middle_of_a_save_a_rerun_ends_bit_equal(
    undisturbed, tmp_path, start
):
    """With half of the file on the disk; the rerun deletes it and does not load it."""
    folder = tmp_path / "checkpoints"
    (tmp_path / "hold").mkdir()
    (tmp_path / "hold" / "sitecustomize.py").write_text("""
import os
fsync = os.fsync
def fsync_and_hold(file):
    if "image000002560" in os.readlink(f"/proc/self/fd/{file}"):
        os.truncate(file, os.fstat(file).st_size // 2)
        open("held", "w").close()
        os.read(os.pipe()[0], 1)  # for ever: nobody writes
    fsync(file)
os.fsync = fsync_and_hold
""")
    job = start(
        command(*JOB, "--world_size", 2),
        PYTHONPATH=str(tmp_path / "hold"),
        MARK=str(tmp_path),
    )
    wait_until((tmp_path / "held").exists, 60, job)
    for pid in processes(tmp_path):
        os.kill(pid, signal.SIGKILL)
    job.wait()
    [leftover] = folder.glob(".tmp-*")
    assert len(checkpoints(folder)) == 1
    # Without --save_every: nothing is written under the name of the leftover again.
    result = run(command("--epochs", 1, "--world_size", 2), tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert checkpoints(folder)[0].name in result.stdout
    assert not leftover.exists()
    assert checksum(folder) == checksum(undisturbed)


FAULTS = {
    "raises": """import atexit
        atexit.register(print, "torn down")
        raise ConnectionResetError("Connection reset by peer")""",
    "exits": "os._exit(7)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    "torchrun, rank, fault",
    [
        (False, 0, "exits"),
        pytest.param(False, 1, "raises", marks=pytest.mark.slow),
        (False, 1, "is killed"),
        (True, 1, "raises"),
        pytest.param(True, 0, "is killed", marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_dies_all_end_soon_and_the_cause_is_reported(
    torchrun, rank, fault, tmp_path, start
):
    """With a failure, no orphans, and the first cause readable once."""
    make = changed_program(tmp_path / "it", data=fault_in(rank, FAULTS[fault]))
    job = start(launched(torchrun, *LONG, make=make), MARK=str(tmp_path))
    wait_until((tmp_path / "fault").exists, 60, job)
    output = ends(job, tmp_path)
    if fault == "raises":
        assert output.count("\nConnectionResetError: ") == 1
        assert "torn down" not in output  # which can hang, with pending collectives
        assert len(re.findall("rank . lost another rank", output)) == 1
        assert f"rank {1 - rank} lost another rank" in output
    elif torchrun:  # it is torchrun that reports
        code = {"exits": "7", "is killed": "-9"}[fault]
        assert re.search(rf"rank +: {rank} .*\n *exitcode +: {code} ", output)
    else:
        cause = {
            "exits": f"error: process {rank} terminated with exit code 7;",
            "is killed": f"error: process {rank} terminated with signal SIGKILL",
        }
        assert len(re.findall(cause[fault], output)) == 1
        assert "Traceback" not in output


def test_a_single_process_never_claims_to_have_lost_another_rank(tmp_path):
    """What is not recognised keeps its traceback."""
    trouble = 'raise RuntimeError("[gloo/pair.cc:9] Connection closed by peer")'
    make = changed_program(tmp_path / "it", data=fault_in(0, trouble))
    result = run(make(*LONG, "--world_size", 1), tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RuntimeError: [gloo/pair.cc:9]" in result.stderr.splitlines()[-1]
    assert "lost another rank" not in result.stderr


@pytest.mark.parametrize("torchrun", [False, True])
def test_workers_end_soon_after_their_launcher_is_killed(torchrun, tmp_path, start):
    """torchrun starts them in sessions of their own: no signal would reach them."""
    job = start(launched(torchrun, *LONG), MARK=str(tmp_path))
    wait_until(lambda: checkpoints(tmp_path / "checkpoints"), 60, job)
    assert len(processes(tmp_path)) >= 3
    job.process.kill()
    wait_until(lambda: not processes(tmp_path), TOGETHER)


def test_workers_end_soon_if_their_launcher_is_killed_during_start_up(tmp_path, start):
    job = start(command(*LONG, "--world_size", 2), MARK=str(tmp_path))
    wait_until(lambda: any(map(imports_torch, job.workers())), 60, job)
    job.process.kill()
    wait_until(lambda: not processes(tmp_path), TOGETHER)


@pytest.mark.slow
def test_a_frozen_rank_ends_the_run_after_the_timeout(tmp_path, start):
    """It is shortened here; killing the frozen rank takes the launcher some seconds more."""
    stop = fault_in(0, "os.kill(os.getpid(), signal.SIGSTOP)")
    short = "TIMEOUT = timedelta(seconds=5)"
    make = changed_program(tmp_path / "it", data=stop, utils=short)
    job = start(make(*LONG, "--world_size", 2), MARK=str(tmp_path))
    wait_until((tmp_path / "fault").exists, 60, job)
    assert "rank 1 lost another rank" in error_line(
        ends(job, tmp_path, 5 + 2 * TOGETHER)
    )


def imports_torch(pid: int) -> bool:
    """Whether a self-spawned worker imports torch, or has done so."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
    return runs(pid, "spawn_main") and "libtorch_cpu" in maps


@pytest.mark.parametrize(
    ("torchrun", "moment"),
    [
        *((False, m) for m in ["interpreter", "worker", "set-up"]),
        (True, "set-up"),
    ],
)
def test_ctrl_c_during_start_up_leaves_at_once(torchrun, moment, tmp_path, start):
    """With nothing saved; once torch is imported, without a traceback of ours as well."""
    job = start(launched(torchrun, *JOB), MARK=str(tmp_path))
    if moment == "interpreter":  # of the first worker, which has not read our code yet
        wait_until(
            lambda: any(runs(pid, "spawn_main") for pid in job.workers()), 60, job
        )
    elif moment == "worker":
        wait_until(lambda: any(map(imports_torch, job.workers())), 60, job)
    else:
        wait_until((tmp_path / "checkpoints" / ".lock").exists, 60, job)
    os.killpg(job.process.pid, signal.SIGINT)
    output = ends(job, tmp_path)
    if moment == "set-up":
        assert not re.search(r'File ".*(train_ddp|utils|data|model)\.py"', output)
        assert torchrun or "Traceback" not in output
    assert not checkpoints(tmp_path / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_trains_with_an_unresolvable_hostname_and_a_full_dev_shm(
    torchrun, unshare, undisturbed, tmp_path
):
    script = """
        hostname no-such-host.invalid
        mount -t tmpfs -o size=4k tmpfs /dev/shm
        head -c 4096 /dev/zero > /dev/shm/full
        exec "$@" """
    cmd = launched(torchrun, *JOB)
    if torchrun:  # it looks up the name on its own account, unless told not to
        cmd.insert(3, "--local-addr=127.0.0.1")
    result = run([*unshare, script, "sh", *cmd], tmp_path)
    assert result.returncode == 0, result.stderr
    assert checksum(tmp_path / "checkpoints") == checksum(undisturbed)


LOOPBACK = re.compile("[0-9A-F]{6}7F|0{24}01000000|0{16}FFFF0000[0-9A-F]{6}7F")


def listening(pids: list[int]) -> list[str]:
    """The addresses, as the system's socket tables have them, where processes listen."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.update(re.findall(r"socket:\[(\d+)]", os.readlink(descriptor)))
            except OSError:
                continue  # closed since
    tables = [Path("/proc/net", name).read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    return [f[1].split(":")[0] for f in lines if f[3] == "0A" and f[9] in inodes]


def test_a_self_spawned_run_listens_on_loopback_only(unshare, tmp_path, start):
    """Even where the hostname resolves to an address that others can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))  # sends nothing, just picks an address
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = outward.getsockname()[0]
    (tmp_path / "hosts").write_text(f"{address} reachable\n127.0.0.1 localhost\n")
    script = f"""
        hostname reachable
        mount --bind "{tmp_path}/hosts" /etc/hosts
        exec "$@" """
    cmd = [*unshare, script, "sh", *command(*LONG, "--world_size", 2)]
    job = start(cmd, MARK=str(tmp_path))
    wait_until(lambda: checkpoints(tmp_path / "checkpoints"), 60, job)
    sockets = set(listening(processes(tmp_path)))
    assert sockets  # gloo's, or there is nothing to see here
    assert all(map(LOOPBACK.fullmatch, sockets)), sockets


# Numbers


def test_a_loss_that_is_not_finite_stops_the_run_and_never_reaches_a_checkpoint(
    tmp_path,
):
    """A rerun stops as clearly, instead of training on from nan."""
    for often in ("--save_every", 1), ():
        wild = "--lr", 9e4, "--epochs", 3, "--keep", 500, "--world_size", 2
        result = run(command(*wild, *often), tmp_path)
        assert result.returncode == 1, result.stdout
        assert re.search("the loss is .*lower --lr", error_line(result.stderr))
        for path in checkpoints(tmp_path / "checkpoints"):
            state = torch.load(path, weights_only=True)
            for name, weight in state["model"].items():
                assert weight.isfinite().all(), (path, name)


def save_weights_that_are_not_finite(folder: Path) -> None:
    model = ConvNet()
    model.layers[0].bias.data[0] = torch.inf
    args = SimpleNamespace(checkpoint_dir=folder, keep=3)
    run = train_ddp.Run(args, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(utils.UserError, match="lower --lr"):
        train_ddp.save(run)


def test_weights_that_are_not_finite_after_a_finite_loss_are_not_saved(tmp_path):
    in_ranks(2, save_weights_that_are_not_finite, tmp_path)
    assert not checkpoints(tmp_path)
