"""Stopping and failing: nothing is lost, nothing hangs, nothing is left, and the cause is readable."""

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import (
    SCRIPT,
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

import train_ddp
import utils

LONG = "--epochs", 1000, "--batch_size", 50, "--save_every", 10, "--keep", 100
TOGETHER = 60  # seconds within which a job ends, on any machine; TIMEOUT is ten minutes
STOPPED = r"stopped; (\S+\.pt) has all progress: rerun to resume"
WITH_LOADERS = fault(data="LOADER_WORKERS = 2")
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
SH = "bash", "-c"


def ranks(job: Started) -> list[int]:
    """The ranks' pids, in order of their start; not those of their loader workers."""
    children = [pid for pid in job.workers() if parent(pid) == job.process.pid]
    return [
        pid for pid in children if runs(pid, "spawn_main") or runs(pid, SCRIPT.name)
    ]


def parent(pid: int) -> int:
    return int(status(pid, "PPid"))


def status(pid: int, name: str) -> str:
    """A value from /proc/PID/status; "0" if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "0"
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


def ends(job: Started, mark: Path) -> str:
    """Wait for the job to end, all of it, with a failure; return what it printed."""
    assert job.wait(TOGETHER) != 0, job.output()
    wait_until(lambda: not processes(mark), TOGETHER)
    return job.output()


def launched(torchrun: int, *flags: object) -> list[str]:
    """The command of two ranks; `torchrun` is 2, or 0 for a run that spawns its ranks."""
    return command(*flags, "--world_size", 2, torchrun=torchrun)


# Stops


def test_every_stop_signal_saves_and_then_ends_the_process(fork, tmp_path):
    """It dies of the signal, as other programs do; its loader workers leave it to it."""
    folder = tmp_path / "checkpoints"
    for number in STOP_SIGNALS:
        job = fork(*LONG, **WITH_LOADERS)
        wait_for_progress(job, folder)
        for pid in [*job.workers(), job.process.pid]:
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


@pytest.mark.parametrize(
    "stops",
    [
        # Launcher, signal, and who gets it: the second is what Kubernetes sends, and the last
        # what Slurm sends.
        [
            (0, signal.SIGTERM, "all"),
            (2, signal.SIGTERM, "launcher"),
            (0, signal.SIGKILL, "launcher"),
            (2, signal.SIGUSR1, "all"),
        ],
        pytest.param(
            [
                (0, signal.SIGKILL, "rank 0"),
                (0, signal.SIGHUP, "all"),
                (2, signal.SIGKILL, "launcher"),
                (0, signal.SIGTERM, "launcher"),
                (2, signal.SIGTERM, "all"),
                (0, signal.SIGUSR1, "all"),
                (2, signal.SIGINT, "launcher"),
                (2, signal.SIGHUP, "all"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["four", "eight"],
)
def test_stopped_by_any_signal_to_anyone_a_training_loses_nothing(
    start, tmp_path, stops
):
    """Several times in one training, with both launchers, and loader workers."""
    folder = tmp_path / "checkpoints"
    for torchrun, number, target in stops:
        saved = checkpoints(folder)
        job = start(launched(torchrun, *LONG), **WITH_LOADERS)
        wait_for_progress(job, folder)
        place = f"{folder.name}/{saved[-1].name}" if saved else "from scratch"
        assert f"\nstart      {place}" in job.output()
        everyone = [job.process.pid, *job.workers()]
        both = ranks(job)
        assert len(both) == 2
        told = {"all": everyone, "launcher": everyone[:1], "rank 0": both[:1]}
        for pid in told[target]:
            os.kill(pid, number)
        code = job.wait()
        if target == "rank 0":
            assert code == 128 + number
            continue  # at once: no loader worker may keep the folder locked
        wait_until(lambda pids=everyone: not any(map(alive, pids)))
        assert code != 0 if torchrun else code == -number
        check_saved(job, folder, 100)
        if not torchrun:
            assert "rror" not in job.output()


def test_after_a_kill_its_loader_workers_do_not_keep_the_folder_locked(fork, tmp_path):
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        job = fork(*LONG, **WITH_LOADERS)
        wait_for_progress(job, folder)
        os.kill(job.process.pid, signal.SIGKILL)
        job.wait()


def test_ctrl_c_ends_a_loop_in_bash(start, tmp_path):
    loop = 'for seed in 0 1; do "$@" --seed $seed --checkpoint_dir c$seed; done'
    job = start([*SH, loop, "-", *launched(0, *LONG)])
    wait_for_progress(job, tmp_path / "c0")
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.wait() == -signal.SIGINT
    check_saved(job, tmp_path / "c0", 100)
    assert not (tmp_path / "c1").exists()


SLOW_DISK = fault(
    at_start="""
import os, time
fsync, seconds = os.fsync, [5]
def slow_fsync(file):
    if seconds:
        print("slow fsync", flush=True)
        time.sleep(seconds.pop())
    fsync(file)
os.fsync = slow_fsync
"""
)
NO_SAVE_BEFORE = "--epochs", 100, "--batch_size", 8


def test_no_rank_leaves_before_the_checkpoint_is_on_the_disk(fork, tmp_path):
    """When one has left, torchrun ends the others: even rank 0, which alone saves."""
    jobs = [fork(*NO_SAVE_BEFORE, **SLOW_DISK, **env) for env in hand_set(2)]
    jobs[0].wait_for("\nstep 200 ")
    os.kill(jobs[0].process.pid, signal.SIGTERM)
    jobs[1].wait()
    assert len(checkpoints(tmp_path / "checkpoints")) == 1
    jobs[0].wait()
    check_saved(jobs[0], tmp_path / "checkpoints", 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "torchrun, number", [(2, signal.SIGTERM), (0, signal.SIGINT), (0, signal.SIGTERM)]
)
def test_a_stop_is_complete_with_a_slow_disk(start, tmp_path, torchrun, number):
    """A self-spawning launcher gets the signal; under torchrun rank 0, which alone saves."""
    job = start(launched(torchrun, *NO_SAVE_BEFORE), **SLOW_DISK)
    job.wait_for("\nstep 200 ")
    os.kill(ranks(job)[0] if torchrun else job.process.pid, number)
    code = job.wait()
    assert "slow fsync" in job.output()
    assert code != 0 if torchrun else code == -number
    folder = tmp_path / "checkpoints"
    check_saved(job, folder, 16)
    assert len(checkpoints(folder)) == 1
    logged = [int(n) for n in re.findall(r"^step (\d+)", job.output(), re.MULTILINE)]
    behind = newest(folder)["progress"]["step"] - logged[-1]
    assert 0 <= behind <= train_ddp.LOG_EVERY


def test_a_second_ctrl_c_ends_even_a_frozen_run_at_once(start, tmp_path):
    job = start(launched(0, *LONG))
    wait_for_progress(job, tmp_path / "checkpoints")
    everyone = [job.process.pid, *job.workers()]
    frozen = ranks(job)[1]
    os.kill(frozen, signal.SIGSTOP)
    wait_until(lambda: status(frozen, "State") == "T", 120, job)
    job.process.send_signal(signal.SIGINT)
    # Until the launcher has passed it on: two signals at once could arrive as one.
    sigterm = 1 << signal.SIGTERM - 1
    wait_until(lambda: int(status(frozen, "ShdPnd"), 16) & sigterm, 120, job)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(TOGETHER) == -signal.SIGINT
    wait_until(lambda: not any(map(alive, everyone)), TOGETHER)
    assert not re.search(STOPPED, job.output())


def test_a_second_ctrl_c_ends_a_process_in_mid_save(fork, tmp_path):
    job = fork(*NO_SAVE_BEFORE, **SLOW_DISK)
    job.wait_for("\nstep 200 ")
    os.kill(job.process.pid, signal.SIGINT)
    job.wait_for("slow fsync")
    os.kill(job.process.pid, signal.SIGINT)
    assert job.wait() == -signal.SIGINT
    assert not re.search(STOPPED, job.output())
    assert not checkpoints(tmp_path / "checkpoints")


@pytest.mark.slow
def test_a_stop_that_cannot_save_is_no_polite_one(start):
    """To die of Ctrl-C would say that all progress is safe."""
    full = "import os\ndef fsync(file):\n    raise OSError(28, 'no space left')\n"
    job = start(
        launched(0, *NO_SAVE_BEFORE), **fault(at_start=f"{full}os.fsync = fsync")
    )
    job.wait_for("\nstep 200 ")
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 1
    assert re.search("cannot save .*no space", error_line(job.output()))
    assert not re.search(STOPPED, job.output())


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_stops_nothing(start, tmp_path):
    job = start(["nohup", *launched(0, *LONG)])
    wait_for_progress(job, tmp_path / "checkpoints")
    for pid in [job.process.pid, *ranks(job)]:
        os.kill(pid, signal.SIGHUP)
    for _ in range(2):
        wait_for_progress(job, tmp_path / "checkpoints")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == -signal.SIGTERM, job.output()


# Output that goes away


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" | head -n 1',
        pytest.param('"$@" > /dev/full', marks=pytest.mark.slow),
        pytest.param('"$@" >&-', marks=pytest.mark.slow),
        pytest.param('"$@" > /dev/full 2>&1', marks=pytest.mark.slow),
    ],
    ids=["head", "full", "closed", "both full"],
)
def test_an_output_that_fails_costs_nothing(tmp_path, shell):
    """Nor does a name of a folder that the terminal cannot show."""
    cmd = command("--epochs", 2, "--batch_size", 500, "--checkpoint_dir", "Läufe")
    shell += "\nexit ${PIPESTATUS[0]}"
    done = run([*SH, shell, "-", *cmd], tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(checkpoints(tmp_path / "Läufe")) == 2


def test_ctrl_c_to_a_run_and_its_tee_saves(start, tmp_path):
    """The terminal sends it to both, so that the run can no longer say what it saved."""
    shell = 'trap : INT; "$@" 2>&1 | tee log; echo "codes ${PIPESTATUS[*]}"'
    job = start([*SH, shell, "-", *command(*NO_SAVE_BEFORE)])
    job.wait_for("\nstep 200 ")
    os.killpg(job.process.pid, signal.SIGINT)
    job.wait_for("codes 130 130\n")
    assert newest(tmp_path / "checkpoints")["progress"]["step"] >= 200
    assert "rror" not in job.output()


def test_a_terminal_that_is_closed_costs_nothing_if_the_hangup_is_ignored(tmp_path):
    """As after `disown`, or `trap "" HUP`."""
    terminal, its_end = os.openpty()
    cmd = command("--epochs", 2, "--batch_size", 500)
    job = subprocess.Popen(
        ["setsid", "--ctty", *SH, 'trap "" HUP; "$@"; echo $? > code', "-", *cmd],
        cwd=tmp_path,
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
    )
    os.close(its_end)
    printed = b""
    while b"start " not in printed:
        printed += os.read(terminal, 1000)
    os.close(terminal)
    job.wait(120)
    assert (tmp_path / "code").read_text() == "0\n"
    assert len(checkpoints(tmp_path / "checkpoints")) == 2


# Ranks that do not come, die or freeze

# A hundred times as fast, so that 10 s pass in 0.1 s.
FAST_CLOCK = """
import types
real = time
time = types.SimpleNamespace(monotonic=lambda: 100 * real.monotonic(), sleep=real.sleep)
"""


@pytest.mark.parametrize("rank, missing", [(0, "rank 1"), (1, "rank 0")])
def test_a_rank_says_for_whom_it_waits_and_gives_up_in_the_end(fork, rank, missing):
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


RAISES = """import atexit
        atexit.register(print, "torn down")
        raise ConnectionResetError("Connection reset by peer")"""
FAULTS = {
    "raises": RAISES,
    "exits": "os._exit(7)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    "torchrun, rank, kind",
    [
        (0, 0, "exits"),
        pytest.param(0, 1, "raises", marks=pytest.mark.slow),
        pytest.param(0, 1, "is killed", marks=pytest.mark.slow),
        pytest.param(2, 1, "raises", marks=pytest.mark.slow),
        pytest.param(2, 0, "is killed", marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_dies_all_end_soon_and_the_cause_is_reported(
    torchrun, rank, kind, tmp_path, start
):
    """With a failure, no orphans, and the first cause readable once."""
    (tmp_path / "tmp").mkdir()
    env = {"MARK": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}
    job = start(launched(torchrun, *LONG), **env, **fault_in_step(rank, FAULTS[kind]))
    wait_until((tmp_path / "fault").exists, 120, job)
    output = ends(job, tmp_path)
    if kind == "raises":
        assert output.count("\nConnectionResetError: ") == 1
        assert f"rank {rank} failed:" in output
        assert "torn down" not in output  # which can hang, with pending collectives
        assert re.findall("rank . lost another rank", output) == [
            f"rank {1 - rank} lost another rank"
        ]
    elif torchrun:  # it is torchrun that reports
        assert re.search(rf"rank +: {rank} .*\n *exitcode +: -9 ", output)
    else:
        end = "exit code 7;" if kind == "exits" else "signal SIGKILL;"
        assert output.count(f"error: process {rank} terminated with {end}") == 1
        assert "Traceback" not in output
    if not torchrun:
        assert left_overs(tmp_path / "tmp") == []


def left_overs(folder: Path) -> list[str]:
    """What a run has left in its temporary folder; torch itself leaves a cache."""
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if not name.startswith("torchinductor_")]


def test_when_a_rank_raises_the_others_point_to_its_own_message(fork):
    """They all end at once, also without a launcher that would end them."""
    raises = fault_in_step(1, FAULTS["raises"])
    jobs = [fork(*LONG, **raises, **env) for env in hand_set(2)]
    assert [job.wait(TOGETHER) for job in jobs] == [1, 1]
    assert "rank 0 lost another rank" in error_line(jobs[0].output())
    assert jobs[1].output().startswith("rank 1 failed:\nTraceback")
    cause = jobs[1].output().strip().splitlines()[-1]
    assert cause == "ConnectionResetError: Connection reset by peer"


def test_a_rank_that_freezes_is_given_up_after_the_timeout(fork, tmp_path):
    short = "TIMEOUT = timedelta(seconds=5)"
    freezes = fault_in_step(0, "os.kill(os.getpid(), signal.SIGSTOP)")
    first, second = hand_set(2)
    frozen = fork(*LONG, **first, **freezes)
    other = fork(*LONG, **second, **fault(utils=short))
    assert other.wait() == 1
    assert "error: rank 1 lost another rank" in error_line(other.output())
    assert not frozen.has_ended()


@pytest.mark.slow
def test_a_frozen_rank_ends_the_run_after_the_timeout(tmp_path, start):
    """Here the launcher has to kill it."""
    freezes = fault_in_step(0, "os.kill(os.getpid(), signal.SIGSTOP)")["FAULT"]
    freezes = fault(utils="TIMEOUT = timedelta(seconds=5)", **json.loads(freezes))
    job = start(launched(0, *LONG), MARK=str(tmp_path), **freezes)
    wait_until((tmp_path / "fault").exists, 120, job)
    assert "rank 1 lost another rank" in error_line(ends(job, tmp_path))


def test_a_single_process_never_claims_to_have_lost_another_rank(fork, tmp_path):
    """What is not recognised keeps its traceback. Nothing is left in the temporary folder."""
    (tmp_path / "tmp").mkdir()
    trouble = 'raise RuntimeError("[/gloo/transport/tcp/pair.cc:9] Connection closed")'
    for code, exit_code in (trouble, 1), (FAULTS["is killed"], -signal.SIGKILL):
        job = fork(*LONG, TMPDIR=str(tmp_path / "tmp"), **fault_in_step(0, code))
        assert job.wait() == exit_code
        assert ("RuntimeError: [/gloo" in job.output()) == (code == trouble)
        assert "lost another rank" not in job.output()
        assert left_overs(tmp_path / "tmp") == []


def imports_torch(pid: int) -> bool:
    """Whether a self-spawned worker imports torch, or has done so."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
    return runs(pid, "spawn_main") and "libtorch_cpu" in maps


@pytest.mark.slow
def test_workers_end_soon_if_their_launcher_is_killed_during_start_up(tmp_path, start):
    job = start(launched(0, *LONG), MARK=str(tmp_path))
    wait_until(lambda: any(map(imports_torch, job.workers())), 120, job)
    job.process.kill()
    wait_until(lambda: not processes(tmp_path), TOGETHER)


@pytest.mark.parametrize(
    "torchrun, moment",
    [
        pytest.param(0, "interpreter", marks=pytest.mark.slow),
        (0, "worker"),
        pytest.param(0, "set-up", marks=pytest.mark.slow),
        pytest.param(2, "set-up", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_during_start_up_leaves_at_once(torchrun, moment, tmp_path, start):
    """With nothing saved; once torch is imported, without a traceback of ours as well."""
    job = start(launched(torchrun, *LONG), MARK=str(tmp_path))
    if moment == "interpreter":  # of the first worker, which has not read our code yet
        wait_until(lambda: any(runs(p, "spawn_main") for p in job.workers()), 120, job)
    elif moment == "worker":
        wait_until(lambda: any(map(imports_torch, job.workers())), 120, job)
    else:
        wait_until((tmp_path / "checkpoints" / ".lock").exists, 120, job)
    os.killpg(job.process.pid, signal.SIGINT)
    output = ends(job, tmp_path)
    if moment == "set-up":
        assert not re.search(r'File ".*(train_ddp|utils|data|model)\.py"', output)
        assert torchrun or "Traceback" not in output
    assert not checkpoints(tmp_path / "checkpoints")


# Disks


def test_a_full_disk_leaves_earlier_checkpoints_whole_and_names_the_good_one(
    fork, tmp_path
):
    """A file size limit stops the save midway: the same to the program as a full disk."""
    folder = tmp_path / "checkpoints"
    flags = "--batch_size", 500
    assert fork("--epochs", 1, *flags).wait() == 0
    [path] = checkpoints(folder)
    before = path.read_bytes()
    limit = len(before) // 2
    full = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))"
    jobs = [
        fork("--epochs", 2, *flags, **e, **fault(at_start=full)) for e in hand_set(2)
    ]
    assert [job.wait() for job in jobs] == [1, 1]
    line = error_line(jobs[0].output())
    assert "cannot save" in line and "File too large" in line
    assert line.endswith(f"last good checkpoint: checkpoints/{path.name}")
    assert "error" not in jobs[1].output()
    assert checkpoints(folder) == [path] and path.read_bytes() == before


def test_a_folder_that_turns_read_only_is_reported_with_the_good_checkpoint(
    fork, tmp_path
):
    """A run that begins in a read-only folder is refused as clearly."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    lock, unlock = "chmod a-w", "chmod u+w"
    if os.getuid() == 0:  # root may write in spite of the mode
        lock, unlock = "chattr +i", "chattr -i"
    if os.system(f"{lock} {folder} && {unlock} {folder}"):
        pytest.skip(f"no {lock} here")
    try:
        job = fork(*LONG, **fault_in_step(0, f'os.system("{lock} {folder}")', step=15))
        assert job.wait() == 1
        [path] = checkpoints(folder)
        assert error_line(job.output()).endswith(f"checkpoint: checkpoints/{path.name}")
        job = fork(*LONG, "--checkpoint_dir", folder / "new")
        assert job.wait() == 1
        assert f"{folder}/new" in error_line(job.output())
    finally:
        os.system(f"{unlock} {folder}")


def test_a_folder_that_was_deleted_is_created_again(fork, tmp_path):
    delete = fault_in_step(0, 'shutil.rmtree("checkpoints")', step=25)
    job = fork("--epochs", 1, *LONG[2:], **delete)
    assert job.wait() == 0, job.output()
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names[0] == "epoch00000-image000001500.pt"
    assert names[-1] == "epoch00001-image000000000.pt"


def test_a_run_ends_if_another_one_has_its_folder_by_now(fork, tmp_path):
    """The folder was deleted, and its lock with it. The other one trains on."""
    folder = tmp_path / "checkpoints"
    delete = """shutil.rmtree("checkpoints")
        while not os.path.exists("other one"):
            pass"""
    first = fork(*LONG, **fault_in_step(0, delete, step=15))
    wait_until(
        lambda: (tmp_path / "fault").exists() and not folder.exists(), 120, first
    )
    other = fork(*LONG)
    wait_for_progress(other, folder)
    (tmp_path / "other one").touch()
    assert first.wait() == 1
    assert "another run uses checkpoints" in error_line(first.output())
    wait_for_progress(other, folder)


def test_a_second_run_in_the_folder_refuses_and_the_first_trains_on(fork, tmp_path):
    folder = tmp_path / "checkpoints"
    first = fork(*LONG)
    wait_for_progress(first, folder)
    second = fork(*LONG)
    assert second.wait() == 1
    error = "error: another run uses checkpoints: choose another --checkpoint_dir\n"
    assert second.output() == error  # and nothing else: it has not begun to train
    wait_for_progress(first, folder)
    first.kill()  # the lock is gone with its holder: no file to delete by hand
    lock = utils.FolderLock(folder)
    lock.claim()
    lock.release()


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


# Machines with a name that does not help


@pytest.fixture
def unshare():
    """A prefix that runs a shell script as root of private mount and host names."""
    for prefix in ["unshare", "-mu"], ["unshare", "--map-root-user", "-mu"]:
        mount = [*prefix, "mount", "-t", "tmpfs", "x", "/mnt"]
        try:
            if subprocess.run(mount, check=False).returncode == 0:
                return [*prefix, "sh", "-ec"]
        except OSError:
            continue
    pytest.skip("unshare may not make private namespaces here")


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [0, 2])
def test_trains_with_an_unresolvable_hostname_and_a_full_dev_shm(
    torchrun, unshare, tmp_path
):
    script = """
        hostname no-such-host.invalid
        mount -t tmpfs -o size=4k tmpfs /dev/shm
        head -c 4096 /dev/zero > /dev/shm/full
        exec "$@" """
    cmd = launched(torchrun, "--epochs", 1)
    if torchrun:  # it looks up the name on its own account, unless told not to
        cmd.insert(3, "--local-addr=127.0.0.1")
    result = run([*unshare, script, "sh", *cmd], tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


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


@pytest.mark.slow
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
    cmd = [*unshare, script, "sh", *launched(0, *LONG)]
    job = start(cmd, MARK=str(tmp_path))
    wait_for_progress(job, tmp_path / "checkpoints")
    sockets = set(listening(processes(tmp_path)))
    assert sockets  # gloo's, or there is nothing to see here
    assert all(map(LOOPBACK.fullmatch, sockets)), sockets
