"""What pydantic found, in a user's words: the place, what is wrong, the nearest known key."""

from __future__ import annotations

import difflib
import re
import reprlib
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel], most: int | None = None) -> list[str]:
    """Each problem of a file that should have been a `root`, or the first `most` of them."""
    return [_explain_one(e, root) for e in error.errors(include_url=False)[:most]]


def _explain_one(e: Any, root: type[BaseModel]) -> str:
    loc = [cut(str(part)) for part in e["loc"]]
    kind, model = e["type"], _model_at(e["loc"], root)
    place = ".".join(map(cut, _without_tags(e["loc"], root)))
    if kind == "extra_forbidden":
        known = sorted(model.model_fields) if model else []
        if loc[-1] in _QUANTIZATION and model and (own := _tag(model)) in _QUANTIZED_TWINS:
            return f"{place}: method {own} has none; {_QUANTIZED_TWINS[own]}"
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.55)
        tail = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{place}: unknown key; {tail}"
    if kind == "missing":
        return f"{place}: this key is needed"
    if kind == "union_tag_invalid":
        known = [tag.strip("' ") for tag in e["ctx"]["expected_tags"].split(",")]
        tag = cut(str(e["ctx"]["tag"]))
        near = difflib.get_close_matches(tag, known, n=1)
        tail = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
        return f"{place}.name: {tag!r} is not known; {tail}"
    if kind == "union_tag_not_found":
        return f"{place}: needs a `name` that says which one it is"
    if kind == "value_error":
        return f"{place}: {e['ctx']['error']}" if place else str(e["ctx"]["error"])
    words = re.findall(r"'([^']*)'", e["ctx"]["expected"]) if kind == "literal_error" else []
    if len(words) > 1 and isinstance(e["input"], str):
        near = difflib.get_close_matches(cut(e["input"]), words, n=1)
        tail = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(words)}"
        return f"{place}: {cut(e['input'])!r} is not known; {tail}"
    return f"{place}: {e['msg'][0].lower()}{e['msg'][1:]} (here: {cut(_SHOWN.repr(e['input']))})"


_SHOWN = reprlib.Repr()
"""Values as far as a line has room for them: one from the network may be a mebibyte, and nested a thousand deep."""
_SHOWN.maxlevel = 6
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxset = _SHOWN.maxdict = 40
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 200


def cut(text: str) -> str:
    """As much of it as a line has room for."""
    return text if len(text) < 80 else text[:77] + "…"


_QUANTIZATION = ("quantization", "double_quantization", "quantize", "load_in_4bit", "bits", "nf4")
_QUANTIZED_TWINS: dict[str | None, str] = {
    "lora": "method.name: qlora is LoRA over a base in NF4",
    "dora": "method.name: qdora is DoRA over a base in NF4",
    "qlora": "its base is in NF4 as it is",
    "qdora": "its base is in NF4 as it is",
    "full": "weights in NF4 cannot be trained; method.name: qlora trains an adapter over a base in NF4",
    "freeze": "weights in NF4 cannot be trained; method.name: qlora trains an adapter over a base in NF4",
}
"""What to do about a quantized base where a method has no key for it."""


def _walk(loc: tuple[Any, ...], root: type[BaseModel]):
    """Yields (part of an error's location, whether it is a key of the file, the model that follows it)."""
    model: Any = root
    for part in loc:
        if isinstance(part, int):
            yield part, True, model
            continue
        if get_origin(model) is dict:  # of models, by names that the file chooses
            model = get_args(model)[1]
            yield part, True, model
            continue
        members = _members(model)
        if len(members) > 1 and (tagged := [m for m in members if _tag(m) == part]):
            model = tagged[0]
            yield part, False, model
            continue
        owner = members[0] if members else None
        field = owner.model_fields.get(part) if owner else None
        if owner and field is None and part in ("str", "int", "float", "literal['all-linear']", "list[str]"):
            yield part, False, model
            continue
        is_key = owner is not None
        model = field.annotation if field else None
        yield part, is_key or field is not None, model


def _without_tags(loc: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    parts = [str(part) for part, is_key, _ in _walk(loc, root) if is_key]
    return parts or [str(part) for part in loc]


def _model_at(loc: tuple[Any, ...], root: type[BaseModel]) -> type[BaseModel] | None:
    model: Any = root
    for _, _, found in _walk(loc[:-1], root):
        model = found
    members = _members(model)
    return members[0] if members else None


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The models named anywhere in an annotation: Format → [TextFormat, …], list[Source] → [Source]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _members(arg)]


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("name")
    args = get_args(field.annotation) if field else ()
    return args[0] if args else None
