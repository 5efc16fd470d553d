"""What each of two processes does for test_fsdp2.py: train a recipe, and tell which of the weights are shards.

accelerate launch --config_file fsdp2.yaml --num_processes 2 fsdp2_worker.py RECIPE [--option=value ...]
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from distributed_worker import shard_on_cpu

from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train


class Witness(TrainerCallback):
    """Counts, at the end of the training, the numbers that this process holds, and those of the whole model."""

    def on_train_end(self, args, state, control, model, **_):  # noqa: ARG002
        weights = list(model.parameters())
        held = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
        self.seen = {"held": held, "whole": sum(w.numel() for w in weights), "processes": dist.get_world_size()}


def main(path, *words):
    shard_on_cpu()
    recipe, witness = read_recipe(path, words), Witness()
    train(recipe, callbacks=[witness])
    (recipe.output_dir / f"seen-{dist.get_rank()}.json").write_text(json.dumps(witness.seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
