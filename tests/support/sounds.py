"""Synthetic utterances, and prepared folders with speech made of them: no program speaks them."""

import io

import numpy as np
import soundfile
from raw_shards import articles, png, quiet, sentence, spec_of, write_tar

from earlyfuse.data.prepare import prepare

RATE = 16_000


def sound(rng, seconds=0.6, rate=RATE):
    """Syllables: chirps with overtones that swell and fade, over a little noise; float64 (N,)."""
    parts = []
    while sum(map(len, parts)) < seconds * rate:
        time = np.arange(int(rng.uniform(0.08, 0.2) * rate)) / rate
        start, stop = rng.uniform(120, 300), rng.uniform(120, 300)
        phase = 2 * np.pi * (start * time + (stop - start) * time**2 / (2 * time[-1]))
        formant = rng.uniform(400, 3000)
        overtones = np.arange(1, 20)
        weight = np.exp(-(((overtones * start - formant) / 400) ** 2))
        tone = (weight[:, None] * np.sin(overtones[:, None] * phase)).sum(0)
        parts.append(tone * np.hanning(len(time)))
    wave = np.concatenate(parts)[: int(seconds * rate)]
    return 0.2 * wave / np.abs(wave).max() + 1e-3 * rng.standard_normal(len(wave))


def encoded(wave, rate=RATE, kind="WAV", subtype="PCM_16"):
    """(N,) or (N, channels) as the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def spoken_pairs(rng, count, damaged=()):
    """Members of ``count`` pairs, WAV and FLAC in turns; ``damaged``: those that end too early."""
    for number in range(count):
        kind = ("WAV", "FLAC")[number % 2]
        audio = encoded(sound(rng, rng.uniform(0.2, 0.9)), kind=kind)
        yield (
            f"{number:04d}.{kind.lower()}",
            audio[: -len(audio) // 3] if number in damaged else audio,
        )
        yield f"{number:04d}.txt", sentence(rng).encode()


def three_media(folder):
    """Raw shards with text, images and speech: ``train/{books,said,mixed}``, ``held``."""
    from json import dumps

    rng = np.random.default_rng(5)
    write_tar(folder / "books" / "0.tar", articles(rng, 30))
    for number in range(2):
        write_tar(folder / "said" / f"{number}.tar", spoken_pairs(rng, 12))
    mixed = []
    for number in range(10):
        fields = {
            "texts": [None, "plus", None, sentence(rng)],
            "images": [None, None, "0.png", None],
            "audio": ["0.wav", None, None, None],
        }
        mixed += [
            (f"{number}.json", dumps(fields).encode()),
            (f"{number}.0.wav", encoded(sound(rng, 0.4))),
            (f"{number}.0.png", png(rng)),
        ]
    write_tar(folder / "mixed" / "0.tar", mixed)
    write_tar(folder / "held" / "0.tar", spoken_pairs(rng, 4))
    return folder


def speech_spec(raw, out, **changes):
    names = {name: raw / name for name in ("books", "said", "mixed")}
    fields = {"train": names, "validation": {"said": raw / "held"}, "speech_codes": 24}
    return spec_of(raw, out, **{**fields, "speech_tokenizer": "kmeans", **changes})


def prepared_speech(raw, out, **changes):
    prepare(speech_spec(raw, out, **changes), quiet())
    return out
