"""The tests are tested: each mistake, made in a copy of the program, turns its test red."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE

MISTAKES = sorted((ROOT / "tests" / "mistakes").glob("*.patch"))
FAST = {"03_written_in_place", "07_loss_of_rank_0", "errors_printed_by_all"}


@pytest.fixture
def copy(tmp_path) -> Path:
    """The program and its tests."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    links = shutil.ignore_patterns("mnist_sample", "tools", "__pycache__")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=links)
    (tmp_path / "tests" / "mnist_sample").symlink_to(SAMPLE)
    return tmp_path


def run_pytest(copy: Path, test: str) -> None:
    os.chdir(copy)
    with open("report", "w") as report:
        os.dup2(report.fileno(), 1)
        os.dup2(report.fileno(), 2)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", test]))


def failure(copy: Path, test: str) -> str:
    """Run a test in the copy; return what pytest prints when it fails.

    It runs in a process that is forked from one that has imported torch, and so starts at once.
    """
    context = torch.multiprocessing.get_context("forkserver")
    process = context.Process(target=run_pytest, args=(copy, test))
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
    report = (copy / "report").read_text()
    # 0 is success, and 2 and more are problems of pytest's own.
    assert process.exitcode == 1, f"{test} is not red:\n{report}"
    return report


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in FAST)
        )
        for path in MISTAKES
    ],
)
def test_a_mistake_turns_its_test_red(mistake, copy):
    """Its file names the test, and a pattern of what that reports."""
    subprocess.run(["git", "apply", mistake], cwd=copy, check=True)
    text = mistake.read_text()
    test = re.search("^test: (.*)$", text, re.MULTILINE)[1]
    reports = re.search("^reports: (.*)$", text, re.MULTILINE)[1]
    report = failure(copy, test)
    assert re.search(reports, report), f"red for another reason:\n{report}"
