"""The Open Inference Protocol: requests, parameters, tensor data and JSON documents."""
