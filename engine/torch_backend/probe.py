"""The torch backend's text encoder and packed layers, one by one, for `accept`."""

import numpy as np
import torch
from torch import Tensor

from engine.packs import Pack
from engine.plan import Plan
from engine.prompt import Tokenizer
from engine.torch_backend import linear
from engine.torch_backend.text_encoder import TextEncoder
from engine.torch_backend.transformer import Flux2Transformer2DModel


class TorchProbe:
    """See engine.accept_subject.Probe. Each part is loaded when it is first asked."""

    def __init__(self, pack: Pack, decided: Plan) -> None:
        self.pack = pack
        self.device, self.dtype = torch.device(decided.device), getattr(torch, decided.dtype)
        self._encoder: TextEncoder | None = None
        self._transformer: Flux2Transformer2DModel | None = None

    def states(self, prompt: str) -> np.ndarray:
        if self._encoder is None:
            notes = self.pack.notes
            self._encoder = TextEncoder(self.pack.text_encoder, notes.hidden_states, self.dtype, self.device)
        ids, mask, tokens = Tokenizer(self.pack.tokenizer).encode(prompt, self.pack.notes.text_length)
        side_by_side = self._encoder.encode(ids, mask, lambda: None)[0, :tokens]
        return _array(side_by_side).reshape(tokens, len(self.pack.notes.hidden_states), -1).transpose(1, 0, 2)

    @torch.inference_mode()
    def product(self, fqn: str, x: np.ndarray) -> np.ndarray:
        self._encoder = None  # both need not be in memory
        if self._transformer is None:
            with torch.device("meta"):
                self._transformer = Flux2Transformer2DModel.from_config(self.pack.transformer.config)
            linear.build(self._transformer, self.pack.transformer, self.dtype, self.device)
        layer = self._transformer.get_submodule(fqn)
        return _array(layer(torch.from_numpy(x).to(self.device, self.dtype)))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
