"""What ComfyUI's nodes take and give, as nodes.py and comfy_extras declare them (early 2026).

name → (required, optional, outputs); an input is a type name, a (least, greatest) range, a tuple of
choices, or the name of a folder whose files it lists.
"""

from __future__ import annotations

from typing import Any

FILE = "a file"
SIZE = (16, 16384)
SAMPLERS = ("euler", "heun", "dpmpp_2m", "ddim", "uni_pc")
SCHEDULERS = ("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "normal", "beta")

Inputs = dict[str, Any]
NODES: dict[str, tuple[Inputs, Inputs, tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": FILE}, {}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": (
        {
            "unet_name": FILE,
            "weight_dtype": ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"),
        },
        {},
        ("MODEL",),
    ),
    "DualCLIPLoader": (
        {"clip_name1": FILE, "clip_name2": FILE, "type": ("sdxl", "sd3", "flux", "hunyuan_video")},
        {"device": ("default", "cpu")},
        ("CLIP",),
    ),
    "CLIPLoader": (
        {"clip_name": FILE, "type": ("stable_diffusion", "sd3", "qwen_image", "flux2")},
        {"device": ("default", "cpu")},
        ("CLIP",),
    ),
    "VAELoader": ({"vae_name": FILE}, {}, ("VAE",)),
    "ModelSamplingSD3": ({"model": "MODEL", "shift": (0.0, 100.0)}, {}, ("MODEL",)),
    "ModelSamplingFlux": (
        {
            "model": "MODEL",
            "max_shift": (0.0, 100.0),
            "base_shift": (0.0, 100.0),
            "width": SIZE,
            "height": SIZE,
        },
        {},
        ("MODEL",),
    ),
    "CLIPTextEncode": ({"clip": "CLIP", "text": "STRING"}, {}, ("CONDITIONING",)),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, {}, ("CONDITIONING",)),
    "FluxGuidance": (
        {"conditioning": "CONDITIONING", "guidance": (0.0, 100.0)},
        {},
        ("CONDITIONING",),
    ),
    "CreateHookLoraModelOnly": (
        {"lora_name": FILE, "strength_model": (-20.0, 20.0)},
        {"prev_hooks": "HOOKS"},
        ("HOOKS",),
    ),
    "CreateHookKeyframe": (
        {"strength_mult": (-20.0, 20.0), "start_percent": (0.0, 1.0)},
        {"prev_hook_kf": "HOOK_KEYFRAMES"},
        ("HOOK_KEYFRAMES",),
    ),
    "SetHookKeyframes": ({"hooks": "HOOKS"}, {"hook_kf": "HOOK_KEYFRAMES"}, ("HOOKS",)),
    "CombineHooks2": ({}, {"hooks_A": "HOOKS", "hooks_B": "HOOKS"}, ("HOOKS",)),
    "ConditioningSetProperties": (
        {
            "cond_NEW": "CONDITIONING",
            "strength": (0.0, 10.0),
            "set_cond_area": ("default", "mask bounds"),
        },
        {"mask": "MASK", "hooks": "HOOKS", "timesteps": "TIMESTEPS_RANGE"},
        ("CONDITIONING",),
    ),
    "EmptyLatentImage": ({"width": SIZE, "height": SIZE, "batch_size": (1, 4096)}, {}, ("LATENT",)),
    "EmptySD3LatentImage": (
        {"width": SIZE, "height": SIZE, "batch_size": (1, 4096)},
        {},
        ("LATENT",),
    ),
    "EmptyFlux2LatentImage": (
        {"width": SIZE, "height": SIZE, "batch_size": (1, 4096)},
        {},
        ("LATENT",),
    ),
    "Flux2Scheduler": ({"steps": (1, 4096), "width": SIZE, "height": SIZE}, {}, ("SIGMAS",)),
    "RandomNoise": ({"noise_seed": (0, 2**64 - 1)}, {}, ("NOISE",)),
    "KSamplerSelect": ({"sampler_name": SAMPLERS}, {}, ("SAMPLER",)),
    "CFGGuider": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "cfg": (0.0, 100.0),
        },
        {},
        ("GUIDER",),
    ),
    "SamplerCustomAdvanced": (
        {
            "noise": "NOISE",
            "guider": "GUIDER",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        {},
        ("LATENT", "LATENT"),
    ),
    "KSampler": (
        {
            "model": "MODEL",
            "seed": (0, 2**64 - 1),
            "steps": (1, 10000),
            "cfg": (0.0, 100.0),
            "sampler_name": SAMPLERS,
            "scheduler": SCHEDULERS,
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": (0.0, 1.0),
        },
        {},
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, {}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, {}, ()),
}


def check(graph: dict[str, dict[str, Any]]) -> None:
    """Whether ComfyUI would take a workflow: every input known, present, of its type, in range."""
    for name, node in graph.items():
        required, optional, _ = NODES[node["class_type"]]
        place = f"{name} {node['class_type']}"
        assert set(required) <= set(node["inputs"]) <= {*required, *optional}, place
        for key, value in node["inputs"].items():
            wanted = (required | optional)[key]
            if isinstance(value, list):
                source, output = value
                assert int(source) < int(name), place  # no cycle
                assert NODES[graph[source]["class_type"]][2][output] == wanted, (place, key)
            elif wanted in (FILE, "STRING"):
                assert isinstance(value, str), (place, key)
            elif isinstance(wanted, tuple) and isinstance(wanted[0], str):
                assert value in wanted, (place, key)
            else:
                assert wanted[0] <= value <= wanted[1], (place, key)
                assert not (isinstance(wanted[1], int) and isinstance(value, float)), (place, key)
