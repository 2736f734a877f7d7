"""Every surprise of YAML that the loader takes away."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfl.config.strict_yaml import parse, read_mapping
from prfl.utils.errors import PrflError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),  # PyYAML's own loader reads text
        ("5.", 5.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),  # octal in YAML 1.1
        ("1:30", "1:30"),  # sixty-based there
        ("2026-01-01", "2026-01-01"),  # a date there
        ("no", "no"),  # false there
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("1_000", "1_000"),
        ("e5", "e5"),
        ("v1", "v1"),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = parse(text, "here")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3", "here:3: the key 'a' is given twice"),
        ("x: {a: 1, a: 2}", "here:1: the key 'a' is given twice"),
        ("1: a", "here:1: a key must be text"),
        ("? [a, b]\n: c", "a key must be text"),
        ("a: &x 1\nb: *x", "here:1: anchors and aliases are not read"),
        ("b: *x", "anchors and aliases are not read"),
        ("!!python/object/apply:os.system ['true']", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("!!timestamp 2026-01-01", "the tag tag:yaml.org,2002:timestamp is not read"),
        ("!!set {a}", "the tag tag:yaml.org,2002:set is not read"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("a: [1", "here:1: expected ',' or ']'"),
        ("a: b: c", "here:1: mapping values are not allowed here"),
        ("a: 1\n--- \nb: 2", "but found another document"),
        ("a: \x00", "special characters are not allowed"),
        ("9" * 5000, "digits"),
        ("!!int abc", "invalid literal"),
    ],
)
def test_refused_with_the_line(text: str, complaint: str) -> None:
    with pytest.raises(PrflError) as caught:
        parse(text, "here")
    assert complaint in str(caught.value)


def test_laughs_are_refused_before_they_grow() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 30)]
    with pytest.raises(PrflError, match="anchors and aliases"):
        parse("\n".join(lines), "here")


def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "large.yaml").write_text("#" * ((1 << 20) + 1))
    for name, complaint in {
        "list.yaml": "not a mapping",
        "empty.yaml": "not a mapping",
        "latin.yaml": "not UTF-8 text",
        "large.yaml": "this is no config",
        "absent.yaml": "there is no such file",
        ".": "is a folder, not a file",
    }.items():
        with pytest.raises(PrflError, match=complaint) as caught:
            read_mapping(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
