"""The recipes apply, combine and come off again, and do what their first lines promise."""

import itertools
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    Forked,
    assert_same_result,
    checkpoints,
    equal,
    hand_set,
    newest,
    run,
)
from PIL import Image

RECIPES = ROOT / "tests" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.patch"))
# Two ways to do the same. Any other two recipes combine.
ALTERNATIVES = [{"bf16", "fp16"}, {"pictures", "resnet"}]

# What the tests share


@pytest.fixture
def picture_clone(clone) -> Path:
    """A clone with noisy pictures of any size, whose classes differ in their colour."""
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
    return clone


@pytest.fixture
def resnet_clone(picture_clone, monkeypatch) -> Path:
    """With a resnet for small pictures, and made-up weights in place of ImageNet's."""
    from torchvision.models import ResNet18_Weights, resnet18

    apply(picture_clone, "resnet")
    edit(picture_clone / "pictures.py", "SIZE = 224", "SIZE = 32")
    monkeypatch.setenv("TORCH_HOME", str(picture_clone))
    name = ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    path = picture_clone / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(resnet18().state_dict(), path)
    (picture_clone / "made-up.pt").symlink_to(path)
    return picture_clone


def git_apply(clone: Path, *arguments: str) -> str:
    """Apply recipes by name, or take them back with -R; return what git complains of."""
    words = [f"{RECIPES / word}.patch" if word in NAMES else word for word in arguments]
    # In a folder below another repository, git would apply nothing, and not say so.
    env = {"GIT_CEILING_DIRECTORIES": str(clone.parent)}
    return run(["git", "apply", *words], clone, **env).stderr


def apply(clone: Path, *arguments: str) -> None:
    assert git_apply(clone, *arguments) == ""
    for file, text in contents(clone).items():
        compile(text, file, "exec")


def contents(clone: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in clone.glob("*.py")}


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that occurs once."""
    assert file.read_text().count(old) == 1, f"{old!r} does not occur once in {file}"
    file.write_text(file.read_text().replace(old, new))


def run_forked(clone: Path, *words: object, ranks: int = 1, code: int = 0) -> str:
    """Run a script of a clone, expect an exit code of each rank; return the output of rank 0."""
    script, *flags = map(str, words)
    variables = [env | {"LOCAL_RANK": env["RANK"]} for env in hand_set(ranks)]
    jobs = [Forked(flags, clone, clone / script, **env) for env in variables]
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
    words = "train_ddp.py", "--epochs", 1, *flags
    return run_forked(clone, *words, ranks=2, code=code)


def train_and_stop(clone: Path, *flags: object) -> None:
    """Train with and without a SIGTERM in mid-epoch: the outcome has to be the same."""
    flags = *flags, "--save_every", 2
    train(clone, *flags, "--checkpoint_dir", "straight")
    signalled = """        progress.step += 1
        if progress.step == 3 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
"""
    edit(clone / "train_ddp.py", "        progress.step += 1\n", signalled)
    stopped = train(clone, *flags, code=-15)
    assert newest(clone / "checkpoints")["progress"]["step"] == 4
    path = f"checkpoints/{checkpoints(clone / 'checkpoints')[-1].name}"
    assert f"stopped; {path} has all progress" in stopped
    assert f"start      {path}\n" in train(clone, *flags)
    assert_same_result(clone / "checkpoints", clone / "straight")


def record_of(clone: Path) -> dict:
    """The record of the last epoch."""
    return newest(clone / "checkpoints")["progress"]["history"][-1]


# All recipes: fast


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_applies_and_is_taken_back(name, clone):
    before = contents(clone)
    apply(clone, name)
    assert contents(clone) != before
    apply(clone, "-R", name)
    assert contents(clone) == before


def test_any_two_recipes_combine_in_either_order(clone):
    """Except for the alternatives. They are also taken back in either order."""
    before = contents(clone)
    refused = []
    for pair in itertools.combinations(NAMES, 2):
        outcomes = []
        for first, second in pair, pair[::-1]:
            assert git_apply(clone, first) == ""
            problem = git_apply(clone, second)
            outcomes.append("refused" if problem else contents(clone))
            applied = [first] if problem else [first, second]
            assert git_apply(clone, "-R", *applied) == "", (
                f"{applied} are not taken back"
            )
            assert contents(clone) == before, f"{applied} leave something behind"
        assert outcomes[0] == outcomes[1], f"the order of {pair} matters"
        if outcomes[0] == "refused":
            refused.append(set(pair))
    assert refused == ALTERNATIVES
    # All of them at once.
    names = [name for name in NAMES if name not in ("fp16", "resnet")]
    apply(clone, *names)
    apply(clone, "-R", *names)
    assert contents(clone) == before


@pytest.mark.parametrize("script, ranks", [("single.py", 1), ("ddp.py", 2)])
def test_ddp_in_36_lines(script, ranks, clone):
    text = (RECIPES / script).read_text()
    assert len([line for line in text.splitlines() if line]) <= 36
    shutil.copy(RECIPES / script, clone)
    printed = run_forked(clone, script, ranks=ranks)
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", printed)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    names = torch.load(clone / "model.pt", weights_only=True)
    assert not any(name.startswith("module.") for name in names)


@pytest.mark.parametrize("name", ["pictures", "resnet"])
def test_random_transforms_belong_to_seed_epoch_and_picture(name, picture_clone):
    """Not to a rank or a loader worker, nor to what has been drawn before."""
    apply(picture_clone, name)
    load_data = runpy.run_path(str(picture_clone / "pictures.py"))["load_data"]
    folder = picture_clone / "pictures"
    path = folder / "train" / "blue"
    shutil.copy(path / "005.jpg", path / "006.jpg")

    def item(index: int, seed: int, epoch: int) -> torch.Tensor:
        _, train_set, _ = load_data(folder, seed, False)
        train_set.set_epoch(epoch)
        return train_set[index][0]

    first = item(5, seed=0, epoch=1)
    torch.rand(7)
    state = torch.get_rng_state()
    assert item(5, seed=0, epoch=1).equal(first), "drawn from the global generator"
    assert torch.get_rng_state().equal(state), "the global generator is disturbed"
    assert not item(5, seed=0, epoch=2).equal(first), "the same in each epoch"
    assert not item(5, seed=9, epoch=1).equal(first), "the same for each seed"
    # The next file has the same picture.
    assert not item(6, seed=0, epoch=1).equal(first), "the same for each picture"


@pytest.mark.parametrize("name", ["pictures", "resnet"])
def test_folders_of_pictures_are_checked(name, picture_clone):
    apply(picture_clone, name)
    load_data = runpy.run_path(str(picture_clone / "pictures.py"))["load_data"]
    folder = picture_clone / "pictures"

    def problem() -> str:
        with pytest.raises(SystemExit) as caught:
            load_data(folder, 0, False)
        return str(caught.value)

    (folder / "test" / "red").rename(folder / "test" / "violet")
    assert problem().endswith("only one of train and test has red, violet")
    for path in "test/violet", "test/green", "train/red", "train/green":
        shutil.rmtree(folder / path)
    assert problem().endswith("there is only one class, blue")
    shutil.rmtree(folder / "test")
    assert "--data_dir needs train/CLASS/*.jpg and test/CLASS/*.jpg" in problem()


# Data and models: slow


@pytest.mark.slow
def test_pictures(picture_clone):
    """With the README's own flags."""
    apply(picture_clone, "pictures")
    flags = "--data_dir", "pictures", "--lr", 0.003, "--epochs", 10
    output = train(picture_clone, *flags)
    assert "data       pictures of blue, green, red, 129 + 33 items\n" in output
    assert len(re.findall("^epoch ", output, re.MULTILINE)) == 10
    assert record_of(picture_clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_resnet(resnet_clone):
    """The backbone starts from the weights on the disk, and learns at a tenth of the rate."""
    flags = "--save_every", 1, "--keep", 9, "--batch_size", 16
    output = train(resnet_clone, "--data_dir", "pictures", *flags)
    assert "pretrained all but ['fc.weight', 'fc.bias']; not used: []\n" in output
    first, second, *_ = checkpoints(resnet_clone / "checkpoints")
    start = torch.load(resnet_clone / "made-up.pt", weights_only=True)
    before = torch.load(first, weights_only=True)["model"]
    after = torch.load(second, weights_only=True)["model"]

    def largest_step(name: str) -> float:
        return (after[name] - before[name]).abs().max().item()

    assert (before["conv1.weight"] - start["conv1.weight"]).abs().max() < 0.01
    assert after["bn1.running_mean"].equal(start["bn1.running_mean"]), "not frozen"
    # Adam changes each weight by about the learning rate.
    for name in "conv1.weight", "layer4.1.conv2.weight":
        assert 5 < largest_step("fc.weight") / largest_step(name) < 15
    # The README's script uses what was trained.
    readme = (ROOT / "README.md").read_text()
    snippet = re.search("<!-- picture -->\n```python\n(.*?)```", readme, re.DOTALL)[1]
    (resnet_clone / "snippet.py").write_text(
        snippet.replace("runs/cats", "checkpoints")
    )
    printed = run_forked(resnet_clone, "snippet.py")
    assert re.fullmatch(r"predicted \w+ true blue\n", printed)


@pytest.mark.slow
def test_fashion(clone):
    """MNIST stands for it, with pixels that are not quite normalised then."""
    apply(clone, "fashion")
    assert "data       FashionMNIST, 10000 + 2000 items\n" in train(clone)
    assert record_of(clone)["test_accuracy"] > 0.85


@pytest.mark.slow
def test_pretrained_weights_are_better_than_none(clone):
    apply(clone, "pretrained")
    train(clone)
    loss = record_of(clone)["train_loss"]
    state = newest(clone / "checkpoints")
    torch.save(state, clone / "good.pt")
    flags = "--pretrained", "good.pt", "--checkpoint_dir", "other"
    left_out = "['layers.8.weight', 'layers.8.bias']"
    note = f"pretrained all but {left_out} by good.pt; not used: []\n"
    assert note in train(clone, *flags)
    [record] = newest(clone / "other")["progress"]["history"]
    assert record["train_loss"] < loss - 0.1

    state["model"] = {f"module.{name}": w for name, w in state["model"].items()}
    torch.save(state, clone / "bad.pt")
    flags = "--pretrained", "bad.pt", "--checkpoint_dir", "third"
    problem = "error: no weight in bad.pt has a name of this model\n"
    assert problem in train(clone, *flags, code=1)


@pytest.mark.slow
def test_synchronised_batch_norm(clone):
    """The model is converted: DDP refuses it without a GPU."""
    line = "            nn.Conv2d(24, 96, kernel_size=3),  # 5x5 -> 3x3\n"
    edit(clone / "model.py", line, f"            nn.BatchNorm2d(24),\n{line}")
    apply(clone, "sync_batchnorm")
    output = train(clone, code=1)
    assert "SyncBatchNorm layers only work with GPU modules" in output


@pytest.mark.slow
def test_unused_parameters(clone):
    unused = "super().__init__()\n        self.unused = nn.Linear(2, 2)\n"
    edit(clone / "model.py", "super().__init__()\n", unused)
    quoted = re.search(r'"([^"]*)"', (RECIPES / "find_unused.patch").read_text())
    assert " ".join(quoted[1].split()) in train(clone, code=1)
    apply(clone, "find_unused")
    train(clone)
    assert record_of(clone)["test_accuracy"] > 0.9


# The step: slow


@pytest.mark.slow
def test_the_gradients_of_the_parts_are_those_of_the_large_batch(picture_clone):
    """Of 30 pictures, three parts have 8, and one has 6."""
    apply(picture_clone, "pictures")
    flags = "--data_dir", "pictures", "--batch_size", 30, "--save_every", 1, "--keep", 9
    gradients = {}
    for name in "whole", "parts":
        if name == "parts":
            apply(picture_clone, "accumulate")
        train(picture_clone, *flags, "--checkpoint_dir", name)
        first = torch.load(checkpoints(picture_clone / name)[0], weights_only=True)
        moments = first["optimizer"]["state"].values()
        gradients[name] = torch.cat([m["exp_avg"].flatten() for m in moments])
    difference = gradients["parts"] - gradients["whole"]
    assert difference.any(), "the recipe has no effect"
    assert difference.norm() / gradients["whole"].norm() < 1e-5


@pytest.mark.slow
def test_clipped_gradients(clone):
    """With a norm of 0, nothing is learned."""
    apply(clone, "clip")
    edit(clone / "train_ddp.py", "max_norm=1.0", "max_norm=0.0")
    train(clone)
    assert record_of(clone)["train_loss"] > 2.2


@pytest.mark.slow
def test_the_scale_of_fp16_is_resumed(clone):
    apply(clone, "fp16", "clip")
    train_and_stop(clone)
    scaler = newest(clone / "checkpoints")["scaler"]
    assert scaler["_growth_tracker"] > 0
    assert scaler == newest(clone / "straight")["scaler"]
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_an_average_of_the_weights_and_dropout_are_resumed(clone):
    apply(clone, "ema", "dropout")
    seeded = "    torch.manual_seed(run.args.seed + number)\n"
    noted = '    print(torch.initial_seed(), file=open("seeds", "a"))\n'
    edit(clone / "train_ddp.py", seeded, seeded + noted)
    train_and_stop(clone)
    state = newest(clone / "checkpoints")
    average = state["averaged"]
    assert equal(average.values(), newest(clone / "straight")["averaged"].values())
    assert average["n_averaged"] == state["progress"]["step"]
    for name, weight in state["model"].items():
        assert not average[f"module.{name}"].equal(weight)
    assert record_of(clone)["test_accuracy"] > 0.9
    # Both trainings have used the same seeds, another one for each rank and step.
    seeds = (clone / "seeds").read_text().split()
    assert len(set(seeds)) == len(seeds) / 2 == state["progress"]["step"] * 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compile(clone):
    apply(clone, "compile")
    train(clone)
    assert not any(
        "_orig_mod" in name for name in newest(clone / "checkpoints")["model"]
    )
    assert record_of(clone)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_profile(clone):
    apply(clone, "profile")
    train(clone)
    trace = (clone / "checkpoints" / "trace.json").read_text()
    assert trace.count('"gloo:all_reduce"') >= 5
    assert len(set(re.findall(r'"ProfilerStep#\d+"', trace))) == 5


# The end of an epoch: slow


@pytest.mark.slow
def test_the_best_model_is_kept_and_a_rerun_trains_nothing_more(clone):
    apply(clone, "best")
    losses = "[0.4, 0.3, 0.35, 0.31, 0.3001, 0.1][run.progress.epoch - 1]"
    edit(clone / "train_ddp.py", '"test_loss": loss,', f'"test_loss": {losses},')
    flags = "--epochs", 6, "--keep", 6
    train(clone, *flags)
    assert record_of(clone)["epoch"] == 5, "not stopped after three epochs in vain"
    best = torch.load(clone / "checkpoints" / "best.pt", weights_only=True)
    models = [torch.load(path)["model"] for path in checkpoints(clone / "checkpoints")]
    same = [equal(best["model"].values(), model.values()) for model in models]
    assert same == [False, True, False, False, False]
    assert "finished   5 epochs" in train(clone, *flags)
    assert record_of(clone)["epoch"] == 5, "a rerun has trained another epoch"


@pytest.mark.slow
def test_weights_and_biases(clone):
    """Rank 0 alone reports each epoch once, and after a stop under the same id."""
    apply(clone, "wandb")
    stand_in = """def note(name):
    return lambda *args, **words: print(name, args, words, file=open("calls", "a"))

init, log, finish = note("init"), note("log"), note("finish")
"""
    (clone / "wandb.py").write_text(stand_in)
    train_and_stop(clone)
    calls = (clone / "calls").read_text().splitlines()
    # Without a stop; until the stop, of which each rank takes care; the rest.
    expected = "init log   init finish finish   init log"
    assert [call.split()[0] for call in calls] == expected.split()
    ids = [re.search(r"'id': '(\w+)'", call)[1] for call in calls if "init" in call]
    assert ids == ["straight", "checkpoints", "checkpoints"]
    assert "'test_accuracy': 0.9" in calls[-1] and "'step': 1}" in calls[-1]


@pytest.mark.slow
def test_progress_bar(clone):
    apply(clone, "progress_bar")
    stand_in = """def tqdm(iterable, desc, disable):
    print(desc, len(iterable), "hidden" if disable else "shown", file=open("bars", "a"))
    return iterable
"""
    (clone / "tqdm.py").write_text(stand_in)
    train(clone)
    bars = sorted((clone / "bars").read_text().splitlines())
    assert bars == ["epoch 1/1 79 hidden", "epoch 1/1 79 shown"]


@pytest.mark.slow
def test_evaluate_only(clone):
    apply(clone, "evaluate_only")
    output = train(clone, "--evaluate_only", code=1)
    assert "error: nothing to evaluate in checkpoints\n" in output
    train(clone)
    record = record_of(clone)
    output = train(clone, "--evaluate_only", "--epochs", 9)
    assert f"'test_accuracy': {record['test_accuracy']}" in output
    assert newest(clone / "checkpoints")["progress"]["history"] == [record]


# Together: slow


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pictures", "resnet"])
def test_six_recipes_together(name, request, picture_clone):
    """On pictures; TensorBoard's curves have the values of the records."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module)
    if name == "resnet":
        request.getfixturevalue("resnet_clone")
    else:
        apply(picture_clone, name)
    apply(picture_clone, "bf16", "accumulate", "clip", "tensorboard", "best", "workers")
    flags = "--data_dir", "pictures", "--batch_size", 8, "--epochs", 2
    train_and_stop(picture_clone, *flags)
    folder = picture_clone / "checkpoints"
    history = newest(folder)["progress"]["history"]
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for curve in "train_loss", "test_loss", "test_accuracy":
        values = [event.value for event in events.Scalars(curve)]
        assert values == pytest.approx([record[curve] for record in history])
    best = torch.load(folder / "best.pt", weights_only=True)["progress"]["history"][-1]
    assert best["test_loss"] == min(record["test_loss"] for record in history)
