"""Rules that score by the inputs of frozen layers while the model runs forward: ``PLoP`` and ``ExplainedVariance``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightlora.model.distributed import add_up
from weightlora.model.gathering import loaded
from weightlora.model.restore import evaluated
from weightlora.model.torch_private import Observer
from weightlora.selection.batches import TokenRows, counted_tokens
from weightlora.selection.rules.base import Rule, Scores, jackknife, jackknife_of_rows, require

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage

By = Literal["type", "site"]
BY: tuple[str, ...] = get_args(By)
#: Share of a site's own NFN in that of its type. It decides the order within a type, and hardly ever between types.
_OWN_SHARE = 1e-6


@dataclass(frozen=True)
class PLoP(Rule):
    """Score a site by 1 ÷ NFN, the normalised feature norm of its frozen layer (PLoP, arXiv:2506.20629).

    NFN = E‖W·z‖ ÷ E‖W·z̃‖. The means are over the tokens of all batches: z is a token's input, and z̃ is a Gaussian
    vector with the norm of z. The paper adapts the types of projections with the lowest mean NFN. No gradient is
    computed; each token passes each layer three times instead of once.

    The Gaussian vectors come from torch's global generator, which ``select`` seeds.

    Args:
        by: ``"type"`` (the paper) scores a site by the mean NFN of all sites with its name inside the block, such as
            ``mlp.down_proj``; sites of one type follow each other by their own NFN. ``"site"`` uses each site's own.
        head_steps: Steps in which a new head is trained alone first. 0, because no site's input depends on the head.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> PLoP(by="site")
        PLoP(head_steps=0, by='site')
    """

    by: By = "type"
    head_steps: int | None = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.by in BY, f"by={self.by!r}", f"one of {', '.join(BY)}")

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the last scores; nothing is trained."""
        count = steps[-1]
        norms = _norms(stage, count)
        types = [site.projection for site in stage.sites] if self.by == "type" else list(stage.layers)
        history = [_scores(sums, types) for sums in norms.cumsum(0)]
        known = jackknife_of_rows(norms, lambda some: _scores(some.sum(0), types))
        final = tuple(history[-1].tolist())
        rows, moved = tuple(tuple(row.tolist()) for row in history), tuple(value > 0 for value in final)
        yield count, Scores(rows, moved, final, errors=known.errors, halves=known.halves)


def _norms(stage: Stage, steps: int) -> Tensor:
    """Σ‖W·z‖ and Σ‖W·z̃‖ over the tokens of each step's batch, (T, 2, sites), summed over the processes."""
    places = {name: i for i, name in enumerate(stage.layers)}
    bases = {name: layer.get_base_layer() for name, layer in stage.layers.items()}
    norms = torch.zeros(steps, 2, len(places), dtype=torch.float64)
    step = 0

    def measure(site: str, z: Tensor) -> None:
        noise = torch.randn_like(z)
        noise *= _lengths(z)[:, None] / _lengths(noise)[:, None]
        for row, inputs in enumerate((z, noise)):
            norms[step, row, places[site]] += _lengths(_without_bias(bases[site], inputs)).sum().double().cpu()

    with layer_inputs(stage, measure):
        for step in range(steps):
            stage.forward("scoring", step + 1)
    return add_up(norms)


def _without_bias(base: Any, inputs: Tensor) -> Tensor:
    """W·x by the layer's own forward pass, which knows quantised and transposed weights; its hooks do not run."""
    output: Tensor = base.forward(inputs)
    if base.bias is None:
        return output
    with loaded(base):
        return output - base.bias


def _lengths(rows: Tensor) -> Tensor:
    """The norm of each row, at least in fp32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).norm(dim=-1)


def _scores(sums: Tensor, types: Sequence[str]) -> Tensor:
    """1 ÷ NFN of each site or, nearly, of its type, by the sums (2, sites); 0 where no token was measured."""
    measured = (sums > 0).all(0)
    own = torch.where(measured, sums[0] / sums[1], 0.0)
    means = _means(own[measured].tolist(), [kind for kind, known in zip(types, measured, strict=True) if known])
    mean = torch.tensor([means.get(kind, 0.0) for kind in types], dtype=sums.dtype)
    return torch.where(measured, 1 / (mean + _OWN_SHARE * (own - mean)), 0.0)


def _means(values: Sequence[float], types: Sequence[str]) -> Mapping[str, float]:
    """The mean of the values of each type."""
    of: dict[str, list[float]] = {}
    for value, kind in zip(values, types, strict=True):
        of.setdefault(kind, []).append(value)
    return {kind: sum(found) / len(found) for kind, found in of.items()}


#: Halves of the batches. Each further group would cost another moment matrix a site.
_GROUPS = 2


@dataclass(frozen=True)
class ExplainedVariance(Rule):
    """Score a site by the share of its inputs' variance in their r leading directions (EVA, arXiv:2410.07170).

    The share is Σ_{j≤r} λ_j ÷ Σ_j λ_j. r is the site's rank, and λ are the eigenvalues of Σ z·zᵀ over the tokens of all
    batches, not centred, as in EVA. No gradient is computed.

    Each site keeps two matrices of in × in numbers, one for either half of the batches. The standard errors are those
    of a jackknife over these two halves, and so rough. The history has one row, because each row would take an
    eigendecomposition a site.

    Args:
        exact_up_to: Inputs with more features are sketched: in × (4r + 16) numbers, from which Nyström's method
            (Tropp et al. 2017, arXiv:1706.05736) finds the leading eigenvalues. It never overestimates them.
        head_steps: Steps in which a new head is trained alone first. 0, because no site's input depends on the head.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> ExplainedVariance(exact_up_to=1024)
        ExplainedVariance(head_steps=0, exact_up_to=1024)
    """

    exact_up_to: int = 4096
    head_steps: int | None = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: object = self.exact_up_to
        whole = isinstance(given, int) and given >= 0  # pyright: ignore[reportUnnecessaryIsInstance]
        require(whole, f"exact_up_to={given!r}", "a whole number of features, 0 or more")

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the last scores, in one row; nothing is trained."""
        moments = {name: _Moments.of(layer, self.exact_up_to) for name, layer in stage.layers.items()}
        step = 0

        def add(site: str, z: Tensor) -> None:
            moments[site].add(z, step % _GROUPS)

        with layer_inputs(stage, add):
            for step in range(steps[-1]):
                stage.forward("scoring", step + 1)
        shares: dict[tuple[int, ...], list[float]] = {(0,): [], (1,): [], (0, 1): []}
        for site in moments.values():
            site.add_up()
            for chosen, found in shares.items():
                found.append(site.share(chosen))
            site.sums.clear()
        known = jackknife(lambda chosen: torch.tensor(shares[tuple(chosen)], dtype=torch.float64), _GROUPS)
        measured = tuple(share > 0 for share in known.scores)
        yield (
            steps[-1],
            Scores((known.scores,), measured, known.scores, errors=known.errors, halves=known.halves),
        )


@dataclass
class _Moments:
    """M = Σ z·zᵀ over the tokens of each group, (in, in), or its sketch M·Ω, (in, k)."""

    r: int
    omega: Tensor | None
    """Ω, (in, k), with orthonormal columns; None where M itself is kept."""
    sums: list[Tensor]
    energy: Tensor
    """Σ‖z‖² of each group, (groups,)."""

    @classmethod
    def of(cls, layer: LoraLayer, exact_up_to: int) -> _Moments:
        a: Any = layer.lora_A["default"].weight
        r, features = a.shape
        omega = None
        width = min(features, 4 * r + 16)
        if features > exact_up_to:
            # The seed of the scoring, and not the generator's state: all processes need the same Ω.
            generator = torch.Generator().manual_seed(torch.initial_seed())
            drawn = torch.randn(features, width, dtype=torch.float64, generator=generator)
            omega = torch.linalg.qr(drawn).Q.to(a)
        columns = features if omega is None else width
        dtype = torch.promote_types(a.dtype, torch.float32)
        sums = [torch.zeros(features, columns, dtype=dtype, device=a.device) for _ in range(_GROUPS)]
        return cls(r, omega, sums, torch.zeros(_GROUPS, dtype=torch.float64))

    def add(self, z: Tensor, group: int) -> None:
        """Add the tokens ``z``, (n, in)."""
        z = z.to(self.sums[group])
        self.sums[group].addmm_(z.T, z if self.omega is None else z @ self.omega.to(z))
        self.energy[group] += z.square().sum().double().cpu()

    def add_up(self) -> None:
        """Add up the processes."""
        self.sums = [add_up(sums) for sums in self.sums]
        self.energy = add_up(self.energy)

    def share(self, groups: Sequence[int]) -> float:
        """The share of the r leading eigenvalues of M, over the tokens of ``groups``; 0 where there are none."""
        energy = float(self.energy[list(groups)].sum())
        if energy == 0:
            return 0.0
        total = torch.stack([self.sums[group] for group in groups]).sum(0)
        values = torch.linalg.eigvalsh(total) if self.omega is None else nystrom_eigenvalues(total, self.omega)
        return min(1.0, float(values[-self.r :].double().sum()) / energy)


def nystrom_eigenvalues(sketch: Tensor, omega: Tensor) -> Tensor:
    """Return the leading eigenvalues of a positive semidefinite M by its sketch M·Ω, in ascending order.

    They are those of M·Ω·(ΩᵀMΩ)⁺·(M·Ω)ᵀ, which is at most M, and equals M where M's rank is at most Ω's.

    Args:
        sketch: M·Ω, (in, k).
        omega: Ω, (in, k), with orthonormal columns.

    Example:
        >>> v = torch.tensor([[3.0], [0.0], [4.0]])
        >>> omega = torch.eye(3)[:, :2]
        >>> nystrom_eigenvalues(v @ v.T @ omega, omega).round().tolist()
        [25.0]
    """
    rounding = torch.finfo(sketch.dtype).eps * len(sketch)
    sketch, omega = sketch.double().cpu(), omega.double().cpu()
    core = omega.T @ sketch
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > rounding * values[-1]  # the others are rounding errors, which division would blow up
    return torch.linalg.svdvals(sketch @ vectors[:, kept] / values[kept].sqrt()).square().flip(0)


@contextmanager
def layer_inputs(stage: Stage, take: Callable[[str, Tensor], None]) -> Generator[None]:
    """Give the inputs of each site's frozen layer to ``take(site, tokens)`` while the model runs inside the block.

    ``tokens`` has the shape (tokens, in). Padding is left out where the model gets an ``attention_mask``. Dropout is
    off. The adapters are off, too: with B = 0 they would add nothing but time.

    Args:
        stage: The model while it is scored, before anything is trained.
        take: Called once for each call of a layer that has any token, before the layer runs. It must not change them.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from weightlora.model.sites import find_sites
        >>> from weightlora.selection.stage import probed
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> loss = lambda model, batch: model(batch["x"]).sum()
        >>> batches, sites = [{"x": torch.ones(2, 5, 4)}], find_sites(net).sites
        >>> with probed(net, LoraConfig(r=2), sites, batches=batches, steps=1, seed=0, loss_fn=loss) as stage:
        ...     with layer_inputs(stage, lambda site, tokens: print(site, tuple(tokens.shape))):
        ...         stage.forward("scoring", 1)
        0 (10, 4)
    """
    layers: list[Any] = list(stage.layers.values())
    with evaluated(stage.model), counted_tokens(stage.model) as rows, ExitStack() as hooks:
        for layer in layers:
            layer.enable_adapters(False)
        for name, layer in stage.layers.items():
            base: nn.Module = layer.get_base_layer()
            hook = base.register_forward_pre_hook(_Inputs(_ignore, partial(take, name), rows))
            hooks.callback(hook.remove)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


@dataclass(frozen=True)
class _Inputs(Observer):
    """A forward pre-hook that hands on the tokens; an :class:`Observer`, since it leaves the input as it is."""

    take: Callable[[Tensor], None]
    rows: TokenRows

    def __call__(self, *given: Any) -> None:
        """Hand on the tokens of one call of the layer."""
        _layer, inputs = given
        tokens = self.rows(inputs[0].detach())
        if len(tokens):
            self.take(tokens)


def _ignore() -> None:
    """Do nothing: the tokens say that the hook ran."""
