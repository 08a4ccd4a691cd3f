"""How a number is measured, as one named value: what differs between two papers' FIDs."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from mezzotint.config import Document, read_yaml
from mezzotint.errors import ConfigError, nearest

__all__ = ["METRICS", "PROTOCOLS", "EvaluationProtocol", "Metric", "get_protocol"]

Metric = Literal[
    "kid",
    "fid",
    "inception_score",
    "precision",
    "recall",
    "density",
    "coverage",
    "nearest_training",
    "retrieval",
    "rate",
    "psnr",
    "ssim",
    "lpips",
    "rkid",
    "rfid",
]
METRICS: tuple[Metric, ...] = get_args(Metric)
_RECONSTRUCTION: frozenset[Metric] = frozenset({"rate", "psnr", "ssim", "lpips", "rkid", "rfid"})
_MANIFOLD: frozenset[Metric] = frozenset({"precision", "recall", "density", "coverage"})

Count = Annotated[int, Field(ge=1)]


class EvaluationProtocol(Document):
    """All that decides a number beside the pictures and the weights of the feature network.

    Attributes:
        name: What tables and cards call it.
        description: Where it comes from, in words.
        metrics: What is computed, in the order in which it is told. Those of what a first stage
            keeps of a picture (rate, psnr, ssim, lpips, rkid, rfid) have protocols of their own.
        network: Of `mezzotint.models.features.FEATURE_NETWORKS`; a metric on another one than the
            canonical Inception is named after it.
        resize: How pictures are brought to the network's size.
        dtype: What the pictures are when they reach the network; 8 bits, as they are stored.
        samples: Generated pictures that are measured, spread evenly over a folder that has more.
        fewer: Whether fewer will do: as many as a folder has, or, from a model, as many as the
            reference has. Otherwise fewer are refused.
        reference_split: The part of the reference data that is compared with, where it has parts.
        reference_samples: At most this many of its pictures, evenly spread; None is all of them.
            Copies are looked for among all training pictures, however many they are.
        manifold_reference_samples: At most this many of these again, evenly spread, for precision,
            recall, density and coverage; None is all of them.
        manifold_network: For precision, recall, density and coverage; None is ``network``.
        manifold_k: Nearest neighbour that sets the radii of precision and recall
            (arXiv 1904.06991, equation 1).
        density_k: The same for density and coverage (arXiv 2002.09797, equations 3 and 4).
        real_side: Which pictures span the manifold that precision asks about: the ``reference``
            (precision is the share of generated pictures inside it), or those ``evaluated``.
        kid_subsets: Random subsets that KID is averaged over; None is the unbiased estimate over
            all pairs of pictures (arXiv 1801.01401, section 4), with a jackknife standard error.
        kid_subset_size: Pictures in each.
        kid_seed: Chooses them.
        inception_splits: Parts that the Inception Score is averaged over.
        inception_shuffle_seed: Shuffles the pictures before; None leaves their order.
        resamples: Groups left out in turn for the standard error of FID. With 0 only KID and the
            Inception Score tell one; else the medians of nearest_training do too, from 200
            bootstraps, and the shares of pictures, in closed form.
        ema: Whether a model's averaged weights draw, which a model folder holds.
        batch_size: Pictures in a batch; batches are fixed by index, whoever computes them.
    """

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)]
    network: str
    resize: Literal["bicubic-antialias", "tf1-bilinear", "pil-bicubic"]
    dtype: Literal["uint8"] = "uint8"
    samples: Count
    fewer: bool = False
    reference_split: Literal["train", "validation", "test", "all"] = "train"
    reference_samples: Count | None = None
    manifold_reference_samples: Count | None = None
    manifold_network: str | None = None
    manifold_k: Count = 3
    density_k: Count = 5
    real_side: Literal["reference", "evaluated"] = "reference"
    kid_subsets: Count | None = 100
    kid_subset_size: Annotated[int, Field(ge=2)] = 1000
    kid_seed: Annotated[int, Field(ge=0)] = 0
    inception_splits: Count = 10
    inception_shuffle_seed: Annotated[int, Field(ge=0)] | None = 2020
    resamples: Annotated[int, Field(ge=0, le=1000)] = 0
    ema: bool = True
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 32

    @field_validator("network", "manifold_network")
    @classmethod
    def _network_exists(cls, name: str | None) -> str | None:
        # imported here because the networks import torch, which --help must not
        from mezzotint.models.features import FEATURE_NETWORKS

        if name is not None and name not in FEATURE_NETWORKS:
            raise ValueError(f"unknown feature network {name!r}; {nearest(name, FEATURE_NETWORKS)}")
        return name

    @field_validator("metrics")
    @classmethod
    def _distinct(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if len(set(metrics)) != len(metrics):
            raise ValueError("a metric stands there twice")
        return metrics

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        of_first_stages = _RECONSTRUCTION & set(self.metrics)
        if of_first_stages and len(of_first_stages) < len(self.metrics):
            raise ValueError(
                f"metrics: {min(of_first_stages)} is of a first stage, and others are of a set of"
                " pictures; keep one kind"
            )
        if of_first_stages and (self.network, self.resize) != ("mobilenet-v2", "bicubic-antialias"):
            raise ValueError(
                "network: reconstructions are measured on mobilenet-v2 with resize:"
                " bicubic-antialias"
            )
        return self

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.resamples == 1:
            raise ValueError("resamples: a standard error needs at least 2, or 0 for none")
        most = self.manifold_reference_samples
        for metric in self.metrics:
            least = self.needs_of(metric, real=True)
            if metric in _MANIFOLD and most is not None and most < least:
                raise ValueError(
                    f"manifold_reference_samples: {most} are too few: {metric} takes at least"
                    f" {least}"
                )
        if self.samples < self.needs():
            raise ValueError(
                f"samples: {self.samples} are too few: {self.needed_by()} takes at least"
                f" {self.needs():,}"
            )
        return self

    @property
    def networks(self) -> tuple[str, ...]:
        """The feature networks that its metrics look through, each once."""
        return tuple(dict.fromkeys(self.network_of(metric) for metric in self.metrics))

    @property
    def of_first_stages(self) -> bool:
        """Whether it measures what a first stage keeps of pictures."""
        return not _RECONSTRUCTION.isdisjoint(self.metrics)

    def network_of(self, metric: Metric) -> str:
        """Return the feature network of one metric."""
        if metric in _MANIFOLD and self.manifold_network is not None:
            return self.manifold_network
        return self.network

    def needs_of(self, metric: Metric, *, real: bool = False) -> int:
        """Return how many pictures a metric needs at least: generated ones, or ``real`` ones."""
        match metric:
            case "kid":
                return 3 if self.kid_subsets is None else self.kid_subset_size
            case "inception_score":
                return 0 if real else 2 * self.inception_splits
            case "precision" | "recall":
                return self.manifold_k + 1
            case "density" | "coverage":
                return self.density_k + 1
            case "fid":
                # each group that is left out in turn has a covariance
                return 2 if real else max(2, 2 * self.resamples)
            case "nearest_training":
                return 2
            case "retrieval":
                return 1
            case "rate" | "psnr" | "ssim" | "lpips" | "rkid" | "rfid":
                return 3

    def needs(self) -> int:
        """Return how many pictures all of its metrics need at least."""
        return max(self.needs_of(metric) for metric in self.metrics)

    def needed_by(self) -> Metric:
        """Return the metric that needs the most pictures."""
        return max(self.metrics, key=self.needs_of)


_CANONICAL = "inception-v3-fid"
_BUILT_IN = (
    EvaluationProtocol(
        name="small",
        description=(
            "for a few thousand pictures and no download: KID first, whose estimate is unbiased at"
            " any count; MobileNetV2; standard errors by resampling"
        ),
        metrics=(
            "kid",
            "fid",
            "precision",
            "recall",
            "density",
            "coverage",
            "nearest_training",
            "retrieval",
        ),
        network="mobilenet-v2",
        resize="bicubic-antialias",
        samples=5000,
        fewer=True,
        reference_samples=10_000,
        kid_subsets=None,
        resamples=10,
    ),
    EvaluationProtocol(
        name="ldm-2022",
        description=(
            "the tables of Rombach et al. 2022 (arXiv 2112.10752, appendix E.3): 50,000 samples"
            " against the entire training set; FID and Inception Score as torch-fidelity has them,"
            " precision and recall on pool3 features, k = 3, against 10,000 of its pictures, as"
            " ADM's script has them"
        ),
        metrics=("fid", "inception_score", "precision", "recall"),
        network=_CANONICAL,
        resize="tf1-bilinear",
        samples=50_000,
        manifold_reference_samples=10_000,
    ),
    EvaluationProtocol(
        name="adm",
        description=(
            "Dhariwal and Nichol 2021 (arXiv 2105.05233, section 2.2): 50,000 samples against the"
            " entire training set; TensorFlow's Inception graph, which resizes inside; Inception"
            " Score in splits of 5,000 in their order; precision and recall on pool3, k = 3,"
            " against 10,000 of the training pictures"
        ),
        metrics=("fid", "inception_score", "precision", "recall"),
        network=_CANONICAL,
        resize="tf1-bilinear",
        samples=50_000,
        manifold_reference_samples=10_000,
        inception_shuffle_seed=None,
    ),
    EvaluationProtocol(
        name="clean-fid",
        description=(
            "Parmar et al. 2022 (arXiv 2104.11222): PIL's bicubic filter on each channel in"
            " floating point, clipped and not rounded to 8 bits again; 50,000 samples"
        ),
        metrics=("fid", "kid"),
        network=_CANONICAL,
        resize="pil-bicubic",
        samples=50_000,
    ),
    EvaluationProtocol(
        name="torch-fidelity",
        description=(
            "the package torch-fidelity (Obukhov et al. 2020): TensorFlow 1's bilinear filter to"
            " 299, (x - 128) / 128; Inception Score on unbiased logits in 10 splits; KID in 100"
            " subsets of 1,000, cubic kernel with gamma = 1/d; precision and recall on VGG16's fc2"
            " after ReLU, k = 3. Since its version 0.4.0 that package takes its first input as the"
            " generated one for all metrics; before, precision and recall had the two exchanged"
        ),
        metrics=("fid", "kid", "inception_score", "precision", "recall"),
        network=_CANONICAL,
        resize="tf1-bilinear",
        samples=50_000,
        manifold_network="vgg16",
        kid_seed=2020,
    ),
    EvaluationProtocol(
        name="reconstruction",
        description=(
            "what a first stage keeps of pictures, and at which rate (arXiv 2112.10752, table 8):"
            " 8-bit pictures against themselves, a KL posterior by its mean; MobileNetV2; KID of"
            " pairs"
        ),
        metrics=("rate", "psnr", "ssim", "lpips", "rkid", "rfid"),
        network="mobilenet-v2",
        resize="bicubic-antialias",
        samples=5000,
        fewer=True,
        reference_split="validation",
    ),
)

PROTOCOLS: Mapping[str, EvaluationProtocol] = MappingProxyType({p.name: p for p in _BUILT_IN})


def get_protocol(name: str | Path) -> EvaluationProtocol:
    """Return a protocol.

    Args:
        name: A name of `PROTOCOLS`, or the path of a YAML file with one's own.

    Raises:
        ConfigError: If there is none; or naming every wrong key and value of the file at once.

    Example:
        >>> get_protocol("ldm-2022").samples
        50000
    """
    text = str(name)
    if text in PROTOCOLS:
        return PROTOCOLS[text]
    path = Path(name)
    if path.suffix.lower() in (".yaml", ".yml") or path.is_file():
        protocol = EvaluationProtocol.from_dict(read_yaml(path), text)
        if protocol.name in PROTOCOLS:
            raise ConfigError(
                f"{text}: name: {protocol.name!r} is a built-in protocol; choose another name"
            )
        return protocol
    raise ConfigError(f"unknown protocol {text!r}; {nearest(text, PROTOCOLS)}, or a YAML file")
