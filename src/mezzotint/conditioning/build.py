"""Every conditioner, what a recipe can ask for, and how each is built (paper, section 3.3)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, cast

from pydantic import Field
from tokenizers import Tokenizer
from torch import nn

from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig
from mezzotint.conditioning.regions import RegionsConditioner, RegionsConditionerConfig
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
from mezzotint.conditioning.vocabularies import bert_tokenizer, clip_tokenizer
from mezzotint.config import Config
from mezzotint.errors import ConfigError

__all__ = [
    "CONFIGURATIONS",
    "READ_TEXT",
    "ConditioningConfig",
    "HybridConfig",
    "MainConfig",
    "SpatialConfig",
    "UnconditionalConfig",
    "build_conditioner",
    "concat_channels",
    "main_config",
    "published_tokenizer",
    "spatial_config",
    "with_class_names",
]

# each conditioner that is built of one configuration
CONFIGURATIONS: Mapping[type[Conditioner], type[Config]] = {
    TextConditioner: TextConditionerConfig,
    ClipConditioner: ClipConditionerConfig,
    BertTextConditioner: BertTextConditionerConfig,
    ClassConditioner: ClassConditionerConfig,
    LayoutConditioner: LayoutConditionerConfig,
    SemanticMapConditioner: SemanticMapConditionerConfig,
    LowResConditioner: LowResConditionerConfig,
    InpaintingConditioner: InpaintingConditionerConfig,
    RegionsConditioner: RegionsConditionerConfig,
}
# what is built of a tokenizer too, and the published one if there is one
READ_TEXT: Mapping[type[Conditioner], Callable[[], Tokenizer] | None] = {
    TextConditioner: None,
    ClipConditioner: clip_tokenizer,
    BertTextConditioner: bert_tokenizer,
}
_CLASSES: Mapping[type[Config], type[Conditioner]] = {
    config: kind for kind, config in CONFIGURATIONS.items()
}

MainConfig = (
    TextConditionerConfig
    | BertTextConditionerConfig
    | ClassConditionerConfig
    | LayoutConditionerConfig
)
SpatialConfig = (
    SemanticMapConditionerConfig
    | LowResConditionerConfig
    | InpaintingConditionerConfig
    | RegionsConditionerConfig
)


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
        case RegionsConditionerConfig() as spatial:
            return spatial.max_objects
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


def build_conditioner(config: Config, tokenizer: Tokenizer | None = None) -> Conditioner:
    """Build a conditioner of its configuration, with random weights.

    Args:
        config: Of any conditioner; classes have their names (see `with_class_names`).
        tokenizer: Of one that reads text; the published one if not given. ``kind: text`` has none,
            as it learns its vocabulary from its captions.

    Raises:
        ConfigError: If ``kind: class`` has no classes, or the tokenizer is not for it.
        MissingExtraError: If it needs ``transformers``, which is not installed.

    Example:
        >>> build_conditioner(LowResConditionerConfig()).concat_channels
        3
    """
    if isinstance(config, UnconditionalConfig):
        return Unconditional()
    if isinstance(config, HybridConfig):
        main = build_conditioner(config.main, tokenizer)
        return HybridConditioner(main, build_conditioner(config.spatial))
    if isinstance(config, ClassConditionerConfig) and not config.class_names:
        raise ConfigError("conditioning.class_names: kind 'class' needs at least one class")
    kind = _CLASSES[type(config)]
    build = cast(Callable[..., Conditioner], kind)
    if kind not in READ_TEXT:
        return build(config)
    published = READ_TEXT[kind]
    assert tokenizer is not None or published is not None, "it trains a tokenizer of its own"
    return build(config, tokenizer or (published and published()))


def published_tokenizer(conditioner: nn.Module) -> Tokenizer | None:
    """Return the tokenizer with which models of a conditioner's kind were published, if any."""
    published = next((give for kind, give in READ_TEXT.items() if type(conditioner) is kind), None)
    return published and published()
