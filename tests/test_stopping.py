"""Stopping and failing: nothing is lost, nothing hangs, nothing is left, and the cause is readable."""

import json
import os
import re
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
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_rank_of_launcher(*args)
"""
# So fast that more than a second passes between any two signals.
FAST_CLOCK = """
import types
clock = time.monotonic
time = types.SimpleNamespace(monotonic=lambda: 1e9 * clock())
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


def pids_in_order(job: Started) -> list[int]:
    """The pids of a job: the launcher, the ranks in order, and their loader workers."""
    return [job.process.pid, *job.workers()]


def all_end(pids: list[int]) -> None:
    ended = lambda: not any(map(alive, pids))
    wait_until(ended, "the end of all processes", timeout=TOGETHER)


def status(pid: int, name: str) -> str:
    """A value from /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return re.search(rf"^{name}:\s*(\w+)", text, re.MULTILINE)[1]


def has_bit(pid: int, name: str, number: int) -> bool:
    """Whether a signal is in a set of signals from /proc/PID/status."""
    return bool(int(status(pid, name), 16) & 1 << number - 1)


def wait_for_stop(pid: int, job: Started) -> None:
    wait_until(lambda: status(pid, "State") == "T", f"process {pid} is frozen", job)


def wait_for_progress(job: Started, folder: Path) -> None:
    """Wait for a checkpoint that was not there before."""
    before = {*checkpoints(folder)}
    wait_until(lambda: {*checkpoints(folder)} - before, "a new checkpoint", job)


def check_saved(job: Started, folder: Path, global_batch: int) -> None:
    """One line says what was saved; it is the newest checkpoint, and it is consistent."""
    named = re.findall(STOPPED, job.output())
    assert named == [f"{folder.name}/{checkpoints(folder)[-1].name}"], job.output()
    progress = newest(folder)["progress"]
    images = progress["epoch"] * 10000 + progress["images_done"]
    assert images == progress["step"] * global_batch


def error_line(output: str) -> str:
    """The only error line of a run that ended without a traceback."""
    assert "Traceback" not in output, output
    lines = re.findall("^error: .*", output, re.MULTILINE)
    assert len(lines) == 1, output
    return lines[0]


# Stops


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1", "USR2", "XCPU"])
def test_every_stop_signal_saves_and_then_ends_the_process(fork, tmp_path, name):
    """It dies of the signal, as other programs do; its loader workers leave it to it."""
    number = signal.Signals[f"SIG{name}"]
    job = fork(*LONG, **WITH_LOADERS)
    wait_for_progress(job, tmp_path / "checkpoints")
    for pid in reversed(pids_in_order(job)):
        os.kill(pid, number)
    assert job.wait() == -number, job.output()
    check_saved(job, tmp_path / "checkpoints", 50)
    assert "rror" not in job.output()


@pytest.mark.parametrize("stopped_rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_of_them_after_one_step(
    fork, tmp_path, stopped_rank
):
    """None of them exits with 0, by which a launcher would take the training for finished."""
    folder = tmp_path / "checkpoints"
    jobs = [fork(*LONG, **WITH_LOADERS, **env) for env in hand_set(2)]
    wait_for_progress(jobs[0], folder)
    os.kill(jobs[stopped_rank].process.pid, signal.SIGUSR1)
    codes = [job.wait() for job in jobs]
    expected = [-signal.SIGTERM] * 2
    expected[stopped_rank] = -signal.SIGUSR1
    assert codes == expected, jobs[0].output()
    check_saved(jobs[0], folder, 100)
    assert jobs[1].output() == ""


# Who gets the signal: the launcher, rank 0, or all processes of the job.
TARGETS = {"launcher": slice(1), "rank 0": slice(1, 2), "all": slice(None)}
STOPS = [
    ("own", "TERM", "all"),
    ("own", "KILL", "launcher"),
    ("own", "TERM", "rank 0"),
    ("torchrun", "TERM", "launcher"),
    # Rarer ones.
    ("torchrun", "INT", "launcher"),
    ("torchrun", "KILL", "launcher"),
    ("torchrun", "USR1", "all"),
]


@pytest.mark.parametrize(
    "launcher, name, target",
    [
        pytest.param(*stop, id="-".join(stop), marks=[pytest.mark.slow] * (n > 3))
        for n, stop in enumerate(STOPS)
    ],
)
def test_stopped_by_any_signal_to_anyone_a_training_loses_nothing(
    start, launch, tmp_path, launcher, name, target
):
    """With loader workers. A rank that was told alone ends the others, which is a failure."""
    folder = tmp_path / "checkpoints"
    number = signal.Signals[f"SIG{name}"]
    if launcher == "own":
        job = launch(*LONG, **WITH_LOADERS)
    else:
        job = start(command(*LONG, torchrun=2), **WITH_LOADERS)
    wait_for_progress(job, folder)
    pids = pids_in_order(job)
    for pid in pids[TARGETS[target]]:
        os.kill(pid, number)
    code = job.wait()
    all_end(pids)
    check_saved(job, folder, 100)
    if launcher == "own" and target != "rank 0":
        assert code == -number
        assert "rror" not in job.output()
    else:
        assert code != 0


def test_ctrl_c_that_is_ignored_stops_nobody(fork, tmp_path):
    """A shell starts commands so that end with &: Ctrl-C is meant for another one."""
    ignores = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
    job = fork(*LONG, **fault(ignores), **hand_set(1)[0])
    for number in signal.SIGINT, signal.SIGTERM:
        wait_for_progress(job, tmp_path / "checkpoints")
        os.kill(job.process.pid, number)
    assert job.wait() == -signal.SIGTERM, job.output()


def test_a_rank_stops_when_torchrun_is_killed(fork, tmp_path):
    """The process that is started here only waits; its child is the rank, as of torchrun."""
    [rank] = hand_set(1)
    rank |= {"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    forks = fault("import os, signal\nif os.fork():\n    signal.pause()")
    job = fork(*LONG, **rank, **forks)
    wait_for_progress(job, tmp_path / "checkpoints")
    pids = pids_in_order(job)
    os.kill(pids[0], signal.SIGKILL)
    all_end(pids)
    check_saved(job, tmp_path / "checkpoints", 50)


def test_ctrl_c_ends_a_loop_in_bash(start, tmp_path):
    loop = 'for seed in 0 1; do "$@" --seed $seed --checkpoint_dir c$seed; done'
    job = start([*SH, loop, "-", *command(*LONG, *TWO)], **WITH_LOADERS)
    wait_for_progress(job, tmp_path / "c0")
    pids = pids_in_order(job)
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
    assert newest(tmp_path / "checkpoints")["progress"]["step"] == 21


def test_a_second_ctrl_c_ends_even_a_frozen_run_at_once(launch):
    freezes = fault_in_step(1, "os.kill(os.getpid(), signal.SIGSTOP)")["FAULT"]
    job = launch(*LONG, **fault(utils=FAST_CLOCK, **json.loads(freezes)))
    wait_until(lambda: len(pids_in_order(job)) == 3, "two ranks", job)
    launcher, _, frozen = pids = pids_in_order(job)
    wait_for_stop(frozen, job)
    os.kill(launcher, signal.SIGINT)
    # Until the launcher has passed it on: two signals at once could arrive as one.
    passed_on = lambda: has_bit(frozen, "ShdPnd", signal.SIGTERM)
    wait_until(passed_on, "the launcher has passed the signal on", job)
    os.kill(launcher, signal.SIGINT)
    assert job.wait(TOGETHER) == -signal.SIGINT
    all_end(pids)
    assert not re.search(STOPPED, job.output())


@pytest.mark.parametrize("clock, is_saved", [("", True), (FAST_CLOCK, False)])
def test_only_a_ctrl_c_after_a_second_is_a_second_one(fork, tmp_path, clock, is_saved):
    """Terminals, `timeout` and notebooks send it twice; a person who insists wants the end."""
    twice = "\n        ".join(["os.kill(os.getpid(), signal.SIGINT)"] * 2)
    faults = json.loads(fault_in_step(0, twice)["FAULT"])
    job = fork(*LONG, **fault(utils=clock, **faults))
    assert job.wait(TOGETHER) == -signal.SIGINT
    assert bool(checkpoints(tmp_path / "checkpoints")) == is_saved
    if is_saved:
        check_saved(job, tmp_path / "checkpoints", 50)


SIGNALLED_WHILE_SPAWNING = """
spawn = mp.spawn
def spawn_and_be_stopped(*args, **kwargs):
    context = spawn(*args, **kwargs)
    os.kill(os.getpid(), signal.{name})
    return context
mp.spawn = spawn_and_be_stopped
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_while_ranks_are_started_is_not_lost(launch, name):
    job = launch(*LONG, **fault(utils=SIGNALLED_WHILE_SPAWNING.format(name=name)))
    assert job.wait(TOGETHER) == -signal.Signals[name], job.output()
    assert not job.everyone()


# Output that goes away


def test_a_reader_of_the_output_that_ends_costs_nothing(tmp_path):
    cmd = command("--epochs", 2, "--batch_size", 500)
    shell = '"$@" | head -n 1\nexit ${PIPESTATUS[0]}'
    done = run([*SH, shell, "-", *cmd], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(checkpoints(tmp_path / "checkpoints")) == 2


# As after Ctrl-C to a `tee`, with a full disk, in a terminal that was closed, and with `>&-`.
BOTH = "\nos.dup2(output, 1)\nos.dup2(output, 2)"
FAILING_OUTPUTS = {
    "ended": "reader, output = os.pipe()\nos.close(reader)" + BOTH,
    "full": "output = os.open('/dev/full', os.O_WRONLY)" + BOTH,
    "hung up": "screen, output = os.openpty()\nos.close(screen)" + BOTH,
    "none": "import sys\nos.close(1)\nsys.stdout = None",
}
NOHUP = "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"


@pytest.mark.parametrize("output", FAILING_OUTPUTS)
def test_ctrl_c_to_a_run_whose_output_fails_saves(launch, tmp_path, output):
    """A hangup that is ignored, as under `nohup`, stops nobody."""
    folder = tmp_path / "checkpoints"
    job = launch(*LONG, **fault(NOHUP + FAILING_OUTPUTS[output]))
    wait_for_progress(job, folder)
    for pid in pids_in_order(job):
        os.kill(pid, signal.SIGHUP)
    for _ in range(2):
        wait_for_progress(job, folder)
    os.kill(job.process.pid, signal.SIGINT)
    # Ranks that could not save, or failed afterwards, would have another code.
    assert job.wait() == -signal.SIGINT


# Ranks that do not come, die or freeze


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_another_gives_up_in_the_end(fork, rank):
    job = fork(**hand_set(2)[rank], **fault(utils="TIMEOUT = timedelta(seconds=3)"))
    assert job.wait(TOGETHER) == 1
    assert re.search("timed out|timeout", job.output(), re.IGNORECASE), job.output()


def test_ctrl_c_ends_a_rank_that_waits_for_another(fork):
    """Python's own handler would have to wait for C++ code that waits."""
    job = fork(**hand_set(2)[1])
    pid = job.process.pid
    left_alone = lambda: (
        not any(has_bit(pid, name, signal.SIGINT) for name in ("SigCgt", "SigIgn"))
    )
    wait_until(left_alone, "Ctrl-C is left to the kernel", job)
    os.kill(pid, signal.SIGINT)
    assert job.wait(TOGETHER) == -signal.SIGINT
    assert job.output() == ""


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
    """With a failure, no orphans, and the first cause readable."""
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp"), **fault_in_step(rank, WAIT + FAULTS[kind])}
    if torchrun:
        job = start(command(*LONG, torchrun=2), **env)
    else:
        job = launch(*LONG, **env)
    wait_until((tmp_path / "fault").exists, "the faulty step", job)
    pids = pids_in_order(job)
    (tmp_path / "go").touch()
    assert job.wait(TOGETHER) == 1
    all_end(pids)
    output = job.output()
    if kind == "raises":
        assert f"[rank{rank}]: ConnectionResetError: Connection reset by peer" in output
        assert "torn down" not in output  # which can hang, with pending collectives
        if torchrun:  # It names the first failure in its table.
            assert re.search(r"rank +: 1 .*\n.*\n.*\n *traceback", output)
    else:
        end = "exit code 7;" if kind == "exits" else "signal SIGKILL;"
        assert output.count(f"error: process {rank} terminated with {end}") == 1
    assert not [*(tmp_path / "tmp").glob("train_ddp-*")]


def test_a_frozen_rank_ends_the_run_after_the_timeout(launch):
    """The launcher has to kill it."""
    freezes = fault_in_step(0, "os.kill(os.getpid(), signal.SIGSTOP)")["FAULT"]
    short = fault(utils="TIMEOUT = timedelta(seconds=3)", **json.loads(freezes))
    job = launch(*LONG, **short)
    wait_until(lambda: len(pids_in_order(job)) == 3, "two ranks", job)
    pids = pids_in_order(job)
    assert job.wait(TOGETHER) == 1
    all_end(pids)
    assert "[rank1]: " in job.output() and "Timed out" in job.output()


def imports_torch(pid: int) -> bool:
    """Whether a self-spawned worker imports torch, or has done so."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
    return runs(pid, "spawn_main") and "libtorch_cpu" in maps


@pytest.mark.parametrize("name", ["INT", "KILL"])
def test_a_stop_during_start_up_ends_all_at_once(name, tmp_path, start):
    """Ctrl-C, and a killed launcher, while both ranks import torch."""
    number = signal.Signals[f"SIG{name}"]
    job = start(command(*LONG, *TWO))
    importing = lambda: [pid for pid in job.workers() if imports_torch(pid)]
    # With fewer, Python itself would report that it could not hand over the arguments.
    wait_until(lambda: len(importing()) == 2, "two ranks import torch", job)
    ranks = importing()
    blocked = [has_bit(pid, "SigBlk", signal.SIGINT) for pid in ranks]
    assert all(blocked), "a rank would get Ctrl-C, as well as the launcher"
    if name == "INT":
        os.killpg(job.process.pid, number)
    else:
        os.kill(job.process.pid, number)
    assert job.wait(TOGETHER) == -number
    wait_until(lambda: not job.everyone(), "the end of all ranks", timeout=TOGETHER)
    assert "Traceback" not in job.output()
    assert not checkpoints(tmp_path / "checkpoints")


def test_a_rank_whose_launcher_has_been_killed_before_does_not_start(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "_prctl_pr_set_pdeathsig", str)
    with pytest.raises(SystemExit) as caught:
        utils.run_spawned_rank(0, pytest.fail, None, "file:///x", launcher=-1)
    assert caught.value.code == 1


def test_ctrl_c_before_there_is_something_to_save_leaves_without_a_word(
    launch, tmp_path
):
    waits = "import time\ndef load_data(*args, **kwargs):\n    time.sleep(999)\n"
    job = launch(*LONG, **fault(data=waits))
    locked = (tmp_path / "checkpoints" / ".lock").exists
    wait_until(locked, "the folder is locked", job)
    pids = pids_in_order(job)
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
    assert job.wait() == 1, job.output()
    [path] = checkpoints(tmp_path / "checkpoints")
    assert path.stat().st_size > 100_000
    assert newest(path.parent)["progress"]["step"] == 10
    line = error_line(job.output())
    assert "cannot save" in line and problem in line
    assert line.endswith(f"last good checkpoint: checkpoints/{path.name}")
    assert not re.search(STOPPED, job.output())


def test_a_second_run_in_a_folder_is_refused(fork, tmp_path):
    wait_for_progress(fork(*LONG), tmp_path / "checkpoints")
    second = fork(*LONG)
    assert second.wait() == 1
    error = "error: another run uses checkpoints: choose another --checkpoint_dir\n"
    assert second.output() == error  # and nothing else: it has not begun to train


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
