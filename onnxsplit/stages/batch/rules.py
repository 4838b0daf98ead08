"""The table of rules: for each op type, the rule that says along which axis the rows of its inputs leave it.

An op without a rule counts as mixing rows, so a model with such an op is not split.
"""

from __future__ import annotations

from onnxsplit.stages.batch.along import (
    arg_reduced,
    cumulative,
    lp_normalised,
    mean_variance,
    normalised,
    reduced,
    skip_normalised,
    softmax,
    top_k,
)
from onnxsplit.stages.batch.combine import (
    Rule,
    all_leading,
    elementwise,
    first_alone,
    first_output,
    leading,
    only_rank,
    together,
)
from onnxsplit.stages.batch.layers import (
    attention,
    batch_normalised,
    bit_matrices,
    bit_rows,
    dropout,
    features,
    gemm,
    matrices,
    multi_head,
    quantized,
    recurrent,
    resized,
    rotary,
)
from onnxsplit.stages.batch.moves import MOVES

_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BiasGelu BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil
    Celu Cos Cosh Div Elu Equal Erf Exp FastGelu Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf
    IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow QuickGelu Reciprocal
    RegexFullMatch Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt StringConcat Sub Sum Swish Tan
    Tanh ThresholdedRelu Where Xor
"""
_FIRST_ALONE = "Binarizer CastLike CategoryMapper Clip LabelEncoder QLinearLeakyRelu QLinearSigmoid"
_LEADING = """
    AveragePool Col2Im Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
    GroupNormalization InstanceNormalization LRN LpPool NhwcMaxPool QLinearAveragePool QLinearConv
    QLinearGlobalAveragePool SpaceToDepth
"""
_REDUCED = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""
_TABULAR = """
    Imputer LinearClassifier LinearRegressor Normalizer SVMClassifier SVMRegressor Scaler TfIdfVectorizer TreeEnsemble
    TreeEnsembleClassifier TreeEnsembleRegressor
"""


def _all(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_all(_ELEMENTWISE, elementwise),
    **_all(_FIRST_ALONE, first_alone),
    **_all(_LEADING, leading(0)),
    **_all(_REDUCED, reduced),
    **_all(_TABULAR, only_rank(2, leading(0))),
    **dict.fromkeys(["Softmax", "LogSoftmax", "Hardmax"], softmax),
    **dict.fromkeys(["LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"], normalised),
    **dict.fromkeys(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"], skip_normalised),
    **dict.fromkeys(["QuantizeLinear", "DequantizeLinear"], quantized),
    **dict.fromkeys(["ArgMax", "ArgMin"], arg_reduced),
    **dict.fromkeys(["LSTM", "GRU", "RNN"], recurrent),
    **dict.fromkeys(["Resize", "Upsample"], resized),
    **dict.fromkeys(["MatMul", "MatMulInteger", "FusedMatMul"], matrices()),
    "QLinearMatMul": matrices(0, 3),
    "Gemm": gemm,
    "MatMulNBits": bit_matrices,
    "GatherBlockQuantized": bit_rows,
    "ArrayFeatureExtractor": features,
    "LpNormalization": lp_normalised,
    "MeanVarianceNormalization": mean_variance,
    "BatchNormalization": batch_normalised,
    "Dropout": dropout,
    "TopK": top_k,
    "CumSum": cumulative,
    "MaxPool": first_output(leading(0)),
    "GridSample": all_leading(0, 1),
    "Attention": attention,
    "MultiHeadAttention": multi_head(0, 1, 2, 5, 6, 7, masks=[4]),
    "GroupQueryAttention": multi_head(0, 1, 2, 3, 4, 5, 9, 10),
    "RotaryEmbedding": rotary,
    "EmbedLayerNormalization": multi_head(0, 1, 7, 8),
    "FusedConv": leading(0, 3),
    "FusedGemm": gemm,
    **dict.fromkeys(["QLinearAdd", "QLinearMul"], lambda call: together(call, [0, 3])),
    **MOVES,
}
"""The rule of each op type. An op of com.microsoft has the rule of ONNX's op of the same name."""
