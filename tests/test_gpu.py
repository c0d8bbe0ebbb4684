"""The code for GPUs, on a machine without one: its decisions, and where its tensors are."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, assert_same_result, in_ranks, train_as_rank
from torch import Tensor
from torch.overrides import TorchFunctionMode

import data
import train_ddp
import utils

GPU = torch.device("cuda", 0)

# ---------------------------------------------------------------- decisions


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs; return the list of those that are chosen."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    for name in "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME":
        monkeypatch.setenv(name, "eth7")
    for name in "WORLD_SIZE", "LOCAL_WORLD_SIZE":
        monkeypatch.setenv(name, "1")
    for name in "RANK", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "NCCL_NVLS_ENABLE":
        # After setenv, what the code sets is taken back, too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def pretend(count: int, usable: bool = True) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return chosen

    return pretend


def join() -> tuple[torch.device, dict[str, Any]]:
    """Join a group; return the device, and what the process group is told."""
    init = Mock()
    store = patch("utils.open_store", lambda: ("the store", 3, 8))
    with store, patch("torch.distributed.init_process_group", init):
        device = utils.init_distributed()
    return device, {"backend": init.call_args.args[0], **init.call_args.kwargs}


def assert_told(told: dict[str, Any], **expected: Any) -> None:
    told = {name: told[name] for name in expected}
    assert told == expected, f"the process group should be told {expected}"


def test_each_rank_joins_with_the_gpu_of_its_local_rank(gpus, monkeypatch):
    """NCCL sends what is on it, and gloo the rest."""
    chosen = gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device, told = join()
    second = torch.device("cuda", 1)
    assert device == second, f"local rank 1 trains on {device}"
    assert chosen == [second], f"the current GPU of local rank 1 is {chosen}"
    assert_told(told, backend="cpu:gloo,cuda:nccl", device_id=second)
    assert_told(told, store="the store", rank=3, world_size=8)


@pytest.mark.parametrize("count", [0, 2])
def test_without_a_usable_gpu_all_is_on_the_cpu(gpus, count):
    """A driver that is too old, for example, leaves GPUs that cannot be used."""
    chosen = gpus(count, usable=False)
    device, told = join()
    assert device == CPU, f"without a usable GPU it trains on {device}"
    assert chosen == [], "a GPU is taken that cannot be used"
    assert_told(told, backend="gloo", device_id=None)


@pytest.mark.parametrize("machines, interface", [(1, "lo"), (2, "eth7")])
def test_ranks_on_one_machine_keep_to_loopback(gpus, monkeypatch, machines, interface):
    """On several, the user's choice of an interface stays."""
    gpus(1)
    monkeypatch.setenv("WORLD_SIZE", str(machines))
    join()
    for name in "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME":
        chosen = os.environ[name]
        assert chosen.startswith(interface), f"{name} is {chosen}, not {interface}"


def test_a_rank_without_a_gpu_of_its_own_is_refused_in_one_line(gpus, monkeypatch):
    chosen = gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit) as caught:
        join()
    line = str(caught.value.code)
    assert line.startswith("error: LOCAL_RANK is 2, but there are 2 GPU(s)"), line
    assert "\n" not in line, f"this is more than one line: {line}"
    assert chosen == [], "a GPU is taken that is not there"


def test_a_gpu_repeats_its_results_unless_the_user_wants_otherwise(gpus, monkeypatch):
    gpus(1)
    join()
    assert torch.backends.cudnn.deterministic, "cuDNN may choose any algorithm"
    assert os.environ.get("NCCL_NVLS_ENABLE") == "0", "NVLink may add in any order"
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    join()
    assert os.environ["NCCL_NVLS_ENABLE"] == "1", "the user's choice is gone"


@pytest.mark.parametrize("usable, world_size", [(True, 2), (False, 1)])
def test_there_is_one_process_per_usable_gpu(gpus, monkeypatch, usable, world_size):
    """And batches are in pinned memory only where there is a GPU to copy them to."""
    gpus(2, usable)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(sys, "argv", ["train_ddp.py"])
    chosen = train_ddp.parse_args().world_size
    assert chosen == world_size, f"{chosen} processes instead of {world_size}"
    is_pinned = data.make_loader([0], 1, range(1)).pin_memory
    assert is_pinned == usable, f"memory is pinned: {is_pinned}"


# ---------------------------------------------------------------- a stand-in for a GPU

# What may be given tensors of two devices, as it copies them, or looks at their types only.
MAY_MIX = {"copy_", "__set__", "__setitem__", "_has_compatible_shallow_copy_type"}
# What has the CPU wait until the GPU has come so far, to get numbers from it.
READS = {"item", "tolist", "tensor", "__bool__", "__int__", "__float__", "nonzero"}


class StandIn(TorchFunctionMode):
    """A GPU whose tensors are in the memory of the CPU, and on a list.

    It refuses operations on tensors here and elsewhere, as a GPU does.
    """

    def __init__(self) -> None:
        super().__init__()
        # Views share a storage. Each is kept, so that no other can get its address.
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.reads = 0

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        name = func.__name__
        kwargs = dict(kwargs or {})
        if name == "cpu":
            func, name, args = Tensor.to, "to", (*args, CPU)
        inputs = tensors_in([args, kwargs])
        is_here = any(map(self.has, inputs))
        if is_here and func == Tensor.device.__get__:
            return GPU
        targets = [i for i in [*args, *kwargs.values()] if isinstance(i, torch.device)]
        # model.to() has its arguments read by a function of this name.
        if targets and name != "_parse_to":
            args = [CPU if i == GPU else i for i in args]
            kwargs = {key: CPU if i == GPU else i for key, i in kwargs.items()}
            if name == "to" and is_here != (targets == [GPU]):
                # Otherwise it would return the tensor itself.
                kwargs["copy"] = True
        if is_here and name not in MAY_MIX:
            self.reads += name in READS or CPU in targets
            self.check(name, args, inputs)
        result = func(*args, **kwargs)
        stays_here = is_here and not targets and name not in MAY_MIX | READS
        if stays_here or targets == [GPU]:
            storages = [tensor.untyped_storage() for tensor in tensors_in(result)]
            self.storages |= {storage._cdata: storage for storage in storages}
        return result

    def check(self, name: str, args: Any, inputs: list[Tensor]) -> None:
        """Raise if a tensor is elsewhere.

        A single number may be, if it is not written to, and not to be part of a new tensor.
        """
        writes = name.endswith("_") and not name.endswith("__")
        for tensor in inputs:
            is_argument = any(tensor is item for item in args[writes:])
            if not self.has(tensor) and not (tensor.dim() == 0 and is_argument):
                raise RuntimeError(f"{name} gets tensors on the GPU and elsewhere")


def tensors_in(item: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, list | tuple):
        return [tensor for part in item for tensor in tensors_in(part)]
    return []


def load_noise(*_: Any) -> tuple[str, data.Digits, data.Digits]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 28, 28), generator=generator).to(torch.uint8)
    labels = torch.arange(50) % 10
    train_set = data.Digits(images[:40], labels[:40], seed=0)
    return "noise", train_set, data.Digits(images[40:], labels[40:], seed=0)


def train_on_both(folder: Path) -> tuple[set, list[int]]:
    """Train on the CPU; on the stand-in; and on that again, from the middle.

    Return which types of numbers were sent, and whether from the GPU; and for each step, how
    often the CPU has read something from the GPU.
    """
    train_ddp.load_data = load_noise
    flags = {"batch_size": 8, "lr": 0.01, "seed": 0, "save_every": 3}
    train_as_rank(folder / "cpu", **flags)
    sent = set()
    reads = []
    all_reduce = dist.all_reduce
    train_step = train_ddp.train_step

    def noting_all_reduce(tensor: Tensor) -> None:
        sent.add((tensor.dtype, gpu.has(tensor)))
        all_reduce(tensor)

    def noting_train_step(run: train_ddp.Run, *args: Any) -> Tensor:
        before = gpu.reads
        sums = train_step(run, *args)
        reads.append(gpu.reads - before)
        return sums

    dist.all_reduce = noting_all_reduce
    train_ddp.train_step = noting_train_step
    with StandIn() as gpu:
        train_as_rank(folder / "gpu", GPU, **flags)
        (folder / "resumed").mkdir()
        middle = folder / "gpu" / "epoch00000-image000000024.pt"
        shutil.copy(middle, folder / "resumed")
        train_as_rank(folder / "resumed", GPU, **flags)
    return sent, reads


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What was sent, what was read in each step, and the folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    return *in_ranks(1, train_on_both, folder)[0], folder


def test_no_operation_of_a_training_mixes_devices(trained):
    """Saves, a resume and evaluations are in it. The results are those of the CPU."""
    *_, folder = trained
    for name in "gpu", "resumed":
        assert_same_result(folder / name, folder / "cpu")


def test_nccl_sends_the_sums_and_gloo_the_stop_flag(trained):
    """With a flag on the GPU, each look for a stop would wait for all its work."""
    sent, *_ = trained
    assert (torch.float64, False) not in sent, "some sums of losses are sent by gloo"
    assert (torch.int64, True) not in sent, "the stop flag is sent by nccl"
    assert sent == {(torch.float64, True), (torch.int64, False)}, "not both are sent"


def test_no_step_waits_for_the_gpu(trained):
    _, reads, _ = trained
    assert len(reads) == 10 + 7, f"{len(reads)} steps, not 10 and after the resume 7"
    assert not any(reads), f"the CPU reads from the GPU in steps so many times: {reads}"
