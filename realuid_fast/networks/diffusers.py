"""U-Nets and transformers of the package diffusers (extra ``diffusers``), called as ``net(t, x, y=None)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .unet import check_null_label, scale_features, scale_layers

CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
SCALE_FEATURES = 256  # sinusoidal features of a guidance scale


class Diffusers(nn.Module):
    """A model of the package diffusers, built from its class' name and configuration alone: nothing is downloaded.

    Parameters are those of the model under the prefix ``net.``.

    Args:
        class_name: ``"UNet2DModel"``, ``"UNet2DConditionModel"`` without text (blocks without cross-attention, or with
            class labels alone), or ``"DiTTransformer2DModel"``.
        config: the content of the model's ``config.json``. Keys that the class does not know are refused if they are
            set.
        dim: ``(C, H, W)`` of the samples.
        null_label: whether the last of a U-Net's class embeddings is "no label". A transformer's configuration says it.
        negate: whether the prediction is the model's negative output.
        guided: whether it takes the scale of its guidance, a number or ``(B,)``, 1 by default. Its layers, which are
            this package's and start at zero, add to the model's every embedding of a timestep.

    Raises:
        UserError: diffusers is not installed, another class, or a configuration that the class or this adapter refuses.
    """

    def __init__(
        self,
        class_name: str,
        config: Mapping[str, Any],
        dim: Sequence[int],
        null_label: bool = False,
        negate: bool = False,
        guided: bool = False,
    ) -> None:
        super().__init__()
        if class_name not in CLASSES:
            raise UserError(f"class_name must be one of {', '.join(CLASSES)}; got {class_name!r}")
        if len(dim) != 3:
            raise UserError(f"dim must be (channels, height, width), got {tuple(dim)}")
        self.dim, self.negate = tuple(int(v) for v in dim), negate
        settings = _settings(class_name, config)
        if settings.get("in_channels", self.dim[0]) != self.dim[0]:
            raise UserError(
                f"dim {self.dim} has {self.dim[0]} channels, the {class_name} takes {settings['in_channels']}"
            )
        self.num_classes, self.null_label = _labels(class_name, settings, null_label)
        self.transformer = class_name == "DiTTransformer2DModel"
        self.text = class_name == "UNet2DConditionModel"
        try:
            self.net: nn.Module = _class(class_name)(**settings)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{class_name} refuses its configuration: {str(error).splitlines()[0]}") from None
        for module in self.net.modules():
            # Training code drops labels on purpose. Dropped inside the model, they would change a teacher's output.
            if type(module).__name__ == "LabelEmbedding":
                module.__dict__["dropout_prob"] = 0.0
        if (middle := self._middle()) is not None:
            middle.register_forward_hook(_keep)
        self.guided = guided
        if guided:
            embedders = self._embedders()
            for embedder in embedders:
                embedder.register_forward_hook(_tell)
            self.scale_embed = scale_layers(SCALE_FEATURES, embedders[0].linear_2.out_features)

    def _embedders(self) -> list[Any]:
        """The layers that embed the timestep: one in a U-Net, one in each block of a transformer."""
        return [module for module in self.net.modules() if type(module).__name__ == "TimestepEmbedding"]

    def _middle(self) -> nn.Module | None:
        """The block whose output a discriminator reads: a U-Net's middle one, or that half-way in a transformer."""
        if self.transformer:
            blocks = list(self.net.transformer_blocks)  # type: ignore[arg-type]
            return blocks[(len(blocks) - 1) // 2]
        return self.net.mid_block  # type: ignore[return-value]

    def forward(
        self,
        t: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        with_features: bool = False,
        guidance: float | Tensor = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prediction like ``x`` ``(B, C, H, W)`` at the model's timesteps ``t`` ``(B,)`` or ``()``; ``with_features``
        also the middle block's output ``(B, F, h, w)``. ``guidance`` is the scale for a network that takes it.

        The channels of a learned variance are left off.
        """
        middle = self._middle() if with_features else None
        if with_features and middle is None:
            raise UserError("distill.gan reads a U-Net's middle block, and this one has none (mid_block_type)")
        if x.shape[1:] != self.dim:
            raise UserError(f"x must have shape (batch, {', '.join(map(str, self.dim))}), got {tuple(x.shape)}")
        if (y is None) != (self.num_classes is None):
            raise UserError("y must be given to a class-conditional network and to no other")
        t = t.expand(x.shape[0]) if t.dim() == 0 else t
        if t.shape != x.shape[:1]:
            raise UserError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        arguments: dict[str, Any] = {"return_dict": False}
        if self.text:
            arguments["encoder_hidden_states"] = None
        if y is not None:
            arguments["class_labels"] = y
        if middle is not None:
            middle.__dict__["kept"] = []
        if self.guided:
            features = scale_features(guidance, x, SCALE_FEATURES)
            scale = self.scale_embed(features.to(next(self.scale_embed.parameters()).dtype))
            for embedder in self._embedders():
                embedder.__dict__["scale"] = scale
        out: Tensor = self.net(x, timestep=t, **arguments)[0][:, : self.dim[0]]
        if self.guided:
            for embedder in self._embedders():
                del embedder.__dict__["scale"]
        out = -out if self.negate else out
        if middle is None:
            return out
        (features,) = middle.__dict__.pop("kept")
        if self.transformer:
            # Tokens lie row by row.
            rows = self.dim[1] // self.net.patch_size  # type: ignore[operator]
            features = features.transpose(1, 2).unflatten(2, (rows, -1))
        return out, features


def _keep(block: nn.Module, _: object, out: Tensor) -> None:
    """A hook of the middle block: its output, while somebody waits for it."""
    if (kept := block.__dict__.get("kept")) is not None:
        kept.append(out)


def _tell(embedder: nn.Module, _: object, out: Tensor) -> Tensor:
    """A hook of an embedding of the timestep: the guidance scale's embedding is added."""
    return out + embedder.__dict__["scale"].to(out.dtype)


def _class(name: str) -> Callable[..., nn.Module]:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"this network needs the package diffusers, pip install 'realuid-fast[diffusers]': {error}"
        ) from None
    return getattr(diffusers, name)


def _settings(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's entries that the class takes."""
    if not isinstance(config, Mapping):
        raise UserError(f"config must be a mapping, got {config!r:.60}")
    known = inspect.signature(_class(class_name).__init__).parameters
    # Older releases wrote keys of several classes into one file. Those that are not set are ignored.
    unknown = [k for k, v in config.items() if not k.startswith("_") and k not in known and v not in (None, False)]
    if unknown:
        raise UserError(f"{class_name} has no setting {', '.join(sorted(unknown))}")
    return {key: value for key, value in config.items() if key in known}


def _labels(class_name: str, settings: Mapping[str, Any], null_label: bool) -> tuple[int | None, int | None]:
    """The number of classes and the null label; each None if there is none."""
    if class_name == "DiTTransformer2DModel":
        # Its embedding has one row more than classes; the last row is "no label" from training with dropped labels.
        classes = int(settings.get("num_embeds_ada_norm") or 0)
        if not classes:
            raise UserError("a DiTTransformer2DModel needs num_embeds_ada_norm, its number of classes")
        return classes, check_null_label(True, classes)
    if class_name == "UNet2DConditionModel":
        blocks = [*(settings.get("down_block_types") or ("Cross",)), settings.get("mid_block_type", "Cross") or ""]
        blocks += settings.get("up_block_types") or ("Cross",)
        if any("Cross" in str(block) for block in blocks) or settings.get("addition_embed_type"):
            raise UserError("this UNet2DConditionModel is conditioned on text, which this package does not support")
    kind, classes = settings.get("class_embed_type"), int(settings.get("num_class_embeds") or 0)
    if kind is not None:
        raise UserError(f"class_embed_type must be null, labels by number; this model has {kind!r}")
    classes -= null_label
    if classes < 1:
        check_null_label(null_label, 0)
        return None, None
    return classes, check_null_label(null_label, classes)
