"""How many items share one evaluation of a network: as many as fill the device and fit into its memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F


logger = logging.getLogger(__name__)


# B items of a batch, each of any shape.

CPU_ITEMS = 16
# Of a GPU: a measurement begins with the first number, and doubles it up to the second one.
LEAST_ITEMS, MOST_ITEMS = 16, 512
# Of one float32 tensor of a batch, of which a method holds about ten beside what the network needs.
TENSOR_BYTES = 2**27
# A batch of twice the size must give this many times the items per second.
GAIN = 1.05
# The fastest of so many evaluations counts: other programs on the machine delay one of them.
TIMINGS = 3
# Sizes of compiled batches are multiples of it, so that volumes of about as many slices share a graph.
GRAPH_STEP = 16


def choose_batch_size(shape: tuple[int, ...], device: torch.device) -> int:
    """Returns how many items of `shape` `(C, H, W)` a method takes up together where no `batch_size` is given: 16 on
    a CPU, on a GPU up to 512 and 128 MiB. A GPU evaluates them in parts if that is as fast."""
    if device.type != "cuda":
        return CPU_ITEMS
    return max(LEAST_ITEMS, min(MOST_ITEMS, TENSOR_BYTES // (4 * torch.Size(shape).numel())))


@dataclass
class _Limit:
    """The most items that one network evaluates at once, of one shape and type; `rate` in items per second is measured
    while a larger number may be faster (`growing`)."""

    items: int
    growing: bool
    rate: float = 0.0

    def learn(self, items: int, rate: float) -> None:
        """Takes in the rate of a number of items: they become the limit if they are faster by `GAIN`."""
        if rate < GAIN * self.rate:
            self.growing = False
        else:
            self.items, self.rate, self.growing = items, rate, items < MOST_ITEMS


class Batches:
    """
    Evaluates the networks of a pipeline in parts, and remembers for each network, shape and type how large these are.

    Args:
        network (`torch.nn.Module`, *optional*): The one that is to be compiled.
        channels_last (`bool`): Memory format of the samples that it gets.
        cuda_graphs (`bool`): Whether it is replayed as a CUDA graph.

    Attributes:
        automatic (`bool`): Whether parts are chosen here; otherwise all items of a batch share one evaluation.
    """

    def __init__(self, network: torch.nn.Module | None = None, channels_last: bool = False, cuda_graphs: bool = False):
        self.automatic = False
        self.network, self.cuda_graphs = network, cuda_graphs
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # In the default mode convolutions are cuDNN's: Triton's own are wrong for other kernels than 1 x 1.
        mode = "reduce-overhead" if cuda_graphs else None
        self.compiled = network and torch.compile(network, fullgraph=True, dynamic=False, mode=mode)
        self.limits: dict[tuple, _Limit] = {}
        self.graphs: dict[tuple, int] = {}

    def evaluate(
        self,
        network: torch.nn.Module,
        call: Callable[..., torch.Tensor],
        *inputs: torch.Tensor,
        unit: int | None = None,
    ) -> torch.Tensor:
        """
        Evaluates a network on B items.

        Args:
            network (`torch.nn.Module`): Decides, with the shape and type of the inputs, how large the parts are.
            call (callable): `call(network, *parts)` gives the output of a part, `(b, ...)`.
            inputs (`torch.Tensor` of shape `(B, ...)`): Sample first.
            unit (`int`, *optional*):
                Items that come together again and again, which the size of a compiled batch is made for; B by default.

        Returns:
            `torch.Tensor` of shape `(B, ...)`.

        Raises:
            torch.OutOfMemoryError: The memory does not hold the batch that was given, or not even one item.
        """
        count, sample = len(inputs[0]), inputs[0]
        key = (id(network), sample.shape[1:], sample.dtype, next(network.parameters()).dtype, sample.device)
        if not self.automatic:
            limit = _Limit(count, False)
        elif key in self.limits:
            limit = self.limits[key]
        else:
            gpu = sample.device.type == "cuda"
            limit = self.limits[key] = _Limit(LEAST_ITEMS if gpu else MOST_ITEMS, gpu)
        if limit.growing:
            self._grow(limit, network, call, inputs)
        outputs, start = [], 0
        while start < count or not outputs:  # of no slice the output is empty, but has its shape
            size = self._graph_size(key, limit, unit or count) if network is self.network else limit.items
            part = [value[start : start + size] for value in inputs]
            try:
                if network is self.network:
                    outputs.append(self._replay(call, part, size))
                else:
                    outputs.append(call(network, *part))
                start += size
                continue
            except torch.OutOfMemoryError:
                self._check_memory(len(part[0]))
            # Not in the handler, whose error would hold what the network had computed.
            limit.items, limit.growing = max(1, min(size, len(part[0])) // 2), False
            logger.warning("The memory does not hold a batch of %d: %d from now on.", len(part[0]), limit.items)
            self.graphs.pop(key, None)
            if sample.device.type == "cuda":
                torch.cuda.empty_cache()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _check_memory(self, items: int) -> None:
        """Raises what to do about a batch that the memory does not hold, unless smaller parts may be tried."""
        if not self.automatic:
            raise torch.OutOfMemoryError(
                f"The memory of the device does not hold a batch of {items}: give a smaller `batch_size`, or none, so that it is"
                " chosen."
            ) from None
        if items == 1:
            raise torch.OutOfMemoryError(
                "The memory of the device does not hold a single slice: free some, or choose another `device`."
            ) from None

    def _grow(self, limit: _Limit, network: torch.nn.Module, call: Callable, inputs: tuple[torch.Tensor, ...]) -> None:
        """Doubles the limit up to the number of items, as long as that makes the network faster. Copies of the first
        item are evaluated: what is measured must not be part of a result, which would then depend on the first call's
        batches."""
        count = len(inputs[0])
        while limit.growing and limit.items < count:
            items = limit.items if limit.rate == 0.0 else 2 * limit.items
            try:
                part = [value[:1].expand(items, *value.shape[1:]).contiguous() for value in inputs]
                call(network, *part)  # chooses kernels and asks for memory
                limit.learn(items, items / min(_time(network, call, part) for _ in range(TIMINGS)))
            except torch.OutOfMemoryError:
                limit.growing = False
        if not limit.growing:
            torch.cuda.empty_cache()

    def _graph_size(self, key: tuple, limit: _Limit, unit: int) -> int:
        """Returns the size of compiled batches. A larger graph is made only where the items of a unit would need several
        evaluations, and could do with fewer."""
        size = self.graphs.get(key, 0)
        if size < min(unit, limit.items):
            size = ceil(unit / ceil(unit / limit.items))
            if self.automatic and key[-1].type == "cuda":
                size = min(limit.items, GRAPH_STEP * ceil(size / GRAPH_STEP))
            self.graphs[key] = size
        return size

    def _replay(self, call: Callable, part: list[torch.Tensor], size: int) -> torch.Tensor:
        """Evaluates what is compiled for `size` items on at most as many."""
        count, sample = len(part[0]), part[0]
        # New memory of one layout: views, other strides and smaller batches would each make another graph.
        padded = torch.empty(
            (size, *sample.shape[1:]), dtype=sample.dtype, device=sample.device, memory_format=self.memory_format
        )
        padded[:count], padded[count:] = sample, 0.0
        others = [F.pad(value, [0, 0] * (value.ndim - 1) + [0, size - count]) for value in part[1:]]
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        output = call(self.compiled, padded, *others)[:count]
        # A CUDA graph writes its next output into the same memory.
        return output.clone() if self.cuda_graphs else output


def _time(network: torch.nn.Module, call: Callable, inputs: list[torch.Tensor]) -> float:
    """Measures the seconds of an evaluation by a GPU that does nothing else."""
    torch.cuda.synchronize(inputs[0].device)
    start = time.perf_counter()
    call(network, *inputs)
    torch.cuda.synchronize(inputs[0].device)
    return time.perf_counter() - start
