"""The run configuration: one YAML file, one tree of frozen dataclasses, strict.

Every key can be given on the command line (`--optimizer.learning_rate 1e-4`). No JAX is imported here, so `--help` and
`--print_config` answer at once. `config.files` reads and writes the YAML.
"""

from jaxlm.config.data import DataConfig, MixingConfig, SourceConfig
from jaxlm.config.inference import Decoding, EvaluateConfig, GenerateConfig, InferenceModelConfig, ServeConfig
from jaxlm.config.model import LoraConfig, ModalityConfig, ModelConfig, MoeRunConfig, TokenizerConfig
from jaxlm.config.plain import flatten, to_dict
from jaxlm.config.preference import GrpoConfig, PreferenceConfig
from jaxlm.config.prepare import PrepareConfig
from jaxlm.config.run import (
    DistributedConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "Decoding",
    "DistributedConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "GrpoConfig",
    "InferenceModelConfig",
    "LoraConfig",
    "MeshConfig",
    "MixingConfig",
    "ModalityConfig",
    "ModelConfig",
    "MoeRunConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "PrepareConfig",
    "ProfileConfig",
    "RunConfig",
    "ServeConfig",
    "SourceConfig",
    "TaskConfig",
    "TokenizerConfig",
    "TrainConfig",
    "flatten",
    "to_dict",
]
