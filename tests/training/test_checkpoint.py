"""Checkpoints: whole or not at all, kept in number, refused where they do not fit."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from prfl.training.checkpoint import (
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    tidy,
)
from prfl.training.optimizer import adamw
from prfl.utils.errors import PrflError


def state(step=0, size=3, identity=None) -> TrainState:
    parameters = {"a.weight": nn.Parameter(torch.arange(float(size))), "b": nn.Parameter(torch.ones(2, 2))}
    optimizer = adamw(list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return TrainState(parameters, optimizer, None, step, identity or {})


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 400):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000030", "step-000400"]


def test_a_run_killed_while_saving_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), keep=2)

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        save_checkpoint(tmp_path, state(2), keep=2)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path, "auto").name == "step-000001"
    save_checkpoint(tmp_path, state(3), keep=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_the_same_step_can_be_saved_again(tmp_path):
    save_checkpoint(tmp_path, state(1), keep=2)
    again = state(1)
    with torch.no_grad():
        again.parameters["b"].fill_(7)
    save_checkpoint(tmp_path, again, keep=2)
    there = state()
    load_checkpoint(find_checkpoint(tmp_path, "auto"), there)
    assert there.step == 1 and torch.equal(there.parameters["b"], torch.full((2, 2), 7.0))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, name):
    path = save_checkpoint(tmp_path, state(1), keep=2)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-5])
    with pytest.raises(PrflError, match=f"damaged: {name} has {len(content) - 5} bytes, {len(content)} were written"):
        load_checkpoint(path, state())


def test_a_lying_header_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, state(1), keep=2)
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[:8] = (2**40).to_bytes(8, "little")
    (path / "weights.safetensors").write_bytes(bytes(content))
    with pytest.raises(PrflError, match="is damaged: weights.safetensors is not as it was written"):
        load_checkpoint(path, state())


def test_other_parameters_and_another_config_are_named(tmp_path):
    path = save_checkpoint(tmp_path, state(1, identity={"seed": 0, "betas": (0.9, 0.99)}), keep=2)
    with pytest.raises(PrflError, match=r"a\.weight is \(3,\) there, \(4,\) here"):
        load_checkpoint(path, state(size=4, identity={"seed": 0, "betas": (0.9, 0.99)}))
    with pytest.raises(PrflError, match="seed: 0 -> 1"):
        load_checkpoint(path, state(identity={"seed": 1, "betas": (0.9, 0.99)}))


def test_where_to_resume_from(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None and find_checkpoint(tmp_path, "none") is None
    with pytest.raises(PrflError, match="there is no checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    folder = tmp_path / "run" / "checkpoints"
    path = save_checkpoint(folder, state(5), keep=2)
    assert find_checkpoint(tmp_path, str(tmp_path / "run")) == path == find_checkpoint(tmp_path, str(path))
    assert find_checkpoint(folder, "none") is None


def test_killed_between_the_two_renames_the_old_one_comes_back(tmp_path, monkeypatch):
    """A checkpoint that is written again (a run resumed from an older one) is moved aside for a moment."""
    path = save_checkpoint(tmp_path, state(1), keep=1)
    before = (path / "weights.safetensors").read_bytes()
    replace, calls = os.replace, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise SystemExit
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(SystemExit):
        save_checkpoint(tmp_path, state(1), keep=1)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == []
    assert tidy(tmp_path, "auto") == [] and find_checkpoint(tmp_path, "auto") == path
    assert (path / "weights.safetensors").read_bytes() == before
    assert [there.name for there in tmp_path.iterdir()] == ["step-000001"]


def test_a_disk_that_is_full_leaves_the_checkpoints_before(tmp_path):
    """For real: the process may write no file of more than 1,000 bytes.  safetensors reports it in its own words."""
    resource = pytest.importorskip("resource")
    path = save_checkpoint(tmp_path, state(1), keep=1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(PrflError, match="step-000002: cannot be written: .*File too large") as error:
            save_checkpoint(tmp_path, state(2, size=1000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "takes files of this size (ulimit -f" in str(error.value)
    assert [there.name for there in tmp_path.iterdir()] == ["step-000001"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_damaged_one_of_the_right_size_is_put_aside(tmp_path):
    one, two = (save_checkpoint(tmp_path, state(step), keep=2) for step in (1, 2))
    content = (two / "optimizer.safetensors").read_bytes()
    (two / "optimizer.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert tidy(tmp_path, "auto") == [two] and find_checkpoint(tmp_path, "auto") == one


def test_an_older_one_without_hashes_is_resumed(tmp_path):
    path = save_checkpoint(tmp_path, state(1, identity={"seed": 0}), keep=1)
    facts = json.loads((path / "state.json").read_text())
    del facts["sha256"], facts["checksum"]
    (path / "state.json").write_text(json.dumps(facts))
    there = state(identity={"seed": 0})
    load_checkpoint(path, there)
    assert there.step == 1


def test_a_key_that_came_later_is_accepted_at_its_default_alone(tmp_path):
    written = {"version of this identity": 2, "training.batch": 4, "objective.sft": None}
    path = save_checkpoint(tmp_path, state(1, identity=written), keep=1)
    load_checkpoint(path, state(identity=written | {"training.accumulation": 1}))
    for later in ({"training.accumulation": 2}, {"objective.sft.every": 1}):
        with pytest.raises(PrflError, match=f"{next(iter(later))}: None -> "):
            load_checkpoint(path, state(identity=written | later))


def test_of_an_older_identity_contents_are_compared_and_places_are_not(tmp_path):
    written = {"data.cache": "/old", "reward.path": "old/reward", "reward.path (weights)": "abc", "clips": "of entries"}
    path = save_checkpoint(tmp_path, state(1, identity=written), keep=1)
    there = state(
        identity={"version of this identity": 2, "reward.path (weights)": "abc", "reward.path (settings)": "x"}
    )
    there.former = {"clips": "of entries"}
    load_checkpoint(path, there)
    there.former = {"clips": "of other entries"}
    with pytest.raises(PrflError, match="clips: 'of entries' -> 'of other entries'"):
        load_checkpoint(path, there)
    there.former, there.identity["reward.path (weights)"] = {"clips": "of entries"}, "of another"
    with pytest.raises(PrflError, match=r"reward.path \(weights\): 'abc' -> 'of another'"):
        load_checkpoint(path, there)
