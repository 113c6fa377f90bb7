"""The MLX backend's text encoder and packed layers, one by one, for `accept`."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from engine.mlx_backend.backend import Model
from engine.packs import Pack
from engine.plan import Plan
from engine.types import EngineError, Picture, Request


class MlxProbe:
    """See engine.accept_subject.Probe. Each part is loaded when it is first asked, as a picture would load it."""

    def __init__(self, pack: Pack, decided: Plan, data_dir: Path) -> None:
        self.model = Model(pack.folder, data_dir)
        self.dtype: mx.Dtype = getattr(mx, decided.dtype)

    def states(self, prompt: str) -> np.ndarray:
        encoder, notes = self.model.load_text_encoder(self.dtype, lambda: None), self.model.pack.notes
        ids, mask, tokens = self.model.tokenizer.encode(prompt, notes.text_length)
        side_by_side = encoder.encode(ids, mask, lambda: None)[0, :tokens]
        return _array(side_by_side).reshape(tokens, len(notes.hidden_states), -1).transpose(1, 0, 2)

    def product(self, fqn: str, x: np.ndarray) -> np.ndarray:
        self.model.drop_text_encoder()  # both need not be in memory
        transformer = self.model.load_transformer(self.dtype, lambda: None)
        layer = dict(transformer.named_modules())[fqn]
        return _array(layer(mx.array(x).astype(self.dtype)))

    def plain(self, request: Request) -> Picture:
        raise EngineError("MLX rounds in none of its kernels, so there is no other picture to hold one to")


def _array(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32))
