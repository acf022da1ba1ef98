"""Train the text-to-image teacher that ships in assets/emoji-teacher: a StableDiffusionPipeline on 64×64 emoji.

    python tools/train_emoji.py vae  --minutes 25      # AutoencoderKL, 64×64×3 → 8×8×12
    python tools/train_emoji.py unet --minutes 60      # UNet and text encoder on the cached latents
    python tools/train_emoji.py pack                   # write assets/emoji-teacher and assets/emoji/latents.safetensors

Each stage keeps checkpoints under --work, goes on from the newest with --resume (and more --minutes or --steps), and
trains in bfloat16 where the machine has it. The learning rate falls to zero at the end of the budget. The weights used
are the moving average; the loss on held-out images is printed beside that on the training images.

The UNet predicts v = alpha noise − sigma x0 on standardised latents; one caption in ten is replaced by
the empty one, so that guidance works (Ho & Salimans 2022). The tokenizer is learnt from the training captions.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_data import read_images, read_rows
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from distill import checkpoint
from distill.data.emoji import balance

LATENT_CHANNELS = 12
VOCABULARY, MAX_TOKENS = 2048, 24
START, END = "<|startoftext|>", "<|endoftext|>"
SAVE_EVERY = 180.0  # seconds


# -- networks -----------------------------------------------------------------------------------------------------------


def build_vae() -> AutoencoderKL:
    """Eight times smaller on a side: 64×64×3 → 8×8×12."""
    return AutoencoderKL(
        sample_size=64,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet on 8×8 and 4×4, cross-attention at 8×8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(128, 160),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,  # the number of heads, by an old misnomer of diffusers
        norm_num_groups=16,
    )


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary learnt from the captions."""
    tokenizer = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[], pad_token=END)._tokenizer  # normaliser and splitting are CLIP's
    tokenizer.model = models.BPE(end_of_word_suffix="</w>", unk_token=END)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[START, END], initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for piece in list(vocabulary):  # a letter may end a word
        vocabulary.setdefault(piece + "</w>", len(vocabulary)) if len(piece) == 1 else None
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def kept_tokenizer(work: Path, rows: list[dict[str, str]]) -> CLIPTokenizer:
    """The tokenizer of a work folder, learnt from the rows' names at the first call. It is kept, since learning breaks ties
    between equally frequent pairs in another order each time: a text encoder must meet the ids that it was trained with."""
    folder = work / "tokenizer"
    if not folder.exists():
        build_tokenizer([row["caption"] for row in rows] + [row["short"] for row in rows]).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 192."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """1,000 steps of a cosine schedule; samplers start from its very last step."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # as every Stable Diffusion; without effect where the spacing is trailing
    )


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, 24) token ids, padded as the pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


# -- one training loop for both stages ----------------------------------------------------------------------------------


@dataclass
class Budget:
    """How long to train: minutes of wall clock or steps, whichever is given."""

    minutes: float | None
    steps: int | None

    def progress(self, seconds: float, step: int) -> float:
        """0 at the start, 1 at the end."""
        return step / self.steps if self.steps else seconds / (60 * (self.minutes or 1.0))


@dataclass
class Run:
    """Networks in training, their moving average and where checkpoints go."""

    folder: Path
    networks: nn.ModuleDict
    lr: float
    ema_decay: float = 0.999
    seconds: float = 0.0
    step: int = 0
    ema: nn.ModuleDict = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.ema = copy.deepcopy(self.networks).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.networks.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def save(self) -> None:
        state = {f"net.{k}": v for k, v in self.networks.state_dict().items()} | {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        state |= checkpoint.optimizer_tensors(self.optimizer, "optimizer")
        checkpoint.save(self.folder, self.step, state, {"seconds": self.seconds}, keep=2)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        if not (saved := checkpoint.steps(self.folder)):
            return
        state, facts = checkpoint.load(self.folder, saved[-1])
        for prefix, module in (("net.", self.networks), ("ema.", self.ema)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        checkpoint.restore_optimizer(self.optimizer, state, "optimizer")
        self.step, self.seconds = saved[-1], facts["seconds"]

    def train(self, loss_of_batch: Callable[[], Tensor], budget: Budget, measure: Callable[[], str]) -> None:
        """Steps until the budget is spent; a checkpoint and a line of losses every few minutes."""
        last = time.monotonic()
        unsaved = smooth = 0.0
        while (progress := budget.progress(self.seconds, self.step)) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min((self.step + 1) / 200, 1.0) * (0.5 + 0.5 * math.cos(math.pi * progress))
            loss = loss_of_batch()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.networks.parameters()), 1 - decay)
            smooth += (loss.item() - smooth) * max(0.01, 1 / self.step)
            now = time.monotonic()
            self.seconds, unsaved, last = self.seconds + now - last, unsaved + now - last, now
            if self.step % 100 == 0:
                print(f"step {self.step}  {self.seconds:.0f} s  {100 * progress:.0f} %  loss {smooth:.4f}", flush=True)
            if unsaved > SAVE_EVERY:
                print(f"step {self.step}  of the average: {measure()}", flush=True)
                self.save()
                unsaved, last = 0.0, time.monotonic()
        self.save()
        print(f"step {self.step}  of the average: {measure()}", flush=True)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


# -- stage 1: the autoencoder -------------------------------------------------------------------------------------------


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    """L1 of the pixels, of their differences to the right and below (edges), and at half and quarter size."""
    error = made - real
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    coarse = sum(F.avg_pool2d(error, size).abs().mean() for size in (2, 4))
    return error.abs().mean() + 0.5 * edges + 0.5 * coarse


def train_vae(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    rows = read_rows(arguments.data)
    images = read_images(arguments.data, rows)
    part = {split: torch.tensor([i for i, row in enumerate(rows) if row["split"] == split]) for split in ("train", "heldout")}
    weights = balance(rows)[part["train"]]
    run = Run(arguments.work / "vae", nn.ModuleDict({"vae": build_vae().to(device)}), lr=1e-3)
    if arguments.resume:
        run.resume()
    vae, average = run.networks["vae"], run.ema["vae"]

    def batch(indices: Tensor) -> Tensor:
        return images[indices].to(device).float() / 127.5 - 1

    def loss() -> Tensor:
        real = batch(part["train"][torch.multinomial(weights, arguments.batch or 16)])
        real = torch.where(torch.rand(len(real), 1, 1, 1, device=device) < 0.5, real.flip(-1), real)
        with autocast(device):
            moments = vae.encode(real).latent_dist
            made = vae.decode(moments.sample()).sample
        mean, logvar = moments.mean.float(), moments.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(made.float(), real) + arguments.kl * kl

    @torch.no_grad()
    def measure() -> str:
        lines = []
        for split, indices in part.items():
            real = batch(indices[:: max(1, len(indices) // 96)][:96])
            made = average.decode(average.encode(real).latent_dist.mode()).sample.clamp(-1, 1)
            error = ((made - real) / 2).square().mean((1, 2, 3))
            lines.append(f"{split} PSNR {(-10 * error.clamp_min(1e-8).log10()).mean():.2f} dB")
        return ", ".join(lines)

    run.train(loss, Budget(arguments.minutes, arguments.steps), measure)


def trained_vae(work: Path, device: torch.device) -> AutoencoderKL:
    run = Run(work / "vae", nn.ModuleDict({"vae": build_vae()}), lr=0.0)
    run.resume()
    if not run.step:
        raise SystemExit(f"{work} has no trained autoencoder: run the stage vae first")
    return run.ema["vae"].to(device)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """(N, 12, 8, 8) latents (the means of the posteriors) of (N, 3, 64, 64) uint8 images."""
    return torch.cat([vae.encode(chunk.to(vae.device).float() / 127.5 - 1).latent_dist.mode() for chunk in images.split(64)])


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor, chosen: Tensor) -> Tensor:
    """Latents of mean 0 and deviation 1 in each channel of the chosen ones; the autoencoder is changed to give them.

    The 1×1 convolution at the end of the encoder takes the shift and the scale in, that at the start of the decoder undoes
    them: a pipeline has one scaling factor for all channels only, and here it is 1.
    """
    mean, std = latents[chosen].mean((0, 2, 3)), latents[chosen].std((0, 2, 3))
    to_latent, from_latent, count = vae.quant_conv, vae.post_quant_conv, latents.shape[1]
    to_latent.weight[:count] /= std[:, None, None, None]
    to_latent.bias[:count] = (to_latent.bias[:count] - mean) / std
    to_latent.bias[count:] -= 2 * std.log()  # the posterior's log variance
    from_latent.bias += from_latent.weight[..., 0, 0] @ mean
    from_latent.weight *= std[:, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return (latents - mean[:, None, None]) / std[:, None, None]


def prepared(arguments: argparse.Namespace, rows: list[dict[str, str]]) -> tuple[AutoencoderKL, dict[str, Tensor]]:
    """The standardised autoencoder and the latents of both parts of the data, encoded once and kept beside the checkpoints."""
    device = torch.device(arguments.device)
    vae, file = trained_vae(arguments.work, device), arguments.work / f"latents-{checkpoint.steps(arguments.work / 'vae')[-1]}.safetensors"
    is_train = torch.tensor([row["split"] == "train" for row in rows], device=device)
    if not file.exists():
        save_file({"latents": encode_all(vae, read_images(arguments.data, rows)).cpu().contiguous()}, file)
    latents = standardise(vae, load_file(file)["latents"].to(device), is_train)
    return vae, {"train": latents[is_train], "heldout": latents[~is_train]}


# -- stage 2: the UNet and the text encoder -----------------------------------------------------------------------------


def train_unet(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    rows = read_rows(arguments.data)
    train_rows = [row for row in rows if row["split"] == "train"]
    _, part = prepared(arguments, rows)
    weights = balance(train_rows)

    tokenizer = kept_tokenizer(arguments.work, train_rows)
    caption_ids = {split: tokens(tokenizer, [row["caption"] for row in rows if row["split"] == split]).to(device) for split in part}
    short_ids = tokens(tokenizer, [row["short"] for row in train_rows]).to(device)
    no_ids = tokens(tokenizer, [""]).to(device)

    scheduler, networks = build_scheduler(), nn.ModuleDict({"unet": build_unet().to(device), "text": build_text_encoder(tokenizer).to(device)})
    run = Run(arguments.work / "unet", networks, lr=1e-3)
    if arguments.resume:
        run.resume()
    last_step = scheduler.config.num_train_timesteps

    def v_loss(nets: nn.ModuleDict, x0: Tensor, ids: Tensor) -> Tensor:
        count = len(x0)
        noise = torch.randn_like(x0)
        t = ((torch.randperm(count) + torch.rand(count)) / count * last_step).long().clamp_max(last_step - 1).to(device)
        with autocast(device), sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is slow backwards
            v = nets["unet"](scheduler.add_noise(x0, noise, t), t, nets["text"](ids)[0]).sample
        return (v.float() - scheduler.get_velocity(x0, noise, t)).square().mean()

    def loss() -> Tensor:
        size = arguments.batch or 48
        chosen = torch.multinomial(weights, size).to(device)
        ids = torch.where(torch.rand(size, 1, device=device) < 0.25, short_ids[chosen], caption_ids["train"][chosen])
        ids = torch.where(torch.rand(size, 1, device=device) < arguments.dropout, no_ids, ids)
        return v_loss(run.networks, part["train"][chosen], ids)

    @torch.no_grad()
    def measure() -> str:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            losses = []
            for split, x0 in part.items():
                every = max(1, len(x0) // 200)
                losses.append(f"{split} {v_loss(run.ema, x0[::every], caption_ids[split][::every]):.4f}")
        return "v-loss " + ", ".join(losses)

    run.train(loss, Budget(arguments.minutes, arguments.steps), measure)


# -- stage 3: the pipeline folder ---------------------------------------------------------------------------------------


def trained_pipeline(arguments: argparse.Namespace) -> tuple[StableDiffusionPipeline, dict[str, Tensor]]:
    """The pipeline of the newest checkpoints, and the scaled latents of both parts of the data."""
    device = torch.device(arguments.device)
    rows = read_rows(arguments.data)
    train_rows = [row for row in rows if row["split"] == "train"]
    vae, latents = prepared(arguments, rows)
    tokenizer = kept_tokenizer(arguments.work, train_rows)
    run = Run(arguments.work / "unet", nn.ModuleDict({"unet": build_unet(), "text": build_text_encoder(tokenizer)}), lr=0.0)
    run.resume()
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=run.ema["text"].to(device), tokenizer=tokenizer, unet=run.ema["unet"].to(device), scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, latents


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: what transformers before version 5 reads."""
    model = json.loads(tokenizer._tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")


def pack(arguments: argparse.Namespace) -> None:
    pipeline, latents = trained_pipeline(arguments)
    pipeline.to(dtype=torch.float16).save_pretrained(arguments.out, safe_serialization=True)
    write_vocabulary(pipeline.tokenizer, arguments.out / "tokenizer")
    arguments.latents.parent.mkdir(parents=True, exist_ok=True)
    save_file({split: part.half().cpu().contiguous() for split, part in latents.items()}, arguments.latents)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"wrote {arguments.out} ({size / 1e6:.1f} MB) and {arguments.latents} ({arguments.latents.stat().st_size / 1e6:.1f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"vae": train_vae, "unet": train_unet, "pack": pack}
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/emoji"), help="folder with captions.jsonl and emoji64.tar")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji-teacher"), help="folder of the checkpoints")
    parser.add_argument("--minutes", type=float, help="train until so many minutes have been spent in all")
    parser.add_argument("--steps", type=int, help="train until so many steps have been made in all, in place of --minutes")
    parser.add_argument("--batch", type=int, help="images a step (vae: 16, unet: 48)")
    parser.add_argument("--kl", type=float, default=5e-4, help="vae: weight of the KL term")
    parser.add_argument("--dropout", type=float, default=0.1, help="unet: share of captions replaced by the empty one")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("assets/emoji-teacher"), help="pack: pipeline folder to write")
    parser.add_argument("--latents", type=Path, default=Path("assets/emoji/latents.safetensors"), help="pack: file of latents to write")
    arguments = parser.parse_args()
    if arguments.stage != "pack" and not (arguments.minutes or arguments.steps):
        parser.error("say how long to train: --minutes or --steps")
    torch.manual_seed(arguments.seed)
    stages[arguments.stage](arguments)


if __name__ == "__main__":
    main()
