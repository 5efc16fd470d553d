"""Private names of torch are used in one file, exist in the installed torch, and mean what that file says."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import weightlora
from weightlora.model import torch_private
from weightlora.model.torch_private import (
    Observer,
    fake_tensors,
    forward_hooks,
    has_global_hooks,
    hooks_of,
    is_fake,
    is_grouped_product,
    is_hooked,
    is_intercepted,
    is_persistent,
    is_view,
    keeps_input,
    next_node_number,
    node_number,
    own_parameter,
    saved_tensors,
    storage_id,
)

SOURCE = Path(weightlora.__file__).parent
HERE = "model/torch_private.py"
OTHER_FILES = sorted(set(SOURCE.rglob("*.py")) - {SOURCE / HERE})
#: Every private name of torch that the package uses.
NAMES = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_base",
    "_cdata",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_get_sequence_nr",
    "_grouped_mm",
    "_has_any_global_hook",
    "_local_scalar_dense",
    "_non_persistent_buffers_set",
    "_parameters",
    "_python_dispatch",
    "_raw_saved_",
    "_saved_",
    "_sequence_nr",
    "_subclasses",
}
#: Private names of other libraries, each used in one place.
OTHERS = {
    "_actions": "argparse",
    "_exit": "os",
    "_get_lora_matrices": "PEFT's VB-LoRA layer",
    "_gradient_checkpointing_func": "transformers",
    "_save_checkpoint": "transformers' Trainer: the only writer of all that train() resumes from",
    "_train_batch_size": "transformers' Trainer",
}
#: Names that a text may not hold elsewhere: keys of a module's dictionary, attributes for ``getattr``.
IN_TEXT = {*NAMES, *dir(nn.Linear(1, 1)), *dir(torch.Tensor)}


def private(name: str) -> bool:
    return re.fullmatch(r"_[a-z]\w*", name) is not None


def private_names(source: str) -> set[str]:
    """Private names of objects and modules that are not the file's own: attributes, imports, and keys in text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) not in ("self", "cls"):
            found.add(node.attr)
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".") if private(part)}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("weightlora"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if private(part)}
        elif isinstance(node, ast.Constant) and node.value in IN_TEXT and private(str(node.value)):
            found.add(str(node.value))
    return found


def test_the_list_is_what_the_file_uses():
    assert private_names((SOURCE / HERE).read_text(encoding="utf-8")) == NAMES


def test_no_other_file_uses_a_private_name_of_torch():
    others = {str(path): private_names(path.read_text(encoding="utf-8")) - OTHERS.keys() for path in OTHER_FILES}
    assert {path: names for path, names in others.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch._subclasses import FakeTensor", "_subclasses"),
        ("import torch._dynamo", "_dynamo"),
        ("from torch.nn.modules.module import _has_any_global_hook", "_has_any_global_hook"),
        ("def f(t): return t.untyped_storage()._cdata", "_cdata"),
        ("vars(module)['_forward_hooks']", "_forward_hooks"),
        ("getattr(module, '_parameters')", "_parameters"),
    ],
)
def test_the_walk_sees_private_names(source, name):
    assert private_names(source) == {name}


def test_the_walk_lets_the_files_own_names_pass():
    own = "from weightlora.fast.step import Fused\nclass A:\n    def f(self): return self._x + __name__\n_y = '_stderr'"
    assert private_names(own) == set()


# -- this torch has them ---------------------------------------------------------------------------------------------


def test_this_torch_has_every_name():
    """A missing one fails here, by its name, before anything stranger happens elsewhere."""
    y = nn.Linear(2, 2)(torch.ones(1, 2))
    product = (y * y).grad_fn
    module, tensor = vars(nn.Linear(2, 2)), torch.ones(4)
    found = {name for name in NAMES if name in module}
    found |= {name for name in ("_base",) if name in dir(tensor)}
    found |= {name for name in ("_cdata",) if name in dir(tensor.untyped_storage())}
    found |= {name for name in ("_get_sequence_nr",) if name in dir(torch.autograd)}
    found |= {name for name in ("_has_any_global_hook",) if name in dir(import_module("torch.nn.modules.module"))}
    found |= {name for name in ("_sequence_nr",) if name in dir(product)}
    found |= {name for name in ("_saved_", "_raw_saved_") if f"{name}self" in dir(product)}
    found |= {name for name in ("_grouped_mm",) if name in dir(torch)}
    found |= {name for name in ("_local_scalar_dense",) if name in dir(torch.ops.aten)}
    found |= {name for name in ("_python_dispatch",) if import_module(f"torch.utils.{name}").TorchDispatchMode}
    found |= {name for name in ("_subclasses",) if import_module(f"torch.{name}.fake_tensor")}
    assert found == NAMES


# -- they mean what the functions say --------------------------------------------------------------------------------


def test_hooks_of_every_kind_are_seen():
    register = ("forward", "forward_pre", "full_backward", "full_backward_pre")
    for kind in register:
        layer = nn.Linear(2, 2)
        assert not is_hooked(layer)
        handle = getattr(layer, f"register_{kind}_hook")(print)
        assert is_hooked(layer)
        assert is_intercepted(layer)
        assert hooks_of(layer) == [print]
        assert (print in forward_hooks(layer).values()) == (kind == "forward")
        assert keeps_input(layer) == (kind != "forward_pre")
        handle.remove()
        assert not is_hooked(layer)
        assert not is_intercepted(layer)


def test_an_observer_is_told_of_each_call_and_keeps_the_input():
    layer, calls = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(Observer(lambda: calls.append(1)))
    x = torch.ones(1, 2)
    assert layer(x).equal(nn.functional.linear(x, layer.weight, layer.bias))
    assert calls == [1]
    assert keeps_input(layer)
    layer.register_forward_pre_hook(lambda *_: None)
    assert not keeps_input(layer)


def test_a_forward_set_on_the_instance_intercepts():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    assert is_intercepted(layer)


def test_global_hooks_are_seen():
    assert has_global_hooks() is False
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert has_global_hooks() is True
    handle.remove()
    assert has_global_hooks() is False


def test_own_parameter_is_the_attribute():
    layer = nn.Linear(2, 2, bias=False)
    assert own_parameter(layer, "weight") is layer.weight
    assert own_parameter(layer, "bias") is None


def test_views_and_storages():
    whole = torch.ones(4)
    part = whole[1:]
    assert (is_view(whole), is_view(part), is_view(part.clone())) == (False, True, False)
    assert storage_id(whole) == storage_id(part) != storage_id(part.clone())


def test_fake_tensors_have_a_shape_a_storage_and_no_numbers():
    real = torch.ones(2, 3)
    with fake_tensors():
        product = real @ torch.ones(3, 4)
        assert storage_id(product) == storage_id(product.view(8)) != storage_id(product + 1)
    assert (is_fake(product), is_fake(real)) == (True, False)
    assert product.shape == (2, 4)


def test_nodes_are_numbered_as_they_are_made():
    x = torch.ones(2, requires_grad=True)
    first = next_node_number()
    y = x * 2
    second = next_node_number()
    z = y.exp()
    assert first <= node_number(y.grad_fn) < second <= node_number(z.grad_fn) < next_node_number()


def test_saved_tensors_are_named_and_those_of_python_nodes_are_not():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

    x, y = torch.ones(2, requires_grad=True), torch.full((2,), 2.0, requires_grad=True)
    assert {name: tensor.tolist() for name, tensor in saved_tensors((x * y).grad_fn)} == {
        "self": [1.0, 1.0],
        "other": [2.0, 2.0],
    }
    assert [(name, tensor.tolist()) for name, tensor in saved_tensors(Cube.apply(y).grad_fn)] == [("", [2.0, 2.0])]
    assert list(saved_tensors((x + y).grad_fn)) == []


def test_the_product_of_groups_is_known_by_the_function_that_a_mode_sees():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(is_grouped_product(func))
            return func(*args, **(kwargs or {}))

    seen = []
    rows, matrices = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
    ends = torch.tensor([2, 4], dtype=torch.int32)
    with Mode():
        nn.functional.grouped_mm(rows, matrices, offs=ends)
        torch.mm(rows, matrices[0])
    assert True in seen
    assert seen[-1] is False


def test_every_function_of_the_file_is_tested_here():
    functions = {
        name
        for name, value in vars(torch_private).items()
        if getattr(value, "__module__", "") == torch_private.__name__
    }
    assert functions <= globals().keys()


def test_a_persistent_buffer_is_one_of_the_state_dict():
    net = nn.Module()
    net.register_buffer("kept", torch.ones(1))
    net.register_buffer("cache", torch.ones(1), persistent=False)
    assert [name for name, _ in net.named_buffers() if is_persistent(net, name)] == list(net.state_dict()) == ["kept"]
