"""What a training run can be told: the keys of timm's train.py, and a few of our own in the group "mixpool"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One key: how its values are read, its default, and what `--help` says.

    Attributes:
        kind: the type of the value, or of each of them; `dict` for a mapping (`name=value` on the command line).
        many: how many values, as argparse's nargs; None for one.
        is_free: whether a run can be continued with another value.
    """

    kind: type
    default: Any
    help: str
    many: int | str | None = None
    choices: tuple[str, ...] | None = None
    is_free: bool = False


def _free(kind: type, default: Any, help: str) -> Option:
    return Option(kind, default, help, is_free=True)


GROUPS: dict[str, dict[str, Option]] = {
    "data": {
        "data_dir": _free(str, None, "folder of the data set, with a subfolder or tar file for each split"),
        "dataset": Option(str, "", "timm's name of its kind: empty for folders and tars, hfds/NAME, wds/NAME, ..."),
        "train_split": Option(str, "train", "name of the training split"),
        "val_split": Option(str, "validation", "name of the validation split"),
        "dataset_download": _free(bool, False, "let torch/ and tfds/ data sets be downloaded"),
        "class_map": Option(str, "", "file with the name of one class per line, in the order of the model's outputs"),
        "workers": _free(int, 4, "processes that load images, per training process"),
        "pin_mem": _free(bool, False, "load into pinned memory, which the GPU copies faster"),
        "no_prefetcher": Option(bool, False, "normalise in the workers instead of on the GPU"),
    },
    "model": {
        "model": Option(str, "mixpool_resnet50", "mixpool_*, or any name of timm or torchvision/NAME"),
        "pretrained": Option(bool, False, "start from the published weights"),
        "pretrained_path": Option(str, None, "file with those weights, instead of a download"),
        "initial_checkpoint": Option(str, "", "weights to load, which have to fit as they are; stabilized ones too"),
        "model_kwargs": Option(dict, {}, "further arguments of the model, as select=auto pooling=energy"),
        "num_classes": Option(int, None, "classes of the output (default: the model's)"),
        "gp": Option(str, None, "global pooling (default: the model's)"),
        "in_chans": Option(int, None, "channels of the images (default: 3)"),
        "img_size": Option(int, None, "side of the images, pixels (default: the model's)"),
        "input_size": Option(int, None, "channels, height and width of the images (default: the model's)", many=3),
        "crop_pct": Option(float, None, "side of the validation crop over the resized shorter side"),
        "mean": Option(float, None, "mean of the pixels, per channel", many="+"),
        "std": Option(float, None, "standard deviation of the pixels, per channel", many="+"),
        "interpolation": Option(
            str, "", "interpolation of the validation images", choices=("bilinear", "bicubic", "nearest", "")
        ),
        "drop": Option(float, None, "dropout rate"),
        "drop_path": Option(float, None, "drop path rate"),
        "drop_block": Option(float, None, "drop block rate"),
        "bn_momentum": Option(float, None, "momentum of the batch norms"),
        "bn_eps": Option(float, None, "epsilon of the batch norms"),
        "grad_checkpointing": Option(bool, False, "recompute activations in the backward pass"),
    },
    "batches and device": {
        "batch_size": Option(int, 128, "images per process and step"),
        "validation_batch_size": _free(int, None, "images per process and step of validation"),
        "grad_accum_steps": Option(int, 1, "steps whose gradients are summed before an update"),
        "device": _free(str, "cuda", "cuda or cpu"),
        "amp": Option(bool, False, "automatic mixed precision"),
        "amp_dtype": Option(str, "float16", "its lower precision", choices=("float16", "bfloat16")),
        "channels_last": Option(bool, False, "memory format of images and weights"),
        "torchcompile": _free(str, None, "compile the model with this backend, as inductor"),
        "torchcompile_mode": _free(str, None, "mode of torch.compile"),
        "device_modules": Option(str, None, "modules to import first; timm's script needs mixpool.timm_models", "+"),
        "sync_bn": Option(bool, False, "batch norm over all processes"),
        "dist_bn": Option(
            str, "reduce", "what to do with each process's running statistics", choices=("reduce", "broadcast", "")
        ),
        "no_ddp_bb": Option(bool, False, "do not broadcast buffers at each step"),
    },
    "optimizer": {
        "opt": Option(str, "sgd", "timm's name of the optimizer"),
        "opt_eps": Option(float, None, "epsilon of the optimizer"),
        "opt_betas": Option(float, None, "betas of the optimizer", many=2),
        "opt_kwargs": Option(dict, {}, "further arguments of the optimizer"),
        "momentum": Option(float, 0.9, "momentum"),
        "weight_decay": Option(float, 2e-5, "weight decay"),
        "clip_grad": Option(float, None, "bound of the gradient (default: none)"),
        "clip_mode": Option(str, "norm", "what is bounded", choices=("norm", "value", "agc")),
        "layer_decay": Option(float, None, "factor of the learning rate from layer to layer"),
    },
    "schedule": {
        "epochs": Option(int, 300, "epochs of the schedule"),
        "lr": Option(float, None, "learning rate (default: from lr_base)"),
        "lr_base": Option(float, 0.1, "learning rate at lr_base_size images per update"),
        "lr_base_size": Option(int, 256, "see lr_base"),
        "lr_base_scale": Option(
            str, "", "growth of the rate with the batch; by the optimizer if empty", choices=("linear", "sqrt", "")
        ),
        "sched": Option(
            str,
            "cosine",
            "timm's name of the schedule",
            choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"),
        ),
        "sched_on_updates": Option(bool, False, "change the learning rate at each update, not each epoch"),
        "warmup_epochs": Option(int, 5, "epochs of linear warm-up"),
        "warmup_lr": Option(float, 1e-5, "learning rate at the start of the warm-up"),
        "warmup_prefix": Option(bool, False, "add the warm-up to the epochs instead of taking it from them"),
        "min_lr": Option(float, 0.0, "lower bound of the learning rate"),
        "cooldown_epochs": Option(int, 0, "epochs at min_lr after the schedule"),
        "decay_epochs": Option(float, 90.0, "epochs between the decays of the step schedule"),
        "decay_milestones": Option(int, [90, 180, 270], "epochs of the decays of the multistep schedule", many="+"),
        "decay_rate": Option(float, 0.1, "factor of a decay"),
    },
    "augmentation and loss": {
        "no_aug": Option(bool, False, "no augmentation"),
        "train_crop_mode": Option(
            str, None, "random resized crops, or two that keep the ratio of the sides", choices=("rrc", "rkrc", "rkrr")
        ),
        "scale": Option(float, [0.08, 1.0], "share of the image's area in a random crop", many=2),
        "ratio": Option(float, [3 / 4, 4 / 3], "aspect ratio of a random crop", many=2),
        "hflip": Option(float, 0.5, "probability of a horizontal flip"),
        "vflip": Option(float, 0.0, "probability of a vertical flip"),
        "color_jitter": Option(float, 0.4, "strength of the colour jitter"),
        "color_jitter_prob": Option(float, None, "probability of any colour jitter"),
        "grayscale_prob": Option(float, 0.0, "probability of a gray image"),
        "gaussian_blur_prob": Option(float, 0.0, "probability of a blurred image"),
        "aa": Option(str, None, "AutoAugment policy, as rand-m9-mstd0.5-inc1"),
        "train_interpolation": Option(
            str, "random", "interpolation of the training images", choices=("random", "bilinear", "bicubic", "nearest")
        ),
        "reprob": Option(float, 0.0, "probability of random erasing"),
        "remode": Option(str, "pixel", "what is erased with", choices=("const", "rand", "pixel")),
        "recount": Option(int, 1, "number of erased rectangles"),
        "mixup": Option(float, 0.0, "alpha of mixup; 0 for none"),
        "cutmix": Option(float, 0.0, "alpha of cutmix; 0 for none"),
        "cutmix_minmax": Option(float, None, "bounds of cutmix's ratio, instead of alpha", many=2),
        "mixup_prob": Option(float, 1.0, "probability of mixup or cutmix"),
        "mixup_switch_prob": Option(float, 0.5, "probability of cutmix where both are on"),
        "mixup_mode": Option(str, "batch", "what shares one mixing ratio", choices=("batch", "pair", "elem")),
        "mixup_off_epoch": Option(int, 0, "epoch from which there is no mixup; 0 for never"),
        "smoothing": Option(float, 0.1, "label smoothing"),
        "bce_loss": Option(bool, False, "binary cross entropy instead of softmax cross entropy"),
        "bce_target_thresh": Option(float, None, "threshold that makes its targets 0 or 1"),
    },
    "moving average and distillation": {
        "model_ema": Option(bool, False, "also keep a moving average of the weights, and validate it"),
        "model_ema_decay": Option(float, 0.9998, "its decay"),
        "model_ema_warmup": Option(bool, False, "let the decay grow from 0"),
        "kd_temperature": Option(float, 1.0, "temperature of the teacher's and the model's probabilities"),
        "task_loss_weight": Option(float, None, "weight of the labels' loss beside the teacher's"),
        "distill_loss_weight": Option(float, None, "weight of the teacher's loss"),
    },
    "run": {
        "output": _free(str, "output", "folder of the experiments"),
        "experiment": _free(str, "", "name of this one's folder (default: the configuration's, or the model's)"),
        "resume": _free(str, "", "continue from this file, where the folder has no last.pth.tar yet"),
        "seed": Option(int, 42, "of weights, order and augmentation"),
        "log_interval": _free(int, 50, "steps between two lines of the log"),
        "recovery_interval": _free(int, 0, "updates between two checkpoints within an epoch; 0 for none"),
        "val_interval": Option(int, 1, "epochs between two validations"),
        "eval_metric": Option(str, "top1", "what makes a checkpoint the best", choices=("top1", "top5", "loss")),
    },
    "mixpool": {
        "convert": Option(
            dict, None, "convert a stock model with these arguments of mixpool.convert, as pooling=energy"
        ),
        "convert_images": Option(int, 0, "training images to select and calibrate on; 0 for the filters alone"),
        "distill": Option(str, None, "the teacher: the stock model that the converted one was", choices=("stock",)),
        "on_error": _free(str, "raise", "raise or skip: images that cannot be read"),
        "restart": _free(bool, False, "start anew, and delete what the folder has of an earlier run"),
        "dry_run": _free(bool, False, "check everything, train two batches, write nothing"),
        "stop_after": _free(int, 0, "stop after so many epochs of this call; the schedule stays whole"),
    },
}
OPTIONS: dict[str, Option] = {name: option for group in GROUPS.values() for name, option in group.items()}

# Keys of timm's script that have no counterpart here: an error that says so helps more than "unknown".
TIMM_ONLY = frozenset(
    """
    aug_repeats aug_splits bce_pos_weight bce_sum checkpoint_hist color_jitter_hue crop_mode dataset_trust_remote_code
    decay_fn drop_connect epoch_repeats fast_norm fuser head_init_bias head_init_scale input_img_mode input_key
    jsd_loss kd_distill_type kd_loss_type kd_model_name layer_decay_min_scale layer_decay_no_opt_scale log_wandb
    lr_cycle_decay lr_cycle_limit lr_cycle_mul lr_k_decay lr_noise lr_noise_pct lr_noise_std model_dtype
    model_ema_force_cpu naflex_loader no_resume_opt patience_epochs resplit save_images split_bn start_epoch
    synchronize_step target_key torchscript train_num_samples tta use_multi_epochs_loader
    val_num_samples wandb_project wandb_tags worker_seeding
    """.split()
)
