"""Stopping and failing: nothing is lost, nothing hangs, nothing is left, and the cause is readable."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import (
    Started,
    alive,
    checkpoints,
    command,
    fault,
    fault_in_step,
    hand_set,
    newest,
    processes,
    run,
    runs,
    wait_until,
)

import utils

LONG = "--epochs", 1000, "--batch_size", 50, "--save_every", 10, "--keep", 100
TOGETHER = 60  # seconds within which a job ends, on any machine; TIMEOUT is ten minutes
STOPPED = r"stopped; (\S+\.pt) has all progress: rerun to resume"
WITH_LOADERS = fault(data="LOADER_WORKERS = 2")
TWO = "--world_size", 2
SH = "bash", "-c"

# A forked rank begins with the signal handlers that a spawned one would have.
FORKS = """
import functools
mp.spawn = functools.partial(mp.start_processes, start_method="fork")
run_rank_of_launcher = run_spawned_rank
def run_spawned_rank(*args):
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    run_rank_of_launcher(*args)
"""


@pytest.fixture
def launch(fork):
    """Start two ranks by the program's own launcher; it forks them, to be fast."""

    def launch_two(*flags: object, **env: str) -> Started:
        code = json.loads(env.pop("FAULT", "{}"))
        code["utils"] = FORKS + code.get("utils", "")
        env |= fault(code.pop("", ""), **code)
        return fork(*flags, *TWO, **env)

    return launch_two


def everyone(job: Started) -> list[int]:
    """The pids of a job: the launcher, the ranks in order, and their loader workers."""
    return [job.process.pid, *job.workers()]


def all_end(pids: list[int]) -> None:
    wait_until(lambda: not any(map(alive, pids)), TOGETHER)


def status(pid: int, name: str) -> str:
    """A value from /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return re.search(rf"^{name}:\s*(\w+)", text, re.MULTILINE)[1]


def wait_for_progress(job: Started, folder: Path) -> None:
    """Wait for a checkpoint that was not there before."""
    before = {*checkpoints(folder)}
    wait_until(lambda: {*checkpoints(folder)} - before, 120, job)


def check_saved(job: Started, folder: Path, global_batch: int) -> None:
    """One line says what was saved; it is the newest checkpoint, and it is consistent."""
    [named] = re.findall(STOPPED, job.output())
    assert named == f"{folder.name}/{checkpoints(folder)[-1].name}"
    progress = newest(folder)["progress"]
    images = progress["epoch"] * 10000 + progress["images_done"]
    assert images == progress["step"] * global_batch


def error_line(output: str) -> str:
    """The only error line of a run that ended without a traceback."""
    assert "Traceback" not in output
    [line] = re.findall("^error: .*", output, re.MULTILINE)
    return line


# Stops


def test_every_stop_signal_saves_and_then_ends_the_process(fork, tmp_path):
    """It dies of the signal, as other programs do; its loader workers leave it to it."""
    folder = tmp_path / "checkpoints"
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1:
        job = fork(*LONG, **WITH_LOADERS)
        wait_for_progress(job, folder)
        for pid in reversed(everyone(job)):
            os.kill(pid, number)
        assert job.wait() == -number
        check_saved(job, folder, 50)
        assert "rror" not in job.output()


def test_a_signal_to_one_rank_stops_all_of_them_after_one_step(fork, tmp_path):
    """Their exit codes are 128 + the number: by those, torchrun restarts them."""
    folder = tmp_path / "checkpoints"
    for stopped_rank in 0, 1:
        jobs = [fork(*LONG, **WITH_LOADERS, **env) for env in hand_set(2)]
        wait_for_progress(jobs[0], folder)
        os.kill(jobs[stopped_rank].process.pid, signal.SIGUSR1)
        codes = [job.wait() for job in jobs]
        expected = [128 + signal.SIGTERM] * 2
        expected[stopped_rank] = 128 + signal.SIGUSR1
        assert codes == expected, jobs[0].output()
        check_saved(jobs[0], folder, 100)
        assert jobs[1].output() == ""


# By launcher: a signal, and who gets it, of the launcher, rank 0, and the others. Kubernetes sends
# SIGTERM to the launcher, and Slurm SIGUSR1 to all.
LAUNCHER, RANK_0, ALL = slice(1), slice(1, 2), slice(None)
STOPS = {
    "own": [
        (signal.SIGKILL, RANK_0),
        (signal.SIGTERM, ALL),
        (signal.SIGKILL, LAUNCHER),
    ],
    "torchrun": [(signal.SIGTERM, LAUNCHER)],
    "torchrun, rarer": [
        (signal.SIGINT, LAUNCHER),
        (signal.SIGKILL, LAUNCHER),
        (signal.SIGUSR1, ALL),
    ],
}


@pytest.mark.parametrize(
    "launcher",
    ["own", "torchrun", pytest.param("torchrun, rarer", marks=pytest.mark.slow)],
)
def test_stopped_by_any_signal_to_anyone_a_training_loses_nothing(
    start, launch, tmp_path, launcher
):
    """With loader workers."""
    folder = tmp_path / "checkpoints"
    for number, target in STOPS[launcher]:
        saved = checkpoints(folder)
        if launcher == "own":
            job = launch(*LONG, **WITH_LOADERS)
        else:
            job = start(command(*LONG, torchrun=2), **WITH_LOADERS)
        wait_for_progress(job, folder)
        place = f"{folder.name}/{saved[-1].name}" if saved else "from scratch"
        assert f"\nstart      {place}" in job.output()
        pids = everyone(job)
        for pid in pids[target]:
            os.kill(pid, number)
        code = job.wait()
        if target == RANK_0:
            assert code == 128 + number
            continue
        all_end(pids)
        check_saved(job, folder, 100)
        if launcher == "own":
            assert code == -number
            assert "rror" not in job.output()
        else:
            assert code != 0


def test_ctrl_c_ends_a_loop_in_bash(start, tmp_path):
    loop = 'for seed in 0 1; do "$@" --seed $seed --checkpoint_dir c$seed; done'
    job = start([*SH, loop, "-", *command(*LONG, *TWO)], **WITH_LOADERS)
    wait_for_progress(job, tmp_path / "c0")
    pids = everyone(job)
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.wait() == -signal.SIGINT
    all_end(pids)
    check_saved(job, tmp_path / "c0", 100)
    assert not (tmp_path / "c1").exists()


SLOW_DISK = """
import os, time
fsync = os.fsync
def slow_fsync(file):
    time.sleep(2)
    fsync(file)
os.fsync = slow_fsync
"""


def test_no_rank_leaves_before_the_checkpoint_is_on_the_disk(fork, tmp_path):
    """When one has left, launchers end the others. A stop takes ten steps at most."""
    stop = "os.kill(os.getpid(), signal.SIGTERM)"
    env = fault_in_step(0, stop, step=15, at_start=SLOW_DISK)
    jobs = [fork(*LONG[:4], **env, **rank) for rank in hand_set(2)]
    jobs[1].wait()
    assert len(checkpoints(tmp_path / "checkpoints")) == 1
    jobs[0].wait()
    check_saved(jobs[0], tmp_path / "checkpoints", 100)
    assert newest(tmp_path / "checkpoints")["progress"]["step"] == 20


def test_a_second_ctrl_c_ends_even_a_frozen_run_at_once(launch):
    job = launch(*LONG, **fault_in_step(1, "os.kill(os.getpid(), signal.SIGSTOP)"))
    wait_until(lambda: len(everyone(job)) == 3, 120, job)
    launcher, _, frozen = pids = everyone(job)
    wait_until(lambda: status(frozen, "State") == "T", 120, job)
    os.kill(launcher, signal.SIGINT)
    # Until the launcher has passed it on: two signals at once could arrive as one.
    sigterm = 1 << signal.SIGTERM - 1
    wait_until(lambda: int(status(frozen, "ShdPnd"), 16) & sigterm, 120, job)
    os.kill(launcher, signal.SIGINT)
    assert job.wait(TOGETHER) == -signal.SIGINT
    all_end(pids)
    assert not re.search(STOPPED, job.output())


def test_a_second_ctrl_c_ends_a_process_before_it_has_saved(fork, tmp_path):
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    job = fork(*LONG, **fault_in_step(0, f"{interrupt}; {interrupt}"))
    assert job.wait(TOGETHER) == -signal.SIGINT
    assert not checkpoints(tmp_path / "checkpoints")


# Output that goes away


def test_an_output_that_fails_costs_nothing(tmp_path):
    """Nor does a name of a folder that the terminal cannot show."""
    cmd = command("--epochs", 2, "--batch_size", 500, "--checkpoint_dir", "Läufe")
    shell = '"$@" | head -n 1\nexit ${PIPESTATUS[0]}'
    done = run([*SH, shell, "-", *cmd], tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(checkpoints(tmp_path / "Läufe")) == 2


# As after Ctrl-C to a `tee`, with a full disk, in a terminal that was closed, and with `>&-`.
BOTH = "\nos.dup2(output, 1)\nos.dup2(output, 2)"
FAILING_OUTPUTS = {
    "ended": "reader, output = os.pipe()\nos.close(reader)" + BOTH,
    "full": "output = os.open('/dev/full', os.O_WRONLY)" + BOTH,
    "hung up": "screen, output = os.openpty()\nos.close(screen)" + BOTH,
    "none": "import sys\nos.close(1)\nsys.stdout = None",
}
NOHUP = "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"


def test_ctrl_c_to_a_run_whose_output_fails_saves(launch, tmp_path):
    """A hangup that is ignored, as under `nohup`, stops nobody."""
    folder = tmp_path / "checkpoints"
    for name, code in FAILING_OUTPUTS.items():
        job = launch(*LONG, **fault(NOHUP + code))
        wait_for_progress(job, folder)
        for pid in everyone(job):
            os.kill(pid, signal.SIGHUP)
        for _ in range(2):
            wait_for_progress(job, folder)
        os.kill(job.process.pid, signal.SIGINT)
        # Ranks that could not save, or failed afterwards, would have another code.
        assert job.wait() == -signal.SIGINT, name


# Ranks that do not come, die or freeze

# A hundred times as fast, so that 10 s pass in 0.1 s.
FAST_CLOCK = """
import types
real = time
time = types.SimpleNamespace(monotonic=lambda: 100 * real.monotonic(), sleep=real.sleep)
"""


@pytest.mark.parametrize("rank, missing", [(0, "rank 1"), (1, "rank 0")])
def test_a_rank_says_for_whom_it_waits_and_gives_up_in_the_end(fork, rank, missing):
    """Ctrl-C ends it meanwhile."""
    env = hand_set(2)[rank]
    place = f"127.0.0.1:{env['MASTER_PORT']}"
    warning = f"rank {rank} waits for {missing} at {place}"
    soon = fault(utils=f"{FAST_CLOCK}\nTIMEOUT = timedelta(seconds=100)")
    job = fork(**env, **soon)
    assert job.wait() == 1
    assert job.output() == (
        f"warning: {warning}, for 10 seconds now\n"
        f"error: {warning}; gave up after 0:01:40\n"
    )
    job = fork(**env, **fault(utils=f"{FAST_CLOCK}\nTIMEOUT = timedelta(days=99)"))
    job.wait_for("for 10 seconds now\n")
    os.kill(job.process.pid, signal.SIGINT)
    assert job.wait() == -signal.SIGINT
    assert job.output() == f"warning: {warning}, for 10 seconds now\n"


RAISES = """torch.distributed.destroy_process_group = lambda: print("torn down", flush=True)
        raise ConnectionResetError("Connection reset by peer")"""
FAULTS = {
    "raises": RAISES,
    "exits": "os._exit(7)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
}
WAIT = """while not os.path.exists("go"):
            pass
        """


@pytest.mark.parametrize(
    "torchrun, rank, kind",
    [
        (0, 0, "exits"),
        (0, 1, "raises"),
        (0, 1, "is killed"),
        pytest.param(2, 1, "raises", marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_dies_all_end_soon_and_the_cause_is_reported(
    torchrun, rank, kind, tmp_path, start, launch
):
    """With a failure, no orphans, and the first cause readable once."""
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp"), **fault_in_step(rank, WAIT + FAULTS[kind])}
    if torchrun:
        job = start(command(*LONG, torchrun=2), **env)
    else:
        job = launch(*LONG, **env)
    wait_until((tmp_path / "fault").exists, 120, job)
    pids = everyone(job)
    (tmp_path / "go").touch()
    assert job.wait(TOGETHER) != 0
    all_end(pids)
    output = job.output()
    if kind == "raises":
        assert output.count("\nConnectionResetError: ") == 1
        assert f"rank {rank} failed:" in output
        assert "torn down" not in output  # which can hang, with pending collectives
        assert re.findall("rank . lost another rank", output) == [
            f"rank {1 - rank} lost another rank"
        ]
    else:
        end = "exit code 7;" if kind == "exits" else "signal SIGKILL;"
        assert output.count(f"error: process {rank} terminated with {end}") == 1
        assert "Traceback" not in output
    assert not [*(tmp_path / "tmp").glob("train_ddp-*")]


def test_a_frozen_rank_ends_the_run_after_the_timeout(launch):
    """The launcher has to kill it."""
    freezes = fault_in_step(0, "os.kill(os.getpid(), signal.SIGSTOP)")["FAULT"]
    short = fault(utils="TIMEOUT = timedelta(seconds=3)", **json.loads(freezes))
    job = launch(*LONG, **short)
    wait_until(lambda: len(everyone(job)) == 3, 120, job)
    pids = everyone(job)
    assert job.wait(TOGETHER) != 0
    all_end(pids)
    assert "rank 1 lost another rank" in error_line(job.output())


def test_a_single_process_never_claims_to_have_lost_another_rank(fork):
    """What is not recognised keeps its traceback."""
    trouble = 'raise RuntimeError("[/gloo/transport/tcp/pair.cc:9] Connection closed")'
    job = fork(*LONG, **fault_in_step(0, trouble))
    assert job.wait() == 1
    assert "RuntimeError: [/gloo" in job.output()
    assert "lost another rank" not in job.output()


def imports_torch(pid: int) -> bool:
    """Whether a self-spawned worker imports torch, or has done so."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
    return runs(pid, "spawn_main") and "libtorch_cpu" in maps


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_stop_during_start_up_ends_all_at_once(number, tmp_path, start):
    """Ctrl-C, and a killed launcher."""
    job = start(command(*LONG, *TWO), MARK=str(tmp_path))
    wait_until(lambda: any(map(imports_torch, job.workers())), 120, job)
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)
    else:
        os.kill(job.process.pid, number)
    assert job.wait(TOGETHER) == -number
    wait_until(lambda: not processes(tmp_path), TOGETHER)
    assert not checkpoints(tmp_path / "checkpoints")


def test_ctrl_c_before_there_is_something_to_save_leaves_without_a_word(
    launch, tmp_path
):
    waits = "import time\ndef load_data(*args, **kwargs):\n    time.sleep(999)\n"
    job = launch(*LONG, **fault(data=waits))
    wait_until((tmp_path / "checkpoints" / ".lock").exists, 120, job)
    pids = everyone(job)
    for pid in reversed(pids):  # as a terminal may do it
        os.kill(pid, signal.SIGINT)
    assert job.wait(TOGETHER) == -signal.SIGINT
    all_end(pids)
    assert job.output() == ""


# Disks


# A file size limit stops the save midway: the same to the program as a full disk. And root may
# write in a read-only folder.
BAD_DISKS = {
    "File too large": """os.kill(os.getppid(), signal.SIGINT)
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))""",
    "Permission denied": """os.chmod(".", 0o755)
        os.chmod("checkpoints", 0o555)
        os.getuid() or os.seteuid(65534)""",
}


@pytest.mark.parametrize("problem", BAD_DISKS)
def test_a_full_disk_leaves_earlier_checkpoints_whole_and_names_the_good_one(
    launch, fork, tmp_path, problem
):
    """After Ctrl-C, too, the code is 1: to die of the signal would say that all is saved."""
    # Another user could not delete the file in which two ranks have met.
    begin = fork if problem == "Permission denied" else launch
    job = begin(*LONG, **fault_in_step(0, BAD_DISKS[problem], step=15))
    assert job.wait() == 1
    [path] = checkpoints(tmp_path / "checkpoints")
    assert path.stat().st_size > 100_000
    assert newest(path.parent)["progress"]["step"] == 10
    line = error_line(job.output())
    assert "cannot save" in line and problem in line
    assert line.endswith(f"last good checkpoint: checkpoints/{path.name}")
    assert not re.search(STOPPED, job.output())


FREEZE_BEFORE_SAVES = """
claim = FolderLock.claim
def claim_later(self):
    if self.file is not None:
        os.kill(os.getpid(), signal.SIGSTOP)
    claim(self)
FolderLock.claim = claim_later
"""


def test_one_run_per_folder_even_if_it_is_deleted_meanwhile(fork, tmp_path):
    """A deleted folder is created again, unless another run has it by now."""
    folder = tmp_path / "checkpoints"
    first = fork(*LONG, **fault(utils=FREEZE_BEFORE_SAVES))
    pid = first.process.pid
    wait_until(lambda: status(pid, "State") == "T", 120, first)
    shutil.rmtree(folder)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: checkpoints(folder), 120, first)
    wait_until(lambda: status(pid, "State") == "T", 120, first)
    second = fork(*LONG)
    assert second.wait() == 1
    error = "error: another run uses checkpoints: choose another --checkpoint_dir\n"
    assert second.output() == error  # and nothing else: it has not begun to train

    shutil.rmtree(folder)
    other = utils.FolderLock(folder)
    other.claim()
    os.kill(pid, signal.SIGCONT)
    assert first.wait() == 1
    other.release()
    assert error_line(first.output()) == error.strip()
    assert not checkpoints(folder)


def test_an_error_is_printed_before_the_group_is_taken_down(fork, tmp_path):
    """Meanwhile torchrun may end rank 0, because another rank has left already."""
    ended = "dist.destroy_process_group = lambda: os.kill(os.getpid(), signal.SIGTERM)"
    (tmp_path / "checkpoints").touch()
    job = fork(*LONG, **fault(utils=ended))
    assert job.wait() == -signal.SIGTERM
    assert "cannot write to the checkpoint folder" in error_line(job.output())


def test_a_loss_that_is_not_finite_stops_the_run_and_never_reaches_a_checkpoint(
    fork, tmp_path
):
    """A rerun stops as clearly, instead of training on from nan."""
    wild = "--lr", 9e4, "--epochs", 3, "--keep", 500
    for often, envs in (["--save_every", 1], hand_set(2)), ([], [{}]):
        jobs = [fork(*wild, *often, **env) for env in envs]
        assert {job.wait() for job in jobs} == {1}
        output = "".join(job.output() for job in jobs)
        assert re.search("the loss is .*lower --lr", error_line(output))
        for path in checkpoints(tmp_path / "checkpoints"):
            model = torch.load(path, weights_only=True)["model"]
            assert all(weight.isfinite().all() for weight in model.values()), path


# The network


@pytest.fixture
def machine(start, tmp_path):
    """Start a command on a machine with a full /dev/shm, whose name is an address of others."""
    for prefix in ["unshare", "-mun"], ["unshare", "--map-root-user", "-mun"]:
        mount = [*prefix, "mount", "-t", "tmpfs", "x", "/mnt"]
        try:
            if subprocess.run(mount, check=False).returncode == 0:
                break
        except OSError:
            continue
    else:
        pytest.skip("unshare may not make private namespaces here")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n192.0.2.1 reachable\n")
    script = """
        ip link set lo up
        ip address add 192.0.2.1 dev lo
        hostname reachable
        mount --bind hosts /etc/hosts
        mount -t tmpfs -o size=4k tmpfs /dev/shm
        head -c 4096 /dev/zero > /dev/shm/full
        exec "$@" """
    return lambda cmd: start([*prefix, "sh", "-ec", script, "-", *cmd])


LOOPBACK = re.compile("[0-9A-F]{6}7F|0{24}01000000|0{16}FFFF0000[0-9A-F]{6}7F")


@pytest.mark.slow
def test_a_self_spawned_run_listens_on_loopback_only(machine, tmp_path):
    """Even where the hostname resolves to an address that others can reach."""
    job = machine(command(*LONG, *TWO))
    wait_for_progress(job, tmp_path / "checkpoints")
    net = Path(f"/proc/{job.process.pid}/net")
    lines = (net / "tcp").read_text() + (net / "tcp6").read_text()
    listening = re.findall(r"^ *\d+: (\w+):\w+ \w+:\w+ 0A ", lines, re.MULTILINE)
    assert listening  # gloo's, or there is nothing to see here
    assert all(map(LOOPBACK.fullmatch, listening)), listening
