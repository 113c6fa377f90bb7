"""How hqq.pt was made: two layers quantised and saved by hqq itself, with the weights it computes from them.

    pip install --no-deps --target hqq-0.2.8 hqq==0.2.8.post1 termcolor tqdm
    PYTHONPATH=hqq-0.2.8 python tests/packs/golden/make_hqq.py

hqq brings accelerate, datasets and more, which the tests should not need.
"""

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

N, K = 16, 128

torch.manual_seed(0)
HQQLinear.set_backend(HQQBackend.PYTORCH)
kept: dict[str, dict] = {}
for axis in (1, 0):
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
    layer = HQQLinear(torch.nn.Linear(K, N, bias=False), config, compute_dtype=torch.float16, device="cpu")
    layer.encoded_state_dict = False  # as hqq's save_quantized does
    kept[f"axis{axis}"] = dict(layer.state_dict())
    kept[f"axis{axis}.expected"] = {"weight": layer.dequantize().detach()}
torch.save(kept, Path(__file__).with_name("hqq.pt"))
