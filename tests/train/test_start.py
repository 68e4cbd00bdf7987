"""Where a student begins: at the teacher's prediction, at an earlier student, at one of its averages."""

import pytest
import torch

import realuid_fast as rf
from realuid_fast import data, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.jobs.train import train
from realuid_fast.models.frozen import frozen_view
from realuid_fast.models.generator import Generator
from realuid_fast.networks import build
from realuid_fast.train import checkpoint

from ..helpers import LABELLED, MLP, POINTS, UNET, distiller, random_network, save_teacher, settings


def test_frozen_views_share_memory_and_follow_updates():
    net = build(MLP)
    view = frozen_view(net)
    assert not any(p.requires_grad for p in view.parameters())
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    t, x = torch.rand(3), torch.randn(3, 2)
    assert torch.equal(view(t, x), net(t, x))
    other = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    assert frozen_view(net, other).first.weight.data_ptr() == other["first.weight"].data_ptr()
    for wrong, found in ((torch.zeros(3), r"a tensor \(3,\)"), (None, "nothing")):
        state = {name: wrong if name == "first.weight" else tensor for name, tensor in other.items()}
        with pytest.raises(UserError, match=rf"state has {found} for the parameter first.weight of shape \(\d"):
            frozen_view(net, {name: tensor for name, tensor in state.items() if tensor is not None})


def test_a_frozen_view_is_a_network_at_its_average():
    net = build(MLP)
    net.last.bias.requires_grad_(False)
    optimiser = rf.optim.FusedAdam([p for p in net.parameters() if p.requires_grad], ema_decays=(0.9,))
    view = rf.frozen_view(net, optimiser.averages(0.9))
    t, x = torch.rand(3), torch.randn(3, 2)
    for _ in range(2):
        (net(t, x) - 1).square().sum().backward()
        optimiser.step()
    averages = optimiser.averages(0.9)
    for (name, p), seen in zip(net.named_parameters(), view.parameters(), strict=True):
        assert torch.equal(seen, averages.get(p, p)), name
        assert seen.data_ptr() == averages.get(p, p).data_ptr()
    assert not torch.equal(view(t, x), net(t, x))
    with pytest.raises(UserError, match="these are another network's"):
        rf.frozen_view(build(MLP), averages)


def test_generator_starts_as_the_teachers_prediction():
    net = random_network(MLP)
    z = torch.randn(5, 2)
    expected = 0.7 * z + 0.7 * net(torch.full((5,), 0.3), 0.7 * z)
    torch.testing.assert_close(Generator(net, 0.3)(z), expected)
    with pytest.raises(UserError, match="t_start"):
        Generator(net, 1.0)


def test_teachers_that_do_not_fit_are_refused():
    held = data.load("digits")
    net = random_network(MLP)
    vp = teachers.Description(UNET, path="vp", path_settings={"beta_max": 12.0}, predict="noise")
    for description, path, sentence in (
        (teachers.Description(MLP), {}, r"samples of shape \(2,\), data set 'digits' has \(1, 8, 8\)"),
        (vp, {"predict": "velocity"}, "the teacher predicts noise, not path.predict velocity"),
        (vp, {"name": "linear"}, "trained on the path 'vp', not on path.name 'linear'"),
        (vp, {"name": "vp", "settings": {"beta_max": 20.0}}, r"'beta_max': 12.0}, not with path.settings .*20.0"),
        (vp, {"predict": "residual"}, "the teacher predicts noise, not path.predict residual"),
        (teachers.Description(UNET, path="none"), {}, "path.name must be one of linear"),
    ):
        config = configs.from_mapping(settings("x", data={"name": "digits"}, path=path))
        with pytest.raises(UserError, match=sentence):
            trainers.distiller(config, held, teachers.Model(net, description))
    labelled = {**LABELLED, "num_classes": 5}
    with pytest.raises(UserError, match="knows 5 classes, data set 'digits' has 10"):
        distiller(labelled)


def test_second_stage_goes_on_from_a_student(tmp_path):
    first = distiller(distill={"t_start": 0.28})
    for _ in range(3):
        first.update()
    file = tmp_path / "student.safetensors"
    teachers.save(file, *first.exported())
    for source in (file, tmp_path):
        second = distiller(distill={"t_start": 0.28, "start": str(source)})
        for name, tensor in first.student.net.state_dict().items():
            assert torch.equal(second.generator.net.state_dict()[name], tensor)
            assert torch.equal(second.student.net.state_dict()[name], tensor)
        # The fake model begins at the teacher.
        for ours, theirs in zip(second.fake.parameters(), second.teacher.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    # The average remembers its start: one step moves it by 1 - 0.9 of the way, where a fresh one would follow.
    start = {name: tensor.clone() for name, tensor in second.student.net.named_parameters()}
    second.update()
    for name, now in second.generator.net.named_parameters():
        torch.testing.assert_close(second.student.net.state_dict()[name], torch.lerp(start[name], now.detach(), 0.1))

    with pytest.raises(UserError, match=r"is a student of t_start = 0.28, this run is one of 0"):
        distiller(distill={"t_start": 0.0, "start": str(file)})
    with pytest.raises(UserError, match="has another network than the teacher"):
        distiller(LABELLED, distill={"t_start": 0.28, "start": str(file)})
    with pytest.raises(UserError, match="there is no file"):
        distiller(distill={"start": str(tmp_path / "gone")})


def test_second_stage_from_another_average(tmp_path):
    """The averages of a run's folder, which has exported one of three, and of a published checkpoint with all three."""
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    own = {"ema": [0.5, 0.7, 0.9], "ema_warmup": False, "t_start": 0.0, "objective": {"name": "uid"}}
    first = settings(teacher, distill=own)
    train("distill", configs.from_mapping(first), tmp_path / "run", False, False, "")
    run = tmp_path / "run"
    kept = checkpoint.read(sorted((run / "checkpoints").iterdir())[-1])["trainer"]
    averages = {0.0: kept["generator"], **kept["generator_optimiser"]["ema"]}

    def start(source, decay, **distill):
        distill = {**first["distill"], "start": str(source), "start_decay": decay, **distill}
        return trainers.distiller(
            configs.from_mapping({**first, "distill": distill}), data.load(POINTS), teachers.load_teacher(teacher)
        )

    def is_at(trainer, state):
        of_all = [trainer.generator.net.state_dict(), *trainer.generator_optimiser.ema.values()]
        return all(torch.equal(each[name], value) for each in of_all for name, value in state.items())

    for decay, state in averages.items():
        assert is_at(start(run, decay), state)
        assert sum(is_at(start(run, decay), other) for other in averages.values()) == 1
    assert is_at(start(run, None), averages[0.9])
    assert is_at(start(run / "student.safetensors", 0.9), averages[0.9])
    assert teachers.load(run / "student.safetensors").description.decay == 0.9
    with pytest.raises(UserError, match=r"start_decay 0\.5 is not in .*student\.safetensors, which holds 0\.9"):
        start(run / "student.safetensors", 0.5)
    with pytest.raises(UserError, match=r"start_decay 0\.6 is not in .*run, only 0, 0\.5, 0\.7, 0\.9"):
        start(run, 0.6)
    (run / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"best.safetensors: nothing was evaluated .*set distill\.start=.*run to go on"):
        start(run / "best.safetensors", 0.9)

    published = tmp_path / "student.pt"
    head = {"cls_pred_branch.0.bias": torch.zeros(3)}
    content = {"ema_gens": {str(d): {**averages[d], **head} for d in (0.5, 0.7, 0.9)}, "gen": averages[0.0], "step": 9}
    torch.save(content, published)
    assert is_at(start(published, 0.7), averages[0.7])
    assert is_at(start(published, None), averages[0.9])
    with pytest.raises(UserError, match=r"has no average of decay 0\.6, only 0, 0\.5, 0\.7, 0\.9"):
        start(published, 0.6)
    with pytest.raises(UserError, match=r"is a student of t_start = 0, this run is one of 0\.28"):
        start(published, 0.7, t_start=0.28)

    for file in (run / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="is no sound checkpoint of a student: it is cut short"):
        start(run, 0.5)
    assert is_at(start(run, 0.9), averages[0.9])
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"0\.5 is not what .*run exported, and it has no checkpoint left"):
        start(run, 0.5)
