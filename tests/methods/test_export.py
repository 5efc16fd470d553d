"""What methods trained becomes stock LoRA: the same ΔW, with one whole ``lora_alpha``."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora.methods.common.export import Factors, become_stock, factors_plan
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.make import make_plan


def exported(scales, ranks, lora_alpha):
    """The model and its config, and what was to be exported."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in scales))
    lora = LoraConfig(r=4, lora_alpha=lora_alpha)
    plan = make_plan(find_sites(net, lora).sites, lora, [str(i) for i in range(len(scales))])
    factors = {
        str(i): Factors(torch.randn(r, 6), torch.randn(6, r), s)
        for i, (s, r) in enumerate(zip(scales, ranks, strict=True))
    }
    model = get_peft_model(net, LoraConfig(target_modules=[str(i) for i in range(len(scales))]))
    plan = factors_plan(plan, factors)
    become_stock(model, plan, factors)
    plan.check(model)
    return model, model.peft_config["default"], factors


@pytest.mark.parametrize(
    ("scales", "ranks", "lora_alpha", "alpha"),
    [
        ((2.0, 2.0), (4, 4), 8, 8),  # scale·r = 8 on both
        ((4.0, 2.0), (2, 4), 3, 8),  # here as well, whatever plain LoRA's is
        ((10 / 49, 10 / 49), (49, 49), 8, 10),  # 10/49·49 = 9.999999999999998 in float64
        ((2.0, 2.0), (4, 1), 8, 8),  # 8 and 2: plain LoRA's
        ((10 / (5 + 1e-5),) * 2, (5, 5), 10, 10),  # 9.99998 with PEFT's AdaLoRA
        ((0.3, 0.7, 1.0), (1, 0, 5), 16, 16),
        ((0.3, 0.7), (1, 2), 2.4, 2),  # a whole one, also where the user's is not
        ((0.3, 0.7), (1, 2), 0.25, 1),
    ],
)
def test_one_whole_alpha_and_the_same_update(scales, ranks, lora_alpha, alpha):
    model, config, factors = exported(scales, ranks, lora_alpha)
    assert (config.lora_alpha, type(config.lora_alpha), config.alpha_pattern) == (alpha, int, {})
    layers = lora_layers(model)
    assert layers.keys() == {name for name, factor in factors.items() if factor.rank}
    for name, layer in layers.items():
        expected = factors[name].scale * factors[name].b.double() @ factors[name].a.double()
        b, a = (part["default"].weight.double() for part in (layer.lora_B, layer.lora_A))
        torch.testing.assert_close(config.lora_alpha / factors[name].rank * b @ a, expected, rtol=1e-5, atol=1e-5)
        if factors[name].scale * factors[name].rank == alpha:  # nothing to fold: not one bit of B differs
            assert torch.equal(layer.lora_B["default"].weight, factors[name].b)
