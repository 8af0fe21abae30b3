"""What the two transports answer: the calls of PredictionService, on messages and arrays.

Errors are TensorFlow Serving's, with its texts: servables/tensorflow/{predict_util,classifier,regressor,
multi_inference}.cc at 9d981c5c.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import grpc
import numpy as np

from shared.serving import tensors
from shared.serving.models import Models
from shared.serving.protocol import (
    ClassificationRequest,
    ClassificationResponse,
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    Input,
    ModelSpec,
    MultiInferenceRequest,
    MultiInferenceResponse,
    RegressionRequest,
    RegressionResponse,
    SignatureDef,
    SignatureDefMap,
    message,
    type_name,
)
from shared.serving.refusal import RefusedError, invalid
from shared.serving.servable import DEFAULT, Servable

CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"
ClassificationResult = message("tensorflow.serving.ClassificationResult")
RegressionResult = message("tensorflow.serving.RegressionResult")


class Stages:
    """Where the time of one request goes, in seconds, and in how large a batch it ran.

    `model` is the name that it is counted under, "" where it names none that is configured, so that no client can make
    metrics without end; None where it is not counted. `waiting` is a block in which another request may have this one's
    thread's place.
    """

    __slots__ = ("api", "batch", "decode", "encode", "examples", "model", "queue", "run", "waiting")

    def __init__(self, api: str, waiting: Callable[[], AbstractContextManager] = contextlib.nullcontext):
        self.api, self.waiting = api, waiting
        self.model: str | None = None
        self.decode = self.queue = self.run = self.encode = 0.0
        self.batch, self.examples = 0, 0


class Inference:
    """Answers requests from the versions that `models` serves; what a request costs goes to its `Stages`."""

    def __init__(self, models: Models, *, check_methods: bool = False):
        self.models, self._check_methods = models, check_methods

    def predict(
        self, servable: Servable, key: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str], stages: Stages,
        until: float | None = None,
    ) -> tuple[Sequence[str], list[np.ndarray]]:  # fmt: skip
        """Run a signature: aliases of the outputs, and the outputs."""
        feeds, fetches, arrays = servable.bind(key, inputs, wanted)
        if self._check_methods and (method := servable.definitions[key].method_name) not in (
            "tensorflow/serving/predict", CLASSIFY, REGRESS,
        ):  # fmt: skip
            raise RefusedError(
                grpc.StatusCode.INTERNAL,
                "Expected prediction signature method_name to be one of {tensorflow/serving/predict, "
                f"{CLASSIFY}, {REGRESS}}}. Was: {method}",
            )
        outputs = self._run(servable, feeds, fetches, arrays, stages, until)
        return sorted(wanted) or servable.outputs[key], outputs

    def _run(self, servable, feeds, fetches, arrays, stages, until) -> list[np.ndarray]:
        if until is not None and time.monotonic() > until:
            raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline exceeded")
        if servable.batching is not None:
            begun = time.perf_counter()
            with stages.waiting():
                outputs, stages.run, stages.batch = servable.batching.run(servable, feeds, fetches, arrays, until)
            stages.queue += time.perf_counter() - begun - stages.run
            return outputs
        rows = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
        begun = time.perf_counter()
        outputs = servable.answer(feeds, fetches, arrays, stages.waiting, math.inf if until is None else until)
        stages.run, stages.batch = time.perf_counter() - begun, rows
        return outputs

    def classify(
        self, servable: Servable, request: ClassificationRequest, stages: Stages, until: float | None = None
    ) -> ClassificationResponse:
        """Classes and scores of Examples."""
        feed, fetches = _to_classify(self._definition(servable, request.model_spec, CLASSIFY))
        outputs, count = self._of_examples(servable, request.input, (feed,), tuple(fetches.values()), stages, until)
        reply = ClassificationResponse()
        reply.result.CopyFrom(_classified(dict(zip(fetches, outputs, strict=True)), count))
        _answered_by(reply.model_spec, servable, request.model_spec)
        return reply

    def regress(
        self, servable: Servable, request: RegressionRequest, stages: Stages, until: float | None = None
    ) -> RegressionResponse:
        """A number for each Example."""
        feed, fetch = _to_regress(self._definition(servable, request.model_spec, REGRESS))
        (output,), count = self._of_examples(servable, request.input, (feed,), (fetch,), stages, until)
        reply = RegressionResponse()
        reply.result.CopyFrom(_regressed(output, count))
        _answered_by(reply.model_spec, servable, request.model_spec)
        return reply

    def _definition(self, servable: Servable, spec: ModelSpec, method: str) -> SignatureDef:
        """The signature that is asked for, by a call that is for those with such a method name."""
        definition = _definition(servable, spec, "No signature was found with the name: ")
        if self._check_methods and definition.method_name != method:
            kind = "classification" if method == CLASSIFY else "regression"
            raise invalid(f"Expected {kind} signature method_name to be {method}. Was: {definition.method_name}")
        return definition

    def _of_examples(self, servable, given: Input, feeds, fetches, stages, until) -> tuple[list[np.ndarray], int]:
        """Run what takes Examples, each feed the same: the outputs, and how many Examples there are."""
        begun = time.perf_counter()
        examples = _examples(given)
        stages.decode += time.perf_counter() - begun
        stages.examples = len(examples)
        return self._run(servable, feeds, fetches, [examples] * len(feeds), stages, until), len(examples)

    def infer(
        self, servable: Servable, request: MultiInferenceRequest, stages: Stages, until: float | None = None
    ) -> MultiInferenceResponse:
        """Several classifications and regressions of the same Examples in one run."""
        plans, seen = [], set()
        for task in request.tasks:
            spec, key = task.model_spec, task.model_spec.signature_name or DEFAULT
            if not spec.name:
                raise invalid("Found ModelSpec with an empty model name.")
            if spec.name != request.tasks[0].model_spec.name:
                raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
            if key in seen:
                raise invalid(f"Duplicate evaluation of signature: {key}")
            seen.add(key)
            definition = _definition(servable, spec, "Requested signature not found in model graph: ")
            if task.method_name == CLASSIFY:
                plans.append((task, *_to_classify(definition)))
            elif task.method_name == REGRESS:
                feed, fetch = _to_regress(definition)
                plans.append((task, feed, {"outputs": fetch}))
            else:
                text = f"Unsupported signature method_name: {task.method_name}"
                raise RefusedError(grpc.StatusCode.UNIMPLEMENTED, text)
        feeds = tuple(sorted({feed for _, feed, _ in plans}))
        fetches = tuple(sorted({name for _, _, names in plans for name in names.values()}))
        outputs, count = self._of_examples(servable, request.input, feeds, fetches, stages, until)
        found = dict(zip(fetches, outputs, strict=True))
        reply = MultiInferenceResponse()
        for task, _, names in plans:
            result = reply.results.add()
            mine = {alias: found[name] for alias, name in names.items()}
            if task.method_name == CLASSIFY:
                result.classification_result.CopyFrom(_classified(mine, count))
            else:
                result.regression_result.CopyFrom(_regressed(mine["outputs"], count))
            _answered_by(result.model_spec, servable, task.model_spec)
        return reply

    def metadata(self, request: GetModelMetadataRequest) -> GetModelMetadataResponse:
        """The signatures of a version, as its file has them."""
        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != "signature_def":
                raise invalid(f"Metadata field {field} is not supported")
        servable = self.models.find(request.model_spec)
        reply = GetModelMetadataResponse()
        reply.model_spec.name, reply.model_spec.version.value = servable.name, servable.version
        reply.metadata["signature_def"].Pack(SignatureDefMap(signature_def=servable.definitions))
        return reply


def _definition(servable: Servable, spec: ModelSpec, refusal: str) -> SignatureDef:
    key = spec.signature_name or DEFAULT
    if key not in servable.definitions:
        raise invalid(refusal + key)
    return servable.definitions[key]


def _to_classify(definition: SignatureDef) -> tuple[str, dict[str, str]]:
    """Of a signature that classifies: the tensor to feed, and alias -> tensor of `classes`, `scores` or both."""
    if len(definition.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    if len(definition.outputs) not in (1, 2):
        raise invalid(f"Expected one or two output Tensors, found {len(definition.outputs)}")
    if "inputs" not in definition.inputs:
        raise invalid(f"No classification inputs found in SignatureDef: {definition}")
    fetches = {alias: definition.outputs[alias].name for alias in ("classes", "scores") if alias in definition.outputs}
    if not fetches:
        raise invalid('Expected classification signature outputs to contain at least one of "classes" or "scores". '
                      f"Signature was: {definition}")  # fmt: skip
    return definition.inputs["inputs"].name, fetches


def _to_regress(definition: SignatureDef) -> tuple[str, str]:
    if len(definition.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    if len(definition.outputs) != 1:
        raise invalid("Expected one output Tensor.")
    if "inputs" not in definition.inputs:
        raise invalid(f"No regression inputs found in SignatureDef: {definition}")
    if "outputs" not in definition.outputs:
        raise invalid(f"No regression outputs found in SignatureDef: {definition}")
    return definition.inputs["inputs"].name, definition.outputs["outputs"].name


def _examples(given: Input) -> np.ndarray:
    """Serialised Examples, [batch]; a context is put before each, so that its features are theirs too."""
    kind, context = given.WhichOneof("kind"), b""
    examples: Sequence = ()
    if kind == "example_list":
        examples = given.example_list.examples
    elif kind == "example_list_with_context":
        examples = given.example_list_with_context.examples
        context = given.example_list_with_context.context.SerializeToString()
    if not examples:
        raise invalid("Input is empty.")
    array = np.empty(len(examples), object)
    array[:] = [context + example.SerializeToString() for example in examples]
    return array


def _classified(outputs: Mapping[str, np.ndarray], count: int) -> ClassificationResult:
    for alias, array in outputs.items():
        if array.ndim != 2:
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got {list(array.shape)}")
        wanted = tensors.STRING if alias == "classes" else 1
        if (number := tensors.number_of(array.dtype)) != wanted:
            name = "DT_STRING" if alias == "classes" else "DT_FLOAT"
            raise invalid(f"Expected {alias} Tensor of {name}. Got: DT_{type_name(number).upper()}")
        if len(array) != count:
            raise invalid(f"Expected {alias} output batch size of {count}. Got: {len(array)}")
    widths = {array.shape[1] for array in outputs.values()}
    if len(widths) > 1:
        raise invalid(f"Tensors class and score should match in dim_size(1). Got {outputs['classes'].shape[1]} vs. "
                      f"{outputs['scores'].shape[1]}")  # fmt: skip
    nothing = [[None] * widths.pop()] * count
    result = ClassificationResult()
    rows = [outputs[alias].tolist() if alias in outputs else nothing for alias in ("classes", "scores")]
    for labels, scores in zip(*rows, strict=True):
        row = result.classifications.add()
        for label, score in zip(labels, scores, strict=True):
            one = row.classes.add()
            if label is not None:
                one.label = label.decode(errors="replace")
            if score is not None:
                one.score = score
    return result


def _regressed(output: np.ndarray, count: int) -> RegressionResult:
    if output.ndim != 1 and not (output.ndim == 2 and output.shape[1] == 1):
        raise invalid("Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
                      f"{list(output.shape)}")  # fmt: skip
    if len(output) != count:
        raise invalid(f"Input batch size did not match output batch size: {count} vs. {len(output)}")
    if output.dtype != np.float32:
        name = type_name(tensors.number_of(output.dtype)).upper()
        raise invalid(f"Expected output Tensor of DT_FLOAT.  Got: DT_{name}")
    result = RegressionResult()
    for value in output.ravel().tolist():
        result.regressions.add(value=value)
    return result


def _answered_by(reply: ModelSpec, servable: Servable, spec: ModelSpec) -> None:
    """Which version and signature answered."""
    reply.name, reply.signature_name = spec.name, spec.signature_name or DEFAULT
    reply.version.value = servable.version
