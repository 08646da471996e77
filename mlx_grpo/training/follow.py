"""A run as the ranks live it that do not write it: the same stages, nothing said, nothing kept."""

from dataclasses import replace

from mlx_grpo.console.output import Console
from mlx_grpo.core.stopping import StopRequested, stop_signals
from mlx_grpo.grpo.iteration import iterate
from mlx_grpo.grpo.learner import Learner, first_state, policy_at
from mlx_grpo.training.agreement import check_inputs, share_state
from mlx_grpo.training.setup import check_skips, evaluation_due, provenance_of


def follow(parts: Learner, ui: Console) -> bool:
    """Work until the run of rank 0 ends; False if a signal ended it early."""
    config, ranks = parts.config, parts.ranks
    check_inputs(ranks, provenance_of(parts))
    state = share_state(ranks, first_state(config), parts.roles.actor.model, parts.optimizer)
    try:
        with stop_signals() as signalled:
            safe_point = ranks.watching(signalled)
            while True:
                if evaluation_due(state, config):
                    policy = policy_at(parts, state.iteration)
                    parts.evaluator(policy, safe_point=safe_point, ranks=ranks)
                    state = replace(state, evaluated=state.iteration)
                elif state.iteration == config.num_iterations:
                    return True
                else:
                    safe_point()
                    check_skips(state, config)
                    state = iterate(parts, state, ui, safe_point).state
    except StopRequested:
        ranks.stopped()
        return False
