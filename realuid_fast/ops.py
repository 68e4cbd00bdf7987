"""The operators: schema, shapes and autograd, defined once; implementations are registered per device elsewhere.

The library ``realuid_fast`` dispatches on the tensors' device and falls back on the plain torch reference. The library
``realuid_fast_reference`` has the same operators with the reference alone, which is what the backend override
``"torch"`` selects.

A kernel operator (``generator``) returns loss, rows' losses and gradients from one pass, and has no autograd itself.
Its loss operator (``generator_loss``) is the differentiable face: backward hands those gradients on, scaled by the
incoming one. There is no second derivative and no forward-mode derivative: both are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, reference
from .errors import UserError

# The operators that backends implement, each in one pass. The switches say which gradients are wanted; others come back
# empty.
KERNELS = (
    "normal_like(Tensor key, Tensor like, int noise_rows) -> Tensor",
    "interpolate(Tensor x, Tensor coef, Tensor noise, Tensor? endpoint, int noise_rows) -> Tensor",
    "interpolate_grads(Tensor grad, Tensor coef, bool want_x, bool want_endpoint) -> (Tensor, Tensor)",
    "mean_abs_error(Tensor teacher_out, Tensor x, Tensor? x_t, Tensor coef, Tensor? teacher_uncond, Tensor? guidance) "
    "-> Tensor",
    "matching(Tensor out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, Tensor? endpoint, int noise_rows, "
    "bool mean, bool want_out) -> (Tensor loss, Tensor rows, Tensor g_out)",
    "fake(Tensor fake_out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, Tensor? teacher_out, Tensor? endpoint, "
    "int noise_rows, int n_real, float a_gen, float b_gen, float d_gen, float c_gen, float a_real, float b_real, "
    "float d_real, float c_real, bool mean, bool want_fake) -> (Tensor loss, Tensor rows, Tensor g_fake)",
    "generator(Tensor teacher_out, Tensor fake_out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, "
    "Tensor? endpoint, float alpha, float beta, float q, float kappa, bool mean, bool want_teacher, bool want_fake, "
    "bool want_x, bool want_x_t) -> (Tensor loss, Tensor rows, Tensor g_teacher, Tensor g_fake, Tensor g_x, "
    "Tensor g_x_t)",
    # The fake and generator losses with a guided teacher, teacher_uncond + guidance (teacher_out - teacher_uncond).
    # They are operators of their own, so that calls without guidance carry no more arguments.
    "guided_fake(Tensor fake_out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, Tensor teacher_out, "
    "Tensor? endpoint, Tensor teacher_uncond, Tensor guidance, int noise_rows, int n_real, float a_gen, float b_gen, "
    "float d_gen, float c_gen, float a_real, float b_real, float d_real, float c_real, bool mean, bool want_fake) "
    "-> (Tensor loss, Tensor rows, Tensor g_fake)",
    # q_rows (R,) takes the place of q, with or without guidance.
    "guided_generator(Tensor teacher_out, Tensor fake_out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, "
    "Tensor? endpoint, Tensor? teacher_uncond, Tensor? guidance, Tensor? q_rows, float alpha, float beta, float q, "
    "float kappa, bool mean, bool want_teacher, bool want_fake, bool want_x, bool want_x_t, bool want_uncond) "
    "-> (Tensor loss, Tensor rows, Tensor g_teacher, Tensor g_fake, Tensor g_x, Tensor g_x_t, Tensor g_uncond)",
    "scale_grads_(Tensor(a!)[] grads, Tensor scale) -> ()",
    # The optimiser step: a pass over the gradients, then a pass over everything. counts is (updates, skipped updates).
    "begin_step_(Tensor[] grads, Tensor(a!)[] steps, Tensor(b!) counts) -> Tensor",
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, "
    "Tensor norm, Tensor step, Tensor lr, Tensor counts, Tensor ema_decays, float clip, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize, bool ema_warmup) -> ()",
)

# The networks' layers, on images in channels_last order; the parameters are float32, or float64 for float64 images.
LAYERS = (
    # Stride 1, padding 1; the filters in float32 whatever the images' type.
    "conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "conv3x3_grads(Tensor grad, Tensor x, Tensor weight, bool want_x, bool want_weight) -> (Tensor, Tensor)",
    # Group normalisation of x + shift, then SiLU; statistics are every group's mean and inverse deviation.
    "norm_silu(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps) "
    "-> (Tensor y, Tensor statistics)",
    "norm_silu_grads(Tensor grad, Tensor x, Tensor? shift, Tensor weight, Tensor bias, Tensor statistics) "
    "-> (Tensor g_x, Tensor g_shift, Tensor g_weight, Tensor g_bias)",
)


class Loss(NamedTuple):
    """A loss operator ``<kernel>_loss``: the kernel's arguments up to ``mean``, differentiable in some of them."""

    kernel: str
    differentiable: tuple[int, ...]  # positions of the inputs that the kernel's gradients belong to


LOSSES = (
    Loss("matching", (0,)),
    Loss("fake", (0,)),
    Loss("generator", (0, 1, 2, 3)),
    Loss("guided_fake", (0,)),
    Loss("guided_generator", (0, 1, 2, 3, 7)),
)

# The function that runs a differentiable operator in eager mode, by library and operator.
_EAGER: dict[tuple[str, str], Callable[..., Any]] = {}


def current(device: torch.device) -> Any:
    """The operator namespace that the backend in force selects for tensors on ``device``."""
    reference_only = backends.select(device) == "torch"
    return torch.ops.realuid_fast_reference if reference_only else torch.ops.realuid_fast


def run(op: str, device: torch.device, *inputs: Any) -> Any:
    """Call a differentiable operator of the backend in force, without torch's dispatcher if nothing needs it.

    The dispatcher would reach the same function, but it converts every argument to C++ and back. On a few samples that
    takes as long as the kernel.
    """
    namespace = current(device)
    if (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.overrides.has_torch_function(inputs)
    ):
        return getattr(namespace, op)(*inputs)
    return _EAGER[namespace.name, op](*inputs)


def _losses_like(x: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    return coef.new_empty(()), coef.new_empty(x.shape[0])


def _like_if(wanted: bool, like: Tensor) -> Tensor:
    return torch.empty_like(like) if wanted else like.new_empty(0)


def _shapes_normal_like(key: Tensor, like: Tensor, noise_rows: int) -> Tensor:
    return torch.empty_like(like)


def _shapes_interpolate(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _shapes_interpolate_grads(grad: Tensor, coef: Tensor, want_x: bool, want_endpoint: bool) -> tuple[Tensor, ...]:
    return _like_if(want_x, grad), _like_if(want_endpoint, grad)


def _shapes_mean_abs_error(teacher_out: Tensor, x: Tensor, x_t: Tensor | None, coef: Tensor, *_: Any) -> Tensor:
    return coef.new_empty(x.shape[0])


def _shapes_matching(out: Tensor, x: Tensor, x_t: Tensor | None, coef: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *_losses_like(x, coef), _like_if(rest[-1], out)


_shapes_fake = _shapes_guided_fake = _shapes_matching


def _shapes_generator(
    teacher_out: Tensor, fake_out: Tensor, x: Tensor, x_t: Tensor | None, coef: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grads = (_like_if(want, x) for want in rest[-4:])
    return *_losses_like(x, coef), *grads


def _shapes_guided_generator(*inputs: Any) -> tuple[Tensor, ...]:
    return *_shapes_generator(*inputs[:-1]), _like_if(inputs[-1] and inputs[7] is not None, inputs[2])


def _shapes_scale_grads_(grads: Sequence[Tensor], scale: Tensor) -> None:
    return None


def _shapes_begin_step_(grads: Sequence[Tensor], *_: Any) -> Tensor:
    return grads[0].new_empty(())


def _shapes_adam_(*_: Any) -> None:
    return None


def _images(like: Tensor, channels: int) -> Tensor:
    batch, _, *sides = like.shape
    return like.new_empty((batch, channels, *sides)).to(memory_format=torch.channels_last)


def _shapes_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _images(x, weight.shape[0])


def _shapes_conv3x3_grads(
    grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, ...]:
    return _images(x, x.shape[1]) if want_x else x.new_empty(0), _like_if(want_weight, weight)


def _shapes_norm_silu(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Any:
    return _images(x, x.shape[1]), weight.new_empty((x.shape[0], groups, 2))


def _shapes_norm_silu_grads(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    g_shift = weight.new_empty(0) if shift is None else weight.new_empty(x.shape[:2])
    return _images(x, x.shape[1]), g_shift, weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])


def _checked(library: str, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which refuses all but plain dense tensors of one device and records nothing for autograd.

    torch dispatches on the most specialised tensor among the arguments. So one meta or quantised tensor sends the whole
    call here, and its ordinary tensors would get a result that nobody computed.
    """

    def checked(*inputs: Any) -> Any:
        arguments = getattr(getattr(torch.ops, library), op).default._schema.arguments
        first = None
        # Not strict: the dispatcher leaves off trailing arguments that have their default value.
        for argument, value in zip(arguments, inputs, strict=False):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
                    raise UserError(
                        f"{argument.name} must be a plain dense tensor, neither sparse, quantised nor nested"
                    )
                first = first or (argument.name, tensor.device)
                if tensor.device != first[1]:
                    raise UserError(f"{argument.name} must be on {first[1]} like {first[0]}, not on {tensor.device}")
        with torch.no_grad():
            return function(*inputs)

    return checked


def _refuse_second_derivative(grad: Tensor, call: str) -> None:
    # A traced backward runs in grad mode too, so only plain tensors tell that create_graph was asked for.
    if type(grad) is Tensor and torch.is_grad_enabled():
        raise RuntimeError(f"{call} has no second derivative: call backward without create_graph=True")


def refuse_forward_mode(call: str, inputs: Sequence[Any]) -> None:
    """Refuse inputs with a forward-mode tangent: autograd would take a kernel's missing derivative for zero."""
    # Outside torch.func.jvp and forward_ad.dual_level no tensor has a tangent, so the check ends here.
    if forward_ad._current_level < 0:
        return
    for tensor in inputs:
        while isinstance(tensor, Tensor):
            # Nested transforms wrap a tensor once each, and any of the layers may carry the tangent.
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            batched = wrapped and torch._C._functorch.is_batchedtensor(tensor)
            if not batched and forward_ad.unpack_dual(tensor).tangent is not None:
                raise UserError(
                    f"{call} has no forward-mode derivative: take its gradient with backward or torch.autograd"
                )
            tensor = torch._C._functorch.get_unwrapped(tensor) if wrapped else None


def _scaled(kernel: Any, grads: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """The kernel's gradients times the incoming gradient, in the kernel's own buffers. The host reads no value."""
    if type(scale) is not Tensor:
        # The call is being traced: use plain arithmetic, which the compiler can fuse with later operations.
        return [(grad * _per_row(scale, grad)).to(grad.dtype) for grad in grads]
    if torch._C._autograd._get_current_graph_task_keep_graph():
        # A second backward will come for the same gradients, so this one must not scale them in place.
        grads = [grad.clone() for grad in grads]
    getattr(torch.ops, kernel.namespace).scale_grads_(grads, scale.contiguous())
    return list(grads)


def _per_row(scale: Tensor, grad: Tensor) -> Tensor:
    return scale if scale.dim() == 0 else scale.view(-1, *[1] * (grad.dim() - 1))


class _LossFunction(torch.autograd.Function):
    """Runs a loss kernel in the forward pass, keeps the gradients it computed, and hands them on in the backward pass.

    Only the tensors that want a gradient (``leaves``) are arguments that autograd sees. It spends time on every
    argument, in both directions, and a kernel has up to twenty.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Any, wants: list[bool], inputs: tuple[Any, ...], *leaves: Tensor) -> Tensor:
        mean, rows, *grads = kernel(*inputs, *wants)
        ctx.kernel = kernel
        ctx.save_for_backward(*itertools.compress(grads, wants))
        return mean if inputs[-1] else rows

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative(scale, f"{ctx.kernel._opname}_loss")
        return None, None, None, *_scaled(ctx.kernel, ctx.saved_tensors, scale)


def _define_loss(library: torch.library.Library, name: str, loss: Loss) -> None:
    kernel_schema = next(schema for schema in KERNELS if schema.startswith(f"{loss.kernel}("))
    arguments = kernel_schema[kernel_schema.index("(") + 1 : kernel_schema.index(", bool want")]
    op = f"{loss.kernel}_loss"
    library.define(f"{op}({arguments}) -> Tensor")
    kernel = getattr(getattr(torch.ops, name), loss.kernel).default
    coef = [part.split()[1] for part in arguments.split(", ")].index("coef")

    def without_gradients(*inputs: Any) -> Tensor:
        mean, rows, *_ = kernel(*inputs, *(False for _ in loss.differentiable))
        return mean if inputs[-1] else rows

    def with_gradients(*inputs: Any) -> Tensor:
        refuse_forward_mode(op, inputs)
        if torch.is_grad_enabled():
            leaves = [inputs[i] for i in loss.differentiable]
            wants = [leaf is not None and leaf.requires_grad for leaf in leaves]
            if True in wants:
                return _LossFunction.apply(kernel, wants, inputs, *itertools.compress(leaves, wants))
        return without_gradients(*inputs)

    def shapes(*inputs: Any) -> Tensor:
        rows = inputs[coef]
        return rows.new_empty(() if inputs[-1] else rows.shape[0])

    library.impl(op, without_gradients, "CompositeExplicitAutograd")
    library.impl(op, with_gradients, "Autograd")
    _EAGER[name, op] = with_gradients
    torch.library.register_fake(f"{name}::{op}", _checked(name, op, shapes), lib=library)
    # Losses run in float32 under autocast, as torch's own do.
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"{name}::{op}", device, torch.float32, lib=library)


class _InterpolateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, x: Tensor, coef: Tensor, *rest: Any) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(coef)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(x, coef, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative(grad, "interpolate")
        _, want_x, _, _, want_endpoint, _ = ctx.needs_input_grad
        (coef,) = ctx.saved_tensors
        # The gradient of x_t may come back in another layout, and the operator takes dense rows.
        library = getattr(torch.ops, ctx.kernel.namespace)
        g_x, g_y = library.interpolate_grads(_dense(grad), coef, want_x, want_endpoint)
        return None, g_x if want_x else None, None, None, g_y if want_endpoint else None, None


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.is_contiguous() or is_channels_last(grad) else grad.contiguous()


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a batch of images or volumes is stored channels_last."""
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)


class _Conv3x3Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative(grad, "conv3x3")
        x, weight = ctx.saved_tensors
        return None, *_conv3x3_backward(grad, x, weight, ctx.needs_input_grad[1:])


def _conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients with respect to the images, the filters and the bias, where wanted."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    want_x, want_weight, want_bias = wanted
    g_x = g_weight = None
    if want_x or want_weight:
        g_x, g_weight = torch.ops.realuid_fast.conv3x3_grads(grad, x, weight, want_x, want_weight)
    g_bias = grad.sum((0, 2, 3), dtype=weight.dtype) if want_bias else None
    return [g_x if want_x else None, g_weight if want_weight else None, g_bias]


class _NormSiluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, statistics = kernel(*inputs)
        ctx.save_for_backward(*inputs[:4], statistics)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        _refuse_second_derivative(grad, "norm_silu")
        return None, *_norm_silu_backward(grad, ctx.saved_tensors, ctx.needs_input_grad[1:5]), None, None


def _norm_silu_backward(grad: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients with respect to the images, the shift, the weight and the bias, where wanted."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.realuid_fast.norm_silu_grads(grad, *saved)
    return [g if want else None for g, want in zip(grads, wanted, strict=True)]


class NormSiluConv3x3(torch.autograd.Function):
    """``conv3x3(dropout(SiLU(norm(x + shift))))``; keeps ``x`` for the backward pass, not the convolution's input.

    The two operators are one node of the graph. It keeps half their memory and computes the normalisation again in the
    backward pass. With ``dropout``, a probability, it also keeps the mask, one byte for each value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        groups: int,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        dropout: float,
    ) -> Tensor:
        y, statistics = torch.ops.realuid_fast.norm_silu(x, shift, norm_weight, norm_bias, groups, eps)
        kept = None
        if dropout:
            kept = torch.empty_like(y, dtype=torch.bool).bernoulli_(1 - dropout)
            y = _dropped(y, kept, dropout)
        ctx.save_for_backward(x, shift, norm_weight, norm_bias, statistics, weight, kept)
        ctx.groups, ctx.eps, ctx.dropout = groups, eps, dropout
        return torch.ops.realuid_fast.conv3x3(y, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative(grad, "norm_silu with conv3x3")
        *of_norm, weight, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # Only the filters' gradient reads the convolution's input. The images' gradient needs nothing but its shape.
        y = of_norm[0]
        if wanted[6]:
            y = torch.ops.realuid_fast.norm_silu(*of_norm[:4], ctx.groups, ctx.eps)[0]
            y = _dropped(y, kept, ctx.dropout)
        g_y, g_weight, g_bias = _conv3x3_backward(grad, y, weight, (any(wanted[:4]), *wanted[6:8]))
        del y
        grads = (
            [None] * 4 if g_y is None else _norm_silu_backward(_dropped(g_y, kept, ctx.dropout), of_norm, wanted[:4])
        )
        return *grads, None, None, g_weight, g_bias, None


def _dropped(values: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    """Set ``values`` that are not ``kept`` to zero, and scale the rest so that the mean stays the same; in place."""
    return values if kept is None else values.mul_(kept).mul_(0.0 if dropout == 1 else 1 / (1 - dropout))


def _differentiate(library: torch.library.Library, name: str, op: str, function: Any) -> None:
    """Register ``function`` as the operator's autograd; a call costs less than by torch.library's own way."""
    kernel = getattr(getattr(torch.ops, name), op).default

    def with_gradients(*inputs: Any) -> Any:
        refuse_forward_mode(op, inputs)
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            return function.apply(kernel, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*inputs)

    library.impl(op, with_gradients, "Autograd")
    _EAGER[name, op] = with_gradients


DIFFERENTIABLE = {"interpolate": _InterpolateFunction, "conv3x3": _Conv3x3Function, "norm_silu": _NormSiluFunction}


def _define(name: str) -> torch.library.Library:
    library = torch.library.Library(name, "DEF")
    for schema in (*KERNELS, *LAYERS):
        op = schema[: schema.index("(")]
        library.define(schema)
        library.impl(op, _checked(name, op, getattr(reference, op)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{name}::{op}", _checked(name, op, globals()[f"_shapes_{op}"]), lib=library)
        if op in DIFFERENTIABLE:
            _differentiate(library, name, op, DIFFERENTIABLE[op])
        elif not op.endswith("_"):
            # Gradients are computed with these operators; no gradient flows through their own results.
            library.impl(op, torch.library.fallthrough_kernel, "Autograd")
    for loss in LOSSES:
        _define_loss(library, name, loss)
    return library


# The libraries live as long as these names do.
_LIBRARIES = (_define("realuid_fast"), _define("realuid_fast_reference"))
backends.load()
