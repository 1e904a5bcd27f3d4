"""KV-cache policies: which keys and values a KV head keeps. One file per policy, on :class:`headpatch.policies.CacheMethod`."""
