"""The published recipes: every number as published, and the networks that they describe."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from realuid_fast import cli, data, teachers
from realuid_fast.networks import build
from realuid_fast.train import config as configs
from realuid_fast.train.discriminator import softplus_term

# Of run.sh in the published code: alpha, beta, rate, batch.
PUBLISHED = {
    "cifar10": (0.92, 0.94, 3e-5, 256),
    "cifar10_cond": (0.98, 0.96, 3e-5, 256),
    "celeba64": (0.90, 0.88, 5e-6, 64),
    "cifar10_tune": (0.92, 0.86, 1e-5, 256),
    "cifar10_cond_tune": (0.94, 1.00, 1e-5, 256),
    "cifar10_gan": (1.0, 1.0, 3e-5, 256),
    "cifar10_cond_gan": (1.0, 1.0, 3e-5, 256),
    "celeba64_gan": (1.0, 1.0, 5e-6, 64),
}
# --gen_coef and --disc_coef.
GAN = {"cifar10_gan": (0.3, 1.0), "cifar10_cond_gan": (0.3, 1.0), "celeba64_gan": (1.0, 3.0)}


START = {"cifar10_tune": 0.999, "cifar10_cond_tune": 0.9999}
# Of src/models.py: every published network has it.
HEAD = {"cls_pred_branch.0.weight": torch.zeros(4, 4, 2, 2), "cls_pred_branch.6.bias": torch.zeros(1)}


def recipe(name):
    return configs.load(f"recipes/{name}")


def test_there_is_a_recipe_for_each_and_a_fast_one():
    assert set(configs.recipes()) == {*PUBLISHED, *(f"{name}_fast" for name in PUBLISHED), "fast"}
    assert all(title and title[0].isupper() for title in configs.recipes().values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    config = recipe(name)
    alpha, beta, rate, batch = PUBLISHED[name]
    settings, stage, celeba = config.distill, name.endswith("_tune"), name.startswith("celeba64")
    objective = settings.objective.build()
    assert (objective.alpha, objective.beta) == (alpha, beta)
    assert settings.objective.name == ("uid" if name in GAN else "realuid")
    assert bool(settings.gan.weight_fake) == (name in GAN)
    for step in (settings.generator, settings.fake):
        assert (step.lr, step.betas, step.clip, step.warmup) == (rate, (0.0, 0.999), 1.0, 1 if stage else 500)
    assert (settings.batch, settings.fake_turns, settings.t_start, settings.dropout) == (batch, 5, 0.0, 0.0)
    assert settings.ema == config.teacher.ema == (0.999, 0.9996, 0.9999)
    assert bool(settings.start) == stage
    # --finetune_ema, and the averages of the published students.
    assert settings.start_decay == START.get(name)
    assert settings.export == (0.9999 if "cond" in name or stage else 0.999)
    if stage:
        before = recipe(name.removesuffix("_tune")).distill
        assert before.export == settings.start_decay
        assert settings.start == f"runs/{name.removesuffix('_tune')}/best.safetensors"
    # An iteration of the published code is a turn, and an update is six of them.
    assert round(settings.updates * 6, -2) == (1_600_000 if celeba else 500_000)
    if stage:
        assert beta / alpha == pytest.approx(0.94 if name == "cifar10_tune" else 1.06, abs=0.006)
    teacher = config.teacher
    assert (teacher.batch, teacher.updates, teacher.reduction) == (256, 240_000 if celeba else 400_000, "mean")
    step = teacher.optimiser
    assert (step.lr, step.betas, step.clip, step.warmup) == (4e-5 if celeba else 2e-4, (0.9, 0.999), 1.0, 5000)
    # train_distil.py's --teacher_ema, which no run of run.sh changes: of a teacher made here and of a published one.
    assert teacher.export == settings.teacher_decay == 0.999
    assert config.data["flip"] is True
    # Turns between evaluations (--fid_step) of 50,000 samples (--num_gen), against all training images; of a teacher
    # updates. Nothing but Inception features will do.
    run, turns = config.run, 2000 if stage else 5000
    assert abs(run.evaluate_every * 6 - turns) <= 3
    assert (run.evaluate_samples, run.real_split, run.inception_only, run.inception) == (50_000, "train", True, "")
    assert teacher.evaluate_every == 20_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks(name):
    config = recipe(name)
    with torch.device("meta"):
        net = build(config.network)
    side = 64 if name.startswith("celeba64") else 32
    assert net.dim == (3, side, side)
    assert net.num_classes == (10 if "cond" in name else None)
    # As bench/step.py's, which is torchcfm's; classes add an embedding of ten rows.
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(35.75e6, rel=2e-3)
    assert config.network["dropout"] == 0.1
    # Heads of 64 channels.
    assert {m.heads for m in net.modules() if hasattr(m, "heads")} == {4}


@pytest.mark.parametrize("name", GAN)
def test_a_discriminator_weighs_as_much_as_the_published_one(name):
    """There ``coef * mean softplus`` of interpolants at times in [0.8, 1]; here of those rows that lie there."""
    gan, rows = recipe(name).distill.gan, 1000
    path = recipe(name).path.build()
    coef = path.coefficients((torch.arange(rows) + 0.5) / rows)
    logits = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    late = logits[coef[:, 0] >= 0.8]
    assert len(late) == 200
    for weight, published, sign in zip((gan.weight_generator, gan.weight_fake), GAN[name], (-1.0, 1.0), strict=True):
        value, _ = softplus_term(logits, torch.full((rows,), sign), coef, gan.least_share, rows)
        torch.testing.assert_close(weight * value, published * torch.nn.functional.softplus(sign * late).mean())


def test_celebas_images_are_packed_as_they_come(tmp_path):
    """By the command in the recipe's head: JPEG files of 64 pixels, every one to train on, none held out."""
    recipe_file = configs.CONFIGS / "recipes" / "celeba64.yaml"
    (line,) = [line for line in recipe_file.read_text().splitlines() if "realuid-fast pack" in line]
    pictures = []
    with zipfile.ZipFile(tmp_path / "cut_celeba_full.zip", "w") as archive:
        for i in range(5):
            stream = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "JPEG")
            archive.writestr(f"{i}.jpg", stream.getvalue())
            pictures.append(torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1))
    words = line.removeprefix("#   realuid-fast ").split()
    words = [str(tmp_path / word) if word in ("cut_celeba_full.zip", "data/celeba64") else word for word in words]
    (tmp_path / "data").mkdir()
    assert cli.main(words) == 0
    found = data.load({**recipe("celeba64").data, "path": str(tmp_path / "data" / "celeba64")})
    assert found.train[torch.arange(5)].tolist() == torch.stack(pictures).tolist()
    assert len(found.heldout) == 5
    assert found.flip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_average_of_a_published_teacher(name, tmp_path):
    """As ``train_teacher.py`` writes it: averages by decay in words, and a discriminator's head in each of them."""
    small = ["num_channels=8", "norm_groups=4", "num_head_channels=8", "channel_mult=[1]"]
    file = tmp_path / "published.pt"
    config = configs.load(f"recipes/{name}", [*(f"network.{word}" for word in small), f"distill.teacher={file}"])
    net = build(config.network)
    averages = {
        str(d): {**{key: torch.full_like(value, d) for key, value in net.state_dict().items()}, **HEAD}
        for d in config.teacher.ema
    }
    torch.save({"net_model": {**net.state_dict(), **HEAD}, "ema_models": averages, "step": 3}, file)
    state = teachers.load_teacher(file, config.teachers_network(), config.distill.teacher_decay).net.state_dict()
    assert all(bool((value == 0.999).all()) for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_fast_recipe_changes_no_hyper_parameter(name):
    plain, fast = configs.to_mapping(recipe(name)), configs.to_mapping(recipe(f"{name}_fast"))
    assert (fast["run"].pop("device"), fast["run"].pop("mode")) == ("cuda", "graphs")
    assert [fast["distill"].pop(f"{turn}_precision") for turn in ("fake", "generator")] == ["bf16", "fp16"]
    for turn in ("fake", "generator"):
        assert plain["distill"].pop(f"{turn}_precision") == "float32"
    del plain["run"]["device"], plain["run"]["mode"]
    assert plain == fast


def test_several_bases_lie_over_one_another(tmp_path):
    (tmp_path / "c.yaml").write_text("base: [recipes/cifar10, recipes/fast]\nrun: {mode: eager}\n")
    config = configs.load(tmp_path / "c.yaml")
    assert (config.run.device, config.run.mode, config.distill.batch) == ("cuda", "eager", 256)
    (tmp_path / "c.yaml").write_text("base: [3]\n")
    with pytest.raises(configs.UserError, match="base must be the name of a configuration, or several in a list"):
        configs.load(tmp_path / "c.yaml")
    with pytest.raises(configs.UserError, match=r"neither a file nor one of the shipped .*recipes/cifar10_cond"):
        configs.load("recipes/nothing")
