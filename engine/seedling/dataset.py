"""The training pictures as latents, encoded once.

Example i of a size is a function of (seed, size, i), so a caption can be drawn anew each time it is used while the
latent comes from disk. Knows scenes and the VAE; no captions, no transformer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

from engine.seedling import parallel
from engine.seedling.drawing import render
from engine.seedling.scenes import Scene, training_scene
from engine.seedling.vae import fold

PIXELS_A_TOKEN = 32


@dataclass(frozen=True)
class SizeShare:
    """One picture size, and the share of batches that are made of it."""

    width: int
    height: int
    share: float


SIZES = (
    SizeShare(256, 256, 0.82), SizeShare(128, 128, 0.06), SizeShare(320, 192, 0.06), SizeShare(192, 320, 0.06)
)  # fmt: skip
SHARD = 500  # examples a file


def scene_of(seed: int, size: SizeShare, index: int) -> Scene:
    return training_scene(np.random.default_rng((seed, size.width, size.height, index)))


@torch.no_grad()
def normalized_latents(vae: AutoencoderKLFlux2, images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] -> float16 [B, tokens, channels], each channel with mean 0 and variance 1 over the world."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = fold(vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean)
    mean, var = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
    z = (z - mean) / torch.sqrt(var + vae.config["batch_norm_eps"])
    return z.flatten(2).transpose(1, 2).half().numpy()


def shards(examples: int) -> list[tuple[SizeShare, int]]:
    """(size, shard number) of all there is to encode: `examples` of the full size, an eighth of that of each other."""
    counts = [examples, *[examples // 8] * (len(SIZES) - 1)]
    return [(size, n) for size, count in zip(SIZES, counts, strict=True) for n in range(max(1, count // SHARD))]


def shard_path(folder: Path, size: SizeShare, number: int) -> Path:
    return folder / f"{size.width}x{size.height}-{number:03}.npy"


def build(folder: Path, vae: AutoencoderKLFlux2, seed: int, examples: int, batch: int = 10) -> None:
    """Encodes what is not there yet; each process of a parallel run takes its share of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, number in shards(examples)[parallel.rank() :: parallel.processes()]:
        path = shard_path(folder, size, number)
        if path.exists():
            continue
        out = []
        for start in range(number * SHARD, (number + 1) * SHARD, batch):
            scenes = [scene_of(seed, size, index) for index in range(start, start + batch)]
            out.append(normalized_latents(vae, np.stack([render(s, size.width, size.height) for s in scenes])))
        aside = path.with_suffix(".tmp.npy")
        np.save(aside, np.concatenate(out))
        aside.replace(path)


class Latents:
    """The encoded examples of one size, memory-mapped."""

    def __init__(self, folder: Path, size: SizeShare):
        files = sorted(folder.glob(f"{size.width}x{size.height}-[0-9]*.npy"))
        self._files = [np.load(file, mmap_mode="r") for file in files if not file.name.endswith(".tmp.npy")]

    def __len__(self) -> int:
        return SHARD * len(self._files)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """float32 [len(indices), tokens, channels]."""
        return np.stack([self._files[i // SHARD][i % SHARD] for i in indices]).astype(np.float32)
