"""Recipe -> Plan: every step known before it starts. No torch.

1. `plan.make_plan` places phases on one step counter; `quota` gives each source its exact count at
   every step.
2. `streams` says which windows of a source a phase reads; `trajectory` reads shares that a run has
   decided, `bounds` says how far they can go.
3. `fingerprint` and `past` say what decides the batches and the model of past steps, and where two
   recipes differ in it.
4. `memory`, `estimate`, `overlap`, `devices`, `hardware` tell what a layout needs and how long it
   takes; `suggest` looks for one.
5. `summary` is the plan as plain data.
"""
