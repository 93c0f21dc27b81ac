"""Greedy decoding: tokens per second with the cache and without, beside transformers' generate.

    python benchmarks/decode.py [ROUNDS]

All decode with the same random weights, those of a dense Chameleon: text of fixed length from
prompts of fixed length, image codes masked. The tokens must be equal before anything is timed. The
rival without a cache reads its whole row again for each token. One thread, fp32.
"""

import sys
from typing import Any

import torch

from earlyfuse.configs import decoders
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.generate.session import Sampling, generate
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from harness import Report, Rival, compare

SHAPE = decoders.Shape(
    dim=192, layers=4, heads=4, hidden_dim=512, vocab_size=2560, norm_order="pre"
)
CODES, BLOCK = 512, 16
PAD, BOS, EOS, BEGIN, END = 1, 0, 2, 3, 4
FIRST_CODE = 8
SETTINGS = ((1, 32, 32), (8, 32, 32), (8, 32, 64))  # documents, tokens of a prompt, new tokens

VOCABULARY = Vocabulary(
    size=SHAPE.vocab_size,
    bos=BOS,
    eos=EOS,
    pad=PAD,
    media=(MediaCodes(Modality.IMAGE, FIRST_CODE, CODES, BEGIN, END, BLOCK),),
)
OURS_TO_THEIRS = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def ours() -> Decoder:
    """A dense decoder whose logits differ by more than rounding error."""
    model = decoders.dense(SHAPE).build()
    model.init_states()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.08, generator=generator)
        model.lm_head.weight[EOS] = 0  # never the most likely: all reach full length
    return model.eval()


def theirs(model: Decoder) -> Any:
    """transformers' Chameleon with the same parameters; none if it is not installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: timed without it")
        return None
    names = [f"IMGIMG{''.join(chr(65 + int(c)) for c in str(i))}Z" for i in range(CODES)]
    config = transformers.ChameleonConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        intermediate_size=SHAPE.hidden_dim,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.heads,
        vocabulary_map={"<image>": 5, **{n: FIRST_CODE + i for i, n in enumerate(names)}},
        vq_config={"num_embeddings": CODES, "base_channels": 32, "resolution": 32},
    )
    other = transformers.ChameleonForConditionalGeneration(config).eval()
    states = {}
    for name, value in model.state_dict().items():
        prefix = ""
        if name.startswith("layers."):
            _, number, name = name.split(".", 2)
            prefix = f"model.layers.{number}."
        stem = name.removesuffix(".weight").removesuffix(".bias")
        leaf = ".bias" if name.endswith(".bias") else ".weight"
        states[prefix + OURS_TO_THEIRS[stem] + leaf] = value
    missing, unexpected = other.load_state_dict(states, strict=False)
    assert not unexpected and all("vqmodel" in name for name in missing), (missing, unexpected)
    return other


def rivals(model: Decoder, other: Any, prompts: list[list[int]], new: int) -> list[Rival]:
    """Ours with the cache, ours without, then theirs; each returns its tokens."""

    def run(cache: bool) -> list[torch.Tensor]:
        greedy: dict[str, Any] = {"mode": "text", "sampling": Sampling(temperature=0)}
        written = generate(model, VOCABULARY, prompts, new_tokens=new, cache=cache, **greedy)
        return [torch.tensor(written).float()]

    def run_theirs() -> list[torch.Tensor]:
        tokens = torch.tensor(prompts)
        written = other.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
            suppress_tokens=[PAD, BOS, EOS, BEGIN, END],
        )
        return [written[:, len(prompts[0]) :].float()]

    made = [
        Rival("ours, cache", lambda: run(True)),
        Rival("ours, reading anew", lambda: run(False), same_as="ours, cache"),
    ]
    if other is not None:
        made.append(Rival("transformers' generate", run_theirs, same_as="ours, cache"))
    return made


def main(rounds: int) -> None:
    """Times all settings and writes ``results/decode.{jsonl,md}``."""
    report = Report("decode", "DecodeCache: with a cache, without, and transformers' generate")
    model = ours()
    other = theirs(model)
    for documents, length, new in SETTINGS:
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(1024, 2560, (documents, length - 1), generator=generator)
        prompts = [[BOS, *row] for row in words.tolist()]
        found = rivals(model, other, prompts, new)
        timings = compare(found, rounds=rounds, warmups=1, tolerance=0.0)
        count = documents * new
        setting = {
            "documents": documents,
            "prompt": length,
            "new tokens": new,
            "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M, fp32",
            "tokens per CPU second": ", ".join(f"{t.name} {count / t.cpu:,.0f}" for t in timings),
        }
        report.add(setting, timings)
    report.write()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
