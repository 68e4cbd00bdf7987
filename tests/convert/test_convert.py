"""Networks of others as teachers: the same outputs from the converted file, strict names, and nothing that runs."""

import argparse
import io
import json
import os
import pickle
import re
import resource
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from realuid_fast import cli, data, paths, sampling, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.models.convert import convert, edm_pickle
from realuid_fast.networks import build

SONG = {"kind": "song-unet", "dim": [1, 8, 8], "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
SONG |= {"attn_resolutions": [4], "dropout": 0.0}


def shaken(net, seed=0):
    """The network with every parameter moved, so that zero-initialised layers take part."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def distilled(file, **sections):
    """A student of one update from the teacher in ``file``, on the digits; its file, read again."""
    held = data.load({"name": "digits"})
    content = {
        "distill": {"teacher": str(file), "batch": 4, "updates": 1, "fake_turns": 1},
        "run": {"tensorboard": False},
    }
    content = configs.merge(content, sections)
    trainer = trainers.distiller(configs.from_mapping(content), held, teachers.load_teacher(file))
    trainer.update()
    found = trainer.meters.read()
    # The gaps by distance to the data are empty where a batch of four has no row.
    assert all(np.isfinite(value) for name, value in found.items() if "%" not in name), found
    student = file.with_name("student.safetensors")
    teachers.save(student, *trainer.exported())
    model = teachers.load(student, role="student")
    labels = None if trainer.labels is None else torch.tensor([1, 2])
    assert torch.isfinite(trainer.sample(torch.randn(2, 1, 8, 8), labels)).all()
    return model


# Published checkpoints and torchcfm


@pytest.mark.parametrize("labels", [False, True], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("side", [32, 64])
def test_published_checkpoints_of_torchcfm_networks_give_its_outputs(peer, side, labels, tmp_path):
    options = {"dim": [3, side, side], "num_channels": 32, "num_res_blocks": 1, "num_heads": 2, "num_head_channels": 16}
    options |= {"attention_resolutions": "16", "dropout": 0.1} | (
        {"class_cond": True, "num_classes": 10} if labels else {}
    )
    theirs = shaken(peer(**options))
    averages = {0.999: theirs.state_dict(), 0.9: shaken(peer(**options), 1).state_dict()}
    torch.save(
        {"ema_models": {str(d): {f"module.{k}": v for k, v in s.items()} for d, s in averages.items()}},
        tmp_path / "c.pt",
    )
    convert(tmp_path / "c.pt", tmp_path / "c.safetensors", network={"kind": "unet", **options})
    model = teachers.load_teacher(tmp_path / "c.safetensors")
    t, x = torch.tensor([0.2, 0.9]), torch.randn(2, 3, side, side)
    y = torch.tensor([3, 7]) if labels else None
    with torch.no_grad():
        expected = theirs(t, x, y)
        assert expected.std() > 0.01
        torch.testing.assert_close(model.net(t, x, y), expected, rtol=1e-5, atol=1e-5)
    assert (model.description.path, model.description.predict) == ("linear", "velocity")


@pytest.fixture(scope="module")
def headed(peer):
    """The published code's network on the digits: torchcfm's U-Net, its settings, with a discriminator's head on it."""
    options = {"dim": [1, 8, 8], "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
    torch.manual_seed(0)
    made = peer(**options)
    made.cls_pred_branch = torch.nn.Sequential(
        *(torch.nn.Conv2d(64, 64, 2, 2), torch.nn.GroupNorm(32, 64), torch.nn.SiLU()),
        *(torch.nn.Conv2d(64, 64, 2, 2), torch.nn.GroupNorm(32, 64), torch.nn.SiLU()),
        torch.nn.Conv2d(64, 1, 1),
    )
    return shaken(made), {"kind": "unet", **options}


@pytest.fixture(scope="module")
def torchcfms(peer):
    """torchcfm's U-Net in the shape of the configuration "folder", whose time_scale is 100 and norm_groups are 8."""
    torch.manual_seed(0)
    options = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2, 2], "num_heads": 2}
    return shaken(peer(dim=[3, 32, 32], attention_resolutions="8", **options))


TAKEN = (
    r"c\.pt is a checkpoint of torchcfm or of the published code, whose U-Net has time_scale = 1 and norm_groups = 32"
)


@pytest.mark.parametrize("kind", ["ema_models", "ema_gens", "ema_model", "net_model"])
def test_published_files_have_the_published_numbers_that_no_state_dict_shows(
    torchcfms, kind, tmp_path, capsys, monkeypatch
):
    """--config folder for its network, which has others: outputs were 48 % off without a word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    state = torchcfms.state_dict()
    torch.save({kind: {"0.999": state} if kind.endswith("s") else state, "step": 1}, "c.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert (
            cli.main(
                ["convert", "c.pt", "--config", "folder", "--set", "network.dim=[3,32,32]", "--out", "c.safetensors"]
            )
            == 0
        )
    assert re.search(
        rf"warning: {TAKEN}: this is taken, not the configuration's .*100.0 and norm_groups = 8",
        capsys.readouterr().err,
    )
    config = configs.load("folder", ["network.dim=[3,32,32]"])
    with pytest.warns(UserWarning, match=TAKEN):
        direct = teachers.load_teacher("c.pt", config.teachers_network())
    t, x = torch.tensor([0.2, 0.9]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = torchcfms(t, x)
        for model in (direct, teachers.load_teacher("c.safetensors")):
            torch.testing.assert_close(model.net(t, x), expected, rtol=1e-5, atol=1e-5)
            assert (model.description.network["time_scale"], model.description.network["norm_groups"]) == (1, 32)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_alone_keep_the_configurations_numbers_and_say_so(torchcfms, suffix, tmp_path):
    """Nothing tells whose they are. The warning names what torchcfm's would need, and with that it is silent."""
    file = tmp_path / f"c{suffix}"
    if suffix == ".pt":
        torch.save(torchcfms.state_dict(), file)
    else:
        save_file(torchcfms.state_dict(), str(file))
    network = {**configs.load("folder").network, "dim": [3, 32, 32]}
    words = (
        rf"c\{suffix} holds weights without time_scale and norm_groups: the configuration's time_scale = 100.0 and "
        r"norm_groups = 8 is taken, .* torchcfm, .*\(network.time_scale=1 network.norm_groups=32\)"
    )
    with pytest.warns(UserWarning, match=words):
        kept = convert(file, tmp_path / "o.safetensors", network=network)
    assert (kept.description.network["time_scale"], kept.description.network["norm_groups"]) == (100, 8)
    t, x = torch.tensor([0.2, 0.9]), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        right = convert(file, tmp_path / "o.safetensors", network={**network, "time_scale": 1, "norm_groups": 32})
        expected = torchcfms(t, x)
        assert (kept.net(t, x) - expected).norm() > 0.1 * expected.norm()
        torch.testing.assert_close(right.net(t, x), expected, rtol=1e-5, atol=1e-5)
        # Networks that torchcfm cannot have made: 32 does not divide their width, or their middle has no attention.
        for own in (
            {"num_channels": 8, "norm_groups": 4},
            {"num_channels": 32, "norm_groups": 8, "middle_attention": False},
        ):
            own = {"kind": "unet", "dim": [1, 8, 8], "channel_mult": [1, 2], "time_scale": 100.0, **own}
            torch.save({"ema_model": build(own).state_dict()}, tmp_path / "own.pt")
            assert teachers.load_teacher(tmp_path / "own.pt", own).description.network == own


@pytest.mark.parametrize("prefix", ["model.", "module.model."])
def test_names_of_a_network_inside_another_are_taken(prefix, tmp_path):
    """DMD2's files are state dicts of EDM's preconditioning, which has the network as "model"."""
    net = shaken(build(SONG))
    state = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    save_file(state, str(tmp_path / "bare.safetensors"))
    for name in ("pytorch_model.bin", "bare.safetensors"):
        made = convert(tmp_path / name, tmp_path / "o.safetensors", network=SONG, path="ve", predict="edm")
        t, x = torch.tensor([0.2, 0.9]), torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            assert torch.equal(made.net(t, x), net(t, x))
    torch.save({**state, "other.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"missing .*unexpected model\."):
        convert(tmp_path / "pytorch_model.bin", tmp_path / "o.safetensors", network=SONG, path="ve", predict="edm")


@pytest.mark.parametrize(("averages", "last"), [("ema_gens", "gen"), ("ema_models", "net_model")])
def test_a_decay_of_zero_is_the_last_weights(averages, last, tmp_path, capsys):
    """As the published code saves them: a student's beside ema_gens, a teacher's beside ema_models."""
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    states = [shaken(build(network), seed).state_dict() for seed in range(3)]
    content = {last: states[0], averages: {"0.999": states[1], "0.9999": states[2]}, "u": states[1], "step": 7}
    torch.save(content, tmp_path / "c.pt")
    words = ["convert", str(tmp_path / "c.pt"), "--out", str(tmp_path / "o.safetensors"), "--overwrite", "--set"]
    words += ["network={kind: mlp, shape: [2], width: 8, depth: 1}", *(["--student"] if last == "gen" else [])]
    for decay, expected in (("0", 0), ("0.999", 1), (None, 2)):
        assert cli.main([*words, *([] if decay is None else ["--decay", decay])]) == 0
        model = teachers.load(tmp_path / "o.safetensors", role="student" if last == "gen" else "teacher")
        assert model.description.decay == (None if decay is None else float(decay))
        for name, value in model.net.state_dict().items():
            assert torch.equal(value, states[expected][name])
    del content[last]
    torch.save(content, tmp_path / "c.pt")
    assert cli.main([*words, "--decay", "0"]) == 2
    assert "has no average of decay 0, only 0.999, 0.9999" in capsys.readouterr().err
    torch.save({"ema_model": states[1], "net_model": states[0]}, tmp_path / "c.pt")
    for decay, expected in ((0.0, 0), (None, 1)):
        found = teachers.published_state(tmp_path / "c.pt", decay)
        assert torch.equal(found["first.weight"], states[expected]["first.weight"])


def test_flow_matchings_checkpoints_are_refused_by_what_is_in_them(tmp_path):
    """Its image example saves the parsed command line beside the weights, and averages that have no names."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 2))
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    averaged = {f"model.{name}": value for name, value in net.state_dict().items()} | {"num_updates": torch.tensor(3)}
    averaged |= {f"shadow_params.{i}": value for i, value in enumerate(net.state_dict().values())}
    whole = {"model": averaged, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    plain = {name: value for name, value in whole.items() if name != "args"}
    for content, words in (
        (whole, r"plain values alone: it also holds argparse\.Namespace, which is not read; save its state dict alone"),
        (plain, r"holds no state dict, .*; it holds model, optimizer, epoch: save the state dict among them alone"),
        (averaged, r"holds averages without names \(shadow_params\.0 and so on, as flow_matching's EMA keeps them\)"),
    ):
        torch.save(content, tmp_path / "checkpoint.pth")
        for read in (
            lambda: teachers.load_teacher(tmp_path / "checkpoint.pth", network),
            lambda: convert(tmp_path / "checkpoint.pth", tmp_path / "o.safetensors", network=network),
        ):
            with pytest.raises(UserError, match=words):
                read()


HEADED = "has a discriminator's head, cls_pred_branch: it is left out"


@pytest.mark.parametrize("kind", ["ema_models", "ema_gens"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "parallel"])
def test_the_discriminators_head_in_published_checkpoints_is_left_out(headed, kind, prefix, tmp_path):
    theirs, network = headed
    state = {f"{prefix}{name}": value for name, value in theirs.state_dict().items()}
    assert sum("cls_pred_branch" in name for name in state) == len(teachers.HEAD) == 10
    torch.save({kind: {"0.999": state}, "step": 1}, tmp_path / "c.pt")
    role = {"ema_models": "teacher", "ema_gens": "student"}[kind]
    with pytest.warns(UserWarning, match=HEADED):
        direct = teachers.load_teacher(tmp_path / "c.pt", network)
    out = tmp_path / "c.safetensors"
    with pytest.warns(UserWarning, match=HEADED):
        converted = convert(tmp_path / "c.pt", out, network=network, student=role == "student")
    t, x = torch.tensor([0.2, 0.9]), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = theirs(t, x)
        assert expected.std() > 0.01
        for model in (direct, converted, teachers.load(out, role=role)):
            torch.testing.assert_close(model.net(t, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["cls_pred_branch.2.weight", "cls_pred_branch.6.scale", "cls_pred_branch.weight", "cls_head.0.weight",
     "unet.cls_pred_branch.0.weight", "cls_pred_branch.00.weight"],
)  # fmt: skip
def test_other_names_beside_that_head_are_refused(headed, name, tmp_path):
    theirs, network = headed
    torch.save({"ema_models": {"0.999": theirs.state_dict() | {name: torch.zeros(1)}}}, tmp_path / "c.pt")
    for read in (
        lambda: teachers.load_teacher(tmp_path / "c.pt", network),
        lambda: convert(tmp_path / "c.pt", tmp_path / "c.safetensors", network=network),
    ):
        with (
            pytest.warns(UserWarning, match=HEADED),
            pytest.raises(UserError, match=rf"network: unexpected {re.escape(name)}$"),
        ):
            read()
    assert not (tmp_path / "c.safetensors").exists()


def test_a_run_is_distilled_from_a_published_checkpoint_as_it_is(headed, capsys, tmp_path):
    theirs, network = headed
    torch.save({"ema_models": {"0.999": theirs.state_dict()}}, tmp_path / "c.pt")
    content = {"data": {"name": "digits"}, "run": {"tensorboard": False, "progress": False, "evaluate_every": 0}}
    content["distill"] = {"teacher": str(tmp_path / "c.pt"), "teacher_network": network, "batch": 4, "fake_turns": 1}
    content["distill"] |= {"updates": 1, "ema": [0.9], "export": 0.9}
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    assert cli.main(["distill", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert f"warning: {tmp_path / 'c.pt'} {HEADED}" in capsys.readouterr().err
    assert teachers.load(tmp_path / "run" / "student.safetensors", role="student").description.network == network


def test_names_that_do_not_fit_are_errors_unless_allowed(tmp_path):
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    torch.manual_seed(3)
    state = build(network).state_dict()
    del state["first.bias"]
    state |= {"head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    torch.save(state, tmp_path / "c.pt")
    out = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match=r"missing first\.bias; unexpected head\.bias, head\.weight$"):
        convert(tmp_path / "c.pt", out, network=network)
    with pytest.raises(UserError, match=r"network: unexpected head\.weight$"):
        convert(tmp_path / "c.pt", out, network=network, allow_missing=["first.bias"], allow_unexpected=["head.b*"])
    assert not out.exists()
    convert(tmp_path / "c.pt", out, network=network, allow_missing=["first.*"], allow_unexpected=["head.*"])
    read = teachers.load_teacher(out).net.state_dict()
    assert torch.equal(read["first.weight"], state["first.weight"])
    again = convert(tmp_path / "c.pt", out, network=network, allow_missing=["first.*"], allow_unexpected=["head.*"])
    assert torch.equal(again.net.state_dict()["first.bias"], read["first.bias"])


def test_what_a_checkpoint_does_not_say_is_asked_for(tmp_path):
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    state = build(network).state_dict()
    torch.save({"ema_gens": {0.99: state}}, tmp_path / "c.pt")
    save_file(state, str(tmp_path / "bare.safetensors"))
    out = tmp_path / "o.safetensors"
    with pytest.raises(UserError, match="does not say which network"):
        convert(tmp_path / "c.pt", out)
    with pytest.raises(UserError, match="must end in"):
        convert(tmp_path / "c.pt", tmp_path / "o.pt", network=network)
    with pytest.raises(UserError, match="there is no file or folder"):
        convert(tmp_path / "none.pt", out)
    with pytest.raises(UserError, match="no averages by decay"):
        convert(tmp_path / "bare.safetensors", out, network=network, decay=0.9)
    with pytest.raises(UserError, match=r"path\.name must be one of"):
        convert(tmp_path / "c.pt", out, network=network, path="mine")
    with pytest.raises(UserError, match="predict must not be residual"):
        convert(tmp_path / "c.pt", out, network=network, predict="residual")
    with pytest.raises(UserError, match="t_start must lie in"):
        convert(tmp_path / "c.pt", out, network=network, student=True, t_start=1.0)
    assert not out.exists()
    asked = {"path": "vp", "path_settings": {"beta_max": 12.0}, "predict": "noise", "data": {"name": "moons"}}
    described = convert(
        tmp_path / "bare.safetensors", out, network=network, preprocessing="points", **asked
    ).description
    assert described.interpolant() == paths.VP(beta_max=12.0)
    assert (described.predict, described.data, described.preprocessing) == ("noise", {"name": "moons"}, "points")
    with pytest.raises(UserError, match="of this package already"):
        convert(out, tmp_path / "p.safetensors", network=network)
    convert(tmp_path / "c.pt", out, network=network, student=True, t_start=0.25)
    assert teachers.load(out, role="student").description.t_start == 0.25


# Pickled EDM networks


class Persistent(torch.nn.Module):
    """Pickles the way the published classes do: a call of one function with a dictionary that holds everything."""

    def __init__(self, class_name, source="", **attributes):
        super().__init__()
        self.__dict__ |= {"class_name": class_name, "source": source, "_init_args": (), **attributes}

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key not in ("class_name", "source")}
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.fixture
def published(monkeypatch):
    """The modules that published pickles name, while one is written; reading them must not need them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def reconstruct(meta):
        raise AssertionError("the published function was called")

    class EasyDict(dict):
        __module__ = "dnnlib.util"

    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    reconstruct.__name__, EasyDict.__qualname__ = "_reconstruct_persistent_obj", "EasyDict"
    persistence._reconstruct_persistent_obj, util.EasyDict = reconstruct, EasyDict
    for name, module in (
        ("torch_utils", None),
        ("torch_utils.persistence", persistence),
        ("dnnlib", None),
        ("dnnlib.util", util),
    ):
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    return EasyDict


def tree(state, class_name, easy_dict, source, buffers=(), **settings):
    """Modules inside one another as the names of ``state`` say."""
    root = Persistent(class_name, source, _init_kwargs=easy_dict(settings))
    for name, value in state.items():
        place, (*folders, last) = root, name.split(".")
        for folder in folders:
            if folder not in place._modules:
                inside = torch.nn.ModuleDict() if folder in ("enc", "dec") else Persistent("Part", source)
                if folder not in ("enc", "dec"):
                    inside.skip_scale = np.sqrt(0.5)
                place.add_module(folder, inside)
            place = place._modules[folder]
        if name.endswith(("resample_filter", "freqs")):
            place.register_buffer(last, value)
        else:
            place.register_parameter(last, torch.nn.Parameter(value))
            place.register_parameter("absent", None)
    return root


PRECONDITIONING = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.4},
    "VPPrecond": {
        "sigma_min": 0.00105,
        "sigma_max": 152.2,
        "beta_d": 19.9,
        "beta_min": 0.1,
        "M": 1000,
        "epsilon_t": 1e-5,
    },
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 20},
}


def levels(steps):
    """Karras et al.'s table 1, improved DDPM: ``u_j``, the noise levels from the largest down to zero."""
    u, bar = (
        torch.zeros(steps + 1, dtype=torch.float64),
        [np.sin(0.5 * np.pi * j / steps / 1.008) ** 2 for j in range(steps + 1)],
    )
    for j in range(steps, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1).sqrt()
    return u


def edm_file(file, easy_dict, precond="EDMPrecond", config=SONG, protocol=4, snapshot=True, source="raise SystemExit"):
    """A file as EDM's trainer writes it, of a network with random weights; that network."""
    net = shaken(build(config))
    given = {key: value for key, value in config.items() if key not in ("kind", "dim", "null_label")}
    given |= {"img_resolution": config["dim"][1], "in_channels": config["dim"][0]}
    given["out_channels"] = given.get("out_channels", config["dim"][0])
    given["label_dropout"] = 0.1 if config.get("null_label") else 0
    name = {"song-unet": "SongUNet", "dhariwal-unet": "DhariwalUNet"}[config["kind"]]
    inner = tree(net.state_dict(), name, easy_dict, source, **given)
    outer = Persistent(precond, source, _init_kwargs=easy_dict(), **PRECONDITIONING[precond])
    outer.add_module("model", inner)
    if precond == "iDDPMPrecond":
        outer.register_buffer("u", levels(20))
    loss = Persistent("EDMLoss", source, P_mean=-1.2, P_std=1.2)
    content = {"ema": outer, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": dict(easy_dict(path="cifar.zip"))}
    file.write_bytes(pickle.dumps(content if snapshot else outer, protocol=protocol))
    return net


def denoised(precond, net, x, sigma, y=None):
    """Karras et al.'s ``D(x; sigma)``, table 1, by the letter."""
    s, numbers = sigma.view(-1, 1, 1, 1), PRECONDITIONING[precond]
    if precond == "EDMPrecond":
        d = numbers["sigma_data"]
        out = net(sigma.log() / 4, x / (s**2 + d**2).sqrt(), y)
        return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * out
    if precond == "VEPrecond":
        return x + s * net((sigma / 2).log(), x, y)
    if precond == "VPPrecond":
        time = 999 * ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
    return x - s * net(time, x / (s**2 + 1).sqrt(), y)


@pytest.mark.parametrize("precond", ["EDMPrecond", "VPPrecond", "VEPrecond"])
def test_pickled_edm_networks_denoise_as_their_preconditioning_says(published, precond, tmp_path):
    config = SONG | {"label_dim": 10, "null_label": True, "augment_dim": 9} if precond == "EDMPrecond" else SONG
    net = edm_file(tmp_path / "edm.pkl", published, precond, config)
    convert(tmp_path / "edm.pkl", tmp_path / "edm.safetensors")
    model = teachers.load_teacher(tmp_path / "edm.safetensors")
    described, path = model.description, model.description.interpolant()
    assert described.predict == {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}[precond]
    assert getattr(model.net, "null_label", None) == (10 if config.get("label_dim") else None)
    sigma, x = torch.tensor([0.05, 1.0, 30.0]), torch.randn(3, 1, 8, 8)
    y = torch.tensor([0, 9, 10]) if config.get("label_dim") else None
    out = sampling.call(model.net, sigma, x, y, path, described.predict)
    k_out, k_x = path.coefficients(sigma, "x0", described.predict)[:, 6:8].unsqueeze(-1).unsqueeze(-1).unbind(1)
    found = k_out[..., None] * out + k_x[..., None] * x
    torch.testing.assert_close(found, denoised(precond, net, x, sigma, y), rtol=1e-4, atol=1e-4)
    assert path.t_range == {"VEPrecond": (0.02, 80.0)}.get(precond, (0.002, 80.0))


def test_networks_of_improved_ddpm_keep_their_table_of_noise_levels(published, tmp_path):
    config = SONG | {"kind": "dhariwal-unet", "model_channels": 32, "channel_mult": [1, 2], "out_channels": 2}
    net = edm_file(tmp_path / "edm.pkl", published, "iDDPMPrecond", config, snapshot=False)
    model = convert(tmp_path / "edm.pkl", tmp_path / "edm.safetensors")
    path, k = model.description.interpolant(), torch.tensor([0.0, 7.0, 19.0], dtype=torch.float64)
    assert (path.steps, model.description.predict) == (20, "noise")
    a, c = path.scales(k / 19)
    torch.testing.assert_close(c / a, levels(20)[19 - k.long()])
    sigma, x = (c / a).float(), torch.randn(3, 1, 8, 8)
    out = sampling.call(model.net, k / 19, (a.view(-1, 1, 1, 1) * x).float(), None, path, "noise")
    expected = net(k.float(), x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_nothing_in_a_pickled_network_is_compiled_or_imported(published, protocol, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    edm_file(tmp_path / "edm.pkl", published, protocol=protocol, source=f"open({str(mark)!r}, 'w').close()")
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.delitem(sys.modules, name)
    convert(tmp_path / "edm.pkl", tmp_path / "edm.safetensors")
    assert not mark.exists()
    assert "torch_utils" not in sys.modules


class Payload:
    """Unpickled, it calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile(published, mark):
    """Name to a pickle and the sentence it gets."""
    shell = Payload(os.system, f"touch {mark}")
    reconstruct = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
    system = f"{os.system.__module__}.system, which an EDM network does not"
    inside = torch.nn.ModuleDict()
    inside.add_module("itself", inside)
    looped = Persistent("SongUNet", _init_kwargs=published(img_resolution=8, in_channels=1))
    looped.add_module("enc", inside)
    outer = Persistent("EDMPrecond", **PRECONDITIONING["EDMPrecond"])
    outer.add_module("model", looped)
    storage = io.BytesIO()
    torch.save({"a": shell}, storage, _use_new_zipfile_serialization=False)
    load = Payload(torch.storage._load_from_bytes, storage.getvalue())
    huge = Payload(
        torch._utils._rebuild_tensor_v2, torch.zeros(2).storage(), 0, (10**6, 10**6), (10**6, 1), False, OrderedDict()
    )
    # A state for the function itself, pickled by its name: it would put attributes on it.
    name = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    return {
        "shell": (pickle.dumps(shell), system),
        "shell in a state": (
            pickle.dumps({"ema": Payload(reconstruct, {"class_name": "EDMPrecond", "state": shell})}),
            system,
        ),
        "evaluation": (pickle.dumps(Payload(eval, f"open({str(mark)!r}, 'w')")), "builtins.eval"),
        "attribute walk": (
            b"\x80\x04\x8c\x0bcollections\x94\x8c\x15OrderedDict.__class__\x94\x93.",
            "OrderedDict.__class__",
        ),
        "state of a function": (
            b"\x80\x02" + name + b"N}X\x08\x00\x00\x00__code__K\x01s\x86b.",
            "sets a state on an object that has none",
        ),
        "shell in a tensor": (pickle.dumps({"ema": load}), "is no pickled EDM network"),
        "tensor beyond its storage": (pickle.dumps(huge), "larger than its storage"),
        "module inside itself": (pickle.dumps({"ema": outer}), "inside itself or in two places"),
        "object elsewhere": (b"\x80\x02X\x01\x00\x00\x00aQ.", "outside of the file"),
        "no network": (pickle.dumps({"model": 1}), "no entry 'ema', only model"),
        "another network": (pickle.dumps({"ema": torch.nn.Linear(1, 1)}), r"torch\.nn\.modules\.linear\.Linear"),
        "cut short": (pickle.dumps({"ema": {"a": 1}})[:-3], "while reading it"),
        "text": (b"hello", "while reading it"),
        "nothing": (b"", "while reading it"),
    }


HOSTILE = ("shell", "shell in a state", "evaluation", "attribute walk", "state of a function", "shell in a tensor")
HOSTILE += ("tensor beyond its storage", "module inside itself", "object elsewhere", "no network", "another network")
HOSTILE += ("cut short", "text", "nothing")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_run_nothing_and_are_told_what_is_wrong(published, name, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "net.pkl"
    content, sentence = hostile(published, mark)[name]
    file.write_bytes(content)
    before = {key: getattr(value, "function", value) for key, value in edm_pickle.ALLOWED.items()}
    with pytest.raises(UserError, match=sentence):
        convert(file, tmp_path / "out.safetensors")
    assert not mark.exists()
    assert not (tmp_path / "out.safetensors").exists()
    assert before == {key: getattr(value, "function", value) for key, value in edm_pickle.ALLOWED.items()}
    if name == "shell":  # the payload itself is one that works
        pickle.loads(content)
        assert mark.exists()


def test_a_pickle_with_a_number_for_memory_takes_none(tmp_path):
    file = tmp_path / "net.pkl"
    # An empty dictionary, remembered as object number 2^28: an index into a table of 4 GB in the interpreter's reader.
    file.write_bytes(b"\x80\x04}r" + struct.pack("<I", 1 << 28) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="no entry 'ema'"):
        edm_pickle.read(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KB


def test_networks_that_edm_pickles_describe_wrongly(published, tmp_path):
    file, out = tmp_path / "edm.pkl", tmp_path / "edm.safetensors"
    net = edm_file(file, published)
    inner = tree(net.state_dict(), "SongUNet", published, "", img_resolution=8, in_channels=1, out_channels=1)
    numbers = PRECONDITIONING["EDMPrecond"]

    def refused(precond, model, sentence, **attributes):
        outer = Persistent(precond, **{**numbers, **attributes})
        if model is not None:
            outer.add_module("model", model)
        file.write_bytes(pickle.dumps({"ema": outer}))
        with pytest.raises(UserError, match=sentence):
            convert(file, out)

    refused("EDMPrecond", inner, "does not fit the network: missing")
    refused("EDMPrecond", None, "the network's part 'model' is missing")
    refused("Precond", inner, "'Precond' is none of EDMPrecond")
    refused("EDMPrecond", inner, "no number sigma_data", sigma_data="big")
    refused("VPPrecond", inner, "has beta_d = 10", **{**PRECONDITIONING["VPPrecond"], "beta_d": 10})
    refused("EDMPrecond", tree({}, "SongUNet", published, ""), "without a size")
    refused("EDMPrecond", tree({}, "MyUNet", published, ""), "is a 'MyUNet', not SongUNet or DhariwalUNet")
    refused(
        "EDMPrecond",
        tree({}, "SongUNet", published, "", img_resolution=8, in_channels=1, dropout={1: 2}),
        "setting dropout",
    )
    assert not out.exists()


def test_a_student_is_distilled_from_a_converted_edm_network(published, tmp_path):
    edm_file(tmp_path / "edm.pkl", published, config=SONG | {"label_dim": 10, "augment_dim": 9})
    convert(tmp_path / "edm.pkl", tmp_path / "edm.safetensors")
    path = {"match": "x0", "weight": "edm", "sampler": "log-normal"}
    model = distilled(tmp_path / "edm.safetensors", path=path, distill={"objective": {"name": "sid"}})
    assert (model.description.path, model.description.predict) == ("ve", "edm")


# Files that lie about their size or content


def test_torch_archives_that_unpack_to_more_than_they_hold_are_refused(tmp_path):
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    torch.save(build(network).state_dict(), tmp_path / "c.pt")
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as sound,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in sound.infolist():
            bomb.writestr(entry.filename, sound.read(entry) if "data/" not in entry.filename else b"\0" * 2**24)
    assert (tmp_path / "z.pt").stat().st_size < 2**20
    with pytest.raises(UserError, match="compressed archive"):
        convert(tmp_path / "z.pt", tmp_path / "o.safetensors", network=network)
    # The central directory of a stored archive claims a terabyte for its first entry.
    content = bytearray((tmp_path / "c.pt").read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    (tmp_path / "b.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"declares 4,294,\d+,\d+ bytes of content and holds"):
        convert(tmp_path / "b.pt", tmp_path / "o.safetensors", network=network)


def test_safetensors_that_lie_about_their_size(tmp_path):
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    teachers.save(tmp_path / "t.safetensors", build(network).state_dict(), teachers.Description(network))
    content = (tmp_path / "t.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["first.weight"]["shape"] = [2**31, 2**31]
    lying = json.dumps(header).encode()
    for damaged in (
        content[:-10],
        content[: 8 + size // 2],
        struct.pack("<Q", 2**62) + content[8:],
        struct.pack("<Q", 2**40) + content[8:],
        struct.pack("<Q", len(lying)) + lying + content[8 + size :],
    ):
        (tmp_path / "d.safetensors").write_bytes(damaged)
        for read in (teachers.load_teacher, lambda f: convert(f, tmp_path / "o.safetensors", network=network)):
            with pytest.raises(UserError, match=r"no safetensors file, or a damaged one: .*[a-z]"):
                read(tmp_path / "d.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    state = build(network).state_dict()
    state["grow.0.weight"][0, 0] = value
    teachers.save(tmp_path / "t.safetensors", state, teachers.Description(network))
    torch.save(state, tmp_path / "c.pt")
    for read in (
        lambda: teachers.load_teacher(tmp_path / "t.safetensors"),
        lambda: teachers.load_teacher(tmp_path / "c.pt", network=network),
        lambda: convert(tmp_path / "c.pt", tmp_path / "o.safetensors", network=network),
    ):
        with pytest.raises(UserError, match=r"not finite, first in grow\.0\.weight"):
            read()
    assert load_file(str(tmp_path / "t.safetensors"))
