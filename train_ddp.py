"""Train a small CNN on MNIST with DistributedDataParallel; rerun the command to resume.

examples:
  torchrun --nproc_per_node=2 train_ddp.py --epochs 3 --batch_size 64
  python train_ddp.py --world_size 2    # the same, without torchrun
"""

# Several processes train together. Each has its own memory, with its own copy of the model. Each
# runs `train` below on its own images. In each backward pass they average their gradients, so that
# the copies stay equal.
#
# rank: the index of a process, from 0; also the process itself ("all ranks wait").
# world size: the number of ranks.
# global batch: the images of all ranks in one step, batch_size * world_size of them.
# local rank: the index of a process on its machine; it chooses the GPU. On two machines with four
#     GPUs each, rank 5 has the local rank 1.
# launcher: the program that starts the ranks: torchrun, once on each machine, or this script. It
#     tells each rank these numbers by environment variables: RANK, LOCAL_RANK, WORLD_SIZE.
# process group: the ranks that can reach one another; torch keeps it in a global variable.
# backend: the library that carries their messages: gloo between CPUs, nccl between NVIDIA GPUs.
# collective: an operation that all ranks must call, in the same order, because each waits for the
#     others. If only some call it, they wait for 10 minutes (utils.TIMEOUT), and fail. So all ranks
#     must also call a function that contains one, such as train_epoch, evaluate or save.
# all-reduce: the collective that adds up a tensor of each rank, and gives the sum to all.
# broadcast: the collective that gives one rank's value to all.
# barrier: the collective that only waits.
# DDP: DistributedDataParallel, which all-reduces the gradients, and divides by the world size.
# signal: a message of the system to a process: SIGINT after Ctrl-C, SIGTERM as a request to end.
#
# Seven steps turn a plain training script into one for DDP. `train`, below, takes them in order:
#
# 1. Join the other ranks:                           init_distributed()
# 2. One rank of each machine downloads the data:    load_on_every_rank(args)
# 3. Wrap the model:                                 DistributedDataParallel(model)
# 4. Give each rank its share of the images:         ResumableSampler(train_set)
# 5. Choose another order for each epoch:            sampler.set_epoch(epoch)
# 6. Train, and add up the losses of all ranks:      train_epoch(...)
# 7. Rank 0 saves, and the others wait for it:       save(run)
#
# The test set is shared out, too: each rank evaluates its part, and they add up the results.

import copy
import math
import os
import signal
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

import utils
from data import ResumableSampler, SizedDataset, load_data, make_loader
from model import ConvNet
from utils import any_rank, broadcast, call_on, gather, print0

# With ten classes, the model learns to give 0.91 to the right one, and 0.01 to each other one.
LABEL_SMOOTHING = 0.1
# During this fraction of the training the learning rate rises; then it falls.
WARM_UP = 0.2
# Every SYNC_EVERY steps the ranks add up their losses, and learn whether one of them got a signal
# to stop. Lower it if a step takes seconds: 30 s after it got one, torchrun kills all ranks.
SYNC_EVERY = 10
# A line about steps is printed when this time has passed, however long a step takes.
LOG_SECONDS = 5


@dataclass
class Progress:
    """How far the training has come. A checkpoint stores all of it."""

    epoch: int = 0  # How many epochs have been trained.
    # How many images of the current epoch all ranks together have trained on. Unlike a number of
    # batches, this says where to go on with another world size, too.
    images_done: int = 0
    step: int = 0  # How many optimizer steps have been taken since the start.
    seconds: float = 0.0  # How long the current epoch has been trained.
    # The sum of the losses of single images in this epoch, of all ranks, and the number of these
    # images. After `add_up_losses`, loss_count has to be equal to images_done.
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # A record per epoch.


@dataclass
class Run:
    """All that the functions below share: what the training was started with, and what changes."""

    args: Namespace
    device: torch.device
    data_name: str  # Such as "MNIST, 60000 + 10000 items".
    train_size: int  # The number of items in the training set.
    model: nn.Module  # The model itself, not wrapped in DDP.
    optimizer: Optimizer
    progress: Progress = field(default_factory=Progress)
    buckets_are_settled: bool = False  # See `settle_buckets`; not needed at first.
    last_print: float = field(default_factory=time.monotonic)  # See `print_at_times`.


@record  # Optional. torchrun then shows the traceback of the rank that has failed first.
def train(args: Namespace) -> int | None:
    """Train as one rank, for utils.run_rank; return the signal that has stopped it, or None."""
    # Step 1: join the other ranks. The launcher has started them; all run these same lines.
    device = utils.init_distributed()
    # Machines may have been started with different flags. All use those of rank 0.
    args = share_flags(args)
    # Rank 0 calls lock_folder(folder), which exits if another run uses the folder. With call_on,
    # all ranks exit then. (Why not just `if dist.get_rank() == 0`? See call_on.)
    call_on(dist.get_rank() == 0, utils.lock_folder, args.checkpoint_dir)

    # Step 2: one rank of each machine downloads the data; then all of them read it.
    data_name, train_set, test_set = load_on_every_rank(args)

    # As in a plain script.
    torch.manual_seed(args.seed)
    model = build_model(train_set).to(device)
    if args.lr is None:
        args.lr = default_learning_rate(args, len(train_set))
    optimizer = build_optimizer(model, args.lr)
    run = Run(args, device, data_name, len(train_set), model, optimizer)
    # The newest checkpoint, if there is one, replaces weights, optimizer state and progress.
    resumed_from = resume(run)
    report_start(run, resumed_from)

    # Step 3: wrap the model. This sends rank 0's weights to all ranks. `ddp` has the same tensors
    # as `model`, not copies, so the optimizer updates both. If a loss was computed with `ddp`,
    # loss.backward() also averages the gradients over the ranks.
    ddp = DistributedDataParallel(model)

    # Step 4: give each rank its share. The sampler asks the process group for rank and world size.
    sampler = ResumableSampler(train_set, seed=args.seed)
    loader = make_loader(train_set, args.batch_size, sampler)

    # Normally a signal ends a process at once. From here on it is only noted in `stop`, so that all
    # ranks can end after the same step, and save.
    stop = utils.catch_stop_signals()
    # An earlier process may have been stopped after an epoch, before its evaluation.
    evaluate_if_due(run, test_set)
    while run.progress.epoch < args.epochs:  # train_epoch adds 1 to it.
        # Step 5: without set_epoch, each epoch would repeat the order of the first.
        sampler.set_epoch(run.progress.epoch, start=run.progress.images_done)
        if hasattr(train_set, "set_epoch"):
            # The random shifts of the images are drawn anew for each epoch, too.
            train_set.set_epoch(run.progress.epoch)
        # Step 6: train to the end of the epoch, or until a rank gets a signal to stop.
        train_epoch(run, ddp, loader, stop)
        # Step 7: rank 0 saves, before the evaluation, which may fail or take long.
        path = save(run)
        # The ranks ask together whether one got a signal, in `train_epoch` or since then.
        if any_rank(stop.is_requested()):
            print0(f"stopped; {path} has all progress: rerun to resume")
            # utils.run_rank ends the process by the same signal, so that a shell sees that it was
            # stopped. A rank that got none uses SIGTERM: 0 would mean that all is finished.
            return stop.signum or signal.SIGTERM
        evaluate_if_due(run, test_set)
    accuracy = run.progress.history[-1]["test_accuracy"]
    print0(f"finished   {run.progress.epoch} epochs, test accuracy {accuracy:.2%}")
    # A signal may have come in the last evaluation. No any_rank here: all end now, anyway.
    return stop.signum


# ---------------------------------------------------------------- what you may want to replace


def build_model(train_set: SizedDataset) -> nn.Module:
    """Return a new model. One of your own may need `train_set`, to count its classes."""
    return ConvNet()


def build_optimizer(model: nn.Module, peak: float) -> Optimizer:
    """Return the optimizer; each group of parameters may have a peak learning rate of its own."""
    # `fused` updates all weights in one operation.
    return AdamW(model.parameters(), lr=peak, betas=(0.8, 0.95), fused=True)


def compute_loss(
    model: nn.Module, batch: Any, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of a batch, float32 [], and which predictions are right, bool [B].

    `model` is `ddp` in training, and the model itself in evaluation. Nothing else knows what a
    batch, an output or the loss is.
    """
    images, labels = batch
    # non_blocking: the CPU goes on while a GPU fetches the batch (see pin_memory in data.py).
    images = images.to(device, non_blocking=True)
    labels = labels.to(device, non_blocking=True)
    logits = model(images)
    # The test loss is not smoothed, so it cannot be compared with the train loss.
    smoothing = LABEL_SMOOTHING if model.training else 0.0
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss, logits.argmax(1) == labels


# ---------------------------------------------------------------- training and evaluation


def train_epoch(
    run: Run,
    ddp: DistributedDataParallel,
    loader: DataLoader,
    stop: utils.StopRequest,
) -> None:
    """Train to the end of the epoch, or until a rank has got a signal to stop.

    All ranks return after the same step: one that went on alone would wait for the others.
    """
    args = run.args
    progress = run.progress
    # `evaluate` leaves the model in eval mode.
    ddp.train()
    # The sum of the losses of this rank's images since the last `add_up_losses`, and the number of
    # these images. In float32, rounding would depend on the steps at which they are added up.
    own_sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    # After a resume, the seconds of an earlier process count, too.
    started = time.monotonic() - progress.seconds
    for batch_index, batch in enumerate(loader):
        if not run.buckets_are_settled:
            # Skip this at first. It is only for a resume that is exact to the last bit.
            settle_buckets(run, ddp, batch)
        # The last step of an epoch has fewer images, but equally many on each rank (`images_left`
        # leaves out what cannot be shared equally).
        global_batch = min(args.batch_size * args.world_size, images_left(run))
        set_learning_rate(run, global_batch)
        loss_and_count = train_step(run, ddp, batch)
        own_sums += loss_and_count
        progress.images_done += global_batch
        progress.step += 1
        progress.seconds = time.monotonic() - started

        is_saving = args.save_every is not None and progress.step % args.save_every == 0
        # A checkpoint needs the sums of all ranks, and `report_step` needs some after batch 0. The
        # condition must be the same on all ranks, as there are collectives below.
        if is_saving or batch_index % SYNC_EVERY == 0:
            add_up_losses(progress, own_sums)
            if any_rank(stop.is_requested()):
                # `train` saves. If this was the last batch, a resumed run gets none, and goes on
                # below the loop.
                return
        if is_saving:
            save(run)
        report_step(run)
    # The losses of the last steps.
    add_up_losses(progress, own_sums)
    end_epoch(run)


def train_step(run: Run, ddp: DistributedDataParallel, batch: Any) -> Tensor:
    """Take one step; return the sum of the losses of this rank's images, and their number.

    Both are in one tensor, float32 [2].
    """
    loss_and_count = compute_gradients(run, ddp, batch)
    # The gradients are the same on all ranks now, so all take the same step.
    # (To clip the gradients, do it here.)

    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss_and_count


def compute_gradients(run: Run, ddp: DistributedDataParallel, batch: Any) -> Tensor:
    """Compute gradients; return what `train_step` returns. (Split off for `settle_buckets`.)"""
    loss, is_right = compute_loss(ddp, batch, run.device)
    # DDP has put a hook on each weight, a function that is called when its gradient is computed.
    # So while this runs, DDP averages the gradients over the ranks. All batches of a step are
    # equally large, so the mean of their means is the mean over all images.
    loss.backward()
    # The loss is a mean; times the count, it is the sum. Both are tensors, to be added up on the
    # device: loss.item() would make the CPU wait for the GPU in each step.
    count = torch.full_like(loss, len(is_right))
    return torch.stack([loss.detach() * count, count])


def add_up_losses(progress: Progress, own_sums: Tensor) -> None:
    """Wait for all ranks; add their losses to the progress, and set own_sums to 0.

    DDP averages gradients, never the loss: without this, rank 0 would report its own loss only.
    Exits if the sum is not finite, or if the number of images is not as expected.
    """
    # This replaces own_sums by the sum of those of all ranks.
    dist.all_reduce(own_sums)
    # From here on the numbers are equal on all ranks, so either all of them exit, or none.
    loss_sum, count = own_sums.tolist()
    own_sums.zero_()
    if not math.isfinite(loss_sum):
        problem = f"the loss is {loss_sum} at step {progress.step}: lower --lr"
        utils.exit_together(problem)
    progress.loss_sum += loss_sum
    progress.loss_count += int(count)
    # With a sampler or a loader of your own, the mean of means could be wrong.
    if progress.loss_count != progress.images_done:
        numbers = f"{progress.loss_count} instead of {progress.images_done} images"
        utils.exit_together(f"{numbers}: the ranks need equally large batches")


def report_step(run: Run) -> None:
    """Report steps, train loss, speed and the time left, from time to time."""
    args = run.args
    progress = run.progress
    global_batch = args.batch_size * args.world_size
    images_per_rank = run.train_size // args.world_size
    steps_per_epoch = math.ceil(images_per_rank / args.batch_size)
    steps_left = math.ceil(images_left(run) / global_batch)
    steps_left += (args.epochs - progress.epoch - 1) * steps_per_epoch
    # The loss is as of the last `add_up_losses`.
    loss = progress.loss_sum / progress.loss_count
    images_per_second = progress.images_done / progress.seconds
    time_left = timedelta(seconds=round(steps_left * global_batch / images_per_second))
    speed = f"{images_per_second:,.0f} images/s  {time_left} left"
    steps = f"step {progress.step}/{progress.step + steps_left}"
    print_at_times(run, f"{steps}  train loss {loss:.4f}  {speed}")


def print_at_times(run: Run, text: str) -> None:
    """Print a line on rank 0, but not more often than every LOG_SECONDS."""
    now = time.monotonic()
    if now >= run.last_print + LOG_SECONDS:
        run.last_print = now
        print0(text)


@torch.no_grad()
def evaluate(run: Run, test_set: SizedDataset) -> dict[str, float]:
    """Wait for all ranks; return test_loss and test_accuracy of the whole test set."""
    # Not `ddp`: its forward pass may contain a collective, and here the ranks may have different
    # numbers of batches.
    model = run.model
    model.eval()
    # Skip this at first: ConvNet has no buffers. In a batch norm they are statistics of each rank's
    # own images. All evaluate with those of rank 0, which the checkpoint has, too.
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # Each image is used once. A DistributedSampler would repeat some, to make the shares of all
    # ranks equally large, and so the accuracy would depend on the world size.
    own_items = range(dist.get_rank(), len(test_set), dist.get_world_size())
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    loader = make_loader(test_set, run.args.batch_size, own_items)
    for batch_index, batch in enumerate(loader):
        print_at_times(run, f"evaluating batch {batch_index + 1}/{len(loader)}")
        loss, is_right = compute_loss(model, batch, run.device)
        sums[0] += loss * len(is_right)
        sums[1] += is_right.sum()
    dist.all_reduce(sums)
    loss, accuracy = (sums / len(test_set)).tolist()
    return {"test_loss": loss, "test_accuracy": accuracy}


def evaluate_if_due(run: Run, test_set: SizedDataset) -> None:
    """Evaluate the newest epoch, if that has not been done yet; save and print the results.

    The checkpoint that was saved at the end of the epoch has the same name, and is replaced.
    """
    history = run.progress.history
    if not history or "test_accuracy" in history[-1]:
        return
    entry = history[-1]
    entry.update(evaluate(run, test_set))
    path = save(run)
    print0(
        f"epoch {entry['epoch']}/{run.args.epochs}  "
        f"train loss {entry['train_loss']:.4f}  test loss {entry['test_loss']:.4f}  "
        f"accuracy {entry['test_accuracy']:.2%}  "
        f"{entry['images_per_second']:,.0f} images/s  {entry['seconds']:.1f} s  {path}"
    )


def images_left(run: Run) -> int:
    """Return how many images of the current epoch are still to be trained on.

    If the last ones are fewer than there are ranks, they go unused: of 10 images, 3 ranks take 9.
    """
    left = run.train_size - run.progress.images_done
    return left - left % run.args.world_size


def end_epoch(run: Run) -> None:
    """Keep a record of the epoch that has been trained, and begin the next one."""
    progress = run.progress
    entry = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.loss_count,
        "seconds": progress.seconds,
        "images_per_second": progress.images_done / progress.seconds,
    }
    # What belongs to a single epoch begins at 0 again.
    run.progress = Progress(
        epoch=progress.epoch + 1,
        step=progress.step,
        history=[*progress.history, entry],
    )


def set_learning_rate(run: Run, global_batch: int) -> None:
    """Set the learning rate of each group for the next step: its own peak, times one factor.

    The factor rises to 1 during WARM_UP, and then falls to 0. It follows from the number of images
    seen, so there is no scheduler to save and restore.
    """
    progress = run.progress
    images_seen = progress.epoch * run.train_size + progress.images_done
    # The middle of the step counts: at its beginning, the first step would have a rate of 0.
    middle_of_step = images_seen + global_batch / 2
    fraction_done = middle_of_step / (run.args.epochs * run.train_size)
    rising = fraction_done / WARM_UP
    falling = (1 - fraction_done) / (1 - WARM_UP)
    factor = min(rising, falling)
    for group in run.optimizer.param_groups:
        if "initial_lr" not in group:
            # In the first call, also after a resume, it is what `build_optimizer` has set.
            group["initial_lr"] = group["lr"]
        group["lr"] = group["initial_lr"] * factor


# ---------------------------------------------------------------- before the first step


def share_flags(args: Namespace) -> Namespace:
    """Wait for all ranks; return rank 0's flags, with the folders of this machine.

    Without this, a machine that was started with other flags would take other steps.
    """
    shared = broadcast(args)
    shared.data_dir = args.data_dir
    shared.checkpoint_dir = args.checkpoint_dir
    return shared


def load_on_every_rank(args: Namespace) -> tuple[str, SizedDataset, SizedDataset]:
    """Wait for all ranks; return what load_data returns, with the sizes in the name.

    The first rank of each machine downloads. If all did so at once, they would damage the files.
    """
    is_first = utils.local_rank() == 0
    folder = args.data_dir
    # The last argument says whether to download. All ranks wait at the end of each line, so the
    # second one begins when the download is done.
    loaded_first = call_on(is_first, load_data, folder, args.seed, True)
    loaded_later = call_on(not is_first, load_data, folder, args.seed, False)
    # On each rank, one of them is None: call_on returns that to ranks that have not called.
    name, train_set, test_set = loaded_first or loaded_later
    name = f"{name}, {len(train_set)} + {len(test_set)} items"
    # One machine may have only the sample that comes with the scripts.
    names = sorted(set(gather(name)))
    if len(names) > 1:
        problem = f"the ranks have different data: {'; '.join(names)}"
        utils.exit_together(f"{problem}: put the same into each --data_dir")
    return name, train_set, test_set


def default_learning_rate(args: Namespace, train_size: int) -> float:
    """Return the peak learning rate that suits the global batch.

    It is 0.01 for 128 images, and grows with the square root of their number, because the gradient
    of a larger batch has less noise. Above 256 images, larger rates did not help.
    """
    global_batch = min(args.batch_size * args.world_size, train_size)
    return 0.01 * math.sqrt(min(global_batch, 256) / 128)


def report_start(run: Run, resumed_from: Path | None) -> None:
    """Print what is about to be trained, and from which checkpoint, if any."""
    args = run.args
    print0(f"processes  {args.world_size} on {run.device.type}")
    print0(f"data       {run.data_name}")
    batch_size = f"{args.batch_size} images per rank and step"
    print0(f"training   {batch_size}, peak lr {args.lr:.3g}")
    start = resumed_from or f"from scratch, nothing in {args.checkpoint_dir}"
    print0(f"start      {start}")


def settle_buckets(run: Run, ddp: DistributedDataParallel, batch: Any) -> None:
    """Compute gradients and throw them away, once in a process. (Skip this at first.)

    DDP packs gradients into large tensors, its buckets, and packs them differently after the
    first backward pass of a process. The packing decides in which order the ranks' numbers are
    added up, and (a + b) + c may differ from a + (b + c) in the last bit. So the first step of a
    resumed process could differ from the same step of one that was never stopped.
    """
    buffers = [buffer.clone() for buffer in run.model.buffers()]
    # A model may change its input in place, and the batch is needed once more.
    compute_gradients(run, ddp, copy.deepcopy(batch))
    run.optimizer.zero_grad()
    # A batch norm, for example, has taken the batch into its statistics.
    with torch.no_grad():
        for buffer, before in zip(run.model.buffers(), buffers):
            buffer.copy_(before)
    run.buckets_are_settled = True


# ---------------------------------------------------------------- saving and resuming


def save(run: Run) -> Path:
    """Wait until rank 0 has written a checkpoint; return its path.

    No rank may end before it is written: when one has ended by a signal, the launcher ends the
    others, even rank 0 while it is writing.
    """
    progress = run.progress
    # A later checkpoint has a name that sorts later.
    name = f"epoch{progress.epoch:05d}-image{progress.images_done:09d}.pt"
    path = run.args.checkpoint_dir / name
    # Bad weights must not replace good checkpoints. The loss does not show whether the last step
    # has spoilt them. They are equal on all ranks, so either all of them exit, or none.
    if not all(weight.isfinite().all() for weight in run.model.parameters()):
        utils.exit_together("the weights are not finite: rerun with a lower --lr")
    is_rank0 = dist.get_rank() == 0
    call_on(is_rank0, utils.save_checkpoint, path, checkpoint_of(run), run.args.keep)
    return path


def checkpoint_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint holds; its tensors stay on their device."""
    return {
        "hyperparameters": hyperparameters(run),
        # The model itself is saved. In the state dict of `ddp`, every name begins with
        # "module.", and only a model that is wrapped in DDP could load it.
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "weight_names": weight_names(run),
        "progress": asdict(run.progress),
    }


def weight_names(run: Run) -> list[str | None]:
    """Return the names of the weights, in the order in which the optimizer has them.

    The optimizer saves the state of each weight without its name. If somebody has changed the order
    of the layers since then, a weight would get the state of another one.
    """
    names = {weight: name for name, weight in run.model.named_parameters()}
    groups = run.optimizer.param_groups
    return [names.get(weight) for group in groups for weight in group["params"]]


def hyperparameters(run: Run) -> dict[str, Any]:
    """Return what decides what is learned: the name of the data, and some of the flags."""
    names = "seed", "epochs", "batch_size", "world_size", "lr"
    flags = {name: getattr(run.args, name) for name in names}
    return {"data": run.data_name, **flags}


def resume(run: Run) -> Path | None:
    """Wait for all ranks; load the newest undamaged checkpoint; return its path, or None.

    On one machine, rank 0 reads the checkpoint, and all load it. All exit if it does not fit.
    """
    folder = run.args.checkpoint_dir
    found = call_on(utils.local_rank() == 0, utils.newest_checkpoint, folder)
    name, saved = found or ("", {})
    # On several machines, one rank of each reads, as each may have its own disk. Rank 0 does not
    # always have the newest: after a failure, torchrun can start the ranks again, and then rank 0
    # may be on another machine. Two machines with two ranks each may have, for example,
    # ["epoch00001-...", "", "epoch00002-...", ""].
    names = gather(name)
    newest = max(names)
    if not newest:
        return None
    # The rank that has the newest checkpoint sends it to all.
    saved = broadcast(saved, source=names.index(newest))
    path = folder / newest
    # All ranks load it. With call_on, all exit if one of them cannot.
    call_on(True, load_checkpoint, run, path, saved)
    return path


def load_checkpoint(run: Run, path: Path, saved: dict[str, Any]) -> None:
    """Load a checkpoint into the run; raises SystemExit if it does not fit."""
    try:
        compare_with_saved(run, saved)
        run.model.load_state_dict(saved["model"])
        # The state dict of an optimizer has two entries. The other, "param_groups", is taken from
        # the code. So if you have changed the weight decay, for example, the new value counts.
        optimizer_state = run.optimizer.state_dict()
        optimizer_state["state"] = saved["optimizer"]["state"]
        run.optimizer.load_state_dict(optimizer_state)
        run.progress = Progress(**saved["progress"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        fix = "choose another --checkpoint_dir"
        raise SystemExit(f"{path} does not fit ({reason}): {fix}")


def compare_with_saved(run: Run, saved: dict[str, Any]) -> None:
    """Raise ValueError if the checkpoint is of another training; report changed flags."""
    now = hyperparameters(run)
    before = saved["hyperparameters"]
    for name in "seed", "data":
        if before[name] != now[name]:
            raise ValueError(f"it has {name} {before[name]}, this run has {now[name]}")
    if saved["weight_names"] != weight_names(run):
        problem = "the optimizer has other weights, or has them in another order"
        raise ValueError(problem)
    for name, value in now.items():
        # A flag that you have added is not in older checkpoints.
        if before.get(name) != value:
            print0(f"changed    {name} from {before.get(name)} to {value}")


# ---------------------------------------------------------------- the command line


def parse_args() -> Namespace:
    """Read the flags. Wrong ones end the process before it waits for others or writes a file."""
    # The default of --world_size: what the launcher has started, or one rank for each GPU.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world_size = int(os.environ.get("WORLD_SIZE", max(gpus, 1)))
    # SUPPRESS: after a wrong flag, print one line, and not a list of all flags.
    parser = ArgumentParser(
        usage=SUPPRESS, description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3, help="in all (3)")
    parser.add_argument("--batch_size", type=int, default=64, help="per rank (64)")
    parser.add_argument("--world_size", type=int, default=world_size, help="ranks")
    parser.add_argument("--lr", type=float, help="peak rate (follows the batch size)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--save_every", type=int, help="save every N steps, too")
    parser.add_argument("--keep", type=int, default=3, help="newest checkpoints (3)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="(data)")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"))
    args = parser.parse_args()
    for name in "epochs", "batch_size", "world_size", "lr", "save_every", "keep":
        value = getattr(args, name)
        if value is not None and not 0 < value < 100_000:
            parser.error(f"--{name} must be above 0 and below 100000, not {value}")
    if utils.has_launcher() and args.world_size != world_size:
        parser.error(f"--world_size {args.world_size}, but WORLD_SIZE is {world_size}")
    return args


def main() -> None:
    """Call train(args) in this process, if it is a rank or alone; otherwise start the ranks."""
    args = parse_args()
    if utils.has_launcher() or args.world_size == 1:
        utils.run_rank(train, args)
    else:
        utils.launch(train, args)


if __name__ == "__main__":
    main()
