"""Geometry of MSE and T²·KL in logit space: gradients, Hessians, and how far the student is from the teacher.

Of one image with C classes: student's logits z, teacher's t, d = z − t, d̃ = d less its mean over classes,
p = softmax(t/T), q = softmax(z/T), and q(s) = softmax((t + s·d)/T) on the way from teacher to student.

    loss        value                            gradient in z      Hessian in z
    MSE         ‖d‖²/C                           2 d/C              2 I/C
    T²·KL       ∫₀¹ (1 − s) Var_q(s)(d) ds       T (q − p)          F(q) = diag(q) − q qᵀ

Var_q(d) is the variance of the entries of d under q, which is dᵀ F(q) d. Notebook 13 proves what follows.

- Bounded: ‖T (q − p)‖ ≤ min(√2 T, ‖d̃‖/2). Eigenvalues of F(q) lie between 0 and 1/2.
- Near: with ρ = (max d − min d)/T, the ratio of T²·KL to dᵀF(p)d/2 lies within :func:`quadratic_bounds`.
- Hot: with R the larger range of both logits, the ratio of T²·KL to ‖d̃‖²/(2C) lies between e^(−R/T) and e^(R/T).
  The cosine between the gradient and d̃ is at least 1/cosh(R/T), by Kantorovich's inequality.
- Flips: the top class changes only where max d − min d is at least the teacher's margin.
- Regret: if b is the student's top class, (max p − p_b)² ≤ 2 KL ≤ ‖d̃‖²/(2T²) ≤ C·MSE/(2T²).

Losses here are of single images. :mod:`faqd_lib.training.objective` takes their mean over images.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEAR = 1.0  # ρ up to which an image counts as near


@dataclass(frozen=True)
class LogitGeometry:
    """Quantities of each image, float64 tensors (images,); from :func:`logit_geometry`.

    Args:
        temperature: T.
        distance, centred: ‖d‖ and ‖d̃‖.
        spread: max d − min d.
        margin: the teacher's largest logit less its second largest.
        mse_gradient, kl_gradient: norms of the gradients of MSE and of T²·KL.
        kl_cosine: cosine between the gradient of T²·KL and d̃, 0 where the gradient vanishes. MSE's with d is 1.
        smallest, largest: extreme eigenvalues of F(p) on centred logits, p the teacher's softened distribution.
        agrees: whether student and teacher have the same top class, boolean.
    """

    temperature: float
    distance: Tensor
    centred: Tensor
    spread: Tensor
    margin: Tensor
    mse_gradient: Tensor
    kl_gradient: Tensor
    kl_cosine: Tensor
    smallest: Tensor
    largest: Tensor
    agrees: Tensor

    @property
    def rho(self) -> Tensor:
        """(max d − min d)/T: up to 1 the image is near, and T²·KL nearly quadratic."""
        return self.spread / self.temperature

    @property
    def near(self) -> float:
        """Share of near images, from 0 to 1."""
        return float((self.rho <= NEAR).double().mean())

    @property
    def may_flip(self) -> float:
        """Share of images whose spread reaches the teacher's margin; no other image can change its top class."""
        return float((self.spread >= self.margin).double().mean())

    @property
    def fewest_kl_steps(self) -> Tensor:
        """A lower bound on the gradient steps of T²·KL from student to teacher.

        The step size is 2, one over KL's largest curvature. A step moves the logits by at most 2√2·T. MSE's step
        of size C/2 arrives at once.
        """
        return self.centred / (2 * math.sqrt(2) * self.temperature)

    @property
    def matched_weight(self) -> float:
        """The weight of T²·KL that gives the mean over images the same gradient norm as MSE; infinite at d̃ = 0."""
        return float(self.mse_gradient.norm() / self.kl_gradient.norm())

    @property
    def missed_shares(self) -> tuple[float, float]:
        """Shares of the squared gradients of MSE and of T²·KL on images whose top class the student misses."""
        squares = (self.mse_gradient.square(), self.kl_gradient.square())
        return tuple(float(square[~self.agrees].sum() / square.sum()) for square in squares)


def logit_geometry(student: Tensor, teacher: Tensor, temperature: float) -> LogitGeometry:
    """Measure student's and teacher's logits, both (images, classes); computed in float64, without a gradient.

    Raises:
        ValueError: shapes differ, are not (images, classes) with two classes or more, or T is not above 0.
    """
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 2:
        raise ValueError(
            f"student and teacher must be (images, classes) with at least 2 classes, of one shape; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
    z, t = student.detach().double(), teacher.detach().double()
    d = z - t
    centred = d - d.mean(1, keepdim=True)
    kl_gradient = temperature * ((z / temperature).softmax(1) - (t / temperature).softmax(1))
    eigenvalues = torch.linalg.eigvalsh(fisher(t, temperature))  # rising; the first is 0, of common shifts
    first, second = t.topk(2, 1).values.unbind(1)
    return LogitGeometry(
        temperature=temperature,
        distance=d.norm(dim=1),
        centred=centred.norm(dim=1),
        spread=d.amax(1) - d.amin(1),
        margin=first - second,
        mse_gradient=2 * d.norm(dim=1) / d.shape[1],
        kl_gradient=kl_gradient.norm(dim=1),
        kl_cosine=torch.cosine_similarity(kl_gradient, centred, 1, eps=1e-300),
        smallest=eigenvalues[:, 1].clamp_min(0),
        largest=eigenvalues[:, -1],
        agrees=z.argmax(1) == t.argmax(1),
    )


def fisher(logits: Tensor, temperature: float) -> Tensor:
    """F(q) = diag(q) − q qᵀ of q = softmax(logits/T): the Hessian of T²·KL; (images, C) to (images, C, C)."""
    q = (logits / temperature).softmax(1)
    return torch.diag_embed(q) - q[:, :, None] * q[:, None, :]


def quadratic_bounds(rho: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of T²·KL over dᵀF(p)d/2, for ρ at least 0 in float64: 2(e^(∓ρ) − 1 ± ρ)/ρ², both 1 at ρ = 0.

    At ρ = 1 the bounds are 0.74 and 1.44.
    """
    safe = rho.clamp_min(1e-4)  # nearer to 0 both differ from 1 by less than 4e-5, and rounding would show
    below, above = (2 * (torch.expm1(sign * safe) - sign * safe) / safe**2 for sign in (-1, 1))
    return below.minimum(torch.ones_like(rho)), above


@torch.no_grad()
def training_logits(student: nn.Module, teacher: nn.Module, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, each (images, classes), as a training step sees them.

    A copy of the student runs in training mode, with statistics of the batch; the teacher runs in evaluation mode.

    Args:
        batches: normalised images, (batch, channels, height, width) each.
    """
    student, teacher = copy.deepcopy(student).train(), teacher.eval()
    pairs = [(student(images), teacher(images)) for images in batches]
    return tuple(torch.cat(logits).float() for logits in zip(*pairs, strict=True))
