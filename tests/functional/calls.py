"""Arguments of the fused calls, and all of their results by name."""

import dataclasses

import torch

import realuid_fast as rf

PATH = rf.paths.Linear()
UID, REAL = rf.objectives.UID(), rf.objectives.RealUID(0.92, 0.94)
GENERAL = rf.objectives.GeneralRealUID(0.9, 0.93, 0.85, kappa=0.93)
KEY = torch.tensor([2**35 + 17, 5])
BACKENDS = [row.name for row in rf.backends.report() if row.name in ("torch", "cpp") and row.why_not is None]
LAYOUTS = {
    "contiguous": lambda v: v.contiguous(),
    "channels_last": lambda v: v.to(memory_format=torch.channels_last if v.dim() == 4 else torch.channels_last_3d),
}


@dataclasses.dataclass
class Batch:
    """Everything the four calls take, in one dtype and layout."""

    teacher: torch.Tensor
    fake: torch.Tensor
    x: torch.Tensor
    x_t: torch.Tensor
    endpoint: torch.Tensor
    noise: torch.Tensor
    uncond: torch.Tensor
    coef: torch.Tensor
    guidance: torch.Tensor

    def to(self, dtype):
        storage = {field.name: getattr(self, field.name).to(dtype) for field in dataclasses.fields(self)}
        wide = {
            name: getattr(self, name).to(torch.promote_types(dtype, torch.float32)) for name in ("coef", "guidance")
        }
        return Batch(**storage | wide)


def batch(shape, dtype=torch.float64, layout="contiguous", seed=0, two_sided=False):
    generator = torch.Generator().manual_seed(seed)
    tensors = [LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype)) for _ in range(7)]
    # Arbitrary coefficients: the calls know rows of nine numbers, not paths.
    coef = torch.randn(shape[0], 9, generator=generator)
    coef[:, 8] = coef[:, 8].abs() + 0.1
    coef[::3, 7] = 0  # rows that do not read x_t
    if not two_sided:
        coef[:, [1, 4]] = 0
    guidance = 1 + torch.rand(shape[0], generator=generator)
    return Batch(*tensors, *(t.to(torch.promote_types(dtype, torch.float32)) for t in (coef, guidance)))


def calls(b, noise, n_real, noise_rows):
    """Every call's outputs by name, through the explicit forms."""
    out = {"x_t": rf.interpolate(b.x, b.coef, noise, b.endpoint, noise_rows)}
    own = noise if not noise.is_floating_point() or len(noise) == len(b.x) else b.noise
    for name, value in (
        rf.functional.matching_grads(out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=own, endpoint=b.endpoint)
        ._asdict()
        .items()
    ):
        out[f"matching.{name}"] = value
    fake = rf.functional.fake_grads(
        GENERAL,
        fake_out=b.fake,
        x=b.x,
        x_t=b.x_t,
        coef=b.coef,
        noise=noise,
        n_real=n_real,
        teacher_out=b.teacher,
        endpoint=b.endpoint,
        noise_rows=noise_rows,
    )
    for name, value in fake._asdict().items():
        out[f"fake.{name}"] = value
    inputs = {"teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": own}
    inputs["endpoint"] = b.endpoint
    for name, value in rf.functional.generator_grads(GENERAL, **inputs)._asdict().items():
        out[f"generator.{name}"] = value
    guided = {"teacher_uncond": b.uncond, "guidance": b.guidance}
    fake = rf.functional.fake_grads(
        GENERAL, **inputs | {"noise": noise}, n_real=n_real, noise_rows=noise_rows, **guided
    )
    out |= {f"guided_fake.{name}": value for name, value in fake._asdict().items()}
    out |= {
        f"guided_generator.{k}": v
        for k, v in rf.functional.generator_grads(GENERAL, **inputs, **guided)._asdict().items()
    }
    # The weight of a sample in x0 space, through the same guidance.
    scaled = rf.functional.generator_grads(rf.objectives.DMD(), **inputs, **guided)
    out["scaled.x"] = scaled.x
    normalised = rf.objectives.NormalisedRealUID(0.92, 0.94)
    out |= {f"normalised.{k}": v for k, v in rf.functional.generator_grads(normalised, **inputs)._asdict().items()}
    return {name: value for name, value in out.items() if value is not None}


def zero_k_x(coef):
    coef = coef.clone()
    coef[:, 7] = 0
    return coef
