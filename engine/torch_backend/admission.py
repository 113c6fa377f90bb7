"""Which packed layers may be multiplied as bytes: decided on the activations of a pack's first picture.

While a layer is on trial, a sample of the tokens of every call goes through both ways. Where the results differ by more
than BOUND, those passes are out of the question for this layer: the next ones are tried, more exact and slower, and if
there are none it stays as it was, for good. Outliers among the activations decide, and no synthetic input has them. The
errors are kept (engine/products.py), so a pack is tried once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.products import BOUND
from engine.torch_backend import int8
from engine.torch_backend.linear import PackedLinear

SAMPLE = 32  # tokens of a call, spread evenly
HOPELESS = 1e9  # an error that stands for everything larger
ALL = slice(None)


class Admission:
    """The int8 twins of a model's packed layers, and what they share: the passes and scratch memory."""

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[Any],
        errors: Mapping[str, Mapping[str, float]] | None = None,
        bound: float = BOUND,
        keep: Callable[[Mapping[str, float], str], object] = lambda errors, passes: None,
        *,
        trial: bool = True,
    ) -> None:
        """Puts a twin before every packed layer that can have one by one of `passes`, those preferred first. The
        `errors` of earlier trials, by passes, make this one's if they say what every layer may do. If they don't, there
        is another one, in which what was refused stays refused; or, without `trial`, nothing is put anywhere. `keep` is
        told what a trial found, with what was known, and by which passes."""
        self.bound = bound
        self._keep = keep
        self.overtaken = False
        self._given: tuple[Tensor, Source] | None = None
        packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
        # each reads the tokens and weights it made itself
        self.ways = [way for way in passes if any(map(way.bears, packed.values()))]
        twins = {name: Int8Linear(layer, self, [way for way in self.ways if way.bears(layer)])
                 for name, layer in packed.items()}  # fmt: skip
        self.layers = {name: twin for name, twin in twins.items() if twin.ways}
        self.trial = not all([twin.recall(name, errors or {}) for name, twin in self.layers.items()])
        if self.trial and not trial:
            self.layers = {}
        if not self.layers:
            return
        self.passes: Any = self.ways[0]  # for everything but products
        self.scratch: int8.Scratch = self.passes.scratch
        for name, twin in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, twin)
            twin.plain.expand = twin.ways[0][0].dense
        self._spare()

    def errors(self) -> dict[str, float]:
        """The largest error of every layer so far, by the passes that it was left to."""
        return {name: layer.error for name, layer in self.layers.items()}

    def settle(self) -> None:
        """After whole work: what the layers were found to bear holds from now on."""
        if not self.trial:
            return
        self.trial = False
        self._spare()
        for way in self.ways:
            if found := {name: twin.errors[way.name] for name, twin in self.layers.items() if way.name in twin.errors}:
                self._keep(found, way.name)

    def _spare(self) -> None:
        """On a card drop what only layers in the model's number format need: 120 MB of the 4B model."""
        if self.passes.device.type == "cuda" and not self.trial:
            for twin in self.layers.values():
                if twin.admitted:
                    twin.plain.drop_scales()

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
    """What one or several layers are given: rows x [M, K], and the same as some passes' tokens, made when first asked
    for."""

    def __init__(self, admission: Admission, x: Tensor) -> None:
        self.admission = admission
        self.x = x
        self._tokens: dict[str, Any] = {}

    def floats(self, wanted: Any = ALL) -> Tensor:
        """All rows, or those of an index."""
        return self.x[wanted]

    def tokens(self, passes: Any) -> Any:
        if passes.name not in self._tokens:
            self._tokens[passes.name] = self._quantized(passes)
        return self._tokens[passes.name]

    def _quantized(self, passes: Any) -> Any:
        return passes.quantize(self.x)


class Int8Linear(nn.Module):
    """A packed layer that multiplies as bytes as long as its error allows it. `rows`: only some of its outputs."""

    def __init__(self, plain: PackedLinear, admission: Admission, ways: Sequence[Any]) -> None:
        super().__init__()
        self.plain = plain
        self.outputs = len(plain.weight)
        self.errors: dict[str, float] = {}  # by the names of passes; on trial nothing is known of those not needed yet
        self.served = False
        self._admission = admission
        self.ways = [(passes, passes.weights(plain)) for passes in ways]

    def recall(self, name: str, errors: Mapping[str, Mapping[str, float]]) -> bool:
        """Take over what earlier trials found, and say whether that decides how this layer is multiplied."""
        known = {passes.name: errors.get(passes.name, {}).get(name) for passes, _ in self.ways}
        self.errors = {passes: error for passes, error in known.items() if error is not None}
        for error in known.values():
            if error is None:
                return False
            if error <= self._admission.bound:
                return True
        return True

    @property
    def error(self) -> float:
        """By the passes that it was left to, or by the last of those that were refused."""
        way = self._way()
        return self.errors.get((way or self.ways[-1])[0].name, 0.0)

    @property
    def admitted(self) -> bool:
        return self._way() is not None

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        passes, source = self._admission.passes, self._admission.source(x)
        out = torch.empty(len(source.x), self.outputs, dtype=passes.dtype, device=passes.device)
        self.put(source, out)
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    def put(self, source: Source, out: Tensor, rows: slice = ALL) -> None:
        """out [M, n] = product."""
        if way := self._way_of(source):
            passes, weights = way
            passes.multiply(source.tokens(passes), weights.rows(rows), out)
        else:
            out.copy_(self._plainly(source.floats(), rows))

    def gate_to(self, source: Source, out: Tensor, rows: slice = ALL) -> None:
        """out [M, n / 2] = SwiGLU of the product."""
        if way := self._way_of(source):
            passes, weights = way
            passes.gate(source.tokens(passes), weights.rows(rows), out)
        else:
            gate, value = self._plainly(source.floats(), rows).chunk(2, dim=-1)
            out.copy_(F.silu(gate).mul_(value))

    def add_to(self, out: Tensor, source: Source, gate: Tensor) -> None:
        """out [M, N] += gate * product."""
        if way := self._way_of(source):
            passes, weights = way
            passes.add(source.tokens(passes), weights, gate.view(self.outputs), out)
        else:
            out.addcmul_(self._plainly(source.floats()), gate.view(self.outputs))

    def _way(self) -> tuple[Any, Any] | None:
        """The first passes that were not refused, with their weights."""
        return next((way for way in self.ways if self.errors.get(way[0].name, 0.0) <= self._admission.bound), None)

    def _way_of(self, source: Source) -> tuple[Any, Any] | None:
        """The same for this product, None where it is not made of bytes."""
        if self._admission.trial:
            self._try(source)
        way = self._way()
        self.served |= way is not None
        return way

    def _plainly(self, x: Tensor, rows: slice = ALL) -> Tensor:
        return self.plain(x.to(self.plain.dtype), rows)

    def _try(self, source: Source) -> None:
        """What was refused is not tried again, nor what comes after the first passes that are not."""
        before = self._way()
        if before is None:
            return
        count, device = len(source.x), self._admission.passes.device
        tokens = source.floats(torch.linspace(0, count - 1, min(SAMPLE, count), device=device).long())
        plain = self._plainly(tokens).float()
        while way := self._way():
            passes, weights = way
            ours = torch.empty(plain.shape, dtype=passes.dtype, device=device)
            passes.multiply(passes.quantize(tokens), weights, ours)
            error = ((ours.float() - plain).norm() / plain.norm().clamp_min(int8.TINY)).item()
            # what isn't a number is hopeless too
            error = max(self.errors.get(passes.name, 0.0), error if error < HOPELESS else HOPELESS)
            self.errors[passes.name] = error
            if error <= self._admission.bound:
                break
        self._admission.overtaken |= self.served and way is not before
