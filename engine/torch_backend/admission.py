"""Which packed layers may be multiplied as bytes: decided on the activations of a pack's first picture.

While a layer is on trial, a sample of the tokens of every call goes through both ways. Where the results differ by more
than BOUND, the layer stays as it was, for good. Outliers among the activations decide, and no synthetic input has them.
The errors are kept (engine/products.py), so a pack is tried once.
"""

from collections.abc import Mapping
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from engine.products import BOUND
from engine.torch_backend import int8
from engine.torch_backend.linear import PackedLinear

SAMPLE = 32  # tokens of a call, spread evenly
HOPELESS = 1e9  # an error that stands for everything larger


class Admission:
    """The int8 twins of a model's packed layers, and what they share: scratch memory and the last quantised input."""

    def __init__(self, model: nn.Module, errors: Mapping[str, float] | None = None, bound: float = BOUND) -> None:
        """Puts a twin before every packed layer that can have one. `errors` of an earlier trial make this one's."""
        self.bound = bound
        self.trial = errors is None
        self.overtaken = False
        self.scratch = int8.Scratch()
        self.layers: dict[str, Int8Linear] = {}
        self._input: ReferenceType[Tensor] | None = None
        self._tokens: int8.Int8Tokens | None = None
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear) and foldable(layer):
                parent, _, child = name.rpartition(".")
                self.layers[name] = twin = Int8Linear(layer, self)
                twin.error = (errors or {}).get(name, 0.0 if self.trial else HOPELESS)
                setattr(model.get_submodule(parent), child, twin)

    def errors(self) -> dict[str, float]:
        """The largest error of every layer so far."""
        return {name: layer.error for name, layer in self.layers.items()}

    def restart(self) -> bool:
        """Whether a layer was refused after it had served: then what the model did since the start has to be done
        again, or the same request would give another picture next time. Asking takes the answer back."""
        overtaken, self.overtaken = self.overtaken, False
        return overtaken

    def tokens(self, x: Tensor) -> int8.Int8Tokens:
        """`x` [.., K] quantised; layers that are given the same tensor one after the other share the work."""
        if self._tokens is None or self._input is None or self._input() is not x:
            self._tokens = int8.quantize(x.reshape(-1, x.shape[-1]))
            self._input = ref(x)
        return self._tokens


class Int8Linear(nn.Module):
    """A packed layer that multiplies as bytes as long as its error allows it."""

    def __init__(self, plain: PackedLinear, admission: Admission) -> None:
        super().__init__()
        self.plain = plain
        self.weights = int8.weights(plain.weight, plain.scales, plain.bits)
        self.error = 0.0
        self.served = False
        self._admission = admission

    @property
    def admitted(self) -> bool:
        return self.error <= self._admission.bound

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        admission = self._admission
        if admission.trial and self.admitted:
            self._try(x)
        if not self.admitted:
            return self.plain(x)
        self.served = True
        out = int8.multiply(admission.tokens(x), self.weights, x.dtype, admission.scratch)
        return out.view(*x.shape[:-1], -1)

    def _try(self, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1])
        tokens = tokens[torch.linspace(0, len(tokens) - 1, min(SAMPLE, len(tokens))).long()]
        plain = self.plain(tokens).float()
        off = int8.multiply(int8.quantize(tokens), self.weights, torch.float32, self._admission.scratch) - plain
        error = (off.norm() / plain.norm().clamp_min(int8.TINY)).item()
        self.error = max(self.error, error if error < HOPELESS else HOPELESS)  # what isn't a number is hopeless too
        self._admission.overtaken |= self.served and not self.admitted


def foldable(layer: PackedLinear) -> bool:
    """Whether int8.weights can hold the layer: one or two bits, on a CPU, and biases that follow from the scales."""
    if layer.centre is None or layer.weight.device.type != "cpu":
        return False
    return layer.features // layer.scales.shape[1] % 8 == 0
