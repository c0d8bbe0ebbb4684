"""Train a small CNN on MNIST with DistributedDataParallel; rerun the command to resume.

examples:
  torchrun --nproc_per_node=2 train_ddp.py --epochs 3 --batch_size 64
  python train_ddp.py --world_size 2
"""

# Several processes train together. Each has a copy of the model and a share of each batch.
#
# rank: the number of a process, from 0; also the process itself ("all ranks wait").
# world size: the number of processes.
# local rank: the number of a process on its machine; it chooses the GPU.
# launcher: the program that starts the processes: torchrun, or this script itself.
# process group: the processes that have met, and can now send one another messages.
# backend: the library that carries the messages: gloo between CPUs, nccl between NVIDIA GPUs.
# collective: an operation that all ranks must call, in the same order.
# all-reduce: the collective that adds up a tensor of all ranks, and gives each the sum. DDP
#     does that with the gradients, and divides by the world size: each gets the mean.
# bucket: several gradients that DDP sends in one message.
# global batch: the images of all ranks in one step: batch_size * world_size of them.

import argparse
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Subset

import utils
from data import ResumableSampler, SizedDataset, load_data, make_loader
from model import ConvNet
from utils import (
    FolderLock,
    RankInfo,
    ReportedElsewhere,
    UserError,
    gather,
    print0,
    raise_on_all_ranks,
)

LABEL_SMOOTHING = 0.1
# During this fraction of the training the learning rate rises; then it falls.
WARM_UP = 0.2
# Every so many steps the ranks add up their losses, and find out whether one of them was asked
# to stop. torchrun kills them 30 s after it has asked: these steps and a save must fit into that.
SYNC_EVERY = 10
# Every so many steps the loss is printed.
LOG_EVERY = 200


@dataclass
class Progress:
    """How far the training is. A checkpoint stores all of it.

    epoch: the number of finished epochs.
    images_done: the number of images of the current epoch that all ranks together have trained
        on. In contrast to a number of batches, it is valid for any world size.
    step: the number of optimizer steps since the start.
    loss_sum: the sum of the losses of these images.
    history: a record for each finished epoch.
    """

    epoch: int = 0
    images_done: int = 0
    step: int = 0
    loss_sum: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """One training: what it was started with, and what changes.

    model: the model itself, not wrapped in DDP.
    lock: the lock of the checkpoint folder, which rank 0 holds.
    """

    args: argparse.Namespace
    device: torch.device
    data_name: str
    train_size: int
    model: nn.Module
    optimizer: Optimizer
    lock: FolderLock
    progress: Progress


def train(args: argparse.Namespace, info: RankInfo, lock: FolderLock) -> int:
    """Train as one rank. Return 0, or the exit code of a process that was asked to stop.

    If one rank finds a problem, all ranks raise it as UserError, so that none waits for ever.
    """
    # 1. Join the other ranks. From here on, all of them do the same, at the same time.
    device = utils.join_process_group(info)
    lock_on_rank0(lock)
    data_name, train_set, test_set = load_on_every_rank(args.data_dir)
    train_size = len(train_set)
    check_that_ranks_agree(args, data_name)
    check_sizes(train_size, len(test_set))
    if args.lr is None:
        args.lr = default_learning_rate(args, train_size)

    # 2. Create the model. The seed makes a run repeatable. DDP itself does not need it: it
    # copies rank 0's weights to all ranks.
    torch.manual_seed(args.seed)
    model = ConvNet().to(device)
    # This is the faster memory layout for convolutions.
    model = model.to(memory_format=torch.channels_last)
    # train_epoch sets the learning rate before each step.
    optimizer = AdamW(model.parameters(), betas=(0.8, 0.95), fused=True)

    # 3. Load the newest checkpoint, if there is one, into `run`.
    progress = Progress()
    run = Run(args, device, data_name, train_size, model, optimizer, lock, progress)
    resumed_from = resume(run)
    report_start(run, resumed_from)

    # Steps 4 and 5 are in train_epochs.
    if run.progress.epoch < args.epochs:
        exit_code = train_epochs(run, train_set, test_set)
    else:
        report_finished(run)
        exit_code = 0

    # 6. Leave the other ranks.
    dist.destroy_process_group()
    return exit_code


def train_epochs(run: Run, train_set: SizedDataset, test_set: SizedDataset) -> int:
    """Train all epochs that are left, or until a stop signal; return the exit code."""
    args = run.args
    progress = run.progress
    # 4. Wrap the model. From here on, each backward pass also averages the gradients over the
    # ranks, so that all take the same step and their weights stay equal.
    # (gradient_as_bucket_view saves the memory of a second copy of the gradients.)
    ddp = DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    # Only needed so that a resumed training equals an uninterrupted one to the last bit.
    settle_buckets(ddp, test_set)
    sampler = ResumableSampler(train_set, seed=args.seed)
    loader = make_loader(train_set, args.batch_size, sampler)

    # 5. Train epoch by epoch. A stop signal, such as Ctrl-C, does not end the process here: it
    # is only added to a list.
    with utils.catch_stop_signals() as received_signals:
        while progress.epoch < args.epochs:
            # Without set_epoch, each epoch would repeat the order of the first.
            sampler.set_epoch(progress.epoch, start=progress.images_done)
            if hasattr(train_set, "set_epoch"):
                # Random changes of the images, too, are drawn anew for each epoch.
                train_set.set_epoch(args.seed, progress.epoch)
            started = time.perf_counter()
            images_before = progress.images_done
            if not train_epoch(run, ddp, loader, received_signals):
                # Rank 0 writes the model (not `ddp`) to a file; the others wait for that.
                path = save(run)
                print0(f"stopped; {path} has all progress: rerun to resume")
                return utils.code_of_stop(received_signals)
            seconds = time.perf_counter() - started
            images_per_second = (progress.images_done - images_before) / seconds
            results = evaluate(run, test_set)
            record = record_of_epoch(run, results, seconds, images_per_second)
            # The next epoch begins.
            progress.history.append(record)
            progress.epoch += 1
            progress.images_done = 0
            progress.loss_sum = 0.0
            path = save(run)
            report_epoch(run, path)
    return 0


def train_epoch(
    run: Run,
    ddp: DistributedDataParallel,
    loader: DataLoader,
    received_signals: list[int],
) -> bool:
    """Train to the end of the epoch, or until a rank is asked to stop; then return False.

    All ranks return after the same step: a rank that trained on alone would wait for the
    others for ever. Raises UserError on all ranks if the sum of their losses is not finite.
    """
    args = run.args
    progress = run.progress
    # settle_buckets and evaluate leave the model in eval mode.
    ddp.train()
    # The losses of this rank that are not yet in progress.loss_sum.
    losses: list[Tensor] = []
    for images, labels in loader:
        # The ranks' batches are equally large.
        global_batch = args.world_size * len(labels)
        set_learning_rate(run, global_batch)
        losses.append(train_step(run, ddp, images, labels))
        progress.images_done += global_batch
        progress.step += 1

        is_saving = args.save_every is not None and progress.step % args.save_every == 0
        is_logging = progress.step % LOG_EVERY == 0
        # The sampler leaves out the last images, if they are too few for all ranks.
        is_last = run.train_size - progress.images_done < args.world_size
        # Before saving or printing, the losses of all ranks up to this step are needed.
        if is_saving or is_logging or is_last or progress.step % SYNC_EVERY == 0:
            must_stop = add_up_losses_and_signals(progress, losses, received_signals)
            losses.clear()
            if must_stop:
                return False
        if is_saving:
            save(run)
        if is_logging:
            mean_loss = progress.loss_sum / progress.images_done
            print0(f"step {progress.step}  train loss {mean_loss:.4f}")
    return True


def train_step(
    run: Run, ddp: DistributedDataParallel, images: Tensor, labels: Tensor
) -> Tensor:
    """Take one step; return the summed loss of this rank's images, float32 [], on the device."""
    images = images.to(run.device, non_blocking=True)
    labels = labels.to(run.device, non_blocking=True)
    loss = F.cross_entropy(ddp(images), labels, label_smoothing=LABEL_SMOOTHING)
    # Here DDP averages the gradients over the ranks. As their batches are equally large, in
    # the last step too, that is the mean over all images of the step.
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    # .item() here would make the CPU wait for the GPU in each step.
    return loss.detach() * len(labels)


def add_up_losses_and_signals(
    progress: Progress, losses: list[Tensor], received_signals: list[int]
) -> bool:
    """Add the losses of all ranks to the progress; return whether any rank has to stop.

    Waits for all ranks. DDP averages gradients, never the loss: without this, rank 0 would
    report its own. The same message carries the stop signals, as one message is cheaper than
    two, and so that all ranks learn of a signal after the same step.
    """
    # float64 has 29 bits more than float32, so that this sum of a few thousand numbers is not
    # rounded. Then it does not matter after which steps the losses are added up.
    own_loss = torch.stack(losses).sum(dtype=torch.float64)
    signal_count = own_loss.new_tensor(len(received_signals))
    sums = torch.stack([own_loss, signal_count])
    dist.all_reduce(sums)
    loss_sum, signals_of_all_ranks = sums.tolist()
    if not math.isfinite(loss_sum):
        raise UserError(f"the loss is {loss_sum} by step {progress.step}: lower --lr")
    progress.loss_sum += loss_sum
    return signals_of_all_ranks > 0


def set_learning_rate(run: Run, global_batch: int) -> None:
    """Set the learning rate of the next step.

    It is computed from the number of images, so there is no scheduler to save and restore.
    """
    progress = run.progress
    images_seen = progress.epoch * run.train_size + progress.images_done
    # The middle of the step counts, so that neither the first nor the last one has a rate of 0.
    middle_of_step = images_seen + global_batch / 2
    fraction_done = middle_of_step / (run.args.epochs * run.train_size)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(fraction_done, run.args.lr)


def learning_rate(fraction_done: float, peak: float) -> float:
    """Return the learning rate after a fraction of the training: up, then down to 0."""
    rising = fraction_done / WARM_UP
    falling = (1 - fraction_done) / (1 - WARM_UP)
    return peak * min(rising, falling)


@torch.inference_mode()
def evaluate(run: Run, test_set: SizedDataset) -> dict[str, float]:
    """Wait for all ranks; return test_loss (not smoothed) and test_accuracy of the test set."""
    # The model itself, not `ddp`, whose forward pass can send messages (the statistics of a
    # batch norm). A rank with one batch more than the others would wait for these for ever.
    model = run.model
    model.eval()
    # Each image is used once. A DistributedSampler would repeat images until the ranks' shares
    # are equally large, and the accuracy would depend on the world size.
    own_items = range(dist.get_rank(), len(test_set), dist.get_world_size())
    own_share = Subset(test_set, own_items)
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for images, labels in make_loader(own_share, run.args.batch_size):
        logits = model(images.to(run.device, non_blocking=True))
        labels = labels.to(run.device, non_blocking=True)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    dist.all_reduce(sums)
    loss, accuracy = (sums / len(test_set)).tolist()
    return {"test_loss": loss, "test_accuracy": accuracy}


# ================================================================ skip at first

# ---------------------------------------------------------------- before the first step


def lock_on_rank0(lock: FolderLock) -> None:
    """Have rank 0 lock the checkpoint folder, as two runs must not write to the same one.

    Waits for all ranks. Raises UserError on all ranks if another run has locked it.
    """
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            lock.claim()


def load_on_every_rank(data_dir: Path) -> tuple[str, SizedDataset, SizedDataset]:
    """Wait for all ranks; return what load_data returns.

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
    """Wait for all ranks; raise UserError on all if they were started differently.

    Each machine has a command line and a disk of its own.
    """
    own = {f"data {data_name}"}
    for name, value in vars(args).items():
        # The folders may differ from machine to machine.
        if not name.endswith("_dir"):
            own.add(f"{name} {value}")
    everybody = gather(own)
    differences = sorted(set.union(*everybody) - set.intersection(*everybody))
    if differences:
        raise UserError(f"start all ranks alike, not with {', '.join(differences)}")


def check_sizes(train_size: int, test_size: int) -> None:
    """Raise UserError, on all ranks, if there are too few images."""
    world_size = dist.get_world_size()
    if train_size < world_size:
        problem = f"{world_size} ranks, but {train_size} training images"
        raise UserError(f"{problem}: start fewer")
    if test_size == 0:
        raise UserError("the test set is empty")


def default_learning_rate(args: argparse.Namespace, train_size: int) -> float:
    """Return the peak learning rate that suits the global batch.

    It grows with the square root of the batch, whose gradient has less noise. It stops at 256
    images: a larger rate gained nothing on a split of the training set (see tests/README.md).
    With thousands of images per step there are so few steps that the training then failed.
    """
    global_batch = min(args.batch_size * args.world_size, train_size)
    return 0.01 * math.sqrt(min(global_batch, 256) / 128)


def settle_buckets(ddp: DistributedDataParallel, test_set: SizedDataset) -> None:
    """Run one backward pass, so that DDP learns in which order the gradients come.

    In its next forward pass, DDP sorts its buckets by that order, with which the sums over
    three ranks or more round differently. Without this, the first step after a resume would
    differ from that of an uninterrupted training. Waits for all ranks.
    """
    image, _ = test_set[0]
    images = image.unsqueeze(0).to(next(ddp.parameters()).device)
    # In train mode, a batch norm would take this image into its statistics.
    ddp.eval()
    ddp(images).sum().backward()
    ddp.zero_grad()


# ---------------------------------------------------------------- checkpoints


def save(run: Run) -> Path:
    """Wait until rank 0 has written a checkpoint; return its path.

    Nobody leaves before it is written: when one rank has left, the launcher ends the others,
    even rank 0 in mid-save. Raises UserError on all ranks.
    """
    progress = run.progress
    name = utils.checkpoint_name(progress.epoch, progress.images_done)
    path = run.args.checkpoint_dir / name
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            weights = run.model.parameters()
            if not all(weight.isfinite().all() for weight in weights):
                raise UserError("the weights are not finite: rerun with a lower --lr")
            # The folder may have been deleted, and even be another run's by now.
            run.lock.claim()
            utils.save_checkpoint(path, checkpoint_of(run), run.args.keep)
    return path


def checkpoint_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint holds; its tensors stay on their device."""
    return {
        "version": utils.VERSION,
        "args": hyperparameters(run.args),
        "data": run.data_name,
        # The model itself is saved. In the state dict of `ddp`, every name begins with
        # "module.", and only a model that is wrapped in DDP could load it.
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "optimizer_class": type(run.optimizer).__name__,
        "progress": asdict(run.progress),
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
    """Wait for all ranks; load the newest undamaged checkpoint of all machines; return its path.

    Raises UserError on all ranks if it is of another kind of training.
    """
    folder = run.args.checkpoint_dir
    name = ""
    content = b""
    is_first = utils.is_first_on_machine()
    with raise_on_all_ranks():
        if is_first:
            name, content = utils.newest_checkpoint(folder)
    # Rank 0's is not always the newest: when machines join or leave, rank 0 may find itself on
    # another one, with an empty disk.
    names = gather(name)
    newest = max(names)
    if not newest:
        return None
    # The rank that has the newest checkpoint sends it to all, in a list of one item.
    contents = [content]
    dist.broadcast_object_list(contents, src=names.index(newest))
    path = folder / newest
    saved = utils.decode_checkpoint(path, contents[0])
    compare_with_saved(run, saved, path)
    try:
        run.model.load_state_dict(saved["model"])
        load_optimizer_state(run.optimizer, saved["optimizer"])
        run.progress = Progress(**saved["progress"])
    except (RuntimeError, ValueError, TypeError) as error:
        problem = f"{path} does not fit: {' '.join(str(error).split())}"
        raise UserError(f"{problem}: choose another --checkpoint_dir")
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
        # A flag that you have added is not in older checkpoints.
        if before.get(name) != value:
            print0(f"changed    {name} from {before.get(name)} to {value}")


# ---------------------------------------------------------------- what is recorded and printed


def record_of_epoch(
    run: Run, results: dict[str, float], seconds: float, images_per_second: float
) -> dict[str, Any]:
    """Return what the history keeps of the epoch that has just been trained.

    The seconds are those of this process, which may have resumed in mid-epoch.
    """
    progress = run.progress
    return {
        **hyperparameters(run.args),
        "data": run.data_name,
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.images_done,
        **results,
        "seconds": seconds,
        "images_per_second": images_per_second,
    }


def report_epoch(run: Run, path: Path) -> None:
    """Print the record of the last epoch, and where it is saved."""
    record = run.progress.history[-1]
    print0(
        f"epoch {record['epoch']}/{run.args.epochs}  "
        f"train loss {record['train_loss']:.4f}  test loss {record['test_loss']:.4f}  "
        f"accuracy {record['test_accuracy']:.2%}  "
        f"{record['images_per_second']:,.0f} images/s  {record['seconds']:.1f} s  {path}"
    )


def report_start(run: Run, resumed_from: Path | None) -> None:
    """Wait for all ranks; print what is about to be trained, and from where."""
    args = run.args
    threads = torch.get_num_threads()
    core_count = sum(len(cores) for cores in usable_cores().values())
    print0(
        f"processes  {args.world_size} on {run.device.type}, {threads} thread(s) each, "
        f"{core_count} CPU core(s) for them"
    )
    print0(f"data       {run.data_name}")
    print0(
        f"training   {args.batch_size} images per rank and step, peak lr {args.lr:.3g}"
    )
    if resumed_from is None:
        print0(f"start      from scratch, nothing in {args.checkpoint_dir}")
    else:
        print0(f"start      {resumed_from}")


def usable_cores() -> dict[str, set[int]]:
    """Wait for all ranks; return the cores that they may use, by machine.

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
    flags = ", ".join(f"{name} {last.get(name)}" for name in hyperparameters(run.args))
    print0(
        f"finished   nothing left to train; trained before with {flags}: "
        f"test accuracy {last['test_accuracy']:.2%}"
    )


# ---------------------------------------------------------------- the command line


def parse_folder(text: str) -> Path:
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


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, where argparse would print the usage from every rank."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parse_args(info: RankInfo | None) -> argparse.Namespace:
    """Read the flags. Wrong ones raise UserError, before a worker or a file is touched."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--epochs", type=int, default=3, help="passes over the data (3)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images per rank (64)"
    )
    parser.add_argument("--world_size", type=int, help="processes (one per GPU, or 1)")
    parser.add_argument("--lr", type=float, help="peak rate (follows the global batch)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (0)")
    parser.add_argument("--save_every", type=int, help="save every N steps, too")
    parser.add_argument("--keep", type=int, default=3, help="checkpoints to keep (3)")
    parser.add_argument(
        "--data_dir",
        type=parse_folder,
        default=Path("data"),
        help="where the data are, or are downloaded to (data)",
    )
    parser.add_argument(
        "--checkpoint_dir",
        type=parse_folder,
        default=Path("checkpoints"),
        help="one training per folder (checkpoints)",
    )
    # torch.distributed.launch and deepspeed pass it. The environment has it as well.
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    del args.local_rank
    check_numbers(parser, args)
    args.world_size = utils.choose_world_size(args.world_size, info)
    return args


def check_numbers(parser: Parser, args: argparse.Namespace) -> None:
    """Raise UserError for numbers with which nothing could be trained."""
    for name in "epochs", "batch_size", "world_size", "lr", "save_every", "keep":
        value = getattr(args, name)
        if value is not None and not 0 < value < 100_000:
            parser.error(f"--{name} must be above 0 and below 100000, not {value}")
    # A larger seed would leave no room for the epoch, which is added to it.
    if not 0 <= args.seed < 2**62:
        parser.error(f"--seed must be from 0 to 2**62 - 1, not {args.seed}")


def run_rank(info: RankInfo, args: argparse.Namespace) -> int:
    """Train as one rank; return the exit code."""
    if utils.is_started_by_torchrun():
        utils.end_with_launcher()
    if info.world_size > 1:
        utils.let_interrupts_end_set_up()
    lock = FolderLock(args.checkpoint_dir)
    try:
        return train(args, info, lock)
    except ReportedElsewhere:
        return 1
    except UserError as error:
        # It is printed before the group is destroyed, as torchrun may end this rank meanwhile.
        if info.rank == 0 or not dist.is_initialized():
            utils.print_line(f"error: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 (printed whole if it is not recognised)
        utils.abort(error, info)
    finally:
        lock.release()
        # After a UserError, `train` has not reached its last step.
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
    if info is None:
        utils.exit_like(utils.launch(run_rank, args, args.world_size))
    else:
        sys.exit(run_rank(info, args))


if __name__ == "__main__":
    main()
