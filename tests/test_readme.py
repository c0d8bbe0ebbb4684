"""The README's commands run, its links lead somewhere, and its tweaks work."""

import ast
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest
from conftest import ROOT, SAMPLE, checkpoints, checksum

README = (ROOT / "README.md").read_text()
SCRIPTS = "train_ddp.py", "model.py", "data.py", "utils.py"
# A proxy that refuses at once stands for "no network", also where there is one.
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files of the repository in a folder of their own, as after a clone."""
    folder = tmp_path_factory.mktemp("clone")
    for script in SCRIPTS:
        shutil.copy(ROOT / script, folder)
    shutil.copytree(SAMPLE, folder / "tests" / "mnist_sample")
    return folder


def runnable(language: str) -> list[str]:
    """The blocks of the README that are marked as runnable, in order."""
    return re.findall(rf"<!-- runnable -->\n```{language}\n(.*?)```", README, re.DOTALL)


def shell(script: str, cwd: Path) -> str:
    """Run a block as a user would paste it; any command that fails fails the test."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        env=os.environ | OFFLINE | {"PATH": binaries},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_commands_and_snippet_run(clone):
    """In the order of the README: torchrun, self-spawn, resume guarantee, the weights."""
    torchrun, spawn, guarantee = runnable("bash")
    assert "after epoch 3 on MNIST sample" in shell(torchrun, clone)
    assert "training is complete" in shell(spawn, clone)
    straight, broken = re.findall(
        r"([0-9a-f]{64}) (?:straight|broken)", shell(guarantee, clone)
    )
    assert straight == broken
    (snippet,) = runnable("python")
    predicted, true = re.findall(
        r"\d+", shell(f"python - <<'END'\n{snippet}END", clone)
    )
    assert predicted == true


def test_own_model_as_shown(clone):
    """Other layers, with dropout; with the line shown for it, a resumed run is the same."""
    layers, line = re.findall(
        r"```python\n((?:self\.layers|torch\.manual_seed).*?)```", README, re.DOTALL
    )
    layers, line = indent(layers, " " * 8), indent(line, " " * 4)
    own = clone / "own_model"
    own.mkdir()
    for script in SCRIPTS:
        shutil.copy(clone / script, own)
    shutil.copytree(SAMPLE, own / "tests" / "mnist_sample")
    model, train = own / "model.py", own / "train_ddp.py"
    source = model.read_text()
    start = source.index("        self.layers = nn.Sequential(")
    end = source.index("        )\n", start) + len("        )\n")
    model.write_text(source[:start] + layers + source[end:])
    source = train.read_text().replace("import Dataset", "import derive_seed, Dataset")
    first = "    logits = run.model(images)\n"
    assert (source.count(first), source.count("derive_seed")) == (1, 1)
    train.write_text(source.replace(first, line + first))
    flags = "--epochs 1 --save_every 40 --world_size 2 --checkpoint_dir dropped"
    shell(f"python own_model/train_ddp.py {flags}", clone)
    straight = checksum(clone / "dropped")
    checkpoints(clone / "dropped")[-1].unlink()
    output = shell(f"python own_model/train_ddp.py {flags}", clone)
    assert "epoch00000-image" in re.search(r"^start .*", output, re.MULTILINE)[0]
    assert checksum(clone / "dropped") == straight


def test_own_data_set_as_shown(clone):
    """Fashion-MNIST's folder and checksums at the top of data.py, and nothing else."""
    raw = clone / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    checksums = ""
    for file in sorted(SAMPLE.glob("*.gz")):
        content = bytearray(gzip.decompress(file.read_bytes()))
        if "images" in file.name:  # other pixels: the same digits, inverted
            content[16:] = bytes(255 - pixel for pixel in content[16:])
        (raw / file.stem).write_bytes(content)
        checksums += f'    "{file.stem}": "{hashlib.sha256(content).hexdigest()}",\n'
    own = clone / "own"
    own.mkdir()
    for script in SCRIPTS:
        shutil.copy(clone / script, own)
    source = (own / "data.py").read_text()
    source = source.replace('DATASET = "MNIST"', 'DATASET = "FashionMNIST"', 1)
    order = re.findall(r'"(\S+-ubyte)": "', source)
    lines = {line.split('"')[1]: line for line in checksums.splitlines()}
    table = "SHA256 = {\n" + "\n".join(lines[name] for name in order) + "\n}\n"
    source = re.sub(r"SHA256 = \{.*?\n\}\n", table, source, count=1, flags=re.DOTALL)
    (own / "data.py").write_text(source)
    shown = re.search(r"```python\n(DATASET.*?)```", README, re.DOTALL)[1]
    assert 'DATASET = "FashionMNIST"' in shown
    assert re.findall(r'"(\S+-ubyte)"', shown) == order
    output = shell("python own/train_ddp.py --epochs 1 --checkpoint_dir own", clone)
    assert "full FashionMNIST 10000+2000" in output


@pytest.mark.parametrize(
    "name, script", re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
)
def test_links_to_functions(name, script):
    """Each function that the README links to exists in that file."""
    tree = ast.parse((ROOT / script).read_text())
    assert name in {getattr(node, "name", None) for node in tree.body}


def test_links_to_files():
    """Each relative link leads to a file of the repository."""
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_flags_are_documented():
    """The table of flags names each flag of --help, and its default, and no other."""
    done = subprocess.run(
        [sys.executable, ROOT / "train_ddp.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    flags = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    assert flags == set(re.findall(r"^\| `(--\w+)", README, re.MULTILINE))
    assert len(done.stdout.splitlines()) <= 40
