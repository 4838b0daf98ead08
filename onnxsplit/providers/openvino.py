"""OpenVINO's options: what ONNX Runtime is told, so that a stage uses its own cores and computes as precisely as asked.

OpenVINO reads its properties (``INFERENCE_NUM_THREADS``, ``INFERENCE_PRECISION_HINT`` and so on) from the option
``load_config``. The provider that is built into ONNX Runtime and the plugin read it alike; of other options, the plugin
ignores most without a word. So all properties go that way:

    openvino:INFERENCE_PRECISION_HINT=bf16   ->   load_config = {"CPU": {"INFERENCE_PRECISION_HINT": "bf16", ...}}

Left to itself, OpenVINO takes all cores, and computes in bfloat16 on CPUs that can. A stage gets its own number of
threads and the precision of the model instead, unless the user's options say otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

OPENVINO = "OpenVINOExecutionProvider"
"""ONNX Runtime's name of the provider."""

_PROPERTY = {  # options of the built-in provider that are properties of OpenVINO
    "cache_dir": "CACHE_DIR",
    "num_of_threads": "INFERENCE_NUM_THREADS",
    "num_streams": "NUM_STREAMS",
}
_PRECISION = {
    "ACCURACY": {"EXECUTION_MODE_HINT": "ACCURACY"},
    "BF16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "FP16": {"INFERENCE_PRECISION_HINT": "f16"},
    "FP32": {"INFERENCE_PRECISION_HINT": "f32"},
}


def openvino_options(options: Mapping[str, str], threads: int) -> dict[str, str]:
    """The options of a session on OpenVINO.

    Args:
        options: the user's options. Names in capitals are properties of OpenVINO.
        threads: the number of threads, if the user's options do not say.

    Returns:
        The options for ONNX Runtime: the device's type, ``load_config``, and the user's other options.
    """
    device = options.get("device_type", "CPU")
    properties: dict[str, str] = {"EXECUTION_MODE_HINT": "ACCURACY"}
    if device.upper() == "CPU":
        properties["INFERENCE_NUM_THREADS"] = str(threads)
    kept = {"device_type": device}
    for key, value in options.items():
        if key == "precision" and value.upper() in _PRECISION:
            properties |= _PRECISION[value.upper()]
        elif key.isupper() or key in _PROPERTY:
            properties[_PROPERTY.get(key, key)] = value
        else:
            kept[key] = value
    return kept | {"load_config": json.dumps({device: properties})}
