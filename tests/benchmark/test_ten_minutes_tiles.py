"""The sweep of tiles without a GPU: every value is in use when its kernel runs, and none stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

INTERPRETED = """
import json
from functools import partial

import torch

import ten_minutes_tiles as tiles
from prfl_kernels.builds import Shape
from prfl_kernels import attention_triton, gated_residual_norm_triton, lora_linear_triton, qk_norm_rope_triton

torch.cuda.get_device_capability = lambda: (9, 0)
chosen = dict(attention_triton.HALF_TILES[9])
rows, held = [], []

def used():
    norm = gated_residual_norm_triton.ROWS, qk_norm_rope_triton.ELEMENTS
    attention = tuple(map(tuple, attention_triton.HALF_TILES[9].values()))
    return attention, lora_linear_triton.COLUMNS, *norm

def best(call, device, runs):
    call()
    held.append(used())
    return 0.5

class Clock:
    left = staticmethod(lambda: 99)

tiles.best, before = best, used()
shape = Shape("tiny", tokens=70, width=128, heads=2, hidden=512)
sweep = partial(tiles.sweep, lambda **row: rows.append(row), Clock)
for part in (tiles.attention_tiles, tiles.lora_columns, tiles.tokens_a_program):
    part(shape, sweep)
assert used() == before and attention_triton.HALF_TILES[9] == chosen
print(json.dumps([rows, held]))
"""


@pytest.mark.slow
def test_every_value_is_in_use_when_its_kernel_runs() -> None:
    ours = os.pathsep.join(str(REPOSITORY / folder) for folder in ("", "kernels", "bench"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ours}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, held = json.loads(done.stdout.splitlines()[-1])
    assert not [row for row in rows if "failed" in row]
    assert len(held) == len(rows) and sum(row["chosen"] for row in rows) == 8  # the first of each kernel
    named = {row["row"]: tuple(used) for row, used in zip(rows, held, strict=True)}
    assert named["tiles-grad_a-Gelu-columns-256"][1] == 256
    assert named["tiles-gated_residual_norm-backward-rows-4"][2] == 4
    assert named["tiles-qk_norm_rope-elements-8192"][3] == 8192
    assert [128, 64, 4, 3] in named["tiles-forward-(128, 64, 4, 3)"][0]
