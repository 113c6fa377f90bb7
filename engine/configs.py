"""What a config.json says beside shapes: values with which a model can be computed at all.

A library that is given nonsense answers with a traceback of its own, or builds for hours, so nonsense is refused before
any library sees it. What names and shapes a configuration implies is the business of `shapes`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]
Rule = Callable[[Any, Config], bool]
MOST_LAYERS = 16  # of a block of the autoencoder; the real one has two
MOST_LEVELS = 8  # of the autoencoder, each half the size of the one before; the real one has four
DEEPEST = 512  # layers of a text encoder; the real one has 36
AXES = 4  # of a token's position


def fault(component: str, config: Config) -> str | None:
    """What makes no sense in the configuration of a "transformer", "text_encoder" or "vae", whose shapes have been
    checked: a key with its value, or one that is missing; None: all fine. Other missing keys have a default."""
    for key, rule in _RULES[component].items():
        if key in config and not rule(config[key], config):
            return f"{key} {str(config[key])[:60]!r}"
        if key not in config and key in _REQUIRED:
            return f"no {key}"
    return None


def _positive(value: Any, config: Config) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _flag(value: Any, config: Config) -> bool:
    return type(value) is bool


def _is(*wanted: object) -> Rule:
    return lambda value, config: value in wanted


def _axes(value: Any, config: Config) -> bool:
    """How many features of a head turn with each axis, in pairs."""
    whole = isinstance(value, list) and len(value) == AXES and all(type(n) is int and n >= 0 for n in value)
    return whole and all(n % 2 == 0 for n in value) and sum(value) == config["attention_head_dim"]


def _shared(value: Any, config: Config) -> bool:
    """Each head of keys and values serves as many heads of queries."""
    return type(value) is int and value > 0 and config["num_attention_heads"] % value == 0


def _widths(value: Any, config: Config) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MOST_LEVELS and all(type(n) is int and n > 0 for n in value)


def _groups(value: Any, config: Config) -> bool:
    widths = [*config["block_out_channels"], *(config.get("decoder_block_out_channels") or ())]
    return type(value) is int and value > 0 and all(type(width) is int and width % value == 0 for width in widths)


def _blocks(kind: str) -> Rule:
    return lambda value, config: value == [kind] * len(config["block_out_channels"])


def _up_to(most: int) -> Rule:
    return lambda value, config: type(value) is int and 0 < value <= most


_REQUIRED = ("num_hidden_layers", "layers_per_block", "norm_num_groups", "batch_norm_eps")
_RULES: dict[str, dict[str, Rule]] = {
    "transformer": {"eps": _positive, "rope_theta": _positive, "axes_dims_rope": _axes},
    "text_encoder": {
        "num_hidden_layers": _up_to(DEEPEST),
        "rms_norm_eps": _positive,
        "rope_theta": _positive,
        "hidden_act": _is("silu"),
        "num_key_value_heads": _shared,
    },
    "vae": {
        "block_out_channels": _widths,  # before the rules that divide by them
        "act_fn": _is("silu"),
        "batch_norm_eps": _positive,
        "layers_per_block": _up_to(MOST_LAYERS),
        "norm_num_groups": _groups,
        "down_block_types": _blocks("DownEncoderBlock2D"),
        "up_block_types": _blocks("UpDecoderBlock2D"),
        "mid_block_add_attention": _flag,
        "use_quant_conv": _flag,
        "use_post_quant_conv": _flag,
    },
}
