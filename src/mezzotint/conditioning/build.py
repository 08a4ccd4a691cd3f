"""Every conditioning that a recipe can ask for, and how it is built (paper, section 3.3)."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field
from tokenizers import Tokenizer

from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
    LowResConditioner,
    LowResConditionerConfig,
    SemanticMapConditioner,
    SemanticMapConditionerConfig,
)
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig
from mezzotint.conditioning.vocabularies import bert_tokenizer
from mezzotint.config import Config
from mezzotint.errors import ConfigError

__all__ = [
    "ConditioningConfig",
    "HybridConfig",
    "MainConfig",
    "SpatialConfig",
    "UnconditionalConfig",
    "build_conditioner",
    "concat_channels",
    "main_config",
    "spatial_config",
    "with_class_names",
]

MainConfig = (
    TextConditionerConfig
    | BertTextConditionerConfig
    | ClassConditionerConfig
    | LayoutConditionerConfig
)
SpatialConfig = SemanticMapConditionerConfig | LowResConditionerConfig | InpaintingConditionerConfig


class UnconditionalConfig(Config):
    """No condition at all."""

    kind: Literal["none"] = "none"


class HybridConfig(Config):
    """A condition for cross-attention and one to concatenate.

    Attributes:
        main: Gives the tokens; it alone is dropped for classifier-free guidance.
        spatial: Is concatenated to the noisy latent.
    """

    kind: Literal["hybrid"] = "hybrid"
    main: Annotated[MainConfig, Field(discriminator="kind")]
    spatial: Annotated[SpatialConfig, Field(discriminator="kind")]


ConditioningConfig = Annotated[
    MainConfig | SpatialConfig | HybridConfig | UnconditionalConfig, Field(discriminator="kind")
]


def main_config(config: ConditioningConfig) -> MainConfig | None:
    """Return what gives tokens for cross-attention, if anything does."""
    config = config.main if isinstance(config, HybridConfig) else config
    return config if isinstance(config, MainConfig) else None


def spatial_config(config: ConditioningConfig) -> SpatialConfig | None:
    """Return what is concatenated to the noisy latent, if anything is."""
    config = config.spatial if isinstance(config, HybridConfig) else config
    return config if isinstance(config, SpatialConfig) else None


def concat_channels(config: ConditioningConfig) -> int:
    """Return how many channels are concatenated to the noisy latent."""
    match spatial_config(config):
        case SemanticMapConditionerConfig() as spatial:
            return spatial.out_channels
        case LowResConditionerConfig() as spatial:
            return spatial.channels * spatial.fold**2
        case InpaintingConditionerConfig() as spatial:
            return spatial.latent_channels + 1  # and the mask
        case None:
            return 0


def with_class_names(
    config: ConditioningConfig, names: tuple[str, ...] | None
) -> ConditioningConfig:
    """Give a conditioning of classes or layouts the data's class names, if it has none.

    Args:
        config: Any conditioning; those without classes come back as they are.
        names: The data's classes by index; None if they have none.

    Raises:
        ConfigError: If it has names already, and they are others.
    """
    main = main_config(config)
    if not isinstance(main, ClassConditionerConfig | LayoutConditionerConfig) or names is None:
        return config
    if main.class_names == names:
        return config
    if main.class_names:
        key = "conditioning.main" if isinstance(config, HybridConfig) else "conditioning"
        raise ConfigError(
            f"{key}.class_names are {', '.join(main.class_names)}, but the data has"
            f" {', '.join(names)}; leave the key out to take those"
        )
    # from_dict and not a copy: the names must fit the rest of the configuration
    named = type(main).from_dict({**main.to_dict(), "class_names": names})
    if isinstance(config, HybridConfig):
        return HybridConfig(main=named, spatial=config.spatial)
    return named


def build_conditioner(
    config: ConditioningConfig,
    tokenizer: Callable[[TextConditionerConfig], Tokenizer] | None = None,
) -> Conditioner:
    """Build the conditioner of a configuration, untrained.

    Args:
        config: Any conditioning; classes have their names (see `with_class_names`).
        tokenizer: Makes the vocabulary that ``kind: text`` learns from its captions; nothing else
            needs it. ``kind: bert`` reads BERT's own, which is shipped.

    Raises:
        ConfigError: If ``kind: class`` has no classes, or the vocabulary does not fit.

    Example:
        >>> build_conditioner(LowResConditionerConfig()).concat_channels
        3
    """
    match config:
        case TextConditionerConfig():
            assert tokenizer is not None, "kind: text needs a vocabulary"
            return TextConditioner(config, tokenizer(config))
        case BertTextConditionerConfig():
            return BertTextConditioner(config, bert_tokenizer())
        case ClassConditionerConfig():
            if not config.class_names:
                raise ConfigError("conditioning.class_names: kind 'class' needs at least one class")
            return ClassConditioner(config)
        case LayoutConditionerConfig():
            return LayoutConditioner(config)
        case SemanticMapConditionerConfig():
            return SemanticMapConditioner(config)
        case LowResConditionerConfig():
            return LowResConditioner(config)
        case InpaintingConditionerConfig():
            return InpaintingConditioner(config)
        case HybridConfig():
            main = build_conditioner(config.main, tokenizer)
            return HybridConditioner(main, build_conditioner(config.spatial))
        case UnconditionalConfig():
            return Unconditional()
