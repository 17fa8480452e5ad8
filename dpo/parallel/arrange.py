"""Which `Sharding` each trainer's name stands for."""

from dpo import parallel
from dpo.model.config import ParallelConfig
from dpo.utils import UserError


def sharding_of(config: ParallelConfig) -> parallel.Sharding | None:
    """Return how the model lies over the processes of the group; None: whole, in one process.

    Raise UserError, with the arithmetic, if the processes cannot be arranged as the configuration asks.
    """
    if not config.needs_group:
        return None
    replicate, processes = config.fsdp_replicate_size, parallel.world_size()
    tensor = 1
    if config.trainer == "TensorParallelTrainer":
        tensor = config.tensor_parallel_size or processes // replicate
    shard, rest = divmod(processes, replicate * tensor)
    if rest or not shard:
        raise UserError(
            f"{processes} processes cannot be arranged as fsdp_replicate_size={replicate} x tensor parallel {tensor} x "
            f"FSDP shards: {processes} / ({replicate} x {tensor}) = {processes / (replicate * tensor):.2f}; "
            "change one of them, or nproc"
        )
    sharding = parallel.Sharding(
        replicate=replicate,
        shard=shard,
        tensor=tensor,
        block_name=config.model.block_name or config.model.block,
        compute_dtype=config.compute_dtype,
        reshard_after_forward=config.fsdp_reshard_after_forward and not config.fsdp_reduce_once,
        cpu_offload=config.fsdp_cpu_offload,
    )
    if not sharding.fsdp and (sharding.cpu_offload or not sharding.reshard_after_forward):
        raise UserError(
            "fsdp_cpu_offload, fsdp_reshard_after_forward and fsdp_reduce_once are FSDP's, and with "
            f"tensor_parallel_size={tensor} of {processes} processes nothing is left for it: leave them out, or lower "
            "tensor_parallel_size"
        )
    return sharding
