"""What runs around a training job: evaluation, studies, planner, scaling. Nothing outside of it imports it."""
