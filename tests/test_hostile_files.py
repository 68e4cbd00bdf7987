"""Files that strangers give: damaged by a byte, endless, or small and asking for more than there is."""

import contextlib
import io
import json
import os
import pickle
import random
import signal
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from realuid_fast import data, teachers
from realuid_fast.data import stored
from realuid_fast.errors import UserError
from realuid_fast.evaluate import classifier, fidelity, inception
from realuid_fast.jobs import config, trainers
from realuid_fast.models import checksums, pickles
from realuid_fast.models.convert import convert, edm_pickle
from realuid_fast.networks import build

NETWORK = {"kind": "mlp", "shape": [2], "width": 4, "depth": 1, "time_features": 4}
DAMAGED = "is damaged: its bytes do not have the checksum that was written with them"


@contextlib.contextmanager
def within(seconds):
    """Fails where the block does not end in time."""

    def end(*_):
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# A byte that is not what was written


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The U-Net that a run of the shipped digits exports."""
    content = {"data": {"name": "digits"}, "distill": {"batch": 4, "fake_turns": 1, "updates": 1}}
    trainer = trainers.distiller(
        config.from_mapping(content), data.load(content["data"]), teachers.load_teacher("digits")
    )
    trainer.update()
    file = tmp_path_factory.mktemp("run") / "student.safetensors"
    teachers.save(file, *trainer.exported())
    return file


def header(content):
    """The bytes of a safetensors file before its tensors."""
    return 8 + int.from_bytes(content[:8], "little")


def test_no_damaged_byte_of_an_exported_student_is_loaded(student, tmp_path):
    """Single bytes at random places: the length, the header with its padding, the checksum itself, the weights."""
    sound, rng, file = student.read_bytes(), random.Random(0), tmp_path / "student.safetensors"
    start = header(sound)
    places = [*range(8), *range(start - 8, start), *rng.sample(range(start), 120), *rng.sample(range(len(sound)), 300)]
    for place in places:
        content = bytearray(sound)
        content[place] = rng.choice([value for value in range(256) if value != sound[place]])
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"student\.safetensors"):
            teachers.load(file, role="student")
    file.write_bytes(sound)
    assert teachers.load(file, role="student").description.format == 3


def test_a_damaged_weight_is_called_that(student, tmp_path):
    content, file = bytearray(student.read_bytes()), tmp_path / "student.safetensors"
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=DAMAGED):
        teachers.load(file)


def test_a_checksum_that_was_taken_out_is_missed(student, tmp_path):
    content, file = student.read_bytes().replace(b"checksum", b"checksun", 1), tmp_path / "student.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=DAMAGED):
        teachers.load(file)


def test_files_without_a_checksum_load_as_before(student, tmp_path):
    """Those of earlier formats, and state dicts of others, which convert reads."""
    state, described = load_file(str(student)), teachers.load(student).description
    old = {**vars(described), "format": 2}
    save_file(state, str(tmp_path / "old.safetensors"), metadata={teachers.KEY: json.dumps(old)})
    found = teachers.load(tmp_path / "old.safetensors").net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    save_file(state, str(tmp_path / "foreign.safetensors"))
    converted = convert(tmp_path / "foreign.safetensors", tmp_path / "new.safetensors", network=described.network)
    assert all(torch.equal(converted.net.state_dict()[name], value) for name, value in state.items())


def test_one_network_is_one_file(student, tmp_path):
    """Two processes that export the same network write the same bytes: the metadata has one entry."""
    state, described = load_file(str(student)), teachers.load(student).description
    for name in ("a", "b"):
        teachers.save(tmp_path / name, state, described)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == student.read_bytes()


def test_shipped_networks_have_a_checksum(tmp_path, monkeypatch):
    for source in (teachers.SHIPPED["digits"], classifier.CLASSIFIER_FILE):
        content, file = bytearray(source.read_bytes()), tmp_path / source.name
        content[-3] ^= 1
        file.write_bytes(content)
        monkeypatch.setitem(teachers.SHIPPED, "digits", file)
        monkeypatch.setattr(classifier, "CLASSIFIER_FILE", file)
        classifier.digit_classifier.cache_clear()
        read = (lambda: teachers.load_teacher("digits")) if "teacher" in source.name else classifier.digit_classifier
        with pytest.raises(UserError, match="is damaged"):
            read()
        monkeypatch.undo()
    classifier.digit_classifier.cache_clear()
    assert classifier.digit_classifier()


def test_damaged_statistics_of_real_images_are_not_used(tmp_path):
    file, described = tmp_path / "s.safetensors", json.dumps({"count": 3})
    found = fidelity.Statistics(torch.zeros(2), torch.eye(2), torch.ones(3, 2), 3)
    fidelity._write(file, found, described)
    assert fidelity._read(file, described).count == 3
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged .its checksum is wrong"):
        assert fidelity._read(file, described) is None


def test_a_checksum_is_found_whatever_the_content_says(tmp_path):
    content = {"command": f'"checksum": "{"0" * 64}"', "a": {"checksum": "0" * 64}, "z": "ü"}
    (tmp_path / "f").write_bytes(checksums.with_checksum({"x": torch.ones(3)}, "key", content))
    said = json.loads(
        json.loads((tmp_path / "f").read_bytes()[8 : header((tmp_path / "f").read_bytes())])["__metadata__"]["key"]
    )
    assert checksums.matches(tmp_path / "f", said.pop(checksums.CHECKSUM))
    assert said == content


# Paths that are no regular file


def read_labels(file):
    stored.labels(file, 3, 2, "0" * 64)


READERS = {
    "checkpoint": ("c.pt", lambda file: teachers.load_teacher(file, NETWORK)),
    "network": ("c.safetensors", lambda file: teachers.load(file)),
    "pickle": ("c.pkl", lambda file: edm_pickle.read(file)),
    "converted": ("c.safetensors", lambda file: convert(file, file.parent / "o.safetensors", network=NETWORK)),
    "configuration": ("c.yaml", config.load),
    "weights": ("w.pth", inception._read),
    "weights, safetensors": ("w.safetensors", inception._read),
    "manifest": ("manifest.json", stored.read_manifest),
    "array": ("train_images.npy", lambda file: stored.Stored(file, (3, 1, 2, 2))),
    "labels": ("train_labels.npy", read_labels),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_not_opened(name, tmp_path):
    """Opening a FIFO waits for somebody to write, and reading a device need not end."""
    filename, read = READERS[name]
    for kind in ("FIFO", "folder", "device"):
        file = tmp_path / kind / filename
        file.parent.mkdir()
        if kind == "FIFO":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero")
        if kind == "folder" and name in ("checkpoint", "converted"):
            continue  # which convert takes for a model of diffusers
        with within(5), pytest.raises(UserError, match=f"it is a {kind} and not a regular file"):
            read(file)


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read_is_not_called_missing_or_damaged(name, tmp_path, monkeypatch):
    filename, read = READERS[name]
    file = tmp_path / filename
    file.write_bytes(b"content")
    opening = os.open

    def denied(path, *given, **options):
        if str(path) == str(file):
            raise PermissionError(13, "Permission denied", path)
        return opening(path, *given, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UserError) as told:
        read(file)
    assert "Permission denied" in str(told.value)
    assert "damaged" not in str(told.value)


def test_the_parts_of_a_diffusers_folder_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with within(5), pytest.raises(UserError, match=r"config\.json cannot be read: it is a FIFO"):
        convert(tmp_path, tmp_path / "o.safetensors")


# Small files that ask for much memory or time


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 7))
MERGES = "a0: &a0 {k: x}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 7))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LAUGHS, "has more than the 20,000 values that are read, aliases written out"),
        (MERGES, "has more than the 20,000 values that are read, aliases written out"),
        ("[" + "a, " * 30_000 + "]", "has more than the 20,000 values"),
        ("network: &a {x: *a}", "an alias inside itself"),
        ("network: &a {<<: *a}", "an alias inside itself"),
        ("run: " + "[" * 40 + "]" * 40, "more than 32 levels inside one another"),
        ("x: " + "a" * 20_000, "has a value of more than 10,000 characters"),
        ("# " + "a" * 2**20, "at most 1,048,576 are read"),
    ],
    ids=["aliases", "merge keys", "values", "self", "merged self", "depth", "text", "bytes"],
)
def test_configurations_are_bounded_before_anything_is_built(text, sentence, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with within(30), pytest.raises(UserError, match=sentence):
        config.load(tmp_path / "run.yaml")
    if len(text) < 2**16:
        with within(30), pytest.raises(UserError, match=sentence):
            config.nested([f"network={text}"])


def test_aliases_that_are_few_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("distill: {generator: &own {lr: 0.25, warmup: 3}, fake: {<<: *own, lr: 0.5}}")
    distill = config.load(tmp_path / "run.yaml").distill
    assert (distill.generator.lr, distill.fake.lr, distill.fake.warmup) == (0.25, 0.5, 3)


def test_bases_are_counted(tmp_path):
    for i in range(10):
        names = [str(tmp_path / f"{i + 1}.yaml")] * 10
        (tmp_path / f"{i}.yaml").write_text(json.dumps({"base": names}))
    (tmp_path / "10.yaml").write_text("run: {seed: 1}")
    with within(30), pytest.raises(UserError, match="starts from more than 64 configurations in all"):
        config.load(tmp_path / "0.yaml")
    assert config.load(tmp_path / "9.yaml").run.seed == 1


def nested(kind, levels):
    """A value that holds another one twice, and so on."""
    value = kind((1, 1))
    for _ in range(levels):
        value = kind((value, value))
    return value


class Calls:
    """Unpickled, it calls a function of a module's, by its name."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def understood(**settings):
    """The settings read from an EDM network that was pickled with ``settings``."""
    inner = edm_pickle.Inert("SongUNet", {"_init_args": (), "_init_kwargs": settings})
    return edm_pickle._settings(inner)


def test_lists_of_lists_are_no_settings_of_an_edm_network():
    sizes = {"img_resolution": 4, "in_channels": 1}
    assert understood(**sizes, channel_mult=[1, 2])["channel_mult"] == [1, 2]
    with (
        within(30),
        pytest.raises(UserError, match="setting channel_mult of its network is neither a number, nor a text"),
    ):
        understood(**sizes, channel_mult=nested(list, 24))
    with pytest.raises(UserError, match="without a size"):
        understood(**{**sizes, "img_resolution": float("inf")})


def storage(numbers):
    return torch.empty(numbers).untyped_storage()


@pytest.mark.parametrize(
    ("size", "stride"), [((2**27,), (0,)), ((2**14, 2**13), (0, 1)), ((2**27, 1), (0, 2**13))], ids=str
)
def test_a_tensor_has_no_more_elements_than_its_storage(size, stride):
    held = torch.storage.TypedStorage(wrap_storage=storage(2**13), dtype=torch.float32, _internal=True)
    with pytest.raises(UserError, match="larger than its storage"):
        edm_pickle._tensor(held, 0, size, stride)
    assert edm_pickle._tensor(held, 0, (2**6, 2**7), (2**7, 1)).shape == (64, 128)


def zipped(state, method):
    """The bytes that torch.save writes, in an archive whose storages are 16 MB of zeros, compressed or not."""
    stream, found = io.BytesIO(), io.BytesIO()
    torch.save(state, stream)
    with zipfile.ZipFile(stream) as sound, zipfile.ZipFile(found, "w", method) as archive:
        for entry in sound.infolist():
            archive.writestr(entry.filename, sound.read(entry) if "data/" not in entry.filename else bytes(2**24))
    return found.getvalue()


def new(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def old(state):
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def declaring(count):
    """An old file of torch.save that names a storage of ``count`` numbers and has none of them."""
    content = old({"a": torch.zeros(3)})
    # The number of elements stands behind the device, 'cpu'; BININT holds any.
    at = content.index(b"K\x03N", content.index(b"cpu"))
    return content[:at] + b"J" + count.to_bytes(4, "little") + content[at + 2 :]


BOMB = nested(tuple, 22)  # whose hash takes a second, and a few levels more take an hour
CONTENTS = {
    "compressed": (zipped({"a": torch.zeros(2**22)}, zipfile.ZIP_DEFLATED), "is a compressed archive"),
    "keys": (new({BOMB: 1}), "a key in it is a tuple of tuples"),
    "keys, old": (old({BOMB: 1}), "a key in it is a tuple of tuples"),
    "ordered keys": (new(OrderedDict([(BOMB, 1)])), "a key in it is a tuple of tuples"),
    "set": (new({"a": {BOMB}}), "a key in it is a tuple of tuples"),
    "storage": (declaring(2**30), "declares storages of more numbers than it has bytes"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_checkpoint_takes_no_more_than_its_bytes(name, tmp_path):
    content, sentence = CONTENTS[name]
    file = tmp_path / "net.pt"
    file.write_bytes(content)
    for read in (lambda: teachers.load_teacher(file, NETWORK), lambda: inception._read(file)):
        with within(60), pytest.raises(UserError, match=sentence):
            read()
    # The same as a tensor's content in a pickle of another kind.
    with within(60), pytest.raises(UserError, match=sentence):
        edm_pickle._storage(content)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "content",
    [{BOMB: 1}, {"a": {BOMB}}, {"a": frozenset([BOMB])}, OrderedDict([(BOMB, 1)]), Calls(OrderedDict, [(BOMB, 1)])],
    ids=["dictionary", "set", "frozen set", "ordered", "call"],
)
def test_a_pickle_has_no_key_that_takes_hours(content, protocol, tmp_path):
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(content, protocol))
    with within(60), pytest.raises(UserError, match=r"a key in it is a tuple of tuples|frozenset"):
        edm_pickle.read(tmp_path / "net.pkl")


def test_a_network_in_a_pickle_is_no_larger_than_the_file(tmp_path):
    """One storage under many names is small in a file and large in a network."""
    state = {str(i): torch.zeros(2**10) for i in range(8)}
    content = {"ema": edm_pickle.Inert("EDMPrecond")}
    content["ema"].attributes = {"_modules": {"model": edm_pickle.Inert("SongUNet")}, "sigma_min": 0.0}
    content["ema"].attributes |= {"sigma_max": 80.0, "sigma_data": 0.5}
    sizes = {"img_resolution": 4, "in_channels": 1}
    inner = {"_init_args": (), "_init_kwargs": sizes, "_parameters": state, "_buffers": {}, "_modules": {}}
    content["ema"].attributes["_modules"]["model"].attributes = inner
    file = tmp_path / "net.pkl"
    file.write_bytes(bytes(2**14))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edm_pickle._Reader, "load", lambda self: content)
        with pytest.raises(UserError, match="its parameters take more bytes than the file has"):
            edm_pickle.read(file)
        file.write_bytes(bytes(2**15))
        assert len(edm_pickle.read(file)[0]) == 8


def test_what_checkpoints_hold_is_still_read():
    """Keys and values as training loops save them, in archives and in old files."""
    net = build(NETWORK)
    content = {"net": net.state_dict(), 0.999: 1, (1, 2): "flat", "set": {1, 2}, "betas": ((0.9, 0.99), [1, (2, (3,))])}
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.rand(2), torch.randn(2, 2)).sum().backward()
    optimiser.step()
    content["optim"] = optimiser.state_dict()
    for written in (new(content), old(content)):
        found = pickles.load(io.BytesIO(written), "it")
        assert found[1, 2] == "flat"
        assert all(torch.equal(found["net"][name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2) * 1j, "complex"),
    ],
)
def test_a_state_dict_holds_plain_tensors(value, name, tmp_path):
    torch.save({name: value}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=f"holds {name} as no plain tensor of real numbers"):
        teachers.load_teacher(tmp_path / "net.pt", NETWORK)


@pytest.mark.parametrize("averages", [[1], {"a": 1}, {None: 1}, {0.9: [1]}], ids=str)
def test_averages_that_are_none_are_a_sentence(averages, tmp_path):
    torch.save({"ema_models": averages}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"averages that are not told apart|holds no state dict"):
        teachers.load_teacher(tmp_path / "net.pt", NETWORK)


def test_a_terabyte_without_a_byte_on_disk_is_not_read(tmp_path):
    """A sparse file: of labels, of weights, of a configuration, of an array that verify would read whole."""

    def long(name, start=b""):
        (tmp_path / name).write_bytes(start)
        os.truncate(tmp_path / name, 2**40)
        return tmp_path / name

    labels = io.BytesIO()
    np.save(labels, np.zeros(3, np.int32))
    with within(30):
        with pytest.raises(UserError, match="it has 1,099,511,627,776 bytes, and at most 140 are read"):
            read_labels(long("train_labels.npy", labels.getvalue()))
        with pytest.raises(UserError, match=r"and at most 1,073,741,824 are read"):
            inception._read(long("w.pth"))
        with pytest.raises(UserError, match=r"and at most 1,048,576 are read"):
            config.load(long("run.yaml"))
        with pytest.raises(UserError, match="is no manifest"):
            stored.read_manifest(long("m.json"))
        split = stored.Split(3, stored.File("train_images.npy", 704, "0" * 64), None)
        (tmp_path / stored.MANIFEST).write_text(stored.Manifest((3, 8, 8), (), "as it is", "x", split, split).text())
        long("train_images.npy")
        with pytest.raises(UserError, match="has 1099511627776 bytes, the manifest says 704"):
            stored.verify(tmp_path)
