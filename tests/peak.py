"""How many bytes the results of torch operations held at one time, counted operation by operation."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts while it is active; what existed before is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        for result in tree_leaves(out):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return out
