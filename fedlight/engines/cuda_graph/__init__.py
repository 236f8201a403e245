"""The engine that records local steps as CUDA graphs, and replays them."""

from fedlight.engines.cuda_graph.engine import CudaGraph

__all__ = ["CudaGraph"]
