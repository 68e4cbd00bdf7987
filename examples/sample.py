"""Draw samples from a student's or a teacher's file, a finished run's folder, or a teacher that the package ships.

    python examples/sample.py digits --count 64 --out samples.png
    python examples/sample.py runs/own_loop/student.safetensors --count 1000 --label 7 --out sevens.npy

A name that ends in ``.png`` gets a picture, one that ends in ``.npy`` the numbers, float32 ``(count, ...)``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import realuid_fast as rf


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a .safetensors file, a run's folder, or a shipped name such as digits")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--label", type=int, help="one class for all samples; classes in turn where not given")
    parser.add_argument(
        "--steps", type=int, help="solver steps of a teacher, 100 where not given; a student has its own"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png or .npy file")
    options = parser.parse_args()
    if options.out.suffix not in (".png", ".npy"):
        parser.error(f"--out must end in .png or .npy, got {options.out}")

    model = rf.load(options.model)
    samples = rf.sample(model, options.count, labels=options.label, seed=options.seed, steps=options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.suffix == ".png":
        rf.save_picture(samples, options.out)
    else:
        np.save(options.out, samples.numpy())
    print(f"{len(samples)} samples of the {model.description.role} are in {options.out}")


if __name__ == "__main__":
    main()
