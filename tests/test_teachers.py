"""Networks on disk: round trips, published checkpoints, and the sentence that every unusable file gets."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import realuid_fast as rf
from realuid_fast import data, paths, sampling, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build

NETWORK = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
POINTS = {"name": "eight_gaussians", "n": 200, "n_heldout": 50}
UNET = {"kind": "unet", "dim": [1, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4}


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = build(NETWORK)
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made


@pytest.fixture
def saved(net, tmp_path):
    file = tmp_path / "teacher.safetensors"
    described = teachers.Description(NETWORK, data={"name": "moons"}, preprocessing="none", command="made here")
    teachers.save(file, net.state_dict(), described)
    return file


def test_round_trip(net, saved):
    model = teachers.load(saved, role="teacher")
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in model.net.state_dict().items())
    assert model.description.data == {"name": "moons"}
    assert model.description.command == "made here"
    assert model.description.path == "linear"
    assert not model.net.training
    assert [f.name for f in saved.parent.iterdir()] == [saved.name]


def test_a_description_says_path_settings_and_prediction(net, tmp_path):
    file = tmp_path / "teacher.safetensors"
    described = teachers.Description(NETWORK, path="vp", path_settings={"beta_max": 12.0}, predict="v")
    teachers.save(file, net.state_dict(), described)
    read = teachers.load(file).description
    assert read == described
    assert read.interpolant() == paths.VP(beta_max=12.0)
    with pytest.raises(UserError, match=r"path\.name must be one of"):
        teachers.Description(NETWORK, path="mine").interpolant()


def test_files_from_before_paths_had_settings_load():
    described = teachers.load_teacher("digits").description
    assert described.format == 1
    assert described.interpolant() == paths.Linear()


def test_shipped_digits_teacher_draws_digits():
    model = teachers.load_teacher("digits")
    assert model.description.role == "teacher"
    assert model.description.data["name"] == "digits"
    assert model.description.command.startswith("realuid-fast train-teacher")
    x = torch.zeros(2, 1, 8, 8)
    labels = torch.tensor([3, 4]) if getattr(model.net, "num_classes", 0) else None
    assert torch.isfinite(model.net(torch.tensor([0.2, 0.9]), x, labels)).all()


def test_the_shipped_mnist_teacher_draws_images_in_steps():
    teacher = rf.load("mnist-teacher")
    described = teacher.description
    assert (described.role, described.data["name"], described.data["path"]) == ("teacher", "idx", "data/mnist")
    assert described.command == "make study DATA=data/mnist"
    x = teacher(torch.randn(100, 1, 16, 16, generator=torch.Generator().manual_seed(0)), steps=10)
    assert float(x.mean()) == pytest.approx(2 * 0.1307 - 1, abs=0.07)
    assert float(x[:, :, [0, -1]].mean()) < -0.95
    assert float(x.std(0).mean()) > 0.3


def test_the_shipped_mnist_student_draws_images_at_once():
    student = rf.load("mnist")
    described = student.description
    assert (described.role, described.data["name"], described.teacher) == ("student", "idx", "")
    assert described.data["path"] == "data/mnist"
    x = student(torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    # MNIST's mean is 0.1307 of white, and means over areas keep it.
    assert float(x.mean()) == pytest.approx(2 * 0.1307 - 1, abs=0.05)
    # Strokes are white, the frame is black, and the images differ from each other.
    assert float((x > 0.5).float().mean()) > 0.05
    assert float(x[:, :, [0, -1]].mean()) < -0.95
    assert float(x.std(0).mean()) > 0.3
    assert rf.sample("mnist", 3).shape == (3, 1, 16, 16)


def test_missing_and_foreign_files(tmp_path, saved, net):
    with pytest.raises(UserError, match="there is no file"):
        teachers.load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="neither a file nor one of the shipped"):
        teachers.load_teacher("cats")
    for place in (tmp_path, tmp_path / "edm.pkl"):
        place.exists() or place.write_bytes(b"")
        with pytest.raises(UserError, match="realuid-fast convert makes a file"):
            teachers.load_teacher(place)
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(UserError, match="no safetensors file"):
        teachers.load(text)
    foreign = tmp_path / "foreign.safetensors"
    save_file(net.state_dict(), str(foreign))
    with pytest.raises(UserError, match="not written by realuid_fast"):
        teachers.load_teacher(foreign)
    with pytest.raises(UserError, match="holds a teacher, a student is wanted"):
        teachers.load(saved, role="student")
    classifier = tmp_path / "classifier.safetensors"
    save_file(net.state_dict(), str(classifier), metadata={"realuid_fast": json.dumps({"kind": "digit_classifier"})})
    with pytest.raises(UserError, match="holds no teacher or student but digit_classifier"):
        teachers.load(classifier)


@pytest.mark.parametrize("text", ["{", "[1]", '{"role": "teacher", "network": {"kind": "mlp"}, "format": 99}'])
def test_damaged_or_newer_descriptions(tmp_path, net, text):
    file = tmp_path / "file.safetensors"
    save_file(net.state_dict(), str(file), metadata={"realuid_fast": text})
    with pytest.raises(UserError, match=r"damaged description|format 99"):
        teachers.load(file)


def test_keys_that_do_not_fit_are_listed(tmp_path, saved, net):
    state = load_file(str(saved))
    del state["first.bias"]
    state["more"] = torch.zeros(1)
    state["last.bias"] = torch.zeros(3)
    file = tmp_path / "other.safetensors"
    teachers.save(file, state, teachers.Description(NETWORK))
    with pytest.raises(UserError, match=r"missing first\.bias; unexpected more; of another shape last\.bias \(3,\)"):
        teachers.load(file)


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_type_are_refused_by_name(tmp_path, saved, kind):
    state, file = load_file(str(saved)), tmp_path / "other.safetensors"
    state["last.bias"] = state["last.bias"].abs().to(kind)
    teachers.save(file, state, teachers.Description(NETWORK))
    with pytest.raises(UserError, match=rf"of another type last\.bias {kind} instead of torch\.float32"):
        teachers.load(file)


def test_a_network_in_the_place_of_its_state_is_named(tmp_path, net):
    with pytest.raises(UserError, match="state must be a Mapping, not MLP"):
        teachers.save(tmp_path / "net.safetensors", net, teachers.Description(NETWORK))
    with pytest.raises(UserError, match="description must be a Description, not dict"):
        teachers.save(tmp_path / "net.safetensors", net.state_dict(), {})


def test_halves_and_whole_buffers_load(tmp_path):
    net, file = torch.nn.BatchNorm1d(2), tmp_path / "norm.safetensors"
    state = {name: value.half() if value.is_floating_point() else value + 3 for name, value in net.state_dict().items()}
    teachers.save(file, state, teachers.wrap(net, (2,)).description)
    read = teachers.load(file, net=net).net
    assert (read.weight.dtype, int(read.num_batches_tracked)) == (torch.float32, 3)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.last.weight = self.first.weight

    def forward(self, t, x, y=None):
        return self.last(torch.tanh(self.first(x)))


def test_a_student_with_tied_weights_is_saved_and_read_again(tmp_path):
    torch.manual_seed(0)
    content = {"data": {"name": "moons"}, "distill": {"batch": 8, "updates": 2, "fake_turns": 1}}
    trainer = trainers.distiller(configs.from_mapping(content), data.load(content["data"]), teachers.wrap(Tied(), (2,)))
    trainer.update()
    file, z = tmp_path / "student.safetensors", torch.randn(3, 2)
    teachers.save(file, *trainer.exported())
    read = teachers.load(file, net=teachers.wrap(Tied(), (2,)).net).net
    assert torch.equal(sampling.one_step(read, z, trainer.description.t_start), trainer.sample(z))
    assert read.net.last.weight is read.net.first.weight


def test_published_checkpoints(tmp_path):
    net = build(UNET)
    states = {d: {f"module.{k}": v + d for k, v in net.state_dict().items()} for d in (0.5, 0.9)}
    file = tmp_path / "published.pt"
    torch.save({"ema_models": {str(d): s for d, s in states.items()}, "step": 3}, file)
    largest = teachers.load_teacher(file, network=UNET)
    chosen = teachers.load_teacher(file, network=UNET, decay=0.5)
    name = "out.2.bias"
    assert torch.equal(largest.net.state_dict()[name], net.state_dict()[name] + 0.9)
    assert torch.equal(chosen.net.state_dict()[name], net.state_dict()[name] + 0.5)
    torch.save({"ema_gens": {str(d): s for d, s in states.items()}, "gen": net.state_dict()}, file)
    student = teachers.load_teacher(file, network=UNET, decay=0.5)
    assert torch.equal(student.net.state_dict()[name], net.state_dict()[name] + 0.5)
    for content in ({"ema_model": net.state_dict()}, {"net_model": net.state_dict()}, net.state_dict()):
        torch.save(content, file)
        assert torch.equal(teachers.load_teacher(file, network=UNET).net.state_dict()[name], net.state_dict()[name])
    described = teachers.Description(UNET, decay=0.9)
    teachers.save(tmp_path / "t.safetensors", net.state_dict(), described)
    for decay in (None, 0.9):
        assert teachers.load_teacher(tmp_path / "t.safetensors", decay=decay).description == described
    with pytest.raises(UserError, match=r"t\.safetensors holds the average 0\.9, not the one of decay 0\.5"):
        teachers.load_teacher(tmp_path / "t.safetensors", decay=0.5)
    with pytest.raises(UserError, match=r"none of 0\.5"):
        teachers.load_teacher(file, network=UNET, decay=0.5)
    torch.save({"ema_models": states}, file)
    with pytest.raises(UserError, match=r"no average of decay 0\.7, only 0\.5, 0\.9"):
        teachers.load_teacher(file, network=UNET, decay=0.7)
    with pytest.raises(UserError, match="does not say which network"):
        teachers.load_teacher(file)
    with pytest.raises(UserError, match="does not fit the network: missing"):
        teachers.load_teacher(file, network={**UNET, "num_res_blocks": 2})


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_no_code_in_a_checkpoint_runs(tmp_path, capsys):
    for name, content in (("a.pt", Malicious()), ("b.pt", {"ema_models": Malicious()})):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="tensors and plain values alone"):
            teachers.load_teacher(tmp_path / name, network=UNET)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="tensors and plain values alone"):
        teachers.load_teacher(tmp_path / "c.pt", network=UNET)
    torch.save([1, 2], tmp_path / "d.pt")
    with pytest.raises(UserError, match="holds a list"):
        teachers.load_teacher(tmp_path / "d.pt", network=UNET)
    torch.save({"epoch": 1}, tmp_path / "e.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        teachers.load_teacher(tmp_path / "e.pt", network=UNET)
    assert "code ran" not in capsys.readouterr().out


def test_unwritable_place_is_a_sentence(tmp_path, net):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        teachers.save(tmp_path / "file" / "x.safetensors", net.state_dict(), teachers.Description(NETWORK))


class Reversed(torch.nn.Module):
    """A network of another signature and no home in this package: ``net(x, t, labels=...)``."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 16), torch.nn.Linear(16, 2)
        self.labels = torch.nn.Embedding(3, 1)

    def forward(self, x, t, labels=None):
        y = torch.zeros_like(t[:, None]) if labels is None else self.labels(labels)
        return self.last(torch.tanh(self.first(torch.cat([x, t[:, None], y], 1))))


def test_any_module_is_a_teacher_and_its_student_is_read_again(tmp_path):
    torch.manual_seed(0)
    model = teachers.wrap(Reversed(), (2,), path="vp", predict="noise", call=lambda net, t, x, y: net(x, t / 999, y))
    content = {"data": {"name": "moons"}, "path": {"match": "x0", "sampler": "log-normal"}}
    content["distill"] = {"batch": 8, "updates": 2, "fake_turns": 1}
    held = data.load(content["data"])
    trainer = trainers.distiller(configs.from_mapping(content), held, model)
    for _ in range(2):
        trainer.update()
    file, z = tmp_path / "student.safetensors", torch.randn(3, 2)
    teachers.save(file, *trainer.exported())
    with pytest.raises(UserError, match=r"your own module: give the module to teachers\.load as 'net'"):
        teachers.load(file)
    call = lambda net, t, x, y: net(x, t / 999, y)  # noqa: E731
    read = teachers.load(file, role="student", net=teachers.wrap(Reversed(), (2,), call=call).net)
    described = read.description
    found = sampling.one_step(read.net, z, described.t_start, None, described.interpolant(), described.predict)
    torch.testing.assert_close(found, trainer.sample(z))
    assert not torch.equal(read.net.net.first.weight, model.net.net.first.weight)
    with pytest.raises(UserError, match="does not fit the network: missing"):
        teachers.load(file, net=build(NETWORK))


def function_of(t, x, y):
    """The velocity of the linear path from noise to N(1.5, 0.25^2) in every dimension: a teacher without a network."""
    path = paths.Linear()
    a, c = (value.view(-1, 1) for value in path.scales(t))
    mean, spread = 1.5, 0.25
    variance = a**2 * spread**2 + c**2
    x0 = mean + a * spread**2 / variance * (x - a * mean)
    noise = c / variance * (x - a * mean)
    rates = [value.view(-1, 1) for value in path.rates(t)]
    return rates[0] * x0 + rates[1] * noise


@pytest.mark.parametrize("objective", ["uid", "regression"])
def test_any_function_is_a_teacher(objective):
    """A one-dimensional Gaussian's velocity is known; the student ends at the Gaussian's mean and deviation."""
    torch.manual_seed(0)
    net = build({"kind": "mlp", "shape": [2], "width": 32, "depth": 2})
    model = teachers.wrap(net, (2,), teacher=function_of)
    rates = {"lr": 3e-3, "warmup": 10}
    content = {"data": POINTS, "distill": {"objective": {"name": objective}, "batch": 64, "updates": 400}}
    content["distill"] |= {"fake_turns": 2, "generator": rates, "fake": rates, "ema": [0.98], "export": 0.98}
    trainer = trainers.trainer("distill", configs.from_mapping(content), data.load(POINTS), model)
    assert trainer.teacher is model.function
    for _ in range(400):
        trainer.update()
    samples = trainer.sample(torch.randn(4000, 2))
    assert abs(float(samples.mean()) - 1.5) < 0.1
    assert abs(float(samples.std()) - 0.25) < 0.1


def test_a_function_without_a_gradient_is_a_sentence():
    net = build({"kind": "mlp", "shape": [2], "width": 4, "depth": 1})
    model = teachers.wrap(net, (2,), teacher=lambda t, x, y: function_of(t, x.detach(), y))
    content = {"data": POINTS, "distill": {"batch": 8, "fake_turns": 1, "objective": {"name": "uid"}}}
    with pytest.raises(UserError, match="the teacher gives no gradient in x_t, which UID needs"):
        trainers.distiller(configs.from_mapping(content), data.load(POINTS), model).update()
    content |= {"path": {"match": "x0"}, "distill": content["distill"] | {"objective": {"name": "dmd"}}}
    trainers.distiller(configs.from_mapping(content), data.load(POINTS), model).update()


def test_a_module_with_labels_is_wrapped_with_their_number():
    model = teachers.wrap(Reversed(), (2,), call=lambda net, t, x, y: net(x, t, y), num_classes=2, null_label=True)
    assert (model.net.num_classes, model.net.null_label) == (2, 2)
    t, x, y = torch.rand(3), torch.randn(3, 2), torch.tensor([0, 1, 2])
    assert torch.equal(model.net(t, x, y), model.net.net(x, t, y))
    assert not torch.equal(model.net(t, x, y), model.net(t, x, y.flip(0)))
    guided = sampling.call(model.net, t, x, y[:1].expand(3), guidance=2.0)
    with_label, without = model.net(t, x, y[:1].expand(3)), model.net(t, x, y[2:].expand(3))
    torch.testing.assert_close(guided, 2 * with_label - without)
    plain = teachers.wrap(build(NETWORK), (2,))
    assert torch.equal(plain.net(t, x), plain.net.net(t, x))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"net": torch.sin}, r"net must be a torch\.nn\.Module, whose weights a student can start from"),
        ({"path": "mine"}, r"path\.name must be one of"),
        ({"predict": "data"}, "predict must be one of"),
        ({"path": "ddbm-vp", "predict": "noise"}, "noise gives neither velocity nor data"),
        ({"null_label": True}, "null_label needs num_classes"),
        ({"call": "x"}, "call must be a function, not 'x'"),
        ({"num_classes": "10"}, "num_classes must be a whole number, not str"),
        ({"dim": 2}, "dim must be the shape of one sample"),
        ({"dim": (2.5,)}, "dim must be a whole number, not float"),
    ],
)
def test_wrapping_is_refused_in_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        teachers.wrap(**{"net": torch.nn.Identity(), "dim": (2,), **settings})
