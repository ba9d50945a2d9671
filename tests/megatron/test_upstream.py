"""What stands in megacode/megatron against faults of Megatron-Core: a check fails once the installed version has mended its
fault, and says what can then go. It reads Megatron-Core's source, as most of these faults need devices to show."""

from __future__ import annotations

import dataclasses
import inspect

from tests.processes import run_on


def sources(world: object) -> dict[str, str]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return {
        "queue": inspect.getsource(filesystem_async._get_write_results_queue),
        "norm": inspect.getsource(WrappedTorchNorm),
        "loss": inspect.getsource(LanguageModule.compute_language_model_loss),
        "optimizer": inspect.getsource(distrib_optimizer),
        "fields": " ".join(field.name for field in dataclasses.fields(TransformerConfig)),
    }


def test_every_fault_is_there_still() -> None:
    (found,) = run_on(1, sources)
    assert "Manager().Queue()" in found["queue"], (
        "a queue that a signal to the whole job does not end (to 0.16.1 at least): results_queue.py can go"
    )
    assert "assert not config.sequence_parallel" in found["norm"], (
        "torch's norms with sequence parallelism (refused to 0.16.1 at least): norm.py can go"
    )
    assert "CudaGraphScope.full_iteration" in found["loss"], (
        "Transformer Engine's loss without a copy from the host in every micro-batch (0.16.1 tells it so for graphs of a whole "
        "iteration only): loss.py can go"
    )
    assert found["optimizer"].count("remainder") == 1, (
        "16-bit remainders of master weights in checkpoints (0.16 to 0.19 write them as if they were masters): master_weights.py "
        "may go"
    )
    assert "use_mup" not in found["fields"], (
        "muP's factors on embeddings and logits (from 0.17 on): the hooks of mup.py can go"
    )
