"""When a denoising step runs as it is, when it is captured and when replayed; capturing itself needs a card."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.torch_backend.graph import Captured, Graphs
from engine.torch_backend.int8 import Scratch


class Replay:
    """In place of a CUDA graph: computes from the inputs' places into the output's."""

    def __init__(self, run: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.run, self.inputs, self.output = run, inputs, output

    def replay(self) -> None:
        self.output.copy_(self.run(*self.inputs, lambda: None))


class Step:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.eager = self.captures = self.checks = 0
        self.is_ready, self.fails = True, False
        self.words: list[str] = []
        self.graphs = Graphs(self.run, lambda: self.is_ready, None, self.words.append)
        monkeypatch.setattr(self.graphs, "_capture", self.capture)

    def run(self, x: Tensor, y: Tensor, check: Any) -> Tensor:
        self.eager += 1
        return x + 10 * y.sum()

    def capture(self, tensors: tuple[Tensor, ...]) -> Captured:
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen capturing")
        self.captures += 1
        inputs = tuple(each.clone() for each in tensors)
        output = torch.empty_like(inputs[0])
        graph: Any = Replay(lambda x, y, check: x + 10 * y.sum(), inputs, output)
        return Captured(graph, inputs, output, [])

    def __call__(self, number: float, size: int = 2) -> float:
        def check() -> None:
            self.checks += 1

        out = self.graphs(torch.full((size,), number), torch.ones(1) * number, check)
        return float(out[0])


def test_the_second_step_of_a_size_is_captured_and_the_others_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    assert [step(1), step(2), step(3)] == [11, 22, 33]
    assert (step.eager, step.captures, step.checks) == (1, 1, 2)
    assert [step(1, size=4), step(2, size=4), step(5)] == [11, 22, 55]
    assert (step.eager, step.captures) == (2, 2)
    step(1, size=8)  # a third size: the first, asked for last, stays
    step(4)
    assert (step.eager, step.captures) == (3, 2)
    step.graphs.clear()
    assert step(6) == 66 and step.eager == 4


def test_nothing_is_captured_while_layers_are_on_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    step.is_ready = False
    assert [step(1), step(2), step(3)] == [11, 22, 33] and step.eager == 3
    step.is_ready = True
    assert [step(1), step(2)] == [11, 22] and (step.eager, step.captures) == (3, 1)


def test_what_cannot_be_captured_is_said_once_and_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    step.fails = True
    assert [step(1), step(2), step(3)] == [11, 22, 33] and step.eager == 3
    assert step.words == ["no CUDA graph (RuntimeError: operation not permitted)"]


def test_what_is_returned_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    step(1)
    first = step.graphs(torch.ones(2), torch.ones(1), lambda: None)
    step(3)
    assert first.tolist() == [11, 11]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch captures nothing, and says when it would."""
    done: list[str] = []

    @contextmanager
    def graph(graph: Any, **how: Any) -> Iterator[None]:
        done.append("begin")
        yield
        done.append("end")

    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("dropped"), raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return done


def test_a_captured_graph_shares_no_workspace_with_others(capturing: list[str]) -> None:
    """What torch keeps for the stream on which it captures is dropped before and after (graph._own_workspaces)."""
    graphs = Graphs(lambda x, check: capturing.append("run") or x + 1, lambda: True, None, capturing.append)
    graphs._capture((torch.ones(2),))
    assert capturing == ["dropped", "begin", "run", "end", "dropped"]


def test_graphs_share_the_largest_buffers(capturing: list[str]) -> None:
    """A larger picture's graph takes more, and the smaller one's is captured again over that. Of one name text takes
    little and then the picture much: whatever a graph wrote to stays with it."""
    scratch, taken = Scratch(), dict[int, list[int]]()

    def run(x: torch.Tensor, check: Any) -> torch.Tensor:
        size = len(x)
        taken[size] = [scratch.take("projected", count, torch.float32).data_ptr() for count in (2, size)]
        return x + 1

    graphs = Graphs(run, lambda: True, scratch, capturing.append)

    def step(size: int) -> None:
        graphs(torch.ones(size), lambda: None)
        captured = next(reversed(graphs._captured.values()))
        if captured is not None:
            assert set(taken[size]) <= {buffer.data_ptr() for buffer in captured.buffers}

    for size in (4, 4, 8, 8):
        step(size)
        scratch.clear()  # as after every picture
    assert capturing.count("run") == 0 and capturing.count("begin") == 2 and len(graphs._buffers["projected"]) == 8
    for size in (4, 8, 4, 8):
        step(size)
    assert capturing.count("begin") == 3 and taken[4][1] == taken[8][1] == graphs._buffers["projected"].data_ptr()
    graphs.clear()
    assert not graphs._buffers and not scratch.grown({})
