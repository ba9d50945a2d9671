"""YAML -> Recipe: typed, frozen, checked before anything starts. No torch.

1. `yaml_tree` reads a file into nodes that know their line; `compose` resolves `extends` and
   `--set`.
2. `load` validates the tree against `schema` (with `schema_mixture`, `schema_model`, `schema_run`)
   and turns complaints into sentences; `budgets` become weights and tokens.
3. `checks` and `checks_phases` tell combinations that cannot work; `megatron_fields` knows what
   `model.megatron` may name.
4. `mixtures` and `schedules` answer what a phase reads and how fast it learns at a step; `online`
   decides shares from losses.
"""
