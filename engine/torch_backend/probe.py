"""The torch backend's text encoder and packed layers, one by one, for `accept`."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.hardware import detect
from engine.packs import Pack
from engine.plan import Plan
from engine.torch_backend.backend import TorchBackend
from engine.torch_backend.model import Model, placed
from engine.types import Picture, Request


class TorchProbe:
    """See engine.accept_subject.Probe. Each part is loaded when it is first asked, as a picture would load it: layers
    that the pictures before admitted to int8 multiply in int8 here too."""

    def __init__(self, pack: Pack, decided: Plan, data_dir: Path) -> None:
        self.model = Model(pack.folder)
        self.decided, self.data_dir = decided, data_dir
        self.dtype, self.device = placed(decided)

    def states(self, prompt: str) -> np.ndarray:
        model, notes = self.model, self.model.pack.notes
        ids, mask, tokens = model.tokenizer.encode(prompt, notes.text_length)
        if model.load_encoder(self.decided):
            model.admit_reading(self.data_dir, detect(), trial=False)
        side_by_side = model.embed(prompt, ids, mask, self.decided, lambda: None)[0, :tokens]
        return _array(side_by_side).reshape(tokens, len(notes.hidden_states), -1).transpose(1, 0, 2)

    @torch.inference_mode()
    def product(self, fqn: str, x: np.ndarray) -> np.ndarray:
        if self.model.load(self.decided, lambda: None):
            self.model.admit(self.data_dir, detect(), trial=False)
        assert self.model.weights is not None
        layer = self.model.weights.transformer.get_submodule(fqn)
        return _array(layer(torch.from_numpy(x).to(self.device, self.dtype)))

    def plain(self, request: Request) -> Picture:
        backend = TorchBackend(detect(), self.data_dir, int8=False)
        try:
            return next(each for each in backend.generate(request, lambda: False) if isinstance(each, Picture))
        finally:
            backend.close()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
