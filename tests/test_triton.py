"""What a card computes in Triton against torch: on a card for real, elsewhere interpreted in NumPy.

Triton comes with torch for CUDA. On the CPU build it is 641 MB that nothing else needs, so tests/ doesn't install it:
`pip install --target FOLDER triton==3.6.0`, then `PYTHONPATH=FOLDER python -m pytest tests/test_triton.py`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.torch_backend import fused
from engine.torch_backend.admission import Admission
from tests.test_fused import model, off, velocity

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is missing: it comes with torch for CUDA", allow_module_level=True)

from engine.torch_backend import triton_passes
from engine.torch_backend.triton_passes import Tiles, TritonPasses, Ways, Wrong

ON_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
# many tiles, with a rest in every direction
SMALL = Ways(Tiles(16, 128, 64, 4, 3, True), Tiles(16, 128, 128, 4, 3, True), wide=256)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in NumPy where there is no card (conftest.py)."""
    if ON_CARD:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # NumPy 2.4 makes no number of an array of one, which Triton 3.6 asks of it
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.parametrize("tma", [True, False])
def test_every_pass_agrees_with_torch(tma: bool) -> None:
    if ON_CARD and not triton_passes.is_hopper(DEVICE) and tma:
        pytest.skip("this card has no descriptors")
    triton_passes.check(DEVICE, Ways(SMALL.plain._replace(tma=tma), SMALL.chunked._replace(tma=tma), 1 << 20), group=64)


def test_a_pass_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TritonPasses.multiply
    monkeypatch.setattr(TritonPasses, "add", lambda self, x, w, gate, out: plain(self, x, w, out))
    with pytest.raises(Wrong, match="a gated sum in chunks is .*% off"):
        triton_passes.check(DEVICE, SMALL, group=64)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_fused_blocks_compute_what_blocks_compute(tiny_packs: Path, variant: str) -> None:
    exact = velocity(model(tiny_packs / variant))
    transformer = model(tiny_packs / variant, torch.bfloat16).to(DEVICE)
    admission = Admission(transformer, [TritonPasses(DEVICE, SMALL)])
    fused.install(transformer, admission)
    ours = velocity(transformer, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and off(ours, exact) < 0.01
    assert len(admission.layers) == 14 and all(1e-4 < error < 0.02 for error in admission.errors().values())
    admission.settle()
    together, alone = (velocity(transformer, batch, torch.bfloat16) for batch in (3, 1))
    assert off(together[:1], alone) == 0 and off(together[1:2], alone) > 0.01
