"""The batch script for Slurm, on a real one with two nodes."""

import re
import shutil
import sys

import pytest
from conftest import ROOT, assert_same_result, checkpoints, command, run, wait_until


def slurm(*words: object) -> str:
    """Call one of Slurm's commands."""
    done = run([str(word) for word in words], ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def slurm_is_running() -> bool:
    has_slurm = shutil.which("scontrol")
    return bool(has_slurm) and run(["scontrol", "ping"], ROOT).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not slurm_is_running(), reason="needs a Slurm with two nodes")
def test_a_job_stops_is_requeued_and_resumes(tmp_path):
    """The signal before the end of its time comes from the test; the rest is real."""
    program, *flags = command("--epochs", 12, "--save_every", 20)[1:]
    straight = [sys.executable, program, *flags, "--world_size", "2"]
    assert run([*straight, "--checkpoint_dir", "straight"], tmp_path).returncode == 0

    (tmp_path / "train_ddp.py").symlink_to(program)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    log = tmp_path / "job.log"
    options = "--parsable", f"--chdir={tmp_path}", f"--output={log}"
    job = slurm("sbatch", *options, ROOT / "tests/recipes/train.sbatch", *flags)

    def state() -> str:
        return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[1]

    try:
        wait_until(lambda: checkpoints(tmp_path / "checkpoints"), "a checkpoint")
        slurm("scancel", "--batch", "--signal=USR1", job)
        wait_until(lambda: state() == "PENDING", "the requeue")
        [path] = re.findall(r"^stopped; (\S+)", log.read_text(), re.MULTILINE)
        # Slurm itself would wait for two minutes. At once, it refuses to start the job again.
        slurm("scontrol", "update", f"jobid={job}", "StartTime=now+2")
        wait_until(lambda: state() not in ("PENDING", "RUNNING"), "the end of the job")
        assert state() == "COMPLETED", log.read_text()
    finally:
        slurm("scancel", job)
    starts = re.findall(r"^start      (.*)", log.read_text(), re.MULTILINE)
    assert starts == ["from scratch, nothing in checkpoints", path]
    assert "processes  2 on cpu\n" in log.read_text()
    assert_same_result(tmp_path / "checkpoints", tmp_path / "straight")
