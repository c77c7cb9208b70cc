"""Where shard folders lie: one file a kind of storage. `sivae_dist.data.store.open_store` chooses among them."""
