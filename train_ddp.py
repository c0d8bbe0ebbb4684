"""Train a small CNN on MNIST with DistributedDataParallel; rerun the command to resume.

examples:
  torchrun --nproc_per_node=2 train_ddp.py --epochs 3 --batch_size 64
  python train_ddp.py --world_size 2
"""

# Several processes train together. Each has memory of its own, and in it a copy of the model. Each
# runs `train` below, on its own images. In each backward pass they average their gradients, so
# that the copies stay equal.
#
# rank: the number of a process, from 0; also the process itself ("all ranks wait").
# world size: the number of ranks.
# global batch: the images of all ranks in one step: batch_size * world_size of them.
# local rank: the number of a process on its machine; it chooses the GPU.
# launcher: what starts the ranks: torchrun, which is run once on each machine, or this script.
#     It sets environment variables of each rank: RANK, LOCAL_RANK, WORLD_SIZE.
# process group: the ranks that can reach one another. torch keeps it in a global variable, so
#     nobody has to pass it to DDP or to the sampler.
# backend: the library that carries their messages: gloo between CPUs, nccl between NVIDIA GPUs.
# collective: an operation that all ranks must call, in the same order, as each waits for the
#     others. A rank that takes one step more waits in vain, until utils.TIMEOUT. If a function
#     calls one, as train_epoch, evaluate and save do, all ranks must call that function, too.
# all-reduce: the collective that overwrites a tensor of each rank by the sum of all of them.
# broadcast: the collective that gives one rank's value to all (utils.broadcast).
# DDP: DistributedDataParallel, which all-reduces gradients, and divides them by the world size.
# signal: a message of the system to a process: SIGINT after Ctrl-C, SIGTERM as a request to end.
#
# Seven steps turn a plain training script into one for DDP. `train` takes them in this order:
#
# 1. Join the other ranks:                            init_distributed()
# 2. One rank of each machine downloads the data:     load_on_every_rank(args)
# 3. Wrap the model:                                  DistributedDataParallel(model)
# 4. Deal the images out to the ranks:                ResumableSampler(train_set)
# 5. Deal them out anew in each epoch:                sampler.set_epoch(epoch)
# 6. Train and evaluate, add up what all ranks find:  train_epoch(...), evaluate(...)
# 7. Rank 0 saves, and the others wait for it:        save(run)

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

LABEL_SMOOTHING = 0.1
# During this fraction of the training the learning rate rises; then it falls.
WARM_UP = 0.2
# Every SYNC_EVERY steps the ranks add up their losses, and learn whether one has been asked to
# stop. torchrun kills a rank 30 s after it has asked: these steps and a save must take less.
SYNC_EVERY = 10
# Then a line about steps is printed, too, but not more often than this.
LOG_SECONDS = 5


@dataclass
class Progress:
    """How far the training is. A checkpoint stores all of it."""

    epoch: int = 0  # How many epochs have been trained.
    # How many images of the current epoch all ranks together have trained on. In contrast to a
    # number of batches, it is valid for any world size.
    images_done: int = 0
    step: int = 0  # How many optimizer steps have been taken since the start.
    seconds: float = 0.0  # How long the current epoch has been trained.
    # The sum of the losses of single images in this epoch, and the number of these images; of all
    # ranks, as of the last `add_up_losses`.
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # A record per epoch.


@dataclass
class Run:
    """One training: what it was started with, and what changes."""

    args: Namespace
    device: torch.device
    data_name: str  # With the sizes. A checkpoint is only resumed with the same data.
    train_size: int
    model: nn.Module  # The model itself, not wrapped in DDP.
    optimizer: Optimizer
    progress: Progress = field(default_factory=Progress)
    buckets_are_settled: bool = False  # See `settle_buckets`.
    last_line: float = field(default_factory=time.monotonic)  # See `report_step`.


@record  # Only for torchrun, which then shows the traceback of the rank that has failed first.
def train(args: Namespace) -> int | None:
    """Train as one rank, called by utils.run_rank; return the number of a stop signal, or None."""
    # Step 1: join the other ranks. The launcher has started them; all run these same lines.
    device = utils.init_distributed()
    args = share_flags(args)
    # call_on(is_chosen, function, argument): ranks for which is_chosen is true call the function,
    # the others wait for them, and all exit if it fails. Here rank 0 makes sure that no other run
    # uses the folder.
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

    # Step 3: wrap the model. This sends rank 0's weights to all ranks. `ddp` shares the weights of
    # `model`, which the optimizer has. If a loss was computed with `ddp`, loss.backward() also
    # averages the gradients over the ranks. (gradient_as_bucket_view only saves memory.)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # Step 4: deal the images out. Each rank loads its own share of them.
    sampler = ResumableSampler(train_set, seed=args.seed)
    loader = make_loader(train_set, args.batch_size, sampler)

    # A signal would end this process at once. From here on, `stop` only notes signals, until all
    # ranks can save together.
    stop = utils.catch_stop_signals()
    # An earlier process may have been stopped before it had evaluated its last epoch.
    evaluate_last_epoch(run, test_set)
    while run.progress.epoch < args.epochs:
        # Step 5: without set_epoch, each epoch would repeat the order of the first.
        sampler.set_epoch(run.progress.epoch, start=run.progress.images_done)
        if hasattr(train_set, "set_epoch"):
            # Random changes of the images, too, are drawn anew for each epoch.
            train_set.set_epoch(run.progress.epoch)
        # Step 6: train to the end of the epoch, or until a rank is asked to stop.
        train_epoch(run, ddp, loader, stop)
        # Step 7: rank 0 saves, before the evaluation, which may fail or take long.
        path = save(run)
        # True if `train_epoch` has ended early, or if a signal has come since then.
        if any_rank(stop.is_requested()):
            print0(f"stopped; {path} has all progress: rerun to resume")
            # utils.run_rank ends the process by this signal. If only another rank got one, this
            # rank ends by SIGTERM.
            return stop.number or signal.SIGTERM
        evaluate_last_epoch(run, test_set)
    accuracy = run.progress.history[-1]["test_accuracy"]
    print0(f"finished   {run.progress.epoch} epochs, test accuracy {accuracy:.2%}")
    # A signal may have come in the last evaluation.
    return stop.number


# ---------------------------------------------------------------- what you may want to replace


def build_model(train_set: SizedDataset) -> nn.Module:
    """Return a new model. One of your own may need `train_set`, to count its classes."""
    return ConvNet()


def build_optimizer(model: nn.Module, peak: float) -> Optimizer:
    """Return the optimizer; each group of parameters may have a peak learning rate of its own."""
    return AdamW(model.parameters(), lr=peak, betas=(0.8, 0.95), fused=True)


def compute_loss(
    model: nn.Module, batch: Any, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of a batch, float32 [], and which predictions are right, bool [B].

    `model` is `ddp` in training, and the model itself in evaluation. Nothing else knows what a
    batch, an output or the loss is.
    """
    images, labels = batch
    images = images.to(device, non_blocking=True)
    labels = labels.to(device, non_blocking=True)
    logits = model(images)
    # The test loss is not smoothed, so it is smaller than the train loss.
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
    """Train to the end of the epoch, or until a rank has been asked to stop.

    All ranks return after the same step: one that trained on alone would wait in vain.
    """
    args = run.args
    progress = run.progress
    # `evaluate` leaves the model in eval mode.
    ddp.train()
    # The sum of the losses of this rank's images since the last `add_up_losses`, and the number of
    # these images. (A float64 has so many digits that it does not matter when they are added up.)
    own_sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    # After a resume, the seconds of an earlier process count, too.
    started = time.monotonic() - progress.seconds
    for number, batch in enumerate(loader):
        # DDP does not need this. Only for a resume that is exact to the last bit.
        settle_buckets(run, ddp, batch)
        # The last step of an epoch has fewer images. The sampler gives equally many to each rank.
        global_batch = min(args.batch_size * args.world_size, images_left(run))
        set_learning_rate(run, global_batch)
        own_sums += train_step(run, ddp, batch)
        progress.images_done += global_batch
        progress.step += 1
        progress.seconds = time.monotonic() - started

        is_saving = args.save_every is not None and progress.step % args.save_every == 0
        # The conditions are the same on all ranks, as they have to be before a collective.
        if is_saving or number % SYNC_EVERY == 0:
            add_up_losses(progress, own_sums)
            report_step(run)
            if any_rank(stop.is_requested()):
                return
        if is_saving:
            save(run)
    add_up_losses(progress, own_sums)
    end_epoch(run)


def train_step(run: Run, ddp: DistributedDataParallel, batch: Any) -> Tensor:
    """Take one step; return the sum of the losses of this rank's images, and their number, [2]."""
    loss_and_count = compute_gradients(run, ddp, batch)
    # The gradients are the same on all ranks now, and so will be the step.
    # (To clip the gradients, do it here.)

    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss_and_count


def compute_gradients(run: Run, ddp: DistributedDataParallel, batch: Any) -> Tensor:
    """Compute gradients without a step; return what `train_step` returns."""
    loss, is_right = compute_loss(ddp, batch, run.device)
    # While this runs, DDP gets the gradient of each weight as soon as it is computed, and averages
    # it over the ranks. As their batches are equally large, in the last step too, that is the
    # mean over all images.
    loss.backward()
    # The loss is a mean; times the count, it is the sum. Both stay on the device: loss.item() would
    # make the CPU wait for the GPU in each step.
    count = torch.full_like(loss, len(is_right))
    return torch.stack([loss.detach() * count, count])


def add_up_losses(progress: Progress, own_sums: Tensor) -> None:
    """Wait for all ranks; add their losses to the progress, and set own_sums to 0.

    DDP averages gradients, never the loss: without this, rank 0 would report its own. Exits if
    the sum is not finite, or if the ranks had batches of different sizes.
    """
    dist.all_reduce(own_sums)
    # From here on, the numbers are equal on all ranks, so either all of them exit, or none.
    loss_sum, count = own_sums.tolist()
    own_sums.zero_()
    if not math.isfinite(loss_sum):
        problem = f"the loss is {loss_sum} at step {progress.step}: lower --lr"
        utils.exit_together(problem)
    progress.loss_sum += loss_sum
    progress.loss_count += int(count)
    if progress.loss_count != progress.images_done:
        numbers = f"{progress.loss_count} instead of {progress.images_done} images"
        utils.exit_together(f"{numbers}: the ranks need equally large batches")


def report_step(run: Run) -> None:
    """Print steps, train loss, speed and the time left, but only every LOG_SECONDS."""
    now = time.monotonic()
    if now < run.last_line + LOG_SECONDS:
        return
    run.last_line = now
    args = run.args
    progress = run.progress
    global_batch = args.batch_size * args.world_size
    steps_per_epoch = math.ceil(run.train_size // args.world_size / args.batch_size)
    steps_left = math.ceil(images_left(run) / global_batch)
    steps_left += (args.epochs - progress.epoch - 1) * steps_per_epoch
    loss = progress.loss_sum / progress.loss_count
    images_per_second = progress.images_done / progress.seconds
    time_left = timedelta(seconds=round(steps_left * global_batch / images_per_second))
    speed = f"{images_per_second:,.0f} images/s  {time_left} left"
    steps = f"step {progress.step}/{progress.step + steps_left}"
    print0(f"{steps}  train loss {loss:.4f}  {speed}")


@torch.no_grad()
def evaluate(run: Run, test_set: SizedDataset) -> dict[str, float]:
    """Wait for all ranks; return test_loss and test_accuracy of the whole test set."""
    # Not `ddp`: if a model has buffers, such as the statistics of a batch norm, the forward pass of
    # `ddp` broadcasts them, and a rank with one batch more than the others would wait in vain.
    model = run.model
    model.eval()
    # Each rank has taken such statistics from its own images. All evaluate with rank 0's, which
    # the checkpoint has. (ConvNet has none.)
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # Each image is used once. A DistributedSampler would repeat images until the ranks' shares
    # are equally large, and the accuracy would depend on the world size.
    own_items = range(dist.get_rank(), len(test_set), dist.get_world_size())
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for batch in make_loader(test_set, run.args.batch_size, own_items):
        loss, is_right = compute_loss(model, batch, run.device)
        sums[0] += loss * len(is_right)
        sums[1] += is_right.sum()
    dist.all_reduce(sums)
    loss, accuracy = (sums / len(test_set)).tolist()
    return {"test_loss": loss, "test_accuracy": accuracy}


def evaluate_last_epoch(run: Run, test_set: SizedDataset) -> None:
    """Evaluate after an epoch, save again, under the same name, with the results; print them.

    Does nothing if there is no epoch yet, or if it has been evaluated already.
    """
    history = run.progress.history
    if not history or "test_accuracy" in history[-1]:
        return
    record = history[-1]
    record.update(evaluate(run, test_set))
    path = save(run)
    print0(
        f"epoch {record['epoch']}/{run.args.epochs}  "
        f"train loss {record['train_loss']:.4f}  test loss {record['test_loss']:.4f}  "
        f"accuracy {record['test_accuracy']:.2%}  "
        f"{record['images_per_second']:,.0f} images/s  {record['seconds']:.1f} s  {path}"
    )


def images_left(run: Run) -> int:
    """Return how many images of the current epoch are still to be trained on.

    The last ones of an epoch, fewer than there are ranks, go unused.
    """
    left = run.train_size - run.progress.images_done
    return left - left % run.args.world_size


def end_epoch(run: Run) -> None:
    """Keep a record of the epoch that has been trained, and begin the next one."""
    progress = run.progress
    record = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.loss_count,
        "seconds": progress.seconds,
        "images_per_second": progress.images_done / progress.seconds,
    }
    history = [*progress.history, record]
    # What belongs to a single epoch begins at 0 again.
    run.progress = Progress(progress.epoch + 1, step=progress.step, history=history)


def set_learning_rate(run: Run, global_batch: int) -> None:
    """Set the learning rates of the next step: each group's own peak, times one factor.

    The factor follows from the number of images seen, so there is no scheduler to save and
    restore. It rises to 1, and then falls to 0.
    """
    progress = run.progress
    images_seen = progress.epoch * run.train_size + progress.images_done
    # The middle of the step counts, so that neither the first nor the last one has a rate of 0.
    middle_of_step = images_seen + global_batch / 2
    fraction_done = middle_of_step / (run.args.epochs * run.train_size)
    rising = fraction_done / WARM_UP
    falling = (1 - fraction_done) / (1 - WARM_UP)
    factor = min(rising, falling)
    for group in run.optimizer.param_groups:
        # The first call keeps the rate with which the group was built; later ones find it.
        peak = group.setdefault("initial_lr", group["lr"])
        group["lr"] = peak * factor


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

    The first rank of each machine downloads. All at once would damage the files.
    """
    is_first = utils.local_rank() == 0
    folder = args.data_dir
    # The last argument says whether to download. The second line begins when the first is done.
    loaded_first = call_on(is_first, load_data, folder, args.seed, True)
    loaded_later = call_on(not is_first, load_data, folder, args.seed, False)
    # On each rank, one of them is None.
    name, train_set, test_set = loaded_first or loaded_later
    name = f"{name}, {len(train_set)} + {len(test_set)} items"
    names = sorted(set(gather(name)))
    if len(names) > 1:
        problem = f"the ranks have different data: {'; '.join(names)}"
        utils.exit_together(f"{problem}: put the same into each --data_dir")
    return name, train_set, test_set


def default_learning_rate(args: Namespace, train_size: int) -> float:
    """Return the peak learning rate that suits the global batch.

    It grows with the square root of the batch, as the gradient of a larger one has less noise,
    up to 256 images. Beyond, larger rates gained nothing, or failed (see tests/README.md).
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
    """Once in a process, compute gradients and throw them away.

    DDP packs gradients into large tensors, its buckets, and packs them differently after the
    first backward pass of a process. The packing decides in which order the ranks' numbers are
    added up, and (a + b) + c may differ from a + (b + c) in the last bit. So the first step of a
    resumed process could differ from the same step of one that was never stopped.
    """
    if run.buckets_are_settled:
        return
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

    Nobody leaves before it is written: when one rank has ended by a signal, the launcher ends
    the others, even rank 0 in mid-save.
    """
    progress = run.progress
    # A later checkpoint comes later in the alphabet.
    name = f"epoch{progress.epoch:05d}-image{progress.images_done:09d}.pt"
    path = run.args.checkpoint_dir / name
    # Bad weights must not replace good checkpoints. The loss cannot tell, as it was computed before
    # the last step. The weights are equal on all ranks, so either all of them exit, or none.
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

    It saves the state of each without its name. In another order, a weight would get that of
    another one.
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
    """Wait for all ranks; load the newest undamaged checkpoint of all machines; return its path.

    Exits if it is of another kind of training.
    """
    # One rank of each machine reads its folder, as each machine may have its own disk.
    folder = run.args.checkpoint_dir
    found = call_on(utils.local_rank() == 0, utils.newest_checkpoint, folder)
    name, saved = found or ("", {})
    # Rank 0's is not always the newest. After a failure, torchrun can start the ranks again, and
    # then number 0 may be on another machine, with an empty disk.
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
        # Only the state is loaded. The other entry, "param_groups", stays as it is in the code, so
        # a weight decay that you have changed counts.
        state = {"state": saved["optimizer"]["state"]}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | state)
        run.progress = Progress(**saved["progress"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        fix = "choose another --checkpoint_dir"
        raise SystemExit(f"{path} does not fit ({reason}): {fix}")


def compare_with_saved(run: Run, saved: dict[str, Any]) -> None:
    """Raise ValueError if another training has been saved; report changed flags."""
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
    """Read the flags. Wrong ones end the process, before it waits for others or writes a file."""
    # The default: what the launcher has started, or one rank for each GPU.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world_size = int(os.environ.get("WORLD_SIZE", max(gpus, 1)))
    # Without a usage text, a wrong flag gets one line.
    parser = ArgumentParser(
        usage=SUPPRESS, description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3, help="in all (3)")
    parser.add_argument("--batch_size", type=int, default=64, help="per rank (64)")
    parser.add_argument("--world_size", type=int, default=world_size, help="ranks")
    parser.add_argument("--lr", type=float, help="peak rate (follows the batch size)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (0)")
    parser.add_argument("--save_every", type=int, help="save every N steps, too")
    parser.add_argument("--keep", type=int, default=3, help="newest checkpoints (3)")
    parser.add_argument("--data_dir", type=Path, default="data", help="(data)")
    parser.add_argument("--checkpoint_dir", type=Path, default="checkpoints")
    args = parser.parse_args()
    for name in "epochs", "batch_size", "world_size", "lr", "save_every", "keep":
        value = getattr(args, name)
        if value is not None and not 0 < value < 100_000:
            parser.error(f"--{name} must be above 0 and below 100000, not {value}")
    if utils.has_launcher() and args.world_size != world_size:
        parser.error(f"--world_size {args.world_size}, but WORLD_SIZE is {world_size}")
    return args


def main() -> None:
    """Train in this process, if it is a rank already, or the only one; else start the ranks."""
    args = parse_args()
    if utils.has_launcher() or args.world_size == 1:
        utils.run_rank(train, args)
    else:
        utils.launch(train, args)


if __name__ == "__main__":
    main()
