"""The search for the smallest caches with which a run keeps a validation loss."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jattn.models import DecoderLM
from jattn.train.budgets import with_budgets, write_budgets
from jattn.train.build import build_model, context_cache_bytes
from jattn.train.config import TrainConfig, UserError
from jattn.train.data import Batch, Dataset
from jattn.train.evaluate import make_evaluator
from jattn.train.load import TrainedModel, load_run
from jattn.train.objective import Examples, causal_examples, measure

# Tokens no budget goes below: the first one and the current one are never dropped.
MIN_BUDGET = 2


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """How far to shrink the caches of a run's selective layers.

    Attributes:
      run: Folder of a run that `jattn train` or `jattn compare` wrote.
      baseline: Folder of a run whose validation loss is to be kept, measured on the
        same text; that of the run itself, with its whole cache, if None.
      max_loss: The loss to be kept, in nats per token, instead of a baseline's.
      slack: Nats per token by which that loss may be exceeded.
      decrement: Tokens a budget is lowered by; a sixteenth of the context if None.
      fraction: Part of its tokens that a budget is lowered by as long as that is more
        than decrement. Halved for a budget that cannot be lowered by so much: the
        search is coarse at first and fine in the end.
      share: Part of whole contexts that is never gone below, although the loss would
        allow it; with a large slack, the search ends at a size instead of a loss.
      batches: Batches to measure; those of the run's evaluations if None.
      step: Which checkpoint; the one with the least validation loss if None.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    baseline: str | None = None
    max_loss: float | None = None
    slack: float = 0.0
    decrement: int | None = None
    fraction: float = 0.0
    share: float = 0.0
    batches: int | None = None
    step: int | None = None

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        if self.baseline is not None and self.max_loss is not None:
            raise UserError("give either baseline or max_loss, not both")
        if self.max_loss is not None and not 0 < self.max_loss < math.inf:
            raise UserError(f"max_loss must be greater than 0; got {self.max_loss}")
        if not 0 <= self.slack < math.inf:
            raise UserError(f"slack must be 0 or greater; got {self.slack}")
        for name in ("fraction", "share"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(
                    f"{name} must be at least 0 and less than 1; got {value}"
                )
        for name in ("decrement", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be greater than 0; got {value}")


@dataclasses.dataclass(frozen=True)
class PruneStep:
    """Where a search is.

    Attributes:
      step: Of the checkpoint.
      lowered: The layer whose budget was lowered last; None before the first one.
      budgets: Of each selective layer in order, None for whole contexts.
      share: Sum of the budgets over that of whole contexts.
      loss: Validation loss with them, in nats per token.
      limit: Loss they may have.
      cache_bytes: Of one sequence that fills the context.
      unpruned_bytes: The same with whole contexts.
    """

    step: int
    lowered: int | None
    budgets: tuple[int | None, ...]
    share: float
    loss: float
    limit: float
    cache_bytes: int
    unpruned_bytes: int


def prune(config: PruneConfig, data: Dataset | None = None) -> Iterator[PruneStep]:
    """Searches the budgets of a run, and keeps them when the search is over.

    All budgets begin with the whole context. Again and again the layer in which a
    token less costs the least validation loss gives up some, until none can without
    exceeding the limit, or the wanted share is left. Only then is anything written: a
    search that ends earlier, or whose iterator is not exhausted, leaves the run as it
    was.

    Args:
      config: What to do.
      data: The text of the run if it has been read; read if None.

    Yields:
      The state before the search, and after every budget that was lowered.

    Raises:
      UserError: The run or its baseline does not allow it, or the loss is too large
        before anything is pruned.
    """
    run = load_run(config.run, config.step)
    model = run.model
    if not isinstance(model, DecoderLM) or not model.budget_layers():
        raise UserError(f"{config.run} has no selective layers whose cache may shrink")
    layers = model.budget_layers()
    context = run.config.data.context_length
    data = Dataset.of(run.config, data)
    batches = data.validation_batches(config.batches or run.config.eval_batches)
    losses = make_budget_evaluator(model, run.config, run.params, batches)

    limit = config.max_loss
    if config.baseline is not None:
        limit = _baseline_loss(config.baseline, run, batches)
    search = search_budgets(
        losses,
        num_layers=len(layers),
        context=context,
        decrement=config.decrement or max(1, context // 16),
        fraction=config.fraction,
        end=math.floor(config.share * context * len(layers)),
        limit=None if limit is None else limit + config.slack,
        slack=config.slack,
    )

    def cache_bytes(budgets):
        pruned = with_budgets(run.config, budgets)
        return context_cache_bytes(build_model(pruned, data.vocab_size), pruned)

    unpruned_bytes = cache_bytes(())
    state = None
    for found in search:
        budgets = tuple(None if k == context else int(k) for k in found.budgets)
        state = PruneStep(
            step=run.step,
            lowered=None if found.lowered is None else layers[found.lowered],
            budgets=budgets,
            share=float(np.mean(found.budgets)) / context,
            loss=found.loss,
            limit=found.limit,
            cache_bytes=cache_bytes(budgets),
            unpruned_bytes=unpruned_bytes,
        )
        yield state
    assert state is not None
    write_budgets(
        config.run, run.step, state.budgets, loss=state.loss, limit=state.limit
    )


class Found(NamedTuple):
    """A state of `search_budgets`.

    Attributes:
      lowered: Index of the budget lowered last, None before the first.
      budgets: int [L].
      loss: With them.
      limit: Of the loss.
    """

    lowered: int | None
    budgets: np.ndarray
    loss: float
    limit: float


def search_budgets(
    losses: Callable[[np.ndarray], np.ndarray],
    *,
    num_layers: int,
    context: int,
    decrement: int,
    fraction: float = 0.0,
    end: int = 0,
    limit: float | None,
    slack: float = 0.0,
) -> Iterator[Found]:
    """Lowers one budget after the other, each time where a token costs the least.

    A lower budget makes the next token of any layer dearer, as a rule. So the layer
    that was cheapest when it was last measured is measured again, and chosen if it
    still is the cheapest: mostly, it is not the loss of all layers that is needed for a
    step, but that of one or two. A layer that cannot be lowered is not tried again.

    Args:
      losses: From budgets int32 [C, L] of C candidates to their losses [C].
      num_layers: Budgets L.
      context: Where all budgets begin.
      decrement: The least a budget is lowered by, down to MIN_BUDGET.
      fraction: Part of a budget that it is lowered by if that is more. Halved for a
        layer in which so much exceeds the limit.
      end: Sum of the budgets at which the search ends.
      limit: The largest loss allowed; the first one plus slack if None.
      slack: See limit.

    Yields:
      The state before the search, and after every budget that was lowered.

    Raises:
      UserError: The loss exceeds the limit with whole contexts.
    """
    budgets = np.full(num_layers, context, np.int32)
    loss = float(losses(budgets[None])[0])
    if not math.isfinite(loss):
        raise UserError(f"with its whole cache the run has a validation loss of {loss}")
    limit = loss + slack if limit is None else limit
    if loss > limit:
        raise UserError(
            f"with its whole cache the run has a validation loss of {loss:.4f}, which "
            f"is not within the limit of {limit:.4f}; allow more by --slack"
        )
    yield Found(None, budgets, loss, limit)
    fractions = np.full(num_layers, fraction)
    # What a token less of each layer cost when it was last measured, and the losses of
    # the layers that were measured with these budgets.
    costs = np.full(num_layers, -np.inf)
    measured: dict[int, float] = {}
    while True:
        layer = int(np.argmin(costs))
        spare = int(np.sum(budgets)) - end
        if costs[layer] == np.inf or spare <= 0:
            return
        less = max(decrement, int(fractions[layer] * budgets[layer]))
        less = min(less, spare)
        lowered = budgets.copy()
        lowered[layer] = max(budgets[layer] - less, min(MIN_BUDGET, context))
        if layer in measured:
            budgets, loss = lowered, measured[layer]
            measured.clear()
            yield Found(layer, budgets, loss, limit)
        elif lowered[layer] == budgets[layer]:
            costs[layer] = np.inf
        else:
            found = float(losses(lowered[None])[0])
            if found <= limit:
                measured[layer] = found
                costs[layer] = (found - loss) / (budgets[layer] - lowered[layer])
            elif less > decrement:
                # Less of a layer may be cheaper than what the others can give up.
                fractions[layer] /= 2
                costs[layer] = -np.inf
            else:
                costs[layer] = np.inf


def make_budget_evaluator(
    model: DecoderLM, config: TrainConfig, params: Any, batches: Sequence[Batch]
) -> Callable[[np.ndarray], np.ndarray]:
    """The function from budgets to validation losses, compiled once.

    Args:
      model: With selective layers.
      config: Of its run.
      params: Its parameters.
      batches: What is measured.

    Returns:
      A function from budgets int32 [C, L] of C candidates to their losses [C], nats
      per token in float64. Kernels take the candidates one after the other.
    """

    @jax.jit
    def nats(params, batch: Batch, budgets):
        examples = causal_examples(batch)
        parts = jax.tree.map(
            lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), examples
        )

        def of_part(part: Examples):
            def of_candidate(budgets):
                variables = model.budget_variables(budgets)
                sums, _ = measure(model, params, part, variables=variables)
                return sums.nats

            return jax.vmap(of_candidate)(budgets)

        return jnp.sum(jax.lax.map(of_part, parts), axis=0)

    tokens = sum(int(np.sum(batch.segment_ids > 0)) for batch in batches)

    def losses(budgets: np.ndarray) -> np.ndarray:
        # The device works on all batches before the host looks at the first.
        found: list[Any] = [nats(params, batch, budgets) for batch in batches]
        return np.sum(np.asarray(jax.device_get(found), np.float64), axis=0) / tokens

    return losses


def _baseline_loss(folder: str, run: TrainedModel, batches: Sequence[Batch]) -> float:
    """The validation loss of another run on the batches of this one."""
    baseline = load_run(folder)
    if baseline.config.model.is_masked:
        raise UserError(f"{folder} fills in masks; its loss is of another kind")
    tokenizers = run.config.data.tokenizer, baseline.config.data.tokenizer
    if tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"{folder} has another tokenizer ({tokenizers[1] or 'bytes'}, not "
            f"{tokenizers[0] or 'bytes'}); its losses cannot be compared"
        )
    evaluate = make_evaluator(baseline.model, run.config, run.tokenizer.vocab_size)
    return evaluate(baseline.params, batches).loss
