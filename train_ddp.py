"""Train a small CNN on MNIST with DistributedDataParallel; rerun the command to resume.

examples:
  torchrun --nproc_per_node=2 train_ddp.py --epochs 3 --batch_size 64
  python train_ddp.py --world_size 2
"""

import argparse
import math
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Subset

import utils
from data import Digits, ShardSampler, download, load_data
from model import ConvNet
from utils import UserError, print0, shared_errors

BASE_LR, BASE_BATCH = 0.01, 128  # peak learning rate, and for how many images per step
WARM_UP = 0.2  # the part of training in which the rate rises; then it falls to 0
LABEL_SMOOTHING = 0.1
SYNC_EVERY = 10  # steps after which ranks sum their losses and ask who wants to stop
LOG_EVERY = 200  # steps, a multiple of SYNC_EVERY
LOST_RANK = "gloo.*(Connection closed|Connection reset|Broken pipe|Timed out)"


@dataclass
class Run:
    """One training: the flags, and all that changes meanwhile."""

    args: argparse.Namespace  # with the names of the data and of the optimizer
    model: nn.Module  # the bare one, not wrapped in DDP
    optimizer: Optimizer
    epoch: int = 0  # finished epochs
    images: int = 0  # of the current epoch, over all ranks: valid for any world size
    step: int = 0  # optimizer steps since the start
    loss_sum: float = 0.0  # over the images of the current epoch
    seconds: float = 0.0  # spent in the current epoch, with saves inside it
    history: list[dict] = field(default_factory=list)  # a record per epoch


def train(args: argparse.Namespace, init_method: str) -> int:
    """Do the whole job as one rank; return the exit code, or raise UserError on all ranks."""
    device = utils.join_process_group(init_method)
    with shared_errors():
        if dist.get_rank() == 0:
            lock = utils.claim_folder(Path(args.checkpoint_dir))  # noqa: F841 (open)
    args.data, train_set, test_set = load_on_every_rank(Path(args.data_dir))
    flags = utils.gather({f"{k} {v}" for k, v in vars(args).items() if "_dir" not in k})
    if mixed := set.union(*flags) - set.intersection(*flags):
        raise UserError(f"start all ranks alike, not with {', '.join(sorted(mixed))}")

    torch.manual_seed(args.seed)  # each run begins alike; DDP makes the ranks equal
    model = ConvNet().to(device, memory_format=torch.channels_last)
    optimizer = AdamW(model.parameters(), betas=(0.8, 0.95), fused=True)
    args.optimizer = type(optimizer).__name__
    run = Run(args, model, optimizer)
    path = resume(run)
    report_start(args, device.type, path)
    if run.epoch >= args.epochs:
        print0(f"finished   test accuracy {run.history[-1]['test_accuracy']:.2%}")
        return 0

    # Copies rank 0's weights to all; each backward pass then averages the gradients, too.
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)  # saves a copy
    settle_buckets(ddp, test_set.images[:1].to(device))
    sampler = ShardSampler(train_set, seed=args.seed)
    # collate_fn=tuple, as the data set returns whole batches: nothing to collate
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, collate_fn=tuple)
    stop = utils.catch_stop_signals()
    while run.epoch < args.epochs:
        # Without set_epoch, each epoch would repeat the order of the first.
        sampler.set_epoch(run.epoch, start=run.images)
        train_set.draw_shifts(args.seed, run.epoch)
        if not train_epoch(run, ddp, loader, stop):
            path = save(run)
            print0(f"stopped; {path} has all progress: rerun to resume")
            return 128 + (stop or [signal.SIGTERM])[0]  # [] if only others got one
        finish_epoch(run, evaluate(model, test_set))
    return 0


def train_epoch(run: Run, ddp: nn.Module, loader: DataLoader, stop: list) -> bool:
    """Train to the end of the epoch; return False if `stop` of any rank has a signal before.

    All ranks return after the same step, as one that trained on would wait for the others.
    If the sum of their losses is not finite, all raise UserError.
    """
    args, total, world_size = run.args, len(loader.dataset), dist.get_world_size()
    started = time.perf_counter() - run.seconds
    ddp.train()  # settle_buckets and evaluate leave it in eval mode
    losses = []  # of this rank, since the ranks last summed theirs
    for batch in loader:
        count = world_size * len(batch[1])  # the ranks' batches are equally large
        # It follows from the images seen: there is no scheduler to save and restore.
        done = (run.epoch * total + run.images + count / 2) / (args.epochs * total)
        ramp = min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
        run.optimizer.param_groups[0]["lr"] = args.lr * ramp
        losses.append(train_step(ddp, run.optimizer, batch))
        run.images += count
        run.step += 1
        saving = args.save_every and run.step % args.save_every == 0
        last = total - run.images < world_size
        if not (saving or last or run.step % SYNC_EVERY == 0):
            continue
        # In float64 such float32 losses add up without rounding: how they are grouped, and
        # so an interruption, leaves no trace. The same message sums up the stop signals.
        own_loss = torch.stack(losses).sum(dtype=torch.float64)
        sums = torch.stack([own_loss, own_loss.new_tensor(len(stop))])
        dist.all_reduce(sums)
        loss_sum, stop_votes = sums.tolist()
        losses.clear()
        if not math.isfinite(loss_sum):
            raise UserError(f"the loss is {loss_sum} by step {run.step}: lower --lr")
        run.loss_sum += loss_sum
        run.seconds = time.perf_counter() - started
        if stop_votes:
            return False
        if saving:
            save(run)
        if run.step % LOG_EVERY == 0:
            print0(f"step {run.step}  train loss {run.loss_sum / run.images:.4f}")
    return True


def train_step(ddp: nn.Module, optimizer: Optimizer, batch: tuple) -> Tensor:
    """Take a step; return the summed loss of this rank's images, float32 [], on the device."""
    device = next(ddp.parameters()).device
    images, labels = (tensor.to(device) for tensor in batch)
    loss = F.cross_entropy(ddp(images), labels, label_smoothing=LABEL_SMOOTHING)
    # Here DDP averages the gradients over the ranks. As their batches are equally large, in
    # the last step too, that is the mean over all images.
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach() * len(labels)  # .item() would make the CPU wait for the GPU


@torch.inference_mode()
def evaluate(model: nn.Module, test_set: Digits) -> dict[str, float]:
    """Return test_loss (cross-entropy, not smoothed) and test_accuracy over all images."""
    model.eval()
    total, device = len(test_set), next(model.parameters()).device
    # Each image once. A DistributedSampler would repeat images until the ranks' shares are
    # equally large, and the accuracy would depend on the world size.
    share = Subset(test_set, range(dist.get_rank(), total, dist.get_world_size()))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for images, labels in DataLoader(share, batch_size=1000, collate_fn=tuple):
        logits, labels = model(images.to(device)), labels.to(device)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    dist.all_reduce(sums)
    return dict(zip(["test_loss", "test_accuracy"], (sums / total).tolist()))


def settle_buckets(ddp: nn.Module, images: Tensor) -> None:
    """Show DDP the order of gradients: its next forward pass sorts its buckets by it."""
    # The sums over three ranks or more change with it: the first step after a resume would
    # round differently from that of a run without interruption.
    ddp.eval()  # in train mode, batch norm would take this image into its statistics
    ddp(images).sum().backward()
    ddp.zero_grad()


def load_on_every_rank(data_dir: Path) -> tuple[str, Digits, Digits]:
    """Load the data, which one rank per machine downloads; raise UserError on all ranks."""
    patient = dist.new_group(backend="gloo", timeout=20 * utils.TIMEOUT)
    with shared_errors(patient):
        if os.environ["LOCAL_RANK"] == "0":
            download(data_dir)
    with shared_errors():
        return load_data(data_dir)


def resume(run: Run) -> Path | None:
    """Load the newest sound checkpoint, if any, into `run`; return its path.

    Raises UserError on all ranks if it comes from a different kind of training.
    """
    newest, folder = ("", b""), Path(run.args.checkpoint_dir)
    with shared_errors():
        if os.environ["LOCAL_RANK"] == "0":
            newest = utils.newest_checkpoint(folder)
    # Not simply rank 0's: when machines join or leave, rank 0 may move to an empty disk.
    names, contents = utils.gather(newest[0]), [newest[1]]
    if not (name := max(names)):
        return None
    dist.broadcast_object_list(contents, src=names.index(name))
    path, state = folder / name, utils.decode_checkpoint(contents[0])
    saved_args = state.pop("args")
    for key in "data", "optimizer", "seed", "epochs", "batch_size", "world_size", "lr":
        before, now = saved_args[key], getattr(run.args, key)
        if before != now and key in ("data", "optimizer", "seed"):
            difference = f"{path} has {key} {before}, this run has {now}"
            raise UserError(f"{difference}: choose another --checkpoint_dir")
        if before != now:
            print0(f"changed    {key} from {before} to {now}")
    try:
        run.model.load_state_dict(state.pop("model"))
        run.optimizer.load_state_dict(state.pop("optimizer"))  # with betas and the like
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit (another --checkpoint_dir?): {error!r}")
    vars(run).update(state)
    return path


def save(run: Run) -> Path:
    """Have rank 0 write a checkpoint; return its path, or raise UserError on all ranks.

    The others wait: when one leaves, the launcher ends the rest, even rank 0 in mid-save.
    """
    name = f"epoch{run.epoch:05d}-image{run.images:09d}.pt"
    path = Path(run.args.checkpoint_dir, name)
    # Not of `ddp`, whose state_dict would load into nothing but DDP.
    state = vars(run) | {"args": vars(run.args), "model": run.model.state_dict()}
    state["optimizer"] = run.optimizer.state_dict()
    with shared_errors():
        if dist.get_rank() == 0:
            if not all(weight.isfinite().all() for weight in run.model.parameters()):
                raise UserError("the weights are not finite: rerun with a lower --lr")
            utils.save_checkpoint(path, state, run.args.keep)
    return path


def finish_epoch(run: Run, test_results: dict[str, float]) -> None:
    """Record the epoch, save and report it."""
    record = vars(run.args) | {"epoch": run.epoch + 1, "step": run.step} | test_results
    record |= {"train_loss": run.loss_sum / run.images, "seconds": run.seconds}
    record |= {"images_per_second": run.images / run.seconds}
    run.epoch, run.images, run.loss_sum, run.seconds = run.epoch + 1, 0, 0.0, 0.0
    run.history.append(record)
    path = save(run)
    text = (
        "epoch {epoch}/{epochs}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
        "accuracy {test_accuracy:.2%}  {images_per_second:,.0f} images/s  {seconds:.1f} s  "
    )
    print0(text.format(**record) + str(path))


def report_start(args: argparse.Namespace, device: str, path: Path | None) -> None:
    """Print what is about to be trained, and from where."""
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    print0(f"processes  {args.world_size} on {device}, CPU threads each: {threads}")
    print0(f"training   {args.data}, {args.batch_size} per rank, peak lr {args.lr:.3g}")
    print0(f"start      {path or f'from scratch, nothing in {args.checkpoint_dir}'}")
    used = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * threads
    if device == "cpu" and used < cores:
        flags = f"--world_size {cores} (torchrun: --nproc_per_node={cores})"
        print0(f"hint       {used} of {cores} CPU cores in use: try {flags}")


def parse_args() -> argparse.Namespace:
    """Read the flags; wrong ones end the program here, before a worker or file is touched."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = utils.refuse  # its own would print the usage too, from every rank
    add, number = parser.add_argument, {"type": int, "metavar": "N"}
    add("--epochs", **number, default=3, help="passes over the data (3)")
    add("--batch_size", **number, default=64, help="images per process and step (64)")
    add("--world_size", **number, help="processes to spawn (one per GPU, or 1)")
    add("--lr", type=float, help=f"peak ({BASE_LR} * sqrt(global batch/{BASE_BATCH}))")
    add("--seed", **number, default=0, help="for weights, order and shifts (0)")
    add("--data_dir", default="data", help="folder of the data sets (data)")
    add("--checkpoint_dir", default="checkpoints", help="(checkpoints)")
    add("--save_every", **number, help="save every N steps too (only after epochs)")
    add("--keep", **number, default=3, help="newest checkpoints to keep (3)")
    args = parser.parse_args()
    for name in "epochs", "batch_size", "world_size", "lr", "save_every", "keep":
        value = getattr(args, name)
        if value is not None and not 0 < value < 100_000:
            utils.refuse(f"--{name} must be above 0 and below 100000, not {value}")
    if not 0 <= args.seed < 2**63:
        utils.refuse(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    args.world_size = utils.find_world_size(args.world_size)
    scale = args.batch_size * args.world_size / BASE_BATCH
    args.lr = args.lr or BASE_LR * math.sqrt(scale)
    return args


def run_rank(rank: int, args: argparse.Namespace, init_method: str) -> NoReturn:
    """Train as one rank and exit with a code that tells how it went."""
    if init_method != "env://":  # set what torchrun would have set
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    utils.end_with_launcher()
    try:
        code = train(args, init_method)
    except UserError as error:  # raised on all ranks: one of them speaks
        code = 1
        if rank == 0:  # now: torchrun may end this rank while the group is taken down
            print(f"error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:  # during set-up, when there is nothing to save
        os._exit(128 + signal.SIGINT)
    except Exception as error:  # noqa: BLE001 (printed whole if it is not recognised)
        text, lost = traceback.format_exc(), re.search(LOST_RANK, str(error))
        if lost and args.world_size > 1:
            text = f"error: rank {rank} lost another rank: {lost[1]}; rerun to resume\n"
        print(text, end="", file=sys.stderr, flush=True)
        os._exit(1)  # to take the group down could wait for ranks in a collective
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    args = parse_args()
    if "RANK" in os.environ:
        run_rank(int(os.environ["RANK"]), args, "env://")
    utils.launch(run_rank, args, args.world_size)
