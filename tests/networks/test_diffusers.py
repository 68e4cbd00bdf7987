"""diffusers' models as teachers: outputs of the converted file, schedulers as paths, and what is refused."""

import copy
import json

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast import data, networks, paths, sampling, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.models.convert import convert, diffusers_folder
from realuid_fast.networks import build
from realuid_fast.networks import diffusers as adapter
from realuid_fast.networks.discriminator import Judged
from realuid_fast.networks.unet import timestep_embedding

from ..helpers import random_network

diffusers = pytest.importorskip("diffusers")

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
UNET |= {"layers_per_block": 1, "attention_head_dim": 4}
PLAIN = UNET | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CONDITION = UNET | {
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "mid_block_type": None,
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 2, "sample_size": 8}
DIT |= {"patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 1}
MODELS = {
    "unet": ("UNet2DModel", PLAIN),
    "unet, labels": ("UNet2DModel", PLAIN | {"num_class_embeds": 10}),
    "unet, variance": ("UNet2DModel", PLAIN | {"out_channels": 2}),
    "conditional unet, labels": ("UNet2DConditionModel", CONDITION | {"num_class_embeds": 10}),
    "transformer": ("DiTTransformer2DModel", DIT),
    "transformer, variance": ("DiTTransformer2DModel", DIT | {"out_channels": 2}),
}


def pipeline(folder, model="unet", scheduler=None, **settings):
    """A pipeline's folder with a random model; the model."""
    name, config = MODELS[model]
    torch.manual_seed(0)
    made = getattr(diffusers, name)(**config).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder / ("transformer" if "DiT" in name else "unet"))
    getattr(diffusers, scheduler or "DDPMScheduler")(**settings).save_pretrained(folder / "scheduler")
    return made


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_models_own(name, tmp_path):
    made = pipeline(tmp_path, name)
    convert(tmp_path, tmp_path / "out.safetensors")
    net = teachers.load_teacher(tmp_path / "out.safetensors").net
    t, x = torch.tensor([0.0, 421.0, 999.0]), torch.randn(3, 1, 8, 8)
    y = torch.tensor([0, 9, 4]) if net.num_classes else None
    assert (y is not None) == ("labels" in name or "transformer" in name)
    words = {"encoder_hidden_states": None} if MODELS[name][0] == "UNet2DConditionModel" else {}
    with torch.no_grad():
        expected = made(x, timestep=t, **words, **({} if y is None else {"class_labels": y})).sample[:, :1]
        assert torch.equal(net(t, x, y), expected)
        assert torch.equal(net(t[1], x, y), net(t[1].expand(3), x, y))
        # No label is dropped at random, in training neither: a student is compared with a frozen copy of itself.
        assert torch.equal(net.train()(t, x, y), net(t, x, y))
    if "transformer" in name:
        assert net.null_label == 10
        null = torch.full((3,), 10)
        forced = made.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
        assert len(forced) == 11
        assert not torch.allclose(net(t, x, null), net(t, x, y))


def test_the_last_class_may_stand_for_none(tmp_path):
    pipeline(tmp_path, "unet, labels")
    net = convert(tmp_path, tmp_path / "out.safetensors", network={"null_label": True}).net
    assert (net.num_classes, net.null_label) == (9, 9)


SCHEDULERS = {
    "linear": ("DDPMScheduler", {}, "noise"),
    "scaled_linear": ("DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_end": 0.012}, "noise"),
    "cosine": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, "x0"),
    "v": ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}, "v"),
    "few steps": ("DDPMScheduler", {"num_train_timesteps": 50}, "noise"),
    "own betas": ("DDPMScheduler", {"trained_betas": np.linspace(0.01, 0.2, 30)}, "noise"),
    "no signal at the end": ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "v"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_denoising_schedules_are_the_schedulers_own(name, tmp_path):
    kind, settings, predict = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.save_pretrained(tmp_path)
    path_name, path_settings, found = diffusers_folder._path(
        json.loads((tmp_path / "scheduler_config.json").read_text())
    )
    path = paths.build(path_name, path_settings)
    assert found == predict
    table = scheduler.alphas_cumprod.double()
    k = torch.arange(len(table), dtype=torch.float64)
    a, c = path.scales(k / (len(table) - 1))
    # Theirs is a product of up to 1000 numbers in float32. The last step without signal is zero there, rounded up here.
    torch.testing.assert_close(a**2, table, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(path.network_time(k / (len(table) - 1)), k)
    x, n = torch.randn(2, 3, 4, dtype=torch.float64)
    at = torch.tensor([1, len(table) // 2, len(table) - 2])
    added = diffusers.DDPMScheduler(**settings) if kind == "EulerDiscreteScheduler" else scheduler
    ours = a[at, None] * x + c[at, None] * n
    torch.testing.assert_close(ours, added.add_noise(x, n, at), rtol=1e-3, atol=1e-4)
    # From the exact prediction the scheduler computes the data.
    exact = {"noise": n, "x0": x, "v": a[at, None] * n - c[at, None] * x}[predict]
    k_out, k_x = path.coefficients(k[at] / (len(table) - 1), "x0", predict)[:, 6:8, None].unbind(1)
    torch.testing.assert_close(k_out * exact + k_x * ours, x, rtol=1e-6, atol=1e-6)


def test_flows_run_backwards_with_a_thousand_times_their_time(tmp_path):
    made = pipeline(tmp_path, scheduler="FlowMatchEulerDiscreteScheduler", shift=3.0)
    described = convert(tmp_path, tmp_path / "out.safetensors").description
    path = described.interpolant()
    assert (path, described.predict) == (paths.Linear(data_at=0, shift=3.0), "velocity")
    # The scheduler's own step is an Euler step of ours between its noise levels.
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x, t = torch.randn(2, 1, 8, 8), scheduler.timesteps[1]
    scheduler._step_index, (now, then) = 1, scheduler.sigmas[1:3]
    with torch.no_grad():
        stepped = scheduler.step(made(x, t.expand(2)).sample, t, x).prev_sample
        net = teachers.load_teacher(tmp_path / "out.safetensors").net
        out = sampling.call(net, now.expand(2), x, None, path, "velocity")
    torch.testing.assert_close(x + (then - now) * out, stepped, rtol=1e-5, atol=1e-5)
    hundred = pipeline(tmp_path, scheduler="FlowMatchEulerDiscreteScheduler", num_train_timesteps=100)
    assert hundred is not None
    described = convert(tmp_path, tmp_path / "out.safetensors").description
    assert described.interpolant().network_time(torch.tensor([0.5])).item() == 50.0


@pytest.mark.parametrize(
    ("kind", "settings", "shift"),
    [("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 3.0), ("FlowMatchEulerDiscreteScheduler", {}, 1.0),
     ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"},
      5.0)],
)  # fmt: skip
def test_sampling_takes_the_flow_schedulers_shifted_steps(kind, settings, shift, tmp_path):
    """Euler's steps of diffusers' own scheduler from equal steps of noise, which it shifts."""
    made = pipeline(tmp_path, scheduler=kind, **settings)
    model = convert(tmp_path, tmp_path / "out.safetensors")
    path, x = model.description.interpolant(), torch.randn(2, 1, 8, 8)
    assert path.shift == shift
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    assert shift == 1 or scheduler.sigmas[1] > 0.9
    expected = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(made(expected, t.expand(2)).sample, t, expected).prev_sample
    found = sampling.integrate(model.net, x, 5, path=path, predict=model.description.predict)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_shift_by_the_images_size_is_left_out_with_a_word(tmp_path):
    pipeline(tmp_path, scheduler="FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True)
    with pytest.warns(UserWarning, match="FlowMatchEulerDiscreteScheduler has a shift by the image's size: it is left"):
        described = convert(tmp_path, tmp_path / "out.safetensors").description
    assert described.interpolant() == paths.Linear(data_at=0)


def test_ddim_is_the_schedulers_own(tmp_path):
    """Nine steps of 111 of a thousand, from step 999 to step 0, which both grids have."""
    made = pipeline(tmp_path, scheduler="DDIMScheduler", clip_sample=False)
    model = convert(tmp_path, tmp_path / "out.safetensors")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(9)
    x = torch.randn(2, 1, 8, 8)
    path, expected = model.description.interpolant(), x * (1 - scheduler.alphas_cumprod[-1]) ** 0.5
    with torch.no_grad():
        for t in range(999, 0, -111):
            expected = scheduler.step(made(expected, torch.full((2,), t)).sample, t, expected).prev_sample
    found = sampling.integrate(model.net, x, 9, "ddim", path=path, predict=model.description.predict)
    # The scheduler's table is a product of a thousand numbers in float32.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


@pytest.mark.parametrize("predicted", ["epsilon", "v_prediction"])
def test_edm_schedulers_are_the_preconditioning_of_the_path(predicted, tmp_path):
    made = pipeline(tmp_path, scheduler="EDMEulerScheduler", prediction_type=predicted, sigma_max=60.0)
    model = convert(tmp_path, tmp_path / "out.safetensors")
    path, scheduler = model.description.interpolant(), diffusers.EDMEulerScheduler(prediction_type=predicted)
    assert path == paths.VE(sigma_max=60.0)
    sigma, x = torch.tensor([3.0]), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        raw = made(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
        expected = scheduler.precondition_outputs(x, raw, sigma)
        out = sampling.call(model.net, sigma, x, None, path, "edm")
    k_out, k_x = path.coefficients(sigma, "x0", "edm")[0, 6:8]
    torch.testing.assert_close(k_out * out + k_x * x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "flow"), [("unet, labels", False), ("transformer", True)])
def test_a_student_is_distilled_from_a_converted_model(name, flow, tmp_path):
    settings = {} if flow else {"prediction_type": "v_prediction"}
    pipeline(tmp_path, name, "FlowMatchEulerDiscreteScheduler" if flow else "DDPMScheduler", **settings)
    file = tmp_path / "teacher.safetensors"
    convert(tmp_path, file, data={"name": "digits"})
    content = {"distill": {"teacher": str(file), "batch": 4, "updates": 1, "fake_turns": 1}}
    trainer = trainers.distiller(
        configs.from_mapping(content), data.load({"name": "digits"}), teachers.load_teacher(file)
    )
    trainer.update()
    found = trainer.meters.read()
    assert all(np.isfinite(value) for key, value in found.items() if "%" not in key), found
    teachers.save(tmp_path / "student.safetensors", *trainer.exported())
    student = teachers.load(tmp_path / "student.safetensors", role="student")
    assert student.description.path == ("linear" if flow else "vp-discrete")
    samples = sampling.integrate(
        teachers.load_teacher(file).net, torch.randn(2, 1, 8, 8), 3, labels=torch.tensor([1, 2]),
        path=student.description.interpolant(), predict=student.description.predict,
    )  # fmt: skip
    assert torch.isfinite(samples).all()


@pytest.mark.parametrize("name", ["unet", "conditional unet, labels", "transformer"])
def test_a_guidance_scale_is_a_shift_of_the_timesteps_embedding(name):
    """A network starts as the published one at every scale; then a scale acts as another bias of the embedding."""
    class_name, config = MODELS[name]
    network = {"kind": "diffusers", "class_name": class_name, "config": config, "dim": [1, 8, 8]}
    plain, net = random_network(network).eval(), build({**network, "guided": True}).eval()
    told = net.load_state_dict(plain.state_dict(), strict=False)
    assert told.missing_keys == [f"scale_embed.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    t, x = torch.tensor([40.0, 700.0]), torch.randn(2, 1, 8, 8)
    y = None if name == "unet" else torch.tensor([1, 3])
    assert torch.equal(net(t, x, y, guidance=3.0), plain(t, x, y))
    last = net.scale_embed[2].weight
    last.data.copy_(0.1 * torch.randn(last.shape, generator=torch.Generator().manual_seed(0)))
    # A copy tells its own layers.
    net = copy.deepcopy(net)
    both = net(t, x, y, guidance=torch.tensor([1.0, 3.0]))
    for row, scale in enumerate((1.0, 3.0)):
        moved = copy.deepcopy(plain)
        for embedder in moved._embedders():
            embedder.linear_2.bias.data += net.scale_embed(timestep_embedding(torch.tensor([scale]), 256))[0]
        wanted = moved(t, x, y)
        assert not torch.allclose(wanted, plain(t, x, y), rtol=1e-3)
        # The bias is added before and not after a product's rounding to float32.
        torch.testing.assert_close(net(t, x, y, guidance=scale), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[row], wanted[row], rtol=1e-4, atol=1e-5)
    if name == "transformer":
        # Its first embedding is asked twice: for the first block, and for the last layer.
        assert torch.equal(torch.compile(net, backend="eager")(t, x, y, guidance=3.0), net(t, x, y, guidance=3.0))


@pytest.mark.parametrize("name", ["unet, labels", "transformer"])
def test_a_student_of_several_numbers_of_steps_from_a_converted_model(name, tmp_path):
    """SFD-v: the network is told the number of its steps, in training, in its file and in samples."""
    pipeline(tmp_path, name, "FlowMatchEulerDiscreteScheduler")
    file = tmp_path / "teacher.safetensors"
    convert(tmp_path, file, data={"name": "digits"})
    few = {"objective": {"name": "regression"}, "steps": [2, 3], "regression": {"steps": 2}, "t_start": None}
    content = {"distill": {"teacher": str(file), "batch": 4, "updates": 4, **few}}
    trainer = trainers.regression(
        configs.from_mapping(content), data.load({"name": "digits"}), teachers.load_teacher(file)
    )
    for _ in range(4):
        trainer.update()
    teachers.save(tmp_path / "student.safetensors", *trainer.exported())
    student, z, y = rf.load(tmp_path / "student.safetensors"), torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert student.description.network["guided"]
    of_number = student.net.scale_embed[2].weight
    assert float(of_number.abs().max()) > 0
    two = student(z, y, steps=2)
    assert not torch.allclose(two, student(z, y, steps=3))
    # Without the layers of the number, two steps are others.
    of_number.zero_()
    assert not torch.equal(two, student(z, y, steps=2))


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_a_discriminator_reads_the_middle_block(name):
    """The head sees what the block returns, with the same output, in copies and compiled networks too."""
    class_name, config = MODELS[name]
    network = {"kind": "diffusers", "class_name": class_name, "config": config, "dim": [1, 8, 8]}
    net = random_network(network)
    judged = Judged(net, (1, 8, 8), seed=0)
    t, x, y = torch.rand(3), torch.randn(3, 1, 8, 8), torch.arange(3) if net.num_classes else None
    seen = []
    block = net.net.mid_block if name == "unet" else net.net.transformer_blocks[0]
    block.register_forward_hook(lambda _, given, out: seen.append(out))
    out, logits = judged(t, x, y)
    assert torch.equal(out, net(t, x, y))
    features = seen[0] if name == "unet" else seen[0].transpose(1, 2).reshape(3, 16, 4, 4)
    assert torch.equal(logits, judged.head(features))
    assert torch.equal(copy.deepcopy(judged)(t, x, y)[1], logits)
    if name == "transformer":  # which compiles faster
        compiled = torch.compile(judged, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(t, x, y)[1], logits)
    (g,) = torch.autograd.grad(logits.sum(), next(block.parameters()))
    assert g.abs().max() > 0


def test_a_network_without_a_middle_block_has_no_head():
    class_name, config = MODELS["conditional unet, labels"]
    net = build({"kind": "diffusers", "class_name": class_name, "config": config, "dim": [1, 8, 8]})
    with pytest.raises(UserError, match=r"distill.gan reads a U-Net's middle block, and this one has none"):
        Judged(net, (1, 8, 8), seed=0)


def edited(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_models_of_the_first_releases(tmp_path):
    """Their attention layers and their transformer had other names, and they list unset keys of other classes."""
    from safetensors.torch import load_file, save_file

    made = pipeline(tmp_path)
    file = tmp_path / "unet" / diffusers_folder.WEIGHTS
    state, old = load_file(str(file)), {}
    for key, value in state.items():
        for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{now}.", f".{before}.")
        old[key] = value
    assert old.keys() != state.keys()
    save_file(old, str(file))
    edited(tmp_path / "unet" / "config.json", only_cross_attention=False, num_vector_embeds=None)
    net = convert(tmp_path, tmp_path / "out.safetensors").net
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3.0])
    assert torch.equal(net(t, x), made(x, t).sample)
    pipeline(tmp_path / "dit", "transformer")
    edited(tmp_path / "dit" / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    assert convert(tmp_path / "dit", tmp_path / "dit.safetensors").net.num_classes == 10


def test_weights_in_several_files(tmp_path):
    made = pipeline(tmp_path)
    made.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    (tmp_path / "unet" / diffusers_folder.WEIGHTS).unlink()
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    net = convert(tmp_path, tmp_path / "out.safetensors").net
    assert torch.equal(net.net.conv_in.weight, made.conv_in.weight)
    index = tmp_path / "unet" / f"{diffusers_folder.WEIGHTS}.index.json"
    edited(index, weight_map={"conv_in.weight": "../elsewhere.safetensors"})
    with pytest.raises(UserError, match="no map from weights to files beside it"):
        convert(tmp_path, tmp_path / "out.safetensors")


def test_what_cannot_be_converted_is_said(tmp_path):
    pipeline(tmp_path)
    out, config, scheduler = tmp_path / "out.safetensors", tmp_path / "unet" / "config.json", tmp_path / "scheduler"
    scheduler = scheduler / "scheduler_config.json"
    sound = {file: file.read_text() for file in (config, scheduler)}

    def refused(sentence, file, **changes):
        edited(file, **changes)
        with pytest.raises(UserError, match=sentence):
            convert(tmp_path, out)
        assert not out.exists()
        for place, text in sound.items():
            place.write_text(text)

    refused("holds a AutoencoderKL, which is none of", config, _class_name="AutoencoderKL")
    refused("does not say sample_size", config, sample_size=None)
    refused("UNet2DModel has no setting cross_attention_dim", config, cross_attention_dim=8)
    refused("does not fit the network: missing", config, layers_per_block=2)
    refused("refuses its configuration", config, block_out_channels=[8])
    refused("class_embed_type must be null", config, class_embed_type="timestep")
    refused("prediction_type 'other', which is not supported", scheduler, prediction_type="other")
    refused("schedule must be one of", scheduler, beta_schedule="sigmoid")
    refused("timestep_type 'continuous'", scheduler, timestep_type="continuous")
    refused("has a value that is not a number", scheduler, beta_end="high")
    scheduler.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        convert(tmp_path, out)
    scheduler.unlink()
    with pytest.raises(UserError, match="has no scheduler: say the path and the prediction"):
        convert(tmp_path, out)
    model = convert(tmp_path / "unet", out, path="linear", predict="velocity")
    assert model.description.interpolant() == paths.Linear()
    (tmp_path / "unet" / diffusers_folder.WEIGHTS).rename(tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors: there is config"):
        convert(tmp_path, out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_name": "StableDiffusionPipeline"}, "class_name must be one of"),
        ({"dim": [1, 8]}, "dim must be"),
        ({"dim": [3, 8, 8]}, "takes 1"),
        ({"config": [1]}, "config must be a mapping"),
        ({"null_label": True}, "null_label needs"),
        ({"class_name": "UNet2DConditionModel", "config": {}}, "conditioned on text"),
        ({"class_name": "DiTTransformer2DModel", "config": DIT | {"num_embeds_ada_norm": None}}, "number of classes"),
    ],
)
def test_settings_are_refused_in_a_sentence(change, words):
    with pytest.raises(UserError, match=words):
        networks.build({"kind": "diffusers", "class_name": "UNet2DModel", "config": PLAIN, "dim": [1, 8, 8], **change})


def test_without_diffusers_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'realuid-fast\[diffusers\]'"):
        adapter.Diffusers("UNet2DModel", PLAIN, (1, 8, 8))
