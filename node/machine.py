"""This machine's capacity, for the advert: GPUs by NVML, else processors and memory."""

from __future__ import annotations

import logging
import os
from types import ModuleType

import psutil

from ..mesh.adverts import Gpu, Machine

logger = logging.getLogger(__name__)

#: A machine has at most so many GPUs; a broken driver may say otherwise.
MAX_GPUS = 64


class Gpus:
    """The NVIDIA cards of this machine, through NVML; none where there is no driver."""

    def __init__(self, nvml: ModuleType | None = None) -> None:
        self._nvml = nvml if nvml is not None else _load_nvml()

    def read(self) -> tuple[Gpu, ...]:
        """Their memory and use now. A card that fails to answer is left out."""
        if self._nvml is None:
            return ()
        try:
            count = min(self._nvml.nvmlDeviceGetCount(), MAX_GPUS)
        except self._nvml.NVMLError as error:
            logger.warning("NVML stopped answering: %s", error)
            return ()
        cards = (self._read_one(index) for index in range(count))
        return tuple(card for card in cards if card is not None)

    def _read_one(self, index: int) -> Gpu | None:
        nvml = self._nvml
        assert nvml is not None
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            logger.debug("GPU %d does not answer: %s", index, error)
            return None
        try:
            busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except nvml.NVMLError:  # not supported by every card
            busy = 0.0
        return Gpu(
            index=index,
            # Older versions of the library give bytes.
            name=name.decode() if isinstance(name, bytes) else name,
            memory_total=memory.total,
            memory_free=memory.free,
            utilisation=busy,
        )


def _load_nvml() -> ModuleType | None:
    # Imported when first used: it looks for a driver.
    import pynvml  # type: ignore[import-untyped, unused-ignore]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("no NVIDIA driver: %s", error)
        return None
    module: ModuleType = pynvml
    return module


def read_machine(gpus: Gpus) -> Machine:
    """What this machine has, and what of it is free now. Takes under a millisecond without GPUs."""
    memory = psutil.virtual_memory()
    return Machine(
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_total=memory.total,
        memory_free=memory.available,
        gpus=gpus.read(),
    )
