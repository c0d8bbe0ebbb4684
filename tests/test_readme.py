"""The README's commands and scripts run, its tables are true, its links lead somewhere."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, newest, run

README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    return re.search(rf"\n##+ {heading}\n(.*?)(?=\n##+ |\Z)", README, re.DOTALL)[1]


def marked(mark: str, language: str) -> list[str]:
    """The blocks of the README below a comment with a mark, in order."""
    pattern = rf"<!-- {mark} -->\n```{language}\n(.*?)```"
    return re.findall(pattern, README, re.DOTALL)


def shell(script: str, cwd: Path) -> str:
    """Run a block as a user would paste it; any command that fails fails the test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A proxy that refuses at once stands for "no network", also where there is one.
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = run(["bash", "-ec", script], cwd, timeout=600, PATH=path, **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def without_numbers(line: str) -> str:
    return re.sub(r"\d[\d,.:]*", "0", line)


def test_the_quickstart_and_the_trained_weights(clone):
    """The lines that the README shows are printed, apart from their numbers."""
    (clone / "data").rename(clone / "hidden")
    quickstart, *_ = marked("runnable", "bash")
    output = shell(quickstart, clone)
    kinds = {without_numbers(line) for line in output.splitlines()}
    shown = "".join(marked("transcript", "text")).splitlines()
    # With so few images there may be no line for a step, as none takes long.
    unseen = {without_numbers(line) for line in shown if line[:5] != "step "} - kinds
    assert not unseen, output
    assert "\nepoch 3/3 " in output
    assert "BUNDLED SAMPLE" in output

    # The download that failed has left empty folders.
    shutil.rmtree(clone / "data")
    (clone / "hidden").rename(clone / "data")
    (clone / "snippet.py").write_text("".join(marked("runnable", "python")))
    printed = shell("python snippet.py", clone)
    assert (clone / "misread.png").read_bytes().startswith(b"\x89PNG")
    predicted, true = re.search(r"predicted (\d) true (\d)", printed).groups()
    assert predicted == true
    [*_, record] = newest(clone / "checkpoints")["progress"]["history"]
    assert f"accuracy {record['test_accuracy']:.2%}" in printed


@pytest.mark.slow
def test_what_resume_guarantees(clone):
    """A training that is killed ends with the same weights as one that is not."""
    [guarantee] = [block for block in marked("runnable", "bash") if "kill" in block]
    printed = shell(guarantee, clone)
    sums = re.findall(r"([0-9a-f]{64}) runs/(?:straight|broken)", printed)
    assert len(sums) == 2 and sums[0] == sums[1]


def test_the_lesson_is_the_difference_of_the_two_scripts():
    """Red and white lines are the plain loop; green and white ones are that with DDP."""
    [diff] = marked("ddp.diff", "diff")
    for sign, name in ("-", "single.py"), ("+", "ddp.py"):
        lines = [line for line in diff.splitlines() if line[:1] in (" ", sign, "")]
        script = "".join(f"{line[1:]}\n" for line in lines)
        assert script == (ROOT / "tests" / "recipes" / name).read_text()


def test_mistakes_are_those_of_the_files():
    """The table names each of the ten, with its test; three are shown in full."""
    table = section("Ten mistakes, each of which you can make yourself")
    paths = sorted((ROOT / "tests" / "mistakes").glob("[01]*.patch"))
    assert len(paths) == 10
    for path in paths:
        test = re.search(r"^test: tests/(\S+)$", path.read_text(), re.MULTILINE)[1]
        assert f"`{path.stem}`" in table
        assert f"`{test.partition('[')[0]}`" in table
        shown = marked(f"mistakes/{path.name}", "diff")
        assert all(path.read_text().endswith(f"\n{block}") for block in shown)
    assert len(re.findall("```diff", table)) == 3


def test_recipes_are_those_of_the_files():
    named = set(re.findall(r"^\| `(\w+)` \|", section("Changes"), re.MULTILINE))
    assert named == {path.stem for path in (ROOT / "tests" / "recipes").glob("*.patch")}


def test_troubleshooting_has_messages_that_are_printed():
    """Each is in a script of this project, in torch, or in one of its libraries."""
    messages = set(re.findall(r"^\| `(.*?)`", section("Troubleshooting"), re.MULTILINE))
    assert len(messages) > 6
    folder = Path(torch.__file__).parent
    sources = [*ROOT.glob("*.py"), *folder.glob("lib/libtorch_cpu.*")]
    sources += folder.glob("lib/libgloo*")
    sources += [
        *folder.glob("distributed/**/*.py"),
        *folder.glob("multiprocessing/*.py"),
    ]
    unseen = messages - {"Duplicate GPU detected"}  # NCCL is not everywhere.
    unseen -= {"terminated with signal SIGKILL"}  # It is put together from two parts.
    for source in sources:
        content = source.read_bytes()
        unseen = {message for message in unseen if message.encode() not in content}
    assert not unseen


def test_links_lead_somewhere():
    """To a file of the repository, or to a heading of this page."""
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(links) > 20
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        else:
            assert (ROOT / link.partition("#")[0]).exists(), link
    assert not re.findall(r"@\w+@", README)  # Figures that are missing.


def test_names_are_in_the_files_where_the_readme_has_them():
    found = re.findall(r"`(\w+)`\s+in\s+(?:\[)?(\w+\.py)", README)
    assert len(found) > 4
    for name, script in found:
        source = (ROOT / script).read_text()
        assert re.search(rf"^(def |class |){name}\b", source, re.MULTILINE), name


def test_the_layout_is_that_of_the_repository():
    names = re.findall(r"── ([\w./]+)", README)
    assert len(names) == 11
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_flags_are_documented(monkeypatch, capsys):
    """The table of flags names each flag of --help, and no other."""
    import train_ddp

    monkeypatch.setattr(sys, "argv", ["train_ddp.py", "--help"])
    with pytest.raises(SystemExit):
        train_ddp.parse_args()
    flags = re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)
    assert set(flags) == set(re.findall(r"^\| `(--\w+)", README, re.MULTILINE))
