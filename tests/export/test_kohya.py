"""LoRA key names of kohya and ComfyUI: fused layers, alphas, swapped halves; read back by diffusers where it can."""

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from tiny import flux_transformer, tiny_dit, tiny_sd3, tiny_stable_diffusion

from distill.errors import UserError
from distill.export import kohya
from distill.export.adapter import Layer, check_same

RANK, ALPHA = 2, 3.0


def adapter(backbone: torch.nn.Module, names: list[str], dora: bool = False) -> dict[str, Layer]:
    """Random layers of the right shapes."""
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for name in names:
        weight: Any = backbone.get_submodule(name).weight
        shape = tuple(weight.shape)
        magnitude = torch.rand(shape[0], generator=draw) + 0.5 if dora else None
        layers[name] = Layer(
            torch.randn(RANK, *shape[1:], generator=draw), torch.randn(shape[0], RANK, *(1,) * (len(shape) - 2), generator=draw), ALPHA, magnitude
        )
    return layers


def linears(backbone: torch.nn.Module) -> list[str]:
    return [n for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and "." in n]


def test_unet_names_and_alphas() -> None:
    unet = tiny_stable_diffusion().unet
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = kohya.weights(unet, adapter(unet, [name]))
    start = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert weights.keys() == {f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"}
    assert weights[f"{start}.alpha"].item() == ALPHA and weights[f"{start}.lora_down.weight"].shape == (RANK, 16)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("backbone", [tiny_stable_diffusion().unet, tiny_sd3().transformer, flux_transformer()])
def test_what_is_written_is_what_was_trained(backbone: torch.nn.Module, dora: bool) -> None:
    layers = adapter(backbone, [n for n in linears(backbone) if "blocks" in n], dora)
    weights = kohya.weights(backbone, layers)
    check_same(layers, kohya.deltas(backbone, weights), backbone)
    broken = {k: v * 1.01 if k.endswith("alpha") else v for k, v in weights.items()}
    with pytest.raises(UserError, match="differs in the exported LoRA"):
        check_same(layers, kohya.deltas(backbone, broken), backbone)


@pytest.mark.parametrize("dora", [False, True])
def test_parts_of_a_fused_layer_without_an_adapter_stay_as_they_are(dora: bool) -> None:
    backbone = flux_transformer()
    layers = adapter(backbone, ["transformer_blocks.0.attn.to_k"], dora)
    weights = kohya.weights(backbone, layers)
    up = weights["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert up.shape == (96, RANK) and torch.equal(up[32:64], layers["transformer_blocks.0.attn.to_k"].up)
    assert up[:32].abs().max() == 0 and up[64:].abs().max() == 0
    check_same(layers, kohya.deltas(backbone, weights), backbone)
    if dora:
        weights["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"][0] *= 2
        with pytest.raises(UserError, match="should not be"):
            check_same(layers, kohya.deltas(backbone, weights), backbone)


def test_flux_names_are_the_ones_that_diffusers_converts() -> None:
    """Every layer of a transformer of Flux's real widths (on the meta device), through diffusers' own converter."""
    with torch.device("meta"):
        backbone = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    layers = adapter(backbone, [n for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)])
    converted = _convert_kohya_flux_lora_to_diffusers(dict(kohya.weights(backbone, layers)))
    names = {k.removeprefix("transformer.").rsplit(".lora_", 1)[0] for k in converted}
    assert names == set(layers)
    for key, down in converted.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            if name in ("norm_out.linear", "proj_out"):  # their alpha is dropped by the converter
                continue
            up = converted[key.replace("lora_A", "lora_B")]
            wanted = layers[name].scale * layers[name].up[:5].double() @ layers[name].down.double()
            assert torch.allclose(up[:5].double() @ down.double(), wanted, atol=1e-4 * float(wanted.abs().max())), name


def test_sd3_fuses_query_key_and_value_and_swaps_the_last_modulation() -> None:
    backbone = tiny_sd3().transformer
    names = [f"transformer_blocks.{i}.{part}" for i in (0, 1) for part in ("attn.to_q", "attn.to_k", "attn.to_v", "norm1_context.linear")]
    layers = adapter(backbone, names)
    weights = kohya.weights(backbone, layers)
    q, k, v = (layers[f"transformer_blocks.1.attn.to_{x}"].delta() for x in "qkv")

    def delta(name: str) -> torch.Tensor:
        down, up = weights[f"lora_unet_joint_blocks_{name}.lora_down.weight"], weights[f"lora_unet_joint_blocks_{name}.lora_up.weight"]
        return weights[f"lora_unet_joint_blocks_{name}.alpha"] / len(down) * up.double() @ down.double()

    assert torch.allclose(delta("1_x_block_attn_qkv"), torch.cat([q, k, v]))
    plain, last = (layers[f"transformer_blocks.{i}.norm1_context.linear"].delta() for i in (0, 1))
    assert torch.allclose(delta("0_context_block_adaLN_modulation_1"), plain)
    scale, shift = last.chunk(2)  # diffusers: (scale, shift); SD3: (shift, scale)
    assert torch.allclose(delta("1_context_block_adaLN_modulation_1"), torch.cat([shift, scale]))


def test_backbones_without_names_are_refused() -> None:
    with pytest.raises(UserError, match="no kohya names are known for a DiTTransformer2DModel .*use --to lora"):
        kohya.modules(tiny_dit().transformer, ["transformer_blocks.0.attn1.to_q"])
    with pytest.raises(UserError, match="pos_embed.nothing .* has no kohya name"):
        kohya.modules(tiny_sd3().transformer, ["pos_embed.nothing"])
