"""Recipe -> Plan: every step known before it starts. No torch.

1. `plan.make_plan` places phases on one step counter; `quota` gives each source its exact count at every step.
2. `windows` cuts a source into samples; `fingerprint` and `past` say what decides the batches and the model of past steps.
3. `memory`, `estimate`, `overlap`, `devices`, `hardware` tell what a layout needs and how long it takes; `suggest` looks for one.
4. `summary` is the plan as plain data.
"""
