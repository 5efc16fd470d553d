"""How long oneDNN takes for the products of a frozen layer, against MKL: forwards with a bias, and dL/dx backwards.

    python benchmarks/products.py             # one thread; appends benchmarks/results/products.jsonl, some minutes
    python benchmarks/products.py --threads 2

The two take turns; a ratio is the median over the rounds, below 1 where oneDNN is the quicker. It is asked for all
products here, also where the fast step would leave them to MKL (``onednn.LEAST_WORK``, ``onednn.is_quicker``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from weightlora import onednn
from weightlora.bench.records import append_record
from weightlora.timing import in_turns, median_ratio

RESULTS = Path(__file__).parent / "results" / "products.jsonl"
TOKENS = (16, 64, 128, 256, 512, 1024, 2048)
#: (out, in) of MiniLM, SmolLM2 and a wide Llama.
LAYERS = ((64, 64), (384, 384), (1536, 384), (384, 1536), (192, 576), (576, 1536), (512, 2048), (2048, 2048))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| layer | tokens | multiplications | forwards | backwards |\n| --- | --- | --- | --- | --- |")
    for (out, features), tokens in tqdm([(layer, tokens) for layer in LAYERS for tokens in TOKENS]):
        forwards, backwards = ratios(out, features, tokens, arguments.rounds)
        work = out * features * tokens
        shape = {"out": out, "in": features, "tokens": tokens, "threads": arguments.threads}
        taken = {"onednn_is_quicker": onednn.is_quicker(arguments.threads)}
        append_record(RESULTS, {**shape, "forwards": forwards, "backwards": backwards, **taken})
        tqdm.write(f"| {out} × {features} | {tokens} | {work / 2**20:.1f} M | {forwards:.2f} | {backwards:.2f} |")
    print(f"the fast step {'asks' if onednn.is_quicker(arguments.threads) else 'does not ask'} oneDNN here")


def ratios(out: int, features: int, tokens: int, rounds: int) -> tuple[float, float]:
    """Time of oneDNN ÷ time of MKL, forwards and backwards."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(out, features, generator=draw), torch.randn(out, generator=draw)
    x, dy = torch.randn(tokens, features, generator=draw), torch.randn(tokens, out, generator=draw)
    steps: list[Callable[[], Tensor]] = [
        lambda: onednn.by_onednn(x, weight.t(), bias),
        lambda: torch.addmm(bias, x, weight.t()),
        lambda: onednn.by_onednn(dy, weight),
        lambda: dy @ weight,
    ]
    onednn_y, mkl_y, onednn_x, mkl_x = in_turns(steps, rounds)
    return median_ratio(onednn_y, mkl_y), median_ratio(onednn_x, mkl_x)


if __name__ == "__main__":
    main()
