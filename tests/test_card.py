"""What becomes of a card's kernels before the first picture, without a card."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.hardware import detect
from engine.torch_backend import backend, triton_card


@pytest.mark.parametrize(("kind", "torch_sees_it", "asked"), [("cuda", True, 2), ("cuda", False, 0), ("cpu", True, 0)])
def test_a_cards_kernels_are_compiled_ahead(
    kind: str, torch_sees_it: bool, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees_it)
    monkeypatch.setattr(backend, "give_back", lambda: None)
    monkeypatch.setattr(backend.triton_check, "found", lambda: told.append("products"))
    monkeypatch.setattr(backend.decoder_card, "passes", lambda: told.append("decoder"))
    backend.TorchBackend(replace(detect(), kind=kind), tmp_path).prepare()
    assert len(told) == asked


def test_a_moment_without_memory_does_not_rule_out_a_cards_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(device: torch.device) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    def unknown(device: torch.device) -> None:
        raise RuntimeError("Triton Error [CUDA]: no binary for it\nand more")

    def prepared(check: Callable[[torch.device], None]) -> None:
        monkeypatch.setattr(backend.triton_check, "found", lambda: triton_card.refusal("kernels", check))
        backend.TorchBackend(replace(detect(), kind="cuda"), tmp_path).prepare()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "give_back", lambda: None)
    monkeypatch.setattr(backend.decoder_card, "passes", lambda: None)
    monkeypatch.setattr(triton_card.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_card, "_compiling", nullcontext)
    monkeypatch.setattr(triton_card, "_mark", lambda name: tmp_path / "mark")
    prepared(full)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        triton_card.refusal("kernels", full)
    assert not (tmp_path / "mark").exists()
    words = "they can't be compiled here (RuntimeError: Triton Error [CUDA]: no binary for it)"
    assert triton_card.refusal("kernels", unknown) == words
    assert triton_card.refusal("kernels", lambda device: None) == ""
    assert (tmp_path / "mark").exists() and triton_card.refusal("kernels", full) == ""
