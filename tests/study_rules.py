"""The rules of benchmarks/choice by their import paths, as a user names a rule of their own."""

_HERE = "benchmarks.choice.rules"
BY_GRADIENT = {
    "fisher": f"{_HERE}.adapter_gradients:Fisher",
    "relative_gradient": f"{_HERE}.full_weights:RelativeGradient",
    "aletheia": f"{_HERE}.full_weights:Aletheia",
    "gora": f"{_HERE}.full_weights:GoRA",
    "cross_fitted": f"{_HERE}.adapter_gradients:CrossFitted",
}
BY_INPUTS = {
    "plop": f"{_HERE}.layer_inputs:PLoP",
    "explained_variance": f"{_HERE}.layer_inputs:ExplainedVariance",
}
OF_THUMB = {
    "last_layers": f"{_HERE}.heuristic:LastLayers",
    "first_layers": f"{_HERE}.heuristic:FirstLayers",
    "strided": f"{_HERE}.heuristic:Strided",
    "mlp": f"{_HERE}.heuristic:Mlp",
    "attention": f"{_HERE}.heuristic:Attention",
    "v_o_down": f"{_HERE}.heuristic:VOutDown",
}
STUDY = {**BY_GRADIENT, **BY_INPUTS, **OF_THUMB}
