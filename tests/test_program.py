"""The program through every entrance: what it prints, writes and refuses."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    SAMPLE,
    checkpoints,
    checksum,
    command,
    in_ranks,
    newest,
    run,
)
from PIL import Image

import train_ddp
import utils
from data import Dataset, Digits, load_mnist
from model import ConvNet, create_optimizers, optimizer_step

METRICS = {
    *("epoch", "step", "train_loss", "test_loss", "test_accuracy", "correct", "total"),
    *("images_per_second", "seconds", "lr", "world_size", "batch_size", "data"),
}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def check_result(output: str, folder: Path, epochs: int) -> None:
    """The last lines name the result, which is that of metrics.jsonl, and the files."""
    last = metrics(folder)[-1]
    lines = output.splitlines()[-4:]
    assert lines[0].startswith("result ")
    assert f"{last['test_accuracy']:.2%}" in lines[0] and last["data"] in lines[0]
    assert re.match(r"weights +\S.*epoch0000\d-image000000000\.pt$", lines[1])
    assert re.match(r"mistakes +\S.*mistakes\.png$", lines[2])
    assert f"--epochs {epochs + 3}" in lines[3]


# One process, in a terminal, far from the repository, with no network


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sub") / "mit Leerzeichen und Umläuten äöü"
    folder.mkdir()
    screen, terminal = pty.openpty()
    proxies = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"]
    env = os.environ | dict.fromkeys(proxies, "http://127.0.0.1:9")
    env["OMP_NUM_THREADS"] = "1"  # threads wait for each other on busy cores
    with (folder / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            command("--epochs", 1, "--world_size", 1, data=False),
            cwd=folder,
            env=env,
            stdout=terminal,
            stderr=stderr,
        )
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(screen, 4096):
                shown += part
        except OSError:
            pass  # the other side was closed
        os.close(screen)
        code = process.wait(60)
    return SimpleNamespace(folder=folder, code=code, shown=shown.decode())


def test_without_a_network_one_process_trains_on_the_sample(offline):
    assert offline.code == 0
    [record] = metrics(offline.folder / "checkpoints")
    assert record["data"].startswith("MNIST sample 10000+2000")
    assert record["world_size"] == 1
    assert record["test_accuracy"] > 0.96
    check_result(
        offline.shown.replace("\x1b[K", ""), offline.folder / "checkpoints", epochs=1
    )
    assert (
        offline.shown.count("MNIST sample 10000+2000") == 2
    )  # at start, in the result
    warning = (offline.folder / "stderr").read_text()
    assert "could not be downloaded" in warning
    assert "BUNDLED SAMPLE" in warning
    assert "data/MNIST/raw" in warning
    assert "Traceback" not in warning


def test_a_terminal_shows_progress_on_one_line(offline):
    passing = re.findall(
        r"\r\x1b\[K(epoch 1/1 +step \d+ +[\d,]+/10,000 images +loss \d\S* +[\d,]+ images/s +\d+ s left)(?=\r\x1b)",
        offline.shown,
    )
    assert passing, offline.shown


# Two runs at once that spawn their workers


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """Finished runs of 3 and of 2 processes, started at the same time."""
    folder = tmp_path_factory.mktemp("spawned")
    (folder / "big disk").mkdir()
    (folder / "link").symlink_to("big disk")
    flags = "--epochs", 1
    three = ["--world_size", 3, "--save_every", 20, "--keep", 2, "--checkpoint_dir"]
    both = [
        subprocess.Popen(
            command(*flags, *more),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in ([*three, "link"], ["--world_size", 2, "--seed", 1])
    ]
    runs = []
    for process, name in zip(both, ["link", "checkpoints"]):
        out, err = process.communicate(timeout=120)
        code = process.returncode
        runs.append(SimpleNamespace(code=code, out=out, err=err, folder=folder / name))
    return runs


def test_two_runs_at_once_both_end_well_and_say_nothing_to_stderr(spawned):
    for one in spawned:
        assert (one.code, one.err) == (0, "")
        check_result(one.out, one.folder, epochs=1)
        assert metrics(one.folder)[0]["test_accuracy"] > 0.95
    assert checksum(spawned[0].folder) != checksum(spawned[1].folder)


def test_the_start_is_described_by_one_rank(spawned):
    parameters = sum(weight.numel() for weight in ConvNet().parameters())
    for one, size in zip(spawned, [3, 2]):
        threads = max(1, len(os.sched_getaffinity(0)) // size)
        lines = one.out.splitlines()
        assert f"{size} on cpu over gloo, CPU threads each: {threads}" in lines[0]
        assert "MNIST sample 10000+2000" in lines[1]
        assert f"{parameters:,}" in lines[2]
        assert f"{size} x 64" in lines[3]
        assert "from scratch" in lines[4]
        assert len(lines) == len({*lines})
        for word in (
            "processes",
            "data",
            "model",
            "batch",
            "start",
            "epoch 1/1",
            "result",
        ):
            assert sum(line.startswith(word) for line in lines) == 1
        assert "\r" not in one.out and "\x1b" not in one.out  # not a terminal


def test_the_line_of_an_epoch_has_all_its_numbers(spawned):
    for one in spawned:
        [record] = metrics(one.folder)
        [line] = [line for line in one.out.splitlines() if line.startswith("epoch 1/1")]
        for text in (
            f"train loss {record['train_loss']:.4f}",
            f"test loss {record['test_loss']:.4f}",
            f"{record['test_accuracy']:.2%} ({record['correct']}/{record['total']})",
            f"{record['images_per_second']:,.0f} images/s",
            f"{record['seconds']:.1f} s",
            str(checkpoints(one.folder)[-1].name),
        ):
            assert text in line


def test_metrics_have_every_key_and_add_up(spawned):
    for one, size, steps in zip(spawned, [3, 2], [53, 79]):
        [record] = metrics(one.folder)
        assert record.keys() >= METRICS
        assert (record["epoch"], record["step"]) == (1, steps)
        assert (record["world_size"], record["batch_size"]) == (size, 64)
        assert record["total"] == 2000
        assert record["test_accuracy"] == record["correct"] / 2000
        used = 10000 // size * size
        speed = record["images_per_second"] * record["seconds"]
        assert speed == pytest.approx(used)
        assert record["lr"] == pytest.approx(0.01 * (size * 64 / 128) ** 0.5)


def test_accuracy_is_that_of_a_plain_loop_over_the_test_set(spawned):
    """The bare model, loaded as a reader would; 2000 images don't divide by 3 processes."""
    _, _, test = load_mnist(SAMPLE)
    for one in spawned:
        model = ConvNet()
        model.load_state_dict(newest(one.folder)["model"])
        correct, loss = 0, 0.0
        with torch.inference_mode():
            for images, labels in zip(test.images.split(50), test.labels.split(50)):
                logits = model(images)
                correct += sum(logits.argmax(1).eq(labels).tolist())
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
        [record] = metrics(one.folder)
        assert record["correct"] == correct
        assert record["test_loss"] == pytest.approx(loss / 2000, rel=1e-4)


def test_save_every_and_keep(spawned):
    """Saved at steps 20, 40 and the end, and the two newest are kept; else the end alone."""
    three, two = spawned
    assert three.folder.is_symlink()
    names = [path.name for path in checkpoints(three.folder)]
    assert names == [
        f"epoch00000-image{40 * 3 * 64:09d}.pt",
        "epoch00001-image000000000.pt",
    ]
    assert [path.name for path in checkpoints(two.folder)] == names[1:]
    inside = torch.load(checkpoints(three.folder)[0], weights_only=True)["progress"]
    assert (inside["epoch"], inside["images"], inside["step"]) == (0, 40 * 3 * 64, 40)
    assert not list(three.folder.glob(".tmp*"))


def test_a_checkpoint_holds_all_that_is_needed(spawned):
    state = newest(spawned[0].folder)
    assert not any(name.startswith("module.") for name in state["model"])
    assert state["torch"] == torch.__version__
    assert {tensor.device.type for tensor in state["model"].values()} == {"cpu"}
    assert state["settings"]["data"].startswith("MNIST sample 10000+2000")
    for name in "seed", "epochs", "batch_size", "world_size", "lr":
        assert name in state["settings"]
    inner = [o["state"] for o in state["optimizers"]]
    assert all(inner) and 53 in [s.get("step") for o in inner for s in o.values()]


def test_mistakes_are_drawn(spawned):
    for one in spawned:
        with Image.open(one.folder / "mistakes.png") as picture:
            assert picture.format == "PNG"
            picture.load()
            assert min(picture.size) > 28
            assert len(picture.convert("L").getcolors()) > 10
        # Before the last checkpoint: after that, a rerun finds training complete.
        drawn = (one.folder / "mistakes.png").stat().st_mtime_ns
        assert drawn <= checkpoints(one.folder)[-1].stat().st_mtime_ns


# torchrun, and the same command again


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Outputs of: a run of 1 epoch, its rerun, and one with --epochs 2 by another launcher."""
    folder = tmp_path_factory.mktemp("torchrun")
    flags = "--world_size", 2, "--keep", 1
    first = run(command("--epochs", 1, *flags, torchrun=2), folder)
    sums = [checksum(folder / "checkpoints")]
    again = run(command("--epochs", 1, *flags, torchrun=2), folder)
    sums.append(checksum(folder / "checkpoints"))
    longer = run(command("--epochs", 2, *flags), folder)
    return SimpleNamespace(
        first=first,
        again=again,
        longer=longer,
        sums=sums,
        folder=folder / "checkpoints",
    )


def test_torchrun_shares_the_cores_out_and_only_rank_zero_speaks(torchrun):
    first = torchrun.first
    assert first.returncode == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"2 on cpu over gloo, CPU threads each: {threads}" in first.stdout
    assert len(first.stdout.splitlines()) == len({*first.stdout.splitlines()})
    # torchrun itself has something to say about OMP_NUM_THREADS.
    assert not re.search("error|Error|Traceback|Warning", first.stderr)


def test_a_rerun_of_a_finished_run_says_so_and_changes_nothing(torchrun):
    again = torchrun.again
    assert again.returncode == 0
    assert "complete" in again.stdout
    assert torchrun.sums[0] == torchrun.sums[1]
    result = re.compile("^result .*", re.MULTILINE)
    assert result.findall(again.stdout) == result.findall(torchrun.first.stdout)
    assert "--epochs 4" in again.stdout


def test_a_rerun_of_a_finished_run_imports_no_more_than_it_needs(torchrun):
    """DDP's constructor imports the compiler, a download torchvision: a second each."""
    cmd = [*command("--epochs", 1, "--world_size", 1)]
    flags = "-X", "importtime"
    done = run([cmd[0], *flags, *cmd[1:]], torchrun.folder.parent)
    assert "complete" in done.stdout
    assert " torch.nn.parallel" in done.stderr
    assert not re.search(" torch._dynamo$| torchvision$", done.stderr, re.MULTILINE)


def test_more_epochs_go_on_from_the_last(torchrun):
    longer = torchrun.longer
    assert (longer.returncode, longer.stderr) == (0, "")
    assert re.search(r"epochs from 1 to 2", longer.stdout)
    assert re.search(r"start .*epoch00001-image000000000\.pt", longer.stdout)
    assert not re.search(r"^epoch 1/", longer.stdout, re.MULTILINE)
    check_result(longer.stdout, torchrun.folder, epochs=2)
    records = metrics(torchrun.folder)
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["step"] == 2 * records[0]["step"]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert len(checkpoints(torchrun.folder)) == 1


def test_a_picture_that_cannot_be_drawn_costs_no_checkpoint(tmp_path):
    """And a standard output that is closed costs nothing."""
    (tmp_path / "checkpoints" / "mistakes.png").mkdir(parents=True)
    cmd = [
        "bash",
        "-c",
        'exec "$@" >&-',
        "-",
        *command("--epochs", 1, "--world_size", 2),
    ]
    first = run(cmd, tmp_path)
    assert first.returncode == 0, first.stderr
    assert re.search("cannot draw .*mistakes.png", first.stderr)
    assert len(checkpoints(tmp_path / "checkpoints")) == 1
    again = run(command("--epochs", 1, "--world_size", 2), tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert re.search("^mistakes +there is no picture", again.stdout, re.MULTILINE)


# Flags


@pytest.fixture
def parse(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("TORCHELASTIC") or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)

    def parse_flags(flags: str):
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *flags.split()])
        return train_ddp.parse_args()

    return parse_flags


@pytest.fixture
def under_torchrun(monkeypatch):
    def fake(rank: int, world_size: int, local: int) -> None:
        env = {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank}
        env |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": local}
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))

    return fake


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def refused(parse, flags: str, capsys) -> str:
    """The one line with which wrong flags end the program."""
    with pytest.raises(SystemExit) as caught:
        parse(flags)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize(
    "flags",
    [
        *(
            f"--{name} {value}"
            for name in ["epochs", "batch_size"]
            for value in [0, -1]
        ),
        *(f"--{name} 0" for name in ["world_size", "save_every", "keep", "lr"]),
        *("--world_size -2", "--epochs 1.5", "--epochs many", "--epochs", "--seed x"),
        *("--seed -1", f"--seed {2**63}", "--epochs 100000"),
        *("--data_dir=", "--checkpoint_dir="),  # an unset shell variable
        *("--lr nan", "--lr inf", "--lr -0.1", "--unknown 1", "--epoch 3", "stray"),
    ],
)
def test_wrong_flags_get_one_line_that_names_them(parse, capsys, flags):
    assert flags.split()[0].rstrip("=") in refused(parse, flags, capsys)


def test_flags_and_their_defaults(parse, capsys, monkeypatch):
    args = parse("")
    assert (args.epochs, args.batch_size, args.world_size, args.seed) == (3, 64, 1, 0)
    assert (str(args.data_dir), str(args.checkpoint_dir)) == ("data", "checkpoints")
    assert (args.save_every, args.keep) == (None, 3)
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for flag in vars(args):
        assert f"--{flag}" in shown
    for default in "(3)", "(64)", "(0)", "./data", "./checkpoints", "0.01 * sqrt":
        assert default in shown


def test_the_learning_rate_follows_the_global_batch_unless_it_is_given(parse):
    assert parse("--batch_size 128").lr == pytest.approx(0.01)
    assert parse("--batch_size 64 --world_size 2").lr == pytest.approx(0.01)
    assert parse("--batch_size 64 --world_size 8").lr == pytest.approx(0.02)
    assert parse("--batch_size 64 --world_size 8 --lr 0.3").lr == 0.3


def test_world_size_must_be_that_of_torchrun(parse, under_torchrun, capsys):
    under_torchrun(rank=0, world_size=4, local=4)
    assert parse("").world_size == 4
    assert parse("--world_size 4").world_size == 4
    for flags in "--world_size 3", "--world_size=3", "--world_size 1":
        error = refused(parse, flags, capsys)
        assert flags[-1] in error and "4" in error


def test_under_torchrun_only_rank_zero_tells_of_wrong_flags(
    parse, under_torchrun, capsys
):
    under_torchrun(rank=1, world_size=2, local=2)
    with pytest.raises(SystemExit) as caught:
        parse("--epochs 0")
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_one_process_per_gpu_and_no_more(parse, two_gpus, under_torchrun, capsys):
    assert parse("").world_size == 2
    assert parse("--world_size 1").world_size == 1
    error = refused(parse, "--world_size 3", capsys)
    assert "3" in error and "2" in error
    under_torchrun(rank=0, world_size=4, local=2)  # two machines
    assert parse("").world_size == 4
    under_torchrun(rank=0, world_size=4, local=4)
    error = refused(parse, "", capsys)
    assert "4" in error and "2" in error


def test_more_processes_than_a_machine_can_bear_are_refused(parse, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert parse("--world_size 64").world_size == 64
    assert "64" in refused(parse, "--world_size 65", capsys)


def test_more_images_per_step_than_there_are_get_one_line(tmp_path):
    result = run(command("--batch_size", 5001, "--world_size", 2), tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert "10002" in line and "10000" in line and "--batch_size" in line


def test_wrong_flags_touch_no_file(tmp_path):
    result = run(command("--epochs", 0, "--world_size", 2), tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    result = run(command("--world_size", 3, torchrun=2), tmp_path)
    assert result.returncode != 0
    [error] = re.findall(r"^error: .*", result.stderr, re.MULTILINE)
    assert "3" in error and "2" in error
    assert list(tmp_path.iterdir()) == []


# The process group


@pytest.mark.parametrize(
    ("wish", "torchrun", "local", "expected"),
    [
        (None, False, 1, 8),
        (None, False, 3, 2),
        (None, False, 16, 1),
        (None, True, 1, 8),
        ("1", True, 2, 4),  # torchrun's own setting
        ("1", True, 1, None),  # torchrun sets none for a single process
        ("1", False, 2, None),
        ("3", True, 2, None),
        ("3", False, 2, None),
        ("0", False, 2, 4),  # not a number of threads
        ("many", True, 2, 4),
    ],
)
def test_ranks_share_the_usable_cores(monkeypatch, wish, torchrun, local, expected):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    for name, value in {
        "OMP_NUM_THREADS": wish,
        "TORCHELASTIC_RUN_ID": "none" if torchrun else None,
    }.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    utils.set_threads(local)
    assert chosen == ([expected] if expected else [])


def test_each_local_rank_takes_its_gpu_and_nccl(monkeypatch, two_gpus):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert utils.choose_device(1) == ("nccl", torch.device("cuda", 1))
    assert chosen == [1]
    assert torch.backends.cudnn.deterministic


def test_without_a_gpu_gloo_and_the_cpu_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.choose_device(1) == ("gloo", torch.device("cpu"))


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_process_group(monkeypatch, two_gpus, gpu, machines):
    """On one machine it keeps to loopback; on more, the user's choice of interface stays."""
    calls, policies = [], []

    def forbid(_, policy: int, __) -> None:  # as some sandboxes do
        policies.append(policy)
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **kw: calls.append((args, kw))
    )
    monkeypatch.setattr(
        dist, "destroy_process_group", lambda: calls.append("destroyed")
    )
    env = {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    env |= {"WORLD_SIZE": str(2 * machines)}
    env |= {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    store = object()
    with utils.process_group(store) as device:
        [(args, kw)] = calls
        assert device == torch.device("cuda:1" if gpu else "cpu")
        assert args == ("nccl" if gpu else "gloo",)
        assert kw["store"] is store
        assert (kw["rank"], kw["world_size"]) == (1, 2 * machines)
        assert kw["device_id"] == (device if gpu else None)
        for name in "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME":
            expected = "lo" if machines == 1 else "eth"
            assert os.environ[name].startswith(expected)
    assert calls[1:] == ["destroyed"]
    assert policies == ([] if gpu else [os.SCHED_BATCH])


def policies() -> dict[str, int]:
    """The scheduling policy of each thread of this process, by name."""
    tasks = Path("/proc/self/task").iterdir()
    return {(t / "comm").read_text(): os.sched_getscheduler(int(t.name)) for t in tasks}


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has it")
def test_the_threads_of_gloo_are_scheduled_as_batch_jobs():
    """Or they preempt and spin for each other: an all-reduce takes three times as long."""
    for rank in in_ranks(2, policies):
        gloo = {name: policy for name, policy in rank.items() if "gloo" in name}
        assert gloo and set(gloo.values()) == {os.SCHED_BATCH}, rank


class Movable:
    """Stands for a tensor or module that can be moved to a GPU that is not there."""

    def __init__(self, value) -> None:
        self.value, self.labels, self.images = value, value, value

    def to(self, device):
        assert device.type == "cuda"
        return self.value


@pytest.mark.parametrize("device", [None, SimpleNamespace(type="cuda", index=1)])
def test_ddp_is_told_of_its_gpu_and_only_of_a_gpu(monkeypatch, device):
    told = []

    def fake_ddp(model, device_ids=None, **kwargs):
        told.append(device_ids)
        return model

    digits = Digits(torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1).long())
    model = train_ddp.create_model(0)
    if device:
        digits, model = Digits(*map(Movable, digits)), Movable(model)
    monkeypatch.setattr(train_ddp, "DistributedDataParallel", fake_ddp)
    device, data = device or torch.device("cpu"), Dataset("none", digits, digits)
    progress = train_ddp.Progress()
    args = SimpleNamespace()
    created = train_ddp.create_run(args, data, model, progress, [], device)
    assert told == [[1] if device.type == "cuda" else None]
    assert isinstance(created.data.train.images, torch.Tensor)  # has been moved


# Pieces


def evaluate_some(counts: list[int]) -> list[tuple]:
    _, _, test = load_mnist(SAMPLE)
    torch.manual_seed(0)
    model = torch.nn.Sequential(ConvNet(), torch.nn.Dropout(0.5))
    return [train_ddp.evaluate(model, Digits(*(x[:n] for x in test))) for n in counts]


def test_evaluation_counts_each_image_once_at_any_number_of_ranks():
    """Also where some ranks get fewer images than others, or none; and without dropout."""
    counts = [1, 2, 3, 100, 1999]
    _, _, test = load_mnist(SAMPLE)
    torch.manual_seed(0)
    model = ConvNet()
    with torch.inference_mode():
        logits = model(test.images)
    for results in in_ranks(3, evaluate_some, counts):
        for n, (loss, correct, total) in zip(counts, results, strict=True):
            right = (logits[:n].argmax(1) == test.labels[:n]).sum()
            expected = F.cross_entropy(logits[:n], test.labels[:n]).item()
            assert (correct, total) == (int(right), n)
            assert loss == pytest.approx(expected, rel=1e-5)


def test_any_model_gets_its_optimizers_and_frozen_layers_stay():
    frozen = ConvNet().layers
    for weight in frozen[2].parameters():
        weight.requires_grad_(False)
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    for model, count in (ConvNet().layers, 2), (frozen, 2), (plain, 1):
        optimizers = create_optimizers(model.to(memory_format=torch.channels_last))
        assert len(optimizers) == count
        before = [weight.detach().clone() for weight in model.parameters()]
        model(torch.rand(8, 1, 28, 28)).square().sum().backward()
        optimizer_step(model, optimizers, 0.01)
        for old, new in zip(before, model.parameters()):
            assert old.equal(new) != new.requires_grad
            assert new.grad is None


def test_only_rank_zero_speaks_and_a_terminal_line_is_replaced(monkeypatch, capsys):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    utils.say("from rank 1")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    utils.say("plain", passing=True)
    assert capsys.readouterr().out == "plain\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    utils.say("passing", passing=True)
    utils.say("stays")
    assert capsys.readouterr().out == "\r\x1b[Kpassing\r\x1b[Kstays\n"
