"""Log-probabilities of the frozen reference: the policy before its first update."""

import torch
from transformers import PreTrainedModel

import parallel
from batching import Batch
from models import TokenLogps, response_logps


class LiveReference:
    """A second, frozen model in memory, computed on the same rows and in the same precision as the policy."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype):
        self.model = model.requires_grad_(False).eval()
        self.compute_dtype = compute_dtype

    def response_logps(self, batch: Batch) -> TokenLogps:
        """As models.response_logps. There are no gradients, as nothing requires one; under `no_grad` tensor parallelism
        would take other kernels than the policy's."""
        found = response_logps(self.model, batch, self.compute_dtype)
        assert not found.logps.requires_grad
        parallel.reshard(self.model)
        return found
