"""The README's commands and scripts run, its patches apply and work, its links lead somewhere."""

import importlib.util
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    checkpoints,
    checksum,
    hand_set,
    in_ranks,
    newest,
)
from PIL import Image
from torch import Tensor

README = (ROOT / "README.md").read_text()
SCRIPTS = "train_ddp.py", "model.py", "data.py", "utils.py"
# A proxy that refuses at once stands for "no network", also where there is one.
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}

# What the tests share


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    return re.search(rf"\n##+ {heading}\n(.*?)(?=\n##+ |\Z)", README, re.DOTALL)[1]


def marked(mark: str, language: str) -> list[str]:
    """The blocks of the README below a comment with a mark, in order."""
    pattern = rf"<!-- {mark} -->\n```{language}\n(.*?)```"
    return re.findall(pattern, README, re.DOTALL)


def patches(heading: str) -> list[str]:
    """The patches below a heading."""
    found = re.findall(r"```diff\n(--- a/.*?)```", section(heading), re.DOTALL)
    assert found
    return found


@pytest.fixture
def bare_clone(tmp_path) -> Path:
    """The files of the repository in a folder of their own, as after a clone."""
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "mnist_sample").symlink_to(SAMPLE)
    return tmp_path


@pytest.fixture
def clone(bare_clone) -> Path:
    """A clone that has data already: to try to download some takes seconds."""
    (bare_clone / "data").symlink_to(SAMPLE)
    return bare_clone


def change(clone: Path, *changes: str) -> None:
    """Apply patches as a user does; git refuses those that do not fit."""
    for text in changes:
        subprocess.run(["git", "apply"], cwd=clone, input=text, text=True, check=True)


def shell(script: str, cwd: Path) -> str:
    """Run a block as a user would paste it; any command that fails fails the test."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=cwd,
        env=os.environ | OFFLINE | {"PATH": binaries},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_as_rank(clone: Path, flags: list[str], env: dict[str, str]) -> None:
    os.chdir(clone)
    os.environ.update(env)
    sys.path.insert(0, str(clone))
    sys.argv = ["train_ddp.py", *flags]
    with open(f"output{env['RANK']}", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    runpy.run_path("train_ddp.py", run_name="__main__")


def train(clone: Path, *flags: object, fails: bool = False) -> str:
    """Run the program of a clone as two ranks; return the output of rank 0.

    They are forked from a process that has imported torch, and so start at once.
    """
    context = torch.multiprocessing.get_context("forkserver")
    texts = [str(flag) for flag in flags]
    ranks = []
    for env in hand_set(2):
        ranks.append(context.Process(target=run_as_rank, args=(clone, texts, env)))
        ranks[-1].start()
    for rank in ranks:
        rank.join(600)
        if rank.exitcode is None:
            rank.kill()
    output = (clone / "output0").read_text()
    assert any(rank.exitcode != 0 for rank in ranks) == fails, output
    return output


def train_twice(clone: Path, *flags: object) -> None:
    """Train to the end; delete all but the middle checkpoint, and resume from it."""
    folder = clone / "checkpoints"
    train(clone, *flags)
    straight = checksum(folder)
    everything = newest(folder)
    paths = checkpoints(folder)
    middle = paths[len(paths) // 2]
    assert newest(folder)["progress"]["images_done"] == 0 and len(paths) > 2
    for path in paths:
        if path != middle:
            path.unlink()
    assert "from scratch" not in train(clone, *flags).splitlines()[-3]
    assert checksum(folder) == straight
    # Also what a change has added to the checkpoint.
    for name in {"averaged", "scaler"} & set(everything):
        torch.testing.assert_close(
            newest(folder)[name], everything[name], rtol=0, atol=0
        )


def record_of(clone: Path) -> dict:
    """The record of the last epoch."""
    return newest(clone / "checkpoints")["progress"]["history"][-1]


# Commands and scripts


def without_numbers(line: str) -> str:
    return re.sub(r"\b[0-9a-f]{12}\b|\d[\d,.]*", "0", line)


def test_the_quickstart_and_the_trained_weights(bare_clone):
    """The lines that the README shows are printed, apart from their numbers."""
    first, *_ = marked("runnable", "bash")
    output = shell(first, bare_clone)
    kinds = {without_numbers(line) for line in output.splitlines()}
    [transcript] = marked("transcript", "text")
    for line in transcript.splitlines():
        assert without_numbers(line) in kinds or line == "...", line
    assert "\nepoch 3/3 " in output
    assert "Setting OMP_NUM_THREADS environment variable" in output

    # It holds the empty folder of the download that failed.
    (bare_clone / "data").rename(bare_clone / "empty")
    (bare_clone / "data").symlink_to(SAMPLE)
    snippet = "".join(marked("runnable", "python"))
    printed = shell(f"python - <<'END'\n{snippet}END", bare_clone)
    assert (bare_clone / "mistakes.png").read_bytes().startswith(b"\x89PNG")
    predicted, true = re.search(r"predicted (\d) true (\d)", printed).groups()
    assert predicted == true
    assert f"accuracy {record_of(bare_clone)['test_accuracy']:.2%}" in printed


@pytest.mark.slow
def test_plain_python_and_what_resume_guarantees(clone):
    """Both launchers end with the same weights, and so does a killed training."""
    torchrun, spawn, guarantee = marked("runnable", "bash")
    shell(torchrun, clone)
    shell(spawn, clone)
    assert checksum(clone / "checkpoints") == checksum(clone / "runs" / "plain")
    printed = shell(guarantee, clone)
    sums = re.findall(r"([0-9a-f]{64}) runs/(?:straight|broken)", printed)
    assert len(sums) == 2 and sums[0] == sums[1]


def both_scripts() -> list[str]:
    """The two scripts of the diff: the plain loop, and that with DDP."""
    [diff] = marked("ddp.diff", "diff")
    scripts = []
    for sign in "-", "+":
        lines = [line for line in diff.splitlines() if line[:1] in (" ", sign, "")]
        scripts.append("".join(f"{line[1:]}\n" for line in lines))
    return scripts


@pytest.mark.parametrize("kind", ["ddp", pytest.param("plain", marks=pytest.mark.slow)])
def test_ddp_in_36_lines(kind, clone):
    plain, with_ddp = both_scripts()
    assert [with_ddp] == marked("ddp.py", "python")
    assert len([line for line in with_ddp.splitlines() if line]) == 36
    (clone / "ddp.py").write_text(plain if kind == "plain" else with_ddp)
    launchers = {"ddp": "torchrun --nproc_per_node=2", "plain": "python"}
    # More threads would starve one another on a busy machine.
    printed = shell(f"export OMP_NUM_THREADS=1; {launchers[kind]} ddp.py", clone)
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", printed)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    names = torch.load(clone / "model.pt", weights_only=True)
    assert not any(name.startswith("module.") for name in names)


def test_the_learning_curve(tmp_path):
    """The chart of the README is of the form that its command prints."""
    for number in 1, 2:
        data = {"data": "MNIST 60000+10000 images"}
        accuracies = {1: 0.98, 2: 0.98 + number / 200}
        records = [
            data | {"epoch": e, "test_accuracy": a} for e, a in accuracies.items()
        ]
        (tmp_path / str(number)).mkdir()
        state = {"progress": {"history": records}}
        torch.save(state, tmp_path / str(number) / "epoch00002-image000000000.pt")
    tool = ROOT / "tests" / "tools" / "learning_curve.py"
    printed = shell(f"python {tool} 1 2", tmp_path)
    head, numbers = printed.split('    x-axis "images seen, in thousands"')
    assert (
        numbers
        == """ [60, 120]
    y-axis "test accuracy, %" 97.9 --> 99.6
    line [98.0, 98.5]
    line [98.0, 99.0]
"""
    )
    [chart] = marked("curve", "mermaid")
    assert chart.startswith(head) and chart.count("\n    line [") == 4


# Changes


def draw_pictures(folder: Path, per_class: int) -> None:
    """Noisy pictures of any size; the classes differ in their colour."""
    generator = torch.Generator().manual_seed(per_class)
    for channel, name in enumerate(["red", "green", "blue"]):
        (folder / name).mkdir(parents=True)
        for n in range(per_class):
            size = torch.randint(40, 90, (2,), generator=generator).tolist()
            pixels = torch.randint(160, (*size, 3), generator=generator)
            pixels[:, :, channel] += 50
            picture = Image.fromarray(pixels.to(torch.uint8).numpy())
            picture.save(folder / name / f"{n:03}.jpg")


@pytest.fixture
def picture_clone(clone) -> Path:
    """A clone that trains on pictures, as the README has it."""
    draw_pictures(clone / "pictures" / "train", 43)
    draw_pictures(clone / "pictures" / "test", 11)
    [module] = marked("pictures.py", "python")
    (clone / "pictures.py").write_text(module)
    change(clone, *patches("Your own data set"))
    return clone


@pytest.mark.slow
def test_your_own_data_set(picture_clone):
    """The README's own command; then a resume in mid-epoch repeats the random transforms."""
    [command] = marked("pictures", "bash")
    output = shell(command, picture_clone)
    assert "data       129+33 pictures: blue, green, red\n" in output
    assert len(re.findall("\nepoch ", output)) == 10
    record = newest(picture_clone / "runs" / "pictures")["progress"]["history"][-1]
    assert record["test_accuracy"] > 0.9
    [snippet] = marked("picture", "python")
    printed = shell(f"python - <<'END'\n{snippet}END", picture_clone)
    assert re.fullmatch(r"predicted \w+ true blue\n", printed)
    flags = "--data_dir", "pictures", "--epochs", 1, "--batch_size", 8
    train_twice(picture_clone, *flags, "--save_every", 2, "--keep", 9)


def test_random_transforms_belong_to_seed_epoch_and_picture(picture_clone):
    """Not to a rank or a loader worker, nor to what has been drawn before."""
    spec = importlib.util.spec_from_file_location("p", picture_clone / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    folder = picture_clone / "pictures"

    def item(index: int, seed: int, epoch: int) -> Tensor:
        _, train_set, _ = pictures.load_data(folder, download=False)
        train_set.set_epoch(seed, epoch)
        return train_set[index][0]

    first = item(5, seed=0, epoch=1)
    state = torch.get_rng_state()
    torch.rand(7)
    assert item(5, seed=0, epoch=1).equal(first)
    torch.set_rng_state(state)
    assert not item(5, seed=0, epoch=2).equal(first)
    assert not item(5, seed=9, epoch=1).equal(first)
    assert torch.get_rng_state().equal(state)  # Dropout is not disturbed.
    path = folder / "train" / "blue"
    shutil.copy(path / "005.jpg", path / "006.jpg")
    assert not item(6, seed=0, epoch=1).equal(first)  # The same picture, another index.
    (folder / "test" / "red").rename(folder / "test" / "violet")
    with pytest.raises(Exception, match="different folders"):
        item(0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_your_own_model(number, clone):
    """A normalisation; and dropout, which repeats after a resume, and differs between ranks."""
    change(clone, patches("Your own model")[number])
    train_twice(clone, "--epochs", 1, "--save_every", 20, "--keep", 9)
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_fashion_mnist_needs_one_constant(clone):
    change(clone, *patches("Fashion-MNIST or KMNIST"))
    (clone / "data").unlink()
    shutil.copytree(SAMPLE / "MNIST", clone / "data" / "FashionMNIST")
    assert "FashionMNIST 10000+2000 images" in train(clone, "--epochs", 1)


@pytest.mark.slow
def test_unused_parameters(clone):
    """Without the change, the message that the README explains."""
    model = clone / "model.py"
    unused = "        super().__init__()\n        self.unused = nn.Linear(2, 2)\n"
    model.write_text(model.read_text().replace("        super().__init__()\n", unused))
    message = re.search(r"\*\*`(.*?)`\*\*", section("find_unused_parameters"))[1]
    assert message in train(clone, "--epochs", 1, fails=True)
    change(clone, *patches("find_unused_parameters"))
    train(clone, "--epochs", 1)
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_tensorboard(clone):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    change(clone, *patches("TensorBoard or Weights & Biases"))
    train(clone, "--epochs", 1)
    [folder] = (clone / "checkpoints").glob("tensorboard")
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in "train_loss", "test_loss", "test_accuracy":
        [event] = events.Scalars(name)
        assert event.step == 1
        assert event.value == pytest.approx(record_of(clone)[name])


@pytest.mark.slow
def test_bf16(clone):
    bf16, _ = patches("Half precision: bf16 or fp16")
    change(clone, bf16)
    train(clone, "--epochs", 1)
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_fp16(clone):
    """The scale is resumed, too."""
    _, fp16 = patches("Half precision: bf16 or fp16")
    change(clone, fp16)
    train_twice(clone, "--epochs", 1, "--save_every", 20, "--keep", 9)
    assert newest(clone / "checkpoints")["scaler"]["_growth_tracker"] > 0
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_average_of_the_weights(clone):
    change(clone, *patches(r"Average of the weights \(EMA\)"))
    train_twice(clone, "--epochs", 1, "--save_every", 20, "--keep", 9)
    state = newest(clone / "checkpoints")
    assert state["averaged"]["n_averaged"] == state["progress"]["step"]
    for name, weight in state["model"].items():
        assert not state["averaged"][f"module.{name}"].equal(weight)
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_pretrained_weights(clone):
    """They are better than none."""
    train(clone, "--epochs", 1)
    before = record_of(clone)
    checkpoints(clone / "checkpoints")[0].rename(clone / "pretrained.pt")
    change(clone, *patches("Start from pretrained weights"))
    train(clone, "--epochs", 1)
    assert record_of(clone)["train_loss"] < before["train_loss"] - 0.1


@pytest.mark.slow
def test_synchronised_batch_norm(clone):
    """The model is converted: DDP refuses it without a GPU."""
    model = clone / "model.py"
    norm = "            nn.BatchNorm2d(16),\n            nn.ReLU(),\n"
    model.write_text(model.read_text().replace("            nn.ReLU(),\n", norm, 1))
    change(clone, *patches("SyncBatchNorm"))
    output = train(clone, "--epochs", 1, fails=True)
    assert "SyncBatchNorm layers only work with GPU modules" in output


@pytest.mark.slow
def test_profile(clone):
    change(clone, *patches("Profile"))
    train(clone, "--epochs", 1)
    trace = (clone / "trace.json").read_text()
    assert trace.count('"gloo:all_reduce"') >= 5
    assert len(set(re.findall(r'"ProfilerStep#\d+"', trace))) == 5


def weights_after(clone: Path, steps: int) -> Tensor:
    """All weights of the checkpoint of a step, in one vector."""
    [path] = (clone / "checkpoints").glob(f"epoch00000-image{steps * 128:09d}.pt")
    model = torch.load(path, weights_only=True)["model"]
    return torch.cat([weight.flatten() for weight in model.values()])


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_large_batch(clone):
    flags = "--epochs", 1, "--save_every", 5, "--keep", 99
    train(clone, *flags)
    whole = weights_after(clone, 5)
    shutil.rmtree(clone / "checkpoints")
    change(clone, *patches("Accumulate gradients"))
    train(clone, *flags)
    parts = weights_after(clone, 5)
    assert not parts.equal(whole)  # The change had an effect.
    assert (parts - whole).norm() / whole.norm() < 1e-4


@pytest.mark.slow
def test_clipped_gradients(clone):
    change(clone, *(text.replace("=1.0", "=0") for text in patches("Clip gradients")))
    train(clone, "--epochs", 1)
    assert record_of(clone)["train_loss"] > 2.2  # With a norm of 0, nothing is learned.


def stop_early(clone: Path, test_losses: list[float]) -> int:
    """Train as the patched program does, but with such test losses; return the epochs."""
    sys.path.insert(0, str(clone))
    spec = importlib.util.spec_from_file_location("changed", clone / "train_ddp.py")
    changed = importlib.util.module_from_spec(spec)
    sys.modules["changed"] = changed
    spec.loader.exec_module(changed)
    results = iter({"test_loss": loss, "test_accuracy": 0.0} for loss in test_losses)
    changed.evaluate = lambda *_: next(results)
    args = ["--data_dir", str(SAMPLE), "--checkpoint_dir", str(clone / "checkpoints")]
    sys.argv = ["", *args, "--epochs", "99", "--batch_size", "2000"]
    rank = torch.distributed.get_rank()
    info = changed.RankInfo(rank, rank, 2, 2, "")
    with (
        patch("utils.join_process_group", lambda info: torch.device("cpu")),
        patch("torch.distributed.destroy_process_group"),
    ):
        lock = changed.FolderLock(clone / "checkpoints")
        changed.train(changed.parse_args(info), info, lock)
    return len(test_losses) - len(list(results))


@pytest.mark.slow
def test_the_best_model_is_kept_and_both_ranks_stop_early(clone):
    change(clone, *patches("Keep the best model, stop early"))
    losses = [0.5, 0.4, 0.45, 0.3, 0.35, 0.31, 0.3001, 0.1, 0.2]
    assert in_ranks(2, stop_early, clone, losses) == [7, 7]
    best = torch.load(clone / "checkpoints" / "best.pt", weights_only=True)
    last = newest(clone / "checkpoints")["model"]
    assert best.keys() == last.keys()
    assert not any(best[name].equal(last[name]) for name in best)


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_and_trained_no_further(clone):
    train(clone, "--epochs", 1)
    change(clone, *patches("Evaluate a checkpoint only"))
    output = train(clone, "--epochs", 9)
    [record] = newest(clone / "checkpoints")["progress"]["history"]
    assert f"'test_accuracy': {record['test_accuracy']}" in output


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_torch_compile(clone):
    change(clone, *patches("torch.compile"))
    train(clone, "--epochs", 1)
    assert not any(
        "_orig_mod" in name for name in newest(clone / "checkpoints")["model"]
    )
    assert record_of(clone)["test_accuracy"] > 0.9


def test_every_patch_applies(clone):
    """Those of the changes and of the mistakes; each to a fresh copy."""
    found = re.findall(r"```diff\n(--- a/.*?)```", README, re.DOTALL)
    assert len(found) > 25
    for text in found:
        check = ["git", "apply", "--check"]
        subprocess.run(check, cwd=clone, input=text, text=True, check=True)


# Messages


def kill_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def provoke(folder: Path) -> list[str]:
    """Provoke messages of the program; return them."""
    import data
    import train_ddp
    import utils

    os.chdir(folder)
    errors = os.open("errors", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    lines = []
    newer = Path("checkpoints/epoch00002-image000000000.pt")
    older = Path("checkpoints/epoch00001-image000000000.pt")
    older.parent.mkdir()
    args = Namespace(seed=0, epochs=1, batch_size=1, world_size=1, lr=1.0)
    saved = {"data": "x", "optimizer_class": "Namespace", "args": vars(args).copy()}
    model = torch.nn.Linear(1, 1)
    adam = torch.optim.Adam(model.parameters())

    def run_with(**changes) -> Namespace:
        args = Namespace(**{**saved["args"], "checkpoint_dir": older.parent, **changes})
        progress = train_ddp.Progress(step=20)
        return Namespace(
            args=args, data_name="x", model=model, optimizer=adam, progress=progress
        )

    def raises(function, *arguments, **env: str) -> None:
        """Note the error that a call raises, with such variables in the environment."""
        with patch.dict(os.environ, env):
            try:
                function(*arguments)
            except utils.UserError as error:
                lines.append(f"error: {error}")

    def put(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    put(older, b"")
    raises(utils.newest_checkpoint, older.parent)
    state = train_ddp.checkpoint_of(run_with())
    utils.save_checkpoint(older, state, keep=3)
    raises(train_ddp.resume, run_with(seed=1))
    other = run_with()
    other.model = torch.nn.Linear(2, 2)
    raises(train_ddp.resume, other)
    with patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        raises(utils.save_checkpoint, newer, state, 3)
    utils.save_checkpoint(older, {**state, "version": 0}, keep=3)
    raises(utils.newest_checkpoint, older.parent)

    with patch("fcntl.lockf", side_effect=BlockingIOError):
        raises(utils.FolderLock(older.parent).claim)
    with patch("fcntl.lockf", side_effect=OSError):
        utils.FolderLock(older.parent).claim()

    nan = torch.tensor(float("nan"))
    raises(train_ddp.add_up_losses_and_signals, run_with().progress, [nan], [])
    two_seeds = [{"seed 0"}, {"seed 1"}]
    with patch("train_ddp.gather", lambda item: two_seeds):
        raises(train_ddp.check_that_ranks_agree, args, "")

    store = Mock(check=lambda keys: keys == ["rank 0 is here"])
    with patch("utils.time") as clock, suppress(utils.UserError):
        clock.monotonic.side_effect = [0, 11, 9999]
        info = utils.RankInfo(0, 0, 2, 2, "tcp://127.0.0.1:29500")
        utils.wait_for_all_ranks(store, info)

    with patch("utils.count_gpus", lambda: 1):
        raises(utils.choose_world_size, 2, None)
    raises(utils.read_rank_info, RANK="0")
    raises(utils.read_rank_info, OMPI_COMM_WORLD_SIZE="2")
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    four = utils.RankInfo(0, 0, 4, 2, "")
    raises(utils.choose_world_size, 2, four, **torchrun)
    restarts = {**torchrun, "TORCHELASTIC_MAX_RESTARTS": "3"}
    raises(utils.choose_world_size, None, four, **restarts)

    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
    closed = RuntimeError(f"{gloo}Connection closed by peer [127.0.0.1]:40000")
    with patch("os._exit"):
        utils.abort(closed, four)
    ranks = torch.multiprocessing.start_processes(
        kill_rank_1, nprocs=2, join=False, start_method="forkserver"
    )
    utils.wait_for_processes(ranks, [])

    put(Path("data/train-images-idx3-ubyte"), b"")
    raises(data.load_data, Path("data"), True)
    shutil.rmtree("data")
    for name in data.FILES:
        put(Path("data/MNIST/raw", name), b"")
    raises(data.load_data, Path("data"), True)
    return lines + Path("errors").read_text().splitlines()


def test_troubleshooting_has_the_messages_that_are_printed(tmp_path):
    """Each is provoked here. Numbers may differ, and three dots stand for anything."""
    [printed] = in_ranks(1, provoke, tmp_path)
    messages = re.findall(
        r"^- \*\*`(.*?)`\*\*", section("Troubleshooting"), re.MULTILINE
    )
    ours = [m for m in messages if re.match("error: |warning: ", m)]
    assert len(ours) > 15 and len(messages) > len(ours)
    for message in ours:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(message)).replace(r"\.\.\.", ".+")
        assert any(re.fullmatch(pattern, line) for line in printed), (
            message + "\n\n" + "\n".join(printed)
        )
    assert_torch_prints({*messages} - {*ours})


def assert_torch_prints(messages: set[str]) -> None:
    """Word for word, they are in torch or its libraries."""
    folder = Path(torch.__file__).parent
    sources = [*folder.glob("lib/libtorch*.so"), *folder.glob("lib/libtorch*.dylib")]
    sources += folder.glob("distributed/**/*.py")
    unseen = messages - {"Duplicate GPU detected"}  # NCCL is not everywhere.
    for source in sources:
        content = source.read_bytes()
        unseen -= {message for message in unseen if message.encode() in content}
    assert not unseen


def test_exit_codes_are_those_of_the_signals():
    text = section("Troubleshooting")
    for name in "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1":
        assert str(128 + signal.Signals[name]) in text


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


def test_no_figure_is_missing():
    assert not re.findall(r"@@\w+@@", README)
