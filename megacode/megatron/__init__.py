"""The only room that imports Megatron-Core.

1. `cpu` lets it run without a device; `distributed` starts ranks and their groups; `cuda`, `hardware`, `userbuffers` see to
   the device.
2. `config` turns a recipe into a TransformerConfig; `model` builds the model chunks; `initialize`, `mup`, `norm`, `loss` are
   their parts.
3. `optimizer` builds and drives the optimizer; `step` runs one training step.
4. `checkpoint` saves and loads, once `checkpoint_index` has read the index as data; `inference` reads a model for use.
"""
