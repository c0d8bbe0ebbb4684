"""The README's commands and scripts run, its links lead somewhere, and its changes work."""

import ast
import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE, newest

README = (ROOT / "README.md").read_text()
SCRIPTS = "train_ddp.py", "model.py", "data.py", "utils.py"
# A proxy that refuses at once stands for "no network", also where there is one.
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@pytest.fixture
def bare_clone(tmp_path) -> Path:
    """The files of the repository in a folder of their own, as after a clone."""
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    shutil.copytree(SAMPLE, tmp_path / "tests" / "mnist_sample")
    return tmp_path


@pytest.fixture
def clone(bare_clone) -> Path:
    """A clone that has data already: to try to download some takes seconds."""
    shutil.copytree(SAMPLE, bare_clone / "data")
    return bare_clone


def runnable(language: str) -> list[str]:
    """The blocks of the README that are marked as runnable, in order."""
    return re.findall(rf"<!-- runnable -->\n```{language}\n(.*?)```", README, re.DOTALL)


def shell(script: str, cwd: Path) -> str:
    """Run a block as a user would paste it; any command that fails fails the test."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=cwd,
        env=os.environ | OFFLINE | {"PATH": binaries},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def plain_files(folder: Path, invert: bool = False) -> None:
    """Unpack the sample into `folder`; with `invert`, as other images."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in SAMPLE.rglob("*.gz"):
        content = bytearray(gzip.decompress(file.read_bytes()))
        if invert and "images" in file.name:
            content[16:] = bytes(255 - pixel for pixel in content[16:])
        (folder / file.stem).write_bytes(content)


def change(clone: Path, heading: str) -> None:
    """Apply the diff blocks below a heading of the README to the scripts of a clone."""
    section = re.search(rf"### {heading}\n(.*?)\n##", README, re.DOTALL)[1]
    blocks = re.findall(r"```diff\n (\S+)\n(.*?)```", section, re.DOTALL)
    assert blocks
    for name, block in blocks:
        for hunk in block.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            text = (clone / name).read_text()
            assert text.count(old) == 1, (text.count(old), old)
            (clone / name).write_text(text.replace(old, new))


TRAIN = "python train_ddp.py --world_size 2 --epochs 1 --save_every 5 --keep 99"


def weights_after(clone: Path, steps: int) -> torch.Tensor:
    """All weights of the checkpoint of a step, in one vector."""
    [path] = (clone / "checkpoints").glob(f"epoch00000-image{steps * 128:09d}.pt")
    model = torch.load(path, weights_only=True)["model"]
    return torch.cat([weight.flatten() for weight in model.values()])


def test_commands_and_snippet_run(bare_clone):
    """In the order of the README: torchrun, self-spawn, resume guarantee, the weights."""
    clone, (torchrun, spawn, guarantee) = bare_clone, runnable("bash")
    assert "\nepoch 3/3 " in shell(torchrun, clone)
    shutil.copytree(SAMPLE, clone / "data", dirs_exist_ok=True)
    again = shell(spawn, clone)
    assert "\nfinished " in again and "\nepoch " not in again
    sums = re.findall(r"([0-9a-f]{64}) (?:straight|broken)", shell(guarantee, clone))
    assert len(sums) == 2 and sums[0] == sums[1]
    snippet = "".join(runnable("python"))
    output = shell(f"python - <<'END'\n{snippet}END", clone)
    assert (clone / "mistakes.png").read_bytes().startswith(b"\x89PNG")
    predicted, true = re.search(r"predicted (\d) true (\d)", output).groups()
    assert predicted == true
    record = newest(clone / "checkpoints")["history"][-1]
    assert f"accuracy {record['test_accuracy']:.2%}" in output


def test_ddp_in_36_lines(clone):
    script = re.search(r"<!-- ddp.py -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    plain_files(clone / "data" / "MNIST" / "raw")  # as torchvision needs them
    (clone / "ddp.py").write_text(script)
    output = shell("torchrun --nproc_per_node=2 ddp.py", clone)
    losses = [float(x) for x in re.findall(r"epoch \d: loss (\S+)", output)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    names = torch.load(clone / "model.pt", weights_only=True)
    assert not any(name.startswith("module.") for name in names)
    assert len([line for line in script.splitlines() if line.strip()]) <= 36


@pytest.mark.slow
@pytest.mark.parametrize(
    "heading",
    [
        "Your own model",
        "A data set class of your own",
        "bf16 autocast",
        "Clip gradients",
    ],
)
def test_a_change_trains_about_as_well(heading, clone):
    """Without a change, two epochs on the sample reach some 97.5%."""
    change(clone, heading)
    shell("python train_ddp.py --world_size 2 --epochs 2", clone)
    record = newest(clone / "checkpoints")["history"][-1]
    assert record["test_accuracy"] > 0.96


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_and_trained_no_further(clone):
    shell("python train_ddp.py --epochs 1", clone)
    change(clone, "Evaluate a checkpoint only")
    output = shell("python train_ddp.py --world_size 3 --epochs 9", clone)
    [record] = newest(clone / "checkpoints")["history"]
    assert f"'test_accuracy': {record['test_accuracy']}" in output


@pytest.mark.slow
def test_fashion_mnist_needs_one_constant(clone):
    change(clone, "Fashion-MNIST, KMNIST, or four files of your own")
    plain_files(clone / "data" / "FashionMNIST" / "raw", invert=True)
    assert " FashionMNIST 10000+2000 " in shell(f"{TRAIN} --save_every 99", clone)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_large_batch(clone):
    shell(TRAIN, clone)
    whole = weights_after(clone, 5)
    shutil.rmtree(clone / "checkpoints")
    change(clone, "Accumulate gradients")
    shell(TRAIN, clone)
    parts = weights_after(clone, 5)
    assert not parts.equal(whole)  # the change had an effect
    assert (parts - whole).norm() / whole.norm() < 1e-4


@pytest.mark.slow
def test_best_checkpoint_and_early_stop(clone):
    change(clone, "Keep the best checkpoint, stop early")
    output = shell(
        "python train_ddp.py --world_size 2 --epochs 60 --lr 0.05 --keep 100", clone
    )
    history = newest(clone / "checkpoints")["history"]
    losses = [record["test_loss"] for record in history]
    best = torch.load(clone / "checkpoints" / "best.pt", weights_only=True)
    [path] = (clone / "checkpoints").glob(f"epoch{1 + losses.index(min(losses)):05d}-*")
    weights = torch.load(path, weights_only=True)["model"]
    assert all(best[name].equal(weights[name]) for name in weights)
    assert len(history) < 60 and min(losses) == losses[-3]
    assert output.splitlines()[-1].startswith(f"epoch {len(history)}/60 ")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_torch_compile(clone):
    change(clone, "torch.compile")
    shell("python train_ddp.py --world_size 2 --epochs 1", clone)
    state = newest(clone / "checkpoints")
    assert not any("_orig_mod" in name for name in state["model"])
    assert state["history"][-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize(
    "name, script", sorted(set(re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)))
)
def test_links_to_functions(name, script):
    """Each function that the README links to exists in that file."""
    tree = ast.parse((ROOT / script).read_text())
    assert name in {getattr(node, "name", None) for node in tree.body}


def printed_by_the_program() -> list[str]:
    """A pattern for each text in the scripts; what is filled in can be anything."""
    patterns = []
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                texts = [re.escape(p) if isinstance(p, str) else ".+" for p in parts]
                patterns.append("".join(texts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                patterns.append(re.escape(node.value))
    # Without those that say little, such as f"error: {error}".
    return [p.removesuffix("\\\n") for p in patterns if len(p.replace(".+", "")) > 20]


def test_troubleshooting_has_the_messages_that_are_printed():
    """Word for word: those of the program, and those of torch and its libraries."""
    section = re.search(r"## Troubleshooting\n(.*?)\n## ", README, re.DOTALL)[1]
    messages = re.findall(r"^- \*\*`(.*?)`\*\*", section, re.MULTILINE)
    ours = [m for m in messages if re.match("error: |warning: ", m)]
    assert len(ours) > 10 and len(messages) > len(ours)
    patterns = printed_by_the_program()
    for message in ours:
        texts = message, message.split(": ", 1)[1]  # the prefix can be added elsewhere
        assert any(re.fullmatch(p, text) for p in patterns for text in texts), message
    folder = Path(torch.__file__).parent
    sources = [*folder.glob("lib/libtorch*.so"), *folder.glob("lib/libtorch*.dylib")]
    sources += folder.glob("distributed/**/*.py")
    unseen = (
        {*messages} - {*ours} - {"Duplicate GPU detected"}
    )  # NCCL is not everywhere
    for source in sources:
        content = source.read_bytes()
        unseen -= {message for message in unseen if message.encode() in content}
    assert not unseen


def test_links_to_files():
    """Each relative link leads to a file of the repository."""
    links = re.findall(r"\]\((?!http|#)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_flags_are_documented():
    """The table of flags names each flag of --help, and no other."""
    done = subprocess.run(
        [sys.executable, ROOT / "train_ddp.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    flags = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    assert flags == set(re.findall(r"^\| `(--\w+)", README, re.MULTILINE))


def test_the_readme_is_short_and_complete():
    unfolded = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)
    assert len(unfolded.split()) <= 2600
    assert "@@" not in re.sub(r"```diff.*?```", "", README, flags=re.DOTALL)
