"""Updates on a device that is not the host: no tensors of both meet, and none is read.

The device is ``meta``, for which torch needs no driver: its tensors have a shape and no memory. Torch refuses whatever
would make the host wait for a number of such a tensor. ``Device`` refuses operators whose tensors lie on two devices,
as CUDA does. What branches on CUDA itself is not seen; tests/gpu is for that.
"""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
import torch._dynamo  # now: it remembers torch's functions as they are when it is first imported
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from realuid_fast import backends, data, paths, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build
from realuid_fast.paths import samplers
from realuid_fast.train import hooks

UNET = {
    "kind": "unet",
    "dim": [1, 8, 8],
    "num_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
# This network has one level. The cases with the networks above prove every layer, these what their objective adds.
SMALL = {**UNET, "channel_mult": [1]}
LABELLED = {**UNET, "num_classes": 10, "class_cond": True}
NULL = {**LABELLED, "null_label": True}
GAN = {"gan": {"weight_fake": 3.0, "weight_generator": 2.0, "least_share": 0.2}}
CASES = {
    "realuid": (UNET, {}),
    "labels": (LABELLED, {}),
    "labels of the batch": (LABELLED, {"labels": "batch"}),
    "guidance": (NULL, {"guidance": 2.0}),
    "sid": (SMALL, {"objective": {"name": "sid", "alpha_sid": 1.0}}),
    "normalised": (SMALL, {"objective": {"name": "normalised", "alpha": 0.9, "beta": 0.95}}),
    "dmd": (SMALL, {"objective": {"name": "dmd"}}),
    "sds": (SMALL, {"objective": {"name": "sds"}}),
    "gan": (SMALL, GAN),
    "several steps": (LABELLED, {"times": [0.5, 0.8]}),
    "regression": (SMALL, {"objective": {"name": "regression"}}),
}
OF_X0 = ("sid", "dmd", "sds")


class Generator(torch.Generator):
    """Torch has none on a device without memory. Calls that draw get none."""

    def __new__(cls, device=None):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self._device = torch.device(device)

    @property
    def device(self):
        return self._device


@contextlib.contextmanager
def pretended():
    """The error of torch for the device ``meta``, before any operator runs."""
    patches = {
        "Generator": Generator,
        "is_autocast_enabled": lambda *_: False,
        "autocast": lambda *_, **__: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch, name, value))
        stack.enter_context(backends.backend("torch"))
        yield


def places(tree):
    """The devices of the tensors in ``tree``, and whether each has dimensions: one without may come from anywhere."""
    return {(t.device.type, t.ndim > 0) for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


class Device(TorchDispatchMode):
    """The device as far as it is pretended: operators with tensors on two devices are refused, but for copies to it.

    A copy to the host is refused too, unless it is ``read`` that asks for some. Such a copy is of the device still, so
    that a look at its numbers is refused.
    """

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self, read=False):
        super().__init__()
        self.read = read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: None if name == "generator" else value for name, value in (kwargs or {}).items()}
        if func in self.COPIES:
            to = torch.device(kwargs.get("device") or args[0].device)
            if to.type == "cpu" and "meta" in {device for device, _ in places(args)}:
                if not self.read:
                    raise AssertionError(f"{func} brings a tensor to the host")
                kwargs["device"] = torch.device("meta")
        elif {("cpu", True), ("meta", True)} <= places((args, kwargs)):
            raise AssertionError(f"{func} takes tensors of two devices")
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = ({device for device, _ in places(tree)} for tree in ((args, kwargs), result))
        if "cpu" in given and "meta" in given | made:
            raise AssertionError(f"{func} takes a tensor from the host")
        return result


@contextlib.contextmanager
def nothing_from_the_host():
    """Refuses what a captured turn may not do: copying tensors to the device, or making them of Python's numbers."""

    def refuse(*_, **__):
        raise AssertionError("a tensor is made of numbers of the host")

    makers = ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (torch.Tensor, "new_tensor"))
    with contextlib.ExitStack() as stack:
        for owner, name in makers:
            stack.enter_context(mock.patch.object(owner, name, refuse))
        stack.enter_context(Watch())
        yield


def content(dataset, **sections):
    run = {"mode": "eager", "device": "meta"}
    return configs.from_mapping({"data": dataset.config, "run": run, **sections})


@pytest.mark.parametrize("case", CASES)
def test_a_students_update_stays_on_its_device(case):
    network, settings = CASES[case]
    dataset = data.load("digits")
    distill = {"batch": 4, "updates": 20, "fake_turns": 2, "ema": [0.9], "export": 0.9, **settings}
    with pretended():
        config = content(dataset, distill=distill, path={"match": "x0"} if case in OF_X0 else {})
        model = teachers.Model(build(network), teachers.Description(network, data=dataset.config))
        trainer = trainers.trainer("distill", config, dataset, model)
        assert {p.device.type for p in trainer.network.parameters()} == {"meta"}
        with Device():
            trainer.update()
            trainer.update()
            with Device(read=True):
                hooks.Row(trainer, {})
            if case == "regression":
                return  # its pairs come from the teacher, and it is never captured
            with nothing_from_the_host():
                if trainer.turns:
                    trainer._generate_rows()
                    trainer._fake_step_plain()
                trainer._generator_step_plain()


@pytest.mark.parametrize("network", [UNET, LABELLED], ids=["images", "labels"])
def test_a_teachers_update_stays_on_its_device(network):
    dataset = data.load("digits")
    with pretended():
        config = content(dataset, network=network, teacher={"batch": 4, "updates": 20, "ema": [0.9], "export": 0.9})
        trainer = trainers.teacher_trainer(config, dataset)
        with Device():
            trainer.update()
            trainer.update()
            with Device(read=True):
                hooks.Row(trainer, {})


@pytest.mark.parametrize("name", paths.PATHS)
def test_times_and_coefficients_are_made_on_the_device(name):
    """By every sampler, in every space and for every prediction that the path allows."""
    seen = set()
    with pretended():
        draws, z = Generator(), torch.zeros(6, 2, device="meta")
        for sampler in samplers.SAMPLERS:
            path = paths.build(name, sampler=sampler)
            pairs = []
            for pair in itertools.product(paths.MATCH_SPACES, paths.PREDICTIONS):
                # The path may have no such times, or not express the pair.
                with contextlib.suppress(UserError):
                    path.coefficients(path.sample_time(2), *pair)
                    pairs.append(pair)

            if not pairs:
                continue

            def turn(pairs, path=path):
                t = path.sample_time(6, draws, z.device)
                for match, predict in pairs:
                    path.network_input(z, t, predict), path.network_time(t, predict)
                    coef = path.coefficients(t, match, predict)
                    assert (t.device.type, coef.device.type) == ("meta", "meta")

            with Device():
                turn(pairs[:1])  # tables are brought to the device once
                with nothing_from_the_host():
                    turn(pairs)
            seen |= {(sampler, *pair) for pair in pairs}
    assert len({sampler for sampler, _, _ in seen}) >= 4
    assert len(seen) >= 12


def test_a_number_from_the_host_would_be_seen():
    """Else the tests above would pass whatever the update did."""
    on_device = torch.zeros(3, device="meta")
    with Device():
        with pytest.raises(AssertionError, match="tensors of two devices"):
            torch.arange(3.0).index_select(0, on_device.long())
        with pytest.raises(AssertionError, match="tensors of two devices"):
            torch.arange(3.0) + on_device
        for copy in (torch.Tensor.cpu, torch.Tensor.tolist, torch.zeros(3).copy_):
            with pytest.raises(AssertionError, match="brings a tensor to the host"):
                copy(on_device)
        # These are torch's own refusals, of three kinds.
        for look in (float, bool, torch.nonzero, torch.Tensor.numpy):
            with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta"):
                look(on_device[:1])
        with nothing_from_the_host():
            with pytest.raises(AssertionError, match="takes a tensor from the host"):
                on_device.copy_(torch.zeros(3))
            with pytest.raises(AssertionError, match="made of numbers of the host"):
                torch.tensor([1.0, 2.0], device="meta")
