"""The plan of a run: counted parameters, memory and operations against the trainers', measurements, missing parts."""

import functools
import gc
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from realuid_fast import backends, cli, data, teachers
from realuid_fast.cli import counts, plan, timing
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build, memory
from realuid_fast.train import sharding
from realuid_fast.train.distill import Distiller

NETWORK = {
    "kind": "unet", "dim": [3, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4,
    "attention_resolutions": "4", "class_cond": True, "num_classes": 3,
}  # fmt: skip
CONTENT = {
    "data": {"name": "cifar10", "path": "nowhere"},
    "network": NETWORK,
    "teacher": {"batch": 8, "updates": 10, "ema": [0.9, 0.99], "export": 0.9},
    "distill": {"teacher": "gone.safetensors", "batch": 8, "fake_turns": 3, "updates": 10, "ema": [0.9], "export": 0.9},
}


@pytest.fixture(scope="module", autouse=True)
def one_count_of_a_network():
    """Plans share what they count of one network, which depends on its modules and on how it is called alone.

    A plan collects garbage before it measures. What other tests of this process left is not looked through each time.
    """
    operations, activations, found = counts.operations, counts.activations, {}

    def operations_of(network, again=False):
        key = json.dumps([network, again], sort_keys=True, default=list)
        if key not in found:
            found[key] = operations(network, again)
        return found[key]

    def activations_of(net, *arguments, **how):
        # Networks that are made alike, of parameters of one kind: the parameters' values decide nothing.
        kinds = [(p.dtype, p.requires_grad, p.stride()) for p in net.parameters()]
        modules = [(type(m), m.training, getattr(m, "recompute", False)) for m in net.modules()]
        rounded = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        key = str((net, kinds, modules, arguments, how, rounded))
        if key not in found:
            found[key] = activations(net, *arguments, **how)
        return found[key]

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "operations", operations_of)
        patch.setattr(counts, "activations", activations_of)
        yield


@functools.cache
def planned(*changes, job="distill", ranks=1):
    """A plan without measurements."""
    return plan.make(job, configured(*changes), steps=0, ranks=ranks)


def configured(*changes, **sections):
    return configs.from_mapping(configs.merge(configs.merge(CONTENT, sections), configs.nested(changes)))


def images(classes=3):
    pixels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(30) % classes
    return data.Dataset("images", pixels, pixels, labels, labels)


def teacher():
    return teachers.Model(build(NETWORK), teachers.Description(NETWORK))


class Counter(TorchDispatchMode):
    """Operations by torch's formulas. Its own counter follows modules, by hooks that autograd.grad does not take."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def counted(update):
    # As plain layers: the formulas know none of the package's own.
    with sdpa_kernel(SDPBackend.MATH), backends.backend("torch"), Counter() as counter:
        update()
    return counter.total


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("objective", ["realuid", "uid", "general", "diff-instruct", "sds"])
def test_a_distillation_is_counted_as_it_runs(objective):
    changes = (f"distill.objective.name={objective}", f"path.match={'x0' if objective == 'sds' else 'velocity'}")
    config, found = configured(*changes), planned(*changes)
    trainer = trainers.distiller(config, images(), teacher())
    assert found.images_per_update == trainer.images_per_update
    trainer.update()
    # The plan's generator turn goes back to the noise too, in no layer but the first.
    assert sum(found.operations.values()) == pytest.approx(counted(trainer.update), rel=0.01)

    state = trainer.state_dict()
    turns = ["generator", *(["fake"] if objective != "sds" else [])]
    moments = [
        value for turn in turns for each in state[f"{turn}_optimiser"]["adam"]["state"].values()
        for name, value in each.items() if name.startswith("exp_avg")
    ]  # fmt: skip
    assert found.memory["moments"] == size(moments)
    assert found.memory["averages"] == size(state["generator_optimiser"]["ema"][0.9].values())
    nets = [state["generator"], *([state["fake"]] if objective != "sds" else [])]
    assert found.memory["parameters"] == found.memory["gradients"] == sum(size(net.values()) for net in nets)
    assert found.memory["teacher"] == size(trainer.teacher.state_dict().values())
    assert set(found.parameters) == {"teacher", "generator", *(["fake model"] if objective != "sds" else [])}


def test_operations_do_not_depend_on_the_layout():
    # Wide enough for the package's convolution, which serves channels_last images alone.
    wide = {**NETWORK, "num_channels": 32}
    config = configured(network={"num_channels": 32})
    found = plan.make("train-teacher", config, steps=0).operations["forward and backward"]
    for channels_last in ("true", "false"):
        trainer = trainers.teacher_trainer(configured(f"run.channels_last={channels_last}", network=wide), images())
        assert found == pytest.approx(counted(trainer.update), rel=0.01)


def test_a_discriminator_takes_real_rows_and_a_head():
    config = configured("distill.objective.name=uid", "distill.gan.weight_fake=1.0")
    found, trainer = plan.make("distill", config, steps=0), trainers.distiller(config, images(), teacher())
    assert found.images_per_update == trainer.images_per_update == 8 * 7
    assert found.parameters["fake model"] == sum(p.numel() for p in trainer.judged.parameters())
    trainer.update()
    assert sum(found.operations.values()) == pytest.approx(counted(trainer.update), rel=0.05)


def test_a_teacher_is_counted_as_it_trains():
    config, found = configured(), planned(job="train-teacher")
    trainer = trainers.teacher_trainer(config, images())
    trainer.update()
    assert found.operations == {"forward and backward": pytest.approx(counted(trainer.update), rel=0.01)}
    assert (found.images_per_update, found.batch, found.updates) == (8, 8, 10)
    parameters = size(trainer.net.parameters())
    assert found.memory["averages"] == found.memory["moments"] == 2 * parameters  # beta1 is not zero


def test_ranks_hold_their_shares():
    alone, whole, spread = (
        planned(f"run.shard={shard}", ranks=ranks) for shard, ranks in (("true", 1), ("false", 4), ("true", 4))
    )
    state = ("parameters", "gradients", "moments", "averages", "teacher")
    for name in state:
        assert whole.memory[name] == alone.memory[name] == pytest.approx(4 * spread.memory[name], abs=4)
    assert set(spread.memory) - set(whole.memory) == {"blocks of networks, brought together"}
    largest = max(size(block.parameters()) for block in sharding.blocks(build(NETWORK)))
    assert spread.memory["blocks of networks, brought together"] == 2 * largest
    assert whole.memory["batch buffers"] == spread.memory["batch buffers"] == alone.memory["batch buffers"] / 4
    assert whole.operations == alone.operations
    assert "| memory of each of 4 ranks | MB |" in plan.markdown(spread)
    assert plan.make("distill", configured(), steps=2, ranks=2).unmeasured == "updates are timed on one rank alone"
    teaching = plan.make("train-teacher", configured("run.shard=true"), steps=0, ranks=2)
    assert teaching.memory["parameters"] == 4 * teaching.parameters["network"] / 2


def test_a_teacher_that_is_rounded_or_in_host_memory_takes_less():
    there = ["run.device=cuda"]
    plain, rounded, on_gpu, away = (
        planned(*words)
        for words in ([], ["distill.teacher_precision=bf16"], there, ["run.offload_teacher=true", *there])
    )
    trainer = trainers.distiller(configured("distill.teacher_precision=bf16"), images(), teacher())
    assert rounded.memory["teacher"] == size(trainer.teacher.parameters()) < 0.6 * plain.memory["teacher"]
    assert "teacher" not in away.memory
    assert away.memory["blocks of networks, brought together"] < 2 * plain.memory["teacher"]
    assert {k: v for k, v in away.memory.items() if not k.startswith("blocks")} == {
        k: v for k, v in on_gpu.memory.items() if k != "teacher"
    }
    # Where torch's own layers run, which keep more.
    (here, elsewhere) = (max(v for k, v in of.memory.items() if "activations" in k) for of in (plain, on_gpu))
    assert elsewhere > 1.3 * here


@pytest.mark.parametrize("words", [["solver=euler"], ["solver=heun"], ["steps=3"]])
def test_a_regression_is_counted_as_it_runs(words):
    config = configured("distill.objective.name=regression", *(f"distill.regression.{word}" for word in words))
    found = plan.make("distill", config, steps=0)
    trainer = trainers.regression(config, images(), teacher())
    trainer.update()
    assert sum(found.operations.values()) == pytest.approx(counted(trainer.update), rel=0.01)
    assert found.images_per_update == trainer.images_per_update
    assert found.memory["teacher"] == found.memory["parameters"] == size(trainer.network.parameters())
    assert plan.make("distill", config, steps=1).hours > 0


def kept(trainer, update):
    """Bytes that the backward passes of an update hold at once, at most: saved by its largest turn."""
    nets = (trainer.generator, trainer.fake, trainer.teacher)
    own = {tensor.untyped_storage().data_ptr() for net in nets for tensor in net.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        update()
    return sum(held.values())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activations_are_what_a_turn_keeps(precision):
    # In both turns, so that the generator's is the larger one.
    changes = (f"distill.generator_precision={precision}", f"distill.fake_precision={precision}")
    config, found = configured(*changes), planned(*changes)
    trainer = trainers.distiller(config, images(), teacher())
    (activations,) = (value for name, value in found.memory.items() if name.startswith("activations of the generator"))
    # The turn keeps a little beside its networks, and may use an address again for what comes after a backward pass.
    assert activations == pytest.approx(kept(trainer, trainer.generator_turn), rel=0.1)


def test_a_sample_more_is_a_samples_bytes_more():
    net, cpu = build(NETWORK), torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        one, four = (memory.kept_bytes(net, (3, 8, 8), cpu, batch) for batch in (1, 4))
        assert four == one + 3 * memory.bytes_per_sample(net, (3, 8, 8), cpu)
    # The parameters that autocast has converted are there once.
    assert one > memory.bytes_per_sample(net, (3, 8, 8), cpu)


def test_hours_are_the_measured_time_of_all_updates():
    found = plan.make("distill", configured("distill.updates=1000"), steps=4)
    assert (found.measured.updates, found.measured.batch, found.measured.remark) == (4, 8, "")
    assert found.hours == pytest.approx(found.measured.seconds * 1000 / 3600)


def test_what_does_not_fit_is_not_measured(monkeypatch):
    """The largest batch that did is, once more from its beginning; if none did, there are no hours."""
    most, updated = 2, Distiller.update

    def update(trainer):
        if trainer.batch > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        updated(trainer)

    monkeypatch.setattr(Distiller, "update", update)
    found = plan.make("distill", configured(), steps=3)
    assert found.measured.batch == 2
    assert "the batch does not fit into the free memory" in found.measured.remark
    most = 0
    none = plan.make("distill", configured(), steps=3)
    assert none.measured is None
    assert none.unmeasured == "updates of batch 1 do not fit into the memory of cpu"


def test_a_slow_machine_measures_less_and_says_so(monkeypatch):
    monkeypatch.setattr(timing, "_timed", lambda trainer, device: float(trainer.batch))
    found = plan.make("distill", configured("distill.updates=3600"), steps=20, bound=41.0)
    # Twenty updates of one sample take 20 s, of two 40 s, of four more than 41.
    assert (found.measured.updates, found.measured.batch, found.measured.seconds) == (20, 2, 2.0)
    assert found.measured.remark.startswith("in place of 8: 20 updates of a larger batch would take longer than 41 s")
    assert found.hours == pytest.approx(8.0)
    found = plan.make("distill", configured(), steps=20, bound=5.0)
    assert (found.measured.updates, found.measured.batch) == (5, 1)
    assert "5 updates in place of 20" in found.measured.remark
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    found = plan.make("train-teacher", configured(), steps=2)
    assert found.measured.remark.startswith("in place of 8: the batch does not fit into the free memory")


@pytest.mark.parametrize(("most", "tried", "measured"), [(8, [8], 8), (4, [8, 4], 4)])
def test_on_a_gpu_the_largest_batch_that_should_fit_is_the_one_that_is_warmed(monkeypatch, most, tried, measured):
    """There every size is compiled anew, which takes minutes: the others are left alone."""
    made = []

    class Updates:
        def __init__(self, batch):
            made.append(batch)
            self.batch = batch

        def update(self):
            if self.batch > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

    config = configured("run.mode=graphs", "run.device=cuda")
    what = planned()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    monkeypatch.setattr(timing, "_timed", lambda trainer, device: 0.5)
    found = timing.measure(what, Updates, config, 20, 120.0)
    assert made == tried
    assert (found.batch, found.updates, found.seconds) == (measured, 20, 0.5)
    # A batch that does not fit by the plan itself is not tried.
    made.clear()
    monkeypatch.setattr(memory, "free_bytes", lambda device: sum(what.memory.values()) - 1)
    assert timing.measure(what, Updates, config, 20, 120.0).batch == made[0] == 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert timing.measure(what, Updates, config, 20, 120.0).batch == 1


def test_what_the_device_does_not_have_is_not_guessed():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    small = ["network.num_channels=32", "network.num_res_blocks=1", "distill.batch=2"]
    found = plan.make("distill", configs.load("recipes/cifar10_fast", small), 3)
    assert found.hours is None
    assert "run.device cuda does not exist on this machine" in found.unmeasured
    assert found.missing == [
        "data.path data/cifar-10-batches-bin is not there",
        "distill.teacher runs/cifar10-teacher/teacher.safetensors is not there",
    ]
    assert "no hours: run.device cuda" in plan.markdown(found)
    found = plan.make("distill", configured("run.mode=graphs"), 3)
    assert "needs a CUDA device" in found.unmeasured


def test_configurations_of_every_kind_can_be_planned():
    words = ("num_channels=8", "norm_groups=4", "num_head_channels=8", "channel_mult=[1]", "num_res_blocks=1")
    small = [f"network.{word}" for word in words]
    for name in ("digits_tune", "mixture", "presets/ibmd", "presets/guided", "recipes/cifar10_cond_tune"):
        changes = small if name.startswith("recipes") else []
        for job in ("distill", "train-teacher"):
            found = plan.make(job, configs.load(name, changes), steps=0)
            assert min(found.operations.values()) > 0, (name, job)
            assert sum(found.memory.values()) > 0


def test_states_from_noised_data_take_one_step_and_their_presets_are_planned():
    own, noised = (
        plan.make(
            "distill", configs.load(configs.preset("add"), ["distill.batch=4", f"distill.states={states}"]), steps=0
        )
        for states in ("own", "noised")
    )
    for turn in ("samples for the fake turns", "generator turn"):
        assert noised.operations[turn] < own.operations[turn]


@pytest.mark.parametrize("form", ["moment-matching", "parameter-moments"])
def test_moment_matching_is_counted_as_it_runs(form):
    """Several steps: a turn asks the generator once. In parameter space the teacher's step is differentiated twice."""
    changes = (f"distill.objective.name={form}", "path.match=x0", "distill.states=data", "distill.times=[0.5]")
    changes += ("distill.fake_turns=1", "distill.t_start=0.1", "distill.fake.betas=[0.9,0.999]")
    config, found = configured(*changes), planned(*changes)
    trainer = trainers.moments(config, images(), teacher())
    assert found.images_per_update == trainer.images_per_update == 16
    if form == "parameter-moments":
        # The first update's preparation reads 100 batches, and is no part of the plan.
        trainer.kept["fake_optimiser"].adam.counts[0] = 1
    trainer.update()
    assert sum(found.operations.values()) == pytest.approx(counted(trainer.update), rel=0.01)
    state = trainer.state_dict()
    moments = [
        value for turn in ("generator", "fake") for each in state[f"{turn}_optimiser"]["adam"]["state"].values()
        for name, value in each.items() if name.startswith("exp_avg")
    ]  # fmt: skip
    assert found.memory["moments"] == size(moments)
    assert found.memory["parameters"] == sum(size(state[turn].values()) for turn in ("generator", "fake"))
    third = "the teacher's step" if form == "parameter-moments" else "fake model"
    assert set(found.parameters) == {"teacher", "generator", third}
    assert ("direction of the teacher's step" in found.memory) == (form == "parameter-moments")


def test_every_preset_with_a_file_of_its_own_can_be_planned():
    plain, previous = (
        plan.make("distill", configs.load(configs.preset(name), ["distill.batch=4"]), steps=0)
        for name in ("regression", "ced")
    )
    assert previous.memory["earlier student"] == previous.memory["parameters"]
    assert previous.operations["the teacher's samples"] > plain.operations["the teacher's samples"]
    second = plan.make("distill", configs.load(configs.preset("sfd-second"), ["distill.batch=4"]), steps=0)
    assert 5 * second.operations["the teacher's samples"] == plain.operations["the teacher's samples"]


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="--measure must not be negative"):
        plan.make("distill", configured(), steps=-1)
    with pytest.raises(UserError, match=r"gone.safetensors' is not there, and no section network says what it is"):
        plan.make(
            "distill", configs.from_mapping({"data": {"name": "cifar10"}, "distill": CONTENT["distill"]}), steps=0
        )
    with pytest.raises(UserError, match=r"batch 8 does not divide by 3 ranks times run\.accumulate 1"):
        plan.make("distill", configured(), steps=0, ranks=3)
    with pytest.raises(UserError, match="--ranks must be at least 1, got 0"):
        plan.make("distill", configured(), steps=0, ranks=0)
    with pytest.raises(UserError, match="does not divide"):
        plan.make("distill", configured("run.accumulate=3"), steps=0)


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["distill", "--config", "digits", "--dry-run", "--measure", "2", "--json", "plan.json", "--out", "run"]
    words += ["--set", "distill.batch=4"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    for line in (
        "| moments |",
        "| generator turn |",
        "4,000 updates of batch 4",
        "measured on 1 CPU thread: 2 updates",
    ):
        assert line in said, line
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["images"] == content["images_per_update"] * content["updates"]
    assert content["hours"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    for wrong, sentence in (
        (words, "--json plan.json exists"),
        (["distill", "--config", "digits"], "--out must be given"),
        (["distill", "--config", "digits", "--out", "run", "--measure", "3"], "--measure goes with --dry-run"),
        (["distill", "--dry-run", "--resume"], "leave --resume out"),
    ):
        assert cli.main(wrong) == 2
        assert sentence in capsys.readouterr().err
