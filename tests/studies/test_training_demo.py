"""The demonstration's judgement: right pictures pass, pictures of something else do not."""

import torch
from PIL import Image

from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.generation.generate import GeneratedImage
from mezzotint.generation.pipeline import load
from mezzotint.studies.training_demo import score


def test_real_emoji_score_full_marks_and_shuffled_ones_chance(text_run):
    pipeline = load(text_run)
    data = EmojiData(EmojiDataConfig(subset="demo-48", resolution=32))
    request = pipeline.request(prompt="x")
    pictures = [
        GeneratedImage(Image.fromarray(data.load(k).image.permute(1, 2, 0).numpy()), request)
        for k in range(len(data))
    ]
    right = score(pipeline, data, pictures)
    assert right.accuracy == 1.0 and right.psnr > 60
    # an untrained model draws nothing that could be told apart
    assert right.permuted_accuracy < 0.1
    wrong = score(pipeline, data, pictures[1:] + pictures[:1])
    assert wrong.accuracy == 0.0 and wrong.psnr < 20
    assert torch.isfinite(torch.tensor(wrong.autoencoder_psnr))
