"""What a frozen text encoder gives of captions, computed once and kept."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.conditioning.base import Conditioner, ConditionInputs, TextOptions
from mezzotint.data.base import ImageData, ListsCaptions
from mezzotint.data.kept import CacheReport, KeptTensors, Peers, keep_tensors
from mezzotint.data.latent_store import TEXTS
from mezzotint.latent_diffusion import fingerprint

__all__ = ["TextCache", "all_captions", "build_text_cache"]


class TextCache(Mapping[str, Tensor]):
    """Tokens ``(M, d)`` by caption, float32 on the CPU, mapped from the disk.

    Args:
        kept: The tokens of each caption.
        captions: In the same order.
        report: What became of the cache.

    Attributes:
        key: Hash of the captions and of what read them.
    """

    def __init__(self, kept: KeptTensors, captions: Sequence[str], report: CacheReport) -> None:
        self.report, self.key = report, kept.key
        self._kept = kept
        self._places = {caption: place for place, caption in enumerate(captions)}

    def __getitem__(self, caption: str) -> Tensor:
        return self._kept.read(self._places[caption])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def all_captions(data: ImageData, most: int) -> list[str] | None:
    """Return all that data can say, and the empty caption, in order of the alphabet.

    Args:
        data: The images.
        most: Captions, the empty one aside, beyond which it is given up.

    Returns:
        None if they can say more, or don't know what they can say.
    """
    if not isinstance(data, ListsCaptions):
        return None
    found: set[str] = set()
    for index in range(len(data)):
        found.update(data.captions_of(index))
        if len(found) - ("" in found) > most:
            return None
    return sorted(found | {""})


@torch.no_grad()
def build_text_cache(
    captions: Sequence[str],
    encoder: Conditioner,
    *,
    folder: Path,
    device: torch.device,
    text: TextOptions | None = None,
    dtype: torch.dtype = torch.float32,
    peers: Peers | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TextCache:
    """Encode the captions that aren't encoded yet, and open all.

    A caption's key is a hash of its words, of how they are read, and of the encoder's shape,
    vocabulary and weights. So another caption or another encoder has another key, and what did not
    change is found. Damaged shards are found and built anew; see `keep_tensors`.

    Tokens are what the encoder gives in float32, without dropout. Each caption is encoded alone,
    so that its tokens do not depend on which others were missing: a run that is stopped, or whose
    shard was damaged, goes on with the same. A batch that the encoder reads at once differs from
    them in the last bits, and one that it reads under autocast by the rounding of that.

    Args:
        captions: No one twice.
        encoder: Conditions by captions, with one sequence of tokens and no mask for a single one;
            its weights are float32. It is left on the device and in evaluation mode.
        folder: Where the tokens are kept; runs may share it, and latents lie beside them.
        device: Where to encode.
        text: How captions are read; by default as in training.
        dtype: In which they are kept: float32, or float16, which rounds them to 1/2048 of
            themselves.
        peers: The processes that share the work, each of which writes shards of its own.
        on_progress: Called with (captions done, captions to be encoded), of this process.

    Raises:
        DataError: If a value is beyond what float16 can hold.
        OSError: If the folder cannot be written.
        RequestError: If a caption cannot be read.
    """
    text = text or TextOptions()
    encoder.to(device).eval()
    settings = json.dumps([encoder.settings(), asdict(text)], sort_keys=True)
    whole = f"{settings} {fingerprint(encoder.state_dict().items())} {dtype}"
    keys = [hashlib.sha256(repr((whole, caption)).encode()).hexdigest() for caption in captions]

    def make(missing: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Tensor]]:
        for key, place in missing:
            said = encoder(ConditionInputs(count=1, captions=[captions[place]], text=text))
            assert said.crossattn is not None and said.crossattn_mask is None
            yield key, said.crossattn[0].float().cpu().clone()

    kept, report = keep_tensors(
        folder, TEXTS, keys, make, dtype=dtype, peers=peers, on_progress=on_progress
    )
    return TextCache(kept, captions, report)
