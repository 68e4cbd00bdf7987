"""The Triton kernels' arithmetic without a GPU: every variant in Triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[float, float]]:
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "REALUID_FAST_BACKEND": ""}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["case"]: (row["error"], row["tolerance"]) for row in rows}


@pytest.mark.parametrize(
    "op",
    [
        "normals",
        "interpolate",
        "matching",
        "fake",
        "generator",
        "guided_fake",
        "guided_generator",
        "q_rows_generator",
        "mean_abs_error",
        "guided_mean_abs_error",
        "scale",
        "second_grid_axis",
        "philox",
        "begin_step_",
        "adam_",
        "norm_silu",
        "norm_silu_grads",
        "group_norm",
        "group_norm_grads",
    ],
)
def test_agrees_with_float64(cases: dict[str, tuple[float, float]], op: str) -> None:
    mine = {name: pair for name, pair in cases.items() if name.startswith(f"{op}/")}
    assert mine
    wrong = {name: pair for name, pair in mine.items() if not pair[0] <= pair[1]}
    assert not wrong


def test_every_variant_ran(cases: dict[str, tuple[float, float]]) -> None:
    for op in ("interpolate", "matching", "fake", "generator"):
        text = " ".join(name for name in cases if name.startswith(f"{op}/"))
        for word in ("float32", "bfloat16", "key", "tensor", "channels", "odd_row", "overlapping_tail", "video"):
            assert word in text.replace("images_8x8", "channels_last"), (op, word)
