"""The tests are tested: each mistake, made in a copy of the program, turns its test red."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE

README = (ROOT / "README.md").read_text()
SCRIPTS = "train_ddp.py", "model.py", "data.py", "utils.py"

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
SLOW = {2, 4, 8, 9, 10}

# More mistakes: the file, what is there, what is put in its place; the test, and its report.
ARITHMETIC = "tests/test_arithmetic.py::"
FILES = "tests/test_checkpoint_files.py::"
MORE = {
    "gradients are not averaged": (
        (
            "train_ddp.py",
            "F.cross_entropy(ddp(images)",
            "F.cross_entropy(run.model(images)",
        ),
        ARITHMETIC + "test_all_ranks_hold_identical_weights_after_each_step",
        r"assert equal\(ours, theirs\)",
    ),
    "buckets are not settled": (
        ("train_ddp.py", "    settle_buckets(ddp, test_set)\n", ""),
        ARITHMETIC + "test_resumed_at_any_checkpoint_the_outcome_is_bit_equal[3]",
        r"assert \d == 1",
    ),
    "losses are added up in float32": (
        ("train_ddp.py", ".sum(dtype=torch.float64)", ".sum().double()"),
        ARITHMETIC + "test_resumed_at_any_checkpoint_the_outcome_is_bit_equal[2]",
        r"assert \d == 1",
    ),
    "evaluation with dropout": (
        ("train_ddp.py", "    model.eval()\n", ""),
        ARITHMETIC + "test_evaluation_counts_each_image_once_at_any_number_of_ranks",
        r"assert \{'test_loss'.* == \{'test_loss'",
    ),
    "transforms follow the global generator": (
        ("data.py", "+ 1, size, generator=generator)", "+ 1, size)"),
        ARITHMETIC + "test_order_and_shifts_follow_from_seed_and_epoch_alone",
        r"assert equal\(first, again\)",
    ),
    "no fsync of the content": (
        ("utils.py", "        os.fsync(file.fileno())\n", ""),
        FILES + "test_a_new_checkpoint_is_on_the_disk_before_older_ones_are_deleted",
        r"At index 0 diff: \('replace'.* != \('fsync', '\.tmp",
    ),
    "no fsync of the name": (
        ("utils.py", "        os.fsync(directory)\n", "        pass\n"),
        FILES + "test_a_new_checkpoint_is_on_the_disk_before_older_ones_are_deleted",
        r"At index 2 diff: \('unlink'.* != \('fsync'",
    ),
    "checksums are not compared": (
        ("utils.py", "damaged = archive.testzip()", "damaged = None"),
        FILES + "test_a_flipped_bit_anywhere_is_detected_or_harmless",
        r"assert repr\(loaded\) == repr\(small\)",
    ),
    "a pickle may run code": (
        ("utils.py", "weights_only=True", "weights_only=False"),
        FILES + "test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded",
        r"FAILED .*\[zip with code\]",
    ),
    "loader workers inherit the lock": (
        ("utils.py", "fcntl.lockf(", "fcntl.flock("),
        FILES + "test_a_folder_is_locked_until_its_run_is_killed",
        r"another run uses",
    ),
    "nobody waits for a save": (
        (
            "train_ddp.py",
            "    with raise_on_all_ranks():\n        if dist.get_rank() == 0:\n            weights",
            "    if True:\n        if dist.get_rank() == 0:\n            weights",
        ),
        FILES + "test_all_ranks_save_one_checkpoint_or_raise",
        r"process 1 terminated with exit code 1",
    ),
}


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
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    links = shutil.ignore_patterns("mnist_sample", "tools", "__pycache__")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=links)
    (tmp_path / "tests" / "mnist_sample").symlink_to(SAMPLE)
    return tmp_path


def failure(copy: Path, test: str) -> str:
    """Run a test in the copy; return what pytest prints when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    # 0 is success, and 2 and more are problems of pytest's own.
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_readme_has_ten_mistakes_with_a_test_for_each():
    assert [number for number, _, _ in mistakes()] == [*range(1, 11)]


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in range(1, 11)],
)
def test_a_mistake_of_the_readme_turns_its_test_red(number, copy):
    _, patch, test = mistakes()[number - 1]
    subprocess.run(["git", "apply"], cwd=copy, input=patch, text=True, check=True)
    assert re.search(REASONS[number - 1], failure(copy, test))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_another_mistake_turns_its_test_red(name, copy):
    (script, old, new), test, reason = MORE[name]
    source = (copy / script).read_text()
    assert source.count(old) == 1
    (copy / script).write_text(source.replace(old, new))
    assert re.search(reason, failure(copy, test))
