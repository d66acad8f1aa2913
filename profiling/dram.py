"""Bytes that memory really moved, from the counters of an NVIDIA GPU: utilisation of its DRAM over a stretch of work.

NVML's performance monitor (Hopper and later, ``pip install nvidia-ml-py``, no privileges) gives the share of the peak
rate between two samples; times peak and seconds it is bytes, of everything the device did, prefill included. Profilers
that count exactly replay every kernel and so measure other cache contents. **Not run on a GPU yet.** Elsewhere there is
no counter that a user may read, and ``bytes_per_token`` says why.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

SHORTEST = 1.0  # seconds between two samples; the counters are read some ten times a second


class Counter:
    """The DRAM counters of one device."""

    def __init__(self, device: torch.device):
        """Raises RuntimeError with the reason where there are none."""
        if device.type != "cuda":
            raise RuntimeError("a CPU's memory counters belong to the whole machine and need privileges")
        if torch.version.hip:
            raise RuntimeError("read through NVIDIA's NVML only")
        try:
            import pynvml
        except ImportError as error:
            raise RuntimeError("needs NVML's Python binding: pip install nvidia-ml-py") from error
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            if not pynvml.nvmlGpmQueryDeviceSupport(self.handle).isSupportedDevice:
                raise RuntimeError("this GPU has no performance monitor in NVML: Hopper is the first that has")
            bits = pynvml.nvmlDeviceGetMemoryBusWidth(self.handle)
            clock = pynvml.nvmlDeviceGetMaxClockInfo(self.handle, pynvml.NVML_CLOCK_MEM)
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML refuses: {error}") from error
        self.peak = 2 * bits / 8 * clock * 1e6  # bytes per second, two transfers a clock
        self.device = device

    def bytes_of(self, work: Callable[[], Any]) -> float:
        """Bytes that DRAM moved during ``work``, which has to take at least SHORTEST seconds."""
        nvml = self.nvml
        samples = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
        try:
            torch.cuda.synchronize(self.device)
            nvml.nvmlGpmSampleGet(self.handle, samples[0])
            start = time.perf_counter()
            work()
            torch.cuda.synchronize(self.device)
            nvml.nvmlGpmSampleGet(self.handle, samples[1])
            seconds = time.perf_counter() - start
            if seconds < SHORTEST:
                raise RuntimeError(f"{seconds:.2f} s are too short for counters that are read ten times a second")
            return self._utilisation(samples) * self.peak * seconds
        except nvml.NVMLError as error:
            raise RuntimeError(f"NVML refuses: {error}") from error
        finally:
            for sample in samples:
                nvml.nvmlGpmSampleFree(sample)

    def _utilisation(self, samples: list) -> float:
        nvml = self.nvml
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, 1
        asked.sample1, asked.sample2 = samples
        asked.metrics[0].metricId = nvml.NVML_GPM_METRIC_DRAM_BW_UTIL
        nvml.nvmlGpmMetricsGet(asked)
        if (code := asked.metrics[0].nvmlReturn) != nvml.NVML_SUCCESS:
            raise RuntimeError(f"NVML gives no DRAM utilisation: {nvml.NVMLError(code)}")
        return asked.metrics[0].value / 100


def bytes_per_token(device: torch.device, generations: dict[str, Callable[[], int]]) -> tuple[dict[str, float], str]:
    """Bytes per token by name, and the reason where there are none.

    A generation returns the number of its tokens; it is repeated until the counters have something to count.
    """
    found: dict[str, float] = {}
    try:
        counter = Counter(device)
        for name, generate in generations.items():
            tokens = 0

            def work(generate=generate):
                nonlocal tokens
                start = time.perf_counter()
                while time.perf_counter() - start < 2 * SHORTEST:
                    tokens += generate()

            moved = counter.bytes_of(work)
            found[name] = moved / tokens
    except RuntimeError as reason:
        return found, str(reason)
    return found, ""
