"""What the loop and the verbs ask of a model.

1. `validation` measures loss by source and domain.
2. `generate` continues tokens.
3. `tasks` reads tasks, `probes` makes some from seeds, `checking` tells which written answers pass.
4. `harness` runs tasks of lm-evaluation-harness; `harness_model` is the model that it asks.
"""
