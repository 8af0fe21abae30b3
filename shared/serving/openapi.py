"""An OpenAPI document of the REST API, from the signatures of what is served."""

from collections.abc import Mapping
from typing import Any

from shared.serving.protocol import SignatureDef
from shared.serving.servable import DEFAULT, Servable

INTEGERS = {3, 4, 5, 6, 9, 17, 22, 23}
FLOATS = {1, 2, 14, 19}


def document(served: Mapping[str, Mapping[int, Servable]]) -> dict[str, Any]:
    """OpenAPI 3.1 for the newest version of each model: name -> number -> version."""
    paths: dict[str, Any] = {}
    for name, versions in served.items():
        if not versions:
            continue
        newest = versions[max(versions)]
        where = f"/v1/models/{name}"
        paths[where] = {"get": _call(f"State of the versions of {name}", {"type": "object"})}
        paths[f"{where}/metadata"] = {"get": _call(f"Signatures of {name}", {"type": "object"})}
        definitions = {key: one for key, one in newest.definitions.items() if not key.startswith("__")}
        # The default signature first: what a reader of the document tries.
        keys = sorted(definitions, key=lambda key: (key != DEFAULT, key))
        bodies = [_body(key, definitions[key]) for key in keys]
        answers = [_answer(definitions[key]) for key in keys]
        call = _call(f"Ask {name}, version {newest.version}", {"anyOf": answers})
        call["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"anyOf": bodies}}}}
        paths[f"{where}:predict"] = {"post": call}
    information = {"title": "Models served by Cornucopia", "version": "1", "description":
                   "TensorFlow Serving's REST API. Bytes are {\"b64\": base64}."}  # fmt: skip
    return {"openapi": "3.1.0", "info": information, "paths": paths}


def _call(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer", "content": {"application/json": {"schema": schema}}},
            "default": {"description": "an error", "content": {"application/json": {"schema": error}}},
        },
    }


def _body(key: str, definition: SignatureDef) -> dict[str, Any]:
    inputs = {alias: _tensor(info) for alias, info in sorted(definition.inputs.items())}
    # Over REST an input with a default must be given too.
    columns = {"type": "object", "properties": inputs, "required": sorted(inputs)}
    if len(inputs) == 1:
        columns = {"anyOf": [columns, *inputs.values()]}
    name = {"signature_name": {"const": key, "default": key} if key != DEFAULT else {"type": "string", "default": key}}
    named = [] if key == DEFAULT else ["signature_name"]
    by_columns = {"type": "object", "title": f"{key}, in columns", "properties": {**name, "inputs": columns},
                  "required": ["inputs", *named]}  # fmt: skip
    rows = {"type": "array", "minItems": 1, "description": "an object of the inputs of one example, or, of one input, "
            "its value"}  # fmt: skip
    by_rows = {"type": "object", "title": f"{key}, in rows", "properties": {**name, "instances": rows},
               "required": ["instances", *named]}  # fmt: skip
    return {"anyOf": [by_columns, by_rows]}


def _answer(definition: SignatureDef) -> dict[str, Any]:
    outputs = {alias: _tensor(info) for alias, info in sorted(definition.outputs.items())}
    one = next(iter(outputs.values())) if len(outputs) == 1 else {"type": "object", "properties": outputs}
    predictions = {"type": "object", "properties": {"predictions": {"type": "array"}}, "required": ["predictions"]}
    return {"anyOf": [{"type": "object", "properties": {"outputs": one}, "required": ["outputs"]}, predictions]}


def _tensor(info) -> dict[str, Any]:
    """A tensor as JSON: arrays in arrays, as deep as its shape."""
    if info.dtype in INTEGERS:
        schema: dict[str, Any] = {"type": "integer"}
    elif info.dtype in FLOATS:
        schema = {"type": "number"}
    elif info.dtype == 10:
        schema = {"type": "boolean"}
    else:
        encoded = {"type": "object", "properties": {"b64": {"type": "string", "contentEncoding": "base64"}},
                   "required": ["b64"]}  # fmt: skip
        schema = {"anyOf": [{"type": "string"}, encoded]}
    for dimension in reversed(info.tensor_shape.dim):
        schema = {"type": "array", "items": schema}
        if dimension.size >= 0:
            schema |= {"minItems": dimension.size, "maxItems": dimension.size}
    return schema
