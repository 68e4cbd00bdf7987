"""Finished networks to and from the Hugging Face hub, with a model card.

These are functions and not methods of :class:`.loaded.Loaded`, because a class that inherits huggingface_hub's mixin
would import huggingface_hub with this package. Only transfers import it and need the extra ``hub``; local folders and
cards do not.
"""

from __future__ import annotations

import json
from pathlib import Path

from .. import __version__
from ..errors import NotWritten, UserError
from ..files import make_folder, replacing
from .calls import needs_endpoint
from .files import ROLES, save
from .loaded import Loaded, load

_CARD = "README.md"
_FILES = tuple(f"{role}.safetensors" for role in ROLES)

_CITATION = """```bibtex
@inproceedings{kornilov2026universal,
  title = {Universal Inverse Distillation for Matching Models with Real-Data Supervision (No GANs)},
  author = {Kornilov, Nikita and Li, David and Mavrin, Tikhon and Leonov, Aleksei and Gushchin, Nikita and
            Burnaev, Evgeny and Koshelev, Iaroslav and Korotin, Alexander},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2026},
  url = {https://arxiv.org/abs/2509.22459},
}
@software{realuid_fast,
  title = {realuid_fast: fused kernels and a trainer for universal inverse distillation with real data},
  author = {{The realuid_fast authors}},
  version = {VERSION},
}
```""".replace("VERSION", __version__)


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Loaded:
    """The network of a local folder or of a repository of the hub, as :func:`realuid_fast.load` gives it.

    Args:
        source: a folder, or the name of a repository, ``"owner/name"``. A folder of that name comes first.
        revision, token, cache_dir, local_files_only: settings of ``huggingface_hub.snapshot_download``. Only the
            network's file is downloaded, and no code in it runs.

    Raises:
        UserError: the folder or the repository holds no network, its file cannot be used, or a repository is named and
            huggingface_hub is not installed. Errors of the hub itself, such as a missing repository, pass unchanged.
    """
    if Path(source).is_dir():
        return load(Path(source).resolve())  # a relative "digits" would be the shipped teacher
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"there is no folder {source}, and to look on the hub {_needs(error)}") from None
    folder = snapshot_download(
        str(source), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
        allow_patterns=list(_FILES),
    )  # fmt: skip
    if not any((Path(folder) / name).is_file() for name in _FILES):
        raise UserError(f"the repository {source} holds no {' or '.join(_FILES)}")
    return load(folder)


def save_pretrained(
    model: Loaded,
    folder: str | Path,
    *,
    run: str | Path | None = None,
    repo: str | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the network as ``student.safetensors`` or ``teacher.safetensors``, and its card as ``README.md``.

    The network's file has the format of a run's files, with its description and checksum.

    Args:
        model: a model from :func:`realuid_fast.load`.
        folder: the folder; it is made where it is missing.
        run, repo, licence: see :func:`model_card`.
        overwrite: replace the network and the card that ``folder`` holds. Other files stay.

    Raises:
        UserError: ``folder`` holds a network or a card and ``overwrite`` is not given, or it cannot be written.
    """
    folder, name = Path(folder), _file_name(model)
    card = model_card(model, run=run, repo=repo or str(folder), licence=licence)
    there = [each for each in (*_FILES, _CARD) if (folder / each).exists()]
    if there and not overwrite:
        raise UserError(f"the folder {folder} already holds {', '.join(there)}: give overwrite=True or another folder")
    try:
        make_folder(folder)
        save(folder / name, model.net.state_dict(), model.description)
        with replacing(folder / _CARD) as stream:
            stream.write(card.encode())
        for other in set(_FILES) - {name}:  # else load would find two networks
            (folder / other).unlink(missing_ok=True)
    except OSError as error:
        raise NotWritten(f"the folder {folder} cannot be written: {error.strerror or error}") from None


def push_to_hub(
    model: Loaded,
    repo: str,
    *,
    run: str | Path | None = None,
    licence: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "A network of realuid_fast",
) -> str:
    """Upload the files of :func:`save_pretrained` to a repository of the hub, and return the commit's address.

    A missing repository is made, and is public unless ``private`` is true or its owner's default is private. The upload
    replaces the repository's card, and removes a network of the other role. The card quotes ``config.yaml``, and the
    network's description holds the command that made it: the folders that these name are published with them.

    Args:
        model: a model from :func:`realuid_fast.load`.
        repo: ``"owner/name"``.
        run, licence: see :func:`model_card`.
        private, token: settings of ``huggingface_hub.ModelHubMixin.push_to_hub``.
        message: the message of the commit.

    Raises:
        UserError: huggingface_hub is not installed, or the run's folder cannot be read. Errors of the hub itself pass
            unchanged.
    """
    try:
        from huggingface_hub import ModelHubMixin
    except ImportError as error:
        raise UserError(_needs(error)) from None

    class Upload(ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            save_pretrained(model, save_directory, run=run, repo=repo, licence=licence)

    others = [name for name in _FILES if name != _file_name(model)]
    upload = Upload()
    return str(upload.push_to_hub(repo, commit_message=message, private=private, token=token, delete_patterns=others))


def model_card(
    model: Loaded, *, run: str | Path | None = None, repo: str | None = None, licence: str | None = None
) -> str:
    """The card of a network as Markdown: what it is, how it is loaded, its run, licence and citations.

    Args:
        model: a model from :func:`realuid_fast.load`.
        run: the folder of the run that made it. The card then quotes its ``config.yaml`` and ``table.md``, those that
            are there.
        repo: the repository or folder that the card's example loads.
        licence: the licence of these weights by the hub's name for it, such as ``"apache-2.0"``. The card says that
            none is stated where it is None: the weights' licence depends on the teacher and the data, not on this
            software's.

    Raises:
        UserError: ``run`` is no folder, or its files cannot be read.
    """
    role = model.description.role
    head = ["---", *([f"license: {json.dumps(licence)}"] if licence else []), "library_name: realuid_fast"]
    head += ["tags: [flow-matching, distillation]", "---"]
    bridge = needs_endpoint(model.net, model.description.interpolant())
    drawn = "len(y), endpoint=y)  # y: the endpoints to restore" if bridge else "16, seed=0)"
    example = [
        "import realuid_fast as rf",
        f"model = rf.models.hub.from_pretrained({(repo or 'OWNER/NAME')!r})",
        f"samples = rf.sample(model, {drawn}",
    ]
    stated = f"These weights: {licence}." if licence else "The publisher of these weights has not stated their licence."
    parts = [
        "\n".join(head),
        f"# A {role} of realuid_fast",
        "\n".join(_facts(model)),
        "## Samples\n\n```python\n" + "\n".join(example) + "\n```",
        *_of_run(run),
        f"## Licence\n\n{stated} The software realuid_fast: Apache-2.0.",
        f"## Citation\n\nThe method is arXiv:2509.22459.\n\n{_CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(model: Loaded) -> list[str]:
    told, count = model.description, sum(parameter.numel() for parameter in model.net.parameters())
    steps = told.evaluations
    makes = f"makes a sample in {steps} step{'s' * (steps > 1)}" if model.is_student else "is integrated by a solver"
    facts = [
        f"- This {told.role} {makes}. Its samples have shape ({', '.join(map(str, model.shape))}).",
        f"- Network: {told.network.get('kind', 'not named')}, {count:,} parameters"
        + (f", {model.classes} classes." if model.classes else ", unconditional."),
        f"- Path: {told.path}; prediction: {told.predict}.",
    ]
    if told.data.get("name"):
        facts.append(f"- Data: {told.data['name']}." + (f" {told.preprocessing}." if told.preprocessing else ""))
    return facts


def _of_run(run: str | Path | None) -> list[str]:
    """The card's sections from the files of a run's folder."""
    if run is None:
        return []
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} of a run")
    found = []
    try:
        if (folder / "table.md").is_file():
            found.append(f"## Evaluation\n\n{(folder / 'table.md').read_text().strip()}")
        if (folder / "config.yaml").is_file():
            found.append(f"## Configuration\n\n```yaml\n{(folder / 'config.yaml').read_text().strip()}\n```")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the run in {folder} cannot be read: {error}") from None
    return found


def _file_name(model: Loaded) -> str:
    return f"{model.description.role}.safetensors"


def _needs(error: ImportError) -> str:
    return f"the package huggingface_hub is needed, pip install 'realuid-fast[hub]': {error}"
