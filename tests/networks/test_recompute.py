"""Blocks that run again in the backward pass: the same gradients and runs to the bit, from less memory."""

import copy

import pytest
import torch

from realuid_fast import data, teachers
from realuid_fast.cli import plan
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.jobs.train import train
from realuid_fast.networks import build, memory
from realuid_fast.networks.recompute import recompute, repeated
from realuid_fast.networks.unet import Blocks, ResBlock
from realuid_fast.ops import backends
from realuid_fast.train import modes
from realuid_fast.train.distill import Distiller

from ..helpers import random_network

CPU = torch.device("cpu")
UNET = {
    "kind": "unet", "dim": [1, 8, 8], "num_channels": 16, "channel_mult": [1, 2], "norm_groups": 4,
    "attention_resolutions": "4", "dropout": 0.3,
}  # fmt: skip
EDM = {"dim": [1, 8, 8], "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0.3}
NETWORKS = {
    "unet": UNET,
    "song": {**EDM, "kind": "song-unet", "attn_resolutions": [4]},
    "dhariwal": {**EDM, "kind": "dhariwal-unet", "model_channels": 64, "attn_resolutions": [4]},
}


def network(config):
    return random_network(config, 0.1).to(memory_format=torch.channels_last)


def configured(*changes):
    content = {
        "data": {"name": "digits"},
        "network": UNET,
        "teacher": {"batch": 4, "updates": 4, "ema": [0.9], "export": 0.9},
        "distill": {
            "teacher": "teacher.safetensors", "batch": 4, "fake_turns": 1, "updates": 4, "ema": [0.9], "export": 0.9,
        },
        "run": {"tensorboard": False, "progress": False, "log_every": 1},
    }  # fmt: skip
    return configs.from_mapping(configs.merge(content, configs.nested(changes)))


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(kind, frozen, backend, monkeypatch):
    monkeypatch.setattr(backends, "_chosen", backend)
    plain = network(NETWORKS[kind]).requires_grad_(not frozen)
    again = copy.deepcopy(plain)
    recompute(again)
    assert copy.deepcopy(again).state_dict().keys() == plain.state_dict().keys()
    found = []
    for net in (plain, again):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            x = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_(frozen)
            out = net(torch.linspace(0, 1, 4), x)
            out.square().sum().backward()
            # What is drawn next does not depend on it either.
            grads = [x.grad] if frozen else [p.grad for p in net.parameters()]
            found.append([out.detach(), torch.rand(3), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    bytes_plain, bytes_again = (memory.kept_bytes(net, (1, 8, 8), CPU, 4, frozen) for net in (plain, again))
    assert 0 < bytes_again < 0.8 * bytes_plain
    # Counting leaves the parts as they were.
    assert len(repeated(again)) > 3
    assert not repeated(plain)


def trajectory(trainer, updates=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        rows = []
        for _ in range(updates):
            trainer.update()
            rows.append(trainer.meters.read())
        return rows, [p.detach().clone() for p in trainer.network.parameters()]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["run.accumulate=2"],
        ["distill.fake_precision=bf16", "distill.generator_precision=fp16"],
        ["distill.gan.weight_fake=1.0", "distill.gan.weight_generator=0.5"],
        ["distill.teacher_precision=bf16", "distill.times=[0.5]"],
        ["distill.objective.name=regression", "distill.regression.steps=2"],
        ["teacher"],
    ],
    ids=lambda changes: changes[0] if changes else "plain",
)
def test_training_is_the_same_to_the_bit(changes):
    dataset, ends = data.load({"name": "digits"}), []
    for wanted in ("false", "true"):
        words = [word for word in changes if "=" in word]
        config = configured(*words, f"run.checkpoint_activations={wanted}")
        if changes == ["teacher"]:
            trainer = trainers.teacher_trainer(config, dataset)
        else:
            model = teachers.Model(network(UNET), teachers.Description(UNET))
            trainer = trainers.trainer("distill", config, dataset, model)
        assert bool(repeated(trainer.network)) == (wanted == "true")
        ends.append(trajectory(trainer))
    # As text, where a number that is missing is like another.
    assert repr(ends[0][0]) == repr(ends[1][0])
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


class Stopped(Exception):
    pass


def test_a_resumed_run_ends_as_without(tmp_path, monkeypatch):
    file = tmp_path / "teacher.safetensors"
    teachers.save(file, network(UNET).state_dict(), teachers.Description(UNET, data={"name": "digits"}))
    update, stop_at = Distiller.update, None

    def watched(self):
        if self.step == 0:
            # The masks of dropout come from torch's own generator, which a checkpoint holds.
            torch.manual_seed(3)
        if self.step == stop_at:
            raise Stopped
        update(self)

    monkeypatch.setattr(Distiller, "update", watched)

    def run(name, resume=False, wanted="true"):
        words = (f"distill.teacher={file}", "run.checkpoint_every=2", f"run.checkpoint_activations={wanted}")
        train("distill", configured(*words), tmp_path / name, resume, False, "")

    run("without", wanted="false")
    stop_at = 3
    with pytest.raises(Stopped):
        run("resumed")
    stop_at = None
    run("resumed", resume=True)
    ends = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("without", "resumed")]
    assert ends[0] == ends[1]


def test_a_plan_counts_less_memory_and_more_operations():
    plain, again = (
        plan.make("distill", configured(f"run.checkpoint_activations={word}"), steps=0) for word in ("false", "true")
    )
    kept = [sum(v for k, v in p.memory.items() if k.startswith("activations")) for p in (plain, again)]
    assert kept[1] < 0.8 * kept[0]
    assert again.memory["moments"] == plain.memory["moments"]
    for name, count in plain.operations.items():
        more = again.operations[name] / count
        # A forward pass more beside a forward and a backward one of twice as much; the last of a block is left out.
        assert more == 1 if name.startswith("samples") else 1.1 < more <= 4 / 3 + 0.17


@pytest.mark.slow
@pytest.mark.skipif(modes.why_not("compiled", "cpu") is not None, reason="torch.compile has no compiler here")
def test_compiled_blocks_run_again_too():
    net = network({**UNET, "attention_resolutions": "", "dropout": 0.0, "channel_mult": [1]})
    again = copy.deepcopy(net)
    recompute(again)
    call, t, x = modes.compiled(again), torch.linspace(0, 1, 4), torch.randn(4, 1, 8, 8)
    for one, run in ((net, net), (again, call)):
        run(t, x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        assert all(p.grad is not None for p in one.parameters())
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        # Compiled kernels order sums differently.
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()))


@pytest.mark.slow
@pytest.mark.skipif(modes.why_not("compiled", "cpu") is not None, reason="torch.compile has no compiler here")
def test_compiled_blocks_draw_their_masks_once():
    """The gradient is that of the loss with the very masks of the forward pass: a central difference says so."""
    blocks = Blocks(ResBlock(16, 8, 16, 4, dropout=0.5)).double()
    for p in blocks.parameters():
        torch.nn.init.normal_(p, std=0.3)
    recompute(blocks)
    call, x, embedding = modes.compiled(blocks), torch.randn(2, 16, 4, 4).double(), torch.randn(2, 8).double()
    direction = torch.randn_like(x)

    def loss(x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return call(x.detach().requires_grad_(), embedding).square().sum()

    x.requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        value = call(x, embedding).square().sum()
    assert torch.equal(value, loss(x))
    (g,) = torch.autograd.grad(value, x)
    slope = (loss(x + 1e-5 * direction) - loss(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((g * direction).sum(), slope.detach(), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_had_is_refused():
    with pytest.raises(UserError, match=r"checkpoint_activations is for the U-Nets of this package; MLP has no blocks"):
        recompute(build({"kind": "mlp", "shape": [2], "width": 8, "depth": 1}))
    for word, sentence in (("run.mode=graphs", "run.mode graphs"), ("run.shard=true", "run.shard")):
        with pytest.raises(UserError, match=rf"run\.checkpoint_activations must be false with {sentence}"):
            configured("run.checkpoint_activations=true", word)
