"""LoRA key names of kohya's sd-scripts, which ComfyUI, Forge and others read.

    lora_unet_<module with underscores>.lora_down.weight   .lora_up.weight   .alpha   (.dora_scale)

A UNet's modules are named as in diffusers. Flux and SD3 are named as in their authors' own networks, where query, key and
value (and in Flux's single blocks the MLP's first layer) are one fused layer: the adapters of the parts become one of
summed rank, its up matrix block-diagonal. Two modulation layers have their scale and shift in the other order there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.export.adapter import Layer, base_weight, row_norms

#: (module in diffusers, fused parts in order; module there); {} is a block's number. "~" marks swapped halves.
Rule = tuple[tuple[str, ...], str]

_ATTENTION = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX: Sequence[Rule] = (
    (tuple(f"transformer_blocks.{{}}.attn.{p}" for p in _ATTENTION), "double_blocks_{}_img_attn_qkv"),
    (tuple(f"transformer_blocks.{{}}.attn.{p}" for p in _ADDED), "double_blocks_{}_txt_attn_qkv"),
    (("transformer_blocks.{}.attn.to_out.0",), "double_blocks_{}_img_attn_proj"),
    (("transformer_blocks.{}.attn.to_add_out",), "double_blocks_{}_txt_attn_proj"),
    (("transformer_blocks.{}.ff.net.0.proj",), "double_blocks_{}_img_mlp_0"),
    (("transformer_blocks.{}.ff.net.2",), "double_blocks_{}_img_mlp_2"),
    (("transformer_blocks.{}.ff_context.net.0.proj",), "double_blocks_{}_txt_mlp_0"),
    (("transformer_blocks.{}.ff_context.net.2",), "double_blocks_{}_txt_mlp_2"),
    (("transformer_blocks.{}.norm1.linear",), "double_blocks_{}_img_mod_lin"),
    (("transformer_blocks.{}.norm1_context.linear",), "double_blocks_{}_txt_mod_lin"),
    ((*(f"single_transformer_blocks.{{}}.attn.{p}" for p in _ATTENTION), "single_transformer_blocks.{}.proj_mlp"), "single_blocks_{}_linear1"),
    (("single_transformer_blocks.{}.proj_out",), "single_blocks_{}_linear2"),
    (("single_transformer_blocks.{}.norm.linear",), "single_blocks_{}_modulation_lin"),
    (("x_embedder",), "img_in"),
    (("context_embedder",), "txt_in"),
    (("time_text_embed.timestep_embedder.linear_1",), "time_in_in_layer"),
    (("time_text_embed.timestep_embedder.linear_2",), "time_in_out_layer"),
    (("time_text_embed.text_embedder.linear_1",), "vector_in_in_layer"),
    (("time_text_embed.text_embedder.linear_2",), "vector_in_out_layer"),
    (("time_text_embed.guidance_embedder.linear_1",), "guidance_in_in_layer"),
    (("time_text_embed.guidance_embedder.linear_2",), "guidance_in_out_layer"),
    (("~norm_out.linear",), "final_layer_adaLN_modulation_1"),
    (("proj_out",), "final_layer_linear"),
)

SD3: Sequence[Rule] = (
    (tuple(f"transformer_blocks.{{}}.attn.{p}" for p in _ATTENTION), "joint_blocks_{}_x_block_attn_qkv"),
    (tuple(f"transformer_blocks.{{}}.attn2.{p}" for p in _ATTENTION), "joint_blocks_{}_x_block_attn2_qkv"),
    (tuple(f"transformer_blocks.{{}}.attn.{p}" for p in _ADDED), "joint_blocks_{}_context_block_attn_qkv"),
    (("transformer_blocks.{}.attn.to_out.0",), "joint_blocks_{}_x_block_attn_proj"),
    (("transformer_blocks.{}.attn2.to_out.0",), "joint_blocks_{}_x_block_attn2_proj"),
    (("transformer_blocks.{}.attn.to_add_out",), "joint_blocks_{}_context_block_attn_proj"),
    (("transformer_blocks.{}.ff.net.0.proj",), "joint_blocks_{}_x_block_mlp_fc1"),
    (("transformer_blocks.{}.ff.net.2",), "joint_blocks_{}_x_block_mlp_fc2"),
    (("transformer_blocks.{}.ff_context.net.0.proj",), "joint_blocks_{}_context_block_mlp_fc1"),
    (("transformer_blocks.{}.ff_context.net.2",), "joint_blocks_{}_context_block_mlp_fc2"),
    (("transformer_blocks.{}.norm1.linear",), "joint_blocks_{}_x_block_adaLN_modulation_1"),
    (("transformer_blocks.{}.norm1_context.linear",), "joint_blocks_{}_context_block_adaLN_modulation_1"),
    (("pos_embed.proj",), "x_embedder_proj"),
    (("context_embedder",), "context_embedder"),
    (("time_text_embed.timestep_embedder.linear_1",), "t_embedder_mlp_0"),
    (("time_text_embed.timestep_embedder.linear_2",), "t_embedder_mlp_2"),
    (("time_text_embed.text_embedder.linear_1",), "y_embedder_mlp_0"),
    (("time_text_embed.text_embedder.linear_2",), "y_embedder_mlp_2"),
    (("~norm_out.linear",), "final_layer_adaLN_modulation_1"),
    (("proj_out",), "final_layer_linear"),
)

RULES: Mapping[str, Sequence[Rule]] = {"FluxTransformer2DModel": FLUX, "SD3Transformer2DModel": SD3}


def modules(backbone: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """kohya's module → the diffusers modules that it is made of, in order ("~" before one with swapped halves), for those
    that hold one of the given names.

    Raises:
        UserError: if no kohya names are known for the backbone, or for one of the names.
    """
    kind = type(backbone).__name__
    if kind == "UNet2DConditionModel":
        return {"lora_unet_" + name.replace(".", "_"): (name,) for name in names}
    if kind not in RULES:
        known = ", ".join(["UNet2DConditionModel", *RULES])
        raise UserError(f"no kohya names are known for a {kind} (only for {known}): use --to lora; ComfyUI reads diffusers' names too")
    made: dict[str, tuple[str, ...]] = {}
    for name in names:
        block = re.search(r"blocks\.(\d+)\.", name)
        number = block.group(1) if block else ""
        for parts, there in RULES[kind]:
            plain = tuple(part.format(number) for part in parts)
            if name in (part.lstrip("~") for part in plain):
                if kind == "SD3Transformer2DModel" and name.endswith("norm1_context.linear") and _is_last(backbone, int(number)):
                    plain = tuple("~" + part for part in plain)  # the last block's context only is scaled and shifted
                made["lora_unet_" + there.format(number)] = plain
                break
        else:
            raise UserError(f"{name} of a {kind} has no kohya name: leave it out of student.lora.targets, or use --to lora")
    return made


def _is_last(backbone: nn.Module, number: int) -> bool:
    return number == len(backbone.get_submodule("transformer_blocks")) - 1  # type: ignore[arg-type]


def weights(backbone: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The adapter in kohya's names."""
    made: dict[str, Tensor] = {}
    for there, parts in modules(backbone, list(layers)).items():
        fused = fuse(backbone, layers, parts)
        made[f"{there}.lora_down.weight"], made[f"{there}.lora_up.weight"] = fused.down, fused.up
        made[f"{there}.alpha"] = torch.tensor(float(fused.alpha))
        if fused.magnitude is not None:
            made[f"{there}.dora_scale"] = fused.magnitude
    return made


def fuse(backbone: nn.Module, layers: Mapping[str, Layer], parts: Sequence[str]) -> Layer:
    """One layer of several: the downs stacked, the ups on a block diagonal; parts without an adapter get rows of zeros
    (and the magnitudes that their weights have)."""
    present = [layers[p.lstrip("~")] for p in parts if p.lstrip("~") in layers]
    rank, first = sum(layer.rank for layer in present), present[0]
    dora = any(layer.magnitude is not None for layer in present)
    ups, magnitudes, column = [], [], 0
    for part in parts:
        layer, weight, swapped = layers.get(part.lstrip("~")), base_weight(backbone, part.lstrip("~")), part.startswith("~")
        up = first.up.new_zeros(len(weight), rank, *first.up.shape[2:])
        if layer is not None:
            up[:, column : column + layer.rank] = layer.up
            column += layer.rank
        ups.append(swap_halves(up) if swapped else up)
        if dora:
            norms = row_norms(weight) if layer is None or layer.magnitude is None else layer.magnitude.flatten()
            magnitudes.append(swap_halves(norms) if swapped else norms)
    magnitude = torch.cat(magnitudes).reshape(-1, *(1,) * (first.down.dim() - 1)) if dora else None
    return Layer(torch.cat([layer.down for layer in present]), torch.cat(ups), first.scale * rank, magnitude)


def swap_halves(rows: Tensor) -> Tensor:
    """(scale, shift) ↔ (shift, scale)."""
    return torch.cat(rows.chunk(2)[::-1])


def deltas(backbone: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What a file in kohya's names does to each diffusers layer: the change of its weight, and its magnitudes."""
    everything = [n for n, m in backbone.named_modules() if isinstance(getattr(m, "base_layer", m), (nn.Linear, nn.Conv2d)) and "lora_" not in n]
    every = modules_that_have_names(backbone, [n.removesuffix(".base_layer") for n in everything])
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for key in stored:
        if not key.endswith(".lora_down.weight"):
            continue
        there = key.removesuffix(".lora_down.weight")
        layer = Layer(stored[key], stored[f"{there}.lora_up.weight"], float(stored[f"{there}.alpha"]), stored.get(f"{there}.dora_scale"))
        start, delta = 0, layer.delta()
        for part in every[there]:
            name, stop = part.lstrip("~"), start + len(base_weight(backbone, part.lstrip("~")))
            rows, magnitude = delta[start:stop], None if layer.magnitude is None else layer.magnitude[start:stop]
            if part.startswith("~"):
                rows, magnitude = swap_halves(rows), None if magnitude is None else swap_halves(magnitude)
            found[name], start = (rows, magnitude), stop
    return found


def modules_that_have_names(backbone: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``modules`` of all layers, those without a kohya name left out."""
    made: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(names):
        try:
            made |= modules(backbone, [name])
        except UserError:
            continue
    return made
