"""Reads YAML without its surprises.

Only true and false are booleans, 1e-5 is a number, and dates are text.  Keys must be text, and none may occur twice.
Anchors, aliases and tags are refused, so a file can neither expand when it is read nor name a Python object.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from prfl.utils.errors import PrflError
from prfl.utils.reading import absent, text_of

LARGEST_FILE = 1 << 20  # bytes
DEEPEST = 32  # levels of nesting

SCALARS = {  # the order matters: the first pattern that fits decides
    "null": (r"null|~|", ["n", "~", ""]),
    "bool": (r"true|false", list("tf")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        list("-+.0123456789"),
    ),
}
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in (*SCALARS, "str", "seq", "map")}


class StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        assert node is not None
        if node.tag not in PLAIN_TAGS:
            raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not read", problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


for _name, (_pattern, _first) in SCALARS.items():
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def construct_int(loader: StrictLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # 010 is ten; PyYAML by itself reads it as octal


def construct_float(loader: StrictLoader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


StrictLoader.add_constructor("tag:yaml.org,2002:int", construct_int)
StrictLoader.add_constructor("tag:yaml.org,2002:float", construct_float)


def parse(text: str, where: str) -> Any:
    """Return the value of a YAML text.  where: its file or key, for the error.  Raises PrflError with the line."""
    try:
        return yaml.load(text, StrictLoader)  # noqa: S506  (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        fix = "write plain keys and values; the files in configs/tiny show the form"
        raise PrflError(str(error.problem or error.context), where=f"{where}:{line}", fix=fix) from error
    except (yaml.YAMLError, ValueError) as error:  # unreadable characters; a number with too many digits
        raise PrflError(str(error).splitlines()[0], where=where, fix="mend the yaml at this line") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.  Raises PrflError if there is no such file, or if it holds no mapping."""
    fix = "give a config, for example configs/tiny.yaml"
    if not path.exists():
        raise absent(path, fix)
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise PrflError(f"larger than {LARGEST_FILE} bytes; this is no config", where=str(path), fix=fix)
    tree = parse(text_of(path, fix), str(path))
    if not isinstance(tree, dict):
        raise PrflError("not a mapping of keys to values", where=str(path), fix="write lines of the form `key: value`")
    return tree
