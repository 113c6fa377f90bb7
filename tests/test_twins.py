"""The two transformer.py are one text in two dialects: same classes, attributes, functions, parameters, constants."""

import ast
from pathlib import Path

import pytest

ENGINE = Path(__file__).parent.parent / "engine"
ONLY_MLX = {"Queue"}  # MLX computes when asked, torch when called
ONLY_TORCH_PARAMETERS = {("token_ids", "device")}  # MLX has one default device


def tree(backend: str) -> ast.Module:
    return ast.parse((ENGINE / backend / "transformer.py").read_text(encoding="utf-8"))


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if (function.name, name) not in ONLY_TORCH_PARAMETERS]


def outline(module: ast.Module) -> dict[str, object]:
    """Names in order: constants, functions with their parameters, classes with fields, methods and attributes."""
    found: dict[str, object] = {}
    for node in module.body:
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.unparse(node.value)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef) and node.name not in ONLY_MLX:
            fields = [node.target.id for node in node.body if isinstance(node, ast.AnnAssign)]
            methods = {
                {"__call__": "forward"}.get(method.name, method.name): parameters(method)
                for method in node.body
                if isinstance(method, ast.FunctionDef)
            }
            found[node.name] = (fields, methods, attributes(node))
    return found


def attributes(node: ast.ClassDef) -> list[str]:
    """What `self.` is given, in order."""
    targets = [target for each in ast.walk(node) if isinstance(each, ast.Assign) for target in each.targets]
    return [ast.unparse(target) for target in targets if ast.unparse(target).startswith("self.")]


def test_one_text() -> None:
    torch, mlx = outline(tree("torch_backend")), outline(tree("mlx_backend"))
    assert list(torch) == list(mlx)
    for name, said in torch.items():
        assert mlx[name] == said, name


def test_the_readme_shows_both() -> None:
    section = (ENGINE.parent / "README.md").read_text(encoding="utf-8").split("## Two dialects, one text")[1]
    shown = section.split("```")[1::2][:2]
    for backend, block in zip(("torch_backend", "mlx_backend"), shown, strict=True):
        text = (ENGINE / backend / "transformer.py").read_text(encoding="utf-8")
        assert block.removeprefix("python\n").strip() in text and len(block) > 300


@pytest.mark.parametrize(
    ("was", "becomes"), [("self.to_q =", "self.to_queries ="), ("shift: Tensor", "offset: Tensor"), ("1000.0", "999.0")]
)
def test_a_difference_would_show(was: str, becomes: str) -> None:
    text = (ENGINE / "torch_backend" / "transformer.py").read_text(encoding="utf-8")
    assert outline(ast.parse(text.replace(was, becomes, 1))) != outline(ast.parse(text))


def test_same_parameters_of_the_same_shape() -> None:
    mlx_utils = pytest.importorskip("mlx.utils", reason="mlx is not installed: pip install 'mlx[cpu]'")
    import torch

    from engine.mlx_backend import transformer as mlx_text
    from engine.torch_backend import transformer as torch_text

    config = {
        "attention_head_dim": 128, "axes_dims_rope": [32] * 4, "eps": 1e-6, "in_channels": 128,
        "joint_attention_dim": 7680, "mlp_ratio": 3.0, "num_attention_heads": 24, "num_layers": 5,
        "num_single_layers": 20, "out_channels": None, "rope_theta": 2000, "timestep_guidance_channels": 256,
    }  # fmt: skip
    with torch.device("meta"):
        expected = torch_text.Flux2Transformer2DModel.from_config(config).state_dict()
    found = dict(mlx_utils.tree_flatten(mlx_text.Flux2Transformer2DModel.from_config(config).parameters()))
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: tuple(t.shape) for name, t in expected.items()}
