"""Damaged files: every reader gives what is in them, or a UserError; nothing else, and nothing that runs code.

``REALUID_FAST_FUZZ=10000`` sets the number of damaged files of each reader. Where atheris is
installed, ``python tests/test_fuzz.py READER`` lets libFuzzer look for them, guided by what the readers cover.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import struct
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from realuid_fast import data, networks, paths, teachers
from realuid_fast.data import stored
from realuid_fast.errors import UserError
from realuid_fast.jobs import config
from realuid_fast.matching import Matching
from realuid_fast.models import files
from realuid_fast.models.checksums import CHECKSUM
from realuid_fast.models.convert import convert, diffusers_folder, edm_pickle
from realuid_fast.optim import Optimiser
from realuid_fast.train.checkpoint import MARK, SHARDED, TRAILER, Checkpoints
from realuid_fast.train.sharding import ELSEWHERE, rows_of
from realuid_fast.train.trainer import Setup, Trainer

EXAMPLES = int(os.environ.get("REALUID_FAST_FUZZ", "300"))
NETWORK = {"kind": "mlp", "shape": [2], "width": 4, "depth": 1, "time_features": 4}


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def small_network():
    torch.manual_seed(0)
    return networks.build(NETWORK)


def with_folder(write):
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder))


def checkpoint():
    state = {"step": 3, "net": small_network().state_dict(), "losses": [0.5, 0.25]}
    return [with_folder(lambda folder: Checkpoints(folder).save(3, state).read_bytes())]


def network_file():
    def write(folder):
        state, described = small_network().state_dict(), teachers.Description(network=NETWORK, format=2)
        teachers.save(folder / "net", state, teachers.Description(network=NETWORK))
        # A file of before, without the checksum that keeps all damage from going any further.
        save_file(state, str(folder / "old"), metadata={teachers.KEY: json.dumps(dataclasses.asdict(described))})
        return [(folder / name).read_bytes() for name in ("net", "old")]

    return with_folder(write)


def published():
    state = small_network().state_dict()
    return [saved(state), saved({"ema_models": {0.99: state, 0.9: state}}), saved({"net_model": state})]


class PickledModule:
    """A part of an EDM network, pickled as theirs are: by the name of a function and a dictionary."""

    def __init__(self, class_name, **state):
        self.meta = {"type": "class", "version": 6, "class_name": class_name, "module_src": "raise SystemExit"}
        self.meta["state"] = {"_parameters": {}, "_buffers": {}, "_modules": {}, **state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def _reconstruct_persistent_obj(meta):
    raise AssertionError("code of the file's ran")


def edm_pickles():
    torch.manual_seed(0)
    network = {"kind": "song-unet", "dim": [1, 4, 4], "model_channels": 4, "channel_mult": [1], "num_blocks": 1}
    root = PickledModule(
        "SongUNet", _init_args=(), _init_kwargs={"img_resolution": 4, "in_channels": 1, "num_blocks": 1}
    )
    root.meta["state"]["_init_kwargs"] |= {"model_channels": 4, "channel_mult": [1]}
    for name, value in networks.build(network).state_dict().items():
        place, (*folders, last) = root, name.split(".")
        for folder in folders:
            place = place.meta["state"]["_modules"].setdefault(folder, PickledModule("Part"))
        place.meta["state"]["_parameters"][last] = value
    outer = PickledModule("EDMPrecond", sigma_min=0.0, sigma_max=80.0, sigma_data=0.5, _modules={"model": root})
    module = sys.modules["torch_utils.persistence"] = types.ModuleType("torch_utils.persistence")
    sys.modules["torch_utils"] = types.ModuleType("torch_utils")
    name, module._reconstruct_persistent_obj = _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj
    try:
        _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
        return [pickle.dumps({"ema": outer}), pickle.dumps(outer, protocol=3)]
    finally:
        _reconstruct_persistent_obj.__module__ = name
        del sys.modules["torch_utils.persistence"], sys.modules["torch_utils"]


def schedulers():
    named = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction", "num_train_timesteps": 20}
    linear = {"beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.2, "rescale_betas_zero_snr": True}
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100}
    edm = {
        "_class_name": "EDMEulerScheduler",
        "prediction_type": "epsilon",
        "sigma_min": 0.01,
        "sigma_max": 9,
        "sigma_data": 1,
    }
    table = {**named, "trained_betas": [0.1, 0.2, 0.3, 0.4]}
    return [json.dumps(content).encode() for content in ({**named, **linear}, flow, edm, table)]


def read_scheduler(file):
    """The path of a scheduler beside a model that is always the same."""
    folder = file.parent.parent
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 4, "in_channels": 1}))
    save_file({"a": torch.zeros(1)}, str(folder / diffusers_folder.WEIGHTS))
    described = diffusers_folder.read(folder)[1]
    described.interpolant()


def manifest():
    entry = {"name": "train_images.npy", "size": 704, "sha256": "0" * 64}
    split = {"count": 3, "images": entry, "labels": {**entry, "name": "train_labels.npy"}}
    content = {"format": 1, "kind": "packed images", "shape": [3, 8, 8], "classes": ["cat", "dog"]}
    content |= {"preprocessing": "as it is", "source": "numbers", "train": split, "heldout": split}
    return [json.dumps(each).encode() for each in (content, {**content, "classes": []})]


def array():
    stream = io.BytesIO()
    np.save(stream, np.zeros((3, 3, 8, 8), np.uint8))
    return [stream.getvalue()]


def payload():
    """Checkpoints without their checksum. Damaged ones get a new one (:func:`seal`), so that the damage is read."""
    return [content[: -TRAILER.size] for content in checkpoint()]


def read_sealed(file):
    seal(file)
    return Checkpoints(file.parent).load()


def seal(file):
    content = file.read_bytes()
    digest = hashlib.sha256(content).digest()
    file.write_bytes(content + TRAILER.pack(MARK, len(content), digest))
    return digest.hex()[:16]


class Run(Trainer):
    """A trainer of the network that a checkpoint is read into; it never trains."""

    images_per_update = 1

    def __init__(self):
        net = small_network()
        optimiser, points = Optimiser(net, 1e-3), data.load({"name": "eight_gaussians", "n": 8, "n_heldout": 8})
        described = teachers.Description({})
        super().__init__(
            net, Matching(paths.Linear()), points, Setup(batch=1), {}, ["loss"], 0.0, optimiser, described
        )  # fmt: skip
        self.kept = {"net": net}

    def update(self):
        raise NotImplementedError

    def sample(self, z, labels=None, endpoint=None):
        raise NotImplementedError


def structure():
    """Nothing: a checkpoint as it is. Other contents are seeds of what is wrong in one."""
    return [b""]


WRONG = (None, 0, -1, 2**70, 0.5, math.nan, True, "", "x", "../x", [], {}, [None], {"a": 1})
WRONG += (torch.zeros(()), torch.tensor([2, 3]), torch.ones(2), torch.zeros(3, 0))
WRONG += (torch.zeros(2, dtype=torch.bool), torch.zeros(1, dtype=torch.complex64))


def read_structure(file):
    """A sharded checkpoint with some entries replaced, lost, renamed or of another size, under right checksums."""
    seed = file.read_bytes()
    rng = random.Random(seed)
    change = functools.partial(altered, rng=rng) if seed else copy.deepcopy
    folder = file.parent / "checkpoints"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    run, names = Run(), []
    whole = {name: p.shape for name, p in run.network.state_dict().items()}
    for rank in range(2):
        rows = {name: torch.ones(shape)[rows_of(shape[0], rank, 2)] for name, shape in whole.items()}
        (folder / "shard").write_bytes(saved(change({"trainer": {"net": rows}})))
        names.append(f"update-00000003.{seal(folder / 'shard')}.shard")
        (folder / "shard").rename(folder / names[-1])
    net = {name: {ELSEWHERE: list(shape)} for name, shape in whole.items()}
    own = {**run.random.own(), "meters": run.meters.state_dict()}
    content: dict = {"format": SHARDED, "shards": names}
    content["trainer"] = {"step": 3, "net": net, "noise": run.random.common(), "ranks": [own, own]}
    content |= dict.fromkeys(("log", "distances", "best", "observed"))
    (folder / "update-00000003.pt").write_bytes(saved(change(content)))
    seal(folder / "update-00000003.pt")
    run.load_state_dict(Checkpoints(folder).load().get("trainer"))


def altered(tree, rng):
    """A copy of nested dictionaries and lists with up to two of their entries changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randrange(3)):
        place = tree or {"nothing": None}
        while True:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        kind = rng.randrange(4)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[rng.choice(("x", 3, "step", "net"))] = place.pop(key)
        elif kind == 2 and isinstance(place[key], torch.Tensor):
            place[key] = (
                place[key][:-1] if place[key].dim() and rng.random() < 0.5 else place[key].double().unsqueeze(0)
            )
        else:
            place[key] = rng.choice(WRONG)
    return tree


# name: valid contents, the file's name, and what reads it. A new reader is a line here.
READERS = {
    "configuration": (
        lambda: [file.read_bytes() for file in sorted(config.CONFIGS.glob("*.yaml"))],
        "run.yaml",
        config.load,
    ),
    "checkpoint": (checkpoint, "update-00000003.pt", lambda file: Checkpoints(file.parent).load()),
    "checkpoint, sealed": (payload, "update-00000003.pt", read_sealed),
    "checkpoint's structure": (structure, "seed", read_structure),
    "network": (network_file, "net.safetensors", teachers.load),
    "edm pickle": (edm_pickles, "net.pkl", lambda file: edm_pickle.read(file)[1].interpolant()),
    "scheduler": (schedulers, "scheduler/scheduler_config.json", read_scheduler),
    "published": (published, "net.pt", lambda file: teachers.load_teacher(file, NETWORK)),
    "manifest": (manifest, "manifest.json", stored.read_manifest),
    "array": (array, "train_images.npy", lambda file: stored.Stored(file, (3, 3, 8, 8))[torch.tensor([0, 2])]),
}

# Values that damaged text and numbers tend to turn into.
WORDS = (
    b"",
    b"\0",
    b"-1",
    b"1e309",
    b".nan",
    b"null",
    b"true",
    b"[",
    b"{",
    b"}",
    b": ",
    b"&a *a",
    b"!!python/object:os.system ",
    b"\xff\xfe",
)
WORDS += (
    b"base: run.yaml\n",
    b"? {}: 1\n",
    b"2001-01-01",
    b"0x7fffffffffffffff",
    b"[[",
    b"\xed\xa0\x80",
    b"<<: ",
    b'"',
)


def damaged(contents, rng):
    """One of ``contents`` with a few bytes flipped, cut, repeated, replaced by a word, or spliced from another."""
    data = bytearray(rng.choice(contents))
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice((1, 2, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1 and i < len(data):
            data[i] = rng.randrange(256)
        elif kind == 2:
            del data[i : None if rng.random() < 0.3 else j]
        elif kind == 3:
            data[i:i] = data[i:j]
        elif kind == 4:
            data[i : rng.choice((i, j))] = rng.choice(WORDS)
        else:
            other = rng.choice(contents)
            k = rng.randrange(len(other) + 1)
            data[i:j] = other[k : k + rng.choice((1, 8, 64, 1024))]
    return bytes(data)


def attempt(name, content, folder):
    """Read ``content``; whether it was valid. Any error but UserError is a finding."""
    _, filename, read = READERS[name]
    (folder / filename).parent.mkdir(exist_ok=True)
    (folder / filename).write_bytes(content)
    rng_state = torch.get_rng_state()
    try:
        read(folder / filename)
    except UserError:
        return False
    finally:
        torch.set_rng_state(rng_state)
    return True


@pytest.mark.parametrize("name", list(READERS))
def test_what_is_valid_is_read(name, tmp_path):
    for content in READERS[name][0]():
        assert attempt(name, content, tmp_path)


@pytest.mark.parametrize("name", list(READERS))
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_in_a_sentence(name, tmp_path):
    contents, rng, refused = READERS[name][0](), random.Random(name), 0
    for i in range(EXAMPLES):
        content = damaged(contents, rng)
        try:
            refused += not attempt(name, content, tmp_path)
        except Exception as error:
            kept = Path(tempfile.gettempdir()) / f"realuid-fast-{name}-{i}"
            kept.write_bytes(content)
            raise AssertionError(f"{type(error).__name__}: {error} (the file is kept as {kept})") from error
    # Most damage matters; a mutation that never did would test nothing.
    assert refused > EXAMPLES / 10


@pytest.mark.parametrize("name", list(READERS))
def test_every_truncation_of_a_file_is_refused_or_read(name, tmp_path):
    content = READERS[name][0]()[0]
    for length in {0, 1, 2, 7, 8, 9, 16, 64, *(len(content) * k // 16 for k in range(16)), len(content) - 1}:
        attempt(name, content[:length], tmp_path)


def described_anew(file, network):
    """A network file with another description of its network, and the tensors that it had."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    description = json.loads(header["__metadata__"][teachers.KEY])
    # As a file from before there were checksums, or as one whose writer means it.
    del description[CHECKSUM]
    header["__metadata__"][teachers.KEY] = json.dumps({**description, "network": network, "format": 2})
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_a_network_too_large_for_any_machine_is_not_built(tmp_path):
    """The description is checked against the tensors in the file before memory is taken for it."""
    file = tmp_path / "net.safetensors"
    file.write_bytes(network_file()[0])
    described_anew(file, {**NETWORK, "width": 2**20})
    with pytest.raises(UserError, match="does not fit the network"):
        teachers.load(file)


UNET = {"kind": "unet", "dim": [1, 4, 4], "num_channels": 4, "channel_mult": [1, 1], "norm_groups": 4}
SONG = {"kind": "song-unet", "dim": [1, 4, 4], "model_channels": 4, "channel_mult": [1, 1], "num_blocks": 1}
THEIRS = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "attention_head_dim": 4, "norm_num_groups": 4}
BLOCKS = {"block_out_channels": [8], "layers_per_block": 1, "mid_block_type": None}
BLOCKS |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
LAYERS = {"num_attention_heads": 2, "num_layers": 1, "patch_size": 2, "num_embeds_ada_norm": 3}
DIFFUSERS = {
    name: {"kind": "diffusers", "class_name": name, "dim": [1, 4, 4], "config": THEIRS | config}
    for name, config in (("UNet2DModel", BLOCKS), ("UNet2DConditionModel", BLOCKS), ("DiTTransformer2DModel", LAYERS))
}
MANY, LEVELS = 10**12, 10_000  # so many layers would never be built
HIGH = {"dim": [1, 2**LEVELS, 2**LEVELS], "channel_mult": [1] * LEVELS}
DEEP = {
    "mlp": (NETWORK, {"depth": MANY}),
    "unet, blocks": (UNET, {"num_res_blocks": MANY}),
    "unet, levels": (UNET, HIGH),
    "song-unet, blocks and levels": (SONG, {**HIGH, "num_blocks": 256}),
    "dhariwal-unet, blocks and levels": (SONG | {"kind": "dhariwal-unet"}, {**HIGH, "num_blocks": 256}),
}
for name, network in DIFFUSERS.items():
    count = "num_layers" if "num_layers" in network["config"] else "layers_per_block"
    DEEP[f"{name}, layers"] = (network, {"config": network["config"] | {count: MANY}})
LISTS = {key: value * LEVELS for key, value in BLOCKS.items() if isinstance(value, list)}
DEEP["UNet2DModel, levels"] = (DIFFUSERS["UNet2DModel"], {"config": THEIRS | BLOCKS | LISTS})


@pytest.mark.parametrize("name", DEEP)
def test_a_network_of_too_many_layers_is_given_up(name, tmp_path):
    """A description of few bytes, and no tensor of the file is wrong but for those that it lacks."""
    network, change = DEEP[name]
    if network["kind"] == "diffusers":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    state = networks.build(network).state_dict()
    file, made = tmp_path / "net.safetensors", []
    teachers.save(file, state, teachers.Description(network))
    assert teachers.load(file).description.network == network
    torch.save(state, tmp_path / "net.pt")
    described_anew(file, network | change)
    hook = torch.nn.modules.module.register_module_parameter_registration_hook(lambda *_: made.append(1) and None)
    try:
        for read in (
            lambda: teachers.load(file),
            lambda: teachers.load_teacher(tmp_path / "net.pt", network | change),
            lambda: convert(tmp_path / "net.pt", tmp_path / "out.safetensors", network=network | change),
        ):
            made.clear()
            with pytest.raises(UserError, match=r"does not fit the network: it asks for more than [\d,]+ parameters"):
                read()
            assert len(made) < 2 * len(state) + 2 * teachers.MOST_MISSING
    finally:
        hook.remove()
    assert not (tmp_path / "out.safetensors").exists()


def test_layers_that_are_few_are_named_though_most_are_missing(tmp_path):
    network = {**NETWORK, "depth": 100}
    file = tmp_path / "net.safetensors"
    file.write_bytes(network_file()[0])
    described_anew(file, network)
    with pytest.raises(UserError, match=r"missing grow\.1\.bias, .* and 388 more"):
        teachers.load(file)
    deep = {**NETWORK, "depth": 1_000}
    state = {name: value for name, value in small_network().state_dict().items() if "modulation" not in name}
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(UserError, match="it asks for more than"):
        teachers.load_teacher(tmp_path / "net.pt", deep)
    allowed = convert(tmp_path / "net.pt", file, network=deep, allow_missing=["grow.*", "shrink.*", "modulation.*"])
    assert len(allowed.net.grow) == 1_000


def test_a_table_too_large_for_any_machine_is_not_made(tmp_path):
    """A transformer's positions are in no file: nothing else would hold them against it."""
    pytest.importorskip("diffusers")
    network = DIFFUSERS["DiTTransformer2DModel"]
    file = tmp_path / "net.safetensors"
    teachers.save(file, networks.build(network).state_dict(), teachers.Description(network))
    described_anew(file, network | {"config": network["config"] | {"sample_size": 2**20}})
    with pytest.raises(UserError, match="describes a network with tables of more than 268,435,456 numbers"):
        teachers.load(file)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"role": "teacher", "network": {}, "times": [1' + 400 * "0" + "]}"], ids=["deep", "long"]
)
def test_descriptions_that_json_alone_does_not_refuse(text, tmp_path):
    file = tmp_path / "net.safetensors"
    save_file(small_network().state_dict(), str(file), metadata={teachers.KEY: text})
    with pytest.raises(UserError, match="has a damaged description"):
        teachers.load(file)


def test_an_archive_of_several_disks_is_a_sentence(tmp_path):
    """As libFuzzer found: even the question whether a file is an archive raises then."""
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0)
    (tmp_path / "net.pt").write_bytes(bytes(100) + locator + end)
    with pytest.raises(UserError, match="is a damaged archive"):
        teachers.load_teacher(tmp_path / "net.pt", NETWORK)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run: {seed: 2001-99-99}", "is not valid YAML"),
        ("run: {seed: 0x_}", "is not valid YAML"),
        ("run: " + "[" * 100_000, "is not valid YAML"),
        (f"run: {{seed: {'9' * 5000}}}", "is not valid YAML"),
        (f"teacher: {{optimiser: {{lr: {'9' * 400}}}}}", "teacher.optimiser.lr is too large"),
        ("base: [1]", "base must be the name"),
        ("base: {file}", "starts from itself"),
        ("run: !!python/object/apply:os.system [true]", "is not valid YAML"),
        ("a: &a [*a]", "run.yaml has more than 32 levels inside one another, or an alias inside itself"),
    ],
)
def test_configurations_that_yaml_alone_does_not_refuse(text, sentence, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text.replace("{file}", str(file)))
    with pytest.raises(UserError, match=sentence):
        config.load(file)


def fuzz(name, arguments):
    """libFuzzer on one reader, from its valid contents; ends the process at the first finding."""
    import atheris

    with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(READERS[name][0]()):
            (Path(corpus) / str(i)).write_bytes(content)
        readers = (config.load, config.from_mapping, config._fill, config._value, Checkpoints.load, networks.build)
        inner = (teachers.load, files._description, teachers.published_state, teachers.load_exactly)
        others = (edm_pickle.read, edm_pickle._understood, diffusers_folder.read, diffusers_folder._path)
        others += (stored.read_manifest, stored._header)
        for function in (*readers, *inner, *others):
            atheris.instrument_func(function)

        def test_one(content):
            attempt(name, content, Path(folder))

        atheris.Setup([sys.argv[0], *arguments, corpus], test_one)
        with contextlib.suppress(SystemExit):
            atheris.Fuzz()


@pytest.mark.parametrize("name", list(READERS))
def test_libfuzzer_gets_the_reader_and_its_valid_contents(name, monkeypatch):
    """atheris is installed by whoever fuzzes; this holds the call to it against its interface."""
    instrumented, given = [], {}

    def setup(arguments, test_one):
        given["corpus"] = [file.read_bytes() for file in Path(arguments[-1]).iterdir()]
        given["test_one"], given["arguments"] = test_one, arguments[1:-1]

    def run():
        given["found"] = [given["test_one"](content) for content in [*given["corpus"], b"\0"]]
        raise SystemExit

    stub = types.SimpleNamespace(instrument_func=instrumented.append, Setup=setup, Fuzz=run)
    monkeypatch.setitem(sys.modules, "atheris", stub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz(name, ["-runs=1"])
    assert given["arguments"] == ["-runs=1"]
    # Counted: pickles of one thing may differ.
    assert len(given["corpus"]) == len(READERS[name][0]())
    # Another value would have a say in what libFuzzer keeps.
    assert given["found"] == [None] * (len(given["corpus"]) + 1)
    assert all(map(callable, instrumented))


if __name__ == "__main__":
    fuzz(sys.argv[1], sys.argv[2:])
