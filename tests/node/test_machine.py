"""GPU capacity by NVML, against values recorded from real cards."""

from types import ModuleType, SimpleNamespace
from typing import Any

from promptmesh.node.machine import Gpus, read_machine


class NVMLError(Exception):
    pass


class RecordedNvml(ModuleType):
    """What `pynvml` answered on a machine with an RTX 4090 and a card whose driver hung."""

    NVMLError = NVMLError

    def __init__(self, *, count: int = 2) -> None:
        super().__init__("pynvml")
        self.count = count

    def nvmlDeviceGetCount(self) -> int:
        if self.count < 0:
            raise NVMLError("Driver/library version mismatch")
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if index == 1:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetName(self, handle: Any) -> bytes:
        return b"NVIDIA GeForce RTX 4090"

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=25757220864, free=24142544896, used=1614675968)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        return SimpleNamespace(gpu=37, memory=12)


def test_a_card_is_read_and_a_lost_one_left_out() -> None:
    (card,) = Gpus(RecordedNvml()).read()
    assert card.name == "NVIDIA GeForce RTX 4090"
    assert (card.memory_total, card.memory_free) == (25757220864, 24142544896)
    assert card.utilisation == 0.37


def test_a_broken_driver_means_no_cards() -> None:
    assert Gpus(RecordedNvml(count=-1)).read() == ()


def test_the_machine_without_cards_says_its_processors_and_memory() -> None:
    machine = read_machine(Gpus(RecordedNvml(count=0)))
    assert machine.gpus == ()
    assert machine.cpus is not None
    assert machine.cpus >= 1
    assert 0 < machine.memory_free <= machine.memory_total
