"""The family tree: each system's formula as a row, its paper, and the official code that it was compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class System(NamedTuple):
    """A row of the family tree.

    Attributes:
        name: the system.
        presets: the shipped presets that run it.
        row: the generator's loss of a sample over the time weight w, or its gradient in x, with ``D = f* - f``.
        paper: the paper, and its equation or section.
        compared: the public code whose loss was compared with ours, at its revision, or the formula that a test has.
        factor: ours divided by theirs.
    """

    name: str
    presets: tuple[str, ...]
    row: str
    paper: str
    compared: str
    factor: str


REALUID = "RealUID, 2509.22459"
PUBLISHED = "David-cripto/RealUID at 6f63be4, `compat`"
DMD2 = "tianweiy/DMD2 at 8d8fa55, `compat.dmd2`; NVlabs/FastGen at 34f30e8, `compat.fastgen`"
SID = "mingyuanzhou/SiD at 01fbb13, `compat.sid`"
FORMULA = "the paper's formula"
UNREAD = "the paper's formula, as known: its text was not at hand"

FAMILY = (
    System(
        "UID",
        ("uid",),
        r"$-\|\Delta\|^2 + 2\langle\Delta, f^* - \mathrm{tgt}\rangle$",
        f"{REALUID}, the UID loss",
        PUBLISHED,
        "1",
    ),
    System(
        "RealUID",
        ("realuid", "vp", "trigonometric"),
        r"$-\alpha\|\Delta\|^2 + 2\langle\Delta, \alpha f^* - \beta\,\mathrm{tgt}\rangle$",
        f"{REALUID}, the real-data loss",
        PUBLISHED,
        "1",
    ),
    System(
        "General RealUID",
        ("general",),
        r"$-\gamma\kappa^2\|\Delta\|^2 + 2\kappa\langle\Delta, \alpha f^* - \beta\,\mathrm{tgt}\rangle$",
        f"{REALUID}, the general real-data loss",
        f"{PUBLISHED}, which ignores $\\gamma$",
        "1",
    ),
    System(
        "General RealUID, the teacher's target",
        ("general-teacher",),
        r"as above; real rows of the fake turn have $f^*$ for $\mathrm{tgt}$",
        f"{REALUID}, the general real-data loss",
        FORMULA,
        "1",
    ),
    System(
        "normalised RealUID",
        ("normalised",),
        r"$\langle\Delta, \alpha f^* - \beta\,\mathrm{tgt}\rangle / \|\Delta\|$",
        f"{REALUID}, the loss with the unit vector",
        FORMULA,
        "1",
    ),
    System(
        "RealUID's comparison with a discriminator",
        ("gan",),
        "UID, and softplus of a head's logits on the fake model",
        f"{REALUID}, table 1 and appendix D",
        f"{PUBLISHED}, `GANloss`",
        r"the share of rows that are judged, $\frac{1}{5}$ in the preset: theirs is a mean over these",
    ),
    System(
        "FGM",
        ("fgm",),
        r"$(l_1 / l_2 - 2)\|\Delta\|^2 + 2\langle\Delta, f^* - \mathrm{tgt}\rangle$",
        "Flow Generator Matching, 2410.19310, the tractable loss",
        FORMULA,
        r"$1 / l_2$",
    ),
    System(
        "SiD, on noise levels as published",
        ("sid-edm",),
        r"$(-\alpha\|\Delta\|^2 + \langle\Delta, f^* - x\rangle) / \mathrm{mean}\,|x - f^*|$",
        "Score identity Distillation, 2404.04057, the fused loss",
        SID,
        "1; the generator's loop there multiplies by 100",
    ),
    System(
        "SiD, one law of times",
        ("sid", "edm"),
        "as above",
        "2404.04057, the fused loss",
        SID,
        "1; 2 without the scale",
    ),
    System(
        "Uni-Instruct",
        ("uni-instruct",),
        r"$(-(h + h')\|\Delta\|^2 + 2h\langle\Delta, f^* - x\rangle) / (2\,\mathrm{mean}\,|x - f^*|)$ with $h(r)$ of "
        r"any divergence and $h' = r\,\mathrm{d}h/\mathrm{d}r$ differentiated, and softplus of a head's logits",
        "2505.20755, its expansion of an f-divergence; the gradient derived here",
        "finite differences of the expansion; a-little-hoof/Uni_Instruct at 3cdf92e, the branch Forward-KL, by its "
        "formula",
        "1 for forward KL's value; theirs holds $r$ fixed and norms it over the batch",
    ),
    System(
        "RealSiD",
        ("realsid",),
        r"RealUID with $Q = 2\alpha_{sid}\alpha$, scaled as SiD",
        f"{REALUID}, its extension of SiD",
        FORMULA,
        "1 without the scale",
    ),
    System(
        "SIM, score implicit matching",
        ("sim",),
        r"$(\langle\Delta, f^* - \mathrm{tgt}\rangle - \|\Delta\|^2) / (\|\Delta\|^2 + c^2)^{1/2}$",
        "2410.16794, the loss with the pseudo-Huber distance",
        UNREAD,
        r"$\sigma$ in noise, $\sigma^2$ in x0 space, where $c$ stands for $c / \sigma$, $c / \sigma^2$",
    ),
    System(
        "Generator matching of flows",
        (),
        "SIM in velocity space, at $p = 2$ FGM with $l_1 = 0$",
        "On Distilling Generator Matching Models, Shankar 2025",
        "no text at hand beyond the abstract",
        "-",
    ),
    System(
        "IBMD",
        ("ibmd",),
        "UID on a bridge",
        "Inverse Bridge Matching Distillation, 2502.01362, section 3",
        FORMULA,
        "1",
    ),
    System(
        "Real bridge",
        ("real-bridge", "interpolant"),
        "RealUID on a bridge, real rows are pairs",
        f"{REALUID}, its bridge matching case",
        FORMULA,
        "1",
    ),
    System(
        "Diff-Instruct",
        ("diff-instruct",),
        r"$\partial_x = f - f^*$",
        "2305.18455, the gradient formula, in x0 units",
        FORMULA,
        "1",
    ),
    System(
        "DMD with its regression on stored pairs",
        ("dmd-pairs",),
        r"the next row's, and $\lambda D\,\mathrm{mean}\,d(G(z), x(z))$, $\lambda = 0.25$, $d$ any distance",
        "2311.18828, equation 7 and section 3.2",
        FORMULA,
        "the number of elements $D$, as for the gradient, so $\\lambda$ is theirs",
    ),
    System(
        "DMD, DMD2 without its discriminator",
        ("dmd",),
        r"$\partial_x = (f - f^*) / \mathrm{mean}\,|x - f^*|$",
        "2311.18828, equations 7 and 8; 2405.14867, section 4.2",
        DMD2,
        "the number of elements of a sample: theirs are means over them",
    ),
    System(
        "DMD2",
        ("dmd2",),
        r"DMD's, and $\lambda$ softplus of a head's logits on the fake model; states by its own earlier steps",
        "2405.14867, sections 4.2 to 4.5",
        f"{DMD2}, without the several steps",
        r"the number of elements of a sample, so $\lambda$ is as many times theirs",
    ),
    System(
        "f-distill",
        (),
        r"DMD's with $h(r) = r^2 f''(r)$ (`distill.divergence`)",
        "2502.15681, theorem 1 and table 1",
        "NVlabs/FastGen at 34f30e8, `compat.fastgen`",
        r"1 for $h$; its `sh` is twice ours",
    ),
    System(
        "Decoupled DMD",
        ("dmd-decoupled",),
        r"$\partial_x = w(f - c) + (s - 1)\,w'(u - c)$, times of their own, each scaled as DMD",
        "2511.22677, the decomposition of DMD's gradient",
        UNREAD,
        "1; each term's scale is ours",
    ),
    System(
        "moment matching",
        ("moment-matching", "moments-steps"),
        r"$\partial_x = f - f^*$; fake model $\|f - x\|^2 + \|f - f^*\|^2$, in several steps at $q(z_s \mid z_t, x)$",
        "2406.04103, the alternating algorithm",
        UNREAD,
        "1",
    ),
    System(
        "moment matching in parameter space",
        ("moments-parameters",),
        r"$\partial_x = f - f^*$, $f = f^* - J \Lambda \nu$, $\nu = \nabla_\theta w \|f^* - x\|^2$ on another batch",
        "2406.04103, its form in parameter space",
        UNREAD,
        r"$\frac{1}{2}$ of the gradient of $\frac{1}{2} \|\nu\|^2_\Lambda$; $\Lambda$ from 100 real batches",
    ),
    System(
        "SDS",
        ("sds",),
        r"$\partial_x = x - f^*$, no fake model",
        "DreamFusion, 2209.14988, equation 3",
        FORMULA,
        "1, in x0 units",
    ),
    System(
        "SparseFusion, as far as it is distillation",
        ("sparsefusion",),
        r"SDS with $w = c^2$ and, for $f^*$, the data that the teacher reaches from $x_t$ in several steps",
        "2212.00792, as its code has it",
        "zhizdev/sparsefusion at 0324bae, `sparsefusion/distillation.py`, by its formula, with DDIM for its solver",
        "1 for the gradient of half the square; with its L1 the number of elements: theirs is a mean over them",
    ),
    System(
        "ADD, adversarial diffusion distillation",
        ("add",),
        r"SDS, and $\lambda \sum_k \mathrm{mean}\,\psi(-h_k(F_k(x)))$ of heads $h_k$ on frozen features $F_k$, hinge; "
        "four steps from noised real data",
        "2311.17042, section 3",
        UNREAD,
        r"$\lambda$, in the preset $\frac{D}{5}$ for $D$ elements: their distance is read as a mean over them",
    ),
    System(
        "guided distillation, the first stage",
        ("guided",),
        r"a teacher's loss: $\|f(z_t, s) - (u + s (c - u))\|^2$, $s$ drawn in each row",
        "2210.03142, section 3.1",
        UNREAD,
        "1; their scale is ours less 1",
    ),
    System(
        "progressive halving, guided distillation's second stage",
        (),
        r"a teacher's loss: $\|f(z_t) - \tilde f\|^2$, $\tilde f$ leads in one step as its two do (`teacher.halved`)",
        "2202.00512, algorithm 2; 2210.03142, section 3.2",
        UNREAD,
        "1, in x0 space with their weight",
    ),
    System(
        "contrastive energy distillation, Simple Distillation",
        ("ced",),
        r"$\log(1 + e^{E(x(z), G(z))}) + \log(1 + e^{-E(G'(z), G(z))})$, $G'$ an earlier student, no fake model",
        "Zhu et al., NeurIPS 2025, its contrastive loss",
        "a summary's formula: the paper's text was not at hand",
        "the number of elements; $E$ is pseudo-Huber, theirs LPIPS-Huber",
    ),
    System(
        "trajectory regression",
        ("regression",),
        r"$\|G(z) - x(z)\|^2$, no fake model",
        "2101.02388, section 3",
        FORMULA,
        "1",
    ),
    System(
        "SFD and SFD-v, simple and fast distillation",
        ("sfd",),
        r"$\|x_{i+1} - x^*_{i+1}\|_1$ in each step of the student, $x^*$ the teacher's states, no fake model",
        "2409.19681, as its code has it",
        "zju-pi/diff-sampler at 68d5ce4, `sfd-main`, by its formula, without its first step and thresholding",
        "1",
    ),
    System(
        "SFD's second stage, one evaluation",
        ("sfd-second",),
        r"$\|G(z) - x(z)\|_1$, $x(z)$ the samples of a student of several steps, which is $G$ at first, no fake model",
        "2409.19681, as its code has it",
        "zju-pi/diff-sampler at 68d5ce4, `sfd-main`, by its formula, without its first step and LPIPS",
        "1",
    ),
)


def table(measured: Mapping[str, float]) -> list[str]:
    """The family tree as lines of Markdown, with a column of the distances that were ``measured``, by preset."""
    lines = [
        "| system | presets | generator's loss over $w$, or gradient in $x$ | paper | compared with | ours / theirs |",
        "|---|---|---|---|---|---|",
    ]
    if measured:
        lines = [lines[0] + " MNIST |", lines[1] + "---:|"]
    for system in FAMILY:
        # A bar inside of a formula would end its cell.
        cells = [system.name, ", ".join(f"`{name}`" for name in system.presets) or "-", *system[2:]]
        if measured:
            cells.append(", ".join(f"{measured[name]:.1f}" for name in system.presets if name in measured) or "-")
        lines.append("| " + " | ".join(cell.replace(r"\|", r"\Vert ").replace("|", r"\vert ") for cell in cells) + " |")
    return lines
