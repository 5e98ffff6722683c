#!/usr/bin/env python3
"""Train with multi-token prediction whose weight falls again: --mtp_anneal 0.5 takes it linearly to 0 over the first
half of the steps. All other flags are the script's.

    python docs/14-mtp/annealed.py --mtp_anneal 0.5 --model mini --mtp_enabled --num_iterations 454
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt2_mod as script  # noqa: E402


def annealed(plan, share):
    """A plan() whose mtp_weight is 0 from that share of the steps on."""
    def falling(step, config, run):
        planned = plan(step, config, run)
        return planned._replace(mtp_weight=planned.mtp_weight * max(0.0, 1 - step / (share * run.num_iterations)))

    return falling


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--mtp_anneal", type=float, default=0.5, help="share of the steps after which it is 0 [0.5]")
    args, others = parser.parse_known_args(argv)
    if not 0 < args.mtp_anneal <= 1:
        parser.error(f"mtp_anneal={args.mtp_anneal:g} must be above 0 and at most 1")
    script.plan = annealed(script.plan, args.mtp_anneal)
    return script.main(others)


if __name__ == "__main__":
    sys.exit(main())
