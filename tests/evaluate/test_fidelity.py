"""Inception distances end to end: what is streamed, kept, cached and said; the features' own tests are beside."""

import json
import types

import pytest
import torch

from realuid_fast import cli, data, metrics, teachers
from realuid_fast.cli import models
from realuid_fast.errors import UserError
from realuid_fast.evaluate import fidelity
from realuid_fast.evaluate.fidelity import Fidelity
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.evaluate.table import sampler
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.jobs import trainers
from realuid_fast.jobs.train import train
from realuid_fast.networks import build
from realuid_fast.train.logging import read_csv

from ..data.test_packed import write
from .test_inception import installed, random_weights

SHAPE = (3, 8, 8)
NETWORK = {"kind": "mlp", "shape": list(SHAPE), "width": 8, "depth": 1, "num_classes": 3}


class Means:
    """In the place of the Inception network: six means of an image; counts what it has seen."""

    device, sha256 = torch.device("cpu"), "0" * 64

    def __init__(self, **changed):
        self.seen, self._changed = 0, changed

    def __call__(self, images):
        self.seen += len(images)
        images = data.to_float(images) if images.dtype == torch.uint8 else images
        return torch.cat([images.mean((2, 3)), images[:, :, :4].square().mean((2, 3))], dim=1)

    def protocol(self):
        return {"weights": "means.pth", "weights_sha256": self.sha256, "resize": "none", **self._changed}


@pytest.fixture
def dataset(tmp_path):
    write(tmp_path / "packed", train=60, heldout=30)
    return data.load({"name": "packed", "path": str(tmp_path / "packed")})


UNCONDITIONAL = types.SimpleNamespace(num_classes=0)


def noisy(z, labels=None):
    return (0.5 * z).clamp(-1, 1)


def test_scores_are_those_of_all_samples_at_once(dataset, monkeypatch):
    # All of the 20 that are kept would leave the standard error unknown.
    monkeypatch.setattr(fidelity, "SUBSET_SIZE", 15)
    images, made = dataset.pixels("train"), []

    def sample(z):
        made.append(noisy(z))
        return made[-1]

    extract = Means()
    found = Fidelity(dataset, extract, keep=20, batch=7, cache=None)(sample, UNCONDITIONAL, 45)
    assert [len(part) for part in made] == [7] * 6 + [3]
    generated, real = extract(torch.cat(made)), extract(images)
    assert found.frechet == pytest.approx(metrics.frechet_distance(generated, real), rel=1e-6)
    kept = torch.arange(20) * 60 // 20
    kernel = metrics.kernel_distance(generated[:20], real[kept], fidelity.SUBSETS, 15)
    assert (found.kernel, found.kernel_error) == pytest.approx(kernel, rel=1e-4)
    assert (found.precision, found.recall) == metrics.precision_recall(real[kept], generated[:20])


def test_real_images_are_at_no_distance_of_themselves(dataset):
    judge = Fidelity(dataset, Means(), cache=None)
    found = judge.scores(judge.real)
    assert found.frechet == pytest.approx(0, abs=1e-10)
    assert (found.precision, found.recall) == (1.0, 1.0)


def test_a_seed_draws_the_same_and_another_does_not(dataset):
    judge = Fidelity(dataset, Means(), cache=None)
    one, two, other = (judge(noisy, UNCONDITIONAL, 30, seed) for seed in (0, 0, 1))
    assert one == two
    assert one.frechet != other.frechet


def test_labels_are_the_datas_or_even(dataset):
    dataset.train_labels = torch.tensor([0] * 45 + [2] * 15)
    net, seen = types.SimpleNamespace(num_classes=3), []

    def sample(z, labels):
        seen.append(labels)
        return noisy(z)

    Fidelity(dataset, Means(), labels="balanced", cache=None, batch=100)(sample, net, 300)
    assert torch.cat(seen).bincount(minlength=3).tolist() == [100, 100, 100]
    assert torch.cat(seen)[:4].tolist() == [0, 1, 2, 0]
    seen.clear()
    Fidelity(dataset, Means(), cache=None)(sample, net, 400)
    zeros, ones, twos = torch.cat(seen).bincount(minlength=3).tolist()
    assert ones == 0
    # 300 of 400 expected, with a standard deviation of 8.7.
    assert abs(zeros - 300) < 40
    assert twos == 400 - zeros
    dataset.train_labels = None
    with pytest.raises(UserError, match="the data set has no labels: give labels balanced"):
        Fidelity(dataset, Means(), cache=None)(sample, net, 4)


def test_real_statistics_are_cached_by_data_and_protocol(dataset, tmp_path):
    cache = tmp_path / "cache"

    def seen(dataset=dataset, extract=None, **settings):
        """Real images that the network had to look at."""
        extract = extract or Means()
        judge = Fidelity(dataset, extract, cache=cache, **settings)
        again = Fidelity(dataset, Means(), cache=None, **settings).real
        if extract._changed == {}:
            torch.testing.assert_close(judge.real.covariance, again.covariance, rtol=1e-12, atol=1e-12)
            assert torch.equal(judge.real.features, again.features)
            assert judge.real.count == again.count
        return extract.seen

    assert seen() == 60
    assert seen() == 0
    assert seen(extract=Means(weights="renamed.pth")) == 0
    assert seen(labels="balanced", batch=11) == 0
    assert seen(extract=Means(weights_sha256="1" * 64)) == 60
    assert seen(extract=Means(resize="today's")) == 60
    assert seen(split="heldout") == 30
    assert seen(keep=50) == 60
    write(tmp_path / "packed", train=60, heldout=30, seed=1)
    assert seen(data.packed(tmp_path / "packed")) == 60
    memory = data.Dataset("memory", dataset.pixels(), dataset.pixels("heldout"))
    assert seen(memory) == 60
    assert seen(memory) == 0
    files = list(cache.iterdir())
    assert len(files) == 7
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="is damaged .* its statistics are computed again"):
        assert seen() == 60
    assert seen() == 0


def test_a_cache_that_cannot_be_written_is_a_warning(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written .* nothing is cached"):
        Fidelity(dataset, Means(), cache=tmp_path / "file" / "cache")


def test_samples_without_a_number_are_an_error(dataset):
    judge = Fidelity(dataset, Means(), cache=None)
    with pytest.raises(UserError, match="features of the generated images are not finite"):
        judge(lambda z: z / 0, UNCONDITIONAL, 10)


def test_a_run_is_judged_by_its_average_without_a_copy(dataset, tmp_path):
    torch.manual_seed(0)
    teachers.save(tmp_path / "teacher.safetensors", build(NETWORK).state_dict(), teachers.Description(NETWORK))
    settings = {"teacher": str(tmp_path / "teacher.safetensors"), "batch": 4, "ema": [0.5], "export": 0.5}
    config = configs.from_mapping({"distill": settings})
    trainer = trainers.distiller(config, dataset, teachers.load(tmp_path / "teacher.safetensors"))
    judge = Fidelity(dataset, Means(), cache=None)
    averages, seen = trainer.generator_optimiser.ema[0.5], []

    def addresses(net, *_):
        seen.append({name: value.data_ptr() for name, value in net.state_dict().items()})

    # The result holds for any network of this kind that makes the samples.
    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda net, _: addresses(net) if type(net) is type(trainer.network) else None
    ):
        before = judge(trainer.sample, trainer.network, 20)
    assert seen == [{name: value.data_ptr() for name, value in averages.items()}]
    for average in averages.values():
        average.add_(0.5)
    # What was changed is the average itself, and nothing had to be told.
    assert judge(trainer.sample, trainer.network, 20) != before


def test_the_rows_of_teacher_and_student(student, dataset):
    judge = Fidelity(dataset, Means(), cache=None)
    models = [teachers.load(student / f"{role}.safetensors") for role in teachers.ROLES]
    table = list(fidelity.rows(judge, *models, count=10, steps=[1, 3], repeats=2))
    assert [(row.name, row.evaluations, len(row.scores)) for row in table] == [
        ("real heldout images (30)", None, 1),
        ("teacher, 1 Euler step", 1, 2),
        ("teacher, 3 Euler steps", 3, 2),
        ("student, one step", 1, 2),
    ]
    scores = [each.frechet for each in table[3].scores]
    mean, deviation = table[3].spread()["frechet"]
    assert (mean, deviation) == pytest.approx((sum(scores) / 2, abs(scores[0] - scores[1]) / 2**0.5))
    line = fidelity.markdown(table, judge.protocol(10, 2)).splitlines()[5]
    assert f"| {mean:.4g} ± {deviation:.4g} ({scores[0]:.4g}, {scores[1]:.4g}) |" in line


def test_a_standard_error_that_is_not_known_is_left_out(dataset, tmp_path):
    """30 samples and 30 of the real ones: every subset is all of both."""
    judge = Fidelity(dataset, Means(), keep=30, cache=None)
    table = [fidelity.Row("one", [judge(noisy, UNCONDITIONAL, 30, seed) for seed in seeds]) for seeds in ((0,), (0, 1))]
    fidelity.write(tmp_path, table, judge.protocol(30, 2))

    def no_number(found):
        raise AssertionError(f"{found} is no JSON")

    rows = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=no_number)["rows"]
    assert [row["kernel_error"] for row in rows] == [each["kernel_error"] for each in rows[1]["seeds"]] == [None, None]
    lines = fidelity.markdown(table, judge.protocol(30, 2)).splitlines()[2:4]
    assert [line.split(" | ")[2] for line in lines] == [f"{1000 * row['kernel']:.4g}" for row in rows]


def test_settings_that_cannot_be_used(dataset):
    for settings, sentence in (
        ({"split": "test"}, "real split must be train or heldout"),
        ({"labels": "random"}, "labels must be one of empirical, balanced"),
        ({"keep": 3}, "keep must be more than 3"),
        ({"batch": 0}, "batch at least 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            Fidelity(dataset, Means(), cache=None, **settings)
    for other in ("moons", "digit_pairs"):
        with pytest.raises(UserError, match="are for images without endpoints"):
            Fidelity(data.load(other), Means(), cache=None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_weights(), file)
    return file


@pytest.fixture
def student(tmp_path):
    """A data set of few images, and a teacher's and a student's file."""
    write(tmp_path / "packed", train=8, heldout=6)
    config = {"name": "packed", "path": str(tmp_path / "packed")}
    for role in teachers.ROLES:
        torch.manual_seed(0)
        described = teachers.Description(NETWORK, role=role, data=config, t_start=0.28)
        teachers.save(tmp_path / f"{role}.safetensors", build(NETWORK).state_dict(), described)
    return tmp_path


# Decompositions of 2048 x 2048 in float64 take seconds.
@installed
@pytest.mark.slow
def test_the_command(student, weights, capsys):
    command = ["evaluate", "--student", str(student / "student.safetensors")]
    command += ["--metric", "inception", "--inception-weights", str(weights), "--labels", "balanced"]
    command += ["--samples", "6", "--repeats", "2", "--batch", "3"]
    command += ["--cache", str(student / "cache"), "--out", str(student / "out")]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert (student / "out" / "table.md").read_text() in text
    content = json.loads((student / "out" / "evaluation.json").read_text())
    names = [row["name"] for row in content["rows"]]
    assert names == ["real heldout images (6)", "student, one step"]
    assert [len(row["seeds"]) for row in content["rows"]] == [1, 2]
    ours = content["rows"][1]
    assert ours["frechet"] == pytest.approx(sum(each["frechet"] for each in ours["seeds"]) / 2)
    assert ours["seeds"][0]["frechet"] != ours["seeds"][1]["frechet"]
    assert all(each["frechet"] > 0 for each in ours["seeds"])
    protocol = content["protocol"]
    for key, value in (
        ("generated_samples", 6),
        ("real_split", "train"),
        ("real_images", 8),
        ("labels", "balanced, of class-conditional networks"),
        ("published_weights", False),
        ("real_sha256", data.packed(student / "packed").fingerprint("train")),
    ):
        assert protocol[key] == value
        assert f"{key.replace('_', ' ')}: {value}" in text
    assert len(protocol["weights_sha256"]) == 64
    assert "2 seed(s)" in protocol["noise"]
    assert len(list((student / "cache").iterdir())) == 2


def test_the_command_without_weights(student, capsys):
    command = ["evaluate", "--student", str(student / "student.safetensors")]
    assert cli.main([*command, "--metric", "inception"]) == 2
    assert "pt_inception-2015-12-05-6726825d.pth" in capsys.readouterr().err
    assert cli.main([*command, "--inception-weights", "file"]) == 2
    assert "--metric inception and --inception-weights FILE go together" in capsys.readouterr().err
    command += ["--metric", "inception", "--inception-weights", str(student / "none.pth")]
    assert cli.main(command) == 2
    assert "there are no Inception weights" in capsys.readouterr().err
    assert cli.main([*command, "--repeats", "0"]) == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err
    assert cli.main([*command, "--device", "nowhere"]) == 2
    assert "--device 'nowhere' is not a device" in capsys.readouterr().err


def test_a_run_that_is_evaluated_in_inception_features(student, monkeypatch):
    config = configs.from_mapping(
        {
            "data": {"name": "packed", "path": str(student / "packed")},
            "distill": {"teacher": str(student / "teacher.safetensors"), "batch": 4, "updates": 2, "fake_turns": 1},
            "run": {
                "inception": "none.pth",
                "evaluate_every": 2,
                "evaluate_samples": 50,
                "tensorboard": False,
                "progress": False,
            },
        }
    )
    with pytest.raises(UserError, match=r"there are no Inception weights none\.pth"):
        train("distill", config, student / "run", False, False, "")
    assert not (student / "run").exists()
    monkeypatch.setattr(jobs, "Inception", lambda file, device: Means())
    file, measure = train("distill", config, student / "run", False, False, "")
    assert measure.name == "Fréchet Inception distance, weights 00000000"
    model, extract = teachers.load(file), Means()
    samples, _ = generate(sampler(model), evaluation_noise(SHAPE, 50), measure.labels(model.net, 50))
    expected = metrics.frechet_distance(
        extract(samples.clamp(-1, 1)), extract(data.packed(student / "packed").pixels("heldout"))
    )
    assert read_csv(student / "run" / "distances.csv")[-1]["distance"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match=r"run\.inception is for images"):
        Measure(data.load("moons"), extract)


def quick(student, **run):
    """A run of two updates, of which the last is evaluated."""
    own = {"evaluate_every": 2, "evaluate_samples": 50, "tensorboard": False, "progress": False, **run}
    packed = {"name": "packed", "path": str(student / "packed")}
    distill = {"teacher": str(student / "teacher.safetensors"), "batch": 4, "updates": 2, "fake_turns": 1}
    teacher = {"batch": 4, "updates": 2, "evaluate_every": 1}
    sections = {"data": packed, "network": NETWORK, "distill": distill, "teacher": teacher}
    return configs.from_mapping({**sections, "run": own})


def test_a_run_that_is_evaluated_against_the_training_images(student, monkeypatch):
    """As published: the moments of all of them, from the cache that the command fills too."""
    cache = student / "cache"
    monkeypatch.setattr(jobs, "Inception", lambda file, device: Means())
    monkeypatch.setattr(fidelity, "CACHE", cache)
    config = quick(student, inception="weights.pth", real_split="train")
    file, measure = train("distill", config, student / "run", False, False, "")
    assert measure.name == "Fréchet Inception distance, weights 00000000, to all 8 training images"
    assert len(list(cache.iterdir())) == 1
    found, extract, model = data.packed(student / "packed"), Means(), teachers.load(file)
    samples, _ = generate(sampler(model), evaluation_noise(SHAPE, 50), measure.labels(model.net, 50))
    expected = metrics.frechet_distance(extract(samples.clamp(-1, 1)), extract(found.pixels("train")))
    assert read_csv(student / "run" / "distances.csv")[-1]["distance"] == pytest.approx(expected, rel=1e-3)
    assert measure.to_train(samples) == measure(samples).distance
    assert (student / "run" / "best.safetensors").exists()
    # A perfect generator would reach the distance of the other split.
    assert measure.floor_name == "real held-out data"
    floor = metrics.frechet_distance(extract(found.pixels("heldout")), extract(found.pixels("train")))
    assert measure.floor().distance == pytest.approx(floor, rel=1e-6)
    judge = Fidelity(found, reused := Means(), cache=cache)
    assert reused.seen == 0
    assert torch.equal(judge.real.mean, measure._to_train.mean)


def test_a_run_without_the_weights_that_it_needs_says_so_and_trains(student):
    config = quick(student, inception_only=True)
    with pytest.warns(UserWarning, match=r"not evaluated on its way .*run\.inception=FILE: the weights are a file"):
        file, _ = train("distill", config, student / "run", False, False, "")
    assert file.exists()
    assert not (student / "run" / "best.safetensors").exists()
    assert read_csv(student / "run" / "distances.csv") == []
    assert configs.load(student / "run" / "config.yaml").run.evaluate_every == 0
    with pytest.raises(UserError, match=r"there are no Inception weights none\.pth"):
        train("distill", quick(student, inception_only=True, inception="none.pth"), student / "b", False, False, "")
    assert not (student / "b").exists()


def test_a_teacher_is_evaluated_at_intervals_of_its_own(student):
    train("train-teacher", quick(student), student / "run", False, False, "")
    assert [row["update"] for row in read_csv(student / "run" / "distances.csv")] == [0, 1, 2]
    with pytest.raises(UserError, match=r"teacher\.evaluate_every must not be negative, got -1"):
        configs.from_mapping({"teacher": {"evaluate_every": -1}})
    with pytest.raises(UserError, match=r"run\.real_split must be one of heldout, train; got 'test'"):
        configs.from_mapping({"run": {"real_split": "test"}})


def test_the_published_protocol(student, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "_inception_table", lambda arguments, *rest: asked.append((arguments, rest[-1])))
    command = ["evaluate", "--student", str(student / "student.safetensors"), "--inception-weights", "file"]
    for words, expected in (
        (["--published"], ("balanced", 3, [99], 50_000)),
        (["--published", "--repeats", "1", "--samples", "10", "--steps", "5"], ("balanced", 1, [5], 10)),
        (["--metric", "inception"], ("empirical", 1, [1, 20, 100], 50_000)),
    ):
        assert cli.main([*command, *words]) == 0
        arguments, count = asked.pop()
        assert (arguments.labels, arguments.repeats, arguments.steps, count) == expected
        assert (arguments.real_split, arguments.batch) == ("train", 100)
