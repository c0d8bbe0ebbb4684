"""Train a small CNN on MNIST with DistributedDataParallel; rerun the command to resume.

examples:
  torchrun --nproc_per_node=2 train_ddp.py --epochs 3 --batch_size 64
  python train_ddp.py --world_size 2
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from datetime import timedelta
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
from data import Digits, ShardSampler, load_data
from model import ConvNet
from utils import StopRequest, UserError, print0, shared_errors

BASE_LR, BASE_BATCH = 0.01, 128  # peak learning rate, and for how many images per step
WARM_UP = 0.2  # the part of training in which the rate rises; then it falls to 0
LABEL_SMOOTHING = 0.1
SYNC_EVERY = 10  # steps after which ranks sum their losses and ask who wants to stop
LOG_EVERY = 200  # steps


@dataclass
class Progress:
    """How far training has come."""

    epoch: int = 0  # finished epochs
    images: int = 0  # of the current epoch, over all ranks: valid for any world size
    step: int = 0  # optimizer steps since the start
    loss_sum: float = 0.0  # over the images of the current epoch
    seconds: float = 0.0  # spent training in the current epoch
    history: list[dict] = field(default_factory=list)  # a record per epoch


@dataclass
class Run:
    """All that a checkpoint is made of, and the flags."""

    args: argparse.Namespace
    settings: dict  # a checkpoint that differs in them is refused or reported
    model: nn.Module  # the bare one, not wrapped in DDP
    optimizer: Optimizer
    progress: Progress


def train(args: argparse.Namespace, store_path: str | None) -> int:
    """Do the whole job as one rank: set up, resume, train, evaluate, save.

    Returns the exit code. Raises UserError, on all ranks alike.
    """
    with utils.process_group(store_path) as device:
        with shared_errors():
            if dist.get_rank() == 0:
                lock = utils.claim_folder(args.checkpoint_dir)  # noqa: F841 (held)
        data_name, train_set, test_set = load_on_every_rank(args)

        torch.manual_seed(args.seed)  # the same initial weights on every rank
        model = ConvNet().to(device, memory_format=torch.channels_last)
        optimizer = AdamW(model.parameters(), betas=(0.8, 0.95), fused=True)
        names = "seed", "epochs", "batch_size", "world_size", "lr"
        settings = {"data": data_name, "optimizer": type(optimizer).__name__}
        settings |= {name: getattr(args, name) for name in names}
        run = Run(args, settings, model, optimizer, Progress())
        path = resume(run)
        report_start(run, device, path)

        # From here on, each backward pass also averages the gradients over all ranks.
        ddp = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # gradients live in the buffer that is sent
        )
        settle_buckets(ddp, test_set.images[:1].to(device))
        sampler = ShardSampler(train_set, seed=args.seed)
        # collate_fn=tuple, as the data set returns whole batches: nothing to collate
        size = args.batch_size
        loader = DataLoader(train_set, size, sampler=sampler, collate_fn=tuple)
        stop = StopRequest()
        while run.progress.epoch < args.epochs:
            # Without set_epoch, each epoch would repeat the order of the first.
            sampler.set_epoch(run.progress.epoch, start=run.progress.images)
            train_set.set_epoch(args.seed, run.progress.epoch)
            if not train_epoch(run, ddp, loader, stop):
                print0(f"stopped; {save(run)} has all progress: rerun to resume")
                return 128 + (stop.signum or signal.SIGTERM)
            path = finish_epoch(run, evaluate(model, test_set))
        report_result(run, test_set, path)
    return 0


def train_epoch(
    run: Run, ddp: nn.Module, loader: DataLoader, stop: StopRequest
) -> bool:
    """Train from where `run.progress` stands to the end of the epoch.

    Returns False, on all ranks after the same step, if any rank was asked to stop. Raises
    UserError on all ranks if the loss is not finite.
    """
    args, progress, total = run.args, run.progress, len(loader.dataset)
    world_size, started = dist.get_world_size(), time.perf_counter() - progress.seconds
    ddp.train()  # as layers such as dropout need it
    losses = []  # of this rank, since the ranks last summed theirs
    for batch in loader:
        count = world_size * len(batch[1])  # the ranks' batches are equally large
        # A function of the images seen leaves no scheduler to save and restore.
        seen = progress.epoch * total + progress.images + count / 2
        part = seen / (args.epochs * total)
        ramp = min(part / WARM_UP, (1 - part) / (1 - WARM_UP))
        run.optimizer.param_groups[0]["lr"] = args.lr * ramp
        losses.append(train_step(ddp, run.optimizer, batch))
        progress.images += count
        progress.step += 1
        saving = args.save_every and progress.step % args.save_every == 0
        last = total - progress.images < world_size
        if not (saving or last or progress.step % SYNC_EVERY == 0):
            continue
        # In float64 a sum of float32 losses is exact: how they are grouped, and so an
        # interruption, leaves no trace. All ranks stop after the same step: those that train
        # on would wait for one that has left.
        sums = torch.stack(losses).sum(dtype=torch.float64).repeat(2)
        sums[1] = bool(stop.signum)
        dist.all_reduce(sums)
        loss_sum, votes = sums.tolist()
        losses.clear()
        if not math.isfinite(loss_sum):
            problem = f"the loss is {loss_sum} by step {progress.step}"
            raise UserError(f"{problem}: rerun with a lower --lr")
        progress.loss_sum += loss_sum
        progress.seconds = time.perf_counter() - started
        if votes:
            return False
        if saving:
            save(run)
        if progress.step % LOG_EVERY == 0:
            mean = progress.loss_sum / progress.images
            print0(f"step {progress.step}  {progress.images}/{total}  loss {mean:.4f}")
    return True


def train_step(ddp: nn.Module, optimizer: Optimizer, batch: tuple) -> Tensor:
    """Take an optimizer step on the mean gradient over the images of all ranks.

    Returns the summed loss of this rank's images, float32 [], still on the device: to read it
    here, as loss.item() does, would make the CPU wait for the GPU in every step.
    """
    device = next(ddp.parameters()).device
    images, labels = (tensor.to(device) for tensor in batch)
    loss = F.cross_entropy(ddp(images), labels, label_smoothing=LABEL_SMOOTHING)
    # DDP averages the gradients over the ranks while it computes them. As the ranks' batches
    # are equally large, in the last step too, that is the mean over all images.
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach() * len(labels)


@torch.inference_mode()
def evaluate(model: nn.Module, test_set: Digits) -> dict[str, float]:
    """Return test_loss (mean cross-entropy), test_accuracy, correct and total, over all ranks.

    Each image counts once. A DistributedSampler would repeat images until the ranks' shares
    are equally large, and the accuracy would depend on the world size.
    """
    model.eval()
    mine = range(dist.get_rank(), len(test_set), dist.get_world_size())
    share = Subset(test_set, mine)
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for images, labels in DataLoader(share, batch_size=1000, collate_fn=tuple):
        logits, labels = model(images.to(device)), labels.to(device)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    dist.all_reduce(sums)
    loss, accuracy = (sums / len(test_set)).tolist()
    counts = {"correct": int(sums[1]), "total": len(test_set)}
    return {"test_loss": loss, "test_accuracy": accuracy} | counts


def settle_buckets(ddp: nn.Module, images: Tensor) -> None:
    """Make DDP reorder its gradient buckets now, as it does once after a backward pass.

    With three ranks or more that changes the order of summation. Later, the first step after
    a resume would round differently from that step of a run that was never interrupted.
    """
    ddp.eval()  # in train mode, batch norm would take this image into its statistics
    ddp(images).sum().backward()
    ddp.zero_grad()


def load_on_every_rank(args: argparse.Namespace) -> tuple[str, Digits, Digits]:
    """Load the data; one rank per machine downloads it first, the others wait."""
    first_here = os.environ["LOCAL_RANK"] == "0"
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
    with shared_errors(patient):
        data = load_data(args.data_dir, may_download=True) if first_here else None
    with shared_errors():
        data = data or load_data(args.data_dir)
        images, global_batch = len(data[1]), args.world_size * args.batch_size
        if global_batch > images:
            problem = f"{global_batch} images per step, but {images} in all"
            raise UserError(f"{problem}: lower --batch_size")
    if len(names := set(utils.gather(data[0]))) > 1:
        raise UserError(f"the ranks have different data: {', '.join(sorted(names))}")
    return data


def resume(run: Run) -> Path | None:
    """Load the newest sound checkpoint into `run`; return its path, or None if there is none.

    Raises UserError on all ranks if it comes from a different kind of training.
    """
    name, content, folder = "", b"", run.args.checkpoint_dir
    with shared_errors():
        if os.environ["LOCAL_RANK"] == "0":
            name, content = utils.newest_checkpoint(folder)
    # Not simply rank 0's: when machines join or leave, rank 0 may move to an empty disk.
    names, contents = utils.gather(name), [content]
    if not (newest := max(names)):
        return None
    dist.broadcast_object_list(contents, src=names.index(newest))
    path, state = folder / newest, utils.decode_checkpoint(contents[0])
    before, now = state["settings"], run.settings
    for name in ("data", "optimizer", "seed"):
        if before[name] != now[name]:
            fix = f"choose another --checkpoint_dir, or the {name} of before"
            difference = f"{path} has {name} {before[name]}, this run has {now[name]}"
            raise UserError(f"{difference}: {fix}")
    try:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        fix = f"choose another --checkpoint_dir ({utils.one_line(error)})"
        raise UserError(f"{path} does not fit the model or its optimizer: {fix}")
    run.progress = Progress(**state["progress"])
    changes = [f"{k} from {before[k]} to {now[k]}" for k in now if before[k] != now[k]]
    if changes:
        print0(f"changed    {', '.join(changes)}")
    return path


def save(run: Run) -> Path:
    """Have rank 0 write a checkpoint and metrics.jsonl; return its path when that is done.

    The others wait: when one leaves, the launcher ends the rest, even rank 0 in mid-save.
    Raises UserError on all ranks if saving fails or the weights are not finite.
    """
    progress, folder = run.progress, run.args.checkpoint_dir
    path = folder / f"epoch{progress.epoch:05d}-image{progress.images:09d}.pt"
    state = {
        # Not of `ddp`: its names begin with "module." and load into nothing but DDP.
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "progress": asdict(progress),
        "settings": run.settings,
    }
    # All of the history, anew each time: appended lines would be doubled by a resume.
    metrics = "".join(json.dumps(record) + "\n" for record in progress.history)
    with shared_errors():
        if dist.get_rank() == 0:
            if not all(weight.isfinite().all() for weight in state["model"].values()):
                raise UserError("the weights are not finite: rerun with a lower --lr")
            utils.save_checkpoint(path, state, metrics, run.args.keep)
    return path


def finish_epoch(run: Run, test_results: dict[str, float]) -> Path:
    """Record the epoch, save and report it; return the path of the checkpoint."""
    old, epoch = run.progress, run.progress.epoch + 1
    record = run.settings | {"epoch": epoch, "step": old.step, "seconds": old.seconds}
    record |= {"images_per_second": old.images / old.seconds}
    record |= {"train_loss": old.loss_sum / old.images} | test_results
    run.progress = Progress(epoch, step=old.step, history=[*old.history, record])
    path = save(run)
    text = (
        "epoch {epoch}/{epochs}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
        "accuracy {test_accuracy:.2%} ({correct}/{total})  "
        "{images_per_second:,.0f} images/s  {seconds:.1f} s  "
    )
    print0(text.format(**record) + str(path))
    return path


def report_start(run: Run, device: torch.device, path: Path | None) -> None:
    """Print what is about to be trained, and from where."""
    args, threads, cores = run.args, torch.get_num_threads(), os.cpu_count()
    parameters = sum(p.numel() for p in run.model.parameters())
    print0(
        f"processes  {args.world_size} on {device.type}, CPU threads each: {threads}\n"
        f"data       {run.settings['data']}\n"
        f"model      {parameters:,} parameters\n"
        f"batch      {args.world_size} x {args.batch_size} images, peak lr {args.lr:.3g}\n"
        f"start      {path or f'from scratch, no checkpoint in {args.checkpoint_dir}'}"
    )
    used = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * threads
    if device.type == "cpu" and used < cores:
        flags = f"--world_size {cores} (torchrun: --nproc_per_node={cores})"
        print0(f"hint       {used} of {cores} CPU cores in use: try {flags}")


@torch.inference_mode()
def report_result(run: Run, test_set: Digits, path: Path) -> None:
    """Print the result of the last epoch; draw up to 600 mistakes, in order of true label."""
    last = run.progress.history[-1]
    picture = run.args.checkpoint_dir / f"mistakes-epoch{last['epoch']:05d}.png"
    accuracy = f"{last['test_accuracy']:.2%} of {last['total']:,} test images correct"
    print0(f"result     {accuracy} after epoch {last['epoch']} on {last['data']}")
    print0(f"weights    {path}\nmistakes   {picture}")
    if dist.get_rank() != 0 or picture.exists():
        return
    try:
        from torchvision.utils import save_image  # slow to import, and needed only here

        device = next(run.model.eval().parameters()).device
        batches = test_set.images.to(device).split(1000)
        predicted = torch.cat([run.model(images).argmax(1) for images in batches])
        wrong = (predicted.cpu() != test_set.labels).nonzero().flatten()
        wrong = wrong[test_set.labels[wrong].argsort()][:600]
        images = test_set.images[wrong].unsqueeze(1) / 255
        save_image(images, png := io.BytesIO(), format="png", nrow=20, pad_value=0.5)
        utils.write_atomically(picture, png.getvalue())
    except Exception as error:  # noqa: BLE001 (training is over: nothing may spoil it)
        utils.warn(f"cannot draw {picture}: {utils.one_line(error)}")


def refuse(message: str) -> NoReturn:
    """Exit with code 2 and one line, from one rank per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
    sys.exit(2)


def parse_args() -> argparse.Namespace:
    """Read the flags; wrong ones end the program here, before a worker or file is touched."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.allow_abbrev = False
    parser.error = refuse  # its own would print the usage too, from every rank
    add = parser.add_argument
    number = {"type": int, "metavar": "N"}
    folder = {"type": Path, "metavar": "DIR"}
    add("--epochs", **number, default=3, help="passes over the data (3)")
    add("--batch_size", **number, default=64, help="images per process and step (64)")
    add("--world_size", **number, help="processes to spawn (one per GPU, or 1)")
    rule = f"{BASE_LR} * sqrt(batch_size * world_size / {BASE_BATCH})"
    add("--lr", type=float, metavar="X", help=f"peak learning rate ({rule})")
    add("--seed", **number, default=0, help="of weights, order and shifts (0)")
    add("--data_dir", **folder, default="data", help="of MNIST (./data)")
    kept = "of what is learned (./checkpoints)"
    add("--checkpoint_dir", **folder, default="checkpoints", help=kept)
    add("--save_every", **number, help="save every N steps too (only after epochs)")
    add("--keep", **number, default=3, help="newest checkpoints to keep (3)")
    args = parser.parse_args()
    for name in "epochs", "batch_size", "world_size", "lr", "save_every", "keep":
        value = getattr(args, name)
        if value is not None and not 0 < value < 100_000:
            refuse(f"--{name} must be above 0 and below 100000, not {value}")
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    return args


def settle_world_size(args: argparse.Namespace) -> bool:
    """Set world_size and lr, or refuse them; return whether a launcher has started us."""
    gpus, requested = torch.cuda.device_count(), args.world_size
    here = args.world_size = requested or max(1, gpus)
    missing = [name for name in utils.LAUNCHER_VARIABLES if name not in os.environ]
    launched = not {"RANK", "WORLD_SIZE"} <= set(missing)
    if launched:
        if missing:  # otherwise each process would train alone
            names = ", ".join(missing)
            refuse(f"RANK or WORLD_SIZE is set, but not {names}: use torchrun")
        args.world_size = int(os.environ["WORLD_SIZE"])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if requested not in (None, args.world_size):
            refuse(f"--world_size {requested}, but torchrun runs {args.world_size}")
    if 0 < gpus < here:
        fix = f"start at most {gpus}, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        refuse(f"{here} processes on this machine, but {gpus} GPUs: {fix}")
    global_batch = args.batch_size * args.world_size
    args.lr = args.lr or BASE_LR * math.sqrt(global_batch / BASE_BATCH)
    return launched


def run_rank(rank: int, args: argparse.Namespace, store_path: str | None) -> NoReturn:
    """Train as one rank and exit with a code that tells how it went."""
    if store_path:  # self-spawned: set what torchrun would have set
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        size = str(args.world_size)
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = size
    utils.end_with_launcher()
    try:
        sys.exit(train(args, store_path))
    except UserError as error:  # raised on all ranks: one of them speaks
        sys.exit(f"error: {error}" if rank == 0 else 1)
    except KeyboardInterrupt:  # during set-up, when there is nothing to save
        os._exit(128 + signal.SIGINT)
    except Exception as error:  # noqa: BLE001 (printed whole if it is not recognised)
        if args.world_size > 1 and utils.is_lost_rank(error):
            reason = utils.one_line(error).split("] ")[-1].split(" This is typ")[0]
            text = f"error: rank {rank} lost another rank ({reason}); rerun to resume\n"
        else:
            text = traceback.format_exc()
        sys.stderr.write(text)
        sys.stderr.flush()
        # Not sys.exit: taking the group down could wait for ranks that are in a collective.
        os._exit(1)


def main() -> NoReturn:
    args = parse_args()
    if settle_world_size(args):
        run_rank(int(os.environ["RANK"]), args, None)
    utils.launch(run_rank, args, args.world_size)


if __name__ == "__main__":
    main()
