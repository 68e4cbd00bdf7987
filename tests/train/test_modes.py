"""Modes of a turn: compiled and captured turns follow the eager trajectory; when a capture is made and forgotten.

CUDA graphs are emulated: a tape of the operators that a turn dispatched, replayed on the same tensors. As in a graph,
whatever the turn did on the host is frozen at what it was.
"""

import contextlib
import functools
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from realuid_fast import paths
from realuid_fast.errors import UserError
from realuid_fast.models.frozen import frozen_view
from realuid_fast.models.generator import Generator
from realuid_fast.networks.compiling import sharing
from realuid_fast.train import distill as distill_module
from realuid_fast.train import modes
from realuid_fast.train.modes import WARM_UP, Captured

from ..helpers import LABELLED, MLP, UNET, random_network, trainer_of

SETS = {"points": ("eight_gaussians", MLP), "labelled": ("digits", LABELLED), "images": ("digits", UNET)}
GAN = {"gan": {"weight_fake": 3.0, "weight_generator": 2.0, "least_share": 0.2}}


class Tape(TorchDispatchMode):
    """Every operator that ran, with the tensors it ran on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, before in self.calls:
            now = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A capture runs nothing on a device; here it does, and the first replay is left out instead."""

    def __init__(self):
        self.runs, self.captured = 0, []

    @property
    def captures(self):
        return len(self.captured)

    def run(self, turn):
        self.runs += 1
        return turn()

    def capture(self, turn):
        self.captured.append(turn.__name__)
        with Tape() as tape:
            results = turn()
        replays = itertools.count()
        return lambda: tape.replay() if next(replays) else None, results


def distiller(kind="points", mode="eager", **settings):
    name, network = SETS[kind]
    # Rates and averages that change from step to step: a graph that froze them would show.
    rates = {"warmup": 4, "decay": "cosine"}
    distill = {"batch": 8, "updates": 20, "fake_turns": 2, "ema": [0.9], "export": 0.9, "generator": rates, **settings}
    return trainer_of(network, name, distill=distill, run={"mode": mode})


def captured(kind="points", **settings):
    """A trainer whose turns are taped, and the recorder."""
    trainer, recorder = distiller(kind, **settings), TapeRecorder()
    trainer.capture(recorder)
    return trainer, recorder


def trajectory(trainer, updates):
    rows = []
    for _ in range(updates):
        trainer.update()
        rows.append(trainer.meters.read())
    averages = trainer.generator_optimiser.ema[0.9].values()
    return rows, [p.detach().clone() for p in (*trainer.generator.parameters(), *averages)]


@pytest.mark.parametrize("gan", [False, True], ids=["plain", "gan"])
@pytest.mark.parametrize("kind", SETS)
def test_replays_follow_the_eager_trajectory_to_the_bit(kind, gan):
    settings = GAN if gan else {}
    trainer, recorder = captured(kind, **settings)
    rows, parameters = trajectory(trainer, WARM_UP + 3)
    expected, expected_parameters = trajectory(distiller(kind, **settings), WARM_UP + 3)
    assert rows == expected
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected_parameters, strict=True))
    # One, two and one turns an update.
    assert (recorder.runs, recorder.captures) == (4 * WARM_UP, 3)


@pytest.mark.parametrize("fake_turns", [1, 2, 5])
def test_turns_are_captured_in_the_order_in_which_they_are_replayed(fake_turns):
    """Graphs share memory: what one captured earlier is free to use must not be a later one's result by then."""
    trainer, recorder = captured(fake_turns=fake_turns)
    for _ in range(WARM_UP):
        trainer.update()
    assert not recorder.captured
    trainer.update()
    assert recorder.captured == ["_generate_rows", "_fake_step_plain", "_generator_step_plain"]


def test_two_replays_draw_different_noise_times_and_labels():
    trainer, _ = captured("labelled")
    for _ in range(WARM_UP + 1):
        trainer.update()
    assert trainer._generate.captured
    first = {name: value.clone() for name, value in trainer._generate().items()}
    second = trainer._generate()
    assert not torch.equal(first["x"], second["x"])
    assert not torch.equal(first["labels"], second["labels"])
    # The fake turn on the same rows once more: its loss changes by its times and noise, and by one small step.
    losses = {float(trainer._fake_step()["fake loss"]) for _ in range(4)}
    assert len(losses) == 4


def test_a_frozen_host_number_would_be_seen():
    """The tape does what a graph does: a seed that lives on the host repeats itself."""
    count = itertools.count()
    turn = Captured(lambda: {"draw": torch.full((), float(next(count)))}, TapeRecorder(), warm_up=1)
    assert [float(turn()["draw"]) for _ in range(4)] == [0.0, 1.0, 1.0, 1.0]


def test_loading_state_forgets_the_graphs():
    trainer, recorder = captured()
    trajectory(trainer, WARM_UP + 1)
    state = trainer.state_dict()
    state["generator"] = {name: tensor.clone() for name, tensor in state["generator"].items()}
    trainer.load_state_dict(state)
    assert not trainer._generator_step.captured
    trajectory(trainer, WARM_UP + 1)
    assert recorder.captures == 6


def test_only_captured_turns_are_phases_of_their_own():
    trainer, _ = captured()
    trainer.phases.timings = True
    trajectory(trainer, WARM_UP)
    assert "generator turn" not in trainer.phases.seconds
    assert "generator forward" in trainer.phases.seconds
    trajectory(trainer, 2)
    assert {"generate", "data", "fake turn", "generator turn"} <= set(trainer.phases.seconds)


@pytest.mark.slow
@pytest.mark.skipif(modes.why_not("compiled", "cpu") is not None, reason="torch.compile has no compiler here")
@pytest.mark.parametrize("settings", [{}, GAN], ids=["plain", "gan"])
def test_compiled_follows_the_eager_trajectory(settings):
    """Compiled kernels order sums differently: a few roundings of 6e-8 a step, amplified by the difference f* - f."""
    rows, parameters = trajectory(distiller(mode="compiled", **settings), 4)
    expected, expected_parameters = trajectory(distiller(**settings), 4)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
    for a, b in zip(parameters, expected_parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_graphs_of_eager_networks_are_a_mode(monkeypatch):
    """The turns are captured, nothing is compiled, and no number changes."""
    recorder = TapeRecorder()
    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "CudaRecorder", lambda *_: recorder)
        patch.setattr(modes, "why_not", lambda *_: None)
        patch.setattr(modes, "compiled", lambda _: pytest.fail("a network was compiled"))
        trainer = distiller(mode="graphs-eager")
    rows, parameters = trajectory(trainer, WARM_UP + 2)
    assert len(recorder.captured) == 3
    expected, expected_parameters = trajectory(distiller(), WARM_UP + 2)
    assert rows == expected
    assert all(map(torch.equal, parameters, expected_parameters))
    # No compiler is needed for it.
    monkeypatch.setattr(modes.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert modes.why_not("graphs-eager", "cuda") is None
    assert "needs the triton package" in modes.why_not("graphs", "cuda")


class FakeGraphs:
    """Stands for ``torch.cuda``'s graphs: which pool each capture used, and what generators a graph was told of.

    Like torch's allocator it refuses a pool whose graphs are all gone.
    """

    def __init__(self, monkeypatch):
        self.pools, self.told, self.alive = [], [], weakref.WeakKeyDictionary()
        self.handles = itertools.count()
        fakes = {
            "Stream": lambda _: None,
            "graph_pool_handle": lambda: next(self.handles),
            "CUDAGraph": lambda: FakeGraph(self.told),
            "graph": self.graph,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        if pool in self.pools and pool not in self.alive.values():
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.pools.append(pool)
        self.alive[graph] = pool
        yield


class FakeGraph:
    def __init__(self, told):
        self.told = told

    def register_generator_state(self, generator):
        self.told.append(generator)

    def replay(self):
        pass


def test_each_generation_of_graphs_has_a_pool_of_its_own(monkeypatch):
    """torch refuses to capture into a pool that only a kept result is left of."""
    fake, recorder = FakeGraphs(monkeypatch), modes.CudaRecorder(torch.device("cuda"))
    turns = [Captured(dict, recorder, warm_up=0) for _ in range(3)]
    for _ in range(2):
        for turn in turns:
            turn()
        for turn in turns:
            turn.reset()
    first, second = fake.pools[0], fake.pools[3]
    assert first != second
    assert fake.pools == [first] * 3 + [second] * 3


@pytest.mark.parametrize("told", [False, True])
def test_a_graph_is_told_of_generators_where_torch_asks_for_it(monkeypatch, told):
    """From torch 2.14 on telling it does nothing but warn, and will be an error."""
    fake, generator = FakeGraphs(monkeypatch), torch.Generator()
    monkeypatch.setattr(modes, "_REGISTERS", told)
    modes.CudaRecorder(torch.device("cuda"), [generator]).capture(dict)
    assert fake.told == [generator] * told


def test_many_compiled_networks_of_one_class():
    """torch.compile counts its variants by code, of which it allows eight."""
    nets = [torch.nn.Linear(size, 1) for size in range(1, 12)]
    for net in nets:
        x = torch.randn(2, net.in_features)
        torch.testing.assert_close(modes.compiled(net, "eager")(x), net(x))


def test_teacher_and_frozen_fake_model_share_their_code(monkeypatch):
    """An update compiles four graphs for its five calls: samples, fake model, generator, and these two."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(modes, "compiled", functools.partial(modes.compiled, backend=backend))
    trainer, eager = distiller(mode="compiled"), distiller()
    for _ in range(2):
        trainer.update()
        eager.update()
    assert len(graphs) == 4
    assert trainer.meters.read() == pytest.approx(eager.meters.read(), rel=1e-4)


def test_a_dropout_of_nothing_does_not_keep_networks_from_sharing_code():
    """A teacher in evaluation has its dropout still, where a frozen fake model in training has none."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    network = {**UNET, "channel_mult": [1], "use_scale_shift_norm": True}
    teacher = frozen_view(random_network({**network, "dropout": 0.1}).eval())
    fake = frozen_view(random_network({**network, "dropout": 0.0}).train())
    runs = sharing((teacher, fake), functools.partial(modes.compiled, backend=backend))
    t, x = torch.rand(2), torch.randn(2, 1, 8, 8)
    for run, net in zip(runs, (teacher, fake), strict=True):
        torch.testing.assert_close(run(t, x), net(t, x))
    assert len(graphs) == 1


def test_a_generator_of_several_steps_compiles_on_a_path_that_is_a_table():
    """Its rows are made once: making the table takes what torch.compile cannot follow."""
    several = Generator(random_network(UNET, 0.1), None, paths.build("vp-discrete"), "noise", (0.2,))
    z, step = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    run = modes.compiled(several, "eager")
    torch.testing.assert_close(run(z, None, None, step), several(z, None, None, step))


def test_modes_that_cannot_be_had_are_refused(monkeypatch):
    for mode in ("graphs", "graphs-eager"):
        with pytest.raises(UserError, match=rf"run.mode {mode} does not run on cpu: it needs a CUDA device"):
            distiller(mode=mode)
    with pytest.raises(UserError, match=r"run\.mode must be one of eager, compiled, graphs, graphs-eager; got 'fast'"):
        distiller(mode="fast")
    monkeypatch.setattr(modes.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"run.mode compiled does not run on cpu: torch.compile needs a C\+\+ comp"):
        distiller(mode="compiled")
