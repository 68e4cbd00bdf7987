"""Stand-ins for cuDNN's convolutions: its shapes and layouts, and one launch for each product of a convolution."""

import functools

import torch

from . import counts


@functools.cache
def _launcher(name):
    return counts.launcher(name)


def _launch(name):
    _launcher(name)(torch.cuda.current_stream().cuda_stream)


def _laid_out(layout, *tensors):
    """Copies where the layouts differ, as torch makes them before it calls cuDNN."""
    return [tensor.contiguous(memory_format=layout) for tensor in tensors]


def _layout(*tensors):
    """channels_last where one of the tensors has it, which is how torch chooses for cuDNN."""
    last = any(t.dim() == 4 and torch._prims_common.suggest_memory_format(t) == torch.channels_last for t in tensors)
    return torch.channels_last if last else torch.contiguous_format


def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    layout = _layout(input, weight)
    input, weight = _laid_out(layout, input, weight)
    sizes = []
    for i, size in enumerate(input.shape[2:]):
        spread = dilation[i] * (weight.shape[2 + i] - 1)
        if transposed:
            sizes.append((size - 1) * stride[i] - 2 * padding[i] + spread + output_padding[i] + 1)
        else:
            sizes.append((size + 2 * padding[i] - spread - 1) // stride[i] + 1)
    shape = len(input), weight.shape[1] * groups if transposed else len(weight), *sizes
    out = torch.empty(shape, device=input.device, dtype=input.dtype, memory_format=layout)
    _launch(f"cudnn {'transposed ' if transposed else ''}convolution {'x'.join(map(str, weight.shape[2:]))}")
    if bias is not None:
        out.add_(bias.view(1, -1, *[1] * len(sizes)))
    return out


def convolution_backward(
    grad, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
):
    layout = _layout(input, weight)
    grad, input = _laid_out(layout, grad, input)
    grads = [None, None, None]
    for i, (like, name) in enumerate(((input, "input"), (weight, "weight"))):
        if mask[i]:
            grads[i] = torch.empty_like(like, memory_format=layout)
            _launch(f"cudnn convolution, gradient of its {name}")
    if mask[2]:
        grads[2] = grad.sum([0, *range(2, grad.dim())])
    return tuple(grads)


def install():
    """Register the stand-ins; cuDNN's attention is off, torch's own takes its place. The library keeps them alive."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", convolution, "CUDA")
    library.impl("convolution_backward", convolution_backward, "CUDA")
    torch.backends.cuda.enable_cudnn_sdp(False)
    return library
