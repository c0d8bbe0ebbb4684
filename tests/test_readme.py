"""The README's commands and scripts run, its patches apply and work, its links lead somewhere."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    Forked,
    checkpoints,
    checksum,
    equal,
    hand_set,
    in_ranks,
    newest,
    run,
)
from PIL import Image

README = (ROOT / "README.md").read_text()
PATCH = r"```diff\n(--- a/.*?)```"

# What the tests share


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    return re.search(rf"\n##+ {heading}\n(.*?)(?=\n##+ |\Z)", README, re.DOTALL)[1]


def marked(mark: str, language: str) -> list[str]:
    """The blocks of the README below a comment with a mark, in order."""
    pattern = rf"<!-- {mark} -->\n```{language}\n(.*?)```"
    return re.findall(pattern, README, re.DOTALL)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The repository in a folder of its own; with data: to try to download some takes seconds."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "mnist_sample").symlink_to(SAMPLE)
    (tmp_path / "data").mkdir()
    for dataset in "MNIST", "FashionMNIST":
        (tmp_path / "data" / dataset).symlink_to(SAMPLE / "MNIST")
    return tmp_path


def apply(clone: Path, text: str, *options: str) -> None:
    """Apply a patch as a user does; git refuses one that does not fit."""
    command = ["git", "apply", *options]
    subprocess.run(command, cwd=clone, input=text, text=True, check=True)


def change(clone: Path, *headings: str) -> None:
    """Apply the patches below some headings; with #2 at the end, only the second one."""
    for text in headings:
        heading, _, number = text.partition(" #")
        found = re.findall(PATCH, section(re.escape(heading)), re.DOTALL)
        assert found
        for diff in [found[int(number) - 1]] if number else found:
            apply(clone, diff)


def edit(file: Path, old: str, new: str) -> None:
    """Replace the first occurrence."""
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def shell(script: str, cwd: Path) -> str:
    """Run a block as a user would paste it; any command that fails fails the test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A proxy that refuses at once stands for "no network", also where there is one.
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = run(["bash", "-ec", script], cwd, timeout=600, PATH=path, **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_forked(
    clone: Path, script: str, *flags: object, ranks: int = 1, code: int = 0
) -> str:
    """Run a script of a clone, expect an exit code of each rank; return the output of rank 0."""
    texts = [str(flag) for flag in flags]
    jobs = []
    for env in hand_set(ranks):
        env["LOCAL_RANK"] = env["RANK"]
        jobs.append(Forked(texts, clone, clone / script, **env))
    try:
        codes = {job.wait(600) for job in jobs}
    finally:
        for job in jobs:
            job.kill()
    output = jobs[0].output()
    assert codes == {code}, output
    return output


def train(clone: Path, *flags: object, code: int = 0) -> str:
    """Train an epoch with two ranks, unless the flags say something else."""
    command = "train_ddp.py", "--epochs", 1, *flags
    return run_forked(clone, *command, ranks=2, code=code)


def train_twice(clone: Path, *flags: object) -> dict:
    """Train to the end, then once more from the last but one checkpoint; return the last."""
    folder = clone / "checkpoints"
    train(clone, "--keep", 9, *flags)
    straight = checksum(folder)
    state = newest(folder)
    *_, last_but_one, last = checkpoints(folder)
    last.unlink()
    output = train(clone, "--keep", 9, *flags)
    assert f"start      checkpoints/{last_but_one.name}\n" in output
    assert checksum(folder) == straight
    # Also what a change has added to the checkpoint.
    for name in {"averaged", "scaler"} & state.keys():
        torch.testing.assert_close(newest(folder)[name], state[name], rtol=0, atol=0)
    return state


def record_of(clone: Path) -> dict:
    """The record of the last epoch."""
    return newest(clone / "checkpoints")["progress"]["history"][-1]


# Commands and scripts


def without_numbers(line: str) -> str:
    return re.sub(r"\b[0-9a-f]{12}\b|\d[\d,.]*", "0", line)


def test_the_quickstart_and_the_trained_weights(clone):
    """The lines that the README shows are printed, apart from their numbers."""
    (clone / "data").rename(clone / "hidden")
    first, *_ = marked("runnable", "bash")
    output = shell(first, clone)
    kinds = {without_numbers(line) for line in output.splitlines()}
    [transcript] = marked("transcript", "text")
    for line in transcript.splitlines():
        assert without_numbers(line) in kinds or line == "...", line
    assert "\nepoch 3/3 " in output
    assert "Setting OMP_NUM_THREADS environment variable" in output

    # The download that failed has left empty folders.
    shutil.rmtree(clone / "data")
    (clone / "hidden").rename(clone / "data")
    (clone / "snippet.py").write_text("".join(marked("runnable", "python")))
    printed = run_forked(clone, "snippet.py")
    assert (clone / "mistakes.png").read_bytes().startswith(b"\x89PNG")
    predicted, true = re.search(r"predicted (\d) true (\d)", printed).groups()
    assert predicted == true
    assert f"accuracy {record_of(clone)['test_accuracy']:.2%}" in printed


@pytest.mark.slow
def test_plain_python_and_what_resume_guarantees(clone):
    """A training that is killed ends with the same weights as one that is not."""
    _, plain, guarantee = marked("runnable", "bash")
    assert "\nepoch 3/3 " in run_forked(clone, *plain.split()[1:], ranks=2)
    printed = shell(guarantee, clone)
    sums = re.findall(r"([0-9a-f]{64}) runs/(?:straight|broken)", printed)
    assert len(sums) == 2 and sums[0] == sums[1]


@pytest.mark.parametrize("sign, ranks", [("-", 1), ("+", 2)], ids=["plain", "ddp"])
def test_ddp_in_36_lines(sign, ranks, clone):
    """The two scripts of the diff: the plain loop, and that with DDP."""
    [diff] = marked("ddp.diff", "diff")
    lines = [line for line in diff.splitlines() if line[:1] in (" ", sign, "")]
    script = "".join(f"{line[1:]}\n" for line in lines)
    if sign == "+":
        assert [script] == marked("ddp.py", "python")
        assert len([line for line in script.splitlines() if line]) == 36
    (clone / "ddp.py").write_text(script)
    printed = run_forked(clone, "ddp.py", ranks=ranks)
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", printed)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    names = torch.load(clone / "model.pt", weights_only=True)
    assert not any(name.startswith("module.") for name in names)


def test_the_learning_curve(tmp_path, monkeypatch, capsys):
    """From the accuracies in the README's chart, its command draws that chart."""
    [chart] = marked("curve", "mermaid")
    folders = []
    for curve in re.findall(r"line \[(.*)\]", chart):
        history = []
        for epoch, percent in enumerate(curve.split(", "), start=1):
            record = {"epoch": epoch, "test_accuracy": float(percent) / 100}
            history.append(record | {"data": "MNIST 60000+10000 images"})
        folders.append(tmp_path / str(len(folders)))
        folders[-1].mkdir()
        torch.save({"progress": {"history": history}}, folders[-1] / "epoch00005.pt")
    assert len(folders) == 4
    tool = ROOT / "tests" / "tools" / "learning_curve.py"
    monkeypatch.setattr(sys, "argv", ["", *map(str, folders)])
    runpy.run_path(str(tool), run_name="__main__")
    assert capsys.readouterr().out == chart


# Changes


@pytest.fixture
def picture_clone(clone) -> Path:
    """A clone that trains on noisy pictures of any size, whose classes differ in their colour."""
    torch.manual_seed(0)
    for part, per_class in {"train": 43, "test": 11}.items():
        for channel, name in enumerate(["red", "green", "blue"]):
            folder = clone / "pictures" / part / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = torch.randint(160, (40 + number, 60, 3))
                pixels[:, :, channel] += 50
                picture = Image.fromarray(pixels.to(torch.uint8).numpy())
                picture.save(folder / f"{number:03}.jpg")
    [module] = marked("pictures.py", "python")
    (clone / "pictures.py").write_text(module)
    change(clone, "Your own data set")
    return clone


@pytest.mark.slow
def test_your_own_data_set(picture_clone):
    """The README's own command; then a resume in mid-epoch repeats the random transforms."""
    [command] = marked("pictures", "bash")
    output = run_forked(picture_clone, *command.split()[1:], ranks=2)
    assert "data       129+33 pictures: blue, green, red\n" in output
    assert len(re.findall("\nepoch ", output)) == 10
    record = newest(picture_clone / "runs" / "pictures")["progress"]["history"][-1]
    assert record["test_accuracy"] > 0.9
    [snippet] = marked("picture", "python")
    (picture_clone / "snippet.py").write_text(snippet)
    printed = run_forked(picture_clone, "snippet.py")
    assert re.fullmatch(r"predicted \w+ true blue\n", printed)
    flags = "--data_dir", "pictures", "--batch_size", 8, "--save_every", 5
    train_twice(picture_clone, *flags)


def test_random_transforms_belong_to_seed_epoch_and_picture(picture_clone):
    """Not to a rank or a loader worker, nor to what has been drawn before."""
    load_data = runpy.run_path(str(picture_clone / "pictures.py"))["load_data"]
    folder = picture_clone / "pictures"
    path = folder / "train" / "blue"
    shutil.copy(path / "005.jpg", path / "006.jpg")

    def item(index: int, seed: int, epoch: int) -> torch.Tensor:
        _, train_set, _ = load_data(folder, download=False)
        train_set.set_epoch(seed, epoch)
        return train_set[index][0]

    first = item(5, seed=0, epoch=1)
    torch.rand(7)
    state = torch.get_rng_state()
    assert item(5, seed=0, epoch=1).equal(first)
    assert torch.get_rng_state().equal(state)  # Dropout is not disturbed.
    assert not item(5, seed=0, epoch=2).equal(first)
    assert not item(5, seed=9, epoch=1).equal(first)
    assert not item(6, seed=0, epoch=1).equal(first)  # The same picture, another index.
    (folder / "test" / "red").rename(folder / "test" / "violet")
    with pytest.raises(Exception, match="different folders"):
        item(0, 0, 0)


def test_every_patch_applies(clone):
    """Those of the changes and of the mistakes; each to a fresh copy."""
    found = re.findall(PATCH, README, re.DOTALL)
    assert len(found) > 25
    for text in found:
        apply(clone, text, "--check")


@pytest.mark.slow
def test_dropout_and_an_average_of_the_weights_are_resumed(clone):
    change(clone, "Your own model #2", "Average of the weights (EMA)")
    state = train_twice(clone, "--save_every", 20)
    assert state["averaged"]["n_averaged"] == state["progress"]["step"]
    for name, weight in state["model"].items():
        assert not state["averaged"][f"module.{name}"].equal(weight)
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_the_scale_of_fp16_is_resumed(clone):
    change(clone, "Half precision: bf16 or fp16 #2")
    state = train_twice(clone, "--save_every", 20)
    assert state["scaler"]["_growth_tracker"] > 0
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_what_one_training_can_take_together(clone):
    """Before that, the message of an unused parameter, which the README explains."""
    unused = "super().__init__()\n        self.unused = nn.Linear(2, 2)\n"
    edit(clone / "model.py", "super().__init__()\n", unused)
    message = re.search(r"\*\*`(.*?)`\*\*", section("find_unused_parameters"))[1]
    assert message in train(clone, code=1)
    change(clone, "find_unused_parameters", "Fashion-MNIST or KMNIST", "Profile")
    change(clone, "Your own model #1", "Half precision: bf16 or fp16 #1")
    assert "FashionMNIST 10000+2000 images" in train(clone)
    assert record_of(clone)["test_accuracy"] > 0.9
    trace = (clone / "trace.json").read_text()
    assert trace.count('"gloo:all_reduce"') >= 5
    assert len(set(re.findall(r'"ProfilerStep#\d+"', trace))) == 5


@pytest.mark.slow
def test_tensorboard(clone):
    name = "tensorboard.backend.event_processing.event_accumulator"
    event_accumulator = pytest.importorskip(name)
    change(clone, "TensorBoard or Weights & Biases")
    train(clone)
    folder = clone / "checkpoints" / "tensorboard"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    for name in "train_loss", "test_loss", "test_accuracy":
        [event] = events.Scalars(name)
        assert event.step == 1
        assert event.value == pytest.approx(record_of(clone)[name])


@pytest.mark.slow
def test_accumulated_gradients_then_pretrained_weights_then_evaluation_only(clone):
    """The gradients are those of the large batch, and pretrained weights better than none."""
    folder = clone / "checkpoints"
    weights = []
    for heading in [], ["Accumulate gradients"]:
        change(clone, *heading)
        train(clone, "--save_every", 5, "--keep", 99)
        model = torch.load(checkpoints(folder)[0], weights_only=True)["model"]
        weights.append(torch.cat([weight.flatten() for weight in model.values()]))
        before = record_of(clone)
        checkpoints(folder)[-1].rename(clone / "pretrained.pt")
        shutil.rmtree(folder)
    whole, parts = weights
    assert not parts.equal(whole)  # The change had an effect.
    assert (parts - whole).norm() / whole.norm() < 1e-4

    change(clone, "Start from pretrained weights")
    train(clone)
    record = record_of(clone)
    assert record["train_loss"] < before["train_loss"] - 0.1
    change(clone, "Evaluate a checkpoint only")
    output = train(clone, "--epochs", 9)
    assert f"'test_accuracy': {record['test_accuracy']}" in output
    assert newest(folder)["progress"]["history"] == [record]


@pytest.mark.slow
def test_synchronised_batch_norm(clone):
    """The model is converted: DDP refuses it without a GPU."""
    norm = "nn.BatchNorm2d(16),\n            nn.ReLU(),\n"
    edit(clone / "model.py", "nn.ReLU(),\n", norm)
    change(clone, "SyncBatchNorm")
    output = train(clone, code=1)
    assert "SyncBatchNorm layers only work with GPU modules" in output


@pytest.mark.slow
def test_clipped_gradients_and_an_early_stop(clone):
    """With a norm of 0, nothing is learned. The best model is kept, and both ranks stop."""
    change(clone, "Clip gradients", "Keep the best model, stop early")
    script = clone / "train_ddp.py"
    edit(script, "max_norm=1.0", "max_norm=0")
    losses = "[0.4, 0.3, 0.35, 0.31, 0.3001, 0.1][run.progress.epoch]"
    edit(script, '"test_loss": loss', f'"test_loss": {losses}')
    train(clone, "--epochs", 6, "--keep", 6)
    assert record_of(clone)["epoch"] == 5
    assert record_of(clone)["train_loss"] > 2.2
    folder = clone / "checkpoints"
    best = torch.load(folder / "best.pt", weights_only=True)
    models = [torch.load(path)["model"] for path in checkpoints(folder)]
    same = [equal(best.values(), model.values()) for model in models]
    assert same == [False, True, False, False, False]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_torch_compile(clone):
    change(clone, "torch.compile")
    train(clone)
    names = newest(clone / "checkpoints")["model"]
    assert not any("_orig_mod" in name for name in names)
    assert record_of(clone)["test_accuracy"] > 0.9


# Messages


def kill_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def provoke(folder: Path) -> str:
    """Provoke messages of the program; return what is printed."""
    import data
    import train_ddp
    import utils

    os.chdir(folder)
    os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT), 2)

    def raises(function, *arguments, **env: str) -> None:
        """Print the error that a call raises, with such variables in the environment."""
        with patch.dict(os.environ, env), pytest.raises(utils.UserError) as caught:
            function(*arguments)
        utils.print_line(f"error: {caught.value}", sys.stderr)

    # Checkpoints
    newer = Path("checkpoints/epoch00002-image000000000.pt")
    older = Path("checkpoints/epoch00001-image000000000.pt")
    older.parent.mkdir()
    older.touch()
    raises(utils.newest_checkpoint, older.parent)
    args = Namespace(seed=0, epochs=1, batch_size=1, world_size=1, lr=1.0)
    args.checkpoint_dir = older.parent
    run = Namespace(args=args, data_name="x", progress=train_ddp.Progress(step=20))
    run.model = torch.nn.Linear(1, 1)
    run.optimizer = torch.optim.Adam(run.model.parameters())
    state = train_ddp.checkpoint_of(run)
    utils.save_checkpoint(older, state, keep=3)
    args.seed = 1
    raises(train_ddp.resume, run)
    args.seed = 0
    run.model = torch.nn.Linear(2, 2)
    raises(train_ddp.resume, run)
    with patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        raises(utils.save_checkpoint, newer, state, 3)
    utils.save_checkpoint(older, {**state, "version": 0}, keep=3)
    raises(utils.newest_checkpoint, older.parent)
    with patch("fcntl.lockf", side_effect=BlockingIOError):
        raises(utils.FolderLock(older.parent).claim)
    with patch("fcntl.lockf", side_effect=OSError):
        utils.FolderLock(older.parent).claim()

    # Ranks
    nan = torch.tensor(float("nan"))
    raises(train_ddp.add_up_losses_and_signals, run.progress, [nan], [])
    with patch("train_ddp.gather", return_value=[{"seed 0"}, {"seed 1"}]):
        raises(train_ddp.check_that_ranks_agree, args, "")
    store = Mock(check=lambda keys: keys == ["rank 0 is here"])
    with patch("utils.time") as clock:
        clock.monotonic.side_effect = [0, 11, 9999]
        info = utils.RankInfo(0, 0, 2, 2, "tcp://127.0.0.1:29500")
        raises(utils.wait_for_all_ranks, store, info)
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
    closed = RuntimeError(f"{gloo}Connection closed by peer [127.0.0.1]:40000")
    with patch("os._exit"):
        utils.abort(closed, info)
    ranks = torch.multiprocessing.start_processes(
        kill_rank_1, nprocs=2, join=False, start_method="fork"
    )
    utils.wait_for_processes(ranks, [])

    # Launchers
    with patch("utils.count_gpus", return_value=1):
        raises(utils.choose_world_size, 2, None)
    raises(utils.read_rank_info, RANK="0")
    raises(utils.read_rank_info, OMPI_COMM_WORLD_SIZE="2")
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    four = utils.RankInfo(0, 0, 4, 2, "")
    raises(utils.choose_world_size, 2, four, **torchrun)
    restarts = {**torchrun, "TORCHELASTIC_MAX_RESTARTS": "3"}
    raises(utils.choose_world_size, None, four, **restarts)

    # Data
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    Path("data/train-images-idx3-ubyte").touch()
    raises(data.load_data, Path("data"), True)
    for name in data.FILES:
        (raw / name).touch()
    raises(data.load_data, Path("data"), True)
    return Path("printed").read_text()


def test_troubleshooting_has_the_messages_that_are_printed(tmp_path):
    """Ours are provoked; numbers may differ, and three dots stand for anything."""
    text = section("Troubleshooting")
    messages = set(re.findall(r"^- \*\*`(.*?)`\*\*", text, re.MULTILINE))
    ours = {message for message in messages if re.match("error: |warning: ", message)}
    assert len(ours) > 15 and len(messages) > len(ours)
    [printed] = in_ranks(1, provoke, tmp_path)
    for message in ours:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(message)).replace(r"\.\.\.", ".+")
        found = re.search(f"^{pattern}$", printed, re.MULTILINE)
        assert found, f"{message}\n\n{printed}"
    # The others are, word for word, in torch or its libraries. NCCL is not everywhere.
    unseen = messages - ours - {"Duplicate GPU detected"}
    folder = Path(torch.__file__).parent
    for source in [
        *folder.glob("lib/libtorch_cpu.*"),
        *folder.glob("distributed/**/*.py"),
    ]:
        content = source.read_bytes()
        unseen = {message for message in unseen if message.encode() not in content}
    assert not unseen


# Links and tables


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
            assert (ROOT / link).exists(), link
    assert not re.findall(r"@@\w+@@", README)  # Figures that are missing.


def test_names_are_in_the_files_where_the_readme_has_them():
    found = re.findall(r"`(\w+)`\s+in\s+(?:\[)?(\w+\.py)", README)
    assert len(found) > 12
    for name, script in found:
        source = (ROOT / script).read_text()
        assert re.search(rf"^(def |class |){name}\b", source, re.MULTILINE), name


def test_the_layout_is_that_of_the_repository():
    names = re.findall(r"── ([\w./]+)", section("Layout"))
    assert len(names) == 9
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_flags_are_documented(monkeypatch, capsys):
    """The table of flags names each flag of --help, and no other."""
    import train_ddp

    monkeypatch.setattr(sys, "argv", ["train_ddp.py", "--help"])
    with pytest.raises(SystemExit):
        train_ddp.parse_args(None)
    flags = re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)
    assert set(flags) == set(re.findall(r"^\| `(--\w+)", README, re.MULTILINE))
