"""A run's folder, without torch.

1. `folder` writes what a run starts from, and says which checkpoint it goes on from.
2. `checkpoints` knows which there are; `history` compares a checkpoint's past with a recipe.
3. `metrics` is `metrics.jsonl`; `fork` makes a run that shares another's first steps.
"""
