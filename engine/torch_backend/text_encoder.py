"""Token ids to the states that the image transformer reads: transformers' Qwen3, cut off where it is no longer needed.

It knows no prompt and no template (engine/prompt.py does). transformers is imported when an encoder is made.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from engine.fitting import REPAIR, sensible
from engine.packs import Component
from engine.torch_backend import linear
from engine.types import EngineError


class TextEncoder:
    """The first layers of a Qwen3. Of `hidden_states`, 0 is the embedding and k the output of layer k."""

    def __init__(
        self, component: Component, hidden_states: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises EngineError when the files have too few layers, or tensors that don't fit."""
        from transformers import Qwen3Config, Qwen3Model
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        depth, layers = component.config["num_hidden_layers"], max(hidden_states)
        if layers > depth:
            raise EngineError(f"{component.folder} has {depth} layers, so no state {layers}; {REPAIR}")
        cut = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
        # `quantization` is MLX's key for its own use, and ours through component.quantization
        with sensible(component.folder):
            config = Qwen3Config(**{k: v for k, v in component.config.items() if k != "quantization"} | cut)
            with torch.device("meta"):
                self.model = Qwen3Model(config)
            # Its frequencies are in no file, so the ones made on the meta device have no values.
            self.model.rotary_emb = Qwen3RotaryEmbedding(config).to(device)
        # States are taken between layers. transformers puts the final norm on the last one, where nobody else has it.
        self.model.norm = nn.Identity()
        unused = ("norm.", "lm_head.", *(f"layers.{number}." for number in range(layers, depth)))
        self.files = linear.build(self.model, component, dtype, device, prefix="model.", unused=unused)
        self.hidden_states = hidden_states
        self.device = device
        self._states: dict[int, Tensor] = {}
        self._check: Callable[[], None] = lambda: None
        for number, module in enumerate((self.model.embed_tokens, *self.model.layers)):
            module.register_forward_hook(partial(self._after, number))

    def _after(self, number: int, module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        self._check()
        if number in self.hidden_states:
            self._states[number] = output

    @torch.inference_mode()
    def encode(self, ids: np.ndarray, mask: np.ndarray, check: Callable[[], None]) -> Tensor:
        """ids and mask int64 [1, L] -> the wanted states side by side [1, L, states * hidden size].

        `check` is called after every layer; what it raises ends the work. Padding rows are computed as well: the image
        transformer was trained with them.
        """
        self._check = check
        try:
            self.model(
                input_ids=torch.from_numpy(ids).to(self.device),
                attention_mask=torch.from_numpy(mask).to(self.device),
                use_cache=False,
            )
            return torch.cat([self._states[number] for number in self.hidden_states], dim=-1)
        finally:
            self._states.clear()
