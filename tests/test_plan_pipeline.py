"""Pipelines from their configuration alone, as ``distill plan`` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipeline_configs
import pytest
import tiny
from torch import nn

from distill.config import load_config
from distill.errors import UserError
from distill.plan import make_plan
from distill.plan_backbones import BACKBONES, backbone_pipeline
from distill.plan_pipeline import hollow_teacher
from distill.teacher import Teacher


def test_hollow_teacher_is_called_as_the_real_one(tmp_path: Path) -> None:
    """Same calling convention and guidance, found on a pipeline without weights."""
    real = Teacher(tiny.tiny_stable_diffusion())
    tiny.tiny_stable_diffusion().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    hollow = hollow_teacher(str(tmp_path))
    assert hollow.denoiser.call.state == real.denoiser.call.state and hollow.denoiser.call.times == real.denoiser.call.times
    assert hollow.denoiser.call.layouts == real.denoiser.call.layouts and hollow.guidance == real.guidance
    assert hollow.sample_shape == real.sample_shape and hollow.denoiser.kind == real.denoiser.kind
    there, here = real.condition(["a cat"]), hollow.condition(["a cat"])
    assert {k: v.shape for k, v in there.values.items()} == {k: v.shape for k, v in here.values.items()}
    assert all(v.device.type == "meta" for v in here.values.values())


SMALL: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4,
                    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "UNet2DConditionModel": {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 8,
                             "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                             "projection_class_embeddings_input_dim": 32},
    "SD3Transformer2DModel": {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16,
                              "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 8},
    "FluxTransformer2DModel": {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
                               "joint_attention_dim": 16, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True},
    "PixArtTransformer2DModel": {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": 16,
                                 "cross_attention_dim": 16},
    "DiTTransformer2DModel": {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    "SanaTransformer2DModel": {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": 16,
                               "cross_attention_dim": 16, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8},
}


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_backbone_alone(tmp_path: Path, name: str) -> None:
    """A folder with nothing but a backbone's config.json can be planned."""
    pipeline_configs.write_json(tmp_path / "backbone/config.json", {"_class_name": name, **SMALL[name]})
    (tmp_path / "prompts.txt").write_text("a cat\n")
    prompts = "UNet2DModel" != name and "DiT" not in name
    data = f"data: {{source: prompts, path: {tmp_path / 'prompts.txt'}}}\n" if prompts else ""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"teacher: {{pipeline: {tmp_path / 'backbone'}}}\nmethod: {{name: dmd2, critic_steps: 1}}\n{data}"
                      f"trainer: {{batch_size: 1}}\noutput: {{folder: {tmp_path / 'run'}}}\n")
    plan = make_plan(load_config(recipe), "cpu")
    assert plan.backbone == name and not plan.notes
    assert plan.memory["activations"] > 0 and plan.flops["student backward"] > plan.flops["student forward"] / 2


def test_unknown_backbone_alone() -> None:
    """It is refused by name."""
    with pytest.raises(UserError, match="Linear.*UNet2DConditionModel"):
        backbone_pipeline(nn.Linear(1, 1))
