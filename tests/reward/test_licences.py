"""The licences of the weights that a run follows: printed once, as the page of rewards has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfl.backbone import Backbone
from prfl.config import load_config
from prfl.config.sections.public_rewards import CallableConfig, CriticConfig
from prfl.factory.reward import PUBLIC_REWARDS, load_public_rewards
from prfl.utils.console import forget_warnings
from tests.reward.tiny_rewards import save_tiny_rewards

REPOSITORY = Path(__file__).parents[2]
SECTIONS = [section for section in PUBLIC_REWARDS if section is not CallableConfig]


def test_conditions_are_printed_once(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    sections = save_tiny_rewards(tmp_path)
    chosen = ", ".join(f"{name}: {sections[name]}" for name in ("action", "clip", "mps"))
    reward = f"reward={{space: pixel, shape: linear, {chosen}}}"
    config = load_config(REPOSITORY / "configs/tiny/vader.yaml", [reward])
    forget_warnings()
    for _ in range(2):  # a run may load its reward again, for its samples
        load_public_rewards(config, tiny_backbone)
    lines = [line for line in capsys.readouterr().out.splitlines() if "licence" in line]
    assert sorted(lines) == [
        "warning: the licence of the weights of reward.action: CC-BY-NC-4.0: not for commercial use",
        "warning: the licence of the weights of reward.mps: none is stated with them; ask their authors",
    ]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.key)
def test_conditions_are_those_of_the_page(section: type) -> None:
    page = (REPOSITORY / "docs/rewards.md").read_text(encoding="utf-8")
    table = page.split("| key | licence of the weights |")[1].split("\n\n")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{section.key.removeprefix('reward.')}` |")]
    written = row.split("|")[2]
    has_conditions = "not commercial" in written or "none is stated" in written
    assert has_conditions == bool(section.licence), row
    assert not has_conditions or written.split()[0].rstrip(":") in section.licence


def test_of_a_critic_the_licence_is_that_of_its_model() -> None:
    assert "not for commercial use" in CriticConfig(model="Qwen/Qwen2.5-VL-3B-Instruct").conditions()
    assert not CriticConfig().conditions() and not CriticConfig(model="Qwen/Qwen2.5-VL-7B-Instruct").conditions()
