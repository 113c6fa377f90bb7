"""The engine as `accept` questions it: pictures through the worker, as everybody gets them; states and products in this
process, from the same classes that the worker uses."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine import bench
from engine.hardware import Hardware
from engine.packs import Pack
from engine.plan import Plan
from engine.types import EngineError, Picture, Request
from engine.worker import Worker


class Probe(Protocol):
    """A backend's parts, loaded one by one and asked directly. See engine.accept.Subject."""

    def states(self, prompt: str) -> np.ndarray: ...

    def product(self, fqn: str, x: np.ndarray) -> np.ndarray: ...

    def plain(self, request: Request) -> Picture: ...


class EngineSubject:
    """engine.accept.Subject for the backends of this house."""

    def __init__(
        self, model: str, pack: Pack, hardware: Hardware, decided: Plan, backend: str, data_dir: Path
    ) -> None:
        self._model, self._pack, self._hardware, self._decided = model, pack, hardware, decided
        self._backend, self._data_dir = backend, data_dir
        self._worker: Worker | None = None
        self._opened: Probe | None = None

    def picture(self, request: Request) -> Picture:
        if self._worker is None:
            self._worker = Worker(self._backend, data_dir=self._data_dir)
        return next(answer for answer in self._worker.run(request) if isinstance(answer, Picture))

    def states(self, prompt: str) -> np.ndarray:
        return self._probe().states(prompt)

    def product(self, fqn: str, x: np.ndarray) -> np.ndarray:
        return self._probe().product(fqn, x)

    def plain(self, request: Request) -> Picture:
        return self._probe().plain(request)

    def measure(self) -> dict[str, Any]:
        self.close()  # a cold start of its own, and no second model in memory
        return bench.run(self._model, None, None, 1, self._backend, self._data_dir)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _probe(self) -> Probe:
        """The backend's parts in this process, once the worker's copy is gone."""
        self.close()
        if self._opened is None:
            self._opened = probe(self._pack, self._decided, self._data_dir)
        return self._opened


def probe(pack: Pack, decided: Plan, data_dir: Path) -> Probe:
    """The parts of the backend that the plan chose. Raises EngineError for `fake`, which has none."""
    if decided.backend == "torch":
        from engine.torch_backend.probe import TorchProbe

        return TorchProbe(pack, decided, data_dir)
    if decided.backend == "mlx":
        from engine.mlx_backend.probe import MlxProbe

        return MlxProbe(pack, decided, data_dir)
    raise EngineError(f"the backend {decided.backend} has no parts to ask: use torch or mlx")
