"""Train a small CNN on MNIST with DistributedDataParallel; rerun the command to resume.

examples:
  torchrun --nproc_per_node=2 train_ddp.py --epochs 3 --batch_size 64
  python train_ddp.py --world_size 2
"""

# Several processes train together. Each has a copy of the model and a share of each batch.
#
# rank: the number of a process, from 0. world size: the number of processes.
# local rank: the number of a process on its machine; it chooses the GPU.
# process group: the processes that have met, and can now talk to one another.
# collective: an operation that all ranks must call, in the same order.
# all-reduce: the collective in which the ranks add up a tensor, and each gets the sum. DDP
#     does that with the gradients, in buckets: several gradients in one message.
# backend: the library that carries the messages: gloo between CPUs, nccl between NVIDIA GPUs.

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

import utils
from data import ResumableSampler, load_data, make_loader, size_of
from model import ConvNet
from utils import FolderLock, RankInfo, UserError, gather, print0, raise_on_all_ranks

LABEL_SMOOTHING = 0.1
# The part of the training in which the learning rate rises.
WARM_UP = 0.2
# After so many steps the ranks add up their losses, and ask who has to stop.
SYNC_EVERY = 10
# After so many steps the loss is printed: a multiple of SYNC_EVERY.
LOG_EVERY = 200


@dataclass
class Progress:
    """How far the training is. A checkpoint holds it as it is.

    epoch: the number of finished epochs.
    images: how many of the current epoch are done, by all ranks together. In contrast to a
        number of batches, it is valid for any world size.
    step: the number of optimizer steps since the start.
    loss_sum: the sum of the losses of these images.
    history: a record for each finished epoch.
    """

    epoch: int = 0
    images: int = 0
    step: int = 0
    loss_sum: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """One training: what it was started with, and what changes.

    lock: of the checkpoint folder; rank 0 holds it.
    model: the bare model, not wrapped in DDP.
    """

    args: argparse.Namespace
    data_name: str
    lock: FolderLock
    model: nn.Module
    optimizer: Optimizer
    progress: Progress


def train(args: argparse.Namespace, info: RankInfo, lock: FolderLock) -> int:
    """Train as one rank, from joining the others to leaving them; return the exit code.

    Raises UserError on all ranks.
    """
    # 1. Join the other ranks. From here on, all of them do the same, at the same time.
    device = utils.join_process_group(info)
    claim_on_rank0(lock)
    data_name, train_set, test_set = load_on_every_rank(args.data_dir)
    check_that_ranks_agree(args, data_name)
    check_sizes(train_set, test_set)
    args.lr = args.lr or default_learning_rate(args, train_set)

    # 2. Create the model. The seed is for you, who will want to repeat a run. DDP needs none:
    # it copies rank 0's weights to all ranks.
    torch.manual_seed(args.seed)
    model = ConvNet().to(device).to(memory_format=torch.channels_last)
    optimizer = AdamW(model.parameters(), betas=(0.8, 0.95), fused=True)

    # 3. Resume from the newest checkpoint, if there is one.
    run = Run(args, data_name, lock, model, optimizer, Progress())
    path = resume(run)
    report_start(run, device, path)

    # 4. and 5. Wrap the model in DDP, and train.
    if run.progress.epoch < args.epochs:
        exit_code = train_in_ddp(run, train_set, test_set)
    else:
        report_finished(run)
        exit_code = 0

    # 6. Leave the other ranks.
    dist.destroy_process_group()
    return exit_code


def train_in_ddp(run: Run, train_set: Dataset, test_set: Dataset) -> int:
    """Train all epochs that are left, or until a stop signal; return the exit code."""
    args = run.args
    progress = run.progress
    # 4. Wrap the model. From here on, each backward pass also averages the gradients over the
    # ranks, so that all take the same step and their weights stay equal.
    ddp = DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    settle_buckets(ddp, test_set)
    sampler = ResumableSampler(train_set, seed=args.seed)
    loader = make_loader(train_set, args.batch_size, sampler)

    # 5. Train epoch by epoch.
    with utils.catch_stop_signals() as received_signals:
        while progress.epoch < args.epochs:
            # Without set_epoch, each epoch would repeat the order of the first.
            sampler.set_epoch(progress.epoch, start=progress.images)
            if hasattr(train_set, "set_epoch"):
                train_set.set_epoch(args.seed, progress.epoch)
            started = time.perf_counter()
            images_before = progress.images
            if not train_epoch(run, ddp, loader, received_signals):
                path = save(run)
                print0(f"stopped; {path} has all progress: rerun to resume")
                return utils.code_of_stop(received_signals)
            seconds = time.perf_counter() - started
            images = progress.images - images_before
            finish_epoch(run, evaluate(run, test_set), images, seconds)
    return 0


def train_epoch(
    run: Run, ddp: nn.Module, loader: DataLoader, received_signals: list[int]
) -> bool:
    """Train to the end of the epoch; return False if any rank has a stop signal before.

    All ranks return after the same step, as one that trained on would wait for the others for
    ever. Raises UserError on all ranks if the sum of their losses is not finite.
    """
    args = run.args
    progress = run.progress
    total = size_of(loader.dataset)
    ddp.train()  # settle_buckets and evaluate leave the model in eval mode.
    losses = []  # Of this rank's images, since the ranks last added theirs up.
    for images, labels in loader:
        # The ranks' batches are equally large.
        global_batch = args.world_size * len(labels)
        images_seen = progress.epoch * total + progress.images + global_batch / 2
        rate = learning_rate(images_seen / (args.epochs * total), args.lr)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        losses.append(train_step(ddp, run.optimizer, images, labels))
        progress.images += global_batch
        progress.step += 1

        is_saving = args.save_every is not None and progress.step % args.save_every == 0
        is_last = total - progress.images < args.world_size
        if is_saving or is_last or progress.step % SYNC_EVERY == 0:
            must_stop = add_up_losses(progress, losses, len(received_signals))
            losses.clear()
            if must_stop:
                return False
        if is_saving:
            save(run)
        if progress.step % LOG_EVERY == 0:
            mean_loss = progress.loss_sum / progress.images
            print0(f"step {progress.step}  train loss {mean_loss:.4f}")
    return True


def train_step(
    ddp: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    """Take one step; return the summed loss of this rank's images, float32 [], on the device."""
    device = next(ddp.parameters()).device
    images = images.to(device, non_blocking=True)
    labels = labels.to(device, non_blocking=True)
    loss = F.cross_entropy(ddp(images), labels, label_smoothing=LABEL_SMOOTHING)
    # Here DDP averages the gradients over the ranks. As their batches are equally large, in
    # the last step too, that is the mean over all images of the step.
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    # .item() here would make the CPU wait for the GPU in each step.
    return loss.detach() * len(labels)


def add_up_losses(progress: Progress, losses: list[Tensor], signal_count: int) -> bool:
    """Add the losses of all ranks to the progress; return whether any rank has to stop.

    DDP averages gradients, never the loss: without this, rank 0 would report its own. The same
    message asks for stop signals, so that all ranks learn of one after the same step.
    """
    # In float64 such float32 losses add up without rounding. So how they are grouped, and an
    # interruption, which groups them differently, leaves no trace in the sum.
    own_loss = torch.stack(losses).sum(dtype=torch.float64)
    sums = torch.stack([own_loss, own_loss.new_tensor(signal_count)])
    dist.all_reduce(sums)
    loss_sum, signals_of_all_ranks = sums.tolist()
    if not math.isfinite(loss_sum):
        raise UserError(f"the loss is {loss_sum} by step {progress.step}: lower --lr")
    progress.loss_sum += loss_sum
    return signals_of_all_ranks > 0


def learning_rate(done: float, peak: float) -> float:
    """Return the learning rate after a part of the training, from 0 to 1: up, then down to 0.

    It follows from the images seen, so there is no scheduler to save and restore.
    """
    rising = done / WARM_UP
    falling = (1 - done) / (1 - WARM_UP)
    return peak * min(rising, falling)


@torch.inference_mode()
def evaluate(run: Run, test_set: Dataset) -> dict[str, float]:
    """Return test_loss (cross-entropy, not smoothed) and test_accuracy over the test set."""
    model = run.model
    model.eval()
    device = next(model.parameters()).device
    total = size_of(test_set)
    # Each image once. A DistributedSampler would repeat images until the ranks' shares are
    # equally large, and the accuracy would depend on the world size.
    share = Subset(test_set, range(dist.get_rank(), total, dist.get_world_size()))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for images, labels in make_loader(share, run.args.batch_size):
        logits = model(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    dist.all_reduce(sums)
    loss, accuracy = (sums / total).tolist()
    return {"test_loss": loss, "test_accuracy": accuracy}


# ================================================================ skip at first

# ---------------------------------------------------------------- before the first step


def claim_on_rank0(lock: FolderLock) -> None:
    """Have rank 0 lock the checkpoint folder; wait for all ranks."""
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            lock.claim()


def load_on_every_rank(data_dir: Path) -> tuple[str, Dataset, Dataset]:
    """Return what load_data returns; wait for all ranks.

    The first rank of each machine downloads. All at once would damage the files.
    """
    is_first = utils.is_first_on_machine()
    with raise_on_all_ranks():
        if is_first:
            loaded = load_data(data_dir, download=True)
    with raise_on_all_ranks():
        if not is_first:
            loaded = load_data(data_dir, download=False)
    return loaded


def check_that_ranks_agree(args: argparse.Namespace, data_name: str) -> None:
    """Raise UserError on all ranks if they were started differently; wait for all ranks.

    Each machine has a command line and a disk of its own.
    """
    own = {f"data {data_name}"}
    for name, value in vars(args).items():
        if not name.endswith("_dir"):
            own.add(f"{name} {value}")
    everybody = gather(own)
    differences = set.union(*everybody) - set.intersection(*everybody)
    if differences:
        raise UserError(
            f"start all ranks alike, not with {', '.join(sorted(differences))}"
        )


def check_sizes(train_set: Dataset, test_set: Dataset) -> None:
    """Raise UserError, on all ranks, if there are too few images."""
    total = size_of(train_set)
    world_size = dist.get_world_size()
    if total < world_size:
        raise UserError(f"{world_size} ranks, but {total} training images: start fewer")
    if size_of(test_set) == 0:
        raise UserError("the test set is empty")


def default_learning_rate(args: argparse.Namespace, train_set: Dataset) -> float:
    """Return the peak learning rate that suits the global batch.

    It grows with the square root of the batch, whose gradient has less noise. It stops at 256
    images: a larger rate gained nothing on a split of the training set (see tests/README.md),
    and with thousands of images in a step, so few steps, such a training ended at chance.
    """
    global_batch = min(args.batch_size * args.world_size, size_of(train_set))
    return 0.01 * math.sqrt(min(global_batch, 256) / 128)


def settle_buckets(ddp: nn.Module, test_set: Dataset) -> None:
    """Show DDP the order of gradients: its next forward pass sorts its buckets by it.

    The sums over three ranks or more change with that order. Without this, the first step
    after a resume would round differently from that of a run without interruption.
    """
    images, _ = default_collate([test_set[0]])
    device = next(ddp.parameters()).device
    # In train mode, a batch norm would take this image into its statistics.
    ddp.eval()
    ddp(images.to(device)).sum().backward()
    ddp.zero_grad()


# ---------------------------------------------------------------- checkpoints


def save(run: Run) -> Path:
    """Have rank 0 write a checkpoint; wait for all ranks; return its path.

    Nobody leaves before it is written: when one rank has left, the launcher ends the others,
    even rank 0 in mid-save. Raises UserError on all ranks.
    """
    args = run.args
    progress = run.progress
    name = f"epoch{progress.epoch:05d}-image{progress.images:09d}.pt"
    path = Path(args.checkpoint_dir, name)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            weights = run.model.parameters()
            if not all(weight.isfinite().all() for weight in weights):
                raise UserError("the weights are not finite: rerun with a lower --lr")
            # The folder may have been deleted, and even be another run's by now.
            run.lock.claim()
            utils.save_checkpoint(path, checkpoint_of(run), args.keep)
    return path


def checkpoint_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint holds; its tensors stay on their device."""
    return {
        "version": utils.VERSION,
        "args": hyperparameters(run.args),
        "data": run.data_name,
        # Of the bare model: every name in the state dict of `ddp` begins with "module.", and
        # only a model that is wrapped in DDP could load it.
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "optimizer_class": type(run.optimizer).__name__,
        "progress": dataclasses.asdict(run.progress),
    }


def hyperparameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that decide what is learned."""
    return {
        "seed": args.seed,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "world_size": args.world_size,
        "lr": args.lr,
    }


def resume(run: Run) -> Path | None:
    """Load the newest undamaged checkpoint of all machines, if any; return its path.

    Waits for all ranks. Raises UserError on all ranks if it is of another kind of training.
    """
    folder = Path(run.args.checkpoint_dir)
    name = ""
    content = b""
    is_first = utils.is_first_on_machine()
    with raise_on_all_ranks():
        if is_first:
            name, content = utils.newest_checkpoint(folder)
    # Not simply that of rank 0: when machines join or leave, rank 0 may move to an empty disk.
    names = gather(name)
    newest = max(names)
    if not newest:
        return None
    contents = [content]
    dist.broadcast_object_list(contents, src=names.index(newest))
    path = folder / newest
    saved = utils.decode_checkpoint(path, contents[0])
    compare_with_saved(run, saved, path)
    try:
        run.model.load_state_dict(saved["model"])
        load_optimizer_state(run.optimizer, saved["optimizer"])
    except (RuntimeError, ValueError) as error:
        problem = f"{path} does not fit: {' '.join(str(error).split())}"
        raise UserError(f"{problem}: choose another --checkpoint_dir")
    run.progress = Progress(**saved["progress"])
    return path


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer, but keep the hyper-parameters that the code has now.

    Otherwise a change of betas or weight decay in the code would have no effect on a resumed
    training: load_state_dict overwrites them.
    """
    groups_of_the_code = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, group_of_the_code in zip(optimizer.param_groups, groups_of_the_code):
        group.update(group_of_the_code)


def compare_with_saved(run: Run, saved: dict[str, Any], path: Path) -> None:
    """Raise UserError if another training has been saved; report changed flags."""
    now = hyperparameters(run.args)
    before = saved["args"]
    facts = {
        "data": (saved["data"], run.data_name),
        "optimizer": (saved["optimizer_class"], type(run.optimizer).__name__),
        "seed": (before["seed"], now["seed"]),
    }
    for name, (fact_before, fact_now) in facts.items():
        if fact_before != fact_now:
            difference = f"{path} has {name} {fact_before}, this run has {fact_now}"
            raise UserError(f"{difference}: choose another --checkpoint_dir")
    for name, value in now.items():
        if before[name] != value:
            print0(f"changed    {name} from {before[name]} to {value}")


# ---------------------------------------------------------------- what is recorded and printed


def finish_epoch(
    run: Run, results: dict[str, float], images: int, seconds: float
) -> None:
    """Record the epoch, save it and report it.

    This process has trained so many images in so many seconds. It may have resumed the epoch.
    """
    progress = run.progress
    train_loss = progress.loss_sum / progress.images
    progress.epoch += 1
    progress.images = 0
    progress.loss_sum = 0.0
    record = {
        **hyperparameters(run.args),
        "data": run.data_name,
        "epoch": progress.epoch,
        "step": progress.step,
        "train_loss": train_loss,
        **results,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }
    progress.history.append(record)
    path = save(run)
    print0(
        f"epoch {progress.epoch}/{run.args.epochs}  train loss {train_loss:.4f}  "
        f"test loss {results['test_loss']:.4f}  accuracy {results['test_accuracy']:.2%}  "
        f"{images / seconds:,.0f} images/s  {seconds:.1f} s  {path}"
    )


def report_start(run: Run, device: torch.device, path: Path | None) -> None:
    """Print what is about to be trained, and from where; wait for all ranks."""
    args = run.args
    cores = sum(len(cores) for cores in usable_cores().values())
    threads = torch.get_num_threads()
    print0(
        f"processes  {args.world_size} on {device.type}, {threads} thread(s) each, "
        f"{cores} CPU core(s) for them"
    )
    print0(f"data       {run.data_name}")
    print0(
        f"training   {args.batch_size} images per rank and step, peak lr {args.lr:.3g}"
    )
    print0(f"start      {path or f'from scratch, nothing in {args.checkpoint_dir}'}")


def usable_cores() -> dict[str, set[int]]:
    """Return the cores that the ranks may use, by machine; wait for all ranks.

    OMP_PROC_BIND, taskset and the like can leave one core to all of them.
    """
    if sys.platform == "linux":
        own_cores = os.sched_getaffinity(0)
    else:
        own_cores = set(range(os.cpu_count() or 1))
    cores: dict[str, set[int]] = {}
    for machine, usable in gather((utils.machine_name(), own_cores)):
        cores.setdefault(machine, set()).update(usable)
    return cores


def report_finished(run: Run) -> None:
    """Print the result of a training that has nothing left to do, and with what it was trained."""
    last = run.progress.history[-1]
    flags = ", ".join(f"{name} {last[name]}" for name in hyperparameters(run.args))
    print0(
        f"finished   nothing left to train; trained before with {flags}: "
        f"test accuracy {last['test_accuracy']:.2%}"
    )


# ---------------------------------------------------------------- the command line


def folder(text: str) -> Path:
    """Return a path from the command line; ~ is the home folder. Raises ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError(
            "is empty; is a variable of the shell not set?"
        )
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is an address; a folder is needed")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}")


def raise_usage_error(message: str) -> NoReturn:
    """Stand in for the parser's own, which prints the usage, and does so from every rank."""
    raise UserError(f"{message} (--help lists the flags)")


def parse_args(info: RankInfo | None) -> argparse.Namespace:
    """Read the flags. Wrong ones raise UserError, before a worker or a file is touched."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = raise_usage_error  # type: ignore[method-assign]
    flag = parser.add_argument
    flag("--epochs", type=int, default=3, help="passes over the data (3)")
    flag("--batch_size", type=int, default=64, help="images per rank and step (64)")
    flag("--world_size", type=int, help="processes to start (one per GPU, or 1)")
    flag("--lr", type=float, help="peak learning rate (follows the global batch)")
    flag("--seed", type=int, default=0, help="for weights, order and shifts (0)")
    flag("--data_dir", type=folder, default="data", help="folder of data sets (data)")
    flag("--checkpoint_dir", type=folder, default="checkpoints", help="(checkpoints)")
    flag("--save_every", type=int, help="also save every N steps (only after epochs)")
    flag("--keep", type=int, default=3, help="newest checkpoints to keep (3)")
    # torch.distributed.launch and deepspeed pass it; the environment has it as well.
    flag("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    del args.local_rank
    check_numbers(args)
    args.world_size = utils.choose_world_size(args.world_size, info)
    return args


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError for numbers with which nothing could be trained."""
    for name in "epochs", "batch_size", "world_size", "lr", "save_every", "keep":
        value = getattr(args, name)
        if value is not None and not 0 < value < 100_000:
            raise_usage_error(f"--{name} must be above 0 and below 100000, not {value}")
    # Beyond, seed + epoch would be too large for a generator.
    if not 0 <= args.seed < 2**62:
        raise_usage_error(f"--seed must be from 0 to 2**62 - 1, not {args.seed}")


def run_rank(info: RankInfo, args: argparse.Namespace) -> int:
    """Train as one rank; return the exit code."""
    if utils.is_started_by_torchrun():
        utils.end_with_launcher()
    if info.world_size > 1:
        utils.let_interrupts_end_set_up()
    lock = FolderLock(args.checkpoint_dir)
    try:
        return train(args, info, lock)
    except UserError as error:
        # Before the group is destroyed: torchrun may end this rank meanwhile.
        if str(error) and (not dist.is_initialized() or info.rank == 0):
            utils.print_line(f"error: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 (printed whole if it is not recognised)
        utils.abort(error, info)
    finally:
        lock.release()
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> NoReturn:
    """Read the command line, train in this process or in new ones, and exit."""
    try:
        if os.name != "posix":
            raise UserError("this program needs Linux or macOS (on Windows, use WSL)")
        info = utils.read_rank_info()
        args = parse_args(info)
    except UserError as error:
        if utils.speaks_for_machine():
            utils.print_line(f"error: {error}", sys.stderr)
        sys.exit(2)
    if info is not None:
        sys.exit(run_rank(info, args))
    utils.exit_like(utils.launch(run_rank, args, args.world_size))


if __name__ == "__main__":
    main()
