"""Multi-modal dataset reinforcement: image-text shards in, layers of Parquet out, students trained from them.

>>> reinforce.run("configs/demo.yaml")
>>> for sample in reinforce.open("demo/dataset", teachers=["small"]): ...
"""

from reinforce.config import Config, load_config
from reinforce.dataset import Dataset, Sample, open
from reinforce.errors import UserError
from reinforce.runner import run

__all__ = ["Config", "Dataset", "Sample", "UserError", "load_config", "open", "run"]
