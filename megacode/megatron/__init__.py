"""The only room that imports Megatron-Core.

1. `cpu` lets it run without a device; `distributed` starts ranks and their groups; `hardware` finds
   the device and sets it up.
2. `config` turns a recipe into Megatron-Core's configuration; `model` builds the model chunks, and
   `initialize` their weights.
3. `optimizer` builds the optimizer, `optimizer_state` keeps its state the same for every Adam;
   `weight_ema` averages weights over steps; `step` runs one training step, whose losses of pairs
   are in `objective`.
4. `checkpoint` saves and loads, once `checkpoint_index` has read the index as data; `inference`
   reads a model for use, `scoring` gives likelihoods and embeddings of tokens.

`workarounds` has what is only there because of faults of Megatron-Core and others, and the form in
which every one of them is noted.
"""
