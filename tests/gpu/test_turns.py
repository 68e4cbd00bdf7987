"""Turns on a GPU: graphs, compiled and eager networks follow one trajectory; nothing waits for the host; launches."""

import functools

import pytest
import torch

import realuid_fast as rf
from realuid_fast.train import hooks
from realuid_fast.train.checkpoint import Checkpoints
from realuid_fast.train.modes import WARM_UP, Captured, CudaRecorder

from ..helpers import trainer_of

pytest.importorskip("triton", reason="the triton package is not installed")

ACTIVITIES = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
NETWORK = {"kind": "unet", "dim": [1, 8, 8], "num_channels": 16, "channel_mult": [1, 2], "norm_groups": 4}


def distiller(mode="eager", device="cuda", **distill):
    rates = {"warmup": 4, "decay": "cosine"}
    settings = {"batch": 32, "updates": 50, "fake_turns": 2, "ema": [0.9], "export": 0.9, "generator": rates, **distill}
    return trainer_of(NETWORK, "digits", std=0.1, distill=settings, run={"mode": mode, "device": device})


def graphs(**distill):
    """Graphs of eager networks, which need no compiling."""
    return distiller("graphs-eager", **distill)


def trajectory(trainer, updates):
    rows = []
    for _ in range(updates):
        trainer.update()
        rows.append(trainer.meters.read())
    return rows, torch.cat([p.detach().flatten() for p in trainer.generator.parameters()])


def test_graphs_follow_the_eager_trajectory():
    """The same kernels in the same order; cuDNN may choose other algorithms, which order float32 sums differently."""
    rows, parameters = trajectory(graphs(), WARM_UP + 4)
    expected, expected_parameters = trajectory(distiller(), WARM_UP + 4)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=2e-3)
    assert float((parameters - expected_parameters).norm() / expected_parameters.norm()) < 1e-3


@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
def test_graphs_are_captured_again_after_they_were_forgotten(capfd, keep):
    """While a result of the first ones is kept, too; and torch has nothing to warn of."""
    trainer, kept = distiller("graphs-eager"), []
    for _ in range(3):
        for _ in range(WARM_UP + 2):
            trainer.update()
        assert trainer._generator_step.captured
        if keep:
            kept += [optimiser.norm for optimiser in trainer.optimisers.values()]
        trainer.forget_graphs()
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("place", ["cuda.matmul", "cudnn.conv"])
@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_caller_may_set_precisions_by_torchs_newer_names(place, mode):
    setting = functools.reduce(getattr, place.split("."), torch.backends)
    before = setting.fp32_precision
    setting.fp32_precision = other = "ieee" if place == "cudnn.conv" else "tf32"
    try:
        distiller(mode, fake_precision="tf32").update()
        assert setting.fp32_precision == other
    finally:
        setting.fp32_precision = before


@pytest.mark.slow
def test_compiled_and_its_graphs_follow_the_eager_trajectory():
    expected, expected_parameters = trajectory(distiller(), WARM_UP + 2)
    for mode in ("compiled", "graphs"):
        rows, parameters = trajectory(distiller(mode), WARM_UP + 2)
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, rel=2e-3)
        assert float((parameters - expected_parameters).norm() / expected_parameters.norm()) < 1e-3


def test_two_replays_draw_different_noise_and_times():
    noise, draws = rf.NoiseStream(3, "cuda"), torch.Generator("cuda").manual_seed(3)
    path, x = rf.paths.Linear(sampler="stratified"), torch.randn(64, 3, 8, 8, device="cuda")

    def turn():
        t = path.sample_time(64, draws, torch.device("cuda"))
        return {"t": t, "x_t": rf.interpolate(x, path.coefficients(t), noise.next_key())}

    replayed = Captured(turn, CudaRecorder(torch.device("cuda"), [draws]), warm_up=2)
    seen = [{name: value.clone() for name, value in replayed().items()} for _ in range(6)]
    # From the same seeds without a graph.
    noise, draws = rf.NoiseStream(3, "cuda"), torch.Generator("cuda").manual_seed(3)
    for got in seen:
        want = turn()
        assert torch.equal(got["t"], want["t"])
        assert torch.equal(got["x_t"], want["x_t"])
    for name in ("t", "x_t"):
        assert len({float(each[name].double().sum()) for each in seen}) == len(seen)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graphs"])
def test_an_update_waits_for_nothing(captured):
    trainer = graphs() if captured else distiller()
    for _ in range(WARM_UP + 1):
        trainer.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_of_the_log_and_a_checkpoint_wait_for_nothing(tmp_path):
    """What they need is copied behind a kernel that still runs; so is what the next updates overwrite."""
    trainer, checkpoints = distiller(), Checkpoints(tmp_path)
    for _ in range(WARM_UP):
        trainer.update()
    watch, values = hooks.Watch(trainer), torch.ones(1000, device="cuda")
    watch.start()
    watch.fetch()()
    trainer.update()
    torch.cuda.synchronize()
    # About half a second.
    torch.cuda._sleep(10**9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = watch.fetch()
        assert not row.ready
        checkpoints.save_soon(1, {"values": values})
        values.zero_()
        checkpoints.check()
        assert not checkpoints.files()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step, numbers, _ = row()
    assert step == WARM_UP + 1
    assert numbers["fake loss"] > 0
    checkpoints.wait()
    assert checkpoints.load()["values"].sum() == 1000
    checkpoints.close()


def launches(function):
    """Kernels and copies that the host launches in ``function``."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=ACTIVITIES) as profiler:
        function()
        torch.cuda.synchronize()
    words = ("LaunchKernel", "MemcpyAsync", "MemsetAsync")
    return sum(any(word in event.name for word in words) for event in profiler.events())


def test_the_loss_path_is_at_most_five_launches():
    """From the interpolant to the seeds of both backward passes, without the networks."""
    x, out, other = (torch.randn(64, 3, 32, 32, device="cuda") for _ in range(3))
    path, objective = rf.paths.Linear(), rf.objectives.RealUID(0.92, 0.94)
    coef = path.coefficients(torch.rand(64, device="cuda"))
    key = rf.NoiseStream(0, "cuda").next_key()

    def generator():
        rf.interpolate(x, coef, key)
        grads = rf.functional.generator_grads(
            objective, teacher_out=out, fake_out=other, x=x, x_t=None, coef=coef, noise=key
        )
        torch.addcmul(grads.x, coef[:, 0].view(-1, 1, 1, 1), out)

    def fake():
        rf.interpolate(x, coef, key, noise_rows=32)
        rf.functional.fake_grads(objective, fake_out=out, x=x, x_t=None, coef=coef, noise=key, n_real=32, noise_rows=32)

    assert 0 < launches(generator) <= 5
    assert 0 < launches(fake) <= 5


@pytest.mark.parametrize(("fake", "generator"), [("bf16", "fp16"), ("bf16", "tf32")])
def test_half_precision_turns_stay_near_float32(fake, generator):
    rows, _ = trajectory(distiller(fake_precision=fake, generator_precision=generator), 3)
    expected, _ = trajectory(distiller(), 3)
    # A bfloat16 network's rounding of 2^-9 on outputs of order one, over a few layers.
    for row, wanted in zip(rows, expected, strict=True):
        assert row["fake loss"] == pytest.approx(wanted["fake loss"], rel=0.02)
    # torch's default, as it was before the turns.
    assert torch.backends.cudnn.allow_tf32 is True
