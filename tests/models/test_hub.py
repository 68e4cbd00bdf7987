"""Finished networks go to and come from the Hugging Face hub; nothing is sent or downloaded here."""

import copy
import socket
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import realuid_fast as rf
from realuid_fast.errors import NotWritten, UserError
from realuid_fast.models import Loaded, files, hub

huggingface_hub = pytest.importorskip("huggingface_hub")

CONFIG = "# run 0123456789abcdef: checkpoints of other runs are refused\ndistill:\n  updates: 7\n"
TABLE = "| | distance |\n|---|---:|\n| student | 0.1234 |\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test of the hub opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def student():
    """A student that starts from the shipped teacher's weights and makes samples in two steps."""
    teacher = rf.load("digits")
    told = replace(teacher.description, role="student", t_start=0.28, times=(0.6,), teacher="digits")
    return Loaded(files.Model(copy.deepcopy(teacher.net), told))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "table.md").write_text(TABLE)
    return folder


def test_a_saved_student_makes_the_same_samples(student, tmp_path):
    hub.save_pretrained(student, tmp_path / "new" / "folder")
    again = rf.models.hub.from_pretrained(tmp_path / "new" / "folder")
    assert (again.is_student, again.description) == (True, student.description)
    assert torch.equal(rf.sample(again, 12, seed=3), rf.sample(student, 12, seed=3))
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["README.md", "student.safetensors"]


def test_a_saved_teacher_makes_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = rf.load("digits")
    with torch.no_grad():
        next(teacher.net.parameters()).add_(0.01)  # so that it is not the shipped one, whose name the folder has
    hub.save_pretrained(teacher, "digits")
    again = hub.from_pretrained("digits")
    z, labels = torch.randn(3, 1, 8, 8), torch.arange(3)
    assert torch.equal(again(z, labels, steps=3), teacher(z, labels, steps=3))
    assert not torch.equal(again(z, labels, steps=3), rf.load("digits")(z, labels, steps=3))


def test_a_saved_file_has_its_checksum(student, tmp_path):
    hub.save_pretrained(student, tmp_path)
    file = tmp_path / "student.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="do not have the checksum"):
        hub.from_pretrained(tmp_path)


def test_a_folder_in_use_is_replaced_only_when_asked(student, tmp_path):
    hub.save_pretrained(student, tmp_path)
    (tmp_path / "README.md").write_text("edited")
    (tmp_path / "config.json").write_text("{}")
    teacher = rf.load("digits")
    with pytest.raises(UserError, match=r"already holds student\.safetensors, README\.md: give overwrite=True"):
        hub.save_pretrained(teacher, tmp_path)
    assert (tmp_path / "README.md").read_text() == "edited"
    assert hub.from_pretrained(tmp_path).is_student
    hub.save_pretrained(teacher, tmp_path, overwrite=True)
    assert not hub.from_pretrained(tmp_path).is_student
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "teacher.safetensors"]
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match="cannot be written"):
        hub.save_pretrained(teacher, tmp_path / "file" / "below")


def test_the_card_says_what_it_is_and_quotes_the_run(student, run):
    card = hub.model_card(student, run=run, repo="me/digits", licence="cc-by-4.0")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "license": "cc-by-4.0", "library_name": "realuid_fast", "tags": ["flow-matching", "distillation"],
    }  # fmt: skip
    for words in (
        CONFIG, TABLE, "makes a sample in 2 steps", "(1, 8, 8)", "10 classes", "Path: linear; prediction: velocity",
        "These weights: cc-by-4.0.", "arXiv:2509.22459", f"version = {{{rf.__version__}}}",
    ):  # fmt: skip
        assert words in card, words
    citation = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert paper["title"] in card
    assert citation["title"] in card
    names = [f"{person['family-names']}, {person['given-names']}" for person in paper["authors"]]
    assert " and ".join(names) in " ".join(card.split())


def test_a_card_without_a_run_or_a_licence_claims_none(student, tmp_path):
    card = hub.model_card(student)
    assert "## Configuration" not in card
    assert "## Evaluation" not in card
    assert "license:" not in card
    assert "has not stated their licence" in card
    assert hub.model_card(student, run=tmp_path) == card
    with pytest.raises(UserError, match=r"there is no folder .* of a run"):
        hub.model_card(student, run=tmp_path / "missing")


def test_the_three_lines_of_a_card_run(student, tmp_path):
    hub.save_pretrained(student, tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    found = {}
    exec(code, found)
    assert torch.equal(found["samples"], rf.sample(student, 16, seed=0))


def test_a_push_uploads_network_and_card(student, run, monkeypatch):
    calls = []

    def create(self, repo_id, **settings):
        calls.append(("create", repo_id, settings["private"], self.token))
        return types.SimpleNamespace(repo_id=repo_id)

    def upload(self, *, repo_id, folder_path, **settings):
        assert sorted(file.name for file in Path(folder_path).iterdir()) == ["README.md", "student.safetensors"]
        samples = rf.sample(rf.load(folder_path), 8, seed=1)
        card = (Path(folder_path) / "README.md").read_text()
        calls.append(("upload", repo_id, samples, card, settings["delete_patterns"], settings["commit_message"]))
        return "the commit's address"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    done = hub.push_to_hub(student, "me/digits", run=run, licence="mit", private=True, token="secret", message="First")
    assert done == "the commit's address"
    (first, (*second, samples, card, deleted, message)) = calls
    assert first == ("create", "me/digits", True, "secret")
    assert (second, deleted, message) == (["upload", "me/digits"], ["teacher.safetensors"], "First")
    assert torch.equal(samples, rf.sample(student, 8, seed=1))
    assert card == hub.model_card(student, run=run, repo="me/digits", licence="mit")
    assert "secret" not in card


def test_a_repository_is_downloaded_and_loaded(student, tmp_path, monkeypatch):
    calls = []

    def download(repo_id, **settings):
        calls.append((repo_id, settings))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"the repository me/digits holds no teacher\.safetensors or student"):
        hub.from_pretrained("me/digits")
    hub.save_pretrained(student, tmp_path)
    again = hub.from_pretrained("me/digits", revision="v1", local_files_only=True)
    assert torch.equal(rf.sample(again, 4), rf.sample(student, 4))
    assert calls[1] == (
        "me/digits",
        {
            "revision": "v1",
            "token": None,
            "cache_dir": None,
            "local_files_only": True,
            "allow_patterns": ["teacher.safetensors", "student.safetensors"],
        },
    )


def test_without_the_extra_a_transfer_says_how_to_get_it(student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = r"the package huggingface_hub is needed, pip install 'realuid-fast\[hub\]'"
    with pytest.raises(UserError, match=needed):
        hub.push_to_hub(student, "me/digits")
    with pytest.raises(UserError, match=f"there is no folder me/digits, and to look on the hub {needed}"):
        hub.from_pretrained("me/digits")
    # A local folder needs no extra.
    hub.save_pretrained(student, tmp_path)
    assert hub.from_pretrained(tmp_path).is_student
