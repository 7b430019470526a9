"""The ``shortft`` command line. Heavy imports live inside the commands that need them."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortft import __version__
from shortft.assets import EMBEDDED
from shortft.cli_options import (
    REWARD,
    AdapterStepsOption,
    BatchOption,
    GuidanceOption,
    ModelOption,
    OutputDirOption,
    PipelineOption,
    PrecisionOption,
    PromptsOption,
    ResolutionOption,
    SeedOption,
    SegmentsOption,
    ShortcutOption,
    StepsOption,
    StrengthOption,
    TunedModelOption,
    config_of,
    if_given,
    settings_in,
    with_config_options,
)
from shortft.config import to_yaml
from shortft.confined import COMPARISON, RUN, refuse_links
from shortft.errors import Stopped, UserError
from shortft.inputs import check_output_file, check_reward, read_prompts
from shortft.redact import without_secrets

app = typer.Typer(
    help="Align a text-to-image model with a differentiable reward by ShortFT.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# A disk's faults; what is written to a file that is open tells no name.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
# Every mistake in option names or values; typer keeps this class of click in varying places.
USAGE_ERROR = typer.BadParameter.__mro__[1]

ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG", help="Settings: a YAML file or a recipe's name; options take precedence."
    ),
]
AdapterFile = Annotated[Path, typer.Option(exists=True, help="Directory of the trained adapter.")]


typed: list[str] = []  # the arguments of this call of `main`, for reports


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 check failed, 2 a mistake, 130 and 143 stopped by SIGINT and SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    typed[:] = arguments
    # transformers tells every user without torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # And bitsandbytes, which peft imports, tells of a kernel that nothing here calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return app(arguments or ["--help"], standalone_mode=False) or 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.strerror is None or (error.filename is None and error.errno not in DISK):
            raise
        what = error.filename or "the disk that is written to"
        message = f"{what}: {error.strerror}; mend it, or name another place"
    except Exception as error:
        if isinstance(error, USAGE_ERROR):
            message = error.format_message()  # type: ignore[attr-defined]
        elif _ran_out(error):
            less = "a smaller --batch-size or --precision bf16 takes less"
            ways = {
                "demo": "end what else runs here",
                "compare": f"{less}, in another --output-dir",
            }
            message = f"out of memory; {ways.get(typed[0] if typed else '', less)}"
        else:
            raise
    except KeyboardInterrupt:
        return 130
    except Stopped as stop:
        return 128 + stop.signal
    print("error:", without_secrets(" ".join(message.split())), file=sys.stderr)
    return 2


def _ran_out(error: Exception) -> bool:
    if not isinstance(error, (MemoryError, RuntimeError)):
        return False
    from shortft.out_of_memory import ran_out

    return ran_out(error)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shortft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


@app.command()
@with_config_options
def train(
    config_file: ConfigFile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in output_dir.")
    ] = False,
    auto_resume: Annotated[
        bool,
        typer.Option("--auto-resume", help="As --resume if there is a checkpoint, else start."),
    ] = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Resume although settings changed.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the configuration, draw the chain, check everything, and stop."
        ),
    ] = False,
    **options: object,
) -> None:
    """Train a reward LoRA. Every setting has an option and a line in CONFIG."""
    from shortft.launcher import as_launched

    config = as_launched(config_of(settings_in(config_file), options))
    refuse_links(config.output_dir, RUN)
    if dry_run:
        print(to_yaml(config), end="", flush=True)
        from shortft.checkpoint import any_in
        from shortft.preflight.dry_run import dry_run as check_run

        started = any_in(config.output_dir / "checkpoints")
        check_run(config, resume=resume or (auto_resume and started))
        return
    from shortft.train import train

    train(config, resume=resume, allow_change=allow_change, auto_resume=auto_resume)


@app.command()
@with_config_options
def plan(
    config_file: ConfigFile = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the plan into this PNG file.")] = None,
    **options: object,
) -> None:
    """Draw the chain of every stage and its cost. Takes the options of train."""
    if png is not None:
        png = check_output_file("--png", png)
    config = config_of(settings_in(config_file), options)
    from shortft.plan_view import show_plan

    show_plan(config, png)


@app.command()
def sample(
    model: TunedModelOption = None,
    pipeline: PipelineOption = None,
    adapter: Annotated[
        Path | None, typer.Option(exists=True, help="Directory of the trained adapter.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; may be given several times.")
    ] = None,
    prompts: PromptsOption = None,
    output_dir: OutputDirOption = Path("runs/sample"),
    seed: SeedOption = 0,
    num_steps: AdapterStepsOption = None,
    guidance_scale: GuidanceOption = None,
    strength: StrengthOption = 1.0,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 8,
) -> None:
    """Draw pictures with the base model or with an adapter."""
    wanted = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not wanted:
        raise UserError("--prompt: nothing to draw; give --prompt TEXT or --prompts FILE")
    from shortft.sampling import sample

    sample(
        model=model,
        pipeline=pipeline,
        adapter=adapter,
        prompts=wanted,
        output_dir=output_dir,
        seed=seed,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        strength=strength,
        precision=precision,
        batch_size=batch_size,
    )


@app.command()
def evaluate(
    adapter: AdapterFile,
    model: TunedModelOption = None,
    pipeline: PipelineOption = None,
    reward: Annotated[str | None, REWARD] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Another reward to measure; default: the adapter's, or the embedded model's.",
            callback=if_given(lambda value: check_reward(value, "--held-out")),
        ),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Models of the rewards, as in train.")
    ] = None,
    prompts: PromptsOption = None,
    output_dir: OutputDirOption = Path("runs/evaluate"),
    seeds: Annotated[int, typer.Option(min=1, help="Noises per prompt, at least 2.")] = 3,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, from the list's start.")] = 48,
    num_steps: AdapterStepsOption = None,
    guidance_scale: GuidanceOption = None,
    strength: StrengthOption = 1.0,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 16,
    plain_chain: Annotated[
        bool,
        typer.Option(
            "--plain-chain",
            help="Run a LoRA of the few-step model (--method tune_shortcut) on the base's chain.",
        ),
    ] = False,
) -> None:
    """Measure base and tuned model side by side, on the same prompts and noise."""
    from shortft.evaluate import evaluate_command

    evaluate_command(
        model=model,
        pipeline=pipeline,
        adapter=adapter,
        reward=reward,
        held_out=held_out,
        reward_model=reward_model,
        prompts_path=prompts,
        output_dir=output_dir,
        seeds=seeds,
        num_prompts=num_prompts,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        strength=strength,
        precision=precision,
        batch_size=batch_size,
        plain_chain=plain_chain,
    )


@app.command()
def check(
    model: ModelOption = EMBEDDED,
    pipeline: PipelineOption = None,
    shortcut: ShortcutOption = "auto",
    num_prompts: Annotated[int, typer.Option(min=1, help="Trajectories to measure on.")] = 16,
    seed: SeedOption = 0,
    num_steps: StepsOption = 50,
    segments: SegmentsOption = 4,
    guidance_scale: GuidanceOption = None,
    shortcut_guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Guidance of the shortcut; default: its own, else 1, or the chain's on FLUX.1.",
        ),
    ] = None,
    shortcut_scale: Annotated[
        float | None, typer.Option(help="Scale of the shortcut's LoRA; default: its own, or 1.")
    ] = None,
    prompts: PromptsOption = None,
    resolution: ResolutionOption = None,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 16,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> int:
    """Measure how faithful a shortcut is. Exit code 1 if no better than DDIM jumps of its cost."""
    if output is not None:
        output = check_output_file("--output", output)
    from shortft.shortcut_check import check_command

    return check_command(
        model=model,
        pipeline=pipeline,
        shortcut=shortcut,
        num_prompts=num_prompts,
        seed=seed,
        num_steps=num_steps,
        segments=segments,
        guidance_scale=guidance_scale,
        shortcut_guidance_scale=shortcut_guidance_scale,
        shortcut_scale=shortcut_scale,
        output=output,
        prompts_path=prompts,
        resolution=resolution,
        precision=precision,
        batch_size=batch_size,
    )


@app.command()
def shortcut(
    model: ModelOption = EMBEDDED,
    pipeline: PipelineOption = None,
    output: Annotated[Path, typer.Option(help="The LoRA's file, .safetensors.")] = Path(
        "runs/shortcut.safetensors"
    ),
    kind: Annotated[
        Literal["regression", "consistency"], typer.Option(help="How the LoRA is distilled.")
    ] = "regression",
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time.")] = 20.0,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per update.")] = 32,
    accumulation: Annotated[
        int, typer.Option(min=1, help="Parts of a batch, to save memory; divides it.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Learning rate.")] = 1e-3,
    num_steps: StepsOption = 50,
    segments: SegmentsOption = 4,
    guidance_scale: GuidanceOption = None,
    shortcut_guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Guidance that the shortcut runs with; default: 1 (none), on FLUX.1 the chain's.",
        ),
    ] = None,
    trajectories: Annotated[
        int, typer.Option(min=1, help="Size of the teacher's bank, as far as time allows.")
    ] = 2000,
    seed: SeedOption = 0,
    prompts: PromptsOption = None,
    resolution: ResolutionOption = None,
    precision: PrecisionOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from output.")] = False,
) -> None:
    """Distil a shortcut LoRA for a model. It jumps over the segments of the model's chain."""
    output = check_output_file("--output", output)
    from shortft.distill_command import distill_command

    distill_command(
        model=model,
        pipeline=pipeline,
        output=output,
        kind=kind,
        minutes=minutes,
        rank=rank,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        num_steps=num_steps,
        segments=segments,
        guidance_scale=guidance_scale,
        shortcut_guidance_scale=shortcut_guidance_scale,
        trajectories=trajectories,
        seed=seed,
        precision=precision,
        resolution=resolution,
        prompts_path=prompts,
        resume=resume,
    )


@app.command()
def export(
    adapter: AdapterFile,
    kind: Annotated[
        Literal["diffusers", "kohya", "comfyui", "merged"],
        typer.Option("--format", help="Layout: numbered LoRAs, or a whole model (merged)."),
    ] = "kohya",
    output_dir: OutputDirOption = Path("runs/export"),
    model: TunedModelOption = None,
    pipeline: PipelineOption = None,
    prompts: PromptsOption = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Held-out prompts to measure the plain LoRA on.")
    ] = 24,
    measure: Annotated[
        bool, typer.Option(help="Measure what one LoRA without a schedule loses.")
    ] = True,
    reward: Annotated[str | None, REWARD] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Models of the rewards, as in train.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"],
        typer.Option(help="Number format while measuring, and of a merged model's weights."),
    ] = "fp32",
    batch_size: BatchOption = 16,
) -> None:
    """Write an adapter for other tools: diffusers, kohya's scripts, A1111, ComfyUI, or merged."""
    from shortft.export import export_command

    export_command(
        adapter=adapter,
        kind=kind,
        output_dir=output_dir,
        model=model,
        pipeline=pipeline,
        prompts_path=prompts,
        num_prompts=num_prompts,
        measure=measure,
        reward=reward,
        reward_model=reward_model,
        precision=precision,
        batch_size=batch_size,
    )


@app.command()
@with_config_options
def compare(
    config_file: ConfigFile = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods or variants of them, separated by blanks; 'draft_k:k=3' with options."
        ),
    ] = None,
    rewards: Annotated[str | None, typer.Option(help="Reward specs, separated by blanks.")] = None,
    budget: Annotated[
        str, typer.Option(help="Where nothing else is given: 'laptop' (30 minutes) or 'full'.")
    ] = "laptop",
    seeds: Annotated[int | None, typer.Option(help="Training seeds of every method.")] = None,
    search: Annotated[
        str | None,
        typer.Option(help="Learning rates to try for every method, separated by blanks."),
    ] = None,
    search_minutes: Annotated[
        float | None,
        typer.Option(help="Training minutes of every such trial; default: as a run's."),
    ] = None,
    search_further: Annotated[
        int | None,
        typer.Option(help="Rates to try beyond an edge of those given, while the best lies there."),
    ] = None,
    search_reward: Annotated[
        str | None,
        typer.Option(help="Reward of every trial; its rates then hold for all rewards."),
    ] = None,
    looks: Annotated[
        int | None, typer.Option(help="Evaluations on the way, for curves; 0 = none.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Held-out prompts.")] = None,
    noises: Annotated[int | None, typer.Option(help="Pictures per held-out prompt.")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of the runs that are done.")
    ] = False,
    **options: object,
) -> None:
    """Compare methods at equal training time. Takes the options of train for all runs alike.

    Start the same command again to continue, or several times at once to share the work.
    """
    from shortft.compare.command import compare_command
    from shortft.compare.spec import base_options, comparison_from, parse_list, refuse_base_rate

    if config_file is None and options.get("model") in (None, EMBEDDED):
        config_file = Path(EMBEDDED)
    settings = settings_in(config_file)
    base = config_of(settings, base_options(options))
    # What the user's own file says of rewards and time goes before a budget's; without one, or with
    # the embedded model's recipe, the budget's do.
    named = {} if config_file == Path(EMBEDDED) else settings
    says_minutes = options.get("minutes") is not None or "minutes" in named
    its_reward = (base.reward,) if "reward" in named else None
    chosen = comparison_from(
        budget,
        base,
        methods=methods and parse_list("--methods", methods),
        rewards=parse_list("--rewards", rewards) if rewards else its_reward,
        seeds=seeds,
        minutes=base.minutes if says_minutes else None,
        search=search and parse_list("--search", search),
        search_minutes=search_minutes,
        search_further=search_further,
        search_reward=search_reward,
        looks=looks,
        num_prompts=num_prompts,
        noises=noises,
    )
    if options.get("learning_rate") is not None:
        around_it = base.model != EMBEDDED and search is None
        refuse_base_rate(base.learning_rate, chosen, searched=not around_it)
    refuse_links(base.output_dir, COMPARISON)
    command = shlex.join(["shortft", *typed])
    compare_command(base.output_dir, chosen, base, report_only=report_only, command=command)


@app.command()
def demo(
    output_dir: OutputDirOption = Path("runs/demo"),
    reward: Annotated[str | None, REWARD] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Training time; default: the demo's own.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Do the whole job on the embedded model: train, evaluate, draw; minutes on two cores."""
    refuse_links(output_dir, RUN)
    from shortft.demo import demo

    demo(output_dir=output_dir, reward=reward, minutes=minutes, seed=seed)


@app.command()
def doctor() -> int:
    """Tell what this machine can run: versions, devices, disk, hub, recipes. Loads no model."""
    from shortft.doctor import doctor

    return doctor()
