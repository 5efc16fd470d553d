"""The rules of benchmarks/choice by their import paths, as a user names a rule of their own."""

_HERE = "benchmarks.choice.rules"
BY_GRADIENT = {
    "fisher": f"{_HERE}.fisher:Fisher",
    "relative_gradient": f"{_HERE}.relative_gradient:RelativeGradient",
    "aletheia": f"{_HERE}.aletheia:Aletheia",
    "gora": f"{_HERE}.gora:GoRA",
    "cross_fitted": f"{_HERE}.cross_fitted:CrossFitted",
}
BY_INPUTS = {
    "plop": f"{_HERE}.plop:PLoP",
    "explained_variance": f"{_HERE}.explained_variance:ExplainedVariance",
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
