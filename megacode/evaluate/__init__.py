"""What the loop and the verbs ask of a model.

1. `validation` measures loss by source and domain.
2. `generate` continues tokens.
3. `harness` runs tasks of lm-evaluation-harness, on Megatron-Core's model through `harness_model`.
"""
