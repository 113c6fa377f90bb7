"""A training run on disk: resume where it stopped, save now and then, leave the finished weights as safetensors."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Run:
    """One folder. `state.pt` is ours and temporary (read with weights_only), `final.safetensors` is the result."""

    def __init__(self, folder: Path, every: int = 250):
        self.folder, self.every = folder, every
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def finished(self) -> bool:
        return (self.folder / "final.safetensors").exists()

    def resume(self, **parts: Any) -> int:
        """Loads every part that has load_state_dict and returns the number of steps done."""
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def maybe_save(self, step: int, **parts: Any) -> None:
        if step % self.every:
            return
        aside = self.folder / "state.tmp"
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, aside)
        os.replace(aside, self.folder / "state.pt")

    def finish(self, state: dict[str, torch.Tensor]) -> None:
        aside = self.folder / "final.tmp"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, aside)
        os.replace(aside, self.folder / "final.safetensors")

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "final.safetensors")
