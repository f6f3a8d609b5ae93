"""Models for other runtimes: ``reinforce export onnx`` and ``reinforce export latency``."""
