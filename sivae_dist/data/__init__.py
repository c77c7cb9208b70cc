"""Data: which sample when (plan), where it lies (shards), how it becomes a batch (loader)."""

from sivae_dist.data.base import Batch, DataConfig, HostBatch, Stream

__all__ = ["Batch", "DataConfig", "HostBatch", "Stream"]
