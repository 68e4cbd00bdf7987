"""Arguments of the fused calls that cannot be, each refused with a sentence that names it."""

import warnings

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast.errors import UserError

from .calls import BACKENDS, GENERAL, KEY, LAYOUTS, PATH, REAL, UID, batch


def test_backend_override_is_checked_and_restored():
    with pytest.raises(rf.errors.UserError, match="backend must be one of torch, cpp, triton"), rf.backend("cuda"):
        pass
    why_not = {row.name: row.why_not for row in rf.backends.report()}
    if why_not["triton"] is not None:
        with pytest.raises(rf.errors.UserError, match="backend 'triton' cannot run here: "), rf.backend("triton"):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with rf.backend("torch"):
            rf.interpolate(torch.zeros(1, 2), torch.zeros(1, 9), KEY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_endpoint_cannot_be_left_out_where_the_path_has_one(backend):
    path = rf.paths.ICFM()
    b = batch((4, 6), torch.float32)
    coef = path.coefficients(path.sample_time(4))
    calls = [
        lambda: rf.interpolate(b.x, coef, KEY),
        lambda: rf.functional.matching_loss(out=b.fake, x=b.x, x_t=b.x_t, coef=coef, noise=KEY),
        lambda: rf.functional.fake_loss(UID, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=coef, noise=KEY),
        lambda: rf.functional.generator_loss(
            UID, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=coef, noise=KEY
        ),
    ]
    for call in calls:
        with (
            rf.backend(backend),
            pytest.raises(UserError, match=r"endpoint is needed: row 0 of coef has [bq] different"),
        ):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_t_cannot_be_left_out_where_the_prediction_reads_it(backend):
    b = batch((4, 6), torch.float32)
    given = {"x": b.x, "x_t": None, "coef": b.coef, "noise": KEY}
    outs = {"teacher_out": b.teacher, "fake_out": b.fake}
    for call in (
        lambda: rf.functional.generator_loss(UID, **outs, **given),
        lambda: rf.functional.generator_loss(UID, **outs, **given, teacher_uncond=b.uncond, guidance=2.0),
        lambda: rf.functional.generator_grads(UID, **outs, **given),
        lambda: rf.functional.fake_grads(UID, fake_out=b.fake, **given),
        lambda: rf.functional.matching_grads(out=b.fake, **given),
        lambda: rf.sample_output(b.x, None, b.coef),
    ):
        with rf.backend(backend), pytest.raises(UserError, match=r"^x_t is needed: row \d of coef has k_x different"):
            call()


def test_what_is_wrong_with_coefficients_is_said():
    b = batch((4, 6), torch.float32)
    coef = PATH.coefficients(torch.linspace(0.1, 0.9, 4))
    for wrong, sentence in (
        (coef.T.contiguous().T, r"coef must be contiguous, its strides are \(1, 4\): pass coef\.contiguous\(\)"),
        (coef * float("nan"), "coef must have no NaN, and its column b has"),
    ):
        with pytest.raises(UserError, match=sentence):
            rf.interpolate(b.x, wrong, KEY)


@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_output_is_named(kind):
    b = batch((4, 6), torch.float32)
    with pytest.raises(UserError, match=r"out must be a plain dense tensor, not torch\.sparse.*: pass out\.to_dense"):
        rf.functional.matching_loss(out=getattr(b.fake, kind)(), x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY)


def test_numpys_numbers_are_taken():
    b = batch((4, 6), torch.float32)
    assert torch.equal(rf.NoiseStream(np.int64(3)).next_key(), rf.NoiseStream(3).next_key())
    assert rf.objectives.RealUID(np.float32(0.875), np.float64(0.9)) == rf.objectives.RealUID(0.875, 0.9)
    given = {"teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY}
    guided = (
        rf.functional.generator_loss(UID, **given, teacher_uncond=b.uncond, guidance=scale)
        for scale in (np.float32(2), np.int64(2), 2.0)
    )
    assert len({float(loss) for loss in guided}) == 1
    with pytest.raises(UserError, match=r"seed must be an integer in \[0, 2\^63\)"):
        rf.NoiseStream(np.int64(-1))


def bad(**changes):
    b = batch((4, 3, 2, 2), torch.float32)
    for name, change in changes.items():
        setattr(b, name, change(getattr(b, name)))
    return b


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fake": lambda v: v[:3]}, r"fake_out must have shape \(4, 3, 2, 2\) to go with x, not \(3, 3, 2, 2\)"),
        ({"fake": lambda v: v.double()}, "fake_out must have x's dtype torch.float32, not torch.float64"),
        ({"teacher": lambda v: v.to("meta")}, "teacher_out must be on x's device cpu, not meta"),
        (
            {"x_t": lambda v: LAYOUTS["channels_last"](v)},
            r"x_t and x must share one memory layout.*; pass x_t\.contiguous\(\)",
        ),
        (
            {"x": lambda v: LAYOUTS["channels_last"](v)},
            r"one memory layout.*; pass endpoint\.contiguous\(memory_format=torch\.channels_last\)",
        ),
        ({"endpoint": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2)}, "endpoint must be contiguous or"),
        ({"coef": lambda v: v[:2]}, r"coef must have shape \(4, 9\)"),
        ({"coef": lambda v: v.double()}, "coef must be contiguous torch.float32"),
        ({"noise": lambda v: torch.zeros(3, dtype=torch.int64)}, "noise must be a key from"),
        ({"noise": lambda v: v[:2]}, r"noise must have shape \(4, 3, 2, 2\)"),
        ({"x": lambda v: v.int()}, "x must be float32, bfloat16, float16 or float64, not torch.int32"),
        (
            {"x": lambda v: v.transpose(2, 3)[:, :, :, ::2].repeat(1, 1, 1, 2).transpose(1, 2)},
            "x must be contiguous or",
        ),
        ({"x": lambda v: torch.tensor(1.0)}, "x must have a batch dimension"),
    ],
)
def test_mismatched_tensors_get_a_sentence(change, sentence):
    b = bad(**change)
    with pytest.raises(rf.errors.UserError, match=sentence):
        rf.functional.generator_loss(
            UID,
            teacher_out=b.teacher,
            fake_out=b.fake,
            x=b.x,
            x_t=b.x_t,
            coef=b.coef,
            noise=b.noise,
            endpoint=b.endpoint,
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"objective": UID, "n_real": 2}, "n_real must be 0 for UID"),
        ({"objective": REAL}, "n_real must not be 0 for RealUID"),
        ({"objective": REAL, "n_real": 4}, "n_real must leave at least one generated row: got 4 of 4"),
        ({"objective": REAL, "n_real": -1}, "n_real must leave at least one generated row"),
        ({"objective": GENERAL, "n_real": 2}, "teacher_out must be given for General RealUID"),
        ({"objective": UID, "noise_rows": 5}, "noise_rows must lie between 1 and the number of rows 4, got 5"),
        ({"objective": UID, "reduction": "sum"}, "reduction must be 'mean' or 'none', not 'sum'"),
    ],
)
def test_bad_fake_arguments_get_a_sentence(arguments, sentence):
    b = batch((4, 3), torch.float32)
    with pytest.raises(rf.errors.UserError, match=sentence):
        rf.functional.fake_loss(**arguments, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY)


def wrong_types():
    b = batch((4, 3), torch.float32)
    generator = {
        "teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY,
        "objective": REAL,
    }  # fmt: skip
    fake = {"fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY, "objective": REAL, "n_real": 2}
    matching = {"out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY}
    mixed = {"x": b.x, "coef": b.coef, "noise": KEY}
    numbers, f = b.x.numpy(), rf.functional
    return [
        *((rf.interpolate, mixed, name, wrong) for name in mixed for wrong in (0, numbers, b.x.tolist(), None)),
        (rf.interpolate, mixed, "noise", rf.NoiseStream(0)),
        (rf.interpolate, mixed, "endpoint", numbers),
        *((rf.interpolate, mixed, "noise_rows", wrong) for wrong in (2.0, "2", b.x, True)),
        *((call, matching, name, numbers) for call in (f.matching_loss, f.matching_grads) for name in matching),
        *((call, fake, name, [1.0]) for call in (f.fake_loss, f.fake_grads) for name in fake),
        *((call, generator, name, "x") for call in (f.generator_loss, f.generator_grads) for name in generator),
        *((f.generator_loss, generator, "objective", wrong) for wrong in (rf.objectives.RealUID, PATH, "uid", KEY)),
        *((rf.functional.fake_loss, fake, "n_real", wrong) for wrong in (2.0, "2", KEY, None, True)),
        (rf.functional.matching_grads, matching, "out", None),
        (rf.functional.fake_grads, fake, "fake_out", None),
        (rf.functional.generator_grads, generator, "teacher_out", None),
        *((rf.functional.generator_loss, generator, "guidance", wrong) for wrong in ("2", numbers, None)),
        (rf.functional.generator_loss, generator, "teacher_uncond", numbers),
        (rf.functional.generator_loss, generator | {"objective": rf.objectives.SDS(), "fake_out": None}, "x", numbers),
        (rf.functional.generator_loss, generator | {"objective": rf.objectives.SDS(), "fake_out": None}, "coef", KEY),
        *((rf.sample_output, {"x": b.x, "x_t": b.x_t, "coef": b.coef}, name, numbers) for name in ("x", "x_t", "coef")),
        *((rf.functional.matching_loss, matching, "reduction", wrong) for wrong in (None, 1, b.x, ["mean"])),
        (rf.noise.normal, {"key": KEY, "like": b.x}, "key", 3),
        (rf.noise.normal, {"key": KEY, "like": b.x}, "like", (4, 3)),
        *((rf.NoiseStream, {"seed": 0}, "device", wrong) for wrong in ("cud", 3.5, torch.float32)),
        (rf.NoiseStream(0).load_state_dict, {}, "state", {"seed": 1}),
        (rf.NoiseStream(0).load_state_dict, {}, "state", KEY),
        *((PATH.coefficients, {"t": b.coef[:, 0]}, "t", wrong) for wrong in (0.5, b.coef[:, 0].numpy(), [0.5], None)),
        *((PATH.coefficients, {"t": b.coef[:, 0].sigmoid()}, name, wrong) for name in ("match", "predict")
          for wrong in (None, numbers, ["x0"])),
        *((PATH.coefficients, {"t": b.coef[:, 0].sigmoid()}, "weight", wrong) for wrong in (2.0, lambda t: 1.0)),
        *((PATH.sample_time, {"n": 4}, "n", wrong) for wrong in (4.0, "4", b.x, -1)),
        (PATH.sample_time, {"n": 4}, "generator", "cpu"),
        (PATH.sample_time, {"n": 4}, "device", torch.Generator()),
        (PATH.network_time, {}, "t", 0.5),
        (PATH.network_input, {"t": b.coef[:, 0]}, "x_t", numbers),
        (PATH.reads_x_t, {}, "match", ["x0"]),
        (rf.paths.Linear, {}, "sampler", rf.paths.samplers.Uniform),
        (rf.paths.weight, {"name": "edm"}, "path", rf.paths.VE),
        (rf.paths.build, {}, "name", ["linear"]),
        (rf.paths.build, {"name": "linear"}, "settings", 3),
        (rf.paths.custom, {"a": torch.sin, "c": torch.cos}, "a", 1.0),
        (rf.paths.custom, {"a": torch.sin, "c": torch.cos}, "t_range", 1.0),
        (rf.couplings.couple, {"x": b.x, "y": b.x}, "y", numbers),
        (rf.objectives.divergence_weight, {"divergence": "jeffreys"}, "log_ratio", 0.5),
        (rf.objectives.divergence_weight, {"log_ratio": b.x}, "divergence", ["jeffreys"]),
        *((rf.objectives.RealUID, {"alpha": 0.9, "beta": 0.9}, name, wrong) for name in ("alpha", "beta")
          for wrong in ("0.9", None, b.x, [0.9])),
        (rf.objectives.RealSiD, {"alpha": 0.9, "beta": 0.8}, "alpha", "0.9"),
        (rf.objectives.RealSiD, {"alpha": 0.9, "alpha_sid": 1.2}, "beta", "0.9"),
        (rf.objectives.GeneralRealUID, {"alpha": 0.9, "beta": 0.8, "gamma": 0.9}, "kappa", "1"),
        (rf.objectives.GeneralRealUID, {"alpha": 0.9, "gamma": 0.9}, "beta", "1"),
    ]  # fmt: skip


@pytest.mark.parametrize(("call", "arguments", "name", "wrong"), wrong_types())
def test_a_wrong_type_gets_a_sentence_that_names_the_argument(call, arguments, name, wrong):
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        call(**arguments | {name: wrong})


def test_swapped_arguments_and_uncalled_presets_are_named():
    b = batch((4, 3), torch.float32)
    with pytest.raises(UserError, match=r"objective must be an Objective .*, not torch\.Tensor"):
        rf.functional.generator_loss(
            KEY, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=REAL
        )
    with pytest.raises(UserError, match=r"objective must be .*, not the function RealUID itself"):
        rf.functional.fake_loss(rf.objectives.RealUID, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY)
    with pytest.raises(UserError, match="fake_out must have shape"):
        rf.functional.fake_loss(UID, fake_out=b.fake, x=b.coef, x_t=b.x_t, coef=b.x, noise=KEY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_stream_on_a_device_that_is_not_there_is_a_sentence():
    with pytest.raises(UserError, match="device 'cuda' cannot be used"):
        rf.NoiseStream(0, device="cuda")
    with pytest.raises(UserError, match="device 'cuda' cannot be used"):
        PATH.sample_time(4, device="cuda")


def test_guidance_that_cannot_be_is_named():
    b = batch((4, 3))
    inputs = {"teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY}
    for wrong, sentence in (
        ({"guidance": 2.0}, "teacher_uncond must be given with a guidance of 2"),
        ({"guidance": b.guidance}, "teacher_uncond must be given with a guidance"),
        ({"teacher_uncond": b.uncond[:2], "guidance": 2.0}, "teacher_uncond must have shape"),
        ({"teacher_uncond": b.uncond, "guidance": float("nan")}, "guidance must be finite"),
        ({"teacher_uncond": b.uncond, "guidance": b.guidance[:3]}, "guidance must be a number or have shape"),
        ({"teacher_uncond": b.uncond, "guidance": b.guidance.float()}, "dtype torch.float64"),
        ({"teacher_uncond": b.uncond, "guidance": b.guidance.requires_grad_()}, "gradient in guidance"),
    ):
        with pytest.raises(UserError, match=sentence):
            rf.functional.generator_loss(UID, **inputs, **wrong)
