"""Work that would give the same answer again is not done again: the last answers of a few modules.

Between the steps of a picture the text's embedding and the tokens' positions stay, and between pictures the noise
levels of the schedule come back, with the modulations that follow from them. Knows which parts of the transformer
those are.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from engine.torch_backend.transformer import Flux2Transformer2DModel

LEVELS = 64  # noise levels remembered: 184 kB each in float32 for the 4B model


class Remembered(nn.Module):
    """A module of one tensor whose last `size` answers are kept. Inputs are compared by value; answers are shared, so
    nobody may write to them."""

    def __init__(self, module: nn.Module, size: int) -> None:
        super().__init__()
        self.module = module
        self.size = size
        self._answers: OrderedDict[int, tuple[Tensor, object]] = OrderedDict()
        self._count = 0

    def forward(self, x: Tensor) -> object:
        for number, (asked, answer) in reversed(self._answers.items()):
            if asked.shape == x.shape and asked.dtype == x.dtype and torch.equal(asked, x):
                self._answers.move_to_end(number)
                return answer
        answer = self.module(x)
        self._count += 1
        self._answers[self._count] = (x, answer)
        if len(self._answers) > self.size:
            self._answers.popitem(last=False)
        return answer


def install(transformer: Flux2Transformer2DModel) -> None:
    """Put a memory before the parts of a loaded transformer that are asked the same again and again."""
    for name, size in (
        ("pos_embed", 2),
        ("context_embedder", 2),
        ("double_stream_modulation_img", LEVELS),
        ("double_stream_modulation_txt", LEVELS),
        ("single_stream_modulation", LEVELS),
        ("norm_out.linear", LEVELS),
    ):
        parent, _, child = name.rpartition(".")
        module = transformer.get_submodule(parent)
        setattr(module, child, Remembered(getattr(module, child), size))
