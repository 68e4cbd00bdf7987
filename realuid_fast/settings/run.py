"""The settings of a run besides training: seeds, device, logs, evaluations, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ..bounds import POSITIVE, SEED, THREADS, WHOLE, Range
from ..choices import MODES, PRECISIONS
from .field import setting


@dataclass(frozen=True)
class RunConfig:
    """All that a run does besides training: seeds, device, threads, logs, checkpoints. Intervals count updates."""

    seed: int = setting(0, "the seed of everything that is drawn", SEED)
    device: str = setting("cpu", "torch's name of a device, such as cuda")
    mode: str = setting(
        "eager",
        "how the turns of distill run: compiled takes the networks through torch.compile, graphs makes of each turn a "
        "CUDA graph on top of that, graphs-eager a CUDA graph with nothing to compile; teachers train eagerly",
        choices=MODES,
    )
    threads: int = setting(1, "torch's CPU threads, 0 to leave their number as it is", THREADS)
    channels_last: bool = setting(True, "whether image networks have their channels last in memory")
    cudnn_benchmark: bool = setting(
        False, "whether cuDNN chooses each convolution's algorithm by timing them all in its first call, on CUDA"
    )
    log_every: int = setting(10, "updates between two rows of log.csv", POSITIVE)
    sample_every: int = setting(0, "updates between two pictures of samples, 0 for none", WHOLE)
    evaluate_every: int = setting(0, "updates between two evaluations, 0 for none", WHOLE)
    evaluate_samples: int = setting(2000, "samples of an evaluation", Range(2))
    evaluate_precision: str = setting(
        "float32", "the networks' precision where an evaluation makes its samples", choices=PRECISIONS
    )
    inception: str = setting("", "a file of Inception weights, in whose features images are evaluated")
    classifier: str = setting(
        "",
        "a file of realuid-fast train-classifier, in whose features images are evaluated where run.inception is empty",
    )
    inception_only: bool = setting(
        False, "whether no other features will do: without run.inception the run is not evaluated, and says so"
    )
    real_split: str = setting(
        "heldout", "the images that Inception features are compared with", choices=("heldout", "train")
    )
    teacher_steps: int = setting(0, "the teacher's Euler steps for its line in the plot, 0 for no line", WHOLE)
    checkpoint_every: int = setting(1000, "updates between two checkpoints, 0 for one at the end", WHOLE)
    keep: int = setting(2, "checkpoints that stay on disk", POSITIVE)
    accumulate: int = setting(1, "parts in which a batch goes through the networks, to save memory", POSITIVE)
    shard: bool = setting(
        False, "whether networks, optimisers and averages are spread over the ranks (realuid_fast.train.sharding)"
    )
    offload_teacher: bool = setting(
        False, "whether the teacher stays in host memory and is brought to the GPU a layer at a time"
    )
    checkpoint_activations: bool = setting(
        False,
        "whether this package's U-Nets keep the inputs of their blocks alone and run the blocks again in the backward "
        "pass: the same gradients with less memory, for one more forward pass (realuid_fast.networks.recompute)",
    )
    stop_after_skips: int = setting(
        100, "updates in a row without a finite gradient after which the run stops, 0 for never", WHOLE
    )
    tensorboard: bool = setting(True, "whether TensorBoard's files are written, if it is installed")
    progress: bool = setting(True, "whether a bar is shown")
    timings: bool = setting(False, "whether the time of every phase of an update is logged")
    parity: bool = setting(
        False, "whether the run follows the published procedure step for step: docs/parity.md lists what that sets"
    )
