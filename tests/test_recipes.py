"""The published recipes: every number as published, and the networks that they describe."""

import io
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from realuid_fast import cli, data, teachers
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build
from realuid_fast.networks.discriminator import adversarial_term

# The paper's alpha, beta, rate and batch; those of celeba64_gan are run.sh's.
PUBLISHED = {
    "cifar10": (0.92, 0.94, 3e-5, 256),
    "cifar10_cond": (0.98, 0.96, 3e-5, 256),
    "celeba64": (0.88, 0.90, 5e-6, 64),
    "cifar10_tune": (0.92, 0.86, 1e-5, 256),
    "cifar10_cond_tune": (0.96, 0.92, 1e-5, 256),
    "cifar10_gan": (1.0, 1.0, 3e-5, 256),
    "cifar10_cond_gan": (1.0, 1.0, 3e-5, 256),
    "celeba64_gan": (1.0, 1.0, 5e-6, 64),
}
# Weights of the generator and the discriminator.
GAN = {"cifar10_gan": (0.3, 1.0), "cifar10_cond_gan": (0.3, 1.0), "celeba64_gan": (1.0, 3.0)}

START = {"cifar10_tune": 0.999, "cifar10_cond_tune": 0.9999}
# Of src/models.py: every published network has it.
HEAD = {"cls_pred_branch.0.weight": torch.zeros(4, 4, 2, 2), "cls_pred_branch.6.bias": torch.zeros(1)}

NETWORK = "train_distil.py, UNetModelWrapperWithHead"
D, CODE_AVERAGES = "paper, appendix D", [0.999, 0.9996, 0.9999]
TUNE = {
    "distill.fake_start": ("teacher", D),
    "distill.updates": (16667, "paper, appendix D: 100,000 turns; run.sh has the first stage's limit, 800,000"),
    "distill.generator.lr": (1e-5, D),
    "distill.generator.warmup": (0, "paper, appendix D: no warm-up; run.sh --warmup 1 is the same"),
    "distill.fake.lr": (1e-5, D),
    "distill.fake.warmup": (0, "paper, appendix D: no warm-up; run.sh --warmup 1 is the same"),
    "run.sample_every": (333, "run.sh --save_image_step, 2,000 turns"),
    "run.checkpoint_every": (333, "run.sh --save_model_step, 2,000 turns"),
    "run.evaluate_every": (333, "run.sh --fid_step, 2,000 turns"),
}
# Settings that each recipe's file makes itself, but for names of files: the value, and the source behind it there.
SOURCES = {
    "cifar10": {
        "data.flip": (True, "train_distil.py, RandomHorizontalFlip"),
        "network.kind": ("unet", NETWORK),
        "network.dim": ([3, 32, 32], NETWORK),
        "network.num_channels": (128, NETWORK),
        "network.num_res_blocks": (2, NETWORK),
        "network.channel_mult": ([1, 2, 2, 2], NETWORK),
        "network.num_heads": (4, NETWORK),
        "network.num_head_channels": (64, NETWORK),
        "network.attention_resolutions": ("16", NETWORK),
        "network.dropout": (0.1, "train_teacher.py --dropout"),
        "teacher.batch": (256, "run.sh --batch_size"),
        "teacher.updates": (400_000, "train_teacher.py --total_steps"),
        "teacher.reduction": ("mean", "train_teacher.py, the loss"),
        "teacher.optimiser.lr": (2e-4, "run.sh --lr"),
        "teacher.optimiser.betas": ([0.9, 0.999], "train_teacher.py, Adam's own"),
        "teacher.optimiser.clip": (1.0, "train_teacher.py --grad_clip"),
        "teacher.optimiser.warmup": (5000, "train_teacher.py --warmup"),
        "teacher.ema": (CODE_AVERAGES, "run.sh --ema_decays"),
        "teacher.evaluate_every": (20_000, "run.sh --fid_step"),
        "teacher.export": (0.999, "train_distil.py --teacher_ema"),
        "distill.teacher_decay": (0.999, "train_distil.py --teacher_ema"),
        "distill.objective.alpha": (0.92, "paper, table 1: distance 2.23"),
        "distill.objective.beta": (0.94, "paper, table 1: distance 2.23"),
        "distill.batch": (256, D),
        "distill.updates": (83_333, "paper, appendix D: 500,000 turns; run.sh's own limit is 800,000"),
        "distill.fake_turns": (5, D),
        "distill.t_start": (0.0, D),
        "distill.fake_start": ("fresh", "paper, appendix D.1: random weights, on purpose"),
        "distill.dropout": (0.0, D),
        "distill.generator.lr": (3e-5, D),
        "distill.generator.betas": ([0.0, 0.999], D),
        "distill.generator.clip": (1.0, D),
        "distill.generator.warmup": (500, D),
        "distill.fake.lr": (3e-5, D),
        "distill.fake.betas": ([0.0, 0.999], D),
        "distill.fake.clip": (1.0, D),
        "distill.fake.warmup": (500, D),
        "distill.ema": (CODE_AVERAGES, D),
        "distill.export": (0.999, D),
        "run.log_every": (50, "chosen"),
        "run.sample_every": (1000, "chosen; run.sh --save_image_step is 5,000 turns"),
        "run.checkpoint_every": (1000, "chosen; run.sh --save_model_step is 10,000 turns"),
        "run.evaluate_every": (833, "run.sh --fid_step, 5,000 turns"),
        "run.evaluate_samples": (50_000, D),
        "run.real_split": ("train", "src/eval.py"),
        "run.inception_only": (True, "chosen"),
    },
    "cifar10_cond": {
        "network.class_cond": (True, "run.sh --cond"),
        "network.num_classes": (10, "train_distil.py --num_classes"),
        "distill.objective.alpha": (0.98, "paper, table 1: distance 2.02"),
        "distill.objective.beta": (0.96, "paper, table 1: distance 2.02"),
        "distill.export": (0.9999, "run.sh --finetune_ema"),
    },
    "celeba64": {
        "data.flip": (True, "train_distil.py, RandomHorizontalFlip"),
        "network.dim": ([3, 64, 64], NETWORK),
        "teacher.updates": (240_000, "run.sh --teacher_ckpt_path, a file of step 239,999"),
        "teacher.optimiser.lr": (4e-5, "run.sh --lr"),
        "distill.objective.alpha": (0.88, "paper, tables 2 and 8: distance 0.89; run.sh has 0.90 and 0.88"),
        "distill.objective.beta": (0.90, "paper, tables 2 and 8: distance 0.89; run.sh has 0.90 and 0.88"),
        "distill.batch": (64, D),
        "distill.updates": (266_667, "paper, appendix D: 1,600,000 turns"),
        "distill.generator.lr": (5e-6, D),
        "distill.fake.lr": (5e-6, D),
        "distill.export": (0.999, D),
    },
    "cifar10_tune": {
        **TUNE,
        "distill.start_decay": (0.999, "run.sh --finetune_ema"),
        "distill.objective.alpha": (0.92, "paper, table 6: distance 1.98"),
        "distill.objective.beta": (0.86, "paper, table 6: distance 1.98"),
        "distill.export": (0.9999, "README of the published code"),
    },
    "cifar10_cond_tune": {
        **TUNE,
        "distill.start_decay": (0.9999, "run.sh --finetune_ema"),
        "distill.objective.alpha": (
            0.96,
            "paper, table 6: distance 1.87, the best of the table; run.sh has 0.94 and 1.00",
        ),
        "distill.objective.beta": (
            0.92,
            "paper, table 6: distance 1.87, the best of the table; run.sh has 0.94 and 1.00",
        ),
    },
    **{
        name: {
            # Five times the published ones: see the test of the discriminator's weight.
            "distill.gan.weight_generator": (5 * GAN[name][0], of_generator),
            "distill.gan.weight_fake": (5 * GAN[name][1], of_discriminator),
            "distill.gan.least_share": (0.8, D),
        }
        for name, of_generator, of_discriminator in (
            ("cifar10_gan", "paper, table 1: 0.3, distance 2.29", "paper, table 1: 1.0"),
            ("cifar10_cond_gan", "paper, table 1: 0.3, distance 2.12", "paper, table 1: 1.0"),
            ("celeba64_gan", "run.sh --gen_coef: 1.0", "run.sh --disc_coef: 3.0"),
        )
    },
}
CODE, LOOP = "training/sid_loss.py", "training/sid_training_loop.py"
STEP = "run_sid.sh --{}; sid_train.py has the betas and no clip"
KARRAS, AVERAGE = "run_sid.sh --tmax", "sid_train.py --ema, a half-life of 500,000 images"
SOURCES["cifar10_sid"] = {
    "network.kind": ("song-unet", "sid_train.py --arch ddpmpp"),
    "network.dim": ([3, 32, 32], "the published teacher"),
    "network.model_channels": (128, "sid_train.py --arch ddpmpp"),
    "network.channel_mult": ([2, 2, 2], "sid_train.py --arch ddpmpp"),
    "network.dropout": (0.13, "sid_train.py --dropout"),
    "network.augment_dim": (9, "sid_train.py --augment"),
    "path.name": ("ve", CODE),
    "path.settings.sigma_data": (0.5, CODE),
    "path.predict": ("edm", "sid_train.py --precond"),
    "path.match": ("x0", CODE),
    "path.sampler": ("log-normal", CODE),
    "path.sampler_settings.mean": (-1.2, CODE),
    "path.sampler_settings.std": (1.2, CODE),
    "path.fake.weight": ("edm", CODE),
    "path.generator.sampler": ("karras", KARRAS),
    "path.generator.sampler_settings.sigma_min": (0.002, KARRAS),
    "path.generator.sampler_settings.sigma_max": (80.0, KARRAS),
    "path.generator.sampler_settings.rho": (7.0, KARRAS),
    "path.generator.sampler_settings.share": (0.8, KARRAS),
    "distill.objective.alpha_sid": (1.2, "run_sid.sh --alpha"),
    "distill.batch": (256, "run_sid.sh --batch"),
    "distill.updates": (500_000_000 // 256, "run_sid.sh --duration"),
    "distill.fake_turns": (1, LOOP),
    "distill.t_start": (2.5, "run_sid.sh --init_sigma"),
    "distill.fake_start": ("teacher", LOOP),
    **{
        f"distill.{net}.{key}": (value, STEP.format(rate))
        for net, rate in (("generator", "glr"), ("fake", "lr"))
        for key, value in (("lr", 1e-5), ("betas", [0.0, 0.999]), ("clip", 0.0))
    },
    "distill.ema": ([round(0.5 ** (256 / 500_000), 6)], AVERAGE),
    "distill.export": (round(0.5 ** (256 / 500_000), 6), AVERAGE),
    "run.log_every": (50, "chosen"),
    "run.sample_every": (1953, "run_sid.sh --tick and --snap"),
    "run.checkpoint_every": (1953, "chosen; run_sid.sh --dump"),
    "run.evaluate_every": (1953, "run_sid.sh --tick and --snap"),
    "run.evaluate_samples": (50_000, "run_sid.sh --metrics"),
    "run.real_split": ("train", "run_sid.sh --data_stat"),
    "run.inception_only": (True, "chosen"),
}
NAMES = {"base", "data.name", "data.path", "distill.teacher", "distill.start", "distill.objective.name"}


def recipe(name):
    return configs.load(f"recipes/{name}")


def test_there_is_a_recipe_for_each_and_a_fast_one():
    assert set(configs.recipes()) == {*SOURCES, *(f"{name}_fast" for name in PUBLISHED), "fast"}
    assert all(title and title[0].isupper() for title in configs.recipes().values())


def leaves(node, prefix=""):
    """Every key of a YAML document that holds no further ones, with its value's node."""
    for key, value in node.value:
        name = prefix + key.value
        if isinstance(value, yaml.MappingNode):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


@pytest.mark.parametrize("name", SOURCES)
def test_every_value_has_its_source_beside_it(name):
    text = (configs.CONFIGS / "recipes" / f"{name}.yaml").read_text()
    lines, content, config = text.splitlines(), yaml.safe_load(text), configs.to_mapping(recipe(name))
    found = {key: value for key, value in leaves(yaml.compose(text)) if key not in NAMES}
    assert set(found) == set(SOURCES[name])
    for key, (expected, source) in SOURCES[name].items():
        given, resolved = content, config
        for part in key.split("."):
            given, resolved = given[part], resolved[part]
        assert given == resolved == expected, key
        _, _, comment = lines[found[key].start_mark.line].partition("  # ")
        assert comment.startswith(source), key


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar10_cond_fast", "cifar10_gan", "cifar10_tune", "cifar10_cond_tune_fast"]
)
def test_the_fake_model_starts_untrained_in_the_first_stage_and_at_the_teacher_in_the_second(name, tmp_path):
    """On the U-Net of the recipe, made narrow; the paper's appendix D.1 has the first on purpose."""
    small = ["num_channels=8", "norm_groups=4", "num_head_channels=8", "channel_mult=[1, 1]", "num_res_blocks=1"]
    changes = ["distill.start=''", "distill.batch=2", "run.device=cpu", "run.mode=eager"]
    changes += [f"distill.{turn}_precision=float32" for turn in ("fake", "generator")]
    asked = configs.load(f"recipes/{name}", [*(f"network.{word}" for word in small), *changes])
    net = build({**asked.network, "dim": [1, 8, 8]})
    for p in net.parameters():
        torch.nn.init.normal_(p)
    held = data.load("digits")
    described = teachers.Description({**asked.network, "dim": [1, 8, 8]}, data=held.config)
    trainer = trainers.distiller(asked, held, teachers.Model(net, described))
    same = [torch.equal(p, q) for p, q in zip(trainer.fake.parameters(), net.parameters(), strict=True)]
    if "tune" in name:
        assert all(same)
    else:
        # An untrained U-Net returns zero.
        assert not any(p.any() for p in trainer.fake.out[-1].parameters())
        assert not any(same)
    assert all(map(torch.equal, trainer.generator.net.parameters(), net.parameters()))


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
        assert (step.lr, step.betas, step.clip, step.warmup) == (rate, (0.0, 0.999), 1.0, 0 if stage else 500)
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
    # The paper counts turns, and an update is six of them.
    assert round(settings.updates * 6, -2) == (1_600_000 if celeba else 100_000 if stage else 500_000)
    assert settings.fake_start == ("teacher" if stage else "fresh")
    if stage:
        assert beta / alpha == pytest.approx(0.94 if name == "cifar10_tune" else 0.96, abs=0.006)
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
        value, _ = adversarial_term(logits, torch.full((rows,), sign), coef, gan.least_share, rows)
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
    assert (fast["run"].pop("evaluate_precision"), plain["run"].pop("evaluate_precision")) == ("fp16", "float32")
    del plain["run"]["device"], plain["run"]["mode"]
    assert plain == fast


def test_the_preset_edm_says_that_it_is_not_sid_as_published():
    """The published fake and generator turns have a law of noise levels and a weight each; sid-edm has them."""
    head = configs.presets()["edm"]
    assert "as published" not in head
    assert "one law of noise levels for both turns" in head
    text = (configs.CONFIGS / "presets" / "edm.yaml").read_text()
    assert "This is not SiD as published" in text


def test_the_recipe_of_sid_has_the_published_teachers_network():
    """CIFAR-10's DDPM++ of 55.7 million parameters."""
    with torch.device("meta"):
        net = build(recipe("cifar10_sid").network)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(55.73e6, rel=1e-4)


def test_several_bases_lie_over_one_another(tmp_path):
    (tmp_path / "c.yaml").write_text("base: [recipes/cifar10, recipes/fast]\nrun: {mode: eager}\n")
    config = configs.load(tmp_path / "c.yaml")
    assert (config.run.device, config.run.mode, config.distill.batch) == ("cuda", "eager", 256)
    (tmp_path / "c.yaml").write_text("base: [3]\n")
    with pytest.raises(configs.UserError, match="base must be the name of a configuration, or several in a list"):
        configs.load(tmp_path / "c.yaml")
    with pytest.raises(configs.UserError, match=r"neither a file nor one of the shipped .*recipes/cifar10_cond"):
        configs.load("recipes/nothing")
