"""Weights that others made, and what is wrong with them: the hub's answers, damaged files, views that lie."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from prfl.reward.critic import load_critic
from prfl.reward.public import load_network
from prfl.reward.published import published_tensors
from prfl.reward.qwen_convert import base_config
from prfl.reward.tokens import load_tokenizer
from prfl.runs.questions import load_chat
from prfl.utils.errors import PrflError
from tests.reward.test_aesthetic import tiny_clip
from tests.test_fuzz import broken, refused

# What the hub says, through huggingface_hub and transformers, but for the wire.

UNREACHED = 0
ANSWERS = {  # status and code of its answer, and what is said of it
    "gated": (403, "GatedRepo", "gives it only to those who accept its terms", "accept its terms at https://"),
    "no such repository": (
        401,
        "RepoNotFound",
        "no folder here, and no such repository",
        "log in with `hf auth login`",
    ),
    "no such revision": (404, "RevisionNotFound", "it has no such revision on the hub", "name a revision that it has"),
    "out of order": (503, "", "the hub answers 503 Service Unavailable", "try again later"),
    "out of reach": (UNREACHED, "", "the hub cannot be reached", "the folder that it was downloaded to"),
    "no such file": (404, "EntryNotFound", "cannot load the ", "give "),
}
LOADERS: dict[str, Callable[[str], Any]] = {
    "network": lambda name: load_network(CLIPModel, name, "branch", "openai/clip-vit-large-patch14"),
    "tokenizer": lambda name: load_tokenizer(name, None, "openai/clip-vit-large-patch14"),
    "critic": load_critic,
    "chat model": load_chat,
    "config": base_config,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """``hub(status, code)``: what the hub answers from now on to every question about a file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it tries again, five times
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "disabled", True)
    http = sys.modules[type(huggingface_hub.get_session()).__module__.partition(".")[0]]

    def answers(status: int, code: str) -> None:
        def answer(request: Any) -> Any:
            if status == UNREACHED:
                raise http.ConnectError("no route", request=request)
            if code == "EntryNotFound" and "/api/" in str(request.url):
                return http.Response(200, json=[], request=request)
            return http.Response(status, headers={"X-Error-Code": code} if code else {}, request=request)

        huggingface_hub.close_session()
        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(answer)))

    yield answers
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    huggingface_hub.close_session()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_hub_is_quoted(answer: str, loader: str, hub: Callable[[int, str], None]) -> None:
    status, code, what, fix = ANSWERS[answer]
    hub(status, code)
    with pytest.raises(PrflError) as caught:
        LOADERS[loader]("nobody/nothing")
    assert caught.value.where == "nobody/nothing"
    assert what in caught.value.what and fix in str(caught.value)
    assert "Request ID" not in str(caught.value) and "\n" not in caught.value.what


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_is_not_looked_for_on_the_hub(loader: str, tmp_path: Path) -> None:
    with pytest.raises(PrflError, match="there is no such folder") as caught:
        LOADERS[loader](str(tmp_path / "nothing"))
    assert "To mend it: give " in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrflError, match="cannot load the ") as caught:
        LOADERS[loader](str(tmp_path / "empty"))
    assert caught.value.where == str(tmp_path / "empty")


@pytest.mark.parametrize(
    "text", ['{"a":', "{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel"}}']
)
def test_a_damaged_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(PrflError, match="cannot load the tokenizer: .") as caught:
        load_tokenizer(str(tmp_path), None, "openai/clip-vit-large-patch14")
    assert "has tokenizer.json too" in str(caught.value)


@pytest.mark.parametrize("loader", ["tokenizer", "critic", "config"])
def test_code_that_a_folder_brings_is_not_run(loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the user asked whether it may run, which would hold up a run that nobody watches."""
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": classes}))
    with pytest.raises(PrflError, match="custom code|cannot load the "):
        LOADERS[loader](str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_network_whose_weights_are_not_finite_is_refused(tmp_path: Path) -> None:
    clip = tiny_clip()
    with torch.no_grad():
        clip.visual_projection.weight[0, 0] = float("inf")
    clip.save_pretrained(tmp_path)
    with pytest.raises(PrflError, match="not finite: visual_projection.weight") as caught:
        load_network(CLIPModel, str(tmp_path), None, "openai/clip-vit-large-patch14")
    assert "download it again" in str(caught.value)


# Files of tensors.

NUMBERS = {"layer.weight": torch.arange(12.0).view(3, 4), "layer.bias": torch.zeros(3)}


class Payload:
    """A pickle that would run code where it is not read as weights only."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never be printed",)


def tensor_faults() -> dict[str, tuple[str, object, str]]:
    """File, what is in it, and what is said of it."""
    lying, sparse = torch.zeros(1).expand(1000, 100_000), torch.eye(3).to_sparse()
    return {
        "absent": ("absent.pt", None, "there is no such file"),
        "empty": ("x.pt", b"", "cannot be read as a CLIP: "),
        "garbage": ("x.pt", b"\x80\x02garbage" * 20, "cannot be read as a CLIP: "),
        "a pickle that is cut short": ("x.pt", b"\x80\x02]q\x00(", "cannot be read as a CLIP: "),
        "garbage as safetensors": ("x.safetensors", b"\xff" * 64, "cannot be read as a CLIP: "),
        "code": ("x.pt", {"weight": Payload()}, "cannot be read as a CLIP: "),
        "a list": ("x.pt", [1.0], "holds no CLIP: it is no dictionary of tensors"),
        "numbers that are no tensors": ("x.pt", {"weight": 1.0}, "holds no CLIP: it is no dictionary of tensors"),
        "a view that lies": ("x.pt", {"weight": lying}, "'weight' is no plain tensor whose numbers"),
        "a sparse tensor": ("x.pt", {"weight": sparse}, "'weight' is no plain tensor whose numbers"),
        "not finite": ("x.pt", {**NUMBERS, "layer.bias": torch.tensor([0, float("nan")])}, "layer.bias is not finite"),
    }


@pytest.mark.parametrize("fault", tensor_faults())
def test_a_wrong_file_of_tensors_is_named(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name, content, message = tensor_faults()[fault]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(PrflError) as caught:
        published_tensors(path, "a CLIP", "give another")
    assert message in caught.value.what and caught.value.where == str(path) and "To mend it: " in str(caught.value)
    assert "must never" not in capsys.readouterr().out


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        (tmp_path / f"x{suffix}").mkdir()
        with pytest.raises(PrflError, match="is a folder, not a file"):
            published_tensors(tmp_path / f"x{suffix}", "a CLIP", "give another")


@pytest.mark.parametrize("form", ["zip", "pickle", "safetensors"])
def test_a_damaged_file_of_tensors_is_read_or_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
    if form == "safetensors":
        save_file(NUMBERS, path)
    else:
        torch.save(NUMBERS, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()

    def read(dice: random.Random) -> None:
        path.write_bytes(broken(content, dice))
        published_tensors(path, "a CLIP", "give another")

    assert 50 < refused(80, read) < 80


def test_the_wrappings_of_a_training_run_are_taken_off(tmp_path: Path) -> None:
    torch.save({"model": {f"module.{name}": value for name, value in NUMBERS.items()}, "step": 3}, tmp_path / "x.pt")
    tensors = published_tensors(tmp_path / "x.pt", "a CLIP", "give another")
    assert tensors.keys() == NUMBERS.keys() and torch.equal(tensors["layer.weight"], NUMBERS["layer.weight"])
