"""What people bring along: networks, losses, optimizers, data sets and metrics of their own."""

import datetime
import json
import shutil
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    CPU,
    SAMPLE,
    assert_same_result,
    checkpoints,
    fault,
    fault_in_step,
    in_ranks,
    newest,
    train_as_rank,
)
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Subset, default_collate

import data
import train_ddp
from utils import run_rank

# Of 31 items, three ranks with a batch of four take 12, 12 and 6: three steps are an epoch.
TOTAL = 31
RANKS = 3
FLAGS = {"batch_size": 4, "lr": 0.02, "seed": 1}
EPOCHS = 2
# In a rank, it may have been replaced.
original_loss = train_ddp.compute_loss


def labelled(*shape: int) -> list[tuple[Tensor, int]]:
    """Return random tensors; each label says whether the numbers add up to more than 0."""
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(TOTAL, *shape, generator=generator)
    return [(x, int(x.sum() > 0)) for x in tensors]


VECTORS = labelled(6)


class Own(NamedTuple):
    """What somebody has in place of the parts of the script."""

    build_model: Callable[[], nn.Module]
    items: Any = VECTORS
    compute_loss: Callable = original_loss
    build_optimizer: Callable = train_ddp.build_optimizer
    test_size: int = 5
    loader_workers: int = 0

    def test_set(self) -> Subset:
        return Subset(self.items, range(self.test_size))


def bring(own: Own) -> None:
    """Change the script of this rank, as somebody would by editing it."""
    train_ddp.load_data = lambda *_: ("own data", own.items, own.test_set())
    train_ddp.build_model = lambda _: own.build_model()
    train_ddp.compute_loss = own.compute_loss
    train_ddp.build_optimizer = own.build_optimizer
    data.LOADER_WORKERS = own.loader_workers


def train_own(folder: Path, **flags: Any) -> int | None:
    return train_as_rank(folder, **FLAGS, **flags)


def call_before(name: str, action: Callable) -> None:
    """Have this rank call action, with the same arguments, before a function of the script."""
    function = getattr(train_ddp, name)

    def changed(*args: Any) -> Any:
        action(*args)
        return function(*args)

    setattr(train_ddp, name, changed)


def steps(items: Any = None) -> Iterator[tuple[list[int], float]]:
    """Yield, for each step, the items of all ranks, and the factor of the learning rates."""
    for epoch in range(EPOCHS):
        if hasattr(items, "set_epoch"):
            items.set_epoch(epoch)
        generator = torch.Generator().manual_seed(FLAGS["seed"] + epoch)
        seen = epoch * TOTAL
        for chosen in torch.randperm(TOTAL, generator=generator)[:30].split(12):
            done = (seen + len(chosen) / 2) / (EPOCHS * TOTAL)
            seen += len(chosen)
            rising = done / train_ddp.WARM_UP
            falling = (1 - done) / (1 - train_ddp.WARM_UP)
            yield chosen.tolist(), min(rising, falling)


def train_plainly(own: Own) -> nn.Module:
    """Train as a plain loop does it: no DDP, no sampler, no loader."""
    torch.manual_seed(FLAGS["seed"])
    model = own.build_model()
    optimizer = own.build_optimizer(model, FLAGS["lr"])
    peaks = [group["lr"] for group in optimizer.param_groups]
    for chosen, factor in steps(own.items):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        batch = default_collate([own.items[i] for i in chosen])
        loss, _ = own.compute_loss(model, batch, CPU)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def assert_close(state: dict[str, Tensor], plain: nn.Module) -> None:
    ours = torch.cat([state[name].flatten() for name in plain.state_dict()])
    theirs = torch.cat([weight.flatten() for weight in plain.state_dict().values()])
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < 1e-5, f"the weights differ from those of a plain loop by {error:.1e}"


# ---------------------------------------------------------------- parts that work


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class ChangeInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).add_(1)


class TwoHeads(nn.ModuleDict):
    """The helper is there in training only; the output is a tuple of a tensor and a dict."""

    def __init__(self) -> None:
        heads = {"main": nn.Linear(8, 2), "helper": nn.Linear(8, 2)}
        super().__init__({"body": nn.Linear(6, 8), **heads})

    def forward(self, vectors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = torch.tanh(self["body"](vectors))
        helps = {"helper": self["helper"](features)} if self.training else {}
        return self["main"](features), helps


def loss_of_two_heads(model: nn.Module, batch: Any, device: torch.device) -> tuple:
    logits, helps = model(batch["vector"].to(device))
    labels = batch["label"].to(device)
    loss = F.cross_entropy(logits, labels)
    for other in helps.values():
        loss = loss + F.cross_entropy(other, labels)
    return loss, logits.argmax(1) == labels


def small_net(middle: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), middle(), nn.Linear(8, 2))


def frozen_net() -> nn.Module:
    model = small_net()
    model[0].requires_grad_(False)
    return model


def loss_in_float64(*args: Any) -> tuple[Tensor, Tensor]:
    loss, is_right = original_loss(*args)
    return loss.double(), is_right


def with_momentum(model: nn.Module, peak: float) -> SGD:
    return SGD(model.parameters(), lr=peak, momentum=0.9)


def in_two_groups(model: nn.Module, peak: float) -> AdamW:
    slow = {"params": model[0].parameters(), "lr": peak / 10}
    return AdamW([slow, {"params": model[2].parameters(), "weight_decay": 0}], lr=peak)


class NoisyVectors:
    """Items with a noise that belongs to (epoch, item), as a random transform should."""

    epoch: int  # There is none before `set_epoch`.

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        vector, label = VECTORS[index]
        generator = torch.Generator().manual_seed(self.epoch * TOTAL + index)
        return vector + torch.randn(6, generator=generator), label


class DigitFile:
    """Digits in a file that is opened at the first item."""

    file: Any = None

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.file is None:
            path = SAMPLE / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
            self.file = path.open("rb", buffering=0)
        self.file.seek(16 + 784 * index)
        pixels = torch.tensor([*self.file.read(784)]) / 255
        return pixels, int(pixels.mean() > 0.13)


OWN = {
    "a view of what a convolution returns": Own(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), View(), nn.Linear(36, 2)),
        labelled(2, 5, 5),
    ),
    "a convolution of volumes": Own(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(16, 2)),
        labelled(1, 3, 3, 3),
    ),
    "items and outputs with names, and a head for training only": Own(
        TwoHeads,
        [{"vector": vector, "label": label} for vector, label in VECTORS],
        loss_of_two_heads,
    ),
    "batch norm": Own(lambda: small_net(lambda: nn.BatchNorm1d(8))),
    "an input that is changed in place": Own(
        lambda: nn.Sequential(ChangeInPlace(), small_net())
    ),
    "a loss in float64": Own(small_net, compute_loss=loss_in_float64),
    "frozen layers": Own(frozen_net),
    "momentum": Own(small_net, build_optimizer=with_momentum),
    "groups of parameters": Own(small_net, build_optimizer=in_two_groups),
    "fewer test items than ranks": Own(small_net, test_size=2),
    "random transforms": Own(small_net, NoisyVectors(), loader_workers=2),
    "a file": Own(lambda: nn.Linear(784, 2), DigitFile(), loader_workers=2),
}


def train_and_resume(name: str, folder: Path) -> list[list[float]]:
    """Train, and again from the middle of the second epoch; return the rates of all steps."""
    bring(OWN[name])
    rates = []

    def note_rates(run: train_ddp.Run, *_: Any) -> None:
        rates.append([group["lr"] for group in run.optimizer.param_groups])

    call_before("train_step", note_rates)
    train_own(folder / "straight", save_every=2)
    if dist.get_rank() == 0:
        (folder / "resumed").mkdir()
        middle = folder / "straight" / "epoch00001-image000000012.pt"
        shutil.copy(middle, folder / "resumed")
    dist.barrier()
    train_own(folder / "resumed")
    return rates


@pytest.mark.parametrize("name", OWN)
def test_own_parts_learn_what_a_plain_loop_learns_and_resume_with_equal_bits(
    name, tmp_path
):
    """The results of the evaluation are those of the weights that are saved with them."""
    own = OWN[name]
    rates, *_ = in_ranks(RANKS, train_and_resume, name, tmp_path)
    assert len(rates) == 6 + 2, f"{len(rates)} steps, not 6 and after the resume 2"
    assert_same_result(tmp_path / "straight", tmp_path / "resumed")

    state = newest(tmp_path / "resumed")
    plain = train_plainly(own)
    # The statistics of a batch norm are those of one rank's batch, so it learns otherwise.
    if name == "batch norm":
        batches = state["model"]["1.num_batches_tracked"].item()
        assert batches == 6, f"the batch norm has seen {batches} batches in 6 steps"
    else:
        assert_close(state["model"], plain)

    plain.load_state_dict(state["model"])
    batch = default_collate([*own.test_set()])
    loss, is_right = own.compute_loss(plain.eval(), batch, CPU)
    record = state["progress"]["history"][-1]
    loss = pytest.approx(loss.item(), rel=1e-5)
    assert record["test_loss"] == loss, "the test loss is of other weights"
    accuracy = is_right.sum().item() / own.test_size
    assert record["test_accuracy"] == accuracy, "the accuracy is of other weights"


def test_each_group_of_parameters_has_its_own_peak_times_one_factor(tmp_path):
    rates, *_ = in_ranks(RANKS, train_and_resume, "groups of parameters", tmp_path)
    factors = [factor for _, factor in steps()]
    # After the resume come the last two steps again.
    for number, factor in enumerate(factors + factors[-2:]):
        expected = pytest.approx([0.002 * factor, 0.02 * factor], rel=1e-9)
        assert rates[number] == expected, f"the rates of step {number + 1} are wrong"


def train_from_a_file(folder: Path) -> bool:
    bring(OWN["a file"])
    train_own(folder)
    return OWN["a file"].items.file is None


def test_a_file_is_only_opened_in_the_loader_workers(tmp_path):
    """Workers that inherited an open file would share its position, and read wrong items."""
    are_closed = in_ranks(RANKS, train_from_a_file, tmp_path)
    assert all(are_closed), "an item was read in the rank itself"
    assert_close(newest(tmp_path)["model"], train_plainly(OWN["a file"]))


class CachingNet(nn.Module):
    """It keeps what it has computed in evaluation, and uses it in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 2)
        self.cache = [torch.ones(6)]
        self.cached_at_each_step: list[int] = []

    def forward(self, vectors: Tensor) -> Tensor:
        if self.training:
            self.cached_at_each_step.append(len(self.cache))
        else:
            self.cache.append(vectors.mean(0) * self.scale)
        return self.head(vectors * (self.cache[-1] * self.scale))


def train_with_cache(folder: Path) -> list[int]:
    model = CachingNet()
    bring(Own(lambda: model))
    train_own(folder)
    return model.cached_at_each_step


def test_what_a_network_has_cached_in_evaluation_can_be_trained_with(tmp_path):
    """Tensors that were made under inference_mode could not."""
    for cached in in_ranks(RANKS, train_with_cache, tmp_path):
        # The first batch comes twice, as it settles the buckets.
        assert cached == [1] * 4 + [2] * 3, f"the second epoch has no cache: {cached}"


# ---------------------------------------------------------------- parts that are refused


def layers(*names: str) -> nn.Module:
    return nn.Sequential(OrderedDict((name, nn.Linear(6, 6)) for name in names))


FIRST = Own(lambda: layers("a", "b"))


def refusal(folder: Path, change: Callable, *args: str) -> str:
    """Train an epoch, change something, and train on until all ranks exit together.

    Return the errors that this rank has printed.
    """
    bring(FIRST)
    train_own(folder, epochs=1)
    change(folder, *args)
    dist.barrier()
    lines: list[str] = []
    try:
        with patch("utils.print_line", lambda line, stream: lines.append(line)):
            train_own(folder, save_every=1)
    except SystemExit:
        return "\n".join(line for line in lines if line.startswith("error: "))
    return "not refused"


def assert_refused(refusals: list[str], *parts: str) -> None:
    """All ranks have exited, and rank 0 has printed the only line, with these parts."""
    assert "not refused" not in refusals, "the training was not refused on all ranks"
    line, *others = refusals
    assert set(others) == {""}, f"ranks other than 0 print something, too: {others}"
    assert "\n" not in line, f"this is more than one line: {line}"
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} should be in: {line}"


def drop_items_on_rank_1(folder: Path) -> None:
    def collate(items: list) -> Any:
        return default_collate(items[dist.get_rank() % 2 :])

    def make_loader(dataset, batch_size, sampler) -> DataLoader:
        return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate)

    train_ddp.make_loader = make_loader


def test_a_rank_that_drops_items_ends_all_ranks_with_one_line(tmp_path):
    lines = in_ranks(RANKS, refusal, tmp_path, drop_items_on_rank_1)
    assert_refused(lines, "11 instead of 12 images", "equally large batches")


# With what the error line calls them.
UNLOADABLE = {
    "numpy.float64": (numpy.float64(0.5), ".multiarray.scalar"),
    "path": (Path("x"), "Path"),
    "datetime": (datetime.datetime(2020, 1, 1), "datetime.datetime"),
}


def return_unloadable(folder: Path, name: str, kind: str) -> None:
    function = getattr(train_ddp, name)
    value, _ = UNLOADABLE[kind]
    setattr(train_ddp, name, lambda *args: function(*args) | {"own": value})


@pytest.mark.parametrize("place", ["evaluate", "hyperparameters"])
@pytest.mark.parametrize("kind", UNLOADABLE)
def test_what_cannot_be_loaded_again_is_refused_and_replaces_nothing(
    kind, place, tmp_path
):
    """At the first save of it, on all ranks. The newest file is the last one without it."""
    lines = in_ranks(RANKS, refusal, tmp_path, return_unloadable, place, kind)
    assert_refused(lines, UNLOADABLE[kind][1], "use float() or str()")
    step = newest(tmp_path)["progress"]["step"]
    last = 6 if place == "evaluate" else 3
    assert step == last, f"the newest file is of step {step}, not {last}"


def delete_from_checkpoint(folder: Path, *keys: str) -> None:
    if dist.get_rank() == 0:
        state = part = newest(folder)
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        torch.save(state, checkpoints(folder)[0])


LACKING = "optimizer; optimizer state; model a.bias; hyperparameters seed; progress"
FIX = "choose another --checkpoint_dir"


@pytest.mark.parametrize("keys", LACKING.split("; "))
def test_a_checkpoint_that_lacks_something_does_not_fit(keys, tmp_path):
    """One line, instead of a traceback from each rank."""
    change = delete_from_checkpoint
    lines = in_ranks(RANKS, refusal, tmp_path, change, *keys.split())
    assert_refused(lines, f"{checkpoints(tmp_path)[0]} does not fit (", FIX)


def by_layer(model: nn.Module, peak: float) -> AdamW:
    groups = [{"params": layer.parameters()} for layer in reversed(model)]
    return AdamW(groups, lr=peak, fused=True)


def by_kind(model: nn.Module, peak: float) -> AdamW:
    groups = [[layer.weight for layer in model], [layer.bias for layer in model]]
    return AdamW([{"params": group} for group in groups], lr=peak, fused=True)


OTHERS = {
    "layers in another order": Own(lambda: layers("b", "a")),
    "groups in another order": FIRST._replace(build_optimizer=by_layer),
    "groups by kind": FIRST._replace(build_optimizer=by_kind),
}


def bring_other(folder: Path, name: str) -> None:
    bring(OTHERS[name])


@pytest.mark.parametrize("name", OTHERS)
def test_what_would_give_the_optimizers_state_to_others_does_not_fit(name, tmp_path):
    """It goes by numbers: nothing else would be noticed, or a fused optimizer read beyond it."""
    lines = in_ranks(RANKS, refusal, tmp_path, bring_other, name)
    assert_refused(lines, f"{checkpoints(tmp_path)[0]} does not fit (", FIX)


# ---------------------------------------------------------------- failures and stops


def train_with_batch_norm(folder: Path, epochs: int) -> int | None:
    bring(OWN["batch norm"])
    return train_own(folder, epochs=epochs)


def fail_in_evaluation(folder: Path) -> None:
    def fail(model: nn.Module, *_: Any) -> None:
        if dist.get_rank() == 1 and not model.training:
            raise ValueError("a metric that does not work")

    bring(OWN["batch norm"])
    call_before("compute_loss", fail)
    # It ends the process without waiting for the others, which wait for this one.
    train_own(folder, call=run_rank, epochs=1)


def count_steps_of_rerun(folder: Path) -> int:
    taken: list[int] = []
    call_before("train_step", lambda *_: taken.append(1))
    train_with_batch_norm(folder, epochs=1)
    return len(taken)


def test_an_evaluation_that_fails_on_one_rank_does_not_cost_the_epoch(tmp_path):
    """A rerun only evaluates, and ends where an undisturbed run ends."""
    ours = tmp_path / "disturbed"
    with pytest.raises(ProcessExitedException):
        in_ranks(RANKS, fail_in_evaluation, ours)
    assert checkpoints(ours), "the trained epoch is lost"
    [record] = newest(ours)["progress"]["history"]
    assert "test_loss" not in record, "the evaluation has not failed"

    counts = in_ranks(RANKS, count_steps_of_rerun, ours)
    assert counts == [0] * RANKS, f"the rerun has trained on for {counts} steps"
    [record] = newest(ours)["progress"]["history"]
    assert "test_loss" in record, "the rerun has not evaluated"
    # Three ranks have trained on 30 of the 31 items.
    speed = pytest.approx(30 / record["seconds"])
    assert record["images_per_second"] == speed, "the rerun has changed the speed"
    in_ranks(RANKS, train_with_batch_norm, tmp_path / "undisturbed", 1)
    assert_same_result(ours, tmp_path / "undisturbed")


# When the signal comes: before which function is called, and after which step the run stops.
STOPS = {
    "in the last step": ("train_step", 3),
    "after the last step": ("end_epoch", 3),
    "in the save": ("checkpoint_of", 3),
    "in the evaluation": ("evaluate", 4),
}


def stop_rank_0(function: str, folder: Path, epochs: int) -> int | None:
    def stop(run: train_ddp.Run, *_: Any) -> None:
        is_early = function == "train_step" and run.progress.step < 2
        if dist.get_rank() == 0 and not is_early:
            signal.raise_signal(signal.SIGUSR1)

    call_before(function, stop)
    return train_with_batch_norm(folder, epochs)


@pytest.mark.parametrize("when", STOPS)
def test_a_stop_around_an_evaluation_loses_nothing(when, tmp_path):
    """It is noticed before the evaluation begins, which may take long; or after it."""
    ours = tmp_path / "stopped"
    function, step = STOPS[when]
    numbers = in_ranks(RANKS, stop_rank_0, function, ours, 2)
    expected = [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]
    assert numbers == expected, "not all ranks say that they were stopped"
    progress = newest(ours)["progress"]
    assert progress["step"] == step, "the run has stopped after another step"
    is_evaluated = "test_loss" in progress["history"][-1]
    should_be = when == "in the evaluation"
    assert is_evaluated == should_be, f"evaluated before the stop: {is_evaluated}"

    for folder in ours, tmp_path / "undisturbed":
        in_ranks(RANKS, train_with_batch_norm, folder, 2)
    assert_same_result(ours, tmp_path / "undisturbed")


def test_a_stop_in_the_last_evaluation_is_a_stop_for_the_shell(tmp_path):
    """A loop of trainings has to end, although this one is finished."""
    [number] = in_ranks(1, stop_rank_0, "evaluate", tmp_path, 1)
    assert number == signal.SIGUSR1, "the stop is forgotten"
    [record] = newest(tmp_path)["progress"]["history"]
    assert "test_loss" in record, "the evaluation is not saved"


FORKS = """
import functools
mp.spawn = functools.partial(mp.start_processes, start_method="fork")
"""


@pytest.mark.parametrize("repetition", range(3))
def test_an_exception_on_a_rank_other_than_0_is_printed_once(repetition, fork):
    """Rank 0 fails, too, as it has lost rank 1; the launcher may see either of them first."""
    raises = fault_in_step(1, "raise ValueError('what went wrong')")
    job = fork("--world_size", 2, **fault(utils=FORKS, **json.loads(raises["FAULT"])))
    assert job.wait() == 1, f"the exit code is not that of a failure: {job.output()}"
    count = job.output().count("[rank1]: ValueError: what went wrong\n")
    assert count == 1, f"the error is there {count} times: {job.output()}"
