"""The model as it is given: files, graph, shapes, atoms and example inputs.

The files in the order in which they build on each other:

- ``protobuf``: walks through ops, subgraphs, functions and stored tensors.
- ``file_kinds``: recognises files that are not ONNX models.
- ``external_data``: the files beside a model that hold its weights.
- ``in_file``: weights that stay in the model's file.
- ``shared_weights``: which stored tensors share bytes.
- ``ort_optimised``: models that ONNX Runtime's optimiser saved.
- ``multi_device``: checks of ONNX's multi-device fields.
- ``source``: the model, read from its file and checked.
- ``in_memory``: models given as bytes, as a protobuf or as an onnx_ir model.
- ``op_kinds``: which ops are custom or random.
- ``graph``: the graph of the ops that the outputs need.
- ``dominant_op``: why a model cannot be cut when one op holds nearly all of it.
- ``formulas`` and ``dimensions``: sizes of the inputs' free dimensions.
- ``shape_rules`` and ``shapes``: types and shapes of all tensors.
- ``graph_io``: the inputs and outputs that a model is cut with.
- ``atoms``: ops that stay together.
- ``precision``: how exactly two runs of one model can agree.
- ``example_inputs``: inputs that a user gives, or made-up ones.
"""
