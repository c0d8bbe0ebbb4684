"""The program through every entrance: what it prints, writes and refuses."""

import os
import re
import socket
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
    own,
    run,
)

import train_ddp
import utils
from data import Digits, load_data
from model import ConvNet

RECORD = {
    *("epoch", "step", "train_loss", "test_loss", "test_accuracy", "images_per_second"),
    *("seconds", "lr", "world_size", "batch_size", "data", "seed"),
}


def check_result(output: str, folder: Path) -> None:
    """The last line names the result, which is that of the newest checkpoint."""
    last, result = newest(folder)["history"][-1], output.splitlines()[-1]
    assert result.startswith(f"epoch {last['epoch']}/{last['epochs']} ")
    assert f" accuracy {last['test_accuracy']:.2%} " in result
    assert result.endswith(checkpoints(folder)[-1].name)


def test_without_a_network_one_process_trains_on_the_sample(tmp_path):
    """Far from the repository, with a line every 200 steps."""
    folder = tmp_path / "mit Leerzeichen und Umläuten äöü"
    folder.mkdir()
    proxies = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"]
    offline = dict.fromkeys(proxies, "http://127.0.0.1:9")
    cmd = command("--epochs", 1, "--world_size", 1, "--batch_size", 32, data=False)
    done = run(cmd, folder, **offline)
    assert done.returncode == 0
    [record] = newest(folder / "checkpoints")["history"]
    assert record["data"].startswith("MNIST 10000+2000 ")
    assert (record["world_size"], record["step"]) == (1, 10000 // 32 + 1)
    assert record["test_accuracy"] > 0.95
    check_result(done.stdout, folder / "checkpoints")
    [step] = re.findall(r"^step .*", done.stdout, re.MULTILINE)
    assert re.fullmatch(r"step 200  train loss \d\.\d{4}", step)
    for text in "could not be downloaded", "BUNDLED SAMPLE", "data/MNIST/raw":
        assert text in done.stderr
    assert "Traceback" not in done.stderr


# Two runs at once that spawn their workers


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """Finished runs of 3 and of 2 processes, started at the same time."""
    folder = tmp_path_factory.mktemp("spawned")
    (folder / "big disk").mkdir()
    (folder / "link").symlink_to("big disk")
    three = ["--world_size", 3, "--save_every", 20, "--keep", 2, "--checkpoint_dir"]
    both = [
        subprocess.Popen(
            command("--epochs", 1, *more),
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
        one = SimpleNamespace(code=code, out=own(out), err=err, folder=folder / name)
        runs.append(one)
    return runs


def test_two_runs_at_once_both_succeed_with_an_empty_stderr(spawned):
    for one in spawned:
        assert (one.code, one.err) == (0, "")
        check_result(one.out, one.folder)
        assert newest(one.folder)["history"][0]["test_accuracy"] > 0.94
    assert checksum(spawned[0].folder) != checksum(spawned[1].folder)


def test_the_start_is_described_by_one_rank(spawned):
    for one, size in zip(spawned, [3, 2]):
        lines = one.out.splitlines()
        assert f"{size} on cpu, CPU threads each: 1" in lines[0]
        assert "MNIST 10000+2000" in lines[1] and "64 per rank" in lines[1]
        assert "from scratch" in lines[2]
        assert len(lines) == len({*lines})
        for word in "processes", "training", "start", "epoch":
            assert sum(line.startswith(f"{word} ") for line in lines) == 1


def test_the_line_of_an_epoch_has_all_its_numbers(spawned):
    for one in spawned:
        [record] = newest(one.folder)["history"]
        [line] = [line for line in one.out.splitlines() if line.startswith("epoch 1/1")]
        for text in (
            f"train loss {record['train_loss']:.4f}",
            f"test loss {record['test_loss']:.4f}",
            f"accuracy {record['test_accuracy']:.2%}",
            f"{record['images_per_second']:,.0f} images/s",
            f"{record['seconds']:.1f} s",
            str(checkpoints(one.folder)[-1].name),
        ):
            assert text in line


def test_the_record_of_an_epoch_adds_up(spawned):
    for one, size, steps in zip(spawned, [3, 2], [53, 79]):
        [record] = newest(one.folder)["history"]
        assert record.keys() >= RECORD
        assert (record["epoch"], record["step"]) == (1, steps)
        assert (record["world_size"], record["batch_size"]) == (size, 64)
        used = 10000 // size * size
        speed = record["images_per_second"] * record["seconds"]
        assert speed == pytest.approx(used)
        assert record["lr"] == pytest.approx(0.01 * (size * 64 / 128) ** 0.5)


def test_accuracy_is_that_of_a_plain_loop_over_the_test_set(spawned):
    """The bare model, loaded as a reader would; 2000 images don't divide by 3 processes."""
    _, _, test = load_data(SAMPLE)
    for one in spawned:
        model = ConvNet()
        model.load_state_dict(newest(one.folder)["model"])
        correct, loss = 0, 0.0
        with torch.inference_mode():
            for images, labels in zip(test.images.split(50), test.labels.split(50)):
                logits = model(images)
                correct += sum(logits.argmax(1).eq(labels).tolist())
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
        [record] = newest(one.folder)["history"]
        assert record["test_accuracy"] == correct / 2000
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
    inside = torch.load(checkpoints(three.folder)[0], weights_only=True)
    assert (inside["epoch"], inside["images"], inside["step"]) == (0, 40 * 3 * 64, 40)
    assert not list(three.folder.glob(".tmp*"))


def test_a_checkpoint_holds_all_that_is_needed(spawned):
    state = newest(spawned[0].folder)
    assert not any(name.startswith("module.") for name in state["model"])
    names = "data", "optimizer", "seed", "epochs", "batch_size", "world_size", "lr"
    assert {*state["args"]} >= {*names}
    assert state["args"]["optimizer"] == "AdamW"
    moments = state["optimizer"]["state"].values()
    assert {int(moment["step"]) for moment in moments} == {53}


# torchrun, and the same command again


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """A run of 1 epoch, its rerun with 2 threads, and one with --epochs 2 without torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    flags = "--world_size", 2, "--keep", 1
    first = run(command("--epochs", 1, *flags, torchrun=2), folder)
    sums = [checksum(folder / "checkpoints")]
    again = command("--epochs", 1, *flags, torchrun=2)
    again = run(again, folder, OMP_NUM_THREADS="2")
    sums.append(checksum(folder / "checkpoints"))
    longer = run(command("--epochs", 2, *flags), folder)
    return SimpleNamespace(
        first=first,
        again=again,
        longer=longer,
        sums=sums,
        folder=folder / "checkpoints",
    )


def test_under_torchrun_only_rank_zero_speaks(torchrun):
    first = torchrun.first
    assert first.returncode == 0
    assert len(first.stdout.splitlines()) == len({*first.stdout.splitlines()})
    # torchrun itself prints a warning about OMP_NUM_THREADS.
    assert not re.search("error|Error|Traceback|Warning", first.stderr)


def test_a_rank_has_one_thread_unless_the_user_sets_another_number(torchrun):
    assert "2 on cpu, CPU threads each: 1\n" in torchrun.first.stdout
    assert "2 on cpu, CPU threads each: 2\n" in torchrun.again.stdout
    assert "2 on cpu, CPU threads each: 1\n" in torchrun.longer.stdout


def test_a_rerun_of_a_finished_run_changes_nothing(torchrun):
    again = torchrun.again
    assert again.returncode == 0
    assert torchrun.sums[0] == torchrun.sums[1]
    [accuracy] = re.findall(r"accuracy (\S+%)", torchrun.first.stdout)
    assert again.stdout.splitlines()[-1] == f"finished   test accuracy {accuracy}"
    assert not re.search("^(epoch|step) ", again.stdout, re.MULTILINE)


def test_more_epochs_continue_from_the_last(torchrun):
    longer = torchrun.longer
    assert (longer.returncode, longer.stderr) == (0, "")
    assert "changed    epochs from 1 to 2\n" in longer.stdout
    assert re.search(r"start .*epoch00001-image000000000\.pt", longer.stdout)
    assert not re.search(r"^epoch 1/", longer.stdout, re.MULTILINE)
    check_result(longer.stdout, torchrun.folder)
    records = newest(torchrun.folder)["history"]
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["step"] == 2 * records[0]["step"]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert len(checkpoints(torchrun.folder)) == 1


def test_two_plain_processes_with_the_variables_of_torchrun_train_together(
    torchrun, tmp_path
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            command("--epochs", 1),
            cwd=tmp_path,
            env=os.environ | env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [own(process.communicate(timeout=60)[0]) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "2 on cpu" in outputs[0] and outputs[1] == ""
    assert checksum(tmp_path / "checkpoints") == torchrun.sums[0]


@pytest.mark.slow
def test_a_standard_output_that_is_closed_costs_nothing(tmp_path):
    closed = ["bash", "-c", 'exec "$@" >&-', "-"]
    result = run([*closed, *command("--epochs", 1)], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


# Flags


@pytest.fixture
def parse(monkeypatch):
    for name in {*utils.LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE"} & {*os.environ}:
        monkeypatch.delenv(name)

    def parse_flags(flags: str):
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *flags.split()])
        return train_ddp.parse_args()

    return parse_flags


@pytest.fixture
def under_torchrun(monkeypatch):
    def fake(world_size: int, local: int, rank: int = 0, local_rank: int = 0) -> None:
        env = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size}
        env |= {"LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "::1", "MASTER_PORT": 9}
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
    for default in "(3)", "(64)", "(0)", "(data)", "(checkpoints)", "0.01 * sqrt":
        assert default in shown


def test_the_learning_rate_follows_the_global_batch_unless_it_is_given(parse):
    assert parse("--batch_size 128").lr == pytest.approx(0.01)
    assert parse("--batch_size 64 --world_size 2").lr == pytest.approx(0.01)
    assert parse("--batch_size 64 --world_size 8").lr == pytest.approx(0.02)
    assert parse("--batch_size 64 --world_size 8 --lr 0.3").lr == 0.3


def test_world_size_must_be_that_of_torchrun(parse, under_torchrun, capsys):
    under_torchrun(world_size=4, local=4)
    assert parse("").world_size == 4
    assert parse("--world_size 4").world_size == 4
    for flags in "--world_size 3", "--world_size=3", "--world_size 1":
        error = refused(parse, flags, capsys)
        assert flags[-1] in error and "4" in error


def test_wrong_flags_are_reported_by_one_rank_on_each_machine(
    parse, under_torchrun, capsys
):
    under_torchrun(rank=5, world_size=8, local_rank=0, local=4)
    refused(parse, "--epochs 0", capsys)
    refused(parse, "--world_size 3", capsys)
    under_torchrun(rank=6, world_size=8, local_rank=1, local=4)
    for flags in "--epochs 0", "--world_size 3":
        with pytest.raises(SystemExit) as caught:
            parse(flags)
        assert caught.value.code == 2
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", [["RANK"], ["WORLD_SIZE"], ["WORLD_SIZE", "RANK"]])
def test_variables_of_torchrun_that_are_missing_are_named(
    parse, monkeypatch, capsys, given
):
    """Otherwise each process would train alone, in the folder of the others."""
    for name in given:
        monkeypatch.setenv(name, "0")
    named = {*re.findall("[A-Z]+_?[A-Z]+", refused(parse, "", capsys).split("but")[1])}
    assert named == {*utils.LAUNCHER_VARIABLES} - {*given}


def test_one_process_per_gpu_and_no_more(parse, two_gpus, under_torchrun, capsys):
    assert parse("").world_size == 2
    assert parse("--world_size 1").world_size == 1
    error = refused(parse, "--world_size 3", capsys)
    assert "3" in error and "2" in error
    under_torchrun(world_size=4, local=2)  # two machines
    assert parse("").world_size == 4
    under_torchrun(world_size=4, local=4)
    error = refused(parse, "", capsys)
    assert "4" in error and "2" in error


def test_restarts_on_several_machines_need_a_store_for_each(
    parse, under_torchrun, monkeypatch, capsys
):
    """In a shared store, the ranks would find addresses of dead ones, and hang."""
    for machines, restarts, shared in (
        (2, 3, True),
        (2, 0, True),
        (2, 3, False),
        (1, 3, True),
    ):
        under_torchrun(world_size=2 * machines, local=2)
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(shared))
        if (machines, restarts, shared) == (2, 3, True):
            error = refused(parse, "", capsys)
            assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in error
        else:
            assert parse("").world_size == 2 * machines


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


@pytest.mark.parametrize("cores", [2, 8])
def test_cores_that_stay_idle_get_a_hint(monkeypatch, capsys, cores):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = {"world_size": 2, "batch_size": 64, "lr": 0.1, "checkpoint_dir": "x"}
    train_ddp.report_start(SimpleNamespace(data="MNIST", **args), "cpu", None)
    hints = re.findall("^hint .*", capsys.readouterr().out, re.MULTILINE)
    if cores == 2:
        assert hints == []
    else:
        [hint] = hints
        assert re.search("2 of 8 .*--world_size 8 .*--nproc_per_node=8", hint)


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_process_group(monkeypatch, two_gpus, tmp_path, gpu, machines):
    """On one machine it keeps to loopback; on more, the user's choice of interface stays.

    With CUDA, each local rank takes its own GPU, and repeats its results bit by bit.
    """
    groups, chosen = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(dist, "init_process_group", lambda **kw: groups.append(kw))
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "set so that it is restored")
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    env = {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    env |= {"WORLD_SIZE": str(4 * machines)}
    env |= {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    device = utils.join_process_group(f"file://{tmp_path}/store")
    [group] = groups
    assert device == torch.device("cuda:1" if gpu else "cpu")
    assert group["backend"] == ("cpu:gloo,cuda:nccl" if gpu else "gloo")
    assert (group["rank"], group["world_size"]) == (3, 4 * machines)
    assert group["device_id"] == (device if gpu else None)
    assert group["timeout"] == utils.TIMEOUT
    for name in "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME":
        assert os.environ[name].startswith("lo" if machines == 1 else "eth")
    assert chosen == ([1] if gpu else [])
    assert torch.backends.cudnn.deterministic == gpu
    assert os.environ.get("NCCL_NVLS_ENABLE") == ("0" if gpu else None)


# Pieces


def evaluate_some(counts: list[int]) -> list[dict]:
    _, _, test = load_data(SAMPLE)
    torch.manual_seed(0)
    model = torch.nn.Sequential(ConvNet(), torch.nn.Dropout(0.5))
    images, labels = test.images, test.labels
    return [train_ddp.evaluate(model, Digits(images[:n], labels[:n])) for n in counts]


def test_evaluation_counts_each_image_once_at_any_number_of_ranks():
    """Also where some ranks get fewer images than others, or none; and without dropout."""
    counts = [1, 2, 3, 100, 1999]
    _, _, test = load_data(SAMPLE)
    torch.manual_seed(0)
    model = ConvNet()
    with torch.inference_mode():
        logits = model(test.images)
    for results in in_ranks(3, evaluate_some, counts):
        for n, result in zip(counts, results, strict=True):
            right = int((logits[:n].argmax(1) == test.labels[:n]).sum())
            loss = F.cross_entropy(logits[:n], test.labels[:n]).item()
            assert result == {
                "test_loss": pytest.approx(loss, rel=1e-5),
                "test_accuracy": right / n,
            }


def scheduling_policies() -> list[int]:
    """The scheduling policies of the threads of gloo."""
    tasks = [*Path("/proc/self/task").iterdir()]
    named = [task for task in tasks if "gloo" in (task / "comm").read_text()]
    if not named:  # as with torch 2.10: those that started last
        named = sorted(tasks, key=lambda task: int(task.name))[-2:]
    return [os.sched_getscheduler(int(task.name)) for task in named]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has it")
def test_the_threads_of_gloo_are_scheduled_as_batch_jobs():
    """Otherwise they preempt each other: two ranks lose a third of their speed."""
    for policies in in_ranks(2, scheduling_policies):
        assert policies and {*policies} == {os.SCHED_BATCH}
