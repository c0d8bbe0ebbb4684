"""Kill a job at random moments, again and again: it must learn what an undisturbed one does.

python tests/tools/soak.py [KILLS] [--world_size N] [--loader_workers N] [--seed S]
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import (
    Started,
    assert_same_result,
    checkpoints,
    command,
    fault,
    wait_until,
)

TOGETHER = 10  # seconds within which a job ends once a part of it has died


def is_tracker(pid: int) -> bool:
    """Tell multiprocessing's own helper: it has no part in the job, nor does its death."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def kill_at(moment: float, job: Started, dice: random.Random) -> str | None:
    """At a moment, kill all of the job or one process; say which, or None if it ended first."""
    while time.monotonic() < moment:
        if job.process.poll() is not None:
            return None
        time.sleep(0.001)
    victims = [pid for pid in job.workers() if not is_tracker(pid)]
    victim = dice.choice(["all", "launcher", *victims])
    try:
        if victim == "all":
            os.killpg(job.process.pid, signal.SIGKILL)
        else:
            os.kill(job.process.pid if victim == "launcher" else victim, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return victim if isinstance(victim, str) else f"one of {len(victims)}"


def soak(args: argparse.Namespace, folder: Path) -> int:
    """Print a line for each kill; return how many runs were killed, resumed and completed."""
    dice = random.Random(args.seed)
    flags = ["--epochs", 2, "--save_every", 3, "--world_size", args.world_size]
    workers = fault(data=f"LOADER_WORKERS = {args.loader_workers}")
    environment = {**workers, "TMPDIR": str(folder)}
    began = time.monotonic()
    straight = folder / "straight"
    job = Started(command(*flags, "--checkpoint_dir", straight), folder, **environment)
    assert job.wait(600) == 0, job.output()
    seconds = time.monotonic() - began
    broken = folder / "broken"
    kills = 0
    runs = 0
    newest = None
    while kills < args.kills or newest:
        cmd = command(*flags, "--checkpoint_dir", broken)
        job = Started(cmd, folder, **environment)
        moment = dice.uniform(0, seconds) if kills < args.kills else 600
        victim = kill_at(time.monotonic() + moment, job, dice)
        killed = f"{kills + 1}: {victim} after {moment:.2f} s"
        try:
            code = job.wait(TOGETHER)
            ended = lambda job=job: not job.everyone()
            wait_until(ended, "the end of all processes", timeout=TOGETHER)
        except (AssertionError, subprocess.TimeoutExpired):
            left = job.everyone()
            job.kill()
            raise AssertionError(f"{killed}: {left} live on, {job.output()}") from None
        output = job.output()
        assert "damaged" not in output, output
        if newest and "\nstart " in output:  # No more is repeated than since then.
            assert f"{newest}\n" in output, output
        if code == 0:
            assert_same_result(broken, straight)
            shutil.rmtree(broken)
            runs += 1
            newest = None
        else:
            assert victim, output  # Or it has failed on its own account.
            kills += 1
            newest = (checkpoints(broken) or [None])[-1]
            print(f"{killed}, newest {newest and newest.name}", flush=True)
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--world_size", type=int, default=2)
    parser.add_argument("--loader_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    began = time.monotonic()
    survived = False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        try:
            runs = soak(args, Path(name))
            survived = True
            verdict = f"survived, {runs} runs completed, each bit-equal to undisturbed"
        except AssertionError as error:
            verdict = f"NOT survived: {error}"
    minutes = (time.monotonic() - began) / 60
    print(
        f"soak: {args.kills} kills of {args.world_size} ranks with "
        f"{args.loader_workers} loader workers each (seed {args.seed}) "
        f"{verdict}; {minutes:.1f} minutes"
    )
    sys.exit(not survived)
