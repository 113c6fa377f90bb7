"""The released Bonsai folders whose every file is known: sizes, and SHA-256 where somebody published it.

These are the gemlite folders, which people already have and `models import` converts; the MLX releases that `models
get` fetches have no published hashes, so theirs are recorded when they come (`records`). Data only.
"""

from engine.records import Known, Record

_SHARED = {
    "model_index.json": Known(81, "ecb4735e37691a8733f62957fd6c548f841af40624905bb24fa639756153c8a1"),
    "text_encoder-hqq-4bit/config.json": Known(
        1_535, "979b4d6b42dfae3c6dece91da5fe139926dee4a1a244a1cf129d2025c2a60064"
    ),
    "text_encoder-hqq-4bit/qmodel.pt": Known(
        2_822_340_711, "57ecb803e88313f896b24f2f6fedddcb2966c174801f8d89115f4fbae99be48a"
    ),
    "text_encoder-hqq-4bit/tokenizer/added_tokens.json": Known(707),
    "text_encoder-hqq-4bit/tokenizer/chat_template.jinja": Known(4_168),
    "text_encoder-hqq-4bit/tokenizer/merges.txt": Known(1_671_853),
    "text_encoder-hqq-4bit/tokenizer/special_tokens_map.json": Known(613),
    "text_encoder-hqq-4bit/tokenizer/tokenizer.json": Known(11_422_654),
    "text_encoder-hqq-4bit/tokenizer/tokenizer_config.json": Known(5_404),
    "text_encoder-hqq-4bit/tokenizer/vocab.json": Known(2_776_833),
    "vae/config.json": Known(864, "a1cb2ba54a569913eca375d9ee3afe683ba680bd9f64a49d86ec2bd14f304409"),
    "vae/diffusion_pytorch_model.safetensors": Known(
        168_120_878, "ca70d2202afe6415bdbcb8793ba8cd99fd159cfe6192381504d6c4d3036e0f04"
    ),
}
_TERNARY = {
    "manifest.json": Known(3_498, "c47197cb03d028b40b876943eefd2dd0ff438674b29b323264b0ee1404dc6134"),
    "transformer-gemlite-int2/config.json": Known(
        620, "f4c11e406efb84b36ada1a4287423d4aff2092d74bf15774455f88a7e4888a02"
    ),
    "transformer-gemlite-int2/gemlite_autotune.json": Known(470_215),
    "transformer-gemlite-int2/quantization_config.json": Known(6_042),
    "transformer-gemlite-int2/state_dict.pt": Known(
        1_540_457_482, "a3a7df8a90374fea24afce3b36f00b4c728d0254717143d61f912a7b3070e7ac"
    ),
}
_BINARY = {
    "manifest.json": Known(3_497, "bc1db84e10361801ecc12ba92901b55214676be281a934dd89793b226c6061e9"),
    "transformer-gemlite-int1/config.json": Known(
        620, "f4c11e406efb84b36ada1a4287423d4aff2092d74bf15774455f88a7e4888a02"
    ),
    "transformer-gemlite-int1/gemlite_autotune.json": Known(470_216),
    "transformer-gemlite-int1/quantization_config.json": Known(6_010),
    "transformer-gemlite-int1/state_dict.pt": Known(
        1_080_394_762, "d5b455b11958fc92ed8dd7558072252d6ca8d1acb4fcc69281fb61b771f7c8e0"
    ),
}

# The id under which the converted folder is kept -> what the release holds.
RELEASES: dict[str, Record] = {
    "bonsai-ternary": Record(
        "prism-ml/bonsai-image-ternary-4B-gemlite-2bit", "bf047aa80569f193d2c4960033af6ba2629988fa", _SHARED | _TERNARY
    ),
    "bonsai-binary": Record(
        "prism-ml/bonsai-image-binary-4B-gemlite-1bit", "121529b06562ff8c5b75aa34c54c371d2655929b", _SHARED | _BINARY
    ),
}
