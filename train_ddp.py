"""Train a small CNN on MNIST with DistributedDataParallel; rerun the command to resume.

examples:
  torchrun --nproc_per_node=2 train_ddp.py --epochs 3 --batch_size 64
  python train_ddp.py --world_size 2
"""

import os
import signal
import sys

# As a script, or as a worker that it spawned; not when imported.
if __name__ in ("__main__", "__mp_main__"):
    # Until training starts, Ctrl-C ends the process at once: Python's own handler would print
    # a traceback for each rank, from the middle of some import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see utils.launch
    # Python has None where the shell has closed it, as `>&-` does.
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.platform == "linux" and (
        __name__ == "__mp_main__" or "TORCHELASTIC_RUN_ID" in os.environ
    ):
        import ctypes

        # Let the kernel tell a worker, by SIGTERM, that its launcher has died: torchrun gives
        # its workers sessions of their own, where they would train on as orphans.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)

import argparse
import io
import json
import math
import multiprocessing
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import utils
from data import Dataset, Digits, batches, load_mnist
from model import create_model, create_optimizers, optimizer_step
from utils import StopRequest, UserError, say

BASE_LR = 0.01  # the peak learning rate for a global batch of BASE_BATCH images
BASE_BATCH = 128
WARM_UP = 0.2  # the part of training in which the rate rises; then it falls to 0
LABEL_SMOOTHING = 0.1
PICTURE = "mistakes.png"
MEET_EVERY = 10  # steps after which ranks sum their losses and ask who wants to stop


@dataclass
class Progress:
    """How far training has come."""

    epoch: int = 0  # finished epochs
    images: int = 0  # of the current epoch, over all ranks: good for any world size
    step: int = 0  # optimizer steps since the start
    loss_sum: float = 0.0  # over the images of the current epoch
    seconds: float = 0.0  # spent training in the current epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # a record an epoch


@dataclass
class Run:
    """What one rank works with."""

    args: argparse.Namespace
    data: Dataset  # on the device
    model: DistributedDataParallel
    optimizers: list[torch.optim.Optimizer]
    progress: Progress


def refuse(message: str) -> NoReturn:
    """Exit with code 2 and one line; under torchrun, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
    sys.exit(2)


def folder_name(text: str) -> Path:
    """Refuse an empty name, as of an unset shell variable: it would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is empty")
    return Path(text)


def parse_args() -> argparse.Namespace:
    """Read the flags; wrong ones end the program here, before a worker or file is touched."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.error = refuse  # its own would print the usage too, from every rank
    add = parser.add_argument
    number = {"type": int, "metavar": "N"}
    place = {"type": folder_name, "metavar": "DIR"}
    add("--epochs", **number, default=3, help="passes over the data (3)")
    add("--batch_size", **number, default=64, help="images per process and step (64)")
    add("--world_size", **number, help="processes to spawn (one per GPU, or 1)")
    rule = f"{BASE_LR} * sqrt(batch_size * world_size / {BASE_BATCH})"
    add("--lr", type=float, metavar="X", help=f"peak learning rate ({rule})")
    add("--seed", **number, default=0, help="of weights, order and shifts (0)")
    add("--data_dir", **place, default="data", help="of MNIST (./data)")
    kept = "of what is learned (./checkpoints)"
    add("--checkpoint_dir", **place, default="checkpoints", help=kept)
    add("--save_every", **number, help="save every N steps too (only after epochs)")
    add("--keep", **number, default=3, help="newest checkpoints to keep (3)")
    args = parser.parse_args()
    for name in "epochs", "batch_size", "world_size", "lr", "save_every", "keep":
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            refuse(f"--{name} must be a positive number, not {value}")
    if args.epochs > 99_999:  # or the names of the checkpoints would not sort
        refuse(f"--epochs must be at most 99999, not {args.epochs}")
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wish = args.world_size
    local = args.world_size = wish or max(1, gpus)
    if utils.under_torchrun():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        args.world_size = int(os.environ["WORLD_SIZE"])
        if wish not in (None, args.world_size):
            refuse(f"--world_size {wish}, but torchrun runs {args.world_size}")
    if gpus and local > gpus:
        cure = f"start at most {gpus}, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        refuse(f"{local} processes on this machine, but {gpus} GPUs: {cure}")
    cores = os.cpu_count() or 1
    if local > 16 * cores:
        cure = f"start at most {16 * cores}"
        refuse(f"{local} processes on this machine, but {cores} cores: {cure}")
    global_batch = args.batch_size * args.world_size
    args.lr = args.lr or BASE_LR * math.sqrt(global_batch / BASE_BATCH)
    return args


def work(rank: int, args: argparse.Namespace, store_path: str | None) -> None:
    """Train as one rank and exit; rank 0 says what went wrong."""
    if (spawner := multiprocessing.parent_process()) and not spawner.is_alive():
        sys.exit(1)  # it died before its death could be told
    if store_path:  # started without torchrun: set what it would have set
        size = str(args.world_size)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    store = dist.FileStore(store_path, args.world_size) if store_path else None
    try:
        with utils.process_group(store) as device:
            code = train(args, device)
        sys.exit(code)
    except (UserError, OSError) as error:
        message, speakers = str(error), (0 if isinstance(error, UserError) else rank,)
    except RuntimeError as error:
        # When a rank dies, the others fail in a collective. Their tracebacks would bury the
        # first cause, which the dead rank itself, torchrun or utils.launch tells.
        if not utils.is_lost_rank(error):
            raise
        detail = utils.last_line(error).split("] ", 1)[-1].split(" This is typ")[0]
        message = f"lost another rank ({detail}); rerun to resume"
        speakers = 0, 1  # as rank 0 may be the one that is lost
    if rank in speakers:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if args.world_size == 1:
        sys.exit(1)
    os._exit(1)  # without freeing the broken group, in which gloo can abort


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Do the whole job as one rank: set up, resume, train, evaluate, save.

    Returns the exit code; raises UserError, on all ranks or on rank 0 alone.
    """
    rank, first_here = dist.get_rank(), os.environ["LOCAL_RANK"] == "0"
    setup = dist.new_group(backend="gloo", timeout=utils.SETUP_TIMEOUT)
    with utils.shared_fate(setup):
        if rank == 0:
            lock = utils.lock_folder(args.checkpoint_dir)  # noqa: F841 (held, not read)
        # One rank per machine downloads; the others wait at the end of this block.
        data = load_mnist(args.data_dir, may_download=True) if first_here else None
    with utils.shared_fate(setup):
        data = data or load_mnist(args.data_dir)
        found = utils.newest_checkpoint(args.checkpoint_dir) if first_here else None
    for other, name in enumerate(utils.gather(data.name, setup)):
        if name != data.name:
            raise UserError(f"rank {other} has {name}, but rank {rank} has {data.name}")
    images = len(data.train.labels)
    if (global_batch := args.world_size * args.batch_size) > images:
        cure = "lower --batch_size"
        raise UserError(f"{global_batch} images per step, but {images} in all: {cure}")
    model = create_model(args.seed)
    settings = settings_of(args, data)
    path, progress, saved = load_newest(found, model, settings, setup)
    stop = StopRequest()
    say(
        f"processes  {args.world_size} on {device.type} over {dist.get_backend()}, "
        f"CPU threads each: {torch.get_num_threads()}\n"
        f"data       {data.name}\n"
        f"model      {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"batch      {args.world_size} x {args.batch_size} images, peak lr {args.lr:.3g}\n"
        f"start      {path or f'from scratch, no checkpoint in {args.checkpoint_dir}'}"
    )
    if progress.epoch < args.epochs:
        # Here and no earlier: DDP imports torch's compiler, which takes a second.
        run = create_run(args, data, model, progress, saved, device)
        while run.progress.epoch < args.epochs:
            if not train_epoch(run, stop):
                return 128 + (stop.signum or signal.SIGTERM)
            path = finish_epoch(run)
        progress = run.progress
    else:
        say("training is complete already")
    last, picture = progress.history[-1], args.checkpoint_dir / PICTURE
    say(
        f"result     {last['test_accuracy']:.2%} of {last['total']:,} test images "
        f"correct after epoch {last['epoch']} on {data.name}\n"
        f"weights    {path}\n"
        f"mistakes   {picture if picture.is_file() else 'there is no picture of them'}\n"
        f"train on   the same command with --epochs {last['epoch'] + 3}"
    )
    return 0


def settings_of(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Return what a checkpoint must agree with, or else the change is refused or told."""
    names = "seed", "epochs", "batch_size", "world_size", "lr"
    return {"data": data.name} | {name: getattr(args, name) for name in names}


def load_newest(
    found: tuple[str, bytes] | None,
    model: torch.nn.Module,
    settings: dict[str, Any],
    group: dist.ProcessGroup,
) -> tuple[str | None, Progress, list[dict[str, Any]]]:
    """Load the newest checkpoint that any rank has found into `model`.

    Returns its path, progress and states of the optimizers, or None, no progress and no states
    if there is none. Raises UserError on all ranks if it comes from another kind of training.
    """
    # Not simply rank 0's: when machines join or leave, rank 0 may move to an empty disk.
    names = utils.gather(Path(found[0]).name if found else "", group)
    box = [found]
    dist.broadcast_object_list(box, src=names.index(max(names)), group=group)
    if not box[0]:
        return None, Progress(), []
    path, content = box[0]
    state = utils.decode_checkpoint(content)
    before = state["settings"]
    for name in ("data", "seed"):
        if before[name] != settings[name]:
            cure = f"choose another --checkpoint_dir, or the {name} of before"
            there, here = before[name], settings[name]
            raise UserError(f"{path} has {name} {there}, this run has {here}: {cure}")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is of another model; set --checkpoint_dir. {reason}")
    changes = [
        f"{k} from {before[k]} to {v}" for k, v in settings.items() if before[k] != v
    ]
    old, new = (s["batch_size"] * s["world_size"] for s in (before, settings))
    if old != new:
        changes.append(f"the global batch from {old} to {new} images")
    if changes:
        say(f"changed    {', '.join(changes)}")
    return path, Progress(**state["progress"]), state["optimizers"]


def create_run(
    args: argparse.Namespace,
    data: Dataset,
    model: torch.nn.Module,
    progress: Progress,
    saved: list[dict[str, Any]],
    device: torch.device,
) -> Run:
    """Put model and data on the device, the model in DDP, and what was saved in optimizers."""
    train, test = (Digits(d.images.to(device), d.labels.to(device)) for d in data[1:])
    model = model.to(device)
    ddp = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients live in the buffer that is sent: no copy
    )
    # DDP re-orders its gradient buckets after the first backward. With three ranks or more,
    # the order of summation changes too: unless it is over with now, the first step after a
    # resume rounds differently from that step of a run that was never interrupted.
    ddp(test.images[:1]).sum().backward()
    model.zero_grad()
    optimizers = create_optimizers(model)
    for optimizer, state in zip(optimizers, saved):
        optimizer.load_state_dict(state)
    return Run(args, Dataset(data.name, train, test), ddp, optimizers, progress)


def train_epoch(run: Run, stop: StopRequest) -> bool:
    """Train from where `run.progress` stands to the end of its epoch.

    Returns False on all ranks if one was asked to stop, and a checkpoint is written. Raises
    UserError on all ranks if the loss is not finite.
    """
    args, progress, total = run.args, run.progress, len(run.data.train.labels)
    started = time.perf_counter() - progress.seconds
    interval = 0.2 if sys.stdout.isatty() else 10.0
    next_line = time.perf_counter() + interval
    run.model.train()  # as layers such as dropout need it
    losses = []  # of this rank, since the ranks last met
    for images, labels, count in batches(
        run.data.train, args.batch_size, args.seed, progress.epoch, progress.images
    ):
        seen = progress.epoch * total + progress.images + count / 2
        # A function of the images seen leaves no scheduler to restore; with --epochs raised,
        # training goes on as a run of that length would from here.
        part = seen / (args.epochs * total)
        lr = args.lr * min(part / WARM_UP, (1 - part) / (1 - WARM_UP))
        losses.append(train_step(run, images, labels, count, lr))
        progress.images += count
        progress.step += 1
        saving = args.save_every and progress.step % args.save_every == 0
        last = total - progress.images < args.world_size
        if not (saving or last or progress.step % MEET_EVERY == 0):
            continue
        # In float64 a sum of float32 losses is exact: how they are grouped, and so an
        # interruption, leaves no trace. All ranks must stop after the same step, or those
        # that go on wait for ever.
        sums = torch.zeros(2, dtype=torch.float64, device=losses[0].device)
        sums[0] = torch.stack(losses).sum(dtype=torch.float64)
        sums[1] = bool(stop.signum)
        losses.clear()
        dist.all_reduce(sums)
        loss_sum, votes = sums.tolist()
        if not math.isfinite(loss_sum):
            where = f"by step {progress.step}"
            raise UserError(f"the loss is {loss_sum} {where}: rerun with a lower --lr")
        progress.loss_sum += loss_sum
        now = time.perf_counter()
        progress.seconds = now - started
        if now > next_line:
            next_line = now + interval
            show_progress(run)
        if votes or saving:
            path = save(run)
        if votes:
            say(f"stopped; {path} has all progress: rerun the same command to go on")
            return False
    return True


def show_progress(run: Run) -> None:
    """Print how far the epoch is, its mean loss so far, the speed and the time left."""
    progress, total = run.progress, len(run.data.train.labels)
    rate = progress.images / progress.seconds
    left = ((run.args.epochs - progress.epoch) * total - progress.images) / rate
    say(
        f"epoch {progress.epoch + 1}/{run.args.epochs}  step {progress.step}  "
        f"{progress.images:,}/{total:,} images  "
        f"loss {progress.loss_sum / progress.images:.4f}  "
        f"{rate:,.0f} images/s  {left:.0f} s left",
        passing=True,
    )


def train_step(
    run: Run, images: torch.Tensor, labels: torch.Tensor, count: int, lr: float
) -> torch.Tensor:
    """Take an optimizer step on the mean gradient over the `count` images of all ranks.

    Returns the summed loss of this rank's images, float32 [], still on the device: to read it
    here, as loss.item() does, would make the CPU wait for the GPU in every step.
    """
    logits = run.model(images)
    loss = F.cross_entropy(
        logits, labels, reduction="sum", label_smoothing=LABEL_SMOOTHING
    )
    # DDP averages over ranks; so scaled, that is the mean over images, in a short batch too.
    (loss * (dist.get_world_size() / count)).backward()
    optimizer_step(run.model.module, run.optimizers, lr)
    return loss.detach()


def finish_epoch(run: Run) -> Path:
    """Evaluate, record the epoch and save; return the path of the checkpoint."""
    old = run.progress
    test_loss, correct, total = evaluate(run.model.module, run.data.test)
    record = settings_of(run.args, run.data) | {
        "epoch": old.epoch + 1,
        "step": old.step,
        "train_loss": old.loss_sum / old.images,
        "test_loss": test_loss,
        "test_accuracy": correct / total,
        "correct": correct,
        "total": total,
        "images_per_second": old.images / old.seconds,
        "seconds": old.seconds,
    }
    history = [*old.history, record]
    run.progress = Progress(epoch=old.epoch + 1, step=old.step, history=history)
    path = save(run)
    say(
        f"epoch {old.epoch + 1}/{run.args.epochs}  train loss {record['train_loss']:.4f}  "
        f"test loss {test_loss:.4f}  accuracy {correct / total:.2%} ({correct}/{total})  "
        f"{record['images_per_second']:,.0f} images/s  {old.seconds:.1f} s  {path}"
    )
    return path


@torch.inference_mode()
def evaluate(model: torch.nn.Module, digits: Digits) -> tuple[float, int, int]:
    """Return mean cross-entropy, correct answers and images, summed over all ranks' shares.

    Each image counts once. DistributedSampler would pad the shares to equal lengths with
    duplicates, and the accuracy would depend on the world size.
    """
    model.eval()
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    sums = torch.zeros(3, dtype=torch.float64, device=digits.labels.device)
    for images, labels in zip(*(part[mine].split(1000) for part in digits)):
        logits = model(images)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
        sums[2] += len(labels)
    dist.all_reduce(sums)
    loss_sum, correct, total = sums.tolist()
    return loss_sum / total, int(correct), int(total)


def save(run: Run) -> Path:
    """Write a checkpoint and metrics.jsonl from rank 0; return the path of the checkpoint.

    Raises UserError on rank 0 if that fails, or the weights are not finite.
    """
    progress, folder = run.progress, run.args.checkpoint_dir
    path = folder / f"epoch{progress.epoch:05d}-image{progress.images:09d}.pt"
    if dist.get_rank() != 0:
        return path
    # Of the module: DDP's own state dict has "module." before each name, and would load into
    # nothing but another DDP model.
    weights = run.model.module.state_dict()
    state = {"model": weights, "optimizers": [o.state_dict() for o in run.optimizers]}
    state |= {"progress": asdict(progress), "settings": settings_of(run.args, run.data)}
    state |= {"torch": str(torch.__version__)}
    # All of the history, anew each time: appended lines would be doubled by a resume.
    metrics = "".join(json.dumps(record) + "\n" for record in progress.history)
    if progress.epoch == run.args.epochs:
        # First of all: to a rerun after the last checkpoint, nothing is left to do.
        picture = draw_mistakes(run.model.module, run.data.test)
        try:
            utils.write_atomically(folder / PICTURE, picture)
        except OSError as error:
            utils.warn(f"cannot draw {folder / PICTURE}: {error}")
    try:
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("the weights are not finite, lower --lr")
        utils.save_checkpoint(path, state, run.args.keep)
        utils.write_atomically(folder / "metrics.jsonl", metrics.encode())
    except (OSError, ValueError) as error:
        whole = [p for p in utils.checkpoint_paths(folder) if p.name <= path.name]
        good = whole[-1] if whole else "none"
        raise UserError(f"cannot save {path}: {error}; last good checkpoint: {good}")
    return path


@torch.inference_mode()
def draw_mistakes(model: torch.nn.Module, digits: Digits) -> bytes:
    """Return a PNG of up to 600 digits that the model gets wrong, as "true > predicted"."""
    from PIL import Image, ImageDraw, ImageFont  # comes with torchvision

    predicted = torch.cat([model(x).argmax(1) for x in digits.images.split(1000)])
    wrong = (predicted != digits.labels).nonzero().flatten().tolist()[:600]
    columns, width, height = 12, 80, 104  # pixels of the field for one digit
    sheet = Image.new("L", (columns * width, (len(wrong) // columns + 1) * height), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for n, i in enumerate(wrong):
        x, y = n % columns * width, n // columns * height
        pixels = bytes(digits.images[i].flatten().tolist())
        digit = Image.frombytes("L", (28, 28), pixels)
        sheet.paste(digit.resize((width - 4, width - 4)), (x + 2, y + 2))
        text = f"{digits.labels[i]} > {predicted[i]}"
        draw.text((x + width / 2, y + 90), text, 0, font, anchor="mm")
    sheet.save(png := io.BytesIO(), "PNG")
    return png.getvalue()


if __name__ == "__main__":
    args = parse_args()
    if utils.under_torchrun():
        work(int(os.environ["RANK"]), args, None)
    utils.launch(work, args, args.world_size)
