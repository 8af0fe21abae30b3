"""An OpenAPI document of the REST API, from the signatures of what is served."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from shared.serving.protocol import SignatureDef
from shared.serving.servable import DEFAULT, Servable
from shared.serving.tensors import STRING

INTEGERS = {3, 4, 5, 6, 9, 17, 22, 23}
FLOATS = {1, 2, 14, 19}
OBJECT = {"type": "object"}
CHOICES: dict[str, dict[str, Any]] = {  # of a version; none: the newest
    "": {},
    "/versions/{version}": {
        "name": "version", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0},
    },
    "/labels/{label}": {"name": "label", "in": "path", "required": True, "schema": {"type": "string"}},
}  # fmt: skip
PAIR = {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}], "minItems": 2, "maxItems": 2}
RESULTS = {
    verb: {"type": "object", "properties": {"results": {"type": "array", "items": items}}, "required": ["results"]}
    for verb, items in (("classify", {"type": "array", "items": PAIR}), ("regress", {"type": "number"}))
}


def document(served: Mapping[str, Mapping[int, Servable]], *, token: bool) -> dict[str, Any]:
    """OpenAPI 3.1 for the newest version of each model, name -> number -> version; `token`: whether one is needed."""
    paths: dict[str, Any] = {}
    for called, versions in served.items():
        if not versions:
            continue
        newest = versions[max(versions)]
        definitions = {key: one for key, one in newest.definitions.items() if not key.startswith("__")}
        # The default signature first: what a reader of the document tries.
        keys = sorted(definitions, key=lambda key: (key != DEFAULT, key))
        calls = {"predict": _post([_body(key, definitions[key]) for key in keys],
                                  {"anyOf": [_answer(definitions[key]) for key in keys]})}  # fmt: skip
        for verb, takes in (("classify", _classifies), ("regress", _regresses)):
            if fit := [key for key in keys if takes(definitions[key])]:
                calls[verb] = _post([_examples(key) for key in fit], RESULTS[verb])
        # Names are data, as the server decodes them: no brace of one opens a parameter.
        name = quote(called, safe="")
        where = f"/v1/models/{name}"
        for tail, parameter in CHOICES.items():
            at = {"parameters": [parameter]} if parameter else {}
            by = f" by {parameter['name']}" if parameter else ""
            paths[f"{where}{tail}"] = at | {"get": _call(f"status of {name}{by}", OBJECT)}
            paths[f"{where}{tail}/metadata"] = at | {"get": _call(f"metadata of {name}{by}", OBJECT)}
            for verb, call in calls.items():
                paths[f"{where}{tail}:{verb}"] = at | {"post": _call(f"{verb} with {name}{by}", **call)}
    information = {"title": "Models served by Cornucopia", "version": "1", "description":
                   "TensorFlow Serving's REST API. Bytes are {\"b64\": base64}. Bodies and answers are those of each "
                   "model's newest version."}  # fmt: skip
    security = {"security": [{"token": []}]} if token else {}
    components = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}} if token else {}
    return {"openapi": "3.1.0", "info": information, **security, "paths": paths, "components": components}


def _classifies(definition: SignatureDef) -> bool:
    return _takes_examples(definition) and len(definition.outputs) <= 2 and bool(
        {"classes", "scores"} & set(definition.outputs))  # fmt: skip


def _regresses(definition: SignatureDef) -> bool:
    return _takes_examples(definition) and set(definition.outputs) == {"outputs"}


def _takes_examples(definition: SignatureDef) -> bool:
    return set(definition.inputs) == {"inputs"} and definition.inputs["inputs"].dtype == STRING


def _post(bodies: list[dict[str, Any]], schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"anyOf": bodies}}}
    return {"schema": schema, "requestBody": {"required": True, "content": content}}


def _call(does: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    return {
        "operationId": does,
        "summary": does.capitalize(),
        **more,
        "responses": {
            "200": {"description": "the answer", "content": {"application/json": {"schema": schema}}},
            "default": {"description": "an error", "content": {"application/json": {"schema": error}}},
        },
    }


def _examples(key: str) -> dict[str, Any]:
    features = {"type": "object", "description": "a value or a list of values for each feature"}
    named = [] if key == DEFAULT else ["signature_name"]
    properties = {**_name(key), "context": features, "examples": {"type": "array", "items": features, "minItems": 1}}
    return {"type": "object", "title": key, "properties": properties, "required": ["examples", *named]}


def _name(key: str) -> dict[str, Any]:
    return {"signature_name": {"const": key, "default": key} if key != DEFAULT else {"type": "string", "default": key}}


def _body(key: str, definition: SignatureDef) -> dict[str, Any]:
    inputs = {alias: _tensor(info) for alias, info in sorted(definition.inputs.items())}
    # Over REST an input with a default must be given too.
    columns = {"type": "object", "properties": inputs, "required": sorted(inputs)}
    if len(inputs) == 1:
        columns = {"anyOf": [columns, *inputs.values()]}
    name = _name(key)
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
