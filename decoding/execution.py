"""How an iteration is launched: operation by operation from Python, or captured in a CUDA graph and replayed.

Both run the same operations on the same state. A graph knows addresses, not values, so a captured iteration works in
buffers that outlive a generation: the next one of the same shape puts its state there and replays.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from decoding.pipeline import Pipeline
from decoding.prompt import PromptPasses
from decoding.stages import Stage
from decoding.stats import Work
from kernels.layout import LENGTH
from model.capture import CudaGraph, Graph
from model.gpt2 import GPT2
from model.kv_cache import PagedKVCache

if TYPE_CHECKING:
    from decoding.loop import Generation

MAX_PLANS = 8  # captured iterations that are kept, each with its own scratch memory
_log = logging.getLogger(__name__)


class Execution(Protocol):
    """A way to run the iterations of generations."""

    name: str  # "eager" or "captured"

    def prefill(self, model: GPT2, tokens: list[int], cache: PagedKVCache) -> None:
        """Commit ``tokens``, the beginning of a prompt, to sequence 0 of ``cache``."""

    def begin(self, generation: "Generation") -> Pipeline:
        """Get ready for a generation whose state is complete; may put that state elsewhere."""

    def keep(self, num_plans: int) -> None:
        """Keep the captured iterations of this many shapes at least, for a benchmark that takes turns between them."""


class Eager:
    """Python launches every operation of every iteration."""

    name = "eager"

    def __init__(self, ahead: int = 0):
        self._ahead = ahead

    def prefill(self, model: GPT2, tokens: list[int], cache: PagedKVCache) -> None:
        model.prefill(tokens, cache)

    def begin(self, generation: "Generation") -> Pipeline:
        def launch() -> list[Work]:
            generation.iterate()
            return [stage.take_work() for stage in generation.stages]

        return Pipeline(launch, generation.state.progress.record, self._ahead)

    def keep(self, num_plans: int) -> None:
        pass


class Captured:
    """The first generation of each shape captures its iteration, all of them replay it."""

    name = "captured"

    def __init__(self, new_graph: Callable[[], Graph], ahead: int = 1):
        self._new_graph, self._ahead = new_graph, ahead
        self.prefill = PromptPasses(new_graph).prefill
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()  # least recently used first
        self._max_plans = MAX_PLANS

    @torch.inference_mode()
    def begin(self, generation: "Generation") -> Pipeline:
        for key in [key for key, plan in self._plans.items() if plan.is_stale()]:
            del self._plans[key]
        key = _key(generation)
        if key in self._plans:
            self._plans[key].adopt(generation)
        else:
            self._plans[key] = Plan(generation, self._new_graph())
        self._plans.move_to_end(key)
        if len(self._plans) > self._max_plans:
            self._plans.popitem(last=False)
        return Pipeline(self._plans[key].launch, generation.state.progress.record, self._ahead)

    def keep(self, num_plans: int) -> None:
        self._max_plans = max(self._max_plans, num_plans)


class Plan:
    """A captured iteration and the buffers it works in: those of the generation that it was captured for."""

    def __init__(self, generation: "Generation", graph: Graph):
        generation.sampling = generation.sampling._replace(seed=generation.sampling.seed.clone())
        self._state, self._sampling, self._buffers = generation.state, generation.sampling, _buffers(generation)
        self._stages, self._memory, self._graph = generation.stages, _memory(generation.stages), graph
        start = time.perf_counter()
        saved = [buffer.clone() for buffer in self._buffers]
        self._finish()
        graph.capture(lambda: self._run(generation))
        self._fill(saved)
        _log.info("captured an iteration of %s in %.2f s", generation.config, time.perf_counter() - start)

    def adopt(self, generation: "Generation") -> None:
        """Move the state of another generation into the buffers."""
        self._fill(_buffers(generation))
        generation.state, generation.sampling = self._state, self._sampling

    def launch(self) -> list[Work]:
        """Replay; the work is what the capture counted, as shapes are fixed."""
        self._graph.replay()
        return self._work

    def is_stale(self) -> bool:
        """Whether a stage has replaced memory whose address the graph knows."""
        return any(old is not new for old, new in zip(self._memory, _memory(self._stages), strict=True))

    def _run(self, generation: "Generation") -> None:
        generation.iterate()
        self._work = [stage.take_work()._replace(seconds=0.0) for stage in self._stages]

    def _finish(self) -> None:
        """A generation that has ended: iterations launch everything and change nothing, caches and draft2 included."""
        progress = self._state.progress
        progress.state.fill_(LENGTH)
        progress.reach[:, 0].fill_(-1)

    def _fill(self, values: list[torch.Tensor]) -> None:
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)


def _buffers(generation: "Generation") -> list[torch.Tensor]:
    """All that an iteration reads of its generation."""
    return [column for part in generation.state for column in part] + [generation.sampling.seed]


def _memory(stages: list[Stage]) -> list[Any]:
    return [part for stage in stages for part in stage.memory]


def _key(generation: "Generation") -> tuple:
    """Of two generations with equal keys the iteration is the same but for what stands in the buffers."""
    shapes = [buffer.shape for buffer in _buffers(generation)]
    return generation.config, generation.sampling._replace(seed=None), *map(id, generation.stages), *shapes


def choose(lower: list[Stage], oracle: Stage, graphs: str | bool) -> Execution:
    """Captured prompts and iterations where ``graphs`` is True or, where they are possible, "auto"; else eager ones.

    They are possible on the Triton backend with all stages on one CUDA device; there an eager iteration is launched
    ahead too. Raises ValueError for another value of ``graphs``, and for True where they are not possible.
    """
    if graphs != "auto" and not isinstance(graphs, bool):
        raise ValueError(f"graphs must be 'auto', True or False, got {graphs!r}")
    devices = {str(stage.device) for stage in (*lower, oracle)}
    on_gpu = len(devices) == 1 and oracle.model.ops.capturable(oracle.device)
    if graphs is True and not on_gpu:
        where = f"{oracle.model.ops.__name__} on {', '.join(sorted(devices))}"
        raise ValueError(f"graphs=True needs the triton backend with all stages on one CUDA device, got {where}")
    captured = Captured(lambda: CudaGraph(oracle.device))
    execution = captured if on_gpu and graphs else Eager(ahead=int(on_gpu))
    _log.info("iterations on %s are %s", ", ".join(sorted(devices)), execution.name)
    return execution
