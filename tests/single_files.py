"""Pipelines written as one file in the layouts that their authors published them in.

LDM's names for Stable Diffusion and SDXL, SAI's for SD3, BFL's for FLUX: the way back from
diffusers' names, for tests of the way there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
NET = "model.diffusion_model."


def write(path: Path, *parts: Mapping[str, Tensor]) -> Path:
    joined = {name: tensor.contiguous().clone() for part in parts for name, tensor in part.items()}
    save_file(joined, path)
    return path


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state: Mapping[str, Tensor], *rules: tuple[str, str]) -> State:
    """Keys changed by regular expressions, each rule in turn."""
    names = {}
    for name in state:
        new = name
        for pattern, by in rules:
            new = re.sub(pattern, by, new)
        names[name] = new
    return {names[name]: tensor for name, tensor in state.items()}


def unet(module: Any) -> State:
    """LDM's U-Net: blocks numbered through, upsampling after an attention if there is one."""
    per = module.config.layers_per_block + 1
    attends = ["CrossAttn" in kind for kind in module.config.up_block_types]
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    flat = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def rename(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in flat:
            return f"{flat[stem]}.{kind}"
        if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
            way, block, what, layer, rest = found.groups()
            first = int(block) * per
            place = first + int(layer) + (way == "down")
            side = "input_blocks" if way == "down" else "output_blocks"
            if what == "resnets":
                inner, _, kind = rest.rpartition(".")
                return f"{side}.{place}.0.{resnet[inner]}.{kind}"
            if what == "attentions":
                return f"{side}.{place}.1.{rest}"
            if what == "downsamplers":
                return f"{side}.{first + per}.0.op.{kind}"
            return f"{side}.{first + per - 1}.{1 + attends[int(block)]}.conv.{kind}"
        found = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", name)
        assert found, name
        what, layer, rest = found.groups()
        if what == "attentions":
            return f"middle_block.1.{rest}"
        inner, _, kind = rest.rpartition(".")
        return f"middle_block.{2 * int(layer)}.{resnet[inner]}.{kind}"

    return {NET + rename(name): tensor for name, tensor in module.state_dict().items()}


def vae(module: Any) -> State:
    """LDM's autoencoder: levels count from the largest picture, attention is a 1 × 1 conv."""
    last = len(module.config.up_block_types) - 1
    state = renamed(
        module.state_dict(),
        (r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}"),  # type: ignore[arg-type]
        (r"down_blocks", "down"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"resnets", "block"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        (r"attn_1\.to_", "attn_1."),
    )
    for name, tensor in state.items():
        if "attn_1" in name and tensor.dim() == 2:
            state[name] = tensor[:, :, None, None]
    return prefixed("first_stage_model.", state)


def text(module: Any, prefix: str) -> State:
    """A CLIP text model under Hugging Face's names."""
    bare = renamed(module.state_dict(), (r"^text_model\.", ""))
    inner = {n: t for n, t in bare.items() if n != "text_projection.weight"}
    outer = {n: t for n, t in bare.items() if n == "text_projection.weight"}
    return prefixed(prefix, prefixed("text_model.", inner) | outer)


def open_clip(module: Any, prefix: str) -> State:
    """A CLIP text model under OpenCLIP's names: one matrix for query, key and value."""
    state = renamed(
        module.state_dict(),
        (r"^text_model\.", ""),
        (r"^encoder\.layers", "transformer.resblocks"),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"embeddings\.", ""),
        (r"final_layer_norm", "ln_final"),
        (r"layer_norm", "ln_"),
        (r"fc1", "c_fc"),
        (r"fc2", "c_proj"),
        (r"self_attn", "attn"),
    )
    for name in [name for name in state if "q_proj" in name]:
        kind = name.rpartition(".")[2]
        parts = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[name.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat(parts)
    if "text_projection.weight" in state:
        state["text_projection"] = state.pop("text_projection.weight").T
    return prefixed(prefix, state)


def fused(state: State, names: tuple[str, ...], into: str) -> None:
    """Several matrices as one, in place."""
    for kind in ("weight", "bias"):
        if f"{names[0]}.{kind}" in state:
            parts = [state.pop(f"{name}.{kind}") for name in names]
            state[f"{into}.{kind}"] = torch.cat(parts)


def swapped(state: State, name: str) -> None:
    """Scale and shift of the last modulation stand the other way round."""
    for key in {f"{name}.weight", f"{name}.bias"} & state.keys():
        state[key] = torch.cat(state[key].chunk(2)[::-1])


def sd3_transformer(module: Any) -> State:
    state = dict(module.state_dict())
    last = module.config.num_layers - 1
    for i in range(last + 1):
        old, new = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for attention in ("attn", "attn2"):
            qkv = tuple(f"{old}.{attention}.to_{letter}" for letter in "qkv")
            if f"{qkv[0]}.weight" in state:
                fused(state, qkv, f"{new}.x_block.{attention}.qkv")
        added = tuple(f"{old}.attn.add_{letter}_proj" for letter in "qkv")
        fused(state, added, f"{new}.context_block.attn.qkv")
    swapped(state, f"transformer_blocks.{last}.norm1_context.linear")
    swapped(state, "norm_out.linear")
    block = r"transformer_blocks\.(\d+)"
    words, image = r"joint_blocks.\1.context_block", r"joint_blocks.\1.x_block"
    state = renamed(
        state,
        (r"^pos_embed\.pos_embed", "pos_embed"),
        (r"^pos_embed\.proj", "x_embedder.proj"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"^proj_out", "final_layer.linear"),
        (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (rf"{block}\.norm1_context\.linear", rf"{words}.adaLN_modulation.1"),
        (rf"{block}\.norm1\.linear", rf"{image}.adaLN_modulation.1"),
        (rf"{block}\.ff_context", rf"{words}.mlp"),
        (rf"{block}\.ff", rf"{image}.mlp"),
        (r"mlp\.net\.0\.proj", "mlp.fc1"),
        (r"mlp\.net\.2", "mlp.fc2"),
        (rf"{block}\.attn\.to_add_out", rf"{words}.attn.proj"),
        (rf"{block}\.attn\.norm_added_", rf"{words}.attn.ln_"),
        (rf"{block}\.(attn2?)\.to_out\.0", rf"{image}.\2.proj"),
        (rf"{block}\.(attn2?)\.norm_", rf"{image}.\2.ln_"),
    )
    return prefixed(NET, state)


# What FLUX.1 and FLUX.2 name alike; after their own rules.
BFL = (
    (r"^(\w+_in)\.1", r"\1.in_layer"),
    (r"^(\w+_in)\.2", r"\1.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"^transformer_blocks", "double_blocks"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"(double_blocks\.\d+\.)attn\.norm_q\.weight", r"\1img_attn.norm.query_norm.scale"),
    (r"(double_blocks\.\d+\.)attn\.norm_k\.weight", r"\1img_attn.norm.key_norm.scale"),
)


def bfl(module: Any) -> State:
    """Weights with q, k and v of the joint blocks in one, and the last modulation swapped."""
    state = dict(module.state_dict())
    for i in range(module.config.num_layers):
        old, new = f"transformer_blocks.{i}.attn", f"double_blocks.{i}"
        fused(state, tuple(f"{old}.to_{letter}" for letter in "qkv"), f"{new}.img_attn.qkv")
        added = tuple(f"{old}.add_{letter}_proj" for letter in "qkv")
        fused(state, added, f"{new}.txt_attn.qkv")
    swapped(state, "norm_out.linear")
    return state


def flux_transformer(module: Any) -> State:
    """BFL's names, without a prefix, as in their own file."""
    state = bfl(module)
    for i in range(module.config.num_single_layers):
        old = f"single_transformer_blocks.{i}"
        parts = (*(f"{old}.attn.to_{letter}" for letter in "qkv"), f"{old}.proj_mlp")
        fused(state, parts, f"single_blocks.{i}.linear1")
    single, new = r"^single_transformer_blocks\.(\d+)", r"single_blocks.\1"
    return renamed(
        state,
        (r"time_text_embed\.timestep_embedder\.linear_", "time_in."),
        (r"time_text_embed\.guidance_embedder\.linear_", "guidance_in."),
        (r"time_text_embed\.text_embedder\.linear_", "vector_in."),
        (rf"{single}\.norm\.linear", rf"{new}.modulation.lin"),
        (rf"{single}\.proj_out", rf"{new}.linear2"),
        (r"norm1_context\.linear", "txt_mod.lin"),
        (r"norm1\.linear", "img_mod.lin"),
        (r"ff_context\.net", "txt_mlp"),
        (r"ff\.net", "img_mlp"),
        (r"_mlp\.0\.proj", "_mlp.0"),
        *BFL,
    )


def flux2_transformer(module: Any) -> State:
    """The same for FLUX.2, whose single blocks are fused in diffusers too."""
    single, new = r"^single_transformer_blocks\.(\d+)", r"single_blocks.\1"
    return renamed(
        bfl(module),
        (r"time_guidance_embed\.timestep_embedder\.linear_", "time_in."),
        (r"_modulation(\w*)\.linear", r"_modulation\1.lin"),
        (rf"{single}\.attn\.to_qkv_mlp_proj", rf"{new}.linear1"),
        (rf"{single}\.attn\.to_out", rf"{new}.linear2"),
        (r"ff_context\.linear_in", "txt_mlp.0"),
        (r"ff_context\.linear_out", "txt_mlp.2"),
        (r"ff\.linear_in", "img_mlp.0"),
        (r"ff\.linear_out", "img_mlp.2"),
        *BFL,
    )


def write_sd(pipe: Any, path: Path) -> Path:
    words = text(pipe.text_encoder, "cond_stage_model.transformer.")
    return write(path, unet(pipe.unet), vae(pipe.vae), words)


def write_sd2(pipe: Any, path: Path) -> Path:
    words = open_clip(pipe.text_encoder, "cond_stage_model.model.")
    return write(path, unet(pipe.unet), vae(pipe.vae), words)


def write_sdxl(pipe: Any, path: Path) -> Path:
    first = text(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    second = open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return write(path, unet(pipe.unet), vae(pipe.vae), first, second)


def write_sd3(pipe: Any, path: Path, *, texts: bool) -> Path:
    """With all three text encoders, or with none, as SD3.5 comes."""
    words: State = {}
    if texts:
        words |= text(pipe.text_encoder, "text_encoders.clip_l.transformer.")
        words.pop("text_encoders.clip_l.transformer.text_projection.weight")
        words |= text(pipe.text_encoder_2, "text_encoders.clip_g.transformer.")
        t5 = dict(pipe.text_encoder_3.state_dict())
        t5.pop("encoder.embed_tokens.weight", None)  # stands there once
        words |= prefixed("text_encoders.t5xxl.transformer.", t5)
    return write(path, sd3_transformer(pipe.transformer), vae(pipe.vae), words)


def write_flux(pipe: Any, path: Path) -> Path:
    return write(path, flux_transformer(pipe.transformer))


def write_flux2(pipe: Any, path: Path) -> Path:
    return write(path, flux2_transformer(pipe.transformer))
