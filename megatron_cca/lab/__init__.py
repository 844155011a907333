"""Code around a training job: evaluation, studies, planner, scaling. Only the programs import it."""
