"""Random reward models of small sizes in the files of HPSv2 and ImageReward, with all the names of the real ones."""

import torch

WIDTH, BLOCKS, SIDE, PATCH, TOKENS = 128, 2, 32, 8, 40
_LETTERS = [chr(code) for code in range(97, 123)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]


def hpsv2(file, **sizes):
    """Save a ViT-H-14 of open_clip in small, as ``HPS_v2.1_compressed.pt`` is, and return its weights."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = {"width": 160, "head_width": 80, "layers": 2, "patch_size": 4, "image_size": 16, **sizes}
    text = CLIPTextCfg(context_length=12, width=128, heads=2, layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        weights = CLIP(32, CLIPVisionCfg(**vision), text).state_dict()
        for name, value in weights.items():
            if value.ndim and "ln_" not in name:
                value.normal_(std=0.5 if "embedding" in name else 0.2)
    torch.save({"epoch": 1, "state_dict": weights}, file)
    return weights


def image_reward(folder):
    """Save an ImageReward in small with BERT's vocabulary beside it, and return its weights."""
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, WIDTH),
        "blip.visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        **_layer("blip.visual_encoder.patch_embed.proj", WIDTH, 3, PATCH, PATCH),
        **_norm("blip.visual_encoder.norm"),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, WIDTH),
        "blip.text_encoder.embeddings.position_embeddings.weight": (TOKENS, WIDTH),
        **_norm("blip.text_encoder.embeddings.LayerNorm"),
        **_layer("blip.vision_proj", 16, WIDTH),
        **_layer("blip.text_proj", 16, WIDTH),
    }
    for block in (f"blip.visual_encoder.blocks.{index}." for index in range(BLOCKS)):
        shapes |= _norm(f"{block}norm1") | _norm(f"{block}norm2")
        shapes |= _layer(f"{block}attn.qkv", 3 * WIDTH, WIDTH) | _layer(f"{block}attn.proj", WIDTH, WIDTH)
        shapes |= _layer(f"{block}mlp.fc1", 2 * WIDTH, WIDTH) | _layer(f"{block}mlp.fc2", WIDTH, 2 * WIDTH)
    for layer in (f"blip.text_encoder.encoder.layer.{index}." for index in range(BLOCKS)):
        for attention in ("attention", "crossattention"):
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= _layer(f"{layer}{attention}.{name}", WIDTH, WIDTH)
            shapes |= _norm(f"{layer}{attention}.output.LayerNorm")
        shapes |= _layer(f"{layer}intermediate.dense", 2 * WIDTH, WIDTH)
        shapes |= _layer(f"{layer}output.dense", WIDTH, 2 * WIDTH) | _norm(f"{layer}output.LayerNorm")
    for place, (rows, columns) in {0: (32, WIDTH), 2: (24, 32), 4: (16, 24), 6: (8, 16), 7: (1, 8)}.items():
        shapes |= _layer(f"mlp.layers.{place}", rows, columns)
    random = torch.Generator().manual_seed(6)
    weights = {name: torch.randn(shape, generator=random) * 0.2 for name, shape in shapes.items()}
    for name, value in weights.items():
        if "norm" in name.lower() and name.endswith("weight"):
            value.add_(1)
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return weights


def _layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
