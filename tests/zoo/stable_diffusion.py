"""Stable Diffusion 1 and 2, and what is built on its U-Net: one table of siblings that share their parts."""

from __future__ import annotations

from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetXSAdapter,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    PriorTransformer,
    T2IAdapter,
    UNet2DConditionModel,
)
from tiny import vp_scheduler

from zoo.core import (
    PROMPT,
    SQUARE,
    TEXT,
    add,
    assemble,
    case,
    tensor,
    tiny_autoencoder_kl,
    tiny_clip_images,
    tiny_clip_text,
    tiny_clip_tokenizer,
    tiny_clip_vision,
    tiny_image,
    tiny_mask,
    tiny_unet2d_condition,
)

EDIT = {"prompt": PROMPT, "image": lambda: tiny_image()}
PAINT = {**EDIT, "mask_image": lambda: tiny_mask()}
CONTROL = {**TEXT, "image": lambda: tiny_image()}
CONTROL_EDIT = {**EDIT, "control_image": lambda: tiny_image(seed=1)}
CONTROL_PAINT = {**CONTROL_EDIT, "mask_image": lambda: tiny_mask()}


def parts(scheduler: Any = None, **unet: Any) -> dict[str, Any]:
    """Every component that a pipeline of the family may ask for; ``assemble`` takes what it needs."""
    backbone = tiny_unet2d_condition(**unet)
    return {
        "vae": tiny_autoencoder_kl(), "text_encoder": tiny_clip_text(), "tokenizer": tiny_clip_tokenizer(), "unet": backbone,
        "scheduler": scheduler or vp_scheduler(), "image_encoder": tiny_clip_vision(), "feature_extractor": tiny_clip_images(),
    }


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet for the U-Net; images are twice the latents' size."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))


def adapter() -> T2IAdapter:
    """A T2I-adapter for ``tiny_unet2d_condition``."""
    return T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")


def _plain(name: str, **unet: Any) -> Any:
    return lambda: assemble(name, **parts(**unet))


def _controlled(name: str) -> Any:
    def make() -> Any:
        shared = parts()
        return assemble(name, **shared, controlnet=controlnet(shared["unet"]))

    return make


for _name, _task, _call, _unet in (
    ("StableDiffusionImg2ImgPipeline", "image-to-image", EDIT, {}),
    ("StableDiffusionInpaintPipeline", "inpainting", {**PAINT, **SQUARE}, {"in_channels": 9}),
    ("StableDiffusionInstructPix2PixPipeline", "image-to-image", EDIT, {"in_channels": 8}),
    ("StableDiffusionImageVariationPipeline", "image-to-image", {"image": lambda: tiny_image(), **SQUARE}, {}),
    ("StableDiffusionPAGPipeline", "text-to-image", {**TEXT, "pag_scale": 3.0}, {}),
    ("StableDiffusionPAGImg2ImgPipeline", "image-to-image", {**EDIT, "pag_scale": 3.0}, {}),
    ("StableDiffusionPAGInpaintPipeline", "inpainting", {**PAINT, **SQUARE, "pag_scale": 3.0}, {"in_channels": 9}),
):
    add(_name, _task, _plain(_name, **_unet), **_call)

for _name, _task, _call in (
    ("StableDiffusionControlNetPipeline", "control", CONTROL),
    ("StableDiffusionControlNetImg2ImgPipeline", "control", CONTROL_EDIT),
    ("StableDiffusionControlNetInpaintPipeline", "control", CONTROL_PAINT),
    ("StableDiffusionControlNetPAGPipeline", "control", {**CONTROL, "pag_scale": 3.0}),
    ("StableDiffusionControlNetPAGInpaintPipeline", "control", {**CONTROL_PAINT, "pag_scale": 3.0}),
):
    add(_name, _task, _controlled(_name), **_call)


@case("text-to-image", **TEXT)
def StableDiffusionPipeline() -> Any:
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return assemble("StableDiffusionPipeline", **parts(scheduler))


@case("text-to-image", **TEXT)
def LatentConsistencyModelPipeline() -> Any:
    return assemble("LatentConsistencyModelPipeline", **parts(vp_scheduler(cls=LCMScheduler), time_cond_proj_dim=8))


@case("image-to-image", **EDIT)
def LatentConsistencyModelImg2ImgPipeline() -> Any:
    return assemble("LatentConsistencyModelImg2ImgPipeline", **parts(vp_scheduler(cls=LCMScheduler), time_cond_proj_dim=8))


@case("control", **CONTROL)
def StableDiffusionAdapterPipeline() -> Any:
    return assemble("StableDiffusionAdapterPipeline", **parts(), adapter=adapter())


@case("control", **CONTROL)
def StableDiffusionControlNetXSPipeline() -> Any:
    shared = parts(layers_per_block=2)
    net = ControlNetXSAdapter.from_unet(shared["unet"], size_ratio=0.5, num_attention_heads=2, conditioning_embedding_out_channels=(8, 16))
    return assemble("StableDiffusionControlNetXSPipeline", **shared, controlnet=net)


@case("image-to-image", **EDIT)
def StableDiffusionDepth2ImgPipeline() -> Any:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    depth = DPTForDepthEstimation(DPTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
    ))
    shared = {**parts(in_channels=5), "feature_extractor": DPTImageProcessor(size={"height": 32, "width": 32})}
    return assemble("StableDiffusionDepth2ImgPipeline", **shared, depth_estimator=depth)


@case("super-resolution", prompt=PROMPT, image=lambda: tiny_image(8), noise_level=20)
def StableDiffusionUpscalePipeline() -> Any:
    shared = parts(vp_scheduler("v_prediction"), in_channels=7, num_class_embeds=100)
    return assemble("StableDiffusionUpscalePipeline", **shared, low_res_scheduler=DDPMScheduler())


@case("super-resolution", **EDIT)
def StableDiffusionLatentUpscalePipeline() -> Any:
    unet = {
        "act_fn": "gelu", "attention_head_dim": 8, "norm_num_groups": None, "block_out_channels": (32, 32, 64, 64), "time_cond_proj_dim": 128 + 16,
        "conv_in_kernel": 1, "conv_out_kernel": 1, "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"), "in_channels": 8, "out_channels": 5, "mid_block_type": None,
        "resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier", "timestep_post_act": "gelu", "only_cross_attention": False,
    }
    return assemble("StableDiffusionLatentUpscalePipeline", **parts(EulerDiscreteScheduler(prediction_type="sample"), **unet))


def _unclip() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    unet = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32}
    return {
        **parts(vp_scheduler("v_prediction"), **unet), "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=16),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


@case("text-to-image", **TEXT, prior_num_inference_steps=2)
def StableUnCLIPPipeline() -> Any:
    return assemble(
        "StableUnCLIPPipeline", **_unclip(), prior_tokenizer=tiny_clip_tokenizer(), prior_text_encoder=tiny_clip_text(projection=16),
        prior=PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=16),
        prior_scheduler=DDPMScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0, beta_schedule="squaredcos_cap_v2",
        ),
    )


@case("image-to-image", **EDIT, **SQUARE)
def StableUnCLIPImg2ImgPipeline() -> Any:
    return assemble("StableUnCLIPImg2ImgPipeline", **_unclip())


@case("image-to-image", editing_prompt=[PROMPT], use_intersect_mask=False)
def LEditsPPPipelineStableDiffusion() -> Any:
    """Its call needs an inversion of an image first."""
    pipeline = assemble("LEditsPPPipelineStableDiffusion", **parts(sde_dpm()))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.invert(image=tiny_image(32), num_inversion_steps=4, skip=0.25)
    return pipeline


def sde_dpm() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return vp_scheduler(cls=DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", solver_order=2)


# Deprecated ones


for _name, _task, _call in (
    ("StableDiffusionSAGPipeline", "text-to-image", {**TEXT, "sag_scale": 0.5}),
    ("StableDiffusionPanoramaPipeline", "text-to-image", {**TEXT, "view_batch_size": 1}),
    ("StableDiffusionAttendAndExcitePipeline", "text-to-image", {**TEXT, "token_indices": [2, 3], "attn_res": (8, 8)}),
    ("StableDiffusionModelEditingPipeline", "text-to-image", TEXT),
    ("StableDiffusionPipelineSafe", "text-to-image", TEXT),
    ("SemanticStableDiffusionPipeline", "text-to-image", TEXT),
    ("StableDiffusionPix2PixZeroPipeline", "image-to-image", {
        **TEXT, "source_embeds": lambda: tensor(2, 16, 16, seed=1), "target_embeds": lambda: tensor(2, 16, 16, seed=2),
    }),
    ("CycleDiffusionPipeline", "image-to-image", {**EDIT, "source_prompt": "a green car", "eta": 0.1}),
    ("StableDiffusionInpaintPipelineLegacy", "inpainting", PAINT),
):
    add(_name, _task, _plain(_name), **_call)


@case("text-to-image", **TEXT)
def StableDiffusionParadigmsPipeline() -> Any:
    return assemble("StableDiffusionParadigmsPipeline", **parts(vp_scheduler(cls=DDIMParallelScheduler, set_alpha_to_one=False, steps_offset=1)))


@case("text-to-image", **TEXT)
def StableDiffusionLDM3DPipeline() -> Any:
    """Colours and depth: an autoencoder of six channels."""
    return assemble("StableDiffusionLDM3DPipeline", **{**parts(), "vae": tiny_autoencoder_kl(in_channels=6, out_channels=6)})


@case(
    "inpainting", prompt=PROMPT, mask_image=lambda: (tensor(1, 8, 8) > 0).float(), image_latents=lambda: tensor(3, 4, 8, 8), inpaint_strength=0.75,
)
def StableDiffusionDiffEditPipeline() -> Any:
    """The latents of an inverted image at each of its steps: three of four or five."""
    return assemble("StableDiffusionDiffEditPipeline", **parts(), inverse_scheduler=vp_scheduler(cls=DDIMInverseScheduler))


GLIGEN = {**TEXT, "gligen_phrases": ["a car"], "gligen_boxes": [[0.2, 0.2, 0.8, 0.8]]}


@case("text-to-image", **GLIGEN)
def StableDiffusionGLIGENPipeline() -> Any:
    return assemble("StableDiffusionGLIGENPipeline", **parts(attention_type="gated"))


@case("text-to-image", **GLIGEN, gligen_images=lambda: [tiny_image()])
def StableDiffusionGLIGENTextImagePipeline() -> Any:
    from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection
    from transformers import CLIPProcessor

    return assemble(
        "StableDiffusionGLIGENTextImagePipeline", **parts(attention_type="gated-text-image"), image_project=CLIPImageProjection(16),
        processor=CLIPProcessor(tiny_clip_images(), tiny_clip_tokenizer()),
    )


def _alt() -> dict[str, Any]:
    """Stable Diffusion with a multilingual text encoder."""
    from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig, RobertaSeriesModelWithTransformation

    words = tiny_clip_tokenizer()
    config = RobertaSeriesConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, project_dim=16,
        max_position_embeddings=len(words) + 18, pad_token_id=words.pad_token_id,
    )
    return {**parts(), "text_encoder": RobertaSeriesModelWithTransformation(config)}


add("AltDiffusionPipeline", "text-to-image", lambda: assemble("AltDiffusionPipeline", **_alt()), **TEXT)
add("AltDiffusionImg2ImgPipeline", "image-to-image", lambda: assemble("AltDiffusionImg2ImgPipeline", **_alt()), **EDIT)
