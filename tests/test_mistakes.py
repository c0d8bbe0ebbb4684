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

README = (ROOT / "README.md").read_text()

# What the tests of the README's ten mistakes report, in the order of the README.
REASONS = [
    r"assert \{'test_loss'.* == \{'test_loss'",
    r"assert tensor\(1\.\) < 0\.2",
    r"where False = .*last good checkpoint",
    r"assert \{\d+, .*\} == \{\d+\}",
    r"\(6\.0, False\) != \(6\.0, True\)",
    r"assert .*rate\(16, 2, 10_000\) < ",
    r"\(1\.0, False\) != \(6\.0, True\)",
    r"does not fit.*module\.",
    r"choose another MASTER_PORT",
    r"assert sorted\(mirror\.requested\)",
]
FAST = {3, 6, 7}

# More mistakes: a name, what is changed, the test, and what it reports.
MORE = r"""
gradients are not averaged
F.cross_entropy(ddp(images) -> F.cross_entropy(run.model(images)
test_arithmetic.py::test_all_ranks_hold_identical_weights_after_each_step
assert equal\(ours, theirs\)

buckets are not settled
settle_buckets(ddp, test_set) -> pass
test_arithmetic.py::test_resumed_at_any_checkpoint_the_outcome_is_bit_equal[3]
assert \d == 1

losses are added up in float32
.sum(dtype=torch.float64) -> .sum().double()
test_arithmetic.py::test_resumed_at_any_checkpoint_the_outcome_is_bit_equal[2]
assert \d == 1

evaluation with dropout
model.eval() -> pass
test_arithmetic.py::test_evaluation_counts_each_image_once_at_any_number_of_ranks
assert \{'test_loss'.* == \{'test_loss'

transforms follow the global generator
+ 1, size, generator=generator) -> + 1, size)
test_arithmetic.py::test_order_and_shifts_follow_from_seed_and_epoch_alone
assert equal\(first, again\)

no fsync of the content
os.fsync(file.fileno()) -> pass
test_checkpoint_files.py::test_a_new_checkpoint_is_on_the_disk_before_older_ones_are_deleted
At index 0 diff: \('folder'

no fsync of the name
os.fsync(directory) -> pass
test_checkpoint_files.py::test_a_new_checkpoint_is_on_the_disk_before_older_ones_are_deleted
At index 1 diff: \(\d+, .* != \('folder'

checksums are not compared
damaged = archive.testzip() -> damaged = None
test_checkpoint_files.py::test_a_flipped_bit_anywhere_is_detected_or_harmless
assert repr\(loaded\) == repr\(small\)

a pickle may run code
weights_only=True -> weights_only=False
test_checkpoint_files.py::test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded
FAILED .*\[zip with code\]

loader workers inherit the lock
fcntl.lockf( -> fcntl.flock(
test_checkpoint_files.py::test_a_folder_is_locked_until_its_run_is_killed
another run uses

a problem of one rank is not raised on the others
in gather(problem): -> in [problem]:
test_checkpoint_files.py::test_all_ranks_save_one_checkpoint_or_raise
process 1 terminated with exit code 1

nobody waits for a save
in gather(problem): -> in [problem]:
test_stopping.py::test_no_rank_leaves_before_the_checkpoint_is_on_the_disk
assert 0 == 1
"""


def mistakes() -> list[tuple[int, str, str]]:
    """For each mistake of the README: its number, the patch, and the test."""
    section = re.search(r"\n## Ten mistakes.*?\n(.*?)\n## ", README, re.DOTALL)[1]
    pattern = (
        r"^\*\*(\d+)\. .*?```diff\n(.*?)```\n.*?`python -m pytest ['\"]?(\S+?)['\"]?`"
    )
    found = re.findall(pattern, section, re.DOTALL | re.MULTILINE)
    return [(int(number), patch, test) for number, patch, test in found]


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
    assert process.exitcode == 1, report
    return report


def test_the_readme_has_ten_mistakes_with_a_test_for_each():
    assert [number for number, _, _ in mistakes()] == [*range(1, 11)]


@pytest.mark.parametrize(
    "number",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in range(1, 11)],
)
def test_a_mistake_of_the_readme_turns_its_test_red(number, copy):
    _, patch, test = mistakes()[number - 1]
    subprocess.run(["git", "apply"], cwd=copy, input=patch, text=True, check=True)
    assert re.search(REASONS[number - 1], failure(copy, test))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake", MORE.strip().split("\n\n"), ids=lambda mistake: mistake.splitlines()[0]
)
def test_another_mistake_turns_its_test_red(mistake, copy):
    _, change, test, reason = mistake.splitlines()
    old, new = change.split(" -> ")
    [script] = [file for file in copy.glob("*.py") if old in file.read_text()]
    source = script.read_text()
    assert source.count(old) == 1
    script.write_text(source.replace(old, new))
    assert re.search(reason, failure(copy, f"tests/{test}"))
