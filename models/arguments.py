"""The command line of `train.py`: stages, shapes, times and tuning."""

import argparse
from pathlib import Path

import torch


def parse_arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for target/, draft/ and heldout_prompts.json")
    parser.add_argument("--stdlib", type=Path, help="root of the library to learn (default: this Python's own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on CUDA")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=None, help="default: on CUDA")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--target-only", action="store_true", help="stop once the target is saved")
    parser.add_argument("--from-pair", type=Path, help="keep this folder's target; distil its draft further, if any")
    parser.add_argument("--from-unfinished", type=Path, help="begin with the finish of the target in this folder")
    parser.add_argument("--samples-only", action="store_true", help="stop once the target's continuations are saved")
    parser.add_argument("--samples", type=Path, action="append", metavar="FOLDER", help="distil on those saved there")
    parser.add_argument("--quick", action="store_true", help="tiny models and seconds per stage, to try the script")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--vocab-size", type=int, default=2048)
    shape.add_argument("--hidden", type=int, default=192)
    shape.add_argument("--target-layers", type=int, default=22)
    shape.add_argument("--target-mlp", type=int, default=512)
    shape.add_argument(
        "--draft", action="append", metavar="LAYERSxMLP[xHIDDEN][@TV]",
        help="a draft to distil; several learn side by side, the first is draft/, the next draft1/ (default 4x512@2)",
    )  # fmt: skip
    time_ = parser.add_argument_group("time")
    time_.add_argument("--target-minutes", type=float, default=3.0)
    time_.add_argument("--target-epochs", type=float, default=20.0, help="stop the target here even if time is left")
    time_.add_argument("--finish-minutes", type=float, default=0.0)
    time_.add_argument("--sample-minutes", type=float, default=1.0)
    time_.add_argument("--distil-minutes", type=float, default=2.5)
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument("--batch-tokens", type=int, default=None, help="target (default: 16384 on CUDA, 2048 on CPU)")
    tuning.add_argument("--draft-batch-tokens", type=int, default=None, help="default: twice the target's")
    tuning.add_argument("--sample-rows", type=int, default=None, help="decoded at once (default: 2048 on CUDA, 32)")
    tuning.add_argument("--sample-length", type=int, default=512)
    tuning.add_argument("--dropout", type=float, default=0.2)
    tuning.add_argument("--weight-decay", type=float, default=0.3)
    tuning.add_argument("--muon-lr", type=float, default=0.03)
    tuning.add_argument("--adam-lr", type=float, default=0.003)
    tuning.add_argument("--draft-muon-lr", type=float, default=0.02)
    tuning.add_argument("--finish-lr-factor", type=float, default=0.05, help="of the target's rates")
    tuning.add_argument("--loops-weight", type=float, default=0.5, help="of unlikelihood in the finish")
    tuning.add_argument("--loops-allowed", type=float, default=0.1, help="share of repeated 8-grams a row may have")
    tuning.add_argument("--anchor-weight", type=float, default=1.0, help="of KL to the unfinished target in the finish")
    tuning.add_argument("--companion-weight", type=float, default=0.5, help="of the companion's say in the finish")
    tuning.add_argument("--loss-budget", type=float, help="steer the companion's say to end at this held-out loss")
    tuning.add_argument("--finish-tv-weight", type=float, default=2.0, help="of total variation to the companion")
    args = parser.parse_args()
    fill_defaults(args)
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    """Defaults that hang on the device, and the settings of --quick."""
    cuda = args.device.startswith("cuda")
    args.draft = args.draft or ["4x512@2"]
    args.compile = cuda if args.compile is None else args.compile
    args.graphs = cuda if args.graphs is None else args.graphs
    args.max_files = None
    args.max_train_prompts = 40_000
    if args.quick:
        args.hidden, args.target_layers, args.target_mlp, args.draft = 64, 3, 128, ["2x128@1", "1x256@0"]
        args.vocab_size, args.max_files, args.max_train_prompts = 1024, 40, 100
        args.target_minutes = args.finish_minutes = args.sample_minutes = args.distil_minutes = 0.1
        args.sample_rows = args.sample_rows or 8
    args.batch_tokens = args.batch_tokens or (16384 if cuda else 2048)
    args.draft_batch_tokens = args.draft_batch_tokens or 2 * args.batch_tokens
    args.sample_rows = args.sample_rows or (2048 if cuda else 32)
