"""Transformer Engine's kernels, written in torch: what `transformer_engine_torch` offers its Python side, as far as megacode's
layers, optimizers and tests ask for it. They follow the documented arithmetic (which operand in which copy, which scale for
which block, where sums are in fp32), not the speed."""
