"""Precision of a turn: what half precision does to either turn's gradient, the scaled seed, and the tripwire."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from realuid_fast import data, precision, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build
from realuid_fast.precision import Precision

CPU = torch.device("cpu")


def digits(**distill):
    """The shipped digits problem at batch 32."""
    config = configs.from_mapping(configs.merge(configs.to_mapping(configs.load("digits")), {"distill": distill}))
    return trainers.distiller(config, data.load("digits"), copy.deepcopy(teachers.load_teacher("digits")))


def gradients(trainer):
    """One update of ``trainer``; the gradients of fake model and generator as its optimisers saw them."""
    seen = {}
    for name, net in (("fake", trainer.fake), ("generator", trainer.generator)):
        optimiser = trainer.optimisers[name]

        def step(name=name, net=net, step=optimiser.step):
            seen[name] = torch.cat([p.grad.flatten().clone() for p in net.parameters() if p.grad is not None])
            step()

        optimiser.step = step
    trainer.update()
    return seen


@pytest.fixture(scope="module")
def exact():
    return gradients(digits(batch=32))


def test_a_bf16_fake_turn_keeps_the_gradients_direction(exact):
    rounded = gradients(digits(batch=32, fake_precision="bf16"))
    assert rounded["fake"].dtype == torch.float32
    assert 0.99 < float(F.cosine_similarity(rounded["fake"], exact["fake"], dim=0)) < 0.99999


def test_fp16_serves_the_generator_where_bf16_does_not(exact):
    """The gap is under a percent after one fake turn: rounding of 2^-8 shows, of 2^-11 much less."""
    apart = {
        name: float(F.cosine_similarity(gradients(digits(batch=32, generator_precision=name))["generator"], e, dim=0))
        for name, e in (("fp16", exact["generator"]), ("bf16", exact["generator"]))
    }
    assert apart["fp16"] > 0.99
    assert apart["bf16"] < apart["fp16"]


def test_a_scaled_seed_changes_no_bit_in_float32(exact):
    trainer = digits(batch=32)
    # Powers of two pass through every product and sum; nothing here is near the ends of float32's range.
    trainer._seed_scale = 64.0
    scaled = gradients(trainer)
    assert torch.equal(scaled["generator"], exact["generator"])
    assert torch.equal(scaled["fake"], exact["fake"])


FLAGS = (
    torch.backends,
    torch.backends.cudnn,
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
)


def flags():
    """The newer settings, and the older ones where torch lets them be read."""

    def older(read):
        with contextlib.suppress(RuntimeError):
            return read()

    reads = (lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision)
    return [each.fp32_precision for each in FLAGS], [older(read) for read in reads]


@pytest.fixture
def settings_of_torch():
    """torch's settings are those of the whole process: put back afterwards."""
    (generic, *_), _ = flags()
    yield
    torch.backends.fp32_precision = generic
    torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", ["float32", "tf32"])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (None, None),
        ("cuda.matmul.fp32_precision", "tf32"),
        ("cuda.matmul.fp32_precision", "ieee"),
        ("cudnn.conv.fp32_precision", "ieee"),
        ("cudnn.fp32_precision", "tf32"),
        ("fp32_precision", "ieee"),
        ("fp32_precision", "tf32"),
        ("cuda.matmul.allow_tf32", True),
        ("cudnn.allow_tf32", False),
        ("medium", None),
    ],
)
def test_a_callers_settings_are_respected_by_whichever_names_they_were_given(settings_of_torch, place, value, name):
    """A turn has its own arithmetic, in both kinds of torch's switches; afterwards the caller's hold again."""
    if place == "medium":
        torch.set_float32_matmul_precision(place)
    elif place is not None:
        *path, last = place.split(".")
        setattr(functools.reduce(getattr, path, torch.backends), last, value)
    before, wanted = flags(), "tf32" if name == "tf32" else "ieee"
    for _ in range(2):
        with Precision(name, torch.device("cuda")).turn():
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == wanted
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (name == "tf32")
            assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
        assert flags()[0] == before[0]
        for older, was in zip(flags()[1], before[1], strict=True):
            assert was is None or older == was
    if place == "fp32_precision":
        # Switches that followed torch's global setting still follow it.
        torch.backends.fp32_precision = other = "tf32" if value == "ieee" else "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == other


def test_an_overflow_is_skipped():
    trainer = digits(batch=32, generator_precision="fp16")
    trainer._seed_scale = 2.0**40
    before = [p.detach().clone() for p in trainer.generator.parameters()]
    trainer.update()
    assert float(trainer.generator_optimiser.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.generator.parameters(), strict=True))
    trainer._seed_scale = precision.seed_scale(32)
    trainer.update()
    assert float(trainer.generator_optimiser.skipped) == 1
    assert not torch.equal(before[0], next(trainer.generator.parameters()))


@pytest.mark.parametrize(("batch", "scale"), [(1, 1), (3, 4), (64, 64), (65, 128)])
def test_seed_scale_is_the_power_of_two_from_the_batch_up(batch, scale):
    assert precision.seed_scale(batch) == scale


@pytest.mark.parametrize(
    "network",
    [
        {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1},
        {"kind": "unet", "dim": [1, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4},
        {
            "kind": "unet",
            "dim": [1, 8, 8],
            "num_channels": 8,
            "channel_mult": [1, 2],
            "norm_groups": 4,
            "attention_resolutions": [4],
            "use_scale_shift_norm": True,
        },
    ],
    ids=["mlp", "unet", "unet, attention"],
)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_last_layer_returns_float32_under_autocast(network, name):
    torch.manual_seed(0)
    net = build(network)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    t, x = torch.rand(4), torch.randn(4, 1, 8, 8)
    net.requires_grad_(False)
    with Precision(name, CPU).networks():
        out = net(t, x)
    assert out.dtype == torch.float32
    # Not a half-precision number widened.
    assert not torch.equal(out, out.to(torch.float16 if name == "fp16" else torch.bfloat16).float())
    exact = net(t, x)
    # Some roundings of 2^-9 or 2^-12 in a row, over a dozen layers.
    assert float((out - exact).norm() / exact.norm()) < (0.05 if name == "bf16" else 0.01)


def test_the_tripwire_speaks_where_rounding_outgrows_the_gap():
    trainer = digits(batch=32, generator_precision="bf16")
    assert "generator_precision bf16 is too coarse: fake model and teacher differ by 2.80%" in trainer.concern(
        {"gap": 0.028}
    )
    assert trainer.concern({"gap": 0.27}) is None
    assert trainer.concern({"gap": float("nan")}) is None
    assert digits(batch=32, generator_precision="fp16").concern({"gap": 0.028}) is None
    assert digits(batch=32).concern({"gap": 1e-5}) is None


def test_gradient_error_matches_what_was_measured():
    """On the CIFAR-10 U-Net; within a quarter."""
    for name, gap, error in (
        ("bf16", 0.028, 0.39),
        ("bf16", 0.084, 0.14),
        ("bf16", 0.27, 0.05),
        ("fp16", 0.028, 0.057),
    ):
        assert Precision(name, CPU).gradient_error(gap) == pytest.approx(error, rel=0.25)


def test_gap_is_the_outputs_relative_distance(monkeypatch):
    trainer = digits(batch=32)
    outputs = {}
    for name in ("_run_teacher", "_run_frozen_fake"):
        call = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *a, name=name, call=call: outputs.setdefault(name, call(*a)))
    trainer.update()
    f_teacher, f_fake = (outputs[name].detach() for name in ("_run_teacher", "_run_frozen_fake"))
    assert trainer.meters.read()["gap"] == pytest.approx(
        float((f_fake - f_teacher).norm() / f_teacher.norm()), rel=1e-5
    )


def test_a_bf16_teacher_takes_half_the_memory_and_its_rounding_is_told(exact):
    stored = {name: digits(batch=32, teacher_precision=name) for name in ("float32", "bf16")}
    size = {n: sum(p.numel() * p.element_size() for p in trainer.teacher.parameters()) for n, trainer in stored.items()}
    # Vectors and the output layer stay as they are.
    assert size["bf16"] < 0.52 * size["float32"]
    *_, last = stored["bf16"].teacher.children()
    assert all(p.dtype == torch.float32 for p in last.parameters())
    # The students start from the teacher as it was, and train in float32.
    for rounded, whole in zip(stored["bf16"].fake.parameters(), stored["float32"].fake.parameters(), strict=True):
        assert torch.equal(rounded, whole)
    found = gradients(stored["bf16"])
    # In the fake turn the teacher is one term of a target.
    assert float(F.cosine_similarity(found["fake"], exact["fake"], dim=0)) > 0.999
    # In the generator's it is one side of a small difference.
    assert 0.5 < float(F.cosine_similarity(found["generator"], exact["generator"], dim=0)) < 0.9999
    assert "distill.teacher_precision bf16 is too coarse" in stored["bf16"].concern({"gap": 0.028})
    assert stored["bf16"].concern({"gap": 0.27}) is None
    with pytest.raises(UserError, match=r"distill\.teacher_precision must be one of float32, bf16; got 'fp16'"):
        digits(teacher_precision="fp16")


def test_precisions_that_cannot_be_had_are_refused():
    with pytest.raises(
        UserError, match=r"distill\.fake_precision must be one of float32, tf32, bf16, fp16; got 'half'"
    ):
        digits(fake_precision="half")
    with pytest.raises(
        UserError, match=r"distill\.generator_precision tf32 does not run on cpu: it needs a CUDA device"
    ):
        digits(generator_precision="tf32")
