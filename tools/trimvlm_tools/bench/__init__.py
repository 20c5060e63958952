"""Benchmarks: prefill time against FLOPs and against a peer, memory, bundle size. See docs/benchmarks.md."""
