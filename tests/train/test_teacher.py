"""A teacher's training: coupled batches, its own law of times, label dropout and guidance."""

import math

import pytest
import torch

import realuid_fast as rf
from realuid_fast import data, functional, paths, sampling, teachers
from realuid_fast.couplings import couple
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.noise import normal
from realuid_fast.train.batches import Batches

from ..helpers import LABELLED, MLP, NULL, POINTS, UNET, random_network, settings


@pytest.mark.parametrize("case", ["noise", "noise inside classes", "endpoints"])
def test_a_teacher_on_coupled_batches(case, monkeypatch):
    """The pairs of a run without coupling, and the same noise or endpoints in the order of least distance."""
    held = data.load({"noise": POINTS, "endpoints": {"name": "transport", "n": 200}}.get(case, "digits"))
    path = {"name": "stochastic-interpolant"} if case == "endpoints" else {}
    network = {"kind": "mlp", "width": 8, "depth": 1} | ({"num_classes": 10} if "classes" in case else {})
    seen = []

    def recorded(x, coef, noise, endpoint=None, noise_rows=None):
        other = endpoint if case == "endpoints" else noise if noise.is_floating_point() else normal(noise, x)
        seen.append((x, other))
        return interpolate(x, coef, noise, endpoint)

    interpolate = rf.interpolate
    monkeypatch.setattr(functional, "interpolate", recorded)
    for coupling in (False, True):
        own = {"coupling": coupling, "batch": 32}
        content = settings("x", data=held.config, path=path, network=network, teacher=own)
        trainer = trainers.teacher_trainer(configs.from_mapping(content), held)
        labels = trainer.batches.next()[1] if "classes" in case else None
        trainer.batches = Batches(held, 32, 0, torch.device("cpu"), trainer.draws)
        trainer.update()
        assert all(math.isfinite(value) for value in trainer.meters.read().values())
    (x, apart), (same, coupled) = seen
    assert torch.equal(x, same)
    torch.testing.assert_close(coupled, apart[couple(x, apart, labels)], rtol=0, atol=0)
    assert float((x - coupled).square().sum()) < float((x - apart).square().sum())
    if labels is not None:
        rows = {tuple(row.flatten().tolist()): int(label) for row, label in zip(apart, labels, strict=True)}
        assert [rows[tuple(row.flatten().tolist())] for row in coupled] == labels.tolist()


EDM = {
    "kind": "song-unet",
    "dim": [1, 8, 8],
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "dropout": 0.0,
}
EDM |= {"attn_resolutions": [], "label_dim": 10, "null_label": True}


def guided(folder, network=NULL, **teacher):
    """A trainer that learns a guided teacher, which is saved in ``folder``."""
    held, source = data.load("digits"), folder / "source.safetensors"
    teachers.save(source, random_network(network).state_dict(), teachers.Description(network, data=held.config))
    own = {"guided": str(source), "scales": [1.0, 4.0], **teacher}
    return trainers.teacher_trainer(configs.from_mapping(settings("x", data={"name": "digits"}, teacher=own)), held)


@pytest.mark.parametrize("match", ["velocity", "x0"])
@pytest.mark.parametrize("network", [NULL, {**UNET, "class_cond": True, "num_classes": 10, "null_label": True}, EDM])
def test_guided_distillation_is_its_paper(network, match, tmp_path):
    """Meng et al. (2210.03142): ``w ||f(z_t, s) - (u + s (c - u))||^2``, ``s`` uniform in each row, real ``z_t``."""
    trainer = guided(tmp_path, network, match=match)
    teacher = teachers.load(tmp_path / "source.safetensors").net
    # The network starts as the teacher at every scale, and its layers of the scale move with the first step.
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    for scale in (1.0, torch.tensor([1.0, 2.0, 3.0, 4.0])):
        # 1e-5: the trainer's network has its channels last, and sums in another order.
        torch.testing.assert_close(trainer.net.eval()(t, x, y, guidance=scale), teacher(t, x, y), rtol=1e-5, atol=1e-5)
    trainer.update()
    assert not torch.equal(trainer.net(t, x, y, guidance=4.0), trainer.net(t, x, y))

    noise, state, batches = trainer.noise.state_dict(), trainer.draws.get_state(), trainer.batches.state_dict()
    noise = {name: value.clone() for name, value in noise.items()}
    trainer._backward()
    explicit = [p.grad.clone() for p in trainer.net.parameters()]
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(state)
    trainer.batches.load_state_dict(batches)
    trainer.optimiser.zero_grad()
    x, y = trainer.batches.next()
    t = trainer.path.sample_time(8, trainer.draws)
    n = normal(trainer.noise.next_key(), x)
    at = t.view(-1, 1, 1, 1)
    x_t = at * x + (1 - at) * n
    s = 1 + 3 * torch.rand(8, generator=trainer.draws)
    c, u = (teacher(t, x_t, labels).detach() for labels in (y, torch.full_like(y, teacher.null_label)))
    gap = trainer.net(t, x_t, y, guidance=s) - (u + s.view(-1, 1, 1, 1) * (c - u))
    # A prediction of x0 is x_t + (1 - t) v.
    loss = ((gap if match == "velocity" else (1 - at) * gap) ** 2).sum() / 8
    for mine, p in zip(explicit, torch.autograd.grad(loss, [*trainer.net.parameters()]), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-4, atol=1e-5 * float(p.abs().max()) + 1e-7)


def test_a_guided_network_is_asked_once_at_any_scale(tmp_path):
    """By the solvers, and by a distillation with guidance, from its file."""
    trainer = guided(tmp_path)
    trainer.update()
    file = tmp_path / "teacher.safetensors"
    teachers.save(file, *trainer.exported())
    model = teachers.load(file)
    assert model.description.network["guided"]
    x, t, y, rows = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4), []
    model.net.register_forward_pre_hook(lambda net, given: rows.append(len(given[1])))
    out = sampling.call(model.net, t, x, y, guidance=3.0)
    assert torch.equal(out, model.net(t, x, y, guidance=3.0))
    assert not torch.equal(out, model.net(t, x, y))
    made = sampling.integrate(model.net, x, 2, "euler", y, guidance=3.0)
    assert not torch.equal(made, sampling.integrate(model.net, x, 2, "euler", y))
    assert set(rows) == {4}

    content = settings("x", data={"name": "digits"}, distill={"objective": {"name": "uid"}, "guidance": 3.0})
    student = trainers.distiller(configs.from_mapping(content), data.load("digits"), model)
    asked, uncond = student._ask_teacher((t, x, y))
    assert uncond is None
    torch.testing.assert_close(asked, out)
    student.update()
    assert all(math.isfinite(value) for value in student.meters.read().values())


def test_what_does_not_go_with_a_guided_teacher_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"guided needs a class-conditional teacher with a null label"):
        guided(tmp_path, LABELLED)
    with pytest.raises(UserError, match=r"teacher\.guided needs label_dropout 0 and scales of which the first is less"):
        guided(tmp_path, scales=[2.0, 2.0])
    net = random_network({**NULL, "guided": True})
    x = torch.zeros(4, 1, 8, 8)
    with pytest.raises(UserError, match=r"guidance must be a number or have shape \(4,\), got \(3,\)"):
        net(torch.zeros(4), x, torch.zeros(4, dtype=torch.int64), guidance=torch.ones(3))


def test_couplings_of_what_is_paired_already_are_refused():
    content = settings("x", path={"name": "brownian-bridge"}, network=MLP, teacher={"coupling": True})
    held = data.load("digit_pairs")
    with pytest.raises(UserError, match="data set 'digit_pairs' is one of pairs"):
        trainers.teacher_trainer(
            configs.from_mapping(content | {"network": {"kind": "mlp", "width": 8, "depth": 1}}), held
        )


def test_the_teachers_own_times_and_distance():
    path = {"name": "ve", "predict": "edm", "match": "x0", "sampler": "karras"}
    own = {"sampler": "log-normal", "sampler_settings": {"mean": -0.4}, "weight": "edm"}
    content = settings("x", path=path, teacher=own, network=MLP)
    trainer = trainers.teacher_trainer(configs.from_mapping(content), data.load(POINTS))
    assert trainer.path.sampler == paths.samplers.LogNormal(-0.4, 1.2)
    t = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(trainer.matching.coefficients(t)[:, 8], (t**2 + 0.25) / (t * 0.5) ** 2)
    assert configs.from_mapping(content).path.build().path.sampler == paths.samplers.Karras()


def test_label_dropout_trains_the_null_label():
    held = data.load("digits")
    content = settings("x", data=held.config, network={"kind": "mlp", "width": 8, "depth": 1, "num_classes": 10})
    content["teacher"] |= {"label_dropout": 0.5}
    trainer = trainers.teacher_trainer(configs.from_mapping(content), held)
    assert trainer.net.null_label == 10
    labels = torch.zeros(1000, dtype=torch.int64)
    dropped = trainer._dropped(labels)
    assert set(dropped.tolist()) == {0, 10}
    assert 0.4 < float((dropped == 10).float().mean()) < 0.6
    before = trainer.net.label_embed.weight[10].clone()
    trainer.net.last.weight.data.normal_()  # a fresh network's last layer is zero and lets no gradient through
    for _ in range(3):
        trainer.update()
    assert not torch.equal(trainer.net.label_embed.weight[10], before)

    content["network"] |= {"null_label": False}
    with pytest.raises(UserError, match=r"teacher.label_dropout needs a class-conditional network with null_label"):
        trainers.teacher_trainer(configs.from_mapping(content), held)
    with pytest.raises(UserError, match=r"label_dropout must lie in \[0, 1\), got 1"):
        configs.load("digits", ["teacher.label_dropout=1"])


def test_guided_sampling_follows_the_guided_velocity():
    net = random_network(NULL)
    z, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    t = torch.full((6,), 0.3)
    c, u = net(t, z, labels), net(t, z, torch.full((6,), 10))
    guided = sampling.call(net, t, z, labels, guidance=2.5)
    torch.testing.assert_close(guided, u + 2.5 * (c - u), rtol=1e-4, atol=1e-4)
    step = sampling.integrate(net, z, 1, labels=labels, guidance=2.5)
    at_start = sampling.call(net, torch.zeros(6), z, labels, guidance=2.5)
    torch.testing.assert_close(step, z + at_start)
    with pytest.raises(UserError, match="guidance needs a class-conditional network with a null label"):
        sampling.integrate(random_network(LABELLED), z, 1, labels=labels, guidance=2.0)
