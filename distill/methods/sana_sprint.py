"""SANA-Sprint: a flow-matching teacher taken to TrigFlow by algebra, sCM for fidelity and LADD for sharpness in one step.

    Chen et al. 2025, arXiv 2503.09641 (ICCV 2025)

    L = L_sCM + 0.5 L_adv(f(x_t, t)),    log sigma/alpha ~ N(0.2, 1.6²);  the adversary sees t = 1 for half of the batch
    discriminator: heads on the frozen teacher, hinge, log-odds of t ~ N(−0.6, 1);  real samples, and real ones with another's prompt as fake

Guidance is folded in at one scale, or told (``guidance_range``: the student then needs an embedding of it). The paper trains its teacher
some 5000 steps more first, for a time embedding whose derivative is bounded; here the teacher is taken as it is, and a derivative that
grows is normalised.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.mapping.tangent import Tangent
from distill.matching.adversary import GAN
from distill.matching.times import TimeLaw, Times, UnitInterval
from distill.methods.consistency import Consistency


class SanaSprint(Consistency):
    """Continuous-time consistency with a latent adversary."""

    name: Literal["sana_sprint"] = "sana_sprint"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 2
    tangent: Tangent | None = Tangent()
    train_times: TimeLaw = Times(law="log_sigma", mean=0.2, std=1.6)
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
    gan: GAN | None = GAN(weight=0.5, features="teacher", loss="hinge", times=Times(law="logit_normal", mean=-0.6, std=1.0), mismatched=True)
    gan_at_start: UnitInterval = 0.5
