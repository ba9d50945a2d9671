"""A run's folder, without torch.

1. `history` finds what a start goes on from, and compares a checkpoint's past with a recipe.
2. `folder` takes the lock, writes what a run starts from, and puts other histories aside.
3. `checkpoints` knows which there are; `metrics` is `metrics.jsonl`, `loggers` sends the same
   elsewhere, `evaluations` has what checkpoints scored.
4. `fork` makes a run that shares another's first steps.
"""
