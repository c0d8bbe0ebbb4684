"""Each fault is injected for real: it must end short and clear, and cost no work."""

import gzip
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    SCRIPT,
    checkpoints,
    checksum,
    command,
    newest,
    processes,
    run,
    runs,
    wait_until,
)

import utils

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
    sample = shutil.copytree(SAMPLE, folder / "tests" / "mnist_sample")
    new = {str(SCRIPT): str(folder / SCRIPT.name), str(SAMPLE): str(sample)}

    def changed_command(*flags: object, torchrun: int | None = None) -> list[str]:
        return [new.get(part, part) for part in command(*flags, torchrun=torchrun)]

    return changed_command


def fault_in(rank: int, code: str) -> str:
    """What to append to data.py to have `code` run in the sixth step of a rank."""
    return f"""
import os, signal, sys
sound_batches = batches
def batches(*args):
    for step, batch in enumerate(sound_batches(*args)):
        if step == 5 and dist.get_rank() == {rank}:
            open("fault", "w").close()
            {code}
        yield batch
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
    "kind", ["empty", "cut", "zeroed", "flipped", "text", "zip", "pickle", "foreign"]
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
    assert utils.newest_checkpoint(folder) == (str(sound), sound.read_bytes())
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


def test_a_checkpoint_of_another_seed_data_set_or_model_is_refused(
    folder, tmp_path, start
):
    """In a line that names both sides and the cure; the checkpoints stay as they are."""
    other_data = changed_program(tmp_path / "data")
    labels = tmp_path / "data" / "tests" / "mnist_sample" / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[-1] = (content[-1] + 1) % 10
    labels.write_bytes(gzip.compress(content))
    one_more_layer = "_create = create_model\ndef create_model(seed):\n    net = _create(seed)\n    net.layers.append(nn.Linear(10, 10))\n    return net"
    other_model = changed_program(tmp_path / "model", model=one_more_layer)
    before, jobs = snapshot(folder), {}
    for kind, make in ("seed", command), ("data", other_data), ("model", other_model):
        own = shutil.copytree(folder, tmp_path / f"{kind}-checkpoints")
        flags = ["--seed", 5] if kind == "seed" else []
        jobs[kind] = start(make(*JOB, *flags, "--checkpoint_dir", own)), own
    for kind, (job, own) in jobs.items():
        assert job.wait() == 1, job.output()
        line = error_line(job.output())
        assert checkpoints(own)[-1].name in line
        assert "--checkpoint_dir" in line  # the cure
        if kind == "seed":
            assert re.search(r"seed\b.*\b0\b.*\b5\b", line)
        elif kind == "data":
            assert len(set(re.findall(r"10000\+2000 [0-9a-f]{12}", line))) == 2
        else:
            assert "model" in line and "layers.9.weight" in line
        assert snapshot(own) == before


def test_changed_batch_size_lr_and_world_size_are_allowed_and_said(folder, tmp_path):
    checkpoints(folder)[-1].unlink()  # of the end: there are some steps to go
    result = run(
        command(*JOB, "--world_size", 1, "--batch_size", 32, "--lr", 0.02), tmp_path
    )
    assert result.returncode == 0, result.stderr
    for change in (
        "batch_size from 64 to 32",
        "lr from 0.01 to 0.02",
        "size from 2 to 1",
    ):
        assert result.stdout.count(change) == 1
    assert newest(folder)["settings"]["batch_size"] == 32


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
    assert not list(folder.glob(".tmp-*"))


def test_a_data_folder_that_cannot_be_made_is_an_error_without_a_network_too(tmp_path):
    """The sample stands in for a network, not for a mistaken --data_dir."""
    (tmp_path / "file").touch()
    cmd = command("--epochs", 1, "--data_dir", "file/data", data=False)
    result = run(cmd, tmp_path, http_proxy="http://127.0.0.1:9")
    assert (result.returncode, result.stdout) == (1, "")
    line = error_line(result.stderr)
    assert "file/data" in line and "--data_dir" in line


def test_a_full_disk_does_no_harm_to_a_complete_run(folder, tmp_path):
    """There is nothing to write."""
    before = snapshot(folder)
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh"]
    result = run([*limited, *command(*JOB)], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert snapshot(folder) == before
    assert not list(folder.glob(".tmp-*"))


def test_a_full_file_system_leaves_sound_checkpoints_only(unshare, tmp_path):
    script = """
        mount -t tmpfs -o size=1m tmpfs small
        "$@" && exit 99
        cp -r small/. kept"""
    (tmp_path / "small").mkdir()
    (tmp_path / "kept").mkdir()
    result = run(
        [*unshare, script, "sh", *command(*JOB, "--checkpoint_dir", "small")], tmp_path
    )
    assert result.returncode == 0, result.stderr  # that of cp
    line = error_line(result.stderr)
    kept = checkpoints(tmp_path / "kept")
    assert line.endswith(f"small/{kept[-1].name}") and "No space left" in line
    for path in kept:
        utils.decode_checkpoint(path.read_bytes())
    assert not list((tmp_path / "kept").glob(".tmp-*"))


def test_a_folder_that_turns_read_only_is_told_with_the_good_checkpoint(
    tmp_path, start
):
    """A run that begins in a read-only folder is refused as clearly."""
    folder = tmp_path / "checkpoints"
    if os.getuid():
        lock, unlock = ["chmod", "a-w", folder], ["chmod", "u+w", folder]
    else:  # root may write in spite of the mode
        lock, unlock = ["chattr", "+i", folder], ["chattr", "-i", folder]
    job = start(command(*LONG))
    wait_until(lambda: checkpoints(folder), 60, job)
    try:
        if not shutil.which(lock[0]) or subprocess.run(lock, check=False).returncode:
            pytest.skip(f"no {lock[0]} here")
        assert job.wait(TOGETHER) == 1
        assert error_line(job.output()).endswith(checkpoints(folder)[-1].name)
        assert not list(folder.glob(".tmp-*"))
        utils.decode_checkpoint(checkpoints(folder)[-1].read_bytes())
        result = run(command(*LONG, "--checkpoint_dir", folder / "new"), tmp_path)
        assert result.returncode == 1
        assert str(folder) in error_line(result.stderr)
    finally:
        subprocess.run(unlock, check=False)


def test_a_folder_deleted_during_the_run_is_made_anew_or_told_in_one_line(
    undisturbed, tmp_path, start
):
    folder = tmp_path / "checkpoints"
    job = start(command(*JOB, "--world_size", 2), MARK=str(tmp_path))
    wait_until(lambda: checkpoints(folder), 60, job)
    shutil.rmtree(folder, ignore_errors=True)  # a save may come in between
    if job.wait() == 0:
        assert checksum(folder) == checksum(undisturbed)
    else:
        assert str(folder.name) in error_line(job.output())
    wait_until(lambda: not processes(tmp_path), TOGETHER)


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
    utils.lock_folder(folder).close()


# Processes


def test_killed_in_the_middle_of_a_save_a_rerun_ends_bit_equal(
    undisturbed, tmp_path, start
):
    """Kills until a half-written file is left; the rerun deletes it and does not load it."""
    folder, every_step = tmp_path / "checkpoints", [*JOB, "--save_every", 1]
    for _ in range(8):
        job = start(command(*every_step, "--world_size", 2))
        # Tight, as a save takes milliseconds.
        wait_until(lambda: list(folder.glob(".tmp-*.pt")), 60, job)
        os.killpg(job.process.pid, signal.SIGKILL)
        job.wait()
        if leftovers := list(folder.glob(".tmp-*")):
            break
    else:
        pytest.fail("no kill hit a save")
    for path in checkpoints(folder):
        utils.decode_checkpoint(path.read_bytes())
    result = run(command(*JOB, "--world_size", 2), tmp_path)
    assert result.returncode == 0, result.stderr
    assert not any(leftover.exists() for leftover in leftovers)
    assert checksum(folder) == checksum(undisturbed)


FAULTS = {
    "raises": 'raise ValueError("broken")',
    "exits": "os._exit(7)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    "torchrun, rank, fault",
    [
        (False, 0, "exits"),
        (False, 1, "raises"),
        (False, 1, "is killed"),
        (True, 1, "raises"),
        (True, 0, "is killed"),
    ],
)
def test_when_a_rank_dies_all_end_soon_and_the_cause_is_told(
    torchrun, rank, fault, tmp_path, start
):
    """With a failure, no orphans, and the first cause readable once."""
    make = changed_program(tmp_path / "it", data=fault_in(rank, FAULTS[fault]))
    job = start(launched(torchrun, *LONG, make=make), MARK=str(tmp_path))
    wait_until((tmp_path / "fault").exists, 60, job)
    output = ends(job, tmp_path)
    if fault == "raises":
        assert output.count("ValueError: broken") == 1
    elif torchrun:  # it is torchrun that tells
        code = {"exits": "7", "is killed": "-9"}[fault]
        assert re.search(rf"rank +: {rank} .*\n *exitcode +: {code} ", output)
    else:
        told = {
            "exits": rf"rank {rank}\b.*\b7\b",
            "is killed": f"rank {rank} .*SIGKILL",
        }
        assert len(re.findall(told[fault], output)) == 1
        assert "Traceback" not in output


@pytest.mark.parametrize("torchrun", [False, True])
def test_workers_end_soon_after_their_launcher_is_killed(torchrun, tmp_path, start):
    """torchrun starts them in sessions of their own: no signal would reach them."""
    job = start(launched(torchrun, *LONG), MARK=str(tmp_path))
    wait_until(lambda: checkpoints(tmp_path / "checkpoints"), 60, job)
    assert len(processes(tmp_path)) >= 3
    job.process.kill()
    wait_until(lambda: not processes(tmp_path), TOGETHER)


@pytest.mark.parametrize("torchrun", [False, True])
def test_workers_end_soon_if_their_launcher_is_killed_during_start_up(
    torchrun, tmp_path, start
):
    job = start(launched(torchrun, *LONG), MARK=str(tmp_path))
    wait_until(lambda: any(map(imports_torch, job.workers())), 60, job)
    job.process.kill()
    wait_until(lambda: not processes(tmp_path), TOGETHER)


def test_a_frozen_rank_ends_the_run_after_the_collective_timeout(tmp_path, start):
    """It is shortened here; killing the frozen rank takes the launcher some seconds more."""
    stop = fault_in(0, "os.kill(os.getpid(), signal.SIGSTOP)")
    short = "COLLECTIVE_TIMEOUT = timedelta(seconds=3)"
    make = changed_program(tmp_path / "it", data=stop, utils=short)
    job = start(make(*LONG, "--world_size", 2), MARK=str(tmp_path))
    wait_until((tmp_path / "fault").exists, 60, job)
    assert error_line(ends(job, tmp_path, 3 + 2 * TOGETHER))


def imports_torch(pid: int, worker: bool = True) -> bool:
    """Whether a launcher or a worker (not one that torchrun has only forked) does or did."""
    process = Path(f"/proc/{pid}")
    try:
        if worker and runs(pid, "torch.distributed.run"):
            return False
        return "libtorch_cpu" in (process / "maps").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("torchrun", "moment"),
    [
        *((False, m) for m in ["launcher", "interpreter", "worker", "set-up"]),
        *((True, m) for m in ["launcher", "worker", "set-up"]),
    ],
)
def test_ctrl_c_during_start_up_leaves_at_once(torchrun, moment, tmp_path, start):
    """While torch is imported and while ranks meet, with no traceback of ours."""
    job = start(launched(torchrun, *JOB), MARK=str(tmp_path))
    if moment == "interpreter":  # of the first worker, which has not read our code yet
        wait_until(
            lambda: any(runs(pid, "spawn_main") for pid in job.workers()), 60, job
        )
    elif moment == "launcher":
        wait_until(lambda: imports_torch(job.process.pid, worker=False), 60, job)
    elif moment == "worker":
        wait_until(lambda: any(map(imports_torch, job.workers())), 60, job)
    else:
        wait_until((tmp_path / "checkpoints" / ".lock").exists, 60, job)
    os.killpg(job.process.pid, signal.SIGINT)
    output = ends(job, tmp_path)
    assert not re.search(r'File ".*(train_ddp|utils|data|model)\.py"', output)
    assert torchrun or "Traceback" not in output
    assert not checkpoints(tmp_path / "checkpoints")


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
    for often in ("--save_every", 1), (), ("--save_every", 1):
        wild = "--lr", 1e6, "--epochs", 3, "--keep", 500, "--world_size", 2
        result = run(command(*wild, *often), tmp_path)
        assert result.returncode == 1, result.stdout
        assert "lower --lr" in error_line(result.stderr)
        for path in checkpoints(tmp_path / "checkpoints"):
            state = torch.load(path, weights_only=True)
            for name, weight in state["model"].items():
                assert weight.isfinite().all(), (path, name)
