"""promptmesh: a peer-to-peer LLM inference mesh."""
