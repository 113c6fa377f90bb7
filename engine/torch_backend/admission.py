"""Which packed layers may be multiplied as bytes: decided on the activations of a pack's first picture.

While a layer is on trial, a sample of the tokens of every call goes through both ways. Where the results differ by more
than BOUND, the layer stays as it was, for good. Outliers among the activations decide, and no synthetic input has them.
The errors are kept (engine/products.py), so a pack is tried once.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.products import BOUND
from engine.torch_backend import int8
from engine.torch_backend.linear import PackedLinear
from engine.torch_backend.passes import TorchPasses

SAMPLE = 32  # tokens of a call, spread evenly
HOPELESS = 1e9  # an error that stands for everything larger
ALL = slice(None)


class Admission:
    """The int8 twins of a model's packed layers, and what they share: the passes and scratch memory."""

    def __init__(
        self,
        model: nn.Module,
        errors: Mapping[str, float] | None = None,
        bound: float = BOUND,
        passes: Any = None,
        keep: Callable[[Mapping[str, float]], object] = lambda errors: None,
    ) -> None:
        """Puts a twin before every packed layer that can have one. `errors` of an earlier trial, with the same passes,
        make this one's. Without `passes` torch's are taken. `keep` is told what a trial found."""
        self.bound = bound
        self._keep = keep
        self.trial = errors is None
        self.overtaken = False
        self._given: tuple[Tensor, Source] | None = None
        self.passes: Any = passes or TorchPasses()  # each reads the tokens and weights it made itself
        self.scratch: int8.Scratch = self.passes.scratch
        self.layers: dict[str, Int8Linear] = {}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear) and self.passes.bears(layer):
                parent, _, child = name.rpartition(".")
                self.layers[name] = twin = Int8Linear(layer, self)
                twin.error = (errors or {}).get(name, 0.0 if self.trial else HOPELESS)
                setattr(model.get_submodule(parent), child, twin)

    def errors(self) -> dict[str, float]:
        """The largest error of every layer so far."""
        return {name: layer.error for name, layer in self.layers.items()}

    def settle(self) -> None:
        """After whole work: what the layers were found to bear holds from now on."""
        if self.trial:
            self.trial = False
            self._keep(self.errors())

    def restart(self) -> bool:
        """Whether a layer was refused after it had served: then what the model did since the start has to be done
        again, or the same request would give another picture next time. Asking takes the answer back."""
        overtaken, self.overtaken = self.overtaken, False
        return overtaken

    def source(self, x: Tensor) -> "Source":
        """Of x [.., K], the same one for layers that are given x one after the other; nobody may write to it then."""
        if self._given is None or self._given[0] is not x:
            self._given = x, Source(self, x.reshape(-1, x.shape[-1]))
        return self._given[1]

    def clear(self) -> None:
        """Give back what was only for the work that is now done."""
        self._given = None
        self.scratch.clear()

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer for activations, in the passes' number format by default, that the next `take` of this name
        overwrites."""
        return self.scratch.take(name, torch.Size(shape).numel(), dtype or self.passes.dtype).view(shape)


class Source:
    """What one or several layers are given: rows x [M, K], and the same as int8 tokens, made when first asked for."""

    def __init__(self, admission: Admission, x: Tensor) -> None:
        self.admission = admission
        self.x = x

    def floats(self, wanted: Any = ALL) -> Tensor:
        """All rows, or those of an index."""
        return self.x[wanted]

    @cached_property
    def tokens(self) -> Any:
        return self.admission.passes.quantize(self.x)


class Int8Linear(nn.Module):
    """A packed layer that multiplies as bytes as long as its error allows it. `rows`: only some of its outputs."""

    def __init__(self, plain: PackedLinear, admission: Admission) -> None:
        super().__init__()
        self.plain = plain
        self.outputs = len(plain.weight)
        self.error = 0.0
        self.served = False
        self._admission = admission
        self._weights: Any = admission.passes.weights(plain)

    @property
    def admitted(self) -> bool:
        return self.error <= self._admission.bound

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        passes, source = self._admission.passes, self._admission.source(x)
        out = torch.empty(len(source.x), self.outputs, dtype=passes.dtype, device=passes.device)
        self.put(source, out)
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    def put(self, source: Source, out: Tensor, rows: slice = ALL) -> None:
        """out [M, n] = product."""
        if self._bears(source):
            self._admission.passes.multiply(source.tokens, self._weights.rows(rows), out)
        else:
            out.copy_(self._plainly(source.floats(), rows))

    def gate_to(self, source: Source, out: Tensor, rows: slice = ALL) -> None:
        """out [M, n / 2] = SwiGLU of the product."""
        if self._bears(source):
            self._admission.passes.gate(source.tokens, self._weights.rows(rows), out)
        else:
            gate, value = self._plainly(source.floats(), rows).chunk(2, dim=-1)
            out.copy_(F.silu(gate).mul_(value))

    def add_to(self, out: Tensor, source: Source, gate: Tensor) -> None:
        """out [M, N] += gate * product."""
        if self._bears(source):
            self._admission.passes.add(source.tokens, self._weights, gate.view(self.outputs), out)
        else:
            out.addcmul_(self._plainly(source.floats()), gate.view(self.outputs))

    def _bears(self, source: Source) -> bool:
        """Whether this product is made of bytes."""
        if self._admission.trial and self.admitted:
            self._try(source)
        self.served |= self.admitted
        return self.admitted

    def _plainly(self, x: Tensor, rows: slice = ALL) -> Tensor:
        return self.plain(x.to(self.plain.dtype), rows)

    def _try(self, source: Source) -> None:
        count, passes = len(source.x), self._admission.passes
        tokens = source.floats(torch.linspace(0, count - 1, min(SAMPLE, count), device=passes.device).long())
        plain = self._plainly(tokens).float()
        ours = torch.empty(plain.shape, dtype=passes.dtype, device=passes.device)
        passes.multiply(passes.quantize(tokens), self._weights, ours)
        error = ((ours.float() - plain).norm() / plain.norm().clamp_min(int8.TINY)).item()
        self.error = max(self.error, error if error < HOPELESS else HOPELESS)  # what isn't a number is hopeless too
        self._admission.overtaken |= self.served and not self.admitted
