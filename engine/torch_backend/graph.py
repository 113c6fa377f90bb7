"""Work on a card as one CUDA graph: a denoising step, or reading a prompt.

At 512 x 512 an H100 runs the 500 kernels of a step in 16 ms, Python launches them in 26; of a prompt's 40 ms most is
launching. The first step of a size runs as it is, which also compiles and chooses what is left to choose; the second is
captured, and all others of that size, in this picture and the next ones, are replays of it. Everything that changes
from step to step or from picture to picture is an input with a place of its own.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.torch_backend.int8 import Scratch

SIZES = 2  # kept: a draft's and its refinement's
Key = tuple[torch.Size, ...]


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor
    buffers: list[Tensor]  # scratch memory that it writes to


class Graphs:
    """Called as `run` is: with tensors, and last with `check`. `ready` says whether its layers have stopped changing
    their arithmetic, `scratch` is what they share, `told` hears the sentence of a failure, after which everything runs
    as it is."""

    def __init__(
        self,
        run: Callable[..., Tensor],
        ready: Callable[[], bool],
        scratch: Scratch | None,
        told: Callable[[str], object],
    ) -> None:
        self._run = run
        self._ready = ready
        self._scratch = scratch
        self._told = told
        self._captured: OrderedDict[Key, Captured | None] = OrderedDict()  # None: has run
        self._buffers: dict[str, Tensor] = {}  # scratch memory for graphs alone, which write to it one at a time
        self._works = True

    def __call__(self, *inputs: Any) -> Tensor:
        """What `run` makes of them; `check` is called once before a replay."""
        *tensors, check = inputs
        key = tuple(each.shape for each in tensors)
        if not self._works or not self._ready() or key not in self._captured:
            self._remember(key, None)
            return self._run(*inputs)
        check()
        captured = self._captured[key]
        if captured is None:
            try:
                captured = self._capture(tuple(tensors))
            except Exception as error:  # of a driver or a library that nobody has tried: the picture is not lost
                self._works = False
                self.clear()
                if self._scratch is not None:
                    self._scratch.clear()
                self._told(f"no CUDA graph ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")
                return self._run(*inputs)
        self._remember(key, captured)
        for place, given in zip(captured.inputs, tensors, strict=True):
            place.copy_(given)
        captured.graph.replay()
        return captured.output.clone()

    def clear(self) -> None:
        """Give the memory back."""
        self._captured.clear()
        self._buffers = {}
        if self._scratch is not None:
            self._scratch.forget()

    def _remember(self, key: Key, captured: Captured | None) -> None:
        self._captured[key] = captured
        self._captured.move_to_end(key)
        if len(self._captured) > SIZES:
            self._captured.popitem(last=False)

    def _capture(self, tensors: tuple[Tensor, ...]) -> Captured:
        inputs = tuple(each.clone() for each in tensors)
        graph, given = torch.cuda.CUDAGraph(), self._buffers
        if self._scratch is not None:
            self._buffers = given = self._grown(self._scratch)
            self._scratch.exchange(dict(given))
        # thread_local: others may ask how much memory is used
        with _own_workspaces(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._run(*inputs, lambda: None)
        if self._scratch is not None:
            self._buffers = self._scratch.exchange({})
        # what was given and outgrown meanwhile is written to all the same
        return Captured(graph, inputs, output, [*given.values(), *self._buffers.values()])

    def _grown(self, scratch: Scratch) -> dict[str, Tensor]:
        """The buffers of all graphs, as large as was ever asked for. Where that is more than it was, graphs that write
        to the smaller ones go, and are captured anew when they are needed."""
        buffers = scratch.grown(self._buffers)
        if any(buffers[name] is not kept for name, kept in self._buffers.items()):
            self._captured = OrderedDict.fromkeys(self._captured)
        return buffers


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """What is captured gets cuBLAS workspaces in its own memory. torch keeps one for a stream, captures all graphs on
    the same stream, and drops it with any of them: then the others write to memory that is nobody's (pytorch issue
    193402)."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
